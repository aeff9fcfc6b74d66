//! Files of a file system: the kernel's, or this library's.
//!
//! *Owns*: which ways lead to which file.
//!
//! *Does not own*: the file systems ([`pinfold_scenarios::fs`]).
//!
//! *Locking*: none.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, anyhow};
use pinfold::{Delivery, Volume, VolumeBuilder};
use pinfold_base::Errno;
use pinfold_lock::Space;
use pinfold_mem::region::view::{FileMap, Sharing, View};
use pinfold_mem::region::{At, Region};
use pinfold_scenarios::fs::kernel::Kernel;
use pinfold_scenarios::fs::pinfold::Library;
use pinfold_scenarios::fs::{Fs, Handle, How, Mapped, Open, Refusal};

use super::{Memory, Place, name_of};
use crate::record::Way;
use crate::{Layout, PAGE, WORDS};

/// All files of a run, open and mapped.
#[derive(Debug)]
pub struct Files {
    // Before the file system that they are of.
    files: Vec<One>,
    _fs: Box<dyn Fs>,
}

#[derive(Debug)]
struct One {
    map: Option<Box<dyn Mapped>>,
    cached: Box<dyn Handle>,
    direct: Box<dyn Handle>,
    ways: &'static [Way],
}

/// The same, of a volume that is one of several nodes.
#[derive(Debug)]
pub struct SharedFiles {
    files: Files,
    space: Arc<Space>,
}

thread_local! {
    /// The page that a thread's calls use.
    static BUFFER: Option<Region> = Region::pages(1).ok();
}

/// The kernel's files in `dir`.
///
/// Every other file is for direct I/O alone: the kernel does not promise that mappings and the calls of others see what was
/// written past the cache.
///
/// # Errors
/// What keeps them from being opened or mapped.
pub fn kernel(dir: &Path, layout: Layout) -> anyhow::Result<Files> {
    let fs = Kernel::new(dir).map_err(|errno| anyhow!("{}: {errno}", dir.display()))?;
    Files::open(Box::new(fs), layout, |file| match file % 2 {
        0 => &[Way::Buffered, Way::Mapped],
        _ => &[Way::Direct],
    })
}

/// A directory where a daemon of ours, one node of several, is mounted: whatever call is used, the same bytes are seen.
///
/// Where such a mount refuses shared mappings (ENODEV), there are calls alone.
///
/// # Errors
/// As [`kernel`].
pub fn mounted(dir: &Path, layout: Layout) -> anyhow::Result<Files> {
    let fs = Kernel::new(dir).map_err(|errno| anyhow!("{}: {errno}", dir.display()))?;
    let len = layout.pages as usize * PAGE;
    let first = File::options()
        .read(true)
        .write(true)
        .open(super::path_of(dir, 0))?;
    let ways: &[Way] = match FileMap::new(first.as_fd(), 0, len, Sharing::Shared) {
        Err(Errno::ENODEV) => &[Way::Buffered, Way::Direct],
        _ => &Way::ALL,
    };
    Files::open(Box::new(fs), layout, |_| ways)
}

/// A volume on `dir`.
///
/// # Errors
/// As [`kernel`].
pub fn volume(dir: &Path, layout: Layout, memory: Memory) -> anyhow::Result<Files> {
    library(dir, layout, memory, Volume::builder())
}

/// A volume on `dir` that is the node `space` among others.
///
/// # Errors
/// As [`kernel`].
pub fn shared(
    dir: &Path,
    layout: Layout,
    memory: Memory,
    space: Space,
) -> anyhow::Result<SharedFiles> {
    let space = Arc::new(space);
    let builder = Volume::builder().glocks(Arc::clone(&space));
    let files = library(dir, layout, memory, builder)?;
    Ok(SharedFiles { files, space })
}

fn library(
    dir: &Path,
    layout: Layout,
    memory: Memory,
    builder: VolumeBuilder,
) -> anyhow::Result<Files> {
    let delivery = if memory.inline {
        Delivery::Inline
    } else {
        Delivery::Handler
    };
    let builder = builder.memory(memory.bytes);
    let fs = Library::new(dir, ".", memory.bytes, delivery, builder)
        .map_err(|why| anyhow!("{}: {why}", dir.display()))?;
    Files::open(Box::new(fs), layout, |_| &Way::ALL)
}

impl Files {
    fn open(
        fs: Box<dyn Fs>,
        layout: Layout,
        ways: impl Fn(u32) -> &'static [Way],
    ) -> anyhow::Result<Self> {
        let files = (0..layout.files).map(|file| {
            let ways = ways(file);
            let open = |how| {
                let opened = fs.open(&name_of(file), how);
                opened.map_err(|errno| anyhow!("open file {file}: {errno}"))
            };
            let cached = open(Open::EXISTING)?;
            let direct = open(Open::EXISTING.direct())?;
            let len = u64::from(layout.pages) * PAGE as u64;
            let map = if ways.contains(&Way::Mapped) {
                let map = cached.map(0..len, Sharing::Shared);
                Some(map.map_err(|why| anyhow!("{why:?}")).context("map")?)
            } else {
                None
            };
            Ok(One {
                map,
                cached,
                direct,
                ways,
            })
        });
        let files = files.collect::<anyhow::Result<_>>()?;
        Ok(Self { files, _fs: fs })
    }

    fn file(&self, file: u32) -> Result<&One, Errno> {
        self.files.get(file as usize).ok_or(Errno::EINVAL)
    }
}

impl One {
    fn view(&self) -> Result<View<'_>, Errno> {
        let map = self.map.as_ref().ok_or(Errno::EINVAL)?;
        Ok(map.view())
    }

    const fn handle(&self, way: Way) -> &dyn Handle {
        match way {
            Way::Direct => &*self.direct,
            Way::Buffered | Way::Mapped => &*self.cached,
        }
    }
}

/// The registers that lie in `len` bytes of a page: one, or all.
fn words(len: usize) -> &'static [usize] {
    if len == PAGE { &WORDS } else { &[0] }
}

impl Place for Files {
    fn ways(&self, file: u32) -> &[Way] {
        self.file(file).map_or(&[], |file| file.ways)
    }

    fn get(&self, way: Way, file: u32, at: u64, into: &mut [u8]) -> Result<(), Errno> {
        let file = self.file(file)?;
        if way == Way::Mapped {
            let view = file.view()?;
            for &word in words(into.len()) {
                let value = view.load_u64(at as usize + word).map_err(|_| Errno::EIO)?;
                let place = into.get_mut(word..word + 8).ok_or(Errno::EINVAL)?;
                place.copy_from_slice(&value.to_ne_bytes());
            }
            return Ok(());
        }
        with_buffer(|buffer| {
            let iov = buffer.iov(0..into.len());
            let done = file.handle(way).read(&iov, At::Offset(at), How::PLAIN)?;
            whole(done, into.len())?;
            buffer.get(0, into)
        })
    }

    fn put(&self, way: Way, file: u32, at: u64, from: &[u8]) -> Result<(), Errno> {
        let file = self.file(file)?;
        if way == Way::Mapped {
            let view = file.view()?;
            for &word in words(from.len()) {
                let bytes = from
                    .get(word..word + 8)
                    .and_then(|bytes| bytes.try_into().ok());
                let value = u64::from_ne_bytes(bytes.ok_or(Errno::EINVAL)?);
                let stored = view.store_u64(at as usize + word, value);
                stored.map_err(|_| Errno::EIO)?;
            }
            return Ok(());
        }
        with_buffer(|buffer| {
            buffer.put(0, from)?;
            let iov = buffer.iov(0..from.len());
            let done = file.handle(way).write(&iov, At::Offset(at), How::PLAIN)?;
            whole(done, from.len())
        })
    }

    fn sync(&self, file: u32) -> Result<(), Errno> {
        self.file(file)?.cached.sync()
    }

    fn leave(self: Box<Self>) -> Result<(), Errno> {
        for (file, one) in (0..).zip(&self.files) {
            if let Some(map) = &one.map {
                let len = map.view().len();
                match map.sync(0..len, libc::MS_SYNC) {
                    Ok(()) => {}
                    Err(Refusal::Failed(errno)) => return Err(errno),
                    Err(Refusal::Missing(_)) => return Err(Errno::EINVAL),
                }
            }
            self.sync(file)?;
        }
        Ok(())
    }
}

impl Place for SharedFiles {
    fn ways(&self, file: u32) -> &[Way] {
        self.files.ways(file)
    }

    fn get(&self, way: Way, file: u32, at: u64, into: &mut [u8]) -> Result<(), Errno> {
        self.files.get(way, file, at, into)
    }

    fn put(&self, way: Way, file: u32, at: u64, from: &[u8]) -> Result<(), Errno> {
        self.files.put(way, file, at, from)
    }

    fn sync(&self, file: u32) -> Result<(), Errno> {
        self.files.sync(file)
    }

    fn leave(self: Box<Self>) -> Result<(), Errno> {
        let Self { files, space } = *self;
        Box::new(files).leave()?;
        // The volume gave its glocks up, unless it could not any more.
        space.check()
    }
}

fn with_buffer(run: impl FnOnce(&Region) -> Result<(), Errno>) -> Result<(), Errno> {
    BUFFER.with(|buffer| run(buffer.as_ref().ok_or(Errno::ENOMEM)?))
}

const fn whole(done: usize, asked: usize) -> Result<(), Errno> {
    if done == asked {
        Ok(())
    } else {
        Err(Errno::EIO)
    }
}
