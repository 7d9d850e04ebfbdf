//! `mneme doctor`: what was found on this machine, and what will be used.

mod cuda;
mod host;
mod python;
mod report;

use std::io::Write;

use clap::Args;

use self::report::Report;

/// Arguments of `mneme doctor`.
#[derive(Debug, Args)]
#[command(after_help = "Example: mneme doctor --json")]
pub(crate) struct DoctorArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Runs the command. What is missing is part of the report, not an error.
pub(crate) fn run(args: &DoctorArgs) -> anyhow::Result<()> {
    let report = Report::of_this_machine();
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&report)?)?;
    } else {
        write!(out, "{report}")?;
    }
    Ok(())
}
