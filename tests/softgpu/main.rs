//! The whole engine on the software GPU: the tests that the CPU backend passes, every family against it, and a real
//! model.

#![cfg(feature = "cuda")]
#![allow(missing_docs, unreachable_pub, clippy::unwrap_used)]

mod adapters;
mod blend;
mod command;
mod families;
mod faults;
#[path = "../paging/gate.rs"]
mod gate;
mod golden;
mod graphs;
#[path = "../generation/invariance.rs"]
mod invariance;
mod landing;
#[path = "../generation/lifecycle.rs"]
mod lifecycle;
mod merged;
#[path = "../generation/merging.rs"]
mod merging;
#[path = "../paging/deposits.rs"]
mod paging_deposits;
#[path = "../paging/tiers.rs"]
mod paging_tiers;
#[path = "../generation/parameters.rs"]
mod parameters;
mod quantised;
mod serving;
#[path = "../support/mod.rs"]
mod support;
#[path = "../paging/vault.rs"]
mod vault;

use std::path::Path;

use mneme::backend::DType;
use mneme::backend::cpu::Isa;
use mneme::engine::TierConfig;
use support::engine::{Setup, TestEngine};
use support::tiny_model::Family;

/// Random workloads for every family: a step takes thousands of times longer than on a GPU.
const NUM_WORKLOADS: u64 = 1;

/// Tokens of an answer that a merge beside it takes less time than.
const LONG_ANSWER: usize = 150;

/// Starts an engine on the device that these tests are about.
fn start(path: &Path, setup: Setup) -> TestEngine {
    TestEngine::start_on_softgpu(path, setup)
}

/// The families that every tier is tested with: one with a sliding window, whose kernels the others' are a part of.
const FAMILIES: &[Family] = &[Family::Gemma3];

/// The same with tiers below the device.
fn start_with_tiers(path: &Path, setup: Setup, tiers: TierConfig) -> TestEngine {
    let backend = support::softgpu::backend(setup.kv_dtype);
    TestEngine::start_with_tiers(backend, path, setup, tiers)
}

/// What the tests of invariance go through: f16 runs through the same kernels with other conversions, which
/// `tests/kernels` and `families` cover.
fn kinds() -> Vec<(Isa, Option<DType>, DType)> {
    vec![(Isa::best(), None, DType::BF16)]
}

/// The kernels have tests of their own; here it is about the order of copies, events and steps.
#[test]
fn families_are_the_cpus_in_other_schedules() {
    support::softgpu::pass_in_other_schedules("families::", "other_schedules");
}

/// A graph's kernels run when their stream gets to them, like single launches.
#[test]
fn graphs_are_replayed_in_other_schedules() {
    support::softgpu::pass_in_other_schedules("graphs::graphs_give", "other_schedules");
}

/// Copies of layers, the waits for them and the step that uses them come from different threads.
#[test]
fn blocks_land_in_other_schedules() {
    support::softgpu::pass_in_other_schedules("landing::", "other_schedules");
}

/// Adapters come from another thread and another stream than those that use them.
#[test]
fn adapters_are_the_cpus_in_other_schedules() {
    support::softgpu::pass_in_other_schedules("adapters::", "other_schedules");
}

/// A copy is written between steps, from pages that another stream has brought.
#[test]
fn copies_are_the_cpus_in_other_schedules() {
    support::softgpu::pass_in_other_schedules("merged::llama", "other_schedules");
}
