//! A million random token sequences, and what must hold for each.

use harmony::{Delta, Harmony, ParsedMessage, ToolCall, Turn};

use crate::{o200k, tiny};

/// xorshift64*: fast, and the same sequences on every run.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % n
    }
}

const SPECIAL: [&str; 8] = [
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|channel|>",
    "<|constrain|>",
    "<|call|>",
    "<|return|>",
    "<|endoftext|>",
];

const WORDS: [&str; 16] = [
    "assistant",
    "user",
    "analysis",
    "final",
    "commentary",
    " to=",
    "functions.f",
    "f",
    "json",
    " ",
    "\n",
    " to=assistant",
    "hello",
    "é",
    "to=python",
    "finalanalysis",
];

fn sequence(harmony: &Harmony, random: &mut Random) -> Vec<u32> {
    let tokenizer = harmony.tokenizer();
    let mut ids = Vec::new();
    for _ in 0..random.below(14) {
        match random.below(10) {
            0..=4 => ids.extend(tokenizer.special(SPECIAL[random.below(8) as usize])),
            5..=6 => ids.extend(tokenizer.encode(WORDS[random.below(16) as usize])),
            // Any id, impossible ones included; often half a character.
            _ => ids.push(random.below(tokenizer.vocab_size() as u64 + 100) as u32),
        }
    }
    ids
}

/// The text of the deltas, by field.
fn collect(deltas: &[Delta]) -> Turn {
    let mut turn = Turn::default();
    deltas.iter().for_each(|delta| turn.apply(delta));
    turn
}

/// The fields of finished messages, by the table of the specification.
fn fields(messages: &[ParsedMessage]) -> Turn {
    let mut turn = Turn::default();
    for ParsedMessage { role, channel, recipient, text, .. } in messages {
        let recipient = recipient.as_deref().filter(|r| !["assistant", "user", "all"].contains(r));
        let function = recipient.and_then(|r| if r == "f" { Some(r) } else { r.strip_prefix("functions.") });
        let field = match (*role, function, recipient) {
            ("assistant", Some(name), _) if !name.is_empty() => {
                turn.tool_calls.push(ToolCall { name: name.to_owned(), arguments: text.clone() });
                continue;
            }
            ("assistant", None, None) if channel.as_deref() != Some("analysis") => &mut turn.content,
            _ => &mut turn.reasoning,
        };
        match field {
            _ if text.is_empty() => {}
            None => *field = Some(text.clone()),
            Some(joined) => *joined += &format!("\n{text}"),
        }
    }
    turn
}

fn check(harmony: &Harmony, ids: &[u32]) {
    let tokenizer = harmony.tokenizer();
    let mut parser = harmony.parser(["f".to_owned()]);
    let mut deltas = Vec::new();
    // What is read in state content by the table of the specification, per message.
    let (message, stops) = (
        tokenizer.special("<|message|>"),
        ["<|start|>", "<|end|>", "<|channel|>", "<|call|>", "<|return|>", "<|endoftext|>"]
            .map(|s| tokenizer.special(s)),
    );
    let mut in_content = false;
    let mut header_text = 0;
    let mut written: Vec<Vec<u8>> = Vec::new();
    for &id in ids {
        deltas.extend(parser.push(id));
        if stops.contains(&Some(id)) {
            in_content = false;
            header_text = 0;
        } else if Some(id) == message {
            if !in_content {
                written.push(Vec::new());
            }
            in_content = true;
        } else if !tokenizer.is_special(id)
            && let Some(bytes) = tokenizer.token_bytes(id)
        {
            if in_content {
                written.last_mut().unwrap().extend(bytes);
            } else {
                header_text += 1;
            }
        }
    }
    assert!(header_text < 65, "these sequences are too short for a header to become content");
    deltas.extend(parser.finish());
    assert!(parser.repairs().keys().all(|kind| harmony::REPAIRS.contains(kind)));
    assert!(deltas.iter().all(|delta| match delta {
        Delta::Reasoning(text) | Delta::Content(text) | Delta::CallArguments { text, .. } => !text.is_empty(),
        Delta::CallStart { name, .. } => !name.is_empty(),
        Delta::End => true,
    }));

    // The fields follow from the messages.
    let turn = collect(&deltas);
    assert_eq!(fields(parser.messages()), turn, "{ids:?}");

    // Every message's text is in its field, in order.
    let mut everything = turn.reasoning.unwrap_or_default() + "\n" + &turn.content.unwrap_or_default();
    for call in &turn.tool_calls {
        everything += &format!("\n{}", call.arguments);
    }
    let texts: Vec<&str> = parser.messages().iter().map(|m| m.text.as_str()).collect();
    assert_eq!(everything.matches('\u{fffd}').count(), texts.concat().matches('\u{fffd}').count());
    let mut rest = texts.iter();
    for bytes in written.iter().filter(|bytes| !bytes.is_empty()) {
        let text = String::from_utf8_lossy(bytes);
        assert!(rest.any(|found| *found == text), "{text:?} is lost: {texts:?} from {ids:?}");
        assert!(everything.contains(&*text), "{text:?} reached no field: {everything:?} from {ids:?}");
    }
}

#[test]
fn a_million_random_sequences() {
    for (harmony, seed, count) in [(o200k(), 1, 700_000), (tiny(), 2, 300_000)] {
        let mut random = Random(seed);
        for _ in 0..count {
            let ids = sequence(&harmony, &mut random);
            check(&harmony, &ids);
        }
    }
}

#[test]
fn a_long_answer_without_a_header_streams() {
    let harmony = o200k();
    let text = "The quick brown 狐 jumps over the lazy dog. ".repeat(40);
    let mut parser = harmony.parser([]);
    let ids = harmony.tokenizer().encode(&text);
    let mut streamed = Vec::new();
    for &id in &ids {
        streamed.extend(parser.push(id));
    }
    let before_the_end = collect(&streamed).content.unwrap_or_default();
    assert!(before_the_end.len() > text.len() / 2, "{before_the_end}");
    streamed.extend(parser.finish());
    assert_eq!(collect(&streamed).content.unwrap_or_default(), text);
}
