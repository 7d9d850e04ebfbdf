//! API keys: a bearer token compared in constant time, before the body of a request is read.

use axum::extract::{Request, State};
use axum::http::{HeaderMap, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

use super::AppRef;
use super::error::ApiError;
use crate::memory::Principal;

/// The keys that open the server, as SHA-256 digests; comparing digests hides length and content of the keys.
pub struct ApiKeys {
    digests: Vec<[u8; 32]>,
    /// Of the key that changes the server; none lets everybody who is let in do that.
    admin: Option<[u8; 32]>,
}

impl ApiKeys {
    /// No `keys` mean an open server. Where there are some, the `admin` key opens it as well.
    pub fn new(keys: &[String], admin: Option<&String>) -> Self {
        let digest = |key: &String| Sha256::digest(key).into();
        Self { digests: keys.iter().map(digest).collect(), admin: admin.map(digest) }
    }

    /// Whether the sender of a request, who was let in, may change the server.
    pub fn check_admin(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        let Some(admin) = &self.admin else { return Ok(()) };
        let token = bearer_token(headers).unwrap_or_default();
        let digest: [u8; 32] = Sha256::digest(token).into();
        match admin.ct_eq(&digest).into() {
            true => Ok(()),
            false => Err(ApiError::forbidden("This changes the server for everyone and needs its admin key.")),
        }
    }

    /// Whether everybody is let in.
    pub(crate) fn is_open(&self) -> bool {
        self.digests.is_empty()
    }

    /// Who sent the request, if it may pass. Every key is compared, so the time does not tell which one matched.
    pub fn check(&self, headers: &HeaderMap) -> Result<Principal, ApiError> {
        if self.is_open() {
            return Ok(Principal::local());
        }
        let token = bearer_token(headers)
            .ok_or_else(|| ApiError::unauthorized("Send an API key in the header 'Authorization: Bearer <key>'."))?;
        let digest: [u8; 32] = Sha256::digest(token).into();
        let matches =
            self.digests.iter().chain(&self.admin).fold(Choice::from(0), |found, key| found | key.ct_eq(&digest));
        if matches.into() {
            Ok(principal_of(&digest))
        } else {
            Err(ApiError::unauthorized("Incorrect API key provided."))
        }
    }
}

/// The name by which the holder of a key is known, the same in every run.
fn principal_of(digest: &[u8; 32]) -> Principal {
    let name: String = digest[..8].iter().map(|byte| format!("{byte:02x}")).collect();
    format!("key-{name}").parse().expect("hexadecimal digits are visible ASCII characters")
}

fn bearer_token(headers: &HeaderMap) -> Option<&[u8]> {
    let value = headers.get(header::AUTHORIZATION)?.as_bytes();
    let (scheme, token) = value.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| token.trim_ascii())
}

/// Refuses requests without a key, and tells handlers who asks. Only the liveness probes pass freely.
pub(super) async fn require_key(State(app): State<AppRef>, mut request: Request, next: Next) -> Response {
    let open = matches!(request.uri().path(), "/health" | "/ping");
    if !open {
        match app.api_keys.check(request.headers()) {
            Ok(principal) => request.extensions_mut().insert(principal),
            Err(error) => return error.into_response(),
        };
    }
    next.run(request).await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_header(value: &str) -> HeaderMap {
        HeaderMap::from_iter([(header::AUTHORIZATION, value.parse().unwrap())])
    }

    #[test]
    fn only_the_keys_given_open_the_server() {
        let keys = ApiKeys::new(&["one".into(), "two".into()], None);
        for (header, passes) in [
            ("Bearer one", true),
            ("bearer two", true),
            ("Bearer three", false),
            ("Bearer ", false),
            ("one", false),
            ("Basic one", false),
        ] {
            assert_eq!(keys.check(&with_header(header)).is_ok(), passes, "{header}");
        }
        assert!(keys.check(&HeaderMap::new()).is_err());
        let principal = |key: &str| keys.check(&with_header(&format!("Bearer {key}"))).unwrap();
        assert_ne!(principal("one"), principal("two"));
        assert_eq!(principal("one").as_str(), "key-7692c3ad3540bb80");
        assert!(ApiKeys::new(&[], None).check(&HeaderMap::new()).is_ok());
    }

    #[test]
    fn only_the_admin_key_changes_a_server_that_has_one() {
        let admin = "root".to_owned();
        let may = |keys: &ApiKeys, key: &str| {
            let headers = with_header(&format!("Bearer {key}"));
            (keys.check(&headers).is_ok(), keys.check_admin(&headers).is_ok())
        };
        let keyed = ApiKeys::new(&["one".into()], Some(&admin));
        assert_eq!(["one", "root", "two"].map(|key| may(&keyed, key)), [(true, false), (true, true), (false, false)]);
        let open = ApiKeys::new(&[], Some(&admin));
        assert_eq!(["one", "root"].map(|key| may(&open, key)), [(true, false), (true, true)]);
        assert!(open.check_admin(&HeaderMap::new()).is_err());
        assert!(ApiKeys::new(&["one".into()], None).check_admin(&HeaderMap::new()).is_ok());
    }
}
