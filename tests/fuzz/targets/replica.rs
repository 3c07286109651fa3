//! Reading a whole replica: two superblock slots and bitmap pages, spoilt, exchanged and unreadable.
//!
//! What must hold:
//! - "No volume here" is said only where both slots were read and neither has our magic.
//! - What is found is the newest superblock that stands there in its place; the other slot counts as damaged where it
//!   is not what `create` and the daemon leave.
//! - Each bitmap sector reads as it stands, or, where it is damaged or cannot be read, as all bits set.
//! - A refusal names the replica.

use nbdmirror::format::Found;
use nbdmirror::format::bitmap::RegionMaps;
use nbdmirror::format::superblock::{MAGIC, Superblock};

use super::input::Input;
use super::volume::{
    Stand, previous, seal_sector, seal_superblock, sector_crc, set_some, some_regions, some_superblock,
};
use nbdmirror::format::layout::Layout;

pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let stand = spoilt(&mut input);
    match stand.find() {
        Ok(Some(found)) => check(&stand, &found),
        Ok(None) => {
            assert!(stand.unreadable.iter().all(|from_end| *from_end > 2));
            assert!(stand.slots.iter().all(|slot| slot[..8] != MAGIC), "a volume is taken for none");
        }
        Err(error) => assert!(error.to_string().contains("disk-x"), "{error}"),
    }
}

/// A replica in good order that the input then spoils.
fn spoilt(input: &mut Input<'_>) -> Stand {
    let mut superblock = some_superblock(input);
    superblock.regions = some_regions(input, 5000);
    superblock.device_bytes = Layout::device_bytes_min(superblock.regions) + 4096 * u64::from(input.u8() % 3);
    superblock.event_count = superblock.event_count.max(1);
    let mut before = previous(&superblock);
    let mut maps = RegionMaps::clear(superblock.regions.count() as usize);
    for _ in 0..input.index(8) {
        set_some(input, &mut maps);
    }
    match input.u8() % 8 {
        0 => before.event_count = before.event_count.wrapping_sub(2 * u64::from(input.u8())).min(1 << 60),
        1 => before.generation = superblock.parents.first().copied().unwrap_or_default(),
        2 => before.volume_uuid = uuid::Uuid::nil(),
        3 => before = some_superblock(input),
        _ => {}
    }
    let mut stand = Stand::new("disk-x", &superblock, &before, &maps);
    for _ in 0..input.index(6) {
        spoil(input, &mut stand, &superblock);
    }
    stand
}

fn spoil(input: &mut Input<'_>, stand: &mut Stand, superblock: &Superblock) {
    let slot = input.index(2);
    match input.u8() % 8 {
        0 => stand.slots[slot].fill(0),
        1 => stand.slots[slot][input.index(4096)] ^= input.u8(),
        2 => {
            stand.slots[slot][input.index(768)] = input.u8();
            seal_superblock(&mut stand.slots[slot]);
        }
        3 => stand.slots.swap(0, 1),
        4 => {
            let blocks = stand.pages.len() as u64 / 4096 + 2;
            stand.unreadable.push(1 + input.below(blocks));
        }
        5 => {
            stand.device_bytes = (stand.device_bytes + 4096 * u64::from(input.u8() % 4)).saturating_sub(4096);
        }
        kind => {
            let sector = input.index(stand.pages.len() / 512);
            let bytes = &mut stand.pages[sector * 512..(sector + 1) * 512];
            bytes[input.index(512)] ^= input.u8();
            if kind == 6 {
                seal_sector(superblock.volume_uuid, sector as u64, bytes);
            }
        }
    }
}

fn check(stand: &Stand, found: &Found) {
    let decoded = [0, 1].map(|slot| {
        let readable = !stand.unreadable.contains(&(2 - slot as u64));
        let superblock = Superblock::decode(&stand.slots[slot]).ok().filter(|_| readable)?;
        (superblock.event_count % 2 == slot as u64).then_some(superblock)
    });
    let newest =
        decoded.iter().flatten().max_by_key(|superblock| superblock.event_count).expect("one is whole");
    assert_eq!(&found.superblock, newest, "not the newest superblock");
    assert_eq!(found.device_bytes, stand.device_bytes);
    let newest_slot = newest.event_count % 2;
    match &decoded[1 - newest_slot as usize] {
        None => assert_eq!(found.damaged_slot, Some(1 - newest_slot)),
        Some(other) => {
            let kin = other.volume_uuid == newest.volume_uuid && other.regions == newest.regions;
            let history = other.generation == newest.generation || newest.parents.contains(&other.generation);
            assert!(kin && history, "two superblocks that do not fit together are taken");
            assert!(found.damaged_slot.is_none_or(|slot| slot == 1 - newest_slot));
        }
    }
    check_maps(stand, found);
}

fn check_maps(stand: &Stand, found: &Found) {
    let pages_at =
        Layout { regions: newest_regions(found), device_bytes: found.device_bytes }.page_offset(0).0;
    let mut damaged_sectors = 0;
    let mut in_damage = vec![false; found.maps.regions()];
    found.damaged_regions.iter().for_each(|range| in_damage[range.clone()].fill(true));
    for (sector, regions) in (0..found.maps.regions()).step_by(448).enumerate() {
        let mut bytes = [0; 4096];
        let page = stand.read_at(pages_at + sector as u64 / 8 * 4096, &mut bytes);
        let bytes = &bytes[sector % 8 * 512..][..512];
        let head = bytes[..2] == 0x6d62_u16.to_le_bytes() && bytes[2] == 1;
        let crc = sector_crc(found.superblock.volume_uuid, sector as u64, bytes);
        let sound = page.is_ok() && head && bytes[4..8] == crc.to_le_bytes();
        damaged_sectors += u64::from(!sound);
        for region in regions..found.maps.regions().min(regions + 448) {
            let bit =
                |map: usize| !sound || bytes[8 + 56 * map + region % 448 / 8] & (1 << (region % 8)) != 0;
            assert_eq!(in_damage[region], !sound, "region {region}");
            assert_eq!(found.maps.intent[region], bit(0), "region {region}");
            for (slot, stale) in found.maps.stale.iter().enumerate() {
                assert_eq!(stale[region], bit(1 + slot), "region {region}");
            }
        }
    }
    assert_eq!(found.damaged_sectors, damaged_sectors);
}

fn newest_regions(found: &Found) -> nbdmirror::units::Regions {
    found.superblock.regions
}
