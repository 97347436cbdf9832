//! Files that lie and texts that are meant to be slow.

use serde_json::{Value, json};
use tokenizer::Tokenizer;

use crate::{json as read, root};

fn refused(change: impl FnOnce(&mut Value)) -> String {
    let mut file = read("models/tiny-gpt-oss/tokenizer.json");
    change(&mut file);
    match Tokenizer::from_json(file.to_string().as_bytes()) {
        Ok(_) => panic!("accepted"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn files_that_contradict_themselves_are_refused_by_name() {
    let vocab = |file: &mut Value, token: &str, id: Value| {
        file["model"]["vocab"].as_object_mut().unwrap().insert(token.to_owned(), id);
    };
    for (change, expected) in [
        (Box::new(|f: &mut Value| vocab(f, "zzzz", json!(5))) as Box<dyn FnOnce(&mut Value)>, "the id 5"),
        (Box::new(|f| vocab(f, "zzzz", json!(4_000_000_000u32))), "an id too large"),
        (Box::new(|f| vocab(f, "zzzz", json!(-1))), "not valid"),
        (Box::new(|f| vocab(f, "zzzz", json!(5_000_000))), "expected a token for each id"),
        (Box::new(|f| vocab(f, "zzzz", json!(4083))), "the id 4083"),
        (Box::new(|f| vocab(f, "zzzz", json!(4097))), "expected a token for each id"),
        (
            Box::new(|f| {
                f["added_tokens"][0]["id"] = json!(5000);
                vocab(f, "zzzz", json!(4096));
            }),
            "no token has the id 4080",
        ),
        (Box::new(|f| vocab(f, &"z".repeat(513), json!(4096))), "too many bytes in token 4096"),
        (Box::new(|f| vocab(f, "z z", json!(4096))), "byte-level alphabet"),
        (
            Box::new(|f| {
                f["model"]["vocab"].as_object_mut().unwrap().remove("A");
            }),
            "no token has the id 32",
        ),
        (
            Box::new(|f| {
                f["model"]["vocab"].as_object_mut().unwrap().remove("A");
                vocab(f, "zzzz", json!(32));
                f["model"]["merges"] = json!([]);
            }),
            "the single byte 0x41 is not in the vocabulary",
        ),
        (Box::new(|f| f["model"]["merges"][0] = json!(["Ġ", "nope"])), "merge 0"),
        (Box::new(|f| f["model"]["merges"][0] = json!("nospace")), "merge 0"),
        (Box::new(|f| f["model"]["type"] = json!("Unigram")), "Unigram"),
        (Box::new(|f| f["normalizer"] = json!({"type": "NFC"})), "NFC"),
        (Box::new(|f| f["pre_tokenizer"] = json!({"type": "Whitespace"})), "Whitespace"),
        (Box::new(|f| f["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = json!("x+")), "x+"),
        (Box::new(|f| f["pre_tokenizer"]["pretokenizers"][1]["use_regex"] = json!(true)), "ByteLevel"),
        (Box::new(|f| f["model"]["end_of_word_suffix"] = json!("</w>")), "</w>"),
        (Box::new(|f| f["added_tokens"][0]["content"] = json!("")), "the added token 4080 has no spelling"),
        (Box::new(|f| f["added_tokens"][0]["lstrip"] = json!(true)), "lstrip true"),
        (Box::new(|f| f["added_tokens"][0]["id"] = json!(4081)), "the same id: 4081"),
        (Box::new(|f| f["added_tokens"][0]["id"] = json!(u32::MAX)), "an id too large"),
        (Box::new(|f| f["added_tokens"][0]["id"] = json!(7)), "the id 7"),
        (
            Box::new(|f| f["added_tokens"][0]["content"] = json!(format!("<|{}|>", "x".repeat(600)))),
            "too many bytes in the added token",
        ),
        (Box::new(|f| f["added_tokens"][1]["content"] = json!("<|startoftext|>")), "startoftext"),
    ] {
        let message = refused(change);
        assert!(message.contains(expected), "{message:?} does not name {expected:?}");
    }
    let file = std::fs::read_to_string(root("models/tiny-gpt-oss/tokenizer.json")).unwrap();
    let (before, after) = file.split_once("\"vocab\"").unwrap();
    let brace = after.find('{').unwrap() + 1;
    for (entry, expected) in [("\"!\": 4096,", "the same bytes"), ("\"!\": 0,", "the id 0")] {
        let twice = format!("{before}\"vocab\"{}{entry}{}", &after[..brace], &after[brace..]);
        let message = Tokenizer::from_json(twice.as_bytes()).err().unwrap().to_string();
        assert!(message.contains(expected), "{message:?} does not name {expected:?}");
    }
    let path = root("crates/tokenizer/Cargo.toml");
    let message = Tokenizer::from_file(&path).err().unwrap().to_string();
    assert!(message.contains("Cargo.toml: ") && message.contains("line 1"), "{message:?}");
    for bytes in [&b""[..], b"{", b"null", b"[]", b"{\"model\":{\"vocab\":{}}}", b"\xff\xfe"] {
        assert!(Tokenizer::from_json(bytes).is_err());
    }
    for text in ["x 0", "IQ== 1", "IQ==", "IQ== 0\nIQ== 1", " 0"] {
        assert!(Tokenizer::from_tiktoken(text.as_bytes()).is_err(), "{text:?}");
    }
}

#[test]
fn added_tokens_may_be_spelled_in_any_way() {
    let mut file = read("models/tiny-gpt-oss/tokenizer.json");
    file["normalizer"] = json!({"type": "Sequence", "normalizers": []});
    let added = file["added_tokens"].as_array_mut().unwrap();
    for (id, spelling) in (4096..).zip(["[PAD]", "<tool", "<tool_call>", "é"]) {
        added.push(json!({"id": id, "content": spelling}));
    }
    let tokenizer = Tokenizer::from_json(file.to_string().as_bytes()).unwrap();
    let start = tokenizer.special("<|start|>").unwrap();
    let text = "[PAD[PAD]<tool_call><tool_é<|<|start|>";
    let ids = tokenizer.encode_with_special(text);
    assert_eq!(tokenizer.decode(&ids), text);
    let special: Vec<u32> = ids.iter().copied().filter(|&id| tokenizer.is_special(id)).collect();
    assert_eq!(special, [4096, 4098, 4097, 4099, start]);
    assert!(tokenizer.encode(text).iter().all(|&id| !tokenizer.is_special(id)));
}

#[test]
fn added_tokens_that_are_not_special_are_text() {
    let mut file = read("models/tiny-gpt-oss/tokenizer.json");
    let added = file["added_tokens"].as_array_mut().unwrap();
    added.iter_mut().for_each(|token| token["special"] = json!(false));
    for (id, spelling, special) in [(4096, "<think>", false), (4097, " and", false), (4098, "[PAD]", true)] {
        added.push(json!({"id": id, "content": spelling, "special": special}));
    }
    let tokenizer = Tokenizer::from_json(file.to_string().as_bytes()).unwrap();
    let plain = Tokenizer::from_file(&root("models/tiny-gpt-oss/tokenizer.json")).unwrap();
    // Whatever the file says, nobody writes a control token.
    let text = "salt and<think>sand<|start|>[PAD]";
    let expected = [&plain.encode("salt")[..], &[4097, 4096], &plain.encode("sand<|start|>[PAD]")];
    assert_eq!(tokenizer.encode(text), expected.concat());
    let start = plain.special("<|start|>").unwrap();
    let expected = [&plain.encode("salt")[..], &[4097, 4096], &plain.encode("sand"), &[start, 4098]];
    let ids = tokenizer.encode_with_special(text);
    assert_eq!(ids, expected.concat());
    assert_eq!(tokenizer.decode(&ids), text);
    assert_eq!([4096, 4097, 4098, start].map(|id| tokenizer.is_special(id)), [false, false, true, true]);
    assert_eq!((tokenizer.special("<think>"), tokenizer.special("[PAD]")), (None, Some(4098)));
    assert_eq!(tokenizer.token_bytes(4096), Some(&b"<think>"[..]));
}

/// A quadratic algorithm would take minutes to hours on these.
#[test]
fn a_mebibyte_of_anything_is_encoded() {
    let tokenizer = Tokenizer::o200k_harmony();
    let mebibyte = |unit: &str| unit.repeat((1 << 20) / unit.len());
    for unit in [
        "a", "A", " ", "\n", "\r\n", "1", "!", "\u{301}", "aA", "Aa", "中", "\u{301}A", "<|", "/", "'s",
        " \n", "\0",
    ] {
        let text = mebibyte(unit);
        let ids = tokenizer.encode(&text);
        assert!(tokenizer.decode_bytes(&ids) == text.as_bytes(), "{unit:?}");
        assert!(tokenizer.encode_with_special(&text) == ids, "{unit:?}");
    }
    let unclosed = mebibyte("<|") + "|>";
    assert!(tokenizer.decode_bytes(&tokenizer.encode_with_special(&unclosed)) == unclosed.as_bytes());
}
