//! The protocols of the cache under loom: every interleaving of a few threads, stale loads included.
//!
//! Run with `RUSTFLAGS="--cfg loom" cargo test -p pinfold-cache --release --test loom`, in a target directory of its own.
//! A sleeper nobody wakes is a deadlock to loom, so a lost wake-up fails these without an assertion.
#![cfg(loom)]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends there")]

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicI64, AtomicU64, AtomicUsize, Ordering, fence};
use loom::thread;
use pinfold_base::Errno;
use pinfold_cache::state::{
    DIRTY, HOME_ARENA, LOCKED, PinKind, RefOutcome, StateWord, UPTODATE, WRITEBACK, is_unused,
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

/// T47, E-1: pin and write-back are read-modify-writes of one word, so one of them sees the other.
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

fn two_words(full_fence: bool) {
    loom::model(move || {
        let pins = Arc::new(AtomicUsize::new(0));
        let writeback = Arc::new(AtomicUsize::new(0));
        let pinner = {
            let (pins, writeback) = (pins.clone(), writeback.clone());
            thread::spawn(move || {
                pins.store(1, Ordering::Release);
                if full_fence {
                    fence(Ordering::SeqCst);
                }
                writeback.load(Ordering::Acquire)
            })
        };
        writeback.store(1, Ordering::Release);
        if full_fence {
            fence(Ordering::SeqCst);
        }
        let saw_pin = pins.load(Ordering::Acquire);
        let saw_writeback = pinner.join().unwrap();
        assert!(saw_pin + saw_writeback > 0, "both missed each other");
    });
}

/// T47: why it is one word. This model must find the failure, or the one above shows nothing.
#[test]
#[should_panic(expected = "both missed each other")]
fn t47_in_two_words_without_full_fences_they_miss_each_other() {
    two_words(false);
}

#[test]
fn t47_in_two_words_full_fences_are_needed() {
    two_words(true);
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
