//! SIGTERM and SIGINT: the first stops the volume cleanly, the second ends the process at once.
//!
//! A thread of its own waits for them, so that the second one works whatever the other threads wait for.

use nix::sys::signal::{SigSet, Signal};
use tokio::sync::{mpsc, oneshot};

use super::admin::StopRequest;
use super::failure::Failure;

/// Exit code after a second signal (128 + SIGINT, as a shell has it).
const INTERRUPTED: i32 = 130;

fn stop_signals() -> SigSet {
    [Signal::SIGTERM, Signal::SIGINT].into_iter().collect()
}

/// Keeps the stop signals for the thread that `watch` starts. To be called before any thread is started:
/// threads inherit it.
///
/// # Errors
/// The system's.
pub fn block() -> Result<(), Failure> {
    stop_signals().thread_block().map_err(|errno| Failure::new(format!("cannot block signals: {errno}")))
}

/// Waits for the stop signals from now on, in a thread.
pub(super) fn watch(stop: mpsc::Sender<StopRequest>) -> Result<(), Failure> {
    let wait = move || {
        let signals = stop_signals();
        let Ok(signal) = signals.wait() else { return };
        tracing::info!("{signal}: stopping");
        // Nobody waits for the answer.
        let (sender, _) = oneshot::channel();
        let _ = stop.blocking_send(sender);
        if let Ok(signal) = signals.wait() {
            tracing::warn!("{signal} again: ending at once; the next start resyncs");
            super::log::flush();
            std::process::exit(INTERRUPTED);
        }
    };
    match std::thread::Builder::new().name("signals".to_owned()).spawn(wait) {
        Ok(_) => Ok(()),
        Err(error) => Err(Failure::new(format!("cannot start a thread: {error}"))),
    }
}
