use std::sync::OnceLock;

use pinfold_base::Progress;
use pinfold_mem::Segments;
use pinfold_store::testing::MemoryObject;
use pinfold_store::{Geometry, Operation, Seek, StoreResult, Transfer};

use super::*;
use crate::open_options::OpenOptions;
use crate::volume::Volume;

const PAGE: usize = PAGE_SIZE as usize;

/// A store that refuses to make a file shorter, if it is told which, and just then background write-back comes by. It may be
/// told to boast: of waited-for transfers it claims a page more than it was given.
#[derive(Debug)]
struct Refusing {
    inner: Arc<MemoryObject>,
    file: OnceLock<Arc<Inode>>,
    boasts: bool,
}

impl Refusing {
    fn new(boasts: bool) -> Arc<Self> {
        Arc::new(Self {
            inner: MemoryObject::with(b""),
            file: OnceLock::new(),
            boasts,
        })
    }

    fn tell(&self, mut moved: Progress<StoreError>) -> Progress<StoreError> {
        if self.boasts {
            moved.done += PAGE_SIZE;
        }
        moved
    }
}

fn volume_over(store: &Arc<Refusing>, dir: &std::path::Path) -> Volume {
    let object: Arc<dyn Object> = Arc::clone(store) as _;
    Volume::builder()
        .memory(1 << 20)
        .background_interval(Duration::from_secs(3600))
        .object_layer(Arc::new(move |_| Arc::clone(&object)))
        .open_dir(dir)
        .unwrap()
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
        self.tell(self.inner.write_wait(offset, segments))
    }

    fn read_wait(&self, offset: u64, segments: &Segments) -> Progress<StoreError> {
        self.tell(self.inner.read_wait(offset, segments))
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
    let store = Refusing::new(false);
    let volume = volume_over(&store, dir.path());
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

#[test]
fn no_more_is_read_or_written_than_was_asked_for_whatever_the_store_claims() {
    let dir = tempfile::tempdir().unwrap();
    let store = Refusing::new(true);
    let volume = volume_over(&store, dir.path());
    let options = OpenOptions::new().read(true).write(true).create(true);
    let file = volume.open("f", &options.direct(true)).unwrap();
    let mut buf = vec![7; 3 * PAGE];
    assert_eq!(file.write_at(&buf, 0).unwrap(), buf.len());
    assert_eq!(file.len(), buf.len() as u64);
    assert_eq!(file.read_at(&mut buf, 0).unwrap(), buf.len());
    assert_eq!(file.read_at(&mut buf[..PAGE], 0).unwrap(), PAGE);
    assert!(buf == store.inner.bytes());
}
