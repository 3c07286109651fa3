//! Started by systemd: listeners that it hands over, and telling it how far we are.
//!
//! What must hold: listeners are taken before any thread starts. What we are given is checked: a socket of another
//! kind is refused and not listened on.

use std::net::TcpListener;
use std::os::fd::AsFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;

use listenfd::ListenFd;
use nix::sys::socket::{getsockopt, sockopt};

use super::failure::Failure;
use super::listen::Listener;

/// More sockets than anybody hands over.
const INHERITED_MAX: usize = 64;

/// The listeners that whoever started this process hands over (`LISTEN_FDS`, see sd_listen_fds(3)); none where nobody
/// does. To be called once, before any thread is started: takes the variables out of the environment.
///
/// # Errors
/// One of them is no stream socket that listens on a path, or on a TCP port; or their number is none.
pub fn inherited_listeners() -> Result<Vec<Listener>, Failure> {
    let pid = std::env::var("LISTEN_PID").unwrap_or_default();
    if pid.is_empty() || pid == std::process::id().to_string() {
        check_count(&std::env::var_os("LISTEN_FDS").unwrap_or_default().to_string_lossy())?;
    }
    let mut sockets = ListenFd::from_env();
    (0..sockets.len()).map(|index| take(&mut sockets, index)).collect()
}

/// Who hands over sockets says how many. Where that cannot be made out, clients would wait on sockets that nobody takes.
fn check_count(text: &str) -> Result<(), Failure> {
    if text.is_empty() || text.parse::<usize>().is_ok_and(|count| count <= INHERITED_MAX) {
        return Ok(());
    }
    Err(Failure::new(format!("LISTEN_FDS is `{text}`, no number of sockets from 0 to {INHERITED_MAX}"))
        .hint("whoever starts nbdmirror sets it, as systemd does for a .socket unit; without that: `unset LISTEN_FDS`"))
}

fn take(sockets: &mut ListenFd, index: usize) -> Result<Listener, Failure> {
    let failed = |what: String| {
        Failure::new(format!("socket {} of those handed over (LISTEN_FDS) {what}", index + 1)).hint(
            "nbdmirror serves on stream sockets: ListenStream= with a path or a port, Accept=no, in the .socket unit",
        )
    };
    // Unix first: the other kind takes nothing that it does not understand.
    if let Ok(Some(listener)) = sockets.take_unix_listener(index) {
        check_listens(&listener).map_err(failed)?;
        let address = listener.local_addr().map_err(|error| failed(format!("has no address: {error}")))?;
        return match address.as_pathname() {
            Some(path) => Ok(Listener::InheritedUnix(listener, path.to_owned())),
            None => Err(failed("is a Unix socket without a path".to_owned())),
        };
    }
    match sockets.take_tcp_listener(index) {
        Ok(Some(listener)) => tcp(listener).map_err(failed),
        Ok(None) => Err(failed("was taken already".to_owned())),
        Err(_) => Err(failed("is neither a Unix nor a TCP stream socket".to_owned())),
    }
}

fn tcp(listener: TcpListener) -> Result<Listener, String> {
    check_listens(&listener)?;
    let address = listener.local_addr().map_err(|error| format!("has no address: {error}"))?;
    Ok(Listener::Tcp(listener, address))
}

fn check_listens(socket: &impl AsFd) -> Result<(), String> {
    match getsockopt(socket, sockopt::AcceptConn) {
        Ok(true) => Ok(()),
        Ok(false) => Err("does not listen".to_owned()),
        Err(errno) => Err(format!("is no socket that could listen: {}", errno.desc())),
    }
}

/// Tells systemd, where it wants to know (`NOTIFY_SOCKET`, see sd_notify(3)). Nobody else misses it.
pub fn notify(state: &str) {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET").filter(|path| !path.is_empty()) else { return };
    let address = match path.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(Path::new(&path)),
    };
    let sent = address.and_then(|address| UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address));
    if let Err(error) = sent {
        tracing::warn!("cannot tell the service manager {state}: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_of_sockets_that_is_none_is_refused() {
        for good in ["", "0", "1", "64"] {
            assert!(check_count(good).is_ok(), "{good}");
        }
        for bad in ["65", "-1", "abc", "1 2", " ", "99999999999999999999"] {
            assert!(check_count(bad).is_err(), "{bad}");
        }
    }
}
