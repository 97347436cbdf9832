//! Model Optimizer's names of configurations, and the flags that they stand for.

use crate::args::{Activations, Algorithm, Quantize, Recipe};
use crate::failure::{Failure, Result};
use crate::ui::Ui;

/// Name, what is quantized, how, and what activations are in.
const CONFIGURATIONS: [(&str, Recipe, Algorithm, Activations); 9] = [
    ("NVFP4_DEFAULT_CFG", Recipe::Linear, Algorithm::Max, Activations::Nvfp4),
    ("W4A16_NVFP4_CFG", Recipe::Linear, Algorithm::Max, Activations::None),
    ("NVFP4_EXPERTS_ONLY_CFG", Recipe::Experts, Algorithm::Max, Activations::Nvfp4),
    ("NVFP4_MLP_ONLY_CFG", Recipe::Experts, Algorithm::Max, Activations::Nvfp4),
    ("NVFP4_FOUR_OVER_SIX_CFG", Recipe::Linear, Algorithm::FourOverSix, Activations::Nvfp4),
    ("NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG", Recipe::Linear, Algorithm::Mse, Activations::Nvfp4),
    ("NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG", Recipe::Linear, Algorithm::LocalHessian, Activations::Nvfp4),
    ("NVFP4_AWQ_FULL_CFG", Recipe::Linear, Algorithm::Awq, Activations::Nvfp4),
    ("nvfp4_default-kv_none-gptq", Recipe::Linear, Algorithm::Gptq, Activations::Nvfp4),
];

/// Replaces the name of a configuration by its flags, and says so.
pub(crate) fn expand(args: &mut Quantize, ui: Ui) -> Result<()> {
    let Some(name) = &args.config else { return Ok(()) };
    let Some(&(_, recipe, algorithm, activations)) =
        CONFIGURATIONS.iter().find(|(own, ..)| own.eq_ignore_ascii_case(name))
    else {
        let names = CONFIGURATIONS.map(|(name, ..)| name).join(", ");
        return Err(Failure::input(format!("--config: expected one of {names}; found {name}")));
    };
    let form = if activations == Activations::Nvfp4 { "W4A4" } else { "W4A16" };
    ui.note(format_args!(
        "{name}: --recipe {} --algorithm {} --activations {} ({form})",
        flag(&recipe),
        flag(&algorithm),
        flag(&activations)
    ));
    (args.recipe, args.algorithm, args.activations) = (recipe, algorithm, activations);
    Ok(())
}

/// A value as it is typed.
pub(crate) fn flag(value: &impl clap::ValueEnum) -> String {
    value.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}
