//! Which replica answers a read: a pure function of what has been seen.
//!
//! 1. Replicas that are not write-mostly, where there is one.
//! 2. Of those, the *fast* ones: smoothed latency (of this size class) at most three times the best.
//! 3. A sequential stream stays where it is while that replica is not much busier than the least busy.
//! 4. Otherwise the least `latency x (load + 1)`; load weighs requests and bytes, a write 5/4 of a read
//!    (as measured for md by P. Luse, 2024). Ties go to the one not chosen for longest.
//! 5. A replica that was not chosen for 50 reads times its latency ratio is probed with one, so that probing
//!    costs at most about 2 % of throughput whatever the ratio, and it can win again.
//!
//! What must hold: only candidates are chosen; the same history gives the same choice.

use super::read_streams::Streams;
use crate::units::{ByteRange, REPLICAS_MAX, ReplicaSet, ReplicaSlot};

const CLASSES: usize = 3;
/// Slower than the best by more than this: left out, but for probes.
const SLOW_RATIO: u64 = 3;
/// A probe every (ratio times this) reads.
const PROBE_READS_PER_RATIO: u64 = 50;
const PROBE_INTERVAL_MAX: u64 = 5000;
/// A stream leaves its replica when that has this much more load than the least loaded.
const STREAM_LOAD_MARGIN: u64 = 16;
/// Latency that a failed read counts as, at least.
const ERROR_LATENCY_NS: u64 = 100_000_000;
/// And at most, so that a replica which recovers is not avoided for ever.
const ERROR_LATENCY_MAX_NS: u64 = 100 * ERROR_LATENCY_NS;

/// Read sizes that are compared with each other: up to 16 KiB, up to 128 KiB, larger.
fn class_of(bytes: u64) -> usize {
    match bytes {
        0..=0x4000 => 0,
        0x4001..=0x2_0000 => 1,
        _ => 2,
    }
}

/// What a request adds to a replica's load, in quarters of a small read.
fn weight(bytes: u64) -> u64 {
    4 + bytes / (16 << 10)
}

/// What has been seen of one replica.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ReplicaStats {
    latency_ns: [u64; CLASSES],
    pub(super) write_latency_ns: u64,
    load_reads: u64,
    load_writes: u64,
    reads_in_flight: u64,
    pub(super) reads: u64,
    pub(super) read_bytes: u64,
    pub(super) writes: u64,
    chosen_at: u64,
    reads_since_probe: u64,
    probing: bool,
}

impl ReplicaStats {
    fn load(&self) -> u64 {
        (self.load_reads + self.load_writes * 5 / 4) / 4
    }

    /// Smoothed latency over the size classes that were seen, for people.
    pub(super) fn read_latency_ns(&self) -> u64 {
        self.latency_ns.into_iter().find(|ns| *ns > 0).unwrap_or(0)
    }
}

/// The read policy's memory.
#[derive(Debug)]
pub(super) struct ReadPolicy {
    stats: [ReplicaStats; REPLICAS_MAX],
    write_mostly: ReplicaSet,
    streams: Streams,
    clock: u64,
}

fn smooth(old: u64, sample: u64, shift: u32) -> u64 {
    let sample = sample.max(1);
    if old == 0 { sample } else { (old - (old >> shift) + (sample >> shift)).max(1) }
}

impl ReadPolicy {
    pub(super) fn new(write_mostly: ReplicaSet) -> Self {
        let stats = [ReplicaStats::default(); REPLICAS_MAX];
        Self { stats, write_mostly, streams: Streams::new(), clock: 0 }
    }

    pub(super) fn stats(&self, slot: ReplicaSlot) -> &ReplicaStats {
        &self.stats[slot.index()]
    }

    pub(super) fn is_write_mostly(&self, slot: ReplicaSlot) -> bool {
        self.write_mostly.contains(slot)
    }

    /// A replica was opened anew: what was seen of the one in this slot before says nothing.
    pub(super) fn forget(&mut self, slot: ReplicaSlot) {
        let old = self.stats[slot.index()];
        self.stats[slot.index()] = ReplicaStats {
            reads: old.reads,
            read_bytes: old.read_bytes,
            writes: old.writes,
            ..Default::default()
        };
    }

    /// Chooses among `candidates` (not empty) for a read of `range`.
    pub(super) fn choose(&mut self, candidates: ReplicaSet, range: ByteRange) -> ReplicaSlot {
        self.clock += 1;
        let preferred = candidates.difference(self.write_mostly);
        let candidates = if preferred.is_empty() { candidates } else { preferred };
        let class = class_of(range.len);
        // A read that continues a stream is no probe: it would take the stream with it.
        let place = self.streams.find(range.offset);
        let stream = place.map(|place| self.streams.slot(place));
        let probe = if stream.is_none() { self.probe(candidates, class) } else { None };
        let slot = probe.unwrap_or_else(|| self.best(candidates, class, stream));
        self.stats[slot.index()].chosen_at = self.clock;
        self.stats[slot.index()].reads_since_probe = 0;
        self.streams.remember(place, range.end(), slot, self.clock);
        slot
    }

    /// The candidate (there is one) that a read of `range` would most likely use, without counting as one.
    pub(super) fn prefer(&self, candidates: ReplicaSet, range: ByteRange) -> ReplicaSlot {
        let preferred = candidates.difference(self.write_mostly);
        let candidates = if preferred.is_empty() { candidates } else { preferred };
        let stream = self.streams.find(range.offset).map(|place| self.streams.slot(place));
        self.best(candidates, class_of(range.len), stream)
    }

    /// The same for a prefetch: a read that begins where `range` does will use it too, while it is not loaded.
    pub(super) fn choose_for_prefetch(&mut self, candidates: ReplicaSet, range: ByteRange) -> ReplicaSlot {
        let slot = self.prefer(candidates, range);
        self.clock += 1;
        self.streams.remember(self.streams.find(range.offset), range.offset, slot, self.clock);
        slot
    }

    fn least_latency(&self, candidates: ReplicaSet, class: usize) -> u64 {
        candidates.iter().map(|slot| self.stats[slot.index()].latency_ns[class]).min().unwrap_or(0)
    }

    /// A candidate that was not chosen for so long that what is known of it may be wrong.
    fn probe(&mut self, candidates: ReplicaSet, class: usize) -> Option<ReplicaSlot> {
        let least = self.least_latency(candidates, class).max(1);
        for slot in candidates.iter() {
            let stats = &mut self.stats[slot.index()];
            let ratio = (stats.latency_ns[class] / least).max(1);
            stats.reads_since_probe += 1;
            let interval = ratio.saturating_mul(PROBE_READS_PER_RATIO).min(PROBE_INTERVAL_MAX);
            if stats.reads_since_probe >= interval && stats.reads_in_flight == 0 {
                stats.probing = true;
                return Some(slot);
            }
        }
        None
    }

    /// The candidates that are fast enough, those that were never measured first.
    fn fast(&self, candidates: ReplicaSet, class: usize, least: u64) -> ReplicaSet {
        let (mut fast, mut measured) = (ReplicaSet::EMPTY, ReplicaSet::EMPTY);
        let slow_ns = least.saturating_mul(SLOW_RATIO);
        for slot in candidates.iter() {
            let stats = &self.stats[slot.index()];
            let ns = stats.latency_ns[class];
            if ns > 0 {
                measured.insert(slot);
            }
            // One that was never measured counts as the best, so that it gets measured; but one read at a time.
            if if least == 0 { ns == 0 && stats.reads_in_flight == 0 } else { ns <= slow_ns } {
                fast.insert(slot);
            }
        }
        [fast, measured].into_iter().find(|set| !set.is_empty()).unwrap_or(candidates)
    }

    // A plain loop: `min_by_key` over tuples copies them in pieces that the processor then waits for.
    fn best(&self, candidates: ReplicaSet, class: usize, stream: Option<ReplicaSlot>) -> ReplicaSlot {
        let least = self.least_latency(candidates, class);
        let fast = self.fast(candidates, class, least);
        let load = |slot: ReplicaSlot| self.stats[slot.index()].load();
        if let Some(slot) = stream.filter(|slot| fast.contains(*slot)) {
            let load_least = fast.iter().map(load).min().unwrap_or(0);
            if load(slot) <= load_least + STREAM_LOAD_MARGIN {
                return slot;
            }
        }
        // Latencies within a quarter of each other are taken as equal: the load decides.
        let equal_ns = least.saturating_add(least / 4);
        let (mut chosen, mut chosen_cost, mut chosen_at) = (None, u64::MAX, u64::MAX);
        for slot in fast.iter() {
            let stats = &self.stats[slot.index()];
            let ns = stats.latency_ns[class].max(1);
            let ns = if ns <= equal_ns { least.max(1) } else { ns };
            let cost = ns.saturating_mul(stats.load() + 1);
            if chosen.is_none() || cost < chosen_cost || (cost == chosen_cost && stats.chosen_at < chosen_at)
            {
                (chosen, chosen_cost, chosen_at) = (Some(slot), cost, stats.chosen_at);
            }
        }
        let Some(chosen) = chosen else { unreachable!("a read has a candidate") };
        chosen
    }

    pub(super) fn read_sent(&mut self, slot: ReplicaSlot, bytes: u64) {
        let stats = &mut self.stats[slot.index()];
        stats.load_reads += weight(bytes);
        stats.reads_in_flight += 1;
    }

    /// A read ended; a failed one counts as a very slow one, so that the replica is avoided for a while.
    pub(super) fn read_done(&mut self, slot: ReplicaSlot, bytes: u64, latency_ns: u64, failed: bool) {
        self.read_lost(slot, bytes);
        let stats = &mut self.stats[slot.index()];
        let shift = if std::mem::take(&mut stats.probing) { 1 } else { 3 };
        let class = &mut stats.latency_ns[class_of(bytes)];
        let sample = if failed {
            let worse = class.saturating_mul(4).min(ERROR_LATENCY_MAX_NS);
            latency_ns.max(ERROR_LATENCY_NS).max(worse)
        } else {
            latency_ns
        };
        *class = smooth(*class, sample, if failed { 1 } else { shift });
        if !failed {
            stats.reads += 1;
            stats.read_bytes += bytes;
        }
    }

    /// A read was given up.
    pub(super) fn read_lost(&mut self, slot: ReplicaSlot, bytes: u64) {
        let stats = &mut self.stats[slot.index()];
        assert!(stats.load_reads >= weight(bytes) && stats.reads_in_flight > 0);
        stats.load_reads -= weight(bytes);
        stats.reads_in_flight -= 1;
    }

    pub(super) fn write_sent(&mut self, slot: ReplicaSlot, bytes: u64) {
        self.stats[slot.index()].load_writes += weight(bytes);
    }

    pub(super) fn write_done(&mut self, slot: ReplicaSlot, bytes: u64, latency_ns: u64) {
        self.write_lost(slot, bytes);
        let stats = &mut self.stats[slot.index()];
        stats.write_latency_ns = smooth(stats.write_latency_ns, latency_ns, 3);
        stats.writes += 1;
    }

    /// A write was given up.
    pub(super) fn write_lost(&mut self, slot: ReplicaSlot, bytes: u64) {
        let stats = &mut self.stats[slot.index()];
        assert!(stats.load_writes >= weight(bytes));
        stats.load_writes -= weight(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn slots(indexes: &[usize]) -> ReplicaSet {
        indexes.iter().map(|index| ReplicaSlot::new(*index)).collect()
    }

    /// Closed loop: `depth` random reads in flight, each taking its replica's latency. Returns reads per replica.
    fn drive(policy: &mut ReadPolicy, latency_ns: &[u64], depth: usize, count: u64) -> Vec<u64> {
        let candidates = slots(&(0..latency_ns.len()).collect::<Vec<_>>());
        let mut in_flight = BTreeSet::new();
        let (mut now, mut done) = (0, vec![0; latency_ns.len()]);
        for index in 0..count {
            if in_flight.len() == depth {
                let Some((end, _, slot)) = in_flight.pop_first() else { panic!("depth is over 0") };
                now = end;
                policy.read_done(ReplicaSlot::new(slot), 4096, latency_ns[slot], false);
                done[slot] += 1;
            }
            let offset = index.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20 << 12;
            let slot = policy.choose(candidates, ByteRange::new(offset, 4096));
            policy.read_sent(slot, 4096);
            in_flight.insert((now + latency_ns[slot.index()], index, slot.index()));
        }
        for (_, _, slot) in in_flight {
            policy.read_done(ReplicaSlot::new(slot), 4096, latency_ns[slot], false);
        }
        done
    }

    #[test]
    fn equal_replicas_share_the_load() {
        for depth in [1, 2, 32] {
            let done = drive(&mut ReadPolicy::new(ReplicaSet::EMPTY), &[100_000, 100_000], depth, 20_000);
            let share = done[0] as f64 / (done[0] + done[1]) as f64;
            assert!((0.4..0.6).contains(&share), "depth {depth}: {done:?}");
        }
    }

    #[test]
    fn a_replica_ten_times_slower_is_avoided_but_probed() {
        for depth in [1, 4, 32] {
            let done = drive(&mut ReadPolicy::new(ReplicaSet::EMPTY), &[1_000_000, 100_000], depth, 50_000);
            let share = done[0] as f64 / (done[0] + done[1]) as f64;
            assert!(share < 0.02 && done[0] > 20, "depth {depth}: {done:?}");
        }
    }

    /// Like `drive`, in time: how long `count` reads take. A *serial* replica answers one read at a time, so that its
    /// latency grows with what is in flight; another one answers all at once.
    fn duration_ns(service_ns: &[u64], depth: usize, count: u64, serial: bool) -> u64 {
        let mut policy = ReadPolicy::new(ReplicaSet::EMPTY);
        let candidates = slots(&(0..service_ns.len()).collect::<Vec<_>>());
        let (mut in_flight, mut now, mut free_at) = (BTreeSet::new(), 0, vec![0; service_ns.len()]);
        for index in 0..count {
            if in_flight.len() == depth {
                let Some((end, _, slot, sent)) = in_flight.pop_first() else { panic!("depth is over 0") };
                now = end;
                policy.read_done(ReplicaSlot::new(slot), 4096, now - sent, false);
            }
            let offset = index.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20 << 12;
            let slot = policy.choose(candidates, ByteRange::new(offset, 4096));
            policy.read_sent(slot, 4096);
            let slot = slot.index();
            let begin = if serial { now.max(free_at[slot]) } else { now };
            free_at[slot] = begin + service_ns[slot];
            in_flight.insert((free_at[slot], index, slot, now));
        }
        now
    }

    #[test]
    fn a_replica_ten_times_slower_costs_less_than_five_percent_at_any_depth() {
        for serial in [false, true] {
            for depth in [1, 2, 4, 8, 16, 32, 64] {
                let alone = duration_ns(&[100_000], depth, 50_000, serial);
                for services in [[1_000_000, 100_000], [100_000, 1_000_000]] {
                    let both = duration_ns(&services, depth, 50_000, serial);
                    let ratio = alone as f64 / both as f64;
                    assert!(ratio > 0.95, "serial {serial}, depth {depth}: {ratio} of the fast one alone");
                }
            }
        }
    }

    #[test]
    fn a_slow_replica_that_recovers_wins_again() {
        let mut policy = ReadPolicy::new(ReplicaSet::EMPTY);
        drive(&mut policy, &[1_000_000, 100_000], 1, 20_000);
        let done = drive(&mut policy, &[50_000, 100_000], 1, 50_000);
        assert!(done[0] > done[1], "{done:?}");
    }

    #[test]
    fn write_mostly_is_read_only_when_nothing_else_can_answer() {
        let mut policy = ReadPolicy::new(slots(&[0]));
        for index in 0..100 {
            assert_eq!(policy.choose(slots(&[0, 1]), ByteRange::new(index << 20, 4096)).index(), 1);
        }
        assert_eq!(policy.choose(slots(&[0]), ByteRange::new(0, 4096)).index(), 0);
    }

    #[test]
    fn a_sequential_stream_stays_together() {
        let mut policy = ReadPolicy::new(ReplicaSet::EMPTY);
        for slot in [0, 1] {
            policy.read_sent(ReplicaSlot::new(slot), 65536);
            policy.read_done(ReplicaSlot::new(slot), 65536, 100_000, false);
        }
        let mut chosen = BTreeSet::new();
        for index in 0..100u64 {
            let slot = policy.choose(slots(&[0, 1]), ByteRange::new(index * 65536, 65536));
            policy.read_sent(slot, 65536);
            policy.read_done(slot, 65536, 100_000, false);
            chosen.insert(slot.index());
        }
        assert_eq!(chosen.len(), 1);
    }

    #[test]
    fn a_replica_that_fails_reads_is_avoided() {
        let mut policy = ReadPolicy::new(ReplicaSet::EMPTY);
        drive(&mut policy, &[100_000, 100_000], 1, 100);
        policy.read_sent(ReplicaSlot::new(0), 4096);
        policy.read_done(ReplicaSlot::new(0), 4096, 1000, true);
        for index in 0..50 {
            assert_eq!(policy.choose(slots(&[0, 1]), ByteRange::new(index << 20, 4096)).index(), 1);
        }
    }

    /// The choice as it is defined: the set of the fast, then the least (cost, chosen at), the first of equal ones.
    fn best_as_defined(
        policy: &ReadPolicy,
        candidates: ReplicaSet,
        class: usize,
        stream: Option<ReplicaSlot>,
    ) -> Option<ReplicaSlot> {
        let stats = |slot: ReplicaSlot| &policy.stats[slot.index()];
        let latency_ns = |slot: ReplicaSlot| stats(slot).latency_ns[class];
        let least = candidates.iter().map(latency_ns).min()?;
        let fast: ReplicaSet = candidates
            .iter()
            .filter(|slot| match least {
                0 => latency_ns(*slot) == 0 && stats(*slot).reads_in_flight == 0,
                _ => latency_ns(*slot) <= least.saturating_mul(SLOW_RATIO),
            })
            .collect();
        let measured: ReplicaSet = candidates.iter().filter(|slot| latency_ns(*slot) > 0).collect();
        let fast = match (fast.is_empty(), measured.is_empty()) {
            (false, _) => fast,
            (true, false) => measured,
            (true, true) => candidates,
        };
        let load_least = fast.iter().map(|slot| stats(slot).load()).min()?;
        let stays = |slot: &ReplicaSlot| {
            fast.contains(*slot) && stats(*slot).load() <= load_least + STREAM_LOAD_MARGIN
        };
        let cost = |slot: &ReplicaSlot| {
            let ns = latency_ns(*slot).max(1);
            let ns = if ns <= least.saturating_add(least / 4) { least.max(1) } else { ns };
            (ns.saturating_mul(stats(*slot).load() + 1), stats(*slot).chosen_at)
        };
        stream.filter(stays).or_else(|| fast.iter().min_by_key(cost))
    }

    fn any_stats() -> impl Strategy<Value = ReplicaStats> {
        let latency_ns = prop_oneof![Just(0), 1u64..8, 90u64..400, any::<u64>()];
        let load = prop_oneof![Just(0u64), 0u64..200];
        (latency_ns, load.clone(), load, 0u64..2, 0u64..4).prop_map(
            |(ns, load_reads, load_writes, reads_in_flight, chosen_at)| ReplicaStats {
                latency_ns: [ns; CLASSES],
                load_reads,
                load_writes,
                reads_in_flight,
                chosen_at,
                ..Default::default()
            },
        )
    }

    proptest! {
        #[test]
        fn the_choice_is_the_one_that_is_defined(
            stats in prop::collection::vec(any_stats(), REPLICAS_MAX),
            candidates in prop::collection::btree_set(0..REPLICAS_MAX, 1..=REPLICAS_MAX),
            stream in prop::option::of(0..REPLICAS_MAX),
        ) {
            let mut policy = ReadPolicy::new(ReplicaSet::EMPTY);
            policy.stats.copy_from_slice(&stats);
            let candidates: ReplicaSet = candidates.into_iter().map(ReplicaSlot::new).collect();
            let stream = stream.map(ReplicaSlot::new);
            let chosen = policy.best(candidates, 0, stream);
            prop_assert_eq!(Some(chosen), best_as_defined(&policy, candidates, 0, stream));
        }
    }
}
