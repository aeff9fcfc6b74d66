//! A volume with one file over a store of the test's making, and a watchdog.

use std::sync::Arc;
use std::time::Duration;

use pinfold::{File, MEMORY_MIN, Object, OpenOptions, Volume};

pub use pinfold::testing::within;

/// How long anything that is not stuck takes at most, however busy the machine.
pub const PATIENCE: Duration = Duration::from_secs(120);
/// Long enough for a thread that is not held up to have gone on.
pub const MOMENT: Duration = Duration::from_millis(100);

/// A volume whose only file is stored in an object of the test's making.
pub struct Rig {
    pub volume: Volume,
    _dir: tempfile::TempDir,
}

impl Rig {
    /// Makes one of the least budget, whose background write-back stays out of scripts.
    pub fn new(object: Arc<dyn Object>) -> Self {
        Self::with_interval(object, Duration::from_secs(3600))
    }

    pub fn with_interval(object: Arc<dyn Object>, interval: Duration) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::builder()
            .memory(MEMORY_MIN)
            .background_interval(interval)
            .dirty_age_max(interval)
            .object_layer(Arc::new(move |_| Arc::clone(&object)))
            .open_dir(dir.path())
            .unwrap();
        Self { volume, _dir: dir }
    }

    pub fn open(&self, direct: bool) -> Arc<File> {
        let options = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .direct(direct);
        Arc::new(self.volume.open("file", &options).unwrap())
    }
}

/// Reads a whole range, failing on errors.
pub fn read(file: &File, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xee; len];
    let got = file.read_at(&mut bytes, offset).unwrap();
    bytes.truncate(got);
    bytes
}

/// Fails unless every byte is `byte`.
#[track_caller]
pub fn all(bytes: &[u8], byte: u8, what: &str) {
    let wrong = bytes.iter().position(|&b| b != byte);
    assert_eq!(
        wrong,
        None,
        "{what}: byte {wrong:?} of {} is not {byte:#x}",
        bytes.len()
    );
}
