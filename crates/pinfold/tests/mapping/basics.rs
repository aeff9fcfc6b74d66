//! Loads, stores, their way to the file and back.

use std::time::{Duration, Instant};

use pinfold::{Advice, Errno, MapAccess, MapOptions, OpenOptions, Tracking, Volume};

use super::rig::{PAGE, Rig, everywhere, load, pattern, store};

const LEN: usize = 200 * PAGE + 100;
/// Longer than a child takes to let go of something, however busy the machine; a few fit in the watchdog's time.
const CHILD_MAX: Duration = Duration::from_secs(50);

#[test]
fn loads_see_the_files_bytes() {
    everywhere(|rig| {
        let file = rig.file("a", LEN, 1);
        let map = rig.map(&file, MapAccess::Read);
        let expected = pattern(LEN, 1);
        for at in (0..LEN).step_by(511).chain([LEN - 1]) {
            assert_eq!(load(&map, at), expected[at], "byte {at}");
        }
        let faults = rig.volume.statistics().faults;
        assert!(
            faults.faults > 0 && faults.faults_refused == 0,
            "{faults:?}"
        );
        // After the end, up to the page's, are zeros.
        let mut back = vec![1; LEN + 1000];
        assert_eq!(map.read(0, &mut back).unwrap(), LEN);
        assert!(back[..LEN] == expected);
    });
}

#[test]
fn stores_reach_the_file_and_the_store() {
    everywhere(|rig| {
        let file = rig.file("a", LEN, 1);
        let map = rig.map(&file, MapAccess::Write);
        let mut expected = pattern(LEN, 1);
        for at in (7..LEN).step_by(2000) {
            assert_eq!(load(&map, at), expected[at]);
            store(&map, at, !expected[at]);
            expected[at] = !expected[at];
        }
        let mut back = vec![0; LEN];
        assert_eq!(file.read_at(&mut back, 0).unwrap(), LEN);
        assert!(back == expected, "a read sees what was stored");
        map.flush(0..map.len()).unwrap();
        let stored = std::fs::read(rig.dir.path().join("a")).unwrap();
        assert!(stored == expected, "and so does the directory");
        store(&map, 7, 0xaa);
        drop(map);
        drop(file);
        let stored = std::fs::read(rig.dir.path().join("a")).unwrap();
        assert_eq!(stored[7], 0xaa, "the last to go writes back");
    });
}

#[test]
fn writes_are_seen_by_loads() {
    everywhere(|rig| {
        let file = rig.file("a", 40 * PAGE, 1);
        let map = rig.map(&file, MapAccess::Read);
        for page in 0..40 {
            load(&map, page * PAGE);
        }
        for page in 0..40u8 {
            let at = usize::from(page) * PAGE + 5;
            file.write_at(&[page], at as u64).unwrap();
            assert_eq!(load(&map, at), page);
        }
    });
}

#[test]
fn a_mapping_outlives_its_file_and_its_volume() {
    everywhere(|rig| {
        let rig = Rig::new(1 << 20, rig.delivery);
        let file = rig.file("a", 30 * PAGE, 3);
        let map = rig.map(&file, MapAccess::Write);
        let Rig { volume, dir, .. } = rig;
        drop(file);
        volume.close().unwrap();
        let expected = pattern(30 * PAGE, 3);
        for page in 0..30 {
            assert_eq!(load(&map, page * PAGE), expected[page * PAGE]);
        }
        store(&map, PAGE, 0x5a);
        drop(map);
        let stored = std::fs::read(dir.path().join("a")).unwrap();
        assert_eq!(stored[PAGE], 0x5a);
    });
}

#[test]
fn copies_through_the_mapping_give_counts_and_errors() {
    everywhere(|rig| {
        let file = rig.file("a", LEN, 1);
        let map = rig.map(&file, MapAccess::Write);
        assert_eq!(map.write(LEN - 3, b"abcdef").unwrap(), 3);
        let mut back = [0; 10];
        assert_eq!(map.read(LEN - 3, &mut back).unwrap(), 3);
        assert_eq!(&back[..3], b"abc");
        assert_eq!(file.len(), LEN as u64, "a store makes no file longer");
        let error = map.read(map.len() + 1, &mut back).unwrap_err();
        assert_eq!(error.errno(), Errno::EINVAL);
        let readable = rig.map(&file, MapAccess::Read);
        assert_eq!(readable.write(0, b"x").unwrap_err().errno(), Errno::EACCES);
    });
}

#[test]
fn pinned_pages_are_good_for_any_system_call() {
    everywhere(|rig| {
        let file = rig.file("a", 10 * PAGE, 1);
        let map = rig.map(&file, MapAccess::Write);
        let pinned = map.pin(PAGE..4 * PAGE, true).unwrap();
        assert_eq!(pinned.pages(), 3);
        let mut pipe = std::io::pipe().unwrap();
        std::io::Write::write_all(&mut pipe.1, &[9; PAGE]).unwrap();
        let target = super::rig::bytes_mut(&map, PAGE, PAGE);
        std::io::Read::read_exact(&mut pipe.0, target).unwrap();
        drop(pinned);
        let mut back = [0; PAGE];
        file.read_at(&mut back, PAGE as u64).unwrap();
        assert!(back == [9; PAGE]);
        let error = map.pin(0..map.len(), false);
        let limit = rig.volume.statistics().pages_max / 4;
        assert_eq!(error.is_ok(), limit >= 10);
        let statistics = rig.volume.statistics().cache;
        drop(error);
        assert!(statistics.foll_pin_acquired > 0);
        let at_rest = rig.volume.statistics().cache;
        assert_eq!(at_rest.foll_pin_acquired, at_rest.foll_pin_released);
    });
}

#[test]
fn a_part_can_be_unmapped_and_the_rest_goes_on() {
    everywhere(|rig| {
        let file = rig.file("a", 40 * PAGE, 1);
        let mut map = rig.map(&file, MapAccess::Write);
        store(&map, 15 * PAGE, 0x77);
        map.unmap(10 * PAGE..20 * PAGE).unwrap();
        let expected = pattern(40 * PAGE, 1);
        assert_eq!(load(&map, 9 * PAGE), expected[9 * PAGE]);
        assert_eq!(load(&map, 20 * PAGE), expected[20 * PAGE]);
        store(&map, 39 * PAGE, 0x11);
        let error = map.read(10 * PAGE, &mut [0; 5]).unwrap_err();
        assert_eq!(error.errno(), Errno::ENOMEM);
        let mut back = [0];
        file.read_at(&mut back, 15 * PAGE as u64).unwrap();
        assert_eq!(back[0], 0x77, "what was stored there stays");
        // The gap may be anybody's: a mapping there is served as any other.
        let other = rig.file("b", 8 * PAGE, 9);
        let others: Vec<_> = (0..8).map(|_| rig.map(&other, MapAccess::Read)).collect();
        for other in &others {
            assert_eq!(load(other, 5 * PAGE), pattern(8 * PAGE, 9)[5 * PAGE]);
        }
        assert_eq!(load(&map, 30 * PAGE), expected[30 * PAGE]);
    });
}

#[test]
fn first_stores_are_looked_for_where_nobody_need_know_of_them_before() {
    everywhere(|rig| {
        let file = rig.file("a", 8 * PAGE, 1);
        let end = file.len();
        let options = MapOptions::new()
            .access(MapAccess::Write)
            .delivery(rig.delivery);
        let tracking = |range, options: &MapOptions| file.map(range, options).unwrap().tracking();
        assert_eq!(tracking(0..end + 1, &options), Tracking::Sync);
        let sync = options.tracking(Tracking::Sync);
        assert_eq!(tracking(0..end, &sync), Tracking::Sync);
        let reads = options.access(MapAccess::Read).tracking(Tracking::Async);
        assert_eq!(tracking(0..end, &reads), Tracking::Sync);
        let Ok(map) = file.map(0..end, &options.tracking(Tracking::Async)) else {
            eprintln!("skipped: this kernel cannot tell of stores");
            return;
        };
        assert_eq!(map.tracking(), Tracking::Async);
        // The scratch directory's filesystem may not tell holes from data.
        let seen = tracking(0..end, &options);
        eprintln!("a file without holes: {seen:?}");
        let before = rig.volume.statistics();
        assert_eq!(load(&map, PAGE), pattern(2 * PAGE, 1)[PAGE]);
        for round in 0..3u8 {
            store(&map, PAGE, round);
            map.flush(0..map.len()).unwrap();
        }
        let after = rig.volume.statistics();
        assert_eq!(after.faults.faults_write, before.faults.faults_write);
        assert_eq!(std::fs::read(rig.dir.path().join("a")).unwrap()[PAGE], 2);
        store(&map, 2 * PAGE, 7);
        drop(map);
        file.sync_all().unwrap();
        let stored = std::fs::read(rig.dir.path().join("a")).unwrap();
        assert_eq!(stored[2 * PAGE], 7, "found when the mapping went");
    });
}

#[test]
fn advice_changes_what_is_resident_and_no_bytes() {
    everywhere(|rig| {
        let file = rig.file("a", 20 * PAGE, 1);
        let map = rig.map(&file, MapAccess::Write);
        let expected = pattern(20 * PAGE, 1);
        map.advise(Advice::Random, 0..map.len()).unwrap();
        assert_eq!(load(&map, 3 * PAGE), expected[3 * PAGE]);
        let resident = map.resident(0..map.len()).unwrap();
        assert_eq!(resident.iter().filter(|&&there| there).count(), 1);
        map.advise(Advice::WillNeed, 0..map.len()).unwrap();
        store(&map, 4 * PAGE, 1);
        map.advise(Advice::DontNeed, 0..map.len()).unwrap();
        assert_eq!(
            load(&map, 4 * PAGE),
            1,
            "a shared store is not the mapping's to drop"
        );
        map.advise(Advice::Sequential, 0..map.len()).unwrap();
        for page in 5..20 {
            assert_eq!(load(&map, page * PAGE), expected[page * PAGE]);
        }
    });
}

#[test]
fn what_cannot_be_mapped_is_refused_by_name() {
    everywhere(|rig| {
        let file = rig.file("some-name", LEN, 1);
        let options = MapOptions::new();
        let refused = |range| file.map(range, &options).unwrap_err();
        assert_eq!(refused(5..5).errno(), Errno::EINVAL);
        assert_eq!(refused(100..PAGE as u64).errno(), Errno::EINVAL);
        assert_eq!(refused(0..u64::MAX).errno(), Errno::EOVERFLOW);
        assert_eq!(refused(0..1 << 60).errno(), Errno::ENOMEM);
        let message = refused(100..4096).to_string();
        assert!(
            message.contains("some-name") && message.contains("bytes 100 to 4096"),
            "{message}"
        );
        let open = |read, write| {
            let options = OpenOptions::new().read(read).write(write);
            rig.volume.open("some-name", &options).unwrap()
        };
        let map = |file: &pinfold::File, access| file.map(0..10, &options.access(access)).map(drop);
        let only_read = open(true, false);
        map(&only_read, MapAccess::Read).unwrap();
        map(&only_read, MapAccess::Private).unwrap();
        assert_eq!(
            map(&only_read, MapAccess::Write).unwrap_err().errno(),
            Errno::EACCES
        );
        let only_write = open(false, true);
        for access in [MapAccess::Read, MapAccess::Write, MapAccess::Private] {
            assert_eq!(map(&only_write, access).unwrap_err().errno(), Errno::EACCES);
        }
    });
}

#[test]
fn a_forked_child_is_told_and_takes_nothing_from_its_parent() {
    everywhere(|rig| {
        let file = rig.file("a", 8 * PAGE, 1);
        let map = rig.map(&file, MapAccess::Write);
        store(&map, 0, 7);
        // SAFETY: the child uses memory and system calls, neither threads nor what they might hold.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let told = |outcome: pinfold::Result<usize>| {
                outcome.is_err_and(|error| error.errno() == Errno::ENOTCONN)
            };
            let right = told(file.read_at(&mut [0], 0))
                && told(file.write_at(&[0], 0))
                && told(map.read(0, &mut [0]))
                && file.sync_all().is_err();
            drop(map);
            drop(file);
            // SAFETY: ends the child without unwinding.
            unsafe { libc::_exit(if right { 7 } else { 1 }) };
        }
        let mut status = 0;
        // SAFETY: waits for our child.
        unsafe { libc::waitpid(child, &raw mut status, 0) };
        assert!(libc::WIFEXITED(status), "status {status:#x}");
        assert_eq!(libc::WEXITSTATUS(status), 7);
        let old = pattern(8 * PAGE, 1);
        assert_eq!((load(&map, 0), load(&map, 5 * PAGE)), (7, old[5 * PAGE]));
        store(&map, PAGE, 8);
        file.sync_all().unwrap();
        let stored = std::fs::read(rig.dir.path().join("a")).unwrap();
        assert_eq!((stored[0], stored[PAGE]), (7, 8));
    });
}

/// Has a forked child do `work` and end well. One that hangs is killed: it would be told from none that is slow.
fn in_a_fork(work: impl FnOnce()) {
    // SAFETY: the child lets go of what it has inherited, and ends; what that might wait for is what is tested.
    let child = unsafe { libc::fork() };
    if child == 0 {
        work();
        // SAFETY: ends the child without unwinding.
        unsafe { libc::_exit(7) };
    }
    let mut status = 0;
    let begun = Instant::now();
    // SAFETY: waits for our child.
    while unsafe { libc::waitpid(child, &raw mut status, libc::WNOHANG) } == 0 {
        if begun.elapsed() > CHILD_MAX {
            // SAFETY: our child, not waited for yet.
            unsafe { libc::kill(child, libc::SIGKILL) };
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(libc::WIFEXITED(status), "status {status:#x}");
    assert_eq!(libc::WEXITSTATUS(status), 7);
}

#[test]
fn a_child_that_lets_go_of_a_file_takes_no_page_of_it_from_its_parent() {
    everywhere(|rig| {
        // Never written to here: background write-back does not know it.
        let expected = pattern(8 * PAGE, 1);
        std::fs::write(rig.dir.path().join("a"), &expected).unwrap();
        let file = rig.open("a");
        let map = rig.map(&file, MapAccess::Read);
        for page in 0..8 {
            assert_eq!(load(&map, page * PAGE), expected[page * PAGE]);
        }
        // The pages stay in the memory that parent and child share; nothing but the open file keeps them.
        drop(map);
        rig.volume.remove_file("a").unwrap();
        let mut file = Some(file);
        in_a_fork(|| drop(file.take()));
        let mut back = vec![0; 8 * PAGE];
        let file = file.unwrap();
        assert_eq!(file.read_at(&mut back, 0).unwrap(), back.len());
        assert!(back == expected, "the child has dropped the parent's pages");
    });
}

#[test]
fn a_child_that_lets_go_of_a_volume_waits_for_none_of_its_threads() {
    everywhere(|rig| {
        let dir = tempfile::tempdir().unwrap();
        // Never used, with nothing in memory but itself.
        let mut volume = Some(Volume::builder().open_dir(dir.path()).unwrap());
        in_a_fork(|| drop(volume.take()));
        // And one that is gone, but for a file.
        let file = rig.file("a", 3 * PAGE, 1);
        let options = OpenOptions::new().read(true).write(true).create(true);
        let mut left = Some(volume.as_ref().unwrap().open("b", &options).unwrap());
        drop(volume);
        in_a_fork(|| drop(left.take()));
        let left = left.unwrap();
        left.write_at(b"still", 0).unwrap();
        left.sync_all().unwrap();
        assert_eq!(std::fs::read(dir.path().join("b")).unwrap(), b"still");
        assert_eq!(file.len(), 3 * PAGE as u64);
    });
}
