//! Weights as the kernels read them: panels of eight rows, tiles of sixteen columns, in one stream.
//!
//! A four-bit tile is sixteen 32-bit words, word `j` with the codes of the eight rows at column `j`, so that one load and a
//! shift per row replace all unpacking; the eight scales of a tile lie side by side. Rows are padded to a multiple of
//! eight and columns to a multiple of sixteen with zeros.

use checkpoint::{Format, Matrix, MatrixId, Values, Weights};
use gptoss::Error;

use crate::kernels::{Kernels, Panel, PanelKernel, PanelSums, ROWS, TOKENS};
use crate::pool::Pool;
use crate::simd::LANES;

/// One matrix, or a stack of equal ones.
pub(crate) struct PackedMatrix {
    pub(crate) rows: usize,
    /// Columns, padded to a multiple of 16.
    pub(crate) cols: usize,
    format: Format,
    values: Buffer,
    scales: Buffer,
    /// One per matrix of the stack.
    global_scales: Vec<f32>,
}

impl PackedMatrix {
    /// Reads and packs a matrix or stack, one matrix after the other, its panels in parallel.
    pub(crate) fn load(weights: &dyn Weights, id: MatrixId, pool: &Pool) -> Result<PackedMatrix, Error> {
        let (count, rows, cols) = id.kind.shape(weights.config());
        let format = weights.format(id);
        let (panels, tiles) = (rows.div_ceil(ROWS), cols.div_ceil(LANES));
        let mut packed = PackedMatrix {
            rows,
            cols: tiles * LANES,
            format,
            values: Buffer::new(count * panels * tiles * tile_bytes(format))?,
            scales: Buffer::new(count * panels * scale_bytes(format, tiles))?,
            global_scales: Vec::with_capacity(count),
        };
        for expert in 0..count {
            let matrix = weights.matrix(id, expert)?;
            matrix.check_scales(&format!("{:?} of layer {}, matrix {expert}", id.kind, id.layer))?;
            packed.global_scales.push(match matrix.values {
                Values::Nvfp4 { global_scale, .. } => global_scale,
                _ => 1.0,
            });
            packed.fill(&matrix, expert, pool);
        }
        Ok(packed)
    }

    fn fill(&mut self, matrix: &Matrix<'_>, expert: usize, pool: &Pool) {
        let (panels, tiles) = (self.panels(), self.cols / LANES);
        let (values, scales) = (tiles * tile_bytes(self.format), scale_bytes(self.format, tiles));
        let value_chunks = Chunks::new(
            &mut self.values.as_mut_slice()[expert * panels * values..][..panels * values],
            values,
        );
        let scale_chunks = Chunks::new(
            &mut self.scales.as_mut_slice()[expert * panels * scales..][..panels * scales],
            scales,
        );
        pool.run(panels, &|panel| {
            // SAFETY: each task takes the chunks of its own panel, once.
            let (values, scales) = unsafe { (value_chunks.take(panel), scale_chunks.take(panel)) };
            let first = panel * ROWS;
            let rows = ROWS.min(matrix.rows - first);
            match &matrix.values {
                Values::Bf16(source) => {
                    for (t, tile) in values.chunks_exact_mut(ROWS * LANES * 2).enumerate() {
                        for r in 0..rows {
                            let at = (first + r) * matrix.cols + t * LANES;
                            let width = LANES.min(matrix.cols - t * LANES);
                            let row: &[u8] = bytemuck::cast_slice(&source[at..at + width]);
                            tile[r * LANES * 2..][..row.len()].copy_from_slice(row);
                        }
                    }
                }
                Values::Mxfp4 { codes, scales: source } => {
                    pack_codes(codes, matrix.cols, first, rows, values);
                    pack_scales(source, matrix.cols / 32, first, rows, scales);
                }
                Values::Nvfp4 { codes, scales: source, .. } => {
                    pack_codes(codes, matrix.cols, first, rows, values);
                    pack_scales(source, matrix.cols / 16, first, rows, scales);
                }
            }
        });
    }

    /// Panels per matrix.
    pub(crate) fn panels(&self) -> usize {
        self.rows.div_ceil(ROWS)
    }

    /// Bytes of one matrix of the stack.
    pub(crate) fn matrix_bytes(&self) -> usize {
        (self.values.len + self.scales.len) / self.global_scales.len()
    }

    /// Bytes of all.
    pub(crate) fn bytes(&self) -> usize {
        self.values.len + self.scales.len
    }

    pub(crate) fn kernel(&self, kernels: &Kernels) -> PanelKernel {
        match self.format {
            Format::Bf16 => kernels.bf16,
            Format::Mxfp4 => kernels.mxfp4,
            Format::Nvfp4 => kernels.nvfp4,
        }
    }

    fn panel(&self, expert: usize, panel: usize) -> Panel {
        let tiles = self.cols / LANES;
        let at = expert * self.panels() + panel;
        let values = &self.values.as_slice()[at * tiles * tile_bytes(self.format)..];
        let scales = &self.scales.as_slice()[at * scale_bytes(self.format, tiles)..];
        Panel { values: values.as_ptr(), scales: scales.as_ptr(), tiles }
    }
}

/// `out = x Wᵀ + bias` for some tokens and one matrix of a stack.
pub(crate) struct Product<'a> {
    pub(crate) matrix: &'a PackedMatrix,
    pub(crate) expert: usize,
    /// Rows of `matrix.cols` values.
    pub(crate) x: &'a [f32],
    /// Which rows of `x`; `None`: all, in order.
    pub(crate) take: Option<&'a [usize]>,
    /// `matrix.rows` values, or none.
    pub(crate) bias: Option<&'a [f32]>,
}

impl Product<'_> {
    fn tokens(&self) -> usize {
        self.take.map_or(self.x.len() / self.matrix.cols, <[usize]>::len)
    }
}

/// A product and where it goes: token `t`, row `r` to `out[t · stride + offset + r]`.
pub(crate) struct Job<'a> {
    pub(crate) product: Product<'a>,
    pub(crate) out: Output,
    pub(crate) offset: usize,
    pub(crate) stride: usize,
}

/// A slice that several tasks write, each to places of its own.
#[derive(Clone, Copy)]
pub(crate) struct Output {
    start: *mut f32,
    len: usize,
}

// SAFETY: tasks write disjoint elements: each (job, panel) is one task's, and the jobs of a phase have disjoint outputs.
unsafe impl Sync for Output {}
// SAFETY: as above.
unsafe impl Send for Output {}

impl Output {
    pub(crate) fn new(out: &mut [f32]) -> Output {
        Output { start: out.as_mut_ptr(), len: out.len() }
    }

    /// # Safety
    /// No other task writes these elements in the same phase, and the slice is not used otherwise meanwhile.
    pub(crate) unsafe fn write(&self, at: usize, values: &[f32]) {
        assert!(at + values.len() <= self.len, "an output within its slice");
        // SAFETY: within the slice by the assertion; unaliased by the contract.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), self.start.add(at), values.len()) }
    }

    /// # Safety
    /// As for [`Output::write`].
    #[expect(clippy::mut_from_ref, reason = "the contract makes the tasks' parts disjoint")]
    pub(crate) unsafe fn slice(&self, at: usize, len: usize) -> &mut [f32] {
        assert!(at + len <= self.len, "an output within its slice");
        // SAFETY: within the slice by the assertion; unaliased by the contract.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(at), len) }
    }
}

/// Weight bytes per task: enough to make the hand-over cheap, little enough to balance two threads.
const TASK_BYTES: usize = 96 << 10;

/// Tokens of a batch that are multiplied with all panels of a task before the next ones: their activations stay in the
/// second-level cache.
const TOKEN_BLOCK: usize = 24;

/// Runs products side by side as one phase.
pub(crate) fn multiply(pool: &Pool, kernels: &Kernels, jobs: &[Job<'_>]) {
    let mut tasks = Vec::new();
    for (j, job) in jobs.iter().enumerate() {
        let matrix = job.product.matrix;
        let panel_bytes = (matrix.matrix_bytes() / matrix.panels()).max(1);
        // With more tokens a panel is more work, so fewer of them balance as well.
        let step = (TASK_BYTES / panel_bytes / job.product.tokens().div_ceil(4).max(1)).max(1);
        tasks.extend((0..matrix.panels()).step_by(step).map(|p| (j, p, (p + step).min(matrix.panels()))));
    }
    pool.run(tasks.len(), &|task| {
        let (job, from, to) = tasks[task];
        run_panels(kernels, &jobs[job], from, to);
    });
}

fn run_panels(kernels: &Kernels, job: &Job<'_>, from: usize, to: usize) {
    let Product { matrix, expert, x, take, bias } = job.product;
    let kernel = matrix.kernel(kernels);
    let tokens = job.product.tokens();
    let row_of = |t: usize| {
        let row = take.map_or(t, |take| take[t]);
        x[row * matrix.cols..][..matrix.cols].as_ptr()
    };
    for block in (0..tokens).step_by(TOKEN_BLOCK) {
        let end = (block + TOKEN_BLOCK).min(tokens);
        for p in from..to {
            let panel = matrix.panel(expert, p);
            let first = p * ROWS;
            let rows = ROWS.min(matrix.rows - first);
            for t in (block..end).step_by(TOKENS) {
                let n = TOKENS.min(end - t);
                let x: [*const f32; TOKENS] = std::array::from_fn(|i| row_of(t + i.min(n - 1)));
                let mut sums: PanelSums = [[0.0; ROWS]; TOKENS];
                // SAFETY: the kernels were chosen for this CPU; `panel` has as many tiles as `cols / 16`, and each pointer
                // was taken from a slice of `cols` values.
                unsafe { kernel(panel, x, n, &mut sums) };
                for (i, sums) in sums.iter_mut().enumerate().take(n) {
                    for (r, sum) in sums.iter_mut().enumerate().take(rows) {
                        *sum = *sum * matrix.global_scales[expert] + bias.map_or(0.0, |b| b[first + r]);
                    }
                    // SAFETY: this task alone has these rows of this job.
                    unsafe { job.out.write((t + i) * job.stride + job.offset + first, &sums[..rows]) };
                }
            }
        }
    }
}

fn tile_bytes(format: Format) -> usize {
    match format {
        Format::Bf16 => ROWS * LANES * 2,
        Format::Mxfp4 | Format::Nvfp4 => ROWS * LANES / 2,
    }
}

fn scale_bytes(format: Format, tiles: usize) -> usize {
    match format {
        Format::Bf16 => 0,
        Format::Mxfp4 => tiles / 2 * ROWS,
        Format::Nvfp4 => tiles * ROWS,
    }
}

fn pack_codes(codes: &[u8], cols: usize, first: usize, rows: usize, out: &mut [u8]) {
    for (t, tile) in out.chunks_exact_mut(ROWS * LANES / 2).enumerate() {
        let mut words = [0u32; LANES];
        for r in 0..rows {
            let at = ((first + r) * cols + t * LANES) / 2;
            for (pair, &byte) in words.chunks_exact_mut(2).zip(&codes[at..at + LANES / 2]) {
                pair[0] |= u32::from(byte & 15) << (4 * r);
                pair[1] |= u32::from(byte >> 4) << (4 * r);
            }
        }
        for (out, word) in tile.chunks_exact_mut(4).zip(words) {
            out.copy_from_slice(&word.to_le_bytes());
        }
    }
}

fn pack_scales(scales: &[u8], per_row: usize, first: usize, rows: usize, out: &mut [u8]) {
    for (b, out) in out.chunks_exact_mut(ROWS).enumerate() {
        for (r, out) in out.iter_mut().enumerate().take(rows) {
            *out = scales[(first + r) * per_row + b];
        }
    }
}

/// Zeroed memory on large pages where the system has them: a step reads all of it in order, and with small pages address
/// translation costs as much as the reading.
pub(crate) struct Buffer {
    start: *mut u8,
    len: usize,
    layout: std::alloc::Layout,
}

// SAFETY: plain memory, written only through `&mut`.
unsafe impl Send for Buffer {}
// SAFETY: as above.
unsafe impl Sync for Buffer {}

impl Buffer {
    pub(crate) fn new(len: usize) -> Result<Buffer, Error> {
        const LARGE_PAGE: usize = 2 << 20;
        let align = if len >= LARGE_PAGE { LARGE_PAGE } else { 64 };
        let layout = std::alloc::Layout::from_size_align(len.max(64), align)
            .map_err(|_| Error::Memory { needed: len })?;
        // SAFETY: the layout is not of size zero.
        let start = unsafe { std::alloc::alloc(layout) };
        if start.is_null() {
            return Err(Error::Memory { needed: len });
        }
        #[cfg(target_os = "linux")]
        if len >= LARGE_PAGE {
            // SAFETY: the range was just allocated. Advice only: a failure costs speed.
            unsafe { libc::madvise(start.cast(), len, libc::MADV_HUGEPAGE) };
        }
        // Zeroed only after the advice: the first write decides the size of the page.
        // SAFETY: the allocation has at least `len` bytes.
        unsafe { start.write_bytes(0, len) };
        Ok(Buffer { start, len, layout })
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        // SAFETY: allocated with at least `len` bytes, initialized.
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { std::alloc::dealloc(self.start, self.layout) }
    }
}

/// A mutable slice cut into equal chunks that tasks take by index.
struct Chunks<'a> {
    start: *mut u8,
    size: usize,
    count: usize,
    slice: std::marker::PhantomData<&'a mut [u8]>,
}

// SAFETY: `take`'s contract makes the chunks disjoint.
unsafe impl Sync for Chunks<'_> {}

impl<'a> Chunks<'a> {
    fn new(slice: &'a mut [u8], size: usize) -> Chunks<'a> {
        let count = slice.len().checked_div(size).unwrap_or(usize::MAX);
        Chunks { start: slice.as_mut_ptr(), size, count, slice: std::marker::PhantomData }
    }

    /// # Safety
    /// Each index is taken at most once.
    #[expect(clippy::mut_from_ref, reason = "the contract makes the chunks disjoint")]
    unsafe fn take(&self, index: usize) -> &mut [u8] {
        assert!(index < self.count, "a chunk within the slice");
        // SAFETY: within the slice by the assertion; unaliased by the contract.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(index * self.size), self.size) }
    }
}
