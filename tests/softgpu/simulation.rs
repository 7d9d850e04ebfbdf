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

/// Few that come to many places.
const SEEDS: [u64; 2] = [2, 10];

#[test]
fn random_lives_end_as_alone() {
    let checkpoints = Checkpoints::write();
    let mut total = Reached::default();
    for seed in SEEDS {
        total += Simulation::new(seed, Some(crate::start_with_tiers), &checkpoints).run(&checkpoints);
    }
    eprintln!("{total:?}");
    total.check_few();
}
