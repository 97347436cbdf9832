//! Packs `o200k_base.tiktoken` into `data/o200k.bin`: for each rank a length and its bytes, deflated.
//!
//! `cargo run -p tokenizer --example pack_vocabulary -- o200k_base.tiktoken crates/tokenizer/data/o200k.bin`

use std::io::Write;

use base64::Engine;
use sha2::{Digest, Sha256};

const SHA256: &str = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(from), Some(to)) = (args.next(), args.next()) else { return Err("expected two paths".into()) };
    let source = std::fs::read(&from)?;
    let digest: String = Sha256::digest(&source).iter().map(|b| format!("{b:02x}")).collect();
    if digest != SHA256 {
        return Err(format!("{from}: expected the digest {SHA256}, found {digest}").into());
    }
    let mut out = flate2::write::ZlibEncoder::new(std::fs::File::create(to)?, flate2::Compression::best());
    for (rank, line) in std::str::from_utf8(&source)?.lines().enumerate() {
        let (token, id) = line.split_once(' ').ok_or("expected `base64 SPACE rank`")?;
        if id.parse() != Ok(rank) {
            return Err(format!("expected rank {rank}, found {id}").into());
        }
        let bytes = base64::prelude::BASE64_STANDARD.decode(token)?;
        out.write_all(&[u8::try_from(bytes.len())?])?;
        out.write_all(&bytes)?;
    }
    out.finish()?;
    Ok(())
}
