//! What a node does: calls drawn at random, each recorded.
//!
//! *Owns*: the draw, the loop, the node's process.
//!
//! *Does not own*: what serves the calls ([`Place`]).
//!
//! *Locking*: none; each thread has its own log.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use anyhow::{Context, anyhow};
use pinfold_base::Errno;
use pinfold_mem::region::view::{FileMap, Sharing};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

use crate::place::{self, Place};
use crate::record::{End, Kind, Log, Open, Way};
use crate::{Layout, PAGE, SLOT, WORDS, now, value_of};

/// Everything a node's process has to know.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Spec {
    /// What it works on.
    pub place: place::Spec,
    /// Where.
    pub dir: PathBuf,
    /// The files.
    pub layout: Layout,
    /// Which life of which node this is.
    pub node: u32,
    /// Its threads.
    pub threads: u32,
    /// The seed of the run.
    pub seed: u64,
    /// Calls that one thread makes at most.
    pub calls: usize,
    /// Where the logs go.
    pub logs: PathBuf,
    /// Which calls are made.
    pub mix: Mix,
}

/// Which calls are made: as many writes as reads, and now and then a sync.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mix {
    /// One call in so many is a sync.
    pub sync_every: u32,
    /// Where there are other ways too, one call in so many is direct.
    pub direct_every: u32,
    /// So many calls of a thread go to one file before another is drawn.
    pub burst: u32,
}

impl Default for Mix {
    fn default() -> Self {
        Self {
            sync_every: 50,
            direct_every: 3,
            burst: 1,
        }
    }
}

/// What the nodes of a run share: whether to stop, and how many calls were made.
#[derive(Debug)]
pub struct Control(FileMap);

const CONTROL: &str = "control";

impl Control {
    /// Makes it.
    ///
    /// # Errors
    /// What keeps the file from being made.
    pub fn create(logs: &Path) -> anyhow::Result<Self> {
        std::fs::write(logs.join(CONTROL), [0; PAGE])?;
        Self::open(logs)
    }

    /// Opens it.
    ///
    /// # Errors
    /// What keeps the file from being opened.
    pub fn open(logs: &Path) -> anyhow::Result<Self> {
        let path = logs.join(CONTROL);
        let file = std::fs::File::options()
            .read(true)
            .write(true)
            .open(&path)
            .with_context(|| path.display().to_string())?;
        let map = FileMap::new(file.as_fd(), 0, PAGE, Sharing::Shared);
        Ok(Self(map.map_err(|errno| anyhow!("map: {errno}"))?))
    }

    /// Tells all nodes to stop.
    pub fn stop(&self) {
        // A page of a file that is a page long.
        let _ = self.0.view().store_u64(0, 1);
    }

    /// How many calls were answered.
    #[must_use]
    pub fn calls(&self) -> u64 {
        self.0.view().load_u64(8).unwrap_or(0)
    }

    fn is_over(&self) -> bool {
        self.0.view().load_u64(0) != Ok(0)
    }

    fn count(&self, calls: u64) {
        let _ = self.0.view().add_u64(8, calls);
    }
}

/// Works until told to stop, or until a call fails.
///
/// # Errors
/// What the first failed call failed with ([`Errno`] inside, if it is the place's), or what keeps a log from being written.
pub fn work(spec: &Spec, place: &dyn Place) -> anyhow::Result<()> {
    let control = Control::open(&spec.logs)?;
    let failed: Mutex<Option<anyhow::Error>> = Mutex::new(None);
    std::thread::scope(|scope| {
        for thread in 0..spec.threads {
            let (control, failed) = (&control, &failed);
            scope.spawn(move || {
                let done = Worker::new(spec, place, thread).and_then(|mut worker| {
                    worker.run(control, || {
                        failed.lock().map_or(true, |failed| failed.is_some())
                    })
                });
                if let (Err(error), Ok(mut failed)) = (done, failed.lock()) {
                    failed.get_or_insert(error);
                }
            });
        }
    });
    match failed.into_inner() {
        Ok(Some(error)) => Err(error),
        _ => Ok(()),
    }
}

struct Worker<'a> {
    spec: &'a Spec,
    place: &'a dyn Place,
    log: Log,
    random: SmallRng,
    thread: u32,
    number: u64,
    /// The file, and how many calls more go to it.
    burst: (u32, u32),
    page: Box<[u8; PAGE]>,
}

/// One call, as drawn.
#[derive(Clone, Copy)]
struct Drawn {
    kind: Kind,
    way: Way,
    file: u32,
    page: u32,
    /// The only register of a small call; none if the call is for the page.
    word: Option<u32>,
}

impl<'a> Worker<'a> {
    fn new(spec: &'a Spec, place: &'a dyn Place, thread: u32) -> anyhow::Result<Self> {
        let path = spec.logs.join(format!("{}.{thread}.log", spec.node));
        let seed = value_of(spec.node, thread, 0) ^ spec.seed;
        Ok(Self {
            spec,
            place,
            log: Log::create(&path, spec.node, spec.calls * WORDS.len())?,
            random: SmallRng::seed_from_u64(seed),
            thread,
            number: 0,
            burst: (0, 0),
            page: Box::new([0; PAGE]),
        })
    }

    fn run(&mut self, control: &Control, failed: impl Fn() -> bool) -> anyhow::Result<()> {
        const TOLD_EVERY: u64 = 16;
        let mut untold = 0;
        for _ in 0..self.spec.calls {
            if control.is_over() || failed() {
                break;
            }
            let drawn = self.draw();
            self.call(drawn)?;
            untold += 1;
            if untold == TOLD_EVERY {
                control.count(untold);
                untold = 0;
            }
        }
        control.count(untold);
        Ok(())
    }

    fn draw(&mut self) -> Drawn {
        let layout = self.spec.layout;
        let random = &mut self.random;
        let mix = self.spec.mix;
        if self.burst.1 == 0 {
            self.burst = (random.random_range(0..layout.files), mix.burst.max(1));
        }
        self.burst.1 -= 1;
        let file = self.burst.0;
        let page = random.random_range(0..layout.pages);
        let ways = self.place.ways(file);
        let direct = random.random_ratio(1, mix.direct_every.max(1));
        let mut fit = ways.iter().filter(|&&way| (way == Way::Direct) == direct);
        let count = fit.clone().count().max(1);
        let drawn = fit.nth(random.random_range(0..count)).copied();
        let way = drawn.or(ways.first().copied()).unwrap_or(Way::Buffered);
        let kind = if random.random_ratio(1, mix.sync_every.max(1)) {
            Kind::Sync
        } else if random.random_bool(0.5) {
            Kind::Write
        } else {
            Kind::Read
        };
        let whole = way == Way::Direct || layout.is_whole(page) || random.random_bool(0.25);
        let word = (!whole).then(|| random.random_range(0..WORDS.len() as u32));
        Drawn {
            kind,
            way,
            file,
            page,
            word,
        }
    }

    fn call(&mut self, drawn: Drawn) -> anyhow::Result<()> {
        match drawn.kind {
            Kind::Sync => {
                let start = now();
                let log = &mut self.log;
                let open = log.begin(Kind::Sync, Way::Buffered, drawn.file, 0, start)?;
                let done = self.place.sync(drawn.file);
                self.end(&[open], done)
            }
            Kind::Write => {
                self.number += 1;
                let value = value_of(self.spec.node, self.thread, self.number);
                for word in self.page.chunks_exact_mut(8) {
                    word.copy_from_slice(&value.to_ne_bytes());
                }
                let len = drawn.word.map_or(PAGE, |_| SLOT);
                let open = self.begin(drawn, value)?;
                let bytes = self.page.get(..len).unwrap_or(&[]);
                let done = self.place.put(drawn.way, drawn.file, at(drawn), bytes);
                self.end(&open, done)
            }
            Kind::Read => {
                let open = self.begin(drawn, 0)?;
                let len = drawn.word.map_or(PAGE, |_| SLOT);
                let bytes = self.page.get_mut(..len).unwrap_or(&mut []);
                let done = self.place.get(drawn.way, drawn.file, at(drawn), bytes);
                if done.is_ok() {
                    self.saw(drawn, &open)?;
                }
                self.end(&open, done)
            }
        }
    }

    /// The registers that a call is about, with where each lies in what it moves.
    fn parts(&self, drawn: Drawn) -> impl Iterator<Item = (u32, usize)> + use<> {
        let layout = self.spec.layout;
        let (words, small) = match drawn.word {
            Some(word) => (word..word + 1, true),
            None if layout.is_whole(drawn.page) => (0..1, false),
            None => (0..WORDS.len() as u32, false),
        };
        words.map(move |word| {
            let byte = if small { 0 } else { WORDS[word as usize] };
            (layout.register(drawn.file, drawn.page, word), byte)
        })
    }

    fn begin(&mut self, drawn: Drawn, value: u64) -> anyhow::Result<Vec<Open>> {
        let start = now();
        let parts = self.parts(drawn);
        parts
            .map(|(register, _)| {
                self.log
                    .begin(drawn.kind, drawn.way, register, value, start)
            })
            .collect()
    }

    fn saw(&self, drawn: Drawn, open: &[Open]) -> anyhow::Result<()> {
        for (&open, (_, byte)) in open.iter().zip(self.parts(drawn)) {
            let value = self.word(byte);
            let whole = self.spec.layout.is_whole(drawn.page);
            let torn = whole && (0..PAGE).step_by(8).any(|byte| self.word(byte) != value);
            self.log.saw(open, value, torn)?;
        }
        Ok(())
    }

    fn word(&self, byte: usize) -> u64 {
        let bytes = self.page.get(byte..byte + 8);
        let bytes = bytes.and_then(|bytes| bytes.try_into().ok());
        bytes.map_or(0, u64::from_ne_bytes)
    }

    fn end(&self, open: &[Open], done: Result<(), Errno>) -> anyhow::Result<()> {
        let end = match done {
            Ok(()) => End::At(now()),
            Err(_) => End::Never,
        };
        for &open in open {
            self.log.end(open, end)?;
        }
        done.map_err(anyhow::Error::from)
    }
}

fn at(drawn: Drawn) -> u64 {
    let byte = drawn.word.map_or(0, |word| WORDS[word as usize]);
    u64::from(drawn.page) * PAGE as u64 + byte as u64
}
