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
use tokio::time::Instant;

use crate::error::ApiError;

/// Longest pause between two parts of a request's body.
const PART_TIMEOUT: Duration = Duration::from_secs(30);

/// A body that takes longer than a pause must come at this rate, in bytes per second.
const LEAST_RATE: usize = 256 << 10;

/// So many of the largest bodies may be held at a time, by all requests together.
const LARGEST_AT_A_TIME: usize = 16;

/// What most bodies are smaller than. So much of each has room of its own, which large ones cannot take from small ones.
const SMALL: usize = 1 << 20;

/// How large bodies may be: each, and all together.
#[derive(Debug)]
pub(crate) struct BodyLimits {
    max: usize,
    /// Of the beginnings of bodies, and of what is beyond [`SMALL`].
    left: [AtomicUsize; 2],
}

impl BodyLimits {
    pub(crate) fn new(max: usize) -> BodyLimits {
        let left = || AtomicUsize::new(max.saturating_mul(LARGEST_AT_A_TIME));
        BodyLimits { max, left: [left(), left()] }
    }

    /// The largest body that is read.
    pub(crate) fn max(&self) -> usize {
        self.max
    }

    /// Takes room for a body that grows from one size to another: all of it or nothing.
    fn take(&self, from: usize, to: usize) -> Result<(), ApiError> {
        let [small, large] = &self.left;
        let ([small_from, large_from], [small_to, large_to]) = (parts(from), parts(to));
        let take = |left: &AtomicUsize, bytes: usize| {
            let less = |left: usize| left.checked_sub(bytes);
            left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok()
        };
        if !take(small, small_to - small_from) {
            return Err(ApiError::Busy { seconds: 1 });
        }
        if !take(large, large_to - large_from) {
            small.fetch_add(small_to - small_from, Ordering::Relaxed);
            return Err(ApiError::Busy { seconds: 1 });
        }
        Ok(())
    }

    fn give_back(&self, bytes: usize) {
        for (left, part) in self.left.iter().zip(parts(bytes)) {
            left.fetch_add(part, Ordering::Relaxed);
        }
    }
}

/// How much of so many bytes has which room.
fn parts(bytes: usize) -> [usize; 2] {
    [bytes.min(SMALL), bytes.saturating_sub(SMALL)]
}

/// A body that is held.
#[derive(Debug)]
pub(crate) struct Held {
    bytes: Vec<u8>,
    limits: Arc<BodyLimits>,
}

impl Held {
    /// Holds it no more: somebody else is to read it.
    pub(crate) fn release(mut self) -> Body {
        let bytes = std::mem::take(&mut self.bytes);
        self.limits.give_back(bytes.len());
        Body::from(bytes)
    }
}

impl Deref for Held {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.limits.give_back(self.bytes.len());
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
    let begun = Instant::now();
    loop {
        let on_time = Duration::from_secs((held.bytes.len() / LEAST_RATE) as u64);
        let late = (begun + on_time).min(Instant::now()) + PART_TIMEOUT;
        let frame = tokio::time::timeout_at(late, poll_fn(|cx| body.as_mut().poll_frame(cx)));
        let Some(frame) = frame.await.map_err(|_| ApiError::BodyTimeout)? else {
            return Ok(held);
        };
        // The connection broke or the chunks are malformed: nobody will read this answer.
        let frame = frame.map_err(|_| ApiError::body("The request body could not be read."))?;
        if let Ok(data) = frame.into_data() {
            if held.bytes.len() + data.len() > max {
                return Err(ApiError::TooLarge { max });
            }
            limits.take(held.bytes.len(), held.bytes.len() + data.len())?;
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

#[cfg(test)]
mod tests {
    use super::*;

    /// So many parts of so many bytes, with a pause before each.
    struct Slow {
        parts: usize,
        bytes: usize,
        pause: Duration,
        sleep: Pin<Box<tokio::time::Sleep>>,
    }

    impl Source for Slow {
        fn poll_part(&mut self, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
            if self.parts == 0 {
                return Poll::Ready(None);
            }
            std::task::ready!(self.sleep.as_mut().poll(cx));
            self.parts -= 1;
            self.sleep = Box::pin(tokio::time::sleep(self.pause));
            Poll::Ready(Some(vec![0; self.bytes].into()))
        }
    }

    #[tokio::test]
    async fn large_bodies_leave_room_for_small_ones() {
        const MAX: usize = 3 << 20;
        let limits = Arc::new(BodyLimits::new(MAX));
        let read = async |bytes| read(Body::from(vec![0; bytes]), &limits).await;
        let mut held = Vec::new();
        let refused = loop {
            match read(MAX).await {
                Ok(body) => held.push(body),
                Err(error) => break error,
            }
        };
        assert_eq!((held.len(), refused), (24, ApiError::Busy { seconds: 1 }));
        assert!(read(SMALL).await.is_ok());
        held.pop();
        // Whoever is to read it again finds room.
        let again = read(MAX).await.unwrap().release();
        assert!(super::read(again, &limits).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn bodies_must_keep_coming() {
        let limits = Arc::new(BodyLimits::new(32 << 20));
        let read = async |parts, bytes, seconds| {
            let pause = Duration::from_secs(seconds);
            let body = Slow { parts, bytes, pause, sleep: Box::pin(tokio::time::sleep(pause)) };
            read(streaming(body), &limits).await.map(|held| held.len())
        };
        // Small and slow, or large and at a rate.
        assert_eq!(read(2, 1, 12).await, Ok(2));
        assert_eq!(read(100, 256 << 10, 1).await, Ok(100 * (256 << 10)));
        // A byte from time to time, too low a rate, and a pause after what came fast.
        assert_eq!(read(3, 1, 12).await, Err(ApiError::BodyTimeout));
        assert_eq!(read(100, 128 << 10, 1).await, Err(ApiError::BodyTimeout));
        assert_eq!(read(2, 16 << 20, 31).await, Err(ApiError::BodyTimeout));
        assert_eq!(limits.left.each_ref().map(|left| left.load(Ordering::Relaxed)), [512 << 20; 2]);
    }
}
