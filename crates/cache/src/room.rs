//! How a page gets a place when none is free.
//!
//! *Owns*: the order of attempts. A frame: a free one, memory the budget still has, or what the policy gives up; pages
//! evicted from windows are saved up until the arena can grow by a granule. A slot: what the budget has, a granule of the
//! arena that is (nearly) free, or what the policy gives up. The policy chooses over both homes, so the shares follow use.
//!
//! *Does not own*: the choice of the page ([`crate::policy`]), the account ([`Arena`](pinfold_mem::Arena)).
//!
//! *Locking*: waits with nothing but classes 1 to 4 held. Eviction takes folio locks by trying. Faults served in signal
//! handlers make room as well: nothing is allocated or freed for up to [`RECLAIM_BATCH`] pages.

use std::ops::RangeInclusive;
use std::time::Duration;

use pinfold_base::sync;
use pinfold_mem::{Charge, Frame, FrameRun};
use smallvec::SmallVec;

use crate::CacheError;
use crate::cache::{Cache, Header};
use crate::policy::Verdict;
use crate::slots::Slot;
use crate::state::{DIRTY, LOCKED, PRESENT, UMAP_ASYNC, UPTODATE, USERS_MASK, WRITEBACK};
use crate::stores::{ASKED_MAX, runs_of};

/// Pages freed at once when there is no room left.
pub(crate) const RECLAIM_BATCH: usize = 64;
/// How long an allocation waits for write-back or other users before it gives up.
const WAIT_MAX: Duration = Duration::from_secs(60);
/// How often a waiting allocation looks again although nobody woke it.
const WAIT_STEP: Duration = Duration::from_millis(50);
/// Granules looked at for one that can be emptied.
const GRANULES_TRIED_MAX: usize = 4;
/// The arena keeps at least this share of the budget: fills and writes need frames, however much is mapped.
const ARENA_SHARE: usize = 8;

/// The part of a budget that is kept free for pages on their way to windows: no more of them move together than that.
const SPARE_SHARE: usize = 64;
/// The least and the most of it. A walk maps up to 256 pages with one fault.
const SPARE_PAGES: RangeInclusive<usize> = 64..=512;
/// Fewer than such a part of it, and somebody makes room.
const SPARE_LOW: usize = 4;

impl Cache {
    /// Tells whether the next faults will have to evict before they are served, so that it is time for
    /// [`Cache::keep_spare`]. A look at two counters.
    #[must_use]
    pub fn is_short(&self) -> bool {
        self.slots.are_open()
            && self
                .spare_enough()
                .is_some_and(|enough| self.arena.uncharged() < enough / SPARE_LOW)
    }

    /// Returns how many places are free once room was made; nothing is kept free of a small budget.
    fn spare_enough(&self) -> Option<usize> {
        let share = self.pages_max() / SPARE_SHARE;
        (share >= *SPARE_PAGES.start()).then(|| share.min(*SPARE_PAGES.end()))
    }

    /// Evicts until a few places in windows are free: in the background, that faults need not wait for it.
    pub fn keep_spare(&self) {
        let Some(enough) = self.spare_enough() else {
            return;
        };
        let batches = enough / self.reclaim_batch() + 1;
        for _ in 0..batches {
            if !self.slots.are_open() || self.arena.uncharged() >= enough {
                return;
            }
            let mut saved = self.arena.no_charge();
            if !self.shrink_arena() && self.reclaim(self.reclaim_batch(), &mut saved) == 0 {
                return;
            }
        }
    }

    /// Takes one frame, evicting if need be; waits for write-back if everything is dirty.
    pub(crate) fn take_frame(&self) -> Result<Frame, CacheError> {
        self.wait_for(|| self.try_take_frames(1).pop())
    }

    /// Takes a slot, evicting if need be; waits for write-back if everything is dirty.
    pub(crate) fn take_slot(&self) -> Result<Slot<'_>, CacheError> {
        self.wait_for(|| self.try_take_slot())
    }

    fn wait_for<T>(&self, mut attempt: impl FnMut() -> Option<T>) -> Result<T, CacheError> {
        let mut deadline = None;
        loop {
            let seen = *self.progress.lock();
            if let Some(taken) = attempt() {
                return Ok(taken);
            }
            let now = sync::now();
            if now >= *deadline.get_or_insert(now + WAIT_MAX) {
                return Err(CacheError::NoFrames);
            }
            self.counters.frame_waits.bump();
            self.press();
            let progress = self.progress.lock();
            if *progress == seen {
                let until = sync::now() + WAIT_STEP;
                drop(self.progressed.wait_until(progress, until));
            }
        }
    }

    fn reclaim_batch(&self) -> usize {
        RECLAIM_BATCH.min(self.pages_max() / 8)
    }

    /// Attempts that free at least a granule, of pages in either home.
    fn rounds_max(&self) -> usize {
        if self.slots.are_open() {
            self.arena.granule() / self.reclaim_batch() + 2
        } else {
            1
        }
    }

    /// Takes up to `want` frames, adjacent where possible, without waiting for anybody.
    pub(crate) fn try_take_frames(&self, want: usize) -> SmallVec<[Frame; 1]> {
        let mut frames = SmallVec::new();
        let mut saved = self.arena.no_charge();
        let mut rounds = 0;
        while frames.len() < want {
            let ask = u32::try_from(want - frames.len()).unwrap_or(u32::MAX);
            // A refusal by the system counts as "none free": the budget then is what it has given so far.
            if let Ok(Some(run)) = self.arena.alloc_from(ask, &mut saved) {
                frames.extend(run.frames());
                continue;
            }
            let enough = rounds > 0 && !frames.is_empty();
            if enough || rounds == self.rounds_max() {
                break;
            }
            rounds += 1;
            let batch = (want - frames.len()).max(self.reclaim_batch());
            if self.reclaim(batch, &mut saved) == 0 {
                break;
            }
        }
        frames
    }

    /// Takes a slot without waiting for anybody.
    pub(crate) fn try_take_slot(&self) -> Option<Slot<'_>> {
        for _ in 0..=self.rounds_max() {
            if let Some(slot) = self.spare_slot() {
                return Some(slot);
            }
            if self.shrink_arena() {
                continue;
            }
            let mut saved = self.arena.no_charge();
            if self.reclaim(self.reclaim_batch(), &mut saved) == 0 {
                return None;
            }
            if let Some(slot) = self.slot_from(&mut saved) {
                return Some(slot);
            }
        }
        None
    }

    /// Gives a granule of the arena back if so many frames are free; evicts what is left in it.
    fn shrink_arena(&self) -> bool {
        let arena = &self.arena;
        let least = (self.pages_max() / ARENA_SHARE).max(2 * arena.granule());
        let mut tried: SmallVec<[Frame; GRANULES_TRIED_MAX]> = SmallVec::new();
        while tried.len() < GRANULES_TRIED_MAX {
            // Several may shrink it at once: by a granule each below the least, which matters to nobody.
            if arena.populated() < least + arena.granule() || arena.free_frames() < arena.granule()
            {
                return false;
            }
            let Some((granule, _)) = arena.emptiest(&tried) else {
                return false;
            };
            if self.empty(granule) && arena.retire(granule.start) {
                return true;
            }
            tried.push(granule.start);
        }
        false
    }

    /// Evicts every page of a granule, unless one of them must stay.
    fn empty(&self, granule: FrameRun) -> bool {
        let in_use = |frame: Frame| {
            let state = self.header(frame).state.load();
            state & (LOCKED | DIRTY | WRITEBACK | USERS_MASK) != 0
        };
        if granule.frames().any(in_use) {
            return false;
        }
        for frame in granule.frames() {
            let header = self.header(frame);
            if header.state.load() & PRESENT != 0 && header.state.begin_evict() {
                self.unlist(frame, header);
                self.give_frame(frame);
                self.counters.evicted.bump();
            }
        }
        true
    }

    /// Evicts clean, unused pages of both homes; returns how many. The pages of the budget that were in windows come
    /// into `saved`.
    pub(crate) fn reclaim(&self, want: usize, saved: &mut Charge<'_>) -> usize {
        // Allocated before the policy's lock is taken, which signal handlers wait for; a batch is on the stack.
        let mut frames: SmallVec<[Frame; RECLAIM_BATCH]> = SmallVec::with_capacity(want);
        let mut slots: SmallVec<[Frame; RECLAIM_BATCH]> = SmallVec::with_capacity(want);
        let mut dirty_seen = 0usize;
        self.policy.evict(want, |frame| {
            let header = self.header(frame);
            if !header.state.begin_evict() {
                dirty_seen += usize::from(header.state.load() & DIRTY != 0);
                return Verdict::Keep;
            }
            if self.in_window(frame) {
                slots.push(frame);
            } else {
                self.unlist(frame, header);
                frames.push(frame);
            }
            Verdict::Evicted
        });
        self.arena.free_all(&frames);
        let dropped = self.evict_slots(&mut slots);
        saved.take_over(dropped);
        let evicted = frames.len() + dropped;
        self.counters.evicted.add(evicted as u64);
        if dirty_seen > want {
            self.kick_flusher(true);
        }
        evicted
    }

    /// Puts a page back that was claimed for eviction.
    pub(crate) fn keep(&self, frame: Frame, also: u64) {
        let header = self.header(frame);
        self.policy.admit(frame, header.key().hash());
        if header.state.unlock(UPTODATE | also, 0) {
            self.wake(frame);
        }
    }

    fn place(&self, frame: Frame) -> (u64, u64) {
        let key = self.header(frame).key();
        (key.file, key.page)
    }

    /// Tells whether a page is the next after another in one file.
    fn follows(&self, before: Frame, after: Frame) -> bool {
        let (file, page) = self.place(before);
        self.place(after) == (file, page + 1)
    }

    /// Drops pages that were claimed for eviction out of their windows, neighbours together, and puts those back that were
    /// stored to without notice. Returns how many went.
    ///
    /// They stay locked and listed until they are gone from every mapping, so that no fault brings one back early. They
    /// are clean, so they are write-protected in every mapping (INV2), or in none ([`FilePages::keep_stored`]), and no store
    /// is lost.
    fn evict_slots(&self, slots: &mut [Frame]) -> usize {
        slots.sort_unstable_by_key(|&frame| self.place(frame));
        let (mut gone, mut kept) = (0, 0);
        for group in slots.chunk_by(|a, b| self.place(*a).0 == self.place(*b).0) {
            let back = self.take_entries(group);
            kept += back.len();
            let left: SmallVec<[Frame; RECLAIM_BATCH]> = group
                .iter()
                .copied()
                .filter(|frame| !back.contains(frame))
                .collect();
            for run in left.chunk_by(|a, b| self.follows(*a, *b)) {
                gone += self.evict_run(run);
            }
        }
        if kept > 0 {
            self.kick_flusher(true);
        }
        gone
    }

    /// Takes a file's claimed pages out of its mappings, where that costs less than leaving it to the punch; puts back, and
    /// returns, those that were stored to without notice.
    fn take_entries(&self, claimed: &[Frame]) -> SmallVec<[Frame; ASKED_MAX]> {
        let file = self.place(claimed[0]).0;
        let tracked = |frame: &Frame| self.header(*frame).state.load() & UMAP_ASYNC != 0;
        if claimed.iter().any(tracked) {
            // A file with such mappings is listed as long as it has them.
            let kept = self.visit_listed(file, |file| file.keep_stored(claimed));
            return kept.unwrap_or_default();
        }
        let pages = claimed.iter().map(|&frame| self.place(frame).1);
        let runs = runs_of(pages);
        if runs.len() > 1
            && let Some(reverse) = self.slots.reverse(file)
        {
            reverse.unmap_runs(&runs);
        }
        SmallVec::new()
    }

    /// Drops neighbouring pages, which nobody has stored to, out of their window; returns how many went.
    fn evict_run(&self, run: &[Frame]) -> usize {
        let first = self.header(run[0]).key();
        let pages = first.page..first.page + run.len() as u64;
        let window = self.slots.window(first.file);
        if window.is_some_and(|window| window.punch(pages).is_err()) {
            // The system would not: the pages are as good as before.
            run.iter().for_each(|&frame| self.keep(frame, 0));
            return 0;
        }
        for &frame in run {
            self.unlist(frame, self.header(frame));
            self.give_slot_number(frame);
        }
        run.len()
    }

    /// Takes a locked, doomed, unused page out of the index and ends its state. The frame is the caller's then.
    pub(crate) fn unlist(&self, frame: Frame, header: &Header) {
        let hash = header.key().hash();
        self.index.remove(&self.index.lock(hash), hash, frame);
        if header.state.release() {
            self.wake(frame);
        }
    }

    /// Gives a frame back that `unlist` ended; one in a window has been punched out of it.
    pub(crate) fn give_frame(&self, frame: Frame) {
        self.policy.forget(frame);
        if self.in_window(frame) {
            self.give_slot(frame);
        } else {
            self.arena.free(frame);
        }
        self.note_progress();
    }
}
