//! What a thread that waits for an answer of ours is doing, as the kernel tells in /proc.
//!
//! *Owns*: whether a request for a lock is flock(2)'s, whether whoever sent it has a signal to see to.
//!
//! *Does not own*: the locks.
//!
//! *Locking*: none.

use std::io::{Error, ErrorKind};
use std::path::Path;

/// flock(2) as 32-bit programs call it: on x86 as on Arm.
const FLOCK_32: i64 = 143;
/// What x32 adds to the numbers of x86-64.
const X32: i64 = 0x4000_0000;

/// The call that a thread is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Call {
    /// flock(2).
    Flock,
    /// Another, such as fcntl(2).
    Other,
    /// It has not come to wait yet: ask again.
    Running,
    /// It is no more.
    Gone,
    /// Not for us to know.
    Hidden,
}

/// Tells what call a thread is in.
///
/// The protocol has a flag for requests of flock(2), which the protocol library does not pass on; all else in them is as in a
/// request for all of the file's records.
pub(super) fn call_of(thread: u32) -> Call {
    if thread == 0 {
        // Of a container whose threads have no number here.
        return Call::Hidden;
    }
    match std::fs::read_to_string(format!("/proc/{thread}/syscall")) {
        Ok(text) => parse(&text),
        Err(error) if is_no_thread(&error) => Call::Gone,
        Err(error)
            if error.kind() == ErrorKind::NotFound
                && !Path::new(&format!("/proc/{thread}")).exists() =>
        {
            Call::Gone
        }
        Err(_) => Call::Hidden,
    }
}

fn is_no_thread(error: &Error) -> bool {
    error.raw_os_error() == Some(libc::ESRCH)
}

/// Reads a line of /proc/TID/syscall: a number and the arguments, or a word.
fn parse(text: &str) -> Call {
    match text.split_whitespace().next() {
        Some("running") => Call::Running,
        Some(word) => match word.parse::<i64>() {
            Ok(number) if number == libc::SYS_flock => Call::Flock,
            Ok(FLOCK_32) => Call::Flock,
            Ok(number) if number == X32 + libc::SYS_flock => Call::Flock,
            _ => Call::Other,
        },
        None => Call::Hidden,
    }
}

/// Tells whether a thread has a signal to see to, or is gone.
pub(super) fn is_called(thread: u32) -> bool {
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
    use std::os::fd::AsFd;
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn a_thread_that_is_gone_or_not_called_is_told_apart() {
        assert!(!is_called(std::process::id()));
        assert!(is_called(u32::MAX));
    }

    #[test]
    fn the_kernel_s_words_for_a_call_are_read() {
        assert_eq!(parse("running\n"), Call::Running);
        assert_eq!(
            parse(&format!(
                "{} 0x3 0x2 0x0 0x0 0x0 0x0 0x7f 0x7f\n",
                libc::SYS_flock
            )),
            Call::Flock
        );
        assert_eq!(
            parse(&format!("{} 0x3 0x26\n", libc::SYS_fcntl)),
            Call::Other
        );
        assert_eq!(parse("-1 0x7f 0x7f\n"), Call::Other);
        assert_eq!(parse(""), Call::Hidden);
    }

    #[test]
    fn a_thread_that_waits_in_flock_is_told_from_one_that_does_not() {
        let directory = tempfile::tempdir().unwrap();
        let open = || std::fs::File::create(directory.path().join("file")).unwrap();
        let (holder, waiter) = (open(), open());
        holder.lock().unwrap();
        assert_eq!(call_of(u32::MAX), Call::Gone);
        std::thread::scope(|scope| {
            let (tell, told) = channel();
            scope.spawn(move || {
                tell.send(rustix::thread::gettid().as_raw_nonzero().get())
                    .unwrap();
                let _ =
                    rustix::fs::flock(waiter.as_fd(), rustix::fs::FlockOperation::LockExclusive);
            });
            let thread = u32::try_from(told.recv().unwrap()).unwrap();
            // On its way there it may be in the call that sends, or at none.
            loop {
                match call_of(thread) {
                    Call::Flock => break,
                    Call::Other | Call::Running => std::thread::yield_now(),
                    Call::Hidden => {
                        println!("skipped: /proc does not tell");
                        break;
                    }
                    Call::Gone => panic!("it waits"),
                }
            }
            holder.unlock().unwrap();
        });
    }
}
