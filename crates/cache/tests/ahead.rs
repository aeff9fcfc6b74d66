//! What is read before anybody asks for it, counted in the store's transfers.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends there")]

#[path = "rig/rig.rs"]
mod rig;

use std::sync::Arc;
use std::time::Duration;

use pinfold_cache::{FilePages, Walks};
use pinfold_store::testing::{DeferredObject, MemoryObject};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use rig::{PAGE, Rig as Cached, WANT, within};

/// Pages of every file here: fewer than the budget of [`Cached::with_room`] holds.
const PAGES: u64 = 12_288;
const WATCHDOG: Duration = Duration::from_secs(60);

/// A file of zeros whose store holds every transfer until it is let go.
fn file_of(rig: &Cached) -> (Arc<FilePages>, Arc<DeferredObject>) {
    let store = MemoryObject::with(&vec![0; PAGES as usize * PAGE]);
    let store = DeferredObject::new(store);
    let file = FilePages::new(&rig.cache, store.clone(), PAGES * PAGE as u64);
    (file, store)
}

/// Lists the transfers under way, in pages, lowest first.
fn under_way(store: &DeferredObject) -> Vec<(u64, u64)> {
    let page = PAGE as u64;
    let queued = store.queued();
    let mut pages: Vec<_> = queued
        .iter()
        .map(|transfer| (transfer.offset / page, transfer.len / page))
        .collect();
    pages.sort_unstable();
    pages
}

fn with_file(body: impl FnOnce(&Cached, &Arc<FilePages>, &DeferredObject) + Send + 'static) {
    within(WATCHDOG, move || {
        let rig = Cached::with_room();
        let (file, store) = file_of(&rig);
        body(&rig, &file, &store);
        store.open();
        rig.is_at_rest();
        drop((file, store));
        rig.is_empty();
    });
}

/// What a mapping does at a fault; returns whether reading was started.
fn fault(file: &Arc<FilePages>, walks: &Walks, page: u64) -> bool {
    let due = walks.note(page, walks.at(page));
    if due {
        file.start_walks(walks);
    }
    due
}

#[test]
fn a_stride_of_faults_has_its_next_pages_read_together() {
    with_file(|_, file, store| {
        let walks = Walks::default();
        for step in 0..4 {
            assert!(!fault(file, &walks, 100 + step * 37), "four prove nothing");
        }
        assert!(fault(file, &walks, 100 + 4 * 37));
        let next: Vec<_> = (5..9).map(|step| (100 + step * 37, 1)).collect();
        assert_eq!(under_way(store), next, "one page each, all under way");
        store.release_all();
        for step in 5..200 {
            fault(file, &walks, 100 + step * 37);
            store.release_all();
            assert!(
                file.get(100 + step * 37).is_some(),
                "step {step} was missed"
            );
        }
    });
}

#[test]
fn a_stride_beyond_the_end_of_the_file_reads_nothing_there() {
    with_file(|rig, file, store| {
        let walks = Walks::default();
        for step in (1..=5).rev() {
            fault(file, &walks, PAGES - step * 50);
        }
        assert_eq!(under_way(store), []);
        assert_eq!(rig.cache.statistics().pages_read_ahead, 0);
    });
}

#[test]
fn faults_at_random_make_the_store_read_nothing_but_their_pages() {
    with_file(|rig, file, store| {
        store.open();
        let walks = Walks::default();
        let mut rng = SmallRng::seed_from_u64(11);
        let mut read = std::collections::HashSet::new();
        for _ in 0..4000 {
            let page = rng.random_range(0..PAGES);
            fault(file, &walks, page);
            drop(file.read(page, &WANT).unwrap());
            read.insert(page);
        }
        let statistics = rig.cache.statistics();
        assert_eq!(statistics.pages_read, read.len() as u64);
        assert_eq!(statistics.pages_read_ahead, 0);
    });
}

#[test]
fn what_will_be_needed_is_read_in_large_transfers_all_under_way_together() {
    with_file(|_, file, store| {
        file.will_need(1000..1000 + 2048);
        let parts: Vec<_> = (0..16).map(|part| (1000 + part * 128, 128)).collect();
        assert_eq!(under_way(store), parts);
        file.will_need(1000..1000 + 2048);
        assert_eq!(under_way(store), parts, "nothing twice");
    });
}

#[test]
fn what_will_be_needed_takes_half_of_the_budget_at_most_and_outlives_a_scan() {
    with_file(|rig, file, store| {
        store.open();
        let half = rig.cache.pages_max() as u64 / 2;
        file.will_need(0..PAGES);
        assert_eq!(file.resident(0..PAGES) as u64, half);
        let (other, theirs) = file_of(rig);
        theirs.open();
        for page in 0..PAGES {
            drop(other.read(page, &WANT).unwrap());
        }
        assert_eq!(file.resident(0..half) as u64, half, "a scan drove it out");
    });
}
