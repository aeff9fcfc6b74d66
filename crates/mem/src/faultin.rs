//! Bringing user memory in, with nothing held.
//!
//! Memory of our own mappings is recognised by its address and brought in by a direct call, for reading or for writing;
//! nothing is stored to it. Other memory is touched, or populated by the kernel.
//!
//! These run only after a copy came to nothing; [`calls`] counts them, and in the ordinary case it stays zero.
//! None of them promises residency afterwards, so every loop around them is bounded by its caller.

use pinfold_base::counters::Counter;
use pinfold_base::rank::rule_zero;
use rustix::mm::{Advice, madvise};

use crate::copy::{Access, copy_nofault};
use crate::iov::{Direction, IovCursor};
use crate::mapped::{self, Extent};
use crate::span::RawSpan;

const PAGE: usize = 4096;

static CALLS: Counter = Counter::new();

/// Returns how often memory had to be brought in, over all volumes of the process.
#[must_use]
pub fn calls() -> u64 {
    CALLS.get()
}

/// Makes memory readable; returns the bytes NOT made accessible (0: all of them, `span.len`: none).
///
/// The first access is at the span's first byte itself, the next at each following page's start; it ends at the
/// first that fails. A range that wraps past the end of the address space is accessible up to there only.
#[must_use]
pub fn fault_in_readable(span: RawSpan) -> usize {
    walk(span, Access::Read, |addr| {
        let mut byte = 0u8;
        // SAFETY: reads one byte of memory the caller named as his buffer, into a local.
        let probe =
            unsafe { copy_nofault(&raw mut byte, std::ptr::with_exposed_provenance(addr), 1) };
        probe.done == 1
    })
}

/// Makes memory writeable by storing zero bytes; returns the bytes NOT made accessible.
///
/// Destroys data: for memory whose contents nobody needs.
#[must_use]
pub fn fault_in_writeable(span: RawSpan) -> usize {
    walk(span, Access::Write, |addr| {
        // SAFETY: the caller gave this memory away to be overwritten.
        let probe = unsafe {
            copy_nofault(
                std::ptr::with_exposed_provenance_mut(addr),
                [0u8].as_ptr(),
                1,
            )
        };
        probe.done == 1
    })
}

/// Makes memory writeable without storing anything; returns the bytes NOT made accessible.
///
/// Safe on memory that others change at the same time.
#[must_use]
pub fn fault_in_safe_writeable(span: RawSpan) -> usize {
    walk(span, Access::Write, |addr| {
        let page = std::ptr::with_exposed_provenance_mut(addr & !(PAGE - 1));
        // SAFETY: MADV_POPULATE_WRITE prefaults the page and changes no contents.
        unsafe { madvise(page, PAGE, Advice::LinuxPopulateWrite) }.is_ok()
    })
}

/// Visits the first byte and then each page start until `probe` fails; returns what is left then.
///
/// Mapped memory is not probed: its mapping does what a fault would, without one.
fn walk(span: RawSpan, access: Access, probe: impl Fn(usize) -> bool) -> usize {
    rule_zero("fault-in");
    CALLS.bump();
    let mut at = 0;
    while at < span.len {
        let Some(addr) = span.addr.checked_add(at) else {
            return span.len - at;
        };
        if let Some((part, short)) = fault_in_mapped(addr, span.len - at, access) {
            at += part - short;
            if short > 0 {
                return span.len - at;
            }
            continue;
        }
        if !probe(addr) {
            return span.len - at;
        }
        at += PAGE - addr % PAGE;
    }
    0
}

/// Brings in what a mapping has of `len` bytes at `addr`: that many bytes, and how many of them were not made accessible.
/// `None` when the address is no mapping's.
fn fault_in_mapped(addr: usize, len: usize, access: Access) -> Option<(usize, usize)> {
    mapped::find(addr, |memory, range| {
        let part = len.min(range.end - addr);
        (part, memory.fault_in(addr, part, access).min(part))
    })
}

/// Brings in the next `bytes` of a cursor for its direction; returns the bytes NOT made accessible.
///
/// Empty segments are skipped, the first one that falls short ends it, and what a request asks beyond the cursor
/// counts as not accessible.
#[must_use]
pub fn fault_in_cursor(cursor: &IovCursor<'_>, bytes: usize) -> usize {
    let mut left = bytes;
    for span in cursor.spans_ahead() {
        if left == 0 {
            break;
        }
        let part = RawSpan {
            addr: span.addr,
            len: span.len.min(left),
        };
        let short = match cursor.direction() {
            Direction::Source => fault_in_readable(part),
            Direction::Target => fault_in_safe_writeable(part),
        };
        left -= part.len - short;
        if short > 0 {
            break;
        }
    }
    left
}

/// Brings in what of the next `bytes` of a cursor lies in mappings and touches no other memory; false when some of it
/// could not be.
#[must_use]
pub fn fault_in_cursor_mapped(cursor: &IovCursor<'_>, bytes: usize) -> bool {
    let access = match cursor.direction() {
        Direction::Source => Access::Read,
        Direction::Target => Access::Write,
    };
    CALLS.bump();
    let mut left = bytes;
    for span in cursor.spans_ahead() {
        let len = span.len.min(left);
        let mut at = 0;
        while at < len {
            let addr = span.addr.wrapping_add(at);
            at += match mapped::extent(addr, len - at) {
                Extent::Plain(plain) => plain,
                Extent::Mapped(_) => match fault_in_mapped(addr, len - at, access) {
                    Some((part, 0)) => part,
                    // Short of it, or unmapped since it was looked up.
                    Some(_) | None => return false,
                },
            };
        }
        left -= len;
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::region_for_tests::Half;

    #[test]
    fn the_first_bad_page_ends_it() {
        let half = Half::new();
        let span = |at: usize, len| RawSpan {
            addr: half.addr() + at,
            len,
        };
        assert_eq!(fault_in_readable(span(0, 4096)), 0);
        assert_eq!(fault_in_readable(span(100, 8000)), 8000 - 3996);
        assert_eq!(fault_in_readable(span(4096, 10)), 10);
        assert_eq!(fault_in_safe_writeable(span(100, 8000)), 8000 - 3996);
        assert_eq!(fault_in_writeable(span(4000, 200)), 104);
        assert_eq!(fault_in_readable(span(4096, 0)), 0);
    }

    /// the first byte asked for is the one a copy stopped at, which a page's first byte may be no measure of.
    #[test]
    fn a2_the_very_byte_is_looked_at_and_then_each_page_s_first() {
        let asked = std::cell::RefCell::new(Vec::new());
        let (page, good) = (7 << 30, (7 << 30) + 16);
        let probe = |addr: usize| {
            asked.borrow_mut().push(addr);
            addr < good || addr >= page + PAGE
        };
        let span = |addr, len| RawSpan { addr, len };
        // Sixteen good bytes, then bad ones up to the next page: a record begun again from its start would never end.
        assert_eq!(walk(span(page, 64), Access::Read, probe), 0);
        assert_eq!(walk(span(good, 48), Access::Read, probe), 48);
        let next = walk(span(good + PAGE, 2 * PAGE), Access::Read, probe);
        assert_eq!(next, 0);
        let pages = [2, 3].map(|number| page + number * PAGE);
        assert_eq!(
            asked.take(),
            [&[page, good, good + PAGE][..], &pages].concat()
        );
    }

    #[test]
    fn a_range_that_wraps_is_not_accessible() {
        let span = RawSpan {
            addr: usize::MAX - 10,
            len: 100,
        };
        assert_eq!(fault_in_readable(span), 100);
    }

    /// nothing is stored to memory that others store to at the same time.
    #[test]
    fn a6_fault_in_for_writing_keeps_live_bytes() {
        let mut live = vec![7u8; 10000];
        let span = RawSpan {
            addr: live.as_mut_ptr() as usize,
            len: live.len(),
        };
        assert_eq!(fault_in_safe_writeable(span), 0);
        assert!(live.iter().all(|&b| b == 7));
    }
}
