//! Which changes of a stored file are our own.
//!
//! Everything the engine does to a stored file moves its times. To tell that from somebody else's change, the file's
//! object is wrapped in one that notes when a change of ours begins and ends; what [`Watch::settle`] records when
//! nothing is under way is what the store must still say later, if nobody else was there.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use pinfold_base::Progress;
use pinfold_mem::Segments;
use pinfold_mem::uring::Attended;
use pinfold_store::{
    Geometry, Object, Rearrange, Seek, StoreError, StoreResult, SyncScope, Transfer,
};

/// Counts our own changes of one stored file.
#[derive(Debug, Default)]
pub(super) struct Watch {
    begun: AtomicU64,
    ended: AtomicU64,
    /// The count of changes ended when the stored times were last put right.
    settled: AtomicU64,
}

/// A moment at which no change of ours was under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Quiet(u64);

impl Watch {
    fn begin(self: &Arc<Self>) -> Change {
        self.begun.fetch_add(1, Ordering::AcqRel);
        Change(Arc::clone(self))
    }

    /// Returns the moment if no change is under way; ask before looking at the stored file, compare after.
    pub(super) fn quiet(&self) -> Option<Quiet> {
        // In this order: a change that begins in between makes the numbers differ, or ends within `ended`.
        let ended = self.ended.load(Ordering::Acquire);
        let begun = self.begun.load(Ordering::Acquire);
        (begun == ended).then_some(Quiet(ended))
    }

    /// Notes that what the stored file says at `moment` has been recorded.
    pub(super) fn settle(&self, moment: Quiet) {
        self.settled.fetch_max(moment.0, Ordering::AcqRel);
    }

    /// Tells whether the stored file can have changed since it was recorded by somebody else's doing only: no
    /// change of ours since, none under way now, and none since `moment`.
    pub(super) fn is_settled(&self, moment: Quiet) -> bool {
        self.settled.load(Ordering::Acquire) == moment.0 && self.quiet() == Some(moment)
    }
}

/// A change of ours under way.
struct Change(Arc<Watch>);

impl Drop for Change {
    fn drop(&mut self) {
        self.0.ended.fetch_add(1, Ordering::AcqRel);
    }
}

/// An object whose changes are noted.
#[derive(Debug)]
pub(super) struct Watched {
    inner: Arc<dyn Object>,
    watch: Arc<Watch>,
}

impl Watched {
    pub(super) fn new(inner: Arc<dyn Object>, watch: Arc<Watch>) -> Self {
        Self { inner, watch }
    }
}

impl Object for Watched {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn readable(&self) -> bool {
        self.inner.readable()
    }

    fn take_up(&self, token: u64) -> StoreResult<()> {
        self.inner.take_up(token)
    }

    fn read(&self, batch: Vec<Transfer>) {
        self.inner.read(batch);
    }

    fn write(&self, batch: Vec<Transfer>) {
        let noted = batch.into_iter().map(|transfer| {
            let change = self.watch.begin();
            let done = transfer.done;
            Transfer {
                offset: transfer.offset,
                segments: transfer.segments,
                done: Box::new(move |outcome| {
                    // Ended before the completion tells anybody: who is told may ask at once.
                    drop(change);
                    done(outcome);
                }),
            }
        });
        self.inner.write(noted.collect());
    }

    fn read_attended(&self, transfer: Transfer) -> Option<Arc<Attended>> {
        self.inner.read_attended(transfer)
    }

    fn read_wait(&self, offset: u64, segments: &Segments) -> Progress<StoreError> {
        self.inner.read_wait(offset, segments)
    }

    fn read_here(&self, offset: u64, segments: &Segments) -> Option<Progress<StoreError>> {
        self.inner.read_here(offset, segments)
    }

    fn write_wait(&self, offset: u64, segments: &Segments) -> Progress<StoreError> {
        let _change = self.watch.begin();
        self.inner.write_wait(offset, segments)
    }

    fn write_bound(&self, offset: u64, segments: &Segments) -> Progress<StoreError> {
        let _change = self.watch.begin();
        self.inner.write_bound(offset, segments)
    }

    fn len(&self) -> StoreResult<u64> {
        self.inner.len()
    }

    fn set_len(&self, len: u64) -> StoreResult<()> {
        let _change = self.watch.begin();
        self.inner.set_len(len)
    }

    fn allocate(&self, range: Range<u64>) -> StoreResult<()> {
        let _change = self.watch.begin();
        self.inner.allocate(range)
    }

    fn punch(&self, range: Range<u64>) -> StoreResult<()> {
        let _change = self.watch.begin();
        self.inner.punch(range)
    }

    fn rearrange(&self, how: Rearrange, range: Range<u64>) -> StoreResult<()> {
        let _change = self.watch.begin();
        self.inner.rearrange(how, range)
    }

    fn space_left(&self) -> Option<u64> {
        self.inner.space_left()
    }

    fn sync(&self, scope: SyncScope) -> StoreResult<()> {
        // No change: everything it makes durable was noted when it was written.
        self.inner.sync(scope)
    }

    fn seek(&self, what: Seek, offset: u64) -> StoreResult<Option<u64>> {
        self.inner.seek(what, offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_unsettles_until_it_is_recorded() {
        let watch = Arc::new(Watch::default());
        let before = watch.quiet().unwrap();
        assert!(watch.is_settled(before));
        let change = watch.begin();
        assert_eq!(watch.quiet(), None);
        assert!(!watch.is_settled(before), "under way");
        drop(change);
        let after = watch.quiet().unwrap();
        assert!(!watch.is_settled(after), "not recorded yet");
        watch.settle(after);
        assert!(watch.is_settled(after));
        assert!(!watch.is_settled(before), "asked too early");
    }
}
