//! Comparing two models, whatever their layouts: value by value after one rounding to BF16.

use std::collections::BTreeSet;
use std::ops::Range;
use std::thread;

use half::bf16;

use crate::{Config, Error, Matrix, MatrixId, Values, VectorId, Weights, matrices, vectors};

/// What two models have in common.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Comparison {
    /// Whether nothing is different, missing or unknown.
    pub identical: bool,
    /// Logical tensors that both have.
    pub tensors: usize,
    /// Those whose values differ (by more than the tolerance, if one was given), and static scales that both have.
    pub different: Vec<Difference>,
    /// The same that differ, but by no more than the tolerance.
    pub within_tolerance: Vec<Difference>,
    /// Tensors of the first model that the second does not have.
    pub missing: Vec<String>,
    /// Tensors of the second model that the first does not have.
    pub unknown: Vec<String>,
    /// Static scales of inputs and of the cache that only one of the models has. They change no weight, so the models may be
    /// identical even so.
    pub scales_of_one: Vec<String>,
}

/// How far two tensors are apart.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Difference {
    /// The tensor's name in Hugging Face's layout.
    pub name: String,
    /// The largest difference; infinite (`null` in JSON) where one side is not a number, or the shapes differ.
    pub max_abs: f64,
    /// The mean square of the difference over all elements; infinite as above.
    pub mse: f64,
    /// How many elements differ.
    pub elements: u64,
}

/// Compares every tensor of `a` with that of `b`.
///
/// Values are equal if they are the same BF16 number after one rounding from F32; -0 equals 0. NVFP4 on both sides is equal if
/// codes (8 taken as 0) and scale bytes are, and the global scales are within one unit in the last place: one of
/// them may have been stored as its inverse. So are the static scales of inputs and of the cache that both have. With
/// `tolerance`, tensors and scales count as different only if the root mean square of the difference exceeds that share of the
/// root mean square of `a`.
///
/// Takes the memory of one matrix of each side that a layout cannot lend, and on each of so many `threads` two rows. The result does
/// not depend on their number.
///
/// # Errors
/// Those of reading either model.
pub fn compare(
    a: &dyn Weights,
    b: &dyn Weights,
    tolerance: Option<f64>,
    threads: usize,
) -> Result<Comparison, Error> {
    let (ours, theirs) = (Names::of(a.config()), Names::of(b.config()));
    let (mut different, mut within_tolerance) = (Vec::new(), Vec::new());
    let mut note = |name: String, difference: Totals| {
        if difference.exceeds(tolerance) {
            different.push(difference.report(name));
        } else if difference.differing > 0 {
            within_tolerance.push(difference.report(name));
        }
    };
    for &id in ours.matrices.intersection(&theirs.matrices) {
        let shape = id.kind.shape(a.config());
        let mut totals = Totals::default();
        if shape != id.kind.shape(b.config()) {
            totals = Totals::incomparable(shape.0 * shape.1 * shape.2);
        } else {
            for expert in 0..shape.0 {
                let (left, right) = (a.matrix(id, expert)?, b.matrix(id, expert)?);
                totals.add(&compare_matrices(&left, &right, tolerance.is_some(), threads));
                a.release(id, expert);
                b.release(id, expert);
            }
        }
        note(id.name(), totals);
    }
    for &id in ours.vectors.intersection(&theirs.vectors) {
        let (left, right) = (a.vector(id)?.to_f32(), b.vector(id)?.to_f32());
        let mut totals = Totals::default();
        if id.kind.shape(a.config()) != id.kind.shape(b.config()) {
            totals = Totals::incomparable(left.len());
        } else {
            totals.compare(&left, &right);
        }
        note(id.name(), totals);
    }
    let mut scales_of_one = Vec::new();
    for (name, left, right) in static_scales((a, &ours), (b, &theirs)) {
        match (left, right) {
            (Some(left), Some(right)) => note(name, Totals::of_scales(left, right)),
            (None, None) => {}
            _ => scales_of_one.push(name),
        }
    }
    let only = |left: &Names, right: &Names| {
        let matrices = left.matrices.difference(&right.matrices).map(|id| id.name());
        matrices.chain(left.vectors.difference(&right.vectors).map(|id| id.name())).collect::<Vec<_>>()
    };
    let tensors = ours.matrices.intersection(&theirs.matrices).count()
        + ours.vectors.intersection(&theirs.vectors).count();
    let (missing, unknown) = (only(&ours, &theirs), only(&theirs, &ours));
    let identical = different.is_empty() && missing.is_empty() && unknown.is_empty();
    Ok(Comparison { identical, tensors, different, within_tolerance, missing, unknown, scales_of_one })
}

/// The static scales that both models have a place for: each one's name, and what it is in either.
fn static_scales(
    (a, ours): (&dyn Weights, &Names),
    (b, theirs): (&dyn Weights, &Names),
) -> Vec<(String, Option<f32>, Option<f32>)> {
    let mut scales = Vec::new();
    for &id in ours.matrices.intersection(&theirs.matrices) {
        let name = id.name();
        let name = format!("{}.input_scale", name.strip_suffix(".weight").unwrap_or(&name));
        scales.push((name, a.input_scale(id), b.input_scale(id)));
    }
    for layer in 0..a.config().layer_kinds.len().min(b.config().layer_kinds.len()) {
        let (left, right) = (a.kv_scales(layer), b.kv_scales(layer));
        let name = |suffix: &str| format!("model.layers.{layer}.self_attn.{suffix}");
        scales.push((name("k_proj.k_scale"), left.map(|s| s.key), right.map(|s| s.key)));
        scales.push((name("v_proj.v_scale"), left.map(|s| s.value), right.map(|s| s.value)));
    }
    scales
}

struct Names {
    matrices: BTreeSet<MatrixId>,
    vectors: BTreeSet<VectorId>,
}

impl Names {
    fn of(config: &Config) -> Names {
        Names { matrices: matrices(config).collect(), vectors: vectors(config).collect() }
    }
}

/// Sums over the elements of a tensor.
#[derive(Default)]
struct Totals {
    elements: u64,
    differing: u64,
    max_abs: f64,
    squares: f64,
    power: f64,
}

impl Totals {
    fn incomparable(elements: usize) -> Totals {
        let elements = elements as u64;
        Totals { elements, differing: elements, max_abs: f64::INFINITY, squares: f64::INFINITY, power: 0.0 }
    }

    /// Of two scales.
    fn of_scales(a: f32, b: f32) -> Totals {
        let same = same_scale(a, b);
        let difference = if same { 0.0 } else { (f64::from(a) - f64::from(b)).abs() };
        Totals {
            elements: 1,
            differing: u64::from(!same),
            max_abs: difference,
            squares: difference * difference,
            power: f64::from(a) * f64::from(a),
        }
    }

    fn compare(&mut self, a: &[f32], b: &[f32]) {
        self.elements += a.len() as u64;
        for (a, b) in a.iter().zip(b) {
            let (a, b) = (bf16::from_f32(*a).to_f32(), bf16::from_f32(*b).to_f32());
            let value = f64::from(a);
            if value.is_finite() {
                self.power += value * value;
            }
            if a == b || (a.is_nan() && b.is_nan()) {
                continue;
            }
            self.differing += 1;
            let difference = (value - f64::from(b)).abs();
            let difference = if difference.is_nan() { f64::INFINITY } else { difference };
            self.max_abs = self.max_abs.max(difference);
            self.squares += difference * difference;
        }
    }

    fn add(&mut self, other: &Totals) {
        self.elements += other.elements;
        self.differing += other.differing;
        self.max_abs = self.max_abs.max(other.max_abs);
        self.squares += other.squares;
        self.power += other.power;
    }

    fn exceeds(&self, tolerance: Option<f64>) -> bool {
        match tolerance {
            None => self.differing > 0,
            // Neither side is ever NaN: what is no number counts as infinite above, and is left out of the power.
            Some(share) => self.differing > 0 && self.squares.sqrt() > share * self.power.sqrt(),
        }
    }

    fn report(&self, name: String) -> Difference {
        let mse = self.squares / self.elements as f64;
        Difference { name, max_abs: self.max_abs, mse, elements: self.differing }
    }
}

/// Rows that are summed together: the order of sums must not depend on the number of threads.
const ROWS_PER_CHUNK: usize = 64;

/// `power` says that the power of `a` is wanted even where nothing differs.
fn compare_matrices(a: &Matrix<'_>, b: &Matrix<'_>, power: bool, threads: usize) -> Totals {
    let elements = (a.rows * a.cols) as u64;
    let same = same_storage(&a.values, &b.values);
    if same && !power {
        return Totals { elements, ..Totals::default() };
    }
    let b = if same { a } else { b };
    let chunks = a.rows.div_ceil(ROWS_PER_CHUNK);
    let compare = |rows: Range<usize>| {
        let mut totals = Totals::default();
        let (mut left, mut right) = (vec![0.0; a.cols], vec![0.0; a.cols]);
        for row in rows {
            a.row(row, &mut left);
            b.row(row, &mut right);
            totals.compare(&left, &right);
        }
        totals
    };
    let chunk = |index: usize| compare(index * ROWS_PER_CHUNK..((index + 1) * ROWS_PER_CHUNK).min(a.rows));
    let threads = threads.min(chunks).max(1);
    let mut sums: Vec<(usize, Totals)> = if elements < 1 << 18 {
        (0..chunks).map(|index| (index, chunk(index))).collect()
    } else {
        thread::scope(|scope| {
            let workers: Vec<_> = (0..threads)
                .map(|first| {
                    let chunk = &chunk;
                    scope.spawn(move || {
                        (first..chunks).step_by(threads).map(|i| (i, chunk(i))).collect::<Vec<_>>()
                    })
                })
                .collect();
            workers
                .into_iter()
                .flat_map(|worker| worker.join().expect("comparing rows does not panic"))
                .collect()
        })
    };
    sums.sort_unstable_by_key(|(index, _)| *index);
    let mut totals = Totals::default();
    sums.iter().for_each(|(_, sum)| totals.add(sum));
    totals
}

/// Whether two matrices are equal by what is stored, so that their values need not be looked at.
fn same_storage(a: &Values<'_>, b: &Values<'_>) -> bool {
    match (a, b) {
        (Values::Bf16(a), Values::Bf16(b)) => {
            bytemuck::cast_slice::<bf16, u16>(a) == bytemuck::cast_slice::<bf16, u16>(b)
        }
        (Values::Mxfp4 { codes: a, scales: s }, Values::Mxfp4 { codes: b, scales: t }) => a == b && s == t,
        (
            Values::Nvfp4 { codes: a, scales: s, global_scale: g },
            Values::Nvfp4 { codes: b, scales: t, global_scale: h },
        ) => same_scale(*g, *h) && s == t && (a == b || same_codes(a, b)),
        _ => false,
    }
}

/// Whether two scales, which are positive, are within one unit in the last place: one may have been stored as its inverse.
fn same_scale(a: f32, b: f32) -> bool {
    // Positive floats are ordered as their bits are.
    a.to_bits().abs_diff(b.to_bits()) <= 1
}

fn same_codes(a: &[u8], b: &[u8]) -> bool {
    let positive_zero = |code: u8| if code & 15 == 8 { 0 } else { code & 15 };
    let same = |a, b| positive_zero(a) == positive_zero(b);
    a.len() == b.len() && a.iter().zip(b).all(|(&a, &b)| a == b || (same(a, b) && same(a >> 4, b >> 4)))
}
