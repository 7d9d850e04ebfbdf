//! `mneme pull`: fetches a model, or checks one that is there.

use std::io::Write;

use clap::Args;
use mneme::hub::{Cache, ModelRef, Resolver, catalog, stderr_progress};

/// Fetch a model into the cache and print where it is.
#[derive(Debug, Args)]
pub(crate) struct PullArgs {
    /// A short name, org/name[@revision], org/name:Q4_K_M, org/name/file.gguf, a directory or a .gguf file.
    #[arg(default_value = catalog::DEFAULT_MODEL)]
    model: String,
    /// Read a model that is there whole, compare its digest, and fetch again what is damaged.
    #[arg(long)]
    verify: bool,
    /// Fetch a short name again even when it is there; for a repository, ask whether its branch has moved.
    #[arg(long, conflicts_with = "verify")]
    force: bool,
}

/// Runs the command. Stdout gets the path alone, so that it can be used in a shell; everything else goes to stderr.
pub(crate) fn run(args: &PullArgs) -> anyhow::Result<()> {
    let reference = ModelRef::parse(&args.model)?;
    let resolver = Resolver::new(Cache::from_env()?);
    let mut progress = stderr_progress();
    let model = match (args.verify, args.force) {
        (true, _) => resolver.verify(&reference, progress.as_mut())?,
        (_, true) => resolver.fetch_again(&reference, progress.as_mut())?,
        _ => resolver.resolve(&reference, progress.as_mut())?,
    };
    writeln!(std::io::stdout(), "{}", model.path.display())?;
    Ok(())
}
