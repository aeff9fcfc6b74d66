//! Pages that devices use, through the cache's own door: what a fault in a mapping and a direct transfer from or to one do
//! there, without the mapping.

use std::ops::Range;
use std::sync::Arc;

use pinfold::{Object, PinKind};
use pinfold_cache::writeback::Mode;
use pinfold_cache::{Cache, CacheConfig, FilePages, MEMORY_MIN, Want};
use shuttle::thread::{JoinHandle, yield_now};

use crate::rig::{HALF, Model, P, PAGE, explore, join};
use crate::store::{Device, Mishap};

struct Pages {
    cache: Arc<Cache>,
    file: Arc<FilePages>,
    device: Device,
    model: Arc<Model>,
}

impl Pages {
    fn new(pages: usize) -> Self {
        let device = Device::start(0, Mishap::None);
        device.stored.set_len((pages * PAGE) as u64).unwrap();
        let config = CacheConfig {
            memory: MEMORY_MIN,
            ..CacheConfig::default()
        };
        let cache = Cache::new(config).unwrap();
        let object: Arc<dyn Object> = Arc::clone(&device.stored) as _;
        Self {
            file: FilePages::new(&cache, object, (pages * PAGE) as u64),
            cache,
            device,
            model: Model::new(pages),
        }
    }

    fn task(&self, work: impl FnOnce(&Arc<FilePages>, &Model) + Send + 'static) -> JoinHandle<()> {
        let (file, model) = (Arc::clone(&self.file), Arc::clone(&self.model));
        shuttle::thread::spawn(move || work(&file, &model))
    }

    /// Ends with everything stored, and every page free again.
    fn end(self) {
        self.file.write_back(0..u64::MAX, Mode::Integrity).unwrap();
        let lows = self.model.lows();
        self.model
            .judge(&lows, 0, &self.device.stored.bytes(), "in the store");
        let census = self.cache.census();
        assert_eq!((census.dirty, census.writing), (0, 0), "{census:?}");
        assert_eq!(census.dirty_accounted, 0, "{census:?}");
        assert_eq!((census.locked, census.in_use), (0, 0), "{census:?}");
        let counted = self.cache.statistics();
        assert_eq!(counted.foll_pin_acquired, counted.foll_pin_released);
        {
            let _blocked = self.file.gate().block();
            self.file.discard(0..u64::MAX);
        }
        let census = self.cache.census();
        assert_eq!(census.free, census.frames, "{census:?}");
        self.device.end();
    }
}

fn store(file: &Arc<FilePages>, model: &Model, page: u64) {
    let halves = halves(page);
    let bytes = model.begin(halves.clone());
    let folio = file.write_begin(page, 0, PAGE, false).unwrap();
    folio.write(0, &bytes);
    folio.commit();
    file.note_dirty_file();
    model.done(halves);
}

fn halves(page: u64) -> Range<usize> {
    let first = page as usize * 2;
    first..first + 2
}

/// Has a device write a page's next generation into its memory, in two pieces, if it can be pinned for that.
fn write_pinned(file: &Arc<FilePages>, model: &Model, page: u64) {
    let (pin, None) = file.try_pin_run(page..page + 1, PinKind::Write) else {
        return;
    };
    let mut memory = file.segments();
    pin.push(&mut memory, 0, PAGE);
    let bytes = model.begin(halves(page));
    for part in bytes.chunks(HALF).enumerate() {
        yield_now();
        memory.slice(part.0 * HALF, HALF).copy_from(0, part.1);
    }
    yield_now();
    drop((memory, pin));
    model.done(halves(page));
}

/// Has a device read a page's memory twice, if it can be pinned: what it shows at first may be changed by nobody but the file's
/// writers.
fn read_pinned(file: &Arc<FilePages>, model: &Model, page: u64) {
    let lows = model.lows();
    let (pin, None) = file.try_pin_run(page..page + 1, PinKind::Read) else {
        return;
    };
    let mut memory = file.segments();
    pin.push(&mut memory, 0, PAGE);
    for _ in 0..3 {
        model.judge(&lows, page as usize * PAGE, &memory.to_vec(), "a device");
        yield_now();
    }
    drop((memory, pin));
}

fn load(file: &Arc<FilePages>, model: &Model, page: u64) {
    let lows = model.lows();
    let want = Want {
        pages: 1,
        ahead: None,
        nowait: false,
    };
    let found = file.read(page, &want).unwrap();
    let mut bytes = vec![0; PAGE];
    found.read(0, &mut bytes);
    drop(found);
    model.judge(&lows, page as usize * PAGE, &bytes, "a reader");
}

/// Stores what is dirty of a page and drops it, as a direct write does before it goes to the store.
fn drop_page(file: &Arc<FilePages>, page: u64) {
    let _blocked = file.gate().block();
    file.write_back(page..page + 1, Mode::Integrity).unwrap();
    file.invalidate(page..page + 1);
}

/// E-3, E-4, E-5, E-9, INV3: what a device writes into a page is stored in the end, whoever stores, drops and reads it meanwhile.
#[test]
fn e5_e9_what_a_device_wrote_is_not_lost() {
    explore(500, || {
        let pages = Pages::new(2);
        join([
            pages.task(|file, model| {
                for _ in 0..2 {
                    store(file, model, 0);
                    write_pinned(file, model, 0);
                }
            }),
            pages.task(|file, _| {
                for _ in 0..3 {
                    file.write_back(0..u64::MAX, Mode::Integrity).unwrap();
                }
            }),
            pages.task(|file, model| {
                drop_page(file, 0);
                load(file, model, 0);
                drop_page(file, 0);
            }),
            pages.task(|file, model| {
                load(file, model, 0);
                read_pinned(file, model, 0);
                load(file, model, 0);
            }),
        ]);
        pages.end();
    });
}

/// E-6, E-7: a page that a device uses is not another's before it lets go, cut off or not.
#[test]
fn e6_e7_a_page_that_is_cut_off_stays_its_users() {
    explore(500, || {
        let pages = Pages::new(4);
        join([
            pages.task(|file, model| {
                for _ in 0..2 {
                    store(file, model, 3);
                    model.begin_zeros(halves(3));
                    {
                        let _blocked = file.gate().block();
                        file.object().set_len(3 * P).unwrap();
                        file.truncate(3 * P);
                        file.object().set_len(4 * P).unwrap();
                        file.set_end(4 * P);
                    }
                    model.done(halves(3));
                }
            }),
            pages.task(|file, model| {
                for page in [2, 0, 1, 2] {
                    store(file, model, page);
                    drop_page(file, page);
                }
            }),
            pages.task(|file, model| {
                for _ in 0..3 {
                    read_pinned(file, model, 3);
                }
            }),
        ]);
        pages.end();
    });
}
