//! `nibble harmony`: messages to prompts, and generated ids to messages.

use std::path::Path;

use harmony::{Document, Turn};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::args::Harmony;
use crate::commands::lines::{for_each_line, json_line, name, read_text};
use crate::commands::tokens::{lenient_ids, parse_id, tokenizer_of};
use crate::failure::{Failure, Result};
use crate::ui::Ui;

/// What `harmony parse` reads: the ids after `<|start|>assistant`, and the names of the declared tools.
#[derive(Deserialize)]
struct Generated {
    ids: Vec<Value>,
    #[serde(default)]
    tools: Vec<String>,
}

pub(crate) fn run(args: &Harmony, ui: Ui) -> Result<()> {
    match args {
        Harmony::Render { file, model, lines } => {
            let harmony = harmony::Harmony::new(tokenizer_of(model.as_deref(), ui)?)?;
            let render = |text: &str| {
                let ids = harmony.render_document(&Document::from_json(text)?)?;
                Ok::<_, harmony::Error>(json!({ "text": harmony.tokenizer().decode(&ids), "ids": ids }))
            };
            if *lines {
                return for_each_line(file, |_, line| {
                    ui.document(&render(line).unwrap_or_else(|error| json!({ "error": error.to_string() })))?;
                    Ok(())
                });
            }
            ui.document(&render(&read_text(file)?)?)?;
            Ok(())
        }
        Harmony::Parse { input, model, lines } => {
            let harmony = harmony::Harmony::new(tokenizer_of(model.as_deref(), ui)?)?;
            let file = input.first().map_or("-", String::as_str);
            if *lines {
                return for_each_line(Path::new(file), |number, line| {
                    let generated: Generated = json_line(Path::new(file), number, line)?;
                    ui.document(&parse(&harmony, &lenient_ids(&generated.ids), &generated.tools))?;
                    Ok(())
                });
            }
            let is_file = input.len() <= 1 && !file.bytes().all(|b| b.is_ascii_digit());
            let generated = if is_file {
                let path = Path::new(file);
                let failed = |e: serde_json::Error| Failure::input(format!("{}: {e}", name(path)));
                let document: Value = serde_json::from_str(&read_text(path)?).map_err(failed)?;
                let document = if document.is_array() { json!({ "ids": document }) } else { document };
                serde_json::from_value(document).map_err(failed)?
            } else {
                let ids = input.iter().map(|id| parse_id(id)).collect::<Result<Vec<_>>>()?;
                Generated { ids: ids.into_iter().map(Value::from).collect(), tools: Vec::new() }
            };
            ui.document(&parse(&harmony, &lenient_ids(&generated.ids), &generated.tools))?;
            Ok(())
        }
    }
}

fn parse(harmony: &harmony::Harmony, ids: &[u32], tools: &[String]) -> Value {
    let mut parser = harmony.parser(tools);
    let mut turn = Turn::default();
    for &id in ids {
        parser.push(id).iter().for_each(|delta| turn.apply(delta));
    }
    parser.finish().iter().for_each(|delta| turn.apply(delta));
    let Turn { reasoning, content, tool_calls } = turn.finish();
    json!({
        "messages": parser.messages(), "reasoning": reasoning, "content": content, "tool_calls": tool_calls,
        "repairs": parser.repairs(),
    })
}
