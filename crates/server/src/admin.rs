//! For those who run the server: ending requests, sleep, a look inside (`serving.md` 4.7, 13.5).

use std::sync::{Arc, PoisonError};
use std::time::Instant;

use axum::Json;
use axum::body::Body;
use axum::extract::{Extension, Query, State as Shared};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use engine::{Engine, Replicas, Stats};
use gptoss::BLOCK_TOKENS;
use serde::Deserialize;
use serde_json::json;

use crate::body;
use crate::error::ApiError;
use crate::json::{self, Field};
use crate::routes::Origin;
use crate::server::State;

/// Names in one call.
const MAX_IDS: usize = 4096;

/// `POST /reset_prefix_cache`
pub(crate) async fn reset_prefix_cache(Shared(state): Shared<Arc<State>>) -> Result<StatusCode, ApiError> {
    state.engine()?;
    state.loaded().iter().for_each(Replicas::reset_prefix_cache);
    Ok(StatusCode::OK)
}

/// `POST /abort_requests`: those that run, by the id of the answer or of the request.
pub(crate) async fn abort_requests(
    Shared(state): Shared<Arc<State>>,
    body: Body,
) -> Result<StatusCode, ApiError> {
    let body = body::read(body, &state.bodies).await?;
    let object = Field::root(json::document(&body)?).object(&["request_ids"])?;
    let ids = object.required("request_ids")?.array(MAX_IDS)?;
    state.running.abort(&ids.iter().map(Field::string).collect::<Result<_, _>>()?);
    Ok(StatusCode::OK)
}

#[derive(Deserialize)]
pub(crate) struct SleepQuery {
    #[serde(default = "SleepQuery::level")]
    level: u8,
}

impl SleepQuery {
    fn level() -> u8 {
        1
    }
}

/// `POST /sleep?level=1`
pub(crate) async fn sleep(
    Shared(state): Shared<Arc<State>>,
    Extension(origin): Extension<Origin>,
    Query(query): Query<SleepQuery>,
) -> Result<StatusCode, ApiError> {
    match query.level {
        level @ (1 | 2) => to_the_end(&origin, async move { state.sleep(level).await }).await,
        level => Err(ApiError::invalid("level", format!("level must be 1 or 2, got {level}."))),
    }
}

/// `POST /wake_up`: all of it, whatever tags say.
pub(crate) async fn wake_up(
    Shared(state): Shared<Arc<State>>,
    Extension(origin): Extension<Origin>,
) -> Result<StatusCode, ApiError> {
    let request_id = origin.log.request_id().to_owned();
    to_the_end(&origin, async move { state.wake(&request_id).await }).await
}

/// Does something on a task of its own, so that a client that goes away does not leave it half done.
async fn to_the_end(
    origin: &Origin,
    work: impl Future<Output = Result<(), ApiError>> + Send + 'static,
) -> Result<StatusCode, ApiError> {
    let done = tokio::spawn(work).await;
    done.unwrap_or_else(|error| {
        tracing::error!(request_id = origin.log.request_id(), %error, "sleeping or waking failed");
        Err(ApiError::Internal { request_id: origin.log.request_id().to_owned() })
    })
    .map(|()| StatusCode::OK)
}

/// `GET /is_sleeping`
pub(crate) async fn is_sleeping(Shared(state): Shared<Arc<State>>) -> Response {
    Json(json!({"is_sleeping": state.asleep().is_some()})).into_response()
}

/// `POST /start_profile`
pub(crate) async fn start_profile(Shared(state): Shared<Arc<State>>) -> Result<StatusCode, ApiError> {
    state.engine()?;
    let stats = state.stats();
    *state.profile.lock().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now(), stats));
    Ok(StatusCode::OK)
}

/// `POST /stop_profile`: what the engines have done since the start. Kernels are timed by `--profile`.
pub(crate) async fn stop_profile(Shared(state): Shared<Arc<State>>) -> Result<Response, ApiError> {
    state.engine()?;
    let now = state.stats();
    let profile = state.profile.lock().unwrap_or_else(PoisonError::into_inner).take();
    let Some((start, before)) = profile else {
        return Err(ApiError::body("No profile was started."));
    };
    let seconds = start.elapsed().as_secs_f64();
    let done = |count: fn(&Stats) -> u64| {
        let sum = |stats: &[Stats]| stats.iter().map(count).sum::<u64>();
        sum(&now).saturating_sub(sum(&before))
    };
    let (steps, generated) = (done(|stats| stats.steps), done(|stats| stats.generated_tokens));
    Ok(Json(json!({
        "seconds": seconds,
        "steps": steps,
        "failed_steps": done(|stats| stats.failed_steps),
        "prompt_tokens": done(|stats| stats.prompt_tokens),
        "generated_tokens": generated,
        "generated_tokens_per_second": generated as f64 / seconds.max(1e-9),
        "generated_tokens_per_step": generated as f64 / steps.max(1) as f64,
        "preemptions": done(|stats| stats.preemptions)
    }))
    .into_response())
}

/// `GET /server_info`
pub(crate) async fn server_info(Shared(state): Shared<Arc<State>>) -> Response {
    let replicas = state.loaded();
    let engines: Vec<&Engine> =
        replicas.iter().flat_map(Replicas::serving).map(|(_, engine)| engine).collect();
    let stats = state.stats();
    let sum = |count: fn(&Stats) -> usize| stats.iter().map(count).sum::<usize>();
    Json(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "model": {
            "names": state.model_names,
            "root": state.root,
            "max_model_len": engines.first().map(|engine| engine.max_model_len())
        },
        "device": engines.first().map(|engine| engine.device()),
        "devices": engines.iter().map(|engine| engine.device()).collect::<Vec<_>>(),
        "memory": {
            "block_tokens": BLOCK_TOKENS,
            "full_blocks": sum(|stats| stats.full_blocks),
            "sliding_blocks": sum(|stats| stats.sliding_blocks)
        },
        "limits": {
            "max_body_bytes": state.bodies.max(),
            "max_logprobs": Some(state.max_logprobs).filter(|&max| max < usize::MAX),
            "request_timeout_seconds": state.request_timeout.map(|time| time.as_secs_f64()),
            "client_stall_timeout_seconds": state.client_stall_timeout.as_secs_f64()
        },
        "api_keys": !state.keys.is_empty(),
        "configuration": state.info
    }))
    .into_response()
}
