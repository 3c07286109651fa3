//! The log, on standard error, written by a thread of its own.
//!
//! What must hold: whoever logs never waits for standard error and never fails by it. A terminal that is stopped, a
//! pipe that nobody reads or a full disk behind it costs lines of the log (their number is said when it can be
//! said), never the volume: replicas often fill up the very disk that the log is on.

use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

/// Lines that wait for standard error, at most; further ones are dropped.
const LINES_MAX: usize = 1024;
/// How long [`flush`] waits for standard error.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// The log's way to its thread, for [`flush`].
static LOG: OnceLock<LogWriter> = OnceLock::new();

enum Entry {
    Line(Vec<u8>),
    /// Says when everything before it has been written.
    Flush(SyncSender<()>),
}

/// The end that is logged to; each write is one whole line.
#[derive(Clone)]
struct LogWriter {
    entries: SyncSender<Entry>,
    dropped: Arc<AtomicU64>,
}

impl Write for LogWriter {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.entries.try_send(Entry::Line(line.to_vec())).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for LogWriter {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

impl LogWriter {
    /// A log whose lines go to `out`, and its thread's work.
    fn new(out: impl Write) -> (Self, impl FnOnce()) {
        let (entries, waiting) = sync_channel(LINES_MAX);
        let dropped = Arc::new(AtomicU64::new(0));
        let log = Self { entries, dropped: Arc::clone(&dropped) };
        (log, move || write_out(&waiting, &dropped, out))
    }

    /// Waits until everything logged so far is written, for a limited time.
    fn flush_within(&self, timeout: Duration) {
        let (sender, written) = sync_channel(1);
        match self.entries.try_send(Entry::Flush(sender)) {
            Ok(()) => _ = written.recv_timeout(timeout),
            // Nobody takes the lines that wait.
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {}
        }
    }
}

/// Writes line after line to `out`, until nobody can log any more. Errors have nowhere to go.
fn write_out(waiting: &Receiver<Entry>, dropped: &AtomicU64, mut out: impl Write) {
    while let Ok(entry) = waiting.recv() {
        match entry {
            Entry::Line(line) => _ = out.write_all(&line),
            Entry::Flush(written) => _ = written.try_send(()),
        }
        let lost = dropped.swap(0, Ordering::Relaxed);
        if lost > 0 {
            _ = writeln!(out, "nbdmirror: {lost} lines of the log are lost: standard error was blocked");
        }
    }
}

/// Logs to standard error from now on: what `filter` lets through.
pub fn to_stderr(filter: EnvFilter) {
    let (log, work) = LogWriter::new(io::stderr());
    if std::thread::Builder::new().name("log".to_owned()).spawn(work).is_err() {
        return; // as good as a blocked one: the volume is served all the same
    }
    // Set already only where tests call this twice.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(LOG.get_or_init(|| log).clone())
        .with_ansi(io::IsTerminal::is_terminal(&io::stderr()))
        .with_target(false)
        .try_init();
}

/// Waits until everything logged so far is on standard error; before the process ends. At most a second.
pub fn flush() {
    if let Some(log) = LOG.get() {
        log.flush_within(FLUSH_TIMEOUT);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Standard error that can be blocked.
    #[derive(Clone, Default)]
    struct Stderr(Arc<Mutex<Vec<u8>>>);

    impl Write for Stderr {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_blocked_standard_error_costs_lines_and_says_how_many() {
        let stderr = Stderr::default();
        let (mut log, work) = LogWriter::new(stderr.clone());
        let thread = std::thread::spawn(work);
        let blocked = stderr.0.lock().unwrap();
        for line in 0..2 * LINES_MAX {
            writeln!(log, "{line}").unwrap();
        }
        log.flush_within(Duration::from_millis(10)); // does not wait for ever
        drop(blocked);
        while !String::from_utf8_lossy(&stderr.0.lock().unwrap()).contains("lines of the log are lost") {
            std::thread::sleep(Duration::from_millis(1));
        }
        writeln!(log, "the last").unwrap();
        log.flush_within(Duration::from_secs(60));
        assert!(stderr.0.lock().unwrap().ends_with(b"the last\n"));
        drop(log);
        thread.join().unwrap();
    }
}
