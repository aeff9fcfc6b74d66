//! Stores through a mapping in the middle of calls that drop or move pages: the store is asked to wait just there.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pinfold::{AllocateMode, Errno, File, MapAccess, Mapping, Object, Progress, Volume};
use pinfold_store::{Geometry, Rearrange, Seek, StoreError, StoreResult, SyncScope, Transfer};

use super::rig::{PAGE, Rig, SMALL, load, store, watched};

/// How long a call is held up for a store that has to wait for it, as it should.
const PATIENCE: Duration = Duration::from_millis(300);

/// Hold up the end of the next write; zero holds up nothing.
const AT_WRITE: u8 = 1;
/// Hold up the next punch, once done.
const AT_PUNCH: u8 = 2;
/// Somebody is held up.
const HELD: u8 = 3;

#[derive(Debug, Default)]
struct Stage {
    mood: AtomicU8,
    /// Set by who has stored what the call was held up for.
    go_on: AtomicBool,
    /// Writes ended since the last hold-up began.
    written: AtomicUsize,
}

impl Stage {
    /// Waits in the middle of a call, if it is the one.
    fn hold(&self, at: u8) {
        let held = self
            .mood
            .compare_exchange(at, HELD, Ordering::SeqCst, Ordering::SeqCst);
        if held.is_ok() {
            self.written.store(0, Ordering::SeqCst);
            wait_for(|| self.go_on.load(Ordering::SeqCst));
        }
    }
}

/// Waits for a while; tells whether it came true.
fn wait_for(come: impl Fn() -> bool) -> bool {
    let until = Instant::now() + PATIENCE;
    while !come() && Instant::now() < until {
        thread::sleep(Duration::from_millis(1));
    }
    come()
}

/// A store that is slow where it is told to be.
#[derive(Debug)]
struct Staged {
    inner: Arc<dyn Object>,
    stage: Arc<Stage>,
}

impl Object for Staged {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn read(&self, batch: Vec<Transfer>) {
        self.inner.read(batch);
    }

    fn write(&self, batch: Vec<Transfer>) {
        for transfer in batch {
            let progress: Progress<StoreError> =
                self.inner.write_wait(transfer.offset, &transfer.segments);
            (transfer.done)(progress);
            self.stage.written.fetch_add(1, Ordering::SeqCst);
        }
        self.stage.hold(AT_WRITE);
    }

    fn len(&self) -> StoreResult<u64> {
        self.inner.len()
    }

    fn set_len(&self, len: u64) -> StoreResult<()> {
        self.inner.set_len(len)
    }

    fn allocate(&self, range: Range<u64>) -> StoreResult<()> {
        self.inner.allocate(range)
    }

    fn punch(&self, range: Range<u64>) -> StoreResult<()> {
        self.inner.punch(range)?;
        self.stage.hold(AT_PUNCH);
        Ok(())
    }

    fn rearrange(&self, how: Rearrange, range: Range<u64>) -> StoreResult<()> {
        self.inner.rearrange(how, range)
    }

    fn space_left(&self) -> Option<u64> {
        self.inner.space_left()
    }

    fn sync(&self, scope: SyncScope) -> StoreResult<()> {
        self.inner.sync(scope)
    }

    fn seek(&self, what: Seek, offset: u64) -> StoreResult<Option<u64>> {
        self.inner.seek(what, offset)
    }
}

/// Runs `call` on a file of 8 pages, held up as `mood` says, while another thread stores 0xee at byte 7 of page 5.
fn with_a_store_inside(
    mood: u8,
    call: impl Fn(&File) -> Option<()>,
    check: impl Fn(&Rig, &File, &Mapping),
) {
    for delivery in [pinfold::Delivery::Handler, pinfold::Delivery::Inline] {
        let stage = Arc::new(Stage::default());
        let shared = Arc::clone(&stage);
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::builder()
            .memory(SMALL)
            .background_interval(Duration::from_millis(5))
            .dirty_age_max(Duration::from_millis(5))
            .object_layer(Arc::new(move |inner| {
                Arc::new(Staged {
                    inner,
                    stage: Arc::clone(&shared),
                })
            }))
            .open_dir(dir.path())
            .unwrap();
        let rig = Rig {
            volume,
            delivery,
            dir,
        };
        let file = rig.file("a", 8 * PAGE, 1);
        let map = rig.map_range(&file, 0..16 * PAGE as u64, MapAccess::Write);
        for page in 0..8 {
            load(&map, page * PAGE);
        }
        if mood == AT_WRITE {
            // Something to be written when the call flushes.
            store(&map, 5 * PAGE, 0xdd);
        }
        stage.mood.store(mood, Ordering::SeqCst);
        let possible = thread::scope(|scope| {
            let storing = scope.spawn(|| {
                if !wait_for(|| stage.mood.load(Ordering::SeqCst) == HELD) {
                    return;
                }
                store(&map, 5 * PAGE + 7, 0xee);
                if mood == AT_PUNCH {
                    // Once the background has stored it the call may go on.
                    wait_for(|| stage.written.load(Ordering::SeqCst) > 0);
                }
                stage.go_on.store(true, Ordering::SeqCst);
            });
            let possible = call(&file);
            storing.join().unwrap();
            possible
        });
        if possible.is_some() {
            assert_eq!(stage.mood.load(Ordering::SeqCst), HELD, "it was held up");
            check(&rig, &file, &map);
        }
    }
}

/// Calls `allocate`; `None` where the file system cannot.
fn allocate(file: &File, mode: AllocateMode, pages: Range<u64>) -> Option<()> {
    let page = PAGE as u64;
    match file.allocate(mode, pages.start * page..pages.end * page) {
        Ok(()) => Some(()),
        Err(error) if error.errno() == Errno::EOPNOTSUPP => None,
        Err(error) => panic!("{error}"),
    }
}

fn byte(file: &File, at: usize) -> u8 {
    let mut byte = [0];
    file.read_at(&mut byte, at as u64).unwrap();
    byte[0]
}

#[test]
fn a_store_while_the_file_is_shifted_is_not_lost() {
    watched("insert", || {
        with_a_store_inside(
            AT_WRITE,
            |file| allocate(file, AllocateMode::Insert, 2..3),
            |_, file, _| {
                // Before the shift, and moved with it; or after it.
                let found = [byte(file, 6 * PAGE + 7), byte(file, 5 * PAGE + 7)];
                assert!(found.contains(&0xee), "{found:x?}");
            },
        );
    });
    watched("collapse", || {
        with_a_store_inside(
            AT_WRITE,
            |file| allocate(file, AllocateMode::Collapse, 2..3),
            |_, file, _| {
                let found = [byte(file, 4 * PAGE + 7), byte(file, 5 * PAGE + 7)];
                assert!(found.contains(&0xee), "{found:x?}");
            },
        );
    });
}

/// F-5.
#[test]
fn t55_a_store_while_its_page_is_punched_brings_nothing_back() {
    watched("punch", || {
        with_a_store_inside(
            AT_PUNCH,
            |file| allocate(file, AllocateMode::Punch, 4..7),
            |_, file, _| {
                file.sync_all().unwrap();
                file.drop_cache().unwrap();
                let mut back = vec![1; 3 * PAGE];
                file.read_at(&mut back, 4 * PAGE as u64).unwrap();
                back[PAGE + 7] = 0;
                let bad = back.iter().position(|&byte| byte != 0);
                assert_eq!(bad, None, "old bytes after the punch");
            },
        );
    });
}
