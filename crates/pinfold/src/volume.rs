//! A volume: a directory served by one engine in this process.

use std::any::Any;
use std::ffi::OsStr;
use std::fmt;
use std::ops::RangeInclusive;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::Duration;

use pinfold_base::Errno;
use pinfold_base::sync::Mutex;
use pinfold_base::sync::thread::JoinHandle;
use pinfold_cache::{Cache, CacheConfig, CacheSnapshot, MEMORY_MIN, PinSite};
use pinfold_fault::{FaultSnapshot, Faults};
use pinfold_lock::{LockService, Space};
use pinfold_mem::{Privilege, Quiet, exit, faultin, uring};
use pinfold_store::dir::namespace::{Namespace, OpenError};
use pinfold_store::{Operation, StoreError, TimeLimit, TimeLimitSnapshot};

use crate::directory::Directory;
use crate::engine::Engine;
use crate::error::{Error, ErrorKind, Result};
use crate::file::File;
use crate::metadata::{Kind, Metadata, Owner};
use crate::node::{Node, ObjectLayer, RenameFlags, Tree};
use crate::open_options::OpenOptions;
use crate::shared::Demoted;

/// How long a volume that ends waits until its glocks are given up.
const GIVE_UP_PATIENCE: Duration = Duration::from_secs(10);
/// Symbolic links followed in one path at most, as in Linux.
const LINKS_MAX: usize = 40;

/// A directory whose files are served by a page cache of this process. Clones are the same volume.
///
/// The last clone to go writes everything back; [`Volume::close`] does so and tells about errors.
#[derive(Clone)]
pub struct Volume(Arc<Shared>);

struct Shared {
    tree: Arc<Tree>,
    engine: Arc<Engine>,
    faults: Arc<Faults>,
    flusher: Mutex<Option<JoinHandle<()>>>,
}

/// What the system lets a volume do.
#[derive(Debug)]
pub struct Capabilities {
    /// How mappings are had; or why they are not.
    ///
    /// With [`Privilege::UserModeOnly`] a system call on mapped memory that is not resident fails with `EFAULT`, whatever the
    /// delivery: [`Mapping::pin`](crate::Mapping::pin) the memory first.
    pub mappings: Result<Privilege>,
}

/// What happened in a volume since it was opened.
#[derive(Debug, Clone, Copy)]
pub struct Statistics {
    /// The page cache's counters.
    pub cache: CacheSnapshot,
    /// What happened to faults in mappings.
    pub faults: FaultSnapshot,
    /// What the limit on the store's answers ended; zeros without a limit.
    pub store: TimeLimitSnapshot,
    /// Pages that are dirty or being written now.
    pub pages_dirty: u64,
    /// Pages the budget holds at most.
    pub pages_max: u64,
    /// Inodes held now.
    pub nodes: u64,
    /// Calls that had to bring user memory in, over all volumes of the process. Zero in the ordinary case.
    pub fault_in_calls: u64,
}

impl Statistics {
    /// Lists names and values, for printing.
    #[must_use]
    pub fn rows(&self) -> Vec<(&'static str, u64)> {
        let mut rows = self.cache.rows();
        rows.extend(self.faults.rows());
        rows.extend([
            ("store_expired", self.store.expired),
            ("store_late", self.store.late),
            ("pages_dirty", self.pages_dirty),
            ("pages_max", self.pages_max),
            ("nodes", self.nodes),
            ("fault_in_calls", self.fault_in_calls),
        ]);
        rows
    }
}

/// Settings of a volume that is about to be opened.
#[derive(Clone)]
pub struct VolumeBuilder {
    config: CacheConfig,
    io_uring: bool,
    file_size_limit: bool,
    faults_disabled_mapping: bool,
    may_demote: bool,
    privileges: RangeInclusive<Privilege>,
    layer: Option<ObjectLayer>,
    store_timeout: Option<Duration>,
    glocks: Option<Arc<Space>>,
    demoted: Option<Demoted>,
}

impl fmt::Debug for VolumeBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VolumeBuilder")
            .field("config", &self.config)
            .field("file_size_limit", &self.file_size_limit)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Volume {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Volume").field(&self.0.tree).finish()
    }
}

impl VolumeBuilder {
    /// Sets the budget for pages in bytes; at least [`MEMORY_MIN`], 256 MiB unless set.
    #[must_use]
    pub fn memory(mut self, bytes: u64) -> Self {
        self.config.memory = bytes;
        self
    }

    /// Sets whether transfers go through io_uring where the kernel allows it; they do unless set. Threads do the same
    /// work, for tools that cannot follow a ring, such as valgrind.
    #[must_use]
    pub fn io_uring(mut self, allowed: bool) -> Self {
        self.io_uring = allowed;
        self
    }

    /// Sets how often background write-back looks for old dirty pages; every second unless set.
    #[must_use]
    pub fn background_interval(mut self, interval: Duration) -> Self {
        self.config.flush_interval = interval;
        self
    }

    /// Sets how long a page stays dirty before background write-back stores it; 5 seconds unless set.
    #[must_use]
    pub fn dirty_age_max(mut self, age: Duration) -> Self {
        self.config.dirty_age_max = age;
        self
    }

    /// Sets how many bytes may be dirty before writers are made to wait; half the budget unless set.
    #[must_use]
    pub fn dirty_limit(mut self, bytes: u64) -> Self {
        self.config.dirty_limit = Some(bytes);
        self
    }

    /// Sets whether a page that could not be stored stays dirty for another try; otherwise it is clean and readable after
    /// the error, as in the kernel.
    #[must_use]
    pub fn retain_dirty_on_error(mut self, retain: bool) -> Self {
        self.config.retain_dirty_on_error = retain;
        self
    }

    /// Sets whether RLIMIT_FSIZE of this process binds writers; it does unless set. A server that writes on behalf of
    /// others, whose limits were checked already, turns it off.
    #[must_use]
    pub fn file_size_limit(mut self, obey: bool) -> Self {
        self.file_size_limit = obey;
        self
    }

    /// Sets whether a direct write from mapped memory that is not there brings it in with its own file blocked, as bcachefs
    /// does, instead of with nothing held. For comparing the two (docs/decisions/0008): results are the same, nothing is
    /// gained by it, and it cannot work between nodes.
    #[must_use]
    pub fn faults_disabled_mapping(mut self, on: bool) -> Self {
        self.faults_disabled_mapping = on;
        self
    }

    /// Restricts how a userfaultfd for mappings may be had; any way unless set.
    #[must_use]
    pub fn mapping_privileges(mut self, privileges: RangeInclusive<Privilege>) -> Self {
        self.privileges = privileges;
        self
    }

    /// Wraps every file's object: for stores that fail, delay or forget on purpose.
    #[must_use]
    pub fn object_layer(mut self, layer: ObjectLayer) -> Self {
        self.layer = Some(layer);
        self
    }

    /// Sets how long the store may take to answer; there is no limit unless set, as in the kernel.
    ///
    /// Whatever waits for it longer ends with `EIO`: a call; a sync, once per open file; an access through a mapping with
    /// SIGBUS; background write-back as after any error of the store. Closing the volume does not wait longer either, for
    /// each of the 16 operations at most after which a store is taken for gone. [`Statistics::store`] counts them. What was
    /// given up may still be stored later, but never over something newer.
    ///
    /// With a limit every byte is copied once more, so that a late device never touches memory that is used again, and
    /// transfers under way come on top of the budget. Opening, looking up and changing names is not limited: those are system
    /// calls of the calling thread, with its rights, and one that was given up might still make or move a file.
    #[must_use]
    pub fn store_timeout(mut self, limit: Duration) -> Self {
        self.store_timeout = Some(limit);
        self
    }

    /// Joins a lock service as node `name` and makes the volume that node ([`VolumeBuilder::glocks`]).
    ///
    /// # Errors
    /// [`ErrorKind::Glock`]: `EEXIST` for a name that is taken; what else the service refuses with.
    pub fn join(
        self,
        service: &dyn LockService,
        name: &str,
        options: pinfold_lock::Options,
    ) -> Result<Self> {
        // A handler of the program that ran on one of the node's threads and faulted would wait for that thread.
        let _quiet = Quiet::for_threads();
        let space = Space::join(service, name, options).map_err(|error| {
            Error::new("join as a node", ErrorKind::Glock(error.errno)).caused_by(error)
        })?;
        Ok(self.glocks(Arc::new(space)))
    }

    /// Makes the volume one of several nodes that serve the same directory, in this process or elsewhere, as if they were one:
    /// each file is used under its glock. `node` is this volume's alone, joined where signals of the program are kept away from
    /// its threads, or the program has no handler that touches mapped memory ([`VolumeBuilder::join`] sees to that); the nodes have one
    /// [`LockService`](crate::glocks::LockService), and it only these. What others do to the directory is noticed when a
    /// glock comes back at best.
    ///
    /// When the node withdraws (its lease has ended, or what it had to hand over could not be stored), calls fail with `EIO`
    /// ([`ErrorKind::Glock`]), accesses to mappings get SIGBUS, and what was not stored is gone. The volume is to be dropped
    /// and opened anew.
    ///
    /// Names are not cached; names of a directory change under its glock. Under glocks a page that could not be
    /// stored stays dirty ([`VolumeBuilder::retain_dirty_on_error`]), and mappings learn of stores by faults
    /// ([`Tracking::Sync`](crate::Tracking::Sync)). Handing a file over stores its data and times; durable they become by a
    /// sync, on any node.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let scratch = tempfile::tempdir()?;
    /// use pinfold::glocks::{Options, service::local::Local};
    /// use pinfold::{OpenOptions, Volume};
    ///
    /// let service = Local::new();
    /// let open = |node| {
    ///     let volume = Volume::builder().memory(16 << 20);
    ///     let volume = volume.join(&service, node, Options::default())?;
    ///     volume.open_dir(scratch.path())
    /// };
    /// let (one, other) = (open("one")?, open("other")?);
    /// let options = OpenOptions::new().read(true).write(true).create(true);
    /// one.open("shared", &options)?.write_at(b"seen everywhere", 0)?;
    /// let mut seen = [0; 15];
    /// other.open("shared", &options)?.read_at(&mut seen, 0)?;
    /// assert_eq!(&seen, b"seen everywhere");
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn glocks(mut self, node: Arc<Space>) -> Self {
        self.glocks = Some(node);
        self
    }

    /// Sets whether a buffered write that has to bring its source in keeps a weak hold of its file's glock meanwhile
    /// (MAY_DEMOTE, SEMANTICS.md section H), instead of letting go of it. Results are the same; docs/decisions/0010 says what it
    /// is worth. Off unless set; without glocks it means nothing.
    #[must_use]
    pub fn may_demote(mut self, on: bool) -> Self {
        self.may_demote = on;
        self
    }

    /// Has `told` called before this node gives up what it may cache of an inode ([`VolumeBuilder::glocks`]).
    #[must_use]
    pub fn demoted(mut self, told: Demoted) -> Self {
        self.demoted = Some(told);
        self
    }

    /// Opens a directory.
    ///
    /// # Errors
    /// `EINVAL` for a budget below [`MEMORY_MIN`] and for a time limit of zero, `EBUSY` when another engine serves the directory, what opening it
    /// says, `ENOMEM` when the budget's address space is refused.
    pub fn open_dir(mut self, path: impl AsRef<Path>) -> Result<Volume> {
        const OPERATION: &str = "serve directory";
        let path = path.as_ref();
        if self.glocks.is_some() {
            if self.faults_disabled_mapping {
                return Err(Error::invalid(OPERATION, Errno::EINVAL)
                    .at_path(path)
                    .caused_by("memory is never brought in with a file blocked between nodes"));
            }
            // What a node could not store must not pass for stored when it hands the file over.
            self.config.retain_dirty_on_error = true;
        }
        if self.config.memory < MEMORY_MIN {
            return Err(Error::invalid(OPERATION, Errno::EINVAL)
                .at_path(path)
                .caused_by(format!(
                    "a budget of {} bytes is below the least of {MEMORY_MIN}",
                    self.config.memory
                )));
        }
        if self.store_timeout == Some(Duration::ZERO) {
            return Err(Error::invalid(OPERATION, Errno::EINVAL)
                .at_path(path)
                .caused_by("no store answers within no time"));
        }
        let open = if self.glocks.is_some() {
            Namespace::open_shared
        } else {
            Namespace::open
        };
        let namespace = open(path).map_err(|error| {
            let kind = match &error {
                OpenError::Claimed { .. } => ErrorKind::AlreadyServed,
                OpenError::Unusable { .. }
                | OpenError::Removed { .. }
                | OpenError::NoProc { .. } => ErrorKind::Name(error.errno()),
            };
            Error::new(OPERATION, kind).at_path(path).caused_by(error)
        })?;
        let cache = Cache::new(self.config).map_err(Error::arena)?;
        let mut transfers = uring::EngineConfig::automatic(Some(Arc::clone(cache.arena())));
        if !self.io_uring {
            transfers.backend = Some(uring::Backend::Threads);
        }
        let rings = uring::Engine::start(transfers)
            .map_err(|errno| Error::invalid("start I/O for", errno).at_path(path))?;
        let flusher = cache.start_flusher().map_err(|error| {
            Error::invalid("start write-back for", Errno::from(&error)).at_path(path)
        })?;
        let limit = self.store_timeout.map(TimeLimit::new);
        let engine = Engine::new(
            cache,
            self.file_size_limit,
            self.faults_disabled_mapping,
            self.may_demote,
            self.privileges,
            limit,
        );
        let faults = engine.faults();
        let glocks = (self.glocks, self.demoted);
        let tree = Tree::new(namespace, Arc::clone(&engine), rings, self.layer, glocks);
        let shared = Arc::new(Shared {
            tree,
            engine,
            faults,
            flusher: Mutex::new(Some(flusher)),
        });
        // The end of the process writes back what is dirty, also when it ends without dropping the volume.
        let weak: Weak<Shared> = Arc::downgrade(&shared);
        let whole: Weak<dyn Any + Send + Sync> = weak.clone();
        shared.engine.set_volume(whole);
        exit::at_exit(Box::new(move || {
            if let Some(shared) = weak.upgrade() {
                let _ = shared.engine.cache.write_back_all();
            }
        }));
        Ok(Volume(shared))
    }
}

impl Volume {
    /// Begins to describe a volume.
    #[must_use]
    pub fn builder() -> VolumeBuilder {
        VolumeBuilder {
            config: CacheConfig::default(),
            io_uring: true,
            file_size_limit: true,
            faults_disabled_mapping: false,
            may_demote: false,
            privileges: Privilege::ANY,
            layer: None,
            store_timeout: None,
            glocks: None,
            demoted: None,
        }
    }

    /// Returns the directory itself.
    #[must_use]
    pub fn root(&self) -> Node {
        self.0.tree.root()
    }

    /// Returns the path the volume was opened on.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.0.tree.namespace().path()
    }

    /// Returns what happened so far.
    #[must_use]
    pub fn statistics(&self) -> Statistics {
        let cache = &self.0.engine.cache;
        Statistics {
            cache: cache.statistics(),
            faults: self.0.faults.statistics(),
            store: self
                .0
                .engine
                .time_limit
                .as_ref()
                .map_or_else(TimeLimitSnapshot::default, |limit| limit.statistics()),
            pages_dirty: cache.dirty_pages() as u64,
            pages_max: cache.pages_max() as u64,
            nodes: self.0.tree.len() as u64,
            fault_in_calls: faultin::calls(),
        }
    }

    /// Lists the pages pinned now, with the place each pin was taken: for finding one that is never given back. Debug builds
    /// remember; release builds count only, in [`Volume::statistics`].
    #[must_use]
    pub fn pins_held(&self) -> Vec<PinSite> {
        self.0.engine.cache.pins_held()
    }

    /// Returns this node's glocks, where the directory is served by several ([`VolumeBuilder::glocks`]).
    #[must_use]
    pub fn glocks(&self) -> Option<&Arc<Space>> {
        self.0.tree.space()
    }

    /// Tells what this system lets the volume do.
    #[must_use]
    pub fn capabilities(&self) -> Capabilities {
        Capabilities {
            mappings: self
                .0
                .faults
                .privilege()
                .map_err(|error| Error::invalid("map files of", error.errno()).caused_by(error)),
        }
    }

    /// Writes back everything that is dirty and makes the directory's filesystem durable.
    ///
    /// # Errors
    /// The first error of storing a page; each is reported to the files concerned as well.
    pub fn sync(&self) -> Result<()> {
        let _quiet = Quiet::enter();
        let written = self.0.engine.cache.write_back_all();
        self.0
            .sync_filesystem()
            .map_err(|errno| Error::name("sync", errno).at_path(self.path()))?;
        written.map_err(|error| Error::store("write back", error).at_path(self.path()))
    }

    /// Writes back everything. Files still open go on working, without background write-back once the last clone is gone.
    ///
    /// # Errors
    /// As [`Volume::sync`].
    pub fn close(self) -> Result<()> {
        self.sync()
    }

    /// Opens a file by its path in the volume.
    ///
    /// # Errors
    /// What open(2) says; `ELOOP` after 40 symbolic links; `EXDEV` for a path or link that leaves the volume.
    pub fn open(&self, path: impl AsRef<Path>, options: &OpenOptions) -> Result<File> {
        let path = path.as_ref();
        let opened = self.open_at(path, options);
        opened
            .inspect(|file| file.set_path(path))
            .map_err(|error| error.at_path(path))
    }

    fn open_at(&self, path: &Path, options: &OpenOptions) -> Result<File> {
        if !options.wants_create() {
            return self.resolve(path, options.follows_links())?.open(options);
        }
        let (dir, name) = self.resolve_parent(path)?;
        if !options.wants_new()
            && let Ok(node) = dir.lookup(&name)
        {
            if node.kind() == Kind::Symlink && options.follows_links() {
                let target = self.target_of(path, &node)?;
                return self.open_at(&target, options);
            }
            return node.open(options);
        }
        dir.create(&name, options, Owner::Process)
            .map(|(_, file)| file)
    }

    /// Returns the attributes of what a path names, symbolic links followed.
    ///
    /// # Errors
    /// What stat(2) says.
    pub fn metadata(&self, path: impl AsRef<Path>) -> Result<Metadata> {
        let path = path.as_ref();
        self.resolve(path, true)
            .and_then(|node| node.attributes())
            .map_err(|error| error.at_path(path))
    }

    /// Returns the attributes of what a path names, a symbolic link's own.
    ///
    /// # Errors
    /// What lstat(2) says.
    pub fn symlink_metadata(&self, path: impl AsRef<Path>) -> Result<Metadata> {
        let path = path.as_ref();
        self.resolve(path, false)
            .and_then(|node| node.attributes())
            .map_err(|error| error.at_path(path))
    }

    /// Makes a directory with these permission bits, less the umask.
    ///
    /// # Errors
    /// What mkdir(2) says.
    pub fn create_dir(&self, path: impl AsRef<Path>, mode: u32) -> Result<()> {
        self.in_parent(path.as_ref(), |dir, name| {
            dir.make_dir(name, mode, Owner::Process).map(drop)
        })
    }

    /// Removes a name that is not a directory's.
    ///
    /// # Errors
    /// What unlink(2) says.
    pub fn remove_file(&self, path: impl AsRef<Path>) -> Result<()> {
        self.in_parent(path.as_ref(), Node::unlink)
    }

    /// Removes an empty directory.
    ///
    /// # Errors
    /// What rmdir(2) says.
    pub fn remove_dir(&self, path: impl AsRef<Path>) -> Result<()> {
        self.in_parent(path.as_ref(), Node::remove_dir)
    }

    /// Renames `from` to `to`, replacing what is there.
    ///
    /// # Errors
    /// What rename(2) says.
    pub fn rename(&self, from: impl AsRef<Path>, to: impl AsRef<Path>) -> Result<()> {
        let (to_dir, to_name) = self
            .resolve_parent(to.as_ref())
            .map_err(|error| error.at_path(to.as_ref()))?;
        self.in_parent(from.as_ref(), |dir, name| {
            dir.rename(name, &to_dir, &to_name, RenameFlags::empty())
        })
    }

    /// Gives what `existing` names a second name.
    ///
    /// # Errors
    /// What link(2) says.
    pub fn hard_link(&self, existing: impl AsRef<Path>, new: impl AsRef<Path>) -> Result<()> {
        let target = self
            .resolve(existing.as_ref(), false)
            .map_err(|error| error.at_path(existing.as_ref()))?;
        self.in_parent(new.as_ref(), |dir, name| dir.link(&target, name))
    }

    /// Makes a symbolic link at `path` to `target`.
    ///
    /// # Errors
    /// What symlink(2) says.
    pub fn symlink(&self, target: impl AsRef<OsStr>, path: impl AsRef<Path>) -> Result<()> {
        self.in_parent(path.as_ref(), |dir, name| {
            dir.symlink(name, target.as_ref(), Owner::Process).map(drop)
        })
    }

    /// Returns where a symbolic link points.
    ///
    /// # Errors
    /// What readlink(2) says.
    pub fn read_link(&self, path: impl AsRef<Path>) -> Result<PathBuf> {
        let path = path.as_ref();
        self.resolve(path, false)
            .and_then(|node| node.read_link())
            .map(PathBuf::from)
            .map_err(|error| error.at_path(path))
    }

    /// Opens a directory for reading its entries.
    ///
    /// # Errors
    /// What opendir(3) says.
    pub fn read_dir(&self, path: impl AsRef<Path>) -> Result<Directory> {
        let path = path.as_ref();
        self.resolve(path, true)
            .and_then(|node| node.open_dir())
            .map_err(|error| error.at_path(path))
    }

    fn in_parent(&self, path: &Path, work: impl FnOnce(&Node, &OsStr) -> Result<()>) -> Result<()> {
        self.resolve_parent(path)
            .and_then(|(dir, name)| work(&dir, &name))
            .map_err(|error| error.at_path(path))
    }

    /// Finds the directory a path's last component is in.
    fn resolve_parent(&self, path: &Path) -> Result<(Node, std::ffi::OsString)> {
        let name = path
            .file_name()
            .ok_or_else(|| Error::name("resolve", Errno::EINVAL))?;
        let dir = path.parent().unwrap_or_else(|| Path::new(""));
        Ok((self.resolve(dir, true)?, name.to_owned()))
    }

    /// Walks a path from the root; a leading slash means the volume's root.
    fn resolve(&self, path: &Path, follow_last: bool) -> Result<Node> {
        let mut path = normal(path)?;
        for _ in 0..=LINKS_MAX {
            match self.walk(&path, follow_last)? {
                Walked::Found(node) => return Ok(node),
                Walked::Link(onward) => path = onward,
            }
        }
        Err(Error::name("resolve", Errno::ELOOP))
    }

    fn walk(&self, path: &Path, follow_last: bool) -> Result<Walked> {
        let mut node = self.root();
        let mut components = path.components();
        let mut walked = PathBuf::new();
        while let Some(component) = components.next() {
            let name = component.as_os_str();
            let next = node.lookup(name)?;
            let rest = components.as_path();
            if next.kind() == Kind::Symlink && (follow_last || !rest.as_os_str().is_empty()) {
                let target = next.read_link()?;
                let mut onward = walked.join(target);
                onward.push(rest);
                return Ok(Walked::Link(normal(&onward)?));
            }
            walked.push(name);
            node = next;
        }
        Ok(Walked::Found(node))
    }

    fn target_of(&self, path: &Path, link: &Node) -> Result<PathBuf> {
        let target = link.read_link()?;
        let dir = path.parent().unwrap_or_else(|| Path::new(""));
        normal(&dir.join(target))
    }
}

enum Walked {
    Found(Node),
    Link(PathBuf),
}

/// Drops `.` and a leading slash and resolves `..` by name; refuses to leave the volume.
fn normal(path: &Path) -> Result<PathBuf> {
    let mut plain = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => plain.push(name),
            Component::ParentDir => {
                if !plain.pop() {
                    return Err(Error::name("resolve", Errno::EXDEV).at_path(path));
                }
            }
            Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
        }
    }
    Ok(plain)
}

impl Shared {
    /// Makes the directory's filesystem durable, or gives it up when it takes too long.
    fn sync_filesystem(&self) -> std::result::Result<(), Errno> {
        let Some(limit) = &self.engine.time_limit else {
            return self.tree.namespace().root().sync_filesystem();
        };
        let root = Arc::clone(self.tree.namespace().root());
        let synced = limit.run(Operation::Sync, move || {
            let synced = root.sync_filesystem();
            synced.map_err(|errno| StoreError {
                operation: Operation::Sync,
                offset: 0,
                len: 0,
                errno,
            })
        });
        synced.map_err(|error| error.errno)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if !self.engine.process.is_current() {
            // Its threads and what it was about to store are the parent's: nothing of it goes here.
            std::mem::forget((Arc::clone(&self.tree), Arc::clone(&self.engine)));
            std::mem::forget((Arc::clone(&self.faults), self.flusher.get_mut().take()));
            return;
        }
        let _quiet = Quiet::enter();
        let cache = &self.engine.cache;
        // An error stays in the files' errseq; whoever wants to hear of it calls `close` or `sync_all`.
        let _ = cache.write_back_all();
        cache.stop_flusher();
        if let Some(flusher) = self.flusher.lock().take() {
            let _ = flusher.join();
        }
        // Nodes refer to the tree that keeps them.
        self.tree.clear();
        if let Some(space) = self.tree.space() {
            // Other nodes need not wait for a dead one then. Files still open take theirs again.
            let _ = space.give_all_up(GIVE_UP_PATIENCE);
            space.reap();
        }
    }
}
