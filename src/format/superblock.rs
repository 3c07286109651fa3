//! The superblock: a volume's identity and its members' states, as one replica knows them.

use uuid::Uuid;

use crate::units::{REPLICAS_MAX, Regions, ReplicaSlot};

/// Longest volume name, bytes of UTF-8.
pub const NAME_BYTES_MAX: usize = 64;
/// Longest path kept for a member, bytes; longer ones keep their end.
pub const PATH_BYTES_MAX: usize = 160;
/// Generations kept as history.
pub const PARENTS_MAX: usize = 32;

/// What a superblock says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// The volume's identity.
    pub volume_uuid: Uuid,
    /// The volume's name; the export name.
    pub name: String,
    /// The volume's size and its regions' size.
    pub regions: Regions,
    /// Seconds since 1970 when the volume was created.
    pub created_unix_s: u64,
    /// Size of this replica's backing when this was written.
    pub device_bytes: u64,
    /// Which member this replica is.
    pub slot: ReplicaSlot,
    /// Grows by one at each metadata change.
    pub event_count: u64,
    /// Random; changes when the set of in-sync replicas shrinks.
    pub generation: Uuid,
    /// Earlier generations, newest first, at most `PARENTS_MAX`.
    pub parents: Vec<Uuid>,
    /// The volume was stopped in order: no intent bit is set.
    pub clean: bool,
    /// Nanoseconds since 1970 when this was written.
    pub written_unix_ns: u64,
    /// The member table.
    pub members: [Option<Member>; REPLICAS_MAX],
}

/// One member of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// The replica's identity.
    pub uuid: Uuid,
    /// Its state as recorded.
    pub state: MemberState,
    /// The event count of the last superblock commit that it took part in.
    pub event_count: u64,
    /// Path as last opened, for messages.
    pub path: String,
}

/// A member's recorded state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemberState {
    /// Has every acknowledged write.
    InSync,
    /// Was being brought up to date; its stale map says where.
    Resyncing,
    /// Missed writes and may come back by itself (it was not there).
    Stale,
    /// Gave errors or was failed by the operator.
    Faulty,
}
