//! Nodes of one process that cache one number each under a glock: whoever may look sees the last write (INV6, T61, T64).
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends there")]

#[path = "cluster/cluster.rs"]
mod cluster;

use std::sync::atomic::Ordering;
use std::sync::mpsc::channel;
use std::sync::{Arc, Barrier};
use std::time::Duration;

use cluster::{Node, PATIENCE, Stored, node, operations, race};
use pinfold_base::Errno;
use pinfold_lock::Mode::{Deferred, Exclusive, Shared, Unlocked};
use pinfold_lock::service::local::Local;
use pinfold_lock::{Flags, LockService, Mode, Options, Refusal, Request, Space, lock_all};

#[test]
fn t61_nobody_sees_an_old_number_whatever_is_asked_in_whatever_order() {
    let service = Local::new();
    let stored: Vec<Arc<Stored>> = (0..2).map(|_| Arc::default()).collect();
    let nodes: Vec<Node> = (0..3).map(|which| node(&service, which, &stored)).collect();
    race(nodes, &stored, operations(2000), || {});
}

#[test]
fn h8_two_nodes_that_both_convert_go_one_after_the_other() {
    let service = Local::new();
    let stored = [Arc::default()];
    let (done, ended) = channel();
    let together = Arc::new(Barrier::new(2));
    let nodes: Vec<Node> = (0..2).map(|which| node(&service, which, &stored)).collect();
    for node in &nodes {
        let (glock, cache) = node.files[0].clone();
        let together = Arc::clone(&together);
        let done = done.clone();
        std::thread::spawn(move || {
            for _ in 0..50 {
                drop(glock.lock(Request::new(Shared)).unwrap());
                together.wait();
                let _guard = glock.lock(Request::new(Exclusive)).unwrap();
                cache.write(cache.read() + 1);
            }
            done.send(())
        });
    }
    for _ in 0..2 {
        ended.recv_timeout(PATIENCE).expect("both go on");
    }
    assert_eq!(stored[0].truth.load(Ordering::Relaxed), 100);
}

#[test]
fn h10_two_nodes_that_take_two_files_in_opposite_order_go_on() {
    let service = Local::new();
    let stored: Vec<Arc<Stored>> = (0..2).map(|_| Arc::default()).collect();
    let (done, ended) = channel();
    let nodes: Vec<Node> = (0..2).map(|which| node(&service, which, &stored)).collect();
    for (which, node) in nodes.iter().enumerate() {
        let files = node.files.clone();
        let done = done.clone();
        std::thread::spawn(move || {
            for _ in 0..100 {
                let request = Request::new(Exclusive);
                let mut order = [(&*files[0].0, request), (&*files[1].0, request)];
                order.rotate_left(which);
                drop(lock_all(&order).unwrap());
            }
            done.send(())
        });
    }
    for _ in 0..2 {
        ended.recv_timeout(PATIENCE).expect("both go on");
    }
}

/// Every pair of modes on two nodes: who is granted beside whom, who is asked to give way, and what is left.
#[test]
fn t61_every_pair_of_modes_on_two_nodes() {
    for held in [Shared, Deferred, Exclusive] {
        for wanted in [Shared, Deferred, Exclusive] {
            let service = Local::new();
            let stored = [Arc::default()];
            let [a, b] = [0, 1].map(|which| node(&service, which, &stored));
            let [a, b] = [&a, &b].map(|node| Arc::clone(&node.files[0].0));
            let guard = a.lock(Request::new(held)).unwrap();
            let together = held.compatible(wanted);

            let tried = b.lock(Request::new(wanted).with(Flags::TRY));
            assert_eq!(tried.is_ok(), together, "{held:?} {wanted:?}");
            drop(tried);
            assert_eq!(a.report().counts.callbacks, 0, "TRY asks nobody");
            if together {
                continue;
            }
            let tried = b.lock(Request::new(wanted).with(Flags::TRY_1CB));
            assert_eq!(tried.unwrap_err(), Refusal::TryFailed);
            assert_eq!(a.report().counts.callbacks, 1, "TRY_1CB asks once");

            let (done, ended) = channel();
            let waits = Arc::clone(&b);
            std::thread::spawn(move || {
                let guard = waits.lock(Request::new(wanted));
                done.send(guard.map(|_| waits.mode()))
            });
            drop(guard);
            let mode = ended.recv_timeout(PATIENCE).expect("granted in the end");
            assert_eq!(mode, Ok(wanted));
            assert!(a.mode().compatible(wanted), "{held:?} {wanted:?}");
            let left = Mode::left_for(wanted);
            let expected = if held.falls_to(left) { left } else { Unlocked };
            assert_eq!(a.mode(), expected, "{held:?} {wanted:?}");
        }
    }
}

#[test]
fn t61_nodes_that_wait_are_served_in_order() {
    let service = Local::new();
    let stored = [Arc::default()];
    let nodes: Vec<Node> = (0..4).map(|which| node(&service, which, &stored)).collect();
    let first = nodes[0].files[0].0.lock(Request::new(Exclusive)).unwrap();
    let (done, order) = channel();
    for (which, node) in nodes.iter().enumerate().skip(1) {
        let glock = Arc::clone(&node.files[0].0);
        let done = done.clone();
        let asked = Arc::clone(&glock);
        std::thread::spawn(move || {
            let _guard = glock.lock(Request::new(Exclusive)).unwrap();
            done.send(which)
        });
        let end = std::time::Instant::now() + PATIENCE;
        while asked.report().counts.asked == 0 {
            assert!(std::time::Instant::now() < end, "never asked");
            std::thread::yield_now();
        }
        // Asked for, but perhaps not yet with the service: it has called the owner when it is.
        while nodes[0].files[0].0.report().counts.callbacks < which as u64 {
            assert!(std::time::Instant::now() < end, "never called");
            std::thread::yield_now();
        }
    }
    drop(first);
    let served: Vec<usize> = (0..3)
        .map(|_| order.recv_timeout(PATIENCE).expect("served"))
        .collect();
    assert_eq!(served, [1, 2, 3]);
}

#[test]
fn t64_a_node_that_cannot_write_back_keeps_its_lock_until_it_is_fenced() {
    let service = Local::new();
    let stored = [Arc::default()];
    let [a, b] = [0, 1].map(|which| node(&service, which, &stored));
    let (glock, cache) = a.files[0].clone();
    {
        let _guard = glock.lock(Request::new(Exclusive)).unwrap();
        cache.write(1);
    }
    cache.sync_fails.store(true, Ordering::Relaxed);
    let (done, ended) = channel();
    let (waits, b_cache) = b.files[0].clone();
    std::thread::spawn(move || {
        let guard = waits.lock(Request::new(Shared));
        done.send(guard.map(|_guard| b_cache.read()))
    });
    let end = std::time::Instant::now() + PATIENCE;
    while a.space.check().is_ok() {
        assert!(std::time::Instant::now() < end, "it never withdraws");
        std::thread::yield_now();
    }
    let refused = glock.lock(Request::new(Shared));
    assert_eq!(refused.unwrap_err(), Refusal::Failed(Errno::EIO));
    assert!(ended.try_recv().is_err(), "handed over");
    // The withdrawal reaches the service a moment after it is noticed here: fence until it was there to be fenced.
    loop {
        service.fence("node0");
        match ended.recv_timeout(Duration::from_millis(20)) {
            // What was never stored is lost, and nobody sees it half.
            Ok(seen) => break assert_eq!(seen, Ok(0)),
            Err(_) => assert!(std::time::Instant::now() < end, "never granted"),
        }
    }
}

#[test]
fn a_name_is_given_once() {
    let service = Local::new();
    let one = Space::join(&service, "one", Options::default()).unwrap();
    let again = Space::join(&service, "one", Options::default());
    assert_eq!(again.unwrap_err().errno, Errno::EEXIST);
    one.leave(PATIENCE).unwrap();
    let service: &dyn LockService = &service;
    drop(Space::join(service, "one", Options::default()).unwrap());
}
