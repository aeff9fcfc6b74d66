//! Volumes: the handles C holds, their settings, and which of them a path of the process lies in.
//!
//! *Locking*: one lock over the table, held for look-ups and changes alone; opening, closing and resolving run outside.

use std::collections::BTreeMap;
use std::ffi::{OsStr, c_char, c_int, c_uint};
use std::mem::offset_of;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Once};
use std::time::Duration;

use parking_lot::RwLock;
use pinfold::{Errno, Volume};

use crate::call::answer;
use crate::descriptor::{PF_DESCRIPTOR_FIRST, PF_DESCRIPTORS_MAX, pf_is_descriptor};
use crate::errors::{Failure, Outcome, refuse};
use crate::{fork, user};

/// A volume: a directory served by a page cache of this process.
#[derive(Debug)]
pub struct VolumeHandle {
    _opaque: [u8; 0],
}

/// Settings of a volume. Set `size` to sizeof(pf_options) and the rest to 0 for the default.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Options {
    /// sizeof(pf_options): lets the structure grow without breaking programs.
    pub size: usize,
    /// Budget for cached pages in bytes; 0 for 256 MiB.
    pub memory: u64,
    /// Bytes that may be dirty before writers are made to wait; 0 for half the budget.
    pub dirty_limit: u64,
    /// Milliseconds between two looks of background write-back; 0 for 1000.
    pub background_interval_ms: u32,
    /// Milliseconds a page stays dirty before background write-back stores it; 0 for 5000.
    pub dirty_age_ms: u32,
    /// PF_OPTION_ flags.
    pub flags: u32,
    /// 0.
    pub reserved: u32,
}

// SAFETY: integers.
unsafe impl user::Plain for Options {}

/// Transfers run in threads instead of io_uring: for tools that cannot follow a ring.
pub const PF_OPTION_NO_IO_URING: u32 = 1;
/// Writes do not obey RLIMIT_FSIZE.
pub const PF_OPTION_NO_FILE_SIZE_LIMIT: u32 = 2;
/// A page that could not be stored stays dirty for another try.
pub const PF_OPTION_RETAIN_DIRTY: u32 = 4;

const FLAGS_KNOWN: u32 =
    PF_OPTION_NO_IO_URING | PF_OPTION_NO_FILE_SIZE_LIMIT | PF_OPTION_RETAIN_DIRTY;
/// The largest pf_options of any version to come.
const OPTIONS_SIZE_MAX: usize = 4096;
/// Volumes in one process at most.
const VOLUMES_MAX: c_int = 64;

/// One counter of a volume.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Statistic {
    /// Its name, ended by a zero byte.
    pub name: [c_char; 56],
    /// Its value now.
    pub value: u64,
}

// SAFETY: integers.
unsafe impl user::Plain for Statistic {}

/// A volume that is open.
#[derive(Debug)]
pub(crate) struct Served {
    volume: Volume,
    /// Which of the numbers for roots stands for its root.
    slot: c_int,
    /// Where it lies in the process's own name space, without symbolic links.
    path: PathBuf,
}

impl Served {
    pub(crate) fn volume(&self) -> &Volume {
        &self.volume
    }

    fn root_number(&self) -> c_int {
        PF_DESCRIPTOR_FIRST + PF_DESCRIPTORS_MAX + self.slot
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

#[derive(Debug)]
struct Volumes {
    /// By the address that C knows; never followed, so that a stale one does no harm.
    served: BTreeMap<usize, Arc<Served>>,
    default: Option<usize>,
    /// What the environment asked for and could not be opened: using it past the cache could mix old bytes with new.
    refused: Vec<(PathBuf, Errno, String)>,
}

static VOLUMES: RwLock<Volumes> = RwLock::new(Volumes {
    served: BTreeMap::new(),
    default: None,
    refused: Vec::new(),
});

/// Looks a handle up; NULL means the default volume.
pub(crate) fn of(handle: *const VolumeHandle) -> Outcome<Arc<Served>> {
    let volumes = VOLUMES.read();
    let address = match handle.addr() {
        0 => match volumes.default {
            Some(default) => default,
            None => return refuse(Errno::EBADF, "there is no default volume"),
        },
        address => address,
    };
    match volumes.served.get(&address) {
        Some(served) => Ok(Arc::clone(served)),
        None => refuse(Errno::EBADF, "not an open volume"),
    }
}

/// Opens `path`, an existing directory, as a volume; NULL for `options` means the default. The first volume opened
/// becomes the default one. Fails with EBUSY if it, or a directory above or below it, is served already, by this process
/// or another.
///
/// # Safety
/// The pointers are the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_volume_open(
    path: *const c_char,
    options: *const Options,
) -> *mut VolumeHandle {
    answer(|| {
        // SAFETY: passed on to the caller.
        let path = unsafe { user::path(path) }?;
        let options = match options.is_null() {
            true => Options {
                size: size_of::<Options>(),
                memory: 0,
                dirty_limit: 0,
                background_interval_ms: 0,
                dirty_age_ms: 0,
                flags: 0,
                reserved: 0,
            },
            // SAFETY: passed on to the caller.
            false => unsafe { options_of(options) }?,
        };
        open(&path, &options)
    })
}

/// Reads a structure that may be an older or newer version's.
///
/// # Safety
/// As for [`user::buffer`].
unsafe fn options_of(from: *const Options) -> Outcome<Options> {
    let mut bytes = [0; OPTIONS_SIZE_MAX];
    const FIRST: usize = size_of::<usize>();
    let at = from.expose_provenance();
    // SAFETY: passed on to the caller.
    unsafe { user::read_bytes(at, &mut bytes[..FIRST]) }?;
    let size = usize::from_ne_bytes(
        bytes[..FIRST]
            .try_into()
            .expect("the slice is as long as a usize"),
    );
    if size < FIRST {
        return refuse(Errno::EINVAL, "the options' size");
    }
    if size > OPTIONS_SIZE_MAX {
        return refuse(Errno::E2BIG, "the options' size");
    }
    // SAFETY: passed on to the caller.
    unsafe { user::read_bytes(at, &mut bytes[..size]) }?;
    let (known, newer) = bytes.split_at_mut(size_of::<Options>());
    if newer.iter().any(|&byte| byte != 0) {
        return refuse(Errno::E2BIG, "the options ask for what this version lacks");
    }
    // SAFETY: our own array, at least as long as the structure.
    let options = unsafe { user::get(known.as_ptr().cast::<Options>()) }?;
    if options.flags & !FLAGS_KNOWN != 0 || options.reserved != 0 {
        return refuse(Errno::EINVAL, "the options' flags");
    }
    Ok(options)
}

fn open(path: &Path, options: &Options) -> Outcome<*mut VolumeHandle> {
    fork::watch();
    let real = std::fs::canonicalize(path).map_err(|error| {
        let words = format!("cannot serve directory {}: {error}", path.display());
        Failure::Other(Errno::from(&error), words)
    })?;
    let has = |flag| options.flags & flag != 0;
    let mut builder = Volume::builder()
        .io_uring(!has(PF_OPTION_NO_IO_URING))
        .file_size_limit(!has(PF_OPTION_NO_FILE_SIZE_LIMIT))
        .retain_dirty_on_error(has(PF_OPTION_RETAIN_DIRTY));
    if options.memory > 0 {
        builder = builder.memory(options.memory);
    }
    if options.dirty_limit > 0 {
        builder = builder.dirty_limit(options.dirty_limit);
    }
    let ms = |ms: u32| Duration::from_millis(ms.into());
    if options.background_interval_ms > 0 {
        builder = builder.background_interval(ms(options.background_interval_ms));
    }
    if options.dirty_age_ms > 0 {
        builder = builder.dirty_age_max(ms(options.dirty_age_ms));
    }
    let volume = builder.open_dir(&real)?;
    let mut volumes = VOLUMES.write();
    let taken = |slot| volumes.served.values().any(|served| served.slot == slot);
    let Some(slot) = (0..VOLUMES_MAX).find(|&slot| !taken(slot)) else {
        drop(volumes);
        return refuse(Errno::EMFILE, "one more volume");
    };
    let served = Arc::new(Served {
        volume,
        slot,
        path: real,
    });
    let handle = handle_of(&served);
    volumes.served.insert(handle.addr(), served);
    volumes.default.get_or_insert(handle.addr());
    Ok(handle)
}

fn handle_of(served: &Arc<Served>) -> *mut VolumeHandle {
    Arc::as_ptr(served).cast::<VolumeHandle>().cast_mut()
}

/// Writes everything back, makes it durable and ends the volume. EBUSY while descriptors, directories or mappings of it are
/// open: then nothing happens. After any other error the volume is closed all the same.
#[unsafe(no_mangle)]
pub extern "C" fn pf_volume_close(volume: *mut VolumeHandle) -> c_int {
    answer(|| {
        // Held while it is taken out: whoever looks it up meanwhile would keep it open.
        let mine = of(volume)?;
        let address = Arc::as_ptr(&mine).addr();
        let mut volumes = VOLUMES.write();
        // The table's and this one.
        if Arc::strong_count(&mine) > 2 {
            return refuse(Errno::EBUSY, "files of the volume are open");
        }
        volumes.served.remove(&address);
        if volumes.default == Some(address) {
            volumes.default = volumes.served.keys().next().copied();
        }
        drop(volumes);
        match Arc::try_unwrap(mine) {
            Ok(served) => served.volume.close()?,
            // Somebody else closes it at the same time.
            Err(_) => return refuse(Errno::EBADF, "not an open volume"),
        }
        Ok(0)
    })
}

/// Makes a volume the one that NULL stands for.
#[unsafe(no_mangle)]
pub extern "C" fn pf_volume_set_default(volume: *mut VolumeHandle) -> c_int {
    answer(|| {
        let address = Arc::as_ptr(&of(volume)?).addr();
        VOLUMES.write().default = Some(address);
        Ok(0)
    })
}

/// Writes everything back and makes it durable, as syncfs(2).
#[unsafe(no_mangle)]
pub extern "C" fn pf_volume_sync(volume: *mut VolumeHandle) -> c_int {
    answer(|| {
        of(volume)?.volume.sync()?;
        Ok(0)
    })
}

/// Fills at most `count` elements of `rows` with what happened in the volume so far; returns how many there are in all.
///
/// # Safety
/// `rows` is the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_volume_statistics(
    volume: *mut VolumeHandle,
    rows: *mut Statistic,
    count: usize,
) -> libc::ssize_t {
    answer(|| {
        let all = of(volume)?.volume.statistics().rows();
        for (index, (name, value)) in all.iter().take(count).enumerate() {
            let mut row = Statistic {
                name: [0; 56],
                value: *value,
            };
            // All but the last, so that a zero byte ends it.
            let room = row.name.len() - 1;
            for (to, byte) in row.name[..room].iter_mut().zip(name.bytes()) {
                *to = byte as c_char;
            }
            // SAFETY: passed on to the caller; a bad address is an error of the copy.
            unsafe { user::put(rows.wrapping_add(index), row) }?;
        }
        // A handful of counters.
        Ok(all.len() as isize)
    })
}

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
/// colons), each with the budget in PINFOLD_MEMORY (bytes, or with K, M, G).
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
    answer(|| {
        open_from_environment();
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

/// Returns a number that stands for the volume's root directory in calls that take a directory descriptor, until the volume
/// is closed. It is no descriptor: nothing else takes it, and it need not be closed.
#[unsafe(no_mangle)]
pub extern "C" fn pf_volume_root(volume: *mut VolumeHandle) -> c_int {
    answer(|| Ok(of(volume)?.root_number()))
}

/// Returns the volume whose root a number stands for.
pub(crate) fn by_root(number: c_int) -> Option<Arc<Served>> {
    let volumes = VOLUMES.read();
    let mut all = volumes.served.values();
    all.find(|served| served.root_number() == number).cloned()
}

/// Finds the volume a path of the process lies in, and the path from its root.
fn locate(path: &Path, follow: bool) -> Outcome<Option<(*mut VolumeHandle, c_int, PathBuf)>> {
    {
        let volumes = VOLUMES.read();
        if volumes.served.is_empty() && volumes.refused.is_empty() {
            return Ok(None);
        }
    }
    // The kernel's word is what the names mean: ours are the same inodes. What it cannot resolve, its own call refuses.
    let Some(real) = real_path(path, follow) else {
        return Ok(None);
    };
    let volumes = VOLUMES.read();
    for (refused, errno, words) in &volumes.refused {
        if real.starts_with(refused) {
            return Err(Failure::Other(*errno, words.clone()));
        }
    }
    let found = volumes
        .served
        .values()
        .filter_map(|served| Some((served, real.strip_prefix(&served.path).ok()?)))
        .min_by_key(|(_, inside)| inside.as_os_str().len());
    Ok(found.map(|(served, inside)| {
        let mut place = PathBuf::from("/").join(inside).into_os_string();
        // Components are what paths here are made of: what follows the last one has to be put back.
        if real.as_os_str().as_bytes().ends_with(b"/.") {
            place.push("/.");
        } else if path.as_os_str().as_bytes().ends_with(b"/") {
            place.push("/");
        }
        (handle_of(served), served.root_number(), place.into())
    }))
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

/// Opens the volumes that the environment names: so that a program that knows nothing of volumes can use them.
fn open_from_environment() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let Some(dirs) = std::env::var_os("PINFOLD_VOLUMES") else {
            return;
        };
        let memory = std::env::var("PINFOLD_MEMORY").unwrap_or_default();
        for dir in std::env::split_paths(&dirs).filter(|dir| !dir.as_os_str().is_empty()) {
            let opened = match size(&memory) {
                Some(memory) => open(
                    &dir,
                    &Options {
                        size: size_of::<Options>(),
                        memory,
                        dirty_limit: 0,
                        background_interval_ms: 0,
                        dirty_age_ms: 0,
                        flags: 0,
                        reserved: 0,
                    },
                ),
                None => Err(Failure::Other(
                    Errno::EINVAL,
                    format!("PINFOLD_MEMORY is not a size: {memory}"),
                )),
            };
            if let Err(failure) = opened {
                // Nobody called who could be told; path calls below the directory will fail with the same words.
                eprintln!("pinfold: {failure}");
                let real = std::fs::canonicalize(&dir).unwrap_or(dir);
                let mut volumes = VOLUMES.write();
                volumes
                    .refused
                    .push((real, failure.errno(), failure.to_string()));
            }
        }
    });
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

/// Returns the version of this interface: programs built against the same number work with the library.
#[unsafe(no_mangle)]
pub extern "C" fn pf_abi_version() -> c_uint {
    PF_ABI_VERSION
}

/// The version of this header.
pub const PF_ABI_VERSION: u32 = 0;

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
