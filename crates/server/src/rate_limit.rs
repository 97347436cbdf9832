//! Limits per key: so many requests and tokens in a minute (`serving.md` 13.2).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::response_store::Owner;

const MINUTE: f64 = 60.0;

/// What each key may use. `None`: as much as it wants.
#[derive(Debug)]
pub(crate) struct RateLimits {
    requests: Option<f64>,
    tokens: Option<f64>,
    /// By key, of which there are as many as the server was started with; one for all where no keys are asked for.
    used: Mutex<HashMap<Owner, Used>>,
}

/// What is left of a minute's requests and tokens. It fills up as time passes.
#[derive(Debug)]
struct Used {
    requests: f64,
    tokens: f64,
    at: Instant,
}

/// Whom a request's tokens are counted for.
#[derive(Debug, Clone)]
pub(crate) struct Account {
    limits: Arc<RateLimits>,
    owner: Owner,
}

impl RateLimits {
    /// Per minute.
    pub(crate) fn new(requests: Option<u64>, tokens: Option<u64>) -> RateLimits {
        let number = |limit: Option<u64>| limit.map(|limit| limit as f64);
        RateLimits { requests: number(requests), tokens: number(tokens), used: Mutex::default() }
    }

    /// Takes a request with a prompt of so many tokens. What is generated is counted when it is known, so tokens may be
    /// overdrawn by what runs at a time.
    ///
    /// # Errors
    /// The time after which another try may succeed.
    pub(crate) fn admit(
        self: &Arc<RateLimits>,
        owner: Owner,
        prompt_tokens: usize,
    ) -> Result<Account, Duration> {
        self.admit_at(owner, prompt_tokens, Instant::now())
    }

    fn admit_at(
        self: &Arc<RateLimits>,
        owner: Owner,
        prompt_tokens: usize,
        now: Instant,
    ) -> Result<Account, Duration> {
        let account = Account { limits: Arc::clone(self), owner };
        if self.requests.is_none() && self.tokens.is_none() {
            return Ok(account);
        }
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let (requests, tokens) =
            (self.requests.unwrap_or(f64::INFINITY), self.tokens.unwrap_or(f64::INFINITY));
        let left = used.entry(owner).or_insert(Used { requests, tokens, at: now });
        let minutes = now.saturating_duration_since(left.at).as_secs_f64() / MINUTE;
        left.at = now;
        // Infinity times nothing is not a number.
        let fill =
            |left: f64, limit: f64| if limit.is_finite() { limit.min(left + limit * minutes) } else { limit };
        left.requests = fill(left.requests, requests);
        left.tokens = fill(left.tokens, tokens);
        let wait = |missing: f64, limit: f64| if missing > 0.0 { missing / limit * MINUTE } else { 0.0 };
        // A prompt larger than what a minute allows passes when nothing else was used.
        let needed = (prompt_tokens as f64).min(tokens);
        let seconds = wait(1.0 - left.requests, requests).max(wait(needed - left.tokens, tokens));
        if seconds > 0.0 {
            return Err(Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX));
        }
        left.requests -= 1.0;
        left.tokens -= prompt_tokens as f64;
        Ok(account)
    }
}

impl Account {
    /// Counts generated tokens.
    pub(crate) fn charge(&self, tokens: usize) {
        self.change(|left| left.tokens -= tokens as f64);
    }

    /// Gives a request with a prompt of so many tokens back: the server did not take it.
    pub(crate) fn refund(&self, prompt_tokens: usize) {
        self.change(|left| {
            left.requests += 1.0;
            left.tokens += prompt_tokens as f64;
        });
    }

    fn change(&self, change: impl FnOnce(&mut Used)) {
        let mut used = self.limits.used.lock().unwrap_or_else(PoisonError::into_inner);
        // Where nothing is limited nothing is there.
        used.get_mut(&self.owner).map(change);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_minute_holds_so_much_and_fills_up() {
        let limits = Arc::new(RateLimits::new(Some(2), Some(100)));
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let (one, other) = (Some([1; 32]), Some([2; 32]));
        let account = limits.admit_at(one, 10, start).unwrap();
        limits.admit_at(one, 10, start).unwrap();
        // Half a minute makes one request.
        assert_eq!(limits.admit_at(one, 10, start).unwrap_err(), Duration::from_secs(30));
        limits.admit_at(other, 10, start).unwrap();
        limits.admit_at(one, 10, after(30)).unwrap();
        // What was generated is missing later: of 100 tokens 30 were used, half a minute gave them back but 10.
        account.charge(190);
        let wait = limits.admit_at(one, 10, after(60)).unwrap_err();
        assert!((wait.as_secs_f64() - 36.0).abs() < 0.01, "{wait:?}");
        limits.admit_at(one, 10, after(97)).unwrap();
        // A prompt beyond the limit passes alone.
        assert!(limits.admit_at(other, 1000, after(600)).is_ok());
        assert!(limits.admit_at(other, 1, after(601)).is_err());
        // What was given back can be used.
        let account = limits.admit_at(one, 100, after(700)).unwrap();
        assert!(limits.admit_at(one, 100, after(700)).is_err());
        account.refund(100);
        assert!(limits.admit_at(one, 100, after(700)).is_ok());
        let free = Arc::new(RateLimits::new(None, None));
        assert!((0..1000).all(|_| free.admit_at(one, 1 << 20, start).is_ok()));
    }
}
