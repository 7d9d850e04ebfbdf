//! Computes, in the background, the KV of cubes that have lost some of it. One cube at a time; the engine runs it only while
//! nobody else wants anything, and the disk makes room for it only at the cost of what is held on to less hard.

use std::time::Duration;

use super::holds::level_of;
use super::service::{BlockRequest, CubeService};
use super::{blocking, service};
use crate::memory::PrefillJob;
use crate::server::error::ApiError;
use crate::server::{App, AppRef};
use crate::telemetry::PrefillOutcome;

/// Cubes that are looked at together.
const MAX_JOBS: usize = 16;

/// Looks every so often for cubes that lack KV; never returns.
pub(in crate::server) async fn prefill(app: AppRef) {
    let Ok(service) = service(&app) else { return std::future::pending().await };
    loop {
        tokio::time::sleep(app.config.prefill_interval).await;
        for job in jobs(service).await {
            run(&app, service, job).await;
        }
    }
}

/// What there is to do; nothing before the vault is open.
async fn jobs(service: &CubeService) -> Vec<PrefillJob> {
    let (Ok(binding), Ok(store)) = (service.engine.binding(), service.engine.store()) else { return Vec::new() };
    let catalog = service.catalog.clone();
    let look = move || Ok(catalog.prefill_jobs(&binding.identity, MAX_JOBS, |blocks| store.count_missing(blocks)));
    blocking(look).await.unwrap_or_default()
}

async fn run(app: &App, service: &CubeService, job: PrefillJob) {
    let (catalog, metrics, id) = (&service.catalog, &app.model.engine.metrics().prefills, job.cube.id);
    if let Some(reason) = reason_to_wait(app, service, &job) {
        metrics.count(PrefillOutcome::Deferred);
        catalog.note_prefill_deferred(id, reason.to_owned());
        return;
    }
    match compute(service, &job).await {
        Ok(()) => {
            tracing::info!(cube = %job.cube.name, num_blocks = job.num_missing, "KV that a cube had lost was computed");
            metrics.count(PrefillOutcome::Done);
            catalog.note_prefilled(id);
        }
        Err(error) => {
            let reason = error.object().message.clone();
            tracing::warn!(cube = %job.cube.name, %reason, "KV that a cube has lost cannot be computed");
            metrics.count(PrefillOutcome::Failed);
            catalog.note_prefill_failed(id, reason);
        }
    }
}

fn reason_to_wait(app: &App, service: &CubeService, job: &PrefillJob) -> Option<&'static str> {
    let activation = job.cube.payload.activation()?;
    if activation.token_ids().len() > app.model.engine.info().max_model_len {
        return Some("The cube is longer than this server's context.");
    }
    let level = level_of(job.cube.governance.hold()).priority();
    let fits = service.engine.store().is_ok_and(|store| store.would_fit(job.num_missing, level));
    (!fits).then_some("The vault is full of what is held on to as hard; the next use computes the KV.")
}

/// The same tokens in the same domain have blocks of the same names.
async fn compute(service: &CubeService, job: &PrefillJob) -> Result<(), ApiError> {
    let Some(activation) = job.cube.payload.activation() else { return Ok(()) };
    let wanted = BlockRequest {
        token_ids: activation.token_ids().to_vec(),
        domain: activation.binding().domain.to_string(),
        durable: true,
        source: None,
        erase_on_free: job.cube.governance.erase_on_free,
        priority: job.cube.governance.hold(),
        is_background: true,
    };
    let found = service.engine.materialize(wanted).await?;
    service.engine.settle(found.blocks.iter().chain(&found.tail).copied().collect());
    match found.blocks == activation.full_blocks() {
        true => Ok(()),
        false => Err(ApiError::internal("The cube's tokens have blocks of other names here; make the cube anew.")),
    }
}

/// Time between two looks unless a configuration says otherwise.
pub(in crate::server) const PREFILL_INTERVAL: Duration = Duration::from_secs(10);
