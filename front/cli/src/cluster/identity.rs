//! What identifies a directory on every machine that has it: so that two directories never share locks.

use std::path::Path;

use anyhow::{Context, Result, bail};
use rustix::fs::{XattrFlags, getxattr, stat};
use rustix::io::Errno;

/// Where a directory keeps its number. Whoever reads it as a user of the mount finds it too.
const ATTRIBUTE: &str = "user.pinfold.volume";
/// Bytes of such a number, in hexadecimal digits.
const DIGITS: usize = 32;

/// Returns the identity of the directory that serves `volume`: a number of its own, made by whoever comes first, and
/// the inode's, which a copy of the directory does not have. Where the filesystem keeps no attributes, the volume's name
/// has to do.
pub(super) fn of(dir: &Path, volume: &str) -> Result<String> {
    let inode = stat(dir)
        .with_context(|| format!("cannot look at {}", dir.display()))?
        .st_ino;
    let number = match number_of(dir) {
        Ok(number) => number,
        Err(Errno::OPNOTSUPP | Errno::PERM | Errno::ACCESS | Errno::ROFS | Errno::NOSPC) => {
            "-".to_owned()
        }
        Err(Errno::INVAL | Errno::RANGE) => bail!(
            "{}: its attribute {ATTRIBUTE} is not one of pinfold's",
            dir.display()
        ),
        Err(errno) => {
            return Err(errno).with_context(|| format!("cannot identify {}", dir.display()));
        }
    };
    Ok(format!("{volume}:{number}:{inode:x}"))
}

fn number_of(dir: &Path) -> Result<String, Errno> {
    // One that comes second finds what the first made.
    for _ in 0..2 {
        let mut value = [0; DIGITS];
        match getxattr(dir, ATTRIBUTE, &mut value) {
            Ok(DIGITS) if value.iter().all(u8::is_ascii_hexdigit) => {
                return Ok(String::from_utf8_lossy(&value).into_owned());
            }
            Ok(_) => return Err(Errno::INVAL),
            Err(Errno::NODATA) => {}
            Err(errno) => return Err(errno),
        }
        let mut bytes = [0; DIGITS / 2];
        rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
        let number: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        match rustix::fs::setxattr(dir, ATTRIBUTE, number.as_bytes(), XattrFlags::CREATE) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno),
        }
    }
    Err(Errno::INVAL)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_keeps_its_identity_and_no_other_has_it() {
        let base = tempfile::tempdir().unwrap();
        let of = |dir: &Path| of(dir, "v").unwrap();
        assert_eq!(of(base.path()), of(base.path()));
        let other = base.path().join("other");
        std::fs::create_dir(&other).unwrap();
        assert_ne!(of(base.path()), of(&other));
    }

    #[test]
    fn an_attribute_of_somebody_else_s_is_refused() {
        let base = tempfile::tempdir().unwrap();
        if rustix::fs::setxattr(base.path(), ATTRIBUTE, b"hello", XattrFlags::CREATE).is_ok() {
            assert!(of(base.path(), "v").is_err());
        }
    }
}
