//! `pinfold mount` as a user meets it: statuses, messages, signals, and what is left behind.
//!
//! Where FUSE cannot be had, the tests that mount say so and pass.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// How long anything may take, however busy the machine.
const LIMIT: Duration = Duration::from_secs(240);

struct Place {
    data: PathBuf,
    mnt: PathBuf,
    base: tempfile::TempDir,
}

fn place() -> Place {
    let base = tempfile::tempdir().unwrap();
    let (data, mnt) = (base.path().join("data"), base.path().join("mnt"));
    fs::create_dir(&data).unwrap();
    fs::create_dir(&mnt).unwrap();
    Place { data, mnt, base }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Only a failed test leaves one.
        let _ = rustix::mount::unmount(&self.mnt, rustix::mount::UnmountFlags::DETACH);
    }
}

fn pinfold() -> Command {
    // Ends what hangs: the mount then goes with the server.
    let mut command = Command::new("timeout");
    command
        .args(["-k", "5", &LIMIT.as_secs().to_string()])
        .arg(env!("CARGO_BIN_EXE_pinfold"));
    command
}

/// Runs `pinfold mount` with these arguments.
fn mount(arguments: &[&str], place: &Place, command: &[&str]) -> Output {
    pinfold()
        .arg("mount")
        .args(["--memory", "8M"])
        .args(arguments)
        .args([&place.data, &place.mnt])
        .args((!command.is_empty()).then_some("--"))
        .args(command)
        .output()
        .unwrap()
}

fn complaint(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Tells whether FUSE can be had; says so if not.
fn fuse() -> bool {
    let output = mount(&[], &place(), &["true"]);
    let there = output.status.success();
    if !there {
        println!("skipped: {}", complaint(&output));
    }
    there
}

fn is_mounted(mnt: &Path) -> bool {
    pinfold_fuse::is_mount_point(mnt).unwrap()
}

/// Starts a server without a command and waits until it serves.
fn serve(place: &Place) -> Child {
    let child = Command::new(env!("CARGO_BIN_EXE_pinfold"))
        .args(["mount", "--memory", "8M"])
        .args([&place.data, &place.mnt])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    wait_until("it is mounted", || is_mounted(&place.mnt));
    child
}

fn wait_until(what: &str, done: impl Fn() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < LIMIT, "not within {LIMIT:?}: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn signal(child: &Child, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
    kill_process(pid, signal).unwrap();
}

#[test]
fn the_commands_status_is_passed_on() {
    if !fuse() {
        return;
    }
    for (script, status) in [
        ("exit 0", 0),
        ("exit 7", 7),
        ("kill -TERM $$", 143),
        ("kill -KILL $$", 137),
    ] {
        let place = place();
        let output = mount(&[], &place, &["sh", "-c", script]);
        assert_eq!(
            output.status.code(),
            Some(status),
            "{script}: {}",
            complaint(&output)
        );
        assert!(!is_mounted(&place.mnt));
    }
}

#[test]
fn a_command_that_cannot_be_started_is_127_and_leaves_no_mount() {
    if !fuse() {
        return;
    }
    let place = place();
    let output = mount(&[], &place, &["/does/not/exist"]);
    assert_eq!(output.status.code(), Some(127));
    assert!(
        complaint(&output).contains("cannot run /does/not/exist"),
        "{}",
        complaint(&output)
    );
    assert!(!is_mounted(&place.mnt));
}

#[test]
fn the_command_runs_where_it_was_called_and_its_files_are_in_the_directory() {
    if !fuse() {
        return;
    }
    let place = place();
    let output = pinfold()
        .args(["mount", "--stats", "data", "mnt", "--", "sh", "-c"])
        .arg("pwd; echo text > mnt/file; ulimit -n")
        .current_dir(place.base.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let here = place.base.path().canonicalize().unwrap();
    assert_eq!(said.lines().next().unwrap(), here.to_str().unwrap());
    let own = Command::new("sh")
        .args(["-c", "ulimit -n"])
        .output()
        .unwrap();
    assert!(
        said.ends_with(&*String::from_utf8_lossy(&own.stdout)),
        "its limits are untouched"
    );
    assert_eq!(fs::read(place.data.join("file")).unwrap(), b"text\n");
    assert!(
        complaint(&output).contains("pages_written"),
        "{}",
        complaint(&output)
    );
}

#[test]
fn signals_reach_the_command_and_end_a_server() {
    if !fuse() {
        return;
    }
    let place = place();
    let script = "trap 'exit 42' USR1; touch mnt/ready; while :; do sleep 0.05; done";
    let mut child = Command::new(env!("CARGO_BIN_EXE_pinfold"))
        .args(["mount", "data", "mnt", "--", "sh", "-c", script])
        .current_dir(place.base.path())
        .spawn()
        .unwrap();
    wait_until("the command runs", || place.data.join("ready").exists());
    signal(&child, Signal::USR1);
    assert_eq!(child.wait().unwrap().code(), Some(42));
    for ending in [Signal::TERM, Signal::INT, Signal::HUP] {
        let mut server = serve(&place);
        fs::write(place.mnt.join("late"), format!("{ending:?}")).unwrap();
        signal(&server, ending);
        assert_eq!(server.wait().unwrap().code(), Some(0), "{ending:?}");
        assert!(!is_mounted(&place.mnt));
        assert_eq!(
            fs::read_to_string(place.data.join("late")).unwrap(),
            format!("{ending:?}")
        );
    }
}

#[test]
fn a_server_ends_when_it_is_unmounted() {
    if !fuse() || !rustix::process::geteuid().is_root() {
        return;
    }
    let place = place();
    let mut server = serve(&place);
    fs::write(place.mnt.join("a"), "kept").unwrap();
    rustix::mount::unmount(&place.mnt, rustix::mount::UnmountFlags::empty()).unwrap();
    assert_eq!(server.wait().unwrap().code(), Some(0));
    assert_eq!(fs::read(place.data.join("a")).unwrap(), b"kept");
}

#[test]
fn what_still_uses_the_mount_is_cut_off_with_a_warning_and_loses_nothing_written() {
    if !fuse() || !rustix::process::geteuid().is_root() {
        return;
    }
    let place = place();
    // Who still uses it does so until it is told to end, and holds none of the pipes that are waited for.
    let script = "exec 3>mnt/held; echo first >&3; sleep 1000 >/dev/null 2>&1 & echo $!; exit 3";
    let output = pinfold()
        .args(["mount", "data", "mnt", "--", "sh", "-c", script])
        .current_dir(place.base.path())
        .output()
        .unwrap();
    let user = String::from_utf8_lossy(&output.stdout).into_owned();
    let user = Pid::from_raw(user.trim().parse().unwrap()).unwrap();
    kill_process(user, Signal::KILL).unwrap();
    assert_eq!(output.status.code(), Some(3));
    assert!(
        complaint(&output).contains("still in use"),
        "{}",
        complaint(&output)
    );
    assert!(!is_mounted(&place.mnt));
    assert_eq!(fs::read(place.data.join("held")).unwrap(), b"first\n");
}

#[test]
fn the_mount_of_a_killed_server_is_replaced() {
    if !fuse() || !rustix::process::geteuid().is_root() {
        return;
    }
    let place = place();
    let mut server = serve(&place);
    fs::write(place.mnt.join("a"), "x").unwrap();
    fs::File::open(place.mnt.join("a"))
        .unwrap()
        .sync_all()
        .unwrap();
    server.kill().unwrap();
    server.wait().unwrap();
    let dead = fs::metadata(&place.mnt).unwrap_err();
    assert_eq!(
        rustix::io::Errno::from_io_error(&dead),
        Some(rustix::io::Errno::NOTCONN)
    );
    let output = mount(&[], &place, &["cat", place.mnt.join("a").to_str().unwrap()]);
    assert!(output.status.success(), "{}", complaint(&output));
    assert_eq!(output.stdout, b"x");
    assert!(complaint(&output).contains("removed the mount of a server that is gone"));
    assert!(!is_mounted(&place.mnt));
}

#[test]
fn a_second_server_for_the_same_files_is_refused() {
    if !fuse() {
        return;
    }
    let place = place();
    let mut server = serve(&place);
    let other = place.base.path().join("other");
    fs::create_dir(&other).unwrap();
    fs::create_dir(place.data.join("below")).unwrap();
    for dir in [
        place.data.clone(),
        place.data.join("below"),
        place.base.path().to_owned(),
    ] {
        let elsewhere = tempfile::tempdir().unwrap();
        let output = pinfold()
            .arg("mount")
            .args([dir.as_path(), elsewhere.path()])
            .args(["--", "true"])
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(1), "{}", dir.display());
        let complaint = complaint(&output);
        assert!(complaint.contains("serves"), "{complaint}");
        assert!(
            complaint.contains(&format!("process {}", server.id())),
            "{complaint}"
        );
    }
    // And the mount point is taken.
    let output = pinfold()
        .arg("mount")
        .args([&other, &place.mnt])
        .args(["--", "true"])
        .output()
        .unwrap();
    assert!(
        complaint(&output).contains("something is mounted there"),
        "{}",
        complaint(&output)
    );
    signal(&server, Signal::TERM);
    server.wait().unwrap();
}

#[test]
fn thousands_of_files_need_few_descriptors() {
    // Inodes can be opened by handle with CAP_DAC_READ_SEARCH alone.
    if !fuse() || !rustix::process::geteuid().is_root() {
        return;
    }
    let place = place();
    let work = "cd mnt && seq 3000 | xargs touch && ls -l | wc -l && cat * | wc -c && rm -- * && ls | wc -l";
    let limited = "ulimit -n 200; exec \"$0\" mount data mnt -- sh -c \"$1\"";
    let output = Command::new("sh")
        .args(["-c", limited, env!("CARGO_BIN_EXE_pinfold"), work])
        .current_dir(place.base.path())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", complaint(&output));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "3001\n0\n0\n");
}

#[test]
fn bad_arguments_are_named() {
    let place = place();
    let file = place.base.path().join("file");
    fs::write(&file, "").unwrap();
    let missing = place.base.path().join("missing");
    let run = |arguments: &[&Path]| {
        let output = pinfold()
            .arg("mount")
            .args(arguments)
            .args(["--", "true"])
            .output()
            .unwrap();
        (output.status.code(), complaint(&output))
    };
    for (arguments, status, text) in [
        (
            vec![missing.as_path(), &place.mnt],
            1,
            "missing: no such directory",
        ),
        (
            vec![place.data.as_path(), &missing],
            1,
            "missing: no such mount point",
        ),
        (vec![file.as_path(), &place.mnt], 1, "file: not a directory"),
        (
            vec![place.data.as_path(), &file],
            1,
            "file: not a directory",
        ),
        (vec![place.data.as_path(), &place.data], 1, "lies inside"),
        (vec![place.base.path(), &place.mnt], 1, "lies inside"),
        (
            vec![Path::new("--memory=1K"), &place.data, &place.mnt],
            1,
            "below the minimum",
        ),
        (
            vec![Path::new("--memory=9999T"), &place.data, &place.mnt],
            1,
            "more than there is",
        ),
        (
            vec![Path::new("--memory=lots"), &place.data, &place.mnt],
            2,
            "is no size",
        ),
        (
            vec![Path::new("--threads=0"), &place.data, &place.mnt],
            2,
            "from 1 to 64",
        ),
        (vec![place.data.as_path()], 2, "MOUNTPOINT"),
    ] {
        let (code, complaint) = run(&arguments);
        assert_eq!(code, Some(status), "{arguments:?}: {complaint}");
        assert!(complaint.contains(text), "{arguments:?}: {complaint}");
    }
}

#[test]
fn missing_directories_are_made_on_request_and_the_mount_point_goes_again() {
    if !fuse() {
        return;
    }
    let base = tempfile::tempdir().unwrap();
    let output = pinfold()
        .args([
            "mount",
            "--mkdir",
            "data",
            "mnt",
            "--",
            "sh",
            "-c",
            "echo x > mnt/f",
        ])
        .current_dir(base.path())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", complaint(&output));
    assert_eq!(fs::read(base.path().join("data/f")).unwrap(), b"x\n");
    assert!(!base.path().join("mnt").exists());
}
