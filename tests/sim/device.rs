//! What simulated lives run on, and what says what has to come out: the double of the device, whose answers `oracle.rs`
//! predicts, or a device that computes, where an engine says it on which nothing else happens.

use std::path::Path;

use mneme::backend::sim::SimBackend;
use mneme::engine::{
    AppliedAdapter, GenerateRequest, LoadedAdapter, MergeConfig, MergeRule, SchedulerLimits, Task, TierConfig,
};

use super::adapters::Checkpoints;
use super::oracle::{Oracle, Tags, Update};
use super::sharing::Asked;
use crate::support::engine::{Output, Setup, TestEngine, collect, greedy, request};

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

/// What comes out where nothing else happens.
pub struct Plain {
    added: Alone,
    merged: Alone,
}

/// An engine with one request at a time, which leaves nothing behind.
struct Alone {
    engine: TestEngine,
    adapters: Vec<(Tags, LoadedAdapter)>,
}

/// Whatever runs is merged, and makes room for what runs next.
const MERGING: MergeConfig =
    MergeConfig { is_enabled: true, max_bytes: 1 << 30, merge_share: 0.5, unmerge_share: 0.5, window_tokens: 5 };

/// Requests of a composition until it is merged, at most.
const MAX_REQUESTS: usize = 1000;

impl Plain {
    fn start(start: Start, limits: SchedulerLimits, checkpoints: &Checkpoints) -> Self {
        let alone = |rule, merge| Alone::start(start, limits, checkpoints, rule, merge);
        Self { added: alone(MergeRule::Never, MergeConfig::default()), merged: alone(MergeRule::Always, MERGING) }
    }

    fn answer(&self, asked: &Asked, num_tokens: usize) -> Vec<u32> {
        if !asked.is_merged {
            return self.added.answer(asked, num_tokens).tokens;
        }
        let begun = Asked { tokens: vec![1, 2, 3], num_prompt: 3, pieces: vec![], ..asked.clone() };
        let is_merged = |_: &usize| self.merged.answer(&begun, 2).reuse.is_merged;
        assert!((0..MAX_REQUESTS).find(is_merged).is_some(), "a composition is never merged");
        let output = self.merged.answer(asked, num_tokens);
        assert!(output.reuse.is_merged);
        output.tokens
    }
}

impl Alone {
    /// Pieces of composed prompts are moved where their blocks have room: there is as much of that as in the lives.
    fn start(
        start: Start,
        limits: SchedulerLimits,
        checkpoints: &Checkpoints,
        rule: MergeRule,
        merge: MergeConfig,
    ) -> Self {
        let limits = SchedulerLimits { max_num_seqs: 1, prefix_caching: false, ..limits };
        let engine = start(checkpoints.model(), Setup { limits, merge, ..Setup::default() }, TierConfig::default());
        // Those that no life has room for are in none.
        let fitting = |(folder, tags): (&Path, Tags)| {
            Some((tags, engine.handle.load_adapter(folder).ok()?.with_merge_rule(rule)))
        };
        let adapters = checkpoints.adapters().filter_map(fitting).collect();
        Self { engine, adapters }
    }

    fn answer(&self, asked: &Asked, num_tokens: usize) -> Output {
        let request = GenerateRequest {
            pieces: asked.pieces.clone(),
            adapters: asked.adapters.iter().map(|update| self.applied(update)).collect(),
            ..request(asked.prompt(), Task::Generate(Box::new(greedy(num_tokens))))
        };
        let output = collect(self.engine.handle.submit(request).unwrap());
        assert_eq!(output.tokens.len(), num_tokens, "the plain engine ended with {:?}", output.reason);
        output
    }

    fn applied(&self, update: &Update) -> AppliedAdapter {
        let (_, adapter) = self.adapters.iter().find(|(tags, _)| *tags == update.tags).unwrap();
        AppliedAdapter { adapter: adapter.clone(), scale: f32::from_bits(update.scale) }
    }
}
