//! KV blocks in every tier: wherever the blocks of a prompt come from, the answer has the same bits.

#![allow(missing_docs, unreachable_pub, clippy::unwrap_used)]

mod deposits;
mod gate;
mod identity;
mod portable;
#[path = "../support/mod.rs"]
mod support;
mod tails;
mod tiers;
mod vault;

use std::path::Path;

use mneme::backend::cpu::CpuBackend;
use mneme::engine::TierConfig;
use support::engine::{Setup, TestEngine};
use support::tiny_model::Family;

/// The families that every tier is tested with, and which of them has a sliding window.
const FAMILIES: &[Family] = &Family::ALL;
const GEMMA: Family = Family::Gemma3;

/// Whether a step takes so little that every family may go through every case.
const IS_FAST: bool = true;

/// Starts an engine on the device that these tests are about.
fn start_with_tiers(path: &Path, setup: Setup, tiers: TierConfig) -> TestEngine {
    let backend = CpuBackend::new(setup.isa, setup.num_threads).unwrap();
    TestEngine::start_with_tiers(backend, path, setup, tiers)
}
