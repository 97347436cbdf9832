//! Looks whether the engines still work. One that has lost its device is replaced by a new one in this process if that can be, so
//! that the server comes back by itself (`serving.md` 13.6). After an illegal access CUDA gives a process no context any more,
//! whatever is reset: then, and after a step that hangs, the process must begin again, as soon as no other engine serves.

use std::sync::Arc;
use std::time::Duration;

use engine::{Place, Replicas, Stats};

use crate::server::{Restart, State};

/// Between two looks, at most.
const PERIOD: Duration = Duration::from_secs(1);

/// A step is given up after so many times the timeout that makes the server unhealthy. Long steps of a slow machine must not be
/// taken for a device that hangs, since a new engine would be no faster.
const PATIENCE: u32 = 30;

/// Looks again and again, until there is no engine left, and none to be had.
pub(crate) async fn watch(state: &Arc<State>) {
    let patience = state.health_stall_timeout * PATIENCE;
    let mut timer = tokio::time::interval(PERIOD.min(patience / 2).max(Duration::from_millis(1)));
    timer.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        timer.tick().await;
        let replicas = state.loaded();
        for (number, engine) in replicas.iter().flat_map(Replicas::serving) {
            let stats = engine.stats();
            let hangs = hangs(&stats, patience);
            if !stats.lost && !hangs {
                continue;
            }
            let what = if hangs { "hangs in a step" } else { "is lost" };
            match state.restart(number, engine.clone(), hangs).await {
                Restart::Done => tracing::warn!("engine {number} {what}: a new one serves now"),
                Restart::Failed(error) => {
                    tracing::error!(%error, "engine {number} {what} and cannot be replaced in this process");
                }
                Restart::NotPossible => {}
            }
        }
        drop(replicas);
        let gone = |place: &Place| matches!(place, Place::Gone);
        if state.loaded().is_some_and(|replicas| replicas.places().iter().all(gone)) {
            return;
        }
    }
}

/// Whether a step takes longer than any should.
pub(crate) fn hangs(stats: &Stats, timeout: Duration) -> bool {
    stats.step_started.is_some_and(|start| start.elapsed() > timeout)
}
