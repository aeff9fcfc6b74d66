//! The kernel's pages of a file that other nodes use too: when they may be filled, stored, and when they have to go.
//!
//! The kernel asks for pages when a mapping faults, with the page locked until it is answered, and stores dirty ones when it
//! likes. Neither may wait for the glock: the demotion that would grant it has the kernel drop its pages first, and the
//! kernel waits for the locked page, or stores a dirty one. So the mode is lent to the kernel (`Node::lend_mode`):
//!
//! ```text
//!   nothing lent --- a fill waits: a thread gets the glock, lends, lets go of it ---> SH or EX lent
//!   SH or EX lent -- fills and stores are served at once, without the glock
//!   SH or EX lent --- a demotion: fills wait, the kernel drops its pages ----------> nothing lent
//! ```
//!
//! What waits while nothing is lent holds pages that nobody waits for. What waits while pages are being dropped may be what
//! the kernel waits for: if it takes long, fills of that range are let through under the old mode, which is still there, and
//! their pages are dropped once more, one by one. A page whose fill waits has no contents and needs no dropping; so this
//! ends however fast programs fault.
//!
//! A kernel does not say when a page that it has becomes dirty. While somebody has the file open for reading and writing, so
//! that a mapping may store, all fills are under EX; pages that were filled under SH before go before that open is answered.
//!
//! Calls that change contents past the kernel's pages keep fills out from before the range is dropped until they have ended:
//! else a fill in between would show, and store back, what was there before.
//!
//! *Owns*: what is lent, which requests wait.
//!
//! *Does not own*: the threads ([`crate::paging`]), the glock, what a request does.
//!
//! *Locking*: one leaf. Nothing is called under it but the queues of `paging`.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use fuser::Errno;
use parking_lot::{Condvar, Mutex, MutexGuard};
use pinfold::glocks::Mode;
use pinfold::{Node, PAGE_SIZE};

use crate::paging::Paging;

/// A request that waits for the right to be carried out, or for the reason why it is refused.
pub(crate) type Work = Box<dyn FnOnce(Result<(), Errno>) + Send>;

/// All of a file.
const WHOLE: Range<u64> = 0..u64::MAX;

/// What a request does with the kernel's pages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Wish {
    /// Fills those of so many bytes.
    Fill(Range<u64>),
    /// Changes the size. The kernel stores no page until it is answered, not for an invalidation either.
    Resize,
}

/// What the kernel may have of one file.
pub(crate) struct Pages {
    number: u64,
    node: Node,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    lent: Option<Mode>,
    /// Handles that a mapping may store through.
    writers: usize,
    /// The kernel is dropping pages for good: fills wait.
    revoking: bool,
    /// Some thread is having pages dropped, for good or for a call.
    clearing: bool,
    /// Calls that change contents past the kernel's pages.
    calls: usize,
    /// Requests being carried out.
    serving: usize,
    /// As many as programs wait for and the kernel reads ahead: it limits both.
    waiting: Vec<Waiting>,
    /// Counts invalidations begun.
    round: u64,
    /// A thread is getting the glock.
    wanted: bool,
    /// The size when the mode was last taken back, which the kernel knows.
    known_len: Option<u64>,
}

struct Waiting {
    wish: Wish,
    /// The last invalidation that had begun when it came.
    round: u64,
    work: Work,
}

impl fmt::Debug for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state.lock();
        f.debug_struct("Pages")
            .field("number", &self.number)
            .field("lent", &state.lent)
            .field("waiting", &state.waiting.len())
            .finish_non_exhaustive()
    }
}

fn overlap(one: &Range<u64>, other: &Range<u64>) -> bool {
    one.start < other.end && other.start < one.end
}

impl State {
    /// The mode that a request needs.
    fn need(&self, wish: &Wish) -> Mode {
        match wish {
            Wish::Fill(_) if self.writers == 0 => Mode::Shared,
            Wish::Fill(_) | Wish::Resize => Mode::Exclusive,
        }
    }

    fn has(&self, mode: Mode) -> bool {
        self.lent == Some(Mode::Exclusive) || (self.lent.is_some() && mode == Mode::Shared)
    }

    fn admits(&self, wish: &Wish) -> bool {
        let at_rest = !self.revoking && self.calls == 0;
        // Whoever changes the size may be what a dropping waits for, and fills nothing.
        self.has(self.need(wish)) && (at_rest || *wish == Wish::Resize)
    }

    /// The mode to be got for those that wait, if it is one that is not there and could be lent now.
    fn missing(&self) -> Option<Mode> {
        if self.revoking {
            return None;
        }
        let wishes = self.waiting.iter().map(|waiting| &waiting.wish);
        let wishes = wishes.filter(|wish| self.calls == 0 || **wish == Wish::Resize);
        let needs = wishes
            .map(|wish| self.need(wish))
            .filter(|&mode| !self.has(mode));
        // SH or EX.
        needs.fold(None, |most, mode| match most {
            Some(Mode::Exclusive) => most,
            _ => Some(mode),
        })
    }

    /// Takes those requests out that `is_due`, to be carried out.
    fn take(&mut self, is_due: impl Fn(&Self, &Waiting) -> bool) -> Vec<Waiting> {
        let all = std::mem::take(&mut self.waiting);
        let (due, rest): (Vec<_>, Vec<_>) = all.into_iter().partition(|one| is_due(self, one));
        self.waiting = rest;
        self.serving += due.len();
        due
    }
}

impl Pages {
    pub(crate) fn new(number: u64, node: Node) -> Arc<Self> {
        Arc::new(Self {
            number,
            node,
            state: Mutex::default(),
            changed: Condvar::new(),
        })
    }

    /// Carries a request out as soon as the kernel has the mode for it: now, or on another thread.
    pub(crate) fn ask(self: &Arc<Self>, paging: &Paging, wish: Wish, work: Work) {
        let mut state = self.state.lock();
        if state.admits(&wish) {
            state.serving += 1;
            drop(state);
            return self.serve(work);
        }
        let round = state.round;
        state.waiting.push(Waiting { wish, round, work });
        self.go_on(state, paging);
    }

    /// Carries out what has been admitted.
    pub(crate) fn serve(&self, work: Work) {
        let _served = Served(self);
        self.node.by_lent_mode(|| work(Ok(())));
    }

    /// Stores what a page of the kernel's holds, by the mode under which it became dirty.
    ///
    /// # Errors
    /// EIO: the mode is gone, which the node has lost then.
    pub(crate) fn store<T>(&self, work: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
        {
            let mut state = self.state.lock();
            if !state.has(Mode::Exclusive) {
                tracing::warn!(number = self.number, "stores of a mapping come too late");
                return Err(Errno::EIO);
            }
            state.serving += 1;
        }
        let _served = Served(self);
        self.node.by_lent_mode(work)
    }

    /// Carries out a call that changes `bytes` past the kernel's pages. It takes the glock itself.
    pub(crate) fn past<T>(
        self: &Arc<Self>,
        paging: &Paging,
        bytes: Range<u64>,
        work: impl FnOnce() -> T,
    ) -> T {
        /// Lets fills go on, after a panic too.
        struct Ended<'a>(&'a Arc<Pages>, &'a Paging);
        impl Drop for Ended<'_> {
            fn drop(&mut self) {
                let mut state = self.0.state.lock();
                state.calls -= 1;
                self.0.changed.notify_all();
                self.0.go_on(state, self.1);
            }
        }
        {
            let mut state = self.state.lock();
            // Fills that wait for calls under way come before further calls.
            while state.calls > 0 && !state.waiting.is_empty() {
                self.changed.wait(&mut state);
            }
            state.calls += 1;
        }
        let ended = Ended(self, paging);
        let mut state = self.state.lock();
        while state.clearing {
            self.changed.wait(&mut state);
        }
        if state.lent.is_some() {
            state.clearing = true;
            drop(state);
            let start = bytes.start / PAGE_SIZE * PAGE_SIZE;
            let end = bytes.end.checked_next_multiple_of(PAGE_SIZE);
            self.clear(paging, start..end.unwrap_or(u64::MAX));
            self.state.lock().clearing = false;
            self.changed.notify_all();
        } else {
            drop(state);
        }
        let outcome = work();
        drop(ended);
        outcome
    }

    /// Counts a handle that mappings may store through; returns when no page is left that may not be stored to.
    pub(crate) fn begin_writer(self: &Arc<Self>, paging: &Paging) {
        let mut state = self.state.lock();
        state.writers += 1;
        // A call under way has the glock or waits for a demotion, which does the same.
        while state.calls > 0 && state.lent == Some(Mode::Shared) {
            self.changed.wait(&mut state);
        }
        drop(state);
        self.take_back(paging, |lent| lent == Mode::Shared);
    }

    pub(crate) fn end_writer(&self) {
        let mut state = self.state.lock();
        state.writers = state.writers.saturating_sub(1);
    }

    /// Has the kernel's pages dropped before the glock falls to `to`.
    pub(crate) fn demote(self: &Arc<Self>, paging: &Paging, to: Mode) {
        self.take_back(paging, |lent| to != Mode::Shared || lent != Mode::Shared);
    }

    fn take_back(self: &Arc<Self>, paging: &Paging, is_due: impl Fn(Mode) -> bool) {
        let mut state = self.state.lock();
        while state.clearing {
            self.changed.wait(&mut state);
        }
        if !state.lent.is_some_and(is_due) {
            return;
        }
        state.clearing = true;
        state.revoking = true;
        drop(state);
        self.clear(paging, WHOLE);
        let mut state = self.state.lock();
        // They have been answered, or the kernel would have waited, or have no page: they end by themselves.
        while state.serving > 0 {
            self.changed.wait(&mut state);
        }
        state.lent = None;
        state.known_len = self.node.known_len();
        state.revoking = false;
        state.clearing = false;
        self.changed.notify_all();
        self.go_on(state, paging);
    }

    /// Has the kernel drop its pages of `bytes`. Whoever calls has set `clearing`, and what keeps fills waiting.
    fn clear(self: &Arc<Self>, paging: &Paging, bytes: Range<u64>) {
        let mut again = BTreeSet::new();
        self.invalidate(paging, &bytes, &mut again);
        while let Some(page) = again.pop_first() {
            let bytes = page * PAGE_SIZE..(page + 1) * PAGE_SIZE;
            // Filled later, by a fill that waits: there is nothing in it.
            let is_empty = self
                .state
                .lock()
                .waiting
                .iter()
                .any(|one| matches!(&one.wish, Wish::Fill(filled) if overlap(filled, &bytes)));
            if !is_empty {
                self.invalidate(paging, &bytes, &mut again);
            }
        }
    }

    /// One invalidation. Adds pages to `again` that may have been filled behind its back.
    fn invalidate(
        self: &Arc<Self>,
        paging: &Paging,
        bytes: &Range<u64>,
        again: &mut BTreeSet<u64>,
    ) {
        let round = {
            let mut state = self.state.lock();
            state.round += 1;
            state.round
        };
        let asked = paging.invalidate(self.number, bytes.clone());
        while !asked.wait() {
            let late = {
                let mut state = self.state.lock();
                // Not lent, they hold nobody up: then there was no page to be dropped.
                let is_lent = state.lent.is_some();
                state.take(|_, one| {
                    is_lent && matches!(&one.wish, Wish::Fill(filled) if overlap(filled, bytes))
                })
            };
            for one in late {
                // What came before the invalidation is waited for by it, and dropped.
                if let Wish::Fill(filled) = &one.wish
                    && one.round >= round
                {
                    again.extend(filled.start / PAGE_SIZE..filled.end.div_ceil(PAGE_SIZE));
                }
                paging.serve(Arc::clone(self), one.work);
            }
        }
    }

    /// Has done what may be, and asks for the mode that the rest needs.
    fn go_on(self: &Arc<Self>, mut state: MutexGuard<'_, State>, paging: &Paging) {
        let due = state.take(|state, one| state.admits(&one.wish));
        let wants = !state.wanted && state.missing().is_some();
        state.wanted |= wants;
        drop(state);
        for one in due {
            paging.serve(Arc::clone(self), one.work);
        }
        if wants {
            paging.want(Arc::clone(self));
        }
    }

    /// Gets the glock for those that wait, and lends its mode to the kernel.
    pub(crate) fn borrow_mode(self: &Arc<Self>, paging: &Paging) {
        loop {
            let mode = {
                let mut state = self.state.lock();
                let Some(mode) = state.missing() else {
                    state.wanted = false;
                    return;
                };
                mode
            };
            match self
                .node
                .lend_mode(mode, |len| self.lend(paging, mode, len))
            {
                // What is needed may have become more meanwhile.
                Ok(Some(())) => {}
                Ok(None) => return self.refuse(Errno::ENOSYS),
                Err(error) => {
                    tracing::debug!(%error, number = self.number, "no glock for the kernel's pages");
                    return self.refuse(crate::attributes::errno(error.errno()));
                }
            }
        }
    }

    /// Lends `mode`, which is held.
    fn lend(self: &Arc<Self>, paging: &Paging, mode: Mode, len: u64) {
        let is_news = self.state.lock().known_len != Some(len);
        if is_news && len > 0 {
            // Before any page is filled: a mapping does not ask for the size, and what it stores behind the end that
            // the kernel knows would be cut off. If a fill of the last page waits, the kernel knows when it waits for that.
            paging.reach(self.number, len).wait_or_sleeps();
        }
        let mut state = self.state.lock();
        if !state.revoking && !state.has(mode) {
            state.lent = Some(mode);
        }
        self.go_on(state, paging);
    }

    /// Refuses all that waits.
    pub(crate) fn refuse(&self, errno: Errno) {
        let waiting = {
            let mut state = self.state.lock();
            state.wanted = false;
            std::mem::take(&mut state.waiting)
        };
        self.changed.notify_all();
        for one in waiting {
            (one.work)(Err(errno));
        }
    }
}

/// Counts a request as carried out when it is dropped.
struct Served<'a>(&'a Pages);

impl Drop for Served<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.serving -= 1;
        if state.serving == 0 {
            self.0.changed.notify_all();
        }
    }
}
