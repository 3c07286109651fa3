//! `docs/nbd-checklist.md` against the tree: every line of the NBD checklist has its row, and what a row names exists.
//!
//! What must hold: a function, constant or file that a row names is there, and so is the test; every case of
//! `tests/nbd_checklist` stands in the row of its line.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Sections of the list and their number of lines.
const SECTIONS: [(&str, usize); 11] = [
    ("HS", 15),
    ("OPT", 51),
    ("TF", 7),
    ("CMD", 56),
    ("SR", 11),
    ("BS", 9),
    ("EH", 10),
    ("AB", 19),
    ("MIR", 4),
    ("TLS", 11),
    ("NT", 24),
];
const LEVELS: [&str; 4] = ["MUST", "SHOULD", "MAY", "ROB"];
/// Where lines on TLS may point to instead of naming code and tests.
const TLS_PAGE: &str = "see `tls.md`";
/// Lines that may point there.
const ABOUT_TLS: [&str; 2] = ["NT-08", "NT-23"];

struct Row {
    id: String,
    level: String,
    requirement: String,
    met: String,
    tests: String,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn rows() -> Vec<Row> {
    let text = fs::read_to_string(root().join("docs/nbd-checklist.md")).unwrap();
    let lines = text.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| ID "));
    lines
        .map(|line| {
            let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
            let [id, level, requirement, met, tests] = cells[..] else { panic!("not five cells: {line}") };
            let [id, level, requirement, met, tests] =
                [id, level, requirement, met, tests].map(str::to_owned);
            Row { id, level, requirement, met, tests }
        })
        .collect()
}

/// What stands between backticks.
fn named(cell: &str) -> Vec<&str> {
    cell.split('`').skip(1).step_by(2).collect()
}

/// The text of a file of the tree; each is read once.
fn text(texts: &mut HashMap<PathBuf, String>, path: PathBuf) -> Option<&str> {
    if !texts.contains_key(&path) {
        texts.insert(path.clone(), fs::read_to_string(&path).ok()?);
    }
    texts.get(&path).map(String::as_str)
}

/// Whether `name` is defined in a text as a function or a constant (or a type).
fn defines(text: &str, name: &str) -> bool {
    ["fn", "const", "struct", "enum"].iter().any(|kind| {
        let definition = format!("{kind} {name}");
        text.match_indices(&definition).any(|(at, _)| {
            let next = text[at + definition.len()..].chars().next();
            next.is_some_and(|c| !c.is_alphanumeric() && c != '_')
        })
    })
}

#[test]
fn every_line_of_the_list_has_its_row() {
    let expected: Vec<String> = SECTIONS
        .iter()
        .flat_map(|(section, count)| (1..=*count).map(move |number| format!("{section}-{number:02}")))
        .collect();
    let rows = rows();
    let found: Vec<&String> = rows.iter().map(|row| &row.id).collect();
    for (expected, found) in expected.iter().zip(&found) {
        assert_eq!(&expected, found, "rows are missing, or not in the list's order");
    }
    assert_eq!(found.len(), expected.len());
    for row in &rows {
        assert!(LEVELS.contains(&row.level.as_str()), "{}: level {}", row.id, row.level);
        assert!(!row.requirement.is_empty(), "{}: no requirement", row.id);
    }
}

#[test]
fn what_rows_name_exists() {
    let mut texts = HashMap::new();
    let mut wrong = Vec::new();
    for row in rows() {
        let about_tls = row.id.starts_with("TLS-") || ABOUT_TLS.contains(&row.id.as_str());
        for (cell, folders) in [(&row.met, &["src"][..]), (&row.tests, &["tests", "src"])] {
            if about_tls && cell == TLS_PAGE {
                continue;
            }
            let names = named(cell);
            if names.is_empty() {
                wrong.push(format!("{}: {cell:?} names nothing", row.id));
            }
            for name in names {
                let (file, item) = name.split_once("::").unwrap_or((name, ""));
                let found = folders.iter().any(|folder| {
                    let text = text(&mut texts, root().join(folder).join(file));
                    text.is_some_and(|text| item.is_empty() || defines(text, item))
                });
                let is_test = cell == &row.tests;
                if !found || (is_test && item.is_empty()) {
                    wrong.push(format!("{}: `{name}` is not there", row.id));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn every_case_stands_in_its_row() {
    let rows: HashMap<String, String> = rows().into_iter().map(|row| (row.id, row.tests)).collect();
    let mut wrong = Vec::new();
    let mut cases = 0;
    for entry in fs::read_dir(root().join("tests/nbd_checklist")).unwrap() {
        let path = entry.unwrap().path();
        let file = path.file_name().unwrap().to_str().unwrap().to_owned();
        let text = fs::read_to_string(&path).unwrap();
        let Some((_, list)) = text.split_once("\ncases! {") else { continue };
        for name in list.split_once('}').unwrap().0.split(',').map(str::trim).filter(|name| !name.is_empty())
        {
            cases += 1;
            let mut parts = name.split('_');
            let id = format!("{}-{}", parts.next().unwrap().to_uppercase(), parts.next().unwrap());
            let place = format!("`nbd_checklist/{file}::{name}`");
            if !rows.get(&id).is_some_and(|tests| tests.contains(&place)) {
                wrong.push(format!("{place} is missing in the row of {id}"));
            }
        }
    }
    assert!(cases >= 100, "{cases} cases found");
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn a_definition_is_told_from_a_mention() {
    assert!(defines("fn one() {}", "one"));
    assert!(defines("pub const LIMIT: u8 = 1;", "LIMIT"));
    assert!(!defines("fn one_more() {}", "one"));
    assert!(!defines("one();", "one"));
}
