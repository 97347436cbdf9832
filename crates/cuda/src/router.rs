//! The router: which kernels choose the experts of tokens, and put the activations in the order of their products.

use gptoss::Error;

use crate::arena::max_slots;
use crate::attention::MAX_PARTS;
use crate::backend::{Cuda, Layer};
use crate::packed::TILE_COLS;
use crate::params::{Gather, ORDERED, Router, RouterGather};

/// The router's limit.
pub(crate) const MAX_EXPERTS: usize = 256;
/// Experts per token that one block puts together.
pub(crate) const MAX_RANKS: usize = 16;
/// Up to so many tokens the router shares a token's experts among blocks.
const ROUTER_FEW: usize = 160;
/// Bytes of counters of the router's sorting warps: sixteen of all experts.
const ROUTER_COUNTS: usize = 16 * MAX_EXPERTS * 4;
/// Tokens that a block of `router_many` takes at a time, and its own shared memory.
const ROUTER_TOKENS: usize = 8;
const ROUTER_STATIC: usize = 21 << 10;
/// Of router_gather.cuh's kernels: experts, at most, and their own shared memory.
pub(crate) const ROUTER_GATHER_EXPERTS: usize = 32;
const ROUTER_GATHER_STATIC: usize = 6 << 10;
/// Blocks that share a token's inputs in `router_gather` where it is to sum as `router_many`.
const INVARIANT_SHARES: usize = 2;
/// Tokens of a block of router_gather_many_sm90.cu, at most.
const ROUTER_GATHER_TOKENS: usize = 64;

/// A kernel that norms, routes and gathers, whose blocks are all at work at a time.
pub(crate) struct Gathering {
    name: &'static str,
    /// Clusters, or blocks.
    groups: usize,
    /// Blocks of a cluster, which share a token's inputs.
    shares: usize,
    /// Tokens of a cluster, or block.
    each: usize,
}

impl Cuda {
    /// The kernel that takes `n` tokens from norm to gathering, where there is one. If the batch may not matter, it is one that sums as
    /// `router_many`.
    pub(crate) fn gathering(&self, n: usize) -> Option<Gathering> {
        let invariant = self.options.batch_invariant;
        let (config, multiprocessors) = (&self.config, self.device.multiprocessors());
        let fits = self.device.capability() == 90
            && self.many(n)
            && config.experts <= ROUTER_GATHER_EXPERTS
            && config.hidden_size % TILE_COLS == 0
            && config.hidden_size >= 4 * TILE_COLS;
        if !fits {
            return None;
        }
        let has_room = |shares| self.gathering_shared(shares) <= self.device.shared_bytes();
        let clusters = n.div_ceil(ROUTER_TOKENS);
        // All blocks must have room at a time. The multiprocessors of a cluster are of one of up to eight groups, in each of which some may
        // be left over; but all are pairs.
        let possible: &[usize] = if invariant { &[INVARIANT_SHARES] } else { &[4, 2] };
        let shares = possible.iter().copied().find(|&shares| {
            let left_over = if shares > 2 { 8 * (shares - 1) } else { 0 };
            clusters * shares + left_over <= multiprocessors && has_room(shares)
        });
        if let Some(shares) = shares {
            return Some(Gathering { name: "router_gather", groups: clusters, shares, each: ROUTER_TOKENS });
        }
        let each = n.div_ceil(multiprocessors);
        let many = Gathering { name: "router_gather_many", groups: n.div_ceil(each), shares: 1, each };
        (!invariant && each <= ROUTER_GATHER_TOKENS && has_room(1)).then_some(many)
    }

    /// Shared memory of a block, one of those that share a token's inputs: its own, the norm's scales, the weights and the warps' sums.
    fn gathering_shared(&self, shares: usize) -> usize {
        let inputs = (self.config.hidden_size / TILE_COLS).div_ceil(shares) * TILE_COLS;
        let experts = self.config.experts;
        ROUTER_GATHER_STATIC + inputs * 4 + ROUTER_GATHER_EXPERTS * (inputs * 2 + 32) + 16 * experts * 9 * 4
    }

    /// Norm, router and the activations in the slots of the experts.
    pub(crate) fn route_and_gather(
        &self,
        layer: &Layer,
        n: usize,
        gathering: &Gathering,
    ) -> Result<(), Error> {
        let &Gathering { name, groups, shares, each } = gathering;
        let params = RouterGather {
            residual: self.arena.residual.address(),
            norm_scale: layer.post_attention_norm.address(),
            weights: layer.router.address(),
            bias: layer.router_bias.address(),
            out: self.arena.gathered.address(),
            routes: self.arena.routes.address(),
            barrier: self.arena.router_barrier.address(),
            counts: self.arena.router_counts.address(),
            hidden: self.config.hidden_size as u32,
            n: n as u32,
            experts: self.config.experts as u32,
            experts_per_token: self.config.experts_per_token as u32,
            format: layer.gate_up.format(),
            stack: self.slot_stack(n),
            eps: self.config.rms_norm_eps,
            each: each as u32,
        };
        let grid = [groups as u32, shares as u32, 1];
        let shared = self.gathering_shared(shares) - ROUTER_GATHER_STATIC;
        // SAFETY: the arena has room for all slots of these tokens, and for the counts of a block of each multiprocessor; `gathering` has
        // seen that all blocks have room at a time.
        unsafe { self.device.launch_clusters(name, grid, shares as u32, 512, shared, &params) }
    }

    /// Norm and router: what experts_few.cuh takes, or the routes and the normed tokens, in the slots of the experts where they are stacked.
    pub(crate) fn route(&self, layer: &Layer, n: usize, few_each: bool) -> Result<(), Error> {
        let config = &self.config;
        let format = layer.gate_up.format();
        // Few tokens: the experts are shared among blocks. Many: a warp per token.
        let share = (2 * self.device.multiprocessors() / n).clamp(1, config.experts) as u32;
        let params = Router {
            residual: self.arena.residual.address(),
            norm_scale: layer.post_attention_norm.address(),
            weights: layer.router.address(),
            bias: layer.router_bias.address(),
            out: self.arena.normed.address(),
            logits: self.arena.router_logits.address(),
            routes: if few_each && self.own_routes(n) > 0 { 0 } else { self.arena.routes.address() },
            arrivals: self.arena.arrivals.address() + 4 * MAX_PARTS as u64,
            hidden: config.hidden_size as u32,
            cols: layer.gate_up.padded_cols() as u32,
            n: n as u32,
            experts: config.experts as u32,
            experts_per_token: config.experts_per_token as u32,
            format,
            eps: config.rms_norm_eps,
            shares: share,
            stack: if few_each || self.many(n) { ORDERED } else { 0 },
            padding: 0,
        };
        let few = n <= ROUTER_FEW && !self.options.batch_invariant;
        // The norm's scales and, if there is room, the weights of 32 experts, with 32 bytes beside each.
        let bytes = |experts: usize| config.hidden_size * 4 + experts * (config.hidden_size * 2 + 32);
        let room = self.device.shared_bytes() - ROUTER_STATIC;
        // Where the blocks of the experts make their routes, none are sorted.
        let counts = if params.routes > 0 { ROUTER_COUNTS } else { 0 };
        match [32, 16].into_iter().find(|&experts| bytes(experts) <= room).filter(|_| !few) {
            None => {
                let grid = [share, n as u32, 1];
                // SAFETY: the arena has MAX_TOKENS rows of each, and one counter more than that.
                unsafe { self.device.launch("router", grid, 256, counts, &params)? };
            }
            Some(together) => {
                let params = Router { shares: together as u32, ..params };
                let blocks = n.div_ceil(ROUTER_TOKENS).min(self.device.multiprocessors());
                let shared = bytes(together).max(ROUTER_COUNTS);
                // SAFETY: as above.
                unsafe { self.device.launch("router_many", [blocks as u32, 1, 1], 512, shared, &params)? };
            }
        }
        if few_each || !self.many(n) {
            return Ok(());
        }
        let params = Gather {
            input: self.arena.normed.address(),
            routes: self.arena.routes.address(),
            out: self.arena.gathered.address(),
            cols: layer.gate_up.padded_cols() as u32,
            n: n as u32,
            experts: config.experts as u32,
            experts_per_token: config.experts_per_token as u32,
            stack: self.slot_stack(n),
            padding: 0,
        };
        let blocks = max_slots(config, n).div_ceil(8) as u32;
        // SAFETY: the router's list names rows of these tokens; the arena has room for all slots.
        unsafe { self.device.launch("gather", [blocks, 1, 1], 256, 0, &params) }
    }
}
