//! What the engines do, every ten seconds: a line each in the log as vLLM writes it, and how fast requests end.

use std::sync::atomic::Ordering;
use std::time::Duration;

use engine::{Replicas, Stats};

use crate::server::State;

const PERIOD: Duration = Duration::from_secs(10);

/// Looks at the engines again and again. A line is written while one is at work and once when it has stopped.
pub(crate) async fn watch(state: &State, log: bool) {
    let mut timer = tokio::time::interval(PERIOD);
    timer.tick().await;
    let mut ended = 0;
    let mut before = vec![Stats::default(); state.replicas];
    let mut active = vec![false; state.replicas];
    loop {
        timer.tick().await;
        let ended_before = std::mem::replace(&mut ended, state.metrics.ended());
        let per_second = (ended - ended_before) as f64 / PERIOD.as_secs_f64();
        state.ended_per_second.store(per_second.ceil() as u32, Ordering::Relaxed);
        let replicas = state.loaded();
        for (number, engine) in replicas.iter().flat_map(Replicas::serving) {
            let now = engine.stats();
            let before = std::mem::replace(&mut before[number], now.clone());
            let is_active = now.steps != before.steps || now.running > 0;
            let was_active = std::mem::replace(&mut active[number], is_active);
            if log && (is_active || was_active) {
                tracing::info!("{}", line(number, &before, &now));
            }
        }
    }
}

fn line(number: usize, before: &Stats, now: &Stats) -> String {
    // A new engine counts from 0.
    let rate = |before: u64, now: u64| now.saturating_sub(before) as f64 / PERIOD.as_secs_f64();
    let share = |part: f64, whole: f64| if whole > 0.0 { 100.0 * part / whole } else { 0.0 };
    format!(
        "Engine {number:03}: Avg prompt throughput: {:.1} tokens/s, Avg generation throughput: {:.1} tokens/s, Running: {} reqs, \
         Waiting: {} reqs, GPU KV cache usage: {:.1}%, Prefix cache hit rate: {:.1}%",
        rate(before.prompt_tokens, now.prompt_tokens),
        rate(before.generated_tokens, now.generated_tokens),
        now.running,
        now.waiting + now.paused,
        share(now.full_blocks_used as f64, now.full_blocks as f64),
        share(now.prefix_hits as f64, now.prefix_queries as f64),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_is_what_others_parse() {
        let before = Stats { prompt_tokens: 100, generated_tokens: 50, ..Stats::default() };
        let now = Stats {
            prompt_tokens: 1100,
            generated_tokens: 55,
            running: 2,
            waiting: 1,
            paused: 1,
            full_blocks_used: 1,
            full_blocks: 8,
            prefix_hits: 1,
            prefix_queries: 2,
            ..Stats::default()
        };
        assert_eq!(
            line(0, &before, &now),
            "Engine 000: Avg prompt throughput: 100.0 tokens/s, Avg generation throughput: 0.5 tokens/s, Running: 2 reqs, \
             Waiting: 2 reqs, GPU KV cache usage: 12.5%, Prefix cache hit rate: 50.0%"
        );
    }
}
