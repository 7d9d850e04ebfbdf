//! Prompts with pieces whose KV was computed elsewhere: what is computed, and that nothing but the request decides it. Run on
//! every device.

use mneme::engine::{FinishReason, GenerateRequest, OutputStream, Piece, Reuse, SamplingParams, SchedulerLimits, Task};

use crate::composition::runner;
use crate::support::composed::{bits, blended, composed, run, sampling, submit};
use crate::support::engine::{Output, Setup, collect, limits, metric, request};
use crate::support::random::Random;
use crate::support::runner::BLOCK_SIZE;
use crate::support::tiny_model::{Family, TinyModel, VOCAB, WINDOW};
use crate::{FAMILIES, GEMMA, IS_FAST, start};

const SEED: u64 = 21;

#[test]
fn a_prompt_with_all_pieces_recomputed_is_an_ordinary_one() {
    for &family in FAMILIES {
        let model = TinyModel::new(family, SEED).write();
        let engine = start(model.path(), Setup::default());
        let (prompt, pieces) = composed(&mut Random::new(1), &[20, 2 * WINDOW], 2 * WINDOW);
        let linked = run(&engine, &prompt, &pieces, 12);
        assert_eq!(linked.reuse.linked_tokens, 0);
        assert_eq!(bits(&linked), bits(&run(&engine, &prompt, &[], 12)), "{family:?}");
    }
}

/// Stored keys that stay where they are are what computing them gives; texts shorter and longer than the window.
#[test]
fn a_piece_that_is_not_moved_is_a_prefix() {
    for &family in FAMILIES {
        let model = TinyModel::new(family, SEED).write();
        let lengths = [50, 16, WINDOW, 3 * WINDOW];
        for &num_stored in if IS_FAST || family == GEMMA { &lengths[..] } else { &lengths[..1] } {
            let source = Random::new(num_stored as u64).tokens(num_stored, VOCAB);
            let prompt = [&source[..], &Random::new(3).tokens(9, VOCAB)].concat();
            let piece = Piece {
                start: 1,
                num_tokens: num_stored - 1,
                source,
                source_start: 1,
                domain: String::new(),
                num_recomputed: 0,
                num_chosen: 0,
            };
            let blend = blended(std::slice::from_ref(&piece), 5);
            let [linked, blended, whole] = [vec![piece], blend, vec![]].map(|pieces| {
                let engine = start(model.path(), Setup::default());
                run(&engine, &prompt, &pieces, 12)
            });
            let num_moved = num_stored / 16 * 16 - 1;
            assert_eq!(linked.reuse.linked_tokens, num_moved, "{family:?} {num_stored}");
            assert_eq!(bits(&linked), bits(&whole), "{family:?} {num_stored}");
            assert_eq!((blended.reuse.linked_tokens, blended.reuse.chosen_tokens), (num_moved - 5, 5));
            assert_eq!(bits(&blended), bits(&whole), "{family:?} {num_stored}");
        }
    }
}

/// The same as computing each source alone, copying it with the device's own rotation, and computing the rest.
#[test]
fn a_composed_prompt_is_what_its_parts_are_by_hand() {
    for &family in FAMILIES {
        let model = TinyModel::new(family, SEED).write();
        let engine = start(model.path(), Setup::default());
        for num_recomputed in [0, 4, 13] {
            let (prompt, pieces) = composed(&mut Random::new(2), &[WINDOW - 5, WINDOW + 7], num_recomputed);
            let runner = runner(family);
            // Behind the prompt, which is not computed yet, so that computing the next source overwrites nothing.
            let aside = 8 * BLOCK_SIZE;
            let mut computed: Vec<usize> = (0..prompt.len()).collect();
            let mut moved = vec![];
            for piece in &pieces {
                let num_stored = piece.source.len() / BLOCK_SIZE * BLOCK_SIZE;
                runner.forward(&piece.source, &(0..num_stored).collect::<Vec<_>>());
                let stored: Vec<usize> = (1 + num_recomputed..num_stored).collect();
                let targets: Vec<usize> = stored.iter().map(|at| at - 1 + piece.start).collect();
                runner.copy(&stored, &targets.iter().map(|at| at + aside).collect::<Vec<_>>(), piece.start as i32 - 1);
                computed.retain(|at| !targets.contains(at));
                moved.extend(targets);
            }
            runner.copy(&moved.iter().map(|at| at + aside).collect::<Vec<_>>(), &moved, 0);
            let wanted = runner.forward(&prompt, &computed).pop().unwrap();
            let numbers = wanted.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()));
            let logits: Vec<f64> = numbers.map(f64::from).collect();
            let sum = logits.iter().map(|logit| logit.exp()).sum::<f64>().ln();
            let found = run(&engine, &prompt, &pieces, 1);
            assert_eq!(found.reuse.linked_tokens, moved.len());
            for top in &found.logprobs[0].top {
                let wanted = logits[top.id as usize] - sum;
                assert!(
                    (f64::from(top.logprob) - wanted).abs() < 1e-4,
                    "{family:?} {num_recomputed}: {top:?} {wanted}"
                );
            }
            let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0;
            assert_eq!(found.tokens, [best as u32], "{family:?} {num_recomputed}");
            let exact = run(&engine, &prompt, &[], 1);
            assert_ne!(bits(&found), bits(&exact), "{family:?} {num_recomputed}: it is an approximation");
        }
    }
}

/// Alone and cold, or among others, in small steps, preempted, from a warm cache, from the host's memory: the same bits.
#[test]
fn nothing_but_the_request_decides_the_answer() {
    let base = SchedulerLimits { max_model_len: 160, ..limits() };
    let families = [GEMMA, Family::Llama3, Family::Llama, Family::Qwen3];
    for &family in if IS_FAST { &families[..] } else { &families[..2] } {
        let model = TinyModel::new(family, SEED).write();
        let random = &mut Random::new(4);
        let kinds: [(&[usize], usize, usize); 6] =
            [(&[40, 38], 0, 0), (&[47], 5, 0), (&[20, 33], 16, 0), (&[60], 0, 0), (&[40, 38], 0, 7), (&[50], 4, 20)];
        let make = |(lens, num_recomputed, num_chosen): (&[usize], usize, usize)| {
            let (prompt, pieces) = composed(random, lens, num_recomputed);
            (prompt, blended(&pieces, num_chosen))
        };
        let requests: Vec<(Vec<u32>, Vec<Piece>)> = kinds.into_iter().map(make).collect();
        let alone: Vec<Output> = requests
            .iter()
            .map(|(prompt, pieces)| {
                let engine = start(model.path(), Setup { limits: base, ..Setup::default() });
                run(&engine, prompt, pieces, 40)
            })
            .collect();
        assert!(alone.iter().all(|output| output.reuse.linked_tokens > 0 && output.cached_tokens == 0));
        let tight = SchedulerLimits { num_blocks: 14, ..base };
        for (name, limits, host_bytes) in [
            ("roomy", base, 0),
            ("small steps", SchedulerLimits { max_num_batched_tokens: 7, ..base }, 0),
            ("no prefix cache", SchedulerLimits { prefix_caching: false, ..base }, 0),
            ("tight", tight, 0),
            ("tight above the host's memory", SchedulerLimits { max_num_seqs: 2, ..tight }, 16 << 20),
        ] {
            let engine = start(model.path(), Setup { limits, host_bytes, ..Setup::default() });
            let mut reuse = Reuse::default();
            for round in 0..2 {
                let streams: Vec<OutputStream> =
                    requests.iter().map(|(prompt, pieces)| submit(&engine, prompt, pieces.clone(), 40)).collect();
                for ((found, alone), (prompt, _)) in streams.into_iter().map(collect).zip(&alone).zip(&requests) {
                    assert_eq!(bits(&found), bits(alone), "{family:?} {name}, round {round}: {} tokens", prompt.len());
                    reuse.add(&found.reuse);
                }
            }
            let handle = engine.stop();
            if name == "roomy" {
                assert!(reuse.device_tokens > 100, "{family:?}: {reuse:?}");
            }
            if name.starts_with("tight") {
                assert!(
                    metric(&handle, "num_preemptions_total") > 0.0 || limits.max_num_seqs == 2,
                    "{family:?} {name}"
                );
            }
        }
    }
}

/// What lies behind the first moved token is nobody else's.
#[test]
fn blocks_behind_the_join_are_never_shared() {
    let model = TinyModel::new(Family::Llama, SEED).write();
    let engine = start(model.path(), Setup::default());
    let (prompt, pieces) = composed(&mut Random::new(5), &[60, 60], 40);
    let linked = run(&engine, &prompt, &pieces, 40);
    // Five tokens and forty recomputed ones are in front of the join: two full blocks.
    let whole = run(&engine, &prompt, &[], 40);
    assert_eq!((whole.cached_tokens, whole.reuse.linked_tokens), (32, 0));
    assert_ne!(bits(&linked), bits(&whole));
    let fresh = start(model.path(), Setup::default());
    assert_eq!(bits(&whole), bits(&run(&fresh, &prompt, &[], 40)));
    // The other way round: what is in front of the join is taken, the rest is not.
    let again = run(&fresh, &prompt, &pieces, 40);
    assert_eq!(again.cached_tokens, 32);
    assert_eq!(bits(&again), bits(&linked));
}

#[test]
fn impossible_pieces_are_refused() {
    let model = TinyModel::new(Family::Llama, SEED).write();
    let engine = start(model.path(), Setup::default());
    let (prompt, pieces) = composed(&mut Random::new(6), &[20, 20], 0);
    let change = |change: &dyn Fn(&mut Vec<Piece>)| {
        let mut pieces = pieces.clone();
        change(&mut pieces);
        pieces
    };
    for (number, pieces) in [
        change(&|pieces| pieces.reverse()),
        change(&|pieces| pieces[0].start += 1),
        change(&|pieces| pieces[0].num_tokens = usize::MAX),
        change(&|pieces| pieces[0].source_start = usize::MAX),
        change(&|pieces| pieces[1].source[7] ^= 1),
        change(&|pieces| pieces[1].source.resize(2000, 1)),
        change(&|pieces| pieces[1].source.push(VOCAB as u32)),
    ]
    .into_iter()
    .enumerate()
    {
        let output = run(&engine, &prompt, &pieces, 4);
        assert!(matches!(output.reason, Some(FinishReason::Error(_))), "{number}: {:?}", output.reason);
    }
    for task in [
        Task::Embed,
        Task::Deposit { is_durable: false, kept_in: None },
        Task::Generate(Box::new(SamplingParams { prompt_logprobs: Some(1), ..sampling(4) })),
    ] {
        let request = GenerateRequest { pieces: pieces.clone(), ..request(&prompt, task) };
        let output = collect(engine.handle.submit(request).unwrap());
        assert!(matches!(output.reason, Some(FinishReason::Error(_))), "{:?}", output.reason);
    }
}
