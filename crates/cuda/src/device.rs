//! One GPU: its context, stream, memory and kernels, and the launch of a kernel with one parameter struct.

use std::collections::HashMap;
use std::ffi::{CString, c_int, c_uint, c_void};
use std::ptr::null_mut;
use std::sync::{Arc, Mutex, PoisonError};

use bytemuck::NoUninit;
use gptoss::Error;

use crate::driver::{Address, Driver, Handle, LaunchAttribute, LaunchConfig, OUT_OF_MEMORY, driver};

/// The driver reads a fat binary as 64-bit words.
#[cfg(feature = "kernels")]
#[repr(C, align(64))]
struct Aligned<T: ?Sized>(T);

#[cfg(feature = "kernels")]
macro_rules! fatbin {
    ($name:literal) => {{
        static IMAGE: &Aligned<[u8]> =
            &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/", $name, ".fatbin")));
        &IMAGE.0
    }};
}

/// The kernels' machine code, and which kernels each file holds. A file with capabilities is for those chips alone.
#[cfg(feature = "kernels")]
const MODULES: &[Module] = &[
    (fatbin!("pack"), &["pack_bf16", "pack_fp4"], &[]),
    (
        fatbin!("product"),
        &[
            "product_bf16_8",
            "product_bf16_16",
            "product_fp4_8",
            "product_fp4_16",
            "experts_bf16_8",
            "experts_bf16_16",
            "experts_fp4_8",
            "experts_fp4_16",
        ],
        &[],
    ),
    (
        fatbin!("one"),
        &[
            "one_qkv_bf16",
            "one_qkv_bf16_shared",
            "one_qkv_fp4",
            "one_qkv_fp4_shared",
            "one_attended_bf16",
            "one_attended_bf16_shared",
            "one_attended_fp4",
            "one_attended_fp4_shared",
            "one_experts_bf16",
            "one_experts_bf16_shared",
            "one_experts_fp4",
            "one_experts_fp4_shared",
            "one_qkv_bf16_small",
            "one_qkv_bf16_small_shared",
            "one_attended_bf16_small",
            "one_attended_bf16_small_shared",
            "one_experts_fp4_small",
            "one_experts_fp4_small_shared",
            "one_norm_bf16",
            "one_norm_bf16_shared",
            "one_norm_fp4",
            "one_norm_fp4_shared",
            "one_output_bf16",
            "one_output_fp4",
        ],
        &[],
    ),
    (
        fatbin!("one_invariant_sm90"),
        &[
            "one_qkv_bf16_invariant",
            "one_qkv_fp4_invariant",
            "one_attended_bf16_invariant",
            "one_attended_fp4_invariant",
            "one_experts_bf16_invariant",
            "one_experts_fp4_invariant",
            "one_norm_bf16_invariant",
            "one_norm_fp4_invariant",
            "one_output_fp4_invariant",
        ],
        &[90],
    ),
    (
        fatbin!("gemm_sm90"),
        &["gemm_bf16_split", "gemm_fp4_split", "gemm_experts_bf16_few", "gemm_experts_fp4_few"],
        &[90],
    ),
    (fatbin!("product_few_sm90"), &["product_few_8", "product_few_16", "product_few_32"], &[90]),
    (
        fatbin!("product_some_sm90"),
        &[
            "product_some_qkv_bf16_128",
            "product_some_qkv_bf16_256",
            "product_some_qkv_fp4_128",
            "product_some_qkv_fp4_256",
            "product_some_residual_bf16_128",
            "product_some_residual_bf16_256",
            "product_some_residual_fp4_128",
            "product_some_residual_fp4_256",
            "product_some_bf16_128",
            "product_some_bf16_256",
            "product_some_fp4_128",
            "product_some_fp4_256",
        ],
        &[90],
    ),
    (fatbin!("router_gather_sm90"), &["router_gather"], &[90]),
    (fatbin!("router_gather_many_sm90"), &["router_gather_many"], &[90]),
    (fatbin!("gemm_many_sm90"), &["gemm_bf16", "gemm_fp4", "gemm_experts_bf16", "gemm_experts_fp4"], &[90]),
    (fatbin!("gemm_many"), &["gemm_many_bf16_64", "gemm_many_fp4_64", "gemm_many_fp4_128"], &[]),
    (fatbin!("experts_few"), &["experts_few"], &[]),
    (fatbin!("experts_some"), &["experts_some"], &[]),
    (fatbin!("experts_streamed_sm90"), &["experts_streamed"], &[90]),
    (fatbin!("attention"), &["attend_split", "attend_split_e4m3"], &[]),
    (
        fatbin!("attention_many"),
        &["attend_many", "attend_many_e4m3", "attend_many_split", "attend_many_split_e4m3"],
        &[],
    ),
    (
        fatbin!("attention_many_sm90"),
        &["attend_prompts", "attend_prompts_e4m3", "attend_prompts_split", "attend_prompts_split_e4m3"],
        &[90],
    ),
    (fatbin!("all_reduce"), &["all_reduce"], &[]),
    (
        fatbin!("stream"),
        &[
            "embed",
            "keep",
            "rms_norm",
            "rms_norm_shared",
            "router",
            "router_many",
            "gather",
            "largest",
            "read",
        ],
        &[],
    ),
    (fatbin!("sampling"), &["modify", "survey", "collect", "draw", "rank"], &[]),
    (fatbin!("quantize"), &["quantize"], &[]),
    (fatbin!("gemm_sm100"), &["fp4_gemm", "fp4_gemm_experts"], &[100, 103]),
    (fatbin!("gemm_sm120"), &["fp4_gemm", "fp4_gemm_experts"], &[120]),
];
#[cfg(not(feature = "kernels"))]
const MODULES: &[Module] = &[];

type Module = (&'static [u8], &'static [&'static str], &'static [u32]);

/// How many devices there are.
///
/// # Errors
/// `NoDevice` says why there is none; `Device` why those that there may be do not work.
pub fn device_count() -> Result<usize, Error> {
    if MODULES.is_empty() {
        return Err(Error::NoDevice("this build has no GPU kernels (feature `cuda`)".to_owned()));
    }
    let driver = driver()?;
    let mut count = 0;
    // SAFETY: writes one integer.
    driver.check(unsafe { (driver.device_count)(&raw mut count) }, "counting GPUs")?;
    if count == 0 {
        return Err(Error::NoDevice("the NVIDIA driver has no GPU".to_owned()));
    }
    Ok(count as usize)
}

/// A GPU.
pub struct Device {
    driver: &'static Driver,
    device: c_int,
    context: Handle,
    pub(crate) stream: Handle,
    modules: Vec<Handle>,
    functions: HashMap<&'static str, Handle>,
    name: String,
    ordinal: usize,
    /// Compute capability whose kernels it takes.
    capability: u32,
    /// Its own.
    compute_capability: u32,
    multiprocessors: usize,
    shared_bytes: usize,
    /// It is to be taken for a GPU that cannot reach another's memory.
    apart: bool,
    /// While a profile is taken: the kernels launched so far.
    timed: Mutex<Option<Vec<Timed>>>,
}

/// A kernel and the events around it.
type Timed = (&'static str, Event, Event);

/// What one kernel took in a profile.
#[derive(Debug, Clone, PartialEq)]
pub struct KernelTime {
    /// The kernel.
    pub kernel: &'static str,
    /// How often it ran.
    pub count: usize,
    /// All its runs together, in seconds.
    pub seconds: f64,
}

// SAFETY: the handles are names of objects that the driver guards; every use sets the context of the calling thread first.
unsafe impl Send for Device {}
// SAFETY: as above; the driver's functions may be called from any thread.
unsafe impl Sync for Device {}

impl Device {
    /// Opens the device of this number and loads the kernels.
    pub fn open(ordinal: usize) -> Result<Arc<Device>, Error> {
        Device::open_with(ordinal, u32::MAX, false)
    }

    /// Opens it with the kernels of compute capability `most`, if its own is later.
    fn open_with(ordinal: usize, most: u32, apart: bool) -> Result<Arc<Device>, Error> {
        let count = device_count()?;
        if ordinal >= count {
            return Err(Error::Unsupported(format!(
                "cuda:{ordinal} is not among the GPUs, of which there are {count}"
            )));
        }
        let driver = driver()?;
        let mut device = 0;
        // SAFETY: writes one integer; the ordinal is below the count.
        driver.check(unsafe { (driver.device)(&raw mut device, ordinal as c_int) }, "opening the GPU")?;
        let attribute = |attribute: c_int| -> Result<usize, Error> {
            let mut value = 0;
            // SAFETY: writes one integer.
            let result = unsafe { (driver.device_attribute)(&raw mut value, attribute, device) };
            driver.check(result, "asking the GPU for an attribute")?;
            Ok(value as usize)
        };
        let mut name = [0u8; 128];
        // SAFETY: the driver writes a C string of at most this length.
        let result = unsafe { (driver.device_name)(name.as_mut_ptr().cast(), name.len() as c_int, device) };
        driver.check(result, "asking the GPU for its name")?;
        let name = name.split(|&b| b == 0).next().unwrap_or_default();
        let compute_capability = (attribute(75)? * 10 + attribute(76)?) as u32;
        let best = with_kernels(compute_capability);
        let capability = most.min(best);
        let (most_multiprocessors, most_shared_bytes) = match capability {
            older if older < best => size_of_generation(older),
            _ => (usize::MAX, usize::MAX),
        };
        let name = String::from_utf8_lossy(name).into_owned();
        if capability < 80 {
            return Err(Error::Unsupported(format!(
                "{name} has compute capability {}.{}, and 8.0 is needed",
                capability / 10,
                capability % 10
            )));
        }
        let mut context = null_mut();
        // SAFETY: writes one handle.
        let result = unsafe { (driver.retain_context)(&raw mut context, device) };
        driver.check(result, "creating a context on the GPU")?;
        let mut opened = Device {
            driver,
            device,
            context,
            stream: null_mut(),
            modules: Vec::new(),
            functions: HashMap::new(),
            name,
            ordinal,
            capability,
            compute_capability,
            multiprocessors: attribute(16)?.min(most_multiprocessors),
            shared_bytes: attribute(97)?.min(most_shared_bytes),
            apart,
            timed: Mutex::new(None),
        };
        opened.bind()?;
        // SAFETY: writes one handle; 1 is CU_STREAM_NON_BLOCKING.
        let result = unsafe { (driver.create_stream)(&raw mut opened.stream, 1) };
        driver.check(result, "creating a stream")?;
        for (image, names, capabilities) in MODULES {
            if capabilities.is_empty() || capabilities.contains(&capability) {
                opened.load_module(image, names)?;
            }
        }
        Ok(Arc::new(opened))
    }

    /// The same GPU with a stream of its own, for work beside that of this one.
    pub fn beside(&self) -> Result<Arc<Device>, Error> {
        Device::open_with(self.ordinal, self.capability, self.apart)
    }

    /// The same GPU as if it were of an older generation, 80 being compute capability 8.0: with the kernels of that one, which run on
    /// later ones too, and as many multiprocessors with as much shared memory as one of its chips has. So every generation's choice of kernels can be tested on a later GPU.
    pub fn as_generation(&self, capability: u32) -> Result<Arc<Device>, Error> {
        Device::open_with(self.ordinal, capability, self.apart)
    }

    /// The same GPU as if it could not reach the memory of others, as many cannot. So that way can be tested where they can.
    pub fn set_apart(&self) -> Result<Arc<Device>, Error> {
        Device::open_with(self.ordinal, self.capability, true)
    }

    /// The same GPU as if it had at most so many multiprocessors.
    pub(crate) fn no_larger_than(self: &Arc<Self>, multiprocessors: usize) -> Result<Arc<Device>, Error> {
        if self.multiprocessors <= multiprocessors {
            return Ok(Arc::clone(self));
        }
        let mut device = Device::open_with(self.ordinal, self.capability, self.apart)?;
        let own = Arc::get_mut(&mut device).expect("nobody else has it yet");
        own.multiprocessors = multiprocessors;
        Ok(device)
    }

    /// Device name as the driver gives it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its number among the GPUs that the driver shows.
    pub fn ordinal(&self) -> usize {
        self.ordinal
    }

    /// Compute capability of the chip: 121 for 12.1.
    pub fn compute_capability(&self) -> u32 {
        self.compute_capability
    }

    /// Compute capability whose kernels it takes: 90 for 9.0.
    pub fn capability(&self) -> u32 {
        self.capability
    }

    /// Streaming multiprocessors.
    pub fn multiprocessors(&self) -> usize {
        self.multiprocessors
    }

    /// Bytes of device memory: free and all.
    pub fn memory(&self) -> Result<(usize, usize), Error> {
        self.bind()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: writes two integers.
        let result = unsafe { (self.driver.memory_info)(&raw mut free, &raw mut total) };
        self.check(result, "asking the GPU for its free memory")?;
        Ok((free, total))
    }

    /// Bytes of shared memory that a block can have.
    pub(crate) fn shared_bytes(&self) -> usize {
        self.shared_bytes
    }

    /// Lets this device's kernels read and write the memory of another one, if they can. Where the driver says that they can it is tried:
    /// on some machines, behind an IOMMU above all, what they write is lost.
    pub(crate) fn reaches_memory_of(&self, peer: &Arc<Device>) -> Result<bool, Error> {
        if self.ordinal == peer.ordinal {
            return Ok(true);
        }
        if self.apart {
            return Ok(false);
        }
        self.bind()?;
        let mut can = 0;
        // SAFETY: writes one integer.
        let result = unsafe { (self.driver.can_access_peer)(&raw mut can, self.device, peer.device) };
        self.check(result, "asking whether one GPU can read another's memory")?;
        if can == 0 {
            return Ok(false);
        }
        /// It was allowed before.
        const PEER_ACCESS_ALREADY_ENABLED: c_int = 704;
        // SAFETY: both contexts are live.
        let result = unsafe { (self.driver.enable_peer_access)(peer.context, 0) };
        if result != 0 && result != PEER_ACCESS_ALREADY_ENABLED {
            return Ok(false);
        }
        const BYTES: usize = 4096;
        peer.bind()?;
        let (words, mut found) = (peer.filled(BYTES, 0)?, peer.pinned(BYTES)?);
        peer.synchronize()?;
        self.bind()?;
        // SAFETY: the range is that of the buffer, which the peer has filled already and reads when this stream has come to its end.
        let result = unsafe { (self.driver.fill)(words.address(), 0xa5, BYTES, self.stream) };
        self.check(result, "writing to another GPU's memory")?;
        self.synchronize()?;
        peer.bind()?;
        words.download(0, &mut found, BYTES)?;
        peer.synchronize()?;
        Ok(found.slice::<u8>()[..BYTES].iter().all(|&byte| byte == 0xa5))
    }

    fn load_module(&mut self, image: &'static [u8], names: &[&'static str]) -> Result<(), Error> {
        let mut module = null_mut();
        // SAFETY: the image is a complete fat binary; it is copied.
        let result = unsafe { (self.driver.load_module)(&raw mut module, image.as_ptr().cast()) };
        let what = match result {
            OUT_OF_MEMORY => "loading the kernels",
            _ => "loading the kernels (the driver must be of CUDA 13.0 or newer)",
        };
        self.check(result, what)?;
        self.modules.push(module);
        for name in names {
            let mut function = null_mut();
            let symbol = CString::new(*name).expect("the names of kernels have no zero");
            // SAFETY: writes one handle; the module was loaded above.
            let result = unsafe { (self.driver.function)(&raw mut function, module, symbol.as_ptr()) };
            self.check(result, name)?;
            // Allow all the shared memory there is beside the kernel's own (attribute 1): 8 is MAX_DYNAMIC_SHARED_SIZE_BYTES.
            let mut own = 0;
            // SAFETY: writes one integer; a function of a loaded module.
            let result = unsafe { (self.driver.read_function_attribute)(&raw mut own, 1, function) };
            self.check(result, name)?;
            // SAFETY: a function of a loaded module.
            let result =
                unsafe { (self.driver.function_attribute)(function, 8, self.shared_bytes as c_int - own) };
            self.check(result, name)?;
            // All of it (in percent) is reserved for every kernel (9 is PREFERRED_SHARED_MEMORY_CARVEOUT): two kernels are at work on a
            // multiprocessor at a time, and it must stop for another division.
            // SAFETY: as above.
            let result = unsafe { (self.driver.function_attribute)(function, 9, 100) };
            self.check(result, name)?;
            self.functions.insert(name, function);
        }
        Ok(())
    }

    /// As [`Driver::check`], with the number of this device.
    fn check(&self, result: c_int, what: &str) -> Result<(), Error> {
        if result == 0 {
            return Ok(());
        }
        self.driver.check(result, &format!("cuda:{}: {what}", self.ordinal))
    }

    /// Makes this device the calling thread's.
    pub(crate) fn bind(&self) -> Result<(), Error> {
        // SAFETY: the context lives as long as `self`.
        self.check(unsafe { (self.driver.set_context)(self.context) }, "entering the GPU's context")
    }

    /// Puts a kernel on the stream. `params` is its one parameter.
    ///
    /// # Safety
    /// `params` is what the kernel of this name takes, and the addresses in it are live allocations of this device, as large as
    /// the kernel reads and writes with this grid.
    pub(crate) unsafe fn launch<P: NoUninit>(
        &self,
        name: &'static str,
        grid: [u32; 3],
        threads: u32,
        shared_bytes: usize,
        params: &P,
    ) -> Result<(), Error> {
        // SAFETY: the caller's promise.
        unsafe { self.launch_clusters(name, grid, 1, threads, shared_bytes, params) }
    }

    /// As [`Device::launch`], `cluster` blocks along y being a cluster.
    ///
    /// # Safety
    /// As [`Device::launch`].
    pub(crate) unsafe fn launch_clusters<P: NoUninit>(
        &self,
        name: &'static str,
        grid: [u32; 3],
        cluster: u32,
        threads: u32,
        shared_bytes: usize,
        params: &P,
    ) -> Result<(), Error> {
        let function = self.functions.get(name).expect("every kernel that is launched is listed");
        let attributes = [LaunchAttribute::cluster(cluster), LaunchAttribute::DEPENDENT];
        let config = LaunchConfig {
            grid,
            block: [threads, 1, 1],
            shared_bytes: shared_bytes as u32,
            stream: self.stream,
            attributes: attributes.as_ptr(),
            attribute_count: if self.capability < 90 { 0 } else { attributes.len() as u32 },
        };
        let mut arguments = [std::ptr::from_ref(params).cast_mut().cast::<c_void>()];
        let mut timed = self.timed.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(timed) = &mut *timed {
            let (start, end) = (self.event_with(0)?, self.event_with(0)?);
            self.record(&start)?;
            timed.push((name, start, end));
        }
        // SAFETY: the config and the one argument outlive the call, which copies them; the rest is the caller's promise.
        let result =
            unsafe { (self.driver.launch)(&raw const config, *function, arguments.as_mut_ptr(), null_mut()) };
        if let Some((.., end)) = timed.as_ref().and_then(|timed| timed.last()) {
            self.record(end)?;
        }
        if result == 0 {
            return Ok(());
        }
        self.check(result, &format!("starting kernel {name} with grid {grid:?}, {shared_bytes} bytes"))
    }

    /// Waits until everything on the stream is done.
    pub(crate) fn synchronize(&self) -> Result<(), Error> {
        // SAFETY: the stream lives as long as `self`.
        self.check(unsafe { (self.driver.synchronize)(self.stream) }, "running kernels")
    }

    /// Records what `enqueue` puts on the stream, to be launched again and again.
    pub(crate) fn capture(
        self: &Arc<Self>,
        enqueue: impl FnOnce() -> Result<(), Error>,
    ) -> Result<Graph, Error> {
        // SAFETY: the stream is ours; 1 is thread-local mode.
        let result = unsafe { (self.driver.begin_capture)(self.stream, 1) };
        self.check(result, "recording a graph")?;
        let enqueued = enqueue();
        let mut graph = null_mut();
        // SAFETY: writes one handle; capture was begun above and ends whatever happened between.
        let result = unsafe { (self.driver.end_capture)(self.stream, &raw mut graph) };
        if let Err(error) = enqueued {
            if !graph.is_null() {
                // SAFETY: nobody has it.
                unsafe { (self.driver.destroy_graph)(graph) };
            }
            return Err(error);
        }
        self.check(result, "recording a graph")?;
        let mut executable = null_mut();
        // SAFETY: writes one handle; the graph was just made.
        let result = unsafe { (self.driver.instantiate)(&raw mut executable, graph, 0) };
        // SAFETY: the executable does not need the graph.
        unsafe { (self.driver.destroy_graph)(graph) };
        self.check(result, "preparing a graph")?;
        Ok(Graph { device: Arc::clone(self), executable })
    }

    /// Seconds that the device takes for what `enqueue` puts on the stream.
    pub(crate) fn time(&self, enqueue: impl FnOnce() -> Result<(), Error>) -> Result<f64, Error> {
        let (start, end) = (self.event_with(0)?, self.event_with(0)?);
        self.record(&start)?;
        enqueue()?;
        self.record(&end)?;
        self.wait(&end)?;
        self.between(&start, &end)
    }

    /// Seconds from one event to another. Both say when they were, and have been waited for.
    fn between(&self, start: &Event, end: &Event) -> Result<f64, Error> {
        let mut milliseconds = 0.0;
        // SAFETY: writes one number; both events are live.
        let result = unsafe { (self.driver.elapsed)(&raw mut milliseconds, start.handle, end.handle) };
        self.check(result, "comparing events")?;
        Ok(f64::from(milliseconds) / 1e3)
    }

    /// Times every kernel that `work` launches, in the order of their first launch. Kernels do not overlap meanwhile.
    pub(crate) fn profile(&self, work: impl FnOnce() -> Result<(), Error>) -> Result<Vec<KernelTime>, Error> {
        let timed = || self.timed.lock().unwrap_or_else(PoisonError::into_inner);
        *timed() = Some(Vec::new());
        let done = work();
        let events = timed().take().unwrap_or_default();
        done?;
        self.synchronize()?;
        let mut times: Vec<KernelTime> = Vec::new();
        for (kernel, start, end) in events {
            let seconds = self.between(&start, &end)?;
            match times.iter_mut().find(|time| time.kernel == kernel) {
                Some(time) => {
                    time.count += 1;
                    time.seconds += seconds;
                }
                None => times.push(KernelTime { kernel, count: 1, seconds }),
            }
        }
        Ok(times)
    }

    /// A new event, which does not say when it was.
    pub(crate) fn event(&self) -> Result<Event, Error> {
        /// CU_EVENT_DISABLE_TIMING
        const UNTIMED: c_uint = 2;
        self.event_with(UNTIMED)
    }

    fn event_with(&self, flags: c_uint) -> Result<Event, Error> {
        let mut handle = null_mut();
        // SAFETY: writes one handle.
        self.check(unsafe { (self.driver.create_event)(&raw mut handle, flags) }, "creating an event")?;
        Ok(Event { driver: self.driver, handle })
    }

    /// Marks the stream's present end.
    pub(crate) fn record(&self, event: &Event) -> Result<(), Error> {
        // SAFETY: both handles are live.
        self.check(unsafe { (self.driver.record_event)(event.handle, self.stream) }, "recording an event")
    }

    /// Waits for what was on the stream when the event was last recorded.
    pub(crate) fn wait(&self, event: &Event) -> Result<(), Error> {
        // SAFETY: the handle is live.
        self.check(unsafe { (self.driver.wait_event)(event.handle) }, "running kernels")
    }

    /// Bytes of device memory, zeroed.
    pub(crate) fn buffer(self: &Arc<Self>, bytes: usize) -> Result<Buffer, Error> {
        self.filled(bytes, 0)
    }

    /// Bytes of device memory, all of this value.
    pub(crate) fn filled(self: &Arc<Self>, bytes: usize, value: u8) -> Result<Buffer, Error> {
        self.bind()?;
        let mut address = 0;
        let size = bytes.max(16);
        // SAFETY: writes one address.
        match unsafe { (self.driver.allocate)(&raw mut address, size) } {
            OUT_OF_MEMORY => return Err(Error::Memory { needed: bytes }),
            result => self.check(result, "allocating memory")?,
        }
        let buffer = Buffer { device: Arc::clone(self), address, bytes };
        // SAFETY: the allocation has this size.
        let result = unsafe { (self.driver.fill)(address, value, size, self.stream) };
        self.check(result, "clearing memory")?;
        Ok(buffer)
    }

    /// Copies `bytes` at `from` to the start of `to`, when the stream comes to it.
    ///
    /// # Safety
    /// The range lies in a live allocation of this device.
    pub(crate) unsafe fn download(&self, from: Address, to: &mut Pinned, bytes: usize) -> Result<(), Error> {
        assert!(bytes <= to.bytes);
        // SAFETY: the caller's promise; `to` is page-locked and read after the stream has been waited for.
        let result = unsafe { (self.driver.download)(to.pointer.cast(), from, bytes, self.stream) };
        self.check(result, "copying from the GPU")
    }

    /// Page-locked memory of the host, readable by the CPU at full speed.
    pub(crate) fn pinned(self: &Arc<Self>, bytes: usize) -> Result<Pinned, Error> {
        self.bind()?;
        let mut pointer = null_mut();
        // SAFETY: writes one pointer.
        let result = unsafe { (self.driver.allocate_host)(&raw mut pointer, bytes.max(16), 0) };
        self.check(result, &format!("page-locking {bytes} bytes of the host's memory"))?;
        // SAFETY: the allocation is of at least this size.
        unsafe { std::ptr::write_bytes(pointer.cast::<u8>(), 0, bytes) };
        Ok(Pinned { device: Arc::clone(self), pointer: pointer.cast(), bytes })
    }
}

/// Whose kernels a chip of this compute capability takes: from 9.0 on its own, if there are such, else those of 8.0, which the driver translates.
fn with_kernels(capability: u32) -> u32 {
    match capability {
        ..90 | 90 | 100 | 103 | 120 => capability,
        _ => 80,
    }
}

/// Multiprocessors of one of the smaller chips of a generation (A100, RTX 3090, RTX 4070 Ti SUPER), and bytes of shared memory that a block can
/// have there (CUDA C++ Programming Guide, technical specifications per compute capability).
fn size_of_generation(capability: u32) -> (usize, usize) {
    match capability {
        86 => (82, 99 << 10),
        89 => (66, 99 << 10),
        _ => (108, 163 << 10),
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // The context may be another `Device`'s, too.
        if self.bind().is_ok() {
            for &module in &self.modules {
                // SAFETY: loaded once in `load_module`; whoever launches its kernels has this device.
                unsafe { (self.driver.unload_module)(module) };
            }
            if !self.stream.is_null() {
                // SAFETY: created once in `open_with`, used no more.
                unsafe { (self.driver.destroy_stream)(self.stream) };
            }
        }
        // SAFETY: retained once in `open_with`.
        unsafe { (self.driver.release_context)(self.device) };
    }
}

/// Device memory.
pub(crate) struct Buffer {
    device: Arc<Device>,
    address: Address,
    bytes: usize,
}

impl Buffer {
    pub(crate) fn address(&self) -> Address {
        self.address
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Zeroes `bytes` at `offset`, when the stream comes to it.
    pub(crate) fn zero(&self, offset: usize, bytes: usize) -> Result<(), Error> {
        assert!(offset + bytes <= self.bytes);
        let (device, to) = (&self.device, self.address + offset as u64);
        // SAFETY: the range lies in this buffer.
        let result = unsafe { (device.driver.fill)(to, 0, bytes, device.stream) };
        device.check(result, "zeroing device memory")
    }

    /// Copies the first `bytes` of `from` to `offset`, when the stream comes to it.
    pub(crate) fn upload(&self, offset: usize, from: &Pinned, bytes: usize) -> Result<(), Error> {
        assert!(offset + bytes <= self.bytes && bytes <= from.bytes);
        let (device, to) = (&self.device, self.address + offset as u64);
        // SAFETY: both ranges lie in their allocations; `from` is page-locked and is not changed before the stream has been
        // waited for, which its users see to.
        let result = unsafe { (device.driver.upload)(to, from.pointer.cast(), bytes, device.stream) };
        device.check(result, "copying to the GPU")
    }

    /// Copies the first `bytes` of `from` to the start at once, whatever the stream is at.
    pub(crate) fn upload_now(&self, from: &Pinned, bytes: usize) -> Result<(), Error> {
        assert!(bytes <= self.bytes && bytes <= from.bytes);
        // SAFETY: both ranges lie in their allocations; from page-locked memory the driver returns when the copy is done. What is on the
        // stream does not look at this buffer, which its users see to.
        let result = unsafe { (self.device.driver.upload_now)(self.address, from.pointer.cast(), bytes) };
        self.device.check(result, "copying to the GPU")
    }

    /// Copies `bytes` at `offset` to the start of `to`, when the stream comes to it.
    pub(crate) fn download(&self, offset: usize, to: &mut Pinned, bytes: usize) -> Result<(), Error> {
        assert!(offset + bytes <= self.bytes);
        // SAFETY: the range lies in this buffer.
        unsafe { self.device.download(self.address + offset as u64, to, bytes) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: allocated in `buffer`, freed once; the driver waits for kernels that use it.
            unsafe { (self.device.driver.free)(self.address) };
        }
    }
}

/// Page-locked memory of the host, which all GPUs can read and write.
pub(crate) struct Pinned {
    device: Arc<Device>,
    pointer: *mut u8,
    bytes: usize,
}

// SAFETY: the memory belongs to this value alone.
unsafe impl Send for Pinned {}

impl Pinned {
    /// Where the device finds it: such memory has one address for all.
    pub(crate) fn address(&self) -> Address {
        self.pointer as Address
    }

    /// The memory as numbers.
    pub(crate) fn slice<T: bytemuck::Pod>(&self) -> &[T] {
        // SAFETY: allocated with this length, aligned to a page, initialized to zeros, any bits are a value of `T`.
        unsafe { std::slice::from_raw_parts(self.pointer.cast(), self.bytes / size_of::<T>()) }
    }

    /// The memory as numbers.
    pub(crate) fn slice_mut<T: bytemuck::Pod>(&mut self) -> &mut [T] {
        // SAFETY: as in `slice`, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.cast(), self.bytes / size_of::<T>()) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: allocated in `pinned`, freed once.
            unsafe { (self.device.driver.free_host)(self.pointer.cast()) };
        }
    }
}

/// A mark on a stream.
pub(crate) struct Event {
    driver: &'static Driver,
    handle: Handle,
}

// SAFETY: the handle is the name of an object that the driver guards.
unsafe impl Send for Event {}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: created once in `event`, destroyed once; the driver waits for its last record by itself.
        unsafe { (self.driver.destroy_event)(self.handle) };
    }
}

/// Recorded work.
pub(crate) struct Graph {
    device: Arc<Device>,
    executable: Handle,
}

// SAFETY: used by one thread at a time, as `Backend::step` takes `&mut self`.
unsafe impl Send for Graph {}

impl Graph {
    /// Puts the work on the stream.
    pub(crate) fn launch(&self) -> Result<(), Error> {
        // SAFETY: both handles are live.
        let result = unsafe { (self.device.driver.launch_graph)(self.executable, self.device.stream) };
        self.device.check(result, "starting a graph")
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: instantiated once, destroyed once.
            unsafe { (self.device.driver.destroy_executable)(self.executable) };
        }
    }
}
