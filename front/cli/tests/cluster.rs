//! Several nodes on one directory as a user meets them: `pinfold mount --cluster`, `pinfold nodes`, `pinfold glocks`. Each test
//! starts an etcd of its own, on loopback.
//!
//! Where FUSE cannot be had, the tests that mount say so and pass. Longer runs: `PINFOLD_CLUSTER_ROUNDS` times the work.
#![cfg(feature = "etcd")]
#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "../../../crates/lock/tests/cluster/server.rs"]
#[allow(dead_code, reason = "others use the rest")]
mod server;

#[path = "cluster/flock.rs"]
mod flock;
#[path = "cluster/programs.rs"]
mod programs;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use server::Server;

/// How long anything may take, however busy the machine.
const LIMIT: Duration = Duration::from_secs(240);

fn rounds() -> usize {
    std::env::var("PINFOLD_CLUSTER_ROUNDS").map_or(1, |text| {
        text.parse().expect("PINFOLD_CLUSTER_ROUNDS is a number")
    })
}

/// An etcd, a directory, and where nodes mount it.
struct Place {
    server: Server,
    base: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let base = tempfile::tempdir().unwrap();
        for name in ["data", "one", "two"] {
            fs::create_dir(base.path().join(name)).unwrap();
        }
        Self {
            server: Server::start(),
            base,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.base.path().join(name)
    }

    fn url(&self) -> String {
        format!("etcd://{}/volume", self.server.endpoint())
    }

    fn pinfold(&self, arguments: &[&str]) -> Command {
        // Ends what hangs: the mount then goes with the server.
        let mut command = Command::new("timeout");
        command
            .args(["-k", "5", &LIMIT.as_secs().to_string()])
            .arg(env!("CARGO_BIN_EXE_pinfold"))
            .args(arguments)
            .env("PINFOLD_RUN_DIR", self.path("run"))
            .env_remove("PINFOLD_ETCD_PASSWORD");
        command
    }

    fn ask(&self, arguments: &[&str]) -> Output {
        self.pinfold(arguments).output().unwrap()
    }

    fn json(&self, tool: &str, of: &[&str]) -> Value {
        let output = self.ask(&[&[tool, "--json"], of].concat());
        assert!(output.status.success(), "{}", complaint(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Joins as `name` and mounts at the directory of that name; `None`, and says why, where FUSE cannot be had.
    fn mount(&self, name: &str, options: &[&str]) -> Option<Node> {
        let mnt = self.path(name);
        let mut child = Command::new(env!("CARGO_BIN_EXE_pinfold"))
            .args(["mount", "--memory", "16M", "--cluster", &self.url()])
            .args(["--node", name])
            .args(options)
            .args([self.path("data"), mnt.clone()])
            .env("PINFOLD_RUN_DIR", self.path("run"))
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let start = Instant::now();
        while !pinfold_fuse::is_mount_point(&mnt).unwrap() {
            assert!(start.elapsed() < LIMIT, "not mounted within {LIMIT:?}");
            if child.try_wait().unwrap().is_some() {
                let mut said = String::new();
                child
                    .stderr
                    .take()
                    .unwrap()
                    .read_to_string(&mut said)
                    .unwrap();
                assert!(said.contains("/dev/fuse"), "{said}");
                println!("skipped: {said}");
                return None;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Some(Node { child, mnt })
    }

    /// Two nodes that live, however little of a busy machine they get.
    fn two(&self) -> Option<[Node; 2]> {
        self.two_with(&[])
    }

    /// The same, that hand files over soon, for work that goes to and fro.
    fn two_lively(&self) -> Option<[Node; 2]> {
        self.two_with(&["--hold", "10"])
    }

    fn two_with(&self, options: &[&str]) -> Option<[Node; 2]> {
        let options = [&["--lease", "600"], options].concat();
        let one = self.mount("one", &options)?;
        let two = self.mount("two", &options)?;
        Some([one, two])
    }
}

/// A process that serves a mount.
struct Node {
    child: Child,
    mnt: PathBuf,
}

impl Node {
    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Ends it in good order.
    fn end(mut self) {
        self.signal(Signal::TERM);
        let status = self.child.wait().unwrap();
        let mut said = String::new();
        self.child
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut said)
            .unwrap();
        assert!(status.success(), "{status} {said}");
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Only a failed test leaves one.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = rustix::mount::unmount(&self.mnt, rustix::mount::UnmountFlags::DETACH);
    }
}

fn complaint(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn run(program: &str, arguments: &[&str], at: &Path) -> Output {
    let mut command = Command::new("timeout");
    command
        .args(["-k", "5", &LIMIT.as_secs().to_string(), program])
        .args(arguments)
        .current_dir(at);
    for (name, value) in [
        ("GIT_AUTHOR_NAME", "one"),
        ("GIT_AUTHOR_EMAIL", "one@example.org"),
        ("GIT_COMMITTER_NAME", "one"),
        ("GIT_COMMITTER_EMAIL", "one@example.org"),
        ("GIT_CONFIG_GLOBAL", "/dev/null"),
    ] {
        command.env(name, value);
    }
    command.output().unwrap()
}

fn must(program: &str, arguments: &[&str], at: &Path) -> String {
    let output = run(program, arguments, at);
    let said = complaint(&output);
    assert!(output.status.success(), "{program} {arguments:?}: {said}");
    String::from_utf8(output.stdout).unwrap()
}

fn is_there(program: &str) -> bool {
    let found = Command::new(program).arg("--version").output().is_ok();
    if !found {
        println!("skipped: {program} is not installed");
    }
    found
}

#[test]
fn what_one_mount_changes_the_other_has_at_once() {
    let place = Place::new();
    let Some(nodes) = place.two() else { return };
    let [one, two] = [&nodes[0].mnt, &nodes[1].mnt];
    for round in 0..10 * rounds() {
        let (here, there) = if round % 2 == 0 {
            (one, two)
        } else {
            (two, one)
        };
        let text = format!("round {round}");
        fs::write(here.join("text"), &text).unwrap();
        assert_eq!(fs::read_to_string(there.join("text")).unwrap(), text);
        assert_eq!(
            there.join("text").metadata().unwrap().len(),
            text.len() as u64
        );
        let name = format!("name{round}");
        fs::rename(there.join("text"), there.join(&name)).unwrap();
        assert!(!here.join("text").exists());
        // A size that this mount's kernel knew is none any more.
        fs::write(here.join(&name), "").unwrap();
        assert_eq!(there.join(&name).metadata().unwrap().len(), 0);
        fs::remove_file(there.join(&name)).unwrap();
        assert_eq!(fs::read_dir(here).unwrap().count(), 0);
    }
    // Files that stay open: no open and no close tells the kernel to look again.
    let kept = [one, two].map(|mnt| {
        let mut options = fs::OpenOptions::new();
        let file = options.read(true).write(true).create(true);
        file.open(mnt.join("kept")).unwrap()
    });
    for round in 0..20 {
        let [here, there] = [&kept[round % 2], &kept[(round + 1) % 2]];
        let byte = [b'a' + u8::try_from(round).unwrap()];
        here.write_all_at(&byte, 0).unwrap();
        let mut seen = [0];
        there.read_exact_at(&mut seen, 0).unwrap();
        assert_eq!(seen, byte);
    }
    drop(kept);
    nodes.into_iter().for_each(Node::end);
}

#[test]
fn t15_appenders_on_two_mounts_leave_every_record_whole() {
    let place = Place::new();
    let Some(nodes) = place.two() else { return };
    let count = 200 * rounds();
    let appender = |mnt: &Path, which: usize| {
        let mut options = fs::OpenOptions::new();
        let log = options.append(true).create(true).open(mnt.join("log"));
        let mut log = log.unwrap();
        for number in 0..count {
            let record = format!("{which}-{number:06}-{}\n", "x".repeat(which * 37));
            assert_eq!(log.write(record.as_bytes()).unwrap(), record.len());
        }
    };
    std::thread::scope(|scope| {
        for which in 0..4 {
            let mnt = &nodes[which % 2].mnt;
            scope.spawn(move || appender(mnt, which));
        }
    });
    for node in &nodes {
        let log = fs::read_to_string(node.mnt.join("log")).unwrap();
        let mut lines: Vec<&str> = log.lines().collect();
        assert_eq!(lines.len(), 4 * count);
        lines.sort_unstable();
        let mut expected: Vec<String> = (0..4)
            .flat_map(|which| {
                (0..count).map(move |n| format!("{which}-{n:06}-{}", "x".repeat(which * 37)))
            })
            .collect();
        expected.sort_unstable();
        assert_eq!(lines, expected);
    }
    nodes.into_iter().for_each(Node::end);
}

#[test]
fn t62_record_locks_hold_between_mounts() {
    let place = Place::new();
    let Some(nodes) = place.two() else { return };
    fs::write(nodes[0].mnt.join("sum"), "0").unwrap();
    let count = 100 * rounds();
    std::thread::scope(|scope| {
        for node in &nodes {
            scope.spawn(|| {
                // Of another file system each: locks of one process, and still two owners.
                let mut options = fs::OpenOptions::new();
                let file = options.read(true).write(true).open(node.mnt.join("sum"));
                let file = file.unwrap();
                for _ in 0..count {
                    rustix::fs::fcntl_lock(&file, FlockOperation::LockExclusive).unwrap();
                    let mut text = [0; 20];
                    let len = file.read_at(&mut text, 0).unwrap();
                    let sum: usize = std::str::from_utf8(&text[..len]).unwrap().parse().unwrap();
                    file.write_all_at((sum + 1).to_string().as_bytes(), 0)
                        .unwrap();
                    rustix::fs::fcntl_lock(&file, FlockOperation::Unlock).unwrap();
                }
            });
        }
    });
    let sum = fs::read_to_string(nodes[0].mnt.join("sum")).unwrap();
    assert_eq!(sum, (2 * count).to_string());
    // A close gives the process's locks back.
    let open = |node: &Node| {
        let mut options = fs::OpenOptions::new();
        let file = options.read(true).write(true);
        file.open(node.mnt.join("sum")).unwrap()
    };
    let (here, there) = (open(&nodes[0]), open(&nodes[1]));
    let try_exclusive = FlockOperation::NonBlockingLockExclusive;
    rustix::fs::fcntl_lock(&here, try_exclusive).unwrap();
    assert!(rustix::fs::fcntl_lock(&there, try_exclusive).is_err());
    drop(open(&nodes[0]));
    rustix::fs::fcntl_lock(&there, try_exclusive).unwrap();
    drop((here, there));
    nodes.into_iter().for_each(Node::end);
}

/// What a private mapping has not stored to is the kernel's page, which goes before another node may change the file.
#[test]
fn a_private_mapping_shows_what_the_other_mount_wrote() {
    const PROGRAM: &str = "
import mmap, sys
file = open('file', 'r+b')
private = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
assert private[:3] == b'old', private[:3]
print('mapped', flush=True)
sys.stdin.read()
assert private[:3] == b'new', private[:3]
";
    let place = Place::new();
    if !is_there("python3") {
        return;
    }
    let Some(nodes) = place.two() else { return };
    fs::write(nodes[0].mnt.join("file"), "old").unwrap();
    let mut program = Command::new("timeout")
        .args([&LIMIT.as_secs().to_string(), "python3", "-c", PROGRAM])
        .current_dir(&nodes[1].mnt)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = [0; 6];
    program
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut said)
        .unwrap();
    // Over what is there: a file that is empty for a moment is SIGBUS, as anywhere.
    let file = fs::OpenOptions::new()
        .write(true)
        .open(nodes[0].mnt.join("file"));
    file.unwrap().write_all_at(b"new", 0).unwrap();
    drop(program.stdin.take());
    assert!(program.wait().unwrap().success());
    nodes.into_iter().for_each(Node::end);
}

#[test]
fn git_commits_from_two_mounts_make_one_history() {
    let place = Place::new();
    if !is_there("git") {
        return;
    }
    let Some(nodes) = place.two() else { return };
    must("git", &["init", "-q", "repository"], &nodes[0].mnt);
    let count = 4 * rounds();
    for number in 0..count {
        let repository = nodes[number % 2].mnt.join("repository");
        fs::write(repository.join(format!("file{number}")), "text").unwrap();
        must("git", &["add", "."], &repository);
        must("git", &["commit", "-qm", "change"], &repository);
    }
    must("git", &["gc", "-q"], &nodes[1].mnt.join("repository"));
    for node in &nodes {
        let repository = node.mnt.join("repository");
        must("git", &["fsck", "--strict"], &repository);
        let history = must("git", &["log", "--oneline"], &repository);
        assert_eq!(history.lines().count(), count);
        assert_eq!(must("git", &["status", "--short"], &repository), "");
    }
    nodes.into_iter().for_each(Node::end);
}

#[test]
fn sqlite_writers_on_two_mounts_leave_the_database_whole() {
    sqlite_writers("delete");
}

/// The index of the log is memory that all who have the database open map.
#[test]
fn sqlite_writers_on_two_mounts_share_a_write_ahead_log() {
    sqlite_writers("wal");
}

fn sqlite_writers(journal: &str) {
    let place = Place::new();
    if !is_there("sqlite3") {
        return;
    }
    let Some(nodes) = place.two() else { return };
    let sql = |node: &Node, text: &str| {
        let wait = ["-bail", "-cmd", ".timeout 200000", "db", text];
        must("sqlite3", &wait, &node.mnt)
    };
    let mode = sql(&nodes[0], &format!("pragma journal_mode={journal}"));
    assert_eq!(mode.trim(), journal);
    sql(&nodes[0], "create table t(writer, number)");
    let count = 5 * rounds();
    std::thread::scope(|scope| {
        for writer in 0..4 {
            let node = &nodes[writer % 2];
            scope.spawn(move || {
                for number in 0..count {
                    sql(node, &format!("insert into t values({writer}, {number})"));
                }
            });
        }
    });
    for node in &nodes {
        assert_eq!(
            sql(node, "select count(*) from t").trim(),
            (4 * count).to_string()
        );
        assert_eq!(sql(node, "pragma integrity_check").trim(), "ok");
    }
    nodes.into_iter().for_each(Node::end);
}

#[test]
fn the_tools_tell_who_serves_and_who_holds() {
    let place = Place::new();
    let url = place.url();
    let Some(nodes) = place.two() else { return };
    fs::write(nodes[0].mnt.join("file"), "text").unwrap();
    let inode = fs::metadata(nodes[0].mnt.join("file")).unwrap();
    let inode = std::os::unix::fs::MetadataExt::ino(&inode);
    let told = place.json("nodes", &["--cluster", &url]);
    let names: Vec<&str> = told["nodes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|node| {
            assert_eq!(node["state"], "member");
            assert!(node["since"].as_u64().unwrap() > 0 && node["host"].is_string());
            assert_eq!(node["lease"]["seconds"], 600);
            node["name"].as_str().unwrap()
        })
        .collect();
    assert_eq!(names, ["one", "two"]);
    assert_eq!(told["nodes"][0]["pid"], nodes[0].child.id());

    let told = place.json("glocks", &["--cluster", &url]);
    let lock = |told: &Value| {
        let locks = told["locks"].as_array().unwrap().iter();
        let mut found = locks.filter(|lock| lock["inode"] == inode);
        found.next().expect("the file's lock is there").clone()
    };
    let claim = &lock(&told)["claims"][0];
    assert_eq!(
        (&claim["node"], &claim["mode"]),
        (&"one".into(), &"EX".into())
    );
    assert_eq!(claim["holds"], true);
    fs::read(nodes[1].mnt.join("file")).unwrap();
    let told = place.json("glocks", &["--cluster", &url]);
    let claims = lock(&told)["claims"].clone();
    let modes = claims
        .as_array()
        .unwrap()
        .iter()
        .map(|claim| &claim["mode"]);
    assert_eq!(modes.collect::<Vec<_>>(), ["SH", "SH"]);

    let mnt = nodes[1].mnt.to_str().unwrap().to_owned();
    let mnt = mnt.as_str();
    let told = place.json("glocks", &[mnt]);
    assert_eq!(
        (&told["node"], &told["withdrawn"]),
        (&"two".into(), &Value::Null)
    );
    let glocks = told["glocks"].as_array().unwrap();
    let glock = glocks.iter().find(|glock| glock["inode"] == inode).unwrap();
    assert_eq!(glock["mode"], "SH");
    let text = place.ask(&["glocks", mnt]);
    let text = String::from_utf8(text.stdout).unwrap();
    assert!(text.contains(&format!("G:  s:SH n:{inode:x}/")), "{text}");
    for tool in ["nodes", "glocks"] {
        let text = place.ask(&[tool, "--cluster", &url]);
        let text = String::from_utf8(text.stdout).unwrap();
        assert!(text.contains("one") && text.contains("two"), "{text}");
    }
    nodes.into_iter().for_each(Node::end);
    let told = place.json("nodes", &["--cluster", &url]);
    assert_eq!(told["nodes"], Value::Array(Vec::new()));
    let gone = place.ask(&["glocks", mnt]);
    assert!(
        complaint(&gone).contains("no node of a cluster"),
        "{}",
        complaint(&gone)
    );

    place.server.put("/pinfold/volume/lock/xyz", "1");
    for tool in ["nodes", "glocks"] {
        let output = place.ask(&[tool, "--cluster", &url]);
        assert_eq!(output.status.code(), Some(1));
        assert!(
            complaint(&output).contains("lock/xyz"),
            "{}",
            complaint(&output)
        );
    }
}

#[test]
fn what_cannot_work_is_told_at_the_start() {
    let place = Place::new();
    let url = place.url();
    let host = server::own_host();
    let nobody = format!("etcd://{host}:{}/v", server::free_port(host));
    let refused = |arguments: &[&str], why: &str| {
        for tool in ["mount", "nodes", "glocks"] {
            let (data, one) = (place.path("data"), place.path("one"));
            let dirs = [data.to_str().unwrap(), one.to_str().unwrap(), "--", "true"];
            let lease = ["--lease", "4"];
            let rest: &[&[&str]] = if tool == "mount" {
                &[&lease, &dirs]
            } else {
                &[]
            };
            let output = place.ask(&[&[tool], arguments, &rest.concat()].concat());
            let said = complaint(&output);
            assert_ne!(output.status.code(), Some(0), "{tool} {arguments:?}");
            assert!(said.contains(why), "{tool} {arguments:?}: {said}");
        }
    };
    refused(&["--cluster", &nobody], "no etcd server answers");
    refused(&["--cluster", "http://x/v"], "etcd://");
    refused(&["--cluster", "etcd://me:secret@x/v"], "--cluster-password");
    let user = url.replace("etcd://", "etcd://me@");
    refused(&["--cluster", &user], "no password for me");
    refused(
        &["--cluster", &user, "--cluster-password", "/nowhere"],
        "cannot read /nowhere",
    );
    place.server.put("/else/config", "x");
    refused(
        &["--cluster", &url, "--cluster-prefix", "/else"],
        "something else is kept in etcd under /else",
    );
    place.server.put("/newer/volume", "pinfold-lock 99 x");
    refused(
        &["--cluster", &url, "--cluster-prefix", "/newer"],
        "nodes of protocol 99",
    );
    for tool in ["nodes", "glocks"] {
        let output = place.ask(&[tool, "--cluster", &url]);
        let said = complaint(&output);
        assert!(said.contains("no node ever served it"), "{said}");
    }

    let Some(one) = place.mount("one", &["--lease", "600"]) else {
        return;
    };
    let try_mount = |node: &str, data: &str| {
        let (data, two) = (place.path(data), place.path("two"));
        let dirs = [data.to_str().unwrap(), two.to_str().unwrap(), "--", "true"];
        let output =
            place.ask(&[&["mount", "--cluster", &url, "--node", node], &dirs[..]].concat());
        (output.status.code(), complaint(&output))
    };
    let (status, said) = try_mount("one", "data");
    assert_eq!(status, Some(1));
    assert!(
        said.contains("a node called one is a member already"),
        "{said}"
    );
    fs::create_dir(place.path("other")).unwrap();
    let (status, said) = try_mount("two", "other");
    assert_eq!(status, Some(1));
    assert!(said.contains("belongs to the volume"), "{said}");
    let (status, said) = try_mount("a.b", "data");
    assert_eq!(status, Some(1));
    assert!(said.contains("cannot be a node's name"), "{said}");
    let alone = place.ask(&[
        "mount",
        place.path("data").to_str().unwrap(),
        place.path("two").to_str().unwrap(),
        "--",
        "true",
    ]);
    assert!(
        !alone.status.success(),
        "one that serves it alone beside a node"
    );
    assert_eq!(try_mount("two", "data").0, Some(0));
    one.end();
}

#[test]
fn t63_a_mount_that_is_no_member_any_more_answers_eio_and_ends() {
    let place = Place::new();
    let Some([mut one, two]) = place.two() else {
        return;
    };
    fs::write(one.mnt.join("file"), "text").unwrap();
    place.server.delete("/pinfold/volume/member/one");
    let start = Instant::now();
    let error = loop {
        match fs::read(one.mnt.join("file")) {
            Ok(_) => assert!(start.elapsed() < LIMIT, "it goes on"),
            Err(error) => break error,
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    assert_eq!(error.raw_os_error(), Some(5));
    assert!(fs::write(one.mnt.join("new"), "").is_err());
    let told = place.json("glocks", &[one.mnt.to_str().unwrap()]);
    assert!(told["withdrawn"].is_string(), "{told}");
    one.signal(Signal::TERM);
    assert!(!one.child.wait().unwrap().success());
    assert!(!pinfold_fuse::is_mount_point(&one.mnt).unwrap());
    two.end();
}

#[test]
fn t63_a_mount_that_stands_still_past_its_lease_is_killed_and_the_other_goes_on() {
    let place = Place::new();
    let Some(mut one) = place.mount("one", &["--lease", "8"]) else {
        return;
    };
    // Nobody waits for its grace.
    let options = ["--lease", "600", "--grace", "86400"];
    let two = place.mount("two", &options).unwrap();
    let stored = fs::File::create(one.mnt.join("file")).unwrap();
    stored.write_all_at(b"stored", 0).unwrap();
    stored.sync_all().unwrap();
    one.signal(Signal::STOP);
    assert_eq!(fs::read_to_string(two.mnt.join("file")).unwrap(), "stored");
    assert_eq!(one.child.wait().unwrap().code(), None, "killed");
    let told = place.json("glocks", &[two.mnt.to_str().unwrap()]);
    assert_eq!(told["fencing"]["killed"], 1);
    drop((stored, one));
    two.end();
}
