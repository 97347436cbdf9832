//! How clients reach the server: TLS, HTTP/2, sockets in the file system, pages of other origins, prefixes of proxies.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use engine::Scripted;
use hyper::Request;
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::{Value, json};
use server::{ClientCertificates, CorsOptions, Error, Options, Server, TlsOptions};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, version};

use crate::fixture::{Fixture, JSON, engine_options, message, options, tokens};

const HI: &str = "<|channel|>final<|message|>Hi<|return|>";

fn serving(options: &Options) -> Fixture {
    let backend = Scripted::new(Scripted::gpt_oss(), vec![tokens(HI)]);
    Fixture::start(options, backend, engine_options())
}

fn certificate(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/tls").join(name)
}

fn tls(client_certificates: ClientCertificates) -> TlsOptions {
    TlsOptions {
        certificates: certificate("server.pem"),
        key: certificate("server.key"),
        client_roots: Some(certificate("root.pem")),
        client_certificates,
        refresh: false,
    }
}

/// A client that believes the root, and may show a certificate and offer protocols.
fn connector(own: bool, old: bool, protocols: &[&[u8]]) -> TlsConnector {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(certificate("root.pem")).unwrap()).unwrap();
    let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
    let versions: &[_] = if old { &[&version::TLS12] } else { &[&version::TLS13] };
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)
        .unwrap()
        .with_root_certificates(roots);
    let mut config = match own {
        false => builder.with_no_client_auth(),
        true => builder
            .with_client_auth_cert(
                vec![CertificateDer::from_pem_file(certificate("client.pem")).unwrap()],
                PrivateKeyDer::from_pem_file(certificate("client.key")).unwrap(),
            )
            .unwrap(),
    };
    config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
    Arc::new(config).into()
}

async fn secured(server: &Fixture, connector: &TlsConnector) -> std::io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(server.address).await?;
    connector.connect(ServerName::try_from("localhost").unwrap(), stream).await
}

/// The status of an answer over a connection of HTTP/1.1.
async fn status(server: &Fixture, connector: &TlsConnector) -> std::io::Result<String> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = secured(server, connector).await?;
    stream.write_all(&message("GET", "/v1/models", "", b"")).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer.split(' ').nth(1).unwrap_or_default().to_owned())
}

#[test]
fn certificates() {
    for (kind, without, with) in [
        (ClientCertificates::None, true, true),
        (ClientCertificates::Optional, true, true),
        (ClientCertificates::Required, false, true),
    ] {
        let server = serving(&Options { tls: Some(tls(kind)), ..options() });
        for old in [true, false] {
            let found = |own: bool| {
                let found = server.runtime.block_on(status(&server, &connector(own, old, &[])));
                found.is_ok_and(|status| status == "200")
            };
            assert_eq!((found(false), found(true)), (without, with), "{kind:?}, old: {old}");
        }
        // Whoever does not speak TLS is not answered, and does not matter.
        let mut plain = server.connect();
        plain.write_all(b"GET /health HTTP/1.1\r\n\r\n").unwrap();
        let mut answer = Vec::new();
        let _ = plain.read_to_end(&mut answer);
        assert!(!answer.starts_with(b"HTTP"));
    }
}

#[test]
fn certificates_that_cannot_be_used() {
    let server = Fixture::loading(&options());
    let error = |tls: TlsOptions| {
        let options = Options { tls: Some(tls), ..options() };
        match server.runtime.block_on(Server::bind(&options)).unwrap_err() {
            Error::Tls(message) => message,
            other => panic!("{other}"),
        }
    };
    let good = tls(ClientCertificates::Required);
    assert!(
        error(TlsOptions { certificates: "/nowhere.pem".into(), ..good.clone() }).contains("/nowhere.pem")
    );
    assert!(error(TlsOptions { key: certificate("server.pem"), ..good.clone() }).contains("server.pem"));
    assert!(error(TlsOptions { certificates: certificate("server.key"), ..good.clone() }).contains("none"));
    assert!(error(TlsOptions { key: certificate("client.key"), ..good.clone() }).contains("server.pem"));
    assert!(error(TlsOptions { client_roots: None, ..good }).contains("roots"));
}

#[test]
fn certificates_that_change() {
    let folder = tempfile::tempdir().unwrap();
    let (pem, key) = (folder.path().join("a.pem"), folder.path().join("a.key"));
    let put = |name: &str| {
        std::fs::copy(certificate(&format!("{name}.key")), &key).unwrap();
        std::fs::copy(certificate(&format!("{name}.pem")), &pem).unwrap();
    };
    put("server");
    let tls = TlsOptions {
        certificates: pem.clone(),
        key: key.clone(),
        refresh: true,
        ..tls(ClientCertificates::None)
    };
    let server = serving(&Options { tls: Some(tls), ..options() });
    let shown = || {
        let stream = server.runtime.block_on(secured(&server, &connector(false, false, &[]))).unwrap();
        stream.get_ref().1.peer_certificates().unwrap()[0].clone()
    };
    let expected = |name: &str| CertificateDer::from_pem_file(certificate(name)).unwrap();
    assert_eq!(shown(), expected("server.pem"));
    put("renewed");
    while shown() != expected("renewed.pem") {
        std::thread::yield_now();
    }
}

#[test]
fn http2_in_the_clear_and_encrypted() {
    for encrypted in [false, true] {
        let tls = encrypted.then(|| tls(ClientCertificates::None));
        let keys = vec!["key".to_owned()];
        let server = serving(&Options { tls, api_keys: keys, ..options() });
        let send = async {
            let (mut send, connection) = if encrypted {
                let stream = secured(&server, &connector(false, false, &[b"h2"])).await.unwrap();
                assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
                let (send, connection) = handshake(stream).await;
                (send, tokio::spawn(async move { drop(connection.await) }))
            } else {
                let (send, connection) = handshake(TcpStream::connect(server.address).await.unwrap()).await;
                (send, tokio::spawn(async move { drop(connection.await) }))
            };
            let chat = json!({"messages": [{"role": "user", "content": "Hi"}], "stream": true}).to_string();
            let request = |path: &str, body: String| {
                Request::post(format!("http://localhost{path}"))
                    .header("authorization", "Bearer key")
                    .header("content-type", "application/json")
                    .body(body)
                    .unwrap()
            };
            // Several at a time on one connection.
            let mut answers = Vec::new();
            for _ in 0..4 {
                send.ready().await.unwrap();
                answers.push(send.send_request(request("/v1/chat/completions", chat.clone())));
            }
            for answer in answers {
                let answer = answer.await.unwrap();
                assert_eq!(answer.status(), 200);
                let body = axum::body::to_bytes(Body::new(answer.into_body()), 1 << 20).await.unwrap();
                assert!(body.ends_with(b"data: [DONE]\n\n"));
            }
            // The limits are the same.
            let mut many = request("/v1/chat/completions", chat);
            for i in 0..200 {
                let name = hyper::header::HeaderName::try_from(format!("x-{i}")).unwrap();
                many.headers_mut().insert(name, "1".parse().unwrap());
            }
            assert_eq!(send.send_request(many).await.unwrap().status(), 431);
            let large = request("/v1/completions", "x".repeat(33 << 20));
            match send.send_request(large).await {
                Ok(answer) => assert_eq!(answer.status(), 413),
                // The server need not read what it has refused.
                Err(error) => assert!(!error.is_timeout(), "{error}"),
            }
            let unknown = Request::get("http://localhost/v1/models").body(String::new()).unwrap();
            assert_eq!(send.send_request(unknown).await.unwrap().status(), 401);
            drop(send);
            connection.await.unwrap();
        };
        server.runtime.block_on(send);
    }
}

/// The client writes its frames itself, so that nothing makes room for it.
#[test]
fn answers_over_http2_that_are_not_read_are_given_up() {
    const DATA: u8 = 0;
    const HEADERS: u8 = 1;
    const RESET: u8 = 3;
    const SETTINGS: u8 = 4;
    const WINDOW_UPDATE: u8 = 8;
    fn frame(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
        [&[0, 0, payload.len() as u8, kind, flags, 0, 0, 0, stream], payload].concat()
    }
    // All of a request.
    let get = |stream: u8, path: &str| {
        let path = [&[4, path.len() as u8], path.as_bytes()].concat();
        frame(HEADERS, 5, stream, &[b"\x82\x86\x01\x01x", &path[..]].concat())
    };
    // A connection with this room for each answer.
    let connect = |server: &Fixture, room: u8| {
        let mut connection = server.connect();
        let settings = frame(SETTINGS, 0, 0, &[0, 4, 0, 0, 0, room]);
        connection.write_all(&[b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &settings[..]].concat()).unwrap();
        // Sends frames, and says kind and stream of the next one that is about a stream, if there is one.
        move |frames: &[u8]| {
            connection.write_all(frames).unwrap();
            loop {
                let mut head = [0; 9];
                connection.read_exact(&mut head).ok()?;
                let mut payload = vec![0; usize::from(head[1]) << 8 | usize::from(head[2])];
                connection.read_exact(&mut payload).ok()?;
                if head[8] > 0 {
                    return Some((head[3], head[8]));
                }
            }
        }
    };
    let patient = Options { client_stall_timeout: Duration::from_millis(50), ..options() };
    let server = serving(&patient);
    // Of which nothing is read, and the beginning.
    for room in [0, 10] {
        let mut next = connect(&server, room);
        assert_eq!(next(&get(1, "/metrics")), Some((HEADERS, 1)));
        let begun = next(&[]);
        assert_eq!(if room > 0 { next(&[]) } else { begun }, Some((RESET, 1)), "{room}: {begun:?}");
        // The connection goes on.
        let more = frame(WINDOW_UPDATE, 0, 3, &[0, 0, 4, 0]);
        assert_eq!(next(&[get(3, "/version"), more].concat()), Some((HEADERS, 3)));
        assert_eq!(next(&[]), Some((DATA, 3)));
    }
    // Of which nothing but the end is unread: the connection does not stay for that.
    let server = serving(&Options { keep_alive: Duration::from_millis(20), ..patient });
    let mut next = connect(&server, 10);
    assert_eq!([next(&get(1, "/version")), next(&[])], [Some((HEADERS, 1)), Some((DATA, 1))]);
    assert_eq!(next(&[]), None);
}

type Sender = hyper::client::conn::http2::SendRequest<String>;

async fn handshake<S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin + 'static>(
    stream: S,
) -> (Sender, hyper::client::conn::http2::Connection<TokioIo<S>, String, TokioExecutor>) {
    hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap()
}

#[test]
fn a_socket_in_the_file_system() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    // One that was left behind is replaced, one in use is not, and neither is a file.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let options = Options { socket: Some(path.clone()), ..options() };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let server = runtime.block_on(Server::bind(&options)).unwrap();
    assert_eq!((server.url(), server.local_addr()), (format!("unix:{}", path.display()).as_str(), None));
    assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o660);
    assert!(matches!(runtime.block_on(Server::bind(&options)).unwrap_err(), Error::InUse { .. }));
    let file = folder.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    let taken = Options { socket: Some(file.clone()), ..options.clone() };
    assert!(runtime.block_on(Server::bind(&taken)).is_err());
    assert_eq!(std::fs::read_to_string(file).unwrap(), "precious");

    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let ended = runtime.spawn(server.run(async { drop(stopped.await) }));
    let mut stream = std::os::unix::net::UnixStream::connect(&path).unwrap();
    stream.write_all(&message("GET", "/live", "", b"")).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    stop.send(()).unwrap();
    runtime.block_on(ended).unwrap();
    assert!(!path.exists());
}

#[test]
fn pages_of_other_origins() {
    let cors = CorsOptions { origins: vec!["https://good.example".to_owned()], ..CorsOptions::default() };
    let keys = vec!["key".to_owned()];
    let server = serving(&Options { cors, api_keys: keys.clone(), ..options() });
    let ask = "access-control-request-method: POST\r\naccess-control-request-headers: authorization\r\n";
    let asked = |origin: &str| {
        server.request("OPTIONS", "/v1/chat/completions", &format!("origin: {origin}\r\n{ask}"), b"")
    };
    let answer = asked("https://good.example");
    assert_eq!(answer.status, 204);
    for (name, value) in [
        ("access-control-allow-origin", "https://good.example"),
        ("access-control-allow-methods", "POST"),
        ("access-control-allow-headers", "authorization"),
        ("vary", "origin"),
    ] {
        assert_eq!(answer.header(name), Some(value), "{name}");
    }
    assert_eq!(answer.header("access-control-allow-credentials"), None);
    let refused = asked("https://bad.example");
    assert_eq!((refused.status, refused.header("access-control-allow-origin")), (405, None));
    // Errors can be read by the page, too.
    let headers = format!("origin: https://good.example\r\n{JSON}");
    let answer = server.request("POST", "/v1/chat/completions", &headers, b"{}");
    assert_eq!(answer.status, 401);
    assert_eq!(answer.header("access-control-allow-origin"), Some("https://good.example"));

    // All origins, with cookies; and none, which is the default.
    let cors = CorsOptions { origins: vec!["*".to_owned()], credentials: true, ..CorsOptions::default() };
    let server = serving(&Options { cors, ..options() });
    let answer = server.request("GET", "/v1/models", "origin: https://any.example\r\n", b"");
    assert_eq!(answer.header("access-control-allow-origin"), Some("https://any.example"));
    assert_eq!(answer.header("access-control-allow-credentials"), Some("true"));
    let server = serving(&options());
    let answer = server.request("GET", "/v1/models", "origin: https://any.example\r\n", b"");
    assert_eq!((answer.status, answer.header("access-control-allow-origin")), (200, None));
}

#[test]
fn behind_a_proxy() {
    let server = serving(&Options { root_path: "/models/tiny".to_owned(), ..options() });
    for path in ["/models/tiny/v1/models", "/v1/models", "/models/tiny/v1/models?a=b", "/models/tiny/"] {
        assert_eq!(server.get(path).status, 200, "{path}");
    }
    // The page's addresses are relative to it.
    let answer = server.get("/models/tiny");
    assert_eq!((answer.status, answer.header("location")), (308, Some("/models/tiny/")));
    assert_eq!(server.get("/models/tinyv1/models").status, 404);
    let described = server.get("/models/tiny/openapi.json").ok();
    assert_eq!(described["servers"], json!([{"url": "/models/tiny"}]));
}

#[test]
fn idle_connections_end() {
    let options = Options { keep_alive: Duration::from_millis(20), ..options() };
    let (server, steps) = Fixture::stepwise(HI, &options);
    let mut idle = server.connect();
    idle.write_all(b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
    let mut answer = String::new();
    idle.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    // Not while an answer is awaited, however long it takes.
    let body = json!({"messages": [{"role": "user", "content": "Hi"}]});
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| server.chat(&body).status);
        server.until(|stats| stats.step_started.is_some_and(|at| at.elapsed() > Duration::from_millis(100)));
        drop(steps);
        assert_eq!(waiting.join().unwrap(), 200);
    });
}

/// The clock is the test's, so that nothing takes time, and no time is measured.
#[tokio::test(start_paused = true)]
async fn idle_connections_end_when_they_are_said_to() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::time::Instant;
    const REQUEST: &[u8] = b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n";
    for keep_alive in [2, 5, 75] {
        let options = Options { keep_alive: Duration::from_secs(keep_alive), ..options() };
        let server = Server::bind(&options).await.unwrap();
        let address = server.local_addr().unwrap();
        tokio::spawn(server.run(std::future::pending()));
        let seconds = async |mut stream: TcpStream| {
            let start = Instant::now();
            stream.read_to_end(&mut Vec::new()).await.unwrap();
            start.elapsed().as_secs()
        };
        let answered = async |requests: usize| {
            let mut stream = TcpStream::connect(address).await.unwrap();
            for _ in 0..requests {
                stream.write_all(REQUEST).await.unwrap();
                let mut answer = [0; 1024];
                let read = stream.read(&mut answer).await.unwrap();
                assert!(answer[..read].starts_with(b"HTTP/1.1 200"));
            }
            stream
        };
        assert_eq!(seconds(answered(1).await).await, keep_alive);
        assert_eq!(seconds(answered(3).await).await, keep_alive);
        // A head that has begun has ten seconds, whenever it begins.
        for requests in [0, 1] {
            let mut stream = answered(requests).await;
            tokio::time::sleep(Duration::from_secs(1)).await;
            stream.write_all(b"GET /live HT").await.unwrap();
            assert_eq!(seconds(stream).await, 10, "{requests}, {keep_alive}");
        }
    }
}

#[test]
fn the_list_of_paths_is_for_programs_and_people() {
    let server = serving(&options());
    let described: Value = server.get("/openapi.json").ok();
    assert_eq!(described["openapi"], "3.1.0");
    let paths = described["paths"].as_object().unwrap();
    assert!(paths.contains_key("/v1/chat/completions") && !paths.contains_key("/sleep"));
    let page = server.get("/docs");
    assert_eq!(page.header("content-type"), Some("text/html; charset=utf-8"));
    assert!(page.header("content-security-policy").unwrap().starts_with("default-src 'none'"));
    assert!(paths.keys().all(|path| page.body.contains(path)), "{}", page.body);
    let options = Options { docs: false, page: false, ollama: false, ..options() };
    let server = serving(&options);
    for path in ["/", "/docs", "/openapi.json", "/api/tags"] {
        assert_eq!(server.get(path).status, 404, "{path}");
    }
}
