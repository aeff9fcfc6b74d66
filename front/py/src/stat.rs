//! Attributes as `os.stat_result`.

use std::time::{SystemTime, UNIX_EPOCH};

use pinfold::{Kind, Metadata};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyTuple};

const NANOS: i128 = 1_000_000_000;

/// Makes the object that `os.stat` would return.
pub(crate) fn stat_result<'py>(py: Python<'py>, of: &Metadata) -> PyResult<Bound<'py, PyAny>> {
    static CLASS: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let nanos = [of.accessed, of.modified, of.changed].map(nanos_since_epoch);
    let [accessed, modified, changed] = nanos.map(|nanos| nanos.div_euclid(NANOS));
    let sequence = (
        type_bits(of.kind) | of.permissions,
        of.id.inode,
        of.id.device,
        of.links,
        of.uid,
        of.gid,
        of.len,
        accessed,
        modified,
        changed,
    );
    // What has no place in the sequence goes in by name.
    let named = PyDict::new(py);
    for (name, nanos) in ["atime", "mtime", "ctime"].iter().zip(nanos) {
        let (whole, rest) = (nanos.div_euclid(NANOS), nanos.rem_euclid(NANOS));
        // Rounded as CPython rounds it, so that the floats compare equal.
        named.set_item(format!("st_{name}"), whole as f64 + 1e-9 * rest as f64)?;
        named.set_item(format!("st_{name}_ns"), nanos)?;
    }
    named.set_item("st_blksize", of.block_size)?;
    named.set_item("st_blocks", of.blocks)?;
    named.set_item("st_rdev", of.rdev)?;
    let sequence: Bound<'py, PyTuple> = sequence.into_pyobject(py)?;
    CLASS
        .import(py, "os", "stat_result")?
        .call1((sequence, named))
}

/// Returns the file-type bits of `st_mode`.
pub(crate) fn type_bits(kind: Kind) -> u32 {
    match kind {
        Kind::File => libc::S_IFREG,
        Kind::Directory => libc::S_IFDIR,
        Kind::Symlink => libc::S_IFLNK,
        Kind::Fifo => libc::S_IFIFO,
        Kind::Socket => libc::S_IFSOCK,
        Kind::CharDevice => libc::S_IFCHR,
        Kind::BlockDevice => libc::S_IFBLK,
    }
}

fn nanos_since_epoch(time: SystemTime) -> i128 {
    match time.duration_since(UNIX_EPOCH) {
        // Seconds are 64 bits: neither sum nor sign overflows 128.
        Ok(after) => after.as_nanos() as i128,
        Err(before) => -(before.duration().as_nanos() as i128),
    }
}
