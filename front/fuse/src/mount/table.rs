//! The kernel's table of mounts.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mount {
    pub(super) id: u64,
    pub(super) at: PathBuf,
    pub(super) filesystem: String,
    pub(super) source: String,
}

/// Tells whether something is mounted at `at`.
///
/// # Errors
/// The mount table cannot be read, or `at`'s directory not be found.
pub fn is_mount_point(at: &Path) -> io::Result<bool> {
    mount_at(at).map(|found| found.is_some())
}

/// Returns the topmost mount at `at`, which may be dead: its own attributes are not asked for.
pub(super) fn mount_at(at: &Path) -> io::Result<Option<Mount>> {
    let at = resolved(at)?;
    let table = std::fs::read("/proc/self/mountinfo")?;
    // Later lines cover earlier ones.
    Ok(table
        .split(|&byte| byte == b'\n')
        .rev()
        .filter_map(parse)
        .find(|mount| mount.at == at))
}

/// Resolves all but the last component, which may be a mount whose server does not answer.
fn resolved(path: &Path) -> io::Result<PathBuf> {
    let absolute = std::path::absolute(path)?;
    match (absolute.parent(), absolute.file_name()) {
        (Some(parent), Some(name)) => Ok(parent.canonicalize()?.join(name)),
        _ => absolute.canonicalize(),
    }
}

/// Reads a line such as
/// `36 35 98:0 / /mnt rw,noatime master:1 - ext3 /dev/root rw,errors=continue`; the field before the dash may be
/// missing or stand several times.
fn parse(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|&byte| byte == b' ');
    let id = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
    let at = PathBuf::from(OsString::from_vec(unescape(fields.nth(3)?)));
    let mut rest = fields.skip_while(|field| field != b"-");
    let text = |field: &[u8]| String::from_utf8_lossy(&unescape(field)).into_owned();
    let filesystem = text(rest.nth(1)?);
    let source = text(rest.next()?);
    Some(Mount {
        id,
        at,
        filesystem,
        source,
    })
}

/// Undoes the kernel's octal escapes of space, tab, newline and backslash.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut at = 0;
    while let Some(&byte) = field.get(at) {
        let digits = field.get(at + 1..at + 4).filter(|_| byte == b'\\');
        let code = digits
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code {
            Some(code) => {
                plain.push(code);
                at += 4;
            }
            None => {
                plain.push(byte);
                at += 1;
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_read_with_and_without_optional_fields() {
        let expected = Mount {
            id: 36,
            at: PathBuf::from("/mnt/a b"),
            filesystem: "fuse.pinfold".into(),
            source: "pinfold".into(),
        };
        for optional in ["", "master:1 ", "shared:2 master:1 "] {
            let line = format!(
                r"36 35 98:0 / /mnt/a\040b rw,noatime {optional}- fuse.pinfold pinfold rw,user_id=0"
            );
            assert_eq!(parse(line.as_bytes()), Some(expected.clone()), "{line}");
        }
        assert_eq!(parse(b""), None);
    }

    #[test]
    fn the_root_is_a_mount_point_and_a_fresh_directory_is_not() {
        let dir = tempfile::tempdir().unwrap();
        assert!(is_mount_point(Path::new("/proc")).unwrap());
        assert!(!is_mount_point(dir.path()).unwrap());
    }
}
