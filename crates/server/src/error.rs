//! Everything that a client can be told instead of an answer, and its one mapping to the wire.

use std::fmt;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use crate::json::excerpt;

/// Why a request gets no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ApiError {
    /// The body as a whole cannot be read.
    #[error("{0}")]
    Body(String),
    /// A field breaks a rule.
    #[error("{message}")]
    Invalid {
        /// Path of the field.
        param: String,
        message: String,
    },
    #[error("The model `{}` does not exist. Valid aliases: {aliases}.", excerpt(.name))]
    UnknownModel { name: String, aliases: String },
    #[error("There is no such {what}: it was never stored, has been deleted, or was dropped for newer ones.")]
    Unknown { what: &'static str, param: String },
    #[error("There is nothing at this path.")]
    UnknownPath,
    #[error("This path does not take this method.")]
    MethodNotAllowed,
    #[error("The model does not support this endpoint.")]
    NotApplicable,
    #[error("A valid API key is needed: send it as `Authorization: Bearer KEY`.")]
    Unauthorized,
    #[error("The request body is larger than {max} bytes.")]
    TooLarge { max: usize },
    #[error("The request body did not arrive in time.")]
    BodyTimeout,
    #[error("The path and query are longer than {max} bytes.")]
    LongPath { max: usize },
    #[error("The request has more than {max} headers.")]
    ManyHeaders { max: usize },
    #[error("The request's head is too large.")]
    LargeHead,
    #[error("The request body must be of type application/json.")]
    MediaType,
    #[error("The request body must not be compressed: leave Content-Encoding out.")]
    Encoded,
    #[error("The model is being loaded ({percent} % done). Please retry.")]
    Loading { percent: u32 },
    #[error("The engine makes no progress.")]
    Unhealthy,
    #[error("The server is busy. Please retry.")]
    Busy {
        /// When there may be room.
        seconds: u64,
    },
    #[error("The server is shutting down. Please retry.")]
    ShuttingDown,
    /// Only ever in-band: the answer had begun.
    #[error("The answer was not read fast enough and has been given up.")]
    SlowReader,
    #[error("The key has used up what it may use in a minute. Please retry.")]
    RateLimited { seconds: u64 },
    #[error("The request took longer than this server allows.")]
    Timeout,
    #[error("The request was ended by an operator.")]
    Aborted,
    #[error("The server is asleep. Please retry.")]
    Asleep,
    /// Only ever told of a response in the background.
    #[error("The responses that are kept take too much memory.")]
    StoreFull,
    /// Another try may succeed. Details are in the log.
    #[error("The device failed while it computed the request {request_id}. Please retry.")]
    DeviceFailed { request_id: String },
    /// Another try computes the same.
    #[error("The model cannot answer this: its logits are not finite numbers (request {request_id}).")]
    Corrupted { request_id: String },
    /// Details are in the log, not on the wire.
    #[error("Internal server error (request {request_id})")]
    Internal { request_id: String },
}

impl ApiError {
    /// A body that cannot be read.
    pub(crate) fn body(message: impl fmt::Display) -> ApiError {
        ApiError::Body(message.to_string())
    }

    /// A field that breaks a rule.
    pub(crate) fn invalid(param: &str, message: impl fmt::Display) -> ApiError {
        ApiError::Invalid { param: param.to_owned(), message: message.to_string() }
    }

    /// A field that is understood but cannot be honoured.
    pub(crate) fn unsupported(param: &str) -> ApiError {
        ApiError::invalid(param, format!("{param} is not supported yet."))
    }

    fn status(&self) -> StatusCode {
        match self {
            ApiError::Body(_)
            | ApiError::Invalid { .. }
            // Not 5xx: clients would send it again.
            | ApiError::Aborted => StatusCode::BAD_REQUEST,
            ApiError::UnknownModel { .. } | ApiError::Unknown { .. } | ApiError::UnknownPath => {
                StatusCode::NOT_FOUND
            }
            ApiError::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            ApiError::NotApplicable => StatusCode::NOT_IMPLEMENTED,
            ApiError::Unauthorized => StatusCode::UNAUTHORIZED,
            ApiError::TooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            ApiError::BodyTimeout | ApiError::SlowReader => StatusCode::REQUEST_TIMEOUT,
            ApiError::LongPath { .. } | ApiError::ManyHeaders { .. } | ApiError::LargeHead => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            ApiError::MediaType | ApiError::Encoded => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            ApiError::Loading { .. }
            | ApiError::Unhealthy
            | ApiError::Busy { .. }
            | ApiError::ShuttingDown
            | ApiError::DeviceFailed { .. }
            | ApiError::StoreFull
            | ApiError::Asleep => StatusCode::SERVICE_UNAVAILABLE,
            ApiError::RateLimited { .. } => StatusCode::TOO_MANY_REQUESTS,
            ApiError::Timeout => StatusCode::GATEWAY_TIMEOUT,
            ApiError::Corrupted { .. } | ApiError::Internal { .. } => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    pub(crate) fn kind(&self) -> &'static str {
        match self {
            ApiError::Body(_)
            | ApiError::Invalid { .. }
            | ApiError::TooLarge { .. }
            | ApiError::LongPath { .. }
            | ApiError::ManyHeaders { .. }
            | ApiError::LargeHead
            | ApiError::MediaType
            | ApiError::Encoded => "BadRequestError",
            ApiError::UnknownModel { .. } | ApiError::UnknownPath => "NotFoundError",
            ApiError::Unknown { .. } => "invalid_request_error",
            ApiError::MethodNotAllowed => "MethodNotAllowedError",
            ApiError::NotApplicable => "NotImplementedError",
            ApiError::Unauthorized => "AuthenticationError",
            ApiError::BodyTimeout | ApiError::SlowReader | ApiError::Timeout => "TimeoutError",
            ApiError::Loading { .. }
            | ApiError::Unhealthy
            | ApiError::Busy { .. }
            | ApiError::ShuttingDown
            | ApiError::DeviceFailed { .. }
            | ApiError::StoreFull
            | ApiError::Asleep => "ServiceUnavailableError",
            ApiError::RateLimited { .. } => "RateLimitError",
            ApiError::Aborted => "RequestAbortedError",
            ApiError::Corrupted { .. } | ApiError::Internal { .. } => "InternalServerError",
        }
    }

    pub(crate) fn param(&self) -> Option<&str> {
        match self {
            ApiError::Invalid { param, .. } => Some(param),
            ApiError::UnknownModel { .. } => Some("model"),
            ApiError::Unknown { param, .. } => Some(param),
            _ => None,
        }
    }

    /// OpenAI's word for it, if it has one.
    fn openai_code(&self) -> Option<&'static str> {
        match self {
            ApiError::Invalid { param, .. } if param == "input_tokens" => Some("context_length_exceeded"),
            ApiError::Invalid { .. } => Some("invalid_value"),
            ApiError::UnknownModel { .. } => Some("model_not_found"),
            ApiError::Unauthorized => Some("invalid_api_key"),
            ApiError::RateLimited { .. } => Some("rate_limit_exceeded"),
            ApiError::UnknownPath => Some("unknown_url"),
            _ => None,
        }
    }

    /// The body, also sent in-band when the answer had begun.
    pub(crate) fn wire(&self, style: ErrorStyle) -> impl Serialize + '_ {
        #[derive(Serialize)]
        struct Wire<'a> {
            error: Inner<'a>,
        }
        #[derive(Serialize)]
        struct Inner<'a> {
            message: String,
            r#type: &'static str,
            param: Option<&'a str>,
            code: Code,
        }
        #[derive(Serialize)]
        #[serde(untagged)]
        enum Code {
            Status(u16),
            Word(Option<&'static str>),
        }
        let status = self.status();
        let (kind, code) = match style {
            ErrorStyle::Vllm => (self.kind(), Code::Status(status.as_u16())),
            ErrorStyle::OpenAi if status.is_server_error() => {
                ("server_error", Code::Word(self.openai_code()))
            }
            ErrorStyle::OpenAi => ("invalid_request_error", Code::Word(self.openai_code())),
        };
        Wire { error: Inner { message: self.to_string(), r#type: kind, param: self.param(), code } }
    }
}

/// How errors are worded for programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ErrorStyle {
    /// The status is the code, and there are types such as `BadRequestError`.
    #[default]
    Vllm,
    /// Codes such as `model_not_found`, of type `invalid_request_error`.
    OpenAi,
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status(), Json(self.wire(ErrorStyle::Vllm))).into_response();
        let retry_after = |seconds: u64| Some((header::RETRY_AFTER, HeaderValue::from(seconds)));
        let extra = match &self {
            ApiError::Unauthorized => Some((header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"))),
            // A model that fits in memory loads in some seconds.
            ApiError::Loading { .. } => retry_after(3),
            ApiError::Busy { seconds } | ApiError::RateLimited { seconds } => retry_after(*seconds),
            ApiError::Unhealthy
            | ApiError::ShuttingDown
            | ApiError::DeviceFailed { .. }
            | ApiError::StoreFull
            | ApiError::Asleep => retry_after(1),
            // What is left of the body is not read, so the connection cannot be used again.
            ApiError::TooLarge { .. } | ApiError::BodyTimeout => {
                Some((header::CONNECTION, HeaderValue::from_static("close")))
            }
            _ => None,
        };
        response.headers_mut().extend(extra);
        // For a server that words it in another way.
        response.extensions_mut().insert(self);
        response
    }
}
