// Ring caches: from a plan whose boxes of keys lie in frames of the grid to one whose boxes lie in the slots that hold them.
#pragma once

#include <cstdint>

#include "attention_fwd.h"

namespace stattn::attention_fwd {

constexpr int PLACERS = 128;  // threads

struct PlaceParameters {
    int* plan;          // a copy, which is changed in place
    const int* frames;  // [slots]
    int slots, grid_frames;
    int heads, tiles, line_tiles, line_record, warpgroups;
};

// How many of the block's threads before this one have `flag`, and, in `all`, how many in all.
__device__ __forceinline__ int rank_of(bool flag, int (&sums)[PLACERS / 32], int* all) {
    const uint32_t votes = __ballot_sync(0xFFFFFFFF, flag);
    const int warp = threadIdx.x / 32;
    __syncthreads();
    if (threadIdx.x % 32 == 0) sums[warp] = __popc(votes);
    __syncthreads();
    int before = __popc(votes & ((1u << threadIdx.x % 32) - 1));
    *all = 0;
    for (int other = 0; other < PLACERS / 32; ++other) {
        if (other < warp) before += sums[other];
        *all += sums[other];
    }
    return before;
}

__device__ __forceinline__ bool is_held(int4 box, const int* slot_of) { return box.w != 0 || slot_of[box.x] >= 0; }

// A block for each tile: boxes of frames that no slot holds are taken out of its list, and so are their masks; the others
// get the slot in place of the frame. What is kept moves to the front, so it can be written where it is read.
static __global__ void __launch_bounds__(PLACERS) place_frames(const __grid_constant__ PlaceParameters p) {
    extern __shared__ int slot_of[];  // [grid_frames], -1 for none
    __shared__ int sums[PLACERS / 32];
    int4* const records = reinterpret_cast<int4*>(p.plan);
    int record = p.line_record + 2 * (blockIdx.x - p.heads * p.tiles);
    if (blockIdx.x < p.heads * p.tiles) {
        const int head = blockIdx.x / p.tiles, start = p.plan[head];
        for (int other = 0; other < head; ++other)
            if (p.plan[other] == start) return;  // heads may share a list
        record = start + 2 * (blockIdx.x % p.tiles);
    }
    for (int frame = threadIdx.x; frame < p.grid_frames; frame += PLACERS) slot_of[frame] = -1;
    __syncthreads();
    for (int slot = threadIdx.x; slot < p.slots; slot += PLACERS) {
        const int frame = p.frames[slot];
        if (0 <= frame && frame < p.grid_frames) slot_of[frame] = slot;
    }
    __syncthreads();
    const int4 list = records[record + 1];  // first box, boxes, first mask record, boxes with masks

    int masked = 0, all;
#pragma unroll 1
    for (int first = 0; first < list.w; first += PLACERS) {
        const int number = first + threadIdx.x;
        rank_of(number < list.w && is_held(records[list.x + number], slot_of), sums, &all);
        masked += all;
    }
#pragma unroll 1
    for (int group = 0; group < p.warpgroups; ++group) {
        int to = list.z + group * masked;
#pragma unroll 1
    for (int first = 0; first < list.w; first += PLACERS) {
            const int number = first + threadIdx.x;
            const bool keep = number < list.w && is_held(records[list.x + number], slot_of);
            const int4 mask = keep ? records[list.z + group * list.w + number] : int4{};
            const int rank = rank_of(keep, sums, &all);  // by then all have read
            if (keep) records[to + rank] = mask;
            to += all;
        }
    }
    int boxes = 0;
#pragma unroll 1
    for (int first = 0; first < list.y; first += PLACERS) {
        const int number = first + threadIdx.x;
        int4 box = number < list.y ? records[list.x + number] : int4{0, 0, 0, 0};
        const bool keep = number < list.y && is_held(box, slot_of);
        const int rank = rank_of(keep, sums, &all);
        if (keep && box.w == 0) box.x = slot_of[box.x];
        if (keep) records[list.x + boxes + rank] = box;
        boxes += all;
    }
    if (threadIdx.x == 0) records[record + 1] = make_int4(list.x, boxes, list.z, masked);
}

}  // namespace stattn::attention_fwd
