//! Wake-ups by the clock: operations of the ring, not time limits of its waits.
//!
//! A limit has the kernel set up a timer for each wait and take it down again. What is waited for is seconds away as a rule
//! and a loaded engine waits thousands of times until then, so one timer stands in the ring instead.
//!
//! What must hold: while the engine sleeps, a timer that ends when the next deadline is due or before stands in the ring, or the
//! wait itself is limited. One that ends too early wakes the engine once for nothing, and the next wait starts the right one.

use std::time::Duration;

use io_uring::types::Timespec;

use super::operation::Operation;
use super::ring::Ring;
use super::slab::Key;
use crate::units::Nanos;

/// Timers at most; whoever would need more limits the wait. Each ends earlier than all that were started before it.
const TIMERS_MAX: usize = 8;

/// The timers in the ring.
#[derive(Default)]
pub(super) struct Timers {
    /// When they end: the last one first.
    armed: Vec<(Nanos, Key)>,
    /// For their memory; as many as timers at most.
    #[expect(clippy::vec_box, reason = "the boxes are what is reused")]
    spare: Vec<Box<Timespec>>,
}

impl Timers {
    /// Sees to it that the ring has a completion at the time `at` or before. What is given back limits the wait where no timer does.
    pub(super) fn arm(&mut self, ring: &mut Ring, now: Nanos, at: Nanos) -> Option<Duration> {
        if self.armed.last().is_some_and(|(armed, _)| *armed <= at) {
            return None;
        }
        let left = Duration::from_nanos(at.since(now));
        if left.is_zero() || self.armed.len() >= TIMERS_MAX {
            return Some(left);
        }
        let mut time = self.spare.pop().unwrap_or_default();
        *time = Timespec::from(left);
        self.armed.push((at, ring.start(Operation::Timer { at, time })));
        None
    }

    /// A timer has ended, or was cancelled.
    pub(super) fn ended(&mut self, at: Nanos, time: Box<Timespec>) {
        self.armed.retain(|(armed, _)| *armed != at);
        self.spare.push(time);
    }

    /// The timers in the ring.
    pub(super) fn keys(&self) -> impl Iterator<Item = Key> {
        self.armed.iter().map(|(_, key)| *key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::SECOND_NS;

    fn next(ring: &mut Ring, timers: &mut Timers) -> Nanos {
        let mut out = Vec::new();
        ring.wait(None, &mut out);
        let Operation::Timer { at, time } = out.pop().unwrap().operation else { panic!("another operation") };
        assert!(out.is_empty());
        timers.ended(at, time);
        at
    }

    #[test]
    fn only_what_is_due_before_all_others_is_started() {
        let (mut ring, mut timers) = (Ring::new().unwrap(), Timers::default());
        let (now, soon, late) = (Nanos(7), Nanos(1_000_007), Nanos(3600 * SECOND_NS));
        assert_eq!(timers.arm(&mut ring, now, late), None);
        assert_eq!(timers.arm(&mut ring, now, soon), None);
        assert_eq!(timers.arm(&mut ring, now, soon), None);
        assert_eq!(timers.arm(&mut ring, now, Nanos(late.0 + 1)), None);
        assert_eq!(ring.in_flight(), 2);
        assert_eq!(next(&mut ring, &mut timers), soon);
        assert_eq!(timers.arm(&mut ring, soon, late), None, "it is there still");
        assert_eq!(ring.in_flight(), 1);
        assert_eq!(timers.arm(&mut ring, now, Nanos(soon.0 + 1)), None);
        assert_eq!(next(&mut ring, &mut timers), Nanos(soon.0 + 1));
        let keys: Vec<Key> = timers.keys().collect();
        for target in keys {
            ring.start(Operation::Cancel { target });
        }
        let mut out = Vec::new();
        while ring.in_flight() > 0 {
            ring.wait(None, &mut out);
        }
    }

    #[test]
    fn what_is_due_now_or_has_no_room_limits_the_wait() {
        let (mut ring, mut timers) = (Ring::new().unwrap(), Timers::default());
        let hour = 3600 * SECOND_NS;
        assert_eq!(timers.arm(&mut ring, Nanos(hour), Nanos(hour)), Some(Duration::ZERO));
        assert_eq!(timers.arm(&mut ring, Nanos(hour), Nanos(1)), Some(Duration::ZERO), "long due");
        for index in 0..TIMERS_MAX as u64 {
            assert_eq!(timers.arm(&mut ring, Nanos(0), Nanos(hour - index)), None);
        }
        assert_eq!(timers.arm(&mut ring, Nanos(0), Nanos(SECOND_NS)), Some(Duration::from_secs(1)));
        assert_eq!(ring.in_flight(), TIMERS_MAX);
        for target in timers.keys().collect::<Vec<_>>() {
            ring.start(Operation::Cancel { target });
        }
        let mut out = Vec::new();
        while ring.in_flight() > 0 {
            ring.wait(None, &mut out);
        }
    }
}
