//! Buffers that go bad: memory without access, poisoned memory, a kernel file's mapping that is cut short, before a call and
//! during it. Buffered and direct, reads and writes (T07, T27, T28 widened; SEMANTICS.md A, C).
//!
//! Attempts are counted: how often memory was brought in is known of the process only, so calls whose attempts are counted
//! have it to themselves.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use pinfold::testing::{Action, FaultyObject, On, Rule};
use pinfold::{Direction, Errno, File, IoOptions, IovCursor, OpenOptions, Progress, Volume};
use pinfold_mem::region::view::{FileMap, Sharing};
use pinfold_mem::region::{Protection, Region, UserIov};
use pinfold_store::Operation;

const PAGE: usize = Region::PAGE;
const PAGES: usize = 8;
const LEN: usize = PAGES * PAGE;
/// Attempts that a call makes at most for one byte that nobody can access (T07).
const ATTEMPTS_MAX: u64 = 3;
/// Times a byte's page is brought in at most while somebody takes it away again; the library's own bound.
const BRING_IN_MAX: u64 = 64;
/// Taken shared by a call, and exclusive by one whose attempts are counted.
static CALLS: RwLock<()> = RwLock::new(());

/// Ends the process when `body` hangs.
fn watched(body: impl FnOnce() + Send + 'static) {
    let (done, told) = mpsc::channel();
    let worker = thread::spawn(move || {
        body();
        let _ = done.send(());
    });
    if told.recv_timeout(Duration::from_secs(120)) == Err(mpsc::RecvTimeoutError::Timeout) {
        eprintln!("a call hangs");
        std::process::abort();
    }
    worker.join().unwrap();
}

struct Rig {
    dir: tempfile::TempDir,
    volume: Volume,
}

impl Rig {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("served")).unwrap();
        let volume = Volume::builder()
            .memory(1 << 20)
            .open_dir(dir.path().join("served"))
            .unwrap();
        Self { dir, volume }
    }

    /// A file of `LEN` bytes of 'f', stored and not cached.
    fn file(&self, direct: bool) -> File {
        let options = OpenOptions::new().read(true).write(true).create(true);
        let file = self.volume.open("f", &options).unwrap();
        file.write_at(&[b'f'; LEN], 0).unwrap();
        file.set_len(LEN as u64).unwrap();
        file.sync_all().unwrap();
        file.drop_cache().unwrap();
        self.volume.open("f", &options.direct(direct)).unwrap()
    }

    /// A file that is not served, and a mapping of it.
    fn foreign(&self) -> (std::fs::File, FileMap) {
        let path = self.dir.path().join("foreign");
        std::fs::write(&path, [b'b'; LEN]).unwrap();
        let options = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(path);
        let file = options.unwrap();
        let map = FileMap::new(file.as_fd(), 0, LEN, Sharing::Shared).unwrap();
        (file, map)
    }
}

fn moved(file: &File, direction: Direction, iov: &UserIov<'_>) -> (u64, Option<Errno>) {
    let _beside = CALLS.read().unwrap_or_else(PoisonError::into_inner);
    made(file, direction, iov)
}

/// As [`moved`], by a call that brings memory in no more than `most` times.
fn moved_within(
    rig: &Rig,
    most: u64,
    file: &File,
    direction: Direction,
    iov: &UserIov<'_>,
) -> (u64, Option<Errno>) {
    let _alone = CALLS.write().unwrap_or_else(PoisonError::into_inner);
    let brought_in = || rig.volume.statistics().fault_in_calls;
    let before = brought_in();
    let outcome = made(file, direction, iov);
    let attempts = brought_in() - before;
    assert!(attempts <= most, "{attempts} attempts, {direction:?}");
    outcome
}

fn made(file: &File, direction: Direction, iov: &UserIov<'_>) -> (u64, Option<Errno>) {
    let mut cursor: IovCursor<'_> = iov.cursor(direction);
    let how = IoOptions::default();
    let Progress { done, stop } = match direction {
        Direction::Source => file.write_cursor(&mut cursor, 0, &how),
        Direction::Target => file.read_cursor(&mut cursor, 0, &how),
    };
    assert_eq!(cursor.count() as u64 + done, iov.bytes() as u64, "A-7");
    (done, stop.map(|error| error.errno()))
}

const WAYS: [(bool, Direction); 4] = [
    (false, Direction::Source),
    (false, Direction::Target),
    (true, Direction::Source),
    (true, Direction::Target),
];

#[test]
fn memory_that_ends_is_used_to_its_last_byte_or_block() {
    watched(|| {
        let rig = Rig::new();
        let region = Region::pages(2 * PAGES).unwrap();
        for (direct, direction) in WAYS {
            for good in [0, PAGE, 3 * PAGE] {
                region.protect(0..2 * LEN, Protection::ReadWrite).unwrap();
                region.fill(0..2 * LEN, b'b').unwrap();
                region.protect(LEN..2 * LEN, Protection::None).unwrap();
                // Direct transfers begin at blocks; others anywhere.
                let odd = if direct { 0 } else { 13 };
                let file = rig.file(direct);
                let start = LEN - good - odd.min(good);
                let iov = region.iov(start..start + LEN);
                let whole = (LEN - start) as u64;
                let expected = (whole, Some(Errno::EFAULT));
                assert_eq!(
                    moved_within(&rig, ATTEMPTS_MAX, &file, direction, &iov),
                    expected,
                    "{direct} {direction:?}"
                );
                if direction == Direction::Source {
                    file.sync_all().unwrap();
                    let stored = std::fs::read(rig.dir.path().join("served/f")).unwrap();
                    let (new, old) = stored.split_at(whole as usize);
                    assert!(
                        new.iter().all(|&byte| byte == b'b'),
                        "what was told is there"
                    );
                    assert!(old.iter().all(|&byte| byte == b'f') && stored.len() == LEN);
                } else {
                    let got = region.to_vec(start..LEN).unwrap();
                    assert!(got.iter().all(|&byte| byte == b'f'));
                }
            }
        }
    });
}

#[test]
fn a_foreign_mapping_that_was_cut_short_is_used_to_its_last_page() {
    watched(|| {
        let rig = Rig::new();
        for (direct, direction) in WAYS {
            for good in [0, 1, 5] {
                let (kernel, map) = rig.foreign();
                let file = rig.file(direct);
                kernel.set_len((good * PAGE) as u64).unwrap();
                let iov = map.view().iov(0..LEN);
                let outcome = moved_within(&rig, ATTEMPTS_MAX, &file, direction, &iov);
                let expected = ((good * PAGE) as u64, Some(Errno::EFAULT));
                assert_eq!(outcome, expected, "{direct} {direction:?}");
            }
        }
    });
}

/// Poison of another program's: what lies before it is moved, and nobody gets a signal.
#[test]
fn poisoned_memory_is_used_to_the_page_before_it() {
    watched(|| {
        let rig = Rig::new();
        let region = Region::pages(PAGES).unwrap();
        for (direct, direction) in WAYS {
            for (good, bad) in [(0, 1), (1, 1), (3, 5), (5, 2), (7, 1)] {
                region.discard(0..LEN).unwrap();
                region.fill(0..LEN, b'b').unwrap();
                match region.poison(good * PAGE..(good + bad) * PAGE) {
                    Err(errno @ (Errno::EOPNOTSUPP | Errno::EPERM)) => {
                        return eprintln!("skipped: no memory can be poisoned here: {errno}");
                    }
                    poisoned => poisoned.unwrap(),
                }
                let file = rig.file(direct);
                let iov = region.iov(0..LEN);
                let outcome = moved_within(&rig, ATTEMPTS_MAX, &file, direction, &iov);
                let whole = good * PAGE;
                let expected = (whole as u64, Some(Errno::EFAULT));
                assert_eq!(outcome, expected, "{direct} {direction:?}, {bad} behind");
                if direction == Direction::Source {
                    file.sync_all().unwrap();
                    let stored = std::fs::read(rig.dir.path().join("served/f")).unwrap();
                    let (new, old) = stored.split_at(whole);
                    assert!(new.iter().all(|&byte| byte == b'b'), "what was told");
                    assert!(old.iter().all(|&byte| byte == b'f') && stored.len() == LEN);
                } else {
                    let got = region.to_vec(0..whole).unwrap();
                    assert!(got.iter().all(|&byte| byte == b'f'), "what was told");
                }
            }
        }
        assert!(rig.volume.pins_held().is_empty());
    });
}

/// A store is asked once for all, once for what is good of it, and not over and over.
#[test]
fn a_direct_call_that_meets_bad_memory_goes_to_the_store_twice() {
    watched(|| {
        let counted: Arc<Mutex<Option<Arc<FaultyObject>>>> = Arc::default();
        let layered = Arc::clone(&counted);
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::builder()
            .memory(1 << 20)
            .object_layer(Arc::new(move |inner| {
                let faulty = FaultyObject::new(inner);
                *layered.lock().unwrap() = Some(Arc::clone(&faulty));
                faulty
            }))
            .open_dir(dir.path())
            .unwrap();
        let options = OpenOptions::new().read(true).write(true).create(true);
        let file = volume.open("f", &options.direct(true)).unwrap();
        file.set_len(LEN as u64).unwrap();
        let object = counted.lock().unwrap().clone().unwrap();
        // A rule that changes nothing counts.
        for operation in [Operation::Read, Operation::Write] {
            object.add(Rule::new(On::Only(operation), Action::Short(u64::MAX)));
        }
        let region = Region::pages(PAGES).unwrap();
        region.fill(0..LEN, b'b').unwrap();
        let bad = 5 * PAGE..LEN;
        region.protect(bad, Protection::None).unwrap();
        for direction in [Direction::Source, Direction::Target] {
            for (good, transfers) in [(5, 2), (0, 1)] {
                let before = object.struck();
                let start = (5 - good) * PAGE;
                let (done, errno) = moved(&file, direction, &region.iov(start..LEN));
                assert_eq!((done, errno), ((good * PAGE) as u64, Some(Errno::EFAULT)));
                assert_eq!(object.struck() - before, transfers, "{direction:?}");
            }
        }
    });
}

/// Calls with a buffer that comes and goes; each has to end, and to tell no more than is so.
fn beside(rig: &Rig, iov: &UserIov<'_>, meanwhile: impl Fn(usize) + Sync) {
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let changes = scope.spawn(|| {
            let mut round = 0;
            while !stop.load(Ordering::SeqCst) {
                round += 1;
                meanwhile(round);
                thread::yield_now();
            }
        });
        let begun = Instant::now();
        for (direct, direction) in WAYS {
            let file = rig.file(direct);
            for round in 0..200 {
                if round > 10 && begun.elapsed() > Duration::from_secs(4) {
                    break;
                }
                let most = BRING_IN_MAX * (PAGES as u64 + 1);
                let (done, errno) = moved_within(rig, most, &file, direction, iov);
                assert!(matches!(errno, None | Some(Errno::EFAULT)), "{errno:?}");
                assert!(
                    errno.is_some() || done == LEN as u64,
                    "{done} bytes and no reason"
                );
                assert_eq!(file.len(), LEN as u64);
            }
        }
        stop.store(true, Ordering::SeqCst);
        changes.join().unwrap();
    });
    rig.volume.sync().unwrap();
    assert_eq!(rig.volume.statistics().pages_dirty, 0);
    assert!(rig.volume.pins_held().is_empty());
    let stored = std::fs::read(rig.dir.path().join("served/f")).unwrap();
    // What was read into the buffer may have been written from it again; a foreign file grows with zeros.
    assert!(stored.iter().all(|byte| b"fb\0".contains(byte)) && stored.len() == LEN);
}

#[test]
fn calls_end_while_the_half_of_their_buffer_comes_and_goes() {
    watched(|| {
        let rig = Rig::new();
        let region = Region::pages(PAGES).unwrap();
        region.fill(0..LEN, b'b').unwrap();
        beside(&rig, &region.iov(0..LEN), |round| {
            let access = if round % 2 == 0 {
                Protection::ReadWrite
            } else {
                Protection::None
            };
            region.protect(LEN / 2..LEN, access).unwrap();
        });
    });
}

#[test]
fn calls_end_while_the_file_behind_their_buffer_is_cut_and_grows() {
    watched(|| {
        let rig = Rig::new();
        let (kernel, map) = rig.foreign();
        beside(&rig, &map.view().iov(0..LEN), |round| {
            let pages = [PAGES, 3, 0][round % 3];
            kernel.set_len((pages * PAGE) as u64).unwrap();
        });
    });
}
