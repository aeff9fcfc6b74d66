//! The descriptors of one file, by right.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use pinfold_base::{Errno, PAGE_SIZE};
use rustix::fs::{
    Advice, AtFlags, OFlags, Statx, StatxFlags, fadvise, fcntl_getfl, fcntl_setfl, statx,
};

/// What transfers must be multiples of to be direct, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Alignment {
    pub block: u32,
    pub memory: u32,
}

/// The descriptors for one right, or for both.
#[derive(Debug, Clone)]
pub(super) struct Pair {
    pub plain: Arc<OwnedFd>,
    pub direct: Option<Arc<OwnedFd>>,
    pub block: u32,
    pub memory: u32,
    /// The size when the descriptors were obtained.
    pub len: u64,
}

/// All descriptors of a file, and how many openers want them.
#[derive(Debug, Default)]
pub(super) struct Files {
    pub reader: Option<Pair>,
    /// The same descriptors as `reader` when they were opened for both.
    pub writer: Option<Pair>,
    pub openers: usize,
}

/// Returns the access mode of open(2); `None` when neither right is asked for.
pub(super) fn access_mode(read: bool, write: bool) -> Option<OFlags> {
    let common = OFlags::CLOEXEC | OFlags::NOCTTY;
    match (read, write) {
        (true, true) => Some(common | OFlags::RDWR),
        (true, false) => Some(common | OFlags::RDONLY),
        (false, true) => Some(common | OFlags::WRONLY),
        (false, false) => None,
    }
}

/// Takes away what a program may have opened its file with and what transfers must not have: with O_APPEND a write ignores
/// its offset, with O_NONBLOCK a ring may answer EAGAIN, with O_DIRECT a tail is refused.
pub(super) fn clear_status(file: &OwnedFd) -> Result<(), Errno> {
    let unwanted = OFlags::APPEND | OFlags::NONBLOCK | OFlags::DIRECT;
    let status = fcntl_getfl(file).map_err(number)?;
    if status.intersects(unwanted) {
        fcntl_setfl(file, status - unwanted).map_err(number)?;
    }
    Ok(())
}

fn number(errno: rustix::io::Errno) -> Errno {
    Errno::from_raw(errno.raw_os_error())
}

/// Returns the attributes, alignments of direct transfers included.
pub(super) fn stat(file: &OwnedFd) -> Result<Statx, Errno> {
    let mask = StatxFlags::BASIC_STATS | StatxFlags::BTIME | StatxFlags::DIOALIGN;
    statx(file, c"", AtFlags::EMPTY_PATH, mask).map_err(number)
}

/// Reads from `stat` how direct transfers must be aligned; `None` when they are impossible, or want more than a page,
/// which pages could not satisfy.
fn alignment(stat: &Statx) -> Option<Alignment> {
    let page = PAGE_SIZE as u32;
    if stat.stx_mask & StatxFlags::DIOALIGN.bits() == 0 {
        // An older kernel, or a filesystem that does not say: a page suits every one that is known to allow it.
        return Some(Alignment {
            block: page,
            memory: page,
        });
    }
    let fits = |bytes: u32| bytes.is_power_of_two() && bytes <= page;
    let (block, memory) = (stat.stx_dio_offset_align, stat.stx_dio_mem_align);
    (fits(block) && fits(memory)).then_some(Alignment { block, memory })
}

impl Pair {
    /// Completes `plain` with a direct descriptor, where the filesystem has such.
    ///
    /// Only the want of descriptors is an error: whatever else keeps a direct one from being opened, the plain one
    /// does all the work.
    pub fn new(
        plain: OwnedFd,
        reopen: impl FnOnce(OFlags) -> Result<OwnedFd, Errno>,
    ) -> Result<Self, Errno> {
        // Advice only; a filesystem that ignores it reads a little more than is asked for.
        let _ = fadvise(&plain, 0, None, Advice::Random);
        let stat = stat(&plain)?;
        let aligned = alignment(&stat);
        let direct = match aligned.map(|_| reopen(OFlags::DIRECT)) {
            Some(Ok(direct)) => Some(Arc::new(direct)),
            Some(Err(errno @ (Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM))) => {
                return Err(errno);
            }
            Some(Err(_)) | None => None,
        };
        let aligned = aligned.unwrap_or(Alignment {
            block: 1,
            memory: 1,
        });
        Ok(Self {
            plain: Arc::new(plain),
            direct,
            block: aligned.block,
            memory: aligned.memory,
            len: stat.stx_size,
        })
    }

    pub fn alignment(&self) -> Alignment {
        Alignment {
            block: self.block,
            memory: self.memory,
        }
    }

    fn descriptors(&self) -> usize {
        1 + usize::from(self.direct.is_some())
    }
}

impl Files {
    /// Takes `pair` in for the rights it carries that nothing serves yet, or that it serves better: one pair for both
    /// rights replaces one for each, which halves the descriptors held.
    pub fn add(&mut self, pair: Pair, read: bool, write: bool) {
        let both = read && write;
        let better = |old: &Option<Pair>| match old {
            None => true,
            Some(old) => both && (pair.direct.is_some() || old.direct.is_none()),
        };
        let (reader, writer) = (read && better(&self.reader), write && better(&self.writer));
        if reader {
            self.reader = Some(pair.clone());
        }
        if writer {
            self.writer = Some(pair);
        }
    }

    /// Tells whether descriptors for these rights would add something.
    pub fn want(&self, read: bool, write: bool) -> bool {
        (read && self.reader.is_none())
            || (write && self.writer.is_none())
            || (read && write && !self.shared())
    }

    /// Tells whether one pair serves both rights.
    fn shared(&self) -> bool {
        match (&self.reader, &self.writer) {
            (Some(reader), Some(writer)) => Arc::ptr_eq(&reader.plain, &writer.plain),
            _ => false,
        }
    }

    /// Returns some descriptors, the reader's by preference.
    pub fn any(&self) -> Option<&Pair> {
        self.reader.as_ref().or(self.writer.as_ref())
    }

    /// Counts the descriptors.
    pub fn descriptors(&self) -> usize {
        let writer = self.writer.as_ref().filter(|_| !self.shared());
        let pairs = self.reader.iter().chain(writer);
        pairs.map(Pair::descriptors).sum()
    }
}
