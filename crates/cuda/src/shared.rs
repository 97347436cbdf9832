//! A model that several GPUs share: what they exchange, and the sum of what each adds to the residual stream.

use std::sync::Arc;

use bytemuck::Zeroable;
use checkpoint::{Config, Shard, Weights};
use gptoss::Error;

use crate::arena::MAX_TOKENS;
use crate::backend::{Cuda, Options, no_room};
use crate::device::{Buffer, Device, Pinned};
use crate::driver::Address;
use crate::one::OneToken;
use crate::packed::{PackedMatrix, TILE_ROWS};
use crate::params::{AllReduce, Epilogue, Norm, Peers, SharedNorm, Together};
use crate::products::{GEMM_ROW_TILES, LogitRows, SOME_TOKENS};

/// shared.cuh
const MAX_GPUS: usize = 8;
/// all_reduce.cu: threads of a block, and vectors of a thread.
const THREADS: usize = 64;
const TOGETHER: usize = 4;
/// shared.cuh: vectors in a row that are one GPU's, and bytes of a vector.
const OWNED: usize = 16;
const VECTOR_BYTES: usize = 8;
/// Tokens times GPUs beyond the second from which on each GPU sums a share instead of all: fewer bytes, but two ways.
const DIVIDED_FROM: usize = 128;

/// What a GPU has beside its share of the weights. The first one leads: it also has the others, which take the same steps.
pub(crate) struct Shared {
    rank: usize,
    /// Of the whole model.
    pub(crate) config: Config,
    pub(crate) followers: Vec<Cuda>,
    /// f32 `[tokens, hidden]`: what attention adds; zero before a layer
    added: Buffer,
    /// Of the two sums of a layer, behind attention and behind the experts: see shared.cuh. All bits are set before and after.
    received: [Received; 2],
    /// u64 `[MAX_GPUS, SOME_TOKENS]`, see product_some_sm90.cu
    bests: Buffer,
    /// For steps of one token, where all ranks have kernels for those.
    words: Option<Words>,
    /// Where each rank has what the others read or write.
    ranks: Vec<Places>,
}

/// What other GPUs write for this one.
enum Received {
    /// Into its memory.
    Near(Buffer),
    /// Into the host's, where one cannot reach another's.
    ByHost(Pinned),
}

impl Received {
    fn new(device: &Arc<Device>, bytes: usize, near: bool) -> Result<Received, Error> {
        if near {
            return Ok(Received::Near(device.filled(bytes, 0xff)?));
        }
        let mut memory = device.pinned(bytes)?;
        memory.slice_mut::<u8>().fill(0xff);
        Ok(Received::ByHost(memory))
    }

    fn address(&self) -> Address {
        match self {
            Received::Near(buffer) => buffer.address(),
            Received::ByHost(memory) => memory.address(),
        }
    }

    fn is_by_host(&self) -> bool {
        matches!(self, Received::ByHost(_))
    }
}

/// Sums that come to the others as words: see one.cuh. All bits are set before and after.
struct Words {
    /// f32 `[MAX_GPUS, share words]`, of layers in turn
    shares: [Buffer; 2],
    share_words: usize,
    /// f32 `[MAX_GPUS, hidden]`
    projected: Buffer,
}

/// Addresses on one GPU.
#[derive(Debug, Clone, Copy)]
struct Places {
    received: [Address; 2],
    shares: [Address; 2],
    projected: Address,
    logits: Address,
    bests: Address,
}

/// Of so many vectors those that a GPU sums, with what fills up the last group.
fn share_of(vectors: usize, ranks: usize) -> usize {
    vectors.div_ceil(OWNED * ranks) * OWNED
}

impl Words {
    fn new(device: &Arc<Device>, share_words: usize, hidden: usize) -> Result<Words, Error> {
        let filled = |each: usize| device.filled(MAX_GPUS * each * 4, 0xff);
        let shares = [filled(share_words)?, filled(share_words)?];
        Ok(Words { shares, share_words, projected: filled(hidden)? })
    }
}

impl Shared {
    /// `near`: all GPUs can reach one another's memory.
    fn new(
        device: &Arc<Device>,
        rank: usize,
        ranks: usize,
        config: &Config,
        near: bool,
    ) -> Result<Shared, Error> {
        let vectors = MAX_TOKENS * config.hidden_size / 4;
        let room = match ranks {
            ..=2 => vectors,
            _ => vectors + (ranks - 1) * share_of(vectors, ranks),
        };
        let received = || Received::new(device, room * VECTOR_BYTES, near);
        Ok(Shared {
            rank,
            config: config.clone(),
            followers: Vec::new(),
            added: device.buffer(MAX_TOKENS * config.hidden_size * 4)?,
            received: [received()?, received()?],
            bests: device.buffer(MAX_GPUS * SOME_TOKENS * 8)?,
            words: None,
            ranks: Vec::new(),
        })
    }

    /// `logits`: where this GPU has them.
    fn places(&self, logits: Address) -> Places {
        let words = self.words.as_ref();
        Places {
            received: self.received.each_ref().map(Received::address),
            shares: words.map_or([0; 2], |words| words.shares.each_ref().map(Buffer::address)),
            projected: words.map_or(0, |words| words.projected.address()),
            logits,
            bests: self.bests.address(),
        }
    }

    /// How the first or the second sum of a layer goes for `n` tokens.
    fn peers(&self, sum: usize, n: usize) -> Peers {
        let (ranks, vectors) = (self.ranks.len(), n * self.config.hidden_size / 4);
        let divided = n * ranks.saturating_sub(2) >= DIVIDED_FROM;
        let mut peers = Peers {
            rank: self.rank as u32,
            ranks: ranks as u32,
            stride: if divided { share_of(vectors, ranks) } else { vectors } as u32,
            divided: divided.into(),
            by_host: self.is_by_host().into(),
            ..Zeroable::zeroed()
        };
        for (i, places) in self.ranks.iter().enumerate() {
            peers.received[i] = places.received[sum];
        }
        peers
    }

    /// Whether the host's memory is what these GPUs exchange sums by.
    pub(crate) fn is_by_host(&self) -> bool {
        self.received.iter().any(Received::is_by_host)
    }

    /// What the kernels of one token in this layer have of the others.
    pub(crate) fn together(&self, layer: usize) -> Option<Together> {
        let words = self.words.as_ref()?;
        let mut together = Together {
            read: words.shares[(layer + 1) % 2].address(),
            rank: self.rank as u32,
            ranks: self.ranks.len() as u32,
            share_words: words.share_words as u32,
            ..Zeroable::zeroed()
        };
        for (i, places) in self.ranks.iter().enumerate() {
            (together.shares[i], together.projected[i]) = (places.shares[layer % 2], places.projected);
        }
        Some(together)
    }

    /// Where the projection of attention adds what it finds.
    pub(crate) fn attention(&self) -> Address {
        self.added.address()
    }

    /// Adds what all ranks found behind attention to the residual stream of `n` tokens.
    pub(crate) fn add_attention(&self, cuda: &Cuda, n: usize) -> Result<(), Error> {
        let vectors = n * self.config.hidden_size / 4;
        let params = AllReduce {
            peers: self.peers(0, n),
            added: self.added.address(),
            residual: cuda.arena.residual.address(),
            vectors: vectors as u32,
            padding: 0,
        };
        let blocks = vectors.div_ceil(THREADS * TOGETHER);
        // SAFETY: `received` has room for MAX_TOKENS rows of each GPU, and this one may write there. All ranks launch the same kernels in the same
        // order, and blocks that wait come to their multiprocessors in the order of their numbers.
        unsafe { cuda.device.launch("all_reduce", [blocks as u32, 1, 1], THREADS as u32, 0, &params) }
    }

    /// Whether the output layer has rows for each GPU.
    pub(crate) fn divides(&self, unembedding: &PackedMatrix) -> bool {
        unembedding.row_tiles() / GEMM_ROW_TILES >= self.ranks.len()
    }

    /// This GPU's rows of the logits and the largest of them, to the one that leads, which puts these together.
    pub(crate) fn logits(
        &self,
        cuda: &Cuda,
        normed: Address,
        n: usize,
        epilogue: Epilogue,
    ) -> Result<(), Error> {
        let (matrix, count) = (cuda.unembedding.params(), self.ranks.len());
        let groups = cuda.unembedding.row_tiles() / GEMM_ROW_TILES;
        let cut = |rank: usize| groups * rank / count * GEMM_ROW_TILES;
        let tiles = cut(self.rank)..cut(self.rank + 1);
        let first = tiles.start * TILE_ROWS;
        let leader = self.ranks[0];
        let out = if epilogue.out == 0 { 0 } else { leader.logits + 4 * first as u64 };
        let rows = LogitRows {
            lane: 0,
            bests: leader.bests,
            first: first as u32,
            all: matrix.rows,
            rank: self.rank as u32,
            ranks: count as u32,
        };
        cuda.product_of_some(matrix.rows_of(tiles), 1, normed, n, Epilogue { out, ..epilogue }, rows)
    }

    /// Adds what the experts of all ranks found, and does `norm`.
    pub(crate) fn add_experts(&self, cuda: &Cuda, norm: Norm) -> Result<(), Error> {
        let params = SharedNorm { norm, peers: self.peers(1, norm.n as usize) };
        // SAFETY: as in `add_attention`; the routes are of the same tokens.
        unsafe { cuda.device.launch("rms_norm_shared", [norm.n, 1, 1], cuda.norm_threads(), 0, &params) }
    }
}

impl Cuda {
    /// As [`Cuda::load`], on several GPUs that share every layer's heads and every expert's units (tensor parallelism). Each has the
    /// keys and values of its own heads; the first has the answers. Where one cannot reach another's memory, they exchange by the host's.
    ///
    /// # Errors
    /// Also if the model cannot be divided among so many.
    pub fn load_shared(
        devices: &[Arc<Device>],
        weights: &dyn Weights,
        options: Options,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Cuda, Error> {
        let (config, count) = (weights.config(), devices.len());
        let shards: Option<Vec<Shard<'_>>> =
            (0..count).map(|rank| Shard::new(weights, rank, count)).collect();
        let shards = shards.filter(|_| (1..=MAX_GPUS).contains(&count)).ok_or_else(|| {
            Error::Unsupported(format!(
                "a model of {} key/value heads, {} queries in all heads and experts of {} units on {count} GPUs, of which there may be at most \
                 {MAX_GPUS}: each takes as many whole heads as the others, a multiple of 32 queries, and at least 32 units",
                config.kv_heads,
                config.query_heads * config.head_dim,
                config.intermediate_size
            ))
        })?;
        // Of GPUs of different size each would choose kernels of its own, which do not add alike.
        let least = devices.iter().map(|device| device.multiprocessors()).min().unwrap_or(0);
        let devices =
            devices.iter().map(|device| device.no_larger_than(least)).collect::<Result<Vec<_>, _>>()?;
        let mut near = true;
        for device in &devices {
            if device.compute_capability() != devices[0].compute_capability() {
                return Err(Error::Unsupported(format!(
                    "a model on {} and {}, where all GPUs must be of one generation",
                    devices[0].name(),
                    device.name()
                )));
            }
            for peer in &devices {
                near &= device.reaches_memory_of(peer)?;
            }
        }
        let load = |rank: usize, progress: &mut dyn FnMut(usize, usize)| {
            let shared = Shared::new(&devices[rank], rank, count, config, near)
                .map_err(|e| no_room(e, &devices[rank], "sums of several GPUs"))?;
            Cuda::load_with(&devices[rank], &shards[rank], options, Some(shared), progress)
        };
        let (first, others) = std::thread::scope(|scope| {
            let load = &load;
            let others: Vec<_> =
                (1..count).map(|rank| scope.spawn(move || load(rank, &mut |_, _| {}))).collect();
            let first = load(0, progress);
            let joined = others.into_iter().map(|thread| thread.join().expect("loading does not panic"));
            (first, joined.collect::<Result<Vec<Cuda>, Error>>())
        });
        let mut all = vec![first?];
        all.extend(others?);
        share_single_tokens(&mut all)?;
        let places =
            |cuda: &Cuda| cuda.shared.as_ref().map(|shared| shared.places(cuda.arena.logits.address()));
        let ranks: Vec<Places> = all.iter().filter_map(places).collect();
        all.iter_mut().filter_map(|cuda| cuda.shared.as_mut()).for_each(|s| s.ranks.clone_from(&ranks));
        let followers = all.split_off(1);
        let mut leader = all.remove(0);
        if let Some(shared) = &mut leader.shared {
            shared.followers = followers;
        }
        Ok(leader)
    }
}

/// Prepares steps of one token, if all ranks have kernels for those that fit together; else none has. Every block of those reads what all
/// ranks give, for which the host's memory is too far away.
fn share_single_tokens(all: &mut [Cuda]) -> Result<(), Error> {
    let shapes =
        all.iter().map(|cuda| cuda.one.as_ref().filter(|one| one.shares_are_near()).map(OneToken::shares));
    let mut shapes: Vec<_> = shapes.collect();
    shapes.dedup();
    for cuda in all {
        match (&shapes[..], &mut cuda.shared) {
            (&[Some((share_words, _))], Some(shared)) if !shared.is_by_host() => {
                let words = Words::new(&cuda.device, share_words, cuda.config.hidden_size);
                shared.words = Some(words.map_err(|e| no_room(e, &cuda.device, "sums of several GPUs"))?);
            }
            _ => cuda.one = None,
        }
    }
    Ok(())
}
