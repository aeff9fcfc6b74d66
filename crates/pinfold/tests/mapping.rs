//! Promises of mappings through the public door, in both deliveries.

#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(
    unsafe_code,
    reason = "loads and stores of mapped memory, as a program makes them"
)]

mod mapping {
    mod ahead;
    mod basics;
    mod buffers;
    pub mod limits;
    mod pins;
    mod private;
    mod races;
    mod refusals;
    pub mod remap;
    pub mod rig;
    mod shifts;
    mod shown;
    mod signals;
}
