//! Attributes in FUSE's terms, and error numbers.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{FileAttr, FileType, INodeNo, TimeOrNow};
use pinfold::{Kind, Metadata, SetTime};

/// How long the kernel may use attributes and names without asking.
///
/// All changes through the mount keep the kernel's own copies right; the limit bounds how long changes made behind the
/// mount's back stay unseen.
pub(crate) const VALID: Duration = Duration::from_secs(1);

/// Bits of a mode that are permissions.
pub(crate) const PERMISSIONS: u32 = 0o7777;

pub(crate) fn file_attr(number: u64, metadata: &Metadata) -> FileAttr {
    FileAttr {
        ino: INodeNo(number),
        size: metadata.len,
        blocks: metadata.blocks,
        atime: metadata.accessed,
        mtime: metadata.modified,
        ctime: metadata.changed,
        crtime: metadata.born.unwrap_or(metadata.changed),
        kind: file_type(metadata.kind),
        perm: (metadata.permissions & PERMISSIONS) as u16,
        nlink: metadata.links,
        uid: metadata.uid,
        gid: metadata.gid,
        rdev: encode_device(metadata.rdev),
        blksize: metadata.block_size,
        flags: 0,
    }
}

/// Returns what stands for no inode at all in an answer to a look-up.
pub(crate) fn absent() -> FileAttr {
    FileAttr {
        ino: INodeNo(0),
        size: 0,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: FileType::RegularFile,
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 0,
        flags: 0,
    }
}

pub(crate) fn file_type(kind: Kind) -> FileType {
    match kind {
        Kind::File => FileType::RegularFile,
        Kind::Directory => FileType::Directory,
        Kind::Symlink => FileType::Symlink,
        Kind::Fifo => FileType::NamedPipe,
        Kind::Socket => FileType::Socket,
        Kind::CharDevice => FileType::CharDevice,
        Kind::BlockDevice => FileType::BlockDevice,
    }
}

/// Reads the kind out of a mode.
pub(crate) fn kind_of(mode: u32) -> Option<Kind> {
    match mode & libc::S_IFMT {
        // mknod(2): no type means a regular file.
        0 | libc::S_IFREG => Some(Kind::File),
        libc::S_IFDIR => Some(Kind::Directory),
        libc::S_IFLNK => Some(Kind::Symlink),
        libc::S_IFIFO => Some(Kind::Fifo),
        libc::S_IFSOCK => Some(Kind::Socket),
        libc::S_IFCHR => Some(Kind::CharDevice),
        libc::S_IFBLK => Some(Kind::BlockDevice),
        _ => None,
    }
}

/// Packs a device number as the FUSE protocol carries it: 12 bits of major, 20 of minor, minor's low byte first.
fn encode_device(device: u64) -> u32 {
    let (major, minor) = (libc::major(device), libc::minor(device));
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

/// Unpacks a device number as the FUSE protocol carries it.
pub(crate) fn decode_device(device: u32) -> u64 {
    let major = (device & 0x000f_ff00) >> 8;
    let minor = (device & 0xff) | ((device >> 12) & 0x000f_ff00);
    libc::makedev(major, minor)
}

pub(crate) fn set_time(time: Option<TimeOrNow>) -> SetTime {
    match time {
        None => SetTime::Keep,
        Some(TimeOrNow::Now) => SetTime::Now,
        Some(TimeOrNow::SpecificTime(at)) => SetTime::At(corrected(at)),
    }
}

/// Undoes a mistake of the protocol library (fuser 0.18), which takes the nanoseconds of a time before 1970 away instead
/// of adding them. The mount's comparison with a plain directory fails when it is mended there.
fn corrected(at: SystemTime) -> SystemTime {
    let nanoseconds = UNIX_EPOCH
        .duration_since(at)
        .map_or(0, |before| before.subsec_nanos());
    at + 2 * Duration::from_nanos(nanoseconds.into())
}

pub(crate) fn errno(number: pinfold::Errno) -> fuser::Errno {
    fuser::Errno::from_i32(number.raw())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_survive_the_protocol() {
        for (major, minor) in [(0, 0), (8, 1), (259, 300), (4095, 0xf_ffff), (1, 3)] {
            let device = libc::makedev(major, minor);
            assert_eq!(
                decode_device(encode_device(device)),
                device,
                "{major}:{minor}"
            );
        }
    }
}
