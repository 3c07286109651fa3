//! The engine allocates nothing for a request in steady state: counted by the test binary's own allocator.
//!
//! What must hold: once as much is in flight as ever was, a read or a write of 4 KiB costs the data plane's thread no
//! allocation and no reallocation, from the bytes of its header to those of its reply, on a tmpfs (plain system calls) and on
//! another filesystem (the ring), with simple and with structured replies. One test alone: all threads but its own are counted.
#![allow(clippy::unwrap_used, reason = "a test")]

#[path = "engine_support/mod.rs"]
mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io::{Read, Write};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use nbdmirror::engine::MEMORY_BYTES_MAX_DEFAULT;
use nbdmirror::nbd::export::{Negotiated, ReplyMode};
use support::{Client, READ, VOLUME_BYTES, WRITE, World, header};

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

thread_local! {
    /// Set on the test's own thread, whose clients allocate.
    static NOT_COUNTED: Cell<bool> = const { Cell::new(false) };
}

/// The system's allocator, counting what other threads than the test's ask of it.
struct Counting;

impl Counting {
    fn count() {
        if !NOT_COUNTED.get() {
            ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        }
    }
}

// SAFETY: every call goes to `System` as it came, which keeps the contract; counting neither allocates nor panics (the
// thread-local is a constant without a destructor).
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::count();
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        Self::count();
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, start: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        Self::count();
        // SAFETY: the caller's promise is passed on.
        unsafe { System.realloc(start, layout, bytes) }
    }
    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(start, layout) };
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

const BLOCK: usize = 4096;
const DEPTH: u64 = 32;
const ROUNDS: u64 = 60;
/// What timers may allocate meanwhile: a look at idle connections (every 2 s), idle regions whose bits are cleared (5 s).
const TIMERS_MAX: u64 = ROUNDS / 2;

/// Sends `ROUNDS` times `DEPTH` requests in one piece and takes their replies, each of `reply_bytes`.
fn run(client: &mut Client, kind: u16, reply_bytes: usize) {
    let mut replies = vec![0; reply_bytes * DEPTH as usize];
    for round in 0..ROUNDS {
        let mut bytes = Vec::new();
        for index in 0..DEPTH {
            let offset = (round * DEPTH + index) * 7919 * BLOCK as u64 % VOLUME_BYTES;
            bytes.extend_from_slice(&header(kind, 0, index, offset, BLOCK as u32));
            if kind == WRITE {
                // Zeroes would come back as a hole.
                bytes.resize(bytes.len() + BLOCK, 1 + round as u8);
            }
        }
        client.stream.write_all(&bytes).unwrap();
        client.stream.read_exact(&mut replies).unwrap();
    }
}

/// How many allocations the other threads make for that in steady state.
fn allocations_of(client: &mut Client, kind: u16, reply_bytes: usize) -> u64 {
    run(client, kind, reply_bytes);
    run(client, kind, reply_bytes);
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    run(client, kind, reply_bytes);
    ALLOCATIONS.load(Ordering::Relaxed) - before
}

#[test]
fn the_engine_allocates_nothing_for_small_requests_in_steady_state() {
    NOT_COUNTED.set(true);
    let shared_memory = Path::new("/dev/shm");
    let mut dirs = vec![tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()];
    dirs.extend(shared_memory.is_dir().then(|| tempfile::tempdir_in(shared_memory).unwrap()));
    for dir in dirs {
        let place = dir.path().display().to_string();
        let world = World::new_in(dir, MEMORY_BYTES_MAX_DEFAULT);
        // Behind the head of a reply to READ, and of one to WRITE.
        for (mode, read, write) in [(ReplyMode::Simple, 16, 16), (ReplyMode::Structured, 20 + 8, 20)] {
            let mut client = world.connect_as(Negotiated { mode, ..Negotiated::default() });
            let writes = allocations_of(&mut client, WRITE, write);
            let reads = allocations_of(&mut client, READ, read + BLOCK);
            // None for a request, and none for a turn: there are at least as many turns as rounds.
            assert!(reads < TIMERS_MAX && writes < TIMERS_MAX, "{reads}, {writes}; {mode:?}, {place}");
        }
        world.stop();
    }
}
