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

/// Of a life with every family: few that come to many places.
const SEEDS: [u64; crate::FAMILIES.len()] = [2, 10, 3, 4, 5, 6];

#[test]
fn random_lives_end_as_alone() {
    let mut total = Reached::default();
    for (seed, family) in SEEDS.into_iter().zip(crate::FAMILIES) {
        let checkpoints = Checkpoints::write(*family);
        total += Simulation::new(seed, Some(crate::start_with_tiers), &checkpoints).run(&checkpoints);
    }
    eprintln!("{total:?}");
    total.check_few();
}
