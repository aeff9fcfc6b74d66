//! When dirty pages are written, and how writers are slowed down (SEMANTICS.md section G).
//!
//! *Owns*: the background thread, the list of files with dirty pages, the thresholds.
//!
//! *Does not own*: how a file's pages are written (the module above).
//!
//! *Locking*: two leaves (class 6), around the thread's signals and around the list; nothing is allocated, and no file let go
//! of, under the list's.

use pinfold_base::sync::path::{AtomicBool, Ordering};
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pinfold_base::PAGE_SIZE;
use pinfold_base::roomy::{self, Roomy};
use pinfold_base::sync::{self, Condvar, Mutex, thread};
use pinfold_store::StoreError;

use super::Mode;
use crate::CacheError;
use crate::cache::{Cache, Listed};
use crate::file::FilePages;

/// The longest a writer sleeps in one go.
const PAUSE_MAX: Duration = Duration::from_millis(200);

/// How a writer takes being slowed down.
#[derive(Debug, Clone, Copy, Default)]
pub struct Pace<'a> {
    /// Fail instead of sleeping.
    pub nowait: bool,
    /// Set by another thread to end the sleep.
    pub cancelled: Option<&'a AtomicBool>,
}

/// The background write-back thread's signals.
#[derive(Debug, Default)]
pub(crate) struct Flusher {
    wanted: Mutex<Wanted>,
    kicked: Condvar,
    running: AtomicBool,
}

#[derive(Debug, Default)]
struct Wanted {
    kick: bool,
    /// Somebody waits for a frame: write although little is dirty.
    starved: bool,
    stop: bool,
}

impl Cache {
    /// Starts the background write-back thread; it ends with [`Cache::stop_flusher`].
    ///
    /// # Errors
    /// The system refuses a thread.
    pub fn start_flusher(self: &Arc<Self>) -> std::io::Result<thread::JoinHandle<()>> {
        let cache = Arc::clone(self);
        self.flusher.running.store(true, Ordering::Release);
        thread::Builder::new()
            .name("pinfold-flush".into())
            .spawn(move || cache.flush_loop())
            .inspect_err(|_| self.flusher.running.store(false, Ordering::Release))
    }

    /// Asks the background thread to end. What is dirty stays so; from now on whoever runs out of clean pages writes
    /// some back himself.
    pub fn stop_flusher(&self) {
        self.flusher.running.store(false, Ordering::Release);
        self.flusher.wanted.lock().stop = true;
        self.flusher.kicked.notify_all();
    }

    pub(super) fn flusher_runs(&self) -> bool {
        self.flusher.running.load(Ordering::Acquire)
    }

    /// Gets dirty pages written for somebody who waits for that: by the flusher, or here where none runs.
    pub(crate) fn press(&self) {
        if self.flusher_runs() {
            self.kick_flusher(true);
        } else {
            self.flush_once(true);
        }
    }

    pub(crate) fn kick_flusher(&self, starved: bool) {
        let mut wanted = self.flusher.wanted.lock();
        wanted.starved |= starved;
        if !wanted.kick {
            wanted.kick = true;
            self.flusher.kicked.notify_all();
        }
    }

    /// Makes the flusher know a file that has dirty pages.
    #[inline]
    pub(crate) fn enlist_dirty(&self, file: &Arc<FilePages>) {
        if !file.listed.load(Ordering::SeqCst) {
            self.enlist(file);
        }
    }

    #[cold]
    fn enlist(&self, file: &Arc<FilePages>) {
        // Both under the lock: a flag set after somebody delisted the file again would keep it off the list for good.
        let mut files = roomy::lock_roomy(&self.dirty_files);
        files.entry(file.id()).or_insert_with(|| Listed::of(file));
        file.listed.store(true, Ordering::SeqCst);
    }

    /// As [`Cache::enlist_dirty`]; false where that would allocate.
    pub(crate) fn try_enlist_dirty(&self, file: &Arc<FilePages>) -> bool {
        if file.listed.load(Ordering::SeqCst) {
            return true;
        }
        let mut files = self.dirty_files.lock();
        if !files.has_room() {
            return false;
        }
        files.entry(file.id()).or_insert_with(|| Listed::of(file));
        file.listed.store(true, Ordering::SeqCst);
        true
    }

    /// Lists the files that are, or may be, dirty.
    pub(crate) fn dirty_files(&self) -> Vec<Arc<FilePages>> {
        roomy::list(&self.dirty_files, usize::MAX, HashMap::len, |files, add| {
            for listed in files.values() {
                if !add(Arc::clone(&listed.file)) {
                    return;
                }
            }
        })
    }

    /// Calls a listed file, which stays listed meanwhile: so what is called here never has the last reference to it, which
    /// in a signal handler must not be dropped.
    pub(crate) fn visit_listed<R>(
        &self,
        file: u64,
        visit: impl FnOnce(&FilePages) -> R,
    ) -> Option<R> {
        let found = {
            let mut files = self.dirty_files.lock();
            let listed = files.get_mut(&file)?;
            listed.visits += 1;
            Arc::clone(&listed.file)
        };
        let result = visit(&found);
        // Before it may leave the list.
        drop(found);
        if let Some(listed) = self.dirty_files.lock().get_mut(&file) {
            listed.visits -= 1;
        }
        Some(result)
    }

    /// Forgets files that have become clean.
    pub(super) fn delist_clean(&self) {
        let mut gone: Vec<Arc<FilePages>> = Vec::with_capacity(self.dirty_files.lock().len());
        self.dirty_files.lock().retain(|_, listed| {
            let file = &listed.file;
            // First the flag, then the look: a writer dirties first and then looks at the flag.
            file.listed.store(false, Ordering::SeqCst);
            let stays = listed.visits > 0 || file.is_dirty() || file.is_tracked();
            // Nothing is allocated under the lock: those there is no room for go next time.
            let keep = stays || gone.len() == gone.capacity();
            if keep {
                file.listed.store(true, Ordering::SeqCst);
            } else {
                gone.push(Arc::clone(file));
            }
            keep
        });
        for file in gone {
            file.trim_dirty();
            // The last reference may go here: not under the lock.
        }
    }

    fn flush_loop(self: Arc<Self>) {
        /// Without it, whoever runs out of clean pages writes some back himself: also after a panic, as of a store.
        struct Running<'a>(&'a Flusher);
        impl Drop for Running<'_> {
            fn drop(&mut self) {
                self.0.running.store(false, Ordering::Release);
            }
        }
        let _running = Running(&self.flusher);
        // A handler of the program that faults in a mapping could wait for this very thread.
        pinfold_mem::quiet::keep_signals_away();
        loop {
            let starved = {
                let mut wanted = self.flusher.wanted.lock();
                if !wanted.kick && !wanted.stop {
                    let until = sync::now() + self.config.flush_interval;
                    wanted = self.flusher.kicked.wait_until(wanted, until);
                }
                if wanted.stop {
                    return;
                }
                wanted.kick = false;
                std::mem::take(&mut wanted.starved)
            };
            self.flush_once(starved);
        }
    }

    /// Writes what is too old, and while too much is dirty, whatever is.
    fn flush_once(&self, starved: bool) {
        self.harvest_all();
        let mut visited = HashSet::new();
        let mut failed = HashSet::new();
        loop {
            let pressed = starved || self.dirty_pages() > self.background_pages();
            let now = sync::now();
            let mut candidates: Vec<(Instant, Arc<FilePages>)> = self
                .dirty_files()
                .into_iter()
                .filter_map(|file| Some((file.dirty_since()?, file)))
                .filter(|(_, file)| !failed.contains(&file.id()))
                .filter(|(since, file)| {
                    let old = now.duration_since(*since) >= self.config.dirty_age_max;
                    old && !visited.contains(&file.id()) || pressed
                })
                .collect();
            candidates.sort_by_key(|(since, _)| *since);
            let mut sent = 0;
            for (_, file) in &candidates {
                visited.insert(file.id());
                match file.write_back(0..u64::MAX, Mode::Opportunistic) {
                    Ok(pages) => sent += pages,
                    // It is recorded in the file's errseq, where fsync finds it. Where such pages stay dirty, trying
                    // again at once would spin for as long as the store fails.
                    Err(_) => {
                        failed.insert(file.id());
                    }
                }
                if self.flusher_runs() && self.flusher.wanted.lock().stop {
                    return;
                }
            }
            self.delist_clean();
            if sent == 0 || self.dirty_pages() <= self.background_pages() {
                return;
            }
        }
    }

    /// Writes back everything that is dirty now, in every file.
    ///
    /// # Errors
    /// The first error met; the rest is written all the same.
    pub fn write_back_all(&self) -> Result<(), StoreError> {
        let mut first = None;
        for file in self.dirty_files() {
            if let Err(error) = file.write_back(0..u64::MAX, Mode::Integrity) {
                first.get_or_insert(error);
            }
        }
        self.delist_clean();
        first.map_or(Ok(()), Err)
    }

    fn limit_pages(&self) -> usize {
        let bytes = self
            .config
            .dirty_limit
            .unwrap_or(self.pages_max() as u64 * PAGE_SIZE / 2);
        usize::try_from(bytes / PAGE_SIZE)
            .unwrap_or(usize::MAX)
            .clamp(8, self.pages_max() * 3 / 4)
    }

    fn background_pages(&self) -> usize {
        self.limit_pages() / 2
    }

    /// Tells whether so little is dirty that nobody is slowed down and nothing started. Takes no lock.
    #[must_use]
    pub fn is_calm(&self) -> bool {
        self.dirty_pages() <= self.background_pages()
    }

    /// Slows a writer down while too much is dirty. Called with no folio locked; an inode's lock or a glock may be
    /// held, because write-back takes neither (G-6, H-5).
    ///
    /// Free up to half way between the background threshold and the limit; above that a sleep in proportion, at most
    /// 200 ms at a time, ended early when enough was written; at the limit, until it is below.
    ///
    /// # Errors
    /// `WouldBlock` for a caller that must not sleep, `Interrupted` when cancelled.
    #[inline]
    pub fn throttle(&self, pace: &Pace<'_>) -> Result<(), CacheError> {
        let (limit, background) = (self.limit_pages(), self.background_pages());
        let dirty = self.dirty_pages();
        if dirty <= background {
            return Ok(());
        }
        self.kick_flusher(false);
        let free = usize::midpoint(limit, background);
        if dirty <= free {
            return Ok(());
        }
        self.pause(pace, limit, free)
    }

    #[cold]
    fn pause(&self, pace: &Pace<'_>, limit: usize, free: usize) -> Result<(), CacheError> {
        if pace.nowait {
            return Err(CacheError::WouldBlock);
        }
        self.counters.throttled.bump();
        loop {
            let dirty = self.dirty_pages();
            if dirty <= free {
                return Ok(());
            }
            if pace
                .cancelled
                .is_some_and(|flag| flag.load(Ordering::Relaxed))
            {
                return Err(CacheError::Interrupted);
            }
            self.press();
            let share = (dirty - free) as f64 / (limit - free).max(1) as f64;
            let until = sync::now() + PAUSE_MAX.mul_f64(share.min(1.0));
            while sync::now() < until && self.dirty_pages() > free {
                if pace
                    .cancelled
                    .is_some_and(|flag| flag.load(Ordering::Relaxed))
                {
                    return Err(CacheError::Interrupted);
                }
                self.wait_progress(until.min(sync::now() + PAUSE_MAX / 10));
            }
            if self.dirty_pages() < limit {
                return Ok(());
            }
        }
    }
}
