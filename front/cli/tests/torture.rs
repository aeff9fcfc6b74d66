//! What `pinfold torture` promises to scripts: exit statuses, JSON, and a directory left as it was.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends there")]

use std::process::{Command, Output};

fn torture(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_pinfold"))
        .arg("torture")
        .args(args)
        .output()
        .unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_good_directory_is_status_0_and_left_empty() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    for back_end in [&["--seed", "7"][..], &["--pinfold", "--seed", "7"]] {
        let mut args = back_end.to_vec();
        args.extend(["--only", "T01,zero_len_wild", path]);
        let output = torture(&args);
        assert_eq!(output.status.code(), Some(0), "{}", said(&output));
        let shown = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(shown.contains("seed 7"), "{shown}");
        assert!(
            shown.contains("prefix_write") && shown.contains("passed"),
            "{shown}"
        );
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn results_are_written_as_json() {
    let dir = tempfile::tempdir().unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    let json = file.path().to_str().unwrap();
    let output = torture(&[
        "--only",
        "T01",
        "--json",
        json,
        dir.path().to_str().unwrap(),
    ]);
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    let text = std::fs::read_to_string(file.path()).unwrap();
    let document: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(document["results"][0]["scenario"], "T01");
    assert_eq!(document["results"][0]["outcome"], "passed");
    assert_eq!(document["tally"]["passed"], 1);
}

#[test]
fn what_cannot_be_run_is_status_2_and_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("missing");
    for (args, why) in [
        (vec![missing.to_str().unwrap()], "missing"),
        (vec!["--only", "T999", dir.path().to_str().unwrap()], "T999"),
        (vec![], "DIR"),
    ] {
        let output = torture(&args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(said(&output).contains(why), "{}", said(&output));
    }
}

#[test]
fn the_list_names_every_scenario_and_its_claim() {
    let output = torture(&["--list"]);
    let shown = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(0));
    assert!(
        shown
            .lines()
            .any(|line| line.starts_with("T13  short_copy_hidden")),
        "{shown}"
    );
    assert!(shown.lines().count() >= 17, "{shown}");
}
