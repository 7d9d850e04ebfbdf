//! Which names a server answers to.
//!
//! A server on loopback without keys is open to this machine. A page from elsewhere can point a name of its own at
//! 127.0.0.1 and have the browser talk to that server as if it were the page's own (DNS rebinding); what gives it away
//! is the name in `Host`. No header that would let pages read answers across origins is ever sent.

use std::borrow::Cow;
use std::net::{IpAddr, SocketAddr};

use axum::extract::{Request, State};
use axum::http::header;
use axum::http::uri::Authority;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::AppRef;
use super::config::ServerConfig;
use super::error::ApiError;

/// Characters of a refused name that the answer repeats.
const MAX_SHOWN_CHARS: usize = 100;

/// The names in `Host` that are answered.
pub(super) struct Hosts {
    /// Besides the names of loopback; `None` answers to any.
    further: Option<Vec<String>>,
}

impl Hosts {
    /// Those of a server that listens on `address`: all when it is reached from elsewhere or asks for keys.
    pub(super) fn new(config: &ServerConfig, address: SocketAddr) -> Self {
        let is_open_to_this_machine = address.ip().is_loopback() && config.api_keys.is_empty();
        let names = || config.allowed_hosts.iter().chain([&config.host]).map(|name| plain(name).into_owned()).collect();
        Self { further: is_open_to_this_machine.then(names) }
    }

    /// Refuses a request that asks for another name, in its target or in `Host`. One without either passes: no browser
    /// sends such.
    fn check(&self, request: &Request) -> Result<(), ApiError> {
        let Some(further) = &self.further else { return Ok(()) };
        let target = request.uri().authority().map(|authority| authority.as_str().as_bytes());
        let headers = request.headers().get_all(header::HOST).iter().map(|host| host.as_bytes());
        match target.into_iter().chain(headers).find(|asked| !is_allowed(asked, further)) {
            Some(asked) => Err(refusal(asked)),
            None => Ok(()),
        }
    }
}

/// Whether `asked`, a name with or without a port, means this machine.
fn is_allowed(asked: &[u8], further: &[String]) -> bool {
    let Ok(authority) = Authority::try_from(asked) else { return false };
    if authority.as_str().contains('@') {
        return false;
    }
    let name = plain(authority.host());
    let is_local_name = name == "localhost" || name.ends_with(".localhost");
    let is_loopback = || name.parse().is_ok_and(|address: IpAddr| address.is_loopback());
    is_local_name || is_loopback() || further.iter().any(|known| *known == name)
}

/// The name without what does not tell names apart: case, the root's dot, the brackets of an address.
fn plain(name: &str) -> Cow<'_, str> {
    let name = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    let name = name.strip_suffix('.').unwrap_or(name);
    if name.bytes().any(|byte| byte.is_ascii_uppercase()) { name.to_ascii_lowercase().into() } else { name.into() }
}

fn refusal(asked: &[u8]) -> ApiError {
    let shown: String = String::from_utf8_lossy(asked).chars().take(MAX_SHOWN_CHARS).collect();
    ApiError::forbidden(format!(
        "The host {shown:?} is not answered to: a server on loopback without API keys answers to localhost and loopback \
         addresses only. Start it with --allowed-host and that name, or with --api-key."
    ))
    .with_code("host_not_allowed")
}

/// Refuses requests for names that are not this server's.
pub(super) async fn require_known_host(State(app): State<AppRef>, request: Request, next: Next) -> Response {
    if let Err(error) = app.hosts.check(&request) {
        return error.into_response();
    }
    next.run(request).await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(target: &str, hosts: &[&str]) -> Request {
        let builder = hosts.iter().fold(Request::builder().uri(target), |builder, host| builder.header("host", *host));
        builder.body(axum::body::Body::empty()).unwrap()
    }

    fn open_config() -> ServerConfig {
        ServerConfig {
            host: "Box.example".into(),
            allowed_hosts: vec!["models.example.".into()],
            ..ServerConfig::default()
        }
    }

    fn loopback() -> SocketAddr {
        "127.0.0.1:8000".parse().unwrap()
    }

    #[test]
    fn an_open_server_on_loopback_answers_to_its_own_names_only() {
        let hosts = Hosts::new(&open_config(), loopback());
        for (host, passes) in [
            ("localhost", true),
            ("LOCALHOST:8000", true),
            ("localhost.", true),
            ("app.localhost:3000", true),
            ("127.0.0.1", true),
            ("127.1.2.3:1", true),
            ("[::1]", true),
            ("[::1]:8000", true),
            ("box.example:8000", true),
            ("MODELS.example", true),
            ("attacker.example", false),
            ("attacker.example:8000", false),
            ("localhost.attacker.example", false),
            ("notlocalhost", false),
            ("127.0.0.1.attacker.example", false),
            ("10.0.0.1", false),
            ("[2001:db8::1]:8000", false),
            ("localhost@attacker.example", false),
            ("attacker@localhost", false),
            ("", false),
            ("local host", false),
        ] {
            assert_eq!(hosts.check(&request("/health", &[host])).is_ok(), passes, "{host:?}");
        }
    }

    #[test]
    fn every_name_in_a_request_counts() {
        let hosts = Hosts::new(&open_config(), loopback());
        assert!(hosts.check(&request("/health", &[])).is_ok());
        assert!(hosts.check(&request("/health", &["localhost", "attacker.example"])).is_err());
        assert!(hosts.check(&request("http://attacker.example/health", &["localhost"])).is_err());
        assert!(hosts.check(&request("http://localhost:1/health", &["localhost"])).is_ok());
    }

    #[test]
    fn servers_with_keys_or_open_to_others_answer_to_any_name() {
        let keyed = ServerConfig { api_keys: vec!["key".into()], ..open_config() };
        for (config, address) in [(keyed, loopback()), (open_config(), "192.0.2.1:8000".parse().unwrap())] {
            assert!(Hosts::new(&config, address).check(&request("/", &["anything.example"])).is_ok());
        }
    }

    #[test]
    fn a_refusal_repeats_only_the_beginning_of_a_name() {
        let error = refusal("x".repeat(10_000).as_bytes());
        assert!(error.object().message.len() < 400);
    }
}
