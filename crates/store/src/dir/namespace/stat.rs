//! Attributes: what the store says about an inode, and what can be changed.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pinfold_mem::sys::FileHandle;
use rustix::fs::{FileType, Statx, StatxFlags, StatxTimestamp, Timespec};

/// What an inode is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
}

impl Kind {
    pub(super) fn from_type(file_type: FileType) -> Option<Self> {
        match file_type {
            FileType::RegularFile => Some(Self::File),
            FileType::Directory => Some(Self::Directory),
            FileType::Symlink => Some(Self::Symlink),
            FileType::Fifo => Some(Self::Fifo),
            FileType::Socket => Some(Self::Socket),
            FileType::CharacterDevice => Some(Self::CharDevice),
            FileType::BlockDevice => Some(Self::BlockDevice),
            FileType::Unknown => None,
        }
    }
}

/// Which inode: the same for all its hard links, different for the next owner of its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId {
    /// The device it lies on.
    pub device: u64,
    /// Its number there.
    pub inode: u64,
    /// What tells owners of the same number apart: derived from the file handle, else from the time of birth.
    pub generation: u64,
}

/// A point in time as inodes hold it: seconds and nanoseconds since 1970, perhaps before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Timestamp {
    /// Whole seconds, rounded down.
    pub seconds: i64,
    /// Nanoseconds on top, below a thousand million.
    pub nanoseconds: u32,
}

impl Timestamp {
    /// Reads the clock that filesystems use for times of change: as coarse as a timer tick, and never ahead of the
    /// next write's.
    #[must_use]
    pub fn now() -> Self {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::RealtimeCoarse);
        Self {
            seconds: now.tv_sec,
            nanoseconds: u32::try_from(now.tv_nsec).unwrap_or(0),
        }
    }

    pub(super) fn timespec(self) -> Timespec {
        Timespec {
            tv_sec: self.seconds,
            tv_nsec: self.nanoseconds.into(),
        }
    }
}

impl From<StatxTimestamp> for Timestamp {
    fn from(raw: StatxTimestamp) -> Self {
        Self {
            seconds: raw.tv_sec,
            nanoseconds: raw.tv_nsec,
        }
    }
}

impl From<Timestamp> for SystemTime {
    fn from(time: Timestamp) -> Self {
        let nanoseconds = Duration::from_nanos(time.nanoseconds.into());
        let seconds = Duration::from_secs(time.seconds.unsigned_abs());
        let whole = if time.seconds < 0 {
            UNIX_EPOCH.checked_sub(seconds)
        } else {
            UNIX_EPOCH.checked_add(seconds)
        };
        whole
            .and_then(|whole| whole.checked_add(nanoseconds))
            .unwrap_or(UNIX_EPOCH)
    }
}

impl From<SystemTime> for Timestamp {
    fn from(time: SystemTime) -> Self {
        match time.duration_since(UNIX_EPOCH) {
            Ok(after) => Self {
                seconds: i64::try_from(after.as_secs()).unwrap_or(i64::MAX),
                nanoseconds: after.subsec_nanos(),
            },
            Err(before) => {
                let before = before.duration();
                let borrow = i64::from(before.subsec_nanos() > 0);
                let seconds = i64::try_from(before.as_secs()).unwrap_or(i64::MAX);
                Self {
                    seconds: -seconds - borrow,
                    nanoseconds: (1_000_000_000 - before.subsec_nanos()) % 1_000_000_000,
                }
            }
        }
    }
}

/// What the store says about an inode; a file with cached changes is larger or younger than that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stat {
    /// Which inode.
    pub id: FileId,
    /// What it is.
    pub kind: Kind,
    /// Permission bits with set-user-id, set-group-id and sticky bit.
    pub permissions: u32,
    /// Number of hard links.
    pub links: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// The device it stands for, for device nodes.
    pub rdev: u64,
    /// Size in bytes.
    pub size: u64,
    /// Space taken, in units of 512 bytes.
    pub blocks: u64,
    /// The transfer size the filesystem recommends, in bytes.
    pub block_size: u32,
    /// Last access.
    pub accessed: Timestamp,
    /// Last change of the contents.
    pub modified: Timestamp,
    /// Last change of contents or attributes.
    pub changed: Timestamp,
    /// Creation, where the filesystem keeps it.
    pub born: Option<Timestamp>,
}

impl Stat {
    pub(super) fn new(raw: &Statx, name: Option<&FileHandle>) -> Self {
        let has_birth = raw.stx_mask & StatxFlags::BTIME.bits() != 0;
        let born = has_birth.then(|| Timestamp::from(raw.stx_btime));
        let generation = match (name, born) {
            (Some(name), _) => name.fingerprint(),
            (None, Some(born)) => {
                (born.seconds as u64).wrapping_mul(1_000_000_000) ^ u64::from(born.nanoseconds)
            }
            (None, None) => 0,
        };
        let id = FileId {
            device: rustix::fs::makedev(raw.stx_dev_major, raw.stx_dev_minor),
            inode: raw.stx_ino,
            generation,
        };
        Self::with_id(raw, id)
    }

    /// Reads attributes of an inode whose identity is known.
    pub(super) fn with_id(raw: &Statx, id: FileId) -> Self {
        let mode = u32::from(raw.stx_mode);
        let has_birth = raw.stx_mask & StatxFlags::BTIME.bits() != 0;
        Self {
            id,
            // Every inode is one of the seven.
            kind: Kind::from_type(FileType::from_raw_mode(mode)).unwrap_or(Kind::File),
            permissions: mode & 0o7777,
            links: raw.stx_nlink,
            uid: raw.stx_uid,
            gid: raw.stx_gid,
            rdev: rustix::fs::makedev(raw.stx_rdev_major, raw.stx_rdev_minor),
            size: raw.stx_size,
            blocks: raw.stx_blocks,
            block_size: raw.stx_blksize,
            accessed: raw.stx_atime.into(),
            modified: raw.stx_mtime.into(),
            changed: raw.stx_ctime.into(),
            born: has_birth.then(|| raw.stx_btime.into()),
        }
    }
}

/// What becomes of a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TimeChange {
    /// Nothing.
    #[default]
    Keep,
    /// The store's clock is read.
    Now,
    /// It is set.
    At(Timestamp),
}

/// Changes of attributes that the store makes; a size is not among them, since cached pages depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Change {
    /// New permission bits.
    pub permissions: Option<u32>,
    /// New owner.
    pub uid: Option<u32>,
    /// New group.
    pub gid: Option<u32>,
    /// Time of last access.
    pub accessed: TimeChange,
    /// Time of last modification.
    pub modified: TimeChange,
}

/// Space and limits of a filesystem; sizes in units of `fragment_size` bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpaceStat {
    /// All of it.
    pub blocks: u64,
    /// What is free.
    pub blocks_free: u64,
    /// What is free to users without privilege.
    pub blocks_available: u64,
    /// Inodes.
    pub files: u64,
    /// Free inodes.
    pub files_free: u64,
    /// The transfer size the filesystem recommends, in bytes.
    pub block_size: u32,
    /// The unit of the sizes above, in bytes.
    pub fragment_size: u32,
    /// The longest name, in bytes.
    pub name_max: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_1970_survive_the_way_through_system_time() {
        for (seconds, nanoseconds) in [(0, 0), (5, 7), (-1, 999_999_999), (-2, 0), (-86_400, 1)] {
            let time = Timestamp {
                seconds,
                nanoseconds,
            };
            assert_eq!(Timestamp::from(SystemTime::from(time)), time);
        }
    }
}
