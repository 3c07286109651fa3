//! A simulated disk with a volatile cache.
//!
//! ```text
//!  write ──► cached view (what reads see) ──► durable image (what a power cut leaves)
//!               └── unflushed versions ──────────┘ moved by a flush, or by the write itself (`durable`)
//! ```
//!
//! What must hold: a power cut leaves each sector with its durable content or with one of the unflushed
//! versions since; a process kill leaves the cached view as it is. Content is sparse: an absent block is a
//! hole and reads as zeroes. Versions are kept by 4 KiB block with a mask of the sectors that were written.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use crate::units::{BLOCK_BYTES, ByteRange, SECTOR_BYTES};

use super::image::{ALL_SECTORS, BLOCK, SECTOR, put_sectors};
use super::rng::Rng;

mod fork;
pub use fork::ContentHash;

pub use super::image::{Image, differing_blocks, first_difference, image_holds, image_is_zero, read_image};

/// Names one write on one disk; grows in the order of submission.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct WriteSeq(u64);

/// What a flush submitted at one moment covers.
#[derive(Clone, Debug)]
pub struct FlushMark {
    next: u64,
    open: BTreeSet<u64>,
}

impl FlushMark {
    fn covers(&self, write: u64) -> bool {
        write < self.next && !self.open.contains(&write)
    }
}

#[derive(Clone)]
struct Version {
    write: u64,
    /// Sectors of the block that this write wrote and that are not durable in this version.
    sectors: u8,
    /// The whole block after the write; `None`: a hole.
    content: Option<Rc<[u8; BLOCK]>>,
}

/// What a power cut does with the unflushed writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CutMode {
    /// None survives.
    DropAll,
    /// All survive.
    KeepAll,
    /// Each write survives, is lost or is torn at sectors, as chance has it.
    Mixed,
}

/// A simulated disk.
#[derive(Clone)]
pub struct Disk {
    bytes: u64,
    durable: Image,
    cached: Image,
    history: BTreeMap<u64, Vec<Version>>,
    next_write: u64,
    open: BTreeSet<u64>,
    meta_from: u64,
    meta_epoch: u64,
    /// Grows with every change of content, cached or durable.
    changes: u64,
    /// Sectors (by block) that a failed flush lost, with the newest write that was lost; of this life of the daemon.
    lost: BTreeMap<u64, (u8, u64)>,
    /// The same, of all lives since the last power cut.
    ever_lost: BTreeMap<u64, u8>,
    /// Reads have turned back where `lost` says.
    turned_back: bool,
}

impl Disk {
    /// An empty disk of `bytes` (a multiple of 4096).
    #[must_use]
    pub fn new(bytes: u64) -> Self {
        assert!(bytes.is_multiple_of(BLOCK_BYTES));
        Self {
            bytes,
            durable: Image::new(),
            cached: Image::new(),
            history: BTreeMap::new(),
            next_write: 0,
            open: BTreeSet::new(),
            meta_from: bytes,
            meta_epoch: 0,
            changes: 0,
            lost: BTreeMap::new(),
            ever_lost: BTreeMap::new(),
            turned_back: false,
        }
    }

    /// Size, bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Where metadata starts, bytes: durable changes from here on move [`Disk::meta_epoch`].
    pub fn set_meta_from(&mut self, offset: u64) {
        self.meta_from = offset;
        self.meta_epoch += 1;
    }

    /// Grows whenever durable metadata changes.
    #[must_use]
    pub fn meta_epoch(&self) -> u64 {
        self.meta_epoch
    }

    /// A write was submitted.
    pub fn begin_write(&mut self) -> WriteSeq {
        let write = self.next_write;
        self.next_write += 1;
        self.changes += 1;
        self.open.insert(write);
        WriteSeq(write)
    }

    /// A write was answered: later flushes cover it.
    pub fn complete_write(&mut self, write: WriteSeq) {
        self.open.remove(&write.0);
    }

    /// Writes `data` at `offset` into the cached view, but only the sectors that `keep` says (by index
    /// within the disk).
    pub fn apply(&mut self, write: WriteSeq, offset: u64, data: &[u8], mut keep: impl FnMut(u64) -> bool) {
        let end = offset + data.len() as u64;
        assert!(end <= self.bytes, "a write past the end of the disk");
        for block in offset / BLOCK_BYTES..end.div_ceil(BLOCK_BYTES) {
            let mut sectors = 0u8;
            let mut content = self.cached.get(&block).map_or([0; BLOCK], |b| **b);
            for sector in 0..8u64 {
                let start = block * BLOCK_BYTES + sector * SECTOR_BYTES;
                let (from, to) = (start.max(offset), (start + SECTOR_BYTES).min(end));
                if from < to && keep(start / SECTOR_BYTES) {
                    sectors |= 1 << sector;
                    let at = (from % BLOCK_BYTES) as usize;
                    let len = (to - from) as usize;
                    let source = (from - offset) as usize;
                    content[at..at + len].copy_from_slice(&data[source..source + len]);
                }
            }
            if sectors != 0 {
                self.push(write, block, sectors, Some(Rc::new(content)));
            }
        }
    }

    /// Makes blocks read as zeroes in the cached view; `range` is aligned to blocks. `keep` as in `apply`.
    pub fn apply_zero(&mut self, write: WriteSeq, range: ByteRange, mut keep: impl FnMut(u64) -> bool) {
        assert!(range.is_aligned(BLOCK_BYTES) && range.end() <= self.bytes);
        let blocks = range.offset / BLOCK_BYTES..range.end() / BLOCK_BYTES;
        let mut present: BTreeSet<u64> = self.cached.range(blocks.clone()).map(|(b, _)| *b).collect();
        present.extend(self.durable.range(blocks.clone()).map(|(b, _)| *b));
        present.extend(self.history.range(blocks.clone()).map(|(b, _)| *b));
        // What a failed flush lost is zeroed anew, even where it reads as zero.
        present.extend(self.lost.range(blocks).map(|(b, _)| *b));
        for block in present {
            let sectors =
                (0..8u64).filter(|s| keep(block * 8 + s)).fold(0u8, |mask, sector| mask | 1 << sector);
            if sectors == ALL_SECTORS {
                self.push(write, block, sectors, None);
            } else if sectors != 0 {
                let mut content = self.cached.get(&block).map_or([0; BLOCK], |b| **b);
                for sector in (0..8).filter(|s| sectors & (1 << s) != 0) {
                    content[sector * SECTOR..(sector + 1) * SECTOR].fill(0);
                }
                self.push(write, block, sectors, Some(Rc::new(content)));
            }
        }
    }

    fn push(&mut self, write: WriteSeq, block: u64, sectors: u8, content: Option<Rc<[u8; BLOCK]>>) {
        match &content {
            Some(content) => self.cached.insert(block, Rc::clone(content)),
            None => self.cached.remove(&block),
        };
        self.changes += 1;
        self.history.entry(block).or_default().push(Version { write: write.0, sectors, content });
    }

    /// The blocks in `range` that are no holes in the cached view, in order.
    pub fn present_blocks(&self, range: ByteRange) -> impl Iterator<Item = u64> {
        let blocks = range.offset / BLOCK_BYTES..range.end().div_ceil(BLOCK_BYTES);
        self.cached.range(blocks).map(|(block, _)| *block)
    }

    /// Fills `out` from the cached view.
    pub fn read(&self, offset: u64, out: &mut [u8]) {
        assert!(offset + out.len() as u64 <= self.bytes, "a read past the end of the disk");
        read_image(&self.cached, offset, out);
    }

    /// Fills `out` from the durable image.
    pub fn read_durable(&self, offset: u64, out: &mut [u8]) {
        read_image(&self.durable, offset, out);
    }

    /// Whether the cached view has no block in `range`.
    #[must_use]
    pub fn is_hole(&self, range: ByteRange) -> bool {
        let blocks = range.offset / BLOCK_BYTES..range.end().div_ceil(BLOCK_BYTES);
        self.cached.range(blocks).next().is_none()
    }

    /// What a flush submitted now covers.
    #[must_use]
    pub fn flush_mark(&self) -> FlushMark {
        FlushMark { next: self.next_write, open: self.open.clone() }
    }

    /// A flush ends well: what it covers is durable.
    pub fn flush(&mut self, mark: &FlushMark) {
        self.settle(|write| mark.covers(write), true);
    }

    /// A flush fails and the disk forgets that it ever had these writes: reads still see them, a later
    /// flush succeeds, a power cut shows the old content.
    pub fn lose_cache(&mut self, mark: &FlushMark) {
        self.settle(|write| mark.covers(write), false);
    }

    /// The page cache drops what a failed flush lost in this life of the daemon: reads turn back to what is durable, but
    /// for what was written since.
    pub fn turn_back(&mut self) {
        for (block, (mask, _)) in &self.lost {
            let newer = self.history.get(block).into_iter().flatten();
            let sectors = newer.fold(*mask, |sectors, version| sectors & !version.sectors);
            put_sectors(&mut self.cached, *block, sectors, self.durable.get(block));
            if let Some(lost) = self.ever_lost.get_mut(block) {
                *lost &= !sectors;
            }
            self.turned_back |= sectors != 0;
        }
        self.changes += 1;
    }

    /// Whether reads under `limit` bytes have turned back and nothing was written there since.
    #[must_use]
    pub fn has_turned_back(&self, limit: u64) -> bool {
        let mut lost = self.lost.range(..limit.div_ceil(BLOCK_BYTES));
        self.turned_back && lost.any(|(_, (mask, _))| *mask != 0)
    }

    /// One write becomes durable by itself.
    pub fn make_durable(&mut self, write: WriteSeq) {
        self.settle(|other| other == write.0, true);
    }

    /// Takes the chosen versions out of the history, into the durable image where `keep`. Older versions of
    /// sectors that become durable can never come back.
    fn settle(&mut self, chosen: impl Fn(u64) -> bool, keep: bool) {
        let (durable, meta_from) = (&mut self.durable, self.meta_from);
        let (lost, ever_lost) = (&mut self.lost, &mut self.ever_lost);
        let mut meta_changed = false;
        self.changes += 1;
        self.history.retain(|block, versions| {
            for at in 0..versions.len() {
                if !chosen(versions[at].write) {
                    continue;
                }
                let sectors = std::mem::take(&mut versions[at].sectors);
                if keep {
                    put_sectors(durable, *block, sectors, versions[at].content.as_ref());
                    meta_changed |= *block * BLOCK_BYTES >= meta_from;
                    for older in &mut versions[..at] {
                        older.sectors &= !sectors;
                    }
                    if let Some((mask, _)) = lost.get_mut(block) {
                        *mask &= !sectors;
                    }
                    if let Some(mask) = ever_lost.get_mut(block) {
                        *mask &= !sectors;
                    }
                } else {
                    *ever_lost.entry(*block).or_default() |= sectors;
                    let (mask, newest) = lost.entry(*block).or_default();
                    *mask |= sectors;
                    *newest = versions[at].write.max(*newest);
                }
            }
            versions.retain(|version| version.sectors != 0);
            !versions.is_empty()
        });
        self.meta_epoch += u64::from(meta_changed);
    }

    /// The power goes: each unflushed write is kept, lost or torn, and the cached view is what is left.
    pub fn power_cut(&mut self, rng: &mut Rng, mode: CutMode) {
        #[derive(Clone, Copy)]
        enum Fate {
            Kept,
            Lost,
            Torn,
        }
        let mut fates: BTreeMap<u64, Fate> = BTreeMap::new();
        for (block, versions) in std::mem::take(&mut self.history) {
            for version in versions {
                let fate = *fates.entry(version.write).or_insert_with(|| match mode {
                    CutMode::KeepAll => Fate::Kept,
                    CutMode::DropAll => Fate::Lost,
                    CutMode::Mixed => rng.pick(&[Fate::Kept, Fate::Lost, Fate::Torn]),
                });
                let sectors = match fate {
                    Fate::Kept => version.sectors,
                    Fate::Lost => 0,
                    Fate::Torn => version.sectors & rng.next_u64() as u8,
                };
                put_sectors(&mut self.durable, block, sectors, version.content.as_ref());
            }
        }
        self.cached = self.durable.clone();
        self.lost.clear();
        self.turned_back = false;
        self.ever_lost.clear();
        self.open.clear();
        self.meta_epoch += 1;
    }

    /// The process was killed: writes on their way have been applied as far as the caller applied them. What a
    /// failed flush lost is known to nobody any more.
    pub fn process_killed(&mut self) {
        self.lost.clear();
        self.turned_back = false;
        self.open.clear();
    }

    /// What reads see now, for [`Disk::put_back`].
    #[must_use]
    pub fn snapshot(&self) -> Image {
        self.cached.clone()
    }

    /// Someone puts an old copy (or nothing at all) in the place of the content. Durable at once.
    pub fn put_back(&mut self, image: Image) {
        self.durable = image.clone();
        self.cached = image;
        self.lost.clear();
        self.turned_back = false;
        self.ever_lost.clear();
        self.history.clear();
        self.open.clear();
        self.meta_epoch += 1;
    }

    /// Flips bits in one sector, in the durable image and in the cached view.
    pub fn rot_sector(&mut self, sector: u64, rng: &mut Rng) {
        let block = sector / 8;
        let at = (sector % 8) as usize * SECTOR + rng.below(SECTOR_BYTES) as usize;
        let flip = 1u8 << rng.below(8);
        for image in [&mut self.durable, &mut self.cached] {
            let content = image.entry(block).or_insert_with(|| Rc::new([0; BLOCK]));
            Rc::make_mut(content)[at] ^= flip;
        }
        self.meta_epoch += 1;
    }

    /// Blocks under `limit` bytes with sectors that are not durable, or that a failed flush lost in this life of the daemon.
    pub fn unflushed_blocks(&self, limit: u64) -> impl Iterator<Item = u64> {
        let end = limit.div_ceil(BLOCK_BYTES);
        let lost = self.lost.range(..end).filter(|(_, (mask, _))| *mask != 0);
        self.history.range(..end).map(|(block, _)| *block).chain(lost.map(|(block, _)| *block))
    }

    /// Whether a sector that `range` touches is not durable in its newest version.
    #[must_use]
    pub fn has_unflushed(&self, range: ByteRange) -> bool {
        let wide = range.expanded_to(SECTOR_BYTES);
        self.history.range(wide.offset / BLOCK_BYTES..wide.end().div_ceil(BLOCK_BYTES)).any(
            |(block, versions)| {
                let sectors = (0..8)
                    .filter(|s| {
                        ByteRange::new(block * BLOCK_BYTES + s * SECTOR_BYTES, SECTOR_BYTES).overlaps(wide)
                    })
                    .fold(0u8, |mask, s| mask | 1 << s);
                versions.iter().any(|version| version.sectors & sectors != 0)
            },
        )
    }

    /// The first block under `limit` bytes with a write that `mark` covers and that is not durable.
    #[must_use]
    pub fn unflushed_before(&self, mark: &FlushMark, limit: u64) -> Option<u64> {
        let mut lost = self.lost.range(..limit.div_ceil(BLOCK_BYTES));
        if let Some((block, _)) = lost.find(|(_, (mask, newest))| *mask != 0 && mark.covers(*newest)) {
            return Some(*block);
        }
        self.history
            .range(..limit.div_ceil(BLOCK_BYTES))
            .find(|(_, versions)| versions.iter().any(|version| mark.covers(version.write)))
            .map(|(block, _)| *block)
    }

    /// The first byte where the durable image differs from the cached view, but for what failed flushes lost.
    #[must_use]
    pub fn first_not_durable(&self) -> Option<u64> {
        differing_blocks(&self.durable, &self.cached, self.bytes).find_map(|block| {
            let lost = self.ever_lost.get(&block).copied().unwrap_or(0);
            let differs = |sector: &u64| {
                let (mut one, mut other) = ([0; SECTOR], [0; SECTOR]);
                let at = block * BLOCK_BYTES + sector * SECTOR_BYTES;
                read_image(&self.durable, at, &mut one);
                read_image(&self.cached, at, &mut other);
                lost & (1 << sector) == 0 && one != other
            };
            (0..8).find(differs).map(|sector| block * BLOCK_BYTES + sector * SECTOR_BYTES)
        })
    }

    /// Shares the memory of blocks that both disks hold alike, so that comparing them again costs nothing.
    pub fn share_equal(&mut self, other: &Self) {
        for (mine, theirs) in [(&mut self.durable, &other.durable), (&mut self.cached, &other.cached)] {
            for (block, content) in mine.iter_mut() {
                match theirs.get(block) {
                    Some(same) if !Rc::ptr_eq(content, same) && *content == *same => {
                        *content = Rc::clone(same);
                    }
                    _ => {}
                }
            }
        }
    }

    /// Whether failed flushes lost something under `limit` bytes that reads still show.
    #[must_use]
    pub fn has_lost(&self, limit: u64) -> bool {
        let mut lost = self.ever_lost.range(..limit.div_ceil(BLOCK_BYTES)).filter(|(_, mask)| **mask != 0);
        lost.any(|(block, _)| {
            let zero = [0; BLOCK];
            let of = |image: &Image| image.get(block).map_or(zero, |content| **content);
            of(&self.durable) != of(&self.cached)
        })
    }

    /// Whether a flush that failed before the daemon's last start lost something under `limit` bytes: nobody knows of it.
    #[must_use]
    pub fn has_lost_before(&self, limit: u64) -> bool {
        let now = |block: &u64| self.lost.get(block).map_or(0, |(mask, _)| *mask);
        let mut before = self.ever_lost.range(..limit.div_ceil(BLOCK_BYTES));
        before.any(|(block, mask)| mask & !now(block) != 0)
    }

    /// What a power cut leaves for certain.
    #[must_use]
    pub fn durable_image(&self) -> &Image {
        &self.durable
    }

    /// The cached view's blocks.
    #[must_use]
    pub fn image(&self) -> &Image {
        &self.cached
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(disk: &mut Disk, offset: u64, byte: u8, len: usize) -> WriteSeq {
        let seq = disk.begin_write();
        disk.apply(seq, offset, &vec![byte; len], |_| true);
        disk.complete_write(seq);
        seq
    }

    fn byte(disk: &Disk, offset: u64) -> u8 {
        let mut out = [0];
        disk.read(offset, &mut out);
        out[0]
    }

    #[test]
    fn a_power_cut_drops_what_was_not_flushed() {
        let mut disk = Disk::new(65536);
        write(&mut disk, 100, 1, 5000);
        let mark = disk.flush_mark();
        write(&mut disk, 0, 2, 512);
        disk.flush(&mark);
        assert_eq!((byte(&disk, 0), byte(&disk, 600)), (2, 1));
        disk.power_cut(&mut Rng::new(1), CutMode::DropAll);
        assert_eq!((byte(&disk, 0), byte(&disk, 100), byte(&disk, 5099), byte(&disk, 5100)), (0, 1, 1, 0));
    }

    #[test]
    fn a_durable_write_buries_older_versions_of_its_sectors_only() {
        let mut disk = Disk::new(65536);
        write(&mut disk, 0, 1, 1024);
        let seq = write(&mut disk, 512, 2, 512);
        disk.make_durable(seq);
        assert!(disk.has_unflushed(ByteRange::new(0, 1)) && !disk.has_unflushed(ByteRange::new(512, 512)));
        disk.power_cut(&mut Rng::new(1), CutMode::KeepAll);
        assert_eq!((byte(&disk, 0), byte(&disk, 512)), (1, 2));
    }

    #[test]
    fn a_torn_write_is_torn_at_sectors() {
        let mut torn = 0;
        for seed in 0..50 {
            let mut disk = Disk::new(65536);
            write(&mut disk, 0, 7, 8192);
            disk.power_cut(&mut Rng::new(seed), CutMode::Mixed);
            let sectors: Vec<u8> = (0..16).map(|s| byte(&disk, s * 512)).collect();
            for s in 0..16 {
                assert_eq!(byte(&disk, s * 512 + 511), sectors[s as usize]);
            }
            torn += u32::from(sectors.contains(&0) && sectors.contains(&7));
        }
        assert!(torn > 5);
    }

    #[test]
    fn a_lost_cache_reads_new_and_comes_back_old() {
        let mut disk = Disk::new(65536);
        write(&mut disk, 0, 1, 4096);
        disk.lose_cache(&disk.flush_mark());
        disk.flush(&disk.flush_mark());
        assert_eq!(byte(&disk, 9), 1);
        assert!(disk.first_not_durable().is_none() && disk.has_lost(65536) && !disk.has_lost(0));
        assert_eq!(first_difference(disk.durable_image(), disk.image(), 65536), Some(0));
        disk.power_cut(&mut Rng::new(1), CutMode::KeepAll);
        assert_eq!(byte(&disk, 9), 0);
    }

    #[test]
    fn a_dropped_cache_reads_old_at_once_but_for_what_was_written_since() {
        let mut disk = Disk::new(65536);
        write(&mut disk, 0, 1, 8192);
        disk.flush(&disk.flush_mark());
        write(&mut disk, 0, 2, 4096);
        let mark = disk.flush_mark();
        write(&mut disk, 512, 3, 512);
        disk.lose_cache(&mark);
        disk.turn_back();
        assert_eq!([0, 512, 1024, 4096].map(|at| byte(&disk, at)), [1, 3, 1, 1]);
        assert!(disk.has_turned_back(65536) && disk.unflushed_before(&disk.flush_mark(), 65536).is_some());
        write(&mut disk, 0, 4, 4096);
        disk.flush(&disk.flush_mark());
        assert!(!disk.has_turned_back(65536) && byte(&disk, 0) == 4);
    }

    #[test]
    fn zeroes_are_holes_and_can_be_lost() {
        let mut disk = Disk::new(65536);
        write(&mut disk, 0, 1, 8192);
        disk.flush(&disk.flush_mark());
        let seq = disk.begin_write();
        disk.apply_zero(seq, ByteRange::new(0, 8192), |_| true);
        disk.complete_write(seq);
        assert!(disk.is_hole(ByteRange::new(0, 65536)));
        disk.power_cut(&mut Rng::new(1), CutMode::DropAll);
        assert_eq!(byte(&disk, 4096), 1);
    }
}
