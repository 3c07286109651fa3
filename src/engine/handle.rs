//! The engine as other threads see it: started, given connections and commands, asked for its status, stopped.
//!
//! What must hold: messages are dealt with in the order they were posted. A message posted to an engine that has
//! ended is dropped: its answer's receiver gives an error, its descriptor is closed.
//!
//! No wake-up is lost. Who posts puts the message in, *then* adds to the eventfd's counter; the engine's read sets the
//! counter to zero, *then* it takes all messages, then it reads again. So where a message was put in after the engine
//! last took, its addition comes after the read before that too, and is still there for the next read, which ends at
//! once. Where it was put in before, it was taken; its addition may be left over and then wakes the engine for
//! nothing. The other order on either side (wake before the message
//! is in, set to zero after the messages were taken) would lose some: a test goes through all interleavings.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::SigSet;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use super::availability::{self, UringUnavailable};
use super::data_plane::DataPlane;
use super::device::{DeviceKind, ReplicaDevice};
use super::ring::Ring;
use crate::extent::Extent;
use crate::format::{Assembly, Found};
use crate::mirror::MirrorConfig;
use crate::mirror::event::{AdminError, OpId};
use crate::mirror::status::Status;
use crate::nbd::session::Session;
use crate::units::{REPLICAS_MAX, ReplicaSlot};

/// Default of [`EngineConfig::memory_bytes_max`].
pub const MEMORY_BYTES_MAX_DEFAULT: u64 = 256 << 20;

/// What an engine is made of.
#[derive(Debug)]
pub struct EngineConfig {
    /// How the volume is run. Its `traits` are filled in from `devices`.
    pub mirror: MirrorConfig,
    /// The volume as assembled.
    pub assembly: Assembly,
    /// The replicas' devices, by slot.
    pub devices: [Option<ReplicaDevice>; REPLICAS_MAX],
    /// Payload bytes of requests that are being received, worked on or answered, at most (see `memory` for the
    /// fine print); default [`MEMORY_BYTES_MAX_DEFAULT`].
    pub memory_bytes_max: u64,
    /// A client that has sent nothing for so long and is owed nothing is disconnected, nanoseconds; `None`: never.
    pub client_idle_ns_max: Option<u64>,
}

/// Why an engine cannot run.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// No io_uring.
    #[error(transparent)]
    Uring(#[from] UringUnavailable),
    /// No thread, no eventfd.
    #[error("cannot start the data plane: {0}. Check the limits on processes and open files (`ulimit -a`)")]
    Start(#[from] std::io::Error),
    /// The thread ended by a panic.
    #[error("the data plane ended unexpectedly; this is a bug, please report it with the log")]
    Ended,
}

/// A client's connection past its handshake.
#[derive(Debug)]
pub struct Connection {
    /// The socket.
    pub fd: OwnedFd,
    /// What was negotiated.
    pub session: Session,
    /// Bytes received behind the handshake.
    pub leftover: Vec<u8>,
    /// Who it is, for the log.
    pub peer: String,
}

/// What an operator asks for.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "a few in a volume's life")]
pub enum AdminRequest {
    /// Stop using a replica.
    Fail(ReplicaSlot),
    /// Forget a replica.
    Remove(ReplicaSlot),
    /// Take a replica in.
    Add {
        /// Opened for reading and writing.
        device: ReplicaDevice,
        /// What stands on it.
        found: Option<Found>,
        /// Take it in even where its content is another volume's, diverged or of unknown history.
        force: bool,
        /// A fresh random identity.
        fresh_uuid: uuid::Uuid,
    },
}

/// What the engine says of itself and its volume.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EngineStatus {
    /// Requests and commands are taken: the opening superblock commits are durable.
    pub open: bool,
    /// The volume.
    pub volume: Status,
    /// Client connections.
    pub connections: usize,
    /// Payload memory in use or kept for reuse, bytes.
    pub memory_bytes: u64,
    /// How the replicas' devices are used, by slot; `None` where no device is open.
    pub replicas: [Option<DeviceStatus>; REPLICAS_MAX],
}

/// How a replica's device is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStatus {
    /// Past the page cache.
    pub direct: bool,
    /// File or block device.
    pub kind: DeviceKind,
}

/// How an engine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StopReport {
    /// The volume was marked clean: the next start needs no sync.
    pub clean: bool,
    /// What the core said.
    pub message: String,
}

pub(super) type AdminAnswer = Result<String, AdminError>;

/// What is posted to the engine.
pub(super) enum Message {
    Connect(Connection, Counted),
    Admin(Box<AdminRequest>, oneshot::Sender<AdminAnswer>),
    Status(oneshot::Sender<EngineStatus>),
    Stop(oneshot::Sender<StopReport>),
    /// From a replica's surveyor.
    Allocation {
        op: OpId,
        slot: ReplicaSlot,
        extents: Vec<Extent>,
    },
}

/// Counts a connection for as long as it is there, wherever it waits or is served.
#[derive(Debug)]
pub(super) struct Counted(Arc<AtomicUsize>);

impl Counted {
    pub(super) fn new(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(count))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Where messages wait for the engine's thread.
pub(super) struct Mailbox {
    /// `None` once the engine has ended.
    messages: Mutex<Option<VecDeque<Message>>>,
    /// Readable when there are messages.
    pub eventfd: EventFd,
}

impl Mailbox {
    pub(super) fn new() -> std::io::Result<Self> {
        let eventfd = EventFd::from_flags(EfdFlags::EFD_CLOEXEC).map_err(std::io::Error::from)?;
        Ok(Self { messages: Mutex::new(Some(VecDeque::new())), eventfd })
    }

    pub(super) fn post(&self, message: Message) {
        if self.put(message) {
            self.wake();
        }
    }

    /// `false` where nobody takes messages any more: this one is dropped.
    fn put(&self, message: Message) -> bool {
        let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        match messages.as_mut() {
            Some(queue) => {
                queue.push_back(message);
                true
            }
            None => {
                drop(messages); // a message's end (a descriptor's, say) is not to hold up others
                drop(message);
                false
            }
        }
    }

    fn wake(&self) {
        // Cannot fail: the counter is far from its end.
        let _ = self.eventfd.write(1);
    }

    /// Takes all messages.
    pub(super) fn take(&self) -> VecDeque<Message> {
        let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        messages.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Takes no more messages, and drops those that wait.
    fn close(&self) {
        let dropped = self.messages.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(dropped);
    }
}

/// Closes the mailbox when the thread ends, however it ends.
struct CloseOnDrop(Arc<Mailbox>);

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// Gives an engine connections and commands, from any thread.
#[derive(Clone)]
pub struct EngineHandle {
    mailbox: Arc<Mailbox>,
    connections: Arc<AtomicUsize>,
}

impl EngineHandle {
    /// Hands a client over.
    pub fn connect(&self, connection: Connection) {
        self.mailbox.post(Message::Connect(connection, Counted::new(&self.connections)));
    }

    /// Clients handed over and not disconnected yet.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }

    /// Carries out an operator's command.
    #[must_use]
    pub fn admin(&self, request: AdminRequest) -> oneshot::Receiver<AdminAnswer> {
        let (sender, receiver) = oneshot::channel();
        self.mailbox.post(Message::Admin(Box::new(request), sender));
        receiver
    }

    /// Asks how things are.
    #[must_use]
    pub fn status(&self) -> oneshot::Receiver<EngineStatus> {
        let (sender, receiver) = oneshot::channel();
        self.mailbox.post(Message::Status(sender));
        receiver
    }

    /// Stops in order: no request is read any more, those in flight are answered, replies are sent (a client that
    /// does not take them within 5 s loses them), the volume is flushed and marked clean, connections
    /// are closed. The answer comes when that is done. May be asked more than once.
    #[must_use]
    pub fn stop(&self) -> oneshot::Receiver<StopReport> {
        let (sender, receiver) = oneshot::channel();
        self.mailbox.post(Message::Stop(sender));
        receiver
    }
}

impl std::fmt::Debug for EngineHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("EngineHandle")
    }
}

/// A running engine.
#[derive(Debug)]
pub struct Engine {
    /// The way to it.
    pub handle: EngineHandle,
    thread: JoinHandle<StopReport>,
}

impl Engine {
    /// Waits for the engine's end; ask for it with [`EngineHandle::stop`].
    ///
    /// # Errors
    /// Where the thread panicked.
    pub fn join(self) -> Result<StopReport, EngineError> {
        self.thread.join().map_err(|_| EngineError::Ended)
    }
}

/// Starts an engine on a thread of its own; returns when its ring is set up.
///
/// # Errors
/// Where io_uring, or a thread, is not to be had.
pub fn start(config: EngineConfig) -> Result<Engine, EngineError> {
    availability::check_io_uring()?;
    let mailbox = Arc::new(Mailbox::new()?);
    let handle = EngineHandle { mailbox: Arc::clone(&mailbox), connections: Arc::default() };
    let (ready, started) = mpsc::channel();
    let thread = std::thread::Builder::new().name("nbdmirror-data".to_owned()).spawn(move || {
        let mailbox_closer = CloseOnDrop(Arc::clone(&mailbox));
        // Signals are the main thread's business.
        let _ = SigSet::all().thread_block();
        let ring = match Ring::new() {
            Ok(ring) => ring,
            Err(error) => {
                let _ = ready.send(Err(availability::explain(&error)));
                return StopReport { clean: false, message: "it was never started".to_owned() };
            }
        };
        let data_plane = DataPlane::new(ring, config, mailbox);
        let _ = ready.send(Ok(()));
        let report = data_plane.run();
        drop(mailbox_closer);
        report
    })?;
    started.recv().map_err(|_| EngineError::Ended)??;
    Ok(Engine { handle, thread })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One side's steps, in its order. All of them are atomic: a lock or a system call.
    #[derive(Clone, Copy, PartialEq)]
    enum Step {
        Put,
        Wake,
        /// Waits for a counter that is not zero, and sets it to zero.
        Read,
        /// Waits for a counter that is not zero, and leaves it.
        Poll,
        /// Sets the counter to zero.
        Reset,
        Take,
    }

    /// A mailbox in the middle of an interleaving: where each side is, and what the engine has taken.
    struct World {
        mailbox: Mailbox,
        posters: Vec<usize>,
        engine: usize,
        taken: usize,
    }

    impl World {
        fn new(posters: usize) -> Self {
            let eventfd = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
            let mailbox = Mailbox { messages: Mutex::new(Some(VecDeque::new())), eventfd };
            Self { mailbox, posters: vec![0; posters], engine: 0, taken: 0 }
        }

        /// Lets one side (the engine is the last) go a step; `false` where it cannot.
        fn go(&mut self, side: usize, poster: [Step; 2], engine: &[Step]) -> bool {
            let step = match self.posters.get_mut(side) {
                Some(2) => return false,
                Some(at) => {
                    *at += 1;
                    poster[*at - 1]
                }
                None => engine[self.engine],
            };
            match step {
                Step::Put => assert!(self.mailbox.put(Message::Status(oneshot::channel().0))),
                Step::Wake => self.mailbox.wake(),
                Step::Read if self.mailbox.eventfd.read().is_err() => return false,
                Step::Poll if self.mailbox.eventfd.read().is_err() => return false,
                Step::Poll => self.mailbox.wake(), // back again: nobody saw it gone
                Step::Reset => drop(self.mailbox.eventfd.read()),
                Step::Read => {}
                Step::Take => self.taken += self.mailbox.take().len(),
            }
            if side == self.posters.len() {
                self.engine = (self.engine + 1) % engine.len();
            }
            true
        }
    }

    /// How many of all interleavings of so many posters with the engine leave a message asleep, and how many there are.
    fn asleep(posters: usize, poster: [Step; 2], engine: &[Step]) -> (u32, u32) {
        let (mut lost, mut all) = (0, 0);
        let mut schedules = vec![Vec::new()];
        while let Some(schedule) = schedules.pop() {
            let mut ended = true;
            let mut taken = 0;
            for side in 0..=posters {
                // Always done again from the start: a mailbox cannot be copied.
                let mut next = World::new(posters);
                assert!(schedule.iter().all(|side| next.go(*side, poster, engine)));
                taken = next.taken;
                if next.go(side, poster, engine) {
                    ended = false;
                    schedules.push(schedule.iter().copied().chain([side]).collect());
                }
            }
            if ended {
                all += 1;
                lost += u32::from(taken < posters);
            }
        }
        (lost, all)
    }

    #[test]
    #[cfg_attr(miri, ignore = "an eventfd")]
    fn no_interleaving_loses_a_wake_up_and_other_orders_do() {
        use Step::{Poll, Put, Read, Reset, Take, Wake};
        let (lost, all) = asleep(2, [Put, Wake], &[Read, Take]);
        assert_eq!(lost, 0);
        assert!(all > 20, "{all}");
        assert!(asleep(1, [Wake, Put], &[Read, Take]).0 > 0);
        assert!(asleep(2, [Put, Wake], &[Poll, Take, Reset]).0 > 0);
    }

    #[test]
    #[cfg_attr(miri, ignore = "an eventfd")]
    fn a_closed_mailbox_drops_what_waits_and_what_comes() {
        let world = World::new(0);
        let (sender, mut waits) = oneshot::channel();
        world.mailbox.post(Message::Status(sender));
        waits.try_recv().unwrap_err();
        world.mailbox.close();
        assert_eq!(waits.try_recv().unwrap_err(), oneshot::error::TryRecvError::Closed);
        let (sender, mut comes) = oneshot::channel();
        world.mailbox.post(Message::Status(sender));
        assert_eq!(comes.try_recv().unwrap_err(), oneshot::error::TryRecvError::Closed);
        assert!(world.mailbox.take().is_empty());
    }
}
