//! Pages in user mappings, served by a userfaultfd of the test's own: the promises of SEMANTICS.md section F that the cache
//! keeps, whoever delivers the faults.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends there")]

#[path = "rig/program.rs"]
mod program;
#[path = "rig/rig.rs"]
mod rig;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pinfold_cache::{FilePages, MapOutcome, MapTarget, Mode, PinKind, ReverseMap};
use pinfold_mem::uffd::Installed;
use pinfold_mem::{Access, RawSpan, UserMapKind};
use pinfold_store::Object;
use pinfold_store::testing::{DeferredObject, MemoryObject};
use program::Program;
use rig::{PAGE, PATIENCE, Rig, WANT, within, write};

/// Pages of the file most tests map.
const PAGES: u64 = 16;

fn byte_of(page: u64) -> u8 {
    (page as u8).wrapping_add(1)
}

/// A file whose page `i` is full of the byte `i + 1`.
fn file_of(rig: &Rig, pages: u64) -> (Arc<FilePages>, Arc<MemoryObject>) {
    let bytes: Vec<u8> = (0..pages).flat_map(|page| [byte_of(page); PAGE]).collect();
    let store = MemoryObject::with(&bytes);
    let file = FilePages::new(&rig.cache, store.clone(), pages * PAGE as u64);
    (file, store)
}

fn with_program(
    pages: u64,
    kind: UserMapKind,
    body: impl FnOnce(&Rig, &Arc<FilePages>, &Arc<MemoryObject>, &Program) + Send + 'static,
) {
    with_budget(Rig::new, pages, kind, body);
}

fn with_budget(
    rig: fn() -> Rig,
    pages: u64,
    kind: UserMapKind,
    body: impl FnOnce(&Rig, &Arc<FilePages>, &Arc<MemoryObject>, &Program) + Send + 'static,
) {
    within(PATIENCE, move || {
        let rig = rig();
        let (file, store) = file_of(&rig, pages);
        {
            let Some(program) = Program::start(&file, pages, kind) else {
                return;
            };
            body(&rig, &file, &store, &program);
            file.write_back(0..u64::MAX, Mode::Integrity).unwrap();
        }
        rig.is_at_rest();
        drop((file, store));
        rig.is_empty();
    });
}

#[test]
fn a_mapping_shows_what_the_file_has_and_keeps_what_is_stored() {
    with_program(
        PAGES,
        UserMapKind::SharedWrite,
        |rig, file, store, program| {
            for page in 0..PAGES {
                assert_eq!(program.load(page, 7), byte_of(page));
            }
            program.store(3, 7, 200);
            assert_eq!(program.load(3, 7), 200);
            let found = file.read(3, &WANT).unwrap();
            let mut byte = [0];
            found.read(7, &mut byte);
            assert_eq!(byte, [200], "read and map see one memory");
            drop(found);
            assert!(file.is_dirty());
            file.write_back(0..u64::MAX, Mode::Integrity).unwrap();
            assert_eq!(store.bytes()[3 * PAGE + 7], 200);
            assert!(!file.is_dirty());
            // Protected again by the pass: the next store is noticed.
            program.store(3, 7, 201);
            assert!(file.is_dirty());
            file.write_back(0..u64::MAX, Mode::Integrity).unwrap();
            assert_eq!(store.bytes()[3 * PAGE + 7], 201);
            // Loads went on as soon as their pages were mapped; a move ends with the page's lock.
            for page in 0..PAGES {
                drop(file.lock(page));
            }
            assert_eq!(rig.cache.statistics().moved, PAGES);
        },
    );
}

#[test]
fn what_is_written_appears_in_the_mapping() {
    with_program(PAGES, UserMapKind::SharedRead, |_, file, _, program| {
        write(file, 0..1, 50);
        assert_eq!(program.load(0, 0), 50);
        write(file, 0..2, 60);
        assert_eq!((program.load(0, 0), program.load(1, 0)), (60, 60));
        file.write_back(0..u64::MAX, Mode::Integrity).unwrap();
    });
}

#[test]
fn an_evicted_page_is_gone_from_the_mapping_and_comes_back_as_it_is_now() {
    with_program(PAGES, UserMapKind::SharedRead, |rig, file, _, program| {
        let (other, _) = file_of(rig, 200);
        let mut gone = 0;
        for round in 0..3 {
            for page in 0..PAGES {
                let expected = if round == 0 {
                    byte_of(page)
                } else {
                    100 + round
                };
                assert_eq!(program.load(page, 5), expected, "round {round}");
            }
            for page in (0..200).chain(0..200) {
                drop(other.read(page, &WANT).unwrap());
            }
            gone += file
                .resident_map(0..PAGES)
                .iter()
                .filter(|&&there| !there)
                .count();
            write(file, 0..PAGES, 101 + round);
            file.write_back(0..u64::MAX, Mode::Integrity).unwrap();
        }
        assert!(gone > 0, "nothing was evicted");
        drop(other);
    });
}

#[test]
fn a_mapping_many_times_the_budget_is_walked_through() {
    with_program(
        200,
        UserMapKind::SharedWrite,
        |rig, file, store, program| {
            for round in 0..3u8 {
                for page in 0..200 {
                    let was = program.load(page, 0);
                    let wanted = if round == 0 { byte_of(page) } else { round - 1 };
                    assert_eq!(was, wanted, "page {page} in round {round}");
                    program.store(page, 0, round);
                    let census = rig.cache.census();
                    assert!(census.valid <= census.frames, "{census:?}");
                }
            }
            file.write_back(0..u64::MAX, Mode::Integrity).unwrap();
            assert!(store.bytes().chunks(PAGE).all(|page| page[0] == 2));
            assert!(rig.cache.statistics().evicted > 300);
        },
    );
}

#[test]
fn windows_and_buffered_reads_share_the_budget_and_the_arena_comes_back() {
    with_program(64, UserMapKind::SharedRead, |rig, _file, _, program| {
        let (other, _) = file_of(rig, 200);
        let arena = rig.cache.arena();
        for round in 0..3 {
            for page in 0..64 {
                assert_eq!(program.load(page, 1), byte_of(page));
            }
            let squeezed = arena.populated();
            assert!(squeezed <= 24, "{squeezed} pages of the arena are left");
            for page in (0..200).chain(0..200) {
                let mut byte = [0];
                other.read(page, &WANT).unwrap().read(0, &mut byte);
                assert_eq!(byte[0], byte_of(page), "round {round}");
            }
            assert!(arena.populated() > squeezed, "the arena stays small");
        }
        drop(other);
    });
}

#[test]
fn a_private_mapping_shows_the_file_and_keeps_its_stores_to_itself() {
    with_program(PAGES, UserMapKind::Private, |rig, file, store, program| {
        assert_eq!(program.load(2, 0), 3);
        program.store(2, 0, 99);
        program.store(5, 0, 98);
        assert_eq!((program.load(2, 0), program.load(5, 0)), (99, 98));
        assert!(!file.is_dirty());
        let mut byte = [0];
        file.read(2, &WANT).unwrap().read(0, &mut byte);
        assert_eq!(byte, [3]);
        // Evicted: the copies stay, the rest comes back.
        let (other, _) = file_of(rig, 200);
        for page in (0..200).chain(0..200) {
            drop(other.read(page, &WANT).unwrap());
        }
        assert_eq!((program.load(2, 0), program.load(4, 0)), (99, 5));
        assert_eq!(store.bytes()[2 * PAGE], 3);
        drop(other);
    });
}

#[test]
fn truncation_takes_pages_out_of_mappings_and_growth_shows_zeros() {
    with_program(
        PAGES,
        UserMapKind::SharedWrite,
        |_, file, store, program| {
            for page in 0..PAGES {
                program.store(page, 300, 77);
            }
            let block = file.gate().block();
            file.truncate(4 * PAGE as u64 + 100);
            store.set_len(4 * PAGE as u64 + 100).unwrap();
            drop(block);
            // Past the end in the last page: storable, never the file's.
            assert_eq!(program.load(4, 300), 0);
            program.store(4, 300, 78);
            file.zero_past_end(file.end());
            let faults = program.faults();
            program.store(4, 50, 80);
            assert!(program.faults() > faults, "stores go on while it is zeroed");
            file.set_end(PAGES * PAGE as u64);
            assert_eq!((program.load(3, 300), program.load(4, 300)), (77, 0));
            for page in 5..PAGES {
                assert_eq!(program.load(page, 300), 0, "page {page}");
            }
            // Let in again after the growth.
            program.store(4, 300, 79);
            file.write_back(0..u64::MAX, Mode::Integrity).unwrap();
            assert_eq!(store.bytes()[4 * PAGE + 300], 79);
        },
    );
}

#[test]
fn a_page_beyond_the_end_is_not_mapped() {
    with_program(PAGES, UserMapKind::SharedRead, |_, file, _, program| {
        file.set_end(3 * PAGE as u64);
        for access in [Access::Read, Access::Write] {
            let answer = file.map(3, access, 0..PAGES, None, program);
            assert_eq!(answer, Ok(MapOutcome::BeyondEnd));
            assert_eq!(
                file.try_map(3, access, program),
                Some(MapOutcome::BeyondEnd)
            );
        }
        assert_eq!(
            file.map(2, Access::Read, 0..PAGES, None, program),
            Ok(MapOutcome::Mapped)
        );
        assert_eq!(program.mapped(), 2..3, "neighbours past the end stay out");
        file.set_end(PAGES * PAGE as u64);
    });
}

#[test]
fn cached_neighbours_come_along() {
    with_budget(
        Rig::with_room,
        PAGES,
        UserMapKind::SharedWrite,
        |_, file, _, program| {
            for page in 2..9 {
                drop(file.read(page, &WANT).unwrap());
            }
            assert_eq!(program.load(5, 0), 6);
            // The load went on when its own page was mapped; the others may still be on their way.
            let all = || (program.mapped() == (2..9)).then_some(());
            let arrived = (0..1000).find_map(|_| all().or_else(pause));
            assert!(arrived.is_some(), "{:?}", program.mapped());
            // For reading only.
            program.store(6, 0, 1);
            assert_eq!(file.next_dirty(0), Some(6));
            assert_eq!(file.next_dirty(7), None);
        },
    );
}

#[test]
fn t67_a_page_that_is_referenced_moves_and_its_reader_keeps_a_snapshot() {
    with_program(PAGES, UserMapKind::SharedWrite, |rig, file, _, program| {
        let reader = file.read(0, &WANT).unwrap();
        program.store(0, 0, 88);
        let mut byte = [0];
        reader.read(0, &mut byte);
        assert_eq!(byte, [1], "what was there when the page moved");
        file.read(0, &WANT).unwrap().read(0, &mut byte);
        assert_eq!(byte, [88]);
        assert_eq!(rig.cache.census().in_use, 1);
        drop(reader);
        assert_eq!(rig.cache.census().in_use, 0);
    });
}

#[test]
fn e9_a_page_that_a_device_writes_to_is_stored_as_a_copy_and_stays_dirty() {
    with_program(
        PAGES,
        UserMapKind::SharedWrite,
        |rig, file, store, program| {
            assert_eq!(program.load(1, 0), 2);
            let pin = file.pin(1, PinKind::Write).unwrap().unwrap();
            let mut segments = file.segments();
            pin.push(&mut segments, 0, PAGE);
            segments.copy_from(0, b"device");
            file.write_back(0..u64::MAX, Mode::Opportunistic).unwrap();
            assert_eq!(store.bytes()[PAGE], 2, "skipped");
            file.write_back(0..u64::MAX, Mode::Integrity).unwrap();
            assert_eq!(&store.bytes()[PAGE..PAGE + 6], b"device");
            segments.copy_from(0, b"later!");
            drop((pin, segments));
            assert!(file.is_dirty());
            file.write_back(0..u64::MAX, Mode::Integrity).unwrap();
            assert_eq!(&store.bytes()[PAGE..PAGE + 6], b"later!");
            let counted = rig.cache.statistics();
            assert_eq!(
                (counted.foll_pin_acquired, counted.foll_pin_released),
                (1, 1)
            );
        },
    );
}

#[test]
fn a_pinned_page_moves_only_after_the_pin_is_gone() {
    with_program(PAGES, UserMapKind::SharedWrite, |_, file, _, program| {
        let pin = file.pin(1, PinKind::Read).unwrap().unwrap();
        assert_eq!(file.try_map(1, Access::Read, program), None);
        std::thread::scope(|scope| {
            let loads = scope.spawn(|| program.load(1, 0));
            std::thread::sleep(rig::MOMENT);
            assert!(!loads.is_finished());
            drop(pin);
            assert_eq!(loads.join().unwrap(), 2);
        });
    });
}

#[test]
fn a_page_pinned_in_a_mapping_stays_there() {
    with_program(PAGES, UserMapKind::SharedWrite, |rig, file, _, program| {
        let pins: Vec<_> = (2..5)
            .map(|page| file.pin_mapped(page, PinKind::Write, program))
            .collect();
        let (other, _) = file_of(rig, 200);
        for page in (0..200).chain(0..200) {
            drop(other.read(page, &WANT).unwrap());
        }
        file.write_back(0..u64::MAX, Mode::Integrity).unwrap();
        file.invalidate(0..u64::MAX);
        assert_eq!(program.mapped(), 2..5);
        let end = file.pin_mapped(PAGES, PinKind::Read, program).unwrap();
        assert!(end.is_none());
        assert!(pins.iter().all(|pin| matches!(pin, Ok(Some(_)))));
        drop((pins, other));
    });
}

#[test]
fn write_back_of_a_file_longer_than_its_mapping_finds_its_way() {
    within(PATIENCE, || {
        let rig = Rig::with_room();
        let (file, store) = file_of(&rig, 1000);
        let kind = UserMapKind::SharedWrite;
        if let Some(program) = Program::start(&file, 2, kind) {
            write(&file, 0..1000, 7);
            program.store(1, 0, 8);
            file.write_back(0..u64::MAX, Mode::Integrity).unwrap();
            assert_eq!((store.bytes()[PAGE], store.bytes()[999 * PAGE]), (8, 7));
        }
        drop(file);
        rig.is_empty();
    });
}

#[test]
fn a_fault_that_needs_no_waiting_is_served_at_once() {
    with_budget(
        Rig::with_room,
        PAGES,
        UserMapKind::SharedWrite,
        |_, file, _, program| {
            assert_eq!(file.try_map(0, Access::Read, program), None, "not cached");
            drop(file.read(0, &WANT).unwrap());
            assert_eq!(
                file.try_map(0, Access::Read, program),
                Some(MapOutcome::Mapped)
            );
            assert_eq!(
                file.try_map(0, Access::Write, program),
                None,
                "nothing prepared"
            );
            program.store(1, 0, 5);
            // Who served the store looks at the neighbours, this one among them.
            let served = || file.try_map(0, Access::Write, program);
            assert_eq!(
                (0..1000).find_map(|_| served().or_else(pause)),
                Some(MapOutcome::Mapped)
            );
            assert_eq!(file.next_dirty(0), Some(0));
            let held = (0..1000).find_map(|_| file.try_lock_dirty(0).or_else(pause));
            assert!(held.is_some());
            assert_eq!(file.try_map(0, Access::Read, program), None, "locked");
            drop(held);
            assert!(file.try_lock_dirty(2).is_none());
            assert_eq!(file.make_writable(2), Ok(MapOutcome::Mapped));
            assert!(file.try_lock_dirty(2).is_some());
            assert_eq!(file.resident_map(0..4), [true, true, true, false]);
        },
    );
}

#[test]
fn t53_every_store_is_found_in_the_store_however_often_it_is_synced() {
    with_program(8, UserMapKind::SharedWrite, |_, file, store, program| {
        program.serve_more();
        let stop = AtomicBool::new(false);
        clear(program, 8);
        let counts: Vec<u64> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..2u64)
                .map(|thread| {
                    let stop = &stop;
                    scope.spawn(move || {
                        let mut count = 0u64;
                        while !stop.load(Ordering::Relaxed) {
                            count += 1;
                            for page in 0..8 {
                                program.store_word(page, thread as usize * 8, count);
                            }
                        }
                        count
                    })
                })
                .collect();
            let end = Instant::now() + Duration::from_secs(2);
            let mut syncs = 0;
            let mut seen = [0u64; 2];
            while Instant::now() < end {
                file.write_back(0..u64::MAX, Mode::Integrity).unwrap();
                syncs += 1;
                let bytes = store.bytes();
                for (thread, seen) in seen.iter_mut().enumerate() {
                    let word = u64::from_le_bytes(bytes[thread * 8..][..8].try_into().unwrap());
                    assert!(word >= *seen, "{word} was stored after {seen}");
                    *seen = word;
                }
            }
            stop.store(true, Ordering::Relaxed);
            assert!(syncs > 20);
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        file.write_back(0..u64::MAX, Mode::Integrity).unwrap();
        let bytes = store.bytes();
        for page in 0..8 {
            for (thread, &count) in counts.iter().enumerate() {
                let at = page * PAGE + thread * 8;
                let word = u64::from_le_bytes(bytes[at..][..8].try_into().unwrap());
                assert_eq!(word, count, "page {page}, thread {thread}");
            }
        }
    });
}

#[test]
fn no_store_is_lost_when_pages_come_and_go() {
    with_program(
        256,
        UserMapKind::SharedWrite,
        |rig, file, store, program| {
            program.serve_more();
            let done = AtomicU64::new(0);
            clear(program, 256);
            std::thread::scope(|scope| {
                for thread in 0..3u64 {
                    let done = &done;
                    scope.spawn(move || {
                        let mut at = thread * 7919;
                        for count in 1..=1500u64 {
                            at = at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                            let page = (at >> 33) % 256;
                            let place = 64 + thread as usize * 8;
                            let before = program.load_word(page, place);
                            assert!(before < count, "a store of the future");
                            program.store_word(page, place, count);
                            assert_eq!(program.load_word(page, place), count);
                        }
                        done.fetch_add(1, Ordering::Relaxed);
                    });
                }
                scope.spawn(|| {
                    let (other, _) = file_of(rig, 200);
                    let mut page = 0;
                    while done.load(Ordering::Relaxed) < 3 {
                        let mut byte = [0];
                        other.read(page, &WANT).unwrap().read(9, &mut byte);
                        assert_eq!(byte[0], byte_of(page));
                        page = (page + 1) % 200;
                        if page % 50 == 0 {
                            file.write_back(0..u64::MAX, Mode::Integrity).unwrap();
                            file.invalidate(0..100);
                        }
                    }
                });
            });
            let last: Vec<[u64; 3]> = (0..256)
                .map(|page| [0, 1, 2].map(|thread| program.load_word(page, 64 + thread * 8)))
                .collect();
            file.write_back(0..u64::MAX, Mode::Integrity).unwrap();
            let bytes = store.bytes();
            for (page, words) in last.iter().enumerate() {
                for (thread, &word) in words.iter().enumerate() {
                    let at = page * PAGE + 64 + thread * 8;
                    let stored = u64::from_le_bytes(bytes[at..][..8].try_into().unwrap());
                    assert_eq!(stored, word, "page {page}, thread {thread}");
                }
            }
        },
    );
}

/// Stores zeros where words are counted.
fn clear(program: &Program, pages: u64) {
    for page in 0..pages {
        for at in (0..PAGE).step_by(8) {
            program.store_word(page, at, 0);
        }
    }
}

fn pause<T>() -> Option<T> {
    std::thread::sleep(Duration::from_millis(1));
    None
}

/// A mapping in which nothing must be installed.
struct Forbidden;

impl MapTarget for Forbidden {
    fn covers(&self) -> std::ops::Range<u64> {
        0..PAGES
    }

    fn shared(&self) -> bool {
        true
    }

    fn copy(&self, page: u64, _from: RawSpan, _protect: bool) -> Installed {
        panic!("page {page} is installed beyond the end");
    }

    fn resume(&self, pages: std::ops::Range<u64>, _protect: bool) -> Installed {
        panic!("pages {pages:?} are installed beyond the end");
    }

    fn unprotect(&self, pages: std::ops::Range<u64>) {
        panic!("pages {pages:?} may be stored to beyond the end");
    }
}

impl ReverseMap for Forbidden {
    fn unmap(&self, _pages: std::ops::Range<u64>) {}

    fn protect(&self, _pages: std::ops::Range<u64>) {}
}

/// F-3, INV1: whoever has seen the old size looks again when he has the page.
#[test]
fn t54_a_fault_that_overtakes_a_truncation_maps_nothing_beyond_the_end() {
    type Call = fn(&Arc<FilePages>) -> MapOutcome;
    let calls: [Call; 5] = [
        |file| {
            file.map(3, Access::Read, 0..PAGES, None, &Forbidden)
                .unwrap()
        },
        |file| {
            file.map(3, Access::Write, 0..PAGES, None, &Forbidden)
                .unwrap()
        },
        |file| file.make_writable(3).unwrap(),
        |file| match file.pin(3, PinKind::Write).unwrap() {
            Some(_) => MapOutcome::Mapped,
            None => MapOutcome::BeyondEnd,
        },
        |file| match file.pin_mapped(3, PinKind::Read, &Forbidden).unwrap() {
            Some(_) => MapOutcome::Mapped,
            None => MapOutcome::BeyondEnd,
        },
    ];
    for call in calls {
        within(PATIENCE, move || {
            // With room for a place in the window, or the fault looks at the size once more while it makes some.
            let rig = Rig::with_room();
            let bytes = vec![9; PAGES as usize * PAGE];
            let store = DeferredObject::new(MemoryObject::with(&bytes));
            let file = FilePages::new(&rig.cache, store.clone(), PAGES * PAGE as u64);
            file.open_window(PAGES, Arc::new(Forbidden)).unwrap();
            let outcome = std::thread::scope(|scope| {
                let faulting = scope.spawn(|| call(&file));
                // It has seen the size and waits for the page. The truncation sets the size, and then waits for it too.
                assert!(store.wait_queued(1, PATIENCE), "nothing was read");
                file.set_end(PAGE as u64);
                store.release_all();
                faulting.join().unwrap()
            });
            assert_eq!(outcome, MapOutcome::BeyondEnd);
            assert!(!file.is_dirty(), "a page beyond the end is dirty");
            file.truncate(PAGE as u64);
            drop((file, store));
            rig.is_empty();
        });
    }
}
