//! The endpoints that generate: from a body to an answer, whole or streamed.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use axum::body::Body;
use axum::http::{HeaderName, HeaderValue, header};
use axum::response::Response;
use engine::{Engine, Event, Grammar, OutputMode, Request, SamplingParams, SchedulingPolicy, SubmitError};
use harmony::ChatPrompt;

use crate::answer::Identity;
use crate::auth::hex;
use crate::background;
use crate::body::{self, Source};
use crate::chat_answer::{self, ChatAnswer, ChatChunks, WholeChat};
use crate::chat_request::ChatRequest;
use crate::clock;
use crate::completion_answer::{self, CompletionAnswer, CompletionChunks, WholeCompletion};
use crate::completion_request::{self, CompletionRequest};
use crate::error::ApiError;
use crate::events::{Events, Next, Pace, Terms};
use crate::form;
use crate::identifier::identifier;
use crate::log::RequestLog;
use crate::memory::Record;
use crate::metrics::Rejection;
use crate::request::{Common, Context, StreamOptions, Truncation};
use crate::response_answer::ResponseAnswer;
use crate::response_request::{Earlier, References, ResponseRequest};
use crate::response_store::{Follower, Owner};
use crate::routes::{Origin, X_REQUEST_ID};
use crate::sampling::Limits;
use crate::server::State;
use crate::sse::{self, Chunks, Encoder, StreamRules};

/// No token is longer, so a text of more bytes per token of the context cannot fit; a margin on top keeps the message about
/// tokens, which people understand, for all but absurd lengths.
const MAX_BYTES_PER_TOKEN: usize = 8 * 16;

/// Of prompts that an answer repeats: twice the largest body that is read unless another limit is set, so that one choice can nearly
/// always show what it was asked.
pub(crate) const MAX_REPEATED_BYTES: usize = 64 << 20;
/// Of a token's id as JSON, with the comma.
pub(crate) const MAX_ID_BYTES: usize = 7;

/// `POST /v1/chat/completions`
pub(crate) async fn chat(state: Arc<State>, origin: Origin, body: Body) -> Result<Response, ApiError> {
    let engine = state.engine()?;
    let body = body::read(body, &state.bodies).await?;
    let (mut request, prompt, grammar) = {
        let (state, engine) = (Arc::clone(&state), engine.clone());
        blocking(&origin, move || {
            let date = state.date();
            let mut request = ChatRequest::new(&body, &context(&state, &engine, date.as_deref()))?;
            if !request.prompt.add_generation_prompt && !request.turn.is_free() {
                let message =
                    "add_generation_prompt: false cannot be used with tools or a form of the answer.";
                return Err(ApiError::invalid("add_generation_prompt", message));
            }
            bound_text(request.text_bytes, &engine)?;
            let (at_once, continued) = (request.turn.answer_at_once, request.continued.as_ref());
            let truncation = truncation(&request.common, &request.params, &engine);
            let prompt = fed(&mut request.prompt, at_once, continued, truncation, &engine, &state)?;
            let echoed = continued.filter(|_| request.echo).map_or(0, String::len);
            // A whole answer shows the ids once.
            let shows_ids = request.common.return_token_ids && request.common.stream.is_some();
            let ids = if shows_ids { prompt.ids.len() } else { 0 };
            bound_repeated(echoed, ids, request.params.n)?;
            let start = Instant::now();
            let grammar = request.turn.compile(engine.grammars())?;
            if grammar.is_some() {
                state.metrics.compiled(start.elapsed());
            }
            Ok((request, prompt, grammar))
        })
        .await?
    };

    let form_param = &request.turn.answer_param;
    let call = Call::new(&state, &engine, &origin, &mut request.common, form_param, "chatcmpl");
    let shape = chat_answer::Shape::new(&request, &prompt.begun, &state);
    let memory = (!request.tools.is_empty()).then_some(&state.memory);
    let n = request.params.n;
    let harmony = Arc::clone(engine.harmony());
    let answer = ChatAnswer::new(harmony, call.identity.clone(), shape, prompt.ids.clone(), n, memory);
    let output = OutputMode::Chat { tools: request.tools, begun: prompt.begun };
    let remark = grammar.as_ref().and_then(unenforced);
    let engine_request = Request {
        grammar,
        // Calls of these are not guarded, nor is what begins with a header's first word.
        guarded: request.prompt.builtin_tools.is_empty() && request.prompt.add_generation_prompt,
        ..call.request(&request.common, &request.params, prompt.ids, output)
    };

    if request.common.stream.is_some() {
        let mut response = call.stream(ChatChunks::new(answer), vec![engine_request]).await?;
        response.headers_mut().extend(remark);
        return Ok(response);
    }
    let mut whole = WholeChat::new(answer);
    call.collect(vec![engine_request], |_, event| whole.add(event)).await?;
    call.log.usage(whole.usage());
    let (body, remarks) = whole.finish();
    let mut response = call.response("application/json", Body::from(body));
    let headers = response.headers_mut();
    headers.extend(remark);
    if remarks.malformed_arguments {
        headers.insert("x-malformed-tool-arguments", HeaderValue::from_static("1"));
    }
    if remarks.truncated_in_analysis {
        headers.insert("x-truncated-in", HeaderValue::from_static("analysis"));
    }
    Ok(response)
}

/// `POST /v1/responses`
pub(crate) async fn responses(state: Arc<State>, origin: Origin, body: Body) -> Result<Response, ApiError> {
    let engine = state.engine()?;
    let body = body::read(body, &state.bodies).await?;
    let (mut request, earlier, prompt, grammar) = {
        let (state, engine, owner) = (Arc::clone(&state), engine.clone(), origin.owner);
        blocking(&origin, move || {
            let references = References::of(&body)?;
            let conversation = references.previous.map(|id| state.responses.conversation(&id, owner));
            let items = state.responses.items(&references.items, owner);
            let max = state.bodies.max();
            if items.values().map(|item| item.bytes()).sum::<usize>() > max {
                return Err(ApiError::invalid("input", format!("input refers to more than {max} bytes.")));
            }
            let earlier = Earlier { conversation: conversation.transpose()?.unwrap_or_default(), items };
            let date = state.date();
            let mut request =
                ResponseRequest::new(&body, &earlier, &context(&state, &engine, date.as_deref()))?;
            if request.background && !state.responses.keeps() {
                let message = "background needs responses to be kept: the server's flag --responses-store.";
                return Err(ApiError::invalid("background", message));
            }
            bound_text(request.text_bytes, &engine)?;
            let truncation = truncation(&request.common, &request.params, &engine);
            let prompt =
                fed(&mut request.prompt, request.turn.answer_at_once, None, truncation, &engine, &state)?;
            let start = Instant::now();
            let grammar = request.turn.compile(engine.grammars())?;
            if grammar.is_some() {
                state.metrics.compiled(start.elapsed());
            }
            Ok((request, earlier, prompt, grammar))
        })
        .await?
    };

    let form_param = &request.turn.answer_param;
    let mut call = Call::new(&state, &engine, &origin, &mut request.common, form_param, "resp");
    // Others must not guess it, whatever the client called its request.
    call.identity.id = format!("resp_{}", identifier());
    let items = std::mem::take(&mut request.items);
    let keep =
        request.store.then(|| state.responses.place(origin.owner, earlier.conversation, items)).flatten();
    let harmony = Arc::clone(engine.harmony());
    let record = Record::new(&state.memory, &prompt.begun);
    let mut answer =
        ResponseAnswer::new(harmony, call.identity.clone(), &mut request, prompt.ids.len(), keep, record);
    let output = OutputMode::Chat { tools: request.tools, begun: prompt.begun };
    let remark = grammar.as_ref().and_then(unenforced);
    let engine_request = Request {
        grammar,
        // Calls of these are not guarded.
        guarded: request.prompt.builtin_tools.is_empty(),
        ..call.request(&request.common, &request.params, prompt.ids, output)
    };
    let mut response = if request.background {
        call.background(answer, engine_request, request.common.stream.is_some())?
    } else if request.common.stream.is_some() {
        call.stream(answer, vec![engine_request]).await?
    } else {
        let nowhere = &mut Vec::new();
        answer.begin(nowhere);
        call.collect(vec![engine_request], |_, event| answer.apply(event, nowhere)).await?;
        call.log.usage(answer.usage());
        call.response("application/json", Body::from(answer.finish()))
    };
    response.headers_mut().extend(remark);
    Ok(response)
}

/// What the model is fed.
struct Fed {
    ids: Vec<u32>,
    /// The last of them, if they begin the answer.
    begun: Vec<u32>,
}

/// The ids that the chat endpoint would feed, and how it would sample.
pub(crate) fn chat_ids(
    body: &[u8],
    state: &State,
    engine: &Engine,
) -> Result<(Vec<u32>, SamplingParams), ApiError> {
    let date = state.date();
    let mut request = ChatRequest::new(body, &context(state, engine, date.as_deref()))?;
    bound_text(request.text_bytes, engine)?;
    let at_once = request.turn.answer_at_once;
    let truncation = truncation(&request.common, &request.params, engine);
    let fed = fed(&mut request.prompt, at_once, request.continued.as_ref(), truncation, engine, state)?;
    Ok((fed.ids, request.params))
}

/// How a prompt may be cut, and the most tokens that leave room for an answer.
fn truncation(common: &Common, params: &SamplingParams, engine: &Engine) -> Option<(Truncation, usize)> {
    const UNSAID: usize = 4096;
    let most = engine.max_model_len();
    let truncation = common.truncation?;
    let answer = match (params.max_tokens, truncation.tokens) {
        (Some(max), _) => max.min(most / 2),
        // Whoever says how much of the prompt stays knows what is left.
        (None, Some(_)) => 1,
        (None, None) => UNSAID.min(most / 4),
    };
    Some((truncation, most.saturating_sub(answer.max(1))))
}

/// The prompt, with the beginning of the answer where that is not the model's to write.
fn fed(
    prompt: &mut ChatPrompt,
    answer_at_once: bool,
    continued: Option<&String>,
    truncation: Option<(Truncation, usize)>,
    engine: &Engine,
    state: &State,
) -> Result<Fed, ApiError> {
    state.memory.recall(&mut prompt.messages);
    let harmony = engine.harmony();
    let start = Instant::now();
    let mut ids = harmony.render_chat(prompt)?;
    state.metrics.tokenized(start.elapsed());
    let mut begun = Vec::new();
    if prompt.add_generation_prompt && (answer_at_once || continued.is_some()) {
        begun.extend(harmony.answer_header());
        begun.extend(continued.into_iter().flat_map(|text| harmony.tokenizer().encode(text)));
    }
    ids.extend(&begun);
    if let Some((truncation, max)) = truncation {
        let start = harmony.tokenizer().special("<|start|>");
        // Up to the first message that is not the system's or the developer's.
        let fixed = ["system", "developer"].map(|role| harmony.tokenizer().encode(role));
        let is_fixed = |at: usize| fixed.iter().any(|role| ids[at + 1..].starts_with(role));
        let preamble = (0..ids.len()).find(|&at| Some(ids[at]) == start && !is_fixed(at)).unwrap_or(0);
        // The last are `<|start|>assistant`, where they are asked for, and what begins the answer.
        let last = if prompt.add_generation_prompt { 2 + begun.len() } else { 0 };
        truncation.apply(&mut ids, preamble, last, start, max)?;
    }
    check_length(ids.len(), 1, engine)?;
    Ok(Fed { ids, begun })
}

/// Says which keywords of a schema have no effect.
fn unenforced(grammar: &Grammar) -> Option<(HeaderName, HeaderValue)> {
    const MAX: usize = 500;
    let printable = |c: char| if c.is_ascii_graphic() || c == ' ' { c } else { '?' };
    let warnings: String = grammar.warnings().join("; ").chars().map(printable).take(MAX).collect();
    let value = HeaderValue::from_str(&warnings).ok().filter(|value| !value.is_empty())?;
    Some((HeaderName::from_static("x-unenforced-schema"), value))
}

/// `POST /v1/completions`
pub(crate) async fn completions(state: Arc<State>, origin: Origin, body: Body) -> Result<Response, ApiError> {
    let engine = state.engine()?;
    let body = body::read(body, &state.bodies).await?;
    let (mut request, prompts, grammar) = {
        let (state, engine) = (Arc::clone(&state), engine.clone());
        blocking(&origin, move || {
            let date = state.date();
            let mut request = CompletionRequest::new(&body, &context(&state, &engine, date.as_deref()))?;
            let prompts = std::mem::take(&mut request.prompts);
            let start = Instant::now();
            let prompts = prompts.into_iter().map(|prompt| tokenize(prompt, &request, &engine));
            let prompts = prompts.collect::<Result<Vec<_>, _>>()?;
            state.metrics.tokenized(start.elapsed());
            let of_prompts = |shown: bool, size: fn(&completion_answer::Prompt) -> usize| {
                if shown { prompts.iter().map(size).sum() } else { 0 }
            };
            let echoed = of_prompts(request.echo, |prompt| prompt.text.len());
            let ids = of_prompts(request.common.return_token_ids, |prompt| prompt.ids.len());
            bound_repeated(echoed, ids, request.params.n)?;
            let wanted = request.wanted.as_ref();
            let grammar = wanted.map(|wanted| {
                let grammar = engine.grammars().text(&wanted.form);
                grammar.map_err(|error| form::refusal(&error, &wanted.param, &[]))
            });
            Ok((request, prompts, grammar.transpose()?))
        })
        .await?
    };

    let form_param = request.wanted.as_ref().map_or("", |wanted| &wanted.param);
    let call = Call::new(&state, &engine, &origin, &mut request.common, form_param, "cmpl");
    let shape = completion_answer::Shape::new(&request);
    let engine_request = |prompt: &completion_answer::Prompt| Request {
        grammar: grammar.clone(),
        ..call.request(&request.common, &request.params, prompt.ids.clone(), OutputMode::Text)
    };
    let mut engine_requests: Vec<Request> = prompts.iter().map(engine_request).collect();
    // Each choice shows its prompt's anew.
    let lists = usize::from(request.echo && request.params.logprobs.is_some())
        + usize::from(request.prompt_logprobs.is_some());
    engine.bound_logprobs(&mut engine_requests, lists * request.params.n)?;
    let harmony = Arc::clone(engine.harmony());
    let answer = CompletionAnswer::new(harmony, call.identity.clone(), shape, prompts);

    if request.common.stream.is_some() {
        return call.stream(CompletionChunks::new(answer), engine_requests).await;
    }
    let mut whole = WholeCompletion::new(answer);
    call.collect(engine_requests, |prompt, event| {
        whole.add(prompt, event);
        true
    })
    .await?;
    call.log.usage(whole.usage());
    Ok(call.response("application/json", Body::from(whole.finish())))
}

/// A valid request on its way through the engine.
struct Call<'a> {
    state: &'a Arc<State>,
    /// One of those that may take it.
    engine: &'a Engine,
    log: RequestLog,
    identity: Identity,
    owner: Owner,
    /// The client's, in a header.
    priority: Option<i64>,
    /// The engine that is to take it, in another.
    rank: Option<i64>,
    /// The client's name for the request, or ours.
    id: String,
    /// The field that asks for a form of the answer; empty if none does.
    form_param: String,
}

impl<'a> Call<'a> {
    fn new(
        state: &'a Arc<State>,
        engine: &'a Engine,
        origin: &Origin,
        common: &mut Common,
        form_param: &str,
        prefix: &str,
    ) -> Call<'a> {
        if state.force_include_usage && common.stream.is_some() {
            common.stream = Some(StreamOptions { include_usage: true, continuous_usage_stats: true });
        }
        let id = match &common.request_id {
            Some(id) if !origin.named_by_client => id.clone(),
            _ => origin.log.request_id().to_owned(),
        };
        state.metrics.unknown_fields(&common.unknown);
        let model = state.model_names[0].clone();
        origin.log.begin(&model);
        Call {
            state,
            engine,
            log: origin.log.clone(),
            identity: Identity {
                id: format!("{prefix}-{id}"),
                created: clock::unix_seconds(),
                model,
                fingerprint: state.fingerprint.clone(),
                service_tier: common.service_tier.then_some("default"),
                timed: state.request_metrics.then(Instant::now),
            },
            owner: origin.owner,
            priority: origin.priority,
            rank: origin.rank,
            id,
            form_param: form_param.to_owned(),
        }
    }

    /// What the engine is asked for, without a grammar.
    fn request(
        &self,
        common: &Common,
        params: &SamplingParams,
        prompt: Vec<u32>,
        output: OutputMode,
    ) -> Request {
        let answer_reserve = match output {
            OutputMode::Chat { .. } => self.state.answer_reserve,
            OutputMode::Text => 0,
        };
        Request {
            priority: self.priority.unwrap_or(common.priority),
            client: self.owner,
            cache_salt: self.cache_salt(common),
            ..Request::new(prompt, SamplingParams { answer_reserve, ..params.clone() }, output)
        }
    }

    /// What must be equal for prefixes to be shared: the client's word, and its key if keys are kept apart.
    fn cache_salt(&self, common: &Common) -> Option<String> {
        let key = self.owner.filter(|_| self.state.isolate_prefix_cache).map(|key| hex(&key));
        match (key, &common.cache_salt) {
            // No client's word has a slash.
            (Some(key), salt) => Some(format!("{key}/{}", salt.as_deref().unwrap_or_default())),
            (None, salt) => salt.clone(),
        }
    }

    /// Feeds all events to `add`, until that has enough.
    async fn collect(
        &self,
        requests: Vec<Request>,
        mut add: impl FnMut(usize, Event) -> bool,
    ) -> Result<(), ApiError> {
        let mut events = self.submit(requests, Pace::Server)?;
        loop {
            match events.next().await {
                Next::Event(prompt, event) => {
                    if !add(prompt, event) {
                        break;
                    }
                }
                Next::Done => break,
                Next::Failed(cause) => return Err(sse::error(&cause, self.log.request_id())),
            }
        }
        events.complete();
        self.log.complete();
        Ok(())
    }

    /// Answers with a stream once there is something to send, so that what fails before is an ordinary error; or at once.
    async fn stream(&self, encoder: impl Encoder, mut requests: Vec<Request>) -> Result<Response, ApiError> {
        for Request { params, .. } in &mut requests {
            params.stream_interval = params.stream_interval.max(self.state.stream_interval);
        }
        let mut events = self.submit(requests, Pace::Client)?;
        let first = match self.state.eager_streams {
            true => VecDeque::new(),
            false => self.first(&mut events).await?,
        };
        let (keep_alive, style) = (self.state.sse_keep_alive, self.state.error_style);
        let rules = StreamRules { keep_alive, style };
        let chunks = Chunks::new(encoder, first, events, self.log.clone(), rules);
        Ok(self.events(chunks))
    }

    /// The events up to the first that there is something to send of.
    async fn first(&self, events: &mut Events) -> Result<VecDeque<(usize, Event)>, ApiError> {
        let mut first = VecDeque::new();
        loop {
            match events.next().await {
                Next::Event(prompt, event) => {
                    let started = matches!(event, Event::Started { .. });
                    first.push_back((prompt, event));
                    if !started {
                        return Ok(first);
                    }
                }
                // The stream will meet it again.
                Next::Done => return Ok(first),
                Next::Failed(cause) => return Err(sse::error(&cause, self.log.request_id())),
            }
        }
    }

    /// Answers at once, with the response as it is or the events as they come; the response is made meanwhile.
    fn background(
        &self,
        mut answer: ResponseAnswer,
        request: Request,
        stream: bool,
    ) -> Result<Response, ApiError> {
        let (response, keep) = answer.leave();
        let Some(keep) = keep else {
            return Err(ApiError::Internal { request_id: self.log.request_id().to_owned() });
        };
        let place = keep.begin(&self.identity.id, &response)?;
        let stored = place.stored();
        let events = self.submit(vec![request], Pace::Server)?;
        background::spawn(self.state, answer, events, place, self.log.clone());
        Ok(match stream {
            true => self.events(Follower::new(stored, 0, self.state.sse_keep_alive)),
            false => self.response("application/json", Body::from(response.to_string())),
        })
    }

    fn events(&self, source: impl Source) -> Response {
        let mut response = self.response(sse::CONTENT_TYPE, body::streaming(source));
        response.headers_mut().extend(sse::headers());
        response
    }

    fn submit(&self, requests: Vec<Request>, pace: Pace) -> Result<Events, ApiError> {
        let state = self.state;
        if state.log_requests {
            for request in &requests {
                let prompt = self.engine.harmony().tokenizer().decode(&request.prompt);
                let prompt: String = prompt.chars().take(state.max_log_len).collect();
                tracing::info!(request_id = self.log.request_id(), prompt, params = ?request.params, "prompt");
            }
        }
        if state.log_outputs {
            self.log.keep_output(self.engine.harmony(), state.max_log_len);
        }
        // None: the server has fallen asleep since the request came.
        let mut replicas = state.loaded().ok_or(ApiError::ShuttingDown)?;
        if let Some(rank) = self.rank {
            let known = usize::try_from(rank).ok().filter(|&rank| rank < state.replicas);
            let Some(rank) = known else {
                let last = state.replicas - 1;
                let message = format!("X-data-parallel-rank must be 0 to {last}, got {rank}.");
                return Err(ApiError::invalid("X-data-parallel-rank", message));
            };
            replicas = replicas.only(rank);
        }
        let prompt_tokens = requests.iter().map(|request| request.prompt.len()).sum();
        let account = state.rate_limits.admit(self.owner, prompt_tokens).map_err(|wait| {
            state.metrics.reject(Rejection::RateLimited);
            // A whole second more than needed is better than a little less.
            ApiError::RateLimited { seconds: wait.as_secs().saturating_add(1) }
        })?;
        let terms = Terms {
            names: [self.identity.id.clone(), self.id.clone()],
            running: Arc::clone(&state.running),
            form_param: self.form_param.clone(),
            pace,
            metrics: Arc::clone(&state.metrics),
            log: self.log.clone(),
            abort: state.abort(),
            timeout: state.request_timeout,
            stall_timeout: state.client_stall_timeout,
            account: account.clone(),
        };
        Events::submit(&replicas, requests, terms).map_err(|error| {
            account.refund(prompt_tokens);
            match error {
                SubmitError::Full => {
                    let queued = state.stats().iter().map(|stats| stats.running + stats.waiting).sum();
                    ApiError::Busy { seconds: state.retry_after(queued) }
                }
                error => refusal(&error, self.log.request_id()),
            }
        })
    }

    fn response(&self, content_type: &'static str, body: Body) -> Response {
        let mut response = Response::new(body);
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
        if let Ok(id) = HeaderValue::from_str(&self.id) {
            headers.insert(X_REQUEST_ID, id);
        }
        if content_type == "application/json"
            && let Ok(timing) = HeaderValue::from_str(&self.log.server_timing())
        {
            headers.insert(HeaderName::from_static("server-timing"), timing);
        }
        response
    }
}

/// Runs what takes time in proportion to a body's length, off the threads that serve connections.
pub(crate) async fn blocking<T: Send + 'static>(
    origin: &Origin,
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| {
        tracing::error!(request_id = origin.log.request_id(), %error, "reading a request failed");
        Err(ApiError::Internal { request_id: origin.log.request_id().to_owned() })
    })
}

pub(crate) fn context<'a>(state: &'a State, engine: &'a Engine, date: Option<&'a str>) -> Context<'a> {
    Context {
        defaults: &state.defaults,
        limits: Limits {
            vocab_size: engine.config().vocab_size,
            tokenizer: engine.harmony().tokenizer(),
            max_logprobs: state.max_logprobs,
            max_n: state.max_n,
        },
        model_names: &state.model_names,
        date,
        strict_reasoning_effort: state.strict_reasoning_effort,
        exclude_tools_of_choice_none: state.exclude_tools_of_choice_none,
        strict_arguments: state.strict_arguments,
        json: state.json,
        priorities: engine.policy() == SchedulingPolicy::Priority,
    }
}

/// A prompt's tokens and text, within the context.
pub(crate) fn tokenize(
    prompt: completion_request::Prompt,
    request: &CompletionRequest,
    engine: &Engine,
) -> Result<completion_answer::Prompt, ApiError> {
    let tokenizer = engine.harmony().tokenizer();
    let (mut ids, mut text) = match prompt {
        completion_request::Prompt::Text(text) => {
            bound_text(text.len(), engine)?;
            (tokenizer.encode_with_special(&text), Some(text))
        }
        completion_request::Prompt::Ids(ids) => (ids, None),
    };
    if let Some((truncation, max)) = truncation(&request.common, &request.params, engine) {
        truncation.apply(&mut ids, 0, 0, None, max)?;
        text = None;
    }
    check_length(ids.len(), request.params.max_tokens.unwrap_or(1).min(1), engine)?;
    let text = text.unwrap_or_else(|| tokenizer.decode(&ids));
    Ok(completion_answer::Prompt { text, ids })
}

/// Refuses texts that cannot fit before time is spent on their tokens.
pub(crate) fn bound_text(bytes: usize, engine: &Engine) -> Result<(), ApiError> {
    let max_model_len = engine.max_model_len();
    if bytes <= max_model_len.saturating_mul(MAX_BYTES_PER_TOKEN) {
        return Ok(());
    }
    let message = format!(
        "This model's maximum context length is {max_model_len} tokens. However, your prompt has {bytes} bytes of text. \
         Please reduce the length of the input prompt."
    );
    Err(ApiError::invalid("input_tokens", message))
}

/// Refuses answers that would be long by repeating prompts for each of `n` choices: their text, so many bytes, and so many ids.
fn bound_repeated(text: usize, ids: usize, n: usize) -> Result<(), ApiError> {
    let (text, ids) = (text.saturating_mul(n), ids.saturating_mul(MAX_ID_BYTES).saturating_mul(n));
    let bytes = text.saturating_add(ids);
    if bytes <= MAX_REPEATED_BYTES {
        return Ok(());
    }
    let field = if text > ids { "echo" } else { "return_token_ids" };
    let message = format!(
        "{field} must be of prompts so short, or for so few choices, that they take at most {MAX_REPEATED_BYTES} bytes in all \
         choices together, got {bytes}."
    );
    Err(ApiError::invalid(field, message))
}

/// Refuses a prompt that leaves no room for `least` tokens: what the engine would say as well, after time was spent on its text and on
/// a grammar.
fn check_length(prompt: usize, least: usize, engine: &Engine) -> Result<(), ApiError> {
    let max_model_len = engine.max_model_len();
    match prompt + least <= max_model_len {
        true => Ok(()),
        false => Err(too_long(&SubmitError::TooLong { prompt, max_model_len })),
    }
}

fn too_long(error: &SubmitError) -> ApiError {
    ApiError::invalid("input_tokens", error)
}

/// The engine's refusal, as the client is told.
fn refusal(error: &SubmitError, request_id: &str) -> ApiError {
    match error {
        SubmitError::Invalid(error) => error.clone().into(),
        SubmitError::TooLong { .. } => too_long(error),
        SubmitError::EmptyPrompt | SubmitError::TokenOutOfVocabulary { .. } | SubmitError::TooMany { .. } => {
            ApiError::invalid("prompt", error)
        }
        SubmitError::ShuttingDown => ApiError::ShuttingDown,
        other => {
            tracing::error!(request_id, error = %other, "the engine refused a request for an unknown reason");
            ApiError::Internal { request_id: request_id.to_owned() }
        }
    }
}

impl From<harmony::Error> for ApiError {
    fn from(error: harmony::Error) -> ApiError {
        match error {
            harmony::Error::Invalid { field, message } => {
                ApiError::invalid(&field, format!("{field}: {message}."))
            }
            harmony::Error::Vocabulary(_) => ApiError::body(error),
        }
    }
}
