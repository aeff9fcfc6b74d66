//! The `faults_disabled_mapping` mode: two files, gates taken in either order, and what happens while one is let go.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use pinfold::testing::{DeferredObject, MemoryObject, Queued};
use pinfold::{
    File, IoOptions, IovCursor, MEMORY_MIN, MapAccess, MapOptions, Mapping, Object, OpenOptions,
    Volume,
};
use pinfold_store::Operation;

use crate::rig::{MOMENT, PATIENCE, all, read, within};

const PAGE: usize = 4096;
const P: u64 = 4096;
const PAGES: usize = 16;

/// A file over a store that is slow until it is opened, with a mapping of all of it.
struct Side {
    file: File,
    direct: File,
    map: Mapping,
    slow: Arc<DeferredObject>,
}

impl Side {
    fn source(&self, page: usize, pages: usize) -> &[u8] {
        assert!((page + pages) * PAGE <= self.map.len());
        let start = self.map.as_ptr().wrapping_add(page * PAGE);
        // SAFETY: inside the mapping; the library makes raw copies of it alone.
        unsafe { std::slice::from_raw_parts(start, pages * PAGE) }
    }
}

/// Two files in a volume of the mode: `early` comes first where both gates are wanted.
struct Two {
    volume: Volume,
    early: Side,
    late: Side,
    _dir: tempfile::TempDir,
}

impl Two {
    /// `early` has 'e' in it and `late` 'l'; nothing is cached.
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let slow =
            [b'e', b'l'].map(|byte| DeferredObject::new(MemoryObject::with(&[byte; PAGES * PAGE])));
        let layers = slow.clone();
        let opened = AtomicUsize::new(0);
        let volume = Volume::builder()
            .memory(MEMORY_MIN)
            .background_interval(Duration::from_secs(3600))
            .dirty_age_max(Duration::from_secs(3600))
            .faults_disabled_mapping(true)
            .object_layer(Arc::new(move |_| {
                Arc::clone(&layers[opened.fetch_add(1, Ordering::Relaxed)]) as Arc<dyn Object>
            }))
            .open_dir(dir.path())
            .unwrap();
        let options = OpenOptions::new().read(true).write(true).create(true);
        let side = |name: &str, slow: &Arc<DeferredObject>| {
            let file = volume.open(name, &options).unwrap();
            file.set_len(PAGES as u64 * P).unwrap();
            let how = MapOptions::new().access(MapAccess::Write);
            Side {
                direct: volume.open(name, &options.direct(true)).unwrap(),
                map: file.map(0..PAGES as u64 * P, &how).unwrap(),
                slow: Arc::clone(slow),
                file,
            }
        };
        let early = side("early", &slow[0]);
        let late = side("late", &slow[1]);
        Self {
            volume,
            early,
            late,
            _dir: dir,
        }
    }

    fn let_go(&self) -> u64 {
        self.volume.statistics().cache.gates_dropped
    }

    #[track_caller]
    fn at_rest(&self) {
        let counted = self.volume.statistics().cache;
        assert!(counted.foll_pin_acquired > 0, "nothing was pinned");
        assert_eq!(counted.foll_pin_acquired, counted.foll_pin_released);
        assert_eq!(self.volume.pins_held(), []);
    }
}

/// Waits for what must come; the test's watchdog ends it if it does not.
fn until(mut so: impl FnMut() -> bool) {
    while !so() {
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn heap(pages: usize, byte: u8) -> pinfold::AlignedBuf {
    let mut buf = pinfold::AlignedBuf::zeroed(pages * PAGE);
    buf.as_mut_slice().fill(byte);
    buf
}

/// D-5, T46: whoever had to let its gate go drops again what came into the cache meanwhile.
#[test]
fn d5_t46_pages_cached_while_the_gate_was_open_are_dropped_again() {
    within(PATIENCE, || {
        let two = Two::new();
        two.late.slow.open();
        std::thread::scope(|scope| {
            // Keeps the gate of the early file blocked, as long as its store says nothing.
            let holder = scope.spawn(|| {
                let mut new = heap(4, b'h');
                two.early
                    .direct
                    .write_at(new.as_mut_slice(), 8 * P)
                    .unwrap()
            });
            assert!(two.early.slow.wait_queued(1, PATIENCE));
            // Its own gate is blocked when it comes to need the early one: the wrong way round.
            let writer = scope.spawn(|| {
                let source = two.early.source(0, 4);
                two.late.direct.write_at(source, 0).unwrap()
            });
            until(|| two.let_go() > 0);
            // The page comes back with its old bytes, and dirty, so that it does not go by itself.
            assert_eq!(two.late.map.write(100, b"x").unwrap(), 1);
            assert!(!writer.is_finished());
            two.early.slow.open();
            assert_eq!(holder.join().unwrap(), 4 * PAGE);
            assert_eq!(writer.join().unwrap(), 4 * PAGE);
        });
        all(
            &read(&two.late.file, 0, 4 * PAGE),
            b'e',
            "read after the write",
        );
        let mut mapped = vec![0; 4 * PAGE];
        assert_eq!(two.late.map.read(0, &mut mapped).unwrap(), mapped.len());
        all(&mapped, b'e', "as mapped");
        two.late.file.drop_cache().unwrap();
        all(&read(&two.late.file, 0, 4 * PAGE), b'e', "as stored");
        two.at_rest();
    });
}

/// The right way round a gate is waited for with the own one blocked: nobody fills its file meanwhile, and nothing has to be
/// done again.
#[test]
fn a_later_gate_is_waited_for_with_the_own_one_blocked() {
    within(PATIENCE, || {
        let two = Two::new();
        two.early.slow.open();
        read(&two.early.file, 0, PAGE);
        let gone = || two.volume.statistics().cache.dropped;
        let before = gone();
        std::thread::scope(|scope| {
            let holder = scope.spawn(|| {
                let mut new = heap(4, b'h');
                two.late.direct.write_at(new.as_mut_slice(), 8 * P).unwrap()
            });
            assert!(two.late.slow.wait_queued(1, PATIENCE));
            let writer = scope.spawn(|| {
                let source = two.late.source(0, 4);
                two.early.direct.write_at(source, 0).unwrap()
            });
            // The page has been dropped, so the gate is blocked.
            until(|| gone() > before);
            let reader = scope.spawn(|| read(&two.early.file, 0, PAGE));
            std::thread::sleep(MOMENT);
            assert!(!reader.is_finished(), "the gate was open");
            two.late.slow.open();
            assert_eq!(holder.join().unwrap(), 4 * PAGE);
            assert_eq!(writer.join().unwrap(), 4 * PAGE);
            all(&reader.join().unwrap(), b'l', "read during the write");
        });
        assert_eq!(two.let_go(), 0);
        two.at_rest();
    });
}

/// D-1: each needs the gate that the other blocks, and both end: the one whose gate comes later lets go.
#[test]
fn d1_writes_that_block_what_the_other_needs_both_end() {
    within(PATIENCE, || {
        let two = Two::new();
        let (early, late) = (&two.early, &two.late);
        late.slow.open();
        // Dirty, so that it is seen when the early gate is blocked.
        early.file.write_at(&[b'w'; PAGE], 4 * P).unwrap();
        let write = |to: &Side, from: &Side| {
            let bufs = [from.source(0, 1), from.source(8, 1)].map(std::io::IoSlice::new);
            let mut cursor = IovCursor::source(&bufs);
            let wrote = to
                .direct
                .write_cursor(&mut cursor, 4 * P, &IoOptions::default());
            assert_eq!(wrote.posix().unwrap(), 2 * P);
        };
        std::thread::scope(|scope| {
            // Blocks the late gate and waits for its first page.
            let up = scope.spawn(|| write(late, early));
            assert!(early.slow.wait_queued(1, PATIENCE));
            // Blocks the early gate and stores what is dirty; then comes to need the late one.
            let down = scope.spawn(|| write(early, late));
            let flushing = |queued: &Queued| queued.operation == Operation::Write;
            until(|| early.slow.queued().iter().any(flushing));
            // Now the other needs its second page, behind the early gate.
            early.slow.open();
            up.join().unwrap();
            down.join().unwrap();
        });
        assert!(two.let_go() > 0, "nobody was in anybody's way");
        all(&read(&late.file, 4 * P, 2 * PAGE), b'e', "the late file");
        all(&read(&early.file, 4 * P, 2 * PAGE), b'l', "the early file");
        two.at_rest();
    });
}

/// D-2: missing pages of the very file that is written to are not waited for, in the range or beside it.
#[test]
fn d2_a_source_in_the_file_that_is_written_to_ends() {
    within(PATIENCE, || {
        let two = Two::new();
        two.early.slow.open();
        let to = &two.early;
        for (from, at) in [(8, 0), (0, 0), (2, 0)] {
            to.file.drop_cache().unwrap();
            let wrote = to.direct.write_at(to.source(from, 4), at).unwrap();
            assert_eq!(wrote, 4 * PAGE);
        }
        all(&read(&to.file, 0, PAGES * PAGE), b'e', "the file");
        assert_eq!(two.let_go(), 0);
        two.at_rest();
    });
}

/// T29: a source larger than what may be pinned at once is brought in piece by piece, and counted once.
#[test]
fn t29_a_cold_source_goes_in_rounds() {
    within(PATIENCE, || {
        let two = Two::new();
        two.early.slow.open();
        two.late.slow.open();
        let wrote = two.early.direct.write_at(two.late.source(0, PAGES), 0);
        assert_eq!(wrote.unwrap(), PAGES * PAGE);
        all(&read(&two.early.file, 0, PAGES * PAGE), b'l', "the file");
        two.at_rest();
    });
}
