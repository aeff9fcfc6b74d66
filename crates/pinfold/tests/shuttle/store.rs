//! A store that is tasks of the scheduler: transfers end late, in any order, piece by piece; some of them fail or fall short.

use std::ops::Range;
use std::sync::Arc;

use pinfold::{Errno, Object, Progress, Seek};
use pinfold_base::sync::{Condvar, Mutex};
use pinfold_store::{Geometry, Operation, StoreError, StoreResult, SyncScope, Transfer};
use shuttle::rand::Rng;
use shuttle::thread::JoinHandle;

/// Bytes that move at once: half a page, so that others come in between.
const PIECE: usize = 2048;
/// Transfers under way at once.
const TASKS: usize = 2;

/// What happens to one of the writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mishap {
    None,
    /// It is refused after its first piece.
    Refused,
    /// It ends after its first piece, and does not say why.
    Short,
}

#[derive(Debug)]
struct State {
    bytes: Vec<u8>,
    /// What would be there after a loss of power.
    durable: Vec<u8>,
    queue: Vec<(Operation, Transfer)>,
    ends: bool,
    /// Writes until one meets its mishap.
    good: u32,
    mishap: Mishap,
}

/// The store's one file.
#[derive(Debug)]
pub struct Stored {
    state: Mutex<State>,
    more: Condvar,
}

/// The tasks that make transfers; they end with [`Device::end`].
pub struct Device {
    pub stored: Arc<Stored>,
    tasks: Vec<JoinHandle<()>>,
}

impl Device {
    /// Starts a store whose write number `good`, counted from 0, meets `mishap`.
    pub fn start(good: u32, mishap: Mishap) -> Self {
        let stored = Arc::new(Stored {
            state: Mutex::new(State {
                bytes: Vec::new(),
                durable: Vec::new(),
                queue: Vec::new(),
                ends: false,
                good,
                mishap,
            }),
            more: Condvar::new(),
        });
        let serve = |_| {
            let stored = Arc::clone(&stored);
            shuttle::thread::spawn(move || stored.serve())
        };
        let tasks = (0..TASKS).map(serve).collect();
        Self { stored, tasks }
    }

    /// Ends the tasks. Nothing is under way.
    pub fn end(self) {
        self.stored.state.lock().ends = true;
        self.stored.more.notify_all();
        for task in self.tasks {
            task.join().unwrap();
        }
    }
}

impl Stored {
    pub fn bytes(&self) -> Vec<u8> {
        self.state.lock().bytes.clone()
    }

    pub fn durable(&self) -> Vec<u8> {
        self.state.lock().durable.clone()
    }

    /// Tells whether the mishap has not come yet.
    pub fn all_well(&self) -> bool {
        self.state.lock().mishap != Mishap::None
    }

    fn serve(&self) {
        let mut state = self.state.lock();
        loop {
            if !state.queue.is_empty() {
                let which = shuttle::rand::thread_rng().gen_range(0..state.queue.len());
                let (operation, transfer) = state.queue.swap_remove(which);
                drop(state);
                self.make(operation, transfer);
                state = self.state.lock();
            } else if state.ends {
                return;
            } else {
                state = self.more.wait(state);
            }
        }
    }

    /// Takes the next write's mishap.
    fn mishap(&self) -> Mishap {
        let mut state = self.state.lock();
        if state.good > 0 {
            state.good -= 1;
            return Mishap::None;
        }
        std::mem::replace(&mut state.mishap, Mishap::None)
    }

    fn make(&self, operation: Operation, transfer: Transfer) {
        let Transfer {
            offset,
            segments,
            done,
        } = transfer;
        let len = segments.bytes();
        let mishap = if operation == Operation::Write {
            self.mishap()
        } else {
            Mishap::None
        };
        let mut outcome = Progress::complete(0);
        while (outcome.done as usize) < len {
            let at = outcome.done as usize;
            let n = PIECE.min(len - at);
            let from = offset as usize + at;
            let part = segments.slice(at, n);
            let moved = if operation == Operation::Write {
                let new = part.to_vec();
                let mut state = self.state.lock();
                if state.bytes.len() < from + n {
                    state.bytes.resize(from + n, 0);
                }
                state.bytes[from..from + n].copy_from_slice(&new);
                n
            } else {
                let state = self.state.lock();
                let have = state.bytes.len();
                part.copy_from(0, &state.bytes[from.min(have)..(from + n).min(have)])
            };
            outcome.done += moved as u64;
            match mishap {
                Mishap::Refused => {
                    outcome.stop = Some(refusal(operation, offset, len));
                    break;
                }
                Mishap::Short => break,
                Mishap::None if moved < n => break,
                Mishap::None => {}
            }
        }
        drop(segments);
        done(outcome);
    }

    fn push(&self, operation: Operation, batch: Vec<Transfer>) {
        let mut state = self.state.lock();
        let batch = batch.into_iter().map(|transfer| (operation, transfer));
        state.queue.extend(batch);
        drop(state);
        self.more.notify_all();
    }
}

fn refusal(operation: Operation, offset: u64, len: usize) -> StoreError {
    StoreError {
        operation,
        offset,
        len: len as u64,
        errno: Errno::EIO,
    }
}

impl Object for Stored {
    fn geometry(&self) -> Geometry {
        Geometry {
            block: 1,
            memory: 1,
            transfer_best: 1 << 20,
            direct: true,
        }
    }

    fn read(&self, batch: Vec<Transfer>) {
        self.push(Operation::Read, batch);
    }

    fn write(&self, batch: Vec<Transfer>) {
        self.push(Operation::Write, batch);
    }

    fn len(&self) -> StoreResult<u64> {
        Ok(self.state.lock().bytes.len() as u64)
    }

    fn set_len(&self, len: u64) -> StoreResult<()> {
        self.state.lock().bytes.resize(len as usize, 0);
        Ok(())
    }

    fn allocate(&self, _range: Range<u64>) -> StoreResult<()> {
        Ok(())
    }

    fn punch(&self, range: Range<u64>) -> StoreResult<()> {
        let mut state = self.state.lock();
        let end = state.bytes.len();
        state.bytes[(range.start as usize).min(end)..(range.end as usize).min(end)].fill(0);
        Ok(())
    }

    fn sync(&self, _scope: SyncScope) -> StoreResult<()> {
        let mut state = self.state.lock();
        state.durable = state.bytes.clone();
        Ok(())
    }

    fn seek(&self, _what: Seek, offset: u64) -> StoreResult<Option<u64>> {
        Ok(Some(offset))
    }
}
