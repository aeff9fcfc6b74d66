//! The name space: making, removing, renaming and linking names.
//!
//! Every call exists by path from the volume's root and, where POSIX has it, from a directory descriptor.

use std::ffi::{OsString, c_char, c_int, c_uint};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::Arc;

use pinfold::{Errno, Kind, Node, Owner, RenameFlags};

use crate::call::answer;
use crate::descriptor;
use crate::errors::{Outcome, refuse};
use crate::open::start_of;
use crate::user;
use crate::volume::{self, Served, VolumeHandle};
use crate::walk::{Place, Walked, walk};

/// A path as C gave it, and where it starts.
pub(crate) struct Named {
    served: Arc<Served>,
    start: Place,
    path: PathBuf,
}

impl Named {
    /// Takes a path from a volume's root.
    ///
    /// # Safety
    /// `path` is the caller's to lend.
    pub(crate) unsafe fn of(volume: *mut VolumeHandle, path: *const c_char) -> Outcome<Self> {
        let served = volume::of(volume)?;
        Ok(Self {
            start: Place::root(&served),
            served,
            // SAFETY: passed on to the caller.
            path: unsafe { user::path(path) }?,
        })
    }

    /// Takes a path from a directory descriptor.
    ///
    /// # Safety
    /// `path` is the caller's to lend.
    pub(crate) unsafe fn at(dir_fd: c_int, path: *const c_char) -> Outcome<Self> {
        let (served, start) = start_of(dir_fd)?;
        Ok(Self {
            served,
            start,
            // SAFETY: passed on to the caller.
            path: unsafe { user::path(path) }?,
        })
    }

    pub(crate) fn served(&self) -> &Arc<Served> {
        &self.served
    }

    pub(crate) fn walk(&self, follow: bool) -> Outcome<Walked> {
        walk(&self.served, self.start.clone(), &self.path, follow)
    }

    /// Returns what the path names.
    pub(crate) fn node(&self, follow: bool) -> Outcome<Node> {
        self.walk(follow)?.found()
    }

    fn last_is(&self, name: &[u8]) -> bool {
        let path = self.path.as_os_str().as_bytes();
        path.rsplit(|&byte| byte == b'/')
            .find(|part| !part.is_empty())
            == Some(name)
    }

    /// Finds where a new name is to be made.
    fn vacant(&self, for_dir: bool) -> Outcome<(Node, OsString)> {
        let walked = self.walk(false)?;
        if walked.node.is_some() {
            return refuse(Errno::EEXIST, "the path");
        }
        match walked.name {
            Some(_) if walked.wants_dir && !for_dir => refuse(Errno::ENOENT, "the path"),
            Some(name) => Ok((walked.dir.node().clone(), name)),
            None => refuse(Errno::EEXIST, "the path"),
        }
    }

    fn make_dir(&self, mode: libc::mode_t) -> Outcome<c_int> {
        let (dir, name) = self.vacant(true)?;
        dir.make_dir(&name, mode & 0o7777, Owner::Process)?;
        Ok(0)
    }

    fn remove_file(&self) -> Outcome<c_int> {
        let walked = self.walk(false)?;
        let Some(name) = &walked.name else {
            return refuse(Errno::EISDIR, "the path");
        };
        match &walked.node {
            None => return refuse(Errno::ENOENT, "the path"),
            Some(node) if node.kind() == Kind::Directory => {
                return refuse(Errno::EISDIR, "the path");
            }
            Some(_) if walked.wants_dir => return refuse(Errno::ENOTDIR, "the path"),
            Some(_) => {}
        }
        walked.dir.node().unlink(name)?;
        Ok(0)
    }

    fn remove_dir(&self) -> Outcome<c_int> {
        if self.last_is(b".") {
            return refuse(Errno::EINVAL, "the path ends in .");
        }
        let walked = self.walk(false)?;
        let Some(name) = &walked.name else {
            let errno = if self.last_is(b"..") {
                Errno::ENOTEMPTY
            } else {
                Errno::EBUSY
            };
            return refuse(errno, "the path");
        };
        match &walked.node {
            None => return refuse(Errno::ENOENT, "the path"),
            Some(node) if node.kind() != Kind::Directory => {
                return refuse(Errno::ENOTDIR, "the path");
            }
            Some(_) => {}
        }
        walked.dir.node().remove_dir(name)?;
        Ok(0)
    }

    fn make_symlink(&self, target: &std::ffi::OsStr) -> Outcome<c_int> {
        if target.is_empty() {
            return refuse(Errno::ENOENT, "the target is empty");
        }
        let (dir, name) = self.vacant(false)?;
        dir.symlink(&name, target, Owner::Process)?;
        Ok(0)
    }

    fn link(&self, target: &Node, of: &Arc<Served>) -> Outcome<c_int> {
        if !Arc::ptr_eq(of, &self.served) {
            return refuse(Errno::EXDEV, "the volumes differ");
        }
        let (dir, name) = self.vacant(false)?;
        if target.kind() == Kind::Directory {
            return refuse(Errno::EPERM, "the existing path is a directory's");
        }
        dir.link(target, &name)?;
        Ok(0)
    }

    fn rename(&self, to: &Self, flags: c_uint) -> Outcome<c_int> {
        let Some(flags) = RenameFlags::from_bits(flags) else {
            return refuse(Errno::EINVAL, "the flags");
        };
        if !Arc::ptr_eq(&self.served, &to.served) {
            return refuse(Errno::EXDEV, "the volumes differ");
        }
        let (from, into) = (self.walk(false)?, to.walk(false)?);
        let (Some(name), Some(new_name)) = (&from.name, &into.name) else {
            return refuse(Errno::EBUSY, "a path ends in a directory's own name");
        };
        let Some(node) = &from.node else {
            return refuse(Errno::ENOENT, "the old path");
        };
        let is_dir = node.kind() == Kind::Directory;
        if (from.wants_dir || into.wants_dir) && !is_dir {
            return refuse(Errno::ENOTDIR, "a path");
        }
        let dir = into.dir.node();
        from.dir.node().rename(name, dir, new_name, flags)?;
        Ok(0)
    }

    /// # Safety
    /// `buf` is the caller's to lend.
    unsafe fn read_link(&self, buf: *mut c_char, size: usize) -> Outcome<isize> {
        if size == 0 {
            return refuse(Errno::EINVAL, "the size");
        }
        let mut target = self.node(false)?.read_link()?.into_encoded_bytes();
        target.truncate(size);
        // SAFETY: passed on to the caller.
        unsafe { user::write_bytes(buf.expose_provenance(), &mut target) }?;
        // A link's target is shorter than a path.
        Ok(target.len() as isize)
    }
}

/// Makes a directory, as mkdir(2).
///
/// # Safety
/// `path` is the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_mkdir(
    volume: *mut VolumeHandle,
    path: *const c_char,
    mode: libc::mode_t,
) -> c_int {
    // SAFETY: passed on to the caller.
    answer(|| unsafe { Named::of(volume, path) }?.make_dir(mode))
}

/// Makes a directory, as mkdirat(2).
///
/// # Safety
/// `path` is the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_mkdirat(
    dir_fd: c_int,
    path: *const c_char,
    mode: libc::mode_t,
) -> c_int {
    // SAFETY: passed on to the caller.
    answer(|| unsafe { Named::at(dir_fd, path) }?.make_dir(mode))
}

/// Removes a name that is not a directory's, as unlink(2). Open files live on without it.
///
/// # Safety
/// `path` is the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_unlink(volume: *mut VolumeHandle, path: *const c_char) -> c_int {
    // SAFETY: passed on to the caller.
    answer(|| unsafe { Named::of(volume, path) }?.remove_file())
}

/// Removes a name, with AT_REMOVEDIR a directory's, as unlinkat(2).
///
/// # Safety
/// `path` is the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_unlinkat(dir_fd: c_int, path: *const c_char, flags: c_int) -> c_int {
    answer(|| {
        // SAFETY: passed on to the caller.
        let named = unsafe { Named::at(dir_fd, path) }?;
        match flags {
            0 => named.remove_file(),
            libc::AT_REMOVEDIR => named.remove_dir(),
            _ => refuse(Errno::EINVAL, "the flags"),
        }
    })
}

/// Removes an empty directory, as rmdir(2).
///
/// # Safety
/// `path` is the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_rmdir(volume: *mut VolumeHandle, path: *const c_char) -> c_int {
    // SAFETY: passed on to the caller.
    answer(|| unsafe { Named::of(volume, path) }?.remove_dir())
}

/// Renames within a volume, replacing what is there, as rename(2).
///
/// # Safety
/// The paths are the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_rename(
    volume: *mut VolumeHandle,
    old_path: *const c_char,
    new_path: *const c_char,
) -> c_int {
    answer(|| {
        // SAFETY: passed on to the caller.
        let from = unsafe { Named::of(volume, old_path) }?;
        // SAFETY: passed on to the caller.
        let to = unsafe { Named::of(volume, new_path) }?;
        from.rename(&to, 0)
    })
}

/// Renames within a volume with RENAME_ flags, as renameat2(2).
///
/// # Safety
/// The paths are the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_renameat2(
    old_dir_fd: c_int,
    old_path: *const c_char,
    new_dir_fd: c_int,
    new_path: *const c_char,
    flags: c_uint,
) -> c_int {
    answer(|| {
        // SAFETY: passed on to the caller.
        let from = unsafe { Named::at(old_dir_fd, old_path) }?;
        // SAFETY: passed on to the caller.
        let to = unsafe { Named::at(new_dir_fd, new_path) }?;
        from.rename(&to, flags)
    })
}

/// Gives a file a second name, as link(2).
///
/// # Safety
/// The paths are the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_link(
    volume: *mut VolumeHandle,
    old_path: *const c_char,
    new_path: *const c_char,
) -> c_int {
    answer(|| {
        // SAFETY: passed on to the caller.
        let from = unsafe { Named::of(volume, old_path) }?;
        // SAFETY: passed on to the caller.
        let to = unsafe { Named::of(volume, new_path) }?;
        to.link(&from.node(false)?, from.served())
    })
}

/// Gives a file a second name, as linkat(2) with AT_SYMLINK_FOLLOW. With AT_EMPTY_PATH and an empty `old_path` the file is
/// the one `old_dir_fd` names: how one made with O_TMPFILE gets a name.
///
/// # Safety
/// The paths are the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_linkat(
    old_dir_fd: c_int,
    old_path: *const c_char,
    new_dir_fd: c_int,
    new_path: *const c_char,
    flags: c_int,
) -> c_int {
    answer(|| {
        if flags & !(libc::AT_SYMLINK_FOLLOW | libc::AT_EMPTY_PATH) != 0 {
            return refuse(Errno::EINVAL, "the flags");
        }
        // SAFETY: passed on to the caller.
        let to = unsafe { Named::at(new_dir_fd, new_path) }?;
        if flags & libc::AT_EMPTY_PATH != 0 {
            // SAFETY: passed on to the caller.
            let old = unsafe { user::path(old_path) }?;
            if old.as_os_str().is_empty() {
                let description = descriptor::of(old_dir_fd)?;
                return to.link(description.node(), &description.served);
            }
        }
        // SAFETY: passed on to the caller.
        let from = unsafe { Named::at(old_dir_fd, old_path) }?;
        let node = from.node(flags & libc::AT_SYMLINK_FOLLOW != 0)?;
        to.link(&node, from.served())
    })
}

/// Makes a symbolic link at `path` to `target`, as symlink(2).
///
/// # Safety
/// The strings are the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_symlink(
    volume: *mut VolumeHandle,
    target: *const c_char,
    path: *const c_char,
) -> c_int {
    answer(|| {
        // SAFETY: passed on to the caller.
        let target = unsafe { user::path(target) }?;
        // SAFETY: passed on to the caller.
        unsafe { Named::of(volume, path) }?.make_symlink(target.as_os_str())
    })
}

/// Makes a symbolic link, as symlinkat(2).
///
/// # Safety
/// The strings are the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_symlinkat(
    target: *const c_char,
    dir_fd: c_int,
    path: *const c_char,
) -> c_int {
    answer(|| {
        // SAFETY: passed on to the caller.
        let target = unsafe { user::path(target) }?;
        // SAFETY: passed on to the caller.
        unsafe { Named::at(dir_fd, path) }?.make_symlink(target.as_os_str())
    })
}

/// Reads where a symbolic link points, without a closing zero byte, as readlink(2).
///
/// # Safety
/// `path` and `buf` are the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_readlink(
    volume: *mut VolumeHandle,
    path: *const c_char,
    buf: *mut c_char,
    size: usize,
) -> libc::ssize_t {
    answer(|| {
        // SAFETY: passed on to the caller.
        let named = unsafe { Named::of(volume, path) }?;
        // SAFETY: passed on to the caller.
        unsafe { named.read_link(buf, size) }
    })
}

/// Reads where a symbolic link points, as readlinkat(2).
///
/// # Safety
/// `path` and `buf` are the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_readlinkat(
    dir_fd: c_int,
    path: *const c_char,
    buf: *mut c_char,
    size: usize,
) -> libc::ssize_t {
    answer(|| {
        // SAFETY: passed on to the caller.
        let named = unsafe { Named::at(dir_fd, path) }?;
        // SAFETY: passed on to the caller.
        unsafe { named.read_link(buf, size) }
    })
}
