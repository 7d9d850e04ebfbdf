//! `adapter_config.json` as PEFT writes it: ranks and factors, and what this build refuses.

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::{Result, malformed, unsupported};

/// What scales and sizes the updates of an adapter.
pub(super) struct PeftConfig {
    rank: usize,
    alpha: f64,
    rank_pattern: Vec<(Pattern, f64)>,
    alpha_pattern: Vec<(Pattern, f64)>,
    use_rslora: bool,
    ensure_weight_tying: bool,
}

#[derive(Deserialize)]
struct Stored {
    peft_type: Option<String>,
    r: Option<usize>,
    lora_alpha: Option<f64>,
    use_rslora: Option<bool>,
    use_dora: Option<bool>,
    bias: Option<String>,
    lora_bias: Option<bool>,
    fan_in_fan_out: Option<bool>,
    use_qalora: Option<bool>,
    rank_pattern: Option<Map<String, Value>>,
    alpha_pattern: Option<Map<String, Value>>,
    init_lora_weights: Option<Value>,
    modules_to_save: Option<Vec<String>>,
    layer_replication: Option<Value>,
    alora_invocation_tokens: Option<Value>,
    trainable_token_indices: Option<Value>,
    target_parameters: Option<Vec<String>>,
    ensure_weight_tying: Option<bool>,
    use_bdlora: Option<Value>,
    kasa_config: Option<Value>,
    monteclora_config: Option<Value>,
    velora_config: Option<Value>,
    arrow_config: Option<Value>,
}

/// Which modules a pattern means: the whole name, or the end of one behind a dot.
struct Pattern {
    name: String,
    is_whole: bool,
}

impl Pattern {
    /// PEFT takes regular expressions; names with dots are all that adapters hold in practice.
    fn new(text: &str) -> Result<Self> {
        let (is_whole, name) = text.strip_prefix('^').map_or((false, text), |rest| (true, rest));
        let name = name.strip_suffix('$').unwrap_or(name).replace("\\.", ".");
        if name.is_empty() || !name.chars().all(|found| found.is_alphanumeric() || matches!(found, '.' | '_' | '-')) {
            return Err(unsupported!(
                "the pattern {text:?} is a regular expression; only names of modules, or ends of them, are understood"
            ));
        }
        Ok(Self { name, is_whole })
    }

    fn matches(&self, module: &str) -> bool {
        match module.strip_suffix(&self.name) {
            Some("") => true,
            Some(before) => !self.is_whole && before.ends_with('.'),
            None => false,
        }
    }
}

impl PeftConfig {
    /// Reads the file's text.
    ///
    /// # Errors
    /// `Format` for what is no such file, `Unsupported` for what would have to be applied in another way.
    pub(super) fn parse(text: &str) -> Result<Self> {
        let stored: Stored =
            serde_json::from_str(text).map_err(|error| malformed!("not an adapter's configuration: {error}"))?;
        stored.refuse_other_kinds()?;
        stored.refuse_other_tensors()?;
        let rank = stored.r.ok_or_else(|| malformed!("the configuration has no rank `r`"))?;
        Ok(Self {
            rank,
            alpha: stored.lora_alpha.ok_or_else(|| malformed!("the configuration has no `lora_alpha`"))?,
            rank_pattern: patterns("rank_pattern", stored.rank_pattern)?,
            alpha_pattern: patterns("alpha_pattern", stored.alpha_pattern)?,
            use_rslora: stored.use_rslora.unwrap_or(false),
            ensure_weight_tying: stored.ensure_weight_tying.unwrap_or(false),
        })
    }

    /// Refuses an adapter that `updates_vocabulary` and whose update of the embedding is to be one of the output projection
    /// too.
    pub(super) fn check_tying(&self, updates_vocabulary: bool) -> Result<()> {
        match self.ensure_weight_tying && updates_vocabulary {
            true => Err(unsupported!("the adapter ties its updates of embed_tokens and lm_head (ensure_weight_tying)")),
            false => Ok(()),
        }
    }

    /// The rank of `module`, which is named as in the model.
    pub(super) fn rank(&self, module: &str) -> usize {
        find(&self.rank_pattern, module).map_or(self.rank, |rank| rank as usize)
    }

    /// What multiplies `B A` of `module`: alpha / rank, or alpha / sqrt(rank) (rank-stabilised, arXiv 2312.03732).
    pub(super) fn scaling(&self, module: &str) -> f32 {
        let alpha = find(&self.alpha_pattern, module).unwrap_or(self.alpha);
        let rank = self.rank(module) as f64;
        (alpha / if self.use_rslora { rank.sqrt() } else { rank }) as f32
    }
}

/// The first pattern that matches decides, as in PEFT.
fn find(patterns: &[(Pattern, f64)], module: &str) -> Option<f64> {
    patterns.iter().find(|(pattern, _)| pattern.matches(module)).map(|(_, value)| *value)
}

fn patterns(field: &str, stored: Option<Map<String, Value>>) -> Result<Vec<(Pattern, f64)>> {
    let number = |(text, value): (String, Value)| match value.as_f64() {
        Some(number) => Ok((Pattern::new(&text)?, number)),
        None => Err(malformed!("{field} has {value} for {text:?}, wanted a number")),
    };
    stored.unwrap_or_default().into_iter().map(number).collect()
}

fn is_set(value: Option<&Value>) -> bool {
    !matches!(value, None | Some(Value::Null | Value::Bool(false)))
}

impl Stored {
    /// Refuses updates that are no plain `B A` beside the frozen base.
    fn refuse_other_kinds(&self) -> Result<()> {
        let kind = self.peft_type.as_deref().unwrap_or("LORA");
        if kind != "LORA" {
            return Err(unsupported!("the adapter is of type {kind}; only LORA is supported"));
        }
        if self.use_dora == Some(true) {
            return Err(unsupported!("DoRA adapters (use_dora) are not supported; train with use_dora=false"));
        }
        if self.use_qalora == Some(true) {
            return Err(unsupported!("QA-LoRA adapters (use_qalora) are not supported"));
        }
        if self.fan_in_fan_out == Some(true) {
            return Err(unsupported!("adapters of transposed layers (fan_in_fan_out) are not supported"));
        }
        let initial = self.init_lora_weights.as_ref().and_then(Value::as_str).unwrap_or_default();
        if ["pissa", "olora", "corda"].iter().any(|changed| initial.starts_with(changed)) {
            return Err(unsupported!(
                "the adapter was initialised by {initial:?}, which changes the base weights too; convert it to a plain \
                 LoRA first (PEFT: path_initial_model_for_weight_conversion)"
            ));
        }
        let others = [
            ("layer_replication", &self.layer_replication),
            ("alora_invocation_tokens", &self.alora_invocation_tokens),
            ("use_bdlora", &self.use_bdlora),
            ("kasa_config", &self.kasa_config),
            ("monteclora_config", &self.monteclora_config),
            ("velora_config", &self.velora_config),
            ("arrow_config", &self.arrow_config),
        ];
        match others.iter().find(|(_, value)| is_set(value.as_ref())) {
            Some((field, _)) => Err(unsupported!("the adapter uses {field}, which is not supported")),
            None => Ok(()),
        }
    }

    /// Refuses adapters that bring more than `A` and `B`.
    fn refuse_other_tensors(&self) -> Result<()> {
        let bias = self.bias.as_deref().unwrap_or("none");
        if bias != "none" || self.lora_bias == Some(true) {
            return Err(unsupported!("the adapter trains biases (bias={bias:?}); only bias=\"none\" is supported"));
        }
        if let Some(modules) = self.modules_to_save.as_ref().filter(|modules| !modules.is_empty()) {
            return Err(unsupported!("the adapter replaces whole modules (modules_to_save={modules:?})"));
        }
        if self.target_parameters.as_ref().is_some_and(|found| !found.is_empty()) {
            return Err(unsupported!("the adapter changes bare parameters (target_parameters)"));
        }
        match is_set(self.trainable_token_indices.as_ref()) {
            true => Err(unsupported!("the adapter trains embeddings of tokens (trainable_token_indices)")),
            false => Ok(()),
        }
    }
}
