//! Frames: one mapping per volume, grown in chunks that are touched once and kept.
//!
//! Filling or evicting a page costs no page-table work: a frame stays mapped at the same address for the life of
//! the arena. A chunk is registered with io_uring as one fixed buffer.
//!
//! The memory is private and anonymous because that is what the kernel backs with huge pages when asked: a
//! transfer of neighbouring frames then is one physical run for the device, and a walk over many frames misses the TLB
//! five hundred times less. Shared memory gets huge pages only where the administrator allows it, which by default he does
//! not. docs/decisions/0005 has the figures.

use std::any::Any;
use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;
use pinfold_base::{Errno, PAGE_SIZE, Progress};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

use crate::copy::CopyStop;
use crate::iov::IovCursor;
use crate::span::Segments;

const PAGE: usize = PAGE_SIZE as usize;
/// The least chunk: large enough for one fixed buffer to serve the largest transfers.
const CHUNK_BYTES_MIN: usize = 4 << 20;
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
    /// Chunks that are populated, from the start; only grows.
    chunks_ready: AtomicUsize,
    /// Frames that are free now; a hint, the truth is in the map.
    free_hint: AtomicUsize,
    free: Mutex<FreeMap>,
    /// Serializes population, which is too slow to do under the free list.
    growth: Mutex<()>,
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
        Ok(Arc::new(Self {
            base,
            bytes: len,
            mapped,
            chunk_bytes,
            chunks_ready: AtomicUsize::new(0),
            free_hint: AtomicUsize::new(0),
            free: Mutex::new(FreeMap::new(len / PAGE)),
            growth: Mutex::new(()),
        }))
    }

    /// Returns the most frames there can be.
    #[must_use]
    pub fn frames_max(&self) -> usize {
        self.bytes / PAGE
    }

    /// Returns how many frames can be had without evicting anything: free ones and those not yet populated.
    #[must_use]
    pub fn frames_available(&self) -> usize {
        let grown = (self.chunks_ready.load(Ordering::Acquire) * self.chunk_bytes).min(self.bytes);
        self.free_hint.load(Ordering::Relaxed) + (self.bytes - grown) / PAGE
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
        loop {
            if let Some(run) = self.free.lock().take(want) {
                self.free_hint
                    .fetch_sub(run.len as usize, Ordering::Relaxed);
                return Ok(Some(run));
            }
            if !self.grow()? {
                return Ok(None);
            }
        }
    }

    /// Gives a frame back.
    pub fn free(&self, frame: Frame) {
        self.free.lock().give(frame.0 as usize);
        self.free_hint.fetch_add(1, Ordering::Relaxed);
    }

    /// Gives many frames back under one lock.
    pub fn free_all(&self, frames: &[Frame]) {
        let mut free = self.free.lock();
        for frame in frames {
            free.give(frame.0 as usize);
        }
        drop(free);
        self.free_hint.fetch_add(frames.len(), Ordering::Relaxed);
    }

    /// Populates one more chunk; false when the budget is used up and nothing is free.
    fn grow(&self) -> Result<bool, ArenaError> {
        let _turn = self.growth.lock();
        if self.free.lock().any() {
            return Ok(true);
        }
        let ready = self.chunks_ready.load(Ordering::Relaxed);
        let start = ready * self.chunk_bytes;
        if start >= self.bytes {
            return Ok(false);
        }
        let len = self.chunk_bytes.min(self.bytes - start);
        let addr = self.base().wrapping_add(start);
        // SAFETY: a part of our own mapping, not yet handed out; populating changes no contents.
        unsafe { madvise(addr.cast(), len, Advice::LinuxPopulateWrite) }.map_err(|errno| {
            ArenaError::System {
                call: "madvise(POPULATE_WRITE)",
                errno: Errno::from_raw(errno.raw_os_error()),
            }
        })?;
        self.chunks_ready.store(ready + 1, Ordering::Release);
        let mut free = self.free.lock();
        for frame in start / PAGE..(start + len) / PAGE {
            free.give(frame);
        }
        drop(free);
        self.free_hint.fetch_add(len / PAGE, Ordering::Relaxed);
        Ok(true)
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

/// Which frames are free: a bit each, with a summary bit per word, searched next-fit so that frames freed
/// together are found together.
struct FreeMap {
    words: Vec<u64>,
    summary: Vec<u64>,
    cursor: usize,
}

impl FreeMap {
    fn new(frames: usize) -> Self {
        let words = frames.div_ceil(64);
        Self {
            words: vec![0; words],
            summary: vec![0; words.div_ceil(64)],
            cursor: 0,
        }
    }

    fn any(&self) -> bool {
        self.summary.iter().any(|&s| s != 0)
    }

    fn give(&mut self, frame: usize) {
        let (word, bit) = (frame / 64, frame % 64);
        debug_assert_eq!(self.words[word] >> bit & 1, 0, "frame {frame} freed twice");
        self.words[word] |= 1 << bit;
        self.summary[word / 64] |= 1 << (word % 64);
    }

    /// Takes the first run at or after the cursor, at most `want` long.
    fn take(&mut self, want: u32) -> Option<FrameRun> {
        let mut word = self.next_word(self.cursor).or_else(|| self.next_word(0))?;
        let start = word * 64 + self.words[word].trailing_zeros() as usize;
        let mut len = 0usize;
        while len < want as usize {
            let at = start + len;
            if at / 64 != word {
                word = at / 64;
            }
            let Some(bits) = self.words.get_mut(word) else {
                break;
            };
            let ones = (!(*bits >> (at % 64))).trailing_zeros() as usize;
            let ones = ones.min(64 - at % 64).min(want as usize - len);
            if ones == 0 {
                break;
            }
            let mask = (u64::MAX >> (64 - ones)) << (at % 64);
            *bits &= !mask;
            if *bits == 0 {
                self.summary[word / 64] &= !(1 << (word % 64));
            }
            len += ones;
            if !(at + ones).is_multiple_of(64) {
                break;
            }
        }
        self.cursor = (start + len) / 64;
        // Both fit: `Arena::new` bounds the number of frames by u32.
        Some(FrameRun {
            start: Frame(start as u32),
            len: len as u32,
        })
    }

    /// Finds the first word with a free frame at or after `from`.
    fn next_word(&self, from: usize) -> Option<usize> {
        let mut group = from / 64;
        let mut bits = self.summary.get(group)? & (u64::MAX << (from % 64));
        loop {
            if bits != 0 {
                return Some(group * 64 + bits.trailing_zeros() as usize);
            }
            group += 1;
            bits = *self.summary.get(group)?;
        }
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
    fn a_run_crosses_words_and_stops_at_a_used_frame() {
        let mut map = FreeMap::new(256);
        for frame in (10..140).chain(150..200) {
            map.give(frame);
        }
        let run = map.take(1000).unwrap();
        assert_eq!((run.start.0, run.len), (10, 130));
        let run = map.take(20).unwrap();
        assert_eq!((run.start.0, run.len), (150, 20));
        let run = map.take(64).unwrap();
        assert_eq!((run.start.0, run.len), (170, 30));
        assert!(map.take(1).is_none());
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
