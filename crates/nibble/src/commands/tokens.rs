//! `nibble tokens`: text to token ids and back.

use std::path::Path;
use std::sync::Arc;

use base64::Engine;
use serde_json::{Value, json};
use tokenizer::Tokenizer;

use crate::args::Tokens;
use crate::commands::lines::{for_each_line, json_line, read_text};
use crate::failure::{Failure, Result};
use crate::model::Model;
use crate::ui::Ui;

pub(crate) fn run(args: &Tokens, ui: Ui) -> Result<()> {
    match args {
        Tokens::Encode { text, file, model, lines, allow_special } => {
            let tokenizer = tokenizer_of(model.as_deref(), ui)?;
            let encode = |text: &str| {
                let ids =
                    if *allow_special { tokenizer.encode_with_special(text) } else { tokenizer.encode(text) };
                json!({ "ids": ids })
            };
            match (text, file) {
                (Some(text), _) => ui.document(&encode(text))?,
                (None, Some(path)) if *lines => for_each_line(path, |number, line| {
                    ui.document(&encode(&json_line::<String>(path, number, line)?))?;
                    Ok(())
                })?,
                (None, Some(path)) => ui.document(&encode(&read_text(path)?))?,
                (None, None) => return Err(Failure::input("expected --text or a file")),
            }
            Ok(())
        }
        Tokens::Decode { ids, model, lines } => {
            let tokenizer = tokenizer_of(model.as_deref(), ui)?;
            let decode = |ids: &[u32]| {
                let bytes = tokenizer.decode_bytes(ids);
                let base64 = base64::prelude::BASE64_STANDARD.encode(&bytes);
                json!({ "text": String::from_utf8_lossy(&bytes), "bytes_base64": base64 })
            };
            if *lines {
                let path = ids.first().map_or("-", String::as_str);
                return for_each_line(Path::new(path), |number, line| {
                    let ids: Vec<Value> = json_line(Path::new(path), number, line)?;
                    ui.document(&decode(&lenient_ids(&ids)))?;
                    Ok(())
                });
            }
            let ids = ids.iter().map(|id| parse_id(id)).collect::<Result<Vec<_>>>()?;
            if let Some(id) = ids.iter().find(|&&id| tokenizer.token_bytes(id).is_none()) {
                return Err(Failure::input(format!(
                    "expected ids of tokens, found {id}, which no token has"
                )));
            }
            ui.document(&decode(&ids))?;
            Ok(())
        }
    }
}

/// The tokenizer of a model, or the built-in vocabulary.
pub(crate) fn tokenizer_of(model: Option<&str>, ui: Ui) -> Result<Arc<Tokenizer>> {
    match model {
        None => Ok(Tokenizer::o200k_harmony()),
        // A tokenizer file by itself will do.
        Some(path) if Path::new(path).is_file() => Ok(Arc::new(Tokenizer::from_file(Path::new(path))?)),
        Some(name) => Model::open(Some(name), ui)?.tokenizer(),
    }
}

pub(crate) fn parse_id(text: &str) -> Result<u32> {
    text.trim_matches(',').parse().map_err(|_| Failure::input(format!("expected a token id, found {text:?}")))
}

/// Ids as a script may give them; what cannot be an id becomes one that no vocabulary has.
pub(crate) fn lenient_ids(ids: &[Value]) -> Vec<u32> {
    ids.iter().map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok()).unwrap_or(u32::MAX)).collect()
}
