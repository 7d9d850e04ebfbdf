//! What was said so far, and what of it still fits.

use std::collections::VecDeque;

use serde_json::{Value, json};

/// A question and its answer.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Turn {
    user: String,
    assistant: String,
}

/// The history of a chat.
#[derive(Debug, Default)]
pub(super) struct Conversation {
    system: Option<String>,
    turns: VecDeque<Turn>,
}

/// A conversation made short enough.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Fitted {
    pub(super) prompt: Vec<u32>,
    pub(super) num_dropped_turns: usize,
}

/// How long a prompt may be.
#[derive(Debug, Clone, Copy)]
pub(super) struct PromptLimits {
    /// Turns are dropped until the prompt is no longer than this, which leaves room for an answer.
    pub(super) wanted: usize,
    /// No longer prompt can be run at all.
    pub(super) most: usize,
}

impl Conversation {
    pub(super) fn new(system: Option<String>) -> Self {
        Self { system, turns: VecDeque::new() }
    }

    /// Forgets all turns.
    pub(super) fn clear(&mut self) {
        self.turns.clear();
    }

    /// Remembers a turn.
    pub(super) fn add_turn(&mut self, user: String, assistant: String) {
        self.turns.push_back(Turn { user, assistant });
    }

    /// Drops the oldest turns until the prompt that asks `user` fits. `tokenize` turns messages into the prompt.
    pub(super) fn fit(
        &mut self,
        user: &str,
        limits: PromptLimits,
        mut tokenize: impl FnMut(&Value) -> anyhow::Result<Vec<u32>>,
    ) -> anyhow::Result<Fitted> {
        let mut num_dropped_turns = 0;
        loop {
            let prompt = tokenize(&self.messages(user))?;
            if prompt.len() <= limits.wanted || (self.turns.is_empty() && prompt.len() <= limits.most) {
                return Ok(Fitted { prompt, num_dropped_turns });
            }
            anyhow::ensure!(
                self.turns.pop_front().is_some(),
                "the message makes a prompt of {} tokens, the model takes at most {}",
                prompt.len(),
                limits.most
            );
            num_dropped_turns += 1;
        }
    }

    fn messages(&self, user: &str) -> Value {
        let message = |role: &str, content: &str| json!({"role": role, "content": content});
        let mut messages: Vec<Value> = self.system.iter().map(|system| message("system", system)).collect();
        for turn in &self.turns {
            messages.push(message("user", &turn.user));
            messages.push(message("assistant", &turn.assistant));
        }
        messages.push(message("user", user));
        Value::Array(messages)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE_WORD_ROOM: PromptLimits = PromptLimits { wanted: 4, most: 6 };

    /// A token per word.
    fn tokenize(messages: &Value) -> anyhow::Result<Vec<u32>> {
        let words = |message: &Value| message["content"].as_str().unwrap().split_whitespace().count();
        Ok(vec![0; messages.as_array().unwrap().iter().map(words).sum()])
    }

    fn conversation(num_turns: usize) -> Conversation {
        let mut conversation = Conversation::new(Some("system".into()));
        for turn in 0..num_turns {
            conversation.add_turn(format!("q{turn}"), format!("a{turn}"));
        }
        conversation
    }

    #[test]
    fn the_oldest_turns_go_first() {
        let mut conversation = conversation(3);
        let fitted = conversation.fit("now", ONE_WORD_ROOM, tokenize).unwrap();
        assert_eq!((fitted.prompt.len(), fitted.num_dropped_turns), (4, 2));
        let messages = conversation.messages("now");
        assert_eq!(messages[0]["role"], "system", "the instructions stay");
        assert_eq!((&messages[1]["content"], &messages[2]["content"]), (&json!("q2"), &json!("a2")));
        assert_eq!(conversation.fit("now", ONE_WORD_ROOM, tokenize).unwrap().num_dropped_turns, 0);
    }

    #[test]
    fn a_long_message_may_take_the_answers_room() {
        let fitted = conversation(1).fit("one two three four five", ONE_WORD_ROOM, tokenize).unwrap();
        assert_eq!((fitted.prompt.len(), fitted.num_dropped_turns), (6, 1));
    }

    #[test]
    fn a_message_that_never_fits_is_an_error() {
        let error = conversation(1).fit("one two three four five six", ONE_WORD_ROOM, tokenize).unwrap_err();
        assert!(error.to_string().contains("7 tokens, the model takes at most 6"), "{error}");
    }

    #[test]
    fn clearing_keeps_the_instructions() {
        let mut conversation = conversation(2);
        conversation.clear();
        assert_eq!(conversation.messages("x").as_array().unwrap().len(), 2);
    }
}
