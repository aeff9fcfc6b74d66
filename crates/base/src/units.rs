//! Units as types: a byte offset is not a page number, and crossing between them is a method.

use std::fmt;
use std::ops::Range;

/// Bytes in a page; the size of a frame and the granule of every page state.
pub const PAGE_SIZE: u64 = 4096;

/// The largest file size: the largest offset that a signed 64-bit `off_t` carries.
pub const FILE_SIZE_MAX: u64 = i64::MAX as u64;

/// A position in a file, in bytes; never above [`FILE_SIZE_MAX`] when made by [`ByteOffset::new`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ByteOffset(u64);

impl ByteOffset {
    /// The start of a file.
    pub const ZERO: Self = Self(0);

    /// Makes an offset, or `None` when no file can reach it.
    #[must_use]
    pub const fn new(bytes: u64) -> Option<Self> {
        if bytes <= FILE_SIZE_MAX {
            Some(Self(bytes))
        } else {
            None
        }
    }

    /// Returns the offset in bytes.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// Returns the page that holds this byte.
    #[must_use]
    pub const fn page(self) -> PageIndex {
        PageIndex(self.0 / PAGE_SIZE)
    }

    /// Returns the position inside its page, in bytes.
    #[must_use]
    pub const fn in_page(self) -> usize {
        (self.0 % PAGE_SIZE) as usize
    }

    /// Moves forward, or `None` when no file can reach that far.
    #[must_use]
    pub const fn checked_add(self, bytes: u64) -> Option<Self> {
        match self.0.checked_add(bytes) {
            Some(sum) => Self::new(sum),
            None => None,
        }
    }
}

impl fmt::Display for ByteOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A page of a file, counted from its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct PageIndex(pub u64);

impl PageIndex {
    /// Returns the offset of the page's first byte.
    ///
    /// Pages past the largest file size saturate there: no byte of such a page exists.
    #[must_use]
    pub const fn start(self) -> ByteOffset {
        match self.0.checked_mul(PAGE_SIZE) {
            Some(bytes) if bytes <= FILE_SIZE_MAX => ByteOffset(bytes),
            _ => ByteOffset(FILE_SIZE_MAX),
        }
    }

    /// Returns the next page.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for PageIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "page {}", self.0)
    }
}

/// A number of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct PageCount(pub u64);

impl PageCount {
    /// Counts the pages that hold `bytes` bytes, the last one perhaps in part.
    #[must_use]
    pub const fn covering(bytes: u64) -> Self {
        Self(bytes.div_ceil(PAGE_SIZE))
    }

    /// Returns the size in bytes; saturates.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.0.saturating_mul(PAGE_SIZE)
    }
}

/// Returns the pages that hold at least one byte of `offset .. offset + bytes`.
#[must_use]
pub fn page_span(offset: u64, bytes: u64) -> Range<u64> {
    if bytes == 0 {
        let page = offset / PAGE_SIZE;
        return page..page;
    }
    offset / PAGE_SIZE..offset.saturating_add(bytes).div_ceil(PAGE_SIZE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_offset_beyond_the_largest_file_is_refused() {
        assert!(ByteOffset::new(FILE_SIZE_MAX).is_some());
        assert!(ByteOffset::new(FILE_SIZE_MAX + 1).is_none());
        assert!(
            ByteOffset::new(FILE_SIZE_MAX)
                .and_then(|o| o.checked_add(1))
                .is_none()
        );
    }

    #[test]
    fn a_span_of_pages_covers_its_first_and_last_byte() {
        assert_eq!(page_span(0, 0), 0..0);
        assert_eq!(page_span(4095, 2), 0..2);
        assert_eq!(page_span(4096, 4096), 1..2);
        assert_eq!(page_span(100, 4096), 0..2);
    }

    #[test]
    fn a_page_past_the_largest_file_starts_at_its_end() {
        assert_eq!(PageIndex(u64::MAX).start().get(), FILE_SIZE_MAX);
        assert_eq!(PageIndex(3).start().get(), 12288);
    }
}
