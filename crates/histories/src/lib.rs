//! Histories: what nodes did to the same pages, recorded call by call and checked for linearizability.
//!
//! ```text
//!   run ── starts, kills, stops, cuts off ──> node processes ── calls ──> Place: kernel | volume | locked | shared | mounted
//!    |                                            |
//!    |                                            └── one log a thread (record), mapped: it outlives SIGKILL
//!    └── run.json, logs ──> History ──> check: per register, near-linear ──> calls that contradict each other
//! ```
//!
//! *Owns*: the [record] of calls, the [checker](check), the [places](place) that are driven, the [work](node) of a node,
//! the [run] with its faults.
//!
//! *Does not own*: the file systems and lock services.
//!
//! *Locking*: leaves only.
//!
//! Each page holds registers of eight bytes, each alone in a [slot](SLOT), and each write puts a value that no other write of the run puts
//! ([`value_of`]). All processes stamp the begin and the end of their calls by one clock.

pub mod check;
pub mod life;
pub mod namespace;
pub mod node;
pub mod place;
pub mod record;
pub mod run;
pub mod servers;

use serde::{Deserialize, Serialize};

/// Size of a page, in bytes.
pub const PAGE: usize = 4096;

/// What a small call moves, in bytes: a register and what is behind it, all of the same value.
///
/// Nobody promises that eight bytes that are read while they are written come out whole. Copies of this length are one move of
/// the processor's, where it has such; shorter ones may be made byte by byte, and be interrupted between two.
pub const SLOT: usize = 32;

/// Where in a page its registers lie, in bytes: neighbours, one behind the middle, and the last.
pub const WORDS: [usize; 4] = [0, SLOT, 2048, PAGE - SLOT];

/// The files and pages of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// Files.
    pub files: u32,
    /// Pages of each file.
    pub pages: u32,
    /// Whether every other page is one register, every word of which has to be the same: for places where nobody sees half
    /// a write.
    pub whole: bool,
}

impl Layout {
    /// Tells whether the page is one register.
    #[must_use]
    pub const fn is_whole(&self, page: u32) -> bool {
        self.whole && page.is_multiple_of(2)
    }

    /// The number of a register.
    #[must_use]
    pub const fn register(&self, file: u32, page: u32, word: u32) -> u32 {
        (file * self.pages + page) * WORDS.len() as u32 + word
    }

    /// The file that a register lies in.
    #[must_use]
    pub const fn file_of(&self, register: u32) -> u32 {
        register / WORDS.len() as u32 / self.pages
    }

    /// Describes a register's place.
    #[must_use]
    pub fn describe(&self, register: u32) -> String {
        let words = WORDS.len() as u32;
        let page = register / words % self.pages;
        let byte = WORDS[(register % words) as usize];
        format!("file {} page {page} byte {byte}", self.file_of(register))
    }
}

/// The value of a write: no two are alike, none is zero, and parts of two make none.
///
/// The mix is the last step of splitmix64 (Steele, Lea, Flood 2014), a bijection.
#[must_use]
pub const fn value_of(node: u32, thread: u32, number: u64) -> u64 {
    // Nodes from 1 on: the mix maps zero, and only zero, to zero.
    let mut x = ((node as u64) << 44) | ((thread as u64) << 38) | number;
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Nanoseconds on the clock that all processes of a machine share (CLOCK_MONOTONIC).
#[must_use]
pub fn now() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    // Neither is negative: the clock starts at zero.
    now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned()
}
