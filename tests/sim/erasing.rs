//! What is left in memory of that which was to be erased: nothing, wherever it was and whoever used it.

use std::time::Duration;

use mneme::backend::DType;
use mneme::backend::sim::{SimBackend, SimMemory};
use mneme::engine::{Deposited, EngineHandle, GenerateRequest, OutputStream, SharedPrefix, Task, TierConfig};

use super::disk::Disk;
use super::oracle::Oracle;
use super::take_turn;
use crate::support::engine::{Output, Setup, TestEngine, collect, greedy, limits, request};
use crate::support::random::Random;
use crate::support::tiny_model::{Family, TinyModel, VOCAB};

/// Fills two blocks and a part of a third.
const NUM_CUBE_TOKENS: usize = 40;
const NUM_FULL_TOKENS: usize = 32;

struct World {
    engine: Option<TestEngine>,
    memory: SimMemory,
    cube: Vec<u32>,
    prompt: Vec<u32>,
    erase_on_free: bool,
}

impl World {
    fn new(erase_on_free: bool) -> Self {
        let model = TinyModel::new(Family::Llama, 1).write();
        let mut random = Random::new(1);
        let setup = Setup { limits: limits(), ..Setup::default() };
        let disk = Disk::new(1, &mut random, &setup.limits, Family::Llama, true);
        let host_bytes = 128 * Family::Llama.block_bytes(DType::BF16, setup.limits.block_size);
        let tiers = TierConfig { host_bytes, open_vault: Some(disk.opener(Duration::ZERO)), ..TierConfig::default() };
        let backend = SimBackend::slow(1);
        let memory = backend.memory();
        let engine = Some(TestEngine::start_with_tiers(backend, model.path(), setup, tiers));
        let prompt = random.tokens(NUM_CUBE_TOKENS + 30, VOCAB);
        Self { engine, memory, cube: prompt[..NUM_CUBE_TOKENS].to_vec(), prompt, erase_on_free }
    }

    fn handle(&self) -> &EngineHandle {
        &self.engine.as_ref().unwrap().handle
    }

    fn deposit(&self) -> Deposited {
        let ask = || {
            let request = request(&self.cube, Task::Deposit { is_durable: true, kept_in: None });
            let request = GenerateRequest { domain: "team".into(), erase_on_free: self.erase_on_free, ..request };
            collect(self.handle().submit(request).unwrap())
        };
        // The vault opens beside the first requests.
        loop {
            if let Some(deposited) = ask().deposited {
                return deposited;
            }
        }
    }

    /// Asks behind the cube.
    fn submit(&self, num_tokens: usize) -> OutputStream {
        let shared_prefix = Some(SharedPrefix { num_tokens: NUM_CUBE_TOKENS, domain: "team".into() });
        let request = request(&self.prompt, Task::Generate(Box::new(greedy(num_tokens))));
        let erase_on_free = self.erase_on_free;
        let request = GenerateRequest { domain: "ana".into(), shared_prefix, erase_on_free, ..request };
        self.handle().submit(request).unwrap()
    }

    fn ask(&self) -> Output {
        let output = collect(self.submit(20));
        assert_eq!(output.tokens, Oracle::continuation(&self.prompt, 20));
        output
    }

    /// Whether the device still has the KV of every eighth token with that of the next one, up to token `end`.
    fn remains(&self, end: usize) -> Vec<bool> {
        let stored = Oracle::stored(&self.prompt[..end]);
        let pairs = stored.windows(2).step_by(8);
        pairs.map(|pair| self.memory.contains(&[pair[0][1], pair[1][1]].map(u64::to_le_bytes).concat())).collect()
    }

    /// The same once the engine has come to its end.
    fn remains_at_the_end(mut self, end: usize) -> Vec<bool> {
        drop(self.engine.take());
        self.remains(end)
    }
}

#[test]
fn who_uses_what_is_to_be_erased_leaves_nothing_in_memory() {
    let _turn = take_turn();
    let world = World::new(true);
    world.deposit();
    // Nothing stays on the device and nothing comes to the host, so what is found comes from disk.
    for Output { cached_tokens, reuse, .. } in [world.ask(), world.ask()] {
        assert_eq!((cached_tokens, reuse.device_tokens, reuse.host_tokens), (reuse.disk_tokens, 0, 0));
    }
    assert_eq!(world.remains_at_the_end(70), [false; 9]);
}

#[test]
fn without_the_mark_all_of_it_is_left() {
    let _turn = take_turn();
    let world = World::new(false);
    world.deposit();
    assert_eq!(world.ask().reuse.device_tokens, NUM_FULL_TOKENS);
    assert_eq!(world.remains_at_the_end(70), [true; 9]);
}

#[test]
fn erased_blocks_are_found_nowhere_and_zeroed() {
    let _turn = take_turn();
    let world = World::new(false);
    let deposited = world.deposit();
    world.handle().erase(deposited.blocks.clone());
    assert_eq!(world.remains(NUM_FULL_TOKENS), [false; 4]);
    let output = world.ask();
    assert_eq!(output.cached_tokens, 0, "{:?}", output.reuse);
    assert_eq!(world.ask().reuse.device_tokens, 64, "computed anew, they are there again");
    // In use, they are zeroed by who uses them last.
    let mut stream = world.submit(900);
    let _ = stream.blocking_next();
    world.handle().erase(deposited.blocks);
    drop(stream);
    assert_eq!(world.remains_at_the_end(NUM_FULL_TOKENS), [false; 4]);
}
