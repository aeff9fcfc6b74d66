//! File systems in files: made, loop-mounted, and always unmounted again.
//!
//! *Owns*: [`Image`] (a file system of a chosen kind in a sparse file), [`FailingStore`] (one that refuses
//! to store file data when told so), and the [clean-up](unmount_below) of mounts that a
//! killed process left.
//!
//! *Does not own*: what is stored there.
//!
//! *Locking*: none. Needs root, `mount` and the `mkfs` of the kind; says so when it lacks one.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::fs::Kind;

/// A mounted file system whose device is a file. Unmounted and deleted when dropped.
#[derive(Debug)]
pub struct Image {
    file: PathBuf,
    mount: Mount,
}

impl Image {
    /// Makes a file system of `kind` in a sparse file of `bytes` bytes in `dir` and mounts it there.
    ///
    /// # Errors
    /// The reason why that is impossible here, fit for "skipped".
    pub fn make(dir: &Path, kind: Kind, bytes: u64) -> Result<Self, String> {
        Self::with(dir, kind, bytes, false)
    }

    fn with(dir: &Path, kind: Kind, bytes: u64, overwrites: bool) -> Result<Self, String> {
        if !rustix::process::geteuid().is_root() {
            return Err("mounting an image takes root".into());
        }
        let mkfs = match kind {
            // Everything the file system itself needs is written at once: later only data can fail for want of room.
            Kind::Ext4 => &[
                "mkfs.ext4",
                "-q",
                "-F",
                "-E",
                "lazy_itable_init=0,lazy_journal_init=0",
            ][..],
            Kind::Xfs => &["mkfs.xfs", "-q", "-f", "-K"],
            Kind::Btrfs => &["mkfs.btrfs", "-q", "-f", "-K"],
            Kind::Tmpfs | Kind::Fuse | Kind::Other | Kind::Pinfold => {
                return Err(format!("{} has no image", kind.name()));
            }
        };
        let file = dir.join("image");
        fs::File::create(&file)
            .and_then(|image| image.set_len(bytes))
            .map_err(|error| format!("{}: {error}", file.display()))?;
        let device = file.as_os_str().to_owned();
        run(Command::new(mkfs[0]).args(&mkfs[1..]).arg(&device))?;
        // Without copy-on-write, btrfs overwrites in place like the others: an image can then fail some blocks only.
        let options = if kind == Kind::Btrfs && overwrites {
            "loop,nodatacow"
        } else {
            "loop"
        };
        let mount = Mount::at(
            dir.join("mounted"),
            Command::new("mount").args(["-o", options]).arg(&device),
        )?;
        Ok(Self { file, mount })
    }

    /// Returns where it is mounted.
    #[must_use]
    pub fn mount_point(&self) -> &Path {
        &self.mount.point
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        self.mount.leave();
        let _ = fs::remove_file(&self.file);
    }
}

/// A tmpfs of a chosen size, or a tmpfs for tests. Unmounted when dropped.
#[derive(Debug)]
pub struct Memory {
    mount: Mount,
}

impl Memory {
    /// Mounts a tmpfs of `bytes` bytes at `dir/memory`.
    ///
    /// # Errors
    /// The reason why that is impossible here, fit for "skipped".
    pub fn make(dir: &Path, bytes: u64) -> Result<Self, String> {
        if !rustix::process::geteuid().is_root() {
            return Err("mounting a tmpfs takes root".into());
        }
        let size = format!("size={bytes}");
        let mount = Mount::at(
            dir.join("memory"),
            Command::new("mount").args(["-t", "tmpfs", "-o", &size, "pinfold-scenario"]),
        )?;
        Ok(Self { mount })
    }

    /// Returns where it is mounted.
    #[must_use]
    pub fn mount_point(&self) -> &Path {
        &self.mount.point
    }
}

/// A mounted image that can be told to refuse writes of file data, and of nothing else.
///
/// The image lies on a tmpfs. To make writes fail, the blocks that hold file data are punched out of it and the rest
/// of the tmpfs is filled: such a block cannot be written again for want of room, which the file system above meets
/// as an I/O error of its device. Its own structures keep their room, so that it does not give up altogether.
#[derive(Debug)]
pub struct FailingStore {
    // Dropped in this order: the image lies on the tmpfs.
    image: Image,
    memory: Memory,
}

impl FailingStore {
    /// Room on the tmpfs beside the image.
    const SPARE: u64 = 8 << 20;
    /// Granularity of what is punched, in bytes.
    const BLOCK: usize = 4096;

    /// Makes one of `kind` below `dir`.
    ///
    /// # Errors
    /// The reason why that is impossible here.
    pub fn new(dir: &Path, kind: Kind) -> Result<Self, String> {
        // About the least that the mkfs of each kind accepts.
        let bytes = match kind {
            Kind::Xfs => 300 << 20,
            Kind::Btrfs => 128 << 20,
            _ => 64 << 20,
        };
        let memory = Memory::make(dir, bytes + Self::SPARE)?;
        let image = Image::with(memory.mount_point(), kind, bytes, true)?;
        let store = Self { image, memory };
        let file = store.open_image()?;
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, bytes)
            .map_err(|error| error.to_string())?;
        Ok(store)
    }

    /// Returns where the image is mounted.
    #[must_use]
    pub fn mount_point(&self) -> &Path {
        self.image.mount_point()
    }

    /// Makes every stored block that consists of one repeated byte (not zero) impossible to write: that is what the
    /// files of scenarios look like, and nothing of a file system's own does.
    ///
    /// # Errors
    /// The reason why that failed.
    pub fn refuse_data(&self) -> Result<(), String> {
        let punched = self.punch_data().map_err(|error| error.to_string())?;
        if punched == 0 {
            return Err("no file data was found in the image".into());
        }
        let mut filler = fs::File::create(self.filler()).map_err(|error| error.to_string())?;
        let block = vec![0x55; 1 << 20];
        for size in [block.len(), Self::BLOCK] {
            // Bounded: the tmpfs holds no more than its size.
            while filler.write_all(&block[..size]).is_ok() {}
        }
        Ok(())
    }

    /// Gives the room back.
    ///
    /// # Errors
    /// The reason why that failed.
    pub fn accept_data(&self) -> Result<(), String> {
        match fs::remove_file(self.filler()) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.to_string()),
            _ => Ok(()),
        }
    }

    fn punch_data(&self) -> io::Result<usize> {
        use rustix::fs::FallocateFlags;

        let mut image = self.open_image().map_err(io::Error::other)?;
        let mut buffer = vec![0; 256 * Self::BLOCK];
        let (mut offset, mut punched) = (0, 0);
        loop {
            let got = image.read(&mut buffer)?;
            if got == 0 {
                return Ok(punched);
            }
            for (block, at) in buffer[..got]
                .chunks(Self::BLOCK)
                .zip((offset..).step_by(Self::BLOCK))
            {
                if block[0] != 0 && block.iter().all(|&byte| byte == block[0]) {
                    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                    rustix::fs::fallocate(&image, flags, at, block.len() as u64)?;
                    punched += 1;
                }
            }
            offset += got as u64;
        }
    }

    fn open_image(&self) -> Result<fs::File, String> {
        fs::File::options()
            .read(true)
            .write(true)
            .open(&self.image.file)
            .map_err(|error| error.to_string())
    }

    fn filler(&self) -> PathBuf {
        self.memory.mount_point().join("filler")
    }
}

impl Drop for FailingStore {
    fn drop(&mut self) {
        // Unmounting writes back; with the room restored that can succeed.
        let _ = self.accept_data();
    }
}

#[derive(Debug)]
struct Mount {
    point: PathBuf,
}

impl Mount {
    fn at(point: PathBuf, command: &mut Command) -> Result<Self, String> {
        fs::create_dir_all(&point).map_err(|error| format!("{}: {error}", point.display()))?;
        run(command.arg(&point))?;
        Ok(Self { point })
    }

    fn leave(&self) {
        let plain = run(Command::new("umount").arg(&self.point));
        if plain.is_err() {
            // Still busy: it goes when its last file is closed.
            let _ = run(Command::new("umount").arg("--lazy").arg(&self.point));
        }
        let _ = fs::remove_dir(&self.point);
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if mounts_below(&self.point).contains(&self.point) {
            self.leave();
        }
    }
}

/// Unmounts whatever is mounted below `dir`, innermost first: what a killed process could not.
pub fn unmount_below(dir: &Path) {
    for point in mounts_below(dir).into_iter().rev() {
        Mount { point }.leave();
    }
}

/// Lists mount points at or below `dir`, oldest first.
fn mounts_below(dir: &Path) -> Vec<PathBuf> {
    let table = fs::read("/proc/self/mountinfo").unwrap_or_default();
    table
        .split(|&byte| byte == b'\n')
        .filter_map(|line| line.split(|&byte| byte == b' ').nth(4))
        .map(|field| PathBuf::from(std::ffi::OsString::from_vec(unescape(field))))
        .filter(|point| point.starts_with(dir))
        .collect()
}

/// Undoes the octal escapes of /proc/self/mountinfo (space, tab, newline, backslash).
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, after)) = rest.split_first() {
        let code = match after {
            [a, b, c, ..] if first == b'\\' => std::str::from_utf8(&[*a, *b, *c])
                .ok()
                .and_then(|digits| u8::from_str_radix(digits, 8).ok()),
            _ => None,
        };
        plain.push(code.unwrap_or(first));
        rest = if code.is_some() { &after[3..] } else { after };
    }
    plain
}

fn run(command: &mut Command) -> Result<(), String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("{name}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("{name}: {}", said.trim().replace('\n', "; ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn octal_escapes_of_the_mount_table_are_undone() {
        assert_eq!(unescape(br"/a\040b\134c"), br"/a b\c");
        assert_eq!(unescape(br"/a\09"), br"/a\09");
    }

    #[test]
    fn a_mounted_image_is_listed_and_gone_after_its_drop() {
        let dir = tempfile::tempdir().unwrap();
        let image = match Image::make(dir.path(), Kind::Ext4, 64 << 20) {
            Ok(image) => image,
            Err(reason) => return eprintln!("skipped: {reason}"),
        };
        let point = image.mount_point().to_path_buf();
        assert_eq!(mounts_below(dir.path()), [point]);
        drop(image);
        assert!(mounts_below(dir.path()).is_empty());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
