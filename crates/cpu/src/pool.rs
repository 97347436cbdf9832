//! A thread pool for short phases: one hand-over per phase, no locks in a step.
//!
//! Workers spin briefly on the state of the current phase, then park; the caller takes part in the work. Each thread begins with an
//! equal share of the tasks and does them in order: what one task asks of memory ahead is what the next one reads. Who has done its
//! own takes the second half of another's. A phase waits only for workers that have joined it: one that the system does not let
//! run while the machine is shared costs nothing but its help.

use std::cell::UnsafeCell;
use std::collections::HashSet;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{JoinHandle, Thread};

use crate::nodes::{self, Nodes};

/// Turns of the spin loop before a worker parks: 0.6 to 0.75 ms on an EPYC, about 1 ms on Intel's, whose pause takes longer. That is
/// much longer than the gap between two phases of a step and shorter than a scheduler's time slice.
const SPINS: usize = 20_000;

/// One phase in [`Shared::state`].
const PHASE: u64 = 1 << 32;

/// Threads that run one phase after another.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<(JoinHandle<()>, Thread)>,
    nodes: Arc<Nodes>,
    /// Held while a phase runs: `run` may be called from several threads.
    phase: Mutex<()>,
}

struct Shared {
    /// The upper half counts openings and closings, so it is odd while a phase is open; the lower half counts the workers
    /// that have joined and not finished.
    state: AtomicU64,
    job: UnsafeCell<Option<Job>>,
    /// One per thread, the caller's first.
    shares: Vec<Share>,
    panicked: AtomicBool,
    stop: AtomicBool,
}

type Job = *const (dyn Fn(usize) + Sync);

/// The tasks that a thread has before it, in one word: where they begin in its lower half, where they end in the upper one. No two
/// are in a cache line, nor in two that are fetched together.
#[repr(align(128))]
struct Share(AtomicU64);

impl Share {
    fn set(&self, tasks: Range<u32>) {
        self.0.store(word(&tasks), Ordering::Relaxed);
    }

    /// Takes the first task.
    fn first(&self) -> Option<usize> {
        let rest = |tasks: Range<u32>| tasks.start + 1..tasks.end;
        self.shrink(rest).map(|tasks| tasks.start as usize)
    }

    /// Takes the second half, of an odd number the larger one.
    fn half(&self) -> Option<Range<u32>> {
        let middle = |tasks: &Range<u32>| tasks.start + (tasks.end - tasks.start) / 2;
        self.shrink(|tasks| tasks.start..middle(&tasks)).map(|tasks| middle(&tasks)..tasks.end)
    }

    /// Leaves a part and returns what there was, unless that is nothing.
    fn shrink(&self, part: impl Fn(Range<u32>) -> Range<u32>) -> Option<Range<u32>> {
        let shrunk = |old| {
            let tasks = tasks(old);
            (!tasks.is_empty()).then(|| word(&part(tasks)))
        };
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, shrunk).ok().map(tasks)
    }
}

fn word(tasks: &Range<u32>) -> u64 {
    u64::from(tasks.end) << 32 | u64::from(tasks.start)
}

fn tasks(word: u64) -> Range<u32> {
    word as u32..(word >> 32) as u32
}

// SAFETY: `job` is written only by the thread that holds `phase` while the phase is closed and no worker has joined, and read by
// workers only between joining and leaving, which order the accesses.
unsafe impl Sync for Shared {}
// SAFETY: the pointer inside is to a `Sync` closure that outlives the phase (see `Pool::run`).
unsafe impl Send for Shared {}

impl Pool {
    /// A pool of `threads` threads, the caller of [`Pool::run`] being one of them.
    pub fn new(threads: usize) -> Pool {
        Pool::on(nodes::of_this_machine(), threads)
    }

    /// The same on a machine whose memory nodes have these CPUs. The caller's thread is its own and not bound.
    pub(crate) fn on(cpus: Vec<Vec<usize>>, threads: usize) -> Pool {
        let nodes = Arc::new(Nodes::new(cpus, threads.max(1)));
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            job: UnsafeCell::new(None),
            shares: (0..threads.max(1)).map(|_| Share(AtomicU64::new(0))).collect(),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        });
        let workers = (1..threads.max(1))
            .map_while(|i| {
                let (shared, nodes) = (Arc::clone(&shared), Arc::clone(&nodes));
                // A thread that the system refuses is one that does not help; the work is done by the others.
                let handle = std::thread::Builder::new()
                    .name(format!("cpu-{i}"))
                    .spawn(move || {
                        nodes.bind(i);
                        shared.work(i);
                    })
                    .ok()?;
                let thread = handle.thread().clone();
                Some((handle, thread))
            })
            .collect();
        Pool { shared, workers, nodes, phase: Mutex::new(()) }
    }

    /// The number of threads, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// The memory nodes that the threads are of, and what is near which: tasks that are of one after the other are done by their threads.
    pub(crate) fn nodes(&self) -> &Nodes {
        &self.nodes
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
        // SAFETY: `phase` is held, the phase before is closed and nobody is in it, so nobody else looks at `job`.
        unsafe { *shared.job.get() = Some(task) };
        let border = |thread: usize| {
            u32::try_from(tasks * thread / self.threads()).expect("tasks that can be counted")
        };
        for (thread, share) in shared.shares.iter().enumerate().take(self.threads()) {
            share.set(border(thread)..border(thread + 1));
        }
        shared.state.fetch_add(PHASE, Ordering::Release);
        for (_, thread) in &self.workers {
            thread.unpark();
        }
        let own = catch_unwind(AssertUnwindSafe(|| shared.take_tasks(task, 0)));
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
    /// What worker `thread` does until the pool ends.
    fn work(&self, thread: usize) {
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
                && catch_unwind(AssertUnwindSafe(|| self.take_tasks(job, thread))).is_err()
            {
                self.panicked.store(true, Ordering::Relaxed);
            }
            self.state.fetch_sub(1, Ordering::Release);
        }
    }

    fn take_tasks(&self, job: Job, thread: usize) {
        // SAFETY: `Pool::run` keeps the closure alive until everybody who joined has left.
        let task = unsafe { &*job };
        let own = &self.shares[thread];
        loop {
            while let Some(i) = own.first() {
                task(i);
            }
            // The own one is empty, so where it comes does not matter.
            let mut others = self.shares[thread..].iter().chain(&self.shares[..thread]);
            let Some(half) = others.find_map(Share::half) else { return };
            own.set(half);
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

/// The number of physical cores that this process may use, or of the CPUs that it may keep busy, if that is less.
pub fn physical_cores() -> usize {
    let logical = std::thread::available_parallelism().map_or(1, usize::from);
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let siblings = |cpu| {
        let list = format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
        std::fs::read_to_string(list).ok()
    };
    cores(&nodes::allowed_cpus(&status), siblings).map_or(logical, |cores| cores.min(logical))
}

/// On how many cores the CPUs of a list such as `0-3,8` are. `siblings` names those on the core of a CPU, if there is such a CPU.
fn cores(list: &str, siblings: impl Fn(usize) -> Option<String>) -> Option<usize> {
    let cores: HashSet<String> = nodes::numbers(list).into_iter().filter_map(siblings).collect();
    (!cores.is_empty()).then_some(cores.len())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

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

    /// Eight CPUs, each with the one four further on, on four cores.
    #[test]
    fn cores_are_counted_over_the_cpus_that_may_be_used() {
        let siblings = |cpu| (cpu < 8).then(|| format!("{},{}\n", cpu % 4, cpu % 4 + 4));
        for (list, expected) in [
            ("\t0-7\n", Some(4)),
            ("\t0-3", Some(4)),
            ("4-7", Some(4)),
            ("1,5", Some(1)),
            ("0,2,4-5", Some(3)),
            // Of those that are possible, not all are there.
            ("0-63", Some(4)),
            ("8-63", None),
            ("", None),
        ] {
            assert_eq!(cores(list, siblings), expected, "{list}");
        }
    }

    /// A share is taken from both ends until nothing is left of it.
    #[test]
    fn a_share_has_a_first_task_and_a_second_half() {
        let share = Share(AtomicU64::new(0));
        assert_eq!((share.first(), share.half()), (None, None));
        share.set(10..17);
        assert_eq!(share.first(), Some(10));
        assert_eq!(share.half(), Some(14..17));
        assert_eq!(share.half(), Some(12..14));
        assert_eq!(share.half(), Some(11..12));
        assert_eq!((share.first(), share.half()), (None, None));
    }

    /// Each thread does its share in order; who cannot go on loses nothing but time.
    #[test]
    fn tasks_of_a_thread_that_waits_are_done_by_the_others() {
        let pool = Pool::new(2);
        let done = AtomicUsize::new(0);
        let order = Mutex::new(Vec::new());
        // Whoever begins with the last share waits in its first task until all others have run.
        pool.run(8, &|i| {
            if i == 4 {
                while done.load(Ordering::Acquire) < 7 {
                    std::thread::yield_now();
                }
            }
            order.lock().unwrap().push(i);
            done.fetch_add(1, Ordering::Release);
        });
        let order = order.into_inner().unwrap();
        assert_eq!(order[7], 4);
        assert_eq!(order[..4], [0, 1, 2, 3]);
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
