//! A part of a file in memory, as a Python buffer.
//!
//! *Owns*: exports of the memory, counted so that it stays while anybody can reach it; indexing that answers with errors
//! where plain memory would answer with SIGBUS.
//!
//! What works on an export (numpy, struct, hashlib, re) touches the memory itself: its faults are served by other threads,
//! which never ask for the interpreter.
#![allow(unsafe_code, reason = "an ABI edge: the buffer protocol")]

use std::ffi::{c_int, c_void};
use std::ops::Range;
use std::sync::Arc;

use parking_lot::Mutex;
use pinfold::{Advice, Delivery, Errno, Error, MapAccess, MapOptions, Pinned, Process};
use pyo3::exceptions::{PyBufferError, PyIndexError, PyMemoryError, PyTypeError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PySlice};

use crate::buffer::Lent;
use crate::error::{closed, os_error, raise};
use crate::forked;
use crate::volume::drop_outside;

/// Bytes that a search looks at in one go.
const SEARCH_STEP: usize = 256 << 10;

/// How a mapping is asked for, in Python's words.
#[derive(Debug)]
pub(crate) struct Asked {
    options: MapOptions,
    access: MapAccess,
}

impl Asked {
    /// Understands the words.
    pub(crate) fn parse(access: &str, delivery: &str, advice: &str) -> PyResult<Self> {
        let access = match access {
            "r" => MapAccess::Read,
            "w" => MapAccess::Write,
            "c" => MapAccess::Private,
            _ => {
                return Err(PyValueError::new_err(format!(
                    "access is 'r', 'w' or 'c' (copy on write), not {access:?}"
                )));
            }
        };
        let delivery = match delivery {
            "handler" => Delivery::Handler,
            "inline" => Delivery::Inline,
            _ => {
                return Err(PyValueError::new_err(format!(
                    "delivery is 'handler' or 'inline', not {delivery:?}"
                )));
            }
        };
        let options = MapOptions::new()
            .access(access)
            .delivery(delivery)
            .advice(parse_advice(advice)?);
        Ok(Self { options, access })
    }

    pub(crate) fn options(&self) -> &MapOptions {
        &self.options
    }
}

fn parse_advice(advice: &str) -> PyResult<Advice> {
    Ok(match advice {
        "normal" => Advice::Normal,
        "random" => Advice::Random,
        "sequential" => Advice::Sequential,
        "willneed" => Advice::WillNeed,
        "dontneed" => Advice::DontNeed,
        _ => {
            return Err(PyValueError::new_err(format!(
                "advice is 'normal', 'random', 'sequential', 'willneed' or 'dontneed', not {advice:?}"
            )));
        }
    })
}

/// A part of a file in memory, made by File.map.
///
/// It has the buffer protocol: memoryview, numpy.frombuffer, struct, hashlib and re work on the file's bytes in place,
/// within the volume's memory budget. Indexing and slicing copy. An access through the buffer beyond the end of a file that
/// was cut off meanwhile, or to bytes that the store does not give, ends the process with SIGBUS, as with mmap.mmap; the
/// methods here raise an error instead. A forked child does not have the memory.
#[pyclass(frozen, module = "pinfold")]
#[derive(Debug)]
pub(crate) struct Mapping {
    slot: Mutex<Slot>,
    name: Py<PyAny>,
    access: MapAccess,
    process: Process,
}

#[derive(Debug)]
struct Slot {
    mapping: Option<Arc<pinfold::Mapping>>,
    /// Buffers and pins that others hold.
    exports: usize,
    /// A call of `resize` has it, and puts it back.
    resizing: bool,
}

impl Slot {
    /// Says why there is no mapping.
    fn missing(&self) -> PyErr {
        if self.resizing {
            PyBufferError::new_err("the mapping is being resized by another thread")
        } else {
            closed("mapping")
        }
    }
}

/// What an item names.
enum Item {
    At(usize),
    /// First position, step, count.
    Slice(isize, isize, usize),
}

impl Mapping {
    pub(crate) fn new(mapping: pinfold::Mapping, asked: &Asked, name: Py<PyAny>) -> Self {
        Self {
            slot: Mutex::new(Slot {
                mapping: Some(Arc::new(mapping)),
                exports: 0,
                resizing: false,
            }),
            name,
            access: asked.access,
            process: Process::current(),
        }
    }

    fn open(&self) -> PyResult<Arc<pinfold::Mapping>> {
        forked::check(self.process)?;
        let slot = self.slot.lock();
        slot.mapping.clone().ok_or_else(|| slot.missing())
    }

    /// Runs `work` outside the interpreter; the mapping is let go of there, too: it may have been closed meanwhile.
    fn run<R: Send>(
        &self,
        py: Python<'_>,
        mapping: Arc<pinfold::Mapping>,
        work: impl FnOnce(&pinfold::Mapping) -> pinfold::Result<R> + Send,
    ) -> PyResult<R> {
        py.detach(move || work(&mapping))
            .map_err(|error| raise(py, &error, Some(&self.name)))
    }

    fn range(
        &self,
        py: Python<'_>,
        mapping: &pinfold::Mapping,
        offset: i64,
        length: Option<i64>,
    ) -> PyResult<Range<usize>> {
        let invalid = || os_error(py, Errno::EINVAL, None, Some(&self.name));
        let start = usize::try_from(offset).map_err(|_| invalid())?;
        let end = match length {
            None => mapping.len(),
            Some(length) => usize::try_from(length)
                .ok()
                .and_then(|length| start.checked_add(length))
                .ok_or_else(invalid)?,
        };
        if start > end || end > mapping.len() {
            return Err(invalid());
        }
        Ok(start..end)
    }

    fn item(mapping: &pinfold::Mapping, key: &Bound<'_, PyAny>) -> PyResult<Item> {
        let len = isize::try_from(mapping.len())?;
        if let Ok(slice) = key.cast::<PySlice>() {
            let found = slice.indices(len)?;
            return Ok(Item::Slice(found.start, found.step, found.slicelength));
        }
        let index: isize = key
            .extract()
            .map_err(|_| PyTypeError::new_err("mapping indices must be integers or slices"))?;
        let at = if index < 0 { index + len } else { index };
        match usize::try_from(at) {
            Ok(at) if at < mapping.len() => Ok(Item::At(at)),
            _ => Err(PyIndexError::new_err("mapping index out of range")),
        }
    }

    fn writable(&self) -> PyResult<()> {
        if self.access == MapAccess::Read {
            return Err(PyTypeError::new_err("the mapping is for reading only"));
        }
        Ok(())
    }

    fn let_go(&self) {
        self.slot.lock().exports -= 1;
    }
}

/// Reads all of `buf` at `at`: what the file no longer has is an error.
fn read_all(mapping: &pinfold::Mapping, at: usize, buf: &mut [u8]) -> pinfold::Result<()> {
    let mut done = 0;
    while done < buf.len() {
        match mapping.read(at + done, &mut buf[done..])? {
            0 => return Err(beyond("read mapped bytes of", mapping, at + done)),
            n => done += n,
        }
    }
    Ok(())
}

/// Stores all of `buf` at `at`.
fn write_all(mapping: &pinfold::Mapping, at: usize, buf: &[u8]) -> pinfold::Result<()> {
    let mut done = 0;
    while done < buf.len() {
        match mapping.write(at + done, &buf[done..])? {
            0 => return Err(beyond("store to mapped bytes of", mapping, at + done)),
            n => done += n,
        }
    }
    Ok(())
}

/// The file was cut off before these bytes; plain memory would be SIGBUS here.
fn beyond(operation: &'static str, mapping: &pinfold::Mapping, at: usize) -> Error {
    let range = mapping.file_range();
    Error::invalid(operation, Errno::EFAULT).at_range(range.start + at as u64..range.end)
}

/// Lists the positions of a slice with a step.
fn positions(start: isize, step: isize, count: usize) -> impl Iterator<Item = usize> {
    // Python's own arithmetic keeps them inside the mapping.
    (0..count).map(move |n| (start + n as isize * step) as usize)
}

#[pymethods]
impl Mapping {
    /// The path of the file.
    #[getter]
    fn name(&self, py: Python<'_>) -> Py<PyAny> {
        self.name.clone_ref(py)
    }

    /// What it is for: "r", "w" or "c".
    #[getter]
    fn access(&self) -> &'static str {
        match self.access {
            MapAccess::Read => "r",
            MapAccess::Write => "w",
            MapAccess::Private => "c",
        }
    }

    /// Where in the file it begins.
    #[getter]
    fn offset(&self) -> PyResult<u64> {
        Ok(self.open()?.file_range().start)
    }

    /// Whether it was closed; true in a forked child as well, where it is of no use.
    #[getter]
    fn closed(&self) -> bool {
        if !self.process.is_current() {
            return true;
        }
        let slot = self.slot.lock();
        slot.mapping.is_none() && !slot.resizing
    }

    fn __len__(&self) -> PyResult<usize> {
        Ok(self.open()?.len())
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let name = self.name.bind(py).repr()?;
        let access = self.access();
        if self.closed() {
            return Ok(format!(
                "<pinfold.Mapping name={name} access='{access}' [closed]>"
            ));
        }
        let range = self.open()?.file_range();
        Ok(format!(
            "<pinfold.Mapping name={name} access='{access}' offset={} length={}>",
            range.start,
            range.end - range.start
        ))
    }

    fn __getitem__<'py>(
        &self,
        py: Python<'py>,
        key: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let mapping = self.open()?;
        match Self::item(&mapping, key)? {
            Item::At(at) => {
                let byte = self.run(py, mapping, |mapping| {
                    let mut byte = [0];
                    read_all(mapping, at, &mut byte).map(|()| byte[0])
                })?;
                Ok(byte.into_pyobject(py)?.into_any())
            }
            Item::Slice(start, step, count) => {
                let bytes = PyBytes::new_with(py, count, |buf| {
                    self.run(py, mapping, |mapping| {
                        if step == 1 {
                            // Inside the mapping: a usize.
                            return read_all(mapping, start as usize, buf);
                        }
                        for (n, at) in positions(start, step, count).enumerate() {
                            read_all(mapping, at, &mut buf[n..=n])?;
                        }
                        Ok(())
                    })
                })?;
                Ok(bytes.into_any())
            }
        }
    }

    fn __setitem__(
        &self,
        py: Python<'_>,
        key: &Bound<'_, PyAny>,
        value: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let mapping = self.open()?;
        self.writable()?;
        match Self::item(&mapping, key)? {
            Item::At(at) => {
                let byte: i64 = value.extract()?;
                let byte = u8::try_from(byte)
                    .map_err(|_| PyValueError::new_err("a byte must be in range(0, 256)"))?;
                self.run(py, mapping, |mapping| write_all(mapping, at, &[byte]))
            }
            Item::Slice(start, step, count) => {
                let lent = Lent::source(value)?;
                if lent.len() != count {
                    return Err(PyIndexError::new_err(format!(
                        "a slice of {count} bytes cannot take {}",
                        lent.len()
                    )));
                }
                // A copy of its own first: the source may be this very memory.
                let mut bytes = Vec::new();
                bytes
                    .try_reserve_exact(count)
                    .map_err(|_| PyMemoryError::new_err("too many bytes"))?;
                bytes.resize(count, 0);
                self.run(py, mapping, |mapping| {
                    lent.copy_out(&mut bytes)?;
                    if step == 1 {
                        return write_all(mapping, start as usize, &bytes);
                    }
                    for (n, at) in positions(start, step, count).enumerate() {
                        write_all(mapping, at, &bytes[n..=n])?;
                    }
                    Ok(())
                })
            }
        }
    }

    /// Return where `sub` is first found between `start` and `end`, or -1; as bytes.find.
    #[pyo3(signature = (sub, start = None, end = None, /))]
    fn find(
        &self,
        py: Python<'_>,
        sub: &Bound<'_, PyAny>,
        start: Option<isize>,
        end: Option<isize>,
    ) -> PyResult<isize> {
        let mapping = self.open()?;
        let len = isize::try_from(mapping.len())?;
        let place = |at: isize| (if at < 0 { at + len } else { at }).clamp(0, len) as usize;
        let (start, end) = (place(start.unwrap_or(0)), place(end.unwrap_or(len)));
        let lent = Lent::source(sub)?;
        let mut wanted = vec![0; lent.len()];
        let found = self.run(py, mapping, |mapping| {
            lent.copy_out(&mut wanted)?;
            search(mapping, &wanted, start, end)
        })?;
        Ok(found.map_or(-1, |at| at as isize))
    }

    /// Make what was stored durable, as msync: all of it, or `length` bytes from `offset` on.
    #[pyo3(signature = (offset = 0, length = None))]
    fn flush(&self, py: Python<'_>, offset: i64, length: Option<i64>) -> PyResult<()> {
        let mapping = self.open()?;
        let range = self.range(py, &mapping, offset, length)?;
        self.run(py, mapping, |mapping| mapping.flush(range))
    }

    /// Tell what the program is about to do: "normal", "random" or "sequential", which concern the whole mapping;
    /// "willneed" or "dontneed" for a range.
    #[pyo3(signature = (advice, offset = 0, length = None))]
    fn advise(
        &self,
        py: Python<'_>,
        advice: &str,
        offset: i64,
        length: Option<i64>,
    ) -> PyResult<()> {
        let advice = parse_advice(advice)?;
        let mapping = self.open()?;
        let range = self.range(py, &mapping, offset, length)?;
        self.run(py, mapping, |mapping| mapping.advise(advice, range))
    }

    /// Return for each page of a range whether it is in memory, so that an access does not wait for the store.
    #[pyo3(signature = (offset = 0, length = None))]
    fn resident(&self, py: Python<'_>, offset: i64, length: Option<i64>) -> PyResult<Vec<bool>> {
        let mapping = self.open()?;
        let range = self.range(py, &mapping, offset, length)?;
        self.run(py, mapping, |mapping| mapping.resident(range))
    }

    /// Keep a range in memory, safe for any access, by system calls too, until the result is closed; with `write`, for
    /// stores as well. What an access would get SIGBUS for is raised here. At most a quarter of the budget can be pinned.
    #[pyo3(signature = (offset = 0, length = None, *, write = false))]
    fn pin(slf: &Bound<'_, Self>, offset: i64, length: Option<i64>, write: bool) -> PyResult<Pin> {
        let (py, this) = (slf.py(), slf.get());
        let mapping = this.open()?;
        let range = this.range(py, &mapping, offset, length)?;
        let held = this.run(py, Arc::clone(&mapping), |borrowed| {
            let pinned = borrowed.pin(range, write)?;
            // SAFETY: the pin borrows what `mapping` keeps, at an address that does not change; `Held` drops the pin before
            // the mapping, and gives it to nobody.
            let pinned = unsafe { std::mem::transmute::<Pinned<'_>, Pinned<'static>>(pinned) };
            Ok(Held {
                pinned,
                _mapping: mapping,
            })
        })?;
        this.slot.lock().exports += 1;
        Ok(Pin {
            held: Mutex::new(Some(held)),
            of: slf.clone().unbind(),
        })
    }

    /// Make the mapping, and the file with it, end `newsize` bytes from where the mapping begins, as mmap.resize does.
    ///
    /// Raises TypeError for a mapping that is not for writing to the file, ValueError for no bytes or fewer, BufferError
    /// while buffers of it (memoryviews, arrays) or pins exist, or another thread is using it.
    #[pyo3(signature = (newsize, /))]
    fn resize(&self, py: Python<'_>, newsize: i64) -> PyResult<()> {
        forked::check(self.process)?;
        if self.access != MapAccess::Write {
            return Err(PyTypeError::new_err(
                "cannot resize a mapping that is for reading only or copies on write",
            ));
        }
        let len = usize::try_from(newsize).ok().filter(|&len| len > 0);
        let len = len.ok_or_else(|| PyValueError::new_err("new size out of range"))?;
        let taken = {
            let mut slot = self.slot.lock();
            if slot.exports > 0 {
                return Err(PyBufferError::new_err(
                    "cannot resize exported pointers exist",
                ));
            }
            let taken = slot.mapping.take().ok_or_else(|| slot.missing())?;
            match Arc::try_unwrap(taken) {
                Ok(mapping) => {
                    slot.resizing = true;
                    mapping
                }
                Err(shared) => {
                    slot.mapping = Some(shared);
                    return Err(PyBufferError::new_err(
                        "cannot resize while another thread uses the mapping",
                    ));
                }
            }
        };
        // The lock is not held meanwhile: whoever waits for it has the interpreter, which is wanted back.
        let (mapping, outcome) = py.detach(move || {
            let mut mapping = taken;
            let end = mapping.file_range().start.checked_add(len as u64);
            let outcome = mapping
                .file()
                .set_len(end.unwrap_or(u64::MAX))
                .and_then(|()| mapping.remap(len, true));
            (mapping, outcome)
        });
        {
            let mut slot = self.slot.lock();
            slot.mapping = Some(Arc::new(mapping));
            slot.resizing = false;
        }
        outcome.map_err(|error| raise(py, &error, Some(&self.name)))
    }

    /// Unmap it. What was stored stays in the file's cache and is written back in its time.
    ///
    /// Raises BufferError while buffers of it (memoryviews, arrays) or pins exist.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        if !self.process.is_current() {
            // The parent's; there is nothing here to close.
            return Ok(());
        }
        let mapping = {
            let mut slot = self.slot.lock();
            if slot.exports > 0 {
                return Err(PyBufferError::new_err(
                    "cannot close exported pointers exist",
                ));
            }
            if slot.resizing {
                return Err(slot.missing());
            }
            slot.mapping.take()
        };
        py.detach(move || drop(mapping));
        Ok(())
    }

    fn __enter__(slf: Bound<'_, Self>) -> PyResult<Bound<'_, Self>> {
        slf.get().open()?;
        Ok(slf)
    }

    fn __exit__(
        &self,
        py: Python<'_>,
        _kind: &Bound<'_, PyAny>,
        _value: &Bound<'_, PyAny>,
        _traceback: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        self.close(py)
    }

    /// # Safety
    /// Called by the interpreter, attached, with a view for us to fill.
    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        let this = slf.get();
        let mapping = this.open()?;
        let len = ffi::Py_ssize_t::try_from(mapping.len())?;
        let readonly = c_int::from(this.access == MapAccess::Read);
        let addr: *mut c_void = mapping.as_mut_ptr().cast();
        // Counted first: a close by another thread between the two would take the memory away.
        {
            let mut slot = this.slot.lock();
            if slot.mapping.is_none() {
                return Err(slot.missing());
            }
            slot.exports += 1;
        }
        // SAFETY: attached; `view` is the interpreter's; the memory stays mapped while `exports` counts this export
        // (`close` refuses) and the view holds a reference to `slf` (`drop` does not run).
        let refused =
            unsafe { ffi::PyBuffer_FillInfo(view, slf.as_ptr(), addr, len, readonly, flags) };
        if refused != 0 {
            this.let_go();
            return Err(PyErr::fetch(slf.py()));
        }
        Ok(())
    }

    /// # Safety
    /// Called by the interpreter, attached, once for each view filled by `__getbuffer__`.
    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {
        self.let_go();
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let Some(mapping) = self.slot.get_mut().mapping.take() else {
            return;
        };
        if !self.process.is_current() {
            std::mem::forget(mapping);
            return;
        }
        drop_outside(mapping);
    }
}

/// Finds `wanted` in `start..end`, a step at a time that laps over the next.
fn search(
    mapping: &pinfold::Mapping,
    wanted: &[u8],
    start: usize,
    end: usize,
) -> pinfold::Result<Option<usize>> {
    if start.saturating_add(wanted.len()) > end {
        return Ok(None);
    }
    let Some((&first, rest)) = wanted.split_first() else {
        return Ok(Some(start));
    };
    let mut buf = vec![0; SEARCH_STEP.max(wanted.len() * 2).min(end - start)];
    let mut at = start;
    while at + wanted.len() <= end {
        let n = buf.len().min(end - at);
        read_all(mapping, at, &mut buf[..n])?;
        let mut from = 0;
        while let Some(hit) = buf[from..n - rest.len()]
            .iter()
            .position(|&byte| byte == first)
        {
            let hit = from + hit;
            if &buf[hit + 1..hit + wanted.len()] == rest {
                return Ok(Some(at + hit));
            }
            from = hit + 1;
        }
        at += n - rest.len();
    }
    Ok(None)
}

/// Memory of a mapping that stays, made by Mapping.pin; a context manager.
#[pyclass(frozen, module = "pinfold")]
#[derive(Debug)]
pub(crate) struct Pin {
    held: Mutex<Option<Held>>,
    of: Py<Mapping>,
}

/// Dropped in this order: the pin borrows the mapping.
#[derive(Debug)]
struct Held {
    pinned: Pinned<'static>,
    _mapping: Arc<pinfold::Mapping>,
}

impl Pin {
    fn end(&self, py: Python<'_>) {
        let this = self.of.get();
        if !this.process.is_current() {
            return;
        }
        if let Some(held) = self.held.lock().take() {
            py.detach(move || drop(held));
            this.let_go();
        }
    }
}

#[pymethods]
impl Pin {
    /// How many pages it keeps.
    #[getter]
    fn pages(&self) -> PyResult<usize> {
        forked::check(self.of.get().process)?;
        Ok(self
            .held
            .lock()
            .as_ref()
            .map_or(0, |held| held.pinned.pages()))
    }

    /// Let the pages go.
    fn close(&self, py: Python<'_>) {
        self.end(py);
    }

    fn __enter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    fn __exit__(
        &self,
        py: Python<'_>,
        _kind: &Bound<'_, PyAny>,
        _value: &Bound<'_, PyAny>,
        _traceback: &Bound<'_, PyAny>,
    ) {
        self.end(py);
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        if !self.of.get().process.is_current() {
            std::mem::forget(self.held.get_mut().take());
            return;
        }
        Python::try_attach(|py| self.end(py));
    }
}
