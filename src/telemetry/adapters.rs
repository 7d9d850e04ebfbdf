//! What is known of where adapters are: how many lie on the device and on the host, and what moving them costs.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::Source;

/// What takes the pages of an adapter that nobody uses, as a label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Evictor {
    /// Blocks of sequences.
    Kv,
    /// Another adapter.
    Adapter,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EvictorLabel {
    by: &'static str,
}

impl Evictor {
    fn label(self) -> EvictorLabel {
        let by = match self {
            Self::Kv => "kv",
            Self::Adapter => "adapter",
        };
        EvictorLabel { by }
    }
}

const EVICTORS: [Evictor; 2] = [Evictor::Kv, Evictor::Adapter];
const SOURCES: [&str; 2] = ["host", "disk"];

/// Counters and gauges of where adapters are.
pub struct AdapterMetrics {
    /// Adapters on the device, in use or not.
    pub resident: Gauge,
    /// Bytes of their pages.
    pub resident_bytes: Gauge,
    /// Cached KV blocks that went to make room for adapters.
    pub evicted_kv_blocks: Counter,
    /// Adapters that could not be brought to the device.
    pub load_failures: Counter,
    host: Gauge,
    host_bytes: Gauge,
    loads: Family<Source, Counter>,
    load_seconds: Counter<f64, AtomicU64>,
    evictions: Family<EvictorLabel, Counter>,
}

impl AdapterMetrics {
    /// All at zero.
    pub(super) fn new(registry: &mut Registry) -> Self {
        let metrics = Self {
            resident: Gauge::default(),
            resident_bytes: Gauge::default(),
            evicted_kv_blocks: Counter::default(),
            load_failures: Counter::default(),
            host: Gauge::default(),
            host_bytes: Gauge::default(),
            loads: Family::default(),
            load_seconds: Counter::default(),
            evictions: Family::default(),
        };
        let mut gauge = |name: &str, help: &str, gauge: &Gauge| registry.register(name, help, gauge.clone());
        gauge("mneme:lora_resident_adapters", "Adapters on the device", &metrics.resident);
        gauge("mneme:lora_resident_bytes", "Bytes of KV memory that adapters have", &metrics.resident_bytes);
        gauge("mneme:lora_host_adapters", "Adapters in host memory, ready for the device", &metrics.host);
        gauge("mneme:lora_host_bytes", "Bytes of these", &metrics.host_bytes);
        registry.register("mneme:lora_loads", "Adapters brought to the device, by source", metrics.loads.clone());
        registry.register("mneme:lora_load_seconds", "Time spent on that, beside steps", metrics.load_seconds.clone());
        registry.register(
            "mneme:lora_load_failures",
            "Adapters that could not be brought to the device",
            metrics.load_failures.clone(),
        );
        registry.register(
            "mneme:lora_evictions",
            "Adapters that left the device, by what took their place",
            metrics.evictions.clone(),
        );
        registry.register(
            "mneme:lora_evicted_kv_blocks",
            "Cached KV blocks that went to make room for adapters",
            metrics.evicted_kv_blocks.clone(),
        );
        // The engine thread makes no label while it runs.
        SOURCES.into_iter().for_each(|source| drop(metrics.loads.get_or_create(&Source { source })));
        EVICTORS.into_iter().for_each(|evictor| drop(metrics.evictions.get_or_create(&evictor.label())));
        metrics
    }

    /// Takes note of what lies in host memory.
    pub fn set_host(&self, num_adapters: usize, num_bytes: usize) {
        self.host.set(num_adapters as i64);
        self.host_bytes.set(num_bytes as i64);
    }

    /// Takes note of what lies on the device.
    pub fn set_resident(&self, num_adapters: usize, num_bytes: usize) {
        self.resident.set(num_adapters as i64);
        self.resident_bytes.set(num_bytes as i64);
    }

    /// Counts an adapter that was brought to the device, from disk or from the host.
    pub fn count_load(&self, is_from_disk: bool, took: Duration) {
        self.loads.get_or_create(&Source { source: SOURCES[usize::from(is_from_disk)] }).inc();
        self.load_seconds.inc_by(took.as_secs_f64());
    }

    /// Adapters brought to the device from disk, or from the host.
    pub fn num_loads(&self, is_from_disk: bool) -> u64 {
        self.loads.get_or_create(&Source { source: SOURCES[usize::from(is_from_disk)] }).get()
    }

    /// Counts an adapter that left the device.
    pub fn count_eviction(&self, evictor: Evictor) {
        self.evictions.get_or_create(&evictor.label()).inc();
    }

    /// How many left the device for this.
    pub fn num_evictions(&self, evictor: Evictor) -> u64 {
        self.evictions.get_or_create(&evictor.label()).get()
    }
}
