//! Private mappings: the file's bytes until they are stored to, the program's own after that.

use pinfold::{Advice, MapAccess};

use super::rig::{PAGE, bytes, bytes_mut, everywhere, load, pattern, store};

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
