//! Locks of programs on a shared mount, of records (fcntl(2)) and of whole files (flock(2)): they have to hold against other
//! nodes' programs, so the store keeps them. On other mounts the kernel does.
//!
//! *Owns*: a descriptor for each file and owner that may have locks; who waits for one.
//!
//! *Does not own*: what the locks are worth ([`pinfold::RecordLocks`]).
//!
//! *Locking*: two leaves, never both. A store's answer is not waited for under either.
//!
//! A thread of its own tries again for those that wait, so that they hold up none that serves requests. The protocol
//! library passes no interruptions on: whoever has a signal to see to is told so by this thread (EINTR). Nor does it say which
//! of the two a request is for ([`caller`]).
//!
//! An owner of fcntl's is a process, whose locks go when it closes any descriptor of the file (FLUSH). One of flock's, and of
//! fcntl's locks of an open file, is that open file: its locks go with it (RELEASE).

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Weak};
use std::time::Duration;

use fuser::{Errno, INodeNo, LockOwner, ReplyEmpty};
use parking_lot::{Condvar, Mutex};
use pinfold::{Node, RecordLock, RecordLocks};

mod caller;

use caller::{Call, call_of, is_called};

/// How often a lock is tried for that somebody waits for.
const STEP: Duration = Duration::from_millis(5);
/// Threads that wait for a lock at once; more are told that there are none left (ENOLCK).
const WAITING_MAX: usize = 1024;
/// The kernel's "to the end, however far that is".
const LAST: u64 = i64::MAX.unsigned_abs();

/// The locks of one mount's programs.
#[derive(Debug, Default)]
pub(crate) struct Locks {
    /// By inode.
    held: Mutex<HashMap<u64, Vec<Owner>>>,
    waiting: Mutex<Vec<Waiting>>,
    begun: Condvar,
}

/// Somebody who may have locks on a file.
#[derive(Debug)]
struct Owner {
    owner: u64,
    /// The open file that the last of them was asked for through.
    handle: u64,
    locks: Arc<RecordLocks>,
}

#[derive(Debug)]
struct Waiting {
    wish: Wish,
    locks: Arc<RecordLocks>,
    what: What,
    /// Which of the kernel's threads.
    thread: u32,
    /// Whether it waits for others to let go.
    sleeps: bool,
    reply: ReplyEmpty,
}

/// What a request is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    Records,
    File,
    /// Not known yet: whoever asks is still on its way to wait for the answer.
    Untold,
    /// Nobody tells. Such a request of flock's is taken for all records, as network filesystems do.
    Hidden,
}

/// A program's wish for a lock.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wish {
    pub(crate) number: INodeNo,
    pub(crate) handle: u64,
    pub(crate) owner: LockOwner,
    /// As in `flock.l_type`.
    pub(crate) kind: i32,
    pub(crate) start: u64,
    /// The last byte.
    pub(crate) end: u64,
}

impl Wish {
    fn range(&self) -> Range<u64> {
        let end = if self.end >= LAST {
            u64::MAX
        } else {
            self.end + 1
        };
        self.start..end
    }

    fn lock(&self) -> Result<Option<RecordLock>, Errno> {
        match self.kind {
            libc::F_RDLCK => Ok(Some(RecordLock::Read)),
            libc::F_WRLCK => Ok(Some(RecordLock::Write)),
            libc::F_UNLCK => Ok(None),
            _ => Err(Errno::EINVAL),
        }
    }

    /// What it may be for: requests of flock's are for all there is.
    fn what(&self) -> What {
        if self.range() == (0..u64::MAX) {
            What::Untold
        } else {
            What::Records
        }
    }
}

impl Waiting {
    /// Tries once; `None` if it has to be tried again.
    fn attempt(&mut self) -> Option<Result<(), Errno>> {
        if self.what == What::Untold {
            self.what = match call_of(self.thread) {
                Call::Flock => What::File,
                Call::Other => What::Records,
                Call::Hidden => What::Hidden,
                Call::Running => return None,
                Call::Gone => return Some(Err(Errno::EINTR)),
            };
        }
        match self.set() {
            Ok(true) => Some(Ok(())),
            Err(error) => Some(Err(error)),
            Ok(false) if !self.sleeps => Some(Err(Errno::EAGAIN)),
            Ok(false) if is_called(self.thread) => Some(Err(Errno::EINTR)),
            Ok(false) => None,
        }
    }

    fn set(&self) -> Result<bool, Errno> {
        let lock = self.wish.lock()?;
        let records = || self.locks.set(lock, &self.wish.range()).map_err(refused);
        let file = || self.locks.set_file(lock).map_err(refused);
        match self.what {
            What::File => file(),
            // Whichever of them it has.
            What::Hidden if lock.is_none() => Ok(file()? & records()?),
            What::Records | What::Hidden | What::Untold => records(),
        }
    }
}

fn refused(error: pinfold::Error) -> Errno {
    crate::attributes::errno(error.errno())
}

fn answer(outcome: Result<(), Errno>, reply: ReplyEmpty) {
    match outcome {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(error),
    }
}

impl Locks {
    /// Starts the thread that tries for those that wait; it ends with this.
    pub(crate) fn start(self: &Arc<Self>) -> std::io::Result<()> {
        let locks = Arc::downgrade(self);
        std::thread::Builder::new()
            .name("pinfold-locks".into())
            .spawn(move || try_again(&locks))?;
        Ok(())
    }

    /// The locks of an owner that is known, as they are asked for by one that waits.
    fn now_of(&self, wish: &Wish) -> Option<Arc<RecordLocks>> {
        let held = self.held.lock();
        let mut owners = held.get(&wish.number.0)?.iter();
        let owner = owners.find(|owner| owner.owner == wish.owner.0)?;
        Some(Arc::clone(&owner.locks))
    }

    /// The locks of an owner that is known.
    fn known(&self, wish: &Wish) -> Option<Arc<RecordLocks>> {
        let mut held = self.held.lock();
        let mut owners = held.get_mut(&wish.number.0)?.iter_mut();
        let owner = owners.find(|owner| owner.owner == wish.owner.0)?;
        owner.handle = wish.handle;
        Some(Arc::clone(&owner.locks))
    }

    fn of(&self, node: &Node, wish: &Wish) -> Result<Arc<RecordLocks>, Errno> {
        if let Some(locks) = self.known(wish) {
            return Ok(locks);
        }
        let opened = Arc::new(node.record_locks().map_err(refused)?);
        let mut held = self.held.lock();
        let owners = held.entry(wish.number.0).or_default();
        // Another thread of the same owner may have been faster.
        if let Some(owner) = owners.iter().find(|owner| owner.owner == wish.owner.0) {
            return Ok(Arc::clone(&owner.locks));
        }
        owners.push(Owner {
            owner: wish.owner.0,
            handle: wish.handle,
            locks: Arc::clone(&opened),
        });
        Ok(opened)
    }

    /// Puts a lock on, or takes one off, for `thread`; if it `sleeps`, waits for others to let go.
    pub(crate) fn set(
        &self,
        node: &Node,
        wish: Wish,
        (thread, sleeps): (u32, bool),
        reply: ReplyEmpty,
    ) {
        let found = match wish.lock() {
            // Who has no locks has none to give back.
            Ok(None) => Ok(self.known(&wish)),
            Ok(Some(_)) => self.of(node, &wish).map(Some),
            Err(error) => Err(error),
        };
        let locks = match found {
            Ok(Some(locks)) => locks,
            Ok(None) => return reply.ok(),
            Err(error) => return reply.error(error),
        };
        let mut waiting = Waiting {
            what: wish.what(),
            wish,
            locks,
            thread,
            sleeps,
            reply,
        };
        match waiting.attempt() {
            Some(outcome) => answer(outcome, waiting.reply),
            None => self.wait(waiting),
        }
    }

    /// Finds a lock of records that is in the way.
    pub(crate) fn conflict(
        &self,
        node: &Node,
        wish: &Wish,
    ) -> Result<Option<(i32, Range<u64>)>, Errno> {
        let Some(lock) = wish.lock()? else {
            return Err(Errno::EINVAL);
        };
        let locks = self.of(node, wish)?;
        let found = locks.conflict(lock, &wish.range()).map_err(refused)?;
        Ok(found.map(|(lock, range)| {
            let kind = match lock {
                RecordLock::Read => libc::F_RDLCK,
                RecordLock::Write => libc::F_WRLCK,
            };
            (kind, range)
        }))
    }

    /// Gives back all that a process has on a file: it closed a descriptor of it.
    pub(crate) fn release(&self, number: INodeNo, owner: LockOwner) {
        self.release_if(number, |has| has.owner == owner.0);
    }

    /// Gives back all that an open file has: it is no more. Processes gave theirs back when they closed it.
    pub(crate) fn close(&self, number: INodeNo, handle: u64) {
        self.release_if(number, |has| has.handle == handle);
    }

    fn release_if(&self, number: INodeNo, gone: impl Fn(&Owner) -> bool) {
        let mut released = Vec::new();
        let mut held = self.held.lock();
        if let Some(owners) = held.get_mut(&number.0) {
            released.extend(owners.extract_if(.., |owner| gone(owner)));
            if owners.is_empty() {
                held.remove(&number.0);
            }
        }
        drop(held);
        // Closed, if nobody waits through them, with nothing held.
        drop(released);
    }

    fn wait(&self, waiting: Waiting) {
        let mut queue = self.waiting.lock();
        if queue.len() >= WAITING_MAX {
            drop(queue);
            return waiting.reply.error(Errno::ENOLCK);
        }
        queue.push(waiting);
        self.begun.notify_one();
    }

    /// Tries once for each that waits. One that came first is tried first.
    fn try_all(&self) {
        let queue = std::mem::take(&mut *self.waiting.lock());
        let mut left = Vec::with_capacity(queue.len());
        for mut waiting in queue {
            // By what its owner has now. Another thread may have given all of that back, by closing a descriptor, and have
            // begun anew: a lock got through what was there before would go with it, and those keep others out until then.
            let Some(locks) = self.now_of(&waiting.wish) else {
                waiting.reply.error(Errno::EBADF);
                continue;
            };
            waiting.locks = locks;
            match waiting.attempt() {
                Some(outcome) => answer(outcome, waiting.reply),
                None => left.push(waiting),
            }
        }
        let mut queue = self.waiting.lock();
        // Those that came meanwhile go behind.
        left.append(&mut queue);
        *queue = left;
    }
}

fn try_again(locks: &Weak<Locks>) {
    /// How often the thread looks whether the mount is still there.
    const LOOK: Duration = Duration::from_secs(1);
    while let Some(locks) = locks.upgrade() {
        let mut queue = locks.waiting.lock();
        if queue.is_empty() {
            locks.begun.wait_for(&mut queue, LOOK);
        }
        let nobody = queue.is_empty();
        drop(queue);
        if !nobody {
            locks.try_all();
            drop(locks);
            std::thread::sleep(STEP);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_s_ranges_become_ours() {
        let wish = |start, end| Wish {
            number: INodeNo(2),
            handle: 3,
            owner: LockOwner(1),
            kind: libc::F_RDLCK,
            start,
            end,
        };
        assert_eq!(wish(0, 0).range(), 0..1);
        assert_eq!(wish(5, LAST).range(), 5..u64::MAX);
        assert_eq!(wish(0, LAST).what(), What::Untold);
        assert_eq!(wish(0, LAST - 1).what(), What::Records);
    }
}
