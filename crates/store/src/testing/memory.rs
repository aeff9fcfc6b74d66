//! A file in memory.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use parking_lot::Mutex;
use pinfold_base::units::FILE_SIZE_MAX;
use pinfold_base::{Errno, PAGE_SIZE, Progress, page_span};
use pinfold_mem::Segments;

use crate::object::{
    Geometry, Object, Operation, Seek, StoreError, StoreResult, SyncScope, Transfer,
};

const PAGE: usize = PAGE_SIZE as usize;
/// Pages one object may hold: 1 GiB; a write beyond that is `ENOSPC`.
const PAGES_MAX: usize = 1 << 18;

/// A sparse file in memory; transfers complete before `read` or `write` returns. Clones are independent copies.
#[derive(Debug, Default)]
pub struct MemoryObject {
    content: Mutex<Content>,
}

/// What the file holds: a page that is absent reads as zeros.
#[derive(Debug, Default, Clone)]
pub(super) struct Content {
    pages: BTreeMap<u64, Box<[u8]>>,
    len: u64,
}

impl Content {
    pub fn len(&self) -> u64 {
        self.len
    }

    pub fn read(&self, offset: u64, into: &mut [u8]) -> usize {
        let have = self.len.saturating_sub(offset).min(into.len() as u64) as usize;
        let mut at = 0;
        while at < have {
            let (page, in_page) = place(offset + at as u64);
            let n = (PAGE - in_page).min(have - at);
            match self.pages.get(&page) {
                Some(bytes) => into[at..at + n].copy_from_slice(&bytes[in_page..in_page + n]),
                None => into[at..at + n].fill(0),
            }
            at += n;
        }
        have
    }

    /// Writes and grows; returns the bytes written, fewer when [`PAGES_MAX`] pages are held.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> usize {
        let mut at = 0;
        while at < bytes.len() {
            let (page, in_page) = place(offset + at as u64);
            let n = (PAGE - in_page).min(bytes.len() - at);
            if self.pages.len() >= PAGES_MAX && !self.pages.contains_key(&page) {
                break;
            }
            let into = self
                .pages
                .entry(page)
                .or_insert_with(|| vec![0; PAGE].into());
            into[in_page..in_page + n].copy_from_slice(&bytes[at..at + n]);
            at += n;
        }
        if at > 0 {
            self.len = self.len.max(offset + at as u64);
        }
        at
    }

    pub fn set_len(&mut self, len: u64) {
        if len < self.len {
            self.zero(len..self.len);
        }
        self.len = len;
    }

    pub fn zero(&mut self, range: Range<u64>) {
        for page in page_span(range.start, range.end.saturating_sub(range.start)) {
            let start = page * PAGE_SIZE;
            let from = range.start.saturating_sub(start).min(PAGE_SIZE) as usize;
            let to = (range.end - start).min(PAGE_SIZE) as usize;
            if (from, to) == (0, PAGE) {
                self.pages.remove(&page);
            } else if let Some(bytes) = self.pages.get_mut(&page) {
                bytes[from..to].fill(0);
            }
        }
    }

    fn seek(&self, what: Seek, offset: u64) -> Option<u64> {
        if offset >= self.len {
            return None;
        }
        let mut hole = offset / PAGE_SIZE;
        let found = match what {
            Seek::Data => self.pages.range(hole..).next().map(|(&page, _)| page)?,
            Seek::Hole => {
                for (&page, _) in self.pages.range(hole..) {
                    if page != hole {
                        break;
                    }
                    hole += 1;
                }
                return Some((hole * PAGE_SIZE).max(offset).min(self.len));
            }
        };
        Some((found * PAGE_SIZE).max(offset)).filter(|&at| at < self.len)
    }
}

fn place(offset: u64) -> (u64, usize) {
    (offset / PAGE_SIZE, (offset % PAGE_SIZE) as usize)
}

impl Clone for MemoryObject {
    fn clone(&self) -> Self {
        Self::of(self.content.lock().clone())
    }
}

impl MemoryObject {
    /// Makes an empty file.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// Makes a file that holds `bytes`.
    #[must_use]
    pub fn with(bytes: &[u8]) -> Arc<Self> {
        let mut content = Content::default();
        content.write(0, bytes);
        Arc::new(Self::of(content))
    }

    pub(super) fn of(content: Content) -> Self {
        Self {
            content: Mutex::new(content),
        }
    }

    /// Returns all bytes.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        let content = self.content.lock();
        let mut bytes = vec![0; content.len as usize];
        content.read(0, &mut bytes);
        bytes
    }

    fn read_one(&self, offset: u64, segments: &Segments) -> Progress<StoreError> {
        let mut bytes = vec![0; segments.bytes()];
        let n = self.content.lock().read(offset, &mut bytes);
        segments.copy_from(0, &bytes[..n]);
        Progress::complete(n as u64)
    }

    fn write_one(&self, offset: u64, segments: &Segments) -> Progress<StoreError> {
        let bytes = segments.to_vec();
        let refuse = |errno| StoreError {
            operation: Operation::Write,
            offset,
            len: bytes.len() as u64,
            errno,
        };
        let end = offset.checked_add(bytes.len() as u64);
        if end.is_none_or(|end| end > FILE_SIZE_MAX) {
            return Progress::stopped(0, refuse(Errno::EFBIG));
        }
        let n = self.content.lock().write(offset, &bytes);
        if n < bytes.len() {
            return Progress::stopped(n as u64, refuse(Errno::ENOSPC));
        }
        Progress::complete(n as u64)
    }
}

impl Object for MemoryObject {
    fn geometry(&self) -> Geometry {
        Geometry {
            block: 1,
            memory: 1,
            transfer_best: 1 << 20,
            direct: true,
        }
    }

    fn read(&self, batch: Vec<Transfer>) {
        for transfer in batch {
            let outcome = self.read_one(transfer.offset, &transfer.segments);
            drop(transfer.segments);
            (transfer.done)(outcome);
        }
    }

    fn read_here(&self, offset: u64, segments: &Segments) -> Option<Progress<StoreError>> {
        let content = self.content.try_lock()?;
        let [span] = segments.spans() else {
            return None;
        };
        let have = content.len.saturating_sub(offset).min(span.len() as u64) as usize;
        let mut at = 0;
        while at < have {
            let (page, in_page) = place(offset + at as u64);
            let n = (PAGE - in_page).min(have - at);
            match content.pages.get(&page) {
                Some(bytes) => span.copy_from(at, &bytes[in_page..in_page + n]),
                None => span.copy_from(at, &[0; PAGE][..n]),
            };
            at += n;
        }
        Some(Progress::complete(have as u64))
    }

    fn write(&self, batch: Vec<Transfer>) {
        for transfer in batch {
            let outcome = self.write_one(transfer.offset, &transfer.segments);
            drop(transfer.segments);
            (transfer.done)(outcome);
        }
    }

    fn len(&self) -> StoreResult<u64> {
        Ok(self.content.lock().len)
    }

    fn set_len(&self, len: u64) -> StoreResult<()> {
        if len > FILE_SIZE_MAX {
            return Err(StoreError {
                operation: Operation::SetLen,
                offset: len,
                len: 0,
                errno: Errno::EFBIG,
            });
        }
        self.content.lock().set_len(len);
        Ok(())
    }

    fn allocate(&self, _range: Range<u64>) -> StoreResult<()> {
        Ok(())
    }

    fn punch(&self, range: Range<u64>) -> StoreResult<()> {
        let mut content = self.content.lock();
        let end = range.end.min(content.len);
        content.zero(range.start.min(end)..end);
        Ok(())
    }

    fn sync(&self, _scope: SyncScope) -> StoreResult<()> {
        Ok(())
    }

    fn seek(&self, what: Seek, offset: u64) -> StoreResult<Option<u64>> {
        Ok(self.content.lock().seek(what, offset))
    }
}
