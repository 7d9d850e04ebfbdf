//! The functions of all kernels for one element type, by what they are called with (`kernels/README.md`).

#![allow(unsafe_code)]

use cudarc::driver::sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
use cudarc::driver::{CudaContext, CudaFunction};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock};

use super::driver::driver_error;
use super::gemm_kernels::GemmKernels;
use super::lora_kernels::LoraKernels;
use super::modules::Modules;
use super::records::{GROUP_ROWS, Records};
use crate::backend::DType;
use crate::{Result, unsupported};

/// Dynamic shared memory that every function may use without being told.
const DEFAULT_SHARED_BYTES: usize = 48 << 10;

/// Head sizes that the attention kernels are compiled for.
pub(super) const HEAD_DIMS: [usize; 7] = [16, 32, 64, 80, 96, 128, 256];

/// A kernel, ready to be launched.
pub(super) struct Kernel {
    pub(super) name: String,
    pub(super) function: CudaFunction,
    /// Dynamic shared memory of a block.
    pub(super) shared_bytes: usize,
}

/// Norms of rows up to one width.
pub(super) struct NormKernels {
    pub(super) width: NormWidth,
    pub(super) rms_norm: Kernel,
    /// The same for rows of activations.
    pub(super) rms_norm_rows: Kernel,
    pub(super) add_rms_norm: Kernel,
}

/// What a norm is compiled for.
#[derive(Debug, Clone, Copy)]
pub(super) struct NormWidth {
    columns: usize,
    pub(super) threads: usize,
    /// Rows that a block has at most, one after the other.
    pub(super) max_block_rows: usize,
}

/// By columns: the first that holds a row. The order of its sum depends on the threads, so on nothing else.
const NORM_WIDTHS: [NormWidth; 3] = [
    NormWidth { columns: 4096, threads: 256, max_block_rows: 16 },
    NormWidth { columns: 8192, threads: 256, max_block_rows: 16 },
    NormWidth { columns: 32768, threads: 1024, max_block_rows: 1 },
];

/// What multiplies and looks up weights of one quantised format.
pub(super) struct QuantisedKernels {
    /// Rows as an embedding.
    pub(super) embed: Kernel,
    /// For few rows. Blocks of more warps would read x less often, from the cache, and be too few of equal length.
    decode: QuantisedTile,
    /// For more; a narrow tile, and a wide one for many outputs.
    prefill: [QuantisedTile; 2],
}

/// One tiling of the product with quantised weights.
pub(super) struct QuantisedTile {
    pub(super) kernel: Kernel,
    pub(super) tokens: usize,
    pub(super) outputs: usize,
    pub(super) threads: usize,
}

/// Blocks that are enough for a large GPU. With more, each with fewer outputs, x would be read more often.
const WANTED_BLOCKS: usize = 128;

/// Threads of a block of decode attention.
pub(super) const DECODE_THREADS: usize = 128;

/// Attention for one head size.
pub(super) struct AttentionKernels {
    pub(super) decode: Kernel,
    /// Blocks of decode attention that a multiprocessor has at a time.
    pub(super) decode_blocks: usize,
    pub(super) prefill: Kernel,
    /// Threads of a prefill block.
    pub(super) prefill_threads: usize,
}

/// What moves tokens into the KV cache and within it, for one type of its numbers.
pub(super) struct CacheKernels {
    pub(super) rope_store_kv: Kernel,
    pub(super) rotate_gather: Kernel,
    pub(super) kv_deviation: Kernel,
    name: String,
    /// For [`HEAD_DIMS`], each found when it is first used: large heads of fp8 need more shared memory than some GPUs have.
    attention: [OnceLock<AttentionKernels>; HEAD_DIMS.len()],
}

/// All that the backend launches.
pub(super) struct Kernels {
    pub(super) modules: Modules,
    pub(super) embed: Kernel,
    pub(super) lora: LoraKernels,
    pub(super) attention_combine: Kernel,
    /// Outputs in the element type of the inputs.
    pub(super) gemm: GemmKernels,
    /// Outputs in f32.
    pub(super) gemm_f32: GemmKernels,
    pub(super) silu: Kernel,
    pub(super) gelu_tanh: Kernel,
    pub(super) softcap: Kernel,
    pub(super) gather_rows: Kernel,
    pub(super) argmax: Kernel,
    pub(super) sample: Kernel,
    pub(super) edit_logits: Kernel,
    pub(super) restore_logits: Kernel,
    pub(super) logprobs: Kernel,
    dtype: DType,
    /// In order of width.
    norms: Vec<NormKernels>,
    /// For a KV cache of the activations' type, and for one of fp8 beside bf16.
    cache: CacheKernels,
    fp8_cache: Option<CacheKernels>,
    quantised: Mutex<HashMap<DType, Arc<QuantisedKernels>>>,
}

impl Kernels {
    /// Finds the functions for activations of `dtype`, but those for quantised weights, which few models have.
    pub(super) fn load(context: &Arc<CudaContext>, dtype: DType) -> Result<Self> {
        let modules = Modules::new(context);
        let plain = |file: &str, name: String| Kernel::find(&modules, file, name, 0);
        Ok(Self {
            embed: plain("embedding", format!("embed_{dtype}"))?,
            lora: LoraKernels::find(&modules, dtype)?,
            attention_combine: plain("attention", format!("attention_combine_{dtype}"))?,
            gemm: GemmKernels::find(&modules, dtype, dtype)?,
            gemm_f32: GemmKernels::find(&modules, dtype, DType::F32)?,
            silu: plain("activation", format!("silu_{dtype}"))?,
            gelu_tanh: plain("activation", format!("gelu_tanh_{dtype}"))?,
            softcap: plain("activation", "softcap".into())?,
            gather_rows: plain("rows", "gather_rows".into())?,
            argmax: plain("sampling", "argmax".into())?,
            sample: plain("sampling", "sample".into())?,
            edit_logits: plain("logits", "edit_logits".into())?,
            restore_logits: plain("logits", "restore_logits".into())?,
            logprobs: plain("logits", "logprobs".into())?,
            dtype,
            norms: NORM_WIDTHS.iter().map(|width| NormKernels::find(&modules, dtype, *width)).collect::<Result<_>>()?,
            cache: CacheKernels::find(&modules, dtype, dtype)?,
            fp8_cache: match dtype {
                DType::BF16 => Some(CacheKernels::find(&modules, dtype, DType::F8E4M3)?),
                _ => None,
            },
            quantised: Mutex::default(),
            modules,
        })
    }

    /// The norms of rows of `columns` numbers.
    pub(super) fn norm(&self, columns: usize) -> Result<&NormKernels> {
        self.norms.iter().find(|norm| columns <= norm.width.columns).ok_or_else(|| {
            let most = self.norms.last().map_or(0, |norm| norm.width.columns);
            unsupported!("a norm over {columns} columns; CUDA kernels take {most} at most")
        })
    }

    /// What a KV cache of `dtype` is used with.
    pub(super) fn cache(&self, dtype: DType) -> Result<&CacheKernels> {
        match (&self.fp8_cache, dtype) {
            (_, dtype) if dtype == self.dtype => Ok(&self.cache),
            (Some(kernels), DType::F8E4M3) => Ok(kernels),
            (None, DType::F8E4M3) => {
                Err(unsupported!("an fp8 KV cache goes with activations of bf16, not {} (--dtype)", self.dtype))
            }
            (fp8, _) => Err(unsupported!(
                "the KV cache beside activations of {0} is kept as {0}{1}, not {dtype} (--kv-cache-dtype)",
                self.dtype,
                if fp8.is_some() { " or fp8" } else { "" }
            )),
        }
    }

    /// Attention over a KV cache of `dtype` for heads of `head_dim` numbers.
    pub(super) fn attention(&self, dtype: DType, head_dim: usize) -> Result<&AttentionKernels> {
        let cache = self.cache(dtype)?;
        let at = HEAD_DIMS.iter().position(|compiled| *compiled == head_dim).ok_or_else(|| {
            unsupported!(
                "attention on CUDA is compiled for heads of {HEAD_DIMS:?} numbers, not {head_dim}; use --device cpu"
            )
        })?;
        if let Some(kernels) = cache.attention[at].get() {
            return Ok(kernels);
        }
        let kernels = AttentionKernels::find(&self.modules, &cache.name, dtype, head_dim)?;
        Ok(cache.attention[at].get_or_init(|| kernels))
    }

    /// What weights of a quantised format are used with; found when the first are loaded.
    pub(super) fn quantised(&self, format: DType) -> Result<Arc<QuantisedKernels>> {
        let mut found = self.quantised.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(kernels) = found.get(&format) {
            return Ok(Arc::clone(kernels));
        }
        let kernels = Arc::new(QuantisedKernels::find(&self.modules, self.dtype, format)?);
        found.insert(format, Arc::clone(&kernels));
        Ok(kernels)
    }
}

impl Kernel {
    pub(super) fn find(modules: &Modules, file: &str, name: String, shared_bytes: usize) -> Result<Self> {
        let function = modules.function(file, &name)?;
        if shared_bytes > DEFAULT_SHARED_BYTES {
            let action = format!("give {name} {shared_bytes} bytes of shared memory");
            function
                .set_attribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes as i32)
                .map_err(driver_error(&action))?;
        }
        Ok(Self { name, function, shared_bytes })
    }

    /// Blocks of so many threads that a multiprocessor has at a time.
    pub(super) fn blocks_at_a_time(&self, threads: usize) -> Result<usize> {
        self.function
            .occupancy_max_active_blocks_per_multiprocessor(threads as u32, self.shared_bytes, None)
            .map(|blocks| blocks as usize)
            .map_err(driver_error("ask how many blocks run at a time"))
    }
}

impl NormKernels {
    fn find(modules: &Modules, dtype: DType, width: NormWidth) -> Result<Self> {
        let find = |name: String| Kernel::find(modules, "norm", format!("{name}_h{}", width.columns), 0);
        Ok(Self {
            width,
            rms_norm: find(format!("rms_norm_{dtype}"))?,
            rms_norm_rows: find(format!("rms_norm_{dtype}_rows"))?,
            add_rms_norm: find(format!("add_rms_norm_{dtype}"))?,
        })
    }
}

impl QuantisedKernels {
    fn find(modules: &Modules, dtype: DType, format: DType) -> Result<Self> {
        let tile = |tokens, warps| QuantisedTile::find(modules, dtype, format, tokens, warps);
        Ok(Self {
            embed: Kernel::find(modules, "quantised", format!("quant_embed_{dtype}_{format}"), 0)?,
            decode: tile(16, 4)?,
            prefill: [tile(64, 4)?, tile(64, 8)?],
        })
    }

    /// The tiling for so many rows and outputs. Which one it is does not change a bit of the result.
    pub(super) fn tile(&self, num_tokens: usize, num_outputs: usize) -> &QuantisedTile {
        if num_tokens <= self.decode.tokens {
            return &self.decode;
        }
        let [narrow, wide] = &self.prefill;
        let num_blocks = num_tokens.div_ceil(wide.tokens) * num_outputs.div_ceil(wide.outputs);
        if num_blocks >= WANTED_BLOCKS { wide } else { narrow }
    }
}

impl QuantisedTile {
    /// The tile of `tokens` rows for blocks of so many warps. Tiles of the same kernel are found in order of width: the last
    /// says how much shared memory it may use.
    fn find(modules: &Modules, dtype: DType, format: DType, tokens: usize, warps: usize) -> Result<Self> {
        let (groups, x_bytes, num_units) = if tokens == 16 { (warps, 32 << 10, 4) } else { (2 * warps, 24 << 10, 2) };
        let shared_bytes = x_bytes + num_units * groups * Records::new(format).unit_bytes();
        let name = format!("quant_gemm_{dtype}_{format}_t{tokens}");
        let kernel = Kernel::find(modules, "quantised", name, shared_bytes)?;
        Ok(Self { kernel, tokens, outputs: groups * GROUP_ROWS, threads: 32 * warps })
    }
}

impl CacheKernels {
    fn find(modules: &Modules, dtype: DType, cache: DType) -> Result<Self> {
        let name = if cache == dtype { format!("{dtype}") } else { format!("{dtype}_{cache}") };
        let plain = |file: &str, name: String| Kernel::find(modules, file, name, 0);
        Ok(Self {
            rope_store_kv: plain("kv_store", format!("rope_store_kv_{name}"))?,
            rotate_gather: plain("rotate_gather", format!("rotate_gather_{cache}"))?,
            kv_deviation: plain("kv_deviation", format!("kv_deviation_{name}"))?,
            name,
            attention: Default::default(),
        })
    }
}

impl AttentionKernels {
    fn find(modules: &Modules, name: &str, cache: DType, head_dim: usize) -> Result<Self> {
        let find = |kind: &str, shared_bytes| {
            Kernel::find(modules, "attention", format!("attention_{kind}_{name}_d{head_dim}"), shared_bytes)
        };
        // Keys and values of fp8 arrive beside the tiles.
        let arriving = if cache == DType::F8E4M3 { 2 * 64 * head_dim } else { 0 };
        let decode = find("decode", (2 * 64 + 16) * head_dim * 2 + 16 * 72 * 4 + arriving)?;
        Ok(Self {
            decode_blocks: decode.blocks_at_a_time(DECODE_THREADS)?,
            decode,
            prefill: find("prefill", 3 * 64 * head_dim * 2 + arriving)?,
            prefill_threads: if head_dim == 256 { 256 } else { 128 },
        })
    }
}
