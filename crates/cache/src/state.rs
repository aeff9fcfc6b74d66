//! One 64-bit word per page: flags, references and pins together, so that every question about a page is one
//! atomic operation on one modification order (SEMANTICS.md sections 0 and E).
//!
//! ```text
//!            insert                fill                    write
//!   (none) ────────► LOCKED ──────────────► UPTODATE ──────────────► UPTODATE DIRTY
//!      ▲            PRESENT                 ▲      │                   │        ▲
//!      │                            end_write│      │ begin_evict       │ clean   │ write
//!      │  release                            │      ▼                   ▼        │
//!      └────────────────────────────── LOCKED, not UPTODATE      UPTODATE WRITEBACK
//! ```
//!
//! A page that moves from an arena frame to its file's window has a word in each home while it does, both locked by the
//! mover:
//!
//! ```text
//!   arena frame:  LOCKED UPTODATE ─begin_move─► LOCKED ─end_move─► (none), or ZOMBIE until the last reference goes
//!   window slot:                       (none) ─install─► LOCKED UPTODATE ─unlock─► UPTODATE
//! ```
//!
//! A page leaves (evicted, truncated, invalidated) only with refs = rpin = wpin = 0 and no WRITEBACK, tested in the
//! same compare-and-swap that decides (INV8).

use pinfold_base::Errno;
use pinfold_base::sync::{AtomicU64, Ordering};

/// Somebody fills, writes to, cleans or drops the page.
pub const LOCKED: u64 = 1 << 0;
/// Somebody sleeps until the word changes; cleared by the change that wakes him.
pub const WAITERS: u64 = 1 << 1;
/// The contents are those of the file.
pub const UPTODATE: u64 = 1 << 2;
/// The contents are newer than the store's.
pub const DIRTY: u64 = 1 << 3;
/// The page is among those a sync has set out to write.
pub const TOWRITE: u64 = 1 << 4;
/// The contents are on their way to the store.
pub const WRITEBACK: u64 = 1 << 5;
/// Storing the contents failed.
pub const ERROR: u64 = 1 << 6;
/// The word describes a page.
pub const PRESENT: u64 = 1 << 7;
/// A user mapping may read the page.
pub const UMAP_RO: u64 = 1 << 8;
/// A user mapping may write the page.
pub const UMAP_RW: u64 = 1 << 9;
/// The page has moved to its other home; what is left here is a snapshot for those who still reference it. Without
/// [`PRESENT`], so nobody locks, pins or references it any more.
pub const ZOMBIE: u64 = 1 << 10;
/// The page's bytes live in an arena frame.
pub const HOME_ARENA: u64 = 1 << 11;
/// The page's bytes live in the window of a mapped file.
pub const HOME_WINDOW: u64 = 1 << 12;
/// A user mapping may store to the page without anybody being told: only the kernel knows whether it did.
pub const UMAP_ASYNC: u64 = 1 << 13;

const REF_ONE: u64 = 1 << 16;
const REF_MASK: u64 = 0xffff << 16;
const RPIN_ONE: u64 = 1 << 32;
const RPIN_MASK: u64 = 0xfff << 32;
const WPIN_ONE: u64 = 1 << 44;
const WPIN_MASK: u64 = 0xfff << 44;
/// References and pins of every kind.
pub const USERS_MASK: u64 = REF_MASK | RPIN_MASK | WPIN_MASK;

/// What device I/O does with a pinned page's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PinKind {
    /// I/O reads memory (a write to a device).
    Read,
    /// I/O writes memory (a read from a device).
    Write,
}

/// What [`StateWord::try_ref`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RefOutcome {
    /// A reference was taken; the contents are valid.
    Taken,
    /// The page is being filled or dropped: wait until it is unlocked and look it up again.
    Busy,
    /// There is no page here any more.
    Gone,
}

/// What [`StateWord::end_move`] left behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Left {
    /// Nobody uses the frame any more.
    pub free: bool,
    /// Sleepers have to be woken.
    pub sleepers: bool,
}

/// A page's state.
#[derive(Debug)]
pub struct StateWord(AtomicU64);

impl Default for StateWord {
    fn default() -> Self {
        Self(AtomicU64::new(0))
    }
}

impl StateWord {
    /// Reads the word.
    #[inline]
    pub fn load(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }

    /// Turns an unused word into a page that is locked and has no contents yet.
    pub fn install(&self, home: u64) {
        debug_assert_eq!(
            self.load() & !WAITERS,
            0,
            "a frame in use was installed again"
        );
        self.0.store(LOCKED | PRESENT | home, Ordering::Release);
    }

    /// Takes a reference if the contents are valid, locked or not: a load would not stop at the lock either.
    #[inline]
    pub fn try_ref(&self) -> RefOutcome {
        let mut state = self.0.load(Ordering::Relaxed);
        loop {
            if state & PRESENT == 0 {
                return RefOutcome::Gone;
            }
            if state & UPTODATE == 0 || state & ZOMBIE != 0 {
                return if state & LOCKED != 0 {
                    RefOutcome::Busy
                } else {
                    RefOutcome::Gone
                };
            }
            if state & REF_MASK == REF_MASK {
                return RefOutcome::Busy;
            }
            match self.0.compare_exchange_weak(
                state,
                state + REF_ONE,
                Ordering::Acquire,
                Ordering::Relaxed,
            ) {
                Ok(_) => return RefOutcome::Taken,
                Err(now) => state = now,
            }
        }
    }

    /// Gives a reference back; true when it was the last and somebody has to be woken or something buried
    /// ([`StateWord::bury`]).
    #[inline]
    #[must_use]
    pub fn unref(&self) -> bool {
        let before = self.0.fetch_sub(REF_ONE, Ordering::Release);
        debug_assert_ne!(before & REF_MASK, 0, "a reference was given back twice");
        before & (WAITERS | ZOMBIE) != 0 && before & USERS_MASK == REF_ONE
    }

    /// Ends what a moved page left behind once nobody references it; true for the one caller who then owns the frame.
    #[must_use]
    pub fn bury(&self) -> bool {
        let mut state = self.0.load(Ordering::Relaxed);
        loop {
            // Looked at again in the step that decides: the frame may have had another life since the caller's `unref`.
            if state & ZOMBIE == 0 || state & USERS_MASK != 0 {
                return false;
            }
            // Acquire: whatever the readers read, they have read it.
            match self
                .0
                .compare_exchange_weak(state, 0, Ordering::AcqRel, Ordering::Relaxed)
            {
                Ok(_) => return true,
                Err(now) => state = now,
            }
        }
    }

    /// Takes the lock if it is free and there is a page; returns the state before.
    ///
    /// # Errors
    /// The state that refused: locked by somebody, or no page.
    #[inline]
    pub fn try_lock(&self) -> Result<u64, u64> {
        let mut state = self.0.load(Ordering::Relaxed);
        loop {
            if state & LOCKED != 0 || state & PRESENT == 0 {
                return Err(state);
            }
            match self.0.compare_exchange_weak(
                state,
                state | LOCKED,
                Ordering::Acquire,
                Ordering::Relaxed,
            ) {
                Ok(_) => return Ok(state),
                Err(now) => state = now,
            }
        }
    }

    /// Sets and clears flags and drops the lock, in one step; true when sleepers have to be woken.
    #[inline]
    #[must_use]
    pub fn unlock(&self, set: u64, clear: u64) -> bool {
        self.change(|state| {
            debug_assert_ne!(state & LOCKED, 0, "unlocking an unlocked page");
            (state | set) & !(clear | LOCKED | WAITERS)
        }) & WAITERS
            != 0
    }

    /// Clears flags; returns the state before.
    pub fn clear(&self, flags: u64) -> u64 {
        self.0.fetch_and(!flags, Ordering::AcqRel)
    }

    /// Sets flags; returns the state before.
    pub fn set(&self, flags: u64) -> u64 {
        self.0.fetch_or(flags, Ordering::AcqRel)
    }

    /// Claims a clean, unused page for eviction: locked and no longer valid, in one step (INV8).
    #[must_use]
    pub fn begin_evict(&self) -> bool {
        let mut state = self.0.load(Ordering::Relaxed);
        loop {
            let idle = state & (PRESENT | LOCKED | DIRTY | WRITEBACK | ZOMBIE) == PRESENT
                && state & USERS_MASK == 0;
            if !idle {
                return false;
            }
            match self.0.compare_exchange_weak(
                state,
                (state | LOCKED) & !UPTODATE,
                Ordering::Acquire,
                Ordering::Relaxed,
            ) {
                Ok(_) => return true,
                Err(now) => state = now,
            }
        }
    }

    /// Makes a locked page invalid, so that nobody takes a new reference; returns the state before.
    ///
    /// The caller then waits until [`is_unused`] and calls [`StateWord::release`].
    pub fn doom(&self) -> u64 {
        self.0
            .fetch_and(!(UPTODATE | DIRTY | TOWRITE), Ordering::AcqRel)
    }

    /// Ends a locked, doomed and unused page; true when sleepers have to be woken.
    #[must_use]
    pub fn release(&self) -> bool {
        let before = self.0.swap(0, Ordering::AcqRel);
        debug_assert!(
            before & LOCKED != 0 && is_unused(before),
            "released in state {before:#x}"
        );
        before & WAITERS != 0
    }

    /// Moves a locked page from dirty to under write-back in one step, so that a store after it makes the page dirty
    /// again (G-5); returns the state before.
    ///
    /// The caller has made sure under the lock that no device writes to the page (E-5), and has write-protected it in every
    /// mapping since it locked it (F-2); only after this it reads the bytes.
    pub fn clean_for_write(&self) -> u64 {
        self.change(|state| {
            debug_assert_eq!(state & WRITEBACK, 0, "two write-backs of one page");
            (state & !(DIRTY | TOWRITE | UMAP_RW)) | WRITEBACK
        })
    }

    /// Claims a locked page that device I/O writes to for the write-back of a copy: the page stays dirty (E-9).
    pub fn copy_for_write(&self) -> u64 {
        let before = self.set(WRITEBACK);
        debug_assert_eq!(before & WRITEBACK, 0, "two write-backs of one page");
        before
    }

    /// Claims a locked, valid page for the move to its other home: nobody takes a new reference from here on. References
    /// that are held do not matter ([`StateWord::end_move`]); false, and nothing changed, while it is pinned or under
    /// write-back.
    #[must_use]
    pub fn begin_move(&self) -> bool {
        let mut state = self.0.load(Ordering::Relaxed);
        loop {
            debug_assert_ne!(state & LOCKED, 0, "moving an unlocked page");
            if state & UPTODATE == 0 || state & (RPIN_MASK | WPIN_MASK | WRITEBACK) != 0 {
                return false;
            }
            match self.0.compare_exchange_weak(
                state,
                state & !UPTODATE,
                Ordering::AcqRel,
                Ordering::Relaxed,
            ) {
                Ok(_) => return true,
                Err(now) => state = now,
            }
        }
    }

    /// Takes [`StateWord::begin_move`] back.
    pub fn undo_move(&self) {
        self.set(UPTODATE);
    }

    /// Ends the page in the home it has left, after it is listed in the other. Who still references the frame keeps it
    /// as a snapshot: he may sit in a signal handler that waits for the very fault this move serves (T67), so nobody may
    /// wait for him. The frame is the caller's if it is `free`, else the last reference's.
    #[must_use]
    pub fn end_move(&self) -> Left {
        let before = self.change(|state| {
            debug_assert_eq!(
                state & (LOCKED | UPTODATE | WRITEBACK),
                LOCKED,
                "moved in state {state:#x}"
            );
            match state & REF_MASK {
                0 => 0,
                refs => refs | ZOMBIE,
            }
        });
        Left {
            free: before & REF_MASK == 0,
            sleepers: before & WAITERS != 0,
        }
    }

    /// Ends write-back; true when sleepers have to be woken. `set` is [`ERROR`], [`DIRTY`] or nothing.
    #[must_use]
    pub fn end_write(&self, set: u64) -> bool {
        self.change(|state| {
            debug_assert_ne!(state & WRITEBACK, 0, "write-back ended twice");
            (state | set) & !(WRITEBACK | WAITERS)
        }) & WAITERS
            != 0
    }

    /// Pins a valid, unlocked page for device I/O; a page pinned for writing becomes dirty in the same step
    /// (INV3), so that no write-back between the pin and the unpin can make it look clean.
    ///
    /// Returns the state before.
    ///
    /// # Errors
    /// `EAGAIN` when the page is not there, locked or not valid; `ENOMEM` when the count is at its limit.
    pub fn pin(&self, kind: PinKind) -> Result<u64, Errno> {
        self.pin_if(kind, PRESENT | UPTODATE, 0)
    }

    /// As [`StateWord::pin`], of a page that, to be written to, is dirty already: what has to be known before a first store
    /// is known, and the pin changes nothing but the count.
    ///
    /// # Errors
    /// As of [`StateWord::pin`], and `EAGAIN` when it is clean.
    pub fn pin_ready(&self, kind: PinKind) -> Result<u64, Errno> {
        let ready = match kind {
            PinKind::Read => 0,
            PinKind::Write => DIRTY,
        };
        self.pin_if(kind, PRESENT | UPTODATE, ready)
    }

    /// As [`StateWord::pin`], by the holder of the page's lock.
    ///
    /// # Errors
    /// As of [`StateWord::pin`], and `EAGAIN` when it is not locked.
    pub fn pin_locked(&self, kind: PinKind) -> Result<u64, Errno> {
        self.pin_if(kind, PRESENT | UPTODATE | LOCKED, 0)
    }

    fn pin_if(&self, kind: PinKind, wanted: u64, ready: u64) -> Result<u64, Errno> {
        let (one, mask, also) = match kind {
            PinKind::Read => (RPIN_ONE, RPIN_MASK, 0),
            PinKind::Write => (WPIN_ONE, WPIN_MASK, DIRTY),
        };
        let mut state = self.0.load(Ordering::Relaxed);
        loop {
            if state & (PRESENT | UPTODATE | LOCKED | ZOMBIE) != wanted || state & ready != ready {
                return Err(Errno::EAGAIN);
            }
            if state & mask == mask {
                return Err(Errno::ENOMEM);
            }
            match self.0.compare_exchange_weak(
                state,
                (state + one) | also,
                Ordering::AcqRel,
                Ordering::Relaxed,
            ) {
                Ok(_) => return Ok(state),
                Err(now) => state = now,
            }
        }
    }

    /// Gives a pin back; true when a sleeper has to be woken.
    #[must_use]
    pub fn unpin(&self, kind: PinKind) -> bool {
        let (one, mask) = match kind {
            PinKind::Read => (RPIN_ONE, RPIN_MASK),
            PinKind::Write => (WPIN_ONE, WPIN_MASK),
        };
        let before = self.0.fetch_sub(one, Ordering::AcqRel);
        debug_assert_ne!(before & mask, 0, "a pin was given back twice");
        debug_assert!(
            kind == PinKind::Read || before & DIRTY != 0 || before & UPTODATE == 0,
            "a page was cleaned while a device wrote to it (INV3): {before:#x}"
        );
        before & WAITERS != 0
    }

    /// Asks to be woken at the next change; false when the state is no longer `seen`.
    pub(crate) fn announce_waiter(&self, seen: u64) -> bool {
        seen & WAITERS != 0
            || self
                .0
                .compare_exchange(seen, seen | WAITERS, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
    }

    /// Applies `change` atomically; returns the state before.
    #[inline]
    fn change(&self, change: impl Fn(u64) -> u64) -> u64 {
        let mut state = self.0.load(Ordering::Relaxed);
        loop {
            match self.0.compare_exchange_weak(
                state,
                change(state),
                Ordering::AcqRel,
                Ordering::Relaxed,
            ) {
                Ok(before) => return before,
                Err(now) => state = now,
            }
        }
    }
}

/// Tells whether nobody references or pins the page and no write-back reads it.
#[must_use]
pub const fn is_unused(state: u64) -> bool {
    state & (USERS_MASK | WRITEBACK) == 0
}

/// Returns the number of pins of both kinds.
#[must_use]
pub const fn pins(state: u64) -> u64 {
    write_pins(state) + ((state & RPIN_MASK) >> 32)
}

/// Returns the number of pins for device I/O that writes memory.
#[must_use]
pub const fn write_pins(state: u64) -> u64 {
    (state & WPIN_MASK) >> 44
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn page(flags: u64) -> StateWord {
        let word = StateWord::default();
        word.install(HOME_ARENA);
        let _ = word.unlock(flags, 0);
        word
    }

    #[test]
    fn a_page_that_is_filled_cannot_be_referenced_yet() {
        let word = StateWord::default();
        assert_eq!(word.try_ref(), RefOutcome::Gone);
        word.install(HOME_ARENA);
        assert_eq!(word.try_ref(), RefOutcome::Busy);
        assert!(!word.unlock(UPTODATE, 0));
        assert_eq!(word.try_ref(), RefOutcome::Taken);
    }

    #[test]
    fn inv8_a_page_in_use_is_not_evicted() {
        for hold in [DIRTY, WRITEBACK, LOCKED, ZOMBIE] {
            let word = page(UPTODATE);
            word.set(hold);
            assert!(!word.begin_evict(), "{hold:#x}");
        }
        let word = page(UPTODATE);
        assert_eq!(word.try_ref(), RefOutcome::Taken);
        assert!(!word.begin_evict());
        assert!(!word.unref());
        word.pin(PinKind::Read).unwrap();
        assert!(!word.begin_evict());
        assert!(!word.unpin(PinKind::Read));
        assert!(word.begin_evict());
        assert_eq!(word.try_ref(), RefOutcome::Busy);
        assert!(!word.release());
        assert_eq!(word.try_ref(), RefOutcome::Gone);
    }

    #[test]
    fn inv3_a_write_pin_makes_the_page_dirty() {
        let word = page(UPTODATE);
        word.pin(PinKind::Write).unwrap();
        assert_ne!(word.load() & DIRTY, 0);
        assert_eq!(write_pins(word.load()), 1);
    }

    #[test]
    fn t51_the_pin_count_refuses_to_overflow() {
        let word = page(UPTODATE);
        for _ in 0..4095 {
            word.pin(PinKind::Write).unwrap();
        }
        let full = word.load();
        assert_eq!(word.pin(PinKind::Write), Err(Errno::ENOMEM));
        assert_eq!(word.load(), full);
        word.pin(PinKind::Read).unwrap();
        assert_eq!(write_pins(word.load()), 4095);
    }

    #[test]
    fn a_moved_page_is_kept_for_its_reader_and_buried_by_the_last_reference() {
        let word = page(UPTODATE | DIRTY);
        assert_eq!(word.try_ref(), RefOutcome::Taken);
        word.try_lock().unwrap();
        assert!(word.begin_move());
        assert_eq!(word.try_ref(), RefOutcome::Busy);
        let left = word.end_move();
        assert!(!left.free && !word.bury());
        assert_eq!(word.try_ref(), RefOutcome::Gone);
        assert!(word.try_lock().is_err() && !word.begin_evict());
        assert!(word.unref() && word.bury());
        assert!(!word.bury());
        assert_eq!(word.load(), 0);
    }

    #[test]
    fn a_pinned_page_does_not_move() {
        let word = page(UPTODATE);
        word.pin(PinKind::Read).unwrap();
        word.try_lock().unwrap();
        let before = word.load();
        assert!(!word.begin_move());
        assert_eq!(word.load(), before);
        let _ = word.unpin(PinKind::Read);
        assert!(word.begin_move());
        word.undo_move();
        word.pin_locked(PinKind::Write).unwrap();
        assert!(!word.begin_move());
        assert_ne!(word.load() & DIRTY, 0);
    }

    #[test]
    fn g5_a_store_during_write_back_leaves_the_page_dirty() {
        let word = page(UPTODATE | DIRTY);
        word.try_lock().unwrap();
        word.clean_for_write();
        let _ = word.unlock(0, 0);
        word.set(DIRTY);
        let _ = word.end_write(0);
        assert_eq!(word.load() & (DIRTY | WRITEBACK), DIRTY);
    }
}
