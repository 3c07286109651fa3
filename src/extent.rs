//! What BLOCK_STATUS speaks of: extents, the kinds of answer (metadata contexts), and sets of those.
//!
//! Vocabulary shared by the core, which knows the answers, and the NBD layer, which names them on the wire.
//!
//! What must hold: the extents of an answer follow each other from the request's first byte without a gap, none is
//! empty, and neighbours differ.

use crate::units::{REPLICAS_MAX, ReplicaSlot};

/// `base:allocation`: the range is not backed by storage.
pub const ALLOCATION_HOLE: u32 = 1 << 0;
/// `base:allocation`: the range reads as zero.
pub const ALLOCATION_ZERO: u32 = 1 << 1;

/// `nbdmirror:state`: the intent bit is set: a crash now would have the region synced again.
pub const STATE_DIRTY: u32 = 1 << 0;
/// `nbdmirror:state`: some member of the mirror misses writes here.
pub const STATE_OUT_OF_SYNC: u32 = 1 << 1;
/// `nbdmirror:state`: being copied at this moment.
pub const STATE_SYNCING: u32 = 1 << 2;
/// `nbdmirror:state`: left by an unclean stop: the copies on the replicas in sync may differ and are made equal
/// before anything here is read.
pub const STATE_UNSYNCED: u32 = 1 << 3;

/// `nbdmirror:stale/N`: replica N misses writes here.
pub const STALE_STALE: u32 = 1 << 0;

/// Most extents of an answer in one context (256 KiB of memory): a longer answer ends early.
pub const EXTENTS_MAX: usize = 16 << 10;

/// A stretch of the volume of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Its length, bytes; more than 0.
    pub len: u64,
    /// What it is: bits whose meaning the context says (`ALLOCATION_*`, `STATE_*`, `STALE_*`).
    pub flags: u32,
}

/// Appends to the last extent where the flags are the same, else adds one. An empty stretch adds nothing.
pub fn push_extent(extents: &mut Vec<Extent>, len: u64, flags: u32) {
    if len == 0 {
        return;
    }
    match extents.last_mut() {
        Some(last) if last.flags == flags => last.len += len,
        _ => extents.push(Extent { len, flags }),
    }
}

/// What BLOCK_STATUS can tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum StatusContext {
    /// `base:allocation`: holes and zeroes.
    Allocation,
    /// `nbdmirror:state`: the mirror's health.
    State,
    /// `nbdmirror:stale/N`: what this replica misses.
    Stale(ReplicaSlot),
}

/// Number of contexts.
pub const CONTEXTS: usize = 2 + REPLICAS_MAX;

impl StatusContext {
    /// Every context, in the order of their identifiers.
    pub fn all() -> impl Iterator<Item = Self> {
        [Self::Allocation, Self::State].into_iter().chain(ReplicaSlot::all().map(Self::Stale))
    }

    /// Its place among all: 0 to `CONTEXTS - 1`.
    #[must_use]
    pub fn index(self) -> usize {
        match self {
            Self::Allocation => 0,
            Self::State => 1,
            Self::Stale(slot) => 2 + slot.index(),
        }
    }

    /// The context at this place.
    #[must_use]
    pub fn from_index(index: usize) -> Option<Self> {
        Self::all().nth(index)
    }
}

/// A set of contexts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ContextSet(u16);

const _: () = assert!(CONTEXTS <= u16::BITS as usize);

impl ContextSet {
    /// None.
    pub const EMPTY: Self = Self(0);

    /// Adds one.
    pub fn insert(&mut self, context: StatusContext) {
        self.0 |= 1 << context.index();
    }

    /// Whether it is in.
    #[must_use]
    pub fn contains(self, context: StatusContext) -> bool {
        self.0 & (1 << context.index()) != 0
    }

    /// Whether none is in.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Those that are in, in the order of their identifiers.
    pub fn iter(self) -> impl Iterator<Item = StatusContext> {
        StatusContext::all().filter(move |context| self.contains(*context))
    }
}

impl FromIterator<StatusContext> for ContextSet {
    fn from_iter<T: IntoIterator<Item = StatusContext>>(contexts: T) -> Self {
        let mut set = Self::EMPTY;
        contexts.into_iter().for_each(|context| set.insert(context));
        set
    }
}

/// The answer to BLOCK_STATUS for one context.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContextExtents {
    /// Which.
    pub context: StatusContext,
    /// At least one, at most `EXTENTS_MAX`; together not longer than what was asked for (it may end earlier).
    pub extents: Vec<Extent>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contexts_have_places_and_sets_hold_them() {
        for (index, context) in StatusContext::all().enumerate() {
            assert_eq!((context.index(), StatusContext::from_index(index)), (index, Some(context)));
        }
        assert_eq!(StatusContext::all().count(), CONTEXTS);
        assert_eq!(StatusContext::from_index(CONTEXTS), None);
        let some = [StatusContext::Stale(ReplicaSlot::new(7)), StatusContext::Allocation];
        let set: ContextSet = some.into_iter().collect();
        assert_eq!(set.iter().collect::<Vec<_>>(), [some[1], some[0]]);
        assert!(!set.is_empty() && !set.contains(StatusContext::State) && ContextSet::EMPTY.is_empty());
    }

    #[test]
    fn neighbours_of_one_kind_are_one_extent() {
        let mut extents = Vec::new();
        for (len, flags) in [(0, 9), (5, 1), (0, 2), (6, 1), (7, 0)] {
            push_extent(&mut extents, len, flags);
        }
        assert_eq!(extents, [Extent { len: 11, flags: 1 }, Extent { len: 7, flags: 0 }]);
    }
}
