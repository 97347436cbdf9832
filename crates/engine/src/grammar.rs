//! Grammars that answers must follow: from what a client asks for to compiled ones, in bounded time and memory.

use std::collections::{HashMap, VecDeque};
use std::fmt::Write;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, OnceLock, PoisonError, mpsc};
use std::time::{Duration, Instant};

use harmony::Harmony;
use llguidance::api::{GrammarInit, GrammarWithLexer, ParserLimits, TopLevelGrammar};
use llguidance::earley::lexerspec::LexerSpec;
use llguidance::toktrie::{InferenceCapabilities, TokEnv, TokRxInfo, TokTrie, TokenId, TokenizerEnv};
use llguidance::{Matcher, ParserFactory};
use serde_json::Value;

use crate::demands;
use crate::gbnf;
use crate::numbers;
use crate::structure::{self, Structure};

/// What a text must look like.
#[derive(Debug, Clone, PartialEq)]
pub enum Form {
    /// Anything.
    Text,
    /// A JSON document.
    Json {
        /// Its JSON Schema, an object.
        schema: Value,
        /// Keywords that cannot be enforced are left out, and listed in [`Grammar::warnings`]; else they are an error.
        lenient: bool,
        /// What may stand between the tokens of the document.
        whitespace: Whitespace,
    },
    /// What a regular expression matches as a whole.
    Regex(String),
    /// One of these.
    Choice(Vec<String>),
    /// What a grammar in Lark's notation derives from `start`.
    Lark(String),
    /// What a grammar in llama.cpp's notation derives from `root`.
    Gbnf(String),
    /// A text with structural tags.
    Structure(Structure),
}

/// What may stand between the tokens of a JSON document.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Whitespace {
    /// At most one space: without a bound, a model may go on for ever.
    #[default]
    Single,
    /// Nothing.
    None,
    /// What a regular expression matches.
    Pattern(String),
}

/// What a turn after `<|start|>assistant` may consist of.
#[derive(Debug, Clone, PartialEq)]
pub struct TurnRules {
    /// It may begin with reasoning.
    pub reasoning: bool,
    /// The final answer; `None`: there must be calls.
    pub answer: Option<Form>,
    /// The functions that may be called, with the form of their arguments.
    pub calls: Vec<(String, Form)>,
    /// More than one call may be made.
    pub many_calls: bool,
}

/// A compiled grammar. Clones are the same grammar.
#[derive(Clone)]
pub struct Grammar(Arc<Compiled>);

struct Compiled {
    /// At the beginning.
    matcher: Mutex<Matcher>,
    /// Whether a matcher can go back from a guess.
    goes_back: bool,
    warnings: Vec<String>,
    bytes: usize,
    /// Whether a mask of it took long.
    slow: AtomicBool,
}

impl Grammar {
    /// What of the form is not enforced.
    pub fn warnings(&self) -> &[String] {
        &self.0.warnings
    }

    /// Whether guesses can be looked at: what counts tokens cannot go back.
    pub(crate) fn goes_back(&self) -> bool {
        self.0.goes_back
    }

    /// Whether one of its masks ever took long.
    pub(crate) fn is_slow(&self) -> bool {
        self.0.slow.load(Ordering::Relaxed)
    }

    pub(crate) fn set_slow(&self) {
        self.0.slow.store(true, Ordering::Relaxed);
    }

    /// A state of its own at the beginning of the grammar.
    pub(crate) fn matcher(&self) -> Matcher {
        // The clone has its own automaton, which grows as it is used and goes with its request.
        self.0.matcher.lock().unwrap_or_else(PoisonError::into_inner).deep_clone()
    }
}

impl std::fmt::Debug for Grammar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Grammar").field("bytes", &self.0.bytes).finish_non_exhaustive()
    }
}

impl PartialEq for Grammar {
    fn eq(&self, other: &Grammar) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// Why there is no grammar.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GrammarError {
    /// The answer's form cannot be compiled.
    #[error("{0}")]
    Answer(String),
    /// The form of a function's arguments cannot be compiled.
    #[error("{message}")]
    Call {
        /// Index in [`TurnRules::calls`].
        index: usize,
        /// Why.
        message: String,
    },
    /// Others are being compiled; later they may not.
    #[error("too many grammars are being compiled")]
    Busy,
}

/// Compiles grammars for one vocabulary, and keeps those used last.
pub struct Grammars {
    harmony: Arc<Harmony>,
    /// Made when the first grammar is asked for: it takes some hundred milliseconds and some ten megabytes.
    factory: OnceLock<Result<Arc<ParserFactory>, String>>,
    cache: Mutex<Cache>,
    hits: AtomicU64,
    gate: Arc<Gate>,
}

/// Longest form as text.
pub(crate) const MAX_FORM_BYTES: usize = 256 << 10;
/// Longest regular expression.
const MAX_REGEX_BYTES: usize = 16 << 10;
/// Longest grammar: its rules may nest as deep as it has lines, which costs stack.
const MAX_LARK_BYTES: usize = 64 << 10;
/// Deepest nesting of a schema, or of a grammar's brackets.
const MAX_NESTING: usize = 64;
/// Most intersections of a grammar, each of which may double what they take together.
const MAX_INTERSECTIONS: usize = 10;
/// Most properties and enumerated values of a schema.
const MAX_NODES: usize = 10_000;
/// Most grammars kept, and most memory of their automata, beside which they hold up to eight times as much.
const MAX_CACHED: usize = 1024;
const MAX_CACHED_BYTES: usize = 32 << 20;
/// What a symbol takes in the tables of a parser, about.
const BYTES_PER_SYMBOL: usize = 256;
/// Longest time to compile.
const COMPILE_TIMEOUT: Duration = Duration::from_secs(2);
/// Grammars compiled at a time, and how long others wait for their turn.
const COMPILERS: usize = 2;
const COMPILE_WAIT: Duration = Duration::from_secs(10);
/// How many wait at a time, each on a thread that its caller may need for others.
const MAX_WAITING: usize = 128;
/// The compiler is recursive. Only what is used of a stack takes memory.
const COMPILE_STACK: usize = 256 << 20;
/// Longest message about a form.
const MAX_MESSAGE: usize = 300;

impl Grammars {
    pub(crate) fn new(harmony: Arc<Harmony>) -> Grammars {
        Grammars {
            harmony,
            factory: OnceLock::new(),
            cache: Mutex::default(),
            hits: AtomicU64::new(0),
            gate: Arc::new(Gate::default()),
        }
    }

    /// A grammar of a whole text.
    ///
    /// # Errors
    /// [`GrammarError::Answer`] if the form is not valid or beyond the limits, [`GrammarError::Busy`].
    pub fn text(&self, form: &Form) -> Result<Grammar, GrammarError> {
        check(form).map_err(GrammarError::Answer)?;
        self.compile(of_form(&unguessed("text"), form))
    }

    /// A grammar of a turn.
    ///
    /// # Errors
    /// As [`Grammars::text`], and [`GrammarError::Call`] for the form of a function's arguments.
    pub fn turn(&self, rules: &TurnRules) -> Result<Grammar, GrammarError> {
        if let Some(answer) = &rules.answer {
            check(answer).map_err(GrammarError::Answer)?;
        }
        for (index, (_, form)) in rules.calls.iter().enumerate() {
            check(form).map_err(|message| GrammarError::Call { index, message })?;
        }
        let error = match self.compile(turn(rules)) {
            Err(GrammarError::Answer(message)) => message,
            done => return done,
        };
        // Whose fault was it? Those that take long are not looked for.
        let begin = Instant::now();
        for (index, (_, form)) in rules.calls.iter().enumerate() {
            if begin.elapsed() > COMPILE_TIMEOUT {
                return Err(GrammarError::Answer(error));
            }
            if let Err(GrammarError::Answer(message)) = self.text(form) {
                return Err(GrammarError::Call { index, message });
            }
        }
        match rules.answer.as_ref().map(|answer| self.text(answer)) {
            Some(Err(error)) => Err(error),
            _ => Err(GrammarError::Answer(error)),
        }
    }

    /// Times that a grammar needed no compiling.
    pub fn cache_hits(&self) -> u64 {
        self.hits.load(Ordering::Relaxed)
    }

    fn compile(&self, grammars: Vec<GrammarWithLexer>) -> Result<Grammar, GrammarError> {
        let key = serde_json::to_string(&grammars).expect("a grammar is JSON");
        if let Some(found) = self.cache().find(&key) {
            self.hits.fetch_add(1, Ordering::Relaxed);
            return Ok(found);
        }
        let pass = Gate::enter(&self.gate).ok_or(GrammarError::Busy)?;
        // It may have been compiled while this one waited.
        if let Some(found) = self.cache().find(&key) {
            return Ok(found);
        }
        let factory = self.factory.get_or_init(|| factory(&self.harmony)).clone();
        let factory = factory.map_err(GrammarError::Answer)?;
        let (sender, compiled) = mpsc::channel();
        let work = move || {
            // Kept until the work is over, even if nobody waits for it any more.
            let _pass = pass;
            // An error means that nobody waits.
            let _ = sender.send(compile(&factory, grammars).map_err(|error| shorten(&error)));
        };
        let thread = std::thread::Builder::new().name("grammar".to_owned()).stack_size(COMPILE_STACK);
        thread.spawn(work).map_err(|error| {
            tracing::error!(%error, "no thread to compile a grammar");
            GrammarError::Busy
        })?;
        let compiled = match compiled.recv_timeout(COMPILE_TIMEOUT) {
            Ok(compiled) => compiled.map_err(GrammarError::Answer)?,
            Err(mpsc::RecvTimeoutError::Timeout) => {
                return Err(GrammarError::Answer("it takes too long to compile".to_owned()));
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                return Err(GrammarError::Answer("it cannot be compiled".to_owned()));
            }
        };
        let grammar = Grammar(Arc::new(compiled));
        self.cache().insert(key, grammar.clone());
        Ok(grammar)
    }

    fn cache(&self) -> MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn compile(factory: &ParserFactory, grammars: Vec<GrammarWithLexer>) -> Result<Compiled, String> {
    let error = |error: &dyn std::fmt::Display| error.to_string();
    for grammar in &grammars {
        grammar.json_schema.as_ref().map_or(Ok(()), demands::check)?;
        let text = grammar.lark_grammar.as_deref().unwrap_or_default();
        schemas_in(text).try_for_each(|schema| {
            demands::check(&schema)?;
            let mut held = schema.clone();
            numbers::hold(&mut held, false)?;
            // The text stays as it is.
            if held == schema {
                Ok(())
            } else {
                Err("its integers beyond 2^53 must be ones that F64 has".to_owned())
            }
        })?;
    }
    let source = GrammarInit::Serialized(TopLevelGrammar { grammars, max_tokens: None });
    let limits = factory.limits().clone();
    let (grammar, lexer) =
        source.to_internal(Some(factory.tok_env().clone()), limits).map_err(|e| error(&e))?;
    begin(&lexer, factory.limits().clone())?;
    let symbols = grammar.num_symbols();
    let parser = factory
        .create_parser_from_init_default(GrammarInit::Internal(grammar, lexer))
        .map_err(|e| error(&e))?;
    let bytes = parser.parser.lexer_stats().num_bytes + symbols * BYTES_PER_SYMBOL;
    let goes_back = parser.parser.grammar().lexer_spec().can_rollback();
    let mut matcher = Matcher::new(Ok(parser));
    let warnings = matcher.grammar_warnings().iter().map(|warning| shorten(warning)).collect();
    Ok(Compiled { matcher: Mutex::new(matcher), goes_back, warnings, bytes, slow: AtomicBool::new(false) })
}

/// Refuses what has no first states within the limits, which the compiler makes without a bound.
fn begin(lexer: &LexerSpec, mut limits: ParserLimits) -> Result<(), String> {
    let fuel = limits.initial_lexer_fuel;
    let mut automaton = lexer.to_regex_vec(&mut limits).map_err(|error| error.to_string())?;
    automaton.set_fuel(fuel);
    let start = automaton.initial_state(&lexer.all_lexemes());
    for byte in 0..=u8::MAX {
        automaton.transition(start, byte);
    }
    match automaton.has_error() {
        true => Err("its numbers or patterns need too large an automaton".to_owned()),
        false => Ok(()),
    }
}

/// The JSON Schemas in a grammar's text, and whatever else looks like one.
fn schemas_in(text: &str) -> impl Iterator<Item = Value> + '_ {
    text.match_indices("%json").filter_map(|(at, keyword)| {
        serde_json::Deserializer::from_str(&text[at + keyword.len()..]).into_iter().next()?.ok()
    })
}

/// The grammar of a turn, which others of the list are part of.
fn turn(rules: &TurnRules) -> Vec<GrammarWithLexer> {
    let mut parts = Vec::new();
    let mut text = String::from("start: ");
    let mut alternatives = Vec::new();
    if rules.answer.is_some() {
        alternatives.push("final");
    }
    if !rules.calls.is_empty() {
        alternatives.push("preamble? calls");
    }
    let reasoning = if rules.reasoning { "analysis? " } else { "" };
    let _ = writeln!(text, "{reasoning}({})", alternatives.join(" | "));
    text += "analysis: <|channel|> \"analysis\" <|message|> TEXT <|end|> <|start|> \"assistant\"\n";
    text += "preamble: <|channel|> \"commentary\" <|message|> TEXT <|end|> <|start|> \"assistant\"\n";
    text += "TEXT: /(?s:.*)/\n";
    if let Some(answer) = &rules.answer {
        let json = if matches!(answer, Form::Json { .. }) { "(\" \" <|constrain|> \"json\")? " } else { "" };
        let _ = writeln!(text, "final: <|channel|> \"final\" {json}<|message|> answer");
        part("answer", answer, &mut text, &mut parts);
    }
    for (i, (name, arguments)) in rules.calls.iter().enumerate() {
        // The model names the function in the channel part or after its own role.
        let recipient = quote(&format!(" to=functions.{name}"));
        let kind = r#"(" " <|constrain|> "json" | " json")?"#;
        let _ = writeln!(
            text,
            "call{i}: (<|channel|> \"commentary\" {recipient} {kind} | {recipient} <|channel|> \"commentary\" {kind}) \
             <|message|> arguments{i}"
        );
        part(&format!("arguments{i}"), arguments, &mut text, &mut parts);
    }
    if !rules.calls.is_empty() {
        let calls: Vec<String> = (0..rules.calls.len()).map(|i| format!("call{i}")).collect();
        let _ = writeln!(text, "call: {}", calls.join(" | "));
        let more = if rules.many_calls { "(<|end|> <|start|> \"assistant\" call)* " } else { "" };
        let _ = writeln!(text, "calls: call {more}<|call|>");
    }
    parts.insert(0, lark(&unguessed("turn"), text));
    parts
}

/// Defines the rule `name` as a form, in the grammar itself or as another one beside it.
fn part(name: &str, form: &Form, text: &mut String, parts: &mut Vec<GrammarWithLexer>) {
    let _ = match form {
        Form::Text => writeln!(text, "{name}: TEXT"),
        form => {
            let grammar = unguessed(name);
            parts.extend(of_form(&grammar, form));
            writeln!(text, "{name}: @{grammar}")
        }
    };
}

/// A grammar's name that a client's own grammars cannot refer to.
fn unguessed(name: &str) -> String {
    static RANDOM: LazyLock<u64> = LazyLock::new(|| RandomState::new().hash_one(()));
    format!("{name}_{:x}", *RANDOM)
}

/// The grammar of a form under this name, and those that it is made of.
pub(crate) fn of_form(name: &str, form: &Form) -> Vec<GrammarWithLexer> {
    match form {
        Form::Json { schema, lenient, whitespace } => vec![json(name, schema, *lenient, whitespace)],
        // `check` has said what is wrong with one that has none.
        Form::Structure(structure) => structure::grammars(name, structure).unwrap_or_default(),
        form => vec![lark(name, lark_text(form))],
    }
}

pub(crate) fn lark(name: &str, text: String) -> GrammarWithLexer {
    GrammarWithLexer { name: Some(name.to_owned()), lark_grammar: Some(text), json_schema: None }
}

/// Of its text and its schema.
pub(crate) fn bytes(grammar: &GrammarWithLexer) -> usize {
    grammar.lark_grammar.as_ref().map_or(0, String::len)
        + grammar.json_schema.as_ref().map_or(0, |schema| schema.to_string().len())
}

/// The grammar of a JSON document.
fn json(name: &str, schema: &Value, lenient: bool, whitespace: &Whitespace) -> GrammarWithLexer {
    let mut schema = schema.clone();
    // `check` has said what is wrong with one that cannot be held to.
    let _ = numbers::hold(&mut schema, lenient);
    let pattern = match whitespace {
        Whitespace::Single => Some(" "),
        Whitespace::None => None,
        Whitespace::Pattern(pattern) => Some(pattern.as_str()),
    };
    // The compiler's options travel in the schema; a client's own are replaced.
    schema["x-guidance"] = serde_json::json!({
        "whitespace_flexible": pattern.is_some(),
        "whitespace_pattern": pattern.map(|pattern| format!("(?:{pattern})")),
        "coerce_one_of": true,
        "lenient": lenient,
    });
    GrammarWithLexer { name: Some(name.to_owned()), json_schema: Some(schema), lark_grammar: None }
}

fn lark_text(form: &Form) -> String {
    match form {
        Form::Regex(regex) => {
            GrammarWithLexer::from_regex(regex).lark_grammar.expect("a regular expression is a grammar")
        }
        Form::Choice(choices) => {
            let choices: Vec<String> = choices.iter().map(|choice| quote(choice)).collect();
            // One word, however many there are.
            format!("start: CHOICE\nCHOICE: {}", choices.join(" | "))
        }
        Form::Lark(text) => text.clone(),
        // `check` has said what is wrong with one that is not.
        Form::Gbnf(text) => gbnf::to_lark(text).unwrap_or_default(),
        Form::Text | Form::Json { .. } | Form::Structure(_) => "start: /(?s:.*)/".to_owned(),
    }
}

/// A text as a literal of the notation, which are JSON's.
pub(crate) fn quote(text: &str) -> String {
    Value::from(text).to_string()
}

/// Refuses what is large before any time is spent on it.
pub(crate) fn check(form: &Form) -> Result<(), String> {
    let at_most = |found: usize, most: usize, what: &str| {
        if found <= most { Ok(()) } else { Err(format!("it must have at most {most} {what}, got {found}")) }
    };
    match form {
        Form::Text => Ok(()),
        Form::Json { schema, lenient, whitespace } => {
            if !schema.is_object() {
                return Err("it must be an object".to_owned());
            }
            if let Whitespace::Pattern(pattern) = whitespace {
                at_most(pattern.len(), MAX_REGEX_BYTES, "bytes of whitespace pattern")?;
            }
            let (mut depth, mut nodes) = (0, 0);
            measure(schema, 1, &mut depth, &mut nodes);
            at_most(depth, MAX_NESTING, "levels")?;
            at_most(nodes, MAX_NODES, "properties and enumerated values")?;
            at_most(schema.to_string().len(), MAX_FORM_BYTES, "bytes")?;
            numbers::hold(&mut schema.clone(), *lenient)
        }
        Form::Regex(regex) => {
            at_most(regex.len(), MAX_REGEX_BYTES, "bytes")?;
            if regex.contains('\0') { Err("it must not contain NUL".to_owned()) } else { Ok(()) }
        }
        Form::Choice(choices) => {
            if choices.is_empty() || choices.iter().any(String::is_empty) {
                return Err("it must have choices, none of them empty".to_owned());
            }
            at_most(choices.len(), MAX_NODES, "choices")?;
            at_most(choices.iter().map(String::len).sum(), MAX_FORM_BYTES, "bytes")
        }
        Form::Structure(structure) => structure::grammars("text", structure).map(drop),
        Form::Gbnf(text) => {
            at_most(text.len(), MAX_LARK_BYTES, "bytes")?;
            at_most(brackets(&gbnf::to_lark(text)?), 4 * MAX_NESTING, "levels of brackets and repetitions")
        }
        Form::Lark(text) => {
            at_most(text.len(), MAX_LARK_BYTES, "bytes")?;
            // Those would let an answer break out of its message.
            if ["<|", "<["].iter().any(|token| text.contains(token)) {
                return Err("it must not name special tokens (`<|…|>` or `<[…]>`)".to_owned());
            }
            at_most(brackets(text), MAX_NESTING, "levels of brackets")?;
            at_most(text.matches('&').count(), MAX_INTERSECTIONS, "`&` (in texts write \\x26)")?;
            let not = text.split(|c| c != '~').map(str::len).max().unwrap_or(0);
            at_most(not, MAX_NESTING, "negations in a row")
        }
    }
}

/// The deepest level, and the number of properties and enumerated values.
fn measure(schema: &Value, level: usize, depth: &mut usize, nodes: &mut usize) {
    *depth = level.max(*depth);
    // Deeper ones are refused anyway.
    if level > MAX_NESTING {
        return;
    }
    match schema {
        Value::Array(items) => {
            *nodes += items.len();
            items.iter().for_each(|item| measure(item, level + 1, depth, nodes));
        }
        Value::Object(entries) => {
            for (key, value) in entries {
                *nodes += match key.as_str() {
                    "properties" | "patternProperties" | "$defs" | "definitions" => {
                        value.as_object().map_or(0, serde_json::Map::len)
                    }
                    _ => 0,
                };
                measure(value, level + 1, depth, nodes);
            }
        }
        _ => {}
    }
}

/// At least the deepest level of brackets of a grammar.
fn brackets(text: &str) -> usize {
    let (mut level, mut deepest) = (0usize, 0);
    for byte in text.bytes() {
        match byte {
            b'(' | b'[' | b'{' => level += 1,
            b')' | b']' | b'}' => level = level.saturating_sub(1),
            // Rules do not go over lines that begin another one, so brackets within strings do not add up.
            b'\n' => level = 0,
            _ => {}
        }
        deepest = deepest.max(level);
    }
    deepest
}

pub(crate) fn shorten(message: &str) -> String {
    let mut lines = message.lines();
    let first = lines.next().unwrap_or_default();
    // Where a picture of the place follows, the reason is below it.
    let reason = lines.find_map(|line| line.strip_prefix("error: "));
    let message = reason.map_or_else(|| first.to_owned(), |reason| format!("{first} {reason}"));
    match message.char_indices().nth(MAX_MESSAGE) {
        Some((end, _)) => format!("{}…", &message[..end]),
        None => message,
    }
}

fn factory(harmony: &Arc<Harmony>) -> Result<Arc<ParserFactory>, String> {
    let env: TokEnv = Arc::new(Vocabulary::new(Arc::clone(harmony)));
    let mut slices = llguidance::earley::SlicedBiasComputer::general_slices();
    // Of reasoning and other free text; all tokens that are whole characters go on with it.
    slices.push(r"(?s:.+)".to_owned());
    let mut factory = ParserFactory::new(&env, InferenceCapabilities::default(), &slices)
        .map_err(|error| shorten(&error.to_string()))?;
    factory.quiet();
    *factory.limits_mut() = ParserLimits {
        max_grammar_size: 200_000,
        max_lexer_states: 50_000,
        // Of an object whose members all may come next: four each.
        max_items_in_row: 4 * MAX_NODES,
        // Errors are for clients: they name the mistake and do not repeat the grammar.
        verbose_errors: false,
        ..ParserLimits::default()
    };
    Ok(Arc::new(factory))
}

/// The vocabulary as the grammar compiler knows it.
struct Vocabulary {
    harmony: Arc<Harmony>,
    trie: TokTrie,
}

impl Vocabulary {
    fn new(harmony: Arc<Harmony>) -> Vocabulary {
        let tokenizer = harmony.tokenizer();
        let words: Vec<Vec<u8>> = (0..tokenizer.vocab_size() as u32)
            .map(|id| {
                let bytes = tokenizer.token_bytes(id).unwrap_or_default();
                let marker: &[u8] =
                    if tokenizer.is_special(id) { &[TokTrie::SPECIAL_TOKEN_MARKER] } else { &[] };
                [marker, bytes].concat()
            })
            .collect();
        let [end_of_turn, _, end_of_text] = harmony.stop_ids();
        let info = TokRxInfo::new(words.len() as u32, end_of_turn);
        let trie = TokTrie::from(&info, &words).with_eos_tokens(&[end_of_turn, end_of_text]);
        Vocabulary { harmony, trie }
    }
}

impl TokenizerEnv for Vocabulary {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        self.trie.tokenize_with_greedy_fallback(bytes, |text| self.harmony.tokenizer().encode(text))
    }
}

/// Grammars by their source, the one used longest ago first to go.
#[derive(Default)]
struct Cache {
    entries: HashMap<String, Grammar>,
    /// Least recently used first.
    order: VecDeque<String>,
    bytes: usize,
}

impl Cache {
    fn find(&mut self, key: &str) -> Option<Grammar> {
        let found = self.entries.get(key)?.clone();
        if let Some(at) = self.order.iter().position(|known| known == key)
            && let Some(key) = self.order.remove(at)
        {
            self.order.push_back(key);
        }
        Some(found)
    }

    fn insert(&mut self, key: String, grammar: Grammar) {
        let cost = |key: &str, grammar: &Grammar| 2 * key.len() + grammar.0.bytes;
        self.bytes += cost(&key, &grammar);
        self.order.push_back(key.clone());
        self.entries.insert(key, grammar);
        while (self.entries.len() > MAX_CACHED || self.bytes > MAX_CACHED_BYTES)
            && let Some(key) = self.order.pop_front()
        {
            if let Some(grammar) = self.entries.remove(&key) {
                self.bytes -= cost(&key, &grammar);
            }
        }
    }
}

/// Lets a few compile at a time.
#[derive(Default)]
struct Gate {
    crowd: Mutex<Crowd>,
    left: Condvar,
}

#[derive(Default)]
struct Crowd {
    inside: usize,
    waiting: usize,
}

struct Pass(Arc<Gate>);

impl Gate {
    fn enter(gate: &Arc<Gate>) -> Option<Pass> {
        let mut crowd = gate.crowd();
        if crowd.waiting == MAX_WAITING {
            return None;
        }
        crowd.waiting += 1;
        let waited = gate.left.wait_timeout_while(crowd, COMPILE_WAIT, |crowd| crowd.inside >= COMPILERS);
        let (mut crowd, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        crowd.waiting -= 1;
        if timeout.timed_out() {
            return None;
        }
        crowd.inside += 1;
        Some(Pass(Arc::clone(gate)))
    }

    fn crowd(&self) -> MutexGuard<'_, Crowd> {
        self.crowd.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.0.crowd().inside -= 1;
        self.0.left.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gate_turns_away_those_that_would_wait_behind_too_many() {
        let gate = Arc::new(Gate::default());
        let inside: Vec<Pass> = (0..COMPILERS).map(|_| Gate::enter(&gate).unwrap()).collect();
        std::thread::scope(|scope| {
            let waiting: Vec<_> =
                (0..MAX_WAITING).map(|_| scope.spawn(|| Gate::enter(&gate).is_some())).collect();
            while gate.crowd().waiting < MAX_WAITING {
                std::thread::yield_now();
            }
            assert!(Gate::enter(&gate).is_none());
            // It did not wait until they gave up.
            assert_eq!(gate.crowd().waiting, MAX_WAITING);
            drop(inside);
            assert!(waiting.into_iter().all(|thread| thread.join().unwrap()));
        });
        assert!(Gate::enter(&gate).is_some());
    }
}
