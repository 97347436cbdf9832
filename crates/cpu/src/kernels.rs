//! The kernels, written once over [`Lanes`], and the table of them for each instruction set.
//!
//! A matrix is packed in panels of eight rows, a panel in tiles of sixteen columns (`packed.rs`). One kernel serves every
//! batch: it decodes a row of a tile to a register and multiplies it with one to three tokens. A panel of four-bit
//! weights fits the first-level cache, so longer batches decode it again rather than spill it.

#[cfg(target_arch = "x86_64")]
use crate::simd::{Avx2, Avx512};
use crate::simd::{LANES, Lanes, Scalar};

/// Rows of a panel.
pub(crate) const ROWS: usize = 8;

/// Tokens that one call of a panel kernel takes.
pub(crate) const TOKENS: usize = 3;

/// Columns of a panel times eight rows, before the global scale: `[token][row]`.
pub(crate) type PanelSums = [[f32; ROWS]; TOKENS];

/// Weights of one panel.
#[derive(Clone, Copy)]
pub(crate) struct Panel {
    /// Tiles: E2M1 codes (64 bytes each) or BF16 (eight rows of sixteen).
    pub(crate) values: *const u8,
    /// Eight scales per tile (NVFP4) or per two tiles (MXFP4).
    pub(crate) scales: *const u8,
    /// Tiles in the panel.
    pub(crate) tiles: usize,
}

/// # Safety
/// The CPU has the table's instruction set; `panel` is valid for its tiles; each of the first `tokens` (1 to
/// [`TOKENS`]) pointers of `x` is valid for `16 · tiles` values.
pub(crate) type PanelKernel =
    unsafe fn(panel: Panel, x: [*const f32; TOKENS], tokens: usize, sums: &mut PanelSums);

/// Eight rows times three rows of f32: `sums[j][i] = Σ a[i][k] · b[j][k]`.
///
/// # Safety
/// The CPU has the table's instruction set; every pointer is valid for `16 · tiles` values.
pub(crate) type DenseKernel =
    unsafe fn(a: [*const f32; ROWS], b: [*const f32; TOKENS], tiles: usize, sums: &mut PanelSums);

/// The queries of one token that share a key/value head, and where its keys and values lie.
pub(crate) struct Attend<'a> {
    /// `[group, head size]`, already divided by the square root of the head size.
    pub(crate) queries: &'a [f32],
    /// One per query of the group.
    pub(crate) sinks: &'a [f32],
    /// Keys of block `b` for this head at `keys[b · stride ..]`: `[head size, 16]`.
    pub(crate) keys: &'a [f32],
    /// Values of block `b` likewise: `[16, head size]`.
    pub(crate) values: &'a [f32],
    /// Elements between blocks.
    pub(crate) stride: usize,
    /// The sequence's block table.
    pub(crate) blocks: &'a [u32],
    /// Visible positions: `first ..= last`.
    pub(crate) first: usize,
    /// The query's own position.
    pub(crate) last: usize,
}

/// The kernels of one instruction set.
pub(crate) struct Kernels {
    pub(crate) isa: Isa,
    pub(crate) nvfp4: PanelKernel,
    pub(crate) mxfp4: PanelKernel,
    pub(crate) bf16: PanelKernel,
    pub(crate) dense: DenseKernel,
    /// # Safety
    /// The CPU has the instruction set.
    pub(crate) attend: unsafe fn(&Attend<'_>, scores: &mut Vec<f32>, out: &mut [f32]),
    /// # Safety
    /// The CPU has the instruction set; the three slices have the same length, a multiple of 16.
    pub(crate) rms_norm: unsafe fn(x: &[f32], scale: &[f32], epsilon: f32, out: &mut [f32]),
    /// # Safety
    /// The CPU has the instruction set; `z` is twice as long as `out`.
    pub(crate) swiglu: unsafe fn(z: &[f32], limit: f32, alpha: f32, out: &mut [f32]),
}

/// An instruction set that kernels exist for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Plain code.
    Scalar,
    /// AVX2 and FMA.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
}

impl Isa {
    /// Every instruction set, the slowest first.
    pub const ALL: [Isa; 3] = [Isa::Scalar, Isa::Avx2, Isa::Avx512];

    /// Whether this CPU has it.
    pub fn is_available(self) -> bool {
        match self {
            Isa::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }

    /// The best one that this CPU has.
    pub fn best() -> Isa {
        Isa::ALL.into_iter().rev().find(|isa| isa.is_available()).unwrap_or(Isa::Scalar)
    }

    /// The name for people.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "AVX2",
            Isa::Avx512 => "AVX-512",
        }
    }

    /// The kernels, if this CPU can run them.
    pub(crate) fn kernels(self) -> Option<&'static Kernels> {
        let kernels = match self {
            Isa::Scalar => &scalar::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => &avx2::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => &avx512::KERNELS,
            #[cfg(not(target_arch = "x86_64"))]
            _ => return None,
        };
        self.is_available().then_some(kernels)
    }
}

/// Compiles every kernel for one instruction set. `$one` rows are kept in registers at a time for a single token, `$more`
/// for two or three: as many as there are registers for.
macro_rules! instantiate {
    ($module:ident, $isa:expr, $lanes:ty, $one:literal, $more:literal $(, $features:literal)?) => {
        mod $module {
            use super::*;

            pub(super) const KERNELS: Kernels =
                Kernels { isa: $isa, nvfp4, mxfp4, bf16, dense, attend, rms_norm, swiglu };

            // SAFETY (of the calls below): the caller's obligations are handed on unchanged; the features that the lanes
            // need are enabled here.
            $(#[target_feature(enable = $features)])?
            unsafe fn nvfp4(panel: Panel, x: [*const f32; TOKENS], tokens: usize, sums: &mut PanelSums) {
                // SAFETY: as stated above.
                unsafe {
                    match tokens {
                        1 => e2m1_panel::<$lanes, false, $one, 1>(panel, x, sums),
                        2 => e2m1_panel::<$lanes, false, $more, 2>(panel, x, sums),
                        _ => e2m1_panel::<$lanes, false, $more, 3>(panel, x, sums),
                    }
                }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn mxfp4(panel: Panel, x: [*const f32; TOKENS], tokens: usize, sums: &mut PanelSums) {
                // SAFETY: as stated above.
                unsafe {
                    match tokens {
                        1 => e2m1_panel::<$lanes, true, $one, 1>(panel, x, sums),
                        2 => e2m1_panel::<$lanes, true, $more, 2>(panel, x, sums),
                        _ => e2m1_panel::<$lanes, true, $more, 3>(panel, x, sums),
                    }
                }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn bf16(panel: Panel, x: [*const f32; TOKENS], tokens: usize, sums: &mut PanelSums) {
                // SAFETY: as stated above.
                unsafe {
                    match tokens {
                        1 => bf16_panel::<$lanes, $one, 1>(panel, x, sums),
                        2 => bf16_panel::<$lanes, $more, 2>(panel, x, sums),
                        _ => bf16_panel::<$lanes, $more, 3>(panel, x, sums),
                    }
                }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn dense(a: [*const f32; ROWS], b: [*const f32; TOKENS], tiles: usize, sums: &mut PanelSums) {
                // SAFETY: as stated above.
                unsafe { dense_panel::<$lanes, $more>(a, b, tiles, sums) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn attend(job: &Attend<'_>, scores: &mut Vec<f32>, out: &mut [f32]) {
                // SAFETY: as stated above.
                unsafe { super::attend::<$lanes>(job, scores, out) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn rms_norm(x: &[f32], scale: &[f32], epsilon: f32, out: &mut [f32]) {
                // SAFETY: as stated above.
                unsafe { super::rms_norm::<$lanes>(x, scale, epsilon, out) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn swiglu(z: &[f32], limit: f32, alpha: f32, out: &mut [f32]) {
                // SAFETY: as stated above.
                unsafe { super::swiglu::<$lanes>(z, limit, alpha, out) }
            }
        }
    };
}

instantiate!(scalar, Isa::Scalar, Scalar, 4, 2);
#[cfg(target_arch = "x86_64")]
instantiate!(avx2, Isa::Avx2, Avx2, 4, 2, "avx,avx2,fma");
#[cfg(target_arch = "x86_64")]
instantiate!(avx512, Isa::Avx512, Avx512, 8, 8, "avx,avx2,fma,avx512f,avx512bw,avx512dq,avx512vl");

/// Sums over one panel of E2M1 codes: lane `l` of a row adds up the columns `l`, `l + 16`, … in order, then the lanes are
/// added as in [`Lanes::sum`]. Code times scale is exact.
#[inline(always)]
unsafe fn e2m1_panel<L: Lanes, const MX: bool, const R: usize, const T: usize>(
    panel: Panel,
    x: [*const f32; TOKENS],
    sums: &mut PanelSums,
) {
    // SAFETY: the contract of `PanelKernel`: `panel` and `x` are valid for all tiles.
    unsafe {
        for first in (0..ROWS).step_by(R) {
            let mut acc = [[L::splat(0.0); R]; T];
            for tile in 0..panel.tiles {
                let mut codes = L::load_codes(panel.values.add(tile * ROWS * LANES / 2));
                if first > 0 {
                    codes = L::skip_rows(codes, first as i32);
                }
                let at = if MX { tile / 2 } else { tile };
                let scales = panel.scales.add(at * ROWS);
                let scales = if MX { L::e8m0(scales) } else { L::e4m3(scales) };
                let x: [L; T] = std::array::from_fn(|t| L::load(x[t].add(tile * LANES)));
                for r in 0..R {
                    let weight = L::e2m1(codes).mul(L::splat(scales[first + r]));
                    for t in 0..T {
                        acc[t][r] = weight.fma(x[t], acc[t][r]);
                    }
                    if r + 1 < R {
                        codes = L::skip_rows(codes, 1);
                    }
                }
            }
            for t in 0..T {
                for r in 0..R {
                    sums[t][first + r] = acc[t][r].sum();
                }
            }
        }
    }
}

/// Sums over one panel of BF16 values, in the same order.
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "rows and tokens index several arrays at once")]
unsafe fn bf16_panel<L: Lanes, const R: usize, const T: usize>(
    panel: Panel,
    x: [*const f32; TOKENS],
    sums: &mut PanelSums,
) {
    // SAFETY: the contract of `PanelKernel`: `panel` and `x` are valid for all tiles.
    unsafe {
        let values = panel.values.cast::<u16>();
        for first in (0..ROWS).step_by(R) {
            let mut acc = [[L::splat(0.0); R]; T];
            for tile in 0..panel.tiles {
                let x: [L; T] = std::array::from_fn(|t| L::load(x[t].add(tile * LANES)));
                for r in 0..R {
                    let weight = L::load_bf16(values.add((tile * ROWS + first + r) * LANES));
                    for t in 0..T {
                        acc[t][r] = weight.fma(x[t], acc[t][r]);
                    }
                }
            }
            for t in 0..T {
                for r in 0..R {
                    sums[t][first + r] = acc[t][r].sum();
                }
            }
        }
    }
}

/// Products of eight rows with three, each a sum in the order of [`bf16_panel`].
#[inline(always)]
unsafe fn dense_panel<L: Lanes, const R: usize>(
    a: [*const f32; ROWS],
    b: [*const f32; TOKENS],
    tiles: usize,
    sums: &mut PanelSums,
) {
    // SAFETY: the contract of `DenseKernel`: all pointers are valid for all tiles.
    unsafe {
        for first in (0..ROWS).step_by(R) {
            let mut acc = [[L::splat(0.0); R]; TOKENS];
            for tile in 0..tiles {
                let b: [L; TOKENS] = std::array::from_fn(|t| L::load(b[t].add(tile * LANES)));
                for r in 0..R {
                    let a = L::load(a[first + r].add(tile * LANES));
                    for t in 0..TOKENS {
                        acc[t][r] = a.fma(b[t], acc[t][r]);
                    }
                }
            }
            for t in 0..TOKENS {
                for r in 0..R {
                    sums[t][first + r] = acc[t][r].sum();
                }
            }
        }
    }
}

/// Attention of one token's query group over its visible positions, with the sink in the denominator.
///
/// Lanes are the sixteen positions of a block, so a score is a sum over the head in order, and probabilities are added up by
/// position modulo 16: neither depends on how the prompt was cut.
#[inline(always)]
unsafe fn attend<L: Lanes>(job: &Attend<'_>, scores: &mut Vec<f32>, out: &mut [f32]) {
    let size = job.queries.len() / job.sinks.len();
    let blocks = job.first / LANES..job.last / LANES + 1;
    scores.clear();
    scores.resize(blocks.len() * LANES, f32::NEG_INFINITY);
    let queries = job.queries.chunks_exact(size).zip(job.sinks).zip(out.chunks_exact_mut(size));
    for ((query, &sink), out) in queries {
        // SAFETY: the caller vouches for the features; all pointers come from slices that are indexed first.
        unsafe {
            let mut max = L::splat(sink);
            for (i, scores) in scores.chunks_exact_mut(LANES).enumerate() {
                let block = job.blocks[blocks.start + i] as usize;
                let keys = &job.keys[block * job.stride..][..size * LANES];
                // Four chains, for the latency of the multiply-add.
                let mut acc = [L::splat(0.0); 4];
                for (e, (&q, keys)) in query.iter().zip(keys.chunks_exact(LANES)).enumerate() {
                    acc[e % 4] = L::splat(q).fma(L::load(keys.as_ptr()), acc[e % 4]);
                }
                acc[0].add(acc[1]).add(acc[2].add(acc[3])).store(scores.as_mut_ptr());
                let base = (blocks.start + i) * LANES;
                if base < job.first || base + LANES - 1 > job.last {
                    for (lane, score) in scores.iter_mut().enumerate() {
                        if !(job.first..=job.last).contains(&(base + lane)) {
                            *score = f32::NEG_INFINITY;
                        }
                    }
                }
                max = max.max(L::load(scores.as_ptr()));
            }
            let mut lanes = [0.0f32; LANES];
            max.store(lanes.as_mut_ptr());
            let max = lanes.iter().copied().fold(f32::NEG_INFINITY, f32::max);

            let mut sum = L::splat(0.0);
            for (i, scores) in scores.chunks_exact_mut(LANES).enumerate() {
                let mut p = L::load(scores.as_ptr()).sub(L::splat(max)).exp();
                p.store(scores.as_mut_ptr());
                let base = (blocks.start + i) * LANES;
                if base < job.first || base + LANES - 1 > job.last {
                    for (lane, score) in scores.iter_mut().enumerate() {
                        if !(job.first..=job.last).contains(&(base + lane)) {
                            *score = 0.0;
                        }
                    }
                    p = L::load(scores.as_ptr());
                }
                sum = sum.add(p);
            }
            let inverse = 1.0 / (sum.sum() + L::splat(sink - max).exp().sum() / LANES as f32);

            for at in (0..size).step_by(LANES) {
                let width = LANES.min(size - at);
                let mut acc = L::splat(0.0);
                if width == LANES {
                    for (i, scores) in scores.chunks_exact(LANES).enumerate() {
                        let block = job.blocks[blocks.start + i] as usize;
                        let values = &job.values[block * job.stride..][..size * LANES];
                        for (&p, values) in scores.iter().zip(values.chunks_exact(size)) {
                            acc = L::splat(p).fma(L::load(values[at..at + LANES].as_ptr()), acc);
                        }
                    }
                    acc.mul(L::splat(inverse)).store(out[at..at + LANES].as_mut_ptr());
                } else {
                    for (e, out) in out.iter_mut().enumerate().skip(at) {
                        let mut acc = 0.0f32;
                        for (i, scores) in scores.chunks_exact(LANES).enumerate() {
                            let block = job.blocks[blocks.start + i] as usize;
                            let values = &job.values[block * job.stride..][..size * LANES];
                            for (&p, values) in scores.iter().zip(values.chunks_exact(size)) {
                                acc = p.mul_add(values[e], acc);
                            }
                        }
                        *out = acc * inverse;
                    }
                }
            }
        }
    }
}

/// RMSNorm of one token; the length is a multiple of sixteen.
#[inline(always)]
unsafe fn rms_norm<L: Lanes>(x: &[f32], scale: &[f32], epsilon: f32, out: &mut [f32]) {
    // SAFETY: the caller vouches for the features; chunks are sixteen long.
    unsafe {
        let mut sum = L::splat(0.0);
        for x in x.chunks_exact(LANES) {
            let x = L::load(x.as_ptr());
            sum = x.fma(x, sum);
        }
        let inverse = L::splat(1.0 / (sum.sum() / x.len() as f32 + epsilon).sqrt());
        for ((x, scale), out) in
            x.chunks_exact(LANES).zip(scale.chunks_exact(LANES)).zip(out.chunks_exact_mut(LANES))
        {
            L::load(x.as_ptr()).mul(inverse).mul(L::load(scale.as_ptr())).store(out.as_mut_ptr());
        }
    }
}

/// gpt-oss's clamped SwiGLU over interleaved gate and up.
#[inline(always)]
unsafe fn swiglu<L: Lanes>(z: &[f32], limit: f32, alpha: f32, out: &mut [f32]) {
    for (z, out) in z.chunks(2 * LANES).zip(out.chunks_mut(LANES)) {
        let (mut gate, mut up) = ([0.0f32; LANES], [0.0f32; LANES]);
        for ((pair, gate), up) in z.chunks_exact(2).zip(&mut gate).zip(&mut up) {
            (*gate, *up) = (pair[0], pair[1]);
        }
        let mut y = [0.0f32; LANES];
        // SAFETY: the caller vouches for the features; the arrays hold sixteen values.
        unsafe {
            let gate = L::load(gate.as_ptr()).min(L::splat(limit));
            let up = L::load(up.as_ptr()).min(L::splat(limit)).max(L::splat(-limit));
            let one = L::splat(1.0);
            let sigmoid = one.div(one.add(gate.mul(L::splat(-alpha)).exp()));
            up.add(one).mul(gate).mul(sigmoid).store(y.as_mut_ptr());
        }
        out.copy_from_slice(&y[..out.len()]);
    }
}

/// One kernel family on one instruction set, compared with plain f64 arithmetic.
#[derive(Debug, Clone, PartialEq)]
pub struct SelfTest {
    /// The kernel family.
    pub kernel: &'static str,
    /// The instruction set.
    pub isa: Isa,
    /// The largest error relative to the sum of the magnitudes added up.
    pub error: f64,
    /// Whether the result equals that of the scalar kernel bit for bit.
    pub equals_scalar: bool,
    /// Whether the error is that of f32 arithmetic and the bits agree.
    pub passed: bool,
}

/// Runs every kernel family of `isa` on small cases against plain arithmetic. Empty if this CPU lacks it.
pub fn self_test(isa: Isa) -> Vec<SelfTest> {
    let Some(kernels) = isa.kernels() else { return Vec::new() };
    let families: [(&'static str, cases::Case); 6] = [
        ("nvfp4 product", |k| cases::panel(k.nvfp4, cases::Kind::Nvfp4)),
        ("mxfp4 product", |k| cases::panel(k.mxfp4, cases::Kind::Mxfp4)),
        ("bf16 product", |k| cases::panel(k.bf16, cases::Kind::Bf16)),
        ("attention", cases::attention),
        ("rms norm", cases::norm),
        ("swiglu", cases::activation),
    ];
    families
        .into_iter()
        .map(|(kernel, run)| {
            let (found, expected) = run(kernels);
            let (plain, _) = run(&scalar::KERNELS);
            let scale = expected.iter().fold(1.0f64, |a, e| a.max(e.abs()));
            let error = found
                .iter()
                .zip(&expected)
                .map(|(&f, e)| (f64::from(f) - e).abs() / scale)
                .fold(0.0, |a, b| if b > a || b.is_nan() { b } else { a });
            let equals_scalar = found.len() == plain.len()
                && found.iter().zip(&plain).all(|(a, b)| a.to_bits() == b.to_bits());
            SelfTest { kernel, isa, error, equals_scalar, passed: equals_scalar && error < 2e-6 }
        })
        .collect()
}

/// Small cases with an exact answer.
mod cases {
    use super::*;

    /// What a kernel gave, and what plain arithmetic gives.
    pub(super) type Outcome = (Vec<f32>, Vec<f64>);

    pub(super) type Case = fn(&Kernels) -> Outcome;

    /// Row and column to the value of a weight.
    type Weight = Box<dyn Fn(usize, usize) -> f64>;

    #[derive(Clone, Copy)]
    pub(super) enum Kind {
        Nvfp4,
        Mxfp4,
        Bf16,
    }

    /// Numbers in [-1, 1] that look random.
    fn noise(len: usize, seed: u32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
        (0..len)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 17;
                state ^= state << 5;
                state as i32 as f32 / i32::MAX as f32
            })
            .collect()
    }

    fn bytes(len: usize, seed: u32) -> Vec<u8> {
        noise(len, seed).into_iter().map(|v| ((v + 1.0) * 127.5) as u8).collect()
    }

    pub(super) fn panel(kernel: PanelKernel, kind: Kind) -> Outcome {
        const TILES: usize = 10;
        const COLS: usize = TILES * LANES;
        let (values, scales, weight): (Vec<u8>, Vec<u8>, Weight) = match kind {
            Kind::Bf16 => {
                let values: Vec<u8> = noise(ROWS * COLS, 3)
                    .into_iter()
                    .flat_map(|v| half::bf16::from_f32(v).to_le_bytes())
                    .collect();
                let copy = values.clone();
                let weight = move |row: usize, col: usize| {
                    let at = ((col / LANES * ROWS + row) * LANES + col % LANES) * 2;
                    half::bf16::from_le_bytes([copy[at], copy[at + 1]]).to_f64()
                };
                (values, Vec::new(), Box::new(weight))
            }
            Kind::Nvfp4 | Kind::Mxfp4 => {
                let mx = matches!(kind, Kind::Mxfp4);
                let values = bytes(ROWS * COLS / 2, 5);
                // All E4M3 bytes from the subnormals to large ones, or exponents around 0.
                let scales: Vec<u8> = bytes(TILES * ROWS, 7)
                    .into_iter()
                    .map(|b| if mx { 120 + b % 10 } else { b % 0x60 })
                    .collect();
                let (codes, copy) = (values.clone(), scales.clone());
                let weight = move |row: usize, col: usize| {
                    let (tile, lane) = (col / LANES, col % LANES);
                    let byte = codes[tile * 64 + lane * 4 + row / 2];
                    let scale = if mx {
                        numerics::e8m0::decode(copy[tile / 2 * ROWS + row])
                    } else {
                        numerics::e4m3::decode(copy[tile * ROWS + row])
                    };
                    f64::from(numerics::e2m1::decode(byte >> (4 * (row % 2)))) * f64::from(scale)
                };
                (values, scales, Box::new(weight))
            }
        };
        let x: Vec<Vec<f32>> = (0..TOKENS as u32).map(|t| noise(COLS, 11 + t)).collect();
        let (mut found, mut expected) = (Vec::new(), Vec::new());
        for tokens in 1..=TOKENS {
            let mut sums = [[0.0; ROWS]; TOKENS];
            let panel = Panel { values: values.as_ptr(), scales: scales.as_ptr(), tiles: TILES };
            let pointers = std::array::from_fn(|t| x[t].as_ptr());
            // SAFETY: the table is that of an available instruction set; the buffers hold ten tiles.
            unsafe { kernel(panel, pointers, tokens, &mut sums) };
            for t in 0..tokens {
                found.extend(sums[t]);
                expected
                    .extend((0..ROWS).map(|row| {
                        (0..COLS).map(|col| weight(row, col) * f64::from(x[t][col])).sum::<f64>()
                    }));
            }
        }
        (found, expected)
    }

    pub(super) fn attention(kernels: &Kernels) -> Outcome {
        let (mut found, mut expected) = (Vec::new(), Vec::new());
        for (size, first, last) in [(64, 0, 0), (64, 5, 40), (16, 0, 31), (24, 17, 33)] {
            let blocks = [2u32, 0, 1];
            let stride = size * LANES + 3;
            let (keys, values) = (noise(stride * 3, 17), noise(stride * 3, 19));
            let (queries, sinks) = (noise(size * 2, 23), [0.5, -3.0]);
            let job = Attend {
                queries: &queries,
                sinks: &sinks,
                keys: &keys,
                values: &values,
                stride,
                blocks: &blocks,
                first,
                last,
            };
            let mut out = vec![0.0; size * 2];
            // SAFETY: the table is that of an available instruction set.
            unsafe { (kernels.attend)(&job, &mut Vec::new(), &mut out) };
            found.extend(out);
            for (query, sink) in queries.chunks_exact(size).zip(sinks) {
                let start = |p: usize| blocks[p / LANES] as usize * stride;
                let score = |p: usize| {
                    (0..size)
                        .map(|e| f64::from(query[e]) * f64::from(keys[start(p) + e * LANES + p % LANES]))
                        .sum::<f64>()
                        .exp()
                };
                let sum = f64::from(sink).exp() + (first..=last).map(score).sum::<f64>();
                expected.extend((0..size).map(|e| {
                    (first..=last)
                        .map(|p| score(p) / sum * f64::from(values[start(p) + p % LANES * size + e]))
                        .sum::<f64>()
                }));
            }
        }
        (found, expected)
    }

    pub(super) fn norm(kernels: &Kernels) -> Outcome {
        let (x, scale) = (noise(96, 29), noise(96, 31));
        let mut out = vec![0.0; 96];
        // SAFETY: the table is that of an available instruction set; the lengths are equal and a multiple of 16.
        unsafe { (kernels.rms_norm)(&x, &scale, 1e-5, &mut out) };
        let mean = x.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / 96.0;
        let expected =
            x.iter().zip(&scale).map(|(&v, &g)| f64::from(v) * f64::from(g) / (mean + 1e-5).sqrt());
        (out, expected.collect())
    }

    pub(super) fn activation(kernels: &Kernels) -> Outcome {
        let z: Vec<f32> = noise(80, 37).into_iter().map(|v| v * 12.0).collect();
        let mut out = vec![0.0; 40];
        // SAFETY: the table is that of an available instruction set; `z` is twice as long as `out`.
        unsafe { (kernels.swiglu)(&z, 7.0, 1.702, &mut out) };
        let expected = z.chunks_exact(2).map(|pair| {
            let (gate, up) = (f64::from(pair[0].min(7.0)), f64::from(pair[1].clamp(-7.0, 7.0)));
            (up + 1.0) * gate / (1.0 + (-f64::from(1.702f32) * gate).exp())
        });
        (out, expected.collect())
    }
}
