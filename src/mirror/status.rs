//! What `nbdmirror status` shows: a plain snapshot of the core, serialisable and stable.
//!
//! What must hold: field names and meanings are documented in `docs/status-json.md`; fields are only added.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// A volume's state at one moment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The volume's identity.
    pub volume_uuid: Uuid,
    /// The volume's name.
    pub name: String,
    /// Size that clients see, bytes.
    pub size_bytes: u64,
    /// Size of a region, bytes.
    pub region_bytes: u64,
    /// Served read-only.
    pub read_only: bool,
    /// `healthy`, `resyncing`, `degraded` or `failed` (writes answered with an error).
    pub health: Health,
    /// The event count.
    pub event_count: u64,
    /// The generation.
    pub generation: Uuid,
    /// Bytes in regions whose intent bit is set (a crash now would resync these).
    pub dirty_bytes: u64,
    /// Bytes in regions that an unclean stop left to be synced at this start.
    pub unclean_bytes_at_start: u64,
    /// Bytes of those still to be synced.
    pub unsynced_bytes: u64,
    /// The replicas, in slot order.
    pub replicas: Vec<ReplicaStatus>,
    /// Resync in progress.
    pub resync: Option<ResyncStatus>,
    /// Client operations answered since start.
    pub clients: ClientCounters,
}

/// A volume's health in a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Health {
    /// Every member is in sync.
    Healthy,
    /// Every member is there, some are being brought up to date.
    Resyncing,
    /// At least one member is away.
    Degraded,
    /// Writes fail: metadata cannot be recorded or a flush was lost.
    Failed,
}

/// The state of a replica (DESIGN section 1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ReplicaState {
    /// Has every acknowledged write.
    InSync,
    /// Takes new writes; older ones are being copied to it.
    Resyncing,
    /// Missed writes and is not being brought up to date now.
    Stale,
    /// Gave errors or was failed by the operator.
    Faulty,
    /// Not found at start.
    Missing,
}

/// One replica's state and figures.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReplicaStatus {
    /// Its slot in the member table.
    pub slot: usize,
    /// Its identity.
    pub uuid: Uuid,
    /// Path as last opened.
    pub path: String,
    /// Its state.
    pub state: ReplicaState,
    /// Why it is in this state, where there is something to say.
    pub reason: Option<String>,
    /// Read only when nothing else can answer.
    pub write_mostly: bool,
    /// Bytes in regions that it missed writes in.
    pub stale_bytes: u64,
    /// Smoothed latency of its reads, nanoseconds; 0 before the first.
    pub read_latency_ewma_ns: u64,
    /// Smoothed latency of its writes, nanoseconds; 0 before the first.
    pub write_latency_ewma_ns: u64,
    /// Client reads that it answered since start.
    pub reads: u64,
    /// Bytes of those.
    pub read_bytes: u64,
    /// Its share of all client reads since start, 0 to 1.
    pub read_share: f64,
    /// Client writes it took since start.
    pub writes: u64,
    /// Operations that failed since start.
    pub errors: u64,
    /// Operations in flight.
    pub in_flight: u64,
}

/// A resync in progress.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ResyncStatus {
    /// Bytes still to copy.
    pub remaining_bytes: u64,
    /// Bytes copied since it began.
    pub done_bytes: u64,
    /// Rate over the last seconds.
    pub rate_bytes_per_s: u64,
    /// Time left at that rate, seconds; `None` while the rate is 0.
    pub time_left_s: Option<u64>,
}

/// Client operations answered since start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientCounters {
    /// Reads.
    pub reads: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Writes.
    pub writes: u64,
    /// Bytes written.
    pub write_bytes: u64,
    /// Flushes.
    pub flushes: u64,
    /// Trims.
    pub trims: u64,
    /// Writes of zeroes.
    pub zeroes: u64,
    /// Prefetches.
    #[serde(default)]
    pub caches: u64,
    /// Answers to BLOCK_STATUS.
    #[serde(default)]
    pub block_statuses: u64,
    /// Requests answered with an error.
    pub errors: u64,
    /// Requests in flight.
    pub in_flight: u64,
}
