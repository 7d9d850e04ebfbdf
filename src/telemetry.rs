//! Counters, gauges and histograms of the engine, under the names vLLM's dashboards and gateways read.
//!
//! Recording takes no allocation, so the step loop may do it. Encoding to text happens on the server's side.

mod adapters;
mod degradations;
mod merges;
mod prefills;

use std::sync::atomic::{AtomicU64, Ordering};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

pub use adapters::{AdapterMetrics, Evictor};
pub use degradations::{Degradation, Degradations};
pub use merges::{MergeMetrics, MergeRefusal, MergeStage};
pub use prefills::{PrefillMetrics, PrefillOutcome};

type F64Gauge = Gauge<f64, AtomicU64>;

const LATENCY_BUCKETS: [f64; 22] = [
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 3840.0, 7680.0,
];
const TTFT_BUCKETS: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
];
const TOKEN_TIME_BUCKETS: [f64; 19] =
    [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0];
const TOKEN_COUNT_BUCKETS: [f64; 14] = [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4];
const ITERATION_BUCKETS: [f64; 13] =
    [1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];

/// Why a request ended, as a label.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct FinishedReason {
    /// `stop`, `length`, `abort` or `error`.
    pub finished_reason: &'static str,
}

/// A tier, as a label.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Source {
    /// `device`, `host` or `disk`.
    pub source: &'static str,
}

const SOURCES: [&str; 3] = ["device", "host", "disk"];

/// What the engine counts. Times are seconds, sizes tokens.
pub struct EngineMetrics {
    registry: Registry,
    /// Sequences in the running batch.
    pub num_requests_running: Gauge,
    /// Sequences waiting for it.
    pub num_requests_waiting: Gauge,
    /// Share of KV blocks in use, 0 to 1.
    pub kv_cache_usage_perc: F64Gauge,
    /// Prompt tokens looked up in the prefix cache.
    pub prefix_cache_queries: Counter,
    /// Prompt tokens found there.
    pub prefix_cache_hits: Counter,
    /// Sequences put back to be recomputed.
    pub num_preemptions: Counter,
    /// Prompt tokens of requests that got their first token, cached ones included.
    pub prompt_tokens: Counter,
    /// Prompt tokens whose KV was not computed, by the tier it came from.
    pub cached_by_source: Family<Source, Counter>,
    /// Output tokens sampled.
    pub generation_tokens: Counter,
    /// Requests by how they ended.
    pub request_success: Family<FinishedReason, Counter>,
    /// Arrival to first token.
    pub time_to_first_token: Histogram,
    /// Between two tokens of one request.
    pub inter_token_latency: Histogram,
    /// Arrival to end.
    pub e2e_request_latency: Histogram,
    /// Arrival to first scheduling.
    pub request_queue_time: Histogram,
    /// Prompt length.
    pub request_prompt_tokens: Histogram,
    /// Output length.
    pub request_generation_tokens: Histogram,
    /// Tokens in one step.
    pub iteration_tokens: Histogram,
    /// Steps that the device had kept and repeated as a whole: CUDA graphs.
    pub repeated_steps: Counter,
    /// Tokens that the host chose, from rows of logits that were brought to it.
    pub host_sampled_tokens: Counter,
    /// Where adapters are.
    pub adapters: AdapterMetrics,
    /// Merged adapters.
    pub merges: MergeMetrics,
    /// Cubes whose lost KV was to be computed.
    pub prefills: PrefillMetrics,
    /// Steps run; not exported.
    pub num_steps: AtomicU64,
}

/// Every value of [`FinishedReason`].
const FINISHED_REASONS: [&str; 4] = ["stop", "length", "abort", "error"];

impl EngineMetrics {
    /// All at zero, labelled with the served model's name.
    pub fn new(model_name: &str, block_size: usize, num_blocks: usize) -> Self {
        let mut root = Registry::default();
        let labels = [("model_name".into(), model_name.to_owned().into()), ("engine".into(), "0".into())];
        let registry = root.sub_registry_with_labels(labels.into_iter());
        register_cache_config(registry, block_size, num_blocks);
        let metrics = Self {
            num_requests_running: register(registry, "num_requests_running", "Sequences running", Gauge::default()),
            num_requests_waiting: register(registry, "num_requests_waiting", "Sequences waiting", Gauge::default()),
            kv_cache_usage_perc: register(registry, "kv_cache_usage_perc", "Share of KV blocks used", Gauge::default()),
            prefix_cache_queries: register(
                registry,
                "prefix_cache_queries",
                "Prompt tokens looked up",
                Counter::default(),
            ),
            prefix_cache_hits: register(
                registry,
                "prefix_cache_hits",
                "Prompt tokens found in the cache",
                Counter::default(),
            ),
            num_preemptions: register(registry, "num_preemptions", "Sequences preempted", Counter::default()),
            prompt_tokens: register(
                registry,
                "prompt_tokens",
                "Prompt tokens, cached ones included",
                Counter::default(),
            ),
            cached_by_source: register(
                registry,
                "prompt_tokens_cached_by_source",
                "Prompt tokens whose KV was not computed, by tier",
                Family::default(),
            ),
            generation_tokens: register(registry, "generation_tokens", "Tokens generated", Counter::default()),
            request_success: register(registry, "request_success", "Requests ended, by reason", Family::default()),
            time_to_first_token: seconds(registry, "time_to_first_token", "Arrival to first token", &TTFT_BUCKETS),
            inter_token_latency: seconds(
                registry,
                "inter_token_latency",
                "Between two tokens of a request",
                &TOKEN_TIME_BUCKETS,
            ),
            e2e_request_latency: seconds(registry, "e2e_request_latency", "Arrival to end", &LATENCY_BUCKETS),
            request_queue_time: seconds(registry, "request_queue_time", "Arrival to first step", &LATENCY_BUCKETS),
            request_prompt_tokens: counts(registry, "request_prompt_tokens", "Prompt length", &TOKEN_COUNT_BUCKETS),
            request_generation_tokens: counts(
                registry,
                "request_generation_tokens",
                "Output length",
                &TOKEN_COUNT_BUCKETS,
            ),
            iteration_tokens: counts(registry, "iteration_tokens_total", "Tokens in one step", &ITERATION_BUCKETS),
            repeated_steps: register_own(
                registry,
                "repeated_steps",
                "Steps replayed as CUDA graphs",
                Counter::default(),
            ),
            host_sampled_tokens: register_own(
                registry,
                "host_sampled_tokens",
                "Tokens chosen on the host, where their logits were brought",
                Counter::default(),
            ),
            adapters: AdapterMetrics::new(registry),
            merges: MergeMetrics::new(registry),
            prefills: PrefillMetrics::new(registry),
            num_steps: AtomicU64::new(0),
            registry: Registry::default(),
        };
        // At zero from the start: a rate needs a first value, and the engine thread makes no label while it runs.
        for finished_reason in FINISHED_REASONS {
            drop(metrics.request_success.get_or_create(&FinishedReason { finished_reason }));
        }
        metrics.count_cached([0; SOURCES.len()]);
        Self { registry: root, ..metrics }
    }

    /// The Prometheus text exposition (OpenMetrics).
    pub fn encode(&self) -> String {
        let mut text = String::new();
        encode(&mut text, &self.registry).expect("writing to a string does not fail");
        text
    }

    /// Counts a finished request.
    pub fn count_finished(&self, finished_reason: &'static str) {
        self.request_success.get_or_create(&FinishedReason { finished_reason }).inc();
    }

    /// Counts prompt tokens whose KV came from the device, the host and the disk.
    pub fn count_cached(&self, num_tokens: [usize; 3]) {
        for (source, num_tokens) in SOURCES.into_iter().zip(num_tokens) {
            self.cached_by_source.get_or_create(&Source { source }).inc_by(num_tokens as u64);
        }
    }

    /// Counts a step that ran `num_tokens`.
    pub fn count_step(&self, num_tokens: usize) {
        self.iteration_tokens.observe(num_tokens as f64);
        self.num_steps.fetch_add(1, Ordering::Relaxed);
    }
}

fn register<M: Clone + prometheus_client::registry::Metric>(
    registry: &mut Registry,
    name: &str,
    help: &str,
    metric: M,
) -> M {
    registry.register(format!("vllm:{name}"), help, metric.clone());
    metric
}

/// One that only mneme has.
fn register_own<M: Clone + prometheus_client::registry::Metric>(
    registry: &mut Registry,
    name: &str,
    help: &str,
    metric: M,
) -> M {
    registry.register(format!("mneme:{name}"), help, metric.clone());
    metric
}

fn seconds(registry: &mut Registry, name: &str, help: &str, buckets: &[f64]) -> Histogram {
    let histogram = Histogram::new(buckets.iter().copied());
    registry.register_with_unit(format!("vllm:{name}"), help, Unit::Seconds, histogram.clone());
    histogram
}

fn counts(registry: &mut Registry, name: &str, help: &str, buckets: &[f64]) -> Histogram {
    register(registry, name, help, Histogram::new(buckets.iter().copied()))
}

fn register_cache_config(registry: &mut Registry, block_size: usize, num_blocks: usize) {
    let labels = vec![("block_size", block_size.to_string()), ("num_gpu_blocks", num_blocks.to_string())];
    registry.register("vllm:cache_config", "KV block pool", Info::new(labels));
}
