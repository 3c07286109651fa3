//! The handshake (fixed newstyle): from the client's first byte to transmission or to the end.
//!
//! ```text
//!   greeting sent
//!        │
//!   ClientFlags ──► OptionHeader ◄──────────────────┐
//!                        │                          │ answered
//!                        ▼                          │
//!                   OptionData ─────────────────────┘
//!                        │ GO, EXPORT_NAME: Step::Transmission
//!                        │ STARTTLS, where TLS is on offer: Step::StartTls
//!                        ▼ ABORT, a violation, a limit: Step::Close (from any stage)
//!                      Over
//! ```
//!
//! What must hold:
//! - The same bytes give the same replies, however they are split.
//! - An option's data is taken whole before the option is answered, so the stream stays in step.
//! - Data is kept only for options that need it, as it arrives, and at most `OPTION_DATA_BYTES_MAX` of it;
//!   the rest runs through. A length that a client claims allocates nothing.
//! - Nothing that was said before TLS counts inside it: there it begins again with a new `Handshake`.
//! - One handshake takes at most `OPTIONS_MAX` options and `OPTION_BYTES_MAX` bytes of option data, which
//!   also bounds what it sends.

use std::sync::Arc;

use self::query::{ContextQuery, InfoQuery};
use self::reply::{put_ack, put_info, put_refusal, put_reply};
use super::context::{self, Offered};
use super::export::{BLOCK_BYTES_MIN, BLOCK_BYTES_PREFERRED, Export, Negotiated, ReplyMode};
use super::session::Session;
use super::wire::{self, Reader};
use crate::extent::{CONTEXTS, ContextSet};

mod query;
mod reply;
#[cfg(test)]
mod tests;

/// Most options of one handshake; a client that sends more is cut off.
pub const OPTIONS_MAX: u32 = 1000;
/// Most option data of one handshake, bytes, all options together; a client that announces more is cut off.
pub const OPTION_BYTES_MAX: u64 = 32 << 20;
/// Most data kept of one option, bytes: the longest INFO or GO that keeps the protocol's limits (two lengths,
/// a name, and every count of information requests). For SET_META_CONTEXT it is some thousands of queries.
pub const OPTION_DATA_BYTES_MAX: usize = 4 + wire::STRING_BYTES_MAX + 2 + 2 * u16::MAX as usize;
/// Most bytes that one option is answered with: four pieces of information and an acknowledgement, two of
/// them with a string.
pub const ANSWER_BYTES_MAX: usize = 5 * wire::OPTION_REPLY_HEADER_BYTES + 64 + 2 * wire::STRING_BYTES_MAX;

const _: () = assert!(OPTION_DATA_BYTES_MAX as u64 <= OPTION_BYTES_MAX);
const _: () = assert!(
    ANSWER_BYTES_MAX >= (CONTEXTS + 1) * (wire::OPTION_REPLY_HEADER_BYTES + 4 + context::NAME_BYTES_MAX)
);

const CLIENT_FLAGS_KNOWN: u32 = wire::CLIENT_FLAG_FIXED_NEWSTYLE | wire::CLIENT_FLAG_NO_ZEROES;

/// What TLS is to this connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsMode {
    /// Not on offer.
    Off,
    /// The client may begin it, and may go on without.
    Allowed,
    /// Nothing is granted without it.
    Required,
    /// It is under way: this handshake is spoken inside it.
    On,
}

/// One client's handshake with the server.
#[derive(Debug)]
pub struct Handshake {
    export: Arc<Export>,
    tls: TlsMode,
    stage: Stage,
    /// What has come of the piece that `stage` waits for; never longer than that piece.
    pending: Vec<u8>,
    /// The client waived the padding behind EXPORT_NAME.
    no_zeroes: bool,
    mode: ReplyMode,
    /// The contexts selected last, and the name of the export that they were selected for.
    contexts: ContextSet,
    contexts_of: Vec<u8>,
    stopping: bool,
    options_seen: u32,
    option_bytes_seen: u64,
}

#[derive(Clone, Copy, Debug)]
enum Stage {
    ClientFlags,
    OptionHeader,
    OptionData(IncomingOption),
    Over,
}

/// An option whose header has come.
#[derive(Clone, Copy, Debug)]
struct IncomingOption {
    code: u32,
    data_bytes: u32,
    /// Data bytes still to come.
    remaining_bytes: u32,
    /// Whether the data goes to `pending` or is dropped.
    keep: bool,
}

/// What [`Handshake::receive`] did.
#[derive(Debug)]
pub struct Progress {
    /// Bytes of the input that it took; all of them with `Step::NeedMore`. What follows them belongs to the
    /// transmission (with `Step::Transmission`) or to nobody (with `Step::Close`).
    pub consumed: usize,
    /// What comes next.
    pub step: Step,
}

/// What comes next. Whatever it is, the bytes in `out` are sent first.
#[derive(Debug)]
pub enum Step {
    /// More input.
    NeedMore,
    /// The handshake is done: requests follow.
    Transmission(Session),
    /// Do the TLS handshake, then go on inside it with [`Handshake::inside_tls`], without another greeting. A client
    /// waits for the reply before it begins TLS, so input that was not taken was slipped in by somebody: close the
    /// connection where there is any.
    StartTls,
    /// Close the connection. The text says why, for the log.
    Close(String),
}

impl Handshake {
    /// A handshake of which nothing but the greeting has happened.
    ///
    /// # Panics
    /// Where the export's strings break the protocol's limits (see [`Export::has_valid_strings`]).
    #[must_use]
    pub fn new(export: Arc<Export>, tls: TlsMode) -> Self {
        assert!(export.has_valid_strings());
        Self {
            export,
            tls,
            stage: Stage::ClientFlags,
            pending: Vec::new(),
            no_zeroes: false,
            mode: ReplyMode::Simple,
            contexts: ContextSet::EMPTY,
            contexts_of: Vec::new(),
            stopping: false,
            options_seen: 0,
            option_bytes_seen: 0,
        }
    }

    /// What goes on inside TLS after `Step::StartTls`: the client's flags were spoken before and hold, everything else
    /// that was negotiated is forgotten.
    #[must_use]
    pub fn inside_tls(self) -> Self {
        Self {
            stage: Stage::OptionHeader,
            no_zeroes: self.no_zeroes,
            stopping: self.stopping,
            options_seen: self.options_seen,
            option_bytes_seen: self.option_bytes_seen,
            ..Self::new(self.export, TlsMode::On)
        }
    }

    /// What the server sends as soon as a client has connected.
    #[must_use]
    pub fn greeting() -> [u8; wire::GREETING_BYTES] {
        let mut greeting = [0; wire::GREETING_BYTES];
        greeting[..8].copy_from_slice(&wire::GREETING_MAGIC.to_be_bytes());
        greeting[8..16].copy_from_slice(&wire::OPTION_MAGIC.to_be_bytes());
        let flags = wire::FLAG_FIXED_NEWSTYLE | wire::FLAG_NO_ZEROES;
        greeting[16..].copy_from_slice(&flags.to_be_bytes());
        greeting
    }

    /// From now on every option is refused with ERR_SHUTDOWN, but for ABORT; EXPORT_NAME ends the session.
    pub fn begin_shutdown(&mut self) {
        self.stopping = true;
    }

    /// Takes the client's bytes, in any split, and appends replies to `out`.
    ///
    /// Stops at the first step that is not `NeedMore`; after that every call gives `Step::Close` and takes
    /// nothing. Appends at most `ANSWER_BYTES_MAX` bytes for each option.
    pub fn receive(&mut self, input: &[u8], out: &mut Vec<u8>) -> Progress {
        let mut rest = input;
        let step = loop {
            if let Some(step) = self.advance(&mut rest, out) {
                break step;
            }
        };
        if !matches!(step, Step::NeedMore) {
            self.stage = Stage::Over;
            self.pending = Vec::new();
        }
        let consumed = input.len() - rest.len();
        assert!(consumed == input.len() || !matches!(step, Step::NeedMore));
        Progress { consumed, step }
    }

    /// Takes one piece (flags, a header, an option's data) off `input`; `None`: on to the next one.
    fn advance(&mut self, input: &mut &[u8], out: &mut Vec<u8>) -> Option<Step> {
        match self.stage {
            Stage::ClientFlags => match self.collect::<{ wire::CLIENT_FLAGS_BYTES }>(input) {
                Some(bytes) => self.take_client_flags(u32::from_be_bytes(bytes)),
                None => Some(Step::NeedMore),
            },
            Stage::OptionHeader => match self.collect::<{ wire::OPTION_HEADER_BYTES }>(input) {
                Some(bytes) => self.take_option_header(&bytes),
                None => Some(Step::NeedMore),
            },
            Stage::OptionData(option) => self.take_option_data(option, input, out),
            Stage::Over => Some(Step::Close("the handshake is over".to_owned())),
        }
    }

    /// Gathers `N` bytes over as many calls as it takes.
    fn collect<const N: usize>(&mut self, input: &mut &[u8]) -> Option<[u8; N]> {
        assert!(self.pending.len() < N);
        let (taken, rest) = input.split_at(input.len().min(N - self.pending.len()));
        self.pending.extend_from_slice(taken);
        *input = rest;
        let whole = *self.pending.first_chunk::<N>()?;
        self.pending.clear();
        Some(whole)
    }

    fn take_client_flags(&mut self, flags: u32) -> Option<Step> {
        if flags & !CLIENT_FLAGS_KNOWN != 0 {
            return Some(Step::Close(format!("the client set unknown client flags ({flags:#x})")));
        }
        if flags & wire::CLIENT_FLAG_FIXED_NEWSTYLE == 0 {
            // TLS must not even be spoken of then.
            if self.tls == TlsMode::Required {
                return Some(Step::Close("the client cannot do TLS, which is required".to_owned()));
            }
            self.tls = TlsMode::Off;
        }
        // A client that does not claim fixed newstyle is served all the same: it will send EXPORT_NAME, and
        // the specification lets a server answer other options too.
        self.no_zeroes = flags & wire::CLIENT_FLAG_NO_ZEROES != 0;
        self.stage = Stage::OptionHeader;
        None
    }

    fn take_option_header(&mut self, bytes: &[u8; wire::OPTION_HEADER_BYTES]) -> Option<Step> {
        let mut reader = Reader::new(bytes);
        let (Some(magic), Some(code), Some(data_bytes)) = (reader.u64(), reader.u32(), reader.u32()) else {
            unreachable!("an option header holds three numbers");
        };
        if magic != wire::OPTION_MAGIC {
            return Some(Step::Close(format!(
                "no option magic but {magic:#x}: not an NBD client, or out of step"
            )));
        }
        self.options_seen += 1;
        self.option_bytes_seen += u64::from(data_bytes);
        if self.options_seen > OPTIONS_MAX {
            return Some(Step::Close(format!("more than {OPTIONS_MAX} options in one handshake")));
        }
        if self.option_bytes_seen > OPTION_BYTES_MAX {
            return Some(Step::Close(format!("more than {OPTION_BYTES_MAX} bytes of option data")));
        }
        if code == wire::OPT_EXPORT_NAME && data_bytes as usize > wire::STRING_BYTES_MAX {
            // It will be refused, and the only refusal there is for it is to hang up.
            return Some(Step::Close(format!("EXPORT_NAME with a name of {data_bytes} bytes")));
        }
        let wants_data = matches!(
            code,
            wire::OPT_EXPORT_NAME
                | wire::OPT_INFO
                | wire::OPT_GO
                | wire::OPT_LIST_META_CONTEXT
                | wire::OPT_SET_META_CONTEXT
        );
        let keep = wants_data && data_bytes as usize <= OPTION_DATA_BYTES_MAX;
        self.stage =
            Stage::OptionData(IncomingOption { code, data_bytes, remaining_bytes: data_bytes, keep });
        None
    }

    fn take_option_data(
        &mut self,
        mut option: IncomingOption,
        input: &mut &[u8],
        out: &mut Vec<u8>,
    ) -> Option<Step> {
        let (taken, rest) = input.split_at(input.len().min(option.remaining_bytes as usize));
        *input = rest;
        if option.keep {
            self.pending.extend_from_slice(taken);
        }
        option.remaining_bytes -= taken.len() as u32;
        self.stage = Stage::OptionData(option);
        if option.remaining_bytes > 0 {
            return Some(Step::NeedMore);
        }
        let data = std::mem::take(&mut self.pending);
        self.stage = Stage::OptionHeader;
        let out_bytes_before = out.len();
        let step = self.answer(option, &data, out);
        assert!(out.len() - out_bytes_before <= ANSWER_BYTES_MAX);
        step
    }

    /// Answers an option that has come whole; `data` is empty where it was not kept. `None`: on to the next.
    fn answer(&mut self, option: IncomingOption, data: &[u8], out: &mut Vec<u8>) -> Option<Step> {
        let code = option.code;
        match code {
            wire::OPT_EXPORT_NAME => return Some(self.answer_export_name(data, out)),
            wire::OPT_ABORT => {
                // Data has no meaning here and is ignored.
                put_ack(out, code);
                return Some(Step::Close("the client ended the handshake".to_owned()));
            }
            _ if self.stopping => {
                put_refusal(out, code, wire::REP_ERR_SHUTDOWN, "the server is stopping: try again later");
            }
            wire::OPT_STARTTLS => return self.answer_starttls(option, out),
            _ if self.tls == TlsMode::Required => {
                put_refusal(out, code, wire::REP_ERR_TLS_REQD, "TLS is required: begin it with STARTTLS");
            }
            wire::OPT_LIST | wire::OPT_STRUCTURED_REPLY | wire::OPT_EXTENDED_HEADERS
                if option.data_bytes > 0 =>
            {
                put_refusal(out, code, wire::REP_ERR_INVALID, "this option takes no data");
            }
            wire::OPT_LIST => {
                let name = self.export.name.as_bytes();
                put_reply(out, code, wire::REP_SERVER, &[&(name.len() as u32).to_be_bytes(), name]);
                put_ack(out, code);
            }
            wire::OPT_INFO if option.keep => {
                let _ = self.answer_info(code, data, out);
            }
            wire::OPT_GO if option.keep => {
                return self.answer_info(code, data, out).map(|negotiated| self.transmission(negotiated));
            }
            wire::OPT_STRUCTURED_REPLY if self.mode == ReplyMode::Extended => {
                let message = "extended headers were agreed on, which go further";
                put_refusal(out, code, wire::REP_ERR_EXT_HEADER_REQD, message);
            }
            wire::OPT_STRUCTURED_REPLY => {
                self.mode = ReplyMode::Structured;
                put_ack(out, code);
            }
            wire::OPT_EXTENDED_HEADERS => {
                self.mode = ReplyMode::Extended;
                put_ack(out, code);
            }
            wire::OPT_LIST_META_CONTEXT | wire::OPT_SET_META_CONTEXT => {
                self.answer_meta_context(option, data, out);
            }
            wire::OPT_INFO | wire::OPT_GO => put_too_big(out, code),
            _ => put_refusal(out, code, wire::REP_ERR_UNSUP, "this option is not served: go on without it"),
        }
        None
    }

    fn answer_starttls(&self, option: IncomingOption, out: &mut Vec<u8>) -> Option<Step> {
        let (kind, message) = match self.tls {
            _ if option.data_bytes > 0 => (wire::REP_ERR_INVALID, "STARTTLS takes no data"),
            TlsMode::On => (wire::REP_ERR_INVALID, "TLS is under way already"),
            TlsMode::Off => (wire::REP_ERR_POLICY, "this server does not do TLS: go on without it"),
            TlsMode::Allowed | TlsMode::Required => {
                put_ack(out, option.code);
                return Some(Step::StartTls);
            }
        };
        put_refusal(out, option.code, kind, message);
        None
    }

    fn answer_export_name(&self, name: &[u8], out: &mut Vec<u8>) -> Step {
        if self.stopping {
            return Step::Close("EXPORT_NAME while the server is stopping".to_owned());
        }
        if self.tls == TlsMode::Required {
            return Step::Close("EXPORT_NAME without TLS, which is required".to_owned());
        }
        if self.mode == ReplyMode::Extended {
            // So the extension says: a client that is new enough for the one has no use for the other.
            return Step::Close("EXPORT_NAME after EXTENDED_HEADERS".to_owned());
        }
        if !self.export.answers_to(name) {
            return Step::Close(format!("EXPORT_NAME asks for an unknown export ({} bytes)", name.len()));
        }
        out.extend_from_slice(&self.export.size_bytes.to_be_bytes());
        let negotiated = self.negotiated_for(name);
        out.extend_from_slice(&self.export.transmission_flags(negotiated).to_be_bytes());
        if !self.no_zeroes {
            out.extend_from_slice(&[0; wire::EXPORT_NAME_PADDING_BYTES]);
        }
        self.transmission(negotiated)
    }

    /// What holds for a client that enters under this name: contexts that were selected for another are dropped.
    fn negotiated_for(&self, name: &[u8]) -> Negotiated {
        let contexts = if self.contexts_of == name { self.contexts } else { ContextSet::EMPTY };
        Negotiated { mode: self.mode, contexts }
    }

    /// Answers INFO and the information part of GO, alike; what holds then, where the export was granted.
    fn answer_info(&self, code: u32, data: &[u8], out: &mut Vec<u8>) -> Option<Negotiated> {
        let Some(query) = InfoQuery::parse(data) else {
            put_malformed(out, code);
            return None;
        };
        if !self.export.answers_to(query.name) {
            put_unknown_export(out, code);
            return None;
        }
        let export = &*self.export;
        let negotiated = self.negotiated_for(query.name);
        let flags = export.transmission_flags(negotiated).to_be_bytes();
        put_info(out, code, wire::INFO_EXPORT, &[&export.size_bytes.to_be_bytes(), &flags]);
        // In this order, each once, however often it was asked for.
        if query.wants(wire::INFO_NAME) {
            put_info(out, code, wire::INFO_NAME, &[export.name.as_bytes()]);
        }
        if query.wants(wire::INFO_DESCRIPTION) && !export.description.is_empty() {
            put_info(out, code, wire::INFO_DESCRIPTION, &[export.description.as_bytes()]);
        }
        if query.wants(wire::INFO_BLOCK_SIZE) {
            let sizes =
                [BLOCK_BYTES_MIN, BLOCK_BYTES_PREFERRED, wire::PAYLOAD_BYTES_MAX].map(u32::to_be_bytes);
            put_info(out, code, wire::INFO_BLOCK_SIZE, &[&sizes[0], &sizes[1], &sizes[2]]);
        }
        put_ack(out, code);
        Some(negotiated)
    }

    /// Answers LIST_META_CONTEXT and SET_META_CONTEXT.
    fn answer_meta_context(&mut self, option: IncomingOption, data: &[u8], out: &mut Vec<u8>) {
        let code = option.code;
        let set = code == wire::OPT_SET_META_CONTEXT;
        if set {
            // Also where it fails below: the specification says so.
            (self.contexts, self.contexts_of) = (ContextSet::EMPTY, Vec::new());
        }
        if self.mode == ReplyMode::Simple {
            put_refusal(out, code, wire::REP_ERR_INVALID, "metadata contexts need structured replies first");
            return;
        }
        if !option.keep {
            return put_too_big(out, code);
        }
        let Some(query) = ContextQuery::parse(data) else { return put_malformed(out, code) };
        if !self.export.answers_to(query.name) {
            return put_unknown_export(out, code);
        }
        let offered = Offered::new(self.export.replicas);
        let found = if set {
            offered.select(query.queries())
        } else if query.queries().next().is_none() {
            offered.all()
        } else {
            offered.list(query.queries())
        };
        for context in found.iter() {
            let id = if set { context::id(context) } else { 0 };
            let name = context::name(context);
            put_reply(out, code, wire::REP_META_CONTEXT, &[&id.to_be_bytes(), name.as_bytes()]);
        }
        put_ack(out, code);
        if set {
            (self.contexts, self.contexts_of) = (found, query.name.to_vec());
        }
    }

    fn transmission(&self, negotiated: Negotiated) -> Step {
        Step::Transmission(Session::new(Arc::clone(&self.export), negotiated))
    }
}

fn put_malformed(out: &mut Vec<u8>, option: u32) {
    put_refusal(out, option, wire::REP_ERR_INVALID, "malformed: lengths and data do not match");
}

fn put_too_big(out: &mut Vec<u8>, option: u32) {
    put_refusal(out, option, wire::REP_ERR_TOO_BIG, "too much data: ask for less at once");
}

fn put_unknown_export(out: &mut Vec<u8>, option: u32) {
    let message = "no such export: ask for the one that LIST names, or for the empty name";
    put_refusal(out, option, wire::REP_ERR_UNKNOWN, message);
}
