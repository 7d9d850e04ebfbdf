//! Cubes for the tests of this module.

use std::sync::Arc;

use super::cube::{Cube, CubeId, Governance, Origin, SemanticType};
use super::digest::Digest;
use super::label::{Label, Labels};
use super::name::Version;
use super::parameter::{AdapterSource, Parameter};
use super::payload::{Activation, Binding, Blocks, Form, Payload, Twin};
use super::timestamp::Timestamp;
use crate::kv::BlockHash;

/// An id that is the same in every run.
pub(super) fn id(number: u32) -> CubeId {
    format!("01890000-0000-7000-8000-{number:012x}").parse().expect("a UUIDv7")
}

pub(super) fn binding() -> Binding {
    let label = |text: &str| text.parse::<Label>().expect("a label");
    Binding {
        weights: Digest::of(b"weights"),
        architecture: label("llama"),
        dtype: label("bf16"),
        tokenizer: Digest::of(b"tokenizer"),
        template: None,
        identity: Digest::of(b"identity"),
        form: Form::Prefix,
        domain: label("ana"),
    }
}

/// Blocks of 16 tokens, named after what they hold.
pub(super) fn blocks(tokens: &[u32]) -> Blocks {
    let mut blocks = Blocks { num_bytes: tokens.len() as u64 * 1024, ..Blocks::default() };
    let mut parent = BlockHash::root(b"identity", b"ana");
    for chunk in tokens.chunks(16) {
        parent = parent.child(chunk);
        if chunk.len() == 16 { blocks.full.push(parent) } else { blocks.tail = Some(parent) }
    }
    blocks
}

pub(super) fn activation_payload(text: &str, tokens: &[u32]) -> Payload {
    let twin = Some(Twin::Text(text.to_owned()));
    let activation = Activation::new(twin, binding(), tokens.to_vec(), blocks(tokens)).expect("an activation");
    Payload::Activation(Box::new(activation))
}

fn cube(name: &str, number: u32, payload: Payload) -> Cube {
    let tag = "tag".parse::<Label>().expect("a label");
    Cube {
        id: id(number),
        version: Version::FIRST,
        name: name.parse().expect("a name"),
        parents: vec![id(1)],
        created_at: Timestamp::from_millis(1_000),
        updated_at: Timestamp::from_millis(2_000),
        origin: Origin::UserInput,
        semantic_type: Some(SemanticType::Fact),
        tags: Labels::try_from(vec![tag]).expect("labels"),
        governance: Governance::of("ana".parse().expect("a principal")),
        payload: Arc::new(payload),
    }
}

pub(super) fn activation(name: &str) -> Cube {
    cube(name, 2, activation_payload("What Ana knows", &(0..20).collect::<Vec<u32>>()))
}

pub(super) fn plaintext(name: &str) -> Cube {
    cube(name, 3, Payload::Plaintext(Twin::Text("A text with \"quotes\" and \u{e9}\n".to_owned())))
}

/// An adapter at `source`, which it is called after.
pub(super) fn parameter_payload(source: &str) -> Payload {
    let Binding { weights, architecture, .. } = binding();
    Payload::Parameter(Box::new(Parameter {
        digest: Digest::of(source.as_bytes()),
        source: AdapterSource::try_from(source.to_owned()).expect("a path"),
        weights,
        architecture,
        rank: 16,
        num_bytes: 1 << 20,
    }))
}

pub(super) fn parameter(name: &str) -> Cube {
    cube(name, 5, parameter_payload("/adapters/style"))
}

pub(super) fn conversation(name: &str) -> Cube {
    let message = serde_json::json!({"role": "user", "content": [{"type": "text", "text": "Hello"}]});
    let message = message.as_object().expect("an object").clone();
    cube(name, 4, Payload::Plaintext(Twin::Messages(vec![message])))
}
