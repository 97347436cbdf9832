//! `nibble inspect`: what is in a checkpoint.

use std::collections::BTreeMap;

use checkpoint::{Checkpoint, LayerKind, MatrixId, StoredTensor, TensorFile, Weights, matrices};
use serde_json::json;

use crate::args::Inspect;
use crate::failure::{Failure, Result};
use crate::model::Model;
use crate::ui::{Ui, bold, bytes, dim, grouped, out};

pub(crate) fn run(args: &Inspect, ui: Ui) -> Result<()> {
    let model = Model::open(Some(&args.model), ui)?;
    match &args.tensor {
        Some(name) => tensor(&model.checkpoint, name, ui),
        None => overview(&model.checkpoint, ui),
    }
}

fn overview(checkpoint: &Checkpoint, ui: Ui) -> Result<()> {
    let config = checkpoint.config();
    let (parameters, total) = (checkpoint.parameters(), checkpoint.tensor_bytes());
    let bits = total as f64 * 8.0 / parameters as f64;
    let mut formats: BTreeMap<&str, usize> = BTreeMap::new();
    let mut scales = Vec::new();
    for id in matrices(config) {
        *formats.entry(checkpoint.format(id).name()).or_default() += 1;
        let own = checkpoint.global_scales(id);
        if !own.is_empty() {
            scales.push((checkpoint.name_of(id).to_owned(), own.to_vec()));
        }
    }
    if ui.json {
        let tensors: Vec<_> = checkpoint
            .stored()
            .map(|(file, t)| {
                json!({"name": t.name, "dtype": format!("{:?}", t.dtype), "shape": t.shape, "bytes": t.range.len(),
                    "file": file_name(file)})
            })
            .collect();
        let scales: serde_json::Map<_, _> = scales.into_iter().map(|(name, s)| (name, json!(s))).collect();
        ui.document(&json!({
            "layout": checkpoint.layout().name(), "parameters": parameters, "bytes": total, "bits_per_weight": bits,
            "layers": config.layer_kinds.len(), "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size, "experts": config.experts,
            "experts_per_token": config.experts_per_token, "vocabulary": config.vocab_size,
            "matrices": formats, "global_scales": scales, "tensors": tensors,
        }))?;
        return Ok(());
    }
    let sliding = config.layer_kinds.iter().filter(|&&k| k == LayerKind::Sliding).count();
    out!("{}  {}", bold("layout    "), checkpoint.layout().name())?;
    out!(
        "{}  {} layers ({sliding} see {} positions), hidden {}, {} experts of {} ({} per token), vocabulary {}",
        bold("shape     "),
        config.layer_kinds.len(),
        config.sliding_window,
        config.hidden_size,
        config.experts,
        config.intermediate_size,
        config.experts_per_token,
        grouped(config.vocab_size as u64)
    )?;
    out!("{}  {}", bold("parameters"), grouped(parameters))?;
    out!(
        "{}  {} in {} files, {bits:.3} bits per weight",
        bold("size      "),
        bytes(total),
        checkpoint.files().len()
    )?;
    let formats: Vec<String> = formats.iter().map(|(name, n)| format!("{n} in {name}")).collect();
    out!("{}  {}", bold("matrices  "), formats.join(", "))?;
    for (name, scales) in scales {
        out!("{}  {name} {}", bold("scale     "), summary(&scales))?;
    }
    out!("")?;
    for (file, tensor) in checkpoint.stored() {
        out!(
            "{:<64} {:<8} {:<22} {:>9}  {}",
            tensor.name,
            format!("{:?}", tensor.dtype),
            format!("{:?}", tensor.shape),
            bytes(tensor.range.len() as u64),
            dim(&file_name(file))
        )?;
    }
    Ok(())
}

fn summary(scales: &[f32]) -> String {
    match scales {
        [one] => format!("{one:e}"),
        many => {
            let (low, high) = many.iter().fold((f32::MAX, 0.0f32), |(l, h), &s| (l.min(s), h.max(s)));
            format!("{low:e} to {high:e}, {} of them", many.len())
        }
    }
}

fn tensor(checkpoint: &Checkpoint, name: &str, ui: Ui) -> Result<()> {
    let found = checkpoint.stored().find(|(_, t)| t.name == name);
    let (file, tensor) = found.ok_or_else(|| unknown(checkpoint, name))?;
    let first = &file.data(tensor)[..tensor.range.len().min(32)];
    let hex: Vec<String> = first.iter().map(|b| format!("{b:02x}")).collect();
    // What the model makes of it, if it is the main tensor of a matrix, or of several that are fused.
    let ids: Vec<_> = matrices(checkpoint.config()).filter(|&id| checkpoint.name_of(id) == name).collect();
    let values = match ids.first() {
        Some(&id) => Some((checkpoint.format(id).name(), statistics(checkpoint, &ids)?)),
        None => None,
    };
    if ui.json {
        ui.document(&json!({
            "name": tensor.name, "dtype": format!("{:?}", tensor.dtype), "shape": tensor.shape,
            "bytes": tensor.range.len(), "file": file_name(file), "first_bytes": hex.join(""),
            "values": values.map(|(format, s)| json!({"format": format, "min": s.min, "max": s.max,
                "mean": s.sum / s.count, "rms": (s.squares / s.count).sqrt()})),
        }))?;
        return Ok(());
    }
    out!("{}  {}", bold("name  "), tensor.name)?;
    out!("{}  {:?} {:?}, {}", bold("type  "), tensor.dtype, tensor.shape, bytes(tensor.range.len() as u64))?;
    out!("{}  {}", bold("file  "), file_name(file))?;
    out!("{}  {}", bold("bytes "), hex.join(" "))?;
    if let Some((format, s)) = values {
        let (mean, rms) = (s.sum / s.count, (s.squares / s.count).sqrt());
        out!("{}  {format}, {:e} to {:e}, mean {mean:.3e}, RMS {rms:.3e}", bold("values"), s.min, s.max)?;
    }
    Ok(())
}

struct Statistics {
    min: f32,
    max: f32,
    sum: f64,
    squares: f64,
    count: f64,
}

fn statistics(checkpoint: &Checkpoint, ids: &[MatrixId]) -> Result<Statistics> {
    let mut s = Statistics { min: f32::MAX, max: f32::MIN, sum: 0.0, squares: 0.0, count: 0.0 };
    for &id in ids {
        let (count, rows, cols) = id.kind.shape(checkpoint.config());
        let mut row = vec![0.0; cols];
        for expert in 0..count {
            let matrix = checkpoint.matrix(id, expert)?;
            for r in 0..rows {
                matrix.row(r, &mut row);
                for &v in &row {
                    (s.min, s.max) = (s.min.min(v), s.max.max(v));
                    s.sum += f64::from(v);
                    s.squares += f64::from(v) * f64::from(v);
                }
                s.count += cols as f64;
            }
        }
    }
    Ok(s)
}

fn unknown(checkpoint: &Checkpoint, name: &str) -> Failure {
    let near: Vec<&str> = checkpoint
        .stored()
        .map(|(_, t): (&TensorFile, &StoredTensor)| t.name.as_str())
        .filter(|other| other.contains(name) || name.contains(*other))
        .take(5)
        .collect();
    let failure = Failure::input(format!("--tensor: expected a tensor of the checkpoint, found {name:?}"));
    if near.is_empty() { failure } else { failure.hint(format!("did you mean {}?", near.join(", "))) }
}

fn file_name(file: &TensorFile) -> String {
    file.path().file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned())
}
