// How a warpgroup ends its part of a tile of attention: the output and LSE of its rows, and those of tiles in pieces.
#pragma once

#include "attention_tile.cuh"

namespace stattn::attention_fwd {

// Names of barriers: 0 is that of the whole block.
__device__ __forceinline__ uint32_t turn_barrier(int group) { return 1 + group; }
__device__ __forceinline__ uint32_t store_barrier(int group) { return 4 + group; }

// The state of a thread's two rows, `row` and `row + 8` of its warpgroup.
struct Rows {
    float top[2];  // c times the greatest score so far, over the row
    float sum[2];  // of the weights so far, over this thread's columns
};

constexpr float LN_2 = 0.6931471805599453f;

// Where a warpgroup's part of a piece of a tile lies: outputs as threads hold them, [D / 8][128], and LSEs of rows.
template <typename S>
struct Piece {
    static constexpr int OUTS = S::D / 8 * 128;
    float4* out;
    float* lse;

    __device__ Piece(const Parameters& p, int sequence, int number, int group) {
        const int64_t part = (int64_t{sequence} * p.pieces + number) * S::WARPGROUPS + group;
        const int64_t parts = int64_t{p.batch} * p.heads * p.pieces * S::WARPGROUPS;
        out = reinterpret_cast<float4*>(p.partial) + part * OUTS;
        lse = p.partial + parts * OUTS * 4 + part * ROWS;
    }
};

// Merges the pieces of a tile if this warpgroup is the last of them to be done, always in their order, and returns whether
// it was. What the thread holds of the tile is then in `out`, to be multiplied by `inverse`, and in `lse`.
template <typename S>
__device__ __forceinline__ bool merge_pieces(const Parameters& p, const Tile& tile, int group, float (&out)[S::D / 2],
                                             float (&inverse)[2], float (&lse)[2]) {
    const int sequence = tile.batch * p.heads + tile.head;
    // The tile's record: where all tiles are cut alike, the first guess is right.
    const int records = __ldg(p.plan + tile.head) + 2 * p.tiles_per_head + 1;
    int number = static_cast<int>(int64_t{tile.piece} * p.split_tiles / p.pieces);
    int4 pieces = record_at(p, records + 2 * number);  // the first, how many
    while (pieces.y == 0 || tile.piece < pieces.x) pieces = record_at(p, records + 2 * --number);
    while (tile.piece >= pieces.x + pieces.y) pieces = record_at(p, records + 2 * ++number);

    int* const arrived = p.arrived + (int64_t{sequence} * p.split_tiles + number) * S::WARPGROUPS + group;
    __threadfence();
    named_sync(store_barrier(group), 128);
    const bool last = named_any(store_barrier(group), 128, threadIdx.x % 128 == 0 && atomicAdd(arrived, 1) == pieces.y - 1);
    if (!last) return false;
    __threadfence();

    float top[2] = {-INFINITY, -INFINITY}, sum[2] = {};
#pragma unroll 1
    for (int i = pieces.x; i < pieces.x + pieces.y; ++i) {
        const Piece<S> piece(p, sequence, i, group);
#pragma unroll
        for (int half = 0; half < 2; ++half) top[half] = fmaxf(top[half], __ldcg(piece.lse + first_row() + 8 * half));
    }
#pragma unroll
    for (int i = 0; i < S::D / 2; ++i) out[i] = 0.0f;
#pragma unroll 1
    for (int i = pieces.x; i < pieces.x + pieces.y; ++i) {
        const Piece<S> piece(p, sequence, i, group);
        float share[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float origin = top[half] == -INFINITY ? 0.0f : top[half];
            share[half] = exp2f(__ldcg(piece.lse + first_row() + 8 * half) - origin);
            sum[half] += share[half];
        }
#pragma unroll
        for (int j = 0; j < S::D / 8; ++j) {
            const float4 found = __ldcg(piece.out + j * 128 + threadIdx.x % 128);
            out[4 * j] = fmaf(found.x, share[0], out[4 * j]);
            out[4 * j + 1] = fmaf(found.y, share[0], out[4 * j + 1]);
            out[4 * j + 2] = fmaf(found.z, share[1], out[4 * j + 2]);
            out[4 * j + 3] = fmaf(found.w, share[1], out[4 * j + 3]);
        }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        inverse[half] = sum[half] > 0.0f ? 1.0f / sum[half] : 0.0f;
        lse[half] = sum[half] > 0.0f ? top[half] + log2f(sum[half]) : -INFINITY;
    }
    return true;
}

// Divides by the sums, stores the output tile from the warpgroup's own rows of Q, and the LSE. What a piece of a tile has
// goes to its place in `partial` first.
template <typename S>
__device__ __forceinline__ void store(const Parameters& p, const Tile& tile, float (&out)[S::D / 2], const Rows& rows,
                                      uint32_t slab, uint32_t empty_q, int group) {
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32 % 4;
    const bool line = S::PLANNED && tile.kind != VIDEO;
    const Corner corner = corner_of<S>(p, tile, group);
    float inverse[2], lse[2];
    int64_t token[2];  // of the LSE's line; -1 for a row that is none
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float sum = rows.sum[half];
        sum += __shfl_xor_sync(0xFFFFFFFF, sum, 1);
        sum += __shfl_xor_sync(0xFFFFFFFF, sum, 2);
        const int row = first_row() + 8 * half;
        token[half] = token_of<S>(p, tile, corner, row);
        // A global token that is not real sees nothing.
        if (line && token[half] >= 0 && p.valid) {
            const int number = (tile.kind == BEFORE ? 0 : p.before) + corner.w + row;
            if (!__ldg(p.valid + int64_t{tile.batch} * p.globals + number)) sum = 0.0f;
        }
        inverse[half] = sum > 0.0f ? 1.0f / sum : 0.0f;
        lse[half] = sum > 0.0f ? rows.top[half] + log2f(sum) : -INFINITY;
    }

    if (line && p.valid) {  // nor does it pass on a NaN of its own
#pragma unroll
        for (int i = 0; i < S::D / 2; ++i)
            if (inverse[i / 2 % 2] == 0.0f) out[i] = 0.0f;
    }

    if (S::PIECES && tile.piece >= 0) {
        const Piece<S> piece(p, tile.batch * p.heads + tile.head, tile.piece, group);
#pragma unroll
        for (int i = 0; i < S::D / 8; ++i)
            piece.out[i * 128 + threadIdx.x % 128] = make_float4(out[4 * i] * inverse[0], out[4 * i + 1] * inverse[0],
                                                                 out[4 * i + 2] * inverse[1], out[4 * i + 3] * inverse[1]);
        if (lane % 4 == 0) {
            piece.lse[first_row()] = lse[0];
            piece.lse[first_row() + 8] = lse[1];
        }
        if (!merge_pieces<S>(p, tile, group, out, inverse, lse)) return;
    }

    // Matrices of a store: rows 0-7 and 8-15 of 8 columns, then of the next 8.
    const int row = warp * 16 + lane % 16;
    const uint32_t address = slab + row * 128;
#pragma unroll
    for (int step = 0; step < S::D / 16; ++step) {
        const float* o = out + 8 * step;
        const int column = step % 4 * 2 + lane / 16;  // in words of 16 bytes
        store_matrices(address + step / 4 * S::SLAB_CHUNK + ((column ^ (row % 8)) * 16),
                       pack<typename S::Element>(o[0] * inverse[0], o[1] * inverse[0]),
                       pack<typename S::Element>(o[2] * inverse[1], o[3] * inverse[1]),
                       pack<typename S::Element>(o[4] * inverse[0], o[5] * inverse[0]),
                       pack<typename S::Element>(o[6] * inverse[1], o[7] * inverse[1]));
    }
    proxy_fence();
    named_sync(store_barrier(group), 128);
    if (threadIdx.x % 128 == 0) {
        const int x = tile.batch * p.o_x.batch + tile.head * p.o_x.head;
        const CUtensorMap* map = line ? &p.o_line[tile.kind - BEFORE] : &p.o_map;
#pragma unroll
        for (int chunk = 0; chunk < S::CHUNKS; ++chunk)
            copy_out(map, slab + chunk * S::SLAB_CHUNK, EVICT_FIRST, 64 * chunk, corner.w, corner.h, corner.t, x);
        copy_out_commit();
        copy_out_wait_read();
        barrier_arrive(empty_q);
    }

    if (lane % 4 == 0 && p.lse) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
            if (token[half] >= 0)
                p.lse[(int64_t{tile.batch} * p.heads + tile.head) * p.queries + token[half]] = lse[half] * LN_2;
    }
}

}  // namespace stattn::attention_fwd
