//! Forked children: they inherit the objects, and no engine that could serve them.
//!
//! A child of fork has none of the parent's other threads; locks that those held stay locked, and rings and frames are
//! shared with the parent. So whatever belongs to the parent is neither used nor dropped in the child.

use pinfold::Process;
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;

/// Refuses what was made in another process than this one.
pub(crate) fn check(made_in: Process) -> PyResult<()> {
    if made_in.is_current() {
        return Ok(());
    }
    Err(PyRuntimeError::new_err(
        "it was opened before a fork and belongs to the parent process: open the volume in the child, \
         once the parent has closed it",
    ))
}
