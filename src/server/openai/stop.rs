//! `stop` and the other fields that say what becomes text.

use serde::Deserialize;
use utoipa::ToSchema;

use crate::server::error::ApiError;
use crate::server::limits::{RequestLimits, check_len};
use crate::text::DetokenizerOptions;

/// Where the text ends and what it shows.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub(super) struct StopRequest {
    /// Up to 16 strings that end the output.
    stop: Option<StopStrings>,
    /// Keep the stop string in the text.
    include_stop_str_in_output: Option<bool>,
    /// Leave control tokens out of the text; on unless turned off.
    skip_special_tokens: Option<bool>,
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(untagged, expecting = "invalid type, expected a string or a list of strings")]
enum StopStrings {
    One(String),
    Many(Vec<String>),
}

impl StopRequest {
    pub(super) fn into_options(self, limits: &RequestLimits) -> Result<DetokenizerOptions, ApiError> {
        let stop = match self.stop {
            None => Vec::new(),
            Some(StopStrings::One(stop)) => vec![stop],
            Some(StopStrings::Many(stop)) => stop,
        };
        check_len("stop", stop.len(), limits.max_stop)?;
        if stop.iter().any(|stop| stop.is_empty() || stop.chars().count() > limits.max_stop_chars) {
            let message = format!("stop strings must have 1 to {} characters.", limits.max_stop_chars);
            return Err(ApiError::invalid_field("stop", message));
        }
        Ok(DetokenizerOptions {
            skip_special: self.skip_special_tokens.unwrap_or(true),
            include_stop: self.include_stop_str_in_output.unwrap_or(false),
            stop,
        })
    }
}
