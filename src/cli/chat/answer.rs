//! One answer: tokens in, text out as soon as it is certain.

use std::io::Write;

use mneme::engine::{FinishReason, OutputEvent, OutputStream};
use mneme::text::Detokenizer;

use super::interrupts::Answering;

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// The model was done, or a stop text came.
    Done,
    /// No more tokens were allowed.
    Length,
    /// Ctrl-C.
    Interrupted,
}

/// A finished answer.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) text: String,
    pub(super) end: End,
}

/// Writes the answer as it comes. Returning early drops the stream, which cancels the request.
pub(super) async fn write_answer(
    mut stream: OutputStream,
    mut detokenizer: Detokenizer,
    answering: &Answering<'_>,
    out: &mut dyn Write,
) -> anyhow::Result<Answer> {
    let mut text = String::new();
    let end = loop {
        let event = tokio::select! {
            event = stream.next() => event,
            () = answering.interrupted() => break End::Interrupted,
        };
        match event {
            Some(OutputEvent::Token { id, .. }) => {
                let piece = detokenizer.push(id);
                show(out, &piece.text, &mut text)?;
                if piece.stop.is_some() {
                    break End::Done;
                }
            }
            Some(OutputEvent::Finished(reason)) => break end_of(reason)?,
            Some(OutputEvent::Started { .. } | OutputEvent::Embedding(_) | OutputEvent::Deposited(_)) => {}
            None => anyhow::bail!("the engine has stopped"),
        }
    };
    show(out, &detokenizer.flush().text, &mut text)?;
    Ok(Answer { text, end })
}

fn end_of(reason: FinishReason) -> anyhow::Result<End> {
    match reason {
        FinishReason::Stop { .. } => Ok(End::Done),
        FinishReason::Length => Ok(End::Length),
        FinishReason::Abort => anyhow::bail!("the engine is shutting down"),
        FinishReason::Error(message) => anyhow::bail!("{message}"),
    }
}

fn show(out: &mut dyn Write, piece: &str, text: &mut String) -> std::io::Result<()> {
    if piece.is_empty() {
        return Ok(());
    }
    text.push_str(piece);
    out.write_all(piece.as_bytes())?;
    out.flush()
}
