//! What reads of a volume may return: each sector of 512 bytes is an atomic register, every write has a value of its own.
//!
//! What must hold: a read returns a value that is *alive*. A value dies when a write that began after its own one had
//! ended is acknowledged, and when a read shows that another value stands where it was: nobody goes back behind that.
//! A write that failed, or that a crash cut off, is alive until then: old or new, and it stays so.

use nbdmirror::units::{ByteRange, SECTOR_BYTES};

/// One value that a sector may have.
#[derive(Clone, Copy, Debug)]
struct Entry {
    value: u16,
    /// Moments: when its write was sent, and when it was answered.
    begin: u64,
    end: u64,
}

/// A read on its way: what was alive when it began.
#[derive(Debug)]
pub struct ReadBegun {
    at: u64,
    alive: Vec<Vec<Entry>>,
}

/// The registers of a volume.
pub struct Register {
    sectors: Vec<Vec<Entry>>,
    now: u64,
}

impl Register {
    /// A volume that reads as zero.
    pub fn new(volume_bytes: u64) -> Self {
        let zero = Entry { value: 0, begin: 0, end: 0 };
        Self { sectors: vec![vec![zero]; (volume_bytes / SECTOR_BYTES) as usize], now: 0 }
    }

    /// The next moment.
    pub fn tick(&mut self) -> u64 {
        self.now += 1;
        self.now
    }

    fn sectors(range: ByteRange) -> std::ops::Range<usize> {
        (range.offset / SECTOR_BYTES) as usize..(range.end() / SECTOR_BYTES) as usize
    }

    /// A write of `value` is sent. Gives the moment, which names it.
    pub fn write_begins(&mut self, range: ByteRange, value: u16) -> u64 {
        let begin = self.tick();
        for sector in &mut self.sectors[Self::sectors(range)] {
            sector.push(Entry { value, begin, end: u64::MAX });
        }
        begin
    }

    /// The write that began at `begin` ends. `sure`: it was acknowledged, so what ended before it is gone.
    pub fn write_ends(&mut self, range: ByteRange, begin: u64, sure: bool) {
        let end = self.tick();
        for sector in &mut self.sectors[Self::sectors(range)] {
            if sure {
                sector.retain(|entry| entry.end >= begin);
            }
            for entry in sector.iter_mut().filter(|entry| entry.begin == begin) {
                entry.end = end;
            }
        }
    }

    /// A read is sent.
    pub fn read_begins(&mut self, range: ByteRange) -> ReadBegun {
        let at = self.tick();
        let alive = self.sectors[Self::sectors(range)].to_vec();
        ReadBegun { at, alive }
    }

    /// A read returned `bytes`.
    ///
    /// # Panics
    /// Where it may not.
    pub fn read_ends(&mut self, range: ByteRange, read: &ReadBegun, bytes: &[u8]) {
        assert_eq!(bytes.len() as u64, range.len);
        let sectors = Self::sectors(range);
        for ((at, alive), bytes) in sectors.zip(&read.alive).zip(bytes.chunks_exact(SECTOR_BYTES as usize)) {
            let value = value_of(bytes).unwrap_or_else(|| panic!("sector {at} is torn"));
            let sector = &mut self.sectors[at];
            let since = sector.iter().filter(|entry| entry.begin > read.at);
            let told: Vec<Entry> =
                alive.iter().chain(since).copied().filter(|entry| entry.value == value).collect();
            assert!(
                !told.is_empty(),
                "sector {at} reads as {value}; alive were {alive:?}, and are {sector:?}"
            );
            sector.retain(|entry| {
                let dead = |seen: &Entry| {
                    seen.begin != entry.begin && (entry.end < seen.begin || entry.end < read.at)
                };
                !told.iter().all(dead)
            });
        }
    }

    /// A crash: what was being written may be there or not, and nothing is being written any more.
    pub fn crash(&mut self) {
        let end = self.tick();
        for entry in self.sectors.iter_mut().flatten().filter(|entry| entry.end == u64::MAX) {
            entry.end = end;
        }
    }
}

/// The value that a sector is filled with; `None` where it is not filled with one.
pub fn value_of(sector: &[u8]) -> Option<u16> {
    // Each pair of bytes is the one before it: one comparison of memory, which an instrumented loop is not.
    (sector[2..] == sector[..sector.len() - 2]).then(|| u16::from_le_bytes([sector[0], sector[1]]))
}
