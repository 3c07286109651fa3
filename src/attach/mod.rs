//! The kernel's NBD client: a volume as `/dev/nbdN`.
//!
//! ```text
//!   Source ──find──► Server ──connect──► Link, Link…  ──CONNECT──► /dev/nbdN
//!     ▲ volume or URI   who, where         handshakes done              │ a connection dies: LINK_DEAD
//!     └───────────────────────────── Keeper ◄──────────────────────────┘
//!                                      └── new Links ──RECONFIGURE──► /dev/nbdN goes on
//! ```
//!
//! What must hold: a device is only ever connected to the volume that it was attached to; every wait of ours is bounded.
//! How long the device's own users wait is said in [`Options`].

pub mod detach;
pub mod device;
pub mod keeper;
pub mod links;
pub mod message;
pub mod netlink;
pub mod source;
mod state;

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use self::device::{Attachment, Device, System};
use self::keeper::{Keeper, check_export, check_identity};
use self::netlink::{Connect, NbdNetlink, NetlinkError};
use self::source::{Link, Server, Source};
use self::state::{State, StateFile};
use crate::control::failure::Failure;
use crate::nbd::client::Connected;
use crate::nbd::wire::{FLAG_CAN_MULTI_CONN, FLAG_READ_ONLY};

/// Most connections of a device.
pub const CONNECTIONS_MAX: u32 = 16;
/// The request time-out where connections are several, or nobody keeps them, seconds.
const TIMEOUT_S_DEFAULT: u64 = 60;
/// How often the kernel looks whether a request must be sent again, where there is no request time-out, milliseconds.
const REQUEST_CHECK_MS: u32 = 5_000;
/// A device that was just detached may still be open, by udev for one.
const BUSY_TIMEOUT: Duration = Duration::from_secs(2);
/// udev, or devtmpfs, makes the node.
const NODE_TIMEOUT: Duration = Duration::from_secs(5);
const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// A keeper notices within a second that its device was detached.
const STATE_TIMEOUT: Duration = Duration::from_secs(5);

/// How a device is attached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Connections, 1 to [`CONNECTIONS_MAX`].
    pub connections: u32,
    /// Seconds after which a request without an answer condemns its connection and goes to another; 0: never, which the
    /// kernel can do with one connection only. `None`: 0 where there is one connection and a keeper, or else a minute.
    pub timeout_s: Option<u64>,
    /// Seconds for which requests wait while no connection is alive; then they fail.
    pub dead_timeout_s: u64,
    /// Logical block size, bytes: 512, 1024, 2048 or 4096.
    pub block_bytes: u64,
    /// Whether a keeper is to bring dead connections back.
    pub keeper: bool,
}

impl Options {
    fn request_timeout_s(&self) -> u64 {
        let patient = self.connections == 1 && self.keeper;
        self.timeout_s.unwrap_or(if patient { 0 } else { TIMEOUT_S_DEFAULT })
    }
}

/// A device that is attached.
#[derive(Debug)]
pub struct Attached {
    /// Which.
    pub device: Device,
    /// What it is attached to.
    pub export: Connected,
    /// Its connections.
    pub connections: u32,
    /// Whether it was attached before, and only got new connections.
    pub again: bool,
    /// To be run; `None` where none is wanted or another process keeps the device.
    pub keeper: Option<Keeper>,
    /// Whether another process keeps the device.
    pub kept: bool,
}

impl Attached {
    /// Whether the device takes no writes.
    #[must_use]
    pub fn read_only(&self) -> bool {
        is_read_only(&self.export)
    }
}

fn is_read_only(export: &Connected) -> bool {
    export.transmission_flags & FLAG_READ_ONLY != 0
}

fn as_descriptors(links: &[Link]) -> Vec<BorrowedFd<'_>> {
    links.iter().map(AsFd::as_fd).collect()
}

/// Attaches `device`, or one that the kernel chooses, to `source`. Where it is attached to the same already, its dead
/// connections are replaced.
///
/// # Errors
/// The kernel has no nbd, or may not be told; the volume is not running; the device is in use or attached to something else.
pub fn attach(source: Source, device: Option<Device>, options: Options) -> Result<Attached, Failure> {
    let netlink = NbdNetlink::open().map_err(|error| error.failure("cannot attach"))?;
    let system = System::default();
    let server = source.find()?;
    let found = device.and_then(|device| Some((device, system.attachment(device)?)));
    let job = Job { netlink, system, source, server, options };
    match found {
        Some((device, found)) => job.attach_again(device, found),
        None => job.attach_anew(device),
    }
}

/// What the two ways to attach have in common.
struct Job {
    netlink: NbdNetlink,
    system: System,
    source: Source,
    server: Server,
    options: Options,
}

impl Job {
    fn attach_anew(mut self, device: Option<Device>) -> Result<Attached, Failure> {
        let links = self.connect(self.options.connections)?;
        let Some(export) = links.first().map(|link| link.export.clone()) else {
            return Err(Failure::new("a device needs a connection"));
        };
        check_size(export.size_bytes, self.options.block_bytes)?;
        let dead_links = self.netlink.dead_links();
        let device = self.tell_kernel(device, &export, &links)?;
        // The kernel keeps them open; a copy of ours would keep them half alive.
        drop(links);
        let keeper = dead_links
            .map_err(|error| error.failure("cannot listen for dead connections"))
            .and_then(|dead_links| self.settle(device, &export).map(|state| (dead_links, state)));
        let (dead_links, (pid, state)) = match keeper {
            Ok(settled) => settled,
            Err(failure) => {
                // Half attached is worse than not.
                _ = self.netlink.disconnect(device.index);
                return Err(failure);
            }
        };
        let connections = self.options.connections;
        let mut attached =
            Attached { device, export: export.clone(), connections, again: false, keeper: None, kept: false };
        if self.options.keeper {
            attached.keeper = Some(self.into_keeper(dead_links, device, pid, export, state));
        }
        Ok(attached)
    }

    /// So many connections, all to the same export.
    fn connect(&self, count: u32) -> Result<Vec<Link>, Failure> {
        let mut links: Vec<Link> = Vec::new();
        for _ in 0..count {
            let link = self.server.connect()?;
            if let Some(first) = links.first() {
                check_export(&first.export, &link.export)?;
            }
            if count > 1 && link.export.transmission_flags & FLAG_CAN_MULTI_CONN == 0 {
                return Err(Failure::new(
                    "the server does not promise that several connections see the same data",
                )
                .hint("attach with --connections 1"));
            }
            links.push(link);
        }
        Ok(links)
    }

    fn tell_kernel(
        &mut self,
        device: Option<Device>,
        export: &Connected,
        links: &[Link],
    ) -> Result<Device, Failure> {
        let connect = Connect {
            index: device.map(|device| device.index),
            size_bytes: export.size_bytes,
            block_bytes: self.options.block_bytes,
            timeout_s: self.options.request_timeout_s(),
            dead_timeout_s: self.options.dead_timeout_s,
            server_flags: export.transmission_flags,
            backend: &self.server.identity,
        };
        let began = Instant::now();
        loop {
            match self.netlink.connect(&connect, &as_descriptors(links)) {
                Ok(index) => return Ok(Device { index }),
                Err(NetlinkError::Refused(Errno::EBUSY)) if began.elapsed() < BUSY_TIMEOUT => {
                    std::thread::sleep(POLL_INTERVAL);
                }
                Err(error) => return Err(self.attach_failure(device, error)),
            }
        }
    }

    fn attach_failure(&self, device: Option<Device>, error: NetlinkError) -> Failure {
        let Some(device) = device else { return error.failure("cannot attach") };
        let what = format!("cannot attach {}", device.path().display());
        let openers = self.system.openers(device);
        if matches!(error, NetlinkError::Refused(Errno::EBUSY)) && !openers.is_empty() {
            return Failure::new(format!("{what}: process {} has it open", openers.join(", ")))
                .hint("end that, or leave the device out: the kernel finds a free one");
        }
        error.failure(&what)
    }

    /// What is done once the kernel has the device: its settings, its node, our note of it.
    fn settle(&self, device: Device, export: &Connected) -> Result<(String, StateFile), Failure> {
        let node = device.path();
        if self.options.request_timeout_s() == 0
            && let Err(error) = self.system.set_request_check_ms(device, REQUEST_CHECK_MS)
        {
            tracing::debug!("{}: cannot set the interval of checks: {error}", node.display());
        }
        let Some(found) = self.system.attachment(device) else {
            return Err(Failure::new(format!("{} was detached at once", node.display()))
                .hint("`dmesg` has the kernel's reason"));
        };
        if found.size_bytes != export.size_bytes {
            let (is, should) = (found.size_bytes, export.size_bytes);
            return Err(Failure::new(format!("{} has {is} bytes instead of {should}", node.display()))
                .hint("`dmesg` has the kernel's reason"));
        }
        let began = Instant::now();
        while !node.exists() {
            if began.elapsed() > NODE_TIMEOUT {
                let what = format!("the kernel attached {}, but there is no such node", node.display());
                return Err(Failure::new(what).hint("is /dev a devtmpfs, or udev running?"));
            }
            std::thread::sleep(POLL_INTERVAL);
        }
        let state = State { pid: found.pid.clone(), connections: self.options.connections };
        let Some(mut file) = StateFile::take(device, STATE_TIMEOUT)? else {
            return Err(Failure::new(format!("another process keeps {}", node.display()))
                .hint("end that keeper: see `ps ax | grep 'nbdmirror attach'`"));
        };
        file.write(&state)?;
        Ok((found.pid, file))
    }

    fn attach_again(mut self, device: Device, found: Attachment) -> Result<Attached, Failure> {
        let node = device.path();
        let attached_to = |what: &str| {
            Failure::new(format!("{} is attached already, {what} (by process {})", node.display(), found.pid))
                .hint("`nbdmirror detach` it first; or leave the device out: the kernel finds a free one")
        };
        match &found.backend {
            None => return Err(attached_to("and the kernel does not say to what")),
            Some(backend) if check_identity(backend, &self.server).is_err() => {
                return Err(attached_to(&format!("to {backend}")));
            }
            Some(_) => {}
        }
        let state = StateFile::read(device).filter(|state| state.pid == found.pid);
        let connections = state.as_ref().map_or(self.options.connections, |state| state.connections);
        self.options.connections = connections.clamp(1, CONNECTIONS_MAX);
        let dead_links = self.netlink.dead_links().map_err(|error| error.failure("cannot attach"))?;
        let links = self.connect(self.options.connections)?;
        let Some(export) = links.first().map(|link| link.export.clone()) else {
            return Err(Failure::new("a device needs a connection"));
        };
        if export.size_bytes != found.size_bytes || is_read_only(&export) != found.read_only {
            return Err(attached_to("to this volume when it had another size, or was read-only or not"));
        }
        self.netlink
            .reconnect(device.index, &self.server.identity, &as_descriptors(&links))
            .map_err(|error| error.failure(&format!("cannot reconnect {}", node.display())))?;
        drop(links);
        // A keeper of this very attachment stays; one of an earlier attachment ends soon.
        let patience = if state.is_some() { Duration::ZERO } else { STATE_TIMEOUT };
        let file = StateFile::take(device, patience)?;
        let mut attached = Attached {
            device,
            export: export.clone(),
            connections: self.options.connections,
            again: true,
            keeper: None,
            kept: file.is_none(),
        };
        if let Some(mut file) = file.filter(|_| self.options.keeper) {
            file.write(&State { pid: found.pid.clone(), connections: self.options.connections })?;
            attached.keeper = Some(self.into_keeper(dead_links, device, found.pid, export, file));
        }
        Ok(attached)
    }

    fn into_keeper(
        self,
        dead_links: netlink::DeadLinks,
        device: Device,
        pid: String,
        export: Connected,
        state: StateFile,
    ) -> Keeper {
        Keeper {
            system: self.system,
            netlink: self.netlink,
            dead_links,
            source: self.source,
            device,
            pid,
            identity: self.server.identity,
            export,
            options: self.options,
            _state: state,
        }
    }
}

/// Refuses what the kernel cannot show as a block device.
fn check_size(size_bytes: u64, block_bytes: u64) -> Result<(), Failure> {
    if size_bytes == 0 {
        return Err(Failure::new("the export is empty: the kernel cannot attach it"));
    }
    if !size_bytes.is_multiple_of(block_bytes) {
        return Err(Failure::new(format!(
            "the export has {size_bytes} bytes, which is no multiple of the block size {block_bytes}"
        ))
        .hint("attach with a smaller --block-size"));
    }
    if i64::try_from(size_bytes).is_err() {
        return Err(Failure::new(format!(
            "the export has {size_bytes} bytes; the kernel takes less than 8 EiB"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_gets_only_sizes_that_it_can_show() {
        assert_eq!(check_size(4096, 4096), Ok(()));
        assert_eq!(check_size(512, 512), Ok(()));
        assert_eq!(check_size(i64::MAX as u64 + 1 - 4096, 4096), Ok(()));
        for (size, block) in [(0, 512), (512, 4096), (4097, 512), (1 << 63, 512)] {
            assert!(check_size(size, block).is_err(), "{size}");
        }
    }

    #[test]
    fn only_one_kept_connection_can_wait_for_ever() {
        let options = |connections, timeout_s, keeper| Options {
            connections,
            timeout_s,
            dead_timeout_s: 300,
            block_bytes: 512,
            keeper,
        };
        assert_eq!(options(1, None, true).request_timeout_s(), 0);
        assert_eq!(options(1, None, false).request_timeout_s(), TIMEOUT_S_DEFAULT);
        assert_eq!(options(4, None, true).request_timeout_s(), TIMEOUT_S_DEFAULT);
        assert_eq!(options(4, Some(7), true).request_timeout_s(), 7);
        assert_eq!(options(1, Some(7), true).request_timeout_s(), 7);
    }
}
