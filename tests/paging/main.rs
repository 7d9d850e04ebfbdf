//! KV blocks in every tier: wherever the blocks of a prompt come from, the answer has the same bits.

#![allow(missing_docs, unreachable_pub, clippy::unwrap_used)]

mod deposits;
mod identity;
#[path = "../support/mod.rs"]
mod support;
mod tiers;
mod vault;
