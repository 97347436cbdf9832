//! Fetching from a small hub on loopback that can be told to misbehave.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use checkpoint::hub::{Error, Files, Hub, is_hub_name};
use sha2::{Digest, Sha256};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What the hub does to requests.
#[derive(Default)]
struct Behaviour {
    /// Breaks off each answer of a file after so many bytes; 0: never.
    cut: AtomicUsize,
    /// Refuses so many requests with this status first.
    refuse: Mutex<(usize, u16)>,
    ignore_range: AtomicBool,
    /// Sends files to another server.
    redirect: Mutex<Option<String>>,
    /// Bytes of files that were sent.
    sent: AtomicUsize,
    authorized: AtomicUsize,
}

struct Server {
    url: String,
    behaviour: Arc<Behaviour>,
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

fn contents() -> HashMap<String, Vec<u8>> {
    let weights: Vec<u8> =
        (0..200_000u32).flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    HashMap::from([
        ("config.json".to_owned(), b"{\"a\": 1}".to_vec()),
        ("tokenizer.json".to_owned(), b"{\"b\": 2}".to_vec()),
        ("model.safetensors".to_owned(), weights),
        ("fake_quant/scales.safetensors".to_owned(), b"scales".to_vec()),
        ("pytorch_model.bin".to_owned(), b"a pickle".to_vec()),
        ("original/model.safetensors".to_owned(), b"twice the same".to_vec()),
    ])
}

/// What `git hash-object` says of the small files.
fn git_digest(name: &str) -> &'static str {
    match name {
        "config.json" => "4a036f56bb619924ec4189bd84ed716c766971ae",
        "tokenizer.json" => "ff3420861b9adb318afe9f3fdabec320ac79c011",
        _ => COMMIT,
    }
}

/// The listing of these files.
fn listing(files: &HashMap<String, Vec<u8>>) -> serde_json::Value {
    let siblings: Vec<_> = files
        .iter()
        .map(|(name, bytes)| {
            let mut sibling = serde_json::json!({
                "rfilename": name, "size": bytes.len(), "blobId": git_digest(name),
            });
            if name.ends_with(".safetensors") {
                sibling["lfs"] = serde_json::json!({"sha256": hex(bytes), "size": bytes.len()});
            }
            sibling
        })
        .collect();
    serde_json::json!({"sha": COMMIT, "siblings": siblings})
}

fn serve(files: HashMap<String, Vec<u8>>, listing: &serde_json::Value) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let behaviour = Arc::new(Behaviour::default());
    let (shared, listing) = (Arc::clone(&behaviour), listing.to_string());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            // A client that goes away is part of the tests.
            let _ = answer(&stream.unwrap(), &files, &listing, &shared);
        }
    });
    Server { url, behaviour }
}

fn answer(
    mut stream: &TcpStream,
    files: &HashMap<String, Vec<u8>>,
    listing: &str,
    behaviour: &Behaviour,
) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut range = 0;
    loop {
        line.clear();
        reader.read_line(&mut line)?;
        let header = line.trim().to_lowercase();
        if header.is_empty() {
            break;
        }
        if let Some(value) = header.strip_prefix("range: bytes=") {
            range = value.trim_end_matches('-').parse().unwrap();
        }
        if header == "authorization: bearer secret" {
            behaviour.authorized.fetch_add(1, Ordering::SeqCst);
        }
    }
    let mut head = |status: &str, extra: &str, length: usize| {
        write!(stream, "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n{extra}\r\n")
    };
    {
        let mut refuse = behaviour.refuse.lock().unwrap();
        if refuse.0 > 0 {
            refuse.0 -= 1;
            return head(&format!("{} No", refuse.1), "", 0);
        }
    }
    let revision = path.strip_prefix("/api/models/owner/name/revision/");
    if revision.is_some_and(|revision| ["main?blobs=true", "refs%2Fpr%2F1?blobs=true"].contains(&revision)) {
        head("200 OK", "", listing.len())?;
        return stream.write_all(listing.as_bytes());
    }
    let name = path.strip_prefix(&format!("/owner/name/resolve/{COMMIT}/"));
    let name = name.map(decoded);
    let Some((name, bytes)) = name.and_then(|name| files.get_key_value(&name)) else {
        return head("404 Not Found", "", 0);
    };
    if let Some(other) = behaviour.redirect.lock().unwrap().as_ref() {
        return head("302 Found", &format!("Location: {other}/owner/name/resolve/{COMMIT}/{name}\r\n"), 0);
    }
    if behaviour.ignore_range.load(Ordering::SeqCst) {
        range = 0;
    }
    let rest = &bytes[range..];
    if range > 0 {
        let content = format!("Content-Range: bytes {range}-{}/{}\r\n", bytes.len() - 1, bytes.len());
        head("206 Partial Content", &content, rest.len())?;
    } else {
        head("200 OK", "", rest.len())?;
    }
    let cut = behaviour.cut.load(Ordering::SeqCst);
    let sent = if cut > 0 { rest.len().min(cut) } else { rest.len() };
    stream.write_all(&rest[..sent])?;
    behaviour.sent.fetch_add(sent, Ordering::SeqCst);
    Ok(())
}

/// A path without its percent signs.
fn decoded(path: &str) -> String {
    let mut parts = path.split('%');
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |path, part| {
        let (code, rest) = part.split_at(2);
        format!("{path}{}{rest}", char::from(u8::from_str_radix(code, 16).unwrap()))
    })
}

fn hub(server: &Server, cache: &Path) -> Hub {
    Hub {
        endpoint: server.url.clone(),
        token: Some("secret".to_owned()),
        cache: cache.to_owned(),
        offline: false,
        authorities: None,
    }
}

fn good() -> Server {
    let files = contents();
    let listing = listing(&files);
    serve(files, &listing)
}

fn fetch(hub: &Hub) -> Result<std::path::PathBuf, Error> {
    hub.fetch("owner/name", None, Files::Model, &mut |_| {})
}

#[test]
fn the_cache_is_laid_out_as_others_expect_and_serves_offline() {
    let (server, cache) = (good(), tempfile::tempdir().unwrap());
    let mut last = (0, 0);
    let snapshot = hub(&server, cache.path())
        .fetch("owner/name", None, Files::Model, &mut |p| {
            assert!(p.done >= last.0, "progress goes forward");
            last = (p.done, p.total);
        })
        .unwrap();
    assert_eq!(last.0, last.1);
    let folder = cache.path().join("models--owner--name");
    assert_eq!(snapshot, folder.join("snapshots").join(COMMIT));
    assert_eq!(std::fs::read_to_string(folder.join("refs/main")).unwrap(), COMMIT);
    for name in ["config.json", "model.safetensors", "fake_quant/scales.safetensors"] {
        assert_eq!(std::fs::read(snapshot.join(name)).unwrap(), contents()[name], "{name}");
        assert!(std::fs::read_link(snapshot.join(name)).unwrap().is_relative());
    }
    assert!(folder.join("blobs").join(hex(&contents()["model.safetensors"])).is_file());
    for name in ["pytorch_model.bin", "original"] {
        assert!(!snapshot.join(name).exists(), "{name}");
    }
    // A revision may have slashes.
    let request =
        hub(&server, cache.path()).fetch("owner/name", Some("refs/pr/1"), Files::Model, &mut |_| {});
    assert_eq!(request.unwrap(), snapshot);
    assert_eq!(std::fs::read_to_string(folder.join("refs/refs/pr/1")).unwrap(), COMMIT);
    // The second time nothing is sent or written, and offline nothing is asked.
    let sent = server.behaviour.sent.load(Ordering::SeqCst);
    let reference = || std::fs::metadata(folder.join("refs/main")).unwrap().ino();
    let written = reference();
    assert_eq!(fetch(&hub(&server, cache.path())).unwrap(), snapshot);
    assert_eq!(server.behaviour.sent.load(Ordering::SeqCst), sent);
    assert_eq!(reference(), written);
    let offline =
        Hub { endpoint: "http://127.0.0.1:1".to_owned(), offline: true, ..hub(&server, cache.path()) };
    assert_eq!(fetch(&offline).unwrap(), snapshot);
    // A hub that cannot be reached is as good as none.
    let unreachable = Hub { offline: false, ..offline };
    assert_eq!(fetch(&unreachable).unwrap(), snapshot);
    let empty = tempfile::tempdir().unwrap();
    let offline = Hub { cache: empty.path().to_owned(), offline: true, ..unreachable };
    assert!(matches!(fetch(&offline), Err(Error::NotCached { .. })));
}

#[test]
fn shards_without_an_index_are_a_model_offline_if_none_is_missing() {
    let mut files = contents();
    let weights = files.remove("model.safetensors").unwrap();
    for name in ["a-00001-of-00002.safetensors", "a-00002-of-00002.safetensors"] {
        files.insert(name.to_owned(), weights.clone());
    }
    let listing = listing(&files);
    let (server, cache) = (serve(files, &listing), tempfile::tempdir().unwrap());
    let snapshot = fetch(&hub(&server, cache.path())).unwrap();
    let offline = Hub { offline: true, ..hub(&server, cache.path()) };
    assert_eq!(fetch(&offline).unwrap(), snapshot);
    std::fs::remove_file(snapshot.join("a-00001-of-00002.safetensors")).unwrap();
    assert!(matches!(fetch(&offline), Err(Error::NotCached { .. })));
}

#[test]
fn a_tokenizer_comes_alone_and_is_no_model() {
    let (server, cache) = (good(), tempfile::tempdir().unwrap());
    let (model, listing_of) = (fetch, listing);
    let fetch = |hub: &Hub, files| hub.fetch("owner/name", None, files, &mut |_| {});
    let online = hub(&server, cache.path());
    let snapshot = fetch(&online, Files::Tokenizer).unwrap();
    let names: Vec<_> = std::fs::read_dir(&snapshot).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["tokenizer.json"]);
    let offline = Hub { offline: true, ..hub(&server, cache.path()) };
    assert_eq!(fetch(&offline, Files::Tokenizer).unwrap(), snapshot);
    assert!(matches!(fetch(&offline, Files::Model), Err(Error::NotCached { .. })));
    // The model's other files come to the same folder, later.
    assert_eq!(fetch(&online, Files::Model).unwrap(), snapshot);
    assert!(snapshot.join("model.safetensors").exists());

    let mut files = contents();
    files.remove("tokenizer.json");
    let listing = listing(&files);
    let (server, cache) = (serve(files, &listing), tempfile::tempdir().unwrap());
    let error = fetch(&hub(&server, cache.path()), Files::Tokenizer).unwrap_err().to_string();
    assert_eq!(
        error,
        "owner/name: expected tokenizer.json among its files on the hub, found none of that name"
    );
    for (name, found) in [("adapter_config.json", "an adapter"), ("model-Q4_K_M.gguf", "GGUF files")] {
        let files = HashMap::from([(name.to_owned(), b"{}".to_vec())]);
        let (server, cache) = (serve(files.clone(), &listing_of(&files)), tempfile::tempdir().unwrap());
        match model(&hub(&server, cache.path())) {
            Err(Error::Incomplete { expected: "config.json", found: there, .. }) => assert_eq!(there, found),
            other => panic!("{other:?}"),
        }
    }
}

/// A listing may have a model twice, and tensors that are no part of it.
#[test]
fn of_tensor_files_only_those_are_fetched_that_are_read() {
    const INDEX: &str = "model.safetensors.index.json";
    let fetched = |names: &[&str], indexed: &[&str]| {
        let mut files: HashMap<String, Vec<u8>> =
            names.iter().map(|name| ((*name).to_owned(), name.as_bytes().to_vec())).collect();
        files.insert("config.json".to_owned(), contents()["config.json"].clone());
        if !indexed.is_empty() {
            let map: HashMap<&str, &str> = indexed.iter().map(|name| (*name, *name)).collect();
            files.insert(INDEX.to_owned(), serde_json::json!({"weight_map": map}).to_string().into_bytes());
        }
        let mut listing = listing(&files);
        for sibling in listing["siblings"].as_array_mut().unwrap() {
            if sibling["rfilename"] == INDEX {
                sibling["lfs"] =
                    serde_json::json!({"sha256": hex(&files[INDEX]), "size": files[INDEX].len()});
            }
        }
        let (server, cache) = (serve(files, &listing), tempfile::tempdir().unwrap());
        let mut last = (0, 0);
        let snapshot = hub(&server, cache.path())
            .fetch("owner/name", None, Files::Model, &mut |p| last = (p.done, p.total))
            .unwrap();
        assert_eq!(last.0, last.1);
        let offline = Hub { offline: true, ..hub(&server, cache.path()) };
        assert_eq!(fetch(&offline).unwrap(), snapshot);
        let mut names: Vec<String> = std::fs::read_dir(&snapshot)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.ends_with(".safetensors"))
            .collect();
        names.sort_unstable();
        names
    };
    let (single, shards) = ("model.safetensors", ["a b.safetensors", "a#b?c%2e.safetensors"]);
    let all = [&[single, "consolidated.safetensors", "adapter_model.safetensors"][..], &shards].concat();
    assert_eq!(fetched(&all, &shards), shards);
    // An index of which files are missing is one that saving in one file left there.
    assert_eq!(fetched(&all, &[shards[0], "gone.safetensors"]), [single]);
    assert_eq!(fetched(&[single, "consolidated.safetensors"], &[]), [single]);
}

#[test]
fn a_redirect_may_be_relative() {
    let (server, other, cache) = (good(), good(), tempfile::tempdir().unwrap());
    let host = other.url.strip_prefix("http:").unwrap();
    *server.behaviour.redirect.lock().unwrap() = Some(host.to_owned());
    fetch(&hub(&server, cache.path())).unwrap();
    assert_eq!(other.behaviour.authorized.load(Ordering::SeqCst), 0);
    assert!(other.behaviour.sent.load(Ordering::SeqCst) > 0);
}

#[test]
fn what_cannot_be_sent_or_trusted_is_named() {
    let (server, cache) = (good(), tempfile::tempdir().unwrap());
    let split = Hub { token: Some("two\nlines".to_owned()), ..hub(&server, cache.path()) };
    assert!(matches!(fetch(&split), Err(Error::Token)));
    let none = cache.path().join("authorities.pem");
    std::fs::write(&none, "no certificate").unwrap();
    let untrusting = Hub { authorities: Some(none.clone()), ..hub(&server, cache.path()) };
    let error = fetch(&untrusting).unwrap_err().to_string();
    assert!(error.contains("authorities.pem: expected certificates in PEM"), "{error}");
}

#[test]
fn broken_connections_are_continued_and_no_byte_is_sent_twice() {
    let (server, cache) = (good(), tempfile::tempdir().unwrap());
    server.behaviour.cut.store(130_001, Ordering::SeqCst);
    *server.behaviour.refuse.lock().unwrap() = (2, 503);
    let snapshot = fetch(&hub(&server, cache.path())).unwrap();
    assert_eq!(std::fs::read(snapshot.join("model.safetensors")).unwrap(), contents()["model.safetensors"]);
    let wanted: usize =
        ["config.json", "tokenizer.json", "model.safetensors", "fake_quant/scales.safetensors"]
            .iter()
            .map(|name| contents()[*name].len())
            .sum();
    assert_eq!(server.behaviour.sent.load(Ordering::SeqCst), wanted);
}

#[test]
fn a_rest_of_an_earlier_run_is_continued_or_begun_anew() {
    let weights = contents()["model.safetensors"].clone();
    for (ignore_range, expected) in [(false, weights.len() - 300_000), (true, weights.len())] {
        let (server, cache) = (good(), tempfile::tempdir().unwrap());
        let blobs = cache.path().join("models--owner--name/blobs");
        std::fs::create_dir_all(&blobs).unwrap();
        std::fs::write(blobs.join(format!("{}.incomplete", hex(&weights))), &weights[..300_000]).unwrap();
        server.behaviour.ignore_range.store(ignore_range, Ordering::SeqCst);
        let snapshot = fetch(&hub(&server, cache.path())).unwrap();
        assert_eq!(std::fs::read(snapshot.join("model.safetensors")).unwrap(), weights);
        let small: usize = ["config.json", "tokenizer.json", "fake_quant/scales.safetensors"]
            .iter()
            .map(|name| contents()[*name].len())
            .sum();
        assert_eq!(server.behaviour.sent.load(Ordering::SeqCst), expected + small);
    }
}

#[test]
fn damaged_files_are_deleted_and_named() {
    let files = contents();
    let lie = |name: &str, change: &dyn Fn(&mut serde_json::Value)| {
        let mut listing = listing(&files);
        for sibling in listing["siblings"].as_array_mut().unwrap() {
            if sibling["rfilename"] == name {
                change(sibling);
            }
        }
        let (server, cache) = (serve(files.clone(), &listing), tempfile::tempdir().unwrap());
        let error = fetch(&hub(&server, cache.path())).unwrap_err();
        let left = std::fs::read_dir(cache.path().join("models--owner--name/blobs")).unwrap();
        let left: Vec<_> = left.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        assert!(!left.iter().any(|name| name.ends_with(".incomplete")), "{left:?}");
        error.to_string()
    };
    let wrong_digest = lie("model.safetensors", &|s| s["lfs"]["sha256"] = hex(b"other").into());
    assert!(
        wrong_digest.contains("model.safetensors") && wrong_digest.contains(&hex(b"other")),
        "{wrong_digest}"
    );
    let other = "89e6c98d92887913cadf06b2adb97f26cde4849b";
    let wrong_digest = lie("config.json", &|s| s["blobId"] = other.into());
    let expected =
        format!("config.json: expected the git digest {other}, found {}", git_digest("config.json"));
    assert_eq!(wrong_digest, expected);
    let too_long = lie("model.safetensors", &|s| s["lfs"]["size"] = 1000.into());
    assert!(too_long.contains("expected 1000 bytes"), "{too_long}");
}

#[test]
fn redirects_do_not_carry_the_token() {
    let (server, other, cache) = (good(), good(), tempfile::tempdir().unwrap());
    *server.behaviour.redirect.lock().unwrap() = Some(other.url.clone());
    fetch(&hub(&server, cache.path())).unwrap();
    assert!(server.behaviour.authorized.load(Ordering::SeqCst) > 0);
    assert_eq!(other.behaviour.authorized.load(Ordering::SeqCst), 0);
    assert!(other.behaviour.sent.load(Ordering::SeqCst) > 0);
    // In circles there is an end.
    *other.behaviour.redirect.lock().unwrap() = Some(other.url.clone());
    let empty = tempfile::tempdir().unwrap();
    assert!(matches!(fetch(&hub(&server, empty.path())), Err(Error::Answer { .. })));
}

#[test]
fn refusals_are_told_apart_and_never_show_the_token() {
    let cache = tempfile::tempdir().unwrap();
    for (status, refused) in [(401, true), (403, true), (410, true), (404, false)] {
        let server = good();
        *server.behaviour.refuse.lock().unwrap() = (1, status);
        let error = fetch(&hub(&server, cache.path())).unwrap_err();
        assert_eq!(matches!(error, Error::Refused { .. }), refused, "{error}");
        assert_eq!(matches!(error, Error::NotFound { .. }), !refused, "{error}");
        assert!(!format!("{error} {error:?} {:?}", hub(&server, cache.path())).contains("secret"));
    }
}

#[test]
fn hostile_listings_write_nothing_outside() {
    for name in
        ["../../evil.safetensors", "/etc/evil.safetensors", "fake_quant/../../../x", "a\\..\\x.safetensors"]
    {
        let mut files = contents();
        files.insert(name.to_owned(), b"evil".to_vec());
        let cache = tempfile::tempdir().unwrap();
        let server = serve(files.clone(), &listing(&files));
        match fetch(&hub(&server, &cache.path().join("deep/er"))) {
            Err(Error::Answer { message, .. }) => assert!(message.contains("leaves the folder"), "{message}"),
            // Or it is not a file that anybody wants.
            other => assert!(other.is_ok_and(|snapshot| !snapshot.join(name).exists()), "{name}"),
        }
        assert!(!cache.path().join("evil.safetensors").exists());
    }
    let files = contents();
    // Sizes whose sum would be no number.
    let mut endless = listing(&files);
    for sibling in endless["siblings"].as_array_mut().unwrap() {
        sibling["size"] = u64::MAX.into();
    }
    let (server, cache) = (serve(files.clone(), &endless), tempfile::tempdir().unwrap());
    match fetch(&hub(&server, cache.path())) {
        Err(Error::Answer { message, .. }) => assert!(message.contains("more than a file has"), "{message}"),
        other => panic!("{other:?}"),
    }
    for (key, value) in [("sha", "../../x"), ("sha", ""), ("siblings", "none")] {
        let mut listing = listing(&files);
        listing[key] = value.into();
        let (server, cache) = (serve(files.clone(), &listing), tempfile::tempdir().unwrap());
        assert!(matches!(fetch(&hub(&server, cache.path())), Err(Error::Answer { .. })), "{key}");
    }
}

#[test]
fn several_processes_share_one_download() {
    let (server, cache) = (good(), tempfile::tempdir().unwrap());
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| fetch(&hub(&server, cache.path())).unwrap());
        }
    });
    let wanted = contents()["model.safetensors"].len();
    assert!(server.behaviour.sent.load(Ordering::SeqCst) < 2 * wanted);
}

#[test]
fn names_of_models() {
    for name in ["openai/gpt-oss-20b", "a/b", "A_1/b.c"] {
        assert!(is_hub_name(name), "{name}");
    }
    for name in [
        "", "gpt-oss", "a/b/c", "../x", "./x", "/x", "a/", "-a/b", "a/b..c", "a/.b", "a b/c", "a/b--c",
        "a\\b/c",
    ] {
        assert!(!is_hub_name(name), "{name}");
    }
}
