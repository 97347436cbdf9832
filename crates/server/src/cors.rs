//! What browsers ask before they let pages of other origins use the server.

use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};

use crate::server::CorsOptions;

/// How long a browser may remember the answer to its question, in seconds.
const MAX_AGE: &str = "600";

/// Which pages of other origins may use the server.
#[derive(Debug)]
pub(crate) struct Cors {
    options: CorsOptions,
}

impl Cors {
    pub(crate) fn new(options: &CorsOptions) -> Cors {
        Cors { options: options.clone() }
    }

    /// The answer to a browser's question whether a request may be sent, if this is one.
    pub(crate) fn preflight(&self, method: &Method, headers: &HeaderMap) -> Option<Response> {
        let asked = headers.get(header::ACCESS_CONTROL_REQUEST_METHOD)?;
        if method != Method::OPTIONS || !self.admits(headers.get(header::ORIGIN)?) {
            return None;
        }
        let mut response = StatusCode::NO_CONTENT.into_response();
        let own = response.headers_mut();
        let wanted = headers.get(header::ACCESS_CONTROL_REQUEST_HEADERS);
        // With credentials a star means nothing to browsers, so what was asked for is named.
        let list = |allowed: &[String], asked: Option<&HeaderValue>| match allowed {
            [star] if star == "*" => asked.cloned(),
            names => HeaderValue::from_str(&names.join(", ")).ok(),
        };
        let named = [
            (header::ACCESS_CONTROL_ALLOW_METHODS, list(&self.options.methods, Some(asked))),
            (header::ACCESS_CONTROL_ALLOW_HEADERS, list(&self.options.headers, wanted)),
            (header::ACCESS_CONTROL_MAX_AGE, Some(HeaderValue::from_static(MAX_AGE))),
        ];
        own.extend(named.into_iter().filter_map(|(name, value)| Some((name, value?))));
        Some(response)
    }

    /// Says on an answer who may read it.
    pub(crate) fn mark(&self, origin: Option<&HeaderValue>, response: &mut HeaderMap) {
        if self.options.origins.is_empty() {
            return;
        }
        response.append(header::VARY, HeaderValue::from_static("origin"));
        let Some(origin) = origin.filter(|origin| self.admits(origin)) else { return };
        response.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
        const EXPOSED: &str = "x-request-id, retry-after, server-timing";
        response.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static(EXPOSED));
        if self.options.credentials {
            let name: HeaderName = header::ACCESS_CONTROL_ALLOW_CREDENTIALS;
            response.insert(name, HeaderValue::from_static("true"));
        }
    }

    fn admits(&self, origin: &HeaderValue) -> bool {
        self.options.origins.iter().any(|known| known == "*" || known.as_bytes() == origin.as_bytes())
    }
}
