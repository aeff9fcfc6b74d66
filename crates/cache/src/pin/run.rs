//! Neighbouring pages pinned together for one transfer.
//!
//! *Owns*: what a large transfer pays once and not a page: the file's reference, the counts, the waits for memory that looking up
//! pages takes, which are hashed apart.
//!
//! *Does not own*: what pins a page (the module above).
//!
//! *Locking*: as of any pin for a transfer: a leaf.

use std::ops::Range;
use std::panic::Location;
use std::sync::Arc;

use pinfold_base::PAGE_SIZE;
use pinfold_mem::copy::prefetch_line;
use pinfold_mem::{Frame, Segments};
use smallvec::SmallVec;

use super::sites::Note;
use super::{PinRefusal, PinSite};
use crate::file::FilePages;
use crate::state::PinKind;

/// Pages that are looked up ahead of their pins.
const AHEAD: usize = 16;
const PAGE: usize = PAGE_SIZE as usize;

/// Pages from one on whose memory stays where it is while a device uses it. Dropping it gives all pins back.
#[derive(Debug)]
pub struct PinnedRun {
    file: Arc<FilePages>,
    first: u64,
    kind: PinKind,
    /// One a page, in order, with what debug builds note of it.
    pinned: Vec<(Frame, Note)>,
}

impl FilePages {
    /// Pins pages for one transfer, from the first on, as far as each is there, valid and, to be written to, dirty; tells why
    /// it ended before the range did. Waits for nobody and takes no lock of classes 1 to 5; whoever holds the pins takes none
    /// either.
    #[track_caller]
    pub fn try_pin_run(
        self: &Arc<Self>,
        pages: Range<u64>,
        kind: PinKind,
    ) -> (PinnedRun, Option<PinRefusal>) {
        let place = Location::caller();
        let count = usize::try_from(pages.end.saturating_sub(pages.start)).unwrap_or(0);
        let mut run = PinnedRun {
            file: Arc::clone(self),
            first: pages.start,
            kind,
            pinned: Vec::with_capacity(count),
        };
        let cache = self.cache();
        let mut refusal = None;
        let mut next = pages.start;
        while next < pages.end && refusal.is_none() {
            let end = pages.end.min(next + AHEAD as u64);
            let guesses = self.guess(next..end);
            for (page, guess) in (next..end).zip(guesses) {
                let guessed = guess.map(|frame| self.pin_frame(frame, page, kind));
                let pinned = match guessed {
                    Some(Ok(true)) => Ok(guess),
                    Some(Err(refused)) => Err(refused),
                    Some(Ok(false)) | None => self.find_and_pin(page, kind).map(Some),
                };
                match pinned {
                    Ok(Some(frame)) => {
                        let note = cache.pin_sites.add(PinSite { page, kind, place });
                        run.pinned.push((frame, note));
                    }
                    Ok(None) => refusal = Some(PinRefusal::Cold),
                    Err(refused) => refusal = Some(refused),
                }
                if refusal.is_some() {
                    break;
                }
            }
            next = end;
        }
        cache
            .counters
            .foll_pin_acquired
            .add(run.pinned.len() as u64);
        (run, refusal)
    }

    /// Names the frames that probably hold some pages, their headers on the way to the processor.
    fn guess(&self, pages: Range<u64>) -> SmallVec<[Option<Frame>; AHEAD]> {
        let cache = self.cache();
        let hash = |page| self.key(page).hash();
        for page in pages.clone() {
            cache.index.prefetch(hash(page));
        }
        pages
            .map(|page| {
                let frame = cache.index.candidates(hash(page)).next()?;
                prefetch_line(&raw const *cache.header(frame));
                Some(frame)
            })
            .collect()
    }
}

impl PinnedRun {
    /// Appends bytes of the pages to a list that [`FilePages::segments`] of their file made: `len` from byte `at` of the
    /// first on, as far as there are pages. `at` lies in the first page.
    pub fn push(&self, segments: &mut Segments, at: usize, len: usize) {
        let homes = self.file.homes();
        let (mut at, mut left) = (at, len);
        for (page, &(frame, _)) in (self.first..).zip(&self.pinned) {
            let bytes = left.min(PAGE - at);
            if bytes == 0 {
                return;
            }
            homes.push(segments, frame, page, at, bytes);
            left -= bytes;
            at = 0;
        }
    }
}

impl Drop for PinnedRun {
    fn drop(&mut self) {
        let cache = self.file.cache();
        // Counted first: who is woken by the last pin finds the counts equal.
        cache
            .counters
            .foll_pin_released
            .add(self.pinned.len() as u64);
        for (frame, note) in &self.pinned {
            cache.pin_sites.remove(note);
            if cache.header(*frame).state.unpin(self.kind) {
                cache.wake(*frame);
            }
        }
    }
}
