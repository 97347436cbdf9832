//! What may stand between the texts of a turn: the headers that the format has, as an automaton over tokens. Texts are free.

use std::sync::{Arc, OnceLock};

use tokenizer::Tokenizer;

use crate::render::FUNCTIONS;
use crate::{Control, Harmony};

/// The automaton for a set of functions.
pub struct Guard {
    tokenizer: Arc<Tokenizer>,
    control: Control,
    /// A tree of headers. The first node is that after `<|start|>`.
    nodes: Vec<Node>,
    /// Where a turn begins: after `<|start|>assistant`.
    begin: usize,
    /// After `<|start|>assistant<|channel|>`.
    channel: usize,
    /// After a message that may be the last.
    ends: Vec<u32>,
}

#[derive(Debug, Default)]
struct Node {
    next: Vec<(Symbol, Next)>,
    allowed: OnceLock<Vec<u32>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Symbol {
    Byte(u8),
    Control(u32),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    Node(usize),
    Content { last: bool },
}

/// Where in a turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place(State);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Header(usize),
    /// `last`: the turn may end with this message.
    Content {
        last: bool,
    },
    Between {
        last: bool,
    },
    /// The format was left, or the turn is over.
    Outside,
}

/// The most functions whose names are guarded: beyond, the automaton takes longer to build than it is worth.
const MAX_TOOLS: usize = 128;
/// No token of a header is longer.
const MAX_TOKEN_BYTES: usize = 32;

impl Harmony {
    /// The guard of a turn in which these functions may be called; `None` for very many.
    pub fn guard(&self, tools: &[String]) -> Option<Guard> {
        if tools.len() > MAX_TOOLS {
            return None;
        }
        let mut guard = Guard {
            tokenizer: Arc::clone(&self.tokenizer),
            control: self.control,
            nodes: vec![Node::default()],
            begin: 0,
            channel: 0,
            ends: [vec![self.control.start], self.stop_ids().to_vec()].concat(),
        };
        guard.begin = guard.text(0, "assistant");
        guard.channel = guard.step(guard.begin, Symbol::Control(self.control.channel));
        for channel in ["analysis", "commentary", "final"] {
            let node = guard.text(guard.channel, channel);
            guard.message(node, channel == "final");
        }
        let json = guard.text(guard.channel, "final");
        guard.types(json, true, false);
        for tool in tools {
            let recipient = format!(" to={FUNCTIONS}.{tool}");
            // The model names the function after the channel, or after its own role.
            for channel in ["commentary", "analysis"] {
                let node = guard.text(guard.channel, channel);
                let node = guard.text(node, &recipient);
                guard.types(node, false, true);
                let node = guard.text(guard.begin, &recipient);
                let node = guard.step(node, Symbol::Control(self.control.channel));
                let node = guard.text(node, channel);
                guard.types(node, false, true);
            }
        }
        Some(guard)
    }
}

impl Guard {
    /// At the beginning of a turn, after `<|start|>assistant`.
    pub fn begin(&self) -> Place {
        Place(State::Header(self.begin))
    }

    /// What may come next; `None`: anything.
    pub fn allowed(&self, place: Place) -> Option<&[u32]> {
        match place.0 {
            State::Header(node) => Some(self.nodes[node].allowed.get_or_init(|| self.collect(node))),
            State::Between { last: true } => Some(&self.ends),
            State::Between { last: false } => Some(&self.ends[..1]),
            State::Content { .. } | State::Outside => None,
        }
    }

    /// After a token.
    pub fn advance(&self, place: Place, token: u32) -> Place {
        let control = &self.control;
        Place(match place.0 {
            State::Header(node) => self.follow(node, token),
            State::Content { last } if token == control.end => State::Between { last },
            // The parser takes these for the beginning of a message, wherever they stand.
            _ if token == control.start => State::Header(0),
            State::Content { .. } | State::Outside if token == control.channel => State::Header(self.channel),
            State::Content { .. }
                if [control.r#return, control.call, control.end_of_text].contains(&token) =>
            {
                State::Outside
            }
            state @ State::Content { .. } => state,
            State::Between { .. } | State::Outside => State::Outside,
        })
    }

    fn follow(&self, node: usize, token: u32) -> State {
        let find = |node: usize, symbol: Symbol| {
            self.nodes[node].next.iter().find(|(known, _)| *known == symbol).map(|&(_, next)| next)
        };
        if self.tokenizer.is_special(token) {
            return match find(node, Symbol::Control(token)) {
                Some(Next::Node(node)) => State::Header(node),
                Some(Next::Content { last }) => State::Content { last },
                None => State::Outside,
            };
        }
        let bytes = self.tokenizer.token_bytes(token).unwrap_or_default();
        let end = bytes.iter().try_fold(node, |node, &byte| match find(node, Symbol::Byte(byte)) {
            Some(Next::Node(node)) => Some(node),
            _ => None,
        });
        end.map_or(State::Outside, State::Header)
    }

    /// The tokens that continue some header.
    fn collect(&self, node: usize) -> Vec<u32> {
        let mut allowed = Vec::new();
        let mut open = vec![(node, String::new())];
        while let Some((node, text)) = open.pop() {
            for &(symbol, next) in &self.nodes[node].next {
                match (symbol, next) {
                    (Symbol::Control(token), _) if text.is_empty() => allowed.push(token),
                    (Symbol::Byte(byte), Next::Node(next)) if text.len() < MAX_TOKEN_BYTES => {
                        let text = format!("{text}{}", char::from(byte));
                        if let [token] = self.tokenizer.encode(&text)[..] {
                            allowed.push(token);
                        }
                        open.push((next, text));
                    }
                    _ => {}
                }
            }
        }
        allowed.sort_unstable();
        allowed.dedup();
        allowed
    }

    /// The content may begin, with or without a type before it.
    fn types(&mut self, node: usize, last: bool, bare: bool) {
        if bare {
            self.message(node, last);
            for kind in [" json", " code"] {
                let node = self.text(node, kind);
                self.message(node, last);
            }
        }
        let node = self.text(node, " ");
        let node = self.step(node, Symbol::Control(self.control.constrain));
        let node = self.text(node, "json");
        self.message(node, last);
    }

    fn message(&mut self, node: usize, last: bool) {
        let edge = (Symbol::Control(self.control.message), Next::Content { last });
        if !self.nodes[node].next.contains(&edge) {
            self.add(node, edge);
        }
    }

    /// Nearly all nodes have a single edge.
    fn add(&mut self, node: usize, edge: (Symbol, Next)) {
        let next = &mut self.nodes[node].next;
        next.reserve_exact(1);
        next.push(edge);
    }

    /// The node after a text of ASCII.
    fn text(&mut self, node: usize, text: &str) -> usize {
        text.bytes().fold(node, |node, byte| self.step(node, Symbol::Byte(byte)))
    }

    fn step(&mut self, node: usize, symbol: Symbol) -> usize {
        let known = self.nodes[node].next.iter().find(|(known, _)| *known == symbol);
        if let Some(&(_, Next::Node(next))) = known {
            return next;
        }
        self.nodes.push(Node::default());
        let next = self.nodes.len() - 1;
        self.add(node, (symbol, Next::Node(next)));
        next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn harmony() -> Harmony {
        Harmony::new(Tokenizer::o200k_harmony()).unwrap()
    }

    /// Walks a turn, and says at which token it left what is allowed.
    fn leaves(guard: &Guard, harmony: &Harmony, turn: &str) -> Option<usize> {
        let mut place = guard.begin();
        for (i, token) in harmony.tokenizer().encode_with_special(turn).into_iter().enumerate() {
            if guard.allowed(place).is_some_and(|allowed| !allowed.contains(&token)) {
                return Some(i);
            }
            place = guard.advance(place, token);
        }
        None
    }

    #[test]
    fn well_formed_turns_are_free() {
        let harmony = harmony();
        let guard = harmony.guard(&["get_weather".to_owned(), "get".to_owned()]).unwrap();
        for turn in [
            "<|channel|>final<|message|>Hi<|return|>",
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hi<|return|>",
            "<|channel|>commentary<|message|>Let me see.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather \
             <|constrain|>json<|message|>{}<|call|>",
            "<|channel|>commentary to=functions.get json<|message|>{}<|end|><|start|>assistant to=functions.get_weather<|channel|>\
             commentary <|constrain|>json<|message|>{}<|call|>",
            " to=functions.get<|channel|>analysis code<|message|>x<|call|>",
            "<|channel|>final <|constrain|>json<|message|>{\"a\": 1}<|return|>",
            "<|channel|>final<|message|>Hi<|end|><|return|>",
        ] {
            assert_eq!(leaves(&guard, &harmony, turn), None, "{turn}");
        }
    }

    #[test]
    fn malformed_headers_are_stopped_where_they_begin() {
        let harmony = harmony();
        let guard = harmony.guard(&["get_weather".to_owned()]).unwrap();
        for (turn, at) in [
            ("Sorry, no.<|return|>", 0),
            ("<|channel|>commentary?? free text<|message|>Body", 3),
            ("<|channel|>analysis to=python code<|message|>print(1)", 4),
            ("<|channel|>final<|return|>", 2),
            ("<|channel|><|channel|>", 1),
            ("<|channel|>analysis<|message|>Hm.<|end|><|return|>", 6),
            ("<|channel|>analysis<|message|>Hm.<|end|>final", 6),
            ("<|channel|>analysis<|message|>Hm.<|end|><|start|>user", 7),
            ("<|channel|>analysis<|message|>Hm.<|end|><|start|><|start|>", 7),
            ("<|start|>assistant", 0),
            ("<|return|>", 0),
        ] {
            assert_eq!(leaves(&guard, &harmony, turn), Some(at), "{turn}");
        }
        let too_many: Vec<String> = (0..=MAX_TOOLS).map(|i| format!("f{i}")).collect();
        assert!(harmony.guard(&too_many).is_none());
    }

    #[test]
    fn a_turn_never_gets_stuck() {
        let harmony = harmony();
        let guard = harmony.guard(&["a".to_owned(), "b.c".to_owned()]).unwrap();
        for node in 0..guard.nodes.len() {
            let place = Place(State::Header(node));
            let allowed = guard.allowed(place).unwrap();
            assert!(!allowed.is_empty());
            for &token in allowed {
                assert_ne!(guard.advance(place, token).0, State::Outside, "node {node}, token {token}");
            }
        }
    }
}
