//! What a step's results do to sequences: computed tokens, sampled tokens, ends, and what is counted of them.

use std::time::Instant;

use super::Engine;
use crate::backend::Backend;
use crate::engine::logprobs::logprobs_of;
use crate::engine::request::{FinishReason, OutputEvent, Reuse};
use crate::engine::runner::SequenceOutput;
use crate::engine::sequence::{Sequence, Work};
use crate::telemetry::EngineMetrics;
use crate::{Error, Result};

impl<B: Backend> Engine<B> {
    /// Takes the results over: computed tokens, sampled tokens, ended sequences.
    pub(super) fn commit(&mut self) -> Result<()> {
        for at in 0..self.scheduler.scheduled().len() {
            let entry = self.scheduler.scheduled()[at];
            let output = self.runner.outputs()[at];
            self.collect_rows(entry.index, entry.num_tokens, &output);
            self.scheduler.advance(entry.index, entry.num_tokens);
            if let Err(error) = self.commit_sequence(entry.index, &output) {
                self.end(entry.index, FinishReason::Error(error.to_string()));
            }
        }
        self.scheduler.remove_finished();
        Ok(())
    }

    fn commit_sequence(&mut self, index: usize, output: &SequenceOutput) -> Result<()> {
        let sequence = self.scheduler.sequence_mut(index);
        if sequence.num_uncomputed_tokens() > 0 {
            return Ok(());
        }
        match &mut sequence.work {
            Work::Embed { sum } => {
                let num_tokens = sequence.num_prompt_tokens as f32;
                let mean = sum.iter().map(|value| value / num_tokens).collect();
                sequence.sink.send(OutputEvent::Embedding(mean));
                self.end(index, FinishReason::Stop { token: None });
                Ok(())
            }
            Work::Source => {
                self.scheduler.finish_source(index);
                Ok(())
            }
            Work::Deposit { .. } => {
                self.scheduler.begin_deposit(index);
                Ok(())
            }
            Work::Generate(_) => self.commit_token(index, output),
        }
    }

    /// Samples the next token of a sequence whose tokens are all computed.
    fn commit_token(&mut self, index: usize, output: &SequenceOutput) -> Result<()> {
        let sequence = self.scheduler.sequence_mut(index);
        start(sequence);
        let Work::Generate(generation) = &mut sequence.work else { return Ok(()) };
        let logits_row = output.logits_row.ok_or_else(|| Error::Device("a finished sequence has no logits".into()))?;
        if generation.params.max_tokens == 0 {
            self.end(index, FinishReason::Length);
            return Ok(());
        }
        let (token, logprobs) = if output.host_rows.num_rows > 0 {
            let logits = self.runner.host_logits(output.host_rows, output.host_rows.num_rows - 1);
            let sample = self.sampler.sample(generation, &sequence.tokens, sequence.num_prompt_tokens, logits)?;
            self.metrics.host_sampled_tokens.inc();
            (sample.token, sample.logprobs)
        } else {
            let (token, num_top) = (self.runner.token(logits_row), generation.params.logprobs.unwrap_or(0));
            let logprobs = output.logprobs.map(|answer| self.runner.logprobs(answer, token, num_top));
            (token, logprobs.map(Box::new))
        };
        self.metrics.generation_tokens.inc();
        let number = sequence.num_output_tokens() + 1;
        observe_token(&self.metrics, sequence);
        let Work::Generate(generation) = &mut sequence.work else { return Ok(()) };
        if let Some(reason) = generation.stops_at(token, &self.config.eos_token_ids, number) {
            self.end(index, reason);
            return Ok(());
        }
        generation.accept(token)?;
        let complete = generation.is_complete(number);
        sequence.tokens.push(token);
        sequence.sink.send(OutputEvent::Token { id: token, logprobs });
        if let Some(reason) = complete {
            self.end(index, reason);
        }
        Ok(())
    }

    /// Takes prompt logits and hidden states while the step's buffers hold them.
    fn collect_rows(&mut self, index: usize, num_tokens: usize, output: &SequenceOutput) {
        let sequence = self.scheduler.sequence_mut(index);
        let first = sequence.num_computed_tokens;
        match &mut sequence.work {
            Work::Embed { sum } => {
                for row in 0..output.host_rows.num_rows {
                    self.runner.add_host_hidden(output.host_rows, row, sum);
                }
            }
            Work::Generate(generation) if generation.wants_prompt_logits() => {
                let num_top = generation.params.prompt_logprobs.unwrap_or(0);
                if first == 0 {
                    generation.prompt_logprobs.push(None);
                }
                // The logits at one position are about the next token; those at the last are sampled from.
                for row in 0..num_tokens {
                    if let Some(&next) = sequence.tokens[..sequence.num_prompt_tokens].get(first + row + 1) {
                        let logits = self.runner.host_logits(output.host_rows, row);
                        generation.prompt_logprobs.push(Some(logprobs_of(logits, next, num_top)));
                    }
                }
            }
            Work::Generate(_) | Work::Deposit { .. } | Work::Source => {}
        }
    }

    fn end(&mut self, index: usize, reason: FinishReason) {
        let sequence = self.scheduler.sequence_mut(index);
        count_end(&self.metrics, sequence, &reason);
        sequence.finish(reason);
    }
}

/// Sends `Started` before the first token.
fn start(sequence: &mut Sequence) {
    let cached_tokens = sequence.num_cached_tokens.unwrap_or(0).min(sequence.num_prompt_tokens);
    let Work::Generate(generation) = &mut sequence.work else { return };
    if !generation.started {
        generation.started = true;
        let prompt_logprobs = std::mem::take(&mut generation.prompt_logprobs);
        let reuse = Reuse { is_merged: sequence.merged.is_some(), ..sequence.reuse };
        sequence.sink.send(OutputEvent::Started { cached_tokens, reuse, prompt_logprobs });
    }
}

fn observe_token(metrics: &EngineMetrics, sequence: &mut Sequence) {
    let now = Instant::now();
    match sequence.last_token_at.replace(now) {
        Some(last) => metrics.inter_token_latency.observe(now.duration_since(last).as_secs_f64()),
        None => {
            let scheduled_at = sequence.scheduled_at.unwrap_or(now);
            metrics.request_queue_time.observe(scheduled_at.duration_since(sequence.arrived_at).as_secs_f64());
            metrics.time_to_first_token.observe(now.duration_since(sequence.arrived_at).as_secs_f64());
            let cached_tokens = sequence.num_cached_tokens.unwrap_or(0) as u64;
            metrics.prefix_cache_queries.inc_by(sequence.num_prompt_tokens as u64);
            metrics.prefix_cache_hits.inc_by(cached_tokens);
            let reuse = &sequence.reuse;
            metrics.count_cached([reuse.device_tokens, reuse.host_tokens, reuse.disk_tokens]);
            metrics.prompt_tokens.inc_by(sequence.num_prompt_tokens as u64);
        }
    }
}

pub(super) fn count_end(metrics: &EngineMetrics, sequence: &Sequence, reason: &FinishReason) {
    let label = match reason {
        FinishReason::Stop { .. } => "stop",
        FinishReason::Length => "length",
        FinishReason::Abort => "abort",
        FinishReason::Error(_) => "error",
    };
    metrics.count_finished(label);
    metrics.request_generation_tokens.observe(sequence.num_output_tokens() as f64);
    metrics.e2e_request_latency.observe(sequence.arrived_at.elapsed().as_secs_f64());
}
