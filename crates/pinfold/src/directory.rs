//! An open directory.

use pinfold_store::dir::namespace::{DirEntry, Entries};

use crate::error::{Error, Result};
use crate::node::Node;

/// A directory being read.
///
/// As an iterator it gives every entry but `.` and `..`; [`Directory::peek`] and [`Directory::advance`] give those too, and
/// [`Directory::seek`] goes to where an entry said the next one is.
#[derive(Debug)]
pub struct Directory {
    node: Node,
    entries: Entries,
}

impl Directory {
    pub(crate) fn new(node: Node, entries: Entries) -> Self {
        Self { node, entries }
    }

    /// Returns the directory's inode.
    #[must_use]
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// Moves to a position that an entry gave as its `next`; 0 is the start.
    ///
    /// # Errors
    /// `EINVAL` for a position that the directory does not know.
    pub fn seek(&mut self, position: u64) -> Result<()> {
        self.entries
            .seek(position)
            .map_err(|errno| Error::name("seek in a directory", errno))
    }

    /// Returns the entry at the current position without moving on; `None` at the end.
    ///
    /// # Errors
    /// `ENOENT` for a directory that was removed; the store's errors.
    pub fn peek(&mut self) -> Result<Option<&DirEntry>> {
        self.node
            .check()
            .and_then(|()| self.entries.peek())
            .map_err(|errno| Error::name("read a directory", errno))
    }

    /// Moves past the entry that [`Directory::peek`] gave and returns it.
    pub fn advance(&mut self) -> Option<DirEntry> {
        self.entries.advance()
    }
}

impl Iterator for Directory {
    type Item = Result<DirEntry>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            match self.peek() {
                Err(error) => return Some(Err(error)),
                Ok(None) => return None,
                Ok(Some(_)) => {}
            }
            let entry = self.advance()?;
            if entry.name != "." && entry.name != ".." {
                return Some(Ok(entry));
            }
        }
    }
}
