//! The control plane: accepts and negotiates, answers operators; async on tokio-uring in its own thread.
//!
//! ```text
//!   NBD listeners ─► handshakes (accept, negotiate) ──► engine.connect
//!                        └─ TLS: its own thread (tls, tls_pump)
//!   control socket ─► operators (admin, protocol)   ──► engine.status, engine.admin
//!   SIGTERM, SIGINT, `stop` ─► stopping:
//!        no new clients ─► engine.stop (finish, flush, mark clean) ─► answer who asked ─► sockets removed
//!                     └──► handshakes: ERR_SHUTDOWN, and closed after half a second
//! ```
//!
//! What must hold: nothing on this thread waits for a disk, so that operators are answered while one hangs.

mod accept;
pub mod activation;
mod admin;
pub mod allow;
pub mod client;
mod complaint;
pub mod failure;
mod handshakes;
pub mod listen;
pub mod log;
mod negotiate;
pub mod protocol;
pub mod runtime_dir;
mod signals;
pub mod tls;
mod tls_pump;
pub mod unix_socket;

use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use crate::engine::{EngineHandle, StopReport};
use crate::nbd::export::Export;
use accept::{Acceptor, Reception, TlsReception, accept_clients};
pub use admin::OpenReplica;
use admin::{Desk, StopRequest, accept_operators};
use allow::AllowList;
use complaint::Complaint;
use failure::Failure;
use handshakes::Handshakes;
use listen::Listener;
use tls::Tls;
use tls_pump::TlsThread;
use unix_socket::UnixSocket;

/// Submission queue entries of the control plane's ring; more operations in flight than that are fine.
const RING_ENTRIES: u32 = 256;
/// How long operators may take to get their last answer when the daemon ends.
const FAREWELL_TIMEOUT: Duration = Duration::from_secs(2);
/// How long clients in their handshake have to hear that the volume is stopping.
const HANDSHAKES_FAREWELL_TIMEOUT: Duration = Duration::from_millis(500);
/// How long TLS connections have for their last bytes when the volume has been stopped.
const TLS_FAREWELL_TIMEOUT: Duration = Duration::from_secs(1);
const FAREWELL_POLL: Duration = Duration::from_millis(5);

/// What the control plane runs with.
pub struct ControlConfig {
    /// Where NBD clients connect.
    pub listeners: Vec<Listener>,
    /// Where they are, as NBD URIs, for `status`.
    pub listen_uris: Vec<String>,
    /// Where operators connect.
    pub control: UnixSocket,
    /// What clients are told of the volume.
    pub export: Arc<Export>,
    /// The volume.
    pub engine: EngineHandle,
    /// Opens a replica for `add`.
    pub open_replica: OpenReplica,
    /// Who may connect over TCP.
    pub allow: AllowList,
    /// Most clients past their handshake, 1 or more.
    pub connections_max: usize,
    /// TLS, and whether clients must use it; `None`: not on offer.
    pub tls: Option<(Arc<Tls>, bool)>,
}

/// Runs the control plane in its own thread until the volume is stopped: by an operator, or by SIGTERM or
/// SIGINT (see [`block_signals`]). The sockets are gone when this returns.
///
/// # Errors
/// The runtime does not start, or the engine has ended.
pub fn run(config: ControlConfig) -> Result<StopReport, Failure> {
    let (stop, stop_requests) = mpsc::channel(16);
    signals::watch(stop.clone(), config.tls.as_ref().map(|(tls, _)| Arc::clone(tls)))?;
    let (sender, result) = std::sync::mpsc::channel();
    let spawned = std::thread::Builder::new().name("control".to_owned()).spawn(move || {
        let runtime = tokio_uring::Runtime::new(tokio_uring::builder().entries(RING_ENTRIES));
        let outcome = match &runtime {
            Ok(runtime) => runtime.block_on(serve(config, stop, stop_requests)),
            Err(error) => Err(Failure::new(format!("the control plane's io_uring does not start: {error}"))),
        };
        // Said before the runtime goes: it waits for operations in flight, such as an idle operator's read.
        let _ = sender.send(outcome);
    });
    spawned.map_err(|error| Failure::new(format!("cannot start the control thread: {error}")))?;
    result.recv().unwrap_or_else(|_| Err(Failure::new("the control thread has ended")))
}

pub use signals::block as block_signals;

async fn serve(
    config: ControlConfig,
    stop: mpsc::Sender<StopRequest>,
    mut stop_requests: mpsc::Receiver<StopRequest>,
) -> Result<StopReport, Failure> {
    let ControlConfig { listeners, listen_uris, control, engine, open_replica, .. } = &config;
    let refused = |error: std::io::Error| Failure::new(format!("cannot accept connections: {error}"));
    let handshakes = Rc::new(Handshakes::default());
    let desk = Rc::new(Desk {
        engine: engine.clone(),
        handshakes: Rc::clone(&handshakes),
        stop,
        open_replica: *open_replica,
        listen: listen_uris.clone(),
        control: control.path().to_owned(),
        started: Instant::now(),
        busy: 0.into(),
    });
    let operators = Acceptor::unix(control.listener()).map_err(refused)?;
    let operators = tokio_uring::spawn(accept_operators(operators, Rc::clone(&desk)));
    let reception = Rc::new(reception(&config, Rc::clone(&handshakes))?);
    let mut clients = Vec::new();
    for listener in listeners {
        let acceptor = Acceptor::new(listener).map_err(refused)?;
        clients.push(tokio_uring::spawn(accept_clients(acceptor, Rc::clone(&reception))));
    }

    let mut asked: Vec<StopRequest> = Vec::new();
    asked.extend(stop_requests.recv().await);
    activation::notify("STOPPING=1");
    for task in clients {
        task.abort();
        let _ = task.await;
    }
    handshakes.begin_stop();
    let ControlConfig { listeners, control, engine, .. } = config;
    drop(listeners);
    let (report, ()) =
        tokio::join!(stop_engine(&engine, &mut stop_requests, &mut asked), end_handshakes(&handshakes));
    for request in asked {
        let _ = request.send(report.clone());
    }
    // The last replies, and that nothing more comes, get out through TLS.
    if let Some(tls) = Rc::into_inner(reception).and_then(|reception| reception.tls) {
        tls.thread.finish(TLS_FAREWELL_TIMEOUT).await;
    }
    // Who asked gets its answer before the process ends.
    let farewell = Instant::now();
    while desk.busy.get() > 0 && farewell.elapsed() < FAREWELL_TIMEOUT {
        tokio::time::sleep(FAREWELL_POLL).await;
    }
    operators.abort();
    drop(control);
    report
}

fn reception(config: &ControlConfig, handshakes: Rc<Handshakes>) -> Result<Reception, Failure> {
    let tls = match &config.tls {
        Some((tls, required)) => Some(TlsReception {
            tls: Arc::clone(tls),
            required: *required,
            thread: TlsThread::start()?,
            failed: Complaint::default(),
        }),
        None => None,
    };
    Ok(Reception {
        export: Arc::clone(&config.export),
        engine: config.engine.clone(),
        handshakes,
        allow: config.allow.clone(),
        connections_max: config.connections_max,
        tls,
        not_allowed: Complaint::default(),
        full: Complaint::default(),
    })
}

/// Gives clients in their handshake a moment to be told, and ends them.
async fn end_handshakes(handshakes: &Handshakes) {
    let began = Instant::now();
    while handshakes.count() > 0 && began.elapsed() < HANDSHAKES_FAREWELL_TIMEOUT {
        tokio::time::sleep(FAREWELL_POLL).await;
    }
    handshakes.end_all();
    // Their tasks end when they are next looked at.
    while handshakes.count() > 0 && began.elapsed() < 2 * HANDSHAKES_FAREWELL_TIMEOUT {
        tokio::time::sleep(FAREWELL_POLL).await;
    }
}

/// Stops the engine; whoever asks for a stop meanwhile is answered with the others.
async fn stop_engine(
    engine: &EngineHandle,
    stop_requests: &mut mpsc::Receiver<StopRequest>,
    asked: &mut Vec<StopRequest>,
) -> Result<StopReport, Failure> {
    let mut stopped = engine.stop();
    loop {
        tokio::select! {
            report = &mut stopped => {
                return report.map_err(|_| Failure::new("the engine ended before the volume was stopped")
                    .hint("the next start resyncs the regions that were being written"));
            }
            request = stop_requests.recv() => asked.extend(request),
        }
    }
}
