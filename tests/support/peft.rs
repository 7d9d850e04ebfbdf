//! The tiny model of `tests/data/peft` with its adapters: what an engine computes with them against what PEFT does.

use std::path::PathBuf;

use mneme::engine::{
    AppliedAdapter, GenerateRequest, LoadedAdapter, MergeConfig, MergeRule, OutputStream, SamplingParams, Task,
};
use mneme::telemetry::MergeStage;

use super::engine::{Output, Setup, TestEngine, collect, greedy, request};
use super::golden::{self, Record, Tolerance};

/// Adapters by name, with their scales.
type Composition = &'static [(&'static str, f32)];

const VOCAB: usize = 160;
const ADAPTERS: [&str; 2] = ["first", "second"];
/// The second of which updates the embedding and the output projection.
const AROUND: [&str; 2] = ["first", "around"];

/// Compositions by the names of their golden data: the model, each adapter, and both as `add_weighted_adapter` adds them.
const COMPOSITIONS: [(&str, Composition); 4] = [
    ("base", &[]),
    ("first", &[("first", 1.0)]),
    ("second", &[("second", 1.0)]),
    ("composed", &[("first", 0.7), ("second", -0.5)]),
];

/// The same of those that update the embedding and the output projection.
const AROUND_COMPOSITIONS: [(&str, Composition); 3] =
    [("base", &[]), ("around", &[("around", 1.0)]), ("around-composed", &[("first", 0.6), ("around", 1.2)])];

fn folder(name: &str) -> PathBuf {
    golden::data("peft").join(name)
}

/// The folder of the model.
pub fn model() -> PathBuf {
    folder("base")
}

/// The setup with merging, which adapters may then be exempted from.
pub fn merging(setup: Setup) -> Setup {
    Setup { merge: MergeConfig { is_enabled: true, ..MergeConfig::default() }, ..setup }
}

/// Outputs of the model and of all compositions, computed in the same steps.
pub fn check_added(engine: TestEngine, tolerance: Tolerance) {
    check_all(Adapted::new(engine, ADAPTERS, MergeRule::Never), COMPOSITIONS, tolerance);
}

/// The same of compositions with an adapter of the embedding and the output projection.
pub fn check_vocabulary(engine: TestEngine, tolerance: Tolerance) {
    check_all(Adapted::new(engine, AROUND, MergeRule::Never), AROUND_COMPOSITIONS, tolerance);
}

/// The folder of that adapter.
pub fn around() -> PathBuf {
    folder("around")
}

fn check_all<const N: usize>(adapted: Adapted, compositions: [(&str, Composition); N], tolerance: Tolerance) {
    let submitted = compositions.map(|(name, composition)| {
        let records = golden::load(&format!("peft/{name}")).records;
        let streams: Vec<_> = records.iter().map(|record| adapted.submit(record, composition)).collect();
        (name, records, streams)
    });
    for (name, records, streams) in submitted {
        let outputs: Vec<Output> = streams.into_iter().map(collect).collect();
        assert!(outputs.iter().all(|output| !output.reuse.is_merged));
        check(name, &records, &outputs, tolerance);
    }
}

/// Outputs of all compositions, each merged into a copy of the weights by an engine of its own.
pub fn check_merged(start: impl Fn() -> TestEngine, tolerance: Tolerance) {
    for (name, composition) in &COMPOSITIONS[1..] {
        let adapted = Adapted::new(start(), ADAPTERS, MergeRule::Always);
        let records = golden::load(&format!("peft/{name}")).records;
        drop(collect(adapted.submit(&records[0], composition)));
        adapted.engine.wait_for_merge(MergeStage::Merged);
        let streams: Vec<_> = records.iter().map(|record| adapted.submit(record, composition)).collect();
        let outputs: Vec<Output> = streams.into_iter().map(collect).collect();
        assert!(outputs.iter().all(|output| output.reuse.is_merged));
        check(&format!("{name}, merged"), &records, &outputs, tolerance);
    }
}

struct Adapted {
    engine: TestEngine,
    names: [&'static str; 2],
    loaded: [LoadedAdapter; 2],
}

impl Adapted {
    fn new(engine: TestEngine, names: [&'static str; 2], rule: MergeRule) -> Self {
        let loaded = names.map(|name| engine.handle.load_adapter(&folder(name)).unwrap().with_merge_rule(rule));
        Self { engine, names, loaded }
    }

    fn submit(&self, record: &Record, composition: Composition) -> OutputStream {
        let applied = |(name, scale): &(&str, f32)| {
            let at = self.names.iter().position(|other| other == name).unwrap();
            AppliedAdapter { adapter: self.loaded[at].clone(), scale: *scale }
        };
        let sampling =
            SamplingParams { logprobs: Some(VOCAB), prompt_logprobs: Some(0), ..greedy(record.greedy_ids.len()) };
        let task = Task::Generate(Box::new(sampling));
        let adapters = composition.iter().map(applied).collect();
        self.engine.handle.submit(GenerateRequest { adapters, ..request(&record.prompt_ids, task) }).unwrap()
    }
}

/// As the records say; and that the model without adapters says something else.
fn check(name: &str, records: &[Record], outputs: &[Output], tolerance: Tolerance) {
    golden::check(name, records, outputs, tolerance);
    if name != "base" {
        let (_, without) = golden::worst_and_mean(&golden::load("peft/base").records, outputs);
        assert!(without > 5.0 * tolerance.most_mean, "{name}: only {without} on average from no adapters");
    }
}
