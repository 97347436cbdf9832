//! Connections: taken up to a number, bounded in headers and time, ended in order (`serving.md` 2.5).

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};

const MAX_HEADERS: usize = 100;
/// The request line and all headers.
const MAX_HEAD_BYTES: usize = 64 << 10;
/// From the moment when a connection waits for a request until its head is there, so idle connections end as well.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause when the system has no more files: others may close theirs.
const NO_FILES_PAUSE: Duration = Duration::from_millis(100);

/// Serves connections, at most `max` at a time (others wait), until `down` becomes true and those that are open have ended.
pub(crate) async fn serve(
    listener: TcpListener,
    router: &Router,
    max: usize,
    mut down: watch::Receiver<bool>,
) {
    let max = u32::try_from(max).unwrap_or(u32::MAX).min(Semaphore::MAX_PERMITS as u32);
    let places = Arc::new(Semaphore::new(max as usize));
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_headers(MAX_HEADERS)
        .max_header_size(MAX_HEAD_BYTES);
    loop {
        let accepted = async {
            let place = Arc::clone(&places).acquire_owned().await;
            (place, listener.accept().await)
        };
        let (place, accepted) = tokio::select! {
            accepted = accepted => accepted,
            () = wait(&mut down) => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) if of_one_connection(&error) => continue,
            Err(error) => {
                tracing::error!(%error, "a connection could not be accepted");
                tokio::time::sleep(NO_FILES_PAUSE).await;
                continue;
            }
        };
        let (http, router, down) = (http.clone(), router.clone(), down.clone());
        tokio::spawn(async move {
            connection(&http, stream, router, down).await;
            drop(place);
        });
    }
    drop(listener);
    // All places are free when all connections have ended. The semaphore is never closed.
    let _ = places.acquire_many(max).await;
}

async fn connection(
    http: &http1::Builder,
    stream: TcpStream,
    router: Router,
    mut down: watch::Receiver<bool>,
) {
    // Small chunks must not wait for the acknowledgement of earlier ones. A socket that refuses is slower, not wrong.
    let _ = stream.set_nodelay(true);
    let connection = http.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    let mut connection = std::pin::pin!(connection);
    // What goes wrong on a connection is its client's doing, or known to the request's log.
    tokio::select! {
        _ = connection.as_mut() => return,
        () = wait(&mut down) => connection.as_mut().graceful_shutdown(),
    }
    let _ = connection.await;
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
