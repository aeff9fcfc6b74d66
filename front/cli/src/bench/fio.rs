//! fio, where it is installed: what the device gives to somebody who has no cache at all.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;

pub(super) fn is_installed() -> bool {
    Command::new("fio")
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// Which way a job moves bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    Read,
    Write,
}

/// Random direct transfers of 4 KiB through io_uring; returns transfers a second.
pub(super) fn random(
    way: Way,
    file: &Path,
    size: u64,
    depth: usize,
    warm_ms: u64,
    run_ms: u64,
) -> Result<f64> {
    let output = Command::new("fio")
        .args([
            "--name=bench",
            "--bs=4k",
            "--direct=1",
            // Not processes: each would be a session of its own, with a share of the processors of its own.
            "--thread",
            "--ioengine=io_uring",
        ])
        .args([
            "--time_based",
            "--norandommap",
            "--randrepeat=0",
            "--output-format=json",
        ])
        .arg(match way {
            Way::Read => "--rw=randread",
            Way::Write => "--rw=randwrite",
        })
        .arg(format!("--filename={}", file.display()))
        .arg(format!("--size={size}"))
        .arg(format!("--iodepth={depth}"))
        .arg(format!("--ramp_time={warm_ms}ms"))
        .arg(format!("--runtime={run_ms}ms"))
        .stdin(Stdio::null())
        .output()
        .context("fio")?;
    if !output.status.success() {
        bail!("fio: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    let text = String::from_utf8_lossy(&output.stdout);
    // Notes may precede the object.
    let start = text.find('{').context("fio printed no JSON")?;
    let report: Value = serde_json::from_str(&text[start..]).context("fio's JSON")?;
    let way = match way {
        Way::Read => "read",
        Way::Write => "write",
    };
    report["jobs"][0][way]["iops"]
        .as_f64()
        .with_context(|| format!("fio's JSON has no {way}.iops"))
}
