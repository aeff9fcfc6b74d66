//! What a node does with a file's pages before another may use them, and that nothing comes back by itself.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends there")]

#[path = "rig/rig.rs"]
mod rig;

use std::sync::Arc;
use std::thread;

use pinfold_base::Errno;
use pinfold_cache::{CacheError, FilePages, Mode, PinKind, PinRefusal, ReadAhead, Want};
use pinfold_store::testing::{DeferredObject, MemoryObject};
use rig::{MOMENT, PAGE, PATIENCE, Rig, WANT, within, write};

const PAGES: u64 = 64;

fn file_of(rig: &Rig) -> (Arc<FilePages>, Arc<MemoryObject>) {
    let store = MemoryObject::with(&vec![1; PAGES as usize * PAGE]);
    let file = FilePages::new(&rig.cache, store.clone(), PAGES * PAGE as u64);
    (file, store)
}

/// INV6: a closed file has no page, and gets none: not by reading, not ahead of a reader, not because it will be needed.
#[test]
fn inv6_a_closed_file_has_no_pages_and_gets_none() {
    within(PATIENCE, || {
        let rig = Rig::new();
        let (file, _store) = file_of(&rig);
        let ahead = ReadAhead::default();
        let want = Want {
            ahead: Some(&ahead),
            ..WANT
        };
        for page in 0..4 {
            file.read(page, &want).unwrap();
        }
        file.close();
        assert_eq!(file.resident(0..PAGES), 0);
        file.read_ahead(0..PAGES);
        file.will_need(0..PAGES);
        assert!(file.read_cached(3, &ahead).is_none());
        rig.is_at_rest();
        assert_eq!(file.resident(0..PAGES), 0, "read without the right to");
        let refused = CacheError::Refused(Errno::EIO);
        assert_eq!(file.read(0, &WANT).unwrap_err(), refused);
        assert_eq!(file.write_begin(0, 0, PAGE, false).unwrap_err(), refused);
        file.reopen();
        file.read(0, &WANT).unwrap();
        file.abandon();
        file.reopen();
        assert_eq!(file.read(0, &WANT).unwrap_err(), refused);
    });
}

/// INV6: a transfer that was reading ahead when the file was closed is waited for, and its pages go.
#[test]
fn inv6_pages_on_their_way_go_with_the_others() {
    within(PATIENCE, || {
        let rig = Rig::new();
        let slow = DeferredObject::new(MemoryObject::with(&vec![1; PAGES as usize * PAGE]));
        let file = FilePages::new(&rig.cache, slow.clone(), PAGES * PAGE as u64);
        file.read_ahead(0..8);
        thread::scope(|scope| {
            let closing = scope.spawn(|| file.close());
            thread::sleep(MOMENT);
            assert!(!closing.is_finished(), "pages under way were left behind");
            slow.open();
            closing.join().unwrap();
        });
        assert_eq!(file.resident(0..PAGES), 0);
    });
}

#[test]
fn a_run_is_pinned_up_to_the_first_page_that_cannot_be_and_given_back_as_a_whole() {
    within(PATIENCE, || {
        let rig = Rig::new();
        let (file, _store) = file_of(&rig);
        write(&file, 0..40, 7);
        file.read(41, &WANT).unwrap();
        let taken = |pages, kind| {
            let (run, refused) = file.try_pin_run(pages, kind);
            let mut memory = file.segments();
            run.push(&mut memory, 100, PAGES as usize * PAGE);
            let held = rig.cache.statistics();
            let held = held.foll_pin_acquired - held.foll_pin_released;
            (held, memory.bytes(), refused)
        };
        let cold = Some(PinRefusal::Cold);
        let bytes = |pages| pages * PAGE - 100;
        assert_eq!(taken(0..40, PinKind::Write), (40, bytes(40), None));
        assert_eq!(taken(1..PAGES, PinKind::Read), (39, bytes(39), cold));
        assert_eq!(taken(41..42, PinKind::Read), (1, bytes(1), None));
        // To be written to it would have to be dirty before.
        assert_eq!(taken(41..42, PinKind::Write), (0, 0, cold));
        assert_eq!(taken(7..7, PinKind::Write), (0, 0, None));
        let rest = rig.cache.statistics();
        assert_eq!(rest.foll_pin_acquired, rest.foll_pin_released);
        file.write_back(0..u64::MAX, Mode::Integrity).unwrap();
        assert!(file.invalidate(0..PAGES), "a pin was not given back");
    });
}

/// H-12: a page that a device writes to is handed over when the device has done, and what it wrote is stored then.
#[test]
fn h12_a_hand_over_waits_for_the_transfer_that_a_pin_is_for() {
    within(PATIENCE, || {
        let rig = Rig::new();
        let (file, store) = file_of(&rig);
        write(&file, 0..4, 7);
        let (pinned, refused) = file.try_pin_run(2..3, PinKind::Write);
        assert_eq!(refused, None);
        let mut memory = file.segments();
        pinned.push(&mut memory, 0, PAGE);
        thread::scope(|scope| {
            let handing = scope.spawn(|| file.write_back(0..u64::MAX, Mode::HandOver));
            thread::sleep(MOMENT);
            assert!(!handing.is_finished(), "handed over under the device");
            // As the device does.
            assert_eq!(memory.copy_from(0, &[9; PAGE]), PAGE);
            drop((memory, pinned));
            handing.join().unwrap().unwrap();
        });
        assert!(!file.is_dirty());
        assert_eq!(store.bytes()[2 * PAGE..3 * PAGE], [9; PAGE]);
    });
}
