//! Request bodies: read within bounds, parsed into structs, with errors that name the field at fault.
//!
//! Unknown fields are ignored: gateways add their own.

use axum::body::{Body, Bytes};
use axum::extract::{FromRequest, Request};
use axum::http::{HeaderMap, header};
use serde::de::DeserializeOwned;

use super::AppRef;
use super::error::ApiError;

/// The bytes of a body that claims to be a JSON object. The structs that read it each take the fields they know.
pub(super) struct JsonBody(Bytes);

impl JsonBody {
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Reads the fields of `T`; anything else in the object is ignored.
    pub(super) fn parse<T: DeserializeOwned>(&self) -> Result<T, ApiError> {
        let mut deserializer = serde_json::Deserializer::from_slice(&self.0);
        let value = serde_path_to_error::deserialize(&mut deserializer).map_err(parse_error)?;
        deserializer.end().map_err(|error| ApiError::bad_request(format!("The body is not valid JSON: {error}.")))?;
        Ok(value)
    }
}

impl FromRequest<AppRef> for JsonBody {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &AppRef) -> Result<Self, ApiError> {
        if !is_json(request.headers()) {
            return Err(ApiError::unsupported_media_type());
        }
        let limits = &app.config.request_limits;
        if declared_len(request.headers()).is_some_and(|len| len > limits.max_body_bytes as u64) {
            return Err(ApiError::body_too_large(limits.max_body_bytes));
        }
        let read = read_body(request.into_body(), limits.max_body_bytes);
        let bytes = tokio::time::timeout(app.config.connection_limits.body_timeout, read)
            .await
            .map_err(|_| ApiError::bad_request("The body did not arrive in time."))??;
        // A struct can also be read from an array, field by field; no client means that.
        match bytes.iter().find(|byte| !byte.is_ascii_whitespace()) {
            Some(b'{') => Ok(Self(bytes)),
            _ => Err(ApiError::bad_request("The body must be a JSON object.")),
        }
    }
}

fn is_json(headers: &HeaderMap) -> bool {
    let value = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or("");
    let media_type = value.split(';').next().unwrap_or("").trim().to_ascii_lowercase();
    media_type == "application/json" || (media_type.starts_with("application/") && media_type.ends_with("+json"))
}

fn declared_len(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

async fn read_body(body: Body, max_bytes: usize) -> Result<Bytes, ApiError> {
    axum::body::to_bytes(body, max_bytes).await.map_err(|error| match is_length_limit(&error) {
        true => ApiError::body_too_large(max_bytes),
        false => ApiError::bad_request("The body could not be read."),
    })
}

fn is_length_limit(error: &axum::Error) -> bool {
    std::error::Error::source(error).is_some_and(|source| source.is::<http_body_util::LengthLimitError>())
}

fn parse_error(error: serde_path_to_error::Error<serde_json::Error>) -> ApiError {
    use serde_json::error::Category;
    let path = error.path().to_string();
    let error = error.into_inner();
    let message = error.to_string();
    if matches!(error.classify(), Category::Syntax | Category::Eof | Category::Io) {
        return ApiError::bad_request(format!("The body is not valid JSON: {message}."));
    }
    let message = message.rsplit_once(" at line ").map_or(message.as_str(), |(text, _)| text);
    let missing = message.strip_prefix("missing field `").and_then(|rest| rest.strip_suffix('`'));
    let field = match (path.as_str(), missing) {
        (".", Some(field)) => field.to_owned(),
        (path, Some(field)) => format!("{path}.{field}"),
        (".", None) => return ApiError::bad_request(message),
        (path, None) => path.to_owned(),
    };
    ApiError::invalid_field(field.clone(), format!("{field}: {message}."))
}
