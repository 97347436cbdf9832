//! `nibble verify`: compares two checkpoints, whatever their layouts.

use checkpoint::{Layout, Weights};

use crate::args::{Common, Verify};
use crate::failure::{Failure, Result};
use crate::model::{Model, threads};
use crate::ui::{Ui, green, out};

pub(crate) fn run(args: &Verify, common: &Common, ui: Ui) -> Result<()> {
    if args.tolerance.is_some_and(|t| !(t.is_finite() && t >= 0.0)) {
        return Err(Failure::input("--tolerance: expected a number of at least 0"));
    }
    let (a, b) = (Model::open(Some(&args.a), ui)?, Model::open(Some(&args.b), ui)?);
    let comparison = checkpoint::compare(&*packed(a), &*packed(b), args.tolerance, threads(common))?;
    if ui.json {
        ui.document(&comparison)?;
    } else {
        let close = comparison.within_tolerance.iter().map(|tensor| (tensor, ", within the tolerance"));
        for (tensor, verdict) in comparison.different.iter().map(|tensor| (tensor, "")).chain(close) {
            // Infinite without a number where there should be one, too.
            if tensor.max_abs.is_infinite() {
                out!(
                    "{}: {} values differ, with other shapes or with values that are no numbers",
                    tensor.name,
                    tensor.elements
                )?;
                continue;
            }
            out!(
                "{}: {} values differ, by at most {:.3e} (mean squared {:.3e}){verdict}",
                tensor.name,
                tensor.elements,
                tensor.max_abs,
                tensor.mse
            )?;
        }
        for (names, only) in [(&comparison.missing, &args.a), (&comparison.unknown, &args.b)] {
            for name in names {
                out!("{name}: only in {only}")?;
            }
        }
        let scales = &comparison.scales_of_one;
        if let Some(first) = scales.first() {
            ui.note(format_args!(
                "note: {} static scales of inputs or of the cache are in only one of the two, {first} the first",
                scales.len()
            ));
        }
        let (count, close) = (comparison.tensors, comparison.within_tolerance.len());
        if comparison.identical && close > 0 {
            out!("within the tolerance: {close} of {count} tensors; the others are identical")?;
        } else if comparison.identical {
            out!("{}: {count} tensors", green("identical"))?;
        } else {
            out!("different: {} of {count} tensors", comparison.different.len())?;
        }
    }
    if comparison.identical { Ok(()) } else { Err(Failure::no()) }
}

/// Fake-quantized weights are compared by the codes that they stand for.
fn packed(model: Model) -> Box<dyn Weights> {
    match model.checkpoint.layout() {
        Layout::FakeBf16 => Box::new(model.checkpoint.into_packed()),
        _ => Box::new(model.checkpoint),
    }
}
