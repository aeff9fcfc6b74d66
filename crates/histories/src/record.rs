//! The record of calls: a mapped file a thread, so that what a killed process began is known.
//!
//! *Owns*: the rows and their format, writing them, reading them back.
//!
//! *Does not own*: what they mean ([`crate::check`]).
//!
//! *Locking*: none; a log is one thread's.
//!
//! A row is four words: what and where, value, begin, end. The end is zero until the call returns. Stores of a process that
//! is killed stay in the mapped file.

use std::fs::File;
use std::io::{BufReader, ErrorKind, Read};
use std::os::fd::AsFd;
use std::path::Path;

use anyhow::{Context, bail, ensure};
use pinfold_mem::region::view::{FileMap, Sharing};

const ROW: usize = 32;
const MAGIC: u64 = 0x3154_5348_4644_4e50;

/// What a call did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Put the value.
    Write,
    /// Returned the value.
    Read,
    /// Made durable what was written to a file before.
    Sync,
}

/// How the bytes went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Way {
    /// Through the cache, by a call.
    Buffered,
    /// By a load or store.
    Mapped,
    /// Past the cache.
    Direct,
}

/// When a call returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// At this time, in nanoseconds.
    At(u64),
    /// Without an answer, or with an error: a write may take effect at any later time, or never.
    Never,
}

/// One call to one register, or one sync of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    /// Which life of which node: a node that is started again has another.
    pub node: u32,
    /// The register; of a sync, the file.
    pub register: u32,
    /// What it did.
    pub kind: Kind,
    /// How.
    pub way: Way,
    /// A read that saw words of different writes in one register.
    pub torn: bool,
    /// The value written or read.
    pub value: u64,
    /// When it was begun.
    pub start: u64,
    /// When it returned.
    pub end: End,
}

impl Kind {
    const ALL: [Self; 3] = [Self::Write, Self::Read, Self::Sync];
}

impl Way {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Buffered, Self::Mapped, Self::Direct];

    /// Its word.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Buffered => "buffered",
            Self::Mapped => "mapped",
            Self::Direct => "direct",
        }
    }
}

const TORN: u64 = 1 << 16;
const FAILED: u64 = u64::MAX;

/// The log that a thread writes.
#[derive(Debug)]
pub struct Log {
    map: FileMap,
    next: usize,
    rows: usize,
}

/// A call under way.
#[derive(Debug, Clone, Copy)]
#[must_use = "a call without an end counts as one without an answer"]
pub struct Open(usize);

impl Log {
    /// Makes the log of a thread of `node`, with room for `rows` calls; what is not used takes no room on disk.
    ///
    /// # Errors
    /// What keeps the file from being made or mapped.
    pub fn create(path: &Path, node: u32, rows: usize) -> anyhow::Result<Self> {
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(path)
            .with_context(|| path.display().to_string())?;
        let len = (rows + 1) * ROW;
        file.set_len(len as u64)?;
        let map = FileMap::new(file.as_fd(), 0, len, Sharing::Shared)
            .map_err(|errno| anyhow::anyhow!("{}: {errno}", path.display()))?;
        let log = Self { map, next: 0, rows };
        log.put(8, u64::from(node))?;
        log.put(0, MAGIC)?;
        Ok(log)
    }

    /// Tells whether `count` more calls find room.
    #[must_use]
    pub const fn has_room(&self, count: usize) -> bool {
        self.next + count <= self.rows
    }

    /// Notes that a call is begun. The value of a read is told at its end.
    ///
    /// # Errors
    /// A full log or disk.
    pub fn begin(
        &mut self,
        kind: Kind,
        way: Way,
        register: u32,
        value: u64,
        start: u64,
    ) -> anyhow::Result<Open> {
        ensure!(self.has_room(1), "the log is full");
        let at = (self.next + 1) * ROW;
        self.put(at + 8, value)?;
        self.put(at + 16, start)?;
        // Last: a row with it is complete.
        let what = (kind as u64 + 1) | (way as u64) << 8 | u64::from(register) << 32;
        self.put(at, what)?;
        self.next += 1;
        Ok(Open(at))
    }

    /// Notes what a read returned, before its end.
    ///
    /// # Errors
    /// A full disk.
    pub fn saw(&self, open: Open, value: u64, torn: bool) -> anyhow::Result<()> {
        self.put(open.0 + 8, value)?;
        if torn {
            let what = self.map.view().load_u64(open.0).unwrap_or(0);
            self.put(open.0, what | TORN)?;
        }
        Ok(())
    }

    /// Notes that a call returned.
    ///
    /// # Errors
    /// A full disk.
    pub fn end(&self, open: Open, end: End) -> anyhow::Result<()> {
        let word = match end {
            End::At(time) => time,
            End::Never => FAILED,
        };
        self.put(open.0 + 24, word)
    }

    fn put(&self, at: usize, word: u64) -> anyhow::Result<()> {
        match self.map.view().store_u64(at, word) {
            Ok(()) => Ok(()),
            Err(hit) => bail!("the log cannot be written: signal {}", hit.signal),
        }
    }
}

/// Appends the calls of one log to `calls`.
///
/// # Errors
/// What keeps the file from being read; a file that is no log.
pub fn read(path: &Path, calls: &mut Vec<Call>) -> anyhow::Result<()> {
    let name = || path.display().to_string();
    let file = File::open(path).with_context(name)?;
    let empty = file.metadata().with_context(name)?.len() == 0;
    // What was not used is a hole: it is not read.
    let mut file = BufReader::with_capacity(1 << 20, file);
    let mut row = [0; ROW];
    let mut next = || -> anyhow::Result<Option<[u64; 4]>> {
        match file.read_exact(&mut row) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(None),
            Err(error) => return Err(error).with_context(name),
        }
        let mut words = [0; 4];
        for (word, bytes) in words.iter_mut().zip(row.as_chunks().0) {
            *word = u64::from_ne_bytes(*bytes);
        }
        Ok(Some(words))
    };
    let node = match next()? {
        Some([MAGIC, node, ..]) => node,
        // Of a process that was killed while it made the log: it has called nothing.
        Some([0, ..]) => return Ok(()),
        None if empty => return Ok(()),
        _ => bail!("{} is no log", path.display()),
    };
    while let Some([what, value, start, end]) = next()?
        && what != 0
    {
        let kind = Kind::ALL.get(((what & 0xff) as usize).wrapping_sub(1));
        let way = Way::ALL.get((what >> 8 & 0xff) as usize);
        let (Some(&kind), Some(&way)) = (kind, way) else {
            bail!("{}: garbage", path.display());
        };
        calls.push(Call {
            node: node as u32,
            register: (what >> 32) as u32,
            kind,
            way,
            torn: what & TORN != 0,
            value,
            start,
            end: match end {
                0 | FAILED => End::Never,
                time => End::At(time),
            },
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_returns_what_was_noted_and_the_call_that_never_ended() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("one.log");
        let mut log = Log::create(&path, 7, 3).unwrap();
        let write = log.begin(Kind::Write, Way::Mapped, 9, 55, 100).unwrap();
        log.end(write, End::At(120)).unwrap();
        let read_call = log.begin(Kind::Read, Way::Direct, 10, 0, 130).unwrap();
        log.saw(read_call, 55, true).unwrap();
        log.end(read_call, End::At(140)).unwrap();
        let _pending = log.begin(Kind::Sync, Way::Buffered, 2, 0, 150).unwrap();
        assert!(log.begin(Kind::Read, Way::Direct, 1, 0, 0).is_err());
        drop(log);
        let mut calls = Vec::new();
        read(&path, &mut calls).unwrap();
        let brief: Vec<_> = calls
            .iter()
            .map(|call| (call.kind, call.way, call.register, call.torn, call.value))
            .collect();
        assert_eq!(
            brief,
            [
                (Kind::Write, Way::Mapped, 9, false, 55),
                (Kind::Read, Way::Direct, 10, true, 55),
                (Kind::Sync, Way::Buffered, 2, false, 0),
            ]
        );
        assert_eq!(calls[0].node, 7);
        assert_eq!(calls[0].end, End::At(120));
        assert_eq!(calls[2].end, End::Never);
        for unfinished in [&[][..], &[0; 96]] {
            std::fs::write(&path, unfinished).unwrap();
            read(&path, &mut calls).unwrap();
            assert_eq!(calls.len(), 3);
        }
        std::fs::write(&path, "not a log").unwrap();
        assert!(read(&path, &mut calls).is_err());
    }
}
