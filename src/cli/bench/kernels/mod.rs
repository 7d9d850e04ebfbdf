//! `mneme bench kernels`: every kernel of a device by itself, on the shapes of a model, against what the device's own
//! copies and its fastest matrix product reach in the same run.

mod attention;
mod bench;
mod cases;
mod logits;
mod lora;
mod measure;
mod report;
mod shape;

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::Args;
use mneme::backend::cpu::{CpuBackend, Isa};
#[cfg(feature = "cuda")]
use mneme::backend::cuda::CudaBackend;
use mneme::backend::{Backend, GpuInfo};

use self::bench::Bench;
#[cfg(feature = "cuda")]
use self::bench::CUBLASLT_PRODUCTS;
use self::measure::Effort;
use self::report::Report;
use self::shape::ShapeName;
use super::results::ResultArgs;
use crate::cli::device::{Chosen, DeviceArg};
use crate::cli::engine_args::{WeightDtype, num_physical_cores};

/// Arguments of `mneme bench kernels`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example: mneme bench kernels --device cuda --shape llama-3.1-8b --save-result kernels.json\n\n\
    Matrices are as many as a large cache does not hold, and take turns. A share is the time that the copies and the \
    fastest matrix product of the run would take for the same bytes or multiply-adds, whichever is longer, over the \
    time that it took."
)]
pub(super) struct KernelBenchArgs {
    /// What computes: auto, cpu, cuda, cuda:N or softgpu (whose times mean nothing)
    #[arg(long, env = "MNEME_DEVICE", default_value_t = DeviceArg::Auto)]
    device: DeviceArg,
    /// The model whose shapes are taken
    #[arg(long, value_enum, default_value_t = ShapeName::Llama8b)]
    shape: ShapeName,
    /// What a GPU computes in: bf16 or f16
    #[arg(long, value_enum, default_value_t = WeightDtype::Bf16)]
    dtype: WeightDtype,
    /// Sequences of a decode step
    #[arg(long, default_value = "16")]
    batch_size: NonZeroUsize,
    /// Tokens of a prefill step
    #[arg(long, default_value = "1024")]
    num_tokens: NonZeroUsize,
    /// Tokens of each sequence in the KV cache
    #[arg(long, default_value = "2048")]
    context_len: NonZeroUsize,
    /// Milliseconds that each kernel is measured for
    #[arg(long, default_value = "200")]
    duration_ms: NonZeroUsize,
    /// The file of cuBLASLt, whose products are measured as well [default: libcublasLt.so.13 or .12 where the system's
    /// loader finds it]
    #[arg(long, value_name = "FILE", env = "MNEME_CUBLASLT_LIBRARY")]
    cublaslt_library: Option<PathBuf>,
    /// Threads of the CPU [default: one per physical core]
    #[arg(long, short = 't')]
    threads: Option<NonZeroUsize>,
    /// Instruction set of the CPU's kernels [default: the best one here]
    #[arg(long, env = "MNEME_ISA")]
    isa: Option<Isa>,
    #[command(flatten)]
    result: ResultArgs,
}

impl KernelBenchArgs {
    /// The software GPU takes seconds for what a GPU does in microseconds, every time the same.
    fn effort(&self, gpu: Option<&GpuInfo>) -> Effort {
        match gpu.is_some_and(GpuInfo::is_software) {
            true => Effort::once(),
            false => Effort::lasting(self.duration_ms.get()),
        }
    }
}

/// Runs the measurement.
pub(super) fn run(args: &KernelBenchArgs) -> anyhow::Result<()> {
    let report = match args.device.choose()? {
        Chosen::Cpu { .. } => {
            let threads = args.threads.map_or_else(num_physical_cores, NonZeroUsize::get);
            measure(args, CpuBackend::new(args.isa.unwrap_or_else(Isa::best), threads)?, None)?
        }
        Chosen::Gpu(gpu) => measure_on_gpu(args, &gpu)?,
    };
    args.result.write(&report.json(), |out| Ok(report.write_table(out)?))
}

#[cfg(feature = "cuda")]
fn measure_on_gpu(args: &KernelBenchArgs, gpu: &GpuInfo) -> anyhow::Result<Report> {
    let open = || CudaBackend::new(gpu.ordinal, args.dtype.on_gpu());
    let mut report = measure(args, open()?, Some(gpu))?;
    match open()?.with_cublaslt(args.cublaslt_library.as_deref()) {
        Ok(backend) => measure_cublaslt(args, backend, gpu, &mut report)?,
        Err(error) if args.cublaslt_library.is_none() => {
            tracing::warn!(%error, "products are not compared with cuBLASLt's");
        }
        Err(error) => return Err(error.into()),
    }
    Ok(report)
}

/// Adds the library's products.
#[cfg(feature = "cuda")]
fn measure_cublaslt(
    args: &KernelBenchArgs,
    backend: CudaBackend,
    gpu: &GpuInfo,
    report: &mut Report,
) -> anyhow::Result<()> {
    let bench = Bench::new(backend, args.shape.dimensions(), args.batch_size.get(), args.num_tokens.get())?;
    let bench = Bench { product_names: CUBLASLT_PRODUCTS, ..bench };
    Ok(bench.run_products(&args.effort(Some(gpu)), &mut |result| report.push(result))?)
}

#[cfg(not(feature = "cuda"))]
fn measure_on_gpu(_: &KernelBenchArgs, gpu: &GpuInfo) -> anyhow::Result<Report> {
    anyhow::bail!("{gpu} cannot be used: this build has no CUDA")
}

fn measure<B: Backend>(args: &KernelBenchArgs, backend: B, gpu: Option<&GpuInfo>) -> anyhow::Result<Report> {
    let is_software = gpu.is_some_and(GpuInfo::is_software);
    let device = gpu.map_or_else(|| backend.name(), GpuInfo::to_string);
    let mut report = Report::new(device, backend.name(), args.shape.name(), is_software);
    let bench = Bench::new(backend, args.shape.dimensions(), args.batch_size.get(), args.num_tokens.get())?;
    bench.run(args.context_len.get(), &args.effort(gpu), &mut |result| report.push(result))?;
    Ok(report)
}
