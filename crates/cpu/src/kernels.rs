//! The table of kernels for each instruction set, chosen at run time, and their self-test.

#[cfg(target_arch = "x86_64")]
use crate::amx;
use crate::attention::{self, Attend, CacheFormat, Found};
use crate::bandwidth;
#[cfg(target_arch = "x86_64")]
use crate::pairs;
use crate::panels;
use crate::products::{
    self, Bf16Slab, E2m1Slab, Finish, Int8Slab, MOST_TOKENS, PanelKernel, Panels, Part, Slab,
};
use crate::records::{self, Kind, Limbs, Rounded};
#[cfg(target_arch = "x86_64")]
use crate::simd::{Avx2, Avx512, Avx512Vnni, AvxVnni};
use crate::simd::{LANES, Lanes, Scalar};

/// Rows of the left side of a [`DenseKernel`].
pub(crate) const ROWS: usize = 8;

/// Rows of its right side.
pub(crate) const COLUMNS: usize = 3 * LANES;

/// The products of a [`DenseKernel`].
pub(crate) type DenseSums = [[f32; COLUMNS]; ROWS];

/// Eight rows times 48 rows of f32: `sums[i][j] = Σ a[i][k] · b[k][j]`, each in the order of `k`.
///
/// # Safety
/// The CPU has the table's instruction set; every row of `a` is valid for `depth` values, `b` for `depth` times 48.
pub(crate) type DenseKernel =
    unsafe fn(a: [*const f32; ROWS], b: *const f32, depth: usize, sums: &mut DenseSums);

/// See [`records::write`].
///
/// # Safety
/// What it needs, and that the CPU has the table's instruction set.
pub(crate) type QuantizeKernel = unsafe fn(x: &[f32], count: usize, out: *mut u32, stride: usize);

/// The kernels of one instruction set. All are unsafe because the CPU must have it; the functions that they are
/// instances of say what else they need.
pub(crate) struct Kernels {
    pub(crate) isa: Isa,
    /// For activations of one, two and three limbs.
    pub(crate) nvfp4: [PanelKernel; 3],
    pub(crate) mxfp4: [PanelKernel; 3],
    pub(crate) int8: [PanelKernel; 3],
    pub(crate) bf16: PanelKernel,
    pub(crate) by_bf16: ByBf16,
    pub(crate) pack_e2m1: unsafe fn(&panels::Rows<'_>, &panels::Rows<'_>, usize, &mut [u8]),
    pub(crate) pack_e2m1_by_inputs: unsafe fn(&panels::Inputs<'_>, &mut [u8]),
    pub(crate) pack_bf16: unsafe fn(&panels::Rows<'_>, &mut [u8]),
    pub(crate) pack_int8: unsafe fn(&panels::Rows<'_>, &mut [u8], &mut [f32; LANES]),
    pub(crate) finish: unsafe fn(&Finish<'_>),
    pub(crate) finish_swiglu: unsafe fn(&Finish<'_>, &Finish<'_>, f32, f32),
    pub(crate) quantize: [QuantizeKernel; 3],
    /// To BF16.
    pub(crate) round: QuantizeKernel,
    pub(crate) checksum: unsafe fn(&[u8]) -> u64,
    pub(crate) dense: DenseKernel,
    pub(crate) attend: unsafe fn(&Attend<'_>, span: usize) -> Found,
    pub(crate) merge: unsafe fn(&Attend<'_>, &mut Found, &Found),
    /// The three slices have the same length, a multiple of 16.
    pub(crate) rms_norm: unsafe fn(x: &[f32], scale: &[f32], epsilon: f32, out: &mut [f32]),
}

/// For activations in BF16, by the format of the weights.
pub(crate) struct ByBf16 {
    pub(crate) nvfp4: PanelKernel,
    pub(crate) mxfp4: PanelKernel,
    pub(crate) int8: PanelKernel,
    pub(crate) bf16: PanelKernel,
}

/// An instruction set that kernels exist for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Plain code.
    Scalar,
    /// AVX2 and FMA.
    Avx2,
    /// The same with AVX-VNNI: Alder Lake and what came after, AVX-512 or not.
    AvxVnni,
    /// AVX-512 with VNNI: Cascade Lake.
    Avx512Vnni,
    /// The same with VBMI: Ice Lake, Zen 4 and what came after.
    Avx512,
    /// The same with AMX for BF16: Sapphire Rapids and what came after.
    Amx,
}

impl Isa {
    /// Every instruction set, the slowest first.
    pub const ALL: [Isa; 6] = [Isa::Scalar, Isa::Avx2, Isa::AvxVnni, Isa::Avx512Vnni, Isa::Avx512, Isa::Amx];

    /// Whether this CPU has it.
    pub fn is_available(self) -> bool {
        match self {
            Isa::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni => Isa::Avx2.is_available() && is_x86_feature_detected!("avxvnni"),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vnni")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => Isa::Avx512Vnni.is_available() && is_x86_feature_detected!("avx512vbmi"),
            #[cfg(target_arch = "x86_64")]
            Isa::Amx => Isa::Avx512.is_available() && *amx::IS_AVAILABLE,
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
            Isa::AvxVnni => "AVX-VNNI",
            Isa::Avx512Vnni => "AVX-512 without VBMI",
            Isa::Avx512 => "AVX-512",
            Isa::Amx => "AMX",
        }
    }

    /// The kernels, if this CPU can run them.
    pub(crate) fn kernels(self) -> Option<&'static Kernels> {
        let kernels = match self {
            Isa::Scalar => &scalar::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => &AVX2,
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni => &avx_vnni::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => &avx512_vnni::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => &avx512::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Isa::Amx => &amx_and_avx512::KERNELS,
            #[cfg(not(target_arch = "x86_64"))]
            _ => return None,
        };
        self.is_available().then_some(kernels)
    }
}

/// Compiles every kernel for one instruction set. `$rows` rows times `$vectors` sixteens of columns of a dense product are kept
/// in registers at a time.
macro_rules! instantiate {
    ($module:ident, $isa:expr, $lanes:ty, $rows:literal, $vectors:literal $(, $features:literal)?) => {
        mod $module {
            use super::*;

            pub(super) const KERNELS: Kernels = Kernels {
                isa: $isa,
                nvfp4: [e2m1::<false, 1>, e2m1::<false, 2>, e2m1::<false, 3>],
                mxfp4: [e2m1::<true, 1>, e2m1::<true, 2>, e2m1::<true, 3>],
                int8: [int8::<1>, int8::<2>, int8::<3>],
                bf16,
                by_bf16: ByBf16 {
                    nvfp4: by_bf16::<E2m1Slab<false>>,
                    mxfp4: by_bf16::<E2m1Slab<true>>,
                    int8: by_bf16::<Int8Slab>,
                    bf16: by_bf16::<Bf16Slab>,
                },
                pack_e2m1,
                pack_e2m1_by_inputs,
                pack_bf16,
                pack_int8,
                finish,
                finish_swiglu,
                quantize: [write::<Limbs<1>>, write::<Limbs<2>>, write::<Limbs<3>>],
                round: write::<Rounded>,
                checksum,
                dense,
                attend,
                merge,
                rms_norm,
            };

            // SAFETY (of the calls below): the caller's obligations are handed on unchanged; the features that the lanes
            // need are enabled here.
            $(#[target_feature(enable = $features)])?
            unsafe fn e2m1<const MX: bool, const LIMBS: usize>(
                panels: Panels,
                x: Part<'_>,
                sums: *mut [f32; LANES],
            ) {
                for p in 0..panels.count {
                    // SAFETY: as stated above.
                    unsafe { products::e2m1::<$lanes, MX, LIMBS>(panels.panel(p), x, sums.add(p * MOST_TOKENS)) }
                }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn int8<const LIMBS: usize>(panels: Panels, x: Part<'_>, sums: *mut [f32; LANES]) {
                for p in 0..panels.count {
                    // SAFETY: as stated above.
                    unsafe { products::int8::<$lanes, LIMBS>(panels.panel(p), x, sums.add(p * MOST_TOKENS)) }
                }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn bf16(panels: Panels, x: Part<'_>, sums: *mut [f32; LANES]) {
                for p in 0..panels.count {
                    // SAFETY: as stated above.
                    unsafe { products::bf16::<$lanes>(panels.panel(p), x, sums.add(p * MOST_TOKENS)) }
                }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn by_bf16<S: Slab<$lanes>>(panels: Panels, x: Part<'_>, sums: *mut [f32; LANES]) {
                // SAFETY: as stated above.
                unsafe { products::by_bf16::<$lanes, S>(panels, x, sums) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn pack_e2m1(
                codes: &panels::Rows<'_>,
                scales: &panels::Rows<'_>,
                blocks: usize,
                out: &mut [u8],
            ) {
                // SAFETY: as stated above.
                unsafe { panels::e2m1::<$lanes>(codes, scales, blocks, out) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn pack_e2m1_by_inputs(inputs: &panels::Inputs<'_>, out: &mut [u8]) {
                // SAFETY: as stated above.
                unsafe { panels::e2m1_by_inputs::<$lanes>(inputs, out) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn pack_bf16(values: &panels::Rows<'_>, out: &mut [u8]) {
                // SAFETY: as stated above.
                unsafe { panels::bf16::<$lanes>(values, out) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn pack_int8(values: &panels::Rows<'_>, out: &mut [u8], scales: &mut [f32; LANES]) {
                // SAFETY: as stated above.
                unsafe { panels::int8::<$lanes>(values, out, scales) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn finish(job: &Finish<'_>) {
                // SAFETY: as stated above.
                unsafe { products::finish::<$lanes>(job) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn finish_swiglu(gates: &Finish<'_>, ups: &Finish<'_>, limit: f32, alpha: f32) {
                // SAFETY: as stated above.
                unsafe { products::finish_swiglu::<$lanes>(gates, ups, limit, alpha) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn write<R: records::Record>(x: &[f32], count: usize, out: *mut u32, stride: usize) {
                // SAFETY: as stated above.
                unsafe { records::write::<R>(x, count, out, stride) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn checksum(bytes: &[u8]) -> u64 {
                // SAFETY: as stated above.
                unsafe { bandwidth::checksum::<$lanes>(bytes) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn dense(a: [*const f32; ROWS], b: *const f32, depth: usize, sums: &mut DenseSums) {
                // SAFETY: as stated above.
                unsafe { dense_tile::<$lanes, $rows, $vectors>(a, b, depth, sums) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn attend(job: &Attend<'_>, span: usize) -> Found {
                // SAFETY: as stated above.
                unsafe { attention::attend::<$lanes>(job, span) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn merge(job: &Attend<'_>, found: &mut Found, other: &Found) {
                // SAFETY: as stated above.
                unsafe { attention::merge::<$lanes>(job, found, other) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn rms_norm(x: &[f32], scale: &[f32], epsilon: f32, out: &mut [f32]) {
                // SAFETY: as stated above.
                unsafe { super::rms_norm::<$lanes>(x, scale, epsilon, out) }
            }
        }
    };
}

instantiate!(scalar, Isa::Scalar, Scalar, 2, 1);
#[cfg(target_arch = "x86_64")]
instantiate!(avx2, Isa::Avx2, Avx2, 4, 1, "avx,avx2,fma,f16c");
/// With eight-bit weights that take several limbs as numbers of 16 bits.
#[cfg(target_arch = "x86_64")]
const AVX2: Kernels =
    Kernels { int8: [avx2::KERNELS.int8[0], pairs::int8::<2>, pairs::int8::<3>], ..avx2::KERNELS };
#[cfg(target_arch = "x86_64")]
instantiate!(avx_vnni, Isa::AvxVnni, AvxVnni, 4, 1, "avx,avx2,fma,f16c,avxvnni");
#[cfg(target_arch = "x86_64")]
instantiate!(
    avx512_vnni,
    Isa::Avx512Vnni,
    Avx512Vnni,
    8,
    3,
    "avx,avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"
);
#[cfg(target_arch = "x86_64")]
instantiate!(
    avx512,
    Isa::Avx512,
    Avx512,
    8,
    3,
    "avx,avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi"
);
/// Those of AVX-512, but for activations in BF16.
#[cfg(target_arch = "x86_64")]
mod amx_and_avx512 {
    use super::*;

    pub(super) const KERNELS: Kernels = Kernels {
        isa: Isa::Amx,
        by_bf16: ByBf16 {
            nvfp4: by_bf16::<E2m1Slab<false>>,
            mxfp4: by_bf16::<E2m1Slab<true>>,
            int8: by_bf16::<Int8Slab>,
            bf16: by_bf16::<Bf16Slab>,
        },
        ..avx512::KERNELS
    };

    #[target_feature(enable = "avx,avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
    unsafe fn by_bf16<S: Slab<Avx512>>(panels: Panels, x: Part<'_>, sums: *mut [f32; LANES]) {
        // SAFETY: the caller's obligations are handed on unchanged; the features that the lanes need are enabled here.
        unsafe { amx::by_bf16::<Avx512, S>(panels, x, sums) }
    }
}

/// See [`DenseKernel`]; `R` rows times `V` vectors of columns at a time.
#[inline(always)]
unsafe fn dense_tile<L: Lanes, const R: usize, const V: usize>(
    a: [*const f32; ROWS],
    b: *const f32,
    depth: usize,
    sums: &mut DenseSums,
) {
    // SAFETY: the contract of `DenseKernel`: all pointers are valid for the depth.
    unsafe {
        for row in (0..ROWS).step_by(R) {
            for column in (0..COLUMNS).step_by(V * LANES) {
                let mut acc = [[L::splat(0.0); V]; R];
                for k in 0..depth {
                    let mut right = [L::splat(0.0); V];
                    for (v, right) in right.iter_mut().enumerate() {
                        *right = L::load(b.add(k * COLUMNS + column + v * LANES));
                    }
                    for r in 0..R {
                        let left = L::splat(*a[row + r].add(k));
                        for v in 0..V {
                            acc[r][v] = left.fma(right[v], acc[r][v]);
                        }
                    }
                }
                for r in 0..R {
                    for v in 0..V {
                        acc[r][v].store(sums[row + r][column + v * LANES..].as_mut_ptr());
                    }
                }
            }
        }
    }
}

/// RMSNorm of one token.
///
/// # Safety
/// The CPU has the features of the lanes; the slices have the same length, a multiple of sixteen.
#[inline(always)]
unsafe fn rms_norm<L: Lanes>(x: &[f32], scale: &[f32], epsilon: f32, out: &mut [f32]) {
    // SAFETY: the contract.
    unsafe {
        let mut sum = L::splat(0.0);
        for i in (0..x.len()).step_by(LANES) {
            let x = L::load(x.as_ptr().add(i));
            sum = x.fma(x, sum);
        }
        let inverse = L::splat(1.0 / (sum.sum() / x.len() as f32 + epsilon).sqrt());
        for i in (0..x.len()).step_by(LANES) {
            let (x, scale) = (L::load(x.as_ptr().add(i)), L::load(scale.as_ptr().add(i)));
            x.mul(inverse).mul(scale).store(out.as_mut_ptr().add(i));
        }
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
    FAMILIES
        .iter()
        .map(|&(kernel, run)| {
            let outcome = run(kernels, &cases::PARTS);
            let (plain, _) = run(&scalar::KERNELS, &cases::PARTS);
            let error = relative_error(&outcome);
            let (found, _) = outcome;
            let equals_scalar = found.len() == plain.len()
                && found.iter().zip(&plain).all(|(a, b)| a.to_bits() == b.to_bits());
            SelfTest { kernel, isa, error, equals_scalar, passed: equals_scalar && error < MOST_ERROR }
        })
        .collect()
}

/// The first kernel family of `isa` that gives wrong numbers, with its error. It looks at fewer tokens than [`self_test`], and not at
/// scalar code, which takes most of that one's time: a few hundredths of a second, for the start of a model.
pub fn wrong_kernel(isa: Isa) -> Option<(&'static str, f64)> {
    wrong_among(isa.kernels()?)
}

fn wrong_among(kernels: &Kernels) -> Option<(&'static str, f64)> {
    let errors =
        FAMILIES.iter().map(|&(kernel, run)| (kernel, relative_error(&run(kernels, &cases::FEW_PARTS))));
    // No number is no small error.
    errors.into_iter().find(|&(_, error)| error.is_nan() || error >= MOST_ERROR)
}

/// What f32 arithmetic stays below.
const MOST_ERROR: f64 = 2e-6;

/// The largest error, relative to the largest number or to 1.
fn relative_error((found, expected): &cases::Outcome) -> f64 {
    let scale = expected.iter().fold(1.0f64, |a, e| a.max(e.abs()));
    let errors = found.iter().zip(expected).map(|(&f, e)| (f64::from(f) - e).abs() / scale);
    errors.fold(0.0, |a, b| if b > a || b.is_nan() { b } else { a })
}

const FAMILIES: [(&str, cases::Case); 19] = [
    ("nvfp4 × f32", |k, parts| cases::product(k, parts, cases::Weights::Nvfp4, Kind::Limbs(3))),
    ("nvfp4 × int16", |k, parts| cases::product(k, parts, cases::Weights::Nvfp4, Kind::Limbs(2))),
    ("nvfp4 × int8", |k, parts| cases::product(k, parts, cases::Weights::Nvfp4, Kind::Limbs(1))),
    ("mxfp4 × f32", |k, parts| cases::product(k, parts, cases::Weights::Mxfp4, Kind::Limbs(3))),
    ("mxfp4 × int16", |k, parts| cases::product(k, parts, cases::Weights::Mxfp4, Kind::Limbs(2))),
    ("mxfp4 × int8", |k, parts| cases::product(k, parts, cases::Weights::Mxfp4, Kind::Limbs(1))),
    ("int8 × f32", |k, parts| cases::product(k, parts, cases::Weights::Int8, Kind::Limbs(3))),
    ("int8 × int16", |k, parts| cases::product(k, parts, cases::Weights::Int8, Kind::Limbs(2))),
    ("int8 × int8", |k, parts| cases::product(k, parts, cases::Weights::Int8, Kind::Limbs(1))),
    ("bf16 × f32", |k, parts| cases::product(k, parts, cases::Weights::Bf16, Kind::Float)),
    ("nvfp4 × bf16", |k, parts| cases::product(k, parts, cases::Weights::Nvfp4, Kind::Bf16)),
    ("mxfp4 × bf16", |k, parts| cases::product(k, parts, cases::Weights::Mxfp4, Kind::Bf16)),
    ("int8 × bf16", |k, parts| cases::product(k, parts, cases::Weights::Int8, Kind::Bf16)),
    ("bf16 × bf16", |k, parts| cases::product(k, parts, cases::Weights::Bf16, Kind::Bf16)),
    ("attention", |k, _| cases::attention(k, CacheFormat::F32)),
    ("attention, bf16", |k, _| cases::attention(k, CacheFormat::Bf16)),
    ("attention, e4m3", |k, _| cases::attention(k, CacheFormat::E4m3)),
    ("rms norm", |k, _| cases::norm(k)),
    ("swiglu", |k, _| cases::activation(k)),
];

/// Small cases with an exact answer.
mod cases {
    use super::*;
    use crate::attention::{Element, Stored};
    use crate::products::{CODE_BYTES, Panel};
    use crate::records::{COLUMNS, Layout};

    /// What a kernel gave, and what plain arithmetic gives.
    pub(super) type Outcome = (Vec<f32>, Vec<f64>);

    /// Products are those of some parts of the tokens.
    pub(super) type Case = fn(&Kernels, &[(usize, usize)]) -> Outcome;

    /// Tokens of the products.
    const COUNT: usize = 61;

    /// All of them, one, and as many as are and are not a multiple of what kernels take at a time.
    pub(super) const PARTS: [(usize, usize); 5] = [(0, COUNT), (2, 3), (1, 8), (5, 25), (5, 53)];
    pub(super) const FEW_PARTS: [(usize, usize); 3] = [(2, 3), (1, 8), (5, 25)];

    /// Row and column to the value of a weight.
    type Weight = Box<dyn Fn(usize, usize) -> f64>;

    #[derive(Clone, Copy)]
    pub(super) enum Weights {
        Nvfp4,
        Mxfp4,
        Int8,
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

    /// Panels of some slabs and some tokens. The activations are what the records say, so the error is that of the sum.
    pub(super) fn product(
        kernels: &Kernels,
        parts: &[(usize, usize)],
        weights: Weights,
        kind: Kind,
    ) -> Outcome {
        const SLABS: usize = 19;
        const COLS: usize = SLABS * COLUMNS;
        const PANELS: usize = 2;
        let (data, weight) = panel(weights, PANELS * SLABS);
        let layout = Layout { kind, tokens: COUNT, cols: COLS };
        let mut words = vec![0; layout.len()];
        for t in 0..COUNT {
            // One of them is shorter, what is missing being zeros.
            let x = noise(if t == 3 { COLS - 7 } else { COLS }, 11 + t as u32);
            // SAFETY: the words are those of the layout, and nobody else's.
            unsafe { layout.write(kernels, t, &x, words.as_mut_ptr()) };
        }
        let activation = |t: usize, col: usize| {
            let record = &words[(col / COLUMNS * COUNT + t) * kind.words()..][..kind.words()];
            let at = col % COLUMNS;
            match kind {
                Kind::Float => f64::from(f32::from_bits(record[at])),
                Kind::Bf16 => {
                    let half = if at.is_multiple_of(2) {
                        record[at / 2] << 16
                    } else {
                        record[at / 2] & 0xffff_0000
                    };
                    f64::from(f32::from_bits(half))
                }
                Kind::Limbs(limbs) => {
                    let byte = |l: usize| record[8 * l + records::word(at)].to_le_bytes()[at % 4] as i8;
                    let whole: i64 = (0..limbs).map(|l| i64::from(byte(l)) << (8 * l)).sum();
                    whole as f64 * f64::from(f32::from_bits(record[8 * limbs + 2]))
                }
            }
        };
        let kernel = match (weights, kind) {
            (Weights::Nvfp4, Kind::Limbs(limbs)) => kernels.nvfp4[limbs - 1],
            (Weights::Mxfp4, Kind::Limbs(limbs)) => kernels.mxfp4[limbs - 1],
            (Weights::Int8, Kind::Limbs(limbs)) => kernels.int8[limbs - 1],
            (Weights::Nvfp4, _) => kernels.by_bf16.nvfp4,
            (Weights::Mxfp4, _) => kernels.by_bf16.mxfp4,
            (Weights::Int8, _) => kernels.by_bf16.int8,
            (Weights::Bf16, Kind::Bf16) => kernels.by_bf16.bf16,
            (Weights::Bf16, _) => kernels.bf16,
        };
        let tokens = parts.iter().map(|part| part.1).max().unwrap_or(0);
        let mut exact = vec![[[0.0; LANES]; PANELS]; COUNT];
        for col in 0..COLS {
            let column: [[f64; LANES]; PANELS] =
                std::array::from_fn(|p| std::array::from_fn(|row| weight(row, p * COLS + col)));
            for (t, exact) in exact.iter_mut().enumerate().take(tokens) {
                let x = activation(t, col);
                let sums = exact.as_flattened_mut().iter_mut().zip(column.as_flattened());
                sums.for_each(|(sum, weight)| *sum += weight * x);
            }
        }
        let (mut found, mut expected) = (Vec::new(), Vec::new());
        for &(from, to) in parts {
            let mut sums = [[[0.0; LANES]; MOST_TOKENS]; PANELS];
            let x = layout.records(&words).part(from, to);
            let first = Panel { data: data.as_ptr(), slabs: SLABS };
            let panels = Panels { first, bytes: data.len() / PANELS, count: PANELS };
            // SAFETY: the table is that of an available instruction set; panels and records have as many slabs.
            unsafe { kernel(panels, x, sums.as_flattened_mut().as_mut_ptr()) };
            for (p, sums) in sums.iter().enumerate() {
                for t in from..to {
                    found.extend(sums[t - from]);
                    expected.extend(exact[t][p]);
                }
            }
        }
        (found, expected)
    }

    /// Made-up weights, and what each of them is by the descriptions in `products.rs`.
    fn panel(weights: Weights, slabs: usize) -> (Vec<u8>, Weight) {
        match weights {
            Weights::Bf16 => {
                let data: Vec<u8> = noise(slabs * COLUMNS * LANES, 3)
                    .into_iter()
                    .flat_map(|v| half::bf16::from_f32(v).to_le_bytes())
                    .collect();
                let copy = data.clone();
                let weight = move |row: usize, col: usize| {
                    let at = 2 * (col / 2 * 32 + 2 * row + col % 2);
                    half::bf16::from_le_bytes([copy[at], copy[at + 1]]).to_f64()
                };
                (data, Box::new(weight))
            }
            Weights::Int8 => {
                let data: Vec<u8> =
                    bytes(slabs * COLUMNS * LANES, 5).into_iter().map(|byte| byte.max(1)).collect();
                let copy = data.clone();
                let weight =
                    move |row: usize, col: usize| f64::from(copy[col / 4 * 64 + 4 * row + col % 4]) - 128.0;
                (data, Box::new(weight))
            }
            Weights::Nvfp4 | Weights::Mxfp4 => {
                let mx = matches!(weights, Weights::Mxfp4);
                let scale_bytes = if mx { LANES } else { 2 * LANES };
                let slab_bytes = scale_bytes + CODE_BYTES;
                let mut data = bytes(slabs * slab_bytes, 7);
                // E4M3 bytes from the subnormals to large ones, in every second slab from an eighth on; or exponents around 0,
                // in every second slab those that shift.
                for (s, slab) in data.chunks_exact_mut(slab_bytes).enumerate() {
                    let e4m3 = if s % 2 == 0 { 0..0x60 } else { 0x20..0x70 };
                    let e8m0 = if s % 2 == 0 { 120..130 } else { 127..143 };
                    let range = if mx { e8m0 } else { e4m3 };
                    slab[..scale_bytes]
                        .iter_mut()
                        .for_each(|b| *b = range.start + *b % (range.end - range.start));
                }
                let copy = data.clone();
                let weight = move |row: usize, col: usize| {
                    let slab = &copy[col / COLUMNS * slab_bytes..][..slab_bytes];
                    let col = col % COLUMNS;
                    let scale = if mx {
                        numerics::e8m0::decode(slab[row])
                    } else {
                        numerics::e4m3::decode(slab[col / 16 * LANES + row])
                    };
                    let byte = slab[scale_bytes + col / 8 * 64 + 4 * row + col % 4];
                    let code = if col % 8 < 4 { byte & 15 } else { byte >> 4 };
                    2.0 * f64::from(numerics::e2m1::decode(code)) * f64::from(scale)
                };
                (data, Box::new(weight))
            }
        }
    }

    pub(super) fn attention(kernels: &Kernels, format: CacheFormat) -> Outcome {
        fn stored<T: Element>(values: &mut [f32]) -> Vec<T> {
            let stored: Vec<T> = values.iter().map(|&v| T::of(v)).collect();
            values.iter_mut().zip(&stored).for_each(|(value, stored)| *value = stored.value());
            stored
        }
        const VALUE_SCALE: f32 = 0.75;
        let (mut found, mut expected) = (Vec::new(), Vec::new());
        // Head size, first position of the queries, queries per token, queries, window.
        for (size, position, heads, count, window) in [
            (64, 0, 1, 1, usize::MAX),
            (64, 40, 8, 8, 36),
            (16, 130, 3, 12, usize::MAX),
            (24, 125, 2, 31, 20),
            // Two spans, and two of which some queries see only the second.
            (16, attention::SPAN + 5, 2, 4, usize::MAX),
            (16, attention::SPAN + 12, 1, 9, 17),
        ] {
            let count_of_blocks = (position + count).div_ceil(LANES) as u32;
            let blocks: Vec<u32> = (0..count_of_blocks).map(|b| (b + 2) % count_of_blocks).collect();
            // The second of three heads.
            let group = attention::GROUP * size * LANES;
            let all = 3 * group * blocks.len().div_ceil(attention::GROUP);
            let (mut keys, mut values) = (noise(all, 17), noise(all, 19));
            let (mut halves, mut bytes) = ([vec![], vec![]], [vec![], vec![]]);
            match format {
                CacheFormat::F32 => {}
                CacheFormat::Bf16 => halves = [stored(&mut keys), stored(&mut values)],
                CacheFormat::E4m3 => bytes = [stored(&mut keys), stored(&mut values)],
            }
            let [all_keys, all_values] = match format {
                CacheFormat::F32 => [&keys, &values].map(|all| Stored::F32(all)),
                CacheFormat::Bf16 => halves.each_ref().map(|all| Stored::Bf16(all)),
                CacheFormat::E4m3 => bytes.each_ref().map(|all| Stored::E4m3(all)),
            };
            let queries = noise(size * count, 23);
            let mut sinks = noise(count, 27).iter().map(|s| 3.0 * s).collect::<Vec<f32>>();
            // Some have none.
            sinks.iter_mut().step_by(3).for_each(|sink| *sink = f32::NEG_INFINITY);
            let positions: Vec<usize> = (0..count).map(|q| position + q / heads).collect();
            let job = Attend {
                queries: &queries,
                sinks: &sinks,
                positions: &positions,
                window,
                size,
                keys: all_keys,
                values: all_values,
                value_scale: VALUE_SCALE,
                head: 1,
                heads: 3,
                blocks: &blocks,
            };
            let mut all = Found::sinks(&job);
            for span in job.spans() {
                // SAFETY: the table is that of an available instruction set.
                unsafe { (kernels.merge)(&job, &mut all, &(kernels.attend)(&job, span)) };
            }
            found.extend(all.finish(&job));
            for ((query, sink), &last) in queries.chunks_exact(size).zip(sinks).zip(&positions) {
                let start = |p: usize| {
                    let block = blocks[p / LANES] as usize;
                    (3 * (block / attention::GROUP) + 1) * group + block % attention::GROUP * size * LANES
                };
                let score = |p: usize| {
                    (0..size)
                        .map(|e| f64::from(query[e]) * f64::from(keys[start(p) + e * LANES + p % LANES]))
                        .sum::<f64>()
                        .exp()
                };
                let first = (last + 1).saturating_sub(window);
                let scores: Vec<f64> = (first..=last).map(score).collect();
                let sum = f64::from(sink).exp() + scores.iter().sum::<f64>();
                expected.extend((0..size).map(|e| {
                    (first..=last)
                        .zip(&scores)
                        .map(|(p, score)| score / sum * f64::from(values[start(p) + p % LANES * size + e]))
                        .sum::<f64>()
                        * f64::from(VALUE_SCALE)
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
        const TOKENS: usize = 3;
        let sums = |seed| -> Vec<[f32; LANES]> {
            let values: Vec<f32> = noise(TOKENS * LANES, seed).into_iter().map(|v| v * 12.0).collect();
            values.as_chunks::<LANES>().0.to_vec()
        };
        let constants = |seed| -> [f32; LANES] { noise(LANES, seed).try_into().expect("sixteen values") };
        let (gate_sums, up_sums) = (sums(37), sums(39));
        let (gate_scale, up_scale) = (constants(41), constants(43));
        let (gate_bias, up_bias) = (constants(45), constants(47));
        let mut out = vec![0.0; TOKENS * LANES];
        let gates = Finish {
            sums: &gate_sums,
            scale: &gate_scale,
            bias: &gate_bias,
            out: out.as_mut_ptr(),
            stride: LANES,
            rows: LANES,
            add: false,
        };
        let ups = Finish { sums: &up_sums, scale: &up_scale, bias: &up_bias, ..gates };
        // SAFETY: the table is that of an available instruction set; `out` has three times sixteen places.
        unsafe { (kernels.finish_swiglu)(&gates, &ups, 7.0, 1.702) };
        let expected = (0..TOKENS * LANES).map(|i| {
            let (t, r) = (i / LANES, i % LANES);
            let line = |sums: &[[f32; LANES]], scale: &[f32; LANES], bias: &[f32; LANES]| {
                f64::from(sums[t][r]) * f64::from(scale[r]) + f64::from(bias[r])
            };
            let gate = line(&gate_sums, &gate_scale, &gate_bias).min(7.0);
            let up = line(&up_sums, &up_scale, &up_bias).clamp(-7.0, 7.0);
            (up + 1.0) * gate / (1.0 + (-f64::from(1.702f32) * gate).exp())
        });
        (out, expected.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_that_gives_wrong_numbers_is_named() {
        unsafe fn no_numbers(_: &[f32], _: &[f32], _: f32, out: &mut [f32]) {
            out.fill(f32::NAN);
        }
        for isa in Isa::ALL {
            assert_eq!(wrong_kernel(isa), None, "{isa:?}");
        }
        let good = || scalar::KERNELS;
        let wrong = |kernels: &Kernels| wrong_among(kernels).map(|(kernel, _)| kernel);
        assert_eq!(wrong(&Kernels { nvfp4: good().mxfp4, ..good() }), Some("nvfp4 × f32"));
        assert_eq!(wrong(&Kernels { bf16: good().by_bf16.bf16, ..good() }), Some("bf16 × f32"));
        assert_eq!(wrong(&Kernels { rms_norm: no_numbers, ..good() }), Some("rms norm"));
    }
}
