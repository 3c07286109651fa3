//! A new volume: the superblocks of its replicas, and the writes that put them there.
//!
//! What must hold: bitmap pages come before the superblocks, so that an interrupted `create` never leaves a
//! superblock whose bitmaps are another volume's; both slots are written (event counts 1 and 2).

use uuid::Uuid;

use super::bitmap::{Bitmap, RegionMaps, encode_page};
use super::layout::Layout;
use super::superblock::{Member, MemberState, NAME_BYTES_MAX, Superblock};
use crate::units::{
    BLOCK_BYTES, REGION_BYTES_MAX, REGION_BYTES_MIN, REPLICAS_MAX, Regions, ReplicaOffset, ReplicaSlot,
    SECOND_NS, VOLUME_BYTES_MAX,
};

/// The event count of a volume just created; the one before stands in the other slot.
pub const FIRST_EVENT_COUNT: u64 = 2;
/// Bitmap pages are written in pieces of at most this, bytes.
pub const WRITE_BYTES_MAX: u64 = 1 << 20;

/// What a new volume is to be. The caller has the clock and the randomness.
#[derive(Clone, Debug)]
pub struct NewVolume {
    /// Its name, 1 to `NAME_BYTES_MAX` bytes without control characters.
    pub name: String,
    /// Its size, a multiple of 4096, and its regions' size.
    pub regions: Regions,
    /// Nanoseconds since 1970.
    pub now_unix_ns: u64,
    /// A random identity for the volume.
    pub volume_uuid: Uuid,
    /// A random first generation.
    pub generation: Uuid,
    /// One to eight replicas; their order gives their slots.
    pub replicas: Vec<NewReplica>,
    /// All replicas read the same already (all blank, or the operator says so). Otherwise the first one's
    /// content is the volume's and is copied to the others.
    pub in_sync: bool,
}

/// One replica of a new volume.
#[derive(Clone, Debug)]
pub struct NewReplica {
    /// A random identity.
    pub uuid: Uuid,
    /// Its path.
    pub path: String,
    /// Its size, bytes, a multiple of 4096.
    pub device_bytes: u64,
}

/// Why a volume cannot be created so.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CreateError {
    /// The name is empty, too long or not printable.
    #[error("the name {0:?} must have 1 to 64 bytes and no control characters; choose another with --name")]
    Name(String),
    /// The volume's size is out of range or no multiple of 4096.
    #[error("a size of {0} bytes: it must be a multiple of 4096, from 4096 bytes to 64 TiB")]
    VolumeBytes(u64),
    /// The region size is out of range or no power of two.
    #[error("a region size of {0} bytes: it must be a power of two from 64K to 64M")]
    RegionBytes(u64),
    /// None or too many.
    #[error("{0} replicas: a volume has one to eight")]
    Replicas(usize),
    /// A replica does not hold data and metadata.
    #[error("{path}: {device_bytes} bytes are too few; this volume needs {needed_bytes} on each replica")]
    TooSmall {
        /// Which.
        path: String,
        /// Its size.
        device_bytes: u64,
        /// The size that data and metadata need.
        needed_bytes: u64,
    },
}

/// A new volume's metadata.
#[derive(Clone, Debug)]
pub struct Created {
    /// One for each replica, in slot order.
    pub superblocks: Vec<Superblock>,
    /// The maps, the same on every replica.
    pub maps: RegionMaps,
}

/// The metadata of a new volume.
///
/// # Errors
/// Where a value is out of range: see [`CreateError`].
pub fn new_volume(params: NewVolume) -> Result<Created, CreateError> {
    params.check()?;
    let regions = params.regions.count() as usize;
    let mut maps = RegionMaps::clear(regions);
    let mut members = [const { None }; REPLICAS_MAX];
    for (slot, replica) in params.replicas.iter().enumerate() {
        let in_sync = params.in_sync || slot == 0;
        if !in_sync {
            maps.stale[slot] = Bitmap::repeat(true, regions);
        }
        members[slot] = Some(Member {
            uuid: replica.uuid,
            state: if in_sync { MemberState::InSync } else { MemberState::Stale },
            event_count: FIRST_EVENT_COUNT,
            path: replica.path.clone(),
        });
    }
    let superblock_of = |(slot, replica): (usize, &NewReplica)| Superblock {
        volume_uuid: params.volume_uuid,
        name: params.name.clone(),
        regions: params.regions,
        created_unix_s: params.now_unix_ns / SECOND_NS,
        device_bytes: replica.device_bytes,
        slot: ReplicaSlot::new(slot),
        event_count: FIRST_EVENT_COUNT,
        generation: params.generation,
        parents: Vec::new(),
        clean: true,
        written_unix_ns: params.now_unix_ns,
        members: members.clone(),
    };
    let superblocks = params.replicas.iter().enumerate().map(superblock_of).collect();
    Ok(Created { superblocks, maps })
}

impl Created {
    /// Every write that replica `index` needs, in order, each at most 1 MiB: bitmap pages, then superblock slot 1
    /// (event count 1), then slot 0 (event count 2). One flush after the last is enough: a page that did not get
    /// there is blank or another volume's, and reads as all bits set.
    pub fn writes(&self, index: usize) -> impl Iterator<Item = (ReplicaOffset, Vec<u8>)> + '_ {
        let newest = &self.superblocks[index];
        let layout = Layout { regions: newest.regions, device_bytes: newest.device_bytes };
        let first = previous(newest);
        page_writes(layout, newest.volume_uuid, &self.maps).chain(
            [(1, first), (0, newest.clone())].map(move |(slot, superblock)| {
                (layout.superblock_offset(slot), superblock.encode().to_vec())
            }),
        )
    }
}

/// Writes of all bitmap pages of `maps`, in order, each at most 1 MiB.
pub fn page_writes(
    layout: Layout,
    volume_uuid: Uuid,
    maps: &RegionMaps,
) -> impl Iterator<Item = (ReplicaOffset, Vec<u8>)> + '_ {
    let pages_per_write = WRITE_BYTES_MAX / BLOCK_BYTES;
    (0..layout.page_count()).step_by(pages_per_write as usize).map(move |first| {
        let pages = first..(first + pages_per_write).min(layout.page_count());
        let mut bytes = vec![0; ((pages.end - pages.start) * BLOCK_BYTES) as usize];
        for (page, out) in pages.zip(bytes.chunks_exact_mut(BLOCK_BYTES as usize)) {
            encode_page(volume_uuid, page, maps, out);
        }
        (layout.page_offset(first), bytes)
    })
}

/// The superblock before the first one that counts: only there so that no slot is blank.
fn previous(superblock: &Superblock) -> Superblock {
    let mut previous = superblock.clone();
    previous.event_count -= 1;
    for member in previous.members.iter_mut().flatten() {
        member.event_count -= 1;
    }
    previous
}

impl NewVolume {
    fn check(&self) -> Result<(), CreateError> {
        let Regions { volume_bytes, region_bytes } = self.regions;
        if !(1..=NAME_BYTES_MAX).contains(&self.name.len()) || self.name.chars().any(char::is_control) {
            return Err(CreateError::Name(self.name.clone()));
        }
        let region_fits = (REGION_BYTES_MIN..=REGION_BYTES_MAX).contains(&region_bytes);
        if !region_bytes.is_power_of_two() || !region_fits {
            return Err(CreateError::RegionBytes(region_bytes));
        }
        let volume_fits = (BLOCK_BYTES..=VOLUME_BYTES_MAX).contains(&volume_bytes);
        if !volume_bytes.is_multiple_of(BLOCK_BYTES) || !volume_fits {
            return Err(CreateError::VolumeBytes(volume_bytes));
        }
        if !(1..=REPLICAS_MAX).contains(&self.replicas.len()) {
            return Err(CreateError::Replicas(self.replicas.len()));
        }
        let needed_bytes = Layout::device_bytes_min(self.regions);
        for replica in &self.replicas {
            assert!(replica.device_bytes.is_multiple_of(BLOCK_BYTES));
            if replica.device_bytes < needed_bytes {
                let (path, device_bytes) = (replica.path.clone(), replica.device_bytes);
                return Err(CreateError::TooSmall { path, device_bytes, needed_bytes });
            }
        }
        Ok(())
    }
}
