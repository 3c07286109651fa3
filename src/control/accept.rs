//! Accepting: NBD clients and operators, on every listener, with bounded numbers of both.
//!
//! ```text
//!  listener ─► accept ─► handshake task (10 s at most, 256 at once: the oldest goes) ─► engine
//!                   └──► operator task  (32 at once: a further one is turned away)
//! ```
//!
//! Listeners are waited for by readiness and not by an accept in the ring: an accept that is taken back can
//! be overtaken by a client, which would be lost, and tokio-uring's own Unix listener sets SO_REUSEPORT, which
//! Linux refuses on Unix sockets since 6.13. Everything that moves bytes goes through the ring.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};
use tokio::sync::oneshot;
use tokio_uring::net::UnixStream;

use super::listen::Listener;
use super::negotiate::{Negotiated, negotiate};
use crate::engine::{Connection, EngineHandle};
use crate::nbd::export::Export;

/// Longest handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Most handshakes at once.
const HANDSHAKES_MAX: usize = 256;
/// After an error of accept (no descriptors left, no memory) nothing is accepted for this long.
const ACCEPT_BACK_OFF: Duration = Duration::from_millis(100);
/// Shortest time between two complaints about too many handshakes.
const COMPLAIN_EVERY: Duration = Duration::from_secs(10);
/// A TCP client that vanished without a word is noticed after about two minutes.
const KEEPALIVE_IDLE_S: u32 = 60;
const KEEPALIVE_INTERVAL_S: u32 = 15;
const KEEPALIVE_TRIES: u32 = 4;

/// A listener in the runtime.
pub(super) enum Acceptor {
    Unix(tokio::net::UnixListener),
    Tcp(tokio::net::TcpListener),
}

impl Acceptor {
    /// Takes the socket of `listener` (a second descriptor of it) into the runtime.
    pub(super) fn new(listener: &Listener) -> io::Result<Self> {
        match listener {
            Listener::Unix(socket) => Self::unix(socket.listener()),
            Listener::Tcp(listener, _) => {
                let listener = listener.try_clone()?;
                listener.set_nonblocking(true)?;
                Ok(Self::Tcp(tokio::net::TcpListener::from_std(listener)?))
            }
        }
    }

    pub(super) fn unix(listener: &std::os::unix::net::UnixListener) -> io::Result<Self> {
        let listener = listener.try_clone()?;
        listener.set_nonblocking(true)?;
        Ok(Self::Unix(tokio::net::UnixListener::from_std(listener)?))
    }

    /// The next client, and who it is. Loses none when it is dropped half-way.
    pub(super) async fn accept(&self) -> (OwnedFd, String) {
        loop {
            let accepted = match self {
                Self::Unix(listener) => listener.accept().await.and_then(|(stream, _)| from_unix(stream)),
                Self::Tcp(listener) => listener
                    .accept()
                    .await
                    .and_then(|(stream, peer)| Ok((from_tcp(stream)?, peer.to_string()))),
            };
            match accepted {
                Ok(client) => return client,
                Err(error) => {
                    tracing::warn!("cannot accept a client: {error}");
                    tokio::time::sleep(ACCEPT_BACK_OFF).await;
                }
            }
        }
    }
}

// The ring waits on a socket by itself only if the socket is a blocking one.

fn from_unix(stream: tokio::net::UnixStream) -> io::Result<(OwnedFd, String)> {
    let peer = match stream.peer_cred() {
        Ok(cred) => format!(
            "unix uid {}{}",
            cred.uid(),
            cred.pid().map(|pid| format!(" pid {pid}")).unwrap_or_default()
        ),
        Err(_) => "unix".to_owned(),
    };
    let stream = stream.into_std()?;
    stream.set_nonblocking(false)?;
    Ok((stream.into(), peer))
}

fn from_tcp(stream: tokio::net::TcpStream) -> io::Result<OwnedFd> {
    let stream = stream.into_std()?;
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)?;
    setsockopt(&stream, sockopt::KeepAlive, &true)?;
    setsockopt(&stream, sockopt::TcpKeepIdle, &KEEPALIVE_IDLE_S)?;
    setsockopt(&stream, sockopt::TcpKeepInterval, &KEEPALIVE_INTERVAL_S)?;
    setsockopt(&stream, sockopt::TcpKeepCount, &KEEPALIVE_TRIES)?;
    Ok(stream.into())
}

/// The handshakes in progress, oldest first. Dropping one's sender ends it.
#[derive(Default)]
pub(super) struct Handshakes {
    running: RefCell<VecDeque<(u64, oneshot::Sender<()>)>>,
    next: Cell<u64>,
    /// When it was last said that there are too many: a flood of clients is not to flood the log.
    complained: Cell<Option<Instant>>,
}

impl Handshakes {
    pub(super) fn count(&self) -> usize {
        self.running.borrow().len()
    }

    /// Ends them all.
    pub(super) fn end_all(&self) {
        self.running.borrow_mut().clear();
    }

    fn begin(&self) -> (u64, oneshot::Receiver<()>) {
        let mut running = self.running.borrow_mut();
        if running.len() >= HANDSHAKES_MAX {
            running.pop_front();
            self.complain();
        }
        let (sender, receiver) = oneshot::channel();
        let id = self.next.get();
        self.next.set(id + 1);
        running.push_back((id, sender));
        (id, receiver)
    }

    fn complain(&self) {
        if self.complained.get().is_none_or(|last| last.elapsed() >= COMPLAIN_EVERY) {
            self.complained.set(Some(Instant::now()));
            tracing::warn!(
                "{HANDSHAKES_MAX} clients are in the middle of their handshake: the oldest are dropped"
            );
        }
    }

    fn end(&self, id: u64) {
        self.running.borrow_mut().retain(|(other, _)| *other != id);
    }
}

/// Accepts NBD clients until it is dropped.
pub(super) async fn accept_clients(
    acceptor: Acceptor,
    export: Arc<Export>,
    engine: EngineHandle,
    handshakes: Rc<Handshakes>,
) {
    loop {
        let (fd, peer) = acceptor.accept().await;
        let (id, evicted) = handshakes.begin();
        let (export, engine, handshakes) = (Arc::clone(&export), engine.clone(), Rc::clone(&handshakes));
        tokio_uring::spawn(async move {
            serve_client(fd, peer, export, &engine, evicted).await;
            handshakes.end(id);
        });
    }
}

/// Negotiates with one client, bounded in time, and hands it over.
async fn serve_client(
    fd: OwnedFd,
    peer: String,
    export: Arc<Export>,
    engine: &EngineHandle,
    evicted: oneshot::Receiver<()>,
) {
    // The ring's stream owns a second descriptor of the socket: the first outlives it and is handed over.
    let stream = match fd.try_clone() {
        Ok(second) => UnixStream::from_std(std::os::unix::net::UnixStream::from(second)),
        Err(error) => return tracing::warn!("{peer}: cannot serve this client: {error}"),
    };
    let result = tokio::select! {
        result = negotiate(&stream, export) => result,
        () = tokio::time::sleep(HANDSHAKE_TIMEOUT) => Err("no complete handshake within 10 s".to_owned()),
        _ = evicted => Err("dropped in the middle of its handshake".to_owned()),
    };
    match result {
        Ok(Negotiated { session, leftover }) => {
            // No operation of ours is in flight any more: each was awaited to its end.
            drop(stream);
            tracing::debug!("{peer}: connected");
            engine.connect(Connection { fd, session, leftover, peer });
        }
        Err(why) => {
            tracing::debug!("{peer}: closed: {why}");
            // Ends the read or write that may be in flight; its buffer and descriptor go with it.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}
