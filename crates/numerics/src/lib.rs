//! Number formats of four-bit weights: E2M1, E4M3, E8M0, BF16, and NVFP4 and MXFP4 blocks.
