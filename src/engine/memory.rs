//! The memory budget: who may hold how many bytes of payload.
//!
//! A request is charged from the moment its header is obeyed (a WRITE's payload gets its buffer then, a READ's
//! comes) until its reply has been sent or dropped. The rules, in order:
//!
//! 1. A request of at most `GUARANTEED_BYTES` on a connection that holds nothing is always taken: many slow clients
//!    with large requests cannot starve the small ones. This may go over the budget, by 64 KiB a connection.
//! 2. Where nothing is held at all, anything is taken: no deadlock, however small the budget.
//! 3. A quarter of the budget is kept for requests of at most `RESERVED_FOR_BYTES` on connections that hold nothing: they
//!    do not stand in line where they fit. So clients that stall on large requests cost only each other.
//! 4. Otherwise it must fit, in the connection's share (a quarter; a lone request may be larger) and in the other three quarters.
//! 5. Who does not fit waits in line, and others behind it; one request a turn of the line.
//!
//! While somebody waits, a connection that holds memory and whose peer moves no byte for `STALL_NS` is closed:
//! see `sweep`. With nobody waiting the slowest client is left alone.
//!
//! What must hold: what was charged is released, once.

use std::collections::VecDeque;

use super::slab::Key;
use crate::units::{BLOCK_BYTES, SECOND_NS};

/// Small requests that every connection may have one of, bytes.
pub(super) const GUARANTEED_BYTES: u64 = 64 << 10;
/// Requests up to this find room when larger ones wait, one a connection, bytes.
const RESERVED_FOR_BYTES: u64 = 1 << 20;
/// How long a peer may move nothing while others wait for the memory that it holds, nanoseconds.
pub(super) const STALL_NS: u64 = 10 * SECOND_NS;
/// Requests of one connection that are not answered yet, at most.
pub(super) const CLIENT_REQUESTS_MAX: u32 = 512;

/// The answer to [`Budget::admit`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Admission {
    /// Charged; go on.
    Granted,
    /// The connection's own share is used up: go on when a reply of its own has been sent.
    OwnShareFull,
    /// The whole is used up: stand in line.
    Wait,
}

/// Bytes held, and who waits for some.
pub(super) struct Budget {
    bytes_max: u64,
    used_bytes: u64,
    line: VecDeque<Key>,
}

impl Budget {
    /// A budget of `bytes_max` bytes.
    pub(super) fn new(bytes_max: u64) -> Self {
        Self { bytes_max, used_bytes: 0, line: VecDeque::new() }
    }

    /// Asks for `cost` bytes for a connection that holds `held` and, where `at_front`, has just come out of the
    /// line.
    pub(super) fn admit(&mut self, held: u64, cost: u64, at_front: bool) -> Admission {
        let first = |bytes_max| held == 0 && cost <= bytes_max;
        let always = first(GUARANTEED_BYTES) || self.used_bytes == 0 || cost == 0;
        let reserved = first(RESERVED_FOR_BYTES) && self.used_bytes + cost <= self.bytes_max;
        if !always && !reserved {
            if held > 0 && held + cost > self.bytes_max / 4 {
                return Admission::OwnShareFull;
            }
            let fits = self.used_bytes + cost <= self.bytes_max - self.bytes_max / 4;
            if !fits || (!at_front && !self.line.is_empty()) {
                return Admission::Wait;
            }
        }
        self.used_bytes += cost;
        Admission::Granted
    }

    /// Gives `cost` bytes back.
    pub(super) fn release(&mut self, cost: u64) {
        assert!(cost <= self.used_bytes);
        self.used_bytes -= cost;
    }

    /// Stands in line: at its end, or at its front again.
    pub(super) fn stand_in_line(&mut self, connection: Key, at_front: bool) {
        if at_front {
            self.line.push_front(connection);
        } else {
            self.line.push_back(connection);
        }
    }

    /// The first of the line, taken out of it.
    pub(super) fn next_in_line(&mut self) -> Option<Key> {
        self.line.pop_front()
    }

    /// Whether anybody waits.
    pub(super) fn is_waited_for(&self) -> bool {
        !self.line.is_empty()
    }

    /// Most bytes that are charged, but for the exceptions above.
    pub(super) fn bytes_max(&self) -> u64 {
        self.bytes_max
    }

    /// Bytes charged.
    pub(super) fn used_bytes(&self) -> u64 {
        self.used_bytes
    }
}

/// What a payload of `len` bytes at `offset` costs: the memory of the pool's buffer for it.
pub(super) fn payload_cost(offset: u64, len: u64) -> u64 {
    let end = offset.saturating_add(len).div_ceil(BLOCK_BYTES);
    let blocks = (end - offset / BLOCK_BYTES).max(1);
    blocks.next_power_of_two() * BLOCK_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn large_requests_wait_in_line_and_small_ones_pass() {
        let mut budget = Budget::new(256 * MIB);
        for _ in 0..6 {
            assert_eq!(budget.admit(0, 32 * MIB, false), Admission::Granted);
        }
        assert_eq!(budget.admit(0, 2 * MIB, false), Admission::Wait);
        let mut slab = Slab::new();
        let waiting = slab.insert(());
        budget.stand_in_line(waiting, false);
        assert_eq!(budget.admit(0, 4096, false), Admission::Granted);
        assert_eq!(budget.admit(4096, 4096, false), Admission::Wait);
        for _ in 0..63 {
            assert_eq!(budget.admit(0, MIB, false), Admission::Granted, "what is kept for these");
        }
        assert_eq!(budget.admit(0, MIB, false), Admission::Wait);
        budget.release(4096 + 63 * MIB);
        budget.release(32 * MIB);
        assert_eq!(budget.admit(MIB, MIB, false), Admission::Wait); // behind the line
        assert_eq!(budget.next_in_line(), Some(waiting));
        assert_eq!(budget.admit(0, MIB, true), Admission::Granted);
        assert!(!budget.is_waited_for());
        assert_eq!(budget.used_bytes(), 161 * MIB);
    }

    #[test]
    fn one_connection_keeps_to_its_share_and_a_lone_request_always_goes() {
        let mut budget = Budget::new(4 * MIB);
        assert_eq!(budget.admit(0, 32 * MIB, false), Admission::Granted);
        assert_eq!(budget.admit(32 * MIB, 4096, false), Admission::OwnShareFull);
        budget.release(32 * MIB);
        assert_eq!(budget.admit(0, MIB, false), Admission::Granted);
        assert_eq!(budget.admit(MIB, MIB, false), Admission::OwnShareFull);
        assert_eq!(budget.admit(0, 2 * MIB, false), Admission::Granted);
    }

    #[test]
    fn cost_is_the_pools_buffer() {
        assert_eq!(payload_cost(0, 0), 4096);
        assert_eq!(payload_cost(0, 4096), 4096);
        assert_eq!(payload_cost(4095, 2), 8192);
        assert_eq!(payload_cost(4095, 3 << 12), 16384);
        assert_eq!(payload_cost(0, 32 << 20), 32 << 20);
    }

    use super::super::slab::Slab;
}
