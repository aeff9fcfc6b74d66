//! File contents that tell where they come from: each byte follows from its offset and a salt.
//!
//! *Owns*: the pattern, writing it, and checks against it.
//!
//! *Does not own*: the files.
//!
//! *Locking*: none.

use std::ops::Range;

use pinfold_mem::region::{At, Region};

use super::PAGE;
use crate::fs::{Handle, How};
use crate::scenario::{Context, Stop};

/// Returns the byte at `at`; never zero, so that a hole is never taken for contents.
pub(super) fn byte(salt: u64, at: u64) -> u8 {
    // The page counts too: contents that moved by whole pages are found out.
    let mixed =
        (at ^ (at >> 12).wrapping_mul(0x9e37_79b9) ^ salt).wrapping_mul(0x2545_f491_4f6c_dd1d);
    ((mixed >> 32) % 255) as u8 + 1
}

/// Returns the bytes at `range`.
pub(super) fn bytes(salt: u64, range: Range<u64>) -> Vec<u8> {
    range.map(|at| byte(salt, at)).collect()
}

/// Writes the pattern all over `range`.
pub(super) fn write(
    cx: &Context<'_>,
    file: &dyn Handle,
    salt: u64,
    range: Range<u64>,
) -> Result<(), Stop> {
    let buffer = Region::pages(64)?;
    let mut offset = range.start;
    while offset < range.end {
        let n = (range.end - offset).min(buffer.len() as u64);
        buffer.put(0, &bytes(salt, offset..offset + n))?;
        let from = buffer.iov(0..n as usize);
        offset += file.write(&from, At::Offset(offset), How::PLAIN)? as u64;
        cx.beat();
    }
    Ok(())
}

/// Makes a file of `size` bytes of the pattern, stored and not cached.
pub(super) fn file(
    cx: &Context<'_>,
    name: &str,
    salt: u64,
    size: u64,
) -> Result<Box<dyn Handle>, Stop> {
    let file = cx.fresh(name)?;
    write(cx, &*file, salt, 0..size)?;
    file.drop_cache()?;
    Ok(file)
}

/// Reads `range` of a file; stops at its end.
pub(super) fn read(file: &dyn Handle, range: Range<u64>) -> Result<Vec<u8>, Stop> {
    let buffer = Region::pages(64)?;
    let mut bytes = Vec::new();
    while range.start + (bytes.len() as u64) < range.end {
        let at = range.start + bytes.len() as u64;
        let n = (range.end - at).min(buffer.len() as u64) as usize;
        let got = file.read(&buffer.iov(0..n), At::Offset(at), How::PLAIN)?;
        if got == 0 {
            break;
        }
        bytes.extend(buffer.to_vec(0..got)?);
    }
    Ok(bytes)
}

/// Records whether `got`, which was found at `at`, is `want`; says where it is not.
pub(super) fn same(cx: &Context<'_>, name: &'static str, got: &[u8], at: u64, want: &[u8]) -> bool {
    cx.check(name, got == want, || {
        let differs = got.iter().zip(want).position(|(got, want)| got != want);
        differs.map_or_else(
            || format!("{} bytes at {at}, expected {}", got.len(), want.len()),
            |first| {
                let (page, within) = ((at + first as u64) / PAGE as u64, first % PAGE);
                format!(
                    "byte {} (page {page}, {within} into what was read) is {:#04x}, expected {:#04x}",
                    at + first as u64,
                    got[first],
                    want[first]
                )
            },
        )
    })
}

/// Records whether `range` of a file is the pattern.
pub(super) fn check(
    cx: &Context<'_>,
    name: &'static str,
    file: &dyn Handle,
    salt: u64,
    range: Range<u64>,
) -> Result<bool, Stop> {
    let got = read(file, range.clone())?;
    Ok(same(cx, name, &got, range.start, &bytes(salt, range)))
}
