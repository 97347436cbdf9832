//! Bodies both ways: reading a request's under a limit, sending an answer's as it comes.

use std::convert::Infallible;
use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use http_body::Frame;

use crate::error::ApiError;

/// Longest pause between two parts of a request's body.
const PART_TIMEOUT: Duration = Duration::from_secs(30);

/// The whole body, if it is no larger than `max` bytes and keeps coming.
pub(crate) async fn read(body: Body, max: usize) -> Result<Vec<u8>, ApiError> {
    let mut body = std::pin::pin!(body);
    if body.size_hint().lower() > max as u64 {
        return Err(ApiError::TooLarge { max });
    }
    let mut bytes = Vec::new();
    loop {
        let frame = tokio::time::timeout(PART_TIMEOUT, poll_fn(|cx| body.as_mut().poll_frame(cx)));
        let Some(frame) = frame.await.map_err(|_| ApiError::BodyTimeout)? else {
            return Ok(bytes);
        };
        // The connection broke or the chunks are malformed: nobody will read this answer.
        let frame = frame.map_err(|_| ApiError::body("The request body could not be read."))?;
        if let Ok(data) = frame.into_data() {
            if bytes.len() + data.len() > max {
                return Err(ApiError::TooLarge { max });
            }
            bytes.extend_from_slice(&data);
        }
    }
}

/// Makes the parts of a body when the connection has room for them. Dropped when the client is gone.
pub(crate) trait Source: Send + Unpin + 'static {
    /// The next part, not empty; `None` at the end.
    fn poll_part(&mut self, cx: &mut Context<'_>) -> Poll<Option<Bytes>>;
}

/// A body of the source's parts.
pub(crate) fn streaming(source: impl Source) -> Body {
    Body::new(Parts(source))
}

struct Parts<S>(S);

impl<S: Source> HttpBody for Parts<S> {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.poll_part(cx).map(|part| part.map(|part| Ok(Frame::data(part))))
    }
}
