//! What stands on a disk: sparse images, compared and read.
//!
//! What must hold: an absent block is a hole and reads as zeroes; blocks are shared until written.

use std::collections::BTreeMap;
use std::rc::Rc;

use crate::units::{BLOCK_BYTES, ByteRange, SECTOR_BYTES};

pub(super) const BLOCK: usize = BLOCK_BYTES as usize;
pub(super) const SECTOR: usize = SECTOR_BYTES as usize;
/// A mask of all sectors of a block.
pub(super) const ALL_SECTORS: u8 = 0xff;
const _: () = assert!(BLOCK / SECTOR == 8);

/// A sparse image: absent blocks are holes. Cloning is cheap: blocks are shared until written.
pub type Image = BTreeMap<u64, Rc<[u8; BLOCK]>>;

/// Puts the chosen sectors of a block (`None`: a hole) into `image`.
pub(super) fn put_sectors(image: &mut Image, block: u64, sectors: u8, content: Option<&Rc<[u8; BLOCK]>>) {
    if sectors == 0 {
        return;
    }
    if sectors == ALL_SECTORS {
        match content {
            Some(content) => image.insert(block, Rc::clone(content)),
            None => image.remove(&block),
        };
        return;
    }
    let target = Rc::make_mut(image.entry(block).or_insert_with(|| Rc::new([0; BLOCK])));
    for sector in (0..8usize).filter(|s| sectors & (1 << s) != 0) {
        let bytes = sector * SECTOR..(sector + 1) * SECTOR;
        match content {
            Some(content) => target[bytes.clone()].copy_from_slice(&content[bytes]),
            None => target[bytes].fill(0),
        }
    }
}

/// Fills `out` from `image` at `offset`.
pub fn read_image(image: &Image, offset: u64, out: &mut [u8]) {
    let end = offset + out.len() as u64;
    let mut at = offset;
    while at < end {
        let within = (at % BLOCK_BYTES) as usize;
        let len = (BLOCK - within).min((end - at) as usize);
        let target = &mut out[(at - offset) as usize..][..len];
        match image.get(&(at / BLOCK_BYTES)) {
            Some(block) => target.copy_from_slice(&block[within..within + len]),
            None => target.fill(0),
        }
        at += len as u64;
    }
}

/// Whether `image` reads as `data` at `offset`.
#[must_use]
pub fn image_holds(image: &Image, offset: u64, data: &[u8]) -> bool {
    let end = offset + data.len() as u64;
    let mut at = offset;
    while at < end {
        let within = (at % BLOCK_BYTES) as usize;
        let len = (BLOCK - within).min((end - at) as usize);
        let piece = &data[(at - offset) as usize..][..len];
        let same = match image.get(&(at / BLOCK_BYTES)) {
            Some(block) => *piece == block[within..within + len],
            None => piece.iter().all(|byte| *byte == 0),
        };
        if !same {
            return false;
        }
        at += len as u64;
    }
    true
}

/// Whether `image` reads as zeroes in `range`, which is aligned to blocks.
#[must_use]
pub fn image_is_zero(image: &Image, range: ByteRange) -> bool {
    assert!(range.is_aligned(BLOCK_BYTES));
    let mut blocks = image.range(range.offset / BLOCK_BYTES..range.end() / BLOCK_BYTES);
    blocks.all(|(_, block)| block.iter().all(|byte| *byte == 0))
}

/// Blocks under `limit` bytes in which two images differ, in order.
pub fn differing_blocks<'a>(a: &'a Image, b: &'a Image, limit: u64) -> impl Iterator<Item = u64> + 'a {
    let same = |x: Option<&Rc<[u8; BLOCK]>>, y: Option<&Rc<[u8; BLOCK]>>| match (x, y) {
        (Some(x), Some(y)) => Rc::ptr_eq(x, y) || x == y,
        (Some(one), None) | (None, Some(one)) => one.iter().all(|byte| *byte == 0),
        (None, None) => true,
    };
    let blocks = ..limit.div_ceil(BLOCK_BYTES);
    let (mut left, mut right) = (a.range(blocks).peekable(), b.range(blocks).peekable());
    std::iter::from_fn(move || {
        loop {
            let block = match (left.peek(), right.peek()) {
                (None, None) => return None,
                (Some((x, _)), Some((y, _))) => **x.min(y),
                (Some((x, _)), None) => **x,
                (None, Some((y, _))) => **y,
            };
            let x = left.next_if(|(at, _)| **at == block).map(|(_, content)| content);
            let y = right.next_if(|(at, _)| **at == block).map(|(_, content)| content);
            if !same(x, y) {
                return Some(block);
            }
        }
    })
}

/// The first byte under `limit` where two images differ.
#[must_use]
pub fn first_difference(a: &Image, b: &Image, limit: u64) -> Option<u64> {
    let zero = Rc::new([0; BLOCK]);
    let block = differing_blocks(a, b, limit).next()?;
    let (x, y) = (a.get(&block).unwrap_or(&zero), b.get(&block).unwrap_or(&zero));
    let at = (0..BLOCK).find(|i| x[*i] != y[*i]).map_or(0, |i| i as u64);
    Some(block * BLOCK_BYTES + at)
}
