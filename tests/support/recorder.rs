//! The write log: one order over everything that happens on the disks under a daemon and between it and its clients.
//!
//! ```text
//!  clients ── Asked ──► daemon ──► file (nbdfuse) ──► RecordedDisk ── DiskBegan ──► contents
//!     ◄────── Answered ───┘                               └────────── DiskEnded ──► reply
//!                 └──────────────► one Log, one lock ◄──────────────┘
//! ```
//!
//! What must hold: an event is in the log before anybody can act on it (a disk's content changes under the log's lock; a
//! reply, of a disk or to a request, is noted before it is sent respectively after it was received). So what a cut
//! between two events leaves is what a power cut at that moment could leave, and a promise seen in the log was made.

use std::fs;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};

use serde::{Deserialize, Serialize};

/// The number of disks under a recorded daemon.
pub(crate) const DISKS: usize = 2;

/// Some of the log's bytes.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Blob {
    at: usize,
    len: usize,
}

/// What a disk was asked to do.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) enum DiskOp {
    /// These bytes stand at `offset`; `fua`: on stable storage when it ends.
    Write { offset: u64, data: Blob, fua: bool },
    /// Zeroes, by a write of zeroes or by a trim.
    Zero { offset: u64, len: u64, fua: bool },
    /// What had ended when it began is on stable storage when it ends.
    Flush,
}

/// What a client asked the daemon.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) enum Request {
    /// The bytes are `unique_bytes` of the event's index.
    Write { offset: u64, len: u64, fua: bool },
    /// Zeroes.
    Zeroes { offset: u64, len: u64, fua: bool },
    /// Gives the range up: it may read as zeroes from then on, or as before.
    Trim { offset: u64, len: u64 },
    /// Everything answered before is durable when it is answered.
    Flush,
    /// What it brought stands in its answer.
    Read { offset: u64, len: u64 },
}

/// One thing that happened. Events are named by their index in the log.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Event {
    /// The disks hold this, all of it durable: at the start and after a power cut. Ends every request in flight.
    PowerOn { images: [Blob; DISKS] },
    /// A disk was given an operation, and its content changed.
    DiskBegan { disk: usize, op: DiskOp },
    /// The operation that began at this event has ended.
    DiskEnded { disk: usize, began: usize },
    /// A client is about to send a request.
    Asked(Request),
    /// The request asked at this event was answered, with an NBD error or 0 for success.
    Answered { asked: usize, error: u32, data: Option<Blob> },
    /// The daemon died; ends every request in flight.
    DaemonGone,
    /// What the operator did.
    Note(String),
}

/// All events in their order, with their bytes.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Log {
    /// The events.
    pub(crate) events: Vec<Event>,
    #[serde(skip)]
    bytes: Vec<u8>,
}

impl Log {
    /// A log that begins with these contents of the disks.
    pub(crate) fn new(images: &[Vec<u8>; DISKS]) -> Self {
        let mut log = Self::default();
        log.power_on(images);
        log
    }

    /// Notes what happened; the event's index.
    pub(crate) fn push(&mut self, event: Event) -> usize {
        self.events.push(event);
        self.events.len() - 1
    }

    /// Notes that the disks hold `images` from now on.
    pub(crate) fn power_on(&mut self, images: &[Vec<u8>; DISKS]) -> usize {
        let images = std::array::from_fn(|disk| self.keep(&images[disk]));
        self.push(Event::PowerOn { images })
    }

    /// Keeps bytes that an event will name.
    pub(crate) fn keep(&mut self, bytes: &[u8]) -> Blob {
        let at = self.bytes.len();
        self.bytes.extend_from_slice(bytes);
        Blob { at, len: bytes.len() }
    }

    /// The bytes of `blob`.
    pub(crate) fn bytes(&self, blob: Blob) -> &[u8] {
        &self.bytes[blob.at..blob.at + blob.len]
    }

    /// Forgets what happened from event `cut` on.
    pub(crate) fn cut_short(&mut self, cut: usize) {
        self.events.truncate(cut);
    }

    /// The newest time that the disks were set, looking back from `cut`.
    pub(crate) fn powered_on(&self, cut: usize) -> usize {
        let set = |event: &Event| matches!(event, Event::PowerOn { .. });
        self.events[..cut].iter().rposition(set).expect("a log begins with the disks' contents")
    }

    /// The cuts just behind each flush of a disk that has ended, within `cuts`.
    pub(crate) fn flush_boundaries(&self, cuts: Range<usize>) -> Vec<usize> {
        let flush = |index: usize| matches!(self.events[index], Event::DiskBegan { op: DiskOp::Flush, .. });
        let ended = |event: &Event| matches!(event, Event::DiskEnded { began, .. } if flush(*began));
        cuts.filter(|cut| *cut > 0 && ended(&self.events[*cut - 1])).collect()
    }

    /// Number of requests answered so far.
    pub(crate) fn answers(&self) -> usize {
        self.events.iter().filter(|event| matches!(event, Event::Answered { .. })).count()
    }

    /// Writes the log to a folder, to replay it later.
    pub(crate) fn save(&self, folder: &Path) -> io::Result<()> {
        fs::create_dir_all(folder)?;
        fs::write(folder.join("events.json"), serde_json::to_vec(self)?)?;
        fs::write(folder.join("bytes"), &self.bytes)
    }

    /// Reads what [`Log::save`] wrote.
    pub(crate) fn load(folder: &Path) -> io::Result<Self> {
        let log: Self = serde_json::from_slice(&fs::read(folder.join("events.json"))?)?;
        Ok(Self { bytes: fs::read(folder.join("bytes"))?, ..log })
    }
}

/// A log that several threads write to.
#[derive(Clone, Debug)]
pub(crate) struct Recorder(Arc<Mutex<Log>>);

impl Recorder {
    /// Goes on with `log`.
    pub(crate) fn new(log: Log) -> Self {
        Self(Arc::new(Mutex::new(log)))
    }

    /// The log, for this thread alone while the guard lives.
    pub(crate) fn log(&self) -> MutexGuard<'_, Log> {
        self.0.lock().unwrap()
    }

    /// What the operator does next.
    pub(crate) fn note(&self, what: &str) {
        self.log().push(Event::Note(what.to_owned()));
    }
}
