//! The whole engine over tiny models of every family: what is computed, and that nothing but the request decides it.

#![allow(missing_docs, unreachable_pub, clippy::unwrap_used)]

mod adapters;
mod blend;
mod composition;
mod definitions;
mod invariance;
mod levels;
mod lifecycle;
mod link;
mod merged_weights;
mod merging;
mod parameters;
#[path = "../support/mod.rs"]
mod support;

use std::path::Path;

use mneme::backend::DType;
use mneme::backend::cpu::Isa;
use support::engine::{Setup, TestEngine};

/// Random workloads for every family, instruction set and kind of numbers.
const NUM_WORKLOADS: u64 = 10;

/// Tokens of an answer that a merge beside it takes less time than.
const LONG_ANSWER: usize = 900;

/// Starts an engine on the device that these tests are about.
fn start(path: &Path, setup: Setup) -> TestEngine {
    TestEngine::start_on_cpu(path, setup)
}

/// What the tests of invariance go through: instruction sets, types of weights and of the KV cache.
fn kinds() -> Vec<(Isa, Option<DType>, DType)> {
    let stored = Isa::available().map(|isa| (isa, None, DType::BF16));
    stored.chain([(Isa::best(), Some(DType::F32), DType::F32)]).collect()
}
