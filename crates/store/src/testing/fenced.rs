//! An object that compares fencing tokens, as a store does that can put under a condition.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use pinfold_base::{Errno, Progress};
use pinfold_mem::Segments;

use crate::object::{
    Geometry, Object, Operation, Rearrange, Seek, StoreError, StoreResult, SyncScope, Transfer,
};

/// What the store knows of one file: the largest token that any node took up. Each node has an object of its own over the
/// same one of these.
#[derive(Debug, Default)]
pub struct Tokens {
    /// Held while a change is begun: no token is taken up between its comparison and that. An inner object that ends its
    /// transfers before `write` returns is compared with exactly.
    newest: Mutex<u64>,
    refused: AtomicU64,
}

impl Tokens {
    /// Returns the largest token taken up.
    #[must_use]
    pub fn newest(&self) -> u64 {
        *self.newest.lock()
    }

    /// Returns how many changes came under an older one.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }
}

/// One node's way to a file whose store compares tokens. Only changes are compared.
#[derive(Debug)]
pub struct FencedObject {
    inner: Arc<dyn Object>,
    tokens: Arc<Tokens>,
    mine: AtomicU64,
}

impl FencedObject {
    /// Wraps one node's `inner`; `tokens` are the file's.
    #[must_use]
    pub fn new(inner: Arc<dyn Object>, tokens: &Arc<Tokens>) -> Arc<Self> {
        Arc::new(Self {
            inner,
            tokens: Arc::clone(tokens),
            mine: AtomicU64::new(0),
        })
    }

    fn compare<T>(
        &self,
        (operation, offset, len): (Operation, u64, u64),
        change: impl FnOnce() -> T,
    ) -> Result<T, StoreError> {
        let newest = self.tokens.newest.lock();
        if self.mine.load(Ordering::Acquire) >= *newest {
            return Ok(change());
        }
        self.tokens.refused.fetch_add(1, Ordering::Relaxed);
        Err(StoreError {
            operation,
            offset,
            len,
            errno: Errno::ESTALE,
        })
    }

    fn compare_range<T>(
        &self,
        operation: Operation,
        range: &Range<u64>,
        change: impl FnOnce() -> StoreResult<T>,
    ) -> StoreResult<T> {
        let len = range.end.saturating_sub(range.start);
        self.compare((operation, range.start, len), change)?
    }
}

impl Object for FencedObject {
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
        let mut newest = self.tokens.newest.lock();
        if token < *newest {
            return Err(StoreError {
                operation: Operation::TakeUp,
                offset: 0,
                len: 0,
                errno: Errno::ESTALE,
            });
        }
        *newest = token;
        self.mine.store(token, Ordering::Release);
        drop(newest);
        self.inner.take_up(token)
    }

    fn read(&self, batch: Vec<Transfer>) {
        self.inner.read(batch);
    }

    fn write(&self, batch: Vec<Transfer>) {
        for transfer in batch {
            let at = transfer.offset;
            let len = transfer.segments.bytes() as u64;
            let mut waiting = Some(transfer);
            let compared = self.compare((Operation::Write, at, len), || {
                self.inner.write(waiting.take().into_iter().collect());
            });
            if let (Err(error), Some(transfer)) = (compared, waiting) {
                (transfer.done)(Progress::stopped(0, error));
            }
        }
    }

    fn write_wait(&self, offset: u64, segments: &Segments) -> Progress<StoreError> {
        let range = (Operation::Write, offset, segments.bytes() as u64);
        self.compare(range, || self.inner.write_wait(offset, segments))
            .unwrap_or_else(|error| Progress::stopped(0, error))
    }

    fn len(&self) -> StoreResult<u64> {
        self.inner.len()
    }

    fn set_len(&self, len: u64) -> StoreResult<()> {
        self.compare((Operation::SetLen, len, 0), || self.inner.set_len(len))?
    }

    fn allocate(&self, range: Range<u64>) -> StoreResult<()> {
        self.compare_range(Operation::Allocate, &range, || {
            self.inner.allocate(range.clone())
        })
    }

    fn punch(&self, range: Range<u64>) -> StoreResult<()> {
        self.compare_range(Operation::Punch, &range, || self.inner.punch(range.clone()))
    }

    fn rearrange(&self, how: Rearrange, range: Range<u64>) -> StoreResult<()> {
        self.compare_range(Operation::Punch, &range, || {
            self.inner.rearrange(how, range.clone())
        })
    }

    fn space_left(&self) -> Option<u64> {
        self.inner.space_left()
    }

    fn sync(&self, scope: SyncScope) -> StoreResult<()> {
        self.inner.sync(scope)
    }

    fn seek(&self, what: Seek, offset: u64) -> StoreResult<Option<u64>> {
        self.inner.seek(what, offset)
    }
}
