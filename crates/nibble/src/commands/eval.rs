//! `nibble eval`: perplexity, and divergence from a reference.

use std::path::Path;

use checkpoint::Weights;
use harmony::{ChatPrompt, Harmony};
use tokenizer::Tokenizer;

use crate::args::{Common, Eval, EvalOptions, Measure, Run};
use crate::commands::lines::{read_json_lines, read_text};
use crate::failure::{Failure, Result};
use crate::loaded::backend;
use crate::model::Model;
use crate::ui::{Ui, out};

pub(crate) fn run(args: &Eval, common: &Common, ui: Ui) -> Result<()> {
    let (reference, options) = match &args.measure {
        Measure::Perplexity(options) => (None, options),
        Measure::Divergence { reference, options } => (Some(reference), options),
    };
    let model = Model::open(Some(&args.model), ui)?;
    let windows = windows(&model, options)?;
    let weights = model.weights(&options.run, common, ui)?;
    check_ids(&windows, weights.config().vocab_size)?;
    let mut model = backend(weights, &options.run, common, ui)?.at_work(&options.run);
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
        Some(name) => {
            let weights = Model::open(Some(name), ui)?.weights(&Run::exact(), common, ui)?;
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

fn windows(model: &Model, options: &EvalOptions) -> Result<Vec<Vec<u32>>> {
    let input = &options.input;
    let context = options.context as usize;
    let windows = if let Some(path) = &input.text {
        text_windows(&*model.tokenizer()?, &read_text(path)?, context, options.windows)
    } else if let Some(path) = &input.conversations {
        conversation_windows(&*model.harmony()?, path, options.windows)?
    } else if let Some(path) = &input.ids {
        let lines: Vec<Vec<u32>> = read_json_lines(path)?;
        lines.into_iter().take(options.windows.unwrap_or(usize::MAX)).collect()
    } else {
        return Err(Failure::input("expected --text, --conversations or --ids"));
    };
    let windows: Vec<Vec<u32>> = windows.into_iter().filter(|window| window.len() >= 2).collect();
    if windows.is_empty() {
        return Err(Failure::input(format!("expected at least one window of {context} tokens, found fewer"))
            .hint("--context makes windows shorter"));
    }
    let longest = windows.iter().map(Vec::len).max().unwrap_or(0);
    let limit = model.checkpoint.config().max_context;
    if longest > limit {
        return Err(Failure::input(format!("expected windows of at most {limit} tokens, found {longest}")));
    }
    Ok(windows)
}

pub(crate) fn text_windows(
    tokenizer: &Tokenizer,
    text: &str,
    context: usize,
    limit: Option<usize>,
) -> Vec<Vec<u32>> {
    evaluate::windows(&tokenizer.encode(text), context, limit)
}

fn conversation_windows(harmony: &Harmony, path: &Path, limit: Option<usize>) -> Result<Vec<Vec<u32>>> {
    let prompts: Vec<ChatPrompt> = read_json_lines(path)?;
    prompts
        .into_iter()
        .take(limit.unwrap_or(usize::MAX))
        .enumerate()
        .map(|(i, prompt)| {
            let prompt = ChatPrompt { add_generation_prompt: false, ..prompt };
            harmony
                .render_chat(&prompt)
                .map_err(|e| Failure::input(format!("{}: conversation {}: {e}", path.display(), i + 1)))
        })
        .collect()
}

fn check_ids(windows: &[Vec<u32>], vocabulary: usize) -> Result<()> {
    match windows.iter().flatten().find(|&&id| id as usize >= vocabulary) {
        Some(id) => Err(Failure::input(format!("expected ids below {vocabulary}, found {id}"))),
        None => Ok(()),
    }
}
