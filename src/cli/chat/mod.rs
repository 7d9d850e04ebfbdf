//! `mneme chat`: a conversation in the terminal, or one answer per line of a pipe.

mod answer;
mod conversation;
mod input;
mod interrupts;
mod sampling_args;
mod session;

use clap::Args;

use self::interrupts::Interrupts;
use self::sampling_args::SamplingArgs;
use self::session::{Mode, Session};
use super::engine_args::EngineArgs;
use super::launch::launch;

/// Arguments of `mneme chat`.
#[derive(Debug, Args)]
#[command(after_help = "Example: mneme chat --prompt \"What is the capital of France?\" --temperature 0\n\n\
    In a conversation: /system TEXT sets the instructions, /clear forgets, /exit ends, /help lists.\n\
    Ctrl-C stops an answer; a second time, or at the prompt, it ends the program.\n\
    With a pipe for input or output every line of input gets one answer.")]
pub(crate) struct ChatArgs {
    #[command(flatten)]
    engine: EngineArgs,
    /// Answer this and exit
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,
    /// Instructions that the conversation begins with
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    system: Option<String>,
    /// Continue plain text instead of answering: no chat template, no history
    #[arg(long)]
    raw: bool,
    #[command(flatten)]
    sampling: SamplingArgs,
}

/// Runs the command.
pub(crate) fn run(args: ChatArgs) -> anyhow::Result<()> {
    let launched = launch(&args.engine, None)?;
    let mode = match (args.raw, &launched.assets.template) {
        (true, _) => Mode::Raw,
        (false, Some(template)) => Mode::Chat(template.clone()),
        (false, None) => anyhow::bail!(
            "{} has no chat template, so it was not made for conversations; --raw lets it continue plain text",
            launched.model.name
        ),
    };
    let sampling = args.sampling.params(&launched.assets.default_sampling);
    let interrupts = Interrupts::install()?;
    let mut session = Session::new(&launched, mode, sampling, args.sampling.stop, interrupts, args.system)?;
    match args.prompt {
        Some(prompt) => session.answer_once(&prompt)?,
        None => session.run()?,
    }
    launched.shut_down()
}
