//! Metadata for the targets to spoil: superblocks and maps from bytes, replicas of which only the metadata stands, and
//! the checksums of `docs/on-disk-format.md`, written down a second time.

use std::io;

use nbdmirror::format::Found;
use nbdmirror::format::bitmap::{RegionMaps, encode_page};
use nbdmirror::format::layout::Layout;
use nbdmirror::format::read::{ReadError, read_found};
use nbdmirror::format::superblock::{
    EVENT_COUNT_MAX, Member, MemberState, NAME_BYTES_MAX, PARENTS_MAX, SUPERBLOCK_BYTES, Superblock,
};
use nbdmirror::units::{REPLICAS_MAX, Regions, ReplicaOffset, ReplicaSlot, VOLUME_BYTES_MAX};
use uuid::Uuid;

use super::input::Input;

/// A 4 KiB block of metadata.
pub type Block = [u8; SUPERBLOCK_BYTES];

/// Makes the checksum of a superblock right.
pub fn seal_superblock(block: &mut Block) {
    block[16..20].fill(0);
    let crc = crc32fast::hash(block);
    block[16..20].copy_from_slice(&crc.to_le_bytes());
}

/// The checksum that sector `index` (counted from the first bitmap page) of a volume should have.
pub fn sector_crc(volume_uuid: Uuid, index: u64, sector: &[u8]) -> u32 {
    let mut bytes = volume_uuid.as_bytes().to_vec();
    bytes.extend_from_slice(&index.to_le_bytes());
    bytes.extend_from_slice(&sector[..4]);
    bytes.extend_from_slice(&sector[8..]);
    crc32fast::hash(&bytes)
}

/// Makes the checksum of a bitmap sector right.
pub fn seal_sector(volume_uuid: Uuid, index: u64, sector: &mut [u8]) {
    let crc = sector_crc(volume_uuid, index, sector);
    sector[4..8].copy_from_slice(&crc.to_le_bytes());
}

/// An identity out of few, so that some are met again.
pub fn some_uuid(input: &mut Input<'_>) -> Uuid {
    Uuid::from_u128(u128::from(input.u8()))
}

/// A member's state.
pub fn some_state(input: &mut Input<'_>) -> MemberState {
    input.pick(&[MemberState::InSync, MemberState::Resyncing, MemberState::Stale, MemberState::Faulty])
}

/// A volume of at most `regions_max` regions.
pub fn some_regions(input: &mut Input<'_>, regions_max: u64) -> Regions {
    let region_bytes = 64 << 10 << (input.u8() % 11);
    let whole = input.below(regions_max);
    let volume_bytes = whole * region_bytes + 4096 * (1 + u64::from(input.u8()) % (region_bytes / 4096));
    assert!(volume_bytes <= VOLUME_BYTES_MAX && volume_bytes.div_ceil(region_bytes) <= regions_max);
    Regions { volume_bytes, region_bytes }
}

/// Bits of a map: a handful of single ones, or a run.
pub fn set_some(input: &mut Input<'_>, maps: &mut RegionMaps) {
    let regions = maps.regions();
    let map = input.index(1 + REPLICAS_MAX);
    let map = if map == 0 { &mut maps.intent } else { &mut maps.stale[map - 1] };
    let first = input.index(regions);
    let count = if input.one_in(4) { regions } else { 1 };
    let value = !input.one_in(4);
    map[first..regions.min(first + count)].fill(value);
}

/// A superblock that keeps every rule, from bytes.
pub fn some_superblock(input: &mut Input<'_>) -> Superblock {
    let regions = some_regions(input, 1 << 20);
    let mut name: String = input.text().chars().filter(|c| !c.is_control()).collect();
    while name.len() > NAME_BYTES_MAX {
        name.pop();
    }
    let slot = ReplicaSlot::new(input.index(REPLICAS_MAX));
    let mut members = [const { None }; REPLICAS_MAX];
    for (index, member) in members.iter_mut().enumerate() {
        if index == slot.index() || input.one_in(3) {
            // The slot in the lowest byte: no two are the same.
            let uuid = Uuid::from_u128(u128::from(input.u64()) << 8 | index as u128);
            let event_count = input.number(EVENT_COUNT_MAX).min(EVENT_COUNT_MAX);
            *member = Some(Member { uuid, state: some_state(input), event_count, path: input.text() });
        }
    }
    Superblock {
        volume_uuid: Uuid::from_u128(input.u128()),
        name,
        regions,
        created_unix_s: input.u64(),
        device_bytes: Layout::device_bytes_min(regions) + 4096 * u64::from(input.u8()),
        slot,
        event_count: input.number(EVENT_COUNT_MAX).clamp(1, EVENT_COUNT_MAX),
        generation: Uuid::from_u128(input.u128()),
        parents: (0..input.index(PARENTS_MAX + 2)).map(|_| some_uuid(input)).collect(),
        clean: input.one_in(2),
        written_unix_ns: input.u64(),
        members,
    }
}

/// The metadata of one replica; its data is not there.
#[derive(Clone)]
pub struct Stand {
    pub path: String,
    pub device_bytes: u64,
    pub slots: [Block; 2],
    /// Where the bitmap pages begin, and their bytes.
    pub pages_at: u64,
    pub pages: Vec<u8>,
    /// Blocks, counted from the end of the device, that cannot be read.
    pub unreadable: Vec<u64>,
}

impl Stand {
    /// A replica on which `superblock` stands in its slot, `before` in the other one, and `maps`.
    pub fn new(path: &str, superblock: &Superblock, before: &Superblock, maps: &RegionMaps) -> Self {
        let layout = Layout { regions: superblock.regions, device_bytes: superblock.device_bytes };
        let mut slots = [[0; SUPERBLOCK_BYTES]; 2];
        for superblock in [before, superblock] {
            slots[(superblock.event_count % 2) as usize] = superblock.encode();
        }
        let mut pages = vec![0; layout.page_count() as usize * SUPERBLOCK_BYTES];
        for (page, out) in pages.chunks_exact_mut(SUPERBLOCK_BYTES).enumerate() {
            encode_page(superblock.volume_uuid, page as u64, maps, out);
        }
        let pages_at = layout.page_offset(0).0;
        Self {
            path: path.to_owned(),
            device_bytes: superblock.device_bytes,
            slots,
            pages_at,
            pages,
            unreadable: vec![],
        }
    }

    /// What stands at a place: metadata, or zeroes.
    pub fn read_at(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        assert!(offset + out.len() as u64 <= self.device_bytes, "a read past the end of the device");
        for (block, out) in (offset / 4096..).zip(out.chunks_exact_mut(4096)) {
            let from_end = self.device_bytes / 4096 - block;
            if self.unreadable.contains(&from_end) {
                return Err(io::Error::other("a bad sector"));
            }
            let at = (block * 4096).wrapping_sub(self.pages_at) as usize;
            match from_end {
                1 | 2 => out.copy_from_slice(&self.slots[2 - from_end as usize]),
                _ if at < self.pages.len() => out.copy_from_slice(&self.pages[at..at + 4096]),
                _ => out.fill(0),
            }
        }
        Ok(())
    }

    /// As the daemon would find it.
    pub fn find(&self) -> Result<Option<Found>, ReadError> {
        read_found(&self.path, self.device_bytes, &mut |at: ReplicaOffset, out: &mut [u8]| {
            self.read_at(at.0, out)
        })
    }
}

/// The superblock of the commit before.
pub fn previous(superblock: &Superblock) -> Superblock {
    Superblock { event_count: superblock.event_count.saturating_sub(1), ..superblock.clone() }
}
