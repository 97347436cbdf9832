//! Every refusal: its status, its type, its param, and that the server still answers.

use engine::Scripted;
use serde_json::{Value, json};
use server::Options;

use crate::fixture::{Fixture, JSON, engine_options, options, tokens};
use crate::harmony_turns::tool;

const HI: &str = "<|channel|>final<|message|>Hi<|return|>";
const BAD: &str = "BadRequestError";

fn check(what: &str, found: (u16, String, Option<String>, String), expected: (u16, &str, Option<&str>)) {
    let (status, kind, param, message) = found;
    assert_eq!((status, kind.as_str(), param.as_deref()), expected, "{what}: {message}");
    assert!(message.len() < 1000, "{what}: {message}");
}

/// A conversation in which a function with a name of so many bytes has so many results.
fn results(name: usize, count: usize) -> Value {
    let function = json!({"name": "f".repeat(name), "arguments": "{}"});
    let mut messages = vec![json!({"role": "assistant", "tool_calls": [{"id": "a", "function": function}]})];
    messages.resize(count + 1, json!({"role": "tool", "tool_call_id": "a", "content": ""}));
    Value::from(messages)
}

#[test]
fn chat_fields() {
    let server = Fixture::saying(&[HI]);
    let call = json!({"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}});
    let user = json!({"role": "user", "content": "Hi"});
    for (field, value, param, message) in [
        ("temperature", json!("hot"), "temperature", "temperature must be a number, got a string."),
        ("temperature", json!(3), "temperature", "temperature must be in [0, 2], got 3."),
        ("top_p", json!(0), "top_p", "top_p must be in (0, 1], got 0."),
        ("top_k", json!(-2), "top_k", "negative"),
        ("min_p", json!(1.5), "min_p", "[0, 1]"),
        ("presence_penalty", json!(-3), "presence_penalty", "[-2, 2]"),
        ("frequency_penalty", json!(3), "frequency_penalty", "[-2, 2]"),
        ("repetition_penalty", json!(0), "repetition_penalty", "greater than 0"),
        ("max_tokens", json!(0), "max_tokens", "at least 1"),
        ("max_tokens", json!(1.5), "max_tokens", "integer"),
        ("max_completion_tokens", json!(true), "max_completion_tokens", "integer"),
        ("min_tokens", json!(-1), "min_tokens", "negative"),
        ("n", json!(0), "n", "[1, 128]"),
        ("n", json!(129), "n", "[1, 128]"),
        ("stop", json!([1]), "stop.0", "string"),
        ("stop", json!([""]), "stop", "1 to 256"),
        ("stop", json!(vec!["a"; 17]), "stop", "16"),
        ("stop_token_ids", json!(["a"]), "stop_token_ids", "token ids"),
        ("stop_token_ids", json!([201_088]), "stop_token_ids", "out of vocabulary"),
        ("seed", json!(1e30), "seed", "integer"),
        ("logprobs", json!(1), "logprobs", "boolean"),
        (
            "top_logprobs",
            json!(2),
            "top_logprobs",
            "when using `top_logprobs`, `logprobs` must be set to true.",
        ),
        ("top_logprobs", json!(21), "top_logprobs", "greater than max allowed: 20"),
        ("prompt_logprobs", json!(-1), "prompt_logprobs", "negative"),
        ("logit_bias", json!({"x": 1}), "logit_bias", "token ids"),
        ("logit_bias", json!({"+1": 1}), "logit_bias", "token ids"),
        ("logit_bias", json!({"1": 1, "01": 2}), "logit_bias", "got 01"),
        ("logit_bias", json!({"201088": 1}), "logit_bias", "out of vocabulary"),
        ("logit_bias", json!({"1": "x"}), "logit_bias.1", "number"),
        ("logit_bias", (0..1025).map(|id| (id.to_string(), json!(1))).collect(), "logit_bias", "1024"),
        ("stop_token_ids", json!(vec![1; 257]), "stop_token_ids", "256"),
        ("stop", json!(["x".repeat(257)]), "stop", "256"),
        ("tools", (0..513).map(|i| tool(&format!("f{i}"))).collect(), "tools", "512"),
        (
            "tools",
            json!([{"type": "function", "function": {"name": "f", "description": "x".repeat(2 << 20)}}]),
            "tools",
            "1048576",
        ),
        ("tools", json!([]), "tools", "must not be an empty array"),
        ("tools", json!([{"type": "web_search"}]), "tools.0.type", "function"),
        ("tools", json!([tool("f"), {"type": "function"}]), "tools.1.function", "required"),
        ("tools", json!([tool("a b")]), "tools.0.function.name", "letters"),
        ("tools", json!([tool("f"), tool("f")]), "tools.1.function.name", "named f"),
        (
            "tools",
            json!([tool("f"), {"type": "function", "function": {"name": "g", "parameters": 1}}]),
            "tools.1.function.parameters",
            "object",
        ),
        (
            "tools",
            json!([{"type": "function", "function": {"name": "g", "strict": true, "parameters": {"type": "what"}}}]),
            "tools.0.function.parameters",
            "what",
        ),
        ("tool_choice", json!("auto"), "tool_choice", "When using `tool_choice`, `tools` must be set."),
        ("tool_choice", json!("maybe"), "tool_choice", "maybe"),
        ("reasoning_effort", json!("huge"), "reasoning_effort", "huge"),
        ("thinking_token_budget", json!(-2), "thinking_token_budget", "negative"),
        ("stream", json!("yes"), "stream", "boolean"),
        (
            "stream_options",
            json!({"include_usage": true}),
            "stream_options",
            "Stream options can only be defined when `stream=True`.",
        ),
        ("priority", json!(1), "priority", "--scheduling-policy priority"),
        ("modalities", json!(["text", "audio"]), "modalities", "text only"),
        ("request_id", json!("a b"), "request_id", "visible ASCII"),
        ("chat_template", json!("{{ x }}"), "chat_template", "built in"),
        ("response_format", json!({"type": "xml"}), "response_format.type", "xml"),
        ("response_format", json!({"type": "json_schema"}), "response_format.json_schema", "required"),
        (
            "response_format",
            json!({"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}),
            "response_format.json_schema.name",
            "letters",
        ),
        (
            "response_format",
            json!({"type": "json_schema", "json_schema": {"name": "a", "schema": {"if": {"minLength": 2}}}}),
            "response_format.json_schema.schema",
            "if",
        ),
        ("response_format", json!({"type": "structural_tag"}), "response_format.structures", "required"),
        (
            "response_format",
            json!({"type": "structural_tag", "triggers": ["<"], "structures": [{"begin": "[", "schema": {}, "end": ""}]}),
            "response_format",
            "begins with no trigger",
        ),
        (
            "response_format",
            json!({"type": "structural_tag", "format": {"type": "sequence", "elements": [{"type": "const"}]}}),
            "response_format.format.elements.0.type",
            "const_string",
        ),
        (
            "structured_outputs",
            json!({"structural_tag": "{"}),
            "structured_outputs.structural_tag",
            "not valid JSON",
        ),
        ("structured_outputs", json!({"json": "{"}), "structured_outputs.json", "not valid JSON"),
        ("structured_outputs", json!({"json": "[]"}), "structured_outputs.json", "must be an object"),
        (
            "structured_outputs",
            json!({"json": json!({"enum": vec![0; 200_000]}).to_string()}),
            "structured_outputs.json",
            "longer than 262144 bytes",
        ),
        (
            "chat_template_kwargs",
            json!({"model_identity": "x".repeat(2 << 20)}),
            "input_tokens",
            "bytes of text",
        ),
        // Each result names the function that was called.
        ("messages", results(40_000, 30), "input_tokens", "bytes of text"),
        ("response_format", json!({"type": "yaml"}), "response_format.type", "structural_tag"),
        ("response_format", json!({"type": "regex", "pattern": "("}), "response_format.pattern", "regex"),
        (
            "response_format",
            json!({"type": "grammar", "grammar": "root ::= \"a\"", "syntax": "yacc"}),
            "response_format.syntax",
            "lark, gbnf or ebnf",
        ),
        ("structured_outputs", json!({}), "structured_outputs", "only use one kind"),
        (
            "structured_outputs",
            json!({"regex": "a", "choice": ["b"]}),
            "structured_outputs",
            "only use one kind",
        ),
        ("structured_outputs", json!({"regex": "\0"}), "structured_outputs.regex", "NUL"),
        ("structured_outputs", json!({"choice": []}), "structured_outputs.choice", "must have choices"),
        ("structured_outputs", json!({"grammar": "root ::= x"}), "structured_outputs.grammar", "no rule x"),
        (
            "structured_outputs",
            json!({"grammar": "start: <|end|>"}),
            "structured_outputs.grammar",
            "special tokens",
        ),
        ("structured_outputs", json!({"json": "{"}), "structured_outputs.json", "JSON"),
        ("structured_outputs", json!({"json_object": false}), "structured_outputs.json_object", "true"),
        ("bad_words", json!([""]), "bad_words", "1 to 256 bytes"),
        ("bad_words", json!(vec!["x"; 129]), "bad_words", "128"),
        ("allowed_token_ids", json!([]), "allowed_token_ids", "empty"),
        ("allowed_token_ids", json!([201_088]), "allowed_token_ids", "out of vocabulary"),
        ("logprob_token_ids", json!([1]), "logprob_token_ids", "needs logprobs"),
        ("logprob_token_ids", json!("1"), "logprob_token_ids", "array"),
        ("repetition_detection", json!({}), "repetition_detection", "max_pattern_size"),
        (
            "repetition_detection",
            json!({"max_pattern_size": 2, "min_count": 1}),
            "repetition_detection",
            "min_count of at least 2",
        ),
        (
            "repetition_detection",
            json!({"max_pattern_size": -1}),
            "repetition_detection.max_pattern_size",
            "negative",
        ),
        ("truncate_prompt_tokens", json!(0), "truncate_prompt_tokens", "at least 1"),
        ("truncate_prompt_tokens", json!(5), "truncate_prompt_tokens", "cannot be cut"),
        ("truncation_side", json!("middle"), "truncation_side", "left or right"),
        ("stream_interval", json!(0), "stream_interval", "at least 1"),
        ("cache_salt", json!(""), "cache_salt", "1 to 128"),
        ("cache_salt", json!("a/b"), "cache_salt", "1 to 128"),
        ("cache_salt", json!("x".repeat(129)), "cache_salt", "1 to 128"),
        ("documents", json!([]), "documents", "not supported yet"),
        ("continue_final_message", json!(true), "continue_final_message", "the last message"),
        ("add_generation_prompt", json!("no"), "add_generation_prompt", "boolean"),
        ("use_beam_search", json!(true), "use_beam_search", "not supported yet"),
        ("guided_json", json!({}), "guided_json", "structured_outputs"),
        ("guided_regex", json!("a"), "guided_regex", "structured_outputs"),
        ("guided_choice", json!(["a"]), "guided_choice", "structured_outputs"),
        ("guided_grammar", json!("a"), "guided_grammar", "structured_outputs"),
        ("max_output_tokens", json!(5), "max_output_tokens", "Use max_completion_tokens"),
        ("messages", json!("Hi"), "messages", "array"),
        ("messages", json!([]), "messages", "empty"),
        ("messages", json!(vec![&user; 4097]), "messages", "4096"),
        ("messages", Value::Null, "messages", "required"),
        ("messages", json!([{"content": "Hi"}]), "messages.0.role", "required"),
        ("messages", json!([{"role": "robot", "content": "Hi"}]), "messages.0.role", "robot"),
        ("messages", json!([user, {"role": "user"}]), "messages.1.content", "required"),
        ("messages", json!([user, {"role": "assistant"}]), "messages.1.content", "required"),
        ("messages", json!([{"role": "user", "content": 1}]), "messages.0.content", "string"),
        (
            "messages",
            json!([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]),
            "messages.0.content.1",
            "image_url",
        ),
        ("messages", json!([user, {"role": "tool", "content": "x"}]), "messages.1.tool_call_id", "required"),
        (
            "messages",
            json!([user, {"role": "tool", "tool_call_id": "zz", "content": "x"}]),
            "messages.1.tool_call_id",
            "zz",
        ),
        (
            "messages",
            json!([user, {"role": "assistant", "tool_calls": [call]}]),
            "messages.1.tool_calls",
            "no result: a",
        ),
        (
            "messages",
            json!([user, {"role": "assistant", "tool_calls": [{"type": "function"}]}]),
            "messages.1.tool_calls.0.id",
            "required",
        ),
        (
            "messages",
            json!([user, {"role": "function", "name": "f", "content": "x"}]),
            "messages.1.name",
            "f",
        ),
    ] {
        let mut request = json!({"messages": [user]});
        request[field] = value;
        let error = server.chat(&request).error();
        let what = format!("{field}: {}", &request[field].to_string().chars().take(80).collect::<String>());
        assert!(error.3.contains(message), "{what}: {}", error.3);
        check(&what, error, (400, BAD, Some(param)));
    }
    assert_eq!(server.chat(&json!({"messages": [user]})).status, 200);
}

#[test]
fn rules_across_fields() {
    let server = Fixture::saying(&[HI]);
    let named = json!({"type": "function", "function": {"name": "g"}});
    for (fields, param, message) in [
        (json!({"n": 2, "temperature": 0}), "n", "n must be 1 when using greedy sampling, got 2."),
        (json!({"min_tokens": 5, "max_tokens": 4}), "min_tokens", "max_tokens=4"),
        (json!({"min_tokens": 8192}), "min_tokens", "less than or equal to max_tokens="),
        (json!({"stream": true, "prompt_logprobs": 1}), "prompt_logprobs", "stream"),
        (
            json!({"stream": true, "stream_options": {"continuous_usage_stats": true}}),
            "stream_options.continuous_usage_stats",
            "include_usage",
        ),
        (
            json!({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}),
            "structured_outputs",
            "together with response_format",
        ),
        (json!({"tools": [tool("f")], "tool_choice": named}), "tool_choice", "not among the tools"),
        (
            json!({"tools": [tool("f")], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"tools": [named]}}}),
            "tool_choice.allowed_tools.tools",
            "not among the tools",
        ),
        (
            json!({"logprobs": true, "logprob_token_ids": vec![1; 129]}),
            "logprob_token_ids",
            "at most 128 ids, got 129",
        ),
    ] {
        let mut request = fields.clone();
        request["messages"] = json!([{"role": "user", "content": "Hi"}]);
        let error = server.chat(&request).error();
        assert!(error.3.contains(message), "{fields}: {}", error.3);
        check(&fields.to_string(), error, (400, BAD, Some(param)));
    }
}

#[test]
fn the_first_error_is_always_the_same() {
    let server = Fixture::saying(&[HI]);
    // Everything is wrong; mended one by one, in the order of the checks.
    let mut request = json!({
        "temperature": 9, "stream_options": {}, "model": "nope", "documents": [], "stop": 1
    });
    let mut next = |field: &str, value: Value, expected: (u16, &str, Option<&str>)| {
        check(&request.to_string(), server.chat(&request).error(), expected);
        request[field] = value;
    };
    let long = json!([{"role": "user", "content": "a ".repeat(9000)}]);
    next("messages", long, (400, BAD, Some("messages")));
    next("stop", Value::Null, (400, BAD, Some("stop")));
    next("temperature", Value::Null, (400, BAD, Some("temperature")));
    next("stream_options", Value::Null, (400, BAD, Some("stream_options")));
    next("model", Value::Null, (404, "NotFoundError", Some("model")));
    next("documents", Value::Null, (400, BAD, Some("documents")));
    next("messages", json!([{"role": "user", "content": "Hi"}]), (400, BAD, Some("input_tokens")));
    assert_eq!(server.chat(&request).status, 200);
}

#[test]
fn completion_fields() {
    let server = Fixture::saying(&["x"]);
    for (field, value, param, message) in [
        ("prompt", Value::Null, "prompt", "required"),
        ("prompt", json!(""), "prompt", "empty"),
        ("prompt", json!([]), "prompt", "empty"),
        ("prompt", json!(["a", ""]), "prompt", "empty"),
        ("prompt", json!([[]]), "prompt", "empty"),
        ("prompt", json!({"a": 1}), "prompt", "must be a string"),
        ("prompt", json!([1, "a"]), "prompt", "token ids"),
        ("prompt", json!([-1]), "prompt", "token ids"),
        ("prompt", json!(["a", 1]), "prompt.1", "string"),
        ("prompt", json!([201_088]), "prompt", "out of vocabulary"),
        ("prompt", json!(vec!["a"; 1025]), "prompt", "1024"),
        ("max_tokens", json!(0), "max_tokens", "at least 1"),
        ("logprobs", json!(true), "logprobs", "integer"),
        ("logprobs", json!(21), "logprobs", "greater than max allowed: 20"),
        ("suffix", json!("x"), "suffix", "not supported"),
        ("best_of", json!(2), "best_of", "not supported"),
        ("prompt_embeds", json!("x"), "prompt_embeds", "not supported"),
        ("guided_regex", json!("x"), "guided_regex", "structured_outputs"),
        ("response_format", json!({"type": "regex", "pattern": "("}), "response_format.pattern", "regex"),
    ] {
        let mut request = json!({"prompt": "Hi"});
        request[field] = value;
        let error = server.complete(&request).error();
        let what = format!("{field}: {}", &request[field].to_string().chars().take(80).collect::<String>());
        assert!(error.3.contains(message), "{what}: {}", error.3);
        check(&what, error, (400, BAD, Some(param)));
    }
}

#[test]
fn prompts_that_are_too_long() {
    let server = Fixture::saying(&["x"]);
    let ids = vec![1; 8192];
    let error = server.complete(&json!({"prompt": ids})).error();
    assert_eq!(
        error.3,
        "This model's maximum context length is 8192 tokens. However, your prompt contains 8192 input tokens. Please \
         reduce the length of the input prompt."
    );
    check("ids", error, (400, BAD, Some("input_tokens")));
    let absurd = "a".repeat(8192 * 128 + 1);
    for response in [
        server.complete(&json!({"prompt": absurd})),
        server.chat(&json!({"messages": [{"role": "user", "content": absurd}]})),
        server.complete(&json!({"prompt": vec![1; 100_000]})),
    ] {
        check("absurd", response.error(), (400, BAD, Some("input_tokens")));
    }
    // One that fits leaves room for one token, whatever was asked.
    let whole = server.complete(&json!({"prompt": ids[1..], "max_tokens": 100})).ok();
    assert_eq!(whole["usage"]["completion_tokens"], 1);
}

#[test]
fn bodies_that_cannot_be_read() {
    let server = Fixture::start(
        &Options { max_body_bytes: 10_000, ..options() },
        Scripted::new(Scripted::gpt_oss(), vec![tokens(HI)]),
        engine_options(),
    );
    let path = "/v1/chat/completions";
    let post = |body: &[u8]| server.request("POST", path, JSON, body).error();
    for body in ["", "{", "nonsense", "[]", "\"x\"", "{\"messages\": NaN}", "{} {}"] {
        check(body, post(body.as_bytes()), (400, BAD, None));
    }
    check("UTF-8", post(b"{\"messages\": \"\xff\"}"), (400, BAD, None));
    let deep = format!("{{\"messages\": {}{}}}", "[".repeat(128), "]".repeat(128));
    check("nesting", post(deep.as_bytes()), (400, BAD, None));
    let surrogate = r#"{"messages": [{"role": "user", "content": "\ud800"}]}"#;
    check("surrogate", post(surrogate.as_bytes()), (400, BAD, Some("messages.0.content")));

    for body in [r#"{"\ud800": 1}"#, r#"{"messages": [], "\ud800": 1}"#] {
        let error = post(body.as_bytes());
        assert!(error.3.starts_with("The request body is not valid: "), "{}", error.3);
        check("surrogate in a name", error, (400, BAD, None));
    }
    let nested = post(br#"{"messages": [{"\ud800": 1}]}"#);
    check("surrogate in a name", nested, (400, BAD, Some("messages.0")));

    check("too large", post(&[b' '; 10_001]), (413, BAD, None));
    let huge = format!("POST {path} HTTP/1.1\r\nhost: test\r\n{JSON}content-length: 99999999999\r\n\r\n");
    check("announced too large", server.raw(huge.as_bytes()).error(), (413, BAD, None));
    let chunk = format!("{:x}\r\n{}\r\n", 5001, " ".repeat(5001));
    let chunked = format!(
        "POST {path} HTTP/1.1\r\nhost: test\r\n{JSON}transfer-encoding: chunked\r\n\r\n{chunk}{chunk}0\r\n\r\n"
    );
    check("chunks too large", server.raw(chunked.as_bytes()).error(), (413, BAD, None));

    let body = br#"{"messages": [{"role": "user", "content": "Hi"}]}"#;
    for headers in ["", "content-type: text/plain\r\n", "content-type: application/jsonp\r\n"] {
        check(headers, server.request("POST", path, headers, body).error(), (415, BAD, None));
    }
    for encoding in ["gzip", "identity, br"] {
        let headers = format!("{JSON}content-encoding: {encoding}\r\n");
        let error = server.request("POST", path, &headers, body).error();
        assert!(error.3.contains("Content-Encoding"), "{}", error.3);
        check(encoding, error, (415, BAD, None));
    }
    let plain = format!("{JSON}content-encoding: Identity\r\n");
    assert_eq!(server.request("POST", path, &plain, body).status, 200);
    assert_eq!(server.request("POST", path, JSON, body).status, 200);
    let marked = [b"\xef\xbb\xbf".as_slice(), body].concat();
    assert_eq!(server.request("POST", path, JSON, &marked).status, 200);
    let twice = br#"{"messages": 1, "messages": [{"role": "user", "content": "Hi"}]}"#;
    assert_eq!(server.request("POST", path, JSON, twice).status, 200);
}

#[test]
fn paths_and_methods() {
    let server = Fixture::saying(&[HI]);
    for path in ["/v1", "/v1/chat", "/v1/nothing", "/v2/models", "/%ff"] {
        check(path, server.get(path).error(), (404, "NotFoundError", None));
    }
    for path in ["/v1/responses/input_tokens", "/v1/responses/compact"] {
        check(path, server.post(path, &json!({"input": "Hi"})).error(), (404, "NotFoundError", None));
    }
    for (method, path, allow) in [
        ("GET", "/v1/chat/completions", "POST"),
        ("DELETE", "/v1/completions", "POST"),
        ("POST", "/v1/models", "GET,HEAD"),
        ("POST", "/health", "GET,HEAD"),
    ] {
        let response = server.request(method, path, "", b"");
        check(path, response.error(), (405, "MethodNotAllowedError", None));
        assert_eq!(response.header("allow"), Some(allow), "{method} {path}");
    }
    for path in
        ["/v1/embeddings", "/v1/audio/speech", "/v1/images/generations", "/score", "/rerank", "/pooling"]
    {
        check(path, server.post(path, &json!({})).error(), (501, "NotImplementedError", None));
    }
    check("model", server.get("/v1/models/nope").error(), (404, "NotFoundError", Some("model")));
    let error = server.post("/v1/completions", &json!({"prompt": "a", "model": "nope"})).error();
    assert_eq!(error.3, "The model `nope` does not exist. Valid aliases: tiny, org/alias.");
    let long = "x".repeat(5000);
    let error = server.post("/v1/completions", &json!({"prompt": "a", "model": long})).error();
    assert!(error.3.len() < 300);
}

#[test]
fn keys() {
    let options = Options { api_keys: vec!["first".to_owned(), "sécond".to_owned()], ..options() };
    let server =
        Fixture::start(&options, Scripted::new(Scripted::gpt_oss(), vec![tokens(HI)]), engine_options());
    let get = |headers: &str| server.request("GET", "/v1/models", headers, b"");
    for headers in [
        "",
        "authorization: Bearer wrong\r\n",
        "authorization: Bearer firs\r\n",
        "authorization: Bearer first \u{e9}\r\n",
        "authorization: Bearer  first\r\n",
        "authorization: first\r\n",
        "authorization: Basic first\r\n",
        "authorization: Bearer\r\n",
        "authorization: é\r\n",
    ] {
        let response = get(headers);
        check(headers, response.error(), (401, "AuthenticationError", None));
        assert_eq!(response.header("www-authenticate"), Some("Bearer"));
    }
    assert_eq!(get("authorization: Bearer first\r\n").status, 200);
    assert_eq!(get("authorization: bearer sécond\r\n").status, 200);
    // Everything but probes is guarded, and the media type comes first.
    check("404", server.get("/nothing").error(), (401, "AuthenticationError", None));
    check("405", server.get("/v1/chat/completions").error(), (401, "AuthenticationError", None));
    let post = server.request("POST", "/v1/completions", "", b"{");
    check("415", post.error(), (415, BAD, None));
    let post = server.request("POST", "/v1/completions", JSON, b"{");
    check("401", post.error(), (401, "AuthenticationError", None));
    for path in ["/health", "/live", "/ready", "/ping", "/version"] {
        assert_eq!(server.get(path).status, 200, "{path}");
    }
    assert_eq!(server.request("OPTIONS", "/v1/models", "", b"").status, 405);
}
