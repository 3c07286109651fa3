//! Intent bits and stale maps: in memory ([`RegionMaps`]) and on disk (bitmap pages).
//!
//! What must hold: a page is eight sectors of 512 bytes, each whole in itself, so a torn write of a page leaves
//! each sector old or new. A sector holds the intent bits and all eight stale maps of the same 448 regions, so
//! one write sets both. A sector that is damaged, of another volume or at the wrong place does not validate,
//! and reads as all bits set.
//!
//! ```text
//! sector:  0 magic u16   2 version u8   3 flags u8 (0)   4 crc32 u32
//!          8 intent, 56 bytes   64 stale[0], 56 bytes   120 stale[1] ...   456 stale[7]   512
//! bit n of a map of sector s is region s * 448 + n: byte n / 8, bit n % 8 counted from the lowest
//! crc32 is over: volume uuid (16), sector index from the first page (u64), bytes 0..4, bytes 8..512
//! ```

use std::ops::Range;

use bitvec::prelude::{BitVec, Lsb0};
use uuid::Uuid;

use super::cursor::{Reader, Writer};
use super::layout::REGIONS_PER_SECTOR;
use crate::units::{BLOCK_BYTES, REPLICAS_MAX, SECTOR_BYTES};

/// One bit a region.
pub type Bitmap = BitVec<u64, Lsb0>;

/// The first two bytes of each bitmap sector, little endian.
pub const SECTOR_MAGIC: u16 = 0x6d62;
/// Version of a bitmap sector.
pub const SECTOR_VERSION: u8 = 1;

const PAGE_LEN: usize = BLOCK_BYTES as usize;
const SECTOR_LEN: usize = SECTOR_BYTES as usize;
const SECTORS_PER_PAGE: usize = PAGE_LEN / SECTOR_LEN;
const SECTOR_HEADER_BYTES: usize = 8;
/// Intent, and one stale map a slot.
const MAPS: usize = 1 + REPLICAS_MAX;
/// 64-bit words of one map in one sector: sectors begin and end at whole words of the in-memory maps.
const WORDS_PER_SECTOR: usize = REGIONS_PER_SECTOR as usize / 64;

const _: () = assert!(REGIONS_PER_SECTOR.is_multiple_of(64));
const _: () = assert!(SECTOR_HEADER_BYTES + MAPS * WORDS_PER_SECTOR * 8 == SECTOR_LEN);

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

    /// Number of regions.
    #[must_use]
    pub fn regions(&self) -> usize {
        self.intent.len()
    }

    /// Sets every bit that is set in `other`, which has as many regions.
    pub fn unite(&mut self, other: &Self) {
        for (map, other) in self.maps_mut().zip(other.maps()) {
            unite(map, other);
        }
    }

    fn maps(&self) -> impl Iterator<Item = &Bitmap> {
        std::iter::once(&self.intent).chain(&self.stale)
    }

    fn maps_mut(&mut self) -> impl Iterator<Item = &mut Bitmap> {
        std::iter::once(&mut self.intent).chain(&mut self.stale)
    }
}

/// Sets every bit of `map` that is set in `other`, a word at a time.
///
/// # Panics
/// Where their lengths differ.
pub fn unite(map: &mut Bitmap, other: &Bitmap) {
    assert_eq!(map.len(), other.len());
    assert_starts_at_word(map);
    assert_starts_at_word(other);
    for (word, other) in map.as_raw_mut_slice().iter_mut().zip(other.as_raw_slice()) {
        *word |= other;
    }
}

/// The regions that sector `sector` (0 to 7) of page `page` describes, cut at `regions`; empty where the volume
/// ends before it.
#[must_use]
pub fn sector_regions(page: u64, sector: usize, regions: usize) -> Range<usize> {
    let first = sector_index(page, sector) as usize * REGIONS_PER_SECTOR as usize;
    first.min(regions)..(first + REGIONS_PER_SECTOR as usize).min(regions)
}

/// Writes bitmap page `page` (its index on the replica) of `maps` into `out`. The bytes are the same for every
/// replica of the volume.
///
/// # Panics
/// Where `out` is not 4096 bytes long.
pub fn encode_page(volume_uuid: Uuid, page: u64, maps: &RegionMaps, out: &mut [u8]) {
    assert_eq!(out.len(), PAGE_LEN);
    for map in maps.maps() {
        assert_starts_at_word(map);
        assert_eq!(map.len(), maps.regions());
    }
    for (sector, out) in out.chunks_exact_mut(SECTOR_LEN).enumerate() {
        let mut to = Writer::new(out);
        to.u16(SECTOR_MAGIC);
        to.u8(SECTOR_VERSION);
        to.u8(0);
        to.u32(0); // the CRC, below
        let first_word = first_word(page, sector);
        for map in maps.maps() {
            encode_words(map, first_word, &mut to);
        }
        let crc = checksum(volume_uuid, sector_index(page, sector), out);
        out[4..SECTOR_HEADER_BYTES].copy_from_slice(&crc.to_le_bytes());
    }
}

/// Reads bitmap page `page` from its 4096 bytes: the regions that it describes take its bits in `maps`, or all
/// bits set where a sector is damaged. Returns the number of damaged sectors; sectors wholly behind the last
/// region are not looked at.
///
/// # Panics
/// Where `bytes` is not 4096 bytes long.
pub fn decode_page(volume_uuid: Uuid, page: u64, bytes: &[u8], maps: &mut RegionMaps) -> u32 {
    decode_page_sectors(volume_uuid, page, bytes, maps).count_ones()
}

/// Like [`decode_page`]; returns which sectors are damaged: bit n stands for sector n.
///
/// # Panics
/// Where `bytes` is not 4096 bytes long.
pub fn decode_page_sectors(volume_uuid: Uuid, page: u64, bytes: &[u8], maps: &mut RegionMaps) -> u8 {
    assert_eq!(bytes.len(), PAGE_LEN);
    let mut damaged = 0;
    for (sector, bytes) in bytes.chunks_exact(SECTOR_LEN).enumerate() {
        if sector_regions(page, sector, maps.regions()).is_empty() {
            break;
        }
        let valid = is_valid(volume_uuid, sector_index(page, sector), bytes);
        if !valid {
            damaged |= 1 << sector;
        }
        let mut from = Reader::new(bytes);
        from.seek(SECTOR_HEADER_BYTES);
        for map in maps.maps_mut() {
            decode_words(map, first_word(page, sector), |_| if valid { from.u64() } else { u64::MAX });
        }
    }
    damaged
}

/// Sets all bits of page `page` in `maps`, as for a page that cannot be read; returns which sectors that are.
pub fn set_page(page: u64, maps: &mut RegionMaps) -> u8 {
    let mut set = 0;
    for sector in 0..SECTORS_PER_PAGE {
        if !sector_regions(page, sector, maps.regions()).is_empty() {
            set |= 1 << sector;
            for map in maps.maps_mut() {
                decode_words(map, first_word(page, sector), |_| u64::MAX);
            }
        }
    }
    set
}

fn sector_index(page: u64, sector: usize) -> u64 {
    page * SECTORS_PER_PAGE as u64 + sector as u64
}

fn first_word(page: u64, sector: usize) -> usize {
    sector_index(page, sector) as usize * WORDS_PER_SECTOR
}

/// The bits of word `word` that stand for regions: all but in the last word.
fn word_mask(regions: usize, word: usize) -> u64 {
    match regions.saturating_sub(word * 64) {
        0 => 0,
        bits @ 1..64 => (1 << bits) - 1,
        _ => u64::MAX,
    }
}

fn encode_words(map: &Bitmap, first: usize, to: &mut Writer<'_>) {
    let words = map.as_raw_slice();
    let mut out = [0; WORDS_PER_SECTOR * 8];
    let whole = (first + WORDS_PER_SECTOR) * 64 <= map.len();
    for (out, word) in out.chunks_exact_mut(8).zip(first..) {
        let bits = words.get(word).copied().unwrap_or(0);
        // `bitvec` leaves bits behind the end of a map undefined.
        let bits = if whole { bits } else { bits & word_mask(map.len(), word) };
        out.copy_from_slice(&bits.to_le_bytes());
    }
    to.bytes(&out);
}

fn decode_words(map: &mut Bitmap, first: usize, mut bits: impl FnMut(usize) -> u64) {
    assert_starts_at_word(map);
    let regions = map.len();
    let words = map.as_raw_mut_slice();
    for word in first..first + WORDS_PER_SECTOR {
        let bits = bits(word);
        if let Some(to) = words.get_mut(word) {
            *to = bits & word_mask(regions, word);
        }
    }
}

/// Maps are made whole (`Bitmap::repeat`), never cut out of another: bit 0 is bit 0 of the first word.
fn assert_starts_at_word(map: &Bitmap) {
    assert_eq!(map.as_bitptr().bit().into_inner(), 0);
}

fn is_valid(volume_uuid: Uuid, index: u64, bytes: &[u8]) -> bool {
    let mut from = Reader::new(bytes);
    let (magic, version, _flags, crc) = (from.u16(), from.u8(), from.u8(), from.u32());
    magic == SECTOR_MAGIC && version == SECTOR_VERSION && crc == checksum(volume_uuid, index, bytes)
}

/// Begins with the volume and the place, so that a sector of another volume, or one that a disk wrote to the
/// wrong place, does not validate.
fn checksum(volume_uuid: Uuid, index: u64, sector: &[u8]) -> u32 {
    let mut seed = [0; 28];
    let mut to = Writer::new(&mut seed);
    to.uuid(volume_uuid);
    to.u64(index);
    to.bytes(&sector[..4]);
    let mut crc = crc32fast::Hasher::new();
    crc.update(&seed);
    crc.update(&sector[SECTOR_HEADER_BYTES..]);
    crc.finalize()
}
