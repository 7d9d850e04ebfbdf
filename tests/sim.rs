//! Whole-engine simulation: random requests against a double of the device that notices any block mapped, shared or
//! freed wrongly (`backend::sim`). What must come out is predicted from `sim::mix` alone.
//!
//! `MNEME_SIM_SEEDS=n` runs `n` seeds (200 otherwise); a failure names its seed.

#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use std::path::Path;
use std::sync::Arc;

use mneme::backend::sim::{SimBackend, mix, rotated};
use mneme::engine::{
    FinishReason, GenerateRequest, OutputStream, Piece, SchedulerLimits, SubmitError, Task, TierConfig,
};
use mneme::paging::faulty::{Fault, FaultyFiles};
use mneme::paging::{BlockFormat, BlockStore, OpenedVault, StoreConfig, VaultOpener};
use support::engine::{Output, Setup, TestEngine, greedy, limits, metric, request};
use support::random::Random;
use support::tiny_model::{Family, TinyModel, VOCAB};

const NUM_LAYERS: usize = 2;

/// Of a block of 32 tokens of the tiny model.
const MAX_BLOCK_BYTES: usize = 8192;

/// The double's model, sequence by sequence: every layer keeps, per position, what came in rotated to the position, and
/// hands on the fold of all of them up to there.
#[derive(Clone, Default)]
struct Oracle {
    folds: [u64; NUM_LAYERS],
    num_tokens: i64,
    /// What every layer keeps of every token.
    kept: Vec<[u64; NUM_LAYERS]>,
}

impl Oracle {
    /// Takes a token in and tells the one that follows.
    fn feed(&mut self, token: u32) -> u32 {
        let mut payload = mix(0, u64::from(token));
        let mut kept = [0; NUM_LAYERS];
        for (fold, kept) in self.folds.iter_mut().zip(&mut kept) {
            *kept = rotated(payload, self.num_tokens);
            *fold = mix(*fold, *kept);
            payload = *fold;
        }
        self.kept.push(kept);
        self.num_tokens += 1;
        (payload % VOCAB as u64) as u32
    }

    /// Takes in what was kept of a token so many positions before here.
    fn take(&mut self, kept: [u64; NUM_LAYERS], distance: i64) {
        for (fold, kept) in self.folds.iter_mut().zip(kept) {
            *fold = mix(*fold, rotated(kept, distance));
        }
        self.kept.push(kept.map(|kept| rotated(kept, distance)));
        self.num_tokens += 1;
    }

    /// The greedy continuation of a prompt with pieces: what is kept of their sources is as if they had been computed
    /// alone; all of it that lies in full blocks is moved, but for the first tokens of each piece, the prompt's last one,
    /// and pieces whose blocks have no room beside the prompt's.
    fn composed(prompt: &[u32], pieces: &[Piece], limits: &SchedulerLimits, num_tokens: usize) -> Vec<u32> {
        let size = limits.block_size;
        let mut moved = vec![None; prompt.len()];
        let mut num_blocks = prompt.len().div_ceil(size);
        for piece in pieces {
            let mut source = Self::default();
            piece.source.iter().for_each(|token| {
                source.feed(*token);
            });
            let places = (0..piece.num_tokens).map(|at| (piece.start + at, piece.source_start + at));
            let places: Vec<(usize, usize)> = places
                .skip(piece.num_recomputed)
                .filter(|(here, there)| here + 1 < prompt.len() && *there < piece.source.len() / size * size)
                .collect();
            let num_wanted = places.last().map_or(0, |(_, there)| there / size + 1);
            if num_blocks + num_wanted <= limits.num_blocks {
                num_blocks += num_wanted;
                places.iter().for_each(|(here, there)| {
                    moved[*here] = Some((source.kept[*there], *here as i64 - *there as i64));
                });
            }
        }
        let mut oracle = Self::default();
        let mut next = 0;
        for (token, moved) in prompt.iter().zip(moved) {
            match moved {
                Some((kept, distance)) => oracle.take(kept, distance),
                None => next = oracle.feed(*token),
            }
        }
        oracle.go_on(next, num_tokens)
    }

    /// The greedy continuation of `prompt`.
    fn continuation(prompt: &[u32], num_tokens: usize) -> Vec<u32> {
        let mut oracle = Self::default();
        let next = prompt.iter().fold(0, |_, token| oracle.feed(*token));
        oracle.go_on(next, num_tokens)
    }

    fn go_on(mut self, mut next: u32, num_tokens: usize) -> Vec<u32> {
        let mut output = vec![next];
        while output.len() < num_tokens {
            next = self.feed(next);
            output.push(next);
        }
        output
    }
}

/// What one run did, to know that the seeds reach the interesting places.
#[derive(Default, Debug)]
struct Reached {
    num_finished: usize,
    num_cancelled: usize,
    num_preemptions: u64,
    num_cached_tokens: usize,
    num_refused: usize,
    num_host_tokens: usize,
    num_disk_tokens: usize,
    num_restarts: usize,
    num_restored_tokens: usize,
    num_composed: usize,
    num_linked_tokens: usize,
    num_relinked_tokens: usize,
}

struct Running {
    /// What has to come out.
    wanted: Vec<u32>,
    is_composed: bool,
    output: Output,
    stream: OutputStream,
}

impl Running {
    fn check(&self, seed: u64) {
        let found = &self.output.tokens;
        assert_eq!(found[..], self.wanted[..found.len()], "seed {seed}, composed: {}", self.is_composed);
    }

    fn finish(mut self, seed: u64, reached: &mut Reached) {
        self.output = self.output.finish(self.stream);
        assert_eq!(self.output.reason, Some(FinishReason::Length), "seed {seed}");
        assert_eq!(self.output.tokens, self.wanted, "seed {seed}, composed: {}", self.is_composed);
        reached.num_composed += usize::from(self.is_composed);
        reached.num_linked_tokens += self.output.reuse.linked_tokens;
        if self.is_composed {
            reached.num_relinked_tokens += self.output.cached_tokens;
        }
        reached.num_finished += 1;
        reached.num_cached_tokens += self.output.cached_tokens;
        reached.num_host_tokens += self.output.reuse.host_tokens;
        reached.num_disk_tokens += self.output.reuse.disk_tokens;
    }
}

/// One simulated life of an engine.
struct Simulation {
    seed: u64,
    random: Random,
    limits: SchedulerLimits,
    host_bytes: usize,
    /// Where the disk tier lies, in lives that have one.
    files: Option<FaultyFiles>,
    max_store_blocks: usize,
    shared: Vec<Vec<u32>>,
    running: Vec<Running>,
    embeddings: Vec<OutputStream>,
    reached: Reached,
}

impl Simulation {
    fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let block_size = [16, 16, 32][random.below(3)];
        let max_model_len = random.within(40, 200);
        let least_blocks = max_model_len.div_ceil(block_size);
        let limits = SchedulerLimits {
            max_num_seqs: random.within(1, 10),
            max_num_batched_tokens: random.within(10, 100),
            max_num_waiting: random.within(1, 30),
            max_model_len,
            block_size,
            num_blocks: least_blocks + random.below(2 * least_blocks),
            prefix_caching: !random.once_in(4),
            ..limits()
        };
        let host_bytes = if random.once_in(2) { 0 } else { random.within(1, 3 * limits.num_blocks) * MAX_BLOCK_BYTES };
        let shared = (0..3).map(|_| random.tokens(max_model_len / 2, VOCAB)).collect();
        let files = (!random.once_in(3)).then(|| FaultyFiles::new(seed));
        let max_store_blocks = random.within(8, 4 * limits.num_blocks + 8);
        Self {
            seed,
            random,
            limits,
            host_bytes,
            files,
            max_store_blocks,
            shared,
            running: vec![],
            embeddings: vec![],
            reached: Reached::default(),
        }
    }

    /// One life of an engine or, where there is a disk, two: the second one finds what survived of the first.
    fn run(mut self, model: &Path) -> Reached {
        self.live(model);
        if let Some(files) = self.files.clone() {
            files.inject(None);
            files.restart();
            let num_before = self.reached.num_disk_tokens;
            self.live(model);
            self.reached.num_restarts += 1;
            self.reached.num_restored_tokens += self.reached.num_disk_tokens - num_before;
        }
        self.reached
    }

    fn start(&self, model: &Path) -> TestEngine {
        let setup = Setup { limits: self.limits, ..Setup::default() };
        let open_vault = self.files.clone().map(|files| self.open_vault(files));
        let tiers = TierConfig { host_bytes: self.host_bytes, num_io_threads: 2, open_vault };
        TestEngine::start_with_tiers(SimBackend::default(), model, setup, tiers)
    }

    fn open_vault(&self, files: FaultyFiles) -> VaultOpener {
        let block_size = self.limits.block_size;
        let block_bytes = MAX_BLOCK_BYTES * block_size / 32;
        let format = BlockFormat { block_bytes, block_size, layout: "sim".into() };
        let max_bytes = (self.max_store_blocks * (block_bytes + 4096)) as u64 + (64 << 10);
        let config = StoreConfig { format, max_bytes, segment_bytes: max_bytes / 4 };
        Box::new(move || {
            let (store, _) = BlockStore::open(Arc::new(files), Path::new("/vault/segments"), config)?;
            Ok(OpenedVault { identity: b"sim".to_vec(), store: Some(Arc::new(store)) })
        })
    }

    /// The disk breaks, or works again with one bit of it wrong.
    fn break_disk(&mut self) {
        let Some(files) = self.files.clone() else { return };
        let faults = [Fault::NoSpace, Fault::WriteError, Fault::SyncError, Fault::ReadError, Fault::ShortRead];
        let fault = (!self.random.once_in(3)).then(|| faults[self.random.below(faults.len())]);
        files.inject(fault);
        let paths = files.paths();
        if fault.is_none() && !paths.is_empty() {
            let path = &paths[self.random.below(paths.len())];
            let num_bits = files.contents(path).map_or(0, |contents| 8 * contents.len());
            if num_bits > 0 {
                files.flip_bit(path, self.random.below(num_bits) as u64);
            }
        }
    }

    fn live(&mut self, model: &Path) {
        let engine = self.start(model);
        for _ in 0..self.random.within(20, 60) {
            match self.random.below(16) {
                0..=8 => self.submit(&engine),
                9..=10 => self.cancel(),
                11..=12 => self.listen(),
                13 => self.break_disk(),
                _ => self.finish_one(),
            }
        }
        while !self.running.is_empty() {
            if self.random.once_in(6) { self.cancel() } else { self.finish_one() }
        }
        self.embeddings.drain(..).for_each(|stream| drop(Output::default().finish(stream)));
        let handle = engine.stop();
        assert_eq!(handle.metrics().kv_cache_usage_perc.get(), 0.0, "seed {}: blocks are left", self.seed);
        self.reached.num_preemptions += metric(&handle, "num_preemptions_total") as u64;
    }

    fn prompt(&mut self) -> Vec<u32> {
        let random = &mut self.random;
        let most = self.limits.max_model_len - 1;
        let mut prompt = match random.below(3) {
            0 => vec![],
            at => {
                let shared = &self.shared[at];
                shared[..random.within(1, shared.len())].to_vec()
            }
        };
        let num_own = if prompt.is_empty() { random.within(1, most) } else { random.below(most - prompt.len() + 1) };
        prompt.extend(random.tokens(num_own, VOCAB));
        prompt
    }

    /// A prompt of some texts that others have as well, each computed behind another head, and what is its own.
    fn composed_prompt(&mut self) -> (Vec<u32>, Vec<Piece>) {
        let random = &mut self.random;
        let most = self.limits.max_model_len - 1;
        let num_own = random.within(1, 8);
        let num_head = random.below(20);
        let mut prompt = random.tokens(num_head, VOCAB);
        let mut pieces = vec![];
        for _ in 0..random.within(1, 3) {
            let text = &self.shared[random.below(self.shared.len())];
            let num_tokens = random.within(1, text.len());
            if prompt.len() + num_tokens + num_own > most {
                break;
            }
            let source_start = random.below(3);
            let head = (0..source_start).map(|at| at as u32);
            let source: Vec<u32> = head.chain(text.iter().copied()).collect();
            let source = source[..random.within(source_start + num_tokens, source.len())].to_vec();
            let domain = ["", "a"][random.below(2)].to_owned();
            let num_recomputed = [0, 0, 4, random.below(40)][random.below(4)];
            pieces.push(Piece { start: prompt.len(), num_tokens, source, source_start, domain, num_recomputed });
            prompt.extend_from_slice(&text[..num_tokens]);
            let num_between = random.below(num_own);
            prompt.extend(random.tokens(num_between, VOCAB));
        }
        prompt.extend(random.tokens(1, VOCAB));
        (prompt, pieces)
    }

    fn submit(&mut self, engine: &TestEngine) {
        let (prompt, pieces) = if self.random.once_in(4) { self.composed_prompt() } else { (self.prompt(), vec![]) };
        let max_tokens = self.random.within(1, (self.limits.max_model_len - prompt.len()).min(60));
        let embeds = pieces.is_empty() && self.random.once_in(10);
        let task = if embeds { Task::Embed } else { Task::Generate(Box::new(greedy(max_tokens))) };
        let salts = ["", "", "a", "b"];
        let request = GenerateRequest {
            priority: self.random.below(3) as i32,
            domain: salts[self.random.below(4)].to_owned(),
            pieces: pieces.clone(),
            ..request(&prompt, task)
        };
        match engine.handle.submit(request) {
            Ok(stream) if embeds => self.embeddings.push(stream),
            Ok(stream) => {
                let is_composed = !pieces.is_empty();
                let wanted = match is_composed {
                    true => Oracle::composed(&prompt, &pieces, &self.limits, max_tokens),
                    false => Oracle::continuation(&prompt, max_tokens),
                };
                self.running.push(Running { wanted, is_composed, output: Output::default(), stream });
            }
            Err(SubmitError::QueueFull) => self.reached.num_refused += 1,
            Err(error) => panic!("seed {}: {error}", self.seed),
        }
    }

    fn pick(&mut self) -> Option<usize> {
        (!self.running.is_empty()).then(|| self.random.below(self.running.len()))
    }

    fn cancel(&mut self) {
        if let Some(at) = self.pick() {
            self.running.swap_remove(at).check(self.seed);
            self.reached.num_cancelled += 1;
        }
    }

    /// Waits for a few events of one request.
    fn listen(&mut self) {
        let Some(at) = self.pick() else { return };
        for _ in 0..self.random.within(1, 12) {
            let running = &mut self.running[at];
            match running.stream.blocking_next() {
                Some(event) => running.output.absorb(event),
                None => break,
            }
        }
        self.running[at].check(self.seed);
    }

    fn finish_one(&mut self) {
        if let Some(at) = self.pick() {
            self.running.swap_remove(at).finish(self.seed, &mut self.reached);
        }
    }
}

#[test]
fn random_lives_end_as_predicted() {
    let num_seeds = std::env::var("MNEME_SIM_SEEDS").map_or(200, |seeds| seeds.parse().unwrap());
    let model = TinyModel::new(Family::Llama, 1).write();
    let mut total = Reached::default();
    for seed in 0..num_seeds {
        eprintln!("seed {seed}");
        let reached = Simulation::new(seed).run(model.path());
        total.num_finished += reached.num_finished;
        total.num_cancelled += reached.num_cancelled;
        total.num_preemptions += reached.num_preemptions;
        total.num_cached_tokens += reached.num_cached_tokens;
        total.num_refused += reached.num_refused;
        total.num_host_tokens += reached.num_host_tokens;
        total.num_disk_tokens += reached.num_disk_tokens;
        total.num_restarts += reached.num_restarts;
        total.num_restored_tokens += reached.num_restored_tokens;
        total.num_composed += reached.num_composed;
        total.num_linked_tokens += reached.num_linked_tokens;
        total.num_relinked_tokens += reached.num_relinked_tokens;
    }
    eprintln!("{total:?}");
    if num_seeds >= 100 {
        let Reached { num_finished, num_cancelled, num_preemptions, num_cached_tokens, num_host_tokens, .. } = total;
        assert!(num_finished > 100 && num_cancelled > 100, "{total:?}");
        assert!(num_preemptions > 100 && num_cached_tokens > 1000, "{total:?}");
        assert!(num_host_tokens > 1000 && total.num_disk_tokens > 500, "{total:?}");
        assert!(total.num_restored_tokens > 100, "{total:?}");
        assert!(total.num_composed > 100 && total.num_linked_tokens > 1000, "{total:?}");
        assert!(total.num_relinked_tokens > 500, "{total:?}");
    }
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
    let model = TinyModel::new(Family::Llama, 1).write();
    let engine = TestEngine::start(SimBackend::default(), model.path(), Setup::default());
    let prompt = Random::new(1).tokens(50, VOCAB);
    let found = engine.greedy(&prompt, 8);
    assert_eq!(found, Oracle::continuation(&prompt, 8));
    let mut wrong = prompt;
    wrong[17] += 1;
    assert_ne!(found, Oracle::continuation(&wrong, 8));
}
