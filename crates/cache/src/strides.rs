//! Faults at a constant distance from each other: the columns of a matrix, the headers of records of one size.
//!
//! *Owns*: what makes a stride (five faults, each as far from the one before), how many are told apart at once, how far
//! ahead of the reader pages are read.
//!
//! *Does not own*: walks from page to page ([`crate::ReadAhead`]); the reading.
//!
//! *Locking*: one leaf lock. A fault only tries it: it may have interrupted whoever has it.
//!
//! ```text
//!  faults without a stride -> the last few -> three of them evenly apart: a stream -> two more: read ahead, twice as far
//!  each time, up to the most
//! ```
//! Among faults at random three are evenly apart now and then. That one more comes before the stream is forgotten is as
//! likely as one page is among all, and two more have to.

use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

use smallvec::SmallVec;

/// Faults among which a stride is looked for: two of each stream, and what comes between.
const RECENT_MAX: usize = 8;
/// Streams told apart at once.
const STREAMS_MAX: usize = 8;
/// Faults after which a stream that has not gone on is forgotten.
const IDLE_MAX: u64 = 32;
/// Faults that prove a stream of three.
const PROOFS: u8 = 2;
/// Pages read ahead of one stream at most.
const DEPTH_MAX: u64 = 32;
/// Pages read ahead at first.
const DEPTH_FIRST: u64 = 4;
const NOWHERE: i64 = i64::MIN;

#[derive(Debug, Clone, Copy)]
struct Stream {
    last: i64,
    /// 0: no stream.
    stride: i64,
    /// Steps from `last` for which pages are read, or being read.
    ahead: u64,
    /// Steps to have read ahead of the reader; 0 until the stride is proved.
    depth: u64,
    /// Faults that have gone on with it, as far as it takes to prove it.
    proofs: u8,
    /// When it last went on.
    at: u64,
}

const NO_STREAM: Stream = Stream {
    last: 0,
    stride: 0,
    ahead: 0,
    depth: 0,
    proofs: 0,
    at: 0,
};

#[derive(Debug)]
struct Seen {
    /// Faults counted.
    at: u64,
    last: i64,
    recent: [i64; RECENT_MAX],
    streams: [Stream; STREAMS_MAX],
}

/// The strides in one mapping's faults.
#[derive(Debug)]
pub(crate) struct Strides {
    seen: Mutex<Seen>,
}

impl Default for Strides {
    fn default() -> Self {
        Self {
            seen: Mutex::new(Seen {
                at: 0,
                last: NOWHERE,
                recent: [NOWHERE; RECENT_MAX],
                streams: [NO_STREAM; STREAMS_MAX],
            }),
        }
    }
}

impl Strides {
    /// Notes a fault that continues no walk; tells whether pages are to be read ahead ([`Strides::take`]).
    pub(crate) fn note(&self, page: u64) -> bool {
        match (i64::try_from(page), self.try_seen()) {
            (Ok(page), Some(mut seen)) => seen.note(page),
            _ => false,
        }
    }

    fn try_seen(&self) -> Option<MutexGuard<'_, Seen>> {
        match self.seen.try_lock() {
            Ok(seen) => Some(seen),
            Err(TryLockError::Poisoned(seen)) => Some(seen.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Lists the pages to read now, at most `most` for each stream.
    pub(crate) fn take(&self, most: u64) -> SmallVec<[u64; DEPTH_MAX as usize]> {
        let mut pages = SmallVec::new();
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        for stream in &mut seen.streams {
            let depth = stream.depth.min(most);
            for step in stream.ahead + 1..=depth {
                // Beyond either end there is nothing; the end of the file is the reader's matter.
                let page = stream.stride.checked_mul(step as i64);
                let page = page.and_then(|distance| stream.last.checked_add(distance));
                pages.extend(page.and_then(|page| u64::try_from(page).ok()));
            }
            stream.ahead = stream.ahead.max(depth);
        }
        pages
    }
}

impl Seen {
    fn note(&mut self, page: i64) -> bool {
        if self.last == page {
            // The same fault, served in two places.
            return false;
        }
        self.last = page;
        self.at += 1;
        let now = self.at;
        let goes_on = |stream: &&mut Stream| stream.steps_to(page, now).is_some();
        if let Some(stream) = self.streams.iter_mut().find(goes_on) {
            let steps = stream.steps_to(page, now).unwrap_or(0);
            stream.last = page;
            stream.at = now;
            stream.ahead = stream.ahead.saturating_sub(steps);
            stream.proofs = (stream.proofs + 1).min(PROOFS);
            if stream.proofs < PROOFS {
                return false;
            }
            // Half of what is ahead has been used: time for more, and for more at once.
            let due = stream.ahead <= stream.depth / 2;
            if due {
                stream.depth = (stream.depth * 2).clamp(DEPTH_FIRST, DEPTH_MAX);
            }
            return due;
        }
        if let Some(stride) = self.stride_to(page) {
            let oldest = self.streams.iter_mut().min_by_key(|stream| stream.at);
            if let Some(stream) = oldest {
                *stream = Stream {
                    last: page,
                    stride,
                    at: now,
                    ..NO_STREAM
                };
            }
        }
        self.recent[now as usize % RECENT_MAX] = page;
        false
    }

    /// Returns how far `page` is from one recent fault, if that is as far from another.
    fn stride_to(&self, page: i64) -> Option<i64> {
        let recent = || self.recent.iter().filter(|&&fault| fault != NOWHERE);
        recent().find_map(|&before| {
            let stride = page.wrapping_sub(before);
            let first = before.wrapping_sub(stride);
            let evenly = stride.unsigned_abs() > 1 && recent().any(|&fault| fault == first);
            evenly.then_some(stride)
        })
    }
}

impl Stream {
    /// Tells how many steps further `page` is, if it goes on with this stream: the next one, or one of those read ahead, of
    /// which those that were mapped beside another made no fault.
    fn steps_to(&self, page: i64, now: u64) -> Option<u64> {
        if self.stride == 0 || now - self.at > IDLE_MAX {
            return None;
        }
        let distance = page.wrapping_sub(self.last);
        let steps = u64::try_from(distance.checked_div(self.stride)?).ok()?;
        let exact = distance.wrapping_rem(self.stride) == 0 && steps > 0;
        (exact && steps <= self.ahead + 1).then_some(steps)
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    fn noted(strides: &Strides, page: u64) -> Vec<u64> {
        if strides.note(page) {
            strides.take(u64::MAX).into_vec()
        } else {
            Vec::new()
        }
    }

    /// Reads pages as told; counts those that nobody had read ahead, and those read ahead.
    fn follow(pages: impl Iterator<Item = u64>) -> (usize, usize) {
        let strides = Strides::default();
        let mut cached = std::collections::HashSet::new();
        let (mut misses, mut ahead) = (0, 0);
        for page in pages {
            misses += usize::from(!cached.contains(&page));
            let more = noted(&strides, page);
            ahead += more.len();
            cached.extend(more);
        }
        (misses, ahead)
    }

    #[test]
    fn the_fifth_fault_of_a_stride_reads_ahead_and_then_none_misses() {
        let (misses, ahead) = follow((0..1000).map(|step| 7 + step * 13));
        assert_eq!(misses, 5);
        assert!((995..995 + 64).contains(&ahead), "{ahead} pages read ahead");
    }

    #[test]
    fn a_stride_towards_the_beginning_stops_there() {
        let (misses, ahead) = follow((0..100).rev().map(|step| step * 5));
        assert_eq!((misses, ahead), (5, 95));
    }

    #[test]
    fn as_many_strides_as_there_is_room_for_are_told_apart() {
        let pages =
            (0..500u64).flat_map(|step| [0, 1, 3, 7].map(|n| n * 1_000_003 + step * (11 + n)));
        let (misses, _) = follow(pages);
        assert!(misses <= 4 * 5, "{misses} of 2,000 faults missed");
    }

    #[test]
    fn faults_at_random_read_nothing_ahead() {
        for seed in 0..20 {
            let mut rng = SmallRng::seed_from_u64(seed);
            let pages = (0..20_000).map(move |_| rng.random_range(0..1 << 16));
            let (_, ahead) = follow(pages);
            assert!(
                ahead <= 8,
                "{ahead} pages read ahead of nobody, seed {seed}"
            );
        }
    }

    #[test]
    fn no_more_is_read_ahead_than_the_most() {
        let strides = Strides::default();
        let mut ahead = 0i64;
        for step in 0..200 {
            if strides.note(step * 9) {
                let pages = strides.take(u64::MAX);
                ahead += pages.len() as i64;
                let last = pages.last().copied().unwrap_or(0) / 9;
                assert!(last <= step + DEPTH_MAX, "page {last} ahead of {step}");
            }
        }
        assert!(ahead > 190);
    }

    #[test]
    fn pages_at_the_ends_of_the_numbers_are_no_trouble() {
        let strides = Strides::default();
        for page in [
            u64::MAX,
            0,
            1 << 62,
            (1 << 63) - 1,
            0,
            1 << 62,
            3,
            (1 << 63) - 1,
        ] {
            let _ = noted(&strides, page);
        }
        for step in 0..6 {
            let _ = noted(&strides, (1 << 63) - 1 - (6 - step) * (1 << 60));
        }
    }
}
