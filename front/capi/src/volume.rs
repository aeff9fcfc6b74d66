//! Volumes: the handles C holds, and their settings.
//!
//! *Locking*: one lock over the table, held for look-ups and changes alone; opening, closing and resolving run outside.

use std::collections::BTreeMap;
use std::ffi::{c_char, c_int, c_uint};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::RwLock;
use pinfold::{Errno, Privilege, Volume};

use crate::call::answer;
use crate::descriptor::{PF_DESCRIPTOR_FIRST, PF_DESCRIPTORS_MAX};
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
    /// Milliseconds the directory's file system may take to answer before whoever waits for it gets EIO; 0 for no limit. Opening,
    /// looking up and changing names is not limited.
    pub store_timeout_ms: u32,
}

// SAFETY: integers.
unsafe impl user::Plain for Options {}

impl Options {
    /// The default, with a budget in bytes.
    pub(crate) fn with_memory(memory: u64) -> Self {
        Self {
            size: size_of::<Self>(),
            memory,
            dirty_limit: 0,
            background_interval_ms: 0,
            dirty_age_ms: 0,
            flags: 0,
            store_timeout_ms: 0,
        }
    }
}

/// Transfers run in threads instead of io_uring: for tools that cannot follow a ring.
pub const PF_OPTION_NO_IO_URING: u32 = 1;
/// Writes do not obey RLIMIT_FSIZE.
pub const PF_OPTION_NO_FILE_SIZE_LIMIT: u32 = 2;
/// A page that could not be stored stays dirty for another try.
pub const PF_OPTION_RETAIN_DIRTY: u32 = 4;
/// Faults in mappings are served by the faulting thread, in a SIGBUS handler: several times cheaper, but system calls on mapped
/// memory that is not resident fail with EFAULT (pf_pin it first), and a thread that blocks SIGBUS is killed.
pub const PF_OPTION_INLINE_FAULTS: u32 = 8;

const FLAGS_KNOWN: u32 = PF_OPTION_NO_IO_URING
    | PF_OPTION_NO_FILE_SIZE_LIMIT
    | PF_OPTION_RETAIN_DIRTY
    | PF_OPTION_INLINE_FAULTS;

/// Files can be mapped.
pub const PF_CAPABILITY_MAPPINGS: c_int = 1;
/// System calls work on mapped memory that is not resident, unless the volume was opened with PF_OPTION_INLINE_FAULTS.
pub const PF_CAPABILITY_MAPPED_SYSTEM_CALLS: c_int = 2;

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
    inline_faults: bool,
    /// Where it lies in the process's own name space, without symbolic links.
    path: PathBuf,
}

impl Served {
    pub(crate) fn volume(&self) -> &Volume {
        &self.volume
    }

    /// Tells whether the faulting thread serves faults in mappings.
    pub(crate) fn inline_faults(&self) -> bool {
        self.inline_faults
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
}

static VOLUMES: RwLock<Volumes> = RwLock::new(Volumes {
    served: BTreeMap::new(),
    default: None,
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

/// Tells whether any volume is open.
pub(crate) fn any() -> Outcome<bool> {
    Ok(!fork::read(&VOLUMES)?.served.is_empty())
}

/// Finds the innermost open volume around a resolved path: its handle, its root's number, and the path from there.
pub(crate) fn around(real: &Path) -> Outcome<Option<(*mut VolumeHandle, c_int, PathBuf)>> {
    let volumes = fork::read(&VOLUMES)?;
    let inside = |served| -> Option<(&Arc<Served>, &Path)> {
        let served: &Arc<Served> = served;
        Some((served, real.strip_prefix(&served.path).ok()?))
    };
    let around = volumes.served.values().filter_map(inside);
    let innermost = around.min_by_key(|(_, inside)| inside.as_os_str().len());
    Ok(innermost
        .map(|(served, inside)| (handle_of(served), served.root_number(), inside.to_owned())))
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
            true => Options::with_memory(0),
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
    if options.flags & !FLAGS_KNOWN != 0 {
        return refuse(Errno::EINVAL, "the options' flags");
    }
    Ok(options)
}

pub(crate) fn open(path: &Path, options: &Options) -> Outcome<*mut VolumeHandle> {
    fork::watch();
    let real = std::fs::canonicalize(path).map_err(|error| unusable(path, &error))?;
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
    if options.store_timeout_ms > 0 {
        builder = builder.store_timeout(ms(options.store_timeout_ms));
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
        inline_faults: has(PF_OPTION_INLINE_FAULTS),
        path: real,
    });
    let handle = handle_of(&served);
    volumes.served.insert(handle.addr(), served);
    volumes.default.get_or_insert(handle.addr());
    Ok(handle)
}

pub(crate) fn unusable(path: &Path, error: &std::io::Error) -> Failure {
    let words = format!("cannot serve directory {}: {error}", path.display());
    Failure::Other(Errno::from(error), words)
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

/// Tells what this system lets the volume do: PF_CAPABILITY_ bits.
#[unsafe(no_mangle)]
pub extern "C" fn pf_volume_capabilities(volume: *mut VolumeHandle) -> c_int {
    answer(|| {
        Ok(match of(volume)?.volume.capabilities().mappings {
            Ok(Privilege::Device | Privilege::Full) => {
                PF_CAPABILITY_MAPPINGS | PF_CAPABILITY_MAPPED_SYSTEM_CALLS
            }
            Ok(Privilege::UserModeOnly) => PF_CAPABILITY_MAPPINGS,
            Err(_) => 0,
        })
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

/// Returns the version of this interface: programs built against the same number work with the library.
#[unsafe(no_mangle)]
pub extern "C" fn pf_abi_version() -> c_uint {
    PF_ABI_VERSION
}

/// The version of this header.
pub const PF_ABI_VERSION: u32 = 0;
