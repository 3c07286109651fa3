//! One client's handshake over a socket: moves bytes between the ring and the pure state machine.
//!
//! What must hold: memory is bounded (one read's bytes and their answers), and every byte that came behind the
//! handshake is handed on. TLS will stand here: between the greeting and the options it wraps the stream.

use std::sync::Arc;

use tokio_uring::net::UnixStream;

use crate::nbd::export::Export;
use crate::nbd::handshake::{Handshake, Step, TlsMode};
use crate::nbd::session::Session;

/// Bytes read at a time; also the most that is handed on to the engine.
const READ_BYTES: usize = 4096;

/// A client that may send requests now.
pub(super) struct Negotiated {
    /// The protocol's state.
    pub(super) session: Session,
    /// Bytes that the client has sent behind its handshake.
    pub(super) leftover: Vec<u8>,
}

/// Runs the handshake to its end. `Err` says why the connection is to be closed.
pub(super) async fn negotiate(stream: &UnixStream, export: Arc<Export>) -> Result<Negotiated, String> {
    let mut handshake = Handshake::new(export, TlsMode::Off);
    send(stream, Handshake::greeting().to_vec()).await?;
    let mut input = Vec::with_capacity(READ_BYTES);
    loop {
        let (read, buffer) = stream.read(input).await;
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
        let mut out = Vec::new();
        let progress = handshake.receive(&input, &mut out);
        if !out.is_empty() {
            send(stream, out).await?;
        }
        match progress.step {
            Step::NeedMore => input.clear(),
            Step::Transmission(session) => {
                let leftover = input.split_off(progress.consumed);
                return Ok(Negotiated { session, leftover });
            }
            Step::StartTls => return Err("TLS was agreed to, which is not on offer".to_owned()),
            Step::Close(why) => return Err(why),
        }
    }
}

async fn send(stream: &UnixStream, bytes: Vec<u8>) -> Result<(), String> {
    let (result, _) = stream.write_all(bytes).await;
    result.map_err(|error| format!("cannot write: {error}"))
}
