//! `config.json` in every spelling, and what is refused in it.

use checkpoint::*;
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::{open, testdata};

fn published() -> Value {
    json!({
        "architectures": ["GptOssForCausalLM"], "attention_bias": true, "eos_token_id": 200002,
        "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880,
        "initial_context_length": 4096, "intermediate_size": 2880, "max_position_embeddings": 131072,
        "model_type": "gpt_oss", "num_attention_heads": 64, "num_experts_per_tok": 4,
        "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32,
        "rms_norm_eps": 1e-5, "rope_theta": 150000,
        "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0,
            "original_max_position_embeddings": 4096, "rope_type": "yarn", "truncate": false},
        "sliding_window": 128, "swiglu_limit": 7.0, "tie_word_embeddings": false, "vocab_size": 201088
    })
}

fn read(value: &Value) -> Result<(Config, Vec<String>), Error> {
    Config::from_json(&value.to_string())
}

#[test]
fn all_spellings_of_the_published_model_are_one() {
    let expected = (Config::gpt_oss_20b(), Vec::new());
    assert_eq!(read(&published()).unwrap(), expected);

    let mut newer = published();
    let fields = newer.as_object_mut().unwrap();
    let mut rope = fields.remove("rope_scaling").unwrap();
    rope["rope_theta"] = fields.remove("rope_theta").unwrap();
    fields.insert("rope_parameters".to_owned(), rope);
    assert_eq!(read(&newer).unwrap(), expected);

    let original = json!({
        "num_hidden_layers": 24, "num_experts": 32, "experts_per_token": 4, "vocab_size": 201088,
        "hidden_size": 2880, "intermediate_size": 2880, "swiglu_limit": 7.0, "head_dim": 64,
        "num_attention_heads": 64, "num_key_value_heads": 8, "sliding_window": 128,
        "initial_context_length": 4096, "rope_theta": 150000, "rope_scaling_factor": 32.0,
        "rope_ntk_alpha": 1, "rope_ntk_beta": 32
    });
    assert_eq!(read(&original).unwrap(), expected);

    // Without a word about it, as transformers reads it.
    let mut silent = published();
    for value in [None, Some(Value::Null)] {
        silent.as_object_mut().unwrap().remove("rope_scaling");
        silent.as_object_mut().unwrap().extend(value.map(|value| ("rope_scaling".to_owned(), value)));
        let (config, warnings) = Config::from_value(&silent).unwrap();
        assert_eq!(config, Config::gpt_oss_20b());
        assert!(warnings.len() == 1 && warnings[0].contains("YaRN with a factor of 32"), "{warnings:?}");
    }
    // A window that no layer has need not be said.
    let mut full = published();
    full["layer_types"] = vec!["full_attention"; 24].into();
    full["sliding_window"] = Value::Null;
    let (config, warnings) = Config::from_value(&full).unwrap();
    assert!(config.layer_kinds.iter().all(|&kind| kind == LayerKind::Full) && warnings.is_empty());

    let mut without = published();
    without["rope_scaling"].as_object_mut().unwrap().remove("truncate");
    let (config, warnings) = read(&without).unwrap();
    assert_eq!(config, expected.0);
    assert!(warnings.len() == 1 && warnings[0].contains("truncate"), "{warnings:?}");
}

#[test]
fn golden_configurations_are_read() {
    let config = open("quant/tiny_gptoss/source").config().clone();
    assert_eq!((config.intermediate_size, config.rope.factor, config.max_context), (96, 4.0, 256));
    let config = open("model/original-mxfp4").config().clone();
    assert_eq!((config.max_context, config.rope.original_context), (8192, 256));
    assert_eq!(config.layer_kinds[..2], [LayerKind::Sliding, LayerKind::Full]);
}

#[test]
fn fields_that_cannot_be_are_refused_by_name() {
    let cases = [
        ("/model_type", json!("llama"), "model_type"),
        ("/hidden_size", json!(2881), "hidden_size"),
        ("/hidden_size", json!(0), "hidden_size"),
        ("/hidden_size", json!(-32), "hidden_size"),
        ("/hidden_size", json!(2880.5), "hidden_size"),
        ("/hidden_size", json!("2880"), "hidden_size"),
        ("/hidden_size", json!(u64::MAX), "hidden_size"),
        ("/hidden_size", Value::Null, "hidden_size"),
        ("/intermediate_size", json!(48), "intermediate_size"),
        ("/head_dim", json!(63), "head_dim"),
        ("/num_attention_heads", json!(63), "num_attention_heads"),
        ("/num_local_experts", json!(3), "num_experts_per_tok"),
        ("/experts_per_token", json!(2), "experts_per_token"),
        ("/initial_context_length", json!(2048), "initial_context_length"),
        ("/rope_scaling/rope_theta", json!(10000), "rope_theta"),
        ("/rope_scaling/rope_type", json!("linear"), "rope_type"),
        ("/rope_scaling/factor", json!(-1), "factor"),
        ("/rope_scaling/factor", Value::Null, "factor"),
        ("/sliding_window", Value::Null, "sliding_window"),
        ("/rope_scaling/factor", json!(1e300), "factor"),
        ("/rope_scaling/beta_slow", json!(32), "beta_fast"),
        ("/rope_scaling/attention_factor", json!(2), "attention_factor"),
        ("/rope_scaling/mscale", json!(1), "mscale"),
        ("/rope_scaling", json!([]), "rope_scaling"),
        ("/rope_theta", json!(1), "rope_theta"),
        ("/tie_word_embeddings", json!(true), "tie_word_embeddings"),
        ("/attention_bias", json!(false), "attention_bias"),
        ("/layer_types", json!(["full_attention"]), "layer_types"),
        ("/layer_types", json!(vec!["chunked_attention"; 24]), "layer_types"),
        ("/num_hidden_layers", json!(1_000_000), "num_hidden_layers"),
        ("/swiglu_limit", json!(0), "swiglu_limit"),
    ];
    for (path, value, named) in cases {
        let mut config = published();
        let (parent, field) = path.rsplit_once('/').unwrap();
        config.pointer_mut(parent).unwrap()[field] = value.clone();
        let error = read(&config).unwrap_err();
        assert!(
            matches!(&error, Error::Field { field, .. } if field.contains(named)),
            "{path} {value}: {error}"
        );
    }
    for name in ["vocab_size", "head_dim", "sliding_window", "rope_theta", "num_hidden_layers"] {
        let mut config = published();
        config.as_object_mut().unwrap().remove(name);
        let error = read(&config).unwrap_err();
        assert!(error.to_string().contains(name) && error.to_string().contains("nothing"), "{error}");
    }
    let mut huge = published();
    for name in ["hidden_size", "intermediate_size", "num_local_experts", "vocab_size"] {
        huge[name] = json!(1 << 24);
    }
    assert!(read(&huge).unwrap_err().to_string().contains("parameters"));
    assert!(matches!(Config::from_json("{"), Err(Error::Json { .. })));
    assert!(matches!(Config::from_json("[]"), Err(Error::Field { .. })));
}

#[test]
fn quantization_of_other_kinds_is_refused_by_name() {
    let cases = [
        (json!({"quant_method": "gptq"}), "quant_method"),
        (json!({}), "quant_method"),
        (json!(["mxfp4"]), "quantization_config"),
        (json!({"quant_method": "modelopt", "quant_algo": "FP8"}), "quant_algo"),
        (json!({"quant_method": "modelopt"}), "quant_algo"),
        (json!({"quant_method": "compressed-tensors", "format": "float-quantized"}), "format"),
        (
            json!({"quant_method": "modelopt", "quant_algo": "NVFP4",
                   "config_groups": {"group_0": {"weights": {"group_size": 32}}}}),
            "group_0.weights.group_size",
        ),
        (
            json!({"quant_method": "modelopt", "quant_algo": "NVFP4", "kv_cache_scheme": "INT4"}),
            "kv_cache_scheme",
        ),
    ];
    let text = std::fs::read_to_string(testdata("quant/tiny_gptoss/source/config.json")).unwrap();
    let tensors: &'static [u8] =
        std::fs::read(testdata("quant/tiny_gptoss/source/model.safetensors")).unwrap().leak();
    for (quantization, named) in cases {
        let mut config: Value = serde_json::from_str(&text).unwrap();
        config["quantization_config"] = quantization.clone();
        let error = Checkpoint::from_bytes(&config.to_string(), "{}", tensors).unwrap_err();
        assert!(error.to_string().contains(named), "{quantization}: {error}");
    }
    for (generation, named) in [
        (json!({"eos_token_id": "x"}), "eos_token_id"),
        (json!({"eos_token_id": [1, -1]}), "eos_token_id"),
        (json!({"temperature": -1}), "temperature"),
        (json!({"top_p": "high"}), "top_p"),
        (json!({"min_p": 2}), "min_p"),
        (json!({"repetition_penalty": 0}), "repetition_penalty"),
        (json!([]), "generation_config.json"),
    ] {
        let error = Checkpoint::from_bytes(&text, &generation.to_string(), tensors).unwrap_err();
        assert!(error.to_string().contains(named), "{generation}: {error}");
    }
}

fn any_json() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        (0u64..300).prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "[a-z_]{0,8}".prop_map(Value::from),
        Just(json!([])),
        Just(json!({})),
    ]
}

proptest! {
    /// Whatever stands in the fields, reading them ends, and what is accepted has sizes that can be computed with.
    #[test]
    fn no_configuration_panics(changes in prop::collection::vec((0usize..40, any_json()), 1..4)) {
        let mut config = published();
        for (index, value) in changes {
            let fields = config.as_object().unwrap().len();
            if index < fields {
                let name = config.as_object().unwrap().keys().nth(index).unwrap().clone();
                config[name] = value;
            } else if let Some(rope) = config["rope_scaling"].as_object_mut() {
                let name = rope.keys().nth(index % rope.len().max(1)).cloned();
                rope.extend(name.map(|name| (name, value)));
            }
        }
        if let Ok((config, _)) = read(&config) {
            let bytes: usize = matrices(&config).map(|id| {
                let (n, rows, cols) = id.kind.shape(&config);
                2 * n * rows * cols
            }).sum();
            prop_assert!(bytes as u64 <= 2 * config.parameters());
            prop_assert_eq!(Config::from_value(&config.to_json()).map(|(read, _)| read).ok(), Some(config));
        }
    }
}
