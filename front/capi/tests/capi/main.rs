//! The C API from outside: its header, programs compiled against it, and the same programs compiled against libc.

mod built;
mod header;
mod programs;
