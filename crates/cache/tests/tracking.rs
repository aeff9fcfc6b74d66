//! Stores that make no fault (docs/decisions/0007-dirty-tracking.md), on the real kernel: none is lost, whoever syncs or
//! evicts meanwhile.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends there")]

#[path = "rig/program.rs"]
mod program;
#[path = "rig/rig.rs"]
mod rig;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pinfold_cache::{FilePages, Harvest, Mode};
use pinfold_store::testing::MemoryObject;
use program::Program;
use rig::{PAGE, PATIENCE, Rig, WANT, within, write};

fn with_program(
    pages: u64,
    body: impl FnOnce(&Rig, &Arc<FilePages>, &Arc<MemoryObject>, &Program) + Send + 'static,
) {
    within(PATIENCE, move || {
        let rig = Rig::new();
        let (file, store) = file_of(&rig, pages);
        let Some(program) = Program::tracked(&file, pages) else {
            return;
        };
        body(&rig, &file, &store, &program);
        file.write_back(0..u64::MAX, Mode::Integrity).unwrap();
        drop(program);
        // What was stored last has been found when the mapping went; the pass forgets the file.
        file.write_back(0..u64::MAX, Mode::Integrity).unwrap();
        rig.is_at_rest();
        drop((file, store));
        rig.is_empty();
    });
}

fn file_of(rig: &Rig, pages: u64) -> (Arc<FilePages>, Arc<MemoryObject>) {
    let store = MemoryObject::with(&vec![0; pages as usize * PAGE]);
    let file = FilePages::new(&rig.cache, store.clone(), pages * PAGE as u64);
    (file, store)
}

fn stored_word(bytes: &[u8], page: u64, at: usize) -> u64 {
    let at = page as usize * PAGE + at;
    u64::from_le_bytes(bytes[at..][..8].try_into().unwrap())
}

#[test]
fn a_store_to_a_page_mapped_for_reading_makes_no_fault_and_is_written_back() {
    with_program(8, |rig, file, store, program| {
        assert_eq!(program.load(3, 0), 0);
        let faults = program.faults();
        program.store(3, 7, 200);
        assert_eq!(program.faults(), faults);
        assert_eq!(file.next_known_dirty(0), None);
        assert_eq!(file.next_dirty(0), Some(3), "nobody can rule it out");
        file.write_back(0..u64::MAX, Mode::Integrity).unwrap();
        assert_eq!(store.bytes()[3 * PAGE + 7], 200);
        // The pass has protected it: the next store is seen as well, and once.
        program.store(3, 7, 201);
        assert_eq!(program.faults(), faults);
        file.harvest(0..u64::MAX, Harvest::Wait);
        assert_eq!(file.next_known_dirty(0), Some(3));
        file.write_back(0..u64::MAX, Mode::Integrity).unwrap();
        assert_eq!(store.bytes()[3 * PAGE + 7], 201);
        file.harvest(0..u64::MAX, Harvest::Wait);
        assert_eq!(file.next_known_dirty(0), None);
        assert_eq!(rig.cache.statistics().stores_found, 2);
    });
}

#[test]
fn a_page_that_was_only_read_is_never_written() {
    with_program(8, |rig, file, _, program| {
        for page in 0..8 {
            assert_eq!(program.load(page, 0), 0);
        }
        program.store(5, 0, 1);
        file.write_back(0..u64::MAX, Mode::Integrity).unwrap();
        assert_eq!(rig.cache.statistics().pages_written, 1);
    });
}

#[test]
fn a_page_that_was_stored_to_is_not_invalidated_and_one_that_was_not_is() {
    with_program(8, |_, file, store, program| {
        assert_eq!((program.load(1, 0), program.load(2, 0)), (0, 0));
        program.store(1, 0, 5);
        assert!(!file.invalidate(0..8), "dropped a store");
        assert_eq!(file.resident_map(1..3), [true, false]);
        file.write_back(0..u64::MAX, Mode::Integrity).unwrap();
        assert_eq!(store.bytes()[PAGE], 5);
        assert!(file.invalidate(0..8));
        assert_eq!(program.load(1, 0), 5);
    });
}

#[test]
fn a_store_to_a_withdrawn_page_waits_until_the_gate_opens() {
    with_program(8, |_, file, _, program| {
        assert_eq!(program.load(1, 0), 0);
        program.store(1, 0, 1);
        let blocked = file.gate().block();
        file.harvest(0..8, Harvest::Withdraw);
        assert_eq!(file.next_known_dirty(0), Some(1));
        std::thread::scope(|scope| {
            let stores = scope.spawn(|| program.store(1, 0, 2));
            let loads = scope.spawn(|| program.load(1, 8));
            std::thread::sleep(rig::MOMENT);
            assert!(!stores.is_finished(), "a store came by");
            assert!(!loads.is_finished(), "an entry came that stores pass by");
            drop(blocked);
            stores.join().unwrap();
            loads.join().unwrap();
        });
        assert_eq!(program.load(1, 0), 2);
    });
}

#[test]
fn inv7_stores_past_the_end_do_not_come_to_light() {
    with_program(8, |_, file, _, program| {
        let end = 4 * PAGE as u64 + 100;
        assert_eq!(program.load(4, 300), 0);
        {
            let _blocked = file.gate().block();
            file.truncate(end);
        }
        assert_eq!(program.load(4, 0), 0);
        program.store(4, 300, 78);
        let faults = program.faults();
        file.zero_past_end(end);
        program.store(4, 50, 80);
        assert!(program.faults() > faults, "stores go on while it is zeroed");
        file.set_end(8 * PAGE as u64);
        assert_eq!((program.load(4, 300), program.load(4, 50)), (0, 80));
    });
}

/// F-6: what is zeroed before the last page is stored lies behind the end, also of a file that grows just then.
#[test]
fn f6_a_store_to_what_the_file_has_just_grown_over_is_not_zeroed() {
    with_program(8, |_, file, store, program| {
        let end = 4 * PAGE as u64 + 100;
        {
            let _blocked = file.gate().block();
            file.truncate(end);
        }
        assert_eq!(program.load(4, 0), 0);
        // Before the page is dirty, which the flusher may be the first to see.
        program.grow_and_store_late(8 * PAGE as u64, 300, 78);
        program.store(4, 50, 80);
        file.write_back(0..u64::MAX, Mode::Integrity).unwrap();
        assert_eq!(
            file.end(),
            8 * PAGE as u64,
            "the size was told before stores were kept out"
        );
        assert_eq!((program.load(4, 300), program.load(4, 50)), (78, 80));
        file.write_back(0..u64::MAX, Mode::Integrity).unwrap();
        let bytes = store.bytes();
        assert_eq!((bytes[4 * PAGE + 300], bytes[4 * PAGE + 50]), (78, 80));
    });
}

#[test]
fn a_store_found_when_its_page_should_go_keeps_it() {
    with_program(16, |rig, file, store, program| {
        for page in 0..16 {
            assert_eq!(program.load(page, 0), 0);
        }
        program.store(7, 9, 77);
        let (other, _) = file_of(rig, 200);
        for page in (0..200).chain(0..200) {
            drop(other.read(page, &WANT).unwrap());
        }
        assert!(file.resident_map(0..16).contains(&false), "nothing went");
        // Found by whoever wanted its room; it may have been written back and have gone since.
        assert_eq!(rig.cache.statistics().stores_found, 1);
        file.write_back(0..u64::MAX, Mode::Integrity).unwrap();
        assert_eq!(program.load(7, 9), 77);
        assert_eq!(store.bytes()[7 * PAGE + 9], 77);
        drop(other);
    });
}

#[test]
fn a_store_between_the_question_and_the_end_of_the_entry_is_not_lost() {
    with_program(16, |rig, file, store, program| {
        for page in 0..16 {
            assert_eq!(program.load(page, 0), 0);
        }
        program.store_late(99);
        let (other, _) = file_of(rig, 200);
        for page in (0..200).chain(0..200) {
            drop(other.read(page, &WANT).unwrap());
        }
        assert_eq!(rig.cache.statistics().stores_found, 1);
        file.write_back(0..u64::MAX, Mode::Integrity).unwrap();
        let stored: Vec<u64> = (0..16)
            .filter(|&page| store.bytes()[page as usize * PAGE] == 99)
            .collect();
        assert_eq!(stored.len(), 1);
        assert_eq!(program.load(stored[0], 0), 99);
        drop(other);
    });
}

#[test]
fn a_store_whose_entry_the_program_has_dropped_is_not_lost_when_the_page_is_mapped_again() {
    with_program(16, |_, file, store, program| {
        for page in 0..16 {
            assert_eq!(program.load(page, 0), 0);
        }
        program.store(3, 0, 33);
        program.store(9, 0, 99);
        program.drop_entries(0..16);
        // By its own fault, and as a neighbour.
        assert_eq!(program.load(3, 0), 33);
        assert_eq!(program.load(8, 0), 0);
        assert_eq!(program.load(9, 0), 99);
        file.write_back(0..u64::MAX, Mode::Integrity).unwrap();
        let stored = |page: usize| store.bytes()[page * PAGE];
        assert_eq!((stored(3), stored(9)), (33, 99));
        // Once looked at, what was not stored to is clean.
        assert_eq!(file.next_known_dirty(0), None);
    });
}

#[test]
fn t53_every_store_is_in_the_store_when_the_sync_after_it_has_ended() {
    with_program(8, |_, file, store, program| {
        program.serve_more();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for thread in 0..2u64 {
                let (stop, store) = (&stop, &store);
                scope.spawn(move || {
                    let (at, mut count) = (thread as usize * 8, 0);
                    while !stop.load(Ordering::Relaxed) {
                        count += 1;
                        let page = count % 8;
                        program.store_word(page, at, count);
                        if count % 7 == 0 {
                            file.write_back(0..u64::MAX, Mode::Integrity).unwrap();
                            assert_eq!(stored_word(&store.bytes(), page, at), count);
                        }
                    }
                });
            }
            let end = Instant::now() + Duration::from_secs(2);
            while Instant::now() < end {
                file.write_back(0..u64::MAX, Mode::Opportunistic).unwrap();
                file.harvest(0..u64::MAX, Harvest::Try);
            }
            stop.store(true, Ordering::Relaxed);
        });
    });
}

/// Pages of the file whose pages come and go, four times the budget.
const MANY: u64 = 256;
const THREADS: u64 = 3;

#[test]
fn no_store_is_lost_when_pages_come_and_go() {
    with_program(MANY, |rig, file, store, program| {
        program.serve_more();
        let done = AtomicU64::new(0);
        let last: Vec<Vec<u64>> = std::thread::scope(|scope| {
            let storing: Vec<_> = (0..THREADS)
                .map(|thread| {
                    let done = &done;
                    scope.spawn(move || {
                        let _counted = Counted(done);
                        store_here_and_there(program, thread)
                    })
                })
                .collect();
            scope.spawn(|| {
                let (other, _) = file_of(rig, 200);
                let mut page = 0;
                while done.load(Ordering::Relaxed) < THREADS {
                    drop(other.read(page, &WANT).unwrap());
                    page = (page + 1) % 200;
                    if page.is_multiple_of(20) {
                        file.write_back(0..u64::MAX, Mode::Integrity).unwrap();
                        file.invalidate(0..100);
                    }
                    if page == 50 {
                        write(file, MANY - 1..MANY, 9);
                    }
                }
            });
            storing.into_iter().map(|t| t.join().unwrap()).collect()
        });
        assert!(rig.cache.statistics().stores_found > 0);
        file.write_back(0..u64::MAX, Mode::Integrity).unwrap();
        let bytes = store.bytes();
        for (thread, last) in last.iter().enumerate() {
            for (page, &count) in (0..).zip(last) {
                let stored = stored_word(&bytes, page, 64 + thread * 8);
                assert_eq!(stored, count, "page {page}, thread {thread}");
            }
        }
    });
}

/// Counts a thread that has ended, one way or the other.
struct Counted<'a>(&'a AtomicU64);

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// Stores counts to words of random pages, each of which must still be what was stored to it last; returns those.
fn store_here_and_there(program: &Program, thread: u64) -> Vec<u64> {
    let place = 64 + thread as usize * 8;
    let mut last = vec![0; MANY as usize - 1];
    let mut at = thread * 7919;
    for count in 1..=4000 {
        at = at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let page = (at >> 33) % (MANY - 1);
        // Read first: the store that follows mostly finds an entry and makes no fault.
        let before = program.load_word(page, place);
        assert_eq!(before, last[page as usize], "page {page} lost a store");
        program.store_word(page, place, count);
        last[page as usize] = count;
    }
    last
}
