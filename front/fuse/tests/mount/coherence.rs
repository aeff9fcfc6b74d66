//! Mappings, direct and ordinary I/O on one file see the same bytes.

use std::fs;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::{installed, mounted, mounted_as, mounted_with, python};

#[test]
fn shared_mappings_agree_with_reads_and_writes() {
    let Some(fixture) = mounted() else { return };
    if !installed("python3") {
        return;
    }
    let path = fixture.mnt.join("a");
    python(
        r"
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
os.pwrite(fd, b'.' * 10000, 0)
m = mmap.mmap(fd, 10000)
other = os.open(sys.argv[1], os.O_RDWR)
for i in range(2000):
    at = (i * 37) % 9990
    m[at:at + 4] = b'%04d' % i
    assert os.pread(other, 4, at) == b'%04d' % i, ('store, then read', i)
    os.pwrite(other, b'%04d' % (9999 - i), at)
    assert m[at:at + 4] == b'%04d' % (9999 - i), ('write, then load', i)
m.flush()
os.fsync(fd)
expected = m[:]
m.close()
assert os.pread(other, 10000, 0) == expected
open(sys.argv[2], 'wb').write(expected)
",
        &[&path, &fixture.plain.join("expected")],
    );
    fixture.volume.sync().unwrap();
    let expected = fs::read(fixture.plain.join("expected")).unwrap();
    assert!(
        fs::read(fixture.data.join("a")).unwrap() == expected,
        "stored"
    );
}

#[test]
fn a_mapping_made_through_a_direct_descriptor_writes_back_its_tail() {
    let Some(fixture) = mounted() else { return };
    if !installed("python3") {
        return;
    }
    let path = fixture.mnt.join("a");
    fs::write(&path, vec![b'.'; 10_001]).unwrap();
    python(
        r"
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_DIRECT)
m = mmap.mmap(fd, 10001)
m[0:5] = b'start'
m[9996:10001] = b'tail!'
m.flush()
m.close()
os.close(fd)
",
        &[&path],
    );
    let expected = [b"start".as_slice(), &[b'.'; 9_991], b"tail!"].concat();
    assert!(fs::read(&path).unwrap() == expected);
    fixture.volume.sync().unwrap();
    assert!(fs::read(fixture.data.join("a")).unwrap() == expected);
}

fn aligned(buf: &mut Vec<u8>, len: usize) -> &mut [u8] {
    buf.resize(len + 4096, 0);
    let start = buf.as_ptr().align_offset(4096);
    &mut buf[start..start + len]
}

/// Section J's T35 and T36 through the kernel: after a direct write of a generation has returned, nobody reads an
/// older one, cached, mapped or directly.
#[test]
fn nothing_older_than_a_finished_direct_write_is_read() {
    let Some(fixture) = mounted() else { return };
    const LEN: usize = 64 << 10;
    // What the writer does at least, however little of the machine it gets.
    const GENERATIONS_MIN: u64 = 10;
    let path = fixture.mnt.join("a");
    fs::write(&path, vec![0; LEN]).unwrap();
    let (finished, ended) = (AtomicU64::new(0), AtomicBool::new(false));
    let until = Instant::now() + Duration::from_secs(2);
    let open = |flags| {
        fs::OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(flags)
            .open(&path)
            .unwrap()
    };
    let check = |buf: &[u8], least: u64, how: &str| {
        for (page, bytes) in buf.chunks(4096).enumerate() {
            let got = u64::from_le_bytes(bytes[..8].try_into().unwrap());
            assert!(
                got >= least,
                "{how}: page {page} shows {got} after {least} was finished"
            );
        }
    };
    thread::scope(|scope| {
        scope.spawn(|| {
            let file = open(libc::O_DIRECT);
            let mut buf = Vec::new();
            let buf = aligned(&mut buf, LEN);
            for generation in 1.. {
                for page in buf.chunks_mut(4096) {
                    page[..8].copy_from_slice(&u64::to_le_bytes(generation));
                }
                file.write_all_at(buf, 0).unwrap();
                finished.store(generation, Ordering::SeqCst);
                if Instant::now() > until && generation > GENERATIONS_MIN {
                    break;
                }
            }
            ended.store(true, Ordering::SeqCst);
        });
        for flags in [0, 0, libc::O_DIRECT] {
            let (finished, ended, check) = (&finished, &ended, &check);
            let file = open(flags);
            scope.spawn(move || {
                let mut buf = Vec::new();
                let buf = aligned(&mut buf, LEN);
                while !ended.load(Ordering::SeqCst) {
                    let least = finished.load(Ordering::SeqCst);
                    file.read_exact_at(buf, 0).unwrap();
                    check(buf, least, if flags == 0 { "cached" } else { "direct" });
                }
            });
        }
    });
}

/// Interleaving C-1 through the kernel: a read while a direct write is under way brings the old bytes into the kernel's
/// cache, after the kernel has invalidated it; they must not stay. The write is asynchronous: after others Linux 6.18
/// invalidates by itself, but here it does so when the write has been sent.
#[test]
fn old_bytes_read_during_a_direct_write_are_gone_after_it() {
    use pinfold::testing::{Action, FaultyObject, On, Rule};
    use pinfold_mem::uring::{Engine, EngineConfig, Op, Request};
    use pinfold_store::Operation;
    // Enough for the write to be sent; if it is not, less is tested.
    const MOMENT: Duration = Duration::from_millis(300);
    let objects = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let made = std::sync::Arc::clone(&objects);
    let layer = move |inner| -> std::sync::Arc<dyn pinfold::Object> {
        let faulty = FaultyObject::new(inner);
        let slow = Action::Delay(Duration::from_secs(3600));
        faulty.add(Rule::new(On::Only(Operation::Allocate), slow));
        made.lock().unwrap().push(std::sync::Arc::clone(&faulty));
        faulty
    };
    let fixture = mounted_with(|b| b.object_layer(std::sync::Arc::new(layer)));
    let Some(fixture) = fixture else { return };
    let engine = Engine::start(EngineConfig::automatic(None)).unwrap();
    let path = fixture.mnt.join("a");
    fs::write(&path, [b'0'; 4096]).unwrap();
    let cached = fs::File::open(&path).unwrap();
    let mut options = fs::OpenOptions::new();
    let direct = options.write(true).custom_flags(libc::O_DIRECT);
    let direct = direct.open(&path).unwrap();
    let read = || {
        let mut page = [0; 4096];
        cached.read_exact_at(&mut page, 0).unwrap();
        page[0]
    };
    let inside = fixture.volume.root().lookup("a".as_ref()).unwrap();
    let inside = inside
        .open(&pinfold::OpenOptions::new().write(true))
        .unwrap();
    let waiting = || {
        let objects = objects.lock().unwrap();
        objects.iter().find(|object| object.struck() > 0).cloned()
    };
    thread::scope(|scope| {
        // Holds the inode's lock, for which the write waits while reads do not, until the store is told to go on.
        scope.spawn(|| {
            inside
                .allocate(pinfold::AllocateMode::KeepSize, 0..4096)
                .unwrap();
        });
        let store = loop {
            match waiting() {
                Some(store) => break store,
                None => thread::sleep(Duration::from_millis(1)),
            }
        };
        let mut buf = pinfold_mem::AlignedBuf::zeroed(4096);
        buf.as_mut_slice().fill(b'1');
        let (tell, told) = std::sync::mpsc::channel();
        engine.submit([Request {
            op: Op::Write,
            file: std::sync::Arc::new(direct.into()),
            offset: 0,
            segments: pinfold_mem::Segments::of_buf(&std::sync::Arc::new(buf), 4096),
            block: 4096,
            done: Box::new(move |progress| tell.send(progress).unwrap()),
        }]);
        thread::sleep(MOMENT);
        assert_eq!(read(), b'0', "the write is under way");
        assert!(told.try_recv().is_err(), "the write is under way");
        store.clear();
        let progress = told.recv().unwrap();
        assert_eq!((progress.done, progress.stop), (4096, None));
    });
    assert_eq!(read(), b'1');
}

/// The other way round: what was written through the cache is what a direct read sees.
#[test]
fn nothing_older_than_a_finished_cached_write_is_read_directly() {
    let Some(fixture) = mounted() else { return };
    let path = fixture.mnt.join("a");
    fs::write(&path, vec![0; 8192]).unwrap();
    let cached = fs::OpenOptions::new().write(true).open(&path).unwrap();
    let direct = fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(&path)
        .unwrap();
    let mut buf = Vec::new();
    let buf = aligned(&mut buf, 8192);
    for generation in 1..500u64 {
        cached
            .write_all_at(&generation.to_le_bytes(), 4092)
            .unwrap();
        assert_eq!(direct.read_at(buf, 0).unwrap(), 8192);
        assert_eq!(buf[4092..4100], generation.to_le_bytes());
    }
}

#[test]
fn appends_of_several_processes_lose_nothing() {
    let Some(fixture) = mounted() else { return };
    let path = fixture.mnt.join("log");
    let script = "for i in $(seq 200); do echo \"$1 $i\" >> \"$2\"; done";
    let children: Vec<_> = (0..4)
        .map(|n| {
            Command::new("sh")
                .args(["-c", script, "sh", &n.to_string()])
                .arg(&path)
                .spawn()
                .unwrap()
        })
        .collect();
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    let text = fs::read_to_string(&path).unwrap();
    let mut lines: Vec<&str> = text.lines().collect();
    lines.sort_unstable();
    lines.dedup();
    assert_eq!(lines.len(), 800);
    assert!(lines.iter().all(|line| line.split(' ').count() == 2));
}

#[test]
fn a_file_larger_than_the_cache_comes_back_whole() {
    let Some(fixture) = mounted_with(|builder| builder.memory(pinfold::MEMORY_MIN)) else {
        return;
    };
    let path = fixture.mnt.join("big");
    let bytes: Vec<u8> = (0..8_000_003u32).map(|i| (i ^ (i >> 8)) as u8).collect();
    fs::write(&path, &bytes).unwrap();
    assert!(fs::read(&path).unwrap() == bytes);
    drop_kernel_cache(&path);
    assert!(fs::read(&path).unwrap() == bytes);
    fixture.volume.sync().unwrap();
    assert!(fs::read(fixture.data.join("big")).unwrap() == bytes);
}

/// Bytes at which a growing file has grown enough.
const GROWN_MAX: u64 = 256 << 20;
/// By how many pieces it grows at least, however little of the machine it gets.
const PIECES_MIN: u64 = 10;

/// The first kernel on which nothing in the protocol waits for a call that grows a file (docs/decisions/0003).
const NO_WAITING_SINCE: (u32, u32) = (6, 19);

fn kernel_can_be_waited_for() -> bool {
    let name = rustix::system::uname();
    let release = name.release().to_str().unwrap();
    let mut numbers = release.split('.').map_while(|part| part.parse().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version >= NO_WAITING_SINCE {
        println!("skipped: a size may be told a moment too early on {release}");
    }
    version < NO_WAITING_SINCE
}

/// Section J's T14 through the kernel: a size that was told can be read up to, and is no less than what was finished
/// before it was asked for, while another thread grows the file by `piece` at a time, filling it with `byte`.
fn told_sizes_hold(piece: u64, byte: u8, flags: i32, mut grow: impl FnMut(&fs::File, u64) + Send) {
    let options = pinfold_fuse::MountOptions {
        // On a busy machine a call of some requests may take longer than the second that is usually waited for it.
        size_wait: Some(Duration::from_secs(60)),
        ..Default::default()
    };
    let fixture = mounted_as(&options, |builder| builder.memory(64 << 20));
    let Some(fixture) = fixture.filter(|_| kernel_can_be_waited_for()) else {
        return;
    };
    let path = fixture.mnt.join("log");
    fs::write(&path, "").unwrap();
    let (finished, ended) = (AtomicU64::new(0), AtomicBool::new(false));
    let (path, finished, ended) = (&path, &finished, &ended);
    let until = Instant::now() + Duration::from_secs(2);
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut options = fs::OpenOptions::new();
            let file = options.write(true).custom_flags(flags).open(path).unwrap();
            let mut len = 0;
            while len < GROWN_MAX && (Instant::now() < until || len <= PIECES_MIN * piece) {
                grow(&file, len);
                len += piece;
                finished.store(len, Ordering::SeqCst);
            }
            ended.store(true, Ordering::SeqCst);
        });
        for _ in 0..2 {
            scope.spawn(move || {
                let file = fs::File::open(path).unwrap();
                let mut tail = [0; 100];
                while !ended.load(Ordering::SeqCst) {
                    let least = finished.load(Ordering::SeqCst);
                    let len = file.metadata().unwrap().len();
                    assert!(len >= least, "{len} told after {least} had been reached");
                    let want = len.min(tail.len() as u64);
                    let got = file.read_at(&mut tail[..want as usize], len - want);
                    assert_eq!(got.unwrap(), want as usize, "of a file of {len}");
                    assert!(tail[..want as usize].iter().all(|&found| found == byte));
                }
            });
        }
    });
}

fn written_in_pieces_of(piece: usize) {
    let bytes = vec![b'x'; piece];
    told_sizes_hold(piece as u64, b'x', 0, |file, len| {
        file.write_all_at(&bytes, len).unwrap();
    });
}

#[test]
fn t14_a_size_told_beside_small_writes_can_be_read() {
    written_in_pieces_of(100);
}

/// Writes of several requests each: the kernel learns their size after the last.
#[test]
fn t14_a_size_told_beside_large_writes_can_be_read() {
    written_in_pieces_of(3_000_000);
}

#[test]
fn t14_a_size_told_beside_direct_writes_can_be_read() {
    let mut buf = Vec::new();
    let bytes = aligned(&mut buf, 3 << 20);
    bytes.fill(b'x');
    told_sizes_hold(3 << 20, b'x', libc::O_DIRECT, |file, len| {
        file.write_all_at(bytes, len).unwrap();
    });
}

#[test]
fn t14_a_size_told_beside_ftruncate_can_be_read() {
    told_sizes_hold(1000, 0, 0, |file, len| file.set_len(len + 1000).unwrap());
}

#[test]
fn t14_a_size_told_beside_fallocate_can_be_read() {
    use rustix::fs::{FallocateFlags, fallocate};
    told_sizes_hold(4096, 0, 0, |file, len| {
        fallocate(file, FallocateFlags::empty(), len, 4096).unwrap();
    });
}

fn drop_kernel_cache(path: &std::path::Path) {
    let file = fs::File::open(path).unwrap();
    file.sync_all().unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
}

#[test]
fn no_space_is_told_by_the_write_that_does_not_fit() {
    use pinfold::testing::{Action, FaultyObject, On, Rule};
    use pinfold_store::Operation;
    let layer = |inner| -> std::sync::Arc<dyn pinfold::Object> {
        let faulty = FaultyObject::new(inner);
        let full = Action::Fail(pinfold::Errno::ENOSPC);
        faulty.add(Rule::new(On::Only(Operation::Allocate), full));
        faulty
    };
    let Some(fixture) = mounted_with(|b| b.object_layer(std::sync::Arc::new(layer))) else {
        return;
    };
    let file = fs::File::create(fixture.mnt.join("a")).unwrap();
    let refused = rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, 4096);
    assert_eq!(refused.unwrap_err(), rustix::io::Errno::NOSPC);
}
