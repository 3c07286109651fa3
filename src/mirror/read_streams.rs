//! The sequential streams that the read policy remembers: where each goes on, and on which replica.
//!
//! What must hold: a stream is found by where it goes on, the one in the first place where there are several; a new one
//! takes the place of the one not used for longest. Each kind of value stands in an array of its own, so that a look
//! at all of them is a plain loop over numbers.

use crate::units::ReplicaSlot;

const STREAMS: usize = 16;
/// No request begins here.
const NOWHERE: u64 = u64::MAX;

/// Up to sixteen streams.
#[derive(Debug)]
pub(super) struct Streams {
    next_offsets: [u64; STREAMS],
    /// The clock's value at the last use, 0 where there is no stream yet.
    used_at: [u64; STREAMS],
    slots: [ReplicaSlot; STREAMS],
}

impl Streams {
    pub(super) fn new() -> Self {
        let slots = [ReplicaSlot::new(0); STREAMS];
        Self { next_offsets: [NOWHERE; STREAMS], used_at: [0; STREAMS], slots }
    }

    /// The place of the stream that goes on at `offset`.
    pub(super) fn find(&self, offset: u64) -> Option<usize> {
        self.next_offsets.iter().position(|next| *next == offset)
    }

    /// The replica that the stream in `place` is read from.
    pub(super) fn slot(&self, place: usize) -> ReplicaSlot {
        self.slots[place]
    }

    /// The stream found in `place`, or else a new one, goes on at `next_offset` on the replica in `slot`. `clock` is over 0
    /// and never goes back.
    pub(super) fn remember(&mut self, place: Option<usize>, next_offset: u64, slot: ReplicaSlot, clock: u64) {
        assert!(next_offset != NOWHERE && clock > 0);
        let place = place.unwrap_or_else(|| self.oldest());
        self.next_offsets[place] = next_offset;
        self.used_at[place] = clock;
        self.slots[place] = slot;
    }

    fn oldest(&self) -> usize {
        let (mut oldest, mut oldest_at) = (0, self.used_at[0]);
        for (place, used_at) in self.used_at.into_iter().enumerate() {
            if used_at < oldest_at {
                (oldest, oldest_at) = (place, used_at);
            }
        }
        oldest
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Against a list of (next offset, slot, used at) that is searched in the simplest way.
        #[test]
        fn streams_agree_with_a_plain_list(steps in prop::collection::vec((0u64..40, 0u64..4, 0usize..8), 1..200)) {
            let mut streams = Streams::new();
            let mut plain: [Option<(u64, ReplicaSlot, u64)>; STREAMS] = [None; STREAMS];
            for (clock, (offset, len, slot)) in (1u64..).zip(steps) {
                let slot = ReplicaSlot::new(slot);
                let known = plain.iter().position(|stream| stream.is_some_and(|(next, ..)| next == offset));
                let found = streams.find(offset);
                prop_assert_eq!(found, known);
                if let Some(place) = found {
                    prop_assert_eq!(Some(streams.slot(place)), plain[place].map(|(_, slot, _)| slot));
                }
                let ages = plain.iter().map(|stream| stream.map_or(0, |(.., used_at)| used_at));
                let oldest = ages.enumerate().min_by_key(|(_, used_at)| *used_at).map_or(0, |(place, _)| place);
                plain[known.unwrap_or(oldest)] = Some((offset + len, slot, clock));
                streams.remember(found, offset + len, slot, clock);
            }
        }
    }
}
