//! The shape of the source, held by a test: imports run one way, files stay small, `unsafe` stays where it belongs.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};

/// Each module and what it may import, besides itself. The order is the direction of imports.
const MAY_IMPORT: [(&str, &[&str]); 12] = [
    ("units", &[]),
    ("extent", &["units"]),
    ("planted", &[]),
    ("buffer", &["units", "planted"]),
    ("format", &["units", "planted"]),
    ("mirror", &["units", "extent", "buffer", "planted", "format"]),
    ("nbd", &["units", "extent", "buffer", "planted"]),
    ("engine", &["units", "extent", "buffer", "format", "mirror", "nbd"]),
    ("control", &["units", "format", "mirror", "nbd", "engine"]),
    ("attach", &["nbd", "control"]),
    ("cli", &["units", "format", "mirror", "nbd", "engine", "control", "attach"]),
    ("sim", &["units", "extent", "buffer", "planted", "format", "mirror", "nbd"]),
];
const LINES_MAX: usize = 600;

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files
}

fn source() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// The module of the crate that a file belongs to.
fn module_of(file: &Path) -> String {
    let inner = file.strip_prefix(source()).unwrap();
    let first = inner.components().next().unwrap().as_os_str().to_str().unwrap();
    first.trim_end_matches(".rs").to_owned()
}

/// The words that follow `crate::` in code (comments left out).
fn imports(text: &str) -> Vec<String> {
    let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
    let mut found = Vec::new();
    for line in code {
        for part in line.split("crate::").skip(1) {
            let word: String = part.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            found.push(word);
        }
    }
    found
}

#[test]
fn imports_run_one_way() {
    let mut wrong = Vec::new();
    for file in rust_files(&source()) {
        let module = module_of(&file);
        if module == "lib" || module == "main" || module == "bin" {
            continue;
        }
        let Some((_, allowed)) = MAY_IMPORT.iter().find(|(name, _)| *name == module) else {
            panic!("{module} is a new module: say in this test what it may import")
        };
        for import in imports(&fs::read_to_string(&file).unwrap()) {
            if import != module && !allowed.contains(&import.as_str()) {
                wrong.push(format!("{} imports {import}", file.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn the_table_of_imports_has_no_circle() {
    for (index, (name, allowed)) in MAY_IMPORT.iter().enumerate() {
        for import in *allowed {
            let earlier = MAY_IMPORT[..index].iter().any(|(other, _)| other == import);
            assert!(earlier, "{name} may import {import}, which does not stand before it");
        }
    }
}

#[test]
fn files_stay_small() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let files = ["src", "tests", "benches"].iter().flat_map(|folder| rust_files(&root.join(folder)));
    let long: Vec<String> = files
        .map(|file| (fs::read_to_string(&file).unwrap().lines().count(), file))
        .filter(|(lines, _)| *lines > LINES_MAX)
        .map(|(lines, file)| format!("{} has {lines} lines", file.display()))
        .collect();
    assert!(long.is_empty(), "{long:#?}");
}

#[test]
fn unsafe_code_is_in_the_engine_and_in_buffers_only() {
    for file in rust_files(&source()) {
        let module = module_of(&file);
        let text = fs::read_to_string(&file).unwrap();
        let has_unsafe = text.lines().any(|line| {
            let code = line.split("//").next().unwrap_or("");
            code.contains("unsafe {") || code.contains("unsafe fn") || code.contains("unsafe impl")
        });
        assert!(
            !has_unsafe || module == "engine" || module == "buffer",
            "{} has unsafe code",
            file.display()
        );
    }
}

#[test]
fn every_file_says_what_lives_in_it() {
    for file in rust_files(&source()) {
        let text = fs::read_to_string(&file).unwrap();
        assert!(text.starts_with("//!"), "{} has no header", file.display());
    }
}
