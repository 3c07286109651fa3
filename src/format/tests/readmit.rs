//! `readmit`: what a running volume makes of a replica that an operator adds.

use super::*;
use crate::format::assemble::{Readmit, readmit};

fn diverged(head: &Superblock, found: &Found) -> String {
    match readmit(head, found) {
        Readmit::Diverged { description } => description,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_replica_that_a_newer_nbdmirror_wrote_is_not_overwritten() {
    let head = found(0, &[2, 1], 12, "I12 S10").superblock;
    let mut newer = found(1, &[1], 10, "I10 I10");
    assert_eq!(readmit(&head, &newer), Readmit::Member { slot: slot(1), full: None });
    newer.read_only_features = 6;
    assert!(diverged(&head, &newer).contains("newer nbdmirror may write (0x6)"));
    // Another volume's is named as such.
    newer.superblock.volume_uuid = Uuid::from_u128(9);
    assert!(matches!(readmit(&head, &newer), Readmit::Foreign { .. }));
}

#[test]
fn a_member_in_sync_that_was_not_in_use_gets_a_full_copy() {
    let head = found(0, &[1], 10, "I10 I10").superblock;
    let Readmit::Member { slot: place, full: Some(why) } = readmit(&head, &found(1, &[1], 10, "I10 I10"))
    else {
        panic!("not a full copy");
    };
    assert_eq!(place, slot(1));
    assert!(why.contains("what it missed is not known"), "{why}");
}
