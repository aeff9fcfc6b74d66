//! Where a file has bytes: the records of FS_IOC_FIEMAP, stored in the caller's memory.
//!
//! *Owns*: the records, and that each is stored whole or not at all: a call that meets memory nobody can access starts no
//! record over for ever (T08), and one whose memory is mapped from the file itself stores with nothing held (T24).
//!
//! *Does not own*: what the store has ([`Object::seek`](pinfold_store::Object::seek)), what is dirty (the cache).
//!
//! *Locking*: nothing is held while records are stored. The file may change meanwhile: what is told was so once.

use std::ops::Range;

use pinfold_base::PAGE_SIZE;
use pinfold_cache::Harvest;
use pinfold_lock::Mode;
use pinfold_mem::IovCursor;
use pinfold_store::Seek;

use crate::error::{Error, Result};
use crate::file::File;
use crate::io::{bad_buffer, copy_waiting};

/// Size of a record, in bytes: `struct fiemap_extent` of `<linux/fiemap.h>`.
///
/// Offset and length in bytes are its words 0 and 2; its flags are the 32 bits from byte 40 on; all else is 0.
pub const EXTENT_RECORD: usize = 56;
/// Nothing follows in the file.
const LAST: u32 = 1;
/// Where it is stored is not told.
const UNKNOWN: u32 = 2;
/// Waits to be stored.
const DELALLOC: u32 = 4;
const OPERATION: &str = "list the extents of";

/// What [`File::extents`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extents {
    /// Records that were stored.
    pub records: usize,
    /// There is more in the range than there was room for.
    pub more: bool,
}

/// Bytes of a file that are not a hole.
struct Extent {
    bytes: Range<u64>,
    dirty: bool,
}

impl Extent {
    fn record(&self, last: bool) -> [u8; EXTENT_RECORD] {
        let mut flags = UNKNOWN;
        if self.dirty {
            flags |= DELALLOC;
        }
        if last {
            flags |= LAST;
        }
        let mut record = [0; EXTENT_RECORD];
        record[0..8].copy_from_slice(&self.bytes.start.to_ne_bytes());
        let len = self.bytes.end - self.bytes.start;
        record[16..24].copy_from_slice(&len.to_ne_bytes());
        record[40..44].copy_from_slice(&flags.to_ne_bytes());
        record
    }
}

impl File {
    /// Stores a record of [`EXTENT_RECORD`] bytes for each extent of `range` that is not a hole, in order, as many as fit
    /// into what the cursor names. One that `range` begins in is told from there on; the last may reach past its end. What
    /// waits to be stored is told as such (FIEMAP_EXTENT_DELALLOC).
    ///
    /// # Errors
    /// `EFAULT` when a record cannot be stored as a whole, `EINVAL` for a range that is none, the store's errors.
    pub fn extents(&self, range: Range<u64>, into: &mut IovCursor<'_>) -> Result<Extents> {
        if range.start > range.end {
            return Err(Error::invalid(OPERATION, pinfold_base::Errno::EINVAL));
        }
        let _quiet = self.enter(OPERATION)?;
        let pages = self.inode().pages();
        let concerned = range.start / PAGE_SIZE..range.end.div_ceil(PAGE_SIZE);
        pages.harvest(concerned, Harvest::Wait);
        let asked = into.count();
        let room = asked / EXTENT_RECORD;
        let mut found = Extents {
            records: 0,
            more: false,
        };
        let mut next = self.extent_at_or_after(range.start)?;
        while let Some(extent) = next.filter(|extent| extent.bytes.start < range.end) {
            if found.records == room {
                found.more = true;
                break;
            }
            next = self.extent_at_or_after(extent.bytes.end)?;
            let mut record = extent.record(next.is_none());
            if copy_waiting(into, &mut record) < EXTENT_RECORD {
                return Err(bad_buffer(OPERATION, range.start, asked));
            }
            found.records += 1;
        }
        Ok(found)
    }

    /// Returns the extent that holds the byte at `offset`, from there on, or else the first behind it.
    fn extent_at_or_after(&self, mut offset: u64) -> Result<Option<Extent>> {
        let inode = self.inode();
        // Let go before a record is stored (H-11).
        let _held = inode.hold_uncached(OPERATION, Mode::Shared, false)?;
        let len = inode.len();
        let seek = |what, from| {
            let found = inode.object().seek(what, from);
            found.map_err(|error| Error::store(OPERATION, error))
        };
        let pages = inode.pages();
        while offset < len {
            let page = offset / PAGE_SIZE;
            let dirty = pages.next_known_dirty(page).unwrap_or(u64::MAX);
            if dirty == page {
                let clean = (page + 1..).find(|&page| !pages.is_known_dirty(page));
                let end = clean.map_or(len, |page| page.saturating_mul(PAGE_SIZE));
                return Ok(Some(Extent {
                    bytes: offset..end.min(len),
                    dirty: true,
                }));
            }
            let dirty = dirty.saturating_mul(PAGE_SIZE).min(len);
            if let Some(data) = seek(Seek::Data, offset)?.filter(|&data| data < dirty) {
                let data = data.max(offset);
                let hole = seek(Seek::Hole, data)?.unwrap_or(len);
                return Ok(Some(Extent {
                    bytes: data..hole.clamp(data + 1, dirty),
                    dirty: false,
                }));
            }
            // Nothing is stored before it. It may have been stored since: then the store has it at the next look.
            offset = dirty;
        }
        Ok(None)
    }
}
