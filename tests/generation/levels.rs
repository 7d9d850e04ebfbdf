//! Whose blocks go first when the device has no free one left that holds nothing.

use mneme::engine::{GenerateRequest, SchedulerLimits, SharedPrefix, Task};
use mneme::kv::Level;

use crate::support::engine::{Setup, TestEngine, collect, greedy, limits, request};
use crate::support::random::Random;
use crate::support::tiny_model::{Family, TinyModel, VOCAB};

const NUM_CUBE_TOKENS: usize = 64;

/// An engine of 32 blocks.
struct World(TestEngine);

impl World {
    fn new() -> Self {
        let model = TinyModel::new(Family::Llama, 4).write();
        let limits = SchedulerLimits { num_blocks: 32, max_model_len: 256, ..limits() };
        Self(crate::start(model.path(), Setup { limits, ..Setup::default() }))
    }

    /// Prompts of nobody's, seven blocks each.
    fn flood(&self, seeds: std::ops::Range<u64>) {
        for seed in seeds {
            self.0.greedy(&Random::new(1000 + seed).tokens(100, VOCAB), 1);
        }
    }

    /// Asks behind a cube; how much of it was found.
    fn ask(&self, level: Level) -> usize {
        let prompt = Random::new(1).tokens(NUM_CUBE_TOKENS + 10, VOCAB);
        let shared_prefix = Some(SharedPrefix { num_tokens: NUM_CUBE_TOKENS, domain: "team".into() });
        let request = request(&prompt, Task::Generate(Box::new(greedy(1))));
        let request = GenerateRequest { domain: "ana".into(), shared_prefix, level, ..request };
        collect(self.0.handle.submit(request).unwrap()).cached_tokens
    }
}

#[test]
fn a_cube_of_high_priority_stays_when_others_need_the_room() {
    for (level, num_found) in
        [(Level::of_priority(9), NUM_CUBE_TOKENS), (Level::PINNED, NUM_CUBE_TOKENS), (Level::default(), 0)]
    {
        let world = World::new();
        assert_eq!(world.ask(level), 0);
        world.flood(0..8);
        assert_eq!(world.ask(level), num_found, "{level:?}");
    }
}

#[test]
fn a_cube_of_low_priority_goes_before_what_nobody_has_used_for_longer() {
    for (level, num_found) in [(Level::of_priority(1), 0), (Level::default(), NUM_CUBE_TOKENS)] {
        let world = World::new();
        world.flood(0..6);
        assert_eq!(world.ask(level), 0);
        world.flood(6..7);
        assert_eq!(world.ask(level), num_found, "{level:?}");
    }
}
