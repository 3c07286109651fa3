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
//! Each entry counts the earlier entries (granted or waiting) that it conflicts with; each of those lists it
//! as a follower. Small ranges are found through the 128 KiB chunks that they touch, large ones through a list
//! that everybody looks through.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use super::links::{Links, List};
use super::slab::{Key, Slab};
use crate::units::ByteRange;

const CHUNK_SHIFT: u32 = 17;
/// Ranges over more chunks than this are kept in the list of large ones.
const CHUNKS_SMALL_MAX: u64 = 16;

/// Names a held or wanted range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LockId(Key);

/// How a range is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// Together with other shared holders.
    Shared,
    /// Alone.
    Exclusive,
}

struct Entry {
    range: ByteRange,
    mode: Mode,
    /// Whom to tell when it is granted.
    owner: u64,
    /// Earlier entries that conflict and are still there.
    blockers: u32,
    /// Later entries that wait for this one.
    followers: List,
}

/// A hasher for chunk indexes: one multiplication. The table's order is never looked at.
#[derive(Default)]
struct ChunkHasher(u64);

impl Hasher for ChunkHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, _: &[u8]) {
        unreachable!("chunk indexes are hashed as u64");
    }
    fn write_u64(&mut self, value: u64) {
        let product = u128::from(value ^ 0x9e37_79b9_7f4a_7c15) * 0xd6e8_feb8_6659_fd93_u128;
        self.0 = (product >> 64) as u64 ^ product as u64;
    }
}

/// The table of held and wanted ranges.
pub(super) struct OverlapTable {
    entries: Slab<Entry>,
    /// The small ranges that touch each chunk.
    chunks: HashMap<u64, List, BuildHasherDefault<ChunkHasher>>,
    links: Links,
    large: Vec<Key>,
    /// What `find_conflicting` found last.
    found: Vec<Key>,
}

fn chunks_of(range: ByteRange) -> std::ops::RangeInclusive<u64> {
    range.offset >> CHUNK_SHIFT..=(range.end() - 1) >> CHUNK_SHIFT
}

fn is_large(range: ByteRange) -> bool {
    let chunks = chunks_of(range);
    chunks.end() - chunks.start() >= CHUNKS_SMALL_MAX
}

fn conflict(entry: &Entry, range: ByteRange, mode: Mode) -> bool {
    (entry.mode == Mode::Exclusive || mode == Mode::Exclusive) && entry.range.overlaps(range)
}

impl OverlapTable {
    pub(super) fn new() -> Self {
        Self {
            entries: Slab::new(),
            chunks: HashMap::default(),
            links: Links::new(),
            large: Vec::new(),
            found: Vec::new(),
        }
    }

    /// Wants `range` (not empty) for `owner`. The flag says whether it is granted at once; otherwise `release`
    /// will name the owner when it is.
    pub(super) fn acquire(&mut self, range: ByteRange, mode: Mode, owner: u64) -> (LockId, bool) {
        assert!(!range.is_empty());
        self.find_conflicting(range, mode);
        let blockers = self.found.len() as u32;
        let key = self.entries.insert(Entry { range, mode, owner, blockers, followers: List::EMPTY });
        for blocker in &self.found {
            if let Some(entry) = self.entries.get_mut(*blocker) {
                self.links.push(&mut entry.followers, key);
            }
        }
        if is_large(range) {
            self.large.push(key);
        } else {
            for chunk in chunks_of(range) {
                self.links.push(self.chunks.entry(chunk).or_insert(List::EMPTY), key);
            }
        }
        (LockId(key), blockers == 0)
    }

    /// Puts into `found` every entry, held or waiting, that a newcomer has to wait for; each once.
    fn find_conflicting(&mut self, range: ByteRange, mode: Mode) {
        let Self { entries, chunks, links, large, found } = self;
        found.clear();
        if is_large(range) {
            found
                .extend(entries.iter().filter(|(_, entry)| conflict(entry, range, mode)).map(|(key, _)| key));
            return;
        }
        let first = *chunks_of(range).start();
        for chunk in chunks_of(range) {
            let Some(list) = chunks.get(&chunk) else { continue };
            found.extend(links.iter(*list).filter(|key| {
                entries.get(*key).is_some_and(|entry| {
                    // One that is listed in several chunks counts in the first that both touch.
                    chunk == first.max(*chunks_of(entry.range).start()) && conflict(entry, range, mode)
                })
            }));
        }
        let in_the_way = |key: &Key| entries.get(*key).is_some_and(|entry| conflict(entry, range, mode));
        found.extend(large.iter().copied().filter(in_the_way));
    }

    /// Gives a range back (held or still waiting) and appends the owners that are granted by that.
    pub(super) fn release(&mut self, id: LockId, granted: &mut impl Extend<u64>) {
        let Some(mut entry) = self.entries.remove(id.0) else { unreachable!("a lock is released once") };
        if is_large(entry.range) {
            self.large.retain(|key| *key != id.0);
        } else {
            for chunk in chunks_of(entry.range) {
                let Some(list) = self.chunks.get_mut(&chunk) else { unreachable!("listed at acquire") };
                self.links.remove(list, id.0);
                if list.is_empty() {
                    self.chunks.remove(&chunk);
                }
            }
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

    proptest! {
        /// Against the plain rule: granted exactly when no earlier entry that is still there conflicts.
        #[test]
        fn grants_agree_with_the_plain_rule(
            steps in prop::collection::vec((0u64..1 << 24, 1u64..1 << 22, any::<bool>(), any::<u8>()), 1..80)
        ) {
            let mut table = OverlapTable::new();
            let mut model: Vec<(LockId, ByteRange, Mode)> = Vec::new();
            for (owner, (offset, len, exclusive, act)) in steps.into_iter().enumerate() {
                if act % 3 == 0 && !model.is_empty() {
                    let at = usize::from(act) % model.len();
                    let (id, ..) = model.remove(at);
                    table.release(id, &mut Vec::new());
                } else {
                    let mode = if exclusive { Mode::Exclusive } else { Mode::Shared };
                    let (id, _) = table.acquire(range(offset, len), mode, owner as u64);
                    model.push((id, range(offset, len), mode));
                }
                table.check();
                for (index, (id, range, mode)) in model.iter().enumerate() {
                    let blocked = model[..index].iter().any(|(_, other, other_mode)| {
                        (*mode == Mode::Exclusive || *other_mode == Mode::Exclusive) && other.overlaps(*range)
                    });
                    prop_assert_eq!(table.is_granted(*id), !blocked);
                }
            }
        }
    }
}
