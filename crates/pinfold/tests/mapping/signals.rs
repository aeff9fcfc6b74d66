//! Signal handlers of the program that touch mapped memory wherever they happen to run (T67).

use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pinfold::{Delivery, MapAccess};

use super::rig::{PAGE, Rig, SMALL, bytes, load, pattern, store, watched};

const PAGES: usize = 400;
static BASE: AtomicUsize = AtomicUsize::new(0);
static LOADS: AtomicUsize = AtomicUsize::new(0);
static WRONG: AtomicBool = AtomicBool::new(false);

/// Fewer signals are no test; more are waited for.
const LOADS_MIN: usize = 100;

/// Handlers that run: the mapping may only go when none of them has its address.
static INSIDE: AtomicUsize = AtomicUsize::new(0);

extern "C" fn on_timer(_: libc::c_int) {
    INSIDE.fetch_add(1, Ordering::SeqCst);
    let base = BASE.load(Ordering::SeqCst);
    if base != 0 {
        touch(base);
    }
    INSIDE.fetch_sub(1, Ordering::SeqCst);
}

/// Loads a byte of some page that is probably cold, and stores to it.
fn touch(base: usize) {
    let round = LOADS.fetch_add(1, Ordering::SeqCst);
    let page = round * 37 % PAGES;
    let addr = std::ptr::with_exposed_provenance_mut::<u8>(base + page * PAGE);
    // SAFETY: inside the mapping, which lives as long as BASE is set.
    let number = unsafe { addr.read_volatile() };
    // SAFETY: as above.
    unsafe { addr.wrapping_add(1).write_volatile(1) };
    if number != (page % 251) as u8 {
        WRONG.store(true, Ordering::SeqCst);
    }
}

#[test]
#[ignore = "run by the test below, in a process of its own"]
fn child() {
    let delivery = if std::env::var("PINFOLD_CASE").unwrap() == "Inline" {
        Delivery::Inline
    } else {
        Delivery::Handler
    };
    let rig = Rig::new(SMALL, delivery);
    let file = rig.open("a");
    for page in 0..PAGES {
        let byte = [(page % 251) as u8];
        file.write_at(&byte, (page * PAGE) as u64).unwrap();
    }
    file.set_len((PAGES * PAGE) as u64).unwrap();
    let map = rig.map(&file, MapAccess::Write);
    let other = rig.file("b", 300 * PAGE, 3);
    let others = rig.map(&other, MapAccess::Read);
    BASE.store(map.as_ptr().expose_provenance(), Ordering::SeqCst);
    // SAFETY: all-zero bytes are a valid sigaction.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_timer as *const () as usize;
    action.sa_flags = libc::SA_RESTART;
    // SAFETY: a complete action with a handler of the right type.
    unsafe { libc::sigaction(libc::SIGALRM, &raw const action, std::ptr::null_mut()) };
    let often = libc::timeval {
        tv_sec: 0,
        tv_usec: 700,
    };
    let timer = libc::itimerval {
        it_interval: often,
        it_value: often,
    };
    // SAFETY: a complete timer.
    unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const timer, std::ptr::null_mut()) };
    let until = Instant::now() + Duration::from_millis(1500);
    let expected = pattern(300 * PAGE, 3);
    thread::scope(|scope| {
        for worker in 0..3usize {
            let (rig, file, others, expected) = (&rig, &file, &others, &expected);
            scope.spawn(move || {
                let mut buf = vec![0; 20 * PAGE];
                let mut round = worker;
                // A machine that others keep busy delivers few signals a second.
                while Instant::now() < until || LOADS.load(Ordering::Relaxed) <= LOADS_MIN {
                    round += 1;
                    let page = round * 17 % 250;
                    match round % 6 {
                        0 => assert_eq!(load(others, page * PAGE), expected[page * PAGE]),
                        1 => drop(file.read_at(&mut buf, (page * PAGE) as u64).unwrap()),
                        2 => {
                            let own = rig.open(&format!("w{worker}"));
                            own.write_at(bytes(others, page * PAGE, 30 * PAGE), 7)
                                .unwrap();
                        }
                        3 => file.write_back(0..u64::MAX).unwrap(),
                        4 => {
                            let own = rig.open(&format!("w{worker}"));
                            own.set_len((round * 1000 % 100_000) as u64).unwrap();
                            own.node().attributes().unwrap();
                        }
                        _ => {
                            let own = rig.open(&format!("w{worker}"));
                            own.set_len(50 * PAGE as u64).unwrap();
                            let map = rig.map(&own, MapAccess::Write);
                            store(&map, page % 50 * PAGE, 9);
                        }
                    }
                }
            });
        }
    });
    // SAFETY: a null new value would be refused; this one stops the timer.
    let off: libc::itimerval = unsafe { std::mem::zeroed() };
    // SAFETY: a complete timer.
    unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const off, std::ptr::null_mut()) };
    // One that is on its way still finds the mapping, or none; on a busy machine it takes its time.
    BASE.store(0, Ordering::SeqCst);
    while INSIDE.load(Ordering::SeqCst) > 0 {
        thread::sleep(Duration::from_millis(1));
    }
    assert!(!WRONG.load(Ordering::SeqCst), "a handler read other bytes");
}

/// F-9.
#[test]
fn t67_handlers_that_touch_mapped_memory_neither_hang_nor_break_calls() {
    watched("handlers", || {
        for delivery in ["Handler", "Inline"] {
            let child = Command::new(std::env::current_exe().unwrap())
                .args([
                    "--exact",
                    "mapping::signals::child",
                    "--ignored",
                    "--nocapture",
                ])
                .env("PINFOLD_CASE", delivery)
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            let (id, done) = (child.id(), std::sync::Arc::new(AtomicBool::new(false)));
            let ended = std::sync::Arc::clone(&done);
            let killer = thread::spawn(move || {
                let begun = Instant::now();
                while !ended.load(Ordering::SeqCst) {
                    if begun.elapsed() > Duration::from_secs(110) {
                        // SAFETY: our own child, which has not been waited for.
                        unsafe { libc::kill(id.cast_signed(), libc::SIGKILL) };
                        return;
                    }
                    thread::sleep(Duration::from_millis(20));
                }
            });
            let output = child.wait_with_output().unwrap();
            done.store(true, Ordering::SeqCst);
            killer.join().unwrap();
            let told = String::from_utf8_lossy(&output.stderr);
            assert!(
                output.status.success(),
                "{delivery}: {}: {told}",
                output.status
            );
        }
    });
}
