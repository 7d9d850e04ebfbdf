//! Decode steps as CUDA graphs: the bits are those of steps that are launched kernel by kernel, while sequences come and
//! go and contexts grow, and they are replayed.

use std::path::Path;

use mneme::backend::DType;
use mneme::backend::cuda::CudaBackend;
use mneme::engine::{MergeRule, OutputStream, SamplingParams};

use crate::adapters::{COMPOSITIONS, adapters, compose, load, submit};
use crate::families::{check_tokens, tolerances};
use crate::invariance::fingerprint;
use crate::merging::{Served, merging};
use crate::support::engine::{Output, Setup, TestEngine, collect, greedy};
use crate::support::random::Random;
use crate::support::softgpu;
use crate::support::tiny_model::{Family, TinyModel, VOCAB};

/// Positions of one chunk of decode attention: longer contexts take another kernel.
const CHUNK: usize = 256;

/// Prompts and lengths of answers: the batch shrinks one by one, and two contexts grow into a second chunk.
pub(crate) fn requests() -> Vec<(Vec<u32>, SamplingParams)> {
    let mut random = Random::new(6);
    let lengths = [(5, 4), (CHUNK - 12, 24), (33, 9), (70, 14), (CHUNK - 3, 12)];
    let mut requests: Vec<_> =
        lengths.iter().map(|&(prompt, answer)| (random.tokens(prompt, VOCAB), greedy(answer))).collect();
    // One is sampled, of whose logits the host needs all.
    requests[3].1 = SamplingParams { temperature: 0.8, seed: Some(3), ..requests[3].1.clone() };
    requests.iter_mut().for_each(|(_, sampling)| sampling.logprobs = Some(3));
    requests
}

/// What the requests give, and how many steps were replayed.
pub(crate) fn run(backend: CudaBackend, model: &Path, dtype: DType) -> (Vec<Output>, u64) {
    let engine = TestEngine::start(backend, model, Setup { kv_dtype: dtype, ..Setup::default() });
    let submit = |(prompt, sampling): (Vec<u32>, SamplingParams)| engine.submit(&prompt, sampling);
    let streams: Vec<OutputStream> = requests().into_iter().map(submit).collect();
    let outputs = streams.into_iter().map(collect).collect();
    let handle = engine.stop();
    (outputs, handle.metrics().repeated_steps.get())
}

pub(crate) fn check(family: Family, dtype: DType) {
    let model = TinyModel::new(family, 17).write();
    let (found, num_replayed) = run(softgpu::backend(dtype), model.path(), dtype);
    let (wanted, num_never) = run(softgpu::backend(dtype).without_graphs(), model.path(), dtype);
    assert_eq!(num_never, 0);
    // Of each number of sequences, and on each side of the chunk's end, the first two are not.
    assert!(num_replayed >= 8, "only {num_replayed} steps were replayed");
    let bits = |outputs: &[Output]| outputs.iter().map(fingerprint).collect::<Vec<_>>();
    assert_eq!(bits(&found), bits(&wanted), "{family:?} in {dtype}");
    let exact = Setup { dtype: Some(DType::F32), kv_dtype: DType::F32, ..Setup::default() };
    let cpu = TestEngine::start_on_cpu(model.path(), exact);
    for (at, (prompt, sampling)) in
        requests().into_iter().enumerate().filter(|(_, (_, sampling))| sampling.seed.is_none())
    {
        let on_cpu = collect(cpu.submit(&prompt, sampling));
        check_tokens(&found[at], &on_cpu, tolerances(dtype).0, &format!("{family:?}, request {at}"));
    }
}

#[test]
fn graphs_give_the_bits_of_single_launches() {
    check(Family::Llama, DType::BF16);
    check(Family::Gemma3, DType::F16);
}

/// Prompts in launches of their own, as another library's attention wants them, change no bits and no recorded steps.
#[test]
fn prompts_may_be_attended_to_apart() {
    let model = TinyModel::new(Family::Gemma3, 17).write();
    let backends = [softgpu::backend(DType::BF16), softgpu::backend(DType::BF16).with_attention_in_runs()];
    let [whole, apart] = backends.map(|backend| {
        let (outputs, num_replayed) = run(backend, model.path(), DType::BF16);
        assert!(num_replayed >= 8, "only {num_replayed} steps were replayed");
        outputs.iter().map(fingerprint).collect::<Vec<_>>()
    });
    assert_eq!(whole, apart);
}

/// As long as the same adapters are added to the same rows; the pairs are of one size, so that each takes the other's graph.
#[test]
fn graphs_give_the_bits_of_single_launches_with_adapters() {
    let model = TinyModel::new(Family::Llama, 18);
    let (written, adapters) = (model.write(), adapters(&model));
    let run = |backend: CudaBackend| {
        let engine = TestEngine::start(backend, written.path(), Setup::default());
        let loaded: Vec<_> = adapters.iter().map(|adapter| load(&engine, adapter)).collect();
        let mut random = Random::new(8);
        let mut answer = |pair: [usize; 2]| {
            let applied = pair.map(|at| compose(&loaded, COMPOSITIONS[at]));
            let sampling = || SamplingParams { logprobs: Some(3), ..greedy(10) };
            let streams = applied.map(|applied| submit(&engine, &random.tokens(20, VOCAB), sampling(), applied));
            streams.map(|stream| fingerprint(&collect(stream)))
        };
        let answers: Vec<_> = [[1, 4], [4, 1], [0, 0], [2, 0], [1, 4]].map(&mut answer).into();
        (answers, engine.stop().metrics().repeated_steps.get())
    };
    let (found, num_replayed) = run(softgpu::backend(DType::BF16));
    let (wanted, num_never) = run(softgpu::backend(DType::BF16).without_graphs());
    assert_eq!((found, num_never), (wanted, 0));
    // Of nine steps of a pair the first two are not replayed, nor the first two of another number of sequences.
    assert!(num_replayed >= 15, "only {num_replayed} steps were replayed");
}

/// Of one copy after the other, with rows beside that do not go through it.
#[test]
fn graphs_give_the_bits_of_single_launches_with_merged_weights() {
    let model = TinyModel::new(Family::Llama, 19);
    let written = model.write();
    let run = |backend: CudaBackend| {
        let engine = TestEngine::start(backend, written.path(), merging(Setup::default()));
        let served = Served::with(engine, &model, MergeRule::Always);
        let mut random = Random::new(9);
        let mut answer = |composition: &'static [(usize, f32)]| {
            // The copy before it is given up first.
            while !served.run(&[1, 2, 3], composition).reuse.is_merged {}
            let sampling = || SamplingParams { logprobs: Some(3), ..greedy(14) };
            let asked = [&[][..], composition].map(|own| served.submit(&random.tokens(20, VOCAB), sampling(), own));
            asked.map(|stream| {
                let output = collect(stream);
                (output.reuse.is_merged, fingerprint(&output))
            })
        };
        let answers: Vec<_> = [&[(0, 1.0)][..], &[(0, 0.5), (1, 1.0)]].map(&mut answer).into();
        (answers, served.engine.stop().metrics().repeated_steps.get())
    };
    let (found, num_replayed) = run(softgpu::backend(DType::BF16));
    let (wanted, num_never) = run(softgpu::backend(DType::BF16).without_graphs());
    assert_eq!((&found, num_never), (&wanted, 0));
    assert!(found.iter().all(|[base, merged]| !base.0 && merged.0), "{found:?}");
    // Of fourteen steps of a pair the first is a prompt's and two are not replayed.
    assert!(num_replayed >= 16, "only {num_replayed} steps were replayed");
}

/// Without a driver's help steps are launched kernel by kernel; what was wrong is tried a few times only.
#[test]
fn steps_go_on_when_they_cannot_be_recorded() {
    if softgpu::is_alone("graphs::steps_go_on_when_they_cannot_be_recorded") {
        let model = TinyModel::new(Family::Llama, 17).write();
        let (wanted, _) = run(softgpu::backend(DType::BF16).without_graphs(), model.path(), DType::BF16);
        for rules in ["cuStreamBeginCapture_v2=900", "cuGraphInstantiateWithFlags=2"] {
            let backend = softgpu::backend(DType::BF16);
            softgpu::fail(rules);
            let (found, num_replayed) = run(backend, model.path(), DType::BF16);
            softgpu::fail("");
            assert_eq!(num_replayed, 0, "{rules}");
            let bits = |outputs: &[Output]| outputs.iter().map(fingerprint).collect::<Vec<_>>();
            assert_eq!(bits(&found), bits(&wanted), "{rules}");
        }
        // A recording that fails once is made the next time, and a graph that cannot be updated anew.
        for rules in ["cuStreamBeginCapture_v2=900x1", "cuGraphExecUpdate_v2=910"] {
            let backend = softgpu::backend(DType::BF16);
            softgpu::fail(rules);
            let (found, num_replayed) = run(backend, model.path(), DType::BF16);
            softgpu::fail("");
            assert!(num_replayed > 0, "{rules}");
            assert_eq!(found.len(), wanted.len(), "{rules}");
        }
    }
}
