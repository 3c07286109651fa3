//! Every rule of assembly, one test a case. Tables are written as `tests::table` reads them.

use uuid::Uuid;

use super::*;
use crate::format::Assembly;
use crate::format::assemble::{AssembleError, Readmit, assemble, readmit};
use crate::units::ReplicaSet;

/// Slots in sync, to resync and missing, as `01|2|`.
fn roles(assembly: &Assembly) -> String {
    let digits = |set: ReplicaSet| set.iter().map(|slot| slot.to_string()).collect::<String>();
    format!("{}|{}|{}", digits(assembly.in_sync), digits(assembly.resync), digits(assembly.missing))
}

#[track_caller]
pub(super) fn assert_roles(found: &[Found], options: AssembleOptions, expected: &str) -> Assembly {
    let assembly = assemble(found, options).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(roles(&assembly), expected);
    // Whatever the case: the parts fit together.
    assert!(assembly.in_sync.contains(assembly.source));
    for slot in ReplicaSlot::all() {
        let active = assembly.in_sync.union(assembly.resync).contains(slot);
        assert_eq!(assembly.found_of_slot[slot.index()].is_some(), active);
        if assembly.in_sync.contains(slot) {
            assert!(assembly.maps.stale[slot.index()].not_any());
        }
    }
    // The order in which they were given means nothing.
    let backwards: Vec<Found> = found.iter().rev().cloned().collect();
    assert_eq!(assemble(&backwards, options).map(|a| roles(&a)).ok().as_deref(), Some(expected));
    assembly
}

#[track_caller]
fn refused(found: &[Found], options: AssembleOptions) -> AssembleError {
    match assemble(found, options) {
        Ok(assembly) => panic!("assembled as {}", roles(&assembly)),
        Err(error) => error,
    }
}

#[track_caller]
pub(super) fn assert_diverged(found: &[Found]) -> String {
    // Not even with --force.
    match refused(found, FORCE) {
        AssembleError::Diverged(text) => text,
        other => panic!("{other:?}"),
    }
}

pub(super) fn stale_count(assembly: &Assembly, slot: usize) -> usize {
    assembly.maps.stale[slot].count_ones()
}

// Rule 1: one volume, each replica once.

#[test]
fn a_clean_pair_is_in_sync() {
    let assembly =
        assert_roles(&[found(0, &[1], 10, "I10 I10"), found(1, &[1], 10, "I10 I10")], STRICT, "01||");
    assert_eq!(assembly.source, slot(0));
    assert!(assembly.maps == maps() && assembly.unsynced.not_any());
    assert!(assembly.warnings.is_empty() && !assembly.forced);
}

#[test]
fn a_path_that_changed_is_no_other_past() {
    let mut caught_up = found(1, &[1], 10, "I10 I10");
    for member in caught_up.superblock.members.iter_mut().flatten() {
        member.path += ".moved";
    }
    assert_roles(&[found(0, &[1], 10, "I10 I10"), caught_up], STRICT, "01||");
}

#[test]
fn none_given_is_refused() {
    assert_eq!(refused(&[], STRICT), AssembleError::Empty);
}

#[test]
fn two_volumes_are_refused_and_named() {
    let mut other = found(1, &[1], 10, "I10 I10");
    other.superblock.volume_uuid = Uuid::from_u128(2);
    other.superblock.name = "elsewhere".to_owned();
    let text = refused(&[found(0, &[1], 10, "I10 I10"), other], FORCE).to_string();
    for part in ["volume vol (", "disk0.img", "volume elsewhere (", "disk1.img"] {
        assert!(text.contains(part), "{text}");
    }
}

#[test]
fn one_volume_with_two_geometries_is_refused() {
    let mut other = found(1, &[1], 10, "I10 I10");
    other.superblock.regions.volume_bytes -= 4096;
    assert_diverged(&[found(0, &[1], 10, "I10 I10"), other]);
}

#[test]
fn a_copy_of_a_replica_is_refused() {
    let mut copy = found(0, &[1], 10, "I10 I10");
    copy.path = "copy.img".to_owned();
    let error = refused(&[found(0, &[1], 10, "I10 I10"), copy], FORCE);
    assert!(error.to_string().contains("copy.img is a copy of disk0.img"), "{error}");
}

// Rules 2 and 3: lineage and head.

#[test]
fn an_older_generation_bows_to_the_newer() {
    // Slot 1 failed at event 11; slot 0 went on with a new generation.
    let assembly =
        assert_roles(&[found(1, &[1], 10, "I10 I10"), found(0, &[2, 1], 30, "I30 F10")], STRICT, "0|1|");
    assert_eq!(assembly.head.event_count, 30);
}

#[test]
fn a_newer_generation_wins_over_a_higher_event_count_only_within_one_history() {
    // Slot 1 was used on its own in generation 1 far beyond what slot 0 knows of it.
    let text = assert_diverged(&[found(0, &[2, 1], 12, "I12 S10"), found(1, &[1], 40, "S10 I40")]);
    assert!(text.contains("apart from the others"), "{text}");
}

#[test]
fn two_generations_from_one_parent_have_diverged() {
    let text = assert_diverged(&[found(0, &[2, 1], 12, "I12 S10"), found(1, &[3, 1], 12, "S10 I12")]);
    for part in [
        "disk0.img: generation",
        "disk1.img: generation",
        "event count 12",
        "last written 2026-02-28 23:59:59 UTC",
        "in sync by its account: replica 0 (/dev/disk0)",
        "to keep disk0.img:\n    nbdmirror serve --degraded disk0.img\n    nbdmirror add --force vol disk1.img",
        "to keep disk1.img:\n    nbdmirror serve --degraded disk1.img\n    nbdmirror add --force vol disk0.img",
    ] {
        assert!(text.contains(part), "{part} is not in:\n{text}");
    }
}

#[test]
fn a_third_replica_stands_on_the_side_it_agrees_with() {
    let text = assert_diverged(&[
        found(0, &[2, 1], 12, "I12 S10 I12"),
        found(1, &[3, 1], 12, "S10 I12 S10"),
        found(2, &[2, 1], 12, "I12 S10 I12"),
    ]);
    assert!(text.contains("serve --degraded disk0.img disk2.img\n    nbdmirror add --force vol disk1.img"));
}

#[test]
fn a_full_list_of_parents_is_given_as_a_possible_reason() {
    let mut generations: Vec<u128> = (2..=34).rev().collect();
    generations.truncate(33);
    let text = assert_diverged(&[found(0, &generations, 80, "I80 S10"), found(1, &[1], 10, "I10 I10")]);
    assert!(text.contains("more than 32 generations"), "{text}");
}

#[test]
fn one_event_count_with_two_tables_has_diverged() {
    assert_diverged(&[found(0, &[1], 10, "I10 S8"), found(1, &[1], 10, "S8 I10")]);
    assert_diverged(&[found(0, &[1], 10, "I10 I10 S3"), found(1, &[1], 10, "I10 I10 F3")]);
}

#[test]
fn at_one_event_count_the_replica_that_both_trust_is_the_head() {
    // Commit 10 (slot 1 becomes in sync) reached slot 1 alone; then slot 0 was started without it and crashed
    // after its first opening commit, also number 10.
    let a = found(0, &[1], 10, "I10 S9");
    let b = found(1, &[1], 10, "I10 I10");
    let assembly = assert_roles(&[b, a], STRICT, "0|1|");
    assert_eq!(assembly.head.slot, slot(0));
}

#[test]
fn the_head_may_stand_on_a_replica_that_is_not_in_sync() {
    // Commit 11 (slot 1 begins its resync) reached slot 1 alone.
    let assembly =
        assert_roles(&[found(0, &[1], 10, "I10 S4"), found(1, &[1], 11, "I11 R11")], STRICT, "0|1|");
    assert_eq!(assembly.head.slot, slot(1));
    assert_eq!(assembly.source, slot(0));
}

// Rule 4: who is current.

#[test]
fn a_crash_between_two_superblock_writes_leaves_both_in_sync() {
    assert_roles(&[found(0, &[1], 11, "I11 I11"), found(1, &[1], 10, "I10 I10")], STRICT, "01||");
    // The same where the commit was the loss of a third replica, with its new generation.
    assert_roles(
        &[found(0, &[2, 1], 11, "I11 I11 F10"), found(1, &[1], 10, "I10 I10 I10")],
        DEGRADED,
        "01||2",
    );
    // And where it made slot 1 in sync.
    assert_roles(&[found(0, &[1], 10, "I10 R10"), found(1, &[1], 11, "I11 I11")], STRICT, "01||");
}

#[test]
fn an_old_copy_of_an_in_sync_replica_is_copied_in_full() {
    let assembly =
        assert_roles(&[found(0, &[1], 12, "I12 I12"), found(1, &[1], 10, "I10 I10")], STRICT, "0|1|");
    assert_eq!(stale_count(&assembly, 1), 1000);
    assert!(assembly.warnings[0].contains("earlier copy"), "{:?}", assembly.warnings);
}

#[test]
fn counts_that_agree_by_chance_do_not_make_a_replica_in_sync() {
    // An old copy of slot 0, from when slot 1 was resyncing, was run alone up to event 12; the real one went on
    // to 13.
    assert_diverged(&[found(0, &[1], 12, "I12 S10"), found(1, &[1], 13, "I13 I13")]);
}

#[test]
fn a_member_known_to_be_stale_gets_what_its_map_says() {
    for state in ["S", "F", "R"] {
        let mut head = found(0, &[2, 1], 30, &format!("I30 {state}10"));
        head.maps.stale[1].set(7, true);
        let assembly = assert_roles(&[head, found(1, &[1], 10, "I10 I10")], STRICT, "0|1|");
        assert_eq!(assembly.maps.stale[1].iter_ones().collect::<Vec<_>>(), [7]);
        assert!(assembly.warnings.is_empty());
    }
}

#[test]
fn an_old_copy_of_a_stale_member_is_copied_in_full() {
    let assembly =
        assert_roles(&[found(0, &[2, 1], 30, "I30 S10"), found(1, &[1], 8, "I8 I8")], STRICT, "0|1|");
    assert_eq!(stale_count(&assembly, 1), 1000);
}

#[test]
fn one_commit_beyond_its_entry_is_a_crash_and_two_are_another_history() {
    let head = || found(0, &[2, 1], 30, "I30 S10");
    // Commit 11 reached slot 1 alone; slot 0 went on from 10.
    assert_roles(&[head(), found(1, &[1], 11, "I11 I11")], STRICT, "0|1|");
    assert_diverged(&[head(), found(1, &[1], 12, "I12 I12")]);
}

#[test]
fn two_lonely_starts_from_one_crash_have_diverged() {
    // Commit 10 (slot 0 becomes in sync) reached slot 0 alone. Then slot 1 was started without slot 0 (no new
    // generation: slot 0 was not in sync for it), then slot 0 without slot 1.
    let alone_1 = found(1, &[1], 11, "S9 I11");
    let alone_0 = found(0, &[2, 1], 12, "I12 S10");
    assert_diverged(&[alone_0, alone_1]);
}

#[test]
fn a_member_left_behind_by_one_that_was_removed_since_is_still_known() {
    let head = found(2, &[3, 2, 1], 40, "- S10 I40");
    assert_roles(&[head, found(1, &[1], 10, "I10 I10")], STRICT, "2|1|");
}

// Rule 5: stale maps against replicas in sync.

#[test]
fn a_stale_map_demotes_a_replica_that_the_table_calls_in_sync() {
    // Slot 0 failed slot 1 and then lost its newest superblock.
    let mut accuser = found(0, &[1], 10, "I10 I10");
    accuser.maps.stale[1].set(3, true);
    accuser.damaged_slot = Some(1);
    let mut accused = found(1, &[1], 10, "I10 I10");
    accused.maps.intent.set(5, true);
    let assembly = assert_roles(&[accused, accuser], STRICT, "0|1|");
    assert_eq!(assembly.maps.stale[1].iter_ones().collect::<Vec<_>>(), [3, 5]);
    assert!(assembly.unsynced.not_any());
    assert_eq!(assembly.warnings.len(), 2);
}

#[test]
fn replicas_that_accuse_each_other_have_diverged() {
    let mut a = found(0, &[1], 10, "I10 I10");
    a.maps.stale[1].set(3, true);
    let mut b = found(1, &[1], 10, "I10 I10");
    b.maps.stale[0].set(900, true);
    let text = assert_diverged(&[a, b]);
    assert!(text.contains("each one's bitmaps say that the other missed writes"));
    assert!(text.contains("nbdmirror add --force vol disk0.img"));
}

#[test]
fn a_damaged_sector_accuses_nobody() {
    let mut a = found(0, &[1], 10, "I10 I10 S4");
    for regions in [448..896, 896..1000] {
        a.maps.intent[regions.clone()].fill(true);
        for map in &mut a.maps.stale {
            map[regions.clone()].fill(true);
        }
        a.damaged_regions.push(regions);
    }
    a.damaged_sectors = 2;
    let b = found(1, &[1], 10, "I10 I10 S4");
    let assembly = assert_roles(&[a.clone(), b.clone()], DEGRADED, "01||2");
    // It is synced to be safe, and stays stale where a replica is known to be stale.
    assert_eq!(assembly.unsynced.count_ones(), 552);
    assert_eq!(stale_count(&assembly, 2), 552);
    assert!(assembly.warnings.iter().any(|warning| warning.contains("2 bitmap sectors are damaged")));
    // A sound bit beside it still accuses; then the damaged ones count too.
    a.maps.stale[1].set(0, true);
    let assembly = assert_roles(&[a, b], DEGRADED, "0|1|2");
    assert_eq!(stale_count(&assembly, 1), 553);
}

#[test]
fn a_lone_replica_that_says_it_missed_writes_is_not_trusted() {
    let mut alone = found(0, &[1], 10, "I10");
    alone.maps.stale[0].set(3, true);
    assert!(matches!(refused(&[alone.clone()], DEGRADED), AssembleError::NoneInSync(_)));
    assert_roles(&[alone], FORCE, "0||");
}

// Rule 6: intent.

#[test]
fn intent_bits_of_all_trusted_replicas_are_united() {
    let mut a = found(0, &[1], 10, "I10 I10 R10 S4");
    a.maps.intent.set(1, true);
    let mut b = found(1, &[1], 10, "I10 I10 R10 S4");
    b.maps.intent.set(999, true);
    let mut c = found(2, &[1], 10, "I10 I10 R10 S4");
    c.maps.intent.set(500, true);
    let assembly = assert_roles(&[a, b, c], DEGRADED, "01|2|3");
    assert_eq!(assembly.unsynced.iter_ones().collect::<Vec<_>>(), [1, 999]);
    assert_eq!(assembly.maps.intent, assembly.unsynced);
    // One to be brought up to date gets these, and what it thought dirty itself.
    assert_eq!(assembly.maps.stale[2].iter_ones().collect::<Vec<_>>(), [1, 500, 999]);
    // A missing one too: the crash may have come before its stale bits for what was dirty when it was lost.
    assert_eq!(assembly.maps.stale[3].iter_ones().collect::<Vec<_>>(), [1, 999]);
}

#[test]
fn one_replica_in_sync_has_nothing_unsynced() {
    let mut a = found(0, &[1], 10, "I10 S4");
    a.maps.intent.set(1, true);
    let assembly = assert_roles(&[a], DEGRADED, "0||1");
    assert!(assembly.unsynced.not_any() && assembly.maps.intent[1]);
}

#[test]
fn clean_by_one_account_of_the_newest_commit_is_not_clean() {
    // Found by fuzzing (tests/fuzz/crashes/assemble-clean-by-one-account): the order in which the replicas were given
    // decided whether regions with intent bits were synced.
    let mut pair = [found(0, &[1], 10, "I10 I10"), found(1, &[1], 10, "I10 I10")];
    pair.iter_mut().for_each(|found| found.maps.intent.set(3, true));
    for (first, second) in [(true, false), (false, true)] {
        (pair[0].superblock.clean, pair[1].superblock.clean) = (first, second);
        for given in [pair.to_vec(), pair.iter().rev().cloned().collect()] {
            let assembly = assert_roles(&given, STRICT, "01||");
            assert!(assembly.unsynced[3] && !assembly.head.clean);
        }
    }
}

#[test]
fn in_sync_by_one_account_of_the_newest_commit_is_not_in_sync() {
    // Found by fuzzing (tests/fuzz/crashes/assemble-states-of-one-commit-differ): one of two superblocks of one commit had
    // replica 1 in sync, the other had not, and the former was believed.
    let given = [found(0, &[1], 10, "I10 R10"), found(1, &[1], 10, "I10 I10")];
    for given in [given.to_vec(), given.iter().rev().cloned().collect()] {
        let assembly = assert_roles(&given, STRICT, "0|1|");
        assert!(!assembly.forced);
    }
    let each_other = [found(0, &[1], 10, "I10 R10"), found(1, &[1], 10, "R10 I10")];
    refused(&each_other, STRICT);
    refused(&each_other, DEGRADED);
}

#[test]
fn bits_of_a_free_slot_are_dropped() {
    let mut a = found(0, &[1], 10, "I10 - I10");
    a.maps.stale[1].set(9, true);
    let assembly = assert_roles(&[a, found(2, &[1], 10, "I10 - I10")], STRICT, "02||");
    assert_eq!(stale_count(&assembly, 1), 0);
}

// Rule 7: missing members.

#[test]
fn a_missing_member_is_refused_with_the_command() {
    for (words, state) in [("I10 I10", "in-sync"), ("I10 S4", "stale"), ("I10 F4", "faulty")] {
        let text = refused(&[found(0, &[1], 10, words)], STRICT).to_string();
        assert!(text.contains(&format!("replica 1: last seen at /dev/disk1, recorded as {state}")), "{text}");
        assert!(text.contains("\n  nbdmirror serve --degraded disk0.img"), "{text}");
        let assembly = assert_roles(&[found(0, &[1], 10, words)], DEGRADED, "0||1");
        assert!(assembly.warnings[0].contains("/dev/disk1"));
    }
}

// Rule 8: nobody in sync.

#[test]
fn a_stale_replica_alone_needs_force() {
    // Slot 1 is resyncing and has the newest superblock; slot 0 has the data.
    let stale = || found(1, &[1], 10, "I10 R10");
    let text = refused(&[stale()], DEGRADED).to_string();
    for part in [
        "disk1.img: missed writes after 2026-02-28 23:59:59 UTC",
        "newer data is on replica 0, last seen at /dev/disk0",
        "nbdmirror serve --degraded --force disk1.img",
    ] {
        assert!(text.contains(part), "{text}");
    }
    // Force alone does not stand for --degraded.
    let force = AssembleOptions { force: true, ..STRICT };
    assert!(matches!(refused(&[stale()], force), AssembleError::Missing(_)));
    let assembly = assert_roles(&[stale()], FORCE, "1||0");
    assert!(assembly.forced);
    assert_eq!(stale_count(&assembly, 0), 1000);
}

#[test]
fn what_a_forced_start_gave_up_is_refused_when_it_comes_back() {
    let newer = found(0, &[1], 10, "I10 R10");
    let assembly = assert_roles(&[found(1, &[1], 10, "I10 R10")], FORCE, "1||0");
    assert_eq!(assembly.head.members[0].as_ref().unwrap().event_count, 0);
    // As the core goes on from there: a new generation, two opening commits.
    let forced = found(1, &[2, 1], 12, "S0 I12");
    assert_diverged(&[forced, newer]);
}

#[test]
fn force_takes_the_best_and_copies_it_to_the_rest() {
    let text = "I20 S10 R20 R20";
    let mut c = found(2, &[2, 1], 20, text);
    c.maps.stale[2][..5].fill(true);
    let d = found(3, &[2, 1], 20, text);
    let b = found(1, &[1], 10, "I10 I10 R10 R10");
    let assembly = assert_roles(&[b, c, d], FORCE, "3|12|0");
    assert_eq!((stale_count(&assembly, 1), stale_count(&assembly, 2)), (1000, 1000));
}

#[test]
fn force_changes_nothing_where_a_replica_is_in_sync() {
    let mut head = found(0, &[1], 10, "I10 R10");
    head.maps.stale[1].set(3, true);
    let assembly = assert_roles(&[head, found(1, &[1], 10, "I10 R10")], FORCE, "0|1|");
    assert!(!assembly.forced);
    assert_eq!(stale_count(&assembly, 1), 1);
}

// Rule 9: removed members.

#[test]
fn a_removed_replica_is_refused_with_the_command() {
    let error = refused(&[found(0, &[2, 1], 12, "I12 -"), found(1, &[1], 10, "I10 I10")], FORCE);
    assert!(error.to_string().contains("disk1.img was removed from volume vol"), "{error}");
    assert!(error.to_string().contains("nbdmirror add vol disk1.img"), "{error}");
    // Also where another replica has its slot now.
    let mut head = found(0, &[2, 1], 12, "I12 I12");
    head.superblock.members[1].as_mut().unwrap().uuid = Uuid::from_u128(777);
    let error = refused(&[head, found(1, &[1], 10, "I10 I10")], FORCE);
    assert!(matches!(error, AssembleError::NotMember { .. }), "{error}");
}

// Rule 10, and the rest.

#[test]
fn the_source_is_the_lowest_slot_in_sync() {
    let words = "S4 - I10 I10";
    let assembly = assert_roles(&[found(3, &[1], 10, words), found(2, &[1], 10, words)], DEGRADED, "23||0");
    assert_eq!(assembly.source, slot(2));
}

#[test]
fn unknown_read_only_features_allow_reading() {
    let mut newer = found(0, &[1], 10, "I10");
    newer.read_only_features = 4;
    assert!(refused(&[newer.clone()], FORCE).to_string().contains("--read-only"));
    assert_roles(&[newer], AssembleOptions { read_only: true, ..STRICT }, "0||");
}

#[test]
fn readmission_follows_the_same_rules() {
    let head = found(0, &[2, 1], 30, "I30 S10").superblock;
    let member = |found| match readmit(&head, &found) {
        Readmit::Member { slot, full } => (slot.index(), full.is_some()),
        other => panic!("{other:?}"),
    };
    assert_eq!(member(found(1, &[1], 10, "I10 I10")), (1, false));
    assert_eq!(member(found(1, &[1], 8, "I8 I8")), (1, true));
    assert_eq!(readmit(&head, &found(2, &[1], 10, "I10 I10 I10")), Readmit::NewMember);
    let is_diverged = |found| matches!(readmit(&head, &found), Readmit::Diverged { .. });
    assert!(is_diverged(found(1, &[1], 20, "S9 I20")));
    assert!(is_diverged(found(1, &[3, 1], 12, "S10 I12")));
    assert!(is_diverged(found(1, &[3, 2, 1], 32, "S30 I32")));
    let mut foreign = found(1, &[1], 10, "I10 I10");
    foreign.superblock.volume_uuid = Uuid::from_u128(2);
    assert!(matches!(readmit(&head, &foreign), Readmit::Foreign { .. }));
}
