//! What a signal handler runs allocates nothing: the faulting thread may hold the allocator's lock.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends there")]
#![allow(unsafe_code, reason = "an allocator that counts")]

#[path = "rig/program.rs"]
mod program;
#[path = "rig/rig.rs"]
mod rig;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use pinfold_cache::{FilePages, Here, MapOutcome, Mode, ReadAhead, SIGNAL_MOVES_MAX};
use pinfold_mem::{Access, UserMapKind};
use pinfold_store::testing::MemoryObject;
use program::Program;
use rig::{PAGE, PATIENCE, Rig, WANT, within};

const PAGES: u64 = 64;

thread_local! {
    static CALLS: Cell<u64> = const { Cell::new(0) };
}

/// The system's allocator, which counts this thread's calls.
struct Counting;

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        CALLS.set(CALLS.get() + 1);
        // SAFETY: the caller's promise, passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        CALLS.set(CALLS.get() + 1);
        // SAFETY: the caller's promise, passed on.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn t67_a_fault_served_at_once_allocates_nothing() {
    within(PATIENCE, || {
        let rig = Rig::with_room();
        let store = MemoryObject::with(&vec![7; PAGES as usize * PAGE]);
        let file = FilePages::new(&rig.cache, store, PAGES * PAGE as u64);
        if let Some(program) = Program::start(&file, PAGES, UserMapKind::SharedWrite) {
            for page in 0..PAGES {
                drop(file.read(page, &WANT).unwrap());
            }
            // Prepares the neighbourhood, as the first fault in it does.
            program.store(0, 0, 1);
            drop(file.lock(0));
            file.note_dirty_file();
            let mut served = 0;
            let before = CALLS.get();
            for page in 1..PAGES {
                for access in [Access::Read, Access::Write] {
                    let answer = file.try_map(page, access, &program);
                    served += u64::from(answer == Some(MapOutcome::Mapped));
                }
            }
            assert_eq!(CALLS.get() - before, 0);
            assert_eq!(served, 2 * (PAGES - 1));
            assert_eq!(rig.cache.census().dirty_accounted, PAGES as usize);
            file.write_back(0..u64::MAX, Mode::Integrity).unwrap();
        }
    });
}

#[test]
fn t67_a_page_read_by_the_thread_that_faults_allocates_nothing_and_makes_its_own_room() {
    within(PATIENCE, || {
        let rig = Rig::new();
        // Four times the budget: most faults evict, from windows and from the arena.
        let pages = 4 * rig.cache.pages_max() as u64;
        let store = MemoryObject::with(&vec![7; pages as usize * PAGE]);
        let file = FilePages::new(&rig.cache, store, pages * PAGE as u64);
        if let Some(program) = Program::start(&file, pages, UserMapKind::SharedWrite) {
            let ahead = ReadAhead::default();
            let (mut at, rounds) = (0, 32 * pages);
            let mut fault = || {
                // Odd, so that it comes to every page, and never to a neighbour.
                at = (at + 77) % pages;
                let here = Here {
                    moves: SIGNAL_MOVES_MAX,
                    around: at - at % 16..at - at % 16 + 16,
                    ahead: Some(&ahead),
                    store: true,
                };
                file.map_here(at, Access::Read, &here, &program)
            };
            let (mut served, before, read) = (0, CALLS.get(), rig.cache.statistics().pages_read);
            for _ in 0..rounds {
                served += u64::from(fault() == Some(MapOutcome::Mapped));
            }
            assert_eq!(CALLS.get() - before, 0);
            // Some meet a page that another thread of the cache has just then.
            assert!(served > rounds * 9 / 10, "{served} of {rounds} served");
            let read = rig.cache.statistics().pages_read - read;
            assert!(
                read > rounds / 2,
                "{read} pages were read for {served} faults"
            );
            let census = rig.cache.census();
            assert_eq!(census.dirty_accounted, 0);
            assert_eq!(program.load_word(at, 0), 0x0707_0707_0707_0707);
        }
    });
}
