//! Merged adapters: who does not use the copy does not notice it, bit for bit, and no KV crosses from one form to the
//! other. Run on every device; what is computed with a copy is for each device's own tests.

use std::path::Path;

use mneme::engine::{
    AppliedAdapter, GenerateRequest, LoadedAdapter, MergeConfig, MergeRule, OutputStream, SamplingParams, Task,
};
use mneme::telemetry::{MergeMetrics, MergeRefusal, MergeStage};

use crate::invariance::{Fingerprint, fingerprint};
use crate::support::engine::{Output, Setup, TestEngine, collect, greedy, request};
use crate::support::random::Random;
use crate::support::tiny_adapter::{ALL, TinyAdapter};
use crate::support::tiny_model::{Family, TinyModel, VOCAB};
use crate::{LONG_ANSWER, kinds};

/// Few tokens are enough to decide by.
pub const MERGING: MergeConfig = MergeConfig {
    is_enabled: true,
    max_bytes: 1 << 30,
    merge_share: 0.9,
    unmerge_share: 0.5,
    window_tokens: WINDOW_TOKENS,
};

/// What recent means: more than a step has of one composition among several.
const WINDOW_TOKENS: usize = 200;

/// What is merged where there are others.
const MERGED: &[(usize, f32)] = &[(0, 1.0)];

pub fn adapters(model: &TinyModel) -> [TinyAdapter; 2] {
    [TinyAdapter::of(model, &ALL, 5, 1), TinyAdapter::of(model, &["self_attn.v_proj", "mlp.down_proj"], 40, 3)]
}

pub fn merging(setup: Setup) -> Setup {
    Setup { merge: MERGING, ..setup }
}

/// An engine and the adapters, which are merged when they are used.
pub struct Served {
    pub engine: TestEngine,
    loaded: Vec<LoadedAdapter>,
}

impl Served {
    pub fn start(model: &TinyModel, rule: MergeRule, setup: Setup) -> Self {
        Self::with(crate::start(model.write().path(), setup), model, rule)
    }

    pub fn with(engine: TestEngine, model: &TinyModel, rule: MergeRule) -> Self {
        let load = |adapter: &TinyAdapter| engine.handle.load_adapter(adapter.write().path()).unwrap();
        let loaded = adapters(model).iter().map(|adapter| load(adapter).with_merge_rule(rule)).collect();
        Self { engine, loaded }
    }

    pub fn metrics(&self) -> &MergeMetrics {
        &self.engine.handle.metrics().merges
    }

    pub fn submit(&self, prompt: &[u32], sampling: SamplingParams, composition: &[(usize, f32)]) -> OutputStream {
        let applied = |&(at, scale): &(usize, f32)| AppliedAdapter { adapter: self.loaded[at].clone(), scale };
        let adapters = composition.iter().map(applied).collect();
        let task = Task::Generate(Box::new(sampling));
        self.engine.handle.submit(GenerateRequest { adapters, ..request(prompt, task) }).unwrap()
    }

    pub fn run(&self, prompt: &[u32], composition: &[(usize, f32)]) -> Output {
        collect(self.submit(prompt, sampling(), composition))
    }

    /// Uses a composition that has to be merged, and waits until it is.
    pub fn merge(&self, composition: &[(usize, f32)]) {
        let output = self.run(&[1, 2, 3], composition);
        assert!(!output.reuse.is_merged, "nothing is merged before it was used");
        self.engine.wait_for_merge(MergeStage::Merged);
    }
}

fn sampling() -> SamplingParams {
    SamplingParams { logprobs: Some(3), ..greedy(12) }
}

/// A prompt, and the adapters by number with their scales.
type Asked = (Vec<u32>, &'static [(usize, f32)]);

/// Requests of everybody: of the adapter that is merged, before others take its credit, of the model, and of others.
fn mixed(seed: u64) -> Vec<Asked> {
    let mut random = Random::new(seed);
    let shared = random.tokens(40, VOCAB);
    let compositions: [&[(usize, f32)]; 4] = [MERGED, &[], &[(1, 0.5)], &[(0, 1.0), (1, 1.0)]];
    let make = |at: usize| {
        let mut prompt = if random.once_in(2) { shared.clone() } else { vec![] };
        let num_own = random.within(1, 50);
        prompt.extend(random.tokens(num_own, VOCAB));
        (prompt, compositions[at / 3])
    };
    (0..12).map(make).collect()
}

fn run_together(served: &Served, requests: &[Asked]) -> Vec<Output> {
    let submit = |(prompt, composition): &(Vec<u32>, &[(usize, f32)])| served.submit(prompt, sampling(), composition);
    let streams: Vec<_> = requests.iter().map(submit).collect();
    streams.into_iter().map(collect).collect()
}

/// Some tokens of a composition, by four requests at once.
fn generate(served: &Served, num_tokens: usize, composition: &[(usize, f32)]) -> Vec<Vec<u32>> {
    let streams = [1, 2, 3, 4].map(|last| served.submit(&[5, 6, 7, last], greedy(num_tokens / 4), composition));
    streams.map(|stream| collect(stream).tokens).to_vec()
}

#[test]
fn bystanders_have_the_bits_of_an_engine_that_never_merges() {
    for (isa, dtype, kv_dtype) in kinds() {
        let model = TinyModel::new(Family::Qwen3, 5);
        let setup = Setup { isa, dtype, kv_dtype, ..Setup::default() };
        let never = Served::start(&model, MergeRule::Auto, setup.clone());
        let merges = Served::start(&model, MergeRule::Auto, merging(setup.clone()));
        let requests = mixed(7);
        let wanted: Vec<Fingerprint> = run_together(&never, &requests).iter().map(fingerprint).collect();
        let check = |found: &[Output], what: &str| {
            for ((output, wanted), (_, composition)) in found.iter().zip(&wanted).zip(&requests) {
                assert!(!output.reuse.is_merged || *composition == MERGED, "{isa}, {what}: {composition:?} is merged");
                if !output.reuse.is_merged {
                    assert_eq!(&fingerprint(output), wanted, "{isa}, {what}: {composition:?}");
                }
            }
        };
        check(&run_together(&merges, &requests), "before");
        // While the copy is written; the last of these tokens begin it.
        let begin = generate(&merges, 5 * WINDOW_TOKENS / 2, MERGED);
        assert_eq!(begin, generate(&never, 5 * WINDOW_TOKENS / 2, MERGED), "they keep their form");
        let mut during = Served::start(&model, MergeRule::Always, merging(setup));
        during.loaded[1] = during.loaded[1].clone().with_merge_rule(MergeRule::Auto);
        check(&run_together(&during, &requests), "during");
        merges.engine.wait_for_merge(MergeStage::Merged);
        let after = run_together(&merges, &requests);
        check(&after, "after");
        let merged: Vec<_> = after.iter().zip(&requests).filter(|(output, _)| output.reuse.is_merged).collect();
        assert_eq!(merged.len(), 3, "all requests of the merged adapter");
        // Who uses the copy has the same bits alone.
        for (output, (prompt, composition)) in merged {
            let alone = Served::start(
                &model,
                MergeRule::Always,
                merging(Setup { isa, dtype, kv_dtype, num_threads: 1, ..Setup::default() }),
            );
            alone.merge(MERGED);
            assert_eq!(fingerprint(&alone.run(prompt, composition)), fingerprint(output), "{isa}: alone");
        }
        // Others take over, the copy goes, and everything is as if it had never been.
        generate(&merges, WINDOW_TOKENS, &[]);
        merges.engine.wait_for_merge(MergeStage::None);
        assert_eq!((merges.metrics().merges.get(), merges.metrics().unmerges.get()), (1, 1));
        assert_eq!(merges.metrics().merged_bytes.get(), 0);
        let unmerged = run_together(&merges, &requests);
        assert!(unmerged.iter().all(|output| !output.reuse.is_merged));
        check(&unmerged, "unmerged");
    }
}

#[test]
fn a_sequence_keeps_the_form_it_began_with() {
    let model = TinyModel::new(Family::Llama, 31);
    let (never, merges) = (
        Served::start(&model, MergeRule::Auto, Setup::default()),
        Served::start(&model, MergeRule::Always, merging(Setup::default())),
    );
    let prompt = Random::new(5).tokens(30, VOCAB);
    let long = merges.submit(&prompt, greedy(LONG_ANSWER), &[(0, 1.0)]);
    let mut late = Output::default();
    // Asked for again and again, until it is merged beside the long one.
    while !late.reuse.is_merged {
        late = merges.run(&prompt, &[(0, 1.0)]);
    }
    let long = collect(long);
    assert!(!long.reuse.is_merged);
    assert_eq!(long.tokens, collect(never.submit(&prompt, greedy(LONG_ANSWER), &[(0, 1.0)])).tokens);
    assert!(merges.metrics().num_tokens(true) > 0 && merges.metrics().num_tokens(false) >= LONG_ANSWER as u64);
}

#[test]
fn kv_is_never_shared_across_forms() {
    let model = TinyModel::new(Family::Llama, 21);
    let served = Served::start(&model, MergeRule::Always, merging(Setup::default()));
    let prompt = Random::new(9).tokens(50, VOCAB);
    let added = served.run(&prompt, &[(0, 1.0)]);
    served.engine.wait_for_merge(MergeStage::Merged);
    let merged = served.run(&prompt, &[(0, 1.0)]);
    assert_eq!((added.reuse.is_merged, merged.reuse.is_merged, merged.cached_tokens), (false, true, 0));
    let again = served.run(&prompt, &[(0, 1.0)]);
    assert_eq!((again.cached_tokens, fingerprint(&again)), (48, fingerprint(&merged)));
    // One that is against it finds what was computed for those who add.
    let mut adapter = AppliedAdapter { adapter: served.loaded[0].clone(), scale: 1.0 };
    adapter.forbid_merge();
    let task = Task::Generate(Box::new(sampling()));
    let request = GenerateRequest { adapters: vec![adapter], ..request(&prompt, task) };
    let forbidden = collect(served.engine.handle.submit(request).unwrap());
    assert_eq!((forbidden.reuse.is_merged, forbidden.cached_tokens), (false, 48));
    assert_eq!(fingerprint(&forbidden), fingerprint(&added));
    // Another scale is another composition.
    assert!(!served.run(&prompt, &[(0, 0.5)]).reuse.is_merged);
}

#[test]
fn what_has_no_room_is_added_and_says_so() {
    let model = TinyModel::new(Family::Llama, 1);
    let setup = Setup { merge: MergeConfig { max_bytes: 1000, ..MERGING }, ..Setup::default() };
    check_refused(&model, model.write().path(), setup, MergeRefusal::NoRoom);
}

/// Every request is answered as by an engine that never merges, and the reason is counted once.
pub fn check_refused(model: &TinyModel, path: &Path, setup: Setup, why: MergeRefusal) {
    let never = Setup { merge: MergeConfig::default(), ..setup.clone() };
    let never = Served::with(crate::start(path, never), model, MergeRule::Always);
    let merges = Served::with(crate::start(path, setup), model, MergeRule::Always);
    let prompt = Random::new(6).tokens(40, VOCAB);
    for _ in 0..3 {
        let (found, wanted) = (merges.run(&prompt, &[(0, 1.0)]), never.run(&prompt, &[(0, 1.0)]));
        assert_eq!((found.reuse.is_merged, fingerprint(&found)), (false, fingerprint(&wanted)), "{why:?}");
    }
    assert_eq!((merges.metrics().stage(), merges.metrics().num_refusals(why)), (MergeStage::None, 1), "{why:?}");
    assert_eq!(never.metrics().num_refusals(why), 0, "an engine that never merges does not try");
}

/// A deterministic engine does not do what it is told to do always, because it could not always do it.
#[test]
fn nothing_is_merged_unless_enabled() {
    let model = TinyModel::new(Family::Llama, 2);
    let served = Served::start(&model, MergeRule::Always, Setup::default());
    let prompt = Random::new(6).tokens(40, VOCAB);
    let first = fingerprint(&served.run(&prompt, &[(0, 1.0)]));
    generate(&served, 3 * WINDOW_TOKENS, &[(0, 1.0)]);
    let last = served.run(&prompt, &[(0, 1.0)]);
    assert_eq!((last.reuse.is_merged, fingerprint(&last)), (false, first));
    assert_eq!((served.metrics().stage(), served.metrics().merges.get()), (MergeStage::None, 0));
}

/// Once nobody can ask for the adapter the copy is of no use.
#[test]
fn the_copy_of_an_unloaded_adapter_goes() {
    let model = TinyModel::new(Family::Llama, 3);
    let mut served = Served::start(&model, MergeRule::Always, merging(Setup::default()));
    served.merge(&[(0, 1.0)]);
    assert!(served.metrics().merged_bytes.get() > 0 && served.loaded[0].is_merged() && !served.loaded[1].is_merged());
    served.loaded.remove(0);
    served.engine.greedy(&[1], 3);
    served.engine.wait_for_merge(MergeStage::None);
    assert_eq!(served.metrics().merged_bytes.get(), 0);
}
