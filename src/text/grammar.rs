//! Structured output: which tokens may come next so that the text follows a grammar.
//!
//! The work is done by llguidance (an Earley parser over derivative-based lexers). Here are the token trie it walks,
//! built once per tokenizer, the bounds on what a request may make it do, and a state that the sampler can ask.
//! What a grammar says is left to the caller; tool calls have theirs in `text/tool_calls.rs`.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, OnceLock};

use llguidance::api::{ParserLimits, StopReason, TopLevelGrammar};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};
use toktrie::{ApproximateTokEnv, SimpleVob, TokEnv, TokRxInfo, TokTrie};

use super::Tokenizer;
use crate::{Error, Result, invalid, unsupported};

/// Bounds on what a request may send.
const MAX_GRAMMAR_BYTES: usize = 256 << 10;
const MAX_CHOICES: usize = 4096;

/// Bounds of the trie's own format: bytes of one token, nodes (bytes of all tokens at most), ids.
const MAX_TRIE_TOKEN_BYTES: usize = 1000;
const MAX_TRIE_BYTES: usize = (1 << 22) - 2;
const MAX_TRIE_TOKENS: usize = (1 << 24) - 2;

/// Longest part of a foreign error message that is passed on.
const MAX_MESSAGE_CHARS: usize = 600;

/// What the output has to look like.
#[derive(Debug, Clone, PartialEq)]
pub enum Grammar {
    /// Any JSON object.
    JsonObject,
    /// JSON that a schema accepts.
    JsonSchema(Value),
    /// Text that a regular expression (Rust syntax, anchored at both ends) matches.
    Regex(String),
    /// Text of a grammar in llguidance's dialect of Lark.
    Lark(String),
    /// One of these texts.
    Choice(Vec<String>),
}

impl Grammar {
    fn size_bytes(&self) -> usize {
        match self {
            Grammar::JsonObject => 0,
            Grammar::JsonSchema(schema) => schema.to_string().len(),
            Grammar::Regex(text) | Grammar::Lark(text) => text.len(),
            Grammar::Choice(choices) => choices.iter().map(String::len).sum(),
        }
    }

    fn check_size(&self) -> Result<()> {
        let size = self.size_bytes();
        if size > MAX_GRAMMAR_BYTES {
            return Err(invalid!("the grammar has {size} bytes, the limit is {MAX_GRAMMAR_BYTES}"));
        }
        match self {
            Grammar::Choice(choices) if choices.is_empty() => Err(invalid!("a choice needs at least one text")),
            Grammar::Choice(choices) if choices.len() > MAX_CHOICES => {
                Err(invalid!("a choice of {} texts, the limit is {MAX_CHOICES}", choices.len()))
            }
            _ => Ok(()),
        }
    }

    fn to_llguidance(&self) -> TopLevelGrammar {
        match self {
            Grammar::JsonObject => TopLevelGrammar::from_json_schema(with_json_options(json!({"type": "object"}))),
            Grammar::JsonSchema(schema) => TopLevelGrammar::from_json_schema(with_json_options(schema.clone())),
            Grammar::Regex(regex) => TopLevelGrammar::from_regex(regex),
            Grammar::Lark(lark) => TopLevelGrammar::from_lark(lark.clone()),
            Grammar::Choice(choices) => {
                let quoted: Vec<_> = choices.iter().map(|choice| lark_string(choice)).collect();
                TopLevelGrammar::from_lark(format!("start: {}", quoted.join(" | ")))
            }
        }
    }
}

/// `text` as a string literal of the Lark dialect, which are JSON's.
pub(super) fn lark_string(text: &str) -> String {
    Value::from(text).to_string()
}

/// The options under which schemas are read, unless the schema brings its own: runs of white space are bounded, because
/// small models like to go on with them for ever, and `oneOf` is read as `anyOf`.
pub(super) fn with_json_options(mut schema: Value) -> Value {
    if let Some(object) = schema.as_object_mut() {
        let options = json!({"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,20}", "coerce_one_of": true});
        object.entry("x-guidance").or_insert(options);
    }
    schema
}

/// Compiles grammars for one tokenizer.
pub struct GrammarEngine {
    tokenizer: Arc<Tokenizer>,
    factory: OnceLock<std::result::Result<ParserFactory, String>>,
}

impl GrammarEngine {
    /// An engine for the tokens of `tokenizer`. The trie is built when the first grammar is compiled; call
    /// [`GrammarEngine::prepare`] to have it built earlier.
    pub fn new(tokenizer: Arc<Tokenizer>) -> Result<Self> {
        if tokenizer.end_ids().is_empty() {
            return Err(unsupported!("structured output needs a tokenizer with an end token, this one has none"));
        }
        if tokenizer.vocab_size() > MAX_TRIE_TOKENS {
            return Err(unsupported!("structured output: {} tokens are too many", tokenizer.vocab_size()));
        }
        Ok(Self { tokenizer, factory: OnceLock::new() })
    }

    /// Builds the token trie now.
    pub fn prepare(&self) -> Result<()> {
        self.factory().map(drop)
    }

    /// Checks and compiles `grammar`. What cannot be compiled, or not within the limits, is [`Error::Invalid`].
    pub fn compile(&self, grammar: &Grammar) -> Result<GrammarState> {
        grammar.check_size()?;
        let factory = self.factory()?;
        let created = catch_unwind(AssertUnwindSafe(|| factory.create_parser(grammar.to_llguidance())));
        let matcher = match created {
            Ok(parser) => Matcher::new(parser),
            Err(_) => return Err(invalid!("the grammar cannot be compiled")),
        };
        match matcher.get_error() {
            None => Ok(GrammarState { matcher, tokenizer: self.tokenizer.clone(), mask: None }),
            Some(message) => Err(invalid!("the grammar cannot be compiled: {}", shortened(&message))),
        }
    }

    fn factory(&self) -> Result<&ParserFactory> {
        let built = self.factory.get_or_init(|| build_factory(&self.tokenizer));
        built.as_ref().map_err(|message| unsupported!("structured output with this tokenizer: {message}"))
    }
}

fn limits() -> ParserLimits {
    ParserLimits {
        max_lexer_states: 50_000,
        max_grammar_size: 200_000,
        verbose_errors: false,
        ..ParserLimits::default()
    }
}

fn build_factory(tokenizer: &Tokenizer) -> std::result::Result<ParserFactory, String> {
    let build = || -> std::result::Result<ParserFactory, String> {
        let words = trie_words(tokenizer)?;
        let ends = tokenizer.end_ids();
        let eos = tokenizer.eos_id().unwrap_or(ends[0]);
        let trie = TokTrie::from(&TokRxInfo::new(words.len() as u32, eos), &words).with_eos_tokens(ends);
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new_simple(&environment).map_err(|e| e.to_string())?;
        factory.quiet();
        *factory.limits_mut() = limits();
        Ok(factory)
    };
    catch_unwind(AssertUnwindSafe(build)).unwrap_or_else(|_| Err("its vocabulary does not fit a token trie".into()))
}

/// The bytes of every token as the trie wants them. Special tokens carry the trie's marker, so that no text reaches
/// them; tokens that no text can contain are left out.
fn trie_words(tokenizer: &Tokenizer) -> std::result::Result<Vec<Vec<u8>>, String> {
    let mut total = 0;
    let words = (0..tokenizer.vocab_size() as u32).map(|id| {
        let bytes = tokenizer.token_bytes(id);
        let word = if bytes.len() > MAX_TRIE_TOKEN_BYTES || bytes.first() == Some(&TokTrie::SPECIAL_TOKEN_MARKER) {
            Vec::new()
        } else if tokenizer.is_special(id) {
            [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes].concat()
        } else {
            bytes.to_vec()
        };
        total += word.len();
        word
    });
    let words = words.collect();
    if total > MAX_TRIE_BYTES {
        return Err(format!("its tokens have {total} bytes, the limit is {MAX_TRIE_BYTES}"));
    }
    Ok(words)
}

/// One bit per token id: set where the token may come next.
#[derive(Clone, PartialEq)]
pub struct TokenMask(SimpleVob);

impl TokenMask {
    /// Whether token `id` may come next.
    pub fn is_allowed(&self, id: u32) -> bool {
        (id as usize) < self.0.len() && self.0.is_allowed(id)
    }

    /// Writes the bits, least significant first, 32 to a word, and zeros behind them.
    pub fn write(&self, words: &mut [u32]) {
        let num_words = self.0.len().div_ceil(32).min(words.len());
        words[..num_words].copy_from_slice(&self.0.as_slice()[..num_words]);
        words[num_words..].fill(0);
        if self.0.len() < num_words * 32 {
            words[num_words - 1] &= (1 << (self.0.len() % 32)) - 1;
        }
    }

    /// How many tokens may come next.
    pub fn num_allowed(&self) -> usize {
        self.0.num_set()
    }

    /// The tokens that may come next, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.0.iter()
    }
}

/// Where one output sequence is in its grammar.
#[derive(Clone)]
pub struct GrammarState {
    matcher: Matcher,
    tokenizer: Arc<Tokenizer>,
    mask: Option<TokenMask>,
}

impl GrammarState {
    /// The tokens that may come next; end tokens are among them when the text may end here, and alone when it must.
    /// Never empty. [`Error::Exhausted`] when the grammar takes too much work.
    pub fn allowed(&mut self) -> Result<&TokenMask> {
        if self.mask.is_none() {
            let mask = self.matcher.compute_mask_or_eos();
            self.mask = Some(TokenMask(mask.map_err(|e| self.failure(&e.to_string()))?));
        }
        Ok(self.mask.as_ref().expect("the mask was just computed"))
    }

    /// The mask that [`allowed`](Self::allowed) has computed since the last token.
    pub fn mask(&self) -> Option<&TokenMask> {
        self.mask.as_ref()
    }

    /// Moves past `token`. A token that was not allowed is an error, after which the state is of no more use.
    pub fn accept(&mut self, token: u32) -> Result<()> {
        self.mask = None;
        if self.is_finished() && self.tokenizer.end_ids().contains(&token) {
            return Ok(());
        }
        self.matcher.consume_token(token).map_err(|e| self.failure(&e.to_string()))
    }

    /// Whether the text may end here.
    pub fn may_end(&mut self) -> Result<bool> {
        let accepting = self.matcher.is_stopped() || self.matcher.is_accepting().unwrap_or(false);
        match self.matcher.is_error() {
            true => Err(self.failure("the grammar was left")),
            false => Ok(accepting),
        }
    }

    /// Whether nothing but an end token can follow.
    pub fn is_finished(&self) -> bool {
        self.matcher.is_stopped() && !self.matcher.is_error()
    }

    fn failure(&self, message: &str) -> Error {
        let message = shortened(message);
        match self.matcher.stop_reason() {
            StopReason::LexerTooComplex | StopReason::ParserTooComplex => {
                Error::Exhausted(format!("the grammar takes too much work: {message}"))
            }
            _ => invalid!("structured output: {message}"),
        }
    }
}

fn shortened(message: &str) -> String {
    let message = message.split("<backtrace>").next().unwrap_or_default().trim();
    message.chars().take(MAX_MESSAGE_CHARS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::tokenizer::samples;

    fn engine() -> (Arc<Tokenizer>, GrammarEngine) {
        let tokenizer = samples::byte_level();
        (tokenizer.clone(), GrammarEngine::new(tokenizer).unwrap())
    }

    /// Whether the grammar takes `text`, byte by byte, each time within its mask, and may end there.
    fn takes(engine: &GrammarEngine, tokenizer: &Tokenizer, grammar: &Grammar, text: &str) -> bool {
        let mut state = engine.compile(grammar).unwrap();
        for byte in text.bytes() {
            let id = samples::byte_id(tokenizer, byte);
            if !state.allowed().unwrap().is_allowed(id) {
                return false;
            }
            state.accept(id).unwrap();
        }
        let may_end = state.may_end().unwrap();
        assert_eq!(state.allowed().unwrap().is_allowed(tokenizer.eos_id().unwrap()), may_end);
        may_end
    }

    #[test]
    fn every_kind_of_grammar_takes_its_texts_only() {
        let (tokenizer, engine) = engine();
        let schema = json!({"type": "object", "properties": {"n": {"type": "integer"}, "s": {"enum": ["x", "\u{e9}"]}},
            "required": ["n"], "additionalProperties": false});
        let choices = Grammar::Choice(vec!["yes".into(), "yes \"sir\"\n".into(), "no/\\\u{e9}".into()]);
        let cases = [
            (Grammar::JsonObject, r#"{"a": [1, {"b": null}]}"#, true),
            (Grammar::JsonObject, "[1]", false),
            (Grammar::JsonObject, r#"{"a": "#, false),
            (Grammar::JsonSchema(schema.clone()), "{\"n\": 12, \"s\": \"\u{e9}\"}", true),
            (Grammar::JsonSchema(schema.clone()), "{\n \"n\": -1 }", true),
            (Grammar::JsonSchema(schema.clone()), r#"{"n": "12"}"#, false),
            (Grammar::JsonSchema(schema), r#"{"s": "x"}"#, false),
            (Grammar::Regex(r"[ab]{2,3}/\d+".into()), "aba/42", true),
            (Grammar::Regex(r"[ab]{2,3}/\d+".into()), "a/42", false),
            (Grammar::Lark("start: \"a\" tail\ntail: \"b\" | \"(\" tail \")\"".into()), "a((b))", true),
            (Grammar::Lark("start: \"a\" tail\ntail: \"b\" | \"(\" tail \")\"".into()), "a((b)", false),
            (choices.clone(), "yes", true),
            (choices.clone(), "yes \"sir\"\n", true),
            (choices.clone(), "no/\\\u{e9}", true),
            (choices, "ye", false),
        ];
        for (grammar, text, wanted) in cases {
            assert_eq!(takes(&engine, &tokenizer, &grammar, text), wanted, "{grammar:?} {text:?}");
        }
    }

    #[test]
    fn masks_are_written_whole_cut_and_filled_up() {
        let (tokenizer, engine) = engine();
        for grammar in [Grammar::JsonObject, Grammar::Regex(r"(.|\n)*".into())] {
            let mut state = engine.compile(&grammar).unwrap();
            assert!(state.mask().is_none());
            state.allowed().unwrap();
            let mask = state.mask().unwrap();
            for num_words in [1, tokenizer.vocab_size().div_ceil(32), 2 + tokenizer.vocab_size().div_ceil(32)] {
                let mut words = vec![u32::MAX; num_words];
                mask.write(&mut words);
                for id in 0..num_words as u32 * 32 {
                    let is_set = words[id as usize / 32] >> (id % 32) & 1 == 1;
                    assert_eq!(is_set, mask.is_allowed(id), "{id} of {num_words} words");
                }
            }
        }
    }

    #[test]
    fn whitespace_is_bounded() {
        let (tokenizer, engine) = engine();
        let text = format!("{{{}}}", " ".repeat(21));
        assert!(!takes(&engine, &tokenizer, &Grammar::JsonObject, &text));
        assert!(takes(&engine, &tokenizer, &Grammar::JsonObject, "{    }"));
    }

    #[test]
    fn masks_know_longer_tokens_and_hide_special_ones() {
        let (tokenizer, engine) = engine();
        let mut state = engine.compile(&Grammar::Regex("true|tr<\\|im_end\\|>".into())).unwrap();
        let id = |text: &str| tokenizer.id_of(text).unwrap();
        let allowed: Vec<u32> = state.allowed().unwrap().iter().collect();
        assert_eq!(allowed, [id("t"), id("tr"), id("tru"), id("true")]);
        assert_eq!(state.allowed().unwrap().num_allowed(), 4);
        state.accept(id("tr")).unwrap();
        let mut other = state.clone();
        state.accept(id("u")).unwrap();
        state.accept(id("e")).unwrap();
        assert!(state.is_finished() && state.may_end().unwrap());
        let end: Vec<u32> = state.allowed().unwrap().iter().collect();
        assert_eq!(end, tokenizer.end_ids());
        state.accept(end[0]).unwrap();
        assert!(!other.allowed().unwrap().is_allowed(id("<|im_end|>")), "the text of a special token is not the token");
        assert!(other.allowed().unwrap().is_allowed(id("<")));
        assert!(!other.is_finished());
    }

    #[test]
    fn tokens_outside_the_grammar_are_refused() {
        let (tokenizer, engine) = engine();
        let mut state = engine.compile(&Grammar::Choice(vec!["aa".into()])).unwrap();
        let error = state.accept(tokenizer.id_of("b").unwrap()).unwrap_err();
        assert!(matches!(error, Error::Invalid(_)), "{error:?}");
        assert!(!state.is_finished());
        let mut state = engine.compile(&Grammar::Choice(vec!["aa".into()])).unwrap();
        assert!(state.accept(tokenizer.eos_id().unwrap()).is_err(), "the text cannot end yet");
        let mut state = engine.compile(&Grammar::Choice(vec!["aa".into()])).unwrap();
        assert!(state.accept(1 << 30).is_err());
    }

    #[test]
    fn bad_grammars_are_refused() {
        let (_, engine) = engine();
        let bad = [
            Grammar::Regex("(".into()),
            Grammar::Lark("start: missing".into()),
            Grammar::Lark("x".repeat(MAX_GRAMMAR_BYTES + 1)),
            Grammar::JsonSchema(json!({"type": "nonsense"})),
            Grammar::JsonSchema(json!({"$ref": "http://127.0.0.1:1/schema.json"})),
            Grammar::JsonSchema(json!(17)),
            Grammar::JsonSchema(json!({"type": "string", "minLength": 5, "maxLength": 2})),
            Grammar::Choice(vec![]),
            Grammar::Choice(vec![String::new(); MAX_CHOICES + 1]),
        ];
        for grammar in bad {
            let error = engine.compile(&grammar).err().map(|error| matches!(error, Error::Invalid(_)));
            assert_eq!(error, Some(true), "{:.60}", format!("{grammar:?}"));
        }
    }

    #[test]
    fn heavy_grammars_stay_within_limits() {
        let (tokenizer, engine) = engine();
        let regexes = ["a{1000000}{1000000}", "([ab]*a[ab]{400}){2}", "(a?){5000}a{5000}", "((((a*)*)*)*)*b"];
        for regex in regexes {
            let Ok(mut state) = engine.compile(&Grammar::Regex(regex.into())) else { continue };
            for _ in 0..200 {
                let Ok(mask) = state.allowed() else { break };
                let next = mask.iter().next().unwrap();
                if tokenizer.end_ids().contains(&next) || state.accept(next).is_err() {
                    break;
                }
            }
        }
    }

    #[test]
    fn states_can_be_sent_to_another_thread() {
        fn sendable<T: Send>() {}
        fn shareable<T: Send + Sync>() {}
        sendable::<GrammarState>();
        shareable::<GrammarEngine>();
    }
}
