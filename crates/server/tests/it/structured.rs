//! Forms of answers and calls that must be kept to, whatever the model would say.

use engine::Scripted;
use serde_json::{Value, json};
use server::{JsonRules, Options};

use crate::fixture::{Fixture, engine_options, options, tokens};
use crate::harmony_turns::{join, tool};

const FINAL: &str = "<|channel|>final<|message|>";

fn ask() -> Value {
    json!([{"role": "user", "content": "Hi"}])
}

fn point() -> Value {
    json!({
        "type": "object",
        "properties": {"x": {"type": "integer"}, "y": {"enum": ["a", "b"]}},
        "required": ["x", "y"],
        "additionalProperties": false
    })
}

fn json_schema(schema: &Value) -> Value {
    json!({"type": "json_schema", "json_schema": {"name": "point", "description": "A point", "schema": schema}})
}

/// One server whose answers are chosen by the request's seed.
fn server(scripts: &[&str]) -> Fixture {
    let scripted = scripts
        .iter()
        .enumerate()
        .fold(Scripted::new(Scripted::gpt_oss(), Vec::new()), |scripted, (seed, script)| {
            scripted.with_seed(seed as i64 + 1, tokens(script))
        });
    Fixture::start(&options(), scripted, engine_options())
}

#[test]
fn answers_have_their_form() {
    let good = r#"{"x": 3, "y": "b"}"#;
    let rows = [
        (json!({"response_format": json_schema(&point())}), good, r#"{"z": 1}"#),
        (json!({"response_format": {"type": "json_object"}}), r#"{"any": [1, null]}"#, "[1]"),
        (json!({"response_format": {"type": "regex", "pattern": "[ab]+"}}), "abba", "cc"),
        (
            json!({"response_format": {"type": "grammar", "grammar": "start: \"x\"~3", "syntax": "lark"}}),
            "xxx",
            "y",
        ),
        (json!({"response_format": {"type": "grammar", "grammar": "root ::= \"ab\"+"}}), "abab", "aa"),
        (
            json!({"response_format": {"type": "grammar", "grammar": "root ::= [x-z] \"!\"", "syntax": "ebnf"}}),
            "y!",
            "a!",
        ),
        (
            json!({"response_format": {
                "type": "structural_tag", "triggers": ["<p"],
                "structures": [{"begin": "<point>", "schema": point(), "end": "</point>"}]
            }}),
            r#"It is <b>at</b> <point>{"x": 1, "y": "a"}</point>."#,
            "<point>",
        ),
        (
            json!({"structured_outputs": {"structural_tag": json!({"type": "structural_tag", "format": {
                "type": "sequence", "elements": [
                    {"type": "or", "elements": [
                        {"type": "const_string", "value": "A"}, {"type": "regex", "pattern": "B+"},
                        {"type": "grammar", "grammar": "root ::= \"C\""}
                    ]},
                    {"type": "tag", "begin": "[", "content": {"type": "any_text"}, "end": "]"},
                    {"type": "tags_with_separator", "separator": ",", "tags": [
                        {"begin": "<", "content": {"type": "json_schema", "json_schema": {"const": 7}}, "end": ">"}
                    ]},
                    {"type": "triggered_tags", "triggers": ["!"], "at_least_one": true, "stop_after_first": true, "tags": [
                        {"begin": "!!", "content": {"type": "const_string", "value": "x"}, "end": ""}
                    ]}
                ]
            }}).to_string()}}),
            "BB[any]<7>,<7>so!!x",
            "D",
        ),
        (json!({"response_format": {"type": "json_object", "schema": point()}}), good, r#"{"x": "a"}"#),
        (json!({"structured_outputs": {"json": point()}}), good, r#"{"x": "a"}"#),
        (json!({"structured_outputs": {"json": point().to_string()}}), good, r#"{"x": "a"}"#),
        (json!({"structured_outputs": {"choice": ["red", "green"]}}), "green", "blue"),
        (json!({"structured_outputs": {"regex": r"\d\d"}}), "42", "x"),
        (json!({"structured_outputs": {"grammar": "start: /[xyz]/"}}), "y", "a"),
        (json!({"structured_outputs": {"json_object": true}}), "{}", "1"),
        (
            json!({"structured_outputs": {"json_object": true, "disable_any_whitespace": true}}),
            r#"{"x":1}"#,
            r#"{"x": 1}"#,
        ),
        (
            json!({"structured_outputs": {"disable_additional_properties": true, "json": {
                "properties": {"properties": {"anyOf": [{"properties": {"x": {"type": "integer"}}}]}},
                "required": ["properties"], "additionalProperties": true, "type": "object"
            }}}),
            r#"{"properties": {"x": 1}, "y": 2}"#,
            r#"{"properties": {"z": 1}}"#,
        ),
        (
            json!({"structured_outputs": {"disable_additional_properties": true, "json": {
                "$defs": {"b": {"type": "object", "properties": {"a": {"const": 2}}, "required": ["a"]}},
                "type": "object", "properties": {"c": {"const": 1}}, "required": ["c"],
                "allOf": [{"$ref": "#/$defs/b"}]
            }}}),
            r#"{"c": 1, "a": 2}"#,
            r#"{"c": 1}"#,
        ),
    ];
    let thought = format!("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant{FINAL}");
    let scripts: Vec<String> = rows
        .iter()
        .flat_map(|(_, good, bad)| [format!("{thought}{good}<|return|>"), format!("{FINAL}{bad}<|return|>")])
        .collect();
    let server = server(&scripts.iter().map(String::as_str).collect::<Vec<_>>());
    for (i, (fields, good, bad)) in rows.iter().enumerate() {
        let mut request = fields.clone();
        request["messages"] = ask();
        request["max_tokens"] = 40.into();
        request["seed"] = (2 * i + 1).into();
        let choice = &server.chat(&request).ok()["choices"][0];
        assert_eq!(choice["message"]["content"], *good, "{fields}");
        assert_eq!(
            (&choice["message"]["reasoning"], &choice["finish_reason"]),
            (&json!("Hm."), &json!("stop"))
        );

        request["seed"] = (2 * i + 2).into();
        let whole = server.chat(&request).ok();
        let choice = &whole["choices"][0];
        assert_ne!(choice["message"]["content"], *bad, "{fields}");
        request["stream"] = true.into();
        let joined = join(&server.chunks("/v1/chat/completions", &request));
        assert_eq!(joined.content, choice["message"]["content"], "{fields}");
        assert_eq!(joined.finish, choice["finish_reason"]);
    }
}

#[test]
fn raw_completions_have_their_form() {
    let server = server(&["nothing of the kind", r#"{"x": 3, "y": "b"}<|return|>"#]);
    let mut request =
        json!({"prompt": "A point:", "response_format": json_schema(&point()), "max_tokens": 30, "seed": 2});
    let whole = server.complete(&request).ok();
    assert_eq!(whole["choices"][0]["text"], r#"{"x": 3, "y": "b"}"#);
    request["seed"] = 1.into();
    assert!(server.complete(&request).ok()["choices"][0]["text"].as_str().unwrap().starts_with('{'));
}

#[test]
fn the_model_is_told_of_the_form() {
    let server = server(&["x"]);
    let mut request = json!({
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        "response_format": json_schema(&json!({"type": "object", "properties": {"b": {}, "a": {}}})),
        "tools": [tool("f")], "return_prompt_text": true, "max_tokens": 1
    });
    let prompt = server.chat(&request).ok()["prompt_text"].as_str().unwrap().to_owned();
    let section = "\n\n# Response Formats\n\n## point\n\n// A point\n{\"type\":\"object\",\"properties\":{\"b\":{},\"a\":{}}}<|end|>";
    assert!(prompt.contains("} // namespace functions\n\n# Response Formats"), "{prompt}");
    assert!(prompt.contains(section), "{prompt}");
    request.as_object_mut().unwrap().remove("tools");
    request["messages"] = ask();
    let prompt = server.chat(&request).ok()["prompt_text"].as_str().unwrap().to_owned();
    assert!(prompt.contains("<|start|>developer<|message|># Response Formats\n\n## point"), "{prompt}");
}

#[test]
fn calls_that_must_be_made() {
    let call = |name: &str, arguments: &str, end: &str| {
        format!("<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{arguments}{end}")
    };
    let good = call("g", r#"{"x": 1, "y": "a"}"#, "<|call|>");
    let bad = call("g", r#"{"x": "one"}"#, "<|call|>");
    let two = call("f", r#"{"location": "Rome"}"#, "<|end|><|start|>assistant") + &good;
    let refusal = format!("{FINAL}I will not call anything.<|return|>");
    let server = server(&[&good, &bad, &two, &refusal]);
    let strict =
        json!({"type": "function", "function": {"name": "g", "parameters": point(), "strict": true}});
    let named = json!({"type": "function", "function": {"name": "g"}});
    let answer = |seed: usize, choice: &Value| {
        let mut request = json!({
            "messages": ask(), "tools": [tool("f"), strict], "tool_choice": choice, "seed": seed, "max_tokens": 80
        });
        let whole = server.chat(&request).ok()["choices"][0].clone();
        request["stream"] = true.into();
        let joined = join(&server.chunks("/v1/chat/completions", &request));
        let calls = whole["message"]["tool_calls"].as_array().cloned().unwrap_or_default();
        let calls: Vec<(String, String)> = calls
            .iter()
            .map(|call| &call["function"])
            .map(|f| (f["name"].as_str().unwrap().to_owned(), f["arguments"].as_str().unwrap().to_owned()))
            .collect();
        assert_eq!((&joined.calls, &joined.finish), (&calls, &whole["finish_reason"]));
        (calls, whole["finish_reason"].as_str().unwrap().to_owned())
    };
    let g = || ("g".to_owned(), r#"{"x": 1, "y": "a"}"#.to_owned());
    let f = ("f".to_owned(), r#"{"location": "Rome"}"#.to_owned());
    for choice in [json!("auto"), json!("required")] {
        assert_eq!(answer(1, &choice), (vec![g()], "tool_calls".to_owned()));
        assert_eq!(answer(3, &choice), (vec![f.clone(), g()], "tool_calls".to_owned()));
    }
    // A call that the client named is the answer itself.
    assert_eq!(answer(1, &named), (vec![g()], "stop".to_owned()));
    assert_eq!(answer(3, &named).0[0].0, "g");
    for choice in [json!("auto"), json!("required"), named.clone()] {
        let (calls, finish) = answer(2, &choice);
        if finish != "length" {
            let arguments: Value = serde_json::from_str(&calls[0].1).unwrap();
            assert!(arguments["x"].is_number() && arguments["y"].is_string(), "{arguments}");
        }
    }
    // There is no other way out.
    for choice in [json!("required"), named] {
        let (calls, finish) = answer(4, &choice);
        assert!(!calls.is_empty() || finish == "length", "{choice}: {finish}");
    }
    assert_eq!(answer(4, &json!("auto")), (Vec::new(), "stop".to_owned()));
    // Some of the tools, at will or at least one of them.
    let allowed = |mode: &str, name: &str| {
        let tools = json!([{"type": "function", "function": {"name": name}}]);
        json!({"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}})
    };
    assert_eq!(answer(1, &allowed("required", "g")).0, [g()]);
    assert_eq!(answer(4, &allowed("auto", "g")), (Vec::new(), "stop".to_owned()));
    assert!(answer(1, &allowed("auto", "f")).0.iter().all(|(name, _)| name == "f"));
    let (calls, finish) = answer(1, &json!("none"));
    assert!(calls.is_empty() && finish != "tool_calls");
}

#[test]
fn a_server_sets_what_all_json_keeps_to() {
    let json = JsonRules { no_whitespace: true, no_other_properties: true };
    let schema = json!({"type": "object", "properties": {"x": {"type": "integer"}}});
    let call = "<|channel|>commentary to=functions.g <|constrain|>json<|message|>";
    let tools =
        json!([{"type": "function", "function": {"name": "g", "parameters": schema, "strict": true}}]);
    let format = json!({"type": "json_schema", "json_schema": {"name": "g", "schema": schema}});
    for (path, begin, end, fields, found) in [
        (
            "/v1/chat/completions",
            FINAL,
            "<|return|>",
            json!({"messages": ask(), "response_format": format}),
            "/choices/0/message/content",
        ),
        (
            "/v1/chat/completions",
            call,
            "<|call|>",
            json!({"messages": ask(), "tools": tools}),
            "/choices/0/message/tool_calls/0/function/arguments",
        ),
        (
            "/v1/completions",
            "",
            "<|return|>",
            json!({"prompt": "x", "response_format": format}),
            "/choices/0/text",
        ),
    ] {
        let said = |text: &str, json: JsonRules| {
            let backend = Scripted::new(Scripted::gpt_oss(), vec![tokens(&format!("{begin}{text}{end}"))]);
            let server = Fixture::start(&Options { json, ..options() }, backend, engine_options());
            let mut request = fields.clone();
            request["max_tokens"] = 40.into();
            server.post(path, &request).ok().pointer(found).unwrap() == text
        };
        assert!(said(r#"{"x":1}"#, json), "{fields}");
        for other in [r#"{"x": 1}"#, r#"{"x":1,"y":2}"#] {
            assert!(said(other, JsonRules::default()) && !said(other, json), "{other} {fields}");
        }
    }
}

#[test]
fn arguments_of_all_tools_can_be_constrained() {
    let free = |text: &str| {
        let script =
            format!("<|channel|>commentary to=functions.g <|constrain|>json<|message|>{text}<|call|>");
        Scripted::new(Scripted::gpt_oss(), vec![tokens(&script)])
    };
    let chat = json!({"messages": ask(), "max_tokens": 80, "tools": [
        {"type": "function", "function": {"name": "g", "parameters": point(), "strict": false}}
    ]});
    let respond = json!({"input": "Hi", "max_output_tokens": 80, "tools": [
        {"type": "function", "name": "g", "parameters": point()}
    ]});
    for strict_arguments in [false, true] {
        let options = Options { strict_arguments, ..options() };
        for (said, kept) in [(r#"{"x": 1, "y": "a"}"#, true), (r#"{"x": "one"}"#, !strict_arguments)] {
            let server = Fixture::start(&options, free(said), engine_options());
            let whole = server.chat(&chat).ok();
            let arguments = whole["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"].clone();
            assert_eq!(arguments == said, kept, "{strict_arguments} {said}: {arguments}");
            let whole = server.post("/v1/responses", &respond).ok();
            let arguments = &whole["output"][0]["arguments"];
            assert_eq!(arguments == said, kept, "{strict_arguments} {said}: {arguments}");
        }
        // Nobody need call.
        let answer = Scripted::new(Scripted::gpt_oss(), vec![tokens(&format!("{FINAL}No.<|return|>"))]);
        let server = Fixture::start(&options, answer, engine_options());
        assert_eq!(server.chat(&chat).ok()["choices"][0]["message"]["content"], "No.");
    }
}

#[test]
fn what_is_not_enforced_is_said() {
    let server = server(&[&format!("{FINAL}\"ab\"<|return|>")]);
    let schema = json!({"type": "string", "if": {"minLength": 2}});
    let format =
        json!({"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": false}});
    for stream in [false, true] {
        let request = json!({"messages": ask(), "response_format": format, "seed": 1, "stream": stream});
        let response = server.post("/v1/chat/completions", &request);
        assert_eq!(response.status, 200);
        assert!(response.header("x-unenforced-schema").unwrap().contains("if"));
    }
}

#[test]
fn without_reasoning_at_all() {
    let server = server(&[
        "Hello!<|return|>",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hi<|return|>",
    ]);
    let mut request =
        json!({"messages": ask(), "reasoning_effort": "none", "seed": 1, "return_prompt_text": true});
    let whole = server.chat(&request).ok();
    let message = &whole["choices"][0]["message"];
    assert_eq!((&message["content"], &message["reasoning"]), (&json!("Hello!"), &Value::Null));
    assert!(
        whole["prompt_text"].as_str().unwrap().ends_with("<|start|>assistant<|channel|>final<|message|>")
    );
    // With tools there must be a choice of channels.
    request["tools"] = json!([tool("f")]);
    request["seed"] = 2.into();
    request["max_tokens"] = 20.into();
    let whole = server.chat(&request).ok();
    assert_eq!(whole["choices"][0]["message"]["reasoning"], Value::Null);
    assert!(whole["prompt_text"].as_str().unwrap().ends_with("<|start|>assistant"));
}

#[test]
fn thinking_has_a_budget() {
    let said = "<|channel|>analysis<|message|>one two three four five<|end|><|start|>assistant<|channel|>final<|message|>Yes<|return|>";
    let server = server(&[said]);
    let mut request = json!({"messages": ask(), "seed": 1, "thinking_token_budget": 2, "max_tokens": 30});
    let message = &server.chat(&request).ok()["choices"][0]["message"];
    assert_eq!(message["reasoning"], "one two");
    assert!(message["content"].is_string());
    request["thinking_token_budget"] = (-1).into();
    assert_eq!(server.chat(&request).ok()["choices"][0]["message"]["reasoning"], "one two three four five");
}

#[test]
fn a_message_is_continued() {
    let server = server(&[" world<|return|>"]);
    let request = json!({
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
        "continue_final_message": true, "add_generation_prompt": false, "seed": 1, "return_prompt_text": true
    });
    let whole = server.chat(&request).ok();
    assert_eq!(whole["choices"][0]["message"]["content"], " world");
    let prompt = whole["prompt_text"].as_str().unwrap();
    assert!(prompt.ends_with("Hi<|end|><|start|>assistant<|channel|>final<|message|>Hello"), "{prompt}");
}

#[test]
fn fields_that_exclude_each_other() {
    let server = server(&["x"]);
    let request = json!({
        "messages": ask(), "response_format": {"type": "regex", "pattern": "[0-9]+"}, "allowed_token_ids": [5]
    });
    let (status, kind, param, message) = server.chat(&request).error();
    assert_eq!((status, kind.as_str()), (400, "BadRequestError"), "{message}");
    assert_eq!(param.as_deref(), Some("response_format.pattern"));
    assert!(message.contains("cannot be kept to"), "{message}");
    let request =
        json!({"prompt": "Hi", "allowed_token_ids": [5], "structured_outputs": {"regex": "[0-9]+"}});
    assert_eq!(server.complete(&request).error().2.as_deref(), Some("structured_outputs.regex"));
    let request =
        json!({"prompt": "Hi", "structured_outputs": {"choice": ["the"]}, "bad_words": ["the", "th", "t"]});
    let (status, _, param, message) = server.complete(&request).error();
    assert_eq!((status, param.as_deref()), (400, Some("bad_words")), "{message}");
}
