//! Layers over a socket: patience with clients that do not read, a look at how they begin to speak and at whether they are still there,
//! word of those that speak, and words for those that cannot be understood.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

use crate::error::{ApiError, ErrorStyle};
use crate::identifier::identifier;

/// A socket whose writes fail when its peer takes nothing for too long.
pub(crate) struct Impatient<S> {
    inner: S,
    timeout: Duration,
    /// Runs while a write waits.
    waiting: Option<Pin<Box<Sleep>>>,
}

impl<S> Impatient<S> {
    pub(crate) fn new(inner: S, timeout: Duration) -> Impatient<S> {
        Impatient { inner, timeout, waiting: None }
    }

    fn watch<T>(&mut self, cx: &mut Context<'_>, poll: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if poll.is_ready() {
            self.waiting = None;
            return poll;
        }
        let timeout = self.timeout;
        let waiting = self.waiting.get_or_insert_with(|| Box::pin(tokio::time::sleep(timeout)));
        ready!(waiting.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Impatient<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Impatient<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let poll = Pin::new(&mut self.inner).poll_write(cx, bytes);
        self.watch(cx, poll)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let poll = Pin::new(&mut self.inner).poll_write_vectored(cx, slices);
        self.watch(cx, poll)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

/// How every connection of HTTP/2 begins.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A connection of which enough was read to know its protocol. That is read once more by whoever reads it.
pub(crate) struct Begun<S> {
    inner: S,
    begin: [u8; PREFACE.len()],
    /// What was read and is not taken yet.
    read: std::ops::Range<usize>,
    http2: bool,
}

impl<S: AsyncRead + Unpin> Begun<S> {
    /// Reads until the connection cannot be HTTP/2, or must be.
    ///
    /// # Errors
    /// Those of the connection.
    pub(crate) async fn read(mut inner: S) -> io::Result<Begun<S>> {
        let mut begin = [0; PREFACE.len()];
        let mut len = 0;
        while len < begin.len() && begin[..len] == PREFACE[..len] {
            match inner.read(&mut begin[len..]).await? {
                0 => break,
                count => len += count,
            }
        }
        Ok(Begun { inner, begin, read: 0..len, http2: begin[..len] == *PREFACE })
    }

    pub(crate) fn is_http2(&self) -> bool {
        self.http2
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Begun<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.read.is_empty() {
            return Pin::new(&mut self.inner).poll_read(cx, buffer);
        }
        let count = self.read.len().min(buffer.remaining());
        let end = self.read.start + count;
        buffer.put_slice(&self.begin[self.read.start..end]);
        self.read.start = end;
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Begun<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

/// So much is read ahead.
const MAX_AHEAD: usize = 64 << 10;

/// A connection that is read ahead while its reader is busy, which is how the end of a client shows behind bytes that are not wanted
/// yet. Clones are the same connection.
pub(crate) struct Ahead<S>(Arc<Mutex<Behind<S>>>);

struct Behind<S> {
    inner: S,
    /// What was read and is not taken yet.
    read: VecDeque<u8>,
}

impl<S> Clone for Ahead<S> {
    fn clone(&self) -> Ahead<S> {
        Ahead(Arc::clone(&self.0))
    }
}

impl<S> Ahead<S> {
    pub(crate) fn new(inner: S) -> Ahead<S> {
        Ahead(Arc::new(Mutex::new(Behind { inner, read: VecDeque::new() })))
    }

    fn behind(&self) -> MutexGuard<'_, Behind<S>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<S: AsyncRead + Unpin> Ahead<S> {
    /// Reads what there is, up to a limit. Ready when the client has gone.
    pub(crate) fn poll_gone(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut behind = self.behind();
        let Behind { inner, read } = &mut *behind;
        let mut part = [0; 4096];
        while read.len() < MAX_AHEAD {
            let mut buffer = ReadBuf::new(&mut part);
            match ready!(Pin::new(&mut *inner).poll_read(cx, &mut buffer)) {
                Ok(()) if !buffer.filled().is_empty() => read.extend(buffer.filled()),
                _ => return Poll::Ready(()),
            }
        }
        Poll::Pending
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Ahead<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut behind = self.behind();
        let Behind { inner, read } = &mut *behind;
        if read.is_empty() {
            return Pin::new(inner).poll_read(cx, buffer);
        }
        let (first, _) = read.as_slices();
        let count = first.len().min(buffer.remaining());
        buffer.put_slice(&first[..count]);
        read.drain(..count);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Ahead<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.behind().inner).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.behind().inner).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.behind().inner.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.behind().inner).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.behind().inner).poll_shutdown(cx)
    }
}

/// A connection of HTTP/1.1 that tells when something was read from it, and on which refusals that come from the protocol's
/// library, which have no body, get the one that all others have.
pub(crate) struct Explaining<S, F> {
    inner: S,
    /// Called when something was read.
    heard: F,
    style: ErrorStyle,
    /// What is being written in place of a refusal.
    answer: Vec<u8>,
    /// The refusal's length.
    replaced: usize,
}

impl<S, F> Explaining<S, F> {
    pub(crate) fn new(inner: S, heard: F, style: ErrorStyle) -> Explaining<S, F> {
        Explaining { inner, heard, style, answer: Vec::new(), replaced: 0 }
    }

    /// What to write in place of these bytes, if they are a refusal without a body.
    fn explained(&self, bytes: &[u8]) -> Option<Vec<u8>> {
        let status = bytes.strip_prefix(b"HTTP/1.1 ")?.get(..3)?;
        let head = std::str::from_utf8(bytes).ok().filter(|_| status[0] == b'4')?.strip_suffix("\r\n\r\n")?;
        let (mut line, headers) = head.split_once("\r\n")?;
        if !headers.split("\r\n").any(|header| header.eq_ignore_ascii_case("content-length: 0")) {
            return None;
        }
        let error = match status {
            // The library tells long addresses from long headers; we do not.
            b"431" | b"414" => {
                line = "HTTP/1.1 431 Request Header Fields Too Large";
                ApiError::LargeHead
            }
            _ => ApiError::body("The request is not valid HTTP."),
        };
        let body = serde_json::to_string(&error.wire(self.style)).ok()?;
        let kept =
            headers.split("\r\n").filter(|header| !header.to_ascii_lowercase().starts_with("content-length"));
        let kept: String = kept.map(|header| format!("{header}\r\n")).collect();
        let (length, id) = (body.len(), identifier());
        let own =
            format!("content-type: application/json\r\nx-request-id: {id}\r\ncontent-length: {length}\r\n");
        Some(format!("{line}\r\n{kept}{own}\r\n{body}").into_bytes())
    }
}

impl<S: AsyncRead + Unpin, F: Fn() + Unpin> AsyncRead for Explaining<S, F> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let poll = Pin::new(&mut self.inner).poll_read(cx, buffer);
        if buffer.filled().len() > before {
            (self.heard)();
        }
        poll
    }
}

impl<S: AsyncWrite + Unpin, F: Unpin> AsyncWrite for Explaining<S, F> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.answer.is_empty() {
            match self.explained(bytes) {
                Some(answer) => (self.answer, self.replaced) = (answer, bytes.len()),
                None => return Pin::new(&mut self.inner).poll_write(cx, bytes),
            }
        }
        let this = &mut *self;
        while !this.answer.is_empty() {
            let written = ready!(Pin::new(&mut this.inner).poll_write(cx, &this.answer))?;
            this.answer.drain(..written);
            if written == 0 {
                return Poll::Ready(Ok(0));
            }
        }
        Poll::Ready(Ok(this.replaced))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match slices {
            // A head alone.
            [head] => self.poll_write(cx, head),
            _ => Pin::new(&mut self.inner).poll_write_vectored(cx, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
