//! `pinfold glocks`: which locks there are, who holds them, who waits, and for what.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Args;

use crate::cluster::Where;

pub(crate) mod status;

/// Tell who holds which lock and who waits for what: between nodes as etcd knows it, or within the node that serves a mount
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    place: Where,

    /// Print one JSON object
    #[arg(long)]
    json: bool,

    /// Where a node of this machine has its mount: then its own threads are told of
    #[arg(
        conflicts_with = "cluster",
        required_unless_present = "cluster",
        value_name = "MOUNTPOINT"
    )]
    mountpoint: Option<PathBuf>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    if let Some(mountpoint) = &arguments.mountpoint {
        let told = status::ask(mountpoint)?;
        if arguments.json {
            println!("{told}");
        } else {
            print!("{}", status::text(&told));
        }
        return Ok(ExitCode::SUCCESS);
    }
    between_nodes(arguments)
}

#[cfg(not(feature = "etcd"))]
fn between_nodes(_: &Arguments) -> Result<ExitCode> {
    bail!(crate::cluster::NOT_BUILT)
}

#[cfg(feature = "etcd")]
fn between_nodes(arguments: &Arguments) -> Result<ExitCode> {
    let Some(access) = arguments.place.access()? else {
        bail!("which volume? --cluster URL or a mount point is needed");
    };
    let survey = crate::cluster::survey(access)?;
    if arguments.json {
        println!("{}", survey_json(&survey));
    } else {
        print!("{}", survey_text(&survey));
    }
    Ok(strangers(&survey))
}

/// Names the keys that are none of ours, if there are; nodes withdraw when they see them.
#[cfg(feature = "etcd")]
pub(crate) fn strangers(survey: &pinfold::glocks::service::etcd::Survey) -> ExitCode {
    for key in &survey.strange {
        eprintln!("pinfold: in etcd, {key:?} makes no sense here: delete it");
    }
    if survey.strange.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

#[cfg(feature = "etcd")]
fn survey_json(survey: &pinfold::glocks::service::etcd::Survey) -> serde_json::Value {
    let locks: Vec<_> = survey
        .locks
        .iter()
        .map(|lock| {
            let claims: Vec<_> = lock
                .claims
                .iter()
                .map(|claim| {
                    let behind = claim.behind.iter().map(|&place| &lock.claims[place].node);
                    serde_json::json!({
                        "node": claim.node,
                        "alive": claim.alive,
                        "mode": claim.mode.letters(),
                        "holds": claim.holds(),
                        "token": claim.token,
                        "waits_for": behind.collect::<Vec<_>>(),
                    })
                })
                .collect();
            serde_json::json!({
                "name": lock.name.to_string(),
                "inode": lock.name.number,
                "generation": lock.name.generation,
                "claims": claims,
            })
        })
        .collect();
    serde_json::json!({
        "volume": survey.volume,
        "revision": survey.revision,
        "locks": locks,
        "strange_keys": survey.strange,
    })
}

#[cfg(feature = "etcd")]
fn survey_text(survey: &pinfold::glocks::service::etcd::Survey) -> String {
    let mut text = String::new();
    for lock in &survey.locks {
        text += &format!("inode {} ({})\n", lock.name.number, lock.name);
        for claim in &lock.claims {
            let mode = claim.mode.letters();
            let dead = if claim.alive {
                ""
            } else {
                ", dead: until its locks are taken over"
            };
            if claim.holds() {
                text += &format!(
                    "  {mode} {} holds, token {}{dead}\n",
                    claim.node, claim.token
                );
                continue;
            }
            let waits: Vec<String> = claim
                .behind
                .iter()
                .map(|&place| &lock.claims[place])
                .map(|before| format!("{} ({})", before.node, before.mode.letters()))
                .collect();
            let waits = waits.join(", ");
            text += &format!("  {mode} {} waits for {waits}{dead}\n", claim.node);
        }
    }
    text
}
