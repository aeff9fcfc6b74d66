//! The fallback: a few threads that transfer in place.

use std::collections::VecDeque;
use std::sync::Arc;
use std::thread::JoinHandle;

use parking_lot::{Condvar, Mutex};
use pinfold_base::Errno;
use smallvec::SmallVec;

use super::{Request, Shared, inline};
use crate::quiet::keep_signals_away;

/// What is to be done, and whether more can come.
#[derive(Debug, Default)]
struct State {
    list: VecDeque<Request>,
    closing: bool,
}

/// The list the threads share.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    state: Mutex<State>,
    work: Condvar,
}

impl Inbox {
    pub fn push(&self, batch: SmallVec<[Request; 4]>) {
        let many = batch.len() > 1;
        self.state.lock().list.extend(batch);
        if many {
            self.work.notify_all();
        } else {
            self.work.notify_one();
        }
    }

    pub fn close(&self) {
        self.state.lock().closing = true;
        self.work.notify_all();
    }

    /// Waits for a request; `None` when the list is empty and closed.
    fn take(&self) -> Option<Request> {
        let mut state = self.state.lock();
        loop {
            if let Some(request) = state.list.pop_front() {
                return Some(request);
            }
            if state.closing {
                return None;
            }
            self.work.wait(&mut state);
        }
    }
}

/// Starts one thread over `inbox`.
pub(super) fn start(
    number: usize,
    inbox: Arc<Inbox>,
    shared: Arc<Shared>,
) -> Result<JoinHandle<()>, Errno> {
    std::thread::Builder::new()
        .name(format!("pinfold-io-{number}"))
        .spawn(move || {
            keep_signals_away();
            while let Some(request) = inbox.take() {
                let Request {
                    op,
                    file,
                    offset,
                    segments,
                    block,
                    done,
                } = request;
                let outcome = inline::transfer(op, &file, offset, &segments, block);
                shared.counters.pieces_plain.bump();
                // Released first: whoever waits for the completion may count on descriptor and memory being free.
                drop((file, segments));
                shared.complete(done, outcome);
            }
        })
        .map_err(Errno::from)
}
