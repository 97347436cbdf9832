//! The envelope of a stream's chunks, the same for chats and raw completions.

use serde::Serialize;

use crate::answer::{Identity, RequestMetrics, Usage};
use crate::request::StreamOptions;
use crate::sse::data;

/// What the chunks of a stream have in common.
pub(crate) struct Envelope<'a> {
    pub(crate) object: &'static str,
    pub(crate) identity: &'a Identity,
    pub(crate) stream: StreamOptions,
    pub(crate) usage: Usage,
    /// Beside the usage at the end.
    pub(crate) metrics: Option<RequestMetrics>,
}

impl Envelope<'_> {
    /// Writes a chunk; one without choices is about the usage. The last one bears the fingerprint.
    pub(crate) fn write(&self, choices: &[impl Serialize], last: bool, out: &mut Vec<u8>) {
        let usage = self.stream.continuous_usage_stats || (self.stream.include_usage && choices.is_empty());
        let identity = self.identity;
        let chunk = Chunk {
            id: &identity.id,
            object: self.object,
            created: identity.created,
            model: &identity.model,
            system_fingerprint: identity.fingerprint.as_ref().filter(|_| last),
            choices,
            usage: usage.then_some(self.usage),
            metrics: self.metrics.filter(|_| choices.is_empty()),
        };
        data(out, &chunk);
    }
}

#[derive(Serialize)]
struct Chunk<'a, C> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    system_fingerprint: Option<&'a String>,
    choices: &'a [C],
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Usage>,
    #[serde(skip_serializing_if = "Option::is_none")]
    metrics: Option<RequestMetrics>,
}
