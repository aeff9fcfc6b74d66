//! Results as people and as programs read them.
//!
//! *Owns*: [`Record`], the [`table`] and the [`json`] document.
//!
//! *Does not own*: how results come about.
//!
//! *Locking*: none.

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

/// What a run writes with `--json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Document {
    /// Release of the kernel, as uname(2) tells.
    pub kernel: String,
    /// Machine, as uname(2) tells.
    pub machine: String,
    /// How many results of each sort.
    pub tally: Tally,
    /// The results.
    pub results: Vec<Record>,
}

impl Document {
    /// Puts results into a document.
    #[must_use]
    pub fn new(records: Vec<Record>) -> Self {
        let uname = rustix::system::uname();
        Self {
            kernel: uname.release().to_string_lossy().into_owned(),
            machine: uname.machine().to_string_lossy().into_owned(),
            tally: Tally::of(&records),
            results: records,
        }
    }
}

/// Makes the JSON document of all results.
///
/// # Errors
/// None that these types can give rise to; passed on all the same.
pub fn json(records: &[Record]) -> Result<String, serde_json::Error> {
    serde_json::to_string_pretty(&Document::new(records.to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenario::Failure;

    fn record(outcome: Outcome) -> Record {
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
        let text = json(&records).unwrap();
        let back: Document = serde_json::from_str(&text).unwrap();
        assert_eq!(back.results, records);
        assert_eq!(back.tally.skipped, 1);
        assert!(text.contains("\"outcome\": \"skipped\""), "{text}");
    }
}
