//! What a run did, counted by kind: for reports, and for the test that every kind really comes up.
//!
//! The kinds of faults are the rows of `faults/table.rs`. A new kind of request is a line in the table here and a call of
//! [`Counts::request`] where it happens.

use std::fmt::Display;

pub use super::faults::table::FaultKind;

/// An enumeration whose variants are counted: with their number, all of them in order, and a word for each.
macro_rules! counted {
    ($(#[$meta:meta])* $name:ident { $($(#[$of:meta])* $variant:ident => $word:literal,)+ }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum $name { $($(#[$of])* $variant,)+ }

        impl $name {
            /// All of them, in order.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];
            /// How many there are.
            pub const COUNT: usize = Self::ALL.len();

            /// Its name in reports.
            #[must_use]
            pub fn word(self) -> &'static str {
                match self { $(Self::$variant => $word,)+ }
            }
        }
    };
}

counted! {
    /// A kind of client request; one request may be of several.
    RequestKind {
        /// A read.
        Read => "read",
        /// A write.
        Write => "write",
        /// Zeroes.
        Zeroes => "zeroes",
        /// A trim.
        Trim => "trim",
        /// A flush.
        Flush => "flush",
        /// Durable before the answer.
        Fua => "fua",
        /// Not at multiples of 4096 bytes.
        Unaligned => "unaligned",
        /// Overlapping a request in flight, one of the two a write.
        Overlapping => "overlapping",
        /// In more than one region.
        ManyRegions => "many_regions",
        /// The whole volume.
        Whole => "whole_volume",
        /// Of no bytes.
        Empty => "empty",
        /// A write to a volume served read-only.
        WriteReadOnly => "write_to_read_only",
        /// Zeroes, fast or not at all.
        FastZeroes => "fast_zeroes",
        /// The same, refused.
        FastRefused => "fast_zeroes_refused",
        /// A question for the status.
        Status => "block_status",
        /// The same, of one extent.
        StatusOne => "block_status_one",
        /// It was answered with a hole.
        HoleShown => "hole_shown",
        /// A prefetch.
        Cache => "cache",
        /// Out of range, or otherwise wrong.
        Hostile => "hostile",
    }
}

counted! {
    /// A kind of device operation.
    DeviceKind {
        /// A read.
        Read => "read",
        /// A write that may stay in the cache.
        Write => "write",
        /// A write that is durable when answered.
        DurableWrite => "durable_write",
        /// Zeroes.
        Zero => "zero",
        /// A flush.
        Flush => "flush",
        /// A search for a hole.
        Probe => "probe_hole",
        /// A prefetch.
        Cache => "cache",
        /// A question for holes.
        Allocation => "allocation",
    }
}

/// What a run did, for reports.
#[derive(Clone, Copy, Debug)]
pub struct Counts {
    /// Worlds.
    pub worlds: u64,
    /// Events given to the core.
    pub events: u64,
    /// Requests answered.
    pub replies: u64,
    /// Requests answered with an error.
    pub errors: u64,
    /// Starts of the daemon.
    pub starts: u64,
    /// Virtual time, nanoseconds.
    pub virtual_ns: u64,
    /// Worlds in which more was lost than a mirror can bear.
    pub beyond_repair: u64,
    /// What a crash at that moment would leave was judged so often.
    pub crash_images: u64,
    /// A status was compared with the world so often.
    pub statuses: u64,
    faults: [u64; FaultKind::COUNT],
    requests: [u64; RequestKind::COUNT],
    device: [u64; DeviceKind::COUNT],
}

impl Default for Counts {
    fn default() -> Self {
        Self {
            worlds: 0,
            events: 0,
            replies: 0,
            errors: 0,
            starts: 0,
            virtual_ns: 0,
            beyond_repair: 0,
            crash_images: 0,
            statuses: 0,
            faults: [0; FaultKind::COUNT],
            requests: [0; RequestKind::COUNT],
            device: [0; DeviceKind::COUNT],
        }
    }
}

impl Counts {
    /// A fault struck.
    pub fn fault(&mut self, kind: FaultKind) {
        self.faults[kind as usize] += 1;
    }

    /// A client sent a request.
    pub fn request(&mut self, kind: RequestKind) {
        self.requests[kind as usize] += 1;
    }

    /// The core sent a device operation.
    pub fn device_op(&mut self, kind: DeviceKind) {
        self.device[kind as usize] += 1;
    }

    /// How often a fault struck.
    #[must_use]
    pub fn faults_of(&self, kind: FaultKind) -> u64 {
        self.faults[kind as usize]
    }

    /// How often such a request was sent.
    #[must_use]
    pub fn requests_of(&self, kind: RequestKind) -> u64 {
        self.requests[kind as usize]
    }

    /// Adds another run's.
    pub fn add(&mut self, other: &Self) {
        let sums = self.plain().into_iter().zip(other.plain()).map(|((_, a), (_, b))| a + b);
        let sums: Vec<u64> = sums.collect();
        for ((field, _), sum) in self.plain_mut().into_iter().zip(sums) {
            *field = sum;
        }
        let tables: [(&mut [u64], &[u64]); 3] = [
            (&mut self.faults, &other.faults),
            (&mut self.requests, &other.requests),
            (&mut self.device, &other.device),
        ];
        for (mine, theirs) in tables {
            mine.iter_mut().zip(theirs).for_each(|(mine, theirs)| *mine += theirs);
        }
    }

    fn plain_mut(&mut self) -> [(&mut u64, &'static str); 9] {
        [
            (&mut self.worlds, "worlds"),
            (&mut self.events, "events"),
            (&mut self.replies, "replies"),
            (&mut self.errors, "error_replies"),
            (&mut self.starts, "starts"),
            (&mut self.virtual_ns, "simulated_ns"),
            (&mut self.beyond_repair, "beyond_repair"),
            (&mut self.crash_images, "crash_images_judged"),
            (&mut self.statuses, "statuses_judged"),
        ]
    }

    fn plain(&self) -> Vec<(&'static str, u64)> {
        let mut copy = *self;
        copy.plain_mut().into_iter().map(|(value, name)| (name, *value)).collect()
    }

    fn tables(&self) -> [(&'static str, Vec<(&'static str, u64)>); 3] {
        let faults = FaultKind::counted().map(|kind| (kind.word(), self.faults_of(kind))).collect();
        let requests = RequestKind::ALL.iter().map(|kind| kind.word()).zip(self.requests).collect();
        let device = DeviceKind::ALL.iter().map(|kind| kind.word()).zip(self.device).collect();
        [("faults", faults), ("requests", requests), ("device_operations", device)]
    }

    /// Everything as one JSON object: plain numbers, and an object for each table of kinds. All may be summed up.
    #[must_use]
    pub fn to_json(&self) -> serde_json::Map<String, serde_json::Value> {
        let mut out = serde_json::Map::new();
        for (name, value) in self.plain() {
            out.insert(name.to_owned(), value.into());
        }
        for (name, table) in self.tables() {
            let table: serde_json::Map<_, _> =
                table.into_iter().map(|(word, count)| (word.to_owned(), count.into())).collect();
            out.insert(name.to_owned(), table.into());
        }
        out
    }
}

impl Display for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(
            f,
            "{} worlds, {:.2} simulated hours, {} starts, {} events, {} replies ({} errors), {} crash images and {} \
             statuses judged, {} worlds beyond repair",
            self.worlds,
            self.virtual_ns as f64 / 3.6e12,
            self.starts,
            self.events,
            self.replies,
            self.errors,
            self.crash_images,
            self.statuses,
            self.beyond_repair
        )?;
        for (name, table) in self.tables() {
            let sum: u64 = table.iter().map(|(_, count)| count).sum();
            let words: Vec<String> = table.iter().map(|(word, count)| format!("{word} {count}")).collect();
            writeln!(f, "{name}: {sum}: {}", words.join(", "))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_add_up_in_every_field() {
        let mut one = Counts { worlds: 1, virtual_ns: 5, ..Counts::default() };
        one.fault(FaultKind::Rot);
        one.request(RequestKind::Fua);
        one.device_op(DeviceKind::Probe);
        let mut sum = one;
        sum.add(&one);
        let json = sum.to_json();
        assert_eq!((&json["worlds"], &json["simulated_ns"]), (&2.into(), &10.into()));
        assert_eq!(json["faults"]["rot"], 2);
        assert_eq!(json["requests"]["fua"], 2);
        assert_eq!(json["device_operations"]["probe_hole"], 2);
    }
}
