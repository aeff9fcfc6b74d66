//! The lock order of SEMANTICS.md section I, checked at run time in debug builds and with the feature `lock-order`.
//!
//! A lock of a class is taken only while locks of lower classes are held; [`rule_zero`] asserts that
//! nothing is held where a fault may be taken (INV9). Other builds compile all of this to nothing. What was checked is counted,
//! so that a test can tell a checker that found nothing from one that is not there ([`CHECKED`], [`asserted`], [`entered`]).
//!
//! ```text
//! Inode < Glock < Allocator < Invalidate < Folio < Leaf
//! ```

use std::ops::{Deref, DerefMut};

/// The classes of section I, outermost first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Rank {
    /// 1: an inode's read-write lock.
    Inode = 1,
    /// 2: a glock.
    Glock = 2,
    /// 3: space reservation.
    Allocator = 3,
    /// 4: the two-state lock that parts page-cache fills from direct I/O and truncation.
    Invalidate = 4,
    /// 5: a locked folio.
    Folio = 5,
    /// 6: a leaf: held for a few instructions, nothing is taken under it.
    Leaf = 6,
}

#[cfg(any(debug_assertions, feature = "lock-order"))]
impl Rank {
    const ALL: [Self; 6] = [
        Self::Inode,
        Self::Glock,
        Self::Allocator,
        Self::Invalidate,
        Self::Folio,
        Self::Leaf,
    ];
}

/// Whether this build checks the order.
pub const CHECKED: bool = cfg!(any(debug_assertions, feature = "lock-order"));

#[cfg(any(debug_assertions, feature = "lock-order"))]
mod checked {
    use super::Rank;
    use std::cell::Cell;
    use std::fmt;
    use std::sync::atomic::{AtomicU64, Ordering};

    /// Locks of each class taken by anybody.
    static ENTERED: [AtomicU64; Rank::ALL.len()] = [const { AtomicU64::new(0) }; Rank::ALL.len()];
    /// Places that assert rule zero at most; of more nobody is told.
    const PLACES_MAX: usize = 32;
    /// How often each place asserted it, by a number made of its name: counted in signal handlers too, so without a lock.
    static ASSERTED: [(AtomicU64, AtomicU64); PLACES_MAX] =
        [const { (AtomicU64::new(0), AtomicU64::new(0)) }; PLACES_MAX];

    /// Makes a number of a name (FNV-1a), never 0.
    fn number_of(place: &str) -> u64 {
        let fold = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        place.bytes().fold(0xcbf2_9ce4_8422_2325, fold) | 1
    }

    fn count(place: &str) {
        let number = number_of(place);
        for (name, count) in &ASSERTED {
            let taken = name.compare_exchange(0, number, Ordering::Relaxed, Ordering::Relaxed);
            if taken.map_or_else(|now| now == number, |_| true) {
                count.fetch_add(1, Ordering::Relaxed);
                return;
            }
        }
    }

    /// Returns how often rule zero was asserted at `place` and held, by any thread.
    #[must_use]
    pub fn asserted(place: &str) -> u64 {
        let number = number_of(place);
        let found = ASSERTED
            .iter()
            .find(|(name, _)| name.load(Ordering::Relaxed) == number);
        found.map_or(0, |(_, count)| count.load(Ordering::Relaxed))
    }

    /// Returns how many locks of class `rank` were taken in order, by any thread.
    #[must_use]
    pub fn entered(rank: Rank) -> u64 {
        ENTERED[rank as usize - 1].load(Ordering::Relaxed)
    }

    /// How many locks of each class a thread holds. No list: the check must neither allocate nor be torn down with the
    /// thread, because faults are served in signal handlers too.
    struct Counts([Cell<u32>; Rank::ALL.len()]);

    #[cfg(shuttle)]
    use shuttle::thread_local;

    // Under shuttle what a task holds is the task's.
    thread_local! {
        static HELD: Counts = const { Counts([const { Cell::new(0) }; Rank::ALL.len()]) };
        /// Transfers of this thread that hold pins.
        static PINS: Cell<u32> = const { Cell::new(0) };
        /// Whether this thread may bring memory in with a gate held.
        static UNDER_GATE: Cell<bool> = const { Cell::new(false) };
    }

    impl Counts {
        fn of(&self, rank: Rank) -> &Cell<u32> {
            &self.0[rank as usize - 1]
        }

        fn highest(&self) -> Option<Rank> {
            let held = |rank: &Rank| self.of(*rank).get() > 0;
            Rank::ALL.into_iter().rev().find(held)
        }
    }

    impl fmt::Debug for Counts {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            let held = Rank::ALL
                .into_iter()
                .filter(|&rank| self.of(rank).get() > 0);
            f.debug_map()
                .entries(held.map(|rank| (rank, self.of(rank).get())))
                .finish()
        }
    }

    /// Evidence that this thread holds a lock of some class.
    #[derive(Debug)]
    pub struct Held(pub(super) Rank, std::marker::PhantomData<*const ()>);

    /// Notes that this thread takes a lock of class `rank`.
    ///
    /// # Panics
    /// When a lock of a higher class is held already, or of the same class where that is not allowed; when this thread
    /// holds pins ([`hold_pins`]).
    #[must_use]
    #[track_caller]
    pub fn enter(rank: Rank) -> Held {
        assert!(
            rank == Rank::Leaf || PINS.with(Cell::get) == 0,
            "pins are leaves: {rank:?} taken while pages are pinned"
        );
        HELD.with(|held| {
            if let Some(top) = held.highest() {
                // Folios of one file are taken in ascending order and two inodes by number: equal ranks pass.
                let fits = top < rank || (top == rank && rank != Rank::Leaf);
                assert!(fits, "lock order: {rank:?} taken while holding {held:?}");
            }
            let count = held.of(rank);
            count.set(count.get() + 1);
        });
        ENTERED[rank as usize - 1].fetch_add(1, Ordering::Relaxed);
        Held(rank, std::marker::PhantomData)
    }

    impl Drop for Held {
        fn drop(&mut self) {
            leave(self.0);
        }
    }

    /// Notes that this thread no longer holds a lock of class `rank`: dropped, or given to a completion.
    pub fn leave(rank: Rank) {
        HELD.with(|held| {
            let count = held.of(rank);
            count.set(count.get().saturating_sub(1));
        });
    }

    /// Evidence that a transfer of this thread holds pins.
    #[derive(Debug)]
    pub struct PinsHeld(std::marker::PhantomData<*const ()>);

    /// Notes that this thread holds pins: it takes no lock of classes 1 to 5 until the result is dropped.
    #[must_use]
    pub fn hold_pins() -> PinsHeld {
        PINS.with(|pins| pins.set(pins.get() + 1));
        PinsHeld(std::marker::PhantomData)
    }

    impl Drop for PinsHeld {
        fn drop(&mut self) {
            PINS.with(|pins| pins.set(pins.get().saturating_sub(1)));
        }
    }

    /// Evidence that this thread may bring memory in with an inode's lock and a gate held.
    #[derive(Debug)]
    pub struct UnderGate(std::marker::PhantomData<*const ()>);

    /// Takes the exception from [`rule_zero`] that the `faults_disabled_mapping` mode lives by, until the result is dropped:
    /// classes 1 and 4 may be held, a glock never.
    #[must_use]
    pub fn permit_under_gate() -> UnderGate {
        UNDER_GATE.with(|permit| permit.set(true));
        UnderGate(std::marker::PhantomData)
    }

    impl Drop for UnderGate {
        fn drop(&mut self) {
            UNDER_GATE.with(|permit| permit.set(false));
        }
    }

    /// Asserts INV9: this thread holds no lock of the library, and no pins.
    ///
    /// # Panics
    /// When it holds one, but for what [`permit_under_gate`] allows.
    #[track_caller]
    pub fn rule_zero(place: &str) {
        assert!(
            PINS.with(Cell::get) == 0,
            "rule zero broken at {place}: pages are pinned"
        );
        let allowed = |rank: Rank| {
            UNDER_GATE.with(Cell::get) && matches!(rank, Rank::Inode | Rank::Invalidate)
        };
        HELD.with(|held| {
            assert!(
                Rank::ALL
                    .into_iter()
                    .all(|rank| held.of(rank).get() == 0 || allowed(rank)),
                "rule zero broken at {place}: holding {held:?}"
            );
        });
        count(place);
    }
}

#[cfg(not(any(debug_assertions, feature = "lock-order")))]
mod checked {
    use super::Rank;

    /// Evidence that a lock of some class is held; empty in release builds.
    #[derive(Debug)]
    pub struct Held(std::marker::PhantomData<*const ()>);

    /// Does nothing in release builds.
    #[must_use]
    #[inline(always)]
    pub fn enter(_rank: Rank) -> Held {
        Held(std::marker::PhantomData)
    }

    /// Does nothing in release builds.
    #[inline(always)]
    pub fn leave(_rank: Rank) {}

    /// Evidence that a transfer holds pins; empty in release builds.
    #[derive(Debug)]
    pub struct PinsHeld(std::marker::PhantomData<*const ()>);

    /// Does nothing in release builds.
    #[must_use]
    #[inline(always)]
    pub fn hold_pins() -> PinsHeld {
        PinsHeld(std::marker::PhantomData)
    }

    /// Evidence of an exception from rule zero; empty in release builds.
    #[derive(Debug)]
    pub struct UnderGate(std::marker::PhantomData<*const ()>);

    /// Does nothing in release builds.
    #[must_use]
    #[inline(always)]
    pub fn permit_under_gate() -> UnderGate {
        UnderGate(std::marker::PhantomData)
    }

    /// Does nothing in release builds.
    #[inline(always)]
    pub fn rule_zero(_place: &str) {}

    /// Returns 0: nothing is counted.
    #[must_use]
    pub fn asserted(_place: &str) -> u64 {
        0
    }

    /// Returns 0: nothing is counted.
    #[must_use]
    pub fn entered(_rank: Rank) -> u64 {
        0
    }
}

pub use checked::{
    Held, PinsHeld, UnderGate, asserted, enter, entered, hold_pins, leave, permit_under_gate,
    rule_zero,
};

/// A guard together with its place in the order.
#[derive(Debug)]
pub struct Ranked<G> {
    // Dropped in this order: the lock first, then the note that it is held.
    guard: G,
    _held: Held,
}

impl<G: Deref> Deref for Ranked<G> {
    type Target = G::Target;

    fn deref(&self) -> &G::Target {
        &self.guard
    }
}

impl<G: DerefMut> DerefMut for Ranked<G> {
    fn deref_mut(&mut self) -> &mut G::Target {
        &mut self.guard
    }
}

/// A read-write lock with a place in the order.
#[derive(Debug)]
pub struct RwLock<T> {
    rank: Rank,
    lock: crate::sync::RwLock<T>,
}

/// A shared guard of a [`RwLock`].
pub type ReadGuard<'a, T> = Ranked<crate::sync::RwLockReadGuard<'a, T>>;
/// An exclusive guard of a [`RwLock`].
pub type WriteGuard<'a, T> = Ranked<crate::sync::RwLockWriteGuard<'a, T>>;

impl<T> RwLock<T> {
    /// Makes a lock of class `rank`.
    pub const fn new(rank: Rank, value: T) -> Self {
        Self {
            rank,
            lock: crate::sync::RwLock::new(value),
        }
    }

    /// Takes it shared.
    #[inline]
    #[track_caller]
    pub fn read(&self) -> ReadGuard<'_, T> {
        let held = enter(self.rank);
        Ranked {
            guard: self.lock.read(),
            _held: held,
        }
    }

    /// Takes it exclusive.
    #[inline]
    #[track_caller]
    pub fn write(&self) -> WriteGuard<'_, T> {
        let held = enter(self.rank);
        Ranked {
            guard: self.lock.write(),
            _held: held,
        }
    }

    /// Takes it exclusive if nobody holds it.
    #[inline]
    #[track_caller]
    pub fn try_write(&self) -> Option<WriteGuard<'_, T>> {
        let guard = self.lock.try_write()?;
        Some(Ranked {
            guard,
            _held: enter(self.rank),
        })
    }
}

#[cfg(all(test, any(debug_assertions, feature = "lock-order")))]
mod tests {
    use super::*;

    #[test]
    fn the_order_of_section_i_passes() {
        let inode = RwLock::new(Rank::Inode, ());
        let _inode = inode.write();
        let _add = enter(Rank::Invalidate);
        let _folio = enter(Rank::Folio);
        let _next = enter(Rank::Folio);
        drop(enter(Rank::Leaf));
    }

    #[test]
    #[should_panic(expected = "lock order")]
    fn an_inode_lock_under_a_folio_panics() {
        let _folio = enter(Rank::Folio);
        let _inode = enter(Rank::Inode);
    }

    /// INV9.
    #[test]
    #[should_panic(expected = "rule zero broken")]
    fn a_fault_under_a_lock_panics() {
        let _folio = enter(Rank::Folio);
        rule_zero("test");
    }

    /// E-10.
    #[test]
    #[should_panic(expected = "pins are leaves")]
    fn a_folio_lock_while_pages_are_pinned_panics() {
        let _pins = hold_pins();
        drop(enter(Rank::Leaf));
        let _folio = enter(Rank::Folio);
    }

    #[test]
    #[should_panic(expected = "rule zero broken")]
    fn a_fault_while_pages_are_pinned_panics() {
        let _pins = hold_pins();
        rule_zero("test");
    }

    #[test]
    fn under_a_gate_memory_is_brought_in_by_permission_alone() {
        let _gate = enter(Rank::Invalidate);
        {
            let _permit = permit_under_gate();
            rule_zero("test");
        }
        let still = std::panic::catch_unwind(|| rule_zero("test"));
        assert!(still.is_err(), "the permission outlived its guard");
    }

    #[test]
    #[should_panic(expected = "rule zero broken")]
    fn no_permission_covers_a_folio() {
        let _permit = permit_under_gate();
        let _folio = enter(Rank::Folio);
        rule_zero("test");
    }

    #[test]
    #[should_panic(expected = "rule zero broken")]
    fn no_permission_covers_a_glock() {
        let _permit = permit_under_gate();
        let _glock = enter(Rank::Glock);
        rule_zero("test");
    }

    #[test]
    fn what_is_checked_is_counted_by_its_place() {
        let before = entered(Rank::Allocator);
        drop(enter(Rank::Allocator));
        assert!(entered(Rank::Allocator) > before);
        assert_eq!(asserted("here"), 0);
        rule_zero("here");
        rule_zero("there");
        rule_zero("here");
        assert_eq!((asserted("here"), asserted("there")), (2, 1));
    }

    #[test]
    fn a_released_lock_leaves_the_list() {
        drop(enter(Rank::Leaf));
        rule_zero("test");
    }
}
