//! A blocking NBD client for all that the simple one of [`super::nbd`] does not speak: options by hand, structured
//! replies, extended headers, metadata contexts. Written apart from the server's code.
//!
//! What must hold, and is asserted on everything that comes: right magics, the cookie of a request in flight, the
//! offset echoed, known types, DONE on the last chunk only; a READ's chunks cover what was asked for, once.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const SILENCE_MAX: Duration = Duration::from_secs(60);

pub(crate) const ACK: u32 = 1;
pub(crate) const REP_META_CONTEXT: u32 = 4;
pub(crate) const ERR_INVALID: u32 = (1 << 31) | 3;
pub(crate) const ERR_UNKNOWN: u32 = (1 << 31) | 6;
pub(crate) const ERR_EXT_HEADER_REQD: u32 = (1 << 31) | 10;

pub(crate) const OPT_EXPORT_NAME: u32 = 1;
pub(crate) const OPT_LIST: u32 = 3;
pub(crate) const OPT_INFO: u32 = 6;
pub(crate) const OPT_GO: u32 = 7;
pub(crate) const OPT_STRUCTURED: u32 = 8;
pub(crate) const OPT_LIST_CONTEXT: u32 = 9;
pub(crate) const OPT_SET_CONTEXT: u32 = 10;
pub(crate) const OPT_EXTENDED: u32 = 11;

pub(crate) const READ: u16 = 0;
pub(crate) const WRITE: u16 = 1;
pub(crate) const FLUSH: u16 = 3;
pub(crate) const TRIM: u16 = 4;
pub(crate) const CACHE: u16 = 5;
pub(crate) const ZEROES: u16 = 6;
pub(crate) const STATUS: u16 = 7;

pub(crate) const FUA: u16 = 1;
pub(crate) const DF: u16 = 4;
pub(crate) const REQ_ONE: u16 = 8;
pub(crate) const PAYLOAD_LEN: u16 = 32;

pub(crate) const CHUNK_NONE: u16 = 0;
pub(crate) const CHUNK_DATA: u16 = 1;
pub(crate) const CHUNK_HOLE: u16 = 2;
pub(crate) const CHUNK_STATUS: u16 = 5;
pub(crate) const CHUNK_STATUS_EXT: u16 = 6;
pub(crate) const CHUNK_ERROR: u16 = 0x8001;
pub(crate) const CHUNK_ERROR_OFFSET: u16 = 0x8002;

/// A connection whose options are still being haggled over.
#[derive(Debug)]
pub(crate) struct Haggle {
    stream: UnixStream,
    extended: bool,
}

impl Haggle {
    pub(crate) fn connect(socket: &Path) -> Self {
        let mut stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(SILENCE_MAX)).unwrap();
        stream.set_write_timeout(Some(SILENCE_MAX)).unwrap();
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).unwrap();
        assert_eq!(greeting, *b"NBDMAGICIHAVEOPT\0\x03");
        stream.write_all(&3_u32.to_be_bytes()).unwrap();
        Self { stream, extended: false }
    }

    fn send(&mut self, option: u32, data: &[u8]) {
        let mut bytes = IHAVEOPT.to_be_bytes().to_vec();
        bytes.extend_from_slice(&option.to_be_bytes());
        bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
        bytes.extend_from_slice(data);
        self.stream.write_all(&bytes).unwrap();
    }

    /// Sends an option; its replies (type and data) up to the final one.
    pub(crate) fn option(&mut self, option: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
        self.send(option, data);
        let mut replies = Vec::new();
        loop {
            let mut header = [0; 20];
            self.stream.read_exact(&mut header).unwrap();
            assert_eq!((be64(&header, 0), be32(&header, 8)), (OPTION_REPLY_MAGIC, option));
            let kind = be32(&header, 12);
            let mut data = vec![0; be32(&header, 16) as usize];
            self.stream.read_exact(&mut data).unwrap();
            replies.push((kind, data));
            if kind == ACK || kind >> 31 == 1 {
                return replies;
            }
        }
    }

    /// Sends an option; the type of its final reply.
    pub(crate) fn last(&mut self, option: u32, data: &[u8]) -> u32 {
        self.option(option, data).last().unwrap().0
    }

    pub(crate) fn structured(mut self) -> Self {
        assert_eq!(self.last(OPT_STRUCTURED, &[]), ACK);
        self
    }

    pub(crate) fn extended(mut self) -> Self {
        assert_eq!(self.last(OPT_EXTENDED, &[]), ACK);
        self.extended = true;
        self
    }

    /// Lists or sets contexts of the default export; numbers and names.
    pub(crate) fn contexts(&mut self, option: u32, queries: &[&str]) -> Vec<(u32, String)> {
        let mut replies = self.option(option, &context_query("", queries));
        assert_eq!(replies.pop().unwrap().0, ACK);
        let context = |(kind, data): (u32, Vec<u8>)| {
            assert_eq!(kind, REP_META_CONTEXT);
            (be32(&data, 0), String::from_utf8(data[4..].to_vec()).unwrap())
        };
        replies.into_iter().map(context).collect()
    }

    /// Selects contexts of the default export; all must be there.
    pub(crate) fn with_contexts(mut self, names: &[&str]) -> Self {
        let found = self.contexts(OPT_SET_CONTEXT, names);
        assert_eq!(found.iter().map(|(_, name)| &name[..]).collect::<Vec<_>>(), names);
        self
    }

    /// Enters the default export with GO.
    pub(crate) fn go(mut self) -> ChunkClient {
        let replies = self.option(OPT_GO, &info_query(""));
        let (kind, data) = &replies[0];
        assert_eq!((*kind, data.len(), replies.len()), (3, 12, 2), "{replies:?}");
        let (size, flags) = (be64(data, 2), u16::from_be_bytes([data[10], data[11]]));
        ChunkClient::new(self.stream, self.extended, size, flags)
    }

    /// Enters the default export with EXPORT_NAME.
    pub(crate) fn export_name(mut self) -> ChunkClient {
        self.send(OPT_EXPORT_NAME, b"");
        let mut answer = [0; 10];
        self.stream.read_exact(&mut answer).unwrap();
        let flags = u16::from_be_bytes([answer[8], answer[9]]);
        ChunkClient::new(self.stream, self.extended, be64(&answer, 0), flags)
    }
}

/// The data of LIST_META_CONTEXT and SET_META_CONTEXT.
pub(crate) fn context_query(export: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = (export.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(export.as_bytes());
    data.extend_from_slice(&(queries.len() as u32).to_be_bytes());
    for query in queries {
        data.extend_from_slice(&(query.len() as u32).to_be_bytes());
        data.extend_from_slice(query.as_bytes());
    }
    data
}

/// The data of INFO and GO.
pub(crate) fn info_query(export: &str) -> Vec<u8> {
    [&(export.len() as u32).to_be_bytes()[..], export.as_bytes(), &[0, 0]].concat()
}

/// A chunk of a reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Chunk {
    pub(crate) done: bool,
    pub(crate) kind: u16,
    pub(crate) payload: Vec<u8>,
}

/// Why a request failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failed {
    pub(crate) error: u32,
    pub(crate) message: String,
    pub(crate) at: Option<u64>,
}

/// Extents of one context: lengths and flags.
pub(crate) type Extents = Vec<(u64, u64)>;

/// A connection in the transmission phase whose replies are chunks.
#[derive(Debug)]
pub(crate) struct ChunkClient {
    pub(crate) stream: UnixStream,
    extended: bool,
    pub(crate) size: u64,
    pub(crate) flags: u16,
    next_cookie: u64,
    /// Offsets of the requests in flight, and what has come of their replies.
    in_flight: HashMap<u64, (u64, Vec<Chunk>)>,
}

impl ChunkClient {
    fn new(stream: UnixStream, extended: bool, size: u64, flags: u16) -> Self {
        Self { stream, extended, size, flags, next_cookie: 1 << 63, in_flight: HashMap::new() }
    }

    /// Sends a request as it is, with whatever follows it.
    pub(crate) fn send(&mut self, kind: u16, flags: u16, offset: u64, len: u64, payload: &[u8]) -> u64 {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        let magic: u32 = if self.extended { 0x21e4_1c71 } else { 0x2560_9513 };
        let mut bytes = magic.to_be_bytes().to_vec();
        bytes.extend_from_slice(&flags.to_be_bytes());
        bytes.extend_from_slice(&kind.to_be_bytes());
        bytes.extend_from_slice(&cookie.to_be_bytes());
        bytes.extend_from_slice(&offset.to_be_bytes());
        if self.extended {
            bytes.extend_from_slice(&len.to_be_bytes());
        } else {
            bytes.extend_from_slice(&u32::try_from(len).unwrap().to_be_bytes());
        }
        bytes.extend_from_slice(payload);
        self.stream.write_all(&bytes).unwrap();
        self.in_flight.insert(cookie, (offset, Vec::new()));
        cookie
    }

    /// The next request to be answered whole: its cookie and chunks.
    pub(crate) fn receive(&mut self) -> io::Result<(u64, Vec<Chunk>)> {
        loop {
            let mut header = vec![0; if self.extended { 32 } else { 20 }];
            self.stream.read_exact(&mut header)?;
            let magic = if self.extended { 0x6e8a_278c } else { 0x668e_33ef };
            assert_eq!(be32(&header, 0), magic);
            let flags = u16::from_be_bytes([header[4], header[5]]);
            let kind = u16::from_be_bytes([header[6], header[7]]);
            let cookie = be64(&header, 8);
            assert!(flags <= 1 && matches!(kind, 0 | 1 | 2 | 5 | 6 | 0x8001 | 0x8002), "{flags:x} {kind:x}");
            let (offset, chunks) = self.in_flight.get_mut(&cookie).expect("a reply to a request in flight");
            let len = if self.extended {
                assert_eq!(be64(&header, 16), *offset, "the offset is echoed");
                be64(&header, 24)
            } else {
                be32(&header, 16).into()
            };
            assert!(len <= (32 << 20) + 8, "a chunk of {len} bytes");
            let mut payload = vec![0; len as usize];
            self.stream.read_exact(&mut payload)?;
            let done = flags == 1;
            chunks.push(Chunk { done, kind, payload });
            if done {
                let (_, chunks) = self.in_flight.remove(&cookie).expect("looked at above");
                return Ok((cookie, chunks));
            }
        }
    }

    /// One request and its whole reply; none other may be in flight.
    pub(crate) fn call(
        &mut self,
        kind: u16,
        flags: u16,
        offset: u64,
        len: u64,
        payload: &[u8],
    ) -> Vec<Chunk> {
        assert!(self.in_flight.is_empty());
        let cookie = self.send(kind, flags, offset, len, payload);
        let (answered, chunks) = self.receive().unwrap();
        assert_eq!(answered, cookie);
        chunks
    }

    /// A request that brings nothing.
    pub(crate) fn do_it(&mut self, kind: u16, flags: u16, offset: u64, len: u64) -> Result<(), Failed> {
        nothing(&self.call(kind, flags, offset, len, &[]))
    }

    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), Failed> {
        let flags = if self.extended { PAYLOAD_LEN } else { 0 };
        nothing(&self.call(WRITE, flags, offset, data.len() as u64, data))
    }

    pub(crate) fn read(&mut self, flags: u16, offset: u64, len: u64) -> Result<Vec<u8>, Failed> {
        content(offset, len, &self.call(READ, flags, offset, len, &[]))
    }

    /// BLOCK_STATUS: each context's number and extents.
    pub(crate) fn status(
        &mut self,
        flags: u16,
        offset: u64,
        len: u64,
    ) -> Result<Vec<(u32, Extents)>, Failed> {
        let extended = self.extended;
        statuses(extended, &self.call(STATUS, flags, offset, len, &[]))
    }

    /// BLOCK_STATUS with a payload that names contexts.
    pub(crate) fn status_of(
        &mut self,
        offset: u64,
        len: u64,
        ids: &[u32],
    ) -> Result<Vec<(u32, Extents)>, Failed> {
        let mut payload = len.to_be_bytes().to_vec();
        ids.iter().for_each(|id| payload.extend_from_slice(&id.to_be_bytes()));
        let chunks = self.call(STATUS, PAYLOAD_LEN, offset, payload.len() as u64, &payload);
        statuses(true, &chunks)
    }

    /// The server has closed the connection.
    pub(crate) fn expect_end(&mut self) {
        match self.stream.read(&mut [0]) {
            Ok(0) => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {}
            other => panic!("not closed: {other:?}"),
        }
    }
}

/// The error of a reply, if it has one: then it is all there is of it.
pub(crate) fn failure(chunks: &[Chunk]) -> Result<(), Failed> {
    let Some(chunk) = chunks.iter().find(|chunk| chunk.kind >> 15 == 1) else { return Ok(()) };
    assert_eq!(chunks.len(), 1);
    let payload = &chunk.payload;
    let message_bytes = usize::from(u16::from_be_bytes([payload[4], payload[5]]));
    let (message, rest) = payload[6..].split_at(message_bytes);
    let at = (chunk.kind == CHUNK_ERROR_OFFSET).then(|| be64(rest, 0));
    assert_eq!(rest.len(), if at.is_some() { 8 } else { 0 });
    let error = be32(payload, 0);
    assert!([1, 5, 12, 22, 28, 75, 95, 108].contains(&error));
    Err(Failed { error, message: String::from_utf8(message.to_vec()).unwrap(), at })
}

fn nothing(chunks: &[Chunk]) -> Result<(), Failed> {
    failure(chunks)?;
    assert_eq!(chunks, [Chunk { done: true, kind: CHUNK_NONE, payload: vec![] }]);
    Ok(())
}

/// The bytes of a READ, from chunks in any order that cover all of it once.
pub(crate) fn content(offset: u64, len: u64, chunks: &[Chunk]) -> Result<Vec<u8>, Failed> {
    failure(chunks)?;
    let mut data = vec![0; len as usize];
    let mut covered = Vec::new();
    for chunk in chunks.iter().filter(|chunk| chunk.kind != CHUNK_NONE) {
        let at = (be64(&chunk.payload, 0) - offset) as usize;
        let len = match chunk.kind {
            CHUNK_DATA => {
                let bytes = &chunk.payload[8..];
                data[at..at + bytes.len()].copy_from_slice(bytes);
                bytes.len()
            }
            CHUNK_HOLE => {
                assert_eq!(chunk.payload.len(), 12);
                be32(&chunk.payload, 8) as usize
            }
            kind => panic!("chunk of type {kind} in the reply to a READ"),
        };
        assert!(len > 0);
        covered.push((at, at + len));
    }
    covered.sort_unstable();
    let mut end = 0;
    for (from, to) in covered {
        assert_eq!(from, end, "every byte once");
        end = to;
    }
    assert_eq!(end, data.len());
    Ok(data)
}

fn statuses(extended: bool, chunks: &[Chunk]) -> Result<Vec<(u32, Extents)>, Failed> {
    failure(chunks)?;
    let found = chunks.iter().map(|chunk| {
        let (head, unit) = if extended { (8, 16) } else { (4, 8) };
        assert_eq!(chunk.kind, if extended { CHUNK_STATUS_EXT } else { CHUNK_STATUS });
        let extents = &chunk.payload[head..];
        assert!(!extents.is_empty() && extents.len().is_multiple_of(unit));
        let extents: Extents = extents
            .chunks(unit)
            .map(|bytes| {
                if extended {
                    (be64(bytes, 0), be64(bytes, 8))
                } else {
                    (be32(bytes, 0).into(), be32(bytes, 4).into())
                }
            })
            .collect();
        assert!(extents.iter().all(|(len, _)| *len > 0));
        assert!(!extended || be32(&chunk.payload, 4) as usize == extents.len());
        (be32(&chunk.payload, 0), extents)
    });
    Ok(found.collect())
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}
