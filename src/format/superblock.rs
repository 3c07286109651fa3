//! The superblock: a volume's identity and its members' states, as one replica knows them.
//!
//! What must hold: the bytes are those of `docs/on-disk-format.md` (a golden-bytes test holds both together);
//! decoding never panics, and a value that was decoded is safe to calculate with: its geometry, counts, slot
//! and strings have been checked; and a torn superblock never becomes whole by a part of another one: every sector
//! of 512 bytes that can differ holds a *seal*, made of all the content.
//!
//! ```text
//!    0  magic, version, header length, CRC32, flags, three groups of feature flags
//!   48  volume uuid, geometry, times, event count, generation, slot, counts
//!  136  name (64)
//!  256  parents (32 x 16)
//!  768  member table (8 x 192): uuid, event count, state, seal, path
//! 2304  zero to the end at 4096
//! ```

use uuid::Uuid;

use super::cursor::{Reader, Writer};
use super::layout::Layout;
use crate::units::{
    BLOCK_BYTES, REGION_BYTES_MAX, REGION_BYTES_MIN, REPLICAS_MAX, Regions, ReplicaSlot, VOLUME_BYTES_MAX,
};

/// Bytes of a superblock.
pub const SUPERBLOCK_BYTES: usize = BLOCK_BYTES as usize;
/// The first eight bytes of every superblock, of every version.
pub const MAGIC: [u8; 8] = *b"NBDMIRR\0";
/// The format version that this program writes, and the newest it reads.
pub const VERSION: u32 = 1;
/// Compatible features that this program knows: one that does not know them may read and write, and clears
/// their bits when it writes.
pub const FEATURES_COMPATIBLE: u64 = 0;
/// Read-only compatible features that this program knows: one that does not know them may only read.
pub const FEATURES_READ_ONLY_COMPATIBLE: u64 = 0;
/// Incompatible features that this program knows: one that does not know them must leave the replica alone.
pub const FEATURES_INCOMPATIBLE: u64 = 0;
/// Event counts stop here, far from overflow; a superblock that claims more is damaged.
pub const EVENT_COUNT_MAX: u64 = u64::MAX / 2;

/// Longest volume name, bytes of UTF-8.
pub const NAME_BYTES_MAX: usize = 64;
/// Longest path kept for a member, bytes; longer ones keep their end.
pub const PATH_BYTES_MAX: usize = 160;
/// Generations kept as history.
pub const PARENTS_MAX: usize = 32;

/// What a superblock says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// The volume's identity.
    pub volume_uuid: Uuid,
    /// The volume's name; the export name.
    pub name: String,
    /// The volume's size and its regions' size.
    pub regions: Regions,
    /// Seconds since 1970 when the volume was created.
    pub created_unix_s: u64,
    /// Size of this replica's backing when this was written.
    pub device_bytes: u64,
    /// Which member this replica is.
    pub slot: ReplicaSlot,
    /// Grows by one at each metadata change.
    pub event_count: u64,
    /// Random; changes when the set of in-sync replicas shrinks.
    pub generation: Uuid,
    /// Earlier generations, newest first, at most `PARENTS_MAX`.
    pub parents: Vec<Uuid>,
    /// The volume was stopped in order: the in-sync replicas hold the same bytes, flushed.
    pub clean: bool,
    /// Nanoseconds since 1970 when this was written.
    pub written_unix_ns: u64,
    /// The member table.
    pub members: [Option<Member>; REPLICAS_MAX],
}

/// One member of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// The replica's identity.
    pub uuid: Uuid,
    /// Its state as recorded.
    pub state: MemberState,
    /// The event count of the last superblock commit that it took part in.
    pub event_count: u64,
    /// Path as last opened, for messages.
    pub path: String,
}

/// A member's recorded state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemberState {
    /// Has every acknowledged write.
    InSync,
    /// Was being brought up to date; its stale map says where.
    Resyncing,
    /// Missed writes and may come back by itself (it was not there).
    Stale,
    /// Gave errors or was failed by the operator.
    Faulty,
}

const CRC_AT: usize = 16;
const READ_ONLY_FEATURES_AT: usize = 32;
const PARENTS_AT: usize = 256;
const MEMBERS_AT: usize = 768;
const MEMBER_BYTES: usize = 192;
/// In each entry, also of a free slot.
const SEAL_AT: usize = 26;
const HEADER_BYTES: usize = MEMBERS_AT + REPLICAS_MAX * MEMBER_BYTES;
const FLAG_CLEAN: u32 = 1;

const _: () = assert!(PARENTS_AT + PARENTS_MAX * 16 <= MEMBERS_AT);
const _: () = assert!(HEADER_BYTES <= SUPERBLOCK_BYTES);
const _: () = assert!(32 + PATH_BYTES_MAX == MEMBER_BYTES);
const _: () = assert!(NAME_BYTES_MAX <= PATH_BYTES_MAX && PATH_BYTES_MAX <= u8::MAX as usize);

/// Why bytes are no superblock that this program can use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// No magic: nothing of ours stands here.
    #[error("no superblock")]
    Blank,
    /// The magic is there, the rest is torn, rotten or makes no sense.
    #[error("damaged superblock ({0})")]
    Damaged(&'static str),
    /// Written by a later version of this program.
    #[error("format version {found}, and this nbdmirror knows versions up to {supported}: use a newer one")]
    NewerVersion {
        /// The version that it says.
        found: u32,
        /// The newest version that this program reads.
        supported: u32,
    },
    /// Uses incompatible features that this program does not know.
    #[error("unknown features ({incompatible:#x}): use a newer nbdmirror")]
    UnknownFeatures {
        /// The unknown bits of the incompatible group.
        incompatible: u64,
    },
}

impl Superblock {
    /// The bytes for a superblock slot. Of a member's path longer than `PATH_BYTES_MAX` the end is kept, of
    /// more than `PARENTS_MAX` parents the newest.
    ///
    /// # Panics
    /// Where the name is longer than `NAME_BYTES_MAX` (checked when a volume is created).
    #[must_use]
    pub fn encode(&self) -> [u8; SUPERBLOCK_BYTES] {
        assert!(self.name.len() <= NAME_BYTES_MAX);
        let parents = &self.parents[..self.parents.len().min(PARENTS_MAX)];
        let mut bytes = [0; SUPERBLOCK_BYTES];
        let mut to = Writer::new(&mut bytes);
        to.bytes(&MAGIC);
        to.u32(VERSION);
        to.u32(HEADER_BYTES as u32);
        to.u32(0); // the CRC, at the end
        to.u32(if self.clean { FLAG_CLEAN } else { 0 });
        to.u64(FEATURES_COMPATIBLE);
        to.u64(FEATURES_READ_ONLY_COMPATIBLE);
        to.u64(FEATURES_INCOMPATIBLE);
        to.uuid(self.volume_uuid);
        to.u64(self.regions.volume_bytes);
        to.u64(self.regions.region_bytes);
        to.u64(self.created_unix_s);
        to.u64(self.device_bytes);
        to.u64(self.event_count);
        to.u64(self.written_unix_ns);
        to.uuid(self.generation);
        to.u8(self.slot.index() as u8);
        to.u8(parents.len() as u8);
        to.u8(self.name.len() as u8);
        to.seek(to.at() + 5);
        to.bytes(self.name.as_bytes());
        to.seek(PARENTS_AT);
        for parent in parents {
            to.uuid(*parent);
        }
        for (slot, member) in self.members.iter().enumerate() {
            to.seek(MEMBERS_AT + slot * MEMBER_BYTES);
            if let Some(member) = member {
                member.encode(&mut to);
            }
        }
        seal(&mut bytes);
        let crc = checksum(&bytes);
        bytes[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads a superblock slot's 4096 bytes.
    ///
    /// # Errors
    /// See [`DecodeError`]. Magic, version, header length, CRC and feature flags stand at the same place in all
    /// versions, so rot is told from a newer version. Unknown *read-only compatible* features are no error
    /// here: see [`Superblock::unknown_read_only_features`].
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let Ok(bytes) = <&[u8; SUPERBLOCK_BYTES]>::try_from(bytes) else {
            return Err(DecodeError::Damaged("not 4096 bytes"));
        };
        let mut from = Reader::new(bytes);
        if from.bytes(MAGIC.len()) != MAGIC {
            return Err(DecodeError::Blank);
        }
        let version = from.u32();
        let header_bytes = from.u32();
        if from.u32() != checksum(bytes) {
            return Err(DecodeError::Damaged("wrong checksum"));
        }
        if version > VERSION {
            return Err(DecodeError::NewerVersion { found: version, supported: VERSION });
        }
        let flags = from.u32();
        let (_compatible, _read_only_compatible, incompatible) = (from.u64(), from.u64(), from.u64());
        if incompatible & !FEATURES_INCOMPATIBLE != 0 {
            return Err(DecodeError::UnknownFeatures { incompatible: incompatible & !FEATURES_INCOMPATIBLE });
        }
        check(version == VERSION, "version 0")?;
        check((HEADER_BYTES..=SUPERBLOCK_BYTES).contains(&(header_bytes as usize)), "header length")?;
        Self::decode_fields(&mut from, flags & FLAG_CLEAN != 0)
    }

    /// The read-only compatible features in a superblock's bytes that this program does not know. Where it is
    /// not 0 the replica may be read and must not be written. Only meaningful for bytes that decode.
    #[must_use]
    pub fn unknown_read_only_features(bytes: &[u8; SUPERBLOCK_BYTES]) -> u64 {
        let mut from = Reader::new(bytes);
        from.seek(READ_ONLY_FEATURES_AT);
        from.u64() & !FEATURES_READ_ONLY_COMPATIBLE
    }

    /// This replica's own entry in its member table; `None` only in values that were not decoded.
    #[must_use]
    pub fn own_entry(&self) -> Option<&Member> {
        self.members[self.slot.index()].as_ref()
    }

    /// The members with their slots, in slot order.
    pub fn members(&self) -> impl Iterator<Item = (ReplicaSlot, &Member)> {
        ReplicaSlot::all().zip(&self.members).filter_map(|(slot, member)| Some((slot, member.as_ref()?)))
    }

    fn decode_fields(from: &mut Reader<'_>, clean: bool) -> Result<Self, DecodeError> {
        let volume_uuid = from.uuid();
        let regions = Regions { volume_bytes: from.u64(), region_bytes: from.u64() };
        let created_unix_s = from.u64();
        let device_bytes = from.u64();
        check_geometry(regions, device_bytes)?;
        let event_count = from.u64();
        check((1..=EVENT_COUNT_MAX).contains(&event_count), "event count")?;
        let written_unix_ns = from.u64();
        let generation = from.uuid();
        let slot = usize::from(from.u8());
        check(slot < REPLICAS_MAX, "slot number")?;
        let parent_count = usize::from(from.u8());
        check(parent_count <= PARENTS_MAX, "number of parents")?;
        let name_bytes = usize::from(from.u8());
        check(name_bytes <= NAME_BYTES_MAX, "length of the name")?;
        from.bytes(5);
        let name = text(from.bytes(name_bytes), "name")?;
        // It is printed on terminals and in replies to clients.
        check(!name.chars().any(char::is_control), "name")?;
        from.seek(PARENTS_AT);
        let parents = (0..parent_count).map(|_| from.uuid()).collect();
        let mut members = [const { None }; REPLICAS_MAX];
        for (index, member) in members.iter_mut().enumerate() {
            from.seek(MEMBERS_AT + index * MEMBER_BYTES);
            *member = Member::decode(from)?;
        }
        check(members[slot].is_some(), "it is not in its own member table")?;
        check_distinct(&members)?;
        Ok(Self {
            volume_uuid,
            name,
            regions,
            created_unix_s,
            device_bytes,
            slot: ReplicaSlot::new(slot),
            event_count,
            generation,
            parents,
            clean,
            written_unix_ns,
            members,
        })
    }
}

impl Member {
    fn encode(&self, to: &mut Writer<'_>) {
        let path = path_end(&self.path);
        to.uuid(self.uuid);
        to.u64(self.event_count);
        to.u8(self.state.code());
        to.u8(path.len() as u8);
        to.seek(to.at() + 6); // the seal, at the end
        to.bytes(path.as_bytes());
    }

    fn decode(from: &mut Reader<'_>) -> Result<Option<Self>, DecodeError> {
        let uuid = from.uuid();
        let event_count = from.u64();
        let state = from.u8();
        let path_bytes = usize::from(from.u8());
        if state == 0 {
            return Ok(None);
        }
        let Some(state) = MemberState::from_code(state) else {
            return Err(DecodeError::Damaged("a member's state"));
        };
        check(event_count <= EVENT_COUNT_MAX, "a member's event count")?;
        check(path_bytes <= PATH_BYTES_MAX, "length of a member's path")?;
        from.bytes(6); // the checksum covers the seal
        let path = text(from.bytes(path_bytes), "a member's path")?;
        Ok(Some(Self { uuid, state, event_count, path }))
    }
}

impl MemberState {
    /// On disk; 0 is a free slot.
    fn code(self) -> u8 {
        match self {
            Self::InSync => 1,
            Self::Resyncing => 2,
            Self::Stale => 3,
            Self::Faulty => 4,
        }
    }

    fn from_code(code: u8) -> Option<Self> {
        [Self::InSync, Self::Resyncing, Self::Stale, Self::Faulty].into_iter().find(|s| s.code() == code)
    }
}

/// Binds the sectors of a superblock to each other, so that the checksum tells them from those of another commit even where
/// both say the same. Without, a torn superblock waits for any later write that brings the sectors it lacks.
///
/// Called while the CRC field and all seals are zero.
fn seal(bytes: &mut [u8; SUPERBLOCK_BYTES]) {
    let seal = crc32fast::hash(bytes).to_le_bytes();
    for slot in 0..REPLICAS_MAX {
        let at = MEMBERS_AT + slot * MEMBER_BYTES + SEAL_AT;
        bytes[at..at + seal.len()].copy_from_slice(&seal);
    }
}

/// CRC32 of all bytes with the CRC field taken as zero.
fn checksum(bytes: &[u8; SUPERBLOCK_BYTES]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&bytes[..CRC_AT]);
    crc.update(&[0; 4]);
    crc.update(&bytes[CRC_AT + 4..]);
    crc.finalize()
}

/// The end of `path` that fits, cut between characters.
fn path_end(path: &str) -> &str {
    let cut = path.len().saturating_sub(PATH_BYTES_MAX);
    let cut = (cut..=path.len()).find(|at| path.is_char_boundary(*at)).unwrap_or(path.len());
    &path[cut..]
}

fn check(holds: bool, what: &'static str) -> Result<(), DecodeError> {
    if holds { Ok(()) } else { Err(DecodeError::Damaged(what)) }
}

fn text(bytes: &[u8], what: &'static str) -> Result<String, DecodeError> {
    match std::str::from_utf8(bytes) {
        Ok(text) => Ok(text.to_owned()),
        Err(_) => Err(DecodeError::Damaged(what)),
    }
}

/// Checked before anything is calculated from it: sizes in range make all of `Layout` safe from overflow.
fn check_geometry(regions: Regions, device_bytes: u64) -> Result<(), DecodeError> {
    let Regions { volume_bytes, region_bytes } = regions;
    check(region_bytes.is_power_of_two(), "region size")?;
    check((REGION_BYTES_MIN..=REGION_BYTES_MAX).contains(&region_bytes), "region size")?;
    check((BLOCK_BYTES..=VOLUME_BYTES_MAX).contains(&volume_bytes), "volume size")?;
    check(volume_bytes.is_multiple_of(BLOCK_BYTES), "volume size")?;
    check(device_bytes.is_multiple_of(BLOCK_BYTES), "device size")?;
    check(device_bytes >= Layout::device_bytes_min(regions), "device size")
}

fn check_distinct(members: &[Option<Member>; REPLICAS_MAX]) -> Result<(), DecodeError> {
    let mut uuids: Vec<Uuid> = members.iter().flatten().map(|member| member.uuid).collect();
    uuids.sort_unstable();
    check(uuids.windows(2).all(|pair| pair[0] != pair[1]), "two members with one identity")
}
