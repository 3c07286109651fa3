//! The engine on real files, spoken to by sockets in the transmission phase: what a client can see.
#![allow(clippy::unwrap_used, reason = "a test")]

#[path = "engine_support/mod.rs"]
mod support;

use std::io::Write;
use std::net::Shutdown;
use std::path::PathBuf;
use std::time::Duration;

use nbdmirror::engine::{Access, AdminRequest, MEMORY_BYTES_MAX_DEFAULT, ReplicaDevice};
use nbdmirror::format::read::read_found;
use nbdmirror::units::ReplicaSlot;
use support::{
    Client, DISC, FLUSH, FUA, NO_HOLE, READ, TRIM, VOLUME_BYTES, WRITE, WRITE_ZEROES, World, header,
    open_replica,
};
use uuid::Uuid;

/// Bytes that tell their place and their maker.
fn pattern(len: usize, seed: u64) -> Vec<u8> {
    (0..len as u64).map(|i| ((i * 31 + (i >> 8) * 7 + seed * 131) % 251) as u8).collect()
}

#[test]
fn every_command_works_at_every_size() {
    let world = World::new(MEMORY_BYTES_MAX_DEFAULT);
    let mut client = world.connect();
    let mut expected = vec![0; VOLUME_BYTES as usize];
    let sizes = [1, 511, 512, 4096, 4097, 65_536, 65_537, 262_144, 1 << 20, (1 << 20) + 13, 32 << 20];
    for (index, len) in sizes.into_iter().enumerate() {
        let offset = if len == 32 << 20 { 32 << 20 } else { index * (2 << 20) + index % 3 * 1000 };
        let data = pattern(len, index as u64);
        client.write(offset as u64, &data);
        expected[offset..offset + len].copy_from_slice(&data);
        assert!(client.read(offset as u64, len) == data, "{len} bytes");
    }
    client.do_simple(WRITE_ZEROES, 0, 4 << 20, 1 << 20);
    client.do_simple(WRITE_ZEROES, NO_HOLE | FUA, (40 << 20) + 5, 70_000);
    expected[4 << 20..5 << 20].fill(0);
    expected[(40 << 20) + 5..(40 << 20) + 70_005].fill(0);
    client.do_simple(TRIM, 0, 60 << 20, 4 << 20);
    client.do_simple(FLUSH, 0, 0, 0);
    client.send(WRITE, FUA, 5, 100, 3, b"fua");
    assert_eq!(client.reply(), (5, 0));
    expected[100..103].copy_from_slice(b"fua");
    for kind in [READ, WRITE, TRIM, WRITE_ZEROES] {
        client.do_simple(kind, 0, VOLUME_BYTES, 0);
    }
    assert!(client.read(0, 32 << 20) == expected[..32 << 20]);
    client.send(DISC, 0, 0, 0, 0, &[]);
    client.expect_end();
    let (_dir, report, data) = world.stop();
    assert!(report.clean, "{}", report.message);
    assert!(data[..60 << 20] == expected[..60 << 20]);
}

#[test]
fn refused_requests_are_skipped_and_the_stream_stays_in_step() {
    let world = World::new(MEMORY_BYTES_MAX_DEFAULT);
    let mut client = world.connect();
    let data = pattern(300_000, 1);
    let mut bytes = Vec::new();
    bytes.extend_from_slice(&header(WRITE, 0, 1, VOLUME_BYTES - 1, 300_000));
    bytes.extend_from_slice(&data);
    bytes.extend_from_slice(&header(99, 0, 2, 0, 0));
    bytes.extend_from_slice(&header(READ, 0x8000, 3, 0, 10));
    bytes.extend_from_slice(&header(WRITE, 0, 4, 0, 3));
    bytes.extend_from_slice(b"abc");
    bytes.extend_from_slice(&header(READ, 0, 5, VOLUME_BYTES, 1));
    client.stream.write_all(&bytes).unwrap();
    let mut replies: Vec<_> = (0..5).map(|_| client.reply()).collect();
    replies.sort_unstable();
    assert_eq!(replies, [(1, 28), (2, 22), (3, 22), (4, 0), (5, 22)]);
    assert_eq!(client.read(0, 3), b"abc");
    world.stop();
}

#[test]
fn bytes_may_come_in_any_pieces() {
    let world = World::new(MEMORY_BYTES_MAX_DEFAULT);
    let mut stream = Vec::new();
    for cookie in 0..8 {
        stream.extend_from_slice(&header(WRITE, 0, cookie, cookie * 8192, 777));
        stream.extend_from_slice(&pattern(777, cookie));
    }
    for piece in [1, 27, 28, 29, 500] {
        let mut client = world.connect_with(stream[..piece].to_vec());
        for bytes in stream[piece..].chunks(piece) {
            client.stream.write_all(bytes).unwrap();
            if piece < 100 {
                std::thread::sleep(Duration::from_micros(10));
            }
        }
        let mut cookies: Vec<_> = (0..8).map(|_| client.reply()).collect();
        cookies.sort_unstable();
        assert_eq!(cookies, (0..8).map(|cookie| (cookie, 0)).collect::<Vec<_>>());
        assert!(client.read(3 * 8192, 777) == pattern(777, 3));
    }
    world.stop();
}

#[test]
fn more_requests_than_are_taken_at_once_are_all_answered_once() {
    let world = World::new(MEMORY_BYTES_MAX_DEFAULT);
    let mut client = world.connect();
    for block in 0..256 {
        client.write(block * 4096, &pattern(4096, block));
    }
    let count = 5000_u64;
    let mut sender = Client { stream: client.stream.try_clone().unwrap() };
    let thread = std::thread::spawn(move || {
        for cookie in 0..count {
            sender.send(READ, 0, cookie, cookie % 256 * 4096, 4096, &[]);
        }
    });
    std::thread::sleep(Duration::from_millis(100)); // replies pile up
    let mut seen = vec![false; count as usize];
    for _ in 0..count {
        let (cookie, error) = client.reply();
        assert_eq!(error, 0);
        assert!(!std::mem::replace(&mut seen[cookie as usize], true));
        assert!(client.payload(4096) == pattern(4096, cookie % 256));
    }
    thread.join().unwrap();
    world.stop();
}

#[test]
fn a_bad_client_costs_its_own_connection() {
    let world = World::new(MEMORY_BYTES_MAX_DEFAULT);
    let mut good = world.connect();
    let mut garbage = world.connect();
    garbage.stream.write_all(&[0x55; 1000]).unwrap();
    garbage.expect_end();
    // Vanishes with writes in flight and one half sent: whole ones are carried out.
    let mut gone = world.connect();
    for block in 0..32 {
        gone.send(WRITE, 0, block, (1 << 20) + block * 4096, 4096, &pattern(4096, block));
    }
    gone.send(WRITE, 0, 99, 2 << 20, 100_000, &[1; 1000]);
    drop(gone);
    // Says no more, but wants its replies.
    let mut half = world.connect();
    for cookie in 0..16 {
        half.send(READ, 0, cookie, 0, 4096, &[]);
    }
    half.stream.shutdown(std::net::Shutdown::Write).unwrap();
    for _ in 0..16 {
        assert_eq!(half.reply().1, 0);
        half.payload(4096);
    }
    half.expect_end();
    world.wait_for_connections(1);
    for block in 0..32 {
        assert!(good.read((1 << 20) + block * 4096, 4096) == pattern(4096, block));
    }
    assert!(good.read(2 << 20, 100_000).iter().all(|byte| *byte == 0));
    world.stop();
}

#[test]
fn clients_that_stall_leave_room_for_others() {
    let world = World::new(64 << 20);
    let mut stalled = Vec::new();
    for _ in 0..4 {
        // Half a large write.
        let mut client = world.connect();
        client.send(WRITE, 0, 1, 0, 32 << 20, &[9; 70_000]);
        stalled.push(client);
        // Replies that nobody reads.
        let mut client = world.connect();
        for cookie in 0..64 {
            client.send(READ, 0, cookie, 0, 1 << 20, &[]);
        }
        stalled.push(client);
    }
    std::thread::sleep(Duration::from_millis(200));
    let mut client = world.connect();
    for block in 0..100 {
        client.write(block * 4096, &pattern(4096, block));
        assert!(client.read(block * 4096, 4096) == pattern(4096, block));
    }
    // A large one waits until the stalled ones have been given up (10 s).
    let data = pattern(8 << 20, 3);
    client.write(8 << 20, &data);
    assert!(client.read(8 << 20, 8 << 20) == data);
    let memory_bytes = world.engine.handle.status().blocking_recv().unwrap().memory_bytes;
    assert!(memory_bytes < 100 << 20, "{memory_bytes} bytes");
    drop(stalled);
    world.wait_for_connections(1);
    world.stop();
}

#[test]
fn greedy_clients_share_a_bounded_memory() {
    let world = World::new(16 << 20);
    let flushes: Vec<u8> = (0..20_000).flat_map(|cookie| header(FLUSH, 0, cookie, 0, 0)).collect();
    let mut greedy: Vec<(Client, usize)> = (0..200).map(|_| (world.connect(), 0)).collect();
    for (client, _) in &greedy {
        client.stream.set_nonblocking(true).unwrap();
    }
    // Ask for as much as goes, and read no reply.
    for _ in 0..20 {
        for (client, sent) in &mut greedy {
            while let Ok(count @ 1..) = client.stream.write(&flushes[*sent..]) {
                *sent += count;
            }
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let memory_bytes = world.engine.handle.status().blocking_recv().unwrap().memory_bytes;
    assert!(memory_bytes < 20 << 20, "{memory_bytes} bytes");
    let mut client = world.connect();
    client.write(0, &[1; 4096]);
    drop(greedy);
    world.wait_for_connections(1);
    world.stop();
}

/// A write of 128 KiB of sevens is held back for want of memory; a later one of eights to its beginning is done; then the
/// first one's client leaves in a way, and there is room again. What is read then.
fn after_a_client_leaves_while_held_back(leave: Shutdown) -> Vec<u8> {
    let world = World::new(4 << 20);
    let mut full = world.connect();
    full.send(READ, 0, 1, 0, 4 << 20, &[]);
    assert_eq!(full.reply(), (1, 0)); // its payload stands in the way
    let mut leaver = world.connect();
    leaver.send(WRITE, 0, 2, 0, 128 << 10, &[7; 128 << 10]);
    let mut other = world.connect();
    other.write(0, &[8; 4096]);
    leaver.stream.shutdown(leave).unwrap();
    full.payload(4 << 20);
    if leave == Shutdown::Write {
        assert_eq!(leaver.reply(), (2, 0));
    }
    world.wait_for_connections(2);
    let read = other.read(0, 8192);
    world.stop();
    read
}

#[test]
fn what_is_held_back_is_dropped_when_its_client_has_hung_up() {
    // It may have sent it again elsewhere, and newer writes after it.
    let read = after_a_client_leaves_while_held_back(Shutdown::Both);
    assert!(read == [[8; 4096], [0; 4096]].concat(), "{:?}", &read[..2]);
    // One that sends nothing more and goes on listening is served.
    let read = after_a_client_leaves_while_held_back(Shutdown::Write);
    assert!(read == [7; 8192], "{:?}", &read[..2]);
}

#[test]
fn a_stop_answers_what_is_in_flight_and_leaves_a_clean_volume() {
    let world = World::new(MEMORY_BYTES_MAX_DEFAULT);
    let mut client = world.connect();
    let mut silent = world.connect();
    for block in 0..64 {
        client.send(WRITE, 0, block, block * 4096, 4096, &pattern(4096, block));
    }
    for block in 0..64 {
        assert_eq!(client.reply().1, 0, "{block}");
    }
    let handle = world.engine.handle.clone();
    let (dir, report, data) = world.stop();
    assert!(report.clean, "{}", report.message);
    client.expect_end();
    silent.expect_end();
    assert!(data[63 * 4096..64 * 4096] == pattern(4096, 63));
    // Nobody is there any more: answers end, connections are closed.
    handle.status().blocking_recv().unwrap_err();
    handle.stop().blocking_recv().unwrap_err();
    let devices = ["b", "a"].map(|name| open_replica(dir.path(), name));
    let world = World::start(dir, devices, MEMORY_BYTES_MAX_DEFAULT);
    let mut client = world.connect();
    assert!(client.read(0, 4096) == pattern(4096, 0));
    let status = world.engine.handle.status().blocking_recv().unwrap();
    assert_eq!(status.volume.unclean_bytes_at_start, 0);
    assert_eq!(status.replicas.iter().flatten().count(), 2);
    world.stop();
}

#[test]
fn a_stop_does_not_wait_for_ever_for_clients_that_do_not_read() {
    let world = World::new(MEMORY_BYTES_MAX_DEFAULT);
    let mut deaf = world.connect();
    for cookie in 0..20 {
        deaf.send(READ, 0, cookie, 0, 1 << 20, &[]);
    }
    let mut unfinished = world.connect();
    unfinished.send(WRITE, 0, 1, 0, 1 << 20, &[1; 100_000]);
    std::thread::sleep(Duration::from_millis(100));
    let before = std::time::Instant::now();
    let (_dir, report, _) = world.stop();
    assert!(report.clean, "{}", report.message);
    assert!((5..20).contains(&before.elapsed().as_secs()));
}

#[test]
fn a_connection_that_was_idle_goes_on() {
    let world = World::new(MEMORY_BYTES_MAX_DEFAULT);
    let mut client = world.connect();
    for _ in 0..3 {
        for block in 0..50 {
            client.send(WRITE, 0, block, block * 4096, 4096, &pattern(4096, block));
        }
        for _ in 0..50 {
            assert_eq!(client.reply().1, 0);
        }
        std::thread::sleep(Duration::from_millis(4200)); // its large buffer is taken back
        assert!(client.read(7 * 4096, 4096) == pattern(4096, 7));
    }
    world.stop();
}

#[test]
fn a_replica_leaves_and_comes_back_while_a_client_writes() {
    let world = World::new(MEMORY_BYTES_MAX_DEFAULT);
    let mut client = world.connect();
    client.write(0, &pattern(100_000, 1));
    let failed = world.engine.handle.admin(AdminRequest::Fail(ReplicaSlot::new(1)));
    failed.blocking_recv().unwrap().unwrap();
    client.write(50_000, &pattern(100_000, 2));
    // Detached: its lock is free.
    let open = || ReplicaDevice::open(&world.dir.path().join("b"), Access::ReadWrite);
    let device = (0..400)
        .find_map(|_| {
            std::thread::sleep(Duration::from_millis(5));
            open().ok()
        })
        .unwrap();
    let found = read_found("b", device.traits.device_bytes, &mut |offset, bytes: &mut [u8]| {
        device.read_at(offset, bytes)
    })
    .unwrap();
    let add = AdminRequest::Add { device, found, force: false, fresh_uuid: Uuid::new_v4() };
    let added = world.engine.handle.admin(add);
    client.write(200_000, &pattern(100_000, 3));
    added.blocking_recv().unwrap().unwrap();
    let in_sync = || {
        let status = world.engine.handle.status().blocking_recv().unwrap();
        status.volume.health == nbdmirror::mirror::status::Health::Healthy
    };
    assert!((0..2000).any(|_| {
        std::thread::sleep(Duration::from_millis(5));
        in_sync()
    }));
    client.write(300_000, &pattern(100_000, 4));
    let (_dir, report, data) = world.stop();
    assert!(report.clean, "{}", report.message);
    assert!(data[50_000..150_000] == pattern(100_000, 2));
    assert!(data[300_000..400_000] == pattern(100_000, 4));
}

#[test]
fn a_device_is_taken_in_once() {
    let world = World::new(MEMORY_BYTES_MAX_DEFAULT);
    let path: PathBuf = world.dir.path().join("a");
    ReplicaDevice::open(&path, Access::ReadWrite).unwrap_err();
    let refused = world.engine.handle.admin(AdminRequest::Fail(ReplicaSlot::new(7)));
    assert!(refused.blocking_recv().unwrap().is_err());
    world.stop();
}
