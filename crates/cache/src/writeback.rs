//! Dirty pages on their way to the store (SEMANTICS.md section G).
//!
//! One pass over a file: take the set of dirty pages as it is now (the TOWRITE tag: what becomes dirty later cannot
//! prolong the pass, G-1), lock each, move it from DIRTY to WRITEBACK in one step, unlock it, and send runs of
//! neighbours as one transfer. The completion takes no lock of classes 1 to 5, so anybody above may wait for it.
//!
//! Neighbours that user mappings may store to are locked together, write-protected in every mapping with one call, and
//! only then marked clean and read: a store either comes before and is written, or faults, waits for the lock, and makes
//! the page dirty again (F-2, F-8). A page that a device writes to is written as a copy and stays dirty (E-9).

mod flusher;
mod storing;

use pinfold_base::sync::path::Ordering;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use pinfold_base::roomy::Roomy;
use pinfold_base::sync::{self, Condvar, Mutex};
use pinfold_base::{PAGE_SIZE, Progress};
use pinfold_mem::{AlignedBuf, Frame, Segments};
use pinfold_store::{StoreError, Transfer};
use smallvec::SmallVec;

use crate::dirty::Note;
use crate::file::{Attempt, FilePages};
use crate::folio::Folio;
use crate::state::{DIRTY, ERROR, UMAP_ASYNC, UMAP_RW, WRITEBACK, write_pins};
use crate::stores::Harvest;
use storing::Storing;

pub(crate) use flusher::Flusher;
pub use flusher::Pace;

const PAGE: usize = PAGE_SIZE as usize;
/// Pages in one write transfer at most: 4 MiB. A filesystem makes direct writes that extend a file wait for each other,
/// so the device is idle between two of them: the longer each is, the less.
const TRANSFER_PAGES_MAX: usize = 1024;
/// Transfers of one pass in flight at most.
const IN_FLIGHT_MAX: usize = 8;
/// Transfers gathered before they are submitted together.
const SUBMIT_BATCH: usize = 4;
/// Bytes gathered before they are submitted, however few transfers they make.
const SUBMIT_BYTES: usize = 1 << 20;
/// Pages locked together to be write-protected with one call, at most.
const HELD_MAX: usize = 64;
/// Pages one opportunistic visit to a file writes at most, so that no file starves the others.
const VISIT_PAGES_MAX: usize = 8192;

/// How thorough a pass is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// ALL: every page dirty at the start, and every write-back under way then, is waited for; errors do not end it.
    Integrity,
    /// As ALL, and no page that a device writes to stays dirty: its transfer is waited for. For whoever gives the right to
    /// cache away; nothing becomes dirty meanwhile.
    HandOver,
    /// NONE: skips what is locked or under write-back already, ends at its budget.
    Opportunistic,
}

impl Mode {
    /// Tells whether every page is waited for.
    fn is_thorough(self) -> bool {
        self != Self::Opportunistic
    }
}

/// Transfers of one pass: how many are in flight, what went wrong first.
#[derive(Debug, Default)]
struct Pass {
    state: Mutex<PassState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct PassState {
    in_flight: usize,
    first_error: Option<StoreError>,
}

impl Pass {
    fn begin(&self) {
        let mut state = self.state.lock();
        state.in_flight += 1;
    }

    fn wait_below(&self, limit: usize) {
        let mut state = self.state.lock();
        while state.in_flight >= limit {
            state = self.changed.wait(state);
        }
    }

    fn end(&self, stop: Option<StoreError>) {
        let mut state = self.state.lock();
        state.in_flight -= 1;
        if state.first_error.is_none() {
            state.first_error = stop;
        }
        self.changed.notify_all();
    }

    fn finish(&self) -> Option<StoreError> {
        self.wait_below(1);
        self.state.lock().first_error
    }
}

/// Neighbouring pages that were moved to WRITEBACK and wait to be sent. Dropped early, they are dirty again.
struct Run<'a> {
    file: &'a Arc<FilePages>,
    start: u64,
    frames: Vec<Frame>,
    /// Bytes of the last page that lie below the end of the file.
    last_len: usize,
}

impl<'a> Run<'a> {
    fn new(file: &'a Arc<FilePages>) -> Self {
        Self {
            file,
            start: 0,
            frames: Vec::new(),
            last_len: PAGE,
        }
    }

    /// Tells whether `page` goes on where the run and `held` pages after it end.
    fn accepts(&self, page: u64, held: &[Folio<'_>]) -> bool {
        let next = match held.last() {
            Some(last) => last.page() + 1,
            None if self.frames.is_empty() => return true,
            None => self.start + self.frames.len() as u64,
        };
        next == page && self.frames.len() + held.len() < TRANSFER_PAGES_MAX && self.last_len == PAGE
    }

    fn push(&mut self, page: u64, frame: Frame, len: usize) {
        if self.frames.is_empty() {
            self.start = page;
        }
        self.frames.push(frame);
        self.last_len = len;
    }

    fn take_transfer(&mut self, pass: &Arc<Pass>) -> Option<Transfer> {
        if self.frames.is_empty() {
            return None;
        }
        let frames = std::mem::take(&mut self.frames);
        let bytes = (frames.len() - 1) * PAGE + self.last_len;
        self.last_len = PAGE;
        let segments = self
            .file
            .segments_of(self.start, frames.iter().copied())
            .slice(0, bytes);
        let counters = &self.file.cache().counters;
        counters.write_transfers.bump();
        counters.pages_written.add(frames.len() as u64);
        pass.begin();
        let storing = Storing::new(self.file, pass, self.start, frames, bytes);
        Some(Transfer {
            offset: self.start * PAGE_SIZE,
            segments,
            done: Box::new(move |outcome| storing.end(outcome)),
        })
    }
}

impl Drop for Run<'_> {
    fn drop(&mut self) {
        for (i, &frame) in self.frames.iter().enumerate() {
            self.file.undo_write_back(self.start + i as u64, frame);
        }
    }
}

/// One pass over a file's dirty pages.
///
/// It never waits while it keeps pages in WRITEBACK that it has not sent: whoever it waited for might wait for those.
struct Sweep<'a> {
    file: &'a Arc<FilePages>,
    mode: Mode,
    pass: Arc<Pass>,
    run: Run<'a>,
    /// Pages after the run that user mappings may store to: locked, to be protected together.
    held: SmallVec<[Folio<'a>; 1]>,
    batch: Vec<Transfer>,
    /// Pages whose bytes another pass is storing: to be waited for at the end.
    elsewhere: Vec<u64>,
    sent: usize,
}

impl<'a> Sweep<'a> {
    /// Moves one page from DIRTY to WRITEBACK and gathers it, unless it is gone, clean, past the end, or not worth
    /// waiting for.
    fn visit(&mut self, page: u64) {
        if !self.run.accepts(page, &self.held) {
            self.close_run();
            let bytes: usize = self.batch.iter().map(|one| one.segments.bytes()).sum();
            if self.batch.len() >= SUBMIT_BATCH || bytes >= SUBMIT_BYTES {
                self.send();
            }
        }
        let Some(mut folio) = self.lock(page) else {
            return;
        };
        if self.mode.is_thorough() && folio.is_dirty() && folio.is_under_writeback() {
            // Older data of this page is in flight, perhaps in what this pass has gathered (G-2).
            drop(folio);
            self.send();
            self.file.wait_page_written(page);
            match self.lock(page) {
                Some(again) => folio = again,
                None => return,
            }
        }
        while self.mode == Mode::HandOver && folio.is_dirty() && folio.is_under_writeback() {
            // A copy of a page that a device writes to.
            drop(folio);
            self.send();
            self.file.wait_page_written(page);
            match self.lock(page) {
                Some(again) => folio = again,
                None => return,
            }
        }
        if folio.is_under_writeback() {
            // Another pass has taken the bytes that this one came for: stored they are only when that one ends.
            if self.mode.is_thorough() {
                self.elsewhere.push(page);
            }
            return;
        }
        if !folio.is_dirty() {
            return;
        }
        if self.mode == Mode::HandOver && write_pins(folio.state()) > 0 {
            // The lock keeps new pins away, and those there are leaves.
            self.send();
            folio.wait_movable();
        }
        let state = folio.state();
        if write_pins(state) > 0 {
            // A device writes to it: what it writes later must not look stored (E-5).
            if self.mode.is_thorough() {
                self.send_copy(folio);
            }
        } else if state & (UMAP_RW | UMAP_ASYNC) != 0 || !self.held.is_empty() {
            self.held.push(folio);
            if self.held.len() == HELD_MAX {
                self.clean_held();
            }
        } else {
            self.gather(folio);
        }
    }

    /// Takes stores through mappings away from the pages held, then gathers them.
    fn clean_held(&mut self) {
        if let (Some(first), Some(last)) = (self.held.first(), self.held.last()) {
            self.file.protect(first.page()..last.page() + 1);
        }
        for folio in std::mem::take(&mut self.held) {
            self.gather(folio);
        }
    }

    fn gather(&mut self, folio: Folio<'a>) {
        let page = folio.page();
        if let Some((frame, len)) = self.file.start_write(folio) {
            self.run.push(page, frame, len);
            self.sent += 1;
        }
    }

    /// Sends a copy of a page that stays dirty.
    fn send_copy(&mut self, folio: Folio<'a>) {
        self.close_run();
        let (page, frame) = (folio.page(), folio.frame());
        let Some(len) = self.file.len_to_write(page) else {
            return;
        };
        let mut copy = AlignedBuf::zeroed(PAGE);
        let bytes = &mut copy.as_mut_slice()[..len];
        self.file.homes().read(frame, page, 0, bytes);
        let cache = self.file.cache();
        cache.header(frame).state.copy_for_write();
        // Dirty, so there is room.
        self.file.dirty().pages.insert(Note::Writing, page);
        cache.writing_pages.fetch_add(1, Ordering::Relaxed);
        drop(folio);
        cache.counters.write_transfers.bump();
        cache.counters.pages_written.bump();
        self.pass.begin();
        let storing = Storing::new(self.file, &self.pass, page, vec![frame], len);
        self.batch.push(Transfer {
            offset: page * PAGE_SIZE,
            segments: Segments::of_buf(&Arc::new(copy), len),
            done: Box::new(move |outcome| storing.end(outcome)),
        });
        self.sent += 1;
    }

    fn lock(&mut self, page: u64) -> Option<Folio<'a>> {
        match self.file.try_lock(page) {
            Attempt::Locked(folio) => Some(folio),
            Attempt::Busy(_) if self.mode.is_thorough() => {
                self.send();
                self.file.lock(page)
            }
            Attempt::Busy(_) | Attempt::Gone => None,
        }
    }

    fn close_run(&mut self) {
        self.clean_held();
        self.batch.extend(self.run.take_transfer(&self.pass));
    }

    /// Submits everything gathered so far.
    fn send(&mut self) {
        self.close_run();
        if self.batch.is_empty() {
            return;
        }
        self.pass.wait_below(IN_FLIGHT_MAX + self.batch.len());
        self.file.object().write(std::mem::take(&mut self.batch));
    }
}

impl FilePages {
    /// Writes back dirty pages of `range`; returns how many were sent. Waits for all it sent.
    ///
    /// # Errors
    /// The first error of this pass; it is recorded for every open file as well.
    pub fn write_back(
        self: &Arc<Self>,
        range: Range<u64>,
        mode: Mode,
    ) -> Result<usize, StoreError> {
        if mode.is_thorough() {
            // The ordinary case of a direct transfer.
            let nothing = self.dirty().pages.entries() == 0;
            if nothing {
                self.forget_clean_files();
                return Ok(0);
            }
            self.harvest(range.clone(), Harvest::Wait);
        }
        let (todo, under_way) = self.to_write(range, mode);
        let mut sweep = Sweep {
            file: self,
            mode,
            pass: Arc::new(Pass::default()),
            run: Run::new(self),
            held: SmallVec::new(),
            batch: Vec::new(),
            elsewhere: under_way,
            sent: 0,
        };
        for page in todo {
            sweep.visit(page);
        }
        sweep.send();
        let (sent, error) = (sweep.sent, sweep.pass.finish());
        for page in std::mem::take(&mut sweep.elsewhere) {
            self.wait_page_written(page);
        }
        if sent > 0 {
            self.tell_owner();
        }
        self.forget_clean_files();
        error.map_or(Ok(sent), Err)
    }

    /// Does what the flusher does now and then, where there is none.
    fn forget_clean_files(&self) {
        if !self.cache().flusher_runs() {
            self.cache().delist_clean();
        }
    }

    /// Lists what a pass visits, and what is under way already.
    fn to_write(&self, range: Range<u64>, mode: Mode) -> (Vec<u64>, Vec<u64>) {
        if mode.is_thorough() {
            return (
                self.noted(Note::Dirty, range.clone(), usize::MAX),
                self.noted(Note::Writing, range, usize::MAX),
            );
        }
        let from = self.dirty().cursor.clamp(range.start, range.end);
        let mut pages = self.noted(Note::Dirty, from..range.end, VISIT_PAGES_MAX);
        let left = VISIT_PAGES_MAX - pages.len();
        pages.extend(self.noted(Note::Dirty, range.start..from, left));
        self.dirty().cursor = pages.last().map_or(0, |&last| last + 1);
        (pages, Vec::new())
    }

    /// Moves a locked dirty page to WRITEBACK and unlocks it; `None` when it lies past the end.
    fn start_write(&self, folio: Folio<'_>) -> Option<(Frame, usize)> {
        let page = folio.page();
        let mut len = self.len_to_write(page)?;
        if len < PAGE && folio.state() & UMAP_ASYNC != 0 {
            // Stores pass by protection: once the file has grown, one to what it grew over must not be zeroed.
            folio.protect();
            len = self.len_to_write(page)?;
        }
        if len < PAGE {
            // The tail is zeroed every time it is written (INV7, F-6).
            folio.zero_from(len);
        }
        let cache = self.cache();
        cache.header(folio.frame()).state.clean_for_write();
        let (was_dirty, was_writing) = {
            let mut state = self.dirty();
            let was_writing = state.pages.contains(Note::Writing, page);
            let was_dirty = state.pages.change(Note::Dirty, Note::Writing, page);
            if state.pages.is_empty(Note::Dirty) {
                state.since = None;
            }
            (was_dirty, was_writing)
        };
        debug_assert!(was_dirty && !was_writing, "{page} was not accounted for");
        cache.writing_pages.fetch_add(1, Ordering::Relaxed);
        if was_dirty {
            cache.dirty_pages.fetch_sub(1, Ordering::Relaxed);
        }
        let frame = folio.frame();
        drop(folio);
        Some((frame, len))
    }

    /// Returns how many bytes of a page are the file's; `None` when it lies past the end.
    fn len_to_write(&self, page: u64) -> Option<usize> {
        // A truncation under way may have lowered the size and be about to drop the page: it waits for nobody but it.
        let len = self.end().checked_sub(page * PAGE_SIZE)?;
        let len = usize::try_from(len).unwrap_or(PAGE).min(PAGE);
        (len > 0).then_some(len)
    }

    /// Ends write-back of neighbouring pages. Runs in a completion.
    fn end_write_back(&self, start: u64, frames: &[Frame], outcome: &Progress<StoreError>) {
        let cache = self.cache();
        if let Some(error) = outcome.stop {
            cache.counters.write_errors.bump();
            self.errors().set(error.errno);
        }
        self.drop_aliases(start, frames);
        for (i, &frame) in frames.iter().enumerate() {
            let page = start + i as u64;
            let stored = outcome.stop.is_none() || (i as u64 + 1) * PAGE_SIZE <= outcome.done;
            let again = !stored && cache.config.retain_dirty_on_error;
            self.leave_write_back(page, frame, if stored { 0 } else { ERROR }, again);
        }
        cache.note_progress();
    }

    /// Takes pages of the window out of the library's own page tables, by which a transfer went: they would count twice in
    /// the process.
    fn drop_aliases(&self, start: u64, frames: &[Frame]) {
        let windowed = |&frame: &Frame| self.cache().in_window(frame);
        let (first, last) = (
            frames.iter().position(windowed),
            frames.iter().rposition(windowed),
        );
        if let (Some(window), Some(first), Some(last)) = (self.window(), first, last) {
            window.drop_alias(start + first as u64..start + last as u64 + 1);
        }
    }

    /// Takes a page that was never sent back from WRITEBACK to DIRTY.
    fn undo_write_back(&self, page: u64, frame: Frame) {
        self.leave_write_back(page, frame, 0, true);
    }

    fn leave_write_back(&self, page: u64, frame: Frame, set: u64, dirty_again: bool) {
        let cache = self.cache();
        {
            let mut state = self.dirty();
            // A copy was written of a page that stayed dirty: then there is nothing to add.
            let again = dirty_again && !state.pages.contains(Note::Dirty, page);
            if again {
                state.pages.change(Note::Writing, Note::Dirty, page);
                cache.dirty_pages.fetch_add(1, Ordering::Relaxed);
                state.since.get_or_insert_with(sync::now);
            } else {
                state.pages.remove(Note::Writing, page);
            }
        }
        cache.writing_pages.fetch_sub(1, Ordering::Relaxed);
        let set = set | if dirty_again { DIRTY } else { 0 };
        if cache.header(frame).state.end_write(set) {
            cache.wake(frame);
        }
    }

    fn wait_page_written(&self, page: u64) {
        // A page under write-back cannot leave its frame, so the frame's word is the one to wait on.
        if let Some(page) = self.get(page) {
            let frame = page.frame();
            drop(page);
            self.cache().wait(frame, |state| state & WRITEBACK == 0);
        } else if let Some(folio) = self.lock(page) {
            folio.wait_writeback();
        }
    }

    /// Tells since when pages have been dirty.
    fn dirty_since(&self) -> Option<Instant> {
        self.dirty().since
    }
}
