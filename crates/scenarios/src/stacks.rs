//! Where the threads of a hanging process are.
//!
//! *Owns*: the report made of /proc and, where it is installed, of gdb.
//!
//! *Does not own*: the process.
//!
//! *Locking*: none.

use std::fmt::Write as _;
use std::fs;
use std::io::Read as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// gdb gets so long; a process in an uninterruptible sleep cannot be attached to at all.
const GDB_MAX: Duration = Duration::from_secs(60);
/// Longest report, in bytes.
const REPORT_MAX: usize = 64 << 10;

/// Describes every thread of process `pid`: name, wait channel, system call, kernel stack, then user stacks.
#[must_use]
pub fn of(pid: u32) -> String {
    let mut report = String::new();
    let tasks = format!("/proc/{pid}/task");
    for task in fs::read_dir(&tasks).into_iter().flatten().flatten() {
        let path = task.path();
        let part = |name: &str| {
            let text =
                fs::read_to_string(path.join(name)).unwrap_or_else(|error| error.to_string());
            text.trim().replace('\n', "\n      ")
        };
        let _ = write!(
            report,
            "thread {} ({})\n  wchan: {}\n  syscall: {}\n  kernel stack:\n      {}\n",
            task.file_name().to_string_lossy(),
            part("comm"),
            part("wchan"),
            part("syscall"),
            part("stack"),
        );
    }
    if report.is_empty() {
        let _ = writeln!(report, "{tasks} is gone");
    }
    match user_stacks(pid) {
        Ok(stacks) => report.push_str(&stacks),
        Err(reason) => {
            let _ = writeln!(report, "no user stacks: {reason}");
        }
    }
    report.truncate(report.floor_char_boundary(REPORT_MAX));
    report
}

fn user_stacks(pid: u32) -> Result<String, String> {
    let mut gdb = Command::new("gdb")
        .args([
            "--batch",
            "--nx",
            "-iex",
            "set debuginfod enabled off",
            "-p",
        ])
        .arg(pid.to_string())
        .args(["-ex", "thread apply all bt 40"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| format!("gdb: {error}"))?;
    let mut out = gdb.stdout.take().ok_or("gdb: no output")?;
    let reader = std::thread::spawn(move || {
        let mut text = Vec::new();
        let _ = out.by_ref().take(REPORT_MAX as u64).read_to_end(&mut text);
        // Drained, so that gdb does not wait for us with the process stopped.
        let _ = std::io::copy(&mut out, &mut std::io::sink());
        text
    });
    let until = Instant::now() + GDB_MAX;
    loop {
        match gdb.try_wait() {
            Ok(Some(_)) => break,
            Ok(None) if Instant::now() < until => std::thread::sleep(Duration::from_millis(50)),
            _ => {
                let _ = gdb.kill();
                let _ = gdb.wait();
                return Err(format!("gdb: no answer in {GDB_MAX:?}"));
            }
        }
    }
    let text = reader.join().map_err(|_| "gdb: unreadable".to_owned())?;
    Ok(format!(
        "user stacks (gdb):\n{}\n",
        String::from_utf8_lossy(&text).trim()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sleeping_process_is_found_asleep() {
        let mut sleeper = Command::new("sleep").arg("60").spawn().unwrap();
        // Until it has reached its sleep there is little to see.
        std::thread::sleep(Duration::from_millis(200));
        let report = of(sleeper.id());
        sleeper.kill().unwrap();
        sleeper.wait().unwrap();
        assert!(report.contains("(sleep)"), "{report}");
        assert!(report.contains("user stacks"), "{report}");
    }

    #[test]
    fn a_process_that_is_gone_is_said_to_be() {
        let mut short = Command::new("true").spawn().unwrap();
        short.wait().unwrap();
        assert!(of(short.id()).contains("is gone"));
    }
}
