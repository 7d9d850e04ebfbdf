//! What a program goes on without: requests are answered all the same, but with less room, or later.
//!
//! Whoever goes on with less reports it here, on any thread and without a lock; the server says so.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

/// A way in which less is there than was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Degradation {
    /// A GPU that could have been expected is not used.
    Gpu,
    /// Copies go through memory that is not page-locked, or through less of it.
    PinnedMemory,
    /// The host tier is smaller.
    HostTier,
    /// The KV pool of the device is smaller.
    KvPool,
    /// Decode steps are launched kernel by kernel.
    CudaGraphs,
    /// KV blocks of lower tiers were late or lost, and computed.
    Copies,
    /// The vault could not be opened.
    Vault,
}

impl Degradation {
    /// In the order in which they are declared.
    const ALL: [Self; 7] =
        [Self::Gpu, Self::PinnedMemory, Self::HostTier, Self::KvPool, Self::CudaGraphs, Self::Copies, Self::Vault];

    /// What programs know it by.
    fn name(self) -> &'static str {
        match self {
            Self::Gpu => "gpu",
            Self::PinnedMemory => "pinned_memory",
            Self::HostTier => "host_tier",
            Self::KvPool => "kv_pool",
            Self::CudaGraphs => "cuda_graphs",
            Self::Copies => "copies",
            Self::Vault => "vault",
        }
    }
}

/// Those of one engine and its device. A clone is the same.
#[derive(Clone, Default)]
pub struct Degradations(Arc<[Report; Degradation::ALL.len()]>);

/// What there is to say of one.
#[derive(Default)]
struct Report {
    /// What was said first.
    text: OnceLock<String>,
    is_present: AtomicBool,
}

impl Degradations {
    /// Takes note of one, and logs it unless that was done before; what is said first stands.
    pub fn report(&self, degradation: Degradation, text: impl fmt::Display) {
        let report = &self.0[degradation as usize];
        report.text.get_or_init(|| {
            tracing::warn!("degraded: {}: {text}", degradation.name());
            text.to_string()
        });
        report.is_present.store(true, Ordering::Release);
    }

    /// Takes note that one is over.
    pub fn clear(&self, degradation: Degradation) {
        self.0[degradation as usize].is_present.store(false, Ordering::Release);
    }

    /// A line for each that there is: its name, and what is to be known of it.
    pub fn lines(&self) -> Vec<String> {
        let present = Degradation::ALL.into_iter().zip(self.0.iter());
        let present = present.filter(|(_, report)| report.is_present.load(Ordering::Acquire));
        let text = |report: &Report| report.text.get().cloned().unwrap_or_default();
        present.map(|(degradation, report)| format!("{}: {}", degradation.name(), text(report))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_said_once_and_as_long_as_it_is_there() {
        let degradations = Degradations::default();
        assert!(degradations.lines().is_empty());
        degradations.report(Degradation::Copies, "first");
        degradations.clone().report(Degradation::Gpu, "none");
        degradations.report(Degradation::Copies, "second");
        assert_eq!(degradations.lines(), ["gpu: none", "copies: first"]);
        degradations.clear(Degradation::Copies);
        assert_eq!(degradations.lines(), ["gpu: none"]);
    }

    #[test]
    fn all_have_a_place_of_their_own() {
        for (at, degradation) in Degradation::ALL.into_iter().enumerate() {
            assert_eq!(degradation as usize, at);
        }
    }
}
