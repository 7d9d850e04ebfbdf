//! The server's side of the conversation: JSON over HTTP, errors in its own words.

use std::time::Duration;

use serde_json::Value;
use ureq::Agent;
use ureq::http::Response;

/// Longest answer that is read, in bytes.
const MAX_ANSWER_BYTES: u64 = 256 << 20;
/// How long a prefill may take.
const TIMEOUT: Duration = Duration::from_secs(600);

/// A server that has cubes.
pub(super) struct Client {
    agent: Agent,
    url: String,
    authorization: Option<String>,
}

impl Client {
    /// A client of the server at `url`.
    pub(super) fn new(url: &str, api_key: Option<&str>) -> anyhow::Result<Self> {
        let url = url.trim_end_matches('/').trim_end_matches("/v1").to_owned();
        anyhow::ensure!(url.contains("://"), "'{url}' is no address like http://127.0.0.1:8000");
        let config = Agent::config_builder().http_status_as_error(false).timeout_global(Some(TIMEOUT)).build();
        Ok(Self { agent: config.into(), url, authorization: api_key.map(|key| format!("Bearer {key}")) })
    }

    pub(super) fn get(&self, path: &str, query: &[(&str, String)]) -> anyhow::Result<Value> {
        let query = query.iter().filter(|(_, value)| !value.is_empty());
        let request = query.fold(self.agent.get(self.at(path)), |request, (name, value)| request.query(name, value));
        self.answer(self.signed(request).call())
    }

    pub(super) fn delete(&self, path: &str) -> anyhow::Result<Value> {
        self.answer(self.signed(self.agent.delete(self.at(path))).call())
    }

    pub(super) fn post(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        let request = self.signed(self.agent.post(self.at(path))).header("Content-Type", "application/json");
        self.answer(request.send(body.to_string()))
    }

    fn at(&self, path: &str) -> String {
        format!("{}{path}", self.url)
    }

    fn signed<B>(&self, request: ureq::RequestBuilder<B>) -> ureq::RequestBuilder<B> {
        match &self.authorization {
            Some(authorization) => request.header("Authorization", authorization),
            None => request,
        }
    }

    fn answer(&self, response: Result<Response<ureq::Body>, ureq::Error>) -> anyhow::Result<Value> {
        let mut response = response.map_err(|error| anyhow::anyhow!("no answer from {}: {error}", self.url))?;
        let status = response.status();
        let text = response.body_mut().with_config().limit(MAX_ANSWER_BYTES).read_to_string()?;
        let answer: Value = serde_json::from_str(&text)
            .map_err(|_| anyhow::anyhow!("{} answered {status} without JSON; is it a mneme server?", self.url))?;
        if status.is_success() {
            return Ok(answer);
        }
        let message = answer["error"]["message"].as_str().unwrap_or("no reason given");
        anyhow::bail!("{message} ({status})")
    }
}
