//! Prompt and output of a completion as a cube: a new one, or a new version of one that is there.

use super::object::Work;
use super::service::{BlockRequest, BlockSource};
use super::{blocking, domain_of, service};
use crate::memory::{
    Activation, Binding, Blocks, Catalog, CubeAddress, CubeChanges, CubeName, CubeView, Durability, Governance,
    NewCube, Origin, Payload, Principal,
};
use crate::server::App;
use crate::server::error::ApiError;

/// Tokens that a call has run through the model, on their way into a cube.
pub(in crate::server) struct CubeToSave {
    pub(in crate::server) name: CubeName,
    pub(in crate::server) principal: Principal,
    pub(in crate::server) token_ids: Vec<u32>,
    /// Where the call may find their blocks.
    pub(in crate::server) source: BlockSource,
    pub(in crate::server) durability: Durability,
    /// The cubes that the prompt began with; of a new cube they are the parents.
    pub(in crate::server) parents: Vec<crate::memory::CubeId>,
    /// What describes and governs a new cube.
    pub(in crate::server) changes: CubeChanges,
}

/// Whether `principal` may save under this name: looked at before anything is computed.
pub(in crate::server) fn check_save(app: &App, principal: &Principal, name: &CubeName) -> Result<(), ApiError> {
    let catalog = &service(app)?.catalog;
    match catalog.get(principal, &CubeAddress::from(name.clone())) {
        Ok(view) if view.cube.payload.activation().is_none() => Err(other_kind(name)),
        Ok(_) => Ok(catalog.check_append(principal, name)?),
        Err(_) => Ok(catalog.check_name(principal, name)?),
    }
}

fn other_kind(name: &CubeName) -> ApiError {
    ApiError::conflict(format!("Cube `{name}` has no KV, so none can be saved to it; choose another name."))
}

/// Keeps the blocks and writes the cube down.
pub(in crate::server) async fn save(app: &App, cube: CubeToSave) -> Result<(CubeView, Work), ApiError> {
    let CubeToSave { name, principal, token_ids, source, durability, parents, changes } = cube;
    let max = app.model.engine.info().max_model_len;
    if token_ids.len() >= max {
        let message = format!("{} tokens fill the context of {max}; no prompt could follow them.", token_ids.len());
        return Err(ApiError::bad_request(message).with_code("context_length_exceeded"));
    }
    let service = service(app)?;
    let domain = domain_of(app, &name);
    let binding = Binding { template: None, domain: domain.parse()?, ..service.engine.binding()? };
    let durable = durability == Durability::Synced;
    let older = service.catalog.get(&principal, &CubeAddress::from(name.clone())).ok();
    let governance = older.as_ref().map(|view| &view.cube.governance);
    let is_marked = governance.is_some_and(|governance| governance.erase_on_free);
    let wanted = BlockRequest {
        token_ids: token_ids.clone(),
        domain,
        durable,
        source: Some(source),
        erase_on_free: is_marked || changes.erase_on_free.unwrap_or(false),
        priority: governance.map(Governance::hold).or(changes.priority).unwrap_or_default(),
        is_background: false,
    };
    let found = service.engine.materialize(wanted).await?;
    let work = Work::of(&found);
    let blocks = Blocks { full: found.blocks, tail: found.tail, num_bytes: found.bytes };
    let payload = Payload::Activation(Box::new(Activation::new(None, binding, token_ids, blocks)?));
    let new = NewCube { name, payload, parents, origin: Origin::Inference, changes };
    let catalog = service.catalog.clone();
    let view = blocking(move || put(&catalog, &principal, new, durability)).await?;
    service.settle(&view);
    Ok((view, work))
}

/// A version behind the newest one, where there is a cube of that name.
fn put(catalog: &Catalog, principal: &Principal, new: NewCube, durability: Durability) -> crate::Result<CubeView> {
    match catalog.get(principal, &CubeAddress::from(new.name.clone())) {
        Ok(view) => catalog.append(principal, &new.name, view.newest, new.payload),
        Err(_) => catalog.create(principal, new, durability),
    }
}
