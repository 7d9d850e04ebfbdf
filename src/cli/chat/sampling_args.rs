//! The flags that say how tokens are chosen.

use std::num::NonZeroUsize;

use clap::Args;
use mneme::engine::SamplingParams;

/// Without this an answer of a small model that repeats itself would fill the whole context.
const DEFAULT_MAX_TOKENS: &str = "1024";

/// How tokens are chosen; what is not given comes from the model's own `generation_config.json`.
#[derive(Debug, Clone, Args)]
pub(super) struct SamplingArgs {
    /// 0 always takes the likeliest token
    #[arg(long, value_parser = |text: &str| within(text, 0.0, 2.0))]
    temperature: Option<f32>,
    /// Keep the likeliest tokens that together reach this probability
    #[arg(long, value_parser = |text: &str| within(text, f32::MIN_POSITIVE, 1.0))]
    top_p: Option<f32>,
    /// Keep this many of the likeliest tokens; 0 keeps all
    #[arg(long)]
    top_k: Option<usize>,
    /// Drop tokens less likely than this times the likeliest
    #[arg(long, value_parser = |text: &str| within(text, 0.0, 1.0))]
    min_p: Option<f32>,
    /// Above 1 discourages tokens that were seen
    #[arg(long, value_parser = |text: &str| within(text, f32::MIN_POSITIVE, 100.0))]
    repetition_penalty: Option<f32>,
    /// Tokens of an answer at most
    #[arg(long, default_value = DEFAULT_MAX_TOKENS)]
    max_tokens: NonZeroUsize,
    /// End an answer where this text would come; may be given several times
    #[arg(long, value_name = "TEXT")]
    pub(super) stop: Vec<String>,
}

impl SamplingArgs {
    /// The parameters of every answer.
    pub(super) fn params(&self, defaults: &SamplingParams) -> SamplingParams {
        SamplingParams {
            temperature: self.temperature.unwrap_or(defaults.temperature),
            top_p: self.top_p.unwrap_or(defaults.top_p),
            top_k: self.top_k.unwrap_or(defaults.top_k),
            min_p: self.min_p.unwrap_or(defaults.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(defaults.repetition_penalty),
            max_tokens: self.max_tokens.get(),
            ..defaults.clone()
        }
    }
}

fn within(text: &str, least: f32, most: f32) -> Result<f32, String> {
    let value = text.parse().ok().filter(|value| (least..=most).contains(value));
    let shown = if least == f32::MIN_POSITIVE { "above 0".to_owned() } else { format!("from {least}") };
    value.ok_or_else(|| format!("{text:?} is not a number {shown} to {most}"))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        args: SamplingArgs,
    }

    fn parse(line: &str) -> Result<SamplingArgs, clap::Error> {
        Program::try_parse_from(std::iter::once("chat").chain(line.split_whitespace())).map(|program| program.args)
    }

    #[test]
    fn flags_go_before_the_models_defaults() {
        let defaults = SamplingParams { top_p: 0.8, top_k: 20, ..SamplingParams::default() };
        let args = parse("--temperature 0 --top-k 5 --min-p 0.1 --stop a --stop b --max-tokens 7").unwrap();
        let params = args.params(&defaults);
        assert_eq!((params.temperature, params.top_p, params.top_k, params.min_p), (0.0, 0.8, 5, 0.1));
        assert_eq!(params.max_tokens, 7);
        assert_eq!(args.stop, ["a", "b"]);
    }

    #[test]
    fn values_outside_their_range_are_refused() {
        for line in ["--temperature -1", "--top-p 0", "--top-p 1.1", "--min-p nan", "--max-tokens 0", "--top-k -2"] {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}
