//! The arguments every command that runs a model takes, under vLLM's names where vLLM has them.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::thread;

use clap::{Args, ValueEnum};
use mneme::backend::cpu::Isa;
#[cfg(feature = "cuda")]
use mneme::backend::cuda::CudaBackend;
use mneme::backend::{DType, KvLayout, flash_attention_version};
use mneme::engine::{DEFAULT_ADAPTER_HOST_BYTES, SchedulerLimits};
use mneme::hub::catalog;
use mneme::models::{Checkpoint, ModelConfig};
use mneme::telemetry::Degradations;

use super::device::{Chosen, DeviceArg};
use super::kv_room::KvRoom;
use super::merge_args::MergeArgs;

/// What a device has where nothing was asked for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DeviceDefaults {
    /// Tokens of a step: as many as keep it busy with products.
    step_tokens: usize,
    /// Bytes of KV blocks; `None` is most of what the weights leave.
    kv_bytes: Option<usize>,
}

impl DeviceDefaults {
    /// A GPU's memory is the engine's, a host's is not; the software GPU's is the host's.
    pub(crate) fn of(device: &Chosen) -> Self {
        const HOST_KV_BYTES: usize = 2 << 30;
        match device {
            Chosen::Cpu { .. } => Self { step_tokens: 512, kv_bytes: Some(HOST_KV_BYTES) },
            Chosen::Gpu(gpu) => Self { step_tokens: 2048, kv_bytes: gpu.is_software().then_some(HOST_KV_BYTES) },
        }
    }
}

/// What to run, and within which bounds.
#[derive(Debug, Clone, Args)]
pub(crate) struct EngineArgs {
    /// A short name, org/name, a directory with safetensors, or a .gguf file
    #[arg(value_name = "MODEL")]
    positional_model: Option<String>,
    /// The same as the positional MODEL
    #[arg(long, value_name = "MODEL", conflicts_with = "positional_model", env = "MNEME_MODEL")]
    model: Option<String>,
    /// What computes: auto, cpu, cuda, cuda:N or softgpu; auto is the first usable GPU, else the CPU
    #[arg(long, env = "MNEME_DEVICE", default_value_t = DeviceArg::Auto)]
    pub(crate) device: DeviceArg,
    /// Where weights come from: auto reads them, dummy draws them by --seed in the shapes of the model's config.json
    #[arg(long, value_enum, default_value_t = LoadFormat::Auto)]
    load_format: LoadFormat,
    /// What weights are kept as; auto keeps them as stored, quantised ones quantised, on a GPU the others bf16
    #[arg(long, value_enum, default_value_t = WeightDtype::Auto)]
    pub(crate) dtype: WeightDtype,
    /// What the KV cache is kept as; auto is bf16, on a GPU the type of its activations; fp8 (e4m3) is for GPUs
    #[arg(long, value_enum, default_value_t = KvDtype::Auto)]
    pub(crate) kv_cache_dtype: KvDtype,
    /// Longest prompt plus output in tokens [default: what the model and the KV memory allow]
    #[arg(long)]
    max_model_len: Option<usize>,
    /// Sequences that run at the same time
    #[arg(long, default_value_t = 64)]
    max_num_seqs: usize,
    /// Tokens computed in one step [default: 512 on the CPU, 2048 on a GPU]
    #[arg(long)]
    max_num_batched_tokens: Option<usize>,
    /// Requests that wait before further ones are refused with 503
    #[arg(long, default_value_t = 1024)]
    max_num_queued_reqs: usize,
    /// Memory for KV blocks, and adapters in use, in bytes, with an optional suffix K, M or G [default: 2G, on a GPU nine
    /// tenths of what the weights leave]
    #[arg(long, value_parser = parse_bytes)]
    kv_cache_memory_bytes: Option<usize>,
    /// Tokens per KV block
    #[arg(long, default_value_t = 16)]
    pub(crate) block_size: usize,
    /// Do not share KV blocks between requests with the same beginning
    #[arg(long)]
    no_enable_prefix_caching: bool,
    /// Threads that compute [default: one per physical core]
    #[arg(long, short = 't')]
    threads: Option<NonZeroUsize>,
    /// Instruction set of the kernels: portable, avx2, avx512, avx512-bf16 or amx [default: the best one here]
    #[arg(long, env = "MNEME_ISA")]
    isa: Option<Isa>,
    /// What multiplies by weights of 16 bits on a GPU: exact, whose answers do not depend on other requests, or cublaslt,
    /// NVIDIA's library, whose do
    #[arg(long, value_enum, default_value_t = Gemm::Exact, env = "MNEME_GEMM")]
    gemm: Gemm,
    /// The file of cuBLASLt [default: libcublasLt.so.13 or .12 where the system's loader finds it]
    #[arg(long, value_name = "FILE", env = "MNEME_CUBLASLT_LIBRARY")]
    cublaslt_library: Option<PathBuf>,
    /// What computes the attention of prompts, or beginnings of prompts, that are new as a whole in a step on a GPU: paged,
    /// our kernel, or flash-attn, candle-flash-attn in a program built with it, where answers depend on how prompts are cut
    #[arg(long, value_enum, default_value_t = PrefillAttention::Paged, env = "MNEME_PREFILL_ATTENTION")]
    prefill_attention: PrefillAttention,
    /// Launch every kernel of every step, rather than replaying decode steps as CUDA graphs
    #[arg(long)]
    enforce_eager: bool,
    /// Seeds requests that bring no seed, and dummy weights
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// Host memory for adapters that wait for their use, in bytes, with an optional suffix K, M or G; others are read
    /// from their files when they are needed
    #[arg(long, value_parser = parse_bytes, default_value_t = DEFAULT_ADAPTER_HOST_BYTES)]
    pub(crate) max_lora_bytes: usize,
    #[command(flatten)]
    pub(crate) merge: MergeArgs,
    /// KV blocks, where a command counts them itself.
    #[arg(skip)]
    num_kv_blocks: Option<usize>,
}

/// Where weights come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum LoadFormat {
    Auto,
    Dummy,
}

/// What multiplies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Gemm {
    Exact,
    Cublaslt,
}

/// What attends to sequences without cached context.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum PrefillAttention {
    Paged,
    FlashAttn,
}

/// What matrices are kept as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum WeightDtype {
    Auto,
    #[value(alias = "bfloat16")]
    Bf16,
    #[value(alias = "float16", alias = "half")]
    F16,
    #[value(alias = "float32", alias = "float")]
    F32,
}

/// What keys and values are kept as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum KvDtype {
    Auto,
    #[value(alias = "bfloat16")]
    Bf16,
    #[value(alias = "float16", alias = "half")]
    F16,
    #[value(alias = "float32")]
    F32,
    #[value(alias = "fp8_e4m3")]
    Fp8,
}

impl WeightDtype {
    /// `None` keeps them as stored.
    pub(crate) fn target(self) -> Option<DType> {
        match self {
            WeightDtype::Auto => None,
            WeightDtype::Bf16 => Some(DType::BF16),
            WeightDtype::F16 => Some(DType::F16),
            WeightDtype::F32 => Some(DType::F32),
        }
    }

    /// What a GPU computes in.
    #[cfg(feature = "cuda")]
    pub(crate) fn on_gpu(self) -> DType {
        self.target().unwrap_or(DType::BF16)
    }
}

impl KvDtype {
    /// `None` leaves it to the device.
    pub(crate) fn dtype(self) -> Option<DType> {
        match self {
            KvDtype::Auto => None,
            KvDtype::Bf16 => Some(DType::BF16),
            KvDtype::F16 => Some(DType::F16),
            KvDtype::F32 => Some(DType::F32),
            KvDtype::Fp8 => Some(DType::F8E4M3),
        }
    }
}

impl EngineArgs {
    /// The model that was asked for, or the default one.
    pub(crate) fn model(&self) -> &str {
        self.positional_model.as_deref().or(self.model.as_deref()).unwrap_or(catalog::DEFAULT_MODEL)
    }

    /// The checkpoint at `path`, or its shapes alone.
    pub(crate) fn open_checkpoint(&self, path: &Path) -> mneme::Result<Checkpoint> {
        match self.load_format {
            LoadFormat::Auto => Checkpoint::open(path),
            LoadFormat::Dummy => Checkpoint::open_dummy(path, self.seed),
        }
    }

    /// The same with a pool of `num_blocks` KV blocks, which one sequence may fill.
    pub(crate) fn with_kv_blocks(&self, num_blocks: usize) -> Self {
        Self { num_kv_blocks: Some(num_blocks), max_model_len: Some(num_blocks * self.block_size), ..self.clone() }
    }

    /// The same bounds with a pool that fits into `room`. A number of blocks that a command counted itself stays.
    pub(crate) fn fit(
        &self,
        limits: SchedulerLimits,
        room: Option<KvRoom>,
        defaults: &DeviceDefaults,
        degradations: &Degradations,
    ) -> anyhow::Result<SchedulerLimits> {
        let is_len_given = self.max_model_len.is_some();
        match room.filter(|_| self.num_kv_blocks.is_none()) {
            Some(room) if self.kv_bytes(defaults).is_some() => room.fit(limits, is_len_given, degradations),
            Some(room) => room.fill(limits, is_len_given, degradations),
            None => Ok(limits),
        }
    }

    /// Bytes of KV blocks that were asked for, by default or not.
    fn kv_bytes(&self, defaults: &DeviceDefaults) -> Option<usize> {
        self.kv_cache_memory_bytes.or(defaults.kv_bytes)
    }

    /// Tokens that a pool within `limits` holds at the least, should the device give no more: all of them where a command
    /// counted its blocks itself.
    pub(crate) fn min_kv_tokens(&self, limits: &SchedulerLimits) -> usize {
        match self.num_kv_blocks {
            Some(num_blocks) => num_blocks * limits.block_size,
            None => self.max_model_len.unwrap_or(limits.block_size),
        }
    }

    /// Whether requests share blocks.
    pub(crate) fn prefix_caching(&self) -> bool {
        !self.no_enable_prefix_caching
    }

    /// An error where NVIDIA's products or candle's attention were asked for and cannot be: on the CPU, where no answer may
    /// depend on other requests, and in a program built without them.
    pub(crate) fn check_kernels(&self, device: &Chosen) -> anyhow::Result<()> {
        let (gemm, attention) = (self.gemm != Gemm::Exact, self.prefill_attention != PrefillAttention::Paged);
        for (asked, option, ours) in [
            (gemm, "--gemm cublaslt", "--gemm exact"),
            (attention, "--prefill-attention flash-attn", "--prefill-attention paged"),
        ] {
            if !asked {
                continue;
            }
            if let Chosen::Cpu { reason, .. } = device {
                let reason = reason.as_ref().map_or_else(String::new, |reason| format!(" ({reason})"));
                anyhow::bail!("{option} is for NVIDIA GPUs, and the CPU computes{reason}; leave {ours}");
            }
            anyhow::ensure!(
                !self.merge.is_deterministic(),
                "with {option} answers depend on other requests, which --deterministic does not allow; leave one of them"
            );
        }
        if attention {
            flash_attention_version()?;
        }
        Ok(())
    }

    /// A GPU's backend as these arguments want it.
    #[cfg(feature = "cuda")]
    pub(crate) fn open_gpu(&self, ordinal: usize) -> mneme::Result<CudaBackend> {
        let backend = CudaBackend::new(ordinal, self.dtype.on_gpu())?;
        let backend = match self.gemm {
            Gemm::Exact => backend,
            Gemm::Cublaslt => backend.with_cublaslt(self.cublaslt_library.as_deref())?,
        };
        let backend = match self.prefill_attention {
            PrefillAttention::Paged => backend,
            PrefillAttention::FlashAttn => backend.with_flash_attention()?,
        };
        Ok(if self.enforce_eager { backend.without_graphs() } else { backend })
    }

    /// Threads to compute on.
    pub(crate) fn num_threads(&self) -> usize {
        self.threads.map_or_else(num_physical_cores, NonZeroUsize::get)
    }

    /// Instruction set of the kernels.
    pub(crate) fn isa(&self) -> Isa {
        self.isa.unwrap_or_else(Isa::best)
    }

    /// The bounds of an engine for this model and its KV cache. The length is cut to what the KV memory holds unless it was
    /// asked for.
    pub(crate) fn limits(
        &self,
        config: &ModelConfig,
        layout: &KvLayout,
        defaults: &DeviceDefaults,
    ) -> anyhow::Result<SchedulerLimits> {
        let step_tokens = self.max_num_batched_tokens.unwrap_or(defaults.step_tokens);
        let asked = self.num_kv_blocks.or(self.kv_bytes(defaults).map(|bytes| bytes / layout.block_bytes()));
        // Where none was asked for, one sequence may have as many as it can use until it is known how many there are.
        let num_blocks = asked.unwrap_or(config.max_position_embeddings.div_ceil(self.block_size));
        let capacity = num_blocks * self.block_size;
        let max_model_len = self.max_model_len.unwrap_or(config.max_position_embeddings.min(capacity));
        anyhow::ensure!(
            max_model_len >= 2 && self.max_num_seqs >= 1 && step_tokens >= 1,
            "--max-model-len must be at least 2, --max-num-seqs and --max-num-batched-tokens at least 1; \
             --kv-cache-memory-bytes holds {capacity} tokens"
        );
        anyhow::ensure!(
            max_model_len <= config.max_position_embeddings,
            "--max-model-len {max_model_len} is more than the {} positions of the model",
            config.max_position_embeddings
        );
        Ok(SchedulerLimits {
            max_num_seqs: self.max_num_seqs,
            max_num_batched_tokens: step_tokens.max(self.max_num_seqs),
            max_num_waiting: self.max_num_queued_reqs,
            max_prompt_logits: 64,
            max_model_len,
            block_size: self.block_size,
            num_blocks,
            prefix_caching: self.prefix_caching(),
        })
    }
}

/// Hyper-threads share the units that the kernels keep busy.
pub(crate) fn num_physical_cores() -> usize {
    let logical = thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let siblings = std::fs::read_to_string("/sys/devices/system/cpu/cpu0/topology/thread_siblings_list");
    let per_core = siblings.map_or(1, |list| list.trim().split([',', '-']).count());
    (logical / per_core.clamp(1, 8)).max(1)
}

pub(super) fn parse_bytes(text: &str) -> Result<usize, String> {
    let (digits, shift) = match text.to_ascii_uppercase().trim_end_matches("IB").trim_end_matches('B') {
        upper if upper.ends_with('K') => (upper[..upper.len() - 1].to_owned(), 10),
        upper if upper.ends_with('M') => (upper[..upper.len() - 1].to_owned(), 20),
        upper if upper.ends_with('G') => (upper[..upper.len() - 1].to_owned(), 30),
        upper => (upper.to_owned(), 0),
    };
    let value: usize = digits.trim().parse().map_err(|_| format!("{text:?} is not a size such as 512M or 2G"))?;
    value.checked_shl(shift).filter(|bytes| bytes >> shift == value).ok_or_else(|| format!("{text:?} is too large"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_suffixes() {
        for (text, bytes) in [("17", 17), ("2k", 2048), ("3M", 3 << 20), ("2GiB", 2 << 30), ("1gb", 1 << 30)] {
            assert_eq!(parse_bytes(text), Ok(bytes));
        }
        assert!(parse_bytes("two").is_err());
        assert!(parse_bytes("99999999999999999G").is_err());
    }
}
