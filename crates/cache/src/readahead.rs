//! Sequential read-ahead per open file: when to read what nobody has asked for yet.
//!
//! The idea is Linux's ondemand_readahead: a window that doubles while reads follow each other, and a trigger page
//! inside it at which the next window is started, so that one window is always in flight ahead of the reader. A
//! read that does not follow the one before closes the window.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

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
    /// The last page that was read; of pages that came together, the highest.
    last: AtomicU64,
    /// The lowest of them.
    first: AtomicU64,
    /// Reading this page or a later one of the window starts the next.
    trigger: AtomicU64,
    window: Mutex<Window>,
}

impl Default for ReadAhead {
    fn default() -> Self {
        Self {
            last: AtomicU64::new(NONE),
            first: AtomicU64::new(NONE),
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
        let follows = is_next(before, page);
        let backward = self.first.swap(page, Ordering::Relaxed) == page.saturating_add(1);
        let start = page + wanted;
        let mut window = self.window.lock();
        if backward && !follows {
            // Nobody is told when to start the next one: the walk comes to its end, and there it misses.
            let size =
                (window.size * 2).clamp(WINDOW_FIRST.min(window_max.max(1)), window_max.max(1));
            self.close(&mut window);
            window.size = size;
            return page.saturating_sub(size)..page;
        }
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

    /// Notes that pages `first ..= last` came into a mapping together, by a fault on one of them.
    pub fn reached(&self, first: u64, last: u64) {
        self.first.store(first, Ordering::Relaxed);
        self.last.store(last, Ordering::Relaxed);
    }

    /// Tells whether reading `page`, which is cached, starts to read ahead.
    #[must_use]
    pub fn is_due(&self, page: u64) -> bool {
        page >= self.trigger.load(Ordering::Relaxed)
    }

    /// Tells whether reading `page` continues a walk, in either direction.
    #[must_use]
    pub fn follows(&self, page: u64) -> bool {
        is_next(self.last.load(Ordering::Relaxed), page) || self.precedes(page)
    }

    /// Tells whether reading `page` continues a walk towards the beginning.
    #[must_use]
    pub fn precedes(&self, page: u64) -> bool {
        self.first.load(Ordering::Relaxed) == page.saturating_add(1)
    }

    fn close(&self, window: &mut Window) {
        window.size = 0;
        self.trigger.store(NONE, Ordering::Relaxed);
    }
}

/// Tells whether `page` comes after `before`, the last page of a walk.
fn is_next(before: u64, page: u64) -> bool {
    before == page || before == page.wrapping_sub(1) || (before == NONE && page == 0)
}

/// Walks that one mapping is told apart by at most: a merge, or a sort that works from both ends, has several.
const WALKS_MAX: usize = 8;

/// The reading patterns of one mapping, where nothing but the page tells who reads.
#[derive(Debug, Default)]
pub struct Walks {
    walks: [ReadAhead; WALKS_MAX],
    next: AtomicUsize,
}

impl Walks {
    /// Returns the walk that `page` continues, or one to begin there that was not begun lately.
    pub fn at(&self, page: u64) -> &ReadAhead {
        let continued = self.walks.iter().find(|walk| walk.follows(page));
        continued.unwrap_or_else(|| {
            let next = self.next.fetch_add(1, Ordering::Relaxed);
            &self.walks[next % WALKS_MAX]
        })
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
    fn a_walk_towards_the_beginning_is_read_ahead_of() {
        let ahead = ReadAhead::default();
        let (mut cached, mut misses) = (u64::MAX, 0);
        for page in (0..10_000).rev() {
            if page < cached {
                misses += 1;
                cached = ahead.miss(page, 1, 256).start.min(page);
            }
            ahead.reached(page, page);
        }
        assert!(misses < 50, "{misses} misses");
    }

    #[test]
    fn walks_from_both_ends_are_told_apart() {
        let walks = Walks::default();
        let mut read = 0;
        for step in 0..1000 {
            for page in [step, 9_999 - step] {
                let range = walks.at(page).miss(page, 1, 1);
                read += range.end - range.start;
                walks.at(page).reached(page, page);
            }
        }
        assert!(read >= 1990, "{read} pages read ahead by two walks");
    }

    #[test]
    fn small_reads_of_one_page_count_as_one_use() {
        let ahead = ReadAhead::default();
        assert!(ahead.hit(7, || 256).1);
        assert!(!ahead.hit(7, || 256).1);
        assert!(ahead.hit(8, || 256).1);
    }
}
