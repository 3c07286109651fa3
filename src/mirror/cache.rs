//! CACHE: the replica that a read of the range would use is asked to have it at hand.
//!
//! What must hold: it changes nothing, waits for nothing but the prefetch itself, and no failure of it is a failure of
//! the replica or of the request. It takes no lock: no byte is read on anybody's behalf.

use super::Mirror;
use super::event::{Answer, DeviceOp, RequestId};
use super::ops::OpOwner;
use crate::units::{ByteRange, VolumeOffset};

/// Bytes that one request warms up at the most, from the beginning of its range: as much as one read may be long.
/// What is prefetched drives other things out of memory.
const PREFETCH_BYTES_MAX: u64 = crate::units::REQUEST_BYTES_MAX;

impl Mirror {
    /// A client will read `range`.
    pub(super) fn start_cache(&mut self, id: RequestId, range: ByteRange) {
        let candidates = self.readable();
        if range.is_empty() || candidates.is_empty() {
            self.cached(id);
            return;
        }
        let slot = self.policy.choose_for_prefetch(candidates, range);
        let offset = VolumeOffset(range.offset).in_replica();
        let len = range.len.min(PREFETCH_BYTES_MAX);
        self.issue(slot, OpOwner::Cache(id), DeviceOp::Cache { offset, len });
    }

    /// The prefetch has ended, no matter how.
    pub(super) fn cached(&mut self, id: RequestId) {
        self.counters.caches += 1;
        self.reply(id, Ok(Answer::Done));
    }
}
