//! `memory.save`: when a call has been answered, its prompt and output become a cube. Whatever comes of that, the answer
//! stays.

use std::pin::Pin;
use std::task::{Context, Poll};

use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;
use utoipa::ToSchema;

use super::call::Call;
use super::choice::ChoiceEvent;
use super::generation::Generation;
use crate::memory::{Cube, CubeChanges, CubeId, CubeName, CubeView, Durability, Label, Labels, Principal};
use crate::server::cubes::{BlockSource, CubeToSave, check_save, save};
use crate::server::error::{ApiError, ErrorObject};
use crate::server::{App, AppRef, CallGuard};

/// The request field.
const FIELD: &str = "memory.save";

/// What the prompt and its answer are kept as.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct SaveRequest {
    /// `namespace/path`: a new cube, or a new version of one that is there.
    name: String,
    /// End the answer only when the cube would survive a crash; on unless turned off.
    durable: Option<bool>,
}

/// A checked [`SaveRequest`].
#[derive(Debug, Clone)]
pub(super) struct SavePlan {
    name: CubeName,
    principal: Principal,
    durability: Durability,
    parents: Vec<CubeId>,
    changes: CubeChanges,
}

/// What became of `memory.save`.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(super) struct SavedCube {
    name: String,
    /// Null when nothing was saved.
    version: Option<u32>,
    /// Tokens of prompt and output.
    num_tokens: usize,
    /// Of these, tokens whose KV was found.
    restored_tokens: usize,
    /// Tokens that were computed for the cube.
    computed_tokens: usize,
    reason: String,
    /// Why nothing was saved.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(inline)]
    error: Option<ErrorObject>,
}

impl SaveRequest {
    /// Checks the name before anything is computed; `sources` are the cubes of the call.
    pub(super) fn check<'a>(
        self,
        app: &App,
        principal: &Principal,
        sources: impl Iterator<Item = &'a Cube> + Clone,
    ) -> Result<SavePlan, ApiError> {
        let name: CubeName = self.name.parse().map_err(|error| ApiError::from(error).with_param(FIELD))?;
        check_save(app, principal, &name).map_err(|error| error.with_param(FIELD))?;
        // Marks of care stay with the content.
        let marks: Vec<Label> = sources.clone().flat_map(|cube| cube.governance.sensitivity.iter().cloned()).collect();
        let sensitivity = Labels::try_from(marks).map_err(|error| ApiError::from(error).with_param(FIELD))?;
        let erase_on_free = sources.clone().any(|cube| cube.governance.erase_on_free);
        let mut parents: Vec<CubeId> = sources.map(|cube| cube.id).collect();
        parents.sort();
        parents.dedup();
        Ok(SavePlan {
            name,
            principal: principal.clone(),
            durability: if self.durable.unwrap_or(true) { Durability::Synced } else { Durability::Unsynced },
            parents,
            changes: CubeChanges {
                sensitivity: Some(sensitivity),
                erase_on_free: Some(erase_on_free),
                ..CubeChanges::default()
            },
        })
    }
}

impl SavePlan {
    /// Refuses what has no KV of its own from the first token on.
    pub(super) fn check(generation: &Generation, call: &Call) -> Result<(), ApiError> {
        let refused = |message: &str| Err(ApiError::invalid_field(FIELD, message));
        if call.save.is_none() {
            return Ok(());
        }
        if generation.num_choices() != 1 {
            return refused("Only one prompt with one choice can be saved.");
        }
        if generation.is_composed() {
            return refused(
                "The KV behind linked cubes is an approximation and cannot be saved; use compose=\"text\".",
            );
        }
        if !call.adapters.is_empty() {
            return refused("What was computed under adapters cannot be saved as a cube of the model alone.");
        }
        Ok(())
    }
}

/// A call's output on its way into a cube.
pub(super) struct Save {
    app: AppRef,
    plan: SavePlan,
    source: BlockSource,
    /// Prompt, then output.
    token_ids: Vec<u32>,
    running: Option<JoinHandle<SavedCube>>,
}

impl Save {
    /// What `call` wants saved of its one prompt.
    pub(super) fn of(app: &AppRef, generation: &Generation, call: &Call) -> Option<Self> {
        let plan = call.save.clone()?;
        let shared_prefix = call.shared_prefix(generation.num_cube_tokens());
        let source = BlockSource { domain: call.domain.clone(), shared_prefix };
        let token_ids = generation.prompt_of(0).to_vec();
        Some(Self { app: app.clone(), plan, source, token_ids, running: None })
    }

    /// Takes an output token over. `false` when there will be nothing to save.
    pub(super) fn absorb(&mut self, event: &ChoiceEvent) -> bool {
        if let ChoiceEvent::Token { id, .. } = event {
            self.token_ids.push(*id);
        }
        !matches!(event, ChoiceEvent::Failed(_))
    }

    /// Saves, once all output is there. That goes on when the caller leaves; `guard` lets a shutdown wait for it.
    pub(super) fn poll(&mut self, guard: &mut Option<CallGuard>, context: &mut Context<'_>) -> Poll<SavedCube> {
        let Self { app, plan, source, token_ids, running } = self;
        let task = running.get_or_insert_with(|| {
            let (app, plan, guard) = (app.clone(), plan.clone(), guard.take());
            let (source, token_ids) = (source.clone(), std::mem::take(token_ids));
            tokio::spawn(async move {
                let saved = run(&app, plan, source, token_ids).await;
                drop(guard);
                saved
            })
        });
        Pin::new(task).poll(context).map(|ended| match ended {
            Ok(saved) => saved,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        })
    }
}

async fn run(app: &App, plan: SavePlan, source: BlockSource, token_ids: Vec<u32>) -> SavedCube {
    let SavePlan { name, principal, durability, parents, changes } = plan;
    let (shown, num_tokens) = (name.to_string(), token_ids.len());
    let cube = CubeToSave { name, principal, token_ids, source, durability, parents, changes };
    match save(app, cube).await {
        Ok((view, work)) => SavedCube::new(&view, num_tokens, work.into_parts()),
        Err(error) => {
            tracing::warn!(cube = %shown, message = %error.object().message, "an answer was not saved");
            SavedCube::failed(shown, num_tokens, &error)
        }
    }
}

impl SavedCube {
    fn new(
        view: &CubeView,
        num_tokens: usize,
        (restored_tokens, computed_tokens, reason): (usize, usize, String),
    ) -> Self {
        let (name, version) = (view.cube.name.to_string(), Some(view.cube.version.get()));
        Self { name, version, num_tokens, restored_tokens, computed_tokens, reason, error: None }
    }

    fn failed(name: String, num_tokens: usize, error: &ApiError) -> Self {
        let reason = "Nothing was saved.".to_owned();
        let error = Some(error.object().clone());
        Self { name, version: None, num_tokens, restored_tokens: 0, computed_tokens: 0, reason, error }
    }
}
