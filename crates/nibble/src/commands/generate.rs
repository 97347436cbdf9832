//! `nibble generate`: completions of one or many prompts, offline and batched.

use std::fmt::Display;
use std::time::Instant;

use engine::{
    CompletionOutput, Engine, Llm, OutputMode, Prompt, Request, RequestOutput, SamplingParams, SubmitError,
};
use gptoss::TokenLogprobs;
use harmony::{ChatMessage, ChatPrompt};
use serde_json::{Value, json};

use crate::args::{Common, Generate};
use crate::commands::lines::{Line, for_each_line, name};
use crate::engine::{sampling, start};
use crate::failure::{Failure, Result};
use crate::model::Model;
use crate::ui::{Ui, bold, dim, label, out};

/// Raw prompts and conversations may be mixed.
enum Input {
    Raw(Prompt),
    Chat(ChatPrompt),
}

pub(crate) fn run(args: &Generate, common: &Common, ui: Ui) -> Result<()> {
    let (places, inputs): (Vec<String>, Vec<Input>) = inputs(args)?.into_iter().unzip();
    let started = Instant::now();
    let running = start(
        Model::open(args.model.as_deref(), ui)?,
        &args.run,
        &args.capacity,
        &crate::engine::base(),
        common,
        ui,
        &mut |_, _| {},
    )?;
    let params = SamplingParams {
        n: args.n,
        logprobs: args.logprobs,
        ignore_eos: args.ignore_eos,
        ..sampling(&args.sampling, &running.generation)
    };
    check(&running.engine, &places, &inputs, &params)?;
    let llm = Llm::new(running.engine);
    let mut bar = ui.progress("Generating", inputs.len() as u64);
    let outputs = complete(&llm, &inputs, &params, &mut |done| bar.set(done as u64))?;
    drop(bar);
    if ui.json {
        ui.document(&document(&outputs, started.elapsed().as_secs_f64()))?;
        return Ok(());
    }
    for (i, (input, output)) in inputs.iter().zip(&outputs).enumerate() {
        if inputs.len() > 1 || args.n > 1 {
            out!("{}{}", if i > 0 { "\n" } else { "" }, bold(&format!("# {}", i + 1)))?;
        }
        for choice in &output.outputs {
            print(input, choice)?;
        }
    }
    Ok(())
}

/// What is to be completed in its order, each with the place where it was given.
fn inputs(args: &Generate) -> Result<Vec<(String, Input)>> {
    let chat = |prompt: ChatPrompt| {
        let own = [("system", &args.system), ("developer", &args.developer)];
        let own = own.into_iter().filter_map(|(role, text)| Some(ChatMessage::new(role, text.as_ref()?)));
        Input::Chat(ChatPrompt {
            messages: own.chain(prompt.messages).collect(),
            reasoning_effort: prompt.reasoning_effort.or_else(|| args.reasoning_effort.clone()),
            date: prompt.date.or_else(|| Some(server::today())),
            add_generation_prompt: true,
            ..prompt
        })
    };
    let text = |text: String| match args.chat {
        true => chat(ChatPrompt::new(vec![ChatMessage::new("user", text)])),
        false => Input::Raw(Prompt::Text(text)),
    };
    let flags = args.prompt.iter().zip(1..);
    let mut inputs: Vec<_> =
        flags.map(|(prompt, number)| (format!("prompt {number}"), text(prompt.clone()))).collect();
    if let Some(path) = &args.prompts {
        for_each_line(path, |number, line| {
            let input = match Line::read(path, number, line)? {
                Line::Text(prompt) => text(prompt),
                Line::Tokens(ids) => Input::Raw(Prompt::Tokens(ids)),
                Line::Chat(prompt) => chat(*prompt),
            };
            inputs.push((format!("{}: line {number}", name(path)), input));
            Ok(())
        })?;
    }
    if inputs.is_empty() {
        return Err(Failure::input("expected a prompt, found none").hint("-p TEXT, or --prompts FILE"));
    }
    let only_chats = args.system.is_some() || args.developer.is_some() || args.reasoning_effort.is_some();
    if only_chats && inputs.iter().any(|(_, input)| matches!(input, Input::Raw(_))) {
        return Err(Failure::input(
            "--system, --developer and --reasoning-effort: expected chats, found a raw prompt",
        )
        .hint("--chat makes each prompt a user message"));
    }
    Ok(inputs)
}

/// Refuses what cannot be completed before anything is.
fn check(engine: &Engine, places: &[String], inputs: &[Input], params: &SamplingParams) -> Result<()> {
    let harmony = engine.harmony();
    for (place, input) in places.iter().zip(inputs) {
        let refused = |error: &dyn Display| Failure::input(format!("{place}: {error}"));
        let prompt = match input {
            Input::Raw(Prompt::Text(text)) => harmony.tokenizer().encode_with_special(text),
            Input::Raw(Prompt::Tokens(ids)) => ids.clone(),
            Input::Chat(prompt) => harmony.render_chat(prompt).map_err(|error| refused(&error))?,
        };
        engine.validate(Request::new(prompt, params.clone(), OutputMode::Text)).map_err(
            |error| match error {
                // Of a flag, whatever the prompt.
                SubmitError::Invalid(_) => error.into(),
                _ => refused(&error),
            },
        )?;
    }
    Ok(())
}

/// Runs both kinds as one batch each and puts the results in the order of the inputs.
fn complete(
    llm: &Llm,
    inputs: &[Input],
    params: &SamplingParams,
    progress: &mut dyn FnMut(usize),
) -> Result<Vec<RequestOutput>> {
    let (mut raw, mut chats) = (Vec::new(), Vec::new());
    for input in inputs {
        match input {
            Input::Raw(prompt) => raw.push(prompt.clone()),
            Input::Chat(prompt) => chats.push(prompt.clone()),
        }
    }
    let params = std::slice::from_ref(params);
    let raw_outputs = llm.generate(&raw, params, &mut |p| progress(p.finished))?;
    let done = raw.len();
    let chat_outputs = llm.chat(&chats, params, &mut |p| progress(done + p.finished))?;
    let (mut raw_outputs, mut chat_outputs) = (raw_outputs.into_iter(), chat_outputs.into_iter());
    let next = |input: &Input| match input {
        Input::Raw(_) => raw_outputs.next(),
        Input::Chat(_) => chat_outputs.next(),
    };
    Ok(inputs.iter().filter_map(next).collect())
}

fn print(input: &Input, choice: &CompletionOutput) -> Result<()> {
    match input {
        Input::Raw(Prompt::Text(text)) => out!("{}{}", dim(text), choice.text)?,
        Input::Raw(Prompt::Tokens(_)) => out!("{}", choice.text)?,
        Input::Chat(_) => {
            if let Some(reasoning) = &choice.reasoning {
                out!("{}{}", label("reasoning"), dim(reasoning))?;
            }
            for call in &choice.tool_calls {
                out!("{}{} {}", label("calls"), bold(&call.name), call.arguments)?;
            }
            if let Some(content) = &choice.content {
                out!("{}{content}", label("answer"))?;
            }
        }
    }
    Ok(())
}

fn document(outputs: &[RequestOutput], seconds: f64) -> Value {
    let logprob = |(id, logprob): &(u32, f32)| json!({"id": id, "logprob": logprob});
    let logprobs = |entries: &[TokenLogprobs]| -> Vec<Value> {
        let entry = |e: &TokenLogprobs| json!({"id": e.token, "logprob": e.logprob, "top": e.top.iter().map(logprob).collect::<Vec<_>>()});
        entries.iter().map(entry).collect()
    };
    let choice = |c: &CompletionOutput| {
        let asked = (!c.logprobs.is_empty()).then(|| logprobs(&c.logprobs));
        json!({"token_ids": c.token_ids, "text": c.text, "reasoning": c.reasoning, "content": c.content,
            "tool_calls": c.tool_calls, "finish_reason": c.finish_reason, "logprobs": asked})
    };
    let output = |o: &RequestOutput| json!({"prompt_token_ids": o.prompt_token_ids, "choices": o.outputs.iter().map(choice).collect::<Vec<_>>()});
    let prompt_tokens: usize = outputs.iter().map(|o| o.prompt_token_ids.len()).sum();
    let completion_tokens: usize =
        outputs.iter().flat_map(|o| &o.outputs).map(|choice| choice.token_ids.len()).sum();
    json!({"outputs": outputs.iter().map(output).collect::<Vec<_>>(), "seconds": seconds,
        "prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens})
}
