//! Pages pinned for device I/O (SEMANTICS.md section E).
//!
//! *Owns*: the pin, given back by `Drop`, and its count: acquired equals released when nothing is under way.
//!
//! *Does not own*: the transfer.
//!
//! *Locking*: a pin is a leaf. Whoever holds one takes no lock of classes 1 to 5 until the transfer has ended: truncation,
//! eviction and the move between homes wait for it.

use std::sync::Arc;

use pinfold_base::Errno;
use pinfold_mem::{Access, Frame, Segments};

use crate::CacheError;
use crate::file::FilePages;
use crate::folio::Folio;
use crate::map::{MapOutcome, MapTarget};
use crate::state::PinKind;

/// A page whose memory stays where it is while a device uses it.
#[derive(Debug)]
pub struct PagePin {
    file: Arc<FilePages>,
    page: u64,
    frame: Frame,
    kind: PinKind,
}

impl FilePages {
    /// Brings a page in and pins it; `None` beyond the end. Pinned for writing it is dirty from now on (INV3), and no
    /// write-back makes it clean before the pin is gone. Nothing may be held.
    ///
    /// A pinned page does not move: whoever wants it mapped as well calls [`FilePages::pin_mapped`].
    ///
    /// # Errors
    /// As of [`FilePages::map`]; [`CacheError::TooManyPins`], with nothing changed.
    pub fn pin(self: &Arc<Self>, page: u64, kind: PinKind) -> Result<Option<PagePin>, CacheError> {
        let Some(folio) = self.lock_valid(page)? else {
            return Ok(None);
        };
        if kind == PinKind::Write {
            self.make_dirty(&folio);
        }
        let pin = self.pin_locked(&folio, kind)?;
        drop(folio);
        if kind == PinKind::Write {
            self.note_dirty_file();
        }
        Ok(Some(pin))
    }

    /// As [`FilePages::pin`], and installs the page in a mapping, for stores if it is pinned for writing. It stays
    /// installed as long as it is pinned, unless the program takes it out: eviction passes pinned pages by, and write-back
    /// does not protect those a device writes to.
    ///
    /// # Errors
    /// As of [`FilePages::map`]; [`CacheError::TooManyPins`].
    pub fn pin_mapped(
        self: &Arc<Self>,
        page: u64,
        kind: PinKind,
        target: &dyn MapTarget,
    ) -> Result<Option<PagePin>, CacheError> {
        let access = match kind {
            PinKind::Read => Access::Read,
            PinKind::Write => Access::Write,
        };
        loop {
            if self.map(page, access, page..page + 1, None, target)? == MapOutcome::BeyondEnd {
                return Ok(None);
            }
            let Some(folio) = self.lock_valid(page)? else {
                return Ok(None);
            };
            // Evicted and read again since it was mapped: it has to move once more before it may be pinned.
            if folio.in_window() {
                let pin = self.pin_locked(&folio, kind)?;
                self.install_again(folio, access, target)?;
                return Ok(Some(pin));
            }
        }
    }

    fn pin_locked(
        self: &Arc<Self>,
        folio: &Folio<'_>,
        kind: PinKind,
    ) -> Result<PagePin, CacheError> {
        let (page, frame) = (folio.page(), folio.frame());
        match self.cache().header(frame).state.pin_locked(kind) {
            Ok(_) => {
                self.cache().counters.foll_pin_acquired.bump();
                Ok(PagePin {
                    file: Arc::clone(self),
                    page,
                    frame,
                    kind,
                })
            }
            Err(Errno::ENOMEM) => Err(CacheError::TooManyPins),
            // Valid and locked by us, so nothing else refuses; but an answer is better than a promise.
            Err(_) => Err(CacheError::WouldBlock),
        }
    }
}

impl PagePin {
    /// Returns the page's number.
    #[must_use]
    pub fn page(&self) -> u64 {
        self.page
    }

    /// Returns the library's own address of the page, good while this exists.
    #[must_use]
    pub fn addr(&self) -> *mut u8 {
        self.file.homes().addr(self.frame, self.page)
    }

    /// Makes an empty list for the memory of pages of the same file.
    #[must_use]
    pub fn segments(&self) -> Segments {
        self.file.homes().segments()
    }

    /// Appends bytes `at .. at + len` of the page to a list that [`PagePin::segments`] made.
    ///
    /// # Panics
    /// When the range leaves the page.
    pub fn push(&self, segments: &mut Segments, at: usize, len: usize) {
        let homes = self.file.homes();
        homes.push(segments, self.frame, self.page, at, len);
    }
}

impl Drop for PagePin {
    fn drop(&mut self) {
        let cache = self.file.cache();
        cache.counters.foll_pin_released.bump();
        if cache.header(self.frame).state.unpin(self.kind) {
            cache.wake(self.frame);
        }
    }
}
