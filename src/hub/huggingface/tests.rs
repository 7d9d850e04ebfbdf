//! Tests against a small hub on the loopback address.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use sha2::{Digest, Sha256};

use super::*;
use crate::hub::progress::Silent;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What the server has and how it behaves.
#[derive(Default)]
struct Behaviour {
    files: HashMap<String, Vec<u8>>,
    /// Answer to every request instead of a file.
    status: Option<u16>,
    /// Answer to requests for files only.
    file_status: Option<u16>,
    /// Cut each large transfer this many times, half way through what is left.
    num_cuts: usize,
    /// Send other bytes than the tag promises.
    damage: bool,
    /// Accept and never answer.
    silent: bool,
    requests: Vec<String>,
}

struct Hub {
    endpoint: String,
    behaviour: Arc<Mutex<Behaviour>>,
    cache: tempfile::TempDir,
}

impl Hub {
    fn serve(behaviour: Behaviour) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let behaviour = Arc::new(Mutex::new(behaviour));
        let shared = Arc::clone(&behaviour);
        // Ends with the process; each test has its own.
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = Arc::clone(&shared);
                std::thread::spawn(move || answer(stream, &shared));
            }
        });
        Hub { endpoint, behaviour, cache: tempfile::tempdir().unwrap() }
    }

    fn settings(&self) -> Settings {
        let lookup = |name: &str| match name {
            "HF_ENDPOINT" => Some(format!("{}/", self.endpoint)),
            "HF_HOME" => self.cache.path().to_str().map(str::to_owned),
            _ => None,
        };
        Settings::from_lookup(lookup)
    }

    fn fetch(&self, wanted: &RepoFile) -> Result<PathBuf> {
        Repository::new(&self.settings(), "org/name", "main").fetch(wanted, &mut Silent)
    }

    fn requests(&self) -> Vec<String> {
        self.behaviour.lock().unwrap().requests.clone()
    }
}

/// Serves one connection, one request.
fn answer(mut stream: TcpStream, shared: &Mutex<Behaviour>) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(|line| line.ok());
    let Some(request) = lines.next() else { return };
    let mut head = request.clone();
    let mut start = 0usize;
    for line in lines.by_ref().take_while(|line| !line.is_empty()) {
        if let Some(range) = line.to_ascii_lowercase().strip_prefix("range: bytes=") {
            start = range.split('-').next().unwrap().parse().unwrap();
            head = format!("{head} {range}");
        }
        if line.to_ascii_lowercase().starts_with("authorization") {
            head = format!("{head} {line}");
        }
    }
    let mut behaviour = shared.lock().unwrap();
    behaviour.requests.push(head.clone());
    if behaviour.silent {
        drop(behaviour);
        // Holds the connection open until the client closes it.
        let _ = stream.peek(&mut [0]);
        lines.for_each(drop);
        return;
    }
    let path = request.split(' ').nth(1).unwrap().to_owned();
    let is_probe = head.contains(" 0-0");
    let (bytes, is_cut) = response(&mut behaviour, &path, start, is_probe);
    drop(behaviour);
    let _ = stream.write_all(&bytes);
    if is_cut {
        let _ = stream.shutdown(std::net::Shutdown::Both);
    }
}

fn response(behaviour: &mut Behaviour, path: &str, start: usize, is_probe: bool) -> (Vec<u8>, bool) {
    let status_only = |status: u16| format!("HTTP/1.1 {status} X\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    if let Some(status) = behaviour.status {
        return (status_only(status).into_bytes(), false);
    }
    if path == "/api/models/org/name/revision/main" {
        let names: Vec<_> = behaviour.files.keys().map(|name| serde_json::json!({ "rfilename": name })).collect();
        let body = serde_json::json!({ "sha": COMMIT, "siblings": names }).to_string();
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
        return ((head + &body).into_bytes(), false);
    }
    let file = path.strip_prefix("/org/name/resolve/main/").and_then(|name| behaviour.files.get(name));
    let Some(file) = file.cloned() else { return (status_only(404).into_bytes(), false) };
    if let Some(status) = behaviour.file_status {
        return (status_only(status).into_bytes(), false);
    }
    if start > file.len() {
        return (status_only(416).into_bytes(), false);
    }
    let end = if is_probe { 1.min(file.len()) } else { file.len() };
    let mut head = format!(
        "HTTP/1.1 206 Partial\r\nx-repo-commit: {COMMIT}\r\netag: \"{:x}\"\r\nContent-Range: bytes {start}-{}/{}\r\n",
        Sha256::digest(&file),
        end.max(1) - 1,
        file.len()
    );
    head += &format!("Content-Length: {}\r\nConnection: close\r\n\r\n", end - start);
    let mut body = file[start..end].to_vec();
    let is_cut = !is_probe && behaviour.num_cuts > 0 && body.len() > 1000;
    if is_cut {
        behaviour.num_cuts -= 1;
        body.truncate(body.len() / 2);
    }
    if behaviour.damage && !is_probe && body.len() > 1000 {
        body[500] ^= 1;
    }
    ([head.into_bytes(), body].concat(), is_cut)
}

fn weights(seed: u32) -> Vec<u8> {
    (0..100_000u32).flat_map(|x| x.wrapping_mul(2_654_435_761).wrapping_add(seed).to_le_bytes()).collect()
}

fn sharded() -> HashMap<String, Vec<u8>> {
    let index = r#"{"weight_map":{"a":"m-00001-of-00002.safetensors","b":"m-00002-of-00002.safetensors"}}"#;
    let mut files = HashMap::new();
    for (name, bytes) in [
        ("config.json", b"{}".to_vec()),
        ("tokenizer.json", b"{\"t\":1}".to_vec()),
        ("README.md", b"not wanted".to_vec()),
        (INDEX, index.as_bytes().to_vec()),
        ("m-00001-of-00002.safetensors", weights(1)),
        ("m-00002-of-00002.safetensors", weights(2)),
        ("tiny-Q4_K_M.gguf", weights(3)),
        ("tiny-Q8_0.gguf", weights(4)),
    ] {
        files.insert(name.to_owned(), bytes);
    }
    files
}

#[test]
fn a_sharded_checkpoint_is_fetched_whole_and_then_cached() {
    let hub = Hub::serve(Behaviour { files: sharded(), ..Behaviour::default() });
    let folder = hub.fetch(&RepoFile::Checkpoint).unwrap();
    for name in ["config.json", "tokenizer.json", "m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"] {
        assert_eq!(std::fs::read(folder.join(name)).unwrap(), sharded()[name], "{name}");
    }
    assert!(!folder.join("README.md").exists() && !folder.join("tiny-Q8_0.gguf").exists());
    let num_requests = hub.requests().len();
    let settings = hub.settings();
    let repository = Repository::new(&settings, "org/name", "main");
    assert_eq!(repository.cached(&RepoFile::Checkpoint), Some(folder));
    assert_eq!(hub.requests().len(), num_requests);
    repository.fetch(&RepoFile::Checkpoint, &mut Silent).unwrap();
    assert_eq!(hub.requests().len(), num_requests + 1, "only the branch's commit is asked for");
}

#[test]
fn one_gguf_file_is_fetched_by_name_or_quantization() {
    let hub = Hub::serve(Behaviour { files: sharded(), ..Behaviour::default() });
    let path = hub.fetch(&RepoFile::Gguf("tiny-Q8_0.gguf".into())).unwrap();
    assert_eq!(std::fs::read(path).unwrap(), weights(4));
    let path = hub.fetch(&RepoFile::Quantization("q4_k_m".into())).unwrap();
    assert_eq!(std::fs::read(path).unwrap(), weights(3));
    let message = hub.fetch(&RepoFile::Quantization("Q6_K".into())).unwrap_err().to_string();
    assert!(message.contains("it has:") && message.contains("tiny-Q8_0.gguf"), "{message}");
    let message = hub.fetch(&RepoFile::Gguf("none.gguf".into())).unwrap_err().to_string();
    assert!(message.contains("has no file none.gguf"), "{message}");
}

#[test]
fn a_cut_transfer_goes_on_where_it_stopped() {
    let files = HashMap::from([("config.json".into(), b"{}".to_vec()), (SINGLE.into(), weights(1))]);
    let hub = Hub::serve(Behaviour { files, num_cuts: 2, ..Behaviour::default() });
    let folder = hub.fetch(&RepoFile::Checkpoint).unwrap();
    assert_eq!(std::fs::read(folder.join(SINGLE)).unwrap(), weights(1));
    let resumed = hub.requests().iter().any(|head| head.contains(" 200000-"));
    assert!(resumed, "{:?}", hub.requests());
}

#[test]
fn an_interrupted_fetch_resumes_in_the_next_run() {
    let files = HashMap::from([("config.json".into(), b"{}".to_vec()), (SINGLE.into(), weights(1))]);
    let hub = Hub::serve(Behaviour { files, num_cuts: NUM_ATTEMPTS, ..Behaviour::default() });
    assert!(matches!(hub.fetch(&RepoFile::Checkpoint), Err(Error::Io { .. })));
    let settings = hub.settings();
    assert_eq!(Repository::new(&settings, "org/name", "main").cached(&RepoFile::Checkpoint), None);
    let folder = hub.fetch(&RepoFile::Checkpoint).unwrap();
    assert_eq!(std::fs::read(folder.join(SINGLE)).unwrap(), weights(1));
    assert!(hub.requests().iter().any(|head| head.contains(" 350000-")), "{:?}", hub.requests());
}

#[test]
fn a_part_file_that_cannot_be_right_is_dropped() {
    let files = HashMap::from([("config.json".into(), b"{}".to_vec()), (SINGLE.into(), weights(1))]);
    for part in [vec![0u8; 400_001], weights(1)] {
        let hub = Hub::serve(Behaviour { files: files.clone(), ..Behaviour::default() });
        let blobs = hub.cache.path().join("hub/models--org--name/blobs");
        std::fs::create_dir_all(&blobs).unwrap();
        std::fs::write(blobs.join(format!("{:x}.part", Sha256::digest(weights(1)))), part).unwrap();
        let folder = hub.fetch(&RepoFile::Checkpoint).unwrap();
        assert_eq!(std::fs::read(folder.join(SINGLE)).unwrap(), weights(1));
    }
}

#[test]
fn bytes_that_do_not_fit_the_digest_are_deleted() {
    let files = HashMap::from([("config.json".into(), b"{}".to_vec()), (SINGLE.into(), weights(1))]);
    let hub = Hub::serve(Behaviour { files, damage: true, ..Behaviour::default() });
    let message = hub.fetch(&RepoFile::Checkpoint).unwrap_err().to_string();
    assert!(message.contains("arrived damaged"), "{message}");
    hub.behaviour.lock().unwrap().damage = false;
    let folder = hub.fetch(&RepoFile::Checkpoint).unwrap();
    assert_eq!(std::fs::read(folder.join(SINGLE)).unwrap(), weights(1));
    // Damage that comes later is found by reading everything.
    let blob = folder.join(SINGLE).canonicalize().unwrap();
    std::fs::write(&blob, weights(9)).unwrap();
    let settings = hub.settings();
    let repository = Repository::new(&settings, "org/name", "main");
    assert_eq!(repository.discard_damaged(&mut Silent).unwrap(), [SINGLE]);
    assert_eq!(repository.cached(&RepoFile::Checkpoint), None);
    hub.fetch(&RepoFile::Checkpoint).unwrap();
    assert_eq!(repository.discard_damaged(&mut Silent).unwrap(), [""; 0]);
}

#[test]
fn refusals_say_what_to_do() {
    for (status, expected) in [(401, "HF_TOKEN"), (403, "gated"), (404, "has no org/name"), (429, "429"), (500, "500")]
    {
        let hub = Hub::serve(Behaviour { status: Some(status), ..Behaviour::default() });
        let message = hub.fetch(&RepoFile::Checkpoint).unwrap_err().to_string();
        assert!(message.contains(expected) && message.contains(&hub.endpoint), "{status}: {message}");
    }
    // A gated repository shows its list of files to everyone, but not the files.
    let hub = Hub::serve(Behaviour { files: sharded(), file_status: Some(401), ..Behaviour::default() });
    let message = hub.fetch(&RepoFile::Checkpoint).unwrap_err().to_string();
    assert!(message.contains("accept its terms") && message.contains("org/name/config.json"), "{message}");
}

#[test]
fn a_repository_without_usable_weights_is_refused() {
    let hub = Hub::serve(Behaviour { files: HashMap::from([("a.gguf".into(), vec![1])]), ..Behaviour::default() });
    let message = hub.fetch(&RepoFile::Checkpoint).unwrap_err().to_string();
    assert!(message.contains("org/name/a.gguf"), "{message}");
    let hub = Hub::serve(Behaviour { files: HashMap::from([("a.bin".into(), vec![1])]), ..Behaviour::default() });
    assert!(matches!(hub.fetch(&RepoFile::Checkpoint), Err(Error::Unsupported(_))));
}

#[test]
fn a_refused_connection_is_an_io_error() {
    let hub = Hub::serve(Behaviour::default());
    // A port that was free a moment ago: nothing listens there.
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let settings = Settings { endpoint: Some(format!("http://{free}")), ..hub.settings() };
    let error = Repository::new(&settings, "org/name", "main").fetch(&RepoFile::Checkpoint, &mut Silent).unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error}");
    assert!(error.to_string().contains("refused"), "{error}");
}

#[test]
fn a_transfer_that_stands_still_is_given_up() {
    let hub = Hub::serve(Behaviour { silent: true, ..Behaviour::default() });
    let settings = Settings { idle: Duration::from_millis(50), ..hub.settings() };
    let repository = Repository::new(&settings, "org/name", "main");
    let error = repository.download(&settings.api().unwrap(), SINGLE, &mut Silent).unwrap_err();
    assert!(error.to_string().contains("nothing arrived"), "{error}");
}

#[test]
fn the_token_is_sent() {
    let hub = Hub::serve(Behaviour { files: sharded(), ..Behaviour::default() });
    let settings = Settings { token: Some("hf_secret".into()), ..hub.settings() };
    Repository::new(&settings, "org/name", "main").fetch(&RepoFile::Checkpoint, &mut Silent).unwrap();
    let all = hub.requests().iter().all(|head| head.to_lowercase().contains("authorization: bearer hf_secret"));
    assert!(all, "{:?}", hub.requests());
}

#[test]
fn offline_asks_nobody() {
    let hub = Hub::serve(Behaviour { files: sharded(), ..Behaviour::default() });
    let settings = Settings { offline: true, ..hub.settings() };
    let error = Repository::new(&settings, "org/name", "main").fetch(&RepoFile::Checkpoint, &mut Silent).unwrap_err();
    assert!(error.to_string().contains("HF_HUB_OFFLINE"), "{error}");
    assert!(hub.requests().is_empty());
}

#[test]
fn settings_come_from_the_usual_variables() {
    let read = |pairs: &[(&str, &str)]| {
        let map: HashMap<String, String> = pairs.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
        Settings::from_lookup(|name| map.get(name).cloned())
    };
    let settings =
        read(&[("HF_ENDPOINT", "http://mirror/"), ("HF_TOKEN", " t\n"), ("HF_HOME", "/h"), ("HF_HUB_OFFLINE", "1")]);
    assert_eq!(settings.endpoint.as_deref(), Some("http://mirror"));
    assert_eq!(settings.token.as_deref(), Some("t"));
    assert_eq!(settings.cache_folder, Some("/h/hub".into()));
    assert!(settings.offline);
    assert_eq!(read(&[("HF_HOME", "/h"), ("HF_HUB_CACHE", "/c")]).cache_folder, Some("/c".into()));
    let settings = read(&[("HF_HUB_OFFLINE", "0"), ("HF_TOKEN", "")]);
    assert!(!settings.offline && settings.token.is_none() && settings.endpoint.is_none());
}
