//! The sockets of a volume to be served: bound by us, or handed over by whoever started us.

use std::path::PathBuf;

use super::Serve;
use crate::cli::banner;
use crate::control::failure::Failure;
use crate::control::listen::{ListenAddress, Listener, bind};
use crate::control::runtime_dir::{CONTROL_SUFFIX, NBD_SUFFIX, check_volume_name, prepare_runtime_dir};
use crate::control::unix_socket::{SocketAccess, UnixSocket};

/// Where operators and clients connect.
pub(super) struct Sockets {
    pub(super) control: UnixSocket,
    pub(super) listeners: Vec<Listener>,
}

impl Serve {
    /// Binds what is asked for; `inherited` are listeners that were handed over.
    pub(super) fn bind(&self, volume_name: &str, inherited: Vec<Listener>) -> Result<Sockets, Failure> {
        let name = self.name.as_deref().unwrap_or(volume_name);
        // It may come from a disk, and becomes part of a path.
        check_volume_name(name)
            .map_err(|what| Failure::new(what).hint("give the volume another name with --name"))?;
        if !inherited.is_empty() && !self.listen.is_empty() {
            return Err(Failure::new("--listen, and sockets handed over (LISTEN_FDS)")
                .hint("one or the other: name the addresses in the .socket unit, or start without it"));
        }
        let needs_folder = (self.listen.is_empty() && inherited.is_empty()) || self.control.is_none();
        let folder = if needs_folder { prepare_runtime_dir()? } else { PathBuf::new() };
        let control = match &self.control {
            Some(path) => UnixSocket::bind(path, SocketAccess::PRIVATE)?,
            None => UnixSocket::bind(&folder.join(format!("{name}{CONTROL_SUFFIX}")), SocketAccess::PRIVATE)?,
        };
        let access = self.access.socket_access()?;
        let mut listeners = inherited;
        if listeners.is_empty() && self.listen.is_empty() {
            let path = folder.join(format!("{name}{NBD_SUFFIX}"));
            listeners.extend(bind(&ListenAddress::Unix(path), access)?);
        }
        for address in &self.listen {
            listeners.extend(bind(address, access)?);
        }
        if self.access.is_open_to_all() {
            warn_of_public(&listeners, name);
        }
        if self.access.has_allow_list() && !listeners.iter().any(Listener::is_tcp) {
            tracing::warn!(
                "--allow is about TCP, and the volume is served on Unix sockets only: it has no effect"
            );
        }
        Ok(Sockets { control, listeners })
    }
}

fn warn_of_public(listeners: &[Listener], name: &str) {
    for place in listeners.iter().map(Listener::place).filter(|place| place.is_public()) {
        tracing::warn!(
            "{}: everybody who can reach this address can read and write the volume; limit that with --allow, or \
             with --tls require and --tls-client-ca (see docs/tls.md)",
            banner::uri(&place, name, false)
        );
    }
}
