//! The Python package's native half: volumes and files as Python objects.
//!
//! *Owns*: how arguments, buffers, errors and attributes cross between Python and the library; the rule that no thread
//! holds the interpreter (its GIL) while the library may wait.
//!
//! *Does not own*: modes, buffering and text, which the package's Python half makes of Python's own `io`
//! (`python/pinfold`); anything about files.
//!
//! *Locking*: the slots that hold a volume or a file are leaves, held to take a reference out and never across a
//! call. A thread that leaves the interpreter for a call holds none of them; one that comes back may wait for it.

mod buffer;
mod bytes;
mod directory;
mod error;
mod file;
mod forked;
mod mapping;
mod path;
mod stat;
mod volume;

use pyo3::prelude::*;

/// Native half of the package `pinfold`.
#[pymodule(name = "_native")]
mod native {
    use pyo3::prelude::*;

    #[pymodule_export]
    use crate::directory::Directory;
    #[pymodule_export]
    use crate::file::File;
    #[pymodule_export]
    use crate::mapping::{Mapping, Pin};
    #[pymodule_export]
    use crate::volume::Volume;

    #[pymodule_init]
    fn begin(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))?;
        module.add("MEMORY_MIN", pinfold::MEMORY_MIN)
    }
}
