//! `/v1/embeddings`: texts or tokens in, unit vectors out.

use axum::Json;
use axum::extract::State;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::call::{Call, CallRequest, Caller};
use super::choice::engine_failure;
use super::prompt::{PromptInput, check_prompt_len};
use crate::engine::handle::OutputStream;
use crate::engine::request::{FinishReason, GenerateRequest, OutputEvent, Task};
use crate::server::error::{ApiError, ErrorBody};
use crate::server::json::JsonBody;
use crate::server::{App, AppRef};

/// Body of `POST /v1/embeddings`; fields not listed are ignored.
#[derive(Debug, Deserialize, ToSchema)]
pub(in crate::server) struct EmbeddingRequest {
    /// What to embed.
    input: PromptInput,
    /// Lists of numbers, or base64 of little-endian 32-bit floats.
    encoding_format: Option<EncodingFormat>,
    /// Keep only this many leading numbers, scaled to length 1 again.
    #[schema(minimum = 1)]
    dimensions: Option<usize>,
    /// Add the tokens that texts begin with (BOS); on unless turned off.
    add_special_tokens: Option<bool>,
}

#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum EncodingFormat {
    Float,
    Base64,
}

/// Answer of `POST /v1/embeddings`.
#[derive(Serialize, ToSchema)]
pub(in crate::server) struct EmbeddingResponse {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
    data: Vec<Embedding>,
    usage: EmbeddingUsage,
}

/// The vector of one input.
#[derive(Serialize, ToSchema)]
struct Embedding {
    object: &'static str,
    index: usize,
    embedding: EncodedVector,
}

#[derive(Serialize, ToSchema)]
#[serde(untagged)]
enum EncodedVector {
    Float(Vec<f32>),
    Base64(String),
}

/// Tokens read.
#[derive(Serialize, ToSchema)]
struct EmbeddingUsage {
    prompt_tokens: usize,
    total_tokens: usize,
}

struct EmbeddingPlan {
    call: Call,
    inputs: Vec<Vec<u32>>,
    dimensions: usize,
    format: EncodingFormat,
}

/// Embeds inputs.
#[utoipa::path(
    post,
    path = "/v1/embeddings",
    request_body = EmbeddingRequest,
    responses((status = 200, body = EmbeddingResponse), (status = "4XX", body = ErrorBody))
)]
pub(in crate::server) async fn create(
    State(app): State<AppRef>,
    caller: Caller,
    body: JsonBody,
) -> Result<Json<EmbeddingResponse>, ApiError> {
    let plan = app.prepare(body, move |app, body| plan(app, body, &caller)).await?;
    let _guard = app.begin_call()?;
    let prompt_tokens = plan.inputs.iter().map(Vec::len).sum();
    let EmbeddingPlan { call, inputs, dimensions, format } = plan;
    let streams = submit(&app, &call, inputs)?;
    let mut data = Vec::with_capacity(streams.len());
    for (index, stream) in streams.into_iter().enumerate() {
        let vector = unit_vector(receive(&app, stream).await?, dimensions);
        data.push(Embedding { object: "embedding", index, embedding: format.encode(vector) });
    }
    let usage = EmbeddingUsage { prompt_tokens, total_tokens: prompt_tokens };
    let head = call.head;
    Ok(Json(EmbeddingResponse { id: head.id, object: "list", created: head.created, model: head.model, data, usage }))
}

fn plan(app: &App, body: &JsonBody, caller: &Caller) -> Result<EmbeddingPlan, ApiError> {
    let info = app.model.engine.info();
    let call = body.parse::<CallRequest>()?.check(app, "embd", caller)?;
    if call.memory.is_some() {
        return Err(ApiError::invalid_field("memory", "An embedding is of its input alone; it takes no cubes."));
    }
    let request = body.parse::<EmbeddingRequest>()?;
    let dimensions = match request.dimensions {
        Some(num) if !(1..=info.hidden_size).contains(&num) => {
            let message = format!("dimensions must be between 1 and {}, got {num}.", info.hidden_size);
            return Err(ApiError::invalid_field("dimensions", message));
        }
        num => num.unwrap_or(info.hidden_size),
    };
    let mut inputs = request.input.tokenize("input", app, request.add_special_tokens.unwrap_or(true))?;
    if inputs.is_empty() {
        return Err(ApiError::invalid_field("input", "input must not be empty."));
    }
    for input in &mut inputs {
        if let Some(truncation) = call.truncation {
            truncation.apply(input);
        }
        check_prompt_len("input", input, info.max_model_len)?;
    }
    Ok(EmbeddingPlan { call, inputs, dimensions, format: request.encoding_format.unwrap_or(EncodingFormat::Float) })
}

fn submit(app: &App, call: &Call, inputs: Vec<Vec<u32>>) -> Result<Vec<OutputStream>, ApiError> {
    let submit = |(index, prompt)| {
        let request = GenerateRequest {
            id: format!("{}-{index}", call.head.id),
            prompt,
            task: Task::Embed,
            priority: call.priority,
            domain: call.domain.clone(),
            shared_prefix: None,
            adapters: call.adapters.clone(),
            pieces: vec![],
            level: Default::default(),
            erase_on_free: false,
        };
        app.model.engine.submit(request).map_err(ApiError::from)
    };
    inputs.into_iter().enumerate().map(submit).collect()
}

async fn receive(app: &App, mut stream: OutputStream) -> Result<Vec<f32>, ApiError> {
    loop {
        match stream.next().await {
            Some(OutputEvent::Embedding(vector)) => return Ok(vector),
            Some(OutputEvent::Started { .. }) => {}
            Some(OutputEvent::Finished(FinishReason::Abort)) => {
                return Err(ApiError::unavailable("The server is shutting down."));
            }
            Some(event) => {
                tracing::error!(?event, "the engine made no embedding");
                return Err(engine_failure());
            }
            None => {
                app.note_engine_end();
                return Err(engine_failure());
            }
        }
    }
}

/// The first `dimensions` numbers, scaled to length 1. A vector of zeros stays as it is.
fn unit_vector(mut vector: Vec<f32>, dimensions: usize) -> Vec<f32> {
    vector.truncate(dimensions);
    let norm = vector.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>().sqrt();
    if norm > 0.0 {
        vector.iter_mut().for_each(|x| *x = (f64::from(*x) / norm) as f32);
    }
    vector
}

impl EncodingFormat {
    fn encode(self, vector: Vec<f32>) -> EncodedVector {
        match self {
            Self::Float => EncodedVector::Float(vector),
            Self::Base64 => {
                let bytes: Vec<u8> = vector.iter().flat_map(|x| x.to_le_bytes()).collect();
                EncodedVector::Base64(BASE64_STANDARD.encode(bytes))
            }
        }
    }
}
