//! Superblocks: any 4096 bytes, valid ones, and spoilt ones with a checksum that is right again.
//!
//! What must hold:
//! - What is decoded is safe to calculate with: geometry, counts, slot and strings keep their limits.
//! - What is encoded is decoded again, the same; a path that was too long keeps its end, parents the newest.
//! - A superblock with one changed byte is refused.

use nbdmirror::format::describe::{describe, printable};
use nbdmirror::format::layout::Layout;
use nbdmirror::format::superblock::{
    DecodeError, EVENT_COUNT_MAX, MAGIC, NAME_BYTES_MAX, PARENTS_MAX, PATH_BYTES_MAX, SUPERBLOCK_BYTES,
    Superblock, VERSION,
};
use nbdmirror::units::{REGION_BYTES_MAX, REGION_BYTES_MIN, VOLUME_BYTES_MAX};

use super::input::Input;
use super::volume::{Block, seal_superblock, some_superblock};

pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    match input.u8() % 4 {
        0 => raw(input.rest()),
        1 => round_trip(&some_superblock(&mut input)),
        2 => one_byte_changed(&mut input),
        _ => sealed(&mut input),
    }
}

fn raw(bytes: &[u8]) {
    let mut block: Block = [0; SUPERBLOCK_BYTES];
    let len = bytes.len().min(SUPERBLOCK_BYTES);
    block[..len].copy_from_slice(&bytes[..len]);
    check(&block);
    assert_eq!(
        Superblock::decode(bytes).is_ok(),
        bytes.len() == SUPERBLOCK_BYTES && Superblock::decode(&block).is_ok()
    );
    // As if it had been written by us: past the checksum.
    block[..8].copy_from_slice(&MAGIC);
    block[8..12].copy_from_slice(&VERSION.to_le_bytes());
    seal_superblock(&mut block);
    check(&block);
}

/// Decodes, and checks what came out.
fn check(block: &Block) {
    match Superblock::decode(block) {
        Ok(superblock) => {
            check_limits(&superblock);
            round_trip(&superblock);
            // Asked of every superblock that decodes.
            let _ = Superblock::unknown_read_only_features(block);
            assert!(!describe(&superblock).chars().any(char::is_control), "a terminal would obey this");
        }
        Err(DecodeError::Blank) => assert_ne!(block[..8], MAGIC),
        Err(DecodeError::NewerVersion { found, supported }) => assert!(found > supported),
        Err(DecodeError::UnknownFeatures { incompatible }) => assert_ne!(incompatible, 0),
        Err(error @ DecodeError::Damaged(_)) => assert_eq!(block[..8], MAGIC, "{error}"),
    }
}

fn check_limits(superblock: &Superblock) {
    let regions = superblock.regions;
    assert!(regions.region_bytes.is_power_of_two());
    assert!((REGION_BYTES_MIN..=REGION_BYTES_MAX).contains(&regions.region_bytes));
    assert!((1..=VOLUME_BYTES_MAX / 4096).contains(&(regions.volume_bytes / 4096)));
    assert!(regions.volume_bytes.is_multiple_of(4096) && superblock.device_bytes.is_multiple_of(4096));
    let layout = Layout { regions, device_bytes: superblock.device_bytes };
    let pages_at = layout.page_offset(0).0;
    assert!(pages_at >= regions.volume_bytes, "metadata stands in the data");
    assert!(pages_at + layout.page_count() * 4096 <= layout.superblock_offset(0).0);
    assert!(
        (1..=EVENT_COUNT_MAX).contains(&superblock.event_count) && superblock.parents.len() <= PARENTS_MAX
    );
    assert!(superblock.name.len() <= NAME_BYTES_MAX && printable(&superblock.name) == superblock.name);
    assert!(superblock.own_entry().is_some());
    let mut uuids: Vec<_> = superblock.members().map(|(_, member)| member.uuid).collect();
    let count = uuids.len();
    uuids.sort_unstable();
    uuids.dedup();
    assert_eq!(uuids.len(), count, "two members with one identity");
    for (_, member) in superblock.members() {
        assert!(member.event_count <= EVENT_COUNT_MAX && member.path.len() <= PATH_BYTES_MAX);
    }
}

/// Decodes what `superblock` encodes, and compares.
fn round_trip(superblock: &Superblock) {
    let mut block = superblock.encode();
    let decoded = Superblock::decode(&block).expect("what was encoded is decoded");
    let mut expected = superblock.clone();
    expected.parents.truncate(PARENTS_MAX);
    for member in expected.members.iter_mut().flatten() {
        while member.path.len() > PATH_BYTES_MAX {
            member.path.remove(0);
        }
    }
    assert_eq!(decoded, expected);
    assert_eq!(decoded.encode(), block);
    check_limits(&decoded);
    let sealed = block;
    seal_superblock(&mut block);
    assert_eq!(block, sealed, "the checksum is not that of the documentation");
}

fn one_byte_changed(input: &mut Input<'_>) {
    let (at, change) = (input.index(SUPERBLOCK_BYTES), input.u8());
    let superblock = some_superblock(input);
    let mut block = superblock.encode();
    block[at] ^= change;
    let decoded = Superblock::decode(&block);
    assert_eq!(decoded.is_ok(), change == 0, "byte {at} changed by {change:#x} is not noticed");
}

/// A valid one, spoilt here and there, with its checksum made right.
fn sealed(input: &mut Input<'_>) {
    let changes = 1 + input.index(8);
    let changes: Vec<(u16, u8)> = (0..changes).map(|_| (input.u16(), input.u8())).collect();
    let mut block = some_superblock(input).encode();
    for (at, value) in changes {
        // Mostly where something stands: header, counts, the heads of the member table.
        let at = match at % 4 {
            0 => usize::from(at / 4) % SUPERBLOCK_BYTES,
            1 => 768 + usize::from(at / 4) % 8 * 192 + usize::from(at / 32) % 26,
            _ => usize::from(at / 4) % 140,
        };
        block[at] = value;
    }
    seal_superblock(&mut block);
    check(&block);
}
