//! What one seed's world is like: everything that chance decides beforehand (swarm testing: each seed
//! switches kinds of operations and faults on and off, so that rare mixes come up).

use crate::units::{BLOCK_BYTES, MILLISECOND_NS, REGION_BYTES_MIN};

use super::rng::Rng;

pub use super::faults::table::{FaultKind, FaultRates};

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
            faults: FaultRates::draw(seed, &mut rng, replicas == 1 && within_model),
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
