//! What serves a fault in the thread that took it enters no allocator, and waits for nobody who might be in it.
//!
//! A signal handler may load from a mapping on top of a thread that is inside malloc. So on the way there and back nothing is
//! allocated or freed (the allocator here ends the process), and nothing is waited for that a thread holds while it
//! allocates or frees (here all other threads are stuck in the allocator meanwhile).

#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(unsafe_code, reason = "an allocator, and addresses of mapped memory")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pinfold::{
    Advice, Delivery, Errno, File, MapAccess, MapOptions, Mapping, OpenOptions, Tracking, Volume,
};
use pinfold_mem::region::touch;
use pinfold_mem::region::view::View;
use pinfold_store::testing::{Action, FaultyObject, On, Rule};
use pinfold_store::{Object, Operation};

const PAGE: usize = 4096;
/// Longer than any fault takes on the busiest machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// Rounds of a test, and how long it goes on at most.
const ROUNDS_MAX: usize = 1000;
const ENOUGH: Duration = Duration::from_secs(3);

thread_local! {
    /// Faults of this thread that are being served, as far as the test can tell.
    static SERVED: Cell<bool> = const { Cell::new(false) };
}

/// While it is true every other thread that enters the allocator stays in it.
static STUCK: AtomicBool = AtomicBool::new(false);
/// Threads that stay in it.
static INSIDE: AtomicU64 = AtomicU64::new(0);

/// The system's allocator, as a program has it whose thread was interrupted inside.
struct Interrupted;

fn enter() {
    if SERVED.get() {
        end("the allocator was entered while a fault was served\n");
    }
    if STUCK.load(Ordering::SeqCst) {
        INSIDE.fetch_add(1, Ordering::SeqCst);
        while STUCK.load(Ordering::SeqCst) {
            thread::sleep(Duration::from_micros(50));
        }
        INSIDE.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Ends the process without allocating.
fn end(why: &str) -> ! {
    // SAFETY: the bytes live.
    unsafe { libc::write(2, why.as_ptr().cast(), why.len()) };
    // SAFETY: ends the process.
    unsafe { libc::abort() }
}

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Interrupted {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        enter();
        // SAFETY: the caller's promise, passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        enter();
        // SAFETY: the caller's promise, passed on.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Interrupted = Interrupted;

/// Runs an access to mapped memory; in it the allocator is out of bounds.
fn served<R>(access: impl FnOnce() -> R) -> R {
    SERVED.set(true);
    let result = access();
    SERVED.set(false);
    result
}

struct Rig {
    volume: Volume,
    _dir: tempfile::TempDir,
    store: Arc<std::sync::Mutex<Vec<Arc<FaultyObject>>>>,
}

impl Rig {
    fn new(memory: u64) -> Self {
        // Before the library's own handler, which has to come first.
        touch::install();
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(std::sync::Mutex::new(Vec::new()));
        let theirs = Arc::clone(&store);
        let layer = move |object: Arc<dyn Object>| -> Arc<dyn Object> {
            let faulty = FaultyObject::new(object);
            theirs.lock().unwrap().push(Arc::clone(&faulty));
            faulty
        };
        let volume = Volume::builder()
            .memory(memory)
            .object_layer(Arc::new(layer))
            .open_dir(dir.path())
            .unwrap();
        Self {
            volume,
            _dir: dir,
            store,
        }
    }

    fn file(&self, name: &str, pages: usize) -> File {
        let options = OpenOptions::new().read(true).write(true).create(true);
        let file = self.volume.open(name, &options).unwrap();
        for page in 0..pages {
            let bytes = [page as u8; PAGE];
            file.write_at(&bytes, (page * PAGE) as u64).unwrap();
        }
        file.sync_all().unwrap();
        file.drop_cache().unwrap();
        file
    }

    /// `None` where the system cannot do it.
    fn map(&self, file: &File, len: u64, tracking: Tracking) -> Option<Mapping> {
        let options = MapOptions::new()
            .access(MapAccess::Write)
            .delivery(Delivery::Inline)
            .tracking(tracking)
            .advice(Advice::Random);
        match file.map(0..len, &options) {
            Ok(map) => Some(map),
            Err(error) => {
                eprintln!("skipped: {error}");
                None
            }
        }
    }

    fn handed_over(&self) -> u64 {
        self.volume.statistics().faults.faults_handed_over
    }
}

fn view(map: &Mapping) -> View<'_> {
    View::of_user_mapping(map, map.as_ptr().expose_provenance(), map.len()).unwrap()
}

fn load(map: &Mapping, page: usize) -> Option<u8> {
    let view = view(map);
    served(|| view.byte(page * PAGE)).ok()
}

fn store(map: &Mapping, page: usize, at: usize, byte: u8) -> bool {
    let view = view(map);
    served(|| view.store(page * PAGE + at, &[byte])).is_ok()
}

#[test]
fn t67_a_fault_enters_no_allocator_whatever_comes_of_it() {
    let guard = watchdog();
    for tracking in [Tracking::Sync, Tracking::Async] {
        let rig = Rig::new(pinfold::MEMORY_MIN);
        let pages = 8 * rig.volume.statistics().pages_max as usize;
        let file = rig.file("a", pages);
        let end = (pages * PAGE) as u64;
        let Some(map) = rig.map(&file, end + 16 * PAGE as u64, tracking) else {
            continue;
        };
        // More than one, of more pages than a record has in place: each remembers what it has shown.
        let Some(second) = rig.map(&file, end, tracking) else {
            continue;
        };
        let before = rig.volume.statistics();
        // Reads what is missing, from the store, into room that other pages have to make, of this file and the other.
        let other = rig.file("b", 64);
        let others = rig.map(&other, other.len(), tracking).unwrap();
        let rounds = 3 * pages;
        for round in 0..rounds {
            guard.beat();
            let page = round * 77 % pages;
            match round % 8 {
                // A hit in the window, once its entry is gone.
                0 => {
                    assert_eq!(load(&map, page), Some(page as u8));
                    map.advise(Advice::DontNeed, page * PAGE..(page + 1) * PAGE)
                        .unwrap();
                    assert_eq!(load(&map, page), Some(page as u8));
                }
                // A first store to a page that is mapped for loads, and to one that is not there.
                1 => {
                    assert_eq!(load(&map, page), Some(page as u8));
                    assert!(store(&map, page, 1, 9));
                }
                2 => assert!(store(&map, page, 2, 9)),
                // A hit in the arena, from where the page moves.
                3 => {
                    let mut byte = [0];
                    assert_eq!(file.read_at(&mut byte, (page * PAGE) as u64).unwrap(), 1);
                    assert_eq!(load(&map, page), Some(page as u8));
                }
                4 => assert_eq!(load(&others, round % 64), Some((round % 64) as u8)),
                5 => assert!(store(&others, round % 64, 3, 9)),
                // A first load of what the other mapping shows.
                6 => {
                    assert_eq!(load(&map, page), Some(page as u8));
                    assert_eq!(load(&second, page), Some(page as u8));
                }
                _ => assert_eq!(load(&map, page), Some(page as u8)),
            }
        }
        let after = rig.volume.statistics();
        assert!(after.cache.evicted > before.cache.evicted + pages as u64);
        let taken = after.faults.faults - before.faults.faults;
        let handed = after.faults.faults_handed_over - before.faults.faults_handed_over;
        assert!(
            handed < taken,
            "{handed} of {taken} faults were handed over"
        );
        // Beyond the end, and where the store fails.
        assert_eq!(load(&map, pages + 1), None);
        assert!(!store(&map, pages + 1, 0, 1));
        file.sync_all().unwrap();
        other.sync_all().unwrap();
        file.drop_cache().unwrap();
        let fail = Rule::new(On::Only(Operation::Read), Action::Fail(Errno::EIO));
        rig.store
            .lock()
            .unwrap()
            .iter()
            .for_each(|object| object.add(fail.clone()));
        assert_eq!(load(&map, 3), None);
        assert!(!store(&map, 5, 0, 1));
        rig.store
            .lock()
            .unwrap()
            .iter()
            .for_each(|object| object.clear());
        assert_eq!(load(&map, 3), Some(3));
    }
}

#[test]
fn t67_a_fault_is_served_while_every_other_thread_is_stuck_in_the_allocator() {
    let guard = watchdog();
    for tracking in [Tracking::Sync, Tracking::Async] {
        let rig = Arc::new(Rig::new(1 << 20));
        let pages = 4 * rig.volume.statistics().pages_max as usize;
        let file = rig.file("a", 2 * pages);
        let Some(map) = rig.map(&file, (2 * pages * PAGE) as u64, tracking) else {
            continue;
        };
        let stop = Arc::new(AtomicBool::new(false));
        let handed = Arc::new(AtomicU64::new(0));
        let releaser = {
            // A fault that was handed over waits for a thread that may allocate: that is not what is tested here.
            let (rig, stop, handed) = (Arc::clone(&rig), Arc::clone(&stop), Arc::clone(&handed));
            thread::spawn(move || {
                let mut seen = rig.handed_over();
                while !stop.load(Ordering::SeqCst) {
                    let now = rig.handed_over();
                    if now != seen && STUCK.swap(false, Ordering::SeqCst) {
                        handed.fetch_add(1, Ordering::SeqCst);
                    }
                    seen = now;
                    thread::sleep(Duration::from_micros(200));
                }
            })
        };
        let busy: Vec<_> = (0..3)
            .map(|worker| {
                let (rig, stop) = (Arc::clone(&rig), Arc::clone(&stop));
                let own = rig.file(&format!("w{worker}"), pages / 2);
                let options = OpenOptions::new().read(true).write(true);
                let same = rig.volume.open("a", &options).unwrap();
                thread::spawn(move || make_busy(worker, pages, &rig, [&own, &same], &stop))
            })
            .collect();
        // A time, because how long a round takes is up to everybody else on the machine.
        let (begun, mut rounds) = (Instant::now(), 0);
        while rounds < ROUNDS_MAX && begun.elapsed() < ENOUGH {
            let round = rounds;
            rounds += 1;
            guard.beat();
            let page = round * 77 % pages;
            STUCK.store(true, Ordering::SeqCst);
            // Until somebody is in there, or nobody comes.
            for _ in 0..20 {
                if INSIDE.load(Ordering::SeqCst) > 1 {
                    break;
                }
                served(|| thread::sleep(Duration::from_micros(50)));
            }
            let done = if round % 3 == 0 {
                store(&map, page, 1, 9)
            } else {
                load(&map, page) == Some(page as u8)
            };
            STUCK.store(false, Ordering::SeqCst);
            assert!(done, "page {page}");
        }
        stop.store(true, Ordering::SeqCst);
        for thread in busy {
            thread.join().unwrap();
        }
        releaser.join().unwrap();
        let handed = handed.load(Ordering::SeqCst);
        println!("{tracking:?}: {handed} of {rounds} rounds were handed over");
        assert!(handed < rounds as u64, "{handed} of {rounds}");
    }
}

/// Calls the library in ways that allocate here and there, until told to stop: on a file of one's own and, in the second half
/// of its pages, on the one that the faults are in.
fn make_busy(worker: usize, pages: usize, rig: &Rig, [own, same]: [&File; 2], stop: &AtomicBool) {
    let mut buf = vec![0; 8 * PAGE];
    let mut round = worker;
    while !stop.load(Ordering::SeqCst) {
        round += 1;
        let at = (round * 53 % (pages / 2)) as u64 * PAGE as u64;
        match round % 6 {
            0 => drop(own.read_at(&mut buf, at).unwrap()),
            1 => drop(own.write_at(&buf[..PAGE], at).unwrap()),
            2 => own.write_back(0..u64::MAX).unwrap(),
            3 => {
                let far = (pages + round * 37 % pages) * PAGE;
                same.write_at(&buf[..100], far as u64).unwrap();
            }
            4 => drop(own.drop_cache()),
            _ => {
                let Some(map) = rig.map(own, own.len(), Tracking::Sync) else {
                    return;
                };
                let mut byte = [0];
                drop(map.read(round % pages / 2 * PAGE, &mut byte));
            }
        }
    }
}

/// Ends the process when nothing has gone on for long: what hangs may be everything, so it allocates nothing.
fn watchdog() -> Watchdog {
    let beats = Arc::new((AtomicU64::new(0), AtomicBool::new(false)));
    let theirs = Arc::clone(&beats);
    thread::spawn(move || {
        let mut seen = (0, Instant::now());
        while !theirs.1.load(Ordering::SeqCst) {
            thread::sleep(Duration::from_millis(20));
            let now = theirs.0.load(Ordering::SeqCst);
            if now != seen.0 {
                seen = (now, Instant::now());
            } else if seen.1.elapsed() > PATIENCE {
                end("a fault is not served\n");
            }
        }
    });
    Watchdog(beats)
}

struct Watchdog(Arc<(AtomicU64, AtomicBool)>);

impl Watchdog {
    fn beat(&self) {
        self.0.0.fetch_add(1, Ordering::SeqCst);
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.0.1.store(true, Ordering::SeqCst);
    }
}
