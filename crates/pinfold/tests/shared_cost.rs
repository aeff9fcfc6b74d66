//! What glocks cost a node that is alone with its files: ratios within one run.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::hint::black_box;
use std::time::Instant;

use pinfold::glocks::{Options, service::local::Local};
use pinfold::{File, OpenOptions, Volume};

const PAGE: usize = 4096;
const CALLS: u32 = 100_000;
const ROUNDS: usize = 9;

/// Time of one call, the median of several rounds.
fn cost(call: &dyn Fn()) -> f64 {
    let mut times: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            let start = Instant::now();
            (0..CALLS).for_each(|_| call());
            start.elapsed().as_secs_f64()
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[ROUNDS / 2]
}

fn file_of(volume: &Volume) -> File {
    let options = OpenOptions::new().read(true).write(true).create(true);
    let file = volume.open("f", &options).unwrap();
    file.write_at(&[1; 16 * PAGE], 0).unwrap();
    file
}

#[test]
#[ignore = "a measurement, in release only"]
fn calls_under_a_cached_glock_against_calls_without_glocks() {
    let dirs = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let plain = Volume::builder().open_dir(dirs[0].path()).unwrap();
    let node = Volume::builder()
        .join(&Local::new(), "alone", Options::default())
        .unwrap()
        .open_dir(dirs[1].path())
        .unwrap();
    let files = [file_of(&plain), file_of(&node)];
    let ratio = |what: &str, call: &dyn Fn(&File)| {
        let [without, with] = [&files[0], &files[1]].map(|file| cost(&|| call(file)));
        println!("{what}: {:.2}", with / without);
    };
    ratio("reading 4 KiB that are cached", &|file| {
        let mut buf = [0; PAGE];
        file.read_at(black_box(&mut buf), PAGE as u64).unwrap();
    });
    ratio("writing 4 KiB that are cached", &|file| {
        file.write_at(black_box(&[2; PAGE]), PAGE as u64).unwrap();
    });
    ratio("asking for the size", &|file| {
        black_box(file.len());
    });
    let counts = node.glocks().unwrap().report();
    let asked: u64 = counts.iter().map(|report| report.counts.asked).sum();
    // The directory, the file as it is opened, and as it is written.
    assert!(asked <= 4, "{asked} requests to the service");
}
