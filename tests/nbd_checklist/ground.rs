//! What a section's cases stand on: one daemon, a range that nobody writes again, fresh ranges for each case, and the
//! judgement after each case that nothing was harmed.
//!
//! ```text
//!  0         1 MiB      16 MiB                     1 GiB                    end - 16 MiB      6 GiB
//!  │ kept     │  daily   │  fresh ranges, in turn    │  large, not compared    │  the end        │
//! ```
//!
//! What must hold: `kept` is written once, before the first case, and every client after every case reads it back
//! whole; when all cases are over the daemon has let go of every connection, stayed within its memory, stops in order,
//! and its replicas agree.

use std::cell::Cell;
use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use super::link::{Link, Mode};
use super::raw::{FIXED_NEWSTYLE, NO_ZEROES, Raw};
use crate::support::daemon::{Daemon, NAME, Volume};
use crate::support::rng::mix;

pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const GIB: u64 = 1 << 30;
/// The volume's size, bytes: beyond what 32 bits can address.
pub(crate) const SIZE: u64 = 6 * GIB;
/// Where the range that nobody writes again ends.
const KEPT_END: u64 = MIB;
const FRESH: u64 = 16 * MIB;
/// For requests of more than 32 bits; not compared between the replicas.
pub(crate) const LARGE: u64 = GIB;
const END: u64 = SIZE - 16 * MIB;
/// What a daemon may hold: its budget for requests (256 MiB by default), its own code and structures.
const RSS_KIB_MAX: u64 = (256 + 96) << 10;
/// The volume's name.
pub(crate) const EXPORT: &[u8] = NAME.as_bytes();
const _: () = assert!(LARGE < END && FRESH > KEPT_END);

/// A section's daemon.
pub(crate) struct Ground {
    volume: Volume,
    daemon: Daemon,
    /// The form of headers and replies that cases use unless they say otherwise.
    pub(crate) mode: Mode,
    fresh: Cell<u64>,
    descriptors_at_start: usize,
}

/// Bytes that depend on their place and on `seed`.
pub(crate) fn pattern(seed: u64, offset: u64, len: u64) -> Vec<u8> {
    let words = (offset / 8..(offset + len).div_ceil(8)).flat_map(|word| mix(mix(seed) ^ word).to_le_bytes());
    words.skip((offset % 8) as usize).take(len as usize).map(|byte| byte | 1).collect()
}

/// What the range that nobody writes again holds.
pub(crate) fn kept(offset: u64, len: u64) -> Vec<u8> {
    assert!(offset + len <= KEPT_END);
    pattern(0, offset, len)
}

impl Ground {
    /// A new volume, served on a Unix socket and on TCP.
    pub(crate) fn new(mode: Mode) -> Self {
        let mut volume = Volume::new(SIZE, &[]);
        volume.serve_args = ["--listen", "127.0.0.1:0"].map(String::from).to_vec();
        let daemon = volume.start();
        let mut ground = Self { volume, daemon, mode, fresh: Cell::new(FRESH), descriptors_at_start: 0 };
        let mut link = ground.link_in(Mode::Simple);
        link.write(0, &kept(0, KEPT_END));
        link.leave();
        ground.descriptors_at_start = ground.descriptors();
        ground
    }

    /// The same volume, served for reading only by a new daemon.
    pub(crate) fn read_only(self) -> Self {
        let Self { mut volume, daemon, mode, .. } = self;
        daemon.terminate();
        volume.serve_args.push("--read-only".into());
        let daemon = volume.start();
        let mut ground = Self { volume, daemon, mode, fresh: Cell::new(FRESH), descriptors_at_start: 0 };
        ground.descriptors_at_start = ground.descriptors();
        ground
    }

    /// A new connection of which nothing has been read or sent.
    pub(crate) fn raw(&self) -> Raw {
        Raw::dial(&self.daemon.socket)
    }

    /// The same over TCP.
    pub(crate) fn raw_tcp(&self) -> Raw {
        let printed = self.daemon.printed();
        let (_, rest) = printed.split_once("nbd://").expect("the daemon says where it serves");
        Raw::dial_tcp(rest.split('/').next().unwrap())
    }

    /// A new connection past its client flags.
    pub(crate) fn haggling(&self) -> Raw {
        self.raw().hello(FIXED_NEWSTYLE | NO_ZEROES)
    }

    /// A new connection in transmission, in the section's form.
    pub(crate) fn link(&self) -> Link {
        self.link_in(self.mode)
    }

    /// A new connection in transmission.
    pub(crate) fn link_in(&self, mode: Mode) -> Link {
        Link::open(self.haggling(), mode, EXPORT, &[])
    }

    /// A new connection in transmission with metadata contexts.
    pub(crate) fn link_with(&self, contexts: &[&str]) -> Link {
        Link::open(self.haggling(), self.mode, EXPORT, contexts)
    }

    /// The first byte of `len` bytes that nobody has written, aligned to 64 KiB, with a gap before and after.
    pub(crate) fn range(&self, len: u64) -> u64 {
        const ALIGN: u64 = 64 << 10;
        let offset = self.fresh.get() + ALIGN;
        self.fresh.set((offset + len).next_multiple_of(ALIGN) + ALIGN);
        assert!(self.fresh.get() <= LARGE, "the cases of a section have used up their ranges");
        offset
    }

    /// A range of `len` bytes that has been written with `pattern(seed, ..)`; its first byte.
    pub(crate) fn written(&self, seed: u64, len: u64) -> u64 {
        let offset = self.range(len);
        let mut link = self.link_in(Mode::Simple);
        link.write(offset, &pattern(seed, offset, len));
        offset
    }

    /// Asserts that a new client is served and that what was written before is there.
    pub(crate) fn unharmed(&self) {
        let mut link = self.link_in(Mode::Simple);
        assert_eq!(link.size, SIZE);
        assert!(link.read(0, KEPT_END) == kept(0, KEPT_END), "data written before is not intact");
        let today = pattern(self.fresh.get(), 2 * MIB, 4096);
        link.write(2 * MIB, &today);
        assert!(link.read(2 * MIB, 4096) == today, "data written now is not there");
        link.leave();
    }

    /// The process that serves.
    pub(crate) fn is_alive(&self) -> bool {
        // A process that has ended and is not waited for has no descriptors to list.
        self.descriptors() > 0
    }

    /// Open descriptors of the daemon.
    pub(crate) fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.daemon.pid())).map_or(0, Iterator::count)
    }

    /// A line of the daemon's `/proc/PID/status` that counts KiB.
    fn status_kib(&self, field: &str) -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.daemon.pid())).unwrap();
        let line = text.lines().find(|line| line.starts_with(field)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    /// The daemon's memory, KiB.
    pub(crate) fn rss_kib(&self) -> u64 {
        self.status_kib("VmRSS:")
    }

    /// Bytes that each replica's file takes on its filesystem.
    pub(crate) fn allocated_bytes(&self) -> Vec<u64> {
        use std::os::unix::fs::MetadataExt as _;
        self.volume.replicas.iter().map(|path| std::fs::metadata(path).unwrap().blocks() * 512).collect()
    }

    /// Waits until the daemon holds no more descriptors than before the first case.
    pub(crate) fn let_go(&self) {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let now = self.descriptors();
            if now <= self.descriptors_at_start {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "{now} descriptors, {} at the start",
                self.descriptors_at_start
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The judgement when all cases are over.
    pub(crate) fn close(self) {
        self.let_go();
        let peak = self.status_kib("VmHWM:");
        assert!(peak <= RSS_KIB_MAX, "the daemon has held {peak} KiB");
        let printed = self.daemon.printed();
        assert!(!printed.contains("panicked"), "{printed}");
        self.daemon.terminate();
        for range in [0..self.fresh.get(), END..SIZE] {
            assert_replicas_agree(&self.volume, range);
        }
    }
}

fn assert_replicas_agree(volume: &Volume, range: std::ops::Range<u64>) {
    const STEP: u64 = MIB;
    let files: Vec<_> = volume.replicas.iter().map(|path| std::fs::File::open(path).unwrap()).collect();
    for offset in range.step_by(STEP as usize) {
        let [a, b] = [0, 1].map(|index| {
            let mut bytes = vec![0; STEP as usize];
            files[index].read_exact_at(&mut bytes, offset).unwrap();
            bytes
        });
        assert!(a == b, "the replicas differ between {offset} and {}", offset + STEP);
    }
}
