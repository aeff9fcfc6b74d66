//! Taking pages of shared files away from the kernel when another node may change them.
//!
//! On a shared mount the kernel has pages for private mappings alone. What those show of later changes is nobody's promise,
//! but they are not to show a file's old contents for as long as memory lasts.
//!
//! *Owns*: which files are to be invalidated; the thread that does it.
//!
//! *Does not own*: glocks, what is known of the kernel's pages ([`crate::inodes`]).
//!
//! *Locking*: one leaf. A demotion is never waited with: an invalidation waits for pages that are being filled, and that
//! waits for the very glock.

use std::collections::HashSet;
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use fuser::{INodeNo, Notifier};
use parking_lot::{Condvar, Mutex};
use pinfold::glocks::Mode;
use pinfold::{Demoted, NodeId};

use crate::inodes::Inodes;

/// Files that wait at once; with more, all that the kernel has pages of are taken.
const QUEUE_MAX: usize = 4096;

/// The way from a volume's demotions to the kernel. Made before the volume is opened, and given to the mount.
#[derive(Debug, Clone, Default)]
pub struct Revoker(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    inodes: OnceLock<Weak<Inodes>>,
    queue: Mutex<Queue>,
    filled: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    numbers: HashSet<u64>,
    /// There were too many.
    all: bool,
}

impl Revoker {
    /// What [`pinfold::VolumeBuilder::demoted`] is to call.
    #[must_use]
    pub fn demoted(&self) -> Demoted {
        let shared = Arc::downgrade(&self.0);
        Arc::new(move |id, to| {
            if let Some(shared) = shared.upgrade()
                && to != Mode::Shared
            {
                shared.take(id);
            }
        })
    }

    /// Starts the thread; it ends with the mount's inodes.
    pub(crate) fn start(&self, inodes: &Arc<Inodes>, notifier: Notifier) -> std::io::Result<()> {
        let weak = Arc::downgrade(inodes);
        let shared = Arc::clone(&self.0);
        let theirs = Weak::clone(&weak);
        std::thread::Builder::new()
            .name("pinfold-revoke".into())
            .spawn(move || shared.run(&theirs, &notifier))?;
        // Started once for each mount; a second one would have a revoker of its own.
        let _ = self.0.inodes.set(weak);
        Ok(())
    }
}

impl Shared {
    fn take(&self, id: NodeId) {
        let inodes = self.inodes.get().and_then(Weak::upgrade);
        let Some(number) = inodes.and_then(|inodes| inodes.paged_number(id)) else {
            return;
        };
        let mut queue = self.queue.lock();
        if queue.numbers.len() < QUEUE_MAX {
            queue.numbers.insert(number);
        } else {
            queue.all = true;
        }
        self.filled.notify_one();
    }

    fn run(&self, inodes: &Weak<Inodes>, notifier: &Notifier) {
        /// How often the thread looks whether the mount is still there.
        const LOOK: Duration = Duration::from_secs(1);
        loop {
            let taken = {
                let mut queue = self.queue.lock();
                if queue.numbers.is_empty() {
                    self.filled.wait_for(&mut queue, LOOK);
                }
                std::mem::take(&mut *queue)
            };
            let Some(inodes) = inodes.upgrade() else {
                return;
            };
            let numbers = if taken.all {
                inodes.paged_numbers()
            } else {
                taken.numbers.into_iter().collect()
            };
            drop(inodes);
            for number in numbers {
                // From the beginning to wherever the end is.
                if let Err(error) = notifier.inval_inode(INodeNo(number), 0, 0) {
                    tracing::debug!(%error, number, "cannot invalidate the kernel's pages");
                }
            }
        }
    }
}
