//! A volume: what makes the engine, opens files and answers for names.

use std::time::Duration;

use parking_lot::Mutex;
use pinfold::{Error, OpenOptions, Privilege, Process};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyString};

use crate::directory::Directory;
use crate::error::{closed, os_error_of_two, raise};
use crate::file::File;
use crate::forked;
use crate::path::{PathArg, name_to_python};
use crate::stat::stat_result;

/// The native side of `pinfold.Volume`.
#[pyclass(frozen, subclass, module = "pinfold._native")]
#[derive(Debug)]
pub(crate) struct Volume {
    slot: Mutex<Option<pinfold::Volume>>,
    path: PathArg,
    process: Process,
}

/// A number of bytes: an int, or a str such as "64MiB" with units that are powers of 1024, as on the command line.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Size(u64);

impl<'a, 'py> FromPyObject<'a, 'py> for Size {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        let Ok(text) = object.cast::<PyString>() else {
            return object.extract().map(Self).map_err(|error| {
                if error.is_instance_of::<PyTypeError>(object.py()) {
                    return PyTypeError::new_err("a size is an int or a str such as '64MiB'");
                }
                error
            });
        };
        let text: String = text.extract()?;
        parse_size(&text).map(Self).ok_or_else(|| {
            PyValueError::new_err(format!(
                "{text:?} is no size; write it as 4096, '64M' or '2GiB'"
            ))
        })
    }
}

fn parse_size(text: &str) -> Option<u64> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(1 << shift)
}

fn seconds(value: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(value)
        .map_err(|_| PyValueError::new_err(format!("{value} is no number of seconds to wait")))
}

/// Drops what may wait, such as for a last write-back, outside the interpreter where one is running.
pub(crate) fn drop_outside<T: Send>(value: T) {
    let mut value = Some(value);
    Python::try_attach(|py| {
        let value = value.take();
        py.detach(move || drop(value));
    });
}

impl Volume {
    fn open_volume(&self) -> PyResult<pinfold::Volume> {
        forked::check(self.process)?;
        self.slot.lock().clone().ok_or_else(|| closed("volume"))
    }

    /// Runs `work` outside the interpreter; the clone it works on is let go of there, too.
    fn run<R: Send>(
        &self,
        py: Python<'_>,
        work: impl FnOnce(&pinfold::Volume) -> pinfold::Result<R> + Send,
    ) -> PyResult<Result<R, Error>> {
        let volume = self.open_volume()?;
        Ok(py.detach(move || work(&volume)))
    }

    fn run_at<R: Send>(
        &self,
        py: Python<'_>,
        path: &PathArg,
        work: impl FnOnce(&pinfold::Volume) -> pinfold::Result<R> + Send,
    ) -> PyResult<R> {
        self.run(py, work)?
            .map_err(|error| raise(py, &error, Some(path.object())))
    }

    fn run_between(
        &self,
        py: Python<'_>,
        from: &PathArg,
        to: &PathArg,
        work: impl FnOnce(&pinfold::Volume) -> pinfold::Result<()> + Send,
    ) -> PyResult<()> {
        self.run(py, work)?
            .map_err(|error| os_error_of_two(py, &error, from.object(), to.object()))
    }
}

#[pymethods]
impl Volume {
    #[new]
    #[pyo3(signature = (
        path, memory = None, *, dirty_limit = None, dirty_age = None, io_uring = true,
        retain_dirty_on_error = false, store_timeout = None
    ))]
    #[expect(clippy::too_many_arguments, reason = "keywords of Python's")]
    fn new(
        py: Python<'_>,
        path: PathArg,
        memory: Option<Size>,
        dirty_limit: Option<Size>,
        dirty_age: Option<f64>,
        io_uring: bool,
        retain_dirty_on_error: bool,
        store_timeout: Option<f64>,
    ) -> PyResult<Self> {
        let mut builder = pinfold::Volume::builder()
            .io_uring(io_uring)
            .retain_dirty_on_error(retain_dirty_on_error);
        if let Some(Size(bytes)) = memory {
            builder = builder.memory(bytes);
        }
        if let Some(Size(bytes)) = dirty_limit {
            builder = builder.dirty_limit(bytes);
        }
        if let Some(age) = dirty_age {
            builder = builder.dirty_age_max(seconds(age)?);
        }
        if let Some(limit) = store_timeout {
            builder = builder.store_timeout(seconds(limit)?);
        }
        let opened = py.detach(|| builder.open_dir(path.path()));
        let volume = opened.map_err(|error| raise(py, &error, Some(path.object())))?;
        Ok(Self {
            slot: Mutex::new(Some(volume)),
            path,
            process: Process::current(),
        })
    }

    /// The directory it was opened on.
    #[getter]
    fn path(&self, py: Python<'_>) -> Py<PyAny> {
        self.path.object().clone_ref(py)
    }

    /// Whether it was closed; true in a forked child as well, where it is of no use.
    #[getter]
    fn closed(&self) -> bool {
        // The child does not look: a thread of the parent may have held the lock.
        !self.process.is_current() || self.slot.lock().is_none()
    }

    /// Write everything back and end the volume. Files and mappings still open keep working; the directory is free for others once the
    /// last of them is closed.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        if !self.process.is_current() {
            // The parent's; there is nothing here to close.
            return Ok(());
        }
        let Some(volume) = self.slot.lock().take() else {
            return Ok(());
        };
        py.detach(move || volume.close())
            .map_err(|error| raise(py, &error, Some(self.path.object())))
    }

    /// Write back everything that is dirty and make it durable.
    fn sync(&self, py: Python<'_>) -> PyResult<()> {
        self.run_at(py, &self.path, pinfold::Volume::sync)
    }

    /// Return what happened since the volume was opened: a dict of counters.
    fn statistics<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let rows = self.run_at(py, &self.path, |volume| Ok(volume.statistics().rows()))?;
        let counters = PyDict::new(py);
        for (name, value) in rows {
            counters.set_item(name, value)?;
        }
        Ok(counters)
    }

    /// Return what the system lets the volume do, a dict. "mappings" is "full" or "device", or "user mode only": then a
    /// system call on mapped memory that is not resident fails with EFAULT, unless it was pinned; or None, where there are
    /// no mappings, and "mappings_error" says why.
    fn capabilities<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let told = self.run_at(py, &self.path, |volume| Ok(volume.capabilities()))?;
        let (mappings, error) = match &told.mappings {
            Ok(Privilege::Full) => (Some("full"), None),
            Ok(Privilege::Device) => (Some("device"), None),
            Ok(Privilege::UserModeOnly) => (Some("user mode only"), None),
            Err(error) => (None, Some(error.to_string())),
        };
        let capabilities = PyDict::new(py);
        capabilities.set_item("mappings", mappings)?;
        capabilities.set_item("mappings_error", error)?;
        Ok(capabilities)
    }

    /// Open a file by flags of open(2): what `Volume.open` makes its files of.
    #[pyo3(signature = (path, flags, permissions = 0o666))]
    fn open_file(
        &self,
        py: Python<'_>,
        path: PathArg,
        flags: i32,
        permissions: u32,
    ) -> PyResult<File> {
        let volume = self.open_volume()?;
        let name = path.object().clone_ref(py);
        let file = self.run_at(py, &path, |volume| {
            let options = OpenOptions::from_flags(flags)?.mode(permissions);
            volume.open(path.path(), &options)
        })?;
        Ok(File::new(file, volume, name))
    }

    /// Return the attributes of what a path names, as os.stat does.
    #[pyo3(signature = (path, *, follow_symlinks = true))]
    fn stat<'py>(
        &self,
        py: Python<'py>,
        path: PathArg,
        follow_symlinks: bool,
    ) -> PyResult<Bound<'py, PyAny>> {
        let metadata = self.run_at(py, &path, |volume| {
            if follow_symlinks {
                volume.metadata(path.path())
            } else {
                volume.symlink_metadata(path.path())
            }
        })?;
        stat_result(py, &metadata)
    }

    /// Return the attributes of what a path names, a symbolic link's own, as os.lstat does.
    fn lstat<'py>(&self, py: Python<'py>, path: PathArg) -> PyResult<Bound<'py, PyAny>> {
        self.stat(py, path, false)
    }

    /// Tell whether a path names anything that can be reached; symbolic links are followed.
    fn exists(&self, py: Python<'_>, path: PathArg) -> PyResult<bool> {
        let found = self.run(py, |volume| volume.metadata(path.path()))?;
        Ok(found.is_ok())
    }

    /// Return the names in a directory, without "." and "..", in no particular order.
    #[pyo3(signature = (path = None), text_signature = "($self, path='.')")]
    fn listdir<'py>(&self, py: Python<'py>, path: Option<PathArg>) -> PyResult<Bound<'py, PyList>> {
        let path = path.unwrap_or_else(|| PathArg::root(py));
        let entries = self.run_at(py, &path, |volume| {
            volume
                .read_dir(path.path())?
                .collect::<pinfold::Result<Vec<_>>>()
        })?;
        let names = PyList::empty(py);
        for entry in &entries {
            names.append(name_to_python(py, &entry.name, path.is_bytes())?)?;
        }
        Ok(names)
    }

    /// Return an iterator over a directory's entries: what `Volume.scandir` makes its entries of.
    fn read_directory(&self, py: Python<'_>, path: PathArg) -> PyResult<Directory> {
        let directory = self.run_at(py, &path, |volume| volume.read_dir(path.path()))?;
        Ok(Directory::new(directory, path, self.process))
    }

    /// Make a directory.
    #[pyo3(signature = (path, mode = 0o777))]
    fn mkdir(&self, py: Python<'_>, path: PathArg, mode: u32) -> PyResult<()> {
        self.run_at(py, &path, |volume| volume.create_dir(path.path(), mode))
    }

    /// Remove a name that is not a directory's.
    fn remove(&self, py: Python<'_>, path: PathArg) -> PyResult<()> {
        self.run_at(py, &path, |volume| volume.remove_file(path.path()))
    }

    /// Remove an empty directory.
    fn rmdir(&self, py: Python<'_>, path: PathArg) -> PyResult<()> {
        self.run_at(py, &path, |volume| volume.remove_dir(path.path()))
    }

    /// Rename, replacing what the new name meant before.
    fn rename(&self, py: Python<'_>, src: PathArg, dst: PathArg) -> PyResult<()> {
        self.run_between(py, &src, &dst, |volume| {
            volume.rename(src.path(), dst.path())
        })
    }

    /// Give a file a second name.
    fn link(&self, py: Python<'_>, src: PathArg, dst: PathArg) -> PyResult<()> {
        self.run_between(py, &src, &dst, |volume| {
            volume.hard_link(src.path(), dst.path())
        })
    }

    /// Make `dst` a symbolic link that points to `src`.
    fn symlink(&self, py: Python<'_>, src: PathArg, dst: PathArg) -> PyResult<()> {
        self.run_between(py, &src, &dst, |volume| {
            volume.symlink(src.path(), dst.path())
        })
    }

    /// Return where a symbolic link points.
    fn readlink<'py>(&self, py: Python<'py>, path: PathArg) -> PyResult<Bound<'py, PyAny>> {
        let target = self.run_at(py, &path, |volume| volume.read_link(path.path()))?;
        name_to_python(py, target.as_os_str(), path.is_bytes())
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        let Some(volume) = self.slot.get_mut().take() else {
            return;
        };
        if !self.process.is_current() {
            std::mem::forget(volume);
            return;
        }
        drop_outside(volume);
    }
}
