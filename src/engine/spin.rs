//! Whether to look for the next request for a moment before sleeping.
//!
//! A client at depth 1 sends its next request as soon as it has its reply. To sleep until then and to be woken costs both sides
//! more than to wait awake, above all where an idle processor belongs to a virtual machine and is woken by the host.
//!
//! What must hold: an idle engine sleeps. It looks only after a turn that answered a request or a few and left none open, at most
//! [`SPIN_MAX`] each time, and where that finds nothing ever more seldom. A processor that others want is given to them
//! meanwhile (`Ring::spin`), and a machine's only one is never taken.

use std::time::Duration;

/// Looks for no longer than this.
const SPIN_MAX: Duration = Duration::from_micros(50);
/// With more answers than this in a turn the client has work to do, and the next turn more to take in.
const ANSWERS_MAX: u32 = 2;
/// Turns that are passed over after looking in vain: twice as many each time, up to two to this power.
const MISSES_MAX: u32 = 7;

/// How looking has gone so far.
pub(super) struct Spin {
    allowed: bool,
    misses: u32,
    pass_over: u32,
}

impl Spin {
    /// For this machine.
    pub(super) fn new() -> Self {
        Self::with_processors(std::thread::available_parallelism().map_or(1, usize::from))
    }

    fn with_processors(count: usize) -> Self {
        Self { allowed: count > 1, misses: 0, pass_over: 0 }
    }

    /// How long to look after a turn that sent `answers` and left so many requests `open`. `None`: not at all.
    pub(super) fn limit(&mut self, answers: u32, open: usize) -> Option<Duration> {
        if !self.allowed || open > 0 || !(1..=ANSWERS_MAX).contains(&answers) {
            return None;
        }
        if self.pass_over > 0 {
            self.pass_over -= 1;
            return None;
        }
        Some(SPIN_MAX)
    }

    /// It was looked, and something `found` or not.
    pub(super) fn looked(&mut self, found: bool) {
        self.misses = if found { 0 } else { (self.misses + 1).min(MISSES_MAX) };
        self.pass_over = (1 << self.misses) - 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_after_a_few_answers_and_with_nothing_open() {
        let mut spin = Spin::with_processors(2);
        assert_eq!(spin.limit(0, 0), None, "an idle engine sleeps");
        assert_eq!(spin.limit(1, 1), None);
        assert_eq!(spin.limit(3, 0), None);
        assert_eq!(spin.limit(2, 0), Some(SPIN_MAX));
        assert_eq!(Spin::with_processors(1).limit(1, 0), None);
    }

    #[test]
    fn looking_in_vain_becomes_rare_and_one_find_makes_up_for_it() {
        let mut spin = Spin::with_processors(2);
        let mut looked = 0;
        for _ in 0..10_000 {
            if spin.limit(1, 0).is_some() {
                looked += 1;
                spin.looked(false);
            }
        }
        assert!((50..100).contains(&looked), "{looked} of 10,000 turns");
        while spin.limit(1, 0).is_none() {}
        spin.looked(true);
        for _ in 0..100 {
            assert_eq!(spin.limit(1, 0), Some(SPIN_MAX));
            spin.looked(true);
        }
    }
}
