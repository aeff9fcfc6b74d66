//! Sequential read-ahead per open file: when to read what nobody has asked for yet.
//!
//! The idea is Linux's ondemand_readahead: a window that doubles while reads follow each other, and a trigger page
//! inside it at which the next window is started, so that one window is always in flight ahead of the reader. A
//! read that does not follow the one before closes the window.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use pinfold_base::sync::Mutex;

const WINDOW_FIRST: u64 = 8;
const NONE: u64 = u64::MAX;

#[derive(Debug)]
struct Window {
    /// The next page that no window covers yet.
    end: u64,
    /// The size of the newest window, in pages; 0: closed.
    size: u64,
}

/// The reading pattern of one open file.
#[derive(Debug)]
pub struct ReadAhead {
    /// The last page that was read.
    last: AtomicU64,
    /// Reading this page or a later one of the window starts the next.
    trigger: AtomicU64,
    window: Mutex<Window>,
}

impl Default for ReadAhead {
    fn default() -> Self {
        Self {
            last: AtomicU64::new(NONE),
            trigger: AtomicU64::new(NONE),
            window: Mutex::new(Window { end: 0, size: 0 }),
        }
    }
}

impl ReadAhead {
    /// Notes that `page` is read and was cached; returns pages to start reading, if it is time.
    ///
    /// The second value tells whether this use counts as a new one: small reads that walk through one page do not make
    /// it hot.
    #[inline]
    pub fn hit(&self, page: u64, window_max: impl FnOnce() -> u64) -> (Option<Range<u64>>, bool) {
        let before = self.last.load(Ordering::Relaxed);
        if before != page {
            self.last.store(page, Ordering::Relaxed);
        }
        let ahead = if page >= self.trigger.load(Ordering::Relaxed) {
            self.advance(page, window_max())
        } else {
            None
        };
        (ahead, before != page)
    }

    #[cold]
    fn advance(&self, page: u64, window_max: u64) -> Option<Range<u64>> {
        let mut window = self.window.lock();
        if window.size == 0 || page < self.trigger.load(Ordering::Relaxed) {
            return None;
        }
        if page >= window.end + window.size {
            // Far from where the window is: another reader, or a seek.
            self.close(&mut window);
            return None;
        }
        let start = window.end.max(page + 1);
        window.size = (window.size * 2).min(window_max).max(1);
        window.end = start + window.size;
        self.trigger.store(start, Ordering::Relaxed);
        Some(start..window.end)
    }

    /// Notes that `page` is read, with `wanted` pages of the same request from it on, and was not cached; returns the
    /// pages to read beyond the request.
    pub fn miss(&self, page: u64, wanted: u64, window_max: u64) -> Range<u64> {
        let before = self.last.swap(page + wanted - 1, Ordering::Relaxed);
        let follows =
            before == page || before == page.wrapping_sub(1) || (before == NONE && page == 0);
        let start = page + wanted;
        let mut window = self.window.lock();
        if !follows {
            self.close(&mut window);
            return start..start;
        }
        window.size = (window.size * 2)
            .max(wanted)
            .max(WINDOW_FIRST)
            .min(window_max.max(1));
        window.end = start + window.size;
        self.trigger.store(start, Ordering::Relaxed);
        start..window.end
    }

    fn close(&self, window: &mut Window) {
        window.size = 0;
        self.trigger.store(NONE, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sequential_reader_finds_every_page_read_ahead() {
        let ahead = ReadAhead::default();
        let mut cached = 0;
        let mut misses = 0;
        for page in 0..10_000 {
            if page < cached {
                if let (Some(range), _) = ahead.hit(page, || 256) {
                    assert_eq!(range.start, cached);
                    cached = range.end;
                }
            } else {
                misses += 1;
                cached = ahead.miss(page, 1, 256).end;
            }
        }
        assert_eq!(misses, 1);
    }

    #[test]
    fn a_random_reader_reads_nothing_ahead() {
        let ahead = ReadAhead::default();
        for page in [500, 20, 9000, 77, 501, 8] {
            assert!(ahead.miss(page, 1, 256).is_empty());
        }
    }

    #[test]
    fn a_seek_closes_the_window() {
        let ahead = ReadAhead::default();
        assert!(!ahead.miss(0, 4, 256).is_empty());
        assert!(ahead.miss(100_000, 1, 256).is_empty());
        assert_eq!(ahead.hit(100_000, || 256).0, None);
        assert!(!ahead.miss(100_001, 1, 256).is_empty());
    }

    #[test]
    fn small_reads_of_one_page_count_as_one_use() {
        let ahead = ReadAhead::default();
        assert!(ahead.hit(7, || 256).1);
        assert!(!ahead.hit(7, || 256).1);
        assert!(ahead.hit(8, || 256).1);
    }
}
