//! Every scenario is seen to fail: on a file system that is wrong on purpose, by the check that is meant to notice.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends there")]

mod common;

use std::time::Duration;

use pinfold_scenarios::fs::Kind;
use pinfold_scenarios::fs::mutant::Mutation;
use pinfold_scenarios::image::Image;
use pinfold_scenarios::{Backend, Outcome, Record, Target, suite};

/// (what is wrong, scenario, check that must fail)
const CANARIES: &[(Mutation, &str, &str)] = &[
    (Mutation::LosePrefix, "T01", "count"),
    (Mutation::LosePrefix, "T02", "count"),
    (Mutation::GrowOnFailure, "T03", "size unchanged"),
    (Mutation::MoveOnFailure, "T03", "position unchanged"),
    (Mutation::RefuseNothing, "T04", "write"),
    (Mutation::LosePrefix, "T05", "write count"),
    (Mutation::LosePrefix, "T06", "count"),
    (Mutation::LosePrefix, "T07", "write count"),
    (Mutation::SwallowFaults, "T08", "a record in bad memory"),
    (Mutation::FaultNowAndThen, "T09", "write under signals"),
    (Mutation::Halve, "T10", "count"),
    (Mutation::Corrupt, "T10", "contents"),
    (Mutation::Corrupt, "T11", "contents"),
    (Mutation::Corrupt, "T12", "contents"),
    (Mutation::ShowGarbage, "T13", "what readers see"),
    (
        Mutation::KeepGarbage,
        "T13",
        "behind the prefix the old bytes",
    ),
    (Mutation::SizeFirst, "T14", "bytes below the size"),
    (Mutation::TornAppend, "T15", "records"),
    (Mutation::Halve, "T16", "8192@0"),
    (Mutation::ConfuseErrors, "T16", "1@6000"),
    (Mutation::ConfuseErrors, "T17", "2 B @ 2^63-2"),
    (Mutation::IgnoreNowait, "T18", "cold read"),
    (Mutation::Halve, "T20", "count"),
    (Mutation::LosePrefix, "T20", "prefix before a bad page"),
    (Mutation::GrowGarbage, "T21", "the gap"),
    (Mutation::GrowGarbage, "T22", "grown over a store"),
    (Mutation::Corrupt, "T23", "contents"),
    (Mutation::Separate, "T24", "map and file agree"),
    (Mutation::ConfuseErrors, "T25", "unaligned"),
    (Mutation::CorruptDirectRead, "T26", "what was read"),
    (Mutation::MoveOnFailure, "T27", "position"),
    (Mutation::GrowOnFailure, "T28", "size when extending"),
    (Mutation::Halve, "T29", "count"),
    (Mutation::Corrupt, "T29", "contents"),
    (Mutation::Corrupt, "T30", "as read"),
    (Mutation::Corrupt, "T31", "as read"),
    (Mutation::StaleDirect, "T32", "as mapped"),
    (Mutation::Corrupt, "T33", "contents"),
    (Mutation::IdleDirect, "T34", "a write from the next file"),
    (Mutation::LateDirect, "T35", "no older generation"),
    (Mutation::LateDirect, "T37", "no zeros"),
    (Mutation::SizeFirst, "T38", "bytes below the size"),
    (Mutation::LateDirect, "T38", "the size never falls back"),
    (Mutation::LateDirect, "T39", "what was written"),
    (Mutation::LateDirect, "T40", "what was written"),
    (
        Mutation::StaleDirect,
        "T41",
        "direct read after a buffered write",
    ),
    (Mutation::CorruptDirectRead, "T43", "zeros in good memory"),
    (Mutation::Corrupt, "T45", "contents"),
    (Mutation::LateDirect, "T46", "read after the write"),
    (Mutation::Separate, "T48", "when stored"),
    (Mutation::Separate, "T49", "map and file agree"),
    (Mutation::LeakPins, "T52", "all are given back"),
    (Mutation::Separate, "T53", "what is stored"),
    (Mutation::GrowGarbage, "T54", "regrown bytes"),
    (Mutation::Separate, "T55", "the hole as mapped"),
    (Mutation::GrowGarbage, "T56", "read directly after it grew"),
    (Mutation::LaxMsync, "T57", "SYNC and ASYNC"),
    (Mutation::Separate, "T57", "stored by SYNC"),
    (Mutation::Separate, "T66", "the count when stored"),
    (Mutation::Halve, "T67", "a call under signals"),
];

/// Scenarios with a test of their own below.
const ELSEWHERE: &[&str] = &["T19", "T58", "T59", "T60"];
#[test]
fn every_scenario_has_a_fault_that_it_notices() {
    let shown = |number: &str| {
        CANARIES
            .iter()
            .chain(LIBRARY_CANARIES)
            .any(|(_, scenario, _)| *scenario == number)
    };
    for scenario in suite::all() {
        let number = scenario.number;
        let listed = ELSEWHERE.contains(&number);
        assert!(shown(number) || listed, "{number} was never seen to fail");
    }
}

fn names(record: &Record) -> Vec<&str> {
    match &record.outcome {
        Outcome::Failed { failures } | Outcome::Diverges { failures, .. } => failures
            .iter()
            .map(|failure| failure.check.as_str())
            .collect(),
        _ => Vec::new(),
    }
}

#[track_caller]
fn noticed(record: &Record, check: &str) {
    assert!(
        names(record).contains(&check),
        "{} did not fail in {check:?} but {:?}",
        record.scenario,
        record.outcome
    );
}

/// How long races go on: what is noticed by chance alone is given more of it on a busy machine.
const RACES_MS: [u64; 3] = [300, 3_000, 30_000];

/// Runs a scenario until it fails in `check`, each time longer.
fn provoked(target: &Target, number: &str, check: &str) -> Record {
    let mut last = None;
    for race in RACES_MS.map(Duration::from_millis) {
        let scenario = suite::find(number).unwrap();
        let change = |plan: &mut pinfold_scenarios::Plan| plan.race = race;
        let record = common::run_with(target.clone(), vec![scenario], change).remove(0);
        if names(&record).contains(&check) {
            return record;
        }
        last = Some(record);
    }
    last.unwrap()
}

#[test]
fn every_planted_fault_is_noticed_by_its_scenario() {
    let dir = tempfile::tempdir().unwrap();
    for &(mutation, scenario, check) in CANARIES {
        let target = Target::kernel(dir.path()).with(mutation);
        let record = provoked(&target, scenario, check);
        noticed(&record, check);
        // A failure that is known on this file system is the only one that may pass for a divergence.
        let known = matches!(record.outcome, Outcome::Diverges { .. });
        assert_eq!(record.outcome.is_bad(), !known, "{mutation:?} {scenario}");
    }
    assert!(common::is_empty(dir.path()));
}

#[test]
fn t19_a_write_that_starts_with_its_end_is_noticed_when_killed() {
    let dir = tempfile::tempdir().unwrap();
    let target = Target::kernel(dir.path()).with(Mutation::BackToFront);
    let record = common::run_one(target, "T19");
    noticed(&record, "a whole prefix");
}

#[test]
fn t58_an_fsync_that_never_ends_is_killed_and_its_stacks_are_reported() {
    let dir = tempfile::tempdir().unwrap();
    let target = Target::kernel(dir.path()).with(Mutation::HangInSync);
    let scenario = suite::find("T58").unwrap();
    let record = common::run_with(target, vec![scenario], |plan| {
        plan.silence_max = Duration::from_secs(1);
    })
    .remove(0);
    let Outcome::Hung { why, stacks } = &record.outcome else {
        panic!("{:?}", record.outcome);
    };
    assert!(why.contains("silent"), "{why}");
    assert!(stacks.contains("syscall: "), "{stacks}");
    let gdb = std::process::Command::new("gdb").arg("--version").output();
    if gdb.is_ok() {
        assert!(stacks.contains("mutant.rs"), "{stacks}");
    }
    assert!(
        common::is_empty(dir.path()),
        "a killed scenario leaves nothing"
    );
}

#[test]
fn t59_errors_that_are_forgotten_or_repeated_are_noticed() {
    for (mutation, check) in [
        (
            Mutation::ForgetErrors,
            "the second descriptor's first fsync",
        ),
        (
            Mutation::RepeatErrors,
            "the first descriptor's second fsync",
        ),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let record = common::run_one(Target::kernel(dir.path()).with(mutation), "T59");
        if let Outcome::Skipped { reason } = record.outcome {
            return println!("skipped: {reason}");
        }
        noticed(&record, check);
        assert!(common::is_empty(dir.path()));
    }
}

#[test]
fn a_scenario_that_dies_is_a_failure() {
    let dir = tempfile::tempdir().unwrap();
    let record = common::run_one(Target::kernel(dir.path()).with(Mutation::Die), "T01");
    noticed(&record, "end with a result");
    assert!(common::is_empty(dir.path()));
}

#[test]
fn mounts_that_a_killed_scenario_left_are_unmounted() {
    // T59 mounts an image; its first fsync hangs, so the child is killed with everything mounted.
    let dir = tempfile::tempdir().unwrap();
    let probe = tempfile::tempdir().unwrap();
    if let Err(reason) = Image::make(probe.path(), Kind::Ext4, 64 << 20) {
        return println!("skipped: {reason}");
    }
    let scenario = suite::find("T59").unwrap();
    let target = Target::kernel(dir.path()).with(Mutation::HangInSync);
    let record = common::run_with(target, vec![scenario], |plan| {
        plan.silence_max = Duration::from_secs(1);
    })
    .remove(0);
    assert!(
        matches!(record.outcome, Outcome::Hung { .. }),
        "{:?}",
        record.outcome
    );
    assert!(common::is_empty(dir.path()));
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(dir.path().to_str().unwrap()), "{mounts}");
}

/// The same for what only the library can show, or shows in another way.
const LIBRARY_CANARIES: &[(Mutation, &str, &str)] = &[
    (Mutation::ShowGarbage, "T13", "what readers see"),
    (
        Mutation::StaleDirect,
        "T41",
        "direct read after a buffered write",
    ),
    (Mutation::IgnoreNowait, "T18", "cold read"),
    (Mutation::IgnoreCancel, "T19", "a call was cut short"),
    (Mutation::LateDirect, "T36", "no older generation"),
    (
        Mutation::IgnoreDsync,
        "T42",
        "what was acknowledged is there",
    ),
    (Mutation::SlowSync, "T50", "fsync does not wait for it"),
    (Mutation::Separate, "T53", "what is stored"),
    (Mutation::Separate, "T55", "the hole as mapped"),
    (Mutation::GrowGarbage, "T56", "read directly after it grew"),
    (
        Mutation::ForgetErrors,
        "T59",
        "the second descriptor's first fsync",
    ),
    (
        Mutation::RepeatErrors,
        "T59",
        "the first descriptor's second fsync",
    ),
    (
        Mutation::IgnoreNowait,
        "T60",
        "NOWAIT over the limit is EAGAIN",
    ),
    (Mutation::StarveOne, "T60", "every writer gets on"),
    (Mutation::HoldALock, "T65", "no thread panics"),
];

#[test]
fn every_planted_fault_is_noticed_on_the_library() {
    let dir = tempfile::tempdir().unwrap();
    for &(mutation, scenario, check) in LIBRARY_CANARIES {
        let target = Target::pinfold(dir.path(), Backend::SMALL).with(mutation);
        let record = provoked(&target, scenario, check);
        noticed(&record, check);
        assert!(record.outcome.is_bad(), "{mutation:?} {scenario}");
    }
    assert!(common::is_empty(dir.path()));
}
