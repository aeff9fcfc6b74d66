//! The descriptors that a fault's own thread reads through.
//!
//! That thread may be in a signal handler, on top of one that holds the allocator's lock. So it takes no lock under which
//! anybody allocates, frees or closes, and never has the last reference to a descriptor: whoever replaces one waits for
//! the reads under way.
//!
//! *Owns*: a copy of the reader's descriptors, and who reads through them now.
//!
//! *Does not own*: which descriptors a file has (`files.rs`).
//!
//! *Locking*: a leaf around the copy, which handlers wait for, and one around its changes, which they do not.

use std::sync::Arc;

use pinfold_base::sync::{Condvar, Mutex};

use super::files::Pair;

#[derive(Debug, Default)]
pub(super) struct Here {
    state: Mutex<State>,
    unused: Condvar,
    /// One change at a time.
    changes: Mutex<()>,
}

#[derive(Debug, Default)]
struct State {
    pair: Option<Pair>,
    /// Reads under way.
    users: usize,
    /// Somebody waits for them: no more begin.
    changing: bool,
}

impl Here {
    /// Runs `read` with the descriptors; `None` where there are none just now. Allocates and frees nothing.
    pub fn with<R>(&self, read: impl FnOnce(&Pair) -> R) -> Option<R> {
        let mut state = self.state.lock();
        if state.changing {
            return None;
        }
        let pair = state.pair.clone()?;
        state.users += 1;
        drop(state);
        let using = Using {
            here: self,
            pair: Some(pair),
        };
        using.pair.as_ref().map(read)
    }

    /// Makes the copy what `current` says, which is asked with nothing of this held but the turn to change it.
    pub fn follow(&self, current: impl FnOnce() -> Option<Pair>) {
        let _turn = self.changes.lock();
        let mut new = current();
        let mut state = self.state.lock();
        if same(state.pair.as_ref(), new.as_ref()) {
            return;
        }
        state.changing = true;
        while state.users > 0 {
            state = self.unused.wait(state);
        }
        state.changing = false;
        std::mem::swap(&mut state.pair, &mut new);
        drop(state);
        // Closes what nobody else has, without the lock.
        drop(new);
    }
}

fn same(a: Option<&Pair>, b: Option<&Pair>) -> bool {
    match (a, b) {
        (None, None) => true,
        (Some(a), Some(b)) => Arc::ptr_eq(&a.plain, &b.plain),
        _ => false,
    }
}

/// A read under way.
struct Using<'a> {
    here: &'a Here,
    pair: Option<Pair>,
}

impl Drop for Using<'_> {
    fn drop(&mut self) {
        // Not the last references: `follow` keeps those in the state until it finds no user.
        self.pair = None;
        let mut state = self.here.state.lock();
        state.users -= 1;
        if state.users == 0 && state.changing {
            self.here.unused.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::OwnedFd;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;

    use super::*;

    fn pair() -> Pair {
        Pair {
            plain: Arc::new(OwnedFd::from(File::open("/dev/null").unwrap())),
            direct: None,
            block: 1,
            memory: 1,
            len: 0,
        }
    }

    #[test]
    fn whoever_replaces_descriptors_waits_for_those_who_read_and_nobody_else_begins() {
        let here = Arc::new(Here::default());
        assert!(here.with(|_| ()).is_none());
        let (first, second) = (pair(), pair());
        let plain = Arc::downgrade(&first.plain);
        here.follow(|| Some(first));
        let replaced = Arc::new(AtomicBool::new(false));
        let changer = {
            let (here, replaced) = (Arc::clone(&here), Arc::clone(&replaced));
            move || {
                here.follow(|| Some(second));
                replaced.store(true, Ordering::SeqCst);
            }
        };
        let changer = here
            .with(|read| {
                let changer = std::thread::spawn(changer);
                // Until the change has begun; from then on nobody else may begin.
                while here.with(|_| ()).is_some() {
                    std::thread::sleep(Duration::from_millis(1));
                }
                assert!(!replaced.load(Ordering::SeqCst));
                assert!(
                    Arc::strong_count(&read.plain) >= 2,
                    "ours would be the last"
                );
                changer
            })
            .unwrap();
        changer.join().unwrap();
        assert!(plain.upgrade().is_none(), "closed by who replaced it");
        assert!(here.with(|_| ()).is_some());
        here.follow(|| None);
        assert!(here.with(|_| ()).is_none());
    }
}
