//! Every case of `testdata/tokenizer`, with the built-in vocabulary and with the same one read from files.

use std::sync::Arc;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use sha2::{Digest, Sha256};
use tokenizer::{Detokenizer, Tokenizer};

use crate::{ids, json, root, tiny};

/// The built-in vocabulary in the form of tiktoken's file.
fn tiktoken_file(tokenizer: &Tokenizer) -> String {
    (0..199_998)
        .map(|id| format!("{} {id}\n", BASE64_STANDARD.encode(tokenizer.token_bytes(id).unwrap())))
        .collect()
}

/// The same in the form of `tokenizer.json`, with every split of a token into two tokens as a merge, as published files have.
fn hugging_face_file(tokenizer: &Tokenizer) -> String {
    let printable = |b: &u8| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let mut alphabet = [' '; 256];
    let mut next = 0x100;
    for byte in 0..=255u8 {
        alphabet[usize::from(byte)] = if printable(&byte) {
            char::from(byte)
        } else {
            next += 1;
            char::from_u32(next - 1).unwrap()
        };
    }
    let spell = |bytes: &[u8]| bytes.iter().map(|&b| alphabet[usize::from(b)]).collect::<String>();
    let known: std::collections::HashSet<&[u8]> =
        (0..199_998).map(|id| tokenizer.token_bytes(id).unwrap()).collect();
    let mut vocab = serde_json::Map::new();
    let mut merges = Vec::new();
    for id in 0..199_998 {
        let bytes = tokenizer.token_bytes(id).unwrap();
        vocab.insert(spell(bytes), id.into());
        for at in 1..bytes.len() {
            let (left, right) = bytes.split_at(at);
            if known.contains(left) && known.contains(right) {
                merges.push(serde_json::json!([spell(left), spell(right)]));
            }
        }
    }
    assert_eq!(merges.len(), 446_189);
    let added: Vec<_> = (199_998..201_088)
        .map(|id| serde_json::json!({"id": id, "content": tokenizer.decode(&[id])}))
        .collect();
    let pre_tokenizer = &json("models/tiny-gpt-oss/tokenizer.json")["pre_tokenizer"];
    serde_json::json!({
        "added_tokens": added,
        "pre_tokenizer": pre_tokenizer,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": true},
    })
    .to_string()
}

fn tokenizers() -> Vec<(&'static str, Arc<Tokenizer>)> {
    let built_in = Tokenizer::o200k_harmony();
    let file = tiktoken_file(&built_in);
    let (cut, _) = file.trim_end().rsplit_once('\n').unwrap();
    let error = Tokenizer::from_tiktoken(cut.as_bytes()).err().unwrap().to_string();
    assert!(error.contains("expected 199998 tokens, found 199997"), "{error}");
    let tiktoken = Tokenizer::from_tiktoken(file.as_bytes()).unwrap();
    let hugging_face = Tokenizer::from_json(hugging_face_file(&built_in).as_bytes()).unwrap();
    vec![("built in", built_in), ("tiktoken", Arc::new(tiktoken)), ("tokenizer.json", Arc::new(hugging_face))]
}

#[test]
fn encode_cases() {
    let golden = json("testdata/tokenizer/encode.json");
    let cases = golden["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 366);
    for (source, tokenizer) in tokenizers() {
        for case in cases {
            let name = format!("{source}: {}", case["name"]);
            let text = case["text"].as_str().unwrap();
            assert_eq!(tokenizer.encode(text), ids(&case["ids"]), "{name}");
            let special = case.get("ids_with_special").unwrap_or(&case["ids"]);
            assert_eq!(tokenizer.encode_with_special(text), ids(special), "{name}");
            if let Some(pieces) = case.get("pieces") {
                let expected: Vec<&str> =
                    pieces.as_array().unwrap().iter().map(|p| p.as_str().unwrap()).collect();
                assert_eq!(tokenizer.pieces(text), expected, "{name}");
            }
            assert_eq!(tokenizer.vocab_size(), 201_088);
        }
    }
}

#[test]
fn decode_cases() {
    let golden = json("testdata/tokenizer/decode.json");
    let tokenizer = Tokenizer::o200k_harmony();
    let cases = golden["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 33);
    for case in cases {
        let ids = ids(&case["ids"]);
        let text = case["lossy_text"].as_str().unwrap();
        let bytes = BASE64_STANDARD.decode(case["bytes_b64"].as_str().unwrap()).unwrap();
        assert_eq!(tokenizer.decode_bytes(&ids), bytes, "{}", case["name"]);
        assert_eq!(tokenizer.decode(&ids), text, "{}", case["name"]);
        for (id, expected) in ids.iter().zip(case["per_token_b64"].as_array().unwrap()) {
            let own = tokenizer.token_bytes(*id).unwrap_or_default();
            assert_eq!(BASE64_STANDARD.encode(own), expected.as_str().unwrap(), "{}", case["name"]);
        }
        let mut detokenizer = Detokenizer::new();
        let mut streamed: String =
            ids.iter().map(|&id| detokenizer.push(tokenizer.token_bytes(id).unwrap_or_default())).collect();
        streamed += &detokenizer.finish();
        assert_eq!(streamed, text, "{}", case["name"]);
    }
}

#[test]
fn long_text() {
    let text = std::fs::read_to_string(root("testdata/tokenizer/long.txt")).unwrap();
    let golden = json("testdata/tokenizer/long.json");
    let found = Tokenizer::o200k_harmony().encode(&text);
    assert_eq!(found.len() as u64, golden["n_ids"].as_u64().unwrap());
    let bytes: Vec<u8> = found.iter().flat_map(|id| id.to_le_bytes()).collect();
    let digest: String = Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect();
    assert_eq!(digest, golden["sha256_of_ids_as_u32_le"].as_str().unwrap());
}

#[test]
fn the_small_models_prompts() {
    let golden = json("testdata/model/tiny-gpt-oss.json");
    let tokenizer = tiny();
    assert_eq!(tokenizer.vocab_size(), 4096);
    assert_eq!(tokenizer.special("<|start|>"), Some(4086));
    // An array of objects or an object by name.
    let prompts: Vec<&serde_json::Value> = match &golden["prompts"] {
        serde_json::Value::Array(list) => list.iter().collect(),
        serde_json::Value::Object(map) => map.values().collect(),
        other => panic!("{other}"),
    };
    assert_eq!(prompts.len(), 10);
    for prompt in prompts {
        let text = prompt["text"].as_str().unwrap();
        assert_eq!(tokenizer.encode_with_special(text), ids(&prompt["ids"]), "{text}");
    }
    let text = std::fs::read_to_string(root("testdata/data/books-valid.txt")).unwrap();
    assert_eq!(tokenizer.encode(&text).len(), 61_322);
}

#[test]
fn the_vocabulary_is_tiktokens() {
    let oracle = tiktoken_rs::o200k_base().unwrap();
    let tokenizer = Tokenizer::o200k_harmony();
    for id in 0..199_998 {
        let bytes = oracle.decode_bytes(&[id]).unwrap();
        assert_eq!(tokenizer.token_bytes(id), Some(&bytes[..]), "{id}");
    }
    assert_eq!(tokenizer.token_bytes(201_088), None);
    assert_eq!(tokenizer.decode(&[200_018]), "<|reserved_200018|>");
    assert_eq!(tokenizer.special("<|reserved_200018|>"), Some(200_018));
    assert_eq!(tokenizer.decode(&[200_500]), "<|reserved_200500|>");
}
