//! The project's own suite of malformed input and abuse: every line of the NBD checklist (`docs/nbd-checklist.md`) that
//! can be shown over a socket, against the real binary, by a client written apart from the server's code.
//!
//! ```text
//!  section (one #[test], one daemon) ── case ── unharmed? ── case ── unharmed? ── ... ── nothing leaked? replicas agree?
//! ```
//!
//! A case is a function whose name begins with its line of the checklist; a section runs its cases in turn and says all
//! that failed at the end. `NBD_CASE=cmd_05` runs the cases whose name has that in it; `NBD_SEED` replays the random ones.
//!
//! What must hold: after every case a fresh client is served and the data written before is intact. Where the
//! specification leaves several answers open all of them pass; where it says MUST, and where `docs/` promises more,
//! nothing else does. No case waits for the clock: a hang is a peer silent for 20 s.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod ground;
mod link;
mod raw;
mod reply;
#[path = "../support/mod.rs"]
mod support;

/// Names the cases of a file, in the order in which they run.
macro_rules! cases {
    ($($name:ident),* $(,)?) => {
        /// The cases of this file.
        pub(crate) const CASES: &[crate::Case] = &[$((stringify!($name), $name)),*];
    };
}

mod cases_ab_connect;
mod cases_ab_fuzz;
mod cases_ab_hold;
mod cases_ab_wait;
mod cases_bs;
mod cases_cmd_bounds;
mod cases_cmd_data;
mod cases_cmd_end;
mod cases_cmd_flags;
mod cases_cmd_pipeline;
mod cases_eh;
mod cases_hs;
mod cases_mir;
mod cases_nt;
mod cases_opt;
mod cases_opt_info;
mod cases_opt_malformed;
mod cases_opt_meta;
mod cases_sr;
mod cases_tf;

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use ground::Ground;
use link::Mode;

/// A case's name, which begins with its line of the checklist, and what it does.
type Case = (&'static str, fn(&Ground));

/// All files of cases.
const ALL: &[&[Case]] = &[
    cases_hs::CASES,
    cases_opt::CASES,
    cases_opt_info::CASES,
    cases_opt_malformed::CASES,
    cases_opt_meta::CASES,
    cases_tf::CASES,
    cases_cmd_bounds::CASES,
    cases_cmd_data::CASES,
    cases_cmd_end::CASES,
    cases_cmd_flags::CASES,
    cases_cmd_pipeline::CASES,
    cases_sr::CASES,
    cases_bs::CASES,
    cases_eh::CASES,
    cases_ab_connect::CASES,
    cases_ab_fuzz::CASES,
    cases_ab_hold::CASES,
    cases_ab_wait::CASES,
    cases_mir::CASES,
    cases_nt::CASES,
];

/// Where each case of a broken server hangs, a section ends here.
const SECTION_MAX: Duration = Duration::from_secs(150);

/// Runs cases in turn on one daemon; fails with the names of all that failed.
fn run(mode: Mode, files: &[&[Case]]) {
    let filter = std::env::var("NBD_CASE").unwrap_or_default();
    let mut ground = Ground::new(mode);
    let mut failed = Vec::new();
    let mut passed = 0;
    let started = Instant::now();
    for (name, case) in files.concat() {
        if !name.contains(&filter) {
            continue;
        }
        if started.elapsed() > SECTION_MAX {
            failed.push(format!("{name} and what follows: not run, the section takes too long"));
            break;
        }
        let outcome = attempt(|| case(&ground)).map_err(|why| format!("{name}: {why}"));
        let harm = attempt(|| ground.unharmed()).map_err(|why| format!("{name}: HARM DONE: {why}"));
        if outcome.is_ok() && harm.is_ok() {
            passed += 1;
        }
        let harmed = harm.is_err();
        failed.extend([outcome, harm].into_iter().filter_map(Result::err));
        if harmed {
            failed.extend((!ground.is_alive()).then(|| format!("{name}: the daemon has ended")));
            ground = Ground::new(mode);
        }
    }
    failed.extend(attempt(|| ground.close()).err().map(|why| format!("at the end: {why}")));
    println!("{mode:?}: {passed} cases passed");
    assert!(failed.is_empty(), "{} failed ({mode:?}):\n  {}", failed.len(), failed.join("\n  "));
}

/// Runs a part of a case; how it failed.
fn attempt(part: impl FnOnce()) -> Result<(), String> {
    catch_unwind(AssertUnwindSafe(part)).map_err(|payload| match payload.downcast::<String>() {
        Ok(text) => text.replace('\n', " "),
        Err(payload) => payload.downcast_ref::<&str>().unwrap_or(&"?").to_string(),
    })
}

const CMD: &[&[Case]] = &[
    cases_cmd_bounds::CASES,
    cases_cmd_data::CASES,
    cases_cmd_end::CASES,
    cases_cmd_flags::CASES,
    cases_cmd_pipeline::CASES,
];

#[test]
fn hs_the_handshake() {
    run(Mode::Simple, &[cases_hs::CASES]);
}

#[test]
fn opt_options() {
    let files = [cases_opt::CASES, cases_opt_info::CASES, cases_opt_malformed::CASES, cases_opt_meta::CASES];
    run(Mode::Structured, &files);
}

#[test]
fn tf_transmission_flags() {
    run(Mode::Simple, &[cases_tf::CASES]);
}

#[test]
fn cmd_with_simple_replies() {
    run(Mode::Simple, CMD);
}

#[test]
fn cmd_with_structured_replies() {
    run(Mode::Structured, CMD);
}

#[test]
fn cmd_with_extended_headers() {
    run(Mode::Extended, CMD);
}

#[test]
fn sr_structured_replies() {
    run(Mode::Structured, &[cases_sr::CASES]);
}

#[test]
fn sr_under_extended_headers() {
    run(Mode::Extended, &[cases_sr::CASES]);
}

#[test]
fn bs_block_status() {
    run(Mode::Structured, &[cases_bs::CASES]);
}

#[test]
fn bs_under_extended_headers() {
    run(Mode::Extended, &[cases_bs::CASES]);
}

#[test]
fn eh_extended_headers() {
    run(Mode::Extended, &[cases_eh::CASES]);
}

#[test]
fn ab_abuse_of_connections() {
    run(Mode::Simple, &[cases_ab_connect::CASES]);
}

#[test]
fn ab_abuse_with_simple_replies() {
    run(Mode::Simple, &[cases_ab_fuzz::CASES, cases_ab_hold::CASES]);
}

#[test]
fn ab_abuse_with_structured_replies() {
    run(Mode::Structured, &[cases_ab_fuzz::CASES, cases_ab_hold::CASES]);
}

#[test]
fn ab_abuse_with_extended_headers() {
    run(Mode::Extended, &[cases_ab_fuzz::CASES, cases_ab_hold::CASES]);
}

#[test]
fn ab_what_only_time_shows() {
    // Each beside the other: both wait for the server's limits.
    std::thread::scope(|scope| {
        for case in cases_ab_wait::CASES.chunks(1) {
            scope.spawn(move || run(Mode::Structured, &[case]));
        }
    });
}

#[test]
fn mir_one_volume_on_two_replicas() {
    run(Mode::Simple, &[cases_mir::CASES, cases_nt::CASES]);
}

#[test]
fn names_of_cases_are_lines_of_the_checklist() {
    let names: Vec<&str> = ALL.concat().iter().map(|(name, _)| *name).collect();
    assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), names.len(), "a name comes twice");
    for name in &names {
        let mut parts = name.split('_');
        let section = parts.next().unwrap();
        assert!(["hs", "opt", "tf", "cmd", "sr", "bs", "eh", "ab", "mir", "nt"].contains(&section), "{name}");
        assert!(parts.next().is_some_and(|number| number.parse::<u8>().is_ok()), "{name}");
    }
    println!("{} cases", names.len());
    assert!(names.len() >= 100);
}
