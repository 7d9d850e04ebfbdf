//! Who owns which KV block. Knows no bytes, no device and no request.

mod block;
mod cached_pool;
mod free_list;
mod groups;
mod pool;
mod prefix;

pub use block::{BlockHash, BlockId, BlockTable};
pub use cached_pool::CachedPool;
pub use free_list::Level;
pub use groups::GroupId;
pub use pool::BlockPool;
pub use prefix::PrefixCache;
