//! Schedules: how many, of which kind, replayed; a volume over the scheduler's store; what its pages may hold.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use pinfold::{File, MEMORY_MIN, Object, OpenOptions, Volume};
use shuttle::scheduler::{PctScheduler, RandomScheduler, ReplayScheduler, Scheduler};
use shuttle::thread::JoinHandle;
use shuttle::{Config, FailurePersistence, MaxSteps, Runner};

use crate::store::{Device, Mishap, Stored};

pub const PAGE: usize = 4096;
pub const P: u64 = 4096;
/// Preemptions that a schedule of the PCT kind makes, at most.
const DEPTH: usize = 4;
/// A call of the library needs more than the usual 60 KiB.
const STACK: usize = 512 << 10;
/// Steps of a schedule that does not end.
const STEPS_MAX: usize = 2_000_000;

fn number(variable: &str) -> Option<u64> {
    let value = std::env::var(variable).ok()?;
    Some(value.parse().expect("a number"))
}

/// Runs `body` under `schedules` schedules of each kind: random ones, and such with few preemptions at places that are drawn.
pub fn explore(schedules: u64, body: impl Fn() + Send + Sync + 'static) {
    let mut config = Config::new();
    config.stack_size = STACK;
    config.max_steps = MaxSteps::FailAfter(STEPS_MAX);
    config.silence_warnings = true;
    config.failure_persistence = FailurePersistence::File(Some(std::env::temp_dir()));
    let body = Arc::new(body);
    let run = |scheduler: Box<dyn Scheduler + Send>| {
        let body = Arc::clone(&body);
        Runner::new(scheduler, config.clone()).run(move || body());
    };
    if let Some(file) = std::env::var_os("PINFOLD_SHUTTLE_REPLAY") {
        run(Box::new(
            ReplayScheduler::new_from_file(PathBuf::from(file)).expect("a schedule"),
        ));
        return;
    }
    let seed = number("PINFOLD_SHUTTLE_SEED").unwrap_or(1);
    let schedules = number("PINFOLD_SHUTTLE_SCHEDULES").unwrap_or(schedules) as usize;
    run(Box::new(RandomScheduler::new_from_seed(seed, schedules)));
    run(Box::new(PctScheduler::new_from_seed(
        seed, DEPTH, schedules,
    )));
}

thread_local! {
    /// The directory that the volumes of all schedules of a test are opened on. Its file is empty: the bytes are the scheduler's
    /// store's.
    static DIRECTORY: tempfile::TempDir = tempfile::tempdir().unwrap();
}

/// A volume with one file, over a store that is tasks of the scheduler.
pub struct Rig {
    pub volume: Volume,
    pub stored: Arc<Stored>,
    device: Device,
}

/// How a [`Rig`] is made.
pub struct Setting {
    /// Whether the background thread writes back as soon as anything is dirty; it sleeps otherwise.
    pub background: bool,
    /// Writes of the store that go well before one meets `mishap`.
    pub good: u32,
    pub mishap: Mishap,
}

impl Default for Setting {
    fn default() -> Self {
        Self {
            background: false,
            good: 0,
            mishap: Mishap::None,
        }
    }
}

impl Rig {
    pub fn new(setting: &Setting) -> Self {
        let device = Device::start(setting.good, setting.mishap);
        let stored = Arc::clone(&device.stored);
        let object: Arc<dyn Object> = Arc::clone(&stored) as _;
        let (interval, age) = if setting.background {
            (Duration::from_millis(10), Duration::ZERO)
        } else {
            (Duration::from_secs(3600), Duration::from_secs(3600))
        };
        let volume = Volume::builder()
            .memory(MEMORY_MIN)
            .io_uring(false)
            .background_interval(interval)
            .dirty_age_max(age)
            .retain_dirty_on_error(true)
            .object_layer(Arc::new(move |_| Arc::clone(&object)))
            .open_dir(DIRECTORY.with(|dir| dir.path().to_owned()))
            .unwrap();
        Self {
            volume,
            stored,
            device,
        }
    }

    pub fn open(&self, direct: bool) -> Arc<File> {
        let options = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .direct(direct);
        Arc::new(self.volume.open("file", &options).unwrap())
    }

    /// Ends with everything stored and nothing held: `file` is what the model says, here, in the store and read again.
    pub fn end(self, file: Arc<File>, model: &Model) {
        // What a mishap left dirty goes now; the error may be told here.
        let _ = file.sync_all();
        file.sync_all().unwrap();
        model.check(&self.stored.bytes(), "in the store");
        model.check(&self.stored.durable(), "for good");
        model.check(&read(&file, 0, model.len() + PAGE), "in the cache");
        file.drop_cache().unwrap();
        model.check(&read(&file, 0, model.len() + PAGE), "read again");
        assert_eq!(file.len(), model.len() as u64);
        let counted = self.volume.statistics();
        assert_eq!(
            counted.cache.foll_pin_acquired,
            counted.cache.foll_pin_released
        );
        assert_eq!(counted.pages_dirty, 0, "pages count as dirty");
        assert_eq!(self.volume.pins_held(), []);
        drop(file);
        drop(self.volume);
        drop(self.stored);
        self.device.end();
    }
}

pub fn read(file: &File, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xee; len];
    let got = file.read_at(&mut bytes, offset).unwrap();
    bytes.truncate(got);
    bytes
}

/// Waits for tasks, and ends where one of them has failed.
pub fn join(tasks: impl IntoIterator<Item = JoinHandle<()>>) {
    for task in tasks {
        task.join().unwrap();
    }
}

/// Half pages of a file, with one writer each, and what is known of each: the generation that was begun last, and the one that
/// was done last. Those that are multiples of 4 are zeros: a cut, or what was never written.
pub struct Model {
    halves: Vec<Half>,
}

#[derive(Default)]
struct Half {
    begun: AtomicU64,
    done: AtomicU64,
}

/// What a half page is written in.
pub const HALF: usize = PAGE / 2;

fn word(half: usize, generation: u64) -> u64 {
    if generation.is_multiple_of(4) {
        0
    } else {
        (half as u64 + 1) << 40 | generation
    }
}

impl Model {
    pub fn new(pages: usize) -> Arc<Self> {
        Arc::new(Self {
            halves: (0..2 * pages).map(|_| Half::default()).collect(),
        })
    }

    pub fn len(&self) -> usize {
        self.halves.len() * HALF
    }

    /// Begins to write halves; returns the bytes of the next generation.
    pub fn begin(&self, halves: std::ops::Range<usize>) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(halves.len() * HALF);
        for half in halves {
            let generation = self.halves[half].done.load(Ordering::SeqCst) + 1;
            let generation = generation + u64::from(generation.is_multiple_of(4));
            self.halves[half].begun.store(generation, Ordering::SeqCst);
            for _ in 0..HALF / 8 {
                bytes.extend_from_slice(&word(half, generation).to_le_bytes());
            }
        }
        bytes
    }

    /// Begins to make halves zeros.
    pub fn begin_zeros(&self, halves: std::ops::Range<usize>) {
        for half in &self.halves[halves] {
            let zeros = (half.done.load(Ordering::SeqCst) / 4 + 1) * 4;
            half.begun.store(zeros, Ordering::SeqCst);
        }
    }

    pub fn done(&self, halves: std::ops::Range<usize>) {
        for half in &self.halves[halves] {
            let begun = half.begun.load(Ordering::SeqCst);
            half.done.store(begun, Ordering::SeqCst);
        }
    }

    /// Returns what is done by now.
    pub fn lows(&self) -> Vec<u64> {
        let done = |half: &Half| half.done.load(Ordering::SeqCst);
        self.halves.iter().map(done).collect()
    }

    /// Judges bytes that were read at `offset` (a multiple of a half page) after [`Model::lows`] gave `lows`: none older than what was done
    /// then, none newer than what has begun by now.
    pub fn judge(&self, lows: &[u64], offset: usize, bytes: &[u8], what: &str) {
        for (at, chunk) in bytes.chunks_exact(8).enumerate() {
            let half = (offset + at * 8) / HALF;
            let found = u64::from_le_bytes(chunk.try_into().unwrap());
            let (low, high) = (lows[half], self.halves[half].begun.load(Ordering::SeqCst));
            let fits = (low..=high).any(|generation| word(half, generation) == found);
            assert!(
                fits,
                "{what}: {found:#x} at {:#x}, of generations {low} to {high}",
                offset + at * 8
            );
        }
    }

    fn check(&self, bytes: &[u8], what: &str) {
        assert_eq!(bytes.len(), self.len(), "{what}: the size");
        self.judge(&self.lows(), 0, bytes, what);
    }

    /// Writes halves with one call.
    pub fn write(&self, file: &File, halves: std::ops::Range<usize>) {
        let offset = (halves.start * HALF) as u64;
        let bytes = self.begin(halves.clone());
        assert_eq!(file.write_at(&bytes, offset).unwrap(), bytes.len());
        self.done(halves);
    }

    /// Reads pages and judges them.
    pub fn look(&self, file: &File, pages: std::ops::Range<usize>, what: &str) {
        let lows = self.lows();
        let bytes = read(file, (pages.start * PAGE) as u64, pages.len() * PAGE);
        self.judge(&lows, pages.start * PAGE, &bytes, what);
    }
}
