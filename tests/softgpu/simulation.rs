//! The random lives of `tests/sim` on the software GPU, fewer and shorter: what comes out of each is what comes out of an
//! engine on which nothing else happens.

#![allow(dead_code)]

#[path = "../sim/adapters.rs"]
mod adapters;
#[path = "../sim/device.rs"]
mod device;
#[path = "../sim/disk.rs"]
mod disk;
#[path = "../sim/life.rs"]
mod life;
#[path = "../sim/machine.rs"]
mod machine;
#[path = "../sim/oracle.rs"]
mod oracle;
#[path = "../sim/prompts.rs"]
mod prompts;
#[path = "../sim/reached.rs"]
mod reached;
#[path = "../sim/running.rs"]
mod running;
#[path = "../sim/sharing.rs"]
mod sharing;

use adapters::Checkpoints;
use life::Simulation;
use reached::Reached;

use crate::support::tiny_model::Family;

/// Few that come to many places, and lives of whom.
const LIVES: [(u64, Family); 2] = [(2, Family::Llama), (10, Family::Llama)];
/// Of the other families, short ones: with restarts, cached, shared and kept tokens, adapters, and in one of them a merge.
const OTHERS: [(u64, Family); 5] =
    [(14, Family::Llama3), (12, Family::Qwen2), (4, Family::Qwen3), (9, Family::Gemma2), (14, Family::ShortGemma3)];

fn live(lives: &[(u64, Family)]) -> Reached {
    let mut total = Reached::default();
    for (seed, family) in lives {
        let checkpoints = Checkpoints::write(*family);
        total += Simulation::new(*seed, Some(crate::start_with_tiers), &checkpoints).run(&checkpoints);
    }
    eprintln!("{total:?}");
    total
}

#[test]
fn random_lives_end_as_alone() {
    live(&LIVES).check_few();
}

#[test]
fn lives_of_other_families_end_as_alone() {
    let reached = live(&OTHERS);
    assert!(reached.num_finished > 0 && reached.num_cached_tokens > 0, "{reached:?}");
    assert!(reached.num_restarts > 0 && reached.num_adapted > 0 && reached.num_merged > 0, "{reached:?}");
}
