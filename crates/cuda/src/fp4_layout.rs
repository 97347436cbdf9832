//! Where the operands of Blackwell's FP4 products lie, in global, shared and tensor memory and in registers.
//!
//! build.rs turns this file, word for word, into the C++ header from which the kernels take every offset, and the emulation in
//! fp4_emulation.rs follows the same functions. So it has constants and functions of `u32` whose body is one expression, nothing else.
//! Facts: PTX ISA 9.0, "mma with block scaling", "tcgen05 matrix descriptors", "tcgen05.mma scale factor layout".

/// Rows of a tile, outputs of the weights or tokens; its 64 columns are what one tensor core instruction multiplies.
pub(crate) const TILE_ROWS: u32 = 128;
/// Bytes of a tile's codes, 32 per row.
pub(crate) const CODE_BYTES: u32 = 4096;
/// Bytes of a tile's scales, four per row.
pub(crate) const SCALE_BYTES: u32 = 512;
/// Threads of a block, of both generations.
pub(crate) const THREADS: u32 = 256;
/// sm_120: tiles of a stage.
pub(crate) const SM120_TILES: u32 = 1;
/// sm_120: stages in shared memory, so that two blocks fit the 100 KB of a multiprocessor.
pub(crate) const SM120_STAGES: u32 = 5;
/// sm_100: tiles of a stage, enough work for the barriers between stages not to matter.
pub(crate) const SM100_TILES: u32 = 4;
/// sm_100: stages in shared memory.
pub(crate) const SM100_STAGES: u32 = 4;

/// Where a piece (0 or 1) of 32 columns, 16 bytes, of a row lies in a tile. Every other four rows exchange their pieces, so that
/// eight rows of one piece lie in different banks: the 32-byte swizzle.
pub(crate) const fn piece(row: u32, piece: u32) -> u32 {
    row * 32 + (piece ^ (row / 4 % 2)) * 16
}

/// Where the four scales of a row lie in a tile: the 128x4 tile that `tcgen05.cp` takes.
pub(crate) const fn scales(row: u32) -> u32 {
    row % 32 * 16 + row / 32 * 4
}

/// The number of a tile among those of all matrices, of which each 128 rows have `column_tiles`.
pub(crate) const fn tile(row_block: u32, column_tile: u32, column_tiles: u32) -> u32 {
    row_block * column_tiles + column_tile
}

/// Bytes of a stage of `tiles` tiles: the weights' codes, the tokens' codes, the weights' scales, the tokens' scales.
pub(crate) const fn stage_bytes(tiles: u32) -> u32 {
    tiles * 9216
}

/// Where the codes of a tile of an operand (0: weights, 1: tokens) begin in a stage.
pub(crate) const fn stage_codes(tiles: u32, operand: u32, tile: u32) -> u32 {
    (operand * tiles + tile) * 4096
}

/// Where the scales of a tile of an operand begin in a stage.
pub(crate) const fn stage_scales(tiles: u32, operand: u32, tile: u32) -> u32 {
    tiles * 8192 + (operand * tiles + tile) * 512
}

/// The token of which a thread brings the `i`th piece of 16 bytes to a stage. Neighbours in a row are neighbouring threads.
pub(crate) const fn brought_token(thread: u32, i: u32, tiles: u32) -> u32 {
    (thread + i * 256) / (2 * tiles)
}

/// Which of the row's pieces in this stage that is.
pub(crate) const fn brought_piece(thread: u32, i: u32, tiles: u32) -> u32 {
    (thread + i * 256) % (2 * tiles)
}

/// The token of which a thread brings the `i`th word of scales.
pub(crate) const fn brought_scale_token(thread: u32, i: u32, tiles: u32) -> u32 {
    (thread + i * 256) / tiles
}

/// The tile of the stage to which that word belongs.
pub(crate) const fn brought_scale_tile(thread: u32, i: u32, tiles: u32) -> u32 {
    (thread + i * 256) % tiles
}

/// `ldmatrix.x4` of the weights: the row, among a warp's 16, whose piece this lane points to.
pub(crate) const fn a_row(lane: u32) -> u32 {
    lane % 16
}

/// The piece that it points to.
pub(crate) const fn a_piece(lane: u32) -> u32 {
    lane / 16
}

/// `ldmatrix.x4` of the tokens, two products at a time: the row, among 16, whose piece this lane points to.
pub(crate) const fn b_row(lane: u32) -> u32 {
    lane / 16 * 8 + lane % 8
}

/// The piece that it points to.
pub(crate) const fn b_piece(lane: u32) -> u32 {
    lane / 8 % 2
}

/// The row, among a warp's 16, whose scales a lane hands to `mma.sync`, which takes those of lanes 4 g and 4 g + 1.
pub(crate) const fn a_scale_row(lane: u32) -> u32 {
    lane / 4 + lane % 2 * 8
}

/// The token, among eight, whose scales a lane hands over; those of lanes 4 g are taken.
pub(crate) const fn b_scale_row(lane: u32) -> u32 {
    lane / 4
}

/// The column of a lane's first and third sum, of rows g and g + 8; the second and fourth are one further on.
pub(crate) const fn d_column(lane: u32) -> u32 {
    lane % 4 * 2
}

/// `tcgen05.mma`: both operands E2M1 with K innermost, scales E4M3, 128 rows, 128 tokens.
pub(crate) const INSTRUCTION: u32 = 1 << 7 | 1 << 10 | (128 / 8) << 17 | (128 / 16) << 24;

/// The lower half of the descriptor of a tile's codes at this address of shared memory.
pub(crate) const fn codes_descriptor_low(address: u32) -> u32 {
    (address & 0x3ffff) >> 4 | 1 << 16
}

/// The upper half: 256 bytes from eight rows to the next, version 1, and in the top bits 6, the 32-byte swizzle.
pub(crate) const CODES_DESCRIPTOR_HIGH: u32 = 256 >> 4 | 1 << 14 | 0xc0000000;

/// The lower half of the descriptor of a tile's scales.
pub(crate) const fn scales_descriptor_low(address: u32) -> u32 {
    (address & 0x3ffff) >> 4
}

/// The upper half: 128 bytes from eight rows to the next, version 1, no swizzle.
pub(crate) const SCALES_DESCRIPTOR_HIGH: u32 = 128 >> 4 | 1 << 14;

/// Columns of tensor memory: 128 of sums, then four per tile of scales, of four slots of four tiles.
pub(crate) const TENSOR_COLUMNS: u32 = 256;

/// The column at which the scales of a tile of an operand begin.
pub(crate) const fn tensor_scales(slot: u32, operand: u32, tile: u32) -> u32 {
    128 + ((slot * 2 + operand) * 4 + tile) * 4
}

/// The first of the 32 lanes of tensor memory that a warp reads.
pub(crate) const fn tensor_lane(warp: u32) -> u32 {
    warp % 4 * 32
}

/// The first of the 64 tokens whose sums it reads.
pub(crate) const fn tensor_token(warp: u32) -> u32 {
    warp / 4 * 64
}

/// The lane that has the other row of the pair, g or g + 8 of a tile of 16.
pub(crate) const fn partner(lane: u32) -> u32 {
    lane ^ 8
}

/// Of two tokens' sums a lane finishes one, and sends the other to its partner: 0 or 1.
pub(crate) const fn finished(lane: u32) -> u32 {
    lane / 8 % 2
}
