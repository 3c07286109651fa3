//! The core allocates nothing in steady state: counted by the test binary's own allocator.
//!
//! What must hold: once as much is in flight as ever was, a request of a client costs no allocation and no
//! reallocation in `src/mirror`, whatever its kind, healthy or degraded. (Buffers come from the pool.)
#![allow(clippy::unwrap_used, reason = "a test")]

#[path = "core_driver/mod.rs"]
mod core_driver;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use core_driver::{CoreDriver, Health, Random};
use nbdmirror::mirror::event::Request;
use nbdmirror::units::{ByteRange, SECOND_NS};

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

/// The system's allocator, counting what each thread asks of it.
struct Counting;

// SAFETY: every call goes to `System` as it came, which keeps the contract; counting neither allocates nor panics (the
// thread-local is a constant without a destructor).
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, start: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
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

const VOLUME_BYTES: u64 = 1 << 30;
const DEPTH: usize = 32;
const REQUESTS: u64 = 4000;

/// Makes the next request, from a number that counts them.
type Next = fn(&CoreDriver, u64, &mut Random) -> Request;

fn block(number: u64) -> ByteRange {
    ByteRange::new(number % (VOLUME_BYTES / 4096) * 4096, 4096)
}

fn random_block(random: &mut Random) -> ByteRange {
    block(random.below(VOLUME_BYTES / 4096))
}

fn write(driver: &CoreDriver, range: ByteRange, fua: bool) -> Request {
    Request::Write { offset: range.offset, data: driver.payload(range), fua }
}

/// Inside one block, over an edge, or over several.
fn unaligned(random: &mut Random) -> ByteRange {
    ByteRange::new(random.below(VOLUME_BYTES - 65536), 1 + random.below(10_000))
}

fn zeroes(range: ByteRange, fua: bool) -> Request {
    Request::WriteZeroes { range, may_unmap: true, fast: false, fua }
}

const WORKS: &[(&str, Next)] = &[
    ("random reads", |_, _, random| Request::Read { range: random_block(random) }),
    ("sequential reads", |_, number, _| Request::Read { range: block(number) }),
    ("random writes", |driver, _, random| write(driver, random_block(random), false)),
    ("sequential writes", |driver, number, _| write(driver, block(number), false)),
    ("writes with FUA", |driver, _, random| write(driver, random_block(random), true)),
    ("large writes", |driver, _, random| {
        write(driver, ByteRange::new(random.below(500) << 20, 1 << 20), false)
    }),
    ("unaligned reads", |_, _, random| Request::Read { range: unaligned(random) }),
    ("unaligned writes", |driver, _, random| write(driver, unaligned(random), false)),
    ("one block over and over", |driver, number, _| write(driver, block(number % 3), false)),
    ("writes and a flush each", |driver, number, random| {
        if number.is_multiple_of(2) { Request::Flush } else { write(driver, random_block(random), false) }
    }),
    ("zeroes", |_, _, random| zeroes(unaligned(random), false)),
    ("zeroes with FUA", |_, _, random| zeroes(random_block(random), true)),
    ("trims", |_, _, random| Request::Trim { range: unaligned(random), fua: false }),
    ("prefetches", |_, _, random| Request::Cache { range: random_block(random) }),
    ("a mixture", |driver, _, random| match random.below(8) {
        0 | 1 => Request::Read { range: random_block(random) },
        2 => Request::Read { range: unaligned(random) },
        3 | 4 => write(driver, random_block(random), false),
        5 => write(driver, unaligned(random), true),
        6 => zeroes(unaligned(random), true),
        _ => Request::Flush,
    }),
];

/// Sends `REQUESTS` requests; how many allocations that takes.
fn run(driver: &mut CoreDriver, next: Next, random: &mut Random) -> u64 {
    let (before, answered) = (ALLOCATIONS.get(), driver.answered);
    for number in 0..REQUESTS {
        let request = next(driver, number, random);
        driver.submit(DEPTH, request);
    }
    driver.drain();
    assert_eq!(driver.answered - answered, REQUESTS);
    ALLOCATIONS.get() - before
}

fn allocations_of_all(health: Health) -> Vec<String> {
    let mut driver = CoreDriver::new(VOLUME_BYTES, 512, health);
    let mut random = Random(1);
    let mut found = Vec::new();
    for (name, next) in WORKS {
        for _ in 0..3 {
            run(&mut driver, *next, &mut random);
        }
        let allocations = run(&mut driver, *next, &mut random);
        if allocations > 0 {
            found.push(format!("{name}: {allocations} allocations in {REQUESTS} requests"));
        }
    }
    found
}

#[test]
fn a_healthy_volume_allocates_nothing_in_steady_state() {
    let found = allocations_of_all(Health::Healthy);
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn a_degraded_volume_allocates_nothing_in_steady_state() {
    let found = allocations_of_all(Health::Degraded);
    assert!(found.is_empty(), "{found:#?}");
}

/// A bit is set by its region's first write and cleared when the region has been idle: that may allocate for each
/// page that is committed and for each sweep, not for each write.
#[test]
fn setting_and_clearing_intent_bits_allocates_by_the_page() {
    let mut driver = CoreDriver::new(VOLUME_BYTES, 512, Health::Healthy);
    let mut random = Random(1);
    let next: Next = |driver, number, _| write(driver, block(number * 64), false);
    let mut allocations = 0;
    for _ in 0..5 {
        allocations = run(&mut driver, next, &mut random);
        driver.idle(20 * SECOND_NS);
    }
    assert!(allocations <= 10, "{allocations} allocations in {REQUESTS} writes to clean regions");
}
