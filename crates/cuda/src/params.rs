//! The parameter structs of the kernels, field by field as in `kernels/`.

use bytemuck::{Pod, Zeroable};

use crate::driver::Address;

/// `Format` of common.cuh.
pub(crate) const BF16: u32 = 0;
/// `Format` of common.cuh.
pub(crate) const FP4: u32 = 1;

/// `NO_NUMBER` of common.cuh: in place of the id of the largest logit where one is infinite or no number.
pub(crate) const NO_NUMBER: u32 = u32::MAX;

/// The order of activations in rows, as `activation_place` in common.cuh knows it.
pub(crate) const ORDERED: u32 = u32::MAX;

/// `CacheFormat` of common.cuh: the type of keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u32)]
pub enum CacheFormat {
    /// 16 bits.
    #[default]
    Bf16 = 0,
    /// Eight bits, with one scale each for the keys and the values of a layer: those of the checkpoint, or 1.
    E4m3 = 1,
}

/// `RowOrder` of pack.cu.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum RowOrder {
    Plain = 0,
    GateUp = 1,
    Rotary = 2,
}

/// `After` of epilogue.cuh.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum After {
    Store = 0,
    Residual = 1,
    Qkv = 2,
    Swiglu = 3,
}

macro_rules! params {
    ($($(#[$doc:meta])* $name:ident, $bytes:literal { $($field:ident: $kind:ty,)* })*) => {
        $(
            $(#[$doc])*
            #[derive(Debug, Clone, Copy, Zeroable, Pod)]
            #[repr(C)]
            pub(crate) struct $name { $(pub(crate) $field: $kind,)* }
            const _: () = assert!(size_of::<$name>() == $bytes);
        )*
    };
}

params! {
    /// pack.cu
    Pack, 56 {
        values: Address, scales: Address, weights: Address, packed_scales: Address,
        rows: u32, cols: u32, order: u32, block: u32, reference: u32, padding: u32,
    }
    /// epilogue.cuh
    Matrix, 40 {
        weights: Address, scales: Address, tile_scale: Address, bias: Address, rows: u32, cols: u32,
    }
    /// epilogue.cuh
    Epilogue, 80 {
        out: Address, out16: Address, keys: Address, values: Address, rotary: Address,
        slots: Address,
        kind: u32, query_heads: u32, kv_heads: u32, out_cols: u32, out_stack: u32, out_format: u32,
        limit: f32, alpha: f32,
    }
    /// product.cuh
    Product, 152 {
        matrix: Matrix, input: Address, list: Address, epilogue: Epilogue,
        n: u32, experts: u32, experts_per_token: u32, padding: u32,
    }
    /// product_few_sm90.cu
    Dense, 136 {
        matrix: Matrix, input: Address, epilogue: Epilogue, n: u32, padding: u32,
    }
    /// one.cuh
    One, 336 {
        matrix: Matrix, down: Matrix, norm_scale: Address, input: Address, residual: Address, whole: Address, awaited: Address,
        scaled: Address, router: Address, router_bias: Address, router_parts: Address, shares: Address, exchange: Address, rounds: Address,
        best: Address, arrivals: Address, largest: Address, told: Address, epilogue: Epilogue,
        hidden: u32, part_count: u32, experts: u32, experts_per_token: u32, groups: u32, early: u32, late_groups: u32, share_warps: u32,
        eps: f32, stack: u32, awaited_count: u32, busy: u32,
    }
    /// one.cuh
    Together, 152 {
        shares: [Address; 8], projected: [Address; 8], read: Address, rank: u32, ranks: u32, share_words: u32, padding: u32,
    }
    /// one.cuh
    SharedOne, 488 {
        one: One, together: Together,
    }
    /// shared.cuh
    Peers, 80 {
        received: [Address; 8], rank: u32, ranks: u32, stride: u32, divided: u16, by_host: u16,
    }
    /// all_reduce.cu
    AllReduce, 104 {
        peers: Peers, added: Address, residual: Address, vectors: u32, padding: u32,
    }
    /// gemm_sm90.cu
    Gemm, 160 {
        matrix: Matrix, input: Address, list: Address, epilogue: Epilogue,
        n: u32, stack: u32, tile: u32, experts: u32, experts_per_token: u32, tokens_first: u32,
    }
    /// product_some_sm90.cu
    Exchanged, 200 {
        matrix: Matrix, input: Address, epilogue: Epilogue, parts: Address, arrivals: Address, best: Address, largest: Address,
        told: Address, bests: Address, n: u32, stack: u32, first: u32, all: u32, rank: u32, ranks: u32,
    }
    /// experts.cuh
    Part, 128 {
        matrix: Matrix, epilogue: Epilogue, input: Address,
    }
    /// experts_few.cuh
    Few, 304 {
        parts: [Part; 2], list: Address, logits: Address, rounds: Address,
        n: u32, experts: u32, experts_per_token: u32, tokens: u32, room: u32, early: u32,
    }
    /// experts_streamed_sm90.cu
    Streamed, 288 {
        parts: [Part; 2], list: Address, done: Address, n: u32, experts: u32, experts_per_token: u32, stack: u32,
    }
    /// quantize.cu
    Quantize, 40 {
        input: Address, codes: Address, scales: Address, n: u32, cols: u32, format: u32, input_scale: f32,
    }
    /// fp4.cuh
    Fp4Gemm, 160 {
        matrix: Matrix, input: Address, input_scales: Address, list: Address, epilogue: Epilogue,
        n: u32, experts: u32, experts_per_token: u32, padding: u32,
    }
    /// attention.cuh
    Attention, 160 {
        queries: Address, keys: Address, values: Address, sinks: Address,
        positions: Address, sequences: Address, table_starts: Address, table: Address, tiles: Address,
        fresh: Address, out: Address, partial: Address, arrivals: Address,
        query_heads: u32, kv_heads: u32, window: u32, out_format: u32, out_stack: u32, splits: u32, key_scale: f32, value_scale: f32,
        n: u32, warps: u32, ahead: u32, rows: u32, shared_from: u32, padding: u32,
    }
    /// stream.cu
    Embed, 120 {
        values: Address, scales: Address, tokens: Address, positions: Address, frequencies: Address,
        residual: Address, rotary: Address,
        sequences: Address, full_starts: Address, sliding_starts: Address, table: Address, slots: Address,
        hidden: u32, n: u32, block: u32, global_scale: f32, concentration: f32, vocabulary: u32,
    }
    /// stream.cu
    Keep, 48 {
        residual: Address, rotary: Address, slots: Address, rows: Address,
        tokens: u32, n: u32, residual_vectors: u32, rotary_vectors: u32,
    }
    /// stream.cu
    Norm, 80 {
        residual: Address, experts: Address, routes: Address, rows: Address, scale: Address, out: Address,
        hidden: u32, cols: u32, n: u32, experts_count: u32, experts_per_token: u32, format: u32, stack: u32, eps: f32,
    }
    /// stream.cu
    SharedNorm, 160 {
        norm: Norm, peers: Peers,
    }
    /// stream.cu
    Router, 104 {
        residual: Address, norm_scale: Address, weights: Address, bias: Address, out: Address, logits: Address,
        routes: Address, arrivals: Address,
        hidden: u32, cols: u32, n: u32, experts: u32, experts_per_token: u32, format: u32, eps: f32, shares: u32, stack: u32, padding: u32,
    }
    /// router_gather.cuh
    RouterGather, 96 {
        residual: Address, norm_scale: Address, weights: Address, bias: Address, out: Address, routes: Address, barrier: Address,
        counts: Address,
        hidden: u32, n: u32, experts: u32, experts_per_token: u32, format: u32, stack: u32, eps: f32, each: u32,
    }
    /// stream.cu
    Gather, 48 {
        input: Address, routes: Address, out: Address,
        cols: u32, n: u32, experts: u32, experts_per_token: u32, stack: u32, padding: u32,
    }
    /// stream.cu
    Largest, 48 {
        logits: Address, partial: Address, arrivals: Address, out: Address, told: Address, vocabulary: u32, padding: u32,
    }
    /// sampling.cu
    Job, 128 {
        logits: Address, source: Address, largest: Address, mask: Address, biases: Address, seen: Address, ids: Address,
        random: u64,
        mask_words: u32, bias_count: u32, seen_count: u32, id_count: u32,
        repetition: f32, frequency: f32, presence: f32, temperature: f32, min_p: f32, top_p: f32,
        top_k: u32, top: u32, out: u32, token: u32, token_from: u32, kind: u32,
    }
    /// sampling.cu
    Samples, 64 {
        jobs: Address, best: Address, sums: Address, bins: Address, progress: Address, candidates: Address, out: Address,
        vocabulary: u32, padding: u32,
    }
    /// sampling.cu
    Record, 32 {
        token: u32, failed: u32, above: u32, largest: f32, sum: u64, own: f32, count: u32,
    }
    /// stream.cu
    Read, 24 {
        from: Address, out: Address, vectors: u64,
    }
}
