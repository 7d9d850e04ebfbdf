//! Messages to prompt text, by the checkpoint's own Jinja template.
//!
//! The environment is that of Hugging Face's `apply_chat_template`: `trim_blocks`, `lstrip_blocks`, Python string
//! methods, `raise_exception`, `strftime_now`, and a `tojson` that writes what Python's `json.dumps` writes. Templates
//! come with models and may be hostile: rendering has a budget of work and memory.

mod checkpoint;
mod environment;
mod messages;
mod strftime;

#[cfg(test)]
mod tests;

use minijinja::value::{Serde, Value as TemplateValue};
use minijinja::{Environment, ErrorKind};
use serde_json::{Map, Value, json};

pub use self::checkpoint::template_in_folder;
use self::environment::Raised;
use crate::{Error, Result, invalid, malformed};

const NAME: &str = "chat template";
const MAX_SOURCE_BYTES: usize = 1 << 20;

/// Names the template is given by [`ChatTemplate::render`] itself.
const OWN_NAMES: [&str; 3] = ["messages", "tools", "add_generation_prompt"];

/// A compiled chat template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: Option<String>,
    bos: Option<String>,
    eos: Option<String>,
    /// Whether the template takes message content apart itself.
    reads_content_parts: bool,
}

impl ChatTemplate {
    /// Compiles `source`. `bos` and `eos` are the texts of those tokens, for templates that write them. Without a
    /// source every rendering is refused with a message that says so.
    pub fn new(source: Option<&str>, bos: Option<&str>, eos: Option<&str>) -> Result<Self> {
        let mut environment = environment::hugging_face()?;
        if let Some(source) = source {
            if source.len() > MAX_SOURCE_BYTES {
                return Err(malformed!("chat template: {} bytes, the limit is {MAX_SOURCE_BYTES}", source.len()));
            }
            environment
                .add_template_owned(NAME, environment::without_extensions(source))
                .map_err(|e| malformed!("chat template: cannot compile it: {e}"))?;
        }
        Ok(Self {
            environment,
            reads_content_parts: source.is_some_and(messages::reads_content_parts),
            source: source.map(str::to_owned),
            bos: bos.map(str::to_owned),
            eos: eos.map(str::to_owned),
        })
    }

    /// The template's text.
    pub fn source(&self) -> Option<&str> {
        self.source.as_deref()
    }

    /// The prompt for OpenAI-style `messages` (an array of objects) and `tools`. `extra` adds variables, as
    /// `chat_template_kwargs` does. Whatever the template objects to is [`Error::Invalid`] with its own words.
    pub fn render(
        &self,
        messages: &Value,
        tools: Option<&Value>,
        add_generation_prompt: bool,
        extra: &Map<String, Value>,
    ) -> Result<String> {
        if self.source.is_none() {
            return Err(invalid!(
                "this model has no chat template; use the completions endpoint, or start the server with a chat template"
            ));
        }
        if let Some(name) = extra.keys().find(|name| OWN_NAMES.contains(&name.as_str())) {
            return Err(invalid!("chat_template_kwargs: {name:?} cannot be set there, it is a field of the request"));
        }
        let messages = messages::normalise(messages, self.reads_content_parts)?;
        let mut context = json!({ "bos_token": self.bos, "eos_token": self.eos, "documents": null });
        let variables = context.as_object_mut().expect("the context is an object");
        variables.extend(extra.iter().map(|(name, value)| (name.clone(), value.clone())));
        variables.insert("messages".into(), messages);
        variables.insert("tools".into(), tools.cloned().unwrap_or_default());
        variables.insert("add_generation_prompt".into(), add_generation_prompt.into());
        let template = self.environment.get_template(NAME).map_err(refusal)?;
        template.render(TemplateValue::from(Serde(&context))).map_err(refusal)
    }
}

/// The template's own message if it raised one, else minijinja's description.
fn refusal(error: minijinja::Error) -> Error {
    if error.kind() == ErrorKind::OutOfFuel {
        return invalid!("chat template: rendering takes too much work; shorten the conversation");
    }
    let mut cause = Some(&error as &dyn std::error::Error);
    while let Some(error) = cause {
        if let Some(Raised(message)) = error.downcast_ref() {
            return invalid!("{message}");
        }
        cause = error.source();
    }
    invalid!("the chat template does not accept this conversation: {error}")
}
