//! From a model's name to a running engine.

use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Instant;

use anyhow::Context;
use mneme::backend::cpu::CpuBackend;
use mneme::backend::{Backend, Device, GpuInfo};
use mneme::engine::{Engine, EngineConfig, EngineHandle, EngineInfo, TierConfig};
use mneme::hub::{Cache, ModelRef, ResolvedModel, Resolver, stderr_progress};
use mneme::models::Model;
use mneme::telemetry::Degradation;

use super::device::Chosen;
use super::engine_args::{DeviceDefaults, EngineArgs};
use super::kv_room::KvRoom;
use super::text_assets::TextAssets;
use super::tiers::{Numerics, OpenVault, TierArgs};

/// A running engine with everything that turns text into its requests.
pub(crate) struct Launched {
    /// What the model is called, and where it is.
    pub(crate) model: ResolvedModel,
    pub(crate) handle: EngineHandle,
    pub(crate) assets: TextAssets,
    /// Where memory survives, when it does; open as long as the engine runs.
    pub(crate) vault: Option<Arc<OpenVault>>,
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
pub(crate) fn launch(args: &EngineArgs, tiers: Option<&TierArgs>) -> anyhow::Result<Launched> {
    let device = args.device.choose()?;
    args.check_kernels(&device)?;
    let reference = ModelRef::parse(args.model())?;
    let model = Resolver::new(Cache::from_env()?).resolve(&reference, stderr_progress().as_mut())?;
    let defaults = DeviceDefaults::of(&device);
    match device {
        Chosen::Cpu { reason, has_gpu } => {
            let reason = reason.map(|reason| format!("computing on the CPU: {reason}"));
            reason.iter().for_each(|reason| tracing::info!("{reason}"));
            let make = || CpuBackend::new(args.isa(), args.num_threads());
            let report = |backend: &CpuBackend| {
                let reason = reason.iter().filter(|_| has_gpu);
                reason.for_each(|reason| backend.degradations().report(Degradation::Gpu, reason));
            };
            launch_on(args, tiers, model, defaults, || make().inspect(report))
        }
        Chosen::Gpu(gpu) => launch_on_gpu(args, tiers, model, defaults, &gpu),
    }
}

#[cfg(feature = "cuda")]
fn launch_on_gpu(
    args: &EngineArgs,
    tiers: Option<&TierArgs>,
    model: ResolvedModel,
    defaults: DeviceDefaults,
    gpu: &GpuInfo,
) -> anyhow::Result<Launched> {
    tracing::info!("computing on CUDA {gpu}");
    launch_on(args, tiers, model, defaults, || args.open_gpu(gpu.ordinal))
}

#[cfg(not(feature = "cuda"))]
fn launch_on_gpu(
    _: &EngineArgs,
    _: Option<&TierArgs>,
    _: ResolvedModel,
    _: DeviceDefaults,
    gpu: &GpuInfo,
) -> anyhow::Result<Launched> {
    anyhow::bail!("{gpu} cannot be used: this build has no CUDA")
}

/// Loads the model onto the device that `make_backend` opens.
fn launch_on<B: Backend>(
    args: &EngineArgs,
    tiers: Option<&TierArgs>,
    model: ResolvedModel,
    defaults: DeviceDefaults,
    make_backend: impl FnOnce() -> mneme::Result<B>,
) -> anyhow::Result<Launched> {
    let started_at = Instant::now();
    let vault = tiers.map(TierArgs::open_vault).transpose()?.flatten();
    let checkpoint = Arc::new(args.open_checkpoint(&model.path)?);
    let backend = make_backend()?;
    let kv_dtype = args.kv_cache_dtype.dtype().unwrap_or_else(|| backend.kv_dtype());
    let layout = checkpoint.config().kv_layout(backend.kv_order(), args.block_size, kv_dtype)?;
    backend.check_kv_layout(&layout)?;
    let limits = args.limits(checkpoint.config(), &layout, &defaults)?;
    // The vocabulary and the weights take about equally long, and neither needs the other.
    let (assets, weights) = thread::scope(|scope| {
        let assets = scope.spawn(|| TextAssets::load(&checkpoint));
        let weights = Model::load(&backend, &checkpoint, args.dtype.target(), limits.max_model_len);
        (assets.join(), weights)
    });
    let weights = weights?;
    let limits = args.fit(
        limits,
        KvRoom::of(&backend, checkpoint.config(), &limits, &layout)?,
        &defaults,
        backend.degradations(),
    )?;
    let assets = assets.map_err(|_| anyhow::anyhow!("the tokenizer's thread panicked"))??;
    let config = EngineConfig {
        model_name: model.name.clone(),
        limits,
        min_kv_tokens: args.min_kv_tokens(&limits),
        kv_dtype,
        eos_token_ids: assets.eos_token_ids.clone(),
        seed: args.seed,
        merge: args.merge.config()?,
        adapter_host_bytes: args.max_lora_bytes,
    };
    let numerics = Numerics {
        backend: backend.name(),
        layout,
        weight_dtype: format!("{:?}", args.dtype.target()),
        assets: &assets,
    };
    let tiers = match tiers {
        Some(tiers) if limits.prefix_caching => tiers.config(vault.as_ref(), &checkpoint, &numerics)?,
        _ => TierConfig::default(),
    };
    let (engine, handle) = Engine::with_tiers(backend, weights, config, tiers)?;
    let EngineInfo { max_model_len, num_blocks, .. } = handle.info();
    tracing::info!(
        model = %model.name, backend = %numerics.backend, threads = args.num_threads(), max_model_len, num_blocks,
        load_ms = started_at.elapsed().as_millis() as u64, "model loaded"
    );
    let thread =
        thread::Builder::new().name("engine".into()).spawn(|| engine.run()).context("cannot start the engine")?;
    if let Some(vault) = &vault {
        vault.wait_until_open();
    }
    Ok(Launched { model, handle, assets, vault, thread })
}
