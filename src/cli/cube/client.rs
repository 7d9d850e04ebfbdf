//! The server's side of the conversation: JSON over HTTP, errors in its own words.

use std::fs::File;
use std::io;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
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

    pub(super) fn delete(&self, path: &str, query: &[(&str, String)]) -> anyhow::Result<Value> {
        let request = self.agent.delete(self.at(path));
        let request = query.iter().fold(request, |request, (name, value)| request.query(name, value));
        self.answer(self.signed(request).call())
    }

    pub(super) fn post(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        let request = self.signed(self.agent.post(self.at(path))).header("Content-Type", "application/json");
        self.answer(request.send(body.to_string()))
    }

    /// Writes the answer to a file; its length.
    pub(super) fn download(&self, path: &str, file: &Path) -> anyhow::Result<u64> {
        let request = self.signed(self.agent.post(self.at(path))).header("Content-Type", "application/json");
        let mut response =
            request.send("{}").map_err(|error| anyhow::anyhow!("no answer from {}: {error}", self.url))?;
        if !response.status().is_success() {
            return self.answer(Ok(response)).map(|_| 0);
        }
        let wanted = response.headers().get("content-length").and_then(|len| len.to_str().ok()?.parse::<u64>().ok());
        let mut out = File::create(file).with_context(|| format!("cannot write {}", file.display()))?;
        let num_bytes = io::copy(&mut response.body_mut().as_reader(), &mut out)?;
        anyhow::ensure!(
            wanted.is_none_or(|wanted| wanted == num_bytes),
            "the server broke off after {num_bytes} bytes"
        );
        out.sync_all()?;
        Ok(num_bytes)
    }

    /// Sends a file.
    pub(super) fn upload(&self, path: &str, query: &[(&str, String)], file: &Path) -> anyhow::Result<Value> {
        let source = File::open(file).with_context(|| format!("cannot read {}", file.display()))?;
        let query = query.iter().filter(|(_, value)| !value.is_empty());
        let request = query.fold(self.agent.post(self.at(path)), |request, (name, value)| request.query(name, value));
        self.answer(self.signed(request).header("Content-Type", "application/octet-stream").send(source))
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
