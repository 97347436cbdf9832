//! Small endpoints: tokens of texts and back, load, and what tools made for Ollama ask before they start (`serving.md` 4).

use std::borrow::Cow;
use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::{Extension, State as Shared};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Serialize, Serializer};
use serde_json::json;
use tokenizer::Tokenizer;

use crate::body;
use crate::error::ApiError;
use crate::generate;
use crate::json::{self, Field};
use crate::request::check_model;
use crate::routes::Origin;
use crate::server::State;

/// `POST /tokenize`: of a text, or of a conversation as the chat endpoint would feed it.
pub(crate) async fn tokenize(
    Shared(state): Shared<Arc<State>>,
    Extension(origin): Extension<Origin>,
    body: Body,
) -> Result<Response, ApiError> {
    let engine = state.engine()?;
    let body = body::read(body, &state.bodies).await?;
    let answer = generate::blocking(&origin, move || {
        let object = Field::root(json::document(&body)?).object(&[
            "model",
            "prompt",
            "messages",
            "return_token_strs",
        ])?;
        check_model(object.string("model")?.as_deref(), &state.model_names)?;
        let tokens = if object.field("messages").is_some() {
            generate::chat_ids(&body, &state, &engine)?.0
        } else {
            let prompt = object.required("prompt")?.string()?;
            generate::bound_text(prompt.len(), &engine)?;
            engine.harmony().tokenizer().encode_with_special(&prompt)
        };
        let names = object.bool("return_token_strs")? == Some(true);
        let tokenized = Tokenized {
            count: tokens.len(),
            max_model_len: engine.max_model_len(),
            tokens: &tokens,
            token_strs: names.then(|| Names { tokens: &tokens, tokenizer: engine.harmony().tokenizer() }),
        };
        Ok(serde_json::to_vec(&tokenized).expect("an answer is JSON"))
    });
    Ok(([(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))], answer.await?)
        .into_response())
}

/// The answer, written as JSON without a copy of its parts: there may be millions.
#[derive(Serialize)]
struct Tokenized<'a> {
    count: usize,
    max_model_len: usize,
    tokens: &'a [u32],
    token_strs: Option<Names<'a>>,
}

/// Each token alone; what is not UTF-8 alone is shown byte by byte.
struct Names<'a> {
    tokens: &'a [u32],
    tokenizer: &'a Tokenizer,
}

impl Serialize for Names<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.tokens.iter().map(|&token| {
            let bytes = self.tokenizer.token_bytes(token).unwrap_or_default();
            match std::str::from_utf8(bytes) {
                Ok(text) => Cow::Borrowed(text),
                Err(_) => bytes.iter().map(|byte| format!("<0x{byte:02X}>")).collect(),
            }
        }))
    }
}

/// `POST /detokenize`
pub(crate) async fn detokenize(
    Shared(state): Shared<Arc<State>>,
    Extension(origin): Extension<Origin>,
    body: Body,
) -> Result<Response, ApiError> {
    let engine = state.engine()?;
    let body = body::read(body, &state.bodies).await?;
    let answer = generate::blocking(&origin, move || {
        let object = Field::root(json::document(&body)?).object(&["model", "tokens"])?;
        check_model(object.string("model")?.as_deref(), &state.model_names)?;
        let field = object.required("tokens")?;
        let tokens = field.ids()?;
        let (count, max) = (tokens.len(), engine.max_model_len());
        if count > max {
            let message = format!("tokens must be at most the {max} of this model's context, got {count}.");
            return Err(field.error(message));
        }
        let tokenizer = engine.harmony().tokenizer();
        if let Some(token) = tokens.iter().find(|&&token| tokenizer.token_bytes(token).is_none()) {
            return Err(field.error(format!("There is no token with the id {token}.")));
        }
        Ok(json!({"prompt": tokenizer.decode(&tokens)}))
    });
    Ok(Json(answer.await?).into_response())
}

/// `GET /load`: how many requests are in the engines.
pub(crate) async fn load(Shared(state): Shared<Arc<State>>) -> Response {
    Json(json!({"server_load": state.requests()})).into_response()
}

/// `GET /metrics`
pub(crate) async fn metrics(Shared(state): Shared<Arc<State>>, headers: HeaderMap) -> Response {
    let accept = headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok()).unwrap_or_default();
    let open = accept.contains("application/openmetrics-text");
    let text = state.metrics.text(state.loaded().as_ref(), state.asleep(), &state.model_names[0], open);
    let kind = match open {
        true => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        false => "text/plain; version=0.0.4; charset=utf-8",
    };
    ([(header::CONTENT_TYPE, HeaderValue::from_static(kind))], text).into_response()
}

/// `GET /api/version`
pub(crate) async fn ollama_version() -> Response {
    Json(json!({"version": env!("CARGO_PKG_VERSION")})).into_response()
}

/// `GET /api/tags`
pub(crate) async fn ollama_tags(Shared(state): Shared<Arc<State>>) -> Result<Response, ApiError> {
    state.engine()?;
    let model = |name: &String| {
        json!({"name": name, "model": name, "modified_at": "1970-01-01T00:00:00Z", "size": 0, "digest": "",
            "details": {"format": "safetensors", "family": "gptoss"}})
    };
    let models: Vec<_> = state.model_names.iter().map(model).collect();
    Ok(Json(json!({"models": models})).into_response())
}

/// `POST /api/show`
pub(crate) async fn ollama_show(Shared(state): Shared<Arc<State>>, body: Body) -> Result<Response, ApiError> {
    let max_model_len = state.engine()?.max_model_len();
    ollama_model(&state, body).await?;
    Ok(Json(json!({
        "details": {"format": "safetensors", "family": "gptoss"},
        "model_info": {"general.architecture": "gptoss", "gptoss.context_length": max_model_len},
        "capabilities": ["completion", "tools", "thinking"]
    }))
    .into_response())
}

/// `POST /api/pull`: the served model is there, others never come.
pub(crate) async fn ollama_pull(Shared(state): Shared<Arc<State>>, body: Body) -> Result<Response, ApiError> {
    ollama_model(&state, body).await?;
    let json = HeaderValue::from_static("application/x-ndjson");
    Ok(([(header::CONTENT_TYPE, json)], "{\"status\":\"success\"}\n").into_response())
}

async fn ollama_model(state: &State, body: Body) -> Result<StatusCode, ApiError> {
    let body = body::read(body, &state.bodies).await?;
    let object = Field::root(json::document(&body)?).object(&["model", "name"])?;
    let name = object.string("model")?.or(object.string("name")?).unwrap_or_default();
    // Ollama adds a tag to names without one.
    let name = name.strip_suffix(":latest").unwrap_or(&name);
    check_model(Some(name), &state.model_names).map(|()| StatusCode::OK)
}

/// `POST /invocations`: SageMaker's only path; the body's shape says what is meant.
pub(crate) async fn invocations(
    Shared(state): Shared<Arc<State>>,
    Extension(origin): Extension<Origin>,
    body: Body,
) -> Result<Response, ApiError> {
    let body = body::read(body, &state.bodies).await?;
    let shape = Field::root(json::document(&body)?).object(&["messages", "prompt", "input"])?;
    let is = |name| shape.field(name).is_some();
    let (chat, prompt, input) = (is("messages"), is("prompt"), is("input"));
    let body = body.release();
    match (chat, prompt, input) {
        (true, ..) => generate::chat(state, origin, body).await,
        (_, true, _) => generate::completions(state, origin, body).await,
        (.., true) => generate::responses(state, origin, body).await,
        _ => Err(ApiError::body("The request body must have `messages`, `prompt` or `input`.")),
    }
}
