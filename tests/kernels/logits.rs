//! Rows of logits: biases and penalties are those of a plain loop to the bit, masks those of rows with minus infinity in
//! them, and what is said of a row is what the CPU computes of it.

use mneme::backend::cpu::{Isa, SampleScratch, log_sum_exp, sample_row};
use mneme::backend::{Backend, DType, LogitEdits, MAX_TOP_LOGPROBS, RowEdit, RowLogprobs, RowSampling, TokenMasks};

use crate::gpu::{self, Gpu, Output, encode};
use crate::raw::{ALL, Params, sampling_batch};
use crate::support::random::Random;

/// One number, less and more than a warp, odd lengths, multiples of a block, more rows than one.
const VOCABS: [usize; 8] = [1, 20, 31, 300, 1024, 1025, 4100, 5003];

/// Rows with a few numbers that are none, infinite, zero or tiny.
fn odd_rows(random: &mut Random, rows: usize, vocab: usize) -> Vec<f32> {
    let odd = [f32::NAN, f32::NEG_INFINITY, -0.0, 0.0, 1e-41, -1e-41, 3e38];
    let number = |random: &mut Random| match random.below(12) {
        0 => odd[random.below(odd.len())],
        _ => 4.0 * random.normal() as f32,
    };
    (0..rows * vocab).map(|_| number(random)).collect()
}

fn same(found: &[f32], wanted: &[f32]) -> bool {
    found.iter().zip(wanted).all(|(a, b)| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan()))
}

/// The biases and the counts of one row.
struct Edit {
    biases: Vec<(usize, f32)>,
    counts: Vec<(usize, u32)>,
    penalties: [f32; 3],
}

impl Edit {
    /// About half of the tokens in each list.
    fn random(random: &mut Random, vocab: usize) -> Self {
        let tokens = |random: &mut Random| (0..vocab).filter(|_| random.below(2) == 0).collect::<Vec<_>>();
        let biases = tokens(random).into_iter().map(|id| match random.below(9) {
            0 => (id, f32::NEG_INFINITY),
            _ => (id, 10.0 * random.normal() as f32),
        });
        let biases = biases.collect();
        let counts = tokens(random).into_iter().map(|id| (id, random.below(5) as u32 * 7)).collect();
        Self { biases, counts, penalties: [1.3, 0.7, -0.45] }
    }

    fn apply(&self, row: &mut [f32]) {
        let [repetition, frequency, presence] = self.penalties;
        self.biases.iter().for_each(|(id, bias)| row[*id] += bias);
        for (id, count) in &self.counts {
            let logit = row[*id];
            row[*id] = if logit > 0.0 { logit / repetition } else { logit * repetition };
            if *count > 0 {
                row[*id] -= frequency * *count as f32 + presence;
            }
        }
    }
}

fn upload(gpu: &Gpu, edits: &[(usize, Edit)]) -> LogitEdits<mneme::backend::cuda::CudaBuffer> {
    let (mut rows, mut entries) = (vec![], vec![]);
    for (row, edit) in edits {
        let [repetition_penalty, frequency_penalty, presence_penalty] = edit.penalties;
        let (first_entry, num_biases, num_counts) = (entries.len() / 2, edit.biases.len(), edit.counts.len());
        let edited = RowEdit {
            row: *row,
            first_entry,
            num_biases,
            num_counts,
            repetition_penalty,
            frequency_penalty,
            presence_penalty,
        };
        rows.extend(edited.words());
        entries.extend(edit.biases.iter().flat_map(|(id, bias)| [*id as i32, bias.to_bits() as i32]));
        entries.extend(edit.counts.iter().flat_map(|(id, count)| [*id as i32, *count as i32]));
    }
    LogitEdits {
        rows: gpu.indices(&rows, edits.len(), RowEdit::NUM_WORDS),
        entries: gpu.indices(&entries, entries.len() / 2, RowEdit::ENTRY_WORDS),
    }
}

#[test]
fn edits_are_the_hosts_to_the_bit_and_can_be_taken_back() {
    let gpus = gpu::lend();
    let gpu = &gpus[0];
    let random = &mut Random::new(1);
    for vocab in VOCABS {
        let original = odd_rows(random, 4, vocab);
        // Of the rows one is left alone; one has no biases, one no counts.
        let mut edits: Vec<(usize, Edit)> = [3, 0, 2].map(|row| (row, Edit::random(random, vocab))).into();
        edits[1].1.biases.clear();
        edits[2].1.counts.clear();
        let mut wanted = original.clone();
        edits.iter().for_each(|(row, edit)| edit.apply(&mut wanted[row * vocab..(row + 1) * vocab]));
        let logits = gpu.output(4, vocab, DType::F32);
        gpu.write(&logits.tensor, &encode(&original, DType::F32));
        let uploaded = upload(gpu, &edits);
        gpu.backend.edit_logits(&gpu.stream, &logits.tensor, &uploaded).unwrap();
        assert!(same(&logits.numbers(gpu), &wanted), "{vocab} tokens");
        gpu.backend.restore_logits(&gpu.stream, &logits.tensor, &uploaded).unwrap();
        assert!(same(&logits.numbers(gpu), &original), "{vocab} tokens are not what they were");
    }
}

/// A bit for every token.
fn pack(mask: &[bool]) -> Vec<i32> {
    let word = |bits: &[bool]| bits.iter().enumerate().map(|(at, bit)| u32::from(*bit) << at).sum::<u32>() as i32;
    mask.chunks(32).map(word).collect()
}

#[test]
fn masked_tokens_are_as_if_minus_infinity() {
    let gpus = gpu::lend();
    let gpu = &gpus[0];
    let random = &mut Random::new(2);
    for vocab in VOCABS {
        // One mask allows nothing, one the last token, one what is not a number, one about half, one a few; rows have them
        // in another order, and one row has none.
        let mut logits: Vec<f32> = (0..6 * vocab).map(|_| 2.0 * random.normal() as f32).collect();
        logits.iter_mut().step_by(7).for_each(|logit| *logit = f32::NAN);
        let mask_of = [3, -1, 0, 2, 1, 4];
        let nan_row = &logits[3 * vocab..4 * vocab];
        let masks: [Vec<bool>; 5] = [
            vec![false; vocab],
            (0..vocab).map(|id| id + 1 == vocab).collect(),
            nan_row.iter().map(|logit| logit.is_nan()).collect(),
            (0..vocab).map(|_| random.below(2) == 0).collect(),
            (0..vocab).map(|_| random.below(50) == 0).collect(),
        ];
        let mut masked = logits.clone();
        for (row, mask) in mask_of.into_iter().enumerate().filter(|(_, mask)| *mask >= 0) {
            let allowed = &masks[mask as usize];
            let row = masked[row * vocab..(row + 1) * vocab].iter_mut();
            row.zip(allowed).filter(|(_, allowed)| !**allowed).for_each(|(logit, _)| *logit = f32::NEG_INFINITY);
        }
        let words: Vec<i32> = masks.iter().flat_map(|mask| pack(mask)).collect();
        let on_device = gpu.tensor(&logits, 6, vocab, DType::F32);
        for params in [
            Params { temperature: 0.0, ..ALL },
            ALL,
            Params { top_k: 9, ..ALL },
            Params { temperature: 1.7, top_p: 0.8, min_p: 0.02, ..ALL },
        ] {
            let mut sampling = sampling_batch(gpu, 6, params, 5);
            sampling.masks = Some(TokenMasks {
                mask_of: gpu.indices(&mask_of, 1, 6),
                words: gpu.indices(&words, masks.len(), vocab.div_ceil(32)),
            });
            let out = gpu.output(1, 6, DType::I32);
            gpu.backend.sample(&gpu.stream, &on_device, &sampling, &out.tensor).unwrap();
            let mut scratch = SampleScratch::default();
            let token = |(row, logits): (usize, &[f32])| {
                let Params { temperature, top_k, top_p, min_p } = params;
                let top_k = top_k as u32;
                let sampling = RowSampling { temperature, top_k, top_p, min_p, seed: 5, index: row as u64 };
                sample_row(Isa::best(), logits, &sampling, &mut scratch) as i32
            };
            let wanted: Vec<i32> = masked.chunks_exact(vocab).enumerate().map(token).collect();
            assert_eq!(out.indices(gpu), wanted, "{vocab} tokens, {params:?}");
        }
        let mut wrong = sampling_batch(gpu, 6, ALL, 5);
        let words = gpu.indices(&vec![0; vocab.div_ceil(32) + 1], 1, vocab.div_ceil(32) + 1);
        wrong.masks = Some(TokenMasks { mask_of: gpu.indices(&mask_of, 1, 6), words });
        let out = gpu.output(1, 6, DType::I32);
        assert!(gpu.backend.sample(&gpu.stream, &on_device, &wrong, &out.tensor).is_err());
    }
}

/// The likeliest tokens of a row, of equals the first first; what is not a number comes last.
fn likeliest(row: &[f32], count: usize) -> Vec<u32> {
    let mut ids: Vec<u32> = (0..row.len() as u32).collect();
    let order = |id: &u32| row[*id as usize];
    ids.sort_by(|a, b| match (order(a), order(b)) {
        (x, y) if x.is_nan() || y.is_nan() => x.is_nan().cmp(&y.is_nan()),
        (x, y) => y.partial_cmp(&x).unwrap(),
    });
    ids.truncate(count);
    ids
}

fn answers(gpu: &Gpu, out: &Output) -> Vec<RowLogprobs> {
    let words: Vec<u32> = out.indices(gpu).into_iter().map(|word| word as u32).collect();
    words.chunks_exact(RowLogprobs::NUM_WORDS).map(|words| RowLogprobs::from_words(words.try_into().unwrap())).collect()
}

#[test]
fn logprobs_are_the_hosts_to_the_bit() {
    let gpus = gpu::lend();
    let gpu = &gpus[0];
    let random = &mut Random::new(3);
    // More strips than are summed in one round, and more than one four of a row for each thread.
    for vocab in VOCABS.into_iter().chain([9_000, 262_148]) {
        let mut logits = odd_rows(random, 6, vocab);
        let row = |at: usize| at * vocab..(at + 1) * vocab;
        logits[row(1)].iter_mut().for_each(|logit| *logit = (*logit * 0.5).round());
        logits[row(2)].fill(f32::NEG_INFINITY);
        logits[row(3)].fill(f32::NAN);
        // All of the best belong to one thread.
        logits[row(4)].iter_mut().step_by(4096).for_each(|logit| *logit = 50.0);
        logits[row(5)][vocab / 2] = f32::INFINITY;
        let tokens: Vec<i32> = (0..6).map(|_| random.below(vocab) as i32).collect();
        let asked = [(4, 20), (0, MAX_TOP_LOGPROBS), (5, 3), (1, 7), (2, 2), (3, 4), (0, 0)];
        let asked = if vocab > 10_000 { &asked[..2] } else { &asked[..] };
        let out = gpu.output(asked.len(), RowLogprobs::NUM_WORDS, DType::I32);
        let words: Vec<i32> = asked.iter().flat_map(|(row, num_top)| [*row as i32, *num_top as i32]).collect();
        gpu.backend
            .logprobs(
                &gpu.stream,
                &gpu.tensor(&logits, 6, vocab, DType::F32),
                &gpu.indices(&tokens, 1, 6),
                &gpu.indices(&words, asked.len(), RowLogprobs::ASKED_WORDS),
                &out.tensor,
            )
            .unwrap();
        for (&(at, num_top), found) in asked.iter().zip(answers(gpu, &out)) {
            let (what, row) = (format!("row {at} of {vocab}"), &logits[row(at)]);
            let chosen = row[tokens[at] as usize];
            assert!(same(&[found.chosen], &[chosen]), "{what}");
            assert_eq!(found.rank, 1 + row.iter().filter(|logit| **logit > chosen).count() as u32, "{what}");
            let wanted = log_sum_exp(Isa::best(), row);
            assert_eq!(found.log_sum_exp().to_bits(), wanted.to_bits(), "{what}: {} for {wanted}", found.log_sum_exp());
            let (ids, values): (Vec<u32>, Vec<f32>) = found.top(num_top.min(vocab)).unzip();
            let wanted = likeliest(row, num_top);
            assert_eq!(ids, wanted, "{what}");
            let wanted: Vec<f32> = wanted.into_iter().map(|id| row[id as usize]).collect();
            assert!(same(&values, &wanted), "{what}");
        }
    }
}
