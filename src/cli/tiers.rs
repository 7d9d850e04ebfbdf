//! The tiers below the device: arguments, the vault's folder, and what opening it takes.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use mneme::backend::{DType, KvLayout, NUMERICS_VERSION};
use mneme::engine::TierConfig;
use mneme::hub::Cache;
use mneme::memory::{Binding, CatalogLimits, Digest, Form, SystemClock, Vault};
use mneme::models::{Checkpoint, WeightsDigest, weights_digest};
use mneme::paging::{BlockFormat, BlockStore, OpenedVault, StoreConfig, SystemFiles, VaultOpener};
use mneme::server::{OpenBlocks, finish_erasures, hold_all};

use super::engine_args::parse_bytes;
use super::text_assets::TextAssets;

/// Bytes of one file of blocks.
pub(crate) const SEGMENT_BYTES: u64 = 128 << 20;

/// Threads that copy blocks between tiers.
pub(crate) const NUM_IO_THREADS: usize = 2;

/// Where KV blocks go that the device has no room for, and where memory survives.
#[derive(Debug, Clone, Args)]
pub(crate) struct TierArgs {
    /// Folder in which KV blocks and MemCubes survive a restart [default: mneme/vault in the user's data folder]
    #[arg(long, value_name = "DIR", env = "MNEME_VAULT", conflicts_with = "no_vault")]
    vault: Option<PathBuf>,
    /// Keep nothing on disk
    #[arg(long)]
    no_vault: bool,
    /// Most bytes of KV blocks in the vault, with an optional suffix K, M or G
    #[arg(long, value_parser = parse_bytes, default_value = "8G")]
    vault_size_bytes: usize,
    /// Most host memory for KV blocks that the device has no room for, in bytes, with an optional suffix; page-locked as
    /// it fills for a GPU, and of no use on the CPU, where it is the same memory
    #[arg(long, value_parser = parse_bytes, default_value = "0")]
    kv_host_memory_bytes: usize,
}

/// How long a start waits for the vault. Opening takes as long only when the model's digest has yet to be computed, or
/// much has to be moved.
const MAX_OPENING: Duration = Duration::from_millis(250);

/// A vault in use: its cubes, and its blocks once they can be read.
pub(crate) struct OpenVault {
    pub(crate) vault: Vault,
    pub(crate) blocks: Arc<OnceLock<OpenBlocks>>,
}

/// What decides the bits of a KV block besides weights and tokens.
pub(crate) struct Numerics<'a> {
    pub(crate) backend: String,
    pub(crate) layout: KvLayout,
    /// How weights are kept.
    pub(crate) weight_dtype: String,
    pub(crate) assets: &'a TextAssets,
}

impl OpenVault {
    /// Waits until blocks can be read, but not for long. Before that requests are answered as well, and what they computed
    /// does not survive a restart.
    pub(crate) fn wait_until_open(&self) {
        let started_at = Instant::now();
        while self.blocks.get().is_none() && started_at.elapsed() < MAX_OPENING {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

impl TierArgs {
    /// Tiers that a command chooses itself: a vault of at most `vault_bytes` in `vault`, `host_bytes` of host memory.
    pub(crate) fn new(vault: PathBuf, vault_bytes: usize, host_bytes: usize) -> Self {
        Self { vault: Some(vault), no_vault: false, vault_size_bytes: vault_bytes, kv_host_memory_bytes: host_bytes }
    }

    /// Opens the vault's folder for this process alone; `None` when nothing is to be kept.
    pub(crate) fn open_vault(&self) -> anyhow::Result<Option<Arc<OpenVault>>> {
        if self.no_vault {
            return Ok(None);
        }
        let folder = match &self.vault {
            Some(folder) => folder.clone(),
            None => dirs::data_dir()
                .map(|data| data.join("mneme/vault"))
                .context("no data folder is known (HOME is unset); give --vault DIR or --no-vault")?,
        };
        let vault = Vault::open(&folder, Arc::new(SystemClock), CatalogLimits::default())?;
        vault.catalog().damaged().iter().for_each(|damaged| tracing::warn!(?damaged, "a cube cannot be read"));
        Ok(Some(Arc::new(OpenVault { vault, blocks: Arc::default() })))
    }

    /// What the engine is started with.
    pub(crate) fn config(
        &self,
        vault: Option<&Arc<OpenVault>>,
        checkpoint: &Arc<Checkpoint>,
        numerics: &Numerics<'_>,
    ) -> anyhow::Result<TierConfig> {
        let open_vault = vault.map(|vault| self.opener(Arc::clone(vault), Arc::clone(checkpoint), numerics));
        Ok(TierConfig {
            host_bytes: self.kv_host_memory_bytes,
            host_slab_bytes: 0,
            num_io_threads: NUM_IO_THREADS,
            open_vault: open_vault.transpose()?,
            fetch_wait: None,
        })
    }

    /// Digests of large models take a while: this runs beside the first requests.
    fn opener(
        &self,
        open: Arc<OpenVault>,
        checkpoint: Arc<Checkpoint>,
        numerics: &Numerics<'_>,
    ) -> anyhow::Result<VaultOpener> {
        let digests = Cache::from_env()?.root().join("digests");
        let shape = numerics.shape(&checkpoint);
        let max_bytes = self.vault_size_bytes as u64;
        let segment_bytes = SEGMENT_BYTES.min(max_bytes / 4);
        let config = StoreConfig { format: shape.format.clone(), max_bytes, segment_bytes };
        Ok(Box::new(move || {
            let weights = weights_digest(&checkpoint, &digests, NUM_IO_THREADS)?;
            let binding = shape.binding(weights, &checkpoint)?;
            let folder = open.vault.segments_folder();
            let (store, report) = BlockStore::open(Arc::new(SystemFiles), &folder, config)?;
            report.faults.iter().for_each(|fault| tracing::warn!(%fault, "a file of the vault cannot be used"));
            hold_all(&store, open.vault.catalog());
            finish_erasures(&store, open.vault.catalog());
            store.trim();
            tracing::info!(folder = %open.vault.folder().display(), blocks = report.num_blocks, "the vault is open");
            let (identity, store) = (binding.identity.as_bytes().to_vec(), Arc::new(store));
            let block_bytes = shape.format.block_bytes;
            let _ = open.blocks.set(OpenBlocks { store: Arc::clone(&store), binding, block_bytes });
            Ok(OpenedVault { identity, store: Some(store) })
        }))
    }
}

/// What a block is, and the digest of what decides its bits, weights to follow.
struct KvShape {
    format: BlockFormat,
    hasher: blake3::Hasher,
    dtype: DType,
    tokenizer: Digest,
    template: Option<Digest>,
}

impl KvShape {
    /// What blocks computed from these weights are valid for, in no domain yet.
    fn binding(&self, weights: WeightsDigest, checkpoint: &Checkpoint) -> mneme::Result<Binding> {
        let identity = *self.hasher.clone().update(&weights).finalize().as_bytes();
        Ok(Binding {
            weights: Digest::from_bytes(weights),
            architecture: format!("{:?}", checkpoint.config().architecture).to_lowercase().parse()?,
            dtype: self.dtype.to_string().parse()?,
            tokenizer: self.tokenizer,
            template: self.template,
            identity: Digest::from_bytes(identity),
            form: Form::Prefix,
            domain: String::new().parse()?,
        })
    }
}

impl Numerics<'_> {
    fn shape(&self, checkpoint: &Checkpoint) -> KvShape {
        let mut hasher = blake3::Hasher::new_derive_key("mneme block identity v1");
        let mut add = |bytes: &[u8]| {
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        add(&NUMERICS_VERSION.to_le_bytes());
        add(self.backend.as_bytes());
        add(self.layout.name().as_bytes());
        add(self.weight_dtype.as_bytes());
        add(checkpoint.embedding_name().as_bytes());
        add(format!("{:?}", checkpoint.config()).as_bytes());
        let tokenizer = self.tokenizer_digest();
        let source = self.assets.template.as_ref().and_then(|template| template.source());
        add(tokenizer.as_bytes());
        add(source.unwrap_or_default().as_bytes());
        let block_size = self.layout.block_size();
        let format = BlockFormat { block_bytes: self.layout.block_bytes(), block_size, layout: self.layout.name() };
        let template = source.map(|source| Digest::of(source.as_bytes()));
        KvShape { format, hasher, dtype: self.layout.dtype(), tokenizer, template }
    }

    /// Every token's bytes, in order of id.
    fn tokenizer_digest(&self) -> Digest {
        let tokenizer = &self.assets.tokenizer;
        let mut hasher = blake3::Hasher::new_derive_key("mneme tokenizer v1");
        for id in 0..tokenizer.vocab_size() as u32 {
            let bytes = tokenizer.token_bytes(id);
            hasher.update(&(bytes.len() as u64).to_le_bytes()).update(bytes);
        }
        Digest::from_bytes(hasher.finalize().into())
    }
}
