//! A thread pool for short phases: one hand-over per phase, no locks in a step.
//!
//! Workers spin briefly on the state of the current phase, then park; the caller takes part in the work. Tasks are handed out by
//! an atomic counter, and a phase waits only for workers that have joined it: one that the system does not let run while the
//! machine is shared costs nothing but its help.

use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{JoinHandle, Thread};

/// Turns of the spin loop before a worker parks: some tens of microseconds, longer than the gap between two phases of a
/// step and much shorter than a scheduler's time slice.
const SPINS: usize = 20_000;

/// One phase in [`Shared::state`].
const PHASE: u64 = 1 << 32;

/// Threads that run one phase after another.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<(JoinHandle<()>, Thread)>,
    /// Held while a phase runs: `run` may be called from several threads.
    phase: Mutex<()>,
}

struct Shared {
    /// The upper half counts openings and closings, so it is odd while a phase is open; the lower half counts the workers
    /// that have joined and not finished.
    state: AtomicU64,
    job: UnsafeCell<Option<Job>>,
    next: AtomicUsize,
    panicked: AtomicBool,
    stop: AtomicBool,
}

#[derive(Clone, Copy)]
struct Job {
    task: *const (dyn Fn(usize) + Sync),
    tasks: usize,
}

// SAFETY: `job` is written only by the thread that holds `phase` while the phase is closed and no worker has joined, and read by
// workers only between joining and leaving, which order the accesses.
unsafe impl Sync for Shared {}
// SAFETY: the pointer inside is to a `Sync` closure that outlives the phase (see `Pool::run`).
unsafe impl Send for Shared {}

impl Pool {
    /// A pool of `threads` threads, the caller of [`Pool::run`] being one of them.
    pub fn new(threads: usize) -> Pool {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            job: UnsafeCell::new(None),
            next: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        });
        let workers = (1..threads.max(1))
            .filter_map(|i| {
                let shared = Arc::clone(&shared);
                // A thread that the system refuses is one that does not help; the work is done by the others.
                let handle =
                    std::thread::Builder::new().name(format!("cpu-{i}")).spawn(move || shared.work()).ok()?;
                let thread = handle.thread().clone();
                Some((handle, thread))
            })
            .collect();
        Pool { shared, workers, phase: Mutex::new(()) }
    }

    /// The number of threads, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `task` for each of `0..tasks`, on all threads, and returns when all are done. A panic of a task is passed on
    /// when the others have finished. Must not be called from within a task.
    pub fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        if tasks <= 1 || self.workers.is_empty() {
            (0..tasks).for_each(task);
            return;
        }
        let guard = self.phase.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let shared = &*self.shared;
        // SAFETY: only the lifetime is erased. The pointer is used between here and the loop below that waits until every
        // worker that joined has finished, and `task` lives longer than this call.
        let task: &'static (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(task) };
        let job = Job { task, tasks };
        // SAFETY: `phase` is held, the phase before is closed and nobody is in it, so nobody else looks at `job`.
        unsafe { *shared.job.get() = Some(job) };
        shared.next.store(0, Ordering::Relaxed);
        shared.state.fetch_add(PHASE, Ordering::Release);
        for (_, thread) in &self.workers {
            thread.unpark();
        }
        let own = catch_unwind(AssertUnwindSafe(|| shared.take_tasks(job)));
        // Closed: who has not joined yet waits for the next one.
        shared.state.fetch_add(PHASE, Ordering::Relaxed);
        let mut spins = 0;
        while !shared.state.load(Ordering::Acquire).is_multiple_of(PHASE) {
            spins += 1;
            if spins < SPINS {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
        let panicked = shared.panicked.swap(false, Ordering::Relaxed);
        drop(guard);
        if let Err(panic) = own {
            resume_unwind(panic);
        }
        assert!(!panicked, "a task of the thread pool panicked");
    }
}

impl Shared {
    fn work(&self) {
        let mut seen = 0;
        let mut spins = 0;
        loop {
            let state = self.state.load(Ordering::Relaxed);
            let phase = state / PHASE;
            if phase.is_multiple_of(2) || phase == seen {
                if self.stop.load(Ordering::Relaxed) {
                    return;
                }
                spins += 1;
                if spins < SPINS {
                    std::hint::spin_loop();
                } else {
                    std::thread::park();
                    spins = 0;
                }
                continue;
            }
            if self.state.compare_exchange(state, state + 1, Ordering::Acquire, Ordering::Relaxed).is_err() {
                continue;
            }
            (seen, spins) = (phase, 0);
            // SAFETY: this worker has joined the phase, so `job` does not change until it leaves.
            if let Some(job) = unsafe { *self.job.get() }
                && catch_unwind(AssertUnwindSafe(|| self.take_tasks(job))).is_err()
            {
                self.panicked.store(true, Ordering::Relaxed);
            }
            self.state.fetch_sub(1, Ordering::Release);
        }
    }

    fn take_tasks(&self, job: Job) {
        // SAFETY: `Pool::run` keeps the closure alive until everybody who joined has left.
        let task = unsafe { &*job.task };
        loop {
            let i = self.next.fetch_add(1, Ordering::Relaxed);
            if i >= job.tasks {
                return;
            }
            task(i);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for (handle, thread) in self.workers.drain(..) {
            thread.unpark();
            // A worker never ends by panic: it catches those of the tasks.
            let _ = handle.join();
        }
    }
}

/// The number of physical cores that this process may use: logical ones divided by the threads that share a core.
pub fn physical_cores() -> usize {
    let logical = std::thread::available_parallelism().map_or(1, usize::from);
    let siblings = std::fs::read_to_string("/sys/devices/system/cpu/cpu0/topology/thread_siblings_list")
        .map_or(1, |list| list.trim().split([',', '-']).count());
    (logical / siblings.max(1)).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        let pool = Pool::new(4);
        for tasks in [0, 1, 2, 3, 100, 1000] {
            for _ in 0..20 {
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(tasks, &|i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
        let pool = Pool::new(3);
        let result = catch_unwind(AssertUnwindSafe(|| pool.run(50, &|i| assert!(i != 20, "task 20"))));
        assert!(result.is_err());
        let sum = AtomicUsize::new(0);
        pool.run(10, &|i| {
            sum.fetch_add(i, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 45);
    }

    #[test]
    fn callers_take_turns() {
        let pool = Pool::new(3);
        let sum = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        pool.run(7, &|_| {
                            sum.fetch_add(1, Ordering::Relaxed);
                        });
                    }
                });
            }
        });
        assert_eq!(sum.into_inner(), 2800);
    }
}
