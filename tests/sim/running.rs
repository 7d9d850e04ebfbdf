//! A request of a simulated life that is under way, and whether what has come of it so far is right.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use mneme::engine::OutputStream;

use super::sharing::{Asked, Sharing};
use crate::support::engine::Output;

/// What a request is to come to.
pub enum Wanted {
    Tokens(usize),
    Deposit {
        is_durable: bool,
        must_succeed: bool,
        kept: Box<Asked>,
    },
    Embedding,
    /// Nothing: it has no room beside its adapters.
    Refusal,
}

pub struct Running {
    pub asked: Asked,
    /// What it comes to with its adapters merged.
    pub merged: Option<Asked>,
    pub wanted: Wanted,
    /// What has become of the files of its adapters.
    pub are_harmed: Vec<Arc<AtomicBool>>,
    pub output: Output,
    pub stream: OutputStream,
}

impl Running {
    /// What was asked for, in the form in which it runs. Only who has adapters can be merged.
    pub fn asked(&self) -> &Asked {
        match self.output.reuse.is_merged {
            true => self.merged.as_ref().expect("a request without adapters is merged"),
            false => &self.asked,
        }
    }
}

/// What there is so far is what was predicted, and nothing was found that belongs to others.
pub fn check(asked: &Asked, output: &Output, sharing: &Sharing) {
    let Asked { tokens, num_prompt, .. } = asked;
    let wanted = &tokens[*num_prompt..];
    assert_eq!(output.tokens, wanted[..output.tokens.len()], "{}", told(asked, output));
    let most = sharing.most_cached(asked);
    assert!(output.cached_tokens <= most, "{most} tokens may be found {}", told(asked, output));
}

fn told(asked: &Asked, output: &Output) -> String {
    let Asked { num_prompt, adapters, pieces, shared, .. } = asked;
    let (num_adapters, num_pieces, is_shared) = (adapters.len(), pieces.len(), shared.is_some());
    let Output { cached_tokens, reuse, .. } = output;
    format!(
        "behind {num_prompt} tokens, {num_adapters} adapters, {num_pieces} pieces, a shared prefix: {is_shared}; \
         {cached_tokens} cached, {reuse:?}"
    )
}
