//! A small blocking NBD client over a Unix socket, written apart from the server's code so that an error in the
//! protocol does not hide in both.
//!
//! Fixed newstyle, `GO`, simple replies, any number of requests in flight. What must hold: each reply is matched with a
//! request that is in flight; an unknown cookie or a wrong magic is an error and never a silent success.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const OPTION_GO: u32 = 7;
const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
/// A peer silent for this long has hung, and the test fails.
const SILENCE_MAX: Duration = Duration::from_secs(60);

/// A request of the transmission phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    Read = 0,
    Write = 1,
    Disconnect = 2,
    Flush = 3,
    Trim = 4,
    WriteZeroes = 6,
}

/// Command flag: on stable storage before the reply.
pub(crate) const FUA: u16 = 1;
/// Command flag of `WriteZeroes`: allocate.
pub(crate) const NO_HOLE: u16 = 2;

/// The answer to one request.
#[derive(Debug)]
pub(crate) struct Reply {
    /// The request's cookie.
    pub(crate) cookie: u64,
    /// NBD error number; 0 for success.
    pub(crate) error: u32,
    /// What a successful read brought; else empty.
    pub(crate) data: Vec<u8>,
}

impl Reply {
    /// The data, or the NBD error as an [`io::Error`] of that number.
    pub(crate) fn ok(self) -> io::Result<Vec<u8>> {
        if self.error == 0 { Ok(self.data) } else { Err(io::Error::from_raw_os_error(self.error as i32)) }
    }
}

/// A connection in the transmission phase.
#[derive(Debug)]
pub(crate) struct Client {
    stream: UnixStream,
    /// The export's size, bytes.
    pub(crate) size: u64,
    /// The export's transmission flags.
    pub(crate) flags: u16,
    next_cookie: u64,
    /// Bytes of payload that the reply to each request in flight brings.
    in_flight: HashMap<u64, usize>,
}

impl Client {
    /// Connects and negotiates; an unknown export is `NotFound`.
    pub(crate) fn connect(socket: &Path, export: &str) -> io::Result<Self> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(SILENCE_MAX))?;
        stream.set_write_timeout(Some(SILENCE_MAX))?;
        let (size, flags) = negotiate(&mut stream, export)?;
        Ok(Self { stream, size, flags, next_cookie: 1, in_flight: HashMap::new() })
    }

    /// Sends one request without waiting and returns its cookie. `payload` is for `Write` alone.
    pub(crate) fn send(
        &mut self,
        command: Command,
        flags: u16,
        offset: u64,
        len: u32,
        payload: &[u8],
    ) -> io::Result<u64> {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        let mut header = [0; 28];
        header[0..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        header[4..6].copy_from_slice(&flags.to_be_bytes());
        header[6..8].copy_from_slice(&(command as u16).to_be_bytes());
        header[8..16].copy_from_slice(&cookie.to_be_bytes());
        header[16..24].copy_from_slice(&offset.to_be_bytes());
        header[24..28].copy_from_slice(&len.to_be_bytes());
        self.stream.write_all(&header)?;
        self.stream.write_all(payload)?;
        if command != Command::Disconnect {
            let expected = if command == Command::Read { len as usize } else { 0 };
            self.in_flight.insert(cookie, expected);
        }
        Ok(cookie)
    }

    /// Waits for the next reply, whichever request it belongs to.
    pub(crate) fn receive(&mut self) -> io::Result<Reply> {
        let mut header = [0; 16];
        self.stream.read_exact(&mut header)?;
        if be32(&header, 0) != SIMPLE_REPLY_MAGIC {
            return Err(invalid(format!("reply with magic {:#x}", be32(&header, 0))));
        }
        let (error, cookie) = (be32(&header, 4), be64(&header, 8));
        let Some(expected) = self.in_flight.remove(&cookie) else {
            return Err(invalid(format!("reply to cookie {cookie}, which is not in flight")));
        };
        let mut data = vec![0; if error == 0 { expected } else { 0 }];
        self.stream.read_exact(&mut data)?;
        Ok(Reply { cookie, error, data })
    }

    /// Number of requests in flight.
    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// One request and its reply; none other may be in flight.
    pub(crate) fn call(
        &mut self,
        command: Command,
        flags: u16,
        offset: u64,
        len: u32,
        payload: &[u8],
    ) -> io::Result<Vec<u8>> {
        assert!(self.in_flight.is_empty());
        self.send(command, flags, offset, len, payload)?;
        self.receive()?.ok()
    }

    /// Reads `len` bytes at `offset`.
    pub(crate) fn read(&mut self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        self.call(Command::Read, 0, offset, len as u32, &[])
    }

    /// Writes `data` at `offset`.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.call(Command::Write, 0, offset, data.len() as u32, data).map(drop)
    }

    /// Makes every write answered before durable.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        self.call(Command::Flush, 0, 0, 0, &[]).map(drop)
    }

    /// Writes zeroes, punching holes where possible.
    pub(crate) fn write_zeroes(&mut self, offset: u64, len: u32) -> io::Result<()> {
        self.call(Command::WriteZeroes, 0, offset, len, &[]).map(drop)
    }

    /// Gives the range up.
    pub(crate) fn trim(&mut self, offset: u64, len: u32) -> io::Result<()> {
        self.call(Command::Trim, 0, offset, len, &[]).map(drop)
    }
}

/// The handshake up to the end of `GO`: the export's size and flags.
fn negotiate(stream: &mut UnixStream, export: &str) -> io::Result<(u64, u16)> {
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting)?;
    if be64(&greeting, 0) != NBDMAGIC || be64(&greeting, 8) != IHAVEOPT {
        return Err(invalid("not a newstyle NBD server".into()));
    }
    let mut hello = Vec::new();
    // FIXED_NEWSTYLE and NO_ZEROES.
    hello.extend_from_slice(&3u32.to_be_bytes());
    hello.extend_from_slice(&IHAVEOPT.to_be_bytes());
    hello.extend_from_slice(&OPTION_GO.to_be_bytes());
    hello.extend_from_slice(&(export.len() as u32 + 6).to_be_bytes());
    hello.extend_from_slice(&(export.len() as u32).to_be_bytes());
    hello.extend_from_slice(export.as_bytes());
    hello.extend_from_slice(&0u16.to_be_bytes());
    stream.write_all(&hello)?;
    let mut found = None;
    loop {
        let mut header = [0; 20];
        stream.read_exact(&mut header)?;
        if be64(&header, 0) != OPTION_REPLY_MAGIC || be32(&header, 8) != OPTION_GO {
            return Err(invalid("a reply to another option than GO".into()));
        }
        let mut data = vec![0; be32(&header, 16).min(1 << 16) as usize];
        stream.read_exact(&mut data)?;
        match be32(&header, 12) {
            // Information 0 is the export's size and flags.
            REPLY_INFO if data.len() == 12 && data[..2] == [0, 0] => {
                found = Some((be64(&data, 2), u16::from_be_bytes([data[10], data[11]])));
            }
            REPLY_INFO => {}
            REPLY_ACK => return found.ok_or_else(|| invalid("GO without the export's size".into())),
            kind => {
                let text = String::from_utf8_lossy(&data).into_owned();
                return Err(io::Error::new(
                    io::ErrorKind::NotFound,
                    format!("GO refused ({kind:#x}): {text}"),
                ));
            }
        }
    }
}

fn invalid(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}
