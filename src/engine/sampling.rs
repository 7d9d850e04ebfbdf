//! Choosing a token from a row of logits, on the host.
//!
//! The order is the field's: constraints and penalties on logits, temperature, then top-k, typical, top-p and min-p on
//! the sorted distribution, then one draw. A draw depends on the seed and the number of the token alone, so an output is
//! reproducible whatever else is in the batch and however often it was preempted.

use super::generation::Generation;
use super::request::{SamplingParams, TokenLogprob, TokenLogprobs};
use crate::Result;

/// Reusable buffers of the sampler.
pub(super) struct Sampler {
    eos_token_ids: Vec<u32>,
    candidates: Vec<Candidate>,
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
    pub(super) fn new(vocab_size: usize, eos_token_ids: Vec<u32>) -> Self {
        Self { eos_token_ids, candidates: Vec::with_capacity(vocab_size) }
    }

    pub(super) fn eos_token_ids(&self) -> &[u32] {
        &self.eos_token_ids
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
        let distribution = generation.params.logprobs.map(|_| LogSoftmax::new(logits));
        let raw = generation.params.logprobs.map(|num_top| self.best(logits, num_top));
        let raw_logits = raw.is_some().then(|| logits.to_vec());
        self.constrain(generation, output, logits)?;
        penalise(generation, logits);
        let index = output.len() as u64;
        let token = self.choose(&generation.params, generation.seed, index, logits);
        let logprobs = match (distribution, raw, raw_logits) {
            (Some(distribution), Some(top), Some(raw)) => Some(Box::new(TokenLogprobs {
                chosen: distribution.of(&raw, token),
                top: top.into_iter().map(|id| distribution.of(&raw, id)).collect(),
            })),
            _ => None,
        };
        Ok(Sample { token, logprobs })
    }

    /// Log-probabilities of `token` and of the `num_top` likeliest in an untouched row.
    pub(super) fn logprobs_of(&mut self, logits: &[f32], token: u32, num_top: usize) -> TokenLogprobs {
        let distribution = LogSoftmax::new(logits);
        let top = self.best(logits, num_top);
        TokenLogprobs {
            chosen: distribution.of(logits, token),
            top: top.into_iter().map(|id| distribution.of(logits, id)).collect(),
        }
    }

    /// Sets the logits of forbidden tokens to minus infinity.
    fn constrain(&self, generation: &mut Generation, output: &[u32], logits: &mut [f32]) -> Result<()> {
        let params = &generation.params;
        if let Some(allowed) = &params.allowed_token_ids {
            keep_only(logits, allowed);
        }
        if let Some(grammar) = &mut generation.grammar {
            let mask = grammar.allowed()?;
            for (id, logit) in logits.iter_mut().enumerate() {
                if !mask.is_allowed(id as u32) {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
        for &(id, bias) in &params.logit_bias {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit += bias;
            }
        }
        for word in &params.bad_words {
            if let Some((last, before)) = word.split_last()
                && output.ends_with(before)
            {
                forbid(logits, *last);
            }
        }
        if output.len() < params.min_tokens {
            params.stop_token_ids.iter().chain(&self.eos_token_ids).for_each(|&id| forbid(logits, id));
        }
        Ok(())
    }

    fn choose(&mut self, params: &SamplingParams, seed: u64, index: u64, logits: &[f32]) -> u32 {
        if params.temperature <= 0.0 {
            return argmax(logits);
        }
        let draw = uniform(seed, index);
        self.fill_candidates(logits, params.temperature);
        let keep = cut(&mut self.candidates, params);
        pick(&self.candidates[..keep], draw)
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

    /// The `count` likeliest tokens, best first, the lower id first among equals.
    fn best(&mut self, logits: &[f32], count: usize) -> Vec<u32> {
        let count = count.min(logits.len());
        self.candidates.clear();
        self.candidates.extend(logits.iter().enumerate().map(|(id, &weight)| Candidate { id: id as u32, weight }));
        if count < self.candidates.len() && count > 0 {
            self.candidates.select_nth_unstable_by(count - 1, by_weight);
        }
        self.candidates.truncate(count);
        self.candidates.sort_unstable_by(by_weight);
        self.candidates.iter().map(|candidate| candidate.id).collect()
    }
}

fn by_weight(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    b.weight.total_cmp(&a.weight).then(a.id.cmp(&b.id))
}

/// Orders the candidates as far as needed and says how many survive the cuts.
fn cut(candidates: &mut Vec<Candidate>, params: &SamplingParams) -> usize {
    if params.top_k > 0 && params.top_k < candidates.len() {
        candidates.select_nth_unstable_by(params.top_k - 1, by_weight);
        candidates.truncate(params.top_k);
    }
    let needs_order = params.top_p < 1.0 || params.min_p > 0.0;
    if params.typical_p < 1.0 {
        keep_typical(candidates, params.typical_p);
    }
    if !needs_order {
        // A draw walks the candidates in their order, which must not depend on how they were selected.
        candidates.sort_unstable_by_key(|candidate| candidate.id);
        return candidates.len();
    }
    candidates.sort_unstable_by(by_weight);
    let least = candidates[0].weight * params.min_p;
    let by_min_p = candidates.partition_point(|candidate| candidate.weight >= least).max(1);
    by_min_p.min(nucleus(candidates, params.top_p))
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

/// The candidate at `draw`, in `[0, 1)`, of the cumulated weights.
fn pick(candidates: &[Candidate], draw: f64) -> u32 {
    let total: f64 = candidates.iter().map(|candidate| f64::from(candidate.weight)).sum();
    let mut rest = draw * total;
    for candidate in candidates {
        rest -= f64::from(candidate.weight);
        if rest < 0.0 {
            return candidate.id;
        }
    }
    candidates.last().map_or(0, |candidate| candidate.id)
}

/// A number in `[0, 1)` that depends on its arguments alone.
fn uniform(seed: u64, index: u64) -> f64 {
    (scramble(scramble(seed) ^ index) >> 11) as f64 / (1u64 << 53) as f64
}

/// One step of SplitMix64 (Steele, Lea, Flood 2014): a bijection without visible structure.
fn scramble(state: u64) -> u64 {
    let z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
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

fn forbid(logits: &mut [f32], id: u32) {
    if let Some(logit) = logits.get_mut(id as usize) {
        *logit = f32::NEG_INFINITY;
    }
}

fn keep_only(logits: &mut [f32], allowed: &[u32]) {
    let kept: Vec<(u32, f32)> = allowed.iter().filter_map(|&id| Some((id, *logits.get(id as usize)?))).collect();
    logits.fill(f32::NEG_INFINITY);
    for (id, logit) in kept {
        logits[id as usize] = logit;
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

/// The normaliser of a row.
struct LogSoftmax {
    log_sum_exp: f64,
}

impl LogSoftmax {
    fn new(logits: &[f32]) -> Self {
        let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|&logit| f64::from(logit - most).exp()).sum();
        Self { log_sum_exp: f64::from(most) + sum.ln() }
    }

    fn of(&self, logits: &[f32], id: u32) -> TokenLogprob {
        let logit = logits[id as usize];
        let rank = 1 + logits.iter().filter(|&&other| other > logit).count() as u32;
        TokenLogprob { id, logprob: (f64::from(logit) - self.log_sum_exp) as f32, rank }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draw_many(params: SamplingParams, logits: &[f32], num: u64) -> Vec<usize> {
        let mut sampler = Sampler::new(logits.len(), vec![]);
        let mut counts = vec![0; logits.len()];
        for seed in 0..num {
            counts[sampler.choose(&params, seed, 0, logits) as usize] += 1;
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
    fn a_draw_depends_on_seed_and_index_alone() {
        let draws: Vec<f64> = (0..1000).map(|index| uniform(7, index)).collect();
        assert!(draws.iter().all(|draw| (0.0..1.0).contains(draw)));
        assert!((draws.iter().sum::<f64>() / 1000.0 - 0.5).abs() < 0.05);
        assert_eq!(uniform(7, 3), draws[3]);
        assert_ne!(uniform(8, 3), draws[3]);
    }

    #[test]
    fn logprobs_are_a_log_softmax_with_ranks() {
        let logits = [1.0f32, 3.0, 2.0, 3.0];
        let mut sampler = Sampler::new(4, vec![]);
        let logprobs = sampler.logprobs_of(&logits, 2, 3);
        assert_eq!(logprobs.top.iter().map(|top| (top.id, top.rank)).collect::<Vec<_>>(), [(1, 1), (3, 1), (2, 3)]);
        let total: f32 = logits.iter().map(|logit| logit.exp()).sum();
        assert!((logprobs.chosen.logprob - (2.0f32.exp() / total).ln()).abs() < 1e-6);
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
        let mut sampler = Sampler::new(4, vec![1]);
        let mut generation = Generation::new(params, &[], 0);
        let mut logits = [1.0, 2.0, 3.0, 4.0];
        let after_seven = sampler.sample(&mut generation, &[9, 7], 1, &mut logits).unwrap();
        assert_eq!(after_seven.token, 0, "3 is not allowed, 2 would complete a bad word, 1 is EOS");
        let mut logits = [1.0, 2.0, 3.0, 4.0];
        assert_eq!(sampler.sample(&mut generation, &[9, 8], 1, &mut logits).unwrap().token, 2);
    }
}
