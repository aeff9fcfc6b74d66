//! Entries of a directory, a batch at a time.

use std::collections::VecDeque;

use parking_lot::Mutex;
use pinfold::{DirEntry, Process};
use pyo3::prelude::*;

use crate::error::raise;
use crate::forked;
use crate::path::{PathArg, name_to_python};
use crate::stat::type_bits;

/// Entries read for one trip out of the interpreter.
const BATCH_MAX: usize = 256;

/// Name, inode number, file-type bits.
type Found<'py> = (Bound<'py, PyAny>, u64, Option<u32>);

/// Iterator over a directory: tuples of name, inode number and file-type bits (None where the filesystem does not say).
#[pyclass(frozen, module = "pinfold._native")]
#[derive(Debug)]
pub(crate) struct Directory {
    state: Mutex<State>,
    path: PathArg,
    process: Process,
}

#[derive(Debug)]
struct State {
    /// Gone at the end of the directory, and in a forked child.
    source: Option<pinfold::Directory>,
    batch: VecDeque<DirEntry>,
}

impl Directory {
    pub(crate) fn new(source: pinfold::Directory, path: PathArg, process: Process) -> Self {
        Self {
            state: Mutex::new(State {
                source: Some(source),
                batch: VecDeque::new(),
            }),
            path,
            process,
        }
    }
}

#[pymethods]
impl Directory {
    fn __iter__(slf: PyRef<'_, Self>) -> PyRef<'_, Self> {
        slf
    }

    fn __next__<'py>(&self, py: Python<'py>) -> PyResult<Option<Found<'py>>> {
        forked::check(self.process)?;
        let next = py.detach(|| self.state.lock().next());
        let next = next.map_err(|error| raise(py, &error, Some(self.path.object())))?;
        let Some(entry) = next else { return Ok(None) };
        let name = name_to_python(py, &entry.name, self.path.is_bytes())?;
        Ok(Some((name, entry.inode, entry.kind.map(type_bits))))
    }

    /// Ends the iteration and gives the directory's descriptor back.
    fn close(&self, py: Python<'_>) {
        if self.process.is_current() {
            py.detach(|| self.state.lock().end());
        }
    }
}

impl State {
    fn next(&mut self) -> pinfold::Result<Option<DirEntry>> {
        if self.batch.is_empty()
            && let Some(source) = &mut self.source
        {
            for entry in source.take(BATCH_MAX) {
                match entry {
                    Ok(entry) => self.batch.push_back(entry),
                    // What came before it is told first; a directory that fails goes on failing.
                    Err(error) if self.batch.is_empty() => return Err(error),
                    Err(_) => break,
                }
            }
            if self.batch.is_empty() {
                self.end();
            }
        }
        Ok(self.batch.pop_front())
    }

    fn end(&mut self) {
        self.source = None;
        self.batch.clear();
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if !self.process.is_current() {
            // It holds a part of the parent's engine.
            std::mem::forget(self.state.get_mut().source.take());
        }
    }
}
