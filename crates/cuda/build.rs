//! Compiles every `kernels/*.cu` to a fat binary in `OUT_DIR`, if the feature `kernels` is on.

use std::path::{Path, PathBuf};
use std::process::Command;

/// What the files without a suffix are compiled for. The last entry is what an unknown later chip translates.
const PORTABLE: [&str; 7] = [
    "arch=compute_80,code=sm_80",
    "arch=compute_89,code=sm_89",
    "arch=compute_90a,code=sm_90a",
    "arch=compute_100a,code=sm_100a",
    "arch=compute_103a,code=sm_103a",
    "arch=compute_120a,code=sm_120a",
    "arch=compute_80,code=compute_80",
];

fn main() {
    println!("cargo::rerun-if-changed=kernels");
    println!("cargo::rerun-if-env-changed=CUDA_HOME");
    if std::env::var_os("CARGO_FEATURE_KERNELS").is_none() {
        return;
    }
    let nvcc = nvcc();
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    for entry in std::fs::read_dir("kernels").expect("the kernels lie beside build.rs") {
        let source = entry.expect("a readable folder").path();
        if source.extension().is_some_and(|e| e == "cu") {
            let stem = source.file_stem().and_then(|s| s.to_str()).expect("a name in ASCII");
            compile(&nvcc, &source, &targets(stem), &out.join(stem).with_extension("fatbin"));
        }
    }
}

/// `CUDA_HOME`, then `.cuda` at the workspace root, then `PATH`.
fn nvcc() -> PathBuf {
    let home = std::env::var_os("CUDA_HOME").map(PathBuf::from);
    let local = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.cuda/nvidia/cu13");
    let candidates = home.into_iter().chain([local]).map(|dir| dir.join("bin/nvcc"));
    candidates.into_iter().find(|path| path.is_file()).unwrap_or_else(|| "nvcc".into())
}

/// A file named `…_sm90` is for that generation alone.
fn targets(stem: &str) -> Vec<String> {
    match stem.rsplit_once("_sm") {
        Some((_, n)) => vec![format!("arch=compute_{n}a,code=sm_{n}a")],
        None => PORTABLE.map(str::to_owned).to_vec(),
    }
}

fn compile(nvcc: &Path, source: &Path, targets: &[String], fatbin: &Path) {
    let status = Command::new(nvcc)
        .args(["-O3", "-std=c++17", "--fatbin", "--threads=2", "--compress-mode=size"])
        .args(targets.iter().flat_map(|target| ["-gencode", target]))
        .arg("-o")
        .args([fatbin, source])
        .status()
        .unwrap_or_else(|e| {
            panic!("cannot start {}: {e}; CONTRIBUTING.md names the command that fetches it", nvcc.display())
        });
    assert!(status.success(), "nvcc failed on {}", source.display());
}
