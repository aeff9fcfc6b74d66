//! A cache of the least budget, a watchdog, and what is true when nothing is under way.
#![allow(dead_code, reason = "each test uses its part")]

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pinfold_cache::{Cache, CacheConfig, Census, FilePages, MEMORY_MIN, Want};

pub use pinfold_store::testing::within;

pub const PAGE: usize = 4096;
/// How long anything that is not stuck takes at most, however busy the machine.
pub const PATIENCE: Duration = Duration::from_secs(120);
/// Long enough for a thread that is not held up to have gone on.
pub const MOMENT: Duration = Duration::from_millis(100);
/// One page, for a reader without a pattern.
pub const WANT: Want<'static> = Want {
    pages: 1,
    ahead: None,
    nowait: false,
};

/// A cache with its flusher.
pub struct Rig {
    pub cache: Arc<Cache>,
    flusher: Option<JoinHandle<()>>,
}

impl Rig {
    pub fn new() -> Self {
        Self::with(CacheConfig {
            flush_interval: Duration::from_millis(10),
            ..CacheConfig::default()
        })
    }

    pub fn with(config: CacheConfig) -> Self {
        Self::exactly(CacheConfig {
            memory: MEMORY_MIN,
            ..config
        })
    }

    /// With a budget of many chunks, most of them never touched.
    pub fn with_room() -> Self {
        Self::exactly(CacheConfig {
            memory: 64 << 20,
            flush_interval: Duration::from_millis(10),
            ..CacheConfig::default()
        })
    }

    fn exactly(config: CacheConfig) -> Self {
        let cache = Cache::new(config).unwrap();
        let flusher = Some(cache.start_flusher().unwrap());
        Self { cache, flusher }
    }

    /// Fails unless nothing is locked, used, dirty or lent, and every frame is accounted for.
    pub fn is_at_rest(&self) {
        self.comes_to(|now| {
            let busy = [
                now.locked,
                now.in_use,
                now.dirty,
                now.writing,
                now.dirty_accounted,
                now.lent,
            ];
            busy == [0; 6] && now.free + now.valid == now.frames
        });
    }

    /// Fails unless every frame is free again, when all files are gone.
    pub fn is_empty(&self) {
        self.is_at_rest();
        self.comes_to(|now| now.valid == 0 && now.free == now.frames);
    }

    /// Waits: transfers that nobody waits for (read-ahead, the flusher's) may still end, and the flusher lets go of clean
    /// files in its own time.
    fn comes_to(&self, rest: impl Fn(Census) -> bool) {
        let deadline = Instant::now() + PATIENCE / 3;
        while !rest(self.cache.census()) {
            assert!(
                Instant::now() < deadline,
                "never at rest: {:?}",
                self.cache.census()
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.cache.stop_flusher();
        if let Some(flusher) = self.flusher.take() {
            let _ = flusher.join();
        }
    }
}

/// Writes whole pages of `byte`.
pub fn write(file: &Arc<FilePages>, pages: std::ops::Range<u64>, byte: u8) {
    for page in pages {
        let folio = file.write_begin(page, 0, PAGE, false).unwrap();
        folio.write(0, &[byte; PAGE]);
        folio.commit_to((page + 1) * PAGE as u64);
        file.note_dirty_file();
    }
}
