//! The offline API over scripts.

use engine::{
    EngineOptions, Error, FinishReason, Llm, Progress, Prompt, SamplingParams, Scripted, SubmitError,
};
use harmony::{ChatMessage, ChatPrompt};

use crate::common::{says, start, tokens, unlimited};

#[test]
fn results_come_in_the_order_of_the_prompts() {
    // The queue may be shorter than the batch.
    for max_queued_requests in [1, 3, 20] {
        check_order(max_queued_requests);
    }
}

fn check_order(max_queued_requests: usize) {
    let backend = (0..20).fold(Scripted::new(Scripted::gpt_oss(), Vec::new()), |backend, i| {
        // Later prompts have shorter answers.
        backend.with_seed(i, [vec![i as u32 + 300; 25 - i as usize], tokens("<|return|>")].concat())
    });
    let options = EngineOptions { max_queued_requests, ..EngineOptions::default() };
    let llm = Llm::new(start(backend, options));
    let prompts: Vec<Prompt> = (0..20).map(|i| Prompt::Tokens(vec![i; 3])).collect();
    let params: Vec<SamplingParams> =
        (0..20).map(|i| SamplingParams { seed: Some(i), n: 2, ..unlimited() }).collect();
    let mut progress = Progress::default();
    let outputs = llm.generate(&prompts, &params, &mut |p| progress = p).unwrap();
    for (i, output) in outputs.iter().enumerate() {
        assert_eq!(output.prompt_token_ids, [i as u32; 3]);
        assert_eq!(output.outputs.len(), 2);
        for (index, answer) in output.outputs.iter().enumerate() {
            assert_eq!(answer.index, index);
            assert_eq!(answer.token_ids[..25 - i], vec![i as u32 + 300; 25 - i]);
            assert_eq!((answer.token_ids.len(), answer.finish_reason), (26 - i, FinishReason::Stop));
        }
    }
    let generated = outputs.iter().flat_map(|o| &o.outputs).map(|o| o.token_ids.len()).sum();
    assert_eq!(
        progress,
        Progress { finished: 20, total: 20, prompt_tokens: 60, generated_tokens: generated }
    );
}

#[test]
fn one_bad_prompt_stops_the_batch_before_it_begins() {
    let llm = Llm::new(says("x<|return|>"));
    let prompts = [Prompt::Text("a".to_owned()), Prompt::Tokens(vec![201_088])];
    let error = llm.generate(&prompts, &[unlimited()], &mut |_| ()).unwrap_err();
    assert!(
        matches!(error, Error::Submit { index: 1, source: SubmitError::TokenOutOfVocabulary { .. } }),
        "{error}"
    );
    let error = llm.generate(&prompts, &[unlimited(), unlimited(), unlimited()], &mut |_| ()).unwrap_err();
    assert_eq!(error.to_string(), "The lengths of prompts (2) and params (3) must be the same.");
    assert_eq!(llm.engine().stats().steps, 0);
    assert_eq!(llm.generate(&[], &[unlimited()], &mut |_| ()).unwrap(), []);
}

#[test]
fn texts_and_chats() {
    let llm = Llm::new(says(
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hi!<|return|>",
    ));
    let text = Prompt::Text("<|start|>assistant".to_owned());
    let chat = |role: &str| Prompt::Chat(Box::new(ChatPrompt::new(vec![ChatMessage::new(role, "Hello")])));
    let prompts = [chat("user"), text];
    let outputs = llm.generate(&prompts, &[unlimited()], &mut |_| ()).unwrap();
    let [answer, continued] = [&outputs[0].outputs[0], &outputs[1].outputs[0]];
    assert_eq!(outputs[1].prompt_token_ids, tokens("<|start|>assistant"));
    assert_eq!(continued.text, "analysisHm.assistantfinalHi!");
    assert_eq!(continued.content, None);
    assert_eq!((answer.text.as_str(), answer.content.as_deref()), ("Hi!", Some("Hi!")));
    assert_eq!((answer.reasoning.as_deref(), answer.tool_calls.len()), (Some("Hm."), 0));

    let steps = llm.engine().stats().steps;
    let error = llm.generate(&[chat("user"), chat("nobody")], &[unlimited()], &mut |_| ()).unwrap_err();
    assert!(matches!(error, Error::Render { index: 1, .. }), "{error}");
    assert_eq!(llm.engine().stats().steps, steps, "nothing is begun");
}

#[test]
fn scripts_are_read_from_json() {
    let read = |json: &str| Scripted::from_json(Scripted::gpt_oss(), json);
    let json = r#"{"7": {"tokens": [5, 6, 200002], "delays_ms": [1], "finish_reason": "stop"}, "-3": {"tokens": [8, 200002]}, "default": {"tokens": [200002]}}"#;
    let llm = Llm::new(start(read(json).unwrap(), EngineOptions::default()));
    let params = [7, -3, 8].map(|seed| SamplingParams { seed: Some(seed), ..unlimited() });
    let prompts = [1, 2, 3].map(|token| Prompt::Tokens(vec![token]));
    let outputs = llm.generate(&prompts, &params, &mut |_| ()).unwrap();
    let said: Vec<&[u32]> = outputs.iter().map(|o| o.outputs[0].token_ids.as_slice()).collect();
    assert_eq!(said, [&[5, 6, 200_002][..], &[8, 200_002], &[200_002]]);

    for (json, message) in [
        (r#"{"x": {"tokens": []}}"#, "scripts: expected a seed or \"default\", found \"x\""),
        (r#"{"1": {"tokens": [201088]}}"#, "scripts: \"1\" has token 201088, expected ids below 201088"),
        (
            r#"{"1": {"tokens": [1], "delay": 3}}"#,
            "scripts: expected an object of objects with `tokens`, found unknown field `delay`, expected one of `tokens`, \
             `delays_ms`, `finish_reason` at line 1 column 29",
        ),
    ] {
        assert_eq!(read(json).err().unwrap().to_string(), message);
    }
}
