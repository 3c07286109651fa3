//! Where things stand on a replica.

use crate::planted::{Bug, planted};
use crate::units::{BLOCK_BYTES, REGION_BYTES_MAX, REGION_BYTES_MIN, Regions, ReplicaOffset};

/// Regions that one 512-byte bitmap sector describes: nine bitmaps (intent, eight stale maps) of 56 bytes.
pub const REGIONS_PER_SECTOR: u64 = 448;
/// Regions that one 4 KiB bitmap page describes.
pub const REGIONS_PER_PAGE: u64 = 8 * REGIONS_PER_SECTOR;
/// Bitmaps are kept at or under this size (bits of one map, in bytes) by the default region size.
pub const BITMAP_BYTES_TARGET: u64 = 256 << 10;
/// Default region size of volumes up to 2 TiB.
pub const REGION_BYTES_DEFAULT: u64 = 1 << 20;
/// Superblock slots.
pub const SUPERBLOCK_SLOTS: u64 = 2;

const _: () = assert!(REGION_BYTES_DEFAULT >= REGION_BYTES_MIN && REGION_BYTES_DEFAULT <= REGION_BYTES_MAX);

/// The places of metadata on one replica of `device_bytes`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The volume's regions.
    pub regions: Regions,
    /// Size of the backing, a multiple of 4096.
    pub device_bytes: u64,
}

impl Layout {
    /// Smallest backing for a volume, bytes: data, rounded up to 4 KiB, and metadata.
    #[must_use]
    pub fn device_bytes_min(regions: Regions) -> u64 {
        regions.volume_bytes.next_multiple_of(BLOCK_BYTES) + Self::metadata_bytes(regions)
    }

    /// Bytes of metadata at the end of each replica.
    #[must_use]
    pub fn metadata_bytes(regions: Regions) -> u64 {
        (Self::pages(regions) + SUPERBLOCK_SLOTS) * BLOCK_BYTES
    }

    /// Number of bitmap pages.
    #[must_use]
    pub fn pages(regions: Regions) -> u64 {
        regions.count().div_ceil(REGIONS_PER_PAGE)
    }

    /// Number of bitmap pages.
    #[must_use]
    pub fn page_count(&self) -> u64 {
        Self::pages(self.regions)
    }

    /// Where bitmap page `index` stands.
    #[must_use]
    pub fn page_offset(&self, index: u64) -> ReplicaOffset {
        assert!(index < self.page_count());
        if planted(Bug::MetadataOverData) && index == 0 {
            return ReplicaOffset(self.regions.volume_bytes - BLOCK_BYTES);
        }
        ReplicaOffset(self.device_bytes - Self::metadata_bytes(self.regions) + index * BLOCK_BYTES)
    }

    /// Where superblock slot `slot` (0 or 1) stands.
    #[must_use]
    pub fn superblock_offset(&self, slot: u64) -> ReplicaOffset {
        superblock_offset(self.device_bytes, slot)
    }

    /// The region size that `create` uses for a volume of `volume_bytes`: 1 MiB, and larger powers of two
    /// where a bitmap would pass 256 KiB.
    #[must_use]
    pub fn default_region_bytes(volume_bytes: u64) -> u64 {
        let mut region_bytes = REGION_BYTES_DEFAULT;
        while volume_bytes.div_ceil(region_bytes) > BITMAP_BYTES_TARGET * 8 {
            region_bytes *= 2;
        }
        region_bytes.min(REGION_BYTES_MAX)
    }

    /// The largest volume, a multiple of 4 KiB, that fits a device with this region size; 0 where none does.
    #[must_use]
    pub fn volume_bytes_max(device_bytes: u64, region_bytes: u64) -> u64 {
        let mut volume_bytes = device_bytes / BLOCK_BYTES * BLOCK_BYTES;
        loop {
            let need = Self::device_bytes_min(Regions { volume_bytes, region_bytes });
            if volume_bytes == 0 || need <= device_bytes {
                return volume_bytes;
            }
            volume_bytes = volume_bytes.saturating_sub((need - device_bytes).next_multiple_of(BLOCK_BYTES));
        }
    }
}

/// Where superblock slot `slot` (0 or 1) stands on a backing of `device_bytes` (a multiple of 4096).
#[must_use]
pub fn superblock_offset(device_bytes: u64, slot: u64) -> ReplicaOffset {
    assert!(slot < SUPERBLOCK_SLOTS && device_bytes.is_multiple_of(BLOCK_BYTES));
    ReplicaOffset(device_bytes - (SUPERBLOCK_SLOTS - slot) * BLOCK_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_regions_keep_bitmaps_small() {
        for (volume, region) in
            [(1 << 20, 1 << 20), (2 << 40, 1 << 20), (4 << 40, 2 << 20), (64 << 40, 32 << 20)]
        {
            assert_eq!(Layout::default_region_bytes(volume), region);
        }
    }

    #[test]
    fn the_largest_volume_fits_and_no_larger_one_does() {
        for device_bytes in [16 << 20, 100 << 20, (1 << 30) + 12288] {
            let volume_bytes = Layout::volume_bytes_max(device_bytes, 64 << 10);
            let fits = |volume_bytes| {
                Layout::device_bytes_min(Regions { volume_bytes, region_bytes: 64 << 10 }) <= device_bytes
            };
            assert!(fits(volume_bytes) && !fits(volume_bytes + 4096));
        }
    }
}
