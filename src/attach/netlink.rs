//! The kernel's NBD client, over its generic netlink family `nbd` (`linux/nbd-netlink.h`).
//!
//! ```text
//!   CONNECT ──► attached ──(a connection ends)──► LINK_DEAD to the group `nbd_mc_group` ──► RECONFIGURE: a new socket in its place
//!                  └── DISCONNECT ──► free, once nobody has it open
//! ```
//!
//! What must hold: sockets are handed over as descriptors, which the kernel keeps open by itself; only the kernel's own
//! messages count (port 0), and of answers only the one to the request that waits.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::Duration;

use netlink_sys::protocols::NETLINK_GENERIC;
use netlink_sys::{Socket, SocketAddr};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::message::{self, Attributes, Content, KIND_CONTROL, Malformed};
use crate::control::failure::Failure;

const FAMILY_NAME: &str = "nbd";
const FAMILY_VERSION: u8 = 1;
const DEAD_LINKS_GROUP_NAME: &str = "nbd_mc_group";

const CONTROL_GET_FAMILY: u8 = 3;
const CONTROL_VERSION: u8 = 1;
const CONTROL_ATTRIBUTE_FAMILY_ID: u16 = 1;
const CONTROL_ATTRIBUTE_FAMILY_NAME: u16 = 2;
const CONTROL_ATTRIBUTE_GROUPS: u16 = 7;
const GROUP_ATTRIBUTE_NAME: u16 = 1;
const GROUP_ATTRIBUTE_ID: u16 = 2;

const COMMAND_CONNECT: u8 = 1;
const COMMAND_DISCONNECT: u8 = 2;
const COMMAND_RECONFIGURE: u8 = 3;
const COMMAND_LINK_DEAD: u8 = 4;

const ATTRIBUTE_INDEX: u16 = 1;
const ATTRIBUTE_SIZE_BYTES: u16 = 2;
const ATTRIBUTE_BLOCK_SIZE_BYTES: u16 = 3;
const ATTRIBUTE_TIMEOUT_S: u16 = 4;
const ATTRIBUTE_SERVER_FLAGS: u16 = 5;
const ATTRIBUTE_CLIENT_FLAGS: u16 = 6;
const ATTRIBUTE_SOCKETS: u16 = 7;
const ATTRIBUTE_DEAD_CONNECTION_TIMEOUT_S: u16 = 8;
const ATTRIBUTE_BACKEND: u16 = 10;
const SOCKETS_ATTRIBUTE_ITEM: u16 = 1;
const SOCKET_ATTRIBUTE_DESCRIPTOR: u16 = 1;

/// Longest datagram that is taken, bytes; the kernel's are a few hundred.
const DATAGRAM_BYTES_MAX: usize = 64 << 10;
/// The kernel answers before sending returns; this is for a kernel that does not.
const ANSWER_TIMEOUT_MS: u16 = 10_000;

/// Why the kernel did not do it.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// There is no family `nbd`: its module is not loaded.
    #[error("this kernel has no nbd")]
    NoNbd,
    /// The kernel refused.
    #[error("{0}")]
    Refused(Errno),
    /// The netlink socket failed.
    #[error("netlink: {0}")]
    Io(#[from] io::Error),
    /// The kernel's answer makes no sense.
    #[error(transparent)]
    Malformed(#[from] Malformed),
}

impl NetlinkError {
    /// In words for an operator; `what` is what was tried, such as "cannot attach /dev/nbd0".
    #[must_use]
    pub fn failure(self, what: &str) -> Failure {
        match self {
            Self::NoNbd => Failure::new(format!("{what}: this kernel has no nbd"))
                .hint("load it: `modprobe nbd` (at each boot: a line `nbd` in /etc/modules-load.d/nbd.conf)"),
            Self::Refused(Errno::EPERM) => Failure::new(format!("{what}: not permitted"))
                .hint("block devices are root's to attach and detach: use sudo (it takes CAP_SYS_ADMIN)"),
            Self::Refused(Errno::EBUSY) => Failure::new(format!("{what}: the device is in use"))
                .hint("take another one, or leave the device out: the kernel finds a free one"),
            Self::Refused(errno) => {
                Failure::new(format!("{what}: {}", errno.desc())).hint("`dmesg` has the kernel's reason")
            }
            error @ (Self::Io(_) | Self::Malformed(_)) => Failure::new(format!("{what}: {error}")),
        }
    }
}

/// What CONNECT is told.
#[derive(Clone, Debug)]
pub struct Connect<'a> {
    /// The device's number; `None`: the first free one.
    pub index: Option<u32>,
    /// Size, bytes.
    pub size_bytes: u64,
    /// Logical block size, bytes: a power of two from 512 to the page size.
    pub block_bytes: u64,
    /// Seconds after which a request without an answer condemns its connection; 0: see `docs/attach.md`.
    pub timeout_s: u64,
    /// Seconds for which requests wait while no connection is alive; 0: they fail at once.
    pub dead_timeout_s: u64,
    /// The export's transmission flags.
    pub server_flags: u16,
    /// What RECONFIGURE must name again, up to 4 KiB without NUL.
    pub backend: &'a str,
}

/// The family `nbd` of this kernel, as it is numbered since it was loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Family {
    id: u16,
    dead_links_group: Option<u32>,
}

/// A socket to the kernel's NBD client.
#[derive(Debug)]
pub struct NbdNetlink {
    socket: Socket,
    family: Family,
    sequence: u32,
}

impl NbdNetlink {
    /// Finds the kernel's NBD client.
    ///
    /// # Errors
    /// [`NetlinkError::NoNbd`] where there is none.
    pub fn open() -> Result<Self, NetlinkError> {
        let nobody = Family { id: KIND_CONTROL, dead_links_group: None };
        let mut this = Self { socket: bound_socket()?, family: nobody, sequence: 0 };
        let name = Attributes::default().text(CONTROL_ATTRIBUTE_FAMILY_NAME, FAMILY_NAME);
        let answer = this.request(CONTROL_GET_FAMILY, CONTROL_VERSION, &name, parse_family);
        this.family = match answer {
            Err(NetlinkError::Refused(Errno::ENOENT)) => return Err(NetlinkError::NoNbd),
            answer => answer?.ok_or(Malformed)?,
        };
        Ok(this)
    }

    /// Attaches a device to `sockets`, each at the start of its transmission phase, and gives the device's number.
    ///
    /// # Errors
    /// The kernel refused: `EPERM`, `EBUSY` (in use), `EINVAL` (its log says what).
    pub fn connect(
        &mut self,
        connect: &Connect<'_>,
        sockets: &[BorrowedFd<'_>],
    ) -> Result<u32, NetlinkError> {
        let mut attributes = Attributes::default();
        if let Some(index) = connect.index {
            attributes = attributes.u32(ATTRIBUTE_INDEX, index);
        }
        let attributes = attributes
            .u64(ATTRIBUTE_SIZE_BYTES, connect.size_bytes)
            .u64(ATTRIBUTE_BLOCK_SIZE_BYTES, connect.block_bytes)
            .u64(ATTRIBUTE_TIMEOUT_S, connect.timeout_s)
            .u64(ATTRIBUTE_DEAD_CONNECTION_TIMEOUT_S, connect.dead_timeout_s)
            .u64(ATTRIBUTE_SERVER_FLAGS, connect.server_flags.into())
            // None: the device stays when its last user closes it, and its node when it is detached.
            .u64(ATTRIBUTE_CLIENT_FLAGS, 0)
            .text(ATTRIBUTE_BACKEND, connect.backend)
            .nested(ATTRIBUTE_SOCKETS, &encode_sockets(sockets));
        let index = self.request(COMMAND_CONNECT, FAMILY_VERSION, &attributes, parse_index)?;
        // The kernel leaves the number out only when it has no memory for it.
        index.or(connect.index).ok_or_else(|| Malformed.into())
    }

    /// Offers `sockets` to a device in place of connections that are dead. Those that are not needed are closed as soon
    /// as the caller closes them, too: the kernel does not say how many that is.
    ///
    /// # Errors
    /// The kernel refused: `EINVAL` where the device is not attached, or attached to another backend.
    pub fn reconnect(
        &mut self,
        index: u32,
        backend: &str,
        sockets: &[BorrowedFd<'_>],
    ) -> Result<(), NetlinkError> {
        let attributes = Attributes::default()
            .u32(ATTRIBUTE_INDEX, index)
            .text(ATTRIBUTE_BACKEND, backend)
            .nested(ATTRIBUTE_SOCKETS, &encode_sockets(sockets));
        self.request(COMMAND_RECONFIGURE, FAMILY_VERSION, &attributes, |_, _| Ok(None::<()>)).map(|_| ())
    }

    /// Detaches a device: what is in flight fails, whoever has it open gets errors. Done also where it is not attached.
    ///
    /// # Errors
    /// The kernel refused: `EINVAL` where there is no such device.
    pub fn disconnect(&mut self, index: u32) -> Result<(), NetlinkError> {
        let attributes = Attributes::default().u32(ATTRIBUTE_INDEX, index);
        self.request(COMMAND_DISCONNECT, FAMILY_VERSION, &attributes, |_, _| Ok(None::<()>)).map(|_| ())
    }

    /// Listens from now on to which devices lose connections.
    ///
    /// # Errors
    /// The socket cannot be made, or the kernel has no such group.
    pub fn dead_links(&self) -> Result<DeadLinks, NetlinkError> {
        let group = self.family.dead_links_group.ok_or(NetlinkError::Refused(Errno::ENOENT))?;
        let socket = bound_socket()?;
        socket.add_membership(group)?;
        Ok(DeadLinks { socket, family: self.family.id })
    }

    /// Sends a request and waits until it is done. `parse` reads the family's answers that come before.
    fn request<T>(
        &mut self,
        command: u8,
        version: u8,
        attributes: &Attributes,
        parse: impl Fn(u8, &[u8]) -> Result<Option<T>, Malformed>,
    ) -> Result<Option<T>, NetlinkError> {
        self.sequence += 1;
        let request = message::encode(self.family.id, command, version, self.sequence, attributes);
        self.socket.send_to(&request, &SocketAddr::new(0, 0), 0)?;
        let mut parsed = None;
        loop {
            let Some(datagram) = receive(&self.socket, PollTimeout::from(ANSWER_TIMEOUT_MS))? else {
                return Err(io::Error::from(io::ErrorKind::TimedOut).into());
            };
            let mut rest = &datagram[..];
            while let Some(message) = message::take_message(&mut rest)? {
                if message.sequence != self.sequence {
                    continue;
                }
                match message.content {
                    Content::Result(0) => return Ok(parsed),
                    Content::Result(errno) => return Err(NetlinkError::Refused(Errno::from_raw(errno))),
                    Content::Family { family, command, attributes } if family == self.family.id => {
                        parsed = parsed.or(parse(command, attributes)?);
                    }
                    Content::Family { .. } | Content::Other => {}
                }
            }
        }
    }
}

/// What [`DeadLinks::wait`] heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// Time is over.
    Nothing,
    /// Devices that lost a connection each.
    Died(u32),
    /// More than the socket could hold: nobody knows what died.
    Lost,
}

/// Hears when connections die.
#[derive(Debug)]
pub struct DeadLinks {
    socket: Socket,
    family: u16,
}

impl DeadLinks {
    /// Waits for dead connections of device `index`, at most `timeout`.
    ///
    /// # Errors
    /// The socket fails.
    pub fn wait(&self, index: u32, timeout: Duration) -> Result<Heard, NetlinkError> {
        let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
        let datagram = match receive(&self.socket, timeout) {
            Ok(Some(datagram)) => datagram,
            Ok(None) => return Ok(Heard::Nothing),
            Err(error) if error.raw_os_error() == Some(Errno::ENOBUFS as i32) => return Ok(Heard::Lost),
            Err(error) => return Err(error.into()),
        };
        match count_dead(&datagram, self.family, index) {
            Ok(0) => Ok(Heard::Nothing),
            Ok(count) => Ok(Heard::Died(count)),
            Err(Malformed) => Ok(Heard::Lost),
        }
    }
}

/// How many connections of device `index` the datagram says have died.
fn count_dead(datagram: &[u8], family: u16, index: u32) -> Result<u32, Malformed> {
    let mut rest = datagram;
    let mut count = 0;
    while let Some(message) = message::take_message(&mut rest)? {
        if let Content::Family { family: from, command: COMMAND_LINK_DEAD, attributes } = message.content {
            let whose = message::attribute(attributes, ATTRIBUTE_INDEX)?.and_then(message::as_u32);
            if from == family && whose == Some(index) {
                count += 1;
            }
        }
    }
    Ok(count)
}

fn bound_socket() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_GENERIC)?;
    socket.bind_auto()?;
    Ok(socket)
}

/// The next datagram of the kernel's; `None` after `timeout`.
fn receive(socket: &Socket, timeout: PollTimeout) -> io::Result<Option<Vec<u8>>> {
    loop {
        let mut descriptors = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        match poll(&mut descriptors, timeout) {
            Ok(0) => return Ok(None),
            Ok(_) => {}
            Err(Errno::EINTR) => continue,
            Err(errno) => return Err(errno.into()),
        }
        let mut datagram = Vec::with_capacity(DATAGRAM_BYTES_MAX);
        let (_, sender) = socket.recv_from(&mut datagram, 0)?;
        if sender.port_number() == 0 {
            return Ok(Some(datagram));
        }
    }
}

fn encode_sockets(sockets: &[BorrowedFd<'_>]) -> Attributes {
    sockets.iter().fold(Attributes::default(), |all, socket| {
        let descriptor = socket.as_raw_fd().cast_unsigned();
        all.nested(
            SOCKETS_ATTRIBUTE_ITEM,
            &Attributes::default().u32(SOCKET_ATTRIBUTE_DESCRIPTOR, descriptor),
        )
    })
}

fn parse_index(_command: u8, attributes: &[u8]) -> Result<Option<u32>, Malformed> {
    Ok(message::attribute(attributes, ATTRIBUTE_INDEX)?.and_then(message::as_u32))
}

fn parse_family(_command: u8, attributes: &[u8]) -> Result<Option<Family>, Malformed> {
    let id = message::attribute(attributes, CONTROL_ATTRIBUTE_FAMILY_ID)?.and_then(message::as_u16);
    let mut dead_links_group = None;
    let groups = message::attribute(attributes, CONTROL_ATTRIBUTE_GROUPS)?.unwrap_or_default();
    for (_, group) in message::attributes(groups)? {
        let name = message::attribute(group, GROUP_ATTRIBUTE_NAME)?.unwrap_or_default();
        if name.strip_suffix(&[0]) == Some(DEAD_LINKS_GROUP_NAME.as_bytes()) {
            dead_links_group = message::attribute(group, GROUP_ATTRIBUTE_ID)?.and_then(message::as_u32);
        }
    }
    Ok(id.map(|id| Family { id, dead_links_group }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(message: &[u8]) -> &[u8] {
        &message[20..]
    }

    #[test]
    fn the_family_and_its_group_are_found() {
        let group = |name: &str, id| {
            Attributes::default().u32(GROUP_ATTRIBUTE_ID, id).text(GROUP_ATTRIBUTE_NAME, name)
        };
        let groups =
            Attributes::default().nested(1, &group("other", 3)).nested(2, &group("nbd_mc_group", 40));
        let answer = message::encode(0, 1, 1, 1, &Attributes::default().nested(7, &groups));
        assert_eq!(parse_family(1, body(&answer)), Ok(None), "without its number");
        // The number of a family has 16 bits, which we never send.
        let mut with_id = vec![6, 0, 1, 0, 0x1c, 0, 0, 0];
        if cfg!(target_endian = "big") {
            with_id = vec![0, 6, 0, 1, 0, 0x1c, 0, 0];
        }
        with_id.extend_from_slice(body(&answer));
        let wanted = Family { id: 0x1c, dead_links_group: Some(40) };
        assert_eq!(parse_family(1, &with_id), Ok(Some(wanted)));
    }

    #[test]
    fn only_this_devices_dead_links_are_counted() {
        let dead =
            |index| message::encode(0x1c, COMMAND_LINK_DEAD, 1, 0, &Attributes::default().u32(1, index));
        let other_command = message::encode(0x1c, COMMAND_CONNECT, 1, 0, &Attributes::default().u32(1, 4));
        let other_family = message::encode(0x1d, COMMAND_LINK_DEAD, 1, 0, &Attributes::default().u32(1, 4));
        let datagram = [dead(4), dead(5), other_command, other_family, dead(4)].concat();
        assert_eq!(count_dead(&datagram, 0x1c, 4), Ok(2));
        assert_eq!(count_dead(&datagram, 0x1c, 6), Ok(0));
        assert_eq!(count_dead(&datagram[..datagram.len() - 1], 0x1c, 4), Err(Malformed));
    }

    #[test]
    fn failures_say_what_to_do() {
        for (error, what, hint) in [
            (NetlinkError::NoNbd, "this kernel has no nbd", "modprobe nbd"),
            (NetlinkError::Refused(Errno::EPERM), "not permitted", "sudo"),
            (NetlinkError::Refused(Errno::EBUSY), "in use", "another"),
            (NetlinkError::Refused(Errno::EINVAL), "Invalid argument", "dmesg"),
        ] {
            let failure = error.failure("cannot attach /dev/nbd0");
            assert!(failure.what.starts_with("cannot attach /dev/nbd0: "), "{failure}");
            assert!(failure.what.contains(what), "{failure}");
            assert!(failure.hint.as_ref().is_some_and(|text| text.contains(hint)), "{failure}");
        }
    }

    /// Runs on every kernel: one without nbd says so, one with it is found.
    #[test]
    fn the_control_family_answers() {
        match NbdNetlink::open() {
            Ok(found) => assert!(found.family.id > KIND_CONTROL),
            Err(error) => assert!(matches!(error, NetlinkError::NoNbd | NetlinkError::Io(_)), "{error}"),
        }
    }
}
