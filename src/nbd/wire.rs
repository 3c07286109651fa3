//! What stands on the wire: magic numbers, codes and their names, sizes, and a cursor to read them.
//!
//! The one place for numbers of the NBD specification (`doc/proto.md` of NetworkBlockDevice/nbd). All integers
//! are big-endian. Codes that this server does not serve stand here too where a log line should name them.

use crate::units::REQUEST_BYTES_MAX;

/// First eight bytes of every newstyle greeting: "NBDMAGIC".
pub const GREETING_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// "IHAVEOPT": second in the greeting, and first in every option that a client sends.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// First in every reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// First in every request with a compact (28-byte) header.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// First in every request with an extended (32-byte) header.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// First in every chunk of a structured reply.
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;
/// First in every chunk of an extended reply.
pub const EXTENDED_CHUNK_MAGIC: u32 = 0x6e8a_278c;
/// First in every simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;

/// Length of the server's greeting, bytes.
pub const GREETING_BYTES: usize = 18;
/// Length of the client's flags, bytes.
pub const CLIENT_FLAGS_BYTES: usize = 4;
/// Length of an option without its data, bytes.
pub const OPTION_HEADER_BYTES: usize = 16;
/// Length of a reply to an option without its data, bytes.
pub const OPTION_REPLY_HEADER_BYTES: usize = 20;
/// Length of a compact request without its payload, bytes.
pub const REQUEST_BYTES: usize = 28;
/// Length of an extended request without its payload, bytes.
pub const EXTENDED_REQUEST_BYTES: usize = 32;
/// Length of a structured reply's chunk without its payload, bytes.
pub const CHUNK_BYTES: usize = 20;
/// Length of an extended reply's chunk without its payload, bytes.
pub const EXTENDED_CHUNK_BYTES: usize = 32;
/// Length of a simple reply without its payload, bytes.
pub const SIMPLE_REPLY_BYTES: usize = 16;
/// Zeroes behind the answer to EXPORT_NAME for clients that did not waive them, bytes.
pub const EXPORT_NAME_PADDING_BYTES: usize = 124;
/// Longest string (export name, description, message) that the protocol allows, bytes of UTF-8.
pub const STRING_BYTES_MAX: usize = 4096;
/// Largest payload of a READ or WRITE, bytes; announced as the maximum block size.
pub const PAYLOAD_BYTES_MAX: u32 = REQUEST_BYTES_MAX as u32;

const _: () = assert!(PAYLOAD_BYTES_MAX as u64 == REQUEST_BYTES_MAX);
const _: () = assert!(PAYLOAD_BYTES_MAX.is_power_of_two());

/// Handshake flag: the server answers options it does not know.
pub const FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
/// Handshake flag: the server can leave out the padding behind EXPORT_NAME.
pub const FLAG_NO_ZEROES: u16 = 1 << 1;
/// Client flag: the client speaks fixed newstyle.
pub const CLIENT_FLAG_FIXED_NEWSTYLE: u32 = 1 << 0;
/// Client flag: no padding behind EXPORT_NAME, please.
pub const CLIENT_FLAG_NO_ZEROES: u32 = 1 << 1;

/// Transmission flag: the others mean something; always set.
pub const FLAG_HAS_FLAGS: u16 = 1 << 0;
/// Transmission flag: writes are refused.
pub const FLAG_READ_ONLY: u16 = 1 << 1;
/// Transmission flag: FLUSH is served.
pub const FLAG_SEND_FLUSH: u16 = 1 << 2;
/// Transmission flag: FUA is served.
pub const FLAG_SEND_FUA: u16 = 1 << 3;
/// Transmission flag: TRIM is served.
pub const FLAG_SEND_TRIM: u16 = 1 << 5;
/// Transmission flag: WRITE_ZEROES is served.
pub const FLAG_SEND_WRITE_ZEROES: u16 = 1 << 6;
/// Transmission flag: READ takes CMD_FLAG_DF.
pub const FLAG_SEND_DF: u16 = 1 << 7;
/// Transmission flag: a FLUSH on one connection covers the writes answered on all.
pub const FLAG_CAN_MULTI_CONN: u16 = 1 << 8;
/// Transmission flag: CACHE is served.
pub const FLAG_SEND_CACHE: u16 = 1 << 10;
/// Transmission flag: WRITE_ZEROES takes CMD_FLAG_FAST_ZERO.
pub const FLAG_SEND_FAST_ZERO: u16 = 1 << 11;
/// Transmission flag: BLOCK_STATUS takes a payload that names contexts.
pub const FLAG_BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;

/// Command flag: on stable storage before the reply.
pub const CMD_FLAG_FUA: u16 = 1 << 0;
/// Command flag of WRITE_ZEROES: the range stays allocated.
pub const CMD_FLAG_NO_HOLE: u16 = 1 << 1;
/// Command flag of READ: one content chunk only.
pub const CMD_FLAG_DF: u16 = 1 << 2;
/// Command flag of BLOCK_STATUS: one extent a context.
pub const CMD_FLAG_REQ_ONE: u16 = 1 << 3;
/// Command flag of WRITE_ZEROES: fail unless it is faster than a WRITE.
pub const CMD_FLAG_FAST_ZERO: u16 = 1 << 4;
/// Command flag with extended headers: the header's length is that of a payload.
pub const CMD_FLAG_PAYLOAD_LEN: u16 = 1 << 5;

/// Chunk flag: the last of its reply.
pub const CHUNK_FLAG_DONE: u16 = 1 << 0;

/// Bit 31 of an option reply's type: it is an error.
pub const REP_ERROR_BIT: u32 = 1 << 31;
/// Bit 15 of a chunk's type: it is an error.
pub const CHUNK_ERROR_BIT: u16 = 1 << 15;

/// Constants of one kind and the function that names them for logs.
macro_rules! codes {
    ($(#[$of:meta])* $name_of:ident: $int:ty { $($(#[$doc:meta])* $code:ident = $value:expr, $name:literal;)* }) => {
        $($(#[$doc])* pub const $code: $int = $value;)*

        $(#[$of])*
        #[must_use]
        pub fn $name_of(code: $int) -> &'static str {
            match code {
                $($code => $name,)*
                _ => "unknown",
            }
        }
    };
}

codes! {
    /// The specification's name of an option without its prefix; "unknown" where it has none.
    option_name: u32 {
        /// Choose an export, without any way to say no.
        OPT_EXPORT_NAME = 1, "EXPORT_NAME";
        /// End the session.
        OPT_ABORT = 2, "ABORT";
        /// Which exports are there?
        OPT_LIST = 3, "LIST";
        /// Withdrawn.
        OPT_PEEK_EXPORT = 4, "PEEK_EXPORT";
        /// Go on in TLS.
        OPT_STARTTLS = 5, "STARTTLS";
        /// What is known of an export?
        OPT_INFO = 6, "INFO";
        /// The same, and choose it.
        OPT_GO = 7, "GO";
        /// Use structured replies.
        OPT_STRUCTURED_REPLY = 8, "STRUCTURED_REPLY";
        /// Which metadata contexts are there?
        OPT_LIST_META_CONTEXT = 9, "LIST_META_CONTEXT";
        /// Choose metadata contexts.
        OPT_SET_META_CONTEXT = 10, "SET_META_CONTEXT";
        /// Use 64-bit lengths.
        OPT_EXTENDED_HEADERS = 11, "EXTENDED_HEADERS";
    }
}

codes! {
    /// The specification's name of an option reply's type without its prefix; "unknown" where it has none.
    reply_name: u32 {
        /// Done.
        REP_ACK = 1, "ACK";
        /// An export.
        REP_SERVER = 2, "SERVER";
        /// A piece of information about an export.
        REP_INFO = 3, "INFO";
        /// A metadata context.
        REP_META_CONTEXT = 4, "META_CONTEXT";
        /// The option is not known.
        REP_ERR_UNSUP = REP_ERROR_BIT | 1, "ERR_UNSUP";
        /// The option is not allowed.
        REP_ERR_POLICY = REP_ERROR_BIT | 2, "ERR_POLICY";
        /// The option's data is malformed.
        REP_ERR_INVALID = REP_ERROR_BIT | 3, "ERR_INVALID";
        /// Not on this platform.
        REP_ERR_PLATFORM = REP_ERROR_BIT | 4, "ERR_PLATFORM";
        /// TLS first.
        REP_ERR_TLS_REQD = REP_ERROR_BIT | 5, "ERR_TLS_REQD";
        /// No such export.
        REP_ERR_UNKNOWN = REP_ERROR_BIT | 6, "ERR_UNKNOWN";
        /// The server is stopping.
        REP_ERR_SHUTDOWN = REP_ERROR_BIT | 7, "ERR_SHUTDOWN";
        /// The client must ask for block sizes.
        REP_ERR_BLOCK_SIZE_REQD = REP_ERROR_BIT | 8, "ERR_BLOCK_SIZE_REQD";
        /// The option's data is too long.
        REP_ERR_TOO_BIG = REP_ERROR_BIT | 9, "ERR_TOO_BIG";
        /// Extended headers first, or instead.
        REP_ERR_EXT_HEADER_REQD = REP_ERROR_BIT | 10, "ERR_EXT_HEADER_REQD";
    }
}

codes! {
    /// The specification's name of an information type without its prefix; "unknown" where it has none.
    info_name: u16 {
        /// Size and transmission flags.
        INFO_EXPORT = 0, "EXPORT";
        /// The export's own name.
        INFO_NAME = 1, "NAME";
        /// A line for people.
        INFO_DESCRIPTION = 2, "DESCRIPTION";
        /// Smallest, preferred and largest request.
        INFO_BLOCK_SIZE = 3, "BLOCK_SIZE";
    }
}

codes! {
    /// The specification's name of a command without its prefix; "unknown" where it has none.
    command_name: u16 {
        /// Read bytes.
        CMD_READ = 0, "READ";
        /// Write bytes; the only request with a payload.
        CMD_WRITE = 1, "WRITE";
        /// Finish what was asked, then close.
        CMD_DISC = 2, "DISC";
        /// Everything answered so far goes to stable storage.
        CMD_FLUSH = 3, "FLUSH";
        /// The content is not needed any more.
        CMD_TRIM = 4, "TRIM";
        /// Prefetch.
        CMD_CACHE = 5, "CACHE";
        /// Make bytes read as zero.
        CMD_WRITE_ZEROES = 6, "WRITE_ZEROES";
        /// Which ranges are allocated?
        CMD_BLOCK_STATUS = 7, "BLOCK_STATUS";
        /// Change the size.
        CMD_RESIZE = 8, "RESIZE";
    }
}

codes! {
    /// The specification's name of a chunk's type without its prefix; "unknown" where it has none.
    chunk_name: u16 {
        /// Nothing besides the header.
        CHUNK_NONE = 0, "NONE";
        /// Bytes that were read.
        CHUNK_OFFSET_DATA = 1, "OFFSET_DATA";
        /// Zeroes that were read.
        CHUNK_OFFSET_HOLE = 2, "OFFSET_HOLE";
        /// Extents of one context, 32 bits each.
        CHUNK_BLOCK_STATUS = 5, "BLOCK_STATUS";
        /// Extents of one context, 64 bits each.
        CHUNK_BLOCK_STATUS_EXT = 6, "BLOCK_STATUS_EXT";
        /// An error.
        CHUNK_ERROR = CHUNK_ERROR_BIT | 1, "ERROR";
        /// An error, and where.
        CHUNK_ERROR_OFFSET = CHUNK_ERROR_BIT | 2, "ERROR_OFFSET";
    }
}

/// An error that a reply can carry: the specification's set, and nothing besides it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NbdError {
    /// EPERM: a write to a read-only export.
    Perm,
    /// EIO: the storage failed.
    Io,
    /// ENOMEM: the server has no memory; better avoided.
    NoMem,
    /// EINVAL: the request is wrong.
    Inval,
    /// ENOSPC: a write past the end, or the storage is full.
    NoSpc,
    /// EOVERFLOW: too long to be answered in one piece.
    Overflow,
    /// ENOTSUP: not supported, or not quickly.
    NotSup,
    /// ESHUTDOWN: the server is stopping.
    Shutdown,
}

impl NbdError {
    /// Every error.
    pub const ALL: [Self; 8] = [
        Self::Perm,
        Self::Io,
        Self::NoMem,
        Self::Inval,
        Self::NoSpc,
        Self::Overflow,
        Self::NotSup,
        Self::Shutdown,
    ];

    /// The number on the wire; never 0, which is success.
    #[must_use]
    pub const fn value(self) -> u32 {
        match self {
            Self::Perm => 1,
            Self::Io => 5,
            Self::NoMem => 12,
            Self::Inval => 22,
            Self::NoSpc => 28,
            Self::Overflow => 75,
            Self::NotSup => 95,
            Self::Shutdown => 108,
        }
    }

    /// The error with this number on the wire; `None` for success and for numbers outside the specification.
    #[must_use]
    pub fn from_value(value: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|error| error.value() == value)
    }

    /// The specification's name without its prefix.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Perm => "EPERM",
            Self::Io => "EIO",
            Self::NoMem => "ENOMEM",
            Self::Inval => "EINVAL",
            Self::NoSpc => "ENOSPC",
            Self::Overflow => "EOVERFLOW",
            Self::NotSup => "ENOTSUP",
            Self::Shutdown => "ESHUTDOWN",
        }
    }
}

/// A cursor over received bytes. A read past the end gives `None` and takes nothing.
#[derive(Clone, Copy, Debug)]
pub struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// Reads `bytes` from their start.
    #[must_use]
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// The next `len` bytes.
    pub fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(len)?;
        self.rest = rest;
        Some(taken)
    }

    /// The next two bytes as a number.
    pub fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    /// The next four bytes as a number.
    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    /// The next eight bytes as a number.
    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// The bytes that are left.
    #[must_use]
    pub fn rest(self) -> &'a [u8] {
        self.rest
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.rest.split_first_chunk::<N>()?;
        self.rest = rest;
        Some(*taken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cmd_56_error_values_are_distinct_and_round_trip() {
        for error in NbdError::ALL {
            assert_ne!(error.value(), 0);
            assert_eq!(NbdError::from_value(error.value()), Some(error));
        }
        assert_eq!(NbdError::from_value(0), None);
        assert_eq!(NbdError::from_value(11), None);
    }

    #[test]
    fn magic_numbers_are_the_ascii_of_the_specification() {
        assert_eq!(&GREETING_MAGIC.to_be_bytes(), b"NBDMAGIC");
        assert_eq!(&OPTION_MAGIC.to_be_bytes(), b"IHAVEOPT");
    }

    #[test]
    fn codes_have_names() {
        assert_eq!(option_name(OPT_GO), "GO");
        assert_eq!(command_name(CMD_WRITE_ZEROES), "WRITE_ZEROES");
        assert_eq!(reply_name(REP_ERR_UNKNOWN), "ERR_UNKNOWN");
        assert_eq!(info_name(INFO_BLOCK_SIZE), "BLOCK_SIZE");
        assert_eq!(command_name(999), "unknown");
    }

    #[test]
    fn reader_takes_nothing_past_the_end() {
        let mut reader = Reader::new(&[0, 1, 2]);
        assert_eq!(reader.u32(), None);
        assert_eq!(reader.u16(), Some(1));
        assert_eq!(reader.bytes(2), None);
        assert_eq!(reader.rest(), &[2]);
    }
}
