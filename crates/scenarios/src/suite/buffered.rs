//! Buffered calls, one thread at a time: T16 to T19.

use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ExitStatus};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pinfold::Cancel;
use pinfold_base::Errno;
use pinfold_mem::region::{At, Region, UserIov, signal};
use rand::Rng as _;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::{P, PAGE, joined, needs_room};
use crate::child;
use crate::fs::{Handle, How, Kind};
use crate::scenario::{Context, Known, Scenario, Stop};

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        number: "T16",
        name: "rlimit",
        claim: "RLIMIT_FSIZE cuts writes short at the limit, then gives SIGXFSZ and EFBIG",
        known: &[],
        seconds_max: 30,
        run: rlimit,
    },
    Scenario {
        number: "T17",
        name: "efbig_overflow",
        claim: "a range past 2^63 is EINVAL, one past the largest file EFBIG",
        known: &[],
        seconds_max: 30,
        run: efbig_overflow,
    },
    Scenario {
        number: "T18",
        name: "nowait_matrix",
        claim: "RWF_NOWAIT does what needs no waiting and says EAGAIN to the rest",
        known: NOWAIT_KNOWN,
        seconds_max: 30,
        run: nowait_matrix,
    },
    Scenario {
        number: "T19",
        name: "kill_mid_write",
        claim: "a cancelled write of 1 GiB leaves a whole prefix and nothing behind it",
        known: &[],
        seconds_max: 120,
        run: kill_mid_write,
    },
];

const NEW: &str = "write of a new file";
const PART: &str = "write of part of an uncached page";
const CACHED: &str = "write of a cached page";
const COLD: &str = "cold read";
const WARM: &str = "warm read";
const AT_END: &str = "read at the end";

const NOWAIT_KNOWN: &[Known] = {
    const fn of(kind: Kind, check: &'static str) -> Known {
        let why = match kind {
            Kind::Ext4 => "ext4's buffered writes do not support RWF_NOWAIT: EOPNOTSUPP",
            Kind::Btrfs => "btrfs reserves space first, which may wait: EAGAIN",
            _ => "this file system does not support RWF_NOWAIT: EOPNOTSUPP",
        };
        Known { kind, check, why }
    }
    &[
        of(Kind::Ext4, NEW),
        of(Kind::Ext4, PART),
        of(Kind::Ext4, CACHED),
        of(Kind::Btrfs, NEW),
        of(Kind::Btrfs, CACHED),
        of(Kind::Tmpfs, NEW),
        of(Kind::Tmpfs, PART),
        of(Kind::Tmpfs, CACHED),
        of(Kind::Tmpfs, COLD),
        of(Kind::Tmpfs, WARM),
        of(Kind::Tmpfs, AT_END),
        of(Kind::Fuse, NEW),
        of(Kind::Fuse, PART),
        of(Kind::Fuse, CACHED),
        of(Kind::Fuse, COLD),
        of(Kind::Fuse, WARM),
        of(Kind::Fuse, AT_END),
    ]
};

fn rlimit(cx: &Context<'_>) -> Result<(), Stop> {
    let source = Region::pages(2)?;
    source.fill(0..2 * PAGE, b'q')?;
    let file = cx.fresh("file")?;
    let counted = signal::Handler::counting(libc::SIGXFSZ)?;
    let before = getrlimit(Resource::Fsize);
    let limit = |current| {
        let limit = Rlimit {
            current,
            maximum: before.maximum,
        };
        setrlimit(Resource::Fsize, limit).map_err(|error| Errno::from_raw(error.raw_os_error()))
    };
    limit(Some(6000))?;
    let write =
        |len: usize, offset: u64| file.write(&source.iov(0..len), At::Offset(offset), How::PLAIN);
    cx.equal("8192@0", write(8192, 0), Ok(6000));
    cx.equal("size at the limit", file.size()?, 6000);
    cx.equal("no signal for a short count", counted.received(), 0);
    cx.equal("1@6000", write(1, 6000), Err(Errno::EFBIG));
    cx.equal("one SIGXFSZ", counted.received(), 1);
    cx.equal("2@5999", write(2, 5999), Ok(1));
    cx.equal("0@7000", write(0, 7000), Ok(0));
    cx.equal("still one SIGXFSZ", counted.received(), 1);
    cx.equal("1@7000", write(1, 7000), Err(Errno::EFBIG));
    cx.equal("two SIGXFSZ", counted.received(), 2);
    cx.equal("size unchanged", file.size()?, 6000);
    cx.equal("fsync under the limit", file.sync(), Ok(()));
    limit(Some(MEBIBYTE))?;
    spread(cx)?;
    // What was acknowledged under a higher limit is stored under a lower one, and nobody is signalled for it.
    let received = counted.received();
    let other = cx.fresh("acknowledged")?;
    cx.fill(&*other, b'a', 0..MEBIBYTE)?;
    limit(Some(6000))?;
    cx.equal(
        "fsync of what was acknowledged before",
        other.sync(),
        Ok(()),
    );
    cx.equal("no SIGXFSZ for write-back", counted.received(), received);
    limit(before.current)?;
    cx.equal("1@6000 without a limit", write(1, 6000), Ok(1));
    file.drop_cache()?;
    cx.contents("contents when stored", &*file, 0..6001, b'q')?;
    Ok(())
}

const MEBIBYTE: u64 = 1 << 20;
/// Files that T16 fills: more together than the limit on one of them allows.
const SPREAD: u64 = 48;

/// Memory that the library allocates by files of its own is not bound by the program's limit.
fn spread(cx: &Context<'_>) -> Result<(), Stop> {
    for number in 0..SPREAD {
        let file = cx.fresh(&format!("file-{number}"))?;
        cx.fill(&*file, b'm', 0..MEBIBYTE)?;
        cx.equal("fsync under a limit of 1 MiB", file.sync(), Ok(()));
        cx.contents("contents under a limit of 1 MiB", &*file, 0..MEBIBYTE, b'm')?;
    }
    Ok(())
}

fn efbig_overflow(cx: &Context<'_>) -> Result<(), Stop> {
    const END: u64 = 1 << 63;
    let source = Region::pages(1)?;
    source.fill(0..PAGE, b'q')?;
    let file = cx.fresh("file")?;
    let write =
        |len: usize, offset: u64| file.write(&source.iov(0..len), At::Offset(offset), How::PLAIN);
    cx.equal("2 B @ 2^63-2", write(2, END - 2), Err(Errno::EINVAL));
    cx.equal("1 B @ 2^63", write(1, END), Err(Errno::EINVAL));
    cx.equal("1 B @ -1", write(1, u64::MAX), Err(Errno::EINVAL));
    let read = file.read(&source.iov(0..2), At::Offset(END - 2), How::PLAIN);
    cx.equal("read of 2 B @ 2^63-2", read, Err(Errno::EINVAL));
    let read = file.read(&source.iov(0..2), At::Offset(u64::MAX), How::PLAIN);
    cx.equal("read of 2 B @ -1", read, Err(Errno::EINVAL));
    cx.equal("size unchanged", file.size()?, 0);

    let largest = largest_size(cx, &*file)?;
    cx.note(format!("largest file: {largest} bytes"));
    file.truncate(0)?;
    if largest < END - 1 {
        cx.equal(
            "1 B beyond the largest",
            write(1, largest),
            Err(Errno::EFBIG),
        );
        cx.equal("1 B far beyond", write(1, END - 2), Err(Errno::EFBIG));
        cx.equal("size still unchanged", file.size()?, 0);
    }
    // Across the border: clamped to what fits. At 2^63-1 itself the range check comes first.
    if largest < END - 2 {
        cx.equal("2 B across the border", write(2, largest - 1), Ok(1));
        cx.equal("size at the border", file.size()?, largest);
        cx.equal("1 B at the end", write(1, largest), Err(Errno::EFBIG));
        cx.equal("truncated again", file.truncate(0), Ok(()));
    }
    Ok(())
}

/// Finds the largest size that truncation allows.
fn largest_size(cx: &Context<'_>, file: &dyn Handle) -> Result<u64, Stop> {
    let (mut fits, mut beyond) = (1u64 << 20, 1u64 << 63);
    while beyond - fits > 1 {
        let middle = fits + (beyond - fits) / 2;
        match file.truncate(middle) {
            Ok(()) => fits = middle,
            Err(errno) => {
                let expected = matches!(errno, Errno::EFBIG | Errno::EINVAL);
                cx.check("truncate beyond the largest", expected, || {
                    format!("{errno:?} at {middle}")
                });
                beyond = middle;
            }
        }
    }
    Ok(fits)
}

fn nowait_matrix(cx: &Context<'_>) -> Result<(), Stop> {
    let buffer = Region::pages(1)?;
    buffer.fill(0..PAGE, b'n')?;
    let part = || buffer.iov(0..100);

    let wrote = not_just_now(cx, |_| {
        let file = cx.fresh("new")?;
        Ok(file.write(&part(), At::Offset(0), How::NOWAIT))
    })?;
    cx.equal(NEW, wrote, Ok(100));

    let file = cx.filled("stored", b'o', 4 * P)?;
    let read = file.read(&part(), At::Offset(0), How::NOWAIT);
    cx.equal(COLD, read, Err(Errno::EAGAIN));
    file.drop_cache()?;
    let wrote = file.write(&part(), At::Offset(50), How::NOWAIT);
    cx.equal(PART, wrote, Err(Errno::EAGAIN));
    cx.contents("contents unchanged", &*file, 0..P, b'o')?;
    let read = file.read(&part(), At::Offset(0), How::NOWAIT);
    if cx.equal(WARM, read, Ok(100)) {
        cx.all("what was read", &buffer.to_vec(0..100)?, 0, b'o');
    }
    buffer.fill(0..PAGE, b'n')?;
    let wrote = not_just_now(cx, |again| {
        if again > 0 {
            // A write that may wait brings the stored time up to date.
            file.write(&part(), At::Offset(50), How::PLAIN)?;
        }
        Ok(file.write(&part(), At::Offset(50), How::NOWAIT))
    })?;
    cx.equal(CACHED, wrote, Ok(100));
    if wrote.is_ok() {
        cx.contents("what was written", &*file, 50..150, b'n')?;
    }
    let read = file.read(&part(), At::Offset(4 * P), How::NOWAIT);
    cx.equal(AT_END, read, Ok(0));
    Ok(())
}

/// Tries that a kernel gets where it may say EAGAIN for passing reasons: another thread's lock on the inode, or a clock
/// tick since the last write, which makes it want to store a new time.
const TRIES: u32 = 50;

fn not_just_now(
    cx: &Context<'_>,
    mut attempt: impl FnMut(u32) -> Result<Result<usize, Errno>, Stop>,
) -> Result<Result<usize, Errno>, Stop> {
    let tries = if cx.fs().kind() == Kind::Pinfold {
        1
    } else {
        TRIES
    };
    let mut wrote = Err(Errno::EAGAIN);
    for number in 0..tries {
        wrote = attempt(number)?;
        if wrote != Err(Errno::EAGAIN) {
            break;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(wrote)
}

/// Bytes that T19 writes in one call: 1024 times the same MiB.
const HUGE: u64 = 1 << 30;
const HUGE_PARTS: usize = 1024;

fn huge(source: &Region) -> UserIov<'_> {
    (0..HUGE_PARTS).fold(UserIov::new(), |list, _| list.and(source, 0..source.len()))
}

fn kill_mid_write(cx: &Context<'_>) -> Result<(), Stop> {
    needs_room(cx, HUGE + (64 << 20))?;
    if cx.fs().cancels() {
        cancel_mid_write(cx)
    } else {
        kill_the_writer(cx)
    }
}

/// Rounds of T19, each stopped at another moment.
const KILLS: u32 = 4;

fn cancel_mid_write(cx: &Context<'_>) -> Result<(), Stop> {
    let source = Region::pages(HUGE as usize / HUGE_PARTS / PAGE)?;
    source.fill(0..source.len(), b'k')?;
    let mut rng = cx.rng(1);
    let mut partial = 0;
    for round in 0..KILLS {
        let file = cx.fresh("file")?;
        let cancel = Cancel::new();
        let delay = Duration::from_micros(rng.random_range(0..60_000) >> round);
        let ended = AtomicBool::new(false);
        let wrote = std::thread::scope(|scope| {
            let canceller = scope.spawn(|| cancel_after(cx, &*file, delay, &cancel, &ended));
            let how = How {
                cancel: Some(&cancel),
                ..How::PLAIN
            };
            let wrote = file.write(&huge(&source), At::Offset(0), how);
            ended.store(true, Ordering::Relaxed);
            joined(canceller.join()).map(|()| wrote)
        })?;
        let count = match wrote {
            Ok(count) => count as u64,
            Err(errno) => {
                cx.equal("the error when nothing was written", errno, Errno::EINTR);
                0
            }
        };
        partial += u32::from(count > 0 && count < HUGE);
        cx.equal("size is the count", file.size()?, count);
        cx.contents("a whole prefix", &*file, 0..count, b'k')?;
        cx.note(format!("{} MiB before the cancellation", count >> 20));
        let how = How {
            cancel: Some(&cancel),
            ..How::PLAIN
        };
        let again = file.write(&source.iov(0..100), At::Offset(0), how);
        cx.equal("a call cancelled beforehand", again, Err(Errno::EINTR));
        if count == HUGE {
            // Nothing was cut short: more of the same would only take time.
            break;
        }
        cx.equal("size still the count", file.size()?, count);
    }
    cx.check("a call was cut short", partial > 0, || {
        "no call ended in the middle".into()
    });
    Ok(())
}

/// Cancels a write once its first bytes have been there for `delay`. A call that goes on must not look like a hang while it
/// gets somewhere, however slowly: each byte more is a beat.
fn cancel_after(
    cx: &Context<'_>,
    file: &dyn Handle,
    delay: Duration,
    cancel: &Cancel,
    ended: &AtomicBool,
) -> Result<(), Stop> {
    let (mut seen, mut began) = (0, None);
    while !ended.load(Ordering::Relaxed) {
        let size = file.size()?;
        if size > seen {
            seen = size;
            cx.beat();
        }
        if seen > 0 && began.get_or_insert_with(Instant::now).elapsed() >= delay {
            cancel.cancel();
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    cancel.cancel();
    Ok(())
}

/// What the rest of a killed call may take. It is bounded by the pages in hand, but the victim also has to be scheduled on a
/// machine that others keep busy, and to give 1 GiB of cache back.
const SOON: Duration = Duration::from_secs(20);
/// How long a killed writer is waited for.
const DEATH_MAX: Duration = Duration::from_secs(40);

/// Waits for a killed process; `None` when it does not die. It is waited for with a beat: how long that takes is a check
/// of its own, not a hang.
fn ended(cx: &Context<'_>, victim: &mut Child) -> Result<Option<ExitStatus>, Stop> {
    let began = Instant::now();
    while began.elapsed() < cx.allows(DEATH_MAX) {
        if let Some(status) = victim.try_wait().map_err(Errno::from)? {
            return Ok(Some(status));
        }
        std::thread::sleep(Duration::from_millis(1));
        cx.beat();
    }
    Ok(None)
}

/// The kernel ends a write of a regular file for a fatal signal alone: the victim is a process.
fn kill_the_writer(cx: &Context<'_>) -> Result<(), Stop> {
    if cx.role() == Some("victim") {
        let source = Region::pages(HUGE as usize / HUGE_PARTS / PAGE)?;
        source.fill(0..source.len(), b'k')?;
        let file = cx.fs().open("file", crate::fs::Open::EXISTING)?;
        file.write(&huge(&source), At::Offset(0), How::PLAIN)?;
        return Ok(());
    }
    let mut rng = cx.rng(1);
    let mut partial = 0;
    for _ in 0..KILLS {
        let file = cx.fresh("file")?;
        let mut victim = child::respawn("victim")?;
        // The first byte says that the call has begun.
        while file.size()? == 0 && victim.try_wait().map_err(Errno::from)?.is_none() {
            std::thread::sleep(Duration::from_micros(200));
            cx.beat();
        }
        std::thread::sleep(Duration::from_micros(rng.random_range(0..40_000)));
        let killed = Instant::now();
        let _ = victim.kill();
        let Some(status) = ended(cx, &mut victim)? else {
            return Err(Stop::Fail(format!(
                "the killed writer lives on after {DEATH_MAX:?}"
            )));
        };
        let took = killed.elapsed();
        cx.check("the call ends soon", took < cx.allows(SOON), || {
            format!("{took:?}")
        });
        let size = file.size()?;
        cx.check("size is no more than was asked", size <= HUGE, || {
            size.to_string()
        });
        cx.contents("a whole prefix", &*file, 0..size, b'k')?;
        partial += u32::from(status.signal() == Some(libc::SIGKILL) && size < HUGE);
        cx.note(format!("{} MiB before the kill", size >> 20));
    }
    if partial == 0 {
        return Err(Stop::Skip(
            "the write is over before it can be killed".into(),
        ));
    }
    Ok(())
}
