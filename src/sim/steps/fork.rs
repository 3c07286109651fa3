//! A crash at this very moment, and every world that it may leave behind.
//!
//! ```text
//!  world ──► crash_point(kill or power cut) ──► joint outcomes: a fate for each open write ──► a world without a
//!                                                                                              daemon, ready to start
//! ```
//!
//! A write is *open* where the crash decides about it: with a kill those in flight that have not taken effect, with a
//! power cut also those in the caches. The fates of a write are by sector of 512 bytes, and only sectors in which
//! it makes a difference count: none of them → there is nothing to decide, one or two → every subset, more → lost,
//! kept, the first half, the second half (and any subset in sampled outcomes). A *joint outcome* gives each open write
//! of all disks its fate.
//!
//! What must hold: the world that was forked is not touched; equal outcomes give equal worlds; an outcome's name
//! means the same whatever the caps are.

use std::collections::BTreeMap;
use std::fmt::{self, Display};
use std::rc::Rc;
use std::str::FromStr;

use super::super::counts::FaultKind;
use super::super::device::Kind;
use super::super::disk::{ContentHash, WriteSeq};
use super::super::rng::Rng;
use super::super::world::World;
use crate::units::ByteRange;

/// How the daemon ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Crash {
    /// With its machine: the disks' caches go.
    PowerCut,
    /// Alone (SIGKILL): the caches stay.
    Kill,
}

impl Crash {
    /// Those that what is left can be judged after. A kill is none of them where a replica that is trusted has turned back
    /// after a failed flush: nobody who lives knows of it (see `World::crash`).
    pub fn judged(world: &World) -> impl Iterator<Item = Self> {
        let kill = (!world.holder_turned_back()).then_some(Self::Kill);
        [Self::PowerCut].into_iter().chain(kill)
    }
}

/// Names a joint outcome at one crash point.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Pick {
    /// The one with this number, where all are enumerated; below [`CrashPoint::outcomes`].
    Number(u64),
    /// Every open write is lost.
    AllLost,
    /// Every open write is kept.
    AllKept,
    /// Those on this disk are kept, those on the others lost.
    OnlyDisk(usize),
    /// Drawn with this seed.
    Sample(u64),
}

/// A joint outcome: how the daemon ended, and what became of the open writes.
///
/// Written as `p` (power cut) or `k` (kill) and the pick: a number, `none`, `all`, `disk1`, `~seed`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Outcome {
    /// How it ended.
    pub crash: Crash,
    /// Which of the joint outcomes.
    pub pick: Pick,
}

impl Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let crash = if self.crash == Crash::PowerCut { 'p' } else { 'k' };
        match self.pick {
            Pick::Number(number) => write!(f, "{crash}{number}"),
            Pick::AllLost => write!(f, "{crash}none"),
            Pick::AllKept => write!(f, "{crash}all"),
            Pick::OnlyDisk(disk) => write!(f, "{crash}disk{disk}"),
            Pick::Sample(seed) => write!(f, "{crash}~{seed}"),
        }
    }
}

impl FromStr for Outcome {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad =
            || format!("{text:?} is no joint outcome: p or k, then a number, none, all, disk1 or ~seed");
        let (crash, pick) = match text.split_at_checked(1) {
            Some(("p", pick)) => (Crash::PowerCut, pick),
            Some(("k", pick)) => (Crash::Kill, pick),
            _ => return Err(bad()),
        };
        let pick = match pick {
            "none" => Pick::AllLost,
            "all" => Pick::AllKept,
            _ => match (pick.strip_prefix("disk"), pick.strip_prefix('~')) {
                (Some(disk), _) => Pick::OnlyDisk(disk.parse().map_err(|_| bad())?),
                (_, Some(seed)) => Pick::Sample(seed.parse().map_err(|_| bad())?),
                _ => Pick::Number(pick.parse().map_err(|_| bad())?),
            },
        };
        Ok(Self { crash, pick })
    }
}

/// A write in flight that has not taken effect.
struct Landing {
    range: ByteRange,
    /// `None`: zeroes.
    data: Option<Rc<[u8]>>,
}

/// A write that the crash decides about.
struct OpenWrite {
    disk: usize,
    write: WriteSeq,
    /// Its sectors that matter (by index within the disk).
    sectors: Vec<u64>,
    /// Only for a kill: what is still to be done.
    landing: Option<Landing>,
}

impl OpenWrite {
    fn fates(&self) -> u64 {
        if self.sectors.len() == 1 { 2 } else { 4 }
    }

    /// Which of the sectors that matter stay with fate number `fate`, as a mask by place. Fate 0: none.
    fn kept(&self, fate: u64) -> Vec<bool> {
        let len = self.sectors.len();
        (0..len)
            .map(|at| match (len, fate) {
                (1 | 2, _) => fate >> at & 1 == 1,
                (_, 0) => false,
                (_, 1) => at < len / 2,
                (_, 2) => at >= len / 2,
                _ => true,
            })
            .collect()
    }
}

/// For each open write of one disk its sectors that matter, and which of them stay.
type Kept<'a> = BTreeMap<WriteSeq, (&'a [u64], &'a [bool])>;

/// A crash at one moment of one world.
pub struct CrashPoint {
    crash: Crash,
    /// The world as the crash finds it, with the open writes still open.
    base: World,
    open: Vec<OpenWrite>,
}

impl World {
    /// What a crash now would have to decide.
    #[must_use]
    pub fn crash_point(&self, crash: Crash) -> CrashPoint {
        let mut base = self.without_daemon();
        let mut open = Vec::new();
        let ops = self.daemon.iter().flat_map(|daemon| daemon.ops.values());
        for op in ops {
            let lost = op.result == Some(Err(nix::errno::Errno::EIO))
                && self.plan.faults.has(FaultKind::FlushLosesCache);
            base.disks[op.disk].unseen_error |=
                crash == Crash::Kill && lost && matches!(op.kind, Kind::Flush(_));
            if op.result.is_some() || base.disks[op.disk].gone {
                continue;
            }
            let (write, data) = match &op.kind {
                Kind::Write { data, seq, .. } => (*seq, Some(Rc::from(&data[..]))),
                Kind::Zero(seq) => (*seq, None),
                Kind::Read(_) | Kind::Flush(_) | Kind::ProbeHole | Kind::Cache | Kind::Allocation(_) => {
                    continue;
                }
            };
            let landing = Landing { range: op.range, data };
            let disk = &mut base.disks[op.disk].disk;
            if crash == Crash::PowerCut {
                landing.land(disk, write, |_| true);
                continue;
            }
            let sectors = disk.sectors_that_differ(op.range.offset, op.range.len, landing.data.as_deref());
            if !sectors.is_empty() {
                open.push(OpenWrite { disk: op.disk, write, sectors, landing: Some(landing) });
            }
        }
        if crash == Crash::PowerCut {
            for (disk, simulated) in base.disks.iter().enumerate() {
                let writes = simulated.disk.open_writes().into_iter();
                open.extend(writes.map(|(write, sectors)| OpenWrite { disk, write, sectors, landing: None }));
            }
        }
        CrashPoint { crash, base, open }
    }

    /// A number that two worlds without daemons share only if the same can come of them: content of the disks,
    /// durable and cached, what the oracle allows, and the flags. Chance and time do not count.
    #[must_use]
    pub fn identity(&self) -> u64 {
        let mut hash = ContentHash::new();
        for disk in &self.disks {
            hash.number(disk.disk.bytes());
            let flags = [disk.gone, disk.full, disk.unseen_error, disk.failed_alone, disk.traits.cheap_zero];
            hash.number(flags.into_iter().fold(0, |bits, flag| bits << 1 | u64::from(flag)));
            disk.disk.add_identity(&mut hash);
        }
        self.oracle.add_identity(&mut hash);
        self.holders.iter().for_each(|holder| hash.number(*holder as u64));
        hash.number(self.suspect.map_or(u64::MAX, |disk| disk as u64));
        hash.number(u64::from(self.excused) << 1 | u64::from(self.beyond_repair));
        hash.finish()
    }
}

impl Landing {
    fn land(&self, disk: &mut super::super::disk::Disk, write: WriteSeq, keep: impl FnMut(u64) -> bool) {
        match &self.data {
            Some(data) => disk.apply(write, self.range.offset, data, keep),
            None => disk.apply_zero(write, self.range, keep),
        }
    }
}

impl CrashPoint {
    /// A number that two crash points share only if the same worlds can come of them.
    #[must_use]
    pub fn identity(&self) -> u64 {
        let mut after = self.base.without_daemon();
        match self.crash {
            Crash::PowerCut => after.oracle.power_cut(),
            Crash::Kill => after.oracle.process_killed(),
        }
        let mut hash = ContentHash::new();
        hash.number(self.crash as u64);
        hash.number(after.identity());
        for OpenWrite { disk, landing, .. } in &self.open {
            let Some(Landing { range, data }) = landing else { continue };
            [*disk as u64, range.offset, range.len].into_iter().for_each(|number| hash.number(number));
            hash.number(u64::from(data.is_some()));
            hash.bytes(data.as_deref().unwrap_or_default());
        }
        hash.finish()
    }

    /// Number of open writes, on all disks together.
    #[must_use]
    pub fn open(&self) -> usize {
        self.open.len()
    }

    /// Number of joint outcomes; `u64::MAX` for more than that.
    #[must_use]
    pub fn outcomes(&self) -> u64 {
        self.open.iter().fold(1, |outcomes: u64, write| outcomes.saturating_mul(write.fates()))
    }

    /// All joint outcomes where there are at most `cap`; else `cap` of them (at least those that every sample has):
    /// all lost, all kept, each disk alone kept, and the rest drawn. True: these are all.
    #[must_use]
    pub fn choose(&self, cap: u64) -> (Vec<Outcome>, bool) {
        let outcomes = self.outcomes();
        let named = |pick| Outcome { crash: self.crash, pick };
        if outcomes <= cap.max(1) {
            return ((0..outcomes).map(|number| named(Pick::Number(number))).collect(), true);
        }
        let mut picks = vec![Pick::AllLost, Pick::AllKept];
        let with_open = (0..self.base.disks.len()).filter(|disk| self.open.iter().any(|o| o.disk == *disk));
        let with_open: Vec<usize> = with_open.collect();
        if with_open.len() > 1 {
            picks.extend(with_open.into_iter().map(Pick::OnlyDisk));
        }
        picks.extend((0..cap.saturating_sub(picks.len() as u64)).map(Pick::Sample));
        (picks.into_iter().map(named).collect(), false)
    }

    /// The world that is left with `pick`; `salt` shifts what samples draw.
    ///
    /// # Panics
    /// Where the pick's number is no outcome here.
    #[must_use]
    pub fn world(&self, pick: Pick, salt: u64) -> World {
        let mut rest = match pick {
            Pick::Number(number) => number,
            _ => 0,
        };
        let mut rng = Rng::new(match pick {
            Pick::Sample(seed) => salt ^ seed << 32,
            _ => 0,
        });
        let fates: Vec<Vec<bool>> = self
            .open
            .iter()
            .map(|write| match pick {
                Pick::Number(_) => {
                    let fate = rest % write.fates();
                    rest /= write.fates();
                    write.kept(fate)
                }
                Pick::AllLost => write.kept(0),
                Pick::AllKept => write.kept(write.fates() - 1),
                Pick::OnlyDisk(disk) => write.kept(if disk == write.disk { write.fates() - 1 } else { 0 }),
                Pick::Sample(_) if rng.per_mille(200) => write.sectors.iter().map(|_| rng.coin()).collect(),
                Pick::Sample(_) => write.kept(rng.below(write.fates())),
            })
            .collect();
        assert!(rest == 0, "there is no such joint outcome at this crash point");
        self.resolve(&fates)
    }

    fn resolve(&self, fates: &[Vec<bool>]) -> World {
        let mut world = self.base.without_daemon();
        let mut kept: Vec<Kept<'_>> = vec![BTreeMap::new(); world.disks.len()];
        for (write, fate) in self.open.iter().zip(fates) {
            kept[write.disk].insert(write.write, (&write.sectors, fate));
        }
        // Where it makes no difference, whatever came last stays.
        let stays = |kept: &Kept<'_>, write: WriteSeq, sector: u64| {
            let place = kept
                .get(&write)
                .and_then(|(sectors, fate)| sectors.binary_search(&sector).ok().map(|at| fate[at]));
            place.unwrap_or(true)
        };
        for (index, disk) in world.disks.iter_mut().enumerate() {
            match self.crash {
                Crash::PowerCut => {
                    (disk.unseen_error, disk.failed_alone) = (false, false);
                    disk.disk.power_cut_to(|write, sector| stays(&kept[index], write, sector));
                }
                Crash::Kill => {
                    for write in self.open.iter().filter(|write| write.disk == index) {
                        if let Some(landing) = &write.landing {
                            landing.land(&mut disk.disk, write.write, |sector| {
                                stays(&kept[index], write.write, sector)
                            });
                        }
                    }
                    disk.disk.process_killed();
                }
            }
        }
        match self.crash {
            Crash::PowerCut => world.oracle.power_cut(),
            Crash::Kill => world.oracle.process_killed(),
        }
        world
    }
}

#[cfg(test)]
mod tests {
    use super::super::row::Step;
    use super::super::scenarios::named;
    use super::super::script::{create, new_world, play};
    use super::*;
    use crate::sim::client::Asked;

    /// Two disks with a write of one sector and one of two sectors, answered and not flushed.
    fn world() -> World {
        let mut world = new_world(named("flush").unwrap(), 1, false);
        create(&mut world).unwrap();
        world.start(&[0, 1]).unwrap();
        let asks = [Step::Ask(Asked::Write, 4096, 512), Step::Ask(Asked::Write, 8192, 1024)];
        play(&mut world, &[Step::Sync, asks[0], asks[1], Step::Idle], |_| {}).unwrap();
        world
    }

    fn sectors(world: &World) -> Vec<bool> {
        let written = |disk: usize, at: u64| {
            let mut sector = [0; 512];
            world.disks[disk].disk.read(at, &mut sector);
            sector != [0; 512]
        };
        [0, 1].into_iter().flat_map(|disk| [4096, 8192, 8704].map(|at| written(disk, at))).collect()
    }

    #[test]
    fn a_power_cut_leaves_every_joint_outcome_once() {
        let point = world().crash_point(Crash::PowerCut);
        assert_eq!((point.open(), point.outcomes()), (4, 64));
        let (outcomes, all) = point.choose(64);
        assert!(all);
        let left = outcomes.iter().map(|outcome| sectors(&point.world(outcome.pick, 0)));
        let left: std::collections::BTreeSet<Vec<bool>> = left.collect();
        assert_eq!(left.len(), 64);
    }

    #[test]
    fn named_outcomes_are_what_they_say() {
        let point = world().crash_point(Crash::PowerCut);
        let left = |pick| sectors(&point.world(pick, 0));
        assert_eq!(left(Pick::AllLost), [false; 6]);
        assert_eq!(left(Pick::AllKept), [true; 6]);
        assert_eq!(left(Pick::OnlyDisk(1)), [false, false, false, true, true, true]);
        let (outcomes, all) = point.choose(10);
        assert!(!all && outcomes.len() == 10);
        for outcome in outcomes {
            assert_eq!(outcome.to_string().parse::<Outcome>().unwrap(), outcome);
        }
    }

    #[test]
    fn a_kill_leaves_what_has_taken_effect() {
        let world = world();
        let point = world.crash_point(Crash::Kill);
        assert_eq!(point.outcomes(), 1);
        let left = point.world(Pick::Number(0), 0);
        assert_eq!(sectors(&left), [true; 6]);
        assert_eq!(sectors(&world), [true; 6]);
    }

    #[test]
    fn equal_worlds_are_told_from_others() {
        let point = world().crash_point(Crash::PowerCut);
        let identity = |pick| point.world(pick, 0).identity();
        assert_eq!(identity(Pick::AllKept), identity(Pick::Number(63)));
        let all: std::collections::BTreeSet<u64> = (0..64).map(|n| identity(Pick::Number(n))).collect();
        assert_eq!(all.len(), 64);
    }
}
