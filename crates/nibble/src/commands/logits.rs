//! `nibble logits`: the logits of a prompt as a tensor file, for comparisons with other programs.

use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use gptoss::{BLOCK_TOKENS, Plan, SequencePlan};
use serde_json::{Map, json};

use crate::args::{Common, Logits};
use crate::failure::{Failure, Result};
use crate::interrupt;
use crate::loaded::backend;
use crate::model::Model;
use crate::ui::{Ui, out};

/// Positions per step, so that long prompts need no more memory than the result.
const CHUNK: usize = 256;

pub(crate) fn run(args: &Logits, common: &Common, ui: Ui) -> Result<()> {
    may_write(&args.out)?;
    let weights = Model::open(Some(&args.model), ui)?.weights(&args.run, common, ui)?;
    let config = weights.config().clone();
    if let Some(layer) = args.layer.filter(|&layer| layer >= config.layer_kinds.len()) {
        let layers = config.layer_kinds.len();
        return Err(Failure::input(format!("--layer: expected a layer below {layers}, found {layer}")));
    }
    let vocabulary = config.vocab_size;
    if let Some(id) = args.ids.iter().find(|&&id| id as usize >= vocabulary) {
        return Err(Failure::input(format!("--ids: expected ids below {vocabulary}, found {id}")));
    }
    let mut backend = backend(weights, &args.run, common, ui)?.at_work(&args.run);
    let blocks = args.ids.len().div_ceil(BLOCK_TOKENS);
    backend.allocate_kv(blocks, blocks)?;
    let (mut logits, mut hidden) = (Vec::new(), Vec::new());
    for (i, tokens) in args.ids.chunks(CHUNK).enumerate() {
        let sequence = SequencePlan {
            logits: true,
            hidden_after_layer: args.layer,
            ..SequencePlan::in_blocks(tokens, i * CHUNK, 0)
        };
        for output in backend.step(&Plan { sequences: vec![sequence] })? {
            if output.corrupted {
                return Err(gptoss::Error::Corrupted.into());
            }
            logits.extend(output.logits);
            hidden.extend(output.hidden);
        }
    }
    let positions = args.ids.len();
    let mut tensors = vec![("logits", config.vocab_size, logits)];
    if args.layer.is_some() {
        tensors.push(("hidden", config.hidden_size, hidden));
    }
    interrupt::gracefully(|| write(args, positions, &tensors))?;
    if ui.json {
        ui.document(&json!({
            "out": args.out.display().to_string(), "positions": positions, "vocabulary": config.vocab_size
        }))?;
    } else {
        out!("{}: logits of {positions} positions", args.out.display())?;
    }
    Ok(())
}

/// A file may be replaced; a link, a pipe or a device is not what a file's name is given to.
fn may_write(out: &Path) -> Result<()> {
    match std::fs::symlink_metadata(out) {
        Ok(there) if !there.is_file() => Err(Failure::input(format!(
            "--out: {}: expected nothing there, or a regular file to replace, found something else",
            out.display()
        ))),
        _ => Ok(()),
    }
}

/// A safetensors file under its final name only when it is complete. An interrupt ends the writing, and nothing is left.
fn write(args: &Logits, positions: usize, tensors: &[(&str, usize, Vec<f32>)]) -> Result<()> {
    let mut header = Map::new();
    let mut end = 0;
    for (name, width, values) in tensors {
        let start = end;
        end += values.len() * size_of::<f32>();
        let entry = json!({ "dtype": "F32", "shape": [positions, width], "data_offsets": [start, end] });
        header.insert((*name).to_owned(), entry);
    }
    let mut header = serde_json::Value::from(header).to_string();
    while !header.len().is_multiple_of(8) {
        header.push(' ');
    }
    let mut partial = args.out.clone().into_os_string();
    partial.push(format!(".{}.partial", std::process::id()));
    let partial = PathBuf::from(partial);
    let save = || {
        let mut file = std::io::BufWriter::new(std::fs::File::create_new(&partial)?);
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(header.as_bytes())?;
        for (_, width, values) in tensors {
            for row in values.chunks(*width) {
                if interrupt::interrupted() {
                    return Err(ErrorKind::Interrupted.into());
                }
                for value in row {
                    file.write_all(&value.to_le_bytes())?;
                }
            }
        }
        file.flush()?;
        std::fs::rename(&partial, &args.out)
    };
    save().map_err(|error| {
        let _ = std::fs::remove_file(&partial);
        Failure::io(&args.out, &error)
    })
}
