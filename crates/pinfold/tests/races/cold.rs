//! Calls whose buffer is mapped and not there: what others may do while it is brought in, and that every call ends.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use pinfold::testing::{DeferredObject, MemoryObject};
use pinfold::{File, IoOptions, IovCursor, MEMORY_MIN, MapAccess, MapOptions, Mapping};
use pinfold::{Object, OpenOptions};
use pinfold_store::Operation;

use crate::pins::Pair;
use crate::rig::{MOMENT, PATIENCE, Rig, all, read, within};

const PAGE: usize = 4096;
const P: u64 = 4096;
const PAGES: usize = 8;

/// One file of 8 pages 'o', none of them cached, with a mapping of it.
struct Own {
    rig: Rig,
    slow: Arc<DeferredObject>,
    file: Arc<File>,
    map: Mapping,
}

impl Own {
    fn new() -> Self {
        let stored = MemoryObject::with(&[b'o'; PAGES * PAGE]);
        let slow = DeferredObject::new(stored);
        let rig = Rig::new(slow.clone() as Arc<dyn Object>);
        let file = rig.open(false);
        file.set_len((PAGES * PAGE) as u64).unwrap();
        let how = MapOptions::new().access(MapAccess::Write);
        let map = file.map(0..(PAGES * PAGE) as u64, &how).unwrap();
        Self {
            rig,
            slow,
            file,
            map,
        }
    }

    fn source(&self, page: usize) -> &[u8] {
        assert!(page < PAGES);
        let at = self.map.as_ptr().wrapping_add(page * PAGE);
        // SAFETY: inside the mapping; the library makes raw copies of it alone.
        unsafe { std::slice::from_raw_parts(at, PAGE) }
    }

    #[expect(
        clippy::mut_from_ref,
        reason = "a mapping is memory that anybody may change"
    )]
    fn target(&self, page: usize) -> &mut [u8] {
        assert!(page < PAGES);
        let at = self.map.as_mut_ptr().wrapping_add(page * PAGE);
        // SAFETY: as for `source`; used by one call.
        unsafe { std::slice::from_raw_parts_mut(at, PAGE) }
    }

    /// The offset that the store is asked for, in pages.
    fn asked_for(&self, number: usize) -> u64 {
        let queued = self.slow.queued();
        assert_eq!(queued[number].operation, Operation::Read);
        queued[number].offset / P
    }
}

/// a write that waits for its source has locked nothing that others need, its target's page least of all.
#[test]
fn a1_a_write_that_waits_for_its_source_holds_nothing() {
    within(PATIENCE, || {
        let own = Own::new();
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| own.file.write_at(own.source(4), 0).unwrap());
            assert!(own.slow.wait_queued(1, PATIENCE));
            assert_eq!(own.asked_for(0), 4, "it waits for its source");
            // The very page, and the lock of the inode.
            assert_eq!(own.file.write_at(&[b'x'; PAGE], 0).unwrap(), PAGE);
            own.file.set_len((PAGES * PAGE) as u64 + 10).unwrap();
            assert!(!writer.is_finished());
            own.slow.open();
            assert_eq!(writer.join().unwrap(), PAGE);
        });
        all(&read(&own.file, 0, PAGE), b'o', "the last write wins");
    });
}

/// B-1: a page written onto itself, not cached: what the write makes of its target is not in the way of its source.
#[test]
fn b1_a_page_that_is_not_there_is_written_onto_itself() {
    within(PATIENCE, || {
        let own = Own::new();
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| own.file.write_at(own.source(4), 4 * P).unwrap());
            assert!(own.slow.wait_queued(1, PATIENCE), "nobody reads the source");
            assert_eq!(own.asked_for(0), 4);
            own.slow.open();
            assert_eq!(writer.join().unwrap(), PAGE);
        });
        all(&read(&own.file, 0, PAGES * PAGE), b'o', "the file");
    });
}

/// a call that stores into memory mapped from its own file waits for that with nothing held.
#[test]
fn a8_a_read_into_its_own_file_waits_for_its_target_with_nothing_held() {
    within(PATIENCE, || {
        let own = Own::new();
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| own.file.read_at(own.target(0), 4 * P).unwrap());
            // What is read comes first, perhaps with what follows it; then the target.
            loop {
                let queued = own.slow.queued();
                if queued.iter().any(|one| one.offset < P) || reader.is_finished() {
                    break;
                }
                let others: Vec<_> = queued.iter().map(|one| one.number).collect();
                own.slow.release_numbers(&others);
                std::thread::yield_now();
            }
            own.file.set_len((PAGES * PAGE) as u64 + 10).unwrap();
            assert!(!reader.is_finished());
            own.slow.open();
            assert_eq!(reader.join().unwrap(), PAGE);
        });
        all(&read(&own.file, 0, PAGE), b'o', "the target");
    });
}

/// A-4, B-8: a source that goes as fast as it comes does not keep a write from its end.
#[test]
fn a4_b8_a_write_from_a_source_that_is_always_dropped_ends() {
    within(PATIENCE, || {
        let pair = Pair::new(256, MEMORY_MIN);
        pair.slow.open();
        pair.slow_mapped.open();
        let options = OpenOptions::new().read(true).write(true);
        let target = pair.volume.open("device", &options).unwrap();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let (mapped, stop) = (&pair.mapped, &stop);
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    mapped.drop_cache().unwrap();
                }
            });
            for _ in 0..2 {
                let written = target.write_at(pair.source(0, 256), 0).unwrap();
                assert_eq!(written, 256 * PAGE);
            }
            // Pages in no order, all of them in one call.
            let parts: Vec<_> = (0..64)
                .map(|i| std::io::IoSlice::new(&pair.source((i * 37 % 256) * PAGE, 1)[..100]))
                .collect();
            assert_eq!(target.write_vectored_at(&parts, 256 * P).unwrap(), 6400);
            stop.store(true, Ordering::Relaxed);
        });
        all(
            &read(&target, 0, 256 * PAGE + 6400),
            b'm',
            "what was written",
        );
    });
}

/// a source that is gone again whenever it was brought in. The script drops it as soon as the write reads its target,
/// which it drops as soon as the write reads its source: without a copy taken with nothing held no round would ever differ.
#[test]
fn a4_a_source_that_is_gone_at_every_copy_is_copied_by_way_of_a_buffer() {
    /// Rounds after which the script gives up.
    const ROUNDS_MAX: usize = 64;
    within(PATIENCE, || {
        let pair = Pair::new(4, MEMORY_MIN);
        let options = OpenOptions::new().read(true).write(true);
        let target = pair.volume.open("device", &options).unwrap();
        let (mut target_reads, mut source_reads) = (0, 0);
        std::thread::scope(|scope| {
            // Less than a page, so that its target has to be read.
            let writer = scope.spawn(|| target.write_at(&pair.source(0, 1)[..100], 10).unwrap());
            while !writer.is_finished() {
                if target_reads + source_reads > ROUNDS_MAX {
                    pair.slow.open();
                    pair.slow_mapped.open();
                } else if let Some(one) = pair.slow.queued().first() {
                    assert_eq!(one.operation, Operation::Read);
                    target_reads += usize::from(one.offset == 0);
                    pair.mapped.drop_cache().unwrap();
                    assert!(pair.slow.release(0));
                } else if let Some(one) = pair.slow_mapped.queued().first() {
                    assert_eq!(one.operation, Operation::Read);
                    source_reads += usize::from(one.offset == 0);
                    target.drop_cache().unwrap();
                    assert!(pair.slow_mapped.release(0));
                }
                std::thread::yield_now();
            }
            assert_eq!(writer.join().unwrap(), 100);
        });
        // Two rounds that came to nothing, one that asked for the copy, and the copy's own.
        assert_eq!((target_reads, source_reads), (4, 3), "rounds");
        pair.slow.open();
        pair.slow_mapped.open();
        let bytes = read(&target, 0, PAGE);
        all(&bytes[..10], b'd', "before what was written");
        all(&bytes[10..110], b'm', "what was written");
        all(&bytes[110..], b'd', "behind it");
    });
}

/// B-5: who appends and has to wait for his source takes his place when he has it, not before.
#[test]
fn b5_an_append_that_waits_for_its_source_goes_behind_who_did_not() {
    within(PATIENCE, || {
        let pair = Pair::new(4, MEMORY_MIN);
        pair.slow.open();
        let options = OpenOptions::new().read(true).write(true).append(true);
        let log = pair.volume.open("device", &options).unwrap();
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| log.append(&pair.source(0, 1)[..3000]).unwrap());
            assert!(pair.slow_mapped.wait_queued(1, PATIENCE));
            log.append(&[b'y'; 1000]).unwrap();
            assert!(!waits.is_finished());
            pair.slow_mapped.open();
            waits.join().unwrap();
        });
        assert_eq!(log.len(), 4 * P + 4000);
        let tail = read(&log, 4 * P, 4000);
        all(&tail[..1000], b'y', "who did not wait");
        all(&tail[1000..], b'm', "who did");
    });
}

/// B-7: a file cut off between two rounds of a write: the rest is written where it belongs, and nothing of what was
/// known before is used. Least of all the size: what a mapping stored behind the new end would come to light.
#[test]
fn b7_a_file_cut_off_between_two_rounds_of_a_write() {
    within(PATIENCE, || {
        for end in [0, 100] {
            let pair = Pair::new(4, MEMORY_MIN);
            pair.slow.open();
            let options = OpenOptions::new().read(true).write(true);
            let target = pair.volume.open("device", &options).unwrap();
            let how = MapOptions::new().access(MapAccess::Write);
            let map = target.map(0..4 * P, &how).unwrap();
            let first = [b'a'; PAGE];
            let parts = [
                std::io::IoSlice::new(&first),
                std::io::IoSlice::new(pair.source(0, 1)),
            ];
            std::thread::scope(|scope| {
                let writer = scope.spawn(|| {
                    let mut cursor = IovCursor::source(&parts);
                    let how = IoOptions::default();
                    target.write_cursor(&mut cursor, 0, &how).posix().unwrap()
                });
                assert!(pair.slow_mapped.wait_queued(1, PATIENCE));
                all(&read(&target, 0, PAGE), b'a', "the first round");
                target.set_len(end).unwrap();
                if end > 0 {
                    let behind = map.as_mut_ptr().wrapping_add(200);
                    // SAFETY: a byte of the mapping, in its last page and behind the end; nobody references it.
                    unsafe { behind.write_volatile(b'!') };
                }
                pair.slow_mapped.open();
                assert_eq!(writer.join().unwrap(), 2 * P);
            });
            assert_eq!(target.len(), 2 * P);
            let bytes = read(&target, 0, 2 * PAGE);
            let (left, gone) = bytes[..PAGE].split_at(end as usize);
            all(left, b'a', "what was left");
            all(gone, 0, "what was cut off");
            all(&bytes[PAGE..], b'm', "what was written after it");
        }
    });
}

/// D-3: a write that waits for its source does not keep the right to add pages, so whoever blocks that gets by, and the
/// fault of the write, which needs it again, cannot wait behind itself.
#[test]
fn d3_a_direct_write_passes_a_write_that_waits_for_its_source() {
    within(PATIENCE, || {
        let own = Own::new();
        let direct = own.rig.open(true);
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| own.file.write_at(own.source(4), 0).unwrap());
            assert!(own.slow.wait_queued(1, PATIENCE));
            let blocker = scope.spawn(|| {
                let mut new = pinfold::AlignedBuf::zeroed(PAGE);
                new.as_mut_slice().fill(b'n');
                direct.write_at(new.as_mut_slice(), 7 * P).unwrap()
            });
            assert!(own.slow.wait_queued(2, PATIENCE), "the gate is held");
            // Behind the blocker, with everybody in the queue, the source arrives first.
            let reader = scope.spawn(|| read(&own.file, 2 * P, PAGE));
            assert!(own.slow.release(0));
            std::thread::sleep(MOMENT);
            own.slow.open();
            assert_eq!(writer.join().unwrap(), PAGE);
            assert_eq!(blocker.join().unwrap(), PAGE);
            all(&reader.join().unwrap(), b'o', "read meanwhile");
        });
        all(&read(&own.file, 7 * P, PAGE), b'n', "written directly");
    });
}

/// D-6: a first store to what is being written directly waits for the write, and is kept.
#[test]
fn d6_a_store_to_what_is_written_directly_waits_and_is_kept() {
    within(PATIENCE, || {
        let own = Own::new();
        let direct = own.rig.open(true);
        std::thread::scope(|scope| {
            let mut new = pinfold::AlignedBuf::zeroed(PAGE);
            new.as_mut_slice().fill(b'n');
            let writer = scope.spawn(move || direct.write_at(new.as_mut_slice(), P).unwrap());
            assert!(own.slow.wait_queued(1, PATIENCE));
            let storing = scope.spawn(|| own.map.write(PAGE + 7, b"s").unwrap());
            std::thread::sleep(MOMENT);
            assert!(!storing.is_finished(), "stored under the write");
            assert_eq!(own.slow.queued().len(), 1, "the fault went to the store");
            own.slow.open();
            assert_eq!(writer.join().unwrap(), PAGE);
            storing.join().unwrap();
        });
        let mut page = read(&own.file, P, PAGE);
        assert_eq!(std::mem::replace(&mut page[7], b'n'), b's');
        all(&page, b'n', "beside the store");
    });
}

/// E-10: who waits for a lock has pinned nothing yet, so nobody waits for him in his turn.
#[test]
fn e10_nothing_is_pinned_while_a_lock_is_waited_for() {
    within(PATIENCE, || {
        let pair = Pair::warm(4, MEMORY_MIN);
        std::thread::scope(|scope| {
            // Makes the file longer, so it has it to itself.
            let alone = scope.spawn(|| {
                let mut new = pinfold::AlignedBuf::zeroed(PAGE);
                pair.device.write_at(new.as_mut_slice(), 4 * P).unwrap()
            });
            assert!(pair.slow.wait_queued(1, PATIENCE));
            let waits = scope.spawn(|| pair.write_out(0, 4));
            std::thread::sleep(MOMENT);
            assert_eq!(pair.volume.pins_held(), []);
            let counted = pair.volume.statistics().cache;
            assert_eq!(counted.foll_pin_acquired, counted.foll_pin_released);
            pair.mapped.punch(0..P).unwrap();
            assert!(!waits.is_finished());
            pair.slow.open();
            assert_eq!(alone.join().unwrap(), PAGE);
            assert_eq!(waits.join().unwrap(), 4 * PAGE);
        });
        let bytes = read(&pair.device, 0, 4 * PAGE);
        all(&bytes[..PAGE], 0, "punched before it was pinned");
        all(&bytes[PAGE..], b's', "the rest");
        pair.at_rest();
    });
}
