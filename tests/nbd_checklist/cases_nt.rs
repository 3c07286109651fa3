//! NT: lines that operation shows and not the wire alone, as far as the replicas' files tell.

use super::ground::{Ground, MIB};
use super::link::{cmd, flag};

cases! {
    nt_11_zeroes_without_holes_are_provisioned,
}

fn nt_11_zeroes_without_holes_are_provisioned(ground: &Ground) {
    const LEN: u64 = 8 * MIB;
    let (fresh, written) = (ground.range(LEN), ground.written(11, LEN));
    let mut link = ground.link();
    link.done(cmd::FLUSH, 0, 0, 0);
    let before = ground.allocated_bytes();
    link.done(cmd::WRITE_ZEROES, flag::NO_HOLE, fresh, LEN);
    link.done(cmd::WRITE_ZEROES, flag::NO_HOLE | flag::FUA, written, LEN);
    link.done(cmd::FLUSH, 0, 0, 0);
    for (replica, (before, after)) in before.iter().zip(ground.allocated_bytes()).enumerate() {
        let grown = after.saturating_sub(*before);
        assert!(grown >= LEN, "replica {replica} has {grown} bytes more for {LEN} bytes of zeroes");
    }
    assert!(link.read(fresh, LEN).iter().chain(&link.read(written, LEN)).all(|byte| *byte == 0));
}
