//! Files mapped into memory: SEMANTICS.md section F, seen from the program.
//!
//! *Owns*: the public [`Mapping`], what may be mapped, and the answers that calls give where a plain access gets SIGBUS.
//!
//! *Does not own*: faults and page tables (`pinfold-fault`), pages (`pinfold-cache`).
//!
//! *Locking*: none of its own; pages are brought in with nothing held.

use std::any::Any;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use pinfold_base::{Errno, PAGE_SIZE, Progress};
use pinfold_cache::{Harvest, MapOutcome, PagePin, PinKind};
use pinfold_fault::{MapRequest, Placed};
use pinfold_lock::{Kept, Mode};
use pinfold_mem::{self as mem, CopyStop, Delivery, Expecting, Quiet, UserMapKind};
use pinfold_store::{Seek, SyncScope};

pub use pinfold_fault::Advice;

use crate::error::{Error, ErrorKind, Result};
use crate::file::{Access, File};
use crate::inode::Inode;

const PAGE: usize = PAGE_SIZE as usize;
/// Times a page is brought in for one copy before it is given up: others drop it as fast.
const BRING_IN_MAX: u32 = 64;
/// At most this share of the budget is pinned by [`Mapping::pin`].
const PINNED_SHARE: u64 = 4;

/// What a mapping is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MapAccess {
    /// Loads (`MAP_SHARED`, `PROT_READ`).
    #[default]
    Read,
    /// Loads and stores that change the file (`MAP_SHARED`, `PROT_READ | PROT_WRITE`).
    Write,
    /// Loads, and stores that stay with the mapping (`MAP_PRIVATE`, `PROT_READ | PROT_WRITE`).
    Private,
}

/// How the library learns of the first store to a mapped page that was clean.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Tracking {
    /// [`Tracking::Async`] where the kernel can, and where the store has room for every byte of the range already and the
    /// range ends with the file, so that nobody need know before write-back; otherwise [`Tracking::Sync`].
    #[default]
    Auto,
    /// By a fault. Room for the page is had from the store first, the storing thread is slowed down while too much is
    /// dirty, and the file's time moves at once.
    Sync,
    /// By looking: the kernel lets the store pass and remembers it. Cheaper by a fault for each page that is stored to, again
    /// after each write-back. What a store does to the file's time, and to what counts as dirty, comes when somebody
    /// looks: every sync and write-back, background write-back about once a second, eviction, unmapping. A
    /// store to a hole for which the store has no room is an error of the next sync.
    ///
    /// Mapping so fails with `EOPNOTSUPP` (before Linux 6.7, and in a volume with glocks) or the error of opening /proc/self/pagemap where the kernel cannot.
    Async,
}

/// How a file is mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub struct MapOptions {
    access: MapAccess,
    delivery: Delivery,
    tracking: Tracking,
    advice: Advice,
}

impl Default for MapOptions {
    fn default() -> Self {
        Self {
            access: MapAccess::Read,
            delivery: Delivery::Handler,
            tracking: Tracking::Auto,
            advice: Advice::Normal,
        }
    }
}

impl MapOptions {
    /// Describes a mapping for loads whose faults are served by another thread.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets what the mapping is for.
    pub fn access(mut self, access: MapAccess) -> Self {
        self.access = access;
        self
    }

    /// Sets how faults are served.
    ///
    /// [`Delivery::Handler`], the default: by another thread. System calls on mapped memory work, where the process may open
    /// a full userfaultfd ([`Volume::capabilities`](crate::Volume::capabilities) tells).
    ///
    /// [`Delivery::Inline`]: by the faulting thread itself, in a SIGBUS handler; several times cheaper. System calls on
    /// memory that is not resident fail with `EFAULT`: [`Mapping::pin`] it first. A thread that blocks SIGBUS is killed at
    /// its first fault.
    pub fn delivery(mut self, delivery: Delivery) -> Self {
        self.delivery = delivery;
        self
    }

    /// Sets how the library learns of the first store to a page of a [`MapAccess::Write`] mapping.
    pub fn tracking(mut self, tracking: Tracking) -> Self {
        self.tracking = tracking;
        self
    }

    /// Sets what the program is about to do, as [`Mapping::advise`] does for the whole of it.
    pub fn advice(mut self, advice: Advice) -> Self {
        self.advice = advice;
        self
    }
}

/// A part of a file in the program's memory.
///
/// The addresses show the file's bytes as reads and writes of it do, within the volume's memory budget: pages come when they
/// are touched and go when others need the memory. A store reaches the file as a write does. An access beyond the page that
/// holds the file's end, or to a page that the store does not give, is SIGBUS, as with mmap(2); the methods here give
/// an error instead.
///
/// # Aliasing
/// The bytes change under the program whenever somebody writes to the file, through whatever door, and every access may
/// fault. So none of this hands out a reference: use the pointer with volatile or atomic accesses, or [`Mapping::read`] and
/// [`Mapping::write`]. Whoever knows that nobody writes may vouch for it with `slice::from_raw_parts`.
///
/// Any part may be a buffer of any call of this library, on the same file too. Keep it alive while such a call runs.
///
/// The mapping keeps the file's data and the volume alive: files may be dropped before it, and the volume's end waits for it.
/// A child after fork(2) does not have it.
pub struct Mapping {
    // Dropped in this order: the addresses, the file they show, the volume.
    placed: Placed,
    options: MapOptions,
    file: File,
    range: Range<u64>,
    _volume: Option<Arc<dyn Any + Send + Sync>>,
}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mapping")
            .field("addr", &self.as_ptr())
            .field("range", &self.range)
            .finish_non_exhaustive()
    }
}

impl File {
    /// Maps bytes of the file into memory.
    ///
    /// `range.start` must be a multiple of the page size; the mapping is extended to whole pages. It may reach beyond the
    /// end of the file: accesses there are SIGBUS until the file has grown.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let scratch = tempfile::tempdir()?;
    /// # let volume = pinfold::Volume::builder().memory(16 << 20).open_dir(scratch.path())?;
    /// use pinfold::{MapAccess, MapOptions, OpenOptions};
    ///
    /// let options = OpenOptions::new().read(true).write(true).create(true);
    /// let file = volume.open("table", &options)?;
    /// file.set_len(1 << 20)?;
    /// let map = file.map(0..1 << 20, &MapOptions::new().access(MapAccess::Write))?;
    /// map.write(4096, b"stored")?;
    /// map.flush(0..map.len())?;
    /// let mut back = [0; 6];
    /// file.read_at(&mut back, 4096)?;
    /// assert_eq!(&back, b"stored");
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// `EACCES` if the file is not open for reading, or for a mapping to write to, not for reading and writing; `EINVAL` for an
    /// empty range or one that begins inside a page; `EOVERFLOW` for a range no file reaches; `EPERM` where no userfaultfd
    /// is to be had; `ENOMEM` for too many mappings or too little address space.
    pub fn map(&self, range: Range<u64>, options: &MapOptions) -> Result<Mapping> {
        const OPERATION: &str = "map";
        // Until the mapping is in the table. From its return on handlers know its address, so no call may be under way that
        // one of them could interrupt.
        let _expecting = Expecting::a_mapping();
        let _quiet = self.enter(OPERATION)?;
        let told = |error: Error| error.at_range(range.clone()).at_path_of(self);
        let refuse = |errno| told(Error::invalid(OPERATION, errno));
        if range.is_empty() || !range.start.is_multiple_of(PAGE_SIZE) {
            return Err(refuse(Errno::EINVAL));
        }
        let access = self.access();
        let granted = match options.access {
            MapAccess::Read | MapAccess::Private => access.read,
            MapAccess::Write => access.read && access.write,
        };
        if !granted || !self.inode().object().readable() {
            return Err(refuse(Errno::EACCES));
        }
        if range.end > pinfold_base::units::FILE_SIZE_MAX {
            return Err(refuse(Errno::EOVERFLOW));
        }
        // An open file of its own: the mapping outlives this one, and hears of write-back errors by itself.
        let plain = Access {
            read: true,
            write: options.access == MapAccess::Write,
            ..Access::default()
        };
        let file = self.node().reopen(plain).map_err(told)?;
        if let Some(path) = self.path() {
            file.set_path(path);
        }
        let pages = range.start / PAGE_SIZE..range.end.div_ceil(PAGE_SIZE);
        let inode = Arc::clone(file.inode());
        let window = inode
            .pages()
            .open_window(pages.end, Arc::clone(inode.mappings()) as _)
            .map_err(|error| told(Error::cache(OPERATION, error)))?;
        let request = MapRequest {
            window,
            pages,
            kind: match options.access {
                MapAccess::Read => UserMapKind::SharedRead,
                MapAccess::Write => UserMapKind::SharedWrite,
                MapAccess::Private => UserMapKind::Private,
            },
            delivery: options.delivery,
            tracked: inode.tracks(options, &range).map_err(told)?,
            files: inode.mappings(),
        };
        let placed = inode
            .engine()
            .faults()
            .map(&request, Arc::clone(&inode) as _)
            .map_err(|error| told(Error::setup(OPERATION, error)))?;
        placed.set_pattern(options.advice);
        let mapping = Mapping {
            placed,
            options: *options,
            range: range.clone(),
            _volume: inode.engine().volume(),
            file,
        };
        if options.advice == Advice::WillNeed {
            mapping.advise(Advice::WillNeed, 0..mapping.len())?;
        }
        Ok(mapping)
    }
}

impl Inode {
    /// Decides whether a mapping's stores are found by looking for them.
    fn tracks(&self, options: &MapOptions, range: &Range<u64>) -> Result<bool> {
        let possible = || self.engine().faults().can_track(options.delivery);
        match options.tracking {
            _ if options.access != MapAccess::Write => Ok(false),
            Tracking::Sync => Ok(false),
            // Nobody would be asked for the right to a first store.
            Tracking::Auto if self.shared().is_some() => Ok(false),
            Tracking::Async if self.shared().is_some() => {
                Err(Error::invalid("map", Errno::EOPNOTSUPP))
            }
            Tracking::Async => possible()
                .map(|()| true)
                .map_err(|error| Error::setup("map", error)),
            Tracking::Auto => Ok(self.has_room_for(range) && possible().is_ok()),
        }
    }

    /// Tells whether the store has room for all of a range, which ends with the file at most.
    fn has_room_for(&self, range: &Range<u64>) -> bool {
        let hole = self.object().seek(Seek::Hole, range.start);
        range.end <= self.len() && hole.is_ok_and(|hole| hole.is_some_and(|at| at >= range.end))
    }
}

impl Mapping {
    /// Returns the address of the first byte.
    #[must_use]
    pub fn as_ptr(&self) -> *const u8 {
        self.placed.map().as_ptr()
    }

    /// Returns the address of the first byte, for stores. In a mapping for reading a store is SIGSEGV.
    #[must_use]
    pub fn as_mut_ptr(&self) -> *mut u8 {
        self.placed.map().as_ptr()
    }

    /// Returns the file, as the mapping has it open: for reading, and for writing if the mapping is for that.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Returns the length in bytes, as it was asked for.
    #[must_use]
    pub fn len(&self) -> usize {
        // It was mapped, so it fits.
        (self.range.end - self.range.start) as usize
    }

    /// Tells whether the mapping is empty; it never is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Returns which bytes of the file it shows.
    #[must_use]
    pub fn file_range(&self) -> Range<u64> {
        self.range.clone()
    }

    /// Tells how first stores are learnt of: [`Tracking::Sync`] or [`Tracking::Async`].
    #[must_use]
    pub fn tracking(&self) -> Tracking {
        if self.placed.is_tracked() {
            Tracking::Async
        } else {
            Tracking::Sync
        }
    }

    /// Tells how faults are served.
    #[must_use]
    pub fn delivery(&self) -> Delivery {
        self.placed.channel().delivery()
    }

    /// Copies bytes from `at` on; returns how many, fewer only at the end of the mapping or of the file.
    ///
    /// # Errors
    /// What a load would get SIGBUS for: the store's error, no frame; `EINVAL` beyond the mapping, `ENOMEM` where it was
    /// unmapped. Bytes before the failing one win over the error.
    pub fn read(&self, at: usize, buf: &mut [u8]) -> Result<usize> {
        let map = self.placed.map();
        self.copy(
            "read mapped bytes of",
            at,
            buf.len(),
            mem::Access::Read,
            |bytes| map.load(at + bytes.start, &mut buf[bytes]),
        )
    }

    /// Stores bytes from `at` on; returns how many, fewer only at the end of the mapping or of the file, which does not
    /// grow by it.
    ///
    /// # Errors
    /// As [`Mapping::read`]; `ENOSPC` and the like where a store would get SIGBUS; `EACCES` in a mapping for reading.
    pub fn write(&self, at: usize, buf: &[u8]) -> Result<usize> {
        const OPERATION: &str = "store to mapped bytes of";
        if self.placed.map().kind() == UserMapKind::SharedRead {
            return Err(self.refuse(OPERATION, Errno::EACCES, at..at.saturating_add(buf.len())));
        }
        let map = self.placed.map();
        self.copy(OPERATION, at, buf.len(), mem::Access::Write, |bytes| {
            map.store(at + bytes.start, &buf[bytes])
        })
    }

    /// Has `step` copy `len` bytes at `at`, as far as they are there, and brings in what is not.
    fn copy(
        &self,
        operation: &'static str,
        at: usize,
        len: usize,
        access: mem::Access,
        mut step: impl FnMut(Range<usize>) -> Progress<CopyStop>,
    ) -> Result<usize> {
        let _quiet = self.file.enter(operation)?;
        self.file.inode().check_lease(operation)?;
        let whole = at..at.saturating_add(len).min(self.len().max(at));
        let bytes = self.part(operation, &whole)?;
        let (mut done, mut tries) = (0, 0);
        let stop = loop {
            let pos = bytes.start + done as u64;
            let end = bytes.end.min(self.file.len());
            if pos >= end {
                break None;
            }
            // At most `len`.
            let copied = step(done..done + (end - pos) as usize);
            done += copied.done as usize;
            if copied.stop.is_none() {
                continue;
            }
            tries = if copied.done > 0 { 0 } else { tries + 1 };
            let page = (bytes.start + done as u64) / PAGE_SIZE;
            match self.placed.bring_in(page, access) {
                Ok(MapOutcome::BeyondEnd) => break None,
                Ok(MapOutcome::Mapped) if tries < BRING_IN_MAX => {}
                Ok(MapOutcome::Mapped) => break Some(Error::new(operation, ErrorKind::NoFrames)),
                Err(error) => break Some(Error::cache(operation, error)),
            }
        };
        match stop {
            Some(error) if done == 0 => Err(error.at_range(bytes).at_path_of(&self.file)),
            _ => Ok(done),
        }
    }

    /// Makes stores to a range durable, as msync(2) with `MS_SYNC`.
    ///
    /// # Errors
    /// The error of a write-back since the last report through this mapping, or of this one; `EINVAL`, `ENOMEM` as
    /// [`Mapping::read`].
    pub fn flush(&self, range: Range<usize>) -> Result<()> {
        const OPERATION: &str = "sync mapped bytes of";
        let _quiet = self.file.enter(OPERATION)?;
        let bytes = self.part(OPERATION, &range)?;
        self.file.sync_range(bytes, SyncScope::Data)
    }

    /// Starts nothing, as msync(2) with `MS_ASYNC`: what was stored is dirty already and is written back in its time.
    ///
    /// # Errors
    /// `EINVAL`, `ENOMEM` as [`Mapping::read`].
    pub fn flush_async(&self, range: Range<usize>) -> Result<()> {
        self.part("sync mapped bytes of", &range).map(drop)
    }

    /// Tells what the program is about to do with a range. [`Advice::Normal`], [`Advice::Random`] and
    /// [`Advice::Sequential`] concern the whole mapping.
    ///
    /// # Errors
    /// `EINVAL`, `ENOMEM` as [`Mapping::read`].
    pub fn advise(&self, advice: Advice, range: Range<usize>) -> Result<()> {
        const OPERATION: &str = "advise on mapped bytes of";
        let _quiet = self.file.enter(OPERATION)?;
        let bytes = self.part(OPERATION, &range)?;
        let pages = bytes.start / PAGE_SIZE..bytes.end.div_ceil(PAGE_SIZE);
        match advice {
            Advice::Normal | Advice::Random | Advice::Sequential => self.placed.set_pattern(advice),
            Advice::WillNeed | Advice::DontNeed if bytes.is_empty() => {}
            Advice::WillNeed => {
                let _held = self.file.inode().hold(OPERATION, Mode::Shared)?;
                self.placed.pages().will_need(pages);
            }
            // Who drops an entry drops what the kernel remembers of stores through it: they are found on the way.
            Advice::DontNeed if self.placed.is_tracked() => {
                self.placed.pages().harvest(pages, Harvest::Withdraw);
            }
            Advice::DontNeed => self
                .placed
                .drop_entries(pages)
                .map_err(|errno| self.refuse(OPERATION, errno, range))?,
        }
        Ok(())
    }

    /// Tells for each page of a range whether it is in memory: an access to it waits for no store.
    ///
    /// # Errors
    /// `EINVAL`, `ENOMEM` as [`Mapping::read`].
    pub fn resident(&self, range: Range<usize>) -> Result<Vec<bool>> {
        const OPERATION: &str = "look at mapped bytes of";
        let _quiet = self.file.enter(OPERATION)?;
        let bytes = self.part(OPERATION, &range)?;
        let pages = bytes.start / PAGE_SIZE..bytes.end.div_ceil(PAGE_SIZE);
        Ok(self.placed.pages().resident_map(pages))
    }

    /// Makes a range safe for any access, by system calls and devices too, until the result is dropped: its pages are in
    /// memory, mapped, and stay so. With `write` they may be stored to.
    ///
    /// Cutting the file there, punching or moving those bytes waits until the result is dropped, with nothing held, so that all
    /// else goes on; for some seconds, and not at all in the thread that called this: then it is `EBUSY`, and nothing has
    /// changed. Direct writes over them go through the cache meanwhile.
    ///
    /// In a volume with glocks the node keeps the file's meanwhile: in a mapping that may be stored to EX, so other nodes
    /// wait with whatever they want of the file; otherwise SH, so they may read, and what would change the file on this
    /// node is refused (`EBUSY`).
    ///
    /// # Errors
    /// What an access would get SIGBUS for; `EFAULT` beyond the end of the file; `ENOMEM` when a quarter of the budget is
    /// pinned already; `EACCES` for `write` in a mapping for reading; `EOPNOTSUPP` for `write` in a private one, whose
    /// copies never leave memory anyhow.
    pub fn pin(&self, range: Range<usize>, write: bool) -> Result<Pinned<'_>> {
        const OPERATION: &str = "pin mapped bytes of";
        let _quiet = self.file.enter(OPERATION)?;
        let bytes = self.part(OPERATION, &range)?;
        let kind = self.placed.map().kind();
        if write && kind != UserMapKind::SharedWrite {
            let errno = match kind {
                UserMapKind::Private => Errno::EOPNOTSUPP,
                UserMapKind::SharedRead | UserMapKind::SharedWrite => Errno::EACCES,
            };
            return Err(self.refuse(OPERATION, errno, range));
        }
        let pages = bytes.start / PAGE_SIZE..bytes.end.div_ceil(PAGE_SIZE);
        let mut pinned = Pinned::promise(self, pages.end - pages.start)
            .map_err(|errno| self.refuse(OPERATION, errno, range.clone()))?;
        let right = match kind {
            UserMapKind::SharedWrite => Mode::Exclusive,
            UserMapKind::SharedRead | UserMapKind::Private => Mode::Shared,
        };
        pinned._kept = self.file.inode().keep(OPERATION, right)?;
        for page in pages {
            self.pin_page(&mut pinned, page, write)
                .map_err(|error| error.at_range(bytes.clone()).at_path_of(&self.file))?;
        }
        Ok(pinned)
    }

    fn pin_page(&self, pinned: &mut Pinned<'_>, page: u64, write: bool) -> Result<()> {
        const OPERATION: &str = "pin mapped bytes of";
        let (access, kind) = if write {
            (mem::Access::Write, PinKind::Write)
        } else {
            (mem::Access::Read, PinKind::Read)
        };
        let told = |error| Error::cache(OPERATION, error);
        let beyond = || Error::new(OPERATION, ErrorKind::BadBuffer);
        let (pages, window) = (self.placed.pages(), self.placed.map().window());
        for _ in 0..BRING_IN_MAX {
            if self.placed.bring_in(page, access).map_err(told)? == MapOutcome::BeyondEnd {
                return Err(beyond());
            }
            let Some(pin) = pages.pin(page, kind).map_err(told)? else {
                return Err(beyond());
            };
            // Evicted and read again between the two, it is where a pin would keep it from being mapped.
            if pin.addr() != window.alias(page) {
                continue;
            }
            pinned.pins.push(pin);
            // Its entry may have gone as well; from here on it stays.
            return match self.placed.bring_in(page, access).map_err(told)? {
                MapOutcome::Mapped => Ok(()),
                MapOutcome::BeyondEnd => Err(beyond()),
            };
        }
        Err(Error::new(OPERATION, ErrorKind::NoFrames))
    }

    /// Unmaps a part: `range.start` must be a multiple of the page size, and so must the end, unless it is the mapping's.
    /// The program has seen to it that nobody uses the addresses any more.
    ///
    /// # Errors
    /// `EINVAL` for such a range; `ENOMEM` when the rest becomes two mappings and there are too many.
    pub fn unmap(&mut self, range: Range<usize>) -> Result<()> {
        const OPERATION: &str = "unmap bytes of";
        let _quiet = self.file.enter(OPERATION)?;
        let whole = range.start.is_multiple_of(PAGE)
            && (range.end.is_multiple_of(PAGE) || range.end == self.len());
        if !whole || range.is_empty() || range.end > self.len() {
            return Err(self.refuse(OPERATION, Errno::EINVAL, range));
        }
        let first = self.range.start / PAGE_SIZE;
        let pages = first + (range.start / PAGE) as u64..first + range.end.div_ceil(PAGE) as u64;
        self.placed
            .unmap(&pages)
            .map_err(|error| self.told(Error::setup(OPERATION, error), range))
    }

    /// Makes the mapping `len` bytes long, as mremap(2): its beginning stays the same byte of the file. Shorter, it stays
    /// where it is; longer, it stays if nothing lies behind it, and moves elsewhere otherwise if it `may_move`. The file keeps
    /// its size.
    ///
    /// Private copies move along. After a move the old addresses are nobody's: a pointer got before is dead, and accesses by
    /// it end the program or reach what came to lie there. Threads that store meanwhile lose no store that went through. A
    /// mapping with [`Tracking::Auto`] whose new part is not in the store yet is tracked by faults from then on, and has to
    /// move for that.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let scratch = tempfile::tempdir()?;
    /// # let volume = pinfold::Volume::builder().memory(16 << 20).open_dir(scratch.path())?;
    /// # use pinfold::{MapAccess, MapOptions, OpenOptions};
    /// # let file = volume.open("log", &OpenOptions::new().read(true).write(true).create(true))?;
    /// # file.set_len(4096)?;
    /// let mut map = file.map(0..4096, &MapOptions::new().access(MapAccess::Write))?;
    /// file.set_len(1 << 20)?;
    /// map.remap(1 << 20, true)?;
    /// map.write(70_000, b"new")?;
    /// assert_eq!(map.len(), 1 << 20);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// `EINVAL` for no bytes; `EFAULT` to make it longer after a part of it was unmapped; `ENOMEM`: it cannot stay and may not
    /// move, or there are too many mappings or too little address space; `EOVERFLOW` for a range no file reaches. The
    /// mapping is as it was then.
    pub fn remap(&mut self, len: usize, may_move: bool) -> Result<()> {
        const OPERATION: &str = "remap bytes of";
        let _quiet = self.file.enter(OPERATION)?;
        let asked = 0..len;
        let end = self.range.start.checked_add(len as u64);
        let Some(end) = end.filter(|&end| end <= pinfold_base::units::FILE_SIZE_MAX) else {
            return Err(self.refuse(OPERATION, Errno::EOVERFLOW, asked));
        };
        if len == 0 {
            return Err(self.refuse(OPERATION, Errno::EINVAL, asked));
        }
        let pages = |end: u64| end.div_ceil(PAGE_SIZE);
        let (now, then) = (pages(self.range.end), pages(end));
        if then != now {
            let range = self.range.start..end;
            let tracked = self.placed.is_tracked()
                && (self.options.tracking == Tracking::Async
                    || then < now
                    || self.file.inode().has_room_for(&range));
            self.placed
                .remap(now, then, tracked, may_move)
                .map_err(|error| self.told(Error::setup(OPERATION, error), asked))?;
        }
        self.range.end = end;
        Ok(())
    }

    /// Translates a range of the mapping to the file's bytes, if it is all mapped.
    fn part(&self, operation: &'static str, range: &Range<usize>) -> Result<Range<u64>> {
        if range.start > range.end || range.end > self.len() {
            return Err(self.refuse(operation, Errno::EINVAL, range.clone()));
        }
        let bytes = self.range.start + range.start as u64..self.range.start + range.end as u64;
        let pages = bytes.start / PAGE_SIZE..bytes.end.div_ceil(PAGE_SIZE);
        if !bytes.is_empty() && !self.placed.holds(&pages) {
            return Err(self.refuse(operation, Errno::ENOMEM, range.clone()));
        }
        Ok(bytes)
    }

    fn refuse(&self, operation: &'static str, errno: Errno, range: Range<usize>) -> Error {
        self.told(Error::invalid(operation, errno), range)
    }

    fn told(&self, error: Error, range: Range<usize>) -> Error {
        let start = self.range.start;
        error
            .at_range(
                start.saturating_add(range.start as u64)..start.saturating_add(range.end as u64),
            )
            .at_path_of(&self.file)
    }
}

/// Mapped bytes that stay in memory while this exists.
pub struct Pinned<'a> {
    mapping: &'a Mapping,
    // Dropped in this order: with the pages pinned, the glock stays.
    pins: Vec<PagePin>,
    promised: u64,
    _kept: Option<Kept<'a>>,
}

impl fmt::Debug for Pinned<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pinned({} pages)", self.pins.len())
    }
}

impl<'a> Pinned<'a> {
    /// Makes room for so many pins in the volume's account.
    fn promise(mapping: &'a Mapping, pages: u64) -> std::result::Result<Self, Errno> {
        let engine = mapping.file.inode().engine();
        let limit = engine.cache.pages_max() as u64 / PINNED_SHARE;
        engine
            .pinned_pages
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |pinned| {
                pinned.checked_add(pages).filter(|&sum| sum <= limit)
            })
            .map_err(|_| Errno::ENOMEM)?;
        Ok(Self {
            mapping,
            pins: Vec::new(),
            promised: pages,
            _kept: None,
        })
    }

    /// Returns how many pages are pinned.
    #[must_use]
    pub fn pages(&self) -> usize {
        self.pins.len()
    }
}

impl Drop for Pinned<'_> {
    fn drop(&mut self) {
        let _quiet = Quiet::enter();
        self.pins.clear();
        let engine = self.mapping.file.inode().engine();
        engine
            .pinned_pages
            .fetch_sub(self.promised, Ordering::Relaxed);
    }
}
