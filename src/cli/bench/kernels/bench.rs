//! A device with memory full of numbers to compute with, and the order in which its kernels are measured.

use std::sync::Arc;

use mneme::Result;
use mneme::backend::{Backend, BufferCopy, DType, HostTensor, StepBounds, StreamKind, Tensor};

use super::measure::Effort;
use super::report::Measured;
use super::shape::Dimensions;

/// The kernel that all others are compared with.
pub(super) const COPY: &str = "copy";

/// Matrix products of our kernels, in the order of [`Bench::products`], and the same of cuBLASLt.
const PRODUCTS: [&str; 5] = ["linear qkv", "linear output", "linear gate_up", "linear down", "linear lm_head"];
#[cfg(feature = "cuda")]
pub(super) const CUBLASLT_PRODUCTS: [&str; 5] =
    ["cublaslt qkv", "cublaslt output", "cublaslt gate_up", "cublaslt down", "cublaslt lm_head"];

/// Bytes that are copied; more than any cache holds.
const COPY_BYTES: usize = 256 << 20;

/// Matrices take turns until they are so many bytes.
const CACHE_BYTES: usize = 128 << 20;

/// What a kernel has to do at least.
pub(super) struct Work {
    pub(super) name: &'static str,
    pub(super) shape: String,
    /// To read and to write, once each.
    pub(super) bytes: usize,
    /// Two for each multiply-add.
    pub(super) flops: usize,
}

/// Takes what was measured.
pub(super) type Sink<'a> = &'a mut dyn FnMut(Measured);

/// A device that is measured.
pub(super) struct Bench<B: Backend> {
    pub(super) backend: B,
    pub(super) stream: B::Stream,
    pub(super) dimensions: Dimensions,
    /// Sequences of a decode step.
    pub(super) batch_size: usize,
    /// Tokens of a prefill step.
    pub(super) num_tokens: usize,
    /// What products are called.
    pub(super) product_names: [&'static str; 5],
}

/// Numbers of either sign around a quarter, in whatever type they are read: bit patterns that no type takes for
/// infinite. `index` counts bytes.
fn pattern(index: usize) -> u8 {
    match index % 2 {
        0 => ((index * 37) >> 3) as u8,
        _ => 0x34 | ((index >> 5 & 1) as u8 * 0x80),
    }
}

impl<B: Backend> Bench<B> {
    pub(super) fn new(backend: B, dimensions: Dimensions, batch_size: usize, num_tokens: usize) -> Result<Self> {
        let stream = backend.create_stream(StreamKind::Compute)?;
        Ok(Self { backend, stream, dimensions, batch_size, num_tokens, product_names: PRODUCTS })
    }

    /// Measures everything, one kernel after the other.
    pub(super) fn run(&self, context_len: usize, effort: &Effort, sink: Sink<'_>) -> Result<()> {
        self.copy(effort, sink)?;
        self.run_products(effort, sink)?;
        for num_tokens in [self.batch_size, self.num_tokens] {
            self.elementwise(num_tokens, effort, sink)?;
            self.quantised(num_tokens, effort, sink)?;
        }
        self.logits(effort, sink)?;
        self.attention(context_len, effort, sink)?;
        for num_tokens in [self.batch_size, self.num_tokens] {
            self.lora(num_tokens, effort, sink)?;
        }
        self.merge(effort, sink)
    }

    /// Measures matrix products for one token, a decode step and a prefill step.
    pub(super) fn run_products(&self, effort: &Effort, sink: Sink<'_>) -> Result<()> {
        let sizes = [1, self.batch_size, self.num_tokens];
        sizes.into_iter().try_for_each(|num_tokens| self.products(num_tokens, effort, sink))
    }

    /// Measures one kernel.
    pub(super) fn measure(
        &self,
        effort: &Effort,
        work: Work,
        launch: &dyn Fn(usize) -> Result<()>,
        sink: Sink<'_>,
    ) -> Result<()> {
        let seconds = effort.time(&self.backend, &self.stream, launch)?;
        sink(Measured { work, seconds });
        Ok(())
    }

    fn copy(&self, effort: &Effort, sink: Sink<'_>) -> Result<()> {
        let bytes = if effort.is_once() { COPY_BYTES >> 8 } else { COPY_BYTES };
        let [source, target] = [self.backend.allocate(bytes)?, self.backend.allocate(bytes)?];
        let work = Work { name: COPY, shape: format!("{} KiB", bytes >> 10), bytes: 2 * bytes, flops: 0 };
        let copy = BufferCopy { source: &source, source_offset: 0, target: &target, target_offset: 0, bytes };
        self.measure(effort, work, &|_| self.backend.copy(&self.stream, &copy), sink)
    }

    /// Bytes of a number of activations.
    pub(super) fn activation_bytes(&self) -> usize {
        self.backend.activation_dtype().block_bytes()
    }

    /// What weights are kept as.
    pub(super) fn weight_dtype(&self) -> DType {
        self.backend.kv_dtype()
    }

    /// How many matrices of so many bytes take turns.
    pub(super) fn num_turns(bytes: usize) -> usize {
        CACHE_BYTES.div_ceil(bytes).clamp(1, 8)
    }

    /// A tensor full of numbers.
    pub(super) fn tensor(&self, rows: usize, columns: usize, dtype: DType) -> Result<Tensor<B::Buffer>> {
        let bytes: Vec<u8> = (0..rows * columns * dtype.block_bytes()).map(pattern).collect();
        Ok(Tensor::new(self.upload(&bytes)?, 0, rows, columns, dtype))
    }

    pub(super) fn activations(&self, rows: usize, columns: usize) -> Result<Tensor<B::Buffer>> {
        self.tensor(rows, columns, self.backend.activation_dtype())
    }

    /// `[1, N]` i32.
    pub(super) fn indices(&self, values: &[usize]) -> Result<Tensor<B::Buffer>> {
        let words: Vec<i32> = values.iter().map(|value| *value as i32).collect();
        self.words(&words, 1, values.len(), DType::I32)
    }

    /// `[rows, columns]` of a type of four bytes.
    pub(super) fn words(&self, values: &[i32], rows: usize, columns: usize, dtype: DType) -> Result<Tensor<B::Buffer>> {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Ok(Tensor::new(self.upload(&bytes)?, 0, rows, columns, dtype))
    }

    fn upload(&self, bytes: &[u8]) -> Result<B::Buffer> {
        let mut host = self.backend.allocate_host(bytes.len())?;
        host.as_mut()[..bytes.len()].copy_from_slice(bytes);
        let buffer = self.backend.allocate(bytes.len())?;
        self.backend.upload(&self.stream, &host, &buffer, 0..bytes.len())?;
        // The host's bytes are wanted until the copy is done.
        self.backend.synchronize(&self.backend.record(&self.stream)?)?;
        Ok(buffer)
    }

    /// Numbers on the host, as a checkpoint has them.
    pub(super) fn host_tensor(rows: usize, columns: usize, dtype: DType) -> Result<HostTensor> {
        let bytes: Vec<u8> = (0..rows * columns / dtype.block_elements() * dtype.block_bytes()).map(pattern).collect();
        let range = 0..bytes.len();
        HostTensor::new("numbers", Arc::new(bytes), range, dtype, rows, columns)
    }

    /// Weights, several times.
    pub(super) fn matrices(&self, rows: usize, columns: usize) -> Result<Vec<B::Matrix>> {
        self.matrices_of(rows, columns, self.weight_dtype())
    }

    /// The same of a type.
    pub(super) fn matrices_of(&self, rows: usize, columns: usize, dtype: DType) -> Result<Vec<B::Matrix>> {
        let part = Self::host_tensor(rows, columns, dtype)?;
        let num_turns = Self::num_turns(rows * columns / dtype.block_elements() * dtype.block_bytes());
        (0..num_turns).map(|_| self.backend.load_matrix(std::slice::from_ref(&part), None)).collect()
    }

    /// Has the device take what steps of these shapes need.
    pub(super) fn reserve(&self, layout: &mneme::backend::KvLayout, max_context_len: usize) -> Result<()> {
        self.backend.reserve(&StepBounds {
            max_tokens: self.num_tokens.max(self.batch_size),
            max_sequences: self.batch_size,
            max_context_len,
            num_heads: self.dimensions.num_heads,
            layout,
        })
    }
}
