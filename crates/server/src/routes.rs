//! Paths, what is checked before any of them, and the small endpoints.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::{Extension, Path, Query, Request, State as Shared};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get, post};
use axum::{Json, Router};
use engine::Engine;
use serde::{Deserialize, Serialize};

use crate::auth::{self, key_id};
use crate::error::ApiError;
use crate::generate;
use crate::identifier::identifier;
use crate::json::excerpt;
use crate::log::RequestLog;
use crate::page;
use crate::request::is_request_id;
use crate::response_store::Owner;
use crate::server::State;
use crate::small;

pub(crate) const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
const RESPONSES: &str = "/v1/responses";
const MODELS: &str = "/v1/models";

/// Needs no key: the chat page, which says nothing by itself, and what is for probes.
const PUBLIC: [&str; 8] = ["/", "/health", "/live", "/ready", "/ping", "/version", "/load", "/metrics"];

/// Take JSON and nothing else.
const JSON: [&str; 8] = [
    CHAT,
    COMPLETIONS,
    RESPONSES,
    "/tokenize",
    "/v1/tokenize",
    "/detokenize",
    "/v1/detokenize",
    "/invocations",
];

/// Other paths as the log and the metrics name them.
const OTHERS: [&str; 4] = ["/api/version", "/api/tags", "/api/show", "/api/pull"];

/// Other endpoints of OpenAI and vLLM, for other kinds of models.
const NOT_APPLICABLE: [&str; 6] =
    ["/v1/embeddings", "/v1/audio/{*rest}", "/v1/images/{*rest}", "/score", "/rerank", "/pooling"];

/// Longest path and query.
const MAX_URI_BYTES: usize = 8 << 10;

/// A step that takes longer means that the device hangs.
const STALL: Duration = Duration::from_secs(10);

/// Where a request comes from, for those who answer it.
#[derive(Debug, Clone)]
pub(crate) struct Origin {
    pub(crate) log: RequestLog,
    /// The request's id is the client's.
    pub(crate) named_by_client: bool,
    /// Whose it is, if keys are asked for.
    pub(crate) owner: Owner,
}

pub(crate) fn router(state: Arc<State>) -> Router {
    let mut router = Router::new()
        .route(CHAT, post(chat))
        .route(COMPLETIONS, post(completions))
        .route(RESPONSES, post(responses))
        .route("/v1/responses/{id}", get(response).delete(delete_response))
        .route("/v1/responses/{id}/cancel", post(cancel_response))
        .route("/v1/responses/{id}/input_items", get(input_items))
        .route(MODELS, get(models))
        .route("/v1/models/{*id}", get(model))
        .route("/health", get(health))
        .route("/live", get(|| async {}))
        .route("/ready", get(ready))
        .route("/ping", get(ready).post(ready))
        .route("/version", get(version))
        .route("/", get(page::page))
        .route("/load", get(small::load))
        .route("/metrics", get(small::metrics))
        .route("/invocations", post(small::invocations))
        .route("/api/version", get(small::ollama_version))
        .route("/api/tags", get(small::ollama_tags))
        .route("/api/show", post(small::ollama_show))
        .route("/api/pull", post(small::ollama_pull));
    for prefix in ["", "/v1"] {
        router = router
            .route(&format!("{prefix}/tokenize"), post(small::tokenize))
            .route(&format!("{prefix}/detokenize"), post(small::detokenize));
    }
    for path in NOT_APPLICABLE {
        router = router.route(path, any(|| async { ApiError::NotApplicable }));
    }
    router
        .fallback(|| async { ApiError::UnknownPath })
        .method_not_allowed_fallback(|| async { ApiError::MethodNotAllowed })
        .layer(middleware::from_fn_with_state(Arc::clone(&state), guard))
        .with_state(state)
}

/// What happens to every request: it gets a name and a line in the log, and must have the right media type and key.
async fn guard(Shared(state): Shared<Arc<State>>, mut request: Request, next: Next) -> Response {
    let client_id = request.headers().get(X_REQUEST_ID).and_then(|id| id.to_str().ok());
    let client_id = client_id.filter(|id| is_request_id(id)).map(str::to_owned);
    let named_by_client = client_id.is_some();
    let id = client_id.unwrap_or_else(identifier);
    let path = request.uri().path();
    let public = PUBLIC.contains(&path);
    let takes_json = request.method() == Method::POST && JSON.contains(&path);
    let (arrival, method, route) = (Instant::now(), method(request.method()), template(path));
    // Probes come every few seconds and say nothing.
    let log = (!public).then(|| RequestLog::new(id.clone(), key_id(request.headers()), template(path)));

    let uri_bytes = path.len() + request.uri().query().map_or(0, str::len);
    let mut response = if uri_bytes > MAX_URI_BYTES {
        ApiError::LongPath { max: MAX_URI_BYTES }.into_response()
    } else if takes_json && !is_json(request.headers()) {
        ApiError::MediaType.into_response()
    } else if !public && request.method() != Method::OPTIONS && !state.keys.admit(request.headers()) {
        ApiError::Unauthorized.into_response()
    } else {
        if let Some(log) = &log {
            let owner = auth::owner(request.headers()).filter(|_| !state.keys.is_empty());
            request.extensions_mut().insert(Origin { log: log.clone(), named_by_client, owner });
        }
        next.run(request).await
    };
    if let Some(log) = log {
        log.status(response.status().as_u16());
        state.metrics.answer(method, route, response.status().as_u16(), arrival.elapsed());
    }
    if let Ok(id) = HeaderValue::from_str(&id) {
        response.headers_mut().entry(X_REQUEST_ID).or_insert(id);
    }
    response
}

/// The path for the log: never what the client wrote.
fn template(path: &str) -> &'static str {
    let mut known = JSON.into_iter().chain(OTHERS).chain([MODELS]);
    match known.find(|known| *known == path) {
        Some(path) => path,
        None if path.starts_with("/v1/models/") => "/v1/models/{id}",
        None if path.starts_with("/v1/responses/") => "/v1/responses/{id}",
        None => "none",
    }
}

/// The method for the metrics: one of few.
fn method(method: &Method) -> &'static str {
    let known = ["GET", "POST", "DELETE", "PUT", "PATCH", "HEAD", "OPTIONS"];
    known.into_iter().find(|known| method.as_str() == *known).unwrap_or("other")
}

fn is_json(headers: &HeaderMap) -> bool {
    let media_type = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let essence = media_type.and_then(|value| value.split(';').next());
    essence.is_some_and(|essence| essence.trim().eq_ignore_ascii_case("application/json"))
}

async fn chat(
    Shared(state): Shared<Arc<State>>,
    Extension(origin): Extension<Origin>,
    body: Body,
) -> Result<Response, ApiError> {
    generate::chat(state, origin, body).await
}

async fn completions(
    Shared(state): Shared<Arc<State>>,
    Extension(origin): Extension<Origin>,
    body: Body,
) -> Result<Response, ApiError> {
    generate::completions(state, origin, body).await
}

async fn responses(
    Shared(state): Shared<Arc<State>>,
    Extension(origin): Extension<Origin>,
    body: Body,
) -> Result<Response, ApiError> {
    generate::responses(state, origin, body).await
}

async fn response(
    Shared(state): Shared<Arc<State>>,
    Extension(origin): Extension<Origin>,
    Path(id): Path<String>,
    Query(query): Query<ResponseQuery>,
) -> Result<Response, ApiError> {
    if query.stream {
        return Err(ApiError::unsupported("stream"));
    }
    let stored = state.responses.find(&id, origin.owner, "response_id")?;
    let json = HeaderValue::from_static("application/json");
    Ok(([(header::CONTENT_TYPE, json)], stored.response.clone()).into_response())
}

#[derive(Deserialize)]
struct ResponseQuery {
    #[serde(default)]
    stream: bool,
}

async fn delete_response(
    Shared(state): Shared<Arc<State>>,
    Extension(origin): Extension<Origin>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    state.responses.remove(&id, origin.owner)?;
    Ok(Json(serde_json::json!({"id": id, "object": "response", "deleted": true})).into_response())
}

/// Responses are made while their client waits: what is stored is over.
async fn cancel_response(
    Shared(state): Shared<Arc<State>>,
    Extension(origin): Extension<Origin>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    state.responses.find(&id, origin.owner, "response_id")?;
    Err(ApiError::invalid("response_id", "Cannot cancel a synchronous response."))
}

async fn input_items(
    Shared(state): Shared<Arc<State>>,
    Extension(origin): Extension<Origin>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let stored = state.responses.find(&id, origin.owner, "response_id")?;
    let id = |item: Option<&serde_json::Value>| item.map(|item| item["id"].clone());
    let (first, last) = (id(stored.input.first()), id(stored.input.last()));
    let list = serde_json::json!({
        "object": "list", "data": stored.input, "first_id": first, "last_id": last, "has_more": false
    });
    Ok(Json(list).into_response())
}

#[derive(Serialize)]
struct ModelList<'a> {
    object: &'static str,
    data: Vec<Model<'a>>,
}

#[derive(Serialize)]
struct Model<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    root: &'a str,
    parent: Option<()>,
    max_model_len: usize,
    permission: [(); 0],
}

impl<'a> Model<'a> {
    fn new(name: &'a str, state: &'a State, engine: &Engine) -> Model<'a> {
        Model {
            id: name,
            object: "model",
            created: state.created,
            owned_by: "vllm",
            root: &state.root,
            parent: None,
            max_model_len: engine.max_model_len(),
            permission: [],
        }
    }
}

async fn models(Shared(state): Shared<Arc<State>>) -> Result<Response, ApiError> {
    let engine = state.engine()?;
    let data = state.model_names.iter().map(|name| Model::new(name, &state, engine)).collect();
    Ok(Json(ModelList { object: "list", data }).into_response())
}

async fn model(Shared(state): Shared<Arc<State>>, Path(id): Path<String>) -> Result<Response, ApiError> {
    let engine = state.engine()?;
    match state.model_names.iter().find(|name| **name == id) {
        Some(name) => Ok(Json(Model::new(name, &state, engine)).into_response()),
        None => Err(ApiError::UnknownModel { name: excerpt(&id), aliases: state.model_names.join(", ") }),
    }
}

/// 200 while the engine makes progress.
async fn health(Shared(state): Shared<Arc<State>>) -> Result<StatusCode, ApiError> {
    let Some(engine) = state.loaded() else { return Err(ApiError::Loading) };
    let stats = engine.stats();
    let stalled = stats.step_started.is_some_and(|start| start.elapsed() > STALL);
    if stats.unhealthy || stalled { Err(ApiError::Unhealthy) } else { Ok(StatusCode::OK) }
}

/// 200 while requests are taken.
async fn ready(Shared(state): Shared<Arc<State>>) -> Result<StatusCode, ApiError> {
    state.engine().map(|_| StatusCode::OK)
}

async fn version() -> Response {
    #[derive(Serialize)]
    struct Version {
        version: &'static str,
    }
    Json(Version { version: env!("CARGO_PKG_VERSION") }).into_response()
}
