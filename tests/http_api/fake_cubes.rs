//! An engine that computes no blocks but names them, and remembers which ones it has.

use std::collections::HashSet;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use mneme::kv::BlockHash;
use mneme::memory::{Binding, Catalog, CatalogLimits, Digest, Form, Label, SystemClock, Vault};
use mneme::paging::faulty::FaultyFiles;
use mneme::paging::{BlockFormat, BlockStore, StoreConfig};
use mneme::server::{ApiError, BlockRequest, BlockSource, BoxFuture, CubeEngine, CubeService, Materialized, Verified};

const BLOCK_SIZE: usize = 16;
const BLOCK_BYTES: usize = 64;
pub(crate) const BYTES_PER_TOKEN: u64 = 100;

/// What the engine was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Prefill {
    pub(crate) token_ids: Vec<u32>,
    pub(crate) domain: String,
    pub(crate) durable: bool,
    pub(crate) source: Option<BlockSource>,
}

pub(crate) struct FakeCubes {
    pub(crate) store: Arc<BlockStore>,
    blocks: Mutex<HashSet<BlockHash>>,
    prefills: Mutex<Vec<Prefill>>,
    /// Blocks whose cubes were made or changed.
    pub(crate) settled: Mutex<HashSet<BlockHash>>,
    pub(crate) is_loading: AtomicBool,
    pub(crate) has_other_vocabulary: AtomicBool,
    pub(crate) has_other_weights: AtomicBool,
    /// Blocks are named and not written.
    pub(crate) has_no_disk: AtomicBool,
}

impl Default for FakeCubes {
    fn default() -> Self {
        let format = BlockFormat { block_bytes: BLOCK_BYTES, block_size: BLOCK_SIZE, layout: "fake".into() };
        let config = StoreConfig { format, max_bytes: 16 << 20, segment_bytes: 1 << 20 };
        let store = BlockStore::open(Arc::new(FaultyFiles::new(1)), Path::new("/vault"), config).expect("a store").0;
        Self {
            store: Arc::new(store),
            blocks: Mutex::default(),
            prefills: Mutex::default(),
            settled: Mutex::default(),
            is_loading: AtomicBool::default(),
            has_other_vocabulary: AtomicBool::default(),
            has_other_weights: AtomicBool::default(),
            has_no_disk: AtomicBool::default(),
        }
    }
}

impl FakeCubes {
    /// A service with its cubes in memory.
    pub(crate) fn service(self: &Arc<Self>) -> CubeService {
        let catalog = Catalog::in_memory(Arc::new(SystemClock), CatalogLimits::default());
        CubeService { catalog: Arc::new(catalog), engine: Arc::<Self>::clone(self) }
    }

    /// A service with its cubes in a folder; the vault is closed when it goes.
    pub(crate) fn service_in(self: &Arc<Self>, folder: &Path) -> (CubeService, Vault) {
        let vault = Vault::open(folder, Arc::new(SystemClock), CatalogLimits::default()).expect("a vault");
        (CubeService { catalog: Arc::clone(vault.catalog()), engine: Arc::<Self>::clone(self) }, vault)
    }

    /// What was asked for since the last call.
    pub(crate) fn prefills(&self) -> Vec<Prefill> {
        std::mem::take(&mut self.prefills.lock().expect("no test panics here"))
    }

    /// Loses all blocks.
    pub(crate) fn lose_blocks(&self) {
        self.blocks.lock().expect("no test panics here").clear();
    }

    fn add(&self, prefill: Prefill) -> Materialized {
        let mut blocks = self.blocks.lock().expect("no test panics here");
        let mut found =
            Materialized { bytes: prefill.token_ids.len() as u64 * BYTES_PER_TOKEN, ..Materialized::default() };
        let mut hash = BlockHash::root(b"fake", prefill.domain.as_bytes());
        for tokens in prefill.token_ids.chunks(BLOCK_SIZE) {
            hash = hash.child(tokens);
            let is_new = blocks.insert(hash);
            if !self.has_no_disk.load(Ordering::SeqCst) {
                self.store.write(hash, tokens, &[tokens[0] as u8; BLOCK_BYTES]).expect("a block");
            }
            *(if is_new { &mut found.computed_tokens } else { &mut found.restored_tokens }) += tokens.len();
            if tokens.len() == BLOCK_SIZE { found.blocks.push(hash) } else { found.tail = Some(hash) }
        }
        self.prefills.lock().expect("no test panics here").push(prefill);
        found
    }
}

impl CubeEngine for FakeCubes {
    fn materialize(&self, wanted: BlockRequest) -> BoxFuture<'_, Result<Materialized, ApiError>> {
        let BlockRequest { token_ids, domain, durable, source, .. } = wanted;
        Box::pin(async move { Ok(self.add(Prefill { token_ids, domain, durable, source })) })
    }

    fn verify<'a>(&'a self, _token_ids: &'a [u32], blocks: &'a [BlockHash]) -> BoxFuture<'a, Verified> {
        Box::pin(async move {
            let known = self.blocks.lock().expect("no test panics here");
            let whole = blocks.iter().filter(|hash| known.contains(*hash)).count();
            Verified { whole, missing: blocks.len() - whole, damaged: 0 }
        })
    }

    fn store(&self) -> Result<Arc<BlockStore>, ApiError> {
        Ok(Arc::clone(&self.store))
    }

    fn hold(&self, blocks: &[BlockHash]) {
        self.blocks.lock().expect("no test panics here").extend(blocks);
    }

    fn release(&self, released: Vec<BlockHash>) {
        let mut blocks = self.blocks.lock().expect("no test panics here");
        released.iter().for_each(|hash| assert!(blocks.remove(hash), "a released block was there"));
    }

    fn erase(&self, blocks: &[BlockHash]) -> mneme::Result<bool> {
        self.store.erase(blocks)
    }

    fn settle(&self, settled: Vec<BlockHash>) {
        self.settled.lock().expect("no test panics here").extend(settled);
    }

    fn binding(&self) -> Result<Binding, ApiError> {
        if self.is_loading.load(Ordering::SeqCst) {
            return Err(ApiError::unavailable("The weights are still being read."));
        }
        let label = |text: &str| text.parse::<Label>().expect("a label");
        let vocabulary: &[u8] = if self.has_other_vocabulary.load(Ordering::SeqCst) { b"other" } else { b"bytes" };
        let has_other_weights = self.has_other_weights.load(Ordering::SeqCst);
        let weights: &[u8] = if has_other_weights { b"others" } else { b"weights" };
        Ok(Binding {
            weights: Digest::of(weights),
            architecture: label("llama"),
            dtype: label("bf16"),
            tokenizer: Digest::of(vocabulary),
            template: Some(Digest::of(b"template")),
            identity: Digest::of(&[weights, vocabulary].concat()),
            form: Form::Prefix,
            domain: label(""),
        })
    }
}
