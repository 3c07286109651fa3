//! The table of faults: one row each, with the word that it is counted and printed by, how often a world has it, and how
//! it strikes.
//!
//! A new fault is one row here, and nothing elsewhere: its rate is drawn, it strikes, is counted and reported, and
//! `tests/simulation.rs` demands that it comes up. What it does is a closure in the row, or a function at the end of this
//! file. By its constructor it is
//!
//! - `operation`: an operation that fits fails, on the disk that faults are aimed at;
//! - `timed`: something happens at its time, again and again (to `World::target` only, if that may be hurt now);
//! - `while_down`: something happens to a disk before a start, at most one such thing a time.
//!
//! Two more constructors are for what other code carries out (another way for a disk to answer, say), which has to be
//! written there:
//!
//! - `drawn`: the rate is drawn here; that code asks for it ([`FaultRates::of`]) and counts it;
//! - `effect`: it follows from other faults; that code counts it.
//!
//! What must hold: a seed's world stays the same when a row is added. So the rows that were there first draw from the
//! world's generator in the order of the table ([`Rate::Shared`]: the order stays, none is added); a new one draws from
//! a generator of its own ([`Rate::Own`]), and a world that does not have it draws nothing for it.

use std::fmt::{Debug, Formatter};

use nix::errno::Errno;

use crate::sim::device::{Kind, Op};
use crate::sim::rng::{Rng, mix64};
use crate::sim::world::{Violation, Wake, World};
use crate::units::{MILLISECOND_NS, Nanos, SECOND_NS};

/// Whether a strike hit something; one that did is counted.
pub type Struck = Result<bool, Violation>;

/// How a seed decides how much of a fault its world has.
#[derive(Clone, Copy, Debug)]
pub enum Rate {
    /// None: it is not drawn.
    Never,
    /// The same in every world.
    Always(u64),
    /// In so many per mille of the worlds, one of these; drawn from the world's generator. For the rows that were there
    /// first.
    Shared(u64, &'static [u64]),
    /// The same, drawn from a generator of its own. For new rows.
    Own(u64, &'static [u64]),
    /// In half of the worlds; drawn from a generator of its own with this number in its seed.
    Coin(u64),
}

/// How a fault strikes, and what its rate means.
#[derive(Clone, Copy, Debug)]
pub enum How {
    /// Operations that fit fail with this error. The rate is per mille of them.
    Operation(Errno, fn(&Op) -> bool),
    /// At its time. The rate is the mean pause between two, nanoseconds of virtual time; 0: never.
    AtItsTime(fn(&mut World) -> Struck),
    /// To a disk, while the daemon is down. The rate is per mille of restarts.
    WhileDown(fn(&mut World, usize) -> Struck),
    /// In code that asks for it.
    Elsewhere,
}

/// A row of the table.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// Its name in reports.
    pub word: &'static str,
    /// How often.
    pub rate: Rate,
    /// In which way.
    pub how: How,
    /// Part of the reports.
    pub counted: bool,
    /// Strikes a volume of one replica within the fault model, too: nothing is lost by it.
    pub also_alone: bool,
}

impl Row {
    /// Whether chance is asked for it in worlds without it, too: as it was when there were only such rows.
    pub(super) fn always_asked(&self) -> bool {
        matches!(self.rate, Rate::Shared(..))
    }

    const fn also_alone(self) -> Self {
        Self { also_alone: true, ..self }
    }

    /// It is no fault itself, or what it does is counted by other words.
    const fn not_counted(self) -> Self {
        Self { counted: false, ..self }
    }
}

const fn row(word: &'static str, rate: Rate, how: How) -> Row {
    Row { word, rate, how, counted: true, also_alone: false }
}

const fn operation(word: &'static str, rate: Rate, errno: Errno, fits: fn(&Op) -> bool) -> Row {
    row(word, rate, How::Operation(errno, fits))
}

const fn timed(word: &'static str, pause: Rate, strike: fn(&mut World) -> Struck) -> Row {
    row(word, pause, How::AtItsTime(strike))
}

const fn while_down(word: &'static str, rate: Rate, strike: fn(&mut World, usize) -> Struck) -> Row {
    row(word, rate, How::WhileDown(strike))
}

const fn drawn(word: &'static str, rate: Rate) -> Row {
    row(word, rate, How::Elsewhere)
}

const fn effect(word: &'static str) -> Row {
    row(word, Rate::Never, How::Elsewhere)
}

/// The enumeration of the rows, and the rows.
macro_rules! faults {
    ($($(#[$of:meta])* $kind:ident: $row:expr,)+) => {
        /// A kind of misfortune, or of an operator's deed in the middle of everything.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum FaultKind { $($(#[$of])* $kind,)+ }

        impl FaultKind {
            /// All of them, in order.
            pub const ALL: &'static [Self] = &[$(Self::$kind,)+];
            /// How many there are.
            pub const COUNT: usize = Self::ALL.len();
        }

        static ROWS: [Row; FaultKind::COUNT] = [$($row,)+];
    };
}

const PAUSES: &[u64] = &[20 * MILLISECOND_NS, 200 * MILLISECOND_NS, SECOND_NS];
/// What only delays, or needs no crash to be seen, comes more rarely: the world is to get somewhere, too.
const LONG: &[u64] = &[200 * MILLISECOND_NS, SECOND_NS, 5 * SECOND_NS];

use Rate::{Always, Coin, Shared};

faults! {
    /// A read failed.
    ReadError: operation("read_error", Shared(300, &[2, 20, 200]), Errno::EIO, |op| {
        matches!(op.kind, Kind::Read(_) | Kind::Cache | Kind::Allocation(_))
    }),
    /// A write or zeroes failed with EIO, having been applied in part or not at all.
    WriteError: operation("write_error", Shared(300, &[2, 10, 100]), Errno::EIO, Op::writes),
    /// A flush failed.
    FlushError: operation("flush_error", Shared(300, &[10, 100, 500]), Errno::EIO, |op| {
        matches!(op.kind, Kind::Flush(_))
    }),
    /// A flush failed and the disk forgot what it was to flush; it succeeds when asked again.
    FlushLosesCache: drawn("flush_loses_cache", Shared(500, &[1])),
    /// And reads showed it at once, as soon as the daemon heard of it (else a power cut does).
    FlushTurnsBack: drawn("flush_turns_back", Coin(0x7475_726e_6261_636b)),
    /// An operation hung for seconds and then ended (per mille of operations).
    Hang: drawn("hang", Shared(150, &[2, 10])).also_alone(),
    /// Another disk becomes the one that faults are aimed at.
    Aim: timed("aim", Always(100 * MILLISECOND_NS), |world| {
        world.aim();
        Ok(false)
    })
    .not_counted()
    .also_alone(),
    /// The daemon was killed.
    Kill: timed("kill", Shared(600, PAUSES), |world| world.crash_and_restart(false).map(|()| true))
        .also_alone(),
    /// The power went.
    PowerCut: timed("power_cut", Shared(500, PAUSES), |world| world.crash_and_restart(true).map(|()| true))
        .also_alone(),
    /// A disk was gone for a while.
    Outage: timed("outage", Shared(400, PAUSES), World::outage),
    /// A disk, or all, had no room for a while.
    Full: timed("full", Shared(150, PAUSES), |world| Ok(world.fill_up())).also_alone(),
    /// All disks are full at the same time.
    FullEverywhere: drawn("full_everywhere", Shared(300, &[1])).not_counted(),
    /// A disk was many times slower for a while.
    Slow: timed("slow_disk", Shared(200, LONG), |world| {
        let (disk, until) = world.late("slow");
        world.disks[disk].slow_until = until;
        Ok(true)
    })
    .also_alone(),
    /// A disk answered nothing for a while, then everything.
    Stuck: timed("stuck_disk", Shared(150, LONG), |world| {
        let (disk, until) = world.late("stuck");
        world.disks[disk].stuck_until = until;
        Ok(true)
    })
    .also_alone(),
    /// A metadata sector rotted while the daemon ran.
    RotRunning: timed("rot_while_running", Shared(200, LONG), World::rot_while_running),
    /// An operator fails, removes, adds, stops.
    Admin: timed("admin", Shared(350, PAUSES), |world| world.admin_strikes().map(|()| false))
        .not_counted()
        .also_alone(),
    /// An operator asked for the status.
    AdminStatus: timed("admin_status", Shared(500, LONG), |world| world.status_is_true().map(|()| true))
        .also_alone(),
    /// An old copy was put back on a disk.
    OldCopy: while_down("old_copy", Shared(200, &[100, 400]), World::old_copy),
    /// A disk was replaced by a blank one.
    Blank: while_down("blank", Shared(200, &[100, 300]), |world, disk| {
        world.trace(|| format!("disk {disk}: replaced by a blank one"));
        world.replace_disk(disk);
        Ok(true)
    }),
    /// Another volume's replica stood at a disk's path.
    Foreign: while_down("foreign", Shared(200, &[100, 300]), |world, disk| {
        world.trace(|| format!("disk {disk}: another volume's replica stands there"));
        world.make_foreign(disk).map(|()| true)
    }),
    /// The volume was served read-only for a while (per mille of restarts).
    ReadOnly: drawn("read_only_run", Shared(250, &[100, 400])).also_alone(),
    /// A metadata sector rotted while the daemon was down.
    Rot: while_down("rot", Shared(300, &[100, 500]), |world, disk| {
        world.rot(disk);
        Ok(true)
    }),
    /// Both sides were run alone, then together (per mille of restarts).
    Split: drawn("split_brain", Shared(150, &[200, 500])),
    /// A disk was left out of one start (per mille of restarts).
    Forgotten: drawn("forgotten", Shared(300, &[100, 400])),

    /// A write that failed, or that a kill or a power cut ended, landed in part (at sectors).
    TornWrite: effect("torn_write"),
    /// A flush failed for what an earlier daemon had not lived to hear of.
    LateFlushError: effect("late_flush_error"),
    /// An operation failed because its disk was gone.
    NoDevice: effect("no_device_error"),
    /// A write failed because its disk was full.
    NoSpace: effect("no_space_error"),
    /// A kill or power cut while replicas were being brought up to date or regions synced.
    CrashInResync: effect("crash_in_resync"),
    /// A kill or power cut before the volume was open.
    CrashInOpening: effect("crash_in_opening"),
    /// A kill or power cut while metadata was being written.
    CrashInMetadata: effect("crash_in_metadata_write"),
    /// A kill or power cut during an orderly stop.
    CrashInStop: effect("crash_in_stop"),
    /// `create` was ended by a power cut or a kill.
    CreateCrash: effect("create_interrupted"),
    /// `create` met an I/O error.
    CreateError: effect("create_error"),
    /// An operator failed a replica.
    AdminFail: effect("admin_fail"),
    /// An operator added a replica.
    AdminAdd: effect("admin_add"),
    /// An operator removed a replica.
    AdminRemove: effect("admin_remove"),
    /// An operator stopped the daemon.
    AdminStop: effect("admin_stop"),
}

impl FaultKind {
    /// Its row.
    #[must_use]
    pub fn row(self) -> &'static Row {
        &ROWS[self as usize]
    }

    /// Its name in reports.
    #[must_use]
    pub fn word(self) -> &'static str {
        self.row().word
    }

    /// Those that are part of reports, in order.
    pub fn counted() -> impl Iterator<Item = Self> {
        Self::ALL.iter().copied().filter(|kind| kind.row().counted)
    }
}

/// How often each fault strikes in a world; what a number means says [`How`].
#[derive(Clone, Copy)]
pub struct FaultRates([u64; FaultKind::COUNT]);

impl FaultRates {
    /// No faults.
    pub const NONE: Self = Self([0; FaultKind::COUNT]);

    /// The rate of a fault; 0: there is none of it.
    #[must_use]
    pub fn of(&self, kind: FaultKind) -> u64 {
        self.0[kind as usize]
    }

    /// Whether the world has it.
    #[must_use]
    pub fn has(&self, kind: FaultKind) -> bool {
        self.of(kind) > 0
    }

    /// The same but for one rate.
    #[must_use]
    pub fn with(mut self, kind: FaultKind, rate: u64) -> Self {
        self.0[kind as usize] = rate;
        self
    }

    /// The rates of the world of `seed`, of which `rng` is the generator. `alone`: nothing may be lost, and there is one
    /// replica.
    #[must_use]
    pub fn draw(seed: u64, rng: &mut Rng, alone: bool) -> Self {
        let mut rates = Self::NONE;
        for kind in FaultKind::ALL {
            let row = kind.row();
            let rate = row.draw(seed, rng);
            // There is nothing to lose a disk to.
            rates = rates.with(*kind, if alone && !row.also_alone { 0 } else { rate });
        }
        if alone { rates.with(FaultKind::FullEverywhere, 1) } else { rates }
    }
}

impl Debug for FaultRates {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        let there = FaultKind::ALL.iter().filter(|kind| self.has(**kind));
        f.debug_map().entries(there.map(|kind| (kind.word(), self.of(*kind)))).finish()
    }
}

impl Row {
    fn draw(&self, seed: u64, rng: &mut Rng) -> u64 {
        let sometimes = |rng: &mut Rng, per_mille: u64, values: &[u64]| {
            if rng.per_mille(per_mille) { rng.pick(values) } else { 0 }
        };
        match self.rate {
            Rate::Never => 0,
            Rate::Always(rate) => rate,
            Rate::Shared(per_mille, values) => sometimes(rng, per_mille, values),
            Rate::Own(per_mille, values) => {
                let own = self.word.bytes().fold(seed, |hash, byte| mix64(hash ^ u64::from(byte)));
                sometimes(&mut Rng::new(own), per_mille, values)
            }
            Rate::Coin(number) => u64::from(Rng::new(seed ^ number).coin()),
        }
    }
}

impl World {
    fn outage(&mut self) -> Struck {
        let Some(disk) = self.target() else { return Ok(false) };
        self.trace(|| format!("disk {disk} is gone"));
        self.disks[disk].gone = true;
        let back = self.rng.between(MILLISECOND_NS, 3 * SECOND_NS);
        self.wake_in(back, Wake::Better(disk));
        Ok(true)
    }

    /// A disk that is late for a while, and until when. Being late is no failure: it may be any, and no other disk has to
    /// be well.
    fn late(&mut self, how: &str) -> (usize, Nanos) {
        let disk = self.rng.below(self.disks.len() as u64) as usize;
        let until = self.now.plus(self.rng.between(MILLISECOND_NS, SECOND_NS));
        self.trace(|| format!("disk {disk}: {how}"));
        (disk, until)
    }

    fn rot_while_running(&mut self) -> Struck {
        let Some(disk) = self.target() else { return Ok(false) };
        self.rot(disk);
        self.disks[disk].rotten = true;
        self.meta[disk].forget();
        Ok(true)
    }

    fn old_copy(&mut self, disk: usize) -> Struck {
        if self.disks[disk].copies.is_empty() {
            return Ok(false);
        }
        let which = self.rng.below(self.disks[disk].copies.len() as u64) as usize;
        self.trace(|| format!("disk {disk}: an old copy is put back"));
        let old = self.disks[disk].copies[which].1.clone();
        self.disks[disk].disk.put_back(old);
        self.disks[disk].foreign = false;
        self.suspect = Some(disk);
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_unique() {
        for (at, row) in ROWS.iter().enumerate() {
            assert!(ROWS[..at].iter().all(|other| other.word != row.word), "{}", row.word);
        }
    }

    #[test]
    fn a_row_with_a_generator_of_its_own_draws_nothing_from_the_worlds() {
        let own = drawn("new", Rate::Own(500, &[3, 4]));
        let mut rng = Rng::new(1);
        let rates: Vec<u64> = (0..100).map(|seed| own.draw(seed, &mut rng)).collect();
        assert_eq!(rng.next_u64(), Rng::new(1).next_u64());
        assert!([0, 3, 4].iter().all(|rate| rates.contains(rate)), "{rates:?}");
        let other = drawn("other", Rate::Own(500, &[3, 4]));
        assert_ne!(rates, (0..100).map(|seed| other.draw(seed, &mut rng)).collect::<Vec<u64>>());
    }

    #[test]
    fn a_volume_of_one_replica_within_the_model_has_only_what_loses_nothing() {
        for seed in 0..50 {
            let rates = FaultRates::draw(seed, &mut Rng::new(seed), true);
            assert!(rates.has(FaultKind::FullEverywhere));
            assert!(!rates.has(FaultKind::WriteError) && !rates.has(FaultKind::Outage));
        }
    }
}
