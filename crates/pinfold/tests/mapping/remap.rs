//! Mappings that become longer and shorter: as the kernel's do, whatever else goes on.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use pinfold::{Delivery, Errno, MapAccess, MapOptions, Mapping, Tracking};

use super::limits::in_a_child;
use super::rig::{
    Kernel, LARGE, PAGE, Rig, SMALL, bytes, everywhere, load, pattern, readable, store, watched,
};

/// A page behind a mapping that nobody may touch: who becomes longer has to move.
struct Blocker(*mut libc::c_void);

impl Blocker {
    /// Takes the page behind `end`, unless somebody has it already.
    fn behind(end: *const u8) -> Option<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        let end = end.cast_mut().cast();
        // SAFETY: replaces nothing.
        let at = unsafe { libc::mmap(end, PAGE, libc::PROT_NONE, flags, -1, 0) };
        (at == end).then_some(Self(at))
    }
}

impl Drop for Blocker {
    fn drop(&mut self) {
        // SAFETY: mapped above, used by nobody.
        unsafe { libc::munmap(self.0, PAGE) };
    }
}

fn end_of(map: &Mapping) -> *const u8 {
    map.as_ptr().wrapping_add(map.len().next_multiple_of(PAGE))
}

/// Numbers that look random, the same in every run.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 33) as usize % end
    }
}

/// Does the same to a mapping of ours and to one of the kernel's, and compares what they show.
fn as_the_kernel(rig: &Rig, access: MapAccess, tracking: Tracking, seed: u64) {
    const MOST: usize = 40;
    let mut numbers = Numbers(seed);
    let mut size = 12 * PAGE + 700;
    let file = rig.open("a");
    file.set_len(0).unwrap();
    let file = rig.file("a", size, 3);
    let options = MapOptions::new()
        .access(access)
        .tracking(tracking)
        .delivery(rig.delivery);
    let mut ours = file.map(0..10 * PAGE as u64, &options).unwrap();
    let mut theirs = Kernel::new(rig, &pattern(size, 3), 10, access);
    let mut blocker = None;
    for round in 0..120 {
        match numbers.below(8) {
            0 | 1 => {
                let pages = numbers.below(MOST) + 1;
                let (addr, len) = (ours.as_ptr(), ours.len());
                let may_move = numbers.below(4) > 0;
                match ours.remap(pages * PAGE, may_move) {
                    Ok(()) => theirs.remap(pages),
                    Err(error) => {
                        assert!(!may_move, "{error}");
                        assert_eq!(error.errno(), Errno::ENOMEM);
                        assert_eq!((ours.as_ptr(), ours.len()), (addr, len));
                    }
                }
                assert_eq!(ours.len(), theirs.pages * PAGE);
                if !may_move {
                    assert_eq!(ours.as_ptr(), addr);
                }
                blocker = None;
                if numbers.below(2) == 0 {
                    blocker = Blocker::behind(end_of(&ours));
                }
            }
            2 => {
                size = numbers.below(MOST * PAGE) + 1;
                file.set_len(size as u64).unwrap();
                theirs.file.set_len(size as u64).unwrap();
            }
            3 => file.drop_cache().unwrap(),
            4 => {
                let at = numbers.below(size);
                let bytes = pattern((size - at).min(3000), round);
                file.write_at(&bytes, at as u64).unwrap();
                std::os::unix::fs::FileExt::write_all_at(&theirs.file, &bytes, at as u64).unwrap();
            }
            _ => {
                for _ in 0..numbers.below(20) {
                    let at = numbers.below(size.min(ours.len()));
                    store(&ours, at, round);
                    // SAFETY: inside the mapping and the file.
                    unsafe { theirs.at(at).write_volatile(round) };
                }
            }
        }
        for at in (0..size.min(ours.len())).step_by(97) {
            // SAFETY: as above.
            let expected = unsafe { theirs.at(at).read_volatile() };
            assert_eq!(
                load(&ours, at),
                expected,
                "{access:?}, round {round}, byte {at}"
            );
        }
    }
    drop(blocker);
    drop(ours);
    let mut back = vec![0; size];
    assert_eq!(file.read_at(&mut back, 0).unwrap(), size);
    assert!(back == std::fs::read(rig.dir.path().join("kernel")).unwrap());
}

#[test]
fn remapping_shows_what_the_kernel_shows() {
    everywhere(|rig| {
        for seed in 0..2 {
            as_the_kernel(rig, MapAccess::Write, Tracking::Sync, seed);
            as_the_kernel(rig, MapAccess::Write, Tracking::Async, seed + 10);
            as_the_kernel(rig, MapAccess::Write, Tracking::Auto, seed + 20);
            as_the_kernel(rig, MapAccess::Private, Tracking::Auto, seed + 30);
        }
    });
}

#[test]
fn a_mapping_that_cannot_stay_moves_only_where_it_may() {
    everywhere(|rig| {
        for access in [MapAccess::Read, MapAccess::Write, MapAccess::Private] {
            let file = rig.file("a", 20 * PAGE, 1);
            let mut map = rig.map_range(&file, 0..4 * PAGE as u64, access);
            let mut expected = pattern(20 * PAGE, 1);
            if access != MapAccess::Read {
                store(&map, PAGE + 5, 0xee);
                expected[PAGE + 5] = 0xee;
            }
            // Its own, or somebody else's who was there before.
            let _blocker = Blocker::behind(end_of(&map));
            let before = map.as_ptr();
            let error = map.remap(20 * PAGE, false).unwrap_err();
            assert_eq!(error.errno(), Errno::ENOMEM, "{error}");
            assert_eq!((map.as_ptr(), map.len()), (before, 4 * PAGE));
            assert_eq!(load(&map, PAGE + 5), expected[PAGE + 5]);
            map.remap(20 * PAGE, true).unwrap();
            assert_ne!(map.as_ptr(), before);
            for page in (0..20).rev() {
                let at = page * PAGE + 5;
                assert_eq!(load(&map, at), expected[at], "{access:?}, page {page}");
            }
            let mut back = vec![0; 20 * PAGE];
            file.read_at(&mut back, 0).unwrap();
            let own = access == MapAccess::Private;
            assert_eq!(back[PAGE + 5] == 0xee, access == MapAccess::Write);
            assert!(own || back == expected);
            // Calls find it at its new place.
            let target = rig.open("b");
            let mapped = bytes(&map, 0, 20 * PAGE);
            assert_eq!(target.write_at(mapped, 0).unwrap(), 20 * PAGE);
            target.read_at(&mut back, 0).unwrap();
            assert!(back == expected);
        }
    });
}

#[test]
fn what_was_moved_from_is_nobody_s() {
    watched("what was moved from", || {
        let rig = Rig::new(LARGE, Delivery::Handler);
        let file = rig.file("a", 20 * PAGE, 1);
        let mut map = rig.map_range(&file, 0..4 * PAGE as u64, MapAccess::Write);
        let _blocker = Blocker::behind(end_of(&map));
        let before = map.as_ptr();
        let _ = load(&map, 0);
        assert!(readable(before));
        map.remap(20 * PAGE, true).unwrap();
        let taken = Blocker::behind(before);
        assert!(taken.is_some() || !readable(before), "still mapped");
    });
}

#[test]
fn a_mapping_grows_where_it_is_when_there_is_room() {
    everywhere(|rig| {
        let file = rig.file("a", 64 * PAGE, 1);
        let expected = pattern(64 * PAGE, 1);
        for access in [MapAccess::Write, MapAccess::Private] {
            // Other tests map as well, and may take the room.
            let grown = (0..100).any(|_| {
                let mut map = rig.map(&file, access);
                let addr = map.as_ptr();
                map.remap(10 * PAGE, false).unwrap();
                assert_eq!(load(&map, 9 * PAGE), expected[9 * PAGE]);
                if map.remap(50 * PAGE + 1, false).is_err() {
                    return false;
                }
                assert_eq!((map.as_ptr(), map.len()), (addr, 50 * PAGE + 1));
                for page in 0..50 {
                    assert_eq!(load(&map, page * PAGE), expected[page * PAGE]);
                }
                map.remap(PAGE, false).unwrap();
                true
            });
            assert!(grown, "never, in a hundred times");
        }
    });
}

#[test]
fn what_cannot_be_leaves_the_mapping_as_it_was() {
    everywhere(|rig| {
        for access in [MapAccess::Write, MapAccess::Private] {
            let file = rig.file("a", 20 * PAGE, 1);
            let expected = pattern(20 * PAGE, 1);
            let mut map = rig.map_range(&file, 0..10 * PAGE as u64, access);
            store(&map, 7, 0xee);
            let before = map.as_ptr();
            let mut refused = |len: usize, may_move: bool, errno: &[Errno]| {
                let error = map.remap(len, may_move).unwrap_err();
                assert!(errno.contains(&error.errno()), "{len}: {error}");
                assert_eq!((map.as_ptr(), map.len()), (before, 10 * PAGE));
                assert_eq!(load(&map, 7), 0xee);
                assert_eq!(load(&map, 9 * PAGE + 7), expected[9 * PAGE + 7]);
            };
            refused(0, true, &[Errno::EINVAL]);
            refused(usize::MAX, true, &[Errno::EOVERFLOW]);
            let too_large = [Errno::ENOMEM, Errno::EFBIG, Errno::EOVERFLOW];
            refused(1 << 60, true, &too_large);
            map.unmap(3 * PAGE..4 * PAGE).unwrap();
            let error = map.remap(12 * PAGE, true).unwrap_err();
            assert_eq!(error.errno(), Errno::EFAULT, "{error}");
            assert_eq!((map.as_ptr(), map.len()), (before, 10 * PAGE));
            assert_eq!(load(&map, 7), 0xee);
            assert_eq!(load(&map, 9 * PAGE), expected[9 * PAGE]);
            // Cut off before the hole it is whole.
            map.remap(3 * PAGE, false).unwrap();
            map.remap(12 * PAGE, true).unwrap();
            assert_eq!(load(&map, 7), 0xee);
            assert_eq!(load(&map, 11 * PAGE), expected[11 * PAGE]);
        }
    });
}

#[test]
fn a_mapping_that_grows_past_what_is_stored_is_told_of_stores_from_then_on() {
    everywhere(|rig| {
        let file = rig.file("a", 8 * PAGE, 1);
        let mut map = rig.map(&file, MapAccess::Write);
        if map.tracking() == Tracking::Sync {
            return;
        }
        store(&map, 5 * PAGE, 0xee);
        file.set_len(16 * PAGE as u64).unwrap();
        let error = map.remap(16 * PAGE, false).unwrap_err();
        assert_eq!(error.errno(), Errno::ENOMEM, "{error}");
        assert_eq!(map.tracking(), Tracking::Async);
        map.remap(16 * PAGE, true).unwrap();
        assert_eq!(map.tracking(), Tracking::Sync);
        store(&map, 15 * PAGE, 0xdd);
        map.flush(0..map.len()).unwrap();
        let stored = std::fs::read(rig.dir.path().join("a")).unwrap();
        assert_eq!((stored[5 * PAGE], stored[15 * PAGE]), (0xee, 0xdd));
    });
}

#[test]
fn moving_a_tracked_mapping_makes_dirty_what_was_stored_to_and_nothing_else() {
    watched("moving a tracked mapping", || {
        for delivery in [Delivery::Handler, Delivery::Inline] {
            let rig = Rig::new(LARGE, delivery);
            let file = rig.file("a", 200 * PAGE, 1);
            let options = MapOptions::new()
                .access(MapAccess::Write)
                .tracking(Tracking::Async)
                .delivery(delivery);
            let Ok(mut map) = file.map(0..100 * PAGE as u64, &options) else {
                return;
            };
            let _blocker = Blocker::behind(end_of(&map));
            for page in 0..100 {
                let _ = load(&map, page * PAGE);
            }
            for page in [3, 4, 50] {
                store(&map, page * PAGE, 0xee);
            }
            let before = rig.volume.statistics().cache.pages_written;
            map.remap(200 * PAGE, true).unwrap();
            file.sync_all().unwrap();
            let written = rig.volume.statistics().cache.pages_written - before;
            assert_eq!(written, 3);
            let stored = std::fs::read(rig.dir.path().join("a")).unwrap();
            assert_eq!([3, 4, 50].map(|page| stored[page * PAGE]), [0xee; 3]);
        }
    });
}

/// Stores a byte as the kernel does on a program's behalf: where nothing is mapped it says so.
fn put(addr: usize, byte: u8) -> bool {
    let local = libc::iovec {
        iov_base: (&raw const byte).cast_mut().cast(),
        iov_len: 1,
    };
    let remote = libc::iovec {
        iov_base: std::ptr::with_exposed_provenance_mut(addr),
        iov_len: 1,
    };
    let me = std::process::id().cast_signed();
    // SAFETY: the kernel reads a byte of ours and writes one there, or answers EFAULT.
    unsafe { libc::process_vm_writev(me, &raw const local, 1, &raw const remote, 1, 0) == 1 }
}

/// One thread stores to every page once, while the mapping moves; what went through is stored.
fn single_stores_race(rig: &Rig) {
    const PAGES: usize = 600;
    let file = rig.file("a", PAGES * PAGE, 1);
    let options = MapOptions::new()
        .access(MapAccess::Write)
        .tracking(Tracking::Async)
        .delivery(rig.delivery);
    let Ok(mut map) = file.map(0..(PAGES * PAGE) as u64, &options) else {
        return;
    };
    for round in 1..=20u8 {
        // One page more, and somebody in the way.
        let _blocker = Blocker::behind(end_of(&map));
        for page in 0..PAGES {
            let _ = load(&map, page * PAGE);
        }
        let addr = map.as_ptr().expose_provenance();
        let (at, moved) = (AtomicUsize::new(0), AtomicBool::new(false));
        let stored: Vec<bool> = thread::scope(|scope| {
            let storing = scope.spawn(|| {
                let page = |page: usize| {
                    at.store(page, Ordering::Relaxed);
                    // Those addresses may be anybody's then.
                    !moved.load(Ordering::Acquire) && put(addr + page * PAGE + 77, round)
                };
                (0..PAGES).map(page).collect()
            });
            while at.load(Ordering::Relaxed) < usize::from(round) * 10 {
                thread::yield_now();
            }
            map.remap(map.len() + PAGE, true).unwrap();
            moved.store(true, Ordering::Release);
            storing.join().unwrap()
        });
        file.sync_all().unwrap();
        file.drop_cache().unwrap();
        let bytes = std::fs::read(rig.dir.path().join("a")).unwrap();
        for page in (0..PAGES).filter(|&page| stored[page]) {
            assert_eq!(bytes[page * PAGE + 77], round, "page {page}");
        }
    }
}

/// Threads store through a mapping that moves and changes its length all the time; each has a page of its own, at the
/// mapping's beginning, and knows what it stored last.
fn stores_race(rig: &Rig, tracking: Tracking) {
    const THREADS: usize = 3;
    const ROUNDS: usize = 24;
    let file = rig.file("a", 64 * PAGE, 1);
    let options = MapOptions::new()
        .access(MapAccess::Write)
        .tracking(tracking)
        .delivery(rig.delivery);
    let Ok(mut map) = file.map(0..(THREADS * PAGE) as u64, &options) else {
        assert_eq!(tracking, Tracking::Async, "possible everywhere");
        return;
    };
    let (addr, stop) = (
        AtomicUsize::new(map.as_ptr().expose_provenance()),
        AtomicBool::new(false),
    );
    // A stray store must not reach what comes to lie at an address that was ours.
    let mut left = Vec::new();
    let last = thread::scope(|scope| {
        let storing: Vec<_> = (0..THREADS)
            .map(|thread| {
                let (addr, stop) = (&addr, &stop);
                scope.spawn(move || {
                    let (mut last, mut next) = (None, 1u8);
                    while !stop.load(Ordering::Relaxed) {
                        let at = addr.load(Ordering::Acquire) + thread * PAGE + 77;
                        if put(at, next) {
                            last = Some(next);
                            next = next.wrapping_add(1);
                        }
                    }
                    last
                })
            })
            .collect();
        for round in 0..ROUNDS {
            let pages = THREADS + (round * 7) % 50;
            let old = map.as_ptr();
            let len = map.len();
            let blocker = (round % 3 > 0).then(|| Blocker::behind(end_of(&map)));
            map.remap(pages * PAGE, true).unwrap();
            drop(blocker);
            if map.as_ptr() != old {
                addr.store(map.as_ptr().expose_provenance(), Ordering::Release);
                left.extend(
                    (0..len / PAGE).map(|page| Blocker::behind(old.wrapping_add(page * PAGE))),
                );
            }
            for thread in 0..THREADS {
                // The kernel's stores need the page to be there where faults are served inline.
                store(&map, thread * PAGE, 1);
            }
            match round % 4 {
                0 => file.sync_all().unwrap(),
                1 => file.drop_cache().unwrap(),
                _ => {}
            }
        }
        stop.store(true, Ordering::Relaxed);
        storing
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect::<Vec<_>>()
    });
    drop(map);
    drop(left);
    file.sync_all().unwrap();
    let stored = std::fs::read(rig.dir.path().join("a")).unwrap();
    let before = pattern(64 * PAGE, 1);
    for (thread, last) in last.into_iter().enumerate() {
        let at = thread * PAGE + 77;
        assert_eq!(
            stored[at],
            last.unwrap_or(before[at]),
            "{tracking:?}, thread {thread}"
        );
    }
}

/// What a process of its own does for the tests below: a stray store there meets no other test.
pub fn stores(delivery: Delivery) {
    stores_race(&Rig::new(SMALL, delivery), Tracking::Sync);
    stores_race(&Rig::new(SMALL, delivery), Tracking::Async);
}

pub fn single_stores(delivery: Delivery) {
    single_stores_race(&Rig::new(LARGE, delivery));
}

#[test]
fn stores_that_went_through_are_there_after_any_number_of_moves() {
    in_a_child("stores while it moves");
}

#[test]
fn no_store_is_lost_between_the_last_look_for_stores_and_the_move() {
    in_a_child("single stores while it moves");
}
