//! An object that forgets what was not synced.

use std::ops::Range;
use std::sync::Arc;

use parking_lot::Mutex;
use pinfold_base::{Errno, Progress};
use pinfold_mem::{AlignedBuf, Segments};

use super::Seed;
use super::memory::{Content, MemoryObject};
use crate::object::{
    Geometry, Object, Operation, Seek, StoreError, StoreResult, SyncScope, Transfer, wait_for,
};

/// What a device writes in one piece or not at all, in bytes.
const SECTOR: u64 = 512;
/// Bytes moved at a time when contents are copied.
const COPY_BYTES: usize = 1 << 20;

/// What of the changes since the last sync outlives a crash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Survival {
    /// None of them.
    Synced,
    /// Some, as on a disk with a cache below a journalling filesystem: any sectors of any writes, in any
    /// combination; size changes and punches in order up to some point. Reproducible by the seed.
    Some(u64),
    /// All of them.
    All,
}

/// A change that is not durable yet, in the order of completion.
#[derive(Debug, Clone)]
enum Change {
    Write(u64, Vec<u8>),
    SetLen(u64),
    Punch(Range<u64>),
}

/// Keeps changes aside until `sync`, which passes them to the object below. [`crash`](Self::crash) makes an image
/// of what a restart would find.
#[derive(Debug)]
pub struct CrashingObject {
    stable: Arc<dyn Object>,
    volatile: MemoryObject,
    changes: Mutex<Vec<Change>>,
}

impl CrashingObject {
    /// Wraps `stable`, whose content counts as durable.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn new(stable: Arc<dyn Object>) -> StoreResult<Arc<Self>> {
        let content = copy_of(&*stable)?;
        Ok(Arc::new(Self {
            stable,
            volatile: MemoryObject::of(content),
            changes: Mutex::new(Vec::new()),
        }))
    }

    /// Returns how many changes would be lost.
    #[must_use]
    pub fn unsynced(&self) -> usize {
        self.changes.lock().len()
    }

    /// Returns the file as a restart would find it after a crash now. This object goes on as if nothing had
    /// happened, so that many images can be had of one run.
    ///
    /// # Errors
    /// The object below cannot be read.
    pub fn crash(&self, survival: Survival) -> StoreResult<Arc<MemoryObject>> {
        let changes = self.changes.lock();
        let mut image = copy_of(&*self.stable)?;
        let mut seed = match survival {
            Survival::Synced => return Ok(Arc::new(MemoryObject::of(image))),
            Survival::All => None,
            Survival::Some(seed) => Some(Seed::new(seed)),
        };
        // More than enough for all of them when every change goes through the journal.
        let mut ordered = match &mut seed {
            None => u64::MAX,
            Some(seed) => seed.below(changes.len() as u64 + 1),
        };
        for change in changes.iter() {
            // Size changes and punches go through the journal: none outlives one before it.
            let mut journalled = || {
                let lives = ordered > 0;
                ordered = ordered.saturating_sub(1);
                lives
            };
            match change {
                Change::SetLen(len) => {
                    if journalled() {
                        image.set_len(*len);
                    }
                }
                Change::Punch(range) => {
                    if journalled() {
                        let end = range.end.min(image.len());
                        image.zero(range.start.min(end)..end);
                    }
                }
                Change::Write(offset, bytes) => {
                    let end = offset + bytes.len() as u64;
                    if end > image.len() && journalled() {
                        image.set_len(end);
                    }
                    write_sectors(&mut image, *offset, bytes, seed.as_mut());
                }
            }
        }
        Ok(Arc::new(MemoryObject::of(image)))
    }

    /// Passes all changes to the object below.
    fn settle(&self, changes: &[Change]) -> StoreResult<()> {
        for change in changes {
            match change {
                Change::Write(offset, bytes) => {
                    let buf = Arc::new(AlignedBuf::zeroed(bytes.len()));
                    let segments = Segments::of_buf(&buf, bytes.len());
                    segments.copy_from(0, bytes);
                    if let Some(stop) = self.stable.write_wait(*offset, &segments).stop {
                        return Err(stop);
                    }
                }
                Change::SetLen(len) => self.stable.set_len(*len)?,
                Change::Punch(range) => self.stable.punch(range.clone())?,
            }
        }
        Ok(())
    }
}

/// Applies the sectors of a write that `seed` lets live, all of them without one, inside the file's size.
fn write_sectors(image: &mut Content, offset: u64, bytes: &[u8], mut seed: Option<&mut Seed>) {
    let end = (offset + bytes.len() as u64).min(image.len());
    let mut at = offset;
    while at < end {
        let next = (at - at % SECTOR + SECTOR).min(end);
        let lives = seed.as_deref_mut().is_none_or(|seed| seed.below(2) == 0);
        if lives {
            image.write(at, &bytes[(at - offset) as usize..(next - offset) as usize]);
        }
        at = next;
    }
}

/// Reads a whole object.
fn copy_of(object: &dyn Object) -> StoreResult<Content> {
    let len = object.len()?;
    let mut content = Content::default();
    content.set_len(len);
    let buf = Arc::new(AlignedBuf::zeroed(COPY_BYTES));
    let mut at = 0;
    while let Some(data) = object.seek(Seek::Data, at)? {
        let progress = object.read_wait(data, &Segments::of_buf(&buf, COPY_BYTES));
        if let Some(stop) = progress.stop {
            return Err(stop);
        }
        if progress.done == 0 {
            break;
        }
        // Not 32 bits short: a transfer is at most COPY_BYTES long.
        let mut bytes = vec![0; progress.done as usize];
        Segments::of_buf(&buf, bytes.len()).copy_to(0, &mut bytes);
        if content.write(data, &bytes) < bytes.len() {
            return Err(StoreError {
                operation: Operation::Read,
                offset: data,
                len: progress.done,
                errno: Errno::ENOMEM,
            });
        }
        at = data + progress.done;
    }
    Ok(content)
}

impl Object for CrashingObject {
    fn geometry(&self) -> Geometry {
        self.stable.geometry()
    }

    fn readable(&self) -> bool {
        self.stable.readable()
    }

    fn read(&self, batch: Vec<Transfer>) {
        self.volatile.read(batch);
    }

    fn write(&self, batch: Vec<Transfer>) {
        for transfer in batch {
            let (offset, segments) = (transfer.offset, transfer.segments);
            let outcome = {
                // Held across both, so that the list has the order in which the changes happened.
                let mut changes = self.changes.lock();
                let outcome: Progress<StoreError> = wait_for(|done| {
                    self.volatile.write(vec![Transfer {
                        offset,
                        segments: segments.clone(),
                        done,
                    }]);
                });
                if outcome.done > 0 {
                    let mut bytes = vec![0; outcome.done as usize];
                    segments.copy_to(0, &mut bytes);
                    changes.push(Change::Write(offset, bytes));
                }
                outcome
            };
            drop(segments);
            (transfer.done)(outcome);
        }
    }

    fn len(&self) -> StoreResult<u64> {
        self.volatile.len()
    }

    fn set_len(&self, len: u64) -> StoreResult<()> {
        let mut changes = self.changes.lock();
        self.volatile.set_len(len)?;
        changes.push(Change::SetLen(len));
        Ok(())
    }

    fn allocate(&self, range: Range<u64>) -> StoreResult<()> {
        self.stable.allocate(range)
    }

    fn punch(&self, range: Range<u64>) -> StoreResult<()> {
        let mut changes = self.changes.lock();
        self.volatile.punch(range.clone())?;
        changes.push(Change::Punch(range));
        Ok(())
    }

    fn sync(&self, scope: SyncScope) -> StoreResult<()> {
        // Held throughout: what completes during the sync is not part of it.
        let mut changes = self.changes.lock();
        self.settle(&changes)?;
        self.stable.sync(scope)?;
        changes.clear();
        Ok(())
    }

    fn seek(&self, what: Seek, offset: u64) -> StoreResult<Option<u64>> {
        self.volatile.seek(what, offset)
    }
}
