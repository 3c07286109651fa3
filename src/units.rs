//! Units: byte offsets, ranges, region indexes, replica slots and time, each a type of its own.
//!
//! What must hold: a byte offset in the volume, a byte offset in a replica and a region index never mix
//! without a named conversion. Lengths are plain `u64` bytes.

use std::fmt;

/// Smallest unit that a replica is assumed to write atomically, in bytes (see `docs/on-disk-format.md`).
pub const SECTOR_BYTES: u64 = 512;
/// Unit of on-disk structures, of volume sizes and of buffer alignment, in bytes.
pub const BLOCK_BYTES: u64 = 4096;
/// Most replicas that one volume has.
pub const REPLICAS_MAX: usize = 8;
/// Largest payload of one client request, in bytes.
pub const REQUEST_BYTES_MAX: u64 = 32 << 20;
/// Smallest region, in bytes.
pub const REGION_BYTES_MIN: u64 = 64 << 10;
/// Largest region, in bytes.
pub const REGION_BYTES_MAX: u64 = 64 << 20;
/// Largest volume, in bytes (64 TiB).
pub const VOLUME_BYTES_MAX: u64 = 64 << 40;

const _: () = assert!(SECTOR_BYTES < BLOCK_BYTES && BLOCK_BYTES.is_multiple_of(SECTOR_BYTES));
const _: () = assert!(
    REGION_BYTES_MIN.is_multiple_of(BLOCK_BYTES) && REGION_BYTES_MAX.is_multiple_of(REGION_BYTES_MIN)
);
const _: () = assert!(VOLUME_BYTES_MAX.is_multiple_of(REGION_BYTES_MAX));

/// A byte offset in the volume, as clients see it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VolumeOffset(pub u64);

/// A byte offset in one replica's file or device. The volume's bytes stand at offset 0 of each replica.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReplicaOffset(pub u64);

impl VolumeOffset {
    /// Where this byte of the volume stands in every replica: at the same offset (promise 10).
    #[must_use]
    pub fn in_replica(self) -> ReplicaOffset {
        ReplicaOffset(self.0)
    }
}

/// Index of a region, the unit of dirty tracking and resync.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RegionIndex(pub u64);

impl RegionIndex {
    /// As an index into an in-memory map; regions number at most 2^30, so this cannot truncate.
    #[must_use]
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// A range of bytes in the volume: `offset..offset + len`. Construction checks that the end fits in 64 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ByteRange {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
}

impl ByteRange {
    /// The range of `len` bytes from `offset`.
    ///
    /// # Panics
    /// Where the end overflows 64 bits: callers validate client input first.
    #[must_use]
    pub fn new(offset: u64, len: u64) -> Self {
        assert!(offset.checked_add(len).is_some());
        Self { offset, len }
    }

    /// One past the last byte.
    #[must_use]
    pub fn end(self) -> u64 {
        self.offset + self.len
    }

    /// Whether there is no byte in it.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// Whether the two share a byte.
    #[must_use]
    pub fn overlaps(self, other: Self) -> bool {
        self.offset < other.end() && other.offset < self.end()
    }

    /// Whether `other` lies wholly within.
    #[must_use]
    pub fn contains(self, other: Self) -> bool {
        self.offset <= other.offset && other.end() <= self.end()
    }

    /// The smallest range aligned to `align` (a power of two) that holds this one.
    #[must_use]
    pub fn expanded_to(self, align: u64) -> Self {
        assert!(align.is_power_of_two());
        let start = self.offset & !(align - 1);
        let end = (self.end() + align - 1) & !(align - 1);
        Self { offset: start, len: end - start }
    }

    /// The largest range aligned to `align` (a power of two) within this one; empty where none fits.
    #[must_use]
    pub fn shrunk_to(self, align: u64) -> Self {
        assert!(align.is_power_of_two());
        let start = self.offset.next_multiple_of(align);
        let end = self.end() & !(align - 1);
        Self { offset: start, len: end.saturating_sub(start) }
    }

    /// Whether both ends are multiples of `align` (a power of two).
    #[must_use]
    pub fn is_aligned(self, align: u64) -> bool {
        assert!(align.is_power_of_two());
        (self.offset | self.len) & (align - 1) == 0
    }
}

/// The geometry of regions in a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Regions {
    /// Size of the volume, bytes.
    pub volume_bytes: u64,
    /// Size of a region, bytes; a power of two within `REGION_BYTES_MIN..=REGION_BYTES_MAX`.
    pub region_bytes: u64,
}

impl Regions {
    /// Number of regions; the last one may be shorter than the rest.
    #[must_use]
    pub fn count(self) -> u64 {
        self.volume_bytes.div_ceil(self.region_bytes)
    }

    /// The region that holds the byte at `offset`.
    #[must_use]
    pub fn of(self, offset: u64) -> RegionIndex {
        RegionIndex(offset >> self.region_bytes.trailing_zeros())
    }

    /// The bytes of region `index`, cut at the end of the volume.
    #[must_use]
    pub fn range(self, index: RegionIndex) -> ByteRange {
        let start = index.0 * self.region_bytes;
        assert!(start < self.volume_bytes);
        ByteRange::new(start, self.region_bytes.min(self.volume_bytes - start))
    }

    /// The regions that `range` touches; none where it is empty.
    pub fn touched(self, range: ByteRange) -> impl Iterator<Item = RegionIndex> + Clone + use<> {
        let (first, last) =
            if range.is_empty() { (1, 0) } else { (self.of(range.offset).0, self.of(range.end() - 1).0) };
        (first..=last).map(RegionIndex)
    }
}

/// Index of a replica in its volume's member table, `0..REPLICAS_MAX`; stays the replica's for its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReplicaSlot(u8);

impl ReplicaSlot {
    /// Slot number `index`.
    ///
    /// # Panics
    /// Where `index` is `REPLICAS_MAX` or more.
    #[must_use]
    pub fn new(index: usize) -> Self {
        assert!(index < REPLICAS_MAX);
        Self(index as u8)
    }

    /// As an index.
    #[must_use]
    pub fn index(self) -> usize {
        usize::from(self.0)
    }

    /// Every slot there can be, in order.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..REPLICAS_MAX).map(Self::new)
    }
}

impl fmt::Display for ReplicaSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A set of replica slots.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct ReplicaSet(u8);

impl ReplicaSet {
    /// The set without members.
    pub const EMPTY: Self = Self(0);

    /// The set of just `slot`.
    #[must_use]
    pub fn only(slot: ReplicaSlot) -> Self {
        Self(1 << slot.0)
    }

    /// Whether `slot` is in it.
    #[must_use]
    pub fn contains(self, slot: ReplicaSlot) -> bool {
        self.0 & (1 << slot.0) != 0
    }

    /// Puts `slot` in.
    pub fn insert(&mut self, slot: ReplicaSlot) {
        self.0 |= 1 << slot.0;
    }

    /// Takes `slot` out.
    pub fn remove(&mut self, slot: ReplicaSlot) {
        self.0 &= !(1 << slot.0);
    }

    /// How many are in it.
    #[must_use]
    pub fn len(self) -> usize {
        self.0.count_ones() as usize
    }

    /// Whether none is in it.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The members in slot order.
    pub fn iter(self) -> impl Iterator<Item = ReplicaSlot> {
        ReplicaSlot::all().filter(move |slot| self.contains(*slot))
    }

    /// Those in both.
    #[must_use]
    pub fn intersection(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Those in either.
    #[must_use]
    pub fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Those in this one and not in `other`.
    #[must_use]
    pub fn difference(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// The lowest slot in it.
    #[must_use]
    pub fn first(self) -> Option<ReplicaSlot> {
        self.iter().next()
    }
}

impl FromIterator<ReplicaSlot> for ReplicaSet {
    fn from_iter<T: IntoIterator<Item = ReplicaSlot>>(slots: T) -> Self {
        let mut set = Self::EMPTY;
        for slot in slots {
            set.insert(slot);
        }
        set
    }
}

impl fmt::Debug for ReplicaSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter().map(ReplicaSlot::index)).finish()
    }
}

/// Monotonic time in nanoseconds since an origin that the shell chooses (the core has no clock).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Nanos(pub u64);

impl Nanos {
    /// This moment plus `ns` nanoseconds.
    #[must_use]
    pub fn plus(self, ns: u64) -> Self {
        Self(self.0.saturating_add(ns))
    }

    /// Nanoseconds from `earlier` to this moment; 0 where `earlier` is later.
    #[must_use]
    pub fn since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// One millisecond in nanoseconds.
pub const MILLISECOND_NS: u64 = 1_000_000;
/// One second in nanoseconds.
pub const SECOND_NS: u64 = 1_000_000_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_expand_and_shrink_to_alignment() {
        let range = ByteRange::new(511, 4097);
        assert_eq!(range.expanded_to(512), ByteRange::new(0, 4608));
        assert_eq!(range.shrunk_to(512), ByteRange::new(512, 4096));
        assert!(ByteRange::new(1, 100).shrunk_to(512).is_empty());
        assert!(ByteRange::new(1, 510).shrunk_to(512).is_empty());
    }

    #[test]
    fn touched_regions_are_those_with_a_byte_in_the_range() {
        let regions = Regions { volume_bytes: 200 << 10, region_bytes: 64 << 10 };
        assert_eq!(regions.count(), 4);
        let touched =
            |offset, len| regions.touched(ByteRange::new(offset, len)).map(|r| r.0).collect::<Vec<_>>();
        assert_eq!(touched(0, 65536), vec![0]);
        assert_eq!(touched(65535, 2), vec![0, 1]);
        assert_eq!(touched(70000, 0), Vec::<u64>::new());
        assert_eq!(regions.range(RegionIndex(3)), ByteRange::new(192 << 10, 8 << 10));
    }

    #[test]
    fn sets_of_slots() {
        let set: ReplicaSet = [2, 5].map(ReplicaSlot::new).into_iter().collect();
        assert_eq!(set.len(), 2);
        assert_eq!(set.first(), Some(ReplicaSlot::new(2)));
        assert!(set.difference(ReplicaSet::only(ReplicaSlot::new(2))).contains(ReplicaSlot::new(5)));
    }
}
