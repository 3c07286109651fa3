//! The wire: the protocol's numbers, a socket with every byte under control, and the handshake.
//!
//! Written from the specification (`doc/proto.md` of NetworkBlockDevice/nbd) and apart from the server's code, whose
//! constants are not used here, so that an error in the protocol does not hide in both.
//!
//! What must hold: every reply to an option is checked (magic, echoed option, known type, data of the right form) before
//! a case sees it; a peer silent for [`SILENCE_MAX`] has hung, and the case fails.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// A peer that neither answers nor closes for this long has hung.
pub(crate) const SILENCE_MAX: Duration = Duration::from_secs(20);
/// Longest string of the protocol, bytes.
pub(crate) const STRING_MAX: usize = 4096;

const GREETING: [u8; 16] = *b"NBDMAGICIHAVEOPT";
const OPTION_MAGIC: [u8; 8] = *b"IHAVEOPT";
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

/// Handshake and client flags.
pub(crate) const FIXED_NEWSTYLE: u32 = 1;
pub(crate) const NO_ZEROES: u32 = 2;

/// Options.
pub(crate) mod opt {
    pub(crate) const EXPORT_NAME: u32 = 1;
    pub(crate) const ABORT: u32 = 2;
    pub(crate) const LIST: u32 = 3;
    pub(crate) const PEEK_EXPORT: u32 = 4;
    pub(crate) const STARTTLS: u32 = 5;
    pub(crate) const INFO: u32 = 6;
    pub(crate) const GO: u32 = 7;
    pub(crate) const STRUCTURED_REPLY: u32 = 8;
    pub(crate) const LIST_META_CONTEXT: u32 = 9;
    pub(crate) const SET_META_CONTEXT: u32 = 10;
    pub(crate) const EXTENDED_HEADERS: u32 = 11;
}

/// Types of replies to options.
pub(crate) mod rep {
    pub(crate) const ACK: u32 = 1;
    pub(crate) const SERVER: u32 = 2;
    pub(crate) const INFO: u32 = 3;
    pub(crate) const META_CONTEXT: u32 = 4;
    const ERROR: u32 = 1 << 31;
    pub(crate) const ERR_UNSUP: u32 = ERROR | 1;
    pub(crate) const ERR_POLICY: u32 = ERROR | 2;
    pub(crate) const ERR_INVALID: u32 = ERROR | 3;
    pub(crate) const ERR_PLATFORM: u32 = ERROR | 4;
    pub(crate) const ERR_TLS_REQD: u32 = ERROR | 5;
    pub(crate) const ERR_UNKNOWN: u32 = ERROR | 6;
    pub(crate) const ERR_TOO_BIG: u32 = ERROR | 9;
    pub(crate) const ERR_EXT_HEADER_REQD: u32 = ERROR | 10;

    pub(crate) fn is_error(kind: u32) -> bool {
        kind & ERROR != 0
    }
}

/// Types of information.
pub(crate) mod info {
    pub(crate) const EXPORT: u16 = 0;
    pub(crate) const NAME: u16 = 1;
    pub(crate) const DESCRIPTION: u16 = 2;
    pub(crate) const BLOCK_SIZE: u16 = 3;
}

/// A connected socket of either kind.
#[derive(Debug)]
enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

/// A connection with every byte under control.
#[derive(Debug)]
pub(crate) struct Raw {
    socket: Socket,
}

/// One reply to an option, its form checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct OptionReply {
    /// `rep::*`
    pub(crate) kind: u32,
    /// Its data.
    pub(crate) data: Vec<u8>,
}

impl Raw {
    /// Connects to a Unix socket and does nothing else.
    pub(crate) fn dial(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap_or_else(|error| panic!("connect: {error}"));
        stream.set_read_timeout(Some(SILENCE_MAX)).unwrap();
        stream.set_write_timeout(Some(SILENCE_MAX)).unwrap();
        Self { socket: Socket::Unix(stream) }
    }

    /// Connects over TCP, with `TCP_NODELAY` on this side, and does nothing else.
    pub(crate) fn dial_tcp(address: &str) -> Self {
        let stream = TcpStream::connect(address).unwrap_or_else(|error| panic!("connect: {error}"));
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(SILENCE_MAX)).unwrap();
        stream.set_write_timeout(Some(SILENCE_MAX)).unwrap();
        Self { socket: Socket::Tcp(stream) }
    }

    /// Sends all of `bytes`; the error where the peer has closed. A peer that takes nothing has hung.
    pub(crate) fn try_send(&mut self, bytes: &[u8]) -> io::Result<()> {
        let result = match &mut self.socket {
            Socket::Unix(stream) => stream.write_all(bytes),
            Socket::Tcp(stream) => stream.write_all(bytes),
        };
        if let Err(error) = &result {
            assert!(!is_timeout(error), "the server takes nothing for {SILENCE_MAX:?}");
        }
        result
    }

    /// Sends all of `bytes`.
    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.try_send(bytes).unwrap_or_else(|error| panic!("send: {error}"));
    }

    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match &mut self.socket {
            Socket::Unix(stream) => stream.read(into),
            Socket::Tcp(stream) => stream.read(into),
        }
    }

    /// The next `len` bytes, or `None` where the server closed before the first of them.
    pub(crate) fn try_take(&mut self, len: usize) -> Option<Vec<u8>> {
        let mut bytes = vec![0; len];
        let mut filled = 0;
        while filled < len {
            match self.read(&mut bytes[filled..]) {
                Ok(0) if filled == 0 => return None,
                Ok(0) => panic!("closed after {filled} of {len} bytes of a message"),
                Ok(count) => filled += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::ConnectionReset && filled == 0 => return None,
                Err(error) => panic!("no answer ({filled} of {len} bytes have come): {error}"),
            }
        }
        Some(bytes)
    }

    /// The next `len` bytes.
    pub(crate) fn take(&mut self, len: usize) -> Vec<u8> {
        self.try_take(len).unwrap_or_else(|| panic!("closed where {len} bytes should come"))
    }

    /// Asserts that the server closes without another byte (by an end or a reset).
    pub(crate) fn expect_closed(&mut self) {
        let rest = self.rest();
        assert!(rest.is_empty(), "{} bytes come before the server closes", rest.len());
    }

    /// Everything that comes until the server closes.
    pub(crate) fn rest(&mut self) -> Vec<u8> {
        let mut all = Vec::new();
        let mut piece = vec![0; 1 << 16];
        loop {
            match self.read(&mut piece) {
                Ok(0) => return all,
                Ok(count) => all.extend_from_slice(&piece[..count]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return all,
                Err(error) => panic!("neither closes nor answers: {error}"),
            }
        }
    }

    /// Asserts that nothing comes for a short while. One-sided: a slow server passes wrongly, a right one never fails.
    pub(crate) fn expect_quiet(&mut self) {
        self.set_read_timeout(Duration::from_millis(50));
        let mut byte = [0];
        let result = self.read(&mut byte);
        self.set_read_timeout(SILENCE_MAX);
        match result {
            Err(error) if is_timeout(&error) => {}
            other => panic!("should be silent, but: {other:?} {byte:?}"),
        }
    }

    /// Waits until `len` bytes have come (TCP), without taking them.
    pub(crate) fn wait_unread(&mut self, len: usize) {
        let Socket::Tcp(stream) = &self.socket else { panic!("only TCP peeks") };
        let deadline = std::time::Instant::now() + SILENCE_MAX;
        let mut bytes = vec![0; len];
        while stream.peek(&mut bytes).unwrap_or_else(|error| panic!("no answer: {error}")) < len {
            assert!(std::time::Instant::now() < deadline, "fewer than {len} bytes come");
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    /// How long the server may be silent from now on.
    pub(crate) fn set_read_timeout(&mut self, timeout: Duration) {
        match &self.socket {
            Socket::Unix(stream) => stream.set_read_timeout(Some(timeout)).unwrap(),
            Socket::Tcp(stream) => stream.set_read_timeout(Some(timeout)).unwrap(),
        }
    }

    /// Ends this side's stream; the other direction stays open.
    pub(crate) fn half_close(&mut self) {
        // The server may have closed altogether.
        let _ = match &self.socket {
            Socket::Unix(stream) => stream.shutdown(Shutdown::Write),
            Socket::Tcp(stream) => stream.shutdown(Shutdown::Write),
        };
    }

    /// Closes with a reset (TCP).
    pub(crate) fn reset(self) {
        let Socket::Tcp(stream) = self.socket else { panic!("only TCP has resets") };
        let linger = nix::libc::linger { l_onoff: 1, l_linger: 0 };
        nix::sys::socket::setsockopt(&stream, nix::sys::socket::sockopt::Linger, &linger).unwrap();
    }

    // ---- The handshake ----

    /// Takes the greeting and gives its handshake flags.
    pub(crate) fn greeting(&mut self) -> u16 {
        let greeting = self.take(18);
        assert_eq!(greeting[..16], GREETING, "the greeting");
        u16::from_be_bytes([greeting[16], greeting[17]])
    }

    /// Takes the greeting and sends the client's flags.
    pub(crate) fn hello(mut self, client_flags: u32) -> Self {
        self.greeting();
        self.send(&client_flags.to_be_bytes());
        self
    }

    /// Sends an option.
    pub(crate) fn option(&mut self, code: u32, data: &[u8]) {
        self.send(&option(code, data));
    }

    /// The next reply to option `code`; `None` where the server closed.
    pub(crate) fn try_option_reply(&mut self, code: u32) -> Option<OptionReply> {
        let header = self.try_take(20)?;
        assert_eq!(be64(&header, 0), OPTION_REPLY_MAGIC, "the magic of a reply to option {code}");
        assert_eq!(be32(&header, 8), code, "the option that a reply echoes");
        let (kind, len) = (be32(&header, 12), be32(&header, 16) as usize);
        assert!(len <= 2 * STRING_MAX + 64, "{len} bytes of data in a reply to option {code}");
        let data = if len == 0 { Vec::new() } else { self.take(len) };
        check_reply(code, kind, &data);
        Some(OptionReply { kind, data })
    }

    /// All replies to option `code` up to the final one; `None` where the server closed before that.
    pub(crate) fn try_option_replies(&mut self, code: u32) -> Option<Vec<OptionReply>> {
        let mut replies = Vec::new();
        loop {
            let reply = self.try_option_reply(code)?;
            let kind = reply.kind;
            replies.push(reply);
            if kind == rep::ACK || rep::is_error(kind) {
                return Some(replies);
            }
            assert!(replies.len() < 10_000, "option {code} is answered without an end");
        }
    }

    /// Sends an option and gives all its replies.
    pub(crate) fn ask(&mut self, code: u32, data: &[u8]) -> Vec<OptionReply> {
        self.option(code, data);
        self.try_option_replies(code).unwrap_or_else(|| panic!("closed instead of answering option {code}"))
    }

    /// Sends an option and gives the type of its only reply.
    pub(crate) fn ask_one(&mut self, code: u32, data: &[u8]) -> u32 {
        let replies = self.ask(code, data);
        assert_eq!(replies.len(), 1, "option {code} has more than one reply: {replies:?}");
        replies[0].kind
    }

    /// Asserts that the stream is in step: LIST is answered as it should be.
    pub(crate) fn in_step(&mut self) {
        let kinds: Vec<u32> = self.ask(opt::LIST, &[]).iter().map(|reply| reply.kind).collect();
        assert_eq!(kinds, [rep::SERVER, rep::ACK], "LIST, to see whether the stream is in step");
    }
}

/// Whether a read or write ran into its time limit.
pub(crate) fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

/// The forms that the specification gives to each type of reply.
fn check_reply(code: u32, kind: u32, data: &[u8]) {
    match kind {
        rep::ACK => assert!(data.is_empty(), "ACK with data"),
        rep::SERVER => {
            assert_eq!(code, opt::LIST, "SERVER");
            let len = be32(data, 0) as usize;
            assert!(len <= data.len() - 4, "SERVER: the name is longer than the reply");
            check_string(&data[4..4 + len]);
            check_string(&data[4 + len..]);
        }
        rep::INFO => {
            assert!(matches!(code, opt::INFO | opt::GO), "INFO in reply to option {code}");
            match be16(data, 0) {
                info::EXPORT => assert_eq!(data.len(), 12, "INFO_EXPORT's length"),
                info::BLOCK_SIZE => assert_eq!(data.len(), 14, "INFO_BLOCK_SIZE's length"),
                info::NAME | info::DESCRIPTION => check_string(&data[2..]),
                other => panic!("information of unknown type {other}"),
            }
        }
        rep::META_CONTEXT => {
            assert!(matches!(code, opt::LIST_META_CONTEXT | opt::SET_META_CONTEXT), "META_CONTEXT");
            assert!(data.len() > 4, "META_CONTEXT without a name");
            check_string(&data[4..]);
            let name = String::from_utf8_lossy(&data[4..]);
            let (namespace, _) = name.split_once(':').unwrap_or_else(|| panic!("{name}: no namespace"));
            assert!(!namespace.is_empty() && !namespace.contains(char::is_whitespace), "{name}");
        }
        kind if rep::is_error(kind) => {
            assert!(matches!(kind & !(1 << 31), 1..=10), "reply of unknown type {kind:#x}");
            check_string(data);
        }
        kind => panic!("reply of unknown type {kind:#x}"),
    }
}

/// A string of the protocol: UTF-8, no NUL, not too long.
pub(crate) fn check_string(bytes: &[u8]) {
    assert!(bytes.len() <= STRING_MAX, "a string of {} bytes", bytes.len());
    assert!(!bytes.contains(&0), "a string with a NUL");
    assert!(std::str::from_utf8(bytes).is_ok(), "a string that is not UTF-8: {bytes:?}");
}

/// An option on the wire.
pub(crate) fn option(code: u32, data: &[u8]) -> Vec<u8> {
    [&option_header(code, data.len() as u32)[..], data].concat()
}

/// An option's header that announces `len` bytes of data.
pub(crate) fn option_header(code: u32, len: u32) -> Vec<u8> {
    [&OPTION_MAGIC[..], &code.to_be_bytes(), &len.to_be_bytes()].concat()
}

/// The data of INFO and GO.
pub(crate) fn info_data(name: &[u8], wanted: &[u16]) -> Vec<u8> {
    let mut data = string(name);
    data.extend_from_slice(&(wanted.len() as u16).to_be_bytes());
    data.extend(wanted.iter().flat_map(|info| info.to_be_bytes()));
    data
}

/// The data of LIST_META_CONTEXT and SET_META_CONTEXT.
pub(crate) fn meta_data(name: &[u8], queries: &[&str]) -> Vec<u8> {
    let mut data = string(name);
    data.extend_from_slice(&(queries.len() as u32).to_be_bytes());
    data.extend(queries.iter().flat_map(|query| string(query.as_bytes())));
    data
}

/// A string with its 32-bit length before it.
pub(crate) fn string(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u32).to_be_bytes()[..], bytes].concat()
}

/// The 16-bit number at `at`.
pub(crate) fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(bytes[at..at + 2].try_into().unwrap())
}

/// The 32-bit number at `at`.
pub(crate) fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// The 64-bit number at `at`.
pub(crate) fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}
