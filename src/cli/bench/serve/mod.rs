//! `mneme bench serve`: a load client for any OpenAI-compatible server.

mod arrivals;
mod client;
mod goodput;
mod load;
mod report;
mod request;
mod sse;

use std::io::{self, Write};
use std::num::{NonZeroU32, NonZeroUsize};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, ValueEnum};

use self::arrivals::RequestRate;
use self::client::Client;
use self::goodput::Objective;
use self::load::Load;
use self::report::{Report, RunInfo};
use self::request::RequestShape;
use super::metrics::parse_percent;
use super::prompts::PromptShape;
use super::results::ResultArgs;

/// Ids below this are control tokens, bytes and unused places in common vocabularies.
const FIRST_TOKEN_ID: u32 = 1000;
const LEAST_VOCAB_SIZE: i64 = FIRST_TOKEN_ID as i64 + 1;

/// Arguments of `mneme bench serve`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example: mneme bench serve --port 8000 --num-prompts 100 --request-rate 4 --goodput ttft:500 tpot:50"
)]
pub(super) struct ServeBenchArgs {
    /// Address of the server, http only [default: http://HOST:PORT]
    #[arg(long)]
    base_url: Option<String>,
    /// Host of the server
    #[arg(long, default_value = "127.0.0.1", conflicts_with = "base_url")]
    host: String,
    /// Port of the server
    #[arg(long, default_value_t = 8000, conflicts_with = "base_url")]
    port: u16,
    /// What is called; completions get token ids, chats get text
    #[arg(long, value_enum, default_value_t = Endpoint::Completions)]
    endpoint: Endpoint,
    /// Model to ask for [default: the first one of /v1/models]
    #[arg(long)]
    model: Option<String>,
    /// Key to send as `Authorization: Bearer`
    #[arg(long, env = "OPENAI_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// Requests
    #[arg(long, default_value = "100")]
    num_prompts: NonZeroUsize,
    /// Requests per second, with the random gaps of a Poisson process; inf sends all at once
    #[arg(long, default_value = "inf")]
    request_rate: RequestRate,
    /// Requests in flight; further ones wait, and their time begins when they are sent
    #[arg(long, default_value = "512")]
    max_concurrency: NonZeroU32,
    /// Tokens of a prompt after the shared prefix (chats: words)
    #[arg(long, default_value = "128")]
    input_len: NonZeroUsize,
    /// Tokens that all prompts share at their beginning (chats: words)
    #[arg(long, default_value_t = 0)]
    prefix_len: usize,
    /// Tokens of an answer at most
    #[arg(long, default_value = "128")]
    output_len: NonZeroUsize,
    /// Let answers go on after EOS, so that all have --output-len tokens
    #[arg(long)]
    ignore_eos: bool,
    /// Temperature of the answers
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    /// Token ids of prompts are drawn from 1000 up to this
    #[arg(long, default_value_t = 32_000, value_parser = clap::value_parser!(u32).range(LEAST_VOCAB_SIZE..))]
    vocab_size: u32,
    /// Seeds prompts and gaps
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Percentiles of the latencies, comma-separated
    #[arg(long, value_delimiter = ',', default_value = "99", value_parser = parse_percent)]
    metric_percentiles: Vec<f64>,
    /// Count requests within all these bounds in milliseconds: ttft:MS tpot:MS e2el:MS
    #[arg(long, num_args = 1.., value_name = "NAME:MS")]
    goodput: Vec<Objective>,
    /// Seconds after which a request counts as failed
    #[arg(long, default_value = "3600")]
    request_timeout: NonZeroU32,
    #[command(flatten)]
    result: ResultArgs,
}

/// The two ways to ask for text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Endpoint {
    #[value(name = "/v1/completions", alias = "completions")]
    Completions,
    #[value(name = "/v1/chat/completions", alias = "chat")]
    Chat,
}

impl Endpoint {
    fn path(self) -> &'static str {
        match self {
            Endpoint::Completions => "/v1/completions",
            Endpoint::Chat => "/v1/chat/completions",
        }
    }

    /// vLLM's name for it in results.
    fn backend(self) -> &'static str {
        match self {
            Endpoint::Completions => "openai",
            Endpoint::Chat => "openai-chat",
        }
    }
}

/// Runs the measurement. A run in which nothing succeeded is an error.
pub(super) fn run(args: &ServeBenchArgs) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let report = runtime.block_on(measure(args))?;
    args.result.write(&report.json(), |out| Ok(report.write_table(out)?))?;
    report.check()
}

async fn measure(args: &ServeBenchArgs) -> anyhow::Result<Report> {
    let base_url = args.base_url.clone().unwrap_or_else(|| format!("http://{}:{}", args.host, args.port));
    let timeout = Duration::from_secs(args.request_timeout.get().into());
    let client = Arc::new(Client::new(&base_url, args.api_key.as_deref(), timeout)?);
    let model = match &args.model {
        Some(model) => model.clone(),
        None => first_model(&client).await?,
    };
    writeln!(io::stderr(), "{} requests to {base_url}{}, model {model}", args.num_prompts, args.endpoint.path())?;
    let outcome = args.load(&model).run(&client).await;
    Ok(Report::new(outcome, args.run_info(model)))
}

async fn first_model(client: &Client) -> anyhow::Result<String> {
    let list = client.get_json("/v1/models").await.context("cannot list the server's models; --model names one")?;
    let id = list["data"][0]["id"].as_str().context("the server lists no model; name one with --model")?;
    Ok(id.to_owned())
}

impl ServeBenchArgs {
    fn load(&self, model: &str) -> Load {
        let (prefix_len, input_len, seed) = (self.prefix_len, self.input_len.get(), self.seed);
        Load {
            shape: Arc::new(RequestShape {
                endpoint: self.endpoint,
                model: model.to_owned(),
                prompts: PromptShape { prefix_len, input_len, seed },
                token_ids: (FIRST_TOKEN_ID..self.vocab_size).collect(),
                output_len: self.output_len.get(),
                temperature: self.temperature,
                ignore_eos: self.ignore_eos,
            }),
            num_requests: self.num_prompts.get(),
            rate: self.request_rate,
            max_concurrency: self.max_concurrency.get() as usize,
            seed,
        }
    }

    fn run_info(&self, model: String) -> RunInfo {
        RunInfo {
            endpoint: self.endpoint,
            model,
            num_prompts: self.num_prompts.get(),
            rate: self.request_rate,
            max_concurrency: self.max_concurrency.get(),
            percents: self.metric_percentiles.clone(),
            objectives: self.goodput.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        args: ServeBenchArgs,
    }

    fn parse(line: &str) -> Result<ServeBenchArgs, clap::Error> {
        Program::try_parse_from(std::iter::once("bench").chain(line.split_whitespace())).map(|program| program.args)
    }

    #[test]
    fn arguments_are_read() {
        let args = parse("--endpoint /v1/chat/completions --request-rate 2.5 --goodput ttft:500 tpot:50 --ignore-eos")
            .unwrap();
        assert_eq!(args.endpoint, Endpoint::Chat);
        assert_eq!(args.goodput.len(), 2);
        assert!(args.ignore_eos);
        assert_eq!(args.metric_percentiles, [99.0]);
        assert_eq!(parse("--metric-percentiles 50,99.9").unwrap().metric_percentiles, [50.0, 99.9]);
    }

    #[test]
    fn bad_arguments_are_refused() {
        for line in [
            "--request-rate 0",
            "--num-prompts 0",
            "--max-concurrency 0",
            "--goodput speed:5",
            "--endpoint /v1/embeddings",
            "--vocab-size 1000",
            "--base-url http://a --port 1",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}
