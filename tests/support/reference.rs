//! A plain forward pass over a tiny model, straight from the definitions in Hugging Face transformers
//! (`modeling_llama.py`, `modeling_qwen2.py`, `modeling_qwen3.py`, `modeling_gemma2.py`, `modeling_gemma3.py`),
//! in f64 and without a cache.
//!
//! It uses nothing of the engine.

#![allow(clippy::needless_range_loop)] // the loops read as the formulas do

use half::bf16;

use super::tiny_model::{
    EPSILON, Family, GEMMA2_CAPS, HEAD_DIM, HIDDEN, NUM_HEADS, NUM_KV_HEADS, TinyModel, WINDOW, Weights,
};

type Row = Vec<f64>;

/// What the model computes for a token run.
pub struct Reference {
    /// Per position, the final hidden state behind the last norm.
    pub hidden: Vec<Row>,
    /// Per position, the logits of the next token.
    pub logits: Vec<Row>,
}

/// Runs `model` over `tokens`.
pub fn forward(model: &TinyModel, tokens: &[u32]) -> Reference {
    forward_with(model, tokens, false)
}

/// The same; keys and values may be rounded to bf16 on their way, as a cache of that type does.
pub fn forward_with(model: &TinyModel, tokens: &[u32], rounds_kv: bool) -> Reference {
    let embedding = model.tensor("model.embed_tokens.weight");
    let scale = if model.family.is_gemma() { (HIDDEN as f64).sqrt() } else { 1.0 };
    let embed = |&token: &u32| row(embedding, token as usize).map(|value| value * scale).collect();
    let mut residual: Vec<Row> = tokens.iter().map(embed).collect();
    for layer in 0..model.family.num_layers() {
        run_layer(model, layer, &mut residual, rounds_kv);
    }
    let hidden: Vec<Row> = residual.iter().map(|x| norm(model, "model.norm.weight", x)).collect();
    let lm_head = model.tensors.get("lm_head.weight").unwrap_or(embedding);
    let [_, logit_cap] = caps(model.family);
    let logits =
        hidden.iter().map(|x| project(lm_head, x).into_iter().map(|x| capped(x, logit_cap)).collect()).collect();
    Reference { hidden, logits }
}

/// What attention scores and logits stay inside of.
fn caps(family: Family) -> [Option<f64>; 2] {
    if family == Family::Gemma2 { GEMMA2_CAPS.map(Some) } else { [None; 2] }
}

fn capped(x: f64, cap: Option<f64>) -> f64 {
    cap.map_or(x, |cap| cap * (x / cap).tanh())
}

/// Natural-log probabilities of a row of logits.
pub fn log_softmax(logits: &[f64]) -> Row {
    let most = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let log_sum = logits.iter().map(|logit| (logit - most).exp()).sum::<f64>().ln() + most;
    logits.iter().map(|logit| logit - log_sum).collect()
}

fn run_layer(model: &TinyModel, layer: usize, residual: &mut [Row], rounds_kv: bool) {
    let gemma = model.family.is_gemma();
    let prefix = format!("model.layers.{layer}");
    let named = |part: &str| format!("{prefix}.{part}.weight");
    let normed: Vec<Row> = residual.iter().map(|x| norm(model, &named("input_layernorm"), x)).collect();
    for (x, mut delta) in residual.iter_mut().zip(attention(model, layer, &normed, rounds_kv)) {
        if gemma {
            delta = norm(model, &named("post_attention_layernorm"), &delta);
        }
        add(x, &delta);
        let before = if gemma { "pre_feedforward_layernorm" } else { "post_attention_layernorm" };
        let mut delta = feed_forward(model, &prefix, &norm(model, &named(before), x));
        if gemma {
            delta = norm(model, &named("post_feedforward_layernorm"), &delta);
        }
        add(x, &delta);
    }
}

fn attention(model: &TinyModel, layer: usize, normed: &[Row], rounds_kv: bool) -> Vec<Row> {
    let prefix = format!("model.layers.{layer}");
    let family = model.family;
    let slides = family.window_period().is_some_and(|period| !(layer + 1).is_multiple_of(period));
    let frequencies = inverse_frequencies(family, slides);
    let heads = |part: &str, x: &Row, position: usize| -> Vec<Row> {
        let mut out = project(model.tensor(&format!("{prefix}.self_attn.{part}_proj.weight")), x);
        if let Some(bias) = model.tensors.get(&format!("{prefix}.self_attn.{part}_proj.bias")) {
            out.iter_mut().zip(&bias.values).for_each(|(out, bias)| *out += f64::from(*bias));
        }
        let split = out.chunks(HEAD_DIM).map(<[f64]>::to_vec);
        if part == "v" {
            return split.collect();
        }
        let norm_name = format!("{prefix}.self_attn.{part}_norm.weight");
        let normalise = |head: Row| if family.has_head_norms() { norm(model, &norm_name, &head) } else { head };
        split.map(|head| rotate(&normalise(head), position, &frequencies)).collect()
    };
    let all = |part: &str| -> Vec<Vec<Row>> { normed.iter().enumerate().map(|(at, x)| heads(part, x, at)).collect() };
    let (q, mut k, mut v) = (all("q"), all("k"), all("v"));
    if rounds_kv {
        k.iter_mut().chain(&mut v).flatten().flatten().for_each(|x| *x = bf16::from_f64(*x).to_f64());
    }
    let scale = if family.is_gemma() { 24f64 } else { HEAD_DIM as f64 }.sqrt().recip();
    let [score_cap, _] = caps(family);
    let o_proj = model.tensor(&format!("{prefix}.self_attn.o_proj.weight"));
    let attend = |at: usize| {
        let first = if slides { (at + 1).saturating_sub(WINDOW) } else { 0 };
        let mut out = Row::new();
        for (head, q) in q[at].iter().enumerate() {
            let kv_head = head / (NUM_HEADS / NUM_KV_HEADS);
            let score = |other: usize| capped(dot(q, &k[other][kv_head]) * scale, score_cap);
            let scores: Row = (first..=at).map(score).collect();
            let weights = log_softmax(&scores);
            let mut sum = vec![0.0; HEAD_DIM];
            for (other, weight) in (first..=at).zip(weights) {
                sum.iter_mut().zip(&v[other][kv_head]).for_each(|(sum, value)| *sum += weight.exp() * value);
            }
            out.extend(sum);
        }
        project(o_proj, &out)
    };
    (0..normed.len()).map(attend).collect()
}

fn feed_forward(model: &TinyModel, prefix: &str, x: &Row) -> Row {
    let weight = |part: &str| model.tensor(&format!("{prefix}.mlp.{part}_proj.weight"));
    let silu = |x: f64| x / (1.0 + (-x).exp());
    let gelu = |x: f64| 0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3))).tanh());
    let activate = |x: f64| if model.family.is_gemma() { gelu(x) } else { silu(x) };
    let (gate, up) = (project(weight("gate"), x), project(weight("up"), x));
    project(weight("down"), &gate.into_iter().zip(up).map(|(gate, up)| activate(gate) * up).collect())
}

fn inverse_frequencies(family: Family, slides: bool) -> Row {
    let theta: f64 = match family {
        Family::Llama => 10_000.0,
        Family::Llama3 => 500_000.0,
        Family::Gemma2 => 100_000.0,
        family if family.is_gemma() && slides => 10_000.0,
        _ => 1_000_000.0,
    };
    let plain = (0..HEAD_DIM / 2).map(|at| theta.powf(-((2 * at) as f64) / HEAD_DIM as f64));
    match family {
        Family::Llama3 => plain.map(llama3_frequency).collect(),
        Family::Gemma3 | Family::ShortGemma3 if !slides => plain.map(|frequency| frequency / 4.0).collect(),
        _ => plain.collect(),
    }
}

/// `_compute_llama3_parameters` with factor 8, low 1, high 4 and an original context of 64.
fn llama3_frequency(frequency: f64) -> f64 {
    let (factor, low, high, original) = (8.0, 1.0, 4.0, 64.0);
    let wavelength = 2.0 * std::f64::consts::PI / frequency;
    if wavelength < original / high {
        frequency
    } else if wavelength > original / low {
        frequency / factor
    } else {
        let smooth = (original / wavelength - low) / (high - low);
        (1.0 - smooth) * frequency / factor + smooth * frequency
    }
}

/// `x cos + rotate_half(x) sin`.
fn rotate(head: &Row, position: usize, frequencies: &[f64]) -> Row {
    let half = HEAD_DIM / 2;
    let turned = |at: usize| if at < half { -head[at + half] } else { head[at - half] };
    let angle = |at: usize| position as f64 * frequencies[at % half];
    (0..HEAD_DIM).map(|at| head[at] * angle(at).cos() + turned(at) * angle(at).sin()).collect()
}

fn norm(model: &TinyModel, name: &str, x: &Row) -> Row {
    let offset = if model.family.is_gemma() { 1.0 } else { 0.0 };
    let inverse = (dot(x, x) / x.len() as f64 + EPSILON).sqrt().recip();
    x.iter().zip(&model.tensor(name).values).map(|(x, weight)| x * inverse * (offset + f64::from(*weight))).collect()
}

fn project(weight: &Weights, x: &Row) -> Row {
    (0..weight.rows).map(|at| row(weight, at).zip(x).map(|(weight, x)| weight * x).sum()).collect()
}

fn row(weights: &Weights, at: usize) -> impl Iterator<Item = f64> {
    weights.values[at * weights.columns..(at + 1) * weights.columns].iter().map(|value| f64::from(*value))
}

fn add(x: &mut Row, delta: &Row) {
    x.iter_mut().zip(delta).for_each(|(x, delta)| *x += delta);
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
