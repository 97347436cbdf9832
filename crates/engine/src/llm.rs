//! The offline API: batches of prompts in, finished answers out.

use std::collections::BTreeMap;
use std::sync::mpsc;

use gptoss::TokenLogprobs;
use harmony::{ChatPrompt, ToolCall, Turn};

use crate::{
    Engine, Error, Event, FinishReason, OutputMode, Request, RequestHandle, SamplingParams, StopReason,
    SubmitError,
};

/// An engine for batches. Several may share one engine, also with a server.
#[derive(Clone)]
pub struct Llm {
    engine: Engine,
}

/// What is to be continued.
#[derive(Debug, Clone, PartialEq)]
pub enum Prompt {
    /// A text. Special tokens spelled in it are control tokens.
    Text(String),
    /// Token ids.
    Tokens(Vec<u32>),
    /// A conversation, to be answered.
    Chat(Box<ChatPrompt>),
}

/// How far a batch is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// Prompts whose answers are complete.
    pub finished: usize,
    /// All prompts.
    pub total: usize,
    /// Tokens of the prompts that were computed.
    pub prompt_tokens: usize,
    /// Tokens generated.
    pub generated_tokens: usize,
}

/// A prompt's answers.
#[derive(Debug, Clone, PartialEq)]
pub struct RequestOutput {
    /// The prompt.
    pub prompt_token_ids: Vec<u32>,
    /// One entry per prompt token, the first `None`, if asked.
    pub prompt_logprobs: Option<Vec<Option<TokenLogprobs>>>,
    /// `n` answers.
    pub outputs: Vec<CompletionOutput>,
    /// Prompt tokens that came from the prefix cache.
    pub cached_tokens: usize,
}

/// One answer.
#[derive(Debug, Clone, PartialEq)]
pub struct CompletionOutput {
    /// Which of the `n`.
    pub index: usize,
    /// The text; of a chat, its content.
    pub text: String,
    /// All tokens, stop token included.
    pub token_ids: Vec<u32>,
    /// One per token, if asked.
    pub logprobs: Vec<TokenLogprobs>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// What stopped it, if it was not the end of turn.
    pub stop_reason: Option<StopReason>,
    /// Of a chat, the reasoning.
    pub reasoning: Option<String>,
    /// Of a chat, the answer.
    pub content: Option<String>,
    /// Of a chat, the calls of tools.
    pub tool_calls: Vec<ToolCall>,
}

impl Llm {
    /// The offline API over an engine.
    pub fn new(engine: Engine) -> Llm {
        Llm { engine }
    }

    /// The engine.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Continues each prompt. `params`: one for all, or one for each. Results are in the order of the prompts.
    ///
    /// # Errors
    /// If a prompt is not valid, before any is begun; if the engine gives up on one, the others are cancelled.
    pub fn generate(
        &self,
        prompts: &[Prompt],
        params: &[SamplingParams],
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Vec<RequestOutput>, Error> {
        let total = prompts.len();
        if params.len() != 1 && params.len() != total {
            return Err(Error::Lengths { prompts: total, params: params.len() });
        }
        let mut requests = Vec::with_capacity(total);
        let mut drafts = Vec::with_capacity(total);
        for (index, prompt) in prompts.iter().enumerate() {
            let params = params[index % params.len()].clone();
            let (tokens, output) = self.render(prompt).map_err(|source| Error::Render { index, source })?;
            let request = self.engine.validate(Request::new(tokens, params, output));
            let request = request.map_err(|source| Error::Submit { index, source })?;
            drafts.push(Draft::new(&request));
            requests.push(request);
        }

        let (sender, events) = mpsc::channel::<(usize, Event)>();
        let mut waiting = requests.into_iter().enumerate().peekable();
        let mut handles: BTreeMap<usize, RequestHandle> = BTreeMap::new();
        let mut so_far = Progress { total, ..Progress::default() };
        let mut room = true;
        loop {
            while room && let Some((index, request)) = waiting.peek() {
                let (index, sender) = (*index, sender.clone());
                let sink = Box::new(move |event| sender.send((index, event)).is_ok());
                match self.engine.submit(request.clone(), sink) {
                    Ok(handle) => {
                        handles.insert(index, handle);
                        waiting.next();
                    }
                    // Others fill the queue, or this very batch: then one of its answers makes room.
                    Err(SubmitError::Full) if !handles.is_empty() => room = false,
                    Err(source) => return Err(Error::Submit { index, source }),
                }
            }
            if handles.is_empty() {
                return Ok(drafts.into_iter().map(Draft::finish).collect());
            }
            let (index, event) = events.recv().expect("a sender is at hand");
            match &event {
                Event::Failed(source) => return Err(Error::Failed { index, source: source.clone() }),
                Event::Started { .. } => so_far.prompt_tokens += drafts[index].prompt.len(),
                Event::Tokens { token_ids, .. } => so_far.generated_tokens += token_ids.len(),
                Event::Finished { .. } => {}
                Event::Done => {
                    handles.remove(&index);
                    so_far.finished += 1;
                    room = true;
                }
            }
            drafts[index].apply(event);
            progress(so_far);
        }
    }

    /// A prompt's tokens, and what is made of those that follow.
    fn render(&self, prompt: &Prompt) -> Result<(Vec<u32>, OutputMode), harmony::Error> {
        let harmony = self.engine.harmony();
        Ok(match prompt {
            Prompt::Text(text) => (harmony.tokenizer().encode_with_special(text), OutputMode::Text),
            Prompt::Tokens(tokens) => (tokens.clone(), OutputMode::Text),
            Prompt::Chat(conversation) => {
                let output = OutputMode::Chat { tools: conversation.tool_names(), begun: Vec::new() };
                (harmony.render_chat(conversation)?, output)
            }
        })
    }
}

/// A [`RequestOutput`] in the making.
struct Draft {
    prompt: Vec<u32>,
    prompt_logprobs: Option<Vec<Option<TokenLogprobs>>>,
    cached_tokens: usize,
    chat: bool,
    choices: Vec<(CompletionOutput, Turn)>,
}

impl Draft {
    fn new(request: &Request) -> Draft {
        let empty = |index| CompletionOutput {
            index,
            text: String::new(),
            token_ids: Vec::new(),
            logprobs: Vec::new(),
            finish_reason: FinishReason::Length,
            stop_reason: None,
            reasoning: None,
            content: None,
            tool_calls: Vec::new(),
        };
        Draft {
            prompt: request.prompt.clone(),
            prompt_logprobs: None,
            cached_tokens: 0,
            chat: matches!(request.output, OutputMode::Chat { .. }),
            choices: (0..request.params.n).map(|index| (empty(index), Turn::default())).collect(),
        }
    }

    fn apply(&mut self, event: Event) {
        match event {
            Event::Started { cached_tokens, prompt_logprobs, .. } => {
                (self.cached_tokens, self.prompt_logprobs) = (cached_tokens, prompt_logprobs);
            }
            Event::Tokens { choice, token_ids, text, deltas, logprobs } => {
                let (output, turn) = &mut self.choices[choice];
                output.token_ids.extend(token_ids);
                output.text.push_str(&text);
                output.logprobs.extend(logprobs);
                deltas.iter().for_each(|delta| turn.apply(delta));
            }
            Event::Finished { choice, reason, stop, .. } => {
                let (output, _) = &mut self.choices[choice];
                (output.finish_reason, output.stop_reason) = (reason, stop);
            }
            Event::Done | Event::Failed(_) => {}
        }
    }

    fn finish(self) -> RequestOutput {
        let chat = self.chat;
        let outputs = self.choices.into_iter().map(|(output, turn)| {
            if !chat {
                return output;
            }
            let Turn { reasoning, content, tool_calls } = turn.finish();
            CompletionOutput {
                text: content.clone().unwrap_or_default(),
                reasoning,
                content,
                tool_calls,
                ..output
            }
        });
        RequestOutput {
            outputs: outputs.collect(),
            prompt_token_ids: self.prompt,
            prompt_logprobs: self.prompt_logprobs,
            cached_tokens: self.cached_tokens,
        }
    }
}
