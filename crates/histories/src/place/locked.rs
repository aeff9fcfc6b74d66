//! Plain files under glocks: the locks and their service alone, with the least that a node may cache.
//!
//! *Owns*: a cache of pages for each file, kept and given up as its glock says; a store that compares tokens.
//!
//! *Does not own*: the locks ([`pinfold_lock`]).
//!
//! *Locking*: glock (class 2), then a file's pages, then its token: leaves.
//!
//! Under SH pages are cached, under EX they may be dirty, under DF there are none. The store is a file; a second one
//! beside it holds the highest token seen, and is locked (flock) while the two are compared and bytes written. A node
//! shows its token before it reads: from then on the store takes nothing that was sent under an earlier one, even if
//! its sender slept between its look at the clock and its transfer.

use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use anyhow::Context;
use parking_lot::{Mutex, MutexGuard};
use pinfold_base::Errno;
use pinfold_lock::{Duties, Glock, Guard, Mode, Name, Refusal, Request, Space};
use pinfold_mem::AlignedBuf;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::{Place, path_of};
use crate::record::Way;
use crate::{Layout, PAGE};

/// What is left out on purpose, to see that it is missed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Plant {
    /// Nothing.
    #[default]
    Nothing,
    /// Glocks are not taken.
    Unlocked,
    /// Nor are they, and pages are written in halves.
    Halves,
    /// Clean pages stay when the glock goes.
    Keeps,
    /// Dirty pages are dropped, not written, when the glock goes.
    Drops,
    /// fsync does nothing.
    Lies,
    /// Neither the lease nor tokens are looked at.
    Unfenced,
}

/// The files of one node.
#[derive(Debug)]
pub struct Locked {
    space: Space,
    files: Vec<(Arc<Glock>, Arc<Pages>)>,
    plant: Plant,
}

#[derive(Debug)]
struct Pages {
    data: File,
    token: Mutex<File>,
    glock: OnceLock<Weak<Glock>>,
    cached: Mutex<Cached>,
    plant: Plant,
}

#[derive(Debug, Default)]
struct Cached {
    pages: HashMap<u64, AlignedBuf>,
    dirty: BTreeSet<u64>,
    /// Of the lock that the dirty pages were written under.
    token: u64,
}

impl Locked {
    /// Opens the files of `dir` as the node that `space` is.
    ///
    /// # Errors
    /// What keeps them from being opened.
    pub fn open(dir: &Path, layout: Layout, space: Space, plant: Plant) -> anyhow::Result<Self> {
        let files = (0..layout.files).map(|file| {
            let pages = Arc::new(Pages::open(&path_of(dir, file), plant)?);
            let name = Name {
                number: u64::from(file) + 1,
                generation: 0,
            };
            let duties: Arc<dyn Duties> = Arc::<Pages>::clone(&pages);
            let glock = space.glock(name, || duties);
            // Set once, here.
            let _ = pages.glock.set(Arc::downgrade(&glock));
            Ok((glock, pages))
        });
        Ok(Self {
            files: files.collect::<anyhow::Result<_>>()?,
            space,
            plant,
        })
    }

    /// Stops as a process does that is killed: nothing more is stored, and others are not told.
    pub fn crash(self) {
        for (_, pages) in &self.files {
            pages.cached.lock().dirty.clear();
        }
        drop(self);
    }

    /// Writes a page behind everybody's back, as a transfer that was on its way for long.
    ///
    /// # Errors
    /// ESTALE if the store knows a later token; the store's.
    pub fn write_late(&self, file: u32, page: u64, bytes: &[u8], token: u64) -> Result<(), Errno> {
        let (_, pages) = self.file(file)?;
        pages.store(page, &mut aligned(bytes), token)
    }

    /// The token of the node's lock on a file.
    ///
    /// # Errors
    /// EINVAL for a file that is none.
    pub fn token(&self, file: u32) -> Result<u64, Errno> {
        Ok(self.file(file)?.0.token().0)
    }

    fn file(&self, file: u32) -> Result<(&Arc<Glock>, &Arc<Pages>), Errno> {
        let (glock, pages) = self.files.get(file as usize).ok_or(Errno::EINVAL)?;
        Ok((glock, pages))
    }

    /// Takes the glock, and sees that it still counts.
    fn lock<'g>(&self, glock: &'g Glock, mode: Mode) -> Result<Option<Guard<'g>>, Errno> {
        if matches!(self.plant, Plant::Unlocked | Plant::Halves) {
            return Ok(None);
        }
        let guard = glock.lock(Request::new(mode)).map_err(|why| match why {
            Refusal::Failed(errno) => errno,
            Refusal::TryFailed => Errno::EAGAIN,
        })?;
        if self.plant != Plant::Unfenced {
            self.space.check()?;
        }
        Ok(Some(guard))
    }
}

impl Place for Locked {
    fn ways(&self, _file: u32) -> &[Way] {
        &[Way::Buffered, Way::Direct]
    }

    fn get(&self, way: Way, file: u32, at: u64, into: &mut [u8]) -> Result<(), Errno> {
        let (glock, pages) = self.file(file)?;
        let mode = match way {
            Way::Direct => Mode::Deferred,
            Way::Buffered | Way::Mapped => Mode::Shared,
        };
        let _guard = self.lock(glock, mode)?;
        let mut cached = pages.cached.lock();
        if way == Way::Direct {
            pages.write_back(&mut cached)?;
            cached.pages.clear();
        }
        let (page, offset) = split(at);
        let bytes = pages.filled(&mut cached, page)?;
        let part = bytes.get(offset..offset + into.len());
        into.copy_from_slice(part.ok_or(Errno::EINVAL)?);
        if way == Way::Direct {
            cached.pages.clear();
        }
        Ok(())
    }

    fn put(&self, way: Way, file: u32, at: u64, from: &[u8]) -> Result<(), Errno> {
        let (glock, pages) = self.file(file)?;
        let _guard = self.lock(glock, Mode::Exclusive)?;
        let token = glock.token().0;
        let mut cached = pages.cached.lock();
        let (page, offset) = split(at);
        if way == Way::Direct {
            cached.pages.remove(&page);
            cached.dirty.remove(&page);
            return pages.store(page, &mut aligned(from), token);
        }
        let bytes = pages.filled(&mut cached, page)?;
        let part = bytes.get_mut(offset..offset + from.len());
        part.ok_or(Errno::EINVAL)?.copy_from_slice(from);
        cached.dirty.insert(page);
        cached.token = token;
        Ok(())
    }

    fn sync(&self, file: u32) -> Result<(), Errno> {
        let (glock, pages) = self.file(file)?;
        if self.plant == Plant::Lies {
            return Ok(());
        }
        let _guard = self.lock(glock, Mode::Shared)?;
        let mut cached = pages.cached.lock();
        pages.write_back(&mut cached)
    }

    fn leave(self: Box<Self>) -> Result<(), Errno> {
        drop(self.files);
        self.space.leave(LEAVE_MAX)
    }
}

/// How long a node may take to write back and give its locks up.
const LEAVE_MAX: Duration = Duration::from_secs(60);

const fn split(at: u64) -> (u64, usize) {
    (at / PAGE as u64, (at % PAGE as u64) as usize)
}

fn aligned(bytes: &[u8]) -> AlignedBuf {
    let mut buffer = AlignedBuf::zeroed(bytes.len());
    buffer.as_mut_slice().copy_from_slice(bytes);
    buffer
}

impl Pages {
    fn open(path: &Path, plant: Plant) -> anyhow::Result<Self> {
        let open = |flags| {
            let mut options = File::options();
            options.read(true).write(true).custom_flags(flags);
            options.open(path)
        };
        let data = open(libc::O_DIRECT)
            .or_else(|_| open(0))
            .with_context(|| path.display().to_string())?;
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false);
        let token = options.open(path.with_extension("token"))?;
        Ok(Self {
            data,
            token: Mutex::new(token),
            glock: OnceLock::new(),
            cached: Mutex::default(),
            plant,
        })
    }

    fn filled<'c>(
        &self,
        cached: &'c mut MutexGuard<'_, Cached>,
        page: u64,
    ) -> Result<&'c mut [u8], Errno> {
        match cached.pages.entry(page) {
            Entry::Occupied(there) => Ok(there.into_mut().as_mut_slice()),
            Entry::Vacant(room) => {
                let mut buffer = AlignedBuf::zeroed(PAGE);
                let at = page * PAGE as u64;
                self.data.read_exact_at(buffer.as_mut_slice(), at)?;
                Ok(room.insert(buffer).as_mut_slice())
            }
        }
    }

    fn write_back(&self, cached: &mut Cached) -> Result<(), Errno> {
        let token = cached.token;
        for page in std::mem::take(&mut cached.dirty) {
            if let Some(buffer) = cached.pages.get_mut(&page) {
                self.store(page, buffer, token)?;
            }
        }
        Ok(())
    }

    /// Writes a page if the store knows no later token.
    fn store(&self, page: u64, buffer: &mut AlignedBuf, token: u64) -> Result<(), Errno> {
        let held = self.token.lock();
        let _shown = match self.plant {
            Plant::Unfenced | Plant::Unlocked | Plant::Halves => None,
            _ => Some(Shown::new(&held, token)?.or_refuse()?),
        };
        let at = page * PAGE as u64;
        let bytes = buffer.as_mut_slice();
        if self.plant == Plant::Halves {
            let (first, second) = bytes.split_at(bytes.len() / 2);
            self.data.write_all_at(first, at)?;
            std::thread::yield_now();
            self.data.write_all_at(second, at + first.len() as u64)?;
        } else {
            self.data.write_all_at(bytes, at)?;
        }
        Ok(())
    }
}

/// The store of a file while nobody else shows it a token.
struct Shown<'f> {
    file: &'f File,
    newer: bool,
}

impl<'f> Shown<'f> {
    /// Shows it a token: from now on it takes nothing sent under an earlier one.
    fn new(file: &'f File, token: u64) -> Result<Self, Errno> {
        flock(file, FlockOperation::LockExclusive).map_err(raw)?;
        let mut shown = Self { file, newer: false };
        let mut word = [0; 8];
        // A file that is empty yet says nothing.
        let _ = file.read_at(&mut word, 0)?;
        let highest = u64::from_ne_bytes(word);
        // Nodes that share a lock show theirs in any order.
        shown.newer = highest > token;
        if highest < token {
            file.write_all_at(&token.to_ne_bytes(), 0)?;
        }
        Ok(shown)
    }

    fn or_refuse(self) -> Result<Self, Errno> {
        if self.newer {
            return Err(Errno::ESTALE);
        }
        Ok(self)
    }
}

impl Drop for Shown<'_> {
    fn drop(&mut self) {
        // A lock that is not there need not be let go.
        let _ = flock(self.file, FlockOperation::Unlock);
    }
}

fn raw(errno: rustix::io::Errno) -> Errno {
    Errno::from_raw(errno.raw_os_error())
}

impl Duties for Pages {
    fn sync(&self, _to: Mode) -> Result<(), Errno> {
        let mut cached = self.cached.lock();
        if self.plant == Plant::Drops {
            cached.dirty.clear();
            return Ok(());
        }
        self.write_back(&mut cached)
    }

    fn invalidate(&self, to: Mode) {
        if to != Mode::Shared && self.plant != Plant::Keeps {
            self.cached.lock().pages.clear();
        }
    }

    fn refresh(&self) -> Result<(), Errno> {
        if self.plant == Plant::Unfenced {
            return Ok(());
        }
        let glock = self.glock.get().and_then(Weak::upgrade).ok_or(Errno::EIO)?;
        let held = self.token.lock();
        Shown::new(&held, glock.token().0).map(drop)
    }
}
