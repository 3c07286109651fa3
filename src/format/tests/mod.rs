//! Tests of the format across its files.

mod assemble;
mod codec;
mod golden;
mod in_doubt;
mod read;
mod readmit;

use uuid::Uuid;

use super::bitmap::RegionMaps;
use super::layout::Layout;
use super::superblock::{Member, MemberState, Superblock};
use super::{Found, assemble::AssembleOptions};
use crate::units::{REPLICAS_MAX, Regions, ReplicaSlot};

/// Three bitmap sectors' worth, the last one not full.
const REGIONS: Regions = Regions { volume_bytes: 1000 * (64 << 10), region_bytes: 64 << 10 };
const STRICT: AssembleOptions = AssembleOptions { degraded: false, force: false, read_only: false };
const DEGRADED: AssembleOptions = AssembleOptions { degraded: true, ..STRICT };
const FORCE: AssembleOptions = AssembleOptions { degraded: true, force: true, ..STRICT };

fn slot(index: usize) -> ReplicaSlot {
    ReplicaSlot::new(index)
}

fn maps() -> RegionMaps {
    RegionMaps::clear(REGIONS.count() as usize)
}

/// A member table from words: a state (`I`n sync, `R`esyncing, `S`tale, `F`aulty) and an event count, or `-`.
fn table(words: &str) -> [Option<Member>; REPLICAS_MAX] {
    let mut members = [const { None }; REPLICAS_MAX];
    for (index, word) in words.split_whitespace().enumerate() {
        let state = match &word[..1] {
            "I" => MemberState::InSync,
            "R" => MemberState::Resyncing,
            "S" => MemberState::Stale,
            "F" => MemberState::Faulty,
            _ => continue,
        };
        members[index] = Some(Member {
            uuid: Uuid::from_u128(100 + index as u128),
            state,
            event_count: word[1..].parse().unwrap(),
            path: format!("/dev/disk{index}"),
        });
    }
    members
}

/// The replica in slot `index`, with its generation (then its parents), event count and member table.
fn found(index: usize, generations: &[u128], event_count: u64, words: &str) -> Found {
    let superblock = Superblock {
        volume_uuid: Uuid::from_u128(1),
        name: "vol".to_owned(),
        regions: REGIONS,
        created_unix_s: 1_700_000_000,
        device_bytes: Layout::device_bytes_min(REGIONS),
        slot: slot(index),
        event_count,
        generation: Uuid::from_u128(generations[0]),
        parents: generations[1..].iter().copied().map(Uuid::from_u128).collect(),
        clean: false,
        written_unix_ns: 1_772_323_199_000_000_000,
        members: table(words),
    };
    Found::new(&format!("disk{index}.img"), superblock, maps())
}
