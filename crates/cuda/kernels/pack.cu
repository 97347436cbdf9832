// Rearranges matrices as they are stored, `[rows, cols]` row by row, into the tiles of common.cuh.
#include "common.cuh"

// Which row of the stored matrix a row of a tile is; the same numbers as `RowOrder` in Rust.
enum RowOrder : uint32_t {
    PLAIN = 0,
    // Rows 2 i and 2 i + 1 (gate and up of an expert) become rows g and g + 8 of a tile.
    GATE_UP = 1,
    // Rows i and i + 32 of each head (what rotates together) become rows g and g + 8.
    ROTARY = 2,
};

struct Pack {
    const void* values;    // BF16: bf16; FP4: codes, the even column in the low nibble
    const uint8_t* scales; // FP4: one byte per block
    uint4* weights;        // [row tiles, column tiles, vectors of a tile]
    uint16_t* packed_scales;
    uint32_t rows, cols, order;
    uint32_t block;        // FP4: inputs per scale, 16 (E4M3) or 32 (E8M0)
    uint32_t reference;    // E8M0: the byte that becomes the largest scale
};
static_assert(sizeof(Pack) == 56);

__device__ __forceinline__ uint32_t stored_row(uint32_t order, uint32_t tile, uint32_t row) {
    uint32_t pair = row % 8, upper = row / 8;
    if (order == GATE_UP) return tile * 16 + 2 * pair + upper;
    if (order == ROTARY) return tile / 4 * HEAD + tile % 4 * 8 + pair + upper * (HEAD / 2);
    return tile * 16 + row;
}

// What a thread packs: one lane's share of a tile.
struct Share {
    size_t index, tile;
    uint32_t column_tiles;
    bool inside;
    __device__ __forceinline__ Share(const Pack& p) {
        column_tiles = (p.cols + TILE_COLS - 1) / TILE_COLS;
        index = blockIdx.x * size_t(blockDim.x) + threadIdx.x, tile = index / WARP;
        inside = tile < size_t((p.rows + TILE_ROWS - 1) / TILE_ROWS) * column_tiles;
    }
    // The stored row of row g or g + 8, and the first of its inputs.
    __device__ __forceinline__ uint32_t row(const Pack& p, int upper) const {
        return stored_row(p.order, tile / column_tiles, index % WARP / 4 + upper * 8);
    }
    __device__ __forceinline__ uint32_t input() const { return tile % column_tiles * TILE_COLS + 16 * (index % 4); }
};

extern "C" __global__ void pack_bf16(const __grid_constant__ Pack p) {
    const Share share(p);
    if (!share.inside) return;
    const uint16_t* values = (const uint16_t*)p.values;
    for (int j = 0; j < 4; j++) {
        uint32_t word[4];
        for (int a = 0; a < 4; a++) {
            uint32_t row = share.row(p, a % 2), k = share.input() + 4 * j + a / 2 * 2;
            bool inside = row < p.rows && k < p.cols;
            const uint16_t* v = values + size_t(row) * p.cols + k;
            word[a] = inside ? v[0] | uint32_t(v[1]) << 16 : 0;
        }
        p.weights[share.tile * Tile<BF16>::VECTORS + j * WARP + share.index % WARP] = make_uint4(word[0], word[1], word[2], word[3]);
    }
}

// E4M3 (times 2^7) or E8M0 (relative to the largest) as five bits of exponent and three of mantissa.
__device__ __forceinline__ uint32_t packed_scale(const Pack& p, uint32_t row, uint32_t k) {
    uint32_t byte = p.scales[size_t(row) * (p.cols / p.block) + k / p.block];
    if (p.block == 32) {
        int exponent = 30 - int(p.reference) + int(byte);
        return exponent < 0 ? 0 : min(exponent, 30) << 3;
    }
    uint32_t e = byte >> 3, m = byte & 7;
    float value = e ? ldexpf(8 + m, int(e) - 10) : ldexpf(m, -9);
    return __half_as_ushort(__float2half_rn(value * 128)) >> 7;
}

// The word that `codes` in common.cuh makes these of: each bit by an equation of which the others are known.
__device__ __forceinline__ uint32_t mix(const uint32_t (&a)[4]) {
    uint32_t word = a[0] >> 6 | a[1] >> 9;
    word |= (a[3] ^ word << 2) & 0x08000800u;
    word |= (a[2] ^ word) << 3 & 0x50005000u;
    word |= (a[2] ^ word >> 3) & 0x80008000u;
    word |= (a[3] ^ word) >> 2 & 0x20802080u;
    word |= (a[2] ^ word >> 3) & 0x04000400u;
    word |= (a[3] ^ word) >> 2 & 0x01000100u;
    return word;
}

extern "C" __global__ void pack_fp4(const __grid_constant__ Pack p) {
    const Share share(p);
    if (!share.inside) return;
    uint32_t k = share.input();
    uint32_t halves[4][4] = {}, scales = 0; // as `codes` gives them
    for (int upper = 0; upper < 2; upper++) {
        uint32_t row = share.row(p, upper);
        if (row >= p.rows || k >= p.cols) continue;
        const uint8_t* codes = (const uint8_t*)p.values + (size_t(row) * p.cols + k) / 2;
        scales |= packed_scale(p, row, k) << 8 * upper;
        for (int j = 0; j < 4; j++) {
            for (int i = 0; i < 4; i++) {
                uint32_t code = codes[(4 * j + i) / 2] >> i % 2 * 4 & 15;
                halves[j][i / 2 * 2 + upper] |= ((code & 8) << 12 | (code & 7) << 9) << i % 2 * 16;
            }
        }
    }
    p.weights[share.index] = make_uint4(mix(halves[0]), mix(halves[1]), mix(halves[2]), mix(halves[3]));
    p.packed_scales[share.index] = scales;
}
