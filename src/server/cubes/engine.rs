//! MemCubes over the real engine and the vault's block store.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use super::holds::{Holds, level_of};
use super::service::{BlockRequest, BlockSource, BoxFuture, CubeEngine, Materialized, Verified};
use crate::engine::handle::EngineHandle;
use crate::engine::request::{BACKGROUND, FinishReason, GenerateRequest, OutputEvent, Task};
use crate::kv::BlockHash;
use crate::memory::{Binding, Catalog};
use crate::paging::{BlockStore, Found};
use crate::server::error::ApiError;

/// What is known once the vault is open.
pub struct OpenBlocks {
    /// Where blocks are kept.
    pub store: Arc<BlockStore>,
    /// What blocks computed now are valid for.
    pub binding: Binding,
    /// Bytes of a block.
    pub block_bytes: usize,
}

/// The engine, as far as cubes need it.
pub struct VaultEngine {
    engine: EngineHandle,
    catalog: Arc<Catalog>,
    open: Arc<OnceLock<OpenBlocks>>,
    /// What the store has been told to keep.
    holds: Mutex<Holds>,
}

impl VaultEngine {
    /// Cubes of `catalog`, computed by `engine`; `open` is filled when the vault has been opened, and its store then has
    /// been told to keep what the catalog names.
    pub fn new(engine: EngineHandle, catalog: Arc<Catalog>, open: Arc<OnceLock<OpenBlocks>>) -> Self {
        let holds = Mutex::new(Holds::of(&catalog));
        Self { engine, catalog, open, holds }
    }

    fn open(&self) -> Result<&OpenBlocks, ApiError> {
        let message = "The vault is being opened; try again in a moment.";
        self.open.get().ok_or_else(|| ApiError::unavailable(message))
    }

    fn holds(&self) -> MutexGuard<'_, Holds> {
        self.holds.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    async fn deposit(&self, wanted: BlockRequest) -> Result<Materialized, ApiError> {
        let open = self.open()?;
        let BlockRequest {
            token_ids,
            domain: kept_in,
            durable: is_durable,
            source,
            erase_on_free,
            priority,
            is_background,
        } = wanted;
        let (domain, shared_prefix, kept_in) = match source {
            Some(BlockSource { domain, shared_prefix }) => (domain, shared_prefix, Some(kept_in)),
            None => (kept_in, None, None),
        };
        let mut stream = self.engine.submit(GenerateRequest {
            id: "memcube".into(),
            prompt: token_ids,
            task: Task::Deposit { is_durable, kept_in },
            priority: if is_background { BACKGROUND } else { 0 },
            domain,
            shared_prefix,
            adapters: Vec::new(),
            pieces: vec![],
            level: level_of(priority),
            erase_on_free,
        })?;
        let mut deposited = None;
        while let Some(event) = stream.next().await {
            match event {
                OutputEvent::Deposited(found) => deposited = Some(*found),
                OutputEvent::Finished(FinishReason::Error(why)) => return Err(ApiError::unavailable(why)),
                _ => {}
            }
        }
        let found = deposited.ok_or_else(|| ApiError::unavailable("The server is shutting down."))?;
        self.hold(&[&found.blocks[..], found.tail.as_slice()].concat());
        let num_blocks = found.blocks.len() + usize::from(found.tail.is_some());
        Ok(Materialized {
            blocks: found.blocks,
            tail: found.tail,
            restored_tokens: found.restored_tokens,
            computed_tokens: found.computed_tokens,
            bytes: (num_blocks * open.block_bytes) as u64,
        })
    }

    fn check_blocks(&self, token_ids: &[u32], blocks: &[BlockHash]) -> Verified {
        let mut verified = Verified::default();
        let Ok(OpenBlocks { store, block_bytes, .. }) = self.open() else {
            return Verified { missing: blocks.len(), ..verified };
        };
        let mut bytes = vec![0; *block_bytes];
        for (hash, tokens) in blocks.iter().zip(token_ids.chunks(self.engine.info().block_size)) {
            match store.read(hash, tokens, &mut bytes) {
                Found::Whole => verified.whole += 1,
                Found::Missing => verified.missing += 1,
                Found::Damaged(why) => {
                    tracing::warn!(%why, "a block of a cube is damaged");
                    verified.damaged += 1;
                }
            }
        }
        verified
    }
}

impl CubeEngine for VaultEngine {
    fn materialize(&self, wanted: BlockRequest) -> BoxFuture<'_, Result<Materialized, ApiError>> {
        Box::pin(self.deposit(wanted))
    }

    fn verify<'a>(&'a self, token_ids: &'a [u32], blocks: &'a [BlockHash]) -> BoxFuture<'a, Verified> {
        Box::pin(async move { self.check_blocks(token_ids, blocks) })
    }

    fn store(&self) -> Result<Arc<BlockStore>, ApiError> {
        Ok(Arc::clone(&self.open()?.store))
    }

    fn hold(&self, blocks: &[BlockHash]) {
        if let Some(OpenBlocks { store, .. }) = self.open.get() {
            self.holds().keep(store, &self.catalog, blocks.iter().copied());
        }
    }

    fn settle(&self, blocks: Vec<BlockHash>) {
        let store = self.open.get().map(|open| &*open.store);
        self.holds().settle(store, &self.catalog, blocks.into_iter());
    }

    fn release(&self, blocks: Vec<BlockHash>) {
        // Unless one has got a cube again meanwhile: the catalog says so.
        self.settle(blocks);
    }

    fn erase(&self, blocks: &[BlockHash]) -> crate::Result<bool> {
        let Some(OpenBlocks { store, .. }) = self.open.get() else { return Ok(false) };
        let holds = self.holds();
        let (held, free): (Vec<BlockHash>, Vec<BlockHash>) = blocks.iter().partition(|hash| holds.has(hash));
        drop(holds);
        // Memory first: what is on its way to disk arrives before it is looked for there.
        self.engine.erase(free.clone());
        Ok(store.erase(&free)? && held.is_empty())
    }

    fn binding(&self) -> Result<Binding, ApiError> {
        Ok(self.open()?.binding.clone())
    }
}
