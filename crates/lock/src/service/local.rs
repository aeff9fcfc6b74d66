//! The lock service of one process: several nodes of it share a directory, or one has it alone.
//!
//! *Owns*: who holds what, and who waits, first come, first served.
//!
//! *Does not own*: anything that outlives the process.
//!
//! *Locking*: one leaf; events are told after it is let go.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use pinfold_base::Errno;

use super::{Events, JoinError, LockService, Name, Reply, Session, Token, Wait};
use crate::clock::Time;
use crate::mode::Mode;

/// Members at once, the dead included; one more is told ENOLCK.
pub const MEMBERS_MAX: usize = 1024;

/// Locks between the nodes of one process.
#[derive(Debug, Default, Clone)]
pub struct Local {
    shared: Arc<Mutex<Table>>,
}

#[derive(Default)]
struct Table {
    members: HashMap<u64, Member>,
    last_member: u64,
    last_token: u64,
    locks: HashMap<Name, Lock>,
}

struct Member {
    name: String,
    events: Weak<dyn Events>,
    /// Left without giving its locks up: they stay until [`Local::fence`].
    dead: bool,
}

#[derive(Debug, Default)]
struct Lock {
    granted: Vec<(u64, Mode)>,
    waiting: VecDeque<(u64, Mode)>,
}

/// Something to be told once the table is let go.
enum Told {
    Reply(Name, Reply),
    Demote(Name, Mode),
}

type Outbox = Vec<(Weak<dyn Events>, Told)>;

impl std::fmt::Debug for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Table")
            .field("members", &self.members.len())
            .field("locks", &self.locks.len())
            .finish_non_exhaustive()
    }
}

impl Local {
    /// A service without members.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes a dead member's locks back, after whoever calls has made sure that nothing of it reaches the store any more.
    pub fn fence(&self, member: &str) {
        let outbox = {
            let mut table = self.shared.lock();
            let dead = table
                .members
                .iter()
                .find(|(_, one)| one.dead && one.name == member)
                .map(|(&id, _)| id);
            dead.map(|id| table.remove(id)).unwrap_or_default()
        };
        deliver(outbox);
    }
}

impl LockService for Local {
    fn join(&self, member: &str, events: Weak<dyn Events>) -> Result<Box<dyn Session>, JoinError> {
        let mut table = self.shared.lock();
        if table.members.values().any(|other| other.name == member) {
            let why = format!("there is a node called {member} already");
            return Err(JoinError::new(Errno::EEXIST, why));
        }
        if table.members.len() >= MEMBERS_MAX {
            return Err(JoinError::new(Errno::ENOLCK, "too many nodes"));
        }
        table.last_member += 1;
        let id = table.last_member;
        let member = Member {
            name: member.to_owned(),
            events,
            dead: false,
        };
        table.members.insert(id, member);
        Ok(Box::new(LocalSession {
            shared: Arc::clone(&self.shared),
            id,
        }))
    }
}

#[derive(Debug)]
struct LocalSession {
    shared: Arc<Mutex<Table>>,
    id: u64,
}

impl Session for LocalSession {
    fn request(&self, name: Name, from: Mode, to: Mode, wait: Wait) {
        let outbox = {
            let mut table = self.shared.lock();
            if from.falls_to(to) {
                table.fall(self.id, name, to)
            } else {
                table.rise(self.id, name, to, wait)
            }
        };
        deliver(outbox);
    }

    fn good_until(&self) -> Option<Time> {
        None
    }

    fn leave(&self) {
        let outbox = self.shared.lock().remove(self.id);
        deliver(outbox);
    }

    fn abandon(&self) {
        if let Some(member) = self.shared.lock().members.get_mut(&self.id) {
            member.dead = true;
        }
    }
}

fn deliver(outbox: Outbox) {
    for (events, told) in outbox {
        let Some(events) = events.upgrade() else {
            continue;
        };
        match told {
            Told::Reply(name, reply) => events.reply(name, reply),
            Told::Demote(name, wanted) => events.demote(name, wanted),
        }
    }
}

impl Table {
    fn tell(&self, outbox: &mut Outbox, member: u64, told: Told) {
        if let Some(member) = self.members.get(&member) {
            outbox.push((Weak::clone(&member.events), told));
        }
    }

    fn rise(&mut self, member: u64, name: Name, to: Mode, wait: Wait) -> Outbox {
        let mut outbox = Outbox::new();
        let lock = self.locks.entry(name).or_default();
        let free =
            lock.waiting.is_empty() && lock.granted.iter().all(|&(_, mode)| mode.compatible(to));
        if free || wait == Wait::Queue {
            lock.waiting.push_back((member, to));
            self.grant(name, &mut outbox);
        } else {
            self.tell(&mut outbox, member, Told::Reply(name, Reply::Refused));
        }
        if !free && wait != Wait::Try {
            self.ask_owners(name, to, &mut outbox);
        }
        outbox
    }

    fn fall(&mut self, member: u64, name: Name, to: Mode) -> Outbox {
        let mut outbox = Outbox::new();
        let lock = self.locks.entry(name).or_default();
        lock.granted.retain(|&(owner, _)| owner != member);
        if to != Mode::Unlocked {
            lock.granted.push((member, to));
        }
        let reply = Reply::Granted {
            mode: to,
            token: Token(self.last_token),
        };
        self.tell(&mut outbox, member, Told::Reply(name, reply));
        self.grant(name, &mut outbox);
        outbox
    }

    /// Grants from the head of the queue while the modes go together, then tells the owners what the next one wants.
    fn grant(&mut self, name: Name, outbox: &mut Outbox) {
        let mut granted = Vec::new();
        let mut blocked = None;
        if let Some(lock) = self.locks.get_mut(&name) {
            while let Some(&(member, wanted)) = lock.waiting.front() {
                if !lock
                    .granted
                    .iter()
                    .all(|&(_, mode)| mode.compatible(wanted))
                {
                    blocked = Some(wanted);
                    break;
                }
                lock.waiting.pop_front();
                lock.granted.push((member, wanted));
                granted.push((member, wanted));
            }
            if lock.granted.is_empty() && lock.waiting.is_empty() {
                self.locks.remove(&name);
            }
        }
        for &(member, mode) in &granted {
            self.last_token += 1;
            let token = Token(self.last_token);
            self.tell(
                outbox,
                member,
                Told::Reply(name, Reply::Granted { mode, token }),
            );
        }
        // Whoever was granted meanwhile has not been asked yet.
        if let Some(wanted) = blocked
            && !granted.is_empty()
        {
            self.ask_owners(name, wanted, outbox);
        }
    }

    fn ask_owners(&self, name: Name, wanted: Mode, outbox: &mut Outbox) {
        let Some(lock) = self.locks.get(&name) else {
            return;
        };
        for &(member, mode) in &lock.granted {
            if !mode.compatible(wanted) {
                self.tell(outbox, member, Told::Demote(name, wanted));
            }
        }
    }

    fn remove(&mut self, member: u64) -> Outbox {
        let mut outbox = Outbox::new();
        self.members.remove(&member);
        let mut touched = Vec::new();
        for (&name, lock) in &mut self.locks {
            let before = lock.granted.len() + lock.waiting.len();
            lock.granted.retain(|&(owner, _)| owner != member);
            lock.waiting.retain(|&(owner, _)| owner != member);
            if lock.granted.len() + lock.waiting.len() < before {
                touched.push(name);
            }
        }
        for name in touched {
            self.grant(name, &mut outbox);
        }
        outbox
    }
}
