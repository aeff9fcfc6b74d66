//! Node processes at work, with every fault; longer by `PINFOLD_HISTORY_SECONDS`.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends there")]

use std::path::{Path, PathBuf};
use std::time::Duration;

use pinfold_histories::Layout;
use pinfold_histories::node::Mix;
use pinfold_histories::place::{Memory, Spec};
use pinfold_histories::run::{Fault, Options, Report, run};

fn options(place: Spec, nodes: usize, faults: &[Fault], seconds: u64) -> Options {
    let asked = std::env::var("PINFOLD_HISTORY_SECONDS").ok();
    let seconds = asked.and_then(|text| text.parse().ok()).unwrap_or(seconds);
    Options {
        layout: Layout {
            files: 2,
            pages: 6,
            whole: place.has_whole_pages(),
        },
        place,
        dir: PathBuf::new(),
        nodes,
        threads: 2,
        calls: 200_000,
        time: Duration::from_secs(seconds),
        seed: 1,
        faults: faults.to_vec(),
        every: Duration::from_millis(1500),
        members: 1,
        mix: Mix {
            burst: 4,
            ..Mix::default()
        },
        namespaces: false,
        elsewhere: false,
        mounts: Vec::new(),
        logs: None,
        program: env!("CARGO_BIN_EXE_pinfold-histories").into(),
        pinfold: Path::new(env!("CARGO_BIN_EXE_pinfold-histories")).with_file_name("pinfold"),
    }
}

/// Runs it, and says what came of it.
fn check(options: Options) -> Report {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path().join("files");
    let report = run(&Options { dir, ..options }).unwrap();
    println!("{report:#?}");
    let first = report.verdict.violations.first();
    let first = first.map(ToString::to_string).unwrap_or_default();
    assert!(report.verdict.is_good(), "{first}");
    report
}

#[test]
fn processes_on_one_kernel_mount_are_linearizable_whoever_is_killed() {
    let report = check(options(Spec::Kernel, 3, &[Fault::Kill], 4));
    assert_eq!(report.withdrawn, 0, "{:?}", report.reasons);
}

fn volume(inline: bool, faults: &[Fault]) -> Options {
    let memory = Memory {
        bytes: 1 << 20,
        inline,
    };
    let mut options = options(Spec::Volume(memory), 1, faults, 4);
    options.threads = 4;
    options
}

#[test]
fn threads_on_one_volume_are_linearizable() {
    for inline in [false, true] {
        let report = check(volume(inline, &[]));
        assert_eq!(report.withdrawn, 0, "{:?}", report.reasons);
    }
}

#[test]
fn a_volume_that_is_killed_keeps_what_was_synced() {
    let report = check(volume(false, &[Fault::Kill]));
    assert_eq!(report.withdrawn, 0, "{:?}", report.reasons);
}

#[cfg(feature = "etcd")]
mod etcd {
    use super::*;
    use pinfold_histories::namespace::{Namespace, may_be_elsewhere};
    use pinfold_histories::place::Service;
    use pinfold_histories::place::locked::Plant;

    fn service() -> Service {
        Service {
            lease_ms: 3000,
            grace_ms: 500,
            hold_ms: 10,
            ..Service::default()
        }
    }

    fn locked(faults: &[Fault]) -> Options {
        let place = Spec::Locked {
            service: service(),
            plant: Plant::Nothing,
        };
        options(place, 3, faults, 12)
    }

    fn shared(faults: &[Fault]) -> Options {
        let memory = Memory {
            bytes: 1 << 20,
            inline: false,
        };
        let place = Spec::Shared {
            service: service(),
            memory,
        };
        options(place, 3, faults, 12)
    }

    /// Nodes that are mounts; `None`, and says why, where there can be none.
    fn mounted(faults: &[Fault]) -> Option<Options> {
        let memory = Memory {
            bytes: 4 << 20,
            inline: false,
        };
        let place = Spec::Mounted {
            service: service(),
            memory,
        };
        let options = options(place, 3, faults, 12);
        // Nobody answers there; what cannot speak with etcd says so first.
        let asked = std::process::Command::new(&options.pinfold)
            .args(["nodes", "--cluster", "etcd://127.0.0.1:1/none"])
            .output();
        let why = match asked {
            _ if !rustix::process::geteuid().is_root() => "not root".to_owned(),
            _ if !Path::new("/dev/fuse").exists() => "no /dev/fuse".to_owned(),
            Err(error) => format!("{}: {error}", options.pinfold.display()),
            Ok(said) if String::from_utf8_lossy(&said.stderr).contains("--features etcd") => {
                format!("{} is built without etcd", options.pinfold.display())
            }
            Ok(_) => return Some(options),
        };
        println!("skipped: {why}");
        None
    }

    /// Each fault came at least once: the run goes on until then.
    fn saw(report: &Report, faults: &[&str]) {
        for fault in faults {
            assert!(report.faults.contains_key(fault), "{:?}", report.faults);
        }
    }

    #[test]
    fn t63_locked_files_stay_linearizable_while_nodes_are_killed_stopped_and_cut_off() {
        let faults = [Fault::Kill, Fault::Pause, Fault::Cut];
        let report = check(locked(&faults));
        saw(
            &report,
            &["kill", "pause past the lease", "cut past the lease"],
        );
    }

    #[test]
    fn t63_locked_files_stay_linearizable_while_etcd_is_restarted() {
        let report = check(locked(&[Fault::Restart]));
        saw(&report, &["etcd restarted"]);
    }

    #[test]
    fn t63_locked_files_stay_linearizable_while_one_of_three_members_is_lost() {
        let mut options = locked(&[Fault::Member]);
        options.members = 3;
        let report = check(options);
        saw(&report, &["member of etcd lost"]);
    }

    #[test]
    fn t63_nothing_is_written_late_by_nodes_whose_packets_vanish() {
        if let Err(why) = Namespace::new() {
            println!("skipped: no network namespaces here: {why:#}");
            return;
        }
        let mut options = locked(&[Fault::Cut]);
        options.namespaces = true;
        let report = check(options);
        saw(&report, &["cut past the lease"]);
    }

    #[test]
    fn t63_nothing_old_is_used_by_nodes_that_stood_still_on_another_machine() {
        if !may_be_elsewhere() {
            println!("skipped: no time namespaces here");
            return;
        }
        let mut options = locked(&[Fault::Pause]);
        options.elsewhere = true;
        let report = check(options);
        saw(&report, &["pause past the lease"]);
    }

    #[test]
    fn t63_mounts_stay_linearizable_while_daemons_are_killed_stopped_and_cut_off_and_etcd_is_restarted()
     {
        let faults = [Fault::Kill, Fault::Pause, Fault::Cut, Fault::Restart];
        let Some(options) = mounted(&faults) else {
            return;
        };
        let report = check(options);
        saw(
            &report,
            &[
                "kill",
                "pause past the lease",
                "cut past the lease",
                "etcd restarted",
            ],
        );
        assert!(report.verdict.calls > 0);
    }

    #[test]
    fn t62_volumes_of_several_processes_are_linearizable() {
        let report = check(shared(&[]));
        assert!(report.verdict.calls > 0);
    }

    #[test]
    fn t63_volumes_of_several_processes_stay_linearizable_while_nodes_are_killed_stopped_and_cut_off()
     {
        let faults = [Fault::Kill, Fault::Pause, Fault::Cut];
        let report = check(shared(&faults));
        saw(
            &report,
            &["kill", "pause past the lease", "cut past the lease"],
        );
    }
}
