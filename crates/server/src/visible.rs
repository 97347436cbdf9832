//! What of a turn a client is to see: calls that may not be made become reasoning, reasoning may be left out.

use harmony::Delta;

/// The rules of a request.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rules {
    pub(crate) calls_allowed: bool,
    /// The turn ends with so many.
    pub(crate) max_calls: usize,
    pub(crate) include_reasoning: bool,
}

impl Rules {
    /// Whether a turn may end before the model ends it.
    pub(crate) fn limit_calls(&self) -> bool {
        self.max_calls < usize::MAX
    }
}

/// A turn on its way to the client.
#[derive(Debug, Default)]
pub(crate) struct Visible {
    /// Calls shown so far.
    pub(crate) calls: usize,
    /// A call that is not allowed has begun after other reasoning: its text, kept as reasoning, needs a line of its own.
    stray_call: bool,
    has_reasoning: bool,
    /// The last call that may be made has ended: nothing that comes after it is shown or counted.
    pub(crate) is_over: bool,
}

impl Visible {
    /// A delta as the client is to see it, if at all.
    pub(crate) fn show(&mut self, delta: Delta, rules: &Rules) -> Option<Delta> {
        let delta = match delta {
            Delta::CallStart { .. } if !rules.calls_allowed => {
                self.stray_call = self.has_reasoning;
                return None;
            }
            // Nothing that was generated is lost.
            Delta::CallArguments { text, .. } if !rules.calls_allowed => {
                let joint = if std::mem::take(&mut self.stray_call) { "\n" } else { "" };
                Delta::Reasoning(format!("{joint}{text}"))
            }
            delta => delta,
        };
        match &delta {
            Delta::Reasoning(_) if !rules.include_reasoning => return None,
            Delta::Reasoning(_) => self.has_reasoning = true,
            Delta::CallStart { .. } => self.calls += 1,
            Delta::End => self.is_over |= self.calls >= rules.max_calls,
            Delta::Content(_) | Delta::CallArguments { .. } => {}
        }
        Some(delta)
    }
}
