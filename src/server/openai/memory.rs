//! The cubes a call names: in its `memory` object or behind `@` in `model`, checked against who asks, and put before the
//! prompt.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::adapters::AdapterReference;
use super::link::{LinkedContent, LinkedCube, Recomputed, append_cubes};
use super::prompt::Prompts;
use super::save::{SaveRequest, SavedCube};
use super::usage::UsageCounter;
use crate::engine::request::{FetchDecision, SharedPrefix};
use crate::engine::{AppliedAdapter, LoadedAdapter};
use crate::memory::{Binding, Cube, CubeAddress, Principal, Twin};
use crate::server::App;
use crate::server::cubes::{adapter_of, service};
use crate::server::error::ApiError;
use crate::text::Tokenizer;

/// Cubes in one call.
const MAX_CUBES: usize = 16;

/// Tokens that are computed in the prompt at the beginning of every moved cube, unless a call says otherwise.
const DEFAULT_RECOMPUTE_TOKENS: usize = 16;

/// The most a call can ask for.
const MAX_RECOMPUTE_TOKENS: usize = 4096;

/// The share of deviating tokens that is computed, unless a call says otherwise: what CacheBlend (arXiv 2405.16444) takes.
const DEFAULT_SHARE: f64 = 0.15;

/// What a call wants of memory.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub(super) struct MemoryRequest {
    /// Cubes whose content stands before the prompt, in order; of parameter cubes the updates are added.
    #[serde(default)]
    cubes: Vec<CubeReference>,
    /// Adapters whose updates are added, beside those that other fields name.
    #[serde(default)]
    #[schema(inline)]
    adapters: Vec<AdapterReference>,
    /// `prefix` (the KV of one leading cube as it is; the default for one), `text` (all tokens computed; the default for
    /// several), `link` (the KV that each text has alone, moved to its place; an approximation) or `blend` (the same, and
    /// the tokens that deviate most from what they would be there are computed again). A cube can have a mode of its own
    /// among linked ones.
    compose: Option<Compose>,
    /// With `link` and `blend`: so many of the first tokens of every cube are computed in the prompt; 16 when left
    /// out.
    #[schema(minimum = 0, maximum = 4096)]
    recompute_tokens: Option<usize>,
    /// Keep the prompt and its answer as a cube.
    #[schema(inline)]
    save: Option<SaveRequest>,
    /// With `blend`: the share of every cube's tokens that is computed besides; 0.15 when left out.
    #[schema(minimum = 0, maximum = 1)]
    recompute_share: Option<f64>,
    /// Whether adapters of the call may be merged into a copy of the weights where the server does so (`auto`, the
    /// default), which rounds differently, or are added to what is computed (`never`).
    merge: Option<MergeChoice>,
}

/// Whether merged adapters may be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum MergeChoice {
    Auto,
    Never,
}

impl MemoryRequest {
    /// The adapters it names.
    pub(super) fn take_adapters(&mut self) -> Vec<AdapterReference> {
        std::mem::take(&mut self.adapters)
    }

    /// Whether adapters are to be added and not merged.
    pub(super) fn forbids_merge(&self) -> bool {
        self.merge == Some(MergeChoice::Never)
    }
}

/// A cube by its name, or `name@version`.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(untagged, expecting = "invalid type, expected a cube's name or an object with `name`")]
enum CubeReference {
    Name(String),
    Object {
        name: String,
        mode: Option<Compose>,
        /// With `blend`: the share for this cube.
        #[schema(minimum = 0, maximum = 1)]
        recompute_share: Option<f64>,
    },
}

/// How the KV of a cube meets the rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum Compose {
    Prefix,
    Link,
    Blend,
    Text,
}

/// The cubes of a call, which the caller may read.
pub(super) struct CallMemory {
    cubes: Vec<Arc<Cube>>,
    /// One for each cube.
    modes: Vec<Compose>,
    /// One for each cube; `None` where the KV is not moved.
    recomputed: Vec<Option<Recomputed>>,
    content: Content,
    /// The caller's own cache domain.
    domain: String,
}

/// What the cubes hold together.
enum Content {
    Twin(Twin),
    /// A cube that was made from token ids.
    TokenIds(Vec<u32>),
    /// Texts, some of which are moved to their places.
    Linked(Vec<LinkedContent>),
}

/// An adapter that a call used.
#[derive(Serialize, ToSchema)]
struct UsedAdapter {
    /// Of its contents.
    digest: String,
    scale: f32,
}

impl UsedAdapter {
    fn new(applied: &AppliedAdapter) -> Self {
        Self { digest: applied.adapter.digest().to_string(), scale: applied.scale }
    }
}

/// What became of a call's cubes, as its answer tells.
#[derive(Serialize, ToSchema)]
pub(super) struct MemoryAnswer {
    cubes: Vec<UsedCube>,
    /// In the order in which they are added.
    adapters: Vec<UsedAdapter>,
    /// Whether the answer is what computing every token would have given, bit for bit.
    exact: bool,
    /// Prompt tokens whose KV was computed with nothing but its own cube before it, and moved to its place.
    linked_tokens: usize,
    /// Prompt tokens whose KV was moved as well, and computed again because it deviated most.
    chosen_tokens: usize,
    /// Prompt tokens whose KV was on the device.
    device_tokens: usize,
    /// Prompt tokens whose KV came from the host's memory.
    host_tokens: usize,
    /// Prompt tokens whose KV came from the vault.
    disk_tokens: usize,
    /// Prompt tokens that were computed.
    recomputed_tokens: usize,
    /// Milliseconds spent waiting for KV from below the device.
    fetch_ms: f64,
    /// What was decided about KV below the device, and why.
    decision: &'static str,
    /// What became of `save`.
    #[serde(skip_serializing_if = "Option::is_none")]
    saved: Option<SavedCube>,
}

#[derive(Serialize, ToSchema)]
struct UsedCube {
    name: String,
    version: u32,
    mode: Compose,
}

impl CubeReference {
    fn name(&self) -> &str {
        match self {
            Self::Name(name) | Self::Object { name, .. } => name,
        }
    }

    fn mode(&self) -> Option<Compose> {
        match self {
            Self::Name(_) => None,
            Self::Object { mode, .. } => *mode,
        }
    }

    fn share(&self) -> Option<f64> {
        match self {
            Self::Name(_) => None,
            Self::Object { recompute_share, .. } => *recompute_share,
        }
    }
}

/// Divides `model` at its first `@`: before it the model's name, behind it cubes, themselves separated by `@@`.
pub(super) fn split_model(model: &str) -> (&str, impl Iterator<Item = &str>) {
    let (name, cubes) = model.split_once('@').unwrap_or((model, ""));
    (name, cubes.split("@@").filter(|cube| !cube.is_empty()))
}

impl MemoryRequest {
    /// Takes out what is to be kept of the call.
    pub(super) fn take_save(&mut self) -> Option<SaveRequest> {
        self.save.take()
    }
}

impl CallMemory {
    /// Its cubes.
    pub(super) fn cubes(&self) -> impl Iterator<Item = &Cube> + Clone {
        self.cubes.iter().map(Arc::as_ref)
    }

    /// Finds the cubes named in `model` and in the `memory` object; `None` when there are none. Those that are adapters are
    /// answered as such: they stand before nothing.
    pub(super) fn resolve<'a>(
        request: Option<MemoryRequest>,
        in_model: impl Iterator<Item = &'a str>,
        app: &App,
        principal: &Principal,
        domain: &str,
    ) -> Result<(Option<Self>, Vec<AppliedAdapter>), ApiError> {
        let mut request = request.unwrap_or_default();
        let named = in_model.map(|name| CubeReference::Name(name.to_owned()));
        let references: Vec<CubeReference> = named.chain(std::mem::take(&mut request.cubes)).collect();
        if references.len() > MAX_CUBES {
            return Err(invalid(format!("A call may name {MAX_CUBES} cubes, this one names {}.", references.len())));
        }
        let (mut kept, mut cubes, mut adapters) = (Vec::new(), Vec::new(), Vec::new());
        for reference in references {
            let found = find_cube(&reference, app, principal).map_err(|error| error.with_param("memory.cubes"))?;
            match found {
                FoundCube::Adapter(adapter) => adapters.push(AppliedAdapter { adapter, scale: 1.0 }),
                FoundCube::Content(cube) => {
                    kept.push(reference);
                    cubes.push(cube);
                }
            }
        }
        if cubes.is_empty() {
            return Ok((None, adapters));
        }
        let modes = modes_of(&kept, request.compose)?;
        let recomputed = recomputed_of(&kept, &modes, &request)?;
        let is_moved = recomputed.iter().any(Option::is_some);
        let content = if is_moved { linked_contents(&cubes, app)? } else { content_of(&cubes)? };
        let memory = Self { cubes, modes, recomputed, content, domain: domain.to_owned() };
        Ok((Some(memory), adapters))
    }

    fn is_linked(&self) -> bool {
        matches!(self.content, Content::Linked(_))
    }

    /// What the cubes are, one by one, when the KV of some is moved.
    pub(super) fn linked(&self) -> Option<&[LinkedContent]> {
        match &self.content {
            Content::Linked(contents) => Some(contents),
            Content::Twin(_) | Content::TokenIds(_) => None,
        }
    }

    /// Prompts that consist of `head`, the cubes and one of `rests` each.
    pub(super) fn link(
        &self,
        tokenizer: &Tokenizer,
        head: Vec<u32>,
        rests: Vec<Vec<u32>>,
    ) -> Result<Prompts, ApiError> {
        let Some(contents) = self.linked() else { return Ok(Prompts::behind(&head, rests)) };
        let linked = contents.iter().zip(&self.cubes).zip(&self.recomputed).map(|((content, cube), recomputed)| {
            let activation = cube.payload.activation();
            LinkedCube {
                content,
                stored: activation.map_or(&[], |activation| activation.token_ids()),
                domain: activation.map_or(&self.domain, |activation| activation.binding().domain.as_str()),
                recomputed: *recomputed,
            }
        });
        let mut composed = head;
        let cubes: Vec<LinkedCube<'_>> = linked.collect();
        let pieces = append_cubes(tokenizer, &mut composed, &cubes)?;
        Ok(Prompts { pieces, num_cube_tokens: 0, ..Prompts::behind(&composed, rests) })
    }

    /// The beginning of the prompt that others share: the tokens of the one cube, in its own cache domain.
    pub(super) fn shared_prefix(&self, num_tokens: usize) -> Option<SharedPrefix> {
        let [cube] = &self.cubes[..] else { return None };
        let activation = cube.payload.activation().filter(|_| self.modes == [Compose::Prefix])?;
        Some(SharedPrefix { num_tokens, domain: activation.binding().domain.to_string() })
    }

    /// What people wrote, if the cubes have it.
    pub(super) fn twin(&self) -> Option<&Twin> {
        match &self.content {
            Content::Twin(twin) => Some(twin),
            Content::TokenIds(_) | Content::Linked(_) => None,
        }
    }

    /// The tokens of a cube without a text.
    pub(super) fn token_ids(&self) -> Option<&[u32]> {
        match &self.content {
            Content::Twin(_) | Content::Linked(_) => None,
            Content::TokenIds(ids) => Some(ids),
        }
    }

    fn used(&self) -> Vec<UsedCube> {
        let used = |(cube, mode): (&Arc<Cube>, &Compose)| UsedCube {
            name: cube.name.to_string(),
            version: cube.version.get(),
            mode: *mode,
        };
        self.cubes.iter().zip(&self.modes).map(used).collect()
    }
}

impl MemoryAnswer {
    /// What became of a call's cubes and adapters, and of what it wanted saved.
    pub(super) fn new(
        memory: Option<&CallMemory>,
        adapters: &[AppliedAdapter],
        usage: &UsageCounter,
        saved: Option<SavedCube>,
    ) -> Self {
        let reuse = usage.reuse();
        Self {
            cubes: memory.map(CallMemory::used).unwrap_or_default(),
            adapters: adapters.iter().map(UsedAdapter::new).collect(),
            exact: !memory.is_some_and(CallMemory::is_linked),
            linked_tokens: reuse.linked_tokens,
            chosen_tokens: reuse.chosen_tokens,
            device_tokens: reuse.device_tokens,
            host_tokens: reuse.host_tokens,
            disk_tokens: reuse.disk_tokens,
            recomputed_tokens: usage.num_recomputed_tokens(),
            fetch_ms: reuse.fetch_ms,
            decision: decision_text(reuse.decision),
            saved,
        }
    }
}

fn invalid(message: impl Into<String>) -> ApiError {
    ApiError::invalid_field("memory", message)
}

/// What a name in `memory.cubes` stands for.
enum FoundCube {
    Content(Arc<Cube>),
    Adapter(LoadedAdapter),
}

fn find_cube(reference: &CubeReference, app: &App, principal: &Principal) -> Result<FoundCube, ApiError> {
    let (catalog, address) = (&service(app)?.catalog, reference.name().parse::<CubeAddress>()?);
    let cube = catalog.get(principal, &address)?.cube;
    let Some(parameter) = cube.payload.parameter() else {
        catalog.note_use(cube.id);
        return Ok(FoundCube::Content(cube));
    };
    if reference.mode().is_some() || reference.share().is_some() {
        let message = format!("Cube `{}` is an adapter, which has no mode; memory.adapters takes a scale.", cube.name);
        return Err(ApiError::bad_request(message));
    }
    adapter_of(app, &cube, parameter).map(FoundCube::Adapter)
}

/// The mode of every cube: its own, else the call's, else what goes with the others'.
fn modes_of(references: &[CubeReference], compose: Option<Compose>) -> Result<Vec<Compose>, ApiError> {
    let default = if references.len() == 1 { Compose::Prefix } else { Compose::Text };
    let default = compose.unwrap_or(default);
    let modes: Vec<Compose> = references.iter().map(|reference| reference.mode().unwrap_or(default)).collect();
    if modes.contains(&Compose::Prefix) && modes.len() > 1 {
        return Err(invalid(
            "Only one cube can stand at the beginning of a prompt; compose several with text, link or blend.",
        ));
    }
    Ok(modes)
}

/// What of every cube is computed although its KV is moved, for those whose KV is.
fn recomputed_of(
    references: &[CubeReference],
    modes: &[Compose],
    request: &MemoryRequest,
) -> Result<Vec<Option<Recomputed>>, ApiError> {
    let num_first = request.recompute_tokens.unwrap_or(DEFAULT_RECOMPUTE_TOKENS);
    if num_first > MAX_RECOMPUTE_TOKENS {
        let message = format!("recompute_tokens must be at most {MAX_RECOMPUTE_TOKENS}, got {num_first}.");
        return Err(ApiError::invalid_field("memory.recompute_tokens", message));
    }
    let default_share = request.recompute_share.unwrap_or(DEFAULT_SHARE);
    let share_of = |reference: &CubeReference| reference.share().unwrap_or(default_share);
    let mut shares = references.iter().map(share_of).chain([default_share]);
    if let Some(share) = shares.find(|share| !(0.0..=1.0).contains(share)) {
        let message = format!("recompute_share must be 0 to 1, got {share}.");
        return Err(ApiError::invalid_field("memory.recompute_share", message));
    }
    let recomputed = |(reference, mode): (&CubeReference, &Compose)| {
        let share = match mode {
            Compose::Prefix | Compose::Text => return None,
            Compose::Link => 0.0,
            Compose::Blend => share_of(reference),
        };
        Some(Recomputed { num_first, share })
    };
    Ok(references.iter().zip(modes).map(recomputed).collect())
}

/// What the cubes are, each for itself. Of what is no text the tokens are those that the cube has, which have to be of this
/// model's vocabulary and, for messages, of its template.
fn linked_contents(cubes: &[Arc<Cube>], app: &App) -> Result<Content, ApiError> {
    let content = |cube: &Arc<Cube>| match (cube.payload.twin(), cube.payload.activation()) {
        (Some(Twin::Text(text)), _) => Ok(LinkedContent::Text(text.clone())),
        (twin, Some(activation)) => {
            check_tokens(cube, activation.binding(), twin.is_some(), app)?;
            Ok(twin.map_or(LinkedContent::TokenIds, |twin| LinkedContent::Messages(twin.clone())))
        }
        (_, None) => Err(invalid(format!(
            "Cube `{}` has messages and no KV, so there is nothing to link; make it with kind=\"activation\".",
            cube.name
        ))),
    };
    Ok(Content::Linked(cubes.iter().map(content).collect::<Result<_, _>>()?))
}

fn check_tokens(cube: &Cube, binding: &Binding, is_rendered: bool, app: &App) -> Result<(), ApiError> {
    let current = service(app)?.engine.binding()?;
    let what = match (binding.tokenizer == current.tokenizer, binding.template == current.template) {
        (false, _) => "vocabulary",
        (true, false) if is_rendered => "chat template",
        _ => return Ok(()),
    };
    let message = format!(
        "The tokens of cube `{}` are of another {what} than this model's, so they cannot be linked; make the cube anew.",
        cube.name
    );
    Err(ApiError::conflict(message).with_param("memory.cubes"))
}

/// All texts one after the other, or all messages.
fn content_of(cubes: &[Arc<Cube>]) -> Result<Content, ApiError> {
    let twins: Option<Vec<&Twin>> = cubes.iter().map(|cube| cube.payload.twin()).collect();
    let Some(twins) = twins else {
        return match cubes {
            [cube] => Ok(Content::TokenIds(cube.payload.activation().map_or(&[][..], |it| it.token_ids()).to_vec())),
            _ => Err(invalid("A cube made from token ids has no text, so it cannot stand beside other cubes.")),
        };
    };
    let texts: Option<Vec<&str>> = twins.iter().map(|twin| twin.text()).collect();
    let messages: Option<Vec<&[Map<String, Value>]>> = twins.iter().map(|twin| twin.messages()).collect();
    match (texts, messages) {
        (Some(texts), _) => Ok(Content::Twin(Twin::Text(texts.join("\n\n")))),
        (None, Some(messages)) => Ok(Content::Twin(Twin::Messages(messages.concat()))),
        _ => Err(invalid("Cubes of text and cubes of messages cannot stand in one prompt.")),
    }
}

fn decision_text(decision: FetchDecision) -> &'static str {
    match decision {
        FetchDecision::NothingBelow => "nothing_below",
        FetchDecision::Fetched => "fetched",
        FetchDecision::Attached => "attached",
        FetchDecision::RecomputeIsCheaper => "recompute_is_cheaper",
        FetchDecision::Late => "late",
        FetchDecision::Lost => "lost",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_models_name_ends_where_cubes_begin() {
        for (model, name, cubes) in [
            ("m", "m", &[][..]),
            ("m@team/handbook", "m", &["team/handbook"]),
            ("m@a/b@3@@c/d", "m", &["a/b@3", "c/d"]),
            ("@a/b", "", &["a/b"]),
            ("m@", "m", &[]),
        ] {
            let (found, found_cubes) = split_model(model);
            assert_eq!((found, found_cubes.collect::<Vec<_>>()), (name, cubes.to_vec()), "{model}");
        }
    }
}
