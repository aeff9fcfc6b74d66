//! One inode: operations on its names, attributes and descriptors.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use pinfold_base::Errno;
use pinfold_mem::creds::{Assumed, Caller, assume};
use pinfold_mem::sys::FileHandle;
use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, StatxFlags, Timespec, Timestamps, Uid,
};

use super::Space;
use super::entries::Entries;
use super::stat::{Change, FileId, Kind, SpaceStat, Stat, TimeChange};
use crate::dir::object::Reopen;

pub use rustix::fs::RenameFlags;
pub use rustix::fs::XattrFlags as SetXattr;

/// The largest value of an extended attribute, and the longest list of names (`XATTR_SIZE_MAX`, `XATTR_LIST_MAX`).
const XATTR_BYTES_MAX: usize = 64 << 10;
/// Tries at reading an extended attribute that grows meanwhile.
const XATTR_TRIES_MAX: u32 = 8;
/// The extended attribute that carries the access ACL.
const ACL_ACCESS: &[u8] = b"system.posix_acl_access";

/// One inode of a [`Namespace`](super::Namespace).
pub struct Handle {
    space: Arc<Space>,
    id: FileId,
    kind: Kind,
    /// How to open it again once its descriptor is closed: its name, and its mount.
    again: Option<(FileHandle, Arc<OwnedFd>)>,
    path: Mutex<Option<Arc<OwnedFd>>>,
    /// Used since the clock's hand came by last.
    used: AtomicBool,
    /// Its descriptor is never closed: the inode has no name left.
    pinned: AtomicBool,
}

impl std::fmt::Debug for Handle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Handle({:?} {:?})", self.kind, self.id)
    }
}

fn errno(e: rustix::io::Errno) -> Errno {
    Errno::from_raw(e.raw_os_error())
}

/// The path through which calls that take no `O_PATH` descriptor reach its inode, symbolic links included.
fn proc_path(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// Refuses names that are none: they would leave the directory.
fn check(name: &OsStr) -> Result<(), Errno> {
    let bytes = name.as_bytes();
    if bytes.is_empty() {
        return Err(Errno::ENOENT);
    }
    if bytes == b"." || bytes == b".." || bytes.contains(&b'/') || bytes.contains(&0) {
        return Err(Errno::EINVAL);
    }
    Ok(())
}

fn become_caller(caller: Option<&Caller>) -> Result<Option<Assumed>, Errno> {
    caller.map(assume).transpose()
}

impl Handle {
    pub(super) fn new(
        space: Arc<Space>,
        fd: OwnedFd,
        id: FileId,
        kind: Kind,
        again: Option<(FileHandle, Arc<OwnedFd>)>,
    ) -> Self {
        Self {
            space,
            id,
            kind,
            again,
            path: Mutex::new(Some(Arc::new(fd))),
            used: AtomicBool::new(true),
            pinned: AtomicBool::new(false),
        }
    }

    /// Returns which inode this is.
    #[must_use]
    pub fn id(&self) -> FileId {
        self.id
    }

    /// Returns what it is.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Keeps the descriptor from now on: for an inode that loses its last name, which no filesystem need find again.
    ///
    /// # Errors
    /// `ESTALE` when it is gone already; `EMFILE`.
    pub fn pin(self: &Arc<Self>) -> Result<(), Errno> {
        self.pinned.store(true, Ordering::Relaxed);
        self.path_fd().map(drop)
    }

    /// Takes [`Handle::pin`] back: the inode has names left after all.
    pub fn unpin(&self) {
        self.pinned.store(false, Ordering::Relaxed);
    }

    /// Returns the `O_PATH` descriptor, opened again if it was closed.
    fn path_fd(self: &Arc<Self>) -> Result<Arc<OwnedFd>, Errno> {
        self.used.store(true, Ordering::Relaxed);
        if let Some(fd) = &*self.path.lock() {
            return Ok(Arc::clone(fd));
        }
        let (name, mount) = self.again.as_ref().ok_or(Errno::ESTALE)?;
        let fd = Arc::new(name.open(mount, OFlags::PATH | OFlags::NOFOLLOW)?);
        // Two threads may both have opened it: the later one's stays, the other closes when its user is done.
        let fresh = self.path.lock().replace(Arc::clone(&fd)).is_none();
        if fresh {
            self.space.note_holding(self);
        }
        Ok(fd)
    }

    /// Tells whether the handle was used since it was last asked.
    pub(super) fn take_second_chance(&self) -> bool {
        self.used.swap(false, Ordering::Relaxed)
    }

    /// Closes the descriptor if it can be opened again.
    pub(super) fn close(&self) {
        if self.again.is_some() && !self.pinned.load(Ordering::Relaxed) {
            let closed = self.path.lock().take();
            drop(closed);
        }
    }

    pub(super) fn space_shared(&self) -> &Space {
        &self.space
    }

    fn open_path(self: &Arc<Self>, flags: OFlags) -> Result<OwnedFd, Errno> {
        let fd = self.path_fd()?;
        let flags = (flags & !OFlags::NOFOLLOW) | OFlags::CLOEXEC | OFlags::NOCTTY;
        rustix::fs::openat(CWD, proc_path(&fd), flags, Mode::empty()).map_err(errno)
    }

    /// Finds `name` in this directory.
    ///
    /// # Errors
    /// `ENOENT`, `ENOTDIR`, `EINVAL` for what is no name; `ENAMETOOLONG`; `EMFILE`.
    pub fn lookup(self: &Arc<Self>, name: &OsStr) -> Result<(Arc<Self>, Stat), Errno> {
        check(name)?;
        let dir = self.path_fd()?;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&*dir, name, flags, Mode::empty()).map_err(errno)?;
        self.space.adopt(fd)
    }

    /// Returns the attributes.
    ///
    /// # Errors
    /// What statx(2) says.
    pub fn stat(self: &Arc<Self>) -> Result<Stat, Errno> {
        let fd = self.path_fd()?;
        let wanted = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
        let raw = rustix::fs::statx(&*fd, "", AtFlags::EMPTY_PATH, wanted).map_err(errno)?;
        Ok(Stat::with_id(&raw, self.id))
    }

    /// Changes attributes and returns what they are then.
    ///
    /// # Errors
    /// What chown(2), chmod(2) and utimensat(2) say; a change before the failing one stays.
    pub fn change(self: &Arc<Self>, change: &Change) -> Result<Stat, Errno> {
        let fd = self.path_fd()?;
        if change.uid.is_some() || change.gid.is_some() {
            let (uid, gid) = (change.uid.map(Uid::from_raw), change.gid.map(Gid::from_raw));
            rustix::fs::chownat(&*fd, "", uid, gid, AtFlags::EMPTY_PATH).map_err(errno)?;
        }
        // After the owner: changing that clears the set-user-id bits.
        if let Some(permissions) = change.permissions {
            if self.kind == Kind::Symlink {
                return Err(Errno::EOPNOTSUPP);
            }
            let mode = Mode::from_raw_mode(permissions & 0o7777);
            rustix::fs::chmod(proc_path(&fd), mode).map_err(errno)?;
        }
        if (change.accessed, change.modified) != (TimeChange::Keep, TimeChange::Keep) {
            let times = Timestamps {
                last_access: timespec(change.accessed),
                last_modification: timespec(change.modified),
            };
            rustix::fs::utimensat(CWD, proc_path(&fd), &times, AtFlags::empty()).map_err(errno)?;
        }
        self.stat()
    }

    /// Creates a regular file, which must not exist, open for reading and writing whatever `mode` says.
    ///
    /// # Errors
    /// What open(2) says with `O_CREAT | O_EXCL`.
    pub fn create(
        self: &Arc<Self>,
        name: &OsStr,
        mode: u32,
        caller: Option<&Caller>,
    ) -> Result<(Arc<Self>, Stat, OwnedFd), Errno> {
        check(name)?;
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
        self.make_file(Some(name), flags, mode, caller)
    }

    /// Creates a regular file without a name (`O_TMPFILE`), open for reading and writing.
    ///
    /// # Errors
    /// `EOPNOTSUPP` where the filesystem cannot.
    pub fn create_unnamed(
        self: &Arc<Self>,
        mode: u32,
        caller: Option<&Caller>,
    ) -> Result<(Arc<Self>, Stat, OwnedFd), Errno> {
        let (handle, stat, fd) = self.make_file(None, OFlags::TMPFILE, mode, caller)?;
        handle.pin()?;
        Ok((handle, stat, fd))
    }

    fn make_file(
        self: &Arc<Self>,
        name: Option<&OsStr>,
        flags: OFlags,
        mode: u32,
        caller: Option<&Caller>,
    ) -> Result<(Arc<Self>, Stat, OwnedFd), Errno> {
        let dir = self.path_fd()?;
        let flags = flags | OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let mode = Mode::from_raw_mode(mode & 0o7777);
        let fd = {
            let _as_caller = become_caller(caller)?;
            match name {
                Some(name) => rustix::fs::openat(&*dir, name, flags, mode),
                None => rustix::fs::openat(CWD, proc_path(&dir), flags, mode),
            }
            .map_err(errno)?
        };
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let again = || rustix::fs::openat(CWD, proc_path(&fd), flags, Mode::empty());
        // The file is there: failing now for want of a descriptor would leave it behind.
        let path = again().or_else(|_| {
            self.space.close_all();
            again()
        });
        let (handle, stat) = self.space.adopt(path.map_err(errno)?)?;
        Ok((handle, stat, fd))
    }

    /// Makes a directory.
    ///
    /// # Errors
    /// What mkdir(2) says.
    pub fn make_dir(
        self: &Arc<Self>,
        name: &OsStr,
        mode: u32,
        caller: Option<&Caller>,
    ) -> Result<(Arc<Self>, Stat), Errno> {
        check(name)?;
        let dir = self.path_fd()?;
        {
            let _as_caller = become_caller(caller)?;
            rustix::fs::mkdirat(&*dir, name, Mode::from_raw_mode(mode & 0o7777)).map_err(errno)?;
        }
        self.lookup(name)
    }

    /// Makes an inode of any kind but directory and symbolic link.
    ///
    /// # Errors
    /// What mknod(2) says; `EINVAL` for those two kinds.
    pub fn make_node(
        self: &Arc<Self>,
        name: &OsStr,
        kind: Kind,
        mode: u32,
        rdev: u64,
        caller: Option<&Caller>,
    ) -> Result<(Arc<Self>, Stat), Errno> {
        check(name)?;
        let file_type = match kind {
            Kind::File => FileType::RegularFile,
            Kind::Fifo => FileType::Fifo,
            Kind::Socket => FileType::Socket,
            Kind::CharDevice => FileType::CharacterDevice,
            Kind::BlockDevice => FileType::BlockDevice,
            Kind::Directory | Kind::Symlink => return Err(Errno::EINVAL),
        };
        let dir = self.path_fd()?;
        {
            let _as_caller = become_caller(caller)?;
            let mode = Mode::from_raw_mode(mode & 0o7777);
            rustix::fs::mknodat(&*dir, name, file_type, mode, rdev).map_err(errno)?;
        }
        self.lookup(name)
    }

    /// Makes a symbolic link.
    ///
    /// # Errors
    /// What symlink(2) says.
    pub fn symlink(
        self: &Arc<Self>,
        name: &OsStr,
        target: &OsStr,
        caller: Option<&Caller>,
    ) -> Result<(Arc<Self>, Stat), Errno> {
        check(name)?;
        let dir = self.path_fd()?;
        {
            let _as_caller = become_caller(caller)?;
            rustix::fs::symlinkat(target, &*dir, name).map_err(errno)?;
        }
        self.lookup(name)
    }

    /// Gives the inode another name, or its first: `self` is the inode, `dir` the directory.
    ///
    /// # Errors
    /// What link(2) says.
    pub fn link(self: &Arc<Self>, dir: &Arc<Self>, name: &OsStr) -> Result<Stat, Errno> {
        check(name)?;
        let (fd, dir) = (self.path_fd()?, dir.path_fd()?);
        rustix::fs::linkat(CWD, proc_path(&fd), &*dir, name, AtFlags::SYMLINK_FOLLOW)
            .map_err(errno)?;
        self.stat()
    }

    /// Removes a name that is not a directory's.
    ///
    /// # Errors
    /// What unlink(2) says.
    pub fn unlink(self: &Arc<Self>, name: &OsStr) -> Result<(), Errno> {
        check(name)?;
        let dir = self.path_fd()?;
        rustix::fs::unlinkat(&*dir, name, AtFlags::empty()).map_err(errno)
    }

    /// Removes an empty directory.
    ///
    /// # Errors
    /// What rmdir(2) says.
    pub fn remove_dir(self: &Arc<Self>, name: &OsStr) -> Result<(), Errno> {
        check(name)?;
        let dir = self.path_fd()?;
        rustix::fs::unlinkat(&*dir, name, AtFlags::REMOVEDIR).map_err(errno)
    }

    /// Renames `name` in this directory to `new_name` in `new_dir`.
    ///
    /// # Errors
    /// What renameat2(2) says.
    pub fn rename(
        self: &Arc<Self>,
        name: &OsStr,
        new_dir: &Arc<Self>,
        new_name: &OsStr,
        flags: RenameFlags,
    ) -> Result<(), Errno> {
        check(name)?;
        check(new_name)?;
        let (from, to) = (self.path_fd()?, new_dir.path_fd()?);
        rustix::fs::renameat_with(&*from, name, &*to, new_name, flags).map_err(errno)
    }

    /// Returns where a symbolic link points.
    ///
    /// # Errors
    /// `EINVAL` for anything else.
    pub fn read_link(self: &Arc<Self>) -> Result<OsString, Errno> {
        if self.kind != Kind::Symlink {
            return Err(Errno::EINVAL);
        }
        let fd = self.path_fd()?;
        let target = rustix::fs::readlinkat(&*fd, "", Vec::new()).map_err(errno)?;
        Ok(OsString::from_vec(target.into_bytes()))
    }

    /// Opens the directory for reading its entries.
    ///
    /// # Errors
    /// `ENOTDIR`; what open(2) says.
    pub fn entries(self: &Arc<Self>) -> Result<Entries, Errno> {
        self.open_path(OFlags::RDONLY | OFlags::DIRECTORY)
            .map(Entries::new)
    }

    /// Makes the directory's entries durable.
    ///
    /// # Errors
    /// What fsync(2) says.
    pub fn sync_dir(self: &Arc<Self>) -> Result<(), Errno> {
        let fd = self.open_path(OFlags::RDONLY | OFlags::DIRECTORY)?;
        rustix::fs::fsync(fd).map_err(errno)
    }

    /// Makes everything on the directory's filesystem durable.
    ///
    /// # Errors
    /// What syncfs(2) says.
    pub fn sync_filesystem(self: &Arc<Self>) -> Result<(), Errno> {
        let fd = self.open_path(OFlags::RDONLY | OFlags::DIRECTORY)?;
        rustix::fs::syncfs(fd).map_err(errno)
    }

    /// Returns space and limits of the filesystem the inode lies on.
    ///
    /// # Errors
    /// What statfs(2) says.
    pub fn space(self: &Arc<Self>) -> Result<SpaceStat, Errno> {
        let fd = self.path_fd()?;
        let raw = rustix::fs::fstatvfs(&*fd).map_err(errno)?;
        let small = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
        Ok(SpaceStat {
            blocks: raw.f_blocks,
            blocks_free: raw.f_bfree,
            blocks_available: raw.f_bavail,
            files: raw.f_files,
            files_free: raw.f_ffree,
            block_size: small(raw.f_bsize),
            fragment_size: small(raw.f_frsize),
            name_max: small(raw.f_namemax),
        })
    }

    /// Returns the value of an extended attribute.
    ///
    /// # Errors
    /// `ENODATA`, `EOPNOTSUPP`, and what getxattr(2) says.
    pub fn xattr(self: &Arc<Self>, name: &OsStr) -> Result<Vec<u8>, Errno> {
        let path = proc_path(&*self.path_fd()?);
        read_growing(|buf| rustix::fs::getxattr(&path, name, buf))
    }

    /// Returns the names of the extended attributes, each ended by a zero byte.
    ///
    /// # Errors
    /// What listxattr(2) says.
    pub fn xattr_names(self: &Arc<Self>) -> Result<Vec<u8>, Errno> {
        let path = proc_path(&*self.path_fd()?);
        read_growing(|buf| rustix::fs::listxattr(&path, buf))
    }

    /// Sets an extended attribute. An access ACL is set as `caller`, since the kernel clears the set-group-id
    /// bit by whose groups they are.
    ///
    /// # Errors
    /// What setxattr(2) says.
    pub fn set_xattr(
        self: &Arc<Self>,
        name: &OsStr,
        value: &[u8],
        flags: SetXattr,
        caller: Option<&Caller>,
    ) -> Result<(), Errno> {
        let path = proc_path(&*self.path_fd()?);
        let is_acl = name.as_bytes() == ACL_ACCESS;
        let _as_caller = become_caller(caller.filter(|_| is_acl))?;
        rustix::fs::setxattr(&path, name, value, flags).map_err(errno)
    }

    /// Removes an extended attribute.
    ///
    /// # Errors
    /// What removexattr(2) says.
    pub fn remove_xattr(self: &Arc<Self>, name: &OsStr) -> Result<(), Errno> {
        let path = proc_path(&*self.path_fd()?);
        rustix::fs::removexattr(&path, name).map_err(errno)
    }

    /// Opens the file once more, for what is no data: with as many rights as there are.
    ///
    /// # Errors
    /// What open(2) says.
    pub fn open_beside(self: &Arc<Self>) -> Result<OwnedFd, Errno> {
        self.open_path(OFlags::RDWR)
            .or_else(|_| self.open_path(OFlags::RDONLY))
            .or_else(|_| self.open_path(OFlags::WRONLY))
    }

    /// Returns this handle as what a file object opens itself by.
    #[must_use]
    pub fn reopener(self: &Arc<Self>) -> Arc<dyn Reopen> {
        Arc::new(Reopener(Arc::clone(self)))
    }
}

/// A handle in the role of a file's origin.
#[derive(Debug)]
struct Reopener(Arc<Handle>);

impl Reopen for Reopener {
    fn reopen(&self, flags: OFlags) -> Result<OwnedFd, Errno> {
        self.0.open_path(flags)
    }
}

fn timespec(change: TimeChange) -> Timespec {
    match change {
        TimeChange::Keep => Timespec {
            tv_sec: 0,
            tv_nsec: rustix::fs::UTIME_OMIT,
        },
        TimeChange::Now => Timespec {
            tv_sec: 0,
            tv_nsec: rustix::fs::UTIME_NOW,
        },
        TimeChange::At(time) => time.timespec(),
    }
}

/// Reads something whose length may change between asking and reading.
fn read_growing(
    read: impl Fn(&mut [u8]) -> Result<usize, rustix::io::Errno>,
) -> Result<Vec<u8>, Errno> {
    let mut buf = vec![0; 256];
    for _ in 0..XATTR_TRIES_MAX {
        match read(&mut buf) {
            Ok(len) => {
                buf.truncate(len);
                return Ok(buf);
            }
            Err(rustix::io::Errno::RANGE) if buf.len() < XATTR_BYTES_MAX => {
                buf.resize((buf.len() * 16).min(XATTR_BYTES_MAX), 0);
            }
            Err(e) => return Err(errno(e)),
        }
    }
    Err(Errno::ERANGE)
}
