//! Every operation on the mount against the same on a plain directory: results, error numbers, and what is left.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use rustix::fs::{
    Access, AtFlags, CWD, FallocateFlags, FileType, Gid, Mode, OFlags, RenameFlags, SeekFrom,
    Timespec, Timestamps, Uid, XattrFlags,
};
use rustix::io::Errno;

use crate::support::mounted;

type Outcome = Result<String, Errno>;
/// One step: its name, and what it does to a directory.
type Step = (&'static str, fn(&Path) -> Outcome);

fn open(path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::from_raw_mode(0o644))
}

fn done<T>(result: Result<T, Errno>) -> Outcome {
    result.map(|_| String::new())
}

/// What stat shows, less what differs between any two files.
fn shape(path: &Path) -> Outcome {
    let stat = rustix::fs::lstat(path)?;
    let size = if stat.st_mode & libc::S_IFMT == libc::S_IFDIR {
        0
    } else {
        stat.st_size
    };
    Ok(format!(
        "mode {:o} links {} owner {}:{} size {size} device {}",
        stat.st_mode, stat.st_nlink, stat.st_uid, stat.st_gid, stat.st_rdev
    ))
}

fn read_all(path: &Path) -> Outcome {
    let bytes = fs::read(path).map_err(|e| Errno::from_io_error(&e).unwrap())?;
    Ok(format!("{} bytes, sum {:x}", bytes.len(), sum(&bytes)))
}

fn sum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(7, |sum, &byte| {
        sum.wrapping_mul(31).wrapping_add(byte.into())
    })
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + i / 251) as u8).collect()
}

fn write_at(path: &Path, flags: OFlags, offset: u64, bytes: &[u8]) -> Outcome {
    let fd = open(path, OFlags::WRONLY | flags)?;
    let done = rustix::io::pwrite(&fd, bytes, offset)?;
    Ok(format!("{done} written"))
}

fn allocate(path: &Path, mode: FallocateFlags, offset: u64, len: u64) -> Outcome {
    let fd = open(path, OFlags::RDWR)?;
    rustix::fs::fallocate(&fd, mode, offset, len)?;
    Ok(format!("{} {}", shape(path)?, read_all(path)?))
}

fn seek(path: &Path, to: SeekFrom) -> Outcome {
    let fd = open(path, OFlags::RDONLY)?;
    rustix::fs::seek(&fd, to).map(|at| at.to_string())
}

fn names(path: &Path) -> Outcome {
    let fd = open(path, OFlags::RDONLY | OFlags::DIRECTORY)?;
    let mut names = Vec::new();
    for entry in rustix::fs::Dir::read_from(&fd)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        names.push(format!("{name} {:?}", entry.file_type()));
    }
    names.sort();
    Ok(names.join(", "))
}

fn xattr(path: &Path, name: &str, room: usize) -> Outcome {
    let mut buf = vec![0; room];
    let len = rustix::fs::lgetxattr(path, name, &mut buf)?;
    Ok(format!("{len} bytes, sum {:x}", sum(&buf[..len.min(room)])))
}

fn set_times(path: &Path, accessed: Timespec, modified: Timespec) -> Outcome {
    let times = Timestamps {
        last_access: accessed,
        last_modification: modified,
    };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)?;
    let stat = rustix::fs::lstat(path)?;
    Ok(format!("modified {}.{}", stat.st_mtime, stat.st_mtime_nsec))
}

const fn at(tv_sec: i64, tv_nsec: i64) -> Timespec {
    Timespec { tv_sec, tv_nsec }
}

const STEPS: &[Step] = &[
    ("create", |d| {
        done(open(&d.join("a"), OFlags::CREATE | OFlags::RDWR))
    }),
    ("create again", |d| {
        done(open(&d.join("a"), OFlags::CREATE | OFlags::RDWR))
    }),
    ("create exclusively what is there", |d| {
        done(open(
            &d.join("a"),
            OFlags::CREATE | OFlags::EXCL | OFlags::RDWR,
        ))
    }),
    ("shape of it", |d| shape(&d.join("a"))),
    ("mode 0 still gives its creator a descriptor", |d| {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR;
        let fd = rustix::fs::open(d.join("closed"), flags, Mode::empty())?;
        let written = rustix::io::pwrite(&fd, b"secret", 0)?;
        let mut buf = [0; 10];
        let read = rustix::io::pread(&fd, &mut buf[..], 0)?;
        Ok(format!("{written} {read} {}", shape(&d.join("closed"))?))
    }),
    ("open what is missing", |d| {
        done(open(&d.join("missing"), OFlags::RDONLY))
    }),
    ("open below a file", |d| {
        done(open(&d.join("a/b"), OFlags::RDONLY))
    }),
    ("open a directory for writing", |d| {
        done(open(d, OFlags::RDWR))
    }),
    ("open a file as a directory", |d| {
        done(open(&d.join("a"), OFlags::RDONLY | OFlags::DIRECTORY))
    }),
    ("a name of 255 bytes", |d| {
        done(open(
            &d.join("n".repeat(255)),
            OFlags::CREATE | OFlags::RDWR,
        ))
    }),
    ("a name of 256 bytes", |d| {
        done(open(
            &d.join("n".repeat(256)),
            OFlags::CREATE | OFlags::RDWR,
        ))
    }),
    ("write", |d| {
        write_at(&d.join("a"), OFlags::empty(), 0, &pattern(10_000))
    }),
    ("write past the end", |d| {
        write_at(&d.join("a"), OFlags::empty(), 20_000, b"far")
    }),
    ("write at the largest offset", |d| {
        write_at(&d.join("a"), OFlags::empty(), i64::MAX as u64 - 1, b"xy")
    }),
    ("write nothing", |d| {
        write_at(&d.join("a"), OFlags::empty(), 99_999, b"")
    }),
    ("write through a read-only descriptor", |d| {
        let fd = open(&d.join("a"), OFlags::RDONLY)?;
        done(rustix::io::pwrite(&fd, b"x", 0))
    }),
    ("contents", |d| read_all(&d.join("a"))),
    ("append", |d| {
        let file = fs::OpenOptions::new().append(true).open(d.join("a"));
        let file = file.map_err(|e| Errno::from_io_error(&e).unwrap())?;
        // pwrite on an appending descriptor appends on Linux.
        file.write_at(b"appended", 0)
            .map_err(|e| Errno::from_io_error(&e).unwrap())?;
        read_all(&d.join("a"))
    }),
    ("read past the end", |d| {
        let fd = open(&d.join("a"), OFlags::RDONLY)?;
        let mut buf = [0; 100];
        Ok(rustix::io::pread(&fd, &mut buf[..], 1 << 40)?.to_string())
    }),
    ("seek to data", |d| seek(&d.join("a"), SeekFrom::Data(0))),
    ("seek to a hole", |d| seek(&d.join("a"), SeekFrom::Hole(0))),
    ("seek to data behind the hole", |d| {
        seek(&d.join("a"), SeekFrom::Data(14_000))
    }),
    ("seek past the end", |d| {
        seek(&d.join("a"), SeekFrom::Data(1 << 40))
    }),
    ("truncate", |d| {
        rustix::fs::ftruncate(open(&d.join("a"), OFlags::RDWR)?, 5_001)?;
        read_all(&d.join("a"))
    }),
    ("extend", |d| {
        rustix::fs::ftruncate(open(&d.join("a"), OFlags::RDWR)?, 9_000)?;
        read_all(&d.join("a"))
    }),
    ("truncate through a read-only descriptor", |d| {
        done(rustix::fs::ftruncate(
            open(&d.join("a"), OFlags::RDONLY)?,
            0,
        ))
    }),
    ("truncate by an open", |d| {
        let bytes = pattern(5_000);
        fs::write(d.join("t"), &bytes).unwrap();
        drop(open(&d.join("t"), OFlags::RDWR | OFlags::TRUNC)?);
        shape(&d.join("t"))
    }),
    ("truncate by an open for reading", |d| {
        fs::write(d.join("t"), "x").unwrap();
        drop(open(&d.join("t"), OFlags::RDONLY | OFlags::TRUNC)?);
        shape(&d.join("t"))
    }),
    ("reserve", |d| {
        allocate(&d.join("a"), FallocateFlags::KEEP_SIZE, 0, 100_000)
    }),
    ("reserve and grow", |d| {
        allocate(&d.join("a"), FallocateFlags::empty(), 8_000, 30_000)
    }),
    ("punch", |d| {
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        allocate(&d.join("a"), mode, 1_000, 5_000)
    }),
    ("zero", |d| {
        allocate(&d.join("a"), FallocateFlags::ZERO_RANGE, 100, 50)
    }),
    ("zero and grow", |d| {
        allocate(&d.join("a"), FallocateFlags::ZERO_RANGE, 37_990, 100)
    }),
    ("reserve nothing", |d| {
        allocate(&d.join("a"), FallocateFlags::empty(), 0, 0)
    }),
    ("punch without keeping the size", |d| {
        allocate(&d.join("a"), FallocateFlags::PUNCH_HOLE, 0, 10)
    }),
    ("copy a range", |d| {
        let (from, to) = (
            open(&d.join("a"), OFlags::RDONLY)?,
            open(&d.join("copy"), OFlags::CREATE | OFlags::RDWR)?,
        );
        let (mut at_in, mut at_out) = (7, 4_099);
        let n =
            rustix::fs::copy_file_range(&from, Some(&mut at_in), &to, Some(&mut at_out), 30_000)?;
        Ok(format!(
            "{n} {at_in} {at_out} {}",
            read_all(&d.join("copy"))?
        ))
    }),
    ("copy past the end", |d| {
        let (from, to) = (
            open(&d.join("a"), OFlags::RDONLY)?,
            open(&d.join("copy"), OFlags::RDWR)?,
        );
        let mut at_in = 1 << 30;
        Ok(rustix::fs::copy_file_range(&from, Some(&mut at_in), &to, None, 10)?.to_string())
    }),
    ("make a directory", |d| {
        rustix::fs::mkdir(d.join("d"), Mode::from_raw_mode(0o751))?;
        shape(&d.join("d"))
    }),
    ("make it again", |d| {
        done(rustix::fs::mkdir(d.join("d"), Mode::RWXU))
    }),
    ("link", |d| {
        rustix::fs::link(d.join("a"), d.join("d/hard"))?;
        let same =
            rustix::fs::stat(d.join("a"))?.st_ino == rustix::fs::stat(d.join("d/hard"))?.st_ino;
        Ok(format!("{same} {}", shape(&d.join("d/hard"))?))
    }),
    ("link a directory", |d| {
        done(rustix::fs::link(d.join("d"), d.join("e")))
    }),
    ("link over something", |d| {
        done(rustix::fs::link(d.join("a"), d.join("t")))
    }),
    ("symlink", |d| {
        rustix::fs::symlink("d/hard", d.join("soft"))?;
        shape(&d.join("soft"))
    }),
    ("read the link", |d| {
        let target = rustix::fs::readlink(d.join("soft"), Vec::new())?;
        Ok(target.to_string_lossy().into_owned())
    }),
    ("read through the link", |d| read_all(&d.join("soft"))),
    ("open the link itself", |d| {
        done(open(&d.join("soft"), OFlags::RDONLY | OFlags::NOFOLLOW))
    }),
    ("links in a circle", |d| {
        rustix::fs::symlink("loop2", d.join("loop1"))?;
        rustix::fs::symlink("loop1", d.join("loop2"))?;
        done(open(&d.join("loop1"), OFlags::RDONLY))
    }),
    ("read no link", |d| {
        done(rustix::fs::readlink(d.join("a"), Vec::new()))
    }),
    ("a long link", |d| {
        rustix::fs::symlink("x".repeat(4_000), d.join("long"))?;
        Ok(rustix::fs::readlink(d.join("long"), Vec::new())?
            .to_bytes()
            .len()
            .to_string())
    }),
    ("pipe", |d| {
        rustix::fs::mknodat(CWD, d.join("pipe"), FileType::Fifo, Mode::RUSR, 0)?;
        shape(&d.join("pipe"))
    }),
    ("device", |d| {
        let device = rustix::fs::makedev(1, 3);
        rustix::fs::mknodat(
            CWD,
            d.join("null"),
            FileType::CharacterDevice,
            Mode::RUSR,
            device,
        )?;
        let mut buf = [0; 1];
        let read = rustix::io::read(open(&d.join("null"), OFlags::RDONLY)?, &mut buf[..])?;
        Ok(format!("{read} {}", shape(&d.join("null"))?))
    }),
    ("change the mode", |d| {
        rustix::fs::chmod(d.join("a"), Mode::from_raw_mode(0o4711))?;
        shape(&d.join("a"))
    }),
    ("change the owner: set-id bits go", |d| {
        rustix::fs::chown(
            d.join("a"),
            Some(Uid::from_raw(12)),
            Some(Gid::from_raw(34)),
        )?;
        shape(&d.join("a"))
    }),
    ("change the owner of a link", |d| {
        let uid = Some(Uid::from_raw(56));
        rustix::fs::chownat(CWD, d.join("soft"), uid, None, AtFlags::SYMLINK_NOFOLLOW)?;
        shape(&d.join("soft"))
    }),
    ("set times", |d| {
        set_times(&d.join("a"), at(5, 6), at(1_000_000, 123_456_789))
    }),
    ("set times before 1970", |d| {
        set_times(&d.join("a"), at(0, 0), at(-100, 5))
    }),
    ("set times after 2038", |d| {
        set_times(&d.join("a"), at(0, 0), at(1 << 32, 0))
    }),
    ("set one time", |d| {
        set_times(
            &d.join("a"),
            at(0, rustix::fs::UTIME_NOW),
            at(0, rustix::fs::UTIME_OMIT),
        )
    }),
    ("set a link's times", |d| {
        set_times(&d.join("soft"), at(0, 0), at(77, 8))
    }),
    ("a time that was set survives a sync", |d| {
        let fd = open(&d.join("a"), OFlags::RDWR)?;
        rustix::io::pwrite(&fd, b"new", 0)?;
        set_times(&d.join("a"), at(1, 0), at(2, 3))?;
        rustix::fs::fsync(&fd)?;
        drop(fd);
        let stat = rustix::fs::stat(d.join("a"))?;
        Ok(format!("{}.{}", stat.st_mtime, stat.st_mtime_nsec))
    }),
    ("access", |d| {
        done(rustix::fs::access(d.join("a"), Access::READ_OK))
    }),
    ("access to what is missing", |d| {
        done(rustix::fs::access(d.join("missing"), Access::EXISTS))
    }),
    ("set an attribute", |d| {
        let value = pattern(700);
        done(rustix::fs::lsetxattr(
            d.join("a"),
            "user.v",
            &value,
            XattrFlags::empty(),
        ))
    }),
    ("set it again exclusively", |d| {
        done(rustix::fs::lsetxattr(
            d.join("a"),
            "user.v",
            b"",
            XattrFlags::CREATE,
        ))
    }),
    ("replace an attribute that is not there", |d| {
        done(rustix::fs::lsetxattr(
            d.join("a"),
            "user.w",
            b"",
            XattrFlags::REPLACE,
        ))
    }),
    ("ask for its size", |d| xattr(&d.join("a"), "user.v", 0)),
    ("read it", |d| xattr(&d.join("a"), "user.v", 1000)),
    ("read it into too little", |d| {
        xattr(&d.join("a"), "user.v", 10)
    }),
    ("read what is not there", |d| {
        xattr(&d.join("a"), "user.none", 10)
    }),
    ("read what cannot be", |d| {
        xattr(&d.join("a"), "nonsense", 10)
    }),
    ("a user attribute on a link", |d| {
        done(rustix::fs::lsetxattr(
            d.join("soft"),
            "user.v",
            b"x",
            XattrFlags::empty(),
        ))
    }),
    ("list attributes", |d| {
        let mut buf = [0; 1000];
        let len = rustix::fs::llistxattr(d.join("a"), &mut buf)?;
        Ok(String::from_utf8_lossy(&buf[..len]).into_owned())
    }),
    ("remove an attribute", |d| {
        done(rustix::fs::lremovexattr(d.join("a"), "user.v"))
    }),
    ("remove it again", |d| {
        done(rustix::fs::lremovexattr(d.join("a"), "user.v"))
    }),
    ("list a directory", names),
    ("rename", |d| {
        rustix::fs::rename(d.join("t"), d.join("d/moved"))?;
        names(&d.join("d"))
    }),
    ("rename over a file", |d| {
        fs::write(d.join("new"), "new").unwrap();
        rustix::fs::rename(d.join("new"), d.join("d/moved"))?;
        read_all(&d.join("d/moved"))
    }),
    ("rename without replacing", |d| {
        done(rustix::fs::renameat_with(
            CWD,
            d.join("a"),
            CWD,
            d.join("d/moved"),
            RenameFlags::NOREPLACE,
        ))
    }),
    ("exchange", |d| {
        rustix::fs::renameat_with(
            CWD,
            d.join("a"),
            CWD,
            d.join("d/moved"),
            RenameFlags::EXCHANGE,
        )?;
        Ok(format!(
            "{} {}",
            read_all(&d.join("a"))?,
            shape(&d.join("d/moved"))?
        ))
    }),
    ("exchange with a directory", |d| {
        rustix::fs::renameat_with(CWD, d.join("a"), CWD, d.join("d"), RenameFlags::EXCHANGE)?;
        rustix::fs::renameat_with(CWD, d.join("a"), CWD, d.join("d"), RenameFlags::EXCHANGE)?;
        names(d)
    }),
    ("exchange with nothing", |d| {
        done(rustix::fs::renameat_with(
            CWD,
            d.join("a"),
            CWD,
            d.join("missing"),
            RenameFlags::EXCHANGE,
        ))
    }),
    ("rename a directory into itself", |d| {
        done(rustix::fs::rename(d.join("d"), d.join("d/inside")))
    }),
    ("rename a file over a directory", |d| {
        done(rustix::fs::rename(d.join("a"), d.join("d")))
    }),
    ("rename a directory over a full one", |d| {
        rustix::fs::mkdir(d.join("e"), Mode::RWXU)?;
        done(rustix::fs::rename(d.join("e"), d.join("d")))
    }),
    ("rename a directory over an empty one", |d| {
        rustix::fs::mkdir(d.join("f"), Mode::RWXU)?;
        rustix::fs::rename(d.join("e"), d.join("f"))?;
        names(d)
    }),
    ("rename what is missing", |d| {
        done(rustix::fs::rename(d.join("missing"), d.join("x")))
    }),
    ("remove a directory that is full", |d| {
        done(rustix::fs::rmdir(d.join("d")))
    }),
    ("remove a file as a directory", |d| {
        done(rustix::fs::rmdir(d.join("a")))
    }),
    ("remove a directory as a file", |d| {
        done(rustix::fs::unlink(d.join("d")))
    }),
    ("remove what is missing", |d| {
        done(rustix::fs::unlink(d.join("missing")))
    }),
    ("use a file that is gone", |d| {
        let fd = open(&d.join("gone"), OFlags::CREATE | OFlags::RDWR)?;
        rustix::io::pwrite(&fd, b"still here", 0)?;
        rustix::fs::unlink(d.join("gone"))?;
        let mut buf = [0; 20];
        let read = rustix::io::pread(&fd, &mut buf[..], 0)?;
        rustix::fs::ftruncate(&fd, 3)?;
        rustix::fs::fchmod(&fd, Mode::RUSR)?;
        let stat = rustix::fs::fstat(&fd)?;
        Ok(format!(
            "{read} {} {} {:o}",
            stat.st_nlink, stat.st_size, stat.st_mode
        ))
    }),
    ("use a directory that is gone", |d| {
        rustix::fs::mkdir(d.join("gone"), Mode::RWXU)?;
        let fd = open(&d.join("gone"), OFlags::RDONLY | OFlags::DIRECTORY)?;
        rustix::fs::rmdir(d.join("gone"))?;
        done(rustix::fs::openat(
            &fd,
            "x",
            OFlags::CREATE | OFlags::RDWR,
            Mode::RWXU,
        ))
    }),
    ("sync a directory", |d| {
        done(rustix::fs::fsync(open(&d.join("d"), OFlags::RDONLY)?))
    }),
    ("sync a file's data", |d| {
        done(rustix::fs::fdatasync(open(&d.join("a"), OFlags::RDONLY)?))
    }),
    ("write directly, aligned", |d| {
        let bytes = Aligned::filled(8192);
        write_at(
            &d.join("direct"),
            OFlags::CREATE | OFlags::DIRECT,
            4096,
            bytes.bytes(),
        )?;
        read_all(&d.join("direct"))
    }),
    ("write directly at an odd offset", |d| {
        let bytes = Aligned::filled(4096);
        write_at(&d.join("direct"), OFlags::DIRECT, 100, bytes.bytes())
    }),
    ("read directly up to the end", |d| {
        rustix::fs::ftruncate(open(&d.join("direct"), OFlags::WRONLY)?, 10_000)?;
        let fd = open(&d.join("direct"), OFlags::RDONLY | OFlags::DIRECT)?;
        let mut buf = Aligned::filled(16_384);
        let read = rustix::io::pread(&fd, buf.bytes_mut(), 0)?;
        Ok(format!("{read} {:x}", sum(&buf.bytes()[..read])))
    }),
    ("remove it all", |d| {
        for entry in fs::read_dir(d).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() && !path.is_symlink() {
                fs::remove_dir_all(&path).unwrap();
            } else {
                fs::remove_file(&path).unwrap();
            }
        }
        names(d)
    }),
];

/// Memory aligned for direct transfers, found inside a larger piece.
struct Aligned(Vec<u8>, usize, usize);

impl Aligned {
    fn filled(len: usize) -> Self {
        let raw = pattern(len + 4096);
        let start = raw.as_ptr().align_offset(4096);
        Self(raw, start, len)
    }

    fn bytes(&self) -> &[u8] {
        &self.0[self.1..self.1 + self.2]
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.0[self.1..self.1 + self.2]
    }
}

#[test]
fn every_operation_ends_as_on_a_plain_directory() {
    let Some(fixture) = mounted() else { return };
    let mut different = Vec::new();
    for (name, step) in STEPS {
        // The bytes that the pattern puts in front of the aligned part depend on its address.
        let (plain, mounted) = (step(&fixture.plain), step(&fixture.mnt));
        let placed =
            name.starts_with("write directly, aligned") || name.starts_with("read directly");
        let same = match (&plain, &mounted) {
            (Ok(_), Ok(_)) if placed => true,
            _ => plain == mounted,
        };
        if !same {
            different.push(format!(
                "{name}:\n  plain   {plain:?}\n  mounted {mounted:?}"
            ));
        }
    }
    assert!(different.is_empty(), "{}", different.join("\n"));
}

#[test]
fn what_was_done_on_the_mount_is_in_the_directory_after_a_sync() {
    let Some(fixture) = mounted() else { return };
    for (_, step) in &STEPS[..STEPS.len() - 1] {
        let _ = step(&fixture.mnt);
    }
    fixture.volume.sync().unwrap();
    compare(&fixture.mnt, &fixture.data);
}

fn compare(mounted: &Path, stored: &Path) {
    assert_eq!(names(mounted), names(stored));
    for entry in fs::read_dir(stored).unwrap() {
        let name = entry.unwrap().file_name();
        let (ours, theirs) = (mounted.join(&name), stored.join(&name));
        assert_eq!(shape(&ours), shape(&theirs), "{}", theirs.display());
        let stat = fs::symlink_metadata(&theirs).unwrap();
        let times = |path: &Path| {
            let stat = fs::symlink_metadata(path).unwrap();
            (stat.mtime(), stat.mtime_nsec())
        };
        if stat.is_dir() {
            compare(&ours, &theirs);
        } else if stat.is_file() {
            assert_eq!(read_all(&ours), read_all(&theirs), "{}", theirs.display());
            assert_eq!(times(&ours), times(&theirs), "{}", theirs.display());
        }
    }
}
