//! What the routes of MemCubes stand on: the catalog, and the engine as far as cubes need it.

use std::pin::Pin;
use std::sync::Arc;

use super::blocking;
use super::erase::erase_all;
use crate::engine::request::SharedPrefix;
use crate::kv::BlockHash;
use crate::memory::{Binding, Catalog, CubeView, Ended, Erasure, Priority};
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

    /// Overwrites blocks on disk, durably, and in memory as soon as nobody uses them; nobody finds them from now on. Waits
    /// for the disk. Whether nothing is left to be overwritten on disk: the vault may not be open yet, somebody may be naming
    /// some of the blocks in a cube, and the blocks of another model are overwritten when that is served.
    fn erase(&self, blocks: &[BlockHash]) -> crate::Result<bool>;

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
    /// Whether the memory that they take is zeroed when nobody uses them.
    pub erase_on_free: bool,
    /// How hard they are held on to in memory, and what they may displace on disk.
    pub priority: Priority,
    /// Whether it is computed only while nothing else is to be.
    pub is_background: bool,
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
    /// Lets go of what ended cubes had, and erases what is to be erased. Whether all of that is done.
    pub(super) async fn end(&self, ended: Ended) -> Result<bool, ApiError> {
        self.engine.release(ended.unreferenced);
        self.erase(ended.erasures).await
    }

    /// Erases what earlier calls, or earlier processes, could not.
    pub(super) async fn catch_up(&self) -> Result<bool, ApiError> {
        let pending = self.catalog.pending_erasures();
        pending.iter().for_each(|erasure| self.engine.release(erasure.blocks.clone()));
        self.erase(pending).await
    }

    async fn erase(&self, erasures: Vec<Erasure>) -> Result<bool, ApiError> {
        if erasures.is_empty() {
            return Ok(true);
        }
        let (engine, catalog) = (Arc::clone(&self.engine), Arc::clone(&self.catalog));
        blocking(move || erase_all(&catalog, erasures, |blocks| engine.erase(blocks))).await
    }

    /// Has the blocks of a cube that was just made or changed held on to as it says.
    pub(super) fn settle(&self, view: &CubeView) {
        self.engine.settle(self.catalog.blocks_of(view.cube.id));
    }
}
