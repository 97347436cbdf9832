//! `nibble generate`: completions of one or many prompts, offline and batched.

use std::time::Instant;

use engine::{CompletionOutput, Llm, Prompt, RequestOutput, SamplingParams};
use gptoss::TokenLogprobs;
use harmony::{ChatMessage, ChatPrompt};
use serde_json::{Value, json};

use crate::args::{Common, Generate};
use crate::commands::lines::{Line, for_each_line};
use crate::engine::{sampling, start};
use crate::failure::{Failure, Result};
use crate::model::Model;
use crate::ui::{Ui, bold, dim, label, out};

/// Prompts in their order: raw ones and conversations may be mixed.
enum Input {
    Raw(Prompt),
    Chat(ChatPrompt),
}

pub(crate) fn run(args: &Generate, common: &Common, ui: Ui) -> Result<()> {
    let inputs = inputs(args)?;
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

fn inputs(args: &Generate) -> Result<Vec<Input>> {
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
    let mut inputs: Vec<Input> = args.prompt.iter().cloned().map(text).collect();
    if let Some(path) = &args.prompts {
        for_each_line(path, |number, line| {
            inputs.push(match Line::read(path, number, line)? {
                Line::Text(prompt) => text(prompt),
                Line::Tokens(ids) => Input::Raw(Prompt::Tokens(ids)),
                Line::Chat(prompt) => chat(*prompt),
            });
            Ok(())
        })?;
    }
    if inputs.is_empty() {
        return Err(Failure::input("expected a prompt, found none").hint("-p TEXT, or --prompts FILE"));
    }
    let only_chats = args.system.is_some() || args.developer.is_some() || args.reasoning_effort.is_some();
    if only_chats && inputs.iter().any(|input| matches!(input, Input::Raw(_))) {
        return Err(Failure::input(
            "--system, --developer and --reasoning-effort: expected chats, found a raw prompt",
        )
        .hint("--chat makes each prompt a user message"));
    }
    Ok(inputs)
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
