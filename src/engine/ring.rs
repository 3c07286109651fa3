//! The io_uring, made safe: operations go in as values and come back as values with their results.
//!
//! What must hold: an operation is in the slab from before its entry is queued until its completion has been
//! taken. A ring that is dropped with operations in flight leaks them: the kernel may still use their memory.

use std::io::{self, Write};
use std::time::{Duration, Instant};

use io_uring::{IoUring, types};

use super::operation::Operation;
use super::slab::{Key, Slab};

/// Entries of the submission queue; a turn that has more submits more than once.
const SUBMISSIONS: u32 = 1024;
/// Entries of the completion queue. More completions than this wait in the kernel (`NODROP`).
const COMPLETIONS: u32 = 8192;

/// `IORING_ENTER_GETEVENTS`: the kernel does what is due of its work, which makes completions.
const ENTER_GETEVENTS: u32 = 1;

/// A completed operation, given back.
pub(super) struct Completion {
    /// What was asked.
    pub operation: Operation,
    /// What came of it: a count, or a negative errno.
    pub result: i32,
}

/// An io_uring with what is in flight in it.
pub(super) struct Ring {
    uring: IoUring,
    in_flight: Slab<Operation>,
    /// Taken from the completion queue and not yet given out.
    taken: Vec<Completion>,
}

impl Ring {
    /// Sets up a ring, with the newest set of flags that the kernel has. On the thread that will use it.
    ///
    /// # Errors
    /// The kernel's; `availability::explain` says what they mean.
    pub(super) fn new() -> io::Result<Self> {
        let build = |level: u32| {
            let mut builder = IoUring::builder();
            builder.setup_cqsize(COMPLETIONS).setup_clamp().dontfork();
            if level >= 1 {
                builder.setup_coop_taskrun().setup_taskrun_flag(); // Linux 5.19
            }
            if level >= 2 {
                builder.setup_single_issuer().setup_defer_taskrun(); // Linux 6.1
            }
            builder.build(SUBMISSIONS)
        };
        let unknown_flag = |error: &io::Error| error.raw_os_error() == Some(libc::EINVAL);
        let mut uring = build(2);
        for level in [1, 0] {
            match &uring {
                Err(error) if unknown_flag(error) => uring = build(level),
                _ => {}
            }
        }
        let uring = uring?;
        Ok(Self { uring, in_flight: Slab::new(), taken: Vec::new() })
    }

    /// Queues an operation; it starts with the next [`Self::wait`] at the latest.
    pub(super) fn start(&mut self, operation: Operation) -> Key {
        let key = self.in_flight.insert(operation);
        let Some(operation) = self.in_flight.get_mut(key) else { unreachable!("just inserted") };
        let entry = operation.entry().user_data(key.to_u64());
        // SAFETY: the entry points only to heap memory that the operation owns (see `operation`), and the
        // operation stays in the slab, unmoved on the heap, until its completion is taken or for ever.
        while unsafe { self.uring.submission().push(&entry) }.is_err() {
            self.make_room();
        }
        key
    }

    /// How many operations are in flight.
    pub(super) fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Submits what is queued and waits for a completion or for `timeout`; appends completions to `out`.
    pub(super) fn wait(&mut self, timeout: Option<Duration>, out: &mut Vec<Completion>) {
        if self.taken.is_empty() {
            self.enter(timeout);
            self.take();
        }
        out.append(&mut self.taken);
    }

    /// Submits what is queued and looks for completions for at most `limit` without sleeping; appends them to `out`. Whether
    /// there were any. Threads that wait for this processor get it meanwhile.
    pub(super) fn spin(&mut self, limit: Duration, out: &mut Vec<Completion>) -> bool {
        let begin = Instant::now();
        self.poll();
        while self.taken.is_empty() && begin.elapsed() < limit {
            std::thread::yield_now();
            if self.uring.submission().taskrun() || !self.uring.completion().is_empty() {
                self.poll();
            }
        }
        out.append(&mut self.taken);
        !out.is_empty()
    }

    /// Submits what is queued and takes what is completed. Errors are left to the next `enter`, which meets them again.
    fn poll(&mut self) {
        let queued = self.uring.submission().len() as u32;
        // SAFETY: no argument is passed that memory would have to stand behind.
        let _ = unsafe { self.uring.submitter().enter::<libc::sigset_t>(queued, 0, ENTER_GETEVENTS, None) };
        self.take();
    }

    /// One `io_uring_enter`. Errors of the moment are left to the next turn; any other means that the ring is
    /// unusable, and a data plane that cannot know what became of its writes must not go on.
    fn enter(&mut self, timeout: Option<Duration>) {
        let result = match timeout {
            Some(timeout) => {
                let time = types::Timespec::from(timeout);
                self.uring.submitter().submit_with_args(1, &types::SubmitArgs::new().timespec(&time))
            }
            None => self.uring.submit_and_wait(1),
        };
        let Err(error) = result else { return };
        match error.raw_os_error() {
            Some(libc::ETIME | libc::EINTR) => {}
            // Too much is waiting in the completion queue (EBUSY), or the kernel is short of memory (EAGAIN).
            Some(libc::EBUSY | libc::EAGAIN | libc::ENOMEM) => {
                if self.uring.completion().is_empty() {
                    std::thread::sleep(Duration::from_micros(100));
                }
            }
            _ => {
                // Not by the log: it is written by another thread, which ends with this one.
                let text = "nbdmirror: the data plane's io_uring failed, this process ends now";
                _ = writeln!(io::stderr(), "{text}: {error}");
                std::process::abort();
            }
        }
    }

    /// Makes room in the submission queue.
    fn make_room(&mut self) {
        self.enter(Some(Duration::ZERO));
        self.take();
    }

    /// Moves completions out of the completion queue.
    fn take(&mut self) {
        for entry in self.uring.completion() {
            let Some(operation) = self.in_flight.remove(Key::from_u64(entry.user_data())) else {
                unreachable!("the kernel completes what was started, once")
            };
            self.taken.push(Completion { operation, result: entry.result() });
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        if self.in_flight.len() > 0 {
            tracing::error!(
                "{} operations in flight at the ring's end: their memory is kept",
                self.in_flight()
            );
            std::mem::forget(std::mem::replace(&mut self.in_flight, Slab::new()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_operations_than_the_queues_hold_all_come_back() {
        let mut ring = Ring::new().unwrap();
        let gone = ring.in_flight.insert(Operation::Wake { fd: -1, value: Box::new(0) });
        ring.in_flight.remove(gone);
        let count = (COMPLETIONS + SUBMISSIONS + 7) as usize;
        for _ in 0..count {
            ring.start(Operation::Cancel { target: gone });
        }
        let mut out = Vec::new();
        while out.len() < count {
            ring.wait(Some(Duration::from_secs(1)), &mut out);
        }
        assert!(out.iter().all(|completion| completion.result == -libc::ENOENT));
        assert_eq!(ring.in_flight(), 0);
        ring.wait(Some(Duration::from_millis(1)), &mut out); // nothing comes: the time-out ends it
        assert_eq!(out.len(), count);
    }
}
