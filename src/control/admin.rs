//! The admin socket's server end: one task a connected operator, one request after the other.
//!
//! What must hold: an operator who sends rubbish, too much, or nothing costs its own connection. What may wait
//! on a disk (opening a device, reading metadata) is done on a thread of its own.

use std::cell::Cell;
use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};
use tokio_uring::net::UnixStream;
use uuid::Uuid;

use super::accept::{Acceptor, Arrival};
use super::failure::Failure;
use super::handshakes::Handshakes;
use super::protocol::{Answer, DaemonStatus, REQUEST_BYTES_MAX, Request, VolumeStatus};
use crate::engine::device::ReplicaDevice;
use crate::engine::{AdminRequest, EngineHandle, StopReport};
use crate::format::Found;
use crate::format::describe::shell_word;
use crate::format::layout::Layout;
use crate::mirror::status::{ReplicaState, ReplicaStatus, Status};
use crate::units::{REPLICAS_MAX, Regions, ReplicaSlot};

/// Most operators at once.
const OPERATORS_MAX: usize = 32;
/// An operator that says nothing for this long is disconnected.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// An operator that does not take its answer within this long is disconnected.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes read at a time.
const READ_BYTES: usize = 4096;

/// Opens the device at a path and reads what stands on it, with all checks that `add` asks for. The second
/// argument is `force`. Runs on a thread of its own.
pub type OpenReplica = fn(&Path, bool) -> Result<(ReplicaDevice, Option<Found>), Failure>;

/// Tells the control plane to stop; the sender gets the result.
pub(super) type StopRequest = oneshot::Sender<Result<StopReport, Failure>>;

/// What every operator's task needs.
pub(super) struct Desk {
    pub(super) engine: EngineHandle,
    pub(super) handshakes: Rc<Handshakes>,
    pub(super) stop: mpsc::Sender<StopRequest>,
    pub(super) open_replica: OpenReplica,
    pub(super) listen: Vec<String>,
    pub(super) control: PathBuf,
    pub(super) started: Instant,
    /// Operators whose request is being answered.
    pub(super) busy: Cell<usize>,
}

/// Accepts operators until it is dropped.
pub(super) async fn accept_operators(acceptor: Acceptor, desk: Rc<Desk>) {
    loop {
        let Arrival { fd, peer, .. } = acceptor.accept().await;
        // Each operator's task holds the desk; this loop does too.
        if Rc::strong_count(&desk) > OPERATORS_MAX {
            tracing::warn!("{peer}: {OPERATORS_MAX} operators are connected; this one is turned away");
            continue;
        }
        tokio_uring::spawn(serve_operator(fd, peer, Rc::clone(&desk)));
    }
}

async fn serve_operator(fd: OwnedFd, peer: String, desk: Rc<Desk>) {
    let stream = UnixStream::from_std(fd.into());
    let mut lines = Lines { stream: &stream, buffer: Vec::new() };
    loop {
        let line = match tokio::time::timeout(IDLE_TIMEOUT, lines.next()).await {
            Ok(Ok(Some(line))) => line,
            Ok(Ok(None)) | Err(_) => break,
            Ok(Err(error)) => {
                let refusal = Failure::new(format!("cannot take this request: {error}"));
                let _ = send(&stream, &refusal.into()).await;
                break;
            }
        };
        let _busy = Busy::new(&desk.busy);
        let answer = match serde_json::from_slice::<Request>(&line) {
            Ok(request) => desk.answer(request).await.unwrap_or_else(Answer::from),
            Err(error) => Failure::new(format!("this request is not understood: {error}"))
                .hint("docs/status-json.md has the requests; is the daemon of another version?")
                .into(),
        };
        if let Err(error) = send(&stream, &answer).await {
            tracing::debug!("{peer}: the operator did not take the answer: {error}");
            break;
        }
    }
    // Ends a read that may be in flight.
    let _ = stream.shutdown(Shutdown::Both);
}

/// Counts an operator whose request is being answered.
struct Busy<'a>(&'a Cell<usize>);

impl<'a> Busy<'a> {
    fn new(count: &'a Cell<usize>) -> Self {
        count.set(count.get() + 1);
        Self(count)
    }
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

async fn send(stream: &UnixStream, answer: &Answer) -> io::Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    match tokio::time::timeout(SEND_TIMEOUT, stream.write_all(line)).await {
        Ok((result, _)) => result,
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    }
}

/// The lines that an operator sends.
struct Lines<'a> {
    stream: &'a UnixStream,
    /// What has come behind the last line.
    buffer: Vec<u8>,
}

impl Lines<'_> {
    /// The next line without its end; `None` when the operator has hung up.
    async fn next(&mut self) -> io::Result<Option<Vec<u8>>> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let rest = self.buffer.split_off(end + 1);
                let mut line = std::mem::replace(&mut self.buffer, rest);
                line.pop();
                return Ok(Some(line));
            }
            if self.buffer.len() > REQUEST_BYTES_MAX {
                return Err(io::Error::other(format!("a line of more than {REQUEST_BYTES_MAX} bytes")));
            }
            let (read, bytes) = self.stream.read(Vec::with_capacity(READ_BYTES)).await;
            match read? {
                0 => return Ok(None),
                count => self.buffer.extend_from_slice(&bytes[..count]),
            }
        }
    }
}

impl Desk {
    async fn answer(&self, request: Request) -> Result<Answer, Failure> {
        match request {
            Request::Status => self.status().await,
            Request::Fail { replica } => {
                let slot = self.slot_of(&replica).await?;
                self.command(AdminRequest::Fail(slot)).await
            }
            Request::Remove { replica } => {
                let slot = self.slot_of(&replica).await?;
                self.command(AdminRequest::Remove(slot)).await
            }
            Request::Add { path, force } => self.add(path, force).await,
            Request::Stop => self.stop().await,
        }
    }

    async fn status(&self) -> Result<Answer, Failure> {
        let engine = self.engine.status().await.map_err(|_| engine_gone())?;
        let status = VolumeStatus::new(self.daemon_status(), engine);
        Ok(Answer { ok: true, status: Some(Box::new(status)), ..Answer::default() })
    }

    /// The daemon's own part of the status.
    pub(super) fn daemon_status(&self) -> DaemonStatus {
        DaemonStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            uptime_s: self.started.elapsed().as_secs(),
            listen: self.listen.clone(),
            control: self.control.display().to_string(),
            handshakes: self.handshakes.count() as u64,
        }
    }

    async fn command(&self, request: AdminRequest) -> Result<Answer, Failure> {
        let result = self.engine.admin(request).await.map_err(|_| engine_gone())?;
        match result {
            Ok(message) => Ok(Answer::done(message)),
            Err(refused) => Err(Failure::new(refused.0)),
        }
    }

    async fn add(&self, path: String, force: bool) -> Result<Answer, Failure> {
        let (open, wanted) = (self.open_replica, path.clone());
        let look = move || Path::new(&wanted).exists().then(|| open(Path::new(&wanted), force));
        let Some(opened) = off_thread(look).await? else {
            return Err(self.nothing_to_add(&path).await);
        };
        let (device, found) = opened?;
        self.command(AdminRequest::Add { device, found, force, fresh_uuid: Uuid::new_v4() }).await
    }

    async fn nothing_to_add(&self, path: &str) -> Failure {
        let failure = Failure::new(format!("{path}: there is no such file or device"));
        let Ok(engine) = self.engine.status().await else { return failure };
        let (volume_bytes, region_bytes) = (engine.volume.size_bytes, engine.volume.region_bytes);
        let needed_bytes = Layout::device_bytes_min(Regions { volume_bytes, region_bytes });
        let word = shell_word(path);
        failure.hint(format!("check the path, or make a blank file first: truncate -s {needed_bytes} {word}"))
    }

    async fn stop(&self) -> Result<Answer, Failure> {
        let (sender, receiver) = oneshot::channel();
        self.stop.send(sender).await.map_err(|_| Failure::new("the volume is stopping already"))?;
        let report = receiver.await.map_err(|_| engine_gone())??;
        let message =
            if report.clean { "stopped, clean" } else { "stopped, NOT clean: the next start resyncs" };
        Ok(Answer { clean: Some(report.clean), ..Answer::done(message) })
    }

    async fn slot_of(&self, replica: &str) -> Result<ReplicaSlot, Failure> {
        let volume = self.engine.status().await.map_err(|_| engine_gone())?.volume;
        // A missing one may be recorded under the path that another one has now.
        let named = volume.replicas.iter().filter(|known| is_named(known, replica));
        let named = named.min_by_key(|known| known.state == ReplicaState::Missing);
        if let Some(named) = named.filter(|named| named.slot < REPLICAS_MAX) {
            return Ok(ReplicaSlot::new(named.slot));
        }
        let wanted = replica.to_owned();
        off_thread(move || find_by_file(&volume, &wanted)).await?
    }
}

/// Does what may wait for a disk on a thread of its own. Where whoever asked has left, the result is dropped.
async fn off_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Failure> {
    let (sender, receiver) = oneshot::channel();
    std::thread::Builder::new()
        .name("replica-files".to_owned())
        .spawn(move || _ = sender.send(work()))
        .map_err(|error| Failure::new(format!("cannot start a thread: {error}")))?;
    receiver.await.map_err(|_| Failure::new("the thread that looks at the replica has ended"))
}

fn engine_gone() -> Failure {
    Failure::new("the volume's engine has ended").hint("look at the daemon's log")
}

/// Whether an operator means this member: by slot number, identity, or path as it stands.
fn is_named(replica: &ReplicaStatus, wanted: &str) -> bool {
    wanted.parse() == Ok(replica.slot)
        || Uuid::parse_str(wanted) == Ok(replica.uuid)
        || replica.path == wanted
}

/// The member whose path leads, through whatever links, to the same file as `wanted`. May wait for a disk.
fn find_by_file(volume: &Status, wanted: &str) -> Result<ReplicaSlot, Failure> {
    let same_file = |replica: &&ReplicaStatus| match (
        std::fs::canonicalize(&replica.path),
        std::fs::canonicalize(wanted),
    ) {
        (Ok(one), Ok(other)) => one == other,
        _ => false,
    };
    match volume.replicas.iter().find(same_file) {
        Some(replica) if replica.slot < REPLICAS_MAX => Ok(ReplicaSlot::new(replica.slot)),
        _ => {
            let known: Vec<String> = volume
                .replicas
                .iter()
                .map(|replica| format!("{} ({})", replica.slot, replica.path))
                .collect();
            Err(Failure::new(format!("`{wanted}` is no replica of volume `{}`", volume.name))
                .hint(format!("its replicas are: {}", known.join(", "))))
        }
    }
}
