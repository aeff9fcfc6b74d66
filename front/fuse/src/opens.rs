//! What the kernel has open: files and directories by handle.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};
use pinfold::{Access, Directory, File, OpenOptions};

/// One open file of the kernel's.
///
/// Its direct flag can change after the open (fcntl), and the kernel writes mapped pages back through any handle it
/// finds: so each request says which way it wants, and the second way is opened when it is first needed.
#[derive(Debug)]
pub(crate) struct OpenFile {
    first: File,
    first_access: Access,
    other: OnceLock<File>,
}

impl OpenFile {
    pub(crate) fn new(file: File) -> Self {
        Self {
            first_access: file.access(),
            first: file,
            other: OnceLock::new(),
        }
    }

    /// Tells whether a mapping made through it may store.
    pub(crate) fn may_store(&self) -> bool {
        self.first_access.read && self.first_access.write
    }

    /// Returns the file as it was opened: what errors are reported through.
    pub(crate) fn file(&self) -> &File {
        &self.first
    }

    /// Returns the file for transfers that by-pass the volume's cache, or for those that do not.
    pub(crate) fn way(&self, direct: bool) -> pinfold::Result<&File> {
        if self.first_access.direct == direct {
            return Ok(&self.first);
        }
        if let Some(other) = self.other.get() {
            return Ok(other);
        }
        let options = OpenOptions::new()
            .read(self.first_access.read)
            .write(self.first_access.write)
            .direct(direct);
        let opened = self.first.node().open(&options)?;
        Ok(self.other.get_or_init(|| opened))
    }
}

/// Handles of one kind.
#[derive(Debug)]
pub(crate) struct Handles<T> {
    next: AtomicU64,
    open: RwLock<HashMap<u64, Arc<T>>>,
}

/// Open files.
pub(crate) type Files = Handles<OpenFile>;
/// Open directories; one reader at a time each.
pub(crate) type Directories = Handles<Mutex<Directory>>;

impl<T> Default for Handles<T> {
    fn default() -> Self {
        Self {
            next: AtomicU64::new(1),
            open: RwLock::new(HashMap::new()),
        }
    }
}

impl<T> Handles<T> {
    /// Takes something up and returns its handle.
    pub(crate) fn insert(&self, opened: T) -> u64 {
        let handle = self.next.fetch_add(1, Ordering::Relaxed);
        self.open.write().insert(handle, Arc::new(opened));
        handle
    }

    pub(crate) fn get(&self, handle: u64) -> Option<Arc<T>> {
        self.open.read().get(&handle).map(Arc::clone)
    }

    /// Gives a handle up. What it stood for closes when its last request ends.
    pub(crate) fn remove(&self, handle: u64) -> Option<Arc<T>> {
        self.open.write().remove(&handle)
    }
}
