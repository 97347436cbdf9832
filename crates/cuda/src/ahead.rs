//! Steps of one token, of which the next is put on the stream before the host has seen this one's token: where a sequence goes on as
//! foreseen, the device does not wait for the host.

use gptoss::{BLOCK_TOKENS, Error, Plan, Sampled, SequenceOutput, SequencePlan};

use crate::backend::{Cuda, Meanwhile, run_once, told};
use crate::batch::{Batch, Segment, is_largest};
use crate::device::{Device, Event};
use crate::sampling::{Round, Sampler};

/// After so many steps that went on as foreseen, the next one is begun early. A step that is begun in vain takes as long as any.
const STEADY: usize = 8;

/// Where a step has its words, its first row of logits and what is brought back of them. Two steps of one token, of which one follows the
/// other, take turns with two of these.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub(crate) struct Lane {
    pub(crate) index: usize,
    pub(crate) token: Token,
}

/// Where a step finds its token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub(crate) enum Token {
    /// Among its words.
    #[default]
    Told,
    /// It is the other lane's largest.
    Largest,
    /// It was drawn in the other lane.
    Drawn,
}

/// What is known of the step to come.
pub(crate) struct Ahead {
    /// The end of each lane's step.
    ends: [Event; 2],
    /// The step that comes if the sequence goes on.
    next: Option<SequencePlan>,
    /// That step, if it has begun; its token is not looked at.
    begun: Option<Begun>,
    /// Steps in a row that were foreseen.
    steps: usize,
}

struct Begun {
    lane: Lane,
    round: Option<Round>,
}

impl Ahead {
    pub(crate) fn new(device: &Device) -> Result<Ahead, Error> {
        Ok(Ahead { ends: [device.event()?, device.event()?], next: None, begun: None, steps: 0 })
    }
}

impl Cuda {
    /// Whether the step that comes if the last one's sequence goes on has begun.
    pub fn is_ahead(&self) -> bool {
        self.ahead.begun.is_some()
    }

    /// Waits for whatever has begun, and expects nothing.
    pub(crate) fn forget_ahead(&mut self) -> Result<(), Error> {
        self.device.synchronize()?;
        (self.ahead.next, self.ahead.begun, self.ahead.steps) = (None, None, 0);
        Ok(())
    }

    /// The step, if it is of one token and such that the next one can be begun early; else nothing of it, and nothing else is under way.
    pub(crate) fn step_of_one(
        &mut self,
        plan: &Plan,
        meanwhile: &mut Meanwhile<'_>,
    ) -> Result<Option<SequenceOutput>, Error> {
        let sequence = plan.sequences.first().filter(|sequence| {
            let alone = plan.sequences.len() == 1 && self.single().is_some() && self.shared.is_none();
            let prompt = self.options.batch_invariant && sequence.generated == 0;
            alone && !self.options.eager && !prompt && goes_on(sequence)
        });
        let window = self.config.sliding_window;
        let foreseen =
            sequence.zip(self.ahead.next.take()).is_some_and(|(s, next)| is_same(s, &next, window));
        self.ahead.steps = if foreseen { self.ahead.steps + 1 } else { 0 };
        let begun = self.ahead.begun.take();
        if let (false, Some(begun)) = (foreseen, &begun) {
            self.device.wait(&self.ahead.ends[begun.lane.index])?;
            // What it wrote is in the cache.
            self.damaged |= told(&self.arena, begun.lane.index).is_none();
        }
        let Some(sequence) = sequence else { return Ok(None) };
        let (lane, round) = match begun.filter(|_| foreseen) {
            Some(begun) => (begun.lane, begun.round),
            None => {
                self.cleanse(plan)?;
                (Lane::default(), self.begin(plan, Lane::default())?)
            }
        };
        let sampling = &sequence.sample[0];
        let mut next = SequencePlan { position: sequence.position + 1, ..sequence.clone() };
        next.sample[0].position += 1;
        // Blocks that begin anew are not known yet.
        let has_room = !next.position.is_multiple_of(BLOCK_TOKENS) && next.position < self.config.max_context;
        if self.ahead.steps >= STEADY && has_room && !sequence.ends {
            let token = if is_largest(sampling) { Token::Largest } else { Token::Drawn };
            let lane = Lane { index: 1 - lane.index, token };
            let plan = Plan { sequences: vec![next.clone()] };
            let round = self.begin(&plan, lane)?;
            self.ahead.begun = Some(Begun { lane, round });
        }
        run_once(meanwhile);
        self.device.wait(&self.ahead.ends[lane.index])?;
        let largest = told(&self.arena, lane.index);
        let (sampled, found) = match &round {
            Some(round) => {
                let sampled = self.sampler.end(lane.index, sampling, round, &mut self.arena.logits_host)?;
                (sampled, self.sampler.found(lane.index))
            }
            None => {
                let token = largest.unwrap_or(0);
                (vec![Sampled { token, logprobs: None }], token)
            }
        };
        // What the host had to draw is not the token that the next step has taken.
        if largest.is_some() && sampled[0].token == found {
            next.tokens = vec![found];
            self.ahead.next = Some(next);
        }
        Ok(Some(SequenceOutput { sampled, corrupted: largest.is_none(), ..SequenceOutput::default() }))
    }

    /// Puts a step on the stream, with the drawing of its token, if that is not simply the largest.
    fn begin(&mut self, plan: &Plan, lane: Lane) -> Result<Option<Round>, Error> {
        let batch = Batch::new(plan, vec![Segment { sequence: 0, range: 0..1, single: true }]);
        let shape = self.upload(&batch, None, lane)?.shape;
        let graph = self.graph(&batch, &shape, true)?.expect("a step of one token is a graph");
        self.graphs[&graph].launch()?;
        let sampling = &plan.sequences[0].sample[0];
        let round = match is_largest(sampling) {
            true => None,
            false => {
                Some(self.sampler.begin(lane.index, sampling, &self.arena.logits, &self.arena.largest)?)
            }
        };
        self.device.record(&self.ahead.ends[lane.index])?;
        Ok(round)
    }
}

/// Whether this is one token, after which another one can be foreseen.
fn goes_on(sequence: &SequencePlan) -> bool {
    let drawn = sequence.sample.first().is_some_and(Sampler::goes_on);
    let more = sequence.score.is_some() || sequence.logits || sequence.hidden_after_layer.is_some();
    sequence.tokens.len() == 1 && drawn && !more
}

/// Whether a step is the one that was foreseen, as far as it matters.
fn is_same(sequence: &SequencePlan, next: &SequencePlan, window: usize) -> bool {
    // Those that have begun. What lies before the window is not looked at.
    let blocks = next.position.div_ceil(BLOCK_TOKENS);
    let first = (next.position + 1).saturating_sub(window) / BLOCK_TOKENS;
    let (drawn, expected) = (&sequence.sample[0], &next.sample[0]);
    sequence.tokens == next.tokens
        && sequence.position == next.position
        && sequence.full_blocks[..blocks] == next.full_blocks[..blocks]
        && sequence.sliding_blocks[first.min(blocks)..blocks]
            == next.sliding_blocks[first.min(blocks)..blocks]
        && ((is_largest(drawn) && is_largest(expected)) || drawn == expected)
}

/// What is on the stream reads and writes memory that would be freed.
impl Drop for Cuda {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // Nobody is left to hear of an error.
            let _ = self.device.synchronize();
        }
    }
}
