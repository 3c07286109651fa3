//! The one judgement of a found superblock against a volume's head: shared by `assemble` (at start) and `readmit`
//! (`add` while the volume runs), so that the two never disagree.
//!
//! What must hold: whoever may hold acknowledged writes that the head's history lacks is `Diverged`, never
//! overwritten. Refusing too much costs the operator a command; overwriting costs data.
//!
//! ```text
//! another volume                                       Foreign
//! later generation, unrelated generation               Diverged
//! not in the head's member table                       NotMember
//! more commits than the table gives it (two or more)   Diverged
//! table: InSync  older than recorded by two or more    Full (an earlier copy was put back)
//!                its table contradicts the head's      Diverged
//!                else                                  InSync
//! table: other   older than recorded by two or more    Full (an earlier copy was put back)
//!                went on without the head's history    Diverged
//!                else                                  Delta (the stale map says where)
//! ```
//!
//! "By one" is allowed everywhere because a crash may fall between two replicas' writes of one commit. Where the head
//! may have lost a newer superblock than itself, nothing is: who is not level with it is copied in full.

use uuid::Uuid;

use super::assemble::Found;
use super::describe::{format_utc, printable};
use super::superblock::{Member, MemberState, PARENTS_MAX, Superblock};
use crate::planted::{Bug, planted};
use crate::units::ReplicaSlot;

/// What becomes of a replica that an operator adds to a running volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Readmit {
    /// A known member. The caller makes sure that the member in this slot is not attached already (a copy of a
    /// replica has its identity).
    Member {
        /// Its slot.
        slot: ReplicaSlot,
        /// Why it needs a full copy; `None`: its stale map says where it missed writes. The caller widens that
        /// map by the candidate's own intent bits.
        full: Option<String>,
    },
    /// It was a member once and was removed: a full copy as a new member.
    NewMember,
    /// It belongs to another volume.
    Foreign {
        /// That volume's name.
        name: String,
        /// That volume's identity.
        uuid: Uuid,
    },
    /// It may hold writes that this volume lacks; only `--force` (a full copy over them) takes it in.
    Diverged {
        /// Why, and what stands on it.
        description: String,
    },
}

/// Judges a candidate for `add` against the running volume's newest superblock.
#[must_use]
pub fn readmit(head: &Superblock, found: &Found) -> Readmit {
    if found.superblock.volume_uuid == head.volume_uuid && found.read_only_features != 0 {
        return Readmit::Diverged {
            description: format!(
                "{}: it uses features that only a newer nbdmirror may write ({:#x})",
                printable(&found.path),
                found.read_only_features
            ),
        };
    }
    match verdict(head, &found.superblock) {
        // A member in sync that is not attached: it has not been written to as it should have been.
        Verdict::InSync(slot) => Readmit::Member {
            slot,
            full: Some("it counts as in sync and was not in use, so what it missed is not known".to_owned()),
        },
        Verdict::Delta(slot) => Readmit::Member { slot, full: None },
        Verdict::Full(slot, why) => Readmit::Member { slot, full: Some(why) },
        Verdict::NotMember => Readmit::NewMember,
        Verdict::Foreign => {
            Readmit::Foreign { name: found.superblock.name.clone(), uuid: found.superblock.volume_uuid }
        }
        Verdict::Diverged(why) => Readmit::Diverged {
            description: format!("{}: {why} ({})", printable(&found.path), found.describe()),
        },
    }
}

/// What a found superblock is to the volume whose newest superblock is the head.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Another volume.
    Foreign,
    /// May hold writes that the head's history lacks: why.
    Diverged(String),
    /// Of this volume, not in its table (removed).
    NotMember,
    /// Has every acknowledged write outside the intent bits.
    InSync(ReplicaSlot),
    /// Missed writes where its stale map says.
    Delta(ReplicaSlot),
    /// Missed writes, and it is not known where: why.
    Full(ReplicaSlot, String),
}

impl Verdict {
    /// The verdict on `found` where a newer superblock than the head may be lost: a damaged slot tells nobody what was in it.
    /// By that one an old copy could be behind by more than shows, or a member taken in again, its stale map cleared. Only
    /// who is level with the head took part in all that is known.
    pub(super) fn in_doubt(self, head: &Superblock, found: &Superblock) -> Self {
        match self {
            Self::InSync(slot) | Self::Delta(slot) if !level(head, found) => Self::Full(
                slot,
                format!(
                    "its event count is {}, that of the newest superblock found {}, and one newer still may be lost \
                     (damaged slot)",
                    found.event_count, head.event_count
                ),
            ),
            verdict => verdict,
        }
    }
}

/// How two histories lie to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lineage {
    Same,
    Older,
    Newer,
    Unrelated,
}

/// How `one` lies to `other`, by their generations alone.
pub(super) fn lineage(one: &Superblock, other: &Superblock) -> Lineage {
    if one.generation == other.generation {
        return Lineage::Same;
    }
    match (other.parents.contains(&one.generation), one.parents.contains(&other.generation)) {
        (true, false) => Lineage::Older,
        (false, true) => Lineage::Newer,
        _ => Lineage::Unrelated,
    }
}

/// The table at the head of this file.
pub(super) fn verdict(head: &Superblock, found: &Superblock) -> Verdict {
    if found.volume_uuid != head.volume_uuid {
        return Verdict::Foreign;
    }
    if found.regions != head.regions {
        return Verdict::Diverged("it records another volume or region size".to_owned());
    }
    match lineage(found, head) {
        Lineage::Same | Lineage::Older => {}
        _ if planted(Bug::DivergenceIgnored) => {
            let own = head_entry(head, found).map(|entry| entry.state);
            return if own == Some(MemberState::InSync) {
                Verdict::InSync(found.slot)
            } else {
                Verdict::Delta(found.slot)
            };
        }
        Lineage::Newer => return Verdict::Diverged("it was used without the others since".to_owned()),
        Lineage::Unrelated => return Verdict::Diverged(unrelated(head, found)),
    }
    let slot = found.slot;
    let Some(entry) = head_entry(head, found) else {
        return Verdict::NotMember;
    };
    if found.event_count > entry.event_count.saturating_add(1) {
        return Verdict::Diverged(format!(
            "it was changed apart from the others: its event count is {}, and {} is the last one known of it",
            found.event_count, entry.event_count
        ));
    }
    let old_copy = found.event_count.saturating_add(1) < entry.event_count;
    match (entry.state, old_copy) {
        (_, true) => Verdict::Full(slot, old_copy_reason(found, entry)),
        (MemberState::InSync, false) => match contradiction(head, found) {
            None => Verdict::InSync(slot),
            Some(why) => Verdict::Diverged(why),
        },
        (_, false) if went_on_alone(head, found) => {
            Verdict::Diverged("it went on as the volume while the others did the same without it".to_owned())
        }
        (_, false) => Verdict::Delta(slot),
    }
}

/// Whether both are of the same commit.
pub(super) fn level(one: &Superblock, other: &Superblock) -> bool {
    one.generation == other.generation && one.event_count == other.event_count
}

/// The head's entry for the replica that `found` stands on.
fn head_entry<'a>(head: &'a Superblock, found: &Superblock) -> Option<&'a Member> {
    let own = found.own_entry()?;
    head.members[found.slot.index()].as_ref().filter(|entry| entry.uuid == own.uuid)
}

fn unrelated(head: &Superblock, found: &Superblock) -> String {
    let mut why = "it and the others were each used without the other".to_owned();
    if head.parents.len() >= PARENTS_MAX || found.parents.len() >= PARENTS_MAX {
        why += &format!(
            " (or it was away for more than {PARENTS_MAX} generations, further than the history kept)"
        );
    }
    why
}

fn old_copy_reason(found: &Superblock, entry: &Member) -> String {
    format!(
        "it is older than recorded (event count {}, last written {}; {} is recorded): an earlier copy of it \
         was put back",
        found.event_count,
        format_utc(found.written_unix_ns),
        entry.event_count
    )
}

/// `found` counts as in sync and stands at the head's commit or at the one before. Whoever the head counts as in
/// sync took part in that commit too: becoming so takes a commit of its own. If by `found`'s table one did not,
/// the counts agree by chance and the two have different pasts.
fn contradiction(head: &Superblock, found: &Superblock) -> Option<String> {
    if level(found, head) {
        // One event count is used for one content only.
        let same = same_members(found, head) && found.parents == head.parents;
        return (!same).then(|| "it has the same event count and another member table".to_owned());
    }
    head.members()
        .filter(|(slot, member)| *slot != found.slot && member.state == MemberState::InSync)
        .find(|(slot, member)| !took_part(found, *slot, member.uuid))
        .map(|(slot, _)| format!("by its member table replica {slot} was not in use at its last change"))
}

/// Whether two member tables say the same of everybody's part in the volume. Paths do not count: a start that finds a
/// replica elsewhere says so in a superblock that it writes again for one that is a commit behind.
fn same_members(one: &Superblock, other: &Superblock) -> bool {
    let part = |member: &Option<Member>| {
        member.as_ref().map(|member| (member.uuid, member.state, member.event_count))
    };
    one.members.iter().map(part).eq(other.members.iter().map(part))
}

/// `found` calls itself in sync, the head does not. Then the head's history left it behind, and someone who took part
/// in `found`'s last commit carried on: still is in the table with that commit, or was removed since. If nobody
/// did, `found` was in use alone (or with others that are left behind too) at the same time.
fn went_on_alone(head: &Superblock, found: &Superblock) -> bool {
    let calls_itself_in_sync = found.own_entry().is_some_and(|own| own.state == MemberState::InSync);
    let carried_on = |(slot, member): (ReplicaSlot, &Member)| {
        slot != found.slot
            && took_part(found, slot, member.uuid)
            && match &head.members[slot.index()] {
                Some(entry) if entry.uuid == member.uuid => entry.event_count >= found.event_count,
                _ => true,
            }
    };
    calls_itself_in_sync && !found.members().any(carried_on)
}

/// Whether the member `uuid` in `slot` took part in the last commit that `superblock` records.
fn took_part(superblock: &Superblock, slot: ReplicaSlot, uuid: Uuid) -> bool {
    superblock.members[slot.index()].as_ref().is_some_and(|member| {
        member.uuid == uuid
            && member.event_count >= superblock.event_count
            && matches!(member.state, MemberState::InSync | MemberState::Resyncing)
    })
}
