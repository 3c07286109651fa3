//! The data of options that have some: parsed whole, or malformed.
//!
//! What must hold: lengths inside are believed only as far as the data goes; nothing is allocated by them.

use crate::nbd::wire::{self, Reader};

/// The data of INFO and GO.
pub(super) struct InfoQuery<'a> {
    /// The export.
    pub(super) name: &'a [u8],
    /// Big-endian 16-bit information types.
    wanted: &'a [u8],
}

impl<'a> InfoQuery<'a> {
    /// `None` where the lengths inside do not add up to the data, or the name is too long.
    pub(super) fn parse(data: &'a [u8]) -> Option<Self> {
        let mut reader = Reader::new(data);
        let name = string(&mut reader)?;
        let wanted_count = reader.u16()? as usize;
        let wanted = reader.bytes(2 * wanted_count)?;
        reader.rest().is_empty().then_some(Self { name, wanted })
    }

    /// Whether this information (`INFO_*` of [`wire`]) is asked for.
    pub(super) fn wants(&self, info: u16) -> bool {
        self.wanted.chunks_exact(2).any(|bytes| bytes == info.to_be_bytes())
    }
}

/// The data of LIST_META_CONTEXT and SET_META_CONTEXT.
pub(super) struct ContextQuery<'a> {
    /// The export.
    pub(super) name: &'a [u8],
    /// Lengths and strings, checked.
    queries: Reader<'a>,
}

impl<'a> ContextQuery<'a> {
    /// `None` where the lengths inside do not add up to the data, or a string is too long.
    pub(super) fn parse(data: &'a [u8]) -> Option<Self> {
        let mut reader = Reader::new(data);
        let name = string(&mut reader)?;
        let count = reader.u32()?;
        let queries = reader;
        for _ in 0..count {
            string(&mut reader)?; // ends with the data, however large the count
        }
        reader.rest().is_empty().then_some(Self { name, queries })
    }

    /// The queries, in order.
    pub(super) fn queries(&self) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        let mut reader = self.queries;
        std::iter::from_fn(move || string(&mut reader))
    }
}

/// A length and as many bytes, at most what a string may have.
fn string<'a>(reader: &mut Reader<'a>) -> Option<&'a [u8]> {
    let bytes = reader.u32()? as usize;
    if bytes > wire::STRING_BYTES_MAX {
        return None;
    }
    reader.bytes(bytes)
}
