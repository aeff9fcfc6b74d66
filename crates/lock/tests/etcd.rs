//! Nodes that share files through etcd; each test starts a server of its own, on loopback, in a temporary directory.
//! Needs the programs `etcd` and `etcdctl` (Debian: etcd-server, etcd-client).
#![cfg(all(feature = "etcd", not(loom)))]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends there")]

#[path = "cluster/cluster.rs"]
mod cluster;
#[path = "cluster/refused.rs"]
mod refused;
#[path = "cluster/server.rs"]
mod server;

use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use cluster::{Cache, Node, PATIENCE, Stored, name, node, operations, race};
use pinfold_base::Errno;
use pinfold_lock::Mode::{self, Deferred, Exclusive, Shared};
use pinfold_lock::service::etcd::{Etcd, Fence};
use pinfold_lock::{FenceCounts, Flags, Glock, Options, Refusal, Request, Space};
use server::{Cut, Server};

/// A volume whose nodes live, however little of a busy machine they get.
fn volume(server: &Server) -> Etcd {
    Etcd {
        lease: Duration::from_secs(600),
        grace: Duration::from_secs(1),
        ..Etcd::new(&[&server.endpoint()], "/test", "volume-1")
    }
}

/// The same for nodes that are to die.
fn mortal(server: &Server) -> Etcd {
    Etcd {
        lease: Duration::from_secs(8),
        ..volume(server)
    }
}

fn two_nodes(service: &Etcd) -> ([Node; 2], [Arc<Stored>; 1]) {
    let stored = [Arc::default()];
    ([0, 1].map(|which| node(service, which, &stored)), stored)
}

fn lock_later(
    glock: &Arc<Glock>,
    cache: &Arc<Cache>,
    mode: Mode,
) -> Receiver<Result<u64, Refusal>> {
    let (done, result) = channel();
    let (glock, cache) = (Arc::clone(glock), Arc::clone(cache));
    std::thread::spawn(move || {
        let guard = glock.lock(Request::new(mode));
        done.send(guard.map(|_guard| cache.read()))
    });
    result
}

fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < end, "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn t61_every_pair_of_modes_on_two_nodes() {
    let server = Server::start();
    for held in [Shared, Deferred, Exclusive] {
        for wanted in [Shared, Deferred, Exclusive] {
            let case = format!("{held:?}-{wanted:?}");
            let service = Etcd {
                prefix: format!("/test/{case}"),
                ..volume(&server)
            };
            let ([a, b], _stored) = two_nodes(&service);
            let (a_glock, _) = &a.files[0];
            let (b_glock, b_cache) = &b.files[0];
            let guard = a_glock.lock(Request::new(held)).unwrap();
            let together = held.compatible(wanted);

            let tried = b_glock.lock(Request::new(wanted).with(Flags::TRY));
            assert_eq!(tried.is_ok(), together, "{case}");
            drop(tried);
            if together {
                assert!(b_glock.token() > a_glock.token(), "{case}");
                continue;
            }
            let tried = b_glock.lock(Request::new(wanted).with(Flags::TRY_1CB));
            assert_eq!(tried.unwrap_err(), Refusal::TryFailed, "{case}");
            // The TRY before it called nobody, or there would be two.
            until("the owner is called", || {
                a_glock.report().counts.callbacks == 1
            });
            let granted = lock_later(b_glock, b_cache, wanted);
            drop(guard);
            assert_eq!(granted.recv_timeout(PATIENCE).unwrap(), Ok(0), "{case}");
            assert!(b_glock.token() > a_glock.token(), "{case}");
            let modes = (a_glock.mode(), b_glock.mode());
            assert!(modes.0.compatible(modes.1), "{case} {modes:?}");
        }
    }
}

#[test]
fn t61_nobody_sees_an_old_number_while_etcd_is_killed_and_started_again() {
    let mut server = Server::start();
    let service = volume(&server);
    let stored: Vec<Arc<Stored>> = (0..2).map(|_| Arc::default()).collect();
    let nodes: Vec<Node> = (0..3).map(|which| node(&service, which, &stored)).collect();
    let some = nodes[0].files[0].0.clone();
    race(nodes, &stored, operations(100), || {
        until("the race is on", || some.report().counts.queued > 20);
        server.kill();
        server.start_again();
    });
    assert_eq!(server.keys("/test/lock/"), Vec::<String>::new());
    assert_eq!(server.keys("/test/member/"), Vec::<String>::new());
}

#[test]
fn t61_nodes_that_wait_are_served_in_order() {
    let server = Server::start();
    let service = volume(&server);
    let stored = [Arc::default()];
    let nodes: Vec<Node> = (0..4).map(|which| node(&service, which, &stored)).collect();
    let first = nodes[0].files[0].0.lock(Request::new(Exclusive)).unwrap();
    let (done, order) = channel();
    for (which, node) in nodes.iter().enumerate().skip(1) {
        let glock = Arc::clone(&node.files[0].0);
        let done = done.clone();
        std::thread::spawn(move || {
            let _guard = glock.lock(Request::new(Exclusive)).unwrap();
            done.send(which)
        });
        until("its claim is made", || {
            server.keys("/test/lock/").len() == which + 1
        });
    }
    drop(first);
    let served: Vec<usize> = (0..3)
        .map(|_| order.recv_timeout(PATIENCE).expect("served"))
        .collect();
    assert_eq!(served, [1, 2, 3]);
}

#[test]
fn t61_a_cached_glock_sends_nothing() {
    let server = Server::start();
    let ([a, _b], _stored) = two_nodes(&volume(&server));
    let (glock, cache) = &a.files[0];
    drop(glock.lock(Request::new(Exclusive)).unwrap());
    let before = server.revision();
    for number in 0..1000 {
        let _guard = glock.lock(Request::new(Exclusive)).unwrap();
        cache.write(number);
    }
    assert_eq!(server.revision(), before);
    assert_eq!(glock.report().counts.asked, 1);
}

#[test]
fn t63_a_node_that_is_cut_off_stops_before_another_has_its_lock() {
    let server = Server::start();
    let cut = Cut::before(&server);
    let service = volume(&server);
    let stored = [Arc::default()];
    let a = node(
        &Etcd {
            endpoints: vec![cut.endpoint()],
            ..mortal(&server)
        },
        0,
        &stored,
    );
    let b = node(&service, 1, &stored);
    let (a_glock, a_cache) = &a.files[0];
    let (b_glock, b_cache) = &b.files[0];
    let guard = a_glock.lock(Request::new(Exclusive)).unwrap();
    a_cache.write(7);
    cut.cut();
    let granted = lock_later(b_glock, b_cache, Exclusive);
    until("it stops", || a.space.check().is_err());
    assert_eq!(a.space.check(), Err(Errno::EIO));
    drop(guard);
    let refused = a_glock.lock(Request::new(Shared));
    assert_eq!(refused.unwrap_err(), Refusal::Failed(Errno::EIO));
    // What was not stored is lost with it.
    assert_eq!(granted.recv_timeout(PATIENCE).unwrap(), Ok(0));
    assert!(b_glock.token() > a_glock.token());
    // Whatever it sends when it is back changes nothing.
    cut.mend();
    assert_eq!(server.keys("/test/lock/").len(), 1);
    assert_eq!(b_glock.mode(), Exclusive);
    assert_eq!(b.space.check(), Ok(()));
}

#[test]
fn t63_the_claims_of_the_dead_stay_until_the_lease_and_the_grace_are_over() {
    let server = Server::start();
    let stored = [Arc::default()];
    let a = node(&mortal(&server), 0, &stored);
    let b = node(&volume(&server), 1, &stored);
    drop(a.files[0].0.lock(Request::new(Exclusive)).unwrap());
    let (b_glock, b_cache) = &b.files[0];
    // Dies without a word.
    drop(a);
    let granted = lock_later(b_glock, b_cache, Exclusive);
    until("its lease ends", || server.keys("/test/member/").len() == 1);
    // The name is free again, but what the first of that name held is not.
    assert_eq!(granted.recv_timeout(PATIENCE).unwrap(), Ok(0));
    until("only the living have claims", || {
        server.keys("/test/lock/").len() == 1
    });
}

#[test]
fn t63_whoever_comes_after_everybody_died_takes_over() {
    let server = Server::start();
    {
        let ([a, b], _stored) = two_nodes(&mortal(&server));
        for node in [&a, &b] {
            drop(node.files[0].0.lock(Request::new(Shared)).unwrap());
        }
    }
    let stored = [Arc::default()];
    let late = node(&volume(&server), 2, &stored);
    let (glock, cache) = &late.files[0];
    let granted = lock_later(glock, cache, Exclusive);
    assert_eq!(granted.recv_timeout(PATIENCE).unwrap(), Ok(0));
}

#[test]
fn a_node_that_leaves_keeps_nobody_waiting() {
    let server = Server::start();
    let service = Etcd {
        // Nobody may have to wait for it, nor for the lease.
        grace: Duration::from_secs(600),
        ..volume(&server)
    };
    let ([a, b], _stored) = two_nodes(&service);
    let (glock, cache) = a.files[0].clone();
    {
        let _guard = glock.lock(Request::new(Exclusive)).unwrap();
        cache.write(5);
    }
    a.space.leave(PATIENCE).unwrap();
    let granted = lock_later(&b.files[0].0, &b.files[0].1, Exclusive);
    assert_eq!(granted.recv_timeout(PATIENCE).unwrap(), Ok(5));
    // Its name is free at once.
    let again = Space::join(&service, "node0", Options::default()).unwrap();
    again.leave(PATIENCE).unwrap();
}

/// By count: what is on the way from one node to the other is a claim, which is the call, and a fall, which is the grant.
#[test]
fn t61_a_hand_over_is_two_transactions_and_no_reading() {
    let server = Server::start();
    let ([a, b], _stored) = two_nodes(&volume(&server));
    let glocks = [&a.files[0].0, &b.files[0].0];
    for glock in glocks {
        drop(glock.lock(Request::new(Exclusive)).unwrap());
    }
    let said = || {
        let [a, b] = [&a, &b].map(|node| node.space.traffic());
        (a.changes + b.changes, a.reads + b.reads)
    };
    let hand_overs = || {
        let before = said();
        for turn in 0..20 {
            drop(glocks[turn % 2].lock(Request::new(Exclusive)).unwrap());
        }
        let after = said();
        (after.0 - before.0, after.1 - before.1)
    };
    // At first each finds out what was there before; and what a busy machine answers late is sent again.
    let least = (0..5).map(|_| hand_overs()).min();
    assert_eq!(least, Some((40, 0)));
    until("each change is told once to each", || {
        [&a, &b]
            .iter()
            .all(|node| node.space.traffic().told >= 4 * 40)
    });
}

#[test]
fn t63_no_lock_of_the_dead_is_given_before_the_grace() {
    let server = Server::start();
    let patient = Etcd {
        grace: Duration::from_secs(3600),
        ..volume(&server)
    };
    let stored: Vec<Arc<Stored>> = (0..2).map(|_| Arc::default()).collect();
    let a = node(&mortal(&server), 0, &stored);
    let b = node(&patient, 1, &stored);
    drop(a.files[0].0.lock(Request::new(Exclusive)).unwrap());
    let claims = server.keys("/test/lock/");
    drop(a);
    until("its lease ends", || server.keys("/test/member/").len() == 1);
    // The survivor has heard of it by now, or hears of it before what it hears of next.
    let (other, _) = &b.files[1];
    for flags in [Flags::NOCACHE, Flags::NONE] {
        drop(other.lock(Request::new(Exclusive).with(flags)).unwrap());
    }
    // Nor does one get it who was not there.
    let late = node(&patient, 2, &stored);
    for node in [&b, &late] {
        let tried = node.files[0].0.lock(Request::new(Shared).with(Flags::TRY));
        assert_eq!(tried.unwrap_err(), Refusal::TryFailed);
    }
    assert!(server.keys("/test/lock/").contains(&claims[0]));
}

/// A fence command that notes its beginning, waits for `go`, notes its end, and ends with `status`.
struct Script {
    directory: tempfile::TempDir,
}

impl Script {
    fn new(status: u8) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let text = format!(
            "#!/bin/sh\ncd {}\necho $$ > pid\necho begin $1 >> said\n\
             until [ -e go ]; do sleep 0.05; done\necho end $1 >> said\nexit {status}\n",
            directory.path().display()
        );
        // Made by another process: what this one has open for writing, a child of another test may have inherited.
        let made = std::process::Command::new("sh")
            .args(["-c", "printf %s \"$1\" > \"$0\" && chmod 700 \"$0\""])
            .arg(directory.path().join("fence"))
            .arg(text)
            .status();
        assert!(made.unwrap().success());
        Self { directory }
    }

    fn fence(&self) -> Option<Fence> {
        Some(Fence {
            limit: PATIENCE,
            ..Fence::new(self.directory.path().join("fence"))
        })
    }

    fn go(&self) {
        std::fs::write(self.directory.path().join("go"), "").unwrap();
    }

    fn said(&self) -> Vec<String> {
        let text = std::fs::read_to_string(self.directory.path().join("said")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }
}

fn sum(nodes: &[&Node], count: impl Fn(FenceCounts) -> u64) -> u64 {
    nodes.iter().map(|node| count(node.space.fencing())).sum()
}

/// H-13.
#[test]
fn h13_t63_a_fence_command_comes_before_the_grant_and_is_run_once() {
    let server = Server::start();
    let script = Script::new(0);
    let stored = [Arc::default()];
    let survivor = Etcd {
        // Whoever has the lock of the dead before this is over has it because of the command.
        grace: Duration::from_secs(3600),
        fence: script.fence(),
        ..volume(&server)
    };
    let a = node(&mortal(&server), 0, &stored);
    let b = node(&survivor, 1, &stored);
    let c = node(&survivor, 2, &stored);
    drop(a.files[0].0.lock(Request::new(Exclusive)).unwrap());
    // Dies without a word; its process lives, and is not stopped.
    drop(a);
    let granted = lock_later(&b.files[0].0, &b.files[0].1, Exclusive);
    until("the command runs", || !script.said().is_empty());
    // Both survivors have heard of it by now, or hear of it before this is answered.
    let tried = c.files[0].0.lock(Request::new(Shared).with(Flags::TRY));
    assert_eq!(tried.unwrap_err(), Refusal::TryFailed);
    assert!(granted.try_recv().is_err(), "before the fence");
    script.go();
    assert_eq!(granted.recv_timeout(PATIENCE).unwrap(), Ok(0));
    assert_eq!(script.said(), ["begin node0", "end node0"]);
    assert_eq!(sum(&[&b, &c], |counts| counts.fenced), 1);
    assert_eq!(sum(&[&b, &c], |counts| counts.failed + counts.waited), 0);
    until("its turn is over", || {
        server.keys("/test/fence/").is_empty() && server.keys("/test/node/").len() == 2
    });
}

/// A node that has got the lock of one that died without a word, after the grace.
fn heir(server: &Server, script: &Script) -> Node {
    let stored = [Arc::default()];
    let survivor = Etcd {
        fence: script.fence(),
        ..volume(server)
    };
    let a = node(&mortal(server), 0, &stored);
    let b = node(&survivor, 1, &stored);
    drop(a.files[0].0.lock(Request::new(Exclusive)).unwrap());
    drop(a);
    let granted = lock_later(&b.files[0].0, &b.files[0].1, Exclusive);
    assert_eq!(granted.recv_timeout(PATIENCE).unwrap(), Ok(0));
    b
}

#[test]
fn t63_a_fence_command_that_fails_leaves_the_lease_and_the_grace() {
    let server = Server::start();
    let script = Script::new(1);
    script.go();
    let b = heir(&server, &script);
    until("it is counted", || {
        let counts = b.space.fencing();
        (counts.fenced, counts.failed, counts.waited) == (0, 1, 1)
    });
    assert_eq!(script.said(), ["begin node0", "end node0"]);
}

#[test]
fn t63_nobody_waits_longer_than_the_grace_for_a_fence_command() {
    let server = Server::start();
    let script = Script::new(0);
    let b = heir(&server, &script);
    until("it is b's turn", || {
        !script.said().is_empty() && server.keys("/test/fence/").len() == 1
    });
    // A node that leaves takes its command with it: none runs beside one that a survivor begins then.
    drop(b.files);
    b.space.leave(PATIENCE).unwrap();
    assert_eq!(server.keys("/test/fence/"), Vec::<String>::new());
    let pid = std::fs::read_to_string(script.directory.path().join("pid")).unwrap();
    until("its command is gone", || {
        !std::path::Path::new("/proc").join(pid.trim()).exists()
    });
    script.go();
    assert_eq!(script.said(), ["begin node0"]);
}

/// A node of a process of its own, for the test below.
#[test]
#[ignore = "run by another test"]
fn a_node_of_its_own_process() {
    let endpoint = std::env::var("PINFOLD_TEST_ETCD").unwrap();
    let service = Etcd {
        lease: Duration::from_secs(8),
        ..Etcd::new(&[&endpoint], "/test", "volume-1")
    };
    let node = node(&service, 0, &[Arc::default()]);
    let _guard = node.files[0].0.lock(Request::new(Exclusive)).unwrap();
    // Until it is killed, by the survivor or by the test.
    std::thread::sleep(PATIENCE * 2);
}

#[test]
fn t63_a_stopped_process_is_killed_before_its_locks_are_taken() {
    let server = Server::start();
    let survivor = Etcd {
        grace: Duration::from_secs(3600),
        ..volume(&server)
    };
    for stops in [true, false] {
        let child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_node_of_its_own_process", "--ignored"])
            .env("PINFOLD_TEST_ETCD", server.endpoint())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let mut child = Ended(child);
        until("it has the lock", || {
            assert!(child.0.try_wait().unwrap().is_none(), "it failed");
            server.keys("/test/lock/").len() == 1
        });
        let b = node(&survivor, 1, &[Arc::default()]);
        let pid = rustix::process::Pid::from_child(&child.0);
        let signal = if stops {
            rustix::process::Signal::STOP
        } else {
            rustix::process::Signal::KILL
        };
        rustix::process::kill_process(pid, signal).unwrap();
        let granted = lock_later(&b.files[0].0, &b.files[0].1, Exclusive);
        assert_eq!(granted.recv_timeout(PATIENCE).unwrap(), Ok(0));
        let expected = FenceCounts {
            killed: u64::from(stops),
            gone: u64::from(!stops),
            ..FenceCounts::default()
        };
        assert_eq!(b.space.fencing(), expected);
        assert!(child.0.wait().unwrap().code().is_none(), "killed");
        drop(b.files);
        b.space.leave(PATIENCE).unwrap();
    }
}

/// A child that does not outlive its test.
struct Ended(std::process::Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_survey_tells_who_holds_what_and_who_waits_for_whom() {
    let server = Server::start();
    let service = volume(&server);
    let nothing = Etcd {
        prefix: "/nothing".to_owned(),
        ..service.clone()
    };
    let error = nothing.survey().unwrap_err();
    assert_eq!(error.errno, Errno::ENOENT);
    assert!(error.to_string().contains("/nothing"), "{error}");
    server.put("/else/config", "x");
    let other = Etcd {
        prefix: "/else".to_owned(),
        ..service.clone()
    };
    assert_eq!(other.survey().unwrap_err().errno, Errno::EUCLEAN);
    server.put("/new/volume", "pinfold-lock 3 volume-1");
    let newer = Etcd {
        prefix: "/new".to_owned(),
        ..service.clone()
    };
    assert_eq!(newer.survey().unwrap_err().errno, Errno::EOPNOTSUPP);

    let stored: Vec<Arc<Stored>> = (0..2).map(|_| Arc::default()).collect();
    let nodes: Vec<Node> = (0..3).map(|which| node(&service, which, &stored)).collect();
    let guard = nodes[0].files[0].0.lock(Request::new(Shared)).unwrap();
    let queued: Vec<_> = [1, 2]
        .map(|which: usize| {
            let mode = [Shared, Exclusive, Shared][which];
            let granted = lock_later(&nodes[which].files[0].0, &nodes[which].files[0].1, mode);
            until("its claim is made", || {
                server.keys("/test/lock/1.0/").len() == which + 1
            });
            granted
        })
        .into();
    let survey = service.survey().unwrap();
    assert_eq!(survey.volume, "volume-1");
    assert_eq!(survey.strange, Vec::<String>::new());
    let told: Vec<(String, bool, usize, usize)> = survey
        .nodes
        .iter()
        .map(|node| (node.name.clone(), node.alive, node.holds, node.waits))
        .collect();
    let expected = [("node0", 1, 0), ("node1", 0, 1), ("node2", 0, 1)];
    let expected = expected.map(|(name, holds, waits)| (name.to_owned(), true, holds, waits));
    assert_eq!(told, expected);
    for node in &survey.nodes {
        assert_eq!(node.pid, Some(std::process::id()));
        let lease = node.lease.unwrap();
        assert_eq!(lease.granted, service.lease);
        assert!(lease.left <= service.lease && node.since.is_some());
    }
    assert_eq!(survey.locks.len(), 1);
    let lock = &survey.locks[0];
    assert_eq!(lock.name, name(1));
    let claims: Vec<(&str, Mode, Vec<usize>)> = lock
        .claims
        .iter()
        .map(|claim| (claim.node.as_str(), claim.mode, claim.behind.clone()))
        .collect();
    // The reader waits for the writer before it, not for the reader that holds.
    assert_eq!(
        claims,
        [
            ("node0", Shared, vec![]),
            ("node1", Exclusive, vec![0]),
            ("node2", Shared, vec![1])
        ]
    );
    assert_eq!(lock.claims[0].token, nodes[0].files[0].0.token().0);
    drop(guard);
    for granted in queued {
        assert_eq!(granted.recv_timeout(PATIENCE).unwrap(), Ok(0));
    }
    drop(nodes);
    until("all leases are gone or dead", || {
        server.delete_all("/test/member/");
        let survey = service.survey().unwrap();
        survey.nodes.iter().all(|node| !node.alive)
    });
    server.put("/test/lock/xyz", "1");
    server.put("/test/lock/3.0/node.1", "everything");
    let survey = service.survey().unwrap();
    assert_eq!(survey.strange, ["/test/lock/3.0/node.1", "/test/lock/xyz"]);
}
