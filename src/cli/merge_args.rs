//! The arguments that say when adapters are merged into a copy of the weights.

use std::str::FromStr;

use clap::Args;
use mneme::engine::{MergeConfig, MergeRule};
use mneme::server::MergeRules;

use super::engine_args::parse_bytes;

/// When adapters are merged.
#[derive(Debug, Clone, Args)]
pub(crate) struct MergeArgs {
    /// Let no answer depend on other requests: adapters are always added to what is computed, never merged
    #[arg(long)]
    deterministic: bool,
    /// Merge adapters that carry nearly all tokens into a copy of the weights: auto or never, NAME=always or NAME=never
    /// for one adapter; comma-separated
    #[arg(long, value_name = "RULE", value_delimiter = ',', default_value = "auto")]
    lora_merge: Vec<NamedRule>,
    /// Memory for the copy in bytes, with an optional suffix K, M or G; what does not fit is not merged
    #[arg(long, value_parser = parse_bytes, default_value = "2G")]
    max_merged_bytes: usize,
    /// Merge what has carried this part of the recent tokens
    #[arg(long, value_name = "SHARE", default_value_t = MergeConfig::default().merge_share)]
    lora_merge_share: f64,
    /// Use the copy no more for new requests when its adapters carry less
    #[arg(long, value_name = "SHARE", default_value_t = MergeConfig::default().unmerge_share)]
    lora_unmerge_share: f64,
    /// What recent means, in tokens
    #[arg(long, value_name = "TOKENS", default_value_t = MergeConfig::default().window_tokens)]
    lora_merge_window: usize,
}

/// `auto`, `never`, or `NAME=` and one of these or `always`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct NamedRule {
    /// `None` for all that have no rule of their own.
    name: Option<String>,
    rule: MergeRule,
}

impl FromStr for NamedRule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, rule) = match text.rsplit_once('=') {
            Some((name, rule)) => (Some(name.to_owned()), rule),
            None => (None, text),
        };
        let rule = match rule {
            "auto" => MergeRule::Auto,
            "never" => MergeRule::Never,
            "always" if name.is_some() => MergeRule::Always,
            _ => return Err(format!("{text:?} is not auto, never, NAME=auto, NAME=never or NAME=always")),
        };
        Ok(Self { name, rule })
    }
}

impl MergeArgs {
    /// Whether no answer may depend on other requests.
    pub(crate) fn is_deterministic(&self) -> bool {
        self.deterministic
    }

    /// What the engine is told.
    pub(crate) fn config(&self) -> anyhow::Result<MergeConfig> {
        let (merge_share, unmerge_share) = (self.lora_merge_share, self.lora_unmerge_share);
        anyhow::ensure!(
            0.0 <= unmerge_share && unmerge_share <= merge_share && merge_share <= 1.0,
            "--lora-unmerge-share {unmerge_share} and --lora-merge-share {merge_share} must be parts of 1, the second at \
             least as large as the first"
        );
        Ok(MergeConfig {
            is_enabled: !self.deterministic,
            max_bytes: self.max_merged_bytes,
            merge_share,
            unmerge_share,
            window_tokens: self.lora_merge_window,
        })
    }

    /// What holds of adapters by their names.
    pub(crate) fn rules(&self) -> MergeRules {
        let mut rules = MergeRules::default();
        for NamedRule { name, rule } in &self.lora_merge {
            rules.set(name.as_deref(), *rule);
        }
        rules
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_for_all_or_for_one() {
        let parse = |text: &str| text.parse::<NamedRule>();
        assert_eq!(parse("never"), Ok(NamedRule { name: None, rule: MergeRule::Never }));
        assert_eq!(parse("a=b=always"), Ok(NamedRule { name: Some("a=b".into()), rule: MergeRule::Always }));
        assert!(parse("always").is_err(), "not all can have the one copy");
        assert!(parse("a=sometimes").is_err());
    }
}
