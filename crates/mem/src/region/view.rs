//! Mapped memory that a program touches: a [`View`] of it, and the kernel's own mappings ([`FileMap`]).
//!
//! *Owns*: the mapping of a [`FileMap`], until it is dropped.
//!
//! *Does not own*: the file; what lies behind a view that somebody else mapped.
//!
//! *Locking*: none; accesses race with whatever happens to the file, on purpose.

use std::marker::PhantomData;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;

use pinfold_base::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};

use super::touch::{self, Hit};
use super::{Region, UserIov, errno};
use crate::mapped;
use crate::span::RawSpan;

/// Addresses that may be loaded from and stored to at any time, as far as whoever mapped them allows.
///
/// Nobody holds a reference into them. Borrowed from what keeps them mapped.
#[derive(Debug, Clone, Copy)]
pub struct View<'m> {
    addr: NonNull<u8>,
    len: usize,
    owner: PhantomData<&'m ()>,
}

// SAFETY: an address and a length; every access is an assembly routine or the kernel's, never a reference.
unsafe impl Send for View<'_> {}
// SAFETY: as for Send.
unsafe impl Sync for View<'_> {}

impl<'m> View<'m> {
    /// Wraps memory that somebody else mapped.
    ///
    /// # Safety
    /// `len` bytes at `addr` stay mapped for `'m`, at least for loads, and no Rust reference into them ever exists.
    #[must_use]
    pub unsafe fn new(addr: NonNull<u8>, len: usize) -> Self {
        Self {
            addr,
            len,
            owner: PhantomData,
        }
    }

    /// Wraps a mapping of this library's, which is borrowed for as long: its owner keeps it mapped, and hands out no
    /// reference into it.
    ///
    /// # Errors
    /// `EINVAL` unless all of it is one mapping in the table of user mappings.
    pub fn of_user_mapping<T: ?Sized>(
        _owner: &'m T,
        addr: usize,
        len: usize,
    ) -> Result<Self, Errno> {
        let start = std::ptr::with_exposed_provenance_mut(addr);
        match (mapped::extent(addr, len), NonNull::new(start)) {
            (mapped::Extent::Mapped(there), Some(start)) if there == len => {
                // SAFETY: the table holds what is mapped, `_owner` is borrowed, and a mapping has no references into it.
                Ok(unsafe { Self::new(start, len) })
            }
            _ => Err(Errno::EINVAL),
        }
    }

    /// Returns the size in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Tells whether there is nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Loads bytes from byte `at` on.
    ///
    /// # Errors
    /// The signal that a program would have got.
    ///
    /// # Panics
    /// When the range leaves the view, as all accesses here do.
    pub fn load(&self, at: usize, into: &mut [u8]) -> Result<(), Hit> {
        let from = self.part(at..at + into.len());
        // SAFETY: inside the view, into which no reference exists; `into` is exclusive.
        unsafe { touch::copy(into.as_mut_ptr(), from, into.len()) }
    }

    /// Loads bytes `range`.
    ///
    /// # Errors
    /// As [`View::load`].
    pub fn to_vec(&self, range: Range<usize>) -> Result<Vec<u8>, Hit> {
        let mut bytes = vec![0; range.len()];
        self.load(range.start, &mut bytes)?;
        Ok(bytes)
    }

    /// Loads one byte.
    ///
    /// # Errors
    /// As [`View::load`].
    pub fn byte(&self, at: usize) -> Result<u8, Hit> {
        let mut byte = [0];
        self.load(at, &mut byte)?;
        Ok(byte[0])
    }

    /// Stores `bytes` from byte `at` on.
    ///
    /// # Errors
    /// As [`View::load`].
    pub fn store(&self, at: usize, bytes: &[u8]) -> Result<(), Hit> {
        let to = self.part(at..at + bytes.len());
        // SAFETY: inside the view, into which no reference exists; `bytes` is borrowed.
        unsafe { touch::copy(to, bytes.as_ptr(), bytes.len()) }
    }

    /// Stores `byte` all over bytes `range`.
    ///
    /// # Errors
    /// As [`View::load`].
    pub fn fill(&self, range: Range<usize>, byte: u8) -> Result<(), Hit> {
        let pattern = [byte; Region::PAGE];
        let mut at = range.start;
        while at < range.end {
            let n = (range.end - at).min(Region::PAGE);
            self.store(at, &pattern[..n])?;
            at += n;
        }
        Ok(())
    }

    /// Loads the eight bytes at byte `at`, a multiple of eight, at once.
    ///
    /// # Errors
    /// As [`View::load`].
    pub fn load_u64(&self, at: usize) -> Result<u64, Hit> {
        // SAFETY: inside the view and aligned (`word`); no reference exists.
        unsafe { touch::load(self.word(at)) }
    }

    /// Stores eight bytes at byte `at`, a multiple of eight, at once.
    ///
    /// # Errors
    /// As [`View::load`].
    pub fn store_u64(&self, at: usize, value: u64) -> Result<(), Hit> {
        // SAFETY: as in `load_u64`.
        unsafe { touch::store(self.word(at), value) }
    }

    /// Adds to the eight bytes at byte `at`, a multiple of eight, atomically; returns what was there before.
    ///
    /// # Errors
    /// As [`View::load`].
    pub fn add_u64(&self, at: usize, value: u64) -> Result<u64, Hit> {
        // SAFETY: as in `load_u64`.
        unsafe { touch::add(self.word(at), value) }
    }

    /// Returns bytes `range` as a buffer for a call.
    ///
    /// # Panics
    /// When the range leaves the view.
    #[must_use]
    pub fn iov(&self, range: Range<usize>) -> UserIov<'m> {
        UserIov::new().and_view(self, range)
    }

    pub(super) fn part(&self, range: Range<usize>) -> *mut u8 {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "{range:?} leaves a view of {} bytes",
            self.len
        );
        self.addr.as_ptr().wrapping_add(range.start)
    }

    fn word(&self, at: usize) -> *mut u64 {
        let word = self.part(at..at + 8).cast::<u64>();
        assert!(word.is_aligned(), "byte {at} is not a multiple of eight");
        word
    }
}

impl<'r> UserIov<'r> {
    /// Appends bytes `range` of mapped memory.
    ///
    /// # Panics
    /// When the range leaves the view: the buffer would be somebody else's.
    #[must_use]
    pub fn and_view(mut self, view: &View<'r>, range: Range<usize>) -> Self {
        let start = view.part(range.clone());
        self.spans.push(RawSpan {
            addr: start.expose_provenance(),
            len: range.len(),
        });
        self
    }
}

/// What a mapping of a file is good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// Stores reach the file.
    Shared,
    /// Stores stay with the mapping.
    Private,
}

/// A file mapped by the kernel, for loads and stores.
#[derive(Debug)]
pub struct FileMap {
    addr: NonNull<u8>,
    len: usize,
    /// Bytes that were unmapped before the whole.
    hole: Option<Range<usize>>,
}

// SAFETY: the map owns its mapping; every access is a raw one through a `View` or the kernel's.
unsafe impl Send for FileMap {}
// SAFETY: as for Send.
unsafe impl Sync for FileMap {}

impl FileMap {
    /// Maps `len` bytes of a file from `offset` on.
    ///
    /// # Errors
    /// As mmap(2).
    pub fn new(
        fd: BorrowedFd<'_>,
        offset: u64,
        len: usize,
        sharing: Sharing,
    ) -> Result<Self, Errno> {
        let flags = match sharing {
            Sharing::Shared => MapFlags::SHARED,
            Sharing::Private => MapFlags::PRIVATE,
        };
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: at an address of the kernel's choice, a mapping replaces nothing.
        let mapped = unsafe { mmap(std::ptr::null_mut(), len, prot, flags, fd, offset) };
        let addr = mapped.map_err(errno)?.cast::<u8>();
        let _ = addr.expose_provenance();
        let addr = NonNull::new(addr).ok_or(Errno::ENOMEM)?;
        Ok(Self {
            addr,
            len,
            hole: None,
        })
    }

    /// Returns the mapped bytes.
    ///
    /// # Panics
    /// After [`FileMap::unmap`]: the hole may be anybody's.
    #[must_use]
    pub fn view(&self) -> View<'_> {
        assert!(self.hole.is_none(), "a mapping with a hole has no view");
        // SAFETY: mapped until drop, which the borrow excludes; no reference into it is ever made.
        unsafe { View::new(self.addr, self.len) }
    }

    /// Calls msync(2) with raw flags, on any address at or behind the start, unaligned ones too.
    ///
    /// # Errors
    /// As msync(2).
    pub fn sync(&self, range: Range<usize>, flags: i32) -> Result<(), Errno> {
        let start = self.addr.as_ptr().wrapping_add(range.start).cast();
        // SAFETY: msync changes no memory.
        let done = unsafe { libc::msync(start, range.len(), flags) };
        if done == 0 {
            Ok(())
        } else {
            Err(std::io::Error::last_os_error().into())
        }
    }

    /// Drops the page-table entries of `range`, so that the next access faults (MADV_DONTNEED); of a private map, the
    /// copies too.
    ///
    /// # Errors
    /// `EINVAL` for a range that leaves the map; whatever madvise(2) says.
    pub fn forget(&self, range: Range<usize>) -> Result<(), Errno> {
        let start = self.whole_pages(&range)?;
        // SAFETY: pages of this mapping only (`whole_pages`), into which no reference exists.
        unsafe { madvise(start.cast(), range.len(), Advice::LinuxDontNeed) }.map_err(errno)
    }

    /// Says that accesses will be at random (MADV_RANDOM): nothing is read ahead.
    ///
    /// # Errors
    /// As madvise(2).
    pub fn random(&self) -> Result<(), Errno> {
        // SAFETY: advice on our own mapping changes no contents.
        unsafe { madvise(self.addr.as_ptr().cast(), self.len, Advice::Random) }.map_err(errno)
    }

    /// Tells of each page of `range` whether it is in memory (mincore(2)).
    ///
    /// # Errors
    /// As [`FileMap::forget`].
    pub fn resident(&self, range: Range<usize>) -> Result<Vec<bool>, Errno> {
        let start = self.whole_pages(&range)?;
        let mut bits = vec![0u8; range.len().div_ceil(Region::PAGE)];
        // SAFETY: `bits` has a byte for each page of the range, which lies in this mapping.
        let done = unsafe { libc::mincore(start.cast(), range.len(), bits.as_mut_ptr()) };
        if done != 0 {
            return Err(std::io::Error::last_os_error().into());
        }
        Ok(bits.into_iter().map(|byte| byte & 1 != 0).collect())
    }

    /// Unmaps a part of it; nothing but [`FileMap::sync`] can be called afterwards.
    ///
    /// # Errors
    /// As [`FileMap::forget`]; `EINVAL` for a second hole.
    pub fn unmap(&mut self, range: Range<usize>) -> Result<(), Errno> {
        let start = self.whole_pages(&range)?;
        // SAFETY: pages of this mapping; `&mut` says that no view exists.
        unsafe { munmap(start.cast(), range.len()) }.map_err(errno)?;
        self.hole = Some(range);
        Ok(())
    }

    fn whole_pages(&self, range: &Range<usize>) -> Result<*mut u8, Errno> {
        let aligned = range.start.is_multiple_of(Region::PAGE);
        if !aligned || range.is_empty() || range.end > self.len || self.hole.is_some() {
            return Err(Errno::EINVAL);
        }
        Ok(self.addr.as_ptr().wrapping_add(range.start))
    }
}

impl Drop for FileMap {
    fn drop(&mut self) {
        // The hole may be somebody else's by now: only what lies around it is ours.
        let len = self.len.next_multiple_of(Region::PAGE);
        let hole = self.hole.clone().unwrap_or(len..len);
        let after = hole.end.next_multiple_of(Region::PAGE);
        for part in [0..hole.start, after.min(len)..len] {
            if part.is_empty() {
                continue;
            }
            let start = self.addr.as_ptr().wrapping_add(part.start);
            // SAFETY: mapped in `new`; views borrow the map, so none is left.
            let unmapped = unsafe { munmap(start.cast(), part.len()) };
            debug_assert!(unmapped.is_ok(), "munmap of a file: {unmapped:?}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsFd;

    fn file(pages: u64) -> File {
        let fd = rustix::fs::memfd_create("view", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(fd);
        file.set_len(pages * 4096).unwrap();
        file
    }

    #[test]
    fn accesses_inside_the_file_work_and_past_its_end_are_a_sigbus() {
        let file = file(1);
        let map = FileMap::new(file.as_fd(), 0, 8192, Sharing::Shared).unwrap();
        let view = map.view();
        view.store(4090, b"abcdef").unwrap();
        assert_eq!(view.to_vec(4090..4096).unwrap(), b"abcdef");
        assert_eq!(view.add_u64(8, 5), Ok(0));
        assert_eq!(view.add_u64(8, 5), Ok(5));
        assert_eq!(view.load_u64(8), Ok(10));
        view.store_u64(8, 3).unwrap();
        assert_eq!(view.byte(8), Ok(3));
        let past = view.addr.as_ptr().addr() + 4096;
        for hit in [
            view.load(4096, &mut [0; 8]).unwrap_err(),
            view.store(4090, &[1; 20]).unwrap_err(),
            view.load_u64(4096).unwrap_err(),
            view.store_u64(4096, 1).unwrap_err(),
            view.add_u64(4096, 1).unwrap_err(),
        ] {
            assert!(hit.is_bus());
            assert_eq!(hit.addr, past);
        }
        assert_eq!(view.to_vec(4090..4096).unwrap(), [1; 6]);
    }

    #[test]
    fn an_access_to_what_is_not_mapped_is_a_sigsegv() {
        let region = Region::pages(1).unwrap();
        region
            .protect(0..4096, super::super::Protection::None)
            .unwrap();
        // SAFETY: the region outlives the view, and nothing refers into it.
        let view = unsafe { View::new(region.addr, region.len) };
        let hit = view.byte(7).unwrap_err();
        assert!(!hit.is_bus());
        assert_eq!(hit.addr, region.addr.as_ptr().addr() + 7);
        // The copies that must not fault still report as they did.
        assert_eq!(region.put(0, &[1]), Err(Errno::EFAULT));
    }

    #[test]
    fn stores_to_a_private_map_stay_there_until_it_forgets_them() {
        let file = file(2);
        let shared = FileMap::new(file.as_fd(), 0, 8192, Sharing::Shared).unwrap();
        let private = FileMap::new(file.as_fd(), 4096, 4096, Sharing::Private).unwrap();
        private.view().store(0, b"mine").unwrap();
        assert_eq!(shared.view().byte(4096), Ok(0));
        private.forget(0..4096).unwrap();
        assert_eq!(private.view().byte(0), Ok(0));
        assert_eq!(shared.resident(0..8192).unwrap(), [false, true]);
        assert_eq!(shared.forget(100..4096), Err(Errno::EINVAL));
        assert_eq!(shared.forget(0..9000), Err(Errno::EINVAL));
    }

    #[test]
    fn msync_says_enomem_over_a_hole() {
        let file = file(3);
        let mut map = FileMap::new(file.as_fd(), 0, 3 * 4096, Sharing::Shared).unwrap();
        assert_eq!(map.sync(0..3 * 4096, libc::MS_SYNC), Ok(()));
        assert_eq!(map.sync(1..4096, libc::MS_SYNC), Err(Errno::EINVAL));
        map.unmap(4096..8192).unwrap();
        assert_eq!(map.sync(0..3 * 4096, libc::MS_SYNC), Err(Errno::ENOMEM));
        assert_eq!(map.unmap(0..4096), Err(Errno::EINVAL));
    }
}
