//! A bit for each of very many pages: memory is taken for those alone that are set.
//!
//! *Owns*: the bits and their memory.
//!
//! *Does not own*: what a bit says, and who may change it when.
//!
//! *Locking*: none. Bits are atomic; who relies on one holds a lock of his own over what it says. Nothing but
//! [`PageBits::ensure`] allocates, so a signal handler may set bits.
//!
//! ```text
//!  segment 0   the first 512 bits, in place
//!  segment 1   up to 8192, in the heap
//!  segment k   16 times as many as all before it, in a mapping of its own: address space until a bit is set
//! ```

use std::ops::Range;
use std::ptr::NonNull;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use pinfold_base::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

const WORD: u64 = u64::BITS as u64;
/// Words that a set of bits has in place.
const FIRST_WORDS: usize = 8;
/// Each segment ends at so many times the bits of those before it.
const GROWTH_LOG2: u32 = 4;
/// Segments behind the first: enough for every page that an address space of 57 bits has room for.
const SEGMENTS_MAX: usize = 9;
/// Words of the largest segment in the heap.
const HEAP_WORDS_MAX: usize = 128;

/// A set of page numbers.
///
/// No order between bits is promised: they are guarded, as what they speak of, by the caller's locks.
pub struct PageBits {
    first: [AtomicU64; FIRST_WORDS],
    rest: [OnceLock<Words>; SEGMENTS_MAX],
}

impl std::fmt::Debug for PageBits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PageBits").finish_non_exhaustive()
    }
}

impl PageBits {
    /// Makes an empty set with room for pages below `end`; takes no time in proportion to it.
    ///
    /// # Errors
    /// As [`PageBits::ensure`].
    pub fn new(end: u64) -> Result<Self, Errno> {
        let bits = Self {
            first: [const { AtomicU64::new(0) }; FIRST_WORDS],
            rest: [const { OnceLock::new() }; SEGMENTS_MAX],
        };
        bits.ensure(end)?;
        Ok(bits)
    }

    /// Makes room for pages below `end`.
    ///
    /// # Errors
    /// `ENOMEM`: no address space. `EOVERFLOW`: more pages than any address space has.
    pub fn ensure(&self, end: u64) -> Result<(), Errno> {
        for (segment, words) in (1..).zip(&self.rest) {
            let place = words_of(segment);
            if end <= place.start as u64 * WORD {
                return Ok(());
            }
            if words.get().is_none() {
                // Of two that do this at once, one has worked in vain.
                let _ = words.set(Words::new(place.len())?);
            }
        }
        if end > words_of(SEGMENTS_MAX).end as u64 * WORD {
            return Err(Errno::EOVERFLOW);
        }
        Ok(())
    }

    /// Tells whether a page is in the set.
    #[inline]
    #[must_use]
    pub fn contains(&self, page: u64) -> bool {
        let word = self.word((page / WORD) as usize);
        word.is_some_and(|word| word.load(Ordering::Relaxed) & (1 << (page % WORD)) != 0)
    }

    /// Returns from the first to after the last page of a range that is in the set.
    #[must_use]
    pub fn bounds(&self, pages: Range<u64>) -> Option<Range<u64>> {
        let mut bounds = None;
        self.runs(pages, |run| {
            let start = bounds
                .as_ref()
                .map_or(run.start, |bounds: &Range<u64>| bounds.start);
            bounds = Some(start..run.end);
        });
        bounds
    }

    /// Tells `found` the pages of a range that are in the set, as ascending runs; one run may be told in several pieces.
    pub fn runs(&self, pages: Range<u64>, mut found: impl FnMut(Range<u64>)) {
        self.each_word(pages, |base, mask, word| {
            let mut left = word.load(Ordering::Relaxed) & mask;
            while left != 0 {
                let start = left.trailing_zeros();
                let len = (left >> start).trailing_ones();
                found(base + u64::from(start)..base + u64::from(start + len));
                left &= u64::MAX.checked_shl(start + len).unwrap_or(0);
            }
        });
    }

    /// Puts the pages of a range in, as far as there is room ([`PageBits::ensure`]).
    pub fn insert(&self, pages: Range<u64>) {
        self.each_word(pages, |_, mask, word| {
            // A look first: words that are set already stay shared between processors.
            if word.load(Ordering::Relaxed) & mask != mask {
                word.fetch_or(mask, Ordering::Relaxed);
            }
        });
    }

    /// Takes the pages of a range out.
    pub fn remove(&self, pages: Range<u64>) {
        self.each_word(pages, |_, mask, word| {
            // A look first: a store would take memory where no bit was ever set.
            if word.load(Ordering::Relaxed) & mask != 0 {
                word.fetch_and(!mask, Ordering::Relaxed);
            }
        });
    }

    /// Visits the words of a range that there are: the number of the word's first page, which of its bits are meant, the word.
    fn each_word(&self, pages: Range<u64>, mut visit: impl FnMut(u64, u64, &AtomicU64)) {
        let mut page = pages.start;
        while page < pages.end {
            let base = page - page % WORD;
            let end = pages.end.min(base.saturating_add(WORD));
            let Some(word) = self.word((page / WORD) as usize) else {
                return;
            };
            let ones = u64::MAX >> (WORD - (end - page));
            visit(base, ones << (page - base), word);
            page = end;
        }
    }

    #[inline]
    fn word(&self, at: usize) -> Option<&AtomicU64> {
        if at < FIRST_WORDS {
            return Some(&self.first[at]);
        }
        let segment = segment_of(at);
        let words = self.rest.get(segment - 1)?.get()?;
        words.as_slice().get(at - words_of(segment).start)
    }
}

/// Returns the segment that has a word.
#[inline]
fn segment_of(word: usize) -> usize {
    let doublings = usize::BITS - (word / FIRST_WORDS).leading_zeros();
    doublings.div_ceil(GROWTH_LOG2) as usize
}

/// Returns the words that a segment behind the first has.
#[inline]
fn words_of(segment: usize) -> Range<usize> {
    let end = |segment: usize| FIRST_WORDS << (GROWTH_LOG2 as usize * segment);
    end(segment - 1)..end(segment)
}

/// The words of one segment, all zero at first.
enum Words {
    Heap(Box<[AtomicU64]>),
    Mapped(Untouched),
}

impl Words {
    fn new(words: usize) -> Result<Self, Errno> {
        if words <= HEAP_WORDS_MAX {
            return Ok(Self::Heap((0..words).map(|_| AtomicU64::new(0)).collect()));
        }
        Untouched::new(words).map(Self::Mapped)
    }

    #[inline]
    fn as_slice(&self) -> &[AtomicU64] {
        match self {
            Self::Heap(words) => words,
            Self::Mapped(words) => words.as_slice(),
        }
    }
}

/// Zeroed words in private memory that the kernel gives page by page, at the first store.
struct Untouched {
    base: NonNull<AtomicU64>,
    words: usize,
}

// SAFETY: memory of our own, of which nothing but atomics is handed out; unmapping is a system call that any thread may make.
unsafe impl Send for Untouched {}
// SAFETY: as for Send.
unsafe impl Sync for Untouched {}

impl Untouched {
    fn new(words: usize) -> Result<Self, Errno> {
        let errno = |raw: rustix::io::Errno| Errno::from_raw(raw.raw_os_error());
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        let bytes = words * size_of::<AtomicU64>();
        // SAFETY: a fresh mapping at an address of the kernel's choice replaces nothing.
        let addr = unsafe { mmap_anonymous(std::ptr::null_mut(), bytes, prot, flags) };
        let addr = addr.map_err(errno)?;
        // A huge page would be 512 times the memory that one bit takes. Kernels without them refuse the advice.
        // SAFETY: advice on our own mapping.
        let _ = unsafe { madvise(addr, bytes, Advice::LinuxNoHugepage) };
        let base = NonNull::new(addr.cast()).ok_or(Errno::ENOMEM)?;
        Ok(Self { base, words })
    }

    #[inline]
    fn as_slice(&self) -> &[AtomicU64] {
        // SAFETY: mapped in `new`, page-aligned, of this length, until `self` is dropped; all zeros are valid atomics.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.words) }
    }
}

impl Drop for Untouched {
    fn drop(&mut self) {
        let bytes = self.words * size_of::<AtomicU64>();
        // SAFETY: mapped in `new` with this length; slices of it borrow `self`.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), bytes) };
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use crate::uffd::{ScanFor, scan};

    fn set(bits: &PageBits, pages: Range<u64>) -> Vec<u64> {
        let mut set = Vec::new();
        bits.runs(pages, |run| set.extend(run));
        set
    }

    #[test]
    fn pages_are_in_the_set_from_insert_to_remove() {
        let bits = PageBits::new(3_000_000).unwrap();
        // Within a word, over several, at the borders of segments, in each kind of memory.
        for pages in [
            3..5_u64,
            60..200,
            0..64,
            500..530,
            8190..8200,
            131_000..131_200,
            2_097_151..2_097_153,
        ] {
            let wide = pages.start.saturating_sub(100)..pages.end + 100;
            bits.insert(pages.clone());
            assert_eq!(set(&bits, wide.clone()), pages.clone().collect::<Vec<_>>());
            assert_eq!(bits.bounds(wide.clone()), Some(pages.clone()));
            assert!(bits.contains(pages.start) && bits.contains(pages.end - 1));
            assert!(!bits.contains(pages.end));
            let middle = pages.start + 1..pages.end - 1;
            bits.remove(middle.clone());
            assert_eq!(set(&bits, wide.clone()), [pages.start, pages.end - 1]);
            assert_eq!(bits.bounds(middle), None);
            bits.remove(pages);
            assert_eq!(bits.bounds(wide), None);
        }
    }

    #[test]
    fn room_is_made_where_none_was_and_what_was_set_stays() {
        let bits = PageBits::new(1).unwrap();
        bits.insert(0..10_000);
        assert_eq!(bits.bounds(0..u64::MAX), Some(0..512));
        bits.ensure(10_000).unwrap();
        assert_eq!(set(&bits, 0..10_000).len(), 512);
        bits.insert(9_000..10_000);
        bits.ensure(1 << 30).unwrap();
        assert_eq!(bits.bounds(0..10_000), Some(0..10_000));
        assert_eq!(set(&bits, 0..10_000).len(), 1512);
        assert_eq!(bits.ensure(u64::MAX), Err(Errno::EOVERFLOW));
    }

    #[test]
    fn a_terabyte_of_pages_takes_memory_where_bits_are_set_alone() {
        let pages = (1 << 40) / 4096;
        let bits = PageBits::new(pages).unwrap();
        for page in [0, 100_000_000, pages - 1] {
            bits.insert(page..page + 1);
            bits.remove(page + 1000..page + 2000);
        }
        let mut resident = 0;
        for words in bits.rest.iter().filter_map(OnceLock::get) {
            if let Words::Mapped(words) = words {
                let start = words.base.as_ptr().addr();
                let all = start..start + words.words * size_of::<AtomicU64>();
                scan(all, ScanFor::Present, |run| resident += run.len()).unwrap();
            }
        }
        // A page each, and one of zeros for a look at the next.
        assert!(resident <= 4 * 4096, "{resident} bytes");
        assert!(bits.contains(pages - 1) && !bits.contains(pages - 2));
    }
}
