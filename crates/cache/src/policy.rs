//! Which page goes: S3-FIFO (Yang et al., SOSP 2023), over frame numbers.
//!
//! New pages enter a small queue of a tenth of the frames; what is used again before it reaches the end moves to the
//! main queue, the rest leaves and is remembered as a ghost; a page that comes back while its ghost is remembered
//! enters the main queue at once. So a scan passes through the small queue alone. A hit costs one relaxed store.
//! docs/decisions/0004 has the reasons and the hit ratios beside other policies.
//!
//! *Owns*: the queues, which are links between places, one a frame: nothing is allocated after the policy was made, and
//! once more when windows open. A fault served in a signal handler waits for the queues' lock, so nobody may enter the
//! program's allocator while he has it: the interrupted thread may hold that one's.
//!
//! *Does not own*: the pages, whether one may go.
//!
//! *Locking*: one leaf around the queues; heat is outside of it.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};

use pinfold_base::sync::Mutex;
use pinfold_mem::Frame;

const HEAT_MAX: u8 = 3;
/// Uses after the first that let a page pass from the small queue to the main one.
const PROMOTE_HEAT: u8 = 1;
/// The small queue's share of the frames.
const SMALL_SHARE: usize = 10;

/// What became of a page the policy proposed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It was evicted.
    Evicted,
    /// It is in use or dirty and stays; asked again later.
    Keep,
}

/// No frame: frame numbers stay below.
const NONE: u32 = u32::MAX;

/// A frame's place in line.
#[derive(Debug, Clone, Copy)]
struct Place {
    before: u32,
    after: u32,
    /// The key's hash, to leave a ghost.
    hash: u64,
    line: Option<Line>,
}

const NOWHERE: Place = Place {
    before: NONE,
    after: NONE,
    hash: 0,
    line: None,
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Line {
    Small,
    Main,
}

#[derive(Debug, Clone, Copy)]
struct Ends {
    first: u32,
    last: u32,
    len: usize,
}

#[derive(Debug)]
struct Queues {
    places: Vec<Place>,
    small: Ends,
    main: Ends,
    /// Tags of pages that left the small queue, overwritten by chance of their hash.
    ghosts: Vec<u32>,
}

impl Queues {
    fn ends(&mut self, line: Line) -> &mut Ends {
        match line {
            Line::Small => &mut self.small,
            Line::Main => &mut self.main,
        }
    }

    fn place(&mut self, frame: u32) -> &mut Place {
        &mut self.places[frame as usize]
    }

    /// Puts a frame at the end of a line; it leaves the one it is in.
    fn push(&mut self, line: Line, frame: u32, hash: u64) {
        self.unlink(frame);
        let last = self.ends(line).last;
        *self.place(frame) = Place {
            before: last,
            after: NONE,
            hash,
            line: Some(line),
        };
        if last != NONE {
            self.place(last).after = frame;
        }
        let ends = self.ends(line);
        ends.last = frame;
        if ends.first == NONE {
            ends.first = frame;
        }
        ends.len += 1;
    }

    /// Takes a frame out of whatever line it is in.
    fn unlink(&mut self, frame: u32) {
        let place = std::mem::replace(self.place(frame), NOWHERE);
        let Some(line) = place.line else {
            return;
        };
        if place.before != NONE {
            self.place(place.before).after = place.after;
        }
        if place.after != NONE {
            self.place(place.after).before = place.before;
        }
        let ends = self.ends(line);
        if ends.first == frame {
            ends.first = place.after;
        }
        if ends.last == frame {
            ends.last = place.before;
        }
        ends.len -= 1;
    }

    /// Takes the first of a line out; returns its hash as well.
    fn pop(&mut self, line: Line) -> Option<(u32, u64)> {
        let first = self.ends(line).first;
        if first == NONE {
            return None;
        }
        let hash = self.place(first).hash;
        self.unlink(first);
        Some((first, hash))
    }

    fn leave_ghost(&mut self, hash: u64) {
        let at = self.ghost_slot(hash);
        self.ghosts[at] = ghost_tag(hash);
    }

    /// Tells whether a page left the small queue lately, and forgets that it did.
    fn take_ghost(&mut self, hash: u64) -> bool {
        let at = self.ghost_slot(hash);
        let found = self.ghosts[at] == ghost_tag(hash);
        if found {
            self.ghosts[at] = 0;
        }
        found
    }

    fn ghost_slot(&self, hash: u64) -> usize {
        hash as usize & (self.ghosts.len() - 1)
    }
}

/// The queues and what each frame's uses were.
#[derive(Debug)]
pub struct Policy {
    heat: Box<[AtomicU8]>,
    /// Of the window slots, which are numbered after the frames.
    slot_heat: OnceLock<Box<[AtomicU8]>>,
    queues: Mutex<Queues>,
    small_target: usize,
}

impl Policy {
    /// Makes a policy for at most `frames` pages.
    #[must_use]
    pub fn new(frames: usize) -> Self {
        const EMPTY: Ends = Ends {
            first: NONE,
            last: NONE,
            len: 0,
        };
        Self {
            heat: cold(frames),
            slot_heat: OnceLock::new(),
            queues: Mutex::new(Queues {
                places: vec![NOWHERE; frames],
                small: EMPTY,
                main: EMPTY,
                ghosts: vec![0; frames.max(1).next_power_of_two()],
            }),
            small_target: (frames / SMALL_SHARE).max(1),
        }
    }

    /// Makes room for as many window slots as there are frames.
    pub fn open_slots(&self) {
        self.slot_heat.get_or_init(|| {
            let frames = self.heat.len();
            // Made outside of the lock, and the old ones go outside of it as well.
            let mut places = vec![NOWHERE; 2 * frames];
            let mut queues = self.queues.lock();
            places[..frames].copy_from_slice(&queues.places);
            std::mem::swap(&mut queues.places, &mut places);
            drop(queues);
            cold(frames)
        });
    }

    #[inline]
    fn heat(&self, frame: u32) -> &AtomicU8 {
        match self.heat.get(frame as usize) {
            Some(heat) => heat,
            None => self.heat_of_slot(frame as usize - self.heat.len()),
        }
    }

    #[cold]
    fn heat_of_slot(&self, slot: usize) -> &AtomicU8 {
        let slots = self.slot_heat.get();
        &slots.expect("slots are handed out after `open_slots`")[slot]
    }

    /// Notes a use of a cached page.
    #[inline]
    pub fn touch(&self, frame: Frame) {
        let heat = self.heat(frame.0);
        let now = heat.load(Ordering::Relaxed);
        if now < HEAT_MAX {
            // Racing uses may count once: only "again or not" matters.
            heat.store(now + 1, Ordering::Relaxed);
        }
    }

    /// Notes that a page came into `frame`. Allocates nothing, nor does anything else here from now on.
    pub fn admit(&self, frame: Frame, hash: u64) {
        self.heat(frame.0).store(0, Ordering::Relaxed);
        let mut queues = self.queues.lock();
        let line = if queues.take_ghost(hash) {
            Line::Main
        } else {
            Line::Small
        };
        queues.push(line, frame.0, hash);
    }

    /// Notes that a page has moved from one frame to another: what is known of its use goes with it.
    pub fn rehome(&self, from: Frame, to: Frame, hash: u64) {
        let heat = self.heat(from.0).load(Ordering::Relaxed);
        self.heat(to.0).store(heat, Ordering::Relaxed);
        let mut queues = self.queues.lock();
        queues.unlink(from.0);
        let line = if heat >= PROMOTE_HEAT {
            Line::Main
        } else {
            Line::Small
        };
        queues.push(line, to.0, hash);
    }

    /// Notes that a frame was freed, by eviction or otherwise.
    pub fn forget(&self, frame: Frame) {
        self.queues.lock().unlink(frame.0);
    }

    /// Proposes pages to `evict` until `want` of them went or everything was asked once; returns how many went.
    ///
    /// `evict` runs under the queues' lock: it must not call back.
    pub fn evict(&self, want: usize, mut evict: impl FnMut(Frame) -> Verdict) -> usize {
        let mut queues = self.queues.lock();
        let mut gone = 0;
        // Each pass over a page lowers its heat, so a few rounds reach the coldest.
        let mut asks_left = (queues.small.len + queues.main.len) * (usize::from(HEAT_MAX) + 1);
        while gone < want && asks_left > 0 {
            asks_left -= 1;
            let from_small = queues.small.len >= self.small_target || queues.main.len == 0;
            let line = if from_small { Line::Small } else { Line::Main };
            let Some((frame, hash)) = queues.pop(line) else {
                break;
            };
            let heat = self.heat(frame).load(Ordering::Relaxed);
            if from_small && heat >= PROMOTE_HEAT {
                self.heat(frame).store(0, Ordering::Relaxed);
                queues.push(Line::Main, frame, hash);
            } else if !from_small && heat > 0 {
                self.heat(frame).store(heat - 1, Ordering::Relaxed);
                queues.push(Line::Main, frame, hash);
            } else {
                match evict(Frame(frame)) {
                    Verdict::Evicted => {
                        gone += 1;
                        if from_small {
                            queues.leave_ghost(hash);
                        }
                    }
                    // It keeps its place in line, behind the others.
                    Verdict::Keep => queues.push(line, frame, hash),
                }
            }
        }
        gone
    }
}

fn cold(frames: usize) -> Box<[AtomicU8]> {
    (0..frames).map(|_| AtomicU8::new(0)).collect()
}

fn ghost_tag(hash: u64) -> u32 {
    // Never zero, which means "none".
    (hash >> 32) as u32 | 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};
    use std::collections::HashMap;

    /// A cache of page numbers run by the policy alone.
    struct Simulation {
        policy: Policy,
        frames: HashMap<u64, Frame>,
        pages: Vec<u64>,
        free: Vec<Frame>,
        hits: u64,
    }

    impl Simulation {
        fn new(frames: usize) -> Self {
            Self {
                policy: Policy::new(frames),
                frames: HashMap::new(),
                pages: vec![0; frames],
                free: (0..frames as u32).map(Frame).collect(),
                hits: 0,
            }
        }

        fn access(&mut self, page: u64) {
            if let Some(&frame) = self.frames.get(&page) {
                self.hits += 1;
                self.policy.touch(frame);
                return;
            }
            if self.free.is_empty() {
                let (frames, pages, free) = (&mut self.frames, &self.pages, &mut self.free);
                self.policy.evict(1, |frame| {
                    frames.remove(&pages[frame.0 as usize]);
                    free.push(frame);
                    Verdict::Evicted
                });
            }
            let frame = self.free.pop().expect("everything may be evicted here");
            self.pages[frame.0 as usize] = page;
            self.frames.insert(page, frame);
            self.policy
                .admit(frame, crate::index::Key { file: 1, page }.hash());
        }
    }

    /// Zipf-like page numbers: rank from an inverse power of a uniform number.
    fn zipf(rng: &mut SmallRng, pages: u64) -> u64 {
        let u: f64 = rng.random();
        ((pages as f64).powf(u) - 1.0) as u64
    }

    fn oracle_hits(trace: &[u64], frames: usize) -> u64 {
        let cache = quick_cache::unsync::Cache::<u64, ()>::new(frames);
        let mut cache = cache;
        let mut hits = 0;
        for &page in trace {
            if cache.get(&page).is_some() {
                hits += 1;
            } else {
                cache.insert(page, ());
            }
        }
        hits
    }

    fn compare(name: &str, trace: &[u64], frames: usize) -> (f64, f64) {
        let mut ours = Simulation::new(frames);
        for &page in trace {
            ours.access(page);
        }
        let ratio = |hits: u64| hits as f64 / trace.len() as f64;
        let (ours, oracle) = (ratio(ours.hits), ratio(oracle_hits(trace, frames)));
        println!("{name}: hit ratio {ours:.3}, quick_cache {oracle:.3}");
        (ours, oracle)
    }

    #[test]
    fn hit_ratios_are_those_of_a_good_cache() {
        let mut rng = SmallRng::seed_from_u64(7);
        let skewed: Vec<u64> = (0..200_000).map(|_| zipf(&mut rng, 50_000)).collect();
        let (ours, oracle) = compare("skewed", &skewed, 2_000);
        assert!(ours > oracle - 0.03, "{ours} against {oracle}");

        let mut scan_at = 1_000_000u64;
        let mixed: Vec<u64> = (0..200_000u64)
            .map(|i| {
                if i % 2_000 >= 1_000 {
                    scan_at += 1;
                    scan_at
                } else {
                    zipf(&mut rng, 50_000)
                }
            })
            .collect();
        let (ours, oracle) = compare("skewed with scans", &mixed, 2_000);
        assert!(ours > oracle - 0.03, "{ours} against {oracle}");
    }

    #[test]
    fn a_scan_leaves_the_pages_in_use_alone() {
        let mut cache = Simulation::new(1000);
        for _ in 0..4 {
            for page in 0..500 {
                cache.access(page);
            }
        }
        for page in 10_000..60_000 {
            cache.access(page);
        }
        cache.hits = 0;
        for page in 0..500 {
            cache.access(page);
        }
        assert!(cache.hits > 450, "{} of 500 survived the scan", cache.hits);
    }

    #[test]
    fn a_frame_is_in_one_line_at_a_time_and_lines_hold_together() {
        let policy = Policy::new(8);
        policy.open_slots();
        let mut rng = SmallRng::seed_from_u64(3);
        let mut there = std::collections::HashSet::new();
        for step in 0..100_000u64 {
            let frame = rng.random_range(0..16u32);
            match rng.random_range(0..5) {
                0 | 1 => {
                    policy.admit(Frame(frame), step % 32);
                    there.insert(frame);
                }
                2 => {
                    policy.forget(Frame(frame));
                    there.remove(&frame);
                }
                3 if there.contains(&frame) => {
                    let to = rng.random_range(0..16u32);
                    policy.rehome(Frame(frame), Frame(to), step);
                    there.remove(&frame);
                    there.insert(to);
                }
                _ => {
                    policy.touch(Frame(frame));
                    policy.evict(1, |frame| {
                        assert!(there.contains(&frame.0), "{frame:?} was forgotten");
                        if rng.random() {
                            return Verdict::Keep;
                        }
                        there.remove(&frame.0);
                        Verdict::Evicted
                    });
                }
            }
            let queues = policy.queues.lock();
            assert_eq!(queues.small.len + queues.main.len, there.len());
        }
        let mut left = there.len();
        while policy.evict(1, |_| Verdict::Evicted) == 1 {
            left -= 1;
        }
        assert_eq!(left, 0);
    }

    #[test]
    fn a_page_that_must_stay_does_not_make_it_spin() {
        let policy = Policy::new(8);
        for i in 0..8 {
            policy.admit(Frame(i), u64::from(i));
        }
        assert_eq!(policy.evict(4, |_| Verdict::Keep), 0);
        assert_eq!(policy.evict(4, |_| Verdict::Evicted), 4);
    }
}
