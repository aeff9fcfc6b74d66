//! The kernel's file systems, by plain system calls.
//!
//! *Owns*: [`Kernel`], a directory of any mounted file system.
//!
//! *Does not own*: the mount, except the private one that a failing store needs ([`crate::image`]).
//!
//! *Locking*: none.

use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pinfold_base::Errno;
use pinfold_mem::Direction;
use pinfold_mem::region::transfer;
use pinfold_mem::region::view::{FileMap, Sharing, View};
use pinfold_mem::region::{self, At, UserIov};
use rustix::fs::{Advice, FallocateFlags, SeekFrom};
use rustix::io::ReadWriteFlags;

use super::{Allocate, Fs, Handle, How, Kind, Mapped, Open, Pins, Refusal, Troubled, Weather};
use crate::image::FailingStore;

/// A directory of a kernel file system.
#[derive(Debug)]
pub struct Kernel {
    dir: PathBuf,
    kind: Kind,
    /// Unmounted when the last user is gone.
    _store: Option<Arc<FailingStore>>,
}

impl Kernel {
    /// Looks what `dir` lies on.
    ///
    /// # Errors
    /// As statfs(2).
    pub fn new(dir: &Path) -> Result<Self, Errno> {
        Ok(Self {
            dir: dir.to_path_buf(),
            kind: kind_of(dir)?,
            _store: None,
        })
    }
}

/// Returns the kind of the kernel file system that `dir` lies on.
///
/// # Errors
/// As statfs(2).
pub fn kind_of(dir: &Path) -> Result<Kind, Errno> {
    let statfs = rustix::fs::statfs(dir).map_err(errno)?;
    Ok(Kind::of_magic(statfs.f_type.cast_unsigned()))
}

impl Fs for Kernel {
    fn kind(&self) -> Kind {
        self.kind
    }

    fn dir(&self) -> &Path {
        &self.dir
    }

    fn open(&self, name: &str, how: Open) -> Result<Box<dyn Handle>, Errno> {
        let mut flags = 0;
        for (wanted, flag) in [
            (how.append, libc::O_APPEND),
            (how.direct, libc::O_DIRECT),
            (how.dsync, libc::O_DSYNC),
        ] {
            if wanted {
                flags |= flag;
            }
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(how.create)
            .truncate(how.truncate)
            .mode(0o600)
            .custom_flags(flags)
            .open(self.dir.join(name))?;
        Ok(Box::new(KernelFile { file }))
    }

    fn cancels(&self) -> bool {
        false
    }

    fn pins(&self) -> Option<Pins> {
        // The whole machine's: whoever compares them has to wait for others' transfers to end.
        let vmstat = std::fs::read_to_string("/proc/vmstat").ok()?;
        let count = |name: &str| {
            let line = vmstat.lines().find_map(|line| line.strip_prefix(name))?;
            line.trim().parse().ok()
        };
        Some(Pins {
            acquired: count("nr_foll_pin_acquired ")?,
            released: count("nr_foll_pin_released ")?,
        })
    }

    fn troubled(&self) -> Result<Troubled, String> {
        let store = Arc::new(FailingStore::new(&self.dir, self.kind)?);
        let fs = Self {
            dir: store.mount_point().to_path_buf(),
            kind: self.kind,
            _store: Some(Arc::clone(&store)),
        };
        let root = store.mount_point().to_path_buf();
        Ok(Troubled {
            fs: Box::new(fs),
            write_back: Box::new(move || {
                // Opened anew each time, so that nothing keeps the mount busy. The error is told to this descriptor;
                // files keep their own.
                let root = File::open(&root).map_err(|error| error.to_string())?;
                let _ = rustix::fs::syncfs(&root);
                Ok(())
            }),
            turn: Box::new(move |weather| match weather {
                Weather::Fair => store.accept_data(),
                Weather::WritesFail => store.refuse_data(),
                Weather::WritesTake(_) | Weather::ReadsTake(_) => {
                    Err("no slow block device without device-mapper's delay target".into())
                }
            }),
        })
    }

    fn volatile(&self) -> Result<Box<dyn Fs>, String> {
        Err(
            "what a kernel caches outlives a killed process; only the machine's own crash loses it"
                .into(),
        )
    }
}

#[derive(Debug)]
struct KernelFile {
    file: File,
}

impl Handle for KernelFile {
    fn read(&self, to: &UserIov<'_>, at: At, how: How<'_>) -> Result<usize, Errno> {
        region::read(self.file.as_fd(), to, at, flags(how))
    }

    fn write(&self, from: &UserIov<'_>, at: At, how: How<'_>) -> Result<usize, Errno> {
        region::write(self.file.as_fd(), from, at, flags(how))
    }

    fn seek(&self, offset: u64) -> Result<(), Errno> {
        rustix::fs::seek(&self.file, SeekFrom::Start(offset))
            .map(drop)
            .map_err(errno)
    }

    fn position(&self) -> Result<u64, Errno> {
        rustix::fs::seek(&self.file, SeekFrom::Current(0)).map_err(errno)
    }

    fn size(&self) -> Result<u64, Errno> {
        Ok(self.file.metadata()?.len())
    }

    fn truncate(&self, size: u64) -> Result<(), Errno> {
        rustix::fs::ftruncate(&self.file, size).map_err(errno)
    }

    fn allocate(&self, mode: Allocate, range: Range<u64>) -> Result<(), Errno> {
        let flags = match mode {
            Allocate::Grow => FallocateFlags::empty(),
            Allocate::KeepSize => FallocateFlags::KEEP_SIZE,
            Allocate::Punch => FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            Allocate::Zero => FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE,
        };
        let len = range.end.saturating_sub(range.start);
        rustix::fs::fallocate(&self.file, flags, range.start, len).map_err(errno)
    }

    fn sync(&self) -> Result<(), Errno> {
        rustix::fs::fsync(&self.file).map_err(errno)
    }

    fn sync_data(&self) -> Result<(), Errno> {
        rustix::fs::fdatasync(&self.file).map_err(errno)
    }

    fn drop_cache(&self) -> Result<(), Errno> {
        // Only clean pages can be dropped.
        self.sync()?;
        rustix::fs::fadvise(&self.file, 0, None, Advice::DontNeed).map_err(errno)
    }

    fn map(&self, range: Range<u64>, sharing: Sharing) -> Result<Box<dyn Mapped>, Refusal> {
        let len =
            usize::try_from(range.end.saturating_sub(range.start)).map_err(|_| Errno::ENOMEM)?;
        let map = FileMap::new(self.file.as_fd(), range.start, len, sharing)?;
        Ok(Box::new(KernelMap { map }))
    }

    fn extents(&self, into: &UserIov<'_>) -> Result<usize, Refusal> {
        Ok(transfer::extents(self.file.as_fd(), into)?)
    }

    fn transfer(
        &self,
        direction: Direction,
        iov: &UserIov<'_>,
        offset: u64,
        meanwhile: &mut dyn FnMut(),
    ) -> Result<usize, Refusal> {
        let file = self.file.as_fd();
        match transfer::asynchronously(file, direction, iov, offset, meanwhile) {
            Err(Errno::ENOSYS) => Err(Refusal::Missing("there is no io_uring here")),
            done => Ok(done?),
        }
    }
}

#[derive(Debug)]
struct KernelMap {
    map: FileMap,
}

impl Mapped for KernelMap {
    fn view(&self) -> View<'_> {
        self.map.view()
    }

    fn sync(&self, range: Range<usize>, flags: i32) -> Result<(), Refusal> {
        Ok(self.map.sync(range, flags)?)
    }

    fn forget(&self, range: Range<usize>) -> Result<(), Refusal> {
        Ok(self.map.forget(range)?)
    }

    fn resident(&self, range: Range<usize>) -> Result<Vec<bool>, Refusal> {
        Ok(self.map.resident(range)?)
    }

    fn unmap(&mut self, range: Range<usize>) -> Result<(), Refusal> {
        Ok(self.map.unmap(range)?)
    }
}

fn flags(how: How<'_>) -> ReadWriteFlags {
    let mut flags = ReadWriteFlags::empty();
    flags.set(ReadWriteFlags::NOWAIT, how.nowait);
    flags.set(ReadWriteFlags::DSYNC, how.dsync);
    flags
}

fn errno(error: rustix::io::Errno) -> Errno {
    Errno::from_raw(error.raw_os_error())
}
