//! What all files of a volume share: the cache and the room left in the store.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use pinfold_base::PAGE_SIZE;
use pinfold_cache::Cache;
use pinfold_store::Object;

/// Below this much room a write reserves its space in the store before it is acknowledged.
const ROOM_LOW: u64 = 64 << 20;

/// The shared part of a volume.
pub struct Engine {
    pub(crate) cache: Arc<Cache>,
    /// Whether RLIMIT_FSIZE of this process binds writers.
    pub(crate) file_size_limit: bool,
    room: Room,
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
    pub(crate) fn new(cache: Arc<Cache>, file_size_limit: bool) -> Arc<Self> {
        Arc::new(Self {
            cache,
            file_size_limit,
            room: Room {
                credit: AtomicU64::new(0),
                turn: Mutex::new(()),
            },
        })
    }

    /// Accounts for `bytes` about to be written; tells whether they have to be reserved one by one.
    #[inline]
    pub(crate) fn reserve(&self, bytes: u64, object: &dyn Object) -> Reserve {
        let taken = self
            .room
            .credit
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |credit| {
                credit.checked_sub(bytes)
            });
        if taken.is_ok() {
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
