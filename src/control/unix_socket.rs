//! Unix sockets, bound so that a living daemon's is never taken, and never open to others than it is to be.
//!
//! A Unix socket's life:
//!
//! ```text
//!   lock PATH.lock ──(held)──► refused: a live daemon has it
//!        │
//!        ▼
//!   PATH: nothing ──► bind, owner, mode, listen ──► in use ──► PATH and PATH.lock removed when dropped
//!         socket, nobody answers ──► unlink, bind
//!         socket, somebody answers, or anything else ──► refused
//! ```
//!
//! The lock closes the race between two daemons that both find a dead socket.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, Flock, FlockArg};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
use nix::sys::stat::{FchmodatFlags, Mode, fchmod, fchmodat};
use nix::unistd::{Gid, Uid, fchownat};

use super::failure::Failure;

/// Longest path of a Unix socket, bytes (`sun_path` without its final NUL).
pub const SOCKET_PATH_BYTES_MAX: usize = 107;

/// Who may connect to a Unix socket: those who may write to its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketAccess {
    /// The file's mode, whatever the umask.
    pub mode: Mode,
    /// Its owner; `None`: the process's user.
    pub user: Option<Uid>,
    /// Its group; `None`: the process's group.
    pub group: Option<Gid>,
}

impl SocketAccess {
    /// The process's own user, and root.
    pub const PRIVATE: Self = Self { mode: Mode::S_IRUSR.union(Mode::S_IWUSR), user: None, group: None };
}

pub(super) fn check_socket_path(path: &Path) -> Result<(), String> {
    let bytes = path.as_os_str().len();
    if bytes == 0 {
        return Err("unix: needs a path, such as unix:/run/nbdmirror/vol.sock".to_owned());
    }
    if bytes > SOCKET_PATH_BYTES_MAX {
        return Err(format!(
            "the socket path has {bytes} bytes, the kernel takes {SOCKET_PATH_BYTES_MAX}; use a shorter one"
        ));
    }
    Ok(())
}

/// A Unix socket that listens, with its lock. Dropping it removes both files.
#[derive(Debug)]
pub struct UnixSocket {
    listener: UnixListener,
    path: PathBuf,
    _lock: SocketLock,
}

impl UnixSocket {
    /// Listens at `path` for those whom `access` names; takes the place of a dead daemon's socket.
    ///
    /// # Errors
    /// A live daemon listens there, a file that is no socket is there, the folder cannot be written, or the socket cannot
    /// be given away.
    pub fn bind(path: &Path, access: SocketAccess) -> Result<Self, Failure> {
        check_socket_path(path).map_err(|what| Failure::new(format!("{}: {what}", path.display())))?;
        let path = std::path::absolute(path)
            .map_err(|error| Failure::new(format!("cannot use {}: {error}", path.display())))?;
        // A relative path may have grown beyond what the kernel takes.
        check_socket_path(&path).map_err(|what| Failure::new(format!("{}: {what}", path.display())))?;
        let lock = SocketLock::take(&path)?;
        clear_dead_socket(&path)?;
        let refused =
            |errno: Errno| Failure::new(format!("cannot listen on {}: {}", path.display(), errno.desc()));
        let flags = SockFlag::SOCK_CLOEXEC;
        let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None).map_err(refused)?;
        // A socket's file gets the socket's own mode, less the umask.
        fchmod(&fd, access.mode).map_err(refused)?;
        bind(fd.as_raw_fd(), &UnixAddr::new(&path).map_err(refused)?).map_err(refused)?;
        let socket = Self { listener: fd.into(), path, _lock: lock };
        // Nobody can connect before it listens, and by then it is as it has to be.
        socket.give_away(access)?;
        listen(&socket.listener, Backlog::MAXCONN).map_err(|errno| {
            Failure::new(format!("cannot listen on {}: {}", socket.path.display(), errno.desc()))
        })?;
        Ok(socket)
    }

    /// Sets its owner and then, which only an owner or root may, its mode.
    fn give_away(&self, access: SocketAccess) -> Result<(), Failure> {
        let path = &self.path;
        if access.user.is_some() || access.group.is_some() {
            fchownat(AT_FDCWD, path, access.user, access.group, AtFlags::AT_SYMLINK_NOFOLLOW).map_err(|errno| {
                Failure::new(format!("cannot give the socket {} away: {}", path.display(), errno.desc()))
                    .hint("only root may give it to another user; others may give it to a group that they are in")
            })?;
        }
        fchmodat(AT_FDCWD, path, access.mode, FchmodatFlags::NoFollowSymlink).map_err(|errno| {
            Failure::new(format!("cannot set the mode of the socket {}: {}", path.display(), errno.desc()))
        })
    }

    /// Its absolute path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The listening socket.
    #[must_use]
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }
}

impl Drop for UnixSocket {
    fn drop(&mut self) {
        // While it is still locked: fields are dropped after this.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// The lock beside a socket. Dropping it removes its file.
#[derive(Debug)]
struct SocketLock {
    path: PathBuf,
    _locked: Flock<File>,
}

impl SocketLock {
    fn take(socket: &Path) -> Result<Self, Failure> {
        let mut path = socket.as_os_str().to_owned();
        path.push(".lock");
        let path = PathBuf::from(path);
        let locked = take_lock(socket, &path)?;
        Ok(Self { path, _locked: locked })
    }
}

impl Drop for SocketLock {
    fn drop(&mut self) {
        // While it is still locked: who waits for it looks at its name again.
        let _ = std::fs::remove_file(&self.path);
    }
}

fn in_use(path: &Path) -> Failure {
    Failure::new(format!("the socket {} is in use by a live daemon", path.display())).hint(
        "stop that one first (`nbdmirror status` lists the running volumes), or choose another path or --name",
    )
}

/// Takes the lock beside the socket; it is free again when its holder ends, however that happens.
fn take_lock(path: &Path, lock_path: &Path) -> Result<Flock<File>, Failure> {
    let refused = |error: io::Error| {
        let failure = Failure::new(format!("cannot make the socket {}: {error}", path.display()));
        match error.kind() {
            io::ErrorKind::NotFound => failure.hint("its folder does not exist; make it first"),
            io::ErrorKind::PermissionDenied => failure.hint("choose a folder that you may write in"),
            _ => failure,
        }
    };
    loop {
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .custom_flags(nix::libc::O_NOFOLLOW)
            .open(lock_path)
            .map_err(refused)?;
        let lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => lock,
            Err((_, Errno::EWOULDBLOCK)) => return Err(in_use(path)),
            Err((_, errno)) => return Err(refused(errno.into())),
        };
        // The holder before us may have removed the file that we have just locked.
        let ours = lock.metadata().map_err(refused)?;
        match std::fs::symlink_metadata(lock_path) {
            Ok(named) if (named.dev(), named.ino()) == (ours.dev(), ours.ino()) => return Ok(lock),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(refused(error)),
        }
    }
}

/// Removes a socket that nobody listens on.
fn clear_dead_socket(path: &Path) -> Result<(), Failure> {
    let metadata = match std::fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Failure::new(format!("cannot look at {}: {error}", path.display()))),
    };
    if !metadata.file_type().is_socket() {
        return Err(Failure::new(format!("{} is there and is not a socket", path.display()))
            .hint("it is left untouched; choose another path"));
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path)
            .map_err(|error| Failure::new(format!("cannot replace {}: {error}", path.display()))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Ok(_) | Err(_) => Err(in_use(path)),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_live_socket_is_refused_and_a_dead_one_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.sock");
        let live = UnixSocket::bind(&path, SocketAccess::PRIVATE).unwrap();
        assert!(UnixSocket::bind(&path, SocketAccess::PRIVATE).unwrap_err().what.contains("live daemon"));
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        drop(live);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        // A listener that went without a trace of a lock, as after kill -9.
        drop(UnixListener::bind(&path).unwrap());
        let replaced = UnixSocket::bind(&path, SocketAccess::PRIVATE).unwrap();
        UnixStream::connect(replaced.path()).unwrap();
    }

    #[test]
    fn a_foreign_live_socket_and_a_file_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.sock");
        let foreign = UnixListener::bind(&path).unwrap();
        assert!(UnixSocket::bind(&path, SocketAccess::PRIVATE).is_err());
        drop(foreign);
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "precious").unwrap();
        assert!(UnixSocket::bind(&path, SocketAccess::PRIVATE).unwrap_err().what.contains("not a socket"));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "a lock is left behind");
        assert!(
            UnixSocket::bind(&dir.path().join("no/v.sock"), SocketAccess::PRIVATE)
                .unwrap_err()
                .hint
                .unwrap()
                .contains("folder")
        );
    }

    #[test]
    fn a_mode_holds_whatever_the_umask() {
        let dir = tempfile::tempdir().unwrap();
        for mode in [0o600, 0o660, 0o666, 0o777] {
            let access = SocketAccess { mode: Mode::from_bits_truncate(mode), ..SocketAccess::PRIVATE };
            let socket = UnixSocket::bind(&dir.path().join("v.sock"), access).unwrap();
            assert_eq!(std::fs::metadata(socket.path()).unwrap().permissions().mode() & 0o7777, mode);
            UnixStream::connect(socket.path()).unwrap();
        }
    }

    /// In a folder where others may write, the name may be another thing by the time that it gets its mode.
    #[test]
    fn a_mode_goes_through_no_link() {
        let dir = tempfile::tempdir().unwrap();
        let victim = dir.path().join("victim");
        std::fs::write(&victim, "secret").unwrap();
        std::fs::set_permissions(&victim, Permissions::from_mode(0o600)).unwrap();
        let socket = UnixSocket::bind(&dir.path().join("v.sock"), SocketAccess::PRIVATE).unwrap();
        std::fs::remove_file(socket.path()).unwrap();
        std::os::unix::fs::symlink(&victim, socket.path()).unwrap();
        let access = SocketAccess { mode: Mode::from_bits_truncate(0o666), ..SocketAccess::PRIVATE };
        assert!(socket.give_away(access).is_err());
        assert_eq!(std::fs::metadata(&victim).unwrap().permissions().mode() & 0o777, 0o600);
    }
}
