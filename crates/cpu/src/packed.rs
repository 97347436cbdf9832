//! Weights as the kernels read them: panels of sixteen rows in one stream, scales beside their blocks.
//!
//! `products.rs` says how a panel looks. Rows are padded to a multiple of sixteen and columns to a multiple of 32 with zeros.
//! The rows of gate and up, which alternate in a checkpoint, are in panels that alternate.

use std::mem::MaybeUninit;
use std::ops::{Range, RangeInclusive};
use std::sync::{Arc, Mutex, PoisonError};

use checkpoint::{Format, MatrixId, MatrixKind, Values, Weights};
use gptoss::Error;
use memmap2::{Mmap, MmapMut};

use crate::kernels::Kernels;
use crate::panels::{Inputs, Rows};
use crate::pool::Pool;
use crate::products::{CODE_BYTES, Finish, MOST_TOKENS, Panel, PanelKernel, Panels, Records, block};
use crate::records::{Activations, COLUMNS, Kind};
use crate::simd::{LANES, MOST_SHIFT};

/// How weights are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Packing {
    Bf16,
    /// Eight bits, one scale per row.
    Int8,
    Mxfp4,
    Nvfp4,
}

impl Packing {
    /// Bytes of sixteen rows of 32 columns.
    fn slab_bytes(self) -> usize {
        match self {
            Packing::Bf16 => 2 * LANES * COLUMNS,
            Packing::Int8 => LANES * COLUMNS,
            Packing::Mxfp4 => LANES + CODE_BYTES,
            Packing::Nvfp4 => 2 * LANES + CODE_BYTES,
        }
    }
}

/// How a matrix, or a stack of equal ones, is packed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    /// Matrices of the stack.
    count: usize,
    pub(crate) rows: usize,
    cols: usize,
    packing: Packing,
    /// Whether rows alternate between two panels.
    paired: bool,
    /// Whether it chooses the experts.
    router: bool,
}

impl Shape {
    /// `fast` keeps what is stored in 16 bits in eight; routers stay.
    pub(crate) fn of(weights: &dyn Weights, id: MatrixId, fast: bool) -> Shape {
        let (count, rows, cols) = id.kind.shape(weights.config());
        let packing = match weights.format(id) {
            Format::Bf16 if fast && id.kind != MatrixKind::Router => Packing::Int8,
            Format::Bf16 => Packing::Bf16,
            Format::Mxfp4 => Packing::Mxfp4,
            Format::Nvfp4 => Packing::Nvfp4,
        };
        let (paired, router) = (id.kind == MatrixKind::GateUp, id.kind == MatrixKind::Router);
        Shape { count, rows, cols, packing, paired, router }
    }

    /// Panels per matrix.
    fn panels(&self) -> usize {
        self.rows.div_ceil(LANES)
    }

    /// Groups of 32 columns.
    fn slabs(&self) -> usize {
        self.cols.div_ceil(COLUMNS)
    }

    fn panel_bytes(&self) -> usize {
        self.slabs() * self.packing.slab_bytes()
    }

    /// Bytes of all.
    pub(crate) fn bytes(&self) -> usize {
        self.count * self.panels() * self.panel_bytes()
    }

    /// Factors of the sums: one per matrix of the stack, or for [`Packing::Int8`] one per packed row.
    pub(crate) fn scales(&self) -> usize {
        self.count * if self.packing == Packing::Int8 { self.panels() * LANES } else { 1 }
    }

    /// Zeroed memory for [`Shape::pack`].
    ///
    /// # Errors
    /// There is no such memory.
    pub(crate) fn buffer(&self, id: MatrixId) -> Result<Buffer, Error> {
        let needed = self.bytes();
        let what = || format!("the weights {:?} of layer {}", id.kind, id.layer);
        Buffer::new(needed).ok_or_else(|| Error::NoRoom { what: what(), needed })
    }

    /// Reads and packs a matrix, its panels in parallel, or a stack, its matrices in parallel, to zeroed memory of
    /// [`Shape::bytes`] and [`Shape::scales`].
    pub(crate) fn pack(
        &self,
        weights: &dyn Weights,
        id: MatrixId,
        pool: &Pool,
        kernels: &Kernels,
        data: &mut [u8],
        scales: &mut [f32],
    ) -> Result<(), Error> {
        assert_eq!((data.len(), scales.len()), (self.bytes(), self.scales()), "memory of the shape");
        // Longer than any row.
        let zeros = vec![0; 2 * self.cols];
        let name = |expert| format!("{:?} of layer {}, matrix {expert}", id.kind, id.layer);
        let int8 = self.packing == Packing::Int8;
        if self.count == 1 {
            let values = weights.matrix(id, 0)?.values;
            values.check_scales(&name(0))?;
            let (values, factor) = with_factor(values);
            if !int8 {
                scales[0] = factor;
            }
            let data = Chunks::new(data, self.panel_bytes());
            let scales = Chunks::new(scales, LANES);
            pool.run(self.panels(), &|panel| {
                // SAFETY: each panel is one task's.
                let (data, scales) =
                    unsafe { (data.take(panel), if int8 { scales.take(panel) } else { &mut [] }) };
                self.pack_panel(kernels, &values, panel, &zeros, data, scales);
            });
            weights.release(id, 0);
            return Ok(());
        }
        let data = Chunks::new(data, self.panels() * self.panel_bytes());
        let scales = Chunks::new(scales, self.scales() / self.count);
        let pack = |expert: usize| -> Result<(), Error> {
            // SAFETY: each matrix is one task's.
            let (data, scales) = unsafe { (data.take(expert), scales.take(expert)) };
            if let Some(values) = weights.by_inputs(id, expert)? {
                values.check_scales(&name(expert))?;
                let (values, factor) = with_factor(values);
                scales[0] = factor;
                let (codes, lines, blocks) = match &values {
                    Values::Mxfp4 { codes, scales } => (codes, scales, 1),
                    Values::Nvfp4 { codes, scales, .. } => (codes, scales, 2),
                    Values::Bf16(_) => unreachable!("values in four bits"),
                };
                let inputs = Inputs { codes, scales: lines, rows: self.rows, blocks, paired: self.paired };
                // SAFETY: the kernels were chosen for this CPU.
                unsafe { (kernels.pack_e2m1_by_inputs)(&inputs, data) };
            } else {
                let values = weights.matrix(id, expert)?.values;
                values.check_scales(&name(expert))?;
                let (values, factor) = with_factor(values);
                if !int8 {
                    scales[0] = factor;
                }
                for (panel, data) in data.chunks_exact_mut(self.panel_bytes()).enumerate() {
                    let scales = if int8 { &mut scales[panel * LANES..][..LANES] } else { &mut [] };
                    self.pack_panel(kernels, &values, panel, &zeros, data, scales);
                }
            }
            weights.release(id, expert);
            Ok(())
        };
        let failed = Mutex::new(None);
        pool.run(self.count, &|expert| {
            if let Err(error) = pack(expert) {
                *failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            }
        });
        failed.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }

    /// `scales` are those of the panel's rows for [`Packing::Int8`]; `zeros` is as long as a row.
    fn pack_panel(
        &self,
        kernels: &Kernels,
        values: &Values<'_>,
        panel: usize,
        zeros: &[u8],
        data: &mut [u8],
        scales: &mut [f32],
    ) {
        let part = |bytes| panel_rows(bytes, self.rows, self.paired, panel, zeros);
        // SAFETY: the kernels were chosen for this CPU.
        unsafe {
            match values {
                Values::Bf16(values) if self.packing == Packing::Int8 => {
                    let scales = scales.try_into().expect("a panel's scales");
                    (kernels.pack_int8)(&part(bytemuck::cast_slice(values)), data, scales);
                }
                Values::Bf16(values) => (kernels.pack_bf16)(&part(bytemuck::cast_slice(values)), data),
                Values::Mxfp4 { codes, scales } => {
                    (kernels.pack_e2m1)(&part(codes), &part(scales), 1, data);
                }
                Values::Nvfp4 { codes, scales, .. } => {
                    (kernels.pack_e2m1)(&part(codes), &part(scales), 2, data);
                }
            }
        }
    }
}

/// What is packed, and what its sums are multiplied with: kernels sum up twice the values of E2M1 codes. The scales of MXFP4 are
/// moved by a power of two so that the largest shifts a sum as far as kernels can, unless one of them would not be exact then.
fn with_factor(values: Values<'_>) -> (Values<'_>, f32) {
    match values {
        Values::Nvfp4 { global_scale, .. } => (values, 0.5 * global_scale),
        Values::Mxfp4 { codes, scales } => {
            let (least, most) = scales.iter().fold((u8::MAX, 0), |(a, b), &s| (a.min(s), b.max(s)));
            // Byte 127 is 1.
            let by = 127 + i32::from(MOST_SHIFT) - i32::from(most);
            if by.abs() > 100 || i32::from(least) + by < 1 {
                return (Values::Mxfp4 { codes, scales }, 0.5);
            }
            let moved = scales.iter().map(|s| s.wrapping_add(by as u8)).collect::<Vec<u8>>();
            (Values::Mxfp4 { codes, scales: moved.into() }, numerics::e8m0::decode((126 - by) as u8))
        }
        Values::Bf16(_) => (values, 1.0),
    }
}

/// Where packed weights lie.
pub(crate) enum Memory {
    Own(Buffer),
    /// A part of a file of packed weights.
    Mapped {
        file: Arc<Mmap>,
        range: Range<usize>,
    },
}

impl Memory {
    fn as_slice(&self) -> &[u8] {
        match self {
            Memory::Own(buffer) => buffer.as_slice(),
            Memory::Mapped { file, range } => &file[range.clone()],
        }
    }
}

/// One matrix, or a stack of equal ones.
pub(crate) struct PackedMatrix {
    pub(crate) shape: Shape,
    data: Memory,
    scales: Vec<f32>,
    /// The scale with which its inputs are rounded to NVFP4, if they are.
    pub(crate) input_scale: Option<f32>,
}

impl PackedMatrix {
    /// `data` and `scales` are what [`Shape::pack`] made.
    pub(crate) fn new(shape: Shape, data: Memory, scales: Vec<f32>) -> PackedMatrix {
        assert_eq!(
            (data.as_slice().len(), scales.len()),
            (shape.bytes(), shape.scales()),
            "memory of the shape"
        );
        PackedMatrix { shape, data, scales, input_scale: None }
    }

    /// Reads and packs a matrix or stack.
    pub(crate) fn load(
        weights: &dyn Weights,
        id: MatrixId,
        fast: bool,
        pool: &Pool,
        kernels: &Kernels,
    ) -> Result<PackedMatrix, Error> {
        let shape = Shape::of(weights, id, fast);
        let mut data = shape.buffer(id)?;
        data.place(pool, shape.bytes() / shape.count);
        let mut scales = vec![1.0; shape.scales()];
        shape.pack(weights, id, pool, kernels, data.as_mut_slice(), &mut scales)?;
        Ok(PackedMatrix::new(shape, Memory::Own(data), scales))
    }

    /// Bytes of one matrix of the stack.
    pub(crate) fn matrix_bytes(&self) -> usize {
        self.shape.panels() * self.shape.panel_bytes()
    }

    /// Bytes of all.
    pub(crate) fn bytes(&self) -> usize {
        self.shape.bytes()
    }

    /// Each matrix of the stack as it lies in memory.
    pub(crate) fn matrices(&self) -> impl Iterator<Item = &[u8]> {
        self.data.as_slice().chunks(self.matrix_bytes())
    }

    /// The records that its products take.
    pub(crate) fn records(&self, activations: Activations) -> Kind {
        match self.shape.packing {
            // Routers are exact: a token that takes another expert costs more than they do.
            Packing::Bf16 if activations != Activations::Bf16 || self.shape.router => Kind::Float,
            _ => activations.kind(),
        }
    }

    fn kernel(&self, kernels: &Kernels, kind: Kind) -> PanelKernel {
        match (self.shape.packing, kind) {
            (Packing::Bf16, Kind::Float) => kernels.bf16,
            (Packing::Int8, Kind::Limbs(limbs)) => kernels.int8[limbs - 1],
            (Packing::Mxfp4, Kind::Limbs(limbs)) => kernels.mxfp4[limbs - 1],
            (Packing::Nvfp4, Kind::Limbs(limbs)) => kernels.nvfp4[limbs - 1],
            (Packing::Bf16, Kind::Bf16) => kernels.by_bf16.bf16,
            (Packing::Int8, Kind::Bf16) => kernels.by_bf16.int8,
            (Packing::Mxfp4, Kind::Bf16) => kernels.by_bf16.mxfp4,
            (Packing::Nvfp4, Kind::Bf16) => kernels.by_bf16.nvfp4,
            (packing, kind) => panic!("records of {kind:?} for weights of {packing:?}"),
        }
    }

    fn panels(&self, expert: usize, panels: Range<usize>) -> Panels {
        let bytes = self.shape.panel_bytes();
        let at = (expert * self.shape.panels() + panels.start) * bytes;
        let data = self.data.as_slice()[at..][..panels.len() * bytes].as_ptr();
        Panels { first: Panel { data, slabs: self.shape.slabs() }, bytes, count: panels.len() }
    }

    fn scale(&self, expert: usize, panel: usize) -> [f32; LANES] {
        if self.shape.packing == Packing::Int8 {
            let at = (expert * self.shape.panels() + panel) * LANES;
            std::array::from_fn(|r| self.scales[at + r])
        } else {
            [self.scales[expert]; LANES]
        }
    }

    fn bias(&self, bias: Option<&[f32]>, panel: usize) -> [f32; LANES] {
        std::array::from_fn(|r| {
            bias.and_then(|bias| bias.get(source_row(self.shape.paired, panel, r))).copied().unwrap_or(0.0)
        })
    }
}

/// Which row of the checkpoint's matrix is row `r` of a panel.
fn source_row(paired: bool, panel: usize, r: usize) -> usize {
    if paired { 2 * (panel / 2 * LANES + r) + panel % 2 } else { panel * LANES + r }
}

/// The rows of a panel, `rows` of them being `bytes`; `zeros` is for those that do not exist.
fn panel_rows<'a>(bytes: &'a [u8], rows: usize, paired: bool, panel: usize, zeros: &'a [u8]) -> Rows<'a> {
    let len = bytes.len() / rows;
    let row = |r| {
        let row = source_row(paired, panel, r);
        if row < rows { &bytes[row * len..][..len] } else { &zeros[..len] }
    };
    let next = source_row(paired, panel + 1, 0) - source_row(paired, panel, 0);
    Rows { rows: std::array::from_fn(row), ahead: next * len }
}

/// `x Wᵀ + bias` for some tokens and one matrix of a stack, and where it goes: token `t`, row `r` to
/// `out[t · stride + offset + r]`.
pub(crate) struct Job<'a> {
    pub(crate) matrix: &'a PackedMatrix,
    pub(crate) expert: usize,
    pub(crate) x: Records<'a>,
    /// One per row.
    pub(crate) bias: Option<&'a [f32]>,
    pub(crate) then: Then,
    pub(crate) out: Output,
    pub(crate) offset: usize,
    pub(crate) stride: usize,
}

/// What happens with a product.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Then {
    /// It is stored.
    Set,
    /// It is added to what is there.
    Add,
    /// Rows are gates and ups: half as many results are stored.
    SwiGlu { limit: f32, alpha: f32 },
}

/// A slice that several tasks write, each to places of its own.
#[derive(Clone, Copy)]
pub(crate) struct Output<T = f32> {
    start: *mut T,
    len: usize,
}

// SAFETY: tasks write disjoint elements: each (job, panel, token) is one task's, and the jobs of a phase have disjoint outputs.
unsafe impl<T: Send> Sync for Output<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Output<T> {}

impl<T> Output<T> {
    pub(crate) fn new(out: &mut [T]) -> Output<T> {
        Output { start: out.as_mut_ptr(), len: out.len() }
    }

    /// # Safety
    /// No other task uses these elements in the same phase, and the slice is not used otherwise meanwhile.
    #[expect(clippy::mut_from_ref, reason = "the contract makes the tasks' parts disjoint")]
    pub(crate) unsafe fn slice(&self, at: usize, len: usize) -> &mut [T] {
        assert!(at + len <= self.len, "an output within its slice");
        // SAFETY: within the slice by the assertion; unaliased by the contract.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(at), len) }
    }
}

/// Weight bytes per task, of few tokens. Where a task is taken, reads wait for each other, so it is as long as the balance of the
/// threads allows: an eighth of a thread's share, within these bounds, and not more than the share.
const TASK_BYTES: RangeInclusive<usize> = 192 << 10..=768 << 10;

/// The same for batches, where a byte is more work; still enough panels to use activations again while they are near.
const BATCH_TASK_BYTES: usize = 112 << 10;

/// Bytes of weights times tokens that one thread multiplies sooner than several are woken.
const ALONE: usize = 64 << 10;

/// Panels that a product takes at a time.
const PANELS: usize = 4;

/// Runs products side by side as one phase. What is near a memory node, of all of them, comes one after the other.
pub(crate) fn multiply(pool: &Pool, kernels: &Kernels, jobs: &[Job<'_>]) {
    let mut tasks = Vec::new();
    let share = jobs.iter().map(|job| job.matrix.matrix_bytes()).sum::<usize>() / pool.threads();
    let few = (share / 8).clamp(*TASK_BYTES.start(), *TASK_BYTES.end()).min(share);
    for node in 0..pool.nodes().count() {
        for (j, job) in jobs.iter().enumerate() {
            let matrix = job.matrix;
            assert_eq!(matrix.shape.slabs(), job.x.slabs, "records as wide as the matrix");
            let width = if matrix.shape.paired { 2 } else { 1 };
            let (bytes, least) = if job.x.tokens > 8 { (BATCH_TASK_BYTES, PANELS / width) } else { (few, 1) };
            let units = pool.nodes().part(node, matrix.shape.panels() / width);
            let step = (bytes / (width * matrix.shape.panel_bytes())).max(least);
            let end = units.end;
            tasks.extend(units.step_by(step).map(|u| (j, u..(u + step).min(end), 0..job.x.tokens)));
        }
    }
    // So few panels, as a router has, that threads would have none: those of one panel share the tokens.
    let sharers = pool.threads() / tasks.len().max(1);
    if sharers > 1 {
        let shares = |(j, units, tokens): (usize, Range<usize>, Range<usize>)| {
            let each = tokens.len().div_ceil(sharers).max(1);
            tokens.clone().step_by(each).map(move |t| (j, units.clone(), t..(t + each).min(tokens.end)))
        };
        tasks = tasks.into_iter().flat_map(shares).collect();
    }
    let task = |task: usize| {
        let (job, units, tokens) = &tasks[task];
        run_panels(kernels, &jobs[*job], units.clone(), tokens.clone());
    };
    if jobs.iter().map(|job| job.matrix.matrix_bytes() * job.x.tokens).sum::<usize>() < ALONE {
        (0..tasks.len()).for_each(task);
    } else {
        pool.run(tasks.len(), &task);
    }
}

/// Some panels, or pairs of panels, of a job, for some of its tokens.
fn run_panels(kernels: &Kernels, job: &Job<'_>, units: Range<usize>, tokens: Range<usize>) {
    let matrix = job.matrix;
    let kernel = matrix.kernel(kernels, job.x.kind);
    let block = block(job.x.kind, matrix.shape.slabs());
    let width = if matrix.shape.paired { 2 } else { 1 };
    let mut sums = [[const { MaybeUninit::<[f32; LANES]>::uninit() }; MOST_TOKENS]; PANELS];
    let mut first = tokens.start;
    while first < tokens.end {
        let x = job.x.part(first, ((first / block + 1) * block).min(tokens.end));
        for start in units.clone().step_by(PANELS / width) {
            let end = (start + PANELS / width).min(units.end);
            let panels = matrix.panels(job.expert, start * width..end * width);
            // SAFETY: the kernels were chosen for this CPU; the panels have as many slabs as the records, and there is room for the
            // sums of a block of tokens with each.
            unsafe { kernel(panels, x, sums.as_mut_ptr().cast()) };
            for (unit, sums) in (start..end).zip(sums.chunks_exact(width)) {
                // SAFETY: the kernel has written the sums of these tokens.
                let sums_of =
                    |i: usize| unsafe { std::slice::from_raw_parts(sums[i].as_ptr().cast(), x.tokens) };
                let rows = LANES.min(matrix.shape.rows / width - unit * LANES);
                let at = first * job.stride + job.offset + unit * LANES;
                assert!(at + (x.tokens - 1) * job.stride + rows <= job.out.len, "an output within its slice");
                let scale = matrix.scale(job.expert, unit * width);
                let bias = matrix.bias(job.bias, unit * width);
                let finish = Finish {
                    sums: sums_of(0),
                    scale: &scale,
                    bias: &bias,
                    // SAFETY: within the slice by the assertion.
                    out: unsafe { job.out.start.add(at) },
                    stride: job.stride,
                    rows,
                    add: job.then == Then::Add,
                };
                if let Then::SwiGlu { limit, alpha } = job.then {
                    assert_eq!(rows, LANES, "an intermediate size that is a multiple of sixteen");
                    let scale = matrix.scale(job.expert, unit * width + 1);
                    let bias = matrix.bias(job.bias, unit * width + 1);
                    let ups = Finish { sums: sums_of(1), scale: &scale, bias: &bias, ..finish };
                    // SAFETY: the kernels were chosen for this CPU; this task alone has these rows of these tokens, which are within the slice.
                    unsafe { (kernels.finish_swiglu)(&finish, &ups, limit, alpha) };
                } else {
                    // SAFETY: as above.
                    unsafe { (kernels.finish)(&finish) };
                }
            }
        }
        first += x.tokens;
    }
}

/// Bytes of a page, where the system has large ones, and where it has not.
const LARGE_PAGE: usize = 2 << 20;
const SMALL_PAGE: usize = 4 << 10;

/// Zeroed memory on large pages where the system has them: a step reads all of it in order, and with small pages address
/// translation costs as much as the reading. It is of the system's, not of an allocator's, which may hand out again what lies on
/// small pages already. Pages are taken when, and near the thread by which, they are first written.
pub(crate) struct Buffer {
    map: MmapMut,
    first: usize,
    len: usize,
}

impl Buffer {
    /// `None` if the system has no such memory.
    pub(crate) fn new(len: usize) -> Option<Buffer> {
        // The last page is a large one too; of one that is half empty, that would be a waste.
        let large = len >= LARGE_PAGE / 2;
        let pages = if large { len.checked_next_multiple_of(LARGE_PAGE) } else { Some(len.max(1)) };
        let room = if large { LARGE_PAGE } else { 0 };
        let map = MmapMut::map_anon(pages?.checked_add(room)?).ok()?;
        let first = if large { map.as_ptr().align_offset(LARGE_PAGE) } else { 0 };
        #[cfg(target_os = "linux")]
        if large {
            // Advice only: a failure costs speed.
            let _ = map.advise_range(memmap2::Advice::HugePage, first, map.len() - LARGE_PAGE);
        }
        Some(Buffer { map, first, len })
    }

    /// Where there are several memory nodes, has the pages of matrices of this size, which are zeros, taken near the threads that
    /// take part in their products: see [`multiply`].
    pub(crate) fn place(&mut self, pool: &Pool, matrix: usize) {
        let nodes = pool.nodes();
        if nodes.count() == 1 {
            return;
        }
        let middle = |chunk: &usize| (chunk * LARGE_PAGE + LARGE_PAGE / 2) % matrix;
        let of_node = |node| {
            let part = nodes.part(node, matrix);
            (0..self.len / LARGE_PAGE).filter(move |chunk| part.contains(&middle(chunk)))
        };
        let order: Vec<usize> = (0..nodes.count()).flat_map(of_node).collect();
        let pages = Chunks::new(self.as_mut_slice(), LARGE_PAGE);
        pool.run(order.len(), &|task| {
            // SAFETY: each chunk is one task's.
            let page = unsafe { pages.take(order[task]) };
            page.iter_mut().step_by(SMALL_PAGE).for_each(|byte| *byte = 0);
        });
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        &self.map[self.first..][..self.len]
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.map[self.first..][..self.len]
    }

    /// The bytes as elements.
    pub(crate) fn elements<T: bytemuck::Pod>(&self) -> &[T] {
        bytemuck::cast_slice(self.as_slice())
    }

    /// The bytes as elements.
    pub(crate) fn elements_mut<T: bytemuck::Pod>(&mut self) -> &mut [T] {
        bytemuck::cast_slice_mut(self.as_mut_slice())
    }
}

/// A mutable slice cut into equal chunks that tasks take by index.
struct Chunks<'a, T> {
    start: *mut T,
    size: usize,
    count: usize,
    slice: std::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: `take`'s contract makes the chunks disjoint.
unsafe impl<T: Send> Sync for Chunks<'_, T> {}

impl<'a, T> Chunks<'a, T> {
    fn new(slice: &'a mut [T], size: usize) -> Chunks<'a, T> {
        let count = slice.len().checked_div(size).unwrap_or(usize::MAX);
        Chunks { start: slice.as_mut_ptr(), size, count, slice: std::marker::PhantomData }
    }

    /// # Safety
    /// Each index is taken at most once.
    #[expect(clippy::mut_from_ref, reason = "the contract makes the chunks disjoint")]
    unsafe fn take(&self, index: usize) -> &mut [T] {
        assert!(index < self.count, "a chunk within the slice");
        // SAFETY: within the slice by the assertion; unaliased by the contract.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(index * self.size), self.size) }
    }
}

#[cfg(test)]
mod tests {
    use checkpoint::{Config, Synthetic};

    use super::*;
    use crate::kernels::Isa;
    use crate::records::Layout;

    /// Of MXFP4 a scale times the factor is what it was, and the largest is moved to where it shifts most, if that is exact.
    #[test]
    fn moved_scales_and_their_factor_keep_the_values() {
        for (bytes, moved) in [
            (vec![119, 120, 100], true),
            (vec![250, 200], false),
            (vec![142, 1], true),
            (vec![230, 140], true),
            (vec![60, 0], true),
            (vec![200, 3], false),
            (vec![0], false),
        ] {
            let values =
                Values::Mxfp4 { codes: vec![0; 16 * bytes.len()].into(), scales: bytes.clone().into() };
            let (Values::Mxfp4 { scales, .. }, factor) = with_factor(values) else {
                panic!("another format")
            };
            assert_eq!(scales.iter().max() == Some(&(127 + MOST_SHIFT)), moved, "{bytes:?}");
            for (&before, &after) in bytes.iter().zip(&*scales) {
                let (before, after) = (numerics::e8m0::decode(before), numerics::e8m0::decode(after));
                assert_eq!(f64::from(after) * f64::from(factor), 0.5 * f64::from(before), "{bytes:?}");
            }
        }
    }

    /// Products of several matrices, of few and of many tokens, whose parts are of two memory nodes, in memory with pages of both.
    #[test]
    fn memory_nodes_change_no_product() {
        let config = Config { hidden_size: 1440, intermediate_size: 720, ..Config::gpt_oss_20b() };
        let id = MatrixKind::GateUp.at(0);
        let weights = Synthetic::new(config, |_| Format::Mxfp4, 3);
        let kernels = Isa::best().kernels().expect("the best instruction set is available");
        let products = |pool: &Pool, tokens: usize| {
            let matrix = PackedMatrix::load(&weights, id, false, pool, kernels).expect("made-up weights");
            let (cols, rows) = (1440, 720);
            let layout = Layout { kind: Kind::Limbs(3), tokens, cols };
            let mut words = vec![0; layout.len()];
            for t in 0..tokens {
                let x: Vec<f32> = (0..cols).map(|i| ((i * 7 + t * 31) % 101) as f32 - 50.0).collect();
                // SAFETY: the words are the layout's, and nobody else's.
                unsafe { layout.write(kernels, t, &x, words.as_mut_ptr()) };
            }
            let mut found = vec![f32::NAN; 3 * tokens * rows];
            let out = Output::new(&mut found);
            let jobs = [31, 0, 17].iter().enumerate().map(|(j, &expert)| Job {
                matrix: &matrix,
                expert,
                x: layout.records(&words),
                bias: None,
                then: Then::SwiGlu { limit: 7.0, alpha: 1.702 },
                out,
                offset: j * tokens * rows,
                stride: rows,
            });
            multiply(pool, kernels, &jobs.collect::<Vec<_>>());
            found
        };
        let two = Pool::on(vec![vec![0], vec![0]], 3);
        assert_eq!(two.nodes().count(), 2);
        for tokens in [1, 20] {
            let expected = products(&Pool::on(Vec::new(), 1), tokens);
            assert!(expected.iter().all(|v| v.is_finite()));
            assert_eq!(products(&two, tokens), expected, "{tokens} tokens");
        }
    }
}
