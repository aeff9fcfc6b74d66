//! Record locks (fcntl(2)) of programs on a shared mount: they have to hold against other nodes' programs, so the store keeps
//! them. On other mounts the kernel does.
//!
//! *Owns*: a descriptor for each file and owner that may have locks; who waits for one.
//!
//! *Does not own*: what the locks are worth ([`pinfold::RecordLocks`]).
//!
//! *Locking*: two leaves, never both. A store's answer is not waited for under either.
//!
//! A thread of its own tries again for those that wait, so that they hold up none that serves requests. The protocol
//! library passes no interruptions on: whoever has a signal to see to is told so by this thread (EINTR).

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Weak};
use std::time::Duration;

use fuser::{Errno, INodeNo, LockOwner, ReplyEmpty};
use parking_lot::{Condvar, Mutex};
use pinfold::{Node, RecordLock, RecordLocks};

/// How often a lock is tried for that somebody waits for.
const STEP: Duration = Duration::from_millis(5);
/// Threads that wait for a lock at once; more are told that there are none left (ENOLCK).
const WAITING_MAX: usize = 1024;

type Key = (u64, u64);

/// The locks of one mount's programs.
#[derive(Debug, Default)]
pub(crate) struct Locks {
    held: Mutex<HashMap<Key, Arc<RecordLocks>>>,
    waiting: Mutex<Vec<Waiting>>,
    begun: Condvar,
}

#[derive(Debug)]
struct Waiting {
    key: Key,
    locks: Arc<RecordLocks>,
    lock: RecordLock,
    range: Range<u64>,
    /// Which of the kernel's threads.
    thread: u32,
    reply: ReplyEmpty,
}

/// A program's wish for a lock.
#[derive(Debug)]
pub(crate) struct Wish {
    pub(crate) number: INodeNo,
    pub(crate) owner: LockOwner,
    /// As in `flock.l_type`.
    pub(crate) kind: i32,
    pub(crate) start: u64,
    /// The last byte.
    pub(crate) end: u64,
}

impl Wish {
    fn key(&self) -> Key {
        (self.number.0, self.owner.0)
    }

    /// The kernel's "to the end, however far that is" is its largest offset.
    fn range(&self) -> Range<u64> {
        const LAST: u64 = i64::MAX.unsigned_abs();
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
}

fn refused(error: pinfold::Error) -> Errno {
    crate::attributes::errno(error.errno())
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

    fn of(&self, node: &Node, key: Key) -> Result<Arc<RecordLocks>, Errno> {
        if let Some(locks) = self.held.lock().get(&key) {
            return Ok(Arc::clone(locks));
        }
        let opened = Arc::new(node.record_locks().map_err(refused)?);
        let mut held = self.held.lock();
        Ok(Arc::clone(held.entry(key).or_insert(opened)))
    }

    /// Puts a lock on, or takes one off; `thread` waits for it if it is given.
    pub(crate) fn set(&self, node: &Node, wish: &Wish, thread: Option<u32>, reply: ReplyEmpty) {
        let key = wish.key();
        let outcome = (|| {
            let lock = wish.lock()?;
            if lock.is_none() && !self.held.lock().contains_key(&key) {
                return Ok(None);
            }
            let locks = self.of(node, key)?;
            let done = locks.set(lock, &wish.range()).map_err(refused)?;
            Ok((!done).then_some((locks, lock)))
        })();
        match (outcome, thread) {
            (Ok(None), _) => reply.ok(),
            (Ok(Some((locks, Some(lock)))), Some(thread)) => self.wait(Waiting {
                key,
                locks,
                lock,
                range: wish.range(),
                thread,
                reply,
            }),
            (Ok(Some(_)), _) => reply.error(Errno::EAGAIN),
            (Err(error), _) => reply.error(error),
        }
    }

    /// Finds a lock that is in the way.
    pub(crate) fn conflict(
        &self,
        node: &Node,
        wish: &Wish,
    ) -> Result<Option<(i32, Range<u64>)>, Errno> {
        let Some(lock) = wish.lock()? else {
            return Err(Errno::EINVAL);
        };
        let locks = self.of(node, wish.key())?;
        let found = locks.conflict(lock, &wish.range()).map_err(refused)?;
        Ok(found.map(|(lock, range)| {
            let kind = match lock {
                RecordLock::Read => libc::F_RDLCK,
                RecordLock::Write => libc::F_WRLCK,
            };
            (kind, range)
        }))
    }

    /// Gives back all that an owner has on a file: it closed a descriptor of it.
    pub(crate) fn release(&self, number: INodeNo, owner: LockOwner) {
        let released = self.held.lock().remove(&(number.0, owner.0));
        // Closed, if nobody waits through it, with nothing held.
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
        for waiting in queue {
            match waiting.locks.set(Some(waiting.lock), &waiting.range) {
                Ok(true) => waiting.reply.ok(),
                Err(error) => waiting.reply.error(refused(error)),
                Ok(false) if !self.held.lock().contains_key(&waiting.key) => {
                    // The owner closed the file meanwhile, with another of its threads.
                    waiting.reply.error(Errno::EBADF);
                }
                Ok(false) if is_called(waiting.thread) => waiting.reply.error(Errno::EINTR),
                Ok(false) => left.push(waiting),
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

/// Tells whether a thread has a signal to see to, or is gone.
fn is_called(thread: u32) -> bool {
    let Ok(status) = std::fs::read_to_string(format!("/proc/{thread}/status")) else {
        return true;
    };
    let mask = |field: &str| {
        let mut lines = status.lines();
        let line = lines.find_map(|line| line.strip_prefix(field));
        line.and_then(|mask| u64::from_str_radix(mask.trim_start_matches(':').trim(), 16).ok())
            .unwrap_or(0)
    };
    let pending = mask("SigPnd") | mask("ShdPnd");
    pending & !mask("SigBlk") & !mask("SigIgn") != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_is_gone_or_not_called_is_told_apart() {
        assert!(!is_called(std::process::id()));
        assert!(is_called(u32::MAX));
    }

    #[test]
    fn the_kernel_s_ranges_become_ours() {
        let range = |start, end| {
            Wish {
                number: INodeNo(2),
                owner: LockOwner(1),
                kind: libc::F_RDLCK,
                start,
                end,
            }
            .range()
        };
        assert_eq!(range(0, 0), 0..1);
        assert_eq!(range(5, i64::MAX.unsigned_abs()), 5..u64::MAX);
    }
}
