//! What the model would be fed, and how its answer would be sampled, without running it.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::response::{IntoResponse, Response};
use engine::SamplingParams;
use serde::Serialize;
use serde_json::json;
use serde_json::value::RawValue;

use crate::answer::raw;
use crate::body;
use crate::completion_request::CompletionRequest;
use crate::error::ApiError;
use crate::generate::{MAX_ID_BYTES, MAX_REPEATED_BYTES, blocking, chat_ids, context, tokenize};
use crate::routes::Origin;
use crate::server::State;

/// A prompt, as it would be run.
#[derive(Serialize)]
struct Rendered<'a> {
    request_id: &'a str,
    model: &'a str,
    token_ids: &'a [u32],
    sampling_params: &'a RawValue,
}

/// `POST /v1/chat/completions/render`
pub(crate) async fn chat(state: Arc<State>, origin: Origin, body: Body) -> Result<Response, ApiError> {
    let engine = state.engine()?;
    let body = body::read(body, &state.bodies).await?;
    let id = format!("chatcmpl-{}", origin.log.request_id());
    let answer = blocking(&origin, move || {
        let (ids, params) = chat_ids(&body, &state, &engine)?;
        let sampling_params = &*sampling(&params);
        let model = &state.model_names[0];
        Ok(raw(&Rendered { request_id: &id, model, token_ids: &ids, sampling_params }))
    });
    Ok(Json(answer.await?).into_response())
}

/// `POST /v1/completions/render`: an object for one prompt, a list of them for several.
pub(crate) async fn completions(state: Arc<State>, origin: Origin, body: Body) -> Result<Response, ApiError> {
    let engine = state.engine()?;
    let body = body::read(body, &state.bodies).await?;
    let id = format!("cmpl-{}", origin.log.request_id());
    let answer = blocking(&origin, move || {
        let date = state.date();
        let mut request = CompletionRequest::new(&body, &context(&state, &engine, date.as_deref()))?;
        let sampling_params = &*sampling(&request.params);
        let prompts = std::mem::take(&mut request.prompts);
        let mut bytes = sampling_params.get().len().saturating_mul(prompts.len());
        let mut all = Vec::with_capacity(prompts.len());
        for prompt in prompts {
            let ids = tokenize(prompt, &request, &engine)?.ids;
            bytes = bytes.saturating_add(ids.len() * MAX_ID_BYTES);
            all.push(ids);
        }
        if bytes > MAX_REPEATED_BYTES {
            let message = format!(
                "prompt must be of so few tokens and prompts, each shown with the sampling parameters, that they take at most \
                 {MAX_REPEATED_BYTES} bytes, got {bytes}."
            );
            return Err(ApiError::invalid("prompt", message));
        }
        let model = &state.model_names[0];
        let rendered = |ids| Rendered { request_id: &id, model, token_ids: ids, sampling_params };
        let all: Vec<Rendered<'_>> = all.iter().map(|ids| rendered(ids)).collect();
        Ok(match &all[..] {
            [one] => raw(one),
            several => raw(&several),
        })
    });
    Ok(Json(answer.await?).into_response())
}

fn sampling(params: &SamplingParams) -> Box<RawValue> {
    raw(&json!({
        "n": params.n,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "min_p": params.min_p,
        "seed": params.seed,
        "max_tokens": params.max_tokens,
        "min_tokens": params.min_tokens,
        "stop": params.stop,
        "stop_token_ids": params.stop_token_ids,
        "include_stop_str_in_output": params.include_stop_str_in_output,
        "ignore_eos": params.ignore_eos,
        "logprobs": params.logprobs,
        "prompt_logprobs": params.prompt_logprobs,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "repetition_penalty": params.repetition_penalty,
        "logit_bias": params.logit_bias,
        "allowed_token_ids": params.allowed_token_ids.as_deref(),
        "bad_words": *params.bad_words,
        "skip_special_tokens": params.skip_special_tokens
    }))
}
