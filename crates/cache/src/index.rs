//! Where a page is: a hash table of frame numbers whose size follows the budget, not the files.
//!
//! Entries are `tag << 32 | frame + 1` in buckets of one cache line. Looking up takes no lock: an entry only suggests a
//! frame, and the caller makes sure under a reference or the page's lock that the frame still is the page it wants
//! (frames are never unmapped, so looking at a wrong one is harmless). Inserting serializes per shard, so that a
//! page is never in two frames. docs/decisions/0002 says why this is not a radix tree.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use pinfold_base::sync::{Mutex, MutexGuard};
use pinfold_mem::Frame;

const ENTRIES: usize = 7;
const SHARDS: usize = 64;

/// A file's page, as the cache knows it: file numbers are never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    /// The file's number in this cache.
    pub file: u64,
    /// The page in the file.
    pub page: u64,
}

impl Key {
    /// Mixes both numbers into 64 well-spread bits.
    #[inline]
    #[must_use]
    pub fn hash(self) -> u64 {
        // Two rounds of multiply and fold, as wyhash mixes. No page has a number that makes a factor zero.
        let mixed = fold(
            self.file ^ 0x9e37_79b9_7f4a_7c15,
            self.page ^ 0xe703_7ed1_a0b4_28db,
        );
        fold(mixed, 0x8ebc_6af0_9c88_c6e3)
    }
}

#[inline]
fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    (product as u64) ^ ((product >> 64) as u64)
}

#[repr(align(64))]
#[derive(Debug)]
struct Bucket {
    entries: [AtomicU64; ENTRIES],
    /// Entries that hash here but live in a later bucket.
    displaced: AtomicU32,
}

/// The table.
#[derive(Debug)]
pub struct Index {
    buckets: Box<[Bucket]>,
    mask: usize,
    /// How far from its home an entry was ever put.
    reach: AtomicU32,
    shards: Vec<Mutex<()>>,
}

/// Witness that nobody else inserts or removes keys of this shard.
#[derive(Debug)]
pub struct ShardGuard<'a> {
    _turn: MutexGuard<'a, ()>,
}

impl Index {
    /// Makes a table for at most `frames` entries, about half full at most.
    #[must_use]
    pub fn new(frames: usize) -> Self {
        let buckets = (frames * 2 / ENTRIES + 1).next_power_of_two();
        Self {
            buckets: (0..buckets)
                .map(|_| Bucket {
                    entries: Default::default(),
                    displaced: AtomicU32::new(0),
                })
                .collect(),
            mask: buckets - 1,
            reach: AtomicU32::new(0),
            shards: (0..SHARDS).map(|_| Mutex::new(())).collect(),
        }
    }

    /// Lists the frames that may hold the key with this hash; usually none or one.
    #[inline]
    pub fn candidates(&self, hash: u64) -> Candidates<'_> {
        let home = hash as usize & self.mask;
        Candidates {
            index: self,
            home,
            tag: tag(hash),
            entries: self.buckets[home].entries.iter(),
            step: 0,
        }
    }

    /// Has the processor fetch what [`Index::candidates`] looks at, for a look-up that will come: only a hint.
    #[inline]
    pub fn prefetch(&self, hash: u64) {
        pinfold_mem::copy::prefetch_line(&raw const self.buckets[hash as usize & self.mask]);
    }

    /// Keeps others from inserting or removing keys with this hash.
    pub fn lock(&self, hash: u64) -> ShardGuard<'_> {
        ShardGuard {
            _turn: self.shards[(hash >> 20) as usize % SHARDS].lock(),
        }
    }

    /// Enters a frame. The caller has made sure under the guard that the key is not there.
    ///
    /// # Panics
    /// When the table is full, which its size rules out while a frame has at most one entry.
    pub fn insert(&self, _guard: &ShardGuard<'_>, hash: u64, frame: Frame) {
        let home = hash as usize & self.mask;
        let value = tag(hash) | (u64::from(frame.0) + 1);
        for step in 0..self.buckets.len() {
            let bucket = &self.buckets[(home + step) & self.mask];
            for entry in &bucket.entries {
                let free = entry.load(Ordering::Relaxed) == 0;
                if free
                    && entry
                        .compare_exchange(0, value, Ordering::AcqRel, Ordering::Relaxed)
                        .is_ok()
                {
                    if step > 0 {
                        // A reader that misses an entry just displaced comes to the shard lock and looks again.
                        self.buckets[home].displaced.fetch_add(1, Ordering::Release);
                        self.reach.fetch_max(step as u32, Ordering::Release);
                    }
                    return;
                }
            }
        }
        unreachable!("an index with twice as many entries as frames is full");
    }

    /// Takes a frame out; false when it was not there.
    pub fn remove(&self, _guard: &ShardGuard<'_>, hash: u64, frame: Frame) -> bool {
        let home = hash as usize & self.mask;
        let value = tag(hash) | (u64::from(frame.0) + 1);
        let reach = self.reach.load(Ordering::Acquire) as usize;
        for step in 0..=reach {
            let bucket = &self.buckets[(home + step) & self.mask];
            for entry in &bucket.entries {
                if entry.load(Ordering::Relaxed) == value {
                    entry.store(0, Ordering::Release);
                    if step > 0 {
                        self.buckets[home].displaced.fetch_sub(1, Ordering::Release);
                    }
                    return true;
                }
            }
        }
        false
    }
}

/// Frames whose entries carry a hash's tag. Written out because every cached read and write runs it once.
#[derive(Debug)]
pub struct Candidates<'a> {
    index: &'a Index,
    home: usize,
    tag: u64,
    entries: std::slice::Iter<'a, AtomicU64>,
    /// Buckets behind the home that were entered.
    step: usize,
}

impl Candidates<'_> {
    /// Goes on to the next bucket that entries of this home may be in; false when there is none.
    fn next_bucket(&mut self) -> bool {
        let index = self.index;
        if index.buckets[self.home].displaced.load(Ordering::Relaxed) == 0
            || self.step == index.reach.load(Ordering::Relaxed) as usize
        {
            return false;
        }
        self.step += 1;
        let bucket = &index.buckets[(self.home + self.step) & index.mask];
        self.entries = bucket.entries.iter();
        true
    }
}

impl Iterator for Candidates<'_> {
    type Item = Frame;

    #[inline]
    fn next(&mut self) -> Option<Frame> {
        loop {
            for entry in self.entries.by_ref() {
                let value = entry.load(Ordering::Acquire);
                if value & TAG_MASK == self.tag && value != 0 {
                    return Some(frame_of(value));
                }
            }
            if !self.next_bucket() {
                return None;
            }
        }
    }
}

const TAG_MASK: u64 = 0xffff_ffff_0000_0000;

#[inline]
fn tag(hash: u64) -> u64 {
    hash & TAG_MASK
}

#[inline]
fn frame_of(value: u64) -> Frame {
    Frame(value as u32 - 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn lookup(index: &Index, key: Key, keys: &HashMap<u32, Key>) -> Option<Frame> {
        index
            .candidates(key.hash())
            .find(|frame| keys.get(&frame.0) == Some(&key))
    }

    #[test]
    fn every_frame_can_be_in_the_table_and_is_found() {
        let frames = 10_000;
        let index = Index::new(frames);
        let mut keys = HashMap::new();
        for i in 0..frames as u32 {
            let key = Key {
                file: u64::from(i % 7),
                page: u64::from(i),
            };
            let hash = key.hash();
            index.insert(&index.lock(hash), hash, Frame(i));
            keys.insert(i, key);
        }
        for (&i, &key) in &keys {
            assert_eq!(lookup(&index, key, &keys), Some(Frame(i)));
        }
        for (&i, &key) in &keys {
            assert!(index.remove(&index.lock(key.hash()), key.hash(), Frame(i)));
            assert!(!index.remove(&index.lock(key.hash()), key.hash(), Frame(i)));
        }
        assert!(
            index
                .buckets
                .iter()
                .all(|b| b.displaced.load(Ordering::Relaxed) == 0)
        );
        assert_eq!(lookup(&index, Key { file: 0, page: 0 }, &keys), None);
    }

    #[test]
    fn a_bucket_that_overflows_still_finds_its_entries() {
        let index = Index::new(14);
        // All of one hash: they share a home bucket of seven entries.
        for i in 0..14 {
            index.insert(&index.lock(42), 42, Frame(i));
        }
        let mut found: Vec<_> = index.candidates(42).map(|f| f.0).collect();
        found.sort_unstable();
        assert_eq!(found, (0..14).collect::<Vec<_>>());
    }

    #[test]
    fn neighbouring_pages_spread() {
        let mut heads = std::collections::HashSet::new();
        for page in 0..4096 {
            heads.insert(Key { file: 1, page }.hash() & 0xfff);
        }
        assert!(heads.len() > 2300, "{} of 4096 buckets hit", heads.len());
    }
}
