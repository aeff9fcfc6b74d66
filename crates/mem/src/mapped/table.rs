//! The table of mappings: entries in the order of their addresses, in chunks.
//!
//! *Owns*: the order, the chunks, what a change shares with the table before it.
//!
//! A table is never changed, only replaced. Copying all of it for every mapping made the cost of n mappings grow with the square of
//! n; here a change copies the list of chunks and the few chunks concerned, and look-ups search twice.

use std::sync::Arc;

use super::{Entry, InsertError, MAPPINGS_MAX, overlap};

/// Entries in a chunk at most; about the root of [`MAPPINGS_MAX`], where list and chunk are of a size.
#[cfg(not(test))]
const CHUNK_MAX: usize = 128;
/// Few, so that tests cross the edges.
#[cfg(test)]
const CHUNK_MAX: usize = 4;

/// Entries with ascending addresses, at least one.
type Chunk = Vec<Arc<Entry>>;

#[derive(Default)]
pub(super) struct Table {
    chunks: Vec<Arc<Chunk>>,
    len: usize,
}

impl Table {
    /// Returns how many entries it has.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Returns the first entry that does not end at or before `addr`. Safe in a signal handler.
    pub(super) fn at_or_after(&self, addr: usize) -> Option<&Arc<Entry>> {
        let chunk = self.chunks.get(self.chunk_of(addr))?;
        chunk.get(place_in(chunk, addr))
    }

    /// Returns the index of the first chunk that does not end at or before `addr`.
    fn chunk_of(&self, addr: usize) -> usize {
        let ends_before =
            |chunk: &Arc<Chunk>| chunk.last().is_none_or(|last| last.range.end <= addr);
        self.chunks.partition_point(ends_before)
    }

    /// Makes the table without `gone` and with `added`.
    pub(super) fn changed(
        &self,
        gone: &[Arc<Entry>],
        added: &[Arc<Entry>],
    ) -> Result<Self, InsertError> {
        let mut next = Self {
            chunks: self.chunks.clone(),
            len: self.len,
        };
        for entry in gone {
            next.remove(entry);
        }
        for entry in added {
            next.insert(entry)?;
        }
        if next.len > MAPPINGS_MAX && !added.is_empty() {
            return Err(InsertError::TooMany);
        }
        Ok(next)
    }

    fn remove(&mut self, entry: &Arc<Entry>) {
        let index = self.chunk_of(entry.range.start);
        let Some(shared) = self.chunks.get_mut(index) else {
            return;
        };
        let at = place_in(shared, entry.range.start);
        if !shared
            .get(at)
            .is_some_and(|found| Arc::ptr_eq(found, entry))
        {
            return;
        }
        let chunk = Arc::make_mut(shared);
        chunk.remove(at);
        self.len -= 1;
        if chunk.is_empty() {
            self.chunks.remove(index);
        } else {
            self.join(index);
        }
    }

    /// Joins a chunk with the next if both are small: a table that was large once is not searched as if it still were.
    fn join(&mut self, index: usize) {
        let len = |index: usize| self.chunks.get(index).map(|chunk| chunk.len());
        let (Some(here), Some(next)) = (len(index), len(index + 1)) else {
            return;
        };
        if here + next <= CHUNK_MAX / 2 {
            let next = self.chunks.remove(index + 1);
            Arc::make_mut(&mut self.chunks[index]).extend(next.iter().cloned());
        }
    }

    fn insert(&mut self, entry: &Arc<Entry>) -> Result<(), InsertError> {
        if entry.range.is_empty() {
            return Err(InsertError::Taken);
        }
        let there = self.at_or_after(entry.range.start);
        if there.is_some_and(|there| overlap(&there.range, &entry.range)) {
            return Err(InsertError::Taken);
        }
        if self.chunks.is_empty() {
            self.chunks.push(Arc::default());
        }
        // Behind everything, it goes into the last chunk.
        let index = self.chunk_of(entry.range.start).min(self.chunks.len() - 1);
        let chunk = Arc::make_mut(&mut self.chunks[index]);
        chunk.insert(place_in(chunk, entry.range.start), Arc::clone(entry));
        self.len += 1;
        if chunk.len() > CHUNK_MAX {
            let upper = chunk.split_off(CHUNK_MAX / 2);
            self.chunks.insert(index + 1, Arc::new(upper));
        }
        Ok(())
    }
}

/// Returns the index of the first entry of a chunk that does not end at or before `addr`.
fn place_in(chunk: &Chunk, addr: usize) -> usize {
    chunk.partition_point(|entry| entry.range.end <= addr)
}
