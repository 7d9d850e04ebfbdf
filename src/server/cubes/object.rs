//! A cube as answers show it.

use serde::Serialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::service::Materialized;
use crate::memory::{
    Access, AclLists, Activation, Binding, CubeId, CubeName, CubeView, Digest, Form, Gap, Governance, Kind, Label,
    Labels, Origin, Parameter, Payload, Principal, Priority, SemanticType, State, Timestamp, Twin, Version, Visibility,
};

/// A cube: its header, and its content when `include=payload` asks for it.
#[derive(Serialize, ToSchema)]
pub(in crate::server) struct CubeObject {
    /// Always `memcube`.
    object: &'static str,
    #[schema(value_type = String)]
    id: CubeId,
    #[schema(value_type = String)]
    name: CubeName,
    #[schema(value_type = String)]
    kind: Kind,
    #[schema(value_type = u32)]
    version: Version,
    #[schema(value_type = u32)]
    newest_version: Version,
    #[schema(value_type = Vec<String>)]
    parents: Vec<CubeId>,
    /// generated, activated, archived or frozen.
    #[schema(value_type = String)]
    state: State,
    #[schema(value_type = String)]
    created_at: Timestamp,
    #[schema(value_type = String)]
    updated_at: Timestamp,
    #[schema(value_type = String)]
    origin: Origin,
    #[schema(value_type = Option<String>)]
    semantic_type: Option<SemanticType>,
    #[schema(value_type = Vec<String>)]
    tags: Labels,
    #[schema(value_type = String)]
    owner: Principal,
    #[schema(value_type = Object)]
    acl: ShownAcl,
    ttl_s: Option<u64>,
    #[schema(value_type = Option<String>)]
    expires_at: Option<Timestamp>,
    half_life_s: Option<u64>,
    /// 0 to 9, or "pinned".
    #[schema(value_type = Value)]
    priority: Priority,
    #[schema(value_type = Vec<String>)]
    sensitivity: Labels,
    erase_on_free: bool,
    hits: u64,
    #[schema(value_type = Option<String>)]
    last_used_at: Option<Timestamp>,
    heat: f64,
    binding: Option<BindingObject>,
    /// Of a parameter cube.
    #[serde(skip_serializing_if = "Option::is_none")]
    adapter: Option<AdapterObject>,
    /// Bytes of the KV blocks, or of the adapter's numbers.
    bytes: u64,
    /// What of the KV is not on disk; null when all is, as far as was looked. It is computed when nothing else is to be, or at
    /// the next use.
    missing: Option<MissingObject>,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    payload: Option<PayloadObject>,
}

/// What the blocks are valid for.
#[derive(Serialize, ToSchema)]
struct BindingObject {
    model: ModelObject,
    #[schema(value_type = String)]
    tokenizer: Digest,
    #[schema(value_type = Option<String>)]
    template: Option<Digest>,
    #[schema(value_type = String)]
    identity: Digest,
    position_base: u32,
    num_tokens: usize,
    num_blocks: usize,
    #[schema(value_type = String)]
    form: Form,
    #[schema(value_type = String)]
    domain: Label,
}

/// An adapter, and where it is read.
#[derive(Serialize, ToSchema)]
struct AdapterObject {
    /// Of its factors and numbers.
    #[schema(value_type = String)]
    digest: Digest,
    /// A folder or a GGUF file.
    source: String,
    /// The largest rank of its updates.
    rank: u32,
    /// Digest of the weights that it is for.
    #[schema(value_type = String)]
    weights: Digest,
    #[schema(value_type = String)]
    architecture: Label,
}

/// KV that a cube has lost.
#[derive(Serialize, ToSchema)]
struct MissingObject {
    /// Blocks of it.
    blocks: usize,
    /// How often it was computed in vain; three times at most.
    attempts: u32,
    /// What came of the last time, or why there was none.
    reason: Option<String>,
}

/// The model that computed the blocks.
#[derive(Serialize, ToSchema)]
struct ModelObject {
    #[schema(value_type = String)]
    weights: Digest,
    #[schema(value_type = String)]
    architecture: Label,
    #[schema(value_type = String)]
    dtype: Label,
}

/// What a cube holds.
#[derive(Serialize, ToSchema)]
struct PayloadObject {
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Object>>)]
    messages: Option<Vec<Map<String, Value>>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
    /// Names of the full blocks.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<String>>)]
    blocks: Option<Vec<Digest>>,
    /// Name of the partial block behind them.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    tail: Option<Digest>,
}

/// Access lists, whole for those who may change them.
#[derive(Serialize)]
#[serde(untagged)]
enum ShownAcl {
    Whole(AclLists),
    VisibilityAlone { visibility: Visibility },
}

/// A cube with what the request did.
#[derive(Serialize, ToSchema)]
pub(in crate::server) struct CubeAnswer {
    #[serde(flatten)]
    cube: CubeObject,
    #[serde(flatten)]
    work: Work,
}

/// How much of a cube's KV was found, and how much was computed.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(in crate::server) struct Work {
    /// Tokens whose KV was found.
    restored_tokens: usize,
    /// Tokens that the model was run over.
    computed_tokens: usize,
    /// Why.
    reason: String,
}

impl CubeObject {
    /// What `principal` may see of a cube.
    pub(super) fn new(view: &CubeView, principal: &Principal, with_payload: bool) -> Self {
        let (cube, governance) = (&view.cube, view.cube.governance.clone());
        let acl = ShownAcl::new(view, principal);
        let (activation, parameter) = (cube.payload.activation(), cube.payload.parameter());
        let Governance { owner, ttl_s, expires_at, half_life_s, priority, sensitivity, erase_on_free, .. } = governance;
        Self {
            object: "memcube",
            id: cube.id,
            name: cube.name.clone(),
            kind: cube.payload.kind(),
            version: cube.version,
            newest_version: view.newest,
            parents: cube.parents.clone(),
            state: view.state,
            created_at: cube.created_at,
            updated_at: cube.updated_at,
            origin: cube.origin,
            semantic_type: cube.semantic_type,
            tags: cube.tags.clone(),
            owner,
            acl,
            ttl_s,
            expires_at,
            half_life_s,
            priority,
            sensitivity,
            erase_on_free,
            hits: view.usage.num_hits,
            last_used_at: view.usage.last_used_at,
            heat: view.heat,
            binding: activation.map(BindingObject::new),
            adapter: parameter.map(AdapterObject::new),
            bytes: activation.map_or(0, Activation::num_bytes) + parameter.map_or(0, |parameter| parameter.num_bytes),
            missing: view.gap.as_ref().map(MissingObject::new),
            payload: with_payload.then(|| PayloadObject::new(&cube.payload)),
        }
    }
}

impl AdapterObject {
    fn new(parameter: &Parameter) -> Self {
        Self {
            digest: parameter.digest,
            source: parameter.source.as_str().to_owned(),
            rank: parameter.rank,
            weights: parameter.weights,
            architecture: parameter.architecture.clone(),
        }
    }
}

impl MissingObject {
    fn new(gap: &Gap) -> Self {
        Self { blocks: gap.num_missing, attempts: gap.num_attempts, reason: gap.reason.clone() }
    }
}

impl BindingObject {
    fn new(activation: &Activation) -> Self {
        let Binding { weights, architecture, dtype, tokenizer, template, identity, form, domain } =
            activation.binding().clone();
        Self {
            model: ModelObject { weights, architecture, dtype },
            tokenizer,
            template,
            identity,
            position_base: form.position_base(),
            num_tokens: activation.token_ids().len(),
            num_blocks: activation.full_blocks().len() + usize::from(activation.tail().is_some()),
            form,
            domain,
        }
    }
}

impl PayloadObject {
    fn new(payload: &Payload) -> Self {
        let (text, messages) = match payload.twin().cloned() {
            Some(Twin::Text(text)) => (Some(text), None),
            Some(Twin::Messages(messages)) => (None, Some(messages)),
            None => (None, None),
        };
        let activation = payload.activation();
        Self {
            text,
            messages,
            token_ids: activation.map(|activation| activation.token_ids().to_vec()),
            blocks: activation.map(|activation| activation.full_blocks().iter().map(|hash| (*hash).into()).collect()),
            tail: activation.and_then(Activation::tail).map(|hash| (*hash).into()),
        }
    }
}

impl ShownAcl {
    fn new(view: &CubeView, principal: &Principal) -> Self {
        let lists = AclLists::from(view.cube.governance.acl.clone());
        match view.cube.allows(principal, Access::Share) {
            true => Self::Whole(lists),
            false => Self::VisibilityAlone { visibility: lists.visibility },
        }
    }
}

impl CubeAnswer {
    pub(super) fn new(view: &CubeView, principal: &Principal, with_payload: bool, work: Work) -> Self {
        Self { cube: CubeObject::new(view, principal, with_payload), work }
    }
}

impl Work {
    /// Nothing was computed.
    pub(super) fn none(reason: &str) -> Self {
        Self { restored_tokens: 0, computed_tokens: 0, reason: reason.to_owned() }
    }

    /// All blocks came from elsewhere.
    pub(super) fn restored(restored_tokens: usize) -> Self {
        let reason = if restored_tokens > 0 { "The blocks came with the file." } else { "A plaintext cube has no KV." };
        Self { restored_tokens, computed_tokens: 0, reason: reason.to_owned() }
    }

    /// Tokens found, tokens computed, and why.
    pub(in crate::server) fn into_parts(self) -> (usize, usize, String) {
        (self.restored_tokens, self.computed_tokens, self.reason)
    }

    pub(super) fn of(materialized: &Materialized) -> Self {
        let Materialized { restored_tokens, computed_tokens, .. } = *materialized;
        let reason = match (restored_tokens, computed_tokens) {
            (0, _) => "No block of these tokens was there; all were computed.",
            (_, 0) => "All blocks were there.",
            _ => "The blocks at the beginning were there; the rest was computed.",
        };
        Self { restored_tokens, computed_tokens, reason: reason.to_owned() }
    }
}
