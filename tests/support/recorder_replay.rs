//! From a log to what a power cut leaves on the disks.
//!
//! ```text
//!  began ──► ended ──► covered by a flush that began after it ended, and has ended: durable, in every image
//!    └──────────┴────► each image of a cut here has it, lacks it or has some of its sectors
//! ```
//!
//! What must hold: an image is one that a disk with a volatile cache may be left with. It keeps what is durable, and of
//! the rest, in the order of arrival, what the [`Choice`] says. The two disks lose what they lose independently.

use std::fmt;
use std::str::FromStr;

use super::recorder::{DISKS, DiskOp, Event, Log};
use super::rng::{Rng, mix};

const SECTOR: u64 = 512;

/// Which of the writes that are not durable are there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Choice {
    /// None.
    None,
    /// All.
    All,
    /// All of the first disk, none of the second.
    OnlyA,
    /// All of the second disk, none of the first.
    OnlyB,
    /// Each whole, missing or torn at 512 bytes, as the seed says.
    Torn(u64),
    /// A joint prefix: on each disk those that began before this event.
    Prefixes([usize; DISKS]),
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => write!(f, "none"),
            Self::All => write!(f, "all"),
            Self::OnlyA => write!(f, "only-a"),
            Self::OnlyB => write!(f, "only-b"),
            Self::Torn(seed) => write!(f, "torn:{seed}"),
            Self::Prefixes([a, b]) => write!(f, "prefixes:{a}:{b}"),
        }
    }
}

impl FromStr for Choice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts: Vec<&str> = text.split(':').collect();
        let number = |text: &str| text.parse::<u64>().map_err(|error| format!("{text}: {error}"));
        match parts[..] {
            ["none"] => Ok(Self::None),
            ["all"] => Ok(Self::All),
            ["only-a"] => Ok(Self::OnlyA),
            ["only-b"] => Ok(Self::OnlyB),
            ["torn", seed] => Ok(Self::Torn(number(seed)?)),
            ["prefixes", a, b] => Ok(Self::Prefixes([number(a)? as usize, number(b)? as usize])),
            _ => Err(format!("{text}: not a choice")),
        }
    }
}

/// How the replay cheats, to see that the judge notices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lie {
    /// Not at all.
    Nothing,
    /// Disks whose flushes do nothing.
    FlushesIgnored,
    /// On both disks the newest durable write within this many bytes from the start is missing.
    NewestDurableDropped { below: u64 },
}

/// One moment of power loss. In text: `at/choice`, and `/lost:disk`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cut {
    /// Events before this one have happened.
    pub(crate) at: usize,
    /// What the caches lost.
    pub(crate) choice: Choice,
    /// The disk that does not come back.
    pub(crate) lost: Option<usize>,
}

impl fmt::Display for Cut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.at, self.choice)?;
        self.lost.map_or(Ok(()), |disk| write!(f, "/lost:{disk}"))
    }
}

impl FromStr for Cut {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split('/');
        let at = parts.next().and_then(|at| at.parse().ok());
        let choice = parts.next().ok_or_else(|| format!("{text}: not a cut"))?.parse()?;
        let lost = match parts.next().map(|lost| lost.strip_prefix("lost:")) {
            None => Some(None),
            Some(disk) => disk.and_then(|disk| disk.parse().ok()).filter(|disk| *disk < DISKS).map(Some),
        };
        match (at, lost, parts.next()) {
            (Some(at), Some(lost), None) => Ok(Self { at, choice, lost }),
            _ => Err(format!("{text}: not a cut")),
        }
    }
}

/// An operation of one disk that changes bytes.
struct Change {
    began: usize,
    op: DiskOp,
    durable: bool,
}

/// The changes of a disk since it was set, in order of arrival.
fn changes(log: &Log, disk: usize, cut: usize) -> Vec<Change> {
    let from = log.powered_on(cut);
    let mut ended = std::collections::HashMap::new();
    for (index, event) in log.events[from..cut].iter().enumerate() {
        if let Event::DiskEnded { began, .. } = event {
            ended.insert(*began, from + index);
        }
    }
    let mine = |index: &usize| match log.events[*index] {
        Event::DiskBegan { disk: its, op } if its == disk => Some((*index, op)),
        _ => None,
    };
    let ops: Vec<(usize, DiskOp)> = (from..cut).filter_map(|index| mine(&index)).collect();
    let flushes = ops.iter().filter(|(began, op)| matches!(op, DiskOp::Flush) && ended.contains_key(began));
    // A later flush covers all that an earlier one does.
    let flushed_before = flushes.map(|(began, _)| *began).max().unwrap_or(0);
    let changing = ops.into_iter().filter(|(_, op)| !matches!(op, DiskOp::Flush));
    changing
        .map(|(began, op)| {
            let end = ended.get(&began);
            let fua = matches!(op, DiskOp::Write { fua: true, .. } | DiskOp::Zero { fua: true, .. });
            let durable = end.is_some_and(|end| fua || *end < flushed_before);
            Change { began, op, durable }
        })
        .collect()
}

/// What each disk may be left with, by `cut.choice`.
pub(crate) fn images(log: &Log, cut: Cut, lie: Lie) -> [Vec<u8>; DISKS] {
    let Event::PowerOn { images } = log.events[log.powered_on(cut.at)] else { unreachable!("just found") };
    std::array::from_fn(|disk| {
        let mut image = log.bytes(images[disk]).to_vec();
        let mut changes = changes(log, disk, cut.at);
        match lie {
            Lie::Nothing => {}
            Lie::FlushesIgnored => changes.iter_mut().for_each(|change| change.durable = false),
            Lie::NewestDurableDropped { below } => {
                let data = |op: &DiskOp| matches!(op, DiskOp::Write { offset, .. } if *offset < below);
                let newest = changes.iter().rposition(|change| change.durable && data(&change.op));
                newest.map(|newest| changes.remove(newest));
            }
        }
        for change in &changes {
            apply(log, &mut image, change, |sector| is_there(change, disk, cut.choice, sector));
        }
        image
    })
}

/// Whether the part of a change in this sector is there.
fn is_there(change: &Change, disk: usize, choice: Choice, sector: u64) -> bool {
    if change.durable {
        return true;
    }
    match choice {
        Choice::None => false,
        Choice::All => true,
        Choice::OnlyA => disk == 0,
        Choice::OnlyB => disk == 1,
        Choice::Prefixes(ends) => change.began < ends[disk],
        Choice::Torn(seed) => {
            let mut rng = Rng::new(mix(seed ^ ((change.began as u64) << 1 | disk as u64)));
            match rng.below(3) {
                0 => true,
                1 => false,
                _ => Rng::new(rng.next() ^ sector).chance(50),
            }
        }
    }
}

fn apply(log: &Log, image: &mut [u8], change: &Change, is_there: impl Fn(u64) -> bool) {
    let (offset, len) = match change.op {
        DiskOp::Write { offset, data, .. } => (offset, log.bytes(data).len() as u64),
        DiskOp::Zero { offset, len, .. } => (offset, len),
        DiskOp::Flush => return,
    };
    let end = offset + len;
    for sector in offset / SECTOR..end.div_ceil(SECTOR) {
        let part = (sector * SECTOR).max(offset)..((sector + 1) * SECTOR).min(end);
        if !is_there(sector) {
            continue;
        }
        let target = &mut image[part.start as usize..part.end as usize];
        match change.op {
            DiskOp::Write { data, .. } => {
                let from = (part.start - offset) as usize;
                target.copy_from_slice(&log.bytes(data)[from..from + target.len()]);
            }
            DiskOp::Zero { .. } | DiskOp::Flush => target.fill(0),
        }
    }
}

/// A joint prefix at this cut: on each disk, independently, some event from behind its last durable change up to the cut.
pub(crate) fn joint_prefix(log: &Log, cut: usize, rng: &mut Rng) -> Choice {
    Choice::Prefixes(std::array::from_fn(|disk| {
        let durable =
            changes(log, disk, cut).iter().filter(|change| change.durable).map(|change| change.began).max();
        let first = durable.unwrap_or(log.powered_on(cut)) + 1;
        first + rng.below((cut - first.min(cut)) as u64 + 1) as usize
    }))
}

/// Pairs of writes that were in flight together on one disk and share a byte below `below`: their order on the disk,
/// and so the mirror's sameness, would be chance.
pub(crate) fn overlaps_in_flight(log: &Log, below: u64) -> Vec<(usize, usize)> {
    let range = |op: DiskOp| match op {
        DiskOp::Write { offset, data, .. } => Some((offset, offset + log.bytes(data).len() as u64)),
        DiskOp::Zero { offset, len, .. } => Some((offset, offset + len)),
        DiskOp::Flush => None,
    };
    let mut in_flight: Vec<(usize, usize, u64, u64)> = Vec::new();
    let mut found = Vec::new();
    for (index, event) in log.events.iter().enumerate() {
        match event {
            Event::PowerOn { .. } | Event::DaemonGone => in_flight.clear(),
            Event::DiskEnded { began, .. } => in_flight.retain(|(other, ..)| other != began),
            Event::DiskBegan { disk, op } => {
                let Some((start, end)) = range(*op).filter(|(start, _)| *start < below) else { continue };
                let both = in_flight
                    .iter()
                    .filter(|(_, its, first, last)| its == disk && *first < end && start < *last);
                found.extend(both.map(|(other, ..)| (*other, index)));
                in_flight.push((index, *disk, start, end));
            }
            _ => {}
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On each disk: a write and a flush that covers it, another write of the same place, a third that covers both.
    fn log() -> (Log, usize) {
        let mut log = Log::new(&[vec![0; 4096], vec![0; 4096]]);
        for (value, flush) in [(1, true), (2, false), (3, false)] {
            let data = log.keep(&[value; 1024]);
            for disk in 0..DISKS {
                let op = DiskOp::Write { offset: 256 * u64::from(value), data, fua: false };
                let began = log.push(Event::DiskBegan { disk, op });
                log.push(Event::DiskEnded { disk, began });
                if flush {
                    let began = log.push(Event::DiskBegan { disk, op: DiskOp::Flush });
                    log.push(Event::DiskEnded { disk, began });
                }
            }
        }
        let cut = log.events.len();
        (log, cut)
    }

    fn at(cut: usize, choice: Choice) -> Cut {
        Cut { at: cut, choice, lost: None }
    }

    #[test]
    fn what_a_flush_covers_is_in_every_image_and_the_rest_as_chosen() {
        let (log, cut) = log();
        let first = |choice| {
            images(&log, at(cut, choice), Lie::Nothing).map(|image| (image[256], image[600], image[800]))
        };
        assert_eq!(first(Choice::None), [(1, 1, 1); 2]);
        assert_eq!(first(Choice::All), [(1, 2, 3); 2]);
        assert_eq!(first(Choice::OnlyB), [(1, 1, 1), (1, 2, 3)]);
        assert_eq!(first(Choice::Prefixes([cut - 2, cut])), [(1, 2, 2 + 1), (1, 2, 3)]);
        for seed in 0..100 {
            for (durable, second, third) in first(Choice::Torn(seed)) {
                assert_eq!(durable, 1);
                assert!((1..=2).contains(&second) && (1..=3).contains(&third));
            }
            let mut rng = Rng::new(seed);
            let Choice::Prefixes(ends) = joint_prefix(&log, cut, &mut rng) else { unreachable!() };
            assert!(ends.iter().all(|end| (1..=cut).contains(end)), "{ends:?}");
        }
        let lied = images(&log, at(cut, Choice::None), Lie::FlushesIgnored);
        assert!(lied.concat().iter().all(|byte| *byte == 0));
        let lied = images(&log, at(cut, Choice::None), Lie::NewestDurableDropped { below: 4096 });
        assert!(lied.concat().iter().all(|byte| *byte == 0));
    }

    #[test]
    fn a_flush_covers_only_what_had_ended_before_it_began() {
        let mut log = Log::new(&[vec![0; 512], vec![0; 512]]);
        let data = log.keep(&[9; 512]);
        let write = log.push(Event::DiskBegan { disk: 0, op: DiskOp::Write { offset: 0, data, fua: false } });
        let flush = log.push(Event::DiskBegan { disk: 0, op: DiskOp::Flush });
        log.push(Event::DiskEnded { disk: 0, began: write });
        log.push(Event::DiskEnded { disk: 0, began: flush });
        assert_eq!(images(&log, at(5, Choice::None), Lie::Nothing)[0][0], 0);
        let flush = log.push(Event::DiskBegan { disk: 0, op: DiskOp::Flush });
        log.push(Event::DiskEnded { disk: 0, began: flush });
        assert_eq!(images(&log, at(6, Choice::None), Lie::Nothing)[0][0], 0);
        assert_eq!(images(&log, at(7, Choice::None), Lie::Nothing)[0][0], 9);
        assert_eq!(log.flush_boundaries(1..8), [5, 7]);
    }

    #[test]
    fn writes_of_one_place_in_flight_together_are_seen() {
        let (mut log, _) = log();
        let data = log.keep(&[5; 512]);
        let mut begin = |disk, offset| {
            log.push(Event::DiskBegan { disk, op: DiskOp::Write { offset, data, fua: false } })
        };
        let first = begin(0, 0);
        let (_beside, _other_disk, _metadata) = (begin(0, 512), begin(1, 0), begin(0, 2048));
        let second = begin(0, 511);
        assert_eq!(overlaps_in_flight(&log, 2048), [(first, second), (first + 1, second)]);
        log.push(Event::DiskEnded { disk: 0, began: second });
        log.push(Event::DiskBegan { disk: 0, op: DiskOp::Zero { offset: 1023, len: 1, fua: false } });
        assert_eq!(overlaps_in_flight(&log, 2048).last(), Some(&(first + 1, second + 2)));
    }

    #[test]
    fn a_cut_is_read_as_it_is_printed() {
        let choices = [
            Choice::None,
            Choice::All,
            Choice::OnlyA,
            Choice::OnlyB,
            Choice::Torn(7),
            Choice::Prefixes([3, 4]),
        ];
        for (choice, lost) in
            choices.into_iter().flat_map(|choice| [None, Some(0), Some(1)].map(|lost| (choice, lost)))
        {
            let cut = Cut { at: 12, choice, lost };
            assert_eq!(cut.to_string().parse(), Ok(cut));
        }
        for text in ["", "12", "12/some", "12/none/lost:2", "12/none/x", "12/none/lost:1/x", "x/none"] {
            assert!(text.parse::<Cut>().is_err(), "{text}");
        }
    }
}
