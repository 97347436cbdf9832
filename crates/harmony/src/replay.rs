//! Turns that the model generated, written into a history as they were generated: the same tokens, so that a conversation goes on
//! from the keys and values that are there. The canonical form of a call is not the one that the model mostly writes.

use crate::chat::ChatMessage;
use crate::message::{Message, Role};
use crate::{Delta, Harmony, MessageContent, Turn};
use serde_json::Value;

impl Harmony {
    /// The messages of a turn that was generated after `<|start|>assistant` and ended with a call, if it is well-formed and says what
    /// `said` says, whose reasoning may be missing. `tools` are the names of the declared functions.
    pub(crate) fn replay(
        &self,
        generated: &[u32],
        said: &ChatMessage,
        tools: &[String],
    ) -> Option<Vec<Message>> {
        let whole = self.read(generated, tools);
        let content = match &said.content {
            Some(MessageContent::Text(text)) => Some(text.as_str()).filter(|text| !text.is_empty()),
            Some(MessageContent::Parts(_)) => return None,
            None => None,
        };
        let calls = said.tool_calls.as_deref().unwrap_or_default();
        let same_calls = calls.len() == whole.tool_calls.len()
            && calls.iter().zip(&whole.tool_calls).all(|(said, generated)| {
                said.function.name == generated.name
                    && matches!(&said.function.arguments, Value::String(text) if *text == generated.arguments)
            });
        let reasoning = said.reasoning();
        if whole.content.as_deref().filter(|text| !text.is_empty()) != content
            || !same_calls
            || (reasoning.is_some() && reasoning != whole.reasoning.as_deref())
        {
            return None;
        }
        let mut messages = Vec::new();
        let mut rest = generated;
        while !rest.is_empty() {
            let end = self.message_length(rest)?;
            let (ids, after) = rest.split_at(end);
            let turn = self.read(ids, tools);
            let kinds = [turn.reasoning.is_some(), turn.content.is_some(), !turn.tool_calls.is_empty()];
            let channel = match kinds {
                [true, false, false] => "analysis",
                [false, true, false] | [false, false, true] => "commentary",
                _ => return None,
            };
            let mut message = Message::text(Role::Assistant, "").on(channel);
            message.generated = Some(ids.to_vec());
            // Reasoning that the client left out is not for us to put back.
            if channel != "analysis" || reasoning.is_some() {
                messages.push(message);
            }
            rest = match after {
                [] if ids.last() == Some(&self.control.call) => after,
                // What was cut off, or answers, is no call that goes on.
                [] => return None,
                [start, after @ ..] if *start == self.control.start => {
                    after.strip_prefix(&self.tokenizer.encode(Role::Assistant.name())[..])?
                }
                _ => return None,
            };
        }
        Some(messages)
    }

    /// Length of the message that tokens begin with, its end included: a header without surprises, `<|message|>`, a text, and
    /// `<|end|>` or `<|call|>`.
    fn message_length(&self, ids: &[u32]) -> Option<usize> {
        let control = &self.control;
        let is_header =
            |id: u32| id == control.channel || id == control.constrain || !self.tokenizer.is_special(id);
        let header = ids.iter().position(|&id| !is_header(id)).filter(|&at| ids[at] == control.message)?;
        let twice = |marker| ids[..header].iter().filter(|&&id| id == marker).count() > 1;
        if twice(control.channel) || twice(control.constrain) {
            return None;
        }
        // An answer is not part of a turn that goes on.
        if self.tokenizer.decode(&ids[..header]).contains("final") {
            return None;
        }
        let body = ids[header + 1..].iter().position(|&id| self.tokenizer.is_special(id))?;
        let end = header + 1 + body;
        [control.end, control.call].contains(&ids[end]).then_some(end + 1)
    }

    fn read(&self, ids: &[u32], tools: &[String]) -> Turn {
        let mut parser = self.parser(tools);
        let mut deltas: Vec<Delta> = ids.iter().flat_map(|&id| parser.push(id)).collect();
        deltas.extend(parser.finish());
        Turn::collect(&deltas)
    }
}
