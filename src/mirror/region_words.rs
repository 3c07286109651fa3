//! One byte for each region: all that a write to a region whose bit is durable looks at.
//!
//! ```text
//!    7       6       5 … 0
//!  ready │ recent │ writes in flight; all ones: as many and more, the rest is counted in `more`
//! ```
//!
//! What must hold:
//! - *ready* is the region's intent bit AND its durable bit, which stand in maps of their own: a write may go on
//!   (promise 1). Whoever changes one of these brings it up to date;
//! - *recent*: written since the last sweep (promise 4). Looked at for dirty regions only, so a sweep forgets those only;
//! - every write in flight is counted in each region that it touches.
//!
//! In a volume of millions of regions whose writes are scattered each array that is looked at is a cache miss, the
//! more so the larger it is.

use std::collections::HashMap;

use crate::units::RegionIndex;

const READY: u8 = 1 << 7;
const RECENT: u8 = 1 << 6;
const WRITES: u8 = RECENT - 1;

/// The bytes of all regions of a volume.
pub(super) struct RegionWords {
    words: Vec<u8>,
    /// Writes in flight above `WRITES`, where there are any.
    more: HashMap<RegionIndex, u64>,
}

impl RegionWords {
    /// No region is ready, nor recent, nor written. Memory is touched where regions are written.
    pub(super) fn new(regions: usize) -> Self {
        Self { words: vec![0; regions], more: HashMap::new() }
    }

    /// Counts a write.
    pub(super) fn begin_write(&mut self, region: RegionIndex) {
        let word = &mut self.words[region.index()];
        if *word & WRITES < WRITES {
            *word += 1;
        } else {
            *self.more.entry(region).or_insert(0) += 1;
        }
    }

    /// A write that was counted is over: just now.
    pub(super) fn end_write(&mut self, region: RegionIndex) {
        let word = &mut self.words[region.index()];
        assert!(*word & WRITES > 0, "a write is counted before it ends");
        *word |= RECENT;
        if *word & WRITES < WRITES {
            *word -= 1;
        } else if let Some(more) = self.more.get_mut(&region) {
            *more -= 1;
            if *more == 0 {
                self.more.remove(&region);
            }
        } else {
            *word -= 1;
        }
    }

    /// Whether a write is in flight.
    pub(super) fn is_written(&self, region: RegionIndex) -> bool {
        self.words[region.index()] & WRITES != 0
    }

    /// Notes that the region is about to be written; whether it is ready.
    pub(super) fn touch(&mut self, region: RegionIndex) -> bool {
        let word = &mut self.words[region.index()];
        *word |= RECENT;
        *word & READY != 0
    }

    /// Whether it was written since `forget_recent`.
    pub(super) fn is_recent(&self, region: RegionIndex) -> bool {
        self.words[region.index()] & RECENT != 0
    }

    /// A sweep has looked at the region.
    pub(super) fn forget_recent(&mut self, region: RegionIndex) {
        let word = &mut self.words[region.index()];
        if *word & RECENT != 0 {
            *word &= !RECENT;
        }
    }

    /// Whether its intent bit is set and durable.
    pub(super) fn is_ready(&self, region: RegionIndex) -> bool {
        self.words[region.index()] & READY != 0
    }

    /// Says whether the region's intent bit is set and durable now.
    pub(super) fn set_ready(&mut self, region: RegionIndex, ready: bool) {
        let word = &mut self.words[region.index()];
        *word = (*word & !READY) | if ready { READY } else { 0 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const REGIONS: usize = 4;

    proptest! {
        /// Against one plain array for each of the three; bursts of writes, so that there are more than a byte counts.
        #[test]
        fn words_agree_with_plain_arrays(
            steps in prop::collection::vec((0usize..REGIONS, 0u8..6, 1u64..90), 1..200)
        ) {
            let mut words = RegionWords::new(REGIONS);
            let (mut ready, mut recent, mut writes) = ([false; REGIONS], [false; REGIONS], [0u64; REGIONS]);
            for (at, act, burst) in steps {
                let region = RegionIndex(at as u64);
                match act {
                    0 => {
                        (0..burst).for_each(|_| words.begin_write(region));
                        writes[at] += burst;
                    }
                    1 if writes[at] > 0 => {
                        let burst = burst.min(writes[at]);
                        (0..burst).for_each(|_| words.end_write(region));
                        (writes[at], recent[at]) = (writes[at] - burst, true);
                    }
                    2 => {
                        prop_assert_eq!(words.touch(region), ready[at]);
                        recent[at] = true;
                    }
                    3 => {
                        words.forget_recent(region);
                        recent[at] = false;
                    }
                    _ => {
                        words.set_ready(region, act == 4);
                        ready[at] = act == 4;
                    }
                }
                for at in 0..REGIONS {
                    let region = RegionIndex(at as u64);
                    let got = (words.is_ready(region), words.is_recent(region), words.is_written(region));
                    prop_assert_eq!(got, (ready[at], recent[at], writes[at] > 0));
                    let more = words.more.get(&region).copied();
                    let over = writes[at].checked_sub(u64::from(WRITES)).filter(|over| *over > 0);
                    prop_assert_eq!(more, over);
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "a write is counted before it ends")]
    fn a_write_that_was_not_counted_panics() {
        let mut words = RegionWords::new(1);
        words.set_ready(RegionIndex(0), true);
        words.touch(RegionIndex(0));
        words.end_write(RegionIndex(0));
    }
}
