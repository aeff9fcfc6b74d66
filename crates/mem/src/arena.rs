//! Frames: one mapping per volume, grown in chunks that are touched once and kept while no mapping of a file needs
//! the memory.
//!
//! Filling or evicting a page costs no page-table work: a frame stays mapped at the same address for the life of
//! the arena. A chunk is registered with io_uring as one fixed buffer.
//!
//! *Owns*: the budget, in pages: what the arena has populated and what lies outside of it (pages in the windows of mapped
//! files) is charged to one account. When windows need room the arena gives memory back a *granule* at a time, and takes
//! it again when there is room. A page that the kernel has registered as a fixed buffer must not be given back: the
//! buffer would go on naming the old page. So fixed buffers end for good before the first granule goes.
//!
//! *Does not own*: what a frame holds; which pages must go when room is short.
//!
//! *Locking*: the free list and the growth lock are leaves (class 6), growth before the free list.
//!
//! The memory is private and anonymous because that is what the kernel backs with huge pages when asked: a
//! transfer of neighbouring frames then is one physical run for the device, and a walk over many frames misses the TLB
//! five hundred times less. Shared memory gets huge pages only where the administrator allows it, which by default he does
//! not. docs/decisions/0005 has the figures.

use std::any::Any;
use std::fmt;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use pinfold_base::sync::Mutex;
use pinfold_base::{Errno, PAGE_SIZE, Progress};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

use crate::copy::CopyStop;
use crate::iov::IovCursor;
use crate::span::Segments;

mod free_map;
use free_map::FreeMap;

const PAGE: usize = PAGE_SIZE as usize;
/// The least chunk: large enough for one fixed buffer to serve the largest transfers.
const CHUNK_BYTES_MIN: usize = 4 << 20;
/// The most pages given back or taken again at once: one huge page.
const GRANULE_PAGES_MAX: usize = 512;
/// A granule is at most this share of the budget.
const GRANULE_SHARE: usize = 16;
/// io_uring takes at most 16384 fixed buffers.
const CHUNKS_MAX: usize = 16384;
/// The size of a huge page on the architectures we run on; elsewhere the alignment is merely unnecessary.
const HUGE: usize = 2 << 20;

/// A page's worth of arena memory, by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Frame(pub u32);

/// Adjacent frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameRun {
    /// The first of them.
    pub start: Frame,
    /// How many; at least one.
    pub len: u32,
}

impl FrameRun {
    /// Lists the frames.
    pub fn frames(self) -> impl Iterator<Item = Frame> {
        (self.start.0..self.start.0 + self.len).map(Frame)
    }
}

/// Why an arena could not be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ArenaError {
    /// More frames than 32 bits number, or more than the address space holds.
    TooLarge {
        /// The budget asked for, in bytes.
        bytes: u64,
    },
    /// A system call failed.
    System {
        /// Which one.
        call: &'static str,
        /// With what.
        errno: Errno,
    },
}

impl ArenaError {
    /// Returns the error number.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match self {
            Self::TooLarge { .. } => Errno::ENOMEM,
            Self::System { errno, .. } => *errno,
        }
    }
}

impl fmt::Display for ArenaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLarge { bytes } => write!(f, "a budget of {bytes} bytes is too large"),
            Self::System { call, errno } => write!(f, "{call}: {errno}"),
        }
    }
}

impl std::error::Error for ArenaError {}

/// The frames of one volume.
pub struct Arena {
    base: NonNull<u8>,
    bytes: usize,
    /// All that was mapped, the alignment's slack included.
    mapped: Mapped,
    chunk_bytes: usize,
    /// Pages of a granule, a power of two; the last granule may be smaller.
    granule: usize,
    /// Chunks that were populated whole, from the start; only grows, and no longer once fixed buffers have ended.
    chunks_ready: AtomicUsize,
    /// Frames that are free now; a hint, the truth is in the map.
    free_hint: AtomicUsize,
    /// Pages of the budget in use: populated, or charged from outside.
    committed: AtomicUsize,
    /// Pages that are populated.
    populated: AtomicUsize,
    /// Memory may have been given back: it must not be named by fixed buffers any more.
    fixed_stopped: AtomicBool,
    free: Mutex<FreeMap>,
    /// Serializes population and giving back, which are too slow to do under the free list.
    growth: Mutex<Growth>,
}

struct Growth {
    /// Which granules are populated.
    granules: Vec<bool>,
}

/// Pages of the budget that are spoken for; given back when dropped.
#[must_use = "dropped, the pages are anybody's again"]
pub struct Charge<'a> {
    arena: &'a Arena,
    pages: usize,
}

impl fmt::Debug for Charge<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Charge({} pages)", self.pages)
    }
}

impl Charge<'_> {
    /// Returns how many pages are spoken for.
    #[must_use]
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Adds pages that the caller was charged for and no longer uses.
    pub fn take_over(&mut self, pages: usize) {
        self.pages += pages;
    }

    /// Uses up to `pages` of these: the caller is charged for them until he calls [`Arena::uncharge`]. Returns how many.
    pub fn spend(&mut self, pages: usize) -> usize {
        let spent = pages.min(self.pages);
        self.pages -= spent;
        spent
    }
}

impl Drop for Charge<'_> {
    fn drop(&mut self) {
        self.arena.uncharge(self.pages);
    }
}

/// A mapping as it was made.
#[derive(Clone, Copy)]
struct Mapped {
    addr: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping lives until drop; all access is by raw copy, ownership of a frame is
// handed out through the free list under its lock.
unsafe impl Send for Arena {}
// SAFETY: as for Send.
unsafe impl Sync for Arena {}

impl fmt::Debug for Arena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Arena")
            .field("bytes", &self.bytes)
            .field("chunks_ready", &self.chunks_ready.load(Ordering::Relaxed))
            .finish_non_exhaustive()
    }
}

impl Arena {
    /// Reserves address space for `bytes` (rounded up to a page); memory is taken chunk by chunk as it is needed.
    ///
    /// # Errors
    /// See [`ArenaError`].
    pub fn new(bytes: u64) -> Result<Arc<Self>, ArenaError> {
        let too_large = ArenaError::TooLarge { bytes };
        let rounded = bytes
            .max(1)
            .checked_next_multiple_of(PAGE_SIZE)
            .filter(|b| b / PAGE_SIZE < u64::from(u32::MAX))
            .ok_or(too_large)?;
        let len = usize::try_from(rounded).map_err(|_| too_large)?;
        let system = |call| {
            move |errno: rustix::io::Errno| ArenaError::System {
                call,
                errno: Errno::from_raw(errno.raw_os_error()),
            }
        };
        // Room to begin at a huge page's border; what is not touched is not memory.
        let slack = if len >= HUGE { HUGE } else { 0 };
        let mapped_len = len.checked_add(slack).ok_or(too_large)?;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let addr = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                mapped_len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }
        .map_err(system("mmap"))?;
        let Some(mapped) = NonNull::new(addr.cast::<u8>()) else {
            return Err(too_large);
        };
        let skip = if slack > 0 {
            mapped.align_offset(HUGE).min(slack)
        } else {
            0
        };
        // The result lies in the mapping, so it is not null.
        let base = NonNull::new(mapped.as_ptr().wrapping_add(skip)).ok_or(too_large)?;
        let mapped = Mapped {
            addr: mapped,
            len: mapped_len,
        };
        // A child has no engine (SEMANTICS.md, fact 8), and copying frames on write would take them from under the device.
        // SAFETY: advice on our own mapping.
        unsafe { madvise(addr, mapped_len, Advice::LinuxDontFork) }
            .map_err(system("madvise(DONTFORK)"))?;
        // Kernels without huge pages refuse; ordinary pages do the same work.
        // SAFETY: advice on our own mapping.
        let _ = unsafe { madvise(base.as_ptr().cast(), len, Advice::LinuxHugepage) };
        crate::copy::install();
        let chunk_bytes = CHUNK_BYTES_MIN
            .max((len / CHUNKS_MAX).next_multiple_of(CHUNK_BYTES_MIN))
            .min(len);
        let granule = 1 << (len / PAGE / GRANULE_SHARE).max(1).ilog2();
        let granule = GRANULE_PAGES_MAX.min(granule);
        Ok(Arc::new(Self {
            base,
            bytes: len,
            mapped,
            chunk_bytes,
            granule,
            chunks_ready: AtomicUsize::new(0),
            free_hint: AtomicUsize::new(0),
            committed: AtomicUsize::new(0),
            populated: AtomicUsize::new(0),
            fixed_stopped: AtomicBool::new(false),
            free: Mutex::new(FreeMap::new(len / PAGE)),
            growth: Mutex::new(Growth {
                granules: vec![false; (len / PAGE).div_ceil(granule)],
            }),
        }))
    }

    /// Returns the most frames there can be.
    #[must_use]
    pub fn frames_max(&self) -> usize {
        self.bytes / PAGE
    }

    /// Returns how many pages can be had without evicting anything: free frames, and what of the budget is not in use.
    #[must_use]
    pub fn frames_available(&self) -> usize {
        let used = self.committed.load(Ordering::Relaxed);
        self.free_frames() + self.frames_max().saturating_sub(used)
    }

    /// Returns how many populated frames are free; a hint while others take and give.
    #[must_use]
    pub fn free_frames(&self) -> usize {
        self.free_hint.load(Ordering::Relaxed)
    }

    /// Returns how many frames have memory.
    #[must_use]
    pub fn populated(&self) -> usize {
        self.populated.load(Ordering::Relaxed)
    }

    /// Returns how many frames are given back at once.
    #[must_use]
    pub fn granule(&self) -> usize {
        self.granule
    }

    /// Returns the address of the first frame.
    #[must_use]
    pub fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Returns the budget in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Returns the size of a chunk in bytes; the last one may be smaller.
    #[must_use]
    pub fn chunk_bytes(&self) -> usize {
        self.chunk_bytes
    }

    /// Returns how many chunks are populated, counted from the base.
    #[must_use]
    pub fn chunks_ready(&self) -> usize {
        self.chunks_ready.load(Ordering::Acquire)
    }

    /// Takes up to `want` adjacent frames; `None` when none is free and the budget is used up.
    ///
    /// Fewer than `want` may come although more are free elsewhere: callers that want many call again.
    ///
    /// # Errors
    /// The system has no memory for another chunk although the budget has.
    pub fn alloc(&self, want: u32) -> Result<Option<FrameRun>, ArenaError> {
        self.alloc_from(want, &mut self.no_charge())
    }

    /// As [`Arena::alloc`], and may use the pages of `saved` to grow.
    ///
    /// # Errors
    /// As of [`Arena::alloc`].
    pub fn alloc_from(
        &self,
        want: u32,
        saved: &mut Charge<'_>,
    ) -> Result<Option<FrameRun>, ArenaError> {
        loop {
            if let Some(run) = self.free.lock().take(want) {
                self.free_hint
                    .fetch_sub(run.len as usize, Ordering::Relaxed);
                return Ok(Some(run));
            }
            if !self.grow(saved)? {
                return Ok(None);
            }
        }
    }

    /// Speaks for `pages` of the budget outside of the arena, if so many are not in use.
    pub fn charge(&self, pages: usize) -> Option<Charge<'_>> {
        let limit = self.frames_max();
        self.committed
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
                used.checked_add(pages).filter(|&sum| sum <= limit)
            })
            .ok()?;
        Some(Charge { arena: self, pages })
    }

    /// Returns how many pages of the budget are neither of the arena nor charged to anybody: a moment's view.
    pub fn uncharged(&self) -> usize {
        let used = self.committed.load(Ordering::Relaxed);
        self.frames_max().saturating_sub(used)
    }

    /// Makes a charge of nothing, to collect in.
    pub fn no_charge(&self) -> Charge<'_> {
        Charge {
            arena: self,
            pages: 0,
        }
    }

    /// Gives back pages that were charged and [spent](Charge::spend).
    pub fn uncharge(&self, pages: usize) {
        let before = self.committed.fetch_sub(pages, Ordering::Relaxed);
        debug_assert!(before >= pages, "more was given back than was charged");
    }

    /// Ends fixed buffers for good: from now on no request names its memory by one, and rings forget theirs.
    pub fn stop_fixed(&self) {
        self.fixed_stopped.store(true, Ordering::Release);
    }

    /// Tells whether fixed buffers have ended. A frame that came back from a granule given back was handed out after
    /// this became true, so a look when a request for it is cut sees it.
    #[must_use]
    pub fn fixed_stopped(&self) -> bool {
        self.fixed_stopped.load(Ordering::Acquire)
    }

    /// Returns the frames of the populated granule with the most free ones, and how many those are; passes over the
    /// granules that begin with one of `except`.
    #[must_use]
    pub fn emptiest(&self, except: &[Frame]) -> Option<(FrameRun, usize)> {
        let growth = self.growth.lock();
        let free = self.free.lock();
        let mut best: Option<(FrameRun, usize)> = None;
        for granule in (0..growth.granules.len()).filter(|&granule| growth.granules[granule]) {
            let frames = self.frames_of(granule);
            // Both fit: `Arena::new` bounds the number of frames by u32.
            let run = FrameRun {
                start: Frame(frames.start as u32),
                len: frames.len() as u32,
            };
            let (count, all) = (free.count(frames.clone()), frames.len());
            if best.is_none_or(|(_, most)| count > most) && !except.contains(&run.start) {
                best = Some((run, count));
                if count == all {
                    break;
                }
            }
        }
        best
    }

    /// Gives the memory of the granule that holds `frame` back to the system, and its pages to the budget; false when
    /// one of its frames is in use.
    pub fn retire(&self, frame: Frame) -> bool {
        let granule = frame.0 as usize / self.granule;
        let mut growth = self.growth.lock();
        let frames = self.frames_of(granule);
        if !growth.granules[granule] || !self.free.lock().take_all(frames.clone()) {
            return false;
        }
        self.stop_fixed();
        let addr = self.base().wrapping_add(frames.start * PAGE);
        // SAFETY: a part of our own mapping none of whose frames is handed out, and no fixed buffer names it from here on.
        let gone = unsafe { madvise(addr.cast(), frames.len() * PAGE, Advice::LinuxDontNeed) };
        if gone.is_err() {
            // Locked memory, say: the frames are as good as before.
            let mut free = self.free.lock();
            frames.for_each(|frame| free.give(frame));
            return false;
        }
        growth.granules[granule] = false;
        self.free_hint.fetch_sub(frames.len(), Ordering::Relaxed);
        self.populated.fetch_sub(frames.len(), Ordering::Relaxed);
        self.uncharge(frames.len());
        true
    }

    fn frames_of(&self, granule: usize) -> Range<usize> {
        let start = granule * self.granule;
        start..(start + self.granule).min(self.frames_max())
    }

    /// Gives a frame back.
    pub fn free(&self, frame: Frame) {
        // Counted first, as below: whoever takes it at once must not count below nothing.
        self.free_hint.fetch_add(1, Ordering::Relaxed);
        self.free.lock().give(frame.0 as usize);
    }

    /// Gives many frames back under one lock.
    pub fn free_all(&self, frames: &[Frame]) {
        self.free_hint.fetch_add(frames.len(), Ordering::Relaxed);
        let mut free = self.free.lock();
        for frame in frames {
            free.give(frame.0 as usize);
        }
    }

    /// Populates one more chunk, or granule once memory has gone elsewhere; false when the budget is used up and nothing
    /// is free.
    fn grow(&self, saved: &mut Charge<'_>) -> Result<bool, ArenaError> {
        let mut growth = self.growth.lock();
        if self.free.lock().any() {
            return Ok(true);
        }
        let Some((frames, is_chunk)) = self.next_growth(&growth, saved) else {
            return Ok(false);
        };
        let addr = self.base().wrapping_add(frames.start * PAGE);
        // SAFETY: a part of our own mapping, not yet handed out; populating changes no contents.
        let populated =
            unsafe { madvise(addr.cast(), frames.len() * PAGE, Advice::LinuxPopulateWrite) };
        if let Err(errno) = populated {
            self.uncharge(frames.len());
            return Err(ArenaError::System {
                call: "madvise(POPULATE_WRITE)",
                errno: Errno::from_raw(errno.raw_os_error()),
            });
        }
        for granule in frames.start / self.granule..frames.end.div_ceil(self.granule) {
            growth.granules[granule] = true;
        }
        if is_chunk {
            self.chunks_ready.fetch_add(1, Ordering::Release);
        }
        self.populated.fetch_add(frames.len(), Ordering::Relaxed);
        self.free_hint.fetch_add(frames.len(), Ordering::Relaxed);
        let mut free = self.free.lock();
        for frame in frames {
            free.give(frame);
        }
        Ok(true)
    }

    /// Chooses what to populate next and charges for it; true: it is a whole chunk, for a fixed buffer.
    fn next_growth(&self, growth: &Growth, saved: &mut Charge<'_>) -> Option<(Range<usize>, bool)> {
        if !self.fixed_stopped() {
            let chunk = self.chunk_bytes / PAGE;
            let start = self.chunks_ready.load(Ordering::Relaxed) * chunk;
            if start >= self.frames_max() {
                return None;
            }
            let frames = start..(start + chunk).min(self.frames_max());
            if self.cover(frames.len(), saved) {
                return Some((frames, true));
            }
            if !self.cover(self.frames_of(start / self.granule).len(), saved) {
                return None;
            }
            // Part of a chunk must not be taken for a fixed buffer.
            self.stop_fixed();
            return Some((self.frames_of(start / self.granule), false));
        }
        let granule = growth.granules.iter().position(|&populated| !populated)?;
        let frames = self.frames_of(granule);
        self.cover(frames.len(), saved).then_some((frames, false))
    }

    /// Charges for `pages`, from `saved` as far as it goes.
    fn cover(&self, pages: usize, saved: &mut Charge<'_>) -> bool {
        match self.charge(pages.saturating_sub(saved.pages())) {
            Some(mut rest) => {
                let short = rest.pages();
                rest.spend(short);
                saved.spend(pages - short);
                true
            }
            None => false,
        }
    }

    /// Returns a frame's address.
    ///
    /// # Panics
    /// When no such frame exists: frame numbers come from [`Arena::alloc`] alone.
    #[inline]
    #[must_use]
    pub fn addr(&self, frame: Frame) -> *mut u8 {
        let at = frame.0 as usize * PAGE;
        assert!(at < self.bytes, "{frame:?} is not of this arena");
        self.base().wrapping_add(at)
    }

    /// Has the processor fetch a frame's first bytes, for a copy that is likely to come: only a hint.
    #[inline]
    pub fn prefetch(&self, frame: Frame) {
        let at = self.base().wrapping_add(frame.0 as usize * PAGE);
        crate::copy::prefetch(at);
    }

    /// Makes an empty list of transfer segments over this arena's memory.
    #[must_use]
    pub fn segments(self: &Arc<Self>) -> Segments {
        Segments::new(Arc::clone(self) as Arc<dyn Any + Send + Sync>)
    }

    /// Appends bytes `at .. at + len` of a frame to `segments`, which [`Arena::segments`] of this arena made.
    ///
    /// # Panics
    /// When the range leaves the frame.
    pub fn push_frame(&self, segments: &mut Segments, frame: Frame, at: usize, len: usize) {
        assert!(at + len <= PAGE, "{at}+{len} leaves the frame");
        // SAFETY: inside a frame of the mapping that `segments` keeps alive; frames are accessed by raw copies only.
        unsafe { segments.push_raw(self.addr(frame).wrapping_add(at), len) };
    }

    /// Zeroes bytes `at .. at + len` of a frame.
    ///
    /// # Panics
    /// When the range leaves the frame.
    pub fn zero(&self, frame: Frame, at: usize, len: usize) {
        assert!(at + len <= PAGE, "{at}+{len} leaves the frame");
        // SAFETY: inside a populated frame; frames are accessed by raw writes only.
        unsafe { std::ptr::write_bytes(self.addr(frame).wrapping_add(at), 0, len) };
    }

    /// Copies between a frame's bytes `at .. at + len` and a user cursor, in the cursor's direction, without
    /// resolving faults.
    ///
    /// # Panics
    /// When the range leaves the frame.
    #[inline]
    pub fn copy_frame(
        &self,
        frame: Frame,
        at: usize,
        len: usize,
        cursor: &mut IovCursor<'_>,
    ) -> Progress<CopyStop> {
        assert!(at + len <= PAGE, "{at}+{len} leaves the frame");
        // SAFETY: inside a populated frame, which is resident and accessed by raw copies only.
        unsafe { cursor.copy_nofault(self.addr(frame).wrapping_add(at), len) }
    }

    /// Copies bytes between a frame and a slice of the library's own.
    ///
    /// # Panics
    /// When the range leaves the frame.
    pub fn read_frame(&self, frame: Frame, at: usize, into: &mut [u8]) {
        assert!(
            at + into.len() <= PAGE,
            "{at}+{} leaves the frame",
            into.len()
        );
        let from = self.addr(frame).wrapping_add(at);
        // SAFETY: inside a populated frame; `into` is exclusive and not part of it.
        unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) };
    }

    /// Copies a slice of the library's own into a frame.
    ///
    /// # Panics
    /// When the range leaves the frame.
    pub fn write_frame(&self, frame: Frame, at: usize, from: &[u8]) {
        assert!(
            at + from.len() <= PAGE,
            "{at}+{} leaves the frame",
            from.len()
        );
        let to = self.addr(frame).wrapping_add(at);
        // SAFETY: inside a populated frame; `from` is not part of it.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) };
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this length; Segments hold an Arc, so none is left.
        let _ = unsafe { munmap(self.mapped.addr.as_ptr().cast(), self.mapped.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_frame_is_handed_out_once_and_comes_back() {
        let arena = Arena::new(9 << 20).unwrap();
        let total = arena.frames_max();
        let mut seen = vec![false; total];
        let mut taken = Vec::new();
        while let Some(run) = arena.alloc(100).unwrap() {
            for frame in run.frames() {
                assert!(!std::mem::replace(&mut seen[frame.0 as usize], true));
                taken.push(frame);
            }
        }
        assert!(seen.iter().all(|&s| s));
        assert_eq!(arena.frames_available(), 0);
        arena.free(taken[17]);
        assert_eq!(
            arena.alloc(5).unwrap(),
            Some(FrameRun {
                start: taken[17],
                len: 1
            })
        );
        arena.free_all(&taken);
        assert_eq!(arena.frames_available(), total);
    }

    #[test]
    fn no_more_frames_are_said_to_be_free_than_there_are() {
        let arena = Arena::new(64 * PAGE_SIZE).unwrap();
        arena.free(arena.alloc(1).unwrap().unwrap().start);
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while !over.load(Ordering::Relaxed) {
                        if let Some(run) = arena.alloc(64).unwrap() {
                            run.frames().for_each(|frame| arena.free(frame));
                        }
                    }
                });
            }
            let most = (0..1_000_000).map(|_| arena.free_frames()).max();
            over.store(true, Ordering::Relaxed);
            assert!(most <= Some(64), "{most:?}");
        });
    }

    #[test]
    fn memory_is_taken_chunk_by_chunk() {
        let arena = Arena::new(64 << 20).unwrap();
        assert_eq!(arena.chunks_ready(), 0);
        arena.alloc(1).unwrap().unwrap();
        assert_eq!(arena.chunks_ready(), 1);
        assert_eq!(arena.frames_available(), arena.frames_max() - 1);
    }

    #[test]
    fn what_is_charged_outside_is_not_populated() {
        let arena = Arena::new(64 * PAGE_SIZE).unwrap();
        let mut outside = arena.charge(10).unwrap();
        assert!(arena.charge(55).is_none());
        // The chunk, which is the whole budget, no longer fits: granules of four do.
        let mut taken = 0;
        while let Some(run) = arena.alloc(64).unwrap() {
            taken += run.len as usize;
        }
        assert_eq!((taken, arena.populated(), arena.granule()), (52, 52, 4));
        assert!(arena.fixed_stopped() && arena.chunks_ready() == 0);
        assert_eq!(arena.frames_available(), 2);
        // Two saved and two that are left make a granule.
        let mut saved = arena.no_charge();
        saved.take_over(outside.spend(2));
        assert_eq!(arena.alloc_from(64, &mut saved).unwrap().unwrap().len, 4);
        assert_eq!((saved.pages(), outside.pages()), (0, 8));
        drop((saved, outside));
        assert_eq!(arena.alloc(64).unwrap().unwrap().len, 4);
        assert_eq!(arena.alloc(64).unwrap().unwrap().len, 4);
        assert_eq!(arena.alloc(64).unwrap(), None);
    }

    #[test]
    fn a_granule_is_given_back_when_all_its_frames_are_free_and_taken_again() {
        let arena = Arena::new(64 * PAGE_SIZE).unwrap();
        let mut taken = Vec::new();
        while let Some(run) = arena.alloc(64).unwrap() {
            taken.extend(run.frames());
        }
        assert_eq!(taken.len(), 64);
        assert!(arena.charge(1).is_none() && !arena.retire(Frame(20)));
        for frame in [20, 21, 23, 40] {
            arena.free(Frame(frame));
        }
        let (granule, free) = arena.emptiest(&[]).unwrap();
        assert_eq!((granule.start, granule.len, free), (Frame(20), 4, 3));
        assert!(!arena.retire(Frame(20)) && !arena.fixed_stopped());
        arena.free(Frame(22));
        arena.write_frame(Frame(22), 0, b"old");
        assert!(arena.retire(Frame(22)) && arena.fixed_stopped());
        assert_eq!((arena.populated(), arena.frames_available()), (60, 5));
        let charge = arena.charge(4).unwrap();
        assert_eq!(arena.alloc(64).unwrap().unwrap().start, Frame(40));
        assert_eq!(arena.alloc(64).unwrap(), None);
        drop(charge);
        let run = arena.alloc(64).unwrap().unwrap();
        assert_eq!((run.start, run.len), (Frame(20), 4));
        let mut bytes = [1; 3];
        arena.read_frame(Frame(22), 0, &mut bytes);
        assert_eq!(bytes, [0; 3], "the memory was given back");
    }

    #[test]
    fn frames_begin_at_the_border_of_a_huge_page() {
        for bytes in [2 << 20, 9 << 20, 64 << 20] {
            assert!(
                Arena::new(bytes)
                    .unwrap()
                    .base()
                    .addr()
                    .is_multiple_of(HUGE)
            );
        }
    }

    #[test]
    fn frames_hold_what_is_copied_into_them() {
        let arena = Arena::new(1 << 20).unwrap();
        let frame = arena.alloc(1).unwrap().unwrap().start;
        let data: Vec<u8> = (0..200).collect();
        let mut source = IovCursor::from_slice(&data);
        assert_eq!(arena.copy_frame(frame, 100, 200, &mut source).done, 200);
        let mut out = [0u8; 50];
        arena.read_frame(frame, 150, &mut out);
        assert_eq!(out[..], data[50..100]);
        arena.zero(frame, 0, 4096);
        arena.read_frame(frame, 150, &mut out);
        assert_eq!(out, [0; 50]);
    }

    #[test]
    fn an_impossible_budget_is_refused() {
        assert!(matches!(
            Arena::new(u64::MAX),
            Err(ArenaError::TooLarge { .. })
        ));
    }
}
