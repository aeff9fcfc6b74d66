//! Several mappings of one file whose first stores are found by looking for them: each knows what it has shown.

use pinfold::{Advice, File, MapAccess, MapOptions, Mapping, Tracking};

use super::rig::{PAGE, Rig, everywhere, load, pattern, store};

const PAGES: usize = 24;

/// Maps all of a file; `None` where stores cannot be looked for.
fn map(rig: &Rig, file: &File) -> Option<Mapping> {
    let options = MapOptions::new()
        .access(MapAccess::Write)
        .delivery(rig.delivery)
        .tracking(Tracking::Async);
    match file.map(0..file.len(), &options) {
        Ok(map) => Some(map),
        Err(refused) => {
            eprintln!("skipped: {refused}");
            None
        }
    }
}

fn load_all(map: &Mapping) {
    let expected = pattern(PAGES * PAGE, 1);
    for page in 0..map.len() / PAGE {
        assert_eq!(load(map, page * PAGE), expected[page * PAGE], "page {page}");
    }
}

/// Takes entries away behind the library's back.
fn drop_entries(map: &Mapping, page: usize, pages: usize) {
    let addr = map.as_mut_ptr().wrapping_add(page * PAGE);
    // SAFETY: inside the mapping; shared, so what was stored stays in its memory.
    let outcome = unsafe { libc::madvise(addr.cast(), pages * PAGE, libc::MADV_DONTNEED) };
    assert_eq!(outcome, 0);
}

fn in_the_store(rig: &Rig, page: usize) -> u8 {
    std::fs::read(rig.dir.path().join("a")).unwrap()[page * PAGE]
}

#[test]
fn what_several_mappings_only_load_is_never_written() {
    everywhere(|rig| {
        let file = rig.file("a", PAGES * PAGE, 1);
        let (Some(first), Some(second)) = (map(rig, &file), map(rig, &file)) else {
            return;
        };
        let before = rig.volume.statistics().cache;
        load_all(&first);
        // Pages that it has not shown lie between those that it has.
        second.advise(Advice::Random, 0..second.len()).unwrap();
        for page in [2, PAGES - 2] {
            let _ = load(&second, page * PAGE);
        }
        file.sync_all().unwrap();
        load_all(&second);
        // Pages that come anew, in the other order.
        file.drop_cache().unwrap();
        load_all(&second);
        load_all(&first);
        file.sync_all().unwrap();
        drop(first);
        load_all(&second);
        file.sync_all().unwrap();
        let after = rig.volume.statistics().cache;
        assert_eq!(after.stores_found, before.stores_found);
        assert_eq!(after.pages_written, before.pages_written);
    });
}

#[test]
fn a_store_is_found_whose_entry_the_program_has_dropped_from_either_mapping() {
    everywhere(|rig| {
        let file = rig.file("a", PAGES * PAGE, 1);
        let (Some(first), Some(second)) = (map(rig, &file), map(rig, &file)) else {
            return;
        };
        load_all(&first);
        load_all(&second);
        let mut byte = 0;
        for (stores, other) in [(&first, &second), (&second, &first)] {
            for by_advice in [false, true] {
                byte += 1;
                let page = usize::from(byte);
                // With an entry that the store passes through without a fault.
                let _ = load(stores, page * PAGE);
                store(stores, page * PAGE, byte);
                if by_advice {
                    stores.advise(Advice::DontNeed, 0..stores.len()).unwrap();
                } else {
                    drop_entries(stores, 0, PAGES);
                }
                // As a neighbour, by its own fault, in the other one.
                let _ = load(stores, (page - 1) * PAGE);
                assert_eq!(load(stores, page * PAGE), byte);
                drop_entries(other, 0, PAGES);
                assert_eq!(load(other, page * PAGE), byte);
                file.sync_all().unwrap();
                assert_eq!(in_the_store(rig, page), byte);
            }
        }
    });
}

#[test]
fn a_mapping_that_became_shorter_and_longer_again_has_shown_nothing_there() {
    everywhere(|rig| {
        let file = rig.file("a", PAGES * PAGE, 1);
        let (Some(mut first), Some(second)) = (map(rig, &file), map(rig, &file)) else {
            return;
        };
        load_all(&first);
        load_all(&second);
        let before = rig.volume.statistics().cache;
        let len = first.len();
        first.remap(len / 2, false).unwrap();
        file.sync_all().unwrap();
        // In its place, if nobody else has come there.
        if first.remap(len, false).is_ok() {
            load_all(&first);
        }
        file.sync_all().unwrap();
        let after = rig.volume.statistics().cache;
        assert_eq!(after.stores_found, before.stores_found);
        assert_eq!(after.pages_written, before.pages_written);
        store(&first, PAGE, 9);
        file.sync_all().unwrap();
        assert_eq!(in_the_store(rig, 1), 9);
    });
}
