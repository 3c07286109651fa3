//! TLS, on a thread of its own: the data plane knows nothing of it and sees the plain end of a socket pair.
//!
//! ```text
//!              TLS thread                                       control, then engine
//!  client ◄──► handshake ──established──► pump ◄── socket pair ──► handshake inside TLS ──► requests
//!                 │ failed, too slow             │
//!                 └──────── closed ◄─────────────┘ either side ends
//! ```
//!
//! What must hold:
//! - What has been read of one side goes to the other, in order, and then that side's end does: the engine sees the end
//!   of the stream behind the client's last byte; the client gets the last reply and then close_notify.
//! - A client that goes without close_notify ends its connection: what comes after a cut is nobody's.
//! - A connection holds two buffers of at most `BUFFER_BYTES_MAX`, and small ones when it is quiet.
//! - When the engine has let a client go, the client has `LINGER` to take what is left.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, BufReader, ReadBuf};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::failure::Failure;

/// A direction's buffer when there is little to move, bytes: one TLS record.
const BUFFER_BYTES_MIN: usize = 16 << 10;
/// A direction's buffer when there is much, bytes.
const BUFFER_BYTES_MAX: usize = 128 << 10;
/// Ciphertext read from the client's socket at a time, bytes.
const RECEIVE_BYTES: usize = 64 << 10;
/// A direction without traffic for this long gets the small buffer again.
const QUIET: Duration = Duration::from_secs(2);
/// How long a client may take to go when the engine has let it go.
const LINGER: Duration = Duration::from_secs(2);

/// A client that has been told to begin TLS.
pub(super) struct TlsJob {
    /// Its socket.
    pub(super) client: OwnedFd,
    /// The end of the socket pair to pump to.
    pub(super) plain: std::os::unix::net::UnixStream,
    /// What to speak TLS with.
    pub(super) config: Arc<ServerConfig>,
    /// Told when the TLS handshake is done, with what was agreed, or why it failed. Dropping the receiver ends it.
    pub(super) established: oneshot::Sender<Result<String, String>>,
}

/// The way to the TLS thread. It ends when this is dropped and its connections have ended.
pub(super) struct TlsThread {
    jobs: mpsc::UnboundedSender<TlsJob>,
    ended: oneshot::Receiver<()>,
}

impl TlsThread {
    pub(super) fn start() -> Result<Self, Failure> {
        let refused = |error: io::Error| Failure::new(format!("cannot start the TLS thread: {error}"));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(refused)?;
        let (jobs, waiting) = mpsc::unbounded_channel();
        let (ending, ended) = oneshot::channel();
        let work = move || {
            runtime.block_on(serve(waiting));
            let _ = ending.send(());
        };
        std::thread::Builder::new().name("tls".to_owned()).spawn(work).map_err(refused)?;
        Ok(Self { jobs, ended })
    }

    /// Takes a client over. Where the thread is gone the job is dropped, and with it the connection.
    pub(super) fn begin(&self, job: TlsJob) {
        let _ = self.jobs.send(job);
    }

    /// Takes no more clients and waits until those there are have ended, at most for `timeout`.
    pub(super) async fn finish(self, timeout: Duration) {
        drop(self.jobs);
        let _ = tokio::time::timeout(timeout, self.ended).await;
    }
}

async fn serve(mut jobs: mpsc::UnboundedReceiver<TlsJob>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            job = jobs.recv() => match job {
                Some(job) => _ = connections.spawn(connection(job)),
                None => break,
            },
            Some(_) = connections.join_next() => {}
        }
    }
    while connections.join_next().await.is_some() {}
}

async fn connection(job: TlsJob) {
    let TlsJob { client, plain, config, mut established } = job;
    let streams = into_runtime(client.into()).and_then(|client| Ok((client, into_runtime(plain)?)));
    let (client, plain) = match streams {
        Ok(streams) => streams,
        Err(error) => {
            let _ = established.send(Err(format!("cannot begin TLS: {error}")));
            return;
        }
    };
    // The TLS library reads 4 KiB at a time.
    let accept = TlsAcceptor::from(config).accept(BufReader::with_capacity(RECEIVE_BYTES, client));
    let tls = tokio::select! {
        accepted = accept => accepted,
        () = established.closed() => return,
    };
    let tls = match tls {
        Ok(tls) => tls,
        Err(error) => {
            let _ = established.send(Err(format!("no TLS: {error}")));
            return;
        }
    };
    if established.send(Ok(describe(&tls))).is_ok() {
        pump(tls, plain).await;
    }
}

/// A stream socket, of whatever family, in the runtime.
fn into_runtime(socket: std::os::unix::net::UnixStream) -> io::Result<UnixStream> {
    socket.set_nonblocking(true)?;
    UnixStream::from_std(socket)
}

/// What was agreed, for the log.
fn describe(tls: &TlsStream<BufReader<UnixStream>>) -> String {
    let (_, connection) = tls.get_ref();
    let version = match connection.protocol_version() {
        Some(rustls::ProtocolVersion::TLSv1_2) => "TLS 1.2",
        _ => "TLS 1.3",
    };
    let cipher = connection.negotiated_cipher_suite().map(|suite| format!("{:?}", suite.suite()));
    let cipher = cipher.as_deref().and_then(|name| name.split_once('_')).map_or("", |(_, name)| name);
    let known = if connection.peer_certificates().is_some() { ", client certificate" } else { "" };
    format!("{version} {cipher}{known}")
}

/// Why a direction has ended.
enum End {
    /// Its source has said that nothing more comes, and everything has been passed on.
    Source,
    /// Its source broke off.
    SourceBroken,
    /// Its target takes nothing more.
    Target,
}

async fn pump(tls: TlsStream<BufReader<UnixStream>>, plain: UnixStream) {
    let Ok(watched) = plain.as_fd().try_clone_to_owned() else { return };
    let (mut from_client, mut to_client) = tokio::io::split(tls);
    let (mut from_engine, mut to_engine) = plain.into_split();
    let engine_gone = || has_hung_up(&watched);
    {
        let mut up = std::pin::pin!(async {
            let end = copy(&mut from_client, &mut to_engine, || false).await;
            if matches!(end, End::Source) {
                let _ = to_engine.shutdown().await;
            }
            end
        });
        let mut down = std::pin::pin!(copy(&mut from_engine, &mut to_client, engine_gone));
        let down_end = tokio::select! {
            end = &mut down => end,
            end = &mut up => match end {
                // Dropping the socket pair's end tells the engine.
                End::SourceBroken => return,
                // The client asks for nothing more, or nobody listens: it gets what is still to come.
                End::Source | End::Target => down.await,
            },
        };
        if matches!(down_end, End::Target) {
            return;
        }
    }
    // The engine has let the client go.
    let _ = tokio::time::timeout(LINGER, async {
        let _ = to_client.shutdown().await;
        // A socket that is closed with bytes unread resets the connection, and what was sent last may be lost.
        let _ = tokio::io::copy(&mut from_client, &mut tokio::io::sink()).await;
    })
    .await;
}

/// Passes on what comes, as it comes, until either side ends. Where the target takes nothing for `LINGER` and
/// `source_gone`, it is given up.
async fn copy<R, W>(from: &mut R, to: &mut W, source_gone: impl Fn() -> bool) -> End
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let mut buffer = vec![0; BUFFER_BYTES_MIN];
    loop {
        let count = match read_quietly(from, &mut buffer).await {
            Ok(0) => return End::Source,
            Ok(count) => count,
            Err(_) => return End::SourceBroken,
        };
        if !write(to, &buffer[..count], &source_gone).await {
            return End::Target;
        }
        if count == buffer.len() && count < BUFFER_BYTES_MAX {
            buffer = vec![0; 2 * count];
        }
    }
}

/// Reads what there is. Waits with a small buffer, after a while.
async fn read_quietly(from: &mut (impl AsyncRead + Unpin), buffer: &mut Vec<u8>) -> io::Result<usize> {
    if buffer.len() > BUFFER_BYTES_MIN {
        match tokio::time::timeout(QUIET, read(from, buffer)).await {
            Ok(result) => return result,
            Err(_) => *buffer = vec![0; BUFFER_BYTES_MIN],
        }
    }
    read(from, buffer).await
}

/// Reads as much as can be had without waiting, and at least one byte; 0 at the end.
async fn read(from: &mut (impl AsyncRead + Unpin), buffer: &mut [u8]) -> io::Result<usize> {
    std::future::poll_fn(|context| {
        let mut into = ReadBuf::new(buffer);
        loop {
            let before = into.filled().len();
            let result = Pin::new(&mut *from).poll_read(context, &mut into);
            let count = into.filled().len();
            return match result {
                Poll::Ready(Ok(())) if count > before && into.remaining() > 0 => continue,
                // An end or an error comes again.
                Poll::Ready(_) | Poll::Pending if count > 0 => Poll::Ready(Ok(count)),
                Poll::Ready(result) => Poll::Ready(result.map(|()| 0)),
                Poll::Pending => Poll::Pending,
            };
        }
    })
    .await
}

/// Whether the target has taken it all.
async fn write(to: &mut (impl AsyncWrite + Unpin), bytes: &[u8], source_gone: &impl Fn() -> bool) -> bool {
    let mut writing = std::pin::pin!(async {
        to.write_all(bytes).await?;
        to.flush().await
    });
    let mut was_gone = false;
    loop {
        match tokio::time::timeout(LINGER, &mut writing).await {
            Ok(result) => return result.is_ok(),
            Err(_) if was_gone => return false,
            Err(_) => was_gone = source_gone(),
        }
    }
}

/// Whether the other end of a socket pair has been closed.
fn has_hung_up(socket: &OwnedFd) -> bool {
    let mut polled = [PollFd::new(socket.as_fd(), PollFlags::empty())];
    let _ = poll(&mut polled, PollTimeout::ZERO);
    polled[0].revents().is_some_and(|events| events.contains(PollFlags::POLLHUP))
}
