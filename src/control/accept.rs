//! Accepting: NBD clients and operators, on every listener, with bounded numbers of both.
//!
//! ```text
//!  listener ─► accept ─► allowed? room? ─► handshake task (10 s at most, 256 at once: the oldest goes) ─► engine
//!                   └──► operator task  (32 at once: a further one is turned away)
//! ```
//!
//! Handshakes take no place of those who are connected (`--max-connections`): silent clients keep nobody out.
//!
//! Listeners are waited for by readiness and not by an accept in the ring: an accept that is taken back can
//! be overtaken by a client, which would be lost, and tokio-uring's own Unix listener sets SO_REUSEPORT, which
//! Linux refuses on Unix sockets since 6.13. Everything that moves bytes goes through the ring.

use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use tokio::sync::oneshot;

use super::allow::AllowList;
use super::complaint::Complaint;
use super::handshakes::Handshakes;
use super::listen::Listener;
use super::negotiate::negotiate;
use super::tls::Tls;
use super::tls_pump::TlsThread;
use crate::engine::{Connection, EngineHandle};
use crate::nbd::export::Export;

/// Longest handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// After an error of accept (no descriptors left, no memory) nothing is accepted for this long.
const ACCEPT_BACK_OFF: Duration = Duration::from_millis(100);
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
            Listener::InheritedUnix(listener, _) => Self::unix(listener),
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

    /// The next client. Loses none when it is dropped half-way.
    pub(super) async fn accept(&self) -> Arrival {
        let trouble = Complaint::default();
        loop {
            let accepted = match self {
                Self::Unix(listener) => listener.accept().await.map(|(stream, _)| from_unix(stream)),
                Self::Tcp(listener) => listener
                    .accept()
                    .await
                    .map(|(stream, peer)| from_tcp(stream, peer.ip(), peer.to_string())),
            };
            match accepted {
                Ok(Ok(client)) => return client,
                // Its own fault, or its bad luck.
                Ok(Err(error)) => tracing::debug!("a client is gone as soon as it came: {error}"),
                Err(error) => {
                    trouble.say(|| format!("cannot accept clients: {error}"));
                    tokio::time::sleep(ACCEPT_BACK_OFF).await;
                }
            }
        }
    }
}

/// A client that has connected.
pub(super) struct Arrival {
    pub(super) fd: OwnedFd,
    /// Who it is, for the log.
    pub(super) peer: String,
    /// From where; `None` on a Unix socket.
    address: Option<IpAddr>,
}

// The ring waits on a socket by itself only if the socket is a blocking one.

fn from_unix(stream: tokio::net::UnixStream) -> io::Result<Arrival> {
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
    Ok(Arrival { fd: stream.into(), peer, address: None })
}

fn from_tcp(stream: tokio::net::TcpStream, address: IpAddr, peer: String) -> io::Result<Arrival> {
    let stream = stream.into_std()?;
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)?;
    setsockopt(&stream, sockopt::KeepAlive, &true)?;
    setsockopt(&stream, sockopt::TcpKeepIdle, &KEEPALIVE_IDLE_S)?;
    setsockopt(&stream, sockopt::TcpKeepInterval, &KEEPALIVE_INTERVAL_S)?;
    setsockopt(&stream, sockopt::TcpKeepCount, &KEEPALIVE_TRIES)?;
    Ok(Arrival { fd: stream.into(), peer, address: Some(address) })
}

/// What NBD clients are received with.
pub(super) struct Reception {
    pub(super) export: Arc<Export>,
    pub(super) engine: EngineHandle,
    pub(super) handshakes: Rc<Handshakes>,
    /// Who may connect over TCP.
    pub(super) allow: AllowList,
    /// Most clients past their handshake.
    pub(super) connections_max: usize,
    /// `None`: TLS is not on offer.
    pub(super) tls: Option<TlsReception>,
    pub(super) not_allowed: Complaint,
    pub(super) full: Complaint,
}

/// TLS, where it is on offer.
pub(super) struct TlsReception {
    pub(super) tls: Arc<Tls>,
    pub(super) required: bool,
    pub(super) thread: TlsThread,
    pub(super) failed: Complaint,
}

impl Reception {
    /// Whether this client may stay. Who may not is told nothing.
    fn admits(&self, client: &Arrival) -> bool {
        if client.address.is_some_and(|address| !self.allow.admits(address)) {
            self.not_allowed.say(|| format!("{}: refused, --allow does not name it", client.peer));
            return false;
        }
        if self.is_full() {
            self.full.say(|| self.refusal(&client.peer));
            return false;
        }
        true
    }

    fn is_full(&self) -> bool {
        self.engine.connections() >= self.connections_max
    }

    fn refusal(&self, peer: &str) -> String {
        format!(
            "{peer}: refused, all {} places for clients are taken (see --max-connections)",
            self.connections_max
        )
    }

    /// Hands a client over, unless others have taken the last places during its handshake.
    fn hand_over(&self, connection: Connection) {
        if self.is_full() {
            return self.full.say(|| self.refusal(&connection.peer));
        }
        tracing::debug!("{}: connected", connection.peer);
        self.engine.connect(connection);
    }
}

/// Accepts NBD clients until it is dropped.
pub(super) async fn accept_clients(acceptor: Acceptor, reception: Rc<Reception>) {
    loop {
        let client = acceptor.accept().await;
        if !reception.admits(&client) {
            continue;
        }
        let (id, evicted) = reception.handshakes.begin();
        let reception = Rc::clone(&reception);
        tokio_uring::spawn(async move {
            serve_client(client, &reception, evicted).await;
            reception.handshakes.end(id);
        });
    }
}

/// Negotiates with one client, bounded in time, and hands it over.
async fn serve_client(client: Arrival, reception: &Reception, evicted: oneshot::Receiver<()>) {
    let peer = client.peer.clone();
    let result = tokio::select! {
        result = negotiate(client, reception) => result,
        () = tokio::time::sleep(HANDSHAKE_TIMEOUT) => Err("no complete handshake within 10 s".to_owned()),
        _ = evicted => Err("dropped in the middle of its handshake".to_owned()),
    };
    match result {
        Ok(connection) => reception.hand_over(connection),
        Err(why) => tracing::debug!("{peer}: closed: {why}"),
    }
}
