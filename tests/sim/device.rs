//! What simulated lives run on, and what says what has to come out: the double of the device, whose answers `oracle.rs`
//! predicts, or a device that computes, where an engine says it on which nothing else happens.

use std::path::Path;

use mneme::backend::sim::SimBackend;
use mneme::engine::{AppliedAdapter, GenerateRequest, LoadedAdapter, SchedulerLimits, Task, TierConfig};

use super::adapters::Checkpoints;
use super::oracle::{Oracle, Tags, Update};
use super::sharing::Asked;
use crate::support::engine::{Setup, TestEngine, collect, greedy, request};

/// Starts an engine on a device that computes.
pub type Start = fn(&Path, Setup, TierConfig) -> TestEngine;

pub enum Device {
    Double,
    Computing { start: Start, plain: Box<Plain> },
}

/// How much happens in a life: at least and at most so many things, answers of so many tokens at most.
pub struct Scale {
    pub num_actions: (usize, usize),
    pub max_tokens: usize,
}

impl Device {
    /// The double, where nobody says how to start another one, for lives within `limits`.
    pub fn new(start: Option<Start>, limits: SchedulerLimits, checkpoints: &Checkpoints) -> Self {
        match start {
            None => Self::Double,
            Some(start) => Self::Computing { start, plain: Box::new(Plain::start(start, limits, checkpoints)) },
        }
    }

    pub fn is_double(&self) -> bool {
        matches!(self, Self::Double)
    }

    pub fn scale(&self) -> Scale {
        match self {
            Self::Double => Scale { num_actions: (40, 120), max_tokens: 60 },
            Self::Computing { .. } => Scale { num_actions: (20, 40), max_tokens: 30 },
        }
    }

    /// An engine on it; the double's copies are slow in ways of their own where there is a seed for that.
    pub fn start(&self, slow_seed: Option<u64>, model: &Path, setup: Setup, tiers: TierConfig) -> TestEngine {
        match self {
            Self::Double => {
                let backend = slow_seed.map_or_else(SimBackend::default, SimBackend::slow);
                TestEngine::start_with_tiers(backend, model, setup, tiers)
            }
            Self::Computing { start, .. } => start(model, setup, tiers),
        }
    }

    /// The greedy continuation of what somebody asked.
    pub fn answer(&self, asked: &Asked, limits: &SchedulerLimits, num_tokens: usize) -> Vec<u32> {
        match self {
            Self::Double => Oracle::answer(asked, limits, num_tokens),
            Self::Computing { plain, .. } => plain.answer(asked, num_tokens),
        }
    }
}

/// An engine with one request at a time, which leaves nothing behind.
pub struct Plain {
    engine: TestEngine,
    adapters: Vec<(Tags, LoadedAdapter)>,
}

impl Plain {
    /// Pieces of composed prompts are moved where their blocks have room: there is as much of that as in the lives.
    fn start(start: Start, limits: SchedulerLimits, checkpoints: &Checkpoints) -> Self {
        let limits = SchedulerLimits { max_num_seqs: 1, prefix_caching: false, ..limits };
        let engine = start(checkpoints.model(), Setup { limits, ..Setup::default() }, TierConfig::default());
        // Those that no life has room for are in none.
        let fitting = |(folder, tags): (&Path, Tags)| Some((tags, engine.handle.load_adapter(folder).ok()?));
        let adapters = checkpoints.adapters().filter_map(fitting).collect();
        Self { engine, adapters }
    }

    fn answer(&self, asked: &Asked, num_tokens: usize) -> Vec<u32> {
        let request = GenerateRequest {
            pieces: asked.pieces.clone(),
            adapters: asked.adapters.iter().map(|update| self.applied(update)).collect(),
            ..request(asked.prompt(), Task::Generate(Box::new(greedy(num_tokens))))
        };
        let output = collect(self.engine.handle.submit(request).unwrap());
        assert_eq!(output.tokens.len(), num_tokens, "the plain engine ended with {:?}", output.reason);
        output.tokens
    }

    fn applied(&self, update: &Update) -> AppliedAdapter {
        let (_, adapter) = self.adapters.iter().find(|(tags, _)| *tags == update.tags).unwrap();
        AppliedAdapter { adapter: adapter.clone(), scale: f32::from_bits(update.scale) }
    }
}
