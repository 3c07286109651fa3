//! The client's side of the protocol: against our own server, and against servers that lie.
//!
//! What must hold:
//! - Against our server it is let in exactly where the export answers to the name, and is told its size and flags.
//! - Against any bytes it ends: with an error, or with what the bytes say; it sends a bounded number of bytes, and
//!   takes none behind the end of the handshake.
//! - Headers that it parses are those that stand there.

use std::io::{self, Read, Write};
use std::sync::Arc;

use nbdmirror::nbd::client::{Connected, connect, parse_greeting, parse_option_reply, parse_simple_reply};
use nbdmirror::nbd::export::Negotiated;
use nbdmirror::nbd::handshake::{Handshake, Step, TlsMode};
use nbdmirror::nbd::wire::{self, NbdError, Reader};

use super::handshake::export;
use super::input::Input;

pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    match input.u8() % 4 {
        0 => honest(&mut input),
        1 => headers(&mut input),
        2 => {
            let stream = input.rest().to_vec();
            lying(&stream, "vol");
        }
        _ => {
            let name = input.text();
            let stream = server_stream(&mut input);
            lying(&stream, &name);
        }
    }
}

/// Our own server at the other end.
struct Duplex {
    handshake: Handshake,
    to_client: Vec<u8>,
    taken: usize,
    sent: usize,
    in_transmission: bool,
    pieces: Vec<u8>,
}

impl Read for Duplex {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let piece = self.pieces.pop().map_or(usize::MAX, |len| usize::from(len).max(1));
        let rest = &self.to_client[self.taken..];
        let count = rest.len().min(buffer.len()).min(piece);
        buffer[..count].copy_from_slice(&rest[..count]);
        self.taken += count;
        Ok(count)
    }
}

impl Write for Duplex {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let progress = self.handshake.receive(bytes, &mut self.to_client);
        self.in_transmission |= matches!(progress.step, Step::Transmission(_));
        self.sent += bytes.len();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn honest(input: &mut Input<'_>) {
    let export = export(input);
    let name = if input.one_in(2) { export.name.clone() } else { input.text() };
    let mut server = Duplex {
        handshake: Handshake::new(Arc::clone(&export), TlsMode::Off),
        to_client: Handshake::greeting().to_vec(),
        taken: 0,
        sent: 0,
        in_transmission: false,
        pieces: input.rest().to_vec(),
    };
    let connected = connect(&mut server, &name);
    assert_eq!(connected.is_ok(), export.answers_to(name.as_bytes()), "{name:?}");
    assert_eq!(connected.is_ok(), server.in_transmission);
    assert_eq!(server.taken, server.to_client.len(), "bytes of the server are left over");
    if let Ok(connected) = connected {
        let (size_bytes, transmission_flags) =
            (export.size_bytes, export.transmission_flags(Negotiated::default()));
        assert_eq!(connected, Connected { size_bytes, transmission_flags });
    }
}

/// A server that says these bytes, whatever it hears.
struct Lying<'a> {
    rest: &'a [u8],
    heard: usize,
}

impl Read for Lying<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.rest.read(buffer)
    }
}

impl Write for Lying<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.heard += bytes.len();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Mostly well-formed replies to GO.
fn server_stream(input: &mut Input<'_>) -> Vec<u8> {
    let mut stream = Handshake::greeting().to_vec();
    while !input.is_empty() {
        let option = input.pick(&[wire::OPT_GO, wire::OPT_GO, wire::OPT_GO, wire::OPT_GO, wire::OPT_INFO]);
        let kind = input.pick(&[wire::REP_INFO, wire::REP_INFO, wire::REP_ACK, wire::REP_ERR_UNKNOWN, 0]);
        let mut body = Vec::new();
        if kind == wire::REP_INFO {
            body.extend_from_slice(&input.pick(&[0u16, 0, 1, 2, 3, 77]).to_be_bytes());
        }
        let len = input.pick(&[10usize, 10, 10, 0, 9, 11, 60]);
        let bytes = input.bytes(len);
        body.extend_from_slice(bytes);
        let said = if input.one_in(8) { input.number(9000) as u32 } else { body.len() as u32 };
        stream.extend_from_slice(&wire::OPTION_REPLY_MAGIC.to_be_bytes());
        for number in [option, kind, said] {
            stream.extend_from_slice(&number.to_be_bytes());
        }
        stream.extend_from_slice(&body);
        if input.one_in(16) {
            let at = input.index(stream.len());
            stream[at] ^= input.u8();
        }
    }
    stream
}

/// Longest that a client says: flags, an option and its data.
fn hello_bytes(name: &str) -> usize {
    wire::CLIENT_FLAGS_BYTES + wire::OPTION_HEADER_BYTES + 4 + name.len() + 2
}

fn lying(stream: &[u8], name: &str) {
    let mut server = Lying { rest: stream, heard: 0 };
    let result = connect(&mut server, name);
    assert!(server.heard <= hello_bytes(name));
    match (result, believed(stream)) {
        (Ok(connected), Some((expected, rest))) => {
            assert_eq!(connected, expected);
            assert_eq!(server.rest, rest, "it took bytes of the transmission");
        }
        (Err(_), None) => {}
        (result, expected) => panic!("{result:?} and not {expected:?}"),
    }
}

/// What a stream says to a client that only GO was asked: the export and what follows; `None` where it is wrong.
fn believed(stream: &[u8]) -> Option<(Connected, &[u8])> {
    let mut reader = Reader::new(stream);
    let greeting = (reader.u64()?, reader.u64()?, reader.u16()?);
    if (greeting.0, greeting.1) != (wire::GREETING_MAGIC, wire::OPTION_MAGIC) || greeting.2 & 1 == 0 {
        return None;
    }
    let mut connected = None;
    for _ in 0..1000 {
        let (magic, option, kind, len) = (reader.u64()?, reader.u32()?, reader.u32()?, reader.u32()?);
        if magic != wire::OPTION_REPLY_MAGIC || option != wire::OPT_GO || len > 64 + 2 * 4096 {
            return None;
        }
        let mut body = Reader::new(reader.bytes(len as usize)?);
        match kind {
            wire::REP_ACK => return Some((connected?, reader.rest())),
            wire::REP_INFO if body.u16() == Some(wire::INFO_EXPORT) => {
                let (size_bytes, transmission_flags) = (body.u64()?, body.u16()?);
                if !body.rest().is_empty() {
                    return None;
                }
                connected = connected.or(Some(Connected { size_bytes, transmission_flags }));
            }
            wire::REP_INFO => {}
            _ => return None,
        }
    }
    None
}

fn headers(input: &mut Input<'_>) {
    let mut greeting = Handshake::greeting();
    let mut reply = [0; wire::OPTION_REPLY_HEADER_BYTES];
    reply[..8].copy_from_slice(&wire::OPTION_REPLY_MAGIC.to_be_bytes());
    let mut simple = [0; wire::SIMPLE_REPLY_BYTES];
    simple[..4].copy_from_slice(&wire::SIMPLE_REPLY_MAGIC.to_be_bytes());
    for bytes in [&mut greeting[..], &mut reply[..], &mut simple[..]] {
        let at = input.index(bytes.len());
        let with = input.bytes(bytes.len() - at);
        bytes[at..at + with.len()].copy_from_slice(with);
    }
    let mut reader = Reader::new(&greeting);
    let magics = (reader.u64(), reader.u64()) == (Some(wire::GREETING_MAGIC), Some(wire::OPTION_MAGIC));
    assert_eq!(parse_greeting(&greeting).ok(), reader.u16().filter(|_| magics));
    let mut reader = Reader::new(&reply);
    let magic = reader.u64() == Some(wire::OPTION_REPLY_MAGIC);
    let parsed = parse_option_reply(&reply).ok().map(|r| (r.option, r.kind, r.data_bytes));
    let fields = (reader.u32().expect("4"), reader.u32().expect("4"), reader.u32().expect("4"));
    assert_eq!(parsed, magic.then_some(fields));
    let mut reader = Reader::new(&simple);
    let (magic, error, cookie) = (reader.u32(), reader.u32().expect("4"), reader.u64().expect("8"));
    let known = error == 0 || NbdError::from_value(error).is_some();
    let expected = (magic == Some(wire::SIMPLE_REPLY_MAGIC) && known).then_some((cookie, error));
    assert_eq!(parse_simple_reply(&simple).ok(), expected);
}
