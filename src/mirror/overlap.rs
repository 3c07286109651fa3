//! The overlap lock: byte ranges held shared (reads, region copies) or exclusive (writes).
//!
//! What must hold (promise 3): two ranges that share a byte are never held together unless both are shared.
//! Grants keep the order of arrival among those that conflict, so nobody starves and every replica sees
//! overlapping writes in one order.
//!
//! ```text
//!  acquire ──conflicts with nothing earlier──► granted ──release──► gone
//!     └─────conflicts──► waiting ──last earlier one released──► granted
//! ```
//!
//! Each entry counts the earlier entries (granted or waiting) that it was told to wait for; each of those lists it
//! as a follower. It need not be told of those that an earlier exclusive one, which covers all of it, waits for itself:
//! so where many want the same bytes, each waits for the one before it. Small ranges are found through the chunks that
//! they touch (`chunks`), large ones through a list that everybody looks through.

pub(super) use super::chunks::Mode;
use super::chunks::{Chunks, Newcomer, Place, is_large};
use super::links::{Links, List};
use super::slab::{Key, Slab};
use crate::units::ByteRange;

/// Names a held or wanted range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LockId(Key);

struct Entry {
    range: ByteRange,
    mode: Mode,
    /// Whom to tell when it is granted.
    owner: u64,
    /// Counts entries in order of arrival.
    number: u64,
    /// Where it stands in the index; `None`: in the list of large ones.
    place: Option<Place>,
    /// How often earlier entries that are still there list it as a follower.
    blockers: u32,
    /// Later entries that wait for this one.
    followers: List,
}

/// The table of held and wanted ranges.
pub(super) struct OverlapTable {
    entries: Slab<Entry>,
    /// The small ones.
    chunks: Chunks,
    /// The large ones, oldest first.
    large: Vec<Key>,
    /// The followers of all.
    links: Links,
    /// Entries that ever were.
    arrived: u64,
    /// What the newcomer has to wait for.
    found: Vec<Key>,
}

fn conflict(entry: &Entry, range: ByteRange, mode: Mode) -> bool {
    (entry.mode == Mode::Exclusive || mode == Mode::Exclusive) && entry.range.overlaps(range)
}

impl OverlapTable {
    pub(super) fn new() -> Self {
        Self {
            entries: Slab::new(),
            chunks: Chunks::new(),
            large: Vec::new(),
            links: Links::new(),
            arrived: 0,
            found: Vec::new(),
        }
    }

    /// Wants `range` (not empty) for `owner`. The flag says whether it is granted at once; otherwise `release`
    /// will name the owner when it is.
    pub(super) fn acquire(&mut self, range: ByteRange, mode: Mode, owner: u64) -> (LockId, bool) {
        assert!(!range.is_empty());
        self.found.clear();
        self.arrived += 1;
        let number = self.arrived;
        let large = is_large(range);
        let floor = if large { self.find_for_large(range, mode) } else { self.find_large(range, mode) };
        let entry = Entry { range, mode, owner, number, place: None, blockers: 0, followers: List::EMPTY };
        let key = self.entries.insert(entry);
        let place = if large {
            self.large.push(key);
            None
        } else {
            Some(self.chunks.insert(Newcomer { range, mode, key, number }, floor, &mut self.found))
        };
        for blocker in &self.found {
            let Some(entry) = self.entries.get_mut(*blocker) else { unreachable!("it was found") };
            self.links.push(&mut entry.followers, key);
        }
        let blockers = self.found.len() as u32;
        let Some(entry) = self.entries.get_mut(key) else { unreachable!("it has just come") };
        (entry.place, entry.blockers) = (place, blockers);
        (LockId(key), blockers == 0)
    }

    /// Puts into `found` the large entries that a small newcomer has to wait for. Those with a number below the one
    /// returned it need not wait for.
    fn find_large(&mut self, range: ByteRange, mode: Mode) -> u64 {
        for key in self.large.iter().rev() {
            let Some(entry) = self.entries.get(*key) else { unreachable!("listed while it is there") };
            if conflict(entry, range, mode) {
                self.found.push(*key);
                if entry.mode == Mode::Exclusive && entry.range.contains(range) {
                    return entry.number;
                }
            }
        }
        0
    }

    /// Puts into `found` every entry that a large newcomer has to wait for.
    fn find_for_large(&mut self, range: ByteRange, mode: Mode) -> u64 {
        let in_the_way = self.entries.iter().filter(|(_, entry)| conflict(entry, range, mode));
        self.found.extend(in_the_way.map(|(key, _)| key));
        0
    }

    /// Gives a range back (held or still waiting) and appends the owners that are granted by that.
    pub(super) fn release(&mut self, id: LockId, granted: &mut impl Extend<u64>) {
        let Some(mut entry) = self.entries.remove(id.0) else { unreachable!("a lock is released once") };
        match entry.place {
            Some(place) => self.chunks.remove(entry.range, entry.mode, place),
            None => self.large.retain(|key| *key != id.0),
        }
        if entry.blockers > 0 {
            self.hand_over(&entry);
        }
        while let Some(follower) = self.links.pop(&mut entry.followers) {
            if let Some(next) = self.entries.get_mut(follower) {
                assert!(next.blockers > 0);
                next.blockers -= 1;
                if next.blockers == 0 {
                    granted.extend(std::iter::once(next.owner));
                }
            }
        }
    }

    /// An entry that was still waiting is given up: its followers were not told of what it waited for, and are now. Some
    /// are told twice, which does no harm. Takes its time: nobody but tests and planted bugs gives up waiting.
    fn hand_over(&mut self, gone: &Entry) {
        let followers: Vec<Key> = self.links.iter(gone.followers).collect();
        for follower in followers {
            let Some(next) = self.entries.get(follower) else { continue };
            let (range, mode) = (next.range, next.mode);
            let earlier = |entry: &Entry| entry.number < gone.number && conflict(entry, range, mode);
            let keys: Vec<Key> =
                self.entries.iter().filter(|(_, entry)| earlier(entry)).map(|(key, _)| key).collect();
            for key in &keys {
                if let Some(entry) = self.entries.get_mut(*key) {
                    self.links.push(&mut entry.followers, follower);
                }
            }
            if let Some(next) = self.entries.get_mut(follower) {
                next.blockers += keys.len() as u32;
            }
        }
    }

    /// Whether the range is held now (not waiting).
    #[cfg(test)]
    fn is_granted(&self, id: LockId) -> bool {
        self.entries.get(id.0).is_some_and(|entry| entry.blockers == 0)
    }

    /// Number of held and wanted ranges.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Checks promise 3 over all held ranges: quadratic, for the simulator.
    pub(super) fn check(&self) {
        let held: Vec<&Entry> =
            self.entries.iter().map(|(_, entry)| entry).filter(|entry| entry.blockers == 0).collect();
        for (index, one) in held.iter().enumerate() {
            for other in &held[index + 1..] {
                assert!(!conflict(one, other.range, other.mode), "two conflicting ranges are held");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn range(offset: u64, len: u64) -> ByteRange {
        ByteRange::new(offset, len)
    }

    #[test]
    fn conflicting_ranges_are_granted_in_order_of_arrival() {
        let mut table = OverlapTable::new();
        let (read, granted) = table.acquire(range(0, 4096), Mode::Shared, 1);
        assert!(granted);
        assert!(table.acquire(range(4096, 4096), Mode::Exclusive, 9).1);
        let (write, granted) = table.acquire(range(0, 512), Mode::Exclusive, 2);
        assert!(!granted);
        let (late_read, granted) = table.acquire(range(0, 1), Mode::Shared, 3);
        assert!(!granted, "a read does not pass a waiting write");
        let mut told = Vec::new();
        table.release(read, &mut told);
        assert_eq!(told, vec![2]);
        assert!(table.is_granted(write) && !table.is_granted(late_read));
        table.release(write, &mut told);
        assert_eq!(told, vec![2, 3]);
    }

    /// Ranges that meet within a few chunks, also over the edges of chunks and blocks, some the same, some large.
    fn any_range() -> impl Strategy<Value = ByteRange> {
        let spread = (0u64..1 << 24, 1u64..1 << 22);
        let blocks = (0u64..48, 1u64..40).prop_map(|(block, count)| (block << 12, count << 12));
        let one_block = (0u64..6).prop_map(|block| (block << 12, 4096));
        let bytes = (0u64..1 << 18, 1u64..1 << 17);
        prop_oneof![1 => spread, 3 => blocks, 3 => one_block, 2 => bytes]
            .prop_map(|(offset, len)| range(offset, len))
    }

    proptest! {
        /// Against the plain rule: granted exactly when no earlier entry that is still there conflicts; those that a
        /// release grants are told in order of arrival. Where `even_waiting`, some are given up that are not granted.
        #[test]
        fn grants_agree_with_the_plain_rule(
            even_waiting in any::<bool>(),
            steps in prop::collection::vec((any_range(), any::<bool>(), any::<u8>()), 1..120)
        ) {
            let mut table = OverlapTable::new();
            let mut model: Vec<(LockId, ByteRange, Mode, u64)> = Vec::new();
            let blocked = |model: &[(LockId, ByteRange, Mode, u64)], index: usize| {
                let (_, range, mode, _) = model[index];
                model[..index].iter().any(|(_, other, other_mode, _)| {
                    (mode == Mode::Exclusive || *other_mode == Mode::Exclusive) && other.overlaps(range)
                })
            };
            for (owner, (range, exclusive, act)) in (0u64..).zip(steps) {
                let mut at = usize::from(act) % model.len().max(1);
                while !even_waiting && at > 0 && blocked(&model, at) {
                    at -= 1;
                }
                if act % 3 == 0 && !model.is_empty() {
                    let waiting = |model: &[_]| {
                        let waiting = (0..model.len()).filter(|index| blocked(model, *index));
                        waiting.map(|index| model[index].3).collect::<Vec<u64>>()
                    };
                    let mut newly = waiting(&model);
                    let (id, _, _, gone) = model.remove(at);
                    let still = waiting(&model);
                    newly.retain(|owner| *owner != gone && !still.contains(owner));
                    let mut told = Vec::new();
                    table.release(id, &mut told);
                    if even_waiting {
                        told.sort_unstable();
                    }
                    prop_assert_eq!(told, newly);
                } else {
                    let mode = if exclusive { Mode::Exclusive } else { Mode::Shared };
                    let (id, granted) = table.acquire(range, mode, owner);
                    model.push((id, range, mode, owner));
                    prop_assert_eq!(granted, !blocked(&model, model.len() - 1));
                }
                table.check();
                for (index, (id, ..)) in model.iter().enumerate() {
                    prop_assert_eq!(table.is_granted(*id), !blocked(&model, index));
                }
            }
            for (id, ..) in model {
                table.release(id, &mut Vec::new());
            }
            prop_assert!(table.chunks.is_empty() && table.large.is_empty() && table.len() == 0);
        }
    }

    /// The cost of a request does not grow with how many want the same: each is told of by one, the one before it.
    #[test]
    fn who_wants_the_same_waits_for_the_one_before() {
        let mut table = OverlapTable::new();
        let ids: Vec<LockId> =
            (0..1000).map(|owner| table.acquire(range(8192, 4096), Mode::Exclusive, owner).0).collect();
        for id in &ids[1..] {
            assert_eq!(table.entries.get(id.0).map(|entry| entry.blockers), Some(1));
        }
        for (id, next) in ids.into_iter().zip(1..) {
            let mut told = Vec::new();
            table.release(id, &mut told);
            assert_eq!(told, if next < 1000 { vec![next] } else { vec![] });
        }
        assert_eq!(table.chunks.nodes(), 1000);
    }
}
