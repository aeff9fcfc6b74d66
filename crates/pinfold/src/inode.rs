//! The data of one file: its pages, its locks, its size and the times that writes move.
//!
//! Lock order here: `lock` (class 1), the glock if there are other nodes (class 2, [`crate::shared`]), the gate (class 4), folios
//! (class 5). Fault-in happens with none of them held.

use pinfold_base::sync::path::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

use pinfold_base::rank::{Rank, ReadGuard, RwLock, WriteGuard};
use pinfold_base::sync::{self, Mutex};
use pinfold_base::{Errno, PAGE_SIZE, page_span};
use pinfold_cache::{
    CacheError, FilePages, Harvest, Here, Kept, MapOutcome, Mode, Owner, Pace, Sample, Want,
};
use pinfold_fault::{Fault, FaultTarget, FileMappings};
use pinfold_lock::Mode as Right;
use pinfold_mem::{Access, clock, limits};
use pinfold_store::{Object, StoreError, SyncScope};

use crate::engine::{Engine, Reserve};
use crate::error::{Error, ErrorKind, Result};
use crate::shared::Shared;

/// Every filesystem takes files of this size, or says so by itself soon enough: 2 TiB less a block is ext3's limit, and
/// a write that jumps further is rare.
const SIZE_UNASKED_MAX: u64 = 1 << 40;
/// Granularity of the sizes that the store is asked about, so that a growing file asks rarely.
const SIZE_ASK_STEP: u64 = 1 << 30;
/// Passes over a file that is handed over; each visits what background write-back has failed with during the one before.
const HAND_OVER_TRIES_MAX: u32 = 4;
/// How long a page that another thread keeps pinned is waited for. Two threads that cut off what the other keeps would wait for
/// each other; pins as long as a transfer, or a few, are let go long before.
const KEPT_WAIT_MAX: Duration = Duration::from_secs(10);

/// Told when the engine has changed the stored file, so that times can be put right; implemented by the node.
pub(crate) trait Backing: Send + Sync {
    /// The stored bytes were written by the engine, which moved the stored times.
    fn stored(&self);
}

/// One file's data.
pub struct Inode {
    engine: Arc<Engine>,
    pages: Arc<FilePages>,
    lock: RwLock<()>,
    /// Where other nodes use the file too.
    shared: Option<Shared>,
    /// When a write last changed the file, on the coarse clock; 0: not since it was loaded.
    modified_ns: AtomicU64,
    /// Whether `modified_ns` has not been told to the backing yet.
    times_pending: AtomicBool,
    openers: AtomicUsize,
    /// The largest size the store is known to take.
    size_asked: AtomicU64,
    mappings: Arc<FileMappings>,
    backing: Weak<dyn Backing>,
}

impl fmt::Debug for Inode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inode")
            .field("pages", &self.pages)
            .finish_non_exhaustive()
    }
}

impl Inode {
    /// Makes the data side of a file that is stored in `object` with `len` bytes.
    pub(crate) fn new(
        engine: &Arc<Engine>,
        object: Arc<dyn Object>,
        len: u64,
        backing: Weak<dyn Backing>,
        shared: Option<Shared>,
    ) -> Arc<Self> {
        let inode = Arc::new(Self {
            engine: Arc::clone(engine),
            pages: FilePages::new(&engine.cache, object, len),
            lock: RwLock::new(Rank::Inode, ()),
            shared,
            modified_ns: AtomicU64::new(0),
            times_pending: AtomicBool::new(false),
            openers: AtomicUsize::new(0),
            size_asked: AtomicU64::new(SIZE_UNASKED_MAX),
            mappings: Arc::default(),
            backing,
        });
        let owner: Weak<Self> = Arc::downgrade(&inode);
        inode.pages.set_owner(owner);
        inode
    }

    pub(crate) fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }

    pub(crate) fn pages(&self) -> &Arc<FilePages> {
        &self.pages
    }

    pub(crate) fn object(&self) -> &Arc<dyn Object> {
        self.pages.object()
    }

    /// Returns the file's glock, where other nodes use the file too.
    #[inline]
    pub(crate) fn shared(&self) -> Option<&Shared> {
        self.shared.as_ref()
    }

    pub(crate) fn mappings(&self) -> &Arc<FileMappings> {
        &self.mappings
    }

    /// Tells mappings if the file has grown since it ended at `old`: pages they were refused may be touched now.
    pub(crate) fn note_growth(&self, old: u64) {
        if self.len() > old {
            self.mappings.grown();
        }
    }

    /// Takes the inode's lock shared.
    pub(crate) fn lock_shared(&self) -> ReadGuard<'_, ()> {
        self.lock.read()
    }

    /// Takes the inode's lock exclusive.
    pub(crate) fn lock_exclusive(&self) -> WriteGuard<'_, ()> {
        self.lock.write()
    }

    /// Takes the inode's lock exclusive if that needs no waiting.
    pub(crate) fn try_lock_exclusive(&self) -> Option<WriteGuard<'_, ()>> {
        self.lock.try_write()
    }

    /// Returns the live size in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.pages.end()
    }

    /// Tells whether something waits to be stored.
    #[must_use]
    pub fn is_dirty(&self) -> bool {
        self.note_found_stores();
        self.pages.is_dirty() || self.times_pending.load(Ordering::Acquire)
    }

    /// Returns when a write last changed the file, if one did since it was loaded or since
    /// [`Inode::forget_modified`].
    #[must_use]
    pub fn modified(&self) -> Option<SystemTime> {
        self.note_found_stores();
        match self.modified_ns.load(Ordering::Acquire) {
            0 => None,
            ns => Some(clock::time_of(ns)),
        }
    }

    /// Forgets the live time: somebody has set the stored times explicitly.
    pub fn forget_modified(&self) {
        let _ = self.pages.take_found_stores();
        self.modified_ns.store(0, Ordering::Release);
        self.times_pending.store(false, Ordering::Release);
    }

    /// Takes in that stores through mappings were found by looking for them.
    fn note_found_stores(&self) {
        if let Some(at) = self.pages.take_found_stores() {
            self.modified_ns.fetch_max(at, Ordering::AcqRel);
            self.times_pending.store(true, Ordering::Release);
        }
    }

    /// Notes that the contents change now.
    #[inline]
    pub(crate) fn touch_modified(&self) {
        self.modified_ns.store(clock::now_ns(), Ordering::Release);
        if !self.times_pending.load(Ordering::Relaxed) {
            self.times_pending.store(true, Ordering::Release);
        }
    }

    /// Counts an open; the first of a file that nobody had open samples nothing yet.
    pub(crate) fn opened(&self) -> Sample {
        self.openers.fetch_add(1, Ordering::AcqRel);
        self.pages.errors().sample()
    }

    /// Counts a close; the last one writes back what is dirty, so that it outlives the process.
    pub(crate) fn closed(&self) {
        if self.openers.fetch_sub(1, Ordering::AcqRel) == 1 && self.engine.process.is_current() {
            // An error stays in the errseq: the next opener's fsync reports it.
            let _ = self.flush();
        }
    }

    /// Tells whether any file description refers to this inode.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.openers.load(Ordering::Acquire) > 0
    }

    /// Writes back what is dirty and puts the stored times right. Does not make it durable.
    ///
    /// # Errors
    /// The first error of storing a page.
    pub fn flush(&self) -> Result<()> {
        self.flush_range(0..u64::MAX)
            .map_err(|error| Error::store("write back", error))
    }

    pub(crate) fn flush_range(&self, bytes: Range<u64>) -> std::result::Result<(), StoreError> {
        let outcome = self.make_stored(bytes);
        self.tell_times();
        outcome
    }

    /// Writes back what is dirty of a range. Leaves the stored times as they are where nothing is: they are put right at the
    /// next sync, which a direct transfer need not wait for.
    pub(crate) fn make_stored(&self, bytes: Range<u64>) -> std::result::Result<(), StoreError> {
        let len = bytes.end.saturating_sub(bytes.start);
        let pages = page_span(bytes.start, len);
        self.pages.write_back(pages, Mode::Integrity).map(drop)
    }

    fn tell_times(&self) {
        self.note_found_stores();
        self.times_pending.store(false, Ordering::Release);
        // Every pass, not the first after a write alone: each moves the stored times anew. The backing knows whether
        // anything of it is left to do.
        if let Some(backing) = self.backing.upgrade() {
            backing.stored();
        }
    }

    /// Writes back and makes durable, then reports an error not yet reported through `seen`.
    ///
    /// Nothing is held while it waits. What this very call could not store it reports whatever another thread has heard
    /// meanwhile through the same open file.
    pub(crate) fn sync(&self, scope: SyncScope, seen: &Mutex<Sample>) -> Result<()> {
        self.sync_range(0..u64::MAX, scope, seen)
    }

    /// As [`Inode::sync`], for the pages that hold a range.
    pub(crate) fn sync_range(
        &self,
        bytes: Range<u64>,
        scope: SyncScope,
        seen: &Mutex<Sample>,
    ) -> Result<()> {
        let flushed = self.flush_range(bytes);
        let synced = self.object().sync(scope);
        if let Err(error) = synced {
            self.pages.errors().set(error.errno);
        }
        let unreported = self.pages.errors().check_and_advance(&mut seen.lock());
        match (flushed.and(synced), unreported) {
            (Ok(()), None) => Ok(()),
            (Ok(()), Some(errno)) => Err(Error::new("sync", ErrorKind::Store(errno))),
            (Err(error), _) => Err(Error::store("sync", error)),
        }
    }

    /// Sets the size: what is cut off is gone, what is added reads as zeros.
    ///
    /// # Errors
    /// `EFBIG` beyond the largest file; the store's refusal, with the size then as the store has it.
    pub fn set_len(&self, len: u64) -> Result<()> {
        if len > pinfold_base::units::FILE_SIZE_MAX {
            return Err(Error::invalid("set the size of", Errno::EFBIG));
        }
        self.exclusively(|| self.set_len_locked(len))
    }

    /// Runs `work` under the inode's lock and, of a shared file, its glock (EX), again if it met a page that the program keeps pinned, once that is let go. That
    /// is waited for with nothing held (D-4), as the kernel breaks the layouts of memory that is the storage itself.
    ///
    /// # Errors
    /// [`ErrorKind::Pinned`]: this thread keeps it, or another one does longer than [`KEPT_WAIT_MAX`].
    pub(crate) fn exclusively<T>(
        &self,
        work: impl Fn() -> std::result::Result<T, Hindrance>,
    ) -> Result<T> {
        loop {
            let exclusive = self.lock_exclusive();
            let held = self.hold("change", Right::Exclusive)?;
            match work() {
                Ok(done) => return Ok(done),
                Err(Hindrance::Error(error)) => return Err(error),
                Err(Hindrance::Kept(kept)) => {
                    drop(held);
                    drop(exclusive);
                    // Each anew: one that goes makes room for another, but one that stays may wait for us.
                    if !self.pages.wait_unkept(kept, sync::now() + KEPT_WAIT_MAX) {
                        return Err(Error::new("take away pages of", ErrorKind::Pinned));
                    }
                }
            }
        }
    }

    /// Refuses while the program keeps one of these pages pinned. The caller blocks the gate, and has changed nothing yet.
    pub(crate) fn none_kept(&self, pages: Range<u64>) -> std::result::Result<(), Hindrance> {
        if self.pages.keeps_itself(pages.clone()) {
            return Err(Error::new("take away pages of", ErrorKind::Pinned).into());
        }
        match self.pages.kept_page(pages) {
            Some(kept) => Err(Hindrance::Kept(kept)),
            None => Ok(()),
        }
    }

    /// Returns how long a write from `from` to `to` may make the file, so that EFBIG comes from the write and not from
    /// write-back: `to`, or the store's limit if that lies between. The inode's lock is held exclusive.
    ///
    /// # Errors
    /// The store's refusal of even one byte.
    pub(crate) fn size_allowed(&self, from: u64, to: u64) -> Result<u64> {
        let known = self.size_asked.load(Ordering::Relaxed);
        if to <= known.max(self.pages.end()) {
            return Ok(to);
        }
        let told = |error| Error::store("write", error);
        let object = self.object();
        // Only trying tells. Nothing is cached beyond what is stored while it is tried.
        let _blocked = self.pages.gate().block();
        self.flush_range(0..u64::MAX).map_err(told)?;
        let stored = object.len().map_err(told)?;
        let mut good = from;
        let mut refused = None;
        // Further than is needed first, where the process's own limit is not what would refuse it.
        let ahead = to.next_multiple_of(SIZE_ASK_STEP);
        let within = limits::file_size().is_none_or(|limit| ahead <= limit);
        for size in within.then_some(ahead).into_iter().chain([to]) {
            match object.set_len(size) {
                Ok(()) => {
                    (good, refused) = (size, None);
                    break;
                }
                Err(error) => refused = Some((size, error)),
            }
        }
        while let Some((bad, error)) = refused {
            if error.errno != Errno::EFBIG || bad - good <= 1 {
                break;
            }
            let middle = good + (bad - good) / 2;
            match object.set_len(middle) {
                Ok(()) => good = middle,
                Err(error) => refused = Some((middle, error)),
            }
        }
        object.set_len(stored).map_err(told)?;
        match refused {
            Some((_, error)) if good == from => Err(told(error)),
            _ => {
                self.size_asked.store(good, Ordering::Relaxed);
                Ok(good.min(to))
            }
        }
    }

    pub(crate) fn set_len_locked(&self, len: u64) -> std::result::Result<(), Hindrance> {
        let old = self.pages.end();
        let _blocked = self.pages.gate().block();
        if len < old {
            self.none_kept(len.div_ceil(PAGE_SIZE)..u64::MAX)?;
            self.cut_locked(old, len)?;
        } else {
            self.pages.zero_past_end(old);
            let _settled = self.pages.lock_settled(old / PAGE_SIZE);
            self.object()
                .set_len(len)
                .map_err(|error| Error::store("set the size of", error))?;
        }
        self.pages.set_end(len);
        self.note_growth(old);
        self.touch_modified();
        // The store's file has just changed its own times.
        self.tell_times();
        Ok(())
    }

    /// Makes the file shorter: the size, the store, the pages, with the gate blocked.
    ///
    /// Where it does not cut, a kernel's file system zeroes the rest of the last block in its own cache and does not wait for a
    /// direct write of that block: the two collide, and EIO is left for the next sync. So none is under way then.
    ///
    /// The store before the pages: a direct read, which takes no lock, would find older bytes there once newer ones were
    /// dropped. And a store that refuses has lost nothing.
    fn cut_locked(&self, old: u64, len: u64) -> Result<()> {
        let told = |error| Error::store("set the size of", error);
        let newer = self.pages.next_dirty(len / PAGE_SIZE).is_some();
        // Write-back of the last page zeroes what lies behind the end, which may have to come back.
        let inside = !len.is_multiple_of(PAGE_SIZE);
        let last = inside.then(|| self.pages.lock_settled(len / PAGE_SIZE));
        self.pages.set_end(len);
        if let Err(error) = self.object().set_len(len) {
            self.pages.set_end(old);
            return Err(told(error));
        }
        drop(last);
        self.pages.truncate(len);
        if newer {
            // A transfer that was under way may have made the stored file longer again; the pages waited for it.
            let _settled = self.pages.lock_settled(len / PAGE_SIZE);
            self.object().set_len(len).map_err(told)?;
        }
        Ok(())
    }

    /// Writes back, then drops all clean cached pages.
    ///
    /// # Errors
    /// The first error of storing a page.
    pub fn drop_cache(&self) -> Result<()> {
        self.flush()?;
        self.pages.invalidate(0..u64::MAX);
        Ok(())
    }

    /// Takes over a size that somebody else gave the stored file: drops the clean pages. `is_current` is asked once nobody
    /// can write any more: a size of the stored file's that our own writes have overtaken since must not come back.
    pub(crate) fn reload(&self, len: u64, is_current: impl FnOnce() -> bool) -> Reload {
        let _exclusive = self.lock_exclusive();
        let _blocked = self.pages.gate().block();
        self.pages.harvest(0..u64::MAX, Harvest::Withdraw);
        if self.pages.is_dirty() {
            return Reload::NewerCached;
        }
        if !is_current() {
            return Reload::Overtaken;
        }
        self.pages.invalidate(0..u64::MAX);
        let old = self.len();
        self.pages.set_end(len);
        self.note_growth(old);
        self.forget_modified();
        Reload::Done
    }
}

/// Why pages were not dropped.
#[derive(Debug)]
pub(crate) enum Hindrance {
    /// The program keeps one pinned: to be waited for, with nothing held.
    Kept(Kept),
    /// It failed.
    Error(Error),
}

impl From<Error> for Hindrance {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

/// What became of an [`Inode::reload`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reload {
    /// The clean pages are gone, the size is the store's.
    Done,
    /// Newer data is cached: nothing was changed.
    NewerCached,
    /// The stored file has been changed again, by ourselves: nothing was changed.
    Overtaken,
}

impl Inode {
    /// Stores what is dirty, data first, so that other nodes find it. Called with no holder of the glock left, so nothing
    /// becomes dirty meanwhile; mappings store to nothing when it returns.
    ///
    /// # Errors
    /// What could not be stored: it is nowhere else.
    pub(crate) fn hand_over(&self) -> std::result::Result<(), Errno> {
        for _ in 0..HAND_OVER_TRIES_MAX {
            let written = self.pages.write_back(0..u64::MAX, Mode::HandOver);
            written.map_err(|error| error.errno)?;
            if !self.pages.is_dirty() {
                self.tell_times();
                return Ok(());
            }
            // A background pass that ended meanwhile has failed with a page, which is dirty again.
        }
        Err(Errno::EIO)
    }

    /// Takes over the size that other nodes left. The caller holds the glock; nothing is cached.
    pub(crate) fn take_over(&self, len: u64) {
        let _blocked = self.pages.gate().block();
        let old = self.pages.end();
        if len < old {
            // Private copies beyond it go, as where the file was cut.
            self.pages.truncate(len);
        } else {
            self.pages.set_end(len);
            self.note_growth(old);
        }
        self.forget_modified();
    }
}

impl Owner for Inode {
    fn wrote_back(&self) {
        self.tell_times();
    }
}

impl Inode {
    /// Does what a first store to a page needs before the page may become dirty: slows the storing thread down, gets
    /// room in the store, moves the times. Nothing is held.
    pub(crate) fn begin_store(&self, page: u64) -> std::result::Result<(), CacheError> {
        let end = self.len();
        let bytes = page * PAGE_SIZE..end.min((page + 1) * PAGE_SIZE);
        if bytes.is_empty() || self.pages.is_known_dirty(page) {
            // Beyond the end, which the fault will find; or dirty, so all of it is done.
            return Ok(());
        }
        self.engine.cache.throttle(&Pace::default())?;
        let object = self.object();
        if self.engine.reserve(PAGE_SIZE, object.as_ref()) == Reserve::Exactly
            && let Err(error) = object.allocate(bytes)
            && error.errno != Errno::EOPNOTSUPP
        {
            return Err(CacheError::Store(error));
        }
        self.touch_modified();
        Ok(())
    }
}

impl Inode {
    /// Serves a load from a page that is cached, which takes no glock: it stays until its lock is had by whoever gives the right
    /// to it away. All else takes one, and that waits and allocates.
    fn try_shared_fault(&self, fault: &Fault<'_>) -> Option<MapOutcome> {
        if fault.access == Access::Write {
            return None;
        }
        let here = Here {
            around: fault.around.clone(),
            moves: fault.moves,
            ahead: fault.ahead,
            store: false,
        };
        let outcome = self
            .pages
            .map_here(fault.page, fault.access, &here, fault.to)?;
        // Without a glock nobody here knows the size.
        (outcome == MapOutcome::Mapped).then_some(outcome)
    }
}

impl FaultTarget for Inode {
    fn pages(&self) -> &Arc<FilePages> {
        &self.pages
    }

    fn fault(&self, fault: &Fault<'_>) -> std::result::Result<MapOutcome, CacheError> {
        let _held = self.hold_fault(match fault.access {
            Access::Read => Right::Shared,
            Access::Write => Right::Exclusive,
        })?;
        if fault.access == Access::Write {
            self.begin_store(fault.page)?;
        }
        let around = fault.around.clone();
        self.pages
            .map(fault.page, fault.access, around, fault.ahead, fault.to)
    }

    fn try_fault(&self, fault: &Fault<'_>, may_read: bool) -> Option<MapOutcome> {
        if self.shared.is_some() {
            return self.try_shared_fault(fault);
        }
        if fault.access == Access::Write {
            // A thread that would be slowed down, or has to ask for room, does so in the pool.
            if !self.engine.cache.is_calm() || !self.engine.reserve_at_once(PAGE_SIZE) {
                return None;
            }
            self.touch_modified();
        }
        let here = Here {
            around: fault.around.clone(),
            moves: fault.moves,
            ahead: fault.ahead,
            store: may_read,
        };
        self.pages
            .map_here(fault.page, fault.access, &here, fault.to)
    }

    fn make_readable(
        &self,
        page: u64,
        want: &Want<'_>,
    ) -> std::result::Result<MapOutcome, CacheError> {
        let held = self.hold_fault(Right::Shared)?;
        if held.is_some() && page >= self.len().div_ceil(PAGE_SIZE) {
            return Ok(MapOutcome::BeyondEnd);
        }
        self.pages.read(page, want)?;
        Ok(MapOutcome::Mapped)
    }

    fn knows_end(&self) -> bool {
        self.shared.is_none() || self.pages.is_open()
    }

    fn make_writable(&self, page: u64) -> std::result::Result<MapOutcome, CacheError> {
        let _held = self.hold_fault(Right::Exclusive)?;
        self.begin_store(page)?;
        self.pages.make_writable(page)
    }
}

#[cfg(test)]
mod tests;
