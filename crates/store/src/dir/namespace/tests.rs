use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use super::*;
use crate::dir::object::Reopen;

fn names(entries: &mut Entries) -> Vec<OsString> {
    let mut found = Vec::new();
    while entries.peek().unwrap().is_some() {
        found.push(entries.advance().unwrap().name);
    }
    found
}

fn os(name: &str) -> &OsStr {
    OsStr::new(name)
}

#[test]
fn a_second_claim_on_the_same_a_higher_or_a_lower_directory_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (middle, low) = (dir.path().join("m"), dir.path().join("m/low"));
    let beside = dir.path().join("beside");
    std::fs::create_dir_all(&low).unwrap();
    std::fs::create_dir(&beside).unwrap();
    let first = Namespace::open(&middle).unwrap();
    assert!(first.claim().is_exclusive());
    for other in [middle.as_path(), &low, dir.path()] {
        let error = Namespace::open(other).unwrap_err();
        assert_eq!(error.errno(), Errno::EBUSY, "{}", other.display());
        let text = error.to_string();
        assert!(text.contains("another Pinfold serves it"), "{text}");
        assert!(
            text.contains(&format!("process {}", std::process::id())),
            "{text}"
        );
    }
    Namespace::open(&beside).unwrap();
    drop(first);
    Namespace::open(&low).unwrap();
}

#[test]
fn a_directory_that_cannot_be_served_is_refused_with_its_path() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "x").unwrap();
    for (path, errno) in [
        (dir.path().join("missing"), Errno::ENOENT),
        (file, Errno::ENOTDIR),
    ] {
        let error = Namespace::open(&path).unwrap_err();
        assert_eq!(error.errno(), errno);
        assert!(error.to_string().contains(&path.display().to_string()));
    }
}

#[test]
fn names_that_leave_the_directory_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let space = Namespace::open(dir.path()).unwrap();
    for name in [".", "..", "a/b", "/etc", "../x"] {
        assert_eq!(
            space.root().lookup(os(name)).unwrap_err(),
            Errno::EINVAL,
            "{name}"
        );
        assert_eq!(
            space.root().create(os(name), 0o600, None).unwrap_err(),
            Errno::EINVAL
        );
    }
    assert_eq!(space.root().lookup(os("")).unwrap_err(), Errno::ENOENT);
    assert_eq!(
        space.root().lookup(os(&"n".repeat(256))).unwrap_err(),
        Errno::ENAMETOOLONG
    );
}

#[test]
fn hard_links_are_one_inode_and_a_reused_number_is_another() {
    let dir = tempfile::tempdir().unwrap();
    let space = Namespace::open(dir.path()).unwrap();
    let root = space.root();
    let (file, stat, fd) = root.create(os("a"), 0o600, None).unwrap();
    assert_eq!(file.link(root, os("b")).unwrap().links, 2);
    assert_eq!(root.lookup(os("b")).unwrap().1.id, stat.id);
    drop((file, fd));
    root.unlink(os("a")).unwrap();
    root.unlink(os("b")).unwrap();
    // ext4 and tmpfs hand a freed number out again soon; whichever numbers come, ids never repeat.
    let mut seen = BTreeSet::from([stat.id]);
    for _ in 0..20 {
        let (_, stat, _) = root.create(os("c"), 0o600, None).unwrap();
        assert!(seen.insert(stat.id), "{stat:?} came twice");
        root.unlink(os("c")).unwrap();
    }
}

#[test]
fn attributes_change_as_on_the_directory_itself() {
    let dir = tempfile::tempdir().unwrap();
    let space = Namespace::open(dir.path()).unwrap();
    let (file, _, _) = space.root().create(os("a"), 0o640, None).unwrap();
    let at = Timestamp {
        seconds: 1_000_000,
        nanoseconds: 5,
    };
    let change = Change {
        permissions: Some(0o4711),
        accessed: TimeChange::Keep,
        modified: TimeChange::At(at),
        ..Change::default()
    };
    let stat = file.change(&change).unwrap();
    assert_eq!((stat.permissions, stat.modified), (0o4711, at));
    let plain = std::fs::metadata(dir.path().join("a")).unwrap();
    assert_eq!(plain.permissions().mode() & 0o7777, 0o4711);
    assert_eq!((plain.mtime(), plain.mtime_nsec()), (1_000_000, 5));
    let (link, _) = space.root().symlink(os("l"), os("nowhere"), None).unwrap();
    assert_eq!(link.read_link().unwrap(), os("nowhere"));
    let stat = link
        .change(&Change {
            modified: TimeChange::At(at),
            ..Change::default()
        })
        .unwrap();
    assert_eq!(stat.modified, at, "of the link, not of what it points to");
    assert_eq!(file.read_link().unwrap_err(), Errno::EINVAL);
}

#[test]
fn extended_attributes_of_any_length_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let space = Namespace::open(dir.path()).unwrap();
    let (file, _, _) = space.root().create(os("a"), 0o600, None).unwrap();
    for len in [0, 1, 255, 256, 3000] {
        let value = vec![7; len];
        if let Err(errno) = file.set_xattr(os("user.v"), &value, SetXattr::empty(), None) {
            println!("skipped: the temporary directory takes no user attributes ({errno})");
            return;
        }
        assert_eq!(file.xattr(os("user.v")).unwrap(), value);
    }
    assert_eq!(file.xattr_names().unwrap(), b"user.v\0");
    let again = file.set_xattr(os("user.v"), b"", SetXattr::CREATE, None);
    assert_eq!(again.unwrap_err(), Errno::EEXIST);
    file.remove_xattr(os("user.v")).unwrap();
    assert_eq!(file.xattr(os("user.v")).unwrap_err(), Errno::ENODATA);
}

#[test]
fn a_directory_of_ten_thousand_is_read_from_any_position() {
    let dir = tempfile::tempdir().unwrap();
    for i in 0..10_000 {
        std::fs::File::create(dir.path().join(format!("f{i}"))).unwrap();
    }
    let space = Namespace::open(dir.path()).unwrap();
    let mut entries = space.root().entries().unwrap();
    let mut order = Vec::new();
    while entries.peek().unwrap().is_some() {
        order.push(entries.advance().unwrap());
    }
    assert_eq!(order.len(), 10_002);
    let distinct: BTreeSet<_> = order.iter().map(|e| e.name.clone()).collect();
    assert_eq!(distinct.len(), 10_002);
    for at in [9_999, 0, 5_000, 123, 10_000] {
        entries.seek(order[at].next).unwrap();
        let after = entries.peek().unwrap().unwrap();
        assert_eq!(after.name, order[at + 1].name, "behind entry {at}");
    }
    entries.seek(0).unwrap();
    assert_eq!(names(&mut entries).len(), 10_002);
}

#[test]
fn more_inodes_than_descriptors_stay_usable() {
    let dir = tempfile::tempdir().unwrap();
    let space = Namespace::open(dir.path()).unwrap();
    let root = space.root();
    if !root.space_shared().by_handle.load(Ordering::Relaxed) {
        println!("skipped: inodes cannot be opened by handle here");
        return;
    }
    let count = root.space_shared().descriptors_max + 500;
    let mut handles = Vec::new();
    for i in 0..count {
        let (handle, stat, fd) = root.create(os(&format!("f{i}")), 0o600, None).unwrap();
        std::fs::File::from(fd)
            .write_all(i.to_string().as_bytes())
            .unwrap();
        handles.push((handle, stat.id));
    }
    let open = std::fs::read_dir("/proc/self/fd").unwrap().count();
    assert!(open < count, "{open} descriptors for {count} inodes");
    // A name that is gone needs its inode kept by somebody; a pinned handle is.
    handles[0].0.pin().unwrap();
    root.unlink(os("f0")).unwrap();
    for (i, (handle, id)) in handles.iter().enumerate().step_by(97) {
        let stat = handle.stat().unwrap();
        assert_eq!(stat.id, *id);
        let reopener: Arc<dyn Reopen> = handle.reopener();
        let fd = reopener.reopen(OFlags::RDONLY).unwrap();
        assert_eq!(
            std::io::read_to_string(std::fs::File::from(fd)).unwrap(),
            i.to_string()
        );
    }
}

#[test]
fn an_unnamed_file_gets_its_first_name_by_link() {
    let dir = tempfile::tempdir().unwrap();
    let space = Namespace::open(dir.path()).unwrap();
    let (file, stat, fd) = match space.root().create_unnamed(0o600, None) {
        Ok(made) => made,
        Err(errno) => {
            println!("skipped: no O_TMPFILE here ({errno})");
            return;
        }
    };
    assert_eq!(stat.links, 0);
    std::fs::File::from(fd).write_all(b"text").unwrap();
    assert_eq!(file.link(space.root(), os("named")).unwrap().links, 1);
    assert_eq!(std::fs::read(dir.path().join("named")).unwrap(), b"text");
}

#[test]
fn renames_obey_their_flags() {
    let dir = tempfile::tempdir().unwrap();
    let space = Namespace::open(dir.path()).unwrap();
    let root = space.root();
    let (_, a, _) = root.create(os("a"), 0o600, None).unwrap();
    let (_, b, _) = root.create(os("b"), 0o600, None).unwrap();
    let refused = root.rename(os("a"), root, os("b"), RenameFlags::NOREPLACE);
    assert_eq!(refused.unwrap_err(), Errno::EEXIST);
    root.rename(os("a"), root, os("b"), RenameFlags::EXCHANGE)
        .unwrap();
    assert_eq!(root.lookup(os("a")).unwrap().1.id, b.id);
    assert_eq!(root.lookup(os("b")).unwrap().1.id, a.id);
    root.rename(os("a"), root, os("b"), RenameFlags::empty())
        .unwrap();
    assert_eq!(root.lookup(os("a")).unwrap_err(), Errno::ENOENT);
}

#[test]
fn creation_follows_a_setgid_directory_and_the_callers_ids() {
    if !pinfold_mem::creds::can_assume() {
        println!("skipped: only a privileged process can create as others");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let space = Namespace::open(dir.path()).unwrap();
    let (sub, _) = space.root().make_dir(os("d"), 0o777, None).unwrap();
    sub.change(&Change {
        permissions: Some(0o2777),
        gid: Some(777),
        ..Change::default()
    })
    .unwrap();
    let caller = Caller {
        uid: 1001,
        gid: 1002,
        umask: 0o022,
    };
    let (_, file, _) = sub.create(os("f"), 0o666, Some(&caller)).unwrap();
    assert_eq!((file.uid, file.gid, file.permissions), (1001, 777, 0o644));
    let (_, below) = sub.make_dir(os("s"), 0o777, Some(&caller)).unwrap();
    assert_eq!(
        (below.uid, below.gid, below.permissions),
        (1001, 777, 0o2755)
    );
    let (_, plain, _) = space.root().create(os("f"), 0o666, Some(&caller)).unwrap();
    assert_eq!((plain.uid, plain.gid), (1001, 1002));
    let (_, ours, _) = space.root().create(os("g"), 0o666, None).unwrap();
    assert_eq!(ours.uid, rustix::process::geteuid().as_raw());
}
