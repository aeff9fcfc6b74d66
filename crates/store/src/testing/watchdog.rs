//! A limit of time for tests that can hang.
//!
//! *Owns*: nothing. *Does not own*: how long is long enough, which each test says. *Locking*: none.

use std::sync::mpsc;
use std::time::Duration;

/// Runs `body` in a thread and returns what it does; a panic of it goes on in the caller.
///
/// Ends the whole process when that takes longer than `limit`: at a plain failure the process would write its volumes back
/// before it ends, and hang as well.
pub fn within<R: Send + 'static>(limit: Duration, body: impl FnOnce() -> R + Send + 'static) -> R {
    let (tell, told) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        let result = body();
        let _ = tell.send(());
        result
    });
    if told.recv_timeout(limit) == Err(mpsc::RecvTimeoutError::Timeout) {
        eprintln!("{:?} hangs", std::thread::current().name());
        std::process::abort();
    }
    match thread.join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}
