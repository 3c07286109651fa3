//! The oracle: for every byte of the volume, the values that a read may legally return.
//!
//! ```text
//!  begin ──► in flight ──► ended (answered, failed, or its daemon died)
//!                │             │
//!                └── alive: may be the current value ──► dead: a newer one has been seen ──► buried: flushed over
//!                      ▲                                       │
//!                      └────────── a power cut ◄───────────────┘
//! ```
//!
//! What must hold (an atomic register for each byte, with a volatile cache below it):
//! - *Witness*: if the value is known to have been `v` at some time within `[s, e]` (the answer to the write of
//!   `v`; a read that returned `v`), then every other value whose write had ended before `s` is dead.
//! - A read that began at `s` may return what was not dead at `s`.
//! - A power cut revives the dead that no flush has covered, and ends every write in flight; the next read
//!   decides, for good.
//!
//! Cells are ranges of bytes with one state, split as operations and reads demand; time is a counter of events.

use std::collections::{BTreeMap, BTreeSet};

use crate::units::{BLOCK_BYTES, ByteRange, SECTOR_BYTES};

use super::disk::{Image, read_image};
use super::rng::mix64;

mod identity;

const NEVER: u64 = u64::MAX;

/// What a write puts into the volume: unique to the operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Value {
    /// Unique; 0 is the volume's first content.
    pub id: u32,
    /// It is zeroes.
    pub zero: bool,
}

/// What a new volume holds.
pub const INITIAL: Value = Value { id: 0, zero: true };

impl Value {
    fn word(self, index: u64) -> [u8; 8] {
        if self.zero { [0; 8] } else { mix64(u64::from(self.id) << 40 ^ index).to_le_bytes() }
    }

    /// Writes this value's bytes at `offset` of the volume into `out`.
    pub fn fill(self, offset: u64, out: &mut [u8]) {
        for_words(offset, out.len(), |index, within, at| {
            out[at.clone()].copy_from_slice(&self.word(index)[within..within + at.len()]);
            true
        });
    }

    /// Whether `bytes` at `offset` of the volume are this value's.
    #[must_use]
    pub fn matches(self, offset: u64, bytes: &[u8]) -> bool {
        if self.zero {
            return bytes.iter().all(|byte| *byte == 0);
        }
        // Whole words are compared as numbers: this is where a simulation spends its time.
        let head = ((8 - offset % 8) % 8).min(bytes.len() as u64) as usize;
        let (words, tail) = bytes[head..].as_chunks::<8>();
        let first = (offset + head as u64) / 8;
        let mut whole = words.iter().zip(first..);
        whole.all(|(bytes, index)| u64::from_le_bytes(*bytes) == u64::from_le_bytes(self.word(index)))
            && self.matches_in_part(offset, &bytes[..head])
            && self.matches_in_part(offset + (bytes.len() - tail.len()) as u64, tail)
    }

    fn matches_in_part(self, offset: u64, bytes: &[u8]) -> bool {
        for_words(offset, bytes.len(), |index, within, at| {
            bytes[at.clone()] == self.word(index)[within..within + at.len()]
        })
    }
}

/// Calls `each(word index, first byte in the word, place in the buffer)` until it says no.
fn for_words(
    offset: u64,
    len: usize,
    mut each: impl FnMut(u64, usize, std::ops::Range<usize>) -> bool,
) -> bool {
    let mut at = 0;
    while at < len {
        let within = ((offset + at as u64) % 8) as usize;
        let part = (8 - within).min(len - at);
        if !each((offset + at as u64) / 8, within, at..at + part) {
            return false;
        }
        at += part;
    }
    true
}

/// How a write, zeroes or trim was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is the value now, or was before a newer one.
    Done {
        /// And on stable storage.
        fua: bool,
    },
    /// It may or may not have happened, sector by sector (errors, trims).
    Maybe,
}

#[derive(Clone, Debug)]
struct Entry {
    value: Value,
    /// No effect after this time; `NEVER` while in flight and unseen.
    end: u64,
    /// When a newer value was seen.
    dead: Option<u64>,
    /// A successful flush that began after this time has covered its death.
    covered_from: u64,
    /// It is on stable storage (it survived a power cut).
    durable: bool,
    /// No power cut brings it back.
    buried: bool,
}

#[derive(Clone, Debug)]
struct Cell {
    end: u64,
    entries: Vec<Entry>,
}

/// The oracle of one volume. Cloned, it describes a copy of the volume.
#[derive(Clone)]
pub struct Oracle {
    cells: BTreeMap<u64, Cell>,
    clock: u64,
    /// Begin of the latest flush that succeeded.
    flushed: u64,
    /// Failed flushes: deaths within `(from, to]` are never covered by a later flush.
    lost: Vec<(u64, u64)>,
    in_flight: BTreeMap<Value, ByteRange>,
    reads: BTreeSet<u64>,
}

impl Oracle {
    /// A new volume of zeroes.
    #[must_use]
    pub fn new(volume_bytes: u64) -> Self {
        let entry =
            Entry { value: INITIAL, end: 0, dead: None, covered_from: 0, durable: true, buried: false };
        let cells = BTreeMap::from([(0, Cell { end: volume_bytes, entries: vec![entry] })]);
        Self { cells, clock: 1, flushed: 0, lost: vec![], in_flight: BTreeMap::new(), reads: BTreeSet::new() }
    }

    fn now(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    fn split(&mut self, at: u64) {
        let Some((start, cell)) = self.cells.range_mut(..=at).next_back() else { return };
        if *start == at || at >= cell.end {
            return;
        }
        let right = Cell { end: cell.end, entries: cell.entries.clone() };
        cell.end = at;
        self.cells.insert(at, right);
    }

    fn cells_in(&mut self, range: ByteRange) -> impl Iterator<Item = &mut Cell> {
        self.split(range.offset);
        self.split(range.end());
        self.cells.range_mut(range.offset..range.end()).map(|(_, cell)| cell)
    }

    /// A write, zeroes or trim is sent. Gives its begin.
    pub fn write_begin(&mut self, value: Value, range: ByteRange) -> u64 {
        let now = self.now();
        self.in_flight.insert(value, range);
        for cell in self.cells_in(range) {
            cell.entries.push(Entry {
                value,
                end: NEVER,
                dead: None,
                covered_from: NEVER,
                durable: false,
                buried: false,
            });
        }
        now
    }

    /// It was refused: it never was.
    pub fn write_refused(&mut self, value: Value) {
        let Some(range) = self.in_flight.remove(&value) else { return };
        for cell in self.cells_in(range) {
            cell.entries.retain(|entry| entry.value != value);
        }
    }

    /// It is answered.
    pub fn write_end(&mut self, value: Value, begin: u64, outcome: Outcome) {
        let now = self.now();
        let Some(range) = self.in_flight.remove(&value) else { return };
        let (oldest_read, flushed, lost) = self.pruning(now);
        for cell in self.cells_in(range) {
            for entry in &mut cell.entries {
                if entry.value == value {
                    entry.end = entry.end.min(now);
                } else if let Outcome::Done { fua } = outcome
                    && entry.end < begin
                {
                    entry.kill(now, now, &lost);
                    entry.buried |= fua;
                }
            }
            cell.prune(oldest_read, flushed, &lost);
        }
    }

    fn pruning(&self, now: u64) -> (u64, u64, Vec<(u64, u64)>) {
        (self.reads.first().copied().unwrap_or(now), self.flushed, self.lost.clone())
    }

    /// A read is sent. Gives its begin.
    pub fn read_begin(&mut self) -> u64 {
        let now = self.now();
        self.reads.insert(now);
        now
    }

    /// A read failed: that is no value.
    pub fn read_failed(&mut self, begin: u64) {
        self.reads.remove(&begin);
    }

    /// A read is answered with `bytes` at `offset`.
    ///
    /// # Errors
    /// What was read, and what might have been.
    pub fn read_end(&mut self, offset: u64, bytes: &[u8], begin: u64) -> Result<(), String> {
        let now = self.now();
        let mut at = offset;
        let end = offset + bytes.len() as u64;
        while at < end {
            let piece_end = ((at / SECTOR_BYTES + 1) * SECTOR_BYTES).min(end).min(self.cell_end(at));
            let piece = &bytes[(at - offset) as usize..(piece_end - offset) as usize];
            self.judge(ByteRange::new(at, piece_end - at), begin, now, |value| value.matches(at, piece))
                .map_err(|allowed| self.explain(at, piece, &allowed))?;
            at = piece_end;
        }
        self.reads.remove(&begin);
        Ok(())
    }

    /// A client was told that `range` reads as zeroes, having asked at `begin`. Decides like a read; more of it may
    /// follow until `read_failed` ends it.
    ///
    /// # Errors
    /// What was told, and what might have been.
    pub fn zeroes_seen(&mut self, range: ByteRange, begin: u64) -> Result<(), String> {
        let now = self.now();
        let mut at = range.offset;
        while at < range.end() {
            let end = self.cell_end(at).min(range.end());
            // A few bytes of a value may be zeroes by chance.
            let zeroes = [0; 16];
            let few = zeroes.get(..(end - at) as usize);
            let matches = |value: Value| value.zero || few.is_some_and(|few| value.matches(at, few));
            self.judge(ByteRange::new(at, end - at), begin, now, matches)
                .map_err(|allowed| self.explain(at, &[0; 8], &allowed))?;
            at = end;
        }
        Ok(())
    }

    fn cell_end(&self, at: u64) -> u64 {
        self.cells.range(..=at).next_back().map_or(NEVER, |(_, cell)| cell.end)
    }

    /// One piece, within one cell, has been seen to hold one of the values that match.
    fn judge(
        &mut self,
        piece: ByteRange,
        begin: u64,
        now: u64,
        matches: impl Fn(Value) -> bool,
    ) -> Result<(), Vec<Value>> {
        let Some((_, cell)) = self.cells.range(..=piece.offset).next_back() else { return Ok(()) };
        let allowed = |entry: &&Entry| entry.dead.is_none_or(|dead| dead >= begin);
        let seen: Vec<Entry> =
            cell.entries.iter().filter(allowed).filter(|e| matches(e.value)).cloned().collect();
        if seen.is_empty() {
            return Err(cell.entries.iter().filter(allowed).map(|entry| entry.value).collect());
        }
        let is_seen = |entry: &Entry| seen.iter().any(|s| s.value == entry.value);
        let single = seen.len() == 1;
        let news = cell.entries.iter().any(|entry| {
            if is_seen(entry) { single && entry.end > now } else { entry.dead.is_none() && entry.end < begin }
        });
        if !news {
            return Ok(());
        }
        let ended = seen.iter().all(|entry| entry.end < begin);
        let durable = seen.iter().all(|entry| entry.durable);
        let lost = self.lost.clone();
        for cell in self.cells_in(piece) {
            for entry in &mut cell.entries {
                if is_seen(entry) {
                    entry.end = if single { entry.end.min(now) } else { entry.end };
                } else if entry.end < begin {
                    entry.kill(now, if ended { now } else { NEVER }, &lost);
                    entry.buried |= durable && entry.durable;
                }
            }
        }
        Ok(())
    }

    fn explain(&self, at: u64, piece: &[u8], allowed: &[Value]) -> String {
        let whose = |byte: u64, bytes: &[u8]| {
            (0..=10_000_000)
                .map(|id| Value { id, zero: id == 0 })
                .find(|value| value.matches(byte, bytes))
                .map_or("nobody's bytes".to_owned(), |value| format!("value {}", value.id))
        };
        let entries = self.cells.range(..=at).next_back().map(|(_, cell)| &cell.entries);
        format!(
            "byte {at}, {} bytes: read {}, legal are {:?}; history {entries:?}",
            piece.len(),
            whose(at, piece),
            allowed.iter().map(|value| value.id).collect::<Vec<_>>(),
        )
    }

    /// A flush is sent. Gives its begin.
    pub fn flush_begin(&mut self) -> u64 {
        self.now()
    }

    /// A flush is answered.
    pub fn flush_end(&mut self, begin: u64, ok: bool) {
        if ok {
            self.flushed = self.flushed.max(begin);
        } else {
            self.cache_lost();
        }
    }

    /// A flush failed on everything there was: what was not flushed before may be gone, whatever later
    /// flushes say.
    pub fn cache_lost(&mut self) {
        let now = self.now();
        self.lost.push((self.flushed, now));
    }

    /// A flush failed on the last replica in sync. Of the values that survived a power cut, each on some replica, what it has
    /// may stand in its cache only, copied there from one that is gone; reads go on, and are turned back by a power cut.
    pub fn copies_not_vouched_for(&mut self) {
        for cell in self.cells.values_mut().filter(|cell| cell.entries.len() > 1) {
            cell.entries.iter_mut().for_each(|entry| entry.durable = false);
        }
    }

    /// The daemon died: nothing that is in flight will be answered.
    pub fn process_killed(&mut self) {
        let now = self.now();
        for (_, range) in std::mem::take(&mut self.in_flight) {
            for cell in self.cells_in(range) {
                cell.entries.iter_mut().for_each(|entry| entry.end = entry.end.min(now));
            }
        }
        self.reads.clear();
    }

    /// The power went: what no flush covered may be back.
    pub fn power_cut(&mut self) {
        self.process_killed();
        let now = self.now();
        let (flushed, lost) = (self.flushed, std::mem::take(&mut self.lost));
        for cell in self.cells.values_mut() {
            cell.entries.retain(|entry| entry.dead.is_none() || entry.can_come_back(flushed, &lost));
            for entry in &mut cell.entries {
                (entry.end, entry.dead, entry.covered_from, entry.durable) = (now, None, NEVER, true);
            }
        }
    }

    /// A replica as a raw image (promise 10). Decides like a read: a second replica must show the same.
    ///
    /// # Errors
    /// The first byte that is wrong.
    pub fn check_image(&mut self, image: &Image) -> Result<(), String> {
        let begin = self.read_begin();
        let mut at = 0;
        while let Some((start, cell)) = self.cells.range(..=at).next_back().filter(|(_, cell)| at < cell.end)
        {
            let (_, cell_end) = (*start, cell.end);
            let block = at / BLOCK_BYTES;
            if image.contains_key(&block) {
                let end = cell_end.min((block + 1) * BLOCK_BYTES);
                let mut bytes = vec![0; (end - at) as usize];
                read_image(image, at, &mut bytes);
                self.reads.insert(begin);
                self.read_end(at, &bytes, begin)?;
                at = end;
            } else {
                let next = image.range(block..).next().map_or(NEVER, |(block, _)| block * BLOCK_BYTES);
                let end = cell_end.min(next);
                self.zeroes_seen(ByteRange::new(at, end - at), begin)?;
                at = end;
            }
        }
        self.reads.remove(&begin);
        Ok(())
    }
}

impl Entry {
    fn kill(&mut self, now: u64, covered_from: u64, lost: &[(u64, u64)]) {
        if self.dead.is_none() {
            (self.dead, self.covered_from) = (Some(now), covered_from);
        } else if self.covered_from == NEVER || self.is_lost(lost) {
            self.covered_from = covered_from;
        }
    }

    fn is_lost(&self, lost: &[(u64, u64)]) -> bool {
        lost.iter().any(|(from, to)| *from < self.covered_from && self.covered_from <= *to)
    }

    fn can_come_back(&self, flushed: u64, lost: &[(u64, u64)]) -> bool {
        !self.buried && (self.covered_from > flushed || self.is_lost(lost))
    }
}

impl Cell {
    fn prune(&mut self, oldest_read: u64, flushed: u64, lost: &[(u64, u64)]) {
        self.entries.retain(|entry| {
            entry.dead.is_none_or(|dead| dead >= oldest_read || entry.can_come_back(flushed, lost))
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RANGE: ByteRange = ByteRange { offset: 1000, len: 3000 };

    fn value(id: u32) -> Value {
        Value { id, zero: false }
    }

    fn bytes(id: u32) -> Vec<u8> {
        let mut out = vec![0; RANGE.len as usize];
        Value { id, zero: id == 0 }.fill(RANGE.offset, &mut out);
        out
    }

    fn read(oracle: &mut Oracle, id: u32) -> bool {
        let begin = oracle.read_begin();
        oracle.read_end(RANGE.offset, &bytes(id), begin).is_ok()
    }

    fn write(oracle: &mut Oracle, id: u32, fua: bool) {
        let begin = oracle.write_begin(value(id), RANGE);
        oracle.write_end(value(id), begin, Outcome::Done { fua });
    }

    #[test]
    fn an_answered_write_replaces_what_was_there() {
        let mut oracle = Oracle::new(65536);
        write(&mut oracle, 1, false);
        assert!(read(&mut oracle, 1) && !read(&mut oracle.clone(), 0));
    }

    #[test]
    fn a_new_value_once_read_is_not_taken_back() {
        let mut oracle = Oracle::new(65536);
        let begin = oracle.write_begin(value(1), RANGE);
        assert!(read(&mut oracle, 0) && read(&mut oracle, 1) && !read(&mut oracle.clone(), 0));
        oracle.write_end(value(1), begin, Outcome::Maybe);
        assert!(read(&mut oracle, 1) && !read(&mut oracle, 0));
    }

    #[test]
    fn what_the_last_replica_could_not_flush_may_be_turned_back() {
        let mut oracle = Oracle::new(65536);
        oracle.write_begin(value(1), RANGE);
        oracle.power_cut();
        let mut flushed = oracle.clone();
        oracle.copies_not_vouched_for();
        for oracle in [&mut oracle, &mut flushed] {
            assert!(read(oracle, 0) && !read(&mut oracle.clone(), 1));
            oracle.power_cut();
        }
        assert!(read(&mut oracle, 1) && !read(&mut flushed, 1));
    }

    #[test]
    fn concurrent_writes_leave_either_until_one_is_read() {
        let mut oracle = Oracle::new(65536);
        let (one, two) = (oracle.write_begin(value(1), RANGE), oracle.write_begin(value(2), RANGE));
        oracle.write_end(value(1), one, Outcome::Done { fua: false });
        oracle.write_end(value(2), two, Outcome::Done { fua: false });
        assert!(read(&mut oracle.clone(), 2) && read(&mut oracle, 1) && !read(&mut oracle, 2));
    }

    #[test]
    fn a_kill_keeps_and_a_power_cut_forgets_what_was_not_flushed() {
        let mut oracle = Oracle::new(65536);
        write(&mut oracle, 1, false);
        oracle.process_killed();
        assert!(!read(&mut oracle.clone(), 0));
        write(&mut oracle, 2, false);
        let flush = oracle.flush_begin();
        oracle.flush_end(flush, true);
        write(&mut oracle, 3, false);
        oracle.power_cut();
        for (id, legal) in [(0, false), (1, false), (2, true), (3, true)] {
            assert_eq!(read(&mut oracle.clone(), id), legal, "value {id}");
        }
        assert!(read(&mut oracle, 2));
        oracle.power_cut();
        assert!(!read(&mut oracle, 3));
    }

    #[test]
    fn fua_needs_no_flush_and_a_failed_flush_promises_nothing() {
        let mut oracle = Oracle::new(65536);
        write(&mut oracle, 1, true);
        let mut cut = oracle.clone();
        cut.power_cut();
        assert!(read(&mut cut.clone(), 1) && !read(&mut cut, 0));
        write(&mut oracle, 2, false);
        for ok in [false, true] {
            let flush = oracle.flush_begin();
            oracle.flush_end(flush, ok);
        }
        let mut cut = oracle.clone();
        cut.power_cut();
        assert!(read(&mut cut, 1));
        write(&mut oracle, 3, false);
        let flush = oracle.flush_begin();
        oracle.flush_end(flush, true);
        oracle.power_cut();
        assert!(read(&mut oracle.clone(), 3) && !read(&mut oracle.clone(), 1) && !read(&mut oracle, 2));
    }

    #[test]
    fn sectors_decide_for_themselves() {
        let mut oracle = Oracle::new(65536);
        oracle.write_begin(value(1), RANGE);
        oracle.process_killed();
        let mut mixed = bytes(0);
        mixed[24..536].copy_from_slice(&bytes(1)[24..536]);
        let begin = oracle.read_begin();
        oracle.read_end(RANGE.offset, &mixed, begin).unwrap();
        let begin = oracle.read_begin();
        oracle.read_end(RANGE.offset, &mixed, begin).unwrap();
        assert!(!read(&mut oracle.clone(), 0) && !read(&mut oracle, 1));
    }

    #[test]
    fn images_are_checked_byte_by_byte() {
        let mut oracle = Oracle::new(65536);
        write(&mut oracle, 1, false);
        let mut block = [0; 4096];
        block[1000..4000].copy_from_slice(&bytes(1));
        let mut image = Image::from([(0, std::rc::Rc::new(block))]);
        oracle.check_image(&image).unwrap();
        image.insert(9, std::rc::Rc::new([1; 4096]));
        assert!(oracle.check_image(&image).is_err());
    }
}
