//! The keeper's account of a device's connections: how many are dead, when to try again, when to give up. Pure.
//!
//! ```text
//!             died                    connected again
//!   all alive ────► some dead ───────────────────────────► all alive
//!                     │    ▲ failed: wait twice as long
//!                     └────┘
//!                     └─ all dead for the dead time-out, and requests wait ──► given up
//! ```
//!
//! What must hold: never more dead than there are connections; the first try comes soon, later ones ever less often, up to
//! [`BACK_OFF_MAX`] apart. Times are since any fixed moment.

use std::time::Duration;

/// The wait before the first try. Long enough for the kernel to have put the socket down, and for links that die together to be
/// reconnected together.
pub const BACK_OFF_MIN: Duration = Duration::from_millis(100);
/// The longest wait between tries.
pub const BACK_OFF_MAX: Duration = Duration::from_secs(5);

/// See the file's header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Links {
    total: u32,
    dead: u32,
    /// When the last one alive died.
    all_dead_since: Option<Duration>,
    back_off: Duration,
    try_at: Option<Duration>,
}

impl Links {
    /// All alive.
    #[must_use]
    pub fn new(total: u32) -> Self {
        Self { total, dead: 0, all_dead_since: None, back_off: BACK_OFF_MIN, try_at: None }
    }

    /// How many are dead.
    #[must_use]
    pub fn dead(&self) -> u32 {
        self.dead
    }

    /// So many have died.
    pub fn died(&mut self, count: u32, now: Duration) {
        self.dead = self.dead.saturating_add(count).min(self.total);
        if self.dead == self.total {
            self.all_dead_since.get_or_insert(now);
        }
        self.try_at.get_or_insert(now + self.back_off);
    }

    /// Any of them may have died: all are to be offered a new socket.
    pub fn unknown(&mut self, now: Duration) {
        self.died(self.total, now);
    }

    /// A try brought every dead one back.
    pub fn reconnected(&mut self) {
        *self = Self::new(self.total);
    }

    /// A try failed.
    pub fn failed(&mut self, now: Duration) {
        self.back_off = (self.back_off * 2).min(BACK_OFF_MAX);
        self.try_at = Some(now + self.back_off);
    }

    /// How long until the next try; `None` where none is due.
    #[must_use]
    pub fn wait(&self, now: Duration) -> Option<Duration> {
        self.try_at.map(|at| at.saturating_sub(now))
    }

    /// For how long all have been dead.
    #[must_use]
    pub fn down_for(&self, now: Duration) -> Option<Duration> {
        self.all_dead_since.map(|since| now.saturating_sub(since))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn tries_come_soon_and_then_less_often() {
        let mut links = Links::new(2);
        assert_eq!((links.wait(ms(5)), links.down_for(ms(5))), (None, None));
        links.died(1, ms(1000));
        assert_eq!((links.dead(), links.wait(ms(1040)), links.down_for(ms(9000))), (1, Some(ms(60)), None));
        // Another one does not put the try off.
        links.died(1, ms(1050));
        assert_eq!((links.dead(), links.wait(ms(1050))), (2, Some(ms(50))));
        assert_eq!(links.wait(ms(7000)), Some(ms(0)));
        let mut now = ms(1100);
        let mut waits = Vec::new();
        for _ in 0..8 {
            links.failed(now);
            let wait = links.wait(now).unwrap();
            waits.push(u64::try_from(wait.as_millis()).unwrap());
            now += wait;
        }
        assert_eq!(waits, [200, 400, 800, 1600, 3200, 5000, 5000, 5000]);
        assert_eq!(links.down_for(now), Some(now - ms(1050)));
        links.reconnected();
        assert_eq!(links, Links::new(2));
    }

    #[test]
    fn never_more_are_dead_than_there_are() {
        let mut links = Links::new(4);
        links.died(3, ms(0));
        links.unknown(ms(7));
        links.died(u32::MAX, ms(9));
        assert_eq!((links.dead(), links.down_for(ms(10))), (4, Some(ms(3))));
    }
}
