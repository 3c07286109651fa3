//! Metadata contexts by name: what is offered, and what a client's query means.
//!
//! | name | what it tells |
//! |---|---|
//! | `base:allocation` | holes and zeroes, as the specification has it |
//! | `nbdmirror:state` | the mirror's health (`extent::STATE_*`) |
//! | `nbdmirror:stale/N` | what replica N misses (`extent::STALE_*`) |
//!
//! To list, `base:`, `nbdmirror:` and `nbdmirror:stale/` stand for everything that begins so; to select, nothing does.
//! What must hold: a query of any other form finds nothing, and is no error.

use crate::extent::{ContextSet, StatusContext};
use crate::units::ReplicaSet;

/// Queries that stand for everything that begins with them, when listing.
const WILDCARDS: [&str; 3] = ["base:", "nbdmirror:", "nbdmirror:stale/"];

/// Longest name, bytes.
pub const NAME_BYTES_MAX: usize = 32;

/// The context's name.
#[must_use]
pub fn name(context: StatusContext) -> String {
    match context {
        StatusContext::Allocation => "base:allocation".to_owned(),
        StatusContext::State => "nbdmirror:state".to_owned(),
        StatusContext::Stale(slot) => format!("nbdmirror:stale/{slot}"),
    }
}

/// The context's number on the wire. The same on every connection.
#[must_use]
pub fn id(context: StatusContext) -> u32 {
    context.index() as u32
}

/// The context of this number.
#[must_use]
pub fn from_id(id: u32) -> Option<StatusContext> {
    StatusContext::from_index(usize::try_from(id).ok()?)
}

/// What a client of a volume with these members can select, with names.
pub struct Offered(Vec<(StatusContext, String)>);

impl Offered {
    /// Every context of a volume with the replicas `replicas`.
    #[must_use]
    pub fn new(replicas: ReplicaSet) -> Self {
        let offered = StatusContext::all().filter(|context| match context {
            StatusContext::Allocation | StatusContext::State => true,
            StatusContext::Stale(slot) => replicas.contains(*slot),
        });
        Self(offered.map(|context| (context, name(context))).collect())
    }

    /// All of them.
    #[must_use]
    pub fn all(&self) -> ContextSet {
        self.0.iter().map(|(context, _)| *context).collect()
    }

    /// Those of exactly these names.
    pub fn select<'a>(&self, queries: impl Iterator<Item = &'a [u8]>) -> ContextSet {
        self.find(queries, |query, name| query == name.as_bytes())
    }

    /// Those of these names or under these wildcards.
    pub fn list<'a>(&self, queries: impl Iterator<Item = &'a [u8]>) -> ContextSet {
        self.find(queries, |query, name| {
            let is_wildcard = WILDCARDS.iter().any(|wildcard| query == wildcard.as_bytes());
            query == name.as_bytes() || is_wildcard && name.as_bytes().starts_with(query)
        })
    }

    fn find<'a>(
        &self,
        queries: impl Iterator<Item = &'a [u8]>,
        matches: impl Fn(&[u8], &str) -> bool,
    ) -> ContextSet {
        let mut found = ContextSet::EMPTY;
        for query in queries {
            for (context, name) in &self.0 {
                if matches(query, name) {
                    found.insert(*context);
                }
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::ReplicaSlot;

    fn names(set: ContextSet) -> Vec<String> {
        set.iter().map(name).collect()
    }

    #[test]
    fn opt_33_34_36_what_queries_find() {
        let offered = Offered::new([0, 3].map(ReplicaSlot::new).into_iter().collect());
        let all = ["base:allocation", "nbdmirror:state", "nbdmirror:stale/0", "nbdmirror:stale/3"];
        assert_eq!(names(offered.all()), all);
        for (query, listed) in
            [("base:", &all[..1]), ("nbdmirror:", &all[1..]), ("nbdmirror:stale/", &all[2..])]
        {
            assert_eq!(names(offered.list([query.as_bytes()].into_iter())), listed);
            assert!(offered.select([query.as_bytes()].into_iter()).is_empty());
        }
        for name in all {
            assert_eq!(names(offered.list([name.as_bytes()].into_iter())), [name]);
            assert_eq!(names(offered.select([name.as_bytes()].into_iter())), [name]);
        }
        let none =
            ["", ":", "base", "base:alloc", "base:allocation ", "nbdmirror:stale/1", "nbdmirror:stale/03"];
        for query in none.into_iter().chain(["nbdmirror:stale/99999999999", "qemu:", "nbdmirror", "BASE:"]) {
            assert!(offered.list([query.as_bytes()].into_iter()).is_empty(), "{query}");
            assert!(offered.select([query.as_bytes()].into_iter()).is_empty(), "{query}");
        }
    }

    #[test]
    fn numbers_are_distinct_and_go_both_ways() {
        for context in StatusContext::all() {
            assert_eq!(from_id(id(context)), Some(context));
            assert!(name(context).len() <= NAME_BYTES_MAX);
        }
        assert_eq!((from_id(10), from_id(u32::MAX)), (None, None));
    }
}
