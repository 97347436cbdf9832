//! Where each of several engines runs: on GPUs of its own, or with its share of the CPU's threads.

use crate::args::Common;
use crate::failure::{Failure, Result};
use crate::gpus::{device, gpus};
use crate::model::threads;

/// As many places as engines, from what the command line says for all of them. On GPUs each takes `gpus_each`, if that is said.
pub(crate) fn places(common: &Common, count: usize, gpus_each: Option<u16>) -> Result<Vec<Common>> {
    if count == 1 {
        return Ok(vec![common.clone()]);
    }
    let Some(gpus) = gpus(&common.device)? else { return on_threads(common, count, threads(common)) };
    let place = |numbers: &Vec<usize>| Common { device: device(numbers), ..common.clone() };
    Ok(gpus.divided(count, gpus_each.map(usize::from))?.iter().map(place).collect())
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
            let places = places(&common("cpu"), count, None)?;
            Ok::<_, Failure>(places.iter().map(|place| place.threads.unwrap()).collect::<Vec<_>>())
        };
        assert_eq!(threads(1).unwrap(), [7]);
        assert_eq!(threads(3).unwrap(), [3, 2, 2]);
        assert_eq!(threads(7).unwrap(), [1; 7]);
        let error = threads(8).unwrap_err().message;
        assert_eq!(error, "--data-parallel-size: expected at most 7, a thread for each, found 8");
    }
}
