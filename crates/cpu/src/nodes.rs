//! Memory nodes: a machine with several processors has memory near each, and reads its own faster than the others'.
//!
//! So threads stay with a node, each matrix has a part near those of each node, and they take that part of every product. With one
//! node nothing is bound and everything is in the order that it has.

use std::ops::Range;

/// CPUs that a bit mask of the system's has room for.
const MOST_CPUS: usize = libc::CPU_SETSIZE as usize;

/// The CPUs of each memory node that this process may use: one list for each node that has any.
pub(crate) fn of_this_machine() -> Vec<Vec<usize>> {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let nodes = numbers(&read("/sys/devices/system/node/online"));
    let cpus = nodes.into_iter().map(|node| read(&format!("/sys/devices/system/node/node{node}/cpulist")));
    allowed(cpus, &allowed_cpus(&read("/proc/self/status")))
}

/// The list `Cpus_allowed_list` of a `/proc/self/status`.
pub(crate) fn allowed_cpus(status: &str) -> String {
    status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap_or_default().to_owned()
}

/// Of each node's list what is in another list.
fn allowed(nodes: impl Iterator<Item = String>, list: &str) -> Vec<Vec<usize>> {
    let allowed = numbers(list);
    let cpus =
        |node: String| numbers(&node).into_iter().filter(|cpu| allowed.contains(cpu)).collect::<Vec<_>>();
    nodes.map(cpus).filter(|cpus| !cpus.is_empty()).collect()
}

/// The numbers of a list such as `0-3,8`, up to the first that is none, and below [`MOST_CPUS`].
pub(crate) fn numbers(list: &str) -> Vec<usize> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.parse().ok()?..=last.parse::<usize>().ok()?.min(MOST_CPUS - 1))
    };
    list.trim().split(',').map_while(range).flatten().collect()
}

/// Which threads are of which node: as large a share of them as the node has of the CPUs.
#[derive(Debug)]
pub(crate) struct Nodes {
    cpus: Vec<Vec<usize>>,
    /// The first thread of each node, and how many threads there are.
    borders: Vec<usize>,
}

impl Nodes {
    /// `cpus`: those of each node, one at least.
    pub(crate) fn new(cpus: Vec<Vec<usize>>, threads: usize) -> Nodes {
        let all: usize = cpus.iter().map(Vec::len).sum();
        let mut before = 0;
        let mut borders = vec![0];
        for node in &cpus {
            before += node.len();
            borders.push((threads * before + all / 2) / all);
        }
        // One node, or one that has no thread: none is told from another.
        if borders.len() <= 2 || borders.windows(2).any(|pair| pair[0] == pair[1]) {
            return Nodes { cpus: Vec::new(), borders: vec![0, threads] };
        }
        Nodes { cpus, borders }
    }

    /// How many there are, one at least.
    pub(crate) fn count(&self) -> usize {
        self.borders.len() - 1
    }

    /// The part of `0..count` that is of a node.
    pub(crate) fn part(&self, node: usize, count: usize) -> Range<usize> {
        let threads = self.borders[self.count()];
        let border = |node: usize| count * self.borders[node] / threads;
        border(node)..border(node + 1)
    }

    /// Has the calling thread, one of `0..threads`, run on the CPUs of its node only, if there are several nodes. Where the
    /// system does not let it, it runs anywhere.
    pub(crate) fn bind(&self, thread: usize) {
        if self.count() == 1 {
            return;
        }
        let node = self.borders.partition_point(|&first| first <= thread) - 1;
        // SAFETY: a mask of zeros is an empty one; the CPUs are below its size, see `numbers`; the call reads the mask.
        unsafe {
            let mut mask: libc::cpu_set_t = std::mem::zeroed();
            self.cpus[node].iter().for_each(|&cpu| libc::CPU_SET(cpu, &mut mask));
            libc::sched_setaffinity(0, size_of_val(&mask), &raw const mask);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_cpus_are_read() {
        assert_eq!(numbers("0-3,8,10-11\n"), [0, 1, 2, 3, 8, 10, 11]);
        assert!(numbers("").is_empty());
        assert_eq!(numbers("3-1,7"), [7]);
        assert_eq!(numbers("0,x,2"), [0]);
        assert_eq!(numbers("1022-99999999").len(), 2);
        assert_eq!(allowed_cpus("Name:\tx\nCpus_allowed_list:\t0-3\nMems:"), "\t0-3");
    }

    #[test]
    fn nodes_have_the_cpus_that_may_be_used() {
        let nodes = || ["0-3,8-11", "4-7,12-15", ""].map(str::to_owned).into_iter();
        assert_eq!(allowed(nodes(), "\t0-15"), [[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]]);
        assert_eq!(allowed(nodes(), "2-4"), [vec![2, 3], vec![4]]);
        assert_eq!(allowed(nodes(), "0-3"), [[0, 1, 2, 3]]);
        assert!(allowed(nodes(), "").is_empty());
    }

    #[test]
    fn threads_are_shared_among_the_nodes() {
        let borders = |cpus: &[usize], threads: usize, count: usize| {
            let nodes = Nodes::new(cpus.iter().map(|&n| (0..n).collect()).collect(), threads);
            let mut borders = vec![0];
            for part in (0..nodes.count()).map(|node| nodes.part(node, count)) {
                assert_eq!(borders.last(), Some(&part.start), "parts one after the other");
                borders.push(part.end);
            }
            borders
        };
        assert_eq!(borders(&[8, 8], 16, 360), [0, 180, 360]);
        assert_eq!(borders(&[8, 8], 3, 90), [0, 60, 90]);
        assert_eq!(borders(&[6, 2], 8, 100), [0, 75, 100]);
        // Fewer threads than nodes, one node, none known.
        assert_eq!(borders(&[4, 4, 4], 2, 7), [0, 7]);
        assert_eq!(borders(&[8], 8, 7), [0, 7]);
        assert_eq!(borders(&[], 8, 7), [0, 7]);
    }

    /// A thread may run on its node's CPUs only; where the system has no such CPU, anywhere.
    #[test]
    fn threads_stay_with_their_nodes() {
        let cpus = numbers(&allowed_cpus(&std::fs::read_to_string("/proc/self/status").unwrap()));
        let (first, last) = (cpus[0], cpus[cpus.len() - 1]);
        let nodes = Nodes::new(vec![vec![first], vec![last], vec![MOST_CPUS - 1]], 6);
        let bound = &|thread: usize| {
            nodes.bind(thread);
            numbers(&allowed_cpus(&std::fs::read_to_string("/proc/thread-self/status").unwrap()))
        };
        std::thread::scope(|scope| {
            let found: Vec<_> = (0..6).map(|i| scope.spawn(move || bound(i))).collect();
            let found: Vec<_> = found.into_iter().map(|thread| thread.join().unwrap()).collect();
            assert_eq!(found[..2], [[first], [first]]);
            assert_eq!(found[2..4], [[last], [last]]);
            assert_eq!(found[4..], [cpus.clone(), cpus.clone()]);
        });
    }
}
