//! A disk that records: an NBD server in the test's memory, shown as a file by nbdfuse, that can be a replica.
//!
//! ```text
//!  daemon ─► file ─► nbdfuse ─► reader: content changes, DiskBegan ─► pending ─► replier: DiskEnded, reply
//! ```
//!
//! What must hold: a file on FUSE passes each write on at once, as it is, and turns a durable write into a write and a
//! flush; a test looks that it does. Replies come late and in any order, so that cuts fall between them.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use tempfile::TempDir;

use super::daemon::folder;
use super::recorder::{DiskOp, Event, Recorder};
use super::rng::Rng;
use super::tools::{Beside, missing, wait_for};

const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const OPTION_ABORT: u32 = 2;
const OPTION_GO: u32 = 7;
const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const REPLY_ERR_UNSUP: u32 = 0x8000_0001;
/// Transmission flags: flags are there, flush, FUA, trim, write zeroes.
const TRANSMISSION_FLAGS: u16 = 1 | 1 << 2 | 1 << 3 | 1 << 5 | 1 << 6;
const COMMAND_FUA: u16 = 1;
const REQUEST_BYTES_MAX: usize = 32 << 20;

/// What the server's threads share.
#[derive(Debug)]
struct Shared {
    disk: usize,
    content: Mutex<Vec<u8>>,
    recorder: Recorder,
    closing: AtomicBool,
}

/// A request that was carried out and has no reply yet.
#[derive(Debug)]
struct Pending {
    cookie: u64,
    data: Vec<u8>,
    /// Index of its `DiskBegan`; reads have none.
    began: Option<usize>,
}

#[derive(Debug, Default)]
struct Queue {
    pending: Mutex<(Vec<Pending>, bool)>,
    changed: Condvar,
}

/// The disk; its file goes when this is dropped.
#[derive(Debug)]
pub(crate) struct RecordedDisk {
    // Dropped after the file's server has gone, see `drop`.
    fuse: Option<Beside>,
    server: Option<JoinHandle<()>>,
    shared: Arc<Shared>,
    socket: PathBuf,
    _dir: TempDir,
    /// The file that is the disk.
    pub(crate) path: PathBuf,
}

impl RecordedDisk {
    /// What must be installed and accessible for such a disk; the reason where it is not.
    pub(crate) fn unavailable() -> Option<String> {
        if let Some(tool) = missing(&["nbdfuse", "fusermount3"]) {
            return Some(format!("{tool} is not installed"));
        }
        let fuse = fs::OpenOptions::new().read(true).write(true).open("/dev/fuse");
        fuse.err().map(|error| format!("/dev/fuse: {error}"))
    }

    /// The disk of this number, with this content; `seed` decides how late it replies, and in which order.
    pub(crate) fn new(disk: usize, content: Vec<u8>, recorder: &Recorder, seed: u64) -> Self {
        let dir = folder();
        let (socket, path) = (dir.path().join("s"), dir.path().join(["a.img", "b.img"][disk]));
        let size_bytes = content.len() as u64;
        let content = Mutex::new(content);
        let shared = Shared { disk, content, recorder: recorder.clone(), closing: AtomicBool::new(false) };
        let shared = Arc::new(shared);
        let listener = UnixListener::bind(&socket).unwrap();
        let server = std::thread::spawn({
            let shared = Arc::clone(&shared);
            move || accept(&listener, &shared, seed)
        });
        fs::File::create(&path).unwrap();
        let args = ["-C".as_ref(), "1".as_ref(), path.as_os_str(), "--unix".as_ref(), socket.as_os_str()];
        let fuse = Beside::start("nbdfuse", args, &dir.path().join("nbdfuse.log"));
        let made = Self { fuse: Some(fuse), server: Some(server), shared, socket, _dir: dir, path };
        let shown = || fs::metadata(&made.path).is_ok_and(|file| file.len() == size_bytes);
        wait_for("nbdfuse", Duration::from_secs(10), shown);
        made
    }
}

impl Drop for RecordedDisk {
    fn drop(&mut self) {
        drop(self.fuse.take());
        self.shared.closing.store(true, Ordering::Relaxed);
        // Wakes the server from waiting for a connection.
        drop(UnixStream::connect(&self.socket));
        let ended = self.server.take().map(JoinHandle::join);
        if matches!(ended, Some(Err(_))) && !std::thread::panicking() {
            panic!("the recording disk panicked");
        }
    }
}

fn accept(listener: &UnixListener, shared: &Shared, seed: u64) {
    loop {
        let (mut stream, _) = listener.accept().unwrap();
        if shared.closing.load(Ordering::Relaxed) {
            return;
        }
        let size_bytes = shared.content.lock().unwrap().len() as u64;
        if !matches!(negotiate(&mut stream, size_bytes), Ok(true)) {
            continue;
        }
        let queue = Queue::default();
        std::thread::scope(|scope| {
            scope.spawn(|| reply(&mut stream.try_clone().unwrap(), shared, &queue, seed));
            // Ends with an error where nbdfuse just goes.
            let _ = receive(&mut stream.try_clone().unwrap(), shared, &queue);
            queue.pending.lock().unwrap().1 = true;
            queue.changed.notify_all();
        });
    }
}

/// Fixed newstyle up to `GO`; whether requests follow.
fn negotiate(stream: &mut UnixStream, size_bytes: u64) -> io::Result<bool> {
    let mut greeting = Vec::new();
    greeting.extend_from_slice(&NBDMAGIC.to_be_bytes());
    greeting.extend_from_slice(&IHAVEOPT.to_be_bytes());
    // FIXED_NEWSTYLE and NO_ZEROES.
    greeting.extend_from_slice(&3u16.to_be_bytes());
    stream.write_all(&greeting)?;
    stream.read_exact(&mut [0; 4])?;
    loop {
        let mut header = [0; 16];
        stream.read_exact(&mut header)?;
        let option = u32::from_be_bytes(header[8..12].try_into().unwrap());
        let len = u32::from_be_bytes(header[12..16].try_into().unwrap()) as usize;
        stream.read_exact(&mut vec![0; len.min(1 << 16)])?;
        let mut answer = |kind: u32, data: &[u8]| {
            let mut bytes = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
            bytes.extend_from_slice(&option.to_be_bytes());
            bytes.extend_from_slice(&kind.to_be_bytes());
            bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
            bytes.extend_from_slice(data);
            stream.write_all(&bytes)
        };
        match option {
            OPTION_GO => {
                let mut export = vec![0, 0];
                export.extend_from_slice(&size_bytes.to_be_bytes());
                export.extend_from_slice(&TRANSMISSION_FLAGS.to_be_bytes());
                answer(REPLY_INFO, &export)?;
                answer(REPLY_ACK, &[])?;
                return Ok(true);
            }
            OPTION_ABORT => return answer(REPLY_ACK, &[]).map(|()| false),
            _ => answer(REPLY_ERR_UNSUP, &[])?,
        }
    }
}

/// Carries out requests as they come and queues their replies; until the client goes.
fn receive(stream: &mut UnixStream, shared: &Shared, queue: &Queue) -> io::Result<()> {
    loop {
        let mut header = [0; 28];
        stream.read_exact(&mut header)?;
        let flags = u16::from_be_bytes(header[4..6].try_into().unwrap());
        let command = u16::from_be_bytes(header[6..8].try_into().unwrap());
        let cookie = u64::from_be_bytes(header[8..16].try_into().unwrap());
        let offset = u64::from_be_bytes(header[16..24].try_into().unwrap());
        let len = u32::from_be_bytes(header[24..28].try_into().unwrap()) as usize;
        let mut payload = vec![0; if command == 1 { len.min(REQUEST_BYTES_MAX) } else { 0 }];
        stream.read_exact(&mut payload)?;
        let fua = flags & COMMAND_FUA != 0;
        let mut pending = Pending { cookie, data: Vec::new(), began: None };
        let mut log = shared.recorder.log();
        let mut content = shared.content.lock().unwrap();
        let touched = offset as usize..offset as usize + len;
        let op = match command {
            0 => {
                pending.data = content[touched].to_vec();
                None
            }
            1 => {
                content[touched].copy_from_slice(&payload);
                Some(DiskOp::Write { offset, data: log.keep(&payload), fua })
            }
            3 => Some(DiskOp::Flush),
            4 | 6 => {
                content[touched].fill(0);
                Some(DiskOp::Zero { offset, len: len as u64, fua })
            }
            _ => return Ok(()),
        };
        pending.began = op.map(|op| log.push(Event::DiskBegan { disk: shared.disk, op }));
        drop((content, log));
        queue.pending.lock().unwrap().0.push(pending);
        queue.changed.notify_one();
    }
}

/// Replies to what is pending, in any order, until the client has gone.
fn reply(stream: &mut UnixStream, shared: &Shared, queue: &Queue, seed: u64) {
    let mut rng = Rng::new(seed ^ shared.disk as u64);
    loop {
        let mut state = queue.pending.lock().unwrap();
        while state.0.is_empty() {
            if state.1 {
                return;
            }
            state = queue.changed.wait(state).unwrap();
        }
        // Others may come while this one is late.
        let late_us = rng.pick(&[0, 0, 0, 50, 200, 1000]);
        if late_us > 0 {
            drop(state);
            std::thread::sleep(Duration::from_micros(late_us));
            state = queue.pending.lock().unwrap();
        }
        let chosen = rng.below(state.0.len() as u64) as usize;
        let pending = state.0.swap_remove(chosen);
        drop(state);
        if let Some(began) = pending.began {
            shared.recorder.log().push(Event::DiskEnded { disk: shared.disk, began });
        }
        let mut bytes = SIMPLE_REPLY_MAGIC.to_be_bytes().to_vec();
        bytes.extend_from_slice(&0u32.to_be_bytes());
        bytes.extend_from_slice(&pending.cookie.to_be_bytes());
        bytes.extend_from_slice(&pending.data);
        if stream.write_all(&bytes).is_err() {
            return;
        }
    }
}
