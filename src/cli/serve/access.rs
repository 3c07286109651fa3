//! Who may connect, and how: the options of `serve` on TLS, addresses, Unix sockets and numbers.

use std::path::PathBuf;
use std::sync::Arc;

use clap::{Args, ValueEnum};
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Group, Uid, User};

use crate::control::allow::{AllowList, Allowed};
use crate::control::failure::Failure;
use crate::control::tls::{Tls, TlsFiles};
use crate::control::unix_socket::SocketAccess;
use crate::units::SECOND_NS;

/// Default of `--max-connections`.
const CONNECTIONS_MAX_DEFAULT: usize = 1000;
/// Descriptors that are not for clients: replicas, sockets, rings, operators, and two for each handshake.
const DESCRIPTORS_KEPT: u64 = 64 + 2 * 256;
/// Descriptors of a connection: its socket, and with TLS both ends of a pair and a third to watch one.
const DESCRIPTORS_PLAIN: u64 = 1;
const DESCRIPTORS_TLS: u64 = 4;

#[derive(Args, Debug)]
pub(super) struct Access {
    /// Whether clients may (allow) or must (require) use TLS.
    #[arg(long, value_enum, default_value_t = TlsChoice::Off, hide_possible_values = true, value_name = "off|allow|require")]
    tls: TlsChoice,
    /// The server's certificate and those between it and its authority (PEM). SIGHUP reads the TLS files again.
    #[arg(long, value_name = "FILE")]
    tls_cert: Option<PathBuf>,
    /// The certificate's private key (PEM, without passphrase).
    #[arg(long, value_name = "FILE")]
    tls_key: Option<PathBuf>,
    /// Clients that use TLS need a certificate from one of these authorities (PEM).
    #[arg(long, value_name = "FILE")]
    tls_client_ca: Option<PathBuf>,
    /// Only clients from this address or network may connect over TCP (may be given several times).
    #[arg(long, value_name = "CIDR")]
    allow: Vec<Allowed>,
    /// File mode of Unix sockets for clients [default: 600].
    #[arg(long, value_name = "OCTAL", value_parser = parse_mode)]
    socket_mode: Option<Mode>,
    /// Owner of Unix sockets for clients.
    #[arg(long, value_name = "USER[:GROUP]")]
    socket_owner: Option<String>,
    /// Most clients at once; a further one is turned away.
    #[arg(long, value_name = "N", default_value_t = CONNECTIONS_MAX_DEFAULT, value_parser = parse_connections)]
    max_connections: usize,
    /// Disconnect clients that ask for nothing for so long [default: never].
    #[arg(long, value_name = "SECONDS", value_parser = parse_idle_timeout)]
    idle_timeout: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum TlsChoice {
    Off,
    Allow,
    Require,
}

/// As many as the engine takes.
fn parse_idle_timeout(text: &str) -> Result<u64, String> {
    match text.parse() {
        Ok(seconds @ 1..=10_000_000) => Ok(seconds),
        _ => Err("give seconds from 1 to 10000000; without this option nobody is disconnected".to_owned()),
    }
}

fn parse_connections(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(count @ 1..=4096) => Ok(count),
        _ => Err("give a number from 1 to 4096".to_owned()),
    }
}

fn parse_mode(text: &str) -> Result<Mode, String> {
    match u32::from_str_radix(text, 8) {
        Ok(bits @ 0..=0o777) => Ok(Mode::from_bits_truncate(bits)),
        _ => Err("give an octal mode from 0 to 777, such as 660".to_owned()),
    }
}

impl Access {
    pub(super) fn requires_tls(&self) -> bool {
        self.tls == TlsChoice::Require
    }

    /// Whether who reaches a TCP listener is let in.
    pub(super) fn is_open_to_all(&self) -> bool {
        self.allow.is_empty() && !self.requires_tls()
    }

    pub(super) fn has_allow_list(&self) -> bool {
        !self.allow.is_empty()
    }

    pub(super) fn allow_list(&self) -> AllowList {
        AllowList(self.allow.clone())
    }

    pub(super) fn idle_ns_max(&self) -> Option<u64> {
        self.idle_timeout.map(|seconds| seconds * SECOND_NS)
    }

    /// TLS, and whether it is required; the files are read.
    pub(super) fn tls(&self) -> Result<Option<(Arc<Tls>, bool)>, Failure> {
        let given = [&self.tls_cert, &self.tls_key, &self.tls_client_ca].iter().any(|file| file.is_some());
        match (self.tls, &self.tls_cert, &self.tls_key) {
            (TlsChoice::Off, ..) if given => Err(Failure::new("TLS files are given, and TLS is off")
                .hint("say --tls require (or --tls allow, which lets clients go without)")),
            (TlsChoice::Off, ..) => Ok(None),
            (_, Some(certificate), Some(key)) => {
                let files = TlsFiles {
                    certificate: certificate.clone(),
                    key: key.clone(),
                    client_ca: self.tls_client_ca.clone(),
                };
                Ok(Some((Arc::new(Tls::load(files)?), self.requires_tls())))
            }
            _ => Err(Failure::new("TLS needs a certificate and its key")
                .hint("give --tls-cert FILE and --tls-key FILE; docs/tls.md shows how to make them")),
        }
    }

    /// Mode and owner of Unix sockets for clients.
    pub(super) fn socket_access(&self) -> Result<SocketAccess, Failure> {
        let mut access = SocketAccess::PRIVATE;
        if let Some(mode) = self.socket_mode {
            access.mode = mode;
        }
        if let Some(owner) = &self.socket_owner {
            (access.user, access.group) = find_owner(owner)?;
        }
        Ok(access)
    }

    /// How many clients there may be: as many as is asked for and as there are descriptors for.
    pub(super) fn connections_max(&self) -> usize {
        let descriptors = getrlimit(Resource::RLIMIT_NOFILE).map_or(u64::MAX, |(soft, _)| soft);
        let each = if self.tls == TlsChoice::Off { DESCRIPTORS_PLAIN } else { DESCRIPTORS_TLS };
        let room = (descriptors.saturating_sub(DESCRIPTORS_KEPT) / each).max(1);
        let room = usize::try_from(room).unwrap_or(usize::MAX);
        if room < self.max_connections {
            tracing::warn!(
                "{room} clients at once, at most, instead of {}: the limit of open files is {descriptors} (ulimit -n)",
                self.max_connections
            );
        }
        room.min(self.max_connections)
    }
}

/// `USER`, `USER:GROUP` or `:GROUP`, by names or numbers.
fn find_owner(text: &str) -> Result<(Option<Uid>, Option<Gid>), Failure> {
    let (user, group) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (text, None),
    };
    if user.is_empty() && group.is_none_or(str::is_empty) {
        return Err(Failure::new("--socket-owner names nobody").hint("give USER, USER:GROUP or :GROUP"));
    }
    let unknown = |kind: &str, name: &str| {
        Failure::new(format!("--socket-owner: there is no {kind} `{name}`"))
            .hint("give a name that `getent` knows, or a number")
    };
    let uid = match user {
        "" => None,
        name => Some(
            name.parse()
                .ok()
                .map(Uid::from_raw)
                .or_else(|| User::from_name(name).ok().flatten().map(|user| user.uid))
                .ok_or_else(|| unknown("user", name))?,
        ),
    };
    let gid = match group {
        None | Some("") => None,
        Some(name) => Some(
            name.parse()
                .ok()
                .map(Gid::from_raw)
                .or_else(|| Group::from_name(name).ok().flatten().map(|group| group.gid))
                .ok_or_else(|| unknown("group", name))?,
        ),
    };
    Ok((uid, gid))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_idle_timeout_is_some_seconds() {
        assert_eq!((parse_idle_timeout("1"), parse_idle_timeout("10000000")), (Ok(1), Ok(10_000_000)));
        for bad in ["0", "-1", "10000001", "never", "99999999999999999999"] {
            assert!(parse_idle_timeout(bad).unwrap_err().contains("without this option"), "{bad}");
        }
    }

    #[test]
    fn modes_are_octal() {
        for (text, bits) in [("600", 0o600), ("0660", 0o660), ("7", 7), ("777", 0o777)] {
            assert_eq!(parse_mode(text).unwrap().bits(), bits);
        }
        for text in ["", "8", "1000", "rw-------", "-1", "4755"] {
            assert!(parse_mode(text).is_err(), "{text}");
        }
    }

    #[test]
    fn owners_are_names_or_numbers() {
        let root = (Some(Uid::from_raw(0)), Some(Gid::from_raw(0)));
        for (text, owner) in [
            ("root", (root.0, None)),
            ("root:root", root),
            ("0:0", root),
            (":root", (None, root.1)),
            ("root:", (root.0, None)),
            ("12345:54321", (Some(Uid::from_raw(12345)), Some(Gid::from_raw(54321)))),
        ] {
            assert_eq!(find_owner(text).unwrap(), owner, "{text}");
        }
        for text in ["", ":", "no-such-user-here", "root:no-such-group-here", "-1"] {
            assert!(find_owner(text).unwrap_err().hint.is_some(), "{text}");
        }
    }
}
