//! The judge: what a volume may hold after a power cut, from what its clients had been told by then.
//!
//! ```text
//!  asked ──► answered ──► covered by a flush asked after that, and answered (or FUA): durable
//! ```
//!
//! What must hold: a byte has the value of a write asked before the cut, and of none that had ended before a durable
//! write of that byte was asked. A write ends when it is answered, or with its daemon, or with the power. A read
//! of the whole that is answered after a power cut, before anything is written, settles: what it returned is durable.

use std::ops::Range;

use super::checker::unique_bytes;
use super::recorder::{Event, Log, Request};

const NEVER: usize = usize::MAX;
/// Violations described in full; the rest are counted.
const VIOLATIONS_SHOWN: usize = 6;

/// Something that gave bytes of the volume their value. Times are indexes of events.
#[derive(Debug)]
struct Write {
    asked: usize,
    ended: usize,
    /// A cut at this event or later must keep it; `NEVER` for what promises nothing.
    durable: usize,
    range: Range<u64>,
    bytes: Vec<u8>,
}

/// What clients know, from one log.
#[derive(Debug)]
pub(crate) struct Judge {
    writes: Vec<Write>,
}

/// A request's end.
#[derive(Clone, Copy)]
struct End {
    at: usize,
    answered: bool,
}

impl Judge {
    /// A judge of a volume of `size_bytes` that read as zeroes when the log began.
    pub(crate) fn new(log: &Log, size_bytes: u64) -> Self {
        let first = Write {
            asked: 0,
            ended: 0,
            durable: 0,
            range: 0..size_bytes,
            bytes: vec![0; size_bytes as usize],
        };
        let ends = ends(log);
        let mut writes = vec![first];
        let mut written_since_power = false;
        for (asked, event) in log.events.iter().enumerate() {
            let request = match event {
                Event::PowerOn { .. } => {
                    written_since_power = false;
                    continue;
                }
                Event::Asked(request) => *request,
                _ => continue,
            };
            let end = ends[asked];
            let unflushed = if end.answered { flushed(log, &ends, end.at) } else { NEVER };
            let at_once = if end.answered { end.at + 1 } else { NEVER };
            let (range, bytes, durable) = match request {
                Request::Write { offset, len, fua } => {
                    let bytes = unique_bytes(asked as u64, offset, len);
                    (offset..offset + len, bytes, if fua { at_once } else { unflushed })
                }
                Request::Zeroes { offset, len, fua } => {
                    (offset..offset + len, vec![0; len as usize], if fua { at_once } else { unflushed })
                }
                Request::Trim { offset, len } => (offset..offset + len, vec![0; len as usize], NEVER),
                Request::Read { offset, .. } => match log.events.get(end.at) {
                    Some(Event::Answered { data: Some(data), .. }) if !written_since_power => {
                        let bytes = log.bytes(*data).to_vec();
                        (offset..offset + bytes.len() as u64, bytes, at_once)
                    }
                    _ => continue,
                },
                Request::Flush => continue,
            };
            written_since_power |= !matches!(request, Request::Read { .. });
            writes.push(Write { asked, ended: end.at, durable, range, bytes });
        }
        Self { writes }
    }

    /// Number of writes that a cut here must keep, unless they are overwritten.
    pub(crate) fn durable(&self, cut: usize) -> usize {
        self.writes.iter().filter(|write| write.durable <= cut && write.asked > 0).count()
    }

    /// What is wrong with `bytes` at `offset` of the volume after a cut here, one line each.
    pub(crate) fn check(&self, cut: usize, offset: u64, bytes: &[u8]) -> Result<(), Vec<String>> {
        let end = offset + bytes.len() as u64;
        let known: Vec<&Write> = self.writes.iter().filter(|write| write.asked < cut).collect();
        let mut borders: Vec<u64> =
            known.iter().flat_map(|write| [write.range.start, write.range.end]).collect();
        // Sectors are whole or not at all, and a line of a report names one.
        borders.extend((offset / 512..=end.div_ceil(512)).map(|sector| sector * 512));
        borders.retain(|border| (offset..=end).contains(border));
        borders.sort_unstable();
        borders.dedup();
        let mut wrong = Vec::new();
        for pair in borders.windows(2) {
            let part = pair[0]..pair[1];
            let found = &bytes[(part.start - offset) as usize..(part.end - offset) as usize];
            if let Err(text) = check_part(&known, cut, &part, found) {
                wrong.push(text);
            }
        }
        if wrong.len() > VIOLATIONS_SHOWN {
            let more = wrong.len() - VIOLATIONS_SHOWN;
            wrong.truncate(VIOLATIONS_SHOWN);
            wrong.push(format!("and {more} more"));
        }
        if wrong.is_empty() { Ok(()) } else { Err(wrong) }
    }
}

/// Checks bytes that no write covers in part.
fn check_part(known: &[&Write], cut: usize, part: &Range<u64>, found: &[u8]) -> Result<(), String> {
    let covers = |write: &&&Write| write.range.start <= part.start && part.end <= write.range.end;
    let covering: Vec<&&Write> = known.iter().filter(covers).collect();
    let durable = covering.iter().filter(|write| write.durable <= cut).max_by_key(|write| write.asked);
    let durable = durable.expect("the first content is durable");
    let same = |write: &&&&Write| {
        let from = (part.start - write.range.start) as usize;
        write.bytes[from..from + found.len()] == *found
    };
    let matching: Vec<&&&Write> = covering.iter().filter(same).collect();
    if matching.iter().any(|write| write.asked >= durable.asked || write.ended > durable.asked) {
        return Ok(());
    }
    let what = match matching.last() {
        Some(old) => format!("the value of the write asked at event {} (ended {})", old.asked, old.ended),
        None => format!("{:02x?}..., which nobody wrote", &found[..found.len().min(8)]),
    };
    let (asked, since) = (durable.asked, durable.durable);
    Err(format!(
        "byte {} ({} bytes): {what}; asked at {asked} and durable since {since} is another",
        part.start,
        found.len()
    ))
}

/// When each request ended, by the index it was asked at; the entries of other events mean nothing.
fn ends(log: &Log) -> Vec<End> {
    let mut ends = vec![End { at: NEVER, answered: false }; log.events.len()];
    let mut open = Vec::new();
    for (index, event) in log.events.iter().enumerate() {
        match event {
            Event::Asked(_) => open.push(index),
            Event::Answered { asked, error, .. } => {
                ends[*asked] = End { at: index, answered: *error == 0 };
                open.retain(|other| other != asked);
            }
            Event::PowerOn { .. } | Event::DaemonGone => {
                open.drain(..).for_each(|asked| ends[asked] = End { at: index, answered: false });
            }
            _ => {}
        }
    }
    ends
}

/// From which cut on a write that was answered at event `answered` is durable by a flush.
fn flushed(log: &Log, ends: &[End], answered: usize) -> usize {
    let mut first = NEVER;
    for (index, event) in log.events.iter().enumerate().skip(answered + 1) {
        match event {
            // What the cache lost, no later flush makes durable.
            Event::PowerOn { .. } => break,
            Event::Asked(Request::Flush) if ends[index].answered => first = first.min(ends[index].at + 1),
            _ => {}
        }
    }
    first
}

#[cfg(test)]
mod tests {
    use super::super::recorder::DISKS;
    use super::*;

    const SIZE: u64 = 4096;

    struct Story(Log);

    impl Story {
        fn new() -> Self {
            Self(Log::new(&[const { Vec::new() }; DISKS]))
        }

        fn asks(&mut self, request: Request) -> usize {
            self.0.push(Event::Asked(request))
        }

        fn writes(&mut self, fua: bool) -> usize {
            self.asks(Request::Write { offset: 0, len: 1024, fua })
        }

        fn gets(&mut self, asked: usize) {
            self.0.push(Event::Answered { asked, error: 0, data: None });
        }

        fn flushes(&mut self) {
            let flush = self.asks(Request::Flush);
            self.gets(flush);
        }

        /// Whether the first sector may have the value of the write asked at this event (0: the first content) now.
        fn may_be(&self, asked: usize) -> bool {
            let bytes = if asked == 0 { vec![0; 512] } else { unique_bytes(asked as u64, 0, 512) };
            Judge::new(&self.0, SIZE).check(self.0.events.len(), 0, &bytes).is_ok()
        }
    }

    #[test]
    fn a_write_promises_nothing_before_a_flush_that_came_after_its_answer() {
        let mut story = Story::new();
        let write = story.writes(false);
        assert!(story.may_be(0) && story.may_be(write));
        let flush = story.asks(Request::Flush);
        story.gets(write);
        story.gets(flush);
        assert!(story.may_be(0) && story.may_be(write), "the flush was asked before the answer");
        story.flushes();
        assert!(!story.may_be(0) && story.may_be(write));
    }

    #[test]
    fn a_durable_write_buries_what_had_ended_before_it_and_nothing_else() {
        let mut story = Story::new();
        let old = story.writes(false);
        story.gets(old);
        let (fua, beside) = (story.writes(true), story.writes(false));
        assert!([0, old, fua, beside].into_iter().all(|asked| story.may_be(asked)));
        story.gets(fua);
        assert!(!story.may_be(0) && !story.may_be(old) && story.may_be(fua) && story.may_be(beside));
        let bytes = [unique_bytes(fua as u64, 0, 512), unique_bytes(beside as u64, 512, 512)].concat();
        let judge = Judge::new(&story.0, SIZE);
        assert!(judge.check(story.0.events.len(), 0, &bytes).is_ok(), "torn between sectors");
        assert!(
            judge.check(story.0.events.len(), 512, &bytes[..512]).is_err(),
            "right bytes at a wrong place"
        );
    }

    #[test]
    fn what_the_power_took_no_later_flush_makes_durable_and_a_read_settles_it() {
        let mut story = Story::new();
        let (lost, in_flight) = (story.writes(false), story.writes(false));
        story.gets(lost);
        story.0.power_on(&[const { Vec::new() }; DISKS]);
        story.flushes();
        assert!(story.may_be(0) && story.may_be(lost) && story.may_be(in_flight));
        let read = story.asks(Request::Read { offset: 0, len: 1024 });
        let data = Some(story.0.keep(&unique_bytes(in_flight as u64, 0, 1024)));
        assert!(story.may_be(0));
        story.0.push(Event::Answered { asked: read, error: 0, data });
        assert!(!story.may_be(0) && !story.may_be(lost) && story.may_be(in_flight));
    }
}
