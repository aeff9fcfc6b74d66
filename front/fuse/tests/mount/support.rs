//! A volume mounted for a test, unmounted whatever becomes of it.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use pinfold::{Volume, VolumeBuilder};
use pinfold_fuse::{MountOptions, Mounted};
use rustix::mount::UnmountFlags;

/// How long a test may take before it counts as hung, however busy the machine.
const LIMIT: Duration = Duration::from_secs(240);
/// How long an unmount waits for programs that have just ended.
const PATIENCE: Duration = Duration::from_secs(5);

/// A directory, a volume on it, and a mount of that.
pub struct Fixture {
    /// What is served, looked at directly.
    pub data: PathBuf,
    /// The mount.
    pub mnt: PathBuf,
    /// A plain directory on the same filesystem, to compare with.
    pub plain: PathBuf,
    pub volume: Volume,
    mounted: Option<Mounted>,
    _watchdog: Sender<()>,
    _base: tempfile::TempDir,
}

/// Mounts a volume with ordinary settings; `None` where FUSE cannot be had.
pub fn mounted() -> Option<Fixture> {
    mounted_with(|builder| builder)
}

/// Mounts a volume with settings of the test's own.
pub fn mounted_with(configure: impl FnOnce(VolumeBuilder) -> VolumeBuilder) -> Option<Fixture> {
    mounted_as(&MountOptions::default(), configure)
}

/// Mounts a volume with settings of the test's own, in a way of its own.
pub fn mounted_as(
    options: &MountOptions,
    configure: impl FnOnce(VolumeBuilder) -> VolumeBuilder,
) -> Option<Fixture> {
    let base = tempfile::tempdir().unwrap();
    // Others have to get through to the mount in tests about them.
    std::fs::set_permissions(base.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let at = |name: &str| {
        let path = base.path().join(name);
        std::fs::create_dir(&path).unwrap();
        path
    };
    let (data, mnt, plain) = (at("data"), at("mnt"), at("plain"));
    let builder = Volume::builder().memory(16 << 20).file_size_limit(false);
    let volume = configure(builder).open_dir(&data).unwrap();
    let mounted = match pinfold_fuse::mount(volume.root(), &mnt, options, || {}) {
        Ok(mounted) => mounted,
        Err(error) => {
            println!("skipped: {error}");
            return None;
        }
    };
    Some(Fixture {
        _watchdog: watch(mnt.clone()),
        data,
        mnt,
        plain,
        volume,
        mounted: Some(mounted),
        _base: base,
    })
}

/// Ends the process, and with it everything that waits for the mount, when the test takes too long.
pub fn watch(mnt: PathBuf) -> Sender<()> {
    let (alive, ended) = channel::<()>();
    std::thread::spawn(move || {
        if ended.recv_timeout(LIMIT) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            eprintln!("hung: {} after {LIMIT:?}", mnt.display());
            let _ = rustix::mount::unmount(&mnt, UnmountFlags::DETACH);
            std::process::abort();
        }
    });
    alive
}

impl Drop for Fixture {
    fn drop(&mut self) {
        if let Some(mounted) = self.mounted.take() {
            let outcome = mounted.unmount(PATIENCE);
            if !std::thread::panicking() {
                outcome.unwrap();
            }
        }
    }
}

/// Tells whether this process may act as other users; says so if not.
pub fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("skipped: only root can act as other users");
    }
    root
}

/// Tells whether a program is installed; says so if not.
pub fn installed(program: &str) -> bool {
    let there = Command::new(program).arg("--version").output().is_ok();
    if !there {
        println!("skipped: {program} is not installed");
    }
    there
}

/// Runs Python code with these arguments and returns what it prints; fails the test if it fails.
pub fn python(code: &str, arguments: &[&std::path::Path]) -> String {
    let output = Command::new("python3")
        .args(["-c", code])
        .args(arguments)
        .output()
        .unwrap();
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{complaint}");
    String::from_utf8(output.stdout).unwrap()
}
