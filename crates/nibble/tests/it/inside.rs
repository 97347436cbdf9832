//! `tokens`, `harmony`, `logits`: thousands of cases for one start.

use serde_json::{Value, json};

use crate::{ids, ok, path, root, run_with_input, small};

fn golden(name: &str) -> Vec<Value> {
    let file: Value = serde_json::from_slice(&std::fs::read(root(name)).unwrap()).unwrap();
    file["cases"].as_array().unwrap().clone()
}

/// One document per line in, one per line out.
fn lines(args: &[&str], documents: impl Iterator<Item = String>) -> Vec<Value> {
    let input: String = documents.map(|document| document + "\n").collect();
    let outcome = run_with_input(args, input.as_bytes());
    assert_eq!(outcome.status, 0, "{}", outcome.stderr);
    let found: Vec<Value> = outcome.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(found.len(), input.lines().count());
    found
}

#[test]
fn tokens_of_all_golden_cases() {
    let cases = golden("testdata/tokenizer/encode.json");
    let texts = || cases.iter().map(|case| case["text"].to_string());
    for (found, case) in lines(&["tokens", "encode", "--lines", "-"], texts()).iter().zip(&cases) {
        assert_eq!(found["ids"], case["ids"], "{}", case["name"]);
    }
    let allowed = lines(&["tokens", "encode", "--lines", "--allow-special", "-"], texts());
    for (found, case) in allowed.iter().zip(&cases) {
        let expected = case.get("ids_with_special").unwrap_or(&case["ids"]);
        assert_eq!(&found["ids"], expected, "{}", case["name"]);
    }
    let cases = golden("testdata/tokenizer/decode.json");
    let decoded = lines(&["tokens", "decode", "--lines"], cases.iter().map(|case| case["ids"].to_string()));
    for (found, case) in decoded.iter().zip(&cases) {
        assert_eq!(found["text"], case["lossy_text"], "{}", case["name"]);
        assert_eq!(found["bytes_base64"], case["bytes_b64"], "{}", case["name"]);
    }
}

#[test]
fn tokens_of_one_text() {
    assert_eq!(ok(&["tokens", "encode", "--text", "hello world"]).json()["ids"], json!([24912, 2375]));
    assert_eq!(ok(&["tokens", "decode", "24912", "2375"]).json()["text"], "hello world");
    let tiny = ok(&["tokens", "encode", "--model", &small(), "--text", "<|end|>", "--allow-special"]);
    assert_eq!(tiny.json()["ids"], json!([4087]));
    let long = ok(&["tokens", "encode", &path("testdata/tokenizer/long.txt")]).json();
    assert_eq!(ids(&long["ids"]).len(), 357_685);
}

#[test]
fn harmony_of_all_golden_cases() {
    let mut cases = golden("testdata/harmony/render.json");
    cases.iter_mut().for_each(|case| case["harmony"] = true.into());
    let found = lines(&["harmony", "render", "--lines", "-"], cases.iter().map(Value::to_string));
    for (found, case) in found.iter().zip(&cases) {
        let expected = &case["openai_harmony"];
        assert_eq!(found.get("ids"), expected.get("tokens"), "{}", case["name"]);
        assert_eq!(found.get("error").is_some(), expected.get("error").is_some(), "{}", case["name"]);
    }
    let cases = golden("testdata/harmony/chat.json");
    let found = lines(&["harmony", "render", "--lines", "-"], cases.iter().map(Value::to_string));
    for (found, expected) in found.iter().zip(golden("testdata/harmony/chat-expected.json")) {
        assert_eq!(found.get("text"), expected.get("text"), "{}", expected["name"]);
    }
    let cases = golden("testdata/harmony/total.json");
    let documents =
        cases.iter().map(|c| json!({"ids": c["tokens"], "tools": ["get_current_weather"]}).to_string());
    for (found, case) in lines(&["harmony", "parse", "--lines", "-"], documents).iter().zip(&cases) {
        for field in ["reasoning", "content", "tool_calls"] {
            assert_eq!(found[field], case[field], "{}: {field}", case["name"]);
        }
    }
    let one = ok(&["harmony", "parse", "200005", "17196", "200008", "24912", "200002"]).json();
    assert_eq!((&one["content"], &one["messages"][0]["channel"]), (&"hello".into(), &"final".into()));
}

#[test]
fn logits_of_the_golden_prompt() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("logits.safetensors");
    let golden: Value =
        serde_json::from_slice(&std::fs::read(root("testdata/model/tiny-gpt-oss.json")).unwrap()).unwrap();
    let case = &golden["logits"]["raw"];
    let prompt = ids(&case["ids"]).iter().map(u64::to_string).collect::<Vec<_>>().join(",");
    let args = ["logits", &small(), "--ids", &prompt, "--layer", "3", "--out", out.to_str().unwrap()];
    ok(&args);
    let file = checkpoint::TensorFile::open(&out).unwrap();
    let floats = |file: &checkpoint::TensorFile, name: &str| -> (Vec<usize>, Vec<f32>) {
        let tensor = file.tensor(name).unwrap();
        let bytes = file.data(tensor).chunks_exact(4);
        (tensor.shape.clone(), bytes.map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect())
    };
    let (shape, found) = floats(&file, "logits");
    assert_eq!(shape, [ids(&case["ids"]).len(), 4096]);
    assert_eq!(floats(&file, "hidden").0, [shape[0], 256]);
    let golden = checkpoint::TensorFile::open(&root("testdata/model/tiny-gpt-oss.safetensors")).unwrap();
    let (_, expected) = floats(&golden, "raw.logits");
    for (row, &position) in ids(&case["positions"]).iter().enumerate() {
        for i in 0..4096 {
            let (f, e) = (found[position as usize * 4096 + i], expected[row * 4096 + i]);
            assert!((f - e).abs() < 2e-4, "position {position}, logit {i}: {f}, {e}");
        }
    }
}
