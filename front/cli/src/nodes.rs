//! `pinfold nodes`: who serves a volume, as etcd knows it.

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;

use crate::cluster::Where;

/// Tell which nodes serve a volume: since when, with how much of their leases left, with how many locks
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    place: Where,

    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[cfg(not(feature = "etcd"))]
pub(crate) fn run(_: &Arguments) -> Result<ExitCode> {
    anyhow::bail!(crate::cluster::NOT_BUILT)
}

#[cfg(feature = "etcd")]
pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    let access = arguments.place.access()?;
    let access = access.ok_or_else(|| anyhow::anyhow!("which volume? --cluster URL is needed"))?;
    let prefix = access.prefix.clone();
    let survey = crate::cluster::survey(access)?;
    if arguments.json {
        println!("{}", json(&survey, &prefix));
    } else {
        print!("{}", table(&survey, now()));
    }
    Ok(crate::glocks::strangers(&survey))
}

#[cfg(feature = "etcd")]
fn now() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |now| now.as_secs())
}

#[cfg(feature = "etcd")]
fn json(survey: &pinfold::glocks::service::etcd::Survey, prefix: &str) -> serde_json::Value {
    let nodes: Vec<_> = survey
        .nodes
        .iter()
        .map(|node| {
            serde_json::json!({
                "name": node.name,
                "state": state(node),
                "host": node.host,
                "pid": node.pid,
                "since": node.since,
                "lease": node.lease.map(|lease| serde_json::json!({
                    "seconds": lease.granted.as_secs(),
                    "left": lease.left.as_secs(),
                })),
                "holds": node.holds,
                "waits": node.waits,
                "fenced_by": node.fenced_by,
            })
        })
        .collect();
    serde_json::json!({
        "volume": survey.volume,
        "prefix": prefix,
        "revision": survey.revision,
        "nodes": nodes,
        "strange_keys": survey.strange,
    })
}

#[cfg(feature = "etcd")]
fn state(node: &pinfold::glocks::service::etcd::NodeReport) -> &'static str {
    match (node.alive, &node.fenced_by) {
        (true, _) => "member",
        (false, Some(_)) => "being fenced",
        (false, None) => "dead",
    }
}

#[cfg(feature = "etcd")]
fn table(survey: &pinfold::glocks::service::etcd::Survey, now: u64) -> String {
    let unknown = || "?".to_owned();
    let mut rows = vec![
        [
            "NODE", "STATE", "HOST", "PID", "FOR", "LEASE", "HOLDS", "WAITS",
        ]
        .map(str::to_owned),
    ];
    rows.extend(survey.nodes.iter().map(|node| {
        [
            node.name.clone(),
            state(node).to_owned(),
            node.host.clone().unwrap_or_else(unknown),
            node.pid.map_or_else(unknown, |pid| pid.to_string()),
            node.since
                .map_or_else(unknown, |since| span(now.saturating_sub(since))),
            node.lease.map_or_else(
                || "-".to_owned(),
                |lease| format!("{}/{}s", lease.left.as_secs(), lease.granted.as_secs()),
            ),
            node.holds.to_string(),
            node.waits.to_string(),
        ]
    }));
    let mut widths = [0; 8];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |row: &[String; 8]| {
        let cells = row.iter().zip(widths);
        let cells: Vec<String> = cells
            .map(|(cell, width)| format!("{cell:<width$}"))
            .collect();
        format!("{}\n", cells.join("  ").trim_end())
    };
    rows.iter().map(line).collect()
}

/// A time in its two largest units.
#[cfg(feature = "etcd")]
fn span(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    if days > 0 {
        format!("{days}d{}h", hours % 24)
    } else if hours > 0 {
        format!("{hours}h{}m", minutes % 60)
    } else if minutes > 0 {
        format!("{minutes}m{}s", seconds % 60)
    } else {
        format!("{seconds}s")
    }
}

#[cfg(all(test, feature = "etcd"))]
mod tests {
    use super::span;

    #[test]
    fn a_time_has_two_units() {
        let spans = [0, 59, 61, 3599, 3660, 86_400, 90_061].map(span);
        assert_eq!(
            spans,
            ["0s", "59s", "1m1s", "59m59s", "1h1m", "1d0h", "1d1h"]
        );
    }
}
