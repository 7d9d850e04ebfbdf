//! Parameter cubes: how an adapter becomes one, who is shown which, and which adapter a call means that names one.
//!
//! A cube says who may use an adapter, and by its digest and its place which one; what is in memory is the registry's. An
//! adapter that has not been needed yet is read by the call that does, so whoever asks may have to wait for the disk.

use std::sync::Arc;

use axum::http::HeaderMap;

use super::service;
use crate::Error;
use crate::engine::LoadedAdapter;
use crate::memory::{AdapterSource, Cube, CubeAddress, CubeFilter, Digest, Kind, Parameter, Payload, Principal};
use crate::server::adapters::AdapterRegistry;
use crate::server::error::ApiError;
use crate::server::{App, AppRef};

/// A cube that is an adapter for the model that is served.
pub(in crate::server) struct AdapterCube(Arc<Cube>);

impl AdapterCube {
    /// `None` for a cube of another kind, or made for other weights.
    fn new(app: &App, cube: Arc<Cube>) -> Option<Self> {
        let binding = service(app).ok()?.engine.binding().ok()?;
        let fits = cube.payload.parameter()?.check_base(&cube.name, &binding).is_ok();
        fits.then_some(Self(cube))
    }

    pub(in crate::server) fn name(&self) -> &str {
        self.0.name.as_str()
    }

    /// In seconds since 1970.
    pub(in crate::server) fn created(&self) -> u64 {
        self.0.created_at.millis() / 1000
    }

    pub(in crate::server) fn parameter(&self) -> &Parameter {
        self.0.payload.parameter().expect("looked at when it was made")
    }
}

/// Those that `principal` may read, in order of name; no more than a list of cubes has at once.
pub(in crate::server) fn adapter_cubes(app: &App, principal: &Principal) -> Vec<AdapterCube> {
    let Some(service) = app.model.cubes.as_ref().filter(|cubes| cubes.catalog.has_parameters()) else {
        return Vec::new();
    };
    let filter = CubeFilter { kind: Some(Kind::Parameter), limit: usize::MAX, ..CubeFilter::default() };
    let page = service.catalog.list(principal, &filter);
    page.cubes.into_iter().filter_map(|view| AdapterCube::new(app, view.cube)).collect()
}

/// The one of that name, if `principal` may read it.
pub(in crate::server) fn adapter_cube(app: &App, principal: &Principal, name: &str) -> Option<AdapterCube> {
    let view = app.model.cubes.as_ref()?.catalog.get(principal, &name.parse::<CubeAddress>().ok()?).ok()?;
    AdapterCube::new(app, view.cube)
}

/// The payload of a cube of the adapter at `path`, which lies below a root. For those who may load adapters.
pub(super) async fn read_adapter(app: &AppRef, headers: &HeaderMap, path: String) -> Result<Payload, ApiError> {
    app.api_keys.check_admin(headers)?;
    let reading = tokio::task::spawn_blocking({
        let app = AppRef::clone(app);
        move || payload_of(&app, &path).map_err(|error| error.with_param("adapter"))
    });
    reading.await.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
}

fn payload_of(app: &App, path: &str) -> Result<Payload, ApiError> {
    let model = service(app)?.engine.binding()?;
    let (place, adapter) = registry(app)?.read(path)?;
    Ok(Payload::Parameter(Box::new(Parameter {
        digest: Digest::from(adapter.digest()),
        source: AdapterSource::try_from(&*place)?,
        weights: model.weights,
        architecture: model.architecture,
        rank: adapter.max_rank() as u32,
        num_bytes: adapter.num_bytes() as u64,
    })))
}

/// The adapter of the cube of that name, if `principal` may read one. Reads its files when nobody has before.
pub(in crate::server) fn find_adapter(
    app: &App,
    principal: &Principal,
    name: &str,
) -> Result<Option<LoadedAdapter>, ApiError> {
    let (Some(service), Ok(address)) = (&app.model.cubes, name.parse::<CubeAddress>()) else { return Ok(None) };
    let Ok(view) = service.catalog.get(principal, &address) else { return Ok(None) };
    match view.cube.payload.parameter() {
        Some(parameter) => adapter_of(app, &view.cube, parameter).map(Some),
        None => Err(ApiError::bad_request(format!(
            "Cube `{}` is {}, no adapter; name it in memory.cubes.",
            view.cube.name,
            view.cube.payload.kind().name()
        ))),
    }
}

/// The adapter of a cube that the caller may read.
pub(in crate::server) fn adapter_of(app: &App, cube: &Cube, parameter: &Parameter) -> Result<LoadedAdapter, ApiError> {
    let service = service(app)?;
    parameter.check_base(&cube.name, &service.engine.binding()?)?;
    let adapter = registry(app)?.of_cube(cube.name.as_str(), parameter).map_err(|error| unreadable(cube, error))?;
    service.catalog.note_use(cube.id);
    Ok(adapter)
}

/// What became of a cube's files: whether they are there, and hold what they held.
pub(super) fn check_files(app: &App, parameter: &Parameter) -> Result<Option<bool>, ApiError> {
    match registry(app)?.digest_at(parameter.source.path()) {
        Ok(digest) => Ok(Some(Digest::from(digest) == parameter.digest)),
        Err(Error::NotFound(_)) => Ok(None),
        Err(Error::Format(_) | Error::Unsupported(_)) => Ok(Some(false)),
        Err(other) => Err(other.into()),
    }
}

fn registry(app: &App) -> Result<&AdapterRegistry, ApiError> {
    app.model.adapters.as_ref().ok_or_else(|| ApiError::not_implemented("This server takes no adapters."))
}

/// The cube is there, its files are not what it was made of.
fn unreadable(cube: &Cube, error: Error) -> ApiError {
    match error {
        Error::NotFound(why) | Error::Format(why) | Error::Unsupported(why) => {
            ApiError::conflict(format!("The adapter of cube `{}` cannot be read: {why}", cube.name))
        }
        other => other.into(),
    }
}
