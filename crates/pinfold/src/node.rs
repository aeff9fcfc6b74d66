//! An inode the volume holds: names, attributes, and the way to its data.
//!
//! *Owns*: one [`Node`] for each inode (hard links share it), what is asked of it, how cached sizes and
//! times are merged with the store's, and noticing that somebody else changed a stored file (SEMANTICS.md section K).
//!
//! *Does not own*: names (`names`), the data and its locks ([`Inode`]), descriptors (the name space and the file's object).
//!
//! No handler of the program runs on top of them ([`Quiet`]): one that faults on mapped memory would wait for whoever is
//! interrupted.
//!
//! *Locking*: a node's own locks are taken with nothing held and keep their place outside class 1: `life` orders opening
//! against the loss of the last name, `stamps` orders what is done to the stored times against reading them.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::hash::{Hash, Hasher};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use pinfold_base::Errno;
use pinfold_base::sync::Mutex;
use pinfold_lock::{Flags, Mode, Request};
use pinfold_mem::Quiet;
use pinfold_store::dir::namespace::{Change, Handle};
use pinfold_store::dir::object::DirObject;
use pinfold_store::{Object, TimedObject};

pub use pinfold_store::dir::namespace::{RenameFlags, SetXattr};

use crate::directory::Directory;
use crate::error::{Error, ErrorKind, Result};
use crate::file::{Access, File};
use crate::inode::{Backing, Inode};
use crate::metadata::{Kind, Metadata, NodeId, Owner, SetAttributes, SetTime, Statfs};
use crate::open_options::OpenOptions;
use crate::record_locks::RecordLocks;
use crate::shared::{Hold, Leased, Shared, refused};

mod names;
mod stamps;
mod tree;
mod watch;

use stamps::Stamps;
pub use tree::ObjectLayer;
pub(crate) use tree::Tree;
use watch::{Watch, Watched};

const S_ISUID: u32 = libc::S_ISUID;
const S_ISGID: u32 = libc::S_ISGID;
const S_IXGRP: u32 = libc::S_IXGRP;

/// An inode of a volume. Clones are the same inode, and compare equal.
#[derive(Clone)]
pub struct Node(Arc<Vnode>);

/// What the clones of a node share.
pub(crate) struct Vnode {
    tree: Arc<Tree>,
    handle: Arc<Handle>,
    /// Only regular files have any; made when it is first needed.
    data: OnceLock<Data>,
    /// Taken to make `data`.
    making: Mutex<()>,
    life: Mutex<Life>,
    stamps: Mutex<Stamps>,
    used: AtomicBool,
    /// Its glock, where other nodes use the directory too; made when it is first needed.
    shared: OnceLock<Option<Shared>>,
    /// Counts the times somebody else's change made cached contents void.
    strangers: AtomicU64,
}

/// The data side of a regular file.
struct Data {
    inode: Arc<Inode>,
    object: Arc<DirObject>,
    watch: Arc<Watch>,
}

#[derive(Debug, Default)]
struct Life {
    /// The last name is gone: the data goes with the last opener.
    orphan: bool,
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Node({:?})", self.0.handle)
    }
}

impl PartialEq for Node {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Node {}

impl Hash for Node {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.id().hash(state);
    }
}

fn failed(operation: &'static str) -> impl Fn(Errno) -> Error {
    move |errno| Error::name(operation, errno)
}

fn failed_at<'a>(operation: &'static str, name: &'a OsStr) -> impl Fn(Errno) -> Error + 'a {
    move |errno| Error::name(operation, errno).at_path(name)
}

impl Node {
    /// Returns which inode it is.
    #[must_use]
    pub fn id(&self) -> NodeId {
        self.0.handle.id()
    }

    /// Returns what it is.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.0.handle.kind()
    }

    /// Returns the attributes, with the live size and times of cached changes.
    ///
    /// # Errors
    /// The store's errors.
    pub fn attributes(&self) -> Result<Metadata> {
        let _quiet = Quiet::enter();
        const OPERATION: &str = "read attributes of";
        let _held = self.0.hold_uncached(OPERATION)?;
        self.0.attributes().map_err(failed(OPERATION))
    }

    /// Returns a number that changes whenever somebody else is found to have changed the stored file: whoever
    /// caches contents of it beside the volume throws them away then.
    #[must_use]
    pub fn content_version(&self) -> u64 {
        self.0.strangers.load(Ordering::Acquire)
    }

    /// Changes attributes and returns what they are then. A change before a failing one stays.
    ///
    /// Setting the time of modification writes back what is dirty first, so that write-back does not move it later.
    ///
    /// # Errors
    /// `EPERM`, `EINVAL` for the size of what is no file, the store's errors.
    pub fn set_attributes(&self, set: &SetAttributes) -> Result<Metadata> {
        let _quiet = Quiet::enter();
        const OPERATION: &str = "change attributes of";
        if let Some(len) = set.len {
            match self.kind() {
                Kind::File => self.data()?.inode.set_len(len)?,
                Kind::Directory => return Err(Error::name(OPERATION, Errno::EISDIR)),
                _ => return Err(Error::name(OPERATION, Errno::EINVAL)),
            }
        }
        let change = Change {
            permissions: set.permissions,
            uid: set.uid,
            gid: set.gid,
            accessed: set.accessed.into(),
            modified: set.modified.into(),
        };
        if change == Change::default() {
            return self.attributes();
        }
        let _held = self.0.hold(OPERATION, Mode::Exclusive)?;
        let sets_modified = set.modified != SetTime::Keep;
        if sets_modified && let Some(data) = self.0.data.get() {
            // An error stays with the file: fsync reports it.
            let _ = data.inode.flush();
        }
        self.0
            .change(&change, sets_modified)
            .map_err(failed(OPERATION))
    }

    /// Clears the set-user-id bit, and set-group-id where it takes effect: what a write by somebody
    /// unprivileged does.
    ///
    /// # Errors
    /// The store's errors.
    pub fn clear_set_id_bits(&self) -> Result<()> {
        let _quiet = Quiet::enter();
        let operation = failed("change attributes of");
        let _held = self.0.hold("change attributes of", Mode::Exclusive)?;
        self.0.check().map_err(&operation)?;
        let old = self.0.handle.stat().map_err(&operation)?.permissions;
        let mut new = old & !S_ISUID;
        if old & S_IXGRP != 0 {
            new &= !S_ISGID;
        }
        if new == old {
            return Ok(());
        }
        let change = Change {
            permissions: Some(new),
            ..Change::default()
        };
        self.0.change(&change, false).map(drop).map_err(operation)
    }

    /// Returns where a symbolic link points.
    ///
    /// # Errors
    /// `EINVAL` for anything else.
    pub fn read_link(&self) -> Result<OsString> {
        let _quiet = Quiet::enter();
        self.0
            .with(Handle::read_link)
            .map_err(failed("read symbolic link"))
    }

    /// Opens a regular file with this process's rights.
    ///
    /// A file that somebody changed since it was last looked at loses its clean cached pages here.
    ///
    /// # Errors
    /// `EISDIR`, `ELOOP` for a symbolic link, `EOPNOTSUPP` for other kinds; `ESTALE` when somebody changed the stored
    /// file while newer data was cached; what open(2) says.
    pub fn open(&self, options: &OpenOptions) -> Result<File> {
        let _quiet = Quiet::enter();
        const OPERATION: &str = "open";
        match self.kind() {
            Kind::File => {}
            Kind::Directory => return Err(Error::name(OPERATION, Errno::EISDIR)),
            Kind::Symlink => return Err(Error::name(OPERATION, Errno::ELOOP)),
            _ => return Err(Error::name(OPERATION, Errno::EOPNOTSUPP)),
        }
        let data = self.data()?;
        self.0.notice_strangers(data)?;
        let access = options.access();
        let file = {
            let _life = self.0.life.lock();
            let granted = self
                .0
                .with(|_| data.object.grant(access.read, access.write));
            granted.map_err(failed(OPERATION))?;
            File::new(self.clone(), Arc::clone(&data.inode), access)
        };
        if options.wants_truncate() {
            // As open(2): even when opened for reading alone, if the mode allows writing.
            data.inode.set_len(0)?;
        }
        Ok(file)
    }

    /// Opens a file that is open already once more, with other rights that this one has as well.
    pub(crate) fn reopen(&self, access: Access) -> Result<File> {
        let _quiet = Quiet::enter();
        let data = self.data()?;
        let _life = self.0.life.lock();
        let granted = self
            .0
            .with(|_| data.object.grant(access.read, access.write));
        granted.map_err(failed("open"))?;
        Ok(File::new(self.clone(), Arc::clone(&data.inode), access))
    }

    /// Opens a file that was just created, through the descriptor that created it: its mode may allow no other.
    fn open_made(&self, options: &OpenOptions, fd: OwnedFd) -> Result<File> {
        // It is about to be written to.
        let data = self.data_under(Request::new(Mode::Exclusive))?;
        let access = options.access();
        let _life = self.0.life.lock();
        let adopted = data.object.adopt(fd, true, true);
        adopted.map_err(failed("create"))?;
        Ok(File::new(self.clone(), Arc::clone(&data.inode), access))
    }

    /// Opens the stored file for record locks of one owner more.
    ///
    /// # Errors
    /// What open(2) says.
    pub fn record_locks(&self) -> Result<RecordLocks> {
        let _quiet = Quiet::enter();
        // What the program may do was decided when it opened the file.
        let opened = self.0.with(Handle::open_beside);
        opened
            .map(RecordLocks::new)
            .map_err(failed("lock records of"))
    }

    /// Opens the directory for reading its entries.
    ///
    /// # Errors
    /// `ENOTDIR`; what open(2) says.
    pub fn open_dir(&self) -> Result<Directory> {
        let _quiet = Quiet::enter();
        let entries = self.0.with(Handle::entries);
        let entries = entries.map_err(failed("open directory"))?;
        Ok(Directory::new(self.clone(), entries))
    }

    /// Makes the directory's entries durable.
    ///
    /// # Errors
    /// What fsync(2) says.
    pub fn sync_dir(&self) -> Result<()> {
        let _quiet = Quiet::enter();
        self.0
            .with(Handle::sync_dir)
            .map_err(failed("sync directory"))
    }

    /// Returns space and limits of the filesystem the inode lies on.
    ///
    /// # Errors
    /// What statfs(2) says.
    pub fn statfs(&self) -> Result<Statfs> {
        let _quiet = Quiet::enter();
        self.0
            .with(Handle::space)
            .map_err(failed("read free space of"))
    }

    /// Returns the value of an extended attribute.
    ///
    /// # Errors
    /// `ENODATA`, `EOPNOTSUPP`.
    pub fn xattr(&self, name: &OsStr) -> Result<Vec<u8>> {
        let _quiet = Quiet::enter();
        let value = self.0.with(|handle| handle.xattr(name));
        value.map_err(failed_at("read extended attribute", name))
    }

    /// Returns the names of the extended attributes, each ended by a zero byte.
    ///
    /// # Errors
    /// The store's errors.
    pub fn xattr_names(&self) -> Result<Vec<u8>> {
        let _quiet = Quiet::enter();
        let names = self.0.with(Handle::xattr_names);
        names.map_err(failed("list extended attributes of"))
    }

    /// Sets an extended attribute; an access ACL is set as `owner`.
    ///
    /// # Errors
    /// What setxattr(2) says.
    pub fn set_xattr(
        &self,
        name: &OsStr,
        value: &[u8],
        flags: SetXattr,
        owner: Owner,
    ) -> Result<()> {
        let _quiet = Quiet::enter();
        let told = failed_at("set extended attribute", name);
        self.0.check().map_err(told)?;
        let mut stamps = self.0.stamps.lock();
        let handle = &self.0.handle;
        let outcome = handle.set_xattr(name, value, flags, owner.caller());
        outcome.map_err(failed_at("set extended attribute", name))?;
        self.0.record_in(&mut stamps, handle.stat().as_ref().ok());
        Ok(())
    }

    /// Removes an extended attribute.
    ///
    /// # Errors
    /// What removexattr(2) says.
    pub fn remove_xattr(&self, name: &OsStr) -> Result<()> {
        let _quiet = Quiet::enter();
        let told = failed_at("remove extended attribute", name);
        self.0.check().map_err(told)?;
        let mut stamps = self.0.stamps.lock();
        let handle = &self.0.handle;
        let outcome = handle.remove_xattr(name);
        outcome.map_err(failed_at("remove extended attribute", name))?;
        self.0.record_in(&mut stamps, handle.stat().as_ref().ok());
        Ok(())
    }

    /// Tells that one of the node's files was closed.
    pub(crate) fn file_closed(&self) {
        let _quiet = Quiet::enter();
        let Some(data) = self.0.data.get() else {
            return;
        };
        data.object.revoke();
        if data.inode.is_open() {
            return;
        }
        if self.0.life.lock().orphan {
            self.discard_orphan();
        } else {
            self.0.tree.note_idle(self);
        }
    }

    /// Tells whether letting go of the node now would lose something or serve nobody.
    fn is_needed(&self) -> bool {
        // The list's own reference is one.
        Arc::strong_count(&self.0) > 1
            || self
                .0
                .data
                .get()
                .is_some_and(|data| data.inode.is_open() || data.inode.is_dirty())
    }

    /// Returns the data side, made now if it is needed for the first time.
    fn data(&self) -> Result<&Data> {
        self.data_under(Request::new(Mode::Shared).with(Flags::ANY))
    }

    /// As [`Node::data`]; made, it is made under that request for the file's glock.
    fn data_under(&self, request: Request) -> Result<&Data> {
        if let Some(data) = self.0.data.get() {
            return Ok(data);
        }
        let vnode = &self.0;
        // The size that is read here is the one known under this hold.
        let _held = vnode.hold_file("open", request)?;
        let _making = vnode.making.lock();
        if let Some(data) = vnode.data.get() {
            return Ok(data);
        }
        let stat = vnode.with(Handle::stat).map_err(failed("open"))?;
        let tree = &vnode.tree;
        let object = Arc::new(DirObject::new(
            vnode.handle.reopener(),
            Arc::clone(&tree.rings),
        ));
        let watch = Arc::new(Watch::default());
        let mut stored: Arc<dyn Object> = Arc::new(Watched::new(
            Arc::clone(&object) as Arc<dyn Object>,
            Arc::clone(&watch),
        ));
        if let Some(space) = tree.space() {
            // Innermost: asked as late as can be.
            stored = Arc::new(Leased::new(stored, Arc::clone(space)));
        }
        if let Some(layer) = &tree.layer {
            stored = layer(stored);
        }
        if let Some(limit) = &tree.engine.time_limit {
            stored = TimedObject::new(stored, limit);
        }
        let backing: Weak<dyn Backing> = Arc::downgrade(vnode) as Weak<dyn Backing>;
        let shared = vnode.shared().cloned();
        if let Some(shared) = &shared {
            let taken = stored.take_up(shared.glock.token().0);
            taken.map_err(|error| failed("open")(error.errno))?;
        }
        let inode = Inode::new(&tree.engine, stored, stat.size, backing, shared);
        vnode.record(&stat);
        Ok(vnode.data.get_or_init(|| Data {
            inode,
            object,
            watch,
        }))
    }
}

impl Vnode {
    fn new(tree: &Arc<Tree>, handle: Arc<Handle>) -> Self {
        Self {
            tree: Arc::clone(tree),
            handle,
            data: OnceLock::new(),
            making: Mutex::new(()),
            life: Mutex::new(Life::default()),
            stamps: Mutex::new(Stamps::default()),
            used: AtomicBool::new(true),
            shared: OnceLock::new(),
            strangers: AtomicU64::new(0),
        }
    }

    /// Does something with the handle; once more if descriptors had run out, after giving up those nobody needs.
    fn with<T>(
        &self,
        work: impl Fn(&Arc<Handle>) -> std::result::Result<T, Errno>,
    ) -> std::result::Result<T, Errno> {
        self.check()?;
        match work(&self.handle) {
            Err(Errno::EMFILE | Errno::ENFILE) => {
                self.tree.relieve();
                work(&self.handle)
            }
            outcome => outcome,
        }
    }

    /// Asks whether this node may still use the directory.
    fn check(&self) -> std::result::Result<(), Errno> {
        self.tree.check()
    }

    /// Returns its glock, where other nodes use the directory too. Only files and directories have anything to share.
    fn shared(&self) -> Option<&Shared> {
        self.tree.space()?;
        let made = self.shared.get_or_init(|| match self.handle.kind() {
            Kind::File | Kind::Directory => self.tree.shared(self.handle.id()),
            _ => None,
        });
        made.as_ref()
    }

    /// Takes a file's glock in `mode`; nothing is held for what is no file.
    fn hold(&self, operation: &'static str, mode: Mode) -> Result<Hold<'_>> {
        self.hold_file(operation, Request::new(mode))
    }

    /// Takes a file's glock for a look at what the store says of it.
    fn hold_uncached(&self, operation: &'static str) -> Result<Hold<'_>> {
        self.hold_file(operation, Request::new(Mode::Shared).with(Flags::ANY))
    }

    fn hold_file(&self, operation: &'static str, request: Request) -> Result<Hold<'_>> {
        if self.handle.kind() != Kind::File || self.tree.space().is_none() {
            return Ok(None);
        }
        if !self.tree.engine.process.is_current() {
            return Err(Error::new(operation, ErrorKind::Forked));
        }
        let shared = self.shared().filter(|shared| !shared.is_lent_here());
        let held = shared.map(|shared| shared.lock(request));
        held.transpose().map_err(|why| refused(operation, why))
    }

    /// Tells who caches that nothing of it may be, in the mode that the glock falls to.
    fn stop_caching(&self, to: Mode) {
        if let Some(data) = self.data.get() {
            data.inode.pages().close();
            // After the close, which keeps new refusals off: the end is another node's to move.
            data.inode.mappings().grown();
        }
        if to == Mode::Unlocked {
            self.strangers.fetch_add(1, Ordering::AcqRel);
        }
    }

    fn mark_used(&self) {
        self.used.store(true, Ordering::Relaxed);
    }

    fn spend_second_chance(&self) -> bool {
        self.used.swap(false, Ordering::Relaxed)
    }

    /// Closes the file's descriptors if nobody has it open and nothing waits to be stored.
    fn close_idle(&self) {
        // Somebody who holds it may be the one who asks for descriptors.
        let Some(_life) = self.life.try_lock() else {
            return;
        };
        if let Some(data) = self.data.get()
            && !data.inode.is_open()
            && !data.inode.is_dirty()
        {
            data.object.close_idle();
        }
    }
}

impl Node {
    /// Returns the data side of a regular file.
    pub(crate) fn inode(&self, operation: &'static str) -> Result<&Inode> {
        match self.kind() {
            Kind::File => Ok(&self.data()?.inode),
            Kind::Directory => Err(Error::name(operation, Errno::EISDIR)),
            _ => Err(Error::name(operation, Errno::EOPNOTSUPP)),
        }
    }

    /// As [`Node::inode`], if it has been made already.
    pub(crate) fn known_inode(&self) -> Option<&Inode> {
        self.0.data.get().map(|data| &*data.inode)
    }

    /// Stores what other nodes have to find, before the glock falls.
    pub(crate) fn hand_over(&self) -> std::result::Result<(), Errno> {
        self.0.hand_over()
    }

    /// Asks whether this node may still use the directory.
    pub(crate) fn check(&self) -> std::result::Result<(), Errno> {
        self.0.check()
    }

    /// Drops what may not be cached in the mode the glock falls to.
    pub(crate) fn stop_caching(&self, to: Mode) {
        self.0.stop_caching(to);
    }

    /// Reads again what other nodes may have changed; the glock is held.
    pub(crate) fn refresh(&self) -> std::result::Result<(), Errno> {
        self.0.refresh()
    }

    /// Drops everything: the right to it was lost.
    pub(crate) fn abandon(&self) {
        if let Some(data) = self.0.data.get() {
            data.inode.pages().abandon();
        }
        self.0.strangers.fetch_add(1, Ordering::AcqRel);
    }
}

impl Drop for Vnode {
    fn drop(&mut self) {
        if !self.tree.engine.process.is_current() {
            // What would go with the last reference is the parent's: pages in windows, which both share, threads to wait
            // for, locks that those may have held. So no reference is the last.
            std::mem::forget((Arc::clone(&self.tree), Arc::clone(&self.handle)));
            if let Some(data) = self.data.get() {
                std::mem::forget((Arc::clone(&data.inode), Arc::clone(&data.object)));
            }
            std::mem::forget(self.shared.take());
            return;
        }
        if let Some(Some(shared)) = self.shared.get() {
            self.tree.retire(shared);
        }
        self.tree.dropped(self.handle.id());
    }
}

#[cfg(test)]
mod tests;
