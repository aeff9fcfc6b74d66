//! Faults against everything that changes a file's size, pages or state.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pinfold::{Errno, MapAccess, MapOptions};

use super::rig::{PAGE, everywhere, load, pattern, store};

const FOR: Duration = Duration::from_millis(400);

#[test]
fn t53_no_store_is_lost_to_a_sync() {
    everywhere(|rig| {
        let pages = 40;
        let file = rig.file("a", pages * PAGE, 0);
        let map = rig.map(&file, MapAccess::Write);
        let stop = AtomicBool::new(false);
        let last: Vec<u8> = thread::scope(|scope| {
            let storing: Vec<_> = (0..2)
                .map(|thread| {
                    let (map, stop) = (&map, &stop);
                    scope.spawn(move || {
                        let mut round = 0u64;
                        while !stop.load(Ordering::Relaxed) {
                            for page in 0..pages {
                                store(map, page * PAGE + thread, round as u8);
                            }
                            round += 1;
                        }
                        (round - 1) as u8
                    })
                })
                .collect();
            let until = Instant::now() + FOR;
            while Instant::now() < until {
                file.sync_all().unwrap();
            }
            stop.store(true, Ordering::Relaxed);
            storing
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect()
        });
        file.sync_all().unwrap();
        let stored = std::fs::read(rig.dir.path().join("a")).unwrap();
        for page in 0..pages {
            assert_eq!(stored[page * PAGE..page * PAGE + 2], last, "page {page}");
        }
    });
}

#[test]
fn t54_what_is_cut_off_and_grown_again_reads_as_zeros() {
    everywhere(|rig| {
        let pages = 32u64;
        let file = rig.file("a", 32 * PAGE, 1);
        let map = rig.map_range(&file, 0..pages * PAGE as u64, MapAccess::Write);
        let stop = AtomicBool::new(false);
        let refused = AtomicU64::new(0);
        thread::scope(|scope| {
            for thread in 0..3 {
                let (map, stop, refused) = (&map, &stop, &refused);
                scope.spawn(move || {
                    let mut at = thread;
                    while !stop.load(Ordering::Relaxed) {
                        at = (at * 7 + 13) % 32;
                        // By the mapping's own calls: beyond the end they say so, and nobody has to catch a signal.
                        let mut byte = [0];
                        let read = map.read(at * PAGE + 9, &mut byte).unwrap();
                        let wrote = map.write(at * PAGE + 10, &[1]).unwrap();
                        refused.fetch_add(u64::from(read + wrote < 2), Ordering::Relaxed);
                    }
                });
            }
            let until = Instant::now() + FOR;
            while Instant::now() < until {
                file.set_len(4 * PAGE as u64 + 100).unwrap();
                file.set_len(pages * PAGE as u64).unwrap();
            }
            stop.store(true, Ordering::Relaxed);
        });
        assert!(refused.into_inner() > 0, "the race was one");
        file.set_len(5 * PAGE as u64 + 100).unwrap();
        file.set_len(pages * PAGE as u64).unwrap();
        for page in 6..32 {
            assert_eq!(load(&map, page * PAGE + 9), 0);
            assert_eq!(load(&map, page * PAGE + 10), 0);
        }
    });
}

#[test]
fn t55_a_punched_range_reads_as_zeros_until_it_is_stored_to() {
    everywhere(|rig| {
        let file = rig.file("a", 32 * PAGE, 1);
        let map = rig.map(&file, MapAccess::Write);
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            for thread in 0..2usize {
                let (map, stop) = (&map, &stop);
                scope.spawn(move || {
                    let mut at = thread;
                    while !stop.load(Ordering::Relaxed) {
                        at = (at * 5 + 3) % 16;
                        load(map, at * PAGE);
                    }
                });
            }
            let until = Instant::now() + FOR;
            while Instant::now() < until {
                store(&map, 5 * PAGE + 1, 0xff);
                file.punch(3 * PAGE as u64 + 50..9 * PAGE as u64 + 50)
                    .unwrap();
                for page in 4..9 {
                    assert_eq!(load(&map, page * PAGE + 1), 0);
                }
                assert_eq!(
                    (load(&map, 3 * PAGE + 50), load(&map, 9 * PAGE + 49)),
                    (0, 0)
                );
            }
            stop.store(true, Ordering::Relaxed);
        });
        let old = pattern(32 * PAGE, 1);
        assert_eq!(load(&map, 3 * PAGE + 49), old[3 * PAGE + 49]);
        assert_eq!(load(&map, 9 * PAGE + 50), old[9 * PAGE + 50]);
    });
}

#[test]
fn t21_t22_stores_past_the_end_never_come_to_light() {
    everywhere(|rig| {
        let file = rig.file("a", 100, 1);
        let map = rig.map_range(&file, 0..2 * PAGE as u64, MapAccess::Write);
        store(&map, 200, b'G');
        assert_eq!(load(&map, 200), b'G', "until then they are there");
        file.write_at(b"x", 300).unwrap();
        assert_eq!((load(&map, 200), load(&map, 300)), (0, b'x'));
        store(&map, 400, b'G');
        file.set_len(1000).unwrap();
        assert_eq!(load(&map, 400), 0);
        store(&map, 2000, b'G');
        file.sync_all().unwrap();
        let stored = std::fs::read(rig.dir.path().join("a")).unwrap();
        assert_eq!(stored.len(), 1000);
        file.set_len(4000).unwrap();
        let mut back = vec![9; 4000];
        file.read_at(&mut back, 0).unwrap();
        assert!(back[1000..].iter().all(|&byte| byte == 0));
    });
}

#[test]
fn a_file_that_grows_is_mapped_up_to_its_new_end_at_once() {
    everywhere(|rig| {
        let file = rig.file("a", PAGE, 1);
        let map = rig.map_range(&file, 0..1000 * PAGE as u64, MapAccess::Write);
        let mut len = PAGE as u64;
        for round in 0..60usize {
            let page = (len as usize).div_ceil(PAGE);
            let error = map.pin(page * PAGE..page * PAGE + 1, false).unwrap_err();
            assert_eq!(error.errno(), Errno::EFAULT);
            if round % 2 == 0 {
                file.append(&[round as u8; 5000]).unwrap();
            } else {
                file.set_len(len + 5000).unwrap();
            }
            len += 5000;
            store(&map, len as usize - 1, 0x33);
            assert_eq!(load(&map, len as usize - 1), 0x33);
        }
    });
}

#[test]
fn mappings_come_and_go_under_faults() {
    everywhere(|rig| {
        let file = rig.file("a", 64 * PAGE, 1);
        let old = pattern(64 * PAGE, 1);
        thread::scope(|scope| {
            for thread in 0..3usize {
                let (file, old) = (&file, &old);
                let delivery = rig.delivery;
                scope.spawn(move || {
                    let until = Instant::now() + FOR;
                    let mut round = thread;
                    while Instant::now() < until {
                        let access =
                            [MapAccess::Read, MapAccess::Write, MapAccess::Private][round % 3];
                        let options = MapOptions::new().access(access).delivery(delivery);
                        let start = (round * 11 % 50 * PAGE) as u64;
                        let mut map = file.map(start..64 * PAGE as u64, &options).unwrap();
                        let at = round * 3 % 10 * PAGE;
                        assert_eq!(load(&map, at), old[start as usize + at]);
                        if round % 4 == 0 {
                            map.unmap(0..PAGE).unwrap();
                        }
                        round += 1;
                    }
                });
            }
        });
    });
}

/// D-4, E-10: whoever pins several pages has some of them while others are brought in, and may call and fault while he has
/// them; truncation and punching wait for those pages, with nothing that he could want.
#[test]
fn pins_that_a_program_keeps_and_truncation_wait_for_no_circle() {
    everywhere(|rig| {
        let file = rig.file("a", 8 * PAGE, 1);
        let map = rig.map(&file, MapAccess::Write);
        let until = Instant::now() + FOR;
        thread::scope(|scope| {
            for write in [false, true] {
                let (map, file) = (&map, &file);
                scope.spawn(move || {
                    while Instant::now() < until {
                        match map.pin(2 * PAGE..8 * PAGE, write) {
                            Ok(pinned) => {
                                assert_eq!(pinned.pages(), 6);
                                assert_eq!(file.write_at(b"beside", 3 * PAGE as u64).unwrap(), 6);
                                store(map, PAGE, 1);
                            }
                            Err(error) => assert_eq!(error.errno(), Errno::EFAULT),
                        }
                    }
                });
            }
            for hole in [0, 4 * PAGE as u64] {
                let file = &file;
                scope.spawn(move || {
                    while Instant::now() < until {
                        file.punch(hole..hole + 3 * PAGE as u64).unwrap();
                    }
                });
            }
            scope.spawn(|| {
                while Instant::now() < until {
                    file.set_len(6 * PAGE as u64 + 100).unwrap();
                    file.set_len(8 * PAGE as u64).unwrap();
                }
            });
        });
    });
}
