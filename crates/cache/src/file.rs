//! The pages of one file.
//!
//! *Owns*: finding and locking a page, the begin of a write, what is known to be dirty.
//!
//! *Does not own*: bringing pages from the store (`fill.rs`, `ahead.rs`), what is done to whole ranges (`range.rs`), user mappings
//! (`map.rs`), write-back (`writeback.rs`).
//!
//! *Locking*: a folio's lock is its page's; `dirty` is a leaf.

mod ahead;
mod fill;
mod range;

use pinfold_base::sync::path::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, OnceLock, Weak};
use std::time::Instant;

use pinfold_base::roomy::{self, Roomy};
use pinfold_base::sync::{self, Mutex, MutexGuard};
use pinfold_base::{Errno, PAGE_SIZE};
use pinfold_mem::{Frame, Homes, Window, clock};
use pinfold_store::Object;

use crate::CacheError;
use crate::cache::Cache;
use crate::dirty::{Note, PageSets};
use crate::errseq::ErrSeq;
use crate::folio::Folio;
use crate::gate::Gate;
use crate::index::Key;
use crate::lease::PageRef;
use crate::map::ReverseMap;
use crate::pin::KeptPins;
use crate::readahead::ReadAhead;
use crate::state::{DIRTY, HOME_ARENA, LOCKED, RefOutcome};

const PAGE: usize = PAGE_SIZE as usize;
/// The largest read-ahead window, in pages.
const WINDOW_PAGES_MAX: u64 = 1024;
/// Groups of pages that room is kept for when a file has become clean: those of a gigabyte of neighbouring pages.
const SPARE_MAX: usize = 4096;

/// Pages may be filled.
const OPEN: u8 = 0;
/// The right to cache is another's (INV6).
const CLOSED: u8 = 1;
/// It was lost, for good.
const ENDED: u8 = 2;

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
    /// Whether pages may be filled: [`OPEN`], [`CLOSED`], [`ENDED`]. Pages are added under the gate by those who have
    /// looked; it is blocked while this is changed from open.
    admission: AtomicU8,
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
            admission: AtomicU8::new(OPEN),
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

    /// Ends caching until [`FilePages::reopen`]: every page is dropped, dirty or not, once nobody uses it, and nothing is
    /// read ahead. For whoever gives the right to cache away: no call that fills pages is under way or begins meanwhile.
    pub fn close(&self) {
        self.shut(CLOSED);
        self.discard(0..u64::MAX);
    }

    /// Ends caching for good: the right to it was lost. Calls under way fail at their next page; what the program has pinned
    /// for itself stays until it lets go.
    pub fn abandon(&self) {
        self.shut(ENDED);
        self.discard_unkept();
    }

    fn shut(&self, how: u8) {
        let _blocked = self.gate.block();
        self.admission.fetch_max(how, Ordering::AcqRel);
    }

    /// Allows pages to be filled again.
    #[inline]
    pub fn reopen(&self) {
        if self.is_closed() {
            let _ended =
                self.admission
                    .compare_exchange(CLOSED, OPEN, Ordering::AcqRel, Ordering::Acquire);
        }
    }

    /// Tells whether pages may be filled. Then, and as of this moment, the size known here is the file's.
    #[inline]
    #[must_use]
    pub fn is_open(&self) -> bool {
        !self.is_closed()
    }

    /// Tells whether pages may not be filled; asked with the right to add them.
    #[inline]
    pub(crate) fn is_closed(&self) -> bool {
        self.admission.load(Ordering::Acquire) != OPEN
    }

    /// Refuses to add pages that nobody has the right to cache.
    pub(crate) fn may_fill(&self) -> Result<(), CacheError> {
        if self.is_closed() {
            return Err(CacheError::Refused(Errno::EIO));
        }
        Ok(())
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
            self.may_fill()?;
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
        state.since.get_or_insert_with(sync::now);
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
