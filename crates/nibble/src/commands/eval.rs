//! `nibble eval`: perplexity, and divergence from a reference.

use std::path::Path;

use checkpoint::Weights;
use harmony::ChatPrompt;
use serde_json::{Map, Value};

use crate::args::{Common, Eval, EvalInput, EvalOptions, Measure, Run};
use crate::commands::lines::{for_each_line, json_line, name, read_text};
use crate::failure::{Failure, Result};
use crate::loaded::backend;
use crate::model::Model;
use crate::report::AskedFor;
use crate::ui::{Ui, out};

pub(crate) fn run(args: &Eval, common: &Common, ui: Ui) -> Result<()> {
    let (reference, options) = match &args.measure {
        Measure::Perplexity(options) => (None, options),
        Measure::Divergence { reference, options } => (Some(reference), options),
    };
    let model = Model::open(Some(&args.model), ui)?;
    let reference = reference.map(|name| Model::open(Some(name), ui)).transpose()?;
    let mut limit = model.checkpoint.config().max_context;
    if let Some(reference) = &reference {
        let (own, its) = (model.checkpoint.config(), reference.checkpoint.config());
        if its.vocab_size != own.vocab_size {
            return Err(Failure::input(format!(
                "--reference: {}: expected a vocabulary of {} tokens, as {} has, found {}",
                reference.name, own.vocab_size, model.name, its.vocab_size
            )));
        }
        limit = limit.min(its.max_context);
    }
    let windows = windows(&model, limit, options)?;
    let asked_for = AskedFor::by(&model.checkpoint);
    let weights = model.weights(&options.run, common, ui)?;
    let loaded = backend(weights, &options.run, common, ui)?;
    if let Some(left_out) = asked_for.beside(&options.run, &loaded).hint() {
        ui.note(format_args!("note: {left_out}"));
    }
    let mut model = loaded.at_work(&options.run);
    let mut bar = ui.progress("Measuring", windows.len() as u64);
    match reference {
        None => {
            let found = evaluate::perplexity(&mut *model, &windows, &mut |done| bar.set(done as u64))?;
            drop(bar);
            if ui.json {
                ui.document(&found)?;
            } else {
                out!("nll         {:.6} nats per token", found.nll)?;
                out!("perplexity  {:.4}", found.perplexity)?;
                out!("tokens      {} in {} windows", found.tokens, found.windows)?;
            }
        }
        Some(reference) => {
            let weights = reference.weights(&Run::exact(), common, ui)?;
            let mut reference = backend(weights, &Run::exact(), common, ui)?;
            let found = evaluate::divergence(&mut *model, &mut reference, &windows, &mut |done| {
                bar.set(done as u64);
            })?;
            drop(bar);
            if ui.json {
                ui.document(&found)?;
            } else {
                out!("KL mean         {:.6} nats per token", found.kl_mean)?;
                out!("KL p99          {:.6}", found.kl_p99)?;
                out!("top-1 agreement {:.3} %", found.top1_agreement * 100.0)?;
                out!("nll             {:.6} (reference {:.6})", found.nll, found.nll_reference)?;
                out!("tokens          {}", found.tokens)?;
            }
        }
    }
    Ok(())
}

/// What is scored: of lines those of at least two tokens. No window is longer than `limit`, the context.
fn windows(model: &Model, limit: usize, options: &EvalOptions) -> Result<Vec<Vec<u32>>> {
    let EvalInput { text, conversations, ids } = &options.input;
    match (text, conversations.as_ref().or(ids.as_ref())) {
        (Some(path), _) => {
            let context = options.context as usize;
            if context > limit {
                return Err(Failure::input(format!(
                    "--context: expected at most {limit}, the model's context, found {context}"
                )));
            }
            let ids = model.tokenizer()?.encode(&read_text(path)?);
            if ids.len() < context {
                return Err(Failure::input(format!(
                    "{}: expected at least one window of {context} tokens, found {} tokens",
                    name(path),
                    ids.len()
                ))
                .hint("--context makes windows shorter"));
            }
            Ok(evaluate::windows(&ids, context, options.windows))
        }
        (None, Some(path)) => lines(model, limit, path, conversations.is_some(), options.windows),
        (None, None) => Err(Failure::input("expected --text, --conversations or --ids")),
    }
}

/// The windows of a file with one per line: conversations, or ids.
fn lines(
    model: &Model,
    limit: usize,
    path: &Path,
    conversations: bool,
    most: Option<usize>,
) -> Result<Vec<Vec<u32>>> {
    let vocabulary = model.checkpoint.config().vocab_size;
    let harmony = conversations.then(|| model.harmony()).transpose()?;
    let mut windows = Vec::new();
    for_each_line(path, |number, line| {
        if most.is_some_and(|most| windows.len() >= most) {
            return Ok(());
        }
        let failed = |what: String| Failure::input(format!("{}: line {number}: {what}", name(path)));
        let ids: Vec<u32> = match &harmony {
            None => json_line(path, number, line)?,
            Some(harmony) => {
                let document: Map<String, Value> = json_line(path, number, line)?;
                let prompt: ChatPrompt =
                    serde_json::from_value(document.into()).map_err(|e| failed(e.to_string()))?;
                let prompt = ChatPrompt { add_generation_prompt: false, ..prompt };
                harmony.render_chat(&prompt).map_err(|e| failed(e.to_string()))?
            }
        };
        if let Some(id) = ids.iter().find(|&&id| id as usize >= vocabulary) {
            return Err(failed(format!("expected ids below {vocabulary}, found {id}")));
        }
        if ids.len() > limit {
            let found = ids.len();
            return Err(failed(format!(
                "expected at most {limit} tokens, the model's context, found {found}"
            )));
        }
        // A first token is not predicted.
        if ids.len() >= 2 {
            windows.push(ids);
        }
        Ok(())
    })?;
    if windows.is_empty() {
        let what = "expected a line of at least two tokens, found none";
        return Err(Failure::input(format!("{}: {what}", name(path))));
    }
    Ok(windows)
}
