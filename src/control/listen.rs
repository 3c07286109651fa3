//! Where clients connect: parsing `--listen`, and binding sockets so that a living daemon's is never taken.
//!
//! A Unix socket's life:
//!
//! ```text
//!   lock PATH.lock ──(held)──► refused: a live daemon has it
//!        │
//!        ▼
//!   PATH: nothing ──► bind ──► in use ──► PATH and PATH.lock removed when dropped
//!         socket, nobody answers ──► unlink, bind
//!         socket, somebody answers, or anything else ──► refused
//! ```
//!
//! The lock closes the race between two daemons that both find a dead socket.

use std::fmt;
use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, ToSocketAddrs};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::failure::Failure;

/// Longest path of a Unix socket, bytes (`sun_path` without its final NUL).
pub const SOCKET_PATH_BYTES_MAX: usize = 107;

/// What `--listen` names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListenAddress {
    /// A Unix socket.
    Unix(PathBuf),
    /// A TCP port on every address that `host` resolves to.
    Tcp {
        /// Host name or address, without brackets.
        host: String,
        /// Port; 0 lets the kernel choose.
        port: u16,
    },
}

impl FromStr for ListenAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            check_socket_path(Path::new(path))?;
            return Ok(Self::Unix(PathBuf::from(path)));
        }
        let usage = "give unix:PATH or ADDR:PORT, such as 127.0.0.1:10809, [::1]:10809 or localhost:10809";
        let Some((host, port)) = text.rsplit_once(':') else {
            return Err(format!("`{text}` has no port; {usage}"));
        };
        let Ok(port) = port.parse() else {
            return Err(format!("`{port}` is not a port (0 to 65535); {usage}"));
        };
        let host = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
            Some(inner) if inner.parse::<std::net::Ipv6Addr>().is_ok() => inner,
            Some(inner) => return Err(format!("`{inner}` is not an IPv6 address; {usage}")),
            None if host.contains(':') => {
                return Err(format!("an IPv6 address stands in brackets, such as [::1]:10809; {usage}"));
            }
            None => host,
        };
        if host.is_empty() || host.contains(|c: char| c.is_whitespace() || c == '/') {
            return Err(format!("`{text}` names no address; {usage} (0.0.0.0:PORT for all of them)"));
        }
        Ok(Self::Tcp { host: host.to_owned(), port })
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

fn check_socket_path(path: &Path) -> Result<(), String> {
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

/// A socket that listens. Closing it, by dropping, removes a Unix socket's file and its lock.
#[derive(Debug)]
pub enum Listener {
    /// A Unix socket.
    Unix(UnixSocket),
    /// A TCP socket and the address it got.
    Tcp(TcpListener, SocketAddr),
}

impl Listener {
    /// Where it listens, as a client would name it.
    #[must_use]
    pub fn place(&self) -> Place {
        match self {
            Self::Unix(socket) => Place::Unix(socket.path.clone()),
            Self::Tcp(_, address) => Place::Tcp(*address),
        }
    }
}

/// Where a listener can be reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A Unix socket's absolute path.
    Unix(PathBuf),
    /// An address and port.
    Tcp(SocketAddr),
}

impl Place {
    /// Whether others than this machine can reach it.
    #[must_use]
    pub fn is_public(&self) -> bool {
        match self {
            Self::Unix(_) => false,
            Self::Tcp(address) => !match address.ip() {
                IpAddr::V4(ip) => ip.is_loopback(),
                IpAddr::V6(ip) => ip.to_ipv4_mapped().map_or(ip.is_loopback(), |ip| ip.is_loopback()),
            },
        }
    }
}

/// Binds `address`. A host name may give several listeners (such as `localhost` on IPv4 and IPv6).
///
/// # Errors
/// The address is in use, unknown, or not ours; a Unix socket's path is taken by a live daemon or by a file.
pub fn bind(address: &ListenAddress) -> Result<Vec<Listener>, Failure> {
    match address {
        ListenAddress::Unix(path) => Ok(vec![Listener::Unix(UnixSocket::bind(path, 0o600)?)]),
        ListenAddress::Tcp { host, port } => bind_tcp(host, *port),
    }
}

fn bind_tcp(host: &str, port: u16) -> Result<Vec<Listener>, Failure> {
    let refused = |error: io::Error| {
        let shown = ListenAddress::Tcp { host: host.to_owned(), port };
        let failure = Failure::new(format!("cannot listen on {shown}: {error}"));
        match error.kind() {
            io::ErrorKind::AddrInUse => failure.hint("another program has this port; choose another one"),
            io::ErrorKind::AddrNotAvailable => {
                failure.hint("this machine has no such address (see `ip address`)")
            }
            io::ErrorKind::PermissionDenied => {
                failure.hint("ports below 1024 are root's; choose a higher one")
            }
            _ => failure.hint("check the address; 127.0.0.1:10809 always works on this machine"),
        }
    };
    let mut addresses: Vec<SocketAddr> = (host, port).to_socket_addrs().map_err(refused)?.collect();
    addresses.dedup();
    let mut listeners: Vec<Listener> = Vec::new();
    let mut last_error = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for mut address in addresses {
        // With port 0 all of a name's addresses share the port that the first one got.
        if let (0, Some(Listener::Tcp(_, first))) = (port, listeners.first()) {
            address.set_port(first.port());
        }
        // The standard library sets SO_REUSEADDR: a restart need not wait for old connections' TIME_WAIT.
        let bound = TcpListener::bind(address).and_then(|listener| Ok((listener.local_addr()?, listener)));
        match bound {
            Ok((address, listener)) => listeners.push(Listener::Tcp(listener, address)),
            // `localhost` may name an IPv6 address on a machine that has none.
            Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => last_error = error,
            Err(error) => return Err(refused(error)),
        }
    }
    if listeners.is_empty() { Err(refused(last_error)) } else { Ok(listeners) }
}

/// A Unix socket that listens, with its lock. Dropping it removes both files.
#[derive(Debug)]
pub struct UnixSocket {
    listener: UnixListener,
    path: PathBuf,
    _lock: SocketLock,
}

impl UnixSocket {
    /// Listens at `path` with the file mode `mode`; takes the place of a dead daemon's socket.
    ///
    /// # Errors
    /// A live daemon listens there, a file that is no socket is there, or the folder cannot be written.
    pub fn bind(path: &Path, mode: u32) -> Result<Self, Failure> {
        check_socket_path(path).map_err(|what| Failure::new(format!("{}: {what}", path.display())))?;
        let path = std::path::absolute(path)
            .map_err(|error| Failure::new(format!("cannot use {}: {error}", path.display())))?;
        // A relative path may have grown beyond what the kernel takes.
        check_socket_path(&path).map_err(|what| Failure::new(format!("{}: {what}", path.display())))?;
        let lock = SocketLock::take(&path)?;
        clear_dead_socket(&path)?;
        let refused =
            |error: io::Error| Failure::new(format!("cannot listen on {}: {error}", path.display()));
        let listener = UnixListener::bind(&path).map_err(refused)?;
        let socket = Self { listener, path: path.clone(), _lock: lock };
        std::fs::set_permissions(&socket.path, Permissions::from_mode(mode)).map_err(refused)?;
        Ok(socket)
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
    use super::*;

    #[test]
    fn addresses_are_parsed_and_printed() {
        for text in ["unix:/tmp/x.sock", "127.0.0.1:10809", "[::1]:10809", "localhost:0", "nas.example:1"] {
            let address: ListenAddress = text.parse().unwrap();
            assert_eq!(address.to_string(), text);
        }
        for text in [
            "",
            "unix:",
            "10809",
            "localhost",
            ":10809",
            "::1:10809",
            "[::1]",
            "[nohost]:1",
            "a:65536",
            "a:-1",
            "a b:1",
        ] {
            assert!(text.parse::<ListenAddress>().is_err(), "{text}");
        }
        let long = format!("unix:/{}", "x".repeat(200));
        assert!(long.parse::<ListenAddress>().unwrap_err().contains("shorter"));
    }

    #[test]
    fn only_loopback_is_private() {
        for (address, public) in [
            ("127.0.0.1:1", false),
            ("[::1]:1", false),
            ("0.0.0.0:1", true),
            ("[::]:1", true),
            ("10.0.0.1:1", true),
        ] {
            assert_eq!(Place::Tcp(address.parse().unwrap()).is_public(), public, "{address}");
        }
    }

    #[test]
    fn a_live_socket_is_refused_and_a_dead_one_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.sock");
        let live = UnixSocket::bind(&path, 0o600).unwrap();
        assert!(UnixSocket::bind(&path, 0o600).unwrap_err().what.contains("live daemon"));
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        drop(live);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        // A listener that went without a trace of a lock, as after kill -9.
        drop(UnixListener::bind(&path).unwrap());
        let replaced = UnixSocket::bind(&path, 0o600).unwrap();
        UnixStream::connect(replaced.path()).unwrap();
    }

    #[test]
    fn a_foreign_live_socket_and_a_file_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.sock");
        let foreign = UnixListener::bind(&path).unwrap();
        assert!(UnixSocket::bind(&path, 0o600).is_err());
        drop(foreign);
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "precious").unwrap();
        assert!(UnixSocket::bind(&path, 0o600).unwrap_err().what.contains("not a socket"));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "a lock is left behind");
        assert!(
            UnixSocket::bind(&dir.path().join("no/v.sock"), 0o600)
                .unwrap_err()
                .hint
                .unwrap()
                .contains("folder")
        );
    }

    #[test]
    fn tcp_ports_are_bound_once() {
        let first = bind(&"127.0.0.1:0".parse().unwrap()).unwrap();
        let Place::Tcp(address) = first[0].place() else { panic!() };
        assert!(bind(&address.to_string().parse().unwrap()).unwrap_err().what.contains("cannot listen"));
        assert!(bind(&"192.0.2.1:0".parse().unwrap()).unwrap_err().hint.unwrap().contains("no such address"));
    }
}
