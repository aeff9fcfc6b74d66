//! Memory that others may write: never a `&[u8]`, always a span that is copied through.
//!
//! A [`RawSpan`] is plain data: an address range that somebody vouches for. An [`IoSpan`] is memory that the
//! kernel or a store may read and write while a transfer runs; [`Segments`] is a list of them together with
//! what keeps them mapped.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::any::Any;
use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;

use smallvec::SmallVec;

/// An address range: plain data, touched by nobody who has not been promised that he may.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct RawSpan {
    /// First byte.
    pub addr: usize,
    /// Length in bytes.
    pub len: usize,
}

/// Memory that a transfer may read or write: resident, mapped, and not moved until the transfer completes.
///
/// Reached only by reference from the [`Segments`] that keep it alive.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct IoSpan {
    addr: NonNull<u8>,
    len: usize,
}

// SAFETY: an IoSpan is an address and a length; whoever made it promised that any thread may access the memory
// until the transfer ends (`Segments::new`), and all accesses here are raw copies, never references.
unsafe impl Send for IoSpan {}
// SAFETY: as for Send; shared access performs raw copies only.
unsafe impl Sync for IoSpan {}

impl fmt::Debug for IoSpan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IoSpan({:p}+{})", self.addr, self.len)
    }
}

impl IoSpan {
    /// Returns the first byte's address, for a system call.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.addr.as_ptr()
    }

    /// Returns the length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Tells whether the span is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies from the span's byte `at` on into `into`, as far as both reach; returns the bytes copied.
    pub fn copy_to(&self, at: usize, into: &mut [u8]) -> usize {
        let n = self.len.saturating_sub(at).min(into.len());
        if n > 0 {
            // SAFETY: at < len because n > 0, so the sum stays inside the span.
            let from = unsafe { self.as_ptr().add(at) };
            // SAFETY: `from .. from + n` lies in the span, which its Segments keep mapped; `into` is exclusive.
            unsafe { std::ptr::copy(from, into.as_mut_ptr(), n) };
        }
        n
    }

    /// Copies `from` to the span's byte `at` on, as far as both reach; returns the bytes copied.
    pub fn copy_from(&self, at: usize, from: &[u8]) -> usize {
        let n = self.len.saturating_sub(at).min(from.len());
        if n > 0 {
            // SAFETY: at < len because n > 0, so the sum stays inside the span.
            let to = unsafe { self.as_ptr().add(at) };
            // SAFETY: `to .. to + n` lies in the span, which its Segments keep mapped and let us write.
            unsafe { std::ptr::copy(from.as_ptr(), to, n) };
        }
        n
    }
}

/// Spans in file order for one transfer, with what keeps their memory alive.
#[derive(Clone)]
pub struct Segments {
    spans: SmallVec<[IoSpan; 4]>,
    bytes: usize,
    keep: Arc<dyn Any + Send + Sync>,
}

impl fmt::Debug for Segments {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.spans).finish()
    }
}

impl Segments {
    /// Makes an empty list over memory that `keep` keeps mapped.
    #[must_use]
    pub fn new(keep: Arc<dyn Any + Send + Sync>) -> Self {
        Self {
            spans: SmallVec::new(),
            bytes: 0,
            keep,
        }
    }

    /// Makes a list of one span that covers the first `len` bytes of `buf`.
    #[must_use]
    pub fn of_buf(buf: &Arc<AlignedBuf>, len: usize) -> Self {
        let mut segments = Self::new(Arc::clone(buf) as Arc<dyn Any + Send + Sync>);
        let len = len.min(buf.len());
        // SAFETY: the allocation lives as long as `keep`, which is this buf, and is written only through copies.
        unsafe { segments.push_raw(buf.as_ptr(), len) };
        segments
    }

    /// Appends memory; merges with the last span when the two touch.
    ///
    /// # Safety
    /// `addr .. addr + len` stays mapped, readable and writable while this list (or a clone) exists, and nobody
    /// holds a Rust reference into it that a concurrent write would break.
    pub unsafe fn push_raw(&mut self, addr: *mut u8, len: usize) {
        let Some(addr) = NonNull::new(addr) else {
            return;
        };
        if len == 0 {
            return;
        }
        self.bytes += len;
        if let Some(last) = self.spans.last_mut()
            && last.addr.as_ptr() as usize + last.len == addr.as_ptr() as usize
        {
            last.len += len;
            return;
        }
        self.spans.push(IoSpan { addr, len });
    }

    /// Returns the spans in file order.
    #[must_use]
    pub fn spans(&self) -> &[IoSpan] {
        &self.spans
    }

    /// Tells whether another list keeps what this one keeps: a copy of it, or a part.
    pub(crate) fn is_shared(&self) -> bool {
        Arc::strong_count(&self.keep) > 1
    }

    /// Returns the sum of the spans' lengths, in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Returns bytes `from .. from + len` of the list as a list of their own, clipped to what there is.
    #[must_use]
    pub fn slice(&self, from: usize, len: usize) -> Self {
        let mut part = Self::new(Arc::clone(&self.keep));
        let (mut skip, mut left) = (from, len);
        for span in &self.spans {
            if left == 0 {
                break;
            }
            if skip >= span.len {
                skip -= span.len;
                continue;
            }
            let n = (span.len - skip).min(left);
            // SAFETY: skip < span.len, so the address stays inside the span.
            let addr = unsafe { span.as_ptr().add(skip) };
            // SAFETY: a part of a span of this list, kept mapped by the same `keep`.
            unsafe { part.push_raw(addr, n) };
            skip = 0;
            left -= n;
        }
        part
    }

    /// Copies out from byte `at` of the list on; returns the bytes copied.
    pub fn copy_to(&self, at: usize, into: &mut [u8]) -> usize {
        let (mut skip, mut done) = (at, 0);
        for span in &self.spans {
            if skip >= span.len {
                skip -= span.len;
                continue;
            }
            done += span.copy_to(skip, &mut into[done..]);
            skip = 0;
            if done == into.len() {
                break;
            }
        }
        done
    }

    /// Copies in from byte `at` of the list on; returns the bytes copied.
    pub fn copy_from(&self, at: usize, from: &[u8]) -> usize {
        let (mut skip, mut done) = (at, 0);
        for span in &self.spans {
            if skip >= span.len {
                skip -= span.len;
                continue;
            }
            done += span.copy_from(skip, &from[done..]);
            skip = 0;
            if done == from.len() {
                break;
            }
        }
        done
    }

    /// Returns the bytes as a vector: for stores that keep their own copy.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.bytes];
        self.copy_to(0, &mut bytes);
        bytes
    }
}

/// A page-aligned, zeroed buffer of the library's own: bounce copies, tails, tests.
pub struct AlignedBuf {
    addr: NonNull<u8>,
    len: usize,
}

// SAFETY: the buffer owns its allocation; all access is by raw copy or through `&mut self`.
unsafe impl Send for AlignedBuf {}
// SAFETY: as for Send; shared access is by raw copy only.
unsafe impl Sync for AlignedBuf {}

impl fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AlignedBuf({} bytes)", self.len)
    }
}

impl AlignedBuf {
    const ALIGN: usize = 4096;

    /// Allocates `len` zero bytes (at least one page).
    #[must_use]
    pub fn zeroed(len: usize) -> Self {
        let layout = Self::layout(len);
        // SAFETY: the layout has a non-zero size (`layout` rounds up to a page).
        let raw = unsafe { alloc_zeroed(layout) };
        let Some(addr) = NonNull::new(raw) else {
            std::alloc::handle_alloc_error(layout)
        };
        Self {
            addr,
            len: layout.size(),
        }
    }

    fn layout(len: usize) -> Layout {
        let size = len.max(1).next_multiple_of(Self::ALIGN);
        Layout::from_size_align(size, Self::ALIGN).expect("a buffer is far smaller than isize::MAX")
    }

    /// Returns the first byte's address.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.addr.as_ptr()
    }

    /// Returns the length in bytes: what was asked for, rounded up to pages.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Tells whether the buffer is empty; it never is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Returns the bytes, when nobody else can reach them.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: `&mut self` is exclusive, and a Segments over this buffer holds an Arc, which then could not
        // give out `&mut self`.
        unsafe { std::slice::from_raw_parts_mut(self.addr.as_ptr(), self.len) }
    }
}

impl AsMut<[u8]> for AlignedBuf {
    fn as_mut(&mut self) -> &mut [u8] {
        self.as_mut_slice()
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        // SAFETY: allocated in `zeroed` with the same layout: `len` is that layout's size.
        unsafe { dealloc(self.addr.as_ptr(), Self::layout(self.len)) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn touching_spans_merge_and_a_slice_crosses_their_borders() {
        let buf = Arc::new(AlignedBuf::zeroed(8192));
        let mut segments = Segments::new(Arc::clone(&buf) as Arc<dyn Any + Send + Sync>);
        for (at, len) in [(0, 100), (100, 100), (4096, 50)] {
            let addr = buf.as_ptr().wrapping_add(at);
            // SAFETY: inside `buf`, which `keep` holds.
            unsafe { segments.push_raw(addr, len) };
        }
        assert_eq!(segments.spans().len(), 2);
        assert_eq!(segments.bytes(), 250);
        let pattern: Vec<u8> = (0..250).map(|i| i as u8).collect();
        assert_eq!(segments.copy_from(0, &pattern), 250);
        assert_eq!(segments.slice(190, 20).to_vec(), pattern[190..210]);
        assert_eq!(segments.slice(240, 100).bytes(), 10);
        let mut tail = [0; 10];
        assert_eq!(segments.copy_to(245, &mut tail), 5);
    }
}
