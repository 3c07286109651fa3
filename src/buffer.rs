//! Aligned buffers and their pool.
//!
//! What must hold: a [`Buffer`] is the only handle to its memory, so it may be written; a [`SharedBuffer`]
//! is one of several, so it may only be read. Memory goes back to the pool when the last handle is dropped,
//! never before: a device operation keeps a handle until its completion, so the kernel's access is always
//! covered by ownership. Buffers start at a multiple of 4096 bytes and are whole multiples of it long.
//! Single-threaded by construction (`Rc`): buffers live on the data plane's thread.
//!
//! What a sanitizer cannot see is the kernel's access. Built with `--cfg poison_buffers` (as `scripts/sanitize` does)
//! free memory is full of `POISON`: what is sent or written from a buffer that was given back too early is wrong
//! data, which the tests of the real binary notice, and what is received or read into it is noticed by the next
//! [`BufferPool::take`] of that memory.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::cell::RefCell;
use std::mem::ManuallyDrop;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::rc::{Rc, Weak};
use std::sync::OnceLock;

use crate::planted::{Bug, planted};
use crate::units::{BLOCK_BYTES, ByteRange};

const ALIGN: usize = BLOCK_BYTES as usize;
/// Free lists hold buffers of 4 KiB << class; larger requests than the largest class are not pooled.
const CLASSES: usize = 14;
/// Buffers of the first classes (up to 32 KiB) are cut from slabs: an allocator that is asked for 4 KiB at a multiple of 4 KiB
/// makes 8 KiB resident, as the header of what comes next stands on a page of its own.
const SMALL_CLASSES: usize = 4;
/// That part of what a pool keeps is kept of each small class, even where large buffers take the rest: to give memory to the
/// system and to get it back costs more than a small transfer.
const FEW_DIVISOR: usize = 16;
/// The largest slab of small buffers.
const SLAB_BYTES_MAX: usize = 256 << 10;
/// What free memory is full of in builds with `--cfg poison_buffers`.
const POISON: u8 = 0xdb;

/// Memory from the allocator. Freed here, and only here.
struct Slab {
    start: NonNull<u8>,
    bytes: usize,
}

impl Slab {
    fn allocate(bytes: usize) -> Rc<Self> {
        assert!(bytes > 0 && bytes.is_multiple_of(ALIGN));
        let layout = Self::layout(bytes);
        // SAFETY: the layout has a non-zero size (asserted above).
        let start = unsafe { alloc_zeroed(layout) };
        let Some(start) = NonNull::new(start) else { handle_alloc_error(layout) };
        Rc::new(Self { start, bytes })
    }

    fn layout(bytes: usize) -> Layout {
        match Layout::from_size_align(bytes, ALIGN) {
            Ok(layout) => layout,
            Err(_) => unreachable!("a buffer is far smaller than the address space"),
        }
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        // SAFETY: `start` came from `alloc_zeroed` with this very layout, and this is its only owner.
        unsafe { dealloc(self.start.as_ptr(), Self::layout(self.bytes)) };
    }
}

/// The size of the kernel's pages, bytes: 4096, or more on some machines.
fn system_page_bytes() -> usize {
    static PAGE_BYTES: OnceLock<usize> = OnceLock::new();
    *PAGE_BYTES.get_or_init(|| {
        let asked = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE);
        // Where it does not say, nothing is a whole number of pages.
        asked.ok().flatten().and_then(|bytes| usize::try_from(bytes).ok()).unwrap_or(usize::MAX)
    })
}

/// Memory owned by one buffer: a piece of a slab that nobody else has.
struct Memory {
    start: NonNull<u8>,
    bytes: usize,
    class: u8,
    pool: Weak<PoolInner>,
    _slab: Rc<Slab>,
}

impl Memory {
    /// A slab of `count` pieces of `bytes` each.
    fn cut(bytes: usize, count: usize, class: u8, pool: Weak<PoolInner>) -> impl Iterator<Item = Rc<Self>> {
        let slab = Slab::allocate(bytes * count);
        (0..count).map(move |index| {
            // SAFETY: the slab is `bytes * count` long.
            let start = unsafe { slab.start.add(index * bytes) };
            let mut memory =
                Rc::new(Self { start, bytes, class, pool: pool.clone(), _slab: Rc::clone(&slab) });
            if cfg!(poison_buffers) {
                Self::poison(&mut memory); // nobody may count on zeroes
            }
            memory
        })
    }

    /// Leaves free memory to the system; it reads as zeroes then, and costs nothing until it is used.
    fn discard(this: &mut Rc<Self>) {
        if cfg!(any(poison_buffers, miri)) {
            return;
        }
        let Some(memory) = Rc::get_mut(this) else { unreachable!("free memory has one owner") };
        let bytes = memory.free_bytes();
        // The kernel rounds up to whole pages of its own, which can be larger than ours: the rest would be somebody else's.
        let page_bytes = system_page_bytes();
        if !(bytes.as_ptr() as usize).is_multiple_of(page_bytes) || !bytes.len().is_multiple_of(page_bytes) {
            return;
        }
        // SAFETY: these are whole pages (just checked) of private memory that this is the only handle to, and any content
        // will do. Where the system cannot take them they stay as they are.
        let _ = unsafe { libc::madvise(bytes.as_mut_ptr().cast(), bytes.len(), libc::MADV_DONTNEED) };
    }

    /// The bytes. Nobody else may have a handle: this is free memory, about to be given out or just given back.
    fn free_bytes(&mut self) -> &mut [u8] {
        // SAFETY: the memory is `bytes` long, initialised since its allocation, lives as long as `self`, and `self`,
        // its only owner, is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.bytes) }
    }

    fn poison(this: &mut Rc<Self>) {
        let Some(memory) = Rc::get_mut(this) else { unreachable!("free memory has one owner") };
        memory.free_bytes().fill(POISON);
    }

    fn assert_poisoned(this: &mut Rc<Self>) {
        let Some(memory) = Rc::get_mut(this) else { unreachable!("free memory has one owner") };
        let written = memory.free_bytes().iter().position(|byte| *byte != POISON);
        assert!(written.is_none(), "a free buffer of {} bytes was written to, at {written:?}", memory.bytes);
    }
}

struct PoolInner {
    free: RefCell<[Vec<Rc<Memory>>; CLASSES]>,
    /// Bytes kept in the free lists, at most `keep_bytes_max` and a few small buffers.
    kept_bytes: std::cell::Cell<usize>,
    keep_bytes_max: usize,
    /// Bytes in buffers that are out.
    used_bytes: std::cell::Cell<usize>,
    small: RefCell<[Small; SMALL_CLASSES]>,
}

/// The pieces of a class that is cut from slabs.
#[derive(Default)]
struct Small {
    /// All there are, wherever they are.
    pieces: usize,
    /// Free and beyond what is kept: address space without memory, but for the rest of the youngest slab.
    spare: Vec<Rc<Memory>>,
}

impl PoolInner {
    fn give_back(&self, mut memory: Rc<Memory>) {
        debug_assert_eq!(Rc::strong_count(&memory), 1);
        if cfg!(poison_buffers) {
            Memory::poison(&mut memory);
        }
        self.used_bytes.set(self.used_bytes.get() - memory.bytes);
        let class = usize::from(memory.class);
        let keep = if class < CLASSES {
            let few = class < SMALL_CLASSES
                && (self.free.borrow()[class].len() + 1) * memory.bytes <= self.keep_bytes_max / FEW_DIVISOR;
            few || self.kept_bytes.get() + memory.bytes <= self.keep_bytes_max
        } else {
            false
        };
        if keep {
            self.kept_bytes.set(self.kept_bytes.get() + memory.bytes);
            self.free.borrow_mut()[class].push(memory);
        } else if class < SMALL_CLASSES {
            Memory::discard(&mut memory);
            self.small.borrow_mut()[class].spare.push(memory);
        }
    }

    /// Memory for a buffer where none is kept.
    fn more(self: &Rc<Self>, blocks: usize, class: usize) -> Rc<Memory> {
        let bytes = if class < CLASSES { ALIGN << class } else { blocks * ALIGN };
        let mut small = self.small.borrow_mut();
        let Some(small) = small.get_mut(class) else {
            let Some(memory) = Memory::cut(bytes, 1, class as u8, Rc::downgrade(self)).next() else {
                unreachable!("one was cut")
            };
            return memory;
        };
        if small.spare.is_empty() {
            // As many again, so that a small pool stays small.
            let count = small.pieces.clamp(1, SLAB_BYTES_MAX / bytes);
            small.pieces += count;
            small.spare.extend(Memory::cut(bytes, count, class as u8, Rc::downgrade(self)));
        }
        let Some(memory) = small.spare.pop() else { unreachable!("some were cut") };
        memory
    }
}

/// A pool of aligned buffers; clones share it.
#[derive(Clone)]
pub struct BufferPool {
    inner: Rc<PoolInner>,
}

impl BufferPool {
    /// A pool that keeps at most `keep_bytes_max` bytes of free buffers for reuse, and of each size up to 32 KiB a sixteenth of
    /// that. The rest of the memory of free buffers goes back to the system.
    #[must_use]
    pub fn new(keep_bytes_max: usize) -> Self {
        let inner = PoolInner {
            free: RefCell::new(std::array::from_fn(|_| Vec::new())),
            kept_bytes: 0.into(),
            keep_bytes_max,
            used_bytes: 0.into(),
            small: RefCell::default(),
        };
        Self { inner: Rc::new(inner) }
    }

    /// A buffer of at least `bytes` bytes. Its content is unspecified (zeroes or an earlier use's bytes).
    #[must_use]
    pub fn take(&self, bytes: usize) -> Buffer {
        let blocks = bytes.max(1).div_ceil(ALIGN);
        let class = blocks.next_power_of_two().trailing_zeros() as usize;
        let pooled = if class < CLASSES { self.inner.free.borrow_mut()[class].pop() } else { None };
        let mut memory = match pooled {
            Some(memory) => {
                self.inner.kept_bytes.set(self.inner.kept_bytes.get() - memory.bytes);
                memory
            }
            None => self.inner.more(blocks, class),
        };
        if cfg!(poison_buffers) {
            Memory::assert_poisoned(&mut memory);
        }
        self.inner.used_bytes.set(self.inner.used_bytes.get() + memory.bytes);
        Buffer { memory: ManuallyDrop::new(memory) }
    }

    /// A payload for the bytes of `range`, placed so that it can be widened to whole 4 KiB blocks in place
    /// (see [`Payload`]).
    #[must_use]
    pub fn payload_for(&self, range: ByteRange) -> UniquePayload {
        let wide = range.expanded_to(BLOCK_BYTES);
        let buffer = self.take(wide.len as usize);
        UniquePayload { buffer, start: (range.offset - wide.offset) as usize, len: range.len as usize }
    }

    /// Bytes of memory in buffers that are in use.
    #[must_use]
    pub fn used_bytes(&self) -> usize {
        self.inner.used_bytes.get()
    }

    /// Bytes of memory kept free for reuse.
    #[must_use]
    pub fn kept_bytes(&self) -> usize {
        self.inner.kept_bytes.get()
    }
}

impl std::fmt::Debug for BufferPool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BufferPool").field("used_bytes", &self.used_bytes()).finish_non_exhaustive()
    }
}

/// The only handle to an aligned piece of memory.
pub struct Buffer {
    memory: ManuallyDrop<Rc<Memory>>,
}

impl Buffer {
    /// Gives up the right to write; the memory can then be shared.
    #[must_use]
    pub fn share(self) -> SharedBuffer {
        let mut this = ManuallyDrop::new(self);
        // SAFETY: `this` is never used again and its destructor does not run, so the handle moves out once.
        let memory = unsafe { ManuallyDrop::take(&mut this.memory) };
        SharedBuffer { memory: ManuallyDrop::new(memory) }
    }
}

impl Deref for Buffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: the memory is `bytes` long, initialised since its allocation, and lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.memory.start.as_ptr(), self.memory.bytes) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        debug_assert_eq!(Rc::strong_count(&self.memory), 1);
        // SAFETY: as for `deref`; and a `Buffer` is the only handle to its memory, borrowed mutably here.
        unsafe { std::slice::from_raw_parts_mut(self.memory.start.as_ptr(), self.memory.bytes) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: this is the destructor: the handle is not used again.
        release(unsafe { ManuallyDrop::take(&mut self.memory) });
    }
}

/// One of several read-only handles to an aligned piece of memory.
pub struct SharedBuffer {
    memory: ManuallyDrop<Rc<Memory>>,
}

impl SharedBuffer {
    /// Takes the right to write back where this is the last handle.
    ///
    /// # Errors
    /// Gives itself back where other handles are out.
    pub fn into_unique(self) -> Result<Buffer, Self> {
        if Rc::strong_count(&self.memory) != 1 {
            return Err(self);
        }
        let mut this = ManuallyDrop::new(self);
        // SAFETY: as in `Buffer::share`.
        let memory = unsafe { ManuallyDrop::take(&mut this.memory) };
        Ok(Buffer { memory: ManuallyDrop::new(memory) })
    }
}

impl Clone for SharedBuffer {
    fn clone(&self) -> Self {
        Self { memory: ManuallyDrop::new(Rc::clone(&self.memory)) }
    }
}

impl Deref for SharedBuffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: as for `Buffer::deref`; no handle that may write exists while this one does.
        unsafe { std::slice::from_raw_parts(self.memory.start.as_ptr(), self.memory.bytes) }
    }
}

impl Drop for SharedBuffer {
    fn drop(&mut self) {
        // SAFETY: this is the destructor: the handle is not used again.
        release(unsafe { ManuallyDrop::take(&mut self.memory) });
    }
}

fn release(memory: Rc<Memory>) {
    if planted(Bug::ReuseBufferEarly) && Rc::strong_count(&memory) > 1 {
        // Somebody else's bytes appear under the handles that are left.
        // SAFETY: the memory is `bytes` long and lives; in the simulator's one thread no slice of it is held while a
        // handle is dropped.
        unsafe { std::ptr::write_bytes(memory.start.as_ptr(), 0xa5, memory.bytes) };
        return;
    }
    if Rc::strong_count(&memory) == 1
        && let Some(pool) = memory.pool.upgrade()
    {
        pool.give_back(memory);
    }
}

/// Bytes within a buffer that may still be written: what a client's WRITE is received into.
///
/// Made by [`BufferPool::payload_for`], `start` equals the range's offset modulo 4096 and the buffer reaches
/// to the end of the last 4 KiB block, so a read-modify-write can fill the edges in place.
pub struct UniquePayload {
    /// The memory.
    pub buffer: Buffer,
    /// First byte of the payload in it.
    pub start: usize,
    /// Bytes of payload.
    pub len: usize,
}

impl UniquePayload {
    /// The payload's bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.buffer[self.start..self.start + self.len]
    }

    /// The payload's bytes, to be written.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.buffer[self.start..self.start + self.len]
    }

    /// Gives up the right to write.
    #[must_use]
    pub fn share(self) -> Payload {
        Payload { start: self.start, len: self.len, buffer: self.buffer.share() }
    }
}

/// Bytes within a shared buffer: what a device write sends or a read's reply carries.
#[derive(Clone)]
pub struct Payload {
    /// The memory.
    pub buffer: SharedBuffer,
    /// First byte of the payload in it.
    pub start: usize,
    /// Bytes of payload.
    pub len: usize,
}

impl Payload {
    /// The payload's bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.buffer[self.start..self.start + self.len]
    }
}

macro_rules! opaque_debug {
    ($($name:ty),*) => {$(
        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, concat!(stringify!($name), "(..)"))
            }
        }
    )*};
}
opaque_debug!(Buffer, SharedBuffer, UniquePayload, Payload);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_returns_to_the_pool_with_the_last_handle() {
        let pool = BufferPool::new(1 << 20);
        let mut buffer = pool.take(5000);
        assert_eq!(buffer.len(), 8192);
        assert_eq!(buffer.as_ptr().align_offset(4096), 0);
        buffer[7] = 9;
        let (a, b) = {
            let shared = buffer.share();
            (shared.clone(), shared)
        };
        let a = a.into_unique().unwrap_err();
        drop(b);
        assert_eq!(pool.used_bytes(), 8192);
        let unique = a.into_unique().unwrap();
        assert_eq!(unique[7], 9);
        drop(unique);
        assert_eq!((pool.used_bytes(), pool.kept_bytes()), (0, 8192));
        let again = pool.take(8192);
        assert_eq!((pool.used_bytes(), pool.kept_bytes()), (8192, 0));
        drop(pool);
        drop(again); // outlives its pool: freed, not leaked
    }

    #[test]
    fn small_buffers_share_slabs_and_no_byte() {
        let pool = BufferPool::new(32 << 10);
        let mut out: Vec<Buffer> = Vec::new();
        for index in 0..300 {
            let mut buffer = pool.take(4096 << (index % 5));
            buffer.fill(index as u8);
            assert_eq!(buffer.as_ptr().align_offset(4096), 0);
            out.push(buffer);
            if index % 3 == 2 {
                out.swap_remove(index / 3); // kept, or given to the system
            }
        }
        assert_eq!(out.len(), 200);
        for buffer in &out {
            assert!(buffer.iter().all(|byte| *byte == buffer[0]));
        }
        let used: usize = out.iter().map(|buffer| buffer.len()).sum();
        assert_eq!(pool.used_bytes(), used);
        let pieces = |pool: &BufferPool| pool.inner.small.borrow().each_ref().map(|small| small.pieces);
        let before = pieces(&pool);
        drop(out);
        assert_eq!(pool.used_bytes(), 0);
        assert!(pool.kept_bytes() <= (32 << 10) + SMALL_CLASSES * (2 << 10), "{}", pool.kept_bytes());
        let again: Vec<Buffer> = (0..before[0]).map(|_| pool.take(1)).collect();
        assert_eq!(pieces(&pool), before, "what was given back is used again");
        drop((pool, again));
    }

    #[test]
    #[cfg(not(any(poison_buffers, miri)))]
    fn what_is_not_kept_goes_back_to_the_system() {
        let pool = BufferPool::new(0);
        let mut buffer = pool.take(4096);
        buffer.fill(7);
        drop(buffer);
        assert_eq!(pool.kept_bytes(), 0);
        assert!(pool.take(4096).iter().all(|byte| *byte == 0), "it has its content still");
    }

    #[test]
    #[cfg(poison_buffers)]
    fn free_memory_is_poisoned() {
        let pool = BufferPool::new(1 << 20);
        let mut buffer = pool.take(4096);
        assert!(buffer.iter().all(|byte| *byte == POISON));
        buffer.fill(1);
        drop(buffer);
        assert!(pool.take(4096).iter().all(|byte| *byte == POISON));
    }

    #[test]
    #[cfg(poison_buffers)]
    #[should_panic(expected = "a free buffer of 8192 bytes was written to, at Some(4097)")]
    fn a_late_write_into_free_memory_is_noticed() {
        let pool = BufferPool::new(1 << 20);
        let buffer = pool.take(8192);
        let kept_too_long = buffer.memory.start; // as the kernel would after an early give-back
        drop(buffer);
        // SAFETY: the pool keeps the memory allocated, and nobody else looks at it now.
        unsafe { kept_too_long.add(4097).write(1) };
        let _ = pool.take(8192);
    }

    #[test]
    fn payloads_stand_where_their_edges_can_be_filled() {
        let pool = BufferPool::new(0);
        let payload = pool.payload_for(ByteRange::new(4095, 2));
        assert_eq!((payload.start, payload.len, payload.buffer.len()), (4095, 2, 8192));
    }
}
