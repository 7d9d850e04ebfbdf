//! Owns fetching repositories and files from a Hugging Face hub or a mirror of one, into that hub's own cache.
//!
//! Transfers, resumption and the cache's layout are the `hf_hub` crate's. Added here: which files a checkpoint needs,
//! bounds on waiting, checks of names and digests, and errors that say what to do.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use serde::Deserialize;

use super::digest;
use super::progress::Progress;
use super::reference::{RepoFile, is_plain};
use super::repo_files::{INDEX, OPTIONAL, REQUIRED, SINGLE, is_complete, pick_quantization, shards};
use crate::{Error, Result, malformed, unsupported};

const CONNECT: Duration = Duration::from_secs(5);
const ANSWER: Duration = Duration::from_secs(20);
/// Connections that carry files have no timeout of their own, so a transfer without a byte for this long is given up.
const IDLE: Duration = Duration::from_secs(30);
const NUM_ATTEMPTS: usize = 3;
const MAX_INFO_BYTES: u64 = 16 << 20;

/// Which hub, which cache, who asks.
#[derive(Debug, Clone)]
pub(super) struct Settings {
    /// Address of the hub; `None` is the public one.
    pub(super) endpoint: Option<String>,
    /// The hub's cache folder; `None` is its default place.
    pub(super) cache_folder: Option<PathBuf>,
    /// Access token for gated and private repositories.
    pub(super) token: Option<String>,
    /// Whether only the cache may be consulted.
    pub(super) offline: bool,
    /// How long a transfer may stand still.
    pub(super) idle: Duration,
}

impl Settings {
    pub(super) fn from_env() -> Self {
        Self::from_lookup(|name| std::env::var(name).ok())
    }

    /// Reads the variables Hugging Face's own tools read.
    fn from_lookup(lookup: impl Fn(&str) -> Option<String>) -> Self {
        let text = |name: &str| lookup(name).map(|v| v.trim().to_owned()).filter(|v| !v.is_empty());
        let home = text("HF_HOME").map(|home| PathBuf::from(home).join("hub"));
        let is_on = |value: String| ["1", "true", "yes", "on"].contains(&value.to_ascii_lowercase().as_str());
        Settings {
            endpoint: text("HF_ENDPOINT").map(|endpoint| endpoint.trim_end_matches('/').to_owned()),
            cache_folder: text("HF_HUB_CACHE").map(PathBuf::from).or(home),
            token: text("HF_TOKEN"),
            offline: text("HF_HUB_OFFLINE").is_some_and(is_on),
            idle: IDLE,
        }
    }

    fn cache(&self) -> Cache {
        self.cache_folder.clone().map_or_else(Cache::default, Cache::new)
    }

    fn place(&self) -> &str {
        self.endpoint.as_deref().unwrap_or("the Hugging Face hub")
    }

    fn api(&self) -> Result<Api> {
        let cache = self.cache();
        let token = self.token.clone().or_else(|| cache.token());
        // Retries are ours: the crate's own resume from a wrong offset when the first attempt wrote nothing.
        let mut builder = ApiBuilder::from_cache(cache).with_progress(false).with_retries(0).with_token(token);
        if let Some(endpoint) = &self.endpoint {
            builder = builder.with_endpoint(endpoint.clone());
        }
        builder.build().map_err(|e| Error::Invalid(format!("cannot set up a client for {}: {e}", self.place())))
    }
}

/// What the hub says about a revision.
#[derive(Debug, Deserialize)]
struct RepoInfo {
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Debug, Deserialize)]
struct Sibling {
    rfilename: String,
}

impl RepoInfo {
    fn has(&self, name: &str) -> bool {
        self.siblings.iter().any(|sibling| sibling.rfilename == name)
    }

    fn gguf_names(&self) -> impl Iterator<Item = &str> {
        let names = self.siblings.iter().map(|sibling| sibling.rfilename.as_str());
        names.filter(|name| name.to_ascii_lowercase().ends_with(".gguf"))
    }
}

/// One revision of one repository.
pub(super) struct Repository<'a> {
    settings: &'a Settings,
    id: &'a str,
    revision: &'a str,
}

impl<'a> Repository<'a> {
    pub(super) fn new(settings: &'a Settings, id: &'a str, revision: &'a str) -> Self {
        Repository { settings, id, revision }
    }

    /// What the cache has of `wanted`: the snapshot's folder, or the GGUF file. Never asks the network.
    pub(super) fn cached(&self, wanted: &RepoFile) -> Option<PathBuf> {
        let folder = self.snapshot()?;
        match wanted {
            RepoFile::Checkpoint => is_complete(&folder).then_some(folder),
            RepoFile::Gguf(name) => Some(folder.join(name)).filter(|path| path.is_file()),
            RepoFile::Quantization(quantization) => {
                let names: Vec<String> = folder
                    .read_dir()
                    .ok()?
                    .flatten()
                    .filter_map(|entry| entry.file_name().into_string().ok())
                    .collect();
                let name = pick_quantization(names.iter().map(String::as_str), quantization).ok()?;
                Some(folder.join(name)).filter(|path| path.is_file())
            }
        }
    }

    /// Brings `wanted` into the cache and says where it is: the snapshot's folder, or the GGUF file.
    ///
    /// # Errors
    /// `NotFound` for what the hub does not have or does not show without a token, `Io` when it cannot be reached,
    /// `Format` when what it sent is damaged, `Unsupported` for a repository without usable weights.
    pub(super) fn fetch(&self, wanted: &RepoFile, progress: &mut dyn Progress) -> Result<PathBuf> {
        if self.settings.offline {
            let id = self.id;
            return Err(Error::NotFound(format!("{id} is not (wholly) in the cache, and HF_HUB_OFFLINE is set")));
        }
        let api = self.settings.api()?;
        let info = self.info(&api)?;
        match wanted {
            RepoFile::Checkpoint => self.fetch_checkpoint(&api, &info, progress),
            RepoFile::Gguf(name) => self.fetch_file(&api, &info, name, progress),
            RepoFile::Quantization(quantization) => {
                let name = pick_quantization(info.gguf_names(), quantization)
                    .map_err(|why| Error::NotFound(format!("{}: {why}", self.id)))?;
                if !is_plain(name, "/") {
                    return Err(malformed!("{} has a file with the odd name {name:?}", self.id));
                }
                self.fetch_file(&api, &info, name, progress)
            }
        }
    }

    fn repo(&self) -> Repo {
        Repo::with_revision(self.id.to_owned(), RepoType::Model, self.revision.to_owned())
    }

    /// The folder of the commit the revision pointed to when it was last fetched.
    fn snapshot(&self) -> Option<PathBuf> {
        let folder = self.settings.cache().path().join(self.repo().folder_name());
        let commit = std::fs::read_to_string(folder.join("refs").join(self.revision));
        let commit = commit.unwrap_or_else(|_| self.revision.to_owned());
        let snapshot = folder.join("snapshots").join(commit.trim());
        (is_plain(commit.trim(), "") && snapshot.is_dir()).then_some(snapshot)
    }

    /// Asks for the revision's commit and files. Being the first request, and one with timeouts, it also finds out
    /// within seconds that a hub is not there.
    fn info(&self, api: &Api) -> Result<RepoInfo> {
        let request = api.repo(self.repo()).info_request().config();
        let request = request.timeout_resolve(Some(CONNECT)).timeout_connect(Some(CONNECT));
        let request = request.timeout_recv_response(Some(ANSWER)).timeout_recv_body(Some(ANSWER)).build();
        let mut response = request.call().map_err(|e| self.request_error(&e, ""))?;
        let body = response.body_mut().with_config().limit(MAX_INFO_BYTES).read_to_vec();
        let body = body.map_err(|e| self.request_error(&e, ""))?;
        let info: RepoInfo = serde_json::from_slice(&body)
            .map_err(|e| malformed!("{} did not answer as a hub does for {}: {e}", self.settings.place(), self.id))?;
        if !is_plain(&info.sha, "") {
            return Err(malformed!("{} gave the odd commit {:?} for {}", self.settings.place(), info.sha, self.id));
        }
        Ok(info)
    }

    fn fetch_checkpoint(&self, api: &Api, info: &RepoInfo, progress: &mut dyn Progress) -> Result<PathBuf> {
        if !info.has(REQUIRED) || !(info.has(SINGLE) || info.has(INDEX)) {
            return Err(self.no_checkpoint(info));
        }
        let config = self.fetch_file(api, info, REQUIRED, progress)?;
        let folder = config.parent().expect("a file has a folder").to_path_buf();
        for name in OPTIONAL.iter().filter(|name| info.has(name)) {
            self.fetch_file(api, info, name, progress)?;
        }
        for name in self.weight_files(api, info, progress)? {
            self.fetch_file(api, info, &name, progress)?;
        }
        if !is_complete(&folder) {
            return Err(malformed!("{} changed while it was downloaded; run the command again", self.id));
        }
        Ok(folder)
    }

    fn weight_files(&self, api: &Api, info: &RepoInfo, progress: &mut dyn Progress) -> Result<Vec<String>> {
        if info.has(SINGLE) {
            return Ok(vec![SINGLE.to_owned()]);
        }
        let index = self.fetch_file(api, info, INDEX, progress)?;
        shards(&index)
    }

    fn no_checkpoint(&self, info: &RepoInfo) -> Error {
        let ggufs: Vec<&str> = info.gguf_names().take(20).collect();
        if ggufs.is_empty() {
            return unsupported!("{} has no config.json with safetensors weights, and no GGUF file", self.id);
        }
        unsupported!(
            "{0} has GGUF files only; name one, as in {0}/{1}. It has: {2}",
            self.id,
            ggufs[0],
            ggufs.join(", ")
        )
    }

    /// One file of the commit in `info`, from the cache or the hub.
    fn fetch_file(&self, api: &Api, info: &RepoInfo, name: &str, progress: &mut dyn Progress) -> Result<PathBuf> {
        let cached = self.settings.cache().repo(self.repo()).pointer_path(&info.sha).join(name);
        if cached.is_file() {
            return Ok(cached);
        }
        if !info.has(name) {
            return Err(Error::NotFound(format!("{} has no file {name} at {}", self.id, self.revision)));
        }
        let path = self.download(api, name, progress)?;
        if verify_blob(&path, progress)? == BlobCheck::Damaged {
            discard_blob(&path)?;
            return Err(malformed!("{name} of {} arrived damaged and was deleted; run the command again", self.id));
        }
        Ok(path)
    }

    /// Downloads with a few attempts, each going on where the last one stopped.
    fn download(&self, api: &Api, name: &str, progress: &mut dyn Progress) -> Result<PathBuf> {
        let mut num_left = NUM_ATTEMPTS;
        loop {
            num_left -= 1;
            let (events, outcome) = start_transfer(api.repo(self.repo()), name.to_owned());
            let outcome = self.follow(&events, &outcome, name, progress);
            progress.finish();
            match outcome? {
                Ok(path) => return Ok(path),
                Err(error) if num_left > 0 && self.can_go_on(api, name, &error) => {
                    progress.message(&format!("{name}: {error}; going on from where it stopped"));
                }
                Err(error) => return Err(self.transfer_error(&error, name)),
            }
        }
    }

    /// Whether another attempt may help. A part file that can only grow wrong is deleted first.
    fn can_go_on(&self, api: &Api, name: &str, error: &ApiError) -> bool {
        match error {
            ApiError::IoError(_) => true,
            ApiError::RequestError(error) if matches!(**error, ureq::Error::StatusCode(416)) => {
                self.discard_part(api, name)
            }
            ApiError::RequestError(error) => matches!(**error, ureq::Error::Io(_)),
            ApiError::InvalidResume => self.discard_part(api, name),
            _ => false,
        }
    }

    fn discard_part(&self, api: &Api, name: &str) -> bool {
        let Ok(metadata) = api.metadata(&api.repo(self.repo()).url(name)) else { return false };
        let mut part = self.settings.cache().repo(self.repo()).blob_path(metadata.etag());
        part.set_extension("part");
        std::fs::remove_file(part).is_ok()
    }

    /// Shows a transfer's progress until it ends, or stands still for too long.
    fn follow(
        &self,
        events: &Receiver<Event>,
        outcome: &Receiver<std::result::Result<PathBuf, ApiError>>,
        name: &str,
        progress: &mut dyn Progress,
    ) -> Result<std::result::Result<PathBuf, ApiError>> {
        let died = || Error::Io { context: format!("downloading {name}"), source: std::io::ErrorKind::Other.into() };
        let mut is_shown = false;
        loop {
            match events.recv_timeout(self.settings.idle) {
                Ok(Event::Start(total_bytes)) if !is_shown => {
                    is_shown = true;
                    progress.start(total_bytes, &format!("downloading {name}"));
                }
                Ok(Event::Start(_)) => {}
                Ok(Event::Bytes(num_bytes)) => progress.advance(num_bytes),
                // The transfer dropped its sender: the outcome is there or about to be.
                Err(RecvTimeoutError::Disconnected) => return outcome.recv().map_err(|_| died()),
                Err(RecvTimeoutError::Timeout) => {
                    let message = format!("nothing arrived for {} s", self.settings.idle.as_secs());
                    let source = std::io::Error::new(std::io::ErrorKind::TimedOut, message);
                    return Err(Error::Io { context: format!("downloading {name} of {}", self.id), source });
                }
            }
        }
    }

    fn transfer_error(&self, error: &ApiError, name: &str) -> Error {
        match error {
            ApiError::RequestError(error) => self.request_error(error, name),
            ApiError::LockAcquisition(path) => {
                Error::Exhausted(format!("another process is downloading {name} ({} is locked)", path.display()))
            }
            ApiError::IoError(e) => Error::Io {
                context: format!("downloading {name} of {}", self.id),
                source: std::io::Error::new(e.kind(), e.to_string()),
            },
            other => malformed!("{} answered oddly for {name} of {}: {other}", self.settings.place(), self.id),
        }
    }

    fn request_error(&self, error: &ureq::Error, name: &str) -> Error {
        let (place, id, revision) = (self.settings.place(), self.id, self.revision);
        let wanted = if name.is_empty() { id.to_owned() } else { format!("{id}/{name}") };
        match error {
            ureq::Error::StatusCode(401 | 403) => {
                let token = match self.settings.token {
                    Some(_) => "the token in HF_TOKEN does not open it",
                    None => "set HF_TOKEN to an access token",
                };
                Error::NotFound(format!(
                    "{place} does not show {wanted}: it does not exist, or it is gated or private. {token}; for a \
                     gated model, accept its terms on its page first"
                ))
            }
            ureq::Error::StatusCode(404) => Error::NotFound(format!("{place} has no {wanted} at {revision}")),
            ureq::Error::StatusCode(429) => Error::Exhausted(format!(
                "{place} refuses more requests for now (429); try again later or set HF_TOKEN"
            )),
            other => Error::Io {
                context: format!("cannot get {wanted} from {place}"),
                source: std::io::Error::other(other.to_string()),
            },
        }
    }

    /// Compares every cached file with the digest the hub gave for it, where it gave one; deletes the damaged ones and
    /// returns their names.
    ///
    /// # Errors
    /// `Io` when a file cannot be read.
    pub(super) fn discard_damaged(&self, progress: &mut dyn Progress) -> Result<Vec<String>> {
        let Some(folder) = self.snapshot() else { return Ok(Vec::new()) };
        let mut damaged = Vec::new();
        for entry in folder.read_dir().map_err(|e| Error::io("list", &folder, e))?.flatten() {
            let path = entry.path();
            if path.is_file() && verify_blob(&path, progress)? == BlobCheck::Damaged {
                discard_blob(&path)?;
                damaged.push(entry.file_name().to_string_lossy().into_owned());
            }
        }
        Ok(damaged)
    }
}

enum Event {
    Start(u64),
    Bytes(u64),
}

/// Passes `hf_hub`'s progress to the thread that shows it.
struct EventSender(Sender<Event>);

// The receiver is gone once the transfer was given up; there is nobody left to tell.
impl hf_hub::api::Progress for EventSender {
    fn init(&mut self, size: usize, _filename: &str) {
        let _ = self.0.send(Event::Start(size as u64));
    }
    fn update(&mut self, size: usize) {
        let _ = self.0.send(Event::Bytes(size as u64));
    }
    fn finish(&mut self) {}
}

/// Runs one transfer on its own thread, which a caller that stops waiting leaves behind: the crate cannot cancel.
fn start_transfer(repo: ApiRepo, name: String) -> (Receiver<Event>, Receiver<std::result::Result<PathBuf, ApiError>>) {
    let (event_sender, events) = channel();
    let (outcome_sender, outcome) = channel();
    std::thread::spawn(move || {
        let result = repo.download_with_progress(&name, EventSender(event_sender));
        let _ = outcome_sender.send(result);
    });
    (events, outcome)
}

#[derive(Debug, PartialEq, Eq)]
enum BlobCheck {
    /// The digest fits, or the hub gave none for this file.
    Fine,
    Damaged,
}

/// Large files are stored under their SHA-256, which the hub sends as their tag; small ones under a digest of another
/// kind that is not checked.
fn verify_blob(path: &Path, progress: &mut dyn Progress) -> Result<BlobCheck> {
    let blob = path.canonicalize().map_err(|e| Error::io("open", path, e))?;
    let name = blob.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    if name.len() != 64 || !name.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Ok(BlobCheck::Fine);
    }
    let found = digest::sha256_file(path, progress)?;
    Ok(if found == name.to_ascii_lowercase() { BlobCheck::Fine } else { BlobCheck::Damaged })
}

/// Deletes a snapshot's entry and the bytes it points to.
fn discard_blob(path: &Path) -> Result<()> {
    let blob = path.canonicalize().map_err(|e| Error::io("open", path, e))?;
    std::fs::remove_file(&blob).map_err(|e| Error::io("delete", &blob, e))?;
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io("delete", path, e)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
