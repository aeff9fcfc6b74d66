//! Stores for tests: objects whose timing, errors and crashes a test decides.
//!
//! *Owns*: [`MemoryObject`], and three that wrap any object: [`FaultyObject`] (errors, short transfers, delays by rule),
//! [`DeferredObject`] (transfers wait until the test lets them go: a race becomes a script), [`CrashingObject`] (what was
//! not synced may be lost), [`FencedObject`] (changes under an old token are refused); a watchdog.
//!
//! *Does not own*: anything a product path uses.
//!
//! *Locking*: leaves; completions run with none held.
//!
//! They compose: `DeferredObject` over `FaultyObject` over `CrashingObject` is a slow, failing disk that loses power.

mod crashing;
mod deferred;
mod faulty;
mod fenced;
mod memory;
mod watchdog;

pub use crashing::{CrashingObject, Survival};
pub use deferred::{DeferredObject, Queued};
pub use faulty::{Action, FaultyObject, On, Rule};
pub use fenced::{FencedObject, Tokens};
pub use memory::MemoryObject;
pub use watchdog::within;

/// A reproducible sequence of numbers (splitmix64): the same on every machine and in every version.
#[derive(Debug, Clone)]
pub struct Seed(u64);

impl Seed {
    /// Starts a sequence.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Returns the next number.
    #[expect(
        clippy::should_implement_trait,
        reason = "a sequence without an end is no iterator"
    )]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Returns the next number below `bound`, or 0 when `bound` is 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        // The bias of the remainder does not matter to tests.
        self.next().checked_rem(bound).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests;
