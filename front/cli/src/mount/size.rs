//! Sizes on the command line, and how much memory a cache may have.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use anyhow::{Result, bail};

/// The least budget: 64 pages.
const MEMORY_MIN: u64 = 256 << 10;

/// A number of bytes, written such as 4096, 64M, 1GiB; the units are powers of 1024.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size(pub(crate) u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no size; write it as 4096, 64M or 2GiB");
        let end = text
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(text.len());
        let (number, unit) = text.split_at(end);
        let number: u64 = number.parse().map_err(|_| wrong())?;
        let shift = match unit.to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "k" | "kib" => 10,
            "m" | "mib" => 20,
            "g" | "gib" => 30,
            "t" | "tib" => 40,
            _ => return Err(wrong()),
        };
        number
            .checked_mul(1 << shift)
            .map(Self)
            .ok_or_else(|| format!("{text:?} is more than 64 bits count"))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(u32, &str); 4] = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
        match UNITS.iter().find(|(shift, _)| self.0 >= 1 << shift) {
            Some((shift, unit)) if self.0.is_multiple_of(1 << shift) => {
                write!(f, "{} {unit}", self.0 >> shift)
            }
            Some((shift, unit)) => {
                write!(f, "{:.1} {unit}", self.0 as f64 / (1u64 << shift) as f64)
            }
            None => write!(f, "{} bytes", self.0),
        }
    }
}

/// Decides the budget for cached pages, in bytes.
pub(crate) fn budget(asked: Option<Size>) -> Result<u64> {
    let have = memory();
    let Some(asked) = asked else {
        return Ok((have / 4).max(MEMORY_MIN));
    };
    if asked.0 < MEMORY_MIN {
        bail!(
            "--memory {asked} is below the minimum of {} (64 pages)",
            Size(MEMORY_MIN)
        );
    }
    if asked.0 > have {
        bail!("--memory {asked} is more than there is: {}", Size(have));
    }
    Ok(asked.0)
}

/// Returns the memory of this machine, or of the control group if that allows less, in bytes.
fn memory() -> u64 {
    let info = rustix::system::sysinfo();
    let machine = (info.totalram as u64).saturating_mul(info.mem_unit.into());
    machine.min(group_limit().unwrap_or(u64::MAX))
}

/// Returns the lowest memory limit among this process's control group and those above it.
fn group_limit() -> Option<u64> {
    let table = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let group = table.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Path::new("/sys/fs/cgroup")
        .join(group)
        .ancestors()
        .take_while(|path| path.starts_with("/sys/fs/cgroup"))
        .filter_map(|path| std::fs::read_to_string(path.join("memory.max")).ok())
        .filter_map(|text| text.trim().parse().ok())
        .min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_and_without_units() {
        for (text, bytes) in [
            ("4096", 4096),
            ("1k", 1024),
            ("64M", 64 << 20),
            ("64MiB", 64 << 20),
            ("1GiB", 1 << 30),
            ("2T", 2 << 40),
            ("7b", 7),
        ] {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
        for text in [
            "",
            "M",
            "1.5G",
            "-1",
            "1X",
            "64 M",
            "99999999999999999999",
            "20000000T",
        ] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_budget_stays_between_64_pages_and_the_machine() {
        let below = budget(Some(Size(MEMORY_MIN - 1))).unwrap_err();
        assert!(
            below.to_string().contains("below the minimum of 256 KiB"),
            "{below}"
        );
        let above = budget(Some(Size(1 << 60))).unwrap_err();
        assert!(above.to_string().contains("more than there is"), "{above}");
        assert_eq!(budget(Some(Size(MEMORY_MIN))).unwrap(), MEMORY_MIN);
        assert!(budget(None).unwrap() < memory());
    }
}
