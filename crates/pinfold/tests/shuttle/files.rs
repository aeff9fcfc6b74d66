//! Calls on a file through the public door.

use std::sync::Arc;

use pinfold::File;
use shuttle::rand::Rng;
use shuttle::thread::JoinHandle;

use crate::rig::{HALF, Model, P, PAGE, Rig, Setting, explore, join};
use crate::store::Mishap;

/// Starts a task of the scheduler that works on a file.
fn task(
    file: &Arc<File>,
    model: &Arc<Model>,
    work: impl FnOnce(&File, &Model) + Send + 'static,
) -> JoinHandle<()> {
    let (file, model) = (Arc::clone(file), Arc::clone(model));
    shuttle::thread::spawn(move || work(&file, &model))
}

/// A rig with a file of zeros.
fn zeros(setting: &Setting, pages: usize) -> (Rig, Arc<File>, Arc<Model>) {
    let rig = Rig::new(setting);
    let file = rig.open(false);
    file.set_len((pages * PAGE) as u64).unwrap();
    (rig, file, Model::new(pages))
}

#[test]
fn buffered_calls_write_back_and_eviction_agree() {
    explore(300, || {
        let (rig, file, model) = zeros(&Setting::default(), 2);
        join([
            task(&file, &model, |file, model| {
                model.write(file, 0..2);
                // Not a whole page: the rest of it has to be there.
                model.write(file, 1..2);
                model.write(file, 0..1);
            }),
            task(&file, &model, |file, model| {
                model.write(file, 3..4);
                model.write(file, 2..4);
            }),
            task(&file, &model, |file, model| {
                model.look(file, 0..2, "a reader");
                model.look(file, 1..2, "a reader");
                model.look(file, 0..2, "a reader");
            }),
            task(&file, &model, |file, _| {
                file.write_back(0..P).unwrap();
                file.drop_cache().unwrap();
                file.drop_cache().unwrap();
            }),
        ]);
        rig.end(file, &model);
    });
}

/// C-1, C-2, C-10, INV5: what a direct write stores is not seen older afterwards.
#[test]
fn c1_direct_and_buffered_calls_agree() {
    explore(300, || {
        let (rig, file, model) = zeros(&Setting::default(), 3);
        let direct = rig.open(true);
        join([
            task(&direct, &model, |direct, model| {
                model.write(direct, 0..2);
                model.write(direct, 0..4);
            }),
            task(&file, &model, |file, model| {
                model.write(file, 4..5);
                model.look(file, 0..3, "a reader through the cache");
                model.look(file, 0..1, "a reader through the cache");
            }),
            task(&file, &model, |file, model| {
                model.look(file, 0..1, "another reader");
                file.drop_cache().unwrap();
                model.look(file, 0..2, "another reader");
            }),
            task(&direct, &model, |direct, model| {
                model.look(direct, 1..3, "a direct reader");
                model.look(direct, 0..3, "a direct reader");
            }),
        ]);
        drop(direct);
        rig.end(file, &model);
    });
}

/// C-3, C-4, B-4: a file that direct and buffered writes make longer shows no older bytes at its new end.
#[test]
fn b4_c3_c4_a_file_grows_with_its_bytes() {
    explore(200, || {
        let rig = Rig::new(&Setting {
            background: true,
            ..Setting::default()
        });
        let (file, direct) = (rig.open(false), rig.open(true));
        let model = Model::new(3);
        join([
            task(&direct, &model, |direct, model| {
                model.write(direct, 0..1);
                model.write(direct, 1..4);
            }),
            task(&file, &model, |file, model| model.write(file, 4..6)),
            task(&file, &model, |file, model| {
                for _ in 0..3 {
                    model.look(file, 0..3, "a reader at the end");
                }
            }),
        ]);
        drop(direct);
        rig.end(file, &model);
    });
}

/// INV7: what a cut took off does not come back when the file grows, wherever it was on its way.
#[test]
fn inv7_what_was_cut_off_is_zeros() {
    explore(300, || {
        let (rig, file, model) = zeros(
            &Setting {
                background: true,
                ..Setting::default()
            },
            3,
        );
        join([
            task(&file, &model, |file, model| {
                for keep in [3, 2] {
                    model.write(file, 2..6);
                    model.begin_zeros(keep..6);
                    file.set_len((keep * HALF) as u64).unwrap();
                    file.set_len(3 * P).unwrap();
                    model.done(keep..6);
                    model.look(file, 1..3, "who has cut");
                }
            }),
            task(&file, &model, |file, model| {
                model.write(file, 0..1);
                model.write(file, 0..2);
            }),
            task(&file, &model, |file, model| {
                model.look(file, 0..3, "a reader");
                model.look(file, 1..3, "a reader");
            }),
            task(&file, &model, |file, _| file.sync_data().unwrap()),
        ]);
        rig.end(file, &model);
    });
}

/// G-2, G-5: when a sync returns, what was written before it is stored for good, whoever was storing it.
#[test]
fn g2_g5_what_a_sync_has_told_is_stored() {
    fn write_and_sync(file: &File, model: &Model, stored: &crate::store::Stored, half: usize) {
        for _ in 0..2 {
            model.write(file, half..half + 1);
            let lows = model.lows();
            file.sync_data().unwrap();
            let durable = stored.durable();
            let at = half * HALF;
            model.judge(&lows, at, &durable[at..at + HALF], "after a sync");
        }
    }
    explore(300, || {
        let (rig, file, model) = zeros(
            &Setting {
                background: true,
                ..Setting::default()
            },
            2,
        );
        let tasks = [0, 1, 2].map(|half| {
            let stored = Arc::clone(&rig.stored);
            task(&file, &model, move |file, model| {
                write_and_sync(file, model, &stored, half);
            })
        });
        join(tasks);
        rig.end(file, &model);
    });
}

/// G-3, G-4: each open file is told once of a write that failed or fell short, and nothing of it is lost.
#[test]
fn g3_g4_an_error_is_told_once_to_each() {
    explore(300, || {
        let draw = |n: usize| shuttle::rand::thread_rng().gen_range(0..n);
        let mishap = [Mishap::Refused, Mishap::Short][draw(2)];
        let setting = Setting {
            background: draw(2) == 0,
            good: draw(3) as u32,
            mishap,
        };
        let (rig, file, model) = zeros(&setting, 2);
        let other = rig.open(false);
        let told = |file: &File| u32::from(file.sync_data().is_err());
        let tasks = [(&file, 0), (&other, 2)].map(|(file, half)| {
            let (file, model) = (Arc::clone(file), Arc::clone(&model));
            shuttle::thread::spawn(move || {
                let mut errors = 0;
                for _ in 0..2 {
                    model.write(&file, half..half + 2);
                    errors += told(&file);
                }
                errors
            })
        });
        let counts = tasks.map(|task| task.join().unwrap());
        for (file, before) in [&file, &other].into_iter().zip(counts) {
            let all = before + told(file) + told(file);
            let expected = u32::from(!rig.stored.all_well());
            assert_eq!(all, expected, "errors told through one open file");
        }
        drop(other);
        rig.end(file, &model);
    });
}

/// E-3, E-4: pages in use stay where they are while others are driven out; what is dirty is stored first.
#[test]
fn e3_e4_a_cache_that_is_too_small_loses_nothing() {
    const PAGES: usize = 80;
    explore(25, || {
        let (rig, file, model) = zeros(
            &Setting {
                background: true,
                ..Setting::default()
            },
            PAGES,
        );
        // As many as the cache holds.
        model.look(&file, 0..64, "before");
        join([
            task(&file, &model, |file, model| {
                for page in [0, 9, 70] {
                    model.write(file, 2 * page..2 * page + 1);
                }
                model.look(file, 0..10, "a writer");
            }),
            task(&file, &model, |file, model| {
                model.look(file, 60..PAGES, "a reader of what is not there");
            }),
            task(&file, &model, |file, model| {
                let lows = model.lows();
                let lent = file.lend(0, 2 * PAGE).unwrap();
                model.look(file, 64..72, "who has pages lent");
                let mut bytes = Vec::new();
                for span in lent.spans() {
                    let at = bytes.len();
                    bytes.resize(at + span.len(), 0);
                    span.copy_to(0, &mut bytes[at..]);
                }
                model.judge(&lows, 0, &bytes, "lent pages");
            }),
        ]);
        rig.end(file, &model);
    });
}
