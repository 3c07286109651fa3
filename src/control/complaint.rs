//! Complaints that clients can cause as often as they like: logged once in a while, with how many there were.

use std::cell::Cell;
use std::time::{Duration, Instant};

/// Shortest time between two lines of one kind.
const EVERY: Duration = Duration::from_secs(10);

/// One kind of complaint.
#[derive(Debug, Default)]
pub(super) struct Complaint {
    said: Cell<Option<Instant>>,
    unsaid: Cell<u64>,
}

impl Complaint {
    /// Logs `what` as a warning, or counts it where the last one was a moment ago.
    pub(super) fn say(&self, what: impl FnOnce() -> String) {
        if let Some(line) = self.line(Instant::now(), what) {
            tracing::warn!("{line}");
        }
    }

    fn line(&self, now: Instant, what: impl FnOnce() -> String) -> Option<String> {
        if self.said.get().is_some_and(|said| now.duration_since(said) < EVERY) {
            self.unsaid.set(self.unsaid.get() + 1);
            return None;
        }
        self.said.set(Some(now));
        Some(match self.unsaid.take() {
            0 => what(),
            count => format!("{} (and {count} more like this since the last such line)", what()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_one_line_and_its_number_the_next() {
        let complaint = Complaint::default();
        let began = Instant::now();
        assert_eq!(complaint.line(began, || "first".to_owned()).unwrap(), "first");
        for _ in 0..7 {
            assert_eq!(complaint.line(began + EVERY / 2, || unreachable!()), None);
        }
        let line = complaint.line(began + EVERY, || "ninth".to_owned()).unwrap();
        assert_eq!(line, "ninth (and 7 more like this since the last such line)");
        assert_eq!(complaint.line(began + 2 * EVERY, || "tenth".to_owned()).unwrap(), "tenth");
    }
}
