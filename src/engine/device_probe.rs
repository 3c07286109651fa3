//! Finding out what a replica's backing can do, without changing a byte of it.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, fallocate, fcntl};
use nix::sys::statfs::{BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, TMPFS_MAGIC, XFS_SUPER_MAGIC, fstatfs};
use nix::unistd::{Whence, lseek};

use super::device::DeviceKind;
use crate::buffer::BufferPool;
use crate::extent::{ALLOCATION_HOLE, ALLOCATION_ZERO, Extent, push_extent};
use crate::units::BLOCK_BYTES;

/// An inode flag: the file is mapped by extents.
const FS_EXTENT_FL: libc::c_int = 0x0008_0000;

/// Size of the backing, bytes.
pub(super) fn size_bytes(mut file: &File, kind: DeviceKind) -> io::Result<u64> {
    match kind {
        DeviceKind::File => Ok(file.metadata()?.len()),
        DeviceKind::BlockDevice => file.seek(SeekFrom::End(0)),
    }
}

/// Turns on direct I/O where the backing has it with an alignment of at most 4096 bytes, for memory too.
/// Gives that alignment, `None` where I/O stays buffered.
pub(super) fn enable_direct(file: &File, kind: DeviceKind, device_bytes: u64) -> io::Result<Option<u32>> {
    let flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?);
    // Non-blocking was for the opening only; it means something else to the ring.
    let flags = flags & !OFlag::O_NONBLOCK;
    if device_bytes >= BLOCK_BYTES && fcntl(file, FcntlArg::F_SETFL(flags | OFlag::O_DIRECT)).is_ok() {
        let wanted = direct_align(file, kind);
        let tried = wanted.filter(|align| direct_read_works(file, *align));
        let align =
            tried.or_else(|| direct_read_works(file, BLOCK_BYTES as u32).then_some(BLOCK_BYTES as u32));
        if align.is_some() {
            return Ok(align);
        }
    }
    fcntl(file, FcntlArg::F_SETFL(flags & !OFlag::O_DIRECT))?;
    // Fails here and now where the disk cannot be read at all.
    let mut byte = [0];
    file.read_at(&mut byte, 0)?;
    Ok(None)
}

/// The alignment that direct I/O asks for: as the kernel says, or the block device's logical block, or the
/// smallest that there is.
fn direct_align(file: &File, kind: DeviceKind) -> Option<u32> {
    let align = statx_direct_align(file)
        .or_else(|| match kind {
            DeviceKind::BlockDevice => queue_value(file, "logical_block_size").map(|bytes| bytes as u32),
            DeviceKind::File => None,
        })
        .unwrap_or(512);
    let align = align.max(512);
    (align.is_power_of_two() && u64::from(align) <= BLOCK_BYTES).then_some(align)
}

/// `STATX_DIOALIGN` (Linux 6.1): the larger of the memory and the offset alignment.
fn statx_direct_align(file: &File) -> Option<u32> {
    let mut statx = std::mem::MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path is an empty C string, so the descriptor (open as long as `file`) is what is looked at;
    // the kernel writes at most one `struct statx` to memory that is one.
    let result = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            statx.as_mut_ptr(),
        )
    };
    // SAFETY: plain integers, all zero before the call: initialised whatever the kernel wrote.
    let statx = unsafe { statx.assume_init() };
    if result != 0 || statx.stx_mask & libc::STATX_DIOALIGN == 0 || statx.stx_dio_offset_align == 0 {
        return None;
    }
    Some(statx.stx_dio_mem_align.max(statx.stx_dio_offset_align))
}

/// Reads a piece of that size and at that offset, the smallest that the alignment allows.
fn direct_read_works(file: &File, align: u32) -> bool {
    let mut buffer = BufferPool::new(0).take(align as usize);
    let second = u64::from(align) % BLOCK_BYTES;
    file.read_exact_at(&mut buffer[..align as usize], second).is_ok()
}

/// Whether zeroing without writing works. A file is asked by punching a hole behind its end, where nothing is.
pub(super) fn cheap_zero(file: &File, kind: DeviceKind, bytes: u64) -> bool {
    match kind {
        DeviceKind::BlockDevice => queue_value(file, "write_zeroes_max_bytes").is_some_and(|max| max > 0),
        DeviceKind::File => {
            let behind = bytes.next_multiple_of(BLOCK_BYTES).saturating_add(BLOCK_BYTES);
            let Ok(behind) = i64::try_from(behind) else { return false };
            let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            fallocate(file, mode, behind, BLOCK_BYTES as i64).is_ok()
        }
    }
}

/// Whether a range can be zeroed without writing, and stays allocated. Not tried, for that would allocate something:
/// known of the filesystem. A block device may have its zeroes written by the kernel where it has no better way, so
/// that nothing can be promised of it.
pub(super) fn cheap_allocated_zero(file: &File, kind: DeviceKind) -> bool {
    if kind == DeviceKind::BlockDevice {
        return false;
    }
    match fstatfs(file).map(|stat| stat.filesystem_type()) {
        Ok(XFS_SUPER_MAGIC | BTRFS_SUPER_MAGIC) => true,
        // Of the three that have this number, ext4 can, for files that are mapped by extents.
        Ok(EXT4_SUPER_MAGIC) => inode_flags(file).is_some_and(|flags| flags & FS_EXTENT_FL != 0),
        _ => false,
    }
}

/// The inode's flags as `lsattr` shows them.
fn inode_flags(file: &File) -> Option<libc::c_int> {
    let mut flags: libc::c_long = 0;
    // SAFETY: the kernel writes an `int` (whatever the request's number says of its size) to a `long` of ours; the
    // descriptor is open as long as `file`.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::FS_IOC_GETFLAGS, &raw mut flags) };
    let bytes = flags.to_ne_bytes();
    let (int, _) = bytes.split_first_chunk()?;
    (result == 0).then(|| libc::c_int::from_ne_bytes(*int))
}

/// Allocates a file's range; content and length stay. Does nothing on filesystems that cannot.
pub(super) fn reserve(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let (Ok(offset), Ok(len)) = (i64::try_from(offset), i64::try_from(len)) else {
        return Err(io::ErrorKind::FileTooLarge.into());
    };
    match fallocate(file, FallocateFlags::FALLOC_FL_KEEP_SIZE, offset, len) {
        Ok(()) | Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Whether the file stands in memory.
pub(super) fn is_tmpfs(file: &File) -> bool {
    fstatfs(file).is_ok_and(|stat| stat.filesystem_type() == TMPFS_MAGIC)
}

/// Whether the filesystem is known to make a write with `RWF_DSYNC` durable before it ends. FUSE (Linux 6.18 and before)
/// forgets it for direct I/O that is asynchronous, which is all of the ring's; others were not tried.
pub(super) fn keeps_dsync(file: &File) -> bool {
    // Ext2, ext3 and ext4 have one number.
    let known = [EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC, BTRFS_SUPER_MAGIC, TMPFS_MAGIC];
    fstatfs(file).is_ok_and(|stat| known.contains(&stat.filesystem_type()))
}

/// Whether a file's range is known to be a hole.
pub(super) fn is_hole(file: &File, offset: u64, len: u64) -> bool {
    let (Ok(from), Some(end)) = (i64::try_from(offset), offset.checked_add(len)) else { return false };
    match lseek(file, from, Whence::SeekData) {
        Ok(data) => u64::try_from(data).is_ok_and(|data| data >= end),
        // No data from here on. A range behind the end is not there, which is not the same as a hole.
        Err(Errno::ENXIO) => file.metadata().is_ok_and(|metadata| end <= metadata.len()),
        Err(_) => false,
    }
}

/// A file's holes and data, from `offset` on: at least one extent, at most `extents_max`, together at most `len`
/// (more than 0) bytes. Holes begin and end at multiples of 4096 bytes or where the range does. What the filesystem
/// does not say is data.
pub(super) fn allocation(file: &File, offset: u64, len: u64, extents_max: usize) -> Vec<Extent> {
    let end = offset + len;
    let mut extents = Vec::new();
    let mut at = offset;
    while at < end && extents.len() <= extents_max {
        let data = next_data(file, at, end).unwrap_or(at);
        let from = if at == offset { at } else { at.next_multiple_of(BLOCK_BYTES) };
        let to = if data == end { end } else { data & !(BLOCK_BYTES - 1) };
        if from < to {
            push_extent(&mut extents, from - at, 0);
            push_extent(&mut extents, to - from, ALLOCATION_HOLE | ALLOCATION_ZERO);
            at = to;
        }
        let hole = next_hole(file, data, end).filter(|hole| *hole > at).unwrap_or(end);
        push_extent(&mut extents, hole - at, 0);
        at = hole;
    }
    extents.truncate(extents_max);
    extents
}

/// The first byte from `at` to `end` that is not in a hole, or `end`; `None` where that is not to be known.
fn next_data(file: &File, at: u64, end: u64) -> Option<u64> {
    match lseek(file, i64::try_from(at).ok()?, Whence::SeekData) {
        Ok(data) => Some(u64::try_from(data).ok()?.clamp(at, end)),
        // No data from here on. A range behind the end is not there, which is not the same as a hole.
        Err(Errno::ENXIO) => (end <= file.metadata().ok()?.len()).then_some(end),
        Err(_) => None,
    }
}

/// The first byte from `at` to `end` that is in a hole, or `end`; `None` where that is not to be known.
fn next_hole(file: &File, at: u64, end: u64) -> Option<u64> {
    let hole = lseek(file, i64::try_from(at).ok()?, Whence::SeekHole).ok()?;
    Some(u64::try_from(hole).ok()?.clamp(at, end))
}

/// A figure from the block device's queue in sysfs; partitions have their disk's.
fn queue_value(file: &File, name: &str) -> Option<u64> {
    let number = file.metadata().ok()?.rdev();
    let (major, minor) = (libc::major(number), libc::minor(number));
    ["queue", "../queue"].iter().find_map(|queue| {
        let path = format!("/sys/dev/block/{major}:{minor}/{queue}/{name}");
        std::fs::read_to_string(path).ok()?.trim().parse().ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    const HOLE: u32 = ALLOCATION_HOLE | ALLOCATION_ZERO;

    /// A file of 1 MiB on the filesystem of the temporary directory, and one in memory.
    fn files() -> Vec<(tempfile::TempDir, PathBuf)> {
        let memory = tempfile::tempdir_in("/dev/shm").ok();
        let dirs = [Some(tempfile::tempdir().unwrap()), memory].into_iter().flatten();
        dirs.map(|dir| {
            let path = dir.path().join("file");
            File::create(&path).unwrap().set_len(1 << 20).unwrap();
            (dir, path)
        })
        .collect()
    }

    fn open(path: &PathBuf) -> File {
        File::options().read(true).write(true).open(path).unwrap()
    }

    fn extents(file: &File, offset: u64, len: u64, max: usize) -> Vec<(u64, u32)> {
        allocation(file, offset, len, max).into_iter().map(|extent| (extent.len, extent.flags)).collect()
    }

    #[test]
    fn holes_are_where_nothing_was_written() {
        for (_dir, path) in files() {
            let file = open(&path);
            let all = || extents(&file, 0, 1 << 20, 100);
            assert_eq!(all(), [(1 << 20, HOLE)]);
            file.write_all_at(&[1; 8192], 65_536).unwrap();
            file.write_all_at(&[0; 4096], 131_072).unwrap();
            let (first, rest) = ((65_536, HOLE), (1 << 20) - 135_168);
            assert_eq!(all(), [first, (8192, 0), (57_344, HOLE), (4096, 0), (rest, HOLE)]);
            assert_eq!(extents(&file, 0, 1 << 20, 3), all()[..3]);
            assert_eq!(extents(&file, 65_000, 1000, 9), [(536, HOLE), (464, 0)]);
            assert_eq!(extents(&file, 73_727, 2, 9), [(1, 0), (1, HOLE)]);
            assert_eq!(extents(&file, 66_000, 100, 9), [(100, 0)]);
            let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            if fallocate(&file, punch, 65_536, 8192).is_ok() {
                assert_eq!(all()[0], (131_072, HOLE));
            }
        }
    }

    #[test]
    fn what_is_behind_the_end_of_a_file_is_no_hole() {
        for (_dir, path) in files() {
            let file = open(&path);
            assert_eq!(extents(&file, 1 << 20, 4096, 9), [(4096, 0)]);
            assert_eq!(extents(&file, (1 << 20) - 4096, 8192, 9), [(8192, 0)]);
            file.set_len(4096).unwrap();
            assert_eq!(extents(&file, 0, 8192, 9), [(8192, 0)]);
        }
    }

    #[test]
    fn extents_agree_with_what_is_read() {
        for (_dir, path) in files() {
            let file = open(&path);
            for block in (0..256_u64).filter(|block| block * block % 7 == 2) {
                file.write_all_at(&[9; 4096], block * 4096).unwrap();
            }
            let mut at = 0;
            while at < 1 << 20 {
                for extent in allocation(&file, at, (1 << 20) - at, 5) {
                    let mut bytes = vec![1; extent.len as usize];
                    file.read_exact_at(&mut bytes, at).unwrap();
                    assert!(extent.flags == 0 || bytes.iter().all(|byte| *byte == 0));
                    at += extent.len;
                }
            }
            assert_eq!(at, 1 << 20);
        }
    }

    /// Where it is said that zeroes stay allocated without being written, they do.
    #[test]
    fn zero_range_works_where_it_is_promised() {
        for (_dir, path) in files() {
            let file = open(&path);
            file.write_all_at(&[9; 65_536], 0).unwrap();
            file.sync_all().unwrap();
            let before = file.metadata().unwrap().blocks();
            let mode = FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            let works = fallocate(&file, mode, 0, 65_536).is_ok();
            assert!(works || !cheap_allocated_zero(&file, DeviceKind::File));
            if works {
                assert!(file.metadata().unwrap().blocks() >= before);
            }
            assert!(!(is_tmpfs(&file) && cheap_allocated_zero(&file, DeviceKind::File)));
        }
    }
}
