//! Modes that are lent to whoever caches a file beside the volume, as a kernel does for a mount.
//!
//! *Owns*: under which inode's glock a thread acts without holding it, and what it may do so.
//!
//! *Does not own*: when a mode is taken back ([`crate::Demoted`]), the glock.
//!
//! *Locking*: what is done by a lent mode takes no glock: the demotion that takes the mode back waits for it. Stores of pages
//! take no inode's lock either, as those of a mapping do not: who has that one may be waiting for the glock (H-9).

use std::cell::Cell;

use pinfold_base::PAGE_SIZE;
use pinfold_lock::Mode;
use pinfold_mem::IovCursor;
use pinfold_store::dir::namespace::FileId;

use crate::error::{Error, Result};
use crate::file::File;
use crate::inode::Inode;
use crate::io::{bad_buffer, check_range};
use crate::node::Node;
use crate::shared::Shared;

thread_local! {
    /// The inode by whose lent mode the thread acts.
    static LENT: Cell<Option<FileId>> = const { Cell::new(None) };
}

/// Tells whether the calling thread acts by a lent mode of `id`.
pub(crate) fn acts_for(id: FileId) -> bool {
    LENT.get() == Some(id)
}

impl Node {
    /// Takes the file's glock in `mode`, as a fault does, and calls `lend` with the file's size while it is held: from
    /// then on, until [`crate::Demoted`] has returned for this inode, [`Node::by_lent_mode`] may act by that mode. `None` where the
    /// volume has no glocks: there is nothing to lend.
    ///
    /// # Errors
    /// The glock's refusal, `EISDIR` and the like for what is no file, what the store says when the size is read.
    pub fn lend_mode<T>(&self, mode: Mode, lend: impl FnOnce(u64) -> T) -> Result<Option<T>> {
        const OPERATION: &str = "lend";
        let inode = self.inode(OPERATION)?;
        let held = inode
            .hold_fault(mode)
            .map_err(|error| Error::cache(OPERATION, error))?;
        Ok(held.map(|_held| lend(inode.len())))
    }

    /// Does `work` by a mode of this file that was lent and has not been taken back: its calls on this file take no glock.
    /// They fail with EIO once the node has withdrawn.
    ///
    /// The caller vouches that the mode is one that the work needs, and that [`crate::Demoted`] does not return before it ends.
    pub fn by_lent_mode<T>(&self, work: impl FnOnce() -> T) -> T {
        /// Also after a panic: the thread serves other files.
        struct Ended(Option<FileId>);
        impl Drop for Ended {
            fn drop(&mut self) {
                LENT.set(self.0);
            }
        }
        let _ended = Ended(LENT.replace(Some(self.id())));
        work()
    }

    /// Returns the file's size as far as this node knows it, without asking any other; `None` if it has no idea.
    #[must_use]
    pub fn known_len(&self) -> Option<u64> {
        self.known_inode().map(Inode::len)
    }
}

impl File {
    /// Stores bytes that a kernel's dirty pages hold, as a mapping stores them: where the file has bytes, and nowhere behind its end.
    /// To be called by a lent EX mode ([`Node::by_lent_mode`]). Returns how many of `data` the file has room for.
    ///
    /// # Errors
    /// `EBADF` if not open for writing; no room in the store; what the cache and the store say; EIO after the node
    /// withdrew. What comes before the failing page is stored.
    pub fn store_pages(&self, data: &[u8], offset: u64) -> Result<usize> {
        const OPERATION: &str = "write";
        if !self.access().write {
            return Err(Error::invalid(OPERATION, pinfold_base::Errno::EBADF));
        }
        check_range(OPERATION, offset, data.len())?;
        let _quiet = self.enter(OPERATION)?;
        let inode = self.inode();
        inode.check_lease(OPERATION)?;
        let told = |error| Error::cache(OPERATION, error);
        let mut done = 0;
        while done < data.len() {
            let pos = offset + done as u64;
            let (page, at) = (pos / PAGE_SIZE, (pos % PAGE_SIZE) as usize);
            inode.begin_store(page).map_err(told)?;
            let want = (PAGE_SIZE as usize - at).min(data.len() - done);
            let below = |end: u64| usize::try_from(end.saturating_sub(pos)).unwrap_or(usize::MAX);
            let bytes = want.min(below(inode.len()));
            if bytes == 0 {
                break;
            }
            let folio = inode
                .pages()
                .write_begin(page, at, at + bytes, false)
                .map_err(told)?;
            // Under the page's lock, which a truncation takes: the file does not become longer by what was its page.
            let bytes = bytes.min(below(inode.len()));
            let mut cursor = IovCursor::from_slice(&data[done..done + bytes]);
            if folio.copy_in(at, bytes, &mut cursor).done != bytes as u64 {
                return Err(bad_buffer(OPERATION, pos, bytes));
            }
            if bytes > 0 {
                folio.commit();
                inode.pages().note_dirty_file();
            }
            done += bytes;
            if bytes < want {
                break;
            }
        }
        Ok(done)
    }
}

impl Inode {
    /// Returns the file's glock as far as the calling thread has to take it.
    #[inline]
    pub(crate) fn shared_here(&self) -> Option<&Shared> {
        self.shared().filter(|shared| !shared.is_lent_here())
    }
}

impl Shared {
    /// Tells whether the calling thread acts by a mode of this glock that was lent.
    #[inline]
    pub(crate) fn is_lent_here(&self) -> bool {
        acts_for(self.id)
    }
}
