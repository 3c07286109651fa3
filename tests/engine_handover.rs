//! The hand-over from other threads to the engine's: connections, commands and a stop, from many threads at once.
//!
//! What must hold: what is posted gets exactly one answer, or (only when a stop was asked for) the clear sign that the
//! engine has ended; a connection handed over is served or closed; nothing waits for ever; no descriptor stays open.
//!
//! What is done follows from the seed, when it happens does not. `NBDMIRROR_HANDOVER_SEED=7` runs that seed only,
//! `NBDMIRROR_HANDOVER_SEEDS=100` a hundred.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

#[path = "support/rng.rs"]
#[allow(dead_code, reason = "shared")]
mod rng;
#[path = "engine_support/mod.rs"]
mod support;

use std::fmt::Debug;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nbdmirror::engine::{AdminRequest, EngineHandle, MEMORY_BYTES_MAX_DEFAULT};
use nbdmirror::nbd::export::Export;
use nbdmirror::units::ReplicaSlot;
use rng::Rng;
use support::{Client, FLUSH, READ, WRITE, World, hand_over, header, open_replica};
use tokio::sync::oneshot::Receiver;
use tokio::sync::oneshot::error::TryRecvError;
use uuid::Uuid;

const THREADS: u64 = 8;
/// Things that one thread does in a run.
const STEPS: u64 = 60;
/// Longest wait for anything. An orderly stop may wait 5 s for clients that take no replies.
const WAIT_MAX: Duration = Duration::from_secs(60);
/// Bytes that belong to one thread: what it has written there and been told so is what it must read.
const OWN_BYTES: u64 = 1 << 20;
const BLOCK_BYTES: usize = 4096;

/// Descriptors are counted per process: one test at a time.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn open_descriptors() -> Vec<String> {
    let name = |entry: std::io::Result<std::fs::DirEntry>| {
        let path = entry.unwrap().path();
        // The folder that is being listed is gone by now.
        std::fs::read_link(&path).ok().map(|to| format!("{}: {}", path.display(), to.display()))
    };
    std::fs::read_dir("/proc/self/fd").unwrap().filter_map(name).collect()
}

fn from_environment(name: &str) -> Option<u64> {
    Some(std::env::var(name).ok()?.parse().expect("a number"))
}

/// What all threads of a run share.
struct Shared<'a> {
    world: &'a World,
    handle: EngineHandle,
    /// Set before the stop is posted: from here on "it has ended" is an answer.
    stop_asked: AtomicBool,
    /// Steps done by all threads.
    steps: AtomicU64,
    /// After how many of them the stop comes.
    stop_at: u64,
    answered: AtomicU64,
    ended: AtomicU64,
}

/// An answer that is waited for.
struct Asked<T> {
    what: &'static str,
    receiver: Receiver<T>,
    /// It was posted before anybody asked for the stop: it must be answered.
    before_stop: bool,
}

impl<T: Debug> Asked<T> {
    /// Waits for the one answer; `None` where the engine ended without, as it may.
    fn wait(mut self, shared: &Shared) -> Option<T> {
        let deadline = Instant::now() + WAIT_MAX;
        loop {
            match self.receiver.try_recv() {
                Ok(answer) => {
                    shared.answered.fetch_add(1, Ordering::Relaxed);
                    return Some(answer);
                }
                Err(TryRecvError::Closed) => {
                    assert!(!self.before_stop, "{}: lost, nobody had asked for a stop", self.what);
                    shared.ended.fetch_add(1, Ordering::Relaxed);
                    return None;
                }
                Err(TryRecvError::Empty) => {
                    assert!(Instant::now() < deadline, "{}: no answer in {WAIT_MAX:?}", self.what);
                    std::thread::sleep(Duration::from_micros(100));
                }
            }
        }
    }
}

/// One thread and what it keeps open.
struct Worker<'a> {
    shared: &'a Shared<'a>,
    index: u64,
    rng: Rng,
    clients: Vec<Client>,
    /// The writer of each of its blocks, as acknowledged.
    written: Vec<u64>,
}

impl<'a> Worker<'a> {
    fn new(shared: &'a Shared<'a>, index: u64, seed: u64) -> Self {
        let blocks = OWN_BYTES as usize / BLOCK_BYTES;
        let rng = Rng::new(seed * 1000 + index);
        Self { shared, index, rng, clients: Vec::new(), written: vec![0; blocks] }
    }

    fn run(mut self) {
        for step in 0..STEPS {
            if self.shared.steps.fetch_add(1, Ordering::SeqCst) == self.shared.stop_at {
                self.stop();
            }
            match self.rng.below(100) {
                0..30 => self.connect_and_die(),
                30..50 => self.connect_and_use(),
                50..60 => self.use_an_old_connection(),
                60..80 => self.ask_status(),
                80..90 => self.admin(),
                90..93 => self.add(step),
                93..96 => drop(self.shared.handle.status()), // asks and does not wait
                _ => drop(self.shared.handle.admin(AdminRequest::Fail(ReplicaSlot::new(6)))),
            }
        }
        for client in &mut self.clients {
            // Each is closed by the engine at the stop: see the end of `run_seed`.
            client.stream.set_read_timeout(Some(WAIT_MAX)).unwrap();
            self.shared.wait_for_stop();
            client.expect_end();
        }
    }

    fn ask<T>(&self, what: &'static str, post: impl FnOnce(&EngineHandle) -> Receiver<T>) -> Asked<T> {
        let receiver = post(&self.shared.handle);
        // Looked at after it was posted: whoever asks for a stop sets this first.
        let before_stop = !self.shared.stop_asked.load(Ordering::SeqCst);
        Asked { what, receiver, before_stop }
    }

    fn stop(&mut self) {
        self.shared.stop_asked.store(true, Ordering::SeqCst);
        for _ in 0..=self.rng.below(2) {
            drop(self.shared.handle.stop());
        }
    }

    fn ask_status(&mut self) {
        let asked = self.ask("status", EngineHandle::status);
        if let Some(status) = asked.wait(self.shared) {
            assert!(!status.volume.replicas.is_empty());
        }
    }

    fn admin(&mut self) {
        let slot = ReplicaSlot::new(self.rng.below(5) as usize);
        let request = if self.rng.chance(60) { AdminRequest::Fail(slot) } else { AdminRequest::Remove(slot) };
        // Refused or done: both are answers. The last replica in sync is never given up.
        self.ask("fail or remove", |handle| handle.admin(request)).wait(self.shared);
    }

    fn add(&mut self, step: u64) {
        let device = open_replica(self.shared.world.dir.path(), &format!("c{}-{step}", self.index));
        let add = AdminRequest::Add { device, found: None, force: false, fresh_uuid: Uuid::new_v4() };
        let asked = self.ask("add", |handle| handle.admin(add));
        if self.rng.chance(70) {
            asked.wait(self.shared);
        }
    }

    /// Connections whose peer goes before, while or just after they are handed over.
    fn connect_and_die(&mut self) {
        let mut leftover = match self.rng.below(5) {
            0 => Vec::new(),
            1 => vec![0xff; 100], // no request
            2 => header(WRITE, 0, 1, self.own_offset(0), 300_000)[..20].to_vec(), // half a header
            3 => header(WRITE, 0, 1, self.own_offset(0), 300_000).to_vec(), // a payload that does not come
            _ => header(READ, 0, 1, 0, 200_000).repeat(4), // replies that nobody takes
        };
        if self.rng.chance(20) {
            leftover.extend(header(FLUSH, 0, 2, 0, 0));
        }
        match self.rng.below(3) {
            0 => drop(self.shared.world.connect_with(leftover)),
            1 => {
                let client = self.shared.world.connect_with(leftover);
                client.stream.shutdown(std::net::Shutdown::Write).unwrap();
                std::thread::sleep(Duration::from_micros(self.rng.below(300)));
            }
            _ => {
                let mut client = self.shared.world.connect_with(Vec::new());
                let _ = client.stream.write(&leftover);
                std::thread::yield_now();
            }
        }
    }

    fn connect_and_use(&mut self) {
        let mut client = self.shared.world.connect();
        if self.use_client(&mut client) && self.clients.len() < 4 && self.rng.chance(50) {
            self.clients.push(client);
        }
    }

    fn use_an_old_connection(&mut self) {
        if let Some(mut client) = self.clients.pop()
            && self.use_client(&mut client)
        {
            self.clients.push(client);
        }
    }

    /// A write and a read of it; `false` where the connection was closed, which only a stop may do.
    fn use_client(&mut self, client: &mut Client) -> bool {
        let block = self.rng.below(self.written.len() as u64) as usize;
        let (offset, maker) = (self.own_offset(block), self.rng.next());
        let content = |maker: u64| maker.to_le_bytes().repeat(BLOCK_BYTES / 8);
        let mut bytes = header(WRITE, 0, 3, offset, BLOCK_BYTES as u32).to_vec();
        bytes.extend(content(maker));
        let mut back = vec![0; BLOCK_BYTES];
        let done = exchange(&mut client.stream, &bytes, &mut []).and_then(|()| {
            self.written[block] = maker;
            let read = header(READ, 0, 4, offset, BLOCK_BYTES as u32);
            exchange(&mut client.stream, &read, &mut back)
        });
        match done {
            Ok(()) => assert!(back == content(maker), "block {block} of thread {}", self.index),
            Err(error) => {
                assert!(self.shared.stop_asked.load(Ordering::SeqCst), "closed, nobody had asked: {error}");
            }
        }
        done.is_ok()
    }

    fn own_offset(&self, block: usize) -> u64 {
        self.index * OWN_BYTES + (block * BLOCK_BYTES) as u64
    }
}

impl Shared<'_> {
    fn wait_for_stop(&self) {
        let deadline = Instant::now() + WAIT_MAX;
        while !self.stop_asked.load(Ordering::SeqCst) {
            assert!(Instant::now() < deadline, "nobody stops it");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// NBD's ESHUTDOWN.
const ESHUTDOWN: u32 = 108;

/// Sends one request and takes its reply with its payload. An error where the connection ends, or where the request is
/// refused because the engine stops; for nothing else a request is refused.
fn exchange(stream: &mut UnixStream, request: &[u8], payload: &mut [u8]) -> Result<(), std::io::ErrorKind> {
    let mut reply = [0; 16];
    let mut steps = || {
        stream.write_all(request)?;
        stream.read_exact(&mut reply)?;
        if reply[4..8] == ESHUTDOWN.to_be_bytes() {
            return Err(std::io::ErrorKind::ConnectionAborted.into());
        }
        assert_eq!(reply[4..8], [0; 4], "an error");
        stream.read_exact(payload)
    };
    let kind = steps().map_err(|error| error.kind());
    assert!(kind != Err(std::io::ErrorKind::WouldBlock), "it hangs");
    kind
}

/// One run; gives how many answers there were and how many times "it has ended".
fn run_seed(seed: u64) -> (u64, u64) {
    println!("NBDMIRROR_HANDOVER_SEED={seed}");
    let before = open_descriptors();
    let world = World::new(MEMORY_BYTES_MAX_DEFAULT);
    let shared = Shared {
        world: &world,
        handle: world.engine.handle.clone(),
        stop_asked: false.into(),
        steps: 0.into(),
        stop_at: Rng::new(seed).below(THREADS * STEPS),
        answered: 0.into(),
        ended: 0.into(),
    };
    std::thread::scope(|scope| {
        for index in 0..THREADS {
            let worker = Worker::new(&shared, index, seed);
            scope.spawn(move || worker.run());
        }
    });
    let counts = (shared.answered.load(Ordering::SeqCst), shared.ended.load(Ordering::SeqCst));
    let handle = shared.handle.clone();
    drop(shared);
    let World { dir, engine, export } = world;
    let report = engine.join().unwrap();
    assert!(report.clean, "{}", report.message);
    assert_over(&handle, &export);
    drop((handle, dir));
    let after = open_descriptors();
    assert!(after.len() == before.len(), "descriptors: before {before:#?}, after {after:#?}");
    counts
}

/// An engine that has ended says so at once, and closes what it is given.
fn assert_over(handle: &EngineHandle, export: &Arc<Export>) {
    assert_eq!(handle.status().try_recv().unwrap_err(), TryRecvError::Closed);
    assert_eq!(handle.stop().try_recv().unwrap_err(), TryRecvError::Closed);
    let fail = AdminRequest::Fail(ReplicaSlot::new(0));
    assert_eq!(handle.admin(fail).try_recv().unwrap_err(), TryRecvError::Closed);
    let mut client = hand_over(handle, export, Vec::new());
    client.expect_end();
}

#[test]
fn everything_handed_over_is_answered_once_or_told_that_it_is_over() {
    let _alone = alone();
    let seeds = match from_environment("NBDMIRROR_HANDOVER_SEED") {
        Some(seed) => seed..seed + 1,
        None => 1..1 + from_environment("NBDMIRROR_HANDOVER_SEEDS").unwrap_or(12),
    };
    let (mut answered, mut ended) = (0, 0);
    for seed in seeds {
        let counts = run_seed(seed);
        (answered, ended) = (answered + counts.0, ended + counts.1);
    }
    println!("{answered} answers, {ended} times told that it is over");
    assert!(answered > 0);
}

/// A lost wake-up leaves a message asleep in an engine that has nothing else to do: each thread has one message
/// under way at a time, so there is nobody who would wake it later.
#[test]
fn no_message_is_left_asleep() {
    const MESSAGES: u64 = 3000;
    let _alone = alone();
    let world = World::new(MEMORY_BYTES_MAX_DEFAULT);
    for threads in 1..=2 {
        std::thread::scope(|scope| {
            for index in 0..threads {
                let (handle, mut rng) = (&world.engine.handle, Rng::new(index));
                scope.spawn(move || {
                    for message in 0..MESSAGES {
                        let mut answer = handle.status();
                        let deadline = Instant::now() + WAIT_MAX;
                        while answer.try_recv().is_err() {
                            assert!(Instant::now() < deadline, "message {message} sleeps");
                            std::thread::yield_now();
                        }
                        for _ in 0..rng.below(2000) {
                            std::hint::spin_loop();
                        }
                    }
                });
            }
        });
    }
    world.stop();
}

/// The engine is started and stopped with posts from both sides of each.
#[test]
fn a_stop_that_comes_at_once_is_one_too() {
    let _alone = alone();
    let before = open_descriptors();
    for connections in 0..6 {
        let world = World::new(MEMORY_BYTES_MAX_DEFAULT);
        let clients: Vec<Client> = (0..connections).map(|_| world.connect()).collect();
        let statuses: Vec<_> = (0..connections).map(|_| world.engine.handle.status()).collect();
        let (_dir, report, _) = world.stop();
        assert!(report.clean, "{}", report.message);
        for status in statuses {
            status.blocking_recv().expect("asked before the stop");
        }
        for mut client in clients {
            client.expect_end();
        }
    }
    assert_eq!(open_descriptors().len(), before.len());
}
