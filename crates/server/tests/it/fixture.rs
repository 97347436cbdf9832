//! A server with a scripted engine behind it, and an HTTP client of a few lines.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, Once, mpsc};

use engine::{Engine, EngineOptions, Scripted, Stats, Step};
use harmony::Harmony;
use serde_json::Value;
use server::{Handle, Options, Server, SystemDate};
use tokenizer::Tokenizer;

pub(crate) const MODEL: &str = "tiny";

/// Long enough for any test, so that nothing depends on it: a test that gets here has failed.
const TIMEOUT: std::time::Duration = std::time::Duration::from_secs(60);

pub(crate) struct Fixture {
    pub(crate) address: SocketAddr,
    pub(crate) handle: Handle,
    pub(crate) engine: Option<Engine>,
    shutdown: Option<tokio::sync::oneshot::Sender<()>>,
    ended: tokio::task::JoinHandle<server::Ended>,
    pub(crate) runtime: tokio::runtime::Runtime,
}

pub(crate) fn options() -> Options {
    Options {
        port: 0,
        served_model_names: vec![MODEL.to_owned(), "org/alias".to_owned()],
        root: "/somewhere/private/tiny-gpt-oss".to_owned(),
        system_date: SystemDate::Fixed("2026-11-24".to_owned()),
        // No comment, lest a test that waits for something else wait for ever.
        sse_keep_alive: std::time::Duration::ZERO,
        ..Options::default()
    }
}

pub(crate) fn engine_options() -> EngineOptions {
    EngineOptions {
        kv_cache_bytes: 16 << 20,
        max_model_len: Some(8192),
        // So that equal requests have equal answers, counts included.
        prefix_caching: false,
        ..EngineOptions::default()
    }
}

pub(crate) fn harmony() -> Arc<Harmony> {
    Arc::new(Harmony::new(Tokenizer::o200k_harmony()).unwrap())
}

/// The tokens of a text in which markers are spelled.
pub(crate) fn tokens(text: &str) -> Vec<u32> {
    Tokenizer::o200k_harmony().encode_with_special(text)
}

impl Fixture {
    /// A server whose answers follow these texts in turn.
    pub(crate) fn saying(scripts: &[&str]) -> Fixture {
        let scripts = scripts.iter().map(|text| tokens(text)).collect();
        Fixture::start(&options(), Scripted::new(Scripted::gpt_oss(), scripts), engine_options())
    }

    /// A server that says one text, one step per message.
    pub(crate) fn stepwise(script: &str, options: &Options) -> (Fixture, Sender<Step>) {
        let (steps, control) = mpsc::channel();
        let backend = Scripted::new(Scripted::gpt_oss(), vec![tokens(script)]).controlled_by(control);
        (Fixture::start(options, backend, engine_options()), steps)
    }

    pub(crate) fn start(options: &Options, backend: Scripted, engine_options: EngineOptions) -> Fixture {
        let engine = Engine::start(Box::new(backend), harmony(), engine_options).unwrap();
        let fixture = Fixture::several(options, vec![engine.clone()]);
        Fixture { engine: Some(engine), ..fixture }
    }

    /// A server with these engines.
    pub(crate) fn several(options: &Options, engines: Vec<Engine>) -> Fixture {
        let fixture = Fixture::loading(&Options { replicas: engines.len(), ..options.clone() });
        fixture.handle.ready(engines);
        fixture
    }

    /// A server without an engine yet.
    pub(crate) fn loading(options: &Options) -> Fixture {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let server = runtime.block_on(Server::bind(options)).unwrap();
        let (address, handle) = (server.local_addr().unwrap(), server.handle());
        let (shutdown, signal) = tokio::sync::oneshot::channel::<()>();
        let ended = runtime.spawn(server.run(async {
            // The sender goes with the fixture.
            let _ = signal.await;
        }));
        Fixture { address, handle, engine: None, shutdown: Some(shutdown), ended, runtime }
    }

    /// Sends the shutdown signal.
    pub(crate) fn shut_down(&mut self) {
        self.shutdown.take().unwrap().send(()).unwrap();
    }

    /// Waits until the server has ended.
    pub(crate) fn ended(&mut self) -> server::Ended {
        self.runtime.block_on(&mut self.ended).unwrap()
    }

    pub(crate) fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        stream
    }

    pub(crate) fn stats(&self) -> Stats {
        self.engine.as_ref().unwrap().stats()
    }

    /// Waits until the engine's state is so.
    pub(crate) fn until(&self, mut holds: impl FnMut(&Stats) -> bool) {
        let start = std::time::Instant::now();
        while !holds(&self.stats()) {
            assert!(start.elapsed() < TIMEOUT, "{:?}", self.stats());
            std::thread::yield_now();
        }
    }

    /// Sends bytes as they are and reads the answer.
    pub(crate) fn raw(&self, request: &[u8]) -> Response {
        let mut stream = self.connect();
        stream.write_all(request).unwrap();
        Response::read(BufReader::new(stream))
    }

    pub(crate) fn request(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> Response {
        self.raw(&message(method, path, headers, body))
    }

    pub(crate) fn get(&self, path: &str) -> Response {
        self.request("GET", path, "", b"")
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Response {
        self.request("POST", path, JSON, body.to_string().as_bytes())
    }

    pub(crate) fn chat(&self, body: &Value) -> Response {
        self.post("/v1/chat/completions", body)
    }

    pub(crate) fn complete(&self, body: &Value) -> Response {
        self.post("/v1/completions", body)
    }

    /// Begins a stream; its events are read one by one.
    pub(crate) fn stream(&self, path: &str, body: &Value) -> Stream {
        let mut stream = self.connect();
        stream.write_all(&message("POST", path, JSON, body.to_string().as_bytes())).unwrap();
        Stream::new(stream)
    }

    /// All chunks of a stream that ends well.
    pub(crate) fn chunks(&self, path: &str, body: &Value) -> Vec<Value> {
        let mut stream = self.stream(path, body);
        assert_eq!(stream.status, 200);
        let mut chunks = Vec::new();
        loop {
            match stream.next().expect("a stream ends with [DONE]").as_str() {
                "data: [DONE]" => break,
                line => chunks.push(parse_data(line)),
            }
        }
        assert_eq!(stream.next(), None, "nothing comes after [DONE]");
        chunks
    }
}

pub(crate) const JSON: &str = "content-type: application/json\r\n";

pub(crate) fn message(method: &str, path: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n{headers}content-length: {}\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

pub(crate) fn parse_data(line: &str) -> Value {
    let json = line.strip_prefix("data: ").unwrap_or_else(|| panic!("not a data line: {line}"));
    serde_json::from_str(json).unwrap()
}

/// What the servers of all tests say, from the first time on that a test wants to know: a JSON object per line.
static LOG: Mutex<String> = Mutex::new(String::new());

pub(crate) fn keep_log() {
    struct Writer;
    impl Write for Writer {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            LOG.lock().unwrap().push_str(std::str::from_utf8(bytes).unwrap());
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    static BEGUN: Once = Once::new();
    BEGUN.call_once(|| tracing_subscriber::fmt().json().with_writer(|| Writer).init());
}

/// Waits for a line, and returns its fields.
pub(crate) fn logged(wanted: impl Fn(&Value) -> bool) -> Value {
    let start = std::time::Instant::now();
    loop {
        let log = LOG.lock().unwrap().clone();
        let mut lines = log.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["fields"].take());
        if let Some(line) = lines.find(|line| wanted(line)) {
            return line;
        }
        assert!(start.elapsed() < TIMEOUT, "{log}");
        std::thread::yield_now();
    }
}

/// A whole response.
#[derive(Debug)]
pub(crate) struct Response {
    pub(crate) status: u16,
    headers: Vec<(String, String)>,
    pub(crate) body: String,
}

impl Response {
    fn read(mut reader: impl BufRead) -> Response {
        let (status, headers) = head(&mut reader);
        let mut response = Response { status, headers, body: String::new() };
        if response.header("transfer-encoding") == Some("chunked") {
            let mut body = Vec::new();
            while let Some(chunk) = chunk(&mut reader) {
                body.extend(chunk);
            }
            response.body = String::from_utf8(body).unwrap();
        } else {
            let len: usize = response.header("content-length").unwrap_or("0").parse().unwrap();
            let mut body = vec![0; len];
            reader.read_exact(&mut body).unwrap();
            response.body = String::from_utf8(body).unwrap();
        }
        response
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        find(&self.headers, name)
    }

    /// The body of a success.
    pub(crate) fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.body);
        self.json()
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {:?}", self.body))
    }

    /// Status, type and param of an error; checks the shape that all errors have.
    pub(crate) fn error(&self) -> (u16, String, Option<String>, String) {
        let json = self.json();
        let error = json["error"].as_object().unwrap_or_else(|| panic!("no error: {json}"));
        let keys: Vec<&str> = error.keys().map(String::as_str).collect();
        assert_eq!(keys, ["message", "type", "param", "code"]);
        assert_eq!(error["code"], self.status);
        assert!(self.header("x-request-id").is_some());
        let text = |key: &str| error[key].as_str().map(str::to_owned);
        (self.status, text("type").unwrap(), text("param"), text("message").unwrap())
    }
}

/// A response that is read event by event.
pub(crate) struct Stream {
    pub(crate) status: u16,
    headers: Vec<(String, String)>,
    reader: BufReader<TcpStream>,
    pending: Vec<u8>,
    ended: bool,
}

impl Stream {
    pub(crate) fn new(stream: TcpStream) -> Stream {
        let mut reader = BufReader::new(stream);
        let (status, headers) = head(&mut reader);
        let mut stream = Stream { status, headers, reader, pending: Vec::new(), ended: false };
        if stream.header("transfer-encoding") != Some("chunked") {
            stream.reader.read_to_end(&mut stream.pending).unwrap();
            stream.ended = true;
        }
        stream
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        find(&self.headers, name)
    }

    /// The next event, without the blank line that ends it.
    pub(crate) fn next(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.pending.windows(2).position(|pair| pair == b"\n\n") {
                let rest = self.pending.split_off(end + 2);
                let mut event = std::mem::replace(&mut self.pending, rest);
                event.truncate(end);
                return Some(String::from_utf8(event).unwrap());
            }
            match chunk(&mut self.reader).filter(|_| !self.ended) {
                Some(chunk) => self.pending.extend(chunk),
                None => {
                    self.ended = true;
                    let rest = std::mem::take(&mut self.pending);
                    return (!rest.is_empty()).then(|| String::from_utf8(rest).unwrap());
                }
            }
        }
    }
}

fn find<'a>(headers: &'a [(String, String)], name: &str) -> Option<&'a str> {
    headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
}

fn head(reader: &mut impl BufRead) -> (u16, Vec<(String, String)>) {
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    let status = line.split(' ').nth(1).unwrap_or_else(|| panic!("no status: {line:?}")).parse().unwrap();
    let mut headers = Vec::new();
    loop {
        line.clear();
        reader.read_line(&mut line).unwrap();
        match line.trim_end().split_once(": ") {
            Some((name, value)) => headers.push((name.to_ascii_lowercase(), value.to_owned())),
            None => return (status, headers),
        }
    }
}

/// The next part of a chunked body.
fn chunk(reader: &mut impl BufRead) -> Option<Vec<u8>> {
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    let len = usize::from_str_radix(line.trim_end(), 16).ok()?;
    let mut data = vec![0; len + 2];
    reader.read_exact(&mut data).unwrap();
    data.truncate(len);
    (len > 0).then_some(data)
}
