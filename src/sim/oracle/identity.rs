//! What makes two oracles equal once nothing is in flight: the same answers are legal, now and after whatever comes.

use super::{Cell, NEVER, Oracle};
use crate::sim::disk::ContentHash;

impl Oracle {
    /// Grows with everything that the oracle is told.
    #[must_use]
    pub fn clock(&self) -> u64 {
        self.clock
    }

    /// Adds to `hash` what later answers depend on. Only meaningful when the daemon is dead: times then matter only
    /// as far as flushes are concerned.
    pub fn add_identity(&self, hash: &mut ContentHash) {
        let mut last = None;
        for (start, cell) in &self.cells {
            let state = self.state_of(cell);
            // Neighbours that agree are one cell.
            if last.as_ref() != Some(&state) {
                hash.number(*start);
                state.iter().for_each(|(value, flags)| {
                    hash.number(u64::from(*value));
                    hash.number(*flags);
                });
                last = Some(state);
            }
        }
    }

    fn state_of(&self, cell: &Cell) -> Vec<(u32, u64)> {
        let mut state: Vec<(u32, u64)> = cell
            .entries
            .iter()
            .filter(|entry| entry.dead.is_none() || entry.can_come_back(self.flushed, &self.lost))
            .map(|entry| {
                let covered = match entry.covered_from {
                    NEVER => 0,
                    from if entry.is_lost(&self.lost) => 1 + u64::from(from == 0),
                    from if from > self.flushed => 3,
                    _ => 4,
                };
                let flags = [entry.dead.is_some(), entry.durable, entry.buried, entry.value.zero];
                let flags = flags.into_iter().fold(0, |bits, flag| bits << 1 | u64::from(flag));
                (entry.value.id, covered << 4 | flags)
            })
            .collect();
        state.sort_unstable();
        state
    }
}
