//! What a look-up costs; run by hand in release: `cargo test -p pinfold-cache --release --test cost -- --ignored --nocapture`.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends there")]

use std::time::Instant;

use pinfold_cache::{Cache, CacheConfig, FilePages, Want};
use pinfold_store::testing::{MemoryObject, Seed};

const GETS: u64 = 5_000_000;

fn measure(pages: u64) {
    let config = CacheConfig {
        memory: pages * 4096 * 5 / 4,
        ..CacheConfig::default()
    };
    let cache = Cache::new(config).unwrap();
    let store = MemoryObject::new();
    pinfold_store::Object::set_len(&*store, pages * 4096).unwrap();
    let file = FilePages::new(&cache, store, pages * 4096);
    let want = Want {
        pages: 64,
        ahead: None,
        nowait: false,
    };
    for page in 0..pages {
        let _ = file.read(page, &want).unwrap();
    }
    let mut seed = Seed::new(1);
    let order: Vec<u64> = (0..1 << 16).map(|_| seed.below(pages)).collect();
    let time = |work: &dyn Fn(u64)| {
        let start = Instant::now();
        for i in 0..GETS {
            work(order[i as usize & 0xffff]);
        }
        start.elapsed().as_nanos() as f64 / GETS as f64
    };
    let get = time(&|page| drop(file.get(page).unwrap()));
    let missing = time(&|page| assert!(file.get(page + pages).is_none()));
    let read = time(&|page| drop(file.read(page, &want).unwrap()));
    println!(
        "{pages} pages: get and give back {get:.1} ns, get of a page not there {missing:.1} ns, read {read:.1} ns"
    );
}

#[test]
#[ignore = "a measurement, in release only"]
fn a_get() {
    for pages in [1 << 10, 1 << 14, 1 << 17] {
        measure(pages);
    }
}
