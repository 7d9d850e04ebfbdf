//! What became of cubes whose lost KV was to be computed in the background.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

/// How a try ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PrefillOutcome {
    /// All of the cube's KV is on disk again.
    Done,
    /// It could not be computed or kept.
    Failed,
    /// There was no room for it.
    Deferred,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    outcome: &'static str,
}

/// Counts tries.
pub struct PrefillMetrics(Family<OutcomeLabel, Counter>);

impl PrefillOutcome {
    const ALL: [Self; 3] = [Self::Done, Self::Failed, Self::Deferred];

    fn label(self) -> OutcomeLabel {
        let outcome = match self {
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Deferred => "deferred",
        };
        OutcomeLabel { outcome }
    }
}

impl PrefillMetrics {
    /// All at zero.
    pub(super) fn new(registry: &mut Registry) -> Self {
        let tries = Family::default();
        registry.register("mneme:cube_prefills", "Cubes whose lost KV was to be computed, by outcome", tries.clone());
        let metrics = Self(tries);
        PrefillOutcome::ALL.iter().for_each(|outcome| drop(metrics.0.get_or_create(&outcome.label())));
        metrics
    }

    /// Counts a try.
    pub fn count(&self, outcome: PrefillOutcome) {
        self.0.get_or_create(&outcome.label()).inc();
    }

    /// Tries that ended so.
    pub fn num(&self, outcome: PrefillOutcome) -> u64 {
        self.0.get_or_create(&outcome.label()).get()
    }
}
