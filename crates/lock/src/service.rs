//! The seam to whoever knows which node holds what: [`local`] in one process, [`scripted`] for tests, `etcd` between
//! processes and machines.
//!
//! *Owns*: the traits and what passes through them; the services.
//!
//! *Does not own*: the queue of a node, what is done before a lock is given up.
//!
//! *Locking*: a service calls [`Events`] with nothing of its own held, and a node calls a [`Session`] with nothing held.

use std::fmt;
use std::sync::Weak;

use pinfold_base::Errno;

use crate::clock::Time;
use crate::mode::{Flags, Mode};

#[cfg(feature = "etcd")]
pub mod etcd;
pub mod local;
pub mod scripted;

/// A lock's name: what tells a file from all others of the volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name {
    /// The inode number. Two glocks are taken in the order of their numbers (H-10).
    pub number: u64,
    /// Which file of that number: numbers are used again.
    pub generation: u64,
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}/{:x}", self.number, self.generation)
    }
}

/// A number that grows with every grant of a lock that could conflict with an earlier one. A store that compares it
/// refuses what a node sends after it lost the lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token(pub u64);

/// What a service does with a request that it cannot grant at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Wait {
    /// Queues it, first come, first served, and asks the owners to give way.
    Queue,
    /// Refuses it.
    Try,
    /// Refuses it and asks the owners once to give way.
    TryAsking,
}

impl Wait {
    pub(crate) const fn of(flags: Flags) -> Self {
        if flags.has(Flags::TRY) {
            Self::Try
        } else if flags.has(Flags::TRY_1CB) {
            Self::TryAsking
        } else {
            Self::Queue
        }
    }
}

/// The one answer to [`Session::request`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reply {
    /// The node has the lock in `mode` now, usually the mode asked for. After a fall that is UN.
    Granted {
        /// The mode.
        mode: Mode,
        /// Its fencing token; without meaning for UN.
        token: Token,
    },
    /// A request that was not to wait would have had to.
    Refused,
    /// The service failed, and the node has what it had.
    Failed(Errno),
}

/// What a service tells a node.
pub trait Events: Send + Sync {
    /// Answers a request.
    fn reply(&self, name: Name, reply: Reply);

    /// Another node wants the lock in `wanted`. May be told more than once, and late.
    fn demote(&self, name: Name, wanted: Mode);

    /// A node died: replies that give rights are kept until [`Events::thaw`] with the same number. A later number
    /// replaces an earlier one, whose end then means nothing (H-15).
    fn freeze(&self, generation: u64);

    /// The recovery is over.
    fn thaw(&self, generation: u64);

    /// The node's membership is over, or cannot be relied on: it stops.
    fn lost(&self, errno: Errno);
}

/// How a node found out that dead nodes write no more, and how often.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FenceCounts {
    /// Processes of this machine that had ended.
    pub gone: u64,
    /// Stopped processes of this machine that were killed.
    pub killed: u64,
    /// Fence commands that succeeded.
    pub fenced: u64,
    /// Fence commands that failed.
    pub failed: u64,
    /// Nodes for which the grace had to be waited for.
    pub waited: u64,
}

/// Messages about locks between a node and its service since it joined. Keeping the membership alive is none of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Changes asked for: claims, falls, recoveries; each sending counts.
    pub changes: u64,
    /// Questions that change nothing.
    pub reads: u64,
    /// Changes told of, the node's own among them.
    pub told: u64,
}

/// One node's membership.
pub trait Session: Send + Sync + fmt::Debug {
    /// Asks to change `name` from one mode to another and returns at once; the answer is one [`Events::reply`], perhaps
    /// from within. There is one request under way for each name. It is a fall ([`Mode::falls_to`]), which never
    /// waits, or a rise from UN.
    fn request(&self, name: Name, from: Mode, to: Mode, wait: Wait);

    /// Until when this node may use its locks, by its own clock; `None` if nothing but the process ends it.
    fn good_until(&self) -> Option<Time>;

    /// Tells what this node did about others' deaths; nothing where the service has no such thing.
    fn fencing(&self) -> FenceCounts {
        FenceCounts::default()
    }

    /// Tells what was said so far; nothing where nothing travels.
    fn traffic(&self) -> Traffic {
        Traffic::default()
    }

    /// Leaves in good order: every lock was given up.
    fn leave(&self);

    /// Stops being a member without giving anything up: others get the locks after fencing.
    fn abandon(&self);
}

/// Why a node could not join.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JoinError {
    /// Its number.
    pub errno: Errno,
    /// What to tell a person.
    pub why: String,
}

impl fmt::Display for JoinError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.why)
    }
}

impl std::error::Error for JoinError {}

impl JoinError {
    pub(crate) fn new(errno: Errno, why: impl Into<String>) -> Self {
        Self {
            errno,
            why: why.into(),
        }
    }
}

/// Who decides which node has which lock.
pub trait LockService: Send + Sync + fmt::Debug {
    /// Makes a member called `member` that is told through `events`.
    ///
    /// # Errors
    /// EEXIST if there is a member of that name; what else keeps a service from working.
    fn join(&self, member: &str, events: Weak<dyn Events>) -> Result<Box<dyn Session>, JoinError>;
}
