//! The whole engine over tiny models of every family: what is computed, and that nothing but the request decides it.

#![allow(missing_docs, unreachable_pub, clippy::unwrap_used)]

mod adapted_weights;
mod adapters;
mod blend;
mod composition;
mod definitions;
mod impossible_copies;
mod invariance;
mod levels;
mod lifecycle;
mod link;
mod merged_weights;
mod merging;
mod parameters;
#[path = "../support/mod.rs"]
mod support;
mod vocabulary;

use std::path::Path;

use mneme::backend::DType;
use mneme::backend::cpu::{CpuBackend, Isa};
use support::engine::{Setup, TestEngine};
use support::tiny_model::Family;

/// Random workloads for every family, instruction set and kind of numbers.
const NUM_WORKLOADS: u64 = 10;

/// Requests of which most are given up.
const NUM_CANCELLED: usize = 1000;

/// Requests under adapters that come and go.
const NUM_ADAPTED: usize = 20;

/// Tokens of an answer that a merge beside it takes less time than.
const LONG_ANSWER: usize = 900;

/// The families that computing is tested with, and which of them has a sliding window.
const FAMILIES: &[Family] = &Family::ALL;
const GEMMA: Family = Family::Gemma3;

/// Whether a step takes so little that every family may go through every case.
const IS_FAST: bool = true;

/// The device that these tests are about.
type TestBackend = CpuBackend;

fn backend(setup: &Setup) -> TestBackend {
    CpuBackend::new(setup.isa, setup.num_threads).unwrap()
}

/// Starts an engine on it.
fn start(path: &Path, setup: Setup) -> TestEngine {
    TestEngine::start(backend(&setup), path, setup)
}

/// What the tests of invariance go through: instruction sets, types of weights and of the KV cache.
fn kinds() -> Vec<(Isa, Option<DType>, DType)> {
    let stored = Isa::available().map(|isa| (isa, None, DType::BF16));
    stored.chain([(Isa::best(), Some(DType::F32), DType::F32)]).collect()
}
