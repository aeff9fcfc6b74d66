//! What the program keeps pinned stays, and nobody waits for it for ever.

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use pinfold::{AllocateMode, Delivery, Errno, ErrorKind, MapAccess, OpenOptions};

use super::rig::{LARGE, PAGE, Rig, everywhere, load, pattern, readable, store, watched};

#[test]
fn a_thread_that_cuts_off_what_it_keeps_is_told_so_and_nothing_has_changed() {
    everywhere(|rig| {
        let file = rig.file("a", 10 * PAGE, 1);
        let map = rig.map(&file, MapAccess::Write);
        let mut expected = pattern(10 * PAGE, 1);
        for write in [false, true] {
            let pinned = map.pin(4 * PAGE..6 * PAGE, write).unwrap();
            let page = |page: u64| page * PAGE as u64;
            let refused = |what: &str, outcome: pinfold::Result<()>| {
                let error = outcome.unwrap_err();
                if error.errno() == Errno::EOPNOTSUPP {
                    // Not every store can move ranges.
                    return;
                }
                assert_eq!(error.kind(), ErrorKind::Pinned, "{what}: {error}");
                assert_eq!(error.errno(), Errno::EBUSY);
            };
            refused("cut to nothing", file.set_len(0));
            refused("cut before", file.set_len(page(4)));
            refused("cut within", file.set_len(page(5)));
            refused("punch", file.punch(page(3)..page(8)));
            refused(
                "zero",
                file.allocate(AllocateMode::ZeroKeepSize, page(5)..page(6)),
            );
            refused(
                "collapse",
                file.allocate(AllocateMode::Collapse, page(0)..page(1)),
            );
            refused(
                "insert",
                file.allocate(AllocateMode::Insert, page(2)..page(3)),
            );
            let truncating = OpenOptions::new().write(true).truncate(true);
            let opened = rig.volume.open("a", &truncating).map(drop);
            refused("open with O_TRUNC", opened);
            assert_eq!(file.len(), page(10));
            let mut back = vec![0; 10 * PAGE];
            file.read_at(&mut back, 0).unwrap();
            assert!(back == expected);
            for at in [4 * PAGE, 6 * PAGE - 1] {
                assert_eq!(load(&map, at), expected[at]);
                assert!(readable(map.as_ptr().wrapping_add(at)));
            }
            // What takes nothing of it away is done.
            file.punch(page(7)..page(8)).unwrap();
            expected[7 * PAGE..8 * PAGE].fill(0);
            file.set_len(page(5) + 1).unwrap();
            file.set_len(page(10)).unwrap();
            expected[5 * PAGE + 1..].fill(0);
            assert_eq!(load(&map, 6 * PAGE - 1), 0);
            assert_eq!(load(&map, 4 * PAGE), expected[4 * PAGE]);
            drop(pinned);
            file.punch(page(5)..page(6)).unwrap();
            expected[5 * PAGE..6 * PAGE].fill(0);
        }
        file.set_len(0).unwrap();
        assert_eq!(rig.volume.pins_held().len(), 0);
    });
}

#[test]
fn a_thread_that_keeps_pages_may_cut_while_another_waits_for_them() {
    everywhere(|rig| {
        const LEN: usize = 8 * PAGE;
        let page = |page: u64| page * PAGE as u64;
        let file = rig.file("a", LEN, 1);
        let map = rig.map(&file, MapAccess::Write);
        let (stop, pins) = (AtomicBool::new(false), AtomicUsize::new(0));
        thread::scope(|scope| {
            scope.spawn(|| {
                let mut round = 0u8;
                while !stop.load(Ordering::Relaxed) {
                    round = round.wrapping_add(1);
                    let write = !round.is_multiple_of(3);
                    let pinned = match map.pin(page(5) as usize..page(7) as usize, write) {
                        Ok(pinned) => pinned,
                        Err(error) => {
                            assert_eq!(error.errno(), Errno::EFAULT, "{error}");
                            continue;
                        }
                    };
                    pins.fetch_add(1, Ordering::Relaxed);
                    // A page that went under the pin would be SIGBUS.
                    for at in [5 * PAGE, 6 * PAGE] {
                        if write {
                            store(&map, at, round);
                            assert_eq!(load(&map, at), round);
                        }
                        let _ = load(&map, at + 5);
                    }
                    // Were it being taken away by the other, the two would wait for each other.
                    let error = file.punch(page(4)..page(6)).unwrap_err();
                    assert_eq!(error.kind(), ErrorKind::Pinned, "{error}");
                    drop(pinned);
                }
            });
            let mut cuts = 0;
            while cuts < 40 || pins.load(Ordering::Relaxed) < 40 {
                if cuts % 2 == 0 {
                    file.set_len(page(2)).unwrap();
                } else {
                    file.punch(page(5)..page(7)).unwrap();
                }
                file.set_len(LEN as u64).unwrap();
                cuts += 1;
                thread::yield_now();
            }
            stop.store(true, Ordering::Relaxed);
        });
    });
}

#[test]
fn two_threads_that_cut_off_what_the_other_keeps_are_told_so_in_the_end() {
    watched("two threads", || {
        let rig = Rig::new(LARGE, Delivery::Handler);
        let files = [rig.file("a", 4 * PAGE, 1), rig.file("b", 4 * PAGE, 2)];
        let maps = [0, 1].map(|mine| rig.map(&files[mine], MapAccess::Write));
        let both_keep = Barrier::new(2);
        thread::scope(|scope| {
            for mine in [0, 1] {
                let (files, maps, both_keep) = (&files, &maps, &both_keep);
                scope.spawn(move || {
                    let pinned = maps[mine].pin(0..PAGE, true).unwrap();
                    both_keep.wait();
                    let outcome = files[1 - mine].set_len(0);
                    both_keep.wait();
                    drop(pinned);
                    let error = outcome.unwrap_err();
                    assert_eq!(error.kind(), ErrorKind::Pinned, "{error}");
                });
            }
        });
        for file in &files {
            assert_eq!(file.len(), 4 * PAGE as u64);
            file.set_len(0).unwrap();
        }
    });
}
