//! The masks of constrained answers, made on threads of their own while the model computes the logits that they apply to.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use gptoss::Mask;
use llguidance::Matcher;

use crate::grammar::{Grammar, shorten};
use crate::output::Rules;

/// How many threads make masks: a device waits for all those of its step, each some 50 microseconds. One that takes long leaves another.
pub(crate) fn threads() -> usize {
    const MAX: usize = 4;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    (cores / 4).clamp(2, MAX)
}

/// A mask that takes longer is one for which other sequences do not wait.
const LONG: Duration = Duration::from_millis(20);

/// The threads; they end when the engine's last constraint is gone.
pub(crate) struct Masks {
    work: mpsc::Sender<Box<dyn FnOnce() + Send>>,
}

impl Masks {
    pub(crate) fn new(threads: usize) -> std::io::Result<Masks> {
        let (work, queue) = mpsc::channel::<Box<dyn FnOnce() + Send>>();
        let queue = Arc::new(Mutex::new(queue));
        for _ in 0..threads {
            let queue = Arc::clone(&queue);
            std::thread::Builder::new().name("masks".to_owned()).spawn(move || {
                loop {
                    let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    match job {
                        Ok(job) => job(),
                        Err(_) => return,
                    }
                }
            })?;
        }
        Ok(Masks { work })
    }
}

/// Where one choice is in its grammar.
pub(crate) struct Constraint {
    rules: Arc<Rules>,
    state: Arc<Mutex<State>>,
    /// Of the next token; maybe still in the making.
    mask: Mask,
    /// Whether the mask before it took long; of the first one, any of its grammar.
    slow: Arc<AtomicBool>,
    grammar: Grammar,
    work: mpsc::Sender<Box<dyn FnOnce() + Send>>,
}

#[derive(Default)]
struct State {
    matcher: Option<Matcher>,
    failure: Option<String>,
}

impl Constraint {
    /// At the beginning of the grammar. `may_stop`: stop tokens are allowed already.
    pub(crate) fn new(masks: &Masks, rules: &Arc<Rules>, grammar: &Grammar, may_stop: bool) -> Constraint {
        let mut constraint = Constraint {
            rules: Arc::clone(rules),
            state: Arc::default(),
            mask: Mask::default(),
            slow: Arc::new(AtomicBool::new(grammar.is_slow())),
            grammar: grammar.clone(),
            work: masks.work.clone(),
        };
        let grammar = grammar.clone();
        constraint.request(may_stop, move |state| {
            state.matcher = Some(grammar.matcher());
            Ok(())
        });
        constraint
    }

    /// After these tokens.
    pub(crate) fn advance(&mut self, tokens: Vec<u32>, may_stop: bool) {
        self.request(may_stop, move |state| match &mut state.matcher {
            Some(matcher) => tokens.into_iter().try_for_each(|token| match matcher.is_stopped() {
                true if !matcher.is_error() => Ok(()),
                _ => matcher.consume_token(token).map_err(|error| error.to_string()),
            }),
            None => Ok(()),
        });
    }

    /// What may come after each of these tokens, should they come next, if stop tokens are allowed then. After one that may not
    /// come there is nothing.
    pub(crate) fn masks_after(&self, tokens: &[u32], may_stop: &[bool]) -> Vec<Mask> {
        let masks: Vec<Mask> = tokens.iter().map(|_| Mask::default()).collect();
        let promises: Vec<Promise> = masks.iter().cloned().map(Promise).collect();
        let (state, rules, next) = (Arc::clone(&self.state), Arc::clone(&self.rules), self.mask.clone());
        let (tokens, may_stop) = (tokens.to_vec(), may_stop.to_vec());
        // An error drops the job, which sets the masks.
        let _ = self.work.send(Box::new(move || {
            // Whoever makes it needs the state, and began before: jobs leave the queue in order.
            next.wait();
            let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
            state.look_ahead(&rules, &next, &tokens, &may_stop, &promises);
        }));
        masks
    }

    /// Whether it is better left out of a step that others have part in: its mask is not there yet, and it may take long.
    pub(crate) fn is_late(&self) -> bool {
        !self.mask.is_set() && self.is_slow()
    }

    /// Whether the mask before the next took long.
    pub(crate) fn is_slow(&self) -> bool {
        self.slow.load(Ordering::Relaxed)
    }

    /// What may come next.
    pub(crate) fn mask(&self) -> Mask {
        self.mask.clone()
    }

    /// Why the grammar could not be followed up to the last mask.
    pub(crate) fn failure(&self) -> Option<String> {
        self.mask.wait();
        self.state.lock().unwrap_or_else(PoisonError::into_inner).failure.clone()
    }

    fn request(
        &mut self,
        may_stop: bool,
        step: impl FnOnce(&mut State) -> Result<(), String> + Send + 'static,
    ) {
        self.mask = Mask::default();
        let (state, rules) = (Arc::clone(&self.state), Arc::clone(&self.rules));
        let (slow, grammar) = (Arc::clone(&self.slow), self.grammar.clone());
        let promise = Promise(self.mask.clone());
        // An error drops the job, which sets the mask.
        let _ = self.work.send(Box::new(move || {
            let begin = Instant::now();
            let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
            let made = step(&mut state).and_then(|()| state.mask(&rules, may_stop));
            let long = begin.elapsed() > LONG;
            slow.store(long, Ordering::Relaxed);
            if long {
                grammar.set_slow();
            }
            match made {
                Ok(words) => promise.0.set(words),
                Err(failure) => state.failure = Some(shorten(&failure)),
            }
        }));
    }
}

impl State {
    /// Fulfils the promises as far as the tokens may come, and goes back.
    fn look_ahead(
        &mut self,
        rules: &Rules,
        next: &Mask,
        tokens: &[u32],
        may_stop: &[bool],
        promises: &[Promise],
    ) {
        let (mut allowed, mut consumed) = (next.clone(), 0);
        for ((&token, &may_stop), promise) in tokens.iter().zip(may_stop).zip(promises) {
            let Some(matcher) = self.matcher.as_mut().filter(|matcher| !matcher.is_stopped()) else { break };
            if !allowed.allows(token) || matcher.consume_token(token).is_err() {
                break;
            }
            consumed += 1;
            let Ok(words) = self.mask(rules, may_stop) else { break };
            promise.0.set(words);
            allowed = promise.0.clone();
        }
        // A parser that cannot go back is in error from then on, which its next use finds.
        if let Some(matcher) = self.matcher.as_mut().filter(|_| consumed > 0) {
            let _ = matcher.rollback(consumed);
        }
    }

    fn mask(&mut self, rules: &Rules, may_stop: bool) -> Result<Vec<u32>, String> {
        let Some(matcher) = &mut self.matcher else { return Ok(Vec::new()) };
        let mask = matcher.compute_mask_or_eos().map_err(|error| error.to_string())?;
        let mut words = mask.as_slice().to_vec();
        if let Some(allowed) = rules.params.allowed() {
            let allowed = allowed.wait().iter().copied().chain(std::iter::repeat(0));
            words.iter_mut().zip(allowed).for_each(|(word, allowed)| *word &= allowed);
        }
        if !may_stop
            // Where the grammar ends the answer ends, however short.
            && let Some(longer) = others(&words, &rules.stop_tokens)
        {
            words = longer;
        }
        if words.iter().all(|&word| word == 0) {
            return Err("no token that is allowed continues the grammar".to_owned());
        }
        Ok(words)
    }
}

/// A mask without these tokens, if it has others.
pub(crate) fn others(words: &[u32], tokens: &[u32]) -> Option<Vec<u32>> {
    let mut words = words.to_vec();
    for &token in tokens {
        if let Some(word) = words.get_mut(token as usize / 32) {
            *word &= !(1 << (token % 32));
        }
    }
    words.iter().any(|&word| word != 0).then_some(words)
}

/// Whoever waits for the mask does not wait for ever.
struct Promise(Mask);

impl Drop for Promise {
    fn drop(&mut self) {
        self.0.set(Vec::new());
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use harmony::Harmony;
    use tokenizer::Tokenizer;

    use super::{Constraint, Masks};
    use crate::grammar::{Form, Grammars};
    use crate::output::Rules;
    use crate::{OutputMode, SamplingParams};

    #[test]
    fn threads_do_not_wait_for_each_other() {
        let harmony = Arc::new(Harmony::new(Tokenizer::o200k_harmony()).unwrap());
        let grammar = Grammars::new(Arc::clone(&harmony)).text(&Form::Regex("(ab)*".to_owned())).unwrap();
        let ab = harmony.tokenizer().encode("ab");
        let rules = Arc::new(Rules {
            harmony,
            mode: OutputMode::Text,
            params: SamplingParams::default(),
            stop_tokens: Vec::new(),
            grammar: None,
            guarded: false,
        });
        let masks = Masks::new(4).unwrap();
        let mut constraint = Constraint::new(&masks, &rules, &grammar, true);
        for _ in 0..1000 {
            let guesses = [ab[0]; 3];
            for mask in constraint.masks_after(&guesses, &[true; 3]) {
                assert!(mask.allows(ab[0]));
            }
            constraint.advance(vec![ab[0]], true);
        }
        assert_eq!(constraint.failure(), None);
    }
}
