//! Adapters of the embedding and of the output projection besides the layers, which the CPU alone computes.

use mneme::engine::MergeRule;
use mneme::telemetry::MergeRefusal;

use crate::adapters::{adapters, check_bits, compose, load, sampling, submit};
use crate::invariance::fingerprint;
use crate::merging::merging;
use crate::start;
use crate::support::engine::{Setup, collect};
use crate::support::random::Random;
use crate::support::tiny_adapter::{ALL, EMBEDDING, HEAD, TinyAdapter};
use crate::support::tiny_model::{Family, HEAD_DIM, TinyModel, VOCAB};

/// Of every module that there is.
fn of_vocabulary(model: &TinyModel) -> TinyAdapter {
    let hidden = model.tensor("model.embed_tokens.weight").columns;
    let mut whole = TinyAdapter::of(model, &ALL, 16, 2);
    let around = [(EMBEDDING.to_owned(), hidden, VOCAB), (HEAD.to_owned(), VOCAB, hidden)];
    whole.updates.extend(TinyAdapter::new(&around, 16, 7).updates);
    whole
}

#[test]
fn a_request_has_the_same_bits_among_adapters_of_the_vocabulary() {
    let model = TinyModel::new(Family::Qwen3, 5);
    let [first, _, third] = adapters(&model);
    check_bits(&model, &[first, of_vocabulary(&model), third]);
}

/// A copy is of the layers alone.
#[test]
fn adapters_of_the_vocabulary_are_added_where_others_are_merged() {
    let model = TinyModel::new(Family::Llama, 12);
    let (written, prompt) = (model.write(), Random::new(6).tokens(40, VOCAB));
    let run = |setup: Setup| {
        let engine = start(written.path(), setup);
        let loaded = [load(&engine, &of_vocabulary(&model)).with_merge_rule(MergeRule::Always)];
        let answer = |_| collect(submit(&engine, &prompt, sampling(), compose(&loaded, &[(0, 1.0)])));
        let outputs = [0, 1, 2].map(answer);
        assert!(outputs.iter().all(|output| !output.reuse.is_merged));
        (
            outputs.map(|output| fingerprint(&output)),
            engine.handle.metrics().merges.num_refusals(MergeRefusal::Unsupported),
        )
    };
    let (never, _) = run(Setup::default());
    assert_eq!(run(merging(Setup::default())), (never, 1));
}

/// A file of llama.cpp's converter has the rows of q and k in another order, which the model alone says.
#[test]
fn a_gguf_file_is_the_same_adapter_as_its_folder() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("adapter.gguf");
    let model = TinyModel::new(Family::Llama, 12);
    let adapter = of_vocabulary(&model);
    adapter.write_gguf(&path, HEAD_DIM);
    let written = model.write();
    let engine = start(written.path(), Setup::default());
    let loaded = engine.handle.load_adapter(&path).unwrap();
    assert_eq!(loaded.digest(), load(&engine, &adapter).digest());
    let unturned = folder.path().join("unturned.gguf");
    adapter.write_gguf(&unturned, 2);
    assert_ne!(engine.handle.load_adapter(&unturned).unwrap().digest(), loaded.digest());
    let written = TinyModel::new(Family::Qwen2, 12).write();
    let qwen = start(written.path(), Setup::default());
    let refused = qwen.handle.load_adapter(&path).err().unwrap().to_string();
    assert!(refused.contains("another base model"), "{refused}");
}
