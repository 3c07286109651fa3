//! One client's handshake over a socket: moves bytes between the ring and the pure state machine.
//!
//! ```text
//!   greeting, options ──STARTTLS──► TLS thread has the client's socket; ──► options ──► engine gets
//!                   │                we have the plain end of a pair                     that end
//!                   └──────────────────────────────────────────────────────────────► or the socket
//! ```
//!
//! What must hold: memory is bounded (one read's bytes and their answers), and every byte that came behind the
//! handshake is handed on. Bytes that came in clear behind STARTTLS end the connection: nobody knows whose they are.

use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::Arc;

use tokio::sync::oneshot;
use tokio_uring::net::UnixStream;

use super::accept::{Arrival, Reception, TlsReception};
use super::handshakes::Handshakes;
use super::tls_pump::TlsJob;
use crate::engine::Connection;
use crate::nbd::handshake::{Handshake, Step, TlsMode};
use crate::nbd::session::Session;

/// Bytes read at a time; also the most that is handed on to the engine.
const READ_BYTES: usize = 4096;

/// A socket in the ring for the time of a handshake. Dropped before `release` it is shut down, which ends the
/// operation that may be in flight on it: buffer and descriptor go with that.
struct Talk {
    stream: UnixStream,
    /// The ring's stream owns a second descriptor of the socket: this one outlives it.
    fd: Option<OwnedFd>,
}

impl Talk {
    fn new(fd: OwnedFd) -> Result<Self, String> {
        let second = fd.try_clone().map_err(|error| format!("cannot serve this client: {error}"))?;
        Ok(Self { stream: UnixStream::from_std(second.into()), fd: Some(fd) })
    }

    /// The socket. No operation of ours may be in flight: each must have been awaited to its end.
    fn release(mut self) -> Option<OwnedFd> {
        self.fd.take()
    }

    async fn send(&self, bytes: Vec<u8>) -> Result<(), String> {
        let (result, _) = self.stream.write_all(bytes).await;
        result.map_err(|error| format!("cannot write: {error}"))
    }

    /// Takes the handshake to its next step, and gives the bytes that came behind it.
    async fn talk(
        &self,
        handshake: &mut Handshake,
        handshakes: &Handshakes,
    ) -> Result<(Step, Vec<u8>), String> {
        let mut input = Vec::with_capacity(READ_BYTES);
        loop {
            let (read, buffer) = self.stream.read(input).await;
            input = buffer;
            match read {
                Ok(0) => return Err("the client hung up in the middle of the handshake".to_owned()),
                Ok(count) => input.truncate(count),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {
                    input.clear();
                    continue;
                }
                Err(error) => return Err(format!("cannot read: {error}")),
            }
            if handshakes.is_stopping() {
                handshake.begin_shutdown();
            }
            let mut out = Vec::new();
            let progress = handshake.receive(&input, &mut out);
            if !out.is_empty() {
                self.send(out).await?;
            }
            match progress.step {
                Step::NeedMore => input.clear(),
                Step::Close(why) => return Err(why),
                step => return Ok((step, input.split_off(progress.consumed))),
            }
        }
    }
}

impl Drop for Talk {
    fn drop(&mut self) {
        if self.fd.is_some() {
            let _ = self.stream.shutdown(Shutdown::Both);
        }
    }
}

/// Runs the handshake to its end. `Err` says why the connection was closed.
pub(super) async fn negotiate(client: Arrival, reception: &Reception) -> Result<Connection, String> {
    let Arrival { fd, mut peer, .. } = client;
    let mode = match &reception.tls {
        None => TlsMode::Off,
        Some(tls) if tls.required => TlsMode::Required,
        Some(_) => TlsMode::Allowed,
    };
    let handshakes = &*reception.handshakes;
    let mut handshake = Handshake::new(Arc::clone(&reception.export), mode);
    let mut talk = Talk::new(fd)?;
    talk.send(Handshake::greeting().to_vec()).await?;
    let (mut step, mut leftover) = talk.talk(&mut handshake, handshakes).await?;
    if let (Step::StartTls, Some(tls)) = (&step, &reception.tls) {
        if !leftover.is_empty() {
            return Err(format!("{} bytes came in clear behind STARTTLS", leftover.len()));
        }
        let (plain, agreed) = begin_tls(talk, tls, &peer).await?;
        peer = format!("{peer} ({agreed})");
        talk = Talk::new(plain)?;
        handshake = handshake.inside_tls();
        (step, leftover) = talk.talk(&mut handshake, handshakes).await?;
    }
    match step {
        Step::Transmission(session) => handed_over(talk, session, leftover, peer),
        Step::StartTls | Step::NeedMore | Step::Close(_) => unreachable!("not on offer, or no end of a talk"),
    }
}

fn handed_over(talk: Talk, session: Session, leftover: Vec<u8>, peer: String) -> Result<Connection, String> {
    let Some(fd) = talk.release() else { unreachable!("released once") };
    Ok(Connection { fd, session, leftover, peer })
}

/// Gives the client to the TLS thread; its plain end and what was agreed, when that is done.
async fn begin_tls(talk: Talk, tls: &TlsReception, peer: &str) -> Result<(OwnedFd, String), String> {
    let (near, far) = StdUnixStream::pair().map_err(|error| format!("no socket pair for TLS: {error}"))?;
    let Some(client) = talk.release() else { unreachable!("released once") };
    let (established, agreed) = oneshot::channel();
    tls.thread.begin(TlsJob { client, plain: far, config: tls.tls.current(), established });
    match agreed.await {
        Ok(Ok(agreed)) => Ok((near.into(), agreed)),
        Ok(Err(why)) => {
            tls.failed.say(|| format!("{peer}: {why}"));
            Err(why)
        }
        Err(_) => Err("the TLS thread has ended".to_owned()),
    }
}
