//! Calls that nobody waits for at once, with a store that takes its time.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use pinfold::testing::{DeferredObject, MemoryObject};
use pinfold::{AlignedBuf, Errno, MEMORY_MIN, Object};
use pinfold_store::{Geometry, Seek, StoreResult, SyncScope, Transfer};

use crate::pins::Pair;
use crate::rig::{MOMENT, PATIENCE, Rig, all, read, within};

const PAGE: usize = 4096;
const P: u64 = 4096;

fn aligned(pages: usize, byte: u8) -> AlignedBuf {
    let mut buf = AlignedBuf::zeroed(pages * PAGE);
    buf.as_mut_slice().fill(byte);
    buf
}

/// A buffer that tells how many of its kind there are.
struct Counted(AlignedBuf, Arc<AtomicUsize>);

impl Counted {
    fn new(pages: usize, byte: u8, count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self(aligned(pages, byte), Arc::clone(count))
    }
}

impl AsMut<[u8]> for Counted {
    fn as_mut(&mut self) -> &mut [u8] {
        self.0.as_mut_slice()
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.1.fetch_sub(1, Ordering::SeqCst);
    }
}

/// D-9: what a direct write blocks, it blocks until it is complete, not until it is submitted.
#[test]
fn d9_a_reader_waits_for_a_submitted_direct_write() {
    within(PATIENCE, || {
        let slow = DeferredObject::new(MemoryObject::with(&[b'o'; 4 * PAGE]));
        let rig = Rig::new(slow.clone());
        let (file, direct) = (rig.open(false), rig.open(true));
        file.set_len(4 * P).unwrap();
        let pending = direct.submit_write(aligned(2, b'n'), 0).unwrap();
        assert!(slow.wait_queued(1, PATIENCE));
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| read(&file, 0, PAGE));
            std::thread::sleep(MOMENT);
            assert!(!reader.is_finished() && !pending.is_done());
            assert_eq!(slow.queued().len(), 1, "the reader went to the store");
            slow.open();
            all(&reader.join().unwrap(), b'n', "read during the write");
        });
        let mut completed = pending.wait();
        assert_eq!(completed.progress.posix().unwrap(), 2 * P);
        all(completed.buf.as_mut_slice(), b'n', "the buffer");
    });
}

/// C-3, C-4: sizes grow with what is stored, and no completion makes them smaller.
#[test]
fn c3_c4_completions_in_any_order_never_make_a_file_shorter() {
    within(PATIENCE, || {
        let store = MemoryObject::new();
        let slow = DeferredObject::new(store.clone());
        let rig = Rig::new(slow.clone());
        let direct = rig.open(true);
        let far = direct.submit_write(aligned(2, b'f'), 6 * P).unwrap();
        let near = direct.submit_write(aligned(2, b'n'), 2 * P).unwrap();
        assert!(slow.wait_queued(1, PATIENCE));
        assert_eq!(direct.len(), 0, "nothing is stored yet");
        std::thread::sleep(MOMENT);
        assert_eq!(slow.queued().len(), 1, "who makes a file longer is alone");
        let mut longest = 0;
        for _ in 0..2 {
            assert!(slow.wait_queued(1, PATIENCE));
            assert!(slow.release(slow.queued().len() - 1));
            while direct.len() == longest && !(far.is_done() && near.is_done()) {
                std::thread::yield_now();
            }
            assert!(direct.len() >= longest);
            longest = direct.len();
        }
        assert_eq!(far.wait().progress.posix().unwrap(), 2 * P);
        assert_eq!(near.wait().progress.posix().unwrap(), 2 * P);
        assert_eq!((direct.len(), store.bytes().len()), (8 * P, 8 * PAGE));
        slow.open();
        let bytes = read(&rig.open(false), 0, 8 * PAGE);
        all(&bytes[..2 * PAGE], 0, "never written");
        all(&bytes[2 * PAGE..4 * PAGE], b'n', "the near write");
        all(&bytes[6 * PAGE..], b'f', "the far write");
    });
}

#[test]
fn a_dropped_call_keeps_its_buffer_for_the_device_and_ends_by_itself() {
    within(PATIENCE, || {
        let slow = DeferredObject::new(MemoryObject::with(&[b'o'; 4 * PAGE]));
        let rig = Rig::new(slow.clone());
        let direct = rig.open(true);
        direct.set_len(4 * P).unwrap();
        let buffers = Arc::new(AtomicUsize::new(0));
        drop(
            direct
                .submit_write(Counted::new(2, b'n', &buffers), 0)
                .unwrap(),
        );
        let begun = slow.wait_queued(1, MOMENT);
        let under_way = direct.submit_write(Counted::new(1, b'u', &buffers), 3 * P);
        assert!(slow.wait_queued(1 + usize::from(begun), PATIENCE));
        drop(under_way.unwrap());
        std::thread::sleep(MOMENT);
        assert!(buffers.load(Ordering::SeqCst) > 0, "freed under the device");
        slow.open();
        while buffers.load(Ordering::SeqCst) > 0 {
            std::thread::yield_now();
        }
        let bytes = read(&rig.open(false), 0, 4 * PAGE);
        all(&bytes[..PAGE], if begun { b'n' } else { b'o' }, "the first");
        all(&bytes[3 * PAGE..], b'u', "the second");
    });
}

#[test]
fn too_many_calls_are_refused_and_cancelled_ones_are_not_made() {
    within(PATIENCE, || {
        let store = MemoryObject::with(&[b'o'; PAGE]);
        let slow = DeferredObject::new(store.clone());
        let rig = Rig::new(slow.clone());
        let direct = rig.open(true);
        direct.set_len(P).unwrap();
        let mut pending = Vec::new();
        let refused = loop {
            match direct.submit_write(aligned(1, b'n'), 0) {
                Ok(call) => pending.push(call),
                Err(error) => break error,
            }
            assert!(pending.len() < 5000, "no end");
        };
        assert_eq!(refused.errno(), Errno::EAGAIN);
        for call in &pending {
            call.cancel();
        }
        slow.open();
        let results: Vec<_> = pending
            .into_iter()
            .map(|call| call.wait().progress.posix())
            .collect();
        let made = results.iter().filter(|result| result.is_ok()).count();
        assert!(made <= 16, "{made} were made");
        let cancelled = results.iter().flat_map(|result| result.as_ref().err());
        assert!(
            cancelled
                .map(pinfold::Error::errno)
                .all(|errno| errno == Errno::EINTR)
        );
        // The threads go on with the next.
        let call = direct.submit_read(aligned(1, 0), 0).unwrap();
        assert_eq!(call.wait().progress.posix().unwrap(), P);
    });
}

#[test]
fn a_call_that_panics_is_an_error_and_the_next_is_made() {
    struct Bad;
    impl AsMut<[u8]> for Bad {
        fn as_mut(&mut self) -> &mut [u8] {
            panic!("on purpose")
        }
    }
    within(PATIENCE, || {
        let rig = Rig::new(MemoryObject::new());
        let file = rig.open(false);
        let failed = file.submit_write(Bad, 0).unwrap().wait();
        assert_eq!(failed.progress.posix().unwrap_err().errno(), Errno::EIO);
        let call = file.submit_write(vec![1; 10], 0).unwrap();
        assert_eq!(call.wait().progress.posix().unwrap(), 10);
    });
}

/// A file of pages that each hold their number, over a slow store, opened for direct I/O.
fn numbered(pages: usize) -> (Arc<MemoryObject>, Arc<DeferredObject>, Rig) {
    let bytes: Vec<u8> = (0..pages * PAGE).map(|at| (at / PAGE) as u8).collect();
    let store = MemoryObject::with(&bytes);
    let slow = DeferredObject::new(store.clone());
    let rig = Rig::new(slow.clone());
    rig.open(false).set_len((pages * PAGE) as u64).unwrap();
    (store, slow, rig)
}

/// Many more than there are threads; whichever the store ends first is done first.
#[test]
fn reads_of_any_number_are_with_the_store_at_once_and_end_in_its_order() {
    within(PATIENCE, || {
        const READS: usize = 64;
        let (_, slow, rig) = numbered(READS);
        let direct = rig.open(true);
        let mut pending: Vec<_> = (0..READS as u64)
            .map(|page| direct.submit_read(aligned(1, 0xee), page * P).unwrap())
            .collect();
        // Submitted by this thread, so they are there already.
        assert_eq!(slow.queued().len(), READS);
        while let Some(last) = pending.pop() {
            assert!(!last.is_done());
            assert!(slow.release(pending.len()));
            let mut read = last.wait();
            assert_eq!(read.progress.posix().unwrap(), P);
            all(read.buf.as_mut_slice(), pending.len() as u8, "one page");
        }
    });
}

#[test]
fn a_read_without_a_thread_that_fails_tells_its_own_error() {
    within(PATIENCE, || {
        let (_, slow, rig) = numbered(3);
        let direct = rig.open(true);
        let reads = [0, 1, 2].map(|page| direct.submit_read(aligned(1, 0), page * P).unwrap());
        assert!(slow.fail(1, Errno::EIO));
        slow.open();
        let told = reads.map(|read| read.wait().progress.posix().map_err(|error| error.errno()));
        assert_eq!(told, [Ok(P), Err(Errno::EIO), Ok(P)]);
    });
}

/// A store that lets go of what it is to read.
#[derive(Debug)]
struct Careless(Arc<MemoryObject>);

impl Object for Careless {
    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }

    fn read(&self, batch: Vec<Transfer>) {
        drop(batch);
    }

    fn write(&self, batch: Vec<Transfer>) {
        self.0.write(batch);
    }

    fn len(&self) -> StoreResult<u64> {
        self.0.len()
    }

    fn set_len(&self, len: u64) -> StoreResult<()> {
        self.0.set_len(len)
    }

    fn allocate(&self, range: Range<u64>) -> StoreResult<()> {
        self.0.allocate(range)
    }

    fn punch(&self, range: Range<u64>) -> StoreResult<()> {
        self.0.punch(range)
    }

    fn sync(&self, scope: SyncScope) -> StoreResult<()> {
        self.0.sync(scope)
    }

    fn seek(&self, what: Seek, offset: u64) -> StoreResult<Option<u64>> {
        self.0.seek(what, offset)
    }
}

#[test]
fn a_read_that_the_store_lets_go_of_has_failed() {
    within(PATIENCE, || {
        let rig = Rig::new(Arc::new(Careless(MemoryObject::with(&[1; 2 * PAGE]))));
        let direct = rig.open(true);
        direct.set_len(2 * P).unwrap();
        let buffers = Arc::new(AtomicUsize::new(0));
        let submit = || direct.submit_read(Counted::new(1, 0, &buffers), P).unwrap();
        let read = submit().wait();
        assert_eq!(read.progress.posix().unwrap_err().errno(), Errno::EIO);
        drop(read.buf);
        drop(submit());
        while buffers.load(Ordering::SeqCst) > 0 {
            std::thread::yield_now();
        }
    });
}

/// Of bytes that are cached and newer the cache is asked, of those behind the end of the store's file nobody.
#[test]
fn a_submitted_read_sees_what_is_newer_than_the_store_and_zeros_in_its_holes() {
    within(PATIENCE, || {
        let (store, slow, rig) = numbered(8);
        let (file, direct) = (rig.open(false), rig.open(true));
        slow.open();
        file.write_at(&[b'n'; PAGE], 2 * P).unwrap();
        let mut read = direct.submit_read(aligned(4, 0xee), P).unwrap().wait();
        assert_eq!(read.progress.posix().unwrap(), 4 * P);
        let bytes = read.buf.as_mut_slice();
        all(&bytes[..PAGE], 1, "not newer");
        all(&bytes[PAGE..2 * PAGE], b'n', "newer");
        store.set_len(6 * P).unwrap();
        let mut read = direct.submit_read(aligned(3, 0xee), 5 * P).unwrap().wait();
        assert_eq!(read.progress.posix().unwrap(), 3 * P);
        let bytes = read.buf.as_mut_slice();
        all(&bytes[..PAGE], 5, "stored");
        all(&bytes[PAGE..], 0, "behind the end of the store's file");
        store.set_len(10 * P).unwrap();
        let mut read = direct.submit_read(aligned(3, 0xee), 7 * P).unwrap().wait();
        assert_eq!(read.progress.posix().unwrap(), P);
        all(&read.buf.as_mut_slice()[PAGE..], 0xee, "behind the end");
        let odd = direct.submit_read(aligned(1, 0), 9 * P).unwrap().wait();
        assert_eq!(odd.progress.posix().unwrap(), 0);
    });
}

/// Whoever learns that a transfer has ended must not wait, and the last to let go of a file writes it back.
#[test]
fn the_end_of_a_read_that_has_the_file_last_waits_for_nothing() {
    within(PATIENCE, || {
        let (store, slow, rig) = numbered(4);
        let (file, direct) = (rig.open(false), rig.open(true));
        let read = direct.submit_read(aligned(1, 0), P).unwrap();
        assert_eq!(slow.queued().len(), 1);
        file.write_at(&[b'n'; PAGE], 0).unwrap();
        drop((file, direct));
        assert!(slow.release(0));
        assert!(slow.wait_queued(1, PATIENCE), "nobody writes back");
        assert!(!read.is_done(), "it has the file still");
        slow.open();
        let mut read = read.wait();
        all(read.buf.as_mut_slice(), 1, "what was read");
        all(&store.bytes()[..PAGE], b'n', "what was written back");
    });
}

/// Tells in which thread it was dropped.
struct Told(AlignedBuf, std::sync::mpsc::Sender<Option<String>>);

impl AsMut<[u8]> for Told {
    fn as_mut(&mut self) -> &mut [u8] {
        self.0.as_mut_slice()
    }
}

impl Drop for Told {
    fn drop(&mut self) {
        let here = std::thread::current().name().map(str::to_owned);
        let _ = self.1.send(here);
    }
}

#[test]
fn a_dropped_read_keeps_its_buffer_for_the_store_and_drops_it_in_a_thread_that_may_wait() {
    within(PATIENCE, || {
        let (_, slow, rig) = numbered(4);
        let direct = rig.open(true);
        let (tell, told) = std::sync::mpsc::channel();
        drop(direct.submit_read(Told(aligned(1, 0), tell), P).unwrap());
        assert!(told.try_recv().is_err(), "freed under the store");
        slow.open();
        let thread = told.recv_timeout(PATIENCE).unwrap();
        assert_eq!(thread.as_deref(), Some("pinfold-call"));
    });
}

#[test]
fn too_many_reads_without_a_thread_are_refused_and_those_there_are_end() {
    within(PATIENCE, || {
        let (_, slow, rig) = numbered(1);
        let direct = rig.open(true);
        let mut pending = Vec::new();
        let refused = loop {
            match direct.submit_read(vec![0; PAGE], 0) {
                Ok(read) => pending.push(read),
                Err(error) => break error,
            }
            assert!(pending.len() < 5000, "no end");
        };
        assert_eq!(refused.errno(), Errno::EAGAIN);
        slow.open();
        for read in pending {
            assert_eq!(read.wait().progress.posix().unwrap(), P);
        }
        let read = direct.submit_read(vec![0; PAGE], 0).unwrap().wait();
        assert_eq!(read.progress.posix().unwrap(), P);
    });
}

/// A buffer that is mapped from a file is pinned, which only a call can do.
#[test]
fn a_submitted_read_into_a_mapping_pins_it_and_gives_the_pins_back() {
    struct Page(Arc<Pair>);
    impl AsMut<[u8]> for Page {
        fn as_mut(&mut self) -> &mut [u8] {
            let at = self.0.source(PAGE, 1).as_ptr().cast_mut();
            // SAFETY: inside the mapping, which the pair keeps; nobody else uses that page while the read is under way.
            unsafe { std::slice::from_raw_parts_mut(at, PAGE) }
        }
    }
    within(PATIENCE, || {
        let pair = Arc::new(Pair::warm(4, MEMORY_MIN));
        let options = pinfold::OpenOptions::new().read(true).direct(true);
        let device = Arc::new(pair.volume.open("device", &options).unwrap());
        let under_way = device.submit_read(Page(Arc::clone(&pair)), 0).unwrap();
        assert!(pair.slow.wait_queued(1, PATIENCE));
        if cfg!(debug_assertions) {
            assert_eq!(pair.volume.pins_held().len(), 1);
        }
        pair.slow.open();
        let moved = under_way.wait();
        assert_eq!(moved.progress.posix().unwrap(), P);
        drop(moved.buf);
        pair.at_rest();
        all(&read(&pair.mapped, P, PAGE), b'd', "what was read in");
    });
}
