// The passes behind the attention backward by key tiles: from sums in fp32 to dQ, and from pieces to dK and dV.
#include "attention_bwd.h"

#include "sm90.cuh"
#include "stattn.h"

namespace stattn {
namespace {

constexpr int SLAB = 64, KEYS = 2 * SLAB;  // of a key tile

// The key that a row of a tile of a plan is, or -1. place: of the tile.
__device__ __forceinline__ int key_at(const AttentionPlan& plan, int4 place, int row, int keys) {
    const int kind = place.w & 3, group = row / SLAB, number = row % SLAB;
    if (kind != attention_fwd::VIDEO) {
        const int in_line = place.z + row;
        if (in_line >= (kind == attention_fwd::BEFORE ? plan.before : plan.after)) return -1;
        return kind == attention_fwd::BEFORE ? in_line : keys - plan.after + in_line;
    }
    if (number >= plan.slab[0] * plan.slab[1] * plan.slab[2]) return -1;
    const int corner[3] = {place.x, place.y, place.z};
    const int in_slab[3] = {number / plan.slab[2] / plan.slab[1], number / plan.slab[2] % plan.slab[1],
                            number % plan.slab[2]};
    int at[3];
    for (int axis = 0; axis < 3; ++axis) {
        const int stacked = axis == plan.stacked ? group * plan.slab[axis] : 0;
        at[axis] = corner[axis] + (stacked + in_slab[axis]) * plan.steps[axis];
        if (at[axis] >= plan.k_shape[axis]) return -1;
    }
    return plan.before + (at[0] * plan.k_shape[1] + at[1]) * plan.k_shape[2] + at[2];
}

// dK and dV of the keys whose tiles were cut into pieces: a block for each tile, and with a plan each head and batch.
template <typename Element, bool PLANNED>
__global__ void __launch_bounds__(256) sum_pieces(const AttentionPlan plan, const AttentionCut cut,
                                                  const float* partial, Strided dk, Strided dv, int key_heads,
                                                  int head_dim, int keys) {
    int head = blockIdx.y, batch = blockIdx.z, first_piece = blockIdx.x * cut.pieces, pieces = cut.pieces;
    int4 place = {};
    if constexpr (PLANNED) {
        const int4* records = reinterpret_cast<const int4*>(plan.data) + plan.split_record + 2 * blockIdx.x;
        place = __ldg(records);
        const int4 list = __ldg(records + 1);
        first_piece = (batch * key_heads + head) * plan.pieces + list.x;
        pieces = list.y;
    } else {
        const int number = cut.whole + blockIdx.x, per_head = (keys + KEYS - 1) / KEYS;
        place.z = number % per_head * KEYS;
        head = number / per_head % key_heads;
        batch = number / per_head / key_heads;
    }
    const int columns = head_dim / 4;
    const int64_t tile = int64_t{KEYS} * head_dim;
    const float* first = partial + first_piece * 2 * tile;
    for (int i = threadIdx.x; i < KEYS * columns; i += 256) {
        const int row = i / columns, column = i % columns * 4;
        const int key = PLANNED ? key_at(plan, place, row, keys) : place.z + row < keys ? place.z + row : -1;
        if (key < 0) continue;
        float4 sum[2] = {};
        for (int piece = 0; piece < pieces; ++piece)
            for (int which = 0; which < 2; ++which) {
                const float4 part = __ldcs(reinterpret_cast<const float4*>(
                    first + (2 * piece + which) * tile + row * head_dim + column));
                sum[which].x += part.x, sum[which].y += part.y, sum[which].z += part.z, sum[which].w += part.w;
            }
        for (int which = 0; which < 2; ++which) {
            const Strided& to = which == 0 ? dk : dv;
            Element* row_to = static_cast<Element*>(const_cast<void*>(to.data)) + batch * to.batch + key * to.token +
                              head * to.head + column;
            *reinterpret_cast<uint2*>(row_to) = {sm90::pack<Element>(sum[which].x, sum[which].y),
                                                 sm90::pack<Element>(sum[which].z, sum[which].w)};
        }
    }
}

// dQ from the sums of dQ / scale in rows, eight columns a thread.
template <typename Element>
__global__ void __launch_bounds__(256) finish_rows(const float* sums, Strided dq, int heads, int queries, int columns,
                                                   float scale, int64_t count) {
    const int64_t index = int64_t{blockIdx.x} * 256 + threadIdx.x;
    if (index >= count) return;
    const int column = static_cast<int>(index % columns);
    const int64_t row = index / columns;
    const int query = static_cast<int>(row % queries), head = static_cast<int>(row / queries % heads);
    const int batch = static_cast<int>(row / queries / heads);
    const float4* from = reinterpret_cast<const float4*>(sums) + 2 * index;
    const float4 a = __ldcs(from), b = __ldcs(from + 1);
    uint4 packed;
    packed.x = sm90::pack<Element>(a.x * scale, a.y * scale), packed.y = sm90::pack<Element>(a.z * scale, a.w * scale);
    packed.z = sm90::pack<Element>(b.x * scale, b.y * scale), packed.w = sm90::pack<Element>(b.z * scale, b.w * scale);
    Element* first = static_cast<Element*>(const_cast<void*>(dq.data));
    Element* to = first + batch * dq.batch + query * dq.token + head * dq.head;
    __stcs(reinterpret_cast<uint4*>(to) + column, packed);
}

// The query that a row of a box is, or -1.
__device__ __forceinline__ int query_at(const QueryBoxes& boxes, int box, int row, int queries) {
    const int rows = boxes.rows(), before = boxes.in_line(boxes.before), after = boxes.count() - boxes.in_line(boxes.after);
    if (row >= rows) return -1;
    if (box < before) return box * rows + row < boxes.before ? box * rows + row : -1;
    if (box >= after) {
        const int in_line = (box - after) * rows + row;
        return in_line < boxes.after ? queries - boxes.after + in_line : -1;
    }
    const int number = box - before, in_w = boxes.along(2), in_h = boxes.along(1);
    const int t = number / in_w / in_h * boxes.box[0] + row / boxes.box[2] / boxes.box[1];
    const int h = number / in_w % in_h * boxes.box[1] + row / boxes.box[2] % boxes.box[1];
    const int w = number % in_w * boxes.box[2] + row % boxes.box[2];
    if (t >= boxes.shape[0] || h >= boxes.shape[1] || w >= boxes.shape[2]) return -1;
    return boxes.before + (t * boxes.shape[1] + h) * boxes.shape[2] + w;
}

// The same from boxes of at most BQ: eight columns of two rows a thread, of which four lanes had two each.
template <typename Element, int BQ>
__global__ void __launch_bounds__(256) finish_boxes(const float* sums, const QueryBoxes boxes, Strided dq, int heads,
                                                    int queries, int head_dim, float scale, int64_t count) {
    const int64_t index = int64_t{blockIdx.x} * 256 + threadIdx.x;
    if (index >= count) return;
    // Chunks of columns, rows, warps, warpgroups, boxes, heads.
    const int chunk = index % 8, lane = index / 8 % 8 * 4, warp = index / 64 % 4, group = index / 256 % 2;
    const int in_head = boxes.count(), box = index / 512 % in_head;
    const int64_t x = index / 512 / in_head;
    const float4* from = reinterpret_cast<const float4*>(sums) + (index / 64 * 8 + chunk) * 32 + lane;
    float4 found[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) found[i] = __ldcs(from + i);
    const int column = (BQ == 64 ? group * 64 : 0) + 8 * chunk;
    if (column >= head_dim) return;
    Element* first = static_cast<Element*>(const_cast<void*>(dq.data));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int query = query_at(boxes, box, (BQ == 64 ? 0 : group * 64) + warp * 16 + lane / 4 + 8 * half, queries);
        if (query < 0) continue;
        uint32_t packed[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
            packed[i] = half ? sm90::pack<Element>(found[i].z * scale, found[i].w * scale)
                             : sm90::pack<Element>(found[i].x * scale, found[i].y * scale);
        Element* to = first + x / heads * dq.batch + query * dq.token + x % heads * dq.head + column;
        __stcs(reinterpret_cast<uint4*>(to), uint4{packed[0], packed[1], packed[2], packed[3]});
    }
}

template <typename Element>
cudaError_t finish(const AttentionBackward& call, const QueryBoxes* boxes, cudaStream_t stream) {
    const int columns = call.head_dim / 8;
    const int64_t heads = int64_t{call.batch} * call.heads;
    const int64_t count = boxes ? heads * boxes->count() * 512 : heads * call.queries * columns;
    const int64_t blocks = (count + 255) / 256;
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    if (!boxes)
        finish_rows<Element><<<static_cast<int>(blocks), 256, 0, stream>>>(call.dq_sum, call.dq, call.heads, call.queries,
                                                                            columns, call.scale, count);
    else if (call.head_dim > 64)
        finish_boxes<Element, 64><<<static_cast<int>(blocks), 256, 0, stream>>>(
            call.dq_sum, *boxes, call.dq, call.heads, call.queries, call.head_dim, call.scale, count);
    else
        finish_boxes<Element, 128><<<static_cast<int>(blocks), 256, 0, stream>>>(
            call.dq_sum, *boxes, call.dq, call.heads, call.queries, call.head_dim, call.scale, count);
    return cudaGetLastError();
}

}  // namespace

cudaError_t attention_backward_sum(const AttentionBackward& call, const AttentionCut& cut, cudaStream_t stream) {
    if (call.key_heads > 65535 || call.batch > 65535) return cudaErrorInvalidConfiguration;
    const bool planned = call.plan != nullptr;
    const dim3 blocks = planned ? dim3(call.plan->split_tiles, call.key_heads, call.batch) : dim3(cut.tiles);
    const auto kernel = call.bf16 ? (planned ? sum_pieces<__nv_bfloat16, true> : sum_pieces<__nv_bfloat16, false>)
                                  : (planned ? sum_pieces<__half, true> : sum_pieces<__half, false>);
    kernel<<<blocks, 256, 0, stream>>>(planned ? *call.plan : AttentionPlan{}, cut, call.partial, call.dk, call.dv,
                                       call.key_heads, call.head_dim, call.keys);
    return cudaGetLastError();
}

cudaError_t attention_backward_finish(const AttentionBackward& call, const QueryBoxes* boxes, cudaStream_t stream) {
    if (call.batch == 0 || call.heads == 0 || call.queries == 0) return cudaSuccess;
    return call.bf16 ? finish<__nv_bfloat16>(call, boxes, stream) : finish<__half>(call, boxes, stream);
}

}  // namespace stattn
