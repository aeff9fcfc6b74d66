//! Pages on their way to the store.
//!
//! *Owns*: that a transfer's end is told to its pages and to its pass, once, also by a store that never tells it.
//!
//! *Does not own*: what becomes of the pages then ([`FilePages::end_write_back`]).
//!
//! *Locking*: runs in completions, which take leaves only.

use std::sync::Arc;

use pinfold_base::{Errno, PAGE_SIZE, Progress};
use pinfold_mem::Frame;
use pinfold_store::{Operation, StoreError};

use super::Pass;
use crate::file::FilePages;

/// Neighbouring pages in WRITEBACK with a transfer of their own. Dropped before that has told its end, as by a store that
/// panics, they were not stored, and nobody waits for them for ever.
pub(super) struct Storing {
    /// `None` once the end was told.
    under_way: Option<(Arc<FilePages>, Arc<Pass>)>,
    start: u64,
    frames: Vec<Frame>,
    bytes: u64,
}

impl Storing {
    pub(super) fn new(
        file: &Arc<FilePages>,
        pass: &Arc<Pass>,
        start: u64,
        frames: Vec<Frame>,
        bytes: usize,
    ) -> Self {
        Self {
            under_way: Some((Arc::clone(file), Arc::clone(pass))),
            start,
            frames,
            bytes: bytes as u64,
        }
    }

    pub(super) fn end(mut self, outcome: Progress<StoreError>) {
        self.tell(outcome);
    }

    fn tell(&mut self, outcome: Progress<StoreError>) {
        let Some((file, pass)) = self.under_way.take() else {
            return;
        };
        let outcome = nothing_missing(outcome, self.start * PAGE_SIZE, self.bytes);
        file.end_write_back(self.start, &self.frames, &outcome);
        // The pass may be all that its waiter needs: let go of the file first.
        drop(file);
        pass.end(outcome.stop);
    }
}

impl Drop for Storing {
    fn drop(&mut self) {
        self.tell(Progress::complete(0));
    }
}

/// Makes an error of a transfer that ended short without a reason: what was not taken is not stored.
fn nothing_missing(outcome: Progress<StoreError>, offset: u64, bytes: u64) -> Progress<StoreError> {
    if outcome.stop.is_some() || outcome.done >= bytes {
        return outcome;
    }
    Progress::stopped(
        outcome.done,
        StoreError {
            operation: Operation::Write,
            offset: offset + outcome.done,
            len: bytes - outcome.done,
            errno: Errno::EIO,
        },
    )
}
