//! The list of paths: for programs as OpenAPI, for people as a page.

use std::fmt::Write;
use std::sync::Arc;

use axum::Json;
use axum::extract::State as Shared;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};

use crate::routes::{Access, ROUTES, Route};
use crate::server::State;

/// Nothing is loaded and nothing runs.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

fn offered(state: &State) -> impl Iterator<Item = &'static Route> {
    ROUTES.iter().filter(|route| route.is_offered(state))
}

/// `GET /openapi.json`
pub(crate) async fn openapi(Shared(state): Shared<Arc<State>>) -> Response {
    let mut paths = Map::new();
    for route in offered(&state) {
        let mut operations = Map::new();
        for &method in route.methods {
            let mut operation = json!({
                "summary": route.about,
                "responses": {
                    "200": {"description": "Success"},
                    "default": {
                        "description": "An error",
                        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
                    }
                },
                "security": if route.access == Access::Public { json!([]) } else { json!([{"key": []}]) }
            });
            if route.json {
                let body = json!({"required": true, "content": {"application/json": {"schema": {"type": "object"}}}});
                operation["requestBody"] = body;
            }
            if route.path.contains('{') {
                let id =
                    json!([{"name": "id", "in": "path", "required": true, "schema": {"type": "string"}}]);
                operation["parameters"] = id;
            }
            operations.insert(method.to_owned(), operation);
        }
        paths.insert(route.path.replace("{*", "{"), Value::Object(operations));
    }
    let root = if state.root_path.is_empty() { "/" } else { &state.root_path };
    Json(json!({
        "openapi": "3.1.0",
        "info": {"title": "nibble", "version": env!("CARGO_PKG_VERSION")},
        "servers": [{"url": root}],
        "paths": paths,
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": {"Error": {
                "type": "object",
                "required": ["error"],
                "properties": {"error": {
                    "type": "object",
                    "required": ["message", "type", "param", "code"],
                    "properties": {
                        "message": {"type": "string"},
                        "type": {"type": "string"},
                        "param": {"type": ["string", "null"]},
                        "code": {"type": "integer"}
                    }
                }}
            }}
        }
    }))
    .into_response()
}

/// `GET /docs`
pub(crate) async fn page(Shared(state): Shared<Arc<State>>) -> Response {
    let mut page = String::from(
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content=\"width=device-width\">\
         <title>nibble</title><style>body{font:16px/1.5 system-ui;max-width:60rem;margin:2rem auto;padding:0 1rem;\
         color-scheme:light dark}td{padding:.2rem 1rem .2rem 0;vertical-align:top}</style>\
         <h1>nibble</h1><p>OpenAI's API. For programs: <a href=openapi.json>openapi.json</a>.<table>",
    );
    for route in offered(&state) {
        let methods = route.methods.join(", ").to_uppercase();
        let key = match route.access {
            Access::Public => "",
            Access::Metrics => "a key for metrics, if there is one",
            Access::Key => "a key, if there are any",
            Access::Admin => "an admin's key",
        };
        // Nothing of it comes from outside.
        let _ = write!(
            page,
            "<tr><td>{methods}<td><code>{}</code><td>{}<td>{key}",
            route.path.replace("{*", "{"),
            route.about
        );
    }
    page += "</table></html>";
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8")),
        (header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY)),
        (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
    ];
    (headers, page).into_response()
}
