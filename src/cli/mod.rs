//! The commands of the `mneme` program: arguments in, text out.

pub(crate) mod bench;
pub(crate) mod chat;
pub(crate) mod cube;
mod device;
pub(crate) mod doctor;
mod engine_args;
mod kv_room;
mod launch;
mod merge_args;
pub(crate) mod models;
pub(crate) mod pull;
pub(crate) mod serve;
mod text_assets;
mod tiers;

use clap::{Parser, Subcommand};

/// mneme: an LLM inference runtime whose memory is a managed, paged resource.
#[derive(Debug, Parser)]
#[command(name = "mneme", version, propagate_version = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve a model over the OpenAI API
    Serve(Box<serve::ServeArgs>),
    /// Talk to a model in the terminal
    Chat(Box<chat::ChatArgs>),
    /// Show what was found on this machine and what will be used
    Doctor(doctor::DoctorArgs),
    /// Measure latency and throughput, here or against a running server
    Bench(bench::BenchArgs),
    /// Fetch a model into the cache and print where it is
    Pull(pull::PullArgs),
    /// Make, find, change and check memory cubes of a running server
    Cube(cube::CubeArgs),
    /// List the models that have a short name, and where the downloaded ones are
    Models(models::ModelsArgs),
}

/// Runs the command that was typed.
pub(crate) fn run(cli: Cli) -> anyhow::Result<()> {
    match cli.command {
        Command::Serve(args) => serve::run(*args),
        Command::Chat(args) => chat::run(*args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Bench(args) => bench::run(args),
        Command::Pull(args) => pull::run(&args),
        Command::Cube(args) => cube::run(args),
        Command::Models(args) => models::run(&args),
    }
}
