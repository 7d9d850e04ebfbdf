//! The adapters of a call: what its model's name means, and the fields by which other servers take them.

use serde::Deserialize;
use utoipa::ToSchema;

use crate::engine::{AppliedAdapter, MAX_APPLIED};
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

/// Everything a call applies: `model` without its cubes, `lora`, and SGLang's `lora_path`.
pub(super) fn adapters_of(
    app: &App,
    model: &str,
    lora: Option<Vec<LoraScale>>,
    lora_path: Option<String>,
) -> Result<Vec<AppliedAdapter>, ApiError> {
    let mut adapters = app.model.adapters_of(Some(model).filter(|name| !name.is_empty()))?;
    let known = app.model.adapters.as_ref().map(AdapterRegistry::list).unwrap_or_default();
    for LoraScale { id, scale } in lora.into_iter().flatten() {
        let missing =
            || ApiError::invalid_field("lora", format!("There is no adapter {id}; {} are loaded.", known.len()));
        let adapter = known.get(id).ok_or_else(missing)?.adapter.clone();
        adapters.push(AppliedAdapter { adapter, scale });
    }
    if let Some(name) = lora_path {
        let missing = || ApiError::not_found(format!("The adapter `{name}` does not exist.")).with_param("lora_path");
        let found = known.iter().find(|known| known.name == name).ok_or_else(missing)?;
        adapters.push(AppliedAdapter { adapter: found.adapter.clone(), scale: 1.0 });
    }
    match adapters.len() {
        0..=MAX_APPLIED => Ok(adapters),
        found => Err(ApiError::invalid_field(
            "model",
            format!("A call may use {MAX_APPLIED} adapters, this one uses {found}."),
        )),
    }
}
