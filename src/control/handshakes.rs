//! The handshakes in progress: how many there may be, and which goes when there are too many.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;

use tokio::sync::oneshot;

use super::complaint::Complaint;

/// Most handshakes at once.
pub(super) const HANDSHAKES_MAX: usize = 256;

/// The handshakes in progress, oldest first. Dropping one's sender ends it.
#[derive(Default)]
pub(super) struct Handshakes {
    running: RefCell<VecDeque<(u64, oneshot::Sender<()>)>>,
    next: Cell<u64>,
    /// The volume is being stopped: options are refused with ERR_SHUTDOWN.
    stopping: Cell<bool>,
    too_many: Complaint,
}

impl Handshakes {
    pub(super) fn count(&self) -> usize {
        self.running.borrow().len()
    }

    /// Refuses every option from now on.
    pub(super) fn begin_stop(&self) {
        self.stopping.set(true);
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.get()
    }

    /// Ends them all.
    pub(super) fn end_all(&self) {
        self.running.borrow_mut().clear();
    }

    /// Enters one; what is given is told when it has to end.
    pub(super) fn begin(&self) -> (u64, oneshot::Receiver<()>) {
        let mut running = self.running.borrow_mut();
        if running.len() >= HANDSHAKES_MAX {
            running.pop_front();
            self.too_many.say(|| {
                format!(
                    "{HANDSHAKES_MAX} clients are in the middle of their handshake: the oldest are dropped"
                )
            });
        }
        let (sender, receiver) = oneshot::channel();
        let id = self.next.get();
        self.next.set(id + 1);
        running.push_back((id, sender));
        (id, receiver)
    }

    pub(super) fn end(&self, id: u64) {
        self.running.borrow_mut().retain(|(other, _)| *other != id);
    }
}
