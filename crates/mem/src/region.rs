//! User memory with holes, for tests and scenarios: the buffers that a careful program never passes.
//!
//! *Owns*: [`Region`] (mapped pages whose protection changes at will), [`UserIov`] (lists of its parts, wild addresses
//! among them), the vectored system calls on such lists ([`read()`], [`write()`]), mapped files as buffers and as memory
//! that is [touched](touch) ([`view`]), [transfers](transfer) that run by themselves, and the [signals](signal) that
//! disturb a thread or count what the kernel sent it.
//!
//! *Does not own*: files; what a scenario makes of the results.
//!
//! *Locking*: none. Bytes are moved by [`copy_nofault`], so a page that somebody protects meanwhile is an error of
//! the copy and never a crash.

pub mod signal;
pub mod touch;
pub mod transfer;
pub mod view;

use std::marker::PhantomData;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;

use pinfold_base::Errno;
use rustix::io::ReadWriteFlags;
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect, munmap};
use smallvec::SmallVec;

use crate::copy::copy_nofault;
use crate::iov::{Direction, IovCursor};
use crate::span::RawSpan;
use crate::uffd::{Delivery, Privilege, Uffd};

/// What may be done with a page of a [`Region`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protection {
    /// Nothing: every access is a fault that nobody can resolve.
    None,
    /// Loads.
    Read,
    /// Loads and stores.
    ReadWrite,
}

/// Anonymous pages, readable and writable until protected otherwise.
///
/// Nobody ever holds a reference into them, so they may be handed to any call, from any thread, at any time.
#[derive(Debug)]
pub struct Region {
    addr: NonNull<u8>,
    len: usize,
}

// SAFETY: the region owns its mapping; every access is a raw copy by `copy_nofault` or by the kernel.
unsafe impl Send for Region {}
// SAFETY: as for Send; shared access performs raw copies only.
unsafe impl Sync for Region {}

impl Region {
    /// Size of its pages, in bytes.
    pub const PAGE: usize = 4096;

    /// Maps `count` zeroed pages (at least one).
    ///
    /// # Errors
    /// `ENOMEM`.
    pub fn pages(count: usize) -> Result<Self, Errno> {
        let len = count.max(1).saturating_mul(Self::PAGE);
        // SAFETY: an anonymous mapping at an address of the kernel's choice replaces nothing.
        let mapped = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        };
        let addr = mapped.map_err(errno)?.cast::<u8>();
        // The addresses travel as numbers, to system calls and in `RawSpan`.
        let _ = addr.expose_provenance();
        let addr = NonNull::new(addr).ok_or(Errno::ENOMEM)?;
        Ok(Self { addr, len })
    }

    /// Returns the size in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Tells whether it is empty; it never is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Changes what may be done with the pages that hold bytes `range`.
    ///
    /// # Errors
    /// `EINVAL` for a range that leaves the region; whatever mprotect(2) says.
    pub fn protect(&self, range: Range<usize>, protection: Protection) -> Result<(), Errno> {
        let first = range.start / Self::PAGE * Self::PAGE;
        let end = range.end.next_multiple_of(Self::PAGE);
        let (start, len) = self.part(first..end)?;
        let flags = match protection {
            Protection::None => MprotectFlags::empty(),
            Protection::Read => MprotectFlags::READ,
            Protection::ReadWrite => MprotectFlags::READ | MprotectFlags::WRITE,
        };
        // SAFETY: pages of this mapping only (`part`), into which no reference exists.
        unsafe { mprotect(start.cast(), len, flags) }.map_err(errno)
    }

    /// Gives the pages that hold bytes `range` back: they read as zeros and fault in anew when next touched.
    ///
    /// # Errors
    /// `EINVAL` for a range that leaves the region; whatever madvise(2) says.
    pub fn discard(&self, range: Range<usize>) -> Result<(), Errno> {
        let first = range.start / Self::PAGE * Self::PAGE;
        let (start, len) = self.part(first..range.end.next_multiple_of(Self::PAGE))?;
        // SAFETY: pages of this mapping only (`part`), into which no reference exists.
        unsafe { rustix::mm::madvise(start.cast(), len, rustix::mm::Advice::LinuxDontNeed) }
            .map_err(errno)
    }

    /// Poisons the pages that hold bytes `range`: what was in them is gone, and every access is told that the memory has failed,
    /// a load or store by SIGBUS and a system call by `EFAULT`, until the pages are [discarded](Region::discard). The poison is
    /// put by a userfaultfd that is nobody's afterwards, so it looks like any other program's.
    ///
    /// # Errors
    /// `EINVAL` for a range that leaves the region; `EOPNOTSUPP` before Linux 6.6; what refuses a userfaultfd.
    pub fn poison(&self, range: Range<usize>) -> Result<(), Errno> {
        let first = range.start / Self::PAGE * Self::PAGE;
        let pages = first..range.end.next_multiple_of(Self::PAGE);
        let (start, len) = self.part(pages.clone())?;
        let open = Uffd::open(Delivery::Inline, Privilege::ANY, false);
        let uffd = open.map_err(|error| error.errno())?;
        uffd.register_missing(start.addr(), len)?;
        // Only what is not there can be poisoned.
        self.discard(pages)?;
        uffd.poison(start.addr(), len)
    }

    /// Stores `bytes` from byte `at` on.
    ///
    /// # Errors
    /// `EINVAL` for a range that leaves the region, `EFAULT` where it may not be stored to.
    pub fn put(&self, at: usize, bytes: &[u8]) -> Result<(), Errno> {
        let (to, len) = self.part(at..at.saturating_add(bytes.len()))?;
        // SAFETY: `to` is this region's memory, into which no reference exists; `bytes` is borrowed.
        let copied = unsafe { copy_nofault(to, bytes.as_ptr(), len) };
        copied.stop.map_or(Ok(()), |_| Err(Errno::EFAULT))
    }

    /// Loads bytes from byte `at` on.
    ///
    /// # Errors
    /// `EINVAL` for a range that leaves the region, `EFAULT` where it may not be loaded from.
    pub fn get(&self, at: usize, into: &mut [u8]) -> Result<(), Errno> {
        let (from, len) = self.part(at..at.saturating_add(into.len()))?;
        // SAFETY: `from` is this region's memory, which nobody references; `into` is exclusive.
        let copied = unsafe { copy_nofault(into.as_mut_ptr(), from, len) };
        copied.stop.map_or(Ok(()), |_| Err(Errno::EFAULT))
    }

    /// Loads bytes `range`.
    ///
    /// # Errors
    /// As [`Region::get`].
    pub fn to_vec(&self, range: Range<usize>) -> Result<Vec<u8>, Errno> {
        let mut bytes = vec![0; range.len()];
        self.get(range.start, &mut bytes)?;
        Ok(bytes)
    }

    /// Stores `byte` all over bytes `range`.
    ///
    /// # Errors
    /// As [`Region::put`].
    pub fn fill(&self, range: Range<usize>, byte: u8) -> Result<(), Errno> {
        let pattern = [byte; Self::PAGE];
        let mut at = range.start;
        while at < range.end {
            let n = (range.end - at).min(Self::PAGE);
            self.put(at, &pattern[..n])?;
            at += n;
        }
        Ok(())
    }

    /// Returns bytes `range` as a list of one span.
    ///
    /// # Panics
    /// When the range leaves the region.
    #[must_use]
    pub fn iov(&self, range: Range<usize>) -> UserIov<'_> {
        UserIov::new().and(self, range)
    }

    /// Checks a range and returns its address and length.
    fn part(&self, range: Range<usize>) -> Result<(*mut u8, usize), Errno> {
        if range.start > range.end || range.end > self.len {
            return Err(Errno::EINVAL);
        }
        Ok((self.addr.as_ptr().wrapping_add(range.start), range.len()))
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: mapped in `pages`; a `UserIov` borrows the region, so none can name it any more.
        let unmapped = unsafe { munmap(self.addr.as_ptr().cast(), self.len) };
        debug_assert!(unmapped.is_ok(), "munmap of a region: {unmapped:?}");
    }
}

/// A list of buffers as a program passes it: parts of regions in any order, good and bad, overlapping or empty.
#[derive(Debug, Clone, Default)]
pub struct UserIov<'r> {
    spans: SmallVec<[RawSpan; 4]>,
    regions: PhantomData<&'r ()>,
}

impl<'r> UserIov<'r> {
    /// Makes an empty list.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends bytes `range` of a region.
    ///
    /// # Panics
    /// When the range leaves the region: the buffer would be somebody else's.
    #[must_use]
    pub fn and(mut self, region: &'r Region, range: Range<usize>) -> Self {
        let (start, len) = region
            .part(range)
            .expect("a buffer is made of a region's own bytes");
        self.spans.push(RawSpan {
            addr: start.addr(),
            len,
        });
        self
    }

    /// Appends an empty buffer at any address, mapped or not: nothing may be touched there.
    #[must_use]
    pub fn and_empty_at(mut self, addr: usize) -> Self {
        self.spans.push(RawSpan { addr, len: 0 });
        self
    }

    /// Appends `len` bytes (at most one page less one) near address zero, where nothing is ever mapped.
    #[must_use]
    pub fn and_nowhere(mut self, len: usize) -> Self {
        self.spans.push(RawSpan {
            addr: 1,
            len: len.min(Region::PAGE - 1),
        });
        self
    }

    /// Returns bytes `range` of the list as a list of their own, clipped to what there is.
    #[must_use]
    pub fn part(&self, range: Range<usize>) -> Self {
        let mut part = Self::new();
        let mut at = 0usize;
        for span in &self.spans {
            let start = range.start.clamp(at, at + span.len);
            let end = range.end.clamp(at, at + span.len);
            if start < end {
                part.spans.push(RawSpan {
                    addr: span.addr + (start - at),
                    len: end - start,
                });
            }
            at += span.len;
        }
        part
    }

    /// Returns the sum of the lengths, in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.spans
            .iter()
            .fold(0, |sum, span| sum.saturating_add(span.len))
    }

    /// Returns the spans, first to last.
    #[must_use]
    pub fn spans(&self) -> &[RawSpan] {
        &self.spans
    }

    /// Makes a cursor over the list, for the library's own calls.
    #[must_use]
    pub fn cursor(&self, direction: Direction) -> IovCursor<'_> {
        // SAFETY: every span lies in a region or a view, which is borrowed and never referenced into, or is empty, or
        // lies in page zero where nothing is mapped (`and`, `and_view`, `and_empty_at`, `and_nowhere`).
        unsafe { IovCursor::from_raw(direction, &self.spans) }
    }
}

/// Where in the file a transfer starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum At {
    /// At the file position, which moves.
    Position,
    /// At this offset, in bytes; the file position stays. Offsets above `i64::MAX` reach the kernel as negative.
    Offset(u64),
}

/// Reads from `fd` into `to`: read(2) or pread(2) for one buffer without flags, else preadv2(2).
///
/// # Errors
/// Whatever the system call says.
pub fn read(
    fd: BorrowedFd<'_>,
    to: &UserIov<'_>,
    at: At,
    flags: ReadWriteFlags,
) -> Result<usize, Errno> {
    let fd = fd.as_raw_fd();
    if let ([span], true) = (to.spans(), flags.is_empty()) {
        let buf = std::ptr::with_exposed_provenance_mut::<u8>(span.addr).cast();
        return returned(match at {
            // SAFETY: the list holds memory that may be overwritten, or none at all (`UserIov`).
            At::Position => unsafe { libc::read(fd, buf, span.len) },
            // SAFETY: as above.
            At::Offset(offset) => unsafe { libc::pread(fd, buf, span.len, offset.cast_signed()) },
        });
    }
    let (iov, count) = raw_iov(to)?;
    // SAFETY: `iov` holds `count` entries; their memory may be overwritten (`UserIov`).
    let moved = unsafe { libc::preadv2(fd, iov.as_ptr(), count, raw_offset(at), raw(flags)) };
    returned(moved)
}

/// Writes `from` to `fd`: write(2) or pwrite(2) for one buffer without flags, else pwritev2(2).
///
/// # Errors
/// Whatever the system call says.
pub fn write(
    fd: BorrowedFd<'_>,
    from: &UserIov<'_>,
    at: At,
    flags: ReadWriteFlags,
) -> Result<usize, Errno> {
    let fd = fd.as_raw_fd();
    if let ([span], true) = (from.spans(), flags.is_empty()) {
        let buf = std::ptr::with_exposed_provenance::<u8>(span.addr).cast();
        return returned(match at {
            // SAFETY: the kernel only reads there, and faults are its to report.
            At::Position => unsafe { libc::write(fd, buf, span.len) },
            // SAFETY: as above.
            At::Offset(offset) => unsafe { libc::pwrite(fd, buf, span.len, offset.cast_signed()) },
        });
    }
    let (iov, count) = raw_iov(from)?;
    // SAFETY: `iov` holds `count` entries; the kernel only reads their memory.
    let moved = unsafe { libc::pwritev2(fd, iov.as_ptr(), count, raw_offset(at), raw(flags)) };
    returned(moved)
}

fn raw_iov(list: &UserIov<'_>) -> Result<(Vec<libc::iovec>, libc::c_int), Errno> {
    let iov: Vec<libc::iovec> = list
        .spans()
        .iter()
        .map(|span| libc::iovec {
            iov_base: std::ptr::with_exposed_provenance_mut::<u8>(span.addr).cast(),
            iov_len: span.len,
        })
        .collect();
    let count = libc::c_int::try_from(iov.len()).map_err(|_| Errno::EINVAL)?;
    Ok((iov, count))
}

fn raw_offset(at: At) -> libc::off_t {
    match at {
        // What preadv2(2) takes for "at the file position".
        At::Position => -1,
        At::Offset(offset) => offset.cast_signed(),
    }
}

fn raw(flags: ReadWriteFlags) -> libc::c_int {
    flags.bits().cast_signed()
}

fn returned(moved: isize) -> Result<usize, Errno> {
    usize::try_from(moved).map_err(|_| Errno::from(std::io::Error::last_os_error()))
}

fn errno(error: rustix::io::Errno) -> Errno {
    Errno::from_raw(error.raw_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsFd;

    /// A file without a name or a file system of its own.
    fn nameless() -> File {
        let fd = rustix::fs::memfd_create("region", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        File::from(fd)
    }

    #[test]
    fn a_protected_page_refuses_loads_and_stores_until_it_is_opened_again() {
        let region = Region::pages(2).unwrap();
        region.fill(0..8192, 7).unwrap();
        region.protect(4096..8192, Protection::None).unwrap();
        assert_eq!(region.put(4090, &[1; 10]), Err(Errno::EFAULT));
        assert_eq!(region.to_vec(4096..4097), Err(Errno::EFAULT));
        assert_eq!(region.to_vec(4088..4096).unwrap(), [7, 7, 1, 1, 1, 1, 1, 1]);
        region.protect(4096..8192, Protection::Read).unwrap();
        assert_eq!(region.to_vec(4096..4097).unwrap(), [7]);
        assert_eq!(region.put(4096, &[1]), Err(Errno::EFAULT));
        region.protect(4096..8192, Protection::ReadWrite).unwrap();
        region.put(8191, &[3]).unwrap();
        assert_eq!(region.put(8191, &[3, 3]), Err(Errno::EINVAL));
    }

    #[test]
    fn a_poisoned_page_fails_copies_and_system_calls_until_it_is_discarded() {
        let region = Region::pages(3).unwrap();
        region.fill(0..3 * 4096, 9).unwrap();
        match region.poison(4096..4097) {
            Err(Errno::EOPNOTSUPP | Errno::EPERM) => return,
            poisoned => poisoned.unwrap(),
        }
        assert_eq!(region.to_vec(4096..4097), Err(Errno::EFAULT));
        assert_eq!(region.put(5000, &[1]), Err(Errno::EFAULT));
        let file = nameless();
        let (whole, flags) = (region.iov(0..3 * 4096), ReadWriteFlags::empty());
        let written = write(file.as_fd(), &whole, At::Offset(0), flags);
        assert_eq!(written, Ok(4096));
        let bad = region.iov(4096..8192);
        let read = read(file.as_fd(), &bad, At::Offset(0), flags);
        assert_eq!(read, Err(Errno::EFAULT));
        assert_eq!(region.to_vec(8192..8193).unwrap(), [9]);
        region.discard(4096..8192).unwrap();
        assert_eq!(region.to_vec(4096..4097).unwrap(), [0]);
    }

    #[test]
    fn a_discarded_page_reads_as_zeros() {
        let region = Region::pages(1).unwrap();
        region.fill(0..4096, 9).unwrap();
        region.discard(0..4096).unwrap();
        assert_eq!(region.to_vec(0..4).unwrap(), [0; 4]);
    }

    #[test]
    fn the_system_calls_take_good_parts_and_report_bad_ones() {
        let region = Region::pages(3).unwrap();
        region.fill(0..4096, 5).unwrap();
        region.protect(4096..8192, Protection::None).unwrap();
        let file = nameless();
        let mixed = UserIov::new()
            .and(&region, 0..100)
            .and(&region, 4096..4196)
            .and(&region, 0..100);
        assert_eq!(mixed.bytes(), 300);
        let none = ReadWriteFlags::empty();
        assert_eq!(write(file.as_fd(), &mixed, At::Offset(0), none), Ok(100));
        let bad = region.iov(4096..4196);
        assert_eq!(
            write(file.as_fd(), &bad, At::Position, none),
            Err(Errno::EFAULT)
        );
        let target = region.iov(8192..12288);
        assert_eq!(read(file.as_fd(), &target, At::Position, none), Ok(100));
        assert_eq!(region.to_vec(8192..8292).unwrap(), [5; 100]);
        assert_eq!(
            read(file.as_fd(), &bad, At::Offset(0), none),
            Err(Errno::EFAULT)
        );
        let nowhere = UserIov::new().and_nowhere(10);
        assert_eq!(
            read(file.as_fd(), &nowhere, At::Offset(0), none),
            Err(Errno::EFAULT)
        );
        let negative = At::Offset(u64::MAX);
        assert_eq!(
            read(file.as_fd(), &target, negative, none),
            Err(Errno::EINVAL)
        );
    }

    #[test]
    fn a_part_of_a_list_crosses_its_borders() {
        let region = Region::pages(1).unwrap();
        region.put(0, b"abcdefgh").unwrap();
        let list = UserIov::new().and(&region, 4..8).and(&region, 0..4);
        let part = list.part(3..6);
        assert_eq!(part.spans().len(), 2);
        let mut bytes = [0; 3];
        let mut cursor = part.cursor(Direction::Source);
        assert_eq!(cursor.copy_slice_nofault(&mut bytes).done, 3);
        assert_eq!(&bytes, b"hab");
        assert_eq!(list.part(6..100).bytes(), 2);
        assert_eq!(list.part(8..9).bytes(), 0);
    }

    #[test]
    fn a_cursor_over_a_list_stops_at_its_bad_part() {
        let region = Region::pages(2).unwrap();
        region.protect(4096..8192, Protection::None).unwrap();
        let list = region.iov(0..8192);
        let mut cursor = list.cursor(Direction::Source);
        let mut sink = vec![1; 8192];
        assert_eq!(cursor.copy_slice_nofault(&mut sink).done, 4096);
        assert_eq!(cursor.count(), 4096);
    }
}
