//! The scenarios of SEMANTICS.md section J that exist so far, in its order.
//!
//! *Owns*: the list and the bodies, by the list's own headings.
//!
//! *Does not own*: where and how they are run ([`crate::runner`]).
//!
//! *Locking*: none.

mod access;
mod buffered;
mod coherence;
mod direct;
mod entangled;
mod maps;
mod order;
mod pattern;
mod pins;
mod race;
mod sources;
mod writeback;

use std::sync::atomic::{AtomicBool, Ordering};

use pinfold_base::Errno;

use crate::scenario::{Context, Scenario, Stop};

/// Size of a page, in bytes.
const P: u64 = 4096;
/// Size of a page, for buffers.
const PAGE: usize = 4096;

/// Lists every scenario.
#[must_use]
pub fn all() -> Vec<&'static Scenario> {
    let mut list: Vec<&'static Scenario> = [
        access::SCENARIOS,
        buffered::SCENARIOS,
        race::SCENARIOS,
        direct::SCENARIOS,
        sources::SCENARIOS,
        maps::SCENARIOS,
        entangled::SCENARIOS,
        coherence::SCENARIOS,
        pins::SCENARIOS,
        writeback::SCENARIOS,
        order::SCENARIOS,
    ]
    .into_iter()
    .flatten()
    .collect();
    list.sort_by_key(|scenario| scenario.number);
    list
}

/// Finds a scenario by its number (`"T13"`, in any case) or its name.
#[must_use]
pub fn find(number: &str) -> Option<&'static Scenario> {
    all().into_iter().find(|scenario| {
        scenario.number.eq_ignore_ascii_case(number) || scenario.name.eq_ignore_ascii_case(number)
    })
}

/// Ends the scenario as skipped unless the file system has `bytes` bytes free.
fn needs_room(cx: &Context<'_>, bytes: u64) -> Result<(), Stop> {
    let statvfs = rustix::fs::statvfs(cx.fs().dir())
        .map_err(|error| Errno::from_raw(error.raw_os_error()))?;
    let free = statvfs.f_bavail.saturating_mul(statvfs.f_frsize);
    if free >= bytes {
        return Ok(());
    }
    Err(Stop::Skip(format!(
        "needs {} MiB free, there are {}",
        bytes >> 20,
        free >> 20
    )))
}

/// Takes a thread's result; a panic in it is the scenario's failure.
fn joined<T>(result: std::thread::Result<Result<T, Stop>>) -> Result<T, Stop> {
    result.unwrap_or_else(|panic| {
        let said = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| panic.downcast_ref::<&str>().copied())
            .unwrap_or("no message");
        Err(Stop::Fail(format!("a thread panicked: {said}")))
    })
}

/// What a thread beside the leading one does again and again; it is told how often it was called before.
type Turn<'a> = &'a (dyn Fn(u64) -> Result<(), Stop> + Sync);

/// Runs `lead` while a thread each repeats the `others`, and once more when it has ended: what it left is seen by all of them,
/// whenever they got a processor before.
///
/// An error of any of them is the result; the others end with `lead`, however that ends.
fn beside<T>(others: &[Turn<'_>], lead: impl FnOnce() -> Result<T, Stop>) -> Result<T, Stop> {
    struct Ends<'a>(&'a AtomicBool);
    impl Drop for Ends<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Release);
        }
    }
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let threads: Vec<_> = others
            .iter()
            .map(|&turn| {
                let over = &over;
                scope.spawn(move || {
                    for number in 0.. {
                        let last = over.load(Ordering::Acquire);
                        turn(number)?;
                        if last {
                            break;
                        }
                    }
                    Ok(())
                })
            })
            .collect();
        let ends = Ends(&over);
        let led = lead();
        drop(ends);
        for thread in threads {
            joined(thread.join())?;
        }
        led
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_unique_and_names_find_their_scenario() {
        let list = all();
        for pair in list.windows(2) {
            assert!(pair[0].number < pair[1].number);
        }
        assert_eq!(
            find("t13").map(|found| found.name),
            Some("short_copy_hidden")
        );
        assert_eq!(
            find("SHORT_COPY_HIDDEN").map(|found| found.number),
            Some("T13")
        );
        assert!(find("T99").is_none());
    }
}
