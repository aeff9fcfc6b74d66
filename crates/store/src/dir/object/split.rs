//! Which bytes of a range go which way, and how the parts' outcomes make one.

use std::sync::Arc;

use parking_lot::Mutex;
use pinfold_base::{Errno, Progress};
use pinfold_mem::Segments;
use pinfold_mem::uring::Done;
use smallvec::SmallVec;

use super::files::Alignment;
use super::{PAGE, PLAIN_WHOLE_MAX};

/// The way a part travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// By-passing the kernel's cache.
    Direct,
    /// Through it.
    Plain,
}

/// Bytes `start .. end` of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Part {
    pub start: u64,
    pub end: u64,
    pub way: Way,
}

/// A range cut into parts, in file order, none empty; an empty range is one empty plain part.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Split(SmallVec<[Part; 3]>);

impl Split {
    /// Cuts the range that `segments` fill from `offset` on. `alignment` is `None` where nothing goes direct;
    /// `len_seen` is the file's size for reads, whose tail goes the plain way.
    pub fn of(
        offset: u64,
        segments: &Segments,
        alignment: Option<Alignment>,
        len_seen: Option<u64>,
    ) -> Self {
        let end = offset.saturating_add(segments.bytes() as u64);
        let plain = || Self::one(offset, end, Way::Plain);
        let Some(alignment) = alignment else {
            return plain();
        };
        let block = u64::from(alignment.block);
        // Where the tail begins, and the range reaches into it.
        let tail = len_seen
            .filter(|len| !len.is_multiple_of(block) && end > len - len % PAGE)
            .map(|len| len - len % PAGE);
        if tail.is_none() && offset.is_multiple_of(block) && end.is_multiple_of(block) {
            return if is_aligned(segments, alignment) {
                Self::one(offset, end, Way::Direct)
            } else {
                plain()
            };
        }
        let lo = if offset.is_multiple_of(block) {
            offset
        } else {
            offset.next_multiple_of(PAGE)
        };
        let hi = match tail {
            Some(tail) => tail,
            None if end.is_multiple_of(block) => end,
            None => end - end % PAGE,
        };
        let little = tail.is_some() && hi.saturating_sub(lo) <= PLAIN_WHOLE_MAX;
        if hi <= lo || little {
            return plain();
        }
        // Both fit usize: they lie inside the range that `segments` cover.
        let middle = segments.slice((lo - offset) as usize, (hi - lo) as usize);
        if !is_aligned(&middle, alignment) {
            return plain();
        }
        let cut = [
            (offset, lo, Way::Plain),
            (lo, hi, Way::Direct),
            (hi, end, Way::Plain),
        ];
        Self(
            cut.into_iter()
                .filter(|(start, end, _)| start < end)
                .map(|(start, end, way)| Part { start, end, way })
                .collect(),
        )
    }

    fn one(start: u64, end: u64, way: Way) -> Self {
        Self(SmallVec::from_iter([Part { start, end, way }]))
    }

    /// Tells whether all of it goes direct.
    pub fn is_direct(&self) -> bool {
        matches!(
            self.0[..],
            [Part {
                way: Way::Direct,
                ..
            }]
        )
    }

    pub fn parts(&self) -> &[Part] {
        &self.0
    }
}

fn is_aligned(segments: &Segments, alignment: Alignment) -> bool {
    segments.spans().iter().all(|span| {
        (span.as_ptr() as usize).is_multiple_of(alignment.memory as usize)
            && span.len().is_multiple_of(alignment.block as usize)
    })
}

/// Tells whether a direct transfer was refused for being direct: everything else about it was right.
pub(super) fn refuses_direct(progress: Progress<Errno>) -> bool {
    progress.done == 0 && matches!(progress.stop, Some(Errno::EINVAL | Errno::EOPNOTSUPP))
}

/// The parts of one transfer under way; the last to settle completes the whole.
pub(super) struct Parts {
    state: Mutex<State>,
}

struct State {
    wants: SmallVec<[u64; 3]>,
    settled: SmallVec<[Option<Progress<Errno>>; 3]>,
    left: usize,
    done: Option<Done>,
}

impl Parts {
    pub fn new(parts: &[Part], done: Done) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                wants: parts.iter().map(|part| part.end - part.start).collect(),
                settled: SmallVec::from_elem(None, parts.len()),
                left: parts.len(),
                done: Some(done),
            }),
        })
    }

    /// Takes in what part `number` came to.
    pub fn settle(&self, number: usize, progress: Progress<Errno>) {
        let mut state = self.state.lock();
        state.settled[number] = Some(progress);
        state.left -= 1;
        if state.left > 0 {
            return;
        }
        let outcome = state.outcome();
        let done = state.done.take();
        drop(state);
        if let Some(done) = done {
            done(outcome);
        }
    }
}

impl State {
    /// Adds the parts up to the first that stopped or met the end of the file.
    fn outcome(&self) -> Progress<Errno> {
        let mut total = 0;
        for (want, progress) in self.wants.iter().zip(self.settled.iter().flatten()) {
            total += progress.done;
            if let Some(stop) = progress.stop {
                return Progress::stopped(total, stop);
            }
            if progress.done < *want {
                break;
            }
        }
        Progress::complete(total)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use pinfold_mem::AlignedBuf;

    use super::*;

    const ALIGNMENT: Alignment = Alignment {
        block: 512,
        memory: 4,
    };

    fn split(offset: u64, len: usize, size: Option<u64>) -> Vec<(u64, u64, Way)> {
        let buf = Arc::new(AlignedBuf::zeroed(len));
        let segments = Segments::of_buf(&buf, len);
        Split::of(offset, &segments, Some(ALIGNMENT), size)
            .parts()
            .iter()
            .map(|part| (part.start, part.end, part.way))
            .collect()
    }

    #[test]
    fn whole_blocks_go_direct_and_the_rest_plain_up_to_a_page_border() {
        use Way::{Direct, Plain};
        assert_eq!(split(512, 1024, None), [(512, 1536, Direct)]);
        assert_eq!(
            split(8192, 8192 + 100, None),
            [(8192, 16384, Direct), (16384, 16484, Plain)]
        );
        // Not at the block border 16896: the page of the tail goes one way only.
        assert_eq!(
            split(8192, 8192 + 700, None),
            [(8192, 16384, Direct), (16384, 17084, Plain)]
        );
        assert_eq!(split(0, 100, None), [(0, 100, Plain)]);
        // Memory that follows an unaligned head is unaligned as well here, unless the head ends on a multiple of 4.
        assert_eq!(
            split(100, 3 * 4096, None),
            [
                (100, 4096, Plain),
                (4096, 12288, Direct),
                (12288, 12388, Plain)
            ]
        );
        assert_eq!(split(101, 3 * 4096, None), [(101, 12389, Plain)]);
    }

    #[test]
    fn the_tail_of_the_file_is_read_plain_and_takes_a_little_along() {
        use Way::{Direct, Plain};
        let size = Some(100_000);
        let tail = 100_000 - 100_000 % 4096;
        assert_eq!(split(0, 4096, size), [(0, 4096, Direct)]);
        assert_eq!(split(tail, 4096, size), [(tail, tail + 4096, Plain)]);
        assert_eq!(
            split(0, 102_400, size),
            [(0, tail, Direct), (tail, 102_400, Plain)]
        );
        assert_eq!(
            split(tail - 8192, 12288, size),
            [(tail - 8192, tail + 4096, Plain)]
        );
        assert_eq!(split(0, 8192, Some(8192)), [(0, 8192, Direct)]);
        assert_eq!(split(4096, 8192, Some(3000)), [(4096, 12288, Plain)]);
    }

    #[test]
    fn the_parts_give_the_lowest_prefix_and_the_first_error() {
        let part = |start, end| Part {
            start,
            end,
            way: Way::Plain,
        };
        let cut = [part(0, 100), part(100, 200), part(200, 300)];
        let run = |order: [usize; 3], results: [Progress<Errno>; 3]| {
            let (tell, told) = channel();
            let parts = Parts::new(&cut, Box::new(move |p| tell.send(p).unwrap()));
            for number in order {
                assert!(told.try_recv().is_err());
                parts.settle(number, results[number]);
            }
            told.try_recv().unwrap()
        };
        let full = Progress::complete(100);
        let eio = Progress::stopped(40, Errno::EIO);
        let nospace = Progress::stopped(0, Errno::ENOSPC);
        assert_eq!(run([2, 0, 1], [full, full, full]), Progress::complete(300));
        assert_eq!(
            run([2, 1, 0], [full, eio, nospace]),
            Progress::stopped(140, Errno::EIO)
        );
        assert_eq!(
            run([0, 1, 2], [full, Progress::complete(7), full]),
            Progress::complete(107)
        );
    }
}
