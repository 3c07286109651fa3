//! Forking a disk: what a power cut leaves open, a power cut with a chosen end, and what makes two disks equal.
//!
//! What must hold: every end that [`Disk::power_cut_to`] can be given is one that the medium can have; a write that
//! [`Disk::open_writes`] leaves out makes no difference in any of them.

use std::collections::BTreeMap;
use std::rc::Rc;

use super::{ALL_SECTORS, BLOCK, Disk, Image, SECTOR, Version, WriteSeq, put_sectors};
use crate::format::superblock::Superblock;
use crate::sim::rng::mix64;
use crate::units::BLOCK_BYTES;

/// A hash of content, the same in every run on every machine.
#[derive(Clone, Copy, Debug)]
pub struct ContentHash(u64);

impl ContentHash {
    /// Of nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self(0x6e62_646d_6972_726f)
    }

    /// Adds a number.
    pub fn number(&mut self, value: u64) {
        self.0 = mix64(self.0.rotate_left(17) ^ value);
    }

    /// Adds bytes, a multiple of 8 of them.
    pub fn bytes(&mut self, bytes: &[u8]) {
        let mut lane = self.0;
        for word in bytes.chunks_exact(8) {
            let word = word.iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte));
            lane = (lane.rotate_left(29) ^ word).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        }
        self.number(lane);
    }

    /// The hash.
    #[must_use]
    pub fn finish(self) -> u64 {
        self.0
    }
}

impl Default for ContentHash {
    fn default() -> Self {
        Self::new()
    }
}

fn sector_of(content: Option<&[u8; BLOCK]>, sector: usize) -> Option<&[u8]> {
    content.map(|content| &content[sector * SECTOR..(sector + 1) * SECTOR])
}

/// Whether two sectors read the same; an absent one is zeroes.
fn same_sector(a: Option<&[u8]>, b: Option<&[u8]>) -> bool {
    match (a, b) {
        (Some(a), Some(b)) => a == b,
        (None, None) => true,
        (Some(some), None) | (None, Some(some)) => some.iter().all(|byte| *byte == 0),
    }
}

impl Disk {
    /// The writes that a power cut may keep, lose or tear, oldest first, each with those of its sectors (by index
    /// within the disk) in which that makes a difference; writes without any are left out.
    #[must_use]
    pub fn open_writes(&self) -> Vec<(WriteSeq, Vec<u64>)> {
        let mut open: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
        for (block, versions) in &self.history {
            for (at, version) in versions.iter().enumerate() {
                for sector in (0..8usize).filter(|sector| version.sectors & (1 << sector) != 0) {
                    let new = sector_of(version.content.as_deref(), sector);
                    let durable = self.durable.get(block).map(|block| &**block);
                    let older = versions[..at].iter().filter(|older| older.sectors & (1 << sector) != 0);
                    let mut before = older.map(|older| older.content.as_deref()).chain([durable]);
                    if before.any(|content| !same_sector(new, sector_of(content, sector))) {
                        open.entry(version.write).or_default().push(block * 8 + sector as u64);
                    }
                }
            }
        }
        open.into_iter().map(|(write, sectors)| (WriteSeq(write), sectors)).collect()
    }

    /// The power goes: of each unflushed write those sectors are left that `kept` says.
    pub fn power_cut_to(&mut self, mut kept: impl FnMut(WriteSeq, u64) -> bool) {
        for (block, versions) in std::mem::take(&mut self.history) {
            for version in versions {
                let sectors = (0..8u64)
                    .filter(|sector| version.sectors & (1 << sector) != 0)
                    .filter(|sector| kept(WriteSeq(version.write), block * 8 + sector))
                    .fold(0u8, |mask, sector| mask | 1 << sector);
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

    /// Grows with every change of content, cached or durable.
    #[must_use]
    pub fn changes(&self) -> u64 {
        self.changes
    }

    /// The sectors (by index within the disk) from `offset` on in which `data` (`None`: zeroes) differs from what
    /// reads see now; `len` bytes.
    #[must_use]
    pub fn sectors_that_differ(&self, offset: u64, len: u64, data: Option<&[u8]>) -> Vec<u64> {
        let mut now = vec![0; len as usize];
        self.read(offset, &mut now);
        let differs = |at: u64| match data {
            Some(data) => data[at as usize] != now[at as usize],
            None => now[at as usize] != 0,
        };
        let mut sectors: Vec<u64> =
            (0..len).filter(|at| differs(*at)).map(|at| (offset + at) / SECTOR as u64).collect();
        sectors.dedup();
        sectors
    }

    /// Adds what the disk is to `hash`: content, what is not durable yet, what a failed flush lost. When a
    /// superblock was written does not count.
    pub fn add_identity(&self, hash: &mut ContentHash) {
        self.add_image(hash, &self.durable, None);
        self.add_image(hash, &self.cached, Some(&self.durable));
        hash.number(self.history.len() as u64);
        let mut writes: Vec<u64> = vec![];
        for (block, versions) in &self.history {
            hash.number(*block);
            for Version { write, sectors, content } in versions {
                // Which versions are one write matters, its number does not: it is named by its first version here.
                let name = writes.iter().position(|other| other == write).unwrap_or_else(|| {
                    writes.push(*write);
                    writes.len() - 1
                });
                hash.number(name as u64);
                hash.number(u64::from(*sectors));
                match content {
                    Some(content) => self.add_block(hash, *block, content),
                    None => hash.number(0),
                }
            }
        }
        hash.number(self.lost.len() as u64);
        for (block, (sectors, _)) in &self.lost {
            hash.number(*block);
            hash.number(u64::from(*sectors));
        }
        hash.number(self.ever_lost.len() as u64);
        for (block, sectors) in &self.ever_lost {
            hash.number(*block);
            hash.number(u64::from(*sectors));
        }
    }

    /// An image, or where it differs from `base`.
    fn add_image(&self, hash: &mut ContentHash, image: &Image, base: Option<&Image>) {
        let zero = Rc::new([0; BLOCK]);
        for (block, content) in image {
            let known = base.map(|base| base.get(block));
            let same = known.flatten().is_some_and(|known| Rc::ptr_eq(known, content) || known == content);
            // A block of zeroes is not a hole: what is a hole is seen by resync.
            if !same {
                hash.number(*block);
                self.add_block(hash, *block, content);
            }
        }
        for block in base.iter().flat_map(|base| base.keys()).filter(|block| !image.contains_key(block)) {
            hash.number(!*block);
            self.add_block(hash, *block, &zero);
        }
        hash.number(u64::from(ALL_SECTORS));
    }

    fn add_block(&self, hash: &mut ContentHash, block: u64, content: &[u8; BLOCK]) {
        let metadata = block * BLOCK_BYTES >= self.meta_from;
        match metadata.then(|| Superblock::decode(content)) {
            Some(Ok(mut superblock)) => {
                superblock.written_unix_ns = 0;
                hash.bytes(&superblock.encode());
            }
            _ => hash.bytes(content),
        }
    }
}
