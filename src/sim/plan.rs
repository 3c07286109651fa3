//! What one seed's world is like: everything that chance decides beforehand (swarm testing: each seed
//! switches kinds of operations and faults on and off, so that rare mixes come up).

use crate::units::{BLOCK_BYTES, MILLISECOND_NS, REGION_BYTES_MIN, SECOND_NS};

use super::rng::Rng;

/// How likely each fault is. Device faults are per mille of operations on the disk that faults are aimed at;
/// the rest are mean pauses between two of a kind, nanoseconds of virtual time, 0: never.
#[derive(Clone, Debug, Default)]
pub struct FaultRates {
    /// Reads that fail with EIO, per mille.
    pub read_error: u64,
    /// Writes that fail with EIO having been applied in part or not at all, per mille.
    pub write_error: u64,
    /// Flushes that fail, per mille.
    pub flush_error: u64,
    /// A failed flush also loses what it was to flush.
    pub flush_loses: bool,
    /// And reads show that as soon as the daemon hears of it (else a power cut does).
    pub flush_turns_back: bool,
    /// Operations that hang for seconds and then end, per mille.
    pub hang: u64,
    /// The daemon is killed.
    pub kill_pause_ns: u64,
    /// The power goes.
    pub cut_pause_ns: u64,
    /// A disk is gone for a while.
    pub outage_pause_ns: u64,
    /// A disk's filesystem is full for a while.
    pub full_pause_ns: u64,
    /// All disks are full at the same time.
    pub full_everywhere: bool,
    /// A disk is many times slower for a while.
    pub slow_pause_ns: u64,
    /// A disk answers nothing for a while.
    pub stuck_pause_ns: u64,
    /// A metadata sector rots while the daemon runs.
    pub rot_pause_ns: u64,
    /// An operator fails, removes, adds, stops.
    pub admin_pause_ns: u64,
    /// An operator asks for the status.
    pub status_pause_ns: u64,
    /// While down: a disk's content is replaced by an older copy, per mille of restarts.
    pub old_copy: u64,
    /// While down: a disk is replaced by a blank one, per mille of restarts.
    pub blank: u64,
    /// While down: another volume's replica stands at a disk's path, per mille of restarts.
    pub foreign: u64,
    /// While down: the volume is served read-only first, per mille of restarts.
    pub read_only: u64,
    /// While down: a metadata sector rots, per mille of restarts.
    pub rot: u64,
    /// While down: both sides are run alone, then together, per mille of restarts.
    pub split_brain: u64,
    /// While down: a disk is forgotten for one start, per mille of restarts.
    pub forgotten: u64,
}

/// Shares of the operations that clients send, as weights.
#[derive(Clone, Debug)]
pub struct Mix {
    /// Weights of read, write, zeroes, trim, flush, in this order.
    pub weights: [u64; 5],
    /// FUA, per mille of writes.
    pub fua: u64,
    /// Offsets and lengths are multiples of this.
    pub unit: u64,
    /// Longest operation, bytes.
    pub len_max: u64,
    /// Operations go to this many hot spots (0: anywhere).
    pub hot_spots: u64,
    /// Whole-volume zeroes and trims, per mille of those.
    pub whole: u64,
    /// Wrong or hostile requests, per mille.
    pub hostile: u64,
    /// Questions for the status, per mille.
    pub status: u64,
    /// Prefetches, per mille.
    pub cache: u64,
    /// Zeroes that are to be fast or not at all, per mille of zeroes.
    pub fast: u64,
}

/// One seed's world.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Which seed this is.
    pub seed: u64,
    /// Size of the volume, bytes.
    pub volume_bytes: u64,
    /// Size of a region, bytes.
    pub region_bytes: u64,
    /// For each replica the alignment of its operations.
    pub aligns: Vec<u32>,
    /// Number of clients, each with several requests in flight.
    pub clients: usize,
    /// Requests that a client keeps in flight at the most.
    pub depth: usize,
    /// Requests of the chaos phase.
    pub requests: u64,
    /// Mean pause between two requests of a client, nanoseconds.
    pub think_ns: u64,
    /// What they ask for.
    pub mix: Mix,
    /// Mean latency of a disk operation, nanoseconds.
    pub latency_ns: u64,
    /// One disk is this many times slower.
    pub slow_factor: u64,
    /// Faults hit one disk at a time, and only while another is in sync: nothing may be lost and no request
    /// may fail. Otherwise faults hit any disk: errors are legal, wrong data never.
    pub within_model: bool,
    /// The faults.
    pub faults: FaultRates,
    /// Replicas that are write-mostly, per mille of slots at each start.
    pub write_mostly: u64,
    /// The core's setting.
    pub intent_idle_ns: u64,
    /// The core's setting.
    pub resync_jobs_max: usize,
    /// The core's setting.
    pub resync_burst_ns: u64,
}

impl Plan {
    /// The world of `seed`.
    #[must_use]
    pub fn draw(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let replicas = rng.pick(&[1, 2, 2, 2, 2, 2, 3, 3, 4]);
        let large = rng.per_mille(30);
        let region_bytes = REGION_BYTES_MIN << rng.pick(&[0, 0, 0, 1, 2]);
        let regions = if large { rng.between(3500, 7500) } else { rng.pick(&[1, 2, 4, 7, 16, 40]) };
        let region_bytes = if large { REGION_BYTES_MIN } else { region_bytes };
        let cut = rng.below(region_bytes / BLOCK_BYTES) * BLOCK_BYTES;
        let volume_bytes = (regions * region_bytes - cut).max(BLOCK_BYTES);
        let within_model = rng.per_mille(650);
        // Drawn apart: the other draws stay what they were before there was this one.
        let flush_turns_back = Rng::new(seed ^ 0x7475_726e_6261_636b).coin();
        Self {
            seed,
            volume_bytes,
            region_bytes,
            aligns: (0..replicas).map(|_| rng.pick(&[1, 512, 512, 4096])).collect(),
            clients: rng.between(1, 4) as usize,
            depth: rng.pick(&[1, 2, 4, 8]),
            requests: rng.between(50, 400),
            think_ns: rng.pick(&[10_000, 1_000_000, 20_000_000, 200_000_000]),
            mix: Mix::draw(&mut rng, volume_bytes, large),
            latency_ns: rng.pick(&[20_000, 100_000, 2_000_000]),
            slow_factor: rng.pick(&[1, 1, 10]),
            within_model,
            faults: FaultRates { flush_turns_back, ..FaultRates::draw(&mut rng, replicas, within_model) },
            write_mostly: rng.pick(&[0, 0, 300, 1000]),
            intent_idle_ns: rng.pick(&[5, 50, 500, 5000]) * MILLISECOND_NS,
            resync_jobs_max: rng.between(1, 6) as usize,
            resync_burst_ns: rng.pick(&[16 * MILLISECOND_NS, 16 * MILLISECOND_NS, MILLISECOND_NS, 20_000]),
        }
    }
}

impl Mix {
    fn draw(rng: &mut Rng, volume_bytes: u64, large: bool) -> Self {
        let weights = [
            rng.between(1, 40),
            rng.between(5, 40),
            rng.pick(&[0, 2, 10]),
            rng.pick(&[0, 2, 10]),
            rng.pick(&[0, 2, 5, 20]),
        ];
        Self {
            weights,
            fua: rng.pick(&[0, 0, 100, 500]),
            unit: rng.pick(&[1, 1, 512, 4096]),
            len_max: rng.pick(&[512, 4096, 16384, 131_072]).min(volume_bytes),
            hot_spots: rng.pick(&[0, 1, 3, 10]),
            whole: if large { 0 } else { rng.pick(&[0, 0, 100]) },
            hostile: rng.pick(&[0, 5, 50]),
            status: rng.pick(&[0, 30, 100]),
            cache: rng.pick(&[0, 10, 40]),
            fast: rng.pick(&[0, 100, 500]),
        }
    }
}

impl FaultRates {
    fn draw(rng: &mut Rng, replicas: usize, within_model: bool) -> Self {
        let mut sometimes = |per_mille: u64, values: &[u64]| {
            if rng.per_mille(per_mille) { values[rng.below(values.len() as u64) as usize] } else { 0 }
        };
        let pauses = &[20 * MILLISECOND_NS, 200 * MILLISECOND_NS, SECOND_NS];
        // What only delays, or needs no crash to be seen, comes more rarely: the world is to get somewhere, too.
        let long = &[200 * MILLISECOND_NS, SECOND_NS, 5 * SECOND_NS];
        let mut rates = Self {
            read_error: sometimes(300, &[2, 20, 200]),
            write_error: sometimes(300, &[2, 10, 100]),
            flush_error: sometimes(300, &[10, 100, 500]),
            flush_loses: sometimes(500, &[1]) == 1,
            flush_turns_back: false,
            hang: sometimes(150, &[2, 10]),
            kill_pause_ns: sometimes(600, pauses),
            cut_pause_ns: sometimes(500, pauses),
            outage_pause_ns: sometimes(400, pauses),
            full_pause_ns: sometimes(150, pauses),
            full_everywhere: sometimes(300, &[1]) == 1,
            slow_pause_ns: sometimes(200, long),
            stuck_pause_ns: sometimes(150, long),
            rot_pause_ns: sometimes(200, long),
            admin_pause_ns: sometimes(350, pauses),
            status_pause_ns: sometimes(500, long),
            old_copy: sometimes(200, &[100, 400]),
            blank: sometimes(200, &[100, 300]),
            foreign: sometimes(200, &[100, 300]),
            read_only: sometimes(250, &[100, 400]),
            rot: sometimes(300, &[100, 500]),
            split_brain: sometimes(150, &[200, 500]),
            forgotten: sometimes(300, &[100, 400]),
        };
        if replicas == 1 && within_model {
            // Nothing may be lost, and there is nothing to lose a disk to.
            rates = Self {
                kill_pause_ns: rates.kill_pause_ns,
                cut_pause_ns: rates.cut_pause_ns,
                hang: rates.hang,
                slow_pause_ns: rates.slow_pause_ns,
                stuck_pause_ns: rates.stuck_pause_ns,
                status_pause_ns: rates.status_pause_ns,
                read_only: rates.read_only,
                admin_pause_ns: rates.admin_pause_ns,
                full_pause_ns: rates.full_pause_ns,
                full_everywhere: true,
                ..Self::default()
            };
        }
        rates
    }
}
