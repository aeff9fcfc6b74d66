//! Attributes: reading them into the system's structures, and changing them.

use std::ffi::{c_char, c_int};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pinfold::{Errno, Kind, Metadata, Node, SetAttributes, SetTime};

use crate::call::answer;
use crate::descriptor;
use crate::errors::{Failure, Outcome, refuse};
use crate::names::Named;
use crate::user;
use crate::volume::VolumeHandle;

/// Fills a system structure.
fn zeroed<T: user::Plain>() -> T {
    // SAFETY: `Plain`: every bit pattern is a value, zeros too; and padding is initialized that way.
    unsafe { std::mem::zeroed() }
}

fn kind_bits(kind: Kind) -> u32 {
    match kind {
        Kind::File => libc::S_IFREG,
        Kind::Directory => libc::S_IFDIR,
        Kind::Symlink => libc::S_IFLNK,
        Kind::Fifo => libc::S_IFIFO,
        Kind::Socket => libc::S_IFSOCK,
        Kind::CharDevice => libc::S_IFCHR,
        Kind::BlockDevice => libc::S_IFBLK,
    }
}

/// Splits a time into seconds, rounded down, and nanoseconds.
fn parts(time: SystemTime) -> (i64, i64) {
    let seconds = |duration: Duration| i64::try_from(duration.as_secs()).unwrap_or(i64::MAX);
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => (seconds(after), after.subsec_nanos().into()),
        Err(before) => {
            let before = before.duration();
            match i64::from(before.subsec_nanos()) {
                0 => (-seconds(before), 0),
                nanos => (-seconds(before) - 1, 1_000_000_000 - nanos),
            }
        }
    }
}

fn stat_of(metadata: &Metadata) -> libc::stat {
    let mut stat: libc::stat = zeroed();
    stat.st_dev = metadata.id.device;
    stat.st_ino = metadata.id.inode;
    stat.st_mode = kind_bits(metadata.kind) | metadata.permissions;
    stat.st_nlink = metadata.links.into();
    stat.st_uid = metadata.uid;
    stat.st_gid = metadata.gid;
    stat.st_rdev = metadata.rdev;
    // Offsets of files fit an off_t, and so do their block counts.
    stat.st_size = metadata.len as i64;
    stat.st_blksize = metadata.block_size.into();
    stat.st_blocks = metadata.blocks as i64;
    (stat.st_atime, stat.st_atime_nsec) = parts(metadata.accessed);
    (stat.st_mtime, stat.st_mtime_nsec) = parts(metadata.modified);
    (stat.st_ctime, stat.st_ctime_nsec) = parts(metadata.changed);
    stat
}

/// # Safety
/// `to` is the caller's to lend.
unsafe fn tell(node: &Node, to: *mut libc::stat) -> Outcome<c_int> {
    let stat = stat_of(&node.attributes()?);
    // SAFETY: passed on to the caller.
    unsafe { user::put(to, stat) }?;
    Ok(0)
}

/// Reads attributes, live size and times included, as fstat(2).
///
/// # Safety
/// `buf` is the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_fstat(fd: c_int, buf: *mut libc::stat) -> c_int {
    // SAFETY: passed on to the caller.
    answer(|| unsafe { tell(descriptor::of(fd)?.node(), buf) })
}

/// Reads attributes by path, symbolic links followed, as stat(2).
///
/// # Safety
/// `path` and `buf` are the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_stat(
    volume: *mut VolumeHandle,
    path: *const c_char,
    buf: *mut libc::stat,
) -> c_int {
    answer(|| {
        // SAFETY: passed on to the caller.
        let node = unsafe { Named::of(volume, path) }?.node(true)?;
        // SAFETY: passed on to the caller.
        unsafe { tell(&node, buf) }
    })
}

/// Reads attributes by path, a symbolic link's own, as lstat(2).
///
/// # Safety
/// `path` and `buf` are the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_lstat(
    volume: *mut VolumeHandle,
    path: *const c_char,
    buf: *mut libc::stat,
) -> c_int {
    answer(|| {
        // SAFETY: passed on to the caller.
        let node = unsafe { Named::of(volume, path) }?.node(false)?;
        // SAFETY: passed on to the caller.
        unsafe { tell(&node, buf) }
    })
}

/// Reads attributes with AT_SYMLINK_NOFOLLOW, AT_EMPTY_PATH and AT_NO_AUTOMOUNT, as fstatat(2).
///
/// # Safety
/// `path` and `buf` are the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_fstatat(
    dir_fd: c_int,
    path: *const c_char,
    buf: *mut libc::stat,
    flags: c_int,
) -> c_int {
    const KNOWN: c_int = libc::AT_SYMLINK_NOFOLLOW | libc::AT_EMPTY_PATH | libc::AT_NO_AUTOMOUNT;
    answer(|| {
        if flags & !KNOWN != 0 {
            return refuse(Errno::EINVAL, "the flags");
        }
        // SAFETY: passed on to the caller.
        let text = unsafe { user::path(path) }?;
        let node = if text.as_os_str().is_empty() && flags & libc::AT_EMPTY_PATH != 0 {
            descriptor::of(dir_fd)?.node().clone()
        } else {
            // SAFETY: passed on to the caller.
            let named = unsafe { Named::at(dir_fd, path) }?;
            named.node(flags & libc::AT_SYMLINK_NOFOLLOW == 0)?
        };
        // SAFETY: passed on to the caller.
        unsafe { tell(&node, buf) }
    })
}

fn permit(node: &Node, mode: libc::mode_t) -> Outcome<c_int> {
    if node.kind() == Kind::Symlink {
        return refuse(Errno::EOPNOTSUPP, "the mode of a symbolic link");
    }
    let set = SetAttributes {
        permissions: Some(mode & 0o7777),
        ..SetAttributes::default()
    };
    node.set_attributes(&set)?;
    Ok(0)
}

/// Changes permissions, as fchmod(2).
#[unsafe(no_mangle)]
pub extern "C" fn pf_fchmod(fd: c_int, mode: libc::mode_t) -> c_int {
    answer(|| permit(descriptor::of(fd)?.node(), mode))
}

/// Changes permissions by path, as chmod(2).
///
/// # Safety
/// `path` is the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_chmod(
    volume: *mut VolumeHandle,
    path: *const c_char,
    mode: libc::mode_t,
) -> c_int {
    // SAFETY: passed on to the caller.
    answer(|| permit(&unsafe { Named::of(volume, path) }?.node(true)?, mode))
}

/// Changes permissions from a directory descriptor, as fchmodat(2); AT_SYMLINK_NOFOLLOW is EOPNOTSUPP for a symbolic link.
///
/// # Safety
/// `path` is the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_fchmodat(
    dir_fd: c_int,
    path: *const c_char,
    mode: libc::mode_t,
    flags: c_int,
) -> c_int {
    answer(|| {
        let follow = follows(flags)?;
        // SAFETY: passed on to the caller.
        permit(&unsafe { Named::at(dir_fd, path) }?.node(follow)?, mode)
    })
}

/// Reads AT_SYMLINK_NOFOLLOW out of flags that may hold nothing else.
fn follows(flags: c_int) -> Outcome<bool> {
    if flags & !libc::AT_SYMLINK_NOFOLLOW != 0 {
        return refuse(Errno::EINVAL, "the flags");
    }
    Ok(flags & libc::AT_SYMLINK_NOFOLLOW == 0)
}

/// Changes owner and group; (uid_t)-1 keeps one.
fn own(node: &Node, uid: libc::uid_t, gid: libc::gid_t) -> Outcome<c_int> {
    const KEEP: u32 = u32::MAX;
    let set = SetAttributes {
        uid: (uid != KEEP).then_some(uid),
        gid: (gid != KEEP).then_some(gid),
        ..SetAttributes::default()
    };
    node.set_attributes(&set)?;
    Ok(0)
}

/// Changes owner and group, as fchown(2).
#[unsafe(no_mangle)]
pub extern "C" fn pf_fchown(fd: c_int, uid: libc::uid_t, gid: libc::gid_t) -> c_int {
    answer(|| own(descriptor::of(fd)?.node(), uid, gid))
}

/// Changes owner and group by path, as chown(2).
///
/// # Safety
/// `path` is the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_chown(
    volume: *mut VolumeHandle,
    path: *const c_char,
    uid: libc::uid_t,
    gid: libc::gid_t,
) -> c_int {
    // SAFETY: passed on to the caller.
    answer(|| own(&unsafe { Named::of(volume, path) }?.node(true)?, uid, gid))
}

/// Changes owner and group of a symbolic link itself, as lchown(2).
///
/// # Safety
/// `path` is the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_lchown(
    volume: *mut VolumeHandle,
    path: *const c_char,
    uid: libc::uid_t,
    gid: libc::gid_t,
) -> c_int {
    // SAFETY: passed on to the caller.
    answer(|| own(&unsafe { Named::of(volume, path) }?.node(false)?, uid, gid))
}

/// Changes owner and group from a directory descriptor, with AT_SYMLINK_NOFOLLOW, as fchownat(2).
///
/// # Safety
/// `path` is the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_fchownat(
    dir_fd: c_int,
    path: *const c_char,
    uid: libc::uid_t,
    gid: libc::gid_t,
    flags: c_int,
) -> c_int {
    answer(|| {
        let follow = follows(flags)?;
        // SAFETY: passed on to the caller.
        own(&unsafe { Named::at(dir_fd, path) }?.node(follow)?, uid, gid)
    })
}

fn time_of(time: &libc::timespec) -> Outcome<SetTime> {
    match time.tv_nsec {
        libc::UTIME_NOW => return Ok(SetTime::Now),
        libc::UTIME_OMIT => return Ok(SetTime::Keep),
        _ => {}
    }
    let Some(nanos) = u32::try_from(time.tv_nsec)
        .ok()
        .filter(|&n| n < 1_000_000_000)
    else {
        return refuse(Errno::EINVAL, "the nanoseconds");
    };
    let seconds = Duration::from_secs(time.tv_sec.unsigned_abs());
    let whole = if time.tv_sec < 0 {
        UNIX_EPOCH.checked_sub(seconds)
    } else {
        UNIX_EPOCH.checked_add(seconds)
    };
    let at = whole.and_then(|whole| whole.checked_add(Duration::from_nanos(nanos.into())));
    at.map(SetTime::At)
        .ok_or(Failure::Argument(Errno::EINVAL, "the time"))
}

/// Sets the times of access and modification; NULL means now.
///
/// # Safety
/// `times` is the caller's to lend: two structures.
unsafe fn stamp(node: &Node, times: *const libc::timespec) -> Outcome<c_int> {
    let (accessed, modified) = if times.is_null() {
        (SetTime::Now, SetTime::Now)
    } else {
        // SAFETY: passed on to the caller.
        let accessed = unsafe { user::get(times) }?;
        // SAFETY: passed on to the caller.
        let modified = unsafe { user::get(times.wrapping_add(1)) }?;
        (time_of(&accessed)?, time_of(&modified)?)
    };
    if (accessed, modified) == (SetTime::Keep, SetTime::Keep) {
        return Ok(0);
    }
    let set = SetAttributes {
        accessed,
        modified,
        ..SetAttributes::default()
    };
    node.set_attributes(&set)?;
    Ok(0)
}

/// Sets the times of access and modification, as futimens(3).
///
/// # Safety
/// `times`, two structures or NULL, is the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_futimens(fd: c_int, times: *const libc::timespec) -> c_int {
    // SAFETY: passed on to the caller.
    answer(|| unsafe { stamp(descriptor::of(fd)?.node(), times) })
}

/// Sets the times of access and modification by path, with AT_SYMLINK_NOFOLLOW, as utimensat(2).
///
/// # Safety
/// `path` and `times`, two structures or NULL, are the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_utimens(
    volume: *mut VolumeHandle,
    path: *const c_char,
    times: *const libc::timespec,
    flags: c_int,
) -> c_int {
    answer(|| {
        let follow = follows(flags)?;
        // SAFETY: passed on to the caller.
        let node = unsafe { Named::of(volume, path) }?.node(follow)?;
        // SAFETY: passed on to the caller.
        unsafe { stamp(&node, times) }
    })
}

/// Sets the times of access and modification from a directory descriptor, as utimensat(2).
///
/// # Safety
/// `path` and `times`, two structures or NULL, are the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_utimensat(
    dir_fd: c_int,
    path: *const c_char,
    times: *const libc::timespec,
    flags: c_int,
) -> c_int {
    answer(|| {
        let follow = follows(flags)?;
        // SAFETY: passed on to the caller.
        let node = unsafe { Named::at(dir_fd, path) }?.node(follow)?;
        // SAFETY: passed on to the caller.
        unsafe { stamp(&node, times) }
    })
}

/// Tells whether this process may do what `mode` asks, as access(2).
///
/// # Safety
/// `path` is the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_access(
    volume: *mut VolumeHandle,
    path: *const c_char,
    mode: c_int,
) -> c_int {
    // SAFETY: passed on to the caller.
    answer(|| permits(&unsafe { Named::of(volume, path) }?.node(true)?, mode))
}

/// Tells whether this process may do what `mode` asks, from a directory descriptor, as faccessat(2) without flags.
///
/// # Safety
/// `path` is the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_faccessat(
    dir_fd: c_int,
    path: *const c_char,
    mode: c_int,
    flags: c_int,
) -> c_int {
    answer(|| {
        let follow = follows(flags)?;
        // SAFETY: passed on to the caller.
        permits(&unsafe { Named::at(dir_fd, path) }?.node(follow)?, mode)
    })
}

fn permits(node: &Node, mode: c_int) -> Outcome<c_int> {
    if mode & !(libc::R_OK | libc::W_OK | libc::X_OK) != 0 {
        return refuse(Errno::EINVAL, "the mode");
    }
    if mode & !granted(&node.attributes()?) != 0 {
        return refuse(Errno::EACCES, "the path");
    }
    Ok(0)
}

/// Returns the R_OK, W_OK and X_OK that permission bits grant this process's real user; access control lists are not seen.
fn granted(metadata: &Metadata) -> c_int {
    // SAFETY: cannot fail and touches no memory.
    let uid = unsafe { libc::getuid() };
    let bits = metadata.permissions;
    let runs = metadata.kind == Kind::Directory || bits & 0o111 != 0;
    if uid == 0 {
        return libc::R_OK | libc::W_OK | if runs { libc::X_OK } else { 0 };
    }
    let shift = if uid == metadata.uid {
        6
    } else if in_group(metadata.gid) {
        3
    } else {
        0
    };
    (bits >> shift & 7) as c_int
}

fn in_group(gid: libc::gid_t) -> bool {
    // SAFETY: cannot fail and touches no memory.
    if unsafe { libc::getgid() } == gid {
        return true;
    }
    // SAFETY: with a size of 0 the array is not touched.
    let count = unsafe { libc::getgroups(0, std::ptr::null_mut()) };
    let mut groups = vec![0; usize::try_from(count).unwrap_or(0)];
    // SAFETY: the array holds `count` elements.
    let got = unsafe { libc::getgroups(count, groups.as_mut_ptr()) };
    groups.truncate(usize::try_from(got).unwrap_or(0));
    groups.contains(&gid)
}

/// # Safety
/// `to` is the caller's to lend.
unsafe fn tell_space(node: &Node, to: *mut libc::statvfs) -> Outcome<c_int> {
    let space = node.statfs()?;
    let mut filled: libc::statvfs = zeroed();
    filled.f_bsize = space.block_size.into();
    filled.f_frsize = space.fragment_size.into();
    filled.f_blocks = space.blocks;
    filled.f_bfree = space.blocks_free;
    filled.f_bavail = space.blocks_available;
    filled.f_files = space.files;
    filled.f_ffree = space.files_free;
    filled.f_favail = space.files_free;
    filled.f_namemax = space.name_max.into();
    // SAFETY: passed on to the caller.
    unsafe { user::put(to, filled) }?;
    Ok(0)
}

/// Reads space and limits of the filesystem the file lies on, as fstatvfs(3).
///
/// # Safety
/// `buf` is the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_fstatvfs(fd: c_int, buf: *mut libc::statvfs) -> c_int {
    // SAFETY: passed on to the caller.
    answer(|| unsafe { tell_space(descriptor::of(fd)?.node(), buf) })
}

/// Reads space and limits of the filesystem by path, as statvfs(3).
///
/// # Safety
/// `path` and `buf` are the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_statvfs(
    volume: *mut VolumeHandle,
    path: *const c_char,
    buf: *mut libc::statvfs,
) -> c_int {
    answer(|| {
        // SAFETY: passed on to the caller.
        let node = unsafe { Named::of(volume, path) }?.node(true)?;
        // SAFETY: passed on to the caller.
        unsafe { tell_space(&node, buf) }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_1970_are_rounded_down_and_come_back() {
        for (seconds, nanos) in [(0, 0), (5, 7), (-1, 999_999_999), (-2, 0), (-86_400, 1)] {
            let mut given: libc::timespec = zeroed();
            (given.tv_sec, given.tv_nsec) = (seconds, nanos);
            let SetTime::At(time) = time_of(&given).unwrap() else {
                panic!("a time was given");
            };
            assert_eq!(parts(time), (seconds, nanos));
        }
    }

    #[test]
    fn nanoseconds_out_of_range_are_einval() {
        for nanos in [-1, 1_000_000_000] {
            let mut given: libc::timespec = zeroed();
            given.tv_nsec = nanos;
            assert_eq!(time_of(&given).unwrap_err().errno(), Errno::EINVAL);
        }
    }
}
