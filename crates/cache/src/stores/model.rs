//! The cache's own harvest, write-back and eviction under loom, over a model of what the kernel does to one page-table
//! entry: every interleaving of a program that stores with those who look for its stores.
//!
//! Run with `RUSTFLAGS="--cfg loom" cargo test -p pinfold-cache --release --lib stores::model`.
//!
//! The entry, as Linux has it with UFFD_FEATURE_WP_ASYNC (docs/decisions/0007 lists the facts and where they are tested):
//!
//! ```text
//!              install                  store                      "written" to a scan
//!   EMPTY, marked or not ──► PROTECTED ──────► WRITABLE            WRITABLE, EMPTY without a mark
//!      ▲                         │  ▲             │
//!      │ drop: leaves a mark ────┘  └─ protect ───┤
//!      └──────────────── drop: leaves none ───────┘
//! ```
//! Each mapping has one entry, and the record of whether it has shown the page, as `pinfold-fault` keeps it: set after an
//! entry came, taken back after the library has dropped the entry and asked, both with the page's lock held.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends there")]

use std::ops::Range;
use std::sync::{Arc, OnceLock, Weak};

use loom::sync::Mutex;
use loom::sync::atomic::{AtomicBool, Ordering};
use loom::thread;
use pinfold_base::Errno;
use pinfold_mem::uffd::{InstallStop, Installed};
use pinfold_mem::{Access, Frame, RawSpan};
use pinfold_store::testing::MemoryObject;

use super::Harvest;
use crate::{Cache, CacheConfig, FilePages, MEMORY_MIN, MapOutcome, MapTarget, Mode, ReverseMap};

const PAGE: usize = 4096;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Entry {
    Empty { marked: bool },
    Protected,
    Writable,
}

/// The kernel and the library's record, for one mapping of one page.
struct Kernel {
    /// The page-table lock: what is done under it no processor sees half of.
    entry: Mutex<Entry>,
    /// Whether the mapping may have an entry, or have had one that was stored through. The page's lock orders it.
    shown: AtomicBool,
    file: OnceLock<Weak<FilePages>>,
}

impl Kernel {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            entry: Mutex::new(Entry::Empty { marked: false }),
            shown: AtomicBool::new(false),
            file: OnceLock::new(),
        })
    }

    fn file(&self) -> Arc<FilePages> {
        self.file.get().and_then(Weak::upgrade).unwrap()
    }

    fn protect_now(&self) {
        let mut entry = self.entry.lock().unwrap();
        *entry = match *entry {
            Entry::Empty { .. } => Entry::Empty { marked: true },
            Entry::Protected | Entry::Writable => Entry::Protected,
        };
    }

    fn drop_now(&self) {
        let mut entry = self.entry.lock().unwrap();
        *entry = match *entry {
            Entry::Empty { marked } => Entry::Empty { marked },
            Entry::Protected => Entry::Empty { marked: true },
            Entry::Writable => Entry::Empty { marked: false },
        };
    }

    /// PAGEMAP_SCAN for pages that were written, which protects them in the same step; asked where the page was shown.
    fn scan(&self) -> bool {
        if !self.shown.load(Ordering::Relaxed) {
            return false;
        }
        let mut entry = self.entry.lock().unwrap();
        let written = matches!(*entry, Entry::Writable | Entry::Empty { marked: false });
        *entry = match *entry {
            Entry::Empty { .. } => Entry::Empty { marked: true },
            Entry::Protected | Entry::Writable => Entry::Protected,
        };
        written
    }

    /// The program's instruction: faults until it goes through.
    fn store(&self, byte: u8) {
        loop {
            let mut entry = self.entry.lock().unwrap();
            match *entry {
                Entry::Writable => {
                    let file = self.file();
                    // By the window's own address, whatever the number of the slot.
                    let slot = Frame(file.homes().arena().frames_max() as u32);
                    file.homes().write(slot, 0, 0, &[byte]);
                    return;
                }
                // The kernel's own answer to the fault; the instruction is repeated.
                Entry::Protected => *entry = Entry::Writable,
                Entry::Empty { .. } => {
                    drop(entry);
                    self.fault(Access::Write);
                }
            }
        }
    }

    fn is_mapped(&self) -> bool {
        !matches!(*self.entry.lock().unwrap(), Entry::Empty { .. })
    }

    fn fault(&self, access: Access) {
        let outcome = self.file().map(0, access, 0..1, None, self);
        assert_eq!(outcome.unwrap(), MapOutcome::Mapped);
    }
}

impl MapTarget for Kernel {
    fn covers(&self) -> Range<u64> {
        0..1
    }

    fn shared(&self) -> bool {
        true
    }

    fn tracked(&self) -> bool {
        true
    }

    fn may_have_shown(&self, _page: u64) -> bool {
        self.shown.load(Ordering::Relaxed)
    }

    fn copy(&self, _page: u64, _from: RawSpan, _protect: bool) -> Installed {
        // Then the cache fills the window itself.
        Installed {
            pages: 0,
            stop: Some(InstallStop::Other(Errno::ENOSYS)),
        }
    }

    fn resume(&self, _pages: Range<u64>, protect: bool) -> Installed {
        let mut entry = self.entry.lock().unwrap();
        if !matches!(*entry, Entry::Empty { .. }) {
            return Installed {
                pages: 0,
                stop: Some(InstallStop::Exists),
            };
        }
        *entry = if protect {
            Entry::Protected
        } else {
            Entry::Writable
        };
        drop(entry);
        self.shown.store(true, Ordering::Relaxed);
        Installed {
            pages: 1,
            stop: None,
        }
    }

    fn unprotect(&self, _pages: Range<u64>) {
        let mut entry = self.entry.lock().unwrap();
        if *entry == Entry::Protected {
            *entry = Entry::Writable;
        }
    }
}

/// The file's mappings.
struct Mappings(Vec<Arc<Kernel>>);

impl ReverseMap for Mappings {
    fn unmap(&self, _pages: Range<u64>) {
        self.0.iter().for_each(|kernel| kernel.drop_now());
    }

    fn protect(&self, _pages: Range<u64>) {
        self.0.iter().for_each(|kernel| kernel.protect_now());
    }

    fn tracks(&self, _pages: &Range<u64>) -> bool {
        true
    }

    fn stores(&self, pages: &Range<u64>, found: &mut dyn FnMut(Range<u64>)) {
        for kernel in &self.0 {
            if kernel.scan() {
                found(pages.clone());
            }
        }
    }

    fn withdraw(&self, runs: &[Range<u64>], found: &mut dyn FnMut(Range<u64>)) {
        for (pages, kernel) in runs
            .iter()
            .flat_map(|run| self.0.iter().map(move |k| (run, k)))
        {
            kernel.drop_now();
            if kernel.scan() {
                found(pages.clone());
            }
            kernel.shown.store(false, Ordering::Relaxed);
        }
    }
}

/// A file of one page that is mapped for loads, and what stores it.
struct World {
    cache: Arc<Cache>,
    file: Arc<FilePages>,
    kernel: Arc<Kernel>,
    /// Another mapping, which has shown nothing yet; where there is one.
    second: Option<Arc<Kernel>>,
    store: Arc<MemoryObject>,
}

impl World {
    fn new() -> Arc<Self> {
        Self::with(None)
    }

    fn with(second: Option<Arc<Kernel>>) -> Arc<Self> {
        let cache = Cache::new(CacheConfig {
            memory: MEMORY_MIN,
            ..CacheConfig::default()
        })
        .unwrap();
        let store = MemoryObject::with(&[0; PAGE]);
        let file = FilePages::new(&cache, store.clone(), PAGE as u64);
        let kernel = Kernel::new();
        let all: Vec<_> = [&kernel].into_iter().chain(&second).cloned().collect();
        for kernel in &all {
            kernel.file.set(Arc::downgrade(&file)).unwrap();
        }
        let reverse = Arc::new(Mappings(all));
        file.open_window(1, reverse).unwrap();
        file.note_dirty_file();
        kernel.fault(Access::Read);
        Arc::new(Self {
            cache,
            file,
            kernel,
            second,
            store,
        })
    }

    fn second(&self) -> &Kernel {
        self.second.as_ref().unwrap()
    }

    fn evict(&self) {
        let mut saved = self.cache.arena.no_charge();
        self.cache.reclaim(1, &mut saved);
    }

    fn sync(&self) {
        self.file.write_back(0..u64::MAX, Mode::Integrity).unwrap();
    }

    fn stored(&self) -> u8 {
        self.store.bytes()[0]
    }

    fn writes(&self) -> u64 {
        self.cache.statistics().pages_written
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // The list of files that may be dirty has this one in it, and it the cache.
        self.cache.dirty_files.lock().clear();
    }
}

/// Explores with a bound on preemptions: one more takes minutes.
fn explore(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(2);
    builder.max_branches = 100_000;
    builder.check(model);
}

/// Explores `theirs` beside `ours`; then what `ours` has stored must come out of a sync.
fn beside(theirs: fn(&World), ours: fn(&World)) {
    explore_two(World::new, theirs, ours);
}

/// The same where another mapping has not shown the page.
fn beside_second(theirs: fn(&World), ours: fn(&World)) {
    explore_two(|| World::with(Some(Kernel::new())), theirs, ours);
}

fn explore_two(world: fn() -> Arc<World>, theirs: fn(&World), ours: fn(&World)) {
    explore(move || {
        let world = world();
        let other = {
            let world = Arc::clone(&world);
            thread::spawn(move || theirs(&world))
        };
        ours(&world);
        other.join().unwrap();
        world.sync();
        assert_eq!(world.stored(), 1, "a store was lost");
        // What is clean now may go, and comes back the same.
        world.evict();
        world.kernel.store(1);
        drop(world);
    });
}

fn store(world: &World) {
    world.kernel.store(1);
}

fn store_and_sync(world: &World) {
    world.kernel.store(1);
    world.sync();
    assert_eq!(
        world.stored(),
        1,
        "a store was lost that came before the sync"
    );
}

/// Stores, drops the entry behind the library's back (`MADV_DONTNEED`), and loads: the new entry must not hide the store.
fn store_and_drop(world: &World) {
    world.kernel.store(1);
    world.kernel.drop_now();
    world.kernel.fault(Access::Read);
}

#[test]
fn t53_no_store_is_lost_beside_a_sync() {
    beside(World::sync, store);
}

#[test]
fn t53_no_store_is_lost_beside_an_eviction() {
    beside(World::evict, store);
}

#[test]
fn t53_no_store_is_lost_beside_what_takes_entries_away() {
    beside(|world| world.file.harvest(0..1, Harvest::Withdraw), store);
}

#[test]
fn t53_a_sync_stores_what_came_before_it_beside_another() {
    beside(World::sync, store_and_sync);
}

#[test]
fn t53_a_sync_stores_what_came_before_it_beside_an_eviction() {
    beside(World::evict, store_and_sync);
}

#[test]
fn t53_a_sync_stores_what_came_before_it_beside_the_flusher() {
    let look = |world: &World| world.file.harvest(0..1, Harvest::Try);
    beside(look, store_and_sync);
}

/// The page is known to be one that may be stored to without notice before its lock is dropped: from then on another thread
/// stores through the entry, and looks for that.
#[test]
fn t53_a_store_right_after_another_threads_load_is_found() {
    explore(|| {
        let world = World::new();
        world.evict();
        let loader = {
            let world = Arc::clone(&world);
            thread::spawn(move || world.kernel.fault(Access::Read))
        };
        if world.kernel.is_mapped() {
            store_and_sync(&world);
        }
        loader.join().unwrap();
        drop(world);
    });
}

#[test]
fn t53_no_store_is_lost_whose_entry_the_program_drops_beside_a_sync() {
    beside(World::sync, store_and_drop);
}

#[test]
fn t53_no_store_is_lost_whose_entry_the_program_drops_beside_an_eviction() {
    beside(World::evict, store_and_drop);
}

/// The other mapping's load does not ask, because it has shown nothing; the first one's still does.
#[test]
fn t53_no_store_is_lost_whose_entry_the_program_drops_beside_a_load_elsewhere() {
    beside_second(|world| world.second().fault(Access::Read), store_and_drop);
}

/// A mapping's first entry asks for no stores, and those that come through it are found all the same.
#[test]
fn t53_no_store_through_a_second_mapping_is_lost_beside_a_sync() {
    let through_both = |world: &World| {
        world.second().fault(Access::Read);
        world.second().store(1);
    };
    beside_second(World::sync, through_both);
}

#[test]
fn no_store_is_invented_where_another_mapping_has_shown_nothing() {
    explore(|| {
        let world = World::with(Some(Kernel::new()));
        let other = {
            let world = Arc::clone(&world);
            thread::spawn(move || world.second().fault(Access::Read))
        };
        world.sync();
        world.evict();
        other.join().unwrap();
        world.sync();
        assert_eq!((world.writes(), world.stored()), (0, 0));
        assert!(!world.file.is_known_dirty(0));
        drop(world);
    });
}

#[test]
fn no_store_is_invented_beside_a_sync_and_an_eviction() {
    explore(|| {
        let world = World::new();
        let other = {
            let world = Arc::clone(&world);
            thread::spawn(move || world.evict())
        };
        world.sync();
        other.join().unwrap();
        assert_eq!((world.writes(), world.stored()), (0, 0));
        assert!(!world.file.is_known_dirty(0));
        drop(world);
    });
}
