//! The CPU backend: kernels per instruction set chosen at run time, the thread pool, and the packed layouts of a loaded model.
//!
//! Every kernel is written once over sixteen lanes and compiled for AVX-512 with and without VBMI, AVX2 with and without AVX-VNNI, and
//! scalar code; AMX has its own for BF16. Sums have a fixed order, so all give the same bits, whatever the batch and the number of
//! threads.

#[cfg(target_arch = "x86_64")]
mod amx;
mod attention;
mod backend;
mod bandwidth;
mod dense;
mod kernels;
mod nodes;
mod packed;
mod packed_file;
#[cfg(target_arch = "x86_64")]
mod pairs;
mod panels;
mod pool;
mod products;
mod records;
mod simd;

pub use attention::CacheFormat;
pub use backend::{Cpu, Options, Timing};
pub use bandwidth::read_bandwidth;
pub use dense::{Rows, Update, products};
pub use kernels::{Isa, SelfTest, self_test, wrong_kernel};
pub use pool::{Pool, physical_cores};
pub use records::Activations;
