//! Interleavings forced step by step: the store holds transfers until the script lets them go.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pinfold::testing::{
    Action, CrashingObject, DeferredObject, FaultyObject, MemoryObject, On, Rule, Survival,
};
use pinfold::{AlignedBuf, Cancel, Direction, Errno, IoOptions, IovCursor, Object};
use pinfold_mem::region::{Protection, Region};
use pinfold_store::{Operation, SyncScope};

use crate::rig::{MOMENT, PATIENCE, Rig, all, read, within};

const PAGE: usize = 4096;

fn aligned(pages: usize, byte: u8) -> AlignedBuf {
    let mut buf = AlignedBuf::zeroed(pages * PAGE);
    buf.as_mut_slice().fill(byte);
    buf
}

#[test]
fn a_write_larger_than_the_dirty_limit_and_the_budget_ends() {
    within(PATIENCE, || {
        let store = MemoryObject::new();
        let rig = Rig::new(store.clone());
        let file = rig.open(false);
        let bytes: Vec<u8> = (0..4 << 20).map(|i: u32| (i >> 8) as u8).collect();
        assert_eq!(file.write_at(&bytes, 0).unwrap(), bytes.len());
        file.sync_all().unwrap();
        assert!(store.bytes() == bytes);
    });
}

#[test]
fn a_file_that_outlives_its_volume_goes_on_writing() {
    within(PATIENCE, || {
        let store = MemoryObject::new();
        let rig = Rig::new(store.clone());
        let file = rig.open(false);
        let Rig { volume, .. } = rig;
        volume.close().unwrap();
        for i in 0..1024u32 {
            file.write_at(&[i as u8; PAGE], u64::from(i) * 4096)
                .unwrap();
        }
        drop(file);
        let stored = store.bytes();
        assert_eq!(stored.len(), 4 << 20);
        for (i, page) in stored.chunks(PAGE).enumerate() {
            all(page, i as u8, "the stored file");
        }
    });
}

/// An append is committed before the size tells of it: write-back in between must not take the new bytes for something
/// past the end.
#[test]
fn b4_write_back_during_an_append_loses_nothing() {
    within(PATIENCE, || {
        let store = MemoryObject::new();
        let rig = Rig::new(store.clone());
        let file = rig.open(false);
        let stop = Arc::new(AtomicBool::new(false));
        let flusher = {
            let (file, stop) = (Arc::clone(&file), Arc::clone(&stop));
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    file.write_back(0..u64::MAX).unwrap();
                }
            })
        };
        let record = [b'r'; 300];
        for i in 0..20_000u64 {
            assert_eq!(file.write_at(&record, i * 300).unwrap(), 300);
        }
        stop.store(true, Ordering::Relaxed);
        flusher.join().unwrap();
        file.drop_cache().unwrap();
        let stored = store.bytes();
        assert_eq!(stored.len(), 20_000 * 300);
        all(&stored, b'r', "the stored file");
    });
}

/// B-4 from the reader's side: nothing below the size is ever read as zero.
#[test]
fn b4_t14_a_reader_never_sees_the_size_before_the_data() {
    within(PATIENCE, || {
        let rig = Rig::with_interval(MemoryObject::new(), Duration::from_millis(1));
        let file = rig.open(false);
        let stop = Arc::new(AtomicBool::new(false));
        let reader = {
            let (file, stop) = (Arc::clone(&file), Arc::clone(&stop));
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let end = file.len();
                    let from = end.saturating_sub(5000);
                    let bytes = read(&file, from, 10_000);
                    assert!(bytes.len() as u64 >= end - from);
                    all(&bytes, b'x', "below the size");
                }
            })
        };
        for i in 0..20_000u64 {
            file.write_at(&[b'x'; 123], i * 123).unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        reader.join().unwrap();
    });
}

/// A transfer under way when the file is cut must have ended before the store is told, or it makes the stored file longer
/// again, with bytes that a later growth would show.
#[test]
fn a_transfer_in_flight_does_not_grow_a_file_that_was_cut() {
    within(PATIENCE, || {
        for cut in [5000u64, 4096, 100, 0] {
            let store = MemoryObject::new();
            let slow = DeferredObject::new(store.clone());
            let rig = Rig::new(slow.clone());
            let file = rig.open(false);
            file.write_at(&[b'q'; 8192], 0).unwrap();
            std::thread::scope(|scope| {
                scope.spawn(|| file.write_back(0..u64::MAX).unwrap());
                assert!(slow.wait_queued(1, PATIENCE));
                let cutter = scope.spawn(|| file.set_len(cut).unwrap());
                std::thread::sleep(MOMENT);
                assert!(!cutter.is_finished(), "cut to {cut} under a transfer");
                slow.open();
            });
            assert_eq!(store.bytes().len() as u64, cut);
            file.set_len(8192).unwrap();
            file.drop_cache().unwrap();
            let bytes = read(&file, 0, 8192);
            all(&bytes[..cut as usize], b'q', "below the cut");
            all(&bytes[cut as usize..], 0, "above the cut");
        }
    });
}

#[test]
fn a_punch_of_the_tail_keeps_the_size_in_the_store() {
    within(PATIENCE, || {
        let store = MemoryObject::new();
        let rig = Rig::new(store.clone());
        let file = rig.open(false);
        file.write_at(&[b'q'; 5000], 0).unwrap();
        file.punch(4096..8192).unwrap();
        file.sync_all().unwrap();
        assert_eq!(file.len(), 5000);
        let stored = store.bytes();
        assert_eq!(stored.len(), 5000);
        all(&stored[..4096], b'q', "before the hole");
        all(&stored[4096..], 0, "in the hole");
    });
}

#[test]
fn a_punch_that_the_store_refuses_changes_nothing() {
    within(PATIENCE, || {
        let store = FaultyObject::new(MemoryObject::new());
        store.add(Rule::new(
            On::Only(Operation::Punch),
            Action::Fail(Errno::EOPNOTSUPP),
        ));
        let rig = Rig::new(store);
        let file = rig.open(false);
        file.write_at(&[b'q'; 3 * PAGE], 0).unwrap();
        let refused = file.punch(100..2 * PAGE as u64 + 100).unwrap_err();
        assert_eq!(refused.errno(), Errno::EOPNOTSUPP);
        all(&read(&file, 0, 3 * PAGE), b'q', "after the refusal");
    });
}

/// A lender that waits for a page while it holds others would wait for a direct write that waits for those.
#[test]
fn lending_pages_does_not_hold_some_while_it_waits_for_others() {
    within(PATIENCE, || {
        let store = MemoryObject::with(&[b'a'; 60 * PAGE]);
        let slow = DeferredObject::new(store);
        slow.open();
        let rig = Rig::new(slow.clone());
        let (file, direct) = (rig.open(false), rig.open(true));
        file.set_len(60 * PAGE as u64).unwrap();
        for round in 0..200u64 {
            file.drop_cache().unwrap();
            read(&file, 10 * 4096, 10);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    let lease = file.lend(10 * 4096, 40 * PAGE).unwrap();
                    assert_eq!(lease.len(), 40 * PAGE);
                });
                scope.spawn(|| {
                    let mut buf = aligned(8, round as u8);
                    for page in [10, 12, 20, 30] {
                        direct.write_at(buf.as_mut_slice(), page * 4096).unwrap();
                    }
                });
            });
        }
    });
}

/// Leases may hold the whole budget only up to a share: what is beyond is copied.
#[test]
fn lending_more_than_the_budget_neither_stalls_nor_falls_short() {
    within(PATIENCE, || {
        let bytes: Vec<u8> = (0..256 * PAGE).map(|i| (i / PAGE) as u8).collect();
        let rig = Rig::new(MemoryObject::with(&bytes));
        let file = rig.open(false);
        file.set_len(bytes.len() as u64).unwrap();
        let leases: Vec<_> = (0..6)
            .map(|i| file.lend(i * 20 * 4096, 100 * PAGE).unwrap())
            .collect();
        for (i, lease) in leases.iter().enumerate() {
            assert_eq!(lease.len(), 100 * PAGE);
            let mut at = i * 20 * PAGE;
            for span in lease.spans() {
                let mut part = vec![0; span.len()];
                span.copy_to(0, &mut part);
                assert!(part == bytes[at..at + part.len()], "lease {i} at {at}");
                at += part.len();
            }
        }
        assert!(read(&file, 0, bytes.len()) == bytes);
    });
}

/// G-4: an error is told through an open file once, yet never is a write called durable whose own bytes were refused,
/// whoever else has heard of it.
#[test]
fn g4_a_durable_write_that_was_not_stored_hears_of_it_and_later_syncs_do_not() {
    within(PATIENCE, || {
        let slow = DeferredObject::new(MemoryObject::new());
        let rig = Rig::new(slow.clone());
        let file = rig.open(false);
        let write = |page: u64| {
            let how = IoOptions {
                dsync: true,
                ..IoOptions::default()
            };
            file.write_cursor(&mut IovCursor::from_slice(&[1; PAGE]), page * 4096, &how)
                .posix()
        };
        let told = std::thread::scope(|scope| {
            let first = scope.spawn(|| write(0));
            assert!(slow.wait_queued(1, PATIENCE));
            let second = scope.spawn(|| write(5));
            assert!(slow.wait_queued(2, PATIENCE));
            assert!(slow.fail(0, Errno::EIO));
            slow.open();
            [first.join().unwrap(), second.join().unwrap()]
        });
        assert_eq!(told[0].as_ref().unwrap_err().errno(), Errno::EIO);
        file.sync_all().unwrap();
    });
}

/// C-1, INV5: what a reader began to fetch before a direct write may not stay cached after it.
#[test]
fn c1_read_ahead_under_way_does_not_survive_a_direct_write() {
    within(PATIENCE, || {
        let slow = DeferredObject::new(MemoryObject::with(&[b'o'; 16 * PAGE]));
        let rig = Rig::new(slow.clone());
        let (file, direct) = (rig.open(false), rig.open(true));
        file.set_len(16 * PAGE as u64).unwrap();
        std::thread::scope(|scope| {
            // The read fetches its page and, ahead of it, those that follow.
            let reader = scope.spawn(|| read(&file, 0, 10));
            assert!(slow.wait_queued(2, PATIENCE));
            let writer = scope.spawn(|| {
                let mut new = aligned(4, b'n');
                direct.write_at(new.as_mut_slice(), 4096).unwrap()
            });
            std::thread::sleep(MOMENT);
            assert!(slow.queued().iter().all(|t| t.operation == Operation::Read));
            assert!(!writer.is_finished());
            // Old bytes arrive; only then may the write begin.
            slow.open();
            assert_eq!(writer.join().unwrap(), 4 * PAGE);
            reader.join().unwrap();
        });
        all(&read(&file, 4096, 4 * PAGE), b'n', "after the direct write");
    });
}

/// C-1 and C-2 from the other side: nobody fills the range while the write is with the device, not even with the zeros of
/// a hole.
#[test]
fn c2_a_reader_during_a_direct_write_waits_for_it() {
    within(PATIENCE, || {
        for size in [16 * PAGE as u64, PAGE as u64] {
            let slow = DeferredObject::new(MemoryObject::new());
            let rig = Rig::new(slow.clone());
            let (file, direct) = (rig.open(false), rig.open(true));
            file.set_len(size).unwrap();
            std::thread::scope(|scope| {
                let writer = scope.spawn(|| {
                    let mut new = aligned(2, b'n');
                    direct.write_at(new.as_mut_slice(), 0).unwrap()
                });
                assert!(slow.wait_queued(1, PATIENCE));
                let reader = scope.spawn(|| read(&file, 0, PAGE));
                std::thread::sleep(MOMENT);
                assert_eq!(slow.queued().len(), 1, "the reader went to the store");
                slow.open();
                writer.join().unwrap();
                all(&reader.join().unwrap(), b'n', "read during the write");
            });
            all(&read(&file, 0, 2 * PAGE), b'n', "read after the write");
        }
    });
}

/// C-10: a direct write that fails half way leaves no stale copy either.
#[test]
fn c10_a_direct_write_that_fails_leaves_nothing_stale_cached() {
    within(PATIENCE, || {
        let store = FaultyObject::new(MemoryObject::with(&[b'o'; 4 * PAGE]));
        let rig = Rig::new(store.clone());
        let (file, direct) = (rig.open(false), rig.open(true));
        file.set_len(4 * PAGE as u64).unwrap();
        all(&read(&file, 0, 4 * PAGE), b'o', "before");
        store.add(Rule::new(
            On::Only(Operation::Write),
            Action::FailAfter(2 * PAGE as u64, Errno::EIO),
        ));
        let mut new = aligned(4, b'n');
        let progress = direct.write_cursor(
            &mut IovCursor::from_slice(new.as_mut_slice()),
            0,
            &IoOptions::default(),
        );
        assert_eq!(progress.done, 2 * PAGE as u64);
        assert_eq!(progress.stop.unwrap().errno(), Errno::EIO);
        let bytes = read(&file, 0, 4 * PAGE);
        all(&bytes[..2 * PAGE], b'n', "what was stored");
        all(&bytes[2 * PAGE..], b'o', "what was not");
    });
}

/// B-2, INV4 and T13: a copy that stops in a page whose other bytes nobody has read leaves no trace.
#[test]
fn b2_a_short_copy_into_a_page_being_made_is_never_seen() {
    within(PATIENCE, || {
        let slow = DeferredObject::new(MemoryObject::with(&[b'o'; 2 * PAGE]));
        let rig = Rig::new(slow.clone());
        let file = rig.open(false);
        file.set_len(2 * PAGE as u64).unwrap();
        let region = Region::pages(2).unwrap();
        region.fill(0..2 * PAGE, b'n').unwrap();
        region.protect(PAGE..2 * PAGE, Protection::None).unwrap();
        std::thread::scope(|scope| {
            // 3000 good bytes for a whole page: the first try makes the page without reading it and comes short.
            let writer = scope.spawn(|| {
                let iov = region.iov(PAGE - 3000..2 * PAGE);
                let mut cursor = iov.cursor(Direction::Source);
                cursor.truncate(PAGE);
                file.write_cursor(&mut cursor, 0, &IoOptions::default())
            });
            // The second asks for the good bytes alone and has to read the rest.
            assert!(slow.wait_queued(1, PATIENCE));
            assert_eq!(slow.queued()[0].operation, Operation::Read);
            let reader = scope.spawn(|| read(&file, 0, PAGE));
            std::thread::sleep(MOMENT);
            assert!(!reader.is_finished(), "a page without contents was read");
            slow.open();
            let progress = writer.join().unwrap();
            assert_eq!(progress.done, 3000);
            assert_eq!(progress.stop.unwrap().errno(), Errno::EFAULT);
            let seen = reader.join().unwrap();
            let new = seen.iter().filter(|&&b| b == b'n').count();
            assert!(new == 0 || new == 3000, "{new} bytes of a write of 3000");
        });
        let bytes = read(&file, 0, 2 * PAGE);
        all(&bytes[..3000], b'n', "the good prefix");
        all(&bytes[3000..], b'o', "what follows");
        assert_eq!(file.len(), 2 * PAGE as u64);
    });
}

/// B-3: a write that moves nothing does not grow the file, and B-6: nor does its page come to light later.
#[test]
fn b3_b6_a_write_that_fails_past_the_end_leaves_no_trace() {
    within(PATIENCE, || {
        let rig = Rig::new(MemoryObject::new());
        let file = rig.open(false);
        file.write_at(b"abc", 0).unwrap();
        let region = Region::pages(1).unwrap();
        region.protect(0..PAGE, Protection::None).unwrap();
        for offset in [3u64, 10_000, 1 << 20] {
            let iov = region.iov(0..100);
            let progress = file.write_cursor(
                &mut iov.cursor(Direction::Source),
                offset,
                &IoOptions::default(),
            );
            assert_eq!(progress.posix().unwrap_err().errno(), Errno::EFAULT);
            assert_eq!(file.len(), 3);
        }
        file.set_len(20_000).unwrap();
        all(&read(&file, 3, 20_000), 0, "past the old end");
    });
}

/// G-2: a sync that finds a page on its way with older bytes waits for those and sends the newer ones after them.
#[test]
fn g2_g5_a_sync_waits_for_older_bytes_and_then_stores_the_newer() {
    within(PATIENCE, || {
        let store = MemoryObject::new();
        let slow = DeferredObject::new(store.clone());
        let rig = Rig::new(slow.clone());
        let file = rig.open(false);
        file.write_at(&[1; PAGE], 0).unwrap();
        std::thread::scope(|scope| {
            let old = scope.spawn(|| file.write_back(0..u64::MAX).unwrap());
            assert!(slow.wait_queued(1, PATIENCE));
            // G-5: made dirty again while its older bytes are under way.
            file.write_at(&[2; PAGE], 0).unwrap();
            let sync = scope.spawn(|| file.sync_all().unwrap());
            std::thread::sleep(MOMENT);
            assert_eq!(slow.queued().len(), 1, "two transfers of one page at once");
            assert!(slow.release(0));
            assert!(slow.wait_queued(1, PATIENCE));
            assert!(!sync.is_finished());
            slow.release_all();
            old.join().unwrap();
            sync.join().unwrap();
        });
        all(&store.bytes(), 2, "the stored page");
        assert_eq!(rig.volume.statistics().pages_dirty, 0);
    });
}

/// An object that cannot be read until the test says so.
#[derive(Debug)]
struct Unreadable {
    inner: Arc<DeferredObject>,
    readable: AtomicBool,
}

impl Object for Unreadable {
    fn geometry(&self) -> pinfold_store::Geometry {
        self.inner.geometry()
    }
    fn readable(&self) -> bool {
        self.readable.load(Ordering::SeqCst)
    }
    fn read(&self, batch: Vec<pinfold_store::Transfer>) {
        self.inner.read(batch);
    }
    fn write(&self, batch: Vec<pinfold_store::Transfer>) {
        self.inner.write(batch);
    }
    fn len(&self) -> pinfold_store::StoreResult<u64> {
        self.inner.len()
    }
    fn set_len(&self, len: u64) -> pinfold_store::StoreResult<()> {
        self.inner.set_len(len)
    }
    fn allocate(&self, range: std::ops::Range<u64>) -> pinfold_store::StoreResult<()> {
        self.inner.allocate(range)
    }
    fn punch(&self, range: std::ops::Range<u64>) -> pinfold_store::StoreResult<()> {
        self.inner.punch(range)
    }
    fn sync(&self, scope: SyncScope) -> pinfold_store::StoreResult<()> {
        self.inner.sync(scope)
    }
    fn seek(&self, what: pinfold::Seek, offset: u64) -> pinfold_store::StoreResult<Option<u64>> {
        self.inner.seek(what, offset)
    }
}

/// Bytes of a writer who may not read go straight to the store, past pages that a reader has cached or is just fetching.
#[test]
fn a_write_without_the_right_to_read_leaves_nothing_stale_cached() {
    within(PATIENCE, || {
        let slow = DeferredObject::new(MemoryObject::with(&[b'o'; 2 * PAGE]));
        slow.open();
        let object = Arc::new(Unreadable {
            inner: slow,
            readable: AtomicBool::new(true),
        });
        let rig = Rig::new(object.clone());
        let file = rig.open(false);
        file.set_len(2 * PAGE as u64).unwrap();
        file.write_at(b"dirty", PAGE as u64).unwrap();
        all(&read(&file, 0, PAGE), b'o', "cached before");
        object.readable.store(false, Ordering::SeqCst);
        file.write_at(&[b'n'; 100], 50).unwrap();
        file.write_at(&[b'n'; 100], PAGE as u64 + 50).unwrap();
        object.readable.store(true, Ordering::SeqCst);
        let bytes = read(&file, 0, 2 * PAGE);
        all(&bytes[..50], b'o', "before");
        all(&bytes[50..150], b'n', "written");
        all(&bytes[150..PAGE], b'o', "after");
        assert_eq!(&bytes[PAGE..PAGE + 5], b"dirty");
        all(
            &bytes[PAGE + 50..PAGE + 150],
            b'n',
            "written beside dirty bytes",
        );
    });
}

/// A store that takes less than it is given and says nothing has not stored the rest.
#[test]
fn a_transfer_that_ends_short_in_silence_is_an_error() {
    within(PATIENCE, || {
        let store = FaultyObject::new(MemoryObject::new());
        let rig = Rig::new(store.clone());
        let file = rig.open(false);
        file.write_at(&[1; 2 * PAGE], 0).unwrap();
        store.add(Rule::new(On::Only(Operation::Write), Action::Short(PAGE as u64)).nth(1));
        assert_eq!(file.sync_all().unwrap_err().errno(), Errno::EIO);
        file.sync_all().unwrap();
    });
}

/// T42: what a durable write was acknowledged for survives a crash, size included, and so does what was there before.
#[test]
fn t42_a_durable_write_survives_a_crash_whatever_else_is_lost() {
    within(PATIENCE, || {
        let store = CrashingObject::new(MemoryObject::new()).unwrap();
        let rig = Rig::new(store.clone());
        let file = rig.open(false);
        let durable = IoOptions {
            dsync: true,
            ..IoOptions::default()
        };
        let bytes = [b'd'; 5000];
        let progress = file.write_cursor(&mut IovCursor::from_slice(&bytes), 100, &durable);
        assert_eq!(progress.posix().unwrap(), 5000);
        // Not durable, and past it.
        file.write_at(&[b'x'; 9000], 5100).unwrap();
        file.write_back(0..u64::MAX).unwrap();
        let images = (0..50).map(Survival::Some).chain([Survival::Synced]);
        for survival in images {
            let image = store.crash(survival).unwrap().bytes();
            assert!(image.len() >= 5100, "{survival:?}: {} bytes", image.len());
            all(&image[..100], 0, "the hole before");
            all(&image[100..5100], b'd', "what was durable");
            assert!(image[5100..].iter().all(|&b| b == 0 || b == b'x'));
        }
    });
}

/// T19, T60: while the store stands still a writer over the limit sleeps with nothing locked that a reader needs, can be
/// cancelled, and others who must not wait are told so.
#[test]
fn t60_t19_a_throttled_writer_holds_up_no_reader_and_can_be_cancelled() {
    within(PATIENCE, || {
        let slow = DeferredObject::new(MemoryObject::new());
        let rig = Rig::new(slow.clone());
        let file = rig.open(false);
        let cancel = Cancel::new();
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let how = IoOptions {
                    cancel: Some(&cancel),
                    ..IoOptions::default()
                };
                file.write_cursor(&mut IovCursor::from_slice(&vec![1; 100 * PAGE]), 0, &how)
            });
            assert!(slow.wait_queued(1, PATIENCE));
            while rig.volume.statistics().cache.throttled == 0 {
                std::thread::yield_now();
            }
            std::thread::sleep(MOMENT);
            all(&read(&file, 0, PAGE), 1, "a page written before");
            let nowait = IoOptions {
                nowait: true,
                ..IoOptions::default()
            };
            let told = file.write_cursor(&mut IovCursor::from_slice(b"x"), 0, &nowait);
            assert_eq!(told.posix().unwrap_err().errno(), Errno::EAGAIN);
            assert!(!writer.is_finished());
            cancel.cancel();
            let progress = writer.join().unwrap();
            assert!(progress.done > 0 && progress.done < 100 * PAGE as u64);
            assert_eq!(progress.stop.unwrap().errno(), Errno::EINTR);
            assert_eq!(file.len(), progress.done);
            slow.open();
        });
        file.sync_all().unwrap();
    });
}

/// T60: several writers over the limit with a slow store all come to their end.
#[test]
fn t60_writers_over_the_limit_all_progress() {
    within(PATIENCE, || {
        let store = FaultyObject::new(MemoryObject::new());
        store.add(Rule::new(
            On::Only(Operation::Write),
            Action::Delay(Duration::from_millis(2)),
        ));
        let rig = Rig::new(store);
        let file = rig.open(false);
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let file = &file;
                scope.spawn(move || {
                    for i in 0..100 {
                        let page = i * 4 + thread;
                        file.write_at(&[thread as u8 + 1; PAGE], page * 4096)
                            .unwrap();
                    }
                });
            }
        });
        for page in 0..400u64 {
            all(
                &read(&file, page * 4096, PAGE),
                (page % 4) as u8 + 1,
                "a page",
            );
        }
    });
}

/// G-1, T58: a sync ends although a writer dirties pages as fast as he can.
#[test]
fn g1_t58_a_sync_does_not_chase_a_writer() {
    within(PATIENCE, || {
        let rig = Rig::new(MemoryObject::new());
        let file = rig.open(false);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut page = 0;
                while !stop.load(Ordering::Relaxed) {
                    page = (page + 7) % 1000;
                    file.write_at(&[1; PAGE], page * 4096).unwrap();
                }
            });
            for _ in 0..50 {
                file.sync_all().unwrap();
            }
            stop.store(true, Ordering::Relaxed);
        });
    });
}
