//! `--profile`: how long each kernel takes.

use checkpoint::Config;
use gptoss::{Backend, Error, KvLayout, Plan, SequenceOutput};

use crate::loaded::Loaded;
use crate::ui::tell;

/// A kernel, how often it ran, and the seconds of all runs.
pub(crate) type KernelTime = (&'static str, usize, f64);

/// A backend that times the kernels of every step, and says how long they took when it is dropped.
pub(crate) struct Profiled {
    loaded: Loaded,
    times: Vec<KernelTime>,
}

impl Profiled {
    pub(crate) fn new(loaded: Loaded) -> Profiled {
        Profiled { loaded, times: Vec::new() }
    }
}

impl Backend for Profiled {
    fn config(&self) -> &Config {
        self.loaded.config()
    }

    fn weight_bytes(&self) -> usize {
        self.loaded.weight_bytes()
    }

    fn describe(&self) -> String {
        self.loaded.describe()
    }

    fn least_prompt_tokens(&self, answers: usize) -> usize {
        self.loaded.least_prompt_tokens(answers)
    }

    fn kv_layout(&self) -> KvLayout {
        self.loaded.kv_layout()
    }

    fn allocate_kv(&mut self, full_blocks: usize, sliding_blocks: usize) -> Result<(), Error> {
        self.loaded.allocate_kv(full_blocks, sliding_blocks)
    }

    fn step(&mut self, plan: &Plan) -> Result<Vec<SequenceOutput>, Error> {
        let (outputs, times) = self.loaded.profile(plan)?;
        for (kernel, count, seconds) in times {
            match self.times.iter_mut().find(|(name, ..)| *name == kernel) {
                Some(sum) => *sum = (kernel, sum.1 + count, sum.2 + seconds),
                None => self.times.push((kernel, count, seconds)),
            }
        }
        Ok(outputs)
    }
}

impl Drop for Profiled {
    fn drop(&mut self) {
        self.times.sort_by(|a, b| b.2.total_cmp(&a.2));
        self.times.iter().for_each(|time| tell(line(time)));
    }
}

/// A kernel's time for people.
pub(crate) fn line(&(kernel, count, seconds): &KernelTime) -> String {
    let each = seconds * 1e6 / count as f64;
    format!("    {kernel:<20} {count:>5} × {each:>9.2} µs = {:>9.3} ms", seconds * 1e3)
}
