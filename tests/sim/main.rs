//! Whole-engine simulation: random requests against a double of the device that notices any block mapped, shared or
//! freed wrongly (`backend::sim`), over tiers that are slow, break and come up again after crashes. What must come out is
//! predicted by a pure function of token ids, adapters and pieces (`oracle.rs`), and what may be found by one of cache domains
//! too (`sharing.rs`). Fewer and shorter lives run on devices that compute (`device.rs`), the CPU backend here and the software
//! GPU in `tests/softgpu`, where an engine says what must come out on which nothing else happens.
//!
//! `MNEME_SIM_SEEDS=n` runs `n` seeds (500 otherwise), `MNEME_SIM_FIRST=n` begins with seed `n`; a failure names its seed.
//! With the feature `planted-bugs` mistakes are planted one by one, and each has to be found (`MNEME_SIM_BUG=part`: those
//! with that in their names).

#![allow(missing_docs, unreachable_pub, clippy::unwrap_used)]

mod adapters;
mod device;
mod disk;
mod erasing;
mod life;
mod machine;
mod oracle;
#[cfg(feature = "planted-bugs")]
mod planted;
mod prompts;
mod reached;
mod running;
mod sharing;
#[path = "../support/mod.rs"]
mod support;

use std::any::Any;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use adapters::Checkpoints;
use device::Start;
use disk::Disk;
use life::Simulation;
use mneme::backend::cpu::CpuBackend;
use mneme::backend::sim::SimBackend;
use mneme::engine::{SchedulerLimits, Task, TierConfig};
use oracle::Oracle;
use reached::Reached;
use support::engine::{Setup, TestEngine, collect, limits, request};
use support::random::Random;
use support::tiny_model::{Family, TinyModel, VOCAB};

const NUM_SEEDS: u64 = 500;

/// On the CPU backend.
const NUM_COMPUTED_SEEDS: u64 = 80;

/// More than processors: a seed mostly waits for slow copies.
const NUM_WORKERS: usize = 4;

/// A seed takes some hundred milliseconds, and where others keep the machine busy many times that; one that takes so long
/// never ends.
const MAX_WAIT: Duration = Duration::from_secs(120);

/// A planted bug is everywhere in the process: one test at a time.
static TURN: Mutex<()> = Mutex::new(());

fn take_turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Runs one seed; why it failed.
fn run_seed(seed: u64, checkpoints: &Arc<Checkpoints>) -> Result<Reached, String> {
    let (sender, receiver) = channel();
    let checkpoints = Arc::clone(checkpoints);
    let run = move || sender.send(Simulation::new(seed, None, &checkpoints).run(&checkpoints)).is_ok();
    let thread = thread::Builder::new().name(format!("seed {seed}")).spawn(run).unwrap();
    match receiver.recv_timeout(MAX_WAIT) {
        Ok(reached) => Ok(reached),
        Err(RecvTimeoutError::Timeout) => Err("it never ends".into()),
        Err(RecvTimeoutError::Disconnected) => Err(message(thread.join().unwrap_err().as_ref())),
    }
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
}

/// Runs seeds side by side up to the first that fails. What all reached, or that seed and why.
fn run_seeds(seeds: std::ops::Range<u64>, checkpoints: &Arc<Checkpoints>) -> Result<Reached, (u64, String)> {
    let next = AtomicU64::new(seeds.start);
    let total = Mutex::new(Ok(Reached::default()));
    let work = || {
        while total.lock().unwrap().is_ok() {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end {
                break;
            }
            let result = run_seed(seed, checkpoints);
            let mut total = total.lock().unwrap();
            match (&mut *total, result) {
                (Ok(total), Ok(reached)) => *total += reached,
                (Ok(_), Err(why)) => *total = Err((seed, why)),
                (Err(_), _) => {}
            }
        }
    };
    thread::scope(|scope| (0..NUM_WORKERS).for_each(|_| drop(scope.spawn(work))));
    total.into_inner().unwrap()
}

fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).map_or(otherwise, |value| value.parse().unwrap())
}

#[test]
fn random_lives_end_as_predicted() {
    let _turn = take_turn();
    let (first, num_seeds) = (number("MNEME_SIM_FIRST", 0), number("MNEME_SIM_SEEDS", NUM_SEEDS));
    let total = match run_seeds(first..first + num_seeds, &Checkpoints::write(Family::Llama)) {
        Ok(total) => total,
        Err((seed, why)) => panic!("seed {seed}: {why}"),
    };
    eprintln!("{total:?}");
    if num_seeds >= NUM_SEEDS {
        total.check();
    }
}

/// The same lives, shorter and fewer, on a device that computes.
#[test]
fn random_lives_on_the_cpu_end_as_alone() {
    let _turn = take_turn();
    let checkpoints = Family::ALL.map(Checkpoints::write);
    let start: Start = |path, setup, tiers| {
        let backend = CpuBackend::new(setup.isa, 1).unwrap();
        TestEngine::start_with_tiers(backend, path, setup, tiers)
    };
    let mut total = Reached::default();
    for (seed, checkpoints) in (0..NUM_COMPUTED_SEEDS).zip(checkpoints.iter().cycle()) {
        let reached = Simulation::new(seed, Some(start), checkpoints).run(checkpoints);
        eprintln!("seed {seed}: {reached:?}");
        total += reached;
    }
    total.check_few();
    assert!(total.num_preemptions > 0 && total.num_host_tokens > 0 && total.num_merged > 0, "{total:?}");
}

/// Whose blocks do not come in time computes them, also where the late ones take the room that it needs for that.
#[test]
fn late_blocks_in_a_full_pool_are_not_asked_for_again() {
    let _turn = take_turn();
    let model = TinyModel::new(Family::Llama, 1).write();
    let mut random = Random::new(1);
    let prompt = random.tokens(71, VOCAB);
    let limits = SchedulerLimits { num_blocks: 5, max_model_len: 80, ..limits() };
    let disk = Disk::new(1, &mut random, &limits, Family::Llama, true);
    let start = |fetch_wait| {
        let open_vault = Some(disk.opener(Duration::ZERO));
        let tiers = TierConfig { num_io_threads: 1, open_vault, fetch_wait, ..TierConfig::default() };
        let setup = Setup { limits, ..Setup::default() };
        TestEngine::start_with_tiers(SimBackend::slow(1), model.path(), setup, tiers)
    };
    let deposit = |engine: &TestEngine, prompt: &[u32]| {
        let ask = || engine.handle.submit(request(prompt, Task::Deposit { is_durable: true, kept_in: None })).unwrap();
        while collect(ask()).deposited.is_none() {}
    };
    deposit(&start(None), &prompt);
    let engine = start(Some(Duration::ZERO));
    deposit(&engine, &[1]);
    assert_eq!(engine.greedy(&prompt, 8), Oracle::continuation(&prompt, 8));
}

/// The prediction is sharp: one other token anywhere in a prompt, or one in another place, changes what follows.
#[test]
fn the_oracle_notices_a_single_wrong_token() {
    let prompt = Random::new(1).tokens(50, VOCAB);
    let wanted = Oracle::continuation(&prompt, 8);
    for at in 0..prompt.len() {
        let mut changed = prompt.clone();
        changed[at] = (changed[at] + 1) % VOCAB as u32;
        assert_ne!(Oracle::continuation(&changed, 8), wanted, "token {at} does not matter");
        let mut moved = prompt.clone();
        moved.swap(at, (at + 1) % prompt.len());
        assert!(
            moved == prompt || Oracle::continuation(&moved, 8) != wanted,
            "the place of token {at} does not matter"
        );
    }
}

/// The engine on the double does not answer for another prompt either.
#[test]
fn the_engine_differs_from_a_wrong_prediction() {
    let _turn = take_turn();
    let model = TinyModel::new(Family::Llama, 1).write();
    let engine = TestEngine::start(SimBackend::default(), model.path(), Setup::default());
    let prompt = Random::new(1).tokens(50, VOCAB);
    let found = engine.greedy(&prompt, 8);
    assert_eq!(found, Oracle::continuation(&prompt, 8));
    let mut wrong = prompt;
    wrong[17] += 1;
    assert_ne!(found, Oracle::continuation(&wrong, 8));
}
