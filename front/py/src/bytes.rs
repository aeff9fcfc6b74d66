//! Results as `bytes`: the object is made first and read into, so that the bytes are moved once.
#![allow(unsafe_code, reason = "an ABI edge: objects of the interpreter")]

use std::marker::PhantomData;

use pinfold::{Direction, IovCursor, RawSpan};
use pyo3::exceptions::PyMemoryError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

/// A new `bytes` that nobody has seen yet.
pub(crate) struct Blank<'py> {
    object: Bound<'py, PyBytes>,
    len: usize,
}

/// Where the bytes of a [`Blank`] go; plain numbers, for use outside the interpreter. The blank cannot be finished while
/// this exists.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Room<'a>(RawSpan, PhantomData<&'a ()>);

impl<'py> Blank<'py> {
    /// Allocates `len` bytes.
    pub(crate) fn new(py: Python<'py>, len: usize) -> PyResult<Self> {
        let size =
            ffi::Py_ssize_t::try_from(len).map_err(|_| PyMemoryError::new_err("too many bytes"))?;
        // SAFETY: the interpreter is attached (`py`); a null pointer asks for bytes not filled in.
        let raw = unsafe { ffi::PyBytes_FromStringAndSize(std::ptr::null(), size) };
        // SAFETY: as above; `raw` is a new reference or null with an exception set.
        let object = unsafe { Bound::from_owned_ptr_or_err(py, raw) }?;
        // SAFETY: PyBytes_FromStringAndSize makes nothing but bytes.
        let object = unsafe { object.cast_into_unchecked::<PyBytes>() };
        Ok(Self { object, len })
    }

    /// Returns where to put them.
    pub(crate) fn room(&self) -> Room<'_> {
        // SAFETY: the interpreter is attached, since `self` holds a `Bound`; the object is bytes.
        let addr = unsafe { ffi::PyBytes_AsString(self.object.as_ptr()) };
        let span = RawSpan {
            addr: addr.expose_provenance(),
            len: self.len,
        };
        Room(span, PhantomData)
    }

    /// Returns the first `filled` bytes as the object it is to be; those after them were never written.
    pub(crate) fn finish(self, filled: usize) -> Bound<'py, PyBytes> {
        if filled == self.len {
            return self.object;
        }
        // Rare: the file became shorter, or an error came, after the room was measured.
        let room = self.room().0;
        let addr = std::ptr::with_exposed_provenance(room.addr);
        // SAFETY: the first `filled` bytes of a live object, all of them written; they are copied at once.
        unsafe { PyBytes::from_ptr(self.object.py(), addr, filled.min(room.len)) }
    }
}

impl Room<'_> {
    /// Returns a cursor that fills the room.
    pub(crate) fn cursor(&self) -> IovCursor<'_> {
        // SAFETY: the blank that the lifetime borrows keeps the object alive, and before it is finished nobody else has a
        // reference to the object or into it (`Blank::new` made it, and gave it to nobody).
        unsafe { IovCursor::from_raw(Direction::Target, &[self.0]) }
    }
}
