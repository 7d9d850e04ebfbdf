//! `mneme bench`: measurements under vLLM's names, of an engine in this process or of any OpenAI-compatible server.

mod in_process;
mod kernels;
mod latency;
mod lora;
mod memory;
mod metrics;
mod prompts;
mod random;
mod results;
mod serve;
mod statistics;
mod table;
mod throughput;
mod timestamp;
mod timing;

use clap::{Args, Subcommand};

/// Which measurement.
#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    command: BenchCommand,
}

#[derive(Debug, Subcommand)]
enum BenchCommand {
    /// Time batches of equal requests, one batch after the other, on an engine in this process
    Latency(Box<latency::LatencyArgs>),
    /// Hand many requests to an engine in this process at once and count tokens per second
    Throughput(Box<throughput::ThroughputArgs>),
    /// Compare batches under an adapter, added and merged, with batches of the model alone
    Lora(Box<lora::LoraBenchArgs>),
    /// Time first tokens with and without the context's KV in each tier: the protocol of MemOS's Table 5
    Memory(Box<memory::MemoryBenchArgs>),
    /// Time every kernel of a device by itself, on the shapes of a model
    Kernels(Box<kernels::KernelBenchArgs>),
    /// Put a load on a running OpenAI-compatible server and measure its answers
    Serve(Box<serve::ServeBenchArgs>),
}

/// Runs the measurement that was asked for.
pub(crate) fn run(args: BenchArgs) -> anyhow::Result<()> {
    match args.command {
        BenchCommand::Latency(args) => latency::run(&args),
        BenchCommand::Throughput(args) => throughput::run(&args),
        BenchCommand::Lora(args) => lora::run(&args),
        BenchCommand::Memory(args) => memory::run(&args),
        BenchCommand::Kernels(args) => kernels::run(&args),
        BenchCommand::Serve(args) => serve::run(&args),
    }
}
