//! The whole suite on the kernel's file systems: what it finds there is known and written down.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends there")]

mod common;

use pinfold_scenarios::fs::Kind;
use pinfold_scenarios::image::{Image, Memory};
use pinfold_scenarios::{Record, Tally, Target, report};

/// Sparse; larger than what T19 wants to write.
const IMAGE: u64 = 2 << 30;

fn judged(records: &[Record]) {
    println!("{}", report::table(records));
    assert!(Tally::of(records).is_good());
    assert!(
        records
            .iter()
            .any(|record| record.outcome.word() != "skipped")
    );
}

fn on_an_image_of(kind: Kind) {
    let dir = tempfile::tempdir().unwrap();
    match Image::make(dir.path(), kind, IMAGE) {
        Ok(image) => judged(&common::run_with(
            Target::kernel(image.mount_point()),
            common::scenarios(),
            |_| {},
        )),
        Err(reason) => println!("skipped: {reason}"),
    }
    assert!(common::is_empty(dir.path()));
}

#[test]
fn the_suite_finds_only_known_divergences_where_temporary_files_lie() {
    let dir = tempfile::tempdir().unwrap();
    judged(&common::run_with(
        Target::kernel(dir.path()),
        common::scenarios(),
        |_| {},
    ));
    assert!(common::is_empty(dir.path()));
}

#[test]
fn the_suite_finds_only_known_divergences_on_ext4() {
    on_an_image_of(Kind::Ext4);
}

#[test]
fn the_suite_finds_only_known_divergences_on_xfs() {
    on_an_image_of(Kind::Xfs);
}

#[test]
fn the_suite_finds_only_known_divergences_on_btrfs() {
    on_an_image_of(Kind::Btrfs);
}

#[test]
fn the_suite_finds_only_known_divergences_on_tmpfs() {
    let dir = tempfile::tempdir().unwrap();
    match Memory::make(dir.path(), IMAGE) {
        Ok(memory) => judged(&common::run_with(
            Target::kernel(memory.mount_point()),
            common::scenarios(),
            |_| {},
        )),
        Err(reason) => println!("skipped: {reason}"),
    }
    assert!(common::is_empty(dir.path()));
}
