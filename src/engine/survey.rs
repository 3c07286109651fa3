//! Where a replica's file has holes, asked of its filesystem by a thread of the replica's own.
//!
//! io_uring has no way to ask, and the answer may take a while: the filesystem reads its map from the disk where it is
//! not in memory, and a long write or zeroing holds the file's lock. So the data plane's thread does not ask itself.
//! The thread begins with the first question and ends with the device.
//!
//! What must hold: a question keeps the file open until it is answered, and not longer: a detached device is closed.

use std::fs::File;
use std::io;
use std::sync::{Arc, mpsc};

use super::device_probe;
use super::handle::{Mailbox, Message};
use crate::mirror::event::OpId;
use crate::units::ReplicaSlot;

/// Extents of one answer at the most; it ends early then.
const EXTENTS_MAX: usize = 1024;

/// A question for holes.
pub(super) struct Question {
    /// The core's name for it.
    pub op: OpId,
    /// On which replica.
    pub slot: ReplicaSlot,
    /// Its file.
    pub file: Arc<File>,
    /// First byte.
    pub offset: u64,
    /// Bytes, more than 0.
    pub len: u64,
}

/// A device's thread for questions; none before the first one.
#[derive(Default)]
pub(super) struct Surveyor {
    questions: Option<mpsc::Sender<Question>>,
}

impl Surveyor {
    /// Asks; the answer is posted as [`Message::Allocation`].
    ///
    /// # Errors
    /// Where there is no thread to be had: the question is not asked.
    pub(super) fn ask(&mut self, question: Question, mailbox: &Arc<Mailbox>) -> io::Result<()> {
        let questions = match &self.questions {
            Some(questions) => questions,
            None => self.questions.insert(start(Arc::clone(mailbox))?),
        };
        questions.send(question).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

fn start(mailbox: Arc<Mailbox>) -> io::Result<mpsc::Sender<Question>> {
    let (sender, receiver) = mpsc::channel::<Question>();
    std::thread::Builder::new().name("nbdmirror-map".to_owned()).spawn(move || {
        for Question { op, slot, file, offset, len } in receiver {
            let extents = device_probe::allocation(&file, offset, len, EXTENTS_MAX);
            drop(file);
            mailbox.post(Message::Allocation { op, slot, extents });
        }
    })?;
    Ok(sender)
}
