use std::ffi::OsStr;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::*;
use crate::volume::Volume;

fn os(name: &str) -> &OsStr {
    OsStr::new(name)
}

/// A volume whose flusher leaves dirty pages alone for the length of a test.
fn volume(dir: &Path) -> Volume {
    Volume::builder()
        .memory(8 << 20)
        .background_interval(Duration::from_secs(600))
        .dirty_age_max(Duration::from_secs(600))
        .open_dir(dir)
        .unwrap()
}

fn read_write() -> OpenOptions {
    OpenOptions::new().read(true).write(true).create(true)
}

fn create(volume: &Volume, name: &str) -> (Node, File) {
    let root = volume.root();
    root.create(os(name), &read_write(), Owner::Process)
        .unwrap()
}

/// Lets the coarse clock tick, so that a time that moves is seen to have moved.
fn tick() {
    std::thread::sleep(Duration::from_millis(30));
}

#[test]
fn hard_links_and_repeated_look_ups_are_one_node() {
    let dir = tempfile::tempdir().unwrap();
    let volume = volume(dir.path());
    let (node, file) = create(&volume, "a");
    volume.root().link(&node, os("b")).unwrap();
    let other = volume.root().lookup(os("b")).unwrap();
    assert_eq!(node, other);
    file.write_at(b"shared", 0).unwrap();
    assert_eq!(
        other.attributes().unwrap().len,
        6,
        "the live size under both names"
    );
    assert_eq!(other.attributes().unwrap().links, 2);
    let read = other.open(&OpenOptions::new().read(true)).unwrap();
    let mut buf = [0; 6];
    assert_eq!(read.read_at(&mut buf, 0).unwrap(), 6);
    assert_eq!(&buf, b"shared");
}

#[test]
fn write_back_moves_neither_time_of_modification_nor_of_change() {
    let dir = tempfile::tempdir().unwrap();
    let volume = volume(dir.path());
    let (node, file) = create(&volume, "a");
    tick();
    file.write_at(&[1; 10_000], 0).unwrap();
    let written = node.attributes().unwrap();
    for _ in 0..3 {
        tick();
        file.sync_all().unwrap();
        let synced = node.attributes().unwrap();
        assert_eq!(synced.modified, written.modified);
        assert_eq!(synced.changed, written.changed);
    }
    let stored = std::fs::metadata(dir.path().join("a")).unwrap();
    assert_eq!(
        stored.modified().unwrap(),
        written.modified,
        "the store's is put right"
    );
    tick();
    file.write_at(&[2; 10], 0).unwrap();
    let again = node.attributes().unwrap();
    assert!(again.modified > written.modified && again.changed > written.changed);
}

#[test]
fn write_back_in_several_passes_leaves_the_stored_time_right() {
    let dir = tempfile::tempdir().unwrap();
    let volume = volume(dir.path());
    let (node, file) = create(&volume, "a");
    file.write_at(&[1; 16384], 0).unwrap();
    let written = node.attributes().unwrap();
    for page in 0..4 {
        tick();
        file.write_back(page * 4096..(page + 1) * 4096).unwrap();
    }
    let stored = std::fs::metadata(dir.path().join("a")).unwrap();
    assert_eq!(stored.modified().unwrap(), written.modified);
    assert_eq!(node.attributes().unwrap().changed, written.changed);
}

#[test]
fn a_time_that_was_set_survives_write_back_and_the_last_close() {
    let dir = tempfile::tempdir().unwrap();
    let volume = volume(dir.path());
    let (node, file) = create(&volume, "a");
    file.write_at(&[1; 5000], 0).unwrap();
    let old = UNIX_EPOCH + Duration::new(1_000_000_000, 7);
    let set = SetAttributes {
        modified: SetTime::At(old),
        ..SetAttributes::default()
    };
    assert_eq!(node.set_attributes(&set).unwrap().modified, old);
    drop(file);
    assert_eq!(node.attributes().unwrap().modified, old);
    let stored = std::fs::metadata(dir.path().join("a")).unwrap();
    assert_eq!(stored.modified().unwrap(), old);
    // Attributes that are set leave the contents' time alone, and move the time of change.
    let before = node.attributes().unwrap();
    tick();
    let set = SetAttributes {
        permissions: Some(0o600),
        ..SetAttributes::default()
    };
    let after = node.set_attributes(&set).unwrap();
    assert_eq!(after.modified, old);
    assert!(after.changed > before.changed);
}

#[test]
fn a_time_that_was_set_survives_a_pass_that_ends_at_the_same_moment() {
    let dir = tempfile::tempdir().unwrap();
    let volume = volume(dir.path());
    let (node, file) = create(&volume, "a");
    let old = UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    let set = SetAttributes {
        modified: SetTime::At(old),
        ..SetAttributes::default()
    };
    for round in 0..500 {
        file.write_at(&[1; 100], 0).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| node.0.data.get().unwrap().inode.flush().unwrap());
            }
            node.set_attributes(&set).unwrap();
        });
        assert_eq!(node.attributes().unwrap().modified, old, "round {round}");
        let stored = std::fs::metadata(dir.path().join("a")).unwrap();
        assert_eq!(stored.modified().unwrap(), old, "round {round}, stored");
    }
}

#[test]
fn somebody_elses_change_is_noticed_at_the_next_open() {
    let dir = tempfile::tempdir().unwrap();
    let volume = volume(dir.path());
    let (node, file) = create(&volume, "a");
    file.write_at(b"ours", 0).unwrap();
    file.sync_all().unwrap();
    let version = node.content_version();
    drop(node.open(&read_write()).unwrap());
    assert_eq!(
        node.content_version(),
        version,
        "our own write is no stranger's"
    );
    tick();
    std::fs::write(dir.path().join("a"), b"theirs, longer").unwrap();
    let again = node.open(&OpenOptions::new().read(true)).unwrap();
    assert_ne!(node.content_version(), version);
    let mut buf = [0; 20];
    assert_eq!(again.read_at(&mut buf, 0).unwrap(), 14);
    assert_eq!(&buf[..14], b"theirs, longer");
    assert_eq!(node.attributes().unwrap().len, 14);
}

#[test]
fn somebody_elses_change_under_newer_cached_data_is_estale() {
    let dir = tempfile::tempdir().unwrap();
    let volume = volume(dir.path());
    let (node, file) = create(&volume, "a");
    file.write_at(b"old", 0).unwrap();
    file.sync_all().unwrap();
    file.write_at(b"new", 0).unwrap();
    tick();
    std::fs::write(dir.path().join("a"), b"theirs, longer").unwrap();
    let error = node.open(&read_write()).unwrap_err();
    assert_eq!(error.errno(), Errno::ESTALE);
    let mut buf = [0; 3];
    file.read_at(&mut buf, 0).unwrap();
    assert_eq!(&buf, b"new", "never a silent mix");
}

#[test]
fn a_chmod_beside_the_volume_harms_no_cached_data() {
    let dir = tempfile::tempdir().unwrap();
    let volume = volume(dir.path());
    let (node, file) = create(&volume, "a");
    file.write_at(b"dirty", 0).unwrap();
    let path = dir.path().join("a");
    let mut mode = std::fs::metadata(&path).unwrap().permissions();
    std::os::unix::fs::PermissionsExt::set_mode(&mut mode, 0o640);
    std::fs::set_permissions(&path, mode).unwrap();
    drop(node.open(&read_write()).unwrap());
    assert_eq!(node.attributes().unwrap().permissions, 0o640);
    drop(file);
    assert_eq!(std::fs::read(&path).unwrap(), b"dirty");
}

#[test]
fn an_unlinked_file_lives_until_its_last_close() {
    let dir = tempfile::tempdir().unwrap();
    let volume = volume(dir.path());
    let (node, file) = create(&volume, "a");
    file.write_at(&[7; 9000], 0).unwrap();
    volume.root().unlink(os("a")).unwrap();
    assert_eq!(
        volume.root().lookup(os("a")).unwrap_err().errno(),
        Errno::ENOENT
    );
    let stat = node.attributes().unwrap();
    assert_eq!((stat.links, stat.len), (0, 9000));
    file.sync_all().unwrap();
    file.drop_cache().unwrap();
    let mut buf = [0; 9000];
    assert_eq!(file.read_at(&mut buf, 0).unwrap(), 9000);
    assert!(buf.iter().all(|&byte| byte == 7));
    // A new file of that name is another inode.
    let (other, _) = create(&volume, "a");
    assert_ne!(other, node);
    let before = volume.statistics().nodes;
    drop((node, file));
    assert_eq!(
        volume.statistics().nodes,
        before - 1,
        "nothing keeps it any longer"
    );
}

#[test]
fn what_is_dirty_when_the_last_name_goes_is_not_stored() {
    let dir = tempfile::tempdir().unwrap();
    let volume = volume(dir.path());
    let (node, file) = create(&volume, "a");
    file.write_at(&[7; 9000], 0).unwrap();
    volume.root().unlink(os("a")).unwrap();
    let written = volume.statistics().cache.pages_written;
    drop((node, file));
    volume.sync().unwrap();
    // The last close may write back before it learns that nobody will ever read it.
    assert!(volume.statistics().cache.pages_written <= written + 3);
    assert_eq!(volume.statistics().pages_dirty, 0);
}

#[test]
fn kept_nodes_are_bounded_and_dirty_ones_stay() {
    let dir = tempfile::tempdir().unwrap();
    let volume = volume(dir.path());
    volume.root().0.tree.set_kept_max(20);
    let (dirty, file) = create(&volume, "dirty");
    file.write_at(b"x", 0).unwrap();
    let id = dirty.id();
    drop(dirty);
    for i in 0..500 {
        std::fs::write(dir.path().join(format!("f{i}")), b"").unwrap();
        volume.root().lookup(os(&format!("f{i}"))).unwrap();
    }
    assert!(
        volume.statistics().nodes < 60,
        "{}",
        volume.statistics().nodes
    );
    assert_eq!(volume.root().lookup(os("dirty")).unwrap().id(), id);
    assert_eq!(
        volume
            .root()
            .lookup(os("dirty"))
            .unwrap()
            .attributes()
            .unwrap()
            .len,
        1
    );
    drop(file);
    volume.close().unwrap();
    assert_eq!(std::fs::read(dir.path().join("dirty")).unwrap(), b"x");
}

#[test]
fn a_replaced_file_keeps_its_contents_for_those_who_have_it_open() {
    let dir = tempfile::tempdir().unwrap();
    let volume = volume(dir.path());
    let root = volume.root();
    let (_, old) = create(&volume, "a");
    old.write_at(b"old", 0).unwrap();
    let (_, new) = create(&volume, "b");
    new.write_at(b"new", 0).unwrap();
    root.rename(os("b"), &root, os("a"), RenameFlags::empty())
        .unwrap();
    let mut buf = [0; 3];
    old.read_at(&mut buf, 0).unwrap();
    assert_eq!(&buf, b"old");
    let found = root.lookup(os("a")).unwrap();
    let read = found.open(&OpenOptions::new().read(true)).unwrap();
    read.read_at(&mut buf, 0).unwrap();
    assert_eq!(&buf, b"new");
    assert_eq!(old.node().attributes().unwrap().links, 0);
}

#[test]
fn set_id_bits_go_as_a_write_takes_them() {
    let dir = tempfile::tempdir().unwrap();
    let volume = volume(dir.path());
    let (node, _file) = create(&volume, "a");
    for (before, after) in [
        (0o4755, 0o755),
        (0o2755, 0o755),
        (0o2745, 0o2745),
        (0o6775, 0o775),
    ] {
        let set = SetAttributes {
            permissions: Some(before),
            ..SetAttributes::default()
        };
        node.set_attributes(&set).unwrap();
        node.clear_set_id_bits().unwrap();
        assert_eq!(node.attributes().unwrap().permissions, after, "{before:o}");
    }
}

#[test]
fn a_temporary_file_can_be_given_a_name() {
    let dir = tempfile::tempdir().unwrap();
    let volume = volume(dir.path());
    let made = volume.root().temporary(&read_write(), Owner::Process);
    let Ok((node, file)) = made else {
        println!("skipped: no O_TMPFILE here");
        return;
    };
    file.write_at(b"text", 0).unwrap();
    volume.root().link(&node, os("named")).unwrap();
    drop((node, file));
    volume.close().unwrap();
    assert_eq!(std::fs::read(dir.path().join("named")).unwrap(), b"text");
}

#[test]
fn opening_what_is_no_file_says_what_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let volume = volume(dir.path());
    let root = volume.root();
    let options = OpenOptions::new().read(true);
    let sub = root.make_dir(os("d"), 0o700, Owner::Process).unwrap();
    let link = root.symlink(os("l"), os("d"), Owner::Process).unwrap();
    let pipe = root
        .make_node(os("p"), Kind::Fifo, 0o600, 0, Owner::Process)
        .unwrap();
    assert_eq!(sub.open(&options).unwrap_err().errno(), Errno::EISDIR);
    assert_eq!(link.open(&options).unwrap_err().errno(), Errno::ELOOP);
    assert_eq!(pipe.open(&options).unwrap_err().errno(), Errno::EOPNOTSUPP);
    assert_eq!(root.open_dir().unwrap().count(), 3);
    let stat = std::fs::symlink_metadata(dir.path().join("p")).unwrap();
    assert_eq!(stat.mode() & 0o777, 0o600);
    let _: SystemTime = root.attributes().unwrap().modified;
}

#[test]
fn opening_a_file_whose_pages_are_being_stored_finds_no_stranger() {
    let dir = tempfile::tempdir().unwrap();
    let volume = volume(dir.path());
    let (node, file) = create(&volume, "a");
    let ends = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0..2000u32 {
                // Grows now and then, so that a size read too early would be seen too.
                let at = u64::from(round % 100) * 512;
                file.write_at(&round.to_le_bytes(), at).unwrap();
                file.sync_data().unwrap();
                if round % 100 == 99 {
                    file.set_len(0).unwrap();
                }
            }
            ends.store(true, Ordering::Relaxed);
        });
        for _ in 0..2 {
            scope.spawn(|| {
                while !ends.load(Ordering::Relaxed) {
                    let opened = node.open(&read_write()).unwrap();
                    // Dirty, so that a false alarm cannot go by unnoticed.
                    opened.write_at(b"x", 1 << 20).unwrap();
                }
            });
        }
    });
    assert_eq!(node.content_version(), 0, "nobody else was there");
}
