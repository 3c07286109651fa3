//! `scripts/bench` works: a run of a few seconds whose figures mean nothing.

use std::path::Path;
use std::time::Duration;

use crate::support::daemon::BINARY;
use crate::support::skip;
use crate::support::tools::{Beside, missing};

const BENCH_MAX: Duration = Duration::from_secs(300);

#[test]
fn the_benchmark_measures_and_saves() {
    if let Some(tool) = missing(&["fio", "python3"]) {
        return skip(&format!("{tool} is not installed"));
    }
    let folder = tempfile::tempdir().unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/bench");
    let (out, log) = (folder.path().join("out"), folder.path().join("log"));
    let args = ["--selftest", "--binary", BINARY, "--disk", folder.path().to_str().unwrap(), "--out"];
    let args = args.iter().map(AsRef::as_ref).chain([out.as_os_str()]);
    let success = Beside::start(script.to_str().unwrap(), args, &log).wait(BENCH_MAX);
    let said = std::fs::read_to_string(&log).unwrap();
    assert!(success, "{said}");
    assert!(said.contains("| nbdmirror, two replicas |"), "{said}");
    let results = std::fs::read_to_string(out.join("results.json")).unwrap();
    let results: serde_json::Value = serde_json::from_str(&results).unwrap();
    let cells = results["cells"].as_array().unwrap();
    for job in ["randread-4k-qd32", "randwrite-4k-qd1"] {
        let cell = cells.iter().find(|cell| cell["contender"] == "nbdmirror" && cell["job"] == job);
        let sample = &cell.unwrap_or_else(|| panic!("no {job}: {said}"))["samples"][0];
        assert!(sample["ops_per_s"].as_f64().unwrap() > 0.0 && sample["p999_us"].as_f64().unwrap() > 0.0);
        assert!(sample["cpu_us_per_op"].is_number());
    }
    assert!(std::fs::read_to_string(out.join("disk-unix-rate.svg")).unwrap().ends_with("</svg>\n"));
}
