use std::sync::OnceLock;

use pinfold_base::Progress;
use pinfold_mem::Segments;
use pinfold_store::testing::MemoryObject;
use pinfold_store::{Geometry, Operation, Seek, StoreResult, Transfer};

use super::*;
use crate::open_options::OpenOptions;
use crate::volume::Volume;

const PAGE: usize = PAGE_SIZE as usize;

/// A store that refuses to be made shorter, and just then background write-back comes by.
#[derive(Debug)]
struct Refusing {
    inner: Arc<MemoryObject>,
    file: OnceLock<Arc<Inode>>,
}

impl Object for Refusing {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn read(&self, batch: Vec<Transfer>) {
        self.inner.read(batch);
    }

    fn write(&self, batch: Vec<Transfer>) {
        self.inner.write(batch);
    }

    fn write_wait(&self, offset: u64, segments: &Segments) -> Progress<StoreError> {
        self.inner.write_wait(offset, segments)
    }

    fn len(&self) -> StoreResult<u64> {
        self.inner.len()
    }

    fn set_len(&self, len: u64) -> StoreResult<()> {
        let Some(file) = self.file.get().filter(|file| file.len() == len) else {
            return self.inner.set_len(len);
        };
        let _pages = file.pages().write_back(0..u64::MAX, Mode::Opportunistic);
        Err(StoreError {
            operation: Operation::SetLen,
            offset: len,
            len: 0,
            errno: Errno::EIO,
        })
    }

    fn allocate(&self, range: Range<u64>) -> StoreResult<()> {
        self.inner.allocate(range)
    }

    fn punch(&self, range: Range<u64>) -> StoreResult<()> {
        self.inner.punch(range)
    }

    fn sync(&self, scope: SyncScope) -> StoreResult<()> {
        self.inner.sync(scope)
    }

    fn seek(&self, what: Seek, offset: u64) -> StoreResult<Option<u64>> {
        self.inner.seek(what, offset)
    }
}

#[test]
fn a_store_that_refuses_to_cut_a_file_loses_nothing_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let store = Arc::new(Refusing {
        inner: MemoryObject::with(b""),
        file: OnceLock::new(),
    });
    let object: Arc<dyn Object> = Arc::clone(&store) as _;
    let volume = Volume::builder()
        .memory(1 << 20)
        .background_interval(Duration::from_secs(3600))
        .object_layer(Arc::new(move |_| Arc::clone(&object)))
        .open_dir(dir.path())
        .unwrap();
    let options = OpenOptions::new().read(true).write(true).create(true);
    let file = volume.open("f", &options).unwrap();
    let written = vec![7; 3 * PAGE];
    file.write_at(&written, 0).unwrap();
    assert!(store.file.set(Arc::clone(file.inode())).is_ok());
    for len in [PAGE + 100, 2 * PAGE, 1] {
        let refused = file.set_len(len as u64).unwrap_err();
        assert_eq!(refused.errno(), Errno::EIO, "{len} bytes");
        let mut back = vec![0; 4 * PAGE];
        assert_eq!(file.read_at(&mut back, 0).unwrap(), written.len());
        assert!(back[..written.len()] == written, "cut to {len} bytes");
    }
}
