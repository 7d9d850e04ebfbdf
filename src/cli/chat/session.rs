//! The loop of a chat: a line in, an answer out. Answers go to stdout, remarks to stderr.

use std::io::{self, BufRead, IsTerminal, Read, Write};
use std::sync::Arc;

use anyhow::Context;
use mneme::engine::{EngineHandle, GenerateRequest, SamplingParams, Task};
use mneme::text::{ChatTemplate, Detokenizer, DetokenizerOptions, Tokenizer};
use serde_json::Map;
use tokio::runtime::Runtime;

use super::answer::{Answer, End, write_answer};
use super::conversation::{Conversation, Fitted, PromptLimits};
use super::input::{HELP, Input};
use super::interrupts::Interrupts;
use crate::cli::launch::Launched;

/// A longer line is refused.
const MAX_LINE_BYTES: u64 = 4 << 20;

/// How text becomes a prompt.
pub(super) enum Mode {
    /// By the model's chat template, with all that was said before.
    Chat(Arc<ChatTemplate>),
    /// As it is.
    Raw,
}

/// A chat with one model.
pub(super) struct Session {
    handle: EngineHandle,
    tokenizer: Arc<Tokenizer>,
    mode: Mode,
    sampling: SamplingParams,
    stop: Vec<String>,
    conversation: Conversation,
    interrupts: Interrupts,
    runtime: Runtime,
    /// Someone types and reads: show a prompt, and go on after errors.
    is_interactive: bool,
    num_requests: u64,
}

impl Session {
    pub(super) fn new(
        launched: &Launched,
        mode: Mode,
        sampling: SamplingParams,
        stop: Vec<String>,
        interrupts: Interrupts,
        system: Option<String>,
    ) -> anyhow::Result<Self> {
        Ok(Self {
            handle: launched.handle.clone(),
            tokenizer: Arc::clone(&launched.assets.tokenizer),
            mode,
            sampling,
            stop,
            conversation: Conversation::new(system),
            interrupts,
            runtime: tokio::runtime::Builder::new_current_thread().build().context("cannot start a runtime")?,
            is_interactive: io::stdin().is_terminal() && io::stdout().is_terminal(),
            num_requests: 0,
        })
    }

    /// Answers one text.
    pub(super) fn answer_once(&mut self, text: &str) -> anyhow::Result<()> {
        self.answer(text, &mut io::stdout())
    }

    /// Answers lines until there are no more.
    pub(super) fn run(&mut self) -> anyhow::Result<()> {
        let (mut input, mut out) = (io::stdin().lock(), io::stdout());
        if self.is_interactive {
            note("/help lists the commands, Ctrl-C stops an answer, Ctrl-D ends")?;
        }
        loop {
            self.show_prompt(&mut out)?;
            let Some(line) = read_line(&mut input)? else { return Ok(()) };
            match Input::parse(&line) {
                Input::Exit => return Ok(()),
                Input::Message(text) => self.answer_line(&text, &mut out)?,
                other => self.obey(other)?,
            }
        }
    }

    /// A line that fails ends a pipe, whose reader counts answers; a person can say something else.
    fn answer_line(&mut self, text: &str, out: &mut dyn Write) -> anyhow::Result<()> {
        match self.answer(text, out) {
            Err(error) if self.is_interactive => Ok(note(&format!("error: {error:#}"))?),
            result => result,
        }
    }

    fn obey(&mut self, command: Input) -> anyhow::Result<()> {
        match command {
            Input::Clear => self.conversation.clear(),
            Input::Help => note(HELP)?,
            Input::System(_) if matches!(self.mode, Mode::Raw) => note("--raw takes no instructions")?,
            Input::System(text) => self.conversation = Conversation::new(text),
            Input::Unknown(line) => note(&format!("no such command: {line}; /help lists them"))?,
            Input::Empty | Input::Exit | Input::Message(_) => {}
        }
        Ok(())
    }

    fn answer(&mut self, text: &str, out: &mut dyn Write) -> anyhow::Result<()> {
        let Fitted { prompt, num_dropped_turns } = self.prompt(text)?;
        if num_dropped_turns > 0 {
            note(&format!("the conversation is too long for the model: forgot its first {num_dropped_turns} turns"))?;
        }
        let answer = self.generate(prompt, out);
        // Also after an error: what was written so far is a line of its own.
        writeln!(out)?;
        out.flush()?;
        let answer = answer?;
        match answer.end {
            End::Done => {}
            End::Length => note("the answer was cut: --max-tokens or the model's context is used up")?,
            End::Interrupted => note("stopped")?,
        }
        if let Mode::Chat(_) = self.mode {
            self.conversation.add_turn(text.to_owned(), answer.text);
        }
        Ok(())
    }

    fn prompt(&mut self, text: &str) -> anyhow::Result<Fitted> {
        let limits = prompt_limits(self.handle.info().max_model_len, self.sampling.max_tokens);
        match &self.mode {
            Mode::Chat(template) => self.conversation.fit(text, limits, |messages| {
                let prompt = template.render(messages, None, true, &Map::new())?;
                Ok(self.tokenizer.encode(&prompt, false)?)
            }),
            Mode::Raw => {
                let prompt = self.tokenizer.encode(text, true)?;
                let (found, most) = (prompt.len(), limits.most);
                anyhow::ensure!(found <= most, "the text has {found} tokens, the model takes at most {most}");
                Ok(Fitted { prompt, num_dropped_turns: 0 })
            }
        }
    }

    fn generate(&mut self, prompt: Vec<u32>, out: &mut dyn Write) -> anyhow::Result<Answer> {
        self.num_requests += 1;
        let request = GenerateRequest {
            id: format!("chat-{}", self.num_requests),
            prompt,
            task: Task::Generate(Box::new(self.sampling.clone())),
            priority: 0,
            domain: String::new(),
            shared_prefix: None,
            adapters: Vec::new(),
            pieces: vec![],
            level: Default::default(),
            erase_on_free: false,
        };
        let options = DetokenizerOptions { skip_special: true, stop: self.stop.clone(), include_stop: false };
        let detokenizer = Detokenizer::new(Arc::clone(&self.tokenizer), options);
        let answering = self.interrupts.begin_answer();
        let stream = self.handle.submit(request)?;
        self.runtime.block_on(write_answer(stream, detokenizer, &answering, out))
    }

    fn show_prompt(&self, out: &mut dyn Write) -> io::Result<()> {
        if !self.is_interactive {
            return Ok(());
        }
        let is_plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        write!(out, "{}", if is_plain { "> " } else { "\x1b[1;32m>\x1b[0m " })?;
        out.flush()
    }
}

/// An answer gets the room it may need, but no more than half of the context.
fn prompt_limits(max_model_len: usize, max_tokens: usize) -> PromptLimits {
    PromptLimits { wanted: max_model_len - max_tokens.min(max_model_len / 2), most: max_model_len - 1 }
}

fn note(text: &str) -> io::Result<()> {
    writeln!(io::stderr(), "{text}")
}

/// The next line; `None` at the end of the input.
fn read_line(input: &mut dyn BufRead) -> anyhow::Result<Option<String>> {
    let mut line = Vec::new();
    input.take(MAX_LINE_BYTES + 1).read_until(b'\n', &mut line).context("cannot read the input")?;
    anyhow::ensure!(line.len() as u64 <= MAX_LINE_BYTES, "a line of input is longer than {MAX_LINE_BYTES} bytes");
    if line.is_empty() {
        return Ok(None);
    }
    String::from_utf8(line).context("a line of input is not UTF-8").map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_to_the_end() {
        let mut input: &[u8] = b"one\n\ntwo";
        let mut next = || read_line(&mut input).unwrap();
        assert_eq!([next(), next(), next()], ["one\n", "\n", "two"].map(|line| Some(line.to_owned())));
        assert_eq!(next(), None);
    }

    #[test]
    fn hostile_lines_are_errors() {
        assert!(read_line(&mut &b"\xff\n"[..]).is_err());
        let long = vec![b'x'; MAX_LINE_BYTES as usize + 1];
        assert!(read_line(&mut &long[..]).is_err());
    }

    #[test]
    fn answers_get_room() {
        let room = |max_model_len, max_tokens| {
            let limits = prompt_limits(max_model_len, max_tokens);
            (limits.wanted, limits.most)
        };
        assert_eq!(room(8192, 1024), (7168, 8191));
        assert_eq!(room(1000, 1024), (500, 999));
        assert_eq!(room(2, usize::MAX), (1, 1));
    }
}
