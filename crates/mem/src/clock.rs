//! Wall-clock time as the kernel stamps files with it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Returns nanoseconds since 1970 on the coarse clock: a tick's resolution for a few nanoseconds' cost.
#[must_use]
pub fn now_ns() -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // The C library's, not rustix': that one looks for the vDSO by itself, which valgrind has taken away.
    // SAFETY: the call fills the struct it is given; it cannot fail for a clock that every Linux has.
    unsafe { libc::clock_gettime(libc::CLOCK_REALTIME_COARSE, &raw mut now) };
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    // Until the year 2554 it fits.
    seconds
        .saturating_mul(1_000_000_000)
        .saturating_add(now.tv_nsec.unsigned_abs())
}

/// Turns [`now_ns`]'s value into a time.
#[must_use]
pub fn time_of(ns: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_nanos(ns)
}
