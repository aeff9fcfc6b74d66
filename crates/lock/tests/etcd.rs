//! Nodes that share files through etcd; each test starts a server of its own, on loopback, in a temporary directory.
//! Needs the programs `etcd` and `etcdctl` (Debian: etcd-server, etcd-client).
#![cfg(all(feature = "etcd", not(loom)))]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends there")]

#[path = "cluster/cluster.rs"]
mod cluster;
#[path = "cluster/server.rs"]
mod server;

use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use cluster::{Cache, Node, PATIENCE, Stored, name, node, operations, race};
use pinfold_base::Errno;
use pinfold_lock::Mode::{self, Deferred, Exclusive, Shared};
use pinfold_lock::service::etcd::{Etcd, Tls};
use pinfold_lock::{Flags, Glock, Options, Refusal, Request, Space};
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

fn until(what: &str, condition: impl Fn() -> bool) {
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

fn refusal(service: &Etcd, member: &str) -> (Errno, String) {
    let error = Space::join(service, member, Options::default()).unwrap_err();
    (error.errno, error.to_string())
}

#[test]
fn what_cannot_work_is_told_at_the_start() {
    let server = Server::start();
    let good = volume(&server);
    let _first = Space::join(&good, "first", Options::default()).unwrap();

    let (errno, why) = refusal(&good, "first");
    assert_eq!(errno, Errno::EEXIST);
    assert!(
        why.contains(&format!("process {}", std::process::id())),
        "{why}"
    );

    let other = Etcd {
        volume: "volume-2".to_owned(),
        ..good.clone()
    };
    let (errno, why) = refusal(&other, "second");
    assert_eq!(errno, Errno::EXDEV);
    assert!(
        why.contains("volume-1") && why.contains("volume-2"),
        "{why}"
    );

    for (prefix, key, value, expected) in [
        ("/else", "/else/config", "x", Errno::EUCLEAN),
        ("/odd", "/odd/volume", "hello", Errno::EUCLEAN),
        (
            "/new",
            "/new/volume",
            "pinfold-lock 2 volume-1",
            Errno::EOPNOTSUPP,
        ),
        (
            "/old",
            "/old/volume",
            "pinfold-lock 0 volume-1",
            Errno::EOPNOTSUPP,
        ),
    ] {
        server.put(key, value);
        let service = Etcd {
            prefix: prefix.to_owned(),
            ..good.clone()
        };
        let (errno, why) = refusal(&service, "second");
        assert_eq!(errno, expected, "{prefix} {why}");
        assert!(why.contains(prefix), "{why}");
    }
    server.put("/bad/volume", "pinfold-lock 1 volume-1");
    server.put("/bad/lock/12/what", "");
    let bad = Etcd {
        prefix: "/bad".to_owned(),
        ..good.clone()
    };
    assert_eq!(refusal(&bad, "second").0, Errno::EUCLEAN);
    // Who was refused leaves nothing behind.
    assert_eq!(server.keys("/test/member/"), ["/test/member/first"]);

    for member in ["", "a.b", "a/b", "a b", &"x".repeat(65)] {
        assert_eq!(refusal(&good, member).0, Errno::EINVAL, "{member}");
    }
}

#[test]
fn no_server_is_told_at_the_start() {
    let host = server::own_host();
    let nobody = server::free_port(host);
    let service = Etcd {
        lease: Duration::from_secs(4),
        ..Etcd::new(&[&format!("{host}:{nobody}")], "/test", "volume-1")
    };
    let (errno, why) = refusal(&service, "one");
    assert_eq!(errno, Errno::ENOTCONN);
    assert!(why.contains("no etcd server answers"), "{why}");
    // One that takes connections and says nothing.
    let mute = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let service = Etcd {
        endpoints: vec![mute.local_addr().unwrap().to_string()],
        ..service
    };
    assert_eq!(refusal(&service, "one").0, Errno::ENOTCONN);
}

#[test]
fn what_others_do_to_our_keys_makes_the_node_withdraw() {
    let server = Server::start();
    for (case, expected) in [
        ("garbage", Errno::EUCLEAN),
        ("garbled", Errno::EUCLEAN),
        ("robbed", Errno::ENOTCONN),
        ("expelled", Errno::ENOTCONN),
        ("renamed", Errno::EUCLEAN),
    ] {
        let service = Etcd {
            prefix: format!("/{case}"),
            ..volume(&server)
        };
        let stored = [Arc::default()];
        let node = node(&service, 0, &stored);
        drop(node.files[0].0.lock(Request::new(Exclusive)).unwrap());
        let claim = server.keys(&format!("/{case}/lock/")).remove(0);
        match case {
            "garbage" => server.put("/garbage/lock/xyz", "1"),
            "garbled" => server.put("/garbled/lock/1.0/other.12", "everything"),
            "robbed" => server.delete(&claim),
            "expelled" => server.delete("/expelled/member/node0"),
            _ => server.put("/renamed/volume", "pinfold-lock 1 another"),
        }
        until(case, || node.space.check().is_err());
        assert_eq!(node.space.check(), Err(expected), "{case}");
        let refused = node.files[0].0.lock(Request::new(Shared));
        assert_eq!(refused.unwrap_err(), Refusal::Failed(Errno::EIO), "{case}");
    }
}

#[test]
fn a_claim_that_was_left_by_a_late_message_is_taken_back() {
    let server = Server::start();
    let service = volume(&server);
    let ([a, b], _stored) = two_nodes(&service);
    let (glock, cache) = &b.files[0];
    drop(glock.lock(Request::new(Exclusive)).unwrap());
    let claim = server.keys("/test/lock/").remove(0);
    b.space.retire(glock);
    until("it is given up", || server.keys("/test/lock/").is_empty());
    server.put(&claim, "EX queue 1");
    let (a_glock, a_cache) = &a.files[0];
    let granted = lock_later(a_glock, a_cache, Exclusive);
    assert_eq!(granted.recv_timeout(PATIENCE).unwrap(), Ok(0));
    let granted = lock_later(glock, cache, Exclusive);
    assert_eq!(granted.recv_timeout(PATIENCE).unwrap(), Ok(0));
    assert_eq!(name(1), glock.name());
}

#[test]
fn a_user_needs_the_right_password() {
    let server = Server::start();
    server.require_user("root", "secret");
    let anonymous = volume(&server);
    assert_eq!(refusal(&anonymous, "one").0, Errno::EACCES);
    let wrong = Etcd {
        user: Some(("root".to_owned(), "guess".to_owned())),
        ..anonymous.clone()
    };
    assert_eq!(refusal(&wrong, "one").0, Errno::EACCES);
    let right = Etcd {
        user: Some(("root".to_owned(), "secret".to_owned())),
        ..anonymous
    };
    let ([a, b], _stored) = two_nodes(&right);
    drop(a.files[0].0.lock(Request::new(Exclusive)).unwrap());
    let granted = lock_later(&b.files[0].0, &b.files[0].1, Shared);
    assert_eq!(granted.recv_timeout(PATIENCE).unwrap(), Ok(0));
}

#[test]
fn a_user_that_loses_its_rights_makes_the_node_withdraw() {
    let server = Server::start();
    server.add_user("node", "secret", "/test/");
    server.require_user("root", "secret");
    let service = Etcd {
        user: Some(("node".to_owned(), "secret".to_owned())),
        ..volume(&server)
    };
    let stored = [Arc::default()];
    let node = node(&service, 0, &stored);
    let (glock, _) = &node.files[0];
    drop(glock.lock(Request::new(Exclusive)).unwrap());
    server.revoke("node", "/test/");
    // The cached lock asks nobody; what has to be asked for is refused.
    drop(glock.lock(Request::new(Exclusive)).unwrap());
    node.space.retire(glock);
    until("it withdraws", || node.space.check().is_err());
    assert_eq!(node.space.check(), Err(Errno::EACCES));
}

#[test]
fn certificates_are_checked_on_both_sides() {
    let server = Server::start_secure();
    let tls = server.tls();
    let service = Etcd {
        endpoints: vec![format!("https://{}", server.endpoint())],
        tls: Some(tls.clone()),
        ..volume(&server)
    };
    let ([a, b], _stored) = two_nodes(&service);
    drop(a.files[0].0.lock(Request::new(Exclusive)).unwrap());
    let granted = lock_later(&b.files[0].0, &b.files[0].1, Shared);
    assert_eq!(granted.recv_timeout(PATIENCE).unwrap(), Ok(0));
    assert!(
        !format!("{service:?}").contains("PRIVATE"),
        "a key is in a log"
    );

    for tls in [
        // Whom nobody vouches for.
        Tls {
            authority: None,
            ..tls.clone()
        },
        // Who does not say who it is.
        Tls {
            identity: None,
            ..tls
        },
    ] {
        let service = Etcd {
            lease: Duration::from_secs(4),
            tls: Some(tls),
            ..service.clone()
        };
        assert_eq!(refusal(&service, "third").0, Errno::ENOTCONN);
    }
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

/// Run by hand: `cargo test -p pinfold-lock --features etcd --release --test etcd -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
fn a_hand_over_against_a_bare_transaction() {
    const TIMES: u32 = 200;
    let server = Server::start();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let bare = runtime.block_on(async {
        let mut client = etcd_client::Client::connect([server.endpoint()], None)
            .await
            .unwrap();
        let start = Instant::now();
        for _ in 0..TIMES {
            let put = etcd_client::TxnOp::put("bare", "x", None);
            let txn = etcd_client::Txn::new().and_then([put]);
            client.txn(txn).await.unwrap();
        }
        start.elapsed() / TIMES
    });
    let ([a, b], _stored) = two_nodes(&volume(&server));
    let glocks = [&a.files[0].0, &b.files[0].0];
    let mut handed = Duration::ZERO;
    for turn in 0..TIMES as usize {
        let glock = glocks[turn % 2];
        // Beyond the minimum hold of the node that has it, so that what is measured is messages.
        std::thread::sleep(Duration::from_millis(2));
        let start = Instant::now();
        drop(glock.lock(Request::new(Exclusive)).unwrap());
        handed += start.elapsed();
    }
    let ratio = (handed / TIMES).as_secs_f64() / bare.as_secs_f64();
    println!("a hand-over takes {ratio:.2} bare transactions");
}
