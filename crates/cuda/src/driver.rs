//! The few functions of NVIDIA's driver that we call, looked up in `libcuda.so.1` when first needed.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

use gptoss::Error;

/// Opaque handles of the driver; all are pointers.
pub(crate) type Handle = *mut c_void;

/// An address in device memory.
pub(crate) type Address = u64;

macro_rules! driver {
    ($($(#[$doc:meta])* $name:ident = $symbol:literal ($($argument:ident: $kind:ty),*);)*) => {
        /// The driver's entry points. Each returns 0 or an error's number.
        pub(crate) struct Driver {
            $($(#[$doc])* pub(crate) $name: unsafe extern "C" fn($($argument: $kind),*) -> c_int,)*
        }

        impl Driver {
            fn open() -> Result<Driver, Error> {
                // SAFETY: the name is a C string; the library's initializers are the driver vendor's.
                let library = unsafe { libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
                if library.is_null() {
                    return Err(Error::NoDevice("there is no NVIDIA driver (libcuda.so.1)".to_owned()));
                }
                Ok(Driver {
                    $($name: {
                        let name: &CStr = $symbol;
                        // SAFETY: the library stays open for good; the name is a C string.
                        let symbol = unsafe { libc::dlsym(library, name.as_ptr()) };
                        if symbol.is_null() {
                            return Err(Error::Device(format!("the NVIDIA driver is too old: it has no {}", name.to_string_lossy())));
                        }
                        // SAFETY: the driver's interface gives this symbol exactly this type; a pointer and a function
                        // pointer have one size here.
                        unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($kind),*) -> c_int>(symbol) }
                    },)*
                })
            }
        }
    };
}

driver! {
    init = c"cuInit" (flags: c_uint);
    error_string = c"cuGetErrorString" (error: c_int, text: *mut *const c_char);
    device_count = c"cuDeviceGetCount" (count: *mut c_int);
    device = c"cuDeviceGet" (device: *mut c_int, ordinal: c_int);
    device_name = c"cuDeviceGetName" (name: *mut c_char, len: c_int, device: c_int);
    device_attribute = c"cuDeviceGetAttribute" (value: *mut c_int, attribute: c_int, device: c_int);
    retain_context = c"cuDevicePrimaryCtxRetain" (context: *mut Handle, device: c_int);
    release_context = c"cuDevicePrimaryCtxRelease_v2" (device: c_int);
    can_access_peer = c"cuDeviceCanAccessPeer" (can: *mut c_int, device: c_int, peer: c_int);
    enable_peer_access = c"cuCtxEnablePeerAccess" (peer: Handle, flags: c_uint);
    set_context = c"cuCtxSetCurrent" (context: Handle);
    memory_info = c"cuMemGetInfo_v2" (free: *mut usize, total: *mut usize);
    allocate = c"cuMemAlloc_v2" (address: *mut Address, bytes: usize);
    free = c"cuMemFree_v2" (address: Address);
    allocate_host = c"cuMemHostAlloc" (pointer: *mut *mut c_void, bytes: usize, flags: c_uint);
    free_host = c"cuMemFreeHost" (pointer: *mut c_void);
    upload = c"cuMemcpyHtoDAsync_v2" (to: Address, from: *const c_void, bytes: usize, stream: Handle);
    upload_now = c"cuMemcpyHtoD_v2" (to: Address, from: *const c_void, bytes: usize);
    download = c"cuMemcpyDtoHAsync_v2" (to: *mut c_void, from: Address, bytes: usize, stream: Handle);
    fill = c"cuMemsetD8Async" (address: Address, byte: u8, bytes: usize, stream: Handle);
    load_module = c"cuModuleLoadData" (module: *mut Handle, image: *const c_void);
    unload_module = c"cuModuleUnload" (module: Handle);
    function = c"cuModuleGetFunction" (function: *mut Handle, module: Handle, name: *const c_char);
    read_function_attribute = c"cuFuncGetAttribute" (value: *mut c_int, attribute: c_int, function: Handle);
    function_attribute = c"cuFuncSetAttribute" (function: Handle, attribute: c_int, value: c_int);
    launch = c"cuLaunchKernelEx" (config: *const LaunchConfig, function: Handle, params: *mut *mut c_void, extra: *mut *mut c_void);
    create_stream = c"cuStreamCreate" (stream: *mut Handle, flags: c_uint);
    destroy_stream = c"cuStreamDestroy_v2" (stream: Handle);
    synchronize = c"cuStreamSynchronize" (stream: Handle);
    begin_capture = c"cuStreamBeginCapture_v2" (stream: Handle, mode: c_int);
    end_capture = c"cuStreamEndCapture" (stream: Handle, graph: *mut Handle);
    instantiate = c"cuGraphInstantiateWithFlags" (executable: *mut Handle, graph: Handle, flags: u64);
    launch_graph = c"cuGraphLaunch" (executable: Handle, stream: Handle);
    destroy_graph = c"cuGraphDestroy" (graph: Handle);
    destroy_executable = c"cuGraphExecDestroy" (executable: Handle);
    create_event = c"cuEventCreate" (event: *mut Handle, flags: c_uint);
    destroy_event = c"cuEventDestroy_v2" (event: Handle);
    record_event = c"cuEventRecord" (event: Handle, stream: Handle);
    wait_event = c"cuEventSynchronize" (event: Handle);
    elapsed = c"cuEventElapsedTime" (milliseconds: *mut f32, start: Handle, end: Handle);
}

/// `CUlaunchConfig`
#[repr(C)]
pub(crate) struct LaunchConfig {
    pub(crate) grid: [c_uint; 3],
    pub(crate) block: [c_uint; 3],
    pub(crate) shared_bytes: c_uint,
    pub(crate) stream: Handle,
    pub(crate) attributes: *const LaunchAttribute,
    pub(crate) attribute_count: c_uint,
}

/// `CUlaunchAttribute`
#[repr(C)]
pub(crate) struct LaunchAttribute {
    id: c_uint,
    padding: c_uint,
    value: [u64; 8],
}

impl LaunchAttribute {
    /// The kernel may begin before the one before it on the stream ends (`CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION`).
    pub(crate) const DEPENDENT: LaunchAttribute =
        LaunchAttribute { id: 6, padding: 0, value: [1, 0, 0, 0, 0, 0, 0, 0] };

    /// So many blocks along y are a cluster (`CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION`, three 32-bit numbers).
    pub(crate) fn cluster(blocks: u32) -> LaunchAttribute {
        LaunchAttribute { id: 4, padding: 0, value: [1 | u64::from(blocks) << 32, 1, 0, 0, 0, 0, 0, 0] }
    }
}

const _: () = assert!(size_of::<LaunchConfig>() == 56 && size_of::<LaunchAttribute>() == 72);

/// The driver, opened and initialized on the first call that finds a GPU.
pub(crate) fn driver() -> Result<&'static Driver, Error> {
    static DRIVER: OnceLock<Driver> = OnceLock::new();
    if let Some(driver) = DRIVER.get() {
        return Ok(driver);
    }
    let driver = Driver::open()?;
    // SAFETY: the first call of the interface, with the only legal flag.
    match unsafe { (driver.init)(0) } {
        0 => Ok(DRIVER.get_or_init(|| driver)),
        NO_DEVICE => Err(Error::NoDevice("the NVIDIA driver has no GPU".to_owned())),
        error => Err(Error::Device(format!("the NVIDIA driver does not start: {}", driver.describe(error)))),
    }
}

/// Results of the driver.
pub(crate) const OUT_OF_MEMORY: c_int = 2;
const NO_DEVICE: c_int = 100;

impl Driver {
    /// An error for a result other than 0; `what` was attempted.
    pub(crate) fn check(&self, result: c_int, what: &str) -> Result<(), Error> {
        if result == 0 {
            return Ok(());
        }
        Err(Error::Device(format!("{what}: {}", self.describe(result))))
    }

    fn describe(&self, error: c_int) -> String {
        let mut text = std::ptr::null();
        // SAFETY: the driver writes a pointer to one of its constant strings, or leaves null.
        if unsafe { (self.error_string)(error, &raw mut text) } != 0 || text.is_null() {
            return format!("CUDA error {error}");
        }
        // SAFETY: not null, so a constant C string of the driver.
        format!("{} (CUDA error {error})", unsafe { CStr::from_ptr(text) }.to_string_lossy())
    }
}
