//! `nibble generate`: completions of one or many prompts, offline and batched.

use std::time::Instant;

use engine::{CompletionOutput, Error, Llm, Prompt, RequestOutput, SamplingParams, SubmitError};
use gptoss::TokenLogprobs;
use harmony::{ChatMessage, ChatPrompt};
use serde_json::{Value, json};

use crate::args::{Common, Generate};
use crate::commands::lines::{Line, for_each_line, name};
use crate::engine::{sampling, start};
use crate::failure::{Failure, Result};
use crate::model::Model;
use crate::ui::{Ui, bold, dim, label, out};

pub(crate) fn run(args: &Generate, common: &Common, ui: Ui) -> Result<()> {
    let (places, prompts): (Vec<String>, Vec<Prompt>) = prompts(args)?.into_iter().unzip();
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
    let mut bar = ui.progress("Generating", prompts.len() as u64);
    let outputs = llm.generate(&prompts, &[params], &mut |p| bar.set(p.finished as u64));
    drop(bar);
    let outputs = outputs.map_err(|error| refused(&places, error))?;
    if ui.json {
        ui.document(&document(&outputs, started.elapsed().as_secs_f64()))?;
        return Ok(());
    }
    for (i, (prompt, output)) in prompts.iter().zip(&outputs).enumerate() {
        if prompts.len() > 1 || args.n > 1 {
            out!("{}{}", if i > 0 { "\n" } else { "" }, bold(&format!("# {}", i + 1)))?;
        }
        for choice in &output.outputs {
            print(prompt, choice)?;
        }
    }
    Ok(())
}

/// What is to be completed in its order, each with the place where it was given.
fn prompts(args: &Generate) -> Result<Vec<(String, Prompt)>> {
    let chat = |prompt: ChatPrompt| {
        let own = [("system", &args.system), ("developer", &args.developer)];
        let own = own.into_iter().filter_map(|(role, text)| Some(ChatMessage::new(role, text.as_ref()?)));
        Prompt::Chat(Box::new(ChatPrompt {
            messages: own.chain(prompt.messages).collect(),
            reasoning_effort: prompt.reasoning_effort.or_else(|| args.reasoning_effort.clone()),
            date: prompt.date.or_else(|| Some(server::today())),
            add_generation_prompt: true,
            ..prompt
        }))
    };
    let text = |text: String| match args.chat {
        true => chat(ChatPrompt::new(vec![ChatMessage::new("user", text)])),
        false => Prompt::Text(text),
    };
    let flags = args.prompt.iter().zip(1..);
    let mut prompts: Vec<_> =
        flags.map(|(prompt, number)| (format!("prompt {number}"), text(prompt.clone()))).collect();
    if let Some(path) = &args.prompts {
        for_each_line(path, |number, line| {
            let prompt = match Line::read(path, number, line)? {
                Line::Text(prompt) => text(prompt),
                Line::Tokens(ids) => Prompt::Tokens(ids),
                Line::Chat(prompt) => chat(*prompt),
            };
            prompts.push((format!("{}: line {number}", name(path)), prompt));
            Ok(())
        })?;
    }
    if prompts.is_empty() {
        return Err(Failure::input("expected a prompt, found none").hint("-p TEXT, or --prompts FILE"));
    }
    let only_chats = args.system.is_some() || args.developer.is_some() || args.reasoning_effort.is_some();
    if only_chats && prompts.iter().any(|(_, prompt)| !matches!(prompt, Prompt::Chat(_))) {
        return Err(Failure::input(
            "--system, --developer and --reasoning-effort: expected chats, found a raw prompt",
        )
        .hint("--chat makes each prompt a user message"));
    }
    Ok(prompts)
}

/// An error of a prompt, told by the place where that was given.
fn refused(places: &[String], error: Error) -> Failure {
    let (index, failure): (usize, Failure) = match error {
        // Of a flag, whatever the prompt.
        Error::Submit { source: source @ SubmitError::Invalid(_), .. } => return source.into(),
        Error::Submit { index, source } => (index, source.into()),
        Error::Render { index, source } => (index, source.into()),
        Error::Failed { index, source } => (index, source.into()),
        error => return error.into(),
    };
    Failure { message: format!("{}: {}", places[index], failure.message), ..failure }
}

fn print(prompt: &Prompt, choice: &CompletionOutput) -> Result<()> {
    match prompt {
        Prompt::Text(text) => out!("{}{}", dim(text), choice.text)?,
        Prompt::Tokens(_) => out!("{}", choice.text)?,
        Prompt::Chat(_) => {
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
