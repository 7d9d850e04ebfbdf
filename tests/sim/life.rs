//! One simulated life of an engine, or two with a crash or a clean end between them. A seed decides everything. What it
//! runs on is `machine.rs`'s, what is under way `running.rs`'s.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use mneme::engine::{
    Deposited, FetchDecision, FinishReason, GenerateRequest, SchedulerLimits, SharedPrefix, SubmitError, Task,
};
use mneme::telemetry::{Evictor, MergeRefusal};

use super::adapters::{Checkpoints, Composed, Names};
use super::device::{Device, Scale, Start};
use super::disk::{Disk, Kept};
use super::machine::Machine;
use super::prompts::Prompts;
use super::reached::Reached;
use super::running::{Running, Wanted, check};
use super::sharing::{Asked, Sharing};
use crate::support::engine::{Output, TestEngine, collect, greedy, metric, request};
use crate::support::random::Random;
use crate::support::tiny_model::VOCAB;

/// Whoever lives here, and all that was seen so far.
pub struct Simulation {
    random: Random,
    device: Device,
    machine: Machine,
    /// Where the disk tier lies, in lives that have one.
    disk: Option<Disk>,
    /// Whether the vault is known to be open in this life.
    is_open: bool,
    prompts: Prompts,
    names: Names,
    sharing: Sharing,
    running: Vec<Running>,
    reached: Reached,
}

impl Simulation {
    /// On the double, unless `start` says how to start an engine on another device.
    pub fn new(seed: u64, start: Option<Start>, checkpoints: &Checkpoints) -> Self {
        let mut random = Random::new(seed);
        let machine = Machine::draw(seed, &mut random);
        let prompts = Prompts::new(&mut random, machine.limits.max_model_len);
        let device = Device::new(start, machine.limits, checkpoints);
        let has_disk = !random.once_in(4);
        let disk =
            has_disk.then(|| Disk::new(seed, &mut random, &machine.limits, checkpoints.family(), device.is_double()));
        Self {
            random,
            device,
            sharing: Sharing::new(machine.limits),
            machine,
            disk,
            is_open: false,
            prompts,
            names: Names::default(),
            running: vec![],
            reached: Reached::default(),
        }
    }

    /// One life of an engine or, where there is a disk, two: the second one finds what survived of the first.
    pub fn run(mut self, checkpoints: &Checkpoints) -> Reached {
        self.live(checkpoints);
        if self.disk.is_some() {
            self.restart();
            let num_before = self.reached.num_disk_tokens;
            self.live(checkpoints);
            self.reached.num_restored_tokens += self.reached.num_disk_tokens - num_before;
            self.restart();
        }
        self.reached
    }

    /// The machine goes down and comes up, now and then with another model, which must find nothing of the one before.
    fn restart(&mut self) {
        let Some(disk) = &mut self.disk else { return };
        self.reached.num_restarts += 1;
        self.reached.num_crashes += usize::from(disk.files.is_stopped());
        self.reached.num_kept_blocks += disk.restart();
        if self.random.once_in(3) {
            disk.identity = b"another model".to_vec();
            disk.kept.clear();
            self.sharing = Sharing::new(self.machine.limits);
        }
    }

    fn live(&mut self, checkpoints: &Checkpoints) {
        let engine = self.machine.start(&self.device, self.disk.as_ref(), checkpoints, &mut self.random);
        self.names = Names::new(&mut self.random);
        (0..Names::COUNT).for_each(|name| self.load(&engine, name, checkpoints));
        self.is_open = false;
        let has_kept = self.disk.as_ref().is_some_and(|disk| !disk.kept.is_empty());
        if self.disk.is_some() && (has_kept || self.random.once_in(3)) {
            self.wait_until_open(&engine);
            self.ask_for_kept(&engine);
        }
        let Scale { num_actions: (least, most), .. } = self.device.scale();
        for _ in 0..self.random.within(least, most) {
            match self.random.below(21) {
                0..=7 => self.submit(&engine),
                8..=9 => self.submit_deposit(&engine),
                10..=12 => self.cancel(),
                13..=14 => self.listen(),
                15 if self.random.once_in(3) => self.names.harm(checkpoints, &mut self.random),
                15 if self.random.once_in(2) => self.harm_disk(),
                15 => self.import(),
                16 => {
                    let name = self.random.below(Names::COUNT);
                    self.load(&engine, name, checkpoints);
                }
                _ => self.finish_one(),
            }
        }
        while !self.running.is_empty() {
            if self.random.once_in(6) { self.cancel() } else { self.finish_one() }
        }
        let handle = engine.stop();
        assert_eq!(handle.metrics().kv_cache_usage_perc.get(), 0.0, "blocks are left");
        self.reached.num_preemptions += metric(&handle, "num_preemptions_total") as usize;
        let adapters = &handle.metrics().adapters;
        self.reached.num_disk_loads += adapters.num_loads(true) as usize;
        self.reached.num_host_loads += adapters.num_loads(false) as usize;
        self.reached.num_evicted_by_kv += adapters.num_evictions(Evictor::Kv) as usize;
        self.reached.num_evicted_by_adapters += adapters.num_evictions(Evictor::Adapter) as usize;
        self.reached.num_evicted_blocks += adapters.evicted_kv_blocks.get() as usize;
        let merges = &handle.metrics().merges;
        self.reached.num_merges += merges.merges.get() as usize;
        self.reached.num_unmerges += merges.unmerges.get() as usize;
        self.reached.num_unmergeable += merges.num_refusals(MergeRefusal::NoRoom) as usize;
    }

    /// The vault opens beside the first requests: a deposit that has to be durable is refused until then.
    fn wait_until_open(&mut self, engine: &TestEngine) {
        let asked = Asked { tokens: vec![1], num_prompt: 1, domain: "open".into(), ..Asked::default() };
        loop {
            let stream =
                engine.handle.submit(request_for(&asked, Task::Deposit { is_durable: true, kept_in: None })).unwrap();
            match collect(stream).reason {
                Some(FinishReason::Error(why)) if why.contains("not open") => {}
                _ => break,
            }
        }
        self.is_open = true;
    }

    /// Asks for something that has to be on disk, before anything happens to it.
    fn ask_for_kept(&mut self, engine: &TestEngine) {
        let Some(disk) = &self.disk else { return };
        if !disk.must_keep() || disk.kept.is_empty() || !self.machine.limits.prefix_caching {
            return;
        }
        let mut asked = disk.kept[self.random.below(disk.kept.len())].asked.clone();
        asked.tokens.truncate(asked.num_prompt);
        let mut num_wanted =
            asked.num_prompt.saturating_sub(1) / self.machine.limits.block_size * self.machine.limits.block_size;
        if asked.shared.is_none() && asked.num_prompt + 1 < self.machine.limits.max_model_len {
            // Who names it finds all of it.
            num_wanted = asked.num_prompt;
            asked.shared = Some(SharedPrefix { num_tokens: asked.num_prompt, domain: asked.domain.clone() });
            asked.tokens.extend(self.random.tokens(1, VOCAB));
            asked.num_prompt += 1;
            self.reached.num_kept_tails += usize::from(!num_wanted.is_multiple_of(self.machine.limits.block_size));
        }
        if asked.num_prompt >= self.machine.limits.max_model_len {
            return;
        }
        let output = collect(engine.handle.submit(request_for(&asked, Task::Generate(Box::new(greedy(1))))).unwrap());
        assert_eq!(output.tokens, self.device.answer(&asked, &self.machine.limits, 1));
        match output.reuse.decision {
            FetchDecision::Fetched | FetchDecision::Attached => {
                let (num_cached, num_tail) = (output.cached_tokens, self.machine.limits.block_size - 1);
                assert_eq!(num_cached, output.reuse.disk_tokens);
                // Who continues another deposit may find more than full blocks, too.
                let most = if asked.shared.is_some() { num_wanted + num_tail } else { num_wanted };
                assert!((num_wanted..=most).contains(&num_cached), "{num_cached} of {num_wanted} tokens were found");
                self.reached.num_kept_tokens += num_wanted;
            }
            // What takes longer than computing is not waited for.
            FetchDecision::Late | FetchDecision::RecomputeIsCheaper => {}
            FetchDecision::NothingBelow | FetchDecision::Lost => {
                assert_eq!(num_wanted, 0, "a durable deposit is not found: {:?}", output.reuse);
            }
        }
    }

    /// Blocks come in a file; requests continue them like those of a deposit.
    fn import(&mut self) {
        let asked = self.prompts.ask_imported(&mut self.random);
        if self.disk.as_ref().is_some_and(|disk| disk.import(&asked)) {
            self.sharing.note(&asked);
            self.sharing.note_kept(&asked);
            self.prompts.add_deposited(asked);
            self.reached.num_imports += 1;
        }
    }

    fn harm_disk(&mut self) {
        if let Some(disk) = &mut self.disk {
            disk.harm(&mut self.random);
        }
    }

    /// Gives a name another content, whatever runs.
    fn load(&mut self, engine: &TestEngine, name: usize, checkpoints: &Checkpoints) {
        self.names.load(name, &engine.handle, checkpoints, &mut self.random);
    }

    fn submit(&mut self, engine: &TestEngine) {
        let random = &mut self.random;
        let mut asked = self.prompts.ask_any(random);
        let Composed { applied: adapters, updates, num_pages, are_harmed } = self.names.compose(random);
        (asked.adapters, asked.num_pages) = (updates, num_pages);
        let most = most_under(&self.machine.limits, num_pages);
        let may_merge = self.machine.merges() && !asked.adapters.is_empty();
        let mut merged = may_merge.then(|| Asked { is_merged: true, ..asked.clone() });
        let (task, wanted) = if asked.pieces.is_empty() && random.once_in(12) {
            (Task::Embed, if asked.num_prompt <= most { Wanted::Embedding } else { Wanted::Refusal })
        } else if asked.num_prompt >= most {
            (Task::Generate(Box::new(greedy(1))), Wanted::Refusal)
        } else {
            let max_tokens = random.within(1, (most - asked.num_prompt).min(self.device.scale().max_tokens));
            for asked in std::iter::once(&mut asked).chain(&mut merged) {
                asked.tokens.extend(self.device.answer(asked, &self.machine.limits, max_tokens));
            }
            (Task::Generate(Box::new(greedy(max_tokens))), Wanted::Tokens(max_tokens))
        };
        let request = GenerateRequest { adapters, ..request_for(&asked, task) };
        self.send(engine, asked, merged, request, wanted, are_harmed);
    }

    /// Deposits are computed by the model alone.
    fn submit_deposit(&mut self, engine: &TestEngine) {
        let asked = self.prompts.ask(&mut self.random);
        let is_durable = !self.random.once_in(3);
        let must_succeed = self.is_open && self.disk.as_ref().is_some_and(Disk::must_accept);
        let kept_in = self.random.once_in(3).then(|| self.prompts.domain(&mut self.random));
        let kept = kept_as(&asked, kept_in.as_deref());
        if kept_in.is_some() {
            self.sharing.note(&kept);
        }
        self.sharing.note_kept(&kept);
        self.prompts.add_deposited(kept.clone());
        let request = request_for(&asked, Task::Deposit { is_durable, kept_in });
        let wanted = Wanted::Deposit { is_durable, must_succeed, kept: Box::new(kept) };
        self.send(engine, asked, None, request, wanted, vec![]);
    }

    fn send(
        &mut self,
        engine: &TestEngine,
        asked: Asked,
        merged: Option<Asked>,
        request: GenerateRequest,
        wanted: Wanted,
        are_harmed: Vec<Arc<AtomicBool>>,
    ) {
        std::iter::once(&asked).chain(&merged).for_each(|asked| self.sharing.note(asked));
        let priority = self.random.below(3) as i32;
        // Somebody has to be there who can zero it.
        let erase_on_free = self.disk.is_some() && self.random.once_in(8);
        self.reached.num_erased += usize::from(erase_on_free);
        match engine.handle.submit(GenerateRequest { priority, erase_on_free, ..request }) {
            Ok(stream) => {
                let output = Output::default();
                self.running.push(Running { asked, merged, wanted, are_harmed, output, stream });
            }
            Err(SubmitError::QueueFull) => self.reached.num_refused += 1,
            Err(error) => panic!("{error}"),
        }
    }

    fn pick(&mut self) -> Option<usize> {
        (!self.running.is_empty()).then(|| self.random.below(self.running.len()))
    }

    fn cancel(&mut self) {
        if let Some(at) = self.pick() {
            let running = self.running.swap_remove(at);
            check(running.asked(), &running.output, &self.sharing);
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
        let running = &self.running[at];
        check(running.asked(), &running.output, &self.sharing);
    }

    fn finish_one(&mut self) {
        let Some(at) = self.pick() else { return };
        let Running { asked, merged, wanted, are_harmed, output, stream } = self.running.swap_remove(at);
        let output = output.finish(stream);
        if let Some(FinishReason::Error(why)) = &output.reason
            && are_harmed.iter().any(|is_harmed| is_harmed.load(Ordering::SeqCst))
        {
            assert!(why.contains("adapter"), "{why}");
            self.reached.num_failed_loads += 1;
            return;
        }
        let asked = if output.reuse.is_merged { merged.expect("only adapters are merged") } else { asked };
        check(&asked, &output, &self.sharing);
        match wanted {
            Wanted::Tokens(num_tokens) => self.take_tokens(asked, &output, num_tokens),
            Wanted::Deposit { is_durable, must_succeed, kept } => {
                self.take_deposit(&asked, *kept, output, is_durable, must_succeed);
            }
            Wanted::Embedding => assert_eq!(output.reason, Some(FinishReason::Stop { token: None })),
            Wanted::Refusal => {
                let why = format!("{:?}", output.reason);
                assert!(why.contains("the adapters of this request take"), "{why}");
                self.reached.num_without_room += 1;
            }
        }
    }

    fn take_tokens(&mut self, asked: Asked, output: &Output, num_tokens: usize) {
        assert_eq!(output.reason, Some(FinishReason::Length));
        assert_eq!(output.tokens.len(), num_tokens);
        let reached = &mut self.reached;
        reached.num_finished += 1;
        reached.num_cached_tokens += output.cached_tokens;
        reached.num_host_tokens += output.reuse.host_tokens;
        reached.num_disk_tokens += output.reuse.disk_tokens;
        reached.num_attached += usize::from(output.reuse.decision == FetchDecision::Attached);
        reached.num_late += usize::from(output.reuse.decision == FetchDecision::Late);
        reached.num_lost += usize::from(output.reuse.decision == FetchDecision::Lost);
        if asked.shared.as_ref().is_some_and(|shared| shared.domain != asked.domain) {
            reached.num_shared_tokens += output.cached_tokens;
        }
        self.count_made(&asked, output);
        self.prompts.add_past(asked.tokens);
    }

    /// What adapters and pieces came to.
    fn count_made(&mut self, asked: &Asked, output: &Output) {
        let num_moved = self.sharing.num_moved(asked);
        assert_eq!(output.reuse.linked_tokens, num_moved);
        assert_eq!(output.reuse.chosen_tokens, self.sharing.num_chosen(asked));
        let reached = &mut self.reached;
        if asked.is_merged {
            reached.num_merged += 1;
            reached.num_merged_tokens += output.cached_tokens;
            reached.num_merged_links += num_moved;
        } else if !asked.adapters.is_empty() {
            reached.num_adapted += 1;
            reached.num_adapted_tokens += output.cached_tokens;
            reached.num_adapted_links += num_moved;
        }
        if !asked.pieces.is_empty() {
            reached.num_composed += 1;
            reached.num_linked_tokens += num_moved;
            reached.num_chosen_tokens += output.reuse.chosen_tokens;
            reached.num_relinked_tokens += output.cached_tokens;
        }
    }

    fn take_deposit(&mut self, asked: &Asked, kept: Asked, output: Output, is_durable: bool, must_succeed: bool) {
        let Some(deposited) = output.deposited else {
            let must_succeed = must_succeed && self.disk.as_ref().is_some_and(Disk::must_accept);
            assert!(!must_succeed, "a deposit was refused without a reason: {:?}", output.reason);
            assert!(matches!(output.reason, Some(FinishReason::Error(_))), "{:?}", output.reason);
            self.reached.num_refused_deposits += 1;
            return;
        };
        assert_eq!(output.reason, Some(FinishReason::Stop { token: None }));
        let block_size = self.machine.limits.block_size;
        assert_eq!(deposited.blocks.len(), asked.num_prompt / block_size);
        assert_eq!(deposited.tail.is_some(), !asked.num_prompt.is_multiple_of(block_size));
        assert_eq!(deposited.restored_tokens + deposited.computed_tokens, asked.num_prompt);
        assert!(deposited.restored_tokens <= self.sharing.most_cached(asked));
        self.reached.num_deposits += 1;
        self.reached.num_rekept += usize::from(kept.domain != asked.domain);
        if is_durable {
            // Now that one was accepted the vault is open.
            self.is_open = true;
            let disk = self.disk.as_mut().expect("nothing is durable without a disk");
            let deposited = Deposited { pins: None, ..deposited };
            disk.kept.push(Kept { asked: kept, deposited });
        }
    }
}

/// Tokens that a sequence has room for beside so many pages of adapters.
fn most_under(limits: &SchedulerLimits, num_pages: usize) -> usize {
    limits.max_model_len.min(limits.num_blocks.saturating_sub(num_pages) * limits.block_size)
}

/// What a deposit is found as.
fn kept_as(asked: &Asked, domain: Option<&str>) -> Asked {
    match domain {
        None => asked.clone(),
        Some(domain) => Asked { domain: domain.to_owned(), shared: None, ..asked.clone() },
    }
}

fn request_for(asked: &Asked, task: Task) -> GenerateRequest {
    GenerateRequest {
        domain: asked.domain.clone(),
        shared_prefix: asked.shared.clone(),
        pieces: asked.pieces.clone(),
        ..request(asked.prompt(), task)
    }
}
