//! Collections under locks that nobody allocates under.
//!
//! A fault served in a signal handler waits for some leaf locks. The thread it interrupted may hold the lock of the
//! program's allocator; a holder of the leaf that enters the allocator then waits for that thread, and it for the holder.
//! So room for one more is made with the lock free, and what it replaces is freed with the lock free.
//!
//! *Owns*: the order of those steps. *Does not own*: the collections. *Locking*: the lock it is given, let go of in between.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hash};

use crate::sync::{Mutex, MutexGuard};

/// Entries a collection grows by at least.
const STEP_MIN: usize = 16;

/// A collection that can be told to take up more memory in three steps, the middle one of which allocates nothing.
pub trait Roomy: Sized {
    /// Returns how many entries there are.
    fn entries(&self) -> usize;

    /// Tells whether one more entry would allocate nothing.
    fn has_room(&self) -> bool;

    /// Makes an empty collection with room for so many entries.
    fn with_room(entries: usize) -> Self;

    /// Takes over all entries of another one, for which there is room; leaves that one empty.
    fn take_entries(&mut self, from: &mut Self);
}

impl<K: Eq + Hash, V, S: BuildHasher + Default> Roomy for HashMap<K, V, S> {
    fn entries(&self) -> usize {
        self.len()
    }

    fn has_room(&self) -> bool {
        self.len() < self.capacity()
    }

    fn with_room(entries: usize) -> Self {
        Self::with_capacity_and_hasher(entries, S::default())
    }

    fn take_entries(&mut self, from: &mut Self) {
        self.extend(from.drain());
    }
}

impl<T> Roomy for Vec<T> {
    fn entries(&self) -> usize {
        self.len()
    }

    fn has_room(&self) -> bool {
        self.len() < self.capacity()
    }

    fn with_room(entries: usize) -> Self {
        Self::with_capacity(entries)
    }

    fn take_entries(&mut self, from: &mut Self) {
        self.append(from);
    }
}

/// Takes a lock with room for one more entry in what it guards, made while it is free.
pub fn lock_roomy<T: Roomy>(lock: &Mutex<T>) -> MutexGuard<'_, T> {
    lock_with(lock, |guarded| guarded)
}

/// As [`lock_roomy`], for a collection that is a part of what the lock guards.
pub fn lock_with<'a, T, C: Roomy>(
    lock: &'a Mutex<T>,
    part: impl Fn(&mut T) -> &mut C,
) -> MutexGuard<'a, T> {
    loop {
        let mut guard = lock.lock();
        let present = part(&mut guard);
        if present.has_room() {
            return guard;
        }
        let wanted = (2 * present.entries()).max(STEP_MIN);
        drop(guard);
        let mut larger = C::with_room(wanted);
        let mut guard = lock.lock();
        let present = part(&mut guard);
        // Others may have made room, or used up more than there is here: then it is only freed.
        if !present.has_room() && present.entries() < wanted {
            larger.take_entries(present);
            std::mem::swap(present, &mut larger);
        }
        drop(guard);
        drop(larger);
    }
}

/// Lists what `entries` gives of a guarded value, at most `limit`, without allocating under the lock. `count` is how many
/// there may be.
pub fn list<T, E>(
    lock: &Mutex<T>,
    limit: usize,
    count: impl Fn(&T) -> usize,
    entries: impl Fn(&T, &mut dyn FnMut(E) -> bool),
) -> Vec<E> {
    let wanted = |guarded: &T| count(guarded).min(limit);
    let mut room = wanted(&lock.lock());
    loop {
        let mut found = Vec::with_capacity(room);
        let guard = lock.lock();
        let now = wanted(&guard);
        if now <= found.capacity() {
            entries(&guard, &mut |entry| {
                if found.len() == now {
                    return false;
                }
                found.push(entry);
                true
            });
            return found;
        }
        drop(guard);
        // A few more than there are, lest a busy one is never caught.
        room = now + now / 8;
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn room_is_made_as_entries_come_and_none_is_lost() {
        let lock = Mutex::new(HashMap::<u32, u32>::new());
        for n in 0..10_000 {
            let mut map = lock_roomy(&lock);
            assert!(map.has_room());
            map.insert(n, n);
        }
        assert_eq!(lock.lock().len(), 10_000);
        let lock = Mutex::new((1, Vec::new()));
        for n in 0..1000 {
            lock_with(&lock, |both: &mut (i32, Vec<u32>)| &mut both.1)
                .1
                .push(n);
        }
        assert!(lock.lock().1.iter().copied().eq(0..1000));
    }

    #[test]
    fn a_list_ends_at_its_limit_and_at_what_there_is() {
        let lock = Mutex::new(vec![1, 2, 3, 4]);
        let listed = |limit| {
            list(&lock, limit, Vec::len, |all, add| {
                for &one in all {
                    if !add(one) {
                        return;
                    }
                }
            })
        };
        assert_eq!(listed(3), [1, 2, 3]);
        assert_eq!(listed(usize::MAX), [1, 2, 3, 4]);
    }
}
