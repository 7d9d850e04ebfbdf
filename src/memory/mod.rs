//! MemCubes: what a piece of memory is called, what it holds, who may use it and how long it lives, and the files in
//! which that is written down.
//!
//! No KV bytes, no engine, no HTTP: blocks are known by their hashes. What a cube's tokens are is said in
//! [`cube_prompt`].

mod acl;
mod catalog;
mod changes;
mod commit;
mod cube;
mod digest;
mod event;
mod folder;
mod index;
mod label;
mod lifecycle;
mod lineage;
mod manifest;
mod name;
mod parameter;
mod payload;
mod plaintext;
mod portable;
mod prefill;
mod snapshot;
mod timestamp;
mod vault;

#[cfg(test)]
mod catalog_tests;
#[cfg(test)]
mod crash_tests;
#[cfg(test)]
mod samples;

pub use self::acl::{Access, Acl, AclLists, Principal, Visibility};
pub use self::catalog::{Catalog, CatalogLimits, CubeFilter, CubePage};
pub use self::changes::{CubeChanges, Ended, Erasure, NewCube};
pub use self::cube::{Cube, CubeId, Governance, Origin, Priority, PriorityLevel, SemanticType};
pub use self::digest::Digest;
pub use self::event::{Event, EventKind, EventPage};
pub use self::folder::{Damaged, Durability};
pub use self::index::CubeView;
pub use self::label::{Label, Labels};
pub use self::lifecycle::{State, Usage};
pub use self::lineage::{Lineage, Relative};
pub use self::manifest::{Ending, Tombstone};
pub use self::name::{CubeAddress, CubeName, Version};
pub use self::parameter::{AdapterSource, Parameter};
pub use self::payload::{Activation, Binding, Blocks, Form, Kind, Payload, Twin};
pub use self::plaintext::{
    ChatSetting, CubePrompt, chat_cube_tokens, completion_cube_tokens, completion_prompt, cube_prompt, cube_prompt_text,
};
pub use self::portable::{Incoming, Outgoing, PortableCube};
pub use self::prefill::{Gap, MAX_PREFILL_ATTEMPTS, PrefillJob};
pub use self::snapshot::{
    Difference, DifferenceKind, Restoration, RestoreOutcome, Snapshot, SnapshotCube, SnapshotId, SnapshotScope,
};
pub use self::timestamp::{Clock, SystemClock, Timestamp};
pub use self::vault::Vault;
