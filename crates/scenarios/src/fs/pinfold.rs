//! This library, on a directory of a kernel file system.
//!
//! *Owns*: [`Library`], a volume of its own on the scenario's directory.
//!
//! *Does not own*: the engine; the test store that makes writes fail or dawdle (`pinfold_store::testing`).
//!
//! *Locking*: a leaf around the list of wrapped store objects.

use std::fmt;
use std::io::{Seek as _, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};

use pinfold::{
    Advice, AllocateMode, Delivery, Errno, File, IoOptions, MapAccess, MapOptions, Mapping,
    OpenOptions, Progress, Volume, VolumeBuilder,
};
use pinfold_mem::Direction;
use pinfold_mem::region::transfer::FIEMAP_HEAD;
use pinfold_mem::region::view::{Sharing, View};
use pinfold_mem::region::{At, Region, UserIov};
use pinfold_store::testing::{Action, CrashingObject, FaultyObject, On, Rule};
use pinfold_store::{Object, Operation};

use super::{Allocate, Fs, Handle, How, Kind, Mapped, Open, Pins, Refusal, Troubled, Weather};

/// Bytes that may be dirty over a troubled store: little, so that writers meet the limit whatever the memory.
const DIRTY_LIMIT: u64 = 256 << 10;

/// Why T57 leaves msync's flags out.
const NO_FLAGS: &str = "the library flushes by method, not by flag; front/capi/examples/calls.c compares pf_msync's flags";

/// A volume on a directory.
pub struct Library {
    dir: PathBuf,
    memory: u64,
    delivery: Delivery,
    volume: Volume,
}

impl fmt::Debug for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Library({}, {} bytes)", self.dir.display(), self.memory)
    }
}

impl Library {
    /// Opens the volume that `builder` describes on the subdirectory `name` of `dir`; it may use `memory` bytes, others that a
    /// scenario asks for as much, and all have faults served as `delivery` says.
    ///
    /// # Errors
    /// As the volume's builder.
    pub fn new(
        dir: &Path,
        name: &str,
        memory: u64,
        delivery: Delivery,
        builder: VolumeBuilder,
    ) -> Result<Self, String> {
        let volume = builder
            .file_size_limit(true)
            .open_dir(subdirectory(dir, name)?)
            .map_err(|error| error.to_string())?;
        Ok(Self {
            dir: dir.to_path_buf(),
            memory,
            delivery,
            volume,
        })
    }
}

fn subdirectory(dir: &Path, name: &str) -> Result<PathBuf, String> {
    let dir = dir.join(name);
    match std::fs::create_dir_all(&dir) {
        Ok(()) => Ok(dir),
        Err(error) => Err(format!("{}: {error}", dir.display())),
    }
}

impl Fs for Library {
    fn kind(&self) -> Kind {
        Kind::Pinfold
    }

    fn dir(&self) -> &Path {
        &self.dir
    }

    fn open(&self, name: &str, how: Open) -> Result<Box<dyn Handle>, Errno> {
        let options = OpenOptions::new()
            .read(true)
            .write(true)
            .append(how.append)
            .create(how.create)
            .truncate(how.truncate)
            .direct(how.direct)
            .dsync(how.dsync)
            .mode(0o600);
        let file = self
            .volume
            .open(name, &options)
            .map_err(|error| error.errno())?;
        Ok(Box::new(LibraryFile {
            file,
            delivery: self.delivery,
        }))
    }

    fn cancels(&self) -> bool {
        true
    }

    fn faults_inline(&self) -> bool {
        self.delivery == Delivery::Inline
    }

    fn pins(&self) -> Option<Pins> {
        let cache = self.volume.statistics().cache;
        Some(Pins {
            acquired: cache.foll_pin_acquired,
            released: cache.foll_pin_released,
        })
    }

    fn troubled(&self) -> Result<Troubled, String> {
        // Beside the other volume: a directory is served once, and what lies below it with it.
        let dir = subdirectory(&self.dir, "troubled")?;
        let sky = Arc::new(Mutex::new(Sky::default()));
        let theirs = Arc::clone(&sky);
        let layer = move |object: Arc<dyn Object>| -> Arc<dyn Object> {
            let faulty = FaultyObject::new(object);
            let mut sky = theirs.lock().expect("no panic under this lock");
            sky.weather.apply(&faulty);
            sky.objects.retain(|object| object.strong_count() > 0);
            sky.objects.push(Arc::downgrade(&faulty));
            faulty
        };
        let volume = Volume::builder()
            .memory(self.memory)
            .dirty_limit(DIRTY_LIMIT)
            .object_layer(Arc::new(layer))
            .open_dir(&dir)
            .map_err(|error| error.to_string())?;
        let all = volume.clone();
        Ok(Troubled {
            fs: Box::new(Self {
                dir,
                memory: self.memory,
                delivery: self.delivery,
                volume,
            }),
            turn: Box::new(move |weather| {
                sky.lock().expect("no panic under this lock").turn(weather);
                Ok(())
            }),
            write_back: Box::new(move || {
                // The error is what the scenario is about; it is told through the files.
                let _ = all.sync();
                Ok(())
            }),
        })
    }

    fn volatile(&self) -> Result<Box<dyn Fs>, String> {
        let dir = subdirectory(&self.dir, "volatile")?;
        // An object that cannot be read has nothing to forget: as it is, its errors come to light at the first access.
        let layer = |object: Arc<dyn Object>| -> Arc<dyn Object> {
            match CrashingObject::new(Arc::clone(&object)) {
                Ok(forgetful) => forgetful,
                Err(_) => object,
            }
        };
        let volume = Volume::builder()
            .memory(self.memory)
            .object_layer(Arc::new(layer))
            .open_dir(&dir)
            .map_err(|error| error.to_string())?;
        Ok(Box::new(Self {
            dir,
            memory: self.memory,
            delivery: self.delivery,
            volume,
        }))
    }
}

/// The weather, and everything that is out in it.
#[derive(Debug, Default)]
struct Sky {
    weather: Weather,
    objects: Vec<Weak<FaultyObject>>,
}

impl Sky {
    fn turn(&mut self, weather: Weather) {
        self.weather = weather;
        for object in self.objects.iter().filter_map(Weak::upgrade) {
            weather.apply(&object);
        }
    }
}

impl Weather {
    fn apply(self, object: &FaultyObject) {
        object.clear();
        let write = On::Only(Operation::Write);
        match self {
            Self::Fair => {}
            Self::WritesFail => object.add(Rule::new(write, Action::Fail(Errno::EIO))),
            Self::WritesTake(time) => object.add(Rule::new(write, Action::Delay(time))),
            Self::ReadsTake(time) => {
                object.add(Rule::new(On::Only(Operation::Read), Action::Delay(time)));
            }
        }
    }
}

#[derive(Debug)]
struct LibraryFile {
    file: File,
    delivery: Delivery,
}

impl Handle for LibraryFile {
    fn read(&self, to: &UserIov<'_>, at: At, how: How<'_>) -> Result<usize, Errno> {
        let mut cursor = to.cursor(Direction::Target);
        let progress = match at {
            At::Position => self.file.read_next_cursor(&mut cursor, &options(how)),
            At::Offset(offset) => self.file.read_cursor(&mut cursor, offset, &options(how)),
        };
        posix(progress, to.bytes(), cursor.count())
    }

    fn write(&self, from: &UserIov<'_>, at: At, how: How<'_>) -> Result<usize, Errno> {
        let mut cursor = from.cursor(Direction::Source);
        let progress = match at {
            At::Position => self.file.write_next_cursor(&mut cursor, &options(how)),
            At::Offset(offset) => self.file.write_cursor(&mut cursor, offset, &options(how)),
        };
        posix(progress, from.bytes(), cursor.count())
    }

    fn seek(&self, offset: u64) -> Result<(), Errno> {
        let mut file = &self.file;
        Ok(file.seek(SeekFrom::Start(offset)).map(drop)?)
    }

    fn position(&self) -> Result<u64, Errno> {
        let mut file = &self.file;
        Ok(file.stream_position()?)
    }

    fn size(&self) -> Result<u64, Errno> {
        Ok(self.file.len())
    }

    fn truncate(&self, size: u64) -> Result<(), Errno> {
        self.file.set_len(size).map_err(|error| error.errno())
    }

    fn allocate(&self, mode: Allocate, range: Range<u64>) -> Result<(), Errno> {
        let mode = match mode {
            Allocate::Grow => AllocateMode::Extend,
            Allocate::KeepSize => AllocateMode::KeepSize,
            Allocate::Punch => AllocateMode::Punch,
            Allocate::Zero => AllocateMode::ZeroKeepSize,
        };
        self.file
            .allocate(mode, range)
            .map_err(|error| error.errno())
    }

    fn sync(&self) -> Result<(), Errno> {
        self.file.sync_all().map_err(|error| error.errno())
    }

    fn sync_data(&self) -> Result<(), Errno> {
        self.file.sync_data().map_err(|error| error.errno())
    }

    fn drop_cache(&self) -> Result<(), Errno> {
        self.file.drop_cache().map_err(|error| error.errno())
    }

    fn map(&self, range: Range<u64>, sharing: Sharing) -> Result<Box<dyn Mapped>, Refusal> {
        let access = match sharing {
            Sharing::Shared => MapAccess::Write,
            Sharing::Private => MapAccess::Private,
        };
        let options = MapOptions::new().access(access).delivery(self.delivery);
        let mapping = self
            .file
            .map(range, &options)
            .map_err(|error| error.errno())?;
        Ok(Box::new(LibraryMap { mapping }))
    }

    fn extents(&self, into: &UserIov<'_>) -> Result<usize, Refusal> {
        // The library's records are the kernel's, and it takes its request otherwise: the head stays as it is.
        let mut cursor = into.cursor(Direction::Target);
        cursor.advance(FIEMAP_HEAD.min(cursor.count()));
        let found = self.file.extents(0..u64::MAX, &mut cursor);
        Ok(found.map_err(|error| error.errno())?.records)
    }

    fn transfer(
        &self,
        direction: Direction,
        iov: &UserIov<'_>,
        offset: u64,
        meanwhile: &mut dyn FnMut(),
    ) -> Result<usize, Refusal> {
        // Calls of the library wait for their transfers: what runs beside one is another thread.
        let moved = std::thread::scope(|scope| {
            let transfer = scope.spawn(|| match direction {
                Direction::Target => self.read(iov, At::Offset(offset), How::PLAIN),
                Direction::Source => self.write(iov, At::Offset(offset), How::PLAIN),
            });
            meanwhile();
            transfer.join()
        });
        // The panic itself is noted where it happened.
        Ok(moved.unwrap_or(Err(Errno::EIO))?)
    }
}

#[derive(Debug)]
struct LibraryMap {
    mapping: Mapping,
}

impl Mapped for LibraryMap {
    fn view(&self) -> View<'_> {
        let addr = self.mapping.as_ptr().expose_provenance();
        View::of_user_mapping(self, addr, self.mapping.len())
            .expect("scenarios look at no mapping with a hole")
    }

    fn sync(&self, range: Range<usize>, flags: i32) -> Result<(), Refusal> {
        if !range.start.is_multiple_of(Region::PAGE) {
            return Err(Refusal::Missing("the library syncs bytes, not pages"));
        }
        // The kernel rounds up to whole pages, and so reaches the end of the last one.
        let range = range.start..range.end.min(self.mapping.len());
        let done = match flags {
            libc::MS_SYNC => self.mapping.flush(range),
            libc::MS_ASYNC => self.mapping.flush_async(range),
            _ => return Err(Refusal::Missing(NO_FLAGS)),
        };
        Ok(done.map_err(|error| error.errno())?)
    }

    fn forget(&self, range: Range<usize>) -> Result<(), Refusal> {
        let done = self.mapping.advise(Advice::DontNeed, range);
        Ok(done.map_err(|error| error.errno())?)
    }

    fn resident(&self, range: Range<usize>) -> Result<Vec<bool>, Refusal> {
        let resident = self.mapping.resident(range);
        Ok(resident.map_err(|error| error.errno())?)
    }

    fn unmap(&mut self, range: Range<usize>) -> Result<(), Refusal> {
        let done = self.mapping.unmap(range);
        Ok(done.map_err(|error| error.errno())?)
    }
}

fn options(how: How<'_>) -> IoOptions<'_> {
    IoOptions {
        nowait: how.nowait,
        dsync: how.dsync,
        cancel: how.cancel,
        ..IoOptions::default()
    }
}

/// Applies the POSIX rule, after a check that every call owes: the cursor gives back exactly what was not moved.
fn posix(progress: Progress<pinfold::Error>, asked: usize, left: usize) -> Result<usize, Errno> {
    let done = usize::try_from(progress.done).unwrap_or(usize::MAX);
    assert_eq!(
        asked.checked_sub(done),
        Some(left),
        "A-7: bytes left in the cursor, {done} of {asked} moved"
    );
    progress
        .posix()
        .map(|_| done)
        .map_err(|error| error.errno())
}
