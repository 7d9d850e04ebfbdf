//! The simulation is worth something if it finds mistakes: each of those that can be planted, within as many seeds as are
//! run anyway.

use std::panic::{set_hook, take_hook};

use mneme::planted::{Bug, plant};

use super::adapters::Checkpoints;
use super::{NUM_SEEDS, run_seeds, take_turn};
use crate::support::tiny_model::Family;

/// Takes a planted bug out again, also when the test fails.
struct Planted;

impl Planted {
    fn new(bug: Bug) -> Self {
        plant(Some(bug));
        Self
    }
}

impl Drop for Planted {
    fn drop(&mut self) {
        plant(None);
    }
}

#[test]
fn each_planted_bug_is_found() {
    let _turn = take_turn();
    let checkpoints = Checkpoints::write(Family::Llama);
    if let Err((seed, why)) = run_seeds(0..NUM_SEEDS, &checkpoints) {
        panic!("without a planted bug seed {seed} fails: {why}");
    }
    // What is expected to panic need not fill the log.
    let hook = take_hook();
    set_hook(Box::new(|_| {}));
    let mut missed = Vec::new();
    let only = std::env::var("MNEME_SIM_BUG").ok();
    for bug in Bug::ALL.into_iter().filter(|bug| only.as_ref().is_none_or(|only| format!("{bug:?}").contains(only))) {
        let planted = Planted::new(bug);
        match run_seeds(0..NUM_SEEDS, &checkpoints) {
            Ok(_) => missed.push(bug),
            Err((seed, why)) => eprintln!("{bug:?}: seed {seed}: {}", why.lines().next().unwrap_or_default()),
        }
        drop(planted);
    }
    set_hook(hook);
    assert!(missed.is_empty(), "not found: {missed:?}");
}
