//! From a model's name to a running engine.

use std::thread::{self, JoinHandle};
use std::time::Instant;

use anyhow::Context;
use mneme::backend::cpu::CpuBackend;
use mneme::engine::{Engine, EngineConfig, EngineHandle};
use mneme::hub::{Cache, ModelRef, ResolvedModel, Resolver, stderr_progress};
use mneme::models::{Checkpoint, Model};

use super::engine_args::EngineArgs;
use super::text_assets::TextAssets;

/// A running engine with everything that turns text into its requests.
pub(crate) struct Launched {
    /// What the model is called, and where it is.
    pub(crate) model: ResolvedModel,
    pub(crate) handle: EngineHandle,
    pub(crate) assets: TextAssets,
    thread: JoinHandle<mneme::Result<()>>,
}

impl Launched {
    /// Lets the engine finish what it has, and waits for it.
    pub(crate) fn shut_down(self) -> anyhow::Result<()> {
        self.handle.drain();
        match self.thread.join() {
            Ok(result) => Ok(result?),
            Err(_) => anyhow::bail!("the engine's thread panicked"),
        }
    }
}

/// Finds or fetches the model, loads it and starts its engine.
pub(crate) fn launch(args: &EngineArgs) -> anyhow::Result<Launched> {
    let reference = ModelRef::parse(args.model())?;
    let model = Resolver::new(Cache::from_env()?).resolve(&reference, stderr_progress().as_mut())?;
    let started_at = Instant::now();
    let checkpoint = Checkpoint::open(&model.path)?;
    // The vocabulary and the weights take about equally long, and neither needs the other.
    let (assets, backend) = thread::scope(|scope| {
        let assets = scope.spawn(|| TextAssets::load(&checkpoint));
        let backend = load_backend(args, &checkpoint);
        (assets.join(), backend)
    });
    let assets = assets.map_err(|_| anyhow::anyhow!("the tokenizer's thread panicked"))??;
    let (backend, weights) = backend?;
    let config = EngineConfig {
        model_name: model.name.clone(),
        limits: args.limits(checkpoint.config())?,
        kv_dtype: args.kv_cache_dtype.dtype(),
        eos_token_ids: assets.eos_token_ids.clone(),
        seed: args.seed,
    };
    tracing::info!(
        model = %model.name, isa = %args.isa(), threads = args.num_threads(),
        max_model_len = config.limits.max_model_len, num_blocks = config.limits.num_blocks,
        load_ms = started_at.elapsed().as_millis() as u64, "model loaded"
    );
    let (engine, handle) = Engine::new(backend, weights, config)?;
    let thread =
        thread::Builder::new().name("engine".into()).spawn(|| engine.run()).context("cannot start the engine")?;
    Ok(Launched { model, handle, assets, thread })
}

fn load_backend(args: &EngineArgs, checkpoint: &Checkpoint) -> anyhow::Result<(CpuBackend, Model<CpuBackend>)> {
    let limits = args.limits(checkpoint.config())?;
    let backend = CpuBackend::new(args.isa(), args.num_threads())?;
    let weights = Model::load(&backend, checkpoint, args.dtype.target(), limits.max_model_len)?;
    Ok((backend, weights))
}
