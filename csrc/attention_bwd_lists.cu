// Plans of the attention backward where lists on the device say which tiles of keys each tile of queries sees.
//
// The kernels of the backward read plans (attention_fwd.h, attention_bwd.h). Here one is written on the device: the rows of
// a tile are slabs side by side, one for each warpgroup, of the tiles of queries or keys of the lists; the tiles of the
// other side are cut into boxes. A tile visits what any of its slabs is listed with, in row-major order, boxes with masks
// first. How tiles are cut, and the groups of masks, come from the host (stattn/ops/_cuda_bwd_lists.py).
#include "stattn.h"

namespace stattn {
namespace {

constexpr int MARKERS = 128;
constexpr int SUMMERS = 1024;
constexpr int WARPS = 4;  // of a block that counts or writes, each with a tile
constexpr int MOST_SLABS = 3;
constexpr int UNSEEN = -1, SEEN_WHOLE = -2;  // the last word of a mask record; only the kernel of dK and dV knows the second

// Bit n of word w of a row of `listed` says whether it is listed with tile 32 w + n of the other side.
__global__ void __launch_bounds__(MARKERS) mark(const __grid_constant__ AttentionListPlan l, uint32_t* listed,
                                                uint32_t* partly) {
    const int q_tile = blockIdx.x, head = blockIdx.y;
    const int columns = l.by_key ? l.q_tiles : l.k_tiles, words = (columns + 31) / 32;
    const int64_t rows = l.by_key ? l.k_tiles : l.q_tiles;
    const int count = min(l.count[head * l.count_stride[0] + q_tile * l.count_stride[1]], l.most);
    const int32_t* index = l.index + head * l.index_stride[0] + q_tile * l.index_stride[1];
    for (int i = threadIdx.x; i < count; i += MARKERS) {
        const int k_tile = index[i * l.index_stride[2]];
        if (k_tile < 0 || k_tile >= l.k_tiles) continue;  // nobody checked the entries: stay inside the table
        const int row = l.by_key ? k_tile : q_tile, column = l.by_key ? q_tile : k_tile;
        const int64_t at = (head * rows + row) * words + column / 32;
        atomicOr(listed + at, 1u << column % 32);
        if (l.partial && l.partial[head * l.partial_stride[0] + q_tile * l.partial_stride[1] + i * l.partial_stride[2]])
            atomicOr(partly + at, 1u << column % 32);
    }
}

// What a tile's slabs are listed with, in one word.
struct Word {
    uint32_t seen[MOST_SLABS], part[MOST_SLABS], any;
    uint32_t masked;  // what is not seen whole by every slab

    __device__ Word(const AttentionListPlan& l, const uint32_t* listed, const uint32_t* partly, int head, int tile, int word,
                    int words) {
        const int64_t rows = l.by_key ? l.k_tiles : l.q_tiles;
        any = 0;
        uint32_t all = ~0u, partial = 0;
#pragma unroll
        for (int slab = 0; slab < MOST_SLABS; ++slab) {
            seen[slab] = part[slab] = 0;
            if (slab >= l.slabs) continue;
            const int row = l.rows[tile * l.slabs + slab];
            if (row < 0) continue;  // there is no such slab
            seen[slab] = listed[(head * rows + row) * words + word];
            part[slab] = partly[(head * rows + row) * words + word];
            any |= seen[slab], all &= seen[slab], partial |= part[slab];
        }
        masked = any & (~all | partial);
    }
};

// A tile of the other side.
struct Column {
    int t, h, w;
    int boxes[3];  // that begin inside the grid
    bool whole;    // all its boxes are full

    __device__ Column(const AttentionListPlan& l, int number) {
        w = number % l.columns[2], h = number / l.columns[2] % l.columns[1], t = number / l.columns[2] / l.columns[1];
        const int place[3] = {t, h, w};
        whole = !l.short_boxes;
#pragma unroll
        for (int axis = 0; axis < 3; ++axis) {
            const int room = l.shape[axis] - place[axis] * l.column_tile[axis];
            whole &= room >= l.column_tile[axis];
            boxes[axis] = (min(room, l.column_tile[axis]) + l.part[axis] - 1) / l.part[axis];
        }
    }
    __device__ int count() const { return boxes[0] * boxes[1] * boxes[2]; }
};

__device__ __forceinline__ int sum_of_warp(int value) { return __reduce_add_sync(0xFFFFFFFF, value); }

__device__ __forceinline__ int sum_below(int value) {
    const int lane = threadIdx.x % 32;
    int sum = value;
    for (int step = 1; step < 32; step *= 2) {
        const int below = __shfl_up_sync(0xFFFFFFFF, sum, step);
        if (lane >= step) sum += below;
    }
    return sum - value;
}

// Counts a word's boxes: those with masks in x, all others in y.
__device__ int2 boxes_of(const AttentionListPlan& l, const Word& word, int number) {
    int2 found = make_int2(0, 0);
    for (uint32_t rest = word.any; rest; rest &= rest - 1) {
        const int bit = __ffs(rest) - 1;
        const Column column(l, number * 32 + bit);
        const bool masked = (word.masked >> bit & 1) || !column.whole;
        (masked ? found.x : found.y) += column.count();
    }
    return found;
}

// counts: of each tile of each head, boxes with masks and without.
__global__ void __launch_bounds__(32 * WARPS)
count_boxes(const __grid_constant__ AttentionListPlan l, const uint32_t* listed, const uint32_t* partly, int2* counts) {
    const int number = blockIdx.x * WARPS + threadIdx.x / 32;
    if (number >= l.tiles * l.list_heads) return;
    const int head = number / l.tiles, tile = number % l.tiles;
    const int words = ((l.by_key ? l.q_tiles : l.k_tiles) + 31) / 32;
    int2 found = make_int2(0, 0);
    for (int word = threadIdx.x % 32; word < words; word += 32) {
        const int2 mine = boxes_of(l, Word(l, listed, partly, head, tile, word, words), word);
        found.x += mine.x, found.y += mine.y;
    }
    found.x = sum_of_warp(found.x), found.y = sum_of_warp(found.y);
    if (threadIdx.x % 32 == 0) counts[number] = found;
}

// Lays the tiles' records out one behind the other, and writes what a plan has before them. In one block.
__global__ void __launch_bounds__(SUMMERS)
lay_out(const __grid_constant__ AttentionListPlan l, const int2* counts) {
    __shared__ int sums[SUMMERS / 32];
    const int total = l.tiles * l.list_heads, each = (total + SUMMERS - 1) / SUMMERS;
    const int from = min(static_cast<int>(threadIdx.x) * each, total), to = min(from + each, total);
    int mine = 0;
    for (int i = from; i < to; ++i) mine += counts[i].y + (1 + l.slabs) * counts[i].x;
    int start = sum_below(mine);
    if (threadIdx.x % 32 == 31) sums[threadIdx.x / 32] = start + mine;
    __syncthreads();
    for (int warp = 0; warp < static_cast<int>(threadIdx.x) / 32; ++warp) start += sums[warp];
    int4* const records = reinterpret_cast<int4*>(l.plan);
    start += l.first_record + 2 * total;
    for (int i = from; i < to; ++i) {
        const int boxes = counts[i].x + counts[i].y;
        records[l.first_record + 2 * i] = reinterpret_cast<const int4*>(l.corners)[i % l.tiles];
        records[l.first_record + 2 * i + 1] = make_int4(start, boxes, start + boxes, counts[i].x);
        start += boxes + l.slabs * counts[i].x;
    }
    if (threadIdx.x == 0) l.plan[l.heads] = 0;  // by which blocks begin together
    for (int head = threadIdx.x; head < l.heads; head += SUMMERS)
        l.plan[head] = l.first_record + 2 * l.tiles * (head % l.list_heads);
}

__global__ void __launch_bounds__(32 * WARPS)
write_boxes(const __grid_constant__ AttentionListPlan l, const uint32_t* listed, const uint32_t* partly) {
    const int number = blockIdx.x * WARPS + threadIdx.x / 32;
    if (number >= l.tiles * l.list_heads) return;
    const int head = number / l.tiles, tile = number % l.tiles;
    const int words = ((l.by_key ? l.q_tiles : l.k_tiles) + 31) / 32;
    int4* const records = reinterpret_cast<int4*>(l.plan);
    const int4 corner = reinterpret_cast<const int4*>(l.corners)[tile];
    const int4 list = records[l.first_record + 2 * number + 1];
    int next_masked = 0, next_whole = list.w;  // among the tile's boxes
    for (int first = 0; first < words; first += 32) {
        const int place = first + threadIdx.x % 32;
        Word word(l, listed, partly, head, tile, min(place, words - 1), words);
        if (place >= words) word.any = 0;
        const int2 mine = boxes_of(l, word, place);
        int to_masked = next_masked + sum_below(mine.x), to_whole = next_whole + sum_below(mine.y);
        next_masked += sum_of_warp(mine.x), next_whole += sum_of_warp(mine.y);
        for (uint32_t rest = word.any; rest; rest &= rest - 1) {
            const int bit = __ffs(rest) - 1;
            const Column column(l, place * 32 + bit);
            const bool masked = (word.masked >> bit & 1) || !column.whole;
            for (int i = 0; i < column.count(); ++i) {
                const int w = i % column.boxes[2], h = i / column.boxes[2] % column.boxes[1];
                const int t = i / column.boxes[2] / column.boxes[1];
                const int to = masked ? to_masked++ : to_whole++;
                records[list.x + to] = make_int4(column.t * l.column_tile[0] + t * l.part[0],
                                                 column.h * l.column_tile[1] + h * l.part[1],
                                                 column.w * l.column_tile[2] + w * l.part[2], 0);
                if (!masked) continue;
                const int box[3] = {column.t * l.parts[0] + t, column.h * l.parts[1] + h, column.w * l.parts[2] + w};
#pragma unroll
                for (int slab = 0; slab < MOST_SLABS; ++slab) {
                    if (slab >= l.slabs) continue;
                    int group = 0;
                    const bool sees = word.seen[slab] >> bit & 1;
                    if (sees) {
                        const bool part = word.part[slab] >> bit & 1;
                        const int own[3] = {corner.x / l.slab[0], corner.y / l.slab[1], corner.z / l.slab[2]};
#pragma unroll
                        for (int axis = 0; axis < 3; ++axis) {
                            const int row = own[axis] + (axis == l.stacked ? slab : 0);
                            const int32_t* patterns = l.patterns + l.pattern_at[axis];
                            group = group * l.pattern_count[axis] +
                                    patterns[part ? (1 + row) * l.boxes[axis] + box[axis] : box[axis]];
                        }
                    }
                    const bool whole = l.by_key && column.whole && !(word.part[slab] >> bit & 1);
                    records[list.z + slab * list.w + to] =
                        make_int4(l.first_group + group, 0, 0, !sees ? UNSEEN : whole ? SEEN_WHOLE : 0);
                }
            }
        }
    }
}

}  // namespace

cudaError_t attention_backward_lists(const AttentionListPlan& l, cudaStream_t stream) {
    if (l.slabs > MOST_SLABS) return cudaErrorInvalidValue;
    const int rows = l.by_key ? l.k_tiles : l.q_tiles, words = ((l.by_key ? l.q_tiles : l.k_tiles) + 31) / 32;
    const int64_t bits = int64_t{l.list_heads} * rows * words, lists = int64_t{l.list_heads} * l.tiles;
    if (lists > INT32_MAX || 2 * bits + 2 * lists > l.scratch_size) return cudaErrorInvalidValue;
    int2* counts = reinterpret_cast<int2*>(l.scratch);
    auto* listed = reinterpret_cast<uint32_t*>(l.scratch + 2 * lists);
    uint32_t* partly = listed + bits;
    cudaError_t error = cudaMemsetAsync(listed, 0, 2 * bits * sizeof(uint32_t), stream);
    if (error == cudaSuccess)
        error = cudaMemcpyAsync(l.plan + int64_t{4} * l.groups_record, l.groups, l.groups_bytes, cudaMemcpyDeviceToDevice,
                                stream);
    if (error != cudaSuccess) return error;
    const int blocks = static_cast<int>((lists + WARPS - 1) / WARPS);
    mark<<<dim3(l.q_tiles, l.list_heads), MARKERS, 0, stream>>>(l, listed, partly);
    count_boxes<<<blocks, 32 * WARPS, 0, stream>>>(l, listed, partly, counts);
    lay_out<<<1, SUMMERS, 0, stream>>>(l, counts);
    write_boxes<<<blocks, 32 * WARPS, 0, stream>>>(l, listed, partly);
    return cudaGetLastError();
}

}  // namespace stattn
