//! Choosing a token from a row of logits on the host, where somebody wants to see or to change them and the device does not
//! do that; from all others the device chooses, in the same way ([`RowSampling`], [`RowEdit`](crate::backend::RowEdit)).
//!
//! The order is the field's: constraints and penalties on logits, temperature, then top-k, typical, top-p and min-p, then
//! one draw.

use super::constraints::apply_mask;
use super::generation::Generation;
use super::logprobs::logprobs_of;
use super::request::TokenLogprobs;
use crate::Result;
use crate::backend::RowSampling;
use crate::backend::cpu::{Isa, SampleScratch, sample_row};

/// Reusable buffers of the sampler.
pub(super) struct Sampler {
    candidates: Vec<Candidate>,
    scratch: SampleScratch,
    /// A bit for every token that may come next.
    mask: Vec<u32>,
    /// A row as the model gave it.
    untouched: Vec<f32>,
}

#[derive(Debug, Clone, Copy)]
struct Candidate {
    id: u32,
    /// A logit first, then a probability.
    weight: f32,
}

/// A sampled token.
pub(super) struct Sample {
    pub(super) token: u32,
    pub(super) logprobs: Option<Box<TokenLogprobs>>,
}

impl Sampler {
    pub(super) fn new(vocab_size: usize) -> Self {
        Self {
            candidates: Vec::with_capacity(vocab_size),
            scratch: SampleScratch::default(),
            mask: Vec::with_capacity(vocab_size.div_ceil(32)),
            untouched: Vec::with_capacity(vocab_size),
        }
    }

    /// Chooses the token behind `tokens` (prompt and output so far); `logits` is overwritten.
    pub(super) fn sample(
        &mut self,
        generation: &mut Generation,
        tokens: &[u32],
        num_prompt_tokens: usize,
        logits: &mut [f32],
    ) -> Result<Sample> {
        let output = &tokens[num_prompt_tokens..];
        if generation.params.logprobs.is_some() {
            self.untouched.clear();
            self.untouched.extend_from_slice(logits);
        }
        self.constrain(generation, output, logits)?;
        add_biases(generation, logits);
        penalise(generation, logits);
        let sampling = generation.row_sampling(output.len());
        let token = self.choose(&sampling, generation.params.typical_p, logits);
        let logprobs = generation.params.logprobs.map(|num_top| logprobs_of(&self.untouched, token, num_top));
        Ok(Sample { token, logprobs: logprobs.map(Box::new) })
    }

    /// Sets the logits of forbidden tokens to minus infinity.
    fn constrain(&mut self, generation: &mut Generation, output: &[u32], logits: &mut [f32]) -> Result<()> {
        generation.compute_mask();
        if let Some(error) = generation.mask_error.take() {
            return Err(error);
        }
        if generation.is_constrained(output) {
            self.mask.resize(logits.len().div_ceil(32), 0);
            generation.write_mask(output, &mut self.mask);
            apply_mask(logits, &self.mask);
        }
        Ok(())
    }

    fn choose(&mut self, sampling: &RowSampling, typical_p: f32, logits: &[f32]) -> u32 {
        if sampling.temperature <= 0.0 || typical_p >= 1.0 {
            return sample_row(Isa::best(), logits, sampling, &mut self.scratch);
        }
        self.fill_candidates(logits, sampling.temperature);
        let keep = cut(&mut self.candidates, sampling, typical_p);
        pick(&self.candidates[..keep], sampling.draw())
    }

    /// Unnormalised probabilities of all tokens that are possible at all.
    fn fill_candidates(&mut self, logits: &[f32], temperature: f32) {
        let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        self.candidates.clear();
        for (id, &logit) in logits.iter().enumerate() {
            let weight = ((logit - most) / temperature).exp();
            if weight > 0.0 {
                self.candidates.push(Candidate { id: id as u32, weight });
            }
        }
        if self.candidates.is_empty() {
            self.candidates.push(Candidate { id: argmax(logits), weight: 1.0 });
        }
    }
}

fn by_weight(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    b.weight.total_cmp(&a.weight).then(a.id.cmp(&b.id))
}

/// Orders the candidates and says how many survive the cuts.
fn cut(candidates: &mut Vec<Candidate>, sampling: &RowSampling, typical_p: f32) -> usize {
    let top_k = sampling.top_k as usize;
    if top_k > 0 && top_k < candidates.len() {
        candidates.select_nth_unstable_by(top_k - 1, by_weight);
        candidates.truncate(top_k);
    }
    keep_typical(candidates, typical_p);
    candidates.sort_unstable_by(by_weight);
    let least = candidates[0].weight * sampling.min_p;
    let by_min_p = candidates.partition_point(|candidate| candidate.weight >= least).max(1);
    by_min_p.min(nucleus(candidates, sampling.top_p))
}

/// How many of the ordered candidates reach a share `top_p` of the whole (arXiv 1904.09751); one at least.
fn nucleus(candidates: &[Candidate], top_p: f32) -> usize {
    let total: f64 = candidates.iter().map(|candidate| f64::from(candidate.weight)).sum();
    let wanted = total * f64::from(top_p);
    let mut sum = 0.0;
    let reached = candidates.iter().position(|candidate| {
        sum += f64::from(candidate.weight);
        sum >= wanted
    });
    reached.map_or(candidates.len(), |index| index + 1)
}

/// Keeps the candidates whose information is nearest the entropy until they hold `mass` (arXiv 2202.00666).
fn keep_typical(candidates: &mut Vec<Candidate>, mass: f32) {
    let total: f64 = candidates.iter().map(|candidate| f64::from(candidate.weight)).sum();
    let information = |candidate: &Candidate| -(f64::from(candidate.weight) / total).ln();
    let entropy: f64 =
        candidates.iter().map(|candidate| f64::from(candidate.weight) / total * information(candidate)).sum();
    let distance = |candidate: &Candidate| (information(candidate) - entropy).abs();
    candidates.sort_unstable_by(|a, b| distance(a).total_cmp(&distance(b)).then(a.id.cmp(&b.id)));
    let keep = nucleus(candidates, mass);
    candidates.truncate(keep);
}

/// The candidate at `drawn` / 2^53 of the cumulated weights.
fn pick(candidates: &[Candidate], drawn: u64) -> u32 {
    let total: f64 = candidates.iter().map(|candidate| f64::from(candidate.weight)).sum();
    let mut rest = drawn as f64 / (1u64 << 53) as f64 * total;
    for candidate in candidates {
        rest -= f64::from(candidate.weight);
        if rest < 0.0 {
            return candidate.id;
        }
    }
    candidates.last().map_or(0, |candidate| candidate.id)
}

fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (id, &logit) in logits.iter().enumerate() {
        if logit > logits[best] || logits[best].is_nan() {
            best = id;
        }
    }
    best as u32
}

fn add_biases(generation: &Generation, logits: &mut [f32]) {
    for &(id, bias) in &generation.params.logit_bias {
        if let Some(logit) = logits.get_mut(id as usize) {
            *logit += bias;
        }
    }
}

fn penalise(generation: &Generation, logits: &mut [f32]) {
    let params = &generation.params;
    for (&id, count) in &generation.counts {
        let Some(logit) = logits.get_mut(id as usize) else { continue };
        *logit = if *logit > 0.0 { *logit / params.repetition_penalty } else { *logit * params.repetition_penalty };
        if count.in_output > 0 {
            *logit -= params.frequency_penalty * count.in_output as f32 + params.presence_penalty;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::request::SamplingParams;

    fn draw_many(params: SamplingParams, logits: &[f32], num: u64) -> Vec<usize> {
        let mut sampler = Sampler::new(logits.len());
        let mut counts = vec![0; logits.len()];
        for seed in 0..num {
            let generation = Generation::new(SamplingParams { seed: Some(seed), ..params.clone() }, &[], &[], 0);
            counts[sampler.choose(&generation.row_sampling(0), params.typical_p, logits) as usize] += 1;
        }
        counts
    }

    #[test]
    fn draws_follow_the_distribution() {
        let logits = [0.0f32, 1.0, 2.0, f32::NEG_INFINITY];
        let counts = draw_many(SamplingParams::default(), &logits, 20_000);
        let total: f32 = logits.iter().map(|logit| logit.exp()).sum();
        for (count, logit) in counts.iter().zip(logits) {
            let wanted = logit.exp() / total;
            assert!((*count as f32 / 20_000.0 - wanted).abs() < 0.015, "{counts:?}");
        }
    }

    #[test]
    fn cuts_keep_what_they_say() {
        let logits: Vec<f32> = [0.5f32, 0.25, 0.125, 0.0625, 0.0625].iter().map(|p| p.ln()).collect();
        let kept = |params: SamplingParams| -> Vec<usize> {
            let counts = draw_many(params, &logits, 4_000);
            (0..5).filter(|&id| counts[id] > 0).collect()
        };
        assert_eq!(kept(SamplingParams { top_k: 2, ..Default::default() }), [0, 1]);
        assert_eq!(kept(SamplingParams { top_p: 0.74, ..Default::default() }), [0, 1]);
        assert_eq!(kept(SamplingParams { top_p: 0.76, ..Default::default() }), [0, 1, 2]);
        assert_eq!(kept(SamplingParams { min_p: 0.3, ..Default::default() }), [0, 1]);
        assert_eq!(kept(SamplingParams { top_k: 3, top_p: 0.5, ..Default::default() }), [0]);
        assert_eq!(kept(SamplingParams { typical_p: 0.2, ..Default::default() }), [1]);
        assert_eq!(kept(SamplingParams { temperature: 0.0, ..Default::default() }), [0]);
    }

    #[test]
    fn constraints_forbid() {
        let params = SamplingParams {
            temperature: 0.0,
            allowed_token_ids: Some(vec![0, 1, 2]),
            bad_words: vec![vec![7, 2]],
            logit_bias: vec![(0, -100.0)],
            min_tokens: 5,
            ..Default::default()
        };
        let mut sampler = Sampler::new(4);
        let mut generation = Generation::new(params, &[], &[1], 0);
        let mut logits = [1.0, 2.0, 3.0, 4.0];
        let after_seven = sampler.sample(&mut generation, &[9, 7], 1, &mut logits).unwrap();
        assert_eq!(after_seven.token, 0, "3 is not allowed, 2 would complete a bad word, 1 is EOS");
        let mut logits = [1.0, 2.0, 3.0, 4.0];
        assert_eq!(sampler.sample(&mut generation, &[9, 8], 1, &mut logits).unwrap().token, 2);
    }
}
