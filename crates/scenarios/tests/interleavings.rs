//! docs/interleavings.md against the sources: every invariant and bad interleaving has a test that carries its number,
//! every test the table names exists, and every number that a test carries is told of in the table.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends there")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use pinfold_scenarios::suite;

/// How many of each kind SEMANTICS.md has.
const KINDS: &[(&str, u32)] = &[
    ("INV", 9),
    ("A-", 8),
    ("B-", 8),
    ("C-", 10),
    ("D-", 9),
    ("E-", 10),
    ("F-", 9),
    ("G-", 6),
    ("H-", 16),
];

/// What may have no test yet: what is about several nodes.
fn may_be_pending(number: &str) -> bool {
    number.starts_with("H-") || number == "INV6"
}

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn numbers() -> Vec<String> {
    let of = |&(kind, count): &(&'static str, u32)| (1..=count).map(move |i| format!("{kind}{i}"));
    KINDS.iter().flat_map(of).collect()
}

/// Lists the Rust sources below `dir`.
fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() && !path.ends_with("target") {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// Finds what text cites: `B-3`, `INV7`, and whatever looks like that.
fn cited(text: &str) -> BTreeSet<String> {
    let word = |c: char| !(c.is_ascii_alphanumeric() || c == '-');
    let one = |word: &str| {
        let (kind, digits) = match word.strip_prefix("INV") {
            Some(digits) => ("INV", digits),
            None => word.split_at_checked(2)?,
        };
        let of_ours =
            kind == "INV" || (b'A'..=b'H').contains(&kind.as_bytes()[0]) && kind.ends_with('-');
        let number: u32 = digits.parse().ok()?;
        (of_ours && digits.len() <= 2).then(|| format!("{kind}{number}"))
    };
    text.split(word).filter_map(one).collect()
}

/// Finds the numbers in a test's name: `b3_b6_a_write_that_…`, `inv8_…`.
fn in_name(name: &str) -> BTreeSet<String> {
    let one = |part: &str| {
        let (kind, digits) = match part.strip_prefix("inv") {
            Some(digits) => ("INV".to_owned(), digits),
            None => {
                let (letter, digits) = part.split_at_checked(1)?;
                let letter = letter.chars().next().filter(|c| ('a'..='h').contains(c))?;
                (format!("{}-", letter.to_ascii_uppercase()), digits)
            }
        };
        let plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
        plain.then(|| format!("{kind}{digits}"))
    };
    name.split('_').filter_map(one).collect()
}

/// Returns the tests of a source by name, with the numbers each carries in its name or the comment above it.
fn tests_of(source: &str) -> Vec<(String, BTreeSet<String>)> {
    let lines: Vec<&str> = source.lines().map(str::trim).collect();
    let mut tests = Vec::new();
    for (at, _) in lines
        .iter()
        .enumerate()
        .filter(|(_, line)| **line == "#[test]")
    {
        let above = lines[..at].iter().rev();
        let above = above.take_while(|line| line.starts_with("///") || line.starts_with("#["));
        let below = lines[at + 1..].iter();
        let signature = below.clone().find(|line| line.starts_with("fn ")).unwrap();
        let name = signature["fn ".len()..].split('(').next().unwrap();
        let comment: Vec<&str> = above
            .chain(below.take_while(|line| !line.starts_with("fn ")))
            .filter(|line| line.starts_with("///"))
            .copied()
            .collect();
        let mut numbers = cited(&comment.join("\n"));
        numbers.extend(in_name(name));
        tests.push((name.to_owned(), numbers));
    }
    tests
}

/// Every test of the workspace with the numbers it carries.
fn tests() -> BTreeMap<String, BTreeSet<String>> {
    let mut files = Vec::new();
    for dir in ["crates", "front"] {
        sources(&workspace().join(dir), &mut files);
    }
    let mut all: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for file in files {
        for (name, numbers) in tests_of(&std::fs::read_to_string(file).unwrap()) {
            all.entry(name).or_default().extend(numbers);
        }
    }
    all
}

/// The table: number to the tests named, nothing where it is pending.
fn table() -> Vec<(String, Vec<String>)> {
    let text = std::fs::read_to_string(workspace().join("docs/interleavings.md")).unwrap();
    let rows = text.lines().filter(|line| line.starts_with("| "));
    let cells = rows.map(|line| line.split('|').map(str::trim).collect::<Vec<_>>());
    let known = numbers();
    cells
        .filter(|cells| known.iter().any(|number| number == cells[1]))
        .map(|cells| {
            let named = cells[3].split(", ").filter(|name| *name != "pending");
            let plain = named.map(|name| name.trim_matches('`').to_owned());
            (cells[1].to_owned(), plain.collect())
        })
        .collect()
}

#[test]
fn every_number_has_a_row_and_a_test_that_carries_it() {
    let (table, tests) = (table(), tests());
    let listed: Vec<_> = table.iter().map(|(number, _)| number.clone()).collect();
    assert_eq!(listed, numbers(), "one row for each number, in order");
    for (number, named) in &table {
        if named.is_empty() {
            assert!(may_be_pending(number), "{number} has no test");
            continue;
        }
        for name in named {
            let exists = tests.contains_key(name) || suite::find(name).is_some();
            assert!(exists, "{number}: there is no test {name}");
        }
        let carries = |name: &String| {
            tests
                .get(name)
                .is_some_and(|numbers| numbers.contains(number))
        };
        assert!(
            named.iter().any(carries),
            "no test of {number} carries that number in its name or comment"
        );
    }
}

#[test]
fn every_number_that_a_test_carries_is_in_the_table() {
    let table: BTreeMap<_, _> = table().into_iter().collect();
    for (test, numbers) in tests() {
        for number in numbers {
            let row = table.get(&number);
            let row =
                row.unwrap_or_else(|| panic!("{test} carries {number}: there is no such number"));
            assert!(
                row.contains(&test) || number.starts_with("H-"),
                "docs/interleavings.md: the row of {number} lacks `{test}`"
            );
        }
    }
}

#[test]
fn every_number_that_a_source_cites_exists() {
    let known: BTreeSet<String> = numbers().into_iter().collect();
    let mut files = Vec::new();
    for dir in ["crates", "front"] {
        sources(&workspace().join(dir), &mut files);
    }
    for file in files {
        let text = std::fs::read_to_string(&file).unwrap();
        let comments: Vec<&str> = text.lines().filter(|line| line.contains("//")).collect();
        for number in cited(&comments.join("\n")) {
            assert!(known.contains(&number), "{}: {number}", file.display());
        }
    }
}

#[test]
fn citations_are_found_where_they_are_and_nowhere_else() {
    let set = |names: &[&str]| {
        names
            .iter()
            .map(|&name| name.to_owned())
            .collect::<BTreeSet<_>>()
    };
    assert_eq!(
        cited("(B-3), E-6 to E-10; INV7. UTF-8, X-1, B-tree, A-, INV"),
        set(&["B-3", "E-6", "E-10", "INV7"])
    );
    assert_eq!(
        in_name("b3_b6_inv4_t13_a_1st_of_8"),
        set(&["B-3", "B-6", "INV4"])
    );
    let source =
        "/// C-1.\n#[test]\n#[ignore]\nfn d2_one() {}\n// E-1\n#[test]\n/// F-2\nfn two() {}\n";
    let found = tests_of(source);
    assert_eq!(found[0], ("d2_one".to_owned(), set(&["C-1", "D-2"])));
    assert_eq!(found[1], ("two".to_owned(), set(&["F-2"])));
}
