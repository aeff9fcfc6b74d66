//! Directories, inode numbers, and changes made behind the mount's back.

use std::collections::BTreeMap;
use std::fs;
use std::mem::MaybeUninit;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use rustix::fs::{Mode, OFlags, RawDir, SeekFrom};

use crate::support::{installed, mounted, mounted_with};

#[test]
fn a_directory_of_ten_thousand_can_be_read_from_any_position() {
    let Some(fixture) = mounted() else { return };
    let dir = fixture.mnt.join("many");
    fs::create_dir(&dir).unwrap();
    for i in 0..10_000 {
        fs::File::create(fixture.data.join(format!("many/f{i}"))).unwrap();
    }
    let fd = rustix::fs::open(&dir, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap();
    let mut buf = vec![MaybeUninit::uninit(); 4096];
    let mut order = Vec::new();
    let mut raw = RawDir::new(&fd, &mut buf);
    while let Some(entry) = raw.next() {
        let entry = entry.unwrap();
        order.push((
            entry.file_name().to_owned(),
            entry.next_entry_cookie(),
            entry.ino(),
        ));
    }
    assert_eq!(order.len(), 10_002);
    let distinct: BTreeMap<_, _> = order.iter().map(|(name, _, ino)| (name, ino)).collect();
    assert_eq!(distinct.len(), 10_002, "no name comes twice");
    for at in [5_000, 17, 9_999, 0, 7_321] {
        rustix::fs::seek(&fd, SeekFrom::Start(order[at].1)).unwrap();
        let mut raw = RawDir::new(&fd, &mut buf);
        let next = raw.next().unwrap().unwrap();
        assert_eq!(
            next.file_name(),
            order[at + 1].0.as_c_str(),
            "behind entry {at}"
        );
    }
    // The numbers that a listing shows are those that stat shows, and the store's.
    for (name, _, ino) in order
        .iter()
        .filter(|(name, ..)| name.to_bytes()[0] == b'f')
        .step_by(501)
    {
        let name = name.to_str().unwrap();
        assert_eq!(fs::metadata(dir.join(name)).unwrap().ino(), *ino);
        assert_eq!(
            fs::metadata(fixture.data.join("many").join(name))
                .unwrap()
                .ino(),
            *ino
        );
    }
    // Removing while reading meets every name once.
    for entry in fs::read_dir(&dir).unwrap() {
        fs::remove_file(entry.unwrap().path()).unwrap();
    }
    assert_eq!(fs::read_dir(fixture.data.join("many")).unwrap().count(), 0);
}

#[test]
fn a_number_that_the_store_uses_again_is_another_inode() {
    let Some(fixture) = mounted() else { return };
    let path = fixture.mnt.join("a");
    for round in 0..50 {
        let held = fs::File::create(&path).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, round.to_string()).unwrap();
        assert_eq!(held.metadata().unwrap().len(), 0);
        assert_ne!(
            held.metadata().unwrap().ino(),
            fs::metadata(&path).unwrap().ino()
        );
        assert_eq!(fs::read_to_string(&path).unwrap(), round.to_string());
        fs::remove_file(&path).unwrap();
    }
}

#[test]
fn changes_behind_the_mount_are_seen_within_moments() {
    let Some(fixture) = mounted() else { return };
    let (ours, theirs) = (fixture.mnt.join("a"), fixture.data.join("a"));
    fs::write(&ours, "ours").unwrap();
    assert_eq!(fs::read(&ours).unwrap(), b"ours");
    assert!(!fixture.mnt.join("new").exists());
    // What we have not stored yet would be a conflict, another matter; the kernel tells of a close when it likes.
    fixture.volume.sync().unwrap();
    std::thread::sleep(Duration::from_millis(20));
    fs::write(&theirs, "theirs, longer").unwrap();
    fs::write(fixture.data.join("new"), "n").unwrap();
    // Contents at the next open, whatever the kernel has cached; names and attributes within a second.
    let (mut waited, step) = (Duration::ZERO, Duration::from_millis(100));
    while fs::metadata(&ours).unwrap().len() != 14 || !fixture.mnt.join("new").exists() {
        assert!(waited < Duration::from_secs(60), "not seen");
        std::thread::sleep(step);
        waited += step;
    }
    assert_eq!(fs::read(&ours).unwrap(), b"theirs, longer");
    // Of the same length: only the times tell.
    std::thread::sleep(Duration::from_millis(20));
    fs::write(&theirs, "THEIRS, LONGER").unwrap();
    assert_eq!(fs::read(&ours).unwrap(), b"THEIRS, LONGER");
}

#[test]
fn background_write_back_does_not_move_times() {
    let quick = |builder: pinfold::VolumeBuilder| {
        let moment = Duration::from_millis(20);
        builder.background_interval(moment).dirty_age_max(moment)
    };
    let Some(fixture) = mounted_with(quick) else {
        return;
    };
    let path = fixture.mnt.join("a");
    let file = fs::File::create(&path).unwrap();
    std::os::unix::fs::FileExt::write_at(&file, &[1; 100_000], 0).unwrap();
    let before = fs::metadata(&path).unwrap();
    let stored = || fs::metadata(fixture.data.join("a")).unwrap();
    // The watchdog ends a write-back that does not come.
    while fixture.volume.statistics().pages_dirty > 0 || stored().len() < 100_000 {
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(stored().len(), 100_000, "written back");
    // Longer than the kernel keeps attributes, so that it asks again.
    std::thread::sleep(Duration::from_millis(1_200));
    let after = fs::metadata(&path).unwrap();
    assert_eq!(before.modified().unwrap(), after.modified().unwrap());
    assert_eq!(
        (before.ctime(), before.ctime_nsec()),
        (after.ctime(), after.ctime_nsec())
    );
}

#[test]
fn an_unlinked_open_file_leaves_nothing_in_the_directory() {
    let Some(fixture) = mounted() else { return };
    let file = fs::OpenOptions::new()
        .create(true)
        .truncate(true)
        .read(true)
        .write(true)
        .open(fixture.mnt.join("a"))
        .unwrap();
    std::os::unix::fs::FileExt::write_at(&file, &[9; 300_000], 0).unwrap();
    fs::remove_file(fixture.mnt.join("a")).unwrap();
    assert_eq!(
        fs::read_dir(&fixture.data).unwrap().count(),
        0,
        "not even under another name"
    );
    file.sync_all().unwrap();
    let mut buf = vec![0; 300_000];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut buf, 0).unwrap();
    assert!(buf.iter().all(|&byte| byte == 9));
}

#[test]
fn a_mount_below_the_directory_works() {
    let Some(fixture) = mounted() else { return };
    if !crate::support::is_root() || !installed("mount") {
        return;
    }
    let inner = fixture.data.join("inner");
    fs::create_dir(&inner).unwrap();
    let status = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=1m", "none"])
        .arg(&inner)
        .status();
    if !status.is_ok_and(|status| status.success()) {
        println!("skipped: no tmpfs can be mounted");
        return;
    }
    let through = fixture.mnt.join("inner");
    fs::write(through.join("f"), "inside").unwrap();
    // Two devices number their inodes alike: the mount must keep them apart.
    let mut numbers = BTreeMap::new();
    for i in 0..20 {
        for dir in [&through, &fixture.mnt] {
            let path = dir.join(format!("n{i}"));
            fs::write(&path, i.to_string()).unwrap();
            let ino = fs::metadata(&path).unwrap().ino();
            assert_eq!(numbers.insert(ino, path), None);
        }
    }
    assert_eq!(fs::read(inner.join("f")).unwrap(), b"inside");
    let crossing = fs::rename(through.join("f"), fixture.mnt.join("f"));
    assert_eq!(crossing.unwrap_err().raw_os_error(), Some(libc::EXDEV));
    fs::remove_file(through.join("f")).unwrap();
    rustix::mount::unmount(&inner, rustix::mount::UnmountFlags::DETACH).unwrap();
}

#[test]
fn nothing_stays_mounted_when_serving_has_failed() {
    let base = tempfile::tempdir().unwrap();
    let (data, mnt) = (base.path().join("data"), base.path().join("mnt"));
    fs::create_dir(&data).unwrap();
    fs::create_dir(&mnt).unwrap();
    fs::write(data.join("a"), "a").unwrap();
    let layer = |_| -> std::sync::Arc<dyn pinfold::Object> { panic!("as a bug would") };
    let builder = pinfold::Volume::builder().object_layer(std::sync::Arc::new(layer));
    let volume = builder.open_dir(&data).unwrap();
    let options = pinfold_fuse::MountOptions {
        threads: std::num::NonZeroUsize::new(1),
        ..Default::default()
    };
    let mounted = match pinfold_fuse::mount(volume.root(), &mnt, &options, || {}) {
        Ok(mounted) => mounted,
        Err(error) => return println!("skipped: {error}"),
    };
    let _watchdog = crate::support::watch(mnt.clone());
    fs::read(mnt.join("a")).unwrap_err();
    while mounted.is_serving() {
        std::thread::sleep(Duration::from_millis(10));
    }
    mounted.unmount(Duration::from_secs(1)).unwrap_err();
    assert!(!pinfold_fuse::is_mount_point(&mnt).unwrap());
}
