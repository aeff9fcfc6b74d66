//! Stores that stop half way, wait in the middle of a punch, or fail: what later calls may see of it.

use std::ops::Range;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use pinfold::testing::{DeferredObject, MemoryObject};
use pinfold::{Direction, Errno, IoOptions, MapOptions, Object, Progress, Seek};
use pinfold_mem::region::{Protection, Region};
use pinfold_mem::{AlignedBuf, Segments};
use pinfold_store::{Geometry, Operation, StoreError, StoreResult, SyncScope, Transfer};

use crate::rig::{MOMENT, PATIENCE, Rig, all, read, within};

const PAGE: usize = 4096;
const P: u64 = 4096;

/// A store that behaves as file systems do where they may not be trusted, or waits where it is told to.
#[derive(Debug)]
struct Bad {
    inner: Arc<MemoryObject>,
    /// A write of several pages stores garbage to its end, tells of the first page, and calls the rest bad memory.
    sloppy: bool,
    /// The next punch tells that it has been made, and waits.
    punch: Mutex<Option<(Sender<()>, Receiver<()>)>>,
}

impl Object for Bad {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn read(&self, batch: Vec<Transfer>) {
        self.inner.read(batch);
    }

    fn write(&self, batch: Vec<Transfer>) {
        for transfer in batch {
            let len = transfer.segments.bytes();
            if !self.sloppy || len <= PAGE {
                self.inner.write(vec![transfer]);
                continue;
            }
            let garbage = Arc::new(AlignedBuf::zeroed(len));
            let segments = Segments::of_buf(&garbage, len);
            segments.copy_from(0, &vec![b'g'; len]);
            let _ = self.inner.write_wait(transfer.offset, &segments);
            let error = StoreError {
                operation: Operation::Write,
                offset: transfer.offset,
                len: len as u64,
                errno: Errno::EFAULT,
            };
            drop(transfer.segments);
            (transfer.done)(Progress::stopped(P, error));
        }
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
        let held = self.punch.lock().unwrap().take();
        if let Some((made, go_on)) = held {
            made.send(()).unwrap();
            go_on.recv().unwrap();
        }
        self.inner.punch(range)
    }

    fn sync(&self, scope: SyncScope) -> StoreResult<()> {
        self.inner.sync(scope)
    }

    fn seek(&self, what: Seek, offset: u64) -> StoreResult<Option<u64>> {
        self.inner.seek(what, offset)
    }
}

/// C-6, T39: a write that stops early leaves nothing behind its end that a longer file would show.
#[test]
fn c6_t39_what_a_write_leaves_behind_its_prefix_does_not_come_to_light() {
    within(PATIENCE, || {
        let store = MemoryObject::new();
        let bad = Bad {
            inner: store.clone(),
            sloppy: true,
            punch: Mutex::new(None),
        };
        let rig = Rig::new(Arc::new(bad));
        let direct = rig.open(true);
        let region = Region::pages(4).unwrap();
        region.fill(0..4 * PAGE, b'n').unwrap();
        region.protect(PAGE..4 * PAGE, Protection::None).unwrap();
        let iov = region.iov(0..4 * PAGE);
        let mut cursor = iov.cursor(Direction::Source);
        let progress = direct.write_cursor(&mut cursor, 0, &IoOptions::default());
        assert_eq!(progress.done, P);
        assert_eq!(progress.stop.unwrap().errno(), Errno::EFAULT);
        assert_eq!((direct.len(), store.bytes().len()), (P, PAGE));
        direct.set_len(4 * P).unwrap();
        for file in [&direct, &rig.open(false)] {
            let bytes = read(file, 0, 4 * PAGE);
            all(&bytes[..PAGE], b'n', "the prefix");
            all(&bytes[PAGE..], 0, "behind it");
        }
    });
}

/// F-4: a fault on a page that is being punched waits, and brings nothing back.
#[test]
fn f4_a_fault_on_what_is_being_punched_waits_and_sees_zeros() {
    within(PATIENCE, || {
        let (made, punched) = channel();
        let (let_go, go_on) = channel();
        let bad = Bad {
            inner: MemoryObject::with(&[b'o'; 8 * PAGE]),
            sloppy: false,
            punch: Mutex::new(Some((made, go_on))),
        };
        let rig = Rig::new(Arc::new(bad));
        let file = rig.open(false);
        file.set_len(8 * P).unwrap();
        let map = file.map(0..8 * P, &MapOptions::new()).unwrap();
        std::thread::scope(|scope| {
            let puncher = scope.spawn(|| file.punch(2 * P..6 * P).unwrap());
            punched.recv_timeout(PATIENCE).unwrap();
            let fault = scope.spawn(|| {
                let mut seen = [0xee; 10];
                map.read(3 * PAGE, &mut seen).unwrap();
                seen
            });
            std::thread::sleep(MOMENT);
            assert!(!fault.is_finished(), "filled under the punch");
            let_go.send(()).unwrap();
            puncher.join().unwrap();
            assert_eq!(fault.join().unwrap(), [0; 10]);
        });
        all(&read(&file, 6 * P, 2 * PAGE), b'o', "behind the hole");
    });
}

/// G-3, G-4: an error of write-back is told through each file that was open, and through each once.
#[test]
fn g3_every_open_file_hears_of_an_error() {
    within(PATIENCE, || {
        let slow = DeferredObject::new(MemoryObject::new());
        let rig = Rig::new(slow.clone());
        let files = [rig.open(false), rig.open(false)];
        files[0].write_at(&[1; PAGE], 0).unwrap();
        std::thread::scope(|scope| {
            let sync = scope.spawn(|| files[0].sync_all());
            assert!(slow.wait_queued(1, PATIENCE));
            assert!(slow.fail(0, Errno::ENOSPC));
            let told = sync.join().unwrap().unwrap_err();
            assert_eq!(told.errno(), Errno::ENOSPC);
        });
        slow.open();
        assert_eq!(files[1].sync_all().unwrap_err().errno(), Errno::ENOSPC);
        for file in &files {
            file.sync_all().unwrap();
        }
        rig.open(false).sync_all().unwrap();
    });
}

/// G-6, T60: a writer who is slowed down keeps nothing that write-back needs, his file's lock included.
#[test]
fn g6_t60_write_back_goes_on_while_a_writer_sleeps() {
    within(PATIENCE, || {
        let store = MemoryObject::new();
        let slow = DeferredObject::new(store.clone());
        let rig = Rig::new(slow.clone());
        let file = rig.open(false);
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| file.write_at(&vec![1; 100 * PAGE], 0).unwrap());
            while rig.volume.statistics().cache.throttled == 0 {
                std::thread::yield_now();
            }
            while !writer.is_finished() {
                slow.release_all();
                std::thread::yield_now();
            }
            assert_eq!(writer.join().unwrap(), 100 * PAGE);
        });
        slow.open();
        file.sync_all().unwrap();
        all(&store.bytes(), 1, "as stored");
    });
}
