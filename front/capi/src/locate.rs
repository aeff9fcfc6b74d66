//! Which volume a path of the process lies in: what lets a program keep its paths.
//!
//! *Owns*: resolving a path as the kernel would, the volumes that the environment names.
//!
//! *Locking*: one lock over what the environment named, held for look-ups and changes alone; one that lets a single thread open
//! such a volume, taken before it and before the table of volumes.

use std::ffi::{OsStr, c_char, c_int};
use std::mem::offset_of;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Once;

use parking_lot::{Mutex, RwLock};
use pinfold::Errno;

use crate::call::answer_in_child_too;
use crate::descriptor::pf_is_descriptor;
use crate::errors::{Failure, Outcome, refuse};
use crate::volume::{self, Options, PF_OPTION_INLINE_FAULTS, VolumeHandle};
use crate::{fork, user};

/// What the environment names.
struct Named {
    /// Directories that nobody has used yet.
    awaited: Vec<PathBuf>,
    /// Those that could not be opened: using them past the cache could mix old bytes with new.
    refused: Vec<(PathBuf, Errno, String)>,
}

static NAMED: RwLock<Named> = RwLock::new(Named {
    awaited: Vec::new(),
    refused: Vec::new(),
});

/// Where a path of the process lies, for both kinds of calls.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Location {
    /// The volume, for calls that take one; NULL if the path starts from a directory descriptor.
    pub volume: *mut VolumeHandle,
    /// The directory descriptor, for calls that take one.
    pub at: c_int,
    /// The path from there.
    pub path: [c_char; user::PATH_MAX],
}

/// Tells whether `path`, as this process would resolve it from the directory `dir_fd` names or AT_FDCWD, lies in an
/// open volume: 1 and `*location` if it does, 0 if not. With AT_SYMLINK_NOFOLLOW in `flags`, a symbolic link at the end
/// counts by where it lies. When it is first called it opens the volumes that PINFOLD_VOLUMES names (directories parted by
/// colons), each with the budget in PINFOLD_MEMORY (bytes, or with K, M, G)
/// and faults served as PINFOLD_FAULTS says (handler or inline).
///
/// # Safety
/// The pointers are the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_locate(
    dir_fd: c_int,
    path: *const c_char,
    flags: c_int,
    location: *mut Location,
) -> c_int {
    answer_in_child_too(|| {
        note_environment();
        // SAFETY: passed on to the caller.
        let mut path = unsafe { user::path(path) }?;
        let mut found = None;
        if path.is_relative() && dir_fd != libc::AT_FDCWD {
            if pf_is_descriptor(dir_fd) != 0 {
                found = Some((std::ptr::null_mut(), dir_fd, std::mem::take(&mut path)));
            } else {
                path = PathBuf::from(format!("/proc/self/fd/{dir_fd}")).join(path);
            }
        }
        if found.is_none() {
            found = locate(&path, flags & libc::AT_SYMLINK_NOFOLLOW == 0)?;
        }
        let Some((volume, at, path)) = found else {
            return Ok(0);
        };
        let mut text = path.into_os_string().into_encoded_bytes();
        text.push(0);
        if text.len() > user::PATH_MAX {
            return refuse(Errno::ENAMETOOLONG, "the path inside the volume");
        }
        let field = |offset: usize| location.addr().wrapping_add(offset);
        // SAFETY: passed on to the caller.
        unsafe {
            user::write_bytes(
                field(offset_of!(Location, volume)),
                &mut volume.addr().to_ne_bytes(),
            )
        }?;
        // SAFETY: passed on to the caller.
        unsafe { user::write_bytes(field(offset_of!(Location, at)), &mut at.to_ne_bytes()) }?;
        // SAFETY: passed on to the caller.
        unsafe { user::write_bytes(field(offset_of!(Location, path)), &mut text) }?;
        Ok(1)
    })
}

/// Finds the volume a path of the process lies in, and the path from its root.
fn locate(path: &Path, follow: bool) -> Outcome<Option<(*mut VolumeHandle, c_int, PathBuf)>> {
    if !volume::any()? && nothing_named()? {
        return Ok(None);
    }
    // The kernel's word is what the names mean: ours are the same inodes. What it cannot resolve, its own call refuses.
    let Some(real) = real_path(path, follow) else {
        return Ok(None);
    };
    open_awaited(&real);
    let named = fork::read(&NAMED)?;
    for (refused, errno, words) in &named.refused {
        if real.starts_with(refused) {
            return Err(Failure::Other(*errno, words.clone()));
        }
    }
    drop(named);
    let Some((handle, root, inside)) = volume::around(&real)? else {
        return Ok(None);
    };
    fork::check()?;
    let mut place = PathBuf::from("/").join(inside).into_os_string();
    // Components are what paths here are made of: what follows the last one has to be put back.
    if real.as_os_str().as_bytes().ends_with(b"/.") {
        place.push("/.");
    } else if path.as_os_str().as_bytes().ends_with(b"/") {
        place.push("/");
    }
    Ok(Some((handle, root, place.into())))
}

fn nothing_named() -> Outcome<bool> {
    let named = fork::read(&NAMED)?;
    Ok(named.awaited.is_empty() && named.refused.is_empty())
}

/// Resolves a path by the kernel, except a last component that does not exist or is not to be followed.
fn real_path(path: &Path, follow: bool) -> Option<PathBuf> {
    if follow && let Ok(real) = std::fs::canonicalize(path) {
        return Some(real);
    }
    let (dir, name) = split(path);
    if matches!(name.as_bytes(), b"" | b"." | b"..") {
        let real = std::fs::canonicalize(path).ok()?;
        // Calls that make or remove a name refuse such an end, each in its way.
        return Some(if name.is_empty() {
            real
        } else {
            with_dot(real)
        });
    }
    Some(std::fs::canonicalize(dir).ok()?.join(name))
}

/// Parts the last component from the rest; `.` stays one.
fn split(path: &Path) -> (&Path, &OsStr) {
    let bytes = path.as_os_str().as_bytes();
    let end = bytes.iter().rposition(|&byte| byte != b'/');
    let whole = &bytes[..end.map_or(0, |end| end + 1)];
    let slash = whole.iter().rposition(|&byte| byte == b'/');
    let at = slash.map_or(0, |slash| slash + 1);
    let dir = match &whole[..at] {
        b"" if bytes.starts_with(b"/") => b"/",
        b"" => b"." as &[u8],
        dir => dir,
    };
    (
        Path::new(OsStr::from_bytes(dir)),
        OsStr::from_bytes(&whole[at..]),
    )
}

fn with_dot(path: PathBuf) -> PathBuf {
    let mut text = path.into_os_string();
    text.push("/.");
    text.into()
}

/// Notes which volumes the environment names, so that a program that knows nothing of volumes can use them. Each is opened
/// when a path first leads into it: a program may become a daemon before.
fn note_environment() {
    static ONCE: Once = Once::new();
    if fork::in_child() {
        return;
    }
    ONCE.call_once(|| {
        let Some(dirs) = std::env::var_os("PINFOLD_VOLUMES") else {
            return;
        };
        for dir in std::env::split_paths(&dirs).filter(|dir| !dir.as_os_str().is_empty()) {
            match std::fs::canonicalize(&dir) {
                Ok(real) => NAMED.write().awaited.push(real),
                Err(error) => refuse_from_now_on(dir.clone(), volume::unusable(&dir, &error)),
            }
        }
    });
}

/// Opens the volume that the environment names and a path leads into, if it is not open yet.
fn open_awaited(real: &Path) {
    static TURN: Mutex<()> = Mutex::new(());
    let awaited = || {
        let named = fork::read(&NAMED).ok()?;
        let mut dirs = named.awaited.iter();
        dirs.find(|dir| real.starts_with(dir)).cloned()
    };
    if fork::in_child() || awaited().is_none() {
        return;
    }
    let _turn = TURN.lock();
    let Some(dir) = awaited() else {
        return;
    };
    let memory = std::env::var("PINFOLD_MEMORY").unwrap_or_default();
    let faults = std::env::var("PINFOLD_FAULTS").unwrap_or_default();
    let opened = options(&memory, &faults).and_then(|options| volume::open(&dir, &options));
    if let Err(failure) = opened {
        refuse_from_now_on(dir.clone(), failure);
    }
    NAMED.write().awaited.retain(|other| *other != dir);
}

/// Reads what the environment says about its volumes.
fn options(memory: &str, faults: &str) -> Outcome<Options> {
    let invalid = |words| Err(Failure::Other(Errno::EINVAL, words));
    let Some(memory) = size(memory) else {
        return invalid(format!("PINFOLD_MEMORY is not a size: {memory}"));
    };
    let mut options = Options::with_memory(memory);
    match faults {
        "" | "handler" => {}
        "inline" => options.flags |= PF_OPTION_INLINE_FAULTS,
        other => return invalid(format!("PINFOLD_FAULTS is not handler or inline: {other}")),
    }
    Ok(options)
}

/// Lets path calls into a directory fail. Says so at once: nobody called who would look at a message.
fn refuse_from_now_on(dir: PathBuf, failure: Failure) {
    eprintln!("pinfold: {failure}");
    let refused = (dir, failure.errno(), failure.to_string());
    NAMED.write().refused.push(refused);
}

/// Reads a number of bytes with an optional K, M or G; nothing means 0.
fn size(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let shift = match &text[digits.len()..] {
        "" => 0,
        "K" | "KiB" => 10,
        "M" | "MiB" => 20,
        "G" | "GiB" => 30,
        _ => return None,
    };
    if text.is_empty() {
        return Some(0);
    }
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_their_units() {
        assert_eq!(size(""), Some(0));
        assert_eq!(size("4096"), Some(4096));
        assert_eq!(size("64M"), Some(64 << 20));
        assert_eq!(size("1GiB"), Some(1 << 30));
        assert_eq!(size("M"), None);
        assert_eq!(size("1T"), None);
        assert_eq!(size("99999999999G"), None);
    }

    #[test]
    fn the_last_component_need_not_exist_and_is_followed_only_if_asked() {
        let scratch = tempfile::tempdir().unwrap();
        let dir = scratch.path().canonicalize().unwrap();
        std::os::unix::fs::symlink("target", dir.join("link")).unwrap();
        std::fs::write(dir.join("target"), b"").unwrap();
        let link = dir.join("link");
        assert_eq!(real_path(&link, true), Some(dir.join("target")));
        assert_eq!(real_path(&link, false), Some(link));
        assert_eq!(real_path(&dir.join("new"), true), Some(dir.join("new")));
        assert_eq!(real_path(&dir.join("no/new"), true), None);
        assert_eq!(real_path(&dir.join("./x/.."), true), None);
        let dotted = real_path(&dir.join("."), false).unwrap();
        assert_eq!(dotted.as_os_str(), dir.join(".").as_os_str());
    }

    #[test]
    fn the_last_component_is_parted_from_the_rest() {
        let parted = |path| {
            let (dir, name) = split(Path::new(path));
            (dir.to_str().unwrap(), name.to_str().unwrap())
        };
        assert_eq!(parted("a"), (".", "a"));
        assert_eq!(parted("a/b//"), ("a/", "b"));
        assert_eq!(parted("/a"), ("/", "a"));
        assert_eq!(parted("//"), ("/", ""));
        assert_eq!(parted("a/."), ("a/", "."));
    }
}
