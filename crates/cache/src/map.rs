//! Pages in user mappings: how a fault gets its page, and how access is taken away again (SEMANTICS.md section F).
//!
//! *Owns*: the order of steps that keeps stores from being lost: valid before mapped (INV1), dirty before writable
//! (INV2), protected before clean.
//!
//! *Does not own*: mappings, their descriptors, who waits for a fault ([`MapTarget`] and [`ReverseMap`], which
//! `pinfold-fault` implements); the move between a page's two homes (`home.rs`); which neighbours are mapped with a page
//! (`map/around.rs`).
//!
//! *Locking*: entered with nothing held, or from a signal handler with nothing held ([`FilePages::try_map`], which waits
//! for nobody and allocates nothing). A store takes the gate's ADD before the folio; nothing but the store's read is waited
//! for under it. Page tables are changed under the folio's lock; ioctls are leaves.

mod around;

use std::ops::Range;
use std::slice;
use std::sync::Arc;

use pinfold_base::{Errno, PAGE_SIZE};
use pinfold_mem::uffd::{InstallStop, Installed};
use pinfold_mem::{Access, RawSpan, Window};
use smallvec::SmallVec;

use crate::CacheError;
use crate::dirty::Note;
use crate::file::{Attempt, FilePages, Want};
use crate::folio::Folio;
use crate::gate::AddGuard;
use crate::home::Moving;
use crate::lease::PageRef;
use crate::readahead::ReadAhead;
use crate::slots::Slot;
use crate::state::{DIRTY, LOCKED, UMAP_ASYNC, UMAP_RO, UMAP_RW};
use around::Reach;

/// Pages installed around a fault at most, on either side of it.
pub const AROUND_MAX: usize = 256;
/// Pages installed with one call at most: as many as a signal's stack bears.
const RUN_MAX: usize = 64;
/// Neighbours that move along with a fault served in a signal handler, which the program's other signals wait for: a tenth
/// of a millisecond.
pub const SIGNAL_MOVES_MAX: usize = 64;

/// One user mapping, while the cache serves a fault in it; implemented by `pinfold-fault`.
///
/// Called with folios locked: must take no lock but leaves and touch no user mapping. A mapping that is gone meanwhile
/// answers [`InstallStop::Gone`]. Whoever waits for the fault is woken by the
/// caller of [`FilePages::map`], once it has returned: an installation that met a mapped page wakes
/// nobody.
pub trait MapTarget {
    /// Returns the pages of the file that the mapping shows.
    fn covers(&self) -> Range<u64>;

    /// Tells whether stores go to the file; in a private mapping they stay with it.
    fn shared(&self) -> bool;

    /// Tells whether the fault is a store to a page that is mapped for reading. A hint that saves a system call.
    fn protected(&self) -> bool {
        false
    }

    /// Tells whether the kernel lets stores to pages mapped for reading pass without a fault, and remembers them
    /// ([`ReverseMap::stores`]).
    fn tracked(&self) -> bool {
        false
    }

    /// Tells whether a page may ever have had an entry in this tracked mapping since all that was stored to it was found: then an
    /// empty place there may hide a store. Called with the page's lock held.
    fn may_have_shown(&self, _page: u64) -> bool {
        true
    }

    /// Allocates the window's pages from `page` on, fills them from `from`, and maps them; for reading only when
    /// `protect`. Called on shared mappings alone.
    fn copy(&self, page: u64, from: RawSpan, protect: bool) -> Installed;

    /// Maps pages that the window has; for reading only when `protect`.
    fn resume(&self, pages: Range<u64>, protect: bool) -> Installed;

    /// Lets mapped pages be stored to.
    fn unprotect(&self, pages: Range<u64>);
}

/// All user mappings of a file; implemented by `pinfold-fault`.
///
/// Called with folios locked, under the same rule as [`MapTarget`].
pub trait ReverseMap: Send + Sync {
    /// Takes all access away from the shared mappings of these pages. Private copies stay.
    fn unmap(&self, pages: Range<u64>);

    /// Takes the private copies of these pages away from the program: the file was cut off before them. Called with no folio
    /// locked, after which none of these pages is installed until the file has grown.
    fn cut(&self, _pages: Range<u64>) {}

    /// Makes these pages fault at the next store through any mapping; returns when no processor can store to them.
    fn protect(&self, pages: Range<u64>);

    /// Tells whether any mapping of these pages is tracked ([`MapTarget::tracked`]).
    fn tracks(&self, _pages: &Range<u64>) -> bool {
        false
    }

    /// Tells `found` which of these pages were stored to through tracked mappings since this was asked last or they were
    /// protected, and protects those again; more than that where it cannot tell.
    fn stores(&self, _pages: &Range<u64>, _found: &mut dyn FnMut(Range<u64>)) {}

    /// As [`ReverseMap::stores`], and changes nothing: a hint, which may miss what somebody else has just been told.
    fn seem_stored(&self, pages: &Range<u64>, found: &mut dyn FnMut(Range<u64>)) {
        found(pages.clone());
    }

    /// Takes all access away from the shared mappings of several runs of pages, which costs less than one by one.
    fn unmap_runs(&self, runs: &[Range<u64>]) {
        runs.iter().for_each(|run| self.unmap(run.clone()));
    }

    /// As [`ReverseMap::unmap_runs`], and then as [`ReverseMap::stores`] of each: what it finds is all there will be until a
    /// page is installed again.
    fn withdraw(&self, runs: &[Range<u64>], _found: &mut dyn FnMut(Range<u64>)) {
        self.unmap_runs(runs);
    }
}

/// How a fault was answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "an access beyond the end is SIGBUS"]
pub enum MapOutcome {
    /// The page is mapped, or was and is gone again: repeat the access.
    Mapped,
    /// The page lies beyond the end of the file.
    BeyondEnd,
}

/// How a fault is served by whoever must not allocate.
#[derive(Debug, Clone)]
pub struct Here<'a> {
    /// Neighbours that are installed with the page if they are cached.
    pub around: Range<u64>,
    /// Of these, how many may move from the arena, which takes a copy each: [`SIGNAL_MOVES_MAX`] in a signal handler,
    /// [`AROUND_MAX`] elsewhere.
    pub moves: usize,
    /// The reading pattern to learn from. Reading ahead allocates: somebody else has been told to
    /// ([`Walks::note`](crate::Walks::note)).
    pub ahead: Option<&'a ReadAhead>,
    /// Whether a page that is not cached is read, and room made for it.
    pub store: bool,
}

/// What became of an attempt to install a locked page.
enum Tried {
    Done(MapOutcome),
    /// The page is pinned or on its way to the store: wait until it may move.
    Stuck,
    /// The kernel did not fill the page in for us: fill it by the library's own address.
    ByHand,
}

/// Who serves a fault, and what it may do.
#[derive(Clone, Copy)]
struct Service<'a> {
    target: &'a dyn MapTarget,
    access: Access,
    /// Fill windows by the library's own address.
    by_hand: bool,
    /// Allocates nothing.
    signal: bool,
    reach: &'a Reach,
}

impl Service<'_> {
    /// Tells whether the file has to know of the access.
    fn stores(&self) -> bool {
        self.access == Access::Write && self.target.shared()
    }

    /// Tells whether stores may come later that nobody is told of.
    fn tracked(&self) -> bool {
        self.target.shared() && self.target.tracked()
    }

    /// Tells whether a page may become dirty by this, now or later.
    fn lets_store(&self) -> bool {
        self.stores() || self.tracked()
    }

    /// Tells whether the page is installed for reading only. A private mapping needs no protection: the kernel copies the
    /// page at its first store.
    fn protect(&self) -> bool {
        self.target.shared() && !self.stores()
    }
}

impl FilePages {
    /// Makes the file's pages mappable: the first `pages` of them have addresses in the window from here on. `reverse` is
    /// told when access to them must end; the first call's stays.
    ///
    /// # Errors
    /// [`CacheError::Unmappable`]: no descriptor, no address space, or past the limit on file sizes.
    pub fn open_window(
        &self,
        pages: u64,
        reverse: Arc<dyn ReverseMap>,
    ) -> Result<&Arc<Window>, CacheError> {
        if self.homes.window().is_none() {
            let _turn = self.opening.lock();
            if self.homes.window().is_none() {
                let window = Window::new().map_err(CacheError::Unmappable)?;
                self.cache().open_slots(self.id(), &window, &reverse);
                let _ = self.reverse.set(reverse);
                self.homes.open(window);
            }
        }
        let window = self
            .homes
            .window()
            .expect("it was there, or was made above");
        window.ensure(pages).map_err(CacheError::Unmappable)?;
        Ok(window)
    }

    /// Write-protects pages in every mapping. Their locks are held.
    pub(crate) fn protect(&self, pages: Range<u64>) {
        if let Some(reverse) = self.reverse.get() {
            reverse.protect(pages);
        }
    }

    /// Takes pages out of every shared mapping. Their locks are held.
    pub(crate) fn unmap(&self, pages: Range<u64>) {
        if let Some(reverse) = self.reverse.get() {
            reverse.unmap(pages);
        }
    }

    /// Takes pages out of the window and so out of every mapping. Their locks are held, they are invalid and unused.
    pub(crate) fn punch(&self, pages: Range<u64>) {
        if let Some(window) = self.homes.window()
            && window.punch(pages.clone()).is_err()
        {
            // The memory stays behind until the page comes back; nobody must see it meanwhile.
            self.unmap(pages);
        }
    }

    fn pages_end(&self) -> u64 {
        self.end().div_ceil(PAGE_SIZE)
    }

    /// Serves a fault: brings the page in, moves it to the window, makes it dirty before a store can reach it, and installs
    /// it, with those of its neighbours within `around` that are cached. Nothing may be held.
    ///
    /// A page that was not cached and follows no other comes alone: nothing has brought its neighbours, and those that are
    /// there are mapped since their own fault.
    ///
    /// A page that vanishes meanwhile (evicted, cut off) is answered with [`MapOutcome::Mapped`] as well: the access is
    /// repeated and faults again. A store makes the page dirty only in a shared mapping.
    ///
    /// # Errors
    /// The store's, of this very page; no room for the page; the system has no memory for it.
    pub fn map(
        self: &Arc<Self>,
        page: u64,
        access: Access,
        around: Range<u64>,
        ahead: Option<&ReadAhead>,
        target: &dyn MapTarget,
    ) -> Result<MapOutcome, CacheError> {
        let want = Want {
            pages: 1,
            ahead,
            nowait: false,
        };
        let reach = Reach::new(page, usize::MAX);
        let mut service = Service {
            target,
            access,
            by_hand: !target.shared(),
            signal: false,
            reach: &reach,
        };
        // Taken with nothing held, because it may have to wait; given back unless the page moves.
        let mut slot = None;
        let alone = self.get(page).is_none() && !ahead.is_some_and(|ahead| ahead.follows(page));
        let around = if alone { page..page + 1 } else { around };
        // Every round waits for somebody's progress or finds something changed by it, as with `read`.
        loop {
            if page >= self.pages_end() {
                return Ok(MapOutcome::BeyondEnd);
            }
            let found = self.read(page, &want)?;
            if slot.is_none() && !self.cache().in_window(found.frame()) {
                slot = self.cache().spare_slot();
                if slot.is_none() {
                    drop(found);
                    slot = Some(self.cache().take_slot()?);
                    continue;
                }
            }
            let (gate, attempt) = self.try_lock_found(page, found, service.lets_store());
            let folio = match attempt {
                Attempt::Locked(folio) => folio,
                Attempt::Busy(frame) => {
                    drop(gate);
                    self.cache().wait(frame, |state| state & LOCKED == 0);
                    continue;
                }
                Attempt::Gone => continue,
            };
            let tried = self.install(folio, &mut slot, &around, service)?;
            drop(gate);
            match tried {
                Tried::Done(outcome) => {
                    if service.stores() {
                        self.note_dirty_file();
                    }
                    if let Some(ahead) = ahead {
                        ahead.reached(reach.low(), reach.high());
                    }
                    return Ok(outcome);
                }
                Tried::Stuck => self.wait_movable(page),
                Tried::ByHand => service.by_hand = true,
            }
        }
    }

    /// As [`FilePages::map`], as far as it needs no waiting, no allocation and no I/O; may run in a signal handler of a
    /// thread that holds nothing of the library. `None`: call [`FilePages::map`], elsewhere.
    pub fn try_map(
        self: &Arc<Self>,
        page: u64,
        access: Access,
        target: &dyn MapTarget,
    ) -> Option<MapOutcome> {
        let here = Here {
            around: page..page + 1,
            moves: 0,
            ahead: None,
            store: false,
        };
        self.map_here(page, access, &here, target)
    }

    /// As [`FilePages::try_map`], with the neighbours of `here`; waits for the store, and nobody else, where that is allowed.
    pub fn map_here(
        self: &Arc<Self>,
        page: u64,
        access: Access,
        here: &Here<'_>,
        target: &dyn MapTarget,
    ) -> Option<MapOutcome> {
        if page >= self.pages_end() {
            return Some(MapOutcome::BeyondEnd);
        }
        let reach = Reach::new(page, here.moves);
        let service = Service {
            target,
            access,
            by_hand: false,
            signal: true,
            reach: &reach,
        };
        let gate = if service.lets_store() {
            Some(self.gate().try_add()?)
        } else {
            None
        };
        let mut around = here.around.clone();
        let folio = match self.try_lock(page) {
            Attempt::Locked(folio) => {
                self.note_fault_hit(&folio);
                folio
            }
            Attempt::Gone if here.store && target.shared() => {
                around = page..page + 1;
                self.fill_here(page, here.ahead, gate.as_ref())?
            }
            Attempt::Busy(_) | Attempt::Gone => return None,
        };
        let mut slot = None;
        if !folio.in_window() {
            if !target.shared() {
                return None;
            }
            slot = Some(
                self.cache()
                    .spare_slot()
                    .or_else(|| here.store.then(|| self.cache().try_take_slot()).flatten())?,
            );
        }
        if service.stores() && !self.try_note_dirty(&folio) {
            return None;
        }
        match self.install(folio, &mut slot, &around, service) {
            Ok(Tried::Done(outcome)) => {
                if let Some(ahead) = here.ahead {
                    ahead.reached(reach.low(), reach.high());
                }
                Some(outcome)
            }
            Ok(Tried::Stuck | Tried::ByHand) | Err(_) => None,
        }
    }

    /// Does what a first store through a shared mapping does, without installing anything: the page is cached, valid and
    /// dirty afterwards. Nothing may be held.
    ///
    /// # Errors
    /// As of [`FilePages::map`].
    pub fn make_writable(self: &Arc<Self>, page: u64) -> Result<MapOutcome, CacheError> {
        let Some((gate, folio)) = self.lock_valid(page, true)? else {
            return Ok(MapOutcome::BeyondEnd);
        };
        self.make_dirty(&folio);
        drop(folio);
        drop(gate);
        self.note_dirty_file();
        Ok(MapOutcome::Mapped)
    }

    /// Locks a page that is valid and dirty, if nobody else has it: its bytes may be changed, as through a mapping that
    /// may be stored to, and it stays dirty.
    #[must_use]
    pub fn try_lock_dirty(&self, page: u64) -> Option<Folio<'_>> {
        match self.try_lock(page) {
            Attempt::Locked(folio) if folio.is_uptodate() && folio.is_dirty() => Some(folio),
            Attempt::Locked(_) | Attempt::Busy(_) | Attempt::Gone => None,
        }
    }

    /// Tries to lock a page that is cached. For a store, with the right to add pages: whoever blocks that has seen which
    /// pages are dirty; one that became so behind its back would be lost, or stay (C-1, F-4, F-5).
    ///
    /// The reference kept the page until here. It is not held while this waits, for who blocks waits for references.
    fn try_lock_found<'a>(
        &'a self,
        page: u64,
        found: PageRef<'a>,
        stores: bool,
    ) -> (Option<AddGuard<'a>>, Attempt<'a>) {
        let mut found = Some(found);
        let gate = stores.then(|| {
            self.gate().try_add().unwrap_or_else(|| {
                found = None;
                self.gate().add()
            })
        });
        let attempt = self.try_lock(page);
        // A move is none the worse for having no reference to mind.
        drop(found);
        (gate, attempt)
    }

    /// Brings a page in and locks it, for a store with the right to add pages;
    /// `None` beyond the end.
    pub(crate) fn lock_valid(
        self: &Arc<Self>,
        page: u64,
        stores: bool,
    ) -> Result<Option<(Option<AddGuard<'_>>, Folio<'_>)>, CacheError> {
        let want = Want {
            pages: 1,
            ahead: None,
            nowait: false,
        };
        loop {
            if page >= self.pages_end() {
                return Ok(None);
            }
            let found = self.read(page, &want)?;
            let (gate, attempt) = self.try_lock_found(page, found, stores);
            match attempt {
                // Looked at again under the lock, which truncation takes after it has set the size (F-3).
                Attempt::Locked(folio) if page < self.pages_end() => {
                    return Ok(Some((gate, folio)));
                }
                Attempt::Locked(_) => return Ok(None),
                Attempt::Busy(frame) => {
                    drop(gate);
                    self.cache().wait(frame, |state| state & LOCKED == 0);
                }
                Attempt::Gone => {}
            }
        }
    }

    /// Makes a locked, valid page dirty.
    pub(crate) fn make_dirty(&self, folio: &Folio<'_>) {
        self.note_dirty(folio.page(), folio.frame());
        self.cache().header(folio.frame()).state.set(DIRTY);
    }

    /// As [`FilePages::make_dirty`], and makes the flusher know the file; false where either would allocate. The page may
    /// be dirty then without need.
    fn try_note_dirty(self: &Arc<Self>, folio: &Folio<'_>) -> bool {
        if !folio.is_dirty() {
            let mut state = self.dirty();
            let Some(new) = state.pages.try_insert(Note::Dirty, folio.page()) else {
                return false;
            };
            self.note_dirtied(&mut state, new);
            drop(state);
            self.cache().header(folio.frame()).state.set(DIRTY);
        }
        self.cache().try_enlist_dirty(self)
    }

    /// Sleeps until a page is neither pinned nor on its way to the store, or gone.
    fn wait_movable(&self, page: u64) {
        if let Some(folio) = self.lock(page) {
            folio.wait_movable();
        }
    }

    /// Installs a locked page. `slot` is used up if it moves.
    fn install<'a>(
        &'a self,
        folio: Folio<'a>,
        slot: &mut Option<Slot<'a>>,
        around: &Range<u64>,
        service: Service<'_>,
    ) -> Result<Tried, CacheError> {
        let page = folio.page();
        // Looked at again under the lock, which truncation takes after it has set the size (F-3).
        if page >= self.pages_end() {
            return Ok(Tried::Done(MapOutcome::BeyondEnd));
        }
        if !folio.is_uptodate() {
            return Ok(Tried::Stuck);
        }
        if service.stores() && !service.signal {
            // Before anything lets a store in (F-1).
            self.make_dirty(&folio);
        }
        if !folio.in_window() {
            let Some(slot) = slot.take() else {
                // It was in the window a moment ago, and has been evicted and read again since.
                return Ok(Tried::Done(MapOutcome::Mapped));
            };
            if !self.track(page, service) {
                return Ok(Tried::Stuck);
            }
            let moving = match Moving::begin(folio, slot) {
                Ok(moving) => moving,
                Err(_stuck) => {
                    self.untrack(page);
                    return Ok(Tried::Stuck);
                }
            };
            if !service.by_hand {
                return Ok(self.install_moving(moving, around, service));
            }
            let window = self.window().ok_or(CacheError::Window(Errno::EINVAL))?;
            window
                .populate(page..page + 1)
                .map_err(CacheError::Window)?;
            let folio = moving.by_hand();
            return self.install_here(folio, around, service).map(Tried::Done);
        }
        let asks = service.signal && self.may_hide_stores(&folio, service);
        if asks || !self.track(page, service) {
            return Ok(Tried::Stuck);
        }
        self.install_here(folio, around, service).map(Tried::Done)
    }

    /// Tells whether installing a locked page may hide a store that nobody knows of yet. It had an entry here; if the program
    /// has taken that away (`MADV_DONTNEED`), all that tells of a store is that there is no mark, and a new entry would be one.
    fn may_hide_stores(&self, folio: &Folio<'_>, service: Service<'_>) -> bool {
        service.tracked()
            && folio.state() & (UMAP_ASYNC | DIRTY) == UMAP_ASYNC
            && service.target.may_have_shown(folio.page())
    }

    /// Lists a locked page among those that may be stored to without notice, before an entry lets that happen; false where
    /// it would allocate.
    fn track(&self, page: u64, service: Service<'_>) -> bool {
        if !service.tracked() {
            return true;
        }
        let mut state = if service.signal {
            self.dirty()
        } else {
            self.dirty_roomy()
        };
        state.pages.try_insert(Note::Tracked, page).is_some()
    }

    /// Installs a page that is on its way to the window, in the same step, with the neighbours after it that are as well.
    fn install_moving(
        &self,
        first: Moving<'_>,
        around: &Range<u64>,
        service: Service<'_>,
    ) -> Tried {
        let start = first.page();
        let mut run: SmallVec<[Moving<'_>; RUN_MAX]> = SmallVec::new();
        run.push(first);
        if service.protect() {
            self.fetch_look_ups(start + 1..around.end);
        }
        // Neighbours are for reading, so they travel with a page that is.
        while service.protect() && run.len() < RUN_MAX {
            let page = start + run.len() as u64;
            let last = run.last().map(Moving::frame);
            let Some(next) = self.neighbour_to_move(page, last, around, service) else {
                break;
            };
            run.push(next);
        }
        let frame = run[0].frame();
        let span = self.homes().frames_span(frame, run.len());
        let installed = service.target.copy(start, span, service.protect());
        for (i, moving) in run.into_iter().enumerate() {
            // Those that did not make it stay in their frames.
            if i < installed.pages {
                let folio = moving.finish();
                note_mapped(&folio, service.stores() && i == 0, service);
            }
        }
        if installed.pages > 0 {
            let next = start + installed.pages as u64;
            service.reach.note(&(start..next));
            if installed.stop.is_none() {
                self.install_around(around.start..start, service);
                self.install_around(next..around.end, service);
            }
            return Tried::Done(MapOutcome::Mapped);
        }
        match installed.stop {
            // Unmapped meanwhile: nobody waits for it any more, or faults again and finds another mapping there.
            Some(InstallStop::Gone) => Tried::Done(MapOutcome::Mapped),
            _ => Tried::ByHand,
        }
    }

    /// Installs a locked page of the window, and its neighbours.
    fn install_here(
        &self,
        folio: Folio<'_>,
        around: &Range<u64>,
        service: Service<'_>,
    ) -> Result<MapOutcome, CacheError> {
        let page = folio.page();
        let pages = page..page + 1;
        let target = service.target;
        if self.may_hide_stores(&folio, service) {
            self.look_for_stores(slice::from_ref(&folio), false);
        }
        if target.shared() {
            note_mapped(&folio, service.stores(), service);
        }
        if service.access == Access::Write && target.protected() {
            target.unprotect(pages);
            return Ok(MapOutcome::Mapped);
        }
        match target.resume(pages.clone(), service.protect()).stop {
            None | Some(InstallStop::Gone) => {}
            // Another fault was quicker; it may have been one for reading.
            Some(InstallStop::Exists) if service.access == Access::Write => {
                target.unprotect(pages);
            }
            Some(InstallStop::Exists) => {}
            Some(InstallStop::NoMemory) => return Err(CacheError::Window(Errno::ENOMEM)),
            Some(InstallStop::Hole) => return Err(CacheError::Window(Errno::EIO)),
            Some(InstallStop::Other(errno)) => return Err(CacheError::Window(errno)),
        }
        drop(folio);
        self.install_around(around.start..page, service);
        self.install_around(page + 1..around.end, service);
        Ok(MapOutcome::Mapped)
    }

    /// Installs a locked page of the window again; it may have been protected or dropped out of the mapping since.
    pub(crate) fn install_again(
        self: &Arc<Self>,
        folio: Folio<'_>,
        access: Access,
        target: &dyn MapTarget,
    ) -> Result<(), CacheError> {
        let service = Service {
            target,
            access,
            by_hand: false,
            signal: false,
            reach: &Reach::new(folio.page(), 0),
        };
        let page = folio.page();
        if service.stores() {
            self.make_dirty(&folio);
        }
        let _listed = self.track(page, service);
        let _mapped = self.install_here(folio, &(page..page + 1), service)?;
        if service.stores() {
            self.note_dirty_file();
        }
        Ok(())
    }

    /// Tells for each page of `range` whether it is cached and valid; waits for those that move or are being read.
    #[must_use]
    pub fn resident_map(&self, range: Range<u64>) -> Vec<bool> {
        let valid = |page| {
            // A page between its two homes is in neither until it is unlocked.
            self.get(page).is_some() || self.lock(page).is_some_and(|folio| folio.is_uptodate())
        };
        range.map(valid).collect()
    }
}

/// Notes in a locked page's state what mappings may do with it.
fn note_mapped(folio: &Folio<'_>, stores: bool, service: Service<'_>) {
    let mut flags = if stores { UMAP_RO | UMAP_RW } else { UMAP_RO };
    if service.tracked() {
        flags |= UMAP_ASYNC;
    }
    let before = folio.cache().header(folio.frame()).state.set(flags);
    debug_assert!(
        !stores || before & DIRTY != 0,
        "a page may be stored to before it is dirty (INV2)"
    );
}
