//! The bytes on disk are those of `docs/on-disk-format.md`: compared with files that `tests/golden/make.py` wrote from
//! that page, not from this code. If this fails, volumes that exist can no longer be read: that is a new version
//! of the format, not a new golden file.

use super::*;
use crate::format::bitmap::{decode_page, encode_page};

const SUPERBLOCK: &[u8; 4096] = include_bytes!("../../../tests/golden/superblock.bin");
const UNSEALED: &[u8; 4096] = include_bytes!("../../../tests/golden/superblock-unsealed.bin");
const PAGE: &[u8; 4096] = include_bytes!("../../../tests/golden/page.bin");

fn patterned(seed: u8) -> Uuid {
    Uuid::from_bytes(std::array::from_fn(|n| seed.wrapping_add(n as u8)))
}

fn superblock() -> Superblock {
    let member = |seed, event_count, state, path: &str| {
        Some(Member { uuid: patterned(seed), state, event_count, path: path.to_owned() })
    };
    let mut members = [const { None }; REPLICAS_MAX];
    members[0] = member(0x70, 0x123_4567, MemberState::InSync, "/dev/disk/by-id/first");
    members[2] = member(0x80, 0x123_4567, MemberState::Resyncing, "second.img");
    members[3] = member(0x90, 77, MemberState::Stale, &"x".repeat(160));
    members[7] = member(0xa0, 1, MemberState::Faulty, "");
    Superblock {
        volume_uuid: patterned(0x10),
        name: "gölden".to_owned(),
        regions: Regions { volume_bytes: 10 << 30, region_bytes: 1 << 20 },
        created_unix_s: 1_700_000_000,
        device_bytes: (10 << 30) + (1 << 20),
        slot: slot(2),
        event_count: 0x123_4567,
        generation: patterned(0x40),
        parents: vec![patterned(0x50), patterned(0x60)],
        clean: true,
        written_unix_ns: 1_772_323_199_123_456_789,
        members,
    }
}

#[test]
fn a_superblock_has_the_documented_bytes() {
    assert!(superblock().encode() == *SUPERBLOCK);
    assert_eq!(Superblock::decode(SUPERBLOCK), Ok(superblock()));
}

#[test]
fn a_superblock_from_before_the_seals_is_read() {
    assert!(UNSEALED != SUPERBLOCK);
    assert_eq!(Superblock::decode(UNSEALED), Ok(superblock()));
}

#[test]
fn a_bitmap_page_has_the_documented_bytes() {
    let mut maps = RegionMaps::clear(5000);
    for region in [3584, 3591, 3592, 4031, 4032, 4999] {
        maps.intent.set(region, true);
    }
    maps.stale[0][3600..3700].fill(true);
    for region in [4998, 4999, 3583] {
        maps.stale[7].set(region, true);
    }
    let mut page = vec![0xff; 4096];
    encode_page(patterned(0x10), 1, &maps, &mut page);
    assert!(page == PAGE);
    let mut read = RegionMaps::clear(5000);
    assert_eq!(decode_page(patterned(0x10), 1, PAGE, &mut read), 0);
    maps.stale[7].set(3583, false); // stands on the page before
    assert!(read == maps);
}
