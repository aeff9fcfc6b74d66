//! Three ways for a pin and a write-back not to miss each other (SEMANTICS.md section E): ours, and the two that were
//! proposed for Linux in 2019. The models prove or refute them (`tests/loom_schemes.rs`), the benchmark tells their prices.
//!
//! *Owns*: each scheme in the fewest words that show it, under one policy: a device does not write to a page under
//! write-back (stable pages).
//!
//! *Does not own*: pages. The cache has the first of them in its state word and uses none of these types.
//!
//! *Locking*: [`PageLock`] takes one leaf of its own; the others wait for nobody.
//!
//! | scheme | pin | write-back | missed? |
//! |---|---|---|---|
//! | [`OneWord`] | count, and see the mark, in one step | mark, and see the count, in one step | never: a word has one order of changes |
//! | [`PageLock`] | lock; look at the mark; count; unlock | lock; mark; look at the count; unlock | never |
//! | [`TwoWords`] | count; fence; look at the mark | mark; fence; look at the count | unless both fences are full ones |

use pinfold_base::sync::{AtomicBool, AtomicU64, Mutex, Ordering, fence};

use crate::state::{DIRTY, HOME_ARENA, PinKind, StateWord, UPTODATE, WRITEBACK, pins, write_pins};

/// One page's pins and write-back.
pub trait Scheme: Default + Send + Sync {
    /// Pins the page for a device that writes to it; false, and nothing pinned, where write-back is seen and has to be
    /// waited for.
    #[must_use]
    fn pin(&self) -> bool;

    /// Gives a pin back.
    fn unpin(&self);

    /// Begins write-back; false where pins are seen and the page cannot be called clean. [`Scheme::end`] follows either way.
    #[must_use]
    fn begin(&self) -> bool;

    /// Ends write-back.
    fn end(&self);
}

/// Flags and counts in one word, as the cache has them.
#[derive(Debug)]
pub struct OneWord(StateWord);

impl Default for OneWord {
    fn default() -> Self {
        let word = StateWord::default();
        word.install(HOME_ARENA);
        let _nobody_sleeps = word.unlock(UPTODATE | DIRTY, 0);
        Self(word)
    }
}

impl Scheme for OneWord {
    #[inline]
    fn pin(&self) -> bool {
        match self.0.pin(PinKind::Write) {
            Ok(before) if before & WRITEBACK == 0 => true,
            Ok(_) => {
                self.unpin();
                false
            }
            // Locked: write-back is about to begin.
            Err(_) => false,
        }
    }

    #[inline]
    fn unpin(&self) {
        let _nobody_sleeps = self.0.unpin(PinKind::Write);
    }

    #[inline]
    fn begin(&self) -> bool {
        if self.0.try_lock().is_err() {
            return false;
        }
        // No pin is added while it is locked, so what is seen holds for the step that follows.
        let pinned = write_pins(self.0.load()) > 0;
        let before = if pinned {
            self.0.copy_for_write()
        } else {
            self.0.clean_for_write()
        };
        debug_assert!(pinned || pins(before) == 0, "pinned under the lock");
        let _nobody_sleeps = self.0.unlock(0, 0);
        !pinned
    }

    #[inline]
    fn end(&self) {
        let _nobody_sleeps = self.0.end_write(0);
    }
}

/// The page's lock around both sides.
#[derive(Debug, Default)]
pub struct PageLock {
    writeback: Mutex<bool>,
    pins: AtomicU64,
}

impl Scheme for PageLock {
    #[inline]
    fn pin(&self) -> bool {
        let writeback = self.writeback.lock();
        if *writeback {
            return false;
        }
        self.pins.fetch_add(1, Ordering::Relaxed);
        true
    }

    #[inline]
    fn unpin(&self) {
        self.pins.fetch_sub(1, Ordering::Release);
    }

    #[inline]
    fn begin(&self) -> bool {
        let mut writeback = self.writeback.lock();
        *writeback = true;
        self.pins.load(Ordering::Acquire) == 0
    }

    #[inline]
    fn end(&self) {
        *self.writeback.lock() = false;
    }
}

/// Two words and a barrier between one's own and the other's: a full one, or the write barrier that was first proposed and
/// does not order a load after a store.
#[derive(Debug, Default)]
pub struct TwoWords<const FULL: bool> {
    pins: AtomicU64,
    writeback: AtomicBool,
}

impl<const FULL: bool> TwoWords<FULL> {
    #[inline]
    fn barrier() {
        fence(if FULL {
            Ordering::SeqCst
        } else {
            Ordering::Release
        });
    }
}

impl<const FULL: bool> Scheme for TwoWords<FULL> {
    #[inline]
    fn pin(&self) -> bool {
        self.pins.fetch_add(1, Ordering::Relaxed);
        Self::barrier();
        if self.writeback.load(Ordering::Acquire) {
            self.unpin();
            return false;
        }
        true
    }

    #[inline]
    fn unpin(&self) {
        self.pins.fetch_sub(1, Ordering::Release);
    }

    #[inline]
    fn begin(&self) -> bool {
        self.writeback.store(true, Ordering::Relaxed);
        Self::barrier();
        self.pins.load(Ordering::Acquire) == 0
    }

    #[inline]
    fn end(&self) {
        self.writeback.store(false, Ordering::Release);
    }
}
