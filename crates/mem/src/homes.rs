//! The memory of one file's pages, in either of their two homes: arena frames, and the file's window.
//!
//! A page's home follows from its frame number: numbers of the arena name arena frames, higher ones a slot whose bytes lie
//! in the window at the page's own place. So everything that reaches a page's bytes takes both numbers.
//!
//! *Owns*: the choice of address. *Does not own*: which page is where. *Locking*: none.

use std::any::Any;
use std::sync::{Arc, OnceLock};

use pinfold_base::{PAGE_SIZE, Progress};

use crate::arena::{Arena, Frame};
use crate::copy::CopyStop;
use crate::iov::IovCursor;
use crate::span::{RawSpan, Segments};
use crate::window::Window;

const PAGE: usize = PAGE_SIZE as usize;

/// Where the pages of one file are.
#[derive(Debug)]
pub struct Homes {
    arena: Arc<Arena>,
    window: OnceLock<Arc<Window>>,
}

impl Homes {
    /// Makes homes without a window.
    #[must_use]
    pub fn new(arena: Arc<Arena>) -> Self {
        Self {
            arena,
            window: OnceLock::new(),
        }
    }

    /// Adds the window; it stays. False when there is one already.
    pub fn open(&self, window: Arc<Window>) -> bool {
        self.window.set(window).is_ok()
    }

    /// Returns the window of a file that is or was mapped.
    #[inline]
    #[must_use]
    pub fn window(&self) -> Option<&Arc<Window>> {
        self.window.get()
    }

    /// Returns the frames that are not in the window.
    #[must_use]
    pub fn arena(&self) -> &Arc<Arena> {
        &self.arena
    }

    /// Tells whether a frame number means a place in a window.
    #[inline]
    #[must_use]
    pub fn in_window(&self, frame: Frame) -> bool {
        frame.0 as usize >= self.arena.frames_max()
    }

    #[cold]
    fn windowed(&self) -> &Arc<Window> {
        self.window
            .get()
            .expect("a page gets a slot only after its file got a window")
    }

    /// Returns the library's own address of a page. It never faults in a way that the library would have to resolve, and is
    /// good while the page is referenced, pinned or locked.
    ///
    /// # Panics
    /// When the page is said to be in a window that there is not.
    #[inline]
    #[must_use]
    pub fn addr(&self, frame: Frame, page: u64) -> *mut u8 {
        if self.in_window(frame) {
            return self.windowed().alias(page);
        }
        self.arena.addr(frame)
    }

    /// Returns adjacent arena frames as a span, to be copied by the kernel.
    #[must_use]
    pub fn frames_span(&self, first: Frame, pages: usize) -> RawSpan {
        RawSpan {
            addr: self.arena.addr(first).expose_provenance(),
            len: pages * PAGE,
        }
    }

    /// Copies an arena frame into the window as `page`, for which [`Window::populate`] has made room.
    pub fn fill_window(&self, page: u64, frame: Frame) {
        let mut segments = self.arena.segments();
        self.arena.push_frame(&mut segments, frame, 0, PAGE);
        for span in segments.spans() {
            self.windowed().fill(page, span);
        }
    }

    /// Makes an empty list of transfer segments over these homes.
    #[must_use]
    pub fn segments(self: &Arc<Self>) -> Segments {
        Segments::new(Arc::clone(self) as Arc<dyn Any + Send + Sync>)
    }

    /// Appends bytes `at .. at + len` of a page to `segments`, which [`Homes::segments`] of these homes made.
    ///
    /// # Panics
    /// When the range leaves the page.
    #[inline]
    pub fn push(&self, segments: &mut Segments, frame: Frame, page: u64, at: usize, len: usize) {
        if self.in_window(frame) {
            return self.windowed().push_page(segments, page, at, len);
        }
        self.arena.push_frame(segments, frame, at, len);
    }

    /// Zeroes bytes `at .. at + len` of a page.
    ///
    /// # Panics
    /// When the range leaves the page.
    pub fn zero(&self, frame: Frame, page: u64, at: usize, len: usize) {
        if self.in_window(frame) {
            return self.windowed().zero(page, at, len);
        }
        self.arena.zero(frame, at, len);
    }

    /// Copies between a page's bytes `at .. at + len` and a user cursor, in the cursor's direction, without resolving
    /// faults.
    ///
    /// # Panics
    /// When the range leaves the page.
    #[inline]
    pub fn copy(
        &self,
        frame: Frame,
        page: u64,
        at: usize,
        len: usize,
        cursor: &mut IovCursor<'_>,
    ) -> Progress<CopyStop> {
        assert!(at + len <= PAGE, "{at}+{len} leaves the page");
        let addr = self.addr(frame, page).wrapping_add(at);
        // One place for both homes, so that the copy is compiled into its callers.
        // SAFETY: inside a page of the arena, populated, or of the window, whose alias never needs us to be resolved; both
        // are accessed by raw copies only.
        unsafe { cursor.copy_nofault(addr, len) }
    }

    /// Copies bytes of a page out.
    ///
    /// # Panics
    /// When the range leaves the page.
    pub fn read(&self, frame: Frame, page: u64, at: usize, into: &mut [u8]) {
        if self.in_window(frame) {
            return self.windowed().read_page(page, at, into);
        }
        self.arena.read_frame(frame, at, into);
    }

    /// Copies bytes into a page.
    ///
    /// # Panics
    /// When the range leaves the page.
    pub fn write(&self, frame: Frame, page: u64, at: usize, from: &[u8]) {
        if self.in_window(frame) {
            return self.windowed().write_page(page, at, from);
        }
        self.arena.write_frame(frame, at, from);
    }
}
