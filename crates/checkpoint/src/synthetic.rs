//! Made-up weights of any shape, generated when they are asked for: for tests, and for measuring speed without a download.

use std::borrow::Cow;
use std::collections::HashMap;

use half::bf16;
use numerics::{mxfp4, nvfp4};

use crate::{
    Config, Error, Format, Matrix, MatrixId, Values, Vector, VectorId, VectorKind, Weights, matrices,
};

/// Weights that depend on nothing but the configuration, the formats and a seed.
///
/// Their magnitude is about 0.02 as in a fresh model, so that activations stay of order one through any number of
/// layers and the router spreads its choice; norms are 1 and sinks 0.
#[derive(Debug, Clone)]
pub struct Synthetic {
    config: Config,
    formats: HashMap<MatrixId, Format>,
    seed: u64,
}

impl Synthetic {
    /// A model of this shape. `formats` names the format of each matrix; a row must be a whole number of its blocks.
    pub fn new(config: Config, formats: impl Fn(MatrixId) -> Format, seed: u64) -> Synthetic {
        let formats = matrices(&config).map(|id| (id, formats(id))).collect();
        Synthetic { config, formats, seed }
    }
}

impl Weights for Synthetic {
    fn config(&self) -> &Config {
        &self.config
    }

    fn format(&self, id: MatrixId) -> Format {
        self.formats[&id]
    }

    fn matrix(&self, id: MatrixId, expert: usize) -> Result<Matrix<'_>, Error> {
        let (_, rows, cols) = id.kind.shape(&self.config);
        let stream = |part| Random::new(self.seed, &[id.layer as u64, id.kind as u64, expert as u64, part]);
        let codes = || Cow::Owned(stream(0).bytes(rows * cols / 2));
        let values = match self.format(id) {
            Format::Bf16 => Values::Bf16(Cow::Owned(stream(0).weights(rows * cols))),
            Format::Mxfp4 => {
                // The root mean square of uniform codes is 2.9, and 2^-7 times that is 0.023.
                let mut scales = stream(1).bytes(rows * cols / mxfp4::BLOCK);
                scales.iter_mut().for_each(|byte| *byte = 119 + (*byte & 1));
                Values::Mxfp4 { codes: codes(), scales: Cow::Owned(scales) }
            }
            Format::Nvfp4 => {
                // Scale bytes for 48 to 88; with 2^-13, 0.006 to 0.011.
                let mut scales = stream(1).bytes(rows * cols / nvfp4::BLOCK);
                scales.iter_mut().for_each(|byte| *byte = 0x64 + (*byte & 7));
                let global_scale = 0.000_122_070_31;
                Values::Nvfp4 { codes: codes(), scales: Cow::Owned(scales), global_scale }
            }
        };
        Ok(Matrix { rows, cols, values })
    }

    fn vector(&self, id: VectorId) -> Result<Vector<'_>, Error> {
        let (n, length) = id.kind.shape(&self.config);
        Ok(Vector::Bf16(Cow::Owned(match id.kind {
            VectorKind::FinalNorm | VectorKind::InputNorm | VectorKind::PostAttentionNorm => {
                vec![bf16::ONE; length]
            }
            VectorKind::Sinks => vec![bf16::ZERO; length],
            kind => Random::new(self.seed, &[id.layer as u64, kind as u64, u64::MAX]).weights(n * length),
        })))
    }
}

/// Random words from a counter: the mixing function of SplitMix64.
struct Random {
    state: u64,
}

impl Random {
    fn new(seed: u64, key: &[u64]) -> Random {
        let mut random = Random { state: seed };
        for &part in key {
            random.state = random.next() ^ part;
        }
        random
    }

    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        let (words, rest) = out.as_chunks_mut::<8>();
        words.iter_mut().for_each(|word| *word = self.next().to_le_bytes());
        rest.copy_from_slice(&self.next().to_le_bytes()[..rest.len()]);
        out
    }

    /// Values of either sign between 2^-7 and 2^-5, root mean square 0.018.
    fn weights(&mut self, len: usize) -> Vec<bf16> {
        let mut out = vec![bf16::ZERO; len];
        let four =
            |word: u64| [0, 16, 32, 48].map(|at| bf16::from_bits((word >> at) as u16 & 0x80ff | 0x3c00));
        let (words, rest) = out.as_chunks_mut::<4>();
        words.iter_mut().for_each(|word| *word = four(self.next()));
        rest.copy_from_slice(&four(self.next())[..rest.len()]);
        out
    }
}
