//! Sleeping until a state word changes.
//!
//! A sleeper sets WAITERS in the word while it holds its bucket's lock; whoever changes the word clears the flag in the
//! same step and, if it was set, takes the bucket's lock to wake everybody. So no wake-up is lost, and a word that
//! nobody waits for costs nothing.

use std::time::Instant;

use pinfold_base::sync::{self, Condvar, Mutex};

use crate::state::StateWord;

#[cfg(not(loom))]
const BUCKETS: usize = 64;
#[cfg(loom)]
const BUCKETS: usize = 1;

#[derive(Debug)]
struct Bucket {
    turn: Mutex<()>,
    woken: Condvar,
}

/// Buckets of sleepers, shared by all words of a cache.
#[derive(Debug)]
pub struct WaitTable {
    buckets: Vec<Bucket>,
}

impl Default for WaitTable {
    fn default() -> Self {
        Self {
            buckets: (0..BUCKETS)
                .map(|_| Bucket {
                    turn: Mutex::new(()),
                    woken: Condvar::new(),
                })
                .collect(),
        }
    }
}

impl WaitTable {
    /// Sleeps until `until` holds for the word `key` names; false when `deadline` came first.
    pub fn wait(
        &self,
        key: usize,
        word: &StateWord,
        deadline: Option<Instant>,
        until: impl Fn(u64) -> bool,
    ) -> bool {
        let bucket = &self.buckets[key % BUCKETS];
        let mut turn = bucket.turn.lock();
        loop {
            let state = word.load();
            if until(state) {
                return true;
            }
            if !word.announce_waiter(state) {
                continue;
            }
            turn = match deadline {
                None => bucket.woken.wait(turn),
                Some(deadline) if sync::now() >= deadline => return false,
                Some(deadline) => bucket.woken.wait_until(turn, deadline),
            };
        }
    }

    /// Wakes everybody who sleeps for the word `key` names.
    pub fn wake(&self, key: usize) {
        let bucket = &self.buckets[key % BUCKETS];
        drop(bucket.turn.lock());
        bucket.woken.notify_all();
    }
}
