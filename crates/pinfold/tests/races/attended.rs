//! Submitted reads of files of a directory, which whoever waits for them reaps.

use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use pinfold::{AlignedBuf, File, MEMORY_MIN, OpenOptions, Pending, Volume};

use crate::rig::{PATIENCE, all, within};

const PAGE: usize = 4096;
const P: u64 = 4096;
/// Background write-back is to stay out of it.
const HOUR: Duration = Duration::from_secs(3600);

/// A directory with a file of pages that each hold their number.
struct Numbered {
    volume: Volume,
    dir: tempfile::TempDir,
}

impl Numbered {
    fn new(pages: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let bytes: Vec<u8> = (0..pages * PAGE).map(|at| (at / PAGE) as u8).collect();
        std::fs::write(dir.path().join("file"), bytes).unwrap();
        let volume = Volume::builder()
            .memory(MEMORY_MIN)
            .background_interval(HOUR)
            .dirty_age_max(HOUR)
            .open_dir(dir.path())
            .unwrap();
        Self { volume, dir }
    }

    fn open(&self, direct: bool) -> Arc<File> {
        let options = OpenOptions::new().read(true).write(true).direct(direct);
        Arc::new(self.volume.open("file", &options).unwrap())
    }
}

fn submit(file: &Arc<File>, page: u64) -> Pending<AlignedBuf> {
    file.submit_read(AlignedBuf::zeroed(PAGE), page * P)
        .unwrap()
}

fn ends_with(read: Pending<AlignedBuf>, page: u64) {
    let mut read = read.wait();
    assert_eq!(read.progress.posix().unwrap(), P);
    all(read.buf.as_mut_slice(), page as u8, "one page");
}

/// Each thread waits for what others have submitted, so that whose read has ended and who reaps it are seldom the same.
#[test]
fn reads_end_whoever_has_submitted_them_and_whoever_reaps() {
    const PAGES: u64 = 200;
    const THREADS: u64 = 4;
    within(PATIENCE, || {
        let numbered = Numbered::new(PAGES as usize);
        let direct = numbered.open(true);
        std::thread::scope(|scope| {
            let (mut tells, tolds): (Vec<_>, Vec<_>) = (0..THREADS).map(|_| channel()).unzip();
            // Each tells the next.
            tells.rotate_left(1);
            for (first, (tell, told)) in (0..).zip(tells.into_iter().zip(tolds)) {
                let direct = &direct;
                scope.spawn(move || {
                    for page in (first..PAGES).step_by(THREADS as usize) {
                        tell.send((submit(direct, page), page)).unwrap();
                    }
                    drop(tell);
                    for (read, page) in told {
                        ends_with(read, page);
                    }
                });
            }
        });
    });
}

#[test]
fn a_read_that_is_only_looked_at_ends() {
    within(PATIENCE, || {
        let numbered = Numbered::new(8);
        let direct = numbered.open(true);
        for page in 0..8 {
            let mut read = submit(&direct, page);
            while !read.is_done() {
                std::thread::yield_now();
            }
            ends_with(read, page);
            read = submit(&direct, page);
            let completed = loop {
                match read.try_wait() {
                    Ok(completed) => break completed,
                    Err(not_yet) => read = not_yet,
                }
            };
            assert_eq!(completed.progress.posix().unwrap(), P);
        }
    });
}

/// Tells that it was dropped.
struct Told(AlignedBuf, Sender<()>);

impl AsMut<[u8]> for Told {
    fn as_mut(&mut self) -> &mut [u8] {
        self.0.as_mut_slice()
    }
}

impl Drop for Told {
    fn drop(&mut self) {
        let _ = self.1.send(());
    }
}

#[test]
fn a_dropped_read_ends_although_nobody_waits_for_it() {
    within(PATIENCE, || {
        let numbered = Numbered::new(8);
        let direct = numbered.open(true);
        for page in 0..8 {
            let (tell, told) = channel();
            let buf = Told(AlignedBuf::zeroed(PAGE), tell);
            drop(direct.submit_read(buf, page * P).unwrap());
            told.recv_timeout(PATIENCE).unwrap();
        }
    });
}

/// A read keeps its file open, which is written back when the last lets go of it.
#[test]
fn a_read_that_nobody_looks_at_lets_go_of_its_file() {
    within(PATIENCE, || {
        let numbered = Numbered::new(4);
        let (file, direct) = (numbered.open(false), numbered.open(true));
        let read = submit(&direct, 2);
        file.write_at(&[b'n'; PAGE], 0).unwrap();
        drop((file, direct));
        let stored = || std::fs::read(numbered.dir.path().join("file")).unwrap()[0];
        while stored() != b'n' {
            std::thread::yield_now();
        }
        ends_with(read, 2);
    });
}

/// Bytes behind the end of the store's file, which somebody has made shorter, are zeros.
#[test]
fn a_read_that_the_store_ends_early_is_made_again_by_a_call() {
    within(PATIENCE, || {
        let numbered = Numbered::new(4);
        let direct = numbered.open(true);
        let cut = std::fs::File::options()
            .write(true)
            .open(numbered.dir.path().join("file"))
            .unwrap();
        cut.set_len(2 * P).unwrap();
        let mut read = direct
            .submit_read(AlignedBuf::zeroed(3 * PAGE), P)
            .unwrap()
            .wait();
        assert_eq!(read.progress.posix().unwrap(), 3 * P);
        let bytes = read.buf.as_mut_slice();
        all(&bytes[..PAGE], 1, "stored");
        all(&bytes[PAGE..], 0, "behind the end of the store's file");
    });
}
