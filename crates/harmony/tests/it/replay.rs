//! Turns in a history as they were generated.

use std::sync::Arc;

use harmony::{ChatMessage, ChatPrompt, ChatTool, Delta, FunctionCall, FunctionTool, ToolCallInput, Turn};
use serde_json::Value;

use crate::o200k;

/// A conversation in which the assistant said this, known as generated or not, and a tool answered.
fn prompt(turn: &Turn, generated: Option<&[u32]>) -> ChatPrompt {
    let mut calls: Vec<ToolCallInput> = turn
        .tool_calls
        .iter()
        .enumerate()
        .map(|(i, call)| ToolCallInput {
            id: format!("call_{i}"),
            function: FunctionCall { name: call.name.clone(), arguments: call.arguments.clone().into() },
            generated: None,
        })
        .collect();
    calls[0].generated = generated.map(Arc::from);
    let said = ChatMessage {
        role: "assistant".to_owned(),
        reasoning: turn.reasoning.clone(),
        content: turn.content.clone().map(harmony::MessageContent::Text),
        tool_calls: Some(calls),
        ..ChatMessage::default()
    };
    let result = ChatMessage { tool_call_id: Some("call_0".to_owned()), ..ChatMessage::new("tool", "sun") };
    let tool = ChatTool { function: FunctionTool { name: "look".to_owned(), ..FunctionTool::default() } };
    ChatPrompt { tools: vec![tool], ..ChatPrompt::new(vec![ChatMessage::new("user", "Hi"), said, result]) }
}

#[test]
fn the_turn_is_written_as_it_was_generated() {
    let harmony = o200k();
    let read = |ids: &[u32]| -> Turn {
        let mut parser = harmony.parser(["look".to_owned()]);
        let mut deltas: Vec<Delta> = ids.iter().flat_map(|&id| parser.push(id)).collect();
        deltas.extend(parser.finish());
        Turn::collect(&deltas)
    };
    let before = |turn: &Turn| {
        let mut prompt = prompt(turn, None);
        prompt.messages.truncate(1);
        harmony.render_chat(&prompt).unwrap()
    };
    let thoughts = ["", "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"];
    let preambles = ["", "<|channel|>commentary<|message|>Let me look.<|end|><|start|>assistant"];
    let headers = [
        "<|channel|>commentary to=functions.look <|constrain|>json<|message|>",
        "<|channel|>commentary to=functions.look<|message|>",
        " to=functions.look<|channel|>commentary <|constrain|>json<|message|>",
        " to=functions.look<|channel|>commentary json<|message|>",
        "<|channel|>analysis to=functions.look code<|message|>",
    ];
    let texts = [r#"{"location": "Paris"}"#, "{}", "", "no JSON \n"];
    let seconds = ["", "<|end|><|start|>assistant<|channel|>commentary to=functions.look<|message|>{}"];
    for (i, header) in headers.iter().enumerate() {
        for (thought, preamble) in thoughts.iter().flat_map(|t| preambles.map(|p| (t, p))) {
            for (text, second) in texts.iter().flat_map(|t| seconds.map(|s| (t, s))) {
                let generated = format!("{thought}{preamble}{header}{text}{second}<|call|>");
                let mut ids = harmony.tokenizer().encode_with_special(&generated);
                if i == 0 {
                    // The model may cut its words otherwise than the tokenizer would.
                    let split: Vec<u32> = ids.iter().flat_map(|&id| cut(&harmony, id)).collect();
                    assert_eq!(harmony.tokenizer().decode(&split), generated);
                    ids = split;
                }
                let turn = read(&ids);
                let found = harmony.render_chat(&prompt(&turn, Some(&ids))).unwrap();
                let expected = [before(&turn), ids.clone()].concat();
                assert!(found.starts_with(&expected), "{generated}\n{}", harmony.tokenizer().decode(&found));
                let canonical = harmony.render_chat(&prompt(&turn, None)).unwrap();
                let tail = harmony.tokenizer().encode_with_special("<|start|>functions.look to=assistant");
                let after =
                    |ids: &[u32]| ids[ids.windows(tail.len()).rposition(|w| w == tail).unwrap()..].to_vec();
                assert_eq!(after(&found), after(&canonical));

                // Without its reasoning the rest still is as it was.
                let quiet = Turn { reasoning: None, ..turn.clone() };
                let found = harmony.render_chat(&prompt(&quiet, Some(&ids))).unwrap();
                let skipped = harmony.tokenizer().encode_with_special(thought).len();
                let rest = if i == 0 { None } else { Some(&ids[skipped..]) };
                if let Some(rest) = rest {
                    assert!(found.starts_with(&[before(&turn), rest.to_vec()].concat()), "{generated}");
                }

                // What says something else is not written.
                let mut other = turn.clone();
                other.tool_calls[0].arguments.push(' ');
                let canonical = harmony.render_chat(&prompt(&other, None)).unwrap();
                assert_eq!(harmony.render_chat(&prompt(&other, Some(&ids))).unwrap(), canonical);
                let other = Turn { content: Some("Else.".to_owned()), ..turn };
                let canonical = harmony.render_chat(&prompt(&other, None)).unwrap();
                assert_eq!(harmony.render_chat(&prompt(&other, Some(&ids))).unwrap(), canonical);
            }
        }
    }
}

/// A token as two, where it is two characters of ASCII letters or more.
fn cut(harmony: &harmony::Harmony, id: u32) -> Vec<u32> {
    let text = harmony.tokenizer().decode(&[id]);
    match text.len() {
        2.. if text == "Paris" || text == " look" => {
            let (first, rest) = text.split_at(2);
            [harmony.tokenizer().encode(first), harmony.tokenizer().encode(rest)].concat()
        }
        _ => vec![id],
    }
}

#[test]
fn a_malformed_turn_is_written_in_the_canonical_form() {
    let harmony = o200k();
    let call = "<|channel|>commentary to=functions.look<|message|>{}";
    for generated in [
        // Cut off, twice begun, an answer before the call, no end, another's words, a marker in the text.
        call.to_owned(),
        format!("<|channel|>{call}<|call|>"),
        format!("<|channel|>final<|message|>Yes.<|end|><|start|>assistant{call}<|call|>"),
        format!("{call}<|end|>"),
        format!("<|channel|>analysis<|message|>Hm.<|end|><|start|>user{call}<|call|>"),
        format!("{call}<|channel|><|call|>"),
        "<|call|>".to_owned(),
        String::new(),
    ] {
        let ids = harmony.tokenizer().encode_with_special(&generated);
        let mut parser = harmony.parser(["look".to_owned()]);
        let mut deltas: Vec<Delta> = ids.iter().flat_map(|&id| parser.push(id)).collect();
        deltas.extend(parser.finish());
        let mut turn = Turn::collect(&deltas);
        if turn.tool_calls.is_empty() {
            turn.tool_calls.push(harmony::ToolCall { name: "look".to_owned(), arguments: "{}".to_owned() });
        }
        let canonical = harmony.render_chat(&prompt(&turn, None)).unwrap();
        assert_eq!(harmony.render_chat(&prompt(&turn, Some(&ids))).unwrap(), canonical, "{generated}");
    }
    // Arguments as an object are the client's, not the model's.
    let ids = harmony.tokenizer().encode_with_special(&format!("{call}<|call|>"));
    let turn = Turn {
        tool_calls: vec![harmony::ToolCall { name: "look".to_owned(), arguments: "{}".to_owned() }],
        ..Turn::default()
    };
    let object = |generated: Option<&[u32]>| {
        let mut prompt = prompt(&turn, generated);
        prompt.messages[1].tool_calls.as_mut().unwrap()[0].function.arguments =
            Value::Object(Default::default());
        harmony.render_chat(&prompt).unwrap()
    };
    assert_eq!(object(Some(&ids)), object(None));
}
