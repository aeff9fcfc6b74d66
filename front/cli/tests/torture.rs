//! What `pinfold torture` promises to scripts: exit statuses, JSON, and a directory left as it was.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends there")]

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// How long anything may take, however busy the machine.
const LIMIT: Duration = Duration::from_secs(240);

fn torture(args: &[&str]) -> Output {
    // Ends what hangs.
    Command::new("timeout")
        .args(["-k", "5", &LIMIT.as_secs().to_string()])
        .args([env!("CARGO_BIN_EXE_pinfold"), "torture", "--patience", "6"])
        .args(args)
        .output()
        .unwrap()
}

fn is_empty(dir: &Path) -> bool {
    std::fs::read_dir(dir).unwrap().next().is_none()
}

fn wait_until(what: &str, done: impl Fn() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < LIMIT, "not within {LIMIT:?}: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_good_directory_is_status_0_and_left_empty() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    for target in [&[path][..], &["--pinfold", path]] {
        let mut args = vec!["--seed", "7", "--only", "T01,zero_len_wild"];
        args.extend(target);
        let output = torture(&args);
        assert_eq!(output.status.code(), Some(0), "{}", said(&output));
        let shown = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(shown.contains("seed 7"), "{shown}");
        assert!(
            shown.contains("prefix_write") && shown.contains("passed"),
            "{shown}"
        );
        // No terminal, no progress bar.
        assert_eq!(said(&output), "");
    }
    assert!(is_empty(dir.path()));
}

#[test]
fn the_kernel_and_the_library_stand_side_by_side() {
    let (theirs, ours) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let output = torture(&[
        theirs.path().to_str().unwrap(),
        "--pinfold",
        ours.path().to_str().unwrap(),
        "--only",
        "T01,T65",
    ]);
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    let shown = String::from_utf8_lossy(&output.stdout).into_owned();
    let row = |number: &str| {
        let line = shown.lines().rfind(|line| line.starts_with(number));
        line.unwrap_or_else(|| panic!("no {number}: {shown}"))
    };
    assert_eq!(row("T01").matches("passed").count(), 5, "{shown}");
    // The kernel's locks are not ours to look at.
    assert_eq!(row("T65").matches("skipped [").count(), 1, "{shown}");
    assert_eq!(row("T65").matches("passed").count(), 4, "{shown}");
    assert!(row("A  ").contains("kernel on "), "{shown}");
    assert!(row("E  ").contains("64 MiB, inline on "), "{shown}");
}

#[test]
fn a_failure_is_status_1_and_reported_with_what_was_seen_and_the_seed() {
    let dir = tempfile::tempdir().unwrap();
    let page = tempfile::NamedTempFile::new().unwrap();
    let output = torture(&[
        dir.path().to_str().unwrap(),
        "--only",
        "T01",
        "--seed",
        "9",
        "--plant",
        "lose-prefix",
        "--html",
        page.path().to_str().unwrap(),
    ]);
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    let shown = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(shown.contains("FAILED"), "{shown}");
    assert!(shown.contains("seed: 9"), "{shown}");
    assert!(
        shown.contains("Err(EFAULT(14)), expected Ok(4096)"),
        "{shown}"
    );
    let page = std::fs::read_to_string(page.path()).unwrap();
    assert!(page.contains("something bad was found"), "{page}");
    assert!(
        page.contains("Err(EFAULT(14)), expected Ok(4096)"),
        "{page}"
    );
}

#[test]
fn a_killed_run_leaves_no_process_and_no_directory() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    let mut runner = Command::new(env!("CARGO_BIN_EXE_pinfold"))
        .args(["torture", path, "--only", "T58", "--plant", "hang-in-sync"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    wait_until("it works", || {
        let entries = std::fs::read_dir(dir.path()).unwrap().flatten();
        entries
            .map(|entry| entry.path().join("T58/file"))
            .any(|file| file.exists())
    });
    runner.kill().unwrap();
    runner.wait().unwrap();
    wait_until("the directory is empty", || is_empty(dir.path()));
    let names_it = |entry: &std::fs::DirEntry| {
        std::fs::read(entry.path().join("cmdline"))
            .is_ok_and(|line| String::from_utf8_lossy(&line).contains(path))
    };
    wait_until("no process is left", || {
        let processes = std::fs::read_dir("/proc").unwrap().flatten();
        !processes.into_iter().any(|entry| names_it(&entry))
    });
}

#[test]
fn sigint_ends_it_with_status_130_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut runner = Command::new(env!("CARGO_BIN_EXE_pinfold"))
        .args(["torture", dir.path().to_str().unwrap()])
        .args(["--only", "T58", "--plant", "hang-in-sync"])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    wait_until("it works", || !is_empty(dir.path()));
    let pid = rustix::process::Pid::from_raw(i32::try_from(runner.id()).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    assert_eq!(runner.wait().unwrap().code(), Some(130));
    assert!(is_empty(dir.path()));
}

#[test]
fn it_takes_no_root() {
    if !rustix::process::geteuid().is_root() {
        return println!("skipped: the other tests show it, being no root's");
    }
    let dir = tempfile::tempdir().unwrap();
    // Where anybody may run it from.
    let program = dir.path().join("pinfold");
    std::fs::copy(env!("CARGO_BIN_EXE_pinfold"), &program).unwrap();
    let work = dir.path().join("work");
    std::fs::create_dir(&work).unwrap();
    for path in [dir.path(), &work] {
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o777);
        std::fs::set_permissions(path, open).unwrap();
    }
    let output = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .args(["timeout", "-k", "5", "240"])
        .arg(&program)
        .args([
            "torture",
            "--patience",
            "6",
            "--only",
            "T01,T31,T57,T59",
            "--pinfold",
        ])
        .args([&work, &work])
        .output();
    let Ok(output) = output else {
        return println!("skipped: no setpriv");
    };
    let shown = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(0), "{shown}{}", said(&output));
    assert!(shown.contains("mounting a tmpfs takes root"), "{shown}");
    assert!(shown.contains("T01  prefix_write"), "{shown}");
    assert!(is_empty(&work));
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
    assert_eq!(document["pinfold"], env!("CARGO_PKG_VERSION"));
    assert_eq!(document["rounds"], 1);
}

#[test]
fn what_cannot_be_run_is_status_2_and_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("missing");
    let nowhere = missing.join("file");
    for (args, why) in [
        (
            vec![
                "--html",
                nowhere.to_str().unwrap(),
                dir.path().to_str().unwrap(),
            ],
            "missing/file",
        ),
        (
            vec!["--plant", "nothing", dir.path().to_str().unwrap()],
            "hang-in-sync",
        ),
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
