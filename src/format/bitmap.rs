//! Intent bits and stale maps: in memory ([`RegionMaps`]) and on disk (bitmap pages).

use bitvec::prelude::{BitVec, Lsb0};

use crate::units::REPLICAS_MAX;

/// One bit a region.
pub type Bitmap = BitVec<u64, Lsb0>;

/// The intent bits and the stale maps of a volume, one bit a region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionMaps {
    /// Writes may be in flight, or not yet flushed, here.
    pub intent: Bitmap,
    /// For each slot: this replica missed a write here.
    pub stale: [Bitmap; REPLICAS_MAX],
}

impl RegionMaps {
    /// Maps of `regions` regions with every bit clear.
    #[must_use]
    pub fn clear(regions: usize) -> Self {
        Self {
            intent: Bitmap::repeat(false, regions),
            stale: std::array::from_fn(|_| Bitmap::repeat(false, regions)),
        }
    }
}
