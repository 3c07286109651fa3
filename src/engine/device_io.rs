//! One operation of the core on a replica, as the sequence of ring operations that carries it out.
//!
//! ```text
//!            ┌──── short transfer, EINTR, EAGAIN, next piece ────┐
//!            ▼                                                   │
//! start ──► entry ──► kernel ──► advance(result) ────────────────┤
//!                                   │                            │
//!                                   │   zeroing: punch / zero range ──EOPNOTSUPP──► write zeroes
//!                                   ▼
//!                         Ended(output or errno)
//! ```
//!
//! What must hold: a read gives bytes that were read or an error, never padding: the end of a file within the range is
//! ENXIO (it was cut short behind our back). Continuations keep the replica's alignment.

use std::os::fd::RawFd;

use io_uring::opcode;
use io_uring::squeue::{Entry, Flags};
use io_uring::types::{Fd, FsyncFlags};
use nix::errno::Errno;

use crate::buffer::{Buffer, Payload, SharedBuffer};
use crate::mirror::event::{DeviceOp, DeviceOutput, OpId};
use crate::units::ReplicaSlot;

/// Most bytes that one `fallocate` is asked for: it holds the file's lock as long as it takes.
const ZERO_BYTES_MAX: u64 = 1 << 30;
/// Most bytes moved by one read or write.
const TRANSFER_BYTES_MAX: u64 = 1 << 30;
/// Bytes prefetched at a time: of a longer range the kernel would take in only about that much (its read-ahead).
const PREFETCH_BYTES_MAX: u64 = 128 << 10;
/// Bytes of the zeroes that are written where nothing cheaper works.
pub(super) const ZEROES_BYTES: usize = 1 << 20;
/// Times in a row that "try again" is believed.
const RETRIES_MAX: u32 = 1000;

/// What an operation goes to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Target {
    /// Open as long as the operation.
    pub fd: RawFd,
    /// Its offsets, lengths and addresses are multiples of this, bytes.
    pub io_align: u32,
    /// `RWF_DSYNC` does what it says here; else a durable write is followed by a flush.
    pub keeps_dsync: bool,
    /// Writes stand in the kernel's memory until they are written back: a failed `RWF_DSYNC` write may have been told of,
    /// and have used up, the error of an earlier one.
    pub written_back: bool,
}

/// An operation of the core in flight.
pub(super) struct DeviceIo {
    /// The core's name for it.
    pub op: OpId,
    /// On which replica.
    pub slot: ReplicaSlot,
    fd: RawFd,
    io_align: u64,
    retries: u32,
    /// If this fails other writes may be lost, and no later flush would say so.
    answers_for_others: bool,
    work: Work,
}

enum Work {
    Read { offset: u64, len: u64, done: u64, buffer: Buffer },
    Write { offset: u64, done: u64, data: Payload, durable: Durable },
    Zero { offset: u64, len: u64, done: u64, how: ZeroHow, zeroes: SharedBuffer },
    Flush,
    Prefetch { offset: u64, len: u64, done: u64 },
}

/// How a write is made durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Durable {
    /// Not at all.
    No,
    /// By `RWF_DSYNC`.
    Itself,
    /// By a flush when it is done.
    ByFlush,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ZeroHow {
    Punch,
    ZeroRange,
    Write,
}

/// What comes after a completion.
pub(super) enum Step {
    /// Start it again: there is more to do.
    Again(DeviceIo),
    /// It has ended.
    Ended(OpId, ReplicaSlot, Result<DeviceOutput, Errno>),
}

impl DeviceIo {
    /// The ring's form of `request`, which is neither a `ProbeHole` nor an `Allocation` (these need no ring).
    /// `zeroes` is a buffer of [`ZEROES_BYTES`] zeroes.
    pub(super) fn new(
        (op, slot): (OpId, ReplicaSlot),
        Target { fd, io_align, keeps_dsync, written_back }: Target,
        request: DeviceOp,
        zeroes: &SharedBuffer,
    ) -> Self {
        let work = match request {
            DeviceOp::Read { offset, len, buffer } => {
                assert!(len <= buffer.len() as u64);
                Work::Read { offset: offset.0, len, done: 0, buffer }
            }
            DeviceOp::Write { offset, data, durable } => {
                let durable = match durable {
                    false => Durable::No,
                    true if keeps_dsync => Durable::Itself,
                    true => Durable::ByFlush,
                };
                Work::Write { offset: offset.0, done: 0, data, durable }
            }
            DeviceOp::Zero { offset, len, may_unmap } => {
                let how = if may_unmap { ZeroHow::Punch } else { ZeroHow::ZeroRange };
                Work::Zero { offset: offset.0, len, done: 0, how, zeroes: zeroes.clone() }
            }
            DeviceOp::Flush => Work::Flush,
            DeviceOp::Cache { offset, len } => Work::Prefetch { offset: offset.0, len, done: 0 },
            DeviceOp::Allocation { .. } | DeviceOp::ProbeHole { .. } => {
                unreachable!("answered without the ring")
            }
        };
        let answers_for_others = written_back && matches!(work, Work::Write { durable: Durable::Itself, .. });
        let io = Self { op, slot, fd, io_align: u64::from(io_align), retries: 0, answers_for_others, work };
        debug_assert!(io.is_aligned());
        io
    }

    fn is_aligned(&self) -> bool {
        let (offset, len, address) = match &self.work {
            Work::Read { offset, len, buffer, .. } => (*offset, *len, buffer.as_ptr() as u64),
            Work::Write { offset, data, .. } => (*offset, data.len as u64, data.bytes().as_ptr() as u64),
            Work::Zero { .. } | Work::Flush | Work::Prefetch { .. } => return true,
        };
        (offset | len | address) % self.io_align == 0
    }

    /// The entry for what is left to do. Points into the operation's buffer.
    pub(super) fn entry(&mut self) -> Entry {
        let fd = Fd(self.fd);
        let entry = match &mut self.work {
            Work::Read { offset, len, done, buffer } => {
                let part = &mut buffer[*done as usize..*len as usize];
                let bytes = (part.len() as u64).min(TRANSFER_BYTES_MAX) as u32;
                opcode::Read::new(fd, part.as_mut_ptr(), bytes).offset(*offset + *done).build()
            }
            Work::Write { offset, done, data, durable } => {
                let part = &data.bytes()[*done as usize..];
                let bytes = (part.len() as u64).min(TRANSFER_BYTES_MAX) as u32;
                let flags = durable.flags();
                opcode::Write::new(fd, part.as_ptr(), bytes).offset(*offset + *done).rw_flags(flags).build()
            }
            Work::Zero { offset, len, done, how: ZeroHow::Write, zeroes } => {
                let bytes = (*len - *done).min(ZEROES_BYTES as u64) as u32;
                opcode::Write::new(fd, zeroes.as_ptr(), bytes).offset(*offset + *done).build()
            }
            Work::Zero { offset, len, done, how, .. } => {
                let bytes = (*len - *done).min(ZERO_BYTES_MAX);
                opcode::Fallocate::new(fd, bytes).offset(*offset + *done).mode(how.mode()).build()
            }
            Work::Prefetch { offset, len, done } => {
                let bytes = (*len - *done).min(PREFETCH_BYTES_MAX);
                let advice = libc::POSIX_FADV_WILLNEED;
                opcode::Fadvise::new(fd, bytes as libc::off_t, advice).offset(*offset + *done).build()
            }
            Work::Flush => opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build(),
        };
        // What the kernel would not do at once and gave back: let a worker thread do it.
        if self.retries > 0 { entry.flags(Flags::ASYNC) } else { entry }
    }

    /// Whether it is a transfer of at most `bytes_max` bytes, or a flush.
    pub(super) fn is_small(&self, bytes_max: u64) -> bool {
        match &self.work {
            Work::Read { len, .. } => *len <= bytes_max,
            Work::Write { data, .. } => data.len as u64 <= bytes_max,
            Work::Zero { .. } | Work::Prefetch { .. } => false,
            Work::Flush => true,
        }
    }

    /// Does the work of one entry by a plain system call, with the result that a completion would have.
    pub(super) fn run_now(&mut self) -> i32 {
        let result = match &mut self.work {
            Work::Read { offset, len, done, buffer } => {
                let part = &mut buffer[*done as usize..*len as usize];
                // SAFETY: writes at most `part.len()` bytes to `part`, which is borrowed mutably here.
                unsafe {
                    libc::pread(
                        self.fd,
                        part.as_mut_ptr().cast(),
                        part.len(),
                        (*offset + *done) as libc::off_t,
                    )
                }
            }
            Work::Write { offset, done, data, durable } => {
                let part = &data.bytes()[*done as usize..];
                let offset = (*offset + *done) as libc::off_t;
                if *durable != Durable::Itself {
                    // SAFETY: reads `part.len()` bytes of `part`, which is borrowed here.
                    unsafe { libc::pwrite(self.fd, part.as_ptr().cast(), part.len(), offset) }
                } else {
                    let iov = libc::iovec { iov_base: part.as_ptr().cast_mut().cast(), iov_len: part.len() };
                    // SAFETY: one vector of `part.len()` bytes that are only read, borrowed here.
                    unsafe { libc::pwritev2(self.fd, &raw const iov, 1, offset, durable.flags()) }
                }
            }
            // SAFETY: takes no memory.
            Work::Flush => unsafe { libc::fdatasync(self.fd) as isize },
            Work::Zero { .. } | Work::Prefetch { .. } => unreachable!("never small"),
        };
        if result < 0 { -Errno::last_raw() } else { result as i32 }
    }

    /// Whether other writes may be lost if it fails with `result`, unheard of by the next flush: Linux reports a failed
    /// write-back once to each open file, and a disk forgets what a failed flush was to flush.
    pub(super) fn may_lose_others(&self, result: i32) -> bool {
        let errno = Errno::from_raw(-result);
        let tried_again = matches!(errno, Errno::EINTR | Errno::EAGAIN);
        // Without room the write itself was refused; a flush promises nothing of the kind.
        let refused = matches!(errno, Errno::ENOSPC | Errno::EDQUOT | Errno::EFBIG) && !self.is_flush();
        self.answers_for_others && result < 0 && !tried_again && !refused
    }

    /// Whether it is, or has come to, a flush.
    pub(super) fn is_flush(&self) -> bool {
        matches!(self.work, Work::Flush)
    }

    /// Takes the kernel's result.
    pub(super) fn advance(mut self, result: i32) -> Step {
        if result < 0 {
            return self.failed(Errno::from_raw(-result));
        }
        self.retries = 0;
        let (len, done, moved) = match &mut self.work {
            Work::Flush => return self.ended(),
            Work::Prefetch { len, done, .. } => {
                let moved = (*len - *done).min(PREFETCH_BYTES_MAX);
                (*len, done, moved)
            }
            Work::Read { len, done, .. } => (*len, done, result as u64),
            Work::Write { data, done, .. } => (data.len as u64, done, result as u64),
            Work::Zero { len, done, how, .. } => {
                let moved =
                    if *how == ZeroHow::Write { result as u64 } else { (*len - *done).min(ZERO_BYTES_MAX) };
                (*len, done, moved)
            }
        };
        assert!(moved <= len - *done);
        let reached = *done + moved;
        if reached == len {
            if matches!(self.work, Work::Write { durable: Durable::ByFlush, .. }) {
                self.work = Work::Flush;
                self.answers_for_others = true;
                return Step::Again(self);
            }
            return self.ended();
        }
        // An end inside a unit: that unit is moved again.
        let kept = reached & !(self.io_align - 1);
        if kept == *done {
            // A read's: the end of a file that was cut short, which has lost what it had.
            let errno = if matches!(self.work, Work::Read { .. }) { Errno::ENXIO } else { Errno::EIO };
            return Step::Ended(self.op, self.slot, Err(errno));
        }
        *done = kept;
        Step::Again(self)
    }

    fn failed(mut self, errno: Errno) -> Step {
        if matches!(errno, Errno::EINTR | Errno::EAGAIN) && self.retries < RETRIES_MAX {
            self.retries += 1;
            return Step::Again(self);
        }
        if matches!(self.work, Work::Prefetch { .. }) {
            return self.ended(); // it was advice
        }
        if let Work::Zero { how, .. } = &mut self.work
            && *how != ZeroHow::Write
            && matches!(
                errno,
                Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EINVAL | Errno::ENODEV | Errno::ENOTTY
            )
        {
            // A hole may always be filled instead; what must be provisioned may not be punched.
            *how = if *how == ZeroHow::Punch { ZeroHow::ZeroRange } else { ZeroHow::Write };
            return Step::Again(self);
        }
        Step::Ended(self.op, self.slot, Err(errno))
    }

    fn ended(self) -> Step {
        let output = match self.work {
            Work::Read { buffer, .. } => DeviceOutput::Read(buffer),
            Work::Write { .. } | Work::Zero { .. } | Work::Flush | Work::Prefetch { .. } => {
                DeviceOutput::Done
            }
        };
        Step::Ended(self.op, self.slot, Ok(output))
    }
}

impl Durable {
    fn flags(self) -> i32 {
        if self == Self::Itself { libc::RWF_DSYNC } else { 0 }
    }
}

impl ZeroHow {
    fn mode(self) -> i32 {
        match self {
            Self::Punch => libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
            Self::ZeroRange => libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
            Self::Write => unreachable!("not a fallocate"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::BufferPool;
    use crate::units::ReplicaOffset;

    fn io(request: DeviceOp) -> DeviceIo {
        io_to(Target { fd: -1, io_align: 512, keeps_dsync: true, written_back: true }, request)
    }

    fn io_to(target: Target, request: DeviceOp) -> DeviceIo {
        let mut zeroes = BufferPool::new(0).take(ZEROES_BYTES);
        zeroes.fill(0);
        DeviceIo::new((OpId(7), ReplicaSlot::new(1)), target, request, &zeroes.share())
    }

    fn again(step: Step) -> DeviceIo {
        match step {
            Step::Again(io) => io,
            Step::Ended(_, _, result) => panic!("ended: {result:?}"),
        }
    }

    fn ended(step: Step) -> Result<DeviceOutput, Errno> {
        match step {
            Step::Again(_) => panic!("not ended"),
            Step::Ended(op, slot, result) => {
                assert_eq!((op, slot.index()), (OpId(7), 1));
                result
            }
        }
    }

    fn read(len: u64) -> DeviceIo {
        io(DeviceOp::Read { offset: ReplicaOffset(4096), len, buffer: BufferPool::new(0).take(len as usize) })
    }

    #[test]
    fn short_reads_go_on_where_the_alignment_allows_and_an_end_of_file_is_an_error() {
        let io = again(read(8192).advance(1000));
        assert!(matches!(&io.work, Work::Read { done: 512, .. }));
        let io = again(io.advance(-libc::EINTR));
        assert!(matches!(ended(io.advance(8192 - 512)), Ok(DeviceOutput::Read(_))));
        assert_eq!(ended(read(4096).advance(0)).unwrap_err(), Errno::ENXIO);
        assert_eq!(ended(read(4096).advance(511)).unwrap_err(), Errno::ENXIO);
        assert_eq!(ended(read(4096).advance(-libc::EILSEQ)).unwrap_err(), Errno::EILSEQ);
    }

    #[test]
    fn a_failed_durable_write_may_lose_others_where_writes_are_written_back() {
        let durable = |written_back, keeps_dsync| {
            let data = Payload { buffer: BufferPool::new(0).take(512).share(), start: 0, len: 512 };
            let target = Target { fd: -1, io_align: 512, keeps_dsync, written_back };
            io_to(target, DeviceOp::Write { offset: ReplicaOffset(0), data, durable: true })
        };
        assert!(durable(true, true).may_lose_others(-libc::EIO));
        assert!(!durable(true, true).may_lose_others(-libc::ENOSPC), "refused before anything was written");
        assert!(!durable(true, true).may_lose_others(-libc::EINTR), "is tried again");
        assert!(!durable(true, true).may_lose_others(512));
        assert!(!durable(false, true).may_lose_others(-libc::EIO), "direct: nobody else's writes");
        let by_flush = durable(false, false);
        assert!(!by_flush.may_lose_others(-libc::EIO), "no flush was tried yet");
        assert!(again(by_flush.advance(512)).may_lose_others(-libc::ENOSPC));
    }

    #[test]
    fn a_durable_write_is_flushed_where_dsync_is_not_kept() {
        let durable = |keeps_dsync| {
            let buffer = BufferPool::new(0).take(4096).share();
            let data = Payload { buffer, start: 0, len: 4096 };
            let request = DeviceOp::Write { offset: ReplicaOffset(0), data, durable: true };
            io_to(Target { fd: -1, io_align: 512, keeps_dsync, written_back: true }, request)
        };
        assert!(matches!(ended(durable(true).advance(4096)), Ok(DeviceOutput::Done)));
        let rest = again(durable(false).advance(512));
        assert!(matches!(&rest.work, Work::Write { done: 512, .. }));
        let flush = again(rest.advance(4096 - 512));
        assert!(matches!(flush.work, Work::Flush));
        assert_eq!(ended(again(flush.advance(-libc::EINTR)).advance(-libc::EIO)).unwrap_err(), Errno::EIO);
        assert!(matches!(ended(again(durable(false).advance(4096)).advance(0)), Ok(DeviceOutput::Done)));
    }

    #[test]
    fn trying_again_comes_to_an_end() {
        let mut io = read(4096);
        for _ in 0..RETRIES_MAX {
            io = again(io.advance(-libc::EAGAIN));
        }
        assert_eq!(ended(io.advance(-libc::EAGAIN)).unwrap_err(), Errno::EAGAIN);
    }

    #[test]
    fn zeroing_falls_back_and_is_split() {
        let zero = |may_unmap| io(DeviceOp::Zero { offset: ReplicaOffset(0), len: 3 << 30, may_unmap });
        let io = again(zero(true).advance(0));
        assert!(matches!(&io.work, Work::Zero { done, how: ZeroHow::Punch, .. } if *done == 1 << 30));
        let io = again(io.advance(-libc::EOPNOTSUPP));
        let io = again(io.advance(-libc::EOPNOTSUPP));
        let io = again(io.advance(ZEROES_BYTES as i32));
        assert!(
            matches!(&io.work, Work::Zero { done, how: ZeroHow::Write, .. } if *done == (1 << 30) + (1 << 20))
        );
        assert_eq!(ended(io.advance(-libc::ENOSPC)).unwrap_err(), Errno::ENOSPC);
        let io = again(zero(false).advance(-libc::EOPNOTSUPP));
        assert!(matches!(&io.work, Work::Zero { done: 0, how: ZeroHow::Write, .. }));
        assert_eq!(ended(zero(false).advance(-libc::EIO)).unwrap_err(), Errno::EIO);
    }
}
