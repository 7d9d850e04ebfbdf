//! An HTTP/1.1 client for one server: JSON, event streams, connections that are used again.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::{Method, Request, Response, StatusCode, Uri, header};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;

use super::sse::SseDecoder;

/// More than this of an answer is not read.
const MAX_BODY_BYTES: usize = 256 << 20;
/// The same of a JSON answer or an error.
const MAX_JSON_BYTES: usize = 4 << 20;
/// Characters of an error that are shown.
const MAX_ERROR_CHARS: usize = 500;

type Sender = SendRequest<Full<Bytes>>;

/// A server and the idle connections to it.
pub(super) struct Client {
    /// As in `Host`.
    authority: String,
    host: String,
    port: u16,
    /// What the paths of all endpoints begin with.
    base_path: String,
    authorization: Option<header::HeaderValue>,
    timeout: Duration,
    /// Never more than were in use at the same time.
    idle: Mutex<Vec<Sender>>,
}

impl Client {
    /// A client that has not connected yet.
    pub(super) fn new(base_url: &str, api_key: Option<&str>, timeout: Duration) -> anyhow::Result<Self> {
        let uri: Uri = base_url.parse().with_context(|| format!("{base_url:?} is not a URL"))?;
        anyhow::ensure!(
            uri.scheme_str() == Some("http"),
            "{base_url:?}: wanted http://HOST:PORT, nothing else is spoken"
        );
        let authority = uri.authority().context("the URL names no host")?;
        let bearer = |key: &str| header::HeaderValue::from_str(&format!("Bearer {key}"));
        let authorization = api_key.map(bearer).transpose().context("the API key has characters no header can have")?;
        Ok(Self {
            host: authority.host().trim_matches(['[', ']']).to_owned(),
            port: authority.port_u16().unwrap_or(80),
            authority: authority.to_string(),
            base_path: uri.path().trim_end_matches('/').to_owned(),
            authorization,
            timeout,
            idle: Mutex::new(Vec::new()),
        })
    }

    /// `GET`s a JSON document.
    pub(super) async fn get_json(&self, path: &str) -> anyhow::Result<Value> {
        let request = self.request(Method::GET, path, Bytes::new())?;
        tokio::time::timeout(self.timeout, async {
            let (response, _) = self.send(request).await?;
            let body = Limited::new(checked(response).await?, MAX_JSON_BYTES).collect().await;
            let body = body.map_err(|error| anyhow::anyhow!("{error}"))?.to_bytes();
            serde_json::from_slice(&body).context("the answer is not JSON")
        })
        .await
        .with_context(|| self.timed_out())?
    }

    /// `POST`s a JSON body and hands every event of the answer to `on_data`.
    pub(super) async fn post_stream(
        &self,
        path: &str,
        body: Bytes,
        on_data: impl FnMut(&str) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let request = self.request(Method::POST, path, body)?;
        tokio::time::timeout(self.timeout, async {
            let (response, sender) = self.send(request).await?;
            read_events(checked(response).await?, on_data).await?;
            self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(sender);
            Ok(())
        })
        .await
        .with_context(|| self.timed_out())?
    }

    fn timed_out(&self) -> String {
        format!("no whole answer within {} s", self.timeout.as_secs())
    }

    fn request(&self, method: Method, path: &str, body: Bytes) -> anyhow::Result<Request<Full<Bytes>>> {
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = method;
        *request.uri_mut() = format!("{}{path}", self.base_path).parse()?;
        let headers = request.headers_mut();
        headers.insert(header::HOST, self.authority.parse()?);
        headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
        if let Some(authorization) = &self.authorization {
            headers.insert(header::AUTHORIZATION, authorization.clone());
        }
        Ok(request)
    }

    async fn send(&self, request: Request<Full<Bytes>>) -> anyhow::Result<(Response<Incoming>, Sender)> {
        let mut sender = self.connection().await?;
        let response = sender.send_request(request).await.context("the server closed the connection")?;
        Ok((response, sender))
    }

    /// An idle connection that is still open, or a new one.
    async fn connection(&self) -> anyhow::Result<Sender> {
        while let Some(mut sender) = self.take_idle() {
            if sender.ready().await.is_ok() {
                return Ok(sender);
            }
        }
        let stream = TcpStream::connect((self.host.as_str(), self.port)).await;
        let stream = stream.with_context(|| format!("cannot connect to {}", self.authority))?;
        stream.set_nodelay(true)?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await?;
        // Its errors also reach the request or the body that waits on it.
        tokio::spawn(connection);
        Ok(sender)
    }

    fn take_idle(&self) -> Option<Sender> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }
}

/// The body of an answer with a good status; otherwise an error with the server's words.
async fn checked(response: Response<Incoming>) -> anyhow::Result<Incoming> {
    let (head, body) = response.into_parts();
    if head.status == StatusCode::OK {
        return Ok(body);
    }
    let text = match Limited::new(body, MAX_JSON_BYTES).collect().await {
        Ok(body) => String::from_utf8_lossy(&body.to_bytes()).chars().take(MAX_ERROR_CHARS).collect(),
        Err(error) => format!("({error})"),
    };
    anyhow::bail!("HTTP {}: {text}", head.status)
}

async fn read_events(mut body: Incoming, mut on_data: impl FnMut(&str) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let (mut decoder, mut read_bytes) = (SseDecoder::default(), 0);
    while let Some(frame) = body.frame().await {
        let frame = frame.context("the answer broke off")?;
        let Some(data) = frame.data_ref() else { continue };
        read_bytes += data.len();
        anyhow::ensure!(read_bytes <= MAX_BODY_BYTES, "the answer is longer than {MAX_BODY_BYTES} bytes");
        decoder.push(data, &mut on_data)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_taken_apart() {
        let client = |url: &str| Client::new(url, Some("key"), Duration::from_secs(1));
        let plain = client("http://localhost:8123/proxy/").unwrap();
        assert_eq!((plain.host.as_str(), plain.port, plain.base_path.as_str()), ("localhost", 8123, "/proxy"));
        let six = client("http://[::1]").unwrap();
        assert_eq!((six.host.as_str(), six.port, six.authority.as_str()), ("::1", 80, "[::1]"));
        for bad in ["https://localhost", "localhost:8000", "http://", "not a url"] {
            assert!(client(bad).is_err(), "{bad}");
        }
        assert!(Client::new("http://a", Some("line\nbreak"), Duration::from_secs(1)).is_err());
    }
}
