//! Nodes of one process that cache one number each under a glock: whoever may look sees the last write (INV6, T61, T64).
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends there")]

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Barrier};
use std::time::Duration;

use parking_lot::Mutex;
use pinfold_base::Errno;
use pinfold_lock::Mode::{self, Deferred, Exclusive, Shared, Unlocked};
use pinfold_lock::service::local::Local;
use pinfold_lock::{
    Duties, Flags, Glock, LockService, Name, Options, Refusal, Request, Space, lock_all,
};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

const PATIENCE: Duration = Duration::from_secs(120);

/// How many operations each thread makes; a long run asks for more.
fn operations() -> usize {
    std::env::var("PINFOLD_GLOCK_OPERATIONS").map_or(2000, |text| {
        text.parse().expect("PINFOLD_GLOCK_OPERATIONS is a number")
    })
}

fn name(number: u64) -> Name {
    Name {
        number,
        generation: 0,
    }
}

/// What a file is outside of any cache.
#[derive(Default)]
struct Stored {
    number: AtomicU64,
    /// The last number that anybody wrote, cached or not.
    truth: AtomicU64,
    /// Who is inside, over all nodes: readers, direct readers, writers.
    inside: [AtomicI64; 3],
}

/// One node's cache of it.
struct Cache {
    stored: Arc<Stored>,
    cached: Mutex<Option<(u64, bool)>>,
    sync_fails: AtomicBool,
}

impl Cache {
    fn new(stored: &Arc<Stored>) -> Arc<Self> {
        Arc::new(Self {
            stored: Arc::clone(stored),
            cached: Mutex::new(None),
            sync_fails: AtomicBool::new(false),
        })
    }

    fn read(&self) -> u64 {
        let load = || (self.stored.number.load(Ordering::Acquire), false);
        self.cached.lock().get_or_insert_with(load).0
    }

    /// As direct I/O does: what is dirty here is written back first.
    fn read_direct(&self) -> u64 {
        self.flush();
        self.stored.number.load(Ordering::Acquire)
    }

    fn write(&self, number: u64) {
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

struct Node {
    space: Space,
    files: Vec<(Arc<Glock>, Arc<Cache>)>,
}

fn node(service: &Local, which: usize, stored: &[Arc<Stored>]) -> Node {
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

fn operate(random: &mut SmallRng, glock: &Glock, cache: &Cache) {
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

#[test]
fn t61_nobody_sees_an_old_number_whatever_is_asked_in_whatever_order() {
    let seed: u64 = SmallRng::from_os_rng().random();
    println!("seed {seed}");
    let service = Local::new();
    let stored: Vec<Arc<Stored>> = (0..2).map(|_| Arc::default()).collect();
    let nodes: Vec<Node> = (0..3).map(|which| node(&service, which, &stored)).collect();
    let (done, ended) = channel();
    let mut threads = 0;
    for node in &nodes {
        for _ in 0..3 {
            threads += 1;
            let files = node.files.clone();
            let done = done.clone();
            std::thread::spawn(move || {
                let mut random = SmallRng::seed_from_u64(seed ^ threads);
                for _ in 0..operations() {
                    let (glock, cache) = &files[random.random_range(0..files.len())];
                    operate(&mut random, glock, cache);
                }
                done.send(())
            });
        }
    }
    drop(done);
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

#[test]
fn h8_two_nodes_that_both_convert_go_one_after_the_other() {
    let service = Local::new();
    let stored = [Arc::default()];
    let (done, ended) = channel();
    let together = Arc::new(Barrier::new(2));
    let nodes: Vec<Node> = (0..2).map(|which| node(&service, which, &stored)).collect();
    for node in &nodes {
        let (glock, cache) = node.files[0].clone();
        let together = Arc::clone(&together);
        let done = done.clone();
        std::thread::spawn(move || {
            for _ in 0..50 {
                drop(glock.lock(Request::new(Shared)).unwrap());
                together.wait();
                let _guard = glock.lock(Request::new(Exclusive)).unwrap();
                cache.write(cache.read() + 1);
            }
            done.send(())
        });
    }
    for _ in 0..2 {
        ended.recv_timeout(PATIENCE).expect("both go on");
    }
    assert_eq!(stored[0].truth.load(Ordering::Relaxed), 100);
}

#[test]
fn h10_two_nodes_that_take_two_files_in_opposite_order_go_on() {
    let service = Local::new();
    let stored: Vec<Arc<Stored>> = (0..2).map(|_| Arc::default()).collect();
    let (done, ended) = channel();
    let nodes: Vec<Node> = (0..2).map(|which| node(&service, which, &stored)).collect();
    for (which, node) in nodes.iter().enumerate() {
        let files = node.files.clone();
        let done = done.clone();
        std::thread::spawn(move || {
            for _ in 0..100 {
                let request = Request::new(Exclusive);
                let mut order = [(&*files[0].0, request), (&*files[1].0, request)];
                order.rotate_left(which);
                drop(lock_all(&order).unwrap());
            }
            done.send(())
        });
    }
    for _ in 0..2 {
        ended.recv_timeout(PATIENCE).expect("both go on");
    }
}

/// Every pair of modes on two nodes: who is granted beside whom, who is asked to give way, and what is left.
#[test]
fn t61_every_pair_of_modes_on_two_nodes() {
    for held in [Shared, Deferred, Exclusive] {
        for wanted in [Shared, Deferred, Exclusive] {
            let service = Local::new();
            let stored = [Arc::default()];
            let [a, b] = [0, 1].map(|which| node(&service, which, &stored));
            let [a, b] = [&a, &b].map(|node| Arc::clone(&node.files[0].0));
            let guard = a.lock(Request::new(held)).unwrap();
            let together = held.compatible(wanted);

            let tried = b.lock(Request::new(wanted).with(Flags::TRY));
            assert_eq!(tried.is_ok(), together, "{held:?} {wanted:?}");
            drop(tried);
            assert_eq!(a.report().counts.callbacks, 0, "TRY asks nobody");
            if together {
                continue;
            }
            let tried = b.lock(Request::new(wanted).with(Flags::TRY_1CB));
            assert_eq!(tried.unwrap_err(), Refusal::TryFailed);
            assert_eq!(a.report().counts.callbacks, 1, "TRY_1CB asks once");

            let (done, ended) = channel();
            let waits = Arc::clone(&b);
            std::thread::spawn(move || {
                let guard = waits.lock(Request::new(wanted));
                done.send(guard.map(|_| waits.mode()))
            });
            drop(guard);
            let mode = ended.recv_timeout(PATIENCE).expect("granted in the end");
            assert_eq!(mode, Ok(wanted));
            assert!(a.mode().compatible(wanted), "{held:?} {wanted:?}");
            let left = Mode::left_for(wanted);
            let expected = if held.falls_to(left) { left } else { Unlocked };
            assert_eq!(a.mode(), expected, "{held:?} {wanted:?}");
        }
    }
}

#[test]
fn t61_nodes_that_wait_are_served_in_order() {
    let service = Local::new();
    let stored = [Arc::default()];
    let nodes: Vec<Node> = (0..4).map(|which| node(&service, which, &stored)).collect();
    let first = nodes[0].files[0].0.lock(Request::new(Exclusive)).unwrap();
    let (done, order) = channel();
    for (which, node) in nodes.iter().enumerate().skip(1) {
        let glock = Arc::clone(&node.files[0].0);
        let done = done.clone();
        let asked = Arc::clone(&glock);
        std::thread::spawn(move || {
            let _guard = glock.lock(Request::new(Exclusive)).unwrap();
            done.send(which)
        });
        let end = std::time::Instant::now() + PATIENCE;
        while asked.report().counts.asked == 0 {
            assert!(std::time::Instant::now() < end, "never asked");
            std::thread::yield_now();
        }
        // Asked for, but perhaps not yet with the service: it has called the owner when it is.
        while nodes[0].files[0].0.report().counts.callbacks < which as u64 {
            assert!(std::time::Instant::now() < end, "never called");
            std::thread::yield_now();
        }
    }
    drop(first);
    let served: Vec<usize> = (0..3)
        .map(|_| order.recv_timeout(PATIENCE).expect("served"))
        .collect();
    assert_eq!(served, [1, 2, 3]);
}

#[test]
fn t64_a_node_that_cannot_write_back_keeps_its_lock_until_it_is_fenced() {
    let service = Local::new();
    let stored = [Arc::default()];
    let [a, b] = [0, 1].map(|which| node(&service, which, &stored));
    let (glock, cache) = a.files[0].clone();
    {
        let _guard = glock.lock(Request::new(Exclusive)).unwrap();
        cache.write(1);
    }
    cache.sync_fails.store(true, Ordering::Relaxed);
    let (done, ended) = channel();
    let (waits, b_cache) = b.files[0].clone();
    std::thread::spawn(move || {
        let guard = waits.lock(Request::new(Shared));
        done.send(guard.map(|_guard| b_cache.read()))
    });
    let end = std::time::Instant::now() + PATIENCE;
    while a.space.check().is_ok() {
        assert!(std::time::Instant::now() < end, "it never withdraws");
        std::thread::yield_now();
    }
    let refused = glock.lock(Request::new(Shared));
    assert_eq!(refused.unwrap_err(), Refusal::Failed(Errno::EIO));
    assert!(ended.try_recv().is_err(), "handed over");
    // The withdrawal reaches the service a moment after it is noticed here: fence until it was there to be fenced.
    loop {
        service.fence("node0");
        match ended.recv_timeout(Duration::from_millis(20)) {
            // What was never stored is lost, and nobody sees it half.
            Ok(seen) => break assert_eq!(seen, Ok(0)),
            Err(_) => assert!(std::time::Instant::now() < end, "never granted"),
        }
    }
}

#[test]
fn a_name_is_given_once() {
    let service = Local::new();
    let one = Space::join(&service, "one", Options::default()).unwrap();
    let again = Space::join(&service, "one", Options::default());
    assert_eq!(again.err(), Some(Errno::EEXIST));
    one.leave(PATIENCE).unwrap();
    let service: &dyn LockService = &service;
    drop(Space::join(service, "one", Options::default()).unwrap());
}
