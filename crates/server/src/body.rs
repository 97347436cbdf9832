//! Bodies both ways: reading a request's under a limit, sending an answer's as it comes.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use tokio::io::{AsyncRead, ReadBuf};
use tower_http::services::fs::AsyncReadBody;

use crate::error::ApiError;

/// Longest pause between two parts of a request's body.
const PART_TIMEOUT: Duration = Duration::from_secs(30);

/// Bytes handed to the connection at once.
const CHUNK_BYTES: usize = 16 * 1024;

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
    Body::new(AsyncReadBody::with_capacity(Reader { source, rest: Bytes::new() }, CHUNK_BYTES))
}

struct Reader<S> {
    source: S,
    rest: Bytes,
}

impl<S: Source> AsyncRead for Reader<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.rest.is_empty() {
            match std::task::ready!(self.source.poll_part(cx)) {
                Some(part) => self.rest = part,
                None => return Poll::Ready(Ok(())),
            }
        }
        let len = self.rest.len().min(buf.remaining());
        buf.put_slice(&self.rest.split_to(len));
        Poll::Ready(Ok(()))
    }
}
