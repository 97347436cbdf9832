//! What steps cost, as measured: from it follows how many guesses are verified in one, and how much of prompts goes beside answers.

use std::time::Duration;

use crate::speculation::Chance;

/// Steps of more tokens are not considered: large batches have no time to give away.
pub(crate) const MAX_STEP_TOKENS: usize = 64;
/// A number of tokens that was measured less often is believed to be cheap.
const TRIALS: u32 = 3;
/// A measurement of so many steps ago is forgotten.
const STALE: u64 = 512;
/// Growth per token of steps that were never measured.
const HOPE: f64 = 0.01;
/// What guessing must save at least: less is noise.
const MARGIN: f64 = 1.03;

/// By how much the shortest time grows with each step that takes longer.
const LONGER: f64 = 1.01;

/// How long steps take, by their number of tokens.
#[derive(Debug)]
pub(crate) struct Costs {
    times: [Time; MAX_STEP_TOKENS + 1],
    steps: u64,
    /// Time that prompts added to steps with answers, and their tokens, each step counting half as much as the next.
    prompts: (f64, f64),
    /// Tokens of prompts that add to a step with answers about the time that it takes without them.
    fitting: usize,
}

#[derive(Debug, Clone, Copy, Default)]
struct Time {
    seconds: f64,
    /// The shortest of late: the machine may have had something else to do.
    least: f64,
    measured: u32,
    at: u64,
}

impl Default for Costs {
    fn default() -> Costs {
        Costs { times: [Time::default(); MAX_STEP_TOKENS + 1], steps: 0, prompts: (0.0, 0.0), fitting: 0 }
    }
}

impl Costs {
    /// Takes note of a step without prompts.
    pub(crate) fn measure(&mut self, tokens: usize, time: Duration) {
        let Some(entry) = self.times.get_mut(tokens) else { return };
        self.steps += 1;
        let seconds = time.as_secs_f64();
        if self.steps - entry.at > STALE {
            *entry = Time::default();
        }
        entry.seconds = match entry.measured {
            0 => seconds,
            // The first of its kind may have had something to prepare.
            1 | 2 => entry.seconds.min(seconds),
            _ => entry.seconds + 0.125 * (seconds - entry.seconds),
        };
        entry.least = if entry.measured == 0 { seconds } else { seconds.min(entry.least * LONGER) };
        entry.measured += 1;
        entry.at = self.steps;
    }

    /// Takes note of a step of so many answers and tokens of prompts.
    pub(crate) fn measure_prompts(&mut self, answers: usize, tokens: usize, time: Duration) {
        let Some(alone) = self.least(answers) else { return };
        let added = (time.as_secs_f64() - alone).max(0.0);
        self.prompts = (self.prompts.0 / 2.0 + added, self.prompts.1 / 2.0 + tokens as f64);
        let fitting = alone * self.prompts.1 / self.prompts.0;
        // Of more tokens than were measured it is not known what they take.
        let most = if tokens >= self.fitting { 2 * tokens } else { self.fitting };
        self.fitting = (fitting as usize).min(most);
    }

    /// Tokens of prompts that add to a step with answers about the time that it takes without them, but at least so many.
    pub(crate) fn prompt_tokens(&self, least: usize) -> usize {
        self.fitting.max(least)
    }

    /// How many tokens to verify for each sequence of a step that has `tokens` without any.
    pub(crate) fn choose(&self, tokens: usize, chances: &[Chance]) -> Vec<usize> {
        let mut best = vec![0; chances.len()];
        let Some(now) = self.seconds(tokens).filter(|&now| now > 0.0) else { return best };
        let mut chosen = best.clone();
        let mut expected = chances.len() as f64;
        let mut most = MARGIN * expected / now;
        // The most probable token first.
        let mut probabilities: Vec<f64> = chances.iter().map(|chance| chance.probability).collect();
        for total in tokens + 1..=MAX_STEP_TOKENS {
            let open = (0..chances.len()).filter(|&s| chosen[s] < chances[s].tokens);
            let Some(next) = open.max_by(|&a, &b| probabilities[a].total_cmp(&probabilities[b])) else {
                break;
            };
            expected += probabilities[next];
            probabilities[next] *= chances[next].probability;
            chosen[next] += 1;
            let rate = self.seconds(total).map_or(0.0, |seconds| expected / seconds);
            if rate > most {
                most = rate;
                best.clone_from(&chosen);
            }
        }
        best
    }

    /// What a step of so many tokens, or of the most below that were measured, takes if nothing else delays it.
    fn least(&self, tokens: usize) -> Option<f64> {
        let below = &self.times[..=tokens.min(MAX_STEP_TOKENS)];
        below.iter().rev().find(|time| time.measured > 0).map(|time| time.least)
    }

    /// What a step of so many tokens is expected to take, if any was measured.
    fn seconds(&self, tokens: usize) -> Option<f64> {
        let known = |count: &usize| {
            let entry = &self.times[*count];
            entry.measured > 0 && self.steps - entry.at <= STALE
        };
        let below = (0..=tokens).rev().find(known);
        let above = (tokens..=MAX_STEP_TOKENS).find(known);
        let hoped = below.map(|below| self.times[below].seconds * (1.0 + HOPE * (tokens - below) as f64));
        match (below, above) {
            (Some(below), Some(above)) if below == above => {
                let entry = self.times[tokens];
                let smaller = (0..tokens).rev().find(known).map(|b| self.times[b].seconds);
                // Not believed yet: it gets a few more trials.
                match smaller.filter(|_| entry.measured < TRIALS) {
                    Some(smaller) => Some(entry.seconds.min(smaller * (1.0 + HOPE))),
                    None => Some(entry.seconds),
                }
            }
            (Some(below), Some(above)) => {
                let (low, high) = (self.times[below].seconds, self.times[above].seconds);
                let share = (tokens - below) as f64 / (above - below) as f64;
                Some(low + share * (high - low))
            }
            (Some(_), None) => hoped,
            (None, Some(above)) => Some(self.times[above].seconds),
            (None, None) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guesses_are_verified_where_that_saves_time() {
        let likely = Chance { tokens: 8, probability: 0.9 };
        let unlikely = Chance { tokens: 8, probability: 0.2 };
        let mut costs = Costs::default();
        let millis = Duration::from_millis;
        assert_eq!(costs.choose(1, &[likely]), [0], "nothing is known");
        (0..5).for_each(|_| costs.measure(1, millis(100)));
        assert_eq!(costs.choose(1, &[likely]), [8], "it is tried");
        (0..5).for_each(|_| costs.measure(9, millis(200)));
        (0..5).for_each(|_| costs.measure(2, millis(180)));
        // One more token costs much, eight hardly more.
        assert_eq!(costs.choose(1, &[likely]), [8]);
        assert_eq!(costs.choose(1, &[unlikely]), [0]);
        assert_eq!(costs.choose(1, &[Chance { tokens: 1, probability: 0.75 }]), [0]);
        // What is likely goes first.
        assert_eq!(costs.choose(2, &[unlikely, likely])[1], 8);
        // A long step once is not held against it for ever.
        (0..STALE).for_each(|_| costs.measure(1, millis(20)));
        costs.measure(1, millis(20));
        assert_eq!(costs.choose(1, &[likely]), [8]);
    }

    #[test]
    fn prompts_take_as_much_of_a_step_as_answers_do() {
        const LEAST: usize = 4;
        let mut costs = Costs::default();
        // Steps of so many tokens of prompts as there may be, which take a millisecond for each and `answers` beside them.
        let run = |costs: &mut Costs, steps: usize, answers: u64| {
            for _ in 0..steps {
                let tokens = costs.prompt_tokens(LEAST);
                costs.measure_prompts(4, tokens, Duration::from_millis(answers + tokens as u64));
            }
            costs.prompt_tokens(LEAST)
        };
        assert_eq!(run(&mut costs, 9, 20), LEAST, "it is not known what answers take");
        (0..5).for_each(|_| costs.measure(4, Duration::from_millis(50)));
        // Something else was done on the machine.
        (0..3).for_each(|_| costs.measure(4, Duration::from_millis(300)));
        assert_eq!(run(&mut costs, 1, 50), 2 * LEAST, "one step does not decide");
        assert!((45..=55).contains(&run(&mut costs, 9, 50)), "{costs:?}");
        // Answers have become slower than when they were alone.
        assert!((25..=35).contains(&run(&mut costs, 9, 70)), "{costs:?}");
        assert_eq!(run(&mut costs, 9, 1000), LEAST);
        assert!((45..=55).contains(&run(&mut costs, 20, 50)), "{costs:?}");
        // Steps that seem to take no time, of few tokens and of as many as there may be.
        (0..100).for_each(|_| costs.measure_prompts(4, 8, Duration::ZERO));
        assert!((45..=55).contains(&costs.prompt_tokens(LEAST)), "{costs:?}");
        let tokens = costs.prompt_tokens(LEAST);
        costs.measure_prompts(4, tokens, Duration::ZERO);
        assert_eq!(costs.prompt_tokens(LEAST), 2 * tokens);
        assert!((45..=55).contains(&run(&mut costs, 20, 50)), "{costs:?}");
    }
}
