//! Inode numbers: which node the kernel means.
//!
//! FUSE names an inode by one number that is also what stat(2) shows. Where it can be, that is the store's own number;
//! where another inode that the kernel still knows has it (another device below the directory, or the next owner of a
//! freed number), it is one that no store uses.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::RwLock;
use pinfold::{Node, NodeId};

use crate::growth::Growth;
use crate::pages::Pages;

/// The number FUSE gives the mounted directory.
pub(crate) const ROOT: u64 = 1;
/// Numbers from here on are made up.
const MADE_UP: u64 = 1 << 63;
/// A version of a file's contents that no file has: nothing of it is in the kernel's cache.
const NO_VERSION: u64 = u64::MAX;

/// The inodes the kernel knows.
#[derive(Debug)]
pub(crate) struct Inodes {
    root: Node,
    known: RwLock<Known>,
}

#[derive(Debug, Default)]
struct Known {
    by_number: HashMap<u64, Entry>,
    numbers: HashMap<NodeId, u64>,
    made_up: u64,
}

#[derive(Debug)]
struct Entry {
    node: Node,
    /// How often the kernel was told of it, less how often it forgot.
    lookups: u64,
    /// The version of the contents that the kernel may have cached.
    cached: u64,
    /// Whether the kernel may have pages of it at all.
    paged: AtomicBool,
    growth: Arc<Growth>,
    /// Of a shared file: what the kernel may have of it.
    pages: OnceLock<Arc<Pages>>,
}

impl Inodes {
    pub(crate) fn new(root: Node) -> Self {
        Self {
            root,
            known: RwLock::new(Known::default()),
        }
    }

    /// Returns the node the kernel calls `number`.
    pub(crate) fn get(&self, number: u64) -> Option<Node> {
        if number == ROOT {
            return Some(self.root.clone());
        }
        let known = self.known.read();
        known.by_number.get(&number).map(|entry| entry.node.clone())
    }

    /// Counts that the kernel is told of a node; returns its number.
    pub(crate) fn tell(&self, node: &Node) -> u64 {
        if *node == self.root {
            return ROOT;
        }
        let id = node.id();
        let mut known = self.known.write();
        let known = &mut *known;
        if let Some(number) = known.numbers.get(&id)
            && let Some(entry) = known.by_number.get_mut(number)
        {
            entry.lookups += 1;
            return *number;
        }
        let own = id.device == self.root.id().device
            && id.inode > ROOT
            && id.inode < MADE_UP
            && !known.by_number.contains_key(&id.inode);
        let number = if own {
            id.inode
        } else {
            known.made_up += 1;
            MADE_UP + known.made_up
        };
        known.numbers.insert(id, number);
        known.by_number.insert(
            number,
            Entry {
                node: node.clone(),
                lookups: 1,
                cached: NO_VERSION,
                paged: AtomicBool::new(false),
                growth: Arc::default(),
                pages: OnceLock::new(),
            },
        );
        number
    }

    /// Counts that the kernel forgot `lookups` tellings of a node.
    pub(crate) fn forget(&self, number: u64, lookups: u64) {
        let gone = {
            let mut known = self.known.write();
            let Some(entry) = known.by_number.get_mut(&number) else {
                return;
            };
            entry.lookups = entry.lookups.saturating_sub(lookups);
            if entry.lookups > 0 {
                return;
            }
            let gone = known.by_number.remove(&number);
            if let Some(entry) = &gone {
                known.numbers.remove(&entry.node.id());
            }
            gone
        };
        // The last reference to a node may give up pages and descriptors: not under the lock.
        drop(gone);
    }

    /// Returns how far the kernel knows the file's size.
    pub(crate) fn growth(&self, number: u64) -> Option<Arc<Growth>> {
        let known = self.known.read();
        let entry = known.by_number.get(&number)?;
        Some(Arc::clone(&entry.growth))
    }

    /// Notes that the kernel fills pages of the file.
    pub(crate) fn note_paged(&self, number: u64) {
        let known = self.known.read();
        if let Some(entry) = known.by_number.get(&number)
            && !entry.paged.load(Ordering::Relaxed)
        {
            entry.paged.store(true, Ordering::SeqCst);
        }
    }

    /// Tells whether the kernel may have pages of the file.
    pub(crate) fn is_paged(&self, number: u64) -> bool {
        let known = self.known.read();
        known
            .by_number
            .get(&number)
            .is_some_and(|entry| entry.paged.load(Ordering::SeqCst))
    }

    /// Returns what the kernel may have of a file's pages.
    pub(crate) fn pages(&self, number: u64) -> Option<Arc<Pages>> {
        let known = self.known.read();
        let entry = known.by_number.get(&number)?;
        let made = entry
            .pages
            .get_or_init(|| Pages::new(number, entry.node.clone()));
        Some(Arc::clone(made))
    }

    /// As [`Inodes::pages`], if the kernel ever had any.
    pub(crate) fn pages_of(&self, id: NodeId) -> Option<Arc<Pages>> {
        let known = self.known.read();
        let entry = known.by_number.get(known.numbers.get(&id)?)?;
        entry.pages.get().map(Arc::clone)
    }

    /// Tells whether what the kernel has cached of the file is its contents' present version, and notes that.
    pub(crate) fn still_cached(&self, number: u64, version: u64) -> bool {
        let mut known = self.known.write();
        let Some(entry) = known.by_number.get_mut(&number) else {
            return false;
        };
        std::mem::replace(&mut entry.cached, version) == version
    }
}
