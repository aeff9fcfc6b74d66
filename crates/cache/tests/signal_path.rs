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
use std::time::Duration;

use pinfold_cache::{FilePages, MapOutcome, Mode};
use pinfold_mem::{Access, UserMapKind};
use pinfold_store::testing::MemoryObject;
use program::Program;
use rig::{PAGE, Rig, WANT, within};

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
    within(Duration::from_secs(60), || {
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
