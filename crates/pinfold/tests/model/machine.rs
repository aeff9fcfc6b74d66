//! Runs a program on a volume, or on several that share a directory, and on bytes in memory side by side.

use std::io::{IoSlice, IoSliceMut, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use pinfold::glocks::{Options, Space, service::local::Local};
use pinfold::{AllocateMode, Delivery, Errno, File, IoOptions, OpenOptions, Seek, Volume};
use pinfold_mem::Direction;
use pinfold_mem::region::{Protection, Region, UserIov};

use super::maps::Maps;
use super::program::{Op, Program, SIZE_MAX, Verb};

/// How a run ended that did not end well.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mismatch {
    /// Index of the operation.
    pub op: usize,
    /// What was seen, and what was expected.
    pub saw: String,
}

impl Mismatch {
    /// Returns what it is about, without the numbers: what a smaller program must fail in, too.
    pub fn class(&self) -> &str {
        let end = self.saw.find(|letter: char| letter.is_ascii_digit());
        &self.saw[..end.unwrap_or(self.saw.len())]
    }
}

/// A step that takes so long hangs; the longest programs take a second.
const STEP_MAX: Duration = Duration::from_secs(120);

/// Runs a program in a fresh directory.
///
/// A panic counts as a mismatch. A hang ends the process, after the program is printed.
pub fn run(program: &Program) -> Result<(), Mismatch> {
    run_on(program, 1)
}

/// As [`run`], each operation on another of so many nodes.
pub fn run_on(program: &Program, nodes: usize) -> Result<(), Mismatch> {
    let dir = tempfile::tempdir().unwrap();
    let (tell, told) = channel();
    let theirs = program.clone();
    let path = dir.path().to_path_buf();
    let steps = Arc::new(AtomicUsize::new(0));
    let done = Arc::clone(&steps);
    let runner = std::thread::Builder::new()
        .name("model".into())
        .spawn(move || {
            let result =
                Machine::new(&path, &theirs, nodes).and_then(|machine| machine.run(&theirs, &done));
            let _ = tell.send(result);
        })
        .unwrap();
    let mut seen = 0;
    let ended = loop {
        let ended = told.recv_timeout(STEP_MAX);
        let now = steps.load(Ordering::Relaxed);
        if ended != Err(RecvTimeoutError::Timeout) || now == seen {
            break ended;
        }
        // Where others keep the disk busy a program of many syncs takes its time.
        seen = now;
    };
    match ended {
        Ok(result) => {
            runner.join().unwrap();
            result
        }
        Err(RecvTimeoutError::Disconnected) => {
            let panic = runner.join().expect_err("no result means a panic");
            let saw = panic
                .downcast_ref::<String>()
                .cloned()
                .or_else(|| panic.downcast_ref::<&str>().map(|&text| text.to_owned()))
                .unwrap_or_default();
            Err(Mismatch {
                op: usize::MAX,
                saw: format!("panic: {saw}"),
            })
        }
        Err(RecvTimeoutError::Timeout) => hangs(&format!(
            "hangs for {STEP_MAX:?} after {seen} steps:\n{program}"
        )),
    }
}

/// Says what hangs, and where, and ends the process: nothing could be trusted after it.
pub fn hangs(what: &str) -> ! {
    // Not the macro: what that prints is lost with a test that never ends.
    let _ = writeln!(std::io::stderr(), "{what}");
    let _ = std::process::Command::new("gdb")
        .args(["--batch", "--nx", "-ex", "thread apply all bt 25", "-p"])
        .arg(std::process::id().to_string())
        .stdin(std::process::Stdio::null())
        .stdout(std::io::stderr())
        .status();
    std::process::abort()
}

/// Volumes, three descriptors of their file on each, and what the file must hold.
pub struct Machine {
    dir: PathBuf,
    pub pages: u64,
    inline: bool,
    volumes: Vec<Volume>,
    files: Vec<Files>,
    nodes: usize,
    /// The node that the next operation is for.
    pub now: usize,
    pub bytes: Vec<u8>,
    pub maps: Maps,
    /// What the other file must hold; its size never changes.
    pub other: Vec<u8>,
}

pub struct Files {
    pub buffered: Arc<File>,
    appending: File,
    pub direct: Arc<File>,
    pub other: File,
}

const NAME: &str = "file";
const OTHER: &str = "other";
pub const PAGE: u64 = 4096;

pub type Outcome = Result<(), String>;

impl Machine {
    fn new(dir: &Path, program: &Program, nodes: usize) -> Result<Self, Mismatch> {
        let other = Self::pattern(0, SIZE_MAX / 2, 5);
        std::fs::write(dir.join(OTHER), &other).unwrap();
        let mut machine = Self {
            dir: dir.to_path_buf(),
            pages: program.pages,
            inline: program.inline,
            volumes: Vec::new(),
            files: Vec::new(),
            nodes,
            now: 0,
            bytes: Vec::new(),
            maps: Maps::default(),
            other,
        };
        machine.mount().map_err(|saw| Mismatch { op: 0, saw })?;
        Ok(machine)
    }

    fn run(mut self, program: &Program, done: &AtomicUsize) -> Result<(), Mismatch> {
        for (index, &op) in program.ops.iter().enumerate() {
            // Odd steps of different lengths: every pair of nodes comes one after the other, and each twice in a row.
            self.now = (index * 7 + index / 5) % self.nodes;
            self.step(op, index)
                .and_then(|()| self.check_size())
                .map_err(|saw| Mismatch { op: index, saw })?;
            done.fetch_add(1, Ordering::Relaxed);
        }
        self.check()
            .and_then(|()| self.unmount())
            .and_then(|()| self.check_stored())
            .map_err(|saw| Mismatch {
                op: program.ops.len(),
                saw,
            })
    }

    fn step(&mut self, op: Op, tag: usize) -> Outcome {
        let Op { verb, at, len } = op;
        match verb {
            Verb::Write => self.write(at, len, tag),
            Verb::WriteVectored => self.write_vectored(at, len, tag),
            Verb::WriteBad => self.write_bad(at, len, tag),
            Verb::Append => self.append(len, tag),
            Verb::Read => self.read(at, len),
            Verb::ReadVectored => self.read_vectored(at, len),
            Verb::ReadBad => self.read_bad(at, len),
            Verb::WriteDirect => self.write_direct(at, len, tag),
            Verb::ReadDirect => self.read_direct(at, len),
            Verb::SetLen => self.set_len(at),
            Verb::Punch => self.zero(AllocateMode::Punch, at, len),
            Verb::Zero => self.zero(AllocateMode::ZeroKeepSize, at, len),
            Verb::ZeroExtend => self.zero(AllocateMode::ZeroExtend, at, len),
            Verb::Allocate => self.allocate(AllocateMode::KeepSize, at, len),
            Verb::AllocateExtend => self.allocate(AllocateMode::Extend, at, len),
            Verb::Collapse => self.collapse(at, len),
            Verb::Insert => self.insert(at, len),
            Verb::Seek => self.seek(at),
            Verb::Sync => self.sync(true),
            Verb::SyncData => self.sync(false),
            Verb::DropCache => said("drop_cache", self.files().buffered.drop_cache()),
            Verb::Reopen => self.open(),
            Verb::Remount => self.remount(),
            Verb::Check => self.check(),
            _ => self.mapped_step(op, tag),
        }
    }

    pub fn files(&self) -> &Files {
        let files = self.files.get(self.now);
        files.expect("open from `mount` to `unmount`")
    }

    pub fn delivery(&self) -> Delivery {
        if self.inline {
            Delivery::Inline
        } else {
            Delivery::Handler
        }
    }

    fn mount(&mut self) -> Outcome {
        let service = Local::new();
        for node in 0..self.nodes {
            let mut builder = Volume::builder().memory(self.pages * PAGE);
            if self.nodes > 1 {
                let options = Options {
                    hold: Duration::ZERO,
                    ..Options::default()
                };
                let space = Space::join(&service, &node.to_string(), options);
                builder = builder.glocks(Arc::new(space.map_err(|error| error.to_string())?));
            }
            self.volumes
                .push(said("open_dir", builder.open_dir(&self.dir))?);
        }
        self.open()
    }

    fn open(&mut self) -> Outcome {
        self.files.clear();
        for volume in &self.volumes {
            self.files.push(Self::open_on(volume)?);
        }
        Ok(())
    }

    fn open_on(volume: &Volume) -> Result<Files, String> {
        let options = OpenOptions::new().read(true).write(true).create(true);
        let open = |options: OpenOptions| said("open", volume.open(NAME, &options));
        Ok(Files {
            other: said("open", volume.open(OTHER, &options))?,
            buffered: Arc::new(open(options)?),
            appending: open(options.append(true))?,
            direct: Arc::new(open(options.direct(true))?),
        })
    }

    fn unmount(&mut self) -> Outcome {
        self.maps = Maps::default();
        self.files.clear();
        for volume in self.volumes.drain(..) {
            let counts = volume.statistics().cache;
            same(
                "pins given back",
                counts.foll_pin_released,
                counts.foll_pin_acquired,
            )?;
            said("close", volume.close())?;
        }
        Ok(())
    }

    fn remount(&mut self) -> Outcome {
        self.unmount()?;
        self.check_stored()?;
        self.mount()
    }

    /// Makes bytes that tell where they belong and which operation wrote them; never zero.
    pub fn pattern(at: u64, len: u64, tag: usize) -> Vec<u8> {
        (at..at + len)
            .map(|pos| {
                let mixed = (pos / 7).wrapping_mul(31) ^ pos ^ (tag as u64).wrapping_mul(97);
                (mixed % 255) as u8 + 1
            })
            .collect()
    }

    /// Notes in the model that bytes were written.
    pub fn note(&mut self, at: u64, written: &[u8]) {
        let (start, end) = (at as usize, at as usize + written.len());
        if written.is_empty() {
            return;
        }
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        self.bytes[start..end].copy_from_slice(written);
    }

    fn write(&mut self, at: u64, len: u64, tag: usize) -> Outcome {
        let source = Self::pattern(at, len, tag);
        let wrote = said("write_at", self.files().buffered.write_at(&source, at))?;
        same("bytes written", wrote, source.len())?;
        self.note(at, &source);
        Ok(())
    }

    fn write_vectored(&mut self, at: u64, len: u64, tag: usize) -> Outcome {
        let source = Self::pattern(at, len, tag);
        let (first, second) = source.split_at(source.len() / 3);
        let bufs = [IoSlice::new(first), IoSlice::new(&[]), IoSlice::new(second)];
        let wrote = self.files().buffered.write_vectored_at(&bufs, at);
        same(
            "bytes written",
            said("write_vectored_at", wrote)?,
            source.len(),
        )?;
        self.note(at, &source);
        Ok(())
    }

    /// Makes a buffer of `len` bytes of which the first half is good; returns where it starts, and the good bytes.
    fn half_bad(len: u64) -> (Region, usize, usize) {
        let good = len as usize / 2;
        let edge = good.next_multiple_of(Region::PAGE);
        let bad = (len as usize - good).next_multiple_of(Region::PAGE);
        let region = Region::pages((edge + bad).div_ceil(Region::PAGE)).unwrap();
        if bad > 0 {
            region.protect(edge..edge + bad, Protection::None).unwrap();
        }
        (region, edge - good, good)
    }

    fn write_bad(&mut self, at: u64, len: u64, tag: usize) -> Outcome {
        let (region, start, good) = Self::half_bad(len);
        let source = Self::pattern(at, good as u64, tag);
        region.put(start, &source).unwrap();
        let list: UserIov<'_> = region.iov(start..start + len as usize);
        let mut cursor = list.cursor(Direction::Source);
        let file = &self.files().buffered;
        let progress = file.write_cursor(&mut cursor, at, &IoOptions::default());
        let stop = progress.stop.map(|error| error.errno());
        same("good bytes written", progress.done as usize, good)?;
        same("the rest", stop, (len > 0).then_some(Errno::EFAULT))?;
        same(
            "bytes left in the cursor",
            cursor.count(),
            len as usize - good,
        )?;
        self.note(at, &source);
        Ok(())
    }

    fn append(&mut self, len: u64, tag: usize) -> Outcome {
        let at = self.bytes.len() as u64;
        let source = Self::pattern(at, len.min(SIZE_MAX.saturating_sub(at)), tag);
        // The offset is a lie, which appending ignores.
        let wrote = said("append", self.files().appending.write_at(&source, 0))?;
        same("bytes appended", wrote, source.len())?;
        self.note(at, &source);
        Ok(())
    }

    /// What a read of the range must return.
    pub fn expected(&self, at: u64, len: u64) -> &[u8] {
        let end = self.bytes.len();
        let start = (at as usize).min(end);
        &self.bytes[start..(at as usize + len as usize).clamp(start, end)]
    }

    pub fn compare(&self, what: &str, at: u64, got: &[u8], len: u64) -> Outcome {
        let want = self.expected(at, len);
        same(&format!("{what}: bytes"), got.len(), want.len())?;
        match got.iter().zip(want).position(|(got, want)| got != want) {
            None => Ok(()),
            Some(bad) => Err(format!(
                "{what}: byte {} (page {}) is {:#04x}, expected {:#04x}",
                at + bad as u64,
                (at + bad as u64) / PAGE,
                got[bad],
                want[bad]
            )),
        }
    }

    fn read(&self, at: u64, len: u64) -> Outcome {
        let mut target = vec![0xa5; len as usize];
        let got = said("read_at", self.files().buffered.read_at(&mut target, at))?;
        self.compare("read", at, &target[..got], len)
    }

    fn read_vectored(&self, at: u64, len: u64) -> Outcome {
        let mut target = vec![0xa5; len as usize];
        let (first, second) = target.split_at_mut(len as usize / 3);
        let mut bufs = [
            IoSliceMut::new(first),
            IoSliceMut::new(&mut []),
            IoSliceMut::new(second),
        ];
        let got = self.files().buffered.read_vectored_at(&mut bufs, at);
        let got = said("read_vectored_at", got)?;
        self.compare("vectored read", at, &target[..got], len)
    }

    fn read_bad(&self, at: u64, len: u64) -> Outcome {
        let (region, start, good) = Self::half_bad(len);
        let list: UserIov<'_> = region.iov(start..start + len as usize);
        let mut cursor = list.cursor(Direction::Target);
        let file = &self.files().buffered;
        let progress = file.read_cursor(&mut cursor, at, &IoOptions::default());
        let there = self.expected(at, len).len();
        let stop = progress.stop.map(|error| error.errno());
        same("the rest", stop, (there > good).then_some(Errno::EFAULT))?;
        let done = progress.done as usize;
        self.compare(
            "read into a bad buffer",
            at,
            &region.to_vec(start..start + done).unwrap(),
            good as u64,
        )
    }

    fn write_direct(&mut self, at: u64, len: u64, tag: usize) -> Outcome {
        let (at, len) = (at / PAGE * PAGE, len / PAGE * PAGE);
        let source = Self::pattern(at, len, tag);
        let region = Region::pages(source.len().div_ceil(Region::PAGE)).unwrap();
        region.put(0, &source).unwrap();
        let list: UserIov<'_> = region.iov(0..source.len());
        let mut cursor = list.cursor(Direction::Source);
        let file = &self.files().direct;
        let progress = file.write_cursor(&mut cursor, at, &IoOptions::default());
        same(
            "a direct write's error",
            progress.stop.map(|error| error.errno()),
            None,
        )?;
        same("bytes written directly", progress.done, len)?;
        self.note(at, &source);
        Ok(())
    }

    fn read_direct(&self, at: u64, len: u64) -> Outcome {
        let (at, len) = (at / PAGE * PAGE, len / PAGE * PAGE);
        let region = Region::pages((len as usize).div_ceil(Region::PAGE)).unwrap();
        let list: UserIov<'_> = region.iov(0..len as usize);
        let mut cursor = list.cursor(Direction::Target);
        let file = &self.files().direct;
        let progress = file.read_cursor(&mut cursor, at, &IoOptions::default());
        same(
            "a direct read's error",
            progress.stop.map(|error| error.errno()),
            None,
        )?;
        let got = region.to_vec(0..progress.done as usize).unwrap();
        self.compare("direct read", at, &got, len)
    }

    fn set_len(&mut self, len: u64) -> Outcome {
        said("set_len", self.files().buffered.set_len(len))?;
        self.resized(len);
        Ok(())
    }

    /// Notes in the model that the size was set.
    fn resized(&mut self, len: u64) {
        if len < self.bytes.len() as u64 {
            self.maps.cut_copies(len);
        }
        self.bytes.resize(len as usize, 0);
    }

    /// Calls `allocate`; `false` when this store cannot do that.
    fn try_allocate(&self, mode: AllocateMode, at: u64, len: u64) -> Result<bool, String> {
        match self.files().buffered.allocate(mode, at..at + len) {
            Ok(()) => Ok(true),
            Err(error) if error.errno() == Errno::EOPNOTSUPP => Ok(false),
            Err(error) if len == 0 && error.errno() == Errno::EINVAL => Ok(false),
            Err(error) => Err(format!("allocate {mode:?}: {error}")),
        }
    }

    fn zero(&mut self, mode: AllocateMode, at: u64, len: u64) -> Outcome {
        if self.try_allocate(mode, at, len)? {
            let end = self.bytes.len();
            let (start, stop) = (at as usize, (at + len) as usize);
            self.bytes[start.min(end)..stop.min(end)].fill(0);
            if mode == AllocateMode::ZeroExtend && stop > end {
                self.bytes.resize(stop, 0);
            }
        }
        Ok(())
    }

    fn allocate(&mut self, mode: AllocateMode, at: u64, len: u64) -> Outcome {
        let stop = (at + len) as usize;
        if self.try_allocate(mode, at, len)?
            && mode == AllocateMode::Extend
            && stop > self.bytes.len()
        {
            self.bytes.resize(stop, 0);
        }
        Ok(())
    }

    fn collapse(&mut self, at: u64, len: u64) -> Outcome {
        let (at, len) = (at / PAGE * PAGE, len / PAGE * PAGE);
        let possible = at + len < self.bytes.len() as u64;
        if possible && self.try_allocate(AllocateMode::Collapse, at, len)? {
            self.bytes.drain(at as usize..(at + len) as usize);
            self.maps.forget_copies(at);
        }
        Ok(())
    }

    fn insert(&mut self, at: u64, len: u64) -> Outcome {
        let (at, len) = (at / PAGE * PAGE, len / PAGE * PAGE);
        let size = self.bytes.len() as u64;
        let possible = at < size && size + len <= SIZE_MAX;
        if possible && self.try_allocate(AllocateMode::Insert, at, len)? {
            let tail = self.bytes.split_off(at as usize);
            self.bytes.resize((at + len) as usize, 0);
            self.bytes.extend(tail);
            self.maps.forget_copies(at);
        }
        Ok(())
    }

    /// Where no data is said to be there are zeros, and the answers lie inside the file.
    fn seek(&self, at: u64) -> Outcome {
        let size = self.bytes.len() as u64;
        let file = &self.files().buffered;
        let data = match file.seek_to(Seek::Data, at) {
            Err(error) if error.errno() == Errno::ENXIO => None,
            found => said("seek to data", found)?,
        };
        if at >= size {
            return same("data past the end", data, None);
        }
        let until = data.unwrap_or(size);
        if until < at || until > size {
            return Err(format!("data from {at} on at {until}, the size is {size}"));
        }
        let hole = &self.bytes[at as usize..until as usize];
        if let Some(bad) = hole.iter().position(|&byte| byte != 0) {
            return Err(format!(
                "byte {} is data but said to be a hole",
                at + bad as u64
            ));
        }
        match said("seek to a hole", file.seek_to(Seek::Hole, at))? {
            Some(hole) if hole < at || hole > size => {
                Err(format!("a hole from {at} on at {hole}, the size is {size}"))
            }
            None => Err("no hole: there is one at the end".into()),
            Some(_) => Ok(()),
        }
    }

    fn sync(&self, all: bool) -> Outcome {
        let file = &self.files().buffered;
        if all {
            said("sync_all", file.sync_all())?;
        } else {
            said("sync_data", file.sync_data())?;
        }
        self.check_stored()
    }

    fn check_size(&self) -> Outcome {
        match self.files.get(self.now) {
            Some(files) => same("size", files.buffered.len(), self.bytes.len() as u64),
            None => Ok(()),
        }
    }

    fn check(&self) -> Outcome {
        self.check_size()?;
        let size = self.bytes.len() as u64;
        for at in (0..=size).step_by(64 << 10) {
            self.read(at, 64 << 10)?;
        }
        self.check_maps()
    }

    /// Compares a part of what lies in the directory. The stored file may end before it, where what makes it longer waits
    /// to be stored: zeros.
    pub fn check_stored_part(&self, range: std::ops::Range<u64>) -> Outcome {
        let mut stored = std::fs::read(self.dir.join(NAME)).map_err(|error| error.to_string())?;
        stored.resize(stored.len().max(range.end as usize), 0);
        let part = &stored[range.start as usize..range.end as usize];
        self.compare("stored part", range.start, part, range.end - range.start)
    }

    /// Compares what lies in the directory, as any other program would see it.
    fn check_stored(&self) -> Outcome {
        let stored = std::fs::read(self.dir.join(NAME)).map_err(|error| error.to_string())?;
        self.compare("stored", 0, &stored, SIZE_MAX * 2)?;
        if !self.files.is_empty() {
            return Ok(());
        }
        let other = std::fs::read(self.dir.join(OTHER)).map_err(|error| error.to_string())?;
        let bad = other
            .iter()
            .zip(&self.other)
            .position(|(got, want)| got != want);
        same("the other file's first bad byte", bad, None)
    }
}

pub fn said<T>(what: &str, result: pinfold::Result<T>) -> Result<T, String> {
    result.map_err(|error| format!("{what}: {error}"))
}

pub fn same<T: PartialEq + std::fmt::Debug>(what: &str, got: T, want: T) -> Outcome {
    if got == want {
        Ok(())
    } else {
        Err(format!("{what}: {got:?}, expected {want:?}"))
    }
}
