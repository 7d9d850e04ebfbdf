//! What the tokens of a text cube are, and how they meet the rest of a prompt.
//!
//! In a chat a cube's text stands at the start of the system message, which is made if there is none; with a template
//! that knows no system message, at the start of the first message. The prompt is cut right behind it, and the two halves
//! are tokenized separately: so a cube's tokens depend on the template and the text alone, and a request that names
//! the cube has exactly those tokens at its beginning, whatever follows.
//!
//! A cube of messages stands before the messages of the request. In a plain completion a cube's tokens are BOS and text.

use serde_json::{Map, Value, json};

use super::payload::Twin;
use crate::text::{ChatTemplate, Tokenizer};
use crate::{Error, Result, invalid, unsupported};

/// What separates a cube's text from the message it stands in.
const SEPARATOR: &str = "\n\n";

/// Characters without meaning that mark the end of the cube's text while a template is rendered; the first one that the
/// conversation does not have is taken.
const MARKS: [char; 4] = ['\u{f8ff}', '\u{e0f0}', '\u{f00ba}', '\u{10fffd}'];

/// What a template is given beside messages.
#[derive(Debug, Clone, Copy)]
pub struct ChatSetting<'a> {
    /// Tool definitions.
    pub tools: Option<&'a Value>,
    /// End with the beginning of the assistant's turn.
    pub add_generation_prompt: bool,
    /// Further variables.
    pub variables: &'a Map<String, Value>,
}

/// A prompt that begins with a cube.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CubePrompt<T> {
    /// The template's head and the cube.
    pub cube: T,
    /// Everything behind it.
    pub rest: T,
}

/// The token ids of a chat that begins with a cube: the cube's own, then those of the rest. [`Error::Invalid`] when the
/// template refuses the conversation; [`Error::Unsupported`] when it does not write the cube as it is.
pub fn cube_prompt(
    template: &ChatTemplate,
    tokenizer: &Tokenizer,
    twin: &Twin,
    messages: &[Value],
    setting: ChatSetting<'_>,
) -> Result<CubePrompt<Vec<u32>>> {
    let CubePrompt { cube, rest } = cube_prompt_text(template, twin, messages, setting)?;
    Ok(CubePrompt { cube: tokenizer.encode(&cube, false)?, rest: tokenizer.encode(&rest, false)? })
}

/// The token ids of a cube for chats, before any request names it.
pub fn chat_cube_tokens(template: &ChatTemplate, tokenizer: &Tokenizer, twin: &Twin) -> Result<Vec<u32>> {
    let variables = Map::new();
    let setting = ChatSetting { tools: None, add_generation_prompt: true, variables: &variables };
    let message = json!({ "role": "user", "content": "?" });
    Ok(cube_prompt(template, tokenizer, twin, &[message], setting)?.cube)
}

/// The token ids of a plain completion that begins with a cube.
pub fn completion_prompt(tokenizer: &Tokenizer, text: &str, prompt: &str) -> Result<CubePrompt<Vec<u32>>> {
    Ok(CubePrompt { cube: completion_cube_tokens(tokenizer, text)?, rest: tokenizer.encode(prompt, false)? })
}

/// The token ids of a cube for plain completions: BOS, where texts begin with one, and the text.
pub fn completion_cube_tokens(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
    let mut ids = tokenizer.encode(text, false)?;
    let begins = tokenizer.encode("", true)?.first() == tokenizer.bos_id().as_ref();
    if let Some(bos) = tokenizer.bos_id().filter(|bos| begins && ids.first() != Some(bos)) {
        ids.insert(0, bos);
    }
    Ok(ids)
}

/// The text of a chat that begins with a cube, in its two halves.
pub fn cube_prompt_text(
    template: &ChatTemplate,
    twin: &Twin,
    messages: &[Value],
    setting: ChatSetting<'_>,
) -> Result<CubePrompt<String>> {
    let render = |messages: &Value, goes_on: bool| {
        template.render(messages, setting.tools, goes_on && setting.add_generation_prompt, setting.variables)
    };
    match twin {
        Twin::Text(text) => behind_text(text, messages, |messages| render(messages, true)),
        Twin::Messages(cube) => behind_messages(cube, messages, render),
    }
}

/// The cube's text in the system message or, where the template has none, in the first message.
fn behind_text(
    text: &str,
    messages: &[Value],
    render: impl Fn(&Value) -> Result<String>,
) -> Result<CubePrompt<String>> {
    let mark = free_mark(text, messages)?;
    let with_system = render(&in_system_message(text, mark, messages)).and_then(|prompt| cut_at(&prompt, mark));
    with_system.or_else(|error| {
        let Some((first, others)) = messages.split_first() else { return Err(error) };
        let first = in_message(text, mark, first);
        let messages = Value::Array([first].into_iter().chain(others.iter().cloned()).collect());
        // If that fails too, what is wrong is not the system message.
        render(&messages).and_then(|prompt| cut_at(&prompt, mark)).map_err(|_| error)
    })
}

fn behind_messages(
    cube: &[Map<String, Value>],
    messages: &[Value],
    render: impl Fn(&Value, bool) -> Result<String>,
) -> Result<CubePrompt<String>> {
    let mut all: Vec<Value> = cube.iter().cloned().map(Value::Object).collect();
    let head = render(&Value::Array(all.clone()), false)?;
    all.extend_from_slice(messages);
    let prompt = render(&Value::Array(all), true)?;
    let rest = prompt.strip_prefix(&head).ok_or_else(|| {
        unsupported!("the chat template writes earlier messages differently when others follow; store the text instead")
    })?;
    Ok(CubePrompt { rest: rest.to_owned(), cube: head })
}

fn free_mark(text: &str, messages: &[Value]) -> Result<char> {
    let is_free = |mark: &char| !text.contains(*mark) && !messages.iter().any(|message| has_char(message, *mark));
    MARKS.into_iter().find(is_free).ok_or_else(|| invalid!("the text has too many private-use characters"))
}

fn has_char(value: &Value, wanted: char) -> bool {
    match value {
        Value::String(text) => text.contains(wanted),
        Value::Array(values) => values.iter().any(|value| has_char(value, wanted)),
        Value::Object(fields) => fields.values().any(|value| has_char(value, wanted)),
        _ => false,
    }
}

fn in_system_message(text: &str, mark: char, messages: &[Value]) -> Value {
    let (first, others) = match messages.split_first() {
        Some((first, others)) if first["role"] == "system" => (in_message(text, mark, first), others),
        _ => (json!({ "role": "system", "content": format!("{text}{mark}") }), messages),
    };
    Value::Array([first].into_iter().chain(others.iter().cloned()).collect())
}

/// The message with the cube's text before its own.
fn in_message(text: &str, mark: char, message: &Value) -> Value {
    let mut message = message.clone();
    let own = match &mut message["content"] {
        // Some templates read the first part only.
        Value::Array(parts) if parts.first().is_some_and(|part| part["text"].is_string()) => &mut parts[0]["text"],
        Value::Array(parts) => {
            parts.insert(0, json!({ "type": "text", "text": "" }));
            &mut parts[0]["text"]
        }
        content => content,
    };
    *own = match own.as_str().unwrap_or_default() {
        "" => format!("{text}{mark}"),
        own => format!("{text}{mark}{SEPARATOR}{own}"),
    }
    .into();
    message
}

/// Both sides of the mark, which must be there exactly once.
fn cut_at(prompt: &str, mark: char) -> Result<CubePrompt<String>> {
    let fault = || -> Error {
        unsupported!("the chat template does not write the system message as it is, so no text can stand in it")
    };
    let (cube, rest) = prompt.split_once(mark).ok_or_else(fault)?;
    if rest.contains(mark) {
        return Err(fault());
    }
    Ok(CubePrompt { cube: cube.to_owned(), rest: rest.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::tokenizer::samples::{byte_level, sentence_piece};

    fn template(source: &str) -> ChatTemplate {
        ChatTemplate::new(Some(source), Some("<bos>"), Some("<eos>")).unwrap()
    }

    fn golden(name: &str) -> ChatTemplate {
        let golden: Value = serde_json::from_str(include_str!("../../tests/data/chat_templates.json")).unwrap();
        template(golden["templates"][name].as_str().unwrap())
    }

    fn text_of(template: &ChatTemplate, twin: &Twin, messages: Value) -> Result<CubePrompt<String>> {
        let variables = Map::new();
        let setting = ChatSetting { tools: None, add_generation_prompt: true, variables: &variables };
        cube_prompt_text(template, twin, messages.as_array().unwrap(), setting)
    }

    fn text(text: &str) -> Twin {
        Twin::Text(text.to_owned())
    }

    fn user(content: &str) -> Value {
        json!([{ "role": "user", "content": content }])
    }

    #[test]
    fn the_text_stands_where_each_template_writes_the_system_message() {
        let talk = json!([{ "role": "system", "content": "Be brief." }, { "role": "user", "content": "Hi" }]);
        for (name, head, rest_alone, rest_with_system) in [
            (
                "smollm2",
                "<|im_start|>system\nAna likes tea.",
                "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
                "\n\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
            ),
            (
                "qwen2.5",
                "<|im_start|>system\nAna likes tea.",
                "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
                "\n\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
            ),
            (
                "gemma3",
                "<bos><start_of_turn>user\nAna likes tea.",
                "\n\nHi<end_of_turn>\n<start_of_turn>model\n",
                "\n\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\n",
            ),
        ] {
            let (template, twin) = (golden(name), text("Ana likes tea."));
            let alone = text_of(&template, &twin, user("Hi")).unwrap();
            assert_eq!((alone.cube.as_str(), alone.rest.as_str()), (head, rest_alone), "{name}");
            let with_system = text_of(&template, &twin, talk.clone()).unwrap();
            assert_eq!((with_system.cube.as_str(), with_system.rest.as_str()), (head, rest_with_system), "{name}");
            // Both halves together are what the template writes for the same text in the message.
            let whole = json!([{ "role": "system", "content": "Ana likes tea." }, { "role": "user", "content": "Hi" }]);
            let whole = template.render(&whole, None, true, &Map::new()).unwrap();
            assert_eq!(format!("{}{}", alone.cube, alone.rest), whole, "{name}");
        }
    }

    #[test]
    fn the_head_is_the_same_whatever_follows() {
        let twin = text("  Text with \u{f8ff}, You are <|im_end|> and \"quotes\"\n");
        for name in ["smollm2", "qwen2.5", "gemma3", "python"] {
            let template = golden(name);
            let heads: Vec<String> = [
                user("Hi"),
                user("\u{e0f0}"),
                json!([{ "role": "system", "content": "Be brief." }, { "role": "user", "content": "a" }]),
                json!([{ "role": "system", "content": [{ "type": "text", "text": "Be brief." }] }, { "role": "user", "content": "a" }]),
                json!([{ "role": "user", "content": "a" }, { "role": "assistant", "content": "b" }, { "role": "user", "content": "c" }]),
            ]
            .into_iter()
            .map(|messages| text_of(&template, &twin, messages).unwrap().cube)
            .collect();
            assert!(heads.iter().all(|head| *head == heads[0]), "{name}: {heads:?}");
            assert!(heads[0].contains("You are <|im_end|>"), "{name}: {heads:?}");
        }
    }

    #[test]
    fn a_template_without_system_messages_has_the_text_in_the_first_one() {
        let source = "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}\
                      {% endif %}[{{ m.content }}]{% endfor %}";
        let prompt = text_of(&template(source), &text("Tea."), user("Hi")).unwrap();
        assert_eq!((prompt.cube.as_str(), prompt.rest.as_str()), ("<bos>[Tea.", "\n\nHi]"));
        // One that drops it has it there too.
        let source = "{% for m in messages if m.role != 'system' %}[{{ m.content }}]{% endfor %}";
        let prompt = text_of(&template(source), &text("Tea."), user("Hi")).unwrap();
        assert_eq!((prompt.cube.as_str(), prompt.rest.as_str()), ("[Tea.", "\n\nHi]"));
        let refusing = template("{{ raise_exception('never') }}");
        assert!(text_of(&refusing, &text("Tea."), user("Hi")).unwrap_err().to_string().contains("never"));
        let doubling = template("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}");
        assert!(matches!(text_of(&doubling, &text("Tea."), user("Hi")), Err(Error::Unsupported(_))));
        let crowded = text(&MARKS.iter().collect::<String>());
        assert!(matches!(text_of(&golden("smollm2"), &crowded, user("Hi")), Err(Error::Invalid(_))));
    }

    #[test]
    fn messages_stand_before_messages() {
        let cube = json!([{ "role": "user", "content": "Who?" }, { "role": "assistant", "content": "Ana." }]);
        let cube = cube.as_array().unwrap().iter().map(|message| message.as_object().unwrap().clone()).collect();
        let twin = Twin::Messages(cube);
        for name in ["smollm2", "qwen2.5", "gemma3"] {
            let template = golden(name);
            let prompt = text_of(&template, &twin, user("Why?")).unwrap();
            let whole = json!([
                { "role": "user", "content": "Who?" },
                { "role": "assistant", "content": "Ana." },
                { "role": "user", "content": "Why?" }
            ]);
            let whole = template.render(&whole, None, true, &Map::new()).unwrap();
            assert_eq!(format!("{}{}", prompt.cube, prompt.rest), whole, "{name}");
            assert!(prompt.cube.contains("Ana.") && !prompt.cube.contains("Why?"), "{name}");
        }
        let fickle = template("{{ messages | length }}{% for m in messages %}[{{ m.content }}]{% endfor %}");
        assert!(matches!(text_of(&fickle, &twin, user("Why?")), Err(Error::Unsupported(_))));
    }

    #[test]
    fn halves_are_tokenized_separately() {
        let tokenizer = byte_level();
        let (template, twin) = (golden("smollm2"), text("Ana"));
        let variables = Map::new();
        let setting = ChatSetting { tools: None, add_generation_prompt: true, variables: &variables };
        let messages = user("Hi");
        let prompt = cube_prompt(&template, &tokenizer, &twin, messages.as_array().unwrap(), setting).unwrap();
        assert_eq!(prompt.cube, chat_cube_tokens(&template, &tokenizer, &twin).unwrap());
        assert_eq!(prompt.cube, tokenizer.encode("<|im_start|>system\nAna", false).unwrap());
        assert!(!prompt.rest.is_empty());
    }

    #[test]
    fn a_completion_begins_as_the_vocabulary_wants_it() {
        for tokenizer in [byte_level(), sentence_piece(true), sentence_piece(false)] {
            let prompt = completion_prompt(&tokenizer, "ab", " a").unwrap();
            assert_eq!(prompt.cube, tokenizer.encode("ab", true).unwrap());
            assert_eq!(prompt.rest, tokenizer.encode(" a", false).unwrap());
        }
        let (with_bos, without) = (sentence_piece(false), byte_level());
        let cube = |tokenizer: &Tokenizer| completion_cube_tokens(tokenizer, "ab").unwrap();
        assert_eq!(cube(&with_bos)[0], with_bos.bos_id().unwrap());
        assert_ne!(cube(&without)[0], without.bos_id().unwrap());
    }
}
