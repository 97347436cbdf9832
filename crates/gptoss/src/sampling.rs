//! Drawing a token from logits on the host: the order of operations of `serving.md` 10, and a counter-based generator.

use crate::backend::{Sampled, Sampling, TokenLogprobs};

/// Draws a token. `logits` (one per token of the vocabulary) is changed on the way.
pub fn sample(logits: &mut [f32], sampling: &Sampling) -> Sampled {
    let wanted = sampling.logprobs.as_ref();
    let raw = wanted.filter(|wanted| !wanted.processed).map(|_| Distribution::new(logits.to_vec()));
    if let Some(mask) = &sampling.mask {
        forbid_others(logits, mask.wait());
    }
    for &(token, bias) in &sampling.bias {
        if let Some(logit) = logits.get_mut(token as usize) {
            *logit += bias;
        }
    }
    if let Some(penalties) = &sampling.penalties {
        for (token, count) in penalties.seen() {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit =
                    if *logit > 0.0 { *logit / penalties.repetition } else { *logit * penalties.repetition };
                *logit -= penalties.frequency * count as f32;
                *logit -= if count > 0 { penalties.presence } else { 0.0 };
            }
        }
    }
    let greedy = sampling.temperature <= 0.0;
    let head = if greedy { None } else { head(logits, sampling) };
    let token = if greedy { argmax(logits) } else { draw(logits, sampling, head.as_deref()).unwrap_or(0) };
    let logprobs = wanted.map(|wanted| {
        let distribution = raw.unwrap_or_else(|| {
            if !greedy {
                keep_only(logits, sampling, head.as_deref());
            }
            Distribution::new(logits.to_vec())
        });
        distribution.logprobs(token, wanted.top, &wanted.ids)
    });
    Sampled { token, logprobs }
}

/// Whether a logit is infinite or no number; see [`crate::SequenceOutput::corrupted`].
pub fn is_corrupted(logits: &[f32]) -> bool {
    logits.chunks(TOGETHER).any(|chunk| has(chunk, |logit| !logit.is_finite()))
}

/// Logits looked at without an exit between, so that many are at a time.
const TOGETHER: usize = 1024;

fn has(logits: &[f32], is: impl Fn(f32) -> bool) -> bool {
    logits.iter().fold(false, |found, &logit| found | is(logit))
}

fn forbid_others(logits: &mut [f32], mask: &[u32]) {
    for (chunk, word) in logits.chunks_mut(32).zip(mask.iter().copied().chain(std::iter::repeat(0))) {
        if word != u32::MAX {
            let forbidden = chunk.iter_mut().enumerate().filter(|(bit, _)| word >> bit & 1 == 0);
            forbidden.for_each(|(_, logit)| *logit = f32::NEG_INFINITY);
        }
    }
}

/// The log-probability under `logits` of `token`, and of the `top` best or, if there are any, of `ids`.
pub fn score(logits: &[f32], token: u32, top: usize, ids: &[u32]) -> TokenLogprobs {
    Distribution::new(logits.to_vec()).logprobs(token, top, ids)
}

/// Logits, of which log-probabilities are asked.
struct Distribution {
    logits: Vec<f32>,
    log_sum: f64,
}

impl Distribution {
    fn new(logits: Vec<f32>) -> Distribution {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weight = Weight::new(max, 1.0, 0.0);
        let sum = weight.sum(&logits);
        Distribution { logits, log_sum: log_sum(max, sum) }
    }

    /// Of `token`, and of the `top` best or of `ids`.
    fn logprobs(&self, token: u32, top: usize, ids: &[u32]) -> TokenLogprobs {
        let logprob = |l: f32| (f64::from(l) - self.log_sum) as f32;
        let own = self.logits[token as usize];
        let rank = 1 + self.logits.iter().filter(|&&l| l > own).count();
        let others = match ids {
            [] => largest(&self.logits, top),
            ids => ids.iter().map(|&id| (id, self.logits[id as usize])).collect(),
        };
        let top = others.into_iter().map(|(id, l)| (id, logprob(l))).collect();
        TokenLogprobs { token, logprob: logprob(own), rank, top }
    }
}

/// The largest logit's id, the lowest on a tie.
fn argmax(logits: &[f32]) -> u32 {
    const LANES: usize = 16;
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = logits.as_chunks::<LANES>();
    for chunk in chunks {
        lanes.iter_mut().zip(chunk).for_each(|(largest, &logit)| *largest = larger(*largest, logit));
    }
    let largest = lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, larger);
    let chunk = logits.chunks(TOGETHER).position(|chunk| has(chunk, |logit| logit == largest)).unwrap_or(0);
    let first = chunk * TOGETHER;
    (first + logits[first..].iter().position(|&logit| logit == largest).unwrap_or(0)) as u32
}

/// The `count` largest, in descending order, the lower id first on a tie.
fn largest(logits: &[f32], count: usize) -> Vec<(u32, f32)> {
    let mut all: Vec<(u32, f32)> = logits.iter().enumerate().map(|(id, &l)| (id as u32, l)).collect();
    let count = count.min(all.len());
    if count < all.len() && count > 0 {
        all.select_nth_unstable_by(count - 1, by_logit);
    }
    // Not what is left of all, which keeps the room for all: callers hold on to it.
    let mut best = all[..count].to_vec();
    best.sort_unstable_by(by_logit);
    best
}

/// The logarithm of a sum of `exp(logit)`, from the largest logit and the sum of the shares of its exponential, in units of 2^-39.
pub fn log_sum(largest: f32, shares: u64) -> f64 {
    f64::from(largest) + (shares as f64 / f64::from(ONE)).ln()
}

/// The most tokens of a head that are drawn from in the order of their probabilities. Of a larger one, which takes long to sort, the
/// order is that of the ids.
pub const SORTED_HEAD: usize = 4096;

/// The most probable tokens with their weights, as many as top-k, top-p and min-p leave; `None` if neither of the first two
/// has an effect.
fn head(logits: &[f32], sampling: &Sampling) -> Option<Vec<(u32, u64)>> {
    let (limit_k, limit_p) = (sampling.top_k > 0, sampling.top_p > 0.0 && sampling.top_p < 1.0);
    if !limit_k && !limit_p {
        return None;
    }
    let weight = Weight::of(logits, sampling);
    let ranking_from = |least| Ranking::new(logits, &weight, least);
    let mut ranking = ranking_from(if limit_k { below(logits, sampling.top_k) } else { f32::NEG_INFINITY });
    if limit_k && ranking.all().count < sampling.top_k {
        // Min-p has forbidden some of those.
        ranking = ranking_from(f32::NEG_INFINITY);
    }
    let (mut last, mut all) = (u64::MAX, ranking.all());
    if limit_k && sampling.top_k <= all.count {
        let first = ranking.first(last, |head| head.count >= sampling.top_k);
        (last, all) = first.expect("there are as many tokens");
    }
    if limit_p && all.count > 0 {
        let enough = f64::from(sampling.top_p) * all.sum as f64;
        let first = ranking.first(last, |head| head.sum as f64 >= enough);
        (last, _) = first.expect("all together are enough");
    }
    let mut head = ranking.up_to(last);
    if head.len() <= SORTED_HEAD {
        head.sort_unstable();
    }
    Some(head.into_iter().map(|place| (place as u32, ranking.kept(place))).collect())
}

/// A logit that at least `count` are not below, if there are as many numbers: so many parts of the vocabulary have a largest one that
/// is not below it.
fn below(logits: &[f32], count: usize) -> f32 {
    let largest = |logits: &[f32]| logits.iter().fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
    let mut largest: Vec<f32> = logits.chunks(LOOKED_AT).map(largest).collect();
    if count > largest.len() {
        return f32::NEG_INFINITY;
    }
    *largest.select_nth_unstable_by(count - 1, |a, b| b.total_cmp(a)).1
}

/// Logits that a ranking looks at together, or not at all.
const LOOKED_AT: usize = 32;

/// The tokens that min-p leaves, from the most probable one on. Of most of them it is enough to know about how far they are from the
/// largest logit: only those near the end of a head are sorted.
struct Ranking<'a> {
    logits: &'a [f32],
    weight: &'a Weight,
    /// By the distance from the largest logit; of those that are not below some logit.
    buckets: Vec<Bucket>,
}

/// How many tokens, and the sum of their weights.
#[derive(Clone, Copy, Default)]
struct Bucket {
    count: usize,
    sum: u64,
}

impl Bucket {
    fn add(&mut self, other: Bucket) {
        self.count += other.count;
        self.sum += other.sum;
    }
}

impl<'a> Ranking<'a> {
    /// Counts what is not below `least`.
    fn new(logits: &'a [f32], weight: &'a Weight, least: f32) -> Ranking<'a> {
        let mut buckets = vec![Bucket::default(); bucket(f32::INFINITY) + 1];
        let mut add = |logits: &[f32]| {
            let mut shares = [0.0; 16];
            shares.iter_mut().zip(logits).for_each(|(share, &logit)| *share = weight.share(logit));
            for (&share, &logit) in shares.iter().zip(logits) {
                let counts = (logit >= least) & (logit > f32::NEG_INFINITY) & (share >= weight.least);
                let sum = if counts { weight.counted(share) } else { 0 };
                buckets[bucket(weight.largest - logit)].add(Bucket { count: usize::from(counts), sum });
            }
        };
        for chunk in logits.chunks(LOOKED_AT).filter(|chunk| has(chunk, |logit| logit >= least)) {
            chunk.chunks(16).for_each(&mut add);
        }
        Ranking { logits, weight, buckets }
    }

    /// What was counted.
    fn all(&self) -> Bucket {
        let mut all = Bucket::default();
        self.buckets.iter().for_each(|&bucket| all.add(bucket));
        all
    }

    /// The place of the last token, and what there is up to it, in the smallest head that is `enough`, among the tokens up to the place
    /// `last`.
    fn first(&self, last: u64, enough: impl Fn(&Bucket) -> bool) -> Option<(u64, Bucket)> {
        let mut head = Bucket::default();
        let at = self.buckets.iter().position(|&bucket| {
            let mut longer = head;
            longer.add(bucket);
            let found = bucket.count > 0 && enough(&longer);
            head = if found { head } else { longer };
            found
        })?;
        let mut places = self.places(|logit| bucket(self.weight.largest - logit) == at);
        places.retain(|&place| place <= last);
        places.sort_unstable();
        places.into_iter().find_map(|place| {
            head.add(Bucket { count: 1, sum: self.kept(place) });
            enough(&head).then_some((place, head))
        })
    }

    /// The places up to `last`, in the order of the ids.
    fn up_to(&self, last: u64) -> Vec<u64> {
        let least = self.logits.get(last as u32 as usize).copied().unwrap_or(f32::NEG_INFINITY);
        let mut places = self.places(|logit| logit >= least);
        places.retain(|&place| place <= last);
        places
    }

    /// The places of the tokens whose logits are such, in the order of the ids.
    fn places(&self, are: impl Fn(f32) -> bool) -> Vec<u64> {
        let mut places = Vec::new();
        for (chunk, logits) in self.logits.chunks(LOOKED_AT).enumerate() {
            if has(logits, &are) {
                let first = chunk * LOOKED_AT;
                let those = |&(_, &logit): &(usize, &f32)| {
                    are(logit) && logit > f32::NEG_INFINITY && self.weight.keeps(logit)
                };
                let those = logits.iter().enumerate().filter(those);
                places.extend(those.map(|(id, &logit)| place((first + id) as u32, logit)));
            }
        }
        places
    }

    fn kept(&self, place: u64) -> u64 {
        self.weight.kept(self.logits[place as u32 as usize])
    }
}

/// Where distances from the largest logit are counted: 32 buckets for each power of two, so that they are narrow at every
/// temperature. Rounding keeps the order of distances, so no token of a bucket comes before one of an earlier bucket.
fn bucket(distance: f32) -> usize {
    // The distance of infinity from itself is no number.
    if distance > 0.0 { (distance.to_bits() >> 18) as usize } else { 0 }
}

/// What tokens are sorted by: descending logits as [`f32::total_cmp`] has them, then the id, which is in the lower half.
fn place(id: u32, logit: f32) -> u64 {
    let bits = logit.to_bits();
    let descending = if bits >> 31 == 0 { bits ^ (u32::MAX >> 1) } else { bits };
    u64::from(descending) << 32 | u64::from(id)
}

/// Descending, the lower id first on a tie.
fn by_logit(a: &(u32, f32), b: &(u32, f32)) -> std::cmp::Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// Temperature, then the inverse of the cumulative distribution over the head, or over what min-p leaves; `None` if nothing has a
/// weight.
fn draw(logits: &[f32], sampling: &Sampling, head: Option<&[(u32, u64)]>) -> Option<u32> {
    let random = random(sampling.seed, sampling.position);
    let target = |total: u64| ((u128::from(random) * u128::from(total)) >> 64) as u64;
    if let Some(head) = head {
        let weights = head.iter().map(|&(_, weight)| weight);
        let (place, _) = pick(target(weights.clone().sum()), weights)?;
        return Some(head[place].0);
    }
    // First the slice, then the token in it.
    const SLICE: usize = 4096;
    let weight = Weight::of(logits, sampling);
    let sums: Vec<u64> = logits.chunks(SLICE).map(|slice| weight.sum(slice)).collect();
    let (slice, target) = pick(target(sums.iter().sum()), sums.iter().copied())?;
    let first = slice * SLICE;
    let (place, _) = pick(target, logits[first..].iter().map(|&logit| weight.kept(logit)))?;
    Some((first + place) as u32)
}

/// The place at which the sum of weights first exceeds `target`, and what is left of that before it.
fn pick(mut target: u64, mut weights: impl Iterator<Item = u64>) -> Option<(usize, u64)> {
    let place = weights.position(|weight| {
        let found = target < weight;
        target -= if found { 0 } else { weight };
        found
    });
    Some((place?, target))
}

/// The logits of the distribution that is drawn from.
fn keep_only(logits: &mut [f32], sampling: &Sampling, head: Option<&[(u32, u64)]>) {
    let kept: Vec<(u32, f32)> = match head {
        Some(head) => head.iter().map(|&(id, _)| (id, logits[id as usize])).collect(),
        None => {
            let weight = Weight::of(logits, sampling);
            let kept = |&(_, &l): &(usize, &f32)| weight.keeps(l);
            logits.iter().enumerate().filter(kept).map(|(id, &l)| (id as u32, l)).collect()
        }
    };
    logits.fill(f32::NEG_INFINITY);
    kept.into_iter().for_each(|(id, l)| logits[id as usize] = l / sampling.temperature);
}

/// The largest weight: weights are counted in units of 2^-39 of it, so that their sums are those of integers, equal in any order,
/// and of 2^24 tokens fit.
const ONE: f32 = (1u64 << 39) as f32;

/// From a logit to its share of the largest probability, `exp((logit - largest) / temperature)`.
struct Weight {
    largest: f32,
    /// Powers of two per logit.
    rate: f32,
    /// The smallest weight that min-p leaves; the largest is `ONE`, so min-p is a bound on the weight itself.
    least: f32,
}

impl Weight {
    fn of(logits: &[f32], sampling: &Sampling) -> Weight {
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        Weight::new(largest, sampling.temperature, sampling.min_p)
    }

    fn new(largest: f32, temperature: f32, min_p: f32) -> Weight {
        // Finite, so that the largest logit's exponent is zero at every temperature.
        let rate = (std::f32::consts::LOG2_E / temperature).min(f32::MAX);
        Weight { largest, rate, least: min_p * ONE }
    }

    fn share(&self, logit: f32) -> f32 {
        share((logit - self.largest) * self.rate)
    }

    fn keeps(&self, logit: f32) -> bool {
        self.share(logit) >= self.least
    }

    fn kept(&self, logit: f32) -> u64 {
        self.counted(self.share(logit))
    }

    /// In units of `ONE`'s last; zero where min-p forbids it.
    fn counted(&self, share: f32) -> u64 {
        // To i64, since that is one instruction.
        if share >= self.least { share as i64 as u64 } else { 0 }
    }

    /// Of all weights; the shares of sixteen logits at a time, which are computed as vectors.
    fn sum(&self, logits: &[f32]) -> u64 {
        let (whole, rest) = logits.as_chunks::<16>();
        let mut sum = rest.iter().map(|&logit| self.kept(logit)).sum();
        for logits in whole {
            let mut shares = [0.0; 16];
            shares.iter_mut().zip(logits).for_each(|(share, &logit)| *share = self.share(logit));
            sum += shares.iter().map(|&share| self.counted(share)).sum::<u64>();
        }
        sum
    }
}

/// `ONE · 2^exponent` for exponents up to 0, to a relative error of 2^-23: by products and sums, each rounded, of which `share` in
/// sampling.cu does the same ones, so that a GPU finds the same bits. Of less than a unit, and of no number, comes less than a unit.
fn share(exponent: f32) -> f32 {
    // A sum with it ends in the integer nearest to the exponent, and ONE's.
    const SHIFT: f32 = 12_582_912.0 + 39.0; // 1.5 · 2^23
    let exponent = if exponent > -64.0 { exponent } else { -64.0 };
    let shifted = exponent + SHIFT;
    let rest = exponent - (shifted - SHIFT);
    // 2^rest within half of each side of 0, to 4e-9; 1 at 0.
    let mut power = 1.546_973_2e-4;
    for coefficient in [1.341_000_1e-3, 9.618_031e-3, 5.550_297_3e-2, 2.402_265e-1, 6.931_472_4e-1, 1.0f32] {
        power = power * rest + coefficient;
    }
    f32::from_bits(power.to_bits().wrapping_add(shifted.to_bits() << 23))
}

/// The number that draws a token, from Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
pub fn random(seed: u64, position: u64) -> u64 {
    let [a, b, ..] =
        philox([position as u32, (position >> 32) as u32, 0, 0], [seed as u32, (seed >> 32) as u32]);
    u64::from(a) << 32 | u64::from(b)
}

fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let first = u64::from(counter[0]) * 0xd251_1f53;
        let second = u64::from(counter[2]) * 0xcd9e_8d57;
        counter = [
            (second >> 32) as u32 ^ counter[1] ^ key[0],
            second as u32,
            (first >> 32) as u32 ^ counter[3] ^ key[1],
            first as u32,
        ];
        key = [key[0].wrapping_add(0x9e37_79b9), key[1].wrapping_add(0xbb67_ae85)];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_matches_the_published_vectors() {
        // kat_vectors of Random123.
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(
            philox([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn the_first_of_the_largest_is_found_wherever_it_is() {
        for size in [1, 15, 16, 1000, 1024, 1025, 5000] {
            for first in [0, size / 3, size - 1] {
                let mut logits: Vec<f32> = (0..size).map(|i| -((i % 7) as f32) - 1.0).collect();
                logits[first] = 0.5;
                logits[first + (size - first) / 2] = 0.5;
                assert_eq!(argmax(&logits), first as u32, "{size}");
                assert!(!is_corrupted(&logits));
                logits[first] = if first % 2 == 0 { f32::NAN } else { f32::NEG_INFINITY };
                assert!(is_corrupted(&logits), "{size}");
            }
        }
        assert_eq!(argmax(&[f32::NEG_INFINITY; 40]), 0);
    }

    #[test]
    fn shares_are_powers_of_two() {
        let exact = |exponent: f32| f64::from(ONE) * f64::from(exponent).exp2();
        let (mut worst, mut before) = (0f64, 0f32);
        for step in -3_900_000..=0 {
            let exponent = step as f32 * 1e-5;
            let found = share(exponent);
            worst = worst.max((f64::from(found) / exact(exponent) - 1.0).abs());
            assert!(found >= before * (1.0 - 1e-6), "{exponent}");
            before = found;
        }
        assert!(worst < 0.5f64.powi(23), "{worst}");
        assert_eq!(share(0.0), ONE);
        for nothing in [-39.1, -64.0, -1e30, f32::NEG_INFINITY, f32::NAN] {
            assert_eq!(share(nothing) as u64, 0, "{nothing}");
        }
    }

    #[test]
    fn the_token_is_the_first_whose_cumulative_weight_exceeds_the_random_share() {
        let logits: Vec<f32> =
            (0..9_005u32).map(|id| (id.wrapping_mul(2_654_435_761) >> 28) as f32).collect();
        let plain = Sampling { temperature: 1.3, top_p: 1.0, min_p: 1e-4, ..Sampling::default() };
        let weight = Weight::of(&logits, &plain);
        let weights: Vec<u64> = logits.iter().map(|&logit| weight.kept(logit)).collect();
        assert!(weights.contains(&0));
        let total: u64 = weights.iter().sum();
        for position in 0..200 {
            let sampling = Sampling { position, ..plain.clone() };
            let target = u128::from(random(sampling.seed, position)) * u128::from(total);
            let mut cumulative = 0;
            let expected = weights.iter().position(|&weight| {
                cumulative += weight;
                u128::from(cumulative) << 64 > target
            });
            assert_eq!(draw(&logits, &sampling, None), expected.map(|id| id as u32));
        }
    }

    fn frequencies(logits: &[f32], sampling: &Sampling, draws: u64) -> Vec<f64> {
        let mut counts = vec![0.0; logits.len()];
        for position in 0..draws {
            let sampling = Sampling { position, ..sampling.clone() };
            counts[sample(&mut logits.to_vec(), &sampling).token as usize] += 1.0 / draws as f64;
        }
        counts
    }

    fn check(sampling: &Sampling, expected: &[f64]) {
        let logits: Vec<f32> = [0.4f32, 0.3, 0.2, 0.1].iter().map(|p| p.ln()).collect();
        let found = frequencies(&logits, sampling, 20_000);
        for (f, e) in found.iter().zip(expected) {
            assert!(
                (f - e).abs() < 0.02 && (*e > 0.0 || *f == 0.0),
                "{sampling:?}: {found:?}, not {expected:?}"
            );
        }
    }

    #[test]
    fn draws_follow_the_filtered_distribution() {
        let plain = Sampling { temperature: 1.0, top_p: 1.0, ..Sampling::default() };
        check(&plain, &[0.4, 0.3, 0.2, 0.1]);
        check(&Sampling { top_k: 2, ..plain.clone() }, &[4.0 / 7.0, 3.0 / 7.0, 0.0, 0.0]);
        check(&Sampling { top_p: 0.65, ..plain.clone() }, &[4.0 / 7.0, 3.0 / 7.0, 0.0, 0.0]);
        check(&Sampling { top_p: 0.01, ..plain.clone() }, &[1.0, 0.0, 0.0, 0.0]);
        check(&Sampling { min_p: 0.45, ..plain.clone() }, &[4.0 / 9.0, 3.0 / 9.0, 2.0 / 9.0, 0.0]);
        check(
            &Sampling { temperature: 0.5, ..plain.clone() },
            &[16.0 / 30.0, 9.0 / 30.0, 4.0 / 30.0, 1.0 / 30.0],
        );
        check(
            &Sampling { bias: vec![(0, f32::NEG_INFINITY)], ..plain.clone() },
            &[0.0, 0.5, 2.0 / 6.0, 1.0 / 6.0],
        );
        check(&Sampling::default(), &[1.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn a_mask_forbids_what_is_not_in_it() {
        let plain = Sampling { temperature: 1.0, top_p: 1.0, ..Sampling::default() };
        check(&Sampling { mask: Some(Mask::of(&[1, 3])), ..plain.clone() }, &[0.0, 0.75, 0.0, 0.25]);
        check(&Sampling { mask: Some(Mask::of(&[2])), ..Sampling::default() }, &[0.0, 0.0, 1.0, 0.0]);
        let top_p = Sampling { mask: Some(Mask::of(&[1, 2, 99])), top_p: 0.5, ..plain };
        check(&top_p, &[0.0, 1.0, 0.0, 0.0]);

        // It is waited for.
        let mask = Mask::default();
        let sampling = Sampling { mask: Some(mask.clone()), ..Sampling::default() };
        let drawn = std::thread::spawn(move || sample(&mut [2.0, 1.0, 0.0], &sampling).token);
        mask.set(vec![0b110]);
        assert_eq!(drawn.join().unwrap(), 1);
        assert!(mask.allows(1) && !mask.allows(0) && !mask.allows(32));
    }

    #[test]
    fn top_p_over_a_flat_vocabulary_keeps_its_share() {
        let logits = vec![0.0f32; 5000];
        let sampling = Sampling { temperature: 1.0, top_p: 0.5, ..Sampling::default() };
        let found = frequencies(&logits, &sampling, 2000);
        assert!(found[2500..].iter().all(|&f| f == 0.0), "ties keep the lower ids");
        assert!(found[2000..2500].iter().any(|&f| f > 0.0));
    }

    #[test]
    fn heads_are_what_sorting_all_finds() {
        let noise = |id: u32| (id.wrapping_mul(2_654_435_761) >> 20) as f32 / 256.0;
        let mut logits: Vec<f32> = (0..20_011).map(noise).collect();
        logits[17] = f32::NEG_INFINITY;
        let mut sizes = Vec::new();
        for temperature in [0.4, 2.0, 30.0] {
            for top_k in [0, 1, 300, 5000, 30_000] {
                for (top_p, min_p) in [(1.0, 0.0), (1.0, 0.2), (0.3, 0.0), (0.97, 0.0), (0.97, 0.2)] {
                    let sampling = Sampling { temperature, top_k, top_p, min_p, ..Sampling::default() };
                    let weight = Weight::of(&logits, &sampling);
                    let mut all = largest(&logits, logits.len());
                    all.retain(|&(_, l)| l > f32::NEG_INFINITY && weight.keeps(l));
                    all.truncate(if top_k > 0 { top_k } else { usize::MAX });
                    let total: u64 = all.iter().map(|&(_, l)| weight.kept(l)).sum();
                    let mut cumulative = 0;
                    let last = all.iter().position(|&(_, l)| {
                        cumulative += weight.kept(l);
                        top_p < 1.0 && cumulative as f64 >= f64::from(top_p) * total as f64
                    });
                    all.truncate(last.map_or(usize::MAX, |last| last + 1));
                    if all.len() > SORTED_HEAD {
                        all.sort_by_key(|&(id, _)| id);
                    }
                    let expected: Vec<_> = all.into_iter().map(|(id, l)| (id, weight.kept(l))).collect();
                    let found = head(&logits, &sampling);
                    assert_eq!(found.is_some(), top_k > 0 || top_p < 1.0);
                    assert!(found.is_none_or(|found| found == expected), "{sampling:?}");
                    sizes.push(expected.len());
                }
            }
        }
        assert!(
            sizes.iter().any(|size| (2..256).contains(size)) && sizes.iter().any(|&size| size > SORTED_HEAD)
        );
    }

    /// What `head` finds, by selecting among all tokens.
    fn head_by_selecting(logits: &[f32], sampling: &Sampling) -> Option<Vec<(u32, u64)>> {
        let (limit_k, limit_p) = (sampling.top_k > 0, sampling.top_p > 0.0 && sampling.top_p < 1.0);
        if !limit_k && !limit_p {
            return None;
        }
        let weight = Weight::of(logits, sampling);
        let all = logits.iter().enumerate().filter(|&(_, &l)| l > f32::NEG_INFINITY && weight.keeps(l));
        let mut all: Vec<(u32, f32)> = all.map(|(id, &l)| (id as u32, l)).collect();
        if limit_k && sampling.top_k < all.len() {
            all.select_nth_unstable_by(sampling.top_k - 1, by_logit);
            all.truncate(sampling.top_k);
        }
        let sum = |some: &[(u32, f32)]| some.iter().map(|&(_, l)| weight.kept(l)).sum::<u64>();
        if limit_p {
            let enough = f64::from(sampling.top_p) * sum(&all) as f64;
            // The head ends within `low .. high`; what is before comes before in order, what is behind, behind.
            let (mut low, mut high, mut before) = (0, all.len(), 0);
            while high - low > 256 {
                let middle = (low + high) / 2;
                all[low..high].select_nth_unstable_by(middle - low, by_logit);
                let upper = before + sum(&all[low..middle]);
                if upper as f64 >= enough {
                    high = middle;
                } else {
                    (low, before) = (middle, upper);
                }
            }
            all[low..high].sort_unstable_by(by_logit);
            let last = all[low..high].iter().position(|&(_, l)| {
                before += weight.kept(l);
                before as f64 >= enough
            });
            all.truncate(last.map_or(high, |last| low + last + 1));
        }
        if all.len() <= SORTED_HEAD {
            all.sort_unstable_by(by_logit);
        } else {
            all.sort_unstable_by_key(|&(id, _)| id);
        }
        Some(all.into_iter().map(|(id, l)| (id, weight.kept(l))).collect())
    }

    #[test]
    fn heads_are_what_selecting_finds_whatever_the_logits() {
        let mut state = 1;
        let mut next = || {
            state += 1;
            random(3, state)
        };
        let mut sizes = Vec::new();
        for case in 0..96 {
            let size = [1, 2, 15, 16, 17, 33, 400, 6001][case % 8];
            // Many that are equal, about as many as there are, of both signs, and far apart.
            let distinct = [1, 3, 50, 1 << 24][next() as usize % 4];
            let scale = [1e-30, 0.01, 1.0, 10.0, 1e4, f32::MAX][next() as usize % 6];
            let offset = [0.0, -0.5, -30.0][next() as usize % 3];
            let mut noise = || {
                let steps = next() % distinct;
                (steps as f32 / distinct as f32 + offset) * scale
            };
            let mut logits: Vec<f32> = (0..size).map(|_| noise() + noise()).collect();
            for special in [
                &[][..],
                &[f32::NEG_INFINITY],
                &[f32::INFINITY],
                &[f32::NAN, -f32::NAN],
                &[0.0, -0.0],
                &[f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN, f32::MIN_POSITIVE, 1e-45],
            ][case % 6]
                .repeat(1 + size / 8)
            {
                logits[next() as usize % size] = special;
            }
            if case % 30 == 29 {
                logits.fill(f32::NEG_INFINITY);
            }
            for temperature in [1e-38, 0.3, 2.0, 1e30] {
                for top_k in [0, 1, 16, 300, 5000, 10_000] {
                    for top_p in [0.0, 1e-30, 0.5, 0.95, 0.999_999_94] {
                        for min_p in [0.0, 1e-20, 0.5] {
                            let sampling =
                                Sampling { temperature, top_k, top_p, min_p, ..Sampling::default() };
                            let found = head(&logits, &sampling);
                            assert!(
                                found == head_by_selecting(&logits, &sampling),
                                "case {case}, {sampling:?}"
                            );
                            sizes.extend(found.map(|head| head.len()));
                        }
                    }
                }
            }
        }
        for range in [0..1, 1..2, 2..300, 300..SORTED_HEAD + 1, SORTED_HEAD + 1..6002] {
            assert!(sizes.iter().any(|size| range.contains(size)), "{range:?}");
        }
    }

    /// Many answers keep such lists.
    #[test]
    fn lists_of_the_best_take_no_more_memory_than_they_need() {
        let found = score(&vec![0.5; 5000], 3, 2, &[]);
        assert_eq!((found.top.len(), found.top.capacity()), (2, 2));
    }

    #[test]
    fn penalties_and_logprobs() {
        let logits = [2.0f32, 1.9, -1.0];
        let mut penalties = Penalties {
            repetition: 2.0,
            frequency: 0.5,
            presence: 0.25,
            prompt: [0, 2, 5].into(),
            output: Vec::new(),
        };
        [7, 0, 3, 0].into_iter().for_each(|token| penalties.count(token));
        assert_eq!(penalties.seen().collect::<Vec<_>>(), [(0, 2), (2, 0), (3, 1), (5, 0), (7, 1)]);
        let sampling = Sampling {
            penalties: Some(penalties),
            logprobs: Some(Logprobs { top: 2, ..Logprobs::default() }),
            ..Sampling::default()
        };
        let mut changed = logits.to_vec();
        let sampled = sample(&mut changed, &sampling);
        assert_eq!(changed, [2.0 / 2.0 - 1.0 - 0.25, 1.9, -2.0]);
        assert_eq!(sampled.token, 1);
        let logprobs = sampled.logprobs.unwrap();
        assert_eq!((logprobs.rank, logprobs.top.len(), logprobs.top[0].0), (2, 2, 0));
        let total: f32 = score(&logits, 0, 3, &[]).top.iter().map(|(_, l)| l.exp()).sum();
        assert!((total - 1.0).abs() < 1e-6);
    }

    #[test]
    fn logprobs_of_given_tokens_and_of_the_distribution_that_is_drawn_from() {
        let logits: Vec<f32> = [0.4f32, 0.3, 0.2, 0.1].iter().map(|p| p.ln()).collect();
        let found = |sampling: Sampling| sample(&mut logits.clone(), &sampling).logprobs.unwrap();
        let close =
            |found: f32, expected: f32| assert!((found.exp() - expected).abs() < 1e-6, "{found}, {expected}");

        let ids = Logprobs { ids: vec![3, 1], top: 1, processed: false };
        let of =
            found(Sampling { logprobs: Some(ids.clone()), bias: vec![(0, -100.0)], ..Sampling::default() });
        assert_eq!((of.token, of.rank, of.top[0].0, of.top[1].0), (1, 2, 3, 1));
        close(of.top[0].1, 0.1);
        close(of.logprob, 0.3);

        let processed = Some(Logprobs { top: 4, processed: true, ids: Vec::new() });
        let drawn =
            Sampling { temperature: 0.5, top_k: 3, logprobs: processed.clone(), ..Sampling::default() };
        let of = found(drawn.clone());
        [16.0 / 29.0, 9.0 / 29.0, 4.0 / 29.0, 0.0].iter().zip(&of.top).for_each(|(&e, &(_, f))| close(f, e));
        let of = found(Sampling { top_k: 0, min_p: 0.5, ..drawn });
        [16.0 / 25.0, 9.0 / 25.0, 0.0].iter().zip(&of.top).for_each(|(&e, &(_, f))| close(f, e));
        let greedy = Sampling { mask: Some(Mask::of(&[1, 2])), logprobs: processed, ..Sampling::default() };
        close(found(greedy).logprob, 0.6);
    }

    use crate::backend::{Logprobs, Mask, Penalties};
}
