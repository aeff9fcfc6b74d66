//! The inodes a volume holds: one [`Node`] each, found by identity, kept for a while after their last use.
//!
//! *Locking*: the table and the list of kept nodes are leaves; no node is dropped under them, since dropping a file's
//! last reference gives up its pages and descriptors.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use pinfold_base::Errno;
use pinfold_base::sync::Mutex;
use pinfold_lock::{Mode, Space};
use pinfold_mem::uring;
use pinfold_store::Object;
use pinfold_store::dir::namespace::{FileId, Handle, Namespace, Stat};

use super::{Node, Vnode};
use crate::engine::Engine;
use crate::shared::{self, Demoted, InodeDuties, Shared};

/// Nodes kept after their last use, with their cached data.
const KEPT_MAX: usize = 32_768;
/// Kept nodes looked at for each one that comes new: dirty and open ones stay, so more than one may be needed.
const LOOKED_AT_MAX: usize = 4;
/// Closed files that keep their descriptors for the next opener, where the process may have enough of them.
const IDLE_MAX: usize = 256;
/// Glocks given up between two looks for those that may be forgotten.
const RETIRED_STEP: usize = 256;
/// Descriptors a file holds at most: two for each right.
const FILE_DESCRIPTORS: usize = 4;

/// Wraps every file's object: for test stores.
pub type ObjectLayer = Arc<dyn Fn(Arc<dyn Object>) -> Arc<dyn Object> + Send + Sync>;

/// The name-space side of a volume.
pub(crate) struct Tree {
    namespace: Namespace,
    pub(super) engine: Arc<Engine>,
    pub(super) rings: Arc<uring::Engine>,
    pub(super) layer: Option<ObjectLayer>,
    space: Option<Arc<Space>>,
    demoted: Option<Demoted>,
    /// Nodes that have given their glocks up since idle ones were forgotten last.
    retired: AtomicUsize,
    table: Mutex<HashMap<FileId, Weak<Vnode>>>,
    /// Keeps nodes alive, in the order of a clock's hand.
    kept: Mutex<VecDeque<Node>>,
    kept_max: AtomicUsize,
    /// Files whose last opener has gone and whose descriptors are still there.
    idle: Mutex<VecDeque<Weak<Vnode>>>,
    idle_max: usize,
}

impl fmt::Debug for Tree {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tree")
            .field("namespace", &self.namespace)
            .field("nodes", &self.table.lock().len())
            .finish_non_exhaustive()
    }
}

impl Tree {
    pub(crate) fn new(
        namespace: Namespace,
        engine: Arc<Engine>,
        rings: Arc<uring::Engine>,
        layer: Option<ObjectLayer>,
        (space, demoted): (Option<Arc<Space>>, Option<Demoted>),
    ) -> Arc<Self> {
        let kept_max = namespace.kept_max().unwrap_or(KEPT_MAX).min(KEPT_MAX);
        let idle_max = (namespace.descriptors_max() / FILE_DESCRIPTORS).clamp(1, IDLE_MAX);
        Arc::new(Self {
            namespace,
            engine,
            rings,
            layer,
            space,
            demoted,
            retired: AtomicUsize::new(0),
            table: Mutex::new(HashMap::new()),
            kept: Mutex::new(VecDeque::new()),
            kept_max: AtomicUsize::new(kept_max),
            idle: Mutex::new(VecDeque::new()),
            idle_max,
        })
    }

    /// Returns the glocks of this node, if other nodes use the directory too.
    pub(crate) fn space(&self) -> Option<&Arc<Space>> {
        self.space.as_ref()
    }

    /// Asks whether this node may still use the directory.
    pub(super) fn check(&self) -> Result<(), Errno> {
        self.space
            .as_ref()
            .map_or(Ok(()), |space| shared::check(space))
    }

    pub(super) fn shared(self: &Arc<Self>, id: FileId) -> Option<Shared> {
        let space = self.space.as_ref()?;
        let name = shared::name_of(id, self.namespace.root().id());
        let glock = space.glock(name, || {
            Arc::new(InodeDuties::new(Arc::downgrade(self), id))
        });
        Some(Shared {
            id,
            space: Arc::clone(space),
            glock,
        })
    }

    /// Gives up the glock of a node that leaves memory.
    pub(super) fn retire(&self, shared: &Shared) {
        shared.space.retire(&shared.glock);
        // Those that are idle by now.
        if self.retired.fetch_add(1, Ordering::Relaxed) % RETIRED_STEP == RETIRED_STEP - 1 {
            shared.space.reap();
        }
    }

    pub(crate) fn tell_demoted(&self, id: FileId, to: Mode) {
        if let Some(demoted) = &self.demoted {
            demoted(id, to);
        }
    }

    /// Returns the names below the volume's directory.
    pub(crate) fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// Returns the volume's directory.
    pub(crate) fn root(self: &Arc<Self>) -> Node {
        let handle = self.namespace.root();
        self.node_of(handle.id(), || Vnode::new(self, Arc::clone(handle)))
    }

    /// Returns the node of an inode that was just found; the one that is held already, if there is one.
    pub(super) fn node(self: &Arc<Self>, handle: Arc<Handle>, stat: &Stat) -> Node {
        self.node_of(stat.id, || Vnode::new(self, handle))
    }

    /// Returns the node of an inode if it is held.
    pub(crate) fn held(&self, id: FileId) -> Option<Node> {
        self.table.lock().get(&id)?.upgrade().map(Node)
    }

    fn node_of(&self, id: FileId, make: impl FnOnce() -> Vnode) -> Node {
        let node = {
            let mut table = self.table.lock();
            if let Some(held) = table.get(&id).and_then(Weak::upgrade) {
                held.mark_used();
                return Node(held);
            }
            let node = Node(Arc::new(make()));
            table.insert(id, Arc::downgrade(&node.0));
            node
        };
        self.keep(node.clone());
        node
    }

    fn keep(&self, node: Node) {
        let mut dropped = Vec::new();
        {
            let mut kept = self.kept.lock();
            kept.push_back(node);
            for _ in 0..LOOKED_AT_MAX {
                if kept.len() <= self.kept_max.load(Ordering::Relaxed) {
                    break;
                }
                let Some(oldest) = kept.pop_front() else {
                    break;
                };
                // Nobody can find it through the table between this look and the drop below without raising the
                // count first; then it stays out of the list until its last user drops it, which is as good.
                if oldest.0.spend_second_chance() || oldest.is_needed() {
                    kept.push_back(oldest);
                } else {
                    dropped.push(oldest);
                }
            }
        }
        drop(dropped);
    }

    /// Lets go of a node that lost its last name: it lives until its users drop it.
    pub(super) fn forget(&self, node: &Node) {
        let gone = {
            let mut kept = self.kept.lock();
            let at = kept.iter().rposition(|held| held == node);
            at.and_then(|at| kept.remove(at))
        };
        drop(gone);
    }

    /// Takes a dropped node out of the table.
    pub(super) fn dropped(&self, id: FileId) {
        let mut table = self.table.lock();
        // Another node for the same inode may have come meanwhile.
        if table.get(&id).is_some_and(|held| held.strong_count() == 0) {
            table.remove(&id);
        }
    }

    /// Notes a file whose last opener has gone; closes the descriptors of those that went long before.
    pub(super) fn note_idle(&self, node: &Node) {
        let oldest = {
            let mut idle = self.idle.lock();
            idle.push_back(Arc::downgrade(&node.0));
            if idle.len() <= self.idle_max {
                return;
            }
            idle.pop_front()
        };
        if let Some(oldest) = oldest.and_then(|oldest| oldest.upgrade()) {
            oldest.close_idle();
        }
    }

    /// Gives up every descriptor that nobody needs now: when the process has run out of them.
    pub(super) fn relieve(&self) {
        let unused: VecDeque<Node> = {
            let mut kept = self.kept.lock();
            let (needed, unused) = kept.drain(..).partition(Node::is_needed);
            *kept = needed;
            unused
        };
        drop(unused);
        let idle = std::mem::take(&mut *self.idle.lock());
        for vnode in idle.iter().filter_map(Weak::upgrade) {
            vnode.close_idle();
        }
        self.namespace.close_all();
    }

    /// Lets go of all kept nodes: for a volume that closes, after everything is written back.
    pub(crate) fn clear(&self) {
        let kept = std::mem::take(&mut *self.kept.lock());
        drop(kept);
    }

    /// Returns how many nodes are held.
    pub(crate) fn len(&self) -> usize {
        self.table.lock().len()
    }

    #[cfg(test)]
    pub(super) fn set_kept_max(&self, max: usize) {
        self.kept_max.store(max, Ordering::Relaxed);
    }
}
