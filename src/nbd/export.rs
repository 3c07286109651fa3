//! The export: what clients are told of the volume, and what a client has negotiated on top of that.
//!
//! What must hold: size and flags are the same on every connection and by every way of asking, where the same was
//! negotiated.

use super::wire;
use crate::extent::ContextSet;
use crate::units::ReplicaSet;

/// Offsets and lengths of requests are multiples of this, bytes: any offset and length is served.
pub const BLOCK_BYTES_MIN: u32 = 1;
/// Preferred alignment of requests, bytes: smaller ones cost a read-modify-write.
pub const BLOCK_BYTES_PREFERRED: u32 = crate::units::BLOCK_BYTES as u32;

const _: () = assert!(BLOCK_BYTES_MIN.is_power_of_two() && BLOCK_BYTES_MIN <= 64 << 10);
const _: () = assert!(BLOCK_BYTES_PREFERRED.is_power_of_two() && BLOCK_BYTES_PREFERRED >= 512);
const _: () = assert!(BLOCK_BYTES_PREFERRED >= BLOCK_BYTES_MIN);
const _: () = assert!(wire::PAYLOAD_BYTES_MAX >= BLOCK_BYTES_PREFERRED);

/// What clients see of the volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    /// Its name; at most [`wire::STRING_BYTES_MAX`] bytes, without NUL. Clients reach it by the empty name too.
    pub name: String,
    /// A line for people, under the same limits; empty: none.
    pub description: String,
    /// Size, bytes.
    pub size_bytes: u64,
    /// Whether every write is refused.
    pub read_only: bool,
    /// The members of the mirror: those that `nbdmirror:stale/N` is offered for.
    pub replicas: ReplicaSet,
}

/// How requests and replies look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum ReplyMode {
    /// Compact requests, simple replies.
    #[default]
    Simple,
    /// Compact requests, replies in chunks.
    Structured,
    /// Requests and chunks with 64-bit lengths.
    Extended,
}

/// What a client has chosen in the handshake.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Negotiated {
    /// How requests and replies look.
    pub mode: ReplyMode,
    /// What BLOCK_STATUS speaks of; empty in `ReplyMode::Simple`.
    pub contexts: ContextSet,
}

impl Negotiated {
    /// Whether BLOCK_STATUS may have a payload.
    #[must_use]
    pub fn status_payload(self) -> bool {
        self.mode == ReplyMode::Extended && !self.contexts.is_empty()
    }
}

impl Export {
    /// The transmission flags (`FLAG_*` of [`wire`]) for a client that has negotiated this.
    ///
    /// A read-only export does not offer TRIM and WRITE_ZEROES, which it always refuses. It goes on offering
    /// FLUSH and FUA, which do nothing then, because clients set them without looking.
    #[must_use]
    pub fn transmission_flags(&self, negotiated: Negotiated) -> u16 {
        let mut flags = wire::FLAG_HAS_FLAGS
            | wire::FLAG_SEND_FLUSH
            | wire::FLAG_SEND_FUA
            | wire::FLAG_CAN_MULTI_CONN
            | wire::FLAG_SEND_CACHE;
        flags |= if self.read_only {
            wire::FLAG_READ_ONLY
        } else {
            wire::FLAG_SEND_TRIM | wire::FLAG_SEND_WRITE_ZEROES | wire::FLAG_SEND_FAST_ZERO
        };
        if negotiated.mode != ReplyMode::Simple {
            flags |= wire::FLAG_SEND_DF;
        }
        if negotiated.status_payload() {
            flags |= wire::FLAG_BLOCK_STATUS_PAYLOAD;
        }
        flags
    }

    /// Whether a client that asks for `name` means this export: by its name, or by the empty one.
    #[must_use]
    pub fn answers_to(&self, name: &[u8]) -> bool {
        name.is_empty() || name == self.name.as_bytes()
    }

    /// Whether name and description are strings in the protocol's sense: short enough and without NUL.
    #[must_use]
    pub fn has_valid_strings(&self) -> bool {
        [&self.name, &self.description]
            .into_iter()
            .all(|text| text.len() <= wire::STRING_BYTES_MAX && !text.contains('\0'))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::extent::StatusContext;

    fn export(read_only: bool) -> Export {
        Export {
            name: "vol".to_owned(),
            description: String::new(),
            size_bytes: 1 << 20,
            read_only,
            replicas: ReplicaSet::EMPTY,
        }
    }

    #[test]
    fn tf_01_02_03_04_07_flags_of_a_writable_export() {
        assert_eq!(export(false).transmission_flags(Negotiated::default()), 0b1101_0110_1101);
    }

    #[test]
    fn tf_06_flags_of_a_read_only_export() {
        assert_eq!(export(true).transmission_flags(Negotiated::default()), 0b101_0000_1111);
    }

    #[test]
    fn tf_03_04_nt_17_flags_that_have_to_be_negotiated() {
        let one = ContextSet::from_iter([StatusContext::Allocation]);
        for (mode, contexts, more) in [
            (ReplyMode::Structured, ContextSet::EMPTY, wire::FLAG_SEND_DF),
            (ReplyMode::Structured, one, wire::FLAG_SEND_DF),
            (ReplyMode::Extended, ContextSet::EMPTY, wire::FLAG_SEND_DF),
            (ReplyMode::Extended, one, wire::FLAG_SEND_DF | wire::FLAG_BLOCK_STATUS_PAYLOAD),
        ] {
            let plain = export(false).transmission_flags(Negotiated::default());
            assert_eq!(export(false).transmission_flags(Negotiated { mode, contexts }), plain | more);
        }
    }

    #[test]
    fn opt_27_29_only_the_name_or_nothing_is_answered() {
        let export = export(false);
        assert!(export.answers_to(b"vol"));
        assert!(export.answers_to(b""));
        for name in [&b"vo"[..], b"vol\0", b"VOL", b"../vol", b"/vol", b"\xff\xfe"] {
            assert!(!export.answers_to(name));
        }
    }

    #[test]
    fn strings_are_checked() {
        let mut long = export(false);
        assert!(long.has_valid_strings());
        long.description = "x".repeat(wire::STRING_BYTES_MAX + 1);
        assert!(!long.has_valid_strings());
        let mut nul = export(false);
        nul.name = "a\0b".to_owned();
        assert!(!nul.has_valid_strings());
    }
}
