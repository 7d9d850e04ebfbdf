//! What the routes of MemCubes stand on: the catalog, and the engine as far as cubes need it.

use std::pin::Pin;
use std::sync::Arc;

use super::blocking;
use crate::engine::request::SharedPrefix;
use crate::kv::BlockHash;
use crate::memory::{Binding, Catalog, CubeView, Ended};
use crate::paging::BlockStore;
use crate::server::error::ApiError;

/// A future of an object whose type is not known here.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Turns tokens into KV blocks that stay, and looks after them.
pub trait CubeEngine: Send + Sync + 'static {
    /// Sees to it that the blocks of some tokens are there: found ones are used, the others computed. They stay at least
    /// until the caller has had time to name them in a cube.
    fn materialize(&self, wanted: BlockRequest) -> BoxFuture<'_, Result<Materialized, ApiError>>;

    /// Reads the blocks of `token_ids`, the partial one last, and compares their digests.
    fn verify<'a>(&'a self, token_ids: &'a [u32], blocks: &'a [BlockHash]) -> BoxFuture<'a, Verified>;

    /// Where the blocks are kept. An error while that is not yet open.
    fn store(&self) -> Result<Arc<BlockStore>, ApiError>;

    /// Keeps blocks until the caller has had time to name them in a cube. Returns at once.
    fn hold(&self, blocks: &[BlockHash]);

    /// Takes note of blocks whose cubes were made or changed: the catalog says how hard they are held on to. Returns at once.
    fn settle(&self, blocks: Vec<BlockHash>);

    /// Takes note of blocks that no cube references any more: they need not be kept. Returns at once.
    fn release(&self, blocks: Vec<BlockHash>);

    /// Overwrites blocks on disk, durably, and has nobody find them. Waits for the disk.
    fn erase(&self, blocks: &[BlockHash]) -> crate::Result<()>;

    /// What blocks computed now are valid for; in prefix form, in no domain yet. An error while it is not yet known.
    fn binding(&self) -> Result<Binding, ApiError>;
}

/// Tokens whose blocks are wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockRequest {
    /// From position 0 on.
    pub token_ids: Vec<u32>,
    /// The cache domain that the blocks are kept in.
    pub domain: String,
    /// Whether they are on disk when they are there.
    pub durable: bool,
    /// Where they may be found; in that domain when it is not said.
    pub source: Option<BlockSource>,
}

/// What a call may find.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockSource {
    /// The cache domain of what is its own.
    pub domain: String,
    /// A beginning whose blocks belong to another domain.
    pub shared_prefix: Option<SharedPrefix>,
}

/// The blocks of some tokens.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Materialized {
    /// The full blocks, in order of position.
    pub blocks: Vec<BlockHash>,
    /// The partial block behind them, when it was stored.
    pub tail: Option<BlockHash>,
    /// Tokens whose blocks were found.
    pub restored_tokens: usize,
    /// Tokens that the model was run over.
    pub computed_tokens: usize,
    /// Bytes of all blocks.
    pub bytes: u64,
}

/// What became of some blocks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Verified {
    /// There, with the digest they should have.
    pub whole: usize,
    /// Not there; the next use computes them.
    pub missing: usize,
    /// There with another digest; dropped, the next use computes them.
    pub damaged: usize,
}

/// What the server has for cubes.
#[derive(Clone)]
pub struct CubeService {
    /// The cubes.
    pub catalog: Arc<Catalog>,
    /// Computes their blocks.
    pub engine: Arc<dyn CubeEngine>,
}

impl CubeService {
    /// Lets go of what ended cubes had, and erases what is to be erased.
    pub(super) async fn end(&self, ended: Ended) -> Result<(), ApiError> {
        self.engine.release(ended.unreferenced);
        if ended.to_erase.is_empty() {
            return Ok(());
        }
        let engine = Arc::clone(&self.engine);
        blocking(move || engine.erase(&ended.to_erase)).await
    }

    /// Has the blocks of a cube that was just made or changed held on to as it says.
    pub(super) fn settle(&self, view: &CubeView) {
        self.engine.settle(self.catalog.blocks_of(view.cube.id));
    }
}
