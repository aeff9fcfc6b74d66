//! All mappings of one file: what the cache tells when pages must lose their access.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, RwLock};

use pinfold_cache::ReverseMap;
use smallvec::SmallVec;

use crate::mapping::UserMapping;

/// The mappings of one file.
///
/// A mapping is entered before its first page is installed and leaves after its last address is unmapped, so whoever
/// protects pages under their folio locks misses none.
#[derive(Default)]
pub struct FileMappings {
    list: RwLock<SmallVec<[Arc<UserMapping>; 2]>>,
}

impl fmt::Debug for FileMappings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileMappings")
            .field("count", &self.count())
            .finish()
    }
}

impl FileMappings {
    /// Returns how many mappings the file has.
    #[must_use]
    pub fn count(&self) -> usize {
        self.list
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .len()
    }

    pub(crate) fn enter(&self, mapping: Arc<UserMapping>) {
        // Nothing is allocated or freed under the lock, which faults in signal handlers wait for. Twice as much when it is
        // full: with room for one more each time, many mappings would be copied as often as there are.
        let mut wanted = 1;
        loop {
            let mut larger = SmallVec::with_capacity(wanted);
            let mut list = self.list.write().unwrap_or_else(PoisonError::into_inner);
            if list.len() == list.capacity() && list.len() < larger.capacity() {
                larger.extend(list.drain(..));
                std::mem::swap(&mut *list, &mut larger);
            }
            if list.len() < list.capacity() {
                mapping.listed_at.store(list.len(), Ordering::Relaxed);
                list.push(mapping);
                drop(list);
                return;
            }
            wanted = 2 * list.len() + 1;
        }
    }

    /// Strikes a mapping off the list, if it is there.
    pub(crate) fn leave(&self, mapping: &UserMapping) {
        let gone = {
            let mut list = self.list.write().unwrap_or_else(PoisonError::into_inner);
            let at = mapping.listed_at.load(Ordering::Relaxed);
            let there = list
                .get(at)
                .is_some_and(|there| std::ptr::eq(Arc::as_ptr(there), mapping));
            there.then(|| {
                let gone = list.swap_remove(at);
                if let Some(moved) = list.get(at) {
                    moved.listed_at.store(at, Ordering::Relaxed);
                }
                gone
            })
        };
        // Not under the lock: dropping it unmaps.
        drop(gone);
    }

    /// Tells mappings that the file has grown, or may grow unseen: what was refused beyond its old end may be touched now.
    pub fn grown(&self) {
        self.visit(|mapping| mapping.forgive());
    }

    fn visit_tracked(&self, mut visit: impl FnMut(&UserMapping)) {
        self.visit(|mapping| {
            if mapping.is_tracked() {
                visit(mapping);
            }
        });
    }

    fn visit(&self, visit: impl FnMut(&UserMapping)) {
        let list = self.list.read().unwrap_or_else(PoisonError::into_inner);
        list.iter().map(Arc::as_ref).for_each(visit);
    }
}

impl ReverseMap for FileMappings {
    fn unmap(&self, pages: Range<u64>) {
        self.unmap_runs(std::slice::from_ref(&pages));
    }

    fn cut(&self, pages: Range<u64>) {
        self.visit(|mapping| mapping.drop_copies(&pages));
    }

    fn protect(&self, pages: Range<u64>) {
        self.visit(|mapping| mapping.protect(&pages));
    }

    fn tracks(&self, pages: &Range<u64>) -> bool {
        let mut any = false;
        self.visit_tracked(|mapping| {
            let shown = mapping.map().pages();
            any |= shown.start < pages.end && pages.start < shown.end;
        });
        any
    }

    fn stores(&self, pages: &Range<u64>, found: &mut dyn FnMut(Range<u64>)) {
        self.visit_tracked(|mapping| mapping.stores(pages, found));
    }

    fn seem_stored(&self, pages: &Range<u64>, found: &mut dyn FnMut(Range<u64>)) {
        self.visit_tracked(|mapping| mapping.seem_stored(pages, found));
    }

    fn unmap_runs(&self, runs: &[Range<u64>]) {
        self.visit(|mapping| mapping.unmap_runs(runs, &mut |_| {}));
    }

    fn withdraw(&self, runs: &[Range<u64>], found: &mut dyn FnMut(Range<u64>)) {
        self.visit(|mapping| mapping.withdraw(runs, found));
    }
}
