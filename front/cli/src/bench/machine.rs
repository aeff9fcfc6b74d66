//! Where the numbers come from.

use std::fmt;
use std::path::Path;

use serde::Serialize;

#[derive(Debug, Serialize)]
pub(super) struct Machine {
    kernel: String,
    processor: String,
    processors: usize,
    memory: u64,
    /// The filesystem's magic number, or its name where that is known.
    filesystem: String,
    /// Load average when it began: other programs' noise.
    load: f64,
}

impl Machine {
    pub(super) fn here(dir: &Path) -> Self {
        let names = rustix::system::uname();
        let info = rustix::system::sysinfo();
        let table = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let processor = table
            .lines()
            .find_map(|line| line.strip_prefix("model name"))
            .map_or_else(
                || "?".into(),
                |line| line.trim_start_matches([' ', '\t', ':']).to_owned(),
            );
        Self {
            kernel: names.release().to_string_lossy().into_owned(),
            processor,
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            memory: (info.totalram as u64).saturating_mul(info.mem_unit.into()),
            filesystem: filesystem(dir),
            load: info.loads[0] as f64 / 65536.0,
        }
    }
}

fn filesystem(dir: &Path) -> String {
    let Ok(found) = rustix::fs::statfs(dir) else {
        return "?".into();
    };
    match found.f_type as u64 {
        0xef53 => "ext4".into(),
        0x5846_5342 => "xfs".into(),
        0x9123_683e => "btrfs".into(),
        0x0102_1994 => "tmpfs".into(),
        other => format!("{other:#x}"),
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Linux {}, {} x {}, {} GiB, {}, load {:.1}",
            self.kernel,
            self.processors,
            self.processor,
            self.memory >> 30,
            self.filesystem,
            self.load
        )
    }
}
