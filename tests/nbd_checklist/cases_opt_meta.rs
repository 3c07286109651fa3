//! OPT: LIST_META_CONTEXT and SET_META_CONTEXT.

use super::ground::{EXPORT, Ground};
use super::link::{Link, Mode, cmd, context, select};
use super::raw::{Raw, meta_data, opt, rep, string};
use super::reply::err;

cases! {
    opt_33_list_meta_context_lists_all_and_base,
    opt_34_an_unknown_namespace_lists_nothing,
    opt_35_base_allocation_is_selected,
    opt_35_every_listed_context_can_be_selected,
    opt_36_queries_that_select_nothing_are_ignored,
    opt_37_no_queries_select_nothing,
    opt_38_set_meta_context_before_structured_replies,
    opt_39_malformed_queries_are_invalid,
    opt_40_a_later_selection_replaces_the_earlier,
    opt_40_a_selection_that_fails_replaces_too,
    opt_41_contexts_of_an_unknown_export,
    opt_42_five_thousand_queries,
}

const BASE: &str = "base:allocation";

/// A connection that has negotiated structured replies.
fn structured(ground: &Ground) -> Raw {
    let mut raw = ground.haggling();
    assert_eq!(raw.ask_one(opt::STRUCTURED_REPLY, &[]), rep::ACK);
    raw
}

/// The names that LIST_META_CONTEXT gives.
fn list(raw: &mut Raw, queries: &[&str]) -> Vec<String> {
    let mut replies = raw.ask(opt::LIST_META_CONTEXT, &meta_data(EXPORT, queries));
    assert_eq!(replies.pop().unwrap().kind, rep::ACK);
    replies.iter().map(|reply| context(&reply.data).1).collect()
}

/// BLOCK_STATUS has nothing to answer with.
fn nothing_is_selected(raw: Raw) {
    let mut link = Link::go(raw, Mode::Structured, EXPORT, Vec::new());
    link.refused(cmd::BLOCK_STATUS, 0, (0, 4096), &[err::EINVAL]);
}

fn opt_33_list_meta_context_lists_all_and_base(ground: &Ground) {
    let mut raw = structured(ground);
    let all = list(&mut raw, &[]);
    for wanted in [BASE, "nbdmirror:state"] {
        assert!(all.iter().any(|name| name == wanted), "{wanted} is not in {all:?}");
    }
    assert_eq!(list(&mut raw, &["base:"]), [BASE]);
    assert_eq!(list(&mut raw, &[BASE]), [BASE]);
    // What two queries find comes once.
    assert_eq!(list(&mut raw, &["base:", BASE, "base:"]), [BASE]);
    raw.in_step();
}

fn opt_34_an_unknown_namespace_lists_nothing(ground: &Ground) {
    let mut raw = structured(ground);
    for queries in
        [&["x-nobody:thing"][..], &["x-nobody:"], &["qemu:dirty-bitmap:x", "y:z"], &["base:nothing"]]
    {
        assert!(list(&mut raw, queries).is_empty(), "{queries:?}");
    }
    raw.in_step();
}

fn opt_35_base_allocation_is_selected(ground: &Ground) {
    for name in [EXPORT, b""] {
        let mut raw = structured(ground);
        let selected = select(&mut raw, name, &[BASE]);
        assert_eq!(selected.len(), 1);
        assert_eq!(selected[0].1, BASE);
        let mut link = Link::go(raw, Mode::Structured, name, selected);
        assert_eq!(link.call(cmd::BLOCK_STATUS, 0, 0, 4096).extents.len(), 1);
    }
}

fn opt_35_every_listed_context_can_be_selected(ground: &Ground) {
    let mut raw = structured(ground);
    let all = list(&mut raw, &[]);
    let queries: Vec<&str> = all.iter().map(String::as_str).collect();
    let selected = select(&mut raw, EXPORT, &queries);
    assert_eq!(selected.len(), all.len(), "{selected:?} of {all:?}");
    let mut ids: Vec<u32> = selected.iter().map(|(id, _)| *id).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), all.len(), "ids are unique: {selected:?}");
    let mut link = Link::go(raw, Mode::Structured, EXPORT, selected);
    assert_eq!(link.call(cmd::BLOCK_STATUS, 0, 0, 1 << 20).extents.len(), all.len());
}

fn opt_36_queries_that_select_nothing_are_ignored(ground: &Ground) {
    let mut raw = structured(ground);
    for query in ["base:", "base:nothing", "base:allocation2", "x-nobody:thing", "x-nobody:"] {
        assert!(select(&mut raw, EXPORT, &[query]).is_empty(), "{query}");
        let selected = select(&mut raw, EXPORT, &[query, BASE, query]);
        assert_eq!(selected.len(), 1, "{query}: {selected:?}");
    }
    assert_eq!(select(&mut raw, EXPORT, &[BASE, BASE]).len(), 1, "the same twice is one context");
    raw.in_step();
}

fn opt_37_no_queries_select_nothing(ground: &Ground) {
    let mut raw = structured(ground);
    assert!(select(&mut raw, EXPORT, &[]).is_empty());
    nothing_is_selected(raw);
}

fn opt_38_set_meta_context_before_structured_replies(ground: &Ground) {
    let mut raw = ground.haggling();
    assert_eq!(raw.ask_one(opt::SET_META_CONTEXT, &meta_data(EXPORT, &[BASE])), rep::ERR_INVALID);
    raw.in_step();
    // To list them is the client's own business: a server may refuse that or answer.
    let replies = raw.ask(opt::LIST_META_CONTEXT, &meta_data(EXPORT, &[]));
    assert!([rep::ACK, rep::ERR_INVALID].contains(&replies.last().unwrap().kind));
    raw.in_step();
    assert_eq!(raw.ask_one(opt::STRUCTURED_REPLY, &[]), rep::ACK);
    nothing_is_selected(raw);
}

/// Data of which the lengths inside do not add up.
fn malformed() -> Vec<Vec<u8>> {
    let good = meta_data(EXPORT, &[BASE]);
    let mut all: Vec<Vec<u8>> = (0..good.len()).map(|len| good[..len].to_vec()).collect();
    all.push([&good[..], &[0]].concat());
    all.push([&good[..], &good].concat());
    // A name, a count and a query that are longer than what follows.
    for claimed in [good.len() as u32, 4097, 1 << 31, u32::MAX] {
        let number = claimed.to_be_bytes();
        all.push([&number[..], &good[4..]].concat());
        all.push([&string(EXPORT)[..], &number, &string(BASE.as_bytes())].concat());
        all.push([&string(EXPORT)[..], &[0, 0, 0, 1], &number, BASE.as_bytes()].concat());
    }
    all
}

fn opt_39_malformed_queries_are_invalid(ground: &Ground) {
    let mut raw = structured(ground);
    for data in malformed() {
        for code in [opt::LIST_META_CONTEXT, opt::SET_META_CONTEXT] {
            let kind = raw.ask_one(code, &data);
            assert_eq!(kind, rep::ERR_INVALID, "option {code} with {data:?}");
        }
    }
    raw.in_step();
    // Well-formed lengths, but no namespace: a server may refuse it or ignore it.
    for query in ["base", "", ":", "allocation"] {
        let replies = raw.ask(opt::SET_META_CONTEXT, &meta_data(EXPORT, &[query]));
        assert_eq!(replies.len(), 1, "{query:?} selects something: {replies:?}");
        assert!([rep::ACK, rep::ERR_INVALID].contains(&replies[0].kind), "{query:?}: {replies:?}");
    }
    let long = "x-long:".to_owned() + &"y".repeat(5000);
    let replies = raw.ask(opt::SET_META_CONTEXT, &meta_data(EXPORT, &[&long]));
    assert_eq!(replies.len(), 1, "{replies:?}");
    raw.in_step();
}

fn opt_40_a_later_selection_replaces_the_earlier(ground: &Ground) {
    let mut raw = structured(ground);
    assert_eq!(select(&mut raw, EXPORT, &[BASE]).len(), 1);
    let selected = select(&mut raw, EXPORT, &["nbdmirror:state"]);
    assert_eq!(selected.len(), 1);
    let mut link = Link::go(raw, Mode::Structured, EXPORT, selected);
    // Whoever is not in the later selection and answers all the same fails the reply's check.
    assert_eq!(link.call(cmd::BLOCK_STATUS, 0, 0, 4096).error, 0);

    let mut raw = structured(ground);
    assert_eq!(select(&mut raw, EXPORT, &[BASE]).len(), 1);
    assert!(select(&mut raw, EXPORT, &["x-nobody:thing"]).is_empty());
    nothing_is_selected(raw);
}

fn opt_40_a_selection_that_fails_replaces_too(ground: &Ground) {
    for data in [meta_data(b"nothing", &[BASE]), vec![0; 3]] {
        let mut raw = structured(ground);
        assert_eq!(select(&mut raw, EXPORT, &[BASE]).len(), 1);
        assert!(rep::is_error(raw.ask_one(opt::SET_META_CONTEXT, &data)));
        nothing_is_selected(raw);
    }
}

fn opt_41_contexts_of_an_unknown_export(ground: &Ground) {
    let mut raw = structured(ground);
    for code in [opt::LIST_META_CONTEXT, opt::SET_META_CONTEXT] {
        for queries in [&[][..], &[BASE]] {
            let kind = raw.ask_one(code, &meta_data(b"nothing", queries));
            assert_eq!(kind, rep::ERR_UNKNOWN, "option {code}");
            raw.in_step();
        }
    }
}

fn opt_42_five_thousand_queries(ground: &Ground) {
    for query in [BASE, "x-nobody:thing", "base:", ""] {
        for code in [opt::LIST_META_CONTEXT, opt::SET_META_CONTEXT] {
            let mut raw = structured(ground);
            let _ = raw.try_send(&super::raw::option(code, &meta_data(EXPORT, &[query; 5000])));
            let Some(mut replies) = raw.try_option_replies(code) else { continue };
            let last = replies.pop().unwrap().kind;
            let open = [rep::ACK, rep::ERR_TOO_BIG, rep::ERR_INVALID];
            assert!(open.contains(&last) && replies.len() <= 1, "{query}: {last:#x} {}", replies.len());
            raw.in_step();
        }
    }
}
