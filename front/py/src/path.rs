//! Paths as Python passes them: str, bytes or anything with `__fspath__`.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use pinfold::Errno;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBytes, PyString};

use crate::error::os_error;

/// A path, and the object that named it: errors tell the latter as `filename`.
#[derive(Debug)]
pub(crate) struct PathArg {
    object: Py<PyAny>,
    path: PathBuf,
    bytes: bool,
}

impl PathArg {
    /// Names the volume's own directory.
    pub(crate) fn root(py: Python<'_>) -> Self {
        Self {
            object: PyString::intern(py, ".").into_any().unbind(),
            path: PathBuf::from("."),
            bytes: false,
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn object(&self) -> &Py<PyAny> {
        &self.object
    }

    /// Tells whether it was given as bytes: names are answered in kind.
    pub(crate) fn is_bytes(&self) -> bool {
        self.bytes
    }
}

impl<'a, 'py> FromPyObject<'a, 'py> for PathArg {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        static FSPATH: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
        let py = object.py();
        let plain = FSPATH.import(py, "os", "fspath")?.call1((object,))?;
        let (raw, bytes): (OsString, bool) = if let Ok(text) = plain.cast::<PyString>() {
            (text.extract()?, false)
        } else if let Ok(bytes) = plain.cast::<PyBytes>() {
            (OsStr::from_bytes(bytes.as_bytes()).to_owned(), true)
        } else {
            return Err(PyTypeError::new_err("a path is str, bytes or os.PathLike"));
        };
        if raw.as_bytes().contains(&0) {
            return Err(PyValueError::new_err("embedded null byte"));
        }
        if raw.is_empty() {
            // To the system an empty path names nothing; to the library it is the volume's root.
            return Err(os_error(py, Errno::ENOENT, None, Some(&plain.unbind())));
        }
        Ok(Self {
            object: plain.unbind(),
            path: raw.into(),
            bytes,
        })
    }
}

/// Makes a name a str, or bytes where the path it was found by was given as bytes.
pub(crate) fn name_to_python<'py>(
    py: Python<'py>,
    name: &OsStr,
    bytes: bool,
) -> PyResult<Bound<'py, PyAny>> {
    if bytes {
        return Ok(PyBytes::new(py, name.as_bytes()).into_any());
    }
    // Undecodable bytes become lone surrogates, as os.fsdecode has it.
    Ok(name.into_pyobject(py)?.into_any())
}
