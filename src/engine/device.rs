//! One replica's file or block device: opened, locked, measured; and plain synchronous access to it.
//!
//! What must hold: an open device is locked against other nbdmirror processes until it is dropped (exclusively for
//! `ReadWrite`, shared for `ReadOnly`), and against mounts where it is a block device opened `ReadWrite`.
//! The synchronous calls take any alignment; the ring's operations (see `device_ops`) keep `traits.io_align`.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::device_probe as probe;
use crate::buffer::BufferPool;
use crate::mirror::event::DeviceTraits;
use crate::units::{BLOCK_BYTES, ByteRange, ReplicaOffset};

/// Bytes moved at a time by the synchronous calls.
const CHUNK_BYTES: u64 = 1 << 20;
/// How long to wait for a lock. A daemon that was killed holds its locks until the kernel has finished the writes that
/// it had in flight (waiting for them is right: they may still reach the disk), and udev looks into block devices under a
/// shared lock for a moment.
const LOCK_TRIES: u32 = 100;
const LOCK_RETRY: Duration = Duration::from_millis(20);

/// What a device is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Serve it, or write metadata to it. Nobody else may have it.
    ReadWrite,
    /// Look at it; others may look as well.
    ReadOnly,
}

/// What a replica stands on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceKind {
    /// A regular file.
    File,
    /// A block device.
    BlockDevice,
}

/// Names the thing behind a path: the same through every link to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DeviceIdentity {
    /// A regular file: its filesystem's device number and its inode.
    File(u64, u64),
    /// A block device: its device number.
    BlockDevice(u64),
}

/// Why a device could not be opened. The text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum DeviceOpenError {
    /// Nothing has that name.
    #[error("{path}: there is no such file or device. Check the path, and that the disk is there")]
    NotFound {
        /// Its path.
        path: String,
    },
    /// A directory, a socket, a character device.
    #[error("{path} is {what}, not a regular file or a block device. Give the path of one of those")]
    WrongKind {
        /// Its path.
        path: String,
        /// What it is.
        what: &'static str,
    },
    /// No permission.
    #[error(
        "{path}: permission denied. Run as a user who may {verb} it (for block devices often a member of group `disk`, or root)"
    )]
    Permission {
        /// Its path.
        path: String,
        /// What was wanted.
        verb: &'static str,
    },
    /// On a read-only filesystem or a write-protected disk.
    #[error(
        "{path} is read-only. Remount its filesystem (or unprotect the disk) for writing, or serve with --read-only"
    )]
    ReadOnly {
        /// Its path.
        path: String,
    },
    /// Locked.
    #[error(
        "{path} is in use: another nbdmirror has it open, or it was named twice. Stop the other one (`nbdmirror stop`), or name each replica once"
    )]
    Locked {
        /// Its path.
        path: String,
    },
    /// Mounted, or part of something else.
    #[error(
        "{path} is in use (mounted, swap, LVM, md, or held by a program such as another nbdmirror). Free it first; `lsblk` and `fuser` show by whom"
    )]
    InUse {
        /// Its path.
        path: String,
    },
    /// Anything else.
    #[error("{path}: cannot {doing}: {source}")]
    Io {
        /// Its path.
        path: String,
        /// What failed.
        doing: &'static str,
        /// The system's error.
        source: io::Error,
    },
}

/// An open replica.
#[derive(Debug)]
pub struct ReplicaDevice {
    /// Path as given.
    pub path: PathBuf,
    /// What it can do.
    pub traits: DeviceTraits,
    /// Whether the page cache is passed by (`O_DIRECT`).
    pub direct: bool,
    /// File or block device.
    pub kind: DeviceKind,
    /// It stands in memory (tmpfs): small operations are done at once, see `device_ops`.
    pub(super) in_memory: bool,
    /// A write with `RWF_DSYNC` is durable when it ends, see `device_probe`.
    pub(super) keeps_dsync: bool,
    identity: DeviceIdentity,
    file: Arc<File>,
}

impl ReplicaDevice {
    /// Opens and locks the device at `path` and finds out what it can do. Changes nothing on it.
    ///
    /// # Errors
    /// See [`DeviceOpenError`].
    pub fn open(path: &Path, access: Access) -> Result<Self, DeviceOpenError> {
        let shown = path.display().to_string();
        let fail = |doing: &'static str, source| DeviceOpenError::Io { path: shown.clone(), doing, source };
        // Asked before opening: to open a FIFO or a tape may wait or act.
        let before = std::fs::metadata(path).map_err(|error| open_error(&shown, access, error))?;
        let kind =
            kind_of(&before).map_err(|what| DeviceOpenError::WrongKind { path: shown.clone(), what })?;
        let mut flags = libc::O_NOCTTY | libc::O_NONBLOCK;
        if kind == DeviceKind::BlockDevice && access == Access::ReadWrite {
            flags |= libc::O_EXCL;
        }
        let file = open_waiting(path, access, flags).map_err(|error| open_error(&shown, access, error))?;
        let metadata = file.metadata().map_err(|e| fail("look at it", e))?;
        if kind_of(&metadata) != Ok(kind) {
            return Err(fail("open it", io::Error::other("it was replaced while being opened")));
        }
        lock(&file, access, &shown)?;
        let bytes = probe::size_bytes(&file, kind).map_err(|e| fail("find its size", e))?;
        let device_bytes = bytes & !(BLOCK_BYTES - 1);
        let io_align = probe::enable_direct(&file, kind, device_bytes).map_err(|e| fail("read it", e))?;
        let cheap_zero = access == Access::ReadWrite && probe::cheap_zero(&file, kind, bytes);
        let cheap_allocated_zero = access == Access::ReadWrite && probe::cheap_allocated_zero(&file, kind);
        Ok(Self {
            path: path.to_path_buf(),
            traits: DeviceTraits {
                device_bytes,
                io_align: io_align.unwrap_or(1),
                cheap_zero,
                cheap_allocated_zero,
            },
            direct: io_align.is_some(),
            kind,
            in_memory: kind == DeviceKind::File && probe::is_tmpfs(&file),
            keeps_dsync: kind == DeviceKind::BlockDevice || probe::keeps_dsync(&file),
            identity: identity_of(&metadata),
            file: Arc::new(file),
        })
    }

    /// What is behind the path; equal for two paths of one thing.
    #[must_use]
    pub fn identity(&self) -> DeviceIdentity {
        self.identity
    }

    /// Reads `buf.len()` bytes at `offset`, any alignment.
    ///
    /// # Errors
    /// The system's; `UnexpectedEof` past the end.
    pub fn read_at(&self, offset: ReplicaOffset, buf: &mut [u8]) -> io::Result<()> {
        let range = checked_range(offset, buf.len())?;
        for (part, wide) in self.chunks(range) {
            let mut bounce = BufferPool::new(0).take(wide.len as usize);
            let bytes = &mut bounce[..wide.len as usize];
            self.file.read_exact_at(bytes, wide.offset)?;
            let start = (part.offset - wide.offset) as usize;
            let to = (part.offset - range.offset) as usize;
            buf[to..to + part.len as usize].copy_from_slice(&bytes[start..start + part.len as usize]);
        }
        Ok(())
    }

    /// Writes `buf` at `offset`, any alignment. Not durable before [`Self::sync`].
    ///
    /// # Errors
    /// The system's.
    pub fn write_at(&self, offset: ReplicaOffset, buf: &[u8]) -> io::Result<()> {
        let range = checked_range(offset, buf.len())?;
        for (part, wide) in self.chunks(range) {
            let mut bounce = BufferPool::new(0).take(wide.len as usize);
            let bytes = &mut bounce[..wide.len as usize];
            if wide != part {
                self.file.read_exact_at(bytes, wide.offset)?;
            }
            let start = (part.offset - wide.offset) as usize;
            let from = (part.offset - range.offset) as usize;
            bytes[start..start + part.len as usize].copy_from_slice(&buf[from..from + part.len as usize]);
            self.file.write_all_at(bytes, wide.offset)?;
        }
        Ok(())
    }

    /// Brings everything written so far to stable storage.
    ///
    /// # Errors
    /// The system's; the data may then be lost.
    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Makes sure that a file's filesystem has the space for this range, without changing a byte of it. Does nothing
    /// where that cannot be asked for.
    ///
    /// # Errors
    /// The system's, above all that there is no space.
    pub fn reserve(&self, offset: ReplicaOffset, len: u64) -> io::Result<()> {
        if self.kind == DeviceKind::File { probe::reserve(&self.file, offset.0, len) } else { Ok(()) }
    }

    /// Whether the range is known to be a hole. `false` is always a correct answer.
    #[must_use]
    pub fn is_hole(&self, offset: ReplicaOffset, len: u64) -> bool {
        self.kind == DeviceKind::File && probe::is_hole(&self.file, offset.0, len)
    }

    /// Whether the range reads as zeroes; reads what is not a hole.
    ///
    /// # Errors
    /// The system's.
    pub fn is_blank_range(&self, offset: ReplicaOffset, len: u64) -> io::Result<bool> {
        let mut bytes = vec![0; len.min(CHUNK_BYTES) as usize];
        let mut at = offset.0;
        let end = offset.0.saturating_add(len);
        while at < end {
            let step = CHUNK_BYTES.min(end - at);
            if !self.is_hole(ReplicaOffset(at), step) {
                let part = &mut bytes[..step as usize];
                self.read_at(ReplicaOffset(at), part)?;
                if part.iter().any(|byte| *byte != 0) {
                    return Ok(false);
                }
            }
            at += step;
        }
        Ok(true)
    }

    /// Whether the file is shorter now than when it was opened. A block device never is.
    pub(super) fn is_cut_short(&self) -> bool {
        let size = nix::sys::stat::fstat(&*self.file).map_or(0, |stat| stat.st_size as u64);
        self.kind == DeviceKind::File && size < self.traits.device_bytes
    }

    /// The open file, which the device's lock belongs to.
    pub(super) fn file(&self) -> Arc<File> {
        Arc::clone(&self.file)
    }

    /// The descriptor; valid as long as `self`.
    pub(super) fn raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// The parts of `range` to be moved at a time, each with what it is widened to for the alignment.
    fn chunks(&self, range: ByteRange) -> impl Iterator<Item = (ByteRange, ByteRange)> {
        let align = u64::from(self.traits.io_align);
        let mut at = range.offset;
        std::iter::from_fn(move || {
            let end = range.end().min((at / CHUNK_BYTES + 1) * CHUNK_BYTES);
            let part = ByteRange::new(at, end.checked_sub(at).filter(|len| *len > 0)?);
            at = end;
            Some((part, part.expanded_to(align)))
        })
    }
}

/// What is behind `path`, without opening it.
///
/// # Errors
/// The system's, where nothing can be found out.
pub fn identity_of_path(path: &Path) -> io::Result<DeviceIdentity> {
    std::fs::metadata(path).map(|metadata| identity_of(&metadata))
}

fn identity_of(metadata: &std::fs::Metadata) -> DeviceIdentity {
    if metadata.file_type().is_block_device() {
        DeviceIdentity::BlockDevice(metadata.rdev())
    } else {
        DeviceIdentity::File(metadata.dev(), metadata.ino())
    }
}

fn checked_range(offset: ReplicaOffset, len: usize) -> io::Result<ByteRange> {
    let len = len as u64;
    match offset.0.checked_add(len) {
        Some(end) if end <= i64::MAX as u64 => Ok(ByteRange::new(offset.0, len)),
        _ => Err(io::ErrorKind::InvalidInput.into()),
    }
}

fn kind_of(metadata: &std::fs::Metadata) -> Result<DeviceKind, &'static str> {
    let file_type = metadata.file_type();
    match () {
        () if file_type.is_file() => Ok(DeviceKind::File),
        () if file_type.is_block_device() => Ok(DeviceKind::BlockDevice),
        () if file_type.is_dir() => Err("a directory"),
        () if file_type.is_char_device() => Err("a character device"),
        () if file_type.is_socket() => Err("a socket"),
        () if file_type.is_fifo() => Err("a FIFO"),
        () => Err("something else"),
    }
}

fn open_error(path: &str, access: Access, source: io::Error) -> DeviceOpenError {
    let path = path.to_owned();
    match source.raw_os_error() {
        Some(libc::ENOENT | libc::ENXIO | libc::ENODEV | libc::ENOTDIR | libc::ENOMEDIUM) => {
            DeviceOpenError::NotFound { path }
        }
        Some(libc::EACCES | libc::EPERM) => {
            let verb = if access == Access::ReadWrite { "read and write" } else { "read" };
            DeviceOpenError::Permission { path, verb }
        }
        Some(libc::EROFS) => DeviceOpenError::ReadOnly { path },
        Some(libc::EBUSY | libc::ETXTBSY) => DeviceOpenError::InUse { path },
        _ => DeviceOpenError::Io { path, doing: "open it", source },
    }
}

/// Opens, and waits while a killed daemon still holds a block device (see [`LOCK_TRIES`]).
fn open_waiting(path: &Path, access: Access, flags: i32) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(access == Access::ReadWrite).custom_flags(flags);
    for _ in 1..LOCK_TRIES {
        match options.open(path) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => std::thread::sleep(LOCK_RETRY),
            result => return result,
        }
    }
    options.open(path)
}

fn lock(file: &File, access: Access, path: &str) -> Result<(), DeviceOpenError> {
    let how = if access == Access::ReadWrite { libc::LOCK_EX } else { libc::LOCK_SH };
    for attempt in 1..=LOCK_TRIES {
        // SAFETY: flock takes no memory, and the descriptor is open as long as `file`. The lock belongs to the
        // open file and goes with it.
        if unsafe { libc::flock(file.as_raw_fd(), how | libc::LOCK_NB) } == 0 {
            return Ok(());
        }
        let source = io::Error::last_os_error();
        match source.raw_os_error() {
            Some(libc::EWOULDBLOCK) if attempt < LOCK_TRIES => std::thread::sleep(LOCK_RETRY),
            Some(libc::EWOULDBLOCK) => break,
            Some(libc::EINTR) => {}
            // A filesystem without locks: better served unlocked than not at all.
            Some(libc::ENOLCK | libc::ENOSYS | libc::EOPNOTSUPP) => {
                tracing::warn!(
                    "{path}: its filesystem has no locks; take care that nothing else writes to it"
                );
                return Ok(());
            }
            _ => return Err(DeviceOpenError::Io { path: path.to_owned(), doing: "lock it", source }),
        }
    }
    Err(DeviceOpenError::Locked { path: path.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(bytes: u64) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("replica");
        File::create(&path).unwrap().set_len(bytes).unwrap();
        (dir, path)
    }

    #[test]
    fn any_alignment_can_be_read_and_written() {
        let (_dir, path) = image((3 << 20) + 100);
        let device = ReplicaDevice::open(&path, Access::ReadWrite).unwrap();
        assert_eq!(device.traits.device_bytes, 3 << 20);
        assert!([1, 512, 1024, 2048, 4096].contains(&device.traits.io_align));
        assert_eq!(device.direct, device.traits.io_align > 1);
        let data: Vec<u8> = (0..(1 << 20) + 777).map(|i| (i % 251) as u8).collect();
        device.write_at(ReplicaOffset((1 << 20) - 333), &data).unwrap();
        device.sync().unwrap();
        let mut back = vec![1; data.len() + 2];
        device.read_at(ReplicaOffset((1 << 20) - 334), &mut back).unwrap();
        assert_eq!((back[0], back[back.len() - 1]), (0, 0));
        assert!(back[1..=data.len()] == data[..]);
        assert!(device.is_blank_range(ReplicaOffset(0), (1 << 20) - 333).unwrap());
        assert!(!device.is_blank_range(ReplicaOffset(0), 1 << 20).unwrap());
        assert!(!device.is_hole(ReplicaOffset(1 << 20), 4096));
        let past = device.read_at(ReplicaOffset(3 << 20), &mut [0; 4096]).unwrap_err();
        assert_eq!(past.kind(), io::ErrorKind::UnexpectedEof);
        device.read_at(ReplicaOffset(u64::MAX), &mut [0; 2]).unwrap_err();
    }

    #[test]
    fn one_thing_is_opened_once_and_known_by_every_name() {
        let (dir, path) = image(1 << 20);
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        let device = ReplicaDevice::open(&path, Access::ReadWrite).unwrap();
        assert_eq!(identity_of_path(&link).unwrap(), device.identity());
        let error = ReplicaDevice::open(&link, Access::ReadWrite).unwrap_err();
        assert!(matches!(error, DeviceOpenError::Locked { .. }), "{error}");
        ReplicaDevice::open(&link, Access::ReadOnly).unwrap_err();
        drop(device);
        let first = ReplicaDevice::open(&link, Access::ReadOnly).unwrap();
        let second = ReplicaDevice::open(&path, Access::ReadOnly).unwrap();
        assert_eq!(first.identity(), second.identity());
        first.write_at(ReplicaOffset(0), &[1]).unwrap_err();
    }

    #[test]
    fn what_cannot_be_a_replica_is_refused_with_advice() {
        let (dir, _) = image(4096);
        let open = |path: &Path| ReplicaDevice::open(path, Access::ReadWrite).unwrap_err().to_string();
        assert!(open(dir.path()).contains("a directory"));
        assert!(open(&dir.path().join("none")).contains("no such file"));
        assert!(open(Path::new("/dev/null")).contains("a character device"));
    }
}
