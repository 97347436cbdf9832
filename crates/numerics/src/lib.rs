//! Number formats of four-bit weights: E2M1, E4M3, E8M0, and NVFP4 and MXFP4 blocks, bit for bit.
//!
//! All arithmetic is IEEE binary32 with one rounding per written operation and no fused multiply-add, so that
//! scale bytes and codes equal those of NVIDIA Model Optimizer. Blocks run along the input dimension of a matrix;
//! two codes share a byte, the even element in the low nibble.
#![forbid(unsafe_code)]

pub mod e2m1;
pub mod e4m3;
pub mod e8m0;
pub mod mxfp4;
pub mod nvfp4;
