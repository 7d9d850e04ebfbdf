//! The adapters of a call: what its model's name means, and the fields by which other servers take them. A name may be
//! that of a parameter cube.

use serde::Deserialize;
use utoipa::ToSchema;

use crate::engine::{AppliedAdapter, MAX_APPLIED};
use crate::memory::Principal;
use crate::server::cubes::find_adapter;
use crate::server::error::ApiError;
use crate::server::{AdapterRegistry, App};

/// An adapter by its place in `/v1/models`, as llama.cpp names them.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct LoraScale {
    /// 0 for the first adapter.
    id: usize,
    /// Multiplies its update; 0 does nothing.
    scale: f32,
}

/// An adapter by its name, or its name and scale.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(untagged, expecting = "invalid type, expected an adapter's name or an object with `name`")]
pub(super) enum AdapterReference {
    Name(String),
    Object {
        name: String,
        /// Multiplies its update; 1 when left out.
        scale: Option<f32>,
    },
}

/// Several adapters at once, as LoRAX takes them. Their updates are summed exactly, whatever their ranks.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct MergedAdapters {
    /// Names.
    ids: Vec<String>,
    /// One scale for each; 1 when left out.
    #[serde(default)]
    weights: Vec<f32>,
    /// Only `linear` can be had at request time.
    #[serde(default)]
    merge_strategy: MergeStrategy,
}

/// How LoRAX can put adapters together.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum MergeStrategy {
    #[default]
    Linear,
    Ties,
    DareLinear,
    DareTies,
}

/// The fields of a call, beside `model`, that name adapters.
#[derive(Default)]
pub(super) struct AdapterFields {
    pub(super) lora: Vec<LoraScale>,
    pub(super) lora_path: Option<String>,
    pub(super) merged: Option<MergedAdapters>,
    /// `adapters` of `memory`.
    pub(super) referenced: Vec<AdapterReference>,
}

/// Everything a call applies: `model` without its cubes, then the fields in their order.
pub(super) fn adapters_of(
    app: &App,
    principal: &Principal,
    model: &str,
    fields: AdapterFields,
) -> Result<Vec<AppliedAdapter>, ApiError> {
    let in_cubes = |name: &str| find_adapter(app, principal, name);
    let mut adapters = app.model.adapters_of(Some(model).filter(|name| !name.is_empty()), &in_cubes)?;
    let known = app.model.adapters.as_ref().map(AdapterRegistry::list).unwrap_or_default();
    for LoraScale { id, scale } in fields.lora {
        let missing =
            || ApiError::invalid_field("lora", format!("There is no adapter {id}; {} are loaded.", known.len()));
        let adapter = known.get(id).ok_or_else(missing)?.adapter.clone();
        adapters.push(AppliedAdapter { adapter, scale });
    }
    let named = |name: &str, scale: f32, param: &'static str| {
        let missing = || ApiError::not_found(format!("The adapter `{name}` does not exist.")).with_param(param);
        let found = known.iter().find(|known| known.name == name).map(|known| known.adapter.clone());
        let found = match found {
            Some(adapter) => Some(adapter),
            None => in_cubes(name).map_err(|error| error.with_param(param))?,
        };
        Ok::<_, ApiError>(AppliedAdapter { adapter: found.ok_or_else(missing)?, scale })
    };
    if let Some(name) = fields.lora_path {
        adapters.push(named(&name, 1.0, "lora_path")?);
    }
    for (name, scale) in fields.merged.map(MergedAdapters::check).transpose()?.unwrap_or_default() {
        adapters.push(named(&name, scale, "merged_adapters")?);
    }
    for reference in fields.referenced {
        let (name, scale) = match reference {
            AdapterReference::Name(name) => (name, 1.0),
            AdapterReference::Object { name, scale } => (name, scale.unwrap_or(1.0)),
        };
        adapters.push(named(&name, scale, "memory.adapters")?);
    }
    Ok(adapters)
}

impl MergedAdapters {
    /// Names with their scales.
    fn check(self) -> Result<Vec<(String, f32)>, ApiError> {
        let refused = |message: String| Err(ApiError::invalid_field("merged_adapters", message));
        if self.merge_strategy != MergeStrategy::Linear {
            return refused(
                "Only `linear` adapters are put together at request time, and exactly; `mneme cube fuse --method ties` \
                 or `dare` makes one adapter of several, which can be loaded under a name."
                    .into(),
            );
        }
        if !self.weights.is_empty() && self.weights.len() != self.ids.len() {
            return refused(format!("There are {} ids and {} weights.", self.ids.len(), self.weights.len()));
        }
        let scales = self.weights.into_iter().chain(std::iter::repeat(1.0));
        Ok(self.ids.into_iter().zip(scales).collect())
    }
}

/// Whether a call may apply all of them.
pub(super) fn check_all(adapters: &[AppliedAdapter]) -> Result<(), ApiError> {
    if adapters.len() > MAX_APPLIED {
        let message = format!("A call may use {MAX_APPLIED} adapters, this one uses {}.", adapters.len());
        return Err(ApiError::invalid_field("model", message));
    }
    match adapters.iter().find(|applied| !applied.scale.is_finite()) {
        Some(applied) => Err(ApiError::invalid_field("model", format!("{} is no scale.", applied.scale))),
        None => Ok(()),
    }
}
