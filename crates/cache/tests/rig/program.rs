//! A program with a mapping of a file, and a thread that serves its faults in the simplest way.
#![allow(dead_code, reason = "each test uses its part")]
#![allow(
    unsafe_code,
    reason = "its own loads and stores are what the cache is tested with"
)]

use std::ops::Range;
use std::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;

use pinfold_cache::{FilePages, Harvest, MapOutcome, MapTarget, ReverseMap};
use pinfold_mem::uffd::{Event, Installed, ScanFor, scan, tracks_stores};
use pinfold_mem::{Delivery, PageBits, Privilege, RawSpan, Uffd, UserMap, UserMapKind};

const PAGE: usize = 4096;

/// The mapping and what serves it.
pub struct Program {
    inner: Arc<Inner>,
    servers: Mutex<Vec<JoinHandle<()>>>,
}

struct Inner {
    file: Arc<FilePages>,
    uffd: Uffd,
    map: OnceLock<UserMap>,
    faults: AtomicU64,
    /// Pages that have, or had, an entry.
    shown: PageBits,
    /// The byte to store once to a page that is about to be withdrawn; 0: none.
    late: AtomicU8,
    /// Where in that page, and the size the file gets just before; 0: it stays.
    late_at: (AtomicUsize, AtomicU64),
}

impl Program {
    /// Maps the first `pages` of a file; `None` where the system has no userfaultfd for us.
    pub fn start(file: &Arc<FilePages>, pages: u64, kind: UserMapKind) -> Option<Self> {
        Self::begin(file, pages, kind, false)
    }

    /// The same with stores that come without notice; `None` also where the kernel cannot tell of them.
    pub fn tracked(file: &Arc<FilePages>, pages: u64) -> Option<Self> {
        Self::begin(file, pages, UserMapKind::SharedWrite, true)
    }

    fn begin(file: &Arc<FilePages>, pages: u64, kind: UserMapKind, tracked: bool) -> Option<Self> {
        let uffd = match Uffd::open(Delivery::Handler, Privilege::ANY, tracked) {
            Ok(uffd) if tracked && tracks_stores(&uffd) != Ok(true) => {
                eprintln!("skipped: stores cannot be tracked");
                return None;
            }
            Ok(uffd) => uffd,
            Err(error) => {
                eprintln!("skipped: {error}");
                return None;
            }
        };
        let inner = Arc::new(Inner {
            file: Arc::clone(file),
            uffd,
            map: OnceLock::new(),
            faults: AtomicU64::new(0),
            shown: PageBits::new(pages).unwrap(),
            late: AtomicU8::new(0),
            late_at: Default::default(),
        });
        let reverse = Arc::new(Reverse(Arc::downgrade(&inner)));
        let window = file.open_window(pages, reverse).unwrap();
        let map = window.user_map(0..pages, kind).unwrap();
        inner.uffd.register(&map).unwrap();
        assert!(inner.map.set(map).is_ok());
        file.note_dirty_file();
        let program = Self {
            inner,
            servers: Mutex::default(),
        };
        program.serve_more();
        Some(program)
    }

    /// Adds a thread that serves faults. With one, nothing more comes of a fault once the access has gone on; with several, a
    /// fault that was reported twice may be served, and its page made storable and dirty, at any time after.
    pub fn serve_more(&self) {
        let inner = Arc::clone(&self.inner);
        let server = std::thread::spawn(move || inner.serve());
        self.servers.lock().unwrap().push(server);
    }

    fn addr(&self, page: u64, at: usize) -> usize {
        self.inner.map().addr_of(page).unwrap() + at
    }

    /// Loads a byte as the program's own instructions would.
    pub fn load(&self, page: u64, at: usize) -> u8 {
        let addr = std::ptr::with_exposed_provenance::<u8>(self.addr(page, at));
        // SAFETY: in the user map, which lives as long as `self`, and into which no references exist.
        unsafe { addr.read_volatile() }
    }

    /// Stores a byte.
    pub fn store(&self, page: u64, at: usize, byte: u8) {
        let addr = std::ptr::with_exposed_provenance_mut::<u8>(self.addr(page, at));
        // SAFETY: as for `load`.
        unsafe { addr.write_volatile(byte) };
    }

    /// Loads an aligned word.
    pub fn load_word(&self, page: u64, at: usize) -> u64 {
        let addr = std::ptr::with_exposed_provenance::<u64>(self.addr(page, at));
        // SAFETY: as for `load`; `at` is a multiple of eight.
        u64::from_le(unsafe { addr.read_volatile() })
    }

    /// Stores an aligned word.
    pub fn store_word(&self, page: u64, at: usize, word: u64) {
        let addr = std::ptr::with_exposed_provenance_mut::<u64>(self.addr(page, at));
        // SAFETY: as for `load_word`.
        unsafe { addr.write_volatile(word.to_le()) };
    }

    /// Has `byte` stored at the worst of moments: to the next page that is withdrawn, after it was asked whether it was stored
    /// to, before its entry goes.
    pub fn store_late(&self, byte: u8) {
        self.inner.late.store(byte, Ordering::Relaxed);
    }

    /// The same, at byte `at` of that page, over which the file has just grown: it is `end` bytes long then.
    pub fn grow_and_store_late(&self, end: u64, at: usize, byte: u8) {
        self.inner.late_at.0.store(at, Ordering::Relaxed);
        self.inner.late_at.1.store(end, Ordering::Relaxed);
        self.store_late(byte);
    }

    /// Takes pages' entries away behind the library's back, as a program does with `MADV_DONTNEED`.
    pub fn drop_entries(&self, pages: Range<u64>) {
        self.inner.map().drop_entries(pages).unwrap();
    }

    /// Returns how many faults were taken so far.
    pub fn faults(&self) -> u64 {
        self.inner.faults.load(Ordering::Relaxed)
    }

    /// Returns from the first to after the last page that is mapped.
    pub fn mapped(&self) -> Range<u64> {
        let map = self.inner.map();
        let present = |page: &u64| {
            let at = map.addr_of(*page).unwrap();
            let mut found = false;
            scan(at..at + PAGE, ScanFor::Present, |_| found = true).unwrap();
            found
        };
        let mut pages = map.pages().filter(present);
        let Some(first) = pages.next() else {
            return 0..0;
        };
        first..pages.last().unwrap_or(first) + 1
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let file = Arc::clone(&self.inner.file);
        file.harvest(0..u64::MAX, Harvest::Withdraw);
        self.inner.uffd.stop();
        for server in self.servers.get_mut().unwrap().drain(..) {
            let served = server.join();
            assert!(served.is_ok() || std::thread::panicking());
        }
    }
}

impl Inner {
    fn map(&self) -> &UserMap {
        self.map.get().unwrap()
    }

    fn serve(&self) {
        let mut events = [Event::NONE; 8];
        loop {
            let count = self.uffd.read_events(&mut events).unwrap();
            if count == 0 {
                return;
            }
            for event in &events[..count] {
                self.faults.fetch_add(1, Ordering::Relaxed);
                let page = self.map().page_at(event.addr).unwrap();
                let around = page.saturating_sub(8)..page + 8;
                // A program would get SIGBUS; this one waits until the file is longer again.
                while self
                    .file
                    .map(page, event.access, around.clone(), None, self)
                    .unwrap()
                    == MapOutcome::BeyondEnd
                {
                    std::thread::yield_now();
                }
                let at = self.map().addr_of(page).unwrap();
                self.uffd.wake(at, PAGE).unwrap();
            }
        }
    }

    fn store_late(&self, page: u64) {
        let byte = self.late.swap(0, Ordering::Relaxed);
        if byte != 0 {
            let end = self.late_at.1.load(Ordering::Relaxed);
            if end > 0 {
                self.file.set_end(end);
            }
            let addr = self.map().addr_of(page).unwrap() + self.late_at.0.load(Ordering::Relaxed);
            let place = std::ptr::with_exposed_provenance_mut::<u8>(addr);
            // SAFETY: in the user map, which lives as long as `self`, and into which no references exist.
            unsafe { place.write_volatile(byte) };
        }
    }

    fn look(&self, pages: Range<u64>, found: &mut dyn FnMut(Range<u64>)) {
        let (at, len) = self.range(&pages);
        let page = |addr: usize| pages.start + ((addr - at) / PAGE) as u64;
        scan(at..at + len, ScanFor::WrittenAndProtect, |run| {
            self.shown.runs(page(run.start)..page(run.end), &mut *found);
        })
        .unwrap();
    }

    fn range(&self, pages: &Range<u64>) -> (usize, usize) {
        let at = self.map().addr_of(pages.start).unwrap();
        (at, (pages.end - pages.start) as usize * PAGE)
    }
}

impl MapTarget for Inner {
    fn covers(&self) -> Range<u64> {
        self.map().pages()
    }

    fn shared(&self) -> bool {
        self.map().kind() != UserMapKind::Private
    }

    fn tracked(&self) -> bool {
        self.uffd.wp_async()
    }

    fn may_have_shown(&self, page: u64) -> bool {
        self.shown.contains(page)
    }

    fn copy(&self, page: u64, from: RawSpan, protect: bool) -> Installed {
        let at = self.map().addr_of(page).unwrap();
        let installed = self.uffd.copy(at, from, protect);
        self.shown.insert(page..page + installed.pages as u64);
        installed
    }

    fn resume(&self, pages: Range<u64>, protect: bool) -> Installed {
        let (at, len) = self.range(&pages);
        let installed = self.uffd.resume(at, len, protect);
        self.shown
            .insert(pages.start..pages.start + installed.pages as u64);
        installed
    }

    fn unprotect(&self, pages: Range<u64>) {
        let (at, len) = self.range(&pages);
        self.uffd.unprotect(at, len).unwrap();
    }
}

impl MapTarget for Program {
    fn covers(&self) -> Range<u64> {
        self.inner.covers()
    }

    fn shared(&self) -> bool {
        self.inner.shared()
    }

    fn tracked(&self) -> bool {
        self.inner.tracked()
    }

    fn may_have_shown(&self, page: u64) -> bool {
        self.inner.may_have_shown(page)
    }

    fn copy(&self, page: u64, from: RawSpan, protect: bool) -> Installed {
        self.inner.copy(page, from, protect)
    }

    fn resume(&self, pages: Range<u64>, protect: bool) -> Installed {
        self.inner.resume(pages, protect)
    }

    fn unprotect(&self, pages: Range<u64>) {
        self.inner.unprotect(pages);
    }
}

/// The file's mappings, of which there is one.
struct Reverse(std::sync::Weak<Inner>);

impl Reverse {
    /// Shows the mapping the part of `pages` that it shows, if it is tracked.
    fn with_tracked(&self, pages: &Range<u64>, body: impl FnOnce(&Inner, Range<u64>)) {
        let Some(inner) = self.0.upgrade().filter(|inner| inner.uffd.wp_async()) else {
            return;
        };
        let covers = inner.covers();
        let part = pages.start.max(covers.start)..pages.end.min(covers.end);
        if !part.is_empty() {
            body(&inner, part);
        }
    }
}

impl ReverseMap for Reverse {
    fn tracks(&self, pages: &Range<u64>) -> bool {
        let mut any = false;
        self.with_tracked(pages, |_, _| any = true);
        any
    }

    fn stores(&self, pages: &Range<u64>, found: &mut dyn FnMut(Range<u64>)) {
        self.with_tracked(pages, |inner, part| inner.look(part, found));
    }

    fn withdraw(&self, runs: &[Range<u64>], found: &mut dyn FnMut(Range<u64>)) {
        for run in runs {
            self.with_tracked(run, |inner, part| {
                inner.store_late(part.start);
                inner.map().drop_entries(part.clone()).unwrap();
                inner.look(part.clone(), found);
                inner.shown.remove(part);
            });
        }
    }

    fn unmap(&self, pages: Range<u64>) {
        if let Some(inner) = self.0.upgrade()
            && inner.shared()
        {
            inner.map().drop_entries(pages).unwrap();
        }
    }

    fn protect(&self, pages: Range<u64>) {
        if let Some(inner) = self.0.upgrade()
            && inner.shared()
        {
            let covers = inner.covers();
            let pages = pages.start.max(covers.start)..pages.end.min(covers.end);
            if !pages.is_empty() {
                let (at, len) = inner.range(&pages);
                inner.uffd.protect(at, len).unwrap();
            }
        }
    }
}
