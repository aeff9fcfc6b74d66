//! Where to mount what: everything that can be wrong with the two directories, before anything is opened.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// The two directories, fit for use.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) dir: PathBuf,
    pub(super) mountpoint: PathBuf,
    /// The mount point was made here, and goes when this does.
    made: bool,
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.made {
            // Still in use, or filled by somebody meanwhile: then it stays.
            let _ = fs::remove_dir(&self.mountpoint);
        }
    }
}

/// Checks the directories and takes a dead mount of ours out of the way.
pub(super) fn prepare(dir: &Path, mountpoint: &Path, mkdir: bool) -> Result<Place> {
    let stale = pinfold_fuse::detach_stale(mountpoint);
    if stale.with_context(|| format!("{}: cannot remove the dead mount", mountpoint.display()))? {
        eprintln!(
            "pinfold: {}: removed the mount of a server that is gone",
            mountpoint.display()
        );
    }
    if mkdir {
        make(dir)?;
    }
    let dir_stat = directory(dir, false)?;
    let made = mkdir && make(mountpoint)?;
    let place = Place {
        dir: dir.to_owned(),
        mountpoint: mountpoint.to_owned(),
        made,
    };
    let point_stat = directory(mountpoint, true)?;
    if pinfold_fuse::is_mount_point(mountpoint).unwrap_or(false) {
        bail!(
            "{}: something is mounted there already",
            mountpoint.display()
        );
    }
    // Containment first: it explains better why a directory that holds DIR is not empty.
    if contains((dir, &dir_stat), mountpoint)? {
        bail!(
            "{}: the mount point lies inside the directory that is to be served, {}",
            mountpoint.display(),
            dir.display()
        );
    }
    if contains((mountpoint, &point_stat), dir)? {
        bail!(
            "{}: the directory to be served lies inside the mount point, {}",
            dir.display(),
            mountpoint.display()
        );
    }
    let mut entries = fs::read_dir(mountpoint).with_context(|| mountpoint.display().to_string())?;
    if entries.next().is_some() {
        bail!("{}: the mount point is not empty", mountpoint.display());
    }
    Ok(place)
}

/// Makes a directory unless there is one; tells whether it did.
fn make(path: &Path) -> Result<bool> {
    match fs::create_dir(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error).with_context(|| format!("cannot create {}", path.display())),
    }
}

fn directory(path: &Path, is_mountpoint: bool) -> Result<fs::Metadata> {
    let stat = match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let what = if is_mountpoint {
                "mount point"
            } else {
                "directory"
            };
            bail!(
                "{}: no such {what}; create it, or pass --mkdir",
                path.display()
            );
        }
        other => other.with_context(|| path.display().to_string())?,
    };
    if !stat.is_dir() {
        bail!("{}: not a directory", path.display());
    }
    Ok(stat)
}

/// Tells whether `inner` is `outer` or lies below it, by whatever path it is reached.
fn contains(outer: (&Path, &fs::Metadata), inner: &Path) -> Result<bool> {
    let (path, stat) = outer;
    let real = |path: &Path| {
        path.canonicalize()
            .with_context(|| path.display().to_string())
    };
    let (path, inner) = (real(path)?, real(inner)?);
    let same = |above: &Path| {
        fs::metadata(above).is_ok_and(|s| (s.dev(), s.ino()) == (stat.dev(), stat.ino()))
    };
    Ok(inner.starts_with(&path) || inner.ancestors().any(same))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_that_contain_each_other_are_refused() {
        let base = tempfile::tempdir().unwrap();
        let (data, inside) = (base.path().join("data"), base.path().join("data/mnt"));
        fs::create_dir_all(&inside).unwrap();
        for (dir, mountpoint, complaint) in [
            (&data, &inside, "lies inside the directory"),
            (&inside, &data, "lies inside the mount point"),
            (&data, &data, "lies inside the directory"),
        ] {
            let error = prepare(dir, mountpoint, false).unwrap_err();
            assert!(error.to_string().contains(complaint), "{error}");
        }
        let link = base.path().join("link");
        std::os::unix::fs::symlink(&inside, &link).unwrap();
        let error = prepare(&data, &link, false).unwrap_err();
        assert!(
            error.to_string().contains("lies inside the directory"),
            "{error}"
        );
    }

    #[test]
    fn what_is_missing_full_or_no_directory_is_named() {
        let base = tempfile::tempdir().unwrap();
        let (data, mnt) = (base.path().join("data"), base.path().join("mnt"));
        let complain = |dir: &Path, mountpoint: &Path| {
            prepare(dir, mountpoint, false).unwrap_err().to_string()
        };
        assert!(complain(&data, &mnt).contains("data: no such directory"));
        fs::create_dir(&data).unwrap();
        assert!(complain(&data, &mnt).contains("mnt: no such mount point"));
        fs::write(&mnt, "").unwrap();
        assert!(complain(&data, &mnt).contains("mnt: not a directory"));
        fs::remove_file(&mnt).unwrap();
        fs::create_dir_all(mnt.join("x")).unwrap();
        assert!(complain(&data, &mnt).contains("mnt: the mount point is not empty"));
        assert!(complain(&data, Path::new("/proc")).contains("something is mounted there"));
    }

    #[test]
    fn a_mount_point_made_on_request_goes_again() {
        let base = tempfile::tempdir().unwrap();
        let (data, mnt) = (base.path().join("data"), base.path().join("mnt"));
        let place = prepare(&data, &mnt, true).unwrap();
        assert!(mnt.is_dir());
        drop(place);
        assert!(!mnt.exists());
        assert!(data.is_dir(), "data is never removed");
        fs::create_dir(&mnt).unwrap();
        drop(prepare(&data, &mnt, true).unwrap());
        assert!(mnt.is_dir(), "it was there before");
    }
}
