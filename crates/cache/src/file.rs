//! The pages of one file.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Instant;

use pinfold_base::roomy::{self, Roomy};
use pinfold_base::sync::{Mutex, MutexGuard};
use pinfold_base::{PAGE_SIZE, Progress};
use pinfold_mem::{Frame, Homes, Segments, Window, clock};
use pinfold_store::{Object, StoreError, Transfer};
use smallvec::SmallVec;

use crate::CacheError;
use crate::cache::Cache;
use crate::dirty::{Note, PageSets};
use crate::errseq::ErrSeq;
use crate::folio::{Folio, Going};
use crate::gate::{AddGuard, Gate};
use crate::index::Key;
use crate::lease::PageRef;
use crate::map::ReverseMap;
use crate::pin::KeptPins;
use crate::readahead::ReadAhead;
use crate::state::{DIRTY, HOME_ARENA, LOCKED, RefOutcome, UPTODATE};

const PAGE: usize = PAGE_SIZE as usize;
/// Pages in one read transfer at most: 512 KiB keeps several in flight within a window.
const TRANSFER_PAGES_MAX: u64 = 128;
/// Pages a reader waits for in one transfer at most.
const SYNC_PAGES_MAX: u64 = 128;
/// The largest read-ahead window, in pages.
const WINDOW_PAGES_MAX: u64 = 1024;
/// Groups of pages that room is kept for when a file has become clean: those of a gigabyte of neighbouring pages.
const SPARE_MAX: usize = 4096;
/// Ranges up to this many pages are probed page by page rather than by a walk over all frames.
const PROBE_PAGES_MIN: u64 = 1024;

/// The next file's number.
static NEXT_FILE: AtomicU64 = AtomicU64::new(1);

/// Told after a write-back pass has stored something of the file: to put times right again.
pub trait Owner: Send + Sync {
    /// Called with nothing held.
    fn wrote_back(&self);
}

/// How a caller wants a page.
#[derive(Debug, Clone, Copy)]
pub struct Want<'a> {
    /// Pages of the same request from the wanted one on; they are read in one go. At least 1.
    pub pages: u64,
    /// The reading pattern to learn from.
    pub ahead: Option<&'a ReadAhead>,
    /// Fail with [`CacheError::WouldBlock`] rather than wait.
    pub nowait: bool,
}

#[derive(Debug, Default)]
pub(crate) struct DirtyState {
    /// Pages noted as tracked are in mappings where they may be stored to without notice; their state says so as well
    /// ([`UMAP_ASYNC`](crate::state::UMAP_ASYNC)). Changed under the page's lock.
    pub(crate) pages: PageSets,
    /// When the oldest dirty page became so, as far as known.
    pub(crate) since: Option<Instant>,
    /// Where the next opportunistic visit begins, so that pages dirtied again and again do not keep others waiting.
    pub(crate) cursor: u64,
}

/// One file's pages, what is dirty among them, and the errors of storing them.
pub struct FilePages {
    id: u64,
    cache: Arc<Cache>,
    object: Arc<dyn Object>,
    pub(crate) homes: Arc<Homes>,
    /// The user mappings, once there is a window.
    pub(crate) reverse: OnceLock<Arc<dyn ReverseMap>>,
    /// Serializes the making of the window.
    pub(crate) opening: Mutex<()>,
    /// The file's size in bytes. Read after a page was seen valid (release/acquire), so that data is visible before
    /// size (B-4).
    end: AtomicU64,
    /// One more than the highest page ever cached.
    high: AtomicU64,
    gate: Gate,
    /// Waited for in signal handlers: nobody allocates under it.
    dirty: Mutex<DirtyState>,
    /// When stores were found that nobody had been told of, until the owner asks; 0: none.
    stored_to_ns: AtomicU64,
    errors: ErrSeq,
    owner: OnceLock<Weak<dyn Owner>>,
    /// Pins that last as long as the program likes.
    pub(crate) kept: KeptPins,
    /// Whether the flusher knows this file.
    pub(crate) listed: AtomicBool,
}

impl fmt::Debug for FilePages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FilePages")
            .field("id", &self.id)
            .field("end", &self.end())
            .finish_non_exhaustive()
    }
}

/// What an attempt to lock a page met.
pub(crate) enum Attempt<'a> {
    /// It is ours.
    Locked(Folio<'a>),
    /// Somebody else has it, in this frame.
    Busy(Frame),
    /// No such page is cached.
    Gone,
}

/// What a look-up found.
enum Found<'a> {
    Page(PageRef<'a>),
    /// Being filled or dropped, in this frame.
    Busy(Frame),
    Nothing,
}

impl FilePages {
    /// Makes an empty set of pages over a stored file of `end` bytes.
    #[must_use]
    pub fn new(cache: &Arc<Cache>, object: Arc<dyn Object>, end: u64) -> Arc<Self> {
        Arc::new(Self {
            id: NEXT_FILE.fetch_add(1, Ordering::Relaxed),
            cache: Arc::clone(cache),
            object,
            homes: Arc::new(Homes::new(Arc::clone(&cache.arena))),
            reverse: OnceLock::new(),
            opening: Mutex::new(()),
            end: AtomicU64::new(end),
            high: AtomicU64::new(0),
            gate: Gate::default(),
            dirty: Mutex::new(DirtyState::default()),
            stored_to_ns: AtomicU64::new(0),
            errors: ErrSeq::default(),
            owner: OnceLock::new(),
            kept: KeptPins::default(),
            listed: AtomicBool::new(false),
        })
    }

    /// Names who is told after write-back; only the first call counts.
    pub fn set_owner(&self, owner: Weak<dyn Owner>) {
        let _ = self.owner.set(owner);
    }

    /// Notes that stores were found. The owner is not told, but asks: here it may be a signal handler that holds the
    /// last reference to it.
    pub(crate) fn note_found_stores(&self) {
        self.stored_to_ns.store(clock::now_ns(), Ordering::Release);
    }

    /// Returns when stores through mappings were found last that nobody had been told of, as nanoseconds since 1970; once.
    pub fn take_found_stores(&self) -> Option<u64> {
        if self.stored_to_ns.load(Ordering::Relaxed) == 0 {
            return None;
        }
        Some(self.stored_to_ns.swap(0, Ordering::AcqRel)).filter(|&at| at != 0)
    }

    pub(crate) fn tell_owner(&self) {
        if let Some(owner) = self.owner.get().and_then(Weak::upgrade) {
            owner.wrote_back();
        }
    }

    pub(crate) fn cache(&self) -> &Cache {
        &self.cache
    }

    #[inline]
    pub(crate) fn homes(&self) -> &Arc<Homes> {
        &self.homes
    }

    /// Returns the file's number, unlike any other's in the process: where two gates must be waited for, the order.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    /// Returns the cache these pages are in.
    #[must_use]
    pub fn cache_arc(&self) -> &Arc<Cache> {
        &self.cache
    }

    /// Returns the window, which a file has from its first mapping on.
    #[must_use]
    pub fn window(&self) -> Option<&Arc<Window>> {
        self.homes.window()
    }

    /// Returns where the bytes are stored.
    #[must_use]
    pub fn object(&self) -> &Arc<dyn Object> {
        &self.object
    }

    /// Returns the lock between fills and those who must not see them.
    #[must_use]
    pub fn gate(&self) -> &Gate {
        &self.gate
    }

    /// Returns the errors of write-back.
    #[must_use]
    pub fn errors(&self) -> &ErrSeq {
        &self.errors
    }

    /// Returns the file's size in bytes.
    #[inline]
    #[must_use]
    pub fn end(&self) -> u64 {
        self.end.load(Ordering::Acquire)
    }

    /// Sets the file's size. The caller excludes other changes of it and has zeroed what that makes visible (INV7).
    pub fn set_end(&self, end: u64) {
        self.end.store(end, Ordering::Release);
    }

    /// Tells whether any page waits to be stored or is being stored, or may have been stored to without notice.
    #[must_use]
    pub fn is_dirty(&self) -> bool {
        let state = self.dirty.lock();
        let noted = |note| !state.pages.is_empty(note);
        noted(Note::Dirty) || noted(Note::Writing) || noted(Note::Tracked)
    }

    /// Returns the first page at or after `page` with data that the store may not know of: dirty, or mapped where stores
    /// come without notice.
    #[must_use]
    pub fn next_dirty(&self, page: u64) -> Option<u64> {
        let known = self.next_known_dirty(page);
        let tracked = self.dirty.lock().pages.next_from(Note::Tracked, page);
        known.into_iter().chain(tracked).min()
    }

    /// Returns the first page at or after `page` that is known to be dirty; [`FilePages::harvest`] makes known.
    #[must_use]
    pub fn next_known_dirty(&self, page: u64) -> Option<u64> {
        let state = self.dirty.lock();
        let next = |note| state.pages.next_from(note, page);
        next(Note::Dirty)
            .into_iter()
            .chain(next(Note::Writing))
            .min()
    }

    /// Tells whether a page is known to be dirty, or is being stored.
    #[must_use]
    pub fn is_known_dirty(&self, page: u64) -> bool {
        let state = self.dirty.lock();
        state.pages.contains(Note::Dirty, page) || state.pages.contains(Note::Writing, page)
    }

    /// Takes the lock around what is dirty, for changes that need no room and free none.
    pub(crate) fn dirty(&self) -> MutexGuard<'_, DirtyState> {
        self.dirty.lock()
    }

    /// As [`FilePages::dirty`], with room to note one page more.
    pub(crate) fn dirty_roomy(&self) -> MutexGuard<'_, DirtyState> {
        roomy::lock_with(&self.dirty, |state| &mut state.pages)
    }

    /// Lists pages of `range` that are noted as that, lowest first, at most `limit`.
    pub(crate) fn noted(&self, note: Note, range: Range<u64>, limit: usize) -> Vec<u64> {
        let count = |state: &DirtyState| state.pages.len(note);
        roomy::list(&self.dirty, limit, count, |state, add| {
            state.pages.each_in(note, range.clone(), add);
        })
    }

    /// Gives back what was only needed while much was dirty. Called where the file has become clean.
    pub(crate) fn trim_dirty(&self) {
        let mut state = self.dirty.lock();
        if state.pages.entries() > 0 || state.pages.spare() <= SPARE_MAX {
            return;
        }
        let spare = std::mem::take(&mut state.pages);
        drop(state);
        drop(spare);
    }

    pub(crate) fn key(&self, page: u64) -> Key {
        Key {
            file: self.id,
            page,
        }
    }

    /// The largest read-ahead window this budget bears, in pages.
    fn window_max(&self) -> u64 {
        (self.cache.pages_max() as u64 / 16).clamp(4, WINDOW_PAGES_MAX)
    }

    #[inline]
    fn find(&self, key: Key) -> Found<'_> {
        for frame in self.cache.index.candidates(key.hash()) {
            // Most guesses are right: the bytes are fetched while the header is.
            self.cache.arena.prefetch(frame);
            let header = self.cache.header(frame);
            match header.state.try_ref() {
                RefOutcome::Taken => {
                    let page = PageRef::adopt(self, key.page, frame);
                    if header.is(key) {
                        return Found::Page(page);
                    }
                }
                RefOutcome::Busy if header.is(key) => return Found::Busy(frame),
                RefOutcome::Busy | RefOutcome::Gone => {}
            }
        }
        Found::Nothing
    }

    /// Returns a page that is cached and valid, without waiting for anything.
    #[inline]
    #[must_use]
    pub fn get(&self, page: u64) -> Option<PageRef<'_>> {
        match self.find(self.key(page)) {
            Found::Page(page) => Some(page),
            Found::Busy(_) | Found::Nothing => None,
        }
    }

    /// Returns a page that is cached and valid, as a read of an open file would: the use counts, and what is worth reading
    /// ahead is started.
    #[inline]
    #[must_use]
    pub fn read_cached(self: &Arc<Self>, page: u64, ahead: &ReadAhead) -> Option<PageRef<'_>> {
        let found = self.get(page)?;
        self.note_hit(page, found.frame(), Some(ahead));
        Some(found)
    }

    /// Returns a page's contents, from the cache or the store. Nothing may be held but classes 1 to 3.
    ///
    /// # Errors
    /// The store's error of this very page; no frame; it would have to wait.
    pub fn read(self: &Arc<Self>, page: u64, want: &Want<'_>) -> Result<PageRef<'_>, CacheError> {
        let key = self.key(page);
        loop {
            match self.find(key) {
                Found::Page(found) => {
                    self.note_hit(page, found.frame(), want.ahead);
                    return Ok(found);
                }
                Found::Busy(_) | Found::Nothing if want.nowait => {
                    return Err(CacheError::WouldBlock);
                }
                Found::Busy(frame) => self.cache.wait(frame, |state| state & LOCKED == 0),
                Found::Nothing => {
                    if let Some(found) = self.fill(page, want)? {
                        return Ok(found);
                    }
                }
            }
        }
    }

    #[inline]
    fn note_hit(self: &Arc<Self>, page: u64, frame: Frame, ahead: Option<&ReadAhead>) {
        self.cache.counters.hits.bump();
        let Some(ahead) = ahead else {
            self.cache.policy.touch(frame);
            return;
        };
        let (range, new_use) = ahead.hit(page, || self.window_max());
        if new_use {
            self.cache.policy.touch(frame);
        }
        if let Some(range) = range {
            self.read_ahead(range);
        }
    }

    /// Reads a missing page, its request's followers and what is worth reading ahead; `None` when somebody else
    /// brought the page meanwhile.
    fn fill(
        self: &Arc<Self>,
        page: u64,
        want: &Want<'_>,
    ) -> Result<Option<PageRef<'_>>, CacheError> {
        let limit = SYNC_PAGES_MAX.min(self.window_max().max(1));
        let pages = want.pages.clamp(1, limit);
        let gate = self.add()?;
        let Some(folios) = self.insert_run(page, pages)? else {
            return Ok(None);
        };
        self.cache.counters.misses.bump();
        // What comes next is started before this thread waits, so that both are in flight together.
        if let Some(ahead) = want.ahead {
            let range = ahead.miss(page, pages.min(folios.len() as u64), self.window_max());
            self.start_ahead(range, &gate);
        }
        drop(gate);
        let segments = self.segments_of(page, folios.iter().map(Folio::frame));
        let outcome = self.object.read_wait(page * PAGE_SIZE, &segments);
        self.cache.counters.pages_read.add(folios.len() as u64);
        self.end_fill(folios, outcome).map(Some)
    }

    /// Reads a missing page as [`FilePages::read`] does, without allocating, and waiting for the store alone; returns it
    /// locked. `None` where that cannot be: somebody else brings it, pages are worth reading ahead, the store failed.
    pub(crate) fn fill_here(
        &self,
        page: u64,
        ahead: Option<&ReadAhead>,
        held: Option<&AddGuard<'_>>,
    ) -> Option<Folio<'_>> {
        if ahead.is_some_and(|ahead| ahead.follows(page)) {
            return None;
        }
        let gate = match held {
            None => Some(self.gate.try_add()?),
            Some(_) => None,
        };
        let frame = self.cache.try_take_frames(1).pop()?;
        let folio = self.insert(page, frame)?;
        drop(gate);
        let segments = self.segments_of(page, std::iter::once(folio.frame()));
        let outcome = self.object.read_here(page * PAGE_SIZE, &segments)?;
        self.cache.counters.misses.bump();
        self.cache.counters.pages_read.bump();
        if let Some(ahead) = ahead {
            // Nothing is worth it: this page follows no other.
            ahead.miss(page, 1, self.window_max());
        }
        self.settle_fill(&folio, 0, &outcome).then_some(folio)
    }

    /// Counts a use of a cached page by a fault.
    pub(crate) fn note_fault_hit(&self, folio: &Folio<'_>) {
        self.cache.counters.hits.bump();
        self.cache.policy.touch(folio.frame());
    }

    /// Unlocks pages a transfer filled; returns the first.
    fn end_fill(
        &self,
        folios: SmallVec<[Folio<'_>; 1]>,
        outcome: Progress<StoreError>,
    ) -> Result<PageRef<'_>, CacheError> {
        let mut first = None;
        for (i, folio) in folios.into_iter().enumerate() {
            if !self.settle_fill(&folio, i, &outcome) {
                // Dropped without contents: it leaves the cache.
                continue;
            }
            if i == 0 {
                let (page, frame) = (folio.page(), folio.frame());
                first = Some(PageRef::take_locked(self, page, frame));
            }
        }
        match (first, outcome.stop) {
            (Some(first), _) => Ok(first),
            (None, Some(error)) => Err(CacheError::Store(error)),
            (None, None) => Err(CacheError::NoFrames),
        }
    }

    /// Makes the `i`-th page of a finished transfer valid if its bytes came; what the store did not have is zeros.
    fn settle_fill(&self, folio: &Folio<'_>, i: usize, outcome: &Progress<StoreError>) -> bool {
        let got = usize::try_from(outcome.done)
            .unwrap_or(usize::MAX)
            .saturating_sub(i * PAGE)
            .min(PAGE);
        if got < PAGE {
            if outcome.stop.is_some() {
                return false;
            }
            folio.zero_from(got);
        }
        folio.mark_uptodate();
        true
    }

    /// Lists the memory of neighbouring pages.
    pub(crate) fn segments_of(&self, start: u64, frames: impl Iterator<Item = Frame>) -> Segments {
        let mut segments = self.homes.segments();
        for (page, frame) in (start..).zip(frames) {
            self.homes.push(&mut segments, frame, page, 0, PAGE);
        }
        segments
    }

    /// Starts reading pages that are missing in `range`; waits for nothing, gives up where frames are short.
    pub fn read_ahead(self: &Arc<Self>, range: Range<u64>) {
        // A blocked gate means that the range is about to change: not worth waiting for.
        if let Some(gate) = self.gate.try_add() {
            self.start_ahead(range, &gate);
        }
    }

    fn start_ahead(self: &Arc<Self>, range: Range<u64>, _gate: &AddGuard<'_>) {
        let end = range.end.min(self.end().div_ceil(PAGE_SIZE));
        let mut batch = Vec::new();
        let mut page = range.start;
        while page < end {
            let mut folios: SmallVec<[Folio<'_>; 1]> = SmallVec::new();
            let run = (end - page).min(TRANSFER_PAGES_MAX);
            let mut frames = self.cache.try_take_frames(run as usize).into_iter();
            for at in page..page + run {
                let Some(frame) = frames.next() else {
                    break;
                };
                match self.insert(at, frame) {
                    Some(folio) => folios.push(folio),
                    None => break,
                }
            }
            let short = frames.len() == 0 && (folios.len() as u64) < run;
            for spare in frames {
                self.cache.arena.free(spare);
            }
            let start = page;
            // The page that was there already is skipped as well.
            page += folios.len() as u64 + u64::from((folios.len() as u64) < run);
            if !folios.is_empty() {
                batch.push(self.transfer_ahead(start, folios));
            }
            if short {
                break;
            }
        }
        if !batch.is_empty() {
            self.object.read(batch);
        }
    }

    fn transfer_ahead(self: &Arc<Self>, start: u64, folios: SmallVec<[Folio<'_>; 1]>) -> Transfer {
        let counters = &self.cache.counters;
        counters.pages_read.add(folios.len() as u64);
        counters.pages_read_ahead.add(folios.len() as u64);
        let frames: Vec<Frame> = folios.into_iter().map(Folio::into_frame).collect();
        let segments = self.segments_of(start, frames.iter().copied());
        let filling = Filling {
            file: Arc::clone(self),
            start,
            frames,
        };
        Transfer {
            offset: start * PAGE_SIZE,
            segments,
            done: Box::new(move |outcome| filling.end(&outcome)),
        }
    }

    /// Inserts up to `pages` locked pages from `page` on, up to the first that is there; `None` when `page` itself is.
    /// Waits for the first frame only.
    fn insert_run(
        &self,
        page: u64,
        pages: u64,
    ) -> Result<Option<SmallVec<[Folio<'_>; 1]>>, CacheError> {
        let end = self.end().div_ceil(PAGE_SIZE).max(page + 1);
        let pages = pages.min(end - page);
        let mut frames = self.cache.try_take_frames(pages as usize);
        if frames.is_empty() {
            frames.push(self.cache.take_frame()?);
        }
        let mut folios = SmallVec::new();
        let mut frames = frames.into_iter();
        for (at, frame) in (page..).zip(&mut frames) {
            match self.insert(at, frame) {
                Some(folio) => folios.push(folio),
                None => break,
            }
        }
        for spare in frames {
            self.cache.arena.free(spare);
        }
        Ok((!folios.is_empty()).then_some(folios))
    }

    /// Puts `frame` into the cache as page `page`, locked and without contents; gives it back if the page is there.
    fn insert(&self, page: u64, frame: Frame) -> Option<Folio<'_>> {
        let key = self.key(page);
        let hash = key.hash();
        let header = self.cache.header(frame);
        header.assign(key);
        let shard = self.cache.index.lock(hash);
        let there = self.cache.index.candidates(hash).any(|other| {
            let other = self.cache.header(other);
            // Leaving pages are still listed until `unlist`, which takes the shard lock.
            other.is(key)
        });
        if there {
            drop(shard);
            self.cache.arena.free(frame);
            return None;
        }
        header.state.install(HOME_ARENA);
        self.cache.index.insert(&shard, hash, frame);
        drop(shard);
        self.cache.policy.admit(frame, hash);
        self.high.fetch_max(page + 1, Ordering::Relaxed);
        Some(Folio::adopt(self, page, frame))
    }

    /// Locks a page that is cached; waits for whoever holds it.
    #[must_use]
    pub fn lock(&self, page: u64) -> Option<Folio<'_>> {
        loop {
            match self.try_lock(page) {
                Attempt::Locked(folio) => return Some(folio),
                Attempt::Busy(frame) => self.cache.wait(frame, |state| state & LOCKED == 0),
                Attempt::Gone => return None,
            }
        }
    }

    /// Locks a page that is cached if nobody else has it.
    pub(crate) fn try_lock(&self, page: u64) -> Attempt<'_> {
        let key = self.key(page);
        'again: loop {
            for frame in self.cache.index.candidates(key.hash()) {
                #[cfg(all(test, not(loom)))]
                crate::home::tests::look();
                let header = self.cache.header(frame);
                if !header.is(key) {
                    continue;
                }
                match header.state.try_lock() {
                    Ok(_) => {
                        let folio = Folio::adopt(self, page, frame);
                        if header.is(key) {
                            return Attempt::Locked(folio);
                        }
                        drop(folio);
                        continue 'again;
                    }
                    Err(state) if state & LOCKED != 0 => return Attempt::Busy(frame),
                    Err(_) => {}
                }
            }
            // A page that moves to its window enters the table before it leaves it, but perhaps behind this look.
            if self.cache.slots.are_open() && self.is_listed(key) {
                continue;
            }
            return Attempt::Gone;
        }
    }

    /// Tells whether a page is cached, in whatever state; sees one that moves meanwhile.
    fn is_listed(&self, key: Key) -> bool {
        let hash = key.hash();
        let _shard = self.cache.index.lock(hash);
        let mut frames = self.cache.index.candidates(hash);
        frames.any(|frame| self.cache.header(frame).is(key))
    }

    /// Locks a page for a write of its bytes `from .. to`, with the parts that are not overwritten valid: read, or zero
    /// where the file has none. The page becomes visible with [`Folio::commit`], and not at all before.
    ///
    /// # Errors
    /// Reading the rest failed; no frame; `nowait` and it would have to wait.
    pub fn write_begin(
        self: &Arc<Self>,
        page: u64,
        from: usize,
        to: usize,
        nowait: bool,
    ) -> Result<Folio<'_>, CacheError> {
        loop {
            match self.try_lock(page) {
                Attempt::Locked(folio) => return Ok(folio),
                Attempt::Busy(_) if nowait => return Err(CacheError::WouldBlock),
                Attempt::Busy(frame) => {
                    self.cache.wait(frame, |state| state & LOCKED == 0);
                    continue;
                }
                Attempt::Gone => {}
            }
            let end = self.end();
            let start = page * PAGE_SIZE;
            let covers = from == 0 && (to == PAGE || start + to as u64 >= end);
            let needs_read = !covers && start < end;
            if nowait && needs_read {
                return Err(CacheError::WouldBlock);
            }
            let gate = if nowait {
                self.gate.try_add().ok_or(CacheError::WouldBlock)?
            } else {
                self.gate.add()
            };
            let frame = if nowait {
                self.cache
                    .try_take_frames(1)
                    .pop()
                    .ok_or(CacheError::WouldBlock)?
            } else {
                self.cache.take_frame()?
            };
            let Some(folio) = self.insert(page, frame) else {
                continue;
            };
            drop(gate);
            if needs_read {
                let segments = self.segments_of(page, std::iter::once(folio.frame()));
                let outcome = self.object.read_wait(start, &segments);
                self.cache.counters.pages_read.bump();
                if !self.settle_fill(&folio, 0, &outcome)
                    && let Some(error) = outcome.stop
                {
                    return Err(CacheError::Store(error));
                }
            } else if !(from == 0 && to == PAGE) {
                folio.zero(0, PAGE);
            }
            return Ok(folio);
        }
    }

    /// Notes that a locked page is about to become dirty.
    pub(crate) fn note_dirty(&self, page: u64, frame: Frame) {
        if self.cache.header(frame).state.load() & DIRTY != 0 {
            return;
        }
        // One that is tracked has its room: then this allocates nothing, as a signal handler must not.
        let mut state = self.dirty.lock();
        let noted = state.pages.try_insert(Note::Dirty, page);
        let new = match noted {
            Some(new) => new,
            None => {
                drop(state);
                state = self.dirty_roomy();
                state.pages.insert(Note::Dirty, page)
            }
        };
        self.note_dirtied(&mut state, new);
    }

    /// Accounts for a page that was put into the set of dirty ones, `new` there or not.
    pub(crate) fn note_dirtied(&self, state: &mut DirtyState, new: bool) {
        state.since.get_or_insert_with(Instant::now);
        if new {
            self.cache.dirty_pages.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(crate) fn forget_dirty(&self, page: u64) {
        let removed = {
            let mut state = self.dirty.lock();
            let removed = state.pages.remove(Note::Dirty, page);
            state.pages.remove(Note::Tracked, page);
            if state.pages.is_empty(Note::Dirty) {
                state.since = None;
            }
            removed
        };
        if removed {
            self.cache.dirty_pages.fetch_sub(1, Ordering::Relaxed);
            self.cache.note_progress();
        }
    }

    /// Makes the flusher know this file. Called after pages became dirty, with no folio locked.
    pub fn note_dirty_file(self: &Arc<Self>) {
        self.cache.enlist_dirty(self);
    }

    /// Lists the cached pages of `range`, lowest first.
    pub(crate) fn cached_pages(&self, range: Range<u64>) -> Vec<u64> {
        let end = range.end.min(self.high.load(Ordering::Relaxed));
        if range.start >= end {
            return Vec::new();
        }
        if end - range.start <= PROBE_PAGES_MIN.max(self.cache.pages_max() as u64 / 8) {
            return (range.start..end)
                .filter(|&page| self.is_listed(self.key(page)))
                .collect();
        }
        // A page that moves meanwhile moves to a header that is still to be looked at.
        let mut pages: Vec<u64> = self
            .cache
            .headers()
            .filter(|header| header.state.load() != 0)
            .map(super::cache::Header::key)
            .filter(|key| key.file == self.id && (range.start..end).contains(&key.page))
            .map(|key| key.page)
            .collect();
        pages.sort_unstable();
        pages.dedup();
        pages
    }

    /// Drops every page of `range`, dirty or not, once nobody uses it. The caller keeps pages from coming back.
    pub fn discard(&self, range: Range<u64>) {
        let mut going = Going::new(self);
        for page in self.cached_pages(range) {
            if let Some(folio) = self.lock(page) {
                going.push(folio);
            }
        }
    }

    /// Cuts the file to `end` bytes: the size first, so that no reader goes past it, then the pages. The caller blocks the
    /// gate.
    ///
    /// Waits for transfers under way of every page concerned, the one that holds the end included: one that ends
    /// after the store was cut would make the stored file longer again, with bytes that a later growth would show.
    ///
    /// Private copies of the pages go as well, as in Linux: last, since a copy may be made of a page as long as that is there.
    pub fn truncate(&self, end: u64) {
        self.set_end(end);
        let at = (end % PAGE_SIZE) as usize;
        if at != 0
            && let Some(folio) = self.lock(end / PAGE_SIZE)
        {
            folio.wait_writeback();
            folio.protect();
            folio.zero_from(at);
        }
        let beyond = end.div_ceil(PAGE_SIZE)..u64::MAX;
        self.discard(beyond.clone());
        if let Some(reverse) = self.reverse.get() {
            reverse.cut(beyond);
        }
    }

    /// Drops the clean pages of `range`, once their transfers have ended; returns false if any was dirty and stayed, or is
    /// pinned by the program itself for as long as that likes.
    pub fn invalidate(&self, range: Range<u64>) -> bool {
        let mut all = true;
        let mut going = Going::new(self);
        for page in self.cached_pages(range) {
            if let Some(folio) = self.lock(page) {
                folio.wait_writeback();
                if folio.is_dirty() || folio.is_kept() || self.was_stored_to(&folio) {
                    all = false;
                } else {
                    going.push(folio);
                }
            }
        }
        all
    }

    /// Zeroes bytes `from .. to` of a page if it is cached, making it dirty; false when it is not cached.
    pub fn zero_cached(self: &Arc<Self>, page: u64, from: usize, to: usize) -> bool {
        let Some(folio) = self.lock(page) else {
            return false;
        };
        folio.zero(from, to - from);
        folio.commit();
        self.note_dirty_file();
        true
    }

    /// Zeroes what a cached page holds past the file's end without making it dirty (INV7). Stores through mappings that
    /// come later wait for the lock: they are the new size's.
    pub fn zero_past_end(&self, end: u64) {
        let at = (end % PAGE_SIZE) as usize;
        if at != 0
            && let Some(folio) = self.lock(end / PAGE_SIZE)
        {
            folio.protect();
            folio.zero_from(at);
        }
    }

    /// Returns how many pages of `range` are cached and valid.
    #[must_use]
    pub fn resident(&self, range: Range<u64>) -> usize {
        self.cached_pages(range)
            .into_iter()
            .filter(|&page| {
                let key = self.key(page);
                self.cache.index.candidates(key.hash()).any(|frame| {
                    let header = self.cache.header(frame);
                    header.is(key) && header.state.load() & UPTODATE != 0
                })
            })
            .count()
    }
}

/// Locked pages on their way from the store, whose thread has gone on. Dropped before the transfer has told its end, as by a
/// store that panics, they leave the cache, and nobody waits for them for ever.
struct Filling {
    file: Arc<FilePages>,
    start: u64,
    frames: Vec<Frame>,
}

impl Filling {
    fn end(mut self, outcome: &Progress<StoreError>) {
        for (i, frame) in std::mem::take(&mut self.frames).into_iter().enumerate() {
            let folio = Folio::adopt(&self.file, self.start + i as u64, frame);
            // An error of a page nobody asked for is nobody's: who asks reads it himself.
            self.file.settle_fill(&folio, i, outcome);
        }
    }
}

impl Drop for Filling {
    fn drop(&mut self) {
        for (page, &frame) in (self.start..).zip(&self.frames) {
            drop(Folio::adopt(&self.file, page, frame));
        }
    }
}

impl Drop for FilePages {
    fn drop(&mut self) {
        // Whoever lets go of the last handle has written back what was worth it; the frames are wanted elsewhere.
        self.discard(0..u64::MAX);
        if self.homes.window().is_some() {
            self.cache.slots.forget_window(self.id);
        }
    }
}
