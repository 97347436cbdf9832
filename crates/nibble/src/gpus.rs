//! Which GPUs run a model, or several copies of it.

use crate::failure::{Failure, Result};

/// GPUs to choose from, by their numbers, in order.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Gpus {
    numbers: Vec<usize>,
    /// Each was named: all are to be used.
    named: bool,
}

/// Those that `--device` allows: several that it names, else the one that it names (for `auto` the first) and all after it.
/// `None` on a CPU, where `auto` also goes if there is no GPU.
pub(crate) fn gpus(device: &str) -> Result<Option<Gpus>> {
    match device {
        "cpu" => Ok(None),
        "auto" => Ok(if_any()?.map(|there| Gpus { numbers: (0..there.max(1)).collect(), named: false })),
        _ => Ok(Some(Gpus::of(numbers(device).map_err(Failure::input)?, there()?))),
    }
}

/// A name that `--device` may have, whatever the machine has.
pub(crate) fn device_name(text: &str) -> std::result::Result<String, String> {
    if !matches!(text, "auto" | "cpu") {
        numbers(text)?;
    }
    Ok(text.to_owned())
}

/// What `--device` says to run on these.
pub(crate) fn device(numbers: &[usize]) -> String {
    let numbers: Vec<String> = numbers.iter().map(usize::to_string).collect();
    format!("cuda:{}", numbers.join(","))
}

/// The numbers in `cuda:N,N`.
fn numbers(device: &str) -> std::result::Result<Vec<usize>, String> {
    let list = if device == "cuda" { Some("0") } else { device.strip_prefix("cuda:") };
    let numbers: Option<Vec<usize>> =
        list.and_then(|list| list.split(',').map(|n| n.parse::<u16>().ok().map(usize::from)).collect());
    let twice = |n: &[usize]| n.iter().enumerate().any(|(i, number)| n[..i].contains(number));
    numbers.filter(|numbers| !twice(numbers)).ok_or_else(|| {
        format!("expected auto, cpu, cuda or cuda:N[,N…] without a number twice, found {device}")
    })
}

/// How many there are.
#[cfg(feature = "cuda")]
fn there() -> Result<usize> {
    Ok(cuda::device_count()?)
}

/// The same, or `None`: a machine without a GPU is what `auto` is for, a GPU that does not work is worth an error.
#[cfg(feature = "cuda")]
fn if_any() -> Result<Option<usize>> {
    match cuda::device_count() {
        Err(gptoss::Error::NoDevice(_)) => Ok(None),
        count => Ok(Some(count?)),
    }
}

#[cfg(not(feature = "cuda"))]
fn if_any() -> Result<Option<usize>> {
    Ok(None)
}

/// A build without GPU kernels uses none.
#[cfg(not(feature = "cuda"))]
fn there() -> Result<usize> {
    Err(Failure::input("--device: expected auto or cpu in this build, found a GPU"))
}

impl Gpus {
    /// From the numbers that were named, on a machine that has so many.
    fn of(numbers: Vec<usize>, there: usize) -> Gpus {
        match numbers[..] {
            // One that is not there remains, for the driver to say so.
            [first] => Gpus { numbers: (first..there.max(first + 1)).collect(), named: false },
            _ => Gpus { numbers, named: true },
        }
    }

    /// Those of each of so many copies of a model, which take `each`; without such a number one, or an equal share of
    /// those that were named.
    pub(crate) fn divided(&self, copies: usize, each: Option<usize>) -> Result<Vec<Vec<usize>>> {
        let there = self.numbers.len();
        let each = each.unwrap_or(if self.named { (there / copies).max(1) } else { 1 });
        let wanted = each.saturating_mul(copies);
        if wanted > there || (self.named && wanted < there) {
            let which = if self.named { "" } else { "at most " };
            let first = self.numbers.first().copied().unwrap_or(0);
            let whose =
                if self.named { "that --device names".to_owned() } else { format!("from cuda:{first} on") };
            return Err(Failure::input(format!(
                "--tensor-parallel-size times --data-parallel-size: expected {which}{there}, the GPUs {whose}, found {each} \
                 times {copies}"
            )));
        }
        Ok(self.numbers.chunks(each).take(copies).map(<[usize]>::to_vec).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What runs where, on a machine with `there` GPUs.
    fn check(name: &str, there: usize, copies: usize, each: Option<usize>, expected: &[&str]) {
        let gpus = Gpus::of(numbers(name).unwrap(), there);
        let found: Vec<String> =
            gpus.divided(copies, each).unwrap().iter().map(|numbers| device(numbers)).collect();
        assert_eq!(found, expected, "{name}");
    }

    #[test]
    fn one_stands_for_itself_and_those_after_it() {
        check("cuda", 4, 1, None, &["cuda:0"]);
        check("cuda:1", 4, 1, None, &["cuda:1"]);
        check("cuda:1", 4, 1, Some(2), &["cuda:1,2"]);
        check("cuda", 2, 2, None, &["cuda:0", "cuda:1"]);
        check("cuda:1", 6, 2, Some(2), &["cuda:1,2", "cuda:3,4"]);
        check("cuda:7", 2, 1, None, &["cuda:7"]);
    }

    #[test]
    fn several_are_all_used_in_their_order() {
        check("cuda:0,1", 4, 1, None, &["cuda:0,1"]);
        check("cuda:3,1", 4, 1, Some(2), &["cuda:3,1"]);
        check("cuda:3,1", 4, 2, None, &["cuda:3", "cuda:1"]);
        check("cuda:0,2,4,6", 8, 2, None, &["cuda:0,2", "cuda:4,6"]);
        check("cuda:0,2,4,6", 8, 4, Some(1), &["cuda:0", "cuda:2", "cuda:4", "cuda:6"]);
    }

    #[test]
    fn other_sizes_are_refused() {
        let refused = |name: &str, copies, each, named: &str| {
            let error = Gpus::of(numbers(name).unwrap(), 2).divided(copies, each).unwrap_err().message;
            assert!(error.ends_with(named), "{error}");
        };
        refused("cuda", 1, Some(3), "expected at most 2, the GPUs from cuda:0 on, found 3 times 1");
        refused("cuda:1", 2, None, "expected at most 1, the GPUs from cuda:1 on, found 1 times 2");
        refused("cuda:0,1", 1, Some(1), "expected 2, the GPUs that --device names, found 1 times 1");
        refused("cuda:0,1,2", 2, None, "expected 3, the GPUs that --device names, found 1 times 2");
        refused("cuda:0,1", 3, None, "expected 2, the GPUs that --device names, found 1 times 3");
    }

    #[test]
    fn other_names_are_none() {
        for name in [
            "gpu",
            "cuda:",
            "cuda:x",
            "cuda:0,",
            "cuda:0,0",
            "cuda:-1",
            "cuda:0;1",
            "cuda:99999999999999999999",
        ] {
            assert!(device_name(name).unwrap_err().contains("cuda:N[,N…]"), "{name}");
        }
    }
}
