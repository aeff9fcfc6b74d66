//! A run as one page: nothing is loaded from elsewhere, and it reads without its script as well.
//!
//! *Owns*: the page and the escaping of everything that goes into it.
//!
//! *Does not own*: what it shows ([`Document`], [`Matrix`]).
//!
//! *Locking*: none.

use std::fmt::{self, Display, Write as _};

use super::matrix::{Matrix, Row, worst};
use super::{Document, Record};
use crate::scenario::{Failure, Outcome};

/// Text that stands in a page as what it is, between tags and in quoted attributes.
struct Escaped<T>(T);

impl<T: Display> Display for Escaped<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        struct Escaping<'a, 'b>(&'a mut fmt::Formatter<'b>);
        impl fmt::Write for Escaping<'_, '_> {
            fn write_str(&mut self, text: &str) -> fmt::Result {
                for char in text.chars() {
                    match char {
                        '&' => self.0.write_str("&amp;")?,
                        '<' => self.0.write_str("&lt;")?,
                        '>' => self.0.write_str("&gt;")?,
                        '"' => self.0.write_str("&quot;")?,
                        '\'' => self.0.write_str("&#39;")?,
                        // Not allowed in a page even as a reference.
                        control if control.is_control() && !matches!(control, '\n' | '\t') => {
                            self.0.write_char(char::REPLACEMENT_CHARACTER)?;
                        }
                        plain => self.0.write_char(plain)?,
                    }
                }
                Ok(())
            }
        }
        write!(Escaping(f), "{}", self.0)
    }
}

/// Makes the page.
#[must_use]
pub fn page(document: &Document) -> String {
    let mut page = String::new();
    // Only a formatter that fails can make this fail, and none here does.
    let _ = write_page(&mut page, document);
    page
}

fn write_page(page: &mut String, document: &Document) -> fmt::Result {
    let tally = document.tally;
    let verdict = match (tally.is_good(), document.extent.interrupted) {
        (true, false) => "nothing bad was found",
        (true, true) => "interrupted; nothing bad was found until then",
        (false, _) => "something bad was found",
    };
    // The policy makes "loads nothing" a fact that the browser sees to, not a habit.
    write!(
        page,
        r#"<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>pinfold torture: {verdict}</title>
<style>
{css}</style>
</head>
<body>
<h1>pinfold torture: {verdict}</h1>
<p>{tally}</p>
"#,
        css = include_str!("page.css"),
    )?;
    write_facts(page, document)?;
    write_filter(page, document)?;
    let matrix = Matrix::new(&document.results);
    write_table(page, &matrix)?;
    write!(
        page,
        "<script>\n{}</script>\n</body>\n</html>\n",
        include_str!("page.js")
    )
}

fn write_facts(page: &mut String, document: &Document) -> fmt::Result {
    let extent = document.extent;
    let last = extent.seed.wrapping_add(extent.rounds.saturating_sub(1));
    let seeds = if last == extent.seed {
        last.to_string()
    } else {
        format!("{} to {last}, one a round", extent.seed)
    };
    let machine = format!(
        "{} × {} ({}), {} MiB of memory",
        document.processors,
        document.processor,
        document.machine,
        document.memory >> 20
    );
    let facts = [
        ("Pinfold", document.pinfold.clone()),
        ("Kernel", format!("Linux {}", document.kernel)),
        ("Machine", machine),
        ("Seed", seeds),
        (
            "Runs",
            format!("{} in {} rounds", extent.runs, extent.rounds),
        ),
    ];
    writeln!(page, "<dl class=\"facts\">")?;
    for (name, value) in facts {
        writeln!(page, "<dt>{name}</dt><dd>{}</dd>", Escaped(value))?;
    }
    writeln!(page, "</dl>")
}

/// Result names as classes and as the filter's values, and as words.
const RESULTS: [(&str, &str); 5] = [
    ("failed", "failed"),
    ("hung", "hung"),
    ("diverges", "diverges (known)"),
    ("skipped", "skipped"),
    ("passed", "passed"),
];

fn class(outcome: &Outcome) -> &'static str {
    match outcome {
        Outcome::Passed { .. } => "passed",
        Outcome::Diverges { .. } => "diverges",
        Outcome::Failed { .. } => "failed",
        Outcome::Hung { .. } => "hung",
        Outcome::Skipped { .. } => "skipped",
    }
}

/// Hidden until the script is there to make it work.
fn write_filter(page: &mut String, document: &Document) -> fmt::Result {
    writeln!(
        page,
        "<fieldset class=\"filter\" hidden><legend>Show scenarios with a result that</legend>"
    )?;
    for (class, word) in RESULTS {
        let count = document
            .results
            .iter()
            .filter(|record| self::class(&record.outcome) == class)
            .count();
        writeln!(
            page,
            "<label><input type=\"checkbox\" value=\"{class}\" checked> \
             <span class=\"{class}\">{word}</span> ({count})</label>"
        )?;
    }
    writeln!(page, "<output></output></fieldset>")
}

fn write_table(page: &mut String, matrix: &Matrix<'_>) -> fmt::Result {
    writeln!(page, "<table>\n<thead><tr><th scope=\"col\">Scenario</th>")?;
    for column in &matrix.columns {
        writeln!(page, "<th scope=\"col\">{}</th>", Escaped(column))?;
    }
    writeln!(page, "</tr></thead>\n<tbody>")?;
    for row in &matrix.rows {
        write_row(page, row, &matrix.columns)?;
    }
    writeln!(page, "</tbody>\n</table>")
}

fn write_row(page: &mut String, row: &Row<'_>, columns: &[String]) -> fmt::Result {
    let records = || row.cells.iter().flatten();
    let results: Vec<&str> = RESULTS
        .iter()
        .map(|(class, _)| *class)
        .filter(|class| records().any(|record| self::class(&record.outcome) == *class))
        .collect();
    write!(
        page,
        "<tr data-results=\"{}\"><th scope=\"row\">{} {}<p class=\"claim\">{}</p></th>",
        results.join(" "),
        Escaped(&row.scenario.scenario),
        Escaped(&row.scenario.name),
        Escaped(&row.scenario.claim),
    )?;
    for (cell, column) in row.cells.iter().zip(columns) {
        write!(page, "<td data-target=\"{}\">", Escaped(column))?;
        if worst(cell).is_none() {
            write!(page, "not run")?;
        }
        for record in cell {
            write_result(page, record)?;
        }
        write!(page, "</td>")?;
    }
    writeln!(page, "</tr>")
}

fn write_result(page: &mut String, record: &Record) -> fmt::Result {
    let outcome = &record.outcome;
    write!(
        page,
        "<details{}><summary><span class=\"result {}\">{}</span> {:.2} s</summary><dl>",
        if outcome.is_bad() { " open" } else { "" },
        class(outcome),
        outcome.word(),
        record.seconds,
    )?;
    let mut stacks_of = None;
    match outcome {
        Outcome::Passed { checks } => item(page, "checks", checks)?,
        Outcome::Diverges { failures, reasons } => {
            for reason in reasons {
                item(page, "because", reason)?;
            }
            write_failures(page, failures)?;
        }
        Outcome::Failed { failures } => write_failures(page, failures)?,
        Outcome::Hung { why, stacks } => {
            item(page, "watchdog", why)?;
            stacks_of = Some(stacks);
        }
        Outcome::Skipped { reason } => item(page, "because", reason)?,
    }
    for note in &record.notes {
        item(page, "note", note)?;
    }
    item(page, "seed", record.seed)?;
    write!(page, "</dl>")?;
    if let Some(stacks) = stacks_of {
        write!(
            page,
            "<details class=\"stacks\"><summary>stacks of its threads</summary><pre>{}</pre></details>",
            Escaped(stacks)
        )?;
    }
    write!(page, "</details>")
}

fn write_failures(page: &mut String, failures: &[Failure]) -> fmt::Result {
    failures
        .iter()
        .try_for_each(|failure| item(page, &failure.check, &failure.saw))
}

fn item(page: &mut String, name: &str, value: impl Display) -> fmt::Result {
    write!(
        page,
        "<dt>{}</dt><dd>{}</dd>",
        Escaped(name),
        Escaped(value)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_is_shown_can_end_its_element_or_attribute() {
        let nasty = "</pre><script>a&b\"'\u{1b}[31m\n";
        assert_eq!(
            Escaped(nasty).to_string(),
            "&lt;/pre&gt;&lt;script&gt;a&amp;b&quot;&#39;\u{fffd}[31m\n"
        );
    }
}
