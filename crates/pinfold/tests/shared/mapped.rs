//! Files mapped on several nodes.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use pinfold::glocks::{Mode, Report};
use pinfold::{Errno, ErrorKind, MapAccess, MapOptions, Tracking};

use super::rig::{PAGE, Rig, both, filled, map, read, readable, same, until, watched, word};

#[test]
fn loads_and_stores_of_two_nodes_agree_with_each_other_and_with_calls() {
    both(|delivery| {
        let rig = Rig::new();
        let files = rig.everywhere("f");
        files[0].set_len(4 * PAGE as u64).unwrap();
        let maps = [0, 1].map(|node| map(&files[node], MapAccess::Write, delivery));
        for round in 1..30u64 {
            let (here, there) = ((round % 2) as usize, (round % 2) as usize ^ 1);
            word(&maps[here], PAGE).store(round, Ordering::SeqCst);
            assert_eq!(word(&maps[there], PAGE).load(Ordering::SeqCst), round);
            same(read(&files[there], 8, PAGE as u64), round.to_ne_bytes());
            files[there]
                .write_at(&(round + 1000).to_ne_bytes(), 2 * PAGE as u64)
                .unwrap();
            assert_eq!(
                word(&maps[here], 2 * PAGE).load(Ordering::SeqCst),
                round + 1000
            );
        }
    });
}

#[test]
fn a_private_mapping_keeps_its_copies_and_follows_the_rest() {
    both(|delivery| {
        let rig = Rig::new();
        let files = rig.everywhere("f");
        files[0].set_len(2 * PAGE as u64).unwrap();
        let private = map(&files[0], MapAccess::Private, delivery);
        word(&private, 0).store(7, Ordering::SeqCst);
        assert_eq!(word(&private, PAGE).load(Ordering::SeqCst), 0);
        files[1].write_at(&filled(2 * PAGE, 1), 0).unwrap();
        assert_eq!(word(&private, 0).load(Ordering::SeqCst), 7);
        assert_eq!(
            word(&private, PAGE).load(Ordering::SeqCst),
            u64::from_ne_bytes([1; 8])
        );
    });
}

/// T62 (b): two nodes pass a number to and fro in one mapped page; each waits for the other's store by loads alone.
#[test]
fn t62_a_page_mapped_by_two_nodes_lets_both_get_on() {
    const ROUNDS: u64 = 40;
    both(|delivery| {
        let rig = Rig::new();
        let files = rig.everywhere("f");
        files[0].set_len(PAGE as u64).unwrap();
        thread::scope(|scope| {
            for (node, file) in files.iter().enumerate() {
                scope.spawn(move || {
                    let map = map(file, MapAccess::Write, delivery);
                    let number = word(&map, 64);
                    for turn in 0..ROUNDS {
                        let mine = 2 * turn + node as u64;
                        while number.load(Ordering::SeqCst) != mine {
                            thread::yield_now();
                        }
                        number.store(mine + 1, Ordering::SeqCst);
                    }
                });
            }
        });
        same(read(&files[0], 8, 64), (2 * ROUNDS).to_ne_bytes());
    });
}

/// T62 (b): each increments its own word of one page as fast as it can, and neither starves: the minimum hold lets the
/// instruction run that a fault was for.
#[test]
fn t62_counters_of_two_nodes_in_one_page_both_advance() {
    const STEPS: u64 = 200;
    both(|delivery| {
        let rig = Rig::new();
        let files = rig.everywhere("f");
        files[0].set_len(PAGE as u64).unwrap();
        thread::scope(|scope| {
            for (node, file) in files.iter().enumerate() {
                scope.spawn(move || {
                    let map = map(file, MapAccess::Write, delivery);
                    let (mine, theirs) = (word(&map, 8 * node), word(&map, 8 - 8 * node));
                    // Both go on until both are done: the faster must not end the contest.
                    while mine.load(Ordering::SeqCst) < STEPS
                        || theirs.load(Ordering::SeqCst) < STEPS
                    {
                        mine.fetch_add(1, Ordering::SeqCst);
                    }
                });
            }
        });
    });
}

/// T62 (b): with a lock of the program's around each increment, the sum is exact.
#[test]
fn t62_increments_under_a_lock_are_all_counted() {
    const EACH: u64 = 40;
    both(|delivery| {
        let rig = Rig::new();
        let files = rig.everywhere("f");
        files[0].set_len(PAGE as u64).unwrap();
        let lock = Mutex::new(());
        thread::scope(|scope| {
            for thread in 0..4 {
                let (file, lock) = (&files[thread % 2], &lock);
                scope.spawn(move || {
                    let map = map(file, MapAccess::Write, delivery);
                    let counter = word(&map, 0);
                    for _ in 0..EACH {
                        let _locked = lock.lock().unwrap();
                        // Two accesses, which anything may come between.
                        let now = counter.load(Ordering::SeqCst);
                        counter.store(now + 1, Ordering::SeqCst);
                    }
                });
            }
        });
        same(read(&files[0], 8, 0), (4 * EACH).to_ne_bytes());
    });
}

/// Beyond the end a page is refused; once another node has made the file longer, and is done with that, it is not.
#[test]
fn a_mapped_file_that_another_node_makes_longer_can_be_touched_at_once() {
    both(|delivery| {
        let rig = Rig::new();
        let files = rig.everywhere("f");
        files[0].set_len(1).unwrap();
        let how = MapOptions::new()
            .access(MapAccess::Write)
            .delivery(delivery);
        let pages = 9;
        let mapped = files[0].map(0..pages * PAGE as u64, &how).unwrap();
        for page in 1..pages as usize {
            let at = page * PAGE;
            assert!(!readable(mapped.as_ptr().wrapping_add(at)), "page {page}");
            assert_eq!(mapped.read(at, &mut [0; 8]).unwrap(), 0);
            files[1].write_at(&filled(PAGE, 3), at as u64).unwrap();
            let seen = word(&mapped, at).load(Ordering::SeqCst);
            assert_eq!(seen.to_ne_bytes(), [3; 8]);
            word(&mapped, at).store(4, Ordering::SeqCst);
            same(read(&files[1], 8, at as u64), 4u64.to_ne_bytes());
        }
        files[1].set_len(1).unwrap();
        assert!(!readable(mapped.as_ptr().wrapping_add(PAGE)));
    });
}

fn report(rig: &Rig, node: usize) -> Report {
    let reports = rig.nodes[node].glocks().unwrap().report();
    // Of two inodes, the directory and the file, the file is the one in use.
    let used = |report: &Report| report.counts.queued;
    reports.into_iter().max_by_key(used).unwrap()
}

#[test]
fn pinned_memory_keeps_the_glock_and_is_told_as_the_reason() {
    both(|delivery| {
        let rig = Rig::new();
        let files = rig.everywhere("f");
        files[0].set_len(2 * PAGE as u64).unwrap();
        let mapped = map(&files[0], MapAccess::Write, delivery);
        let pinned = mapped.pin(0..PAGE, true).unwrap();
        let seen = AtomicU64::new(0);
        thread::scope(|scope| {
            let (other, seen) = (&files[1], &seen);
            scope.spawn(move || {
                let number = read(other, 8, 0);
                seen.store(
                    u64::from_ne_bytes(number.try_into().unwrap()),
                    Ordering::SeqCst,
                );
            });
            until(|| report(&rig, 0).demote.is_some());
            let told = report(&rig, 0);
            assert_eq!((told.pins, told.mode), (1, Mode::Exclusive));
            assert!(told.to_string().contains('P'), "{told}");
            // This node goes on with it, whatever is wanted.
            same(read(&files[0], 8, 0), [0; 8]);
            files[0].write_at(&[1; 8], PAGE as u64).unwrap();
            word(&mapped, 0).store(5, Ordering::SeqCst);
            assert_eq!(seen.load(Ordering::SeqCst), 0);
            drop(pinned);
        });
        assert_eq!(seen.load(Ordering::SeqCst), 5);
    });
}

#[test]
fn memory_pinned_for_reading_is_readable_everywhere() {
    both(|delivery| {
        let rig = Rig::new();
        let files = rig.everywhere("f");
        files[0].write_at(&filled(PAGE, 4), 0).unwrap();
        let maps = [0, 1].map(|node| map(&files[node], MapAccess::Read, delivery));
        let pinned: Vec<_> = maps
            .iter()
            .map(|map| map.pin(0..PAGE, false).unwrap())
            .collect();
        same(read(&files[1], PAGE, 0), filled(PAGE, 4));
        // The thread that pinned it would wait for itself.
        let refused = files[0].write_at(b"x", 0).unwrap_err();
        assert_eq!(
            (refused.kind(), refused.errno()),
            (ErrorKind::Pinned, Errno::EBUSY)
        );
        drop(pinned);
        files[0].write_at(b"x", 0).unwrap();
        assert_eq!(
            word(&maps[1], 0).load(Ordering::SeqCst).to_ne_bytes()[0],
            b'x'
        );
    });
}

#[test]
fn stores_are_learnt_of_by_faults_where_there_are_other_nodes() {
    watched(|| {
        let rig = Rig::with_hold(1, Duration::ZERO);
        let file = rig.open(0, "f");
        file.write_at(&filled(PAGE, 1), 0).unwrap();
        let how = MapOptions::new().access(MapAccess::Write);
        let map = file.map(0..PAGE as u64, &how).unwrap();
        assert_eq!(map.tracking(), Tracking::Sync);
        let refused = file.map(0..PAGE as u64, &how.tracking(Tracking::Async));
        assert_eq!(refused.unwrap_err().errno(), Errno::EOPNOTSUPP);
    });
}
