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
/// Of the other families.
const OTHERS: [(u64, Family); 5] =
    [(2, Family::Llama3), (10, Family::Qwen2), (4, Family::Qwen3), (10, Family::Gemma2), (6, Family::ShortGemma3)];

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
    assert!(live(&OTHERS).num_finished > 0);
}
