//! Runs a model in process: `cargo run --release --example generate -- "The sea is"`.

use std::io::Write;
use std::sync::Arc;

use mneme::backend::DType;
use mneme::backend::cpu::{CpuBackend, Isa};
use mneme::engine::{
    Engine, EngineConfig, GenerateRequest, MergeConfig, OutputEvent, SamplingParams, SchedulerLimits, Task,
};
use mneme::hub::{Cache, ModelRef, catalog, resolve, stderr_progress};
use mneme::models::{Checkpoint, Model};
use mneme::text::{Detokenizer, DetokenizerOptions, Tokenizer};

fn main() -> anyhow::Result<()> {
    let prompt = std::env::args().nth(1).unwrap_or_else(|| "The sea is".into());
    let reference = ModelRef::parse(catalog::DEFAULT_MODEL)?;
    let path = resolve(&reference, &Cache::from_env()?, stderr_progress().as_mut())?.path;

    let checkpoint = Checkpoint::open(&path)?;
    let gguf = checkpoint.gguf().ok_or_else(|| anyhow::anyhow!("the default model is a GGUF file"))?;
    let tokenizer = Arc::new(Tokenizer::from_gguf(gguf.vocabulary()?)?);
    let limits = SchedulerLimits {
        max_num_seqs: 4,
        max_num_batched_tokens: 256,
        max_num_waiting: 4,
        max_prompt_logits: 1,
        max_model_len: 1024,
        block_size: 16,
        num_blocks: 128,
        prefix_caching: true,
    };
    let backend = CpuBackend::new(Isa::best(), 2)?;
    let model = Model::load(&backend, &checkpoint, None, limits.max_model_len)?;
    let config = EngineConfig {
        model_name: "example".into(),
        limits,
        min_kv_tokens: limits.max_model_len,
        kv_dtype: DType::BF16,
        eos_token_ids: tokenizer.end_ids().to_vec(),
        seed: 0,
        merge: MergeConfig::default(),
        adapter_host_bytes: 0,
    };
    let (engine, handle) = Engine::new(backend, model, config)?;
    let thread = std::thread::spawn(move || engine.run());

    let sampling = SamplingParams { temperature: 0.0, max_tokens: 48, ..Default::default() };
    let mut stream = handle.submit(GenerateRequest {
        id: "example".into(),
        prompt: tokenizer.encode(&prompt, true)?,
        task: Task::Generate(Box::new(sampling)),
        priority: 0,
        domain: String::new(),
        shared_prefix: None,
        adapters: Vec::new(),
        pieces: vec![],
        level: Default::default(),
        erase_on_free: false,
    })?;
    let mut out = std::io::stdout().lock();
    write!(out, "{prompt}")?;
    let options = DetokenizerOptions { skip_special: true, stop: vec![], include_stop: false };
    let mut text = Detokenizer::new(Arc::clone(&tokenizer), options);
    while let Some(event) = stream.blocking_next() {
        if let OutputEvent::Token { id, .. } = event {
            write!(out, "{}", text.push(id).text)?;
            out.flush()?;
        }
    }
    writeln!(out, "{}", text.flush().text)?;
    handle.drain();
    thread.join().map_err(|_| anyhow::anyhow!("the engine's thread panicked"))??;
    Ok(())
}
