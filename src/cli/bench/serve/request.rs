//! One request of the load: its body, and what its answer says about time and tokens.

use anyhow::Context;
use hyper::body::Bytes;
use serde_json::{Value, json};

use super::Endpoint;
use super::client::Client;
use crate::cli::bench::prompts::PromptShape;
use crate::cli::bench::timing::{Stopwatch, Timing};

/// What all requests have in common.
pub(super) struct RequestShape {
    pub(super) endpoint: Endpoint,
    pub(super) model: String,
    pub(super) prompts: PromptShape,
    /// Ids that prompts are drawn from.
    pub(super) token_ids: Vec<u32>,
    pub(super) output_len: usize,
    pub(super) temperature: f32,
    pub(super) ignore_eos: bool,
}

impl RequestShape {
    fn body(&self, index: usize) -> Value {
        let mut body = json!({
            "model": self.model,
            "max_tokens": self.output_len,
            "temperature": self.temperature,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        match self.endpoint {
            Endpoint::Completions => body["prompt"] = json!(self.prompts.token_ids(&self.token_ids, index)),
            Endpoint::Chat => body["messages"] = json!([{"role": "user", "content": self.prompts.text(index)}]),
        }
        // Servers other than vLLM's kin may refuse a field they do not know.
        if self.ignore_eos {
            body["ignore_eos"] = true.into();
        }
        body
    }

    /// Sends request number `index` and waits for its end.
    pub(super) async fn run(&self, client: &Client, index: usize) -> anyhow::Result<Timing> {
        let body = Bytes::from(serde_json::to_vec(&self.body(index))?);
        let mut answer = Answer::new();
        client.post_stream(self.endpoint.path(), body, |data| answer.read(data)).await?;
        answer.finish(self.prompts.len())
    }
}

/// A streamed answer.
struct Answer {
    watch: Stopwatch,
    prompt_tokens: Option<usize>,
    completion_tokens: Option<usize>,
    is_finished: bool,
}

impl Answer {
    fn new() -> Self {
        Self { watch: Stopwatch::start(), prompt_tokens: None, completion_tokens: None, is_finished: false }
    }

    fn read(&mut self, data: &str) -> anyhow::Result<()> {
        if data == "[DONE]" {
            return Ok(());
        }
        let chunk: Value = serde_json::from_str(data).context("a chunk is not JSON")?;
        if let Some(error) = chunk.get("error").filter(|error| !error.is_null()) {
            anyhow::bail!("the server broke off: {error}");
        }
        let count = |name: &str| chunk["usage"][name].as_u64().and_then(|count| usize::try_from(count).ok());
        self.prompt_tokens = count("prompt_tokens").or(self.prompt_tokens);
        self.completion_tokens = count("completion_tokens").or(self.completion_tokens);
        let choice = &chunk["choices"][0];
        if has_text(choice) {
            self.watch.token_arrived();
        }
        if choice["finish_reason"].is_string() {
            self.is_finished = true;
            // An answer whose tokens show no text (half a character, say) still has a first and a last one.
            if self.watch.num_arrivals() == 0 {
                self.watch.token_arrived();
            }
        }
        Ok(())
    }

    fn finish(self, num_sent_tokens: usize) -> anyhow::Result<Timing> {
        anyhow::ensure!(self.is_finished, "the answer ended without a finish_reason");
        let num_output_tokens = self.completion_tokens.unwrap_or(self.watch.num_arrivals());
        let num_input_tokens = self.prompt_tokens.unwrap_or(num_sent_tokens);
        self.watch.finish(num_input_tokens, num_output_tokens).context("the answer has no token")
    }
}

/// Whether a chunk brings generated text, as opposed to a role or a reason to end.
fn has_text(choice: &Value) -> bool {
    let delta = &choice["delta"];
    let texts = [&choice["text"], &delta["content"], &delta["reasoning_content"], &delta["reasoning"]];
    texts.iter().any(|text| text.as_str().is_some_and(|text| !text.is_empty())) || delta["tool_calls"][0].is_object()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(endpoint: Endpoint) -> RequestShape {
        RequestShape {
            endpoint,
            model: "m".into(),
            prompts: PromptShape { prefix_len: 1, input_len: 3, seed: 0 },
            token_ids: vec![7],
            output_len: 5,
            temperature: 0.0,
            ignore_eos: endpoint == Endpoint::Completions,
        }
    }

    #[test]
    fn bodies_fit_their_endpoint() {
        let body = shape(Endpoint::Completions).body(0);
        assert_eq!(body["prompt"], json!([7, 7, 7, 7]));
        assert_eq!((&body["max_tokens"], &body["ignore_eos"]), (&json!(5), &json!(true)));
        let body = shape(Endpoint::Chat).body(0);
        assert_eq!(body["messages"][0]["content"].as_str().unwrap().split(' ').count(), 4);
        assert!(body.get("ignore_eos").is_none() && body.get("prompt").is_none());
    }

    #[test]
    fn usage_and_arrivals_are_read() {
        let mut answer = Answer::new();
        for chunk in [
            r#"{"choices":[{"delta":{"role":"assistant","content":""}}]}"#,
            r#"{"choices":[{"delta":{"content":"a"},"finish_reason":null}],"usage":null}"#,
            r#"{"choices":[{"delta":{"content":"b"}}]}"#,
            r#"{"choices":[{"delta":{},"finish_reason":"stop"}]}"#,
            r#"{"choices":[],"usage":{"prompt_tokens":11,"completion_tokens":4}}"#,
            "[DONE]",
        ] {
            answer.read(chunk).unwrap();
        }
        let timing = answer.finish(3).unwrap();
        assert_eq!((timing.num_input_tokens, timing.num_output_tokens, timing.itl.len()), (11, 4, 1));
    }

    #[test]
    fn broken_answers_are_errors() {
        assert!(Answer::new().read(r#"{"error":{"message":"no"}}"#).is_err());
        assert!(Answer::new().read("{").is_err());
        let mut cut_off = Answer::new();
        cut_off.read(r#"{"choices":[{"text":"a"}]}"#).unwrap();
        assert!(cut_off.finish(1).is_err());
    }

    #[test]
    fn an_answer_without_visible_text_counts() {
        let mut answer = Answer::new();
        answer.read(r#"{"choices":[{"text":"","finish_reason":"length"}]}"#).unwrap();
        assert_eq!(answer.finish(2).unwrap().num_output_tokens, 1);
    }
}
