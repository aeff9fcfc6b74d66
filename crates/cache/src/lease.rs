//! Valid pages that somebody uses: by reference for a copy of our own, or lent out, pinned, for a transfer.
//!
//! *Owns*: the references, given back by `Drop`; the share of the frames that may be lent.
//!
//! *Does not own*: how a page is found or made valid.
//!
//! *Locking*: none. A reference keeps the page from being dropped or reused (INV8), so whoever holds one must not wait for
//! anybody who drops pages.

use pinfold_base::sync::path::Ordering;
use std::sync::Arc;

use pinfold_base::Progress;
use pinfold_mem::{AlignedBuf, CopyStop, Frame, IoSpan, IovCursor, Segments};
use smallvec::SmallVec;

use crate::file::FilePages;
use crate::pin::PagePin;
use crate::state::{PinKind, RefOutcome};

/// At most one frame in so many is lent out at a time.
const LENT_SHARE: usize = 4;

/// A valid page that stays where it is while this exists. Its bytes may change under it, as in the kernel.
#[derive(Debug)]
pub struct PageRef<'a> {
    file: &'a FilePages,
    page: u64,
    frame: Frame,
}

impl<'a> PageRef<'a> {
    /// Wraps a frame that the caller has just taken a reference to.
    #[inline]
    pub(crate) fn adopt(file: &'a FilePages, page: u64, frame: Frame) -> Self {
        Self { file, page, frame }
    }

    /// Takes a reference to a page whose lock the caller holds and whose contents are valid.
    pub(crate) fn take_locked(file: &'a FilePages, page: u64, frame: Frame) -> Self {
        let outcome = file.cache().header(frame).state.try_ref();
        debug_assert_eq!(
            outcome,
            RefOutcome::Taken,
            "a locked valid page refused a reference"
        );
        Self { file, page, frame }
    }

    /// Returns the library's own address of the page, good while this exists; it never faults in a way that the library
    /// would have to resolve.
    #[must_use]
    pub fn addr(&self) -> *mut u8 {
        self.file.homes().addr(self.frame, self.page)
    }

    /// Returns the page's number.
    #[must_use]
    pub fn page(&self) -> u64 {
        self.page
    }

    /// Returns the page's frame.
    #[must_use]
    pub fn frame(&self) -> Frame {
        self.frame
    }

    /// Copies from the page to user memory without resolving faults.
    #[inline]
    pub fn copy_out(
        &self,
        at: usize,
        len: usize,
        target: &mut IovCursor<'_>,
    ) -> Progress<CopyStop> {
        self.file
            .homes()
            .copy(self.frame, self.page, at, len, target)
    }

    /// Copies from the page to a slice of the library's own.
    pub fn read(&self, at: usize, into: &mut [u8]) {
        self.file.homes().read(self.frame, self.page, at, into);
    }
}

impl Drop for PageRef<'_> {
    #[inline]
    fn drop(&mut self) {
        if self.file.cache().header(self.frame).state.unref() {
            self.file.cache().after_unref(self.frame);
        }
    }
}

/// Pages lent out for a transfer the cache does not run: a reply on a FUSE device, say. Pinned as for a device (section E),
/// and counted so: whoever reads them is not the cache.
///
/// Whoever drops or replaces pages (truncation, punches, direct writes) waits for leases of them, so the holder of one
/// must not wait for anything of the same cache.
#[derive(Debug)]
pub struct Lease {
    file: Arc<FilePages>,
    pins: SmallVec<[PagePin; 32]>,
    /// Pages this lease was promised, given back when it ends.
    promised: usize,
    segments: Segments,
}

impl Lease {
    /// Makes an empty lease that `pages` pages may be added to; `None` when that much of the cache is lent out that
    /// others would lack frames.
    #[must_use]
    pub fn reserve(file: &Arc<FilePages>, pages: usize) -> Option<Self> {
        let cache = file.cache();
        let limit = cache.pages_max() / LENT_SHARE;
        cache
            .lent_pages
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |lent| {
                lent.checked_add(pages).filter(|&sum| sum <= limit)
            })
            .ok()?;
        Some(Self {
            file: Arc::clone(file),
            pins: SmallVec::new(),
            promised: pages,
            segments: file.homes().segments(),
        })
    }

    /// Makes a lease of the first `len` bytes of a copy: it keeps nobody waiting.
    #[must_use]
    pub fn of_copy(file: &Arc<FilePages>, copy: AlignedBuf, len: usize) -> Self {
        Self {
            file: Arc::clone(file),
            pins: SmallVec::new(),
            promised: 0,
            segments: Segments::of_buf(&Arc::new(copy), len),
        }
    }

    /// Adds bytes `at .. at + len` of a page, which is pinned from here on; false when somebody is changing the page, or it has
    /// as many pins as it may have.
    #[must_use]
    pub fn push(&mut self, page: PageRef<'_>, at: usize, len: usize) -> bool {
        debug_assert!(
            std::ptr::eq(page.file, &raw const *self.file),
            "a lease is of one file"
        );
        debug_assert!(self.pins.len() < self.promised, "more than was reserved");
        let Ok(pin) = self.file.pin_found(page, PinKind::Read) else {
            return false;
        };
        pin.push(&mut self.segments, at, len);
        self.pins.push(pin);
        true
    }

    /// Returns the bytes, in file order. They may change while they are read, as a page in the kernel's cache may.
    #[must_use]
    pub fn spans(&self) -> &[IoSpan] {
        self.segments.spans()
    }

    /// Returns the number of bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.segments.bytes()
    }

    /// Tells whether nothing is lent.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.pins.clear();
        self.file
            .cache()
            .lent_pages
            .fetch_sub(self.promised, Ordering::Relaxed);
    }
}
