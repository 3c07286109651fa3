//! The core itself: bytes decide what clients, an operator, devices and the clock do to a small volume, in what order.
//!
//! What must hold, besides the core's own invariants after every event:
//! - Each request and each command is answered once; each device operation is on an attached replica, within it, aligned
//!   to what it can do, and its buffer does not change while it is in flight.
//! - Promises 1 and 2: intent bits stand on every replica in sync before data goes to one, and a replica that missed a
//!   write is recorded so before the write is answered.
//! - A read returns what `register` allows, also after kills of the process at any point and after errors anywhere.
//! - Where no device failed, no request fails, a killed volume starts again, and after an orderly stop all replicas in sync
//!   hold the same bytes, and those are right.
//! - When errors stop, everything that was asked is answered.
//!
//! Here devices have no cache (a write that was answered is durable): lost caches, torn sectors and old copies are the
//! simulator's. What this adds is an order of events that coverage has chosen, and not chance.

use nbdmirror::units::ByteRange;
use nix::errno::Errno;

use super::input::Input;
use super::world::{Landing, VOLUME_BYTES, World};

/// Events that one input may cause, far more than it should.
const STEPS_MAX: u32 = 5000;
/// Requests in flight.
const REQUESTS_MAX: usize = 12;

pub fn run(data: &[u8]) {
    super::plant_bug();
    let mut input = Input::new(data);
    let replicas = 1 + input.index(3);
    let mut world = World::new(replicas, &mut input);
    while !input.is_empty() && world.runs() {
        step(&mut input, &mut world);
    }
    if world.runs() {
        settle(&mut world);
        world.check_settled();
        world.stop();
        settle(&mut world);
        world.check_stopped();
    }
}

fn step(input: &mut Input<'_>, world: &mut World) {
    match input.u8() % 16 {
        0..4 => complete(input, world, 0),
        4 => {
            let error = 1 + input.u8() % 3;
            complete(input, world, error);
        }
        5 => drain(world),
        6..8 if world.requests() < REQUESTS_MAX => {
            let (range, fua) = (range(input), input.one_in(4));
            world.write(range, fua);
        }
        8 if world.requests() < REQUESTS_MAX => world.read(range(input)),
        9 if world.requests() < REQUESTS_MAX => {
            let (range, may_unmap, fua) = (range(input), input.one_in(2), input.one_in(4));
            world.zero(range, may_unmap, fua);
        }
        10 if world.requests() < REQUESTS_MAX => {
            let (range, fua) = (range(input), input.one_in(4));
            world.trim(range, fua);
        }
        11 if world.requests() < REQUESTS_MAX => world.flush(),
        12 => {
            let ms = input.pick(&[0, 1, 100, 1000, 6000]);
            world.wait(ms);
        }
        13 => {
            let (kind, which, force) = (input.u8() % 4, input.index(4), input.one_in(2));
            world.operate(kind, which, force);
        }
        14 if input.one_in(2) => world.kill(input),
        _ => world.tick(),
    }
}

/// Anywhere in the volume, in sectors; mostly small, so that requests meet.
fn range(input: &mut Input<'_>) -> ByteRange {
    let sectors = VOLUME_BYTES / 512;
    let first = match input.u8() % 4 {
        0 => input.below(sectors),
        1 => 128 - input.below(10),
        _ => input.below(24),
    };
    let len = match input.u8() % 8 {
        0 => 0,
        1 => input.below(sectors),
        2 => 8,
        _ => 1 + input.below(12),
    };
    ByteRange::new(first * 512, len.min(sectors - first) * 512)
}

/// One operation that is in flight ends: well, or with an error.
fn complete(input: &mut Input<'_>, world: &mut World, error: u8) {
    if world.operations() == 0 {
        return;
    }
    let at = input.index(world.operations().min(200));
    let landing = if error == 0 {
        Landing::Whole
    } else {
        input.pick(&[Landing::Nothing, Landing::Torn, Landing::Whole])
    };
    let result = match error {
        0 => Ok(()),
        1 => Err(Errno::EIO),
        2 => Err(Errno::ENOSPC),
        _ => Err(Errno::ENODEV),
    };
    world.complete(at, landing, result);
}

fn drain(world: &mut World) {
    for _ in 0..STEPS_MAX {
        if world.operations() == 0 {
            return;
        }
        world.complete(0, Landing::Whole, Ok(()));
    }
    panic!("there is no end of operations");
}

/// No errors any more: everything is answered, and nothing is left to do.
fn settle(world: &mut World) {
    for _ in 0..60 {
        drain(world);
        world.wait(500);
    }
    drain(world);
}
