//! Interleavings of the cache forced step by step.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends there")]

#[path = "rig/rig.rs"]
mod rig;

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use pinfold_base::Errno;
use pinfold_cache::{
    CacheConfig, CacheError, FilePages, Lease, Mode, Pace, PinKind, ReadAhead, Want,
};
use pinfold_store::testing::{Action, DeferredObject, FaultyObject, MemoryObject, On, Rule};
use pinfold_store::{Geometry, Object, Operation, Seek, StoreResult, SyncScope, Transfer};
use rig::{MOMENT, PAGE, PATIENCE, Rig, WANT, within, write};

fn sync(file: &Arc<FilePages>) {
    file.write_back(0..u64::MAX, Mode::Integrity).unwrap();
}

/// G-2: a sync answers for every page that was dirty when it began, also for one that another pass took before it came by.
#[test]
fn g2_a_sync_waits_for_pages_that_another_pass_has_taken() {
    within(PATIENCE, || {
        let rig = Rig::new();
        let slow = DeferredObject::new(MemoryObject::new());
        let file = FilePages::new(&rig.cache, slow.clone(), 0);
        write(&file, 0..1, 1);
        write(&file, 9..10, 1);
        std::thread::scope(|scope| {
            let first = file.lock(0).unwrap();
            let pass = scope.spawn(|| sync(&file));
            std::thread::sleep(MOMENT);
            scope.spawn(|| file.write_back(9..10, Mode::Integrity).unwrap());
            assert!(slow.wait_queued(1, PATIENCE));
            drop(first);
            assert!(slow.wait_queued(2, PATIENCE));
            let own = slow.queued().iter().position(|t| t.offset == 0).unwrap();
            slow.release(own);
            std::thread::sleep(MOMENT);
            assert!(!pass.is_finished(), "page 9 is still on its way");
            slow.open();
        });
        rig.is_at_rest();
    });
}

/// A pass that waited with pages it has not sent could wait for somebody who waits for those.
#[test]
fn a_pass_sends_what_it_has_gathered_before_it_waits() {
    within(PATIENCE, || {
        let rig = Rig::new();
        let slow = DeferredObject::new(MemoryObject::new());
        let file = FilePages::new(&rig.cache, slow.clone(), 0);
        write(&file, 0..2, 1);
        std::thread::scope(|scope| {
            let second = file.lock(1).unwrap();
            scope.spawn(|| sync(&file));
            assert!(slow.wait_queued(1, PATIENCE));
            assert_eq!(
                (slow.queued()[0].offset, slow.queued()[0].len),
                (0, PAGE as u64)
            );
            drop(second);
            slow.open();
        });
        rig.is_at_rest();
    });
}

#[test]
fn an_opportunistic_pass_passes_by_what_is_locked() {
    within(PATIENCE, || {
        let rig = Rig::new();
        let file = FilePages::new(&rig.cache, MemoryObject::new(), 0);
        write(&file, 0..2, 1);
        let held = file.lock(0).unwrap();
        let sent = std::thread::scope(|scope| {
            let pass = scope.spawn(|| file.write_back(0..9, Mode::Opportunistic).unwrap());
            pass.join().unwrap()
        });
        assert_eq!(sent, 1);
        drop(held);
        sync(&file);
        rig.is_at_rest();
    });
}

/// B-4 against write-back: the pass that gets the lock after an append knows the new size.
#[test]
fn b4_the_size_is_raised_before_the_page_is_unlocked() {
    within(PATIENCE, || {
        let rig = Rig::new();
        let store = MemoryObject::new();
        let file = FilePages::new(&rig.cache, store.clone(), 0);
        let append = |from: usize, to: usize| {
            let folio = file.write_begin(0, from, to, false).unwrap();
            folio.write(from, &vec![7; to - from]);
            folio.commit_to(to as u64);
        };
        append(0, 100);
        std::thread::scope(|scope| {
            let folio = file.write_begin(0, 100, 200, false).unwrap();
            folio.write(100, &[7; 100]);
            let pass = scope.spawn(|| sync(&file));
            std::thread::sleep(MOMENT);
            assert!(!pass.is_finished());
            folio.commit_to(200);
        });
        assert_eq!(store.bytes(), vec![7; 200]);
        rig.is_at_rest();
    });
}

/// E-4, INV8: what is referenced, dirty or under write-back is not evicted however scarce frames are.
#[test]
fn e4_pages_in_use_survive_a_flood() {
    within(PATIENCE, || {
        let rig = Rig::new();
        let file = FilePages::new(
            &rig.cache,
            MemoryObject::with(&[5; 8 * PAGE]),
            8 * PAGE as u64,
        );
        let flood = FilePages::new(
            &rig.cache,
            MemoryObject::with(&vec![6; 500 * PAGE]),
            500 * PAGE as u64,
        );
        let held: Vec<_> = (0..8).map(|page| file.read(page, &WANT).unwrap()).collect();
        for page in 0..500 {
            let _ = flood.read(page, &WANT).unwrap();
        }
        for page in &held {
            let mut bytes = [0; PAGE];
            page.read(0, &mut bytes);
            assert!(bytes.iter().all(|&b| b == 5));
        }
        drop(held);
        write(&file, 0..8, 9);
        for page in 0..500 {
            let _ = flood.read(page, &WANT).unwrap();
        }
        for page in 0..8 {
            let mut byte = [0];
            file.read(page, &WANT).unwrap().read(99, &mut byte);
            assert_eq!(byte, [9]);
        }
        sync(&file);
        rig.is_at_rest();
    });
}

/// An error of a fill is told to whoever asked for that very page, and to nobody else.
#[test]
fn an_error_of_a_fill_is_told_to_those_who_asked_for_that_page() {
    within(PATIENCE, || {
        let rig = Rig::new();
        let store = FaultyObject::new(MemoryObject::with(&[1; 16 * PAGE]));
        let bad = 2 * PAGE as u64..3 * PAGE as u64;
        store.add(
            Rule::new(On::Only(Operation::Read), Action::FailAfter(0, Errno::EIO)).within(bad),
        );
        let file = FilePages::new(&rig.cache, store, 16 * PAGE as u64);
        let ahead = ReadAhead::default();
        let want = Want {
            ahead: Some(&ahead),
            ..WANT
        };
        // The first read brings its neighbours ahead, the bad page among them: not its business.
        assert!(file.read(0, &want).is_ok());
        assert!(file.read(1, &want).is_ok());
        let error = file.read(2, &want).unwrap_err();
        assert!(matches!(error, CacheError::Store(error) if error.errno == Errno::EIO));
        assert!(file.read(3, &want).is_ok());
        rig.is_at_rest();
    });
}

/// A store that fails for good, with pages that stay dirty: tried again now and then, not as fast as it can fail.
#[test]
fn a_failing_store_is_not_hammered() {
    within(PATIENCE, || {
        let rig = Rig::with(CacheConfig {
            retain_dirty_on_error: true,
            flush_interval: Duration::from_millis(50),
            dirty_age_max: Duration::ZERO,
            ..CacheConfig::default()
        });
        let store = FaultyObject::new(MemoryObject::new());
        store.add(Rule::new(
            On::Only(Operation::Write),
            Action::Fail(Errno::EIO),
        ));
        let file = FilePages::new(&rig.cache, store.clone(), 0);
        write(&file, 0..40, 1);
        std::thread::sleep(Duration::from_millis(500));
        assert!(store.struck() < 100, "{} tries", store.struck());
        assert!(file.is_dirty());
        store.clear();
        sync(&file);
        rig.is_at_rest();
    });
}

/// Leases take a share of the frames and no more, and give it back.
#[test]
fn leases_leave_frames_for_others() {
    within(PATIENCE, || {
        let rig = Rig::new();
        let file = FilePages::new(
            &rig.cache,
            MemoryObject::with(&[3; 64 * PAGE]),
            64 * PAGE as u64,
        );
        let mut lease = Lease::reserve(&file, 16).unwrap();
        assert!(Lease::reserve(&file, 1).is_none());
        for page in 0..16 {
            assert!(lease.push(file.read(page, &WANT).unwrap(), 0, PAGE));
        }
        let now = rig.cache.statistics();
        assert_eq!(now.foll_pin_acquired - now.foll_pin_released, 16);
        for page in 16..64 {
            let _ = file.read(page, &WANT).unwrap();
        }
        assert_eq!(lease.len(), 16 * PAGE);
        drop(lease);
        rig.is_at_rest();
        drop(file);
        rig.is_empty();
    });
}

/// The last handle of a file may go with a completion: nothing hangs, no frame is lost.
#[test]
fn a_file_dropped_during_read_ahead_gives_its_frames_back() {
    within(PATIENCE, || {
        let rig = Rig::new();
        let slow = DeferredObject::new(MemoryObject::with(&[1; 16 * PAGE]));
        let file = FilePages::new(&rig.cache, slow.clone(), 16 * PAGE as u64);
        file.read_ahead(0..8);
        assert!(slow.wait_queued(1, PATIENCE));
        drop(file);
        slow.open();
        rig.is_empty();
    });
}

/// T51, E-8: one pin more than the count of a page can hold is refused, changes nothing, and takes nothing from the other
/// kind or from other pages; all the counts are back in the end.
#[test]
fn t51_a_page_pinned_4095_times_refuses_the_next_pin_and_keeps_its_counts() {
    const PINS: usize = (1 << 12) - 1;
    within(PATIENCE, || {
        let rig = Rig::new();
        let file = FilePages::new(&rig.cache, MemoryObject::new(), 0);
        write(&file, 0..2, 1);
        sync(&file);
        let pins = || {
            let now = rig.cache.statistics();
            (now.foll_pin_acquired, now.foll_pin_released)
        };
        for kind in [PinKind::Read, PinKind::Write] {
            let (acquired, released) = pins();
            let mut held: Vec<_> = (0..PINS)
                .map(|_| file.pin(0, kind).unwrap().unwrap())
                .collect();
            let before = rig.cache.census().in_use;
            for _ in 0..3 {
                let refused = file.pin(0, kind).unwrap_err();
                assert_eq!(refused, CacheError::TooManyPins);
                assert_eq!(refused.errno(), Errno::ENOMEM);
            }
            assert_eq!(pins(), (acquired + PINS as u64, released), "{kind:?}");
            assert_eq!(rig.cache.census().in_use, before, "{kind:?}");
            let other = match kind {
                PinKind::Read => PinKind::Write,
                PinKind::Write => PinKind::Read,
            };
            drop(file.pin(0, other).unwrap().unwrap());
            drop(file.pin(1, kind).unwrap().unwrap());
            // Room for one is room for one.
            held.pop();
            held.push(file.pin(0, kind).unwrap().unwrap());
            file.pin(0, kind).unwrap_err();
            drop(held);
            let (acquired, released) = pins();
            assert_eq!(acquired, released, "{kind:?}");
        }
        sync(&file);
        rig.is_at_rest();
    });
}

/// A store that never ends a transfer: it lets go of it, or panics, as it is told.
#[derive(Debug)]
struct Careless {
    stored: Arc<MemoryObject>,
    asked: AtomicU64,
    panics: AtomicBool,
}

impl Careless {
    fn lose(&self, batch: Vec<Transfer>) {
        self.asked.fetch_add(1, Ordering::SeqCst);
        assert!(!self.panics.load(Ordering::SeqCst), "as it was told");
        drop(batch);
    }
}

impl Object for Careless {
    fn geometry(&self) -> Geometry {
        self.stored.geometry()
    }

    fn read(&self, batch: Vec<Transfer>) {
        self.lose(batch);
    }

    fn write(&self, batch: Vec<Transfer>) {
        self.lose(batch);
    }

    fn len(&self) -> StoreResult<u64> {
        self.stored.len()
    }

    fn set_len(&self, len: u64) -> StoreResult<()> {
        self.stored.set_len(len)
    }

    fn allocate(&self, range: Range<u64>) -> StoreResult<()> {
        self.stored.allocate(range)
    }

    fn punch(&self, range: Range<u64>) -> StoreResult<()> {
        self.stored.punch(range)
    }

    fn sync(&self, scope: SyncScope) -> StoreResult<()> {
        self.stored.sync(scope)
    }

    fn seek(&self, what: Seek, offset: u64) -> StoreResult<Option<u64>> {
        self.stored.seek(what, offset)
    }
}

#[test]
fn nobody_waits_for_a_transfer_that_the_store_never_ends() {
    within(PATIENCE, || {
        let rig = Rig::with(CacheConfig {
            // Old at once: the flusher meets the store too, and has to outlive it.
            dirty_age_max: Duration::ZERO,
            flush_interval: Duration::from_millis(1),
            ..CacheConfig::default()
        });
        let store = Arc::new(Careless {
            stored: MemoryObject::with(&[1; 4 * PAGE]),
            asked: AtomicU64::new(0),
            panics: AtomicBool::new(false),
        });
        let file = FilePages::new(&rig.cache, Arc::clone(&store) as _, 4 * PAGE as u64);
        let read = file.read(0, &WANT).map(drop).unwrap_err();
        assert_eq!(read.errno(), Errno::EIO);
        for panics in [false, true] {
            store.panics.store(panics, Ordering::SeqCst);
            let mut seen = file.errors().sample();
            let asked = store.asked.load(Ordering::SeqCst);
            write(&file, 0..3, 2);
            while store.asked.load(Ordering::SeqCst) == asked {
                // The flusher is the first to meet it.
                std::thread::yield_now();
            }
            while rig.cache.dirty_pages() > 0 {
                let sync = || file.write_back(0..u64::MAX, Mode::Integrity);
                let _failed = catch_unwind(AssertUnwindSafe(sync));
            }
            let told = file.errors().check_and_advance(&mut seen);
            assert_eq!(told, Some(Errno::EIO));
        }
        // Nor does anybody wait for the flusher, which has met the panic: there is more than may be dirty at once.
        let stored = MemoryObject::with(b"");
        let other = FilePages::new(&rig.cache, stored.clone(), 0);
        for page in 0..200 {
            rig.cache.throttle(&Pace::default()).unwrap();
            write(&other, page..page + 1, 3);
        }
        sync(&other);
        assert_eq!(stored.bytes(), vec![3; 200 * PAGE]);
        drop((file, other));
        rig.is_empty();
    });
}
