//! The library's errors as Python's: OSError with number, text and names; Python picks FileNotFoundError and the like.

use std::error::Error as _;

use pinfold::{Errno, Error, ErrorKind};
use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;

/// Makes an `OSError`, of the subclass that stands for the number.
pub(crate) fn os_error(
    py: Python<'_>,
    errno: Errno,
    text: Option<String>,
    filename: Option<&Py<PyAny>>,
) -> PyErr {
    let text = text.unwrap_or_else(|| strerror(py, errno));
    match filename {
        Some(name) => PyOSError::new_err((errno.raw(), text, name.clone_ref(py))),
        None => PyOSError::new_err((errno.raw(), text)),
    }
}

/// Makes an `OSError` about two names, as rename and link raise it.
pub(crate) fn os_error_of_two(
    py: Python<'_>,
    error: &Error,
    from: &Py<PyAny>,
    to: &Py<PyAny>,
) -> PyErr {
    let raised = PyOSError::new_err((
        error.errno().raw(),
        text_of(py, error),
        from.clone_ref(py),
        None::<i32>,
        to.clone_ref(py),
    ));
    with_causes(py, raised, error)
}

/// Makes an `OSError` of what the library says.
pub(crate) fn raise(py: Python<'_>, error: &Error, filename: Option<&Py<PyAny>>) -> PyErr {
    let raised = os_error(py, error.errno(), Some(text_of(py, error)), filename);
    with_causes(py, raised, error)
}

/// Makes the error for what is used after it was closed; Python's files raise the same.
pub(crate) fn closed(what: &str) -> PyErr {
    PyValueError::new_err(format!("I/O operation on closed {what}"))
}

/// Makes Python's error for reading or writing what was opened for something else.
pub(crate) fn unsupported(py: Python<'_>, text: &'static str) -> PyErr {
    static UNSUPPORTED: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    UNSUPPORTED
        .import(py, "io", "UnsupportedOperation")
        .and_then(|class| class.call1((text,)))
        .map_or_else(|error| error, PyErr::from_value)
}

fn text_of(py: Python<'_>, error: &Error) -> String {
    match error.kind() {
        ErrorKind::AlreadyServed => "another Pinfold serves this directory".to_owned(),
        ErrorKind::Stale => {
            "it was changed by somebody else while newer data was cached".to_owned()
        }
        ErrorKind::NoFrames => {
            "no page of the memory budget could be freed; all are dirty, pinned or in use"
                .to_owned()
        }
        _ => strerror(py, error.errno()),
    }
}

/// What Python's own errors say for the number, so that messages compare equal.
fn strerror(py: Python<'_>, errno: Errno) -> String {
    static STRERROR: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    STRERROR
        .import(py, "os", "strerror")
        .and_then(|function| function.call1((errno.raw(),)))
        .and_then(|text| text.extract())
        .unwrap_or_else(|_| errno.to_string())
}

/// Attaches why it happened, where the library knows more than the number, as notes (PEP 678).
fn with_causes(py: Python<'_>, raised: PyErr, error: &Error) -> PyErr {
    if error.source().is_none() && error.range().is_none() {
        return raised;
    }
    let mut note = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        note.push_str(": ");
        note.push_str(&cause.to_string());
        source = cause.source();
    }
    // An error without its note is still the error.
    let _ = raised
        .value(py)
        .call_method1(intern!(py, "add_note"), (note,));
    raised
}
