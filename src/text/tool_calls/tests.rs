//! Tool calls: streaming, damaged calls, and grammars that force them.

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::text::tokenizer::samples;
use crate::text::{GrammarEngine, Tokenizer};

/// The content and the calls (`name`, `arguments`) of an answer that arrives in `pieces`.
fn parse<'a>(format: ToolFormat, pieces: impl IntoIterator<Item = &'a str>) -> (String, Vec<(String, String)>) {
    let mut parser = ToolCallParser::new(format);
    let mut events: Vec<_> = pieces.into_iter().flat_map(|piece| parser.push(piece)).collect();
    events.extend(parser.flush());
    let (mut content, mut calls) = (String::new(), Vec::new());
    for event in events {
        match event {
            ToolEvent::Content(text) => content.push_str(&text),
            ToolEvent::Call(call) => calls.push((call.name, call.arguments)),
        }
    }
    assert_eq!(parser.num_calls(), calls.len());
    (content, calls)
}

fn call(name: &str, arguments: &str) -> (String, String) {
    (name.to_owned(), arguments.to_owned())
}

/// An answer, its content, and its calls.
type Answer = (&'static str, &'static str, &'static [(&'static str, &'static str)]);

const HERMES: [Answer; 9] = [
    ("Just text.\n", "Just text.\n", &[]),
    ("<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n</tool_call>", "", &[("f", "{\"a\":1}")]),
    (
        "Let me see.\n\n<tool_call>\n{\"name\":\"f\"}\n</tool_call>\n<tool_call>{\"name\":\"g\",\"arguments\":{}}</tool_call>\n",
        "Let me see.",
        &[("f", "{}"), ("g", "{}")],
    ),
    (
        "<tool_call>{\"name\":\"f\",\"arguments\":{\"s\":\"}</tool_call>\\\"{\"}}</tool_call> done",
        " done",
        &[("f", "{\"s\":\"}</tool_call>\\\"{\"}")],
    ),
    ("a < b <tool", "a < b <tool", &[]),
    ("x <tool_call>\n{\"name\": \"f\", \"argu", "x <tool_call>\n{\"name\": \"f\", \"argu", &[]),
    ("<tool_call>{not json}</tool_call>", "<tool_call>{not json}</tool_call>", &[]),
    ("<tool_call>{\"x\":1}</tool_call>", "<tool_call>{\"x\":1}</tool_call>", &[]),
    ("<tool_call>{\"name\":\"f\"}<tool_call>{\"name\":\"g\"}", "", &[("f", "{}"), ("g", "{}")]),
];

const LLAMA3: [Answer; 6] = [
    ("It is {\"name\": \"f\"} really", "It is {\"name\": \"f\"} really", &[]),
    ("\n{\"name\": \"f\", \"parameters\": {\"a\": \"b\"}}", "", &[("f", "{\"a\":\"b\"}")]),
    ("{\"name\": \"f\", \"parameters\": {}}; {\"name\": \"g\"}", "", &[("f", "{}"), ("g", "{}")]),
    ("<|python_tag|>{\"name\": \"f\", \"parameters\": {}}", "", &[("f", "{}")]),
    ("{\"city\": \"Paris\"}\n", "{\"city\": \"Paris\"}\n", &[]),
    ("Code: <|python_tag|>print(1)", "Code: <|python_tag|>print(1)", &[]),
];

fn cases() -> impl Iterator<Item = (ToolFormat, &'static str, &'static str, Vec<(String, String)>)> {
    let hermes = HERMES.iter().map(|case| (ToolFormat::Hermes, case));
    let llama = LLAMA3.iter().map(|case| (ToolFormat::Llama3, case));
    hermes.chain(llama).map(|(format, (text, content, calls))| {
        (format, *text, *content, calls.iter().map(|(name, arguments)| call(name, arguments)).collect())
    })
}

#[test]
fn content_and_calls_are_told_apart() {
    for (format, text, content, calls) in cases() {
        assert_eq!(parse(format, [text]), (content.to_owned(), calls), "{text:?}");
    }
}

#[test]
fn content_is_not_held_longer_than_needed() {
    let mut parser = ToolCallParser::new(ToolFormat::Hermes);
    let content = |text: &str| vec![ToolEvent::Content(text.to_owned())];
    assert_eq!(parser.push("Hello"), content("Hello"));
    assert_eq!(parser.push(" <tool"), []);
    assert_eq!(parser.push("box>"), content(" <toolbox>"));
    assert_eq!(parser.push(" "), []);
    assert_eq!(parser.push("x"), content(" x"));
}

#[test]
fn limits_turn_calls_into_content() {
    let mut parser = ToolCallParser::new(ToolFormat::Hermes);
    let mut events = parser.push("<tool_call>{\"name\":\"f\",\"arguments\":{\"s\":\"");
    for _ in 0..1100 {
        events.extend(parser.push(&"x".repeat(1024)));
    }
    assert!(events.iter().all(|event| matches!(event, ToolEvent::Content(_))));
    assert!(!events.is_empty(), "the text is not hoarded");
    let (content, calls) = parse(ToolFormat::Hermes, ["<tool_call>{\"name\":\"f\"}</tool_call>"; 130]);
    assert_eq!(calls.len(), 128);
    assert_eq!(content.matches("<tool_call>").count(), 2);
}

#[test]
fn formats_are_read_off_templates() {
    assert_eq!(ToolFormat::detect("... <tool_call>\\n{\"name\" ..."), Some(ToolFormat::Hermes));
    assert_eq!(ToolFormat::detect("{{ '<|python_tag|>' }}"), Some(ToolFormat::Llama3));
    assert_eq!(ToolFormat::detect("{{ messages[0].content }}"), None);
}

fn tools() -> Vec<Tool> {
    let parameters = json!({"type": "object", "properties": {"a": {"$ref": "#/$defs/n"}}, "required": ["a"],
        "additionalProperties": false, "$defs": {"n": {"type": "integer"}}});
    vec![Tool { name: "f".into(), parameters: Some(parameters) }, Tool { name: "g-2".into(), parameters: None }]
}

fn takes(tokenizer: &Tokenizer, engine: &GrammarEngine, grammar: &Grammar, text: &str) -> bool {
    let mut state = engine.compile(grammar).unwrap();
    let accepted = text.bytes().all(|byte| {
        let id = samples::byte_id(tokenizer, byte);
        state.allowed().unwrap().is_allowed(id) && state.accept(id).is_ok()
    });
    accepted && state.may_end().unwrap()
}

#[test]
fn grammars_force_calls_that_the_parser_reads() {
    let tokenizer = samples::byte_level();
    let engine = GrammarEngine::new(tokenizer.clone()).unwrap();
    let one = "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 12}}\n</tool_call>";
    let two = format!("{one}\n<tool_call>\n{{\"name\": \"g-2\", \"arguments\": {{}}}}\n</tool_call>");
    let llama = "{\"name\": \"f\", \"parameters\": {\"a\": 12}}";
    let hermes = |tools: &[Tool], parallel| ToolFormat::Hermes.grammar(tools, parallel).unwrap();
    let cases = [
        (hermes(&tools(), false), one, true),
        (hermes(&tools(), false), two.as_str(), false),
        (hermes(&tools(), true), two.as_str(), true),
        (hermes(&tools(), true), "no", false),
        (hermes(&tools()[1..], false), one, false),
        (hermes(&tools(), false), "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": \"x\"", false),
        (ToolFormat::Llama3.grammar(&tools(), true).unwrap(), llama, true),
        (ToolFormat::Llama3.grammar(&tools(), true).unwrap(), one, false),
    ];
    for (grammar, text, wanted) in cases {
        assert_eq!(takes(&tokenizer, &engine, &grammar, text), wanted, "{text}");
    }
    assert_eq!(parse(ToolFormat::Hermes, [two.as_str()]).1, [call("f", "{\"a\":12}"), call("g-2", "{}")]);
    assert_eq!(parse(ToolFormat::Llama3, [llama]).1, [call("f", "{\"a\":12}")]);
}

#[test]
fn bad_tools_are_refused() {
    let named = |name: &str| Tool { name: name.into(), parameters: None };
    let listed = Tool { name: "f".into(), parameters: Some(json!([])) };
    for tools in [vec![], vec![named("")], vec![named("a\"b")], vec![named(&"x".repeat(65))], vec![listed]] {
        assert!(ToolFormat::Hermes.grammar(&tools, true).is_err(), "{tools:?}");
    }
}

proptest! {
    #[test]
    fn pieces_do_not_change_the_result(which in any::<prop::sample::Index>(), sizes in prop::collection::vec(1..9usize, 1..80)) {
        let cases: Vec<_> = cases().collect();
        let (format, text, content, calls) = which.get(&cases);
        let mut rest: &str = text;
        let mut pieces = Vec::new();
        for size in sizes {
            let (piece, after) = rest.split_at(size.min(rest.len()));
            pieces.push(piece);
            rest = after;
        }
        pieces.push(rest);
        prop_assert_eq!(parse(*format, pieces), (content.to_string(), calls.clone()));
    }

    #[test]
    fn no_text_is_lost(text in "(<tool_call>|</tool_call>|[{}\"; a]|\\{\"name\":|<\\|python_tag\\|>|\n){0,20}", llama in any::<bool>()) {
        let format = if llama { ToolFormat::Llama3 } else { ToolFormat::Hermes };
        let (content, calls) = parse(format, [text.as_str()]);
        if calls.is_empty() {
            prop_assert_eq!(content, text);
        }
    }
}
