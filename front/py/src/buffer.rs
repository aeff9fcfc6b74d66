//! Buffers of Python objects, lent to a call for its whole length.
//!
//! Other threads may read and write them meanwhile (a bytearray, an array, a mapping of the very file), so they are
//! addresses all the way down and never a slice.
#![allow(
    unsafe_code,
    reason = "an ABI edge: memory of the interpreter's objects"
)]

use std::fmt;

use pinfold::{Direction, Error, ErrorKind, IovCursor, RawSpan, faultin};
use pyo3::exceptions::PyTypeError;
use pyo3::ffi;
use pyo3::prelude::*;

/// Times in a row that memory is brought in for a copy that then finds it gone again.
const BRING_IN_MAX: u32 = 64;

/// An object's memory. While this lives the object can neither move nor free it: a bytearray refuses to be resized, a
/// mapping to be closed.
pub(crate) struct Lent {
    /// Boxed: an exporter may have filled in pointers to the structure itself.
    view: Box<ffi::Py_buffer>,
    direction: Direction,
}

// SAFETY: the view is only looked at until it is released, which happens with the interpreter attached (`drop`); buffer
// exports belong to no thread.
unsafe impl Send for Lent {}
// SAFETY: as for Send; shared access reads two numbers.
unsafe impl Sync for Lent {}

impl fmt::Debug for Lent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Lent({:?}, {:?})", self.direction, self.span())
    }
}

impl Lent {
    /// Borrows what a read is to fill.
    pub(crate) fn target(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        // Exporters say this in many ways; Python's own calls all say it in this one.
        Self::of(object, Direction::Target).map_err(|_| {
            let class = object.get_type();
            let name = class
                .name()
                .map_or_else(|_| "?".to_owned(), |name| name.to_string());
            PyTypeError::new_err(format!(
                "a contiguous read-write bytes-like object is required, not '{name}'"
            ))
        })
    }

    /// Borrows what a write is to take.
    pub(crate) fn source(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        Self::of(object, Direction::Source)
    }

    fn of(object: &Bound<'_, PyAny>, direction: Direction) -> PyResult<Self> {
        // The simplest request there is, which every exporter answers: bytes one behind the other, or an error.
        let flags = match direction {
            Direction::Target => ffi::PyBUF_WRITABLE,
            Direction::Source => ffi::PyBUF_SIMPLE,
        };
        let mut view = Box::new(ffi::Py_buffer::new());
        // SAFETY: the interpreter is attached (`object` is a `Bound`); `view` is a structure for it to fill, at an address
        // it keeps until it is released.
        let refused = unsafe { ffi::PyObject_GetBuffer(object.as_ptr(), &raw mut *view, flags) };
        if refused != 0 {
            return Err(PyErr::fetch(object.py()));
        }
        Ok(Self { view, direction })
    }

    fn span(&self) -> RawSpan {
        RawSpan {
            addr: self.view.buf.expose_provenance(),
            // Never negative: an object's size.
            len: usize::try_from(self.view.len).unwrap_or(0),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.span().len
    }

    /// Copies the memory's first bytes into a buffer of our own, waiting for what is not there.
    ///
    /// # Errors
    /// `EFAULT` where memory is not accessible: a mapping of a file that was cut off.
    pub(crate) fn copy_out(&self, into: &mut [u8]) -> pinfold::Result<()> {
        let mut cursor = self.cursor();
        cursor.truncate(into.len());
        let mut done = 0;
        let mut tries = 0;
        while done < into.len() {
            let copied = cursor.copy_slice_nofault(&mut into[done..]);
            // At most what is left of `into`.
            done += copied.done as usize;
            if copied.stop.is_none() {
                break;
            }
            tries = if copied.done > 0 { 0 } else { tries + 1 };
            let missing = faultin::fault_in_cursor(&cursor, 1);
            if missing > 0 || tries > BRING_IN_MAX {
                return Err(Error::new("read a buffer", ErrorKind::BadBuffer));
            }
        }
        Ok(())
    }

    /// Returns a cursor over the memory; it lives no longer than the loan.
    pub(crate) fn cursor(&self) -> IovCursor<'_> {
        // SAFETY: the exporter keeps the range mapped until `self.view` is released (the buffer protocol's promise), and
        // nobody holds a Rust reference into it: this crate makes none of Python's memory.
        unsafe { IovCursor::from_raw(self.direction, &[self.span()]) }
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let view = &raw mut *self.view;
        // A loan is made and given back inside one call, on a thread that is attached around it.
        Python::try_attach(|_| {
            // SAFETY: attached; the view was filled by PyObject_GetBuffer (`of`) and is released once.
            unsafe { ffi::PyBuffer_Release(view) };
        });
    }
}
