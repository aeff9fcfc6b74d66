//! What all files of a volume share: the cache and the room left in the store.

use pinfold_base::sync::path::{AtomicU64, Ordering};
use std::any::Any;
use std::fmt;
use std::ops::RangeInclusive;
use std::sync::{Arc, OnceLock, Weak};

use pinfold_base::PAGE_SIZE;
use pinfold_base::sync::Mutex;
use pinfold_cache::Cache;
use pinfold_fault::Faults;
use pinfold_mem::Privilege;
use pinfold_mem::forked::Process;
use pinfold_store::{Object, TimeLimit};

use crate::pending::Submitted;

/// Below this much room a write reserves its space in the store before it is acknowledged.
const ROOM_LOW: u64 = 64 << 20;

/// The shared part of a volume.
pub struct Engine {
    pub(crate) cache: Arc<Cache>,
    /// Whether RLIMIT_FSIZE of this process binds writers.
    pub(crate) file_size_limit: bool,
    /// Whether direct writes bring their sources in with the gate blocked.
    pub(crate) faults_disabled_mapping: bool,
    /// Whether a write keeps a weak hold of its file's glock while it brings memory in.
    pub(crate) may_demote: bool,
    room: Room,
    /// How long the store may take, where that is limited.
    pub(crate) time_limit: Option<Arc<TimeLimit>>,
    /// The process it serves; a forked child has its memory and none of its threads.
    pub(crate) process: Process,
    /// Calls that nobody waits for in the calling thread.
    pub(crate) submitted: Arc<Submitted>,
    /// Pages that mappings have pinned.
    pub(crate) pinned_pages: AtomicU64,
    /// How a userfaultfd may be had.
    privileges: RangeInclusive<Privilege>,
    /// Kept by the volume and by mappings, not from here: a thread of its pool may be the last to let go of an inode, and
    /// it cannot wait for itself.
    faults: Mutex<Weak<Faults>>,
    /// The volume, for those who keep it alive.
    volume: OnceLock<Weak<dyn Any + Send + Sync>>,
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine")
            .field("cache", &self.cache)
            .finish_non_exhaustive()
    }
}

/// An estimate of what the store can still take, so that ENOSPC comes from `write` and not first from write-back:
/// cheap while there is plenty, exact when there is not.
#[derive(Debug)]
struct Room {
    /// Bytes that may be written before the store is asked again.
    credit: AtomicU64,
    turn: Mutex<()>,
}

/// Whether a write must reserve its blocks first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reserve {
    /// There is plenty of room.
    Not,
    /// Ask the store to allocate before acknowledging.
    Exactly,
}

impl Engine {
    pub(crate) fn new(
        cache: Arc<Cache>,
        file_size_limit: bool,
        faults_disabled_mapping: bool,
        may_demote: bool,
        privileges: RangeInclusive<Privilege>,
        time_limit: Option<Arc<TimeLimit>>,
    ) -> Arc<Self> {
        Arc::new(Self {
            cache,
            file_size_limit,
            time_limit,
            faults_disabled_mapping,
            may_demote,
            process: Process::current(),
            submitted: Arc::default(),
            pinned_pages: AtomicU64::new(0),
            privileges,
            faults: Mutex::new(Weak::new()),
            volume: OnceLock::new(),
            room: Room {
                credit: AtomicU64::new(0),
                turn: Mutex::new(()),
            },
        })
    }

    /// Returns who serves faults in mappings of the volume's files.
    pub(crate) fn faults(&self) -> Arc<Faults> {
        let mut faults = self.faults.lock();
        faults.upgrade().unwrap_or_else(|| {
            let new = Faults::new(self.privileges.clone());
            *faults = Arc::downgrade(&new);
            new
        })
    }

    /// Names the volume; once.
    pub(crate) fn set_volume(&self, volume: Weak<dyn Any + Send + Sync>) {
        let _ = self.volume.set(volume);
    }

    /// Returns what keeps the volume going; none when it has ended.
    pub(crate) fn volume(&self) -> Option<Arc<dyn Any + Send + Sync>> {
        self.volume.get().and_then(Weak::upgrade)
    }

    /// Accounts for `bytes` about to be written if that needs no asking.
    pub(crate) fn reserve_at_once(&self, bytes: u64) -> bool {
        let take = |credit: u64| credit.checked_sub(bytes);
        self.room
            .credit
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, take)
            .is_ok()
    }

    /// Accounts for `bytes` about to be written; tells whether they have to be reserved one by one.
    #[inline]
    pub(crate) fn reserve(&self, bytes: u64, object: &dyn Object) -> Reserve {
        if self.reserve_at_once(bytes) {
            return Reserve::Not;
        }
        self.ask_for_room(bytes, object)
    }

    #[cold]
    fn ask_for_room(&self, bytes: u64, object: &dyn Object) -> Reserve {
        let _turn = self.room.turn.lock();
        let Some(left) = object.space_left() else {
            // A store that cannot tell cannot reserve either: errseq reports it.
            return Reserve::Not;
        };
        let promised = self.cache.dirty_pages() as u64 * PAGE_SIZE;
        let free = left.saturating_sub(promised);
        if free < ROOM_LOW.saturating_add(bytes.saturating_mul(2)) {
            return Reserve::Exactly;
        }
        // A quarter: others use the same store.
        self.room
            .credit
            .store(free / 4 - bytes.min(free / 4), Ordering::Relaxed);
        Reserve::Not
    }
}
