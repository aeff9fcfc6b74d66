use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use pinfold_base::{Errno, Progress};
use pinfold_mem::{AlignedBuf, Segments};

use super::*;
use crate::object::{Object, Operation, Seek, StoreError, SyncScope, Transfer};

const PATIENCE: Duration = Duration::from_secs(120);

fn memory(bytes: &[u8]) -> Segments {
    let buf = Arc::new(AlignedBuf::zeroed(bytes.len()));
    let segments = Segments::of_buf(&buf, bytes.len());
    segments.copy_from(0, bytes);
    segments
}

fn start(
    object: &dyn Object,
    operation: Operation,
    offset: u64,
    segments: &Segments,
) -> Receiver<Progress<StoreError>> {
    let (tell, told) = channel();
    let batch = vec![Transfer {
        offset,
        segments: segments.clone(),
        done: Box::new(move |p| tell.send(p).unwrap()),
    }];
    match operation {
        Operation::Write => object.write(batch),
        _ => object.read(batch),
    }
    told
}

fn write(object: &dyn Object, offset: u64, bytes: &[u8]) -> Progress<StoreError> {
    start(object, Operation::Write, offset, &memory(bytes))
        .recv_timeout(PATIENCE)
        .unwrap()
}

/// Writes all of `bytes`.
fn put(object: &dyn Object, offset: u64, bytes: &[u8]) {
    assert_eq!(
        write(object, offset, bytes),
        Progress::complete(bytes.len() as u64)
    );
}

fn read(object: &dyn Object, offset: u64, len: usize) -> Vec<u8> {
    let segments = memory(&vec![0; len]);
    let progress = object.read_wait(offset, &segments);
    assert_eq!(progress.stop, None);
    let mut bytes = segments.to_vec();
    bytes.truncate(progress.done as usize);
    bytes
}

#[test]
fn memory_is_sparse_and_zero_where_nothing_was_written() {
    let object = MemoryObject::new();
    assert_eq!(write(&*object, 10_000, b"abc"), Progress::complete(3));
    assert_eq!(object.len().unwrap(), 10_003);
    assert_eq!(read(&*object, 9_999, 100), b"\0abc");
    assert_eq!(object.seek(Seek::Data, 0).unwrap(), Some(8192));
    assert_eq!(object.seek(Seek::Hole, 0).unwrap(), Some(0));
    assert_eq!(object.seek(Seek::Hole, 10_000).unwrap(), Some(10_003));
    assert_eq!(object.seek(Seek::Data, 10_003).unwrap(), None);
    object.set_len(10_001).unwrap();
    object.set_len(20_000).unwrap();
    assert_eq!(read(&*object, 10_000, 3), b"a\0\0");
    object.punch(8192..10_001).unwrap();
    assert_eq!(read(&*object, 10_000, 3), b"\0\0\0");
    put(&*object, 1 << 40, b"x");
    assert_eq!(object.len().unwrap(), (1 << 40) + 1);
    let huge = write(&*object, u64::MAX - 1, b"xy");
    assert_eq!(huge.stop.unwrap().errno, Errno::EFBIG);
}

#[test]
fn rules_fail_the_operation_they_name_and_no_other() {
    let below = MemoryObject::with(&[7; 8192]);
    let object = FaultyObject::new(below.clone());
    object.add(Rule::new(On::Only(Operation::Read), Action::Fail(Errno::EIO)).nth(2));
    object.add(
        Rule::new(
            On::Only(Operation::Write),
            Action::FailAfter(100, Errno::ENOSPC),
        )
        .within(4096..4097),
    );
    object.add(Rule::new(
        On::Only(Operation::Sync),
        Action::Fail(Errno::EDQUOT),
    ));
    assert_eq!(read(&*object, 0, 10), [7; 10]);
    let second = object.read_wait(0, &memory(&[0; 10]));
    assert_eq!(second.stop.unwrap().errno, Errno::EIO);
    assert_eq!(read(&*object, 0, 10), [7; 10]);
    assert_eq!(write(&*object, 0, &[1; 4096]), Progress::complete(4096));
    let stopped = write(&*object, 4000, &[2; 200]);
    assert_eq!(
        (stopped.done, stopped.stop.unwrap().errno),
        (100, Errno::ENOSPC)
    );
    assert_eq!(below.bytes()[4099..4101], [2, 7]);
    assert_eq!(
        object.sync(SyncScope::Data).unwrap_err().errno,
        Errno::EDQUOT
    );
    assert_eq!(object.struck(), 3);
    object.clear();
    object.sync(SyncScope::Data).unwrap();
    object.add(Rule::new(On::Any, Action::Short(3)));
    assert_eq!(
        object.read_wait(0, &memory(&[0; 10])),
        Progress::complete(3)
    );
    object.clear();
    object.add(Rule::new(On::Any, Action::Delay(Duration::from_millis(30))));
    let before = Instant::now();
    assert_eq!(read(&*object, 0, 1), [1]);
    assert!(before.elapsed() >= Duration::from_millis(30));
}

#[test]
fn deferred_transfers_run_in_the_order_of_their_release() {
    let below = MemoryObject::new();
    let object = DeferredObject::new(below.clone());
    let first = start(&*object, Operation::Write, 0, &memory(b"first"));
    let second = start(&*object, Operation::Write, 0, &memory(b"second"));
    let third = start(&*object, Operation::Write, 0, &memory(b"3"));
    assert!(object.wait_queued(3, PATIENCE));
    assert!(!object.wait_queued(4, Duration::from_millis(10)));
    assert_eq!(below.bytes(), b"");
    assert!(first.try_recv().is_err());
    assert_eq!(object.release_numbers(&[1, 0, 17]), 2);
    assert_eq!(below.bytes(), b"firstd");
    assert_eq!(second.try_recv().unwrap(), Progress::complete(6));
    assert!(object.fail(0, Errno::EIO));
    assert!(!object.release(0));
    assert_eq!(third.try_recv().unwrap().stop.unwrap().errno, Errno::EIO);
    assert_eq!(below.bytes(), b"firstd");
    let last = start(&*object, Operation::Read, 0, &memory(b"......"));
    drop(object);
    assert_eq!(last.try_recv().unwrap(), Progress::complete(6));
}

#[test]
fn a_held_completion_comes_after_the_bytes() {
    let below = MemoryObject::new();
    let object = DeferredObject::holding_completions(below.clone());
    let told = start(&*object, Operation::Write, 0, &memory(b"abc"));
    assert!(object.wait_queued(1, PATIENCE));
    assert_eq!(below.bytes(), b"abc");
    assert!(told.try_recv().is_err());
    assert_eq!(object.release_all(), 1);
    assert_eq!(told.try_recv().unwrap(), Progress::complete(3));
    object.open();
    assert_eq!(write(&*object, 0, b"x"), Progress::complete(1));
}

#[test]
fn a_transfer_that_is_waited_for_ends_when_it_is_released() {
    let object = DeferredObject::new(MemoryObject::with(b"abc"));
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| read(&*object, 0, 3));
        assert!(object.wait_queued(1, PATIENCE));
        assert_eq!(object.queued()[0].len, 3);
        assert!(object.release(0));
        assert_eq!(reader.join().unwrap(), b"abc");
    });
}

#[test]
fn a_crash_keeps_what_was_synced() {
    let below = MemoryObject::with(b"old");
    let object = CrashingObject::new(below.clone()).unwrap();
    put(&*object, 0, b"new");
    object.sync(SyncScope::Data).unwrap();
    put(&*object, 0, b"lost, and longer");
    assert_eq!(read(&*object, 0, 4), b"lost");
    assert_eq!(object.crash(Survival::Synced).unwrap().bytes(), b"new");
    assert_eq!(
        object.crash(Survival::All).unwrap().bytes(),
        b"lost, and longer"
    );
    assert_eq!(below.bytes(), b"new");
    object.sync(SyncScope::Data).unwrap();
    assert_eq!(object.unsynced(), 0);
    assert_eq!(below.bytes(), b"lost, and longer");
}

#[test]
fn a_crash_may_keep_any_sectors_and_sizes_in_order() {
    let object = CrashingObject::new(MemoryObject::with(&[1; 4096])).unwrap();
    put(&*object, 0, &[2; 4096]);
    object.set_len(1024).unwrap();
    put(&*object, 1024, &[3; 1024]);
    let mut images = std::collections::BTreeSet::new();
    for seed in 0..200 {
        let image = object.crash(Survival::Some(seed)).unwrap().bytes();
        assert!([4096, 1024, 2048].contains(&image.len()), "{}", image.len());
        for (at, sector) in image.chunks(512).enumerate() {
            assert!(sector.iter().all(|b| b == &sector[0]), "torn sector");
            let may: &[u8] = match (image.len(), at) {
                (_, 0 | 1) => &[1, 2],
                // The size was cut and grew again: nothing older may show through.
                (2048, _) => &[0, 3],
                // The cut did not survive, the sectors of the write after it may have.
                (_, 2 | 3) => &[1, 2, 3],
                _ => &[1, 2],
            };
            assert!(
                may.contains(&sector[0]),
                "seed {seed}: {} in sector {at}",
                sector[0]
            );
        }
        assert_eq!(image, object.crash(Survival::Some(seed)).unwrap().bytes());
        images.insert(image);
    }
    assert!(images.len() > 50, "{} images", images.len());
}

#[test]
fn a_sync_that_fails_below_loses_nothing_that_is_pending() {
    let below = FaultyObject::new(MemoryObject::new());
    let object = CrashingObject::new(below.clone()).unwrap();
    put(&*object, 0, b"abc");
    below.add(Rule::new(On::Only(Operation::Write), Action::Fail(Errno::EIO)).nth(1));
    assert_eq!(object.sync(SyncScope::Data).unwrap_err().errno, Errno::EIO);
    assert_eq!(object.unsynced(), 1);
    object.sync(SyncScope::Data).unwrap();
    assert_eq!(object.crash(Survival::Synced).unwrap().bytes(), b"abc");
}

#[test]
fn changes_under_an_old_token_are_refused_and_counted() {
    let memory: Arc<dyn Object> = MemoryObject::new();
    let tokens = Arc::default();
    let [one, other] = [0, 1].map(|_| FencedObject::new(Arc::clone(&memory), &tokens));
    one.take_up(5).unwrap();
    one.set_len(10).unwrap();
    other.take_up(7).unwrap();
    assert_eq!(one.set_len(20).unwrap_err().errno, Errno::ESTALE);
    assert_eq!(one.punch(0..1).unwrap_err().errno, Errno::ESTALE);
    assert_eq!(one.take_up(6).unwrap_err().errno, Errno::ESTALE);
    assert_eq!((tokens.refused(), tokens.newest()), (2, 7));
    assert_eq!(memory.len().unwrap(), 10);
    other.set_len(30).unwrap();
    one.take_up(8).unwrap();
    one.set_len(40).unwrap();
    assert_eq!(tokens.refused(), 2);
}
