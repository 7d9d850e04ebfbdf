//! The functions and filters that Hugging Face gives to chat templates.

use std::time::SystemTime;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Output, State, escape_formatter};
use minijinja_contrib::pycompat;
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter};

use super::strftime;
use crate::{Result, malformed};

/// Bounds both the time of a rendering and its memory (about 64 bytes each, 256 MiB in all); a conversation of 100,000
/// messages stays below.
const FUEL: u64 = 4_000_000;
const FUEL_BYTES: usize = 64;
const MAX_RECURSION: usize = 200;
const MAX_INDENT: usize = 16;

/// A message that the template passed to `raise_exception`.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Raised(pub(super) String);

pub(super) fn hugging_face() -> Result<Environment<'static>> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.map_err(|e| malformed!("chat template syntax: {e}"))?);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_fuel(Some(FUEL));
    environment.set_recursion_limit(MAX_RECURSION);
    environment.set_debug(false);
    environment.set_formatter(python_format);
    environment.set_unknown_method_callback(python_method);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment.add_filter("tojson", to_json);
    Ok(environment)
}

/// Hugging Face's `{% generation %}` block marks training data; at inference it only contains its body.
pub(super) fn without_extensions(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        // Behind the opening: in `{%}` the two share a character.
        let Some(inner) = rest[start + 2..].find("%}") else { break };
        let end = start + inner + 4;
        let (before, tag) = (&rest[..start], &rest[start..end]);
        let name = tag[2..tag.len() - 2].trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        out.push_str(before);
        match name {
            "generation" => out.push_str(&tag.replacen("generation", "if true", 1)),
            "endgeneration" => out.push_str(&tag.replacen("endgeneration", "endif", 1)),
            _ => out.push_str(tag),
        }
        rest = &rest[end..];
    }
    out.push_str(rest);
    out
}

/// Prints constants as Python does.
fn python_format(output: &mut Output<'_>, state: &mut State<'_, '_>, value: &Value) -> std::result::Result<(), Error> {
    match value.kind() {
        ValueKind::Bool => output.write_str(if value.is_true() { "True" } else { "False" }).map_err(Error::from),
        ValueKind::None => output.write_str("None").map_err(Error::from),
        _ => escape_formatter(output, state, value),
    }
}

/// Python's string and dict methods; those that can make much out of little are paid for in advance.
fn python_method(
    state: &mut State<'_, '_>,
    value: &Value,
    method: &str,
    arguments: &[Value],
) -> std::result::Result<Value, Error> {
    let text = value.as_str().unwrap_or_default();
    let size = match (method, arguments) {
        ("replace", [old, new, ..]) => {
            let count = old.as_str().map_or(0, |old| text.matches(old).count());
            count.saturating_mul(new.as_str().map_or(0, str::len)).saturating_add(text.len())
        }
        ("join", [items]) => items.len().unwrap_or(0).saturating_mul(text.len()),
        ("format", _) if has_long_number(text) => {
            return Err(Error::new(ErrorKind::InvalidOperation, "format: widths above 999 are not supported"));
        }
        _ => text.len(),
    };
    state.consume_fuel((size / FUEL_BYTES) as u64)?;
    pycompat::unknown_method_callback(state, value, method, arguments)
}

fn has_long_number(text: &str) -> bool {
    text.split(|c: char| !c.is_ascii_digit()).any(|digits| digits.len() > 3)
}

fn raise_exception(message: String) -> std::result::Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, "raised by the template").with_source(Raised(message)))
}

/// The current time in UTC.
fn strftime_now(format: &str) -> std::result::Result<String, Error> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs());
    strftime::format(now, format).map_err(|specifier| {
        Error::new(ErrorKind::InvalidOperation, format!("strftime_now: %{specifier} is not supported"))
    })
}

/// `json.dumps`, without the HTML escapes of Jinja's own filter.
fn to_json(state: &State<'_, '_>, value: &Value, options: Kwargs) -> std::result::Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let ascii: Option<bool> = options.get("ensure_ascii")?;
    let sorted: Option<bool> = options.get("sort_keys")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    options.assert_all_used()?;
    let mut json = serde_json::to_value(value).map_err(bad_json)?;
    if sorted == Some(true) {
        json.sort_all_objects();
    }
    let text = match (indent, separators.as_deref()) {
        (Some(indent), _) => write_json(&json, PrettyFormatter::with_indent(&b" ".repeat(indent.min(MAX_INDENT))))?,
        (None, None) => write_json(&json, Separated { item: ", ", key: ": " })?,
        (None, Some([item, key])) => write_json(&json, Separated { item, key })?,
        (None, Some(_)) => {
            return Err(Error::new(ErrorKind::InvalidOperation, "tojson: separators should be a pair of strings"));
        }
    };
    state.consume_fuel((text.len() / FUEL_BYTES) as u64)?;
    Ok(Value::from(if ascii == Some(true) { escape_non_ascii(&text) } else { text }))
}

fn bad_json(error: serde_json::Error) -> Error {
    Error::new(ErrorKind::BadSerialization, format!("tojson: {error}"))
}

fn write_json(json: &serde_json::Value, formatter: impl Formatter) -> std::result::Result<String, Error> {
    let mut out = Vec::new();
    json.serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter)).map_err(bad_json)?;
    String::from_utf8(out).map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))
}

fn escape_non_ascii(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_ascii() {
            out.push(character);
        } else {
            let units =
                character.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}")).collect::<String>();
            out.push_str(&units);
        }
    }
    out
}

/// JSON on one line with chosen separators; Python's are `", "` and `": "`.
struct Separated<'a> {
    item: &'a str,
    key: &'a str,
}

impl Formatter for Separated<'_> {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(self.item.as_bytes()) }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(self.item.as_bytes()) }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(self.key.as_bytes())
    }
}
