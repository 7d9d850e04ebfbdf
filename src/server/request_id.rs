//! `x-request-id`: taken from the client when it is usable, made otherwise, and sent back with every answer.

use axum::extract::Request;
use axum::http::HeaderValue;
use axum::middleware::Next;
use axum::response::Response;
use uuid::Uuid;

const HEADER: &str = "x-request-id";
const MAX_CHARS: usize = 128;

/// The name of a request in logs, ids and the answer's header.
#[derive(Debug, Clone)]
pub(super) struct RequestId(pub(super) String);

impl RequestId {
    /// `text` if it can stand in a header and an id.
    pub(super) fn from_client(text: &str) -> Option<Self> {
        let usable = !text.is_empty() && text.len() <= MAX_CHARS && text.bytes().all(|byte| byte.is_ascii_graphic());
        usable.then(|| Self(text.to_owned()))
    }

    fn random() -> Self {
        Self(Uuid::new_v4().simple().to_string())
    }
}

/// Gives every request its id and every answer the header.
pub(super) async fn assign(mut request: Request, next: Next) -> Response {
    let given = request.headers().get(HEADER).and_then(|value| value.to_str().ok());
    let id = given.and_then(RequestId::from_client).unwrap_or_else(RequestId::random);
    let value = HeaderValue::from_str(&id.0).expect("a request id is graphic ASCII");
    request.extensions_mut().insert(id);
    let mut response = next.run(request).await;
    response.headers_mut().insert(HEADER, value);
    response
}
