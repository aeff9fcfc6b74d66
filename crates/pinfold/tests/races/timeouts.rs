//! A store that never answers, seen through the public door. Where the order of steps matters no clock is waited for: the
//! time is over when the script says so.

use std::sync::Arc;
use std::time::Duration;

use pinfold::testing::{DeferredObject, MemoryObject};
use pinfold::{AlignedBuf, Errno, File, MEMORY_MIN, MapOptions, Object, OpenOptions, Volume};
use pinfold_store::{TimeLimit, TimedObject};

use crate::rig::{PATIENCE, all, read, within};

const PAGE: usize = 4096;
const P: u64 = 4096;

/// A file over a slow store with a limit that is over when the test says so.
struct Limited {
    volume: Volume,
    stored: Arc<MemoryObject>,
    slow: Arc<DeferredObject>,
    limit: Arc<TimeLimit>,
    _dir: tempfile::TempDir,
}

impl Limited {
    fn new(pages: usize) -> Self {
        Self::with(pages, false)
    }

    fn with(pages: usize, retain_dirty: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let stored = MemoryObject::with(&vec![b'o'; pages * PAGE]);
        let slow = DeferredObject::new(stored.clone());
        let limit = TimeLimit::new(Duration::from_secs(24 * 3600));
        let object: Arc<dyn Object> = TimedObject::new(slow.clone(), &limit);
        let volume = Volume::builder()
            .memory(MEMORY_MIN)
            .background_interval(Duration::from_secs(3600))
            .dirty_age_max(Duration::from_secs(3600))
            .retain_dirty_on_error(retain_dirty)
            .object_layer(Arc::new(move |_| Arc::clone(&object)))
            .open_dir(dir.path())
            .unwrap();
        Self {
            volume,
            stored,
            slow,
            limit,
            _dir: dir,
        }
    }

    fn open(&self, direct: bool) -> Arc<File> {
        let options = OpenOptions::new().read(true).write(true).create(true);
        let file = self.volume.open("file", &options.direct(direct)).unwrap();
        file.set_len(self.stored.bytes().len() as u64).unwrap();
        Arc::new(file)
    }

    /// Runs `call` beside the script until it has ended, with everything that it gives the store being given up.
    fn giving_up<R: Send>(&self, call: impl FnOnce() -> R + Send) -> R {
        std::thread::scope(|scope| {
            let caller = scope.spawn(call);
            while !caller.is_finished() {
                self.limit.expire();
                std::thread::yield_now();
            }
            caller.join().unwrap()
        })
    }
}

fn aligned(pages: usize, byte: u8) -> AlignedBuf {
    let mut buf = AlignedBuf::zeroed(pages * PAGE);
    buf.as_mut_slice().fill(byte);
    buf
}

#[test]
fn a_read_that_is_not_answered_is_eio_and_its_late_bytes_go_nowhere() {
    within(PATIENCE, || {
        let rig = Limited::new(4);
        let file = rig.open(false);
        let failed = rig.giving_up(|| file.read_at(&mut [0; 10], 0).unwrap_err());
        assert_eq!(failed.errno(), Errno::EIO);
        // The frame the late read was for is another page's, and this page has other bytes, when it ends.
        file.write_at(&[b'n'; 4 * PAGE], 0).unwrap();
        rig.slow.open();
        all(&read(&file, 0, 4 * PAGE), b'n', "cached");
        file.sync_all().unwrap();
        file.drop_cache().unwrap();
        all(&read(&file, 0, 4 * PAGE), b'n', "stored");
        assert_eq!(rig.limit.statistics().late, 0);
    });
}

#[test]
fn a_sync_that_is_not_answered_is_told_once_and_a_newer_write_comes_last() {
    within(PATIENCE, || {
        let rig = Limited::new(0);
        let file = rig.open(false);
        file.write_at(&[1; PAGE], 0).unwrap();
        let failed = rig.giving_up(|| file.sync_all().unwrap_err());
        assert_eq!(failed.errno(), Errno::EIO);
        file.sync_all().unwrap();
        file.write_at(&[2; PAGE], 0).unwrap();
        std::thread::scope(|scope| {
            let newer = scope.spawn(|| file.sync_all().unwrap());
            while rig.volume.statistics().cache.write_transfers < 2 {
                std::thread::yield_now();
            }
            assert_eq!(rig.slow.queued().len(), 1, "two writes of a page at once");
            rig.slow.open();
            newer.join().unwrap();
        });
        all(&rig.stored.bytes(), 2, "the newer bytes");
    });
}

#[test]
fn what_could_not_be_stored_in_time_stays_dirty_where_that_is_asked_for() {
    within(PATIENCE, || {
        let rig = Limited::with(0, true);
        let file = rig.open(false);
        file.write_at(&[1; PAGE], 0).unwrap();
        let failed = rig.giving_up(|| file.sync_all().unwrap_err());
        assert_eq!(failed.errno(), Errno::EIO);
        assert_eq!(rig.volume.statistics().pages_dirty, 1);
        rig.slow.open();
        file.sync_all().unwrap();
        assert_eq!(rig.volume.statistics().pages_dirty, 0);
        all(&rig.stored.bytes(), 1, "stored in the end");
    });
}

#[test]
fn a_direct_call_that_is_not_answered_gives_its_memory_back() {
    within(PATIENCE, || {
        let rig = Limited::new(4);
        let (file, direct) = (rig.open(false), rig.open(true));
        let mut buf = aligned(2, b'.');
        let failed = rig.giving_up(|| direct.read_at(buf.as_mut_slice(), 0).unwrap_err());
        assert_eq!(failed.errno(), Errno::EIO);
        buf.as_mut_slice().fill(b'n');
        let failed = rig.giving_up(|| direct.write_at(buf.as_mut_slice(), 0).unwrap_err());
        assert_eq!(failed.errno(), Errno::EIO);
        // Ours again: what the device does with its own copy is not to be seen here, nor the other way round.
        buf.as_mut_slice().fill(b'!');
        rig.slow.open();
        all(buf.as_mut_slice(), b'!', "the caller's memory");
        let bytes = read(&file, 0, 4 * PAGE);
        let expected = [vec![b'n'; 2 * PAGE], vec![b'o'; 2 * PAGE]].concat();
        assert!(bytes == expected, "after the late write");
        let submitted = direct.submit_read(aligned(1, 0), 0).unwrap().wait();
        assert_eq!(submitted.progress.posix().unwrap(), P);
    });
}

#[test]
fn bad_memory_is_efault_also_where_the_process_copies() {
    within(PATIENCE, || {
        let rig = Limited::new(4);
        rig.slow.open();
        let direct = rig.open(true);
        let region = pinfold_mem::region::Region::pages(3).unwrap();
        region.fill(0..3 * PAGE, b'n').unwrap();
        region
            .protect(2 * PAGE..3 * PAGE, pinfold_mem::region::Protection::None)
            .unwrap();
        let iov = region.iov(0..3 * PAGE);
        let how = pinfold::IoOptions::default();
        let mut cursor = iov.cursor(pinfold::Direction::Source);
        let progress = direct.write_cursor(&mut cursor, 0, &how);
        assert_eq!(progress.done, 2 * P);
        assert_eq!(progress.stop.unwrap().errno(), Errno::EFAULT);
        assert_eq!(cursor.count(), PAGE);
    });
}

#[test]
fn a_mapped_buffer_of_a_call_that_is_not_answered_is_not_waited_for() {
    within(PATIENCE, || {
        let rig = Limited::new(4);
        let (file, direct) = (rig.open(false), rig.open(true));
        let map = file.map(0..4 * P, &MapOptions::new()).unwrap();
        std::thread::scope(|scope| {
            let warm = scope.spawn(|| map.read(2 * PAGE, &mut [0; PAGE]).unwrap());
            while !warm.is_finished() {
                rig.slow.release_all();
                std::thread::yield_now();
            }
        });
        // SAFETY: inside the mapping; the library makes raw copies of it alone.
        let source =
            unsafe { std::slice::from_raw_parts(map.as_ptr().wrapping_add(2 * PAGE), PAGE) };
        let failed = rig.giving_up(|| direct.write_at(source, 0).unwrap_err());
        assert_eq!(failed.errno(), Errno::EIO);
        assert_eq!(rig.volume.pins_held(), []);
        // Waits for whoever uses the page, and finds nobody, while the device still has its bytes.
        file.punch(2 * P..3 * P).unwrap();
        assert_eq!(rig.limit.statistics().late, 1);
        rig.slow.open();
        all(&read(&file, 2 * P, PAGE), 0, "the hole");
        all(&read(&file, 0, PAGE), b'o', "what was written late");
    });
}

#[test]
fn a_fault_that_is_not_answered_is_an_error_of_pin_and_of_system_calls() {
    within(PATIENCE, || {
        let rig = Limited::new(4);
        let file = rig.open(false);
        let map = file.map(0..4 * P, &MapOptions::new()).unwrap();
        let failed = rig.giving_up(|| map.pin(0..PAGE, false).unwrap_err());
        assert_eq!(failed.errno(), Errno::EIO);
        let failed = rig.giving_up(|| map.read(PAGE, &mut [0; 10]).unwrap_err());
        assert_eq!(failed.errno(), Errno::EIO);
        let (mut ours, _theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        // SAFETY: inside the mapping, and given to the kernel alone.
        let cold = unsafe { std::slice::from_raw_parts(map.as_ptr().wrapping_add(2 * PAGE), 10) };
        let refused = rig.giving_up(|| std::io::Write::write(&mut ours, cold).unwrap_err());
        assert_eq!(refused.raw_os_error(), Some(libc::EFAULT));
        rig.slow.open();
        let mut bytes = [0; 10];
        // What was refused is tried again within 50 ms.
        while map.read(2 * PAGE, &mut bytes).is_err() {
            std::thread::yield_now();
        }
        assert_eq!(bytes, [b'o'; 10]);
    });
}

#[test]
fn writers_over_the_limit_go_on_when_nothing_is_stored_any_more() {
    within(PATIENCE, || {
        let rig = Limited::new(0);
        let file = rig.open(false);
        let written = rig.giving_up(|| {
            (0..200u64)
                .filter(|page| file.write_at(&[1; PAGE], page * P).is_ok())
                .count()
        });
        assert!(written > 0);
        rig.giving_up(|| drop(file.sync_all()));
        rig.slow.open();
    });
}

#[test]
fn closing_a_volume_whose_store_never_answers_ends_with_an_error() {
    within(PATIENCE, || {
        let dir = tempfile::tempdir().unwrap();
        let slow = DeferredObject::new(MemoryObject::new());
        let object = slow.clone();
        let builder = Volume::builder()
            .memory(MEMORY_MIN)
            .background_interval(Duration::from_secs(3600))
            .dirty_age_max(Duration::from_secs(3600))
            .object_layer(Arc::new(move |_| object.clone()));
        let refused = builder.clone().store_timeout(Duration::ZERO);
        let refused = refused.open_dir(dir.path()).unwrap_err();
        assert_eq!(refused.errno(), Errno::EINVAL);
        let volume = builder
            .store_timeout(Duration::from_millis(100))
            .open_dir(dir.path())
            .unwrap();
        let options = OpenOptions::new().read(true).write(true).create(true);
        // Kept open: the last close of a file writes back too, and nobody hears of it.
        let files = ["a", "b", "c"].map(|name| volume.open(name, &options).unwrap());
        for file in &files {
            file.write_at(&[1; 2 * PAGE], 0).unwrap();
        }
        let counted = volume.clone();
        assert_eq!(volume.close().unwrap_err().errno(), Errno::EIO);
        let now = counted.statistics().store;
        assert!(now.expired > 0 && now.late > 0, "{now:?}");
        assert!(
            counted
                .statistics()
                .rows()
                .contains(&("store_late", now.late))
        );
        drop((files, counted));
        slow.open();
    });
}
