use std::cell::Cell;
use std::sync::mpsc;

use super::*;

/// Longer than any test takes, however busy the machine.
const PATIENCE: Duration = Duration::from_secs(120);

thread_local! {
    /// Threads that the calling one may still start.
    static THREADS_LEFT: Cell<usize> = const { Cell::new(usize::MAX) };
}

/// Called before a thread is started: there may be none to be had.
pub(super) fn take_thread() -> Result<(), SetupError> {
    let left = THREADS_LEFT.get();
    THREADS_LEFT.set(left.saturating_sub(1));
    match left {
        0 => Err(SetupError::Thread(Errno::EAGAIN)),
        _ => Ok(()),
    }
}

/// Runs `test` in a thread of its own; a hang ends the process.
fn watched(test: impl FnOnce() + Send + 'static) {
    let (done, told) = mpsc::channel();
    let worker = thread::spawn(move || {
        test();
        let _ = done.send(());
    });
    if told.recv_timeout(PATIENCE) == Err(mpsc::RecvTimeoutError::Timeout) {
        eprintln!("nobody ends the threads there are");
        std::process::abort();
    }
    if let Err(panic) = worker.join() {
        std::panic::resume_unwind(panic);
    }
}

#[test]
fn whatever_threads_are_to_be_had_faults_are_served_or_refused_and_all_threads_end() {
    watched(|| {
        for threads in 0..=WORKERS_FIRST + READERS {
            let faults = Faults::new(Privilege::ANY);
            THREADS_LEFT.set(threads);
            let channel = faults.channel(Delivery::Handler, false).map(drop);
            THREADS_LEFT.set(usize::MAX);
            match channel {
                Ok(()) => assert!(threads > WORKERS_FIRST, "{threads} threads"),
                Err(SetupError::Thread(_)) => assert!(threads <= WORKERS_FIRST),
                // None is to be had here.
                Err(SetupError::Uffd(_)) => {}
                Err(error) => panic!("{threads} threads: {error}"),
            }
            drop(faults);
        }
    });
}
