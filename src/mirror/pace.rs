//! How the copies of a resync take turns with clients that are busy.
//!
//! ```text
//!          a job is to begin, clients are busy        burst_ns over and all jobs ended
//!   Idle ────────────────────────────────────► Burst ─────────────────────────────────► Rest
//!    ▲                                           │ clients idle                          │ over, or clients idle
//!    └───────────────────────────────────────────┴───────────────────────────────────────┘
//! ```
//!
//! What must hold: a rest ends by itself (`deadline`), so a resync goes on however busy clients are. Who waits for a
//! region does not wait for its turn (`resync`).
//!
//! Why turns: fewer jobs all the time give clients less, since each job then wakes a worker for each of its steps.
//! Measured in `docs/performance.md`.

use crate::units::{Nanos, SECOND_NS};

const MS_NS: u64 = SECOND_NS / 1000;
/// Clients are busy for this long after a request of theirs came: where disks are fast, it has ended before the next copy
/// is looked for.
const CLIENTS_BUSY_NS: u64 = MS_NS;
/// A rest takes one of so many parts of the time that was worked before it.
const REST_PART: u64 = 3;
/// A rest takes no longer: a burst ends when its last job does, which may have waited for a slow disk.
const REST_NS_MAX: u64 = 100 * MS_NS;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    Idle,
    /// Since then.
    Burst(Nanos),
    /// Until then.
    Rest(Nanos),
}

/// Whose turn it is.
pub(super) struct Pace {
    /// While clients are busy no job begins after this long, until all have ended and a rest is over.
    burst_ns: u64,
    /// When the last request of a client came.
    client_at: Option<Nanos>,
    turn: Turn,
}

impl Pace {
    pub(super) fn new(burst_ns: u64) -> Self {
        Self { burst_ns, client_at: None, turn: Turn::Idle }
    }

    /// A client's request came.
    pub(super) fn client_came(&mut self, now: Nanos) {
        self.client_at = Some(now);
    }

    /// When a rest is over; never later than `pass` was told.
    pub(super) fn deadline(&self) -> Option<Nanos> {
        if let Turn::Rest(until) = self.turn { Some(until) } else { None }
    }

    /// Time goes on.
    pub(super) fn pass(&mut self, now: Nanos) {
        if self.deadline().is_some_and(|until| until <= now) {
            self.turn = Turn::Idle;
        }
    }

    /// Nothing is to be copied.
    pub(super) fn end(&mut self) {
        self.turn = Turn::Idle;
    }

    /// Whether a job may begin now, where `active` have not ended; `in_flight`: requests of clients are.
    pub(super) fn may_begin(&mut self, now: Nanos, active: usize, in_flight: bool) -> bool {
        if !in_flight && self.client_at.is_none_or(|at| now.since(at) >= CLIENTS_BUSY_NS) {
            self.turn = Turn::Idle;
            return true;
        }
        match self.turn {
            Turn::Idle => self.turn = Turn::Burst(now),
            Turn::Rest(_) => return false,
            Turn::Burst(since) if now.since(since) >= self.burst_ns => {
                if active == 0 {
                    self.turn = Turn::Rest(now.plus((now.since(since) / REST_PART).min(REST_NS_MAX)));
                }
                return false;
            }
            Turn::Burst(_) => {}
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Nanos {
        Nanos(ms * MS_NS)
    }

    #[test]
    fn bursts_and_rests_take_turns_while_clients_are_busy() {
        let mut pace = Pace::new(16 * MS_NS);
        pace.client_came(at(100));
        assert!(pace.may_begin(at(100), 0, false) && pace.may_begin(at(115), 3, true));
        assert!(!pace.may_begin(at(116), 1, true), "the burst is over");
        assert_eq!(pace.deadline(), None, "one job has not ended");
        assert!(!pace.may_begin(at(118), 0, true));
        assert_eq!(pace.deadline(), Some(at(124)), "18 ms worked, 6 ms of rest");
        pace.pass(at(123));
        assert!(!pace.may_begin(at(123), 0, true));
        pace.pass(at(124));
        assert!(pace.deadline().is_none() && pace.may_begin(at(124), 0, true));
    }

    #[test]
    fn clients_are_busy_for_a_while_after_a_request_that_has_ended() {
        let mut pace = Pace::new(16 * MS_NS);
        pace.client_came(at(0));
        assert!(pace.may_begin(at(0), 0, false));
        pace.client_came(at(20));
        assert!(!pace.may_begin(at(20), 0, false));
        assert!(pace.deadline().is_some());
        assert!(pace.may_begin(at(21), 0, false), "nobody else wants the disks");
        assert_eq!(pace.deadline(), None);
    }

    #[test]
    fn a_burst_that_a_slow_disk_made_long_is_not_followed_by_a_long_rest() {
        let mut pace = Pace::new(16 * MS_NS);
        assert!(pace.may_begin(at(0), 0, true) && !pace.may_begin(at(9000), 0, true));
        assert_eq!(pace.deadline(), Some(at(9100)));
    }
}
