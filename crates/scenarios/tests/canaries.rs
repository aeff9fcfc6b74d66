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
    (Mutation::FaultNowAndThen, "T09", "write under signals"),
    (Mutation::ShowGarbage, "T13", "what readers see"),
    (
        Mutation::KeepGarbage,
        "T13",
        "behind the prefix the old bytes",
    ),
    (Mutation::SizeFirst, "T14", "bytes below the size"),
    (Mutation::Halve, "T16", "8192@0"),
    (Mutation::ConfuseErrors, "T16", "1@6000"),
    (Mutation::ConfuseErrors, "T17", "2 B @ 2^63-2"),
    (Mutation::IgnoreNowait, "T18", "cold read"),
    (
        Mutation::StaleDirect,
        "T41",
        "direct read after a buffered write",
    ),
];

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

#[test]
fn every_planted_fault_is_noticed_by_its_scenario() {
    let dir = tempfile::tempdir().unwrap();
    for &(mutation, scenario, check) in CANARIES {
        let target = Target::kernel(dir.path()).with(mutation);
        let record = common::run_one(target, scenario);
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
        plan.silence_max = Duration::from_secs(2);
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
        plan.silence_max = Duration::from_secs(2);
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
];

#[test]
fn every_planted_fault_is_noticed_on_the_library() {
    let dir = tempfile::tempdir().unwrap();
    for &(mutation, scenario, check) in LIBRARY_CANARIES {
        let target = Target::pinfold(dir.path(), Backend::SMALL).with(mutation);
        let record = common::run_one(target, scenario);
        noticed(&record, check);
        assert!(record.outcome.is_bad(), "{mutation:?} {scenario}");
    }
    assert!(common::is_empty(dir.path()));
}
