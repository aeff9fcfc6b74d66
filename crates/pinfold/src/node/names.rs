//! Names: what a directory holds, and what becomes of an inode that loses one.
//!
//! *Owns*: creating, finding, linking, renaming and removing; under which glocks that is done.
//!
//! *Does not own*: the name space itself (`pinfold-store`), the table of nodes (`tree`).
//!
//! *Locking*: the glocks of the directories, in their order; `life` when the last name has gone, with those let go.

use std::ffi::OsStr;
use std::sync::Arc;

use pinfold_base::Errno;
use pinfold_lock::{Mode, Request, lock_all};
use pinfold_mem::Quiet;
use pinfold_store::dir::namespace::{Handle, RenameFlags, Stat};

use super::{Node, failed, failed_at};
use crate::error::{Error, ErrorKind, Result};
use crate::file::File;
use crate::metadata::{Kind, Metadata, Owner};
use crate::open_options::OpenOptions;
use crate::shared::refused;

impl Node {
    /// Finds `name` in this directory.
    ///
    /// # Errors
    /// `ENOENT`, `ENOTDIR`; `EINVAL` for `.`, `..` and what contains a slash.
    pub fn lookup(&self, name: &OsStr) -> Result<Self> {
        let _quiet = Quiet::enter();
        let found = self.0.with(|handle| handle.lookup(name));
        let (handle, stat) = found.map_err(failed_at("look up", name))?;
        Ok(self.0.tree.node(handle, &stat))
    }

    /// Finds `name` in this directory, and its attributes in the same go.
    ///
    /// # Errors
    /// As [`Node::lookup`].
    pub fn lookup_attributes(&self, name: &OsStr) -> Result<(Self, Metadata)> {
        let _quiet = Quiet::enter();
        let found = self.0.with(|handle| handle.lookup(name));
        let (handle, stat) = found.map_err(failed_at("look up", name))?;
        self.adopt(handle, stat)
    }

    fn adopt(&self, handle: Arc<Handle>, stat: Stat) -> Result<(Self, Metadata)> {
        let node = self.0.tree.node(handle, &stat);
        if self.0.tree.space().is_some() && node.kind() == Kind::File {
            // Another node may have newer ones, and what it has not stored is nowhere else.
            let metadata = node.attributes()?;
            return Ok((node, metadata));
        }
        let merged = match node.0.data.get() {
            // Its cached changes count, and it may have changed since `stat` was read.
            Some(_) => node.attributes().ok(),
            None => None,
        };
        let metadata = merged.unwrap_or_else(|| Metadata::from(&stat));
        Ok((node, metadata))
    }

    /// Creates a regular file, or opens the one there is unless `options` ask for a new one.
    ///
    /// # Errors
    /// What open(2) says with `O_CREAT`.
    pub fn create(
        &self,
        name: &OsStr,
        options: &OpenOptions,
        owner: Owner,
    ) -> Result<(Self, File)> {
        let _quiet = Quiet::enter();
        const OPERATION: &str = "create";
        let mode = options.create_mode();
        match change_names(OPERATION, &[self], || {
            self.0.with(|dir| dir.create(name, mode, owner.caller()))
        })? {
            Ok((handle, stat, fd)) => {
                let node = self.0.tree.node(handle, &stat);
                let file = node.open_made(options, fd)?;
                Ok((node, file))
            }
            Err(Errno::EEXIST) if !options.wants_new() => {
                let node = self.lookup(name)?;
                let file = node.open(options)?;
                Ok((node, file))
            }
            Err(errno) => Err(failed_at(OPERATION, name)(errno)),
        }
    }

    /// Creates a regular file without a name (`O_TMPFILE`) in this directory's filesystem; [`Node::link`] gives it one.
    ///
    /// # Errors
    /// `EOPNOTSUPP` where the store cannot.
    pub fn temporary(&self, options: &OpenOptions, owner: Owner) -> Result<(Self, File)> {
        let _quiet = Quiet::enter();
        let made = self
            .0
            .with(|dir| dir.create_unnamed(options.create_mode(), owner.caller()));
        let (handle, stat, fd) = made.map_err(failed("create a temporary file"))?;
        let node = self.0.tree.node(handle, &stat);
        node.0.life.lock().orphan = true;
        let file = node.open_made(options, fd)?;
        Ok((node, file))
    }

    /// Makes a directory.
    ///
    /// # Errors
    /// What mkdir(2) says.
    pub fn make_dir(&self, name: &OsStr, mode: u32, owner: Owner) -> Result<Self> {
        let _quiet = Quiet::enter();
        let made = change_names("create directory", &[self], || {
            self.0.with(|dir| dir.make_dir(name, mode, owner.caller()))
        })?;
        let (handle, stat) = made.map_err(failed_at("create directory", name))?;
        Ok(self.0.tree.node(handle, &stat))
    }

    /// Makes an inode of any kind but directory and symbolic link.
    ///
    /// # Errors
    /// What mknod(2) says.
    pub fn make_node(
        &self,
        name: &OsStr,
        kind: Kind,
        mode: u32,
        rdev: u64,
        owner: Owner,
    ) -> Result<Self> {
        let _quiet = Quiet::enter();
        let made = change_names("create", &[self], || {
            self.0
                .with(|dir| dir.make_node(name, kind, mode, rdev, owner.caller()))
        })?;
        let (handle, stat) = made.map_err(failed_at("create", name))?;
        Ok(self.0.tree.node(handle, &stat))
    }

    /// Makes a symbolic link to `target`.
    ///
    /// # Errors
    /// What symlink(2) says.
    pub fn symlink(&self, name: &OsStr, target: &OsStr, owner: Owner) -> Result<Self> {
        let _quiet = Quiet::enter();
        let made = change_names("create symbolic link", &[self], || {
            self.0.with(|dir| dir.symlink(name, target, owner.caller()))
        })?;
        let (handle, stat) = made.map_err(failed_at("create symbolic link", name))?;
        Ok(self.0.tree.node(handle, &stat))
    }

    /// Gives `target` the name `name` in this directory.
    ///
    /// # Errors
    /// What link(2) says.
    pub fn link(&self, target: &Self, name: &OsStr) -> Result<()> {
        let _quiet = Quiet::enter();
        change_names("link", &[self], || {
            let mut life = target.0.life.lock();
            let linked = target.0.with(|handle| handle.link(&self.0.handle, name));
            let stat = linked.map_err(failed_at("link", name))?;
            life.orphan = false;
            target.0.handle.unpin();
            target.0.record(&stat);
            Ok(())
        })?
    }

    /// Removes a name that is not a directory's. The inode lives until its last opener is gone.
    ///
    /// # Errors
    /// What unlink(2) says.
    pub fn unlink(&self, name: &OsStr) -> Result<()> {
        let _quiet = Quiet::enter();
        let (outcome, loser) = change_names("remove", &[self], || {
            let loser = self.held(name);
            if let Some(loser) = &loser
                && let Err(errno) = loser.0.with(Handle::pin)
            {
                return (Err(errno), None);
            }
            (self.0.with(|dir| dir.unlink(name)), loser)
        })?;
        if let Some(loser) = loser {
            loser.lost_a_name();
        }
        outcome.map_err(failed_at("remove", name))
    }

    /// Removes an empty directory.
    ///
    /// # Errors
    /// What rmdir(2) says.
    pub fn remove_dir(&self, name: &OsStr) -> Result<()> {
        let _quiet = Quiet::enter();
        let (outcome, loser) = change_names("remove directory", &[self], || {
            let loser = self.held(name);
            (self.0.with(|dir| dir.remove_dir(name)), loser)
        })?;
        if let (Some(loser), Ok(())) = (loser, &outcome) {
            self.0.tree.forget(&loser);
        }
        outcome.map_err(failed_at("remove directory", name))
    }

    /// Renames `name` in this directory to `new_name` in `new_dir`.
    ///
    /// # Errors
    /// What renameat2(2) says.
    pub fn rename(
        &self,
        name: &OsStr,
        new_dir: &Self,
        new_name: &OsStr,
        flags: RenameFlags,
    ) -> Result<()> {
        let _quiet = Quiet::enter();
        let to = &new_dir.0.handle;
        let (outcome, moved, replaced) = change_names("rename", &[self, new_dir], || {
            let moved = self.held(name);
            let replaced = new_dir.held(new_name);
            if let Some(replaced) = &replaced
                && let Err(errno) = replaced.0.with(Handle::pin)
            {
                return (Err(errno), None, None);
            }
            let outcome = self.0.with(|from| from.rename(name, to, new_name, flags));
            (outcome, moved, replaced)
        })?;
        // The rename moves the inode's time of change: that is nobody else's doing.
        if let Some(moved) = moved
            && let Ok(stat) = moved.0.handle.stat()
        {
            moved.0.record(&stat);
        }
        if let Some(replaced) = replaced {
            replaced.lost_a_name();
        }
        outcome.map_err(failed_at("rename", name))
    }

    /// Returns the node that `name` means now, if it is held: others have no cached state to care about.
    fn held(&self, name: &OsStr) -> Option<Self> {
        let (handle, _) = self.0.handle.lookup(name).ok()?;
        self.0.tree.held(handle.id())
    }

    /// Sees whether the name that was just removed was the last one.
    fn lost_a_name(&self) {
        let Ok(stat) = self.0.handle.stat() else {
            return;
        };
        self.0.record(&stat);
        if stat.links > 0 {
            self.0.handle.unpin();
            return;
        }
        self.0.life.lock().orphan = true;
        self.0.tree.forget(self);
        self.discard_orphan();
    }

    /// Throws away the data of a file that has neither names nor openers, dirty or not.
    pub(super) fn discard_orphan(&self) {
        let life = self.0.life.lock();
        if let Some(data) = self.0.data.get()
            && life.orphan
            && !data.inode.is_open()
            && data.inode.is_dirty()
        {
            if self.0.tree.space().is_some() {
                // Another node may have it open.
                let _ = data.inode.flush();
                return;
            }
            // Nobody can reach it any more; failing to shorten it loses nothing but the store's work.
            let _ = data.inode.set_len(0);
        }
    }
}

/// Runs `work` with the glocks of these directories (EX): what it finds out about names stays so until it has changed them.
/// Of a name nothing is cached across calls.
fn change_names<T>(operation: &'static str, dirs: &[&Node], work: impl FnOnce() -> T) -> Result<T> {
    let exclusive = Request::new(Mode::Exclusive);
    let forked = |dir: &&Node| {
        let tree = &dir.0.tree;
        tree.space().is_some() && !tree.engine.process.is_current()
    };
    if dirs.iter().any(forked) {
        return Err(Error::new(operation, ErrorKind::Forked));
    }
    let mut wanted: Vec<_> = dirs
        .iter()
        .filter_map(|dir| dir.0.shared())
        .map(|shared| (&*shared.glock, exclusive))
        .collect();
    wanted.dedup_by_key(|(glock, _)| glock.name());
    let _held = lock_all(&wanted).map_err(|why| refused(operation, why))?;
    Ok(work())
}
