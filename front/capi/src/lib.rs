//! The C API: POSIX's calls by other names, over volumes of this process.
//!
//! *Owns*: descriptor numbers, volume and directory handles, errno, and what POSIX asks of paths and arguments that the
//! Rust API leaves to its callers. `include/pinfold.h` is generated from these sources; `include/pinfold_posix.h` puts the
//! calls behind POSIX's own names.
//!
//! *Does not own*: files, their cache, their locks: crate `pinfold`.
//!
//! *Locking*: the tables here have locks of their own, held for a look-up or a change and never across a call into the engine.
//!
//! Three rules hold for every exported function. Memory that C names may be anything: it is copied through
//! `user` or lent to the engine as spans, never made a reference or slice. Handles are looked up, never followed. A panic
//! ends in `call::answer` as `EIO`.
#![allow(
    unsafe_code,
    reason = "an ABI edge: exported symbols, and memory that C vouches for"
)]

mod call;
mod descriptor;
mod directory;
mod errors;
mod fork;
mod io;
mod locate;
mod mapping;
mod metadata;
mod names;
mod open;
mod range;
mod user;
mod volume;
mod walk;
mod xattr;
