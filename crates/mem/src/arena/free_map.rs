//! Which frames are free.

use std::ops::Range;

use super::{Frame, FrameRun};

/// Which frames are free: a bit each, with a summary bit per word, searched next-fit so that frames freed
/// together are found together.
pub(super) struct FreeMap {
    words: Vec<u64>,
    summary: Vec<u64>,
    cursor: usize,
}

impl FreeMap {
    pub(super) fn new(frames: usize) -> Self {
        let words = frames.div_ceil(64);
        Self {
            words: vec![0; words],
            summary: vec![0; words.div_ceil(64)],
            cursor: 0,
        }
    }

    pub(super) fn any(&self) -> bool {
        self.summary.iter().any(|&s| s != 0)
    }

    pub(super) fn give(&mut self, frame: usize) {
        let (word, bit) = (frame / 64, frame % 64);
        debug_assert_eq!(self.words[word] >> bit & 1, 0, "frame {frame} freed twice");
        self.words[word] |= 1 << bit;
        self.summary[word / 64] |= 1 << (word % 64);
    }

    /// Takes the first run at or after the cursor, at most `want` long.
    pub(super) fn take(&mut self, want: u32) -> Option<FrameRun> {
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

    /// Counts the free frames of `range`.
    pub(super) fn count(&self, range: Range<usize>) -> usize {
        masks(range)
            .map(|(word, mask)| (self.words[word] & mask).count_ones() as usize)
            .sum()
    }

    /// Takes all frames of `range` if every one is free.
    pub(super) fn take_all(&mut self, range: Range<usize>) -> bool {
        if self.count(range.clone()) < range.len() {
            return false;
        }
        for (word, mask) in masks(range) {
            self.words[word] &= !mask;
            if self.words[word] == 0 {
                self.summary[word / 64] &= !(1 << (word % 64));
            }
        }
        true
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

/// Lists the words that hold the bits of `range`, each with the mask of those bits.
fn masks(range: Range<usize>) -> impl Iterator<Item = (usize, u64)> {
    let words = range.start / 64..range.end.div_ceil(64);
    words.map(move |word| {
        let from = range.start.saturating_sub(word * 64);
        let to = (range.end - word * 64).min(64);
        (word, (u64::MAX >> (64 - (to - from))) << from)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn a_range_is_taken_whole_or_not_at_all() {
        let mut map = FreeMap::new(256);
        for frame in 10..140 {
            map.give(frame);
        }
        assert_eq!(map.count(0..256), 130);
        assert_eq!(map.count(60..70), 10);
        assert!(!map.take_all(0..64));
        assert!(map.take_all(64..128));
        assert_eq!(map.count(0..256), 66);
        assert!(!map.take_all(64..65));
        let run = map.take(1000).unwrap();
        assert_eq!((run.start.0, run.len), (10, 54));
        let run = map.take(1000).unwrap();
        assert_eq!((run.start.0, run.len), (128, 12));
        assert!(!map.any());
    }
}
