//! Bodies both ways: reading a request's under a limit, sending an answer's as it comes.

use std::convert::Infallible;
use std::future::poll_fn;
use std::ops::Deref;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use http_body::Frame;

use crate::error::ApiError;

/// Longest pause between two parts of a request's body.
const PART_TIMEOUT: Duration = Duration::from_secs(30);

/// So many of the largest bodies may be held at a time, by all requests together.
const LARGEST_AT_A_TIME: usize = 16;

/// How large bodies may be: each, and all together.
#[derive(Debug)]
pub(crate) struct BodyLimits {
    max: usize,
    left: AtomicUsize,
}

impl BodyLimits {
    pub(crate) fn new(max: usize) -> BodyLimits {
        BodyLimits { max, left: AtomicUsize::new(max.saturating_mul(LARGEST_AT_A_TIME)) }
    }

    /// The largest body that is read.
    pub(crate) fn max(&self) -> usize {
        self.max
    }

    fn take(&self, bytes: usize) -> Result<(), ApiError> {
        let take = |left: usize| left.checked_sub(bytes);
        let taken = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take);
        taken.map(drop).map_err(|_| ApiError::Busy { seconds: 1 })
    }
}

/// A body that is held.
#[derive(Debug)]
pub(crate) struct Held {
    bytes: Vec<u8>,
    limits: Arc<BodyLimits>,
}

impl Deref for Held {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.limits.left.fetch_add(self.bytes.len(), Ordering::Relaxed);
    }
}

/// The whole body, if it is not too large, keeps coming, and there is room for it.
pub(crate) async fn read(body: Body, limits: &Arc<BodyLimits>) -> Result<Held, ApiError> {
    let max = limits.max;
    let mut body = std::pin::pin!(body);
    if body.size_hint().lower() > max as u64 {
        return Err(ApiError::TooLarge { max });
    }
    let mut held = Held { bytes: Vec::new(), limits: Arc::clone(limits) };
    loop {
        let frame = tokio::time::timeout(PART_TIMEOUT, poll_fn(|cx| body.as_mut().poll_frame(cx)));
        let Some(frame) = frame.await.map_err(|_| ApiError::BodyTimeout)? else {
            return Ok(held);
        };
        // The connection broke or the chunks are malformed: nobody will read this answer.
        let frame = frame.map_err(|_| ApiError::body("The request body could not be read."))?;
        if let Ok(data) = frame.into_data() {
            if held.bytes.len() + data.len() > max {
                return Err(ApiError::TooLarge { max });
            }
            limits.take(data.len())?;
            held.bytes.extend_from_slice(&data);
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
