//! The cursor over a caller's buffers: what Linux calls an iov_iter.
//!
//! A copy advances it by exactly the bytes it moved. Whoever truncates must re-expand on every exit:
//! [`IovCursor::truncated`] does that by itself.

use std::io::{IoSlice, IoSliceMut};
use std::marker::PhantomData;

use pinfold_base::{PAGE_SIZE, Progress};
use smallvec::{SmallVec, smallvec};

use crate::copy::{Access, CopyStop, copy_nofault, copy_touching};
use crate::mapped::{self, Extent, Lent};
use crate::span::RawSpan;

const PAGE: usize = PAGE_SIZE as usize;

/// Which way the bytes go, seen from the caller's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// The caller's memory is read (a write to a file).
    Source,
    /// The caller's memory is written (a read from a file).
    Target,
}

/// A position in a list of user buffers.
///
/// The lifetime is that of the borrowed buffers: while the cursor lives, nobody else touches a target.
#[derive(Debug)]
pub struct IovCursor<'a> {
    segments: SmallVec<[RawSpan; 4]>,
    /// The current segment; `segments.len()` at the end.
    index: usize,
    /// Position in the current segment, in bytes.
    offset: usize,
    /// Bytes that may still be moved; at most what the segments hold from here on.
    count: usize,
    /// Bytes advanced since creation.
    advanced: usize,
    direction: Direction,
    nofault: bool,
    borrows: PhantomData<&'a mut [u8]>,
}

/// A saved position, for [`IovCursor::restore`].
#[derive(Debug, Clone, Copy)]
pub struct Mark {
    index: usize,
    offset: usize,
    count: usize,
    advanced: usize,
}

impl<'a> IovCursor<'a> {
    /// Makes a cursor that reads from `buf`.
    #[inline]
    #[must_use]
    pub fn from_slice(buf: &'a [u8]) -> Self {
        let span = RawSpan {
            addr: buf.as_ptr().expose_provenance(),
            len: buf.len(),
        };
        Self::over(Direction::Source, smallvec![span])
    }

    /// Makes a cursor that writes to `buf`.
    #[inline]
    #[must_use]
    pub fn from_mut_slice(buf: &'a mut [u8]) -> Self {
        let span = RawSpan {
            addr: buf.as_mut_ptr().expose_provenance(),
            len: buf.len(),
        };
        Self::over(Direction::Target, smallvec![span])
    }

    /// Makes a cursor that reads from several buffers in turn.
    #[must_use]
    pub fn source(bufs: &'a [IoSlice<'_>]) -> Self {
        let spans = bufs.iter().map(|buf| RawSpan {
            addr: buf.as_ptr().expose_provenance(),
            len: buf.len(),
        });
        Self::over(Direction::Source, spans.collect())
    }

    /// Makes a cursor that writes to several buffers in turn.
    #[must_use]
    pub fn target(bufs: &'a mut [IoSliceMut<'_>]) -> Self {
        let spans = bufs.iter_mut().map(|buf| RawSpan {
            addr: buf.as_mut_ptr().expose_provenance(),
            len: buf.len(),
        });
        Self::over(Direction::Target, spans.collect())
    }

    /// Makes a cursor over addresses, which may be bad: accessing them yields `EFAULT`, not a signal.
    ///
    /// # Safety
    /// Whatever is mapped there may be read (source) or overwritten (target) while the cursor lives: no Rust
    /// reference that this would break exists. The ranges need not be mapped.
    #[must_use]
    pub unsafe fn from_raw(direction: Direction, spans: &[RawSpan]) -> Self {
        Self::over(direction, SmallVec::from_slice(spans))
    }

    #[inline]
    fn over(direction: Direction, segments: SmallVec<[RawSpan; 4]>) -> Self {
        let count = segments
            .iter()
            .fold(0usize, |sum, span| sum.saturating_add(span.len));
        Self {
            segments,
            index: 0,
            offset: 0,
            count,
            advanced: 0,
            direction,
            nofault: false,
            borrows: PhantomData,
        }
    }

    /// Returns the bytes that may still be moved.
    #[inline]
    #[must_use]
    pub fn count(&self) -> usize {
        self.count
    }

    /// Returns which way the bytes go.
    #[must_use]
    pub fn direction(&self) -> Direction {
        self.direction
    }

    /// Tells whether pinning for direct I/O must not take faults. Copies never do, whatever this says.
    #[must_use]
    pub fn nofault(&self) -> bool {
        self.nofault
    }

    /// Sets whether pinning for direct I/O must not take faults.
    pub fn set_nofault(&mut self, nofault: bool) {
        self.nofault = nofault;
    }

    /// Returns the bytes left in the current segment, clipped to the count.
    #[must_use]
    pub fn single_segment_count(&self) -> usize {
        self.spans_ahead().next().map_or(0, |span| span.len)
    }

    /// Lists what is ahead: non-empty parts of segments, clipped to the count.
    pub fn spans_ahead(&self) -> impl Iterator<Item = RawSpan> + '_ {
        let (mut skip, mut left) = (self.offset, self.count);
        self.segments[self.index..].iter().filter_map(move |span| {
            let len = (span.len - skip).min(left);
            let part = RawSpan {
                addr: span.addr.wrapping_add(skip),
                len,
            };
            skip = 0;
            left -= len;
            (len > 0).then_some(part)
        })
    }

    /// Moves forward.
    ///
    /// # Panics
    /// When `bytes` exceeds the count: the caller claims to have moved bytes that were not there.
    #[inline]
    pub fn advance(&mut self, bytes: usize) {
        assert!(bytes <= self.count, "advance by {bytes} of {}", self.count);
        self.count -= bytes;
        self.advanced += bytes;
        self.offset += bytes;
        while let Some(span) = self.segments.get(self.index)
            && self.offset >= span.len
        {
            self.offset -= span.len;
            self.index += 1;
        }
    }

    /// Moves back.
    ///
    /// # Panics
    /// When `bytes` exceeds what the cursor advanced since its creation.
    pub fn revert(&mut self, bytes: usize) {
        assert!(
            bytes <= self.advanced,
            "revert by {bytes} of {}",
            self.advanced
        );
        self.count += bytes;
        self.advanced -= bytes;
        let mut left = bytes;
        while left > self.offset {
            left -= self.offset;
            self.index -= 1;
            self.offset = self.segments[self.index].len;
        }
        self.offset -= left;
    }

    /// Lowers the count to `bytes` if it is larger; returns the old count, for [`IovCursor::reexpand`].
    #[inline]
    pub fn truncate(&mut self, bytes: usize) -> usize {
        let before = self.count;
        self.count = self.count.min(bytes);
        before
    }

    /// Sets the count again after a [`IovCursor::truncate`].
    ///
    /// # Panics
    /// When the segments hold less than `bytes` from here on.
    pub fn reexpand(&mut self, bytes: usize) {
        let ahead = self.segments[self.index..]
            .iter()
            .fold(0usize, |sum, span| sum.saturating_add(span.len))
            - self.offset;
        assert!(bytes <= ahead, "reexpand to {bytes} of {ahead}");
        self.count = bytes;
    }

    /// Runs `work` on at most `bytes` of the cursor and gives the rest back whatever happens.
    pub fn truncated<R>(&mut self, bytes: usize, work: impl FnOnce(&mut Self) -> R) -> R {
        let before = self.truncate(bytes);
        let held_back = before - self.count;
        let result = work(self);
        self.count += held_back;
        result
    }

    /// Saves the position.
    #[must_use]
    pub fn mark(&self) -> Mark {
        Mark {
            index: self.index,
            offset: self.offset,
            count: self.count,
            advanced: self.advanced,
        }
    }

    /// Returns to a saved position.
    pub fn restore(&mut self, mark: Mark) {
        self.index = mark.index;
        self.offset = mark.offset;
        self.count = mark.count;
        self.advanced = mark.advanced;
    }

    /// Tells whether every address and length ahead is a multiple of `align`, a power of two.
    #[must_use]
    pub fn is_aligned(&self, align: usize) -> bool {
        self.spans_ahead()
            .all(|span| (span.addr | span.len) & (align - 1) == 0)
    }

    /// Copies up to `bytes` between the cursor and library memory at `memory`, in the cursor's direction, without
    /// resolving faults; advances by exactly what was moved. Parts of the cursor that lie in mappings of ours are copied
    /// without being touched.
    ///
    /// # Safety
    /// `memory .. memory + bytes` is mapped, resident library memory that may be accessed that way now, and no Rust
    /// reference into it exists that a concurrent write would break.
    #[inline]
    pub unsafe fn copy_nofault(&mut self, memory: *mut u8, bytes: usize) -> Progress<CopyStop> {
        // Asked once: memory that the program hands over was mapped before it did.
        if mapped::any() {
            // SAFETY: the caller's promise, passed on.
            return unsafe { self.copy_among_mappings(memory, bytes) };
        }
        // SAFETY: as above.
        unsafe { self.copy_parts(memory, bytes, |_, _, _, n| Ok(n)) }
    }

    /// As [`IovCursor::copy_nofault`], where parts of the cursor may lie in mappings of ours. Out of the way of programs
    /// without any.
    ///
    /// # Safety
    /// As of [`IovCursor::copy_nofault`].
    #[inline(never)]
    unsafe fn copy_among_mappings(&mut self, memory: *mut u8, bytes: usize) -> Progress<CopyStop> {
        let lend = |cursor: &Self, user, ours, n| match mapped::extent(user, n) {
            Extent::Plain(plain) => Ok(plain),
            // SAFETY: the caller vouches for `memory`, of which this is a part.
            Extent::Mapped(part) => Err(unsafe { cursor.copy_mapped(user, ours, part) }),
        };
        // SAFETY: the caller's promise, passed on.
        unsafe { self.copy_parts(memory, bytes, lend) }
    }

    /// Copies part by part. `lend` copies a part that must not be touched, or tells how much of it may be.
    ///
    /// # Safety
    /// As of [`IovCursor::copy_nofault`].
    #[inline(always)]
    unsafe fn copy_parts(
        &mut self,
        memory: *mut u8,
        bytes: usize,
        lend: impl Fn(&Self, usize, *mut u8, usize) -> Result<usize, Progress<CopyStop>>,
    ) -> Progress<CopyStop> {
        let mut done = 0usize;
        let want = bytes.min(self.count);
        while done < want {
            let span = self.segments[self.index];
            let n = (span.len - self.offset).min(want - done);
            if n == 0 {
                self.index += 1;
                self.offset = 0;
                continue;
            }
            let user = span.addr.wrapping_add(self.offset);
            let ours = memory.wrapping_add(done);
            let part = match lend(self, user, ours, n) {
                Err(lent) => lent,
                Ok(n) => {
                    let user = std::ptr::with_exposed_provenance_mut::<u8>(user);
                    match self.direction {
                        // SAFETY: the caller vouches for `memory`; the cursor's maker for the user's side.
                        Direction::Source => unsafe { copy_nofault(ours, user, n) },
                        // SAFETY: as above, the other way.
                        Direction::Target => unsafe { copy_nofault(user, ours, n) },
                    }
                }
            };
            // `part.done <= n <= want`, a usize.
            let moved = part.done as usize;
            self.advance(moved);
            done += moved;
            if let Some(stop) = part.stop {
                return Progress::stopped(done as u64, stop);
            }
        }
        Progress::complete(done as u64)
    }

    /// Copies up to `n` bytes between mapped memory at `user` and library memory, through the library's own address of the
    /// former: touching it could need us to be resolved. May come to less without a stop.
    ///
    /// # Safety
    /// As [`IovCursor::copy_nofault`], for `ours .. ours + n`.
    #[cold]
    unsafe fn copy_mapped(&self, user: usize, ours: *mut u8, n: usize) -> Progress<CopyStop> {
        let access = match self.direction {
            Direction::Source => Access::Read,
            Direction::Target => Access::Write,
        };
        let mut done = 0;
        let lent = mapped::find(user, |memory, range| {
            let n = n.min(range.end - user);
            memory.with_lent(user, n, access, &mut |lent, len| {
                let len = len.min(n - done);
                let ours = ours.wrapping_add(done);
                let part = match self.direction {
                    // SAFETY: the caller vouches for `ours`, the mapping for what it lends.
                    Direction::Source => unsafe { copy_nofault(ours, lent, len) },
                    // SAFETY: as above, the other way.
                    Direction::Target => unsafe { copy_nofault(lent, ours, len) },
                };
                // At most `len`, a usize.
                done += part.done as usize;
                part.done as usize
            })
        });
        let done = done as u64;
        match lent {
            Some(Lent::Fatal) => Progress::stopped(done, CopyStop::Fatal { addr: user }),
            Some(Lent::Done(_)) if done > 0 => Progress::complete(done),
            // None: unmapped a moment ago. Fault-in finds out what is there now.
            Some(Lent::Done(_) | Lent::NeedFault) | None => {
                let addr = user.wrapping_add(done as usize);
                Progress::stopped(done, CopyStop::NeedFault { addr, access })
            }
        }
    }

    /// Copies between the cursor and a slice of the library's own, like [`IovCursor::copy_nofault`].
    pub fn copy_slice_nofault(&mut self, slice: &mut [u8]) -> Progress<CopyStop> {
        // SAFETY: an exclusive slice is resident enough: its faults are the kernel's to resolve.
        unsafe { self.copy_nofault(slice.as_mut_ptr(), slice.len()) }
    }

    /// Copies between the cursor and a slice of the library's own with nothing held, waiting for pages of mappings that are
    /// not there and touching those that cannot be lent, as the program itself would.
    ///
    /// Other memory is treated as by [`IovCursor::copy_nofault`]: bring it in and call again.
    pub fn copy_slice_waiting(&mut self, slice: &mut [u8]) -> Progress<CopyStop> {
        let mut done = 0;
        loop {
            let ours = &mut slice[done..];
            let lent = self.copy_slice_nofault(ours);
            // At most the slice's length.
            done += lent.done as usize;
            let Some(stop @ CopyStop::NeedFault { addr, .. }) = lent.stop else {
                return Progress {
                    done: done as u64,
                    stop: lent.stop,
                };
            };
            let ours = &mut slice[done..];
            let ahead = self.single_segment_count().min(ours.len());
            let Extent::Mapped(part) = mapped::extent(addr, ahead) else {
                return Progress::stopped(done as u64, stop);
            };
            // A page at a time: the next one may be lent.
            let n = part.min(PAGE - addr % PAGE);
            let user = std::ptr::with_exposed_provenance_mut::<u8>(addr);
            let touched = match self.direction {
                // SAFETY: `ours` is exclusive and at least `n` long; the cursor's maker vouches for the user's side.
                Direction::Source => unsafe { copy_touching(ours.as_mut_ptr(), user, n) },
                // SAFETY: as above, the other way.
                Direction::Target => unsafe { copy_touching(user, ours.as_ptr(), n) },
            };
            self.advance(touched.done as usize);
            done += touched.done as usize;
            if let Some(stop) = touched.stop {
                return Progress::stopped(done as u64, stop);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::region_for_tests::Half;

    #[test]
    fn it_moves_across_segments_and_back() {
        let (a, b, c) = ([1u8; 10], [], [3u8; 5]);
        let bufs = [IoSlice::new(&a), IoSlice::new(&b), IoSlice::new(&c)];
        let mut cursor = IovCursor::source(&bufs);
        assert_eq!(cursor.count(), 15);
        cursor.advance(12);
        assert_eq!(cursor.single_segment_count(), 3);
        cursor.revert(4);
        assert_eq!((cursor.count(), cursor.single_segment_count()), (7, 2));
        cursor.advance(7);
        assert_eq!(cursor.single_segment_count(), 0);
        cursor.revert(15);
        let mut out = [0u8; 15];
        assert_eq!(cursor.copy_slice_nofault(&mut out).done, 15);
        assert_eq!(out, [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 3, 3, 3, 3, 3]);
    }

    #[test]
    #[should_panic(expected = "revert")]
    fn it_does_not_go_back_before_its_start() {
        let mut cursor = IovCursor::from_slice(b"abc");
        cursor.advance(1);
        cursor.revert(2);
    }

    /// on every way out.
    #[test]
    fn a_truncation_ends_with_its_scope_whatever_was_moved() {
        let mut out = [0u8; 8];
        let mut cursor = IovCursor::from_slice(b"abcdefgh");
        cursor.truncated(3, |cursor| {
            assert_eq!(cursor.copy_slice_nofault(&mut out).done, 3);
        });
        assert_eq!(cursor.count(), 5);
        let before = cursor.truncate(2);
        cursor.advance(1);
        cursor.reexpand(before - 1);
        assert_eq!(cursor.count(), 4);
    }

    ///
    #[test]
    fn t05_a_bad_segment_stops_the_copy_and_leaves_the_count_exact() {
        let half = Half::new();
        let good = [9u8; 100];
        let spans = [
            RawSpan {
                addr: good.as_ptr() as usize,
                len: 100,
            },
            RawSpan {
                addr: half.addr() + 4096,
                len: 100,
            },
            RawSpan {
                addr: good.as_ptr() as usize,
                len: 100,
            },
        ];
        // SAFETY: reading `good` and inaccessible memory.
        let mut cursor = unsafe { IovCursor::from_raw(Direction::Source, &spans) };
        let mut out = [0u8; 300];
        let copied = cursor.copy_slice_nofault(&mut out);
        assert_eq!(copied.done, 100);
        assert!(
            matches!(copied.stop, Some(CopyStop::NeedFault { addr, .. }) if addr == spans[1].addr)
        );
        assert_eq!(cursor.count(), 200);
    }
}
