//! Where clients connect: parsing `--listen`, and binding it.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, ToSocketAddrs};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::failure::Failure;
use super::unix_socket::{SocketAccess, UnixSocket, check_socket_path};

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

/// A socket that listens. Closing it, by dropping, removes a Unix socket's file and its lock.
#[derive(Debug)]
pub enum Listener {
    /// A Unix socket.
    Unix(UnixSocket),
    /// A Unix socket that whoever started us listens on, such as systemd: its file is not ours to remove.
    InheritedUnix(UnixListener, PathBuf),
    /// A TCP socket and the address it got.
    Tcp(TcpListener, SocketAddr),
}

impl Listener {
    /// Where it listens, as a client would name it.
    #[must_use]
    pub fn place(&self) -> Place {
        match self {
            Self::Unix(socket) => Place::Unix(socket.path().to_owned()),
            Self::InheritedUnix(_, path) => Place::Unix(path.clone()),
            Self::Tcp(_, address) => Place::Tcp(*address),
        }
    }

    /// Whether clients come over TCP.
    #[must_use]
    pub fn is_tcp(&self) -> bool {
        matches!(self, Self::Tcp(..))
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

/// Binds `address`. A host name may give several listeners (such as `localhost` on IPv4 and IPv6). `access` is of Unix
/// sockets.
///
/// # Errors
/// The address is in use, unknown, or not ours; a Unix socket's path is taken by a live daemon or by a file.
pub fn bind(address: &ListenAddress, access: SocketAccess) -> Result<Vec<Listener>, Failure> {
    match address {
        ListenAddress::Unix(path) => Ok(vec![Listener::Unix(UnixSocket::bind(path, access)?)]),
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
    fn tcp_ports_are_bound_once() {
        let first = bind(&"127.0.0.1:0".parse().unwrap(), SocketAccess::PRIVATE).unwrap();
        let Place::Tcp(address) = first[0].place() else { panic!() };
        assert!(
            bind(&address.to_string().parse().unwrap(), SocketAccess::PRIVATE)
                .unwrap_err()
                .what
                .contains("cannot listen")
        );
        assert!(
            bind(&"192.0.2.1:0".parse().unwrap(), SocketAccess::PRIVATE)
                .unwrap_err()
                .hint
                .unwrap()
                .contains("no such address")
        );
    }
}
