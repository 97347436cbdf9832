//! Compiles every `kernels/*.cu` to a fat binary in `OUT_DIR`, if the feature `kernels` is on.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

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
    println!("cargo::rerun-if-changed=src/fp4_layout.rs");
    println!("cargo::rerun-if-env-changed=CUDA_HOME");
    println!("cargo::rerun-if-env-changed=NIBBLE_CUDA_TARGET");
    let layout = std::fs::read_to_string("src/fp4_layout.rs").expect("the layout lies beside lib.rs");
    let header = header(&layout);
    if std::env::var_os("CARGO_FEATURE_KERNELS").is_none() {
        return;
    }
    let nvcc = nvcc();
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    std::fs::write(out.join("fp4_layout.cuh"), header).expect("OUT_DIR can be written");
    let entries = std::fs::read_dir("kernels").expect("the kernels lie beside build.rs");
    let files = entries.map(|entry| entry.expect("a readable folder").path());
    let sources = Mutex::new(files.filter(|file| file.extension().is_some_and(|e| e == "cu")));
    let next = || sources.lock().expect("nobody panics with it").next();
    let jobs = std::env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1);
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                while let Some(source) = next() {
                    let stem = source.file_stem().and_then(|s| s.to_str()).expect("a name in ASCII");
                    compile(&nvcc, &source, &targets(stem), &out.join(stem).with_extension("fatbin"));
                }
            });
        }
    });
}

/// `CUDA_HOME`, then `.cuda` at the workspace root, then `PATH`.
fn nvcc() -> PathBuf {
    let home = std::env::var_os("CUDA_HOME").map(PathBuf::from);
    let local = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.cuda/nvidia/cu13");
    let candidates = home.into_iter().chain([local]).map(|dir| dir.join("bin/nvcc"));
    candidates.into_iter().find(|path| path.is_file()).unwrap_or_else(|| "nvcc".into())
}

/// A file named `…_sm90` is for that generation alone; `…_sm100` for both chips of the generation. Of the others
/// `NIBBLE_CUDA_TARGET`, say `90a`, leaves all targets but one out, for development.
fn targets(stem: &str) -> Vec<String> {
    let chip = |n: &str| format!("arch=compute_{n}a,code=sm_{n}a");
    match stem.rsplit_once("_sm") {
        Some((_, "100")) => vec![chip("100"), chip("103")],
        Some((_, n)) => vec![chip(n)],
        None => match std::env::var("NIBBLE_CUDA_TARGET") {
            Ok(only) => vec![format!("arch=compute_{only},code=sm_{only}")],
            Err(_) => PORTABLE.map(str::to_owned).to_vec(),
        },
    }
}

/// A Rust file of constants and of functions whose body is one expression of `u32`, as C++. The operators used, their order
/// and their meaning for unsigned numbers are the same in both languages.
fn header(rust: &str) -> String {
    let mut cpp = "#pragma once\n#include <cstdint>\nnamespace layout {\n".to_owned();
    let mut lines = rust.lines().filter(|line| !line.starts_with("//"));
    while let Some(line) = lines.next() {
        if line.is_empty() {
            continue;
        }
        if let Some(constant) = line.strip_prefix("pub(crate) const ").and_then(|rest| rest.strip_suffix(';'))
        {
            let (name, value) = constant.split_once(": u32 = ").expect("a constant is a u32");
            cpp += &format!("constexpr uint32_t {name} = {value};\n");
            continue;
        }
        let function =
            line.strip_prefix("pub(crate) const fn ").and_then(|rest| rest.strip_suffix(") -> u32 {"));
        let (name, parameters) = function
            .and_then(|function| function.split_once('('))
            .unwrap_or_else(|| panic!("src/fp4_layout.rs: expected a constant or a function, found {line}"));
        let parameters: Vec<_> = parameters
            .split(", ")
            .map(|parameter| format!("uint32_t {}", parameter.strip_suffix(": u32").expect("a u32")))
            .collect();
        let body: Vec<_> = lines.by_ref().take_while(|&line| line != "}").map(str::trim).collect();
        let (body, parameters) = (body.join(" "), parameters.join(", "));
        assert!(!body.contains([';', '{']), "src/fp4_layout.rs: {name}: expected one expression");
        cpp += &format!("__host__ __device__ constexpr uint32_t {name}({parameters}) {{ return {body}; }}\n");
    }
    cpp + "}\n"
}

fn compile(nvcc: &Path, source: &Path, targets: &[String], fatbin: &Path) {
    let status = Command::new(nvcc)
        .args(["-O3", "-std=c++17", "--fatbin", "--threads=2", "--compress-mode=size"])
        .args(targets.iter().flat_map(|target| ["-gencode", target]))
        .arg("-I")
        .arg(fatbin.parent().expect("the fat binary lies in OUT_DIR"))
        .arg("-o")
        .args([fatbin, source])
        .status()
        .unwrap_or_else(|e| {
            panic!("cannot start {}: {e}; CONTRIBUTING.md names the command that fetches it", nvcc.display())
        });
    assert!(status.success(), "nvcc failed on {}", source.display());
}
