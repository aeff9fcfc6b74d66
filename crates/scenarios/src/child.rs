//! The process that one scenario runs in: whatever it does to itself, the runner lives on.
//!
//! *Owns*: the [`Job`] that is handed in, the [`Message`]s that go out on standard output, one JSON a line.
//!
//! *Does not own*: the decision that a silent child hangs ([`crate::runner`]).
//!
//! *Locking*: standard output's lock, for a line at a time.

use std::cell::RefCell;
use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use pinfold_base::Errno;
use rustix::process::{Signal, set_parent_process_death_signal};
use serde::{Deserialize, Serialize};

use crate::runner::place;
use crate::scenario::{Context, Outcome, Scenario, Stop};
use crate::suite;
use crate::target::Target;

/// Environment variable that tells a process which part of its scenario it plays; absent in the leading one.
pub const ROLE: &str = "PINFOLD_SCENARIO_ROLE";

/// What a child is to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// Number of the scenario.
    pub scenario: String,
    /// On what; the directory is empty and the scenario's own.
    pub target: Target,
    /// Where its randomness comes from.
    pub seed: u64,
    /// How long its races may go on, in milliseconds.
    pub race_ms: u64,
    /// By how much its limits of time are multiplied.
    pub patience: u32,
}

/// What a process is started for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Order {
    /// To run a scenario.
    Run(Job),
    /// To remove a directory when whoever started it is gone: when its standard input ends.
    Sweep {
        /// The directory.
        sweep: PathBuf,
    },
}

/// What a child says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Message {
    /// It is alive: a number that grows.
    Beat(u64),
    /// It is done.
    Done {
        /// What came of it.
        outcome: Outcome,
        /// What it measured.
        notes: Vec<String>,
        /// Whether another run may take another course.
        varies: bool,
    },
}

/// How often a living child says so.
const BEAT_EVERY: Duration = Duration::from_millis(100);

/// Runs the job in `json`, in this process, and reports on standard output.
///
/// A program that is to be its own child calls this when it is started with a job, before it does anything else.
#[must_use]
pub fn run(json: &str) -> ExitCode {
    let order = match serde_json::from_str(json) {
        Ok(order) => order,
        Err(error) => {
            eprintln!("a job was expected: {error}");
            return ExitCode::from(2);
        }
    };
    let job = match order {
        Order::Run(job) => job,
        Order::Sweep { sweep } => return place::sweep(&sweep),
    };
    // A runner that is killed must not leave scenarios behind.
    let _ = set_parent_process_death_signal(Some(Signal::KILL));
    // Below the library's own handler, which comes with its first copy: a fault is the library's first.
    pinfold_mem::region::touch::install();
    let Some(scenario) = suite::find(&job.scenario) else {
        eprintln!("no scenario is called {:?}", job.scenario);
        return ExitCode::from(2);
    };
    let role = std::env::var(ROLE).ok();
    let leads = role.is_none();
    let (outcome, notes, varies) = perform(scenario, &job, role);
    let good = !outcome.is_bad();
    if leads {
        say(&Message::Done {
            outcome,
            notes,
            varies,
        });
    }
    if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn perform(
    scenario: &'static Scenario,
    job: &Job,
    role: Option<String>,
) -> (Outcome, Vec<String>, bool) {
    let fs = match job.target.open(role.as_deref()) {
        Ok(fs) => fs,
        Err(reason) => return (Outcome::Skipped { reason }, Vec::new(), false),
    };
    // Lives as long as the process: the thread that reports beats does too.
    let beats: &'static AtomicU64 = Box::leak(Box::new(AtomicU64::new(0)));
    if role.is_none() {
        std::thread::spawn(|| report_beats(beats));
    }
    let race = Duration::from_millis(job.race_ms);
    let context = Context::new(&*fs, job.seed, race, beats, role).with_patience(job.patience);
    note_panics();
    let ended = catch_unwind(AssertUnwindSafe(|| (scenario.run)(&context)));
    let ended = ended.unwrap_or_else(|_| Err(Stop::Fail("a panic ended it".into())));
    let panics = std::mem::take(&mut *PANICS.lock().unwrap_or_else(PoisonError::into_inner));
    context.check("no thread panics", panics.is_empty(), || panics.join("\n"));
    let varies = context.varies();
    let (outcome, notes) = context.conclude(scenario, ended);
    drop(fs);
    (outcome, notes, varies)
}

/// What panicking threads said, whoever catches them: a thread of the library's own must not panic either.
static PANICS: Mutex<Vec<String>> = Mutex::new(Vec::new());
/// Most panics that are kept.
const PANICS_MAX: usize = 4;

thread_local! {
    /// What this thread said when it panicked as it was meant to.
    static EXPECTED: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Runs what is to panic, and returns what it said; `None` if it did not panic.
pub fn panics(work: impl FnOnce()) -> Option<String> {
    EXPECTED.set(Some(String::new()));
    let ended = catch_unwind(AssertUnwindSafe(work));
    let said = EXPECTED.take();
    ended.err().and(said)
}

fn note_panics() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let expected = EXPECTED.with_borrow_mut(|said| {
            let said = said.as_mut()?;
            *said = panic.to_string();
            Some(())
        });
        if expected.is_some() {
            return;
        }
        let thread = std::thread::current();
        let mut panics = PANICS.lock().unwrap_or_else(PoisonError::into_inner);
        if panics.len() < PANICS_MAX {
            let name = thread.name().unwrap_or("without a name");
            panics.push(format!("thread {name}: {panic}"));
        }
        drop(panics);
        before(panic);
    }));
}

fn report_beats(beats: &AtomicU64) {
    let mut told = u64::MAX;
    loop {
        let now = beats.load(Ordering::Relaxed);
        if now != told {
            say(&Message::Beat(now));
            told = now;
        }
        std::thread::sleep(BEAT_EVERY);
    }
}

fn say(message: &Message) {
    if let Ok(line) = serde_json::to_string(message) {
        let mut out = std::io::stdout().lock();
        if writeln!(out, "{line}").and_then(|()| out.flush()).is_err() {
            // Nobody to tell: the runner was gone before we asked to die with it.
            let _ = rustix::process::kill_process(rustix::process::getpid(), Signal::KILL);
        }
    }
}

/// Starts this very scenario once more, in a process of its own and another role.
///
/// # Errors
/// When no process can be started.
pub fn respawn(role: &str) -> Result<Child, Stop> {
    Command::new("/proc/self/exe")
        .args(std::env::args_os().skip(1))
        .env(ROLE, role)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .map_err(|error| Stop::from(Errno::from(error)))
}
