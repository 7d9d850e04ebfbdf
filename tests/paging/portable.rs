//! Cubes as files: blocks that one engine computed are used by another, and by those alone who name the cube.

use std::path::Path;
use std::sync::Arc;

use mneme::engine::{GenerateRequest, SharedPrefix, Task};
use mneme::memory::{
    Activation, Binding, Blocks, Catalog, CatalogLimits, Digest, Durability, Form, Incoming, Label, NewCube, Outgoing,
    Payload, Principal, SystemClock,
};
use mneme::paging::BlockStore;
use mneme::{Error, Result};

use crate::deposits::deposit;
use crate::support::engine::{Output, TestEngine, collect, greedy, request};
use crate::support::random::Random;
use crate::support::tiny_model::{Family, TinyModel, VOCAB};
use crate::vault::{Tiers, wait_until_open};

const NUM_TOKENS: usize = 100;

fn identity() -> Digest {
    Digest::of(b"model")
}

fn start(tiers: &Tiers, model: &Path) -> (TestEngine, Arc<BlockStore>) {
    let store = Arc::new(tiers.open_store());
    let engine = tiers.start_over(model, identity().as_bytes(), Arc::clone(&store), || ());
    wait_until_open(&engine);
    (engine, store)
}

/// A file of a cube that an engine has just computed.
fn exported(model: &Path, token_ids: &[u32]) -> Vec<u8> {
    let (engine, store) = start(&Tiers::new(Family::Llama), model);
    let deposited = deposit(&engine, token_ids, "team", true).deposited.unwrap();
    let label = |text: &str| text.parse::<Label>().unwrap();
    let binding = Binding {
        weights: Digest::of(b"weights"),
        architecture: label("llama"),
        dtype: label("bf16"),
        tokenizer: Digest::of(b"tokenizer"),
        template: None,
        identity: identity(),
        form: Form::Prefix,
        domain: label("team"),
    };
    let blocks = Blocks { full: deposited.blocks, tail: deposited.tail, num_bytes: 0 };
    let activation = Activation::new(None, binding, token_ids.to_vec(), blocks).unwrap();
    let catalog = Catalog::in_memory(Arc::new(SystemClock), CatalogLimits::default());
    let new = NewCube::new("ana/a".parse().unwrap(), Payload::Activation(Box::new(activation)));
    let cube = catalog.create(&Principal::local(), new, Durability::Synced).unwrap().cube;
    let outgoing = Outgoing::new(&cube, Some(store)).unwrap();
    let mut file = Vec::new();
    outgoing.write(&mut file).unwrap();
    assert_eq!(outgoing.num_bytes().unwrap(), file.len() as u64);
    file
}

fn import(file: &[u8], store: &Arc<BlockStore>) -> Result<Activation> {
    let (payload, pins) = Incoming::open(file)?.store(store, "public")?;
    let activation = payload.activation().expect("the file has blocks").clone();
    assert_eq!(pins.hashes().len(), activation.full_blocks().len() + usize::from(activation.tail().is_some()));
    Ok(activation)
}

fn ask(engine: &TestEngine, prompt: &[u32], domain: Option<&str>) -> Output {
    let shared_prefix = domain.map(|domain| SharedPrefix { num_tokens: NUM_TOKENS, domain: domain.into() });
    let task = Task::Generate(Box::new(greedy(8)));
    collect(engine.handle.submit(GenerateRequest { shared_prefix, ..request(prompt, task) }).unwrap())
}

#[test]
fn a_file_is_as_good_as_computing_for_who_names_the_cube() {
    let model = TinyModel::new(Family::Llama, 3).write();
    let token_ids = Random::new(5).tokens(NUM_TOKENS, VOCAB);
    let file = exported(model.path(), &token_ids);
    let prompt = [&token_ids[..], &Random::new(6).tokens(20, VOCAB)].concat();
    let (engine, store) = start(&Tiers::new(Family::Llama), model.path());
    let activation = import(&file, &store).unwrap();
    assert_eq!(activation.token_ids(), token_ids);
    let domain = activation.binding().domain.as_str();
    assert!(domain.starts_with("import/"), "{domain}");
    let unaware = ask(&engine, &prompt, None);
    assert_eq!(unaware.cached_tokens, 0, "a foreign file is not believed by those who did not ask for it");
    let found = ask(&engine, &prompt, Some(domain));
    assert!(found.reuse.disk_tokens >= 96, "{:?}", found.reuse);
    assert_eq!(found.tokens, unaware.tokens);
    // The same file again is the same blocks.
    assert_eq!(import(&file, &store).unwrap(), activation);
}

#[test]
fn a_damaged_file_is_refused_and_leaves_nothing_to_find() {
    let model = TinyModel::new(Family::Llama, 3).write();
    let token_ids = Random::new(5).tokens(NUM_TOKENS, VOCAB);
    let file = exported(model.path(), &token_ids);
    let store = Arc::new(Tiers::new(Family::Llama).open_store());
    let mut flipped = file.clone();
    *flipped.last_mut().unwrap() ^= 1;
    let longer = [&file[..], &[0]].concat();
    for damaged in [&flipped[..], &file[..file.len() - 1], &file[..file.len() / 2], &file[..3], &longer] {
        assert!(matches!(import(damaged, &store), Err(Error::Format(_))), "{} bytes", damaged.len());
    }
    assert!(store.take_announced().is_empty());
    import(&file, &store).unwrap();
}

/// A store of other blocks refuses them before anything is written.
#[test]
fn blocks_of_another_size_are_refused() {
    let model = TinyModel::new(Family::Llama, 3).write();
    let file = exported(model.path(), &Random::new(5).tokens(NUM_TOKENS, VOCAB));
    let mut other = Tiers::new(Family::Llama);
    other.setup.kv_dtype = mneme::backend::DType::F32;
    let store = Arc::new(other.open_store());
    assert!(matches!(import(&file, &store), Err(Error::Invalid(_))));
    assert!(store.hashes().is_empty());
}
