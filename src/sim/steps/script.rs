//! Plays a scenario's script in a world.

use super::fork::Outcome;
use super::row::{Degraded, REGION, REGIONS, Scenario, Step};
use crate::format::Found;
use crate::format::assemble::{AssembleError, AssembleOptions, assemble};
use crate::format::create::Created;
use crate::mirror::event::AdminCommand;
use crate::sim::client::Asked;
use crate::sim::plan::{FaultKind, FaultRates, Mix, Plan};
use crate::sim::world::{Checked, Violation, World, violated};
use crate::units::{ByteRange, MILLISECOND_NS, ReplicaSlot, SECOND_NS};

/// Longest that anything in a script may take.
const PATIENCE_NS: u64 = 100 * SECOND_NS;

/// Many more events than a script or a recovery needs.
const EVENTS_MAX: u64 = 20_000;

/// The plan of a scenario: small, and without chance where chance is not wanted.
fn plan(scenario: &Scenario, seed: u64) -> Plan {
    Plan {
        seed,
        volume_bytes: REGIONS * REGION,
        region_bytes: REGION,
        aligns: scenario.aligns.to_vec(),
        clients: 1,
        depth: 4,
        requests: 0,
        think_ns: MILLISECOND_NS,
        mix: Mix {
            weights: [10, 10, 1, 1, 1],
            fua: 100,
            unit: 512,
            len_max: 4096,
            hot_spots: 2,
            whole: 0,
            hostile: 0,
            status: 0,
            cache: 0,
            fast: 0,
        },
        latency_ns: 100_000,
        slow_factor: 1,
        write_mostly: 0,
        within_model: true,
        faults: FaultRates::NONE.with(FaultKind::FlushLosesCache, 1),
        intent_idle_ns: 50 * MILLISECOND_NS,
        resync_jobs_max: 2,
        resync_burst_ns: 16_000_000,
    }
}

/// The scenario's world with blank disks.
#[must_use]
pub fn new_world(scenario: &Scenario, seed: u64, verbose: bool) -> World {
    let mut world = World::new(plan(scenario, seed), verbose);
    world.events_max = EVENTS_MAX;
    for (index, align) in scenario.aligns.iter().enumerate() {
        add_disk(&mut world, *align, index % 2 == 0);
    }
    world
}

fn add_disk(world: &mut World, align: u32, cheap_zero: bool) {
    let bytes = crate::format::layout::Layout::device_bytes_min(world.regions());
    world.add_disk(bytes, align, 1);
    if let Some(disk) = world.disks.last_mut() {
        disk.traits.cheap_zero = cheap_zero;
    }
}

/// Puts a volume on the disks as `create` does: one after the other, each flushed at its end. The watcher looks after
/// each write and each flush.
///
/// # Errors
/// The watcher's.
pub fn create(world: &mut World) -> Checked {
    let created: Created = world.created()?;
    world.volume_uuid = created.superblocks[0].volume_uuid;
    world.be_watched()?;
    for index in 0..world.disks.len() {
        for (offset, bytes) in created.writes(index) {
            let disk = &mut world.disks[index].disk;
            let write = disk.begin_write();
            disk.apply(write, offset.0, &bytes, |_| true);
            disk.complete_write(write);
            world.be_watched()?;
        }
        let disk = &mut world.disks[index].disk;
        let mark = disk.flush_mark();
        disk.flush(&mark);
        world.be_watched()?;
    }
    Ok(())
}

/// All disks of a world.
#[must_use]
pub fn all(world: &World) -> Vec<usize> {
    (0..world.disks.len()).collect()
}

/// Plays `script`; `watch` is called at [`Step::Watch`].
///
/// # Errors
/// The violation.
pub fn play(world: &mut World, script: &[Step], mut watch: impl FnMut(&mut World)) -> Checked {
    for step in script {
        world.trace(|| format!("SCRIPT: {step:?}"));
        match step {
            Step::Watch => watch(world),
            other => one(world, *other)?,
        }
        world.be_watched()?;
    }
    Ok(())
}

fn one(world: &mut World, step: Step) -> Checked {
    match step {
        Step::Watch => Ok(()),
        Step::Ask(asked, offset, len) => world.send(0, asked, ByteRange::new(offset, len), false),
        Step::AskFua(asked, offset, len) => world.send(0, asked, ByteRange::new(offset, len), true),
        Step::Events(events) => {
            for _ in 0..events {
                world.step()?;
            }
            Ok(())
        }
        Step::Idle => until(world, "Idle", is_idle),
        Step::Sync => until(world, "Sync", is_synced),
        Step::Clean => until(world, "Clean", is_clean),
        Step::Gone(disk) => {
            world.disks[disk].gone = true;
            Ok(())
        }
        Step::Back(disk) => {
            world.disks[disk].gone = false;
            Ok(())
        }
        Step::FailNext(disk, kind) => {
            world.next_fails.push((disk, kind));
            Ok(())
        }
        Step::TurnsBack => {
            world.plan.faults = world.plan.faults.with(FaultKind::FlushTurnsBack, 1);
            Ok(())
        }
        Step::Slow(disk, factor) => {
            world.disks[disk].slow_factor = factor;
            Ok(())
        }
        Step::Wipe(disk) => {
            world.disks[disk].disk.put_back(Default::default());
            Ok(())
        }
        Step::Excused => {
            world.excused = true;
            Ok(())
        }
        Step::Blank => {
            add_disk(world, 512, false);
            Ok(())
        }
        Step::Fail(disk) => {
            let slot = slot_of(world, disk)?;
            world.admin(AdminCommand::Fail(slot), None)
        }
        Step::Remove(disk) => {
            let slot = slot_of(world, disk)?;
            world.admin(AdminCommand::Remove(slot), None)
        }
        Step::Add(disk) => world.admin_add(disk, false),
        Step::Stop => stop(world),
        Step::Crash(outcome) => crash(world, outcome),
        Step::Start(disks) => world.start(disks),
        Step::Refused(disks, degraded) => refused(world, disks, degraded),
    }
}

/// Promise 8: these disks alone are not trusted.
fn refused(world: &World, disks: &[usize], degraded: Degraded) -> Checked {
    let found: Vec<Found> = disks.iter().filter_map(|disk| world.find(*disk).ok().flatten()).collect();
    let options = AssembleOptions { degraded: degraded == Degraded::Yes, ..AssembleOptions::default() };
    match assemble(&found, options) {
        Ok(_) => violated("promise_8_no_silent_rollback", format!("disks {disks:?} alone are trusted")),
        Err(why) => {
            world.trace(|| format!("refused: {why}"));
            Ok(())
        }
    }
}

fn until(world: &mut World, what: &str, done: fn(&World) -> bool) -> Checked {
    if world.run_until(PATIENCE_NS, done)? {
        return Ok(());
    }
    violated("liveness", format!("the script's {what} does not come"))
}

/// Everything is answered, and replicas that were failed have nothing in flight (only then may they be added again).
fn is_idle(world: &World) -> bool {
    world.daemon.as_ref().is_some_and(|daemon| {
        let active = daemon.in_sync.union(daemon.resyncing);
        let lingers = daemon.ops.values().any(|op| !active.contains(op.slot));
        daemon.requests.is_empty() && daemon.admins.is_empty() && !lingers
    })
}

fn is_synced(world: &World) -> bool {
    world.daemon.as_ref().is_some_and(|daemon| {
        daemon.mirror.is_open()
            && daemon.in_sync == daemon.members
            && daemon.mirror.status(world.now).unsynced_bytes == 0
    }) && is_idle(world)
}

fn is_clean(world: &World) -> bool {
    world.daemon.as_ref().is_some_and(|daemon| daemon.mirror.status(world.now).dirty_bytes == 0)
}

fn slot_of(world: &World, disk: usize) -> Result<ReplicaSlot, Violation> {
    match ReplicaSlot::all().find(|slot| world.disk_of(*slot) == Some(disk)) {
        Some(slot) => Ok(slot),
        None => violated("scenario", format!("disk {disk} is no replica")),
    }
}

fn stop(world: &mut World) -> Checked {
    let abandoned = world.in_sync_disks().len() < world.disks.len();
    match world.stop()? {
        Some(clean) if clean || abandoned => {}
        _ => return violated("promise_4_clean_means_clean", "the script's stop was not clean"),
    }
    world.be_watched()?;
    crash(world, "kall")
}

/// The daemon ends; the world is the one that is left, still watched.
fn crash(world: &mut World, outcome: &str) -> Checked {
    let outcome: Outcome = outcome.parse().or_else(|why| violated("scenario", why))?;
    world.trace(|| format!("CRASH: {outcome}"));
    let mut left = world.crash_point(outcome.crash).world(outcome.pick, 0);
    left.watch = world.watch.take();
    left.counts = world.counts;
    left.next_fails = std::mem::take(&mut world.next_fails);
    *world = left;
    Ok(())
}

/// The daemon starts after a crash on all disks that are there, clients read what the script touched, and everything
/// heals. Where no daemon ever served the volume (`creating`) and the crash left none, it is created first.
///
/// # Errors
/// The promise that was broken.
pub fn recover(world: &mut World, scenario: &Scenario, creating: bool) -> Checked {
    world.excused = false;
    // An operator who starts without every disk that has the newest data asks for a split.
    if world.holders.iter().all(|disk| world.disks[*disk].gone) {
        world.disks.iter_mut().for_each(|disk| disk.gone = false);
    }
    let disks = all(world);
    if creating || world.never_started() {
        match world.assemble(&disks) {
            Ok((assembly, _)) if assembly.resync.is_empty() || !world.never_started() => {}
            Ok((assembly, _)) => {
                let resync = assembly.resync;
                return violated("create", format!("resync of {resync:?} after a crash"));
            }
            Err(AssembleError::Empty) if creating => create(world)?,
            Err(why) => return violated("create", format!("after a crash: {why}")),
        }
    }
    world.start(&disks)?;
    world.be_watched()?;
    for (offset, len) in scenario.touched() {
        world.send(0, Asked::Read, ByteRange::new(offset, len), false)?;
    }
    world.be_watched()?;
    crate::sim::run::heal(world)
}
