//! AB: what only time shows; these run beside the other sections.

use std::time::{Duration, Instant};

use super::cases_ab_hold::half_sent;
use super::ground::{EXPORT, Ground, MIB, pattern};
use super::link::Mode;
use super::raw::{FIXED_NEWSTYLE, Raw, info_data, opt, option};

cases! {
    ab_08_a_handshake_that_does_not_end_is_ended,
    ab_19_more_half_sent_writes_than_memory,
}

/// Silent from the start, silent after the flags, silent in an option, and one that says a byte now and then: none may
/// hold its place for longer than the limit (10 s by default).
fn ab_08_a_handshake_that_does_not_end_is_ended(ground: &Ground) {
    let mut silent: Vec<Raw> = vec![ground.raw(), ground.haggling(), ground.haggling()];
    silent[0].greeting();
    silent[2].send(&option(opt::GO, &info_data(EXPORT, &[]))[..20]);
    let mut slow = ground.raw().hello(FIXED_NEWSTYLE);
    let header = option(4711, &[0; 200]);
    let deadline = Instant::now() + Duration::from_secs(40);
    let mut sent = 0;
    while sent < header.len() && slow.try_send(&header[sent..=sent]).is_ok() {
        assert!(Instant::now() < deadline, "a slow writer holds its place");
        sent += 1;
        std::thread::sleep(Duration::from_millis(300));
    }
    assert!(sent < header.len(), "a slow writer got to the end");
    for mut raw in silent {
        raw.expect_closed();
    }
    ground.let_go();
}

/// Together they announce 640 MiB, more than the budget for requests: none of it may be taken from the others before it
/// has come.
fn ab_19_more_half_sent_writes_than_memory(ground: &Ground) {
    let held = half_sent(ground, 20, 1000);
    for _ in 0..3 {
        ground.unharmed();
        let mut link = ground.link_in(Mode::Simple);
        let offset = ground.range(MIB);
        link.write(offset, &pattern(1919, offset, MIB));
        assert!(link.read(offset, MIB) == pattern(1919, offset, MIB));
    }
    drop(held);
    ground.let_go();
}
