//! The frames of one volume: who owns each, and how one is had when none is free.

use pinfold_base::sync::path::{AtomicU64, AtomicUsize, Ordering};
use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pinfold_base::counters::SpreadCounter;
use pinfold_base::sync::{Condvar, Mutex};
use pinfold_base::{PAGE_SIZE, counter_set};
use pinfold_mem::{Arena, ArenaError, Frame};

use crate::file::FilePages;
use crate::index::{Index, Key};
use crate::pin::PinSite;
use crate::policy::Policy;
use crate::slots::Slots;
use crate::state::{LOCKED, StateWord, UPTODATE, USERS_MASK, WRITEBACK};
use crate::wait::WaitTable;
use crate::writeback::Flusher;

/// The least budget, in bytes: 64 pages.
pub const MEMORY_MIN: u64 = 64 * PAGE_SIZE;

/// What a cache may use, and when it writes back.
#[derive(Debug, Clone, Copy)]
pub struct CacheConfig {
    /// Memory for pages, in bytes; at least [`MEMORY_MIN`].
    pub memory: u64,
    /// Dirty pages at which writers are made to wait, in bytes; default: half the memory.
    pub dirty_limit: Option<u64>,
    /// How often the flusher looks for old dirty pages.
    pub flush_interval: Duration,
    /// How long a page stays dirty at most before the flusher writes it.
    pub dirty_age_max: Duration,
    /// After a write-back error: keep the page dirty for another try instead of clean and readable.
    pub retain_dirty_on_error: bool,
}

impl Default for CacheConfig {
    fn default() -> Self {
        Self {
            memory: 256 << 20,
            dirty_limit: None,
            flush_interval: Duration::from_secs(1),
            dirty_age_max: Duration::from_secs(5),
            retain_dirty_on_error: false,
        }
    }
}

counter_set! {
    /// What happened in a cache since it was made.
    CacheCounters, CacheSnapshot {
        /// Page look-ups that found a valid page.
        hits: SpreadCounter,
        /// Page look-ups that had to read.
        misses,
        /// Pages read from the store, read-ahead included.
        pages_read,
        /// Pages read ahead of the reader.
        pages_read_ahead,
        /// Pages written to the store.
        pages_written,
        /// Transfers of pages to the store.
        write_transfers,
        /// Pages evicted to make room.
        evicted,
        /// Pages dropped by truncation, punches and invalidation.
        dropped,
        /// Write-backs that failed.
        write_errors,
        /// Times a writer was made to wait because too much was dirty.
        throttled,
        /// Times an allocation had to wait for a frame.
        frame_waits,
        /// Pages found stored to through mappings whose stores come without notice.
        stores_found,
        /// Pages moved from the arena to the window of their file.
        moved,
        /// Times a gate was let go because its holder needed an earlier one (the `faults_disabled_mapping` mode alone).
        gates_dropped,
        /// Pages pinned for device I/O.
        foll_pin_acquired,
        /// Pins given back; equal to those acquired when nothing is under way.
        foll_pin_released,
    }
}

/// What is known of a frame beside its bytes.
#[derive(Debug, Default)]
pub(crate) struct Header {
    pub(crate) state: StateWord,
    file: AtomicU64,
    page: AtomicU64,
}

impl Header {
    pub(crate) fn key(&self) -> Key {
        Key {
            file: self.file.load(Ordering::Relaxed),
            page: self.page.load(Ordering::Relaxed),
        }
    }

    #[inline]
    pub(crate) fn is(&self, key: Key) -> bool {
        self.page.load(Ordering::Relaxed) == key.page
            && self.file.load(Ordering::Relaxed) == key.file
    }

    /// Names the page a frame is about to hold; published by `StateWord::install`.
    pub(crate) fn assign(&self, key: Key) {
        self.file.store(key.file, Ordering::Relaxed);
        self.page.store(key.page, Ordering::Relaxed);
    }
}

/// What the frames are at one moment: exact when nothing is under way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Census {
    /// Frames there are at most.
    pub frames: usize,
    /// Frames that hold no page.
    pub free: usize,
    /// Pages with valid contents.
    pub valid: usize,
    /// Pages somebody has locked.
    pub locked: usize,
    /// Pages somebody references or has pinned.
    pub in_use: usize,
    /// Pages with contents newer than the store's, by their states.
    pub dirty: usize,
    /// Pages on their way to the store, by their states.
    pub writing: usize,
    /// Pages that are dirty or being written, by the account that throttling goes by.
    pub dirty_accounted: usize,
    /// Pages promised to leases.
    pub lent: usize,
}

/// A file that the flusher knows.
#[derive(Debug)]
pub(crate) struct Listed {
    pub(crate) file: Arc<FilePages>,
    /// Calls of it that rely on its staying listed.
    pub(crate) visits: usize,
}

impl Listed {
    pub(crate) fn of(file: &Arc<FilePages>) -> Self {
        Self {
            file: Arc::clone(file),
            visits: 0,
        }
    }
}

/// A volume's page cache.
pub struct Cache {
    pub(crate) arena: Arc<Arena>,
    headers: Box<[Header]>,
    /// Places for pages in windows; their headers are numbered after the frames'.
    pub(crate) slots: Slots,
    pub(crate) index: Index,
    pub(crate) policy: Policy,
    pub(crate) waits: WaitTable,
    pub(crate) counters: CacheCounters,
    pub(crate) pin_sites: crate::pin::sites::Sites,
    pub(crate) config: CacheConfig,
    pub(crate) dirty_pages: AtomicUsize,
    pub(crate) writing_pages: AtomicUsize,
    /// Pages promised to leases.
    pub(crate) lent_pages: AtomicUsize,
    /// Waited for in signal handlers: nobody allocates under it.
    pub(crate) dirty_files: Mutex<HashMap<u64, Listed>>,
    pub(crate) flusher: Flusher,
    /// Bumped when a frame or a dirty slot may have become free.
    pub(crate) progress: Mutex<u64>,
    pub(crate) progressed: Condvar,
}

impl fmt::Debug for Cache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cache")
            .field("arena", &self.arena)
            .field("dirty_pages", &self.dirty_pages())
            .finish_non_exhaustive()
    }
}

impl Cache {
    /// Makes a cache; its memory is taken as it is needed. [`Cache::start_flusher`] begins background write-back.
    ///
    /// # Errors
    /// The system refuses the address space or the memfd.
    pub fn new(config: CacheConfig) -> Result<Arc<Self>, ArenaError> {
        let arena = Arena::new(config.memory.max(MEMORY_MIN))?;
        let frames = arena.frames_max();
        Ok(Arc::new(Self {
            arena,
            headers: (0..frames).map(|_| Header::default()).collect(),
            slots: Slots::new(frames),
            index: Index::new(frames),
            policy: Policy::new(frames),
            waits: WaitTable::default(),
            counters: CacheCounters::default(),
            pin_sites: crate::pin::sites::Sites::default(),
            config,
            dirty_pages: AtomicUsize::new(0),
            writing_pages: AtomicUsize::new(0),
            lent_pages: AtomicUsize::new(0),
            dirty_files: Mutex::new(HashMap::new()),
            flusher: Flusher::default(),
            progress: Mutex::new(0),
            progressed: Condvar::new(),
        }))
    }

    /// Returns the frames, for registration with io_uring.
    #[must_use]
    pub fn arena(&self) -> &Arc<Arena> {
        &self.arena
    }

    /// Returns what happened so far.
    #[must_use]
    pub fn statistics(&self) -> CacheSnapshot {
        self.counters.snapshot()
    }

    /// Returns how many pages are dirty or being written.
    #[must_use]
    pub fn dirty_pages(&self) -> usize {
        self.dirty_pages.load(Ordering::Relaxed) + self.writing_pages.load(Ordering::Relaxed)
    }

    /// Returns how many pages the cache can hold.
    #[must_use]
    pub fn pages_max(&self) -> usize {
        self.headers.len()
    }

    /// Lists the pins held now, with the place each was taken, in debug builds; release builds do not remember.
    #[must_use]
    pub fn pins_held(&self) -> Vec<PinSite> {
        self.pin_sites.list()
    }

    /// Counts what the frames are now, by looking at every one: for tests and for the curious.
    #[must_use]
    pub fn census(&self) -> Census {
        let count = |flags: u64| {
            let states = self.headers().map(|header| header.state.load());
            states.filter(|state| state & flags != 0).count()
        };
        Census {
            frames: self.headers.len(),
            free: self.arena.frames_available(),
            valid: count(UPTODATE),
            locked: count(LOCKED),
            in_use: count(USERS_MASK),
            dirty: count(crate::state::DIRTY),
            writing: count(WRITEBACK),
            dirty_accounted: self.dirty_pages(),
            lent: self.lent_pages.load(Ordering::Relaxed),
        }
    }

    #[inline]
    pub(crate) fn header(&self, frame: Frame) -> &Header {
        match self.headers.get(frame.0 as usize) {
            Some(header) => header,
            None => self.slots.header(frame.0 as usize - self.headers.len()),
        }
    }

    /// Lists every header, those of frames before those of slots: a page only ever moves towards the end.
    pub(crate) fn headers(&self) -> impl Iterator<Item = &Header> {
        self.headers.iter().chain(self.slots.headers())
    }

    /// Sees to what the last reference of a frame found: somebody to wake, or a page that has moved away under it.
    #[cold]
    pub(crate) fn after_unref(&self, frame: Frame) {
        let header = self.header(frame);
        if header.state.bury() {
            self.give_frame(frame);
        }
        self.wake(frame);
    }

    pub(crate) fn wake(&self, frame: Frame) {
        self.waits.wake(frame.0 as usize);
    }

    /// Sleeps until `until` holds for the frame's state.
    pub(crate) fn wait(&self, frame: Frame, until: impl Fn(u64) -> bool) {
        self.waits
            .wait(frame.0 as usize, &self.header(frame).state, None, until);
    }

    /// Wakes those who wait for a frame or for less to be dirty.
    pub(crate) fn note_progress(&self) {
        *self.progress.lock() += 1;
        self.progressed.notify_all();
    }

    /// Sleeps until progress is noted or `until` comes.
    pub(crate) fn wait_progress(&self, until: Instant) {
        let progress = self.progress.lock();
        drop(self.progressed.wait_until(progress, until));
    }
}
