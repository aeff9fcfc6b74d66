//! Private mappings: the file's bytes until they are stored to, the program's own after that.

use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use pinfold::{Advice, MapAccess};

use super::rig::{Kernel, PAGE, bytes, bytes_mut, everywhere, load, pattern, readable, store};

#[test]
fn stores_stay_with_the_mapping() {
    everywhere(|rig| {
        let len = 100 * PAGE;
        let file = rig.file("a", len, 1);
        let map = rig.map(&file, MapAccess::Private);
        let old = pattern(len, 1);
        for page in (0..100).step_by(3) {
            store(&map, page * PAGE, !old[page * PAGE]);
        }
        for page in 0..100 {
            let expected = if page % 3 == 0 {
                !old[page * PAGE]
            } else {
                old[page * PAGE]
            };
            assert_eq!(load(&map, page * PAGE), expected, "page {page}");
            assert_eq!(load(&map, page * PAGE + 1), old[page * PAGE + 1]);
        }
        let mut back = vec![0; len];
        file.read_at(&mut back, 0).unwrap();
        assert!(back == old);
        file.sync_all().unwrap();
        assert!(std::fs::read(rig.dir.path().join("a")).unwrap() == old);
        // Evicting the file's pages takes nothing of the program's.
        file.drop_cache().unwrap();
        assert_eq!(load(&map, 0), !old[0]);
        map.advise(Advice::DontNeed, 0..PAGE).unwrap();
        assert_eq!(load(&map, 0), old[0], "given up, the file's shows again");
    });
}

#[test]
fn private_copies_are_what_calls_read_and_write() {
    everywhere(|rig| {
        let len = 100 * PAGE;
        let file = rig.file("a", len, 1);
        let target = rig.open("b");
        let map = rig.map(&file, MapAccess::Private);
        let mut mine = pattern(len, 1);
        for at in [5, 3 * PAGE, 50 * PAGE + 7] {
            store(&map, at, 0xee);
            mine[at] = 0xee;
        }
        file.drop_cache().unwrap();
        assert_eq!(target.write_at(bytes(&map, 0, len), 0).unwrap(), len);
        let mut back = vec![0; len];
        target.read_at(&mut back, 0).unwrap();
        assert!(back == mine, "written from a private mapping");
        assert_eq!(map.read(0, &mut back).unwrap(), len);
        assert!(back == mine, "read by the mapping's own call");
        // A read into it is a store to it.
        let other = rig.file("c", 20 * PAGE, 7);
        let read = other.read_at(bytes_mut(&map, 60 * PAGE + 9, 20 * PAGE), 0);
        assert_eq!(read.unwrap(), 20 * PAGE);
        mine[60 * PAGE + 9..80 * PAGE + 9].copy_from_slice(&pattern(20 * PAGE, 7));
        assert_eq!(map.write(90 * PAGE, b"and this").unwrap(), 8);
        mine[90 * PAGE..90 * PAGE + 8].copy_from_slice(b"and this");
        assert_eq!(map.read(0, &mut back).unwrap(), len);
        assert!(back == mine);
        file.read_at(&mut back, 0).unwrap();
        assert!(back == pattern(len, 1), "nothing of it is the file's");
    });
}

#[test]
fn copies_of_pages_beyond_a_new_end_are_gone_and_no_others_as_in_the_kernel() {
    everywhere(|rig| {
        let len = 10 * PAGE;
        let file = rig.file("a", len, 1);
        let ours = rig.map(&file, MapAccess::Private);
        let theirs = Kernel::new(rig, &pattern(len, 1), 10, MapAccess::Private);
        for at in [
            2 * PAGE + 5,
            3 * PAGE + 5,
            3 * PAGE + 2000,
            4 * PAGE,
            7 * PAGE + 9,
        ] {
            store(&ours, at, 0xee);
            // SAFETY: inside the mapping and the file.
            unsafe { theirs.at(at).write_volatile(0xee) };
        }
        for size in [3 * PAGE + 100, len, 3 * PAGE, len] {
            file.set_len(size as u64).unwrap();
            theirs.file.set_len(size as u64).unwrap();
            for page in size.div_ceil(PAGE)..10 {
                assert!(!readable(theirs.at(page * PAGE)));
                assert!(!readable(ours.as_ptr().wrapping_add(page * PAGE)));
                assert_eq!(ours.read(page * PAGE, &mut [0]).unwrap(), 0);
            }
            for at in (0..size).step_by(5) {
                // SAFETY: as above.
                let expected = unsafe { theirs.at(at).read_volatile() };
                assert_eq!(load(&ours, at), expected, "byte {at} of {size}");
            }
        }
        // A hole takes no copies, there as here.
        store(&ours, 8 * PAGE, 0xdd);
        file.punch(8 * PAGE as u64..9 * PAGE as u64).unwrap();
        assert_eq!(load(&ours, 8 * PAGE), 0xdd);
    });
}

/// Tells whether a mapping shows a page at an address: the file's, or a copy.
fn is_present(addr: *const u8) -> bool {
    let pagemap = std::fs::File::open("/proc/self/pagemap").unwrap();
    let mut entry = [0; 8];
    let at = (addr.addr() / PAGE * 8) as u64;
    pagemap.read_exact_at(&mut entry, at).unwrap();
    u64::from_ne_bytes(entry) >> 63 == 1
}

#[test]
fn no_copy_made_while_the_file_is_cut_survives_that() {
    everywhere(|rig| {
        let file = rig.file("a", 8 * PAGE, 1);
        let map = rig.map(&file, MapAccess::Private);
        let (stop, stored) = (AtomicBool::new(false), AtomicUsize::new(0));
        thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    // A call, so that it is no signal where the file has ended.
                    let n = map.write(5 * PAGE, &[0xee]).unwrap();
                    stored.fetch_add(n, Ordering::Relaxed);
                }
            });
            for round in 0..200 {
                let before = stored.load(Ordering::Relaxed);
                while round % 2 == 0 && stored.load(Ordering::Relaxed) == before {
                    thread::yield_now();
                }
                file.set_len(2 * PAGE as u64).unwrap();
                let there = map.as_ptr().wrapping_add(5 * PAGE);
                assert!(!is_present(there), "round {round}");
                file.set_len(8 * PAGE as u64).unwrap();
            }
            stop.store(true, Ordering::Relaxed);
        });
    });
}
