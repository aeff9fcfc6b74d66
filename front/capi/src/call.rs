//! The way out of every exported function: a result becomes a return value and errno, a panic becomes `EIO`.

use std::any::Any;
use std::ffi::c_int;
use std::panic::{AssertUnwindSafe, catch_unwind};

use pinfold::Errno;

use crate::errors::{Failure, Outcome, remember};
use crate::fork;

/// A C return type, and what it is when the call failed.
pub(crate) trait Answer {
    /// What POSIX returns with errno set.
    const FAILED: Self;
}

impl Answer for c_int {
    const FAILED: Self = -1;
}

impl Answer for isize {
    const FAILED: Self = -1;
}

impl Answer for i64 {
    const FAILED: Self = -1;
}

impl<T> Answer for *mut T {
    const FAILED: Self = std::ptr::null_mut();
}

/// Runs a call: errno is set if it fails and stays as it was if it does not.
pub(crate) fn answer<T: Answer>(work: impl FnOnce() -> Outcome<T>) -> T {
    answer_in_child_too(|| {
        fork::check()?;
        work()
    })
}

/// As [`answer`], for a call that a forked child may make: it must wait for nothing that a lost thread may hold.
pub(crate) fn answer_in_child_too<T: Answer>(work: impl FnOnce() -> Outcome<T>) -> T {
    let before = errno();
    match outcome_of(work) {
        Ok(value) => {
            set_errno(before);
            value
        }
        Err(failure) => {
            let number = failure.errno();
            remember(failure);
            set_errno(number.raw());
            T::FAILED
        }
    }
}

/// Runs a call that returns its error number and leaves errno alone, as posix_fallocate does.
pub(crate) fn answer_number(work: impl FnOnce() -> Outcome<()>) -> c_int {
    let before = errno();
    let number = match outcome_of(|| {
        fork::check()?;
        work()
    }) {
        Ok(()) => 0,
        Err(failure) => {
            let number = failure.errno();
            remember(failure);
            number.raw()
        }
    };
    set_errno(before);
    number
}

fn outcome_of<T>(work: impl FnOnce() -> Outcome<T>) -> Outcome<T> {
    // What a panic leaves behind is the engine's, whose guards undo themselves while unwinding.
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        Err(Failure::Other(
            Errno::EIO,
            format!("internal error: {}", said(panic.as_ref())),
        ))
    })
}

fn said(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("a panic")
}

fn errno() -> i32 {
    // SAFETY: always returns this thread's location.
    let place = unsafe { libc::__errno_location() };
    // SAFETY: the location is this thread's own as long as the thread runs.
    unsafe { place.read() }
}

fn set_errno(number: i32) {
    // SAFETY: always returns this thread's location.
    let place = unsafe { libc::__errno_location() };
    // SAFETY: the location is this thread's own as long as the thread runs.
    unsafe { place.write(number) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_eio_and_its_words_are_kept() {
        set_errno(0);
        let failed: c_int = answer(|| panic!("of {}", 7));
        assert_eq!((failed, errno()), (-1, libc::EIO));
        // SAFETY: a string of this thread, valid until the next call.
        let words = unsafe { std::ffi::CStr::from_ptr(crate::errors::pf_error_message()) };
        assert_eq!(words.to_str().unwrap(), "internal error: of 7");
    }

    #[test]
    fn success_leaves_errno_alone() {
        set_errno(libc::EDQUOT);
        let done: c_int = answer(|| {
            set_errno(libc::EBUSY);
            Ok(0)
        });
        assert_eq!((done, errno()), (0, libc::EDQUOT));
    }
}
