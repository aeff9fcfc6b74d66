//! Which pages of a file are dirty, in order: what a write-back walks; and which are being written, or may be stored to
//! without notice.
//!
//! Kept as 64-page masks, so that marking neighbours costs no entry of its own. A copy of the list is the TOWRITE tag of
//! SEMANTICS.md section G: pages dirtied after it was taken cannot prolong a sync (G-1).
//!
//! *Owns*: the masks of all three, in one treap whose nodes lie in one array. With room in it ([`Roomy`]) noting a page
//! allocates nothing; a page that is noted as one thing has room to be noted as another; taking one out frees nothing.
//! First stores are noted in signal handlers, under the lock that guards this.
//!
//! *Does not own*: the lock. *Locking*: none.

use std::ops::Range;

use pinfold_base::roomy::Roomy;

/// No node: links stay below.
const NONE: u32 = u32::MAX;

/// What a page is noted as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Note {
    /// Waits to be stored.
    Dirty,
    /// Is being stored.
    Writing,
    /// May be stored to without notice.
    Tracked,
}

impl Note {
    const COUNT: usize = 3;
}

/// Pages `64 * group ..`, by what they are noted as.
#[derive(Debug, Clone, Copy)]
struct Node {
    group: u64,
    masks: [u64; Note::COUNT],
    /// The subtree of lower groups; for a node that is not in use, the next such.
    left: u32,
    right: u32,
}

/// Sets of page numbers.
#[derive(Debug, Clone)]
pub struct PageSets {
    nodes: Vec<Node>,
    root: u32,
    /// Nodes in the array that are not in use.
    unused: u32,
    unused_count: usize,
    counts: [usize; Note::COUNT],
}

impl Default for PageSets {
    fn default() -> Self {
        Self {
            nodes: Vec::new(),
            root: NONE,
            unused: NONE,
            unused_count: 0,
            counts: [0; Note::COUNT],
        }
    }
}

impl Roomy for PageSets {
    fn entries(&self) -> usize {
        self.nodes.len() - self.unused_count
    }

    fn has_room(&self) -> bool {
        self.spare() > 0
    }

    fn with_room(entries: usize) -> Self {
        Self {
            nodes: Vec::with_capacity(entries),
            ..Self::default()
        }
    }

    fn take_entries(&mut self, from: &mut Self) {
        self.nodes.clear();
        self.nodes.append(&mut from.nodes);
        (self.root, self.unused) = (from.root, from.unused);
        (self.unused_count, self.counts) = (from.unused_count, from.counts);
        (from.root, from.unused, from.unused_count) = (NONE, NONE, 0);
        from.counts = [0; Note::COUNT];
    }
}

impl PageSets {
    /// Notes a page; false when it was noted as that.
    pub fn insert(&mut self, note: Note, page: u64) -> bool {
        let (group, bit) = (page / 64, 1 << (page % 64));
        let at = match self.find(group) {
            Some(at) => at,
            None => {
                let new = self.node(group);
                self.root = self.link(self.root, new);
                new
            }
        };
        let mask = &mut self.nodes[at as usize].masks[note as usize];
        let new = *mask & bit == 0;
        *mask |= bit;
        self.counts[note as usize] += usize::from(new);
        new
    }

    /// As [`PageSets::insert`]; `None` where that would allocate.
    pub fn try_insert(&mut self, note: Note, page: u64) -> Option<bool> {
        let fits = self.spare() > 0 || self.find(page / 64).is_some();
        fits.then(|| self.insert(note, page))
    }

    /// Notes a page as that no more; false when it was not.
    pub fn remove(&mut self, note: Note, page: u64) -> bool {
        self.replace(note, page, None)
    }

    /// Notes a page as `new` and no more as `old`; false when it was not noted as `old`, and nothing changes then.
    /// Allocates nothing.
    pub fn change(&mut self, old: Note, new: Note, page: u64) -> bool {
        self.replace(old, page, Some(new))
    }

    fn replace(&mut self, old: Note, page: u64, new: Option<Note>) -> bool {
        let (group, bit) = (page / 64, 1u64 << (page % 64));
        let Some(at) = self.find(group) else {
            return false;
        };
        let masks = &mut self.nodes[at as usize].masks;
        if masks[old as usize] & bit == 0 {
            return false;
        }
        masks[old as usize] &= !bit;
        self.counts[old as usize] -= 1;
        if let Some(new) = new {
            self.counts[new as usize] += usize::from(masks[new as usize] & bit == 0);
            masks[new as usize] |= bit;
        }
        if *masks == [0; Note::COUNT] {
            self.root = self.unlink(self.root, group);
            self.nodes[at as usize].left = self.unused;
            self.unused = at;
            self.unused_count += 1;
        }
        true
    }

    /// Tells whether a page is noted as that.
    #[must_use]
    pub fn contains(&self, note: Note, page: u64) -> bool {
        self.find(page / 64)
            .is_some_and(|at| self.nodes[at as usize].masks[note as usize] & 1 << (page % 64) != 0)
    }

    /// Returns the number of pages noted as that.
    #[must_use]
    pub fn len(&self, note: Note) -> usize {
        self.counts[note as usize]
    }

    /// Tells whether no page is noted as that.
    #[must_use]
    pub fn is_empty(&self, note: Note) -> bool {
        self.len(note) == 0
    }

    /// Returns how many groups there is room for beside those that are there.
    #[must_use]
    pub fn spare(&self) -> usize {
        self.unused_count + self.nodes.capacity() - self.nodes.len()
    }

    /// Returns the lowest page at or after `from`.
    #[must_use]
    pub fn next_from(&self, note: Note, from: u64) -> Option<u64> {
        let mut first = None;
        self.each_in(note, from..u64::MAX, &mut |page| {
            first = Some(page);
            false
        });
        first
    }

    /// Shows the pages of `range`, lowest first, until `show` returns false.
    pub fn each_in(&self, note: Note, range: Range<u64>, show: &mut dyn FnMut(u64) -> bool) {
        if range.is_empty() || self.is_empty(note) {
            return;
        }
        let mut next = Some(range.start / 64);
        while let Some(node) = next.and_then(|group| self.at_or_after(group)) {
            if node.group > (range.end - 1) / 64 {
                return;
            }
            let mut mask = node.masks[note as usize];
            while mask != 0 {
                let page = node.group * 64 + u64::from(mask.trailing_zeros());
                mask &= mask - 1;
                if range.contains(&page) && !show(page) {
                    return;
                }
            }
            next = node.group.checked_add(1);
        }
    }

    fn find(&self, group: u64) -> Option<u32> {
        let mut at = self.root;
        while at != NONE {
            let node = &self.nodes[at as usize];
            if node.group == group {
                return Some(at);
            }
            at = if group < node.group {
                node.left
            } else {
                node.right
            };
        }
        None
    }

    fn at_or_after(&self, group: u64) -> Option<&Node> {
        let (mut at, mut best) = (self.root, None);
        while at != NONE {
            let node = &self.nodes[at as usize];
            if node.group < group {
                at = node.right;
            } else {
                best = Some(node);
                at = node.left;
            }
        }
        best
    }

    /// Takes a node that is in no tree.
    fn node(&mut self, group: u64) -> u32 {
        let node = Node {
            group,
            masks: [0; Note::COUNT],
            left: NONE,
            right: NONE,
        };
        if self.unused == NONE {
            self.nodes.push(node);
            // A cache has fewer pages than that, and a set no more groups.
            return (self.nodes.len() - 1) as u32;
        }
        let at = self.unused;
        self.unused = self.nodes[at as usize].left;
        self.unused_count -= 1;
        self.nodes[at as usize] = node;
        at
    }

    fn rank(&self, at: u32) -> u64 {
        rank(self.nodes[at as usize].group)
    }

    /// Puts a node into the tree below `at`; returns its new top. As deep as the tree: some twice the logarithm.
    fn link(&mut self, at: u32, new: u32) -> u32 {
        if at == NONE {
            return new;
        }
        let (group, here) = (self.nodes[new as usize].group, at as usize);
        if self.rank(new) > self.rank(at) {
            let (left, right) = self.split(at, group);
            let node = &mut self.nodes[new as usize];
            (node.left, node.right) = (left, right);
            return new;
        }
        if group < self.nodes[here].group {
            self.nodes[here].left = self.link(self.nodes[here].left, new);
        } else {
            self.nodes[here].right = self.link(self.nodes[here].right, new);
        }
        at
    }

    /// Parts the tree below `at` into groups before `group`, which is not in it, and after.
    fn split(&mut self, at: u32, group: u64) -> (u32, u32) {
        if at == NONE {
            return (NONE, NONE);
        }
        let here = at as usize;
        if self.nodes[here].group < group {
            let (left, right) = self.split(self.nodes[here].right, group);
            self.nodes[here].right = left;
            (at, right)
        } else {
            let (left, right) = self.split(self.nodes[here].left, group);
            self.nodes[here].left = right;
            (left, at)
        }
    }

    /// Takes `group`, which is there, out of the tree below `at`; returns its new top.
    fn unlink(&mut self, at: u32, group: u64) -> u32 {
        let here = at as usize;
        let node = self.nodes[here];
        if node.group == group {
            return self.merge(node.left, node.right);
        }
        if group < node.group {
            self.nodes[here].left = self.unlink(node.left, group);
        } else {
            self.nodes[here].right = self.unlink(node.right, group);
        }
        at
    }

    /// Joins two trees, all of whose groups are in order.
    fn merge(&mut self, left: u32, right: u32) -> u32 {
        if left == NONE {
            return right;
        }
        if right == NONE {
            return left;
        }
        if self.rank(left) > self.rank(right) {
            let at = left as usize;
            self.nodes[at].right = self.merge(self.nodes[at].right, right);
            left
        } else {
            let at = right as usize;
            self.nodes[at].left = self.merge(left, self.nodes[at].left);
            right
        }
    }
}

/// The treap's heap order: as good as drawn by lot, and the same for a group each time (splitmix64's mixing).
fn rank(group: u64) -> u64 {
    let mut mixed = group.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    const NOTES: [Note; 3] = [Note::Dirty, Note::Writing, Note::Tracked];

    fn pages_in(sets: &PageSets, note: Note, range: Range<u64>, limit: usize) -> Vec<u64> {
        let mut pages = Vec::new();
        sets.each_in(note, range, &mut |page| {
            let fits = pages.len() < limit;
            if fits {
                pages.push(page);
            }
            fits
        });
        pages
    }

    #[test]
    fn pages_come_back_in_order_and_within_the_range() {
        let mut sets = PageSets::default();
        for page in [200, 3, 64, 63, 1 << 40, 3] {
            sets.insert(Note::Dirty, page);
        }
        let listed = |range, limit| pages_in(&sets, Note::Dirty, range, limit);
        assert_eq!(sets.len(Note::Dirty), 5);
        assert_eq!(listed(0..u64::MAX, 10), [3, 63, 64, 200, 1 << 40]);
        assert_eq!(listed(4..200, 10), [63, 64]);
        assert_eq!(listed(0..300, 2), [3, 63]);
        assert!(listed(5..5, 9).is_empty());
        assert_eq!(sets.next_from(Note::Dirty, 65), Some(200));
        assert_eq!(sets.next_from(Note::Tracked, 0), None);
        assert!(sets.remove(Note::Dirty, 63) && !sets.remove(Note::Dirty, 63));
        assert_eq!(sets.next_from(Note::Dirty, 4), Some(64));
    }

    #[test]
    fn sets_do_what_sorted_ones_would() {
        let mut rng = SmallRng::seed_from_u64(11);
        let (mut sets, mut model) = (PageSets::default(), [const { BTreeSet::new() }; 3]);
        for _ in 0..60_000 {
            let page = match rng.random_range(0..3) {
                0 => rng.random_range(0..300),
                1 => rng.random_range(0..1 << 20),
                _ => u64::MAX - 1 - rng.random_range(0..200),
            };
            let at = rng.random_range(0..3);
            let (note, set) = (NOTES[at], &mut model[at]);
            match rng.random_range(0..6) {
                0 | 1 => assert_eq!(sets.insert(note, page), set.insert(page)),
                2 => assert_eq!(sets.remove(note, page), set.remove(&page)),
                3 => {
                    assert_eq!(
                        sets.next_from(note, page),
                        set.range(page..).next().copied()
                    );
                    assert_eq!(sets.contains(note, page), set.contains(&page));
                }
                4 => {
                    let changed = set.remove(&page);
                    if changed {
                        model[(at + 1) % 3].insert(page);
                    }
                    assert_eq!(sets.change(note, NOTES[(at + 1) % 3], page), changed);
                }
                _ => {
                    let end = page.saturating_add(rng.random_range(0..5000));
                    let expected = set.range(page..end).copied().take(50);
                    assert!(
                        pages_in(&sets, note, page..end, 50)
                            .into_iter()
                            .eq(expected)
                    );
                }
            }
            for (note, set) in NOTES.iter().zip(&model) {
                assert_eq!(sets.len(*note), set.len());
            }
        }
        for (note, set) in NOTES.iter().zip(model) {
            set.into_iter()
                .for_each(|page| assert!(sets.remove(*note, page)));
        }
        assert!(sets.root == NONE && sets.entries() == 0);
    }

    #[test]
    fn with_room_nothing_is_allocated_and_what_goes_leaves_room() {
        let mut sets = PageSets::default();
        assert_eq!(sets.try_insert(Note::Tracked, 70), None);
        let mut larger = PageSets::with_room(16);
        larger.take_entries(&mut sets);
        let nodes = larger.nodes.as_ptr();
        for round in 0..100 {
            let mut page = round;
            while larger.try_insert(Note::Tracked, page).is_some() {
                page += 64;
            }
            assert!(larger.len(Note::Tracked) >= 16);
            // What is tracked can be found to be dirty whatever room there is.
            assert_eq!(larger.try_insert(Note::Dirty, round), Some(true));
            assert!(larger.change(Note::Dirty, Note::Writing, round));
            assert!(larger.remove(Note::Writing, round));
            for page in pages_in(&larger, Note::Tracked, 0..u64::MAX, usize::MAX) {
                assert!(larger.remove(Note::Tracked, page));
            }
        }
        assert_eq!(larger.nodes.as_ptr(), nodes);
    }

    #[test]
    fn groups_in_any_order_make_no_deep_tree() {
        fn depth(sets: &PageSets, at: u32) -> usize {
            if at == NONE {
                return 0;
            }
            let node = &sets.nodes[at as usize];
            1 + depth(sets, node.left).max(depth(sets, node.right))
        }
        for step in [64, 64 * 64, 4096 * 977] {
            let mut sets = PageSets::default();
            (0..50_000).for_each(|n| assert!(sets.insert(Note::Dirty, n * step)));
            assert!(depth(&sets, sets.root) < 80);
        }
    }
}
