//! The client's side, as far as the project's own tests and checker need it: pure codecs, and one blocking
//! [`connect`] over any stream.
//!
//! What must hold: it trusts the server no more than the server trusts a client: lengths are bounded before
//! anything is read into memory, magics and echoes are checked.

use std::io::{self, Read, Write};

use super::wire::{self, Reader};

/// Longest reply to an option that is accepted, bytes: an information type and two strings.
const OPTION_REPLY_DATA_BYTES_MAX: u32 = 64 + 2 * wire::STRING_BYTES_MAX as u32;
/// Most replies to one option that are accepted.
const OPTION_REPLIES_MAX: u32 = 1000;

/// The server broke the protocol, or refused. The text says what happened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ClientError(pub String);

impl From<ClientError> for io::Error {
    fn from(error: ClientError) -> Self {
        Self::new(io::ErrorKind::InvalidData, error)
    }
}

/// The head of a server's reply to an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionReply {
    /// The option that it answers.
    pub option: u32,
    /// `REP_*` of [`wire`].
    pub kind: u32,
    /// Bytes of data that follow.
    pub data_bytes: u32,
}

/// What the server said of the export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connected {
    /// Size, bytes.
    pub size_bytes: u64,
    /// `FLAG_*` of [`wire`].
    pub transmission_flags: u16,
}

/// Checks a server's greeting and gives its handshake flags.
///
/// # Errors
/// Where it is not a newstyle NBD greeting.
pub fn parse_greeting(greeting: &[u8; wire::GREETING_BYTES]) -> Result<u16, ClientError> {
    let mut reader = Reader::new(greeting);
    if reader.u64() != Some(wire::GREETING_MAGIC) || reader.u64() != Some(wire::OPTION_MAGIC) {
        return Err(ClientError("not a newstyle NBD server: wrong greeting".to_owned()));
    }
    reader.u16().ok_or_else(|| ClientError("greeting too short".to_owned()))
}

/// An option with its data.
///
/// # Panics
/// Where the data is longer than 4 GiB.
#[must_use]
pub fn encode_option(option: u32, data: &[u8]) -> Vec<u8> {
    assert!(u32::try_from(data.len()).is_ok());
    let mut bytes = Vec::with_capacity(wire::OPTION_HEADER_BYTES + data.len());
    bytes.extend_from_slice(&wire::OPTION_MAGIC.to_be_bytes());
    bytes.extend_from_slice(&option.to_be_bytes());
    bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
    bytes.extend_from_slice(data);
    bytes
}

/// The data of INFO and GO: the export's name and the information types wanted (`INFO_*` of [`wire`]).
///
/// # Panics
/// Where there are more than 65535 of them, or the name is longer than 4 GiB.
#[must_use]
pub fn encode_info_query(export_name: &[u8], wanted: &[u16]) -> Vec<u8> {
    assert!(u32::try_from(export_name.len()).is_ok());
    assert!(u16::try_from(wanted.len()).is_ok());
    let mut data = Vec::with_capacity(6 + export_name.len() + 2 * wanted.len());
    data.extend_from_slice(&(export_name.len() as u32).to_be_bytes());
    data.extend_from_slice(export_name);
    data.extend_from_slice(&(wanted.len() as u16).to_be_bytes());
    for info in wanted {
        data.extend_from_slice(&info.to_be_bytes());
    }
    data
}

/// Reads the head of a reply to an option.
///
/// # Errors
/// Where the magic is wrong.
pub fn parse_option_reply(
    header: &[u8; wire::OPTION_REPLY_HEADER_BYTES],
) -> Result<OptionReply, ClientError> {
    let mut reader = Reader::new(header);
    if reader.u64() != Some(wire::OPTION_REPLY_MAGIC) {
        return Err(ClientError("a reply to an option has the wrong magic".to_owned()));
    }
    let fields = (reader.u32(), reader.u32(), reader.u32());
    let (Some(option), Some(kind), Some(data_bytes)) = fields else {
        return Err(ClientError("a reply to an option is too short".to_owned()));
    };
    Ok(OptionReply { option, kind, data_bytes })
}

/// A request header. `command` and `flags` are `CMD_*` and `CMD_FLAG_*` of [`wire`]; offset and length are
/// bytes. The payload of a WRITE follows it.
#[must_use]
pub fn encode_request(
    command: u16,
    flags: u16,
    cookie: u64,
    offset: u64,
    len: u32,
) -> [u8; wire::REQUEST_BYTES] {
    let mut request = [0; wire::REQUEST_BYTES];
    request[..24].copy_from_slice(&request_head(wire::REQUEST_MAGIC, command, flags, cookie, offset));
    request[24..].copy_from_slice(&len.to_be_bytes());
    request
}

/// A request with an extended header: as [`encode_request`], with 64 bits of length.
#[must_use]
pub fn encode_extended_request(
    command: u16,
    flags: u16,
    cookie: u64,
    offset: u64,
    len: u64,
) -> [u8; wire::EXTENDED_REQUEST_BYTES] {
    let mut request = [0; wire::EXTENDED_REQUEST_BYTES];
    request[..24].copy_from_slice(&request_head(
        wire::EXTENDED_REQUEST_MAGIC,
        command,
        flags,
        cookie,
        offset,
    ));
    request[24..].copy_from_slice(&len.to_be_bytes());
    request
}

/// What both kinds of a request's header begin with.
fn request_head(magic: u32, command: u16, flags: u16, cookie: u64, offset: u64) -> [u8; 24] {
    let mut head = [0; 24];
    head[..4].copy_from_slice(&magic.to_be_bytes());
    head[4..6].copy_from_slice(&flags.to_be_bytes());
    head[6..8].copy_from_slice(&command.to_be_bytes());
    head[8..16].copy_from_slice(&cookie.to_be_bytes());
    head[16..].copy_from_slice(&offset.to_be_bytes());
    head
}

/// The head of a chunk of a structured or extended reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// `CHUNK_FLAG_*` of [`wire`].
    pub flags: u16,
    /// `CHUNK_*` of [`wire`].
    pub kind: u16,
    /// The request's.
    pub cookie: u64,
    /// The request's, where the chunk is extended.
    pub offset: Option<u64>,
    /// Bytes of payload that follow.
    pub payload_bytes: u64,
}

/// Reads the head of a chunk, and gives what follows it; `None` where there are too few bytes.
///
/// # Errors
/// Where the magic is wrong, or a flag or type is not one of the specification's.
pub fn parse_chunk(bytes: &[u8], extended: bool) -> Result<Option<(Chunk, &[u8])>, ClientError> {
    let mut reader = Reader::new(bytes);
    let expected = if extended { wire::EXTENDED_CHUNK_MAGIC } else { wire::CHUNK_MAGIC };
    let head_bytes = if extended { wire::EXTENDED_CHUNK_BYTES } else { wire::CHUNK_BYTES };
    if bytes.len() < head_bytes {
        return Ok(None);
    }
    if reader.u32() != Some(expected) {
        return Err(ClientError("a chunk has the wrong magic".to_owned()));
    }
    let (Some(flags), Some(kind), Some(cookie)) = (reader.u16(), reader.u16(), reader.u64()) else {
        return Ok(None);
    };
    let offset = if extended { reader.u64() } else { None };
    let payload_bytes = if extended { reader.u64() } else { reader.u32().map(u64::from) };
    let Some(payload_bytes) = payload_bytes else { return Ok(None) };
    if flags & !wire::CHUNK_FLAG_DONE != 0 || wire::chunk_name(kind) == "unknown" {
        return Err(ClientError(format!("a chunk of type {kind:#x} with flags {flags:#x}")));
    }
    Ok(Some((Chunk { flags, kind, cookie, offset, payload_bytes }, reader.rest())))
}

/// Reads a simple reply: the cookie and the error's number (0: success, and a READ's data follows).
///
/// # Errors
/// Where the magic is wrong, or the error is not one of the specification's.
pub fn parse_simple_reply(reply: &[u8; wire::SIMPLE_REPLY_BYTES]) -> Result<(u64, u32), ClientError> {
    let mut reader = Reader::new(reply);
    let (magic, error, cookie) = (reader.u32(), reader.u32(), reader.u64());
    if magic != Some(wire::SIMPLE_REPLY_MAGIC) {
        return Err(ClientError(format!("a reply has the wrong magic {magic:x?}")));
    }
    match (error, cookie) {
        (Some(error), Some(cookie)) if error == 0 || wire::NbdError::from_value(error).is_some() => {
            Ok((cookie, error))
        }
        _ => Err(ClientError(format!("a reply has error {error:?}, which the specification does not know"))),
    }
}

/// Goes through the handshake with GO and leaves `stream` at the start of transmission.
///
/// # Errors
/// The stream's own errors; `InvalidData` where the server breaks the protocol; `NotFound` where it refuses
/// the export, with its message.
pub fn connect<S: Read + Write>(stream: &mut S, export_name: &str) -> io::Result<Connected> {
    let mut greeting = [0; wire::GREETING_BYTES];
    stream.read_exact(&mut greeting)?;
    let server_flags = parse_greeting(&greeting)?;
    if server_flags & wire::FLAG_FIXED_NEWSTYLE == 0 {
        return Err(ClientError("the server does not speak fixed newstyle".to_owned()).into());
    }
    let mut hello = wire::CLIENT_FLAG_FIXED_NEWSTYLE.to_be_bytes().to_vec();
    let query = encode_info_query(export_name.as_bytes(), &[]);
    hello.extend_from_slice(&encode_option(wire::OPT_GO, &query));
    stream.write_all(&hello)?;
    stream.flush()?;
    let mut connected = None;
    for _ in 0..OPTION_REPLIES_MAX {
        let (kind, data) = read_go_reply(stream)?;
        match kind {
            wire::REP_INFO => connected = connected.or(parse_info_export(&data)?),
            wire::REP_ACK => {
                let missing = || ClientError("the server granted GO without INFO_EXPORT".to_owned());
                return Ok(connected.ok_or_else(missing)?);
            }
            kind => {
                let message = String::from_utf8_lossy(&data);
                let text = format!(
                    "the server refused export {export_name:?}: {} {message}",
                    wire::reply_name(kind)
                );
                return Err(io::Error::new(io::ErrorKind::NotFound, ClientError(text)));
            }
        }
    }
    Err(ClientError("the server does not stop answering GO".to_owned()).into())
}

fn read_go_reply<S: Read>(stream: &mut S) -> io::Result<(u32, Vec<u8>)> {
    let mut header = [0; wire::OPTION_REPLY_HEADER_BYTES];
    stream.read_exact(&mut header)?;
    let reply = parse_option_reply(&header)?;
    if reply.option != wire::OPT_GO || reply.data_bytes > OPTION_REPLY_DATA_BYTES_MAX {
        return Err(ClientError(format!("a wrong reply to GO: {reply:?}")).into());
    }
    let mut data = vec![0; reply.data_bytes as usize];
    stream.read_exact(&mut data)?;
    Ok((reply.kind, data))
}

/// `Ok(None)` for information of another type.
fn parse_info_export(data: &[u8]) -> Result<Option<Connected>, ClientError> {
    let mut reader = Reader::new(data);
    if reader.u16() != Some(wire::INFO_EXPORT) {
        return Ok(None);
    }
    match (reader.u64(), reader.u16(), reader.rest().is_empty()) {
        (Some(size_bytes), Some(transmission_flags), true) => {
            Ok(Some(Connected { size_bytes, transmission_flags }))
        }
        _ => Err(ClientError("INFO_EXPORT has the wrong length".to_owned())),
    }
}
