//! The files that are measured on: made, brought to a state, removed at the end; and the clock of a thread's own work.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::Advice;
use rustix::time::{ClockId, clock_gettime};

/// The transfer size of sequential reads and writes, in bytes.
pub(super) const CHUNK: usize = 1 << 20;
/// The page, in bytes.
pub(super) const PAGE: usize = 4096;

/// A subdirectory that goes with this value.
#[derive(Debug)]
pub(super) struct Scratch {
    given: PathBuf,
    path: PathBuf,
}

impl Scratch {
    pub(super) fn new(dir: &Path) -> Result<Self> {
        let given = dir
            .canonicalize()
            .with_context(|| dir.display().to_string())?;
        let path = given.join(format!("pinfold-bench-{}", std::process::id()));
        std::fs::create_dir(&path).with_context(|| path.display().to_string())?;
        Ok(Self { given, path })
    }

    /// Returns the directory that was asked for.
    pub(super) fn given(&self) -> &Path {
        &self.given
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes a subdirectory: a volume claims the directory it is opened on.
    pub(super) fn dir(&self, name: &str) -> Result<PathBuf> {
        let path = self.path.join(name);
        std::fs::create_dir_all(&path).with_context(|| path.display().to_string())?;
        Ok(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.path) {
            eprintln!(
                "pinfold: {} could not be removed: {error}",
                self.path.display()
            );
        }
    }
}

/// Bytes that no layer can shorten.
pub(super) fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        // xorshift64*: fast, and no two blocks alike.
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        bytes.extend(state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Makes a file of `size` bytes, stored and not cached.
pub(super) fn make_file(path: &Path, size: u64) -> Result<()> {
    let chunk = noise(CHUNK);
    let mut file = File::create(path).with_context(|| path.display().to_string())?;
    let mut left = size;
    while left > 0 {
        let len = left.min(CHUNK as u64) as usize;
        file.write_all(&chunk[..len])?;
        left -= len as u64;
    }
    file.sync_all()?;
    drop_cached(&file)?;
    Ok(())
}

/// Opens a file for reading and writing through the kernel.
pub(super) fn open(path: &Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .with_context(|| path.display().to_string())
}

/// Drops what the kernel caches of a file; what is dirty is stored first.
pub(super) fn drop_cached(file: &File) -> io::Result<()> {
    file.sync_data()?;
    rustix::fs::fadvise(file, 0, None, Advice::DontNeed)?;
    Ok(())
}

/// Reads all of a file in order through the kernel.
pub(super) fn read_all(file: &File, size: u64) -> io::Result<()> {
    let mut buf = vec![0; CHUNK];
    let mut at = 0;
    while at < size {
        let n = file.read_at(&mut buf, at)?;
        if n == 0 {
            break;
        }
        at += n as u64;
    }
    Ok(())
}

/// A stream of page offsets spread over a file, each run another.
#[derive(Debug)]
pub(super) struct Offsets {
    state: u64,
    pages: u64,
}

impl Offsets {
    pub(super) fn new(size: u64, seed: u64) -> Self {
        Self {
            state: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            pages: (size / PAGE as u64).max(1),
        }
    }

    /// Returns the next offset in bytes.
    #[inline]
    pub(super) fn next(&mut self) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        ((u128::from(self.state) * u128::from(self.pages)) >> 64) as u64 * PAGE as u64
    }
}

/// Returns the processor time of this thread, in user and kernel mode.
pub(super) fn thread_time_ns() -> f64 {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    now.tv_sec as f64 * 1e9 + now.tv_nsec as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let scratch = Scratch::new(dir.path()).unwrap();
        make_file(&scratch.dir("a").unwrap().join("f"), 3_000_000).unwrap();
        drop(scratch);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn offsets_are_whole_pages_that_cover_the_file() {
        let mut offsets = Offsets::new(64 * PAGE as u64, 7);
        let mut seen = std::collections::HashSet::new();
        for _ in 0..10_000 {
            let at = offsets.next();
            assert!(at.is_multiple_of(PAGE as u64) && at < 64 * PAGE as u64);
            seen.insert(at);
        }
        assert_eq!(seen.len(), 64);
    }
}
