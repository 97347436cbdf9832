//! `nibble chat`: a conversation in the terminal.

use std::io::{BufRead, IsTerminal};
use std::sync::mpsc;
use std::time::Duration;

use engine::{Engine, Event, OutputMode, Request, SamplingParams};
use harmony::{ChatMessage, ChatPrompt, Delta, Turn};

use crate::args::{Chat, Common};
use crate::engine::{sampling, start};
use crate::failure::{Failure, Result, Status};
use crate::interrupt;
use crate::model::Model;
use crate::ui::{Ui, bold, dim, label, out, print};

pub(crate) fn run(args: &Chat, common: &Common, ui: Ui) -> Result<()> {
    let model = Model::open(args.model.as_deref(), ui)?;
    let name = model.name.clone();
    let running =
        start(model, &args.run, &args.capacity, &crate::engine::base(), common, ui, &mut |_, _| {})?;
    let params = sampling(&args.sampling, &running.generation);
    let mut prompt = ChatPrompt {
        reasoning_effort: args.reasoning_effort.clone(),
        date: Some(server::today()),
        ..ChatPrompt::new(args.system.iter().map(|text| ChatMessage::new("system", text)).collect())
    };
    let first = prompt.messages.len();
    let ask = std::io::stdin().is_terminal() && !ui.json;
    if ask {
        out!("{}", dim(&format!("{name}; an empty line or Ctrl-D ends the conversation")))?;
    }
    let mut line = String::new();
    loop {
        if ask {
            print(format_args!("{} ", bold(">")))?;
        }
        line.clear();
        let read = std::io::stdin().lock().read_line(&mut line);
        let read = read.map_err(|e| Failure::input(format!("standard input: {e}")))?;
        let question = line.trim();
        if read == 0 || question.is_empty() {
            return Ok(());
        }
        prompt.messages.push(ChatMessage::new("user", question));
        let left_out = shorten(&running.engine, &mut prompt, first)?;
        if left_out > 0 {
            ui.note(format_args!(
                "note: the conversation is longer than the context of {} tokens: its oldest {left_out} turns are left out",
                running.engine.max_model_len()
            ));
        }
        let mut begun = false;
        let turn = interrupt::gracefully(|| {
            answer(&running.engine, &prompt, &params, &mut |delta| {
                if ui.json {
                    return Ok(());
                }
                if let Some(part) = part(delta).filter(|_| !begun) {
                    print(format_args!("{}", label(part)))?;
                }
                begun = part(delta).is_some();
                show(delta)
            })
        })?;
        if ui.json {
            ui.document(&turn)?;
        }
        prompt.messages.push(ChatMessage {
            reasoning: turn.reasoning,
            ..ChatMessage::new("assistant", turn.content.unwrap_or_default())
        });
    }
}

/// Leaves out the oldest turns, each a question and its answer from the message `first` on, until there is room for an answer
/// to the last question. Gives their number.
fn shorten(engine: &Engine, prompt: &mut ChatPrompt, first: usize) -> Result<usize> {
    let mut left_out = 0;
    while prompt.messages.len() > first + 1
        && engine.harmony().render_chat(prompt)?.len() >= engine.max_model_len()
    {
        prompt.messages.drain(first..first + 2);
        left_out += 1;
    }
    Ok(left_out)
}

/// Streams one answer. An interrupt, or an error of `show`, cancels it and ends the command.
pub(crate) fn answer(
    engine: &Engine,
    prompt: &ChatPrompt,
    params: &SamplingParams,
    show: &mut dyn FnMut(&Delta) -> Result<()>,
) -> Result<Turn> {
    let (sender, receiver) = mpsc::channel();
    let output = OutputMode::Chat { tools: prompt.tool_names(), begun: Vec::new() };
    let request = Request::new(engine.harmony().render_chat(prompt)?, params.clone(), output);
    let handle = engine.submit(request, Box::new(move |event| sender.send(event).is_ok()))?;
    let mut turn = Turn::default();
    loop {
        match receiver.recv_timeout(Duration::from_millis(100)) {
            Ok(Event::Tokens { deltas, .. }) => {
                for delta in deltas {
                    show(&delta).inspect_err(|_| handle.cancel())?;
                    turn.apply(&delta);
                }
            }
            Ok(Event::Done) => return Ok(turn.finish()),
            Ok(Event::Failed(failure)) => return Err(failure.into()),
            Ok(Event::Started { .. } | Event::Finished { .. }) => {}
            Err(mpsc::RecvTimeoutError::Timeout) => {}
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                return Err(Failure::machine("the engine ended without an answer"));
            }
        }
        if interrupt::interrupted() {
            handle.cancel();
            return Err(Failure::new(Status::Interrupted, "interrupted"));
        }
    }
}

/// What a piece is of, for people; `None` at the end of a message.
pub(crate) fn part(delta: &Delta) -> Option<&'static str> {
    match delta {
        Delta::Reasoning(_) => Some("reasoning"),
        Delta::Content(_) => Some("answer"),
        Delta::CallStart { .. } | Delta::CallArguments { .. } => Some("calls"),
        Delta::End => None,
    }
}

/// Prints a piece as it comes: reasoning dimmed, calls by name, each message on lines of its own.
pub(crate) fn show(delta: &Delta) -> Result<()> {
    match delta {
        Delta::Reasoning(text) => print(format_args!("{}", dim(text))),
        Delta::Content(text) => print(format_args!("{text}")),
        Delta::CallStart { name, .. } => print(format_args!("{} ", bold(name))),
        Delta::CallArguments { text, .. } => print(format_args!("{text}")),
        Delta::End => out!(""),
    }
}
