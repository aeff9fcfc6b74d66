//! Nodes that cache one number for each file under its glock, and what they must never see.
#![allow(dead_code, reason = "each test takes what it needs")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;

use parking_lot::Mutex;
use pinfold_base::Errno;
use pinfold_lock::Mode::{self, Deferred, Exclusive, Shared, Unlocked};
use pinfold_lock::{Duties, Flags, Glock, LockService, Name, Options, Refusal, Request, Space};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

pub const PATIENCE: Duration = Duration::from_secs(120);

/// How many operations each thread makes; a long run asks for more.
pub fn operations(usual: usize) -> usize {
    std::env::var("PINFOLD_GLOCK_OPERATIONS").map_or(usual, |text| {
        text.parse().expect("PINFOLD_GLOCK_OPERATIONS is a number")
    })
}

pub fn name(number: u64) -> Name {
    Name {
        number,
        generation: 0,
    }
}

/// What a file is outside of any cache.
#[derive(Default)]
pub struct Stored {
    pub number: AtomicU64,
    /// The last number that anybody wrote, cached or not.
    pub truth: AtomicU64,
    /// Who is inside, over all nodes: readers, direct readers, writers.
    inside: [AtomicI64; 3],
}

/// One node's cache of it.
pub struct Cache {
    stored: Arc<Stored>,
    cached: Mutex<Option<(u64, bool)>>,
    pub sync_fails: AtomicBool,
}

impl Cache {
    fn new(stored: &Arc<Stored>) -> Arc<Self> {
        Arc::new(Self {
            stored: Arc::clone(stored),
            cached: Mutex::new(None),
            sync_fails: AtomicBool::new(false),
        })
    }

    pub fn read(&self) -> u64 {
        let load = || (self.stored.number.load(Ordering::Acquire), false);
        self.cached.lock().get_or_insert_with(load).0
    }

    /// As direct I/O does: what is dirty here is written back first.
    fn read_direct(&self) -> u64 {
        self.flush();
        self.stored.number.load(Ordering::Acquire)
    }

    pub fn write(&self, number: u64) {
        *self.cached.lock() = Some((number, true));
        self.stored.truth.store(number, Ordering::Release);
    }

    fn flush(&self) {
        if let Some((number, dirty)) = &mut *self.cached.lock()
            && *dirty
        {
            self.stored.number.store(*number, Ordering::Release);
            *dirty = false;
        }
    }
}

impl Duties for Cache {
    fn sync(&self, _to: Mode) -> Result<(), Errno> {
        if self.sync_fails.load(Ordering::Relaxed) {
            return Err(Errno::ENOSPC);
        }
        self.flush();
        Ok(())
    }

    fn invalidate(&self, _to: Mode) {
        *self.cached.lock() = None;
    }
}

pub struct Node {
    pub space: Space,
    pub files: Vec<(Arc<Glock>, Arc<Cache>)>,
}

pub fn node(service: &dyn LockService, which: usize, stored: &[Arc<Stored>]) -> Node {
    let options = Options {
        hold: Duration::from_millis(1),
        workers: 2,
        ..Options::default()
    };
    let space = Space::join(service, &format!("node{which}"), options).unwrap();
    let files = (1..).zip(stored).map(|(number, stored)| {
        let cache = Cache::new(stored);
        let duties: Arc<dyn Duties> = cache.clone();
        (space.glock(name(number), || duties), cache)
    });
    let files = files.collect();
    Node { space, files }
}

pub fn operate(random: &mut SmallRng, glock: &Glock, cache: &Cache) {
    let mode = [Shared, Deferred, Exclusive][random.random_range(0..3)];
    let extra = [
        Flags::NONE,
        Flags::NONE,
        Flags::TRY,
        Flags::TRY_1CB,
        Flags::EXACT,
        Flags::NOCACHE,
        Flags::SKIP,
    ][random.random_range(0..7)];
    let guard = match glock.lock(Request::new(mode).with(extra)) {
        Ok(guard) => guard,
        Err(Refusal::TryFailed) if extra.tries() => return,
        Err(why) => panic!("{why:?}"),
    };
    let stored = &cache.stored;
    let [readers, direct, writers] = &stored.inside;
    let (mine, others) = match mode {
        Shared => (readers, [direct, writers]),
        Deferred => (direct, [readers, writers]),
        Exclusive => (writers, [readers, direct]),
        Unlocked => unreachable!("not drawn"),
    };
    let before = mine.fetch_add(1, Ordering::SeqCst);
    assert!(mode != Exclusive || before == 0, "two writers");
    for other in others {
        assert_eq!(other.load(Ordering::SeqCst), 0, "{mode:?} beside another");
    }
    let truth = stored.truth.load(Ordering::Acquire);
    let seen = match mode {
        Deferred => cache.read_direct(),
        _ => cache.read(),
    };
    assert_eq!(seen, truth, "stale under {mode:?}");
    if mode == Exclusive {
        cache.write(truth + 1);
    }
    mine.fetch_sub(1, Ordering::SeqCst);
    drop(guard);
}

/// Has three threads of each node ask for anything, in any order, and looks at what they see and leave behind.
pub fn race(nodes: Vec<Node>, stored: &[Arc<Stored>], operations: usize, meanwhile: impl FnOnce()) {
    let seed: u64 = SmallRng::from_os_rng().random();
    println!("seed {seed}");
    let (done, ended) = channel();
    let mut threads = 0;
    for node in &nodes {
        for _ in 0..3 {
            threads += 1;
            let files = node.files.clone();
            let done = done.clone();
            std::thread::spawn(move || {
                let mut random = SmallRng::seed_from_u64(seed ^ threads);
                for _ in 0..operations {
                    let (glock, cache) = &files[random.random_range(0..files.len())];
                    operate(&mut random, glock, cache);
                }
                done.send(())
            });
        }
    }
    drop(done);
    meanwhile();
    for _ in 0..threads {
        if ended.recv_timeout(PATIENCE).is_err() {
            for node in &nodes {
                for report in node.space.report() {
                    eprint!("{report}");
                }
            }
            panic!("a thread failed, or waits for ever");
        }
    }
    for node in nodes {
        drop(node.files);
        node.space.leave(PATIENCE).unwrap();
    }
    for stored in stored {
        let number = stored.number.load(Ordering::Relaxed);
        assert_eq!(
            number,
            stored.truth.load(Ordering::Relaxed),
            "a write was lost"
        );
    }
}
