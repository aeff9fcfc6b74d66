//! What a scenario is, what it is given, and what it can come to.
//!
//! *Owns*: [`Scenario`] (number, claim, known divergences, body), [`Context`] (checks, seed, heart beat), [`Outcome`].
//!
//! *Does not own*: the processes that scenarios run in ([`crate::runner`]), their list ([`crate::suite`]).
//!
//! *Locking*: one leaf lock around the list of failed checks.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::ops::Range;
use std::panic::Location;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pinfold_base::Errno;
use pinfold_mem::region::touch::Hit;
use pinfold_mem::region::view::Sharing;
use pinfold_mem::region::{At, Region};
use rand::SeedableRng;
use rand::rngs::SmallRng;
use serde::{Deserialize, Serialize};

use crate::fs::{Fs, Handle, How, Kind, Mapped, Open, Refusal};

/// One row of SEMANTICS.md section J.
#[derive(Debug)]
pub struct Scenario {
    /// Its number there, such as `"T13"`.
    pub number: &'static str,
    /// Its name there.
    pub name: &'static str,
    /// What it claims, in one line.
    pub claim: &'static str,
    /// Checks that are known to fail on some file system, and why.
    pub known: &'static [Known],
    /// The longest it may take altogether, in seconds; silence ends it much earlier.
    pub seconds_max: u64,
    /// The body. Each failed check is recorded in the context; the body goes on after it where that makes sense.
    pub run: fn(&Context<'_>) -> Result<(), Stop>,
}

/// A documented divergence of a file system that is not ours.
#[derive(Debug, Clone, Copy)]
pub struct Known {
    /// Whose.
    pub kind: Kind,
    /// The name of the check that fails there.
    pub check: &'static str,
    /// Why.
    pub why: &'static str,
}

/// A check that did not hold: its name and what was seen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Name of the check.
    pub check: String,
    /// What was seen, and what was expected.
    pub saw: String,
}

/// Why a body ended before its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stop {
    /// It cannot be run here, for this reason.
    Skip(String),
    /// It cannot go on: something failed that is a precondition, or that was recorded already.
    Fail(String),
}

impl From<Errno> for Stop {
    /// An error where the scenario needs success.
    #[track_caller]
    fn from(errno: Errno) -> Self {
        let place = Location::caller();
        Self::Fail(format!("{errno:?} at {}:{}", place.file(), place.line()))
    }
}

impl From<Refusal> for Stop {
    #[track_caller]
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Failed(errno) => errno.into(),
            Refusal::Missing(reason) => Self::Skip(reason.into()),
        }
    }
}

impl From<Hit> for Stop {
    /// A signal where the scenario needs an access to succeed.
    #[track_caller]
    fn from(hit: Hit) -> Self {
        let place = Location::caller();
        let signal = if hit.is_bus() { "SIGBUS" } else { "SIGSEGV" };
        Self::Fail(format!("{signal} at {}:{}", place.file(), place.line()))
    }
}

/// What came of a scenario.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "lowercase")]
pub enum Outcome {
    /// Every check held.
    Passed {
        /// How many checks were made.
        checks: u64,
    },
    /// Only checks failed that are known to fail on this file system.
    Diverges {
        /// Those checks.
        failures: Vec<Failure>,
        /// Why they fail.
        reasons: Vec<String>,
    },
    /// Checks failed.
    Failed {
        /// Those checks.
        failures: Vec<Failure>,
    },
    /// It fell silent, or ran too long, and was killed.
    Hung {
        /// What it was: silent or too long.
        why: String,
        /// Where its threads were.
        stacks: String,
    },
    /// It was not run.
    Skipped {
        /// Why not.
        reason: String,
    },
}

impl Outcome {
    /// Tells whether this says something bad about the file system.
    #[must_use]
    pub const fn is_bad(&self) -> bool {
        matches!(self, Self::Failed { .. } | Self::Hung { .. })
    }

    /// Returns the word for it.
    #[must_use]
    pub const fn word(&self) -> &'static str {
        match self {
            Self::Passed { .. } => "passed",
            Self::Diverges { .. } => "diverges (known)",
            Self::Failed { .. } => "FAILED",
            Self::Hung { .. } => "HUNG",
            Self::Skipped { .. } => "skipped",
        }
    }
}

/// Most failed checks kept by name; more of one name are only counted.
const FAILURES_MAX: usize = 32;

/// How long a race goes on for those who have not come yet.
const LATE_MAX: Duration = Duration::from_secs(10);

/// What a running scenario is given.
#[derive(Debug)]
pub struct Context<'a> {
    fs: &'a dyn Fs,
    seed: u64,
    started: Instant,
    /// How long races may go on, apart from their minimum of rounds.
    race: Duration,
    patience: u32,
    checks: AtomicU64,
    beats: &'a AtomicU64,
    failures: Mutex<BTreeMap<&'static str, (u64, String)>>,
    notes: Mutex<Vec<String>>,
    role: Option<String>,
    /// Whether anything so far depended on the seed or on how threads raced.
    varies: AtomicBool,
}

impl<'a> Context<'a> {
    /// Makes a context. `beats` counts up while the scenario lives; `role` is set in processes that a scenario starts.
    pub fn new(
        fs: &'a dyn Fs,
        seed: u64,
        race: Duration,
        beats: &'a AtomicU64,
        role: Option<String>,
    ) -> Self {
        Self {
            fs,
            seed,
            started: Instant::now(),
            race,
            patience: 1,
            checks: AtomicU64::new(0),
            beats,
            failures: Mutex::default(),
            notes: Mutex::default(),
            role,
            varies: AtomicBool::new(false),
        }
    }

    /// Multiplies what things may take, for a machine that others keep busy.
    #[must_use]
    pub fn with_patience(mut self, patience: u32) -> Self {
        self.patience = patience;
        self
    }

    /// Returns what may be taken here by something that may take `time` on a machine that nobody else uses.
    #[must_use]
    pub fn allows(&self, time: Duration) -> Duration {
        time * self.patience
    }

    /// Returns the file system under test.
    #[must_use]
    pub fn fs(&self) -> &'a dyn Fs {
        self.fs
    }

    /// Returns the seed that all randomness of this run comes from.
    #[must_use]
    pub fn seed(&self) -> u64 {
        self.varies.store(true, Ordering::Relaxed);
        self.seed
    }

    /// Makes a generator of its own for `thread`.
    #[must_use]
    pub fn rng(&self, thread: u64) -> SmallRng {
        SmallRng::seed_from_u64(self.seed().wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ thread)
    }

    /// Tells whether another run may take another course: whether the scenario drew numbers or raced.
    #[must_use]
    pub fn varies(&self) -> bool {
        self.varies.load(Ordering::Relaxed)
    }

    /// Tells the watchdog that the scenario is alive.
    pub fn beat(&self) {
        self.beats.fetch_add(1, Ordering::Relaxed);
    }

    /// Tells whether round `round` of a race is to be run: at least `least` are, at most `most`, and between the two as
    /// many as the time allows. Beats.
    #[must_use]
    pub fn goes_on(&self, round: u64, rounds: Range<u64>) -> bool {
        self.varies.store(true, Ordering::Relaxed);
        self.beat();
        round < rounds.start || (round < rounds.end && self.started.elapsed() < self.race)
    }

    /// As [`Context::goes_on`], and further within `rounds`, for some time, until `enough` has happened beside the race: on
    /// a busy machine others may come late.
    #[must_use]
    pub fn goes_on_until(
        &self,
        round: u64,
        rounds: Range<u64>,
        enough: impl FnOnce() -> bool,
    ) -> bool {
        let late = round < rounds.end && self.started.elapsed() < self.allows(LATE_MAX);
        self.goes_on(round, rounds) || (late && !enough())
    }

    /// Records whether a check held; returns that. The text is made only when it did not.
    pub fn check(&self, name: &'static str, holds: bool, saw: impl FnOnce() -> String) -> bool {
        self.checks.fetch_add(1, Ordering::Relaxed);
        self.beat();
        if !holds {
            let mut failures = self.failures.lock().expect("no panic under this lock");
            if failures.len() < FAILURES_MAX || failures.contains_key(name) {
                failures.entry(name).or_insert_with(|| (0, saw())).0 += 1;
            }
        }
        holds
    }

    /// Records whether a value is what it must be.
    pub fn equal<T: PartialEq + Debug>(&self, name: &'static str, got: T, want: T) -> bool {
        let holds = got == want;
        self.check(name, holds, || format!("{got:?}, expected {want:?}"))
    }

    /// Records whether every byte of `bytes`, which were read at `offset`, is `want`.
    pub fn all(&self, name: &'static str, bytes: &[u8], offset: u64, want: u8) -> bool {
        let bad = bytes.iter().position(|&byte| byte != want);
        self.check(name, bad.is_none(), || {
            let at = bad.unwrap_or(0);
            format!(
                "byte {} is {:#04x}, expected {want:#04x}",
                offset + at as u64,
                bytes[at]
            )
        })
    }

    /// Records whether file bytes `range` are all `want`, by reading them through `file`.
    ///
    /// # Errors
    /// When reading fails or meets the end of the file.
    pub fn contents(
        &self,
        name: &'static str,
        file: &dyn Handle,
        range: Range<u64>,
        want: u8,
    ) -> Result<bool, Stop> {
        let mut offset = range.start;
        let buffer = Region::pages(64)?;
        while offset < range.end {
            let want_now = usize::try_from(range.end - offset)
                .map_or(buffer.len(), |left| left.min(buffer.len()));
            let to = buffer.iov(0..want_now);
            let got = file.read(&to, At::Offset(offset), How::PLAIN)?;
            if got == 0 {
                return Err(Stop::Fail(format!(
                    "{name}: the file ends at {offset}, expected {}",
                    range.end
                )));
            }
            if !self.all(name, &buffer.to_vec(0..got)?, offset, want) {
                return Ok(false);
            }
            offset += got as u64;
        }
        Ok(true)
    }

    /// Adds a line that is reported whatever the outcome: what was measured.
    pub fn note(&self, line: impl Into<String>) {
        let mut notes = self.notes.lock().expect("no panic under this lock");
        if notes.len() < FAILURES_MAX {
            notes.push(line.into());
        }
    }

    /// Opens an empty file.
    ///
    /// # Errors
    /// As open(2).
    pub fn fresh(&self, name: &str) -> Result<Box<dyn Handle>, Stop> {
        Ok(self.fs.open(name, Open::FRESH)?)
    }

    /// Opens a file that holds `size` bytes `byte`, stored and not cached.
    ///
    /// # Errors
    /// When that fails.
    pub fn filled(&self, name: &str, byte: u8, size: u64) -> Result<Box<dyn Handle>, Stop> {
        let file = self.fresh(name)?;
        self.fill(&*file, byte, 0..size)?;
        file.drop_cache()?;
        Ok(file)
    }

    /// Writes `byte` all over file bytes `range`.
    ///
    /// # Errors
    /// When that fails.
    pub fn fill(&self, file: &dyn Handle, byte: u8, range: Range<u64>) -> Result<(), Stop> {
        let buffer = Region::pages(16)?;
        buffer.fill(0..buffer.len(), byte)?;
        let mut offset = range.start;
        while offset < range.end {
            let n = usize::try_from(range.end - offset)
                .map_or(buffer.len(), |left| left.min(buffer.len()));
            offset += file.write(&buffer.iov(0..n), At::Offset(offset), How::PLAIN)? as u64;
            self.beat();
        }
        Ok(())
    }

    /// Maps bytes `range` of a file so that nothing of it is cached or mapped: the first access faults and is read from
    /// the store.
    ///
    /// # Errors
    /// When that fails.
    pub fn cold_map(&self, file: &dyn Handle, range: Range<u64>) -> Result<Box<dyn Mapped>, Stop> {
        file.drop_cache()?;
        Ok(file.map(range, Sharing::Shared)?)
    }

    /// Opens a file with O_DIRECT.
    ///
    /// # Errors
    /// A skip where that is refused.
    pub fn direct(&self, name: &str) -> Result<Box<dyn Handle>, Stop> {
        match self.fs.open(name, Open::EXISTING.direct()) {
            Err(Errno::EINVAL) => Err(Stop::Skip("O_DIRECT is refused here".into())),
            opened => Ok(opened?),
        }
    }

    /// Returns the part that this process plays, or `None` in the leading one.
    #[must_use]
    pub fn role(&self) -> Option<&str> {
        self.role.as_deref()
    }

    /// Says what it came to, with the notes taken on the way.
    #[must_use]
    pub fn conclude(self, scenario: &Scenario, ended: Result<(), Stop>) -> (Outcome, Vec<String>) {
        let mut failures: Vec<Failure> = self
            .failures
            .into_inner()
            .expect("no panic under this lock")
            .into_iter()
            .map(|(check, (times, saw))| Failure {
                check: check.to_owned(),
                saw: if times == 1 {
                    saw
                } else {
                    format!("{saw} (first of {times})")
                },
            })
            .collect();
        let checks = self.checks.into_inner();
        match ended {
            Err(Stop::Skip(reason)) if failures.is_empty() => {
                let notes = self.notes.into_inner().expect("no panic under this lock");
                return (Outcome::Skipped { reason }, notes);
            }
            Err(Stop::Skip(_)) => {}
            Err(Stop::Fail(saw)) => failures.push(Failure {
                check: "run to the end".into(),
                saw,
            }),
            Ok(()) if checks == 0 => failures.push(Failure {
                check: "make a check".into(),
                saw: "none was made".into(),
            }),
            Ok(()) => {}
        }
        let notes = self.notes.into_inner().expect("no panic under this lock");
        (judge(scenario, self.fs.kind(), failures, checks), notes)
    }
}

fn judge(scenario: &Scenario, kind: Kind, failures: Vec<Failure>, checks: u64) -> Outcome {
    if failures.is_empty() {
        return Outcome::Passed { checks };
    }
    let known = |failure: &Failure| {
        scenario
            .known
            .iter()
            .find(|known| known.kind == kind && known.check == failure.check)
    };
    let reasons: Option<Vec<String>> = failures
        .iter()
        .map(|failure| known(failure).map(|known| known.why.to_owned()))
        .collect();
    match reasons {
        Some(mut reasons) => {
            reasons.dedup();
            Outcome::Diverges { failures, reasons }
        }
        None => Outcome::Failed { failures },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCENARIO: Scenario = Scenario {
        number: "T00",
        name: "none",
        claim: "nothing",
        known: &[Known {
            kind: Kind::Ext4,
            check: "size",
            why: "grows",
        }],
        seconds_max: 1,
        run: |_| Ok(()),
    };

    fn failed(check: &str) -> Failure {
        Failure {
            check: check.into(),
            saw: String::new(),
        }
    }

    #[test]
    fn only_known_failures_on_the_known_file_system_are_a_divergence() {
        let size = || vec![failed("size")];
        assert!(matches!(
            judge(&SCENARIO, Kind::Ext4, size(), 1),
            Outcome::Diverges { .. }
        ));
        assert!(judge(&SCENARIO, Kind::Xfs, size(), 1).is_bad());
        let both = vec![failed("size"), failed("count")];
        assert!(judge(&SCENARIO, Kind::Ext4, both, 1).is_bad());
        assert!(!judge(&SCENARIO, Kind::Ext4, vec![], 1).is_bad());
    }
}
