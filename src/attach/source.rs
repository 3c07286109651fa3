//! What a device is attached to: a running volume by its name, or an NBD URI; and the connections to it.
//!
//! What must hold: a volume is asked for anew at each reconnection, since a daemon that was restarted may listen
//! elsewhere; a connection is given out only when its handshake is done, without any time limit left on its socket.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeVal;

use crate::control::client::Client;
use crate::control::failure::Failure;
use crate::control::protocol::Request;
use crate::control::runtime_dir::check_volume_name;
use crate::nbd::client::{self, Connected};

/// How long a server may take to answer in its handshake, and a TCP connection to come about.
const HANDSHAKE_TIMEOUT_S: u16 = 10;
/// A TCP peer is asked for a sign of life after so many idle seconds, so many seconds apart, so often.
const KEEPALIVE_IDLE_S: u32 = 10;
const KEEPALIVE_INTERVAL_S: u32 = 5;
const KEEPALIVE_COUNT: u32 = 4;
/// What a TCP peer has not acknowledged for so long condemns the connection, milliseconds.
const UNACKNOWLEDGED_MS_MAX: u32 = 30_000;

const PORT_DEFAULT: u16 = 10809;

/// What the operator named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A running volume.
    Volume(String),
    /// A server of whatever kind.
    Uri(Uri),
}

/// `nbd://HOST[:PORT]/EXPORT` or `nbd+unix:///EXPORT?socket=PATH`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uri {
    text: String,
    place: ServerPlace,
    export_name: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum ServerPlace {
    Unix(PathBuf),
    Tcp { host: String, port: u16 },
}

impl FromStr for Source {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // A volume's name has no slash.
        if text.contains("://") {
            return Uri::parse(text).map(Self::Uri);
        }
        check_volume_name(text)?;
        Ok(Self::Volume(text.to_owned()))
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Volume(name) => write!(f, "volume {name}"),
            Self::Uri(uri) => f.write_str(&uri.text),
        }
    }
}

impl Uri {
    fn parse(text: &str) -> Result<Self, String> {
        let usage = "give nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH";
        let (scheme, rest) = text.split_once("://").unwrap_or_default();
        if scheme.starts_with("nbds") {
            return Err("the kernel's NBD client knows no TLS; tunnel the connection".to_owned());
        }
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let export_name = decode(path)?;
        let place = match scheme {
            "nbd" => {
                let (host, port) = host_and_port(authority).ok_or(usage)?;
                ServerPlace::Tcp { host: decode(host)?, port }
            }
            "nbd+unix" if authority.is_empty() => {
                let socket = query.split('&').find_map(|item| item.strip_prefix("socket=")).unwrap_or("");
                if socket.is_empty() {
                    return Err(format!("`{text}` names no socket; {usage}"));
                }
                let path = decode(socket)?;
                // The keeper may have another working folder.
                ServerPlace::Unix(std::path::absolute(&path).map_err(|error| format!("`{path}`: {error}"))?)
            }
            _ => return Err(format!("`{text}` is no NBD URI that the kernel can use; {usage}")),
        };
        Ok(Self { text: text.to_owned(), place, export_name })
    }
}

fn host_and_port(authority: &str) -> Option<(&str, u16)> {
    let (host, port) = match authority.strip_prefix('[') {
        Some(inner) => inner.split_once(']')?,
        None => authority.split_at(authority.find(':').unwrap_or(authority.len())),
    };
    let port = match port.strip_prefix(':') {
        None if port.is_empty() => PORT_DEFAULT,
        None => return None,
        Some(port) => port.parse().ok()?,
    };
    (!host.is_empty()).then_some((host, port))
}

/// Takes `%XX` for the byte that it stands for.
fn decode(text: &str) -> Result<String, String> {
    let wrong = || format!("`{text}` is no part of a URI: after % stand two hexadecimal digits");
    let mut bytes = Vec::with_capacity(text.len());
    let mut pieces = text.split('%');
    bytes.extend_from_slice(pieces.next().unwrap_or_default().as_bytes());
    for piece in pieces {
        let digits = piece.get(..2).filter(|digits| digits.bytes().all(|byte| byte.is_ascii_hexdigit()));
        let byte = digits.and_then(|digits| u8::from_str_radix(digits, 16).ok()).ok_or_else(wrong)?;
        bytes.push(byte);
        bytes.extend_from_slice(&piece.as_bytes()[2..]);
    }
    match String::from_utf8(bytes) {
        Ok(text) if !text.contains('\0') => Ok(text),
        _ => Err(format!("`{text}` is not UTF-8, or has a NUL")),
    }
}

/// A server that is there, and who it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server {
    /// What the kernel remembers a device by: the volume's identity, or the URI where there is nothing better.
    pub identity: String,
    place: ServerPlace,
    export_name: String,
}

impl Source {
    /// Finds out where the server is and who it is.
    ///
    /// # Errors
    /// The volume is not running, or not to be reached over NBD.
    pub fn find(&self) -> Result<Server, Failure> {
        match self {
            Self::Volume(name) => find_volume(name),
            Self::Uri(Uri { text, place, export_name }) => {
                Ok(Server { identity: text.clone(), place: place.clone(), export_name: export_name.clone() })
            }
        }
    }
}

fn find_volume(name: &str) -> Result<Server, Failure> {
    let mut control = Client::connect_to_volume(name).map_err(|failure| {
        failure.hint("`nbdmirror status` lists the running volumes; an NBD URI names a server elsewhere")
    })?;
    let status = control.ask(&Request::Status)?.status;
    let Some(status) = status else {
        return Err(Failure::new(format!("the daemon of volume {name} gave no status")));
    };
    let mut uris: Vec<Uri> =
        status.daemon.listen.iter().filter_map(|listen| Uri::parse(listen).ok()).collect();
    // The same machine is nearest by its Unix socket.
    uris.sort_by_key(|uri| matches!(uri.place, ServerPlace::Tcp { .. }));
    let Some(Uri { place, export_name, .. }) = uris.into_iter().next() else {
        return Err(Failure::new(format!("volume {name} has no address that the kernel can connect to"))
            .hint("serve it with --listen unix:PATH or --listen ADDR:PORT"));
    };
    Ok(Server { identity: format!("nbdmirror:{}", status.volume.volume_uuid), place, export_name })
}

/// A connection at the start of its transmission phase.
#[derive(Debug)]
pub struct Link {
    stream: Stream,
    /// What the server said of the export.
    pub export: Connected,
}

#[derive(Debug)]
enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.stream {
            Stream::Unix(stream) => stream.as_fd(),
            Stream::Tcp(stream) => stream.as_fd(),
        }
    }
}

impl Server {
    /// Connects and goes through the handshake.
    ///
    /// # Errors
    /// Nobody listens, or it is no NBD server, or it has no such export.
    pub fn connect(&self) -> Result<Link, Failure> {
        let failed = |error: io::Error| {
            Failure::new(format!("cannot connect to {}: {error}", self.place))
                .hint("is it served there? `nbdmirror status` lists the running volumes and where they are")
        };
        match &self.place {
            ServerPlace::Unix(path) => {
                let mut stream = UnixStream::connect(path).map_err(failed)?;
                let export = shake_hands(&mut stream, &self.export_name).map_err(failed)?;
                Ok(Link { stream: Stream::Unix(stream), export })
            }
            ServerPlace::Tcp { host, port } => {
                let mut stream = connect_tcp(host, *port).map_err(failed)?;
                find_dead_peers(&stream).map_err(failed)?;
                let export = shake_hands(&mut stream, &self.export_name).map_err(failed)?;
                Ok(Link { stream: Stream::Tcp(stream), export })
            }
        }
    }
}

/// The handshake, each step within its time. Afterwards the socket waits as long as the kernel does.
fn shake_hands<S: Read + Write + AsFd>(stream: &mut S, export_name: &str) -> io::Result<Connected> {
    limit_time(stream, HANDSHAKE_TIMEOUT_S)?;
    let export = client::connect(stream, export_name)?;
    limit_time(stream, 0)?;
    Ok(export)
}

/// Limits each read and each write; 0: not at all.
fn limit_time(socket: &impl AsFd, seconds: u16) -> io::Result<()> {
    let time = TimeVal::new(seconds.into(), 0);
    setsockopt(socket, sockopt::ReceiveTimeout, &time)?;
    Ok(setsockopt(socket, sockopt::SendTimeout, &time)?)
}

impl fmt::Display for ServerPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "{}", path.display()),
            Self::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

fn connect_tcp(host: &str, port: u16) -> io::Result<TcpStream> {
    let mut result = Err(io::Error::from(io::ErrorKind::NotFound));
    for address in (host, port).to_socket_addrs()? {
        result = TcpStream::connect_timeout(&address, Duration::from_secs(HANDSHAKE_TIMEOUT_S.into()));
        if result.is_ok() {
            break;
        }
    }
    result
}

/// A peer that went away without a word is noticed in about half a minute, whatever the server takes for an answer.
fn find_dead_peers(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    setsockopt(stream, sockopt::KeepAlive, &true)?;
    setsockopt(stream, sockopt::TcpKeepIdle, &KEEPALIVE_IDLE_S)?;
    setsockopt(stream, sockopt::TcpKeepInterval, &KEEPALIVE_INTERVAL_S)?;
    setsockopt(stream, sockopt::TcpKeepCount, &KEEPALIVE_COUNT)?;
    Ok(setsockopt(stream, sockopt::TcpUserTimeout, &UNACKNOWLEDGED_MS_MAX)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uri(text: &str) -> Uri {
        match text.parse() {
            Ok(Source::Uri(uri)) => uri,
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn volumes_and_uris_are_told_apart() {
        assert_eq!("disk-a".parse(), Ok(Source::Volume("disk-a".to_owned())));
        assert_eq!("a:b".parse(), Ok(Source::Volume("a:b".to_owned())));
        assert!("a/b".parse::<Source>().is_err());
        for (text, place, export) in [
            ("nbd://localhost", "localhost:10809", ""),
            ("nbd://localhost/", "localhost:10809", ""),
            ("nbd://127.0.0.1:10810/my%20data", "127.0.0.1:10810", "my data"),
            ("nbd://[::1]:9/a/b", "[::1]:9", "a/b"),
            ("nbd://[::1]/", "[::1]:10809", ""),
            ("nbd+unix:///vol?socket=/run/vol.sock", "/run/vol.sock", "vol"),
            ("nbd+unix://?x=1&socket=/run/a%3Fb", "/run/a?b", ""),
            ("nbd+unix:///B%C3%BCcher?socket=/s", "/s", "Bücher"),
        ] {
            let uri = uri(text);
            assert_eq!((uri.place.to_string().as_str(), uri.export_name.as_str()), (place, export), "{text}");
            assert_eq!(Source::Uri(uri).to_string(), text);
        }
    }

    #[test]
    fn what_cannot_be_used_is_refused_with_a_reason() {
        for (text, reason) in [
            ("nbds://host/x", "TLS"),
            ("nbds+unix:///x?socket=/s", "TLS"),
            ("http://host/x", "no NBD URI"),
            ("nbd:///x", "give nbd://"),
            ("nbd://host:/x", "give nbd://"),
            ("nbd://host:99999/x", "give nbd://"),
            ("nbd://[::1/x", "give nbd://"),
            ("nbd://[::1]9/x", "give nbd://"),
            ("nbd+unix:///x", "names no socket"),
            ("nbd+unix:///x?socket=", "names no socket"),
            ("nbd+unix://host/x?socket=/s", "no NBD URI"),
            ("nbd://host/%4", "hexadecimal"),
            ("nbd://host/%+1", "hexadecimal"),
            ("nbd://host/%00", "NUL"),
            ("nbd://host/%ff", "UTF-8"),
        ] {
            let error = text.parse::<Source>().unwrap_err();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }

    #[test]
    fn a_server_that_is_not_there_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let text = format!("nbd+unix:///?socket={}/none", dir.path().display());
        let server = text.parse::<Source>().unwrap().find().unwrap();
        assert_eq!(server.identity, text);
        let failure = server.connect().unwrap_err();
        assert!(failure.what.contains("/none: No such file"), "{failure}");
    }
}
