//! How much memory this process can still take.

use std::fs::read_to_string;
use std::path::Path;

/// Bytes that are left on the machine, below this process's limit of addresses, and below the limits of the control groups that it
/// is in, as those of a container. `None` if the system does not say.
pub(crate) fn available() -> Option<usize> {
    let info = read_to_string("/proc/meminfo").unwrap_or_default();
    let of_machine = kilobytes(&info, "MemAvailable:");
    let limits = read_to_string("/proc/self/limits").unwrap_or_default();
    let status = read_to_string("/proc/self/status").unwrap_or_default();
    let groups = read_to_string("/proc/self/cgroup").unwrap_or_default();
    let below_limits = below_limits(Path::new("/sys/fs/cgroup"), &groups);
    of_machine.into_iter().chain(addresses(&limits, &status)).chain(below_limits).min()
}

/// What is left of the addresses that this process may have, if they are limited.
fn addresses(limits: &str, status: &str) -> Option<usize> {
    Some(field(limits, "Max address space")?.saturating_sub(kilobytes(status, "VmSize:")?))
}

/// Of each limited group in `groups`, and of those around it, what is left; `root` is where they are mounted. A container may see
/// no more than its own group, as the root.
fn below_limits(root: &Path, groups: &str) -> Vec<usize> {
    let mut left = Vec::new();
    for line in groups.lines() {
        // The hierarchy's number, its controllers, the group's path. Version 2 has all controllers and names none.
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
        let (root, limit, usage, inactive) = if controllers.is_empty() {
            (root.to_owned(), "memory.max", "memory.current", "inactive_file ")
        } else if controllers.split(',').any(|controller| controller == "memory") {
            (root.join("memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file ")
        } else {
            continue;
        };
        let group = root.join(path.trim_start_matches('/'));
        for group in group.ancestors().take_while(|group| group.starts_with(&root)) {
            let number = |file| read_to_string(group.join(file)).ok()?.trim().parse::<usize>().ok();
            let (Some(limit), Some(usage)) = (number(limit), number(usage)) else { continue };
            // Pages of files that nobody has looked at lately are given back when memory is needed.
            let statistics = read_to_string(group.join("memory.stat")).unwrap_or_default();
            let inactive = field(&statistics, inactive).unwrap_or(0);
            left.push(limit.saturating_sub(usage.saturating_sub(inactive)));
        }
    }
    left
}

/// The number of kilobytes behind `name` at the beginning of a line, in bytes.
fn kilobytes(text: &str, name: &str) -> Option<usize> {
    field(text, name)?.checked_mul(1024)
}

/// The number behind `name` at the beginning of a line.
fn field(text: &str, name: &str) -> Option<usize> {
    text.lines().find_map(|line| line.strip_prefix(name))?.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_of_limited_addresses() {
        let limits = |soft: &str| {
            format!(
                "Max resident set          unlimited            unlimited            bytes\n\
                     Max address space         {soft}           unlimited            bytes\n"
            )
        };
        let status = "Name:\tnibble\nVmPeak:\t  500 kB\nVmSize:\t  400 kB\n";
        assert_eq!(addresses(&limits("2048000"), status), Some(2_048_000 - 400 * 1024));
        assert_eq!(addresses(&limits("1024"), status), Some(0));
        assert_eq!(addresses(&limits("unlimited"), status), None);
    }

    #[test]
    fn what_is_left_below_the_limits_of_groups() {
        let root = tempfile::tempdir().unwrap();
        for (file, contents) in [
            ("a/memory.max", "1000\n"),
            ("a/memory.current", "700\n"),
            ("a/memory.stat", "anon 100\ninactive_file 200\nactive_file 400\n"),
            ("a/b/memory.max", "max\n"),
            ("a/b/memory.current", "600\n"),
            ("a/b/c/memory.max", "500\n"),
            ("a/b/c/memory.current", "550\n"),
            ("memory/memory.limit_in_bytes", "9000\n"),
            ("memory/memory.usage_in_bytes", "4000\n"),
            ("memory/memory.stat", "inactive_file 1\ntotal_inactive_file 1500\n"),
            ("memory/d/memory.limit_in_bytes", "9223372036854771712\n"),
            ("memory/d/memory.usage_in_bytes", "712\n"),
        ] {
            let file = root.path().join(file);
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(file, contents).unwrap();
        }
        for (groups, expected) in [
            ("0::/a\n", vec![500]),
            ("0::/a/b/c\n", vec![0, 500]),
            ("2:cpu,cpuacct:/a\n1:memory,x:/d\n0::/\n", vec![9_223_372_036_854_771_000, 6500]),
            // The path is that of the host, the root the group itself.
            ("4:memory:/docker/0123\n", vec![6500]),
            ("0::/\nnonsense\n", vec![]),
        ] {
            assert_eq!(below_limits(root.path(), groups), expected, "{groups}");
        }
    }
}
