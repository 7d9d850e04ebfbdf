//! The [`Backend`] trait over the kernels of this device.
//!
//! Every method checks shapes and queues one launch, or two for attention. Index arrays are on the device and cannot be
//! looked into here: who builds a step has checked them.

#![allow(unsafe_code)]

use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex};

use cudarc::driver::{CudaContext, CudaFunction};

use super::attention::{self, CHUNK_POSITIONS, Partials};
use super::compose;
use super::cublaslt::CublasLt;
use super::driver::{driver_error, open};
use super::flash_attention::{FlashAttention, flash_attention_version};
use super::graphs::Graphs;
use super::kernels::{Kernel, Kernels};
use super::launch::{Arguments, Grid};
use super::logits;
use super::lora::{self, LoraScratch};
use super::lora_loader::{CudaLora, CudaLoraLoader};
use super::lora_merge;
use super::memory::{CudaBuffer, HostAllocator};
use super::norm;
use super::stream::{CudaStream, EventPool};
use super::upload::Uploader;
use super::watch::{CopyPatience, CopyWatch};
use super::weights::{CudaMatrix, CudaRopeTable, load_vector};
use crate::backend::{
    Activation, AttentionMetadata, AttentionShape, Backend, DType, DecodeShape, GpuInfo, HeadTransform, HostTensor,
    KvLayer, KvLayout, KvOrder, LogitEdits, LoraBatch, LoraSite, Norm, RopeConfig, RotatedCopies, SamplingBatch,
    ScaledUpdate, StepBounds, Tensor, check_softcap,
};
use crate::telemetry::Degradations;
use crate::{Result, invalid, unsupported};

pub(super) type CudaTensor = Tensor<CudaBuffer>;

/// Numbers that a block of an element-wise kernel computes.
const ELEMENTS_PER_BLOCK: usize = 2048;

/// The same where numbers are f32.
const CAPPED_PER_BLOCK: usize = 1024;

/// Columns that block tables of repeated steps have at the least.
const MIN_REPEATED_BLOCKS: usize = 16;

/// One device with its kernels loaded.
pub struct CudaBackend {
    info: GpuInfo,
    dtype: DType,
    edits_logits: bool,
    graphs: Graphs,
    kernels: Kernels,
    partials: Partials,
    lora: LoraScratch,
    /// What multiplies by plain weights, unless our kernels do.
    cublaslt: Option<CublasLt>,
    /// What attends where whole contexts are among a step's new tokens, unless our kernels do.
    flash_attention: Option<FlashAttention>,
    /// Whether attention of such sequences is launched by itself, whatever computes it.
    attends_in_runs: bool,
    events: Arc<EventPool>,
    watch: Arc<CopyWatch>,
    /// Used while weights and adapters are loaded.
    uploader: Arc<Mutex<Uploader>>,
    host: HostAllocator,
    context: Arc<CudaContext>,
}

impl CudaBackend {
    /// Opens the device of this number. Activations, weights and the KV cache are `dtype`: bf16 or f16.
    pub fn new(ordinal: usize, dtype: DType) -> Result<Self> {
        if !matches!(dtype, DType::BF16 | DType::F16) {
            return Err(unsupported!("CUDA computes in bf16 or f16, not {dtype}; --device cpu computes in f32"));
        }
        let (context, info) = open(ordinal)?;
        let (events, degradations) = (EventPool::new(), Degradations::default());
        let host = HostAllocator::new(&context, &degradations);
        Ok(Self {
            graphs: Graphs::new(&context, &degradations),
            kernels: Kernels::load(&context, dtype)?,
            partials: Partials::allocate(&context)?,
            lora: LoraScratch::allocate(&context)?,
            cublaslt: None,
            flash_attention: None,
            attends_in_runs: false,
            uploader: Arc::new(Mutex::new(Uploader::new(&host, &events)?)),
            watch: Arc::new(CopyWatch::new(info.is_software())),
            info,
            dtype,
            edits_logits: true,
            events,
            host,
            context,
        })
    }

    /// The same with every step launched kernel by kernel.
    pub fn without_graphs(self) -> Self {
        self.graphs.disable();
        self
    }

    /// The same with products by weights of 16 bits from cuBLASLt, loaded from `library` or under its own name. A row's
    /// results then depend on how many rows are computed beside it, which they do nowhere else.
    ///
    /// # Errors
    /// `NotFound` or `Unsupported` when there is no such library; `Device` when it does not start.
    pub fn with_cublaslt(self, library: Option<&Path>) -> Result<Self> {
        let cublaslt = CublasLt::load(&self.context, &self.info, self.dtype, library)?;
        Ok(Self { cublaslt: Some(cublaslt), ..self })
    }

    /// The same with attention by candle-flash-attn for sequences that have several new tokens and no cached context. Their
    /// results then depend on how prompts are cut into steps, which they do nowhere else.
    ///
    /// # Errors
    /// `Unsupported` in builds without the cargo feature `flash-attn`; `Device` when the library does not start.
    pub fn with_flash_attention(self) -> Result<Self> {
        let flash_attention = FlashAttention::open(&self.info)?;
        Ok(Self { flash_attention: Some(flash_attention), attends_in_runs: true, ..self })
    }

    /// The same with sequences without cached context attended to in launches of their own, as another library would have
    /// it, and by the same kernels: for tests.
    pub fn with_attention_in_runs(self) -> Self {
        Self { attends_in_runs: true, ..self }
    }

    /// The same with one tile for all products by plain weights, one of [`Self::gemm_tiles`]: for tests.
    pub fn with_gemm_tile(mut self, name: &str) -> Self {
        self.kernels.gemm.keep(name);
        self.kernels.gemm_f32.keep(name);
        self
    }

    /// Ends of the names of the kernels that multiply by plain weights on this device.
    pub fn gemm_tiles(&self) -> Vec<&'static str> {
        self.kernels.gemm.names()
    }

    /// The same with adapters added by the kernels that every device has, where Hopper has its own beside them: for tests.
    pub fn without_lora_clusters(mut self) -> Self {
        self.kernels.lora.forget_clusters();
        self
    }

    /// The same with rows of logits that are changed or asked about brought to the host.
    pub fn without_logit_edits(self) -> Self {
        Self { edits_logits: false, ..self }
    }

    /// What sets how long copies between the host and the device may take.
    pub fn copy_patience(&self) -> CopyPatience {
        CopyWatch::patience_of(&self.watch)
    }

    /// The device.
    pub fn info(&self) -> &GpuInfo {
        &self.info
    }

    /// Kernel `name` of `kernels/{file}.cu`, for programs that launch kernels themselves.
    pub fn function(&self, file: &str, name: &str) -> Result<CudaFunction> {
        self.kernels.modules.function(file, name)
    }

    pub(super) fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    pub(super) fn host(&self) -> &HostAllocator {
        &self.host
    }

    pub(super) fn events(&self) -> &Arc<EventPool> {
        &self.events
    }

    pub(super) fn watch(&self) -> &Arc<CopyWatch> {
        &self.watch
    }

    pub(super) fn dtype(&self) -> DType {
        self.dtype
    }

    pub(super) fn kernels(&self) -> &Kernels {
        &self.kernels
    }

    pub(super) fn partials(&self) -> &Partials {
        &self.partials
    }

    pub(super) fn cublaslt(&self) -> Option<&CublasLt> {
        self.cublaslt.as_ref()
    }

    pub(super) fn flash_attention(&self) -> Option<&FlashAttention> {
        self.flash_attention.as_ref()
    }

    pub(super) fn attends_in_runs(&self) -> bool {
        self.attends_in_runs
    }

    pub(super) fn lora(&self) -> &LoraScratch {
        &self.lora
    }

    /// Makes the device the calling thread's.
    pub(super) fn bind(&self) -> Result<()> {
        self.context.bind_to_thread().map_err(driver_error("use the device"))
    }

    /// New memory with `num_rows` rows of `row_bytes`, written by `fill(row, out)`.
    pub(super) fn upload_rows(
        &self,
        num_rows: usize,
        row_bytes: usize,
        fill: impl FnMut(usize, &mut [u8]),
    ) -> Result<CudaBuffer> {
        let buffer = CudaBuffer::allocate(&self.context, num_rows * row_bytes)?;
        let mut uploader = self.uploader.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        uploader.upload_rows(&buffer, num_rows, row_bytes, fill)?;
        Ok(buffer)
    }

    /// Queues one launch.
    ///
    /// # Safety
    /// As for [`Arguments::launch`].
    pub(super) unsafe fn launch(
        &self,
        stream: &CudaStream,
        kernel: &Kernel,
        blocks: (usize, usize, usize),
        threads: usize,
        arguments: Arguments<'_>,
    ) -> Result<()> {
        self.bind()?;
        let grid = Grid { blocks, threads, shared_bytes: kernel.shared_bytes };
        // SAFETY: the caller's promise.
        unsafe { arguments.launch(&kernel.name, stream, &kernel.function, grid) }
    }
}

/// Kernels read rows in vectors of eight.
pub(super) fn expect_vectors(what: &str, columns: usize) -> Result<()> {
    match columns > 0 && columns.is_multiple_of(8) {
        true => Ok(()),
        false => Err(unsupported!("{what} has {columns} columns; CUDA kernels need a multiple of 8")),
    }
}

impl Backend for CudaBackend {
    type Matrix = CudaMatrix;
    type RopeTable = CudaRopeTable;
    type LoraLoader = CudaLoraLoader;

    fn name(&self) -> String {
        let (major, minor) = self.info.compute_capability;
        let products = self.cublaslt.as_ref().map(|cublaslt| format!("-cublaslt{}", cublaslt.version()));
        let attention = self.flash_attention.as_ref().and_then(|_| flash_attention_version().ok());
        let attention = attention.map(|version| format!("-flash-attn{version}"));
        let modes = [products, attention].into_iter().flatten().collect::<String>();
        format!("cuda-sm{major}{minor}-{}{modes}", self.dtype)
    }

    fn activation_dtype(&self) -> DType {
        self.dtype
    }

    fn kv_order(&self) -> KvOrder {
        KvOrder::Rows
    }

    fn kv_dtype(&self) -> DType {
        self.dtype
    }

    fn check_kv_layout(&self, layout: &KvLayout) -> Result<()> {
        if self.flash_attention.is_some() && layout.dtype() != self.dtype {
            let (kept, own) = (layout.dtype(), self.dtype);
            return Err(unsupported!(
                "the KV cache rounds keys and values to {kept}, and --prefill-attention flash-attn would see them as {own}: \
                 leave --kv-cache-dtype auto, or --prefill-attention paged"
            ));
        }
        self.kernels.attention(layout.dtype(), layout.head_dim()).map(|_| ())
    }

    fn reserve(&self, bounds: &StepBounds<'_>) -> Result<()> {
        self.flash_attention.as_ref().map_or(Ok(()), |flash_attention| flash_attention.reserve(bounds))
    }

    fn load_matrix(&self, parts: &[HostTensor], dtype: Option<DType>) -> Result<CudaMatrix> {
        CudaMatrix::load(self, parts, dtype)
    }

    fn load_vector(&self, parts: &[HostTensor], convert: &dyn Fn(f32) -> f32) -> Result<CudaTensor> {
        load_vector(self, parts, convert)
    }

    fn load_rope(&self, config: &RopeConfig, max_positions: usize) -> Result<CudaRopeTable> {
        CudaRopeTable::load(self, config, max_positions)
    }

    fn create_lora_loader(&self) -> Result<CudaLoraLoader> {
        Ok(CudaLoraLoader::new(self.dtype))
    }

    fn repeated_shape(&self, exact: DecodeShape) -> Option<DecodeShape> {
        self.graphs.is_enabled().then(|| exact.rounded_up(MIN_REPEATED_BLOCKS, CHUNK_POSITIONS))
    }

    fn repeat_step(
        &self,
        stream: &CudaStream,
        shape: DecodeShape,
        queue: &mut dyn FnMut() -> Result<()>,
    ) -> Result<bool> {
        self.graphs.repeat(stream, shape, queue)
    }

    fn embed(
        &self,
        stream: &CudaStream,
        table: &CudaMatrix,
        ids: &CudaTensor,
        scale: f32,
        out: &CudaTensor,
    ) -> Result<()> {
        table.embed(self, stream, ids, scale, out)
    }

    fn linear(
        &self,
        stream: &CudaStream,
        x: &CudaTensor,
        weight: &CudaMatrix,
        bias: Option<&CudaTensor>,
        out: &CudaTensor,
    ) -> Result<()> {
        weight.multiply(self, stream, x, bias, out)
    }

    fn add_lora(
        &self,
        stream: &CudaStream,
        x: &CudaTensor,
        batch: &LoraBatch<'_, Self>,
        site: LoraSite,
        out: &CudaTensor,
    ) -> Result<()> {
        lora::add_lora(self, stream, x, batch, site, out)
    }

    fn merged_bytes(&self, weight: &CudaMatrix) -> Result<usize> {
        Ok(weight.plain()?.num_bytes())
    }

    fn allocate_merged(&self, weight: &CudaMatrix) -> Result<CudaMatrix> {
        weight.zeroed_like(&self.context)
    }

    fn merge_rows(
        &self,
        stream: &CudaStream,
        weight: &CudaMatrix,
        updates: &[ScaledUpdate<'_, CudaLora>],
        rows: Range<usize>,
        target: &mut CudaMatrix,
    ) -> Result<()> {
        lora_merge::merge_rows(self, stream, weight, updates, rows, target)
    }

    fn rms_norm(
        &self,
        stream: &CudaStream,
        x: &CudaTensor,
        norm: &Norm<'_, CudaBuffer>,
        out: &CudaTensor,
    ) -> Result<()> {
        norm::rms_norm(self, stream, x, norm, out)
    }

    fn add_rms_norm(
        &self,
        stream: &CudaStream,
        residual: &CudaTensor,
        delta: &CudaTensor,
        norm: &Norm<'_, CudaBuffer>,
        out: &CudaTensor,
    ) -> Result<()> {
        norm::add_rms_norm(self, stream, residual, delta, norm, out)
    }

    fn rope_and_store_kv(
        &self,
        stream: &CudaStream,
        qkv: &CudaTensor,
        heads: &HeadTransform<'_, Self>,
        kv: &KvLayer<'_, CudaBuffer>,
        metadata: &AttentionMetadata<CudaBuffer>,
    ) -> Result<()> {
        attention::rope_and_store_kv(self, stream, qkv, heads, kv, metadata)
    }

    fn attention(
        &self,
        stream: &CudaStream,
        qkv: &CudaTensor,
        shape: &AttentionShape,
        kv: &KvLayer<'_, CudaBuffer>,
        metadata: &AttentionMetadata<CudaBuffer>,
        out: &CudaTensor,
    ) -> Result<()> {
        attention::attention(self, stream, qkv, shape, kv, metadata, out)
    }

    fn rotate_gather(
        &self,
        stream: &CudaStream,
        kv: &KvLayer<'_, CudaBuffer>,
        copies: &RotatedCopies<CudaBuffer>,
        rope: &CudaRopeTable,
    ) -> Result<()> {
        compose::rotate_gather(self, stream, kv, copies, rope)
    }

    fn kv_deviation(
        &self,
        stream: &CudaStream,
        qkv: &CudaTensor,
        shape: &AttentionShape,
        kv: &KvLayer<'_, CudaBuffer>,
        slots: &CudaTensor,
        out: &CudaTensor,
    ) -> Result<()> {
        compose::kv_deviation(self, stream, qkv, shape, kv, slots, out)
    }

    fn gated_activation(
        &self,
        stream: &CudaStream,
        gate_up: &CudaTensor,
        activation: Activation,
        out: &CudaTensor,
    ) -> Result<()> {
        let (rows, features) = (gate_up.rows(), gate_up.columns() / 2);
        gate_up.expect("gate and up", rows, 2 * features, self.dtype)?;
        out.expect("gated activation", rows, features, self.dtype)?;
        expect_vectors("a gated activation", features)?;
        let kernel = match activation {
            Activation::Silu => &self.kernels.silu,
            Activation::GeluTanh => &self.kernels.gelu_tanh,
        };
        let arguments = Arguments::new().tensor(out)?.tensor(gate_up)?.int(rows)?.int(features)?;
        let blocks = ((rows * features).div_ceil(ELEMENTS_PER_BLOCK), 1, 1);
        // SAFETY: silu and gelu_tanh(out, gate_up, num_tokens, features), shapes as checked.
        unsafe { self.launch(stream, kernel, blocks, 256, arguments) }
    }

    fn softcap(&self, stream: &CudaStream, x: &CudaTensor, cap: f32) -> Result<()> {
        x.expect("numbers to be capped", x.rows(), x.columns(), DType::F32)?;
        check_softcap(cap)?;
        let len = x.rows() * x.columns();
        let arguments = Arguments::new().tensor(x)?.long(len).float(cap);
        let blocks = (len.div_ceil(CAPPED_PER_BLOCK), 1, 1);
        // SAFETY: softcap(x, len, cap), shapes as checked.
        unsafe { self.launch(stream, &self.kernels.softcap, blocks, 256, arguments) }
    }

    fn gather_rows(&self, stream: &CudaStream, x: &CudaTensor, indices: &CudaTensor, out: &CudaTensor) -> Result<()> {
        let (num_rows, columns) = (indices.columns(), x.columns());
        indices.expect("row indices", 1, num_rows, DType::I32)?;
        out.expect("gathered rows", num_rows, columns, x.dtype())?;
        let row_bytes = columns * x.dtype().block_bytes();
        if !row_bytes.is_multiple_of(16) {
            return Err(invalid!("rows of {row_bytes} bytes are gathered; CUDA kernels need a multiple of 16"));
        }
        let arguments = Arguments::new().tensor(out)?.tensor(x)?.tensor(indices)?.int(row_bytes)?;
        // SAFETY: gather_rows(out, x, indices, row_bytes), shapes as checked; indices are below the rows of x.
        unsafe { self.launch(stream, &self.kernels.gather_rows, (num_rows, 1, 1), 128, arguments) }
    }

    fn argmax(&self, stream: &CudaStream, x: &CudaTensor, out: &CudaTensor) -> Result<()> {
        logits::argmax(self, stream, x, out)
    }

    fn sample(
        &self,
        stream: &CudaStream,
        logits: &CudaTensor,
        sampling: &SamplingBatch<CudaBuffer>,
        out: &CudaTensor,
    ) -> Result<()> {
        logits::sample(self, stream, logits, sampling, out)
    }

    fn edits_logits(&self) -> bool {
        self.edits_logits
    }

    fn edit_logits(&self, stream: &CudaStream, logits: &CudaTensor, edits: &LogitEdits<CudaBuffer>) -> Result<()> {
        logits::edit(self, stream, logits, edits)
    }

    fn restore_logits(&self, stream: &CudaStream, logits: &CudaTensor, edits: &LogitEdits<CudaBuffer>) -> Result<()> {
        logits::restore(self, stream, logits, edits)
    }

    fn logprobs(
        &self,
        stream: &CudaStream,
        logits: &CudaTensor,
        tokens: &CudaTensor,
        asked: &CudaTensor,
        out: &CudaTensor,
    ) -> Result<()> {
        logits::logprobs(self, stream, logits, tokens, asked, out)
    }
}
