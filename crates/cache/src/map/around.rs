//! The neighbours of a page that faulted: installed with it while they are at hand, so that a walk faults seldom.
//!
//! *Owns*: which neighbours join, and how far a fault has reached.
//!
//! *Does not own*: how wide to look, which the mapping's walks say ([`Here::around`](super::Here)).
//!
//! *Locking*: neighbours are locked only if nobody has them, upwards; nobody is waited for.

use std::cell::Cell;
use std::ops::Range;

use pinfold_mem::{Access, Frame};
use smallvec::SmallVec;

use super::{AROUND_MAX, RUN_MAX, Service, note_mapped};
use crate::dirty::Note;
use crate::file::{Attempt, FilePages};
use crate::folio::Folio;
use crate::home::Moving;

/// How far a fault reached beyond its page, and how much further it may.
pub(super) struct Reach {
    low: Cell<u64>,
    high: Cell<u64>,
    /// Neighbours that may still move.
    moves: Cell<usize>,
}

impl Reach {
    pub(super) fn new(page: u64, moves: usize) -> Self {
        Self {
            low: Cell::new(page),
            high: Cell::new(page),
            moves: Cell::new(moves),
        }
    }

    /// The lowest page reached.
    pub(super) fn low(&self) -> u64 {
        self.low.get()
    }

    /// The highest page reached.
    pub(super) fn high(&self) -> u64 {
        self.high.get()
    }

    pub(super) fn note(&self, pages: &Range<u64>) {
        self.low.set(self.low.get().min(pages.start));
        self.high.set(self.high.get().max(pages.end - 1));
    }

    pub(super) fn take_move(&self) -> bool {
        let left = self.moves.get();
        self.moves.set(left.saturating_sub(1));
        left > 0
    }
}

impl FilePages {
    /// Installs cached pages of a range for reading, as long as nobody has to be waited for.
    pub(super) fn install_around(&self, pages: Range<u64>, service: Service<'_>) {
        let covers = service.target.covers();
        let start = pages.start.max(covers.start);
        let end = pages.end.min(covers.end).min(self.pages_end());
        let end = end.min(start.saturating_add(AROUND_MAX as u64));
        // What is stored to is seldom read beside; and a neighbour that is mapped for reading only would fault once more.
        if service.access == Access::Write {
            return;
        }
        let (mut page, mut fetched) = (start, start);
        while page < end {
            if page >= fetched {
                fetched = self.fetch_look_ups(page..end);
            }
            if !self.is_near(page) {
                page += 1;
                continue;
            }
            let left = page..end;
            let mut run: SmallVec<[Folio<'_>; RUN_MAX]> = SmallVec::new();
            while run.len() < RUN_MAX.min((end - page) as usize) {
                let Some(folio) = self.neighbour_here(page + run.len() as u64, service) else {
                    break;
                };
                run.push(folio);
            }
            self.track_run(&mut run, service);
            if let Some(last) = run.last() {
                let pages = page..last.page() + 1;
                page = pages.end;
                self.install_run(&run, pages, service);
                continue;
            }
            let moved = if service.target.shared() {
                self.move_around(&left, service)
            } else {
                0
            };
            // One that could neither be mapped nor moved is passed over.
            page += moved.max(1);
        }
    }

    /// Has the processor fetch what looking up the next neighbours needs; returns where it stopped. They are hashed apart, and
    /// looked up one after the other: a wait for memory each otherwise.
    pub(super) fn fetch_look_ups(&self, pages: Range<u64>) -> u64 {
        let end = pages.end.min(pages.start + RUN_MAX as u64);
        (pages.start..end).for_each(|page| self.cache().index.prefetch(self.key(page).hash()));
        end
    }

    /// Tells at a glance whether a page is cached; one that moves just then may be overlooked.
    fn is_near(&self, page: u64) -> bool {
        let key = self.key(page);
        let mut frames = self.cache().index.candidates(key.hash());
        frames.any(|frame| self.cache().header(frame).is(key))
    }

    /// Maps neighbouring pages of the window.
    fn install_run(&self, run: &[Folio<'_>], pages: Range<u64>, service: Service<'_>) {
        if service.target.shared() {
            for folio in run {
                note_mapped(folio, false, service);
            }
        }
        // A page that is mapped already ends it: those beside it mostly are as well, and each would cost a system call.
        let start = pages.start;
        let installed = service.target.resume(pages, service.target.shared());
        if installed.pages > 0 {
            service.reach.note(&(start..start + installed.pages as u64));
        }
    }

    /// Locks a page of the window that may be installed.
    fn neighbour_here(&self, page: u64, service: Service<'_>) -> Option<Folio<'_>> {
        match self.try_lock(page) {
            Attempt::Locked(folio) => {
                let fit = folio.is_uptodate() && folio.in_window() && page < self.pages_end();
                (fit && !self.may_hide_stores(&folio, service)).then_some(folio)
            }
            Attempt::Busy(_) | Attempt::Gone => None,
        }
    }

    /// As [`FilePages::track`] of neighbours; lets go of those from the first on that cannot be listed here.
    fn track_run(&self, run: &mut SmallVec<[Folio<'_>; RUN_MAX]>, service: Service<'_>) {
        if !service.tracked() {
            return;
        }
        let mut state = if service.signal {
            self.dirty()
        } else {
            self.dirty_roomy()
        };
        let mut list = |folio: &&Folio<'_>| {
            state
                .pages
                .try_insert(Note::Tracked, folio.page())
                .is_some()
        };
        let listed = run.iter().take_while(|folio| list(folio)).count();
        drop(state);
        run.truncate(listed);
    }

    /// Moves and installs neighbours from the first of `pages` on; returns how many.
    fn move_around(&self, pages: &Range<u64>, service: Service<'_>) -> u64 {
        let mut run: SmallVec<[Moving<'_>; RUN_MAX]> = SmallVec::new();
        while run.len() < RUN_MAX {
            let page = pages.start + run.len() as u64;
            let last = run.last().map(Moving::frame);
            match self.neighbour_to_move(page, last, pages, service) {
                Some(next) => run.push(next),
                None => break,
            }
        }
        let Some(first) = run.first() else {
            return 0;
        };
        let span = self.homes().frames_span(first.frame(), run.len());
        let installed = service.target.copy(pages.start, span, true).pages;
        for moving in run.into_iter().take(installed) {
            note_mapped(&moving.finish(), false, service);
        }
        if installed > 0 {
            let end = pages.start + installed as u64;
            service.reach.note(&(pages.start..end));
        }
        installed as u64
    }

    /// Locks a page that can join a run of pages on their way to the window.
    pub(super) fn neighbour_to_move(
        &self,
        page: u64,
        last: Option<Frame>,
        around: &Range<u64>,
        service: Service<'_>,
    ) -> Option<Moving<'_>> {
        if !self.may_join(page, around, service) || !service.reach.take_move() {
            return None;
        }
        let Attempt::Locked(folio) = self.try_lock(page) else {
            return None;
        };
        let adjacent = last.is_none_or(|last| last.0 + 1 == folio.frame().0);
        if page >= self.pages_end() || !folio.is_uptodate() || folio.in_window() || !adjacent {
            return None;
        }
        // Nothing is evicted for a page that nobody has asked for.
        let slot = self.cache().spare_slot()?;
        let moving = Moving::begin(folio, slot).ok()?;
        self.track(page, service).then_some(moving)
    }

    fn may_join(&self, page: u64, around: &Range<u64>, service: Service<'_>) -> bool {
        around.contains(&page) && service.target.covers().contains(&page) && page < self.pages_end()
    }
}
