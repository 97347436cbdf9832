//! Connections: taken up to a number, bounded in headers and time, ended in order (`serving.md` 2.5).

use std::convert::Infallible;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes, HttpBody};
use http_body::Frame;
use hyper::Uri;
use hyper::body::Incoming;
use hyper::rt::Executor;
use hyper::server::conn::{http1, http2};
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;

use crate::error::ErrorStyle;
use crate::listener::{Accepted, Listener};
use crate::socket::{Ahead, Begun, Explaining, Impatient};
use crate::tls::Tls;

/// Of a request.
pub(crate) const MAX_HEADERS: usize = 100;
/// The request line and all headers.
const MAX_HEAD_BYTES: usize = 64 << 10;
/// For a connection to say what it speaks, and for each head to arrive.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause when the system has no more files: others may close theirs.
const NO_FILES_PAUSE: Duration = Duration::from_millis(100);
/// Requests at a time on one connection, where the protocol allows more than one.
const MAX_STREAMS: u32 = 256;
/// What is kept of an answer for a client of HTTP/2 that does not read.
const MAX_SEND_BUFFER: usize = 64 << 10;
/// An answer's parts for a client of HTTP/2: the last one is out of sight before it is read.
const MAX_FRAME: usize = 16 << 10;
/// How often a silent client of HTTP/2 is asked whether it is there, and how long it may take to say so.
const PING: Duration = Duration::from_secs(20);

/// What connections are held to.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    /// At a time; others wait to be accepted.
    pub(crate) max: usize,
    /// Longest pause between an answer and the next request.
    pub(crate) keep_alive: Duration,
    /// Longest time in which a client may read nothing of what there is for it.
    pub(crate) stall_timeout: Duration,
    /// Taken off the beginning of paths.
    pub(crate) root_path: String,
    pub(crate) error_style: ErrorStyle,
    pub(crate) tls: Option<Arc<Tls>>,
}

/// Serves connections until `down` becomes true, those that are open then have ended, and so has `rest`. Connections that come
/// meanwhile are served, but not waited for.
pub(crate) async fn serve(
    listener: Listener,
    router: &Router,
    settings: &Settings,
    down: watch::Receiver<bool>,
    rest: impl Future<Output = ()>,
) {
    let max = u32::try_from(settings.max).unwrap_or(u32::MAX).min(Semaphore::MAX_PERMITS as u32);
    let places = Arc::new(Semaphore::new(max as usize));
    let mut http1 = http1::Builder::new();
    http1
        .timer(TokioTimer::new())
        // Its clock runs while a connection is idle, too.
        .header_read_timeout(None)
        .max_headers(MAX_HEADERS)
        .max_header_size(MAX_HEAD_BYTES);
    let mut http2 = http2::Builder::new(Streams { stall_timeout: settings.stall_timeout });
    http2
        .timer(TokioTimer::new())
        .max_header_list_size(MAX_HEAD_BYTES as u32)
        .max_concurrent_streams(MAX_STREAMS)
        .max_send_buf_size(MAX_SEND_BUFFER)
        .keep_alive_interval(PING)
        .keep_alive_timeout(PING);
    let http = Http { http1, http2, settings: settings.clone() };
    let mut signal = down.clone();
    tokio::select! {
        never = accept(&listener, &http, router, &places, &down) => match never {},
        () = wait(&mut signal) => {}
    }
    let late = Arc::new(Semaphore::new(max as usize));
    let (_sender, never_down) = watch::channel(false);
    let ended = async {
        // All places are free when all connections have ended. The semaphore is never closed.
        let _ = places.acquire_many(max).await;
        rest.await;
    };
    tokio::select! {
        never = accept(&listener, &http, router, &late, &never_down) => match never {},
        () = ended => {}
    }
}

/// Accepts connections while there are places, and serves each on a task of its own; after `down` until its answers are sent.
async fn accept(
    listener: &Listener,
    http: &Http,
    router: &Router,
    places: &Arc<Semaphore>,
    down: &watch::Receiver<bool>,
) -> Infallible {
    loop {
        let place = Arc::clone(places).acquire_owned().await;
        let accepted = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) if of_one_connection(&error) => continue,
            Err(error) => {
                tracing::error!(%error, "a connection could not be accepted");
                tokio::time::sleep(NO_FILES_PAUSE).await;
                continue;
            }
        };
        let (http, router, down) = (http.clone(), router.clone(), down.clone());
        tokio::spawn(async move {
            match accepted {
                Accepted::Tcp(stream) => {
                    // Small chunks must not wait for the acknowledgement of earlier ones. A socket that refuses is slower,
                    // not wrong.
                    let _ = stream.set_nodelay(true);
                    http.secured(stream, router, down).await;
                }
                Accepted::Unix(stream) => http.secured(stream, router, down).await,
            }
            drop(place);
        });
    }
}

/// A byte stream both ways.
trait Stream: AsyncRead + AsyncWrite + Send + Unpin + 'static {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin + 'static> Stream for S {}

#[derive(Clone)]
struct Http {
    http1: http1::Builder,
    http2: http2::Builder<Streams>,
    settings: Settings,
}

impl Http {
    /// Below a TLS layer, if there is to be one.
    async fn secured(&self, stream: impl Stream, router: Router, down: watch::Receiver<bool>) {
        let stream = Impatient::new(stream, self.settings.stall_timeout);
        // What goes wrong on a connection is its client's doing, or known to the request's log.
        match &self.settings.tls {
            None => {
                let begun = tokio::time::timeout(HEAD_TIMEOUT, Begun::read(stream)).await;
                if let Ok(Ok(begun)) = begun {
                    let two = begun.is_http2();
                    self.connection(begun, two, router, down).await;
                }
            }
            Some(tls) => {
                let secured = tokio::time::timeout(HEAD_TIMEOUT, tls.acceptor().accept(stream)).await;
                if let Ok(Ok(secured)) = secured {
                    let two = secured.get_ref().1.alpn_protocol() == Some(b"h2");
                    self.connection(secured, two, router, down).await;
                }
            }
        }
    }

    /// All requests of a connection.
    async fn connection(
        &self,
        stream: impl Stream,
        two: bool,
        router: Router,
        mut down: watch::Receiver<bool>,
    ) {
        let activity = Activity::new(self.settings.keep_alive);
        let service =
            tracked(TowerToHyperService::new(router), Arc::clone(&activity), &self.settings.root_path);
        // The two kinds of connection have no type in common.
        macro_rules! until_ended {
            ($connection:expr, $gone:expr) => {{
                let mut connection = std::pin::pin!($connection);
                let mut gone = std::pin::pin!($gone);
                tokio::select! {
                    biased;
                    // First of all what has already arrived is read.
                    _ = connection.as_mut() => return,
                    () = gone.as_mut() => return,
                    () = wait(&mut down) => {}
                    () = activity.ended() => {}
                }
                connection.as_mut().graceful_shutdown();
                tokio::select! {
                    biased;
                    _ = connection => {}
                    () = gone => {}
                    () = activity.head_is_late() => {}
                    () = activity.is_unread(self.settings.stall_timeout) => {}
                }
            }};
        }
        if two {
            let gone = std::future::pending();
            until_ended!(self.http2.serve_connection(TokioIo::new(stream), service), gone);
        } else {
            let stream = Ahead::new(stream);
            let ahead = stream.clone();
            // The protocol's library does not read on while a request is answered and it has bytes of the next one.
            let gone = std::future::poll_fn(|cx| match activity.is_busy() {
                true => ahead.poll_gone(cx),
                false => Poll::Pending,
            });
            let stream = Explaining::new(stream, || activity.heard(), self.settings.error_style);
            until_ended!(self.http1.serve_connection(TokioIo::new(stream), service), gone);
        }
    }
}

/// Counts the requests of a connection until their answers are sent.
fn tracked(
    inner: TowerToHyperService<Router>,
    activity: Arc<Activity>,
    root_path: &str,
) -> impl Service<
    hyper::Request<Incoming>,
    Response = hyper::Response<Held>,
    Error = Infallible,
    Future: Future<Output = Result<hyper::Response<Held>, Infallible>> + Send + 'static,
> + use<> {
    let root_path = root_path.to_owned();
    service_fn(move |mut request: hyper::Request<Incoming>| {
        let busy = Busy::new(&activity);
        if let Some(uri) = without(&root_path, request.uri()) {
            if request.uri().path() == root_path {
                request.extensions_mut().insert(BarePrefix(format!("{root_path}/")));
            }
            *request.uri_mut() = uri;
        }
        let answer = inner.call(request);
        async move {
            let response = answer.await?;
            // None: the connection is one of HTTP/1.1, whose socket tells.
            let reader = READER.try_with(Arc::clone).ok();
            reader.iter().for_each(|reader| reader.wait());
            Ok(response.map(|body| Held { body, rest: Bytes::new(), reader, _busy: busy }))
        }
    })
}

/// The path was the prefix alone, without the slash that addresses relative to it need: the path with it.
#[derive(Debug, Clone)]
pub(crate) struct BarePrefix(pub(crate) String);

/// The address without the prefix of its path, if it has it.
fn without(root_path: &str, uri: &Uri) -> Option<Uri> {
    let rest = uri.path_and_query()?.as_str().strip_prefix(root_path)?;
    if root_path.is_empty() || !(rest.is_empty() || rest.starts_with(['/', '?'])) {
        return None;
    }
    let slash = if rest.starts_with('/') { "" } else { "/" };
    format!("{slash}{rest}").parse().ok()
}

/// Whether a connection is in use.
#[derive(Debug)]
struct Activity {
    keep_alive: Duration,
    state: watch::Sender<State>,
}

#[derive(Debug, Clone, Copy)]
struct State {
    /// Requests without their whole answer.
    requests: usize,
    /// If there are none, whether the head of one has begun to arrive.
    head: bool,
    /// If there are none, when the client has taken too long.
    until: Instant,
}

impl Activity {
    fn new(keep_alive: Duration) -> Arc<Activity> {
        let state = State { requests: 0, head: false, until: Instant::now() + HEAD_TIMEOUT };
        Arc::new(Activity { keep_alive, state: watch::Sender::new(state) })
    }

    /// Bytes have come from the client.
    fn heard(&self) {
        self.state.send_if_modified(|state| {
            let begins = state.requests == 0 && !state.head;
            if begins {
                (state.head, state.until) = (true, Instant::now() + HEAD_TIMEOUT);
            }
            begins
        });
    }

    /// There is a request without its whole answer.
    fn is_busy(&self) -> bool {
        self.state.borrow().requests > 0
    }

    /// Waits until the connection has been idle for too long, or a head has not arrived in time.
    async fn ended(&self) {
        self.late(|state| state.requests == 0, Duration::ZERO).await;
    }

    /// Waits until nothing was asked for so much longer, in which the last answers' ends could have been read.
    async fn is_unread(&self, stall_timeout: Duration) {
        self.late(|state| state.requests == 0, stall_timeout).await;
    }

    /// Waits until a head has not arrived in time.
    async fn head_is_late(&self) {
        self.late(|state| state.head, Duration::ZERO).await;
    }

    /// Waits until the client takes too long in a state of this kind, and so much longer.
    async fn late(&self, applies: impl Fn(&State) -> bool, longer: Duration) {
        let mut states = self.state.subscribe();
        loop {
            let state = *states.borrow_and_update();
            let late = async {
                match applies(&state) {
                    true => tokio::time::sleep_until(state.until + longer).await,
                    false => std::future::pending().await,
                }
            };
            tokio::select! {
                () = late => return,
                // An error cannot be: the sender is here.
                _ = states.changed() => {}
            }
        }
    }
}

/// A request without its whole answer.
struct Busy(Arc<Activity>);

impl Busy {
    fn new(activity: &Arc<Activity>) -> Busy {
        activity.state.send_modify(|state| {
            state.requests += 1;
            state.head = false;
        });
        Busy(Arc::clone(activity))
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.state.send_modify(|state| {
            state.requests -= 1;
            state.until = Instant::now() + self.0.keep_alive;
        });
    }
}

/// The body of an answer.
struct Held {
    body: Body,
    /// Of the last part, which is told bit by bit.
    rest: Bytes,
    reader: Option<Arc<Reader>>,
    _busy: Busy,
}

impl HttpBody for Held {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let this = &mut *self;
        let Some(reader) = &this.reader else { return Pin::new(&mut this.body).poll_frame(cx) };
        if this.rest.is_empty() {
            let Poll::Ready(frame) = Pin::new(&mut this.body).poll_frame(cx) else {
                reader.is_there();
                return Poll::Pending;
            };
            match frame.map(|frame| frame.map(Frame::into_data)) {
                Some(Ok(Ok(data))) => this.rest = data,
                // Trailers, of which there are none.
                Some(Ok(Err(frame))) => return Poll::Ready(Some(Ok(frame))),
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None => return Poll::Ready(None),
            }
        }
        reader.wait();
        let part = this.rest.split_to(this.rest.len().min(MAX_FRAME));
        Poll::Ready(Some(Ok(Frame::data(part))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        let (hint, rest) = (self.body.size_hint(), self.rest.len() as u64);
        let mut whole = http_body::SizeHint::new();
        whole.set_lower(hint.lower() + rest);
        hint.upper().into_iter().for_each(|upper| whole.set_upper(upper + rest));
        whole
    }
}

/// Runs the streams of connections of HTTP/2. One whose client takes nothing for too long of what there is for it is reset: others
/// on its connection may be read.
#[derive(Debug, Clone, Copy)]
struct Streams {
    stall_timeout: Duration,
}

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for Streams {
    fn execute(&self, stream: F) {
        let reader = Arc::<Reader>::default();
        let stalled = Arc::clone(&reader).stalled(self.stall_timeout);
        tokio::spawn(READER.scope(reader, async {
            tokio::select! {
                () = stream => {}
                () = stalled => {}
            }
        }));
    }
}

tokio::task_local! {
    /// Whoever reads the stream that is being run.
    static READER: Arc<Reader>;
}

/// The client of a stream: since when a part of its answer waits for it to make room, if one does.
#[derive(Debug, Default)]
struct Reader(Mutex<Option<Instant>>);

impl Reader {
    /// A part has been handed over.
    fn wait(&self) {
        self.set(Some(Instant::now()));
    }

    /// All parts are gone; the next one is awaited.
    fn is_there(&self) {
        self.set(None);
    }

    fn set(&self, since: Option<Instant>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = since;
    }

    /// Waits until the client has made no room for so long. Looks again only when it might be so.
    async fn stalled(self: Arc<Reader>, timeout: Duration) {
        loop {
            let since = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let now = Instant::now();
            let until = since.unwrap_or(now) + timeout;
            if until <= now {
                return;
            }
            tokio::time::sleep_until(until).await;
        }
    }
}

/// Errors of a client that went away before it was accepted.
fn of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionRefused | ConnectionAborted | ConnectionReset)
}

async fn wait(signal: &mut watch::Receiver<bool>) {
    // An error means that nobody can signal any more, which cannot be told from a signal.
    let _ = signal.wait_for(|down| *down).await;
}
