//! What cannot work, or works no longer: a clear error at the start, or a withdrawal later; never a hang, never a lock twice.

use std::sync::Arc;
use std::time::Duration;

use pinfold_base::Errno;
use pinfold_lock::Mode::{Exclusive, Shared};
use pinfold_lock::service::etcd::{Etcd, Tls};
use pinfold_lock::{Clock, Duties, HandClock, Options, Refusal, Request, Space, Time};

use super::cluster::{PATIENCE, name, node};
use super::server::{self, Server};
use super::{lock_later, mortal, two_nodes, until, volume};

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
            "pinfold-lock 3 volume-1",
            Errno::EOPNOTSUPP,
        ),
        (
            "/old",
            "/old/volume",
            "pinfold-lock 1 volume-1",
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
    server.put("/bad/volume", "pinfold-lock 2 volume-1");
    server.put("/bad/lock/12/what", "");
    let bad = Etcd {
        prefix: "/bad".to_owned(),
        ..good.clone()
    };
    assert_eq!(refusal(&bad, "second").0, Errno::EUCLEAN);
    // Who was refused leaves nothing behind.
    for kept in ["/bad/member/", "/bad/node/"] {
        assert_eq!(server.keys(kept), Vec::<String>::new());
    }
    assert_eq!(server.keys("/test/node/").len(), 1);
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
            _ => server.put("/renamed/volume", "pinfold-lock 2 another"),
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
fn certificates_whose_time_is_over_are_told_at_the_start() {
    let server = Server::start_secure();
    let service = Etcd {
        endpoints: vec![format!("https://{}", server.endpoint())],
        lease: Duration::from_secs(4),
        tls: Some(server.tls_expired()),
        ..volume(&server)
    };
    // The server says nothing to whom it does not know.
    let (errno, why) = refusal(&service, "one");
    assert_eq!(errno, Errno::ENOTCONN, "{why}");
    assert!(why.contains("certificate"), "{why}");
    let service = Etcd {
        tls: Some(server.tls()),
        ..service
    };
    server.expire();
    let (errno, why) = refusal(&service, "one");
    assert_eq!(errno, Errno::ENOTCONN, "{why}");
    assert!(why.to_lowercase().contains("expired"), "{why}");
}

#[test]
fn a_node_whose_certificates_expire_stops_at_the_end_of_its_lease() {
    let mut server = Server::start_secure();
    let service = Etcd {
        endpoints: vec![format!("https://{}", server.endpoint())],
        tls: Some(server.tls()),
        ..mortal(&server)
    };
    let stored = [Arc::default()];
    let node = node(&service, 0, &stored);
    let (glock, _) = &node.files[0];
    drop(glock.lock(Request::new(Exclusive)).unwrap());
    // A connection that stands is not looked at again, nor is one that goes on from an earlier one: the server has to forget.
    server.kill();
    server.expire();
    server.start_unasked();
    until("it listens", || {
        std::net::TcpStream::connect(server.endpoint()).is_ok()
    });
    until("it stops", || node.space.check().is_err());
    assert_eq!(node.space.check(), Err(Errno::EIO));
    let refused = glock.lock(Request::new(Exclusive));
    assert_eq!(refused.unwrap_err(), Refusal::Failed(Errno::EIO));
}

#[test]
fn a_user_whose_password_changes_makes_the_node_withdraw_before_others_have_its_lock() {
    let server = Server::start();
    server.add_user("node", "secret", "/test/");
    server.require_user("root", "secret");
    let user = |name: &str| Some((name.to_owned(), "secret".to_owned()));
    let stored = [Arc::default()];
    let changed = Etcd {
        user: user("node"),
        ..mortal(&server)
    };
    let a = node(&changed, 0, &stored);
    let other = Etcd {
        user: user("root"),
        ..volume(&server)
    };
    let b = node(&other, 1, &stored);
    let (glock, cache) = &a.files[0];
    let guard = glock.lock(Request::new(Exclusive)).unwrap();
    cache.write(7);
    server.change_password("node", "other");
    let granted = lock_later(&b.files[0].0, &b.files[0].1, Exclusive);
    // What it gives away has to be asked for now, and is refused when it is stored: others have it after the lease.
    drop(guard);
    assert_eq!(granted.recv_timeout(PATIENCE).unwrap(), Ok(7));
    assert_eq!(a.space.check(), Err(Errno::EACCES));
    let late = refusal(&changed, "late");
    assert_eq!(late.0, Errno::EACCES, "{}", late.1);
}

#[test]
fn a_token_that_etcd_does_not_know_any_more_is_asked_for_anew() {
    let mut server = Server::start();
    server.require_user("root", "secret");
    let service = Etcd {
        user: Some(("root".to_owned(), "secret".to_owned())),
        ..volume(&server)
    };
    let ([a, b], _stored) = two_nodes(&service);
    let (a_glock, a_cache) = &a.files[0];
    {
        let _guard = a_glock.lock(Request::new(Exclusive)).unwrap();
        a_cache.write(5);
    }
    // Tokens are in the server's memory: this ends all of them, as their time does.
    server.kill();
    server.start_again();
    let granted = lock_later(&b.files[0].0, &b.files[0].1, Exclusive);
    assert_eq!(granted.recv_timeout(PATIENCE).unwrap(), Ok(5));
    assert_eq!((a.space.check(), b.space.check()), (Ok(()), Ok(())));
}

#[test]
fn t63_a_clock_that_jumps_stops_the_node_before_others_have_its_lock() {
    let server = Server::start();
    let clock = HandClock::new();
    clock.advance(Time::now().since(Time::ZERO));
    let options = Options {
        clock: Clock::Hand(clock.clone()),
        ..Options::default()
    };
    let a = Space::join(&mortal(&server), "node0", options).unwrap();
    let stored = [Arc::default()];
    let b = node(&volume(&server), 1, &stored);
    let cache: Arc<dyn Duties> = b.files[0].1.clone();
    let glock = a.glock(name(1), || cache);
    let guard = glock.lock(Request::new(Exclusive)).unwrap();
    let granted = lock_later(&b.files[0].0, &b.files[0].1, Exclusive);
    assert_eq!(a.check(), Ok(()));
    // As over a suspension: the lease has ended, though etcd does not know it yet.
    clock.advance(Duration::from_secs(3600));
    assert_eq!(a.check(), Err(Errno::EIO));
    drop(guard);
    let refused = glock.lock(Request::new(Exclusive));
    assert_eq!(refused.unwrap_err(), Refusal::Failed(Errno::EIO));
    assert_eq!(granted.recv_timeout(PATIENCE).unwrap(), Ok(0));
    assert!(b.files[0].0.token() > glock.token());
}

#[test]
fn a_change_of_others_rights_is_survived() {
    let server = Server::start_with_dated_tokens();
    server.require_user("root", "secret");
    let service = Etcd {
        user: Some(("root".to_owned(), "secret".to_owned())),
        ..volume(&server)
    };
    let ([a, b], _stored) = two_nodes(&service);
    // After each change the tokens that the nodes have are refused.
    for (turn, (nodes, mode)) in [([&a, &b], Exclusive), ([&b, &a], Shared)]
        .into_iter()
        .enumerate()
    {
        server.add_role(&format!("another-{turn}"));
        for node in nodes {
            let (glock, cache) = &node.files[0];
            let granted = lock_later(glock, cache, mode);
            assert_eq!(granted.recv_timeout(PATIENCE).unwrap(), Ok(0));
        }
    }
    for node in [&a, &b] {
        assert_eq!(node.space.check(), Ok(()));
    }
}
