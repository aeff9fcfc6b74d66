//! A store that answers late, out of order, or never. No test waits for a clock: the time is over when the test says so.

use std::sync::mpsc::{Receiver, TryRecvError, channel};

use super::*;
use crate::testing::{Action, DeferredObject, FaultyObject, MemoryObject, On, Rule};

const PATIENCE: Duration = Duration::from_secs(60);
/// Never over by itself.
const LONG: Duration = Duration::from_secs(24 * 3600);

type Outcome = Progress<StoreError>;

fn filled(byte: u8, len: usize) -> Segments {
    let segments = Segments::of_buf(&Arc::new(AlignedBuf::zeroed(len)), len);
    segments.copy_from(0, &vec![byte; len]);
    segments
}

fn begin(
    object: &TimedObject,
    operation: Operation,
    offset: u64,
    segments: &Segments,
) -> Receiver<Outcome> {
    let (tell, told) = channel();
    let batch = vec![Transfer {
        offset,
        segments: segments.clone(),
        done: Box::new(move |outcome| tell.send(outcome).unwrap()),
    }];
    match operation {
        Operation::Write => object.write(batch),
        _ => object.read(batch),
    }
    told
}

#[track_caller]
fn answer(told: &Receiver<Outcome>) -> Outcome {
    told.recv_timeout(PATIENCE).unwrap()
}

#[track_caller]
fn is_eio(outcome: &Outcome) {
    assert_eq!(outcome.done, 0);
    assert_eq!(outcome.stop.unwrap().errno, Errno::EIO);
}

struct Rig {
    memory: Arc<MemoryObject>,
    slow: Arc<DeferredObject>,
    limit: Arc<TimeLimit>,
    object: Arc<TimedObject>,
}

impl Rig {
    fn new(bytes: &[u8]) -> Self {
        let memory = MemoryObject::with(bytes);
        let slow = DeferredObject::new(memory.clone());
        let limit = TimeLimit::new(LONG);
        let object = TimedObject::new(slow.clone(), &limit);
        Self {
            memory,
            slow,
            limit,
            object,
        }
    }

    fn counted(&self) -> (u64, u64) {
        let now = self.limit.statistics();
        (now.expired, now.late)
    }
}

#[test]
fn a_store_in_time_is_as_without_a_limit() {
    let rig = Rig::new(&[b'o'; 100]);
    rig.slow.open();
    let target = filled(0, 200);
    let read = begin(&rig.object, Operation::Read, 50, &target);
    assert_eq!(answer(&read), Progress::complete(50));
    assert_eq!(target.to_vec()[..51], [&[b'o'; 50][..], &[0]].concat());
    assert_eq!(
        rig.object.write_wait(90, &filled(b'n', 20)),
        Progress::complete(20)
    );
    assert_eq!(
        rig.memory.bytes()[89..],
        [&[b'o'][..], &[b'n'; 20]].concat()
    );
    assert_eq!(rig.object.len(), Ok(110));
    rig.object.set_len(10).unwrap();
    rig.object.sync(SyncScope::All).unwrap();
    assert_eq!(rig.memory.bytes().len(), 10);
    assert_eq!(rig.counted(), (0, 0));
}

#[test]
fn a_read_given_up_is_eio_and_what_comes_late_goes_nowhere() {
    let rig = Rig::new(&[b'o'; 4096]);
    let target = filled(b'.', 4096);
    let read = begin(&rig.object, Operation::Read, 0, &target);
    assert_eq!(read.try_recv(), Err(TryRecvError::Empty));
    rig.limit.expire();
    is_eio(&answer(&read));
    assert_eq!(rig.counted(), (1, 1));
    // The memory is its owner's again before the store has answered, and stays so.
    rig.slow.open();
    assert_eq!(target.to_vec(), [b'.'; 4096]);
    assert_eq!(rig.counted(), (1, 0));
}

#[test]
fn a_write_given_up_stores_what_was_to_be_written_whatever_became_of_its_memory() {
    let rig = Rig::new(&[]);
    let source = filled(b'n', 4096);
    let write = begin(&rig.object, Operation::Write, 0, &source);
    rig.limit.expire();
    is_eio(&answer(&write));
    source.copy_from(0, &[b'!'; 4096]);
    drop(source);
    rig.slow.open();
    assert_eq!(rig.memory.bytes(), [b'n'; 4096]);
}

#[test]
fn a_late_write_does_not_overwrite_a_newer_one() {
    let rig = Rig::new(&[]);
    let old = begin(&rig.object, Operation::Write, 0, &filled(b'o', 8192));
    rig.limit.expire();
    is_eio(&answer(&old));
    let newer = begin(&rig.object, Operation::Write, 4096, &filled(b'n', 4096));
    let beside = begin(&rig.object, Operation::Write, 8192, &filled(b'b', 4096));
    let looks = begin(&rig.object, Operation::Read, 0, &filled(0, 100));
    let offsets = || {
        rig.slow
            .queued()
            .iter()
            .map(|one| one.offset)
            .collect::<Vec<_>>()
    };
    assert_eq!(
        offsets(),
        [0, 8192],
        "what overlaps waits, what does not goes"
    );
    // Out of order: the later one first.
    assert!(rig.slow.release(1));
    assert_eq!(answer(&beside), Progress::complete(4096));
    assert!(rig.slow.release(0));
    assert_eq!(offsets(), [4096, 0], "the late one has ended");
    rig.slow.open();
    assert_eq!(answer(&newer), Progress::complete(4096));
    assert_eq!(answer(&looks), Progress::complete(100));
    let stored = rig.memory.bytes();
    assert_eq!(stored[..4096], [b'o'; 4096]);
    assert_eq!(stored[4096..8192], [b'n'; 4096]);
    assert_eq!(rig.counted(), (1, 0));
}

#[test]
fn who_waits_behind_a_late_write_is_given_up_in_his_turn_and_never_made() {
    let rig = Rig::new(&[]);
    let old = begin(&rig.object, Operation::Write, 0, &filled(b'o', 4096));
    rig.limit.expire();
    is_eio(&answer(&old));
    let newer = begin(&rig.object, Operation::Write, 0, &filled(b'n', 4096));
    rig.limit.expire();
    is_eio(&answer(&newer));
    assert_eq!(rig.counted(), (2, 1), "one of them is with the store");
    rig.slow.open();
    assert_eq!(rig.memory.bytes(), [b'o'; 4096]);
    assert_eq!(rig.counted(), (2, 0));
}

#[test]
fn a_change_of_size_waits_for_late_writes() {
    let rig = Rig::new(&[]);
    let old = begin(&rig.object, Operation::Write, 0, &filled(b'o', 8192));
    rig.limit.expire();
    is_eio(&answer(&old));
    let object = Arc::clone(&rig.object);
    let cutter = std::thread::spawn(move || object.set_len(100));
    while rig.limit.list.state.lock().under_way.is_empty() {
        std::thread::yield_now();
    }
    rig.slow.open();
    cutter.join().unwrap().unwrap();
    assert_eq!(rig.memory.bytes(), [b'o'; 100]);
}

/// An object whose sync waits until somebody may go on.
#[derive(Debug)]
struct Stuck(Arc<MemoryObject>, Mutex<Option<Receiver<()>>>);

impl Object for Stuck {
    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }
    fn read(&self, batch: Vec<Transfer>) {
        self.0.read(batch);
    }
    fn write(&self, batch: Vec<Transfer>) {
        self.0.write(batch);
    }
    fn len(&self) -> StoreResult<u64> {
        self.0.len()
    }
    fn set_len(&self, len: u64) -> StoreResult<()> {
        let until = self.1.lock().take();
        if let Some(until) = until {
            let _ = until.recv();
        }
        self.0.set_len(len)
    }
    fn allocate(&self, range: Range<u64>) -> StoreResult<()> {
        self.0.allocate(range)
    }
    fn punch(&self, range: Range<u64>) -> StoreResult<()> {
        self.0.punch(range)
    }
    fn sync(&self, scope: SyncScope) -> StoreResult<()> {
        let until = self.1.lock().take();
        if let Some(until) = until {
            let _ = until.recv();
        }
        self.0.sync(scope)
    }
    fn seek(&self, what: Seek, offset: u64) -> StoreResult<Option<u64>> {
        self.0.seek(what, offset)
    }
}

/// Ends operations as they come until `over` holds.
fn expire_until(limit: &TimeLimit, over: impl Fn() -> bool) {
    while !over() {
        limit.expire();
        std::thread::yield_now();
    }
}

#[test]
fn a_sync_that_never_ends_is_eio_and_the_next_one_is_made() {
    let (go_on, until) = channel();
    let stuck = Arc::new(Stuck(MemoryObject::new(), Mutex::new(Some(until))));
    let limit = TimeLimit::new(LONG);
    let object = TimedObject::new(stuck, &limit);
    let syncing = {
        let object = Arc::clone(&object);
        std::thread::spawn(move || object.sync(SyncScope::Data))
    };
    expire_until(&limit, || syncing.is_finished());
    assert_eq!(syncing.join().unwrap().unwrap_err().errno, Errno::EIO);
    go_on.send(()).unwrap();
    object.sync(SyncScope::Data).unwrap();
    while limit.statistics().late > 0 {
        std::thread::yield_now();
    }
}

#[test]
fn a_cut_given_up_does_not_take_away_what_is_written_after_it() {
    let (go_on, until) = channel();
    let stuck = Arc::new(Stuck(MemoryObject::with(&[b'o'; 8192]), Mutex::new(None)));
    *stuck.1.lock() = Some(until);
    let limit = TimeLimit::new(LONG);
    let object = TimedObject::new(stuck.clone(), &limit);
    let cutting = {
        let object = Arc::clone(&object);
        std::thread::spawn(move || object.set_len(0))
    };
    // Only once the store has it.
    while stuck.1.lock().is_some() {
        std::thread::yield_now();
    }
    expire_until(&limit, || cutting.is_finished());
    assert_eq!(cutting.join().unwrap().unwrap_err().errno, Errno::EIO);
    let write = begin(&object, Operation::Write, 4096, &filled(b'n', 4096));
    assert_eq!(write.try_recv(), Err(TryRecvError::Empty), "before the cut");
    go_on.send(()).unwrap();
    assert_eq!(answer(&write), Progress::complete(4096));
    assert_eq!(stuck.0.bytes()[4096..], [b'n'; 4096]);
}

#[test]
fn an_nth_error_is_told_as_it_is() {
    let store = FaultyObject::new(MemoryObject::new());
    store.add(Rule::new(On::Only(Operation::Write), Action::Fail(Errno::ENOSPC)).nth(2));
    let limit = TimeLimit::new(LONG);
    let object = TimedObject::new(store, &limit);
    let outcomes: Vec<Outcome> = (0..3)
        .map(|i| object.write_wait(i * 4096, &filled(1, 4096)))
        .collect();
    let errors: Vec<_> = outcomes
        .iter()
        .map(|one| one.stop.map(|e| e.errno))
        .collect();
    assert_eq!(errors, [None, Some(Errno::ENOSPC), None]);
    assert_eq!(limit.statistics().expired, 0);
}

#[test]
fn a_store_with_too_much_late_is_taken_for_gone_until_it_answers() {
    let rig = Rig::new(&[b'o'; 4096]);
    for _ in 0..LATE_MAX {
        let read = begin(&rig.object, Operation::Read, 0, &filled(0, 1));
        rig.limit.expire();
        is_eio(&answer(&read));
    }
    // Refused at once, and the store does not hear of it.
    let refused = begin(&rig.object, Operation::Read, 0, &filled(0, 1));
    is_eio(&answer(&refused));
    assert_eq!(rig.slow.queued().len(), LATE_MAX);
    assert_eq!(
        rig.object.sync(SyncScope::All).unwrap_err().errno,
        Errno::EIO
    );
    rig.slow.open();
    let read = begin(&rig.object, Operation::Read, 0, &filled(0, 1));
    assert_eq!(answer(&read), Progress::complete(1));
}

#[test]
fn the_clock_ends_what_never_answers() {
    let slow = DeferredObject::new(MemoryObject::with(&[b'o'; 10]));
    let limit = TimeLimit::new(Duration::from_millis(5));
    let object = TimedObject::new(slow.clone(), &limit);
    is_eio(&object.read_wait(0, &filled(0, 10)));
    is_eio(&object.read_wait(0, &filled(0, 10)));
    assert_eq!(limit.statistics().expired, 2);
}

#[test]
fn the_thread_that_watches_ends_with_the_limit() {
    let rig = Rig::new(&[b'o'; 10]);
    rig.slow.open();
    assert_eq!(rig.object.len(), Ok(10));
    let list = Arc::downgrade(&rig.limit.list);
    drop(rig);
    while list.strong_count() > 0 {
        std::thread::yield_now();
    }
}
