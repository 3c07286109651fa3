//! The index of the overlap lock: which small ranges touch each chunk of the volume, newest first.
//!
//! ```text
//!  chunk ─► exclusive: node ⇄ node ⇄ node        one node for each chunk that a range touches;
//!        └► shared:    node ⇄ node               `sibling` leads to its node of the next chunk
//!              newest ──────────► oldest
//! ```
//!
//! What must hold: a range that was put in is on one list of each chunk that it touches until it is taken out; nodes
//! on a list are in order of their numbers; a chunk without nodes has no heads. All nodes stand in one arena, which
//! grows to what is needed at the same time. Nothing here takes time in proportion to what does not have to be waited
//! for, but for the exclusive ranges in the same chunks that are newer than the newest one that covers all of the range.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::{BuildHasherDefault, Hasher};

use super::slab::Key;
use crate::units::ByteRange;

const CHUNK_SHIFT: u32 = 16;
/// Ranges over more chunks than this are large: not for this index. 1 MiB fits wherever it begins.
const CHUNKS_SMALL_MAX: u64 = 17;
/// No node.
const NONE: u32 = u32::MAX;

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

/// How a range is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// Together with other shared holders.
    Shared,
    /// Alone.
    Exclusive,
}

/// The newest node of each list of a chunk.
#[derive(Clone, Copy)]
struct Heads {
    exclusive: u32,
    shared: u32,
}

impl Heads {
    fn of(&mut self, mode: Mode) -> &mut u32 {
        match mode {
            Mode::Exclusive => &mut self.exclusive,
            Mode::Shared => &mut self.shared,
        }
    }
}

/// What a lookup needs to know stands in the node, so that it touches nothing else.
#[derive(Clone, Copy)]
struct Node {
    range: ByteRange,
    key: Key,
    number: u64,
    older: u32,
    /// On the free list: the next free one.
    newer: u32,
    sibling: u32,
}

/// Names the nodes of a range.
#[derive(Clone, Copy)]
pub(super) struct Place(u32);

/// A range to be put in.
#[derive(Clone, Copy)]
pub(super) struct Newcomer {
    pub(super) range: ByteRange,
    pub(super) mode: Mode,
    pub(super) key: Key,
    /// Greater than that of every range before.
    pub(super) number: u64,
}

/// All nodes.
struct Arena {
    nodes: Vec<Node>,
    /// The first free one.
    free: u32,
}

/// The index.
pub(super) struct Chunks {
    heads: HashMap<u64, Heads, BuildHasherDefault<ChunkHasher>>,
    arena: Arena,
}

fn chunks_of(range: ByteRange) -> std::ops::RangeInclusive<u64> {
    range.offset >> CHUNK_SHIFT..=(range.end() - 1) >> CHUNK_SHIFT
}

/// Whether `range` (not empty) touches too many chunks for the index.
pub(super) fn is_large(range: ByteRange) -> bool {
    let chunks = chunks_of(range);
    chunks.end() - chunks.start() >= CHUNKS_SMALL_MAX
}

impl Arena {
    fn take(&mut self, node: Node) -> u32 {
        if self.free == NONE {
            self.nodes.push(node);
            return (self.nodes.len() - 1) as u32;
        }
        let at = self.free;
        self.free = std::mem::replace(&mut self.nodes[at as usize], node).newer;
        at
    }

    fn give_back(&mut self, at: u32) {
        self.nodes[at as usize].newer = std::mem::replace(&mut self.free, at);
    }

    /// Goes through a chunk's list from the newest node `at` on. Returns the floor: the number of an exclusive range that
    /// covers all of `range`, if it meets one.
    fn walk(
        &self,
        (mut at, mode): (u32, Mode),
        (chunk, range): (u64, ByteRange),
        floor: u64,
        found: &mut Vec<Key>,
    ) -> u64 {
        while let Some(node) = self.nodes.get(at as usize).filter(|node| node.number >= floor) {
            // One that is listed in several chunks counts in the first that both touch.
            let first = node.range.offset.max(range.offset) >> CHUNK_SHIFT;
            if first == chunk && node.range.overlaps(range) {
                found.push(node.key);
            }
            if mode == Mode::Exclusive && node.range.contains(range) {
                return node.number;
            }
            at = node.older;
        }
        floor
    }
}

impl Chunks {
    pub(super) fn new() -> Self {
        Self { heads: HashMap::default(), arena: Arena { nodes: Vec::new(), free: NONE } }
    }

    /// Puts a small range in, and appends to `found` the ranges that conflict with it, each once. Left out are those with
    /// a number below `floor`, and those older than the newest exclusive one that covers all of it: that one, which
    /// is found, conflicts with them.
    pub(super) fn insert(&mut self, newcomer: Newcomer, mut floor: u64, found: &mut Vec<Key>) -> Place {
        let Newcomer { range, mode, key, number } = newcomer;
        let (mut place, mut last) = (NONE, NONE);
        for chunk in chunks_of(range) {
            let heads = self.heads.entry(chunk).or_insert(Heads { exclusive: NONE, shared: NONE });
            floor = self.arena.walk((heads.exclusive, Mode::Exclusive), (chunk, range), floor, found);
            if mode == Mode::Exclusive {
                self.arena.walk((heads.shared, Mode::Shared), (chunk, range), floor, found);
            }
            let head = heads.of(mode);
            let older = *head;
            let at = self.arena.take(Node { range, key, number, older, newer: NONE, sibling: NONE });
            *head = at;
            if older != NONE {
                self.arena.nodes[older as usize].newer = at;
            }
            if last == NONE {
                place = at;
            } else {
                self.arena.nodes[last as usize].sibling = at;
            }
            last = at;
        }
        Place(place)
    }

    /// Takes a range out.
    pub(super) fn remove(&mut self, range: ByteRange, mode: Mode, place: Place) {
        let mut at = place.0;
        for chunk in chunks_of(range) {
            let Node { older, newer, sibling, .. } = self.arena.nodes[at as usize];
            if older != NONE {
                self.arena.nodes[older as usize].newer = newer;
            }
            if newer != NONE {
                self.arena.nodes[newer as usize].older = older;
            } else {
                let Entry::Occupied(mut heads) = self.heads.entry(chunk) else {
                    unreachable!("it is listed there")
                };
                *heads.get_mut().of(mode) = older;
                if heads.get().exclusive == NONE && heads.get().shared == NONE {
                    heads.remove();
                }
            }
            self.arena.give_back(at);
            at = sibling;
        }
        assert!(at == NONE, "one node for each chunk");
    }

    /// Nodes that were ever needed at the same time.
    #[cfg(test)]
    pub(super) fn nodes(&self) -> usize {
        self.arena.nodes.len()
    }

    /// Whether nothing is listed.
    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.heads.is_empty()
    }
}
