//! Paths, what is checked before any of them, and the endpoints of stored responses, models and health.

use std::sync::Arc;
use std::time::Instant;

use axum::body::Body;
use axum::extract::{Extension, MatchedPath, Path, Query, Request, State as Shared};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Version, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get, post};
use axum::{Json, Router};
use engine::{Engine, Place};
use serde::{Deserialize, Serialize};

use crate::admin;
use crate::auth::{self, key_id};
use crate::body;
use crate::connections::MAX_HEADERS;
use crate::docs;
use crate::error::{ApiError, ErrorStyle};
use crate::generate;
use crate::identifier::identifier;
use crate::json::excerpt;
use crate::log::RequestLog;
use crate::page;
use crate::render;
use crate::request::is_request_id;
use crate::response_items::Item;
use crate::response_store::{Follower, Owner};
use crate::server::State;
use crate::small;
use crate::sse;
use crate::watchdog;

pub(crate) const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Longest path and query.
const MAX_URI_BYTES: usize = 8 << 10;

/// A path, and who may use it. A path that is not here needs a key.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Route {
    /// As the log and the metrics name it, whatever the client wrote.
    pub(crate) path: &'static str,
    /// In lower case.
    pub(crate) methods: &'static [&'static str],
    pub(crate) access: Access,
    /// Takes JSON and nothing else.
    pub(crate) json: bool,
    /// For the documentation.
    pub(crate) about: &'static str,
    offered: Offered,
}

/// What a client must have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// Nothing: the chat page, which says nothing by itself, and what is for probes. Not logged.
    Public,
    /// A key for the metrics, if there is one. Not logged.
    Metrics,
    Key,
    /// An admin's key; in a server for development, which has none, an ordinary one.
    Admin,
}

/// When a path is there.
#[derive(Debug, Clone, Copy)]
enum Offered {
    Always,
    Admin,
    Sleep,
    Page,
    Docs,
    Ollama,
}

const GET: &[&str] = &["get"];
const POST: &[&str] = &["post"];

const fn route(
    path: &'static str,
    methods: &'static [&'static str],
    access: Access,
    about: &'static str,
) -> Route {
    Route { path, methods, access, json: false, about, offered: Offered::Always }
}

const fn json(path: &'static str, access: Access, about: &'static str) -> Route {
    Route { json: true, ..route(path, POST, access, about) }
}

const fn only(offered: Offered, route: Route) -> Route {
    Route { offered, ..route }
}

/// All paths.
pub(crate) static ROUTES: &[Route] = &[
    json("/v1/chat/completions", Access::Key, "The answer to a conversation, whole or streamed"),
    json("/v1/chat/completions/render", Access::Key, "What the model would be fed, without running it"),
    json("/v1/completions", Access::Key, "The continuation of raw prompts, whole or streamed"),
    json("/v1/completions/render", Access::Key, "The tokens of raw prompts, without running the model"),
    json("/v1/responses", Access::Key, "The Responses API, whole or streamed"),
    route("/v1/responses/{id}", &["get", "delete"], Access::Key, "A stored response"),
    route("/v1/responses/{id}/cancel", POST, Access::Key, "Ends a response that is made in the background"),
    route("/v1/responses/{id}/input_items", GET, Access::Key, "What a stored response answers"),
    route("/v1/models", GET, Access::Key, "The names that requests may use"),
    route("/v1/models/{*id}", GET, Access::Key, "One of them"),
    json("/tokenize", Access::Key, "The tokens of a text or a conversation"),
    json("/v1/tokenize", Access::Key, "The same"),
    json("/detokenize", Access::Key, "The text of tokens"),
    json("/v1/detokenize", Access::Key, "The same"),
    json("/invocations", Access::Key, "Chat, completion or response, told apart by the body's shape"),
    route("/health", GET, Access::Public, "200 while all engines make progress"),
    route("/live", GET, Access::Public, "200 while the process runs"),
    route("/ready", GET, Access::Public, "200 while requests are taken"),
    route("/ping", &["get", "post"], Access::Public, "The same"),
    route("/version", GET, Access::Public, "The server's version"),
    route("/load", GET, Access::Public, "How many requests are in the engines"),
    route("/metrics", GET, Access::Metrics, "Counts and times for Prometheus"),
    only(Offered::Page, route("/", GET, Access::Public, "A chat page")),
    only(Offered::Docs, route("/docs", GET, Access::Public, "This list for people")),
    only(Offered::Docs, route("/openapi.json", GET, Access::Public, "This list for programs")),
    only(Offered::Ollama, route("/api/version", GET, Access::Key, "For tools made for Ollama")),
    only(Offered::Ollama, route("/api/tags", GET, Access::Key, "For tools made for Ollama")),
    only(Offered::Ollama, route("/api/show", POST, Access::Key, "For tools made for Ollama")),
    only(Offered::Ollama, route("/api/pull", POST, Access::Key, "For tools made for Ollama")),
    only(
        Offered::Admin,
        route("/reset_prefix_cache", POST, Access::Admin, "Forgets what prompts have in common"),
    ),
    only(Offered::Admin, json("/abort_requests", Access::Admin, "Ends requests by their names")),
    only(Offered::Admin, route("/server_info", GET, Access::Admin, "Build, configuration, device, memory")),
    only(Offered::Admin, route("/start_profile", POST, Access::Admin, "Begins to count steps and tokens")),
    only(Offered::Admin, route("/stop_profile", POST, Access::Admin, "What was counted since")),
    only(Offered::Sleep, route("/sleep", POST, Access::Admin, "Frees the memory of model and cache")),
    only(Offered::Sleep, route("/wake_up", POST, Access::Admin, "Loads the model again")),
    only(Offered::Sleep, route("/is_sleeping", GET, Access::Admin, "Whether the server sleeps")),
];

/// Other endpoints of OpenAI and vLLM, for other kinds of models.
const NOT_APPLICABLE: [&str; 6] =
    ["/v1/embeddings", "/v1/audio/{*rest}", "/v1/images/{*rest}", "/score", "/rerank", "/pooling"];

/// Paths that a server which shuts down still answers: probes, and those of what it waits for.
const WHILE_DRAINING: [&str; 6] = [
    "/live",
    "/metrics",
    "/v1/responses/{id}",
    "/v1/responses/{id}/cancel",
    "/v1/responses/{id}/input_items",
    "/abort_requests",
];

/// Endpoints of OpenAI that would be taken for a stored response.
const UNKNOWN: [&str; 2] = ["/v1/responses/input_tokens", "/v1/responses/compact"];

impl Route {
    /// Whether the server was started with it.
    pub(crate) fn is_offered(&self, state: &State) -> bool {
        let admin = !state.admin_keys.is_empty() || state.dev_mode;
        match self.offered {
            Offered::Always => true,
            Offered::Admin => admin,
            Offered::Sleep => admin && state.sleep_mode,
            Offered::Page => state.page,
            Offered::Docs => state.docs,
            Offered::Ollama => state.ollama,
        }
    }
}

/// Where a request comes from, for those who answer it.
#[derive(Debug, Clone)]
pub(crate) struct Origin {
    pub(crate) log: RequestLog,
    /// The request's id is the client's.
    pub(crate) named_by_client: bool,
    /// Whose it is, if keys are asked for.
    pub(crate) owner: Owner,
    /// `X-Vllm-Priority`, which goes before the body's.
    pub(crate) priority: Option<i64>,
    /// `X-data-parallel-rank`: the engine that is to take it, where such headers are trusted.
    pub(crate) rank: Option<i64>,
}

pub(crate) fn router(state: Arc<State>) -> Router {
    let mut router = Router::new();
    for Route { path, .. } in ROUTES.iter().filter(|route| route.is_offered(&state)) {
        let handlers = match *path {
            "/v1/chat/completions" => post(chat),
            "/v1/chat/completions/render" => post(render_chat),
            "/v1/completions" => post(completions),
            "/v1/completions/render" => post(render_completions),
            "/v1/responses" => post(responses),
            "/v1/responses/{id}" => get(response).delete(delete_response),
            "/v1/responses/{id}/cancel" => post(cancel_response),
            "/v1/responses/{id}/input_items" => get(input_items),
            "/v1/models" => get(models),
            "/v1/models/{*id}" => get(model),
            "/tokenize" | "/v1/tokenize" => post(small::tokenize),
            "/detokenize" | "/v1/detokenize" => post(small::detokenize),
            "/invocations" => post(small::invocations),
            "/health" => get(health),
            "/live" => get(|| async {}),
            "/ready" => get(ready),
            "/ping" => get(ready).post(ready),
            "/version" => get(version),
            "/load" => get(small::load),
            "/metrics" => get(small::metrics),
            "/" => get(page::page),
            "/docs" => get(docs::page),
            "/openapi.json" => get(docs::openapi),
            "/api/version" => get(small::ollama_version),
            "/api/tags" => get(small::ollama_tags),
            "/api/show" => post(small::ollama_show),
            "/api/pull" => post(small::ollama_pull),
            "/reset_prefix_cache" => post(admin::reset_prefix_cache),
            "/abort_requests" => post(admin::abort_requests),
            "/server_info" => get(admin::server_info),
            "/start_profile" => post(admin::start_profile),
            "/stop_profile" => post(admin::stop_profile),
            "/sleep" => post(admin::sleep),
            "/wake_up" => post(admin::wake_up),
            "/is_sleeping" => get(admin::is_sleeping),
            path => unreachable!("{path} has no handler"),
        };
        router = router.route(path, handlers);
    }
    for path in NOT_APPLICABLE {
        router = router.route(path, any(|| async { ApiError::NotApplicable }));
    }
    for path in UNKNOWN {
        router = router.route(path, any(|| async { ApiError::UnknownPath }));
    }
    router
        .fallback(|| async { ApiError::UnknownPath })
        .method_not_allowed_fallback(|| async { ApiError::MethodNotAllowed })
        .layer(middleware::from_fn_with_state(Arc::clone(&state), guard))
        .with_state(state)
}

/// What happens to every request: it gets a name and a line in the log, and must have the right media type and key.
async fn guard(Shared(state): Shared<Arc<State>>, mut request: Request, next: Next) -> Response {
    let headers = request.headers();
    let client_id = headers.get(X_REQUEST_ID).and_then(|id| id.to_str().ok());
    let client_id = client_id.filter(|id| is_request_id(id)).map(str::to_owned);
    let named_by_client = client_id.is_some();
    let id = client_id.unwrap_or_else(identifier);
    let matched = request.extensions().get::<MatchedPath>().map(MatchedPath::as_str);
    let route = matched.and_then(|path| ROUTES.iter().find(|route| route.path == path));
    let (name, access) = route.map_or(("none", Access::Key), |route| (route.path, route.access));
    let admitted = match access {
        Access::Public => true,
        Access::Metrics => state.metrics_keys.admit(headers),
        Access::Admin if !state.admin_keys.is_empty() => state.admin_keys.admit(headers),
        // An admin may know that there is nothing.
        Access::Key if route.is_none() && !state.admin_keys.is_empty() => {
            state.keys.admit(headers) || state.admin_keys.admit(headers)
        }
        Access::Admin | Access::Key => state.keys.admit(headers),
    };
    let takes_json = route.is_some_and(|route| route.json) && request.method() == Method::POST;
    let (arrival, method, version) = (Instant::now(), method(request.method()), request.version());
    let page = headers.get(header::ORIGIN).cloned();
    // Probes come every few seconds and say nothing.
    let silent = matches!(access, Access::Public | Access::Metrics);
    let log = (!silent).then(|| RequestLog::new(id.clone(), key_id(headers), name));

    let uri_bytes = request.uri().path().len() + request.uri().query().map_or(0, str::len);
    let mut response = if uri_bytes > MAX_URI_BYTES {
        ApiError::LongPath { max: MAX_URI_BYTES }.into_response()
    } else if headers.len() > MAX_HEADERS {
        ApiError::ManyHeaders { max: MAX_HEADERS }.into_response()
    } else if let Some(answer) = state.cors.preflight(request.method(), headers) {
        answer
    } else if takes_json && !is_json(headers) {
        ApiError::MediaType.into_response()
    } else if takes_json && is_encoded(headers) {
        ApiError::Encoded.into_response()
    } else if !admitted && request.method() != Method::OPTIONS {
        ApiError::Unauthorized.into_response()
    } else if state.is_draining() && !WHILE_DRAINING.contains(&name) {
        ApiError::ShuttingDown.into_response()
    } else {
        if let Some(log) = &log {
            let owner = auth::owner(headers).filter(|_| !state.keys.is_empty());
            let number = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()?.parse().ok());
            let priority = number("x-vllm-priority");
            let rank = number("x-data-parallel-rank").filter(|_| state.trust_routing_headers);
            let log = log.clone();
            request.extensions_mut().insert(Origin { log, named_by_client, owner, priority, rank });
        }
        shaped(next.run(request).await)
    };
    let error = response.extensions_mut().remove::<ApiError>();
    if let Some(error) = error.as_ref().filter(|_| state.error_style != ErrorStyle::Vllm) {
        let (mut head, _) = response.into_parts();
        head.headers.remove(header::CONTENT_LENGTH);
        head.headers.remove(header::CONTENT_TYPE);
        response = (head, Json(error.wire(state.error_style))).into_response();
    }
    if let Some(log) = log {
        log.status(response.status().as_u16());
        if let Some(error) = &error {
            log.error(error.kind(), error.param());
        }
        state.metrics.answer(method, name, response.status().as_u16(), arrival.elapsed());
    }
    if state.is_draining() && version <= Version::HTTP_11 {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    state.cors.mark(page.as_ref(), response.headers_mut());
    if let Ok(id) = HeaderValue::from_str(&id) {
        response.headers_mut().entry(X_REQUEST_ID).or_insert(id);
    }
    response
}

/// Gives refusals of the framework, such as of a query that cannot be read, the form that all errors have.
fn shaped(response: Response) -> Response {
    let is_json = response.headers().get(header::CONTENT_TYPE).is_some_and(|kind| kind == "application/json");
    match response.status() {
        status if is_json || !(status.is_client_error() || status.is_server_error()) => response,
        status if status.is_client_error() => {
            ApiError::body("The path or the query cannot be read.").into_response()
        }
        _ => ApiError::Internal { request_id: String::new() }.into_response(),
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

fn is_encoded(headers: &HeaderMap) -> bool {
    let encodings = headers.get_all(header::CONTENT_ENCODING).iter();
    encodings.into_iter().any(|encoding| !encoding.as_bytes().eq_ignore_ascii_case(b"identity"))
}

async fn chat(
    Shared(state): Shared<Arc<State>>,
    Extension(origin): Extension<Origin>,
    body: Body,
) -> Result<Response, ApiError> {
    generate::chat(state, origin, body).await
}

async fn render_chat(
    Shared(state): Shared<Arc<State>>,
    Extension(origin): Extension<Origin>,
    body: Body,
) -> Result<Response, ApiError> {
    render::chat(state, origin, body).await
}

async fn render_completions(
    Shared(state): Shared<Arc<State>>,
    Extension(origin): Extension<Origin>,
    body: Body,
) -> Result<Response, ApiError> {
    render::completions(state, origin, body).await
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
    let stored = state.responses.find(&id, origin.owner, "response_id")?;
    if query.stream {
        let next = query.starting_after.map_or(0, |last| last.saturating_add(1));
        let mut response = body::streaming(Follower::new(stored, next, state.sse_keep_alive)).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(sse::CONTENT_TYPE));
        headers.extend(sse::headers());
        return Ok(response);
    }
    Ok(object(stored.response()))
}

fn object(json: String) -> Response {
    ([(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))], json).into_response()
}

#[derive(Deserialize)]
struct ResponseQuery {
    #[serde(default)]
    stream: bool,
    /// The number of the last event that the client knows.
    starting_after: Option<usize>,
}

async fn delete_response(
    Shared(state): Shared<Arc<State>>,
    Extension(origin): Extension<Origin>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    state.responses.remove(&id, origin.owner)?;
    Ok(Json(serde_json::json!({"id": id, "object": "response", "deleted": true})).into_response())
}

async fn cancel_response(
    Shared(state): Shared<Arc<State>>,
    Extension(origin): Extension<Origin>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let stored = state.responses.find(&id, origin.owner, "response_id")?;
    stored.end().await?;
    Ok(object(stored.response()))
}

async fn input_items(
    Shared(state): Shared<Arc<State>>,
    Extension(origin): Extension<Origin>,
    Path(id): Path<String>,
    Query(query): Query<ItemsQuery>,
) -> Result<Response, ApiError> {
    let stored = state.responses.find(&id, origin.owner, "response_id")?;
    let mut data: Vec<&Item> = stored.input.iter().map(AsRef::as_ref).collect();
    match query.order.as_deref() {
        Some("asc") => {}
        None | Some("desc") => data.reverse(),
        Some(other) => {
            let message = format!("order must be asc or desc, got {}.", excerpt(other));
            return Err(ApiError::invalid("order", message));
        }
    }
    if let Some(after) = &query.after {
        let place = data.iter().position(|item| item.id() == Some(after));
        let unknown = || ApiError::invalid("after", format!("The input has no item {}.", excerpt(after)));
        data.drain(..=place.ok_or_else(unknown)?);
    }
    let limit = query.limit.as_deref().map_or(Some(DEFAULT_ITEMS), |limit| limit.parse().ok());
    let Some(limit) = limit.filter(|limit| (1..=MAX_ITEMS).contains(limit)) else {
        let limit = excerpt(query.limit.as_deref().unwrap_or_default());
        return Err(ApiError::invalid("limit", format!("limit must be 1 to {MAX_ITEMS}, got {limit}.")));
    };
    let has_more = data.len() > limit;
    data.truncate(limit);
    let id = |item: Option<&&'_ Item>| item.and_then(|item| item.id()).map(str::to_owned);
    let (first_id, last_id) = (id(data.first()), id(data.last()));
    Ok(Json(ItemList { object: "list", data, first_id, last_id, has_more }).into_response())
}

/// Items that are listed at a time, unless the client asks for fewer or more.
const DEFAULT_ITEMS: usize = 20;
const MAX_ITEMS: usize = 100;

#[derive(Deserialize)]
struct ItemsQuery {
    limit: Option<String>,
    /// The newest come first, or `asc`.
    order: Option<String>,
    /// The id of the last item that the client knows.
    after: Option<String>,
}

#[derive(Serialize)]
struct ItemList<'a> {
    object: &'static str,
    data: Vec<&'a Item>,
    first_id: Option<String>,
    last_id: Option<String>,
    has_more: bool,
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
    owned_by: &'a str,
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
            owned_by: &state.model_owner,
            root: &state.root,
            parent: None,
            max_model_len: engine.max_model_len(),
            permission: [],
        }
    }
}

async fn models(Shared(state): Shared<Arc<State>>) -> Result<Response, ApiError> {
    let engine = state.engine()?;
    let data = state.model_names.iter().map(|name| Model::new(name, &state, &engine)).collect();
    Ok(Json(ModelList { object: "list", data }).into_response())
}

async fn model(Shared(state): Shared<Arc<State>>, Path(id): Path<String>) -> Result<Response, ApiError> {
    let engine = state.engine()?;
    match state.model_names.iter().find(|name| **name == id) {
        Some(name) => Ok(Json(Model::new(name, &state, &engine)).into_response()),
        None => Err(ApiError::UnknownModel { name: excerpt(&id), aliases: state.model_names.join(", ") }),
    }
}

/// 200 while all engines make progress, or have none to make. One that is being replaced is none as long as others serve.
async fn health(Shared(state): Shared<Arc<State>>) -> Result<StatusCode, ApiError> {
    if state.asleep().is_some() {
        return Ok(StatusCode::OK);
    }
    let Some(replicas) = state.loaded() else { return state.engine().map(|_| StatusCode::OK) };
    let well = |place: &Place| match place {
        Place::Serving(engine) => {
            let stats = engine.stats();
            !stats.unhealthy && !stats.lost && !watchdog::hangs(&stats, state.health_stall_timeout)
        }
        Place::Loading => true,
        Place::Gone => false,
    };
    match (replicas.places().iter().all(well), replicas.serving().next()) {
        (false, _) => Err(ApiError::Unhealthy),
        (true, Some(_)) => Ok(StatusCode::OK),
        (true, None) => state.engine().map(|_| StatusCode::OK),
    }
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
