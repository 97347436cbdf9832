//! Rotary position embedding with YaRN's "NTK by parts" frequencies (Peng et al., 2023), as gpt-oss computes it.

use checkpoint::Rope;

/// The frequencies of one head and the concentration of its cosines and sines.
#[derive(Debug, Clone)]
pub struct Rotary {
    /// `head_dim / 2` angles per position.
    pub frequencies: Vec<f32>,
    /// Factor of both cosine and sine: `0.1 ln(factor) + 1`.
    pub concentration: f32,
}

impl Rotary {
    /// The frequencies for heads of `head_dim` entries.
    pub fn new(rope: &Rope, head_dim: usize) -> Rotary {
        let half = head_dim / 2;
        let power = |i: usize| (rope.base).powf(i as f32 * 2.0 / head_dim as f32);
        if rope.factor <= 1.0 {
            return Rotary { frequencies: (0..half).map(|i| 1.0 / power(i)).collect(), concentration: 1.0 };
        }
        // Where a frequency turns `rotations` times over the original context.
        let boundary = |rotations: f32| {
            let turns = rope.original_context as f64 / (f64::from(rotations) * std::f64::consts::TAU);
            half as f64 * turns.ln() / f64::from(rope.base).ln()
        };
        let (mut low, mut high) = (boundary(rope.beta_fast), boundary(rope.beta_slow));
        if rope.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, mut high) = (low.max(0.0) as f32, high.min((head_dim - 1) as f64) as f32);
        if low == high {
            high += 0.001;
        }
        let frequencies = (0..half)
            .map(|i| {
                let ramp = ((i as f32 - low) / (high - low)).clamp(0.0, 1.0);
                let (extrapolated, interpolated) = (1.0 / power(i), 1.0 / (rope.factor * power(i)));
                interpolated * ramp + extrapolated * (1.0 - ramp)
            })
            .collect();
        Rotary { frequencies, concentration: (0.1 * f64::from(rope.factor).ln() + 1.0) as f32 }
    }

    /// Cosines and sines at `position`, the concentration included. The angle is an F32 product, as in the references:
    /// a more exact one differs from them far out.
    pub fn at(&self, position: usize, cos: &mut [f32], sin: &mut [f32]) {
        for ((&frequency, cos), sin) in self.frequencies.iter().zip(cos).zip(sin) {
            let angle = position as f32 * frequency;
            *cos = angle.cos() * self.concentration;
            *sin = angle.sin() * self.concentration;
        }
    }
}

/// Rotates one head in place: entry `i` is paired with entry `i + head_dim / 2`.
#[inline]
pub fn rotate(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (first, second) = head.split_at_mut(head.len() / 2);
    for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}
