//! Templates against what Hugging Face renders, and hostile templates.

use serde::Deserialize;

use super::*;

/// Made by `transformers`' `render_jinja_template`, from the same templates.
#[derive(Deserialize)]
struct Golden {
    templates: Map<String, Value>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    template: String,
    messages: Value,
    tools: Option<Value>,
    add_generation_prompt: bool,
    extra: Map<String, Value>,
    rendered: String,
}

fn golden() -> Golden {
    serde_json::from_str(include_str!("../../../tests/data/chat_templates.json")).unwrap()
}

fn template(source: &str) -> ChatTemplate {
    ChatTemplate::new(Some(source), Some("<bos>"), Some("<eos>")).unwrap()
}

fn render(source: &str, messages: Value) -> Result<String> {
    template(source).render(&messages, None, true, &Map::new())
}

fn refusal_of(source: &str) -> String {
    let error = render(source, json!([])).unwrap_err();
    assert!(matches!(error, Error::Invalid(_)), "{error:?}");
    error.to_string()
}

#[test]
fn renders_what_hugging_face_renders() {
    let golden = golden();
    assert!(golden.cases.len() >= 12);
    for case in golden.cases {
        let template = template(golden.templates[&case.template].as_str().unwrap());
        let tools = case.tools.as_ref();
        let found = template.render(&case.messages, tools, case.add_generation_prompt, &case.extra).unwrap();
        assert_eq!(found, case.rendered, "{} {}", case.template, case.messages);
    }
}

#[test]
fn arguments_given_as_text_are_parsed() {
    let golden = golden();
    let case = golden.cases.iter().find(|case| case.messages[2]["tool_calls"].is_array()).unwrap();
    let mut messages = case.messages.clone();
    let arguments = &mut messages[2]["tool_calls"][0]["function"]["arguments"];
    *arguments = arguments.to_string().into();
    let template = template(golden.templates[&case.template].as_str().unwrap());
    let found = template.render(&messages, case.tools.as_ref(), true, &Map::new()).unwrap();
    assert_eq!(found, case.rendered);
    messages[2]["tool_calls"][0]["function"]["arguments"] = "{".into();
    let error = template.render(&messages, case.tools.as_ref(), true, &Map::new()).unwrap_err();
    assert!(error.to_string().contains("messages[2].tool_calls[0].function.arguments"), "{error}");
}

#[test]
fn text_parts_are_joined_for_templates_that_want_text() {
    let parts = json!([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]);
    assert_eq!(render("{{ messages[0].content }}", parts.clone()).unwrap(), "a\nb");
    let iterating = "{%- for part in messages[0]['content'] %}<{{ part.text }}>{% endfor %}";
    assert_eq!(render(iterating, parts).unwrap(), "<a><b>");
    let image = json!([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]);
    let error = render("{{ messages[0].content }}", image).unwrap_err().to_string();
    assert!(error.contains("messages[0].content[0]") && error.contains("image_url"), "{error}");
}

#[test]
fn raised_messages_reach_the_caller() {
    assert_eq!(refusal_of("{{ raise_exception('Only user roles, please') }}"), "Only user roles, please");
}

#[test]
fn a_missing_template_says_so() {
    let none = ChatTemplate::new(None, None, None).unwrap();
    let error = none.render(&json!([]), None, true, &Map::new()).unwrap_err();
    assert!(error.to_string().contains("no chat template"), "{error}");
}

#[test]
fn extra_variables_are_visible_but_cannot_replace_the_request() {
    let template = template("{{ enable_thinking }} {{ bos_token }}{{ eos_token }}");
    let extra = json!({"enable_thinking": false, "eos_token": "!"});
    let found = template.render(&json!([]), None, true, extra.as_object().unwrap()).unwrap();
    assert_eq!(found, "False <bos>!");
    let extra = json!({"messages": []});
    assert!(template.render(&json!([]), None, true, extra.as_object().unwrap()).is_err());
}

#[test]
fn broken_templates_and_messages_are_refused() {
    let error = ChatTemplate::new(Some("{% for %}"), None, None).err().unwrap();
    assert!(matches!(error, Error::Format(_)), "{error:?}");
    assert!(refusal_of("{{ messages[0]['role'] + 'x' }}").contains("does not accept"));
    assert!(render("x", json!({"role": "user"})).is_err());
    assert!(render("x", json!(["hello"])).is_err());
    assert!(refusal_of("{{ strftime_now('%Q') }}").contains("%Q"));
    assert_eq!(render("{{ strftime_now('%Y') | length }}", json!([])).unwrap(), "4");
}

#[test]
fn hostile_templates_end_with_an_error() {
    let endless = "{% for a in range(100000) %}{% for b in range(100000) %}{{ a }}{% endfor %}{% endfor %}";
    assert!(refusal_of(endless).contains("too much work"));
    refusal_of("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}");
    refusal_of("{{ 'a' * 100000000000 }}");
    let big = "{% set x = 'a' * 100000000 %}";
    refusal_of(&format!("{big}{{{{ x.replace('a', x) }}}}"));
    refusal_of(&format!("{big}{{{{ x.join(range(100000)) }}}}"));
    refusal_of("{{ '{:9999999999}'.format(1) }}");
    let nested = format!("{{{{ {}1{} }}}}", "(".repeat(100_000), ")".repeat(100_000));
    assert!(ChatTemplate::new(Some(&nested), None, None).is_err());
    assert!(ChatTemplate::new(Some(&"x".repeat(MAX_SOURCE_BYTES + 1)), None, None).is_err());
}

/// Found by fuzzing: the search for tags took the `%` of `{%` for that of `%}` too, and cut a tag of negative length.
#[test]
fn an_opening_that_shares_its_percent_with_a_closing_is_no_tag() {
    for source in ["{%}", "a{%}b", "{%}{% generation %}"] {
        let error = ChatTemplate::new(Some(source), None, None).err().expect("the template is refused");
        assert!(matches!(error, Error::Format(_)), "{error:?}");
    }
    assert_eq!(render("{% generation %}a{% endgeneration %}%}", json!([])).unwrap(), "a%}");
}
