//! Who is trusted at start.

use crate::units::{REPLICAS_MAX, ReplicaSet};

use super::bitmap::{Bitmap, RegionMaps};
use super::superblock::Superblock;

/// What stands on one replica, as read by the shell.
#[derive(Clone, Debug)]
pub struct Found {
    /// Path, for messages.
    pub path: String,
    /// Size of the backing now, bytes, a multiple of 4096.
    pub device_bytes: u64,
    /// The newest valid superblock.
    pub superblock: Superblock,
    /// The other superblock slot is damaged (torn or rotten): its number.
    pub damaged_slot: Option<u64>,
    /// Its bitmaps; damaged sectors have all their bits set.
    pub maps: RegionMaps,
    /// Number of damaged bitmap sectors.
    pub damaged_sectors: u64,
}

/// A volume ready to be run: what the core starts from.
#[derive(Clone, Debug)]
pub struct Assembly {
    /// The head superblock: the newest table, event count and generation. Its `slot`, `device_bytes` and
    /// `written_unix_ns` are those of the replica it came from.
    pub head: Superblock,
    /// Which of the `Found` given (by index) is the replica in each slot; `None`: free or not found.
    pub found_of_slot: [Option<usize>; REPLICAS_MAX],
    /// Found and trusted to have every acknowledged write outside `unsynced`.
    pub in_sync: ReplicaSet,
    /// Found, a known member, to be brought up to date where `maps.stale` says.
    pub resync: ReplicaSet,
    /// In the table and not found.
    pub missing: ReplicaSet,
    /// Start values of the intent bits and stale maps (union over the trusted replicas).
    pub maps: RegionMaps,
    /// Regions whose copies on the in-sync replicas may differ; empty of bits where fewer than two are in sync.
    pub unsynced: Bitmap,
    /// The replica that unsynced regions are copied from.
    pub source: crate::units::ReplicaSlot,
    /// The operator used `--force` to start from stale replicas: a new generation is due even where no
    /// replica is missing.
    pub forced: bool,
    /// What an operator should be told (damaged slots, replicas that need a full copy and why).
    pub warnings: Vec<String>,
}
