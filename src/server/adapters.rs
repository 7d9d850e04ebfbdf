//! The adapters a server has under names: which ones a request's `model` means, and how names come and go.
//!
//! A name is replaced at once: calls that were resolved before keep the adapter they found.

use std::collections::{HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, RwLock};

use axum::extract::State;
use axum::http::HeaderMap;
use serde::Deserialize;
use utoipa::ToSchema;

use super::error::{ApiError, ErrorBody};
use super::{AppRef, JsonBody};
use crate::Error;
use crate::adapters::AdapterDigest;
use crate::engine::handle::EngineHandle;
use crate::engine::{AppliedAdapter, LoadedAdapter, MergeRule};
use crate::memory::{Digest, Parameter};

/// Adapters under names, at most.
const MAX_ADAPTERS: usize = 4096;

/// The longest name.
const MAX_NAME_BYTES: usize = 256;

/// Which adapters may be merged, by their names.
#[derive(Debug, Default)]
pub struct MergeRules {
    /// Of those that are not named.
    default: MergeRule,
    named: HashMap<String, MergeRule>,
}

impl MergeRules {
    /// Says what holds of an adapter, or of all that have no rule of their own.
    pub fn set(&mut self, name: Option<&str>, rule: MergeRule) {
        match name {
            Some(name) => drop(self.named.insert(name.to_owned(), rule)),
            None => self.default = rule,
        }
    }

    fn of(&self, name: &str) -> MergeRule {
        self.named.get(name).copied().unwrap_or(self.default)
    }
}

/// The adapters of a server, in order of registration.
pub struct AdapterRegistry {
    engine: EngineHandle,
    named: RwLock<Vec<NamedAdapter>>,
    /// Folders, resolved, under which adapters may be read over HTTP; none means that nobody may.
    roots: Vec<PathBuf>,
    merge_rules: MergeRules,
    /// Those of parameter cubes, which have no name here; the ones read last at the end.
    of_cubes: Mutex<VecDeque<LoadedAdapter>>,
    /// One adapter is read at a time.
    loading: Mutex<()>,
}

/// Finds an adapter by its name, where this registry has none of that name.
pub(super) type Elsewhere<'a> = &'a dyn Fn(&str) -> Result<Option<LoadedAdapter>, ApiError>;

/// An adapter under a name.
#[derive(Clone)]
pub struct NamedAdapter {
    /// What requests call it.
    pub name: String,
    /// Where it came from, as it was asked for.
    pub path: String,
    /// Unix time of its loading.
    pub created: u64,
    /// What it is now.
    pub adapter: LoadedAdapter,
}

impl AdapterRegistry {
    /// No adapters yet.
    ///
    /// # Errors
    /// `Io` when a root does not exist.
    pub fn new(engine: EngineHandle, roots: &[PathBuf]) -> crate::Result<Self> {
        let resolve = |root: &PathBuf| root.canonicalize().map_err(|error| Error::io("find the folder", root, error));
        let roots = roots.iter().map(resolve).collect::<crate::Result<_>>()?;
        let (named, merge_rules) = (RwLock::default(), MergeRules::default());
        Ok(Self { engine, named, roots, merge_rules, of_cubes: Mutex::default(), loading: Mutex::default() })
    }

    /// The same, where these rules hold of what is loaded.
    pub fn with_merge_rules(self, merge_rules: MergeRules) -> Self {
        Self { merge_rules, ..self }
    }

    /// All adapters.
    pub fn list(&self) -> Vec<NamedAdapter> {
        self.named.read().unwrap_or_else(|poisoned| poisoned.into_inner()).clone()
    }

    /// The adapter of a name.
    pub fn find(&self, name: &str) -> Option<NamedAdapter> {
        let named = self.named.read().unwrap_or_else(|poisoned| poisoned.into_inner());
        named.iter().find(|known| known.name == name).cloned()
    }

    /// Reads a folder or a GGUF file and gives it a name; a name that is taken is replaced when `replaces`, and then in one
    /// moment.
    ///
    /// # Errors
    /// `Invalid` for a bad name, `Conflict` for one that is taken, `Exhausted` when there are too many or this one is
    /// too large, and those of loading.
    pub fn load(&self, name: &str, path: &Path, replaces: bool) -> crate::Result<()> {
        check_name(name)?;
        let _one_at_a_time = self.loading.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if !replaces && self.find(name).is_some() {
            return Err(Error::Conflict(taken(name)));
        }
        let adapter = self.engine.load_adapter(path)?.with_merge_rule(self.merge_rules.of(name));
        let created = std::time::UNIX_EPOCH.elapsed().map_or(0, |elapsed| elapsed.as_secs());
        let new = NamedAdapter { name: name.to_owned(), path: path.display().to_string(), created, adapter };
        let mut named = self.named.write().unwrap_or_else(|poisoned| poisoned.into_inner());
        let is_new = named.iter().all(|known| known.name != name);
        if is_new && named.len() >= MAX_ADAPTERS {
            return Err(Error::Exhausted(format!(
                "{MAX_ADAPTERS} adapters are loaded, as many as may be; unload one first"
            )));
        }
        tracing::info!(name, digest = %new.adapter.digest(), max_rank = new.adapter.max_rank(), "adapter loaded");
        match named.iter_mut().find(|known| known.name == name) {
            Some(known) => *known = new,
            None => named.push(new),
        }
        Ok(())
    }

    /// Forgets a name; whether it was there.
    pub fn unload(&self, name: &str) -> bool {
        let mut named = self.named.write().unwrap_or_else(|poisoned| poisoned.into_inner());
        let num_before = named.len();
        named.retain(|known| known.name != name);
        named.len() < num_before
    }

    /// Reads what lies at `path` below a root, and says where that is. It gets no name.
    pub(super) fn read(&self, path: &str) -> Result<(PathBuf, LoadedAdapter), ApiError> {
        if self.roots.is_empty() {
            return Err(closed());
        }
        let missing = || ApiError::not_found(format!("No adapter found at '{path}'."));
        let place = self.place(path).ok_or_else(missing)?;
        let _one_at_a_time = self.loading.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let adapter = self.engine.load_adapter(&place).map_err(|error| load_error(error, missing))?;
        self.keep(&adapter);
        Ok((place, adapter))
    }

    /// The adapter of the parameter cube `name`: one that is known by its content, else what its files hold.
    ///
    /// # Errors
    /// `Format` when that is something else by now, and those of reading.
    pub(super) fn of_cube(&self, name: &str, parameter: &Parameter) -> crate::Result<LoadedAdapter> {
        let rule = self.merge_rules.of(name);
        if let Some(known) = self.known(&parameter.digest) {
            return Ok(known.with_merge_rule(rule));
        }
        let _one_at_a_time = self.loading.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(known) = self.known(&parameter.digest) {
            return Ok(known.with_merge_rule(rule));
        }
        let adapter = self.engine.load_adapter(parameter.source.path())?;
        let (found, wanted) = (Digest::from(adapter.digest()), parameter.digest);
        if found != wanted {
            let source = parameter.source.as_str();
            return Err(crate::malformed!(
                "{source} has changed since the cube was made: it holds {found}, wanted {wanted}. Put the old files back, or \
                 append what is there now as a new version."
            ));
        }
        self.keep(&adapter);
        Ok(adapter.with_merge_rule(rule))
    }

    /// What an adapter's files hold now.
    pub(super) fn digest_at(&self, path: &Path) -> crate::Result<AdapterDigest> {
        let _one_at_a_time = self.loading.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        self.engine.load_adapter(path).map(|adapter| adapter.digest())
    }

    /// An adapter that has been read, by its content.
    pub(super) fn known(&self, digest: &Digest) -> Option<LoadedAdapter> {
        let is_it = |adapter: &LoadedAdapter| Digest::from(adapter.digest()) == *digest;
        let named = self.named.read().unwrap_or_else(|poisoned| poisoned.into_inner());
        let named = named.iter().map(|known| &known.adapter).find(|adapter| is_it(adapter)).cloned();
        named.or_else(|| {
            let of_cubes = self.of_cubes.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            of_cubes.iter().find(|adapter| is_it(adapter)).cloned()
        })
    }

    /// Keeps an adapter that has no name, in the place of the one that was read longest ago where there are too many.
    fn keep(&self, adapter: &LoadedAdapter) {
        let mut of_cubes = self.of_cubes.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        of_cubes.retain(|kept| kept.digest() != adapter.digest());
        if of_cubes.len() >= MAX_ADAPTERS {
            of_cubes.pop_front();
        }
        of_cubes.push_back(adapter.clone());
    }

    /// The adapters that `model` means: none for a name of the model itself, one for an adapter's name, several for
    /// `base+a:0.7+b:0.3`. `None` when it means nothing, here or `elsewhere`.
    pub(super) fn resolve(
        &self,
        model: &str,
        base_names: &[String],
        elsewhere: Elsewhere<'_>,
    ) -> Result<Option<Vec<AppliedAdapter>>, ApiError> {
        if base_names.iter().any(|name| name == model) {
            return Ok(Some(Vec::new()));
        }
        if let Some(adapter) = self.find_or(model, elsewhere)? {
            return Ok(Some(vec![AppliedAdapter { adapter, scale: 1.0 }]));
        }
        let terms = base_names.iter().find_map(|name| model.strip_prefix(name.as_str())?.strip_prefix('+'));
        let Some(terms) = terms else { return Ok(None) };
        terms.split('+').map(|term| self.resolve_term(term, elsewhere)).collect()
    }

    /// The adapter of a name, here or `elsewhere`.
    pub(super) fn find_or(&self, name: &str, elsewhere: Elsewhere<'_>) -> Result<Option<LoadedAdapter>, ApiError> {
        match self.find(name) {
            Some(found) => Ok(Some(found.adapter)),
            None => elsewhere(name),
        }
    }

    /// `name` or `name:scale`; `None` when there is no such adapter.
    fn resolve_term(&self, term: &str, elsewhere: Elsewhere<'_>) -> Result<Option<AppliedAdapter>, ApiError> {
        if let Some(adapter) = self.find_or(term, elsewhere)? {
            return Ok(Some(AppliedAdapter { adapter, scale: 1.0 }));
        }
        let Some((name, scale)) = term.rsplit_once(':') else { return Ok(None) };
        let Some(adapter) = self.find_or(name, elsewhere)? else { return Ok(None) };
        match scale.parse::<f32>() {
            Ok(scale) if scale.is_finite() => Ok(Some(AppliedAdapter { adapter, scale })),
            _ => Err(ApiError::invalid_field("model", format!("{scale:?} is no scale for the adapter {name}."))),
        }
    }

    /// The folder or file that a client means, if it and what it holds lie under a root. Symbolic links are followed
    /// first.
    fn place(&self, path: &str) -> Option<PathBuf> {
        let is_inside = |path: &Path| self.roots.iter().any(|root| path.starts_with(root));
        let candidates = self.roots.iter().map(|root| root.join(path));
        let place = candidates.filter_map(|path| path.canonicalize().ok()).find(|path| is_inside(path))?;
        if place.is_file() {
            return Some(place);
        }
        let files = ["adapter_config.json", "adapter_model.safetensors"].map(|name| place.join(name).canonicalize());
        files.into_iter().all(|file| file.is_ok_and(|file| is_inside(&file))).then_some(place)
    }
}

fn check_name(name: &str) -> crate::Result<()> {
    let is_bad = |found: char| matches!(found, '+' | '@') || found.is_whitespace() || found.is_control();
    if name.is_empty() || name.len() > MAX_NAME_BYTES || name.chars().any(is_bad) {
        return Err(crate::invalid!(
            "{name:?} is no name for an adapter: 1 to {MAX_NAME_BYTES} bytes without spaces, + and @ are wanted"
        ));
    }
    Ok(())
}

fn taken(name: &str) -> String {
    format!(
        "The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set 'load_inplace' \
         to True."
    )
}

/// vLLM's body.
#[derive(Deserialize, ToSchema)]
pub(super) struct LoadLoraRequest {
    /// The name it is to have.
    lora_name: String,
    /// A folder as PEFT writes it, or a GGUF file, under a root of the server.
    lora_path: String,
    /// Replace what has that name.
    load_inplace: Option<bool>,
}

/// vLLM's body.
#[derive(Deserialize, ToSchema)]
pub(super) struct UnloadLoraRequest {
    /// The name to forget.
    lora_name: String,
}

/// Loads an adapter.
#[utoipa::path(
    post,
    path = "/v1/load_lora_adapter",
    request_body = LoadLoraRequest,
    responses((status = 200, body = String), (status = "4XX", body = ErrorBody))
)]
pub(super) async fn load(State(app): State<AppRef>, headers: HeaderMap, body: JsonBody) -> Result<String, ApiError> {
    app.api_keys.check_admin(&headers)?;
    let LoadLoraRequest { lora_name, lora_path, load_inplace } = body.parse()?;
    registry(&app)?;
    if app.model.names.contains(&lora_name) {
        return Err(ApiError::invalid_field("lora_name", "The model itself has this name."));
    }
    let name = lora_name.clone();
    let load = tokio::task::spawn_blocking({
        let (app, replaces) = (AppRef::clone(&app), load_inplace.unwrap_or(false));
        move || -> Result<(), ApiError> {
            let registry = app.model.adapters.as_ref().ok_or_else(closed)?;
            let missing = || ApiError::not_found(format!("No adapter found for '{lora_name}' at '{lora_path}'."));
            let place = registry.place(&lora_path).ok_or_else(missing)?;
            registry.load(&lora_name, &place, replaces).map_err(|error| load_error(error, missing))
        }
    });
    match load.await {
        Ok(result) => result.map(|()| format!("Success: LoRA adapter '{name}' added successfully.")),
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

/// Forgets an adapter. Calls that use it go on.
#[utoipa::path(
    post,
    path = "/v1/unload_lora_adapter",
    request_body = UnloadLoraRequest,
    responses((status = 200, body = String), (status = "4XX", body = ErrorBody))
)]
pub(super) async fn unload(State(app): State<AppRef>, headers: HeaderMap, body: JsonBody) -> Result<String, ApiError> {
    app.api_keys.check_admin(&headers)?;
    let UnloadLoraRequest { lora_name } = body.parse()?;
    match registry(&app)?.unload(&lora_name) {
        true => Ok(format!("Success: LoRA adapter '{lora_name}' removed successfully.")),
        false => Err(ApiError::not_found(format!("The lora adapter '{lora_name}' cannot be found."))),
    }
}

/// The registry, where clients may change it.
fn registry(app: &AppRef) -> Result<&AdapterRegistry, ApiError> {
    app.model.adapters.as_ref().filter(|registry| !registry.roots.is_empty()).ok_or_else(closed)
}

fn closed() -> ApiError {
    ApiError::forbidden("Adapters cannot be loaded over HTTP here; start the server with --lora-root DIR.")
}

/// A file that does not fit is the client's to know about.
fn load_error(error: Error, missing: impl Fn() -> ApiError) -> ApiError {
    match error {
        Error::NotFound(_) => missing(),
        Error::Conflict(message) | Error::Format(message) => ApiError::bad_request(message),
        other => other.into(),
    }
}
