//! Bitmap pages: encoding, decoding, damage.
//!
//! What must hold:
//! - Maps that were encoded are decoded again, the same, whatever stood in the memory before.
//! - A changed byte damages its own sector, which reads as all bits set, and no other one.
//! - A page of another volume or of another place is damaged throughout.
//! - Any bits with a right checksum are taken as they stand, and encode to the same bits.

use nbdmirror::format::bitmap::{
    RegionMaps, decode_page, decode_page_sectors, encode_page, sector_regions, set_page,
};
use nbdmirror::format::layout::REGIONS_PER_PAGE;
use uuid::Uuid;

use super::input::Input;
use super::volume::{Block, seal_sector, set_some};

const VOLUME: Uuid = Uuid::from_u128(0x1234);

pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let regions = 1 + input.below(3 * REGIONS_PER_PAGE) as usize;
    let page = input.below((regions as u64).div_ceil(REGIONS_PER_PAGE));
    let mode = input.u8() % 3;
    let mut maps = RegionMaps::clear(regions);
    let place = (input.index(8), input.index(512));
    let change = input.u8();
    if mode == 2 {
        return any_content(&mut input, page, &maps);
    }
    while !input.is_empty() {
        set_some(&mut input, &mut maps);
    }
    let mut block: Block = [0xa5; 4096];
    encode_page(VOLUME, page, &maps, &mut block);
    // Into memory where everything is set: each bit of the page has to be brought.
    let mut decoded = RegionMaps::clear(regions);
    for page in 0..(regions as u64).div_ceil(REGIONS_PER_PAGE) {
        set_page(page, &mut decoded);
    }
    assert_eq!(decode_page_sectors(VOLUME, page, &block, &mut decoded), 0);
    check_page(page, &decoded, &maps, 0);
    if mode == 0 {
        return elsewhere(page, &block, regions);
    }
    block[place.0 * 512 + place.1] ^= change;
    let damaged = decode_page_sectors(VOLUME, page, &block, &mut decoded);
    let used = !sector_regions(page, place.0, regions).is_empty();
    // Byte 3 of a sector holds flags, of which none has a meaning; its checksum covers them.
    assert_eq!(damaged, u8::from(used && change != 0) << place.0);
    check_page(page, &decoded, &maps, damaged);
}

/// Within the page `decoded` is `maps`, and all set in damaged sectors; other pages were all set.
fn check_page(page: u64, decoded: &RegionMaps, maps: &RegionMaps, damaged: u8) {
    let mut expected = maps.clone();
    for sector in 0..(maps.regions() as u64).div_ceil(448) {
        if sector / 8 != page || damaged & (1 << (sector % 8)) != 0 {
            let first = sector as usize * 448;
            let regions = first..maps.regions().min(first + 448);
            expected.intent[regions.clone()].fill(true);
            expected.stale.iter_mut().for_each(|map| map[regions.clone()].fill(true));
        }
    }
    assert!(*decoded == expected, "not what was encoded");
}

fn elsewhere(page: u64, block: &Block, regions: usize) {
    let sectors = (0..8).filter(|sector| !sector_regions(page, *sector, regions).is_empty()).count() as u32;
    let mut maps = RegionMaps::clear(regions);
    assert_eq!(decode_page(Uuid::from_u128(0x1235), page, block, &mut maps), sectors);
    assert!(sector_regions(page, 0, regions).all(|region| maps.intent[region]));
    for other in (0..(regions as u64).div_ceil(REGIONS_PER_PAGE)).filter(|other| *other != page) {
        let sectors =
            (0..8).filter(|sector| !sector_regions(other, *sector, regions).is_empty()).count() as u32;
        assert_eq!(decode_page(VOLUME, other, block, &mut maps), sectors, "a page of another place is taken");
    }
}

/// Whatever bits a sector has, if its checksum is right.
fn any_content(input: &mut Input<'_>, page: u64, clear: &RegionMaps) {
    let mut block: Block = [0; 4096];
    encode_page(VOLUME, page, clear, &mut block);
    let mut expected_damage = 0;
    for (sector, bytes) in block.chunks_exact_mut(512).enumerate() {
        let at = input.index(512);
        let with = input.bytes(64);
        let end = 512.min(at + with.len());
        bytes[at..end].copy_from_slice(&with[..end - at]);
        seal_sector(VOLUME, page * 8 + sector as u64, bytes);
        let known = bytes[..2] == 0x6d62_u16.to_le_bytes() && bytes[2] == 1;
        if !known && !sector_regions(page, sector, clear.regions()).is_empty() {
            expected_damage |= 1 << sector;
        }
    }
    let mut maps = clear.clone();
    assert_eq!(decode_page_sectors(VOLUME, page, &block, &mut maps), expected_damage);
    for region in sector_regions(page, 0, clear.regions()).filter(|_| expected_damage & 1 == 0) {
        let bit = |map: usize| block[8 + 56 * map + region % 448 / 8] & (1 << (region % 8)) != 0;
        assert_eq!(maps.intent[region], bit(0), "region {region}");
        for (slot, stale) in maps.stale.iter().enumerate() {
            assert_eq!(stale[region], bit(1 + slot), "region {region}");
        }
    }
    let mut again = clear.clone();
    encode_page(VOLUME, page, &maps, &mut block);
    assert_eq!(decode_page(VOLUME, page, &block, &mut again), 0);
    assert_eq!(again, maps, "bits behind the last region are kept");
}
