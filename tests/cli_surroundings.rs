//! The real binary where its surroundings are against it: a log that cannot be written, disks under new names,
//! somebody else's sockets.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]
#![allow(dead_code, reason = "what the other tests of the command line share")]

mod cli_support;

use std::fs::{File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;

use cli_support::{BINARY, Bench};

#[test]
fn a_log_that_cannot_be_written_costs_nobody_the_volume() {
    let bench = Bench::with_volume();
    let full = || File::options().write(true).open("/dev/full").unwrap();
    let serve = ["serve", "--name", "vol", "a", "b"];
    let mut daemon = bench.command(&serve).stdout(Stdio::null()).stderr(full()).spawn().unwrap();
    let control = bench.runtime_dir().join("vol.control");
    bench.wait_until("serving", || control.exists());
    bench.run(&["fail", "vol", "b"]).succeeds();
    bench.run(&["status", "vol"]).succeeds().says("faulty");
    bench.run(&["stop", "vol"]).succeeds();
    assert!(daemon.wait().unwrap().success());
    let mut refused = bench.command(&["stop", "vol"]).stderr(full()).spawn().unwrap();
    assert_eq!(refused.wait().unwrap().code(), Some(1));
}

#[test]
fn replicas_are_called_what_they_are_called_now() {
    let bench = Bench::with_volume();
    let rename = |from: &str, to: &str| std::fs::rename(bench.path(from), bench.path(to)).unwrap();
    // As disks do: each has the other's name after a boot.
    rename("a", "was-a");
    rename("b", "a");
    rename("was-a", "b");
    let _daemon = bench.serve(&["--name", "vol", "a", "b"]);
    bench.run(&["fail", "vol", "a"]).succeeds();
    let status = bench.status_json("vol");
    assert_eq!(status["volume"]["replicas"][1]["state"], "faulty", "the one that was `b`");
    assert_eq!(status["volume"]["replicas"][1]["path"], bench.path("a").to_str().unwrap());
    bench.run(&["examine", "b"]).succeeds().says(bench.path("a").to_str().unwrap());
}

#[test]
fn sockets_in_a_folder_that_others_may_write_in_are_not_trusted() {
    let bench = Bench::with_volume();
    let _daemon = bench.serve(&["--name", "vol", "a", "b"]);
    std::fs::set_permissions(bench.runtime_dir(), Permissions::from_mode(0o777)).unwrap();
    for args in [&["status"][..], &["status", "vol"], &["stop"], &["fail", "vol", "a"]] {
        bench.run(args).fails().says("may be written by others").says("hint:");
    }
    std::fs::set_permissions(bench.runtime_dir(), Permissions::from_mode(0o700)).unwrap();
    bench.run(&["status", "vol"]).succeeds();
}

#[test]
fn the_benchmark_without_a_bitmap_is_refused_unless_it_is_meant() {
    let bench = Bench::with_volume();
    let switch = ["serve", "--bench-no-intent", "--create", "4M"];
    let meant = |args: &[&str]| {
        // It ends by itself: it is refused. Where it is not, it is not to serve for ever.
        let mut command = bench.command_of("timeout".as_ref(), &[&["20", BINARY], args].concat());
        let out = command.env("NBDMIRROR_BENCH_UNSAFE", "yes").output().unwrap();
        assert!(!out.status.success());
        String::from_utf8(out.stderr).unwrap()
    };
    bench.run(&[&switch[..], &["c", "d"]].concat()).fails().says("NBDMIRROR_BENCH_UNSAFE=yes");
    assert!(!bench.path("c").exists());
    bench.untouched(&["a", "b"], || {
        assert!(meant(&["serve", "--bench-no-intent", "a", "b"]).contains("--create"));
        let said = meant(&[&switch[..], &["a", "b"]].concat());
        assert!(said.contains("hold a volume already") && said.contains("THE REPLICAS DIFFER"), "{said}");
    });
    bench.run(&["serve", "--help"]).succeeds().does_not_say("bench");
}
