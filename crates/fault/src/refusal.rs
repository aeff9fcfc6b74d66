//! What a thread gets that waits in the kernel for a page which will not come.
//!
//! *Owns*: which pages of a mapping are poisoned, for how long, and the choice between poison and a signal.
//!
//! *Does not own*: the page tables.
//!
//! *Locking*: one leaf, held while poison is put or taken away; so a file that grows meanwhile either is seen to have
//! grown, or finds the poison.
//!
//! Poison makes the kernel itself answer, to loads and stores (SIGBUS) as to system calls (`EFAULT`). It stands
//! for the page and not for one access, so it is taken away again after [`HOLD`]: a thread that was slower than that faults
//! once more and is refused once more. A store that was refused where loads are fine concerns one thread: that one is
//! sent the signal, and poison is the last resort when it comes back at once.

use std::time::{Duration, Instant};

use pinfold_base::sync::Mutex;
use pinfold_mem::bus;

/// How long poison stands.
pub(crate) const HOLD: Duration = Duration::from_millis(50);
/// Pages poisoned at once in a mapping; the oldest are tried afresh earlier.
const POISONED_MAX: usize = 1024;
/// Signals a thread is sent for one page before it gets poison.
const SIGNALS_MAX: u32 = 3;

/// Why a fault is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// The file ends before the page.
    BeyondEnd,
    /// The page could not be had.
    Unreadable,
    /// The page may be loaded from, but the store takes nothing.
    Store,
}

#[derive(Debug, Default)]
struct State {
    poisoned: Vec<(u64, Instant)>,
    /// The last signal: to whom, for which page, when, and how many in a row.
    signalled: Option<(u32, u64, Instant, u32)>,
}

/// The refusals that stand in one mapping.
#[derive(Debug, Default)]
pub(crate) struct Refusals(Mutex<State>);

impl Refusals {
    /// Refuses `waiter` (a thread and the address it touched) access to `page`, unless `still` says that there is no
    /// more reason to. Tells whether a page was poisoned that was not.
    pub(crate) fn refuse(
        &self,
        page: u64,
        waiter: (u32, usize),
        refusal: Refusal,
        still: impl FnOnce() -> bool,
        poison: impl FnOnce(u64) -> bool,
    ) -> bool {
        let mut state = self.0.lock();
        // Under the lock: who makes the reason go away takes it afterwards.
        if !still() || state.poisoned.iter().any(|(there, _)| *there == page) {
            return false;
        }
        let now = Instant::now();
        let again = match state.signalled {
            Some((thread, at, when, count))
                if (thread, at) == (waiter.0, page) && now.duration_since(when) < HOLD =>
            {
                count
            }
            _ => 0,
        };
        let poisoned = (refusal != Refusal::Store || again >= SIGNALS_MAX) && poison(page);
        if poisoned {
            state.poisoned.push((page, now));
        } else {
            // Without poison there is nothing better, however often it comes back.
            let _ = bus::signal_bus(waiter.0, waiter.1);
            state.signalled = Some((waiter.0, page, now, again.saturating_add(1)));
        }
        poisoned
    }

    /// Takes all refusals back; returns how many.
    pub(crate) fn forgive(&self, cure: impl FnMut(u64)) -> usize {
        self.take_back(|_, _| true, cure)
    }

    /// Takes back what has stood for [`HOLD`], or is too much.
    pub(crate) fn forgive_old(&self, cure: impl FnMut(u64)) -> usize {
        let now = Instant::now();
        self.take_back(
            |when, newer| now.duration_since(when) >= HOLD || newer >= POISONED_MAX,
            cure,
        )
    }

    fn take_back(
        &self,
        mut over: impl FnMut(Instant, usize) -> bool,
        mut cure: impl FnMut(u64),
    ) -> usize {
        let mut state = self.0.lock();
        let before = state.poisoned.len();
        let mut newer = before;
        state.poisoned.retain(|&(page, when)| {
            newer -= 1;
            let over = over(when, newer);
            if over {
                cure(page);
            }
            !over
        });
        before - state.poisoned.len()
    }
}
