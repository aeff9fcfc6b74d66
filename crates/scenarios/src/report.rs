//! Results as people and as programs read them.
//!
//! *Owns*: [`Record`], the [`row`] of one, the [`matrix`] of several targets side by side, the [`Document`] of a run as JSON
//! and as a [page](html).
//!
//! *Does not own*: how results come about.
//!
//! *Locking*: none.

pub mod html;
pub mod matrix;

use std::fmt::Write as _;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::scenario::Outcome;

/// The result of one scenario on one target.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Who answered: `kernel`, or `pinfold` with its memory.
    pub target: String,
    /// The directory.
    pub dir: PathBuf,
    /// Name of the kernel's file system there.
    pub file_system: String,
    /// Number of the scenario.
    pub scenario: String,
    /// Its name.
    pub name: String,
    /// Its claim.
    pub claim: String,
    /// Seed of the run.
    pub seed: u64,
    /// How long it took.
    pub seconds: f64,
    /// What came of it.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// What it measured.
    pub notes: Vec<String>,
    /// Whether another run may take another course.
    #[serde(default)]
    pub varies: bool,
}

/// How many results there are of each sort.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// Every check held.
    pub passed: usize,
    /// Known divergences.
    pub diverged: usize,
    /// Failed checks.
    pub failed: usize,
    /// Hangs.
    pub hung: usize,
    /// Not run.
    pub skipped: usize,
}

impl Tally {
    /// Counts results.
    #[must_use]
    pub fn of(records: &[Record]) -> Self {
        let mut tally = Self::default();
        for record in records {
            *match record.outcome {
                Outcome::Passed { .. } => &mut tally.passed,
                Outcome::Diverges { .. } => &mut tally.diverged,
                Outcome::Failed { .. } => &mut tally.failed,
                Outcome::Hung { .. } => &mut tally.hung,
                Outcome::Skipped { .. } => &mut tally.skipped,
            } += 1;
        }
        tally
    }

    /// Tells whether nothing bad was found.
    #[must_use]
    pub const fn is_good(&self) -> bool {
        self.failed == 0 && self.hung == 0
    }
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            passed,
            diverged,
            failed,
            hung,
            skipped,
        } = self;
        write!(
            f,
            "{passed} passed, {diverged} diverge (known), {failed} failed, {hung} hung, {skipped} skipped"
        )
    }
}

/// Describes one result: a line, and below it whatever is not plain success.
#[must_use]
pub fn row(record: &Record) -> String {
    let mut text = format!(
        "{:<4} {:<20} {:<17} {:>7.2}s",
        record.scenario,
        record.name,
        record.outcome.word(),
        record.seconds
    );
    let mut add = |label: &str, detail: &str| {
        let _ = write!(
            text,
            "\n       {label}: {}",
            detail.replace('\n', "\n       ")
        );
    };
    match &record.outcome {
        Outcome::Passed { .. } => {}
        Outcome::Diverges { failures, reasons } => {
            for failure in failures {
                add(&failure.check, &failure.saw);
            }
            for reason in reasons {
                add("because", reason);
            }
        }
        Outcome::Failed { failures } => {
            add("claim", &record.claim);
            for failure in failures {
                add(&failure.check, &failure.saw);
            }
            add("seed", &record.seed.to_string());
        }
        Outcome::Hung { why, stacks } => {
            add("claim", &record.claim);
            add("watchdog", why);
            add("stacks", stacks);
            add("seed", &record.seed.to_string());
        }
        Outcome::Skipped { reason } => add("because", reason),
    }
    for note in &record.notes {
        add("note", note);
    }
    text
}

/// Describes all results, by target.
#[must_use]
pub fn table(records: &[Record]) -> String {
    let mut text = String::new();
    let mut heading = String::new();
    for record in records {
        let of = format!(
            "{} on {} ({})",
            record.target,
            record.dir.display(),
            record.file_system
        );
        if of != heading {
            let _ = writeln!(text, "\n{of}");
            heading = of;
        }
        let _ = writeln!(text, "{}", row(record));
    }
    let _ = writeln!(text, "\n{}", Tally::of(records));
    text
}

/// How much was run; of later rounds only what is bad is among the results.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// Seed of the first round; each further round takes the next number.
    pub seed: u64,
    /// Rounds begun.
    pub rounds: u64,
    /// Scenarios run, all rounds and targets together.
    pub runs: u64,
    /// Whether it was ended from outside.
    pub interrupted: bool,
}

/// Everything about a run: what is written with `--json`, and shown by the page.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Document {
    /// Version of Pinfold.
    pub pinfold: String,
    /// Release of the kernel, as uname(2) tells.
    pub kernel: String,
    /// Machine, as uname(2) tells.
    pub machine: String,
    /// Name of the processors, as /proc/cpuinfo tells; empty where it does not.
    pub processor: String,
    /// How many of them may be used.
    pub processors: usize,
    /// Bytes of memory.
    pub memory: u64,
    /// How much was run.
    #[serde(flatten)]
    pub extent: Extent,
    /// How many results of each sort.
    pub tally: Tally,
    /// The results.
    pub results: Vec<Record>,
}

impl Document {
    /// Puts results into a document, with what is to be known about this machine.
    #[must_use]
    pub fn new(records: Vec<Record>, extent: Extent) -> Self {
        let uname = rustix::system::uname();
        let processors = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let processor = processors
            .lines()
            .find_map(|line| line.strip_prefix("model name")?.split_once(':'))
            .map(|(_, name)| name.trim().to_owned());
        let memory = rustix::system::sysinfo();
        Self {
            pinfold: env!("CARGO_PKG_VERSION").into(),
            kernel: uname.release().to_string_lossy().into_owned(),
            machine: uname.machine().to_string_lossy().into_owned(),
            processor: processor.unwrap_or_default(),
            processors: std::thread::available_parallelism().map_or(1, Into::into),
            memory: memory.totalram.saturating_mul(u64::from(memory.mem_unit)),
            extent,
            tally: Tally::of(&records),
            results: records,
        }
    }

    /// Makes the JSON of it.
    ///
    /// # Errors
    /// None that these types can give rise to; passed on all the same.
    pub fn json(&self) -> Result<String, serde_json::Error> {
        serde_json::to_string_pretty(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenario::Failure;

    pub(super) fn record(outcome: Outcome) -> Record {
        Record {
            target: "kernel".into(),
            dir: "/mnt".into(),
            file_system: "ext4".into(),
            scenario: "T03".into(),
            name: "all_bad".into(),
            claim: "nothing moves".into(),
            seed: 7,
            seconds: 0.5,
            outcome,
            notes: vec!["once".into()],
            varies: false,
        }
    }

    #[test]
    fn a_failure_is_shown_with_its_claim_and_seed_and_spoils_the_tally() {
        let failures = vec![Failure {
            check: "size".into(),
            saw: "1".into(),
        }];
        let records = [
            record(Outcome::Passed { checks: 3 }),
            record(Outcome::Failed { failures }),
        ];
        let text = table(&records);
        assert!(text.contains("kernel on /mnt (ext4)"), "{text}");
        assert!(text.contains("claim: nothing moves"), "{text}");
        assert!(text.contains("seed: 7"), "{text}");
        assert!(
            text.contains("1 passed, 0 diverge (known), 1 failed"),
            "{text}"
        );
        assert!(!Tally::of(&records).is_good());
        assert!(Tally::of(&records[..1]).is_good());
    }

    #[test]
    fn the_json_document_is_read_back_as_it_was() {
        let reason = "no root".to_owned();
        let records = [record(Outcome::Skipped { reason })];
        let extent = Extent {
            seed: 7,
            rounds: 1,
            runs: 1,
            interrupted: false,
        };
        let text = Document::new(records.to_vec(), extent).json().unwrap();
        let back: Document = serde_json::from_str(&text).unwrap();
        assert_eq!(back.results, records);
        assert_eq!(back.tally.skipped, 1);
        assert_eq!(back.extent, extent);
        assert!(text.contains("\"outcome\": \"skipped\""), "{text}");
    }
}
