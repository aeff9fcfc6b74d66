//! Which page goes: S3-FIFO (Yang et al., SOSP 2023), over frame numbers.
//!
//! New pages enter a small queue of a tenth of the frames; what is used again before it reaches the end moves to the
//! main queue, the rest leaves and is remembered as a ghost; a page that comes back while its ghost is remembered
//! enters the main queue at once. So a scan passes through the small queue alone. A hit costs one relaxed store.
//! docs/decisions/0004 has the reasons and the hit ratios beside other policies.

use std::collections::VecDeque;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use pinfold_base::sync::Mutex;
use pinfold_mem::Frame;

const HEAT_MAX: u8 = 3;
/// Uses after the first that let a page pass from the small queue to the main one.
const PROMOTE_HEAT: u8 = 1;
/// Entries there is room for when a signal handler may add one: more than add one at once.
const ROOM_MIN: usize = 2048;
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

#[derive(Debug, Default)]
struct FrameUse {
    heat: AtomicU8,
    /// Bumped when the frame is freed, so that entries of its earlier life are told apart.
    life: AtomicU32,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    frame: u32,
    life: u32,
    /// The key's hash, to leave a ghost.
    hash: u64,
}

#[derive(Debug)]
struct Queues {
    small: VecDeque<Entry>,
    main: VecDeque<Entry>,
    /// Tags of pages that left the small queue, overwritten by chance of their hash.
    ghosts: Vec<u32>,
}

/// The queues and what each frame's uses were.
#[derive(Debug)]
pub struct Policy {
    uses: Box<[FrameUse]>,
    /// Of the window slots, which are numbered after the frames.
    slot_uses: OnceLock<Box<[FrameUse]>>,
    queues: Mutex<Queues>,
    small_target: usize,
}

impl Policy {
    /// Makes a policy for at most `frames` pages.
    #[must_use]
    pub fn new(frames: usize) -> Self {
        Self {
            uses: (0..frames).map(|_| FrameUse::default()).collect(),
            slot_uses: OnceLock::new(),
            queues: Mutex::new(Queues {
                small: VecDeque::new(),
                main: VecDeque::new(),
                ghosts: vec![0; frames.max(1).next_power_of_two()],
            }),
            small_target: (frames / SMALL_SHARE).max(1),
        }
    }

    /// Makes room for as many window slots as there are frames.
    pub fn open_slots(&self) {
        let make = || self.uses.iter().map(|_| FrameUse::default()).collect();
        self.slot_uses.get_or_init(make);
        keep_room(&mut self.queues.lock());
    }

    #[inline]
    fn uses(&self, frame: u32) -> &FrameUse {
        match self.uses.get(frame as usize) {
            Some(uses) => uses,
            None => self.uses_of_slot(frame as usize - self.uses.len()),
        }
    }

    #[cold]
    fn uses_of_slot(&self, slot: usize) -> &FrameUse {
        let slots = self.slot_uses.get();
        &slots.expect("slots are handed out after `open_slots`")[slot]
    }

    /// Notes a use of a cached page.
    #[inline]
    pub fn touch(&self, frame: Frame) {
        let heat = &self.uses(frame.0).heat;
        let now = heat.load(Ordering::Relaxed);
        if now < HEAT_MAX {
            // Racing uses may count once: only "again or not" matters.
            heat.store(now + 1, Ordering::Relaxed);
        }
    }

    /// Notes that a page came into `frame`.
    pub fn admit(&self, frame: Frame, hash: u64) {
        let uses = self.uses(frame.0);
        uses.heat.store(0, Ordering::Relaxed);
        let entry = Entry {
            frame: frame.0,
            life: uses.life.load(Ordering::Relaxed),
            hash,
        };
        let mut queues = self.queues.lock();
        let ghost = ghost_slot(&queues, hash);
        if queues.ghosts[ghost] == ghost_tag(hash) {
            queues.ghosts[ghost] = 0;
            queues.main.push_back(entry);
        } else {
            queues.small.push_back(entry);
        }
        if queues.small.len() + queues.main.len() > 2 * self.uses.len() + 64 {
            self.sweep(&mut queues);
        }
        if self.slot_uses.get().is_some() {
            keep_room(&mut queues);
        }
    }

    /// Tells whether [`Policy::rehome`] would allocate nothing, for as many callers at once as there may be.
    pub fn has_room(&self) -> bool {
        let queues = self.queues.lock();
        let fits = |queue: &VecDeque<Entry>| queue.capacity() - queue.len() >= ROOM_MIN;
        fits(&queues.small) && fits(&queues.main)
    }

    /// Notes that a page has moved from one frame to another: what is known of its use goes with it.
    pub fn rehome(&self, from: Frame, to: Frame, hash: u64) {
        let heat = self.uses(from.0).heat.load(Ordering::Relaxed);
        self.forget(from);
        let uses = self.uses(to.0);
        uses.heat.store(heat, Ordering::Relaxed);
        let entry = Entry {
            frame: to.0,
            life: uses.life.load(Ordering::Relaxed),
            hash,
        };
        let mut queues = self.queues.lock();
        if heat >= PROMOTE_HEAT {
            queues.main.push_back(entry);
        } else {
            queues.small.push_back(entry);
        }
        if queues.small.len() + queues.main.len() > 2 * self.uses.len() + 64 {
            self.sweep(&mut queues);
        }
    }

    /// Notes that a frame was freed, by eviction or otherwise: entries of this life count no more.
    pub fn forget(&self, frame: Frame) {
        self.uses(frame.0).life.fetch_add(1, Ordering::Relaxed);
    }

    /// Proposes pages to `evict` until `want` of them went or everything was asked once; returns how many went.
    ///
    /// `evict` runs under the queues' lock: it must not call back.
    pub fn evict(&self, want: usize, mut evict: impl FnMut(Frame) -> Verdict) -> usize {
        let mut queues = self.queues.lock();
        let mut gone = 0;
        // Each pass over an entry lowers its heat, so a few rounds reach the coldest.
        let mut asks_left = (queues.small.len() + queues.main.len()) * (usize::from(HEAT_MAX) + 1);
        while gone < want && asks_left > 0 {
            asks_left -= 1;
            let from_small = queues.small.len() >= self.small_target || queues.main.is_empty();
            let popped = if from_small {
                queues.small.pop_front()
            } else {
                queues.main.pop_front()
            };
            let Some(entry) = popped else {
                break;
            };
            let uses = self.uses(entry.frame);
            if uses.life.load(Ordering::Relaxed) != entry.life {
                continue;
            }
            let heat = uses.heat.load(Ordering::Relaxed);
            if from_small && heat >= PROMOTE_HEAT {
                uses.heat.store(0, Ordering::Relaxed);
                queues.main.push_back(entry);
            } else if !from_small && heat > 0 {
                uses.heat.store(heat - 1, Ordering::Relaxed);
                queues.main.push_back(entry);
            } else {
                match evict(Frame(entry.frame)) {
                    Verdict::Evicted => {
                        gone += 1;
                        uses.life.fetch_add(1, Ordering::Relaxed);
                        if from_small {
                            let ghost = ghost_slot(&queues, entry.hash);
                            queues.ghosts[ghost] = ghost_tag(entry.hash);
                        }
                    }
                    // It keeps its place in line, behind the others.
                    Verdict::Keep if from_small => queues.small.push_back(entry),
                    Verdict::Keep => queues.main.push_back(entry),
                }
            }
        }
        gone
    }

    /// Drops entries whose frame has been freed since.
    fn sweep(&self, queues: &mut Queues) {
        let lives =
            |entry: &Entry| self.uses(entry.frame).life.load(Ordering::Relaxed) == entry.life;
        queues.small.retain(lives);
        queues.main.retain(lives);
    }
}

/// Sees to it that signal handlers find room for a while.
fn keep_room(queues: &mut Queues) {
    for queue in [&mut queues.small, &mut queues.main] {
        if queue.capacity() - queue.len() <= ROOM_MIN {
            queue.reserve(4 * ROOM_MIN);
        }
    }
}

fn ghost_slot(queues: &Queues, hash: u64) -> usize {
    hash as usize & (queues.ghosts.len() - 1)
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
    fn entries_of_a_freed_frame_do_not_pile_up() {
        let policy = Policy::new(8);
        for i in 0..100_000u64 {
            policy.admit(Frame((i % 8) as u32), i);
            policy.forget(Frame((i % 8) as u32));
        }
        let queues = policy.queues.lock();
        assert!(queues.small.len() + queues.main.len() <= 2 * 8 + 65);
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
