use std::any::Any;
use std::io::Write as _;
use std::os::fd::AsRawFd;
use std::sync::mpsc::channel;
use std::time::Duration;

use super::*;
use crate::span::AlignedBuf;

const PAGE: usize = 4096;
const PATIENCE: Duration = Duration::from_secs(120);

fn start(backend: Backend, arena: Option<Arc<Arena>>) -> Arc<Engine> {
    Engine::start(EngineConfig {
        backend: Some(backend),
        rings: Some(1),
        arena,
    })
    .unwrap()
}

/// A file of `bytes` bytes, byte i being `pattern(i)`.
fn file(bytes: usize) -> Arc<OwnedFd> {
    let mut file = tempfile::tempfile().unwrap();
    let data: Vec<u8> = (0..bytes).map(pattern).collect();
    file.write_all(&data).unwrap();
    Arc::new(OwnedFd::from(file))
}

fn pattern(at: usize) -> u8 {
    (at.wrapping_mul(2_654_435_761) >> 13) as u8
}

fn request(
    op: Op,
    file: &Arc<OwnedFd>,
    offset: u64,
    segments: Segments,
    done: impl FnOnce(Progress<Errno>) + Send + 'static,
) -> Request {
    Request {
        op,
        file: Arc::clone(file),
        offset,
        segments,
        block: 1,
        done: Box::new(done),
    }
}

/// Runs one transfer and waits, with a watchdog.
fn run(
    engine: &Engine,
    op: Op,
    file: &Arc<OwnedFd>,
    offset: u64,
    segments: Segments,
) -> Progress<Errno> {
    let (tell, told) = channel();
    engine.submit([request(op, file, offset, segments, move |p| {
        tell.send(p).unwrap();
    })]);
    told.recv_timeout(PATIENCE).expect("the transfer must end")
}

fn both(check: impl Fn(Backend)) {
    check(Backend::Ring);
    check(Backend::Threads);
}

#[test]
fn a_read_brings_the_bytes_and_stops_at_the_end_of_the_file() {
    both(|backend| {
        let engine = start(backend, None);
        assert_eq!(engine.backend(), backend);
        let file = file(10_000);
        let buf = Arc::new(AlignedBuf::zeroed(8192));
        let got = run(&engine, Op::Read, &file, 5000, Segments::of_buf(&buf, 8192));
        assert_eq!(got, Progress::complete(5000));
        let bytes = Segments::of_buf(&buf, 5000).to_vec();
        assert!(
            bytes
                .iter()
                .enumerate()
                .all(|(i, &b)| b == pattern(5000 + i))
        );
        let got = run(&engine, Op::Read, &file, 20_000, Segments::of_buf(&buf, 10));
        assert_eq!(got, Progress::complete(0));
    });
}

#[test]
fn fragments_are_written_in_file_order() {
    both(|backend| {
        let engine = start(backend, None);
        let file = file(0);
        let buf = Arc::new(AlignedBuf::zeroed(64 * PAGE));
        let mut segments = Segments::new(Arc::clone(&buf) as Arc<dyn Any + Send + Sync>);
        for i in (0..64).rev() {
            // SAFETY: inside `buf`, which `segments` keeps.
            unsafe { segments.push_raw(buf.as_ptr().wrapping_add(i * PAGE), 100) };
        }
        let data: Vec<u8> = (0..6400).map(pattern).collect();
        segments.copy_from(0, &data);
        assert_eq!(
            run(&engine, Op::Write, &file, 7, segments),
            Progress::complete(6400)
        );
        let back = Arc::new(AlignedBuf::zeroed(6400));
        let back_segments = Segments::of_buf(&back, 6400);
        assert_eq!(Engine::read_wait(&file, 7, &back_segments, 1).done, 6400);
        assert_eq!(back_segments.to_vec(), data);
    });
}

#[test]
fn an_error_comes_with_its_number_and_nothing_done() {
    both(|backend| {
        let engine = start(backend, None);
        let read_only = Arc::new(OwnedFd::from(
            std::fs::File::open("/proc/self/exe").unwrap(),
        ));
        let buf = Arc::new(AlignedBuf::zeroed(PAGE));
        let segments = || Segments::of_buf(&buf, PAGE);
        let got = run(&engine, Op::Write, &read_only, 0, segments());
        assert_eq!(got, Progress::stopped(0, Errno::EBADF));
        // All ones would mean the file position to a ring.
        for offset in [u64::MAX, FILE_SIZE_MAX - 1] {
            let got = run(&engine, Op::Read, &read_only, offset, segments());
            assert_eq!(got, Progress::stopped(0, Errno::EINVAL));
        }
        let nothing = Segments::of_buf(&buf, 0);
        assert_eq!(
            run(&engine, Op::Read, &read_only, 0, nothing),
            Progress::complete(0)
        );
    });
}

#[test]
fn the_prefix_before_unreadable_memory_is_reported() {
    both(|backend| {
        let engine = start(backend, None);
        let file = file(0);
        let buf = Arc::new(AlignedBuf::zeroed(PAGE));
        let mut segments = Segments::of_buf(&buf, PAGE);
        // SAFETY: never accessed by us; the kernel answers EFAULT for it, which is what is tested.
        unsafe { segments.push_raw(std::ptr::without_provenance_mut(PAGE), PAGE) };
        let got = run(&engine, Op::Write, &file, 0, segments);
        assert_eq!(got, Progress::stopped(PAGE as u64, Errno::EFAULT));
    });
}

#[test]
fn more_requests_than_fit_wait_in_the_list_and_all_end() {
    both(|backend| {
        let engine = start(backend, None);
        let file = file(64 * PAGE);
        let (tell, told) = channel();
        let count = 40 * IN_FLIGHT_MAX;
        let batch: Vec<_> = (0..count)
            .map(|i| {
                let buf = Arc::new(AlignedBuf::zeroed(PAGE));
                let page = i * 7 % 64;
                let segments = Segments::of_buf(&buf, PAGE);
                let tell = tell.clone();
                request(
                    Op::Read,
                    &file,
                    (page * PAGE) as u64,
                    segments.clone(),
                    move |p| {
                        let bytes = segments.to_vec();
                        let right = (0..PAGE).all(|i| bytes[i] == pattern(page * PAGE + i));
                        tell.send((p, right)).unwrap();
                    },
                )
            })
            .collect();
        engine.submit(batch);
        for _ in 0..count {
            let (progress, right) = told.recv_timeout(PATIENCE).unwrap();
            assert_eq!(progress, Progress::complete(PAGE as u64));
            assert!(right);
        }
    });
}

#[test]
fn completions_may_submit_even_when_every_slot_is_taken() {
    both(|backend| {
        let engine = start(backend, None);
        let file = file(PAGE);
        let (tell, told) = channel();
        fn chain(
            engine: &Arc<Engine>,
            file: &Arc<OwnedFd>,
            left: usize,
            tell: std::sync::mpsc::Sender<()>,
        ) {
            let (next, again) = (Arc::clone(engine), Arc::clone(file));
            let buf = Arc::new(AlignedBuf::zeroed(PAGE));
            engine.submit([request(
                Op::Read,
                file,
                0,
                Segments::of_buf(&buf, PAGE),
                move |p| {
                    assert_eq!(p.done, PAGE as u64);
                    if left == 0 {
                        tell.send(()).unwrap();
                    } else {
                        chain(&next, &again, left - 1, tell);
                    }
                },
            )]);
        }
        let chains = 4 * IN_FLIGHT_MAX;
        for _ in 0..chains {
            chain(&engine, &file, 10, tell.clone());
        }
        for _ in 0..chains {
            told.recv_timeout(PATIENCE).expect("the chain must end");
        }
    });
}

#[test]
fn dropping_the_engine_waits_for_what_was_submitted() {
    both(|backend| {
        let file = file(0);
        let ended = Arc::new(AtomicUsize::new(0));
        let count = 5 * IN_FLIGHT_MAX;
        let engine = start(backend, None);
        for i in 0..count {
            let buf = Arc::new(AlignedBuf::zeroed(PAGE));
            let ended = Arc::clone(&ended);
            let at = (i * PAGE) as u64;
            engine.submit([request(
                Op::Write,
                &file,
                at,
                Segments::of_buf(&buf, PAGE),
                move |p| {
                    assert_eq!(p, Progress::complete(PAGE as u64));
                    ended.fetch_add(1, Ordering::Relaxed);
                },
            )]);
        }
        drop(engine);
        assert_eq!(ended.load(Ordering::Relaxed), count);
        assert_eq!(
            rustix::fs::fstat(&file).unwrap().st_size as usize,
            count * PAGE
        );
    });
}

#[test]
fn the_last_handle_may_go_with_a_completion() {
    both(|backend| {
        let engine = start(backend, None);
        let file = file(PAGE);
        let (tell, told) = channel();
        let (go, gone) = channel::<()>();
        let buf = Arc::new(AlignedBuf::zeroed(PAGE));
        let handle = Arc::clone(&engine);
        engine.submit([request(
            Op::Read,
            &file,
            0,
            Segments::of_buf(&buf, PAGE),
            move |_| {
                gone.recv().unwrap();
                drop(handle);
                tell.send(()).unwrap();
            },
        )]);
        drop(engine);
        go.send(()).unwrap();
        told.recv_timeout(PATIENCE)
            .expect("dropping in a completion must not wait for itself");
    });
}

#[test]
fn a_panic_in_a_completion_stays_with_its_request() {
    both(|backend| {
        let engine = start(backend, None);
        let file = file(PAGE);
        let buf = Arc::new(AlignedBuf::zeroed(PAGE));
        engine.submit([request(
            Op::Read,
            &file,
            0,
            Segments::of_buf(&buf, PAGE),
            |_| {
                std::panic::resume_unwind(Box::new("deliberate"));
            },
        )]);
        let got = run(&engine, Op::Read, &file, 0, Segments::of_buf(&buf, PAGE));
        assert_eq!(got, Progress::complete(PAGE as u64));
        drop(engine);
    });
}

#[test]
fn descriptor_and_memory_are_released_before_the_completion_runs() {
    both(|backend| {
        let engine = start(backend, None);
        let file = file(PAGE);
        let watch = Arc::downgrade(&file);
        let buf = Arc::new(AlignedBuf::zeroed(PAGE));
        let memory = Arc::downgrade(&buf);
        let segments = Segments::of_buf(&buf, PAGE);
        drop(buf);
        let (tell, told) = channel();
        engine.submit([Request {
            op: Op::Read,
            file,
            offset: 0,
            segments,
            block: 1,
            done: Box::new(move |_| {
                tell.send((watch.strong_count(), memory.strong_count()))
                    .unwrap();
            }),
        }]);
        assert_eq!(told.recv_timeout(PATIENCE).unwrap(), (0, 0));
    });
}

#[test]
fn arena_frames_are_transferred_through_fixed_buffers_across_chunks() {
    let arena = Arena::new(12 << 20).unwrap();
    let mut segments = arena.segments();
    let mut left = arena.frames_max() as u32;
    while left > 0 {
        let run = arena.alloc(left).unwrap().unwrap();
        left -= run.len;
        for frame in run.frames() {
            arena.push_frame(&mut segments, frame, 0, PAGE);
        }
    }
    let total = segments.bytes();
    let data: Vec<u8> = (0..total).map(pattern).collect();
    segments.copy_from(0, &data);
    let engine = start(Backend::Ring, Some(Arc::clone(&arena)));
    let file = file(0);
    assert_eq!(
        run(&engine, Op::Write, &file, 0, segments.clone()),
        Progress::complete(total as u64)
    );
    segments.copy_from(0, &vec![0; total]);
    assert_eq!(
        run(&engine, Op::Read, &file, 0, segments.clone()),
        Progress::complete(total as u64)
    );
    assert!(segments.to_vec() == data);
    // RLIMIT_MEMLOCK may end the registration early; what lies beyond travels as one plain piece.
    let (fixed, ready) = (engine.fixed_chunks(), arena.chunks_ready());
    if fixed < ready {
        eprintln!("skipped in part: {fixed} of {ready} chunks could be registered");
    }
    assert_eq!(engine.is_registered(&segments), fixed > 0);
    let statistics = engine.statistics();
    assert_eq!(statistics.pieces_fixed, 2 * fixed as u64);
    assert_eq!(statistics.pieces_plain, 2 * u64::from(fixed < ready));
}

#[test]
fn memory_that_was_given_back_is_not_read_into_as_a_fixed_buffer() {
    let arena = Arena::new(64 * PAGE as u64).unwrap();
    let page_of = |frame| {
        let mut segments = arena.segments();
        arena.push_frame(&mut segments, frame, 0, PAGE);
        segments
    };
    let frame = arena.alloc(1).unwrap().unwrap().start;
    let data: Vec<u8> = (0..PAGE).map(pattern).collect();
    page_of(frame).copy_from(0, &data);
    let engine = start(Backend::Ring, Some(Arc::clone(&arena)));
    let file = file(0);
    let whole = Progress::complete(PAGE as u64);
    assert_eq!(run(&engine, Op::Write, &file, 0, page_of(frame)), whole);
    let fixed = engine.statistics().pieces_fixed;
    arena.free(frame);
    let (granule, _) = arena.emptiest(&[]).unwrap();
    assert!(arena.retire(granule.start));
    // All frames there are, the ones of the granule among them: its memory is new.
    while let Some(frames) = arena.alloc(64).unwrap() {
        for frame in frames.frames() {
            assert_eq!(run(&engine, Op::Read, &file, 0, page_of(frame)), whole);
            assert!(page_of(frame).to_vec() == data, "{frame:?}");
        }
    }
    assert_eq!(engine.statistics().pieces_fixed, fixed);
}

#[test]
fn many_threads_read_and_write_one_file_and_every_byte_is_right() {
    both(|backend| {
        let arena = Arena::new(8 << 20).unwrap();
        let engine = Engine::start(EngineConfig {
            backend: Some(backend),
            rings: Some(2),
            arena: Some(Arc::clone(&arena)),
        })
        .unwrap();
        let file = file(0);
        std::thread::scope(|scope| {
            for t in 0..8usize {
                let (engine, file, arena) = (&engine, &file, &arena);
                scope.spawn(move || {
                    let base = t * 64 * PAGE;
                    for round in 0..50usize {
                        let at = base + (round * 13 % 56) * PAGE;
                        let pages = 1 + round % 8;
                        let mut segments = arena.segments();
                        let mut frames = Vec::new();
                        while frames.len() < pages {
                            let run = arena.alloc((pages - frames.len()) as u32).unwrap().unwrap();
                            frames.extend(run.frames());
                        }
                        for &frame in &frames {
                            arena.push_frame(&mut segments, frame, 0, PAGE);
                        }
                        let data: Vec<u8> =
                            (0..pages * PAGE).map(|i| pattern(at + i + round)).collect();
                        segments.copy_from(0, &data);
                        let full = Progress::complete((pages * PAGE) as u64);
                        assert_eq!(
                            run(engine, Op::Write, file, at as u64, segments.clone()),
                            full
                        );
                        segments.copy_from(0, &vec![0; pages * PAGE]);
                        assert_eq!(
                            run(engine, Op::Read, file, at as u64, segments.clone()),
                            full
                        );
                        assert!(segments.to_vec() == data);
                        arena.free_all(&frames);
                    }
                });
            }
        });
        let statistics = engine.statistics();
        assert_eq!(statistics.submitted, 800);
        drop(engine);
    });
}

/// Runs a test of this binary again in a process of its own, where it may change limits; `None` in that process.
fn in_child(name: &str) -> Option<std::process::Output> {
    const MARK: &str = "PINFOLD_TEST_CHILD";
    if std::env::var_os(MARK).is_some() {
        return None;
    }
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(MARK, "1")
        .output()
        .unwrap();
    Some(child)
}

#[test]
fn without_locked_memory_transfers_work_and_nothing_is_fixed() {
    let name = "uring::tests::without_locked_memory_transfers_work_and_nothing_is_fixed";
    if let Some(child) = in_child(name) {
        assert!(child.status.success(), "{child:?}");
        return;
    }
    drop_ipc_lock();
    let none = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: a plain system call on a valid struct; this process runs this test alone.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &none) }, 0);
    let arena = Arena::new(8 << 20).unwrap();
    let frame = arena.alloc(1).unwrap().unwrap().start;
    let mut segments = arena.segments();
    arena.push_frame(&mut segments, frame, 0, PAGE);
    let engine = Engine::start(EngineConfig::automatic(Some(arena))).unwrap();
    let got = run(&engine, Op::Read, &file(PAGE), 0, segments);
    assert_eq!(got, Progress::complete(PAGE as u64));
    assert_eq!(engine.fixed_chunks(), 0);
    assert_eq!(engine.statistics().pieces_fixed, 0);
}

/// Gives up CAP_IPC_LOCK, under which RLIMIT_MEMLOCK does not count.
fn drop_ipc_lock() {
    use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
    let mut sets = capabilities(None).unwrap();
    sets.effective.remove(CapabilitySet::IPC_LOCK);
    sets.permitted.remove(CapabilitySet::IPC_LOCK);
    set_capabilities(None, sets).unwrap();
}

#[test]
fn a_write_beyond_the_file_size_limit_is_an_error_and_not_a_signal() {
    let name = "uring::tests::a_write_beyond_the_file_size_limit_is_an_error_and_not_a_signal";
    if let Some(child) = in_child(name) {
        assert!(child.status.success(), "{child:?}");
        return;
    }
    let limit = libc::rlimit {
        rlim_cur: 8192,
        rlim_max: 8192,
    };
    // SAFETY: a plain system call on a valid struct; this process runs this test alone.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_FSIZE, &limit) }, 0);
    both(|backend| {
        let engine = start(backend, None);
        let buf = Arc::new(AlignedBuf::zeroed(PAGE));
        let got = run(
            &engine,
            Op::Write,
            &file(0),
            8192,
            Segments::of_buf(&buf, PAGE),
        );
        assert_eq!(got, Progress::stopped(0, Errno::EFBIG));
    });
    // In the calling thread the kernel cuts a write short before it signals: what is left is not tried.
    let buf = Arc::new(AlignedBuf::zeroed(2 * PAGE));
    let got = Engine::write_wait(&file(0), 4096, &Segments::of_buf(&buf, 2 * PAGE), 1);
    assert_eq!(got, Progress::stopped(4096, Errno::EFBIG));
}

#[test]
fn a_refused_ring_falls_back_to_threads() {
    let name = "uring::tests::a_refused_ring_falls_back_to_threads";
    if let Some(child) = in_child(name) {
        assert!(child.status.success(), "{child:?}");
        return;
    }
    refuse_io_uring();
    let refused = Engine::start(EngineConfig {
        backend: Some(Backend::Ring),
        rings: None,
        arena: None,
    });
    assert_eq!(refused.err(), Some(Errno::EPERM));
    let engine = Engine::start(EngineConfig::automatic(None)).unwrap();
    assert_eq!(engine.backend(), Backend::Threads);
    let buf = Arc::new(AlignedBuf::zeroed(PAGE));
    let got = run(
        &engine,
        Op::Read,
        &file(PAGE),
        0,
        Segments::of_buf(&buf, PAGE),
    );
    assert_eq!(got, Progress::complete(PAGE as u64));
}

/// Makes io_uring_setup answer EPERM in this thread and those it starts, as container runtimes do.
fn refuse_io_uring() {
    let statement = |code: u32, jt: u8, k: u32| libc::sock_filter {
        code: code as u16,
        jt,
        jf: 0,
        k,
    };
    let load = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    let mut filter = [
        statement(load, 0, 0),
        libc::sock_filter {
            jf: 1,
            ..statement(
                libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
                0,
                libc::SYS_io_uring_setup as u32,
            )
        },
        statement(
            libc::BPF_RET | libc::BPF_K,
            0,
            libc::SECCOMP_RET_ERRNO | libc::EPERM as u32,
        ),
        statement(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: plain values.
    let no_more = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    assert_eq!(no_more, 0);
    // SAFETY: the program is valid and outlives the call, which copies it.
    let set = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program) };
    assert_eq!(set, 0);
}

#[test]
fn a_direct_read_across_the_end_of_the_file_is_short() {
    let mut named = tempfile::NamedTempFile::new().unwrap();
    let data: Vec<u8> = (0..6000).map(pattern).collect();
    named.write_all(&data).unwrap();
    named.as_file().sync_all().unwrap();
    let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECT;
    let Ok(direct) = rustix::fs::open(named.path(), flags, rustix::fs::Mode::empty()) else {
        eprintln!("skipped: no O_DIRECT in {}", named.path().display());
        return;
    };
    let direct = Arc::new(direct);
    assert!(direct.as_raw_fd() >= 0);
    both(|backend| {
        let engine = start(backend, None);
        let buf = Arc::new(AlignedBuf::zeroed(4 * PAGE));
        let (tell, told) = channel();
        engine.submit([Request {
            block: 512,
            ..request(
                Op::Read,
                &direct,
                0,
                Segments::of_buf(&buf, 4 * PAGE),
                move |p| {
                    tell.send(p).unwrap();
                },
            )
        }]);
        assert_eq!(
            told.recv_timeout(PATIENCE).unwrap(),
            Progress::complete(6000)
        );
        assert!(Segments::of_buf(&buf, 6000).to_vec() == data);
    });
}
