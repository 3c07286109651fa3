//! Planted bugs: switches that break one promise each, so that the simulator can be seen to notice.
//!
//! What must hold: outside tests and the `sim` feature [`planted`] is a constant `false`, so that no switch
//! is left in a normal build. In simulations the switch belongs to the thread: worlds in other threads are
//! not touched.
//!
//! Use, where the core does the right thing: `if planted(Bug::AckBeforeIntent) || intent_is_durable { .. }`.

/// A bug that can be planted. The doc of each says what the core (or assembly) then does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Bug {
    /// Data goes to the replicas without waiting for the intent bit (promise 1).
    AckBeforeIntent,
    /// The intent bit is written to one in-sync replica only (promise 1).
    IntentOnOneReplica,
    /// A write is answered before the membership change that it caused is recorded (promise 2).
    AckBeforeMembership,
    /// A write that a replica missed leaves no stale bit (promise 2).
    DropStaleBit,
    /// Overlapping writes go out without waiting for each other (promise 3).
    OverlapRace,
    /// Intent bits are cleared without a flush before (promise 4).
    ClearBeforeFlush,
    /// Intent bits are cleared though the flush before failed (promise 4).
    ClearAfterFailedFlush,
    /// An intent bit is cleared while a write in its region is in flight (promise 4).
    ClearWithWriteInFlight,
    /// Reads of an unsynced region do not wait for its sync (promise 5).
    ReadStaleSide,
    /// A resynced region is read from the replica that missed its writes (promise 5).
    ReadStaleReplica,
    /// The last in-sync replica is failed on an error (promise 6).
    FailTheLast,
    /// Resync copies from the stale replica to the one in sync (promise 7).
    ResyncWrongDirection,
    /// A replica that begins a resync does not get every bitmap page (promise 7).
    SkipPageOnResyncStart,
    /// A resync's copy is not flushed before its stale bit is cleared (promise 7).
    ResyncWithoutFlush,
    /// Assembly takes replicas with equal event counts for equal and ignores intent bits (promise 8).
    EqualCountersEqualData,
    /// Assembly does not look at generations: diverged replicas are taken (promise 8).
    DivergenceIgnored,
    /// A flush goes to one replica only (promise 9).
    FlushOneReplicaOnly,
    /// FUA is answered like a plain write (promise 9).
    FuaIgnored,
    /// A write of zeroes is not sent to the second replica (promise 3).
    ZeroOneReplica,
    /// After a flush that failed everywhere the next one is answered with success (promise 9).
    FlushFailureForgotten,
    /// A buffer goes back to the pool while an operation in flight still has it (promise 3).
    ReuseBufferEarly,
    /// A replica that is not in sync is started alone without `--force` (promise 8).
    ForceNotNeeded,
    /// A replica that missed writes is taken back and its stale map forgotten (promise 8).
    StaleMapForgotten,
    /// The first bitmap page stands where the volume's last block does (promise 10).
    MetadataOverData,
    /// An orderly stop does not flush (promise 10).
    StopWithoutFlush,
    /// Where the holes are is asked of a replica that is being brought up to date, too (promise 5).
    AllocationOfResyncing,
    /// Unsynced regions are asked for holes like any other, of any replica (promise 5).
    UnsyncedAllocation,
    /// What a replica that is away misses is not shown to clients (promise 2).
    StaleMapNotShown,
    /// A dirty region is shown as clean to clients (promise 1).
    DirtyNotShown,
    /// What a replica was reading when a flush of it failed is answered (promise 5).
    BelieveAfterFailedFlush,
    /// A fast zeroing is carried out and then refused (promise 5).
    FastZeroTooLate,
    /// A request's range is not checked (promise 11).
    RangeNotChecked,
}

/// Every planted bug, in order.
pub const BUGS: [Bug; 32] = [
    Bug::AckBeforeIntent,
    Bug::IntentOnOneReplica,
    Bug::AckBeforeMembership,
    Bug::DropStaleBit,
    Bug::OverlapRace,
    Bug::ClearBeforeFlush,
    Bug::ClearAfterFailedFlush,
    Bug::ClearWithWriteInFlight,
    Bug::ReadStaleSide,
    Bug::ReadStaleReplica,
    Bug::FailTheLast,
    Bug::ResyncWrongDirection,
    Bug::SkipPageOnResyncStart,
    Bug::ResyncWithoutFlush,
    Bug::EqualCountersEqualData,
    Bug::DivergenceIgnored,
    Bug::FlushOneReplicaOnly,
    Bug::FuaIgnored,
    Bug::ZeroOneReplica,
    Bug::FlushFailureForgotten,
    Bug::ReuseBufferEarly,
    Bug::ForceNotNeeded,
    Bug::StaleMapForgotten,
    Bug::MetadataOverData,
    Bug::StopWithoutFlush,
    Bug::AllocationOfResyncing,
    Bug::UnsyncedAllocation,
    Bug::StaleMapNotShown,
    Bug::DirtyNotShown,
    Bug::BelieveAfterFailedFlush,
    Bug::FastZeroTooLate,
    Bug::RangeNotChecked,
];

/// Those that show only at one moment, which chance hardly ever finds: scenarios and small worlds are made for them, and
/// catch them.
pub const NOT_BY_CHANCE: [Bug; 1] = [Bug::BelieveAfterFailedFlush];

impl Bug {
    /// Those that the swarm catches.
    #[must_use]
    pub fn found_by_chance() -> Vec<Self> {
        BUGS.into_iter().filter(|bug| !NOT_BY_CHANCE.contains(bug)).collect()
    }

    /// The promise that it breaks.
    #[must_use]
    pub fn promise(self) -> u8 {
        match self {
            Self::AckBeforeIntent | Self::IntentOnOneReplica | Self::DirtyNotShown => 1,
            Self::AckBeforeMembership | Self::DropStaleBit | Self::StaleMapNotShown => 2,
            Self::OverlapRace | Self::ZeroOneReplica | Self::ReuseBufferEarly => 3,
            Self::ClearBeforeFlush | Self::ClearAfterFailedFlush | Self::ClearWithWriteInFlight => 4,
            Self::ReadStaleSide
            | Self::ReadStaleReplica
            | Self::AllocationOfResyncing
            | Self::UnsyncedAllocation
            | Self::BelieveAfterFailedFlush
            | Self::FastZeroTooLate => 5,
            Self::FailTheLast => 6,
            Self::ResyncWrongDirection | Self::SkipPageOnResyncStart | Self::ResyncWithoutFlush => 7,
            Self::EqualCountersEqualData
            | Self::DivergenceIgnored
            | Self::ForceNotNeeded
            | Self::StaleMapForgotten => 8,
            Self::FlushOneReplicaOnly | Self::FuaIgnored | Self::FlushFailureForgotten => 9,
            Self::MetadataOverData | Self::StopWithoutFlush => 10,
            Self::RangeNotChecked => 11,
        }
    }

    /// The bug of this name.
    ///
    /// # Errors
    /// There is none: the text has all names.
    pub fn named(name: &str) -> Result<Self, String> {
        BUGS.into_iter().find(|bug| format!("{bug:?}") == name).ok_or_else(|| {
            let names: Vec<String> = BUGS.iter().map(|bug| format!("{bug:?}")).collect();
            format!("there is no bug {name:?} to plant; choose one of {}", names.join(", "))
        })
    }
}

#[cfg(any(test, feature = "sim"))]
mod switch {
    use super::Bug;
    use std::cell::Cell;

    thread_local! {
        static PLANTED: Cell<Option<Bug>> = const { Cell::new(None) };
        static REACHED: Cell<u64> = const { Cell::new(0) };
    }

    /// Plants `bug` in this thread; `None` plants none.
    pub fn plant(bug: Option<Bug>) {
        PLANTED.set(bug);
        REACHED.set(0);
    }

    /// Whether `bug` is planted in this thread.
    #[must_use]
    pub fn planted(bug: Bug) -> bool {
        let hit = PLANTED.get() == Some(bug);
        if hit {
            REACHED.set(REACHED.get() + 1);
        }
        hit
    }

    /// How often the planted bug's switch was consulted in this thread since it was planted: 0 means that the
    /// core has no such switch, or that the run never got there.
    #[must_use]
    pub fn reached() -> u64 {
        REACHED.get()
    }
}
#[cfg(any(test, feature = "sim"))]
pub use switch::{plant, planted, reached};

/// No bug is ever planted in a normal build.
#[cfg(not(any(test, feature = "sim")))]
#[must_use]
#[inline(always)]
pub const fn planted(_bug: Bug) -> bool {
    false
}
