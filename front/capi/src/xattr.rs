//! Extended attributes: by path, by a symbolic link's own path, and by descriptor.

use std::ffi::{OsString, c_char, c_int, c_void};

use pinfold::{Errno, Node, Owner, SetXattr};

use crate::call::answer;
use crate::descriptor;
use crate::errors::{Outcome, refuse};
use crate::names::Named;
use crate::user;
use crate::volume::VolumeHandle;

/// The longest value, as in Linux.
const VALUE_MAX: usize = 65536;
/// The longest name, as in Linux.
const NAME_MAX: usize = 255;

/// # Safety
/// `name` is the caller's to lend.
unsafe fn name_of(name: *const c_char) -> Outcome<OsString> {
    // SAFETY: passed on to the caller.
    let name = unsafe { user::path(name) }?.into_os_string();
    if name.is_empty() || name.len() > NAME_MAX {
        return refuse(Errno::ERANGE, "the attribute's name");
    }
    Ok(name)
}

/// Gives bytes to C if they fit; with a size of 0, their number alone.
///
/// # Safety
/// `to` is the caller's to lend.
unsafe fn give(mut bytes: Vec<u8>, to: usize, size: usize) -> Outcome<libc::ssize_t> {
    if size > 0 {
        if bytes.len() > size {
            return refuse(Errno::ERANGE, "the size");
        }
        // SAFETY: passed on to the caller.
        unsafe { user::write_bytes(to, &mut bytes) }?;
    }
    // At most VALUE_MAX.
    Ok(bytes.len() as libc::ssize_t)
}

/// # Safety
/// `name` and `value` are the caller's to lend.
unsafe fn get(
    node: &Node,
    name: *const c_char,
    value: *mut c_void,
    size: usize,
) -> Outcome<libc::ssize_t> {
    // SAFETY: passed on to the caller.
    let found = node.xattr(&unsafe { name_of(name) }?)?;
    // SAFETY: passed on to the caller.
    unsafe { give(found, value.expose_provenance(), size) }
}

/// # Safety
/// `name` and `value` are the caller's to lend.
unsafe fn set(
    node: &Node,
    name: *const c_char,
    value: *const c_void,
    size: usize,
    flags: c_int,
) -> Outcome<c_int> {
    let known = SetXattr::from_bits(flags as u32);
    let Some(flags) = known else {
        return refuse(Errno::EINVAL, "the flags");
    };
    // SAFETY: passed on to the caller.
    let name = unsafe { name_of(name) }?;
    if size > VALUE_MAX {
        return refuse(Errno::E2BIG, "the size");
    }
    let mut bytes = vec![0; size];
    // SAFETY: passed on to the caller.
    unsafe { user::read_bytes(value.expose_provenance(), &mut bytes) }?;
    node.set_xattr(&name, &bytes, flags, Owner::Process)?;
    Ok(0)
}

/// # Safety
/// `list` is the caller's to lend.
unsafe fn names(node: &Node, list: *mut c_char, size: usize) -> Outcome<libc::ssize_t> {
    let names = node.xattr_names()?;
    // SAFETY: passed on to the caller.
    unsafe { give(names, list.expose_provenance(), size) }
}

/// # Safety
/// `name` is the caller's to lend.
unsafe fn remove(node: &Node, name: *const c_char) -> Outcome<c_int> {
    // SAFETY: passed on to the caller.
    node.remove_xattr(&unsafe { name_of(name) }?)?;
    Ok(0)
}

/// Reads an extended attribute, as getxattr(2); with a size of 0, its length alone.
///
/// # Safety
/// `path`, `name` and `value` are the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_getxattr(
    volume: *mut VolumeHandle,
    path: *const c_char,
    name: *const c_char,
    value: *mut c_void,
    size: usize,
) -> libc::ssize_t {
    answer(|| {
        // SAFETY: passed on to the caller.
        let node = unsafe { Named::of(volume, path) }?.node(true)?;
        // SAFETY: passed on to the caller.
        unsafe { get(&node, name, value, size) }
    })
}

/// Reads an extended attribute of a symbolic link itself, as lgetxattr(2); with a size of 0, its length alone.
///
/// # Safety
/// `path`, `name` and `value` are the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_lgetxattr(
    volume: *mut VolumeHandle,
    path: *const c_char,
    name: *const c_char,
    value: *mut c_void,
    size: usize,
) -> libc::ssize_t {
    answer(|| {
        // SAFETY: passed on to the caller.
        let node = unsafe { Named::of(volume, path) }?.node(false)?;
        // SAFETY: passed on to the caller.
        unsafe { get(&node, name, value, size) }
    })
}

/// Reads an extended attribute by descriptor, as fgetxattr(2); with a size of 0, its length alone.
///
/// # Safety
/// `name` and `value` are the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_fgetxattr(
    fd: c_int,
    name: *const c_char,
    value: *mut c_void,
    size: usize,
) -> libc::ssize_t {
    answer(|| {
        let node = descriptor::of(fd)?.node().clone();
        // SAFETY: passed on to the caller.
        unsafe { get(&node, name, value, size) }
    })
}

/// Sets an extended attribute, as setxattr(2).
///
/// # Safety
/// `path`, `name` and `value` are the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_setxattr(
    volume: *mut VolumeHandle,
    path: *const c_char,
    name: *const c_char,
    value: *const c_void,
    size: usize,
    flags: c_int,
) -> c_int {
    answer(|| {
        // SAFETY: passed on to the caller.
        let node = unsafe { Named::of(volume, path) }?.node(true)?;
        // SAFETY: passed on to the caller.
        unsafe { set(&node, name, value, size, flags) }
    })
}

/// Sets an extended attribute of a symbolic link itself, as lsetxattr(2).
///
/// # Safety
/// `path`, `name` and `value` are the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_lsetxattr(
    volume: *mut VolumeHandle,
    path: *const c_char,
    name: *const c_char,
    value: *const c_void,
    size: usize,
    flags: c_int,
) -> c_int {
    answer(|| {
        // SAFETY: passed on to the caller.
        let node = unsafe { Named::of(volume, path) }?.node(false)?;
        // SAFETY: passed on to the caller.
        unsafe { set(&node, name, value, size, flags) }
    })
}

/// Sets an extended attribute by descriptor, as fsetxattr(2).
///
/// # Safety
/// `name` and `value` are the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_fsetxattr(
    fd: c_int,
    name: *const c_char,
    value: *const c_void,
    size: usize,
    flags: c_int,
) -> c_int {
    answer(|| {
        let node = descriptor::of(fd)?.node().clone();
        // SAFETY: passed on to the caller.
        unsafe { set(&node, name, value, size, flags) }
    })
}

/// Lists the names of the extended attributes, each ended by a zero byte, as listxattr(2); with a size of 0, their length alone.
///
/// # Safety
/// `path` and `list` are the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_listxattr(
    volume: *mut VolumeHandle,
    path: *const c_char,
    list: *mut c_char,
    size: usize,
) -> libc::ssize_t {
    answer(|| {
        // SAFETY: passed on to the caller.
        let node = unsafe { Named::of(volume, path) }?.node(true)?;
        // SAFETY: passed on to the caller.
        unsafe { names(&node, list, size) }
    })
}

/// Lists the names of the extended attributes of a symbolic link itself, each ended by a zero byte, as llistxattr(2); with a size of 0, their length alone.
///
/// # Safety
/// `path` and `list` are the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_llistxattr(
    volume: *mut VolumeHandle,
    path: *const c_char,
    list: *mut c_char,
    size: usize,
) -> libc::ssize_t {
    answer(|| {
        // SAFETY: passed on to the caller.
        let node = unsafe { Named::of(volume, path) }?.node(false)?;
        // SAFETY: passed on to the caller.
        unsafe { names(&node, list, size) }
    })
}

/// Lists the names of the extended attributes by descriptor, each ended by a zero byte, as flistxattr(2); with a size of 0, their length alone.
///
/// # Safety
/// `list` is the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_flistxattr(fd: c_int, list: *mut c_char, size: usize) -> libc::ssize_t {
    answer(|| {
        let node = descriptor::of(fd)?.node().clone();
        // SAFETY: passed on to the caller.
        unsafe { names(&node, list, size) }
    })
}

/// Removes an extended attribute, as removexattr(2).
///
/// # Safety
/// `path` and `name` are the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_removexattr(
    volume: *mut VolumeHandle,
    path: *const c_char,
    name: *const c_char,
) -> c_int {
    answer(|| {
        // SAFETY: passed on to the caller.
        let node = unsafe { Named::of(volume, path) }?.node(true)?;
        // SAFETY: passed on to the caller.
        unsafe { remove(&node, name) }
    })
}

/// Removes an extended attribute of a symbolic link itself, as lremovexattr(2).
///
/// # Safety
/// `path` and `name` are the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_lremovexattr(
    volume: *mut VolumeHandle,
    path: *const c_char,
    name: *const c_char,
) -> c_int {
    answer(|| {
        // SAFETY: passed on to the caller.
        let node = unsafe { Named::of(volume, path) }?.node(false)?;
        // SAFETY: passed on to the caller.
        unsafe { remove(&node, name) }
    })
}

/// Removes an extended attribute by descriptor, as fremovexattr(2).
///
/// # Safety
/// `name` is the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_fremovexattr(fd: c_int, name: *const c_char) -> c_int {
    answer(|| {
        let node = descriptor::of(fd)?.node().clone();
        // SAFETY: passed on to the caller.
        unsafe { remove(&node, name) }
    })
}
