//! Reading one replica's metadata: two superblock slots, then all bitmap pages.
//!
//! What must hold: where the magic stands in either slot, what cannot be trusted is an error or a damaged slot, never "no
//! volume here" (without it in both there is none); damaged bitmap sectors read as all bits set.

use std::io;
use std::ops::Range;

use super::assemble::Found;
use super::bitmap::{RegionMaps, decode_page_sectors, sector_regions, set_page};
use super::layout::{Layout, SUPERBLOCK_SLOTS, superblock_offset};
use super::superblock::{DecodeError, SUPERBLOCK_BYTES, Superblock};
use crate::units::{BLOCK_BYTES, ReplicaOffset};

/// Bitmap pages are read in pieces of at most this, bytes.
pub const READ_BYTES_MAX: u64 = 1 << 20;

/// Why a replica's metadata cannot be used. The text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// It could not be read.
    #[error("{path}: cannot read the {what}: {error}; check the device")]
    Io {
        /// Which replica.
        path: String,
        /// What was read.
        what: &'static str,
        /// What the system said.
        error: io::Error,
    },
    /// Neither superblock slot is usable and at least one held a superblock.
    #[error(
        "{path}: both superblocks are damaged (slot 0: {slot_0}; slot 1: {slot_1}); its data stands untouched \
         at the start of the device. Serve the other replicas with --degraded and give it back with `add \
         --force` (a full copy), or, if there is no other, copy the data off it first"
    )]
    Damaged {
        /// Which replica.
        path: String,
        /// What is wrong with slot 0.
        slot_0: String,
        /// What is wrong with slot 1.
        slot_1: String,
    },
    /// Made by a newer nbdmirror.
    #[error("{path}: {error}")]
    Newer {
        /// Which replica.
        path: String,
        /// `NewerVersion` or `UnknownFeatures`.
        error: DecodeError,
    },
    /// The superblock was written when the device had another size.
    #[error(
        "{path}: it has {device_bytes} bytes and was a replica when it had {recorded_bytes}; give it its old size \
         back, or give it to the volume as a new replica with `add --force` (a full copy)"
    )]
    SizeChanged {
        /// Which replica.
        path: String,
        /// Its size now.
        device_bytes: u64,
        /// The size that its superblock records.
        recorded_bytes: u64,
    },
    /// The two slots belong to different volumes, or to histories that do not fit together.
    #[error(
        "{path}: its two superblocks contradict each other ({older} / {newer}); an interrupted `create` or `add` \
         leaves this behind. Repeat that command with --force if nothing on this device is needed"
    )]
    Mixed {
        /// Which replica.
        path: String,
        /// One superblock, described.
        older: String,
        /// The other, described.
        newer: String,
    },
}

type ReadAt<'a> = &'a mut dyn FnMut(ReplicaOffset, &mut [u8]) -> io::Result<()>;

/// What a superblock slot holds.
enum Slot {
    Valid(Box<Superblock>, u64),
    /// Zeroes: never written, or wiped.
    Blank,
    /// No magic: never ours, or a superblock whose first bytes have rotted.
    Foreign,
    Damaged(String),
    Unreadable(io::Error),
}

/// Reads the metadata of the backing at `path` (for messages), which has `device_bytes` (rounded down to 4096).
/// `read_at` fills a whole buffer or fails. `Ok(None)`: it holds no volume.
///
/// # Errors
/// See [`ReadError`]. One unusable slot or a bad sector among the bitmaps is not an error: see
/// [`Found::damaged_slot`] and [`Found::damaged_sectors`].
pub fn read_found(
    path: &str,
    device_bytes: u64,
    read_at: &mut dyn FnMut(ReplicaOffset, &mut [u8]) -> io::Result<()>,
) -> Result<Option<Found>, ReadError> {
    let device_bytes = device_bytes / BLOCK_BYTES * BLOCK_BYTES;
    if device_bytes < SUPERBLOCK_SLOTS * BLOCK_BYTES {
        return Ok(None);
    }
    let slots = [read_slot(path, device_bytes, 0, read_at)?, read_slot(path, device_bytes, 1, read_at)?];
    let Some(Chosen { superblock, read_only_features, damaged_slot, newer_may_be_lost }) =
        choose(path, slots)?
    else {
        return Ok(None);
    };
    if superblock.device_bytes != device_bytes {
        return Err(ReadError::SizeChanged {
            path: path.to_owned(),
            device_bytes,
            recorded_bytes: superblock.device_bytes,
        });
    }
    let (maps, damaged_regions, damaged_sectors) = read_maps(path, &superblock, read_at)?;
    Ok(Some(Found {
        path: path.to_owned(),
        device_bytes,
        superblock,
        damaged_slot,
        newer_may_be_lost,
        maps,
        damaged_sectors,
        damaged_regions,
        read_only_features,
    }))
}

fn read_slot(path: &str, device_bytes: u64, slot: u64, read_at: ReadAt<'_>) -> Result<Slot, ReadError> {
    let mut bytes = [0; SUPERBLOCK_BYTES];
    if let Err(error) = read_at(superblock_offset(device_bytes, slot), &mut bytes) {
        return Ok(Slot::Unreadable(error));
    }
    match Superblock::decode(&bytes) {
        Ok(superblock) if superblock.event_count % SUPERBLOCK_SLOTS != slot => {
            Ok(Slot::Damaged("it belongs into the other slot".to_owned()))
        }
        Ok(superblock) => {
            Ok(Slot::Valid(Box::new(superblock), Superblock::unknown_read_only_features(&bytes)))
        }
        Err(DecodeError::Blank) if bytes == [0; SUPERBLOCK_BYTES] => Ok(Slot::Blank),
        Err(DecodeError::Blank) => Ok(Slot::Foreign),
        Err(error @ DecodeError::Damaged(_)) => Ok(Slot::Damaged(error.to_string())),
        // Whatever the other slot holds: the newer program may have changed anything else here.
        Err(error @ (DecodeError::NewerVersion { .. } | DecodeError::UnknownFeatures { .. })) => {
            Err(ReadError::Newer { path: path.to_owned(), error })
        }
    }
}

/// The superblock to use.
struct Chosen {
    superblock: Superblock,
    read_only_features: u64,
    /// See [`Found`].
    damaged_slot: Option<u64>,
    newer_may_be_lost: bool,
}

impl Chosen {
    /// The only valid one, whose slot is not `other_slot`, where `other` stands.
    fn alone(superblock: Superblock, read_only_features: u64, other_slot: u64, other: &Slot) -> Self {
        let newer_may_be_lost = !matches!(other, Slot::Blank);
        Self { superblock, read_only_features, damaged_slot: Some(other_slot), newer_may_be_lost }
    }
}

/// The superblock to use; `None`: no volume.
fn choose(path: &str, slots: [Slot; 2]) -> Result<Option<Chosen>, ReadError> {
    match slots {
        [Slot::Blank | Slot::Foreign, Slot::Blank | Slot::Foreign] => Ok(None),
        [Slot::Valid(first, first_features), Slot::Valid(second, second_features)] => {
            // The slots of one replica have event counts of different parity: never equal.
            let (newer, newer_slot, older) =
                if first.event_count > second.event_count { (first, 0, second) } else { (second, 1, first) };
            let damaged_slot = compare(path, &older, &newer)?.then_some(1 - newer_slot);
            // Whatever is wrong with the older one: a newer one would stand in its place.
            let read_only_features = first_features | second_features;
            Ok(Some(Chosen {
                superblock: *newer,
                read_only_features,
                damaged_slot,
                newer_may_be_lost: false,
            }))
        }
        // Blank in good order: of a replica that was added, until the second commit. `create` writes both slots.
        [Slot::Valid(superblock, features), other] => {
            Ok(Some(Chosen::alone(*superblock, features, 1, &other)))
        }
        [other, Slot::Valid(superblock, features)] => {
            Ok(Some(Chosen::alone(*superblock, features, 0, &other)))
        }
        [Slot::Unreadable(error), _] | [_, Slot::Unreadable(error)] => {
            Err(ReadError::Io { path: path.to_owned(), what: "superblocks", error })
        }
        [first, second] => Err(ReadError::Damaged {
            path: path.to_owned(),
            slot_0: first.fault().to_owned(),
            slot_1: second.fault().to_owned(),
        }),
    }
}

impl Slot {
    fn fault(&self) -> &str {
        match self {
            Self::Damaged(fault) => fault,
            Self::Blank => "blank",
            Self::Foreign => "no superblock",
            Self::Valid(..) | Self::Unreadable(_) => "unusable",
        }
    }
}

/// Whether the older slot is only a leftover: of an earlier membership of this device in the same volume, with
/// another slot or identity, whose history the newer one carries on. Then the newer one stands alone.
fn compare(path: &str, older: &Superblock, newer: &Superblock) -> Result<bool, ReadError> {
    let one_history = older.volume_uuid == newer.volume_uuid
        && older.regions == newer.regions
        && older.device_bytes == newer.device_bytes
        && (older.generation == newer.generation || newer.parents.contains(&older.generation));
    if !one_history {
        let side = |superblock: &Superblock| {
            format!(
                "volume {:?}, {}, generation {}, event count {}",
                superblock.name, superblock.volume_uuid, superblock.generation, superblock.event_count
            )
        };
        return Err(ReadError::Mixed { path: path.to_owned(), older: side(older), newer: side(newer) });
    }
    let identity = |superblock: &Superblock| superblock.own_entry().map(|member| member.uuid);
    Ok(older.slot != newer.slot || identity(older) != identity(newer))
}

/// The maps, the regions of damaged sectors, and the number of damaged sectors.
fn read_maps(
    path: &str,
    superblock: &Superblock,
    read_at: ReadAt<'_>,
) -> Result<(RegionMaps, Vec<Range<usize>>, u64), ReadError> {
    let layout = Layout { regions: superblock.regions, device_bytes: superblock.device_bytes };
    let regions = superblock.regions.count() as usize;
    let mut maps = RegionMaps::clear(regions);
    let mut damaged = Vec::new();
    let mut damaged_sectors = 0;
    let mut readable = false;
    let mut last_error = None;
    let mut buffer = vec![0; (layout.page_count() * BLOCK_BYTES).min(READ_BYTES_MAX) as usize];
    let pages_per_read = READ_BYTES_MAX / BLOCK_BYTES;
    for first in (0..layout.page_count()).step_by(pages_per_read as usize) {
        let pages = first..(first + pages_per_read).min(layout.page_count());
        let chunk = &mut buffer[..((pages.end - pages.start) * BLOCK_BYTES) as usize];
        let whole = read_at(layout.page_offset(first), chunk).is_ok();
        for (page, bytes) in pages.zip(chunk.chunks_exact_mut(BLOCK_BYTES as usize)) {
            // After a failed read each page is tried alone: a bad sector costs its page and no more.
            let read = if whole { Ok(()) } else { read_at(layout.page_offset(page), bytes) };
            let sectors = match read {
                Ok(()) => {
                    readable = true;
                    decode_page_sectors(superblock.volume_uuid, page, bytes, &mut maps)
                }
                Err(error) => {
                    last_error = Some(error);
                    set_page(page, &mut maps)
                }
            };
            damaged_sectors += u64::from(sectors.count_ones());
            note_damage(page, sectors, regions, &mut damaged);
        }
    }
    match last_error {
        // Not a bad sector: the device is gone.
        Some(error) if !readable => Err(ReadError::Io { path: path.to_owned(), what: "bitmaps", error }),
        _ => Ok((maps, damaged, damaged_sectors)),
    }
}

fn note_damage(page: u64, sectors: u8, regions: usize, damaged: &mut Vec<Range<usize>>) {
    for sector in (0..8).filter(|sector| sectors & (1 << sector) != 0) {
        let range = sector_regions(page, sector, regions);
        match damaged.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => damaged.push(range),
        }
    }
}
