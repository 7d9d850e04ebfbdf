//! `mneme cube fuse`: one adapter out of several, in a folder of its own. Needs no server.

use std::path::PathBuf;

use anyhow::Context;
use clap::{Args, ValueEnum};
use mneme::adapters::{Adapter, FuseMethod, MAX_ADAPTER_BYTES, Part, fuse};
use mneme::engine::base_shapes;
use mneme::hub::{Cache, ModelRef, Resolver, catalog, stderr_progress};
use mneme::models::Checkpoint;
use serde_json::{Value, json};

#[derive(Debug, Args)]
pub(super) struct FuseArgs {
    /// Folders of adapters, each with how much of it: FOLDER or FOLDER:0.7
    #[arg(required = true, value_name = "FOLDER[:SCALE]", value_parser = parse_part)]
    parts: Vec<NamedPart>,
    /// The folder to make
    #[arg(long, short)]
    output: PathBuf,
    /// The model that they change
    #[arg(long, default_value = catalog::DEFAULT_MODEL)]
    model: String,
    /// Rank of the result [default: what the exact sum has]
    #[arg(long, required_if_eq_any([("method", "ties"), ("method", "dare")]))]
    rank: Option<usize>,
    /// How updates become one
    #[arg(long, default_value = "sum")]
    method: Method,
    /// Part of the numbers that ties and dare keep
    #[arg(long, default_value_t = 0.2)]
    density: f32,
    /// Seed of dare
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Method {
    /// Weighted sum, exact, or the closest of --rank
    Sum,
    /// Largest numbers, elected signs, mean of those that agree
    Ties,
    /// Numbers kept at random and enlarged, then added
    Dare,
}

#[derive(Debug, Clone, PartialEq)]
struct NamedPart {
    folder: PathBuf,
    scale: f32,
}

/// A scale stands behind the last colon, if what stands there is a number.
fn parse_part(text: &str) -> Result<NamedPart, String> {
    let (folder, scale) = match text.rsplit_once(':') {
        Some((folder, scale)) => match scale.parse() {
            Ok(scale) => (folder, scale),
            Err(_) => (text, 1.0),
        },
        None => (text, 1.0),
    };
    match folder.is_empty() {
        true => Err(format!("'{text}' names no folder")),
        false => Ok(NamedPart { folder: folder.into(), scale }),
    }
}

impl FuseArgs {
    /// Reads, fuses and writes; what came of it.
    pub(super) fn run(&self) -> anyhow::Result<Value> {
        let model =
            Resolver::new(Cache::from_env()?).resolve(&ModelRef::parse(&self.model)?, stderr_progress().as_mut())?;
        let shapes = base_shapes(Checkpoint::open(&model.path)?.config());
        let read = |part: &NamedPart| {
            let adapter = Adapter::read(&part.folder, &shapes, MAX_ADAPTER_BYTES);
            adapter.with_context(|| format!("cannot use {}", part.folder.display()))
        };
        let adapters = self.parts.iter().map(read).collect::<anyhow::Result<Vec<_>>>()?;
        let parts: Vec<Part> =
            adapters.iter().zip(&self.parts).map(|(adapter, part)| Part { adapter, scale: part.scale }).collect();
        let fused = fuse(&parts, &shapes, self.fuse_method()?)?;
        fused.write(&self.output, &model.name)?;
        let written =
            Adapter::read(&self.output, &shapes, MAX_ADAPTER_BYTES).context("what was written is no adapter")?;
        Ok(json!({
            "folder": self.output,
            "model": model.name,
            "digest": written.digest().to_string(),
            "rank": fused.max_rank(),
            "largest_loss": fused.largest_loss(),
            "bytes": written.num_bytes(),
        }))
    }

    fn fuse_method(&self) -> anyhow::Result<FuseMethod> {
        let Self { density, seed, .. } = *self;
        Ok(match (self.method, self.rank) {
            (Method::Sum, None) => FuseMethod::Concatenate,
            (Method::Sum, Some(rank)) => FuseMethod::Truncate { rank },
            (Method::Ties, Some(rank)) => FuseMethod::Ties { rank, density },
            (Method::Dare, Some(rank)) => FuseMethod::Dare { rank, density, seed },
            (Method::Ties | Method::Dare, None) => anyhow::bail!("ties and dare need --rank"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_behind_a_colon_is_the_scale() {
        let part = |folder: &str, scale| Ok(NamedPart { folder: folder.into(), scale });
        assert_eq!(parse_part("a"), part("a", 1.0));
        assert_eq!(parse_part("a/b:0.7"), part("a/b", 0.7));
        assert_eq!(parse_part("c:d:-2"), part("c:d", -2.0));
        assert_eq!(parse_part("c:d"), part("c:d", 1.0));
        assert!(parse_part(":0.7").is_err());
    }
}
