//! Attributes as the volume's users see them: the store's, with the live size and times of cached changes.

use std::time::SystemTime;

use pinfold_store::dir::namespace::{Stat, TimeChange};

pub use pinfold_store::dir::namespace::{Caller, FileId as NodeId, Kind, SpaceStat as Statfs};

/// Attributes of an inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Metadata {
    /// Which inode.
    pub id: NodeId,
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
    /// Live size in bytes.
    pub len: u64,
    /// Space taken in the store, in units of 512 bytes; never 0 for a file that has data waiting to be stored.
    pub blocks: u64,
    /// The transfer size the store recommends, in bytes.
    pub block_size: u32,
    /// Last access.
    pub accessed: SystemTime,
    /// Last change of the contents.
    pub modified: SystemTime,
    /// Last change of contents or attributes.
    pub changed: SystemTime,
    /// Creation, where the store keeps it.
    pub born: Option<SystemTime>,
}

impl From<&Stat> for Metadata {
    fn from(stat: &Stat) -> Self {
        Self {
            id: stat.id,
            kind: stat.kind,
            permissions: stat.permissions,
            links: stat.links,
            uid: stat.uid,
            gid: stat.gid,
            rdev: stat.rdev,
            len: stat.size,
            blocks: stat.blocks,
            block_size: stat.block_size,
            accessed: stat.accessed.into(),
            modified: stat.modified.into(),
            changed: stat.changed.into(),
            born: stat.born.map(SystemTime::from),
        }
    }
}

impl Metadata {
    /// Tells whether it is a regular file.
    #[must_use]
    pub fn is_file(&self) -> bool {
        self.kind == Kind::File
    }

    /// Tells whether it is a directory.
    #[must_use]
    pub fn is_dir(&self) -> bool {
        self.kind == Kind::Directory
    }

    /// Tells whether it is a symbolic link.
    #[must_use]
    pub fn is_symlink(&self) -> bool {
        self.kind == Kind::Symlink
    }
}

/// What becomes of a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SetTime {
    /// Nothing.
    #[default]
    Keep,
    /// It becomes the present.
    Now,
    /// It is set.
    At(SystemTime),
}

impl From<SetTime> for TimeChange {
    fn from(time: SetTime) -> Self {
        match time {
            SetTime::Keep => Self::Keep,
            SetTime::Now => Self::Now,
            SetTime::At(at) => Self::At(at.into()),
        }
    }
}

/// Changes of attributes; what is not set stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SetAttributes {
    /// New permission bits.
    pub permissions: Option<u32>,
    /// New owner.
    pub uid: Option<u32>,
    /// New group.
    pub gid: Option<u32>,
    /// New size in bytes.
    pub len: Option<u64>,
    /// Time of last access.
    pub accessed: SetTime,
    /// Time of last modification.
    pub modified: SetTime,
}

/// Whose a created inode is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Owner {
    /// This process's, under its umask.
    #[default]
    Process,
    /// Somebody else's, as far as this process has the privilege; else as with `Process`, under the caller's umask.
    /// The calling thread gets a working directory of its own by that.
    Caller(Caller),
}

impl Owner {
    pub(crate) fn caller(&self) -> Option<&Caller> {
        match self {
            Self::Process => None,
            Self::Caller(caller) => Some(caller),
        }
    }
}
