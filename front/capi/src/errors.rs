//! Why a call failed: the number for errno, and words for `pf_error_message`.

use std::cell::RefCell;
use std::ffi::{CString, c_char};
use std::fmt;

use pinfold::Errno;

/// Result of a call before it becomes a return value.
pub(crate) type Outcome<T> = std::result::Result<T, Failure>;

/// Why a call failed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The engine says so.
    Engine(pinfold::Error),
    /// An argument is not acceptable; the words say which.
    Argument(Errno, &'static str),
    /// The number, and all there is to say.
    Other(Errno, String),
}

impl Failure {
    pub(crate) fn errno(&self) -> Errno {
        match self {
            Self::Engine(error) => error.errno(),
            Self::Argument(errno, _) | Self::Other(errno, _) => *errno,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Engine(error) => {
                error.fmt(f)?;
                // The engine's message names what was tried; the causes say what came of it.
                let mut cause = std::error::Error::source(error);
                while let Some(error) = cause {
                    write!(f, ": {error}")?;
                    cause = error.source();
                }
                Ok(())
            }
            Self::Argument(errno, what) => write!(f, "{what}: {errno}"),
            Self::Other(_, words) => f.write_str(words),
        }
    }
}

impl From<pinfold::Error> for Failure {
    fn from(error: pinfold::Error) -> Self {
        Self::Engine(error)
    }
}

/// Fails with a number and the argument that is to blame.
pub(crate) fn refuse<T>(errno: Errno, what: &'static str) -> Outcome<T> {
    Err(Failure::Argument(errno, what))
}

/// The last failure of this thread: put into words only when somebody asks, since many calls fail in passing.
struct Last {
    failure: Option<Failure>,
    words: CString,
}

thread_local! {
    static LAST: RefCell<Last> = RefCell::new(Last { failure: None, words: CString::default() });
}

/// Keeps the failure for `pf_error_message`. A thread that is ending has nobody left to ask.
pub(crate) fn remember(failure: Failure) {
    let _ = LAST.try_with(|last| {
        if let Ok(mut last) = last.try_borrow_mut() {
            last.failure = Some(failure);
        }
    });
}

/// Says why the last call that failed on this thread did: the operation, the path or range, the cause. Empty if none did.
/// Valid until the thread's next call of this function.
#[unsafe(no_mangle)]
pub extern "C" fn pf_error_message() -> *const c_char {
    const NOTHING: &std::ffi::CStr = c"";
    let words = LAST.try_with(|last| {
        let Ok(mut last) = last.try_borrow_mut() else {
            return NOTHING.as_ptr();
        };
        if let Some(failure) = last.failure.take() {
            let mut words = failure.to_string().into_bytes();
            // A path may hold anything but this; C could not see past it.
            words.retain(|&byte| byte != 0);
            last.words = CString::new(words).unwrap_or_default();
        }
        last.words.as_ptr()
    });
    words.unwrap_or(NOTHING.as_ptr())
}
