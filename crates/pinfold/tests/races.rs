//! Races on one file through the public door: scripts that force an interleaving, and seeded storms.
//!
//! `PINFOLD_RACE_SECONDS=N` lets the storms run longer, `PINFOLD_RACE_SEED=N` begins at a chosen seed.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends there")]
#![allow(
    unsafe_code,
    reason = "mapped bytes are handed to calls as buffers, as programs do"
)]

#[path = "races/attended.rs"]
mod attended;
#[path = "races/cold.rs"]
mod cold;
#[path = "races/fdm.rs"]
mod fdm;
#[path = "races/pending.rs"]
mod pending;
#[path = "races/pins.rs"]
mod pins;
#[path = "races/rig.rs"]
mod rig;
#[path = "races/scripts.rs"]
mod scripts;
#[path = "races/stores.rs"]
mod stores;
#[path = "races/storm.rs"]
mod storm;
#[path = "races/timeouts.rs"]
mod timeouts;
