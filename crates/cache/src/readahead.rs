//! Sequential read-ahead per open file: when to read what nobody has asked for yet.
//!
//! The idea is Linux's ondemand_readahead: a window that doubles while reads follow each other, and a trigger page
//! inside it at which the next window is started, so that one window is always in flight ahead of the reader. A
//! read that does not follow the one before closes the window.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use pinfold_base::sync::Mutex;

use crate::strides::Strides;

const WINDOW_FIRST: u64 = 8;
const NONE: u64 = u64::MAX;

#[derive(Debug)]
struct Window {
    /// The first page that a window covers.
    start: u64,
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
    /// Reading a page below this one starts the next, of a walk towards the beginning.
    trigger_below: AtomicU64,
    /// Faults that have followed each other.
    steps: AtomicU64,
    /// The page that has set off a trigger and whose window somebody is to start ([`ReadAhead::claim`]).
    claimed: AtomicU64,
    window: Mutex<Window>,
}

impl Default for ReadAhead {
    fn default() -> Self {
        Self {
            last: AtomicU64::new(NONE),
            first: AtomicU64::new(NONE),
            trigger: AtomicU64::new(NONE),
            trigger_below: AtomicU64::new(0),
            steps: AtomicU64::new(0),
            claimed: AtomicU64::new(NONE),
            window: Mutex::new(Window {
                start: 0,
                end: 0,
                size: 0,
            }),
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
        let ahead = if self.is_due(page) && self.claimed.load(Ordering::Relaxed) == NONE {
            self.advance(page, window_max())
        } else {
            None
        };
        (ahead, before != page)
    }

    /// Opens the next window because `page` is read.
    #[cold]
    fn advance(&self, page: u64, window_max: u64) -> Option<Range<u64>> {
        let mut window = self.window.lock();
        if window.size == 0 || !self.is_due(page) {
            return None;
        }
        self.open_next(&mut window, page, window_max)
    }

    fn open_next(&self, window: &mut Window, page: u64, window_max: u64) -> Option<Range<u64>> {
        let reach = window.start.saturating_sub(window.size)..window.end + window.size;
        if !reach.contains(&page) {
            // Far from where the window is: another reader, or a seek.
            self.close(window);
            return None;
        }
        let size = (window.size * 2).min(window_max).max(1);
        if self.trigger_below.load(Ordering::Relaxed) > 0 {
            let end = window.start.min(page);
            window.start = end.saturating_sub(size);
            self.trigger_below.store(end, Ordering::Relaxed);
            window.size = size;
            return (end > 0).then_some(window.start..end);
        }
        let start = window.end.max(page + 1);
        window.size = size;
        window.end = start + size;
        self.trigger.store(start, Ordering::Relaxed);
        Some(start..window.end)
    }

    /// Takes it on to start the next window if reading `page` is what that waited for. Whoever gets `true` sees to it that
    /// [`ReadAhead::start_claimed`] is called, or [`ReadAhead::disclaim`]. Waits for nobody.
    #[must_use]
    pub fn claim(&self, page: u64) -> bool {
        if !self.is_due(page) {
            return false;
        }
        // Of two that come at once one is enough.
        let before =
            self.claimed
                .compare_exchange(NONE, page, Ordering::Relaxed, Ordering::Relaxed);
        before.is_ok()
    }

    /// Leaves a claimed window to the next who reads there.
    pub fn disclaim(&self) {
        self.claimed.store(NONE, Ordering::Relaxed);
    }

    /// Returns the pages to start reading for a claim that was made, and ends it.
    pub fn start_claimed(&self, window_max: u64) -> Option<Range<u64>> {
        let page = self.claimed.load(Ordering::Relaxed);
        if page == NONE {
            return None;
        }
        let range = self.advance(page, window_max);
        self.claimed.store(NONE, Ordering::Relaxed);
        range
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
            let size =
                (window.size * 2).clamp(WINDOW_FIRST.min(window_max.max(1)), window_max.max(1));
            self.close(&mut window);
            window.size = size;
            window.start = page.saturating_sub(size);
            window.end = page;
            self.trigger_below.store(page, Ordering::Relaxed);
            return window.start..page;
        }
        if !follows {
            self.close(&mut window);
            return start..start;
        }
        let size = (window.size * 2)
            .max(wanted)
            .max(WINDOW_FIRST)
            .min(window_max.max(1));
        self.close(&mut window);
        window.size = size;
        window.start = start;
        window.end = start + size;
        self.trigger.store(start, Ordering::Relaxed);
        start..window.end
    }

    /// Notes that pages `first ..= last` came into a mapping together, by a fault on one of them.
    pub fn reached(&self, first: u64, last: u64) {
        self.first.store(first, Ordering::Relaxed);
        self.last.store(last, Ordering::Relaxed);
    }

    /// Counts how many faults in a row, the one on `page` included, have continued this walk.
    pub fn step(&self, page: u64) -> u64 {
        let steps = if self.follows(page) {
            self.steps.load(Ordering::Relaxed) + 1
        } else {
            0
        };
        // Of two at once one may not count.
        self.steps.store(steps, Ordering::Relaxed);
        steps
    }

    /// Tells whether reading `page`, which is cached, starts to read ahead.
    #[must_use]
    pub fn is_due(&self, page: u64) -> bool {
        page >= self.trigger.load(Ordering::Relaxed)
            || page < self.trigger_below.load(Ordering::Relaxed)
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
        self.trigger_below.store(0, Ordering::Relaxed);
        self.claimed.store(NONE, Ordering::Relaxed);
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
    strides: Strides,
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

    /// Notes a fault on `page`, which belongs to `walk`; tells whether it is time to read ahead ([`Walks::start`]), which the
    /// caller has to see to then. Waits for nobody and allocates nothing.
    #[must_use]
    pub fn note(&self, page: u64, walk: &ReadAhead) -> bool {
        if walk.follows(page) {
            return walk.claim(page);
        }
        self.strides.note(page)
    }

    /// Takes back what [`Walks::note`] has said: another fault will say it.
    pub fn put_off(&self, walk: &ReadAhead) {
        walk.disclaim();
    }

    /// Calls `start` with all that is to be read ahead now: windows of at most `window_max` pages, and single pages.
    pub fn start(&self, window_max: u64, mut start: impl FnMut(Range<u64>)) {
        let windows = self.walks.iter();
        windows
            .filter_map(|walk| walk.start_claimed(window_max))
            .for_each(&mut start);
        let pages = self.strides.take(window_max);
        pages.into_iter().for_each(|page| start(page..page + 1));
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
    fn a_walk_towards_the_beginning_finds_every_page_read_ahead_by_whoever_was_told() {
        let walks = Walks::default();
        let (mut cached, mut misses) = (u64::MAX, 0);
        for page in (0..10_000).rev() {
            let walk = walks.at(page);
            if walks.note(page, walk) {
                walks.start(256, |range| {
                    assert_eq!(range.end, cached);
                    cached = range.start;
                });
            }
            if page < cached {
                misses += 1;
                cached = walk.miss(page, 1, 256).start.min(page);
            }
            walk.reached(page, page);
        }
        assert_eq!((misses, cached), (2, 0));
    }

    #[test]
    fn a_claim_that_is_put_off_is_made_again() {
        let walks = Walks::default();
        let walk = walks.at(0);
        let first = walk.miss(0, 1, 256);
        walk.reached(0, 0);
        assert!(
            walks.note(first.start, walk),
            "the first page of the window"
        );
        assert!(!walks.note(first.start, walk), "once");
        walks.put_off(walk);
        assert!(walks.note(first.start, walk));
        let mut started = None;
        walks.start(256, |range| assert_eq!(started.replace(range), None));
        assert_eq!(started, Some(first.end..first.end + 16));
        walks.start(256, |range| panic!("{range:?} once more"));
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
