//! Opening: flags, paths and descriptors together.

use std::ffi::{OsStr, c_char, c_int};
use std::path::Path;
use std::sync::Arc;

use pinfold::{Errno, Kind, Node, OpenOptions, Owner};

use crate::call::answer;
use crate::descriptor::{self, Description, Opened};
use crate::errors::{Outcome, refuse};
use crate::user;
use crate::volume::{self, Served, VolumeHandle};
use crate::walk::{Place, walk};

/// Opens the file or directory at `path`, from the volume's root, as open(2); NULL stands for the default volume.
/// O_APPEND, O_CREAT, O_DIRECT, O_DIRECTORY, O_DSYNC, O_EXCL, O_NOFOLLOW, O_SYNC, O_TMPFILE and O_TRUNC act as there;
/// O_PATH is EINVAL.
///
/// # Safety
/// `path` is the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_open(
    volume: *mut VolumeHandle,
    path: *const c_char,
    flags: c_int,
    mode: libc::mode_t,
) -> c_int {
    answer(|| {
        let served = volume::of(volume)?;
        // SAFETY: passed on to the caller.
        let path = unsafe { user::path(path) }?;
        let root = Place::root(&served);
        open(served, root, &path, flags, mode)
    })
}

/// Opens the file at `path`, from the directory `dir_fd` names, as openat(2).
///
/// # Safety
/// `path` is the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_openat(
    dir_fd: c_int,
    path: *const c_char,
    flags: c_int,
    mode: libc::mode_t,
) -> c_int {
    answer(|| {
        let (served, start) = start_of(dir_fd)?;
        // SAFETY: passed on to the caller.
        let path = unsafe { user::path(path) }?;
        open(served, start, &path, flags, mode)
    })
}

/// Returns where a call that takes a directory descriptor starts.
///
/// # Errors
/// `EBADF`, `ENOTDIR`.
pub(crate) fn start_of(dir_fd: c_int) -> Outcome<(Arc<Served>, Place)> {
    if let Some(served) = volume::by_root(dir_fd) {
        let root = Place::root(&served);
        return Ok((served, root));
    }
    let description = descriptor::of(dir_fd)?;
    match &description.opened {
        Opened::Directory(place) => Ok((Arc::clone(&description.served), place.clone())),
        Opened::File(_) => refuse(Errno::ENOTDIR, "the descriptor"),
    }
}

fn open(
    served: Arc<Served>,
    start: Place,
    path: &Path,
    flags: c_int,
    mode: libc::mode_t,
) -> Outcome<c_int> {
    if flags & libc::O_PATH != 0 {
        return refuse(Errno::EINVAL, "O_PATH");
    }
    // Appending is the description's business, where fcntl can change it.
    let options = OpenOptions::from_flags(flags & !libc::O_APPEND)?.mode(mode & 0o7777);
    let opened = if flags & libc::O_TMPFILE == libc::O_TMPFILE {
        open_unnamed(&served, start, path, &options, flags)?
    } else {
        open_named(&served, start, path, &options, flags)?
    };
    descriptor::install(Description::new(served, opened, flags), flags)
}

fn open_unnamed(
    served: &Served,
    start: Place,
    path: &Path,
    options: &OpenOptions,
    flags: c_int,
) -> Outcome<Opened> {
    if flags & libc::O_ACCMODE == libc::O_RDONLY || flags & libc::O_CREAT != 0 {
        return refuse(Errno::EINVAL, "the flags beside O_TMPFILE");
    }
    let dir = walk(served, start, path, true)?.found()?;
    if dir.kind() != Kind::Directory {
        return refuse(Errno::ENOTDIR, "the path");
    }
    let (_, file) = dir.temporary(options, Owner::Process)?;
    Ok(Opened::File(file))
}

fn open_named(
    served: &Served,
    start: Place,
    path: &Path,
    options: &OpenOptions,
    flags: c_int,
) -> Outcome<Opened> {
    let has = |flag| flags & flag == flag;
    if has(libc::O_CREAT | libc::O_DIRECTORY) {
        return refuse(Errno::EINVAL, "O_CREAT beside O_DIRECTORY");
    }
    let exclusive = has(libc::O_CREAT | libc::O_EXCL);
    let walked = walk(served, start, path, !(has(libc::O_NOFOLLOW) || exclusive))?;
    if has(libc::O_CREAT) {
        if exclusive && walked.node.is_some() {
            return refuse(Errno::EEXIST, "the path");
        }
        if walked.wants_dir {
            return refuse(Errno::EISDIR, "the path");
        }
        if walked.node.is_none()
            && let Some(name) = &walked.name
        {
            return create(walked.dir.node(), name, options);
        }
    }
    let dir = walked.dir.clone();
    let named = walked.name.is_some();
    let node = walked.found()?;
    if node.kind() == Kind::Directory {
        if has(libc::O_CREAT) || flags & libc::O_ACCMODE != libc::O_RDONLY || has(libc::O_TRUNC) {
            return refuse(Errno::EISDIR, "the path");
        }
        // Whether it may be read is decided now, as with open(2).
        node.open_dir()?;
        return Ok(Opened::Directory(if named { dir.below(node) } else { dir }));
    }
    if has(libc::O_DIRECTORY) {
        return refuse(Errno::ENOTDIR, "the path");
    }
    Ok(Opened::File(node.open(options)?))
}

fn create(dir: &Node, name: &OsStr, options: &OpenOptions) -> Outcome<Opened> {
    let (_, file) = dir.create(name, options, Owner::Process)?;
    Ok(Opened::File(file))
}
