//! Which pages of a file are dirty, in order: what a write-back walks.
//!
//! Kept as 64-page masks, so that marking neighbours dirty costs one map entry. Masks of pages that are mapped are made
//! ahead and kept when they become empty, so that a first store can be noted where nothing may be allocated. A copy of the set is the TOWRITE tag of
//! SEMANTICS.md section G: pages dirtied after it was taken cannot prolong a sync (G-1).

use std::collections::BTreeMap;
use std::ops::Range;

/// Empty masks kept at most: those of a gigabyte of neighbouring pages.
const SPARE_MAX: usize = 4096;

/// A set of page numbers.
#[derive(Debug, Default, Clone)]
pub struct PageSet {
    masks: BTreeMap<u64, u64>,
    count: usize,
    /// Masks that are empty.
    spare: usize,
    keeps_spare: bool,
}

impl PageSet {
    /// Adds a page; false when it was there.
    pub fn insert(&mut self, page: u64) -> bool {
        if let Some(new) = self.try_insert(page) {
            return new;
        }
        self.masks.insert(page / 64, 1 << (page % 64));
        self.count += 1;
        true
    }

    /// As [`PageSet::insert`]; `None` where that would allocate.
    pub fn try_insert(&mut self, page: u64) -> Option<bool> {
        let mask = self.masks.get_mut(&(page / 64))?;
        let bit = 1 << (page % 64);
        let new = *mask & bit == 0;
        self.spare -= usize::from(*mask == 0);
        *mask |= bit;
        self.count += usize::from(new);
        Some(new)
    }

    /// Makes a later [`PageSet::try_insert`] of the page likely to succeed.
    pub fn prepare(&mut self, page: u64) {
        self.keeps_spare = true;
        if self.masks.contains_key(&(page / 64)) {
            return;
        }
        if self.spare == SPARE_MAX {
            self.masks.retain(|_, mask| *mask != 0);
            self.spare = 0;
        }
        self.masks.insert(page / 64, 0);
        self.spare += 1;
    }

    /// Takes a page out; false when it was not there.
    pub fn remove(&mut self, page: u64) -> bool {
        let Some(mask) = self.masks.get_mut(&(page / 64)) else {
            return false;
        };
        let bit = 1 << (page % 64);
        if *mask & bit == 0 {
            return false;
        }
        *mask &= !bit;
        self.count -= 1;
        if *mask == 0 {
            if self.keeps_spare && self.spare < SPARE_MAX {
                self.spare += 1;
            } else {
                self.masks.remove(&(page / 64));
            }
        }
        true
    }

    /// Returns the number of pages.
    #[must_use]
    pub fn len(&self) -> usize {
        self.count
    }

    /// Tells whether the set is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Returns the lowest page at or after `from`.
    #[must_use]
    pub fn next_from(&self, from: u64) -> Option<u64> {
        self.masks.range(from / 64..).find_map(|(&group, &mask)| {
            let mask = if group == from / 64 {
                mask & (u64::MAX << (from % 64))
            } else {
                mask
            };
            (mask != 0).then(|| group * 64 + u64::from(mask.trailing_zeros()))
        })
    }

    /// Lists the pages of `range`, lowest first, at most `limit`.
    #[must_use]
    pub fn pages_in(&self, range: Range<u64>, limit: usize) -> Vec<u64> {
        let mut pages = Vec::new();
        if range.is_empty() {
            return pages;
        }
        for (&group, &mask) in self.masks.range(range.start / 64..=(range.end - 1) / 64) {
            let mut mask = mask;
            while mask != 0 {
                let page = group * 64 + u64::from(mask.trailing_zeros());
                mask &= mask - 1;
                if range.contains(&page) {
                    if pages.len() == limit {
                        return pages;
                    }
                    pages.push(page);
                }
            }
        }
        pages
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_come_back_in_order_and_within_the_range() {
        let mut set = PageSet::default();
        for page in [200, 3, 64, 63, 1 << 40, 3] {
            set.insert(page);
        }
        assert_eq!(set.len(), 5);
        assert_eq!(set.pages_in(0..u64::MAX, 10), [3, 63, 64, 200, 1 << 40]);
        assert_eq!(set.pages_in(4..200, 10), [63, 64]);
        assert_eq!(set.pages_in(0..300, 2), [3, 63]);
        assert_eq!(set.next_from(65), Some(200));
        assert!(set.remove(63));
        assert!(!set.remove(63));
        assert_eq!(set.next_from(4), Some(64));
        assert!(set.pages_in(5..5, 9).is_empty());
    }

    #[test]
    fn a_page_that_was_prepared_is_noted_without_a_new_mask() {
        let mut set = PageSet::default();
        assert_eq!(set.try_insert(70), None);
        set.prepare(70);
        assert!(set.is_empty() && set.next_from(0).is_none());
        assert_eq!(set.try_insert(70), Some(true));
        assert_eq!(set.try_insert(70), Some(false));
        assert!(set.remove(70));
        assert_eq!(set.try_insert(71), Some(true));
        for page in 0..2 * SPARE_MAX as u64 {
            set.prepare(page * 64);
        }
        assert!(set.masks.len() <= SPARE_MAX + 1);
        assert_eq!(set.pages_in(0..u64::MAX, 10), [71]);
    }
}
