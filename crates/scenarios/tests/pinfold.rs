//! The whole suite on this library, with very little memory and with plenty.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends there")]

mod common;

use pinfold_scenarios::fs::Kind;
use pinfold_scenarios::image::{Image, Memory};
use pinfold_scenarios::scenario::Failure;
use pinfold_scenarios::{Backend, Outcome, Record, Target, report};

/// What does not hold yet: (scenario, check, what is missing). To be empty.
const OPEN: &[(&str, &str, &str)] = &[];

/// What cannot be run: (scenario, reason it is skipped for).
const MISSING: &[(&str, &str)] = &[("T39", "blocks are larger than 512 bytes")];

/// The scenarios that map: those that it matters to who serves faults.
const MAPPING: &[&str] = &[
    "T10", "T11", "T12", "T20", "T21", "T22", "T23", "T24", "T29", "T30", "T31", "T32", "T33",
    "T34", "T36", "T40", "T45", "T46", "T48", "T49", "T50", "T53", "T54", "T55", "T56", "T57",
    "T65", "T66", "T67",
];

fn is_open(scenario: &str, failure: &Failure) -> bool {
    let found = OPEN
        .iter()
        .find(|(number, check, _)| *number == scenario && *check == failure.check);
    if let Some((_, _, missing)) = found {
        println!("open: {scenario} {}: {missing}", failure.check);
    }
    found.is_some()
}

/// On the library nothing diverges, and nothing is skipped but what is listed.
fn judged(records: &[Record]) {
    println!("{}", report::table(records));
    for record in records {
        let open = match &record.outcome {
            Outcome::Failed { failures } => failures
                .iter()
                .all(|failure| is_open(&record.scenario, failure)),
            Outcome::Skipped { reason } => {
                MISSING.contains(&(record.scenario.as_str(), reason.as_str()))
            }
            Outcome::Passed { .. } => true,
            _ => false,
        };
        assert!(open, "{}", report::row(record));
    }
}

fn on_a_directory_with(backend: Backend) {
    let dir = tempfile::tempdir().unwrap();
    judged(&common::run_with(
        Target::pinfold(dir.path(), backend),
        common::scenarios(),
        |_| {},
    ));
    assert!(common::is_empty(dir.path()));
}

#[test]
fn the_suite_passes_on_the_library_with_64_pages() {
    on_a_directory_with(Backend::SMALL);
}

#[test]
fn the_suite_passes_on_the_library_with_64_mebibytes() {
    on_a_directory_with(Backend::ROOMY);
}

fn with_faults_served_inline(backend: Backend) {
    let dir = tempfile::tempdir().unwrap();
    let mut scenarios = common::scenarios();
    scenarios.retain(|scenario| MAPPING.contains(&scenario.number));
    let target = Target::pinfold(dir.path(), backend.inline());
    judged(&common::run_with(target, scenarios, |_| {}));
    assert!(common::is_empty(dir.path()));
}

#[test]
fn mappings_with_inline_faults_pass_with_64_pages() {
    with_faults_served_inline(Backend::SMALL);
}

#[test]
fn mappings_with_inline_faults_pass_with_64_mebibytes() {
    with_faults_served_inline(Backend::ROOMY);
}

/// The scenarios of direct writes: those that it matters to when cold memory is brought in.
const DIRECT: &[&str] = &[
    "T28", "T29", "T30", "T31", "T32", "T33", "T34", "T35", "T36", "T37", "T38", "T39", "T40",
    "T41", "T45", "T46",
];

fn with_faults_disabled_mapping(backend: Backend) {
    let dir = tempfile::tempdir().unwrap();
    let mut scenarios = common::scenarios();
    scenarios.retain(|scenario| DIRECT.contains(&scenario.number));
    let target = Target::pinfold(dir.path(), backend.faults_disabled_mapping());
    judged(&common::run_with(target, scenarios, |_| {}));
    assert!(common::is_empty(dir.path()));
}

#[test]
fn direct_io_in_the_faults_disabled_mapping_mode_passes_with_64_pages() {
    with_faults_disabled_mapping(Backend::SMALL);
}

#[test]
fn direct_io_in_the_faults_disabled_mapping_mode_passes_with_64_mebibytes() {
    with_faults_disabled_mapping(Backend::ROOMY.inline());
}

#[test]
fn the_suite_passes_on_the_library_on_xfs() {
    let dir = tempfile::tempdir().unwrap();
    match Image::make(dir.path(), Kind::Xfs, 2 << 30) {
        Ok(image) => judged(&common::run_with(
            Target::pinfold(image.mount_point(), Backend::SMALL),
            common::scenarios(),
            |_| {},
        )),
        Err(reason) => println!("skipped: {reason}"),
    }
    assert!(common::is_empty(dir.path()));
}

#[test]
fn the_suite_passes_on_the_library_on_tmpfs() {
    let dir = tempfile::tempdir().unwrap();
    match Memory::make(dir.path(), 2 << 30) {
        Ok(memory) => judged(&common::run_with(
            Target::pinfold(memory.mount_point(), Backend::SMALL),
            common::scenarios(),
            |_| {},
        )),
        Err(reason) => println!("skipped: {reason}"),
    }
    assert!(common::is_empty(dir.path()));
}
