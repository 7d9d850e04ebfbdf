//! When adapters are merged, and when that is taken back.
//!
//! There is one copy of the projections at a time. The composition that carries nearly all recent tokens gets it: it is
//! written between steps, a little at a time, and when it is whole new sequences of that composition use it. Sequences
//! that began before keep on adding the adapters. When the tokens come from elsewhere new sequences add them again too;
//! when the last sequence that uses the copy has ended, its memory is given back, a projection between two steps.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use super::adapters::{AppliedAdapter, CompositionKey, Loaded, merge_rule_of};
use super::credit::CreditTable;
use super::residency::Residency;
use super::runner::ModelRunner;
use super::scheduler::ScheduledSequence;
use super::sequence::Sequence;
use crate::Result;
use crate::adapters::AdapterDigest;
use crate::backend::Backend;
use crate::telemetry::{EngineMetrics, MergeRefusal, MergeStage};

/// The part of a step's time that may be spent on the copy beside it: what others notice less than other noise.
const SHARE_OF_STEP: f64 = 0.04;

/// Time that is spent on it when nothing else is to be done, before somebody is listened to.
const IDLE_SLICE: Duration = Duration::from_millis(2);

/// Numbers a second that are believed to be written before any was measured: few.
const FIRST_RATE: f64 = 20e6;

/// When adapters are merged. The default is never.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MergeConfig {
    /// Whether any are. Without, an answer never depends on what other requests the engine had.
    pub is_enabled: bool,
    /// Bytes of the copy.
    pub max_bytes: usize,
    /// A composition with this part of the recent tokens is merged.
    pub merge_share: f64,
    /// A merged composition with less is not used by new requests.
    pub unmerge_share: f64,
    /// What recent means: tokens from so many tokens ago count 1/e.
    pub window_tokens: usize,
}

impl Default for MergeConfig {
    fn default() -> Self {
        Self { is_enabled: false, max_bytes: 2 << 30, merge_share: 0.9, unmerge_share: 0.5, window_tokens: 4096 }
    }
}

/// Whether an adapter may be merged.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum MergeRule {
    /// While it carries nearly all tokens.
    #[default]
    Auto,
    /// Not at all.
    Never,
    /// As soon as it is used.
    Always,
}

/// What sequences hold that use a copy: as long as there is one, the copy is there.
pub(super) struct MergedForm {
    key: CompositionKey,
    /// To see whether anybody could still ask for it.
    adapters: Vec<Weak<Loaded>>,
}

/// How fast copies are written.
struct Pace {
    /// `None` until one was measured.
    numbers_per_s: Option<f64>,
}

impl Pace {
    fn budget(&self, time: Duration) -> usize {
        (self.numbers_per_s.unwrap_or(FIRST_RATE) * time.as_secs_f64()) as usize
    }

    fn observe(&mut self, num_numbers: usize, took: Duration) {
        let found = num_numbers as f64 / took.as_secs_f64().max(1e-7);
        self.numbers_per_s = Some(self.numbers_per_s.map_or(found, |before| 0.8 * before + 0.2 * found));
    }
}

/// Keeper of the one copy.
pub(super) struct Merger {
    config: MergeConfig,
    credits: CreditTable,
    stage: MergeStage,
    /// Of the copy that there is, whole or not.
    form: Option<Arc<MergedForm>>,
    /// What is read until the copy is whole.
    sources: Vec<AdapterDigest>,
    pace: Pace,
}

/// What one step computed.
pub(super) struct StepWork<'a> {
    pub(super) running: &'a [Box<Sequence>],
    pub(super) scheduled: &'a [ScheduledSequence],
    /// How long it took.
    pub(super) took: Duration,
    /// Where the adapters of what is running are.
    pub(super) residency: &'a Residency,
}

impl Merger {
    pub(super) fn new(config: MergeConfig) -> Self {
        Self {
            config,
            credits: CreditTable::new(config.window_tokens),
            stage: MergeStage::None,
            form: None,
            sources: Vec::new(),
            pace: Pace { numbers_per_s: None },
        }
    }

    /// The copy that a new sequence under `adapters` uses.
    pub(super) fn form_of(&self, adapters: &[AppliedAdapter]) -> Option<Arc<MergedForm>> {
        let form = self.form.as_ref().filter(|_| self.stage == MergeStage::Merged)?;
        let is_it = form.key == CompositionKey::of(adapters) && merge_rule_of(adapters) != MergeRule::Never;
        is_it.then(|| Arc::clone(form))
    }

    /// What follows a step: its tokens are credited, and the copy gets a little further.
    pub(super) fn follow_step<B: Backend>(
        &mut self,
        runner: &mut ModelRunner<B>,
        work: &StepWork<'_>,
        metrics: &EngineMetrics,
    ) -> Result<()> {
        count_tokens(work, metrics);
        if !self.config.is_enabled {
            return Ok(());
        }
        self.credit(work);
        match self.stage {
            MergeStage::None => self.consider(runner, work, metrics),
            _ => self.go_on(runner, work.took.mul_f64(SHARE_OF_STEP), metrics).map(|_| ()),
        }
    }

    /// Goes on while no step can run; whether there is more to do.
    pub(super) fn use_idle_time<B: Backend>(
        &mut self,
        runner: &mut ModelRunner<B>,
        metrics: &EngineMetrics,
    ) -> Result<bool> {
        self.go_on(runner, IDLE_SLICE, metrics)
    }

    /// Adapters that must stay on the device: those that are being merged.
    pub(super) fn sources(&self) -> &[AdapterDigest] {
        if self.stage == MergeStage::Building { &self.sources } else { &[] }
    }

    /// Gives up a copy that is not whole, because sequences need the room that its adapters have.
    pub(super) fn lose_sources(&mut self, metrics: &EngineMetrics) {
        if let Some(form) = &self.form {
            let key = form.key;
            self.refuse(key, MergeRefusal::NoRoom, metrics);
            self.give_up(metrics);
        }
    }

    fn credit(&mut self, work: &StepWork<'_>) {
        self.credits.fade(work.scheduled.iter().map(|entry| entry.num_tokens).sum());
        for entry in work.scheduled {
            let sequence = &work.running[entry.index];
            let rule = merge_rule_of(&sequence.adapters);
            let key = sequence.composition_key.filter(|_| rule != MergeRule::Never);
            self.credits.add(key, rule == MergeRule::Always, entry.num_tokens);
        }
    }

    /// Begins a copy when somebody has earned it.
    fn consider<B: Backend>(
        &mut self,
        runner: &mut ModelRunner<B>,
        work: &StepWork<'_>,
        metrics: &EngineMetrics,
    ) -> Result<()> {
        let Some(key) = self.credits.candidate(self.config.merge_share) else { return Ok(()) };
        let mut running = work.scheduled.iter().map(|entry| &work.running[entry.index]);
        // Its adapters are at hand as long as it runs.
        let Some(sequence) = running.find(|sequence| sequence.composition_key == Some(key)) else { return Ok(()) };
        match runner.plan_merge(&sequence.adapters, work.residency) {
            Ok(num_bytes) if num_bytes <= self.config.max_bytes => {
                tracing::info!(num_bytes, adapters = ?names(&sequence.adapters), "merging adapters");
                let adapters = sequence.adapters.iter().map(|applied| applied.adapter.downgrade()).collect();
                self.form = Some(Arc::new(MergedForm { key, adapters }));
                self.sources = sequence.adapters.iter().map(|applied| applied.adapter.digest()).collect();
                metrics.merges.merged_bytes.set(num_bytes as i64);
                self.enter(MergeStage::Building, metrics);
            }
            Ok(num_bytes) => {
                let max_bytes = self.config.max_bytes;
                tracing::warn!(num_bytes, max_bytes, "adapters are not merged: --max-merged-bytes has no room for it");
                runner.free_merged();
                self.refuse(key, MergeRefusal::NoRoom, metrics);
            }
            Err(error) => {
                tracing::warn!(%error, "adapters are not merged");
                self.refuse(key, MergeRefusal::Unsupported, metrics);
            }
        }
        Ok(())
    }

    fn refuse(&mut self, key: CompositionKey, why: MergeRefusal, metrics: &EngineMetrics) {
        self.credits.refuse(key);
        metrics.merges.count_refusal(why);
    }

    fn enter(&mut self, stage: MergeStage, metrics: &EngineMetrics) {
        self.stage = stage;
        metrics.merges.set_stage(stage);
        let adapters = self.form.iter().flat_map(|form| &form.adapters).filter_map(Weak::upgrade);
        adapters.for_each(|adapter| adapter.set_merged(stage == MergeStage::Merged));
    }

    /// The next thing to be done for the copy that there is; whether there is more to do at once.
    fn go_on<B: Backend>(
        &mut self,
        runner: &mut ModelRunner<B>,
        time: Duration,
        metrics: &EngineMetrics,
    ) -> Result<bool> {
        let Some(form) = self.form.clone() else { return Ok(false) };
        let num_users = Arc::strong_count(&form) - 2;
        match self.stage {
            MergeStage::None => {}
            MergeStage::Building if !self.deserves(&form) => self.give_up(metrics),
            MergeStage::Building => self.build(runner, &form, time, metrics),
            MergeStage::Merged if self.deserves(&form) => {}
            MergeStage::Merged => self.enter(MergeStage::Retiring, metrics),
            MergeStage::Retiring if self.is_wanted_again(&form) => self.enter(MergeStage::Merged, metrics),
            MergeStage::Retiring if num_users == 0 => self.give_up(metrics),
            MergeStage::Retiring => {}
            MergeStage::Freeing => {
                if !runner.free_merged() {
                    self.form = None;
                    metrics.merges.merged_bytes.set(0);
                    self.enter(MergeStage::None, metrics);
                }
            }
        }
        Ok(matches!(self.stage, MergeStage::Building | MergeStage::Freeing))
    }

    /// Whether new sequences should have this copy.
    fn deserves(&self, form: &MergedForm) -> bool {
        if form.adapters.iter().any(|adapter| adapter.strong_count() == 0) {
            // Nobody has it under a name, so nobody can ask for it.
            return false;
        }
        let rival = self.credits.candidate(self.config.merge_share).filter(|rival| *rival != form.key);
        match (self.credits.is_forced(form.key), rival.map(|rival| self.credits.is_forced(rival))) {
            (true, None | Some(false)) => true,
            (false, Some(true)) => false,
            _ => self.credits.share(form.key) >= self.config.unmerge_share,
        }
    }

    fn is_wanted_again(&self, form: &MergedForm) -> bool {
        self.deserves(form) && self.credits.candidate(self.config.merge_share) == Some(form.key)
    }

    fn give_up(&mut self, metrics: &EngineMetrics) {
        tracing::info!("adapters are not merged any more");
        if self.stage == MergeStage::Retiring {
            metrics.merges.unmerges.inc();
        }
        self.enter(MergeStage::Freeing, metrics);
    }

    fn build<B: Backend>(
        &mut self,
        runner: &mut ModelRunner<B>,
        form: &MergedForm,
        time: Duration,
        metrics: &EngineMetrics,
    ) {
        let started_at = Instant::now();
        match runner.write_merged(self.pace.budget(time)) {
            Ok((num_numbers, is_whole)) => {
                let took = started_at.elapsed();
                self.pace.observe(num_numbers, took);
                metrics.merges.build_seconds.inc_by(took.as_secs_f64());
                if is_whole {
                    metrics.merges.merges.inc();
                    self.enter(MergeStage::Merged, metrics);
                }
            }
            Err(error) => {
                tracing::warn!(%error, "the merge of adapters failed");
                self.refuse(form.key, MergeRefusal::Failed, metrics);
                self.give_up(metrics);
            }
        }
    }
}

/// Tokens computed under adapters, by form.
fn count_tokens(work: &StepWork<'_>, metrics: &EngineMetrics) {
    for entry in work.scheduled {
        let sequence = &work.running[entry.index];
        if !sequence.adapters.is_empty() {
            metrics.merges.count_tokens(sequence.is_merged(), entry.num_tokens);
        }
    }
}

fn names(adapters: &[AppliedAdapter]) -> Vec<String> {
    adapters.iter().map(|applied| format!("{:?} x {}", applied.adapter.digest(), applied.scale)).collect()
}
