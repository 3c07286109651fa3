//! Runs seeds: one world each, from create to an orderly stop, with the chaos in between.
//!
//! ```text
//!  create ─► start ─► chaos: clients, faults, crashes ─► calm: heal ─► idle: bits cleared ─► stop ─► start: clean
//! ```

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;

use crate::mirror::status::Health;
use crate::planted::{Bug, plant};
use crate::units::SECOND_NS;

use super::counts::{Counts, FaultKind};
use super::plan::Plan;
use super::world::{Checked, Violation, World, violated};

/// How a seed is run.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// The bug planted in the core.
    pub bug: Option<Bug>,
    /// Print everything that happens.
    pub verbose: bool,
    /// The core's own `check_invariants` runs beside the promises' checks.
    pub invariants: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { bug: None, verbose: false, invariants: true }
    }
}

/// Runs the world of `seed`.
///
/// # Errors
/// The promise that was broken, or the panic's message.
pub fn run_seed(seed: u64, options: Options) -> Result<Counts, String> {
    with_bug(options.bug, || {
        let mut world = World::new(Plan::draw(seed), options.verbose);
        world.invariants = options.invariants;
        world.counts.worlds = 1;
        if options.verbose {
            println!("{:#?}", world.plan);
        }
        let lived = live(&mut world);
        world.counts.virtual_ns = world.now.0;
        world.counts.beyond_repair = u64::from(world.beyond_repair);
        lived.map(|()| world.counts)
    })
}

/// Runs `part` with `bug` planted, guarded.
///
/// # Errors
/// The promise that was broken, or the panic's message.
pub(super) fn with_bug<T>(
    bug: Option<Bug>,
    part: impl FnOnce() -> Result<T, Violation>,
) -> Result<T, String> {
    plant(bug);
    let result = guarded(part);
    plant(None);
    result
}

/// Runs `part`; a panic in it is a broken promise too. May be nested.
///
/// # Errors
/// The promise that was broken, or the panic's message.
pub(super) fn guarded<T>(part: impl FnOnce() -> Result<T, Violation>) -> Result<T, String> {
    quiet_panics();
    match catch_unwind(AssertUnwindSafe(part)) {
        Ok(result) => result.map_err(|Violation(what)| what),
        Err(_) => Err(format!("promise_11_panic: {}", PANIC.take())),
    }
}

thread_local! {
    static PANIC: RefCell<String> = const { RefCell::new(String::new()) };
    static CATCHING: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// Panics in worlds are kept for the report and not printed.
fn quiet_panics() {
    static ONCE: Once = Once::new();
    CATCHING.set(true);
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if CATCHING.get() {
                PANIC.set(info.to_string());
            } else {
                before(info);
            }
        }));
    });
}

fn live(world: &mut World) -> Checked {
    world.create()?;
    let all: Vec<usize> = (0..world.disks.len()).collect();
    world.start(&all)?;
    world.arm_faults();
    let limit = 60 * SECOND_NS + world.plan.requests * 4 * world.plan.think_ns;
    world.run_until(limit, |world| {
        world.beyond_repair
            || world.requests_left == 0 && world.daemon.as_ref().is_some_and(|d| d.requests.is_empty())
    })?;
    finish(world)
}

/// The faults stop: everything heals and settles, an orderly stop leaves raw images, and it begins again.
///
/// # Errors
/// The promise that was broken.
pub(super) fn finish(world: &mut World) -> Checked {
    if stop_well(world)? { begin_again(world) } else { Ok(()) }
}

/// The faults stop: everything heals and settles, an orderly stop leaves raw images. False: more was lost before than
/// what could begin again.
///
/// # Errors
/// The promise that was broken.
pub(super) fn stop_well(world: &mut World) -> Result<bool, Violation> {
    world.chaos = false;
    world.requests_left = 0;
    heal(world)?;
    if world.beyond_repair {
        return Ok(false);
    }
    settle(world)?;
    if world.beyond_repair {
        return Ok(false);
    }
    let late_errors = |world: &World| world.counts.faults_of(FaultKind::LateFlushError);
    let heard_before = late_errors(world);
    let Some(clean) = world.stop()? else { return violated("liveness", "the daemon died of a stop") };
    if !clean {
        return violated("promise_4_clean_means_clean", "the last stop was not clean though all is well");
    }
    world.promise_10_the_data_is_yours()?;
    // A flush that was lost before, or failed when a kill kept the daemon from hearing of it, showed in the last one.
    let lost_before = !world.plan.within_model || late_errors(world) > heard_before;
    if lost_before && world.in_sync_disks().len() < world.disks.len() {
        return Ok(false);
    }
    Ok(true)
}

/// Liveness: when the faults stop, every request is answered and every disk becomes a replica in sync.
pub(super) fn heal(world: &mut World) -> Checked {
    for disk in &mut world.disks {
        (disk.gone, disk.full) = (false, false);
        (disk.slow_until, disk.stuck_until) = (world.now, world.now);
    }
    let limit = world.now.plus(40 * SECOND_NS + copy_bound_ns(world));
    let mut rounds = 0;
    while !is_well(world) {
        if world.beyond_repair {
            return Ok(());
        }
        if world.now > limit {
            return violated("liveness", describe(world));
        }
        rounds += 1;
        if rounds == 20 && !world.plan.within_model {
            restart_where_failed(world)?;
        }
        if world.daemon.is_none() {
            let all: Vec<usize> = (0..world.disks.len()).collect();
            world.start(&all)?;
            continue;
        }
        offer_spares(world)?;
        world.run_until(SECOND_NS, is_well)?;
        // `run_until` stops at the first event past its limit; with nothing to do time stands still.
        world.now = world.now.plus(SECOND_NS / 100);
    }
    Ok(())
}

/// Beyond the fault model a flush may have been lost everywhere, which only a restart cures. Nobody waits for an answer for
/// ever even so.
fn restart_where_failed(world: &mut World) -> Checked {
    let Some(daemon) = &world.daemon else { return Ok(()) };
    if !daemon.requests.is_empty() || !daemon.admins.is_empty() {
        return violated("liveness", format!("beyond the fault model: {}", describe(world)));
    }
    if daemon.mirror.status(world.now).health == Health::Failed {
        world.crash(false);
    }
    Ok(())
}

/// A bound for copying every region, one after the other, with the slowest disk among the replicas.
fn copy_bound_ns(world: &World) -> u64 {
    world.regions().count() * 100 * world.plan.latency_ns * world.plan.slow_factor
}

fn is_well(world: &World) -> bool {
    let Some(daemon) = &world.daemon else { return false };
    daemon.requests.is_empty()
        && daemon.admins.is_empty()
        && daemon.in_sync == daemon.members
        && world.in_sync_disks().len() == world.disks.len()
}

fn describe(world: &World) -> String {
    let Some(daemon) = &world.daemon else { return "the daemon is down".to_owned() };
    format!(
        "not well within the bound: in sync {:?}, resyncing {:?}, members {:?}, {} disks, {} requests, {} admin, {} ops",
        daemon.in_sync,
        daemon.resyncing,
        daemon.members,
        world.disks.len(),
        daemon.requests.len(),
        daemon.admins.len(),
        daemon.ops.len(),
    )
}

/// The operator takes back what lies about, and forgets members that are gone for good.
fn offer_spares(world: &mut World) -> Checked {
    use crate::mirror::event::AdminCommand;
    let Some(daemon) = &world.daemon else { return Ok(()) };
    let attached: Vec<usize> = daemon.attached.iter().flatten().copied().collect();
    let spare: Vec<usize> = (0..world.disks.len()).filter(|disk| !attached.contains(disk)).collect();
    let full = daemon.members.len() == crate::units::REPLICAS_MAX;
    if let Some(disk) = spare.first().filter(|_| !full) {
        return world.admin_add(*disk, true);
    }
    let gone = daemon.members.difference(daemon.in_sync.union(daemon.resyncing));
    let gone = gone.iter().find(|slot| daemon.attached[slot.index()].is_none());
    match gone {
        Some(slot) => world.admin(AdminCommand::Remove(slot), None),
        None => Ok(()),
    }
}

/// Liveness: without writes every intent bit is cleared.
fn settle(world: &mut World) -> Checked {
    // Every region may be unsynced: crashes in a row leave no time to sync any.
    let limit = 20 * world.plan.intent_idle_ns + 120 * SECOND_NS + copy_bound_ns(world);
    world.run_until(6 * SECOND_NS, |_| false)?; // what failed before is tried again
    let step = world.plan.intent_idle_ns / 2 + SECOND_NS / 10;
    let end = world.now.plus(limit);
    loop {
        if world.beyond_repair {
            return Ok(());
        }
        let Some(daemon) = &world.daemon else { return violated("liveness", "the daemon is gone") };
        if !is_well(world) {
            heal(world)?; // a lost flush may show only now
            continue;
        }
        let status = daemon.mirror.status(world.now);
        if status.health == Health::Failed && !world.plan.within_model {
            world.crash(false); // a lost flush is cured by a restart only
            let all: Vec<usize> = (0..world.disks.len()).collect();
            world.start(&all)?;
            continue;
        }
        if status.dirty_bytes == 0 && status.unsynced_bytes == 0 {
            return Ok(());
        }
        if world.now > end {
            let (dirty, unsynced) = (status.dirty_bytes, status.unsynced_bytes);
            return violated("liveness", format!("{dirty} bytes stay dirty, {unsynced} unsynced"));
        }
        world.run_until(step, |_| false)?;
        world.now = world.now.plus(SECOND_NS / 100);
    }
}

/// After an orderly stop: everything is trusted, nothing is to be resynced, reads are right.
pub(super) fn begin_again(world: &mut World) -> Checked {
    world.crash(false);
    let all: Vec<usize> = (0..world.disks.len()).collect();
    match world.assemble(&all) {
        Err(error) => {
            return violated("promise_4_clean_means_clean", format!("refused after a stop: {error}"));
        }
        Ok((assembly, _)) => {
            let damaged =
                |disk: &usize| world.find(*disk).ok().flatten().is_some_and(|f| f.damaged_sectors > 0);
            let sound = assembly.in_sync.len() == world.disks.len()
                && assembly.unsynced.not_any()
                && assembly.head.clean
                && (assembly.maps.intent.not_any() || all.iter().any(damaged));
            if !sound {
                return violated(
                    "promise_4_clean_means_clean",
                    format!("not clean after a stop: {assembly:?}"),
                );
            }
        }
    }
    world.requests_left = 10;
    world.start(&all)?;
    let done = world.run_until(300 * SECOND_NS, |world| {
        world.requests_left == 0 && world.daemon.as_ref().is_some_and(|daemon| daemon.requests.is_empty())
    })?;
    if !done {
        return violated("liveness", "requests after the last start are not answered");
    }
    Ok(())
}
