//! What is noted of an attached device, in a file of the runtime directory that its keeper holds locked.
//!
//! What must hold: at most one process holds the lock, so a device has one keeper; the file stays when the keeper ends, since a
//! lock on a file whose name is gone keeps nobody out.

use std::fs::{File, OpenOptions};
use std::io::{Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::device::Device;
use crate::control::failure::Failure;
use crate::control::runtime_dir::{prepare_runtime_dir, trusted_runtime_dir};

const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// What is noted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct State {
    /// The attachment that it is about: the kernel's `pid` of it.
    pub(super) pid: String,
    /// Connections of the device, which the kernel does not tell.
    pub(super) connections: u32,
}

/// The file, locked.
#[derive(Debug)]
pub(super) struct StateFile {
    file: Flock<File>,
    path: PathBuf,
}

fn name(device: Device) -> String {
    format!("{}.attached", device.name())
}

impl StateFile {
    /// Takes the lock; `None` where another process holds it all through `patience`.
    pub(super) fn take(device: Device, patience: Duration) -> Result<Option<Self>, Failure> {
        Self::take_at(&prepare_runtime_dir()?.join(name(device)), patience)
    }

    fn take_at(path: &Path, patience: Duration) -> Result<Option<Self>, Failure> {
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .custom_flags(nix::libc::O_NOFOLLOW)
            .open(path)
            .map_err(|error| Failure::new(format!("cannot open {}: {error}", path.display())))?;
        let began = Instant::now();
        loop {
            file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(file) => return Ok(Some(Self { file, path: path.to_owned() })),
                Err((_, Errno::EWOULDBLOCK)) if began.elapsed() >= patience => return Ok(None),
                Err((file, Errno::EWOULDBLOCK)) => file,
                Err((_, errno)) => {
                    return Err(Failure::new(format!("cannot lock {}: {}", path.display(), errno.desc())));
                }
            };
            std::thread::sleep(POLL_INTERVAL);
        }
    }

    /// Notes `state` in place of what was there.
    pub(super) fn write(&mut self, state: &State) -> Result<(), Failure> {
        let written = serde_json::to_string(state).map_err(std::io::Error::from).and_then(|text| {
            self.file.set_len(0)?;
            self.file.rewind()?;
            self.file.write_all(text.as_bytes())
        });
        written.map_err(|error| Failure::new(format!("cannot write {}: {error}", self.path.display())))
    }

    /// What is noted of a device; `None` where nothing is.
    pub(super) fn read(device: Device) -> Option<State> {
        let path = trusted_runtime_dir().ok()??.join(name(device));
        serde_json::from_str(&std::fs::read_to_string(path).ok()?).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_process_keeps_a_device() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nbd0.attached");
        let mut first = StateFile::take_at(&path, Duration::ZERO).unwrap().unwrap();
        first.write(&State { pid: "a long time ago".to_owned(), connections: 16 }).unwrap();
        let state = State { pid: "8".to_owned(), connections: 4 };
        first.write(&state).unwrap();
        assert_eq!(serde_json::from_str::<State>(&std::fs::read_to_string(&path).unwrap()).unwrap(), state);
        assert!(StateFile::take_at(&path, Duration::ZERO).unwrap().is_none());
        drop(first);
        assert!(StateFile::take_at(&path, Duration::ZERO).unwrap().is_some());
    }
}
