//! Mapped memory as the buffer of a call, on the same file too.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use pinfold::{File, IoOptions, IovCursor, MapAccess, Mapping, OpenOptions};

use super::rig::{LARGE, PAGE, Rig, bytes, bytes_mut, everywhere, pattern};

fn all_of(file: &File) -> Vec<u8> {
    let mut all = vec![0; file.len() as usize];
    assert_eq!(file.read_at(&mut all, 0).unwrap(), all.len());
    all
}

#[test]
fn t11_a_write_from_its_own_mapping_of_the_same_page_changes_nothing() {
    everywhere(|rig| {
        let file = rig.file("a", 4 * PAGE, 1);
        let map = rig.map(&file, MapAccess::Read);
        assert_eq!(file.write_at(bytes(&map, 0, PAGE), 0).unwrap(), PAGE);
        assert!(all_of(&file) == pattern(4 * PAGE, 1));
    });
}

#[test]
fn t12_a_write_from_its_own_mapping_may_overlap_itself() {
    everywhere(|rig| {
        let file = rig.file("a", 8 * PAGE, 1);
        let map = rig.map(&file, MapAccess::Read);
        let written = file.write_at(bytes(&map, 100, 2 * PAGE), 0).unwrap();
        assert_eq!(written, 2 * PAGE);
        let old = pattern(8 * PAGE, 1);
        let new = all_of(&file);
        // The source is ahead of the target all the way: what is read has not been overwritten yet.
        assert!(new[..2 * PAGE] == old[100..2 * PAGE + 100]);
        assert!(new[2 * PAGE..] == old[2 * PAGE..]);
    });
}

#[test]
fn a_large_write_from_its_own_mapping_at_an_odd_place_is_whole() {
    everywhere(|rig| {
        let len = if rig.volume.statistics().pages_max * 4096 == LARGE {
            32 << 20
        } else {
            4 << 20
        };
        let file = rig.file("a", len, 1);
        let map = rig.map(&file, MapAccess::Read);
        // Appended: source and target do not overlap.
        let written = file.write_at(bytes(&map, 1, len - 1), len as u64).unwrap();
        assert_eq!(written, len - 1);
        let old = pattern(len, 1);
        let new = all_of(&file);
        assert!(new[..len] == old && new[len..] == old[1..]);
    });
}

#[test]
fn t23_segments_in_more_pages_than_there_is_memory_go_in_full() {
    everywhere(|rig| {
        let file = rig.file("a", 256 * PAGE, 1);
        let target = rig.open("b");
        let map = rig.map(&file, MapAccess::Read);
        let segments: Vec<_> = (0..64)
            .map(|i| std::io::IoSlice::new(bytes(&map, (255 - i * 4) * PAGE + i, 100)))
            .collect();
        assert_eq!(target.write_vectored_at(&segments, 0).unwrap(), 6400);
        let old = pattern(256 * PAGE, 1);
        let expected: Vec<u8> = (0..64)
            .flat_map(|i| old[(255 - i * 4) * PAGE + i..][..100].to_vec())
            .collect();
        assert!(all_of(&target) == expected);
    });
}

#[test]
fn a_read_into_a_mapping_of_the_same_file_is_a_store() {
    everywhere(|rig| {
        let file = rig.file("a", 64 * PAGE, 1);
        let map = rig.map(&file, MapAccess::Write);
        let target = bytes_mut(&map, 10 * PAGE + 7, 20 * PAGE);
        assert_eq!(file.read_at(target, 40 * PAGE as u64).unwrap(), 20 * PAGE);
        let old = pattern(64 * PAGE, 1);
        let new = all_of(&file);
        assert!(new[10 * PAGE + 7..30 * PAGE + 7] == old[40 * PAGE..60 * PAGE]);
        assert!(new[..10 * PAGE + 7] == old[..10 * PAGE + 7]);
        map.flush(0..map.len()).unwrap();
        assert!(std::fs::read(rig.dir.path().join("a")).unwrap() == new);
    });
}

#[test]
fn a_read_into_a_mapping_for_reading_is_a_bad_buffer() {
    everywhere(|rig| {
        let file = rig.file("a", 8 * PAGE, 1);
        let map = rig.map(&file, MapAccess::Read);
        let target = bytes_mut(&map, 0, PAGE);
        let error = file.read_at(target, 4 * PAGE as u64).unwrap_err();
        assert_eq!(error.errno(), pinfold::Errno::EFAULT);
        assert!(all_of(&file) == pattern(8 * PAGE, 1));
    });
}

#[test]
fn t33_two_files_each_written_from_the_others_mapping_both_progress() {
    everywhere(|rig| {
        let (a, b) = (rig.file("a", 128 * PAGE, 1), rig.file("b", 128 * PAGE, 2));
        let maps = [rig.map(&b, MapAccess::Read), rig.map(&a, MapAccess::Read)];
        let stop = AtomicBool::new(false);
        let (first, second) = (AtomicU64::new(0), AtomicU64::new(0));
        let run = |file: &File, map: &Mapping, rounds: &AtomicU64| {
            while !stop.load(Ordering::Relaxed) {
                let at = (rounds.load(Ordering::Relaxed) % 100) as usize * PAGE;
                let written = file.write_at(bytes(map, at, 20 * PAGE), at as u64);
                assert_eq!(written.unwrap(), 20 * PAGE);
                rounds.fetch_add(1, Ordering::Relaxed);
            }
        };
        thread::scope(|scope| {
            scope.spawn(|| run(&a, &maps[0], &first));
            scope.spawn(|| run(&b, &maps[1], &second));
            thread::sleep(std::time::Duration::from_millis(500));
            // Both get somewhere however late they were scheduled; the watchdog ends one that does not.
            while [&first, &second]
                .map(|rounds| rounds.load(Ordering::Relaxed))
                .contains(&0)
            {
                thread::sleep(std::time::Duration::from_millis(1));
            }
            stop.store(true, Ordering::Relaxed);
        });
    });
}

#[test]
fn t30_t32_direct_transfers_take_mapped_memory() {
    everywhere(|rig: &Rig| {
        let len = 600 * PAGE;
        let file = rig.file("a", len, 1);
        let options = OpenOptions::new().read(true).write(true).direct(true);
        let direct = rig.volume.open("a", &options).unwrap();
        let map = rig.map(&file, MapAccess::Write);
        let move_all = |cursor: &mut IovCursor<'_>, at: usize, write: bool| {
            let moved = if write {
                direct.write_cursor(cursor, at as u64, &IoOptions::default())
            } else {
                direct.read_cursor(cursor, at as u64, &IoOptions::default())
            };
            assert!(moved.stop.is_none(), "{:?}", moved.stop);
            moved.done as usize
        };
        // The same bytes onto themselves, then others.
        let mut cursor = IovCursor::from_slice(bytes(&map, 0, 4 * PAGE));
        assert_eq!(move_all(&mut cursor, 0, true), 4 * PAGE);
        let mut cursor = IovCursor::from_slice(bytes(&map, 4 * PAGE, 300 * PAGE));
        assert_eq!(move_all(&mut cursor, 290 * PAGE, true), 300 * PAGE);
        let mut expected = pattern(len, 1);
        expected.copy_within(4 * PAGE..304 * PAGE, 290 * PAGE);
        // What is written past the cache in pieces may be read again by a later piece.
        let overlap = 290 * PAGE..304 * PAGE;
        let new = all_of(&file);
        assert!(new[..overlap.start] == expected[..overlap.start]);
        let stored = std::fs::read(rig.dir.path().join("a")).unwrap();
        assert!(new == stored, "direct, buffered and mapped agree");
        let mut back = vec![0; len];
        assert_eq!(map.read(0, &mut back).unwrap(), len);
        assert!(back == new);
        let mut cursor = IovCursor::from_mut_slice(bytes_mut(&map, 8 * PAGE, 300 * PAGE));
        assert_eq!(move_all(&mut cursor, 0, false), 300 * PAGE);
        assert!(all_of(&file)[308 * PAGE..] == new[308 * PAGE..]);
        assert!(all_of(&file)[..8 * PAGE] == new[..8 * PAGE]);
        assert!(all_of(&file)[8 * PAGE..12 * PAGE] == new[..4 * PAGE]);
    });
}

#[test]
fn a_private_mapping_is_a_buffer_with_its_own_bytes() {
    everywhere(|rig| {
        let file = rig.file("a", 4 * PAGE, 1);
        let map = rig.map(&file, MapAccess::Private);
        // The first page is the program's own by now, the second the file's still.
        super::rig::store(&map, 5, b'!');
        let mut own = pattern(4 * PAGE, 1);
        own[5] = b'!';
        let copy = rig.open("copy");
        assert_eq!(
            copy.write_at(bytes(&map, 0, 2 * PAGE), 0).unwrap(),
            2 * PAGE
        );
        assert!(all_of(&copy) == own[..2 * PAGE]);
        let other = rig.file("b", 4 * PAGE, 2);
        let target = bytes_mut(&map, PAGE - 10, PAGE + 20);
        assert_eq!(other.read_at(target, 7).unwrap(), PAGE + 20);
        own[PAGE - 10..2 * PAGE + 10].copy_from_slice(&pattern(4 * PAGE, 2)[7..PAGE + 27]);
        assert!(bytes(&map, 0, 4 * PAGE) == own);
        assert!(
            all_of(&file) == pattern(4 * PAGE, 1),
            "stores stay with the mapping"
        );
    });
}
