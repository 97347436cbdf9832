//! Answers that must follow a grammar, over scripts that say something else, and forms that are refused.

use std::sync::OnceLock;

use engine::{
    Engine, EngineOptions, Event, Failure, FinishReason, Form, GrammarError, Grammars, OutputMode, Request,
    SamplingParams, Scripted, Structure, Tag, TurnRules, Whitespace,
};
use harmony::{Delta, Turn};
use serde_json::{Value, json};

use crate::common::{harmony, run, says, start, submit, tokens, tokens_of, unlimited};

fn schema(schema: Value) -> Form {
    Form::Json { schema, lenient: false, whitespace: Whitespace::default() }
}

fn point() -> Form {
    schema(json!({
        "type": "object",
        "properties": {"x": {"type": "integer"}, "y": {"enum": ["a", "b"]}},
        "required": ["x", "y"],
        "additionalProperties": false
    }))
}

fn answering(form: Form) -> TurnRules {
    TurnRules { reasoning: true, answer: Some(form), calls: Vec::new(), many_calls: true }
}

/// All tests compile in one engine, since to prepare the vocabulary takes a while.
fn grammars() -> &'static Grammars {
    static ENGINE: OnceLock<Engine> = OnceLock::new();
    ENGINE.get_or_init(|| says("x<|return|>")).grammars()
}

fn request(rules: &TurnRules, params: SamplingParams) -> Request {
    let tools = rules.calls.iter().map(|(name, _)| name.clone()).collect();
    let output = OutputMode::Chat { tools, begun: Vec::new() };
    Request { grammar: Some(grammars().turn(rules).unwrap()), ..Request::new(vec![1], params, output) }
}

/// A chat whose script is `text`: its fields, how it ended, its tokens.
fn chat(text: &str, rules: &TurnRules, params: SamplingParams) -> (Turn, FinishReason, Vec<u32>) {
    let events = run(&says(text), request(rules, params));
    let deltas: Vec<Delta> = events
        .iter()
        .flat_map(|event| match event {
            Event::Tokens { deltas, .. } => deltas.clone(),
            _ => Vec::new(),
        })
        .collect();
    let reason = events.iter().find_map(|event| match event {
        Event::Finished { reason, .. } => Some(*reason),
        _ => None,
    });
    (Turn::collect(&deltas), reason.unwrap(), tokens_of(&events, 0))
}

fn at_most(max_tokens: usize) -> SamplingParams {
    SamplingParams { max_tokens: Some(max_tokens), ..unlimited() }
}

#[test]
fn good_turns_pass_unchanged() {
    let call = |i: usize| (format!("f{i}"), point());
    let both = TurnRules { calls: vec![call(0), call(1)], ..answering(point()) };
    for good in [
        r#"<|channel|>analysis<|message|>Think 👋.<|end|><|start|>assistant<|channel|>final<|message|>{"x": 1, "y": "a"}<|return|>"#,
        r#"<|channel|>final <|constrain|>json<|message|>{"x":-12,"y":"b"}<|return|>"#,
        r#"<|channel|>commentary to=functions.f0 <|constrain|>json<|message|>{"x": 1, "y": "a"}<|call|>"#,
        r#" to=functions.f1<|channel|>commentary json<|message|>{"x": 1, "y": "a"}<|call|>"#,
        r#"<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>Let me look.<|end|><|start|>assistant<|channel|>commentary to=functions.f0<|message|>{"x": 1, "y": "a"}<|end|><|start|>assistant<|channel|>commentary to=functions.f1 <|constrain|>json<|message|>{"x": 2, "y": "b"}<|call|>"#,
    ] {
        let (_, _, said) = chat(good, &both, at_most(200));
        assert_eq!(said, tokens(good), "{good}");
    }
}

#[test]
fn bad_turns_are_bent() {
    // A bare text becomes an answer, of which only what fits is left.
    for bad in [
        "I cannot do that, sorry.<|return|>",
        r#"<|channel|>final<|message|>{"x": "one", "z": 3}<|return|>"#,
        r#"<|channel|>commentary to=functions.f<|message|>{}<|call|>"#,
        "<|return|>",
        "<|end|><|end|><|end|>",
        "\u{fffd}👋<|start|><|channel|>",
    ] {
        let (turn, reason, said) = chat(bad, &answering(point()), at_most(60));
        if reason == FinishReason::Stop {
            let answer: Value = serde_json::from_str(turn.content.as_deref().unwrap())
                .unwrap_or_else(|e| panic!("{bad}: {turn:?}: {e}"));
            assert!(answer["x"].is_number() && (answer["y"] == "a" || answer["y"] == "b"), "{answer}");
        } else {
            assert_eq!(said.len(), 60, "{bad}");
        }
        assert!(turn.tool_calls.is_empty());
    }
    // Of all scripts one that answers at once.
    let (turn, reason, _) =
        chat(r#"<|channel|>final<|message|>{"x":7,"y":"c"}<|return|>"#, &answering(point()), at_most(60));
    assert_eq!(reason, FinishReason::Stop);
    let answer: Value = serde_json::from_str(&turn.content.unwrap()).unwrap();
    assert_eq!(answer["x"], 7);
}

#[test]
fn calls_that_must_be_made() {
    let rules = TurnRules {
        reasoning: true,
        answer: None,
        calls: vec![("look.up".to_owned(), point())],
        many_calls: false,
    };
    let (turn, reason, _) =
        chat(r#"<|channel|>final<|message|>No.<|return|>{"x": 5, "y": "b"}<|call|>"#, &rules, at_most(100));
    // Reasoning and preamble may go on as long as the script likes, but there is never an answer.
    assert!(reason != FinishReason::Stop, "{turn:?}");
    let (turn, reason, _) = chat(
        r#"<|channel|>commentary to=functions.look.up <|constrain|>json<|message|>{"x": 5, "q": 1}<|call|>"#,
        &rules,
        at_most(100),
    );
    if reason == FinishReason::ToolCalls {
        assert_eq!(turn.tool_calls[0].name, "look.up");
        let arguments: Value = serde_json::from_str(&turn.tool_calls[0].arguments).unwrap();
        assert_eq!(arguments["x"], 5);
    }
    // With `many_calls` off a second one cannot begin.
    let two = r#"<|channel|>commentary to=functions.look.up<|message|>{"x": 5, "y": "a"}<|end|><|start|>assistant<|channel|>commentary to=functions.look.up<|message|>{"x": 6, "y": "a"}<|call|>"#;
    let (turn, reason, _) = chat(two, &rules, at_most(100));
    assert_eq!((turn.tool_calls.len(), reason), (1, FinishReason::ToolCalls));
    let (turn, ..) = chat(two, &TurnRules { many_calls: true, ..rules }, at_most(100));
    assert_eq!(turn.tool_calls.len(), 2);
}

#[test]
fn other_forms() {
    let forms = [
        (Form::Regex(r"[a-c]{3}/\d+x".to_owned()), "abc/17x", "xyz"),
        (Form::Choice(vec!["yes".to_owned(), "no \"way\"\n".to_owned()]), "no \"way\"\n", "maybe"),
        (Form::Lark("start: \"<\" inner \">\"\ninner: /[a-z]+/".to_owned()), "<ab>", "ab"),
        (schema(json!({"type": "object"})), r#"{"a": [1, {"b": null}]}"#, "[1]"),
        (Form::Text, "anything\nat all", ""),
    ];
    for (form, good, bad) in forms {
        let final_of = |text: &str| format!("<|channel|>final<|message|>{text}<|return|>");
        let (turn, reason, _) = chat(&final_of(good), &answering(form.clone()), at_most(80));
        assert_eq!((turn.content.as_deref(), reason), (Some(good), FinishReason::Stop), "{form:?}");
        let (turn, _, _) = chat(&final_of(bad), &answering(form.clone()), at_most(10));
        if !bad.is_empty() {
            assert_ne!(turn.content.as_deref(), Some(bad), "{form:?}");
        }

        // As a raw text.
        let engine = says(&format!("{good}<|return|>"));
        let grammar = grammars().text(&form).unwrap();
        let request =
            Request { grammar: Some(grammar), ..Request::new(vec![1], at_most(80), OutputMode::Text) };
        let mut expected = tokens(good);
        expected.push(crate::common::RETURN);
        assert_eq!(tokens_of(&run(&engine, request), 0), expected);
    }
}

#[test]
fn grammars_in_llama_cpps_notation() {
    let json = r##"
        # A JSON document.
        root   ::= object
        value  ::= object | array | string | number | ("true" | "false" | "null") ws

        object ::= "{" ws ( string ":" ws value ("," ws string ":" ws value)* )? "}" ws
        array  ::= "[" ws (
            value ("," ws value)*
        )? "]" ws
        string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws
        number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [1-9] [0-9]{0,15})? ws
        ws     ::= | " " | "\n" [ \t]{0,20}"##;
    let sums = "root ::= (expr \"=\" term \"\\n\")+\nexpr ::= term ([-+*/] term)*\nterm ::= num | \"(\" expr \")\"\n\
                num ::= [0-9]+ ";
    for (grammar, good, bad) in [
        (json, "{\"a b\": [1, -2.5e3, \"\\u00e9\\\"é👋\", {}], \"c\":null}", "{a: 1}"),
        (sums, "(1+2)*30=90\n7=7\n", "1+=2\n"),
        // Words that others begin with, in any order.
        (r#"root ::= [a-z]+ "c1" | "abc" "d""#, "abcabcc1", "abc"),
        (r#"root ::= [a-z]+ "c1" | "abc" "d""#, "abcd", "d"),
        (
            r#"root ::= x-y{2,3} z_1? .
             x-y ::= "é" | [α-ω]
             z_1 ::= "\x41\u00e9\U0001f44b""#,
            "éωαAé👋\n",
            "é",
        ),
        (r#"root ::= ("a" | ) ( ) "" "b"{2} "c"{0} "d"{1,}"#, "bbdd", "abbc"),
        (r#"root ::= [^a\]\-]{3} [-x] [^]"#, "bcd-\n", "a]-"),
    ] {
        let form = Form::Gbnf(grammar.to_owned());
        let final_of = |text: &str| format!("<|channel|>final<|message|>{text}<|return|>");
        let (turn, reason, _) = chat(&final_of(good), &answering(form.clone()), at_most(80));
        assert_eq!((turn.content.as_deref(), reason), (Some(good), FinishReason::Stop), "{grammar}");
        let (turn, _, _) = chat(&final_of(bad), &answering(form), at_most(10));
        assert_ne!(turn.content.as_deref(), Some(bad), "{grammar}");
    }
    for (grammar, expected) in [
        ("", "there must be a rule root"),
        ("root = \"a\"", "line 1: expected ::=, found \"= \\\"a\\\"\""),
        ("root ::= \"a\"\nroot ::= \"b\"", "the rule root is there twice"),
        ("root ::= \"a\" b", "there is no rule b"),
        ("root ::= (\"a\"\n\n", "expected `)` at its end"),
        ("root ::= \"a\n", "expected `\"` at its end"),
        ("root ::= [a-", "expected `]` at its end"),
        ("root ::= [z-a]", "the range from 'z' to 'a' is empty"),
        ("root ::= []", "a class of no characters matches nothing"),
        ("root ::= \"\\q\"", "line 1: expected one of"),
        ("root ::= \"\\ud800\"", "line 1: expected the hexadecimal digits of a character"),
        ("root ::= \"\\u12", "line 1: expected the hexadecimal digits of a character"),
        ("root ::= \"a\"{x}", "line 1: expected a number, found \"x}\""),
        ("root ::= \"a\"{3,2}", "{3,2} asks for nothing"),
        (&format!("root ::= \"a\"{}", "*".repeat(60_000)), "at most 64 repetitions of repetitions"),
        ("root ::= \"a\"{99999999999}", "at most 10000 repetitions may be asked for"),
        ("root ::= \"a\" ) \"b\"", "line 1: expected a rule's name, found \") \\\"b\\\"\""),
    ] {
        let error = grammars().text(&Form::Gbnf(grammar.to_owned())).unwrap_err().to_string();
        assert!(error.contains(expected), "{grammar}: {error}");
    }
}

#[test]
fn structural_tags() {
    let tag = |begin: &str, content: Structure, end: &str| Tag {
        begin: begin.to_owned(),
        content,
        end: end.to_owned(),
    };
    let form = |form: Form| Structure::Form(Box::new(form));
    let triggered = |at_least_one, stop_after_first| Structure::Triggered {
        triggers: vec!["<f=".to_owned(), "<think".to_owned()],
        tags: vec![
            tag("<f=a>", form(point()), "</f>"),
            tag("<f=ab>", form(Form::Regex("[0-9]+".to_owned())), "</f>"),
            tag("<think>", Structure::Any, "</think>"),
        ],
        at_least_one,
        stop_after_first,
    };
    let separated = |at_least_one, stop_after_first| Structure::Separated {
        tags: vec![
            tag("<", form(Form::Gbnf("root ::= [a-z]+".to_owned())), ">"),
            tag("!", Structure::Const("x".to_owned()), ""),
        ],
        separator: ", ".to_owned(),
        at_least_one,
        stop_after_first,
    };
    let or = Structure::Or(vec![Structure::Const("yes".to_owned()), Structure::Const("no".to_owned())]);
    let sequence = Structure::Sequence(vec![or, Structure::Const(": ".to_owned()), Structure::Any]);
    let one = r#"<f=a>{"x": 1, "y": "a"}</f>"#;
    let several = format!("I < you. {one} and <f=ab>12</f> <f <thin <think>of <f=</think>!");
    let rows: Vec<(Structure, String, &str)> = vec![
        (triggered(false, false), "No tags, <b>only</b> text.".to_owned(), "<f=c>"),
        (triggered(false, false), several.clone(), r#"<f=a>{"x": "no"}</f>"#),
        (triggered(true, false), several, "No tag."),
        (triggered(true, true), format!("So: {one}"), "None."),
        (triggered(false, true), format!("So: {one}"), "<f=ab>x</f>"),
        (triggered(false, true), "None.".to_owned(), "<f=a>"),
        (separated(false, false), "<abc>, !x, <d>".to_owned(), "<abc><d>"),
        (separated(true, true), "<abc>".to_owned(), "<abc>, <d>"),
        (sequence, "no: because\nof <f=".to_owned(), "maybe"),
        (Structure::Tag(Box::new(tag("[", Structure::Any, "]]"))), "[a]b]]".to_owned(), "[a]] b"),
    ];
    for (structure, good, bad) in rows {
        let form = Form::Structure(structure);
        let final_of = |text: &str| format!("<|channel|>final<|message|>{text}<|return|>");
        let (turn, reason, _) = chat(&final_of(&good), &answering(form.clone()), at_most(80));
        assert_eq!((turn.content.as_deref(), reason), (Some(&*good), FinishReason::Stop), "{form:?}");
        let (turn, ..) = chat(&final_of(bad), &answering(form.clone()), at_most(20));
        assert_ne!(turn.content.as_deref(), Some(bad), "{form:?}");
        assert!(grammars().text(&form).is_ok());
    }
    let deep = (0..40).fold(Structure::Any, |inner, _| Structure::Sequence(vec![inner]));
    for (structure, expected) in [
        (Structure::Sequence(vec![Structure::Any, Structure::Any]), "any_text must be the last"),
        (Structure::Or(Vec::new()), "something to choose from"),
        (deep, "32 levels"),
        (Structure::Or(vec![Structure::Const("x".to_owned()); 1001]), "1000 parts"),
        (form(Form::Regex("(".to_owned())), "unclosed group"),
        (form(Form::Regex("(?=a)b".to_owned())), "look-ahead and look-behind, is not supported"),
        (form(Form::Lark("start: <|return|>".to_owned())), "special tokens"),
        (
            Structure::Triggered {
                triggers: vec!["<".to_owned()],
                tags: vec![tag("[", Structure::Any, "]")],
                at_least_one: false,
                stop_after_first: false,
            },
            "begins with no trigger",
        ),
    ] {
        let error = grammars().text(&Form::Structure(structure)).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn whitespace_is_bounded() {
    let spaced = r#"<|channel|>final<|message|>{   "x":    1,    "y":"a"}<|return|>"#;
    let (turn, ..) = chat(spaced, &answering(point()), at_most(100));
    assert!(!turn.content.unwrap().contains("  "));
    let Form::Json { schema, .. } = point() else { unreachable!() };
    for (whitespace, text) in [
        (Whitespace::None, r#"{"x":1,"y":"a"}"#),
        (Whitespace::Pattern("[ \n]{0,3}".to_owned()), "{ \n \"x\":1, \n \"y\":\"a\"}"),
    ] {
        let form = Form::Json { schema: schema.clone(), lenient: false, whitespace };
        let said = format!("<|channel|>final<|message|>{text}<|return|>");
        let (turn, ..) = chat(&said, &answering(form), at_most(100));
        assert_eq!(turn.content.as_deref(), Some(text));
    }
}

#[test]
fn several_choices_go_their_own_ways() {
    let script = |y: &str| tokens(&format!(r#"<|channel|>final<|message|>{{"x": 1, "y": "{y}"}}<|return|>"#));
    let backend = Scripted::new(Scripted::gpt_oss(), vec![script("a"), script("b"), script("a")]);
    let engine = start(backend, EngineOptions::default());
    let grammar = grammars().turn(&answering(point())).unwrap();
    let output = OutputMode::Chat { tools: [].into(), begun: Vec::new() };
    let params = SamplingParams { n: 3, ..unlimited() };
    let events =
        run(&engine, Request { grammar: Some(grammar), ..Request::new(vec![1; 40], params, output) });
    let said: Vec<_> = (0..3).map(|choice| tokens_of(&events, choice)).collect();
    assert_eq!(said, [script("a"), script("b"), script("a")]);
}

#[test]
fn other_limits_hold_as_well() {
    let good = r#"<|channel|>final<|message|>{"x": 1, "y": "a"}<|return|>"#;
    // The grammar ends the answer, however many tokens it should have.
    let (turn, reason, _) = chat(good, &answering(point()), SamplingParams { min_tokens: 50, ..at_most(60) });
    assert_eq!((turn.content.as_deref(), reason), (Some(r#"{"x": 1, "y": "a"}"#), FinishReason::Stop));
    // Where more may come, it must.
    let letters = answering(Form::Regex("a+".to_owned()));
    let said = "<|channel|>final<|message|>a<|return|>";
    let (_, _, early) = chat(said, &letters, at_most(60));
    let (_, _, late) = chat(said, &letters, SamplingParams { min_tokens: 12, ..at_most(60) });
    assert!(early.len() < 12 && late.len() >= 12);

    // Fields that forbid what the grammar demands: an error, not another answer.
    let engine = says(good);
    let grammar = grammars().turn(&answering(point())).unwrap();
    let params = SamplingParams { allowed_token_ids: Some(vec![5, 6].into()), ..unlimited() };
    let output = OutputMode::Chat { tools: [].into(), begun: Vec::new() };
    let (_handle, events) =
        submit(&engine, Request { grammar: Some(grammar), ..Request::new(vec![1], params, output) });
    let last = events.iter().last();
    assert!(matches!(last, Some(Event::Failed(Failure::Grammar(_)))), "{last:?}");
}

#[test]
fn the_same_form_is_compiled_once() {
    let grammar = |form| grammars().turn(&answering(form)).unwrap();
    assert_eq!(grammar(point()), grammar(point()));
    assert_ne!(grammar(point()), grammar(Form::Text));
}

#[test]
fn what_cannot_be_enforced_is_refused_or_listed() {
    let odd = json!({"type": "string", "contentSchema": {}, "if": {"minLength": 2}});
    let refused = grammars().turn(&answering(schema(odd.clone()))).unwrap_err();
    assert!(refused.to_string().contains("if"), "{refused}");
    let lenient = Form::Json { schema: odd, lenient: true, whitespace: Whitespace::default() };
    let grammar = grammars().turn(&answering(lenient)).unwrap();
    assert!(grammar.warnings().iter().any(|warning| warning.contains("if")), "{:?}", grammar.warnings());

    // The form at fault is named.
    let bad = ("g".to_owned(), schema(json!({"type": "nothing"})));
    let rules = TurnRules { calls: vec![("f".to_owned(), point()), bad], ..answering(Form::Text) };
    let refused = grammars().turn(&rules).unwrap_err();
    assert!(matches!(refused, GrammarError::Call { index: 1, .. }), "{refused:?}");
}

/// None of these may end the process, take long or be taken for something else.
#[test]
fn hostile_forms() {
    let nested =
        |depth: usize| (0..depth).fold(json!({"type": "string"}), |inner, _| json!({"items": inner}));
    let wide = |count: usize| {
        let properties: serde_json::Map<String, Value> =
            (0..count).map(|i| (format!("p{i}"), json!({"type": "string"}))).collect();
        json!({"type": "object", "properties": properties})
    };
    let product: Vec<Value> = (0..40)
        .map(|i| {
            let any: Vec<Value> =
                (0..10).map(|j| json!({"properties": {format!("a{i}"): {"const": j}}})).collect();
            json!({"anyOf": any})
        })
        .collect();
    let chain: serde_json::Map<String, Value> = (0..5000)
        .map(|i| (format!("d{i}"), json!({"$ref": format!("#/$defs/d{}", i + 1)})))
        .chain([("d5000".to_owned(), json!({"type": "string"}))])
        .collect();
    let patterns =
        |count: usize| -> Vec<Value> { (0..count).map(|i| json!({"pattern": format!(".*{i}.*")})).collect() };
    let keys: serde_json::Map<String, Value> = (0..5000).map(|i| (format!("^a{i}x$"), json!({}))).collect();
    let rules: String = (0..9000).map(|i| format!("a{i}:a{}\n", i + 1)).collect();
    let refused: Vec<(&str, Form)> = vec![
        ("deep schema", schema(nested(64))),
        ("wide schema", schema(wide(10_001))),
        ("many enumerated", schema(json!({"enum": (0..10_001).collect::<Vec<_>>()}))),
        ("long schema", schema(json!({"description": "x".repeat(300 << 10)}))),
        ("no object", schema(json!(true))),
        ("a product of alternatives", schema(json!({"allOf": product}))),
        ("many patterns of one string", schema(json!({"type": "string", "allOf": patterns(30)}))),
        ("many patterns of keys", schema(json!({"type": "object", "patternProperties": keys}))),
        ("nothing fits", schema(json!({"type": "string", "minLength": 3, "maxLength": 2}))),
        ("a reference to nowhere", schema(json!({"$ref": "#/$defs/x"}))),
        ("a reference elsewhere", schema(json!({"$ref": "http://127.0.0.1:1/x"}))),
        ("brackets", Form::Regex("(".repeat(10_000) + &")".repeat(10_000))),
        ("not a regular expression", Form::Regex("(".to_owned())),
        ("long", Form::Regex("a".repeat((16 << 10) + 1))),
        ("NUL", Form::Regex("a\0".to_owned())),
        ("no choices", Form::Choice(Vec::new())),
        ("many choices", Form::Choice(vec!["a".to_owned(); 10_001])),
        ("no start", Form::Lark("a: \"b\"".to_owned())),
        (
            "brackets in a grammar",
            Form::Lark(format!("start: {}a{}", "(".repeat(30_000), ")".repeat(30_000))),
        ),
        ("negations", Form::Lark(format!("start: {}/a/", "~".repeat(30_000)))),
        ("brackets of llama.cpp", Form::Gbnf(format!("root ::= {}\"a\"", "(".repeat(30_000)))),
        ("repetitions of repetitions", Form::Gbnf(format!("root ::= \"a\"{}", "*".repeat(30_000)))),
        ("special tokens", Form::Lark("start: <|return|>".to_owned())),
        ("token ids", Form::Lark("start: <[200002]>".to_owned())),
        ("a grammar within", Form::Lark("start: @nowhere".to_owned())),
        ("the turn within", Form::Lark("start: \"a\" @turn | \"x\"".to_owned())),
        ("rules for ever", Form::Lark(format!("start: a0\n{rules}"))),
    ];
    for (what, form) in refused {
        let error = grammars().turn(&answering(form)).err();
        let error = error.unwrap_or_else(|| panic!("{what} was taken")).to_string();
        assert!(error.len() < 1000, "{what}: {error}");
    }
    // What would be compiled for ever is refused for what it is, not because its time is over.
    let strings = json!({"type": "string", "allOf": patterns(24)});
    let items: Vec<Value> = patterns(24).iter().map(|pattern| json!({"items": [pattern]})).collect();
    let draft = "http://json-schema.org/draft-07/schema#";
    let both = (0..24).map(|i| format!("/.*[z{}].*/", char::from(b'a' + i))).collect::<Vec<_>>().join(" & ");
    for (form, reason) in [
        (schema(json!({"type": "integer", "multipleOf": 99_999_989})), "automaton"),
        (schema(json!({"type": "number", "multipleOf": 90_001})), "automaton"),
        (
            schema(json!({"allOf": [{"type": "integer", "multipleOf": 997}, {"multipleOf": 991}]})),
            "automaton",
        ),
        (Form::Lark(format!("start: %json {strings}")), "5 patterns"),
        (Form::Lark(format!("start: A | b\nA: \"%json\"\nb: %json\n{strings}")), "5 patterns"),
        (Form::Lark(format!("start: A\nA: {both}")), "at most 10 `&`"),
        (schema(json!({"$schema": draft, "type": "array", "allOf": items})), "5 patterns"),
        (
            schema(json!({"properties": {"id": {"enum": [9_007_199_254_740_993i64]}}})),
            "`enum` has 9007199254740993",
        ),
        (Form::Lark("start: %json {\"maximum\": 9007199254740993}".to_owned()), "2^53"),
        // A tag for each of the triggers that it begins with.
        (
            Form::Structure(Structure::Triggered {
                triggers: vec!["a".to_owned(); 900],
                tags: vec![Tag { begin: "a".repeat(300_000), content: Structure::Any, end: "b".to_owned() }],
                at_least_one: false,
                stop_after_first: false,
            }),
            "1048576 bytes of grammar",
        ),
    ] {
        let error = grammars().turn(&answering(form.clone())).unwrap_err().to_string();
        assert!(error.contains(reason), "{form:?}: {error}");
    }
    // Large, but as good as any.
    let multiple =
        |of: f64| schema(json!({"type": "number", "multipleOf": of, "minimum": 0, "maximum": 99_999}));
    for (what, form) in [
        ("a multiple of 5", multiple(5.0)),
        ("a multiple of 0.01", multiple(0.01)),
        ("a multiple of 1000", multiple(1000.0)),
        ("a multiple of 3600", schema(json!({"type": "integer", "multipleOf": 3600}))),
        (
            "a schema in a grammar",
            Form::Lark("start: \"x\" %json {\"type\": \"integer\", \"multipleOf\": 100}".to_owned()),
        ),
        ("a chain of references", schema(json!({"$ref": "#/$defs/d0", "$defs": chain}))),
        ("many properties", schema(wide(2000))),
        ("many repetitions", Form::Gbnf("root ::= (((\"ab\"{9999}){9999}){9999}){9999}".to_owned())),
        ("a long array", schema(json!({"type": "array", "maxItems": 1_000_000_000u64}))),
        ("a long string", schema(json!({"type": "string", "maxLength": 1_000_000_000u64}))),
        ("a repeated repetition", Form::Regex("((a{1000}){1000}){1000}b".to_owned())),
        ("alternatives of repetitions", Form::Regex("(a|aa|a{2,90}){1,900}(.{0,9000}b){99}".to_owned())),
        ("a reference to itself", schema(json!({"$ref": "#"}))),
        ("a grammar that contains itself", Form::Lark("start: \"a\" | start start".to_owned())),
    ] {
        // Taken or refused, nothing breaks.
        match grammars().turn(&answering(form.clone())) {
            Err(error) => assert!(error.to_string().len() < 1000, "{what}: {error}"),
            Ok(_) => {
                let said = "<|channel|>final<|message|>aaaa";
                let engine = says(said);
                let (_handle, events) = submit(&engine, request(&answering(form), at_most(9)));
                match events.iter().last() {
                    Some(Event::Done) => {}
                    Some(Event::Failed(Failure::Grammar(reason))) => {
                        assert!(!reason.contains('\n'), "{what}: {reason}");
                    }
                    last => panic!("{what}: {last:?}"),
                }
            }
        }
    }
}

/// More than the compiler allows by itself.
#[test]
fn large_forms_are_kept_to() {
    let choices: Vec<String> = (0..2_500).map(|i| format!("choice {i}")).collect();
    let members: serde_json::Map<String, Value> =
        (0..600).map(|i| (format!("p{i}"), json!({"type": "integer"}))).collect();
    let members = json!({"type": "object", "properties": members, "additionalProperties": false});
    let nested = (0..28).fold(Structure::Const("x".to_owned()), |content, _| Structure::Separated {
        tags: vec![Tag { begin: "<".to_owned(), content, end: ">".to_owned() }],
        separator: ",".to_owned(),
        at_least_one: true,
        stop_after_first: false,
    });
    let tags = format!("{}x{}", "<".repeat(28), ">".repeat(28));
    for (form, answer) in [
        (schema(json!({"anyOf": (0..2_100).map(|i| json!({"const": [i]})).collect::<Vec<_>>()})), "[2099]"),
        (schema(members), r#"{"p3":4,"p599":5}"#),
        (
            schema(json!({"type": "integer", "minimum": i64::MIN, "maximum": i64::MAX})),
            "-1795947594123456789",
        ),
        (Form::Choice(choices), "choice 77"),
        (Form::Structure(nested), &tags),
    ] {
        let said = format!("<|channel|>final<|message|>{answer}<|return|>");
        let (turn, reason, _) = chat(&said, &answering(form), unlimited());
        assert_eq!((turn.content.as_deref(), reason), (Some(answer), FinishReason::Stop));
    }
}

/// Where a mask took long, other answers go on without the one that waits for the next.
#[test]
fn others_do_not_wait_for_slow_masks() {
    let objects = |i| {
        let members: serde_json::Map<String, Value> =
            (0..20).map(|k| (format!("k{k}"), json!({"const": i}))).collect();
        json!({"type": "object", "properties": members})
    };
    let many = schema(json!({"anyOf": (0..100).map(objects).collect::<Vec<_>>()}));
    let engine = says(r#"<|channel|>final<|message|>{"k0": 7, "k1": 7}<|return|>"#);
    let free = OutputMode::Chat { tools: [].into(), begun: Vec::new() };
    let long = SamplingParams { ignore_eos: true, ..at_most(300) };
    let (sender, events) = std::sync::mpsc::channel();
    let requests = [request(&answering(many), at_most(9)), Request::new(vec![1], long, free)];
    let handles: Vec<_> = ["slow", "other"]
        .into_iter()
        .zip(requests)
        .map(|(name, request)| {
            let sender = sender.clone();
            engine.submit(request, Box::new(move |event| sender.send((name, event)).is_ok())).unwrap()
        })
        .collect();
    drop(sender);
    // Step by step the short answer would be the first.
    let finished = events.iter().filter(|(_, event)| matches!(event, Event::Finished { .. }));
    assert_eq!(finished.map(|(name, _)| name).collect::<Vec<_>>(), ["other", "slow"]);
    drop(handles);
}

/// The grammar is at its end: nothing but the end of the turn may come, so that it does, once.
#[test]
fn where_the_grammar_ends_the_turn_ends() {
    let said = "<|channel|>final<|message|>abc<|return|><|return|><|return|>";
    let rules = answering(Form::Regex("abc".to_owned()));
    for params in
        [SamplingParams { min_tokens: 20, ..at_most(40) }, SamplingParams { ignore_eos: true, ..at_most(40) }]
    {
        let (turn, reason, found) = chat(said, &rules, params);
        assert_eq!((turn.content.as_deref(), reason), (Some("abc"), FinishReason::Stop));
        assert_eq!(found, tokens("<|channel|>final<|message|>abc<|return|>"));
    }
}

#[test]
fn words_and_tokens_that_are_not_to_come() {
    let said = "One two three two one<|return|>";
    let engine = says(said);
    let word = |params| tokens_of(&run(&engine, Request::new(vec![1], params, OutputMode::Text)), 0);
    let free = word(unlimited());
    assert_eq!(free, tokens(said));
    let two = tokens(" two")[0];
    let without = word(SamplingParams { bad_words: vec!["two".to_owned()].into(), ..at_most(5) });
    assert!(!without.contains(&two) && without[0] == free[0] && without[2] == free[2]);
    // Of several tokens only the last is forbidden, and only after the others.
    let pair = word(SamplingParams { bad_words: vec!["three two".to_owned()].into(), ..at_most(5) });
    assert_eq!((pair[1], &pair[..3]), (two, &free[..3]));
    assert_ne!(pair[3], two);

    let only = word(SamplingParams { allowed_token_ids: Some(vec![two, 7].into()), ..at_most(5) });
    assert!(only.iter().all(|token| [two, 7].contains(token)), "{only:?}");
}

#[test]
fn reasoning_has_a_budget() {
    let said = "<|channel|>analysis<|message|>one two three four five six<|end|><|start|>assistant<|channel|>final<|message|>Yes<|return|>";
    let output = || OutputMode::Chat { tools: [].into(), begun: Vec::new() };
    for (budget, reasoning) in [(0, ""), (2, "one two"), (99, "one two three four five six")] {
        let params = SamplingParams { thinking_token_budget: Some(budget), ..at_most(40) };
        let engine = says(said);
        let plain = run(&engine, Request::new(vec![1], params.clone(), output()));
        let grammar = grammars().turn(&answering(Form::Choice(vec!["Yes".to_owned()]))).unwrap();
        let bound =
            run(&engine, Request { grammar: Some(grammar), ..Request::new(vec![1], params, output()) });
        for events in [plain, bound] {
            let spelled = harmony().tokenizer().decode(&tokens_of(&events, 0));
            let begin =
                format!("<|channel|>analysis<|message|>{reasoning}<|end|><|start|>assistant<|channel|>");
            assert!(spelled.starts_with(&begin), "{spelled}");
        }
    }
    // A grammar lets no character be cut: one that the budget ends in is completed.
    let parts = harmony().tokenizer().encode("𒐫").len();
    assert!(parts > 1);
    for budget in 1..=2 * parts {
        let params = SamplingParams { thinking_token_budget: Some(budget), ..at_most(40) };
        let said = "<|channel|>analysis<|message|>𒐫𒐫𒐫<|end|><|start|>assistant<|channel|>final<|message|>Yes<|return|>";
        let (turn, ..) = chat(said, &answering(Form::Choice(vec!["Yes".to_owned()])), params);
        assert_eq!(turn.reasoning, Some("𒐫".repeat(budget.div_ceil(parts))), "{budget}");
    }
    let header = harmony().answer_header();
    let params = SamplingParams { max_tokens: Some(2), ..unlimited() };
    let begun = OutputMode::Chat { tools: [].into(), begun: header };
    let events = run(&says("Hello there"), Request::new(vec![1], params, begun));
    let Event::Tokens { deltas, .. } = &events[1] else { panic!("{events:?}") };
    assert_eq!(deltas[..], [Delta::Content("Hello".to_owned())]);
}
