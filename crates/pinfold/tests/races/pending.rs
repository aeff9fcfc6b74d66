//! Calls that nobody waits for at once, with a store that takes its time.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use pinfold::testing::{DeferredObject, MemoryObject};
use pinfold::{AlignedBuf, Errno};

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
