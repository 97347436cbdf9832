//! Names for requests and calls that nobody guesses by counting.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::auth::{digest, hex};

/// 32 hexadecimal digits, different each time: the digest of a secret of this process and a counter.
pub(crate) fn identifier() -> String {
    static SECRET: OnceLock<[u64; 4]> = OnceLock::new();
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    // The standard library seeds each state from the system's random source.
    let secret = SECRET.get_or_init(|| [(); 4].map(|()| RandomState::new().build_hasher().finish()));
    let mut bytes: Vec<u8> = secret.iter().flat_map(|word| word.to_le_bytes()).collect();
    bytes.extend(COUNTER.fetch_add(1, Ordering::Relaxed).to_le_bytes());
    hex(&digest(&bytes)[..16])
}
