//! The tiers below the device: arguments, the vault's folder, and what opening it takes.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use clap::Args;
use mneme::backend::{KvLayout, NUMERICS_VERSION};
use mneme::engine::TierConfig;
use mneme::hub::Cache;
use mneme::memory::{CatalogLimits, SystemClock, Vault};
use mneme::models::{Checkpoint, weights_digest};
use mneme::paging::{BlockFormat, BlockStore, OpenedVault, StoreConfig, SystemFiles, VaultOpener};

use super::engine_args::parse_bytes;
use super::text_assets::TextAssets;

/// Bytes of one file of blocks.
const SEGMENT_BYTES: u64 = 128 << 20;

/// Threads that copy blocks between tiers.
const NUM_IO_THREADS: usize = 2;

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
    /// Host memory for KV blocks that the device has no room for, in bytes, with an optional suffix; of no use on the
    /// CPU, where it is the same memory
    #[arg(long, value_parser = parse_bytes, default_value = "0")]
    kv_host_memory_bytes: usize,
}

/// What decides the bits of a KV block besides weights and tokens.
pub(crate) struct Numerics<'a> {
    pub(crate) backend: String,
    pub(crate) layout: KvLayout,
    /// How weights are kept.
    pub(crate) weight_dtype: String,
    pub(crate) assets: &'a TextAssets,
}

impl TierArgs {
    /// Opens the vault's folder for this process alone; `None` when nothing is to be kept.
    pub(crate) fn open_vault(&self) -> anyhow::Result<Option<Arc<Vault>>> {
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
        Ok(Some(Arc::new(vault)))
    }

    /// What the engine is started with.
    pub(crate) fn config(
        &self,
        vault: Option<&Arc<Vault>>,
        checkpoint: &Arc<Checkpoint>,
        numerics: &Numerics<'_>,
    ) -> anyhow::Result<TierConfig> {
        let open_vault = vault.map(|vault| self.opener(Arc::clone(vault), Arc::clone(checkpoint), numerics));
        Ok(TierConfig {
            host_bytes: self.kv_host_memory_bytes,
            num_io_threads: NUM_IO_THREADS,
            open_vault: open_vault.transpose()?,
            max_fetch_wait: None,
        })
    }

    /// Digests of large models take a while: this runs beside the first requests.
    fn opener(
        &self,
        vault: Arc<Vault>,
        checkpoint: Arc<Checkpoint>,
        numerics: &Numerics<'_>,
    ) -> anyhow::Result<VaultOpener> {
        let digests = Cache::from_env()?.root().join("digests");
        let KvShape { format, mut hasher } = numerics.shape(&checkpoint);
        let max_bytes = self.vault_size_bytes as u64;
        let config = StoreConfig { format, max_bytes, segment_bytes: SEGMENT_BYTES.min(max_bytes / 4) };
        Ok(Box::new(move || {
            hasher.update(&weights_digest(&checkpoint, &digests, NUM_IO_THREADS)?);
            let (store, report) = BlockStore::open(Arc::new(SystemFiles), &vault.segments_folder(), config)?;
            report.faults.iter().for_each(|fault| tracing::warn!(%fault, "a file of the vault cannot be used"));
            store.pin(&vault.catalog().block_references());
            tracing::info!(folder = %vault.folder().display(), blocks = report.num_blocks, "the vault is open");
            Ok(OpenedVault { identity: hasher.finalize().as_bytes().to_vec(), store: Some(Arc::new(store)) })
        }))
    }
}

/// What a block is, and the digest of what decides its bits, weights to follow.
struct KvShape {
    format: BlockFormat,
    hasher: blake3::Hasher,
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
        let tokenizer = &self.assets.tokenizer;
        (0..tokenizer.vocab_size() as u32).for_each(|id| add(tokenizer.token_bytes(id)));
        add(self.assets.template.as_ref().and_then(|template| template.source()).unwrap_or_default().as_bytes());
        let block_size = self.layout.block_size();
        let format = BlockFormat { block_bytes: self.layout.block_bytes(), block_size, layout: self.layout.name() };
        KvShape { format, hasher }
    }
}
