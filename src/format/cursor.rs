//! One cursor to write on-disk structures with and one to read them: fields in the order of the byte map, little
//! endian.
//!
//! What must hold: callers size the buffer by the structure's fixed length first, so a cursor that runs off
//! its end is a bug and not bad input (and panics); `seek` pins each part to its documented offset.

use uuid::Uuid;

/// Writes fields one after another into a zeroed buffer.
pub(super) struct Writer<'a> {
    bytes: &'a mut [u8],
    at: usize,
}

impl<'a> Writer<'a> {
    pub(super) fn new(bytes: &'a mut [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    pub(super) fn at(&self) -> usize {
        self.at
    }

    /// Goes on at `offset`, which never lies behind what has been written: fields do not overlap.
    pub(super) fn seek(&mut self, offset: usize) {
        assert!(offset >= self.at && offset <= self.bytes.len());
        self.at = offset;
    }

    pub(super) fn bytes(&mut self, value: &[u8]) {
        self.bytes[self.at..self.at + value.len()].copy_from_slice(value);
        self.at += value.len();
    }

    pub(super) fn u8(&mut self, value: u8) {
        self.bytes(&[value]);
    }

    pub(super) fn u16(&mut self, value: u16) {
        self.bytes(&value.to_le_bytes());
    }

    pub(super) fn u32(&mut self, value: u32) {
        self.bytes(&value.to_le_bytes());
    }

    pub(super) fn u64(&mut self, value: u64) {
        self.bytes(&value.to_le_bytes());
    }

    pub(super) fn uuid(&mut self, value: Uuid) {
        self.bytes(value.as_bytes());
    }
}

/// Reads fields one after another.
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// Goes on at `offset`.
    pub(super) fn seek(&mut self, offset: usize) {
        assert!(offset <= self.bytes.len());
        self.at = offset;
    }

    pub(super) fn bytes(&mut self, len: usize) -> &'a [u8] {
        let value = &self.bytes[self.at..self.at + len];
        self.at += len;
        value
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut value = [0; N];
        value.copy_from_slice(self.bytes(N));
        value
    }

    pub(super) fn u8(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    pub(super) fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    pub(super) fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    pub(super) fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    pub(super) fn uuid(&mut self) -> Uuid {
        Uuid::from_bytes(self.array())
    }
}
