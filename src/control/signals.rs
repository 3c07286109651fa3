//! SIGTERM and SIGINT: the first stops the volume cleanly, the second ends the process at once. SIGHUP: the TLS files are
//! read again.
//!
//! A thread of its own waits for them, so that the second one works whatever the other threads wait for.

use std::sync::Arc;

use nix::sys::signal::{SigSet, Signal};
use tokio::sync::{mpsc, oneshot};

use super::admin::StopRequest;
use super::failure::Failure;
use super::tls::Tls;

/// Exit code after a second signal (128 + SIGINT, as a shell has it).
const INTERRUPTED: i32 = 130;

fn our_signals() -> SigSet {
    [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP].into_iter().collect()
}

/// Keeps our signals for the thread that `watch` starts. To be called before any thread is started:
/// threads inherit it.
///
/// # Errors
/// The system's.
pub fn block() -> Result<(), Failure> {
    our_signals().thread_block().map_err(|errno| Failure::new(format!("cannot block signals: {errno}")))
}

/// Waits for signals from now on, in a thread.
pub(super) fn watch(stop: mpsc::Sender<StopRequest>, tls: Option<Arc<Tls>>) -> Result<(), Failure> {
    let wait = move || {
        let mut stopping = false;
        while let Ok(signal) = our_signals().wait() {
            match signal {
                Signal::SIGHUP => reload(tls.as_ref()),
                signal if stopping => {
                    tracing::warn!("{signal} again: ending at once; the next start resyncs");
                    super::log::flush();
                    std::process::exit(INTERRUPTED);
                }
                signal => {
                    tracing::info!("{signal}: stopping");
                    stopping = true;
                    // Nobody waits for the answer.
                    let (sender, _) = oneshot::channel();
                    let _ = stop.blocking_send(sender);
                }
            }
        }
    };
    match std::thread::Builder::new().name("signals".to_owned()).spawn(wait) {
        Ok(_) => Ok(()),
        Err(error) => Err(Failure::new(format!("cannot start a thread: {error}"))),
    }
}

/// Reads the TLS files again, in a thread: a file may be long in coming, and signals are not to wait for it.
fn reload(tls: Option<&Arc<Tls>>) {
    let Some(tls) = tls.cloned() else {
        return tracing::info!("SIGHUP: nothing to read again (TLS is off)");
    };
    let work = move || match tls.reload() {
        Ok(()) => tracing::info!("SIGHUP: TLS files read again; new connections use them"),
        Err(failure) => tracing::error!("SIGHUP: the TLS files stay as they were: {failure}"),
    };
    if let Err(error) = std::thread::Builder::new().name("reload".to_owned()).spawn(work) {
        tracing::error!("SIGHUP: cannot start a thread: {error}");
    }
}
