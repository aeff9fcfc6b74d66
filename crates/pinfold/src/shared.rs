//! Files that other nodes use too: which glock a call holds, and what a node does before it gives one up (SEMANTICS.md
//! section H).
//!
//! *Owns*: the table of modes below, the duties of a file's glock, the check of the lease before each transfer.
//!
//! *Does not own*: glocks and who has them (`pinfold-lock`), pages, the stored attributes (the node's `stamps`).
//!
//! *Locking*: a glock is class 2: after the inode's lock, before the gate. Nothing of the node (`stamps`, `life`, `making`) is
//! held while one is waited for, since duties take `stamps`. Duties take the gate and folios; what they wait for (references,
//! pins, transfers) waits for no glock.
//!
//! | call | mode |
//! |---|---|
//! | read of cached bytes | none: a page is cached only under SH or EX, and a reference keeps it so |
//! | read of others, load fault, open | SH |
//! | write, append, store fault, truncate, punch, allocate, setting attributes | EX |
//! | direct read | DF, or whatever the node has |
//! | direct write | DF; extending or into a hole EX |
//! | size, attributes, sync, seek to data | SH, or DF if the node has that |
//! | change of names | EX of the directories |
//!
//! With [`VolumeBuilder::may_demote`](crate::VolumeBuilder::may_demote) a write that brings its source in leaves a weak hold behind,
//! which is no hold: everything is looked at anew unless it is still there afterwards.
//!
//! A volume without glocks pays one look at an absent option for each call.
//!
//! A mode can be lent to whoever caches beside the volume (`lent.rs`): until [`Demoted`] takes it back, what that one does for its
//! own pages takes no glock. It could not wait for one: the demotion waits for it.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Weak};

use pinfold_base::{Errno, Progress};
use pinfold_cache::CacheError;
use pinfold_lock::{
    Duties, Flags, Glock, Guard, Kept, MayDemote, Mode, Name, Refusal, Request, Space,
};
use pinfold_mem::Segments;
use pinfold_store::dir::namespace::FileId;
use pinfold_store::{
    Geometry, Object, Operation, Rearrange, Seek, StoreError, StoreResult, SyncScope, Transfer,
};

use crate::error::{Error, ErrorKind, Result};
use crate::inode::Inode;
use crate::metadata::NodeId;
use crate::node::Tree;

/// Told before a node gives up what it may cache of an inode: the mode it falls to is SH (nothing dirty stays), DF (no data
/// stays) or UN (nothing stays). For whoever caches something of it beside the volume, as a kernel does for a mount.
///
/// The lock is handed over when this has returned. It runs with no lock held, in a thread that does nothing else for this inode
/// meanwhile; calls on the inode that need its glock wait for it, so it must not wait for one. What was lent of the mode
/// ([`crate::Node::lend_mode`]) is still good while it runs, and is not any more when it has returned. It is told UN as well when the
/// node has withdrawn.
pub type Demoted = Arc<dyn Fn(NodeId, Mode) + Send + Sync>;

/// A glock held for a call; nothing in a volume that has none.
pub(crate) type Hold<'a> = Option<Guard<'a>>;

/// A file's glock.
#[derive(Clone)]
pub(crate) struct Shared {
    pub(crate) id: FileId,
    pub(crate) space: Arc<Space>,
    pub(crate) glock: Arc<Glock>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.glock.fmt(f)
    }
}

impl Shared {
    /// Takes the glock, and asks the node's clock: one that is cached is granted also to a node that has slept past its lease
    /// and does not know yet. Nothing of the inode may be held but its lock.
    pub(crate) fn lock(&self, request: Request) -> std::result::Result<Guard<'_>, Refusal> {
        let guard = self.glock.lock(request)?;
        check(&self.space).map_err(Refusal::Failed)?;
        Ok(guard)
    }
}

/// Names an inode's glock: the same on every node.
pub(crate) fn name_of(id: FileId, root: FileId) -> Name {
    // Device numbers are the machine's own. Inodes of other mounts below the directory keep theirs, or one number would be
    // two files; machines share those only if they number them alike.
    let elsewhere = if id.device == root.device {
        0
    } else {
        id.device.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
    };
    Name {
        number: id.inode,
        generation: id.generation ^ elsewhere,
    }
}

/// Makes an error of a refused glock.
pub(crate) fn refused(operation: &'static str, why: Refusal) -> Error {
    let kind = match why {
        Refusal::TryFailed => ErrorKind::WouldBlock,
        Refusal::Failed(Errno::EBUSY) => ErrorKind::Pinned,
        Refusal::Failed(errno) => ErrorKind::Glock(errno),
    };
    Error::new(operation, kind)
}

fn refused_pages(why: Refusal) -> CacheError {
    match why {
        Refusal::TryFailed => CacheError::WouldBlock,
        Refusal::Failed(errno) => CacheError::Refused(errno),
    }
}

impl Inode {
    /// Takes the file's glock for a call that fills, changes or by-passes pages.
    #[inline]
    pub(crate) fn hold(&self, operation: &'static str, mode: Mode) -> Result<Hold<'_>> {
        match self.shared_here() {
            None => Ok(None),
            Some(shared) => self
                .hold_shared(shared, mode, Flags::NONE)
                .map_err(|why| refused(operation, why)),
        }
    }

    /// As [`Inode::hold`], without waiting for anybody if `nowait`.
    #[inline]
    pub(crate) fn hold_pages(
        &self,
        mode: Mode,
        nowait: bool,
    ) -> std::result::Result<Hold<'_>, CacheError> {
        let flags = if nowait { Flags::TRY } else { Flags::NONE };
        match self.shared_here() {
            None => Ok(None),
            Some(shared) => self.hold_shared(shared, mode, flags).map_err(refused_pages),
        }
    }

    /// Takes the file's glock for a fault: the mode is kept until its instruction can have run.
    #[inline]
    pub(crate) fn hold_fault(&self, mode: Mode) -> std::result::Result<Hold<'_>, CacheError> {
        match self.shared() {
            None => Ok(None),
            Some(shared) => self
                .hold_shared(shared, mode, Flags::FAULT)
                .map_err(refused_pages),
        }
    }

    /// Takes the file's glock for a call that fills no pages: direct reads, sizes, what the store says. DF serves.
    #[inline]
    pub(crate) fn hold_uncached(
        &self,
        operation: &'static str,
        mode: Mode,
        nowait: bool,
    ) -> Result<Hold<'_>> {
        let Some(shared) = self.shared_here() else {
            return Ok(None);
        };
        let wait = if nowait { Flags::TRY } else { Flags::NONE };
        let held = shared.lock(Request::new(mode).with(Flags::ANY | wait));
        held.map(Some).map_err(|why| refused(operation, why))
    }

    #[cold]
    fn hold_shared<'a>(
        &self,
        shared: &'a Shared,
        mode: Mode,
        flags: Flags,
    ) -> std::result::Result<Hold<'a>, Refusal> {
        let guard = shared.lock(Request::new(mode).with(flags))?;
        if mode != Mode::Deferred {
            // No demotion runs beside a holder, so nobody closes it again meanwhile.
            self.pages().reopen();
        }
        Ok(Some(guard))
    }

    /// Lets go of the glock, or has a weak hold left where the volume says so: for a call that is about to bring memory in.
    pub(crate) fn weaken<'a>(&self, held: Hold<'a>) -> Option<MayDemote<'a>> {
        let held = held.filter(|_| self.engine().may_demote)?;
        Some(held.allow_demote())
    }

    /// Takes the glock again after memory was brought in; `weak` is what was left of the hold.
    pub(crate) fn hold_pages_again<'a>(
        &'a self,
        weak: Option<MayDemote<'a>>,
        mode: Mode,
        nowait: bool,
    ) -> std::result::Result<Hold<'a>, CacheError> {
        match weak.and_then(MayDemote::disallow_demote) {
            None => self.hold_pages(mode, nowait),
            Some(held) => {
                if let Some(shared) = self.shared() {
                    check(&shared.space).map_err(CacheError::Refused)?;
                }
                Ok(Some(held))
            }
        }
    }

    /// Keeps the file's glock in `mode` for memory that stays pinned.
    pub(crate) fn keep(&self, operation: &'static str, mode: Mode) -> Result<Option<Kept<'_>>> {
        let guard = self.hold(operation, mode)?;
        Ok(guard.map(|guard| guard.keep()))
    }

    /// Tells whether cached contents are still this node's to use, at the beginning of a call that may need no glock.
    ///
    /// # Errors
    /// The node has withdrawn, or its lease has ended.
    #[inline]
    pub(crate) fn check_lease(&self, operation: &'static str) -> Result<()> {
        match self.shared() {
            None => Ok(()),
            Some(shared) => {
                check(&shared.space).map_err(|errno| refused(operation, Refusal::Failed(errno)))
            }
        }
    }

    /// Returns the size as it is on all nodes.
    ///
    /// # Errors
    /// The glock's refusal.
    #[inline]
    pub(crate) fn len_now(&self, operation: &'static str) -> Result<u64> {
        let _held = self.hold_uncached(operation, Mode::Shared, false)?;
        Ok(self.len())
    }

    /// Has other nodes store what they have dirty of the file, so that a sync here makes it durable.
    ///
    /// # Errors
    /// The glock's refusal.
    #[inline]
    pub(crate) fn gather_stored(&self, operation: &'static str) -> Result<()> {
        self.hold_uncached(operation, Mode::Shared, false).map(drop)
    }

    /// Tells whether the file changes by direct writes of several nodes: then the store's times are the file's.
    pub(crate) fn is_deferred(&self) -> bool {
        self.shared()
            .is_some_and(|shared| shared.glock.mode() == Mode::Deferred)
    }
}

/// Asks whether the node may use its locks: EIO if not, whatever it withdrew with.
pub(crate) fn check(space: &Space) -> std::result::Result<(), Errno> {
    space.check().map_err(|_| Errno::EIO)
}

/// What the node does about one inode before it gives its glock up, and when it got one. The inode is looked up each time: the
/// glock outlives the nodes that come and go for it.
pub(crate) struct InodeDuties {
    tree: Weak<Tree>,
    id: FileId,
}

impl InodeDuties {
    pub(crate) fn new(tree: Weak<Tree>, id: FileId) -> Self {
        Self { tree, id }
    }
}

impl Duties for InodeDuties {
    fn sync(&self, to: Mode) -> std::result::Result<(), Errno> {
        let Some(tree) = self.tree.upgrade() else {
            return Ok(());
        };
        tree.tell_demoted(self.id, to);
        match tree.held(self.id) {
            Some(node) => node.hand_over(),
            // Whoever let go of it has stored what was dirty.
            None => Ok(()),
        }
    }

    fn invalidate(&self, to: Mode) {
        if let Some(node) = self.tree.upgrade().and_then(|tree| tree.held(self.id)) {
            node.stop_caching(to);
        }
    }

    fn refresh(&self) -> std::result::Result<(), Errno> {
        match self.tree.upgrade().and_then(|tree| tree.held(self.id)) {
            Some(node) => node.refresh(),
            None => Ok(()),
        }
    }

    // Direct I/O is waited for by the thread that holds the glock for it: before another holder there is none to drain.

    fn withdrawn(&self) {
        if let Some(tree) = self.tree.upgrade() {
            tree.tell_demoted(self.id, Mode::Unlocked);
        }
        if let Some(node) = self.tree.upgrade().and_then(|tree| tree.held(self.id)) {
            node.abandon();
        }
    }
}

/// An object that is left alone once the node's right to it has ended: its own clock is asked before each transfer.
#[derive(Debug)]
pub(crate) struct Leased {
    inner: Arc<dyn Object>,
    space: Arc<Space>,
}

impl Leased {
    pub(crate) fn new(inner: Arc<dyn Object>, space: Arc<Space>) -> Self {
        Self { inner, space }
    }

    fn check(&self, operation: Operation, offset: u64, len: u64) -> StoreResult<()> {
        check(&self.space).map_err(|errno| StoreError {
            operation,
            offset,
            len,
            errno,
        })
    }

    fn check_range(&self, operation: Operation, range: &Range<u64>) -> StoreResult<()> {
        self.check(
            operation,
            range.start,
            range.end.saturating_sub(range.start),
        )
    }

    fn check_batch(&self, operation: Operation, batch: Vec<Transfer>) -> Option<Vec<Transfer>> {
        if check(&self.space).is_ok() {
            return Some(batch);
        }
        for transfer in batch {
            let error = StoreError {
                operation,
                offset: transfer.offset,
                len: transfer.segments.bytes() as u64,
                errno: Errno::EIO,
            };
            (transfer.done)(Progress::stopped(0, error));
        }
        None
    }
}

impl Object for Leased {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn readable(&self) -> bool {
        self.inner.readable()
    }

    fn copies(&self) -> bool {
        self.inner.copies()
    }

    fn take_up(&self, token: u64) -> StoreResult<()> {
        self.check(Operation::TakeUp, 0, 0)?;
        self.inner.take_up(token)
    }

    fn read(&self, batch: Vec<Transfer>) {
        if let Some(batch) = self.check_batch(Operation::Read, batch) {
            self.inner.read(batch);
        }
    }

    fn write(&self, batch: Vec<Transfer>) {
        if let Some(batch) = self.check_batch(Operation::Write, batch) {
            self.inner.write(batch);
        }
    }

    fn read_wait(&self, offset: u64, segments: &Segments) -> Progress<StoreError> {
        match self.check(Operation::Read, offset, segments.bytes() as u64) {
            Ok(()) => self.inner.read_wait(offset, segments),
            Err(error) => Progress::stopped(0, error),
        }
    }

    // Not `read_here`: a look at the lease takes a lock that a signal handler must not wait for.

    fn write_wait(&self, offset: u64, segments: &Segments) -> Progress<StoreError> {
        match self.check(Operation::Write, offset, segments.bytes() as u64) {
            Ok(()) => self.inner.write_wait(offset, segments),
            Err(error) => Progress::stopped(0, error),
        }
    }

    fn len(&self) -> StoreResult<u64> {
        self.check(Operation::Attributes, 0, 0)?;
        self.inner.len()
    }

    fn set_len(&self, len: u64) -> StoreResult<()> {
        self.check(Operation::SetLen, len, 0)?;
        self.inner.set_len(len)
    }

    fn allocate(&self, range: Range<u64>) -> StoreResult<()> {
        self.check_range(Operation::Allocate, &range)?;
        self.inner.allocate(range)
    }

    fn punch(&self, range: Range<u64>) -> StoreResult<()> {
        self.check_range(Operation::Punch, &range)?;
        self.inner.punch(range)
    }

    fn rearrange(&self, how: Rearrange, range: Range<u64>) -> StoreResult<()> {
        self.check_range(Operation::Punch, &range)?;
        self.inner.rearrange(how, range)
    }

    fn space_left(&self) -> Option<u64> {
        self.inner.space_left()
    }

    fn sync(&self, scope: SyncScope) -> StoreResult<()> {
        self.check(Operation::Sync, 0, 0)?;
        self.inner.sync(scope)
    }

    fn seek(&self, what: Seek, offset: u64) -> StoreResult<Option<u64>> {
        self.check(Operation::Seek, offset, 0)?;
        self.inner.seek(what, offset)
    }
}
