//! API keys: kept and compared as SHA-256 digests.

use axum::http::{HeaderMap, header};
use sha2::{Digest, Sha256};

/// The digests of the keys that are let in; without any, everybody is.
#[derive(Debug)]
pub(crate) struct Keys(Vec<[u8; 32]>);

impl Keys {
    pub(crate) fn new(keys: &[String]) -> Keys {
        Keys(keys.iter().map(|key| digest(key.as_bytes())).collect())
    }

    /// Whether anybody is let in.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether the request is let in. The time it takes depends on the number of keys only.
    pub(crate) fn admit(&self, headers: &HeaderMap) -> bool {
        if self.0.is_empty() {
            return true;
        }
        let Some(key) = bearer(headers) else { return false };
        let digest = digest(key);
        let mut found = 0u8;
        for known in &self.0 {
            let difference = known.iter().zip(&digest).fold(0, |difference, (a, b)| difference | (a ^ b));
            found |= u8::from(difference == 0);
        }
        found != 0
    }
}

/// Whom a request belongs to, by its key.
pub(crate) fn owner(headers: &HeaderMap) -> Option<[u8; 32]> {
    bearer(headers).map(digest)
}

/// What logs call a key: the first 6 hexadecimal digits of its digest.
pub(crate) fn key_id(headers: &HeaderMap) -> Option<String> {
    bearer(headers).map(|key| hex(&digest(key)[..3]))
}

/// Lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

pub(crate) fn digest(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let value = headers.get(header::AUTHORIZATION)?.as_bytes();
    let (scheme, key) = value.split_at_checked("Bearer ".len())?;
    scheme.eq_ignore_ascii_case(b"Bearer ").then_some(key)
}
