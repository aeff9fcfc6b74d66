//! Windows: the memory of one mapped file, page i at offset i.
//!
//! *Owns*: the memfd; the library's own mapping of it, the *alias* (K in SEMANTICS.md: never registered, always writable,
//! never faulting where a page is present). The program's mappings, as address ranges, are [`UserMap`]s.
//!
//! *Does not own*: which pages are present, dirty or in use; faults in user maps ([`crate::uffd`]).
//!
//! *Locking*: growing the alias takes a leaf lock; looking a page's address up takes none. A page's contents are
//! guarded by its state word, which the room above owns: nothing here holds a reference into a window.
//!
//! ```text
//!  U (program)  MAP_SHARED, registered ---\
//!  U (program)  MAP_PRIVATE, registered ---+--> memfd, sparse: a page is there from its first fill to its punch
//!  K (library)  MAP_SHARED, plain --------/
//! ```

#[cfg(test)]
mod tests;
mod user_map;

use std::any::Any;
use std::fmt;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use pinfold_base::{Errno, PAGE_SIZE, Progress};
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};

pub use user_map::UserMap;

use crate::copy::CopyStop;
use crate::descriptor::high;
use crate::forked;
use crate::iov::IovCursor;
use crate::limits::{file_size, map_count_reached, without_file_size_limit};
use crate::span::{IoSpan, Segments};

const PAGE: usize = PAGE_SIZE as usize;
/// Pages of the first alias segment; each further one doubles what there is.
const FIRST_SEGMENT: u64 = 1024;
/// Alias segments: enough for every page of the largest memfd.
const SEGMENTS_MAX: usize = 43;
/// The most pages a window has: what a signed 64-bit length can say.
const PAGES_MAX: u64 = i64::MAX as u64 / PAGE_SIZE;

/// Why a window could not be made or grown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WindowError {
    /// RLIMIT_FSIZE forbids a memfd of that size, and the process may not raise it: the limit holds for memory files as for
    /// any other.
    FileSizeLimit {
        /// Bytes needed.
        bytes: u64,
        /// Bytes allowed.
        limit: u64,
    },
    /// More pages than a file can have.
    TooLarge {
        /// Pages asked for.
        pages: u64,
    },
    /// The process has as many mappings as the system allows one.
    MapCount {
        /// vm.max_map_count.
        limit: u64,
    },
    /// A system call failed.
    System {
        /// Which one.
        call: &'static str,
        /// With what.
        errno: Errno,
    },
}

impl WindowError {
    /// Returns the error number.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match self {
            Self::FileSizeLimit { .. } => Errno::EFBIG,
            Self::TooLarge { .. } => Errno::EOVERFLOW,
            Self::MapCount { .. } => Errno::ENOMEM,
            Self::System { errno, .. } => *errno,
        }
    }
}

impl fmt::Display for WindowError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FileSizeLimit { bytes, limit } => {
                write!(
                    f,
                    "mapping {bytes} bytes exceeds the file size limit of {limit} (ulimit -f)"
                )
            }
            Self::TooLarge { pages } => write!(f, "{pages} pages are more than a file can have"),
            Self::MapCount { limit } => {
                write!(
                    f,
                    "the process has as many mappings as vm.max_map_count allows: {limit}"
                )
            }
            Self::System { call, errno } => write!(f, "{call}: {errno}"),
        }
    }
}

impl std::error::Error for WindowError {}

/// What the program may do with a user map, and who sees its stores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UserMapKind {
    /// Loads of the file's bytes.
    SharedRead,
    /// Loads and stores of the file's bytes.
    SharedWrite,
    /// Loads of the file's bytes; stores stay with this mapping.
    Private,
}

/// The memory of one mapped file.
///
/// Dropped when the last user map and the last transfer over it are gone.
pub struct Window {
    fd: OwnedFd,
    /// Pages the memfd has room for; holes cost nothing.
    pages: AtomicU64,
    /// Segment 0 shows the first [`FIRST_SEGMENT`] pages, segment k as many as all before it. Null until needed, then
    /// stable until the window is dropped.
    alias: [AtomicPtr<u8>; SEGMENTS_MAX],
    growth: Mutex<()>,
}

impl fmt::Debug for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Window")
            .field("pages", &self.pages.load(Ordering::Relaxed))
            .finish_non_exhaustive()
    }
}

impl Window {
    /// Makes an empty window.
    ///
    /// # Errors
    /// `EMFILE` and `ENFILE`: no descriptor is to be had.
    pub fn new() -> Result<Arc<Self>, WindowError> {
        forked::watch();
        crate::copy::install();
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::NOEXEC_SEAL;
        let fd = memfd_create(c"pinfold", flags)
            // Kernels before 6.3 do not know the flag.
            .or_else(|_| memfd_create(c"pinfold", MemfdFlags::CLOEXEC))
            .map_err(system("memfd_create"))?;
        let window = Self {
            fd: high(fd),
            pages: AtomicU64::new(0),
            alias: [const { AtomicPtr::new(std::ptr::null_mut()) }; SEGMENTS_MAX],
            growth: Mutex::new(()),
        };
        // As large as it may become, at once: a limit set later then concerns it no more.
        let outcome = window.resize(PAGES_MAX);
        match (outcome, file_size()) {
            (Err(WindowError::FileSizeLimit { .. }), Some(limit)) => {
                window.resize(limit / PAGE_SIZE)?;
            }
            _ => outcome?,
        }
        Ok(Arc::new(window))
    }

    /// Gives the memfd room for `pages`. The file-size limit binds what is stored, not what is looked at: it is put out of
    /// the way where that is allowed.
    fn resize(&self, pages: u64) -> Result<(), WindowError> {
        let bytes = pages * PAGE_SIZE;
        let resize = || ftruncate(&self.fd, bytes).map_err(system("ftruncate"));
        // Asking first: the kernel answers a violation with a signal.
        match file_size().filter(|&limit| bytes > limit) {
            Some(limit) => without_file_size_limit(|| match file_size() {
                Some(limit) if bytes > limit => Err(WindowError::FileSizeLimit { bytes, limit }),
                _ => resize(),
            })
            .unwrap_or(Err(WindowError::FileSizeLimit { bytes, limit }))?,
            None => resize()?,
        }
        self.pages.store(pages, Ordering::Release);
        Ok(())
    }

    /// Makes the addresses of the first `pages` pages usable with [`Window::alias`].
    ///
    /// # Errors
    /// `ENOMEM`: the address space is used up or limited (RLIMIT_AS). [`WindowError::FileSizeLimit`].
    pub fn ensure(&self, pages: u64) -> Result<(), WindowError> {
        if pages > PAGES_MAX {
            return Err(WindowError::TooLarge { pages });
        }
        if pages == 0 {
            return Ok(());
        }
        // A thread that panicked under this lock left the table as it was: entries are set last.
        let _turn = self.growth.lock().unwrap_or_else(PoisonError::into_inner);
        if pages > self.pages.load(Ordering::Acquire) {
            self.resize(pages)?;
        }
        for segment in 0..=segment_of(pages - 1) {
            if self.alias[segment].load(Ordering::Acquire).is_null() {
                let addr = self.map_segment(segment)?;
                self.alias[segment].store(addr.as_ptr(), Ordering::Release);
            }
        }
        Ok(())
    }

    fn map_segment(&self, segment: usize) -> Result<NonNull<u8>, WindowError> {
        let pages = segment_pages(segment);
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        map(
            &self.fd,
            &pages,
            prot,
            MapFlags::SHARED | MapFlags::NORESERVE,
        )
    }

    /// Returns the library's own address of a page, the same for the life of the window.
    ///
    /// An access to a page that the window does not have makes one, of zeros: the room above sees to it that none is
    /// made that nobody counts.
    ///
    /// # Panics
    /// When [`Window::ensure`] did not cover the page: pages come from mappings, which are made after it.
    #[inline]
    #[must_use]
    pub fn alias(&self, page: u64) -> *mut u8 {
        let segment = segment_of(page);
        let base = self
            .alias
            .get(segment)
            .map_or(std::ptr::null_mut(), |base| base.load(Ordering::Acquire));
        assert!(!base.is_null(), "page {page} is not of this window");
        let at = (page - segment_pages(segment).start) * PAGE_SIZE;
        base.wrapping_add(at as usize)
    }

    /// Calls `visit` with the address and length of each contiguous part of a page range in the alias.
    fn alias_parts(&self, pages: Range<u64>, mut visit: impl FnMut(*mut u8, usize)) {
        let mut at = pages.start;
        while at < pages.end {
            let end = segment_pages(segment_of(at)).end.min(pages.end);
            visit(self.alias(at), ((end - at) * PAGE_SIZE) as usize);
            at = end;
        }
    }

    /// Takes memory for pages that the window does not have yet; what is there stays as it is.
    ///
    /// # Errors
    /// `ENOMEM`, where a plain access would be killed for it.
    pub fn populate(&self, pages: Range<u64>) -> Result<(), Errno> {
        let mut outcome = Ok(());
        self.alias_parts(pages, |addr, len| {
            if outcome.is_ok() {
                // SAFETY: a part of our own mapping; populating changes no contents.
                let done = unsafe { madvise(addr.cast(), len, Advice::LinuxPopulateWrite) };
                outcome = done.map_err(errno);
            }
        });
        outcome
    }

    /// Gives pages back to the system; they leave every user map at the same time, and the next access there faults.
    ///
    /// # Errors
    /// What fallocate(2) says; none is known to happen.
    pub fn punch(&self, pages: Range<u64>) -> Result<(), Errno> {
        if pages.is_empty() {
            return Ok(());
        }
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let (at, len) = (
            pages.start * PAGE_SIZE,
            (pages.end - pages.start) * PAGE_SIZE,
        );
        loop {
            match fallocate(&self.fd, flags, at, len) {
                Err(rustix::io::Errno::INTR) => {}
                outcome => return outcome.map_err(errno),
            }
        }
    }

    /// Takes pages out of the alias's page tables, so that they count once in the process's size. Addresses stay good.
    pub fn drop_alias(&self, pages: Range<u64>) {
        self.alias_parts(pages, |addr, len| {
            // SAFETY: a part of our own shared mapping: the pages stay in the memfd, the next access maps them again.
            let _ = unsafe { madvise(addr.cast(), len, Advice::LinuxDontNeed) };
        });
    }

    /// Maps `pages` for the program, whether or not the window has them.
    ///
    /// Until it is registered ([`crate::uffd::Uffd::register`]) an access reads zeros where the window has holes, and makes
    /// pages there.
    ///
    /// # Errors
    /// As [`Window::ensure`]; `EINVAL` for an empty range.
    pub fn user_map(
        self: &Arc<Self>,
        pages: Range<u64>,
        kind: UserMapKind,
    ) -> Result<UserMap, WindowError> {
        if pages.is_empty() {
            return Err(WindowError::System {
                call: "mmap",
                errno: Errno::EINVAL,
            });
        }
        self.ensure(pages.end)?;
        let (prot, flags) = match kind {
            UserMapKind::SharedRead => (ProtFlags::READ, MapFlags::SHARED),
            UserMapKind::SharedWrite => (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED),
            UserMapKind::Private => (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE),
        };
        let addr = map(&self.fd, &pages, prot, flags | MapFlags::NORESERVE)?;
        Ok(UserMap::new(addr, pages, kind, Arc::clone(self)))
    }

    /// Makes an empty list of transfer segments over this window's memory.
    #[must_use]
    pub fn segments(self: &Arc<Self>) -> Segments {
        Segments::new(Arc::clone(self) as Arc<dyn Any + Send + Sync>)
    }

    /// Appends bytes `at .. at + len` of a page to `segments`, which [`Window::segments`] of this window made.
    ///
    /// # Panics
    /// When the range leaves the page.
    pub fn push_page(&self, segments: &mut Segments, page: u64, at: usize, len: usize) {
        let addr = self.part(page, at, len);
        // SAFETY: inside a page of the mapping that `segments` keeps alive; windows are accessed by raw copies only.
        unsafe { segments.push_raw(addr, len) };
    }

    /// Returns the address of byte `at` of a page, of which `len` bytes are wanted.
    #[inline]
    fn part(&self, page: u64, at: usize, len: usize) -> *mut u8 {
        assert!(at <= PAGE && len <= PAGE - at, "{at}+{len} leaves the page");
        self.alias(page).wrapping_add(at)
    }

    /// Zeroes bytes `at .. at + len` of a page.
    ///
    /// # Panics
    /// When the range leaves the page.
    pub fn zero(&self, page: u64, at: usize, len: usize) {
        let addr = self.part(page, at, len);
        // SAFETY: inside a page of our mapping; windows are accessed by raw writes only.
        unsafe { std::ptr::write_bytes(addr, 0, len) };
    }

    /// Copies between a page's bytes `at .. at + len` and a user cursor, in the cursor's direction, without resolving
    /// faults.
    ///
    /// # Panics
    /// When the range leaves the page.
    #[inline]
    pub fn copy_page(
        &self,
        page: u64,
        at: usize,
        len: usize,
        cursor: &mut IovCursor<'_>,
    ) -> Progress<CopyStop> {
        let addr = self.part(page, at, len);
        // SAFETY: inside a page of our mapping, whose alias never needs us to be resolved; raw copies only.
        unsafe { cursor.copy_nofault(addr, len) }
    }

    /// Copies bytes of a page out.
    ///
    /// # Panics
    /// When the range leaves the page.
    pub fn read_page(&self, page: u64, at: usize, into: &mut [u8]) {
        let from = self.part(page, at, into.len());
        // SAFETY: inside a page of our mapping; `into` is exclusive and not part of it.
        unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) };
    }

    /// Copies bytes into a page.
    ///
    /// # Panics
    /// When the range leaves the page.
    pub fn write_page(&self, page: u64, at: usize, from: &[u8]) {
        let to = self.part(page, at, from.len());
        // SAFETY: inside a page of our mapping; `from` is not part of it.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) };
    }

    /// Copies whole pages of the library's own memory into adjacent pages: how they enter the window where no shared user
    /// map covers them. [`Window::populate`] the pages first; nobody writes to `from` meanwhile.
    pub fn fill(&self, page: u64, from: &IoSpan) {
        let pages = page..page + (from.len() / PAGE) as u64;
        let mut source = from.as_ptr().cast_const();
        self.alias_parts(pages, |addr, len| {
            // SAFETY: the span's Segments keep it mapped, the window its alias; they are different mappings.
            unsafe { std::ptr::copy_nonoverlapping(source, addr, len) };
            source = source.wrapping_add(len);
        });
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        for (segment, base) in self.alias.iter().enumerate() {
            let base = base.load(Ordering::Acquire);
            let pages = segment_pages(segment);
            if !base.is_null() {
                let len = ((pages.end - pages.start) * PAGE_SIZE) as usize;
                // SAFETY: mapped in `map_segment` with this length; user maps and Segments hold an Arc, so none is left.
                let _ = unsafe { munmap(base.cast(), len) };
            }
        }
    }
}

/// Maps pages of a memfd at an address of the kernel's choice, with what every mapping of a window needs.
fn map(
    fd: impl AsFd,
    pages: &Range<u64>,
    prot: ProtFlags,
    flags: MapFlags,
) -> Result<NonNull<u8>, WindowError> {
    let too_large = WindowError::TooLarge { pages: pages.end };
    let bytes = (pages.end - pages.start).checked_mul(PAGE_SIZE);
    let len = bytes
        .and_then(|bytes| usize::try_from(bytes).ok())
        .ok_or(too_large)?;
    let at = pages.start.checked_mul(PAGE_SIZE).ok_or(too_large)?;
    // SAFETY: a fresh mapping at an address of the kernel's choice replaces nothing.
    let addr =
        unsafe { mmap(std::ptr::null_mut(), len, prot, flags, fd, at) }.map_err(system("mmap"))?;
    // A child that inherited it would read zeros and store unseen: registrations are not inherited (fact 8).
    // SAFETY: advice on our own mapping.
    if let Err(refused) = unsafe { madvise(addr, len, Advice::LinuxDontFork) } {
        // SAFETY: mapped above with this length, known to nobody.
        let _ = unsafe { munmap(addr, len) };
        return Err(system("madvise(DONTFORK)")(refused));
    }
    // A huge page would bring 512 pages that nobody counts. Kernels without them refuse the advice.
    // SAFETY: advice on our own mapping.
    let _ = unsafe { madvise(addr, len, Advice::LinuxNoHugepage) };
    NonNull::new(addr.cast()).ok_or(too_large)
}

/// Returns the alias segment that shows `page`.
#[inline]
fn segment_of(page: u64) -> usize {
    // 0 for the first FIRST_SEGMENT pages, then one more for each doubling.
    (u64::BITS - (page / FIRST_SEGMENT).leading_zeros()) as usize
}

/// Returns the pages that a segment shows.
#[inline]
fn segment_pages(segment: usize) -> Range<u64> {
    match segment {
        0 => 0..FIRST_SEGMENT,
        _ => FIRST_SEGMENT << (segment - 1)..FIRST_SEGMENT << segment,
    }
}

fn errno(raw: rustix::io::Errno) -> Errno {
    Errno::from_raw(raw.raw_os_error())
}

fn system(call: &'static str) -> impl Fn(rustix::io::Errno) -> WindowError {
    move |raw| {
        let errno = errno(raw);
        // Of all that may be short the one that an administrator can raise, if he is told.
        let reached = (errno == Errno::ENOMEM).then(map_count_reached).flatten();
        reached.map_or(WindowError::System { call, errno }, |limit| {
            WindowError::MapCount { limit }
        })
    }
}
