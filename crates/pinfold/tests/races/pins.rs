//! Direct I/O from and to mapped memory, step by step: what pinned pages may wait for, and who waits for them.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use pinfold::testing::{DeferredObject, MemoryObject};
use pinfold::{
    Errno, File, IoOptions, IovCursor, Lease, MEMORY_MIN, MapAccess, MapOptions, Mapping,
};
use pinfold::{Object, OpenOptions, Volume};

use crate::rig::{MOMENT, PATIENCE, all, read, within};

const PAGE: usize = 4096;
const P: u64 = 4096;

/// Two files whose stores are slow, or not, as the script likes: the device that is read and written directly, and the file
/// whose mapping is the buffer.
pub struct Pair {
    pub volume: Volume,
    pub device: File,
    pub slow: Arc<DeferredObject>,
    pub mapped: File,
    pub slow_mapped: Arc<DeferredObject>,
    stored: Arc<MemoryObject>,
    map: Mapping,
    _dir: tempfile::TempDir,
}

impl Pair {
    /// The device has 'd' in it, the mapped file 'm', both `pages` long; nothing is cached. Only the device is slow yet.
    pub fn new(pages: usize, memory: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let slow = DeferredObject::new(MemoryObject::with(&vec![b'd'; pages * PAGE]));
        let stored = MemoryObject::with(&vec![b'm'; pages * PAGE]);
        let slow_mapped = DeferredObject::new(stored.clone());
        let layers: [Arc<dyn Object>; 2] = [slow.clone(), slow_mapped.clone()];
        let opened = AtomicUsize::new(0);
        let volume = Volume::builder()
            .memory(memory)
            .background_interval(Duration::from_secs(3600))
            .dirty_age_max(Duration::from_secs(3600))
            .object_layer(Arc::new(move |_| {
                Arc::clone(&layers[opened.fetch_add(1, Ordering::Relaxed)])
            }))
            .open_dir(dir.path())
            .unwrap();
        let options = OpenOptions::new().read(true).write(true).create(true);
        let device = volume.open("device", &options.direct(true)).unwrap();
        device.set_len(pages as u64 * P).unwrap();
        let mapped = volume.open("mapped", &options).unwrap();
        mapped.set_len(pages as u64 * P).unwrap();
        let how = MapOptions::new().access(MapAccess::Write);
        let map = mapped.map(0..pages as u64 * P, &how).unwrap();
        Self {
            volume,
            device,
            slow,
            mapped,
            slow_mapped,
            stored,
            map,
            _dir: dir,
        }
    }

    /// As [`Pair::new`], with a mapping whose pages are there and dirty with 's', and a store of it that is not slow.
    pub fn warm(pages: usize, memory: u64) -> Self {
        let pair = Self::new(pages, memory);
        pair.slow_mapped.open();
        pair.map.write(0, &vec![b's'; pages * PAGE]).unwrap();
        pair
    }

    /// Reads from the device into the mapping.
    fn read_in(&self, at: usize, pages: usize) -> usize {
        assert!(at + pages * PAGE <= self.map.len());
        // SAFETY: inside the mapping, written by the library's raw copies and transfers alone.
        let target = unsafe {
            std::slice::from_raw_parts_mut(self.map.as_mut_ptr().wrapping_add(at), pages * PAGE)
        };
        self.device.read_at(target, at as u64).unwrap()
    }

    pub fn source(&self, at: usize, pages: usize) -> &[u8] {
        assert!(at + pages * PAGE <= self.map.len());
        // SAFETY: inside the mapping; the library makes raw copies of it alone.
        unsafe { std::slice::from_raw_parts(self.map.as_ptr().wrapping_add(at), pages * PAGE) }
    }

    /// Writes from the mapping to the device.
    pub fn write_out(&self, at: usize, pages: usize) -> usize {
        self.device
            .write_at(self.source(at, pages), at as u64)
            .unwrap()
    }

    fn as_mapped(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.map.len()];
        assert_eq!(self.map.read(0, &mut bytes).unwrap(), bytes.len());
        bytes
    }

    /// Fails unless pins were taken and all of them are back.
    #[track_caller]
    pub fn at_rest(&self) {
        let counted = self.volume.statistics().cache;
        assert!(counted.foll_pin_acquired > 0, "nothing was pinned");
        assert_eq!(counted.foll_pin_acquired, counted.foll_pin_released);
        assert_eq!(self.volume.pins_held(), []);
    }
}

/// E-6 and E-7, T49: pages that a device writes to are not taken away under it.
#[test]
fn e6_e7_a_punch_and_a_cut_wait_for_the_device() {
    within(PATIENCE, || {
        for cut in [false, true] {
            let pair = Pair::warm(8, MEMORY_MIN);
            std::thread::scope(|scope| {
                let reader = scope.spawn(|| pair.read_in(0, 4));
                assert!(pair.slow.wait_queued(1, PATIENCE));
                assert_eq!(
                    pair.volume.pins_held().len(),
                    if cfg!(debug_assertions) { 4 } else { 0 }
                );
                let taker = scope.spawn(|| match cut {
                    true => pair.mapped.set_len(P).unwrap(),
                    false => pair.mapped.punch(P..3 * P).unwrap(),
                });
                std::thread::sleep(MOMENT);
                assert!(!taker.is_finished(), "taken away under the device");
                pair.slow.open();
                assert_eq!(reader.join().unwrap(), 4 * PAGE);
                taker.join().unwrap();
            });
            let gone = if cut { PAGE..4 * PAGE } else { PAGE..3 * PAGE };
            if cut {
                pair.mapped.set_len(8 * P).unwrap();
            }
            let bytes = pair.as_mapped();
            all(&bytes[..PAGE], b'd', "what was read");
            all(&bytes[gone.clone()], 0, "what was taken away");
            assert!(read(&pair.mapped, 0, 8 * PAGE) == bytes);
            pair.mapped.sync_all().unwrap();
            all(&pair.stored.bytes()[gone], 0, "in the store");
            pair.at_rest();
        }
    });
}

/// E-5, E-9, C-8, T50: a sync while a device writes to a page returns, and does not call the page clean.
#[test]
fn c8_e5_e9_a_sync_during_a_transfer_returns_and_leaves_the_page_dirty() {
    within(PATIENCE, || {
        let pair = Pair::warm(4, MEMORY_MIN);
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| pair.read_in(0, 4));
            assert!(pair.slow.wait_queued(1, PATIENCE));
            pair.mapped.sync_all().unwrap();
            all(&pair.stored.bytes(), b's', "stored during the transfer");
            pair.slow.open();
            reader.join().unwrap();
        });
        // Nothing but the pages' state tells that there is something to store.
        pair.mapped.sync_all().unwrap();
        all(&pair.stored.bytes(), b'd', "stored after the transfer");
        pair.at_rest();
    });
}

/// E-3 and E-4: pages a device uses survive a cache that needs room for others, clean ones that it reads too.
#[test]
fn e3_e4_pinned_pages_are_not_evicted() {
    within(PATIENCE, || {
        for out in [false, true] {
            let pair = Pair::new(256, MEMORY_MIN);
            pair.slow_mapped.open();
            pair.map.write(0, &[b's'; 4 * PAGE]).unwrap();
            pair.mapped.sync_all().unwrap();
            std::thread::scope(|scope| {
                let mover = scope.spawn(|| match out {
                    true => pair.write_out(0, 4),
                    false => pair.read_in(0, 4),
                });
                assert!(pair.slow.wait_queued(1, PATIENCE));
                for _ in 0..3 {
                    all(&read(&pair.mapped, 4 * P, 252 * PAGE), b'm', "others");
                    pair.mapped.write_back(0..u64::MAX).unwrap();
                }
                pair.slow.open();
                assert_eq!(mover.join().unwrap(), 4 * PAGE);
            });
            let new = if out { b's' } else { b'd' };
            all(&read(&pair.mapped, 4 * P, 252 * PAGE), b'm', "others");
            all(&read(&pair.device, 0, 4 * PAGE), new, "the device");
            all(&pair.as_mapped()[..4 * PAGE], new, "as mapped");
            pair.mapped.drop_cache().unwrap();
            all(&read(&pair.mapped, 0, 4 * PAGE), new, "as stored");
            pair.at_rest();
        }
    });
}

/// E-3, E-6: what is lent for a reply is pinned as for a device: no eviction takes the frame, and a hole waits until it is
/// given back.
#[test]
fn e3_e6_what_is_lent_stays_until_it_is_given_back() {
    within(PATIENCE, || {
        let pair = Pair::new(256, MEMORY_MIN);
        pair.slow_mapped.open();
        let lease = pair.mapped.lend(0, 4 * PAGE).unwrap();
        let counts = pair.volume.statistics().cache;
        assert_eq!(counts.foll_pin_acquired - counts.foll_pin_released, 4);
        let look = |lease: &Lease| {
            for span in lease.spans() {
                let mut bytes = vec![0; span.len()];
                span.copy_to(0, &mut bytes);
                all(&bytes, b'm', "lent");
            }
        };
        for _ in 0..3 {
            all(&read(&pair.mapped, 4 * P, 252 * PAGE), b'm', "others");
        }
        look(&lease);
        std::thread::scope(|scope| {
            let puncher = scope.spawn(|| pair.mapped.punch(0..4 * P));
            std::thread::sleep(MOMENT);
            assert!(!puncher.is_finished(), "punched under the lease");
            look(&lease);
            drop(lease);
            puncher.join().unwrap().unwrap();
        });
        all(&read(&pair.mapped, 0, 4 * PAGE), 0, "the hole");
        pair.at_rest();
    });
}

/// D-1, D-4: whoever writes past the cache waits for those who read its pages, never the other way round.
#[test]
fn d1_d4_writes_from_each_others_mappings_both_end() {
    within(PATIENCE, || {
        let pair = Pair::warm(4, MEMORY_MIN);
        let direct = OpenOptions::new().read(true).write(true).direct(true);
        let to_mapped = pair.volume.open("mapped", &direct).unwrap();
        let plain = pinfold::OpenOptions::new().read(true).write(true);
        let device = pair.volume.open("device", &plain).unwrap();
        let back = device.map(0..4 * P, &MapOptions::new()).unwrap();
        std::thread::scope(|scope| {
            let out = scope.spawn(|| pair.write_out(0, 4));
            assert!(pair.slow.wait_queued(1, PATIENCE));
            // Its target is pinned by the first, its source blocked by it.
            let other = scope.spawn(|| {
                // SAFETY: inside the mapping; the library makes raw copies of it alone.
                let source = unsafe { std::slice::from_raw_parts(back.as_ptr(), 4 * PAGE) };
                to_mapped.write_at(source, 0).unwrap()
            });
            std::thread::sleep(MOMENT);
            assert!(!other.is_finished());
            pair.slow.open();
            assert_eq!(out.join().unwrap(), 4 * PAGE);
            assert_eq!(other.join().unwrap(), 4 * PAGE);
        });
        all(&read(&device, 0, 4 * PAGE), b's', "the device");
        all(&pair.as_mapped(), b's', "the mapped file");
        pair.at_rest();
    });
}

/// C-9, D-5 and rule zero (INV9): nothing is held while the source is brought in; what was checked before is checked again,
/// and what was cached meanwhile goes once more.
#[test]
fn c9_nothing_is_held_while_the_source_is_brought_in() {
    within(PATIENCE, || {
        let pair = Pair::new(4, MEMORY_MIN);
        pair.slow.open();
        std::thread::scope(|scope| {
            let out = scope.spawn(|| pair.write_out(0, 4));
            assert!(pair.slow_mapped.wait_queued(1, PATIENCE));
            // Each of these takes a lock of the file that is written to.
            all(&read(&pair.device, 0, PAGE), b'd', "before the write");
            pair.device.set_len(100).unwrap();
            assert!(!out.is_finished());
            pair.slow_mapped.open();
            assert_eq!(out.join().unwrap(), 4 * PAGE);
        });
        assert_eq!(pair.device.len(), 4 * P);
        all(&read(&pair.device, 0, 4 * PAGE), b'm', "after the write");
        pair.at_rest();
    });
}

/// C-5, T29: a cold source that is larger than what may be pinned at once goes in rounds, and is counted once.
#[test]
fn c5_t29_rounds_over_a_cold_source_count_every_byte_once() {
    within(PATIENCE, || {
        let pair = Pair::new(100, MEMORY_MIN);
        pair.slow.open();
        pair.slow_mapped.open();
        assert_eq!(pair.write_out(0, 100), 100 * PAGE);
        all(&read(&pair.device, 0, 100 * PAGE), b'm', "the device");
        pair.at_rest();
        // And the other way, to pages that have to become dirty first.
        pair.device
            .write_at(aligned(100, b'n').as_mut_slice(), 0)
            .unwrap();
        pair.mapped.drop_cache().unwrap();
        assert_eq!(pair.read_in(0, 100), 100 * PAGE);
        all(&pair.as_mapped(), b'n', "as mapped");
        pair.mapped.drop_cache().unwrap();
        all(&pair.stored.bytes(), b'n', "as stored");
        pair.at_rest();
    });
}

/// C-7, D-2, T30: a source in the range that is written is dropped as fast as it is brought in.
#[test]
fn c7_d2_t30_a_source_inside_its_target_ends_by_way_of_a_copy() {
    within(PATIENCE, || {
        let pair = Pair::warm(8, MEMORY_MIN);
        let direct = OpenOptions::new().read(true).write(true).direct(true);
        let to_mapped = pair.volume.open("mapped", &direct).unwrap();
        let written = to_mapped.write_at(pair.source(0, 4), 0).unwrap();
        assert_eq!(written, 4 * PAGE);
        let written = to_mapped.write_at(pair.source(2 * PAGE, 4), P).unwrap();
        assert_eq!(written, 4 * PAGE);
        all(&pair.as_mapped(), b's', "as mapped");
        all(&pair.stored.bytes()[..5 * PAGE], b's', "as stored");
    });
}

/// Buffers of several kinds in one call, and a transfer that fails: the error is told and the pins are back.
#[test]
fn c10_a_transfer_of_mixed_memory_that_fails_gives_its_pins_back() {
    within(PATIENCE, || {
        let pair = Pair::warm(4, MEMORY_MIN);
        let mut plain = aligned(2, b'p');
        let bufs = [
            std::io::IoSlice::new(pair.source(PAGE, 1)),
            std::io::IoSlice::new(plain.as_mut_slice()),
            std::io::IoSlice::new(pair.source(0, 1)),
        ];
        let write = || {
            let mut cursor = IovCursor::source(&bufs);
            pair.device
                .write_cursor(&mut cursor, 0, &IoOptions::default())
        };
        std::thread::scope(|scope| {
            let writer = scope.spawn(write);
            assert!(pair.slow.wait_queued(1, PATIENCE));
            assert_eq!(pair.slow.queued()[0].len, 4 * P, "one transfer");
            assert!(pair.slow.fail(0, Errno::EIO));
            let progress = writer.join().unwrap();
            assert_eq!(progress.posix().unwrap_err().errno(), Errno::EIO);
        });
        pair.at_rest();
        pair.slow.open();
        assert_eq!(write().posix().unwrap(), 4 * P);
        let bytes = read(&pair.device, 0, 4 * PAGE);
        all(&bytes[..PAGE], b's', "mapped");
        all(&bytes[PAGE..3 * PAGE], b'p', "plain");
        all(&bytes[3 * PAGE..], b's', "mapped again");
    });
}

/// T40: a cached page that will not go sends the write through the cache, and it is stored when the call returns.
#[test]
fn t40_a_write_over_pages_the_program_keeps_goes_through_the_cache() {
    within(PATIENCE, || {
        for write in [true, false] {
            let pair = Pair::warm(4, MEMORY_MIN);
            let direct = OpenOptions::new().read(true).write(true).direct(true);
            let to_mapped = pair.volume.open("mapped", &direct).unwrap();
            let kept = pair.map.pin(PAGE..3 * PAGE, write).unwrap();
            let mut new = aligned(4, b'n');
            assert_eq!(to_mapped.write_at(new.as_mut_slice(), 0).unwrap(), 4 * PAGE);
            all(&pair.stored.bytes(), b'n', "stored when it returned");
            all(&pair.as_mapped(), b'n', "as mapped");
            drop(kept);
            pair.mapped.drop_cache().unwrap();
            all(&pair.stored.bytes(), b'n', "stored in the end");
            pair.at_rest();
        }
    });
}

/// E-8, T51: a page with as many pins as it may have refuses one more, and nothing has changed.
#[test]
fn e8_t51_a_pin_too_many_is_enomem() {
    within(PATIENCE, || {
        let pair = Pair::warm(4, 64 << 20);
        pair.slow.open();
        let kept: Vec<_> = (0..4095)
            .map(|_| pair.map.pin(0..PAGE, false).unwrap())
            .collect();
        let refused = pair.device.write_at(pair.source(0, 2), 0).unwrap_err();
        assert_eq!(refused.errno(), Errno::ENOMEM);
        drop(kept);
        assert_eq!(pair.write_out(0, 2), 2 * PAGE);
        pair.at_rest();
    });
}

fn aligned(pages: usize, byte: u8) -> pinfold::AlignedBuf {
    let mut buf = pinfold::AlignedBuf::zeroed(pages * PAGE);
    buf.as_mut_slice().fill(byte);
    buf
}
