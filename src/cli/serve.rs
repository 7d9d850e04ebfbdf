//! `mneme serve`: the OpenAI-compatible server.

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use clap::Args;
use mneme::server::{
    AdapterRegistry, CubeService, RequestLimits, ServedModel, ServerConfig, ServerThread, VaultEngine,
};
use mneme::text::GrammarEngine;
use tokio::signal::unix::{SignalKind, signal};

use super::engine_args::{EngineArgs, parse_bytes};
use super::launch::{Launched, launch};
use super::tiers::{OpenVault, TierArgs};

/// Arguments of `mneme serve`.
#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    tiers: TierArgs,
    /// Address to listen on; loopback unless told otherwise
    #[arg(long, default_value = "127.0.0.1")]
    host: String,
    /// Port to listen on; 0 takes a free one
    #[arg(long, default_value_t = 8000)]
    port: u16,
    /// Names in the Host header, besides localhost and --host, that a server on loopback without keys answers to
    #[arg(long, num_args = 1..)]
    allowed_host: Vec<String>,
    /// Names the model answers to, the first in answers [default: the model's own name]
    #[arg(long, num_args = 1..)]
    served_model_name: Vec<String>,
    /// Keys that open the server, comma-separated; without any it is open to everyone who can connect
    #[arg(long, env = "MNEME_API_KEY", hide_env_values = true, value_delimiter = ',')]
    api_key: Vec<String>,
    /// A file with one key per line
    #[arg(long)]
    api_key_file: Option<PathBuf>,
    /// The key that loads and unloads adapters; without it everyone who is let in may
    #[arg(long, env = "MNEME_ADMIN_API_KEY", hide_env_values = true)]
    admin_api_key: Option<String>,
    /// Adapters to start with, as NAME=FOLDER or NAME=FILE.gguf; a request names one, or several: model+a:0.7+b:0.3
    #[arg(long, num_args = 1.., value_name = "NAME=PATH", value_parser = parse_lora_module)]
    lora_modules: Vec<(String, PathBuf)>,
    /// A folder under which clients may load adapters through /v1/load_lora_adapter; without any they may not
    #[arg(long, value_name = "DIR")]
    lora_root: Vec<PathBuf>,
    /// Bytes of a cube's file that is imported, with an optional suffix K, M or G
    #[arg(long, value_parser = parse_bytes, default_value = "4G")]
    max_import_bytes: usize,
    /// `owned_by` in /v1/models; some gateways look for "vllm"
    #[arg(long, default_value = "mneme")]
    owned_by: String,
    /// Seconds that running requests may take to finish after SIGTERM
    #[arg(long, default_value_t = 30)]
    shutdown_timeout: u64,
}

/// Runs the command: until SIGTERM or Ctrl-C.
pub(crate) fn run(args: ServeArgs) -> anyhow::Result<()> {
    let config = args.server_config()?;
    let launched = launch(&args.engine, Some(&args.tiers))?;
    let model = args.served_model(&launched)?;
    let name = model.name().to_owned();
    let grammar = Arc::clone(&model.grammar);
    let server = ServerThread::start(config, model)?;
    let address = server.address();
    writeln!(std::io::stderr(), "mneme serves {name} at http://{address}/v1")?;
    prepare_grammars(grammar);
    wait_for_signal()?;
    server.shutdown();
    server.join()?;
    launched.shut_down()
}

impl ServeArgs {
    fn server_config(&self) -> anyhow::Result<ServerConfig> {
        let mut api_keys = self.api_key.clone();
        if let Some(path) = &self.api_key_file {
            let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
            api_keys.extend(text.lines().map(str::trim).filter(|key| !key.is_empty()).map(str::to_owned));
            anyhow::ensure!(!api_keys.is_empty(), "{} has no key in it", path.display());
        }
        Ok(ServerConfig {
            host: self.host.clone(),
            port: self.port,
            allowed_hosts: self.allowed_host.clone(),
            api_keys,
            admin_api_key: self.admin_api_key.clone(),
            owned_by: self.owned_by.clone(),
            drain_timeout: Duration::from_secs(self.shutdown_timeout),
            request_limits: RequestLimits {
                max_import_bytes: self.max_import_bytes as u64,
                ..RequestLimits::default()
            },
            ..ServerConfig::default()
        })
    }

    /// Cubes over the vault.
    fn cubes(open: &OpenVault, launched: &Launched) -> CubeService {
        let catalog = Arc::clone(open.vault.catalog());
        let engine = VaultEngine::new(launched.handle.clone(), Arc::clone(&catalog), Arc::clone(&open.blocks));
        CubeService { catalog, engine: Arc::new(engine) }
    }

    fn adapters(&self, launched: &Launched) -> anyhow::Result<AdapterRegistry> {
        let registry =
            AdapterRegistry::new(launched.handle.clone(), &self.lora_root)?.with_merge_rules(self.engine.merge.rules());
        for (name, path) in &self.lora_modules {
            registry.load(name, path, false).with_context(|| format!("cannot load the adapter {name}"))?;
        }
        Ok(registry)
    }

    fn served_model(&self, launched: &Launched) -> anyhow::Result<ServedModel> {
        let mut names = self.served_model_name.clone();
        if names.is_empty() {
            names.push(launched.model.name.clone());
        }
        let assets = &launched.assets;
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        Ok(ServedModel {
            names,
            engine: launched.handle.clone(),
            tokenizer: Arc::clone(&assets.tokenizer),
            template: assets.template.clone(),
            grammar: Arc::new(GrammarEngine::new(Arc::clone(&assets.tokenizer))?),
            default_sampling: assets.default_sampling.clone(),
            created,
            root: launched.model.path.display().to_string(),
            adapters: Some(self.adapters(launched)?),
            cubes: launched.vault.as_ref().map(|open| Self::cubes(open, launched)),
        })
    }
}

fn parse_lora_module(text: &str) -> Result<(String, PathBuf), String> {
    let (name, path) = text.split_once('=').ok_or_else(|| format!("{text:?} is not NAME=PATH"))?;
    Ok((name.to_owned(), PathBuf::from(path)))
}

/// Builds what all grammars share, so that the first structured request does not hold up others.
fn prepare_grammars(grammar: Arc<GrammarEngine>) {
    std::thread::spawn(move || {
        if let Err(error) = grammar.prepare() {
            tracing::warn!(%error, "structured output will not work");
        }
    });
}

/// Returns at SIGTERM, or at Ctrl-C.
fn wait_for_signal() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        tokio::select! {
            _ = terminate.recv() => {}
            result = tokio::signal::ctrl_c() => result?,
        }
        Ok(())
    })
}
