use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::channel;
use std::time::Duration;

use pinfold_mem::uring::{Backend, EngineConfig};
use pinfold_mem::{AlignedBuf, Arena};

use super::*;
use crate::testing::Seed;

const PATIENCE: Duration = Duration::from_secs(20);

/// A file by its path; what the name space does better.
#[derive(Debug)]
struct At(PathBuf);

impl Reopen for At {
    fn reopen(&self, flags: OFlags) -> Result<OwnedFd, Errno> {
        rustix::fs::open(&self.0, flags, rustix::fs::Mode::empty())
            .map_err(|e| Errno::from_raw(e.raw_os_error()))
    }
}

/// It cannot be read, and takes none but certain digits.
const REFUSING: &str = "/proc/self/clear_refs";

/// A filesystem that opens O_DIRECT and then refuses it, or refuses at once.
#[derive(Debug)]
struct Undirect {
    at: At,
    refuse_open: bool,
}

impl Reopen for Undirect {
    fn reopen(&self, flags: OFlags) -> Result<OwnedFd, Errno> {
        if flags.contains(OFlags::DIRECT) {
            if self.refuse_open {
                return Err(Errno::EINVAL);
            }
            // A file that opens like any other, and whose transfers all answer EINVAL.
            return At(PathBuf::from(REFUSING)).reopen(flags - OFlags::DIRECT);
        }
        self.at.reopen(flags)
    }
}

fn engine() -> Arc<Engine> {
    Engine::start(EngineConfig::automatic(None)).unwrap()
}

struct Fixture {
    _dir: tempfile::TempDir,
    path: PathBuf,
    object: DirObject,
}

fn fixture(content: &[u8]) -> Fixture {
    fixture_in(&std::env::temp_dir(), content, engine())
}

fn fixture_in(parent: &Path, content: &[u8], engine: Arc<Engine>) -> Fixture {
    let dir = tempfile::tempdir_in(parent).unwrap();
    let path = dir.path().join("file");
    std::fs::write(&path, content).unwrap();
    let object = DirObject::new(Arc::new(At(path.clone())), engine);
    object.grant(true, true).unwrap();
    Fixture {
        _dir: dir,
        path,
        object,
    }
}

fn segments(bytes: &[u8]) -> Segments {
    let buf = Arc::new(AlignedBuf::zeroed(bytes.len()));
    let segments = Segments::of_buf(&buf, bytes.len());
    segments.copy_from(0, bytes);
    segments
}

fn pattern(len: usize, salt: u64) -> Vec<u8> {
    let mut seed = Seed::new(salt);
    (0..len).map(|_| seed.next() as u8).collect()
}

fn write(object: &dyn Object, offset: u64, bytes: &[u8]) -> Progress<StoreError> {
    let (tell, told) = channel();
    object.write(vec![Transfer {
        offset,
        segments: segments(bytes),
        done: Box::new(move |p| tell.send(p).unwrap()),
    }]);
    let progress = told.recv_timeout(PATIENCE).expect("a write must end");
    assert_eq!(object.write_wait(offset, &segments(bytes)), progress);
    progress
}

/// Reads by completion and by waiting, which must agree.
fn read(object: &dyn Object, offset: u64, len: usize) -> (Progress<StoreError>, Vec<u8>) {
    let memory = segments(&vec![0xee; len]);
    let (tell, told) = channel();
    object.read(vec![Transfer {
        offset,
        segments: memory.clone(),
        done: Box::new(move |p| tell.send(p).unwrap()),
    }]);
    let progress = told.recv_timeout(PATIENCE).expect("a read must end");
    let waited = segments(&vec![0xee; len]);
    assert_eq!(object.read_wait(offset, &waited), progress);
    let done = progress.done as usize;
    let mut bytes = memory.to_vec();
    assert!(bytes[..done] == waited.to_vec()[..done]);
    bytes.truncate(done);
    (progress, bytes)
}

#[test]
fn a_waited_for_write_is_made_by_the_calling_thread_whatever_its_alignment() {
    let f = fixture(b"");
    let mut expected = Vec::new();
    let submitted = || f.object.engine.statistics().submitted;
    let before = submitted();
    for (offset, len) in [(0, 50_000), (4096, 8192), (4000, 200), (49_000, 30_001)] {
        let data = pattern(len, offset as u64);
        let progress = f.object.write_wait(offset as u64, &segments(&data));
        assert_eq!(progress, Progress::complete(len as u64));
        expected.resize(expected.len().max(offset + len), 0);
        expected[offset..offset + len].copy_from_slice(&data);
        assert!(
            std::fs::read(&f.path).unwrap() == expected,
            "{len} at {offset}"
        );
    }
    assert_eq!(submitted(), before, "nothing went through the engine");
}

/// The hand-over to the ring pays for registered memory alone.
#[test]
fn large_waited_for_transfers_of_other_memory_are_made_by_the_calling_thread() {
    let arena = Arena::new(1 << 20).unwrap();
    // Ready, so that it is registered.
    let _frame = arena.alloc(1).unwrap();
    let engine = Engine::start(EngineConfig::automatic(Some(arena))).unwrap();
    let f = fixture_in(&std::env::temp_dir(), b"", engine);
    // The ring's thread registers chunks before it sends anything off.
    let (nothing, _) = read(&f.object, 0, 512);
    assert_eq!(nothing, Progress::complete(0));
    if f.object.engine.fixed_chunks() == 0 {
        eprintln!("skipped: no memory could be registered");
        return;
    }
    let submitted = || f.object.engine.statistics().submitted;
    let (before, data) = (submitted(), pattern(2 << 20, 1));
    let memory = segments(&data);
    assert_eq!(f.object.write_wait(0, &memory), Progress::complete(2 << 20));
    assert_eq!(f.object.read_wait(0, &memory), Progress::complete(2 << 20));
    assert_eq!(submitted(), before, "it went through the engine");
    assert!(std::fs::read(&f.path).unwrap() == data);
}

#[test]
fn a_range_comes_back_as_written_whatever_its_alignment() {
    let f = fixture(b"");
    let data = pattern(50_000, 1);
    for (offset, len) in [
        (0, 50_000),
        (4096, 8192),
        (512, 512),
        (777, 12_345),
        (8192, 100),
    ] {
        let bytes = &data[..len];
        assert_eq!(
            write(&f.object, offset, bytes),
            Progress::complete(len as u64)
        );
        let (progress, back) = read(&f.object, offset, len);
        assert_eq!(progress, Progress::complete(len as u64));
        assert!(back == bytes, "at {offset}");
    }
    assert_eq!(f.object.len().unwrap(), 50_000);
    f.object.sync(SyncScope::Data).unwrap();
    let disk = std::fs::read(&f.path).unwrap();
    assert_eq!(disk.len(), 50_000);
}

#[test]
fn the_file_is_never_longer_than_the_last_byte_written() {
    let f = fixture(b"");
    let path = f.path.clone();
    let (stop, stopped) = channel::<()>();
    let watcher = std::thread::spawn(move || {
        let mut seen = 0u64;
        while stopped.try_recv().is_err() {
            let len = std::fs::metadata(&path).unwrap().size();
            assert!(len <= 20_000 + 100 * 33, "{len}");
            seen += 1;
        }
        seen
    });
    for i in 0..100u64 {
        let len = 20_000 + i as usize * 33;
        assert_eq!(write(&f.object, 0, &pattern(len, i)).done, len as u64);
        assert_eq!(std::fs::metadata(&f.path).unwrap().size(), len as u64);
    }
    stop.send(()).unwrap();
    assert!(watcher.join().unwrap() > 0);
}

#[test]
fn a_read_that_meets_the_end_of_the_file_is_short_without_an_error() {
    let data = pattern(100_100, 2);
    let f = fixture(&data);
    for (offset, len, want) in [
        (0, 200_000, 100_100),
        (98_304, 4096, 1796),
        (100_000, 4096, 100),
        (100_100, 4096, 0),
        (1 << 20, 4096, 0),
        (0, 4096, 4096),
    ] {
        let (progress, bytes) = read(&f.object, offset, len);
        assert_eq!(progress, Progress::complete(want as u64), "{offset}+{len}");
        assert!(bytes == data[(offset as usize).min(data.len())..][..want]);
    }
}

#[test]
fn plain_reads_bring_no_neighbours_into_the_kernels_cache() {
    let data = pattern(1 << 20 | 100, 3);
    let f = fixture(&data);
    f.object.sync(SyncScope::All).unwrap();
    drop_cached(&f.path);
    if cached_pages(&f.path) != Some(0) {
        eprintln!("skipped: fincore is missing, or the filesystem keeps what it was told to drop");
        return;
    }
    assert_eq!(read(&f.object, 1 << 20, 4096).0.done, 100);
    // From the start of the file on, which the kernel takes for the beginning of a sequential read.
    assert_eq!(read(&f.object, 0, 100).0.done, 100);
    assert_eq!(read(&f.object, 100, 200).0.done, 200);
    assert_eq!(cached_pages(&f.path), Some(2));
    // Whole blocks leave nothing there.
    assert_eq!(read(&f.object, 8192, 65_536).0.done, 65_536);
    assert_eq!(cached_pages(&f.path), Some(2));
}

fn drop_cached(path: &Path) {
    let file = std::fs::File::open(path).unwrap();
    file.sync_all().unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
}

/// Counts the pages of the file that are in the kernel's cache (util-linux's fincore).
fn cached_pages(path: &Path) -> Option<u64> {
    let output = Command::new("fincore")
        .args(["--noheadings", "--output", "PAGES"])
        .arg(path)
        .output()
        .ok()?;
    String::from_utf8(output.stdout).ok()?.trim().parse().ok()
}

#[test]
fn a_filesystem_that_refuses_direct_transfers_is_served_plain() {
    for refuse_open in [true, false] {
        if !refuse_open && At(REFUSING.into()).reopen(OFlags::RDWR).is_err() {
            eprintln!("skipped in part: {REFUSING} cannot be opened");
            continue;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let data = pattern(40_000, 4);
        std::fs::write(&path, &data).unwrap();
        let origin = Undirect {
            at: At(path.clone()),
            refuse_open,
        };
        let object = DirObject::new(Arc::new(origin), engine());
        object.grant(true, true).unwrap();
        assert_eq!(object.geometry().direct, !refuse_open);
        let (progress, bytes) = read(&object, 0, 32_768);
        assert_eq!(
            progress,
            Progress::complete(32_768),
            "refuse_open: {refuse_open}"
        );
        assert!(bytes == data[..32_768]);
        assert!(!object.geometry().direct);
        assert_eq!(
            write(&object, 4096, &data[..8192]),
            Progress::complete(8192)
        );
        assert!(std::fs::read(&path).unwrap()[4096..12_288] == data[..8192]);
    }
}

#[test]
fn rights_are_the_openers_and_the_best_are_kept() {
    let f = fixture(&pattern(5000, 5));
    f.object.revoke();
    assert!(f.object.close_idle());
    assert_eq!(f.object.descriptors(), 0);
    let (refused, _) = read(&f.object, 0, 10);
    assert_eq!(refused.stop.unwrap().errno, Errno::EBADF);

    f.object.grant(false, true).unwrap();
    assert!(!f.object.readable());
    assert_eq!(write(&f.object, 0, b"abc").done, 3);
    assert_eq!(read(&f.object, 0, 3).0.stop.unwrap().errno, Errno::EBADF);
    let alone = f.object.descriptors();
    f.object.grant(true, false).unwrap();
    assert_eq!(read(&f.object, 0, 3).1, b"abc");
    assert_eq!(f.object.descriptors(), 2 * alone);
    f.object.grant(true, true).unwrap();
    assert_eq!(f.object.descriptors(), alone, "one pair serves both rights");

    assert!(!f.object.close_idle());
    for _ in 0..3 {
        f.object.revoke();
    }
    assert!(f.object.close_idle());
}

#[test]
fn a_refused_opener_changes_nothing() {
    let f = fixture(b"abc");
    std::fs::remove_file(&f.path).unwrap();
    assert_eq!(f.object.grant(true, true), Err(Errno::ENOENT));
    assert_eq!(
        read(&f.object, 0, 3).1,
        b"abc",
        "the first opener's descriptors stay"
    );
    f.object.revoke();
    assert!(f.object.close_idle());
}

#[test]
fn the_creators_descriptor_is_taken_over_and_appends_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::APPEND | OFlags::NONBLOCK;
    let made = rustix::fs::open(&path, flags, rustix::fs::Mode::from_raw_mode(0o200)).unwrap();
    let object = DirObject::new(Arc::new(At(path.clone())), engine());
    object.adopt(made, true, true).unwrap();
    assert_eq!(
        std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
        0o200
    );
    assert_eq!(write(&object, 0, b"0123456789").done, 10);
    assert_eq!(write(&object, 2, b"xy").done, 2);
    assert_eq!(read(&object, 0, 100).1, b"01xy456789");
}

#[test]
fn running_out_of_descriptors_is_an_error_number() {
    #[derive(Debug)]
    struct Exhausted(At, bool);
    impl Reopen for Exhausted {
        fn reopen(&self, flags: OFlags) -> Result<OwnedFd, Errno> {
            if self.1 == flags.contains(OFlags::DIRECT) {
                return Err(Errno::EMFILE);
            }
            self.0.reopen(flags)
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    std::fs::write(&path, b"abc").unwrap();
    for direct in [true, false] {
        let object = DirObject::new(Arc::new(Exhausted(At(path.clone()), direct)), engine());
        assert_eq!(object.grant(true, false), Err(Errno::EMFILE));
        assert!(object.close_idle(), "a refused opener is not counted");
    }
}

#[test]
fn sizes_space_and_times_are_the_files() {
    let f = fixture(&pattern(100_000, 6));
    f.object.set_len(1 << 20).unwrap();
    assert_eq!(f.object.len().unwrap(), 1 << 20);
    assert_eq!(f.object.seek(Seek::Hole, 0).unwrap(), Some(102_400));
    assert_eq!(f.object.seek(Seek::Data, 200_000).unwrap(), None);
    assert_eq!(f.object.seek(Seek::Hole, 1 << 20).unwrap(), None);
    f.object.allocate(1 << 20..2 << 20).unwrap();
    assert_eq!(
        f.object.len().unwrap(),
        1 << 20,
        "reserving leaves the size alone"
    );
    assert!(f.object.stat().unwrap().stx_blocks * 512 >= (1 << 20) + 100_000);
    f.object.punch(0..8192).unwrap();
    assert!(read(&f.object, 0, 8192).1.iter().all(|&b| b == 0));
    f.object.zero_range(8192..10_000, true).unwrap();
    assert!(read(&f.object, 8192, 1808).1.iter().all(|&b| b == 0));
    let modified = Timespec {
        tv_sec: 1_000_000,
        tv_nsec: 17,
    };
    let before = f.object.stat().unwrap();
    f.object.set_times(modified).unwrap();
    let stat = f.object.stat().unwrap();
    assert_eq!(
        (stat.stx_mtime.tv_sec, stat.stx_mtime.tv_nsec),
        (1_000_000, 17)
    );
    assert_eq!(stat.stx_atime.tv_sec, before.stx_atime.tv_sec);
    f.object.collapse_range(0..4096).unwrap();
    assert_eq!(f.object.len().unwrap(), (1 << 20) - 4096);
    f.object.insert_range(0..4096).unwrap();
    assert_eq!(f.object.len().unwrap(), 1 << 20);
    assert_eq!(f.object.set_len(u64::MAX).unwrap_err().errno, Errno::EINVAL);
}

#[test]
fn what_needs_no_opener_works_without_one() {
    let f = fixture(&pattern(5000, 7));
    f.object.revoke();
    assert!(f.object.close_idle());
    f.object.set_len(100).unwrap();
    assert_eq!(f.object.len().unwrap(), 100);
    f.object.sync(SyncScope::All).unwrap();
    assert_eq!(f.object.descriptors(), 0);
}

#[test]
fn a_full_disk_stops_a_write_with_its_number() {
    let Some(mount) = Mount::tmpfs("size=256k") else {
        eprintln!("skipped: mounting tmpfs needs root");
        return;
    };
    let f = fixture_in(&mount.0, b"", engine());
    let progress = write(&f.object, 0, &pattern(1 << 20, 8));
    let stop = progress.stop.expect("256 KiB do not hold 1 MiB");
    assert_eq!(
        (stop.errno, stop.operation),
        (Errno::ENOSPC, Operation::Write)
    );
    assert_eq!(f.object.len().unwrap(), progress.done);
}

/// A filesystem mounted for a test, unmounted when it ends.
struct Mount(PathBuf, Option<tempfile::TempDir>);

impl Mount {
    fn tmpfs(options: &str) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        Self::at(dir, &["-t", "tmpfs", "-o", options, "tmpfs"])
    }

    /// Makes an xfs in a file and mounts it.
    fn xfs() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        std::fs::File::create(&image)
            .unwrap()
            .set_len(320 << 20)
            .unwrap();
        let made = Command::new("mkfs.xfs").arg("-q").arg(&image).status();
        if !made.is_ok_and(|status| status.success()) {
            return None;
        }
        let image = image.to_str().unwrap().to_owned();
        Self::at(dir, &["-o", "loop", &image])
    }

    fn at(dir: tempfile::TempDir, arguments: &[&str]) -> Option<Self> {
        let at = dir.path().join("mnt");
        std::fs::create_dir(&at).unwrap();
        let mounted = Command::new("mount").args(arguments).arg(&at).status();
        mounted
            .is_ok_and(|status| status.success())
            .then_some(Self(at, Some(dir)))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
        drop(self.1.take());
    }
}

/// Random transfers against bytes in memory.
fn random_against_memory(parent: &Path, backend: Backend, seed: u64) {
    let engine = Engine::start(EngineConfig {
        backend: Some(backend),
        rings: None,
        arena: None,
    })
    .unwrap();
    let f = fixture_in(parent, b"", engine);
    let mut model: Vec<u8> = Vec::new();
    let mut random = Seed::new(seed);
    let size_max = 600_000;
    for step in 0..400u64 {
        let grain = [1, 512, 4096, 4096][random.below(4) as usize];
        let offset = random.below(size_max / grain) * grain;
        let len = (1 + random.below(200_000 / grain)) * grain;
        let (at, n) = (offset as usize, len as usize);
        let about = format!("seed {seed} step {step}: {offset}+{len}");
        match random.below(10) {
            0..4 => {
                let bytes = pattern(n, random.next());
                assert_eq!(
                    write(&f.object, offset, &bytes),
                    Progress::complete(len),
                    "{about}"
                );
                model.resize(model.len().max(at + n), 0);
                model[at..at + n].copy_from_slice(&bytes);
            }
            4..8 => {
                let (progress, bytes) = read(&f.object, offset, n);
                let have = model.get(at..).unwrap_or(&[]);
                assert_eq!(
                    progress,
                    Progress::complete(have.len().min(n) as u64),
                    "{about}"
                );
                assert!(bytes == have[..have.len().min(n)], "{about}");
            }
            8 => {
                f.object.set_len(offset).unwrap();
                model.resize(at, 0);
            }
            _ => match f.object.punch(offset..offset + len) {
                Ok(()) => {
                    let end = model.len().min(at + n);
                    if at < end {
                        model[at..end].fill(0);
                    }
                }
                Err(e) => assert_eq!(e.errno, Errno::EOPNOTSUPP, "{about}"),
            },
        }
        assert_eq!(f.object.len().unwrap(), model.len() as u64, "{about}");
    }
    f.object.sync(SyncScope::Data).unwrap();
    assert!(std::fs::read(&f.path).unwrap() == model, "seed {seed}");
}

#[test]
fn random_transfers_agree_with_memory() {
    for seed in 0..6 {
        random_against_memory(&std::env::temp_dir(), Backend::Ring, seed);
    }
    random_against_memory(&std::env::temp_dir(), Backend::Threads, 100);
}

#[test]
fn random_transfers_agree_with_memory_on_tmpfs() {
    let Some(mount) = Mount::tmpfs("size=64m") else {
        eprintln!("skipped: mounting tmpfs needs root");
        return;
    };
    random_against_memory(&mount.0, Backend::Ring, 200);
}

#[test]
fn random_transfers_agree_with_memory_on_xfs() {
    let Some(mount) = Mount::xfs() else {
        eprintln!("skipped: no mkfs.xfs, or no loop mounts here");
        return;
    };
    for seed in 300..303 {
        random_against_memory(&mount.0, Backend::Ring, seed);
    }
}

#[test]
fn transfers_in_flight_together_do_not_disturb_each_other() {
    let f = fixture(b"");
    let object = &f.object;
    // Neighbouring pages, each thread with an unaligned end in its own last page.
    std::thread::scope(|scope| {
        for t in 0..8u64 {
            scope.spawn(move || {
                for round in 0..40 {
                    let base = t * 65_536;
                    let len = 40_000 + (round * 977 + t * 131) as usize % 20_000;
                    let bytes = pattern(len, round << 8 | t);
                    assert_eq!(write(object, base, &bytes), Progress::complete(len as u64));
                    let (_, back) = read(object, base, len);
                    assert!(back == bytes, "thread {t} round {round}");
                }
            });
        }
    });
}

#[test]
fn the_plain_descriptor_is_not_the_direct_one() {
    let f = fixture(&pattern(8192, 9));
    let pair = f.object.core.pair(Op::Read).unwrap();
    let Some(direct) = &pair.direct else {
        eprintln!("skipped: no direct transfers in the temporary directory");
        return;
    };
    assert_ne!(direct.as_raw_fd(), pair.plain.as_raw_fd());
    let flags = |file: &OwnedFd| rustix::fs::fcntl_getfl(file).unwrap();
    assert!(flags(direct).contains(OFlags::DIRECT));
    assert!(!flags(&pair.plain).contains(OFlags::DIRECT));
    assert!(f.object.geometry().direct);
}

/// Runs in a process of its own: the limit is the whole process's.
#[test]
fn a_limit_lowered_after_the_write_was_acknowledged_does_not_lose_it() {
    let limit = |current| {
        let before = rustix::process::getrlimit(rustix::process::Resource::Fsize);
        let maximum = before.maximum;
        let limit = rustix::process::Rlimit { current, maximum };
        rustix::process::setrlimit(rustix::process::Resource::Fsize, limit).unwrap();
    };
    let fixture = fixture(b"");
    limit(Some(6000));
    let data: Vec<u8> = (0..20_000u32).map(|i| i as u8).collect();
    let mut buf = AlignedBuf::zeroed(data.len());
    buf.as_mut_slice()[..data.len()].copy_from_slice(&data);
    let segments = Segments::of_buf(&Arc::new(buf), data.len());
    let progress = fixture.object.write_wait(0, &segments);
    let still = rustix::process::getrlimit(rustix::process::Resource::Fsize).current;
    limit(None);
    assert_eq!(progress, Progress::complete(20_000));
    assert_eq!(std::fs::read(&fixture.path).unwrap(), data);
    assert_eq!(still, Some(6000), "the program's limit is put back");
}
