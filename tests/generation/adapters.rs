//! Adapters on every device: whatever else runs beside a request, it has the same bits, no KV crosses from one composition to
//! another, and what cannot be served is refused. What is computed is for each device's own tests.

use mneme::engine::{
    AppliedAdapter, FinishReason, GenerateRequest, LoadedAdapter, OutputStream, SamplingParams, SchedulerLimits, Task,
};
use mneme::telemetry::Evictor;

use crate::invariance::{Fingerprint, fingerprint};
use crate::support::engine::{Setup, TestEngine, collect, greedy, limits, request};
use crate::support::random::Random;
use crate::support::tiny_adapter::{ALL, TinyAdapter};
use crate::support::tiny_model::{Family, TinyModel, VOCAB};
use crate::{kinds, start};

/// Adapters of a request, by number.
pub(crate) type Composition = &'static [(usize, f32)];

/// Of three adapters: ranks of no whole vector, one whole, and a subset of the modules.
pub(crate) const COMPOSITIONS: [Composition; 7] =
    [&[], &[(0, 1.0)], &[(1, 0.7)], &[(2, -0.5)], &[(0, 0.7), (1, 0.3)], &[(1, 0.3), (0, 0.7), (2, 1.5)], &[(0, 0.5)]];

pub(crate) fn adapters(model: &TinyModel) -> [TinyAdapter; 3] {
    [
        TinyAdapter::of(model, &ALL, 3, 1),
        TinyAdapter::of(model, &ALL, 16, 2),
        TinyAdapter::of(model, &["self_attn.v_proj", "mlp.down_proj"], 40, 3),
    ]
}

pub(crate) fn load(engine: &TestEngine, adapter: &TinyAdapter) -> LoadedAdapter {
    engine.handle.load_adapter(adapter.write().path()).unwrap()
}

pub(crate) fn compose(loaded: &[LoadedAdapter], composition: Composition) -> Vec<AppliedAdapter> {
    let applied = |&(at, scale): &(usize, f32)| AppliedAdapter { adapter: loaded[at].clone(), scale };
    composition.iter().map(applied).collect()
}

pub(crate) fn submit(
    engine: &TestEngine,
    prompt: &[u32],
    sampling: SamplingParams,
    adapters: Vec<AppliedAdapter>,
) -> OutputStream {
    let request = GenerateRequest { adapters, ..request(prompt, Task::Generate(Box::new(sampling))) };
    engine.handle.submit(request).unwrap()
}

pub(crate) fn sampling() -> SamplingParams {
    SamplingParams { logprobs: Some(3), ..greedy(12) }
}

/// Prompts with beginnings in common, under every composition.
fn mixed(seed: u64) -> Vec<(Vec<u32>, Composition)> {
    let mut random = Random::new(seed);
    let shared = random.tokens(40, VOCAB);
    let make = |at: usize| {
        let mut prompt = if random.once_in(2) { shared.clone() } else { vec![] };
        let num_own = random.within(1, 50);
        prompt.extend(random.tokens(num_own, VOCAB));
        (prompt, COMPOSITIONS[at % COMPOSITIONS.len()])
    };
    (0..14).map(make).collect()
}

/// Alone and whole on one thread; all at once, in small steps, with a cache of prefixes.
pub(crate) fn check_bits(model: &TinyModel, adapters: &[TinyAdapter]) {
    let written = model.write();
    for (isa, dtype, kv_dtype) in kinds() {
        let cold = SchedulerLimits { prefix_caching: false, ..limits() };
        let small = SchedulerLimits { max_num_batched_tokens: 23, num_blocks: 70, ..limits() };
        let start = |limits: SchedulerLimits, num_threads: usize| {
            start(written.path(), Setup { isa, dtype, kv_dtype, num_threads, limits, ..Setup::default() })
        };
        let load_all = |engine: &TestEngine| adapters.iter().map(|adapter| load(engine, adapter)).collect::<Vec<_>>();
        let (alone, never) = (start(cold, 1), start(cold, 1));
        let loaded_alone = load_all(&alone);
        for (limits, num_threads) in [(limits(), 3), (small, 2)] {
            let together = start(limits, num_threads);
            let loaded = load_all(&together);
            let requests = mixed(7);
            let streams: Vec<_> = requests
                .iter()
                .map(|(prompt, composition)| submit(&together, prompt, sampling(), compose(&loaded, composition)))
                .collect();
            for ((prompt, composition), stream) in requests.iter().zip(streams) {
                let found = fingerprint(&collect(stream));
                let applied = compose(&loaded_alone, composition);
                let wanted = fingerprint(&collect(submit(&alone, prompt, sampling(), applied)));
                assert_eq!(found, wanted, "{isa} {composition:?}");
                if composition.is_empty() {
                    let base = fingerprint(&collect(never.submit(prompt, sampling())));
                    assert_eq!(found, base, "{isa}: an engine without adapters says something else");
                }
            }
        }
    }
}

#[test]
fn a_request_has_the_same_bits_alone_and_among_other_adapters() {
    let model = TinyModel::new(Family::Qwen3, 5);
    check_bits(&model, &adapters(&model));
}

/// A server that finds the KV of a prompt again under another adapter answers with a mixture of both.
#[test]
fn kv_is_never_shared_across_adapters() {
    let model = TinyModel::new(Family::Llama, 21);
    let (written, adapters) = (model.write(), adapters(&model));
    let start = || {
        let engine = start(written.path(), Setup::default());
        let loaded: Vec<_> = adapters.iter().map(|adapter| load(&engine, adapter)).collect();
        (engine, loaded)
    };
    let (engine, loaded) = start();
    let prompt = Random::new(9).tokens(50, VOCAB);
    let mut seen: Vec<Fingerprint> = Vec::new();
    for composition in COMPOSITIONS {
        let first = collect(submit(&engine, &prompt, sampling(), compose(&loaded, composition)));
        assert_eq!(first.cached_tokens, 0, "{composition:?} found the KV of another composition");
        let again = collect(submit(&engine, &prompt, sampling(), compose(&loaded, composition)));
        assert_eq!(again.cached_tokens, 48, "{composition:?} did not find its own KV");
        let (fresh, fresh_loaded) = start();
        let wanted = collect(submit(&fresh, &prompt, sampling(), compose(&fresh_loaded, composition)));
        for found in [&first, &again] {
            assert_eq!(fingerprint(found), fingerprint(&wanted), "{composition:?}");
        }
        assert!(!seen.contains(&fingerprint(&wanted)), "{composition:?} changes nothing");
        seen.push(fingerprint(&wanted));
    }
    // The order in which a request names its adapters is not part of what it asks for.
    let mut turned = compose(&loaded, COMPOSITIONS[5]);
    turned.reverse();
    let output = collect(submit(&engine, &prompt, sampling(), turned));
    assert_eq!((output.cached_tokens, fingerprint(&output)), (48, seen.swap_remove(5)));
}

/// A server that applies what is loaded to everybody changes answers nobody asked it to change.
#[test]
fn loaded_adapters_do_nothing_to_requests_that_name_none() {
    let model = TinyModel::new(Family::Llama, 22);
    let written = model.write();
    let engine = start(written.path(), Setup::default());
    let prompt = Random::new(10).tokens(40, VOCAB);
    let before = fingerprint(&collect(engine.submit(&prompt, sampling())));
    let loaded: Vec<_> = adapters(&model).iter().map(|adapter| load(&engine, adapter)).collect();
    let nothing = [vec![], vec![AppliedAdapter { adapter: loaded[0].clone(), scale: 0.0 }]];
    for adapters in nothing {
        let output = collect(submit(&engine, &prompt, sampling(), adapters));
        assert_eq!((output.cached_tokens, fingerprint(&output)), (32, before.clone()));
    }
}

#[test]
fn a_replaced_adapter_is_another_and_running_requests_keep_the_old_one() {
    let model = TinyModel::new(Family::Llama, 23);
    let written = model.write();
    let [old, new, _] = adapters(&model);
    let engine = start(written.path(), Setup::default());
    let folder = old.write();
    let one = |loaded: &LoadedAdapter| vec![AppliedAdapter { adapter: loaded.clone(), scale: 1.0 }];
    let first = engine.handle.load_adapter(folder.path()).unwrap();
    let prompt = Random::new(11).tokens(40, VOCAB);
    let wanted = fingerprint(&collect(submit(&engine, &prompt, sampling(), one(&first))));
    let running = submit(&engine, &prompt, sampling(), one(&first));
    new.write_into(folder.path());
    let second = engine.handle.load_adapter(folder.path()).unwrap();
    assert_ne!(first.digest(), second.digest());
    drop(first);
    let replaced = collect(submit(&engine, &prompt, sampling(), one(&second)));
    assert_eq!(replaced.cached_tokens, 0);
    assert_eq!(fingerprint(&collect(running)), wanted);
    assert_ne!(fingerprint(&replaced), wanted);
}

#[test]
fn adapters_that_do_not_fit_are_refused_and_the_engine_goes_on() {
    let model = TinyModel::new(Family::Llama, 24);
    let written = model.write();
    let engine = start(written.path(), Setup::default());
    let deeper = TinyAdapter::of(&TinyModel::new(Family::Gemma3, 1), &ALL, 4, 1).write();
    let error = engine.handle.load_adapter(deeper.path()).err().unwrap().to_string();
    assert!(error.contains("2 layers"), "{error}");
    let loaded = load(&engine, &adapters(&model)[0]);
    let prompt = Random::new(12).tokens(20, VOCAB);
    let refused = |adapters: Vec<AppliedAdapter>| match collect(submit(&engine, &prompt, greedy(2), adapters)).reason {
        Some(FinishReason::Error(why)) => why,
        other => panic!("{other:?}"),
    };
    let many = vec![AppliedAdapter { adapter: loaded.clone(), scale: 0.1 }; 9];
    assert!(refused(many).contains("8 adapters"));
    assert!(refused(vec![AppliedAdapter { adapter: loaded, scale: f32::INFINITY }]).contains("finite"));
    assert_eq!(engine.greedy(&prompt, 3).len(), 3);
}

/// In a pool that has no room for all adapters at once they are brought up in turn, from host memory or from their files,
/// and a request has the bits that it has where all are there.
#[test]
fn adapters_come_and_go_without_a_trace() {
    let model = TinyModel::new(Family::Llama, 25);
    let (written, adapters) = (model.write(), adapters(&model));
    let folders: Vec<_> = adapters.iter().map(TinyAdapter::write).collect();
    let start = |num_blocks: usize, adapter_host_bytes: usize| {
        let limits = SchedulerLimits { num_blocks, max_model_len: 96, ..limits() };
        let engine = start(written.path(), Setup { limits, adapter_host_bytes, ..Setup::default() });
        let loaded: Vec<_> = folders.iter().map(|folder| engine.handle.load_adapter(folder.path()).unwrap()).collect();
        (engine, loaded)
    };
    let mut random = Random::new(13);
    let requests: Vec<_> = (0..crate::NUM_ADAPTED)
        .map(|at| (random.tokens(8 + 6 * (at % 5), VOCAB), COMPOSITIONS[[0, 1, 2, 3, 4, 6][at % 6]]))
        .collect();
    let run_all = |engine: &TestEngine, loaded: &[LoadedAdapter]| -> Vec<Fingerprint> {
        let submitted = requests
            .iter()
            .map(|(prompt, composition)| submit(engine, prompt, sampling(), compose(loaded, composition)));
        let streams: Vec<_> = submitted.collect();
        streams.into_iter().map(|stream| fingerprint(&collect(stream))).collect()
    };
    let (roomy, loaded) = start(250, 1 << 30);
    let wanted = run_all(&roomy, &loaded);
    assert_eq!(roomy.handle.metrics().adapters.num_evictions(Evictor::Adapter), 0);
    let most: usize = loaded[..2].iter().map(LoadedAdapter::num_pages).sum();
    for host_bytes in [1 << 30, 0] {
        let (tight, loaded) = start(most + 5, host_bytes);
        assert_eq!(run_all(&tight, &loaded), wanted);
        let metrics = &tight.handle.metrics().adapters;
        assert!(metrics.num_evictions(Evictor::Adapter) > 0);
        assert_eq!(metrics.num_loads(true) > 0, host_bytes == 0);
    }
    let (tiny, loaded) = start(most + 2, 0);
    let long = random.tokens(60, VOCAB);
    let Some(FinishReason::Error(why)) =
        collect(submit(&tiny, &long, greedy(1), compose(&loaded, COMPOSITIONS[4]))).reason
    else {
        panic!("two adapters and a prompt have no room")
    };
    assert!(why.contains(&format!("take {most} KV blocks")) && why.contains("--kv-cache-memory-bytes"), "{why}");
}

/// What is in a folder when an adapter is needed again must be what was there when it was loaded.
#[test]
fn an_adapter_whose_files_change_or_vanish_fails_its_requests_alone() {
    let model = TinyModel::new(Family::Llama, 26);
    let (written, [first, second, other]) = (model.write(), adapters(&model));
    let engine = start(written.path(), Setup { adapter_host_bytes: 0, ..Setup::default() });
    let (folder, elsewhere) = (first.write(), other.write());
    let adapter = engine.handle.load_adapter(folder.path()).unwrap();
    let bystander = engine.handle.load_adapter(elsewhere.path()).unwrap();
    let prompt = Random::new(14).tokens(20, VOCAB);
    let one = |adapter: &LoadedAdapter| vec![AppliedAdapter { adapter: adapter.clone(), scale: 1.0 }];
    let failed = || match collect(submit(&engine, &prompt, greedy(2), one(&adapter))).reason {
        Some(FinishReason::Error(why)) => why,
        other => panic!("{other:?}"),
    };
    let path = folder.path().display().to_string();
    second.write_into(folder.path());
    let why = failed();
    assert!(why.contains("has changed") && why.contains(&path), "{why}");
    std::fs::remove_file(folder.path().join("adapter_model.safetensors")).unwrap();
    let why = failed();
    assert!(why.contains("gone") && why.contains(&path), "{why}");
    assert_eq!(collect(submit(&engine, &prompt, greedy(2), one(&bystander))).tokens.len(), 2);
    first.write_into(folder.path());
    assert_eq!(collect(submit(&engine, &prompt, greedy(2), one(&adapter))).tokens.len(), 2);
    assert_eq!(engine.handle.metrics().adapters.load_failures.get(), 2);
    // Now that it is on the device nobody looks into its files.
    std::fs::remove_file(folder.path().join("adapter_config.json")).unwrap();
    assert_eq!(collect(submit(&engine, &prompt, greedy(2), one(&adapter))).tokens.len(), 2);
}
