//! Reading a tokenizer: the built-in vocabulary, Hugging Face's `tokenizer.json`, tiktoken's file.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use base64::Engine;
use serde::Deserialize;

use crate::merge::{MAX_RANK, Merges};
use crate::pieces::PATTERN;
use crate::tokenizer::{Spellings, Tokenizer};
use crate::vocabulary::Vocabulary;

/// What is wrong with a tokenizer file.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be read.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is not JSON of the expected form.
    #[error("the tokenizer file is not valid: {0}")]
    Json(#[from] serde_json::Error),
    /// It means something that this crate does not do.
    #[error("the tokenizer file has {what}: expected {expected}, found {found}")]
    Unsupported {
        /// Which part.
        what: &'static str,
        /// What is known.
        expected: String,
        /// What is there.
        found: String,
    },
    /// It is larger than any known file, or than what `Tokenizer` can be sure to handle in linear time.
    #[error("the tokenizer file has {what}: expected at most {limit}, found {found}")]
    TooLarge {
        /// Which part.
        what: String,
        /// The most that is read.
        limit: u64,
        /// How much there is.
        found: u64,
    },
    /// A file could be read, but is not a tokenizer.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Box<Error>,
    },
    /// It contradicts itself.
    #[error("the tokenizer file is not valid: {0}")]
    Invalid(String),
}

/// Ids above this are a mistake or an attack: the largest known vocabulary has 201,088.
const MAX_ID: u32 = 10_000_000;

/// Bytes. The published `tokenizer.json` of gpt-oss has 27 million.
const MAX_FILE: u64 = 256 << 20;

/// Bytes of a token or a special token's spelling; the longest known one has 128. Windows of a long piece and the search
/// for spellings advance because tokens are short.
const MAX_TOKEN: usize = 512;

/// The ids of `o200k_harmony`.
const O200K_SIZE: u32 = 201_088;

/// The named special tokens; every other id from 199,998 on is `<|reserved_ID|>`. That includes 200018, which
/// openai-harmony knows only as reserved, while tiktoken and published `tokenizer.json` files call it `<|endofprompt|>`.
const O200K_SPECIAL: [(u32, &str); 9] = [
    (199_998, "<|startoftext|>"),
    (199_999, "<|endoftext|>"),
    (200_002, "<|return|>"),
    (200_003, "<|constrain|>"),
    (200_005, "<|channel|>"),
    (200_006, "<|start|>"),
    (200_007, "<|end|>"),
    (200_008, "<|message|>"),
    (200_012, "<|call|>"),
];

impl Tokenizer {
    /// The built-in `o200k_harmony`, unpacked once.
    pub fn o200k_harmony() -> Arc<Tokenizer> {
        static BUILT_IN: OnceLock<Arc<Tokenizer>> = OnceLock::new();
        Arc::clone(BUILT_IN.get_or_init(|| {
            let mut packed = Vec::new();
            let mut decoder = flate2::read::ZlibDecoder::new(&include_bytes!("../data/o200k.bin")[..]);
            decoder.read_to_end(&mut packed).expect("the built-in vocabulary is whole");
            let mut tokens = Vec::with_capacity(199_998);
            let mut rest = &packed[..];
            while let [len, after @ ..] = rest {
                let (token, after) = after.split_at(usize::from(*len));
                tokens.push(token);
                rest = after;
            }
            Arc::new(from_ranks(&tokens).expect("the built-in vocabulary is valid"))
        }))
    }

    /// Reads `tokenizer.json` or a tiktoken file, told apart by content.
    pub fn from_file(path: &Path) -> Result<Tokenizer, Error> {
        let io = |source| Error::Io { path: path.to_owned(), source };
        // Asked by name, since opening a pipe waits for its writer.
        if !std::fs::metadata(path).map_err(io)?.is_file() {
            let source = Error::Invalid("expected a regular file, found something else".to_owned());
            return Err(Error::File { path: path.to_owned(), source: Box::new(source) });
        }
        let mut bytes = Vec::new();
        std::fs::File::open(path)
            .and_then(|file| file.take(MAX_FILE + 1).read_to_end(&mut bytes))
            .map_err(io)?;
        // As some editors begin a file.
        let bytes = bytes.strip_prefix("\u{feff}".as_bytes()).unwrap_or(&bytes);
        let read = match bytes.iter().find(|b| !b.is_ascii_whitespace()) {
            _ if bytes.starts_with(b"version https://git-lfs") => Err(Error::Invalid(
                "expected a vocabulary, found a pointer of Git LFS, which `git lfs pull` replaces by the file".to_owned(),
            )),
            _ if bytes.len() as u64 > MAX_FILE => Err(Error::TooLarge {
                what: "too many bytes".to_owned(),
                limit: MAX_FILE,
                found: bytes.len() as u64,
            }),
            Some(b'{') => Tokenizer::from_json(bytes),
            _ => Tokenizer::from_tiktoken(bytes),
        };
        read.map_err(|source| Error::File { path: path.to_owned(), source: Box::new(source) })
    }

    /// From the text of a tiktoken file, `base64 SPACE rank` per line; the special tokens are those of `o200k_harmony`.
    pub fn from_tiktoken(bytes: &[u8]) -> Result<Tokenizer, Error> {
        let text = std::str::from_utf8(bytes).map_err(|e| Error::Invalid(e.to_string()))?;
        let mut tokens = Vec::new();
        for (i, line) in text.lines().filter(|l| !l.is_empty()).enumerate() {
            let parsed = line.split_once(' ').and_then(|(token, rank)| {
                let token = base64::prelude::BASE64_STANDARD.decode(token).ok()?;
                (rank.trim().parse() == Ok(i) && !token.is_empty()).then_some(token)
            });
            tokens.push(parsed.ok_or_else(|| {
                Error::Invalid(format!("line {}: expected a token in base64, a space and {i}", i + 1))
            })?);
        }
        from_ranks(&tokens)
    }

    /// From the text of Hugging Face's `tokenizer.json`.
    pub fn from_json(bytes: &[u8]) -> Result<Tokenizer, Error> {
        let file: File = serde_json::from_slice(bytes)?;
        file.check()?;
        let (vocab, merges) = (file.model.vocab.0, file.model.merges);

        let mut special: BTreeMap<u32, String> = BTreeMap::new();
        let mut text = HashSet::new();
        for token in file.added_tokens {
            // What is a control token of the model is none of a text, whatever the file says.
            if token.special == Some(false) && O200K_SPECIAL.iter().all(|(_, name)| *name != token.content) {
                text.insert(token.id);
            }
            if let Some(other) = special.get(&token.id) {
                return Err(Error::Invalid(format!(
                    "the added tokens {other:?} and {:?} have the same id: {}",
                    token.content, token.id
                )));
            }
            special.insert(token.id, token.content);
        }
        // Files may list the special tokens in both places.
        let ordinary = || vocab.iter().filter(|(spelling, id)| special.get(id) != Some(spelling));
        let size = ordinary().map(|&(_, id)| id as usize + 1).max().unwrap_or(0);
        check_id(size.max(special.keys().next_back().map_or(0, |&id| id as usize + 1)))?;
        // So the file's own length bounds what is allocated.
        if size > vocab.len() + special.len() {
            return Err(Error::Invalid(format!(
                "expected a token for each id below {size}, found {} tokens",
                vocab.len() + special.len()
            )));
        }
        let mut tokens = vec![Vec::new(); size];
        for (spelling, id) in ordinary() {
            let token = &mut tokens[*id as usize];
            if special.contains_key(id) || !token.is_empty() {
                return Err(Error::Invalid(format!("two tokens have the id {id}")));
            }
            *token = byte_level(spelling).filter(|bytes| !bytes.is_empty()).ok_or_else(|| {
                Error::Invalid(format!("token {id}: {spelling:?} is not in the byte-level alphabet"))
            })?;
        }
        if let Some(id) =
            (0u32..).zip(&tokens).find(|(id, token)| token.is_empty() && !special.contains_key(id))
        {
            return Err(Error::Invalid(format!("no token has the id {}", id.0)));
        }
        let vocabulary = vocabulary(&tokens)?;
        let merges = read_merges(&vocabulary, &merges)?;
        build(vocabulary, merges, file.model.ignore_merges, special.into_iter().collect(), &text)
    }
}

/// `size` is one more than the largest id.
fn check_id(size: usize) -> Result<(), Error> {
    if size > MAX_ID as usize + 1 {
        return Err(Error::TooLarge {
            what: "an id too large".to_owned(),
            limit: MAX_ID.into(),
            found: size as u64 - 1,
        });
    }
    Ok(())
}

fn vocabulary(tokens: &[impl AsRef<[u8]>]) -> Result<Vocabulary, Error> {
    check_id(tokens.len())?;
    if let Some((id, token)) = tokens.iter().enumerate().find(|(_, token)| token.as_ref().len() > MAX_TOKEN) {
        return Err(Error::TooLarge {
            what: format!("too many bytes in token {id}"),
            limit: MAX_TOKEN as u64,
            found: token.as_ref().len() as u64,
        });
    }
    Vocabulary::new(tokens).ok_or_else(|| Error::Invalid("two tokens have the same bytes".to_owned()))
}

/// The merge list of a `tokenizer.json`, replaced by the ids themselves if they say the same: the list has every pair of
/// tokens that makes a token, in the order of what they make.
fn read_merges(vocabulary: &Vocabulary, merges: &[Merge]) -> Result<Merges, Error> {
    if merges.len() >= MAX_RANK as usize {
        return Err(Error::TooLarge {
            what: "too many merges".to_owned(),
            limit: u64::from(MAX_RANK) - 1,
            found: merges.len() as u64,
        });
    }
    let mut listed = HashMap::with_capacity(merges.len());
    let mut ordered = true;
    let mut last = 0;
    for (rank, merge) in (0u32..).zip(merges) {
        let (left, right) = merge.pair().ok_or_else(|| {
            Error::Invalid(format!("merge {rank}: expected two tokens separated by a space"))
        })?;
        let id = |token: &str| {
            byte_level(token)
                .and_then(|bytes| vocabulary.id(&bytes))
                .ok_or_else(|| Error::Invalid(format!("merge {rank}: {token:?} is not in the vocabulary")))
        };
        let product = id(&format!("{left}{right}"))?;
        ordered &= product >= last;
        last = product;
        listed.entry((id(left)?, id(right)?)).or_insert((rank, product));
    }
    let splits = |id: u32| {
        let token = vocabulary.token(id);
        (1..token.len()).filter(|&at| {
            let (left, right) = token.split_at(at);
            vocabulary.id(left).is_some() && vocabulary.id(right).is_some()
        })
    };
    let complete =
        || (0..vocabulary.len() as u32).map(|id| splits(id).count()).sum::<usize>() == listed.len();
    Ok(if ordered && complete() { Merges::ByRank } else { Merges::Listed(listed) })
}

fn from_ranks(tokens: &[impl AsRef<[u8]>]) -> Result<Tokenizer, Error> {
    let first_special = O200K_SPECIAL[0].0;
    // The ids of the special tokens follow, so one that was cut off would be another vocabulary.
    if tokens.len() != first_special as usize {
        return Err(Error::Invalid(format!("expected {first_special} tokens, found {}", tokens.len())));
    }
    let vocabulary = vocabulary(tokens)?;
    let mut special: Vec<(u32, String)> =
        O200K_SPECIAL.iter().map(|&(id, spelling)| (id, spelling.to_owned())).collect();
    special.extend(
        (first_special..O200K_SIZE)
            .filter(|id| O200K_SPECIAL.iter().all(|(named, _)| named != id))
            .map(|id| (id, format!("<|reserved_{id}|>"))),
    );
    build(vocabulary, Merges::ByRank, true, special, &HashSet::new())
}

/// `text` are those of the added tokens that are no special ones.
fn build(
    vocabulary: Vocabulary,
    merges: Merges,
    whole_pieces: bool,
    added_tokens: Vec<(u32, String)>,
    text: &HashSet<u32>,
) -> Result<Tokenizer, Error> {
    let mut bytes = [0; 256];
    for (byte, id) in (0u8..=255).zip(&mut bytes) {
        *id = vocabulary
            .id(&[byte])
            .ok_or_else(|| Error::Invalid(format!("the single byte {byte:#04x} is not in the vocabulary")))?;
    }
    let mut size = vocabulary.len();
    for (id, spelling) in &added_tokens {
        if spelling.is_empty() {
            return Err(Error::Invalid(format!("the added token {id} has no spelling")));
        }
        if spelling.len() > MAX_TOKEN {
            return Err(Error::TooLarge {
                what: format!("too many bytes in the added token {id}"),
                limit: MAX_TOKEN as u64,
                found: spelling.len() as u64,
            });
        }
        size = size.max(*id as usize + 1);
    }
    let spellings = |tokens: &[(u32, String)]| {
        Spellings::new(tokens)
            .map_err(|twice| Error::Invalid(format!("two added tokens are spelled {twice:?}")))
    };
    let all = spellings(&added_tokens)?;
    let (added, special): (Vec<_>, Vec<_>) = added_tokens.into_iter().partition(|(id, _)| text.contains(id));
    Ok(Tokenizer {
        vocabulary,
        merges,
        whole_pieces,
        bytes,
        spellings: all,
        added_spellings: spellings(&added)?,
        special: special.into_iter().collect(),
        added: added.into_iter().collect(),
        size,
    })
}

/// Undoes the byte-level alphabet: printable Latin-1 stands for itself, the other 68 bytes are U+0100 and up in order.
fn byte_level(spelling: &str) -> Option<Vec<u8>> {
    static ALPHABET: OnceLock<HashMap<char, u8>> = OnceLock::new();
    let alphabet = ALPHABET.get_or_init(|| {
        let printable = |b: &u8| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
        let others = (0..=255u8).filter(|b| !printable(b));
        let named = (0..=255u8).filter(printable).map(|b| (char::from(b), b));
        named.chain(('\u{100}'..).zip(others)).collect()
    });
    spelling.chars().map(|c| alphabet.get(&c).copied()).collect()
}

#[derive(Deserialize)]
struct File {
    model: Model,
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    normalizer: Option<serde_json::Value>,
    pre_tokenizer: Option<PreTokenizer>,
}

#[derive(Deserialize)]
struct Model {
    #[serde(rename = "type")]
    kind: Option<String>,
    vocab: Vocab,
    #[serde(default)]
    merges: Vec<Merge>,
    #[serde(default)]
    ignore_merges: bool,
    dropout: Option<f32>,
    #[serde(default)]
    byte_fallback: bool,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
}

/// Spellings and ids as the file has them: a map would hide that a spelling occurs twice.
struct Vocab(Vec<(String, u32)>);

impl<'de> Deserialize<'de> for Vocab {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vocab, D::Error> {
        struct Entries;
        impl<'de> serde::de::Visitor<'de> for Entries {
            type Value = Vocab;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object of tokens and their ids")
            }

            fn visit_map<M: serde::de::MapAccess<'de>>(self, mut map: M) -> Result<Vocab, M::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Vocab(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair([String; 2]),
    Joined(String),
}

impl Merge {
    fn pair(&self) -> Option<(&str, &str)> {
        match self {
            Merge::Pair([left, right]) => Some((left, right)),
            Merge::Joined(both) => both.split_once(' '),
        }
    }
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
    /// Of those that are no special ones text is made: they are found in what users write, and seen in answers.
    special: Option<bool>,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
}

#[derive(Deserialize)]
struct PreTokenizer {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    pretokenizers: Vec<PreTokenizer>,
    pattern: Option<Pattern>,
    behavior: Option<String>,
    #[serde(default)]
    invert: bool,
    #[serde(default)]
    add_prefix_space: bool,
    use_regex: Option<bool>,
}

#[derive(Deserialize)]
struct Pattern {
    #[serde(rename = "Regex")]
    regex: Option<String>,
}

impl File {
    /// Refuses everything but o200k's pre-tokenizer over plain byte-pair encoding.
    fn check(&self) -> Result<(), Error> {
        let unsupported = |what, expected: &str, found: String| {
            Err(Error::Unsupported { what, expected: expected.to_owned(), found })
        };
        if let Some(kind) = self.model.kind.as_ref().filter(|kind| *kind != "BPE") {
            return unsupported("a model of another type", "BPE", kind.clone());
        }
        if let Some(dropout) = self.model.dropout.filter(|&d| d > 0.0) {
            return unsupported("merges left out at random", "no dropout", dropout.to_string());
        }
        if self.model.byte_fallback {
            return unsupported("byte fallback", "false", "true".to_owned());
        }
        let affixes = [&self.model.continuing_subword_prefix, &self.model.end_of_word_suffix];
        if let Some(affix) = affixes.into_iter().flatten().find(|affix| !affix.is_empty()) {
            return unsupported("a prefix or suffix of subwords", "none", format!("{affix:?}"));
        }
        if let Some(token) = self.added_tokens.iter().find(|t| t.single_word || t.lstrip || t.rstrip) {
            let found = format!(
                "{:?} with single_word {}, lstrip {}, rstrip {}",
                token.content, token.single_word, token.lstrip, token.rstrip
            );
            return unsupported("an added token that depends on its surroundings", "none", found);
        }
        // A sequence of none is none.
        let none = |n: &&serde_json::Value| {
            n.is_null() || (n["type"] == "Sequence" && n["normalizers"].as_array().is_some_and(Vec::is_empty))
        };
        if let Some(normalizer) = self.normalizer.as_ref().filter(|n| !none(n)) {
            let kind = normalizer.get("type").map_or_else(|| normalizer.to_string(), ToString::to_string);
            return unsupported("a normalizer", "none", kind.chars().take(100).collect());
        }
        let Some(pre_tokenizer) = &self.pre_tokenizer else {
            return unsupported("no pre-tokenizer", "Split, then ByteLevel", "null".to_owned());
        };
        let steps: Vec<&str> = pre_tokenizer.pretokenizers.iter().map(|p| p.kind.as_str()).collect();
        if pre_tokenizer.kind != "Sequence" || steps != ["Split", "ByteLevel"] {
            let found = if steps.is_empty() { pre_tokenizer.kind.clone() } else { steps.join(", ") };
            return unsupported("an unknown pre-tokenizer", "Split, ByteLevel", found);
        }
        let [split, bytes] = &pre_tokenizer.pretokenizers[..] else {
            unreachable!("two steps, as compared above")
        };
        let pattern = split.pattern.as_ref().and_then(|p| p.regex.as_deref()).unwrap_or("none");
        if pattern != PATTERN {
            return unsupported("an unknown pattern", PATTERN, pattern.chars().take(300).collect());
        }
        if split.invert || split.behavior.as_deref() != Some("Isolated") {
            let found = format!("{:?}, invert {}", split.behavior, split.invert);
            return unsupported("an unknown Split", "Isolated, not inverted", found);
        }
        if bytes.add_prefix_space || bytes.use_regex != Some(false) {
            let found = format!("prefix space {}, own regex {:?}", bytes.add_prefix_space, bytes.use_regex);
            return unsupported("an unknown ByteLevel", "no prefix space, no regex of its own", found);
        }
        Ok(())
    }
}
