//! Where each of several engines runs: on GPUs of its own, or with its share of the CPU's threads.

use std::ops::Range;

use crate::args::Common;
use crate::failure::{Failure, Result};
use crate::loaded::first_gpu;
use crate::model::threads;

/// As many places as engines, from what the command line says for all of them. On GPUs each takes so many.
pub(crate) fn places(common: &Common, count: usize, gpus_each: usize) -> Result<Vec<Common>> {
    if count == 1 {
        return Ok(vec![common.clone()]);
    }
    match first_gpu(&common.device)? {
        Some(first) => on_gpus(common, count, gpus_each, first..gpu_count()?),
        None => on_threads(common, count, threads(common)),
    }
}

#[cfg(feature = "cuda")]
fn gpu_count() -> Result<usize> {
    Ok(cuda::device_count()?)
}

/// A build without GPU kernels uses none.
#[cfg(not(feature = "cuda"))]
fn gpu_count() -> Result<usize> {
    Ok(0)
}

/// `gpus`: from the first to use to the last that there is.
fn on_gpus(common: &Common, count: usize, each: usize, gpus: Range<usize>) -> Result<Vec<Common>> {
    let most = gpus.len() / each.max(1);
    if most < count {
        return Err(Failure::input(format!(
            "--data-parallel-size: expected at most {most}, since this machine has {} GPUs, the first to use is number {} and \
             each engine takes {each}, found {count}",
            gpus.end, gpus.start
        )));
    }
    let place = |number| Common { device: format!("cuda:{}", gpus.start + number * each), ..common.clone() };
    Ok((0..count).map(place).collect())
}

/// The first ones get what is left over.
fn on_threads(common: &Common, count: usize, threads: usize) -> Result<Vec<Common>> {
    if threads < count {
        return Err(Failure::input(format!(
            "--data-parallel-size: expected at most {threads}, a thread for each, found {count}"
        ))
        .hint("--threads N allows more threads"));
    }
    let place = |number| {
        let own = threads / count + usize::from(number < threads % count);
        Common { threads: Some(u16::try_from(own).unwrap_or(u16::MAX)), ..common.clone() }
    };
    Ok((0..count).map(place).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn common(device: &str) -> Common {
        Common { json: false, quiet: true, device: device.to_owned(), threads: Some(7) }
    }

    #[test]
    fn threads_are_divided() {
        let threads = |count| {
            let places = places(&common("cpu"), count, 1)?;
            Ok::<_, Failure>(places.iter().map(|place| place.threads.unwrap()).collect::<Vec<_>>())
        };
        assert_eq!(threads(1).unwrap(), [7]);
        assert_eq!(threads(3).unwrap(), [3, 2, 2]);
        assert_eq!(threads(7).unwrap(), [1; 7]);
        let error = threads(8).unwrap_err().message;
        assert_eq!(error, "--data-parallel-size: expected at most 7, a thread for each, found 8");
    }

    #[test]
    fn gpus_follow_the_first() {
        let devices = |count, each, gpus| {
            let places = on_gpus(&common("auto"), count, each, gpus)?;
            Ok::<_, Failure>(places.into_iter().map(|place| place.device).collect::<Vec<_>>())
        };
        assert_eq!(devices(2, 1, 0..2).unwrap(), ["cuda:0", "cuda:1"]);
        assert_eq!(devices(3, 1, 1..4).unwrap(), ["cuda:1", "cuda:2", "cuda:3"]);
        assert_eq!(devices(2, 2, 1..6).unwrap(), ["cuda:1", "cuda:3"]);
        let error = devices(3, 2, 1..6).unwrap_err().message;
        for part in ["at most 2", "6 GPUs", "number 1", "takes 2", "found 3"] {
            assert!(error.contains(part), "{error}");
        }
        assert!(devices(2, 1, 4..4).unwrap_err().message.contains("at most 0"));
    }
}
