//! One open file.

use std::io::{Seek as _, SeekFrom};
use std::sync::Arc;

use parking_lot::Mutex;
use pinfold::{
    AlignedBuf, AllocateMode, CALL_BYTES_MAX, Errno, Error, IoOptions, IovCursor, PAGE_SIZE,
    Process, Progress, Seek,
};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::buffer::Lent;
use crate::bytes::Blank;
use crate::error::{closed, os_error, raise, unsupported};
use crate::forked;
use crate::mapping::{Asked, Mapping};

/// What a line's first look takes in; later ones double, up to [`LINE_STEP_MAX`].
const LINE_STEP: usize = 256;
/// The most bytes looked at in one go for the end of a line.
const LINE_STEP_MAX: usize = 64 << 10;

/// The native side of `pinfold.File`: the same calls, without what `io.RawIOBase` adds.
#[pyclass(frozen, module = "pinfold._native")]
#[derive(Debug)]
pub(crate) struct File {
    slot: Mutex<Option<Arc<Open>>>,
    name: Py<PyAny>,
    direct: bool,
    readable: bool,
    writable: bool,
    process: Process,
}

/// An open file and the volume it is of, which goes on working until its last file is closed.
#[derive(Debug)]
struct Open {
    file: pinfold::File,
    _volume: pinfold::Volume,
}

impl File {
    pub(crate) fn new(file: pinfold::File, volume: pinfold::Volume, name: Py<PyAny>) -> Self {
        let access = file.access();
        Self {
            slot: Mutex::new(Some(Arc::new(Open {
                file,
                _volume: volume,
            }))),
            name,
            direct: access.direct,
            readable: access.read,
            writable: access.write,
            process: Process::current(),
        }
    }

    fn open(&self) -> PyResult<Arc<Open>> {
        forked::check(self.process)?;
        self.slot.lock().clone().ok_or_else(|| closed("file"))
    }

    fn for_reading(&self, py: Python<'_>) -> PyResult<Arc<Open>> {
        let open = self.open()?;
        if self.readable {
            return Ok(open);
        }
        Err(unsupported(py, "File not open for reading"))
    }

    fn for_writing(&self, py: Python<'_>) -> PyResult<Arc<Open>> {
        let open = self.open()?;
        if self.writable {
            return Ok(open);
        }
        Err(unsupported(py, "File not open for writing"))
    }

    fn raise(&self, py: Python<'_>, error: &Error) -> PyErr {
        raise(py, error, Some(&self.name))
    }

    /// Runs `work` outside the interpreter. The file is let go of there, too: if it was closed meanwhile, that may wait.
    fn run<R: Send>(
        &self,
        py: Python<'_>,
        open: Arc<Open>,
        work: impl FnOnce(&pinfold::File) -> pinfold::Result<R> + Send,
    ) -> PyResult<R> {
        py.detach(move || work(&open.file))
            .map_err(|error| self.raise(py, &error))
    }

    /// Takes an offset that may be negative, as Python's numbers may.
    fn offset(&self, py: Python<'_>, offset: i64) -> PyResult<u64> {
        u64::try_from(offset).map_err(|_| self.invalid(py))
    }

    fn range(&self, py: Python<'_>, offset: i64, length: i64) -> PyResult<std::ops::Range<u64>> {
        let start = self.offset(py, offset)?;
        let length = self.offset(py, length)?;
        // Two numbers below 2^63.
        Ok(start..start + length)
    }

    fn invalid(&self, py: Python<'_>) -> PyErr {
        os_error(py, Errno::EINVAL, None, Some(&self.name))
    }

    /// Reads up to `size` bytes with `step` into an object of their own.
    fn read_bytes<'py>(
        &self,
        py: Python<'py>,
        open: Arc<Open>,
        size: usize,
        step: Step<'_>,
        whole: Whole,
    ) -> PyResult<Bound<'py, PyBytes>> {
        // Nobody gets more than there is: a size of "everything" must not cost a buffer of that size.
        let len = usize::try_from(open.file.len()).unwrap_or(usize::MAX);
        if self.direct {
            let size = size.min(len.next_multiple_of(PAGE_SIZE as usize));
            return self.read_aligned(py, open, size, step, whole);
        }
        let blank = Blank::new(py, size.min(len))?;
        let room = blank.room();
        let done = self.run(py, open, |file| {
            whole.outcome(drain(&mut room.cursor(), |cursor, at| {
                step(file, cursor, at)
            }))
        })?;
        Ok(blank.finish(done))
    }

    /// The same past the cache, which asks for memory aligned as no `bytes` object is.
    fn read_aligned<'py>(
        &self,
        py: Python<'py>,
        open: Arc<Open>,
        size: usize,
        step: Step<'_>,
        whole: Whole,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let (mut buf, done) = self.run(py, open, |file| {
            let mut buf = AlignedBuf::zeroed(size);
            let mut cursor = IovCursor::from_mut_slice(&mut buf.as_mut_slice()[..size]);
            let done = whole.outcome(drain(&mut cursor, |cursor, at| step(file, cursor, at)))?;
            Ok((buf, done))
        })?;
        Ok(PyBytes::new(py, &buf.as_mut_slice()[..done]))
    }
}

/// One call of the library that moves bytes: the cursor, and how many bytes came before.
type Step<'a> = &'a (dyn Fn(&pinfold::File, &mut IovCursor<'_>, u64) -> Progress<Error> + Sync);

/// Whether some of the bytes are an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Whole {
    /// Bytes before an error are returned, as read(2) does; the next call tells the error.
    No,
    /// An error is raised whatever came before it: the caller could not tell it from the end of the file.
    Yes,
}

impl Whole {
    fn outcome(self, progress: Progress<Error>) -> pinfold::Result<usize> {
        let done = match (self, progress) {
            (
                Self::Yes,
                Progress {
                    stop: Some(error), ..
                },
            ) => return Err(error),
            (_, progress) => progress.posix()?,
        };
        // At most what a buffer of this process holds.
        Ok(done as usize)
    }
}

/// Repeats `step` while it is only the library's limit for one call that ends it.
fn drain(
    cursor: &mut IovCursor<'_>,
    mut step: impl FnMut(&mut IovCursor<'_>, u64) -> Progress<Error>,
) -> Progress<Error> {
    let mut done = 0;
    loop {
        let asked = cursor.count().min(CALL_BYTES_MAX) as u64;
        let moved = step(cursor, done);
        done += moved.done;
        if moved.stop.is_some() || moved.done < asked || cursor.count() == 0 {
            return Progress {
                done,
                stop: moved.stop,
            };
        }
    }
}

fn read_next(file: &pinfold::File, cursor: &mut IovCursor<'_>, _: u64) -> Progress<Error> {
    file.read_next_cursor(cursor, &IoOptions::default())
}

fn invalid_seek() -> Error {
    Error::invalid("seek in", Errno::EINVAL)
}

fn from_io(operation: &'static str) -> impl Fn(std::io::Error) -> Error {
    move |error| {
        // The library's own conversion keeps nothing but the number.
        let raw = error.raw_os_error().unwrap_or(libc::EIO);
        Error::invalid(operation, Errno::from_raw(raw))
    }
}

fn position(file: &pinfold::File) -> pinfold::Result<u64> {
    let mut file = file;
    file.stream_position().map_err(from_io("seek in"))
}

fn go(file: &pinfold::File, to: SeekFrom) -> pinfold::Result<u64> {
    let mut file = file;
    file.seek(to).map_err(from_io("seek in"))
}

#[pymethods]
impl File {
    /// The path it was opened with.
    #[getter]
    fn name(&self, py: Python<'_>) -> Py<PyAny> {
        self.name.clone_ref(py)
    }

    #[getter]
    fn closed(&self) -> bool {
        // The child of a fork has nothing open, and does not look: a thread of the parent may have held the lock.
        !self.process.is_current() || self.slot.lock().is_none()
    }

    /// Refuses what is closed or the parent's.
    fn check(&self) -> PyResult<()> {
        self.open().map(drop)
    }

    fn readable(&self) -> PyResult<bool> {
        self.open().map(|_| self.readable)
    }

    fn writable(&self) -> PyResult<bool> {
        self.open().map(|_| self.writable)
    }

    #[getter]
    fn size(&self) -> PyResult<u64> {
        Ok(self.open()?.file.len())
    }

    #[pyo3(signature = (size = -1, /), text_signature = "($self, size=-1, /)")]
    fn read<'py>(&self, py: Python<'py>, size: Option<isize>) -> PyResult<Bound<'py, PyBytes>> {
        match usize::try_from(size.unwrap_or(-1)) {
            Ok(size) => {
                let open = self.for_reading(py)?;
                self.read_bytes(py, open, size, &read_next, Whole::No)
            }
            Err(_) => self.readall(py),
        }
    }

    fn readall<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let open = self.for_reading(py)?;
        let from = self.run(py, Arc::clone(&open), position)?;
        let left = open.file.len().saturating_sub(from);
        let mut size = usize::try_from(left).unwrap_or(usize::MAX);
        if self.direct {
            size = size.next_multiple_of(PAGE_SIZE as usize);
        }
        self.read_bytes(py, open, size, &read_next, Whole::Yes)
    }

    fn readinto(&self, py: Python<'_>, buffer: &Bound<'_, PyAny>) -> PyResult<usize> {
        let open = self.for_reading(py)?;
        let lent = Lent::target(buffer)?;
        self.run(py, open, |file| {
            let moved = drain(&mut lent.cursor(), |cursor, at| read_next(file, cursor, at));
            Whole::No.outcome(moved)
        })
    }

    fn write(&self, py: Python<'_>, data: &Bound<'_, PyAny>) -> PyResult<usize> {
        let open = self.for_writing(py)?;
        let lent = Lent::source(data)?;
        self.run(py, open, |file| {
            let moved = drain(&mut lent.cursor(), |cursor, _| {
                file.write_next_cursor(cursor, &IoOptions::default())
            });
            Whole::No.outcome(moved)
        })
    }

    fn read_at<'py>(
        &self,
        py: Python<'py>,
        size: usize,
        offset: i64,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let open = self.for_reading(py)?;
        let offset = self.offset(py, offset)?;
        let left = open.file.len().saturating_sub(offset);
        let mut left = usize::try_from(left).unwrap_or(usize::MAX);
        if self.direct {
            left = left.next_multiple_of(PAGE_SIZE as usize);
        }
        let step = |file: &pinfold::File, cursor: &mut IovCursor<'_>, at: u64| {
            file.read_cursor(cursor, offset.saturating_add(at), &IoOptions::default())
        };
        self.read_bytes(py, open, size.min(left), &step, Whole::No)
    }

    fn readinto_at(
        &self,
        py: Python<'_>,
        buffer: &Bound<'_, PyAny>,
        offset: i64,
    ) -> PyResult<usize> {
        let open = self.for_reading(py)?;
        let offset = self.offset(py, offset)?;
        let lent = Lent::target(buffer)?;
        self.run(py, open, |file| {
            let moved = drain(&mut lent.cursor(), |cursor, at| {
                file.read_cursor(cursor, offset.saturating_add(at), &IoOptions::default())
            });
            Whole::No.outcome(moved)
        })
    }

    fn write_at(&self, py: Python<'_>, data: &Bound<'_, PyAny>, offset: i64) -> PyResult<usize> {
        let open = self.for_writing(py)?;
        let offset = self.offset(py, offset)?;
        let lent = Lent::source(data)?;
        self.run(py, open, |file| {
            let moved = drain(&mut lent.cursor(), |cursor, at| {
                file.write_cursor(cursor, offset.saturating_add(at), &IoOptions::default())
            });
            Whole::No.outcome(moved)
        })
    }

    /// Reads to the end of the line. The bytes after it stay in the cache, which is all the buffering there is.
    #[pyo3(signature = (size = -1, /), text_signature = "($self, size=-1, /)")]
    fn readline<'py>(&self, py: Python<'py>, size: Option<isize>) -> PyResult<Bound<'py, PyBytes>> {
        let limit = usize::try_from(size.unwrap_or(-1)).unwrap_or(usize::MAX);
        let open = self.for_reading(py)?;
        let line = self.run(py, open, |file| {
            let start = position(file)?;
            let mut line = Vec::new();
            let mut step = LINE_STEP;
            while line.len() < limit {
                let old = line.len();
                line.resize(old + step.min(limit - old), 0);
                let got = file.read_at(&mut line[old..], start + old as u64)?;
                let end = line[old..old + got].iter().position(|&byte| byte == b'\n');
                line.truncate(old + end.map_or(got, |at| at + 1));
                if end.is_some() || got == 0 {
                    break;
                }
                step = (step * 2).min(LINE_STEP_MAX);
            }
            go(file, SeekFrom::Start(start + line.len() as u64))?;
            Ok(line)
        })?;
        Ok(PyBytes::new(py, &line))
    }

    #[pyo3(signature = (offset, whence = 0, /))]
    fn seek(&self, py: Python<'_>, offset: i64, whence: i32) -> PyResult<u64> {
        let open = self.open()?;
        self.run(py, open, |file| {
            let find = |what| {
                let from = u64::try_from(offset).map_err(|_| invalid_seek())?;
                let nothing = || Error::invalid("seek in", Errno::ENXIO);
                file.seek_to(what, from)?.ok_or_else(nothing)
            };
            let to = match whence {
                libc::SEEK_SET => {
                    SeekFrom::Start(u64::try_from(offset).map_err(|_| invalid_seek())?)
                }
                libc::SEEK_CUR => SeekFrom::Current(offset),
                libc::SEEK_END => SeekFrom::End(offset),
                libc::SEEK_DATA => SeekFrom::Start(find(Seek::Data)?),
                libc::SEEK_HOLE => SeekFrom::Start(find(Seek::Hole)?),
                _ => return Err(invalid_seek()),
            };
            go(file, to)
        })
    }

    fn tell(&self, py: Python<'_>) -> PyResult<u64> {
        let open = self.open()?;
        self.run(py, open, position)
    }

    #[pyo3(signature = (size = None, /))]
    fn truncate(&self, py: Python<'_>, size: Option<i64>) -> PyResult<u64> {
        let open = self.for_writing(py)?;
        let size = size.map(|size| self.offset(py, size)).transpose()?;
        self.run(py, open, |file| {
            let size = match size {
                Some(size) => size,
                None => position(file)?,
            };
            file.set_len(size)?;
            Ok(size)
        })
    }

    fn sync(&self, py: Python<'_>) -> PyResult<()> {
        let open = self.open()?;
        self.run(py, open, pinfold::File::sync_all)
    }

    fn datasync(&self, py: Python<'_>) -> PyResult<()> {
        let open = self.open()?;
        self.run(py, open, pinfold::File::sync_data)
    }

    fn drop_cache(&self, py: Python<'_>) -> PyResult<()> {
        let open = self.open()?;
        self.run(py, open, pinfold::File::drop_cache)
    }

    #[pyo3(signature = (offset, length, *, keep_size = false))]
    fn allocate(&self, py: Python<'_>, offset: i64, length: i64, keep_size: bool) -> PyResult<()> {
        let open = self.for_writing(py)?;
        let range = self.range(py, offset, length)?;
        let mode = if keep_size {
            AllocateMode::KeepSize
        } else {
            AllocateMode::Extend
        };
        self.run(py, open, |file| file.allocate(mode, range))
    }

    fn punch(&self, py: Python<'_>, offset: i64, length: i64) -> PyResult<()> {
        let open = self.for_writing(py)?;
        let range = self.range(py, offset, length)?;
        self.run(py, open, |file| file.punch(range))
    }

    #[pyo3(signature = (offset, length, access, delivery, advice))]
    fn map(
        &self,
        py: Python<'_>,
        offset: i64,
        length: Option<i64>,
        access: &str,
        delivery: &str,
        advice: &str,
    ) -> PyResult<Mapping> {
        let asked = Asked::parse(access, delivery, advice)?;
        let open = self.open()?;
        let start = self.offset(py, offset)?;
        let size = open.file.len();
        let end = match length {
            Some(length) => self.range(py, offset, length)?.end,
            None => size,
        };
        if start >= end {
            return Err(PyValueError::new_err("cannot map an empty range"));
        }
        if end > size {
            // Possible, but a touch beyond the end is SIGBUS, which Python cannot handle.
            return Err(PyValueError::new_err(
                "the range reaches beyond the end of the file",
            ));
        }
        // Python programs turn faulthandler on when they like; its handlers know nothing of mappings and hand nothing down.
        pinfold::install_fault_handler();
        let mapping = self.run(py, open, |file| file.map(start..end, asked.options()))?;
        Ok(Mapping::new(mapping, &asked, self.name.clone_ref(py)))
    }

    /// Closes it: what is dirty is written back if nobody else has the file open.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        if !self.process.is_current() {
            // The parent's; there is nothing here to close.
            return Ok(());
        }
        let Some(open) = self.slot.lock().take() else {
            return Ok(());
        };
        let closed = py.detach(move || match Arc::try_unwrap(open) {
            Ok(open) => open.file.close(),
            // A call of another thread is under way; the file goes when it returns.
            Err(_) => Ok(()),
        });
        closed.map_err(|error| self.raise(py, &error))
    }
}

impl Drop for File {
    fn drop(&mut self) {
        let Some(open) = self.slot.get_mut().take() else {
            return;
        };
        if !self.process.is_current() {
            std::mem::forget(open);
            return;
        }
        crate::volume::drop_outside(open);
    }
}
