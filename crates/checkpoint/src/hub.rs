//! Fetching a model by hub name into the standard Hugging Face cache, which other programs share.
//!
//! Files arrive as `blobs/<digest>.incomplete`, are continued where they broke off, checked, and only then get their final
//! name; `snapshots/<commit>/` links to them. Nothing here runs unless a command was given a hub name.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::Deserialize;
use sha1::Sha1;
use sha2::{Digest, Sha256};

use crate::reader::{INDEX, SINGLE};
use crate::unfinished::{hex, without_locks};

/// A hub and the cache of what came from it.
pub struct Hub {
    /// Such as `https://huggingface.co`.
    pub endpoint: String,
    /// Sent to the endpoint's host only.
    pub token: Option<String>,
    /// The folder that holds `models--owner--name`.
    pub cache: PathBuf,
    /// Never connect: take what the cache has.
    pub offline: bool,
    /// Certificate authorities in PEM, trusted in place of those that are built in.
    pub authorities: Option<PathBuf>,
}

/// Which files are fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Files {
    /// All that nibble reads of a model.
    Model,
    /// `tokenizer.json` alone.
    Tokenizer,
}

/// How far a fetch is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress<'a> {
    /// The file under way.
    pub file: &'a str,
    /// Bytes on disk, of all files.
    pub done: u64,
    /// Bytes of all files.
    pub total: u64,
}

/// Why a model cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The machine failed.
    #[error("{path}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The hub cannot be reached, or breaks off again and again.
    #[error("{url}: {message}")]
    Network {
        /// What was asked for.
        url: String,
        /// What happened.
        message: String,
    },
    /// The hub says no.
    #[error("{name}: the hub refuses it (status {status})")]
    Refused {
        /// The model.
        name: String,
        /// Of the fours, but for 404 and those that ask to try again.
        status: u16,
    },
    /// There is no such model or revision.
    #[error("{name}: the hub knows no such model with a revision {revision:?}")]
    NotFound {
        /// The model.
        name: String,
        /// The revision.
        revision: String,
    },
    /// It is not in the cache, and connections are off.
    #[error("{name}: not in the cache {cache}, and HF_HUB_OFFLINE is set")]
    NotCached {
        /// The model.
        name: String,
        /// The cache.
        cache: PathBuf,
    },
    /// What arrived is not what was announced; it was deleted.
    #[error("{file}: expected {expected}, found {found}")]
    Damaged {
        /// The file.
        file: String,
        /// Size or digest as announced.
        expected: String,
        /// What arrived.
        found: String,
    },
    /// It lacks a file that is needed.
    #[error("{name}: expected {expected} among its files on the hub, found {found}")]
    Incomplete {
        /// The model.
        name: String,
        /// The file.
        expected: &'static str,
        /// What is there in its place.
        found: &'static str,
    },
    /// The token cannot be sent.
    #[error(
        "the hub's token, of HF_TOKEN or the file `token` in HF_HOME: expected visible ASCII characters on one line, found others"
    )]
    Token,
    /// The hub's answer makes no sense.
    #[error("{name}: the hub's answer is not valid: {message}")]
    Answer {
        /// The model.
        name: String,
        /// What is wrong.
        message: String,
    },
}

/// Failed attempts without a single new byte after which a file is given up: half a minute of pauses.
const ATTEMPTS: u32 = 9;

/// Failed attempts after which a hub counts as out of reach: before the first file people wait.
const LISTING_ATTEMPTS: u32 = 4;

/// The longest time that is waited when the hub asks for none.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// A body that takes longer is cut off and continued: the bound on a connection that stalls.
const BODY_TIMEOUT: Duration = Duration::from_secs(300);

const REDIRECTS: usize = 5;

/// No file has more bytes.
const LARGEST_FILE: u64 = 1 << 42;

/// The longest time that is waited when the hub asks for some.
const LONGEST_WAIT: u64 = 60;

/// The largest listing that is read.
const LISTING_LIMIT: u64 = 32 << 20;

impl std::fmt::Debug for Hub {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let token = self.token.as_ref().map(|_| "…");
        f.debug_struct("Hub")
            .field("endpoint", &self.endpoint)
            .field("token", &token)
            .field("cache", &self.cache)
            .field("offline", &self.offline)
            .field("authorities", &self.authorities)
            .finish()
    }
}

/// Whether a text is a hub name, `owner/name`, by the hub's own rules.
pub fn is_hub_name(text: &str) -> bool {
    let part = |part: &str| {
        !part.is_empty()
            && part.len() <= 96
            && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
            && !part.starts_with(['.', '-'])
            && !part.ends_with(['.', '-'])
            && !part.contains("..")
            && !part.contains("--")
    };
    text.split_once('/').is_some_and(|(owner, name)| part(owner) && part(name))
}

impl Hub {
    /// The hub of the environment: `HF_ENDPOINT`, `HF_TOKEN` (or the token file), `HF_HUB_CACHE`, `HF_HOME`,
    /// `HF_HUB_OFFLINE`, and `SSL_CERT_FILE` or `REQUESTS_CA_BUNDLE`.
    pub fn from_env() -> Hub {
        let var = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        // Without HOME, as services have it, that of the user's entry in the system.
        let user = || std::env::home_dir().unwrap_or_default();
        // Where no shell has seen to `~`.
        let path = |name: &str| {
            let path = PathBuf::from(var(name)?);
            Some(path.strip_prefix("~").map(|rest| user().join(rest)).unwrap_or(path))
        };
        let home = path("HF_HOME").unwrap_or_else(|| {
            path("XDG_CACHE_HOME").unwrap_or_else(|| user().join(".cache")).join("huggingface")
        });
        let stored = || fs::read_to_string(home.join("token")).ok();
        let token = var("HF_TOKEN").or_else(stored).map(|t| t.trim().to_owned());
        let off = |value: &str| ["", "0", "false", "no", "off"].contains(&value.to_lowercase().as_str());
        Hub {
            endpoint: var("HF_ENDPOINT").map_or_else(
                || "https://huggingface.co".to_owned(),
                |url| url.trim_end_matches('/').to_owned(),
            ),
            token: token.filter(|t| !t.is_empty()),
            cache: path("HF_HUB_CACHE").unwrap_or_else(|| home.join("hub")),
            offline: var("HF_HUB_OFFLINE").is_some_and(|value| !off(&value)),
            authorities: path("SSL_CERT_FILE").or_else(|| path("REQUESTS_CA_BUNDLE")),
        }
    }

    /// Fetches files of a model and returns their folder. What is in the cache is not fetched again.
    ///
    /// # Errors
    /// See [`Error`]. A fetch that broke off is continued by the next one.
    pub fn fetch(
        &self,
        name: &str,
        revision: Option<&str>,
        files: Files,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<PathBuf, Error> {
        let revision = revision.unwrap_or("main");
        if !is_hub_name(name) || !is_plain_path(revision) {
            return Err(Error::NotFound { name: name.to_owned(), revision: revision.to_owned() });
        }
        let folder = self.cache.join(format!("models--{}", name.replace('/', "--")));
        if self.offline {
            return files
                .cached(&folder, revision)
                .ok_or_else(|| Error::NotCached { name: name.to_owned(), cache: self.cache.clone() });
        }
        let listing = match self.list(name, revision) {
            // Without a network a complete copy will do, as other programs have it.
            Err(Error::Network { url, message }) => {
                return files.cached(&folder, revision).ok_or(Error::Network { url, message });
            }
            other => other?,
        };
        let mut listed = listing.files(name, files)?;
        let snapshot = folder.join("snapshots").join(&listing.sha);
        let get = |file: &Remote, report: &mut dyn FnMut(u64)| {
            if snapshot.join(&file.name).exists() {
                return Ok(());
            }
            let blob = self.download(name, &listing.sha, file, &folder, report)?;
            link(&snapshot, &file.name, &blob)
        };
        // What it does not name nobody reads.
        if let Some(file) = listed.iter().find(|file| file.name == INDEX) {
            get(file, &mut |_| {})?;
        }
        keep_the_models(&mut listed, indexed(&snapshot));
        let total = listed.iter().map(|file| file.size).sum();
        let mut before = 0;
        for file in &listed {
            let report = &mut |done| progress(Progress { file: &file.name, done: before + done, total });
            get(file, report)?;
            report(file.size);
            before += file.size;
        }
        let reference = folder.join("refs").join(revision);
        // A complete cache may be one that nobody can write to.
        if fs::read_to_string(&reference).ok().as_deref().map(str::trim) != Some(listing.sha.as_str()) {
            replace(&reference, listing.sha.as_bytes())?;
        }
        Ok(snapshot)
    }

    fn list(&self, name: &str, revision: &str) -> Result<Listing, Error> {
        let revision_in_url = encoded(revision);
        let url = format!("{}/api/models/{name}/revision/{revision_in_url}?blobs=true", self.endpoint);
        let mut failures = 0;
        loop {
            match self.listing(name, revision, &url) {
                Ok(body) => {
                    return serde_json::from_slice(&body)
                        .map_err(|e| Error::Answer { name: name.to_owned(), message: e.to_string() });
                }
                Err(Failed { error: Error::Network { .. }, wait }) if failures < LISTING_ATTEMPTS => {
                    failures += 1;
                    std::thread::sleep(wait.max(pause(failures)));
                }
                Err(failed) => return Err(failed.error),
            }
        }
    }

    fn listing(&self, name: &str, revision: &str, url: &str) -> Result<Vec<u8>, Failed> {
        let answer = self.get(url, 0)?;
        check_status(&answer, name, revision, url)?;
        let mut body = Vec::new();
        let mut reader = answer.into_body().into_reader().take(LISTING_LIMIT);
        reader.read_to_end(&mut body).map_err(|e| network(url, e))?;
        Ok(body)
    }

    /// Fetches one file to `blobs/<digest>`.
    fn download(
        &self,
        name: &str,
        commit: &str,
        file: &Remote,
        folder: &Path,
        report: &mut dyn FnMut(u64),
    ) -> Result<PathBuf, Error> {
        let blobs = folder.join("blobs");
        fs::create_dir_all(&blobs).map_err(io(&blobs))?;
        let blob = blobs.join(&file.digest);
        let incomplete = blobs.join(format!("{}.incomplete", file.digest));
        // Of several processes one fetches; the others wait and find the file there.
        let lock = blobs.join(format!("{}.lock", file.digest));
        let lock_file = File::create(&lock).map_err(io(&lock))?;
        match lock_file.lock() {
            Err(error) if !without_locks(&error) => return Err(io(&lock)(error)),
            _ => {}
        }
        if blob.exists() {
            return Ok(blob);
        }
        let path: Vec<String> = file.name.split('/').map(encoded).collect();
        let url = format!("{}/{name}/resolve/{commit}/{}", self.endpoint, path.join("/"));
        let mut out = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .open(&incomplete)
            .map_err(io(&incomplete))?;
        let mut failures = 0;
        loop {
            let before = out.metadata().map_err(io(&incomplete))?.len();
            let result = self.transfer(name, commit, &url, file, &mut out, &incomplete, report);
            let after = out.metadata().map_err(io(&incomplete))?.len();
            let Failed { error, wait } = match result {
                Ok(()) if after >= file.size => break,
                Ok(()) => network(&url, "the connection breaks off again and again").into(),
                Err(failed) => failed,
            };
            match error {
                Error::Network { .. } if after > before => failures = 0,
                Error::Network { .. } if failures < ATTEMPTS => {
                    failures += 1;
                    std::thread::sleep(wait.max(pause(failures)));
                }
                error => return Err(error),
            }
        }
        check(file, &mut out, &incomplete).inspect_err(|_| {
            // It can never become right: the next call begins anew.
            let _ = fs::remove_file(&incomplete);
        })?;
        out.sync_all().map_err(io(&incomplete))?;
        fs::rename(&incomplete, &blob).map_err(io(&blob))?;
        Ok(blob)
    }

    /// Appends what is missing of a file, as far as the connection holds.
    #[expect(clippy::too_many_arguments, reason = "one transfer and where it goes")]
    fn transfer(
        &self,
        name: &str,
        commit: &str,
        url: &str,
        file: &Remote,
        out: &mut File,
        path: &Path,
        report: &mut dyn FnMut(u64),
    ) -> Result<(), Failed> {
        let mut done = out.metadata().map_err(io(path))?.len();
        if done >= file.size {
            return Ok(());
        }
        let answer = self.get(url, done)?;
        let status = answer.status().as_u16();
        check_status(&answer, name, commit, url)?;
        let range = answer.headers().get("content-range").and_then(|v| v.to_str().ok()).unwrap_or_default();
        if done > 0 && !(status == 206 && range.starts_with(&format!("bytes {done}-"))) {
            // The server sends it from the beginning, whatever was asked for.
            out.set_len(0).map_err(io(path))?;
            done = 0;
        }
        // One byte more than announced shows that it is too long.
        let mut body = answer.into_body().into_reader().take(file.size - done + 1);
        let mut buffer = vec![0; 256 << 10];
        loop {
            let read = body.read(&mut buffer).map_err(|e| network(url, e))?;
            if read == 0 {
                return Ok(());
            }
            out.write_all(&buffer[..read]).map_err(io(path))?;
            done += read as u64;
            report(done.min(file.size));
        }
    }

    /// A GET that follows redirects; the token goes to the endpoint's own host only.
    fn get(&self, url: &str, from: u64) -> Result<Answer, Error> {
        let config = ureq::Agent::config_builder()
            .timeout_connect(Some(Duration::from_secs(20)))
            .timeout_recv_response(Some(Duration::from_secs(60)))
            .timeout_recv_body(Some(BODY_TIMEOUT))
            .max_redirects(0)
            .max_redirects_will_error(false)
            .http_status_as_error(false)
            .user_agent(concat!("nibble/", env!("CARGO_PKG_VERSION")))
            .tls_config(ureq::tls::TlsConfig::builder().root_certs(self.roots()?).build())
            .build();
        let token = self.token.as_ref().map(|token| format!("Bearer {token}"));
        let token = token.map(ureq::http::HeaderValue::try_from).transpose().map_err(|_| Error::Token)?;
        let agent = ureq::Agent::new_with_config(config);
        let wrong = |message: &str| Error::Answer { name: url.to_owned(), message: message.to_owned() };
        let mut target = url.to_owned();
        for _ in 0..=REDIRECTS {
            let mut request = agent.get(&target);
            if let Some(token) = token.as_ref().filter(|_| origin(&target) == origin(&self.endpoint)) {
                request = request.header("Authorization", token);
            }
            if from > 0 {
                request = request.header("Range", format!("bytes={from}-"));
            }
            let proxy = || {
                let uri = target.parse().ok();
                let proxy =
                    agent.config().proxy().filter(|proxy| uri.is_some_and(|uri| !proxy.is_no_proxy(&uri)));
                proxy.map_or_else(String::new, |p| format!(", by the proxy {}:{}", p.host(), p.port()))
            };
            let answer = request.call().map_err(|error| network(url, format!("{error}{}", proxy())))?;
            if !answer.status().is_redirection() {
                return Ok(answer);
            }
            let location = answer.headers().get("location").and_then(|v| v.to_str().ok());
            target = redirected(&target, location.ok_or_else(|| wrong("a redirect without a location"))?);
        }
        Err(wrong(&format!("more than {REDIRECTS} redirects")))
    }

    /// The authorities whose certificates are trusted.
    fn roots(&self) -> Result<ureq::tls::RootCerts, Error> {
        let Some(path) = &self.authorities else { return Ok(ureq::tls::RootCerts::WebPki) };
        let pem = fs::read(path).map_err(io(path))?;
        let certificates: Vec<_> = ureq::tls::parse_pem(&pem)
            .filter_map(|item| match item {
                Ok(ureq::tls::PemItem::Certificate(certificate)) => Some(certificate),
                _ => None,
            })
            .collect();
        if certificates.is_empty() {
            let message = "expected certificates in PEM, found none";
            return Err(io(path)(std::io::Error::new(std::io::ErrorKind::InvalidData, message)));
        }
        Ok(ureq::tls::RootCerts::new_with_certs(&certificates))
    }
}

type Answer = ureq::http::Response<ureq::Body>;

/// Why an attempt failed.
struct Failed {
    error: Error,
    /// How long the hub asks to wait before the next one.
    wait: Duration,
}

impl From<Error> for Failed {
    fn from(error: Error) -> Failed {
        Failed { error, wait: Duration::ZERO }
    }
}

/// What the hub says is in a model.
#[derive(Deserialize)]
struct Listing {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    #[serde(rename = "blobId")]
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: String,
    size: u64,
}

/// A file to fetch.
struct Remote {
    name: String,
    size: u64,
    /// SHA-256 of large files, git's own of the others.
    digest: String,
    sha256: bool,
}

impl Listing {
    /// The wanted ones. Names and digests become paths: they are checked.
    fn files(&self, name: &str, wanted: Files) -> Result<Vec<Remote>, Error> {
        let wrong = |message: String| Error::Answer { name: name.to_owned(), message };
        let is_digest = |text: &str| text.len() >= 40 && text.chars().all(|c| c.is_ascii_hexdigit());
        if !is_digest(&self.sha) {
            return Err(wrong("the commit is not a digest".to_owned()));
        }
        let mut files = Vec::new();
        for sibling in self.siblings.iter().filter(|s| wanted.include(&s.rfilename)) {
            if !is_plain_path(&sibling.rfilename) {
                return Err(wrong(format!("the file name {:?} leaves the folder", sibling.rfilename)));
            }
            let (digest, size) = match (&sibling.lfs, &sibling.blob_id, sibling.size) {
                (Some(lfs), ..) => (&lfs.sha256, lfs.size),
                (None, Some(id), Some(size)) => (id, size),
                _ => return Err(wrong(format!("{}: no digest or size", sibling.rfilename))),
            };
            // So that sums of as many as a listing has are numbers.
            if size > LARGEST_FILE {
                return Err(wrong(format!("{}: {size} bytes are more than a file has", sibling.rfilename)));
            }
            if !is_digest(digest) {
                return Err(wrong(format!("{}: the digest is none", sibling.rfilename)));
            }
            let (name, digest) = (sibling.rfilename.clone(), digest.to_lowercase());
            files.push(Remote { name, size, digest, sha256: sibling.lfs.is_some() });
        }
        let expected = wanted.needed();
        if !files.iter().any(|file| file.name == expected) {
            let there = |test: &dyn Fn(&str) -> bool| self.siblings.iter().any(|s| test(&s.rfilename));
            let found = match wanted {
                Files::Model if there(&|name| name == "adapter_config.json") => "an adapter",
                Files::Model if there(&|name| name.ends_with(".gguf")) => "GGUF files",
                _ => "none of that name",
            };
            return Err(Error::Incomplete { name: name.to_owned(), expected, found });
        }
        Ok(files)
    }
}

impl Files {
    /// Whether a file is one of them. Names that leave the folder are, and are refused later.
    fn include(self, name: &str) -> bool {
        const NAMES: [&str; 9] = [
            "config.json",
            "generation_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "chat_template.jinja",
            "hf_quant_config.json",
            "model.safetensors.index.json",
            // Names the licence.
            "README.md",
        ];
        let fake = name.strip_prefix("fake_quant/").is_some_and(|rest| !rest.contains('/'));
        match self {
            Files::Tokenizer => name == self.needed(),
            Files::Model => NAMES.contains(&name) || fake || is_weights(name) || name.contains(".."),
        }
    }

    /// The one without which the others are of no use.
    fn needed(self) -> &'static str {
        match self {
            Files::Model => "config.json",
            Files::Tokenizer => "tokenizer.json",
        }
    }

    /// A snapshot of the cache that has them all.
    fn cached(self, folder: &Path, revision: &str) -> Option<PathBuf> {
        let commit = fs::read_to_string(folder.join("refs").join(revision)).ok();
        let commit = commit.as_deref().map_or(revision, str::trim);
        let snapshot = folder.join("snapshots").join(commit);
        let complete =
            snapshot.join(self.needed()).exists() && (self == Files::Tokenizer || has_weights(&snapshot));
        (is_plain_path(commit) && complete).then_some(snapshot)
    }
}

fn is_weights(name: &str) -> bool {
    name.ends_with(".safetensors") && !name.contains('/')
}

/// Of a listing's tensor files leaves those that the reader takes: what the index names, if it is all there, else the one file
/// with everything, else all.
fn keep_the_models(listed: &mut Vec<Remote>, indexed: Option<BTreeSet<String>>) {
    let there: BTreeSet<&str> = listed.iter().map(|file| file.name.as_str()).collect();
    let whole = indexed.filter(|indexed| indexed.iter().all(|name| there.contains(name.as_str())));
    let single = || BTreeSet::from([SINGLE.to_owned()]);
    let taken = whole.or_else(|| there.contains(SINGLE).then(single));
    if let Some(taken) = taken {
        listed.retain(|file| !is_weights(&file.name) || taken.contains(&file.name));
    }
}

/// The tensor files that the index of a snapshot names; `None` without one that can be read.
fn indexed(snapshot: &Path) -> Option<BTreeSet<String>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let index = fs::read(snapshot.join(INDEX)).ok()?;
    Some(serde_json::from_slice::<Index>(&index).ok()?.weight_map.into_values().collect())
}

/// Whether the weights of a snapshot are all there.
fn has_weights(snapshot: &Path) -> bool {
    let single = || snapshot.join(SINGLE).exists();
    match indexed(snapshot) {
        Some(names) => {
            single() || names.iter().all(|file| is_plain_path(file) && snapshot.join(file).exists())
        }
        None if snapshot.join(INDEX).exists() => false,
        None => single() || has_shards(snapshot),
    }
}

/// Whether there are tensor files without an index, as many as their names say.
fn has_shards(snapshot: &Path) -> bool {
    let entries = fs::read_dir(snapshot).into_iter().flatten().flatten();
    let names: Vec<String> = entries
        .filter(|entry| entry.path().exists())
        .filter_map(|entry| {
            entry.file_name().into_string().ok()?.strip_suffix(".safetensors").map(str::to_owned)
        })
        .collect();
    let shards = |name: &String| name.rsplit_once("-of-").and_then(|(_, shards)| shards.parse().ok());
    !names.is_empty() && names.iter().all(|name| names.len() >= shards(name).unwrap_or(1))
}

/// A text as one segment of a URL's path.
fn encoded(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    text.bytes()
        .map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}

/// A relative path that stays below its folder.
fn is_plain_path(text: &str) -> bool {
    !text.is_empty()
        && !text.contains(['\\', '\0', ':'])
        && !text.chars().any(char::is_control)
        && Path::new(text).components().all(|part| matches!(part, Component::Normal(_)))
        && text.split('/').all(|part| !part.is_empty() && part != ".")
}

fn check(file: &Remote, out: &mut File, path: &Path) -> Result<(), Error> {
    let damaged =
        |expected: String, found: String| Err(Error::Damaged { file: file.name.clone(), expected, found });
    let size = out.metadata().map_err(io(path))?.len();
    if size != file.size {
        return damaged(format!("{} bytes", file.size), format!("at least {size} bytes"));
    }
    let (kind, found) = if file.sha256 {
        ("SHA-256", digest(Sha256::new(), out, path)?)
    } else {
        ("git", digest(Sha1::new_with_prefix(format!("blob {size}\0")), out, path)?)
    };
    if found == file.digest { Ok(()) } else { damaged(format!("the {kind} digest {}", file.digest), found) }
}

/// The digest of all of a file, behind what `hasher` has had.
fn digest(mut hasher: impl Digest, file: &mut File, path: &Path) -> Result<String, Error> {
    file.rewind().map_err(io(path))?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).map_err(io(path))? {
            0 => return Ok(hex(&hasher.finalize())),
            read => hasher.update(&buffer[..read]),
        }
    }
}

/// `snapshots/<commit>/<file>` as a relative link to the blob, as other programs make it.
fn link(snapshot: &Path, name: &str, blob: &Path) -> Result<(), Error> {
    let link = snapshot.join(name);
    let parent = link.parent().unwrap_or(snapshot);
    fs::create_dir_all(parent).map_err(io(parent))?;
    let digest = blob.file_name().unwrap_or_default();
    let target = "../".repeat(2 + name.matches('/').count());
    let target = Path::new(&target).join("blobs").join(digest);
    let temporary = temporary(&link);
    #[cfg(unix)]
    std::os::unix::fs::symlink(&target, &temporary).map_err(io(&temporary))?;
    #[cfg(not(unix))]
    fs::copy(blob, &temporary).map_err(io(&temporary))?;
    fs::rename(&temporary, &link).map_err(io(&link))
}

/// Writes a small file so that readers see the old or the new one.
fn replace(path: &Path, contents: &[u8]) -> Result<(), Error> {
    let parent = path.parent().unwrap_or(path);
    fs::create_dir_all(parent).map_err(io(parent))?;
    let temporary = temporary(path);
    fs::write(&temporary, contents).map_err(io(&temporary))?;
    fs::rename(&temporary, path).map_err(io(path))
}

/// A name beside `path` that no other thread or process uses.
fn temporary(path: &Path) -> PathBuf {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}-{}.tmp", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed)));
    path.with_file_name(name)
}

fn check_status(answer: &Answer, name: &str, revision: &str, url: &str) -> Result<(), Failed> {
    let status = answer.status().as_u16();
    match status {
        200 | 206 => Ok(()),
        404 => Err(Error::NotFound { name: name.to_owned(), revision: revision.to_owned() }.into()),
        429 => {
            let wait = answer.headers().get("retry-after").and_then(|v| v.to_str().ok());
            Err(Failed { error: network(url, "status 429"), wait: asked_for(wait.unwrap_or_default()) })
        }
        400..500 if status != 408 => Err(Error::Refused { name: name.to_owned(), status }.into()),
        other => Err(network(url, format!("status {other}")).into()),
    }
}

/// Scheme, host and port of a URL.
fn origin(url: &str) -> &str {
    let host = url.find("://").map_or(0, |at| at + 3);
    let end = url[host..].find(['/', '?', '#']).map_or(url.len(), |at| host + at);
    &url[..end]
}

/// Where a redirect leads from `url`: to an address, another one of the same scheme or host, or one beside it.
fn redirected(url: &str, location: &str) -> String {
    let origin = origin(url);
    let is_scheme = |text: &str| text.chars().all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c));
    if location.split_once("://").is_some_and(|(scheme, _)| is_scheme(scheme)) {
        location.to_owned()
    } else if location.starts_with("//") {
        format!("{}:{location}", origin.split(':').next().unwrap_or_default())
    } else if location.starts_with('/') {
        format!("{origin}{location}")
    } else {
        let path = url[origin.len()..].split(['?', '#']).next().unwrap_or_default();
        let folder = path.rfind('/').map_or("/", |end| &path[..=end]);
        format!("{origin}{folder}{location}")
    }
}

/// What `Retry-After` asks for, in seconds; a date, which the hub does not write, for no more than the usual pause.
fn asked_for(retry_after: &str) -> Duration {
    Duration::from_secs(retry_after.trim().parse().unwrap_or(0).min(LONGEST_WAIT))
}

/// Doubles from a tenth of a second.
fn pause(failures: u32) -> Duration {
    Duration::from_millis(50 << failures.min(8)).min(LONGEST_PAUSE)
}

fn network(url: &str, message: impl std::fmt::Display) -> Error {
    Error::Network { url: url.to_owned(), message: message.to_string() }
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Error + '_ {
    |source| Error::Io { path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_that_the_hub_asks_for_are_bounded() {
        for (header, seconds) in [("7", 7), (" 60 ", 60), ("3600", 60), ("", 0), ("-1", 0), ("soon", 0)] {
            assert_eq!(asked_for(header), Duration::from_secs(seconds), "{header}");
        }
        let answer = ureq::http::Response::builder().status(429).header("retry-after", "7");
        let answer = answer.body(ureq::Body::builder().data("")).unwrap();
        let failed = check_status(&answer, "owner/name", "main", "http://hub/").unwrap_err();
        assert!(matches!(failed.error, Error::Network { .. }) && failed.wait == Duration::from_secs(7));
    }
}
