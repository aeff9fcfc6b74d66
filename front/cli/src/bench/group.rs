//! A control group that limits memory, page cache included: how the kernel's cache is given the same budget.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

const V1: &str = "/sys/fs/cgroup/memory";
const V2: &str = "/sys/fs/cgroup";
/// Tries to remove a group whose last process has just ended.
const REMOVE_TRIES_MAX: u32 = 50;

/// A group of this program's own; removed when dropped.
#[derive(Debug)]
pub(super) struct Group {
    path: PathBuf,
}

impl Group {
    /// Makes a group whose members may use `memory` bytes together.
    pub(super) fn new(memory: u64) -> Result<Self> {
        let name = format!("pinfold-bench-{}", std::process::id());
        let (root, file) = if Path::new(V1).join("memory.limit_in_bytes").exists() {
            (V1, "memory.limit_in_bytes")
        } else if fs::read_to_string(Path::new(V2).join("cgroup.subtree_control"))
            .is_ok_and(|controllers| controllers.contains("memory"))
        {
            (V2, "memory.max")
        } else {
            bail!("no memory controller under {V2}");
        };
        let path = Path::new(root).join(name);
        fs::create_dir(&path).with_context(|| format!("control group {}", path.display()))?;
        let group = Self { path };
        let limit = group.path.join(file);
        fs::write(&limit, memory.to_string()).with_context(|| limit.display().to_string())?;
        Ok(group)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        for _ in 0..REMOVE_TRIES_MAX {
            if fs::remove_dir(&self.path).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        eprintln!(
            "pinfold: control group {} could not be removed",
            self.path.display()
        );
    }
}

/// Moves this process into a group.
pub(super) fn enter(group: &Path) -> Result<()> {
    let file = group.join("cgroup.procs");
    fs::write(&file, std::process::id().to_string()).with_context(|| file.display().to_string())
}
