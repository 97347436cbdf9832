//! The NVIDIA backend: own kernels embedded as machine code, needing nothing at run time but the driver.
//!
//! The residual stream is f32. Products take 16-bit activations: BF16 with BF16 weights, FP16 with four-bit weights, which
//! FP16 holds exactly together with their block scale; sums are f32. Keys and values are stored in BF16, or in E4M3.

mod ahead;
mod arena;
mod attention;
mod backend;
mod batch;
mod device;
mod driver;
mod experts;
mod fp4;
#[cfg(test)]
mod fp4_emulation;
#[cfg_attr(not(test), allow(dead_code, reason = "the kernels take from it what Rust does not"))]
mod fp4_layout;
mod one;
mod packed;
mod params;
mod products;
mod router;
mod sampling;
mod self_test;
mod shared;

pub use backend::{Cuda, Options};
pub use device::{Device, KernelTime, device_count};
pub use fp4::{fp4_self_test, quantize_activations};
pub use params::CacheFormat;
pub use self_test::{SelfTest, self_test};
