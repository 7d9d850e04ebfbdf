//! What is known of merged adapters: where the copy stands, what it cost, and what it carried.

use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// What the one merged copy is at, as a label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MergeStage {
    /// There is no copy.
    None,
    /// It is being written.
    Building,
    /// New requests use it.
    Merged,
    /// Requests that use it end; new ones do not.
    Retiring,
    /// Its memory is given back.
    Freeing,
}

/// Why adapters were not merged, as a label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MergeRefusal {
    /// Weights or device do not allow it.
    Unsupported,
    /// The copy is larger than what it may take.
    NoRoom,
    /// The device failed.
    Failed,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StageLabel {
    state: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FormLabel {
    form: &'static str,
}

const STAGES: [MergeStage; 5] =
    [MergeStage::None, MergeStage::Building, MergeStage::Merged, MergeStage::Retiring, MergeStage::Freeing];
const REFUSALS: [MergeRefusal; 3] = [MergeRefusal::Unsupported, MergeRefusal::NoRoom, MergeRefusal::Failed];
const FORMS: [&str; 2] = ["applied", "merged"];

/// Counters and gauges of merged adapters.
pub struct MergeMetrics {
    /// Copies that became whole.
    pub merges: Counter,
    /// Copies that were given up, whole or not.
    pub unmerges: Counter,
    /// Bytes of the copy, while there is one.
    pub merged_bytes: Gauge,
    /// Seconds spent writing copies.
    pub build_seconds: Counter<f64, AtomicU64>,
    stage: Family<StageLabel, Gauge>,
    refusals: Family<ReasonLabel, Counter>,
    tokens: Family<FormLabel, Counter>,
}

impl MergeStage {
    fn label(self) -> StageLabel {
        let state = match self {
            Self::None => "none",
            Self::Building => "building",
            Self::Merged => "merged",
            Self::Retiring => "retiring",
            Self::Freeing => "freeing",
        };
        StageLabel { state }
    }
}

impl MergeRefusal {
    fn label(self) -> ReasonLabel {
        let reason = match self {
            Self::Unsupported => "unsupported",
            Self::NoRoom => "no_room",
            Self::Failed => "failed",
        };
        ReasonLabel { reason }
    }
}

impl MergeMetrics {
    /// All at zero.
    pub(super) fn new(registry: &mut Registry) -> Self {
        let metrics = Self {
            merges: Counter::default(),
            unmerges: Counter::default(),
            merged_bytes: Gauge::default(),
            build_seconds: Counter::default(),
            stage: Family::default(),
            refusals: Family::default(),
            tokens: Family::default(),
        };
        registry.register("mneme:lora_merges", "Merged copies that became whole", metrics.merges.clone());
        registry.register("mneme:lora_unmerges", "Merged copies that were given up", metrics.unmerges.clone());
        registry.register("mneme:lora_merged_bytes", "Bytes of the merged copy", metrics.merged_bytes.clone());
        registry.register(
            "mneme:lora_merge_build_seconds",
            "Time spent writing merged copies",
            metrics.build_seconds.clone(),
        );
        registry.register("mneme:lora_merge_state", "1 for what the merged copy is at", metrics.stage.clone());
        registry.register("mneme:lora_merge_refusals", "Merges refused, by reason", metrics.refusals.clone());
        registry.register(
            "mneme:lora_tokens",
            "Tokens computed under adapters, by the form they were in",
            metrics.tokens.clone(),
        );
        // The engine thread makes no label while it runs.
        REFUSALS.iter().for_each(|refusal| drop(metrics.refusals.get_or_create(&refusal.label())));
        FORMS.iter().for_each(|form| drop(metrics.tokens.get_or_create(&FormLabel { form })));
        metrics.set_stage(MergeStage::None);
        metrics
    }

    /// Takes note of what the copy is at.
    pub fn set_stage(&self, stage: MergeStage) {
        // The new one first: who looks meanwhile finds one of them, never none.
        self.stage.get_or_create(&stage.label()).set(1);
        for other in STAGES.into_iter().filter(|other| *other != stage) {
            self.stage.get_or_create(&other.label()).set(0);
        }
    }

    /// What the copy is at.
    pub fn stage(&self) -> MergeStage {
        let is_set = |stage: &MergeStage| self.stage.get_or_create(&stage.label()).get() == 1;
        STAGES.into_iter().find(is_set).unwrap_or(MergeStage::None)
    }

    /// Counts adapters that were not merged.
    pub fn count_refusal(&self, refusal: MergeRefusal) {
        self.refusals.get_or_create(&refusal.label()).inc();
    }

    /// How often adapters were not merged for this reason.
    pub fn num_refusals(&self, refusal: MergeRefusal) -> u64 {
        self.refusals.get_or_create(&refusal.label()).get()
    }

    /// Counts tokens computed under adapters.
    pub fn count_tokens(&self, is_merged: bool, num_tokens: usize) {
        self.tokens.get_or_create(&FormLabel { form: FORMS[usize::from(is_merged)] }).inc_by(num_tokens as u64);
    }

    /// Tokens computed under merged adapters, or under applied ones.
    pub fn num_tokens(&self, is_merged: bool) -> u64 {
        self.tokens.get_or_create(&FormLabel { form: FORMS[usize::from(is_merged)] }).get()
    }
}
