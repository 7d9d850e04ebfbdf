//! An answer with tool calls in it. Read in pieces it means what it means read whole, and no word of it is lost.

#![no_main]

use libfuzzer_sys::fuzz_target;
use mneme::text::{ToolCallParser, ToolEvent, ToolFormat};

/// The events of `text` in pieces of `step` characters, neighbouring content joined.
fn read(format: ToolFormat, text: &str, step: usize) -> Vec<ToolEvent> {
    let mut parser = ToolCallParser::new(format);
    let chars: Vec<char> = text.chars().collect();
    let mut events: Vec<ToolEvent> = Vec::new();
    let mut take = |more: Vec<ToolEvent>| {
        for event in more {
            match (events.last_mut(), event) {
                (Some(ToolEvent::Content(content)), ToolEvent::Content(more)) => content.push_str(&more),
                (_, event) => events.push(event),
            }
        }
    };
    for piece in chars.chunks(step) {
        take(parser.push(&String::from_iter(piece)));
    }
    take(parser.flush());
    events
}

fuzz_target!(|input: (u8, String)| {
    let (step, text) = input;
    for format in [ToolFormat::Hermes, ToolFormat::Llama3] {
        let whole = read(format, &text, usize::MAX);
        assert_eq!(read(format, &text, usize::from(step % 8) + 1), whole, "{format:?}");
        if let [ToolEvent::Content(content)] = whole.as_slice() {
            assert_eq!(content, &text, "{format:?}: content came out changed");
        }
    }
});
