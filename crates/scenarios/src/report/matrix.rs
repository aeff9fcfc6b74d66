//! Results side by side: scenarios by targets.
//!
//! *Owns*: the [`Matrix`], and its form for a terminal.
//!
//! *Does not own*: the results it is made of; the page that is made of it ([`super::html`]).
//!
//! *Locking*: none.

use std::collections::BTreeMap;
use std::fmt;

use super::Record;
use crate::scenario::Outcome;

/// Results by scenario and target.
#[derive(Debug)]
pub struct Matrix<'a> {
    /// The targets, in the order in which they were run.
    pub columns: Vec<String>,
    /// The scenarios, by number.
    pub rows: Vec<Row<'a>>,
}

/// One scenario on every target.
#[derive(Debug)]
pub struct Row<'a> {
    /// Any of its results: number, name and claim are the same in all.
    pub scenario: &'a Record,
    /// For each target what came of it, round by round; nothing where it was not run.
    pub cells: Vec<Vec<&'a Record>>,
}

impl<'a> Matrix<'a> {
    /// Sorts results into their places.
    #[must_use]
    pub fn new(records: &'a [Record]) -> Self {
        let mut columns: Vec<String> = Vec::new();
        let mut rows: BTreeMap<&str, Vec<(usize, &Record)>> = BTreeMap::new();
        for record in records {
            let name = column(record);
            let number = columns.iter().position(|column| *column == name);
            let number = number.unwrap_or_else(|| {
                columns.push(name);
                columns.len() - 1
            });
            rows.entry(&record.scenario)
                .or_default()
                .push((number, record));
        }
        let rows = rows.into_values().map(|found| {
            let mut cells = vec![Vec::new(); columns.len()];
            for &(number, record) in &found {
                cells[number].push(record);
            }
            Row {
                scenario: found[0].1,
                cells,
            }
        });
        let rows = rows.collect();
        Self { columns, rows }
    }
}

/// Names the target of a result.
fn column(record: &Record) -> String {
    format!(
        "{} on {} ({})",
        record.target,
        record.dir.display(),
        record.file_system
    )
}

/// Returns the result of a cell that matters most: the worst.
#[must_use]
pub fn worst<'a>(cell: &[&'a Record]) -> Option<&'a Record> {
    let weight = |record: &&&Record| match record.outcome {
        Outcome::Skipped { .. } => 0,
        Outcome::Passed { .. } => 1,
        Outcome::Diverges { .. } => 2,
        Outcome::Failed { .. } => 3,
        Outcome::Hung { .. } => 4,
    };
    cell.iter().max_by_key(weight).copied()
}

/// Letters for the columns: the targets' names are too long to stand above them.
fn letter(column: usize) -> String {
    match u8::try_from(column) {
        Ok(column) if column < 26 => char::from(b'A' + column).to_string(),
        _ => format!("#{column}"),
    }
}

impl fmt::Display for Matrix<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, column) in self.columns.iter().enumerate() {
            writeln!(f, "{}  {column}", letter(number))?;
        }
        let letters = (0..self.columns.len()).map(letter);
        let letters: String = letters.map(|letter| format!(" {letter:<11}")).collect();
        writeln!(f, "\n{:<26}{}", "", letters.trim_end())?;
        let mut reasons: Vec<&str> = Vec::new();
        for row in &self.rows {
            let mut line = format!("{:<4} {:<21}", row.scenario.scenario, row.scenario.name);
            for cell in &row.cells {
                let text = match worst(cell).map(|record| &record.outcome) {
                    None => "-".into(),
                    Some(Outcome::Diverges { reasons: why, .. }) => {
                        let marks: Vec<String> = why
                            .iter()
                            .map(|why| mark(&mut reasons, why).to_string())
                            .collect();
                        format!("known [{}]", marks.join(","))
                    }
                    Some(Outcome::Skipped { reason }) => {
                        format!("skipped [{}]", mark(&mut reasons, reason))
                    }
                    Some(outcome) => outcome.word().into(),
                };
                line += &format!(" {text:<11}");
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        for (number, reason) in reasons.iter().enumerate() {
            writeln!(
                f,
                "{}[{}] {reason}",
                if number == 0 { "\n" } else { "" },
                number + 1
            )?;
        }
        Ok(())
    }
}

/// Returns the number that a reason has below the table, from 1.
fn mark<'a>(reasons: &mut Vec<&'a str>, reason: &'a str) -> usize {
    if let Some(known) = reasons.iter().position(|other| *other == reason) {
        return known + 1;
    }
    reasons.push(reason);
    reasons.len()
}

#[cfg(test)]
mod tests {
    use super::super::tests::record;
    use super::*;

    #[test]
    fn targets_stand_side_by_side_with_their_reasons_below() {
        let diverges = Outcome::Diverges {
            failures: Vec::new(),
            reasons: vec!["grows".into()],
        };
        let ours = Record {
            target: "pinfold 64 MiB".into(),
            ..record(Outcome::Passed { checks: 1 })
        };
        let again = Record {
            seed: 8,
            ..record(Outcome::Failed {
                failures: Vec::new(),
            })
        };
        let records = [record(diverges), ours];
        let text = Matrix::new(&records).to_string();
        assert!(
            text.contains("A  kernel on /mnt (ext4)\nB  pinfold 64 MiB"),
            "{text}"
        );
        assert!(
            text.contains("T03  all_bad               known [1]   passed\n"),
            "{text}"
        );
        assert!(text.contains("[1] grows"), "{text}");
        // A later round's failure is what the cell shows.
        let records = [&records[..], &[again]].concat();
        let matrix = Matrix::new(&records);
        assert_eq!((matrix.columns.len(), matrix.rows.len()), (2, 1));
        assert_eq!(worst(&matrix.rows[0].cells[0]).unwrap().seed, 8);
    }
}
