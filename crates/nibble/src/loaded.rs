//! A model loaded where `--device` says: on the CPU, or in a build with the feature `cuda` on a GPU.

use std::sync::Arc;

use checkpoint::{Config, Weights};
use cpu::Cpu;
use gptoss::{Backend, Error, KvLayout, Plan, SequenceOutput, Traffic};

use crate::args::{ActivationBits, CacheType, Common, Run, WeightBits};
use crate::failure::{Failure, Result};
use crate::gpus::gpus;
use crate::memory;
use crate::model::threads;
use crate::profile::{KernelTime, Profiled};
use crate::ui::Ui;

/// Weights packed for a device.
pub(crate) enum Loaded {
    Cpu(Box<Cpu>),
    #[cfg(feature = "cuda")]
    Cuda(Box<cuda::Cuda>),
}

/// Packs the weights for the device that `--device` asks for.
pub(crate) fn backend(weights: Arc<dyn Weights>, run: &Run, common: &Common, ui: Ui) -> Result<Loaded> {
    watched_backend(weights, run, common, ui, &mut |_, _| {})
}

/// The same; `watch` is told how much is done, of how much.
pub(crate) fn watched_backend(
    weights: Arc<dyn Weights>,
    run: &Run,
    common: &Common,
    ui: Ui,
    watch: &mut dyn FnMut(usize, usize),
) -> Result<Loaded> {
    let device = devices(&common.device, run.tensor_parallel_size.map(usize::from))?;
    let mut bar = ui.progress("Loading", 1);
    let mut progress = |done: usize, total: usize| {
        bar.set_total(total as u64);
        bar.set(done as u64);
        watch(done, total);
    };
    Ok(match device {
        Device::Cpu => {
            if let Some(count) = run.tensor_parallel_size.filter(|&count| count > 1) {
                return Err(Failure::input(format!(
                    "--tensor-parallel-size: expected 1 on a CPU, found {count}"
                )));
            }
            let options = cpu::Options {
                threads: Some(threads(common)),
                isa: None,
                fast_weights: run.weights == WeightBits::Fast,
                cache: match run.kv_cache_dtype {
                    CacheType::Auto => cpu::CacheFormat::F32,
                    CacheType::Bf16 => cpu::CacheFormat::Bf16,
                    CacheType::Fp8 => cpu::CacheFormat::E4m3,
                },
                activations: match run.activations {
                    ActivationBits::F32 => cpu::Activations::F32,
                    ActivationBits::Bf16 => cpu::Activations::Bf16,
                    ActivationBits::Int16 => cpu::Activations::Int16,
                    ActivationBits::Int8 => cpu::Activations::Int8,
                    ActivationBits::Nvfp4 => cpu::Activations::Nvfp4,
                },
            };
            let mut notes = Vec::new();
            let loaded = checked_beside(check_cpu_kernels, || match &run.packed_cache {
                Some(path) => {
                    Cpu::load_kept(weights, options, path, &mut |note| notes.push(note), &mut progress)
                }
                None => Cpu::load(weights, options, &mut progress),
            });
            drop(bar);
            notes.iter().for_each(|note| ui.note(format_args!("note: {note}")));
            let loaded = loaded?;
            if run.activations == ActivationBits::Nvfp4 {
                ui.note(match loaded.rounded_inputs() {
                    0 => "note: --activations nvfp4: the model has no input scales; activations stay f32"
                        .to_owned(),
                    count => format!(
                        "note: --activations nvfp4: the inputs of {count} matrices are rounded to NVFP4"
                    ),
                });
            }
            Loaded::Cpu(Box::new(loaded))
        }
        #[cfg(feature = "cuda")]
        Device::Cuda(devices) => {
            let on_gpus = matches!(run.activations, ActivationBits::F32 | ActivationBits::Nvfp4);
            if run.weights != WeightBits::AsStored || !on_gpus {
                return Err(Failure::input(
                    "--weights fast and --activations bf16, int16 or int8: expected --device cpu, found a GPU",
                ));
            }
            if run.packed_cache.is_some() {
                return Err(Failure::input("--packed-cache: expected --device cpu, found a GPU"));
            }
            let options = cuda::Options {
                eager: run.enforce_eager,
                cache: match run.kv_cache_dtype {
                    CacheType::Auto | CacheType::Bf16 => cuda::CacheFormat::Bf16,
                    CacheType::Fp8 => cuda::CacheFormat::E4m3,
                },
                batch_invariant: run.batch_invariant,
            };
            let mut loaded = Box::new(match &devices[..] {
                [device] => {
                    let beside = [device.beside()?];
                    checked_beside(
                        || check_kernels(&beside),
                        || cuda::Cuda::load(device, &*weights, options, &mut progress),
                    )?
                }
                // Not beside the loading: the driver may hold what one GPU is to do until another, which waits for it, is done.
                several => {
                    check_kernels(several)?;
                    cuda::Cuda::load_shared(several, &*weights, options, &mut progress)?
                }
            });
            if run.activations == ActivationBits::Nvfp4 {
                drop(bar);
                ui.note(format_args!("{}", use_fp4(&devices[0], &mut loaded, &*weights)?));
            }
            Loaded::Cuda(loaded)
        }
    })
}

/// Loads while the kernels are checked. What wrong kernels have loaded is dropped.
fn checked_beside<T>(
    check: impl FnOnce() -> Result<()> + Send,
    load: impl FnOnce() -> std::result::Result<T, Error>,
) -> Result<T> {
    let (checked, loaded) = std::thread::scope(|scope| {
        let check = scope.spawn(check);
        let loaded = load();
        (check.join(), loaded)
    });
    checked.map_err(|_| Failure::machine("the check of the kernels panicked"))??;
    Ok(loaded?)
}

/// Refuses a CPU that computes wrong numbers, on the instruction set that models run on.
fn check_cpu_kernels() -> Result<()> {
    let isa = cpu::Isa::best();
    let Some((kernel, error)) = cpu::wrong_kernel(isa) else { return Ok(()) };
    let device = format!("the CPU with {}", isa.name());
    Err(wrong_numbers(&device, &format!("the kernels of {kernel}"), error)
        .hint("nibble doctor shows all of them"))
}

fn wrong_numbers(device: &str, kernels: &str, error: f64) -> Failure {
    Failure::machine(format!("{device}: {kernels} give wrong numbers, a relative error of {error:.1e}"))
}

/// Turns FP4 products on, or says why the model runs as it would without.
#[cfg(feature = "cuda")]
fn use_fp4(device: &Arc<cuda::Device>, cuda: &mut cuda::Cuda, weights: &dyn Weights) -> Result<String> {
    let tests = cuda::fp4_self_test(device)?;
    if tests.is_empty() {
        return Ok(format!(
            "--activations nvfp4: {} has no products of that, activations stay in 16 bits",
            device.name()
        ));
    }
    if let Some(test) = tests.iter().find(|test| !test.passed) {
        return Ok(format!(
            "--activations nvfp4: {} gives wrong numbers on {}, a relative error of {:.1e}; activations stay in 16 bits",
            test.kernel,
            device.name(),
            test.error
        ));
    }
    Ok(match cuda.use_fp4(weights)? {
        0 => "--activations nvfp4: the model has no input scales, or several GPUs share it; activations stay in 16 bits".to_owned(),
        count => format!("--activations nvfp4: {count} matrices are multiplied in four bits"),
    })
}

/// Where to run.
pub(crate) enum Device {
    Cpu,
    /// At least one.
    #[cfg(feature = "cuda")]
    Cuda(Vec<Arc<cuda::Device>>),
}

/// What `--device` names for one model; `count` GPUs share it, if that is said.
#[cfg(feature = "cuda")]
pub(crate) fn devices(name: &str, count: Option<usize>) -> Result<Device> {
    let Some(gpus) = gpus(name)? else { return Ok(Device::Cpu) };
    let opened = gpus.divided(1, count)?.into_iter().flatten().map(cuda::Device::open);
    Ok(Device::Cuda(opened.collect::<std::result::Result<_, Error>>()?))
}

/// Refuses GPUs that compute wrong numbers, as they run a model: one alone, several together.
#[cfg(feature = "cuda")]
fn check_kernels(devices: &[Arc<cuda::Device>]) -> Result<()> {
    let Some(test) = cuda::self_test(devices)?.into_iter().find(|test| !test.passed) else {
        return Ok(());
    };
    let names: Vec<_> = devices.iter().map(|device| device.name()).collect();
    let kernel = format!("{} with {} experts", test.kernel, test.format);
    Err(wrong_numbers(&names.join(" and "), &kernel, test.error)
        .hint("nibble doctor shows all of them; --device cpu runs without the GPU"))
}

/// What `--device` names.
#[cfg(not(feature = "cuda"))]
pub(crate) fn devices(name: &str, _count: Option<usize>) -> Result<Device> {
    gpus(name).map(|_| Device::Cpu)
}

impl Loaded {
    fn backend(&self) -> &dyn Backend {
        match self {
            Loaded::Cpu(cpu) => &**cpu,
            #[cfg(feature = "cuda")]
            Loaded::Cuda(cuda) => &**cuda,
        }
    }

    fn backend_mut(&mut self) -> &mut dyn Backend {
        match self {
            Loaded::Cpu(cpu) => &mut **cpu,
            #[cfg(feature = "cuda")]
            Loaded::Cuda(cuda) => &mut **cuda,
        }
    }

    /// Whether products have inputs in NVFP4, as W4A4 models ask for.
    pub(crate) fn rounds_inputs(&self) -> bool {
        match self {
            Loaded::Cpu(cpu) => cpu.rounded_inputs() > 0,
            #[cfg(feature = "cuda")]
            Loaded::Cuda(cuda) => cuda.uses_fp4(),
        }
    }

    /// What a step reads.
    pub(crate) fn traffic(&self) -> Traffic {
        match self {
            Loaded::Cpu(cpu) => cpu.traffic(),
            #[cfg(feature = "cuda")]
            Loaded::Cuda(cuda) => cuda.traffic(),
        }
    }

    /// Bytes per second that the model's device reads from its memory.
    pub(crate) fn read_bandwidth(&self) -> Result<f64> {
        Ok(match self {
            Loaded::Cpu(cpu) => cpu.read_bandwidth(5)?,
            #[cfg(feature = "cuda")]
            Loaded::Cuda(cuda) => cuda.read_bandwidth()?,
        })
    }

    /// Bytes for the key/value cache, now that the weights are loaded; `None` if unknown. Of a GPU's memory at most `share` is
    /// then in use; that of a CPU is divided among so many `replicas`.
    #[cfg_attr(not(feature = "cuda"), expect(unused_variables, reason = "a CPU has no such share"))]
    pub(crate) fn cache_memory(&self, share: Option<f64>, replicas: usize) -> Result<Option<usize>> {
        Ok(match self {
            // A quarter of what is free, since pages are only taken when they are used; where that is little, up to a half.
            Loaded::Cpu(_) => memory::available().map(|available| {
                let enough = (64 << 20).min(available / 2);
                (available / 4).clamp(enough, 64 << 30) / replicas
            }),
            #[cfg(feature = "cuda")]
            Loaded::Cuda(cuda) => Some(cuda.cache_memory(share)?),
        })
    }

    /// Has the keys and values that `plan` reads lie in memory; what they were is lost.
    pub(crate) fn clear_kv(&mut self, plan: &Plan) -> Result<()> {
        match self {
            Loaded::Cpu(cpu) => cpu.clear_kv(plan)?,
            // A GPU's memory always is.
            #[cfg(feature = "cuda")]
            Loaded::Cuda(_) => {}
        }
        Ok(())
    }

    /// Whether a token's keys and values have the same bits in an answer and in a prompt.
    pub(crate) fn answers_are_prompts(&self) -> bool {
        match self {
            Loaded::Cpu(_) => true,
            #[cfg(feature = "cuda")]
            Loaded::Cuda(_) => false,
        }
    }

    /// Runs one step and times each kernel.
    pub(crate) fn profile(
        &mut self,
        plan: &Plan,
    ) -> std::result::Result<(Vec<SequenceOutput>, Vec<KernelTime>), Error> {
        match self {
            Loaded::Cpu(cpu) => {
                let (outputs, times) = cpu.profile(plan)?;
                Ok((outputs, times.into_iter().map(|t| (t.kernel, t.count, t.seconds)).collect()))
            }
            #[cfg(feature = "cuda")]
            Loaded::Cuda(cuda) => {
                let (outputs, times) = cuda.profile(plan)?;
                Ok((outputs, times.into_iter().map(|t| (t.kernel, t.count, t.seconds)).collect()))
            }
        }
    }

    /// For a command that runs it: with `--profile` it says at the end how long each kernel took.
    pub(crate) fn at_work(self, run: &Run) -> Box<dyn Backend> {
        if run.profile { Box::new(Profiled::new(self)) } else { Box::new(self) }
    }

    /// Tokens per step that use the device well; on CPUs larger steps are hardly more efficient.
    pub(crate) fn step_tokens(&self) -> usize {
        match self {
            Loaded::Cpu(_) => 512,
            #[cfg(feature = "cuda")]
            Loaded::Cuda(_) => 8192,
        }
    }

    /// Sequences that use the device well: more of them make each wait longer than all of them gain.
    pub(crate) fn step_sequences(&self) -> usize {
        match self {
            Loaded::Cpu(_) => 64,
            #[cfg(feature = "cuda")]
            Loaded::Cuda(_) => 256,
        }
    }
}

impl Backend for Loaded {
    fn config(&self) -> &Config {
        self.backend().config()
    }

    fn weight_bytes(&self) -> usize {
        self.traffic().weight_bytes()
    }

    fn describe(&self) -> String {
        self.backend().describe()
    }

    fn least_prompt_tokens(&self, answers: usize) -> usize {
        self.backend().least_prompt_tokens(answers)
    }

    fn kv_layout(&self) -> KvLayout {
        self.backend().kv_layout()
    }

    fn allocate_kv(&mut self, full_blocks: usize, sliding_blocks: usize) -> std::result::Result<(), Error> {
        self.backend_mut().allocate_kv(full_blocks, sliding_blocks)
    }

    fn step(&mut self, plan: &Plan) -> std::result::Result<Vec<SequenceOutput>, Error> {
        self.backend_mut().step(plan)
    }

    fn step_while(
        &mut self,
        plan: &Plan,
        meanwhile: &mut dyn FnMut(),
    ) -> std::result::Result<Vec<SequenceOutput>, Error> {
        self.backend_mut().step_while(plan, meanwhile)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::Status;

    #[test]
    fn wrong_kernels_end_a_start_that_would_succeed_or_fail() {
        check_cpu_kernels().unwrap();
        assert_eq!(checked_beside(|| Ok(()), || Ok(1)).unwrap(), 1);
        let wrong = || Err(wrong_numbers("the CPU", "the kernels of swiglu", 0.5));
        for loaded in [Ok(1), Err(Error::Memory { needed: 1 })] {
            let failure = checked_beside(wrong, || loaded).unwrap_err();
            assert_eq!(failure.status, Status::Machine);
            assert_eq!(
                failure.message,
                "the CPU: the kernels of swiglu give wrong numbers, a relative error of 5.0e-1"
            );
        }
    }
}
