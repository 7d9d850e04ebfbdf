//! What the server is started with: the model it serves and how it serves it.

use std::sync::Arc;
use std::time::Duration;

use super::adapters::{AdapterRegistry, Elsewhere};
use super::cubes::{CubeService, PREFILL_INTERVAL};
use super::error::ApiError;
use super::limits::{ConnectionLimits, RequestLimits};
use crate::engine::AppliedAdapter;
use crate::engine::handle::EngineHandle;
use crate::engine::request::SamplingParams;
use crate::text::tool_calls::ToolFormat;
use crate::text::{ChatTemplate, GrammarEngine, Tokenizer};

/// The model behind the endpoints.
pub struct ServedModel {
    /// Names it answers to; never empty. The first is the one in answers.
    pub names: Vec<String>,
    /// Runs it.
    pub engine: EngineHandle,
    /// Its vocabulary.
    pub tokenizer: Arc<Tokenizer>,
    /// Turns chats into prompts; a model without one serves no chat.
    pub template: Option<Arc<ChatTemplate>>,
    /// Compiles structured-output grammars for its vocabulary.
    pub grammar: Arc<GrammarEngine>,
    /// Used where a request says nothing; from the checkpoint's `generation_config.json`.
    pub default_sampling: SamplingParams,
    /// Unix time of the start, as `/v1/models` tells it.
    pub created: u64,
    /// Where the checkpoint came from, as `/v1/models` tells it.
    pub root: String,
    /// Memory cubes, if the server keeps any.
    pub cubes: Option<CubeService>,
    /// Adapters under names, if the server takes any.
    pub adapters: Option<AdapterRegistry>,
}

impl ServedModel {
    /// The name in answers.
    pub fn name(&self) -> &str {
        &self.names[0]
    }

    /// How the model writes tool calls, if its template teaches it a known way.
    pub(crate) fn tool_format(&self) -> Option<ToolFormat> {
        self.template.as_ref().and_then(|template| template.source()).and_then(ToolFormat::detect)
    }

    /// The adapters that a model's name means: none for the model itself, which is also what a request means that names
    /// none. What has no name here is looked for `elsewhere`.
    pub(super) fn adapters_of(
        &self,
        requested: Option<&str>,
        elsewhere: Elsewhere<'_>,
    ) -> Result<Vec<AppliedAdapter>, ApiError> {
        let Some(name) = requested else { return Ok(Vec::new()) };
        let found = match &self.adapters {
            Some(registry) => registry.resolve(name, &self.names, elsewhere)?,
            None => self.names.iter().any(|known| known == name).then(Vec::new),
        };
        found.ok_or_else(|| ApiError::unknown_model(name))
    }
}

/// How to serve.
#[derive(Debug, Clone)]
pub struct ServerConfig {
    /// Address to listen on. Loopback unless told otherwise: without keys, everyone who can connect is let in.
    pub host: String,
    /// Port to listen on; 0 takes a free one.
    pub port: u16,
    /// Names in `Host`, besides those of loopback and `host`, that a server on loopback without keys answers to.
    pub allowed_hosts: Vec<String>,
    /// Keys that open the server; none means open to all.
    pub api_keys: Vec<String>,
    /// The key that loads and unloads adapters; without one, everybody who is let in may.
    pub admin_api_key: Option<String>,
    /// `owned_by` of the models; gateways that look for an engine they know want `vllm` here.
    pub owned_by: String,
    /// Whether `/metrics` answers.
    pub metrics: bool,
    /// How long calls in progress may go on after a shutdown was asked for.
    pub drain_timeout: Duration,
    /// A comment is sent on a stream that has been silent for this long, so that proxies keep it open.
    pub keep_alive_interval: Duration,
    /// Time between two looks for cubes that lack KV, which is computed while nothing else is to be.
    pub prefill_interval: Duration,
    /// Bounds of a request.
    pub request_limits: RequestLimits,
    /// Bounds of a connection.
    pub connection_limits: ConnectionLimits,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            host: "127.0.0.1".into(),
            port: 8000,
            allowed_hosts: Vec::new(),
            api_keys: Vec::new(),
            admin_api_key: None,
            owned_by: "mneme".into(),
            metrics: true,
            drain_timeout: Duration::from_secs(30),
            keep_alive_interval: Duration::from_secs(15),
            prefill_interval: PREFILL_INTERVAL,
            request_limits: RequestLimits::default(),
            connection_limits: ConnectionLimits::default(),
        }
    }
}
