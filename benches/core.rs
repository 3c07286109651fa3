//! The core's step: what `Mirror::handle` costs, over devices that do nothing.
//!
//! One iteration is one whole request in steady state: it comes, its device operations end, it is answered. The
//! number of steps (calls of `handle`) that takes stands in the name; divide by it for the cost of one.
#![allow(clippy::unwrap_used, unreachable_pub, missing_docs, reason = "a benchmark")]

#[path = "../tests/core_driver/mod.rs"]
mod core_driver;
mod support;

use core_driver::{CoreDriver, Health, Random};
use criterion::{Criterion, criterion_group, criterion_main};
use nbdmirror::format::layout::Layout;
use nbdmirror::mirror::event::Request;
use nbdmirror::units::{ByteRange, SECOND_NS};
use support::ThreadTime;

const VOLUME_BYTES: u64 = 10 << 30;
const REGION_BYTES: u64 = 1 << 20;
const SCATTERED_BYTES: u64 = 64 << 40;

fn random_block(random: &mut Random) -> ByteRange {
    ByteRange::new(random.below(VOLUME_BYTES / 4096) * 4096, 4096)
}

fn write(driver: &CoreDriver, range: ByteRange) -> Request {
    Request::Write { offset: range.offset, data: driver.payload(range), fua: false }
}

/// A driver whose regions are dirty all, so that no write waits for a bit, and stay so.
fn warm(volume_bytes: u64, health: Health) -> CoreDriver {
    let region_bytes = Layout::default_region_bytes(volume_bytes);
    let mut driver = CoreDriver::with_intent_idle(volume_bytes, 512, health, 1_000_000 * SECOND_NS);
    for region in 0..volume_bytes / region_bytes {
        let request = write(&driver, ByteRange::new(region * region_bytes, 4096));
        driver.submit(4096, request);
    }
    driver.drain();
    driver
}

type Next = fn(&CoreDriver, &mut Random, u64) -> Request;

/// Times `next` at `depth`, and puts the steps that a request takes into the name.
fn bench(criterion: &mut Criterion<ThreadTime>, name: &str, health: Health, depth: usize, next: Next) {
    bench_over(criterion, warm(VOLUME_BYTES, health), &format!("{name}, {health:?}"), depth, next);
}

fn bench_over(
    criterion: &mut Criterion<ThreadTime>,
    mut driver: CoreDriver,
    name: &str,
    depth: usize,
    next: Next,
) {
    let mut random = Random(1);
    let mut number = 0;
    let mut submit = |driver: &mut CoreDriver| {
        number += 1;
        let request = next(driver, &mut random, number);
        driver.submit(depth, request);
    };
    let count = 2 * depth.max(1000) as u64;
    for _ in 0..count {
        submit(&mut driver);
    }
    let before = driver.steps;
    for _ in 0..count {
        submit(&mut driver);
    }
    let steps = (driver.steps - before) as f64 / count as f64;
    let label = format!("{name}, {depth} in flight, {steps:.2} steps");
    criterion.bench_function(&label, |bencher| bencher.iter(|| submit(&mut driver)));
    driver.drain();
}

fn requests(criterion: &mut Criterion<ThreadTime>) {
    let read: Next = |_, random, _| Request::Read { range: random_block(random) };
    let sequential: Next =
        |_, _, number| Request::Read { range: ByteRange::new(number * 4096 % VOLUME_BYTES, 4096) };
    let random_write: Next = |driver, random, _| write(driver, random_block(random));
    for health in [Health::Healthy, Health::Degraded] {
        bench(criterion, "read", health, 32, read);
        bench(criterion, "write", health, 32, random_write);
    }
    let health = Health::Healthy;
    bench(criterion, "sequential read", health, 32, sequential);
    bench(criterion, "unaligned write", health, 32, |driver, random, _| {
        write(driver, ByteRange::new(random.below(VOLUME_BYTES - 8192), 5000))
    });
    bench(criterion, "read", health, 1, read);
    bench(criterion, "write", health, 1, random_write);
    // The overlap lookup, which is to cost no more with many in flight.
    bench(criterion, "read", health, 10_000, read);
    bench(criterion, "write", health, 10_000, random_write);
    bench(criterion, "write in one 1 MiB", health, 10_000, |driver, random, _| {
        write(driver, ByteRange::new(random.below(256) * 4096, 4096))
    });
}

/// Writes that fall each into another of 2^21 regions: what stands in memory for a region is not in the cache.
fn scattered(criterion: &mut Criterion<ThreadTime>) {
    let next: Next =
        |driver, random, _| write(driver, ByteRange::new(random.below(SCATTERED_BYTES / 4096) * 4096, 4096));
    let driver = warm(SCATTERED_BYTES, Health::Healthy);
    bench_over(criterion, driver, "write, scattered over 2^21 regions", 32, next);
}

/// Sixty-four writes to clean regions of one bitmap page, and the clearing of their bits later.
fn intent(criterion: &mut Criterion<ThreadTime>) {
    let mut driver = CoreDriver::new(VOLUME_BYTES, 512, Health::Healthy);
    criterion.bench_function("intent: 64 bits set and cleared", |bencher| {
        bencher.iter(|| {
            for region in 0..64 {
                let request = write(&driver, ByteRange::new(region * REGION_BYTES, 4096));
                driver.submit(64, request);
            }
            driver.drain();
            driver.idle(20 * SECOND_NS);
        });
    });
}

criterion_group!(name = benches; config = support::criterion(); targets = requests, scattered, intent);
criterion_main!(benches);
