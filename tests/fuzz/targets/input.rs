//! Decisions from a fuzzer's bytes: a cursor that gives zeroes when the bytes are used up, so that every input means
//! something and its end ends what it drives.

/// The bytes that are left.
pub struct Input<'a> {
    rest: &'a [u8],
}

impl<'a> Input<'a> {
    /// Reads `data` from its start.
    pub fn new(data: &'a [u8]) -> Self {
        Self { rest: data }
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    /// All that is left.
    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.rest)
    }

    /// The next byte.
    pub fn u8(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    /// The next two bytes.
    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    /// The next four bytes.
    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    /// The next eight bytes.
    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// The next sixteen bytes.
    pub fn u128(&mut self) -> u128 {
        u128::from_le_bytes(self.array())
    }

    /// A number below `limit`, of one byte where that is enough.
    pub fn below(&mut self, limit: u64) -> u64 {
        assert!(limit > 0);
        match limit {
            1 => 0,
            2..=0x100 => u64::from(self.u8()) % limit,
            0x101..=0x1_0000 => u64::from(self.u16()) % limit,
            _ => self.u64() % limit,
        }
    }

    /// An index into something of `len`.
    pub fn index(&mut self, len: usize) -> usize {
        self.below(len as u64) as usize
    }

    /// One of `choices`.
    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.index(choices.len())]
    }

    /// Once in `times`; "no" where nothing is left.
    pub fn one_in(&mut self, times: u8) -> bool {
        self.u8() % times == times - 1
    }

    /// Up to `len` bytes: as many as there are.
    pub fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (taken, rest) = self.rest.split_at(len.min(self.rest.len()));
        self.rest = rest;
        taken
    }

    /// Text of up to 255 bytes, whatever the bytes are.
    pub fn text(&mut self) -> String {
        let len = usize::from(self.u8());
        String::from_utf8_lossy(self.bytes(len)).into_owned()
    }

    /// A number near the interesting ones: small, around a power of two, around `near`, or any.
    pub fn number(&mut self, near: u64) -> u64 {
        let step = u64::from(self.u8() % 5);
        match self.u8() % 5 {
            0 => step,
            1 => near.wrapping_add(step).wrapping_sub(2),
            2 => (1u64 << (self.u8() % 64)).wrapping_add(step).wrapping_sub(2),
            3 => u64::MAX - step,
            _ => self.u64(),
        }
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut value = [0; N];
        let taken = self.bytes(N);
        value[..taken.len()].copy_from_slice(taken);
        value
    }
}

/// Cuts `bytes` into pieces of the lengths that `lengths` gives in turn (0 gives an empty piece); the last piece is the
/// rest.
pub fn pieces<'b>(bytes: &'b [u8], lengths: &'b [u8]) -> impl Iterator<Item = &'b [u8]> {
    let mut rest = Some(bytes);
    let mut lengths = lengths.iter();
    std::iter::from_fn(move || {
        let whole = rest.take()?;
        match lengths.next() {
            Some(len) => {
                let (piece, after) = whole.split_at(usize::from(*len).min(whole.len()));
                rest = Some(after);
                Some(piece)
            }
            None => Some(whole),
        }
    })
}
