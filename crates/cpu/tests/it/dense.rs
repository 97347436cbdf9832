//! Products of f32 matrices against sums in f64.

use cpu::{Pool, Rows, Update, products};

fn noise(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed * 2 + 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

#[test]
fn products_are_sums_over_the_columns() {
    // Rows that are no multiple of eight or three, more columns than one pass takes, strides longer than rows.
    for (m, n, k) in [(1, 1, 16), (9, 4, 32), (70, 100, 528), (130, 7, 1040), (3, 5, 0)] {
        let (a, b) = (noise(m * (k + 16), 1), noise(n * (k + 32), 2));
        let first = noise(m * (n + 3), 3);
        for (update, sign, keep) in
            [(Update::Set, 1.0, 0.0), (Update::Add, 1.0, 1.0), (Update::Subtract, -1.0, 1.0)]
        {
            let run = |threads| {
                let mut out = first.clone();
                let (a, b) = (Rows::within(&a, m, k, k + 16), Rows::within(&b, n, k, k + 32));
                products(&Pool::new(threads), a, b, &mut out, n + 3, update);
                out
            };
            let out = run(2);
            assert_eq!(out, run(1), "any number of threads gives the same bits");
            for i in 0..m {
                for j in 0..n + 3 {
                    let before = f64::from(first[i * (n + 3) + j]);
                    let expected = if j < n {
                        let dot: f64 = (0..k)
                            .map(|c| f64::from(a[i * (k + 16) + c]) * f64::from(b[j * (k + 32) + c]))
                            .sum();
                        keep * before + sign * dot
                    } else {
                        before
                    };
                    let found = f64::from(out[i * (n + 3) + j]);
                    assert!(
                        (found - expected).abs() < 1e-4,
                        "{m} {n} {k} {update:?} {i} {j}: {found} {expected}"
                    );
                }
            }
        }
    }
}
