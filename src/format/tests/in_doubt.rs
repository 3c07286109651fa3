//! Heads that may have lost a newer superblock than themselves (`docs/decisions/0012-head-in-doubt.md`).

use super::assemble::{assert_diverged, assert_roles, stale_count};
use super::*;

/// Its other superblock slot is damaged.
fn in_doubt(found: Found) -> Found {
    let other_slot = 1 - found.superblock.event_count % 2;
    Found { damaged_slot: Some(other_slot), newer_may_be_lost: true, ..found }
}

#[test]
fn behind_a_head_that_may_have_lost_its_newest_superblock_is_copied_in_full() {
    // Commits 11 and 12 opened the volume, data was written, and slot 0 lost commit 12: a copy from before the opening
    // is behind by two and looks as if it were by one.
    let head = |words| in_doubt(found(0, &[1], 11, words));
    let assembly = assert_roles(&[head("I11 I11"), found(1, &[1], 10, "I10 I10")], STRICT, "0|1|");
    assert_eq!(stale_count(&assembly, 1), 1000);
    assert!(assembly.warnings[0].contains("may be lost"), "{:?}", assembly.warnings);
    // It may have been taken in again, and brought up to date, by what is lost: its stale map says nothing of a copy.
    for (words, event_count) in [("I11 R11", 10), ("I11 S9", 9)] {
        let old = found(1, &[1], event_count, &words.replace("11", &event_count.to_string()));
        assert_eq!(stale_count(&assert_roles(&[head(words), old], STRICT, "0|1|"), 1), 1000);
    }
    // Who is level with the head took part in all that may be lost, or its loss was recorded in stale maps.
    assert_roles(&[head("I11 I11"), found(1, &[1], 11, "I11 I11")], STRICT, "01||");
    let level = assert_roles(&[head("I11 R11"), found(1, &[1], 11, "I11 R11")], STRICT, "0|1|");
    assert_eq!(stale_count(&level, 1), 0);
}

#[test]
fn stale_bits_that_rotted_beside_the_newest_superblock_may_have_been_set() {
    // Commit 11 recorded that slot 0 had missed writes. Slot 1 lost it, and the sector with the stale bits.
    let mut lost = in_doubt(found(1, &[1], 10, "I10 I10"));
    lost.damaged_regions.push(448..896);
    for map in lost.maps.stale.iter_mut().chain([&mut lost.maps.intent]) {
        map[448..896].fill(true);
    }
    let stale = found(0, &[1], 10, "I10 I10");
    let source = |found: &[Found], expected| {
        let assembly = assert_roles(found, STRICT, expected);
        (assembly.source.index(), assembly.unsynced.count_ones())
    };
    assert_eq!(source(&[stale.clone(), lost.clone()], "01||"), (1, 448));
    // Nor does it count that the head calls it an orderly stop.
    let clean = |mut found: Found| {
        found.superblock.clean = true;
        found
    };
    assert_eq!(source(&[clean(stale.clone()), clean(lost.clone())], "01||"), (1, 448));
    // Either alone is no reason: the stale bits are there, or the superblock is.
    let mut sound = Found { damaged_regions: Vec::new(), ..lost.clone() };
    sound.maps.stale[1].fill(false);
    assert_roles(&[stale.clone(), sound], STRICT, "1|0|");
    let newest = Found { newer_may_be_lost: false, damaged_slot: None, ..lost };
    assert_eq!(source(&[stale, newest], "01||"), (0, 448));
}

#[test]
fn a_replica_that_rots_demotes_nobody() {
    // What it may have said is no accusation; nor does it keep sound stale bits from telling what it missed itself.
    for (table, expected, accused) in
        [("I10 I10", "01||", false), ("I10 I10", "1|0|", true), ("I10 I10 I10", "12|0|", true)]
    {
        let mut lost = in_doubt(found(0, &[1], 10, table));
        lost.damaged_regions.push(448..896);
        for map in lost.maps.stale.iter_mut().chain([&mut lost.maps.intent]) {
            map[448..896].fill(true);
        }
        let others = (1..table.split(' ').count()).map(|slot| {
            let mut other = found(slot, &[1], 10, table);
            other.maps.intent.set(3, accused);
            other.maps.stale[0].set(3, accused);
            other
        });
        let all: Vec<Found> = std::iter::once(lost).chain(others).collect();
        assert_roles(&all, STRICT, expected);
    }
}

#[test]
fn what_is_missing_while_the_head_is_in_doubt_comes_back_in_full() {
    // As above, but the others are not there: whoever comes back later may be an old copy, or have been taken in again.
    let head = in_doubt(found(0, &[1], 11, "I11 I11 S9"));
    let assembly = assert_roles(&[head], DEGRADED, "0||12");
    assert_eq!((stale_count(&assembly, 1), stale_count(&assembly, 2)), (1000, 1000));
}

#[test]
fn a_new_replica_that_is_being_copied_puts_nobody_in_doubt() {
    // Commit 5 took slot 2 in, whose other slot was never written. It fell on a bad place of slot 0.
    let whole = in_doubt(found(0, &[1], 4, "I4 S2"));
    let new = Found { damaged_slot: Some(0), ..found(2, &[1], 5, "I5 S2 R5") };
    assert_roles(&[whole.clone(), new], DEGRADED, "0|2|1");
    // Not even where that other slot has rotted: nobody else is in sync.
    assert_roles(&[whole, in_doubt(found(2, &[1], 5, "I5 S2 R5"))], DEGRADED, "0|2|1");
}

#[test]
fn force_takes_what_was_whole_before_a_copy_that_was_not_finished() {
    let old = found(0, &[1], 3, "I3 I3");
    let mut half = found(2, &[2, 1], 6, "S4 I6 R6");
    half.superblock.members[0].as_mut().unwrap().event_count = 4;
    half.maps.stale[2].fill(true);
    let assembly = assert_roles(&[old, half], FORCE, "0|2|1");
    assert_eq!(stale_count(&assembly, 2), 1000);
}

#[test]
fn a_torn_superblock_that_is_a_commit_behind_is_a_crash() {
    // Commit 11 was torn on slot 1; slot 0 has it and the one before.
    let torn = in_doubt(found(1, &[1], 10, "I10 I10"));
    assert_roles(&[found(0, &[1], 11, "I11 I11"), torn], STRICT, "01||");
}

#[test]
fn what_has_diverged_is_refused_whatever_may_be_lost() {
    let head = in_doubt(found(1, &[1], 13, "I13 I13"));
    assert_diverged(&[found(0, &[1], 12, "I12 S10"), head]);
}
