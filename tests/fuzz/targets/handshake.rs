//! The server's side of the handshake, fed with any bytes in any split.
//!
//! What must hold:
//! - Split or whole, the same bytes give the same answer, the same end and the same number of bytes taken.
//! - Every byte sent is well formed: replies to the options that came, in order, each within `ANSWER_BYTES_MAX`.
//! - Only the export that is offered is accepted, by its name or the empty one; what is said of it is true.
//! - When it is over it takes nothing more.

use std::sync::Arc;

use nbdmirror::nbd::client::{encode_info_query, encode_option};
use nbdmirror::nbd::export::{Export, Negotiated, ReplyMode};
use nbdmirror::nbd::handshake::{ANSWER_BYTES_MAX, Handshake, OPTIONS_MAX, Step, TlsMode};
use nbdmirror::nbd::wire::{self, Reader};
use nbdmirror::units::ReplicaSlot;

use super::input::{Input, pieces};

/// How a handshake ended.
#[derive(Debug, PartialEq, Eq)]
enum End {
    NeedMore,
    Transmission(Arc<Export>, Negotiated),
    Close(String),
}

/// One run: what was sent, how many bytes were taken, and the end.
type Outcome = (Vec<u8>, usize, End);

pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let export = export(&mut input);
    let stopping = input.one_in(8);
    let count = input.index(24);
    let lengths = input.bytes(count);
    let stream = if input.one_in(2) { input.rest().to_vec() } else { options(&mut input, &export) };
    let whole = converse(&export, stopping, [&stream[..]].into_iter());
    let split = converse(&export, stopping, pieces(&stream, lengths));
    assert_eq!(whole, split, "the split changed the outcome");
    let single = converse(&export, stopping, stream.chunks(1));
    assert_eq!(whole, single, "the split into bytes changed the outcome");
    check(&export, stopping, &stream, &whole);
}

/// An export that may be offered.
pub fn export(input: &mut Input<'_>) -> Arc<Export> {
    let name = input.pick(&["vol", "", "a name with spaces and ü"]).to_owned();
    let description = input.pick(&["", "a line"]).to_owned();
    let size_bytes = input.pick(&[1 << 20, 4096, 64 << 40, (1 << 30) + 4096]);
    let read_only = input.one_in(4);
    let replicas = [0, 3].map(ReplicaSlot::new).into_iter().collect();
    Arc::new(Export { name, description, size_bytes, read_only, replicas })
}

/// The stream of a client that mostly keeps to the protocol, so that more than the first magic is reached.
fn options(input: &mut Input<'_>, export: &Export) -> Vec<u8> {
    let flags = input.pick(&[1u32, 3, 0, 2, 4, u32::MAX]);
    let mut stream = flags.to_be_bytes().to_vec();
    while !input.is_empty() {
        let code = input.pick(&[1u32, 2, 3, 5, 6, 7, 8, 9, 7, 10, 11, 0xffff_ffff]);
        let name = match input.u8() % 4 {
            0 => vec![],
            1 => export.name.as_bytes().to_vec(),
            2 => vec![b'x'; input.number(wire::STRING_BYTES_MAX as u64).min(8000) as usize],
            _ => input.text().into_bytes(),
        };
        let wanted: Vec<u16> = (0..input.index(6)).map(|_| u16::from(input.u8() % 5)).collect();
        let data = match code {
            wire::OPT_INFO | wire::OPT_GO => encode_info_query(&name, &wanted),
            wire::OPT_EXPORT_NAME => name,
            wire::OPT_LIST_META_CONTEXT | wire::OPT_SET_META_CONTEXT => contexts(input, &name),
            _ => input.bytes(3).to_vec(),
        };
        let at = stream.len();
        stream.extend_from_slice(&encode_option(code, &data));
        // Then it lies: a byte is changed, or the option is longer or shorter than it says.
        match input.u8() % 16 {
            0 => {
                let at = at + input.index(stream.len() - at);
                stream[at] ^= input.u8();
            }
            1 => stream.truncate(stream.len() - input.index(stream.len() - at)),
            2 => stream.extend_from_slice(input.bytes(9)),
            _ => {}
        }
    }
    stream
}

/// The data of a query for contexts.
fn contexts(input: &mut Input<'_>, name: &[u8]) -> Vec<u8> {
    let queries = ["base:allocation", "base:", "nbdmirror:", "nbdmirror:stale/3", "nbdmirror:stale/1", "x:y"];
    let queries: Vec<&str> = (0..input.index(5)).map(|_| input.pick(&queries)).collect();
    let mut data = Vec::new();
    let mut string = |bytes: &[u8]| {
        data.extend_from_slice(&(bytes.len() as u32).to_be_bytes());
        data.extend_from_slice(bytes);
    };
    string(name);
    let at = 4 + name.len();
    queries.iter().for_each(|query| string(query.as_bytes()));
    data.splice(at..at, (queries.len() as u32).to_be_bytes());
    data
}

fn converse<'b>(export: &Arc<Export>, stopping: bool, pieces: impl Iterator<Item = &'b [u8]>) -> Outcome {
    let mut handshake = Handshake::new(Arc::clone(export), TlsMode::Off);
    if stopping {
        handshake.begin_shutdown();
    }
    let (mut out, mut taken, mut end) = (Vec::new(), 0, End::NeedMore);
    for piece in pieces {
        let sent_before = out.len();
        let progress = handshake.receive(piece, &mut out);
        if end != End::NeedMore {
            assert!(matches!(progress.step, Step::Close(_)) && progress.consumed == 0);
            assert_eq!(out.len(), sent_before, "it sends after its end");
            continue;
        }
        taken += progress.consumed;
        end = match progress.step {
            Step::NeedMore => {
                assert_eq!(progress.consumed, piece.len());
                End::NeedMore
            }
            Step::Transmission(session) => {
                End::Transmission(Arc::clone(session.export()), session.negotiated())
            }
            Step::StartTls => panic!("TLS is not on offer"),
            Step::Close(why) => {
                assert!(!why.is_empty());
                End::Close(why)
            }
        };
    }
    (out, taken, end)
}

/// The options that `stream` holds: code, data, and where each ends. Stops at the first that is not whole, or after
/// the client said goodbye.
fn whole_options(stream: &[u8]) -> Vec<(u32, &[u8], usize)> {
    let mut options = Vec::new();
    let mut reader = Reader::new(stream);
    if reader.u32().is_none_or(|flags| flags & !3 != 0) {
        return options;
    }
    while reader.u64() == Some(wire::OPTION_MAGIC) {
        let (Some(code), Some(len)) = (reader.u32(), reader.u32()) else { break };
        let Some(data) = reader.bytes(len as usize) else { break };
        options.push((code, data, stream.len() - reader.rest().len()));
    }
    options
}

fn check(export: &Arc<Export>, stopping: bool, stream: &[u8], (out, taken, end): &Outcome) {
    let options: Vec<_> = whole_options(stream)
        .into_iter()
        .take_while(|(_, _, at)| at <= taken)
        .take(OPTIONS_MAX as usize)
        .collect();
    assert!(out.len() <= options.len() * ANSWER_BYTES_MAX);
    let last = options.last().map(|(code, data, _)| (*code, *data));
    let mut replies = &out[..];
    if let End::Transmission(accepted, negotiated) = end {
        let (code, data) = last.expect("an option chose the export");
        assert!(Arc::ptr_eq(accepted, export) && !stopping);
        assert_eq!(options.last().map(|(_, _, at)| at), Some(taken), "what follows the choice is not taken");
        assert!(export.answers_to(chosen(code, data)), "an export that is not offered was accepted");
        if code == wire::OPT_EXPORT_NAME {
            let padding = if stream[3] & 2 == 0 { wire::EXPORT_NAME_PADDING_BYTES } else { 0 };
            let answer = replies.len() - 10 - padding;
            let mut reader = Reader::new(&replies[answer..]);
            assert_eq!(reader.u64(), Some(export.size_bytes));
            assert_eq!(reader.u16(), Some(export.transmission_flags(*negotiated)));
            assert!(negotiated.mode != ReplyMode::Extended);
            assert!(reader.rest().iter().all(|byte| *byte == 0));
            replies = &replies[..answer];
        }
    }
    let answered = check_replies(export, replies, &options);
    match end {
        End::Transmission(..) if last.is_some_and(|(code, _)| code == wire::OPT_EXPORT_NAME) => {
            assert_eq!(answered, options.len() - 1);
        }
        End::Close(_) => assert!(answered + 1 >= options.len()),
        End::NeedMore | End::Transmission(..) => {
            assert_eq!(answered, options.len(), "an option without an answer");
        }
    }
}

/// The name that an accepted option chose.
fn chosen(code: u32, data: &[u8]) -> &[u8] {
    match code {
        wire::OPT_EXPORT_NAME => data,
        wire::OPT_GO => {
            let mut reader = Reader::new(data);
            let len = reader.u32().expect("a name's length");
            reader.bytes(len as usize).expect("a name")
        }
        code => panic!("option {code} began the transmission"),
    }
}

/// Every reply is for the next option, whole, and true. Gives how many options were answered to the end.
fn check_replies(export: &Export, replies: &[u8], options: &[(u32, &[u8], usize)]) -> usize {
    let mut reader = Reader::new(replies);
    let mut answered = 0;
    while !reader.rest().is_empty() {
        assert_eq!(reader.u64(), Some(wire::OPTION_REPLY_MAGIC));
        let (code, data, _) = options[answered];
        assert_eq!(reader.u32(), Some(code), "a reply to another option");
        let kind = reader.u32().expect("a type");
        let len = reader.u32().expect("a length");
        let mut body = Reader::new(reader.bytes(len as usize).expect("a whole reply"));
        match kind {
            wire::REP_ACK => assert!(body.rest().is_empty()),
            wire::REP_SERVER => {
                assert_eq!(code, wire::OPT_LIST);
                let name_bytes = body.u32().expect("a length") as usize;
                assert_eq!(body.bytes(name_bytes), Some(export.name.as_bytes()));
            }
            wire::REP_INFO => {
                assert!(matches!(code, wire::OPT_INFO | wire::OPT_GO));
                let name_bytes = Reader::new(data).u32().expect("a name's length") as usize;
                assert!(export.answers_to(&data[4..4 + name_bytes]), "it tells of another export");
                if body.u16() == Some(wire::INFO_EXPORT) {
                    assert_eq!(body.u64(), Some(export.size_bytes));
                    let flags = body.u16().expect("flags");
                    let negotiable = wire::FLAG_SEND_DF | wire::FLAG_BLOCK_STATUS_PAYLOAD;
                    let plain = export.transmission_flags(Negotiated::default());
                    assert_eq!(flags & !negotiable, plain);
                    assert!(body.rest().is_empty());
                }
            }
            wire::REP_META_CONTEXT => {
                assert!(matches!(code, wire::OPT_LIST_META_CONTEXT | wire::OPT_SET_META_CONTEXT));
                let id = body.u32().expect("a number");
                assert!(id == 0 || code == wire::OPT_SET_META_CONTEXT);
                let names = ["base:allocation", "nbdmirror:state", "nbdmirror:stale/0", "nbdmirror:stale/3"];
                assert!(
                    names.iter().any(|name| name.as_bytes() == body.rest()),
                    "a context that is not there"
                );
            }
            kind => {
                assert!(kind & wire::REP_ERROR_BIT != 0 && wire::reply_name(kind) != "unknown");
                std::str::from_utf8(body.rest()).expect("a message for people");
            }
        }
        answered += usize::from(!matches!(kind, wire::REP_SERVER | wire::REP_INFO | wire::REP_META_CONTEXT));
    }
    answered
}
