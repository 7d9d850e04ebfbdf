//! Where the result of a measurement goes.

use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use serde::Serialize;

/// Arguments of every measurement.
#[derive(Debug, Args)]
pub(super) struct ResultArgs {
    /// Write the result as JSON to this file
    #[arg(long, alias = "output-json", value_name = "FILE")]
    pub(super) save_result: Option<PathBuf>,
    /// Print the result as JSON instead of the table
    #[arg(long)]
    json: bool,
}

impl ResultArgs {
    /// Prints a result as it is asked for, and keeps it.
    pub(super) fn write(
        &self,
        result: &impl Serialize,
        write_table: impl FnOnce(&mut dyn Write) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let text = serde_json::to_string_pretty(result)? + "\n";
        let mut out = io::stdout().lock();
        if self.json {
            out.write_all(text.as_bytes())?;
        } else {
            write_table(&mut out)?;
        }
        if let Some(path) = &self.save_result {
            fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(())
    }
}
