//! What this node knows of the locks that it has a claim to: a pure account of what etcd said.
//!
//! A claim is a key. Claims of one lock are in the order of their first revisions, and one is *granted* when every earlier
//! one goes together with it. An earlier claim can only become weaker or go away, so a granted claim stays granted whatever
//! of it is known late: two nodes never count as holders beside each other.
//!
//! *Owns*: the order of claims, which callback was told.
//!
//! *Does not own*: messages to and from etcd ([`super::actor`]).

use std::collections::{BTreeMap, HashMap};

use super::keys::{Claim, Owner};
use crate::mode::Mode;
use crate::service::{Name, Reply, Token, Wait};

/// Changes of one lock that are kept while it is being read.
const EARLY_MAX: usize = 1024;

/// What is to be done because of what was learnt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Out {
    Reply(Name, Reply),
    Demote(Name, Mode),
    /// Take back a claim that was not to wait, then [`Board::fallen`].
    TakeBack(Name),
    /// Read the claims of this lock, then [`Board::loaded`].
    Load(Name),
    /// Take back a claim of ours that was made at this revision by a sending that came too late.
    Stray(Name, i64),
    /// A claim of ours is gone that we did not take back: nothing can be relied on.
    Robbed(Name),
}

/// A claim as etcd has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    pub owner: Owner,
    pub claim: Claim,
    /// The revision that made it: its place in the order.
    pub created: i64,
}

/// A change of one claim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Change {
    pub name: Name,
    pub owner: Owner,
    /// The revision of the change.
    pub revision: i64,
    /// What it is now, or that it is gone.
    pub claim: Option<(Claim, i64)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mine {
    /// The claim was sent, or stands behind others.
    Waiting,
    Held,
    /// It is made weaker, or taken back; `refuse` if it never was granted.
    Falling {
        refuse: bool,
    },
}

#[derive(Debug)]
struct Lock {
    claims: BTreeMap<i64, (Owner, Claim)>,
    /// The revision that made our claim, once that is answered.
    made: Option<i64>,
    /// What is known is of this revision; nothing is known before the first.
    known: Option<i64>,
    /// The last change that was taken in: what was read before it is older than what is known.
    heard: i64,
    /// Changes that came before what they change was read.
    early: Vec<Change>,
    mine: Mine,
    wait: Wait,
    /// Whose claim the node was called for last.
    called_for: Option<i64>,
}

/// The locks that this node has a claim to.
#[derive(Debug)]
pub(super) struct Board {
    me: Owner,
    locks: HashMap<Name, Lock>,
    /// What was read at an earlier revision may lack changes that no watch told.
    told_since: i64,
}

impl Board {
    pub fn new(me: Owner) -> Self {
        Self {
            me,
            locks: HashMap::new(),
            told_since: 0,
        }
    }

    /// Begins a claim: changes are kept from now on, until [`Board::loaded`].
    pub fn rise(&mut self, name: Name, wait: Wait) {
        let lock = Lock {
            claims: BTreeMap::new(),
            made: None,
            known: None,
            heard: 0,
            early: Vec::new(),
            mine: Mine::Waiting,
            wait,
            called_for: None,
        };
        self.locks.insert(name, lock);
    }

    /// Begins to make the claim weaker, or to take it back.
    pub fn fall(&mut self, name: Name) {
        if let Some(lock) = self.locks.get_mut(&name) {
            lock.mine = Mine::Falling { refuse: false };
        }
    }

    /// Notes that the fall to `to` is done.
    pub fn fallen(&mut self, name: Name, to: Mode) -> Vec<Out> {
        let Some(lock) = self.locks.get_mut(&name) else {
            return Vec::new();
        };
        let refused = lock.mine == Mine::Falling { refuse: true };
        let token = lock.my_place(&self.me).map_or(Token(0), token);
        if to == Mode::Unlocked {
            self.locks.remove(&name);
            let reply = if refused {
                Reply::Refused
            } else {
                Reply::Granted { mode: to, token }
            };
            return vec![Out::Reply(name, reply)];
        }
        lock.mine = Mine::Held;
        lock.called_for = None;
        if let Some(place) = lock.my_place(&self.me)
            && let Some((_, claim)) = lock.claims.get_mut(&place)
        {
            claim.mode = to;
        }
        let mut out = vec![Out::Reply(name, Reply::Granted { mode: to, token })];
        out.extend(self.look(name));
        out
    }

    /// Notes that our claim was made, and all claims as they were at that moment or later.
    pub fn claimed(&mut self, name: Name, revision: i64, entries: Vec<Entry>) -> Vec<Out> {
        let mine = entries.iter().find(|entry| entry.owner == self.me);
        let Some(made) = mine.map(|entry| entry.created) else {
            return vec![Out::Robbed(name)];
        };
        if let Some(lock) = self.locks.get_mut(&name) {
            lock.made = Some(made);
        }
        self.loaded(name, revision, entries)
    }

    /// Notes all claims of a lock as they were at `revision`.
    pub fn loaded(&mut self, name: Name, revision: i64, entries: Vec<Entry>) -> Vec<Out> {
        let told_since = self.told_since;
        let Some(lock) = self.locks.get_mut(&name) else {
            return Vec::new();
        };
        let Some(made) = lock.made else {
            // Read for an earlier claim, or too early for this one, whose answer brings all of it.
            return Vec::new();
        };
        if revision < told_since.max(made) {
            return vec![Out::Load(name)];
        }
        if lock
            .known
            .is_some_and(|known| revision < known.max(lock.heard))
        {
            return Vec::new();
        }
        lock.known = Some(revision);
        lock.claims = entries
            .into_iter()
            .map(|entry| (entry.created, (entry.owner, entry.claim)))
            .collect();
        let early = std::mem::take(&mut lock.early);
        if lock.my_place(&self.me).is_none() && !matches!(lock.mine, Mine::Falling { .. }) {
            return vec![Out::Robbed(name)];
        }
        let mut out = Vec::new();
        for change in early {
            out.extend(self.apply(change));
        }
        out.extend(self.look(name));
        out
    }

    /// Notes a change that the watch told.
    pub fn changed(&mut self, change: Change) -> Vec<Out> {
        let name = change.name;
        let mut out = self.apply(change);
        out.extend(self.look(name));
        out
    }

    /// A new watch tells what comes after `revision`: what was missed before has to be read.
    pub fn told_since(&mut self, revision: i64) -> Vec<Out> {
        self.told_since = self.told_since.max(revision);
        self.locks
            .iter_mut()
            .filter_map(|(&name, lock)| {
                lock.known = None;
                lock.made.map(|_| Out::Load(name))
            })
            .collect()
    }

    /// The revision that made our claim, if it is known.
    pub fn created(&self, name: Name) -> Option<i64> {
        self.locks.get(&name)?.my_place(&self.me)
    }

    /// Tells whether this node has, or is about to have, a claim to this lock.
    pub fn has(&self, name: Name) -> bool {
        self.locks.contains_key(&name)
    }

    fn apply(&mut self, change: Change) -> Vec<Out> {
        let Some(lock) = self.locks.get_mut(&change.name) else {
            return match change.claim {
                Some((_, created)) if change.owner == self.me => {
                    vec![Out::Stray(change.name, created)]
                }
                _ => Vec::new(),
            };
        };
        match lock.known {
            None => {
                if lock.early.len() >= EARLY_MAX {
                    // Rather read again, at a revision that has them all.
                    lock.early.clear();
                    self.told_since = self.told_since.max(change.revision);
                } else {
                    lock.early.push(change);
                }
                return Vec::new();
            }
            Some(known) if change.revision <= known => return Vec::new(),
            Some(_) => {}
        }
        lock.heard = change.revision;
        let gone = change.claim.is_none();
        let mine = change.owner == self.me;
        lock.claims.retain(|_, (owner, _)| *owner != change.owner);
        if let Some((claim, created)) = change.claim {
            lock.claims.insert(created, (change.owner, claim));
        }
        if mine && gone && !matches!(lock.mine, Mine::Falling { .. }) {
            return vec![Out::Robbed(change.name)];
        }
        Vec::new()
    }

    /// Draws the conclusions from what is known of one lock.
    fn look(&mut self, name: Name) -> Vec<Out> {
        let mut out = Vec::new();
        let Some(lock) = self.locks.get_mut(&name) else {
            return out;
        };
        let (Some(_), Some(place)) = (lock.known, lock.my_place(&self.me)) else {
            return out;
        };
        let Some(&(_, Claim { mode, .. })) = lock.claims.get(&place) else {
            return out;
        };
        if lock.mine == Mine::Waiting {
            let mut earlier = lock.claims.range(..place);
            if earlier.all(|(_, (_, claim))| claim.mode.compatible(mode)) {
                lock.mine = Mine::Held;
                let token = token(place);
                out.push(Out::Reply(name, Reply::Granted { mode, token }));
            } else if lock.wait != Wait::Queue {
                lock.mine = Mine::Falling { refuse: true };
                out.push(Out::TakeBack(name));
                return out;
            }
        }
        if lock.mine == Mine::Held {
            // The first that waits for us decides; the next one speaks when that was served.
            let mut later = lock.claims.range(place + 1..);
            let waits = later
                .find(|(_, (_, claim))| !claim.mode.compatible(mode) && claim.wait != Wait::Try);
            if let Some((&created, (_, claim))) = waits
                && lock.called_for != Some(created)
            {
                lock.called_for = Some(created);
                out.push(Out::Demote(name, claim.mode));
            }
        }
        out
    }
}

impl Lock {
    fn my_place(&self, me: &Owner) -> Option<i64> {
        let mut claims = self.claims.iter();
        claims
            .find(|(_, (owner, _))| owner == me)
            .map(|(&place, _)| place)
    }
}

/// Revisions are counted from 1 and grow with every change of anything: later grants that could conflict have larger
/// ones.
fn token(created: i64) -> Token {
    Token(created.unsigned_abs())
}

#[cfg(test)]
mod model;
