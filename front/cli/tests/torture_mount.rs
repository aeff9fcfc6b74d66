//! The scenario suite on a mount of ours, as on any file system of the kernel's: what it finds there is FUSE's own, known
//! and written down.
//!
//! A selection that takes seconds. `PINFOLD_SCENARIO_ONLY=all` runs everything, `PINFOLD_SCENARIO_ONLY=T13,T19` some.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends there")]

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use pinfold_scenarios::{ChildCommand, Plan, Tally, Target, report, runner, suite};
use rustix::process::{Pid, Signal, kill_process};

/// How long a server may take to begin or to end.
const LIMIT: Duration = Duration::from_secs(60);
/// What is quick everywhere.
const SHORT: &[&str] = &[
    "T01", "T02", "T03", "T04", "T05", "T06", "T07", "T11", "T12", "T16", "T17", "T18", "T21",
    "T22", "T25", "T26", "T27", "T28", "T30", "T31", "T32", "T35", "T40", "T41", "T43", "T48",
    "T49", "T53", "T57",
];

struct Server(Child, tempfile::TempDir);

impl Server {
    /// Serves a directory with 64 pages of memory; `None`, with the reason printed, where FUSE cannot be had.
    fn start() -> Option<Self> {
        let base = tempfile::tempdir().unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_pinfold"))
            .args(["mount", "--memory", "256K", "--mkdir"])
            .args([base.path().join("data"), base.path().join("mnt")])
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        let mut server = Self(child, base);
        let start = Instant::now();
        while !pinfold_fuse::is_mount_point(&server.mount_point()).unwrap_or(false) {
            if let Some(status) = server.0.try_wait().unwrap() {
                println!("skipped: the mount ended with {status}");
                return None;
            }
            assert!(start.elapsed() < LIMIT, "not mounted within {LIMIT:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
        Some(server)
    }

    fn mount_point(&self) -> std::path::PathBuf {
        self.1.path().join("mnt")
    }

    /// Ends it as a user would.
    fn stop(&mut self) {
        let pid = Pid::from_raw(i32::try_from(self.0.id()).unwrap()).unwrap();
        kill_process(pid, Signal::TERM).unwrap();
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                break status;
            }
            assert!(start.elapsed() < LIMIT, "still serves after {LIMIT:?}");
            std::thread::sleep(Duration::from_millis(10));
        };
        assert!(status.success(), "the server ended with {status}");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Only a failed test leaves anything.
        let _ = self.0.kill();
        let _ = self.0.wait();
        let _ = rustix::mount::unmount(self.mount_point(), rustix::mount::UnmountFlags::DETACH);
    }
}

fn plan(dir: &Path) -> Plan {
    let only = std::env::var("PINFOLD_SCENARIO_ONLY").unwrap_or_else(|_| SHORT.join(","));
    let scenarios = match only.as_str() {
        "all" => suite::all(),
        some => some
            .split(',')
            .map(|number| suite::find(number).expect("a scenario's number"))
            .collect(),
    };
    Plan {
        targets: vec![Target::kernel(dir)],
        scenarios,
        seed: 1,
        race: Duration::from_millis(300),
        silence_max: Plan::SILENCE_MAX,
        // The server needs its turns as well, on a machine that may have many others.
        patience: 6,
        child: ChildCommand {
            program: env!("CARGO_BIN_EXE_pinfold").into(),
            args: vec!["torture".into(), "--child".into()],
        },
        until: None,
    }
}

#[test]
fn the_suite_finds_only_known_divergences_on_a_mount() {
    let Some(mut server) = Server::start() else {
        return;
    };
    let dir = server.mount_point();
    let records = runner::run(&plan(&dir), &AtomicBool::new(false), &mut |_| {}).unwrap();
    println!("{}", report::table(&records));
    assert!(Tally::of(&records).is_good());
    assert!(
        records
            .iter()
            .any(|record| record.outcome.word() != "skipped")
    );
    let left = std::fs::read_dir(&dir).unwrap().count();
    assert_eq!(left, 0, "left behind on the mount");
    server.stop();
}
