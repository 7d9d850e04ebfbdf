//! The whole engine on the software GPU: the tests that the CPU backend passes, every family against it, and a real
//! model.

#![cfg(feature = "cuda")]
#![allow(missing_docs, unreachable_pub, clippy::unwrap_used)]

mod adapted;
#[path = "../generation/adapters.rs"]
mod adapters;
#[path = "../generation/blend.rs"]
mod blend;
mod changed_logits;
mod command;
#[path = "../generation/composition.rs"]
mod composition;
mod cublaslt;
#[path = "../paging/deposits.rs"]
mod deposits;
mod families;
mod faults;
#[cfg(feature = "flash-attn")]
mod flash_attention;
mod fp8;
#[path = "../paging/gate.rs"]
mod gate;
mod golden;
mod graphs;
mod health;
#[path = "../paging/identity.rs"]
mod identity;
#[path = "../generation/invariance.rs"]
mod invariance;
mod landing;
#[path = "../generation/levels.rs"]
mod levels;
#[path = "../generation/lifecycle.rs"]
mod lifecycle;
#[path = "../generation/link.rs"]
mod link;
mod merged;
#[path = "../generation/merging.rs"]
mod merging;
#[path = "../generation/parameters.rs"]
mod parameters;
#[path = "../paging/portable.rs"]
mod portable;
mod quantised;
mod serving;
mod simulation;
#[path = "../support/mod.rs"]
mod support;
#[path = "../paging/tails.rs"]
mod tails;
#[path = "../paging/tiers.rs"]
mod tiers;
#[path = "../paging/vault.rs"]
mod vault;

use std::path::Path;

use mneme::backend::DType;
use mneme::backend::cpu::Isa;
use mneme::backend::cuda::CudaBackend;
use mneme::engine::TierConfig;
use support::engine::{Setup, TestEngine};
use support::tiny_model::Family;

/// Random workloads for every family.
const NUM_WORKLOADS: u64 = 1;

/// Requests of which most are given up.
const NUM_CANCELLED: usize = 60;

/// Requests under adapters that come and go: a few under each composition.
const NUM_ADAPTED: usize = 12;

/// Tokens of an answer that a merge beside it takes less time than.
const LONG_ANSWER: usize = 150;

/// The families that computing and every tier are tested with, and which of them has a sliding window: one of few layers.
/// `families` and `landing` have the longer one.
const FAMILIES: &[Family] = &Family::SHORT;
const GEMMA: Family = Family::ShortGemma3;

/// A step takes thousands of times longer than on a GPU: one family goes through every case, the others through a few.
const IS_FAST: bool = false;

/// The device that these tests are about.
type TestBackend = CudaBackend;

/// It computes in the type of the KV cache.
fn backend(setup: &Setup) -> TestBackend {
    support::softgpu::backend(setup.kv_dtype)
}

/// Starts an engine on it.
fn start(path: &Path, setup: Setup) -> TestEngine {
    TestEngine::start(backend(&setup), path, setup)
}

/// The same with tiers below the device.
fn start_with_tiers(path: &Path, setup: Setup, tiers: TierConfig) -> TestEngine {
    TestEngine::start_with_tiers(backend(&setup), path, setup, tiers)
}

/// What the tests of invariance go through: f16 runs through the same kernels with other conversions, which
/// `tests/kernels` and `families` cover.
fn kinds() -> Vec<(Isa, Option<DType>, DType)> {
    vec![(Isa::best(), None, DType::BF16)]
}

/// The kernels have tests of their own; here it is about the order of copies, events and steps.
#[test]
fn families_are_the_cpus_in_other_schedules() {
    support::softgpu::pass_lazily(&["families::"], "other_schedules");
}

/// A graph's kernels run when their stream gets to them, like single launches.
#[test]
fn graphs_are_replayed_in_other_schedules() {
    support::softgpu::pass_lazily(&["graphs::graphs_give"], "other_schedules");
}

/// Products of the library are work of their stream like kernels, and share one workspace.
#[test]
fn fast_products_are_near_in_other_schedules() {
    support::softgpu::pass_lazily(&["cublaslt::"], "other_schedules");
}

/// What is drawn how is written and uploaded while the layers are computed.
#[test]
fn changed_logits_are_the_hosts_in_other_schedules() {
    support::softgpu::pass_lazily(&["changed_logits::"], "other_schedules");
}

/// Copies of layers, the waits for them and the step that uses them come from different threads.
#[test]
fn blocks_land_in_other_schedules() {
    support::softgpu::pass_in_other_schedules(&["landing::"], "other_schedules");
}

/// Adapters come from another thread and another stream than those that use them, and a copy is written between steps from
/// pages that another stream has brought.
#[test]
fn adapters_and_copies_are_the_cpus_in_other_schedules() {
    support::softgpu::pass_lazily(&["adapted::", "adapters::", "merged::"], "other_schedules");
}

/// Everything at once, each from its own thread and stream.
#[test]
fn lives_end_as_alone_in_other_schedules() {
    support::softgpu::pass_lazily(&["simulation::"], "other_schedules");
}

/// What a request comes to, and the models that other programs have recorded.
#[test]
fn outputs_depend_on_requests_alone_in_other_schedules() {
    support::softgpu::pass_lazily(&["invariance::", "golden::a_tiny"], "other_schedules");
}

/// Blocks come from other tiers and places, and weights change between steps.
#[test]
fn tiers_compositions_and_merges_pass_in_other_schedules() {
    let wanted =
        ["tiers::", "tails::", "deposits::", "identity::", "portable::", "composition::", "blend::", "merging::"];
    support::softgpu::pass_lazily(&wanted, "other_schedules");
}

/// Pieces are computed apart and moved.
#[test]
fn linked_prompts_pass_in_other_schedules() {
    support::softgpu::pass_lazily(&["link::"], "other_schedules");
}

/// Engines whose products are by warpgroups and whose adapters are added by clusters.
#[test]
fn engines_are_the_cpus_on_hopper() {
    let wanted = ["families::", "golden::a_tiny", "invariance::llama_output", "adapted::", "adapters::"];
    support::softgpu::pass_on_hopper(&wanted);
}

/// What there is no time for in every run: other types of numbers, queues and parameters.
#[test]
#[ignore = "takes a minute, which CI has not"]
fn the_rest_passes_in_other_schedules() {
    let wanted = ["levels::", "lifecycle::", "parameters::", "fp8::", "quantised::"];
    support::softgpu::pass_lazily(&wanted, "other_schedules");
}
