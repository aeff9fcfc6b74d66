//! The protocols of the cache under loom: every interleaving of a few threads, stale loads included.
//!
//! Run with `RUSTFLAGS="--cfg loom" cargo test -p pinfold-cache --release --test loom`, in a target directory of its own.
//! A sleeper nobody wakes is a deadlock to loom, so a lost wake-up fails these without an assertion.
#![cfg(loom)]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends there")]

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicI64, AtomicU64, AtomicUsize, Ordering};
use loom::thread;
use pinfold_base::Errno;
use pinfold_cache::state::{
    DIRTY, HOME_ARENA, HOME_WINDOW, LOCKED, PinKind, RefOutcome, StateWord, UMAP_RW, UPTODATE,
    WRITEBACK, is_unused,
};
use pinfold_cache::wait::WaitTable;
use pinfold_cache::{ErrSeq, Gate};

/// Explores with a bound on preemptions: three find what people find.
fn bounded(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
}

/// A page with a frame whose accesses loom checks, and the table its sleepers use.
struct Page {
    word: StateWord,
    frame: UnsafeCell<u64>,
    waits: WaitTable,
}

impl Page {
    fn new(flags: u64) -> Arc<Self> {
        let page = Self {
            word: StateWord::default(),
            frame: UnsafeCell::new(0),
            waits: WaitTable::default(),
        };
        page.word.install(HOME_ARENA);
        let _ = page.word.unlock(flags, 0);
        Arc::new(page)
    }

    fn wake_if(&self, sleepers: bool) {
        if sleepers {
            self.waits.wake(0);
        }
    }

    /// Looks at the bytes; loom fails when somebody changes them meanwhile.
    fn read(&self) {
        self.frame.with(|_| ());
    }

    /// Changes the bytes; loom fails when anybody else is at them.
    fn reuse(&self) {
        self.frame.with_mut(|_| ());
    }
}

#[test]
fn inv8_a_frame_is_not_reused_under_a_reference() {
    loom::model(|| {
        let page = Page::new(UPTODATE);
        let reader = {
            let page = page.clone();
            thread::spawn(move || {
                if page.word.try_ref() == RefOutcome::Taken {
                    page.read();
                    page.wake_if(page.word.unref());
                }
            })
        };
        if page.word.begin_evict() {
            page.reuse();
            page.wake_if(page.word.release());
        }
        reader.join().unwrap();
    });
}

#[test]
fn a_page_is_locked_by_one_and_evicted_by_one() {
    loom::model(|| {
        let page = Page::new(UPTODATE);
        let others: Vec<_> = (0..2)
            .map(|i| {
                let page = page.clone();
                thread::spawn(move || {
                    if i == 0 && page.word.begin_evict() {
                        page.reuse();
                        page.wake_if(page.word.release());
                    } else if i == 1 && page.word.try_lock().is_ok() {
                        page.reuse();
                        page.wake_if(page.word.unlock(UPTODATE | DIRTY, 0));
                    }
                })
            })
            .collect();
        for other in others {
            other.join().unwrap();
        }
        let state = page.word.load();
        assert!(state == 0 || state & LOCKED == 0);
    });
}

#[test]
fn a_discard_waits_for_the_reader_and_is_woken() {
    loom::model(|| {
        let page = Page::new(UPTODATE);
        let reader = {
            let page = page.clone();
            thread::spawn(move || {
                if page.word.try_ref() == RefOutcome::Taken {
                    page.read();
                    page.wake_if(page.word.unref());
                }
            })
        };
        page.word.try_lock().unwrap();
        page.word.doom();
        page.waits.wait(0, &page.word, None, is_unused);
        page.reuse();
        page.wake_if(page.word.release());
        reader.join().unwrap();
    });
}

#[test]
fn a_discard_waits_for_the_transfer_and_for_the_reader() {
    bounded(3, || {
        let page = Page::new(UPTODATE | DIRTY);
        page.word.try_lock().unwrap();
        page.word.clean_for_write();
        let _ = page.word.unlock(0, 0);
        let transfer = {
            let page = page.clone();
            thread::spawn(move || {
                page.read();
                page.wake_if(page.word.end_write(0));
            })
        };
        let reader = {
            let page = page.clone();
            thread::spawn(move || {
                if page.word.try_ref() == RefOutcome::Taken {
                    page.read();
                    page.wake_if(page.word.unref());
                }
            })
        };
        page.word.try_lock().unwrap();
        page.word.doom();
        page.waits.wait(0, &page.word, None, is_unused);
        page.reuse();
        page.wake_if(page.word.release());
        transfer.join().unwrap();
        reader.join().unwrap();
    });
}

#[test]
fn everybody_who_waits_for_a_lock_is_woken() {
    bounded(3, || {
        let page = Page::new(UPTODATE);
        page.word.try_lock().unwrap();
        let sleepers: Vec<_> = (0..2)
            .map(|_| {
                let page = page.clone();
                thread::spawn(move || {
                    loop {
                        match page.word.try_lock() {
                            Ok(_) => break,
                            Err(_) => {
                                page.waits
                                    .wait(0, &page.word, None, |state| state & LOCKED == 0);
                            }
                        }
                    }
                    page.reuse();
                    page.wake_if(page.word.unlock(0, 0));
                })
            })
            .collect();
        page.reuse();
        page.wake_if(page.word.unlock(0, 0));
        for sleeper in sleepers {
            sleeper.join().unwrap();
        }
    });
}

/// G-5 and F-2: what is stored after the write-back began is stored again, or still dirty.
#[test]
fn g5_no_store_is_lost_between_dirty_and_write_back() {
    loom::model(|| {
        let page = Page::new(UPTODATE | DIRTY);
        let bytes = Arc::new(AtomicU64::new(1));
        let writer = {
            let (page, bytes) = (page.clone(), bytes.clone());
            thread::spawn(move || {
                while page.word.try_lock().is_err() {
                    page.waits
                        .wait(0, &page.word, None, |state| state & LOCKED == 0);
                }
                bytes.store(2, Ordering::Relaxed);
                page.wake_if(page.word.unlock(UPTODATE | DIRTY, 0));
            })
        };
        let mut stored = 0;
        if page.word.try_lock().is_ok() {
            page.word.clean_for_write();
            page.wake_if(page.word.unlock(0, 0));
            stored = bytes.load(Ordering::Relaxed);
            page.wake_if(page.word.end_write(0));
        }
        writer.join().unwrap();
        assert!(page.word.load() & DIRTY != 0 || stored == 2);
        assert_eq!(page.word.load() & (WRITEBACK | LOCKED), 0);
    });
}

/// A page on its way from a frame to the window: a word and a place in either home, and which of the two is listed.
struct Moved {
    frame: Arc<Page>,
    slot: StateWord,
    window: UnsafeCell<u64>,
    /// Bit 0: the frame is in the index; bit 1: the slot is.
    listed: AtomicUsize,
    /// How often the frame was given to somebody else.
    freed: AtomicUsize,
}

impl Moved {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            frame: Page::new(UPTODATE),
            slot: StateWord::default(),
            window: UnsafeCell::new(0),
            listed: AtomicUsize::new(1),
            freed: AtomicUsize::new(0),
        })
    }

    fn free(&self) {
        self.frame.reuse();
        self.freed.fetch_add(1, Ordering::Relaxed);
    }

    fn unref_frame(&self) {
        if self.frame.word.unref() {
            if self.frame.word.bury() {
                self.free();
            }
            self.frame.waits.wake(0);
        }
    }

    /// What `home.rs` does, and an eviction that comes right after it.
    fn move_to_window(&self) -> bool {
        self.frame.word.try_lock().is_ok() && self.move_locked()
    }

    fn move_locked(&self) -> bool {
        if !self.frame.word.begin_move() {
            self.frame.wake_if(self.frame.word.unlock(0, 0));
            return false;
        }
        self.frame.read();
        self.window.with_mut(|_| ());
        self.slot.install(HOME_WINDOW);
        self.slot.set(UPTODATE);
        self.listed.fetch_or(2, Ordering::AcqRel);
        self.listed.fetch_and(!1, Ordering::AcqRel);
        let left = self.frame.word.end_move();
        if left.free {
            self.free();
        }
        self.frame.wake_if(left.sleepers);
        let _ = self.slot.unlock(0, 0);
        true
    }

    /// What a reader does; false when it would have to wait or look again.
    fn look(&self) -> bool {
        let listed = self.listed.load(Ordering::Acquire);
        if listed & 1 != 0 && self.frame.word.try_ref() == RefOutcome::Taken {
            self.frame.read();
            self.unref_frame();
            return true;
        }
        if listed & 2 != 0 && self.slot.try_ref() == RefOutcome::Taken {
            self.window.with(|_| ());
            let _ = self.slot.unref();
            return true;
        }
        false
    }
}

/// INV8: a frame that a page has left is given away once, and not under a reader.
#[test]
fn inv8_a_frame_whose_page_moved_is_freed_once_and_not_under_a_reference() {
    bounded(3, || {
        let page = Moved::new();
        let readers: Vec<_> = (0..2)
            .map(|_| {
                let page = page.clone();
                thread::spawn(move || page.look())
            })
            .collect();
        assert!(page.move_to_window());
        for reader in readers {
            reader.join().unwrap();
        }
        assert_eq!(page.freed.load(Ordering::Relaxed), 1);
        assert_eq!(page.frame.word.load(), 0);
        assert!(page.look(), "the page is in the window");
    });
}

/// A reader that finds the page on its way is woken when it has arrived, and finds it there.
#[test]
fn a_reader_that_waits_for_a_move_finds_the_page_in_its_new_home() {
    bounded(3, || {
        let page = Moved::new();
        let reader = {
            let page = page.clone();
            thread::spawn(move || {
                while !page.look() {
                    let word = &page.frame.word;
                    page.frame
                        .waits
                        .wait(0, word, None, |state| state & LOCKED == 0);
                    thread::yield_now();
                }
            })
        };
        assert!(page.move_to_window());
        reader.join().unwrap();
    });
}

/// A device that has pinned the frame keeps the page there.
#[test]
fn a_page_does_not_move_under_a_pin() {
    loom::model(|| {
        let page = Moved::new();
        let device = {
            let page = page.clone();
            thread::spawn(move || {
                let pinned = page.frame.word.pin(PinKind::Read).is_ok();
                if pinned {
                    page.frame.read();
                    page.frame.wake_if(page.frame.word.unpin(PinKind::Read));
                }
            })
        };
        let moved = page.move_to_window();
        device.join().unwrap();
        assert_eq!(page.freed.load(Ordering::Relaxed), usize::from(moved));
    });
}

#[test]
fn a_page_is_evicted_or_moved_and_not_both() {
    loom::model(|| {
        let page = Moved::new();
        let evictor = {
            let page = page.clone();
            thread::spawn(move || {
                let evicted = page.frame.word.begin_evict();
                if evicted {
                    page.listed.fetch_and(!1, Ordering::AcqRel);
                    let sleepers = page.frame.word.release();
                    page.free();
                    page.frame.wake_if(sleepers);
                }
                evicted
            })
        };
        let moved = page.move_to_window();
        let evicted = evictor.join().unwrap();
        assert!(evicted != moved);
        assert_eq!(page.freed.load(Ordering::Relaxed), 1);
    });
}

/// A page-table entry and the byte it shows: a store looks and writes in one step, as a processor does, because taking the
/// right away waits until every processor knows.
#[derive(Default)]
struct Entry {
    writable: bool,
    byte: u64,
}

/// F-1, F-2: a store is in what is written back, or the page is dirty.
fn store_against_clean(protect_first: bool) {
    bounded(3, move || {
        let page = Page::new(UPTODATE | DIRTY | UMAP_RW);
        let entry = Arc::new(loom::sync::Mutex::new(Entry {
            writable: true,
            byte: 1,
        }));
        let program = {
            let (page, entry) = (page.clone(), entry.clone());
            thread::spawn(move || {
                loop {
                    {
                        let mut entry = entry.lock().unwrap();
                        if entry.writable {
                            entry.byte = 2;
                            return;
                        }
                    }
                    // The fault: dirty before writable, both under the lock.
                    while page.word.try_lock().is_err() {
                        page.waits
                            .wait(0, &page.word, None, |state| state & LOCKED == 0);
                    }
                    page.word.set(DIRTY | UMAP_RW);
                    entry.lock().unwrap().writable = true;
                    page.wake_if(page.word.unlock(0, 0));
                }
            })
        };
        let mut stored = 0;
        if page.word.try_lock().is_ok() {
            if page.word.load() & DIRTY != 0 {
                if protect_first {
                    entry.lock().unwrap().writable = false;
                    page.word.clean_for_write();
                } else {
                    page.word.clean_for_write();
                    stored = entry.lock().unwrap().byte;
                    entry.lock().unwrap().writable = false;
                }
                page.wake_if(page.word.unlock(0, 0));
                if protect_first {
                    stored = entry.lock().unwrap().byte;
                }
                page.wake_if(page.word.end_write(0));
            } else {
                page.wake_if(page.word.unlock(0, 0));
            }
        }
        program.join().unwrap();
        assert_eq!(entry.lock().unwrap().byte, 2);
        assert!(
            stored == 2 || page.word.load() & DIRTY != 0,
            "a store was lost"
        );
    });
}

#[test]
fn f2_no_store_is_lost_when_a_page_is_protected_before_it_is_clean() {
    store_against_clean(true);
}

/// Why it is in this order. This model must find the failure, or the one above shows nothing.
#[test]
#[should_panic(expected = "a store was lost")]
fn f2_a_page_that_is_clean_before_it_is_protected_loses_a_store() {
    store_against_clean(false);
}

/// E-3 and E-4: a page that a device has stored to is never evicted as clean.
#[test]
fn e4_a_page_pinned_for_writing_is_not_evicted_clean() {
    loom::model(|| {
        let page = Page::new(UPTODATE);
        let device = {
            let page = page.clone();
            thread::spawn(move || {
                let pinned = page.word.pin(PinKind::Write).is_ok();
                if pinned {
                    page.reuse();
                    page.wake_if(page.word.unpin(PinKind::Write));
                }
                pinned
            })
        };
        let evicted = page.word.begin_evict();
        let pinned = device.join().unwrap();
        assert!(pinned != evicted, "pinned {pinned}, evicted {evicted}");
    });
}

/// E-2: a pin given back and taken again around the test for it is seen, or finds the page gone.
#[test]
fn e2_a_page_whose_pin_was_given_back_and_taken_again_is_not_reused_under_it() {
    loom::model(|| {
        let page = Page::new(UPTODATE);
        page.word.pin(PinKind::Read).unwrap();
        let device = {
            let page = page.clone();
            thread::spawn(move || {
                page.read();
                page.wake_if(page.word.unpin(PinKind::Read));
                let again = page.word.pin(PinKind::Read).is_ok();
                if again {
                    page.read();
                    page.wake_if(page.word.unpin(PinKind::Read));
                }
                again
            })
        };
        let evicted = page.word.begin_evict();
        if evicted {
            page.reuse();
        }
        let _again = device.join().unwrap();
        assert_eq!(evicted, page.word.load() & LOCKED != 0);
    });
}

/// T47, E-1: pin and write-back are read-modify-writes of one word, so one of them sees the other. (`loom_schemes.rs` has
/// the other schemes.)
#[test]
fn t47_in_one_word_pin_and_write_back_never_miss_each_other() {
    loom::model(|| {
        let page = Page::new(UPTODATE | DIRTY);
        let pinner = {
            let page = page.clone();
            thread::spawn(move || match page.word.pin(PinKind::Write) {
                Ok(before) => before & WRITEBACK != 0,
                // Locked: it comes again later, and sees.
                Err(_) => true,
            })
        };
        page.word.try_lock().unwrap();
        let saw_pin = pinfold_cache::state::write_pins(page.word.clean_for_write()) > 0;
        let _ = page.word.unlock(0, 0);
        let saw_writeback = pinner.join().unwrap();
        assert!(saw_pin || saw_writeback);
    });
}

/// T44, D-7: the sides exclude each other and whoever waits is woken at zero.
fn gate(adders: usize, blockers: usize, preemptions: usize) {
    bounded(preemptions, move || {
        let gate = Arc::new(Gate::default());
        let inside = Arc::new(AtomicI64::new(0));
        let threads: Vec<_> = (0..adders + blockers)
            .map(|i| {
                let (gate, inside) = (gate.clone(), inside.clone());
                thread::spawn(move || {
                    let step = if i < adders { 1 } else { -1 };
                    let (_add, _block);
                    if step == 1 {
                        _add = gate.add();
                    } else {
                        _block = gate.block();
                    }
                    let now = inside.fetch_add(step, Ordering::Relaxed) + step;
                    assert_eq!(now.signum(), step, "both sides at once");
                    inside.fetch_sub(step, Ordering::Relaxed);
                })
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
        assert!(gate.try_add().is_some(), "somebody never left");
    });
}

/// D-7.
#[test]
fn t44_one_filler_and_one_blocker() {
    gate(1, 1, 4);
}

#[test]
fn t44_two_fillers_and_one_blocker() {
    gate(2, 1, 2);
}

#[test]
fn t44_one_filler_and_two_blockers() {
    gate(1, 2, 2);
}

/// D-8: a blocker that waits gets its turn although fillers keep coming.
#[test]
fn d8_a_stream_of_fillers_lets_a_blocker_through() {
    bounded(2, || {
        let gate = Arc::new(Gate::default());
        let filler = {
            let gate = gate.clone();
            thread::spawn(move || {
                for _ in 0..3 {
                    drop(gate.add());
                }
            })
        };
        drop(gate.block());
        drop(gate.add());
        filler.join().unwrap();
    });
}

#[test]
fn what_is_done_under_the_gate_is_seen_by_the_other_side() {
    bounded(3, || {
        let gate = Arc::new(Gate::default());
        let pages = Arc::new(UnsafeCell::new(0u64));
        let filler = {
            let (gate, pages) = (gate.clone(), pages.clone());
            thread::spawn(move || {
                let _add = gate.add();
                pages.with_mut(|_| ());
            })
        };
        {
            let _block = gate.block();
            pages.with_mut(|_| ());
        }
        filler.join().unwrap();
    });
}

/// G-3, G-4: every open file hears of an error exactly once, whoever else asks at the same time.
#[test]
fn t59_each_open_file_hears_of_an_error_once() {
    loom::model(|| {
        let errors = Arc::new(ErrSeq::default());
        let threads: Vec<_> = (0..2)
            .map(|_| {
                let errors = errors.clone();
                let mut sample = errors.sample();
                thread::spawn(move || {
                    let told = errors.check_and_advance(&mut sample).is_some();
                    (told, sample)
                })
            })
            .collect();
        errors.set(Errno::EIO);
        for thread in threads {
            let (early, mut sample) = thread.join().unwrap();
            let late = errors.check_and_advance(&mut sample).is_some();
            assert!(early != late, "told early {early}, late {late}");
            assert_eq!(errors.check_and_advance(&mut sample), None);
        }
    });
}

/// Two errors in a row are one or two, never none, and the last is not forgotten.
#[test]
fn an_error_that_comes_while_another_is_told_is_told_as_well() {
    loom::model(|| {
        let errors = Arc::new(ErrSeq::default());
        let mut sample = errors.sample();
        errors.set(Errno::EIO);
        let second = {
            let errors = errors.clone();
            thread::spawn(move || errors.set(Errno::ENOSPC))
        };
        let first = errors.check_and_advance(&mut sample);
        assert!(first.is_some());
        second.join().unwrap();
        let then = errors.check_and_advance(&mut sample);
        assert!(first == Some(Errno::ENOSPC) || then == Some(Errno::ENOSPC));
    });
}
