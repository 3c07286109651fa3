//! Replays what fuzzing kept: every file of `tests/fuzz/corpus/TARGET/` and every crash that was ever found
//! (`tests/fuzz/crashes/TARGET-WHAT-IT-WAS`), through the bodies of the fuzz targets, without libFuzzer.
//!
//! `scripts/fuzz` makes the corpus and finds the crashes.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    unreachable_pub,
    missing_docs,
    dead_code,
    reason = "a test; its modules are the fuzz package's"
)]

use std::collections::BTreeMap;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

#[path = "fuzz/targets/lib.rs"]
mod targets;

use targets::{TARGETS, Target};

/// The kept corpus stays small enough to be looked at by `git` in a moment.
const CORPUS_BYTES_MAX: u64 = 1 << 20;
const CORPUS_FILES_MAX: usize = 1500;

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz").join(name)
}

/// The files of a folder in order; none where it is not there.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> =
        fs::read_dir(folder).into_iter().flatten().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

/// Runs `target` over `files`; the panics' files.
fn replay((name, run): Target, files: &[PathBuf]) -> Vec<String> {
    let fails = |file: &&PathBuf| {
        let data = fs::read(file).unwrap();
        catch_unwind(AssertUnwindSafe(|| run(&data))).is_err()
    };
    files.iter().filter(fails).map(|file| format!("{name}: {}", file.display())).collect()
}

#[test]
fn the_kept_corpus_passes() {
    let mut failed = Vec::new();
    for target in TARGETS {
        let files = files(&folder("corpus").join(target.0));
        assert!(!files.is_empty(), "no corpus for {}", target.0);
        failed.extend(replay(target, &files));
    }
    assert!(failed.is_empty(), "{failed:#?}");
}

#[test]
fn crashes_that_were_found_pass() {
    let mut failed = Vec::new();
    for file in files(&folder("crashes")) {
        let name = file.file_name().unwrap().to_str().unwrap().to_owned();
        if name == "README.md" {
            continue;
        }
        let target = TARGETS.into_iter().find(|(target, _)| name.starts_with(&format!("{target}-")));
        failed.extend(replay(target.expect("named for its target"), &[file]));
    }
    assert!(failed.is_empty(), "{failed:#?}");
}

#[test]
fn inputs_without_bytes_and_with_equal_bytes_pass() {
    for (_, run) in TARGETS {
        run(&[]);
        for byte in 0..=255 {
            run(&[byte; 200]);
        }
    }
}

#[test]
fn every_target_is_built_and_has_a_corpus_of_its_own() {
    let manifest = fs::read_to_string(folder("Cargo.toml")).unwrap();
    let mut bins: BTreeMap<&str, usize> = BTreeMap::new();
    for line in manifest.lines() {
        if let Some(path) = line.strip_prefix("path = \"fuzz_targets/") {
            *bins.entry(path.trim_end_matches(".rs\"")).or_default() += 1;
        }
    }
    let names: BTreeMap<&str, usize> = TARGETS.into_iter().map(|(name, _)| (name, 1)).collect();
    assert_eq!(bins, names);
    let kept: Vec<PathBuf> = files(&folder("corpus"));
    let corpora: Vec<&str> = kept.iter().map(|path| path.file_name().unwrap().to_str().unwrap()).collect();
    assert_eq!(corpora, names.into_keys().collect::<Vec<_>>());
}

#[test]
fn the_kept_corpus_stays_small() {
    let all: Vec<PathBuf> =
        TARGETS.iter().flat_map(|(name, _)| files(&folder("corpus").join(name))).collect();
    let bytes: u64 = all.iter().map(|file| fs::metadata(file).unwrap().len()).sum();
    assert!(all.len() <= CORPUS_FILES_MAX && bytes <= CORPUS_BYTES_MAX, "{} files, {bytes} bytes", all.len());
}
