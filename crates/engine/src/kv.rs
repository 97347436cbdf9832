//! Blocks of the key/value cache: which sequence holds which, and which keep a prefix that another prompt may share.
//!
//! There are two pools, for the layers that see everything and for those that see a window. A pool is one flat `Vec` with
//! reference counts and an intrusive list of the blocks nobody holds, least recently used first. A block that is full is
//! remembered under (its predecessor's identity, its 16 tokens): the key is compared in full, so two prompts share a block
//! only if every token up to its end is equal. Identities are serial numbers that are never used twice.
//!
//! Costs, with `b` blocks in the sequence at hand:
//!
//! | operation | time |
//! |---|---|
//! | take, retain, release, forget one block | O(1) |
//! | [`Blocks::open`] (look up, retain, take) | O(b), one hash of 72 bytes per block of the cached prefix |
//! | [`Blocks::grow`] | O(blocks taken) |
//! | [`Blocks::advance`] | O(blocks that became full or left the window), one hash each |
//! | [`Blocks::close`] | O(b) |
//! | [`Blocks::reset_prefixes`] | O(all blocks) |
//!
//! A sliding layer needs only the window before the next token. Blocks that leave the window are released at once, but
//! stay findable until someone takes them; a cached prefix is usable up to those of its block boundaries before which the
//! window's sliding blocks are all still there.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use gptoss::{BLOCK_TOKENS, BlockId};

/// Stands in a list of sliding blocks for one that left the window.
pub const RELEASED: BlockId = BlockId::MAX;

/// The tokens of a sequence: a prompt, which several may share, and what was generated.
#[derive(Debug, Clone)]
pub struct Tokens {
    prompt: Arc<[u32]>,
    output: Vec<u32>,
}

impl Tokens {
    /// A prompt with nothing after it.
    pub fn new(prompt: Arc<[u32]>) -> Tokens {
        Tokens { prompt, output: Vec::new() }
    }

    /// Appends a generated token.
    pub fn push(&mut self, token: u32) {
        self.output.push(token);
    }

    /// Tokens of the prompt.
    pub fn prompt_len(&self) -> usize {
        self.prompt.len()
    }

    /// All tokens.
    #[expect(clippy::len_without_is_empty, reason = "prompts are not empty")]
    pub fn len(&self) -> usize {
        self.prompt.len() + self.output.len()
    }

    /// Copies the tokens at these positions.
    pub fn range(&self, positions: Range<usize>) -> Vec<u32> {
        positions.map(|p| self.at(p)).collect()
    }

    /// The token at a position.
    pub(crate) fn at(&self, position: usize) -> u32 {
        match position.checked_sub(self.prompt.len()) {
            None => self.prompt[position],
            Some(generated) => self.output[generated],
        }
    }

    fn block(&self, index: usize) -> [u32; BLOCK_TOKENS] {
        std::array::from_fn(|i| self.at(index * BLOCK_TOKENS + i))
    }
}

/// The blocks of one sequence.
#[derive(Debug)]
pub struct Table {
    /// Shared with a step's plan while that runs. Both lists change between steps, when they are not, so nothing is copied.
    full: Arc<Vec<BlockId>>,
    sliding: Arc<Vec<BlockId>>,
    /// Sliding blocks below this index were released.
    released: usize,
    /// This many leading blocks are full and were offered to the prefix cache.
    offered: usize,
    /// Identity of the last of them.
    parent: u64,
}

impl Table {
    /// Blocks of the full layers, in order.
    pub fn full(&self) -> &Arc<Vec<BlockId>> {
        &self.full
    }

    /// Blocks of the sliding layers, in order; those before the window are [`RELEASED`].
    pub fn sliding(&self) -> &Arc<Vec<BlockId>> {
        &self.sliding
    }
}

/// The identity that starts every chain of blocks which all requests share.
pub const SHARED: u64 = 0;

/// Both pools and the prefix cache.
#[derive(Debug)]
pub struct Blocks {
    full: Pool<Prefix>,
    /// Content: the full block that remembers this one.
    sliding: Pool<BlockId>,
    prefixes: HashMap<Key, BlockId>,
    last_identity: u64,
    window: usize,
}

/// Identity of the predecessor, tokens.
type Key = (u64, [u32; BLOCK_TOKENS]);

/// What a full block of the prefix cache holds.
#[derive(Debug)]
struct Prefix {
    key: Key,
    identity: u64,
    sliding: Option<BlockId>,
}

/// How much of a prompt is cached.
struct Hit {
    full: Vec<BlockId>,
    /// The sliding blocks of the window before the end of the hit.
    window: Vec<BlockId>,
    identity: u64,
}

impl Blocks {
    /// All blocks free. `window`: positions that a sliding layer sees, the current one included.
    pub fn new(full: usize, sliding: usize, window: usize) -> Blocks {
        Blocks {
            full: Pool::new(full),
            sliding: Pool::new(sliding),
            prefixes: HashMap::new(),
            last_identity: SHARED,
            window,
        }
    }

    /// Blocks of the full layers: (held by sequences, all).
    pub fn full_usage(&self) -> (usize, usize) {
        self.full.usage()
    }

    /// Blocks of the sliding layers: (held by sequences, all).
    pub fn sliding_usage(&self) -> (usize, usize) {
        self.sliding.usage()
    }

    /// Blocks that can be taken, of each kind.
    pub fn free(&self) -> usize {
        self.full.free.min(self.sliding.free)
    }

    /// An identity for the start of a chain that is shared with nobody who does not know it.
    pub fn new_identity(&mut self) -> u64 {
        self.last_identity += 1;
        self.last_identity
    }

    /// Starts a sequence: takes from the prefix cache what it can, at most `limit` positions, and full blocks for all of
    /// `tokens`. Beside the table comes the number of positions that need not be computed.
    ///
    /// `None`, and nothing changes, unless `reserve` blocks of each kind stay free, and beside them the sliding blocks of a window:
    /// who begins with fewer is soon in need of those that others hold.
    pub fn open(
        &mut self,
        root: u64,
        tokens: &Tokens,
        limit: usize,
        reserve: usize,
    ) -> Option<(Table, usize)> {
        // Who begins needs a block of each kind: without, its prefix need not be looked for.
        if reserve >= self.full.free || reserve >= self.sliding.free {
            return None;
        }
        let hit = self.longest_prefix(root, tokens, limit);
        let cached = hit.full.len();
        let fresh = tokens.len().div_ceil(BLOCK_TOKENS) - cached;
        let sliding = (self.window.div_ceil(BLOCK_TOKENS) + 1).min(cached + fresh) - hit.window.len();
        if fresh + self.full.idle(&hit.full) + reserve > self.full.free
            || sliding.max(1) + self.sliding.idle(&hit.window) + reserve > self.sliding.free
        {
            return None;
        }
        hit.full.iter().for_each(|&b| self.full.retain(b));
        hit.window.iter().for_each(|&b| self.sliding.retain(b));
        let released = cached - hit.window.len();
        let mut sliding = vec![RELEASED; released];
        sliding.extend(hit.window);
        let mut full = hit.full;
        for _ in 0..fresh {
            full.extend(self.take_full());
        }
        let (full, sliding) = (Arc::new(full), Arc::new(sliding));
        let table = Table { full, sliding, released, offered: cached, parent: hit.identity };
        Some((table, cached * BLOCK_TOKENS))
    }

    /// Takes blocks so that positions below `end` can be written; the result is how far they reach, at most `end`.
    pub fn grow(&mut self, table: &mut Table, end: usize) -> usize {
        let blocks = end.div_ceil(BLOCK_TOKENS);
        while table.full.len() < blocks
            && let Some(block) = self.take_full()
        {
            Arc::make_mut(&mut table.full).push(block);
        }
        while table.sliding.len() < blocks.min(table.full.len())
            && let Some(block) = self.take_sliding()
        {
            Arc::make_mut(&mut table.sliding).push(block);
        }
        (table.sliding.len() * BLOCK_TOKENS).min(end)
    }

    /// Positions below `computed` are written: remembers blocks that became full, releases those that left the window.
    pub fn advance(&mut self, table: &mut Table, tokens: &Tokens, computed: usize) {
        while (table.offered + 1) * BLOCK_TOKENS <= computed {
            let index = table.offered;
            let key = (table.parent, tokens.block(index));
            let full = match self.prefixes.get(&key) {
                // Someone else computed the same: ours stays private.
                Some(&other) => other,
                None => {
                    let identity = self.new_identity();
                    let own = table.full[index];
                    self.full.blocks[own as usize].content = Some(Prefix { key, identity, sliding: None });
                    self.prefixes.insert(key, own);
                    own
                }
            };
            let prefix = self.full.content(full);
            table.parent = prefix.identity;
            if prefix.sliding.is_none() && index >= table.released {
                let own = table.sliding[index];
                prefix.sliding = Some(own);
                self.sliding.blocks[own as usize].content = Some(full);
            }
            table.offered += 1;
        }
        let first = self.first_in_window(computed).min(table.sliding.len());
        while table.released < first {
            let block = std::mem::replace(&mut Arc::make_mut(&mut table.sliding)[table.released], RELEASED);
            self.sliding.release(block);
            table.released += 1;
        }
    }

    /// Gives all blocks back, the last first, so that the heads of prefixes outlive their tails.
    pub fn close(&mut self, table: Table) {
        let Table { full, sliding, released, .. } = table;
        sliding.iter().skip(released).rev().for_each(|&block| self.sliding.release(block));
        full.iter().rev().for_each(|&block| self.full.release(block));
    }

    /// Forgets every cached prefix. Sequences keep their blocks.
    pub fn reset_prefixes(&mut self) {
        self.prefixes.clear();
        self.full.blocks.iter_mut().for_each(|b| b.content = None);
        self.sliding.blocks.iter_mut().for_each(|b| b.content = None);
    }

    /// The first block that a token at `position` sees in a sliding layer.
    fn first_in_window(&self, position: usize) -> usize {
        (position + 1).saturating_sub(self.window) / BLOCK_TOKENS
    }

    fn longest_prefix(&mut self, root: u64, tokens: &Tokens, limit: usize) -> Hit {
        let limit = limit.min(tokens.len() - 1) / BLOCK_TOKENS;
        let mut chain: Vec<(BlockId, Option<BlockId>, u64)> = Vec::new();
        let mut parent = root;
        // The length of the longest usable prefix, and the number of sliding blocks just before the end of the chain.
        let (mut usable, mut contiguous) = (0, 0);
        while chain.len() < limit
            && let Some(&block) = self.prefixes.get(&(parent, tokens.block(chain.len())))
        {
            let prefix = self.full.content(block);
            parent = prefix.identity;
            contiguous = if prefix.sliding.is_some() { contiguous + 1 } else { 0 };
            chain.push((block, prefix.sliding, parent));
            if chain.len() - self.first_in_window(chain.len() * BLOCK_TOKENS) <= contiguous {
                usable = chain.len();
            }
        }
        chain.truncate(usable);
        let first = self.first_in_window(usable * BLOCK_TOKENS);
        Hit {
            window: chain[first.min(usable)..].iter().filter_map(|&(_, sliding, _)| sliding).collect(),
            identity: chain.last().map_or(root, |&(_, _, identity)| identity),
            full: chain.into_iter().map(|(full, _, _)| full).collect(),
        }
    }

    fn take_full(&mut self) -> Option<BlockId> {
        let (block, prefix) = self.full.take()?;
        if let Some(prefix) = prefix {
            self.prefixes.remove(&prefix.key);
            if let Some(sliding) = prefix.sliding {
                self.sliding.forget(sliding);
            }
        }
        Some(block)
    }

    fn take_sliding(&mut self) -> Option<BlockId> {
        let (block, owner) = self.sliding.take()?;
        if let Some(owner) = owner {
            self.full.content(owner).sliding = None;
        }
        Some(block)
    }

    /// Panics unless every block is either in the free list or held as often as `tables` say, and the prefix cache
    /// points both ways. For tests.
    pub fn check<'a>(&self, tables: impl IntoIterator<Item = &'a Table>) {
        let (mut full, mut sliding) = (vec![0; self.full.blocks.len()], vec![0; self.sliding.blocks.len()]);
        for table in tables {
            table.full.iter().for_each(|&b| full[b as usize] += 1);
            assert!(table.sliding[..table.released].iter().all(|&b| b == RELEASED));
            table.sliding[table.released..].iter().for_each(|&b| sliding[b as usize] += 1);
        }
        self.full.check(&full);
        self.sliding.check(&sliding);
        for (key, &block) in &self.prefixes {
            let prefix =
                self.full.blocks[block as usize].content.as_ref().expect("a cached block has content");
            assert_eq!(prefix.key, *key);
            if let Some(sliding) = prefix.sliding {
                assert_eq!(self.sliding.blocks[sliding as usize].content, Some(block));
            }
        }
        let cached = self.full.blocks.iter().filter(|b| b.content.is_some()).count();
        assert_eq!(cached, self.prefixes.len());
        for (id, block) in self.sliding.blocks.iter().enumerate() {
            if let Some(owner) = block.content {
                let prefix = self.full.blocks[owner as usize].content.as_ref();
                assert_eq!(prefix.and_then(|p| p.sliding), Some(id as BlockId));
            }
        }
    }
}

/// Blocks of one kind. `C` is what a block remembers for the prefix cache.
#[derive(Debug)]
struct Pool<C> {
    blocks: Vec<Block<C>>,
    /// Ends of the list of blocks nobody holds: the head is taken next.
    head: BlockId,
    tail: BlockId,
    /// Length of that list.
    free: usize,
}

#[derive(Debug)]
struct Block<C> {
    references: u32,
    /// Neighbours in the list, [`END`] at its ends.
    previous: BlockId,
    next: BlockId,
    content: Option<C>,
}

const END: BlockId = BlockId::MAX;

impl<C> Pool<C> {
    fn new(count: usize) -> Pool<C> {
        let blocks =
            (0..count).map(|_| Block { references: 0, previous: END, next: END, content: None }).collect();
        let mut pool = Pool { blocks, head: END, tail: END, free: 0 };
        for id in 0..count {
            pool.link(id as BlockId, true);
        }
        pool
    }

    fn usage(&self) -> (usize, usize) {
        (self.blocks.len() - self.free, self.blocks.len())
    }

    /// How many of these are held by nobody.
    fn idle(&self, blocks: &[BlockId]) -> usize {
        blocks.iter().filter(|&&b| self.blocks[b as usize].references == 0).count()
    }

    fn content(&mut self, block: BlockId) -> &mut C {
        self.blocks[block as usize].content.as_mut().expect("a block of the prefix cache has content")
    }

    /// The least recently used free block, and what it remembered.
    fn take(&mut self) -> Option<(BlockId, Option<C>)> {
        let block = (self.head != END).then_some(self.head)?;
        self.retain(block);
        Some((block, self.blocks[block as usize].content.take()))
    }

    fn retain(&mut self, block: BlockId) {
        if self.blocks[block as usize].references == 0 {
            self.unlink(block);
        }
        self.blocks[block as usize].references += 1;
    }

    fn release(&mut self, block: BlockId) {
        let entry = &mut self.blocks[block as usize];
        entry.references -= 1;
        if entry.references == 0 {
            // What remembers nothing is taken before anything that does.
            let last = entry.content.is_some();
            self.link(block, last);
        }
    }

    /// Empties the memory of a block, held or not.
    fn forget(&mut self, block: BlockId) {
        self.blocks[block as usize].content = None;
        if self.blocks[block as usize].references == 0 {
            self.unlink(block);
            self.link(block, false);
        }
    }

    fn link(&mut self, block: BlockId, last: bool) {
        let (previous, next) = if last { (self.tail, END) } else { (END, self.head) };
        let entry = &mut self.blocks[block as usize];
        (entry.previous, entry.next) = (previous, next);
        self.join(previous, block);
        self.join(block, next);
        self.free += 1;
    }

    fn unlink(&mut self, block: BlockId) {
        let Block { previous, next, .. } = self.blocks[block as usize];
        self.join(previous, next);
        self.free -= 1;
    }

    /// Makes two blocks neighbours; [`END`] stands for the ends of the list.
    fn join(&mut self, left: BlockId, right: BlockId) {
        match left {
            END => self.head = right,
            _ => self.blocks[left as usize].next = right,
        }
        match right {
            END => self.tail = left,
            _ => self.blocks[right as usize].previous = left,
        }
    }

    fn check(&self, held: &[u32]) {
        let (mut at, mut before, mut free) = (self.head, END, vec![false; self.blocks.len()]);
        while at != END {
            let block = &self.blocks[at as usize];
            assert!(!std::mem::replace(&mut free[at as usize], true), "block {at} is in the list twice");
            assert_eq!(block.previous, before);
            (before, at) = (at, block.next);
        }
        assert_eq!(self.tail, before);
        assert_eq!(free.iter().filter(|f| **f).count(), self.free);
        for (id, block) in self.blocks.iter().enumerate() {
            assert_eq!(block.references, held[id], "references of block {id}");
            assert_eq!(free[id], held[id] == 0, "block {id} is free if nobody holds it");
        }
    }
}
