// The passes behind the attention backward by key tiles: from sums in fp32 to dQ, and from pieces to dK and dV.
#include "attention_bwd.h"

#include "sm90.cuh"
#include "stattn.h"

namespace stattn {
namespace {

constexpr int SLAB = 64, KEYS = 2 * SLAB;  // of a key tile

// dK and dV of the keys whose tiles were cut into pieces: a block for each tile, head and batch.
template <typename Element>
__global__ void __launch_bounds__(256) sum_pieces(const AttentionPlan plan, const float* partial, Strided dk, Strided dv,
                                                  int key_heads, int head_dim, int keys) {
    const int head = blockIdx.y, batch = blockIdx.z, columns = head_dim / 4;
    const int4* records = reinterpret_cast<const int4*>(plan.data) + plan.split_record + 2 * blockIdx.x;
    const int4 place = __ldg(records), list = __ldg(records + 1);
    const int kind = place.w & 3;
    const int64_t tile = int64_t{KEYS} * head_dim;
    const float* first = partial + ((int64_t{batch} * key_heads + head) * plan.pieces + list.x) * 2 * tile;
    const int slab_rows = kind == attention_fwd::VIDEO ? plan.slab[0] * plan.slab[1] * plan.slab[2] : SLAB;
    for (int i = threadIdx.x; i < KEYS * columns; i += 256) {
        const int row = i / columns, column = i % columns * 4, group = row / SLAB, number = row % SLAB;
        if (number >= slab_rows) continue;
        int key;
        if (kind == attention_fwd::VIDEO) {
            const int in_slab[3] = {number / plan.slab[2] / plan.slab[1], number / plan.slab[2] % plan.slab[1],
                                    number % plan.slab[2]};
            const int corner[3] = {place.x, place.y, place.z};
            int at[3];
            bool inside = true;
            for (int axis = 0; axis < 3; ++axis) {
                const int stacked = axis == plan.stacked ? group * plan.slab[axis] : 0;
                at[axis] = corner[axis] + (stacked + in_slab[axis]) * plan.steps[axis];
                inside &= at[axis] < plan.k_shape[axis];
            }
            if (!inside) continue;
            key = plan.before + (at[0] * plan.k_shape[1] + at[1]) * plan.k_shape[2] + at[2];
        } else {
            const int in_line = place.z + row;
            if (in_line >= (kind == attention_fwd::BEFORE ? plan.before : plan.after)) continue;
            key = kind == attention_fwd::BEFORE ? in_line : keys - plan.after + in_line;
        }
        float4 sum[2] = {};
        for (int piece = 0; piece < list.y; ++piece)
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

// dQ from the sums of dQ / scale, eight columns a thread.
template <typename Element>
__global__ void __launch_bounds__(256) finish_dq(const float* sums, Strided dq, int heads, int queries, int columns,
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
    Element* to = static_cast<Element*>(const_cast<void*>(dq.data)) + batch * dq.batch + query * dq.token + head * dq.head;
    __stcs(reinterpret_cast<uint4*>(to) + column, packed);
}

}  // namespace

cudaError_t attention_backward_sum(const AttentionBackward& call, cudaStream_t stream) {
    const dim3 blocks(call.plan->split_tiles, call.key_heads, call.batch);
    if (call.key_heads > 65535 || call.batch > 65535) return cudaErrorInvalidConfiguration;
    const auto kernel = call.bf16 ? sum_pieces<__nv_bfloat16> : sum_pieces<__half>;
    kernel<<<blocks, 256, 0, stream>>>(*call.plan, call.partial, call.dk, call.dv, call.key_heads, call.head_dim, call.keys);
    return cudaGetLastError();
}

cudaError_t attention_backward_finish(const AttentionBackward& call, cudaStream_t stream) {
    const int columns = call.head_dim / 8;
    const int64_t count = int64_t{call.batch} * call.heads * call.queries * columns;
    const int64_t blocks = (count + 255) / 256;
    if (count == 0) return cudaSuccess;
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    const auto kernel = call.bf16 ? finish_dq<__nv_bfloat16> : finish_dq<__half>;
    kernel<<<static_cast<int>(blocks), 256, 0, stream>>>(call.dq_sum, call.dq, call.heads, call.queries, columns, call.scale,
                                                         count);
    return cudaGetLastError();
}

}  // namespace stattn
