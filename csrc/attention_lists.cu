// The host's side of attention over block lists, and the pass that joins the lists of slabs that are computed together.
#include "attention_lists.cuh"

#include <algorithm>

#include "attention_launch.h"

namespace stattn {
namespace {

using attention_fwd::ROWS;
using attention_lists::attention_forward_lists;
using attention_lists::ENTRY_EDGE;
using attention_lists::ENTRY_PARTIAL;
using attention_lists::ENTRY_SEES;
using attention_lists::GROUPS;
using attention_lists::JoinParameters;
using attention_lists::ListParameters;
using attention_lists::ListShape;

constexpr int JOINERS = 128;  // threads
constexpr int MOST_TILES = 1 << 15;
constexpr int64_t FEW_KEYS = 16 << 20;  // bytes of a head's keys and values that stay in the L2 cache in any order

// Gathers, in bits for all key tiles, what three slabs see, and writes it as one list or as three, in ascending order.
__global__ void __launch_bounds__(JOINERS) join_lists(const __grid_constant__ JoinParameters j) {
    extern __shared__ uint32_t bits[];  // [GROUPS][listed, partial][words]
    __shared__ int sums[JOINERS / 32][GROUPS + 1];
    const int k_tiles = j.k_tiles[0] * j.k_tiles[1] * j.k_tiles[2], words = (k_tiles + 31) / 32;
    const int triple = blockIdx.x % j.triples, set = blockIdx.x / j.triples;
    if (blockIdx.x == 0 && threadIdx.x == 0) *j.done = 0;
    const int sample = set / j.list_heads, head = set % j.list_heads;
    for (int i = threadIdx.x; i < 2 * GROUPS * words; i += JOINERS) bits[i] = 0;
    __syncthreads();
    const int block[3] = {triple / j.blocks[2] / j.blocks[1], triple / j.blocks[2] % j.blocks[1], triple % j.blocks[2]};
    for (int group = 0; group < GROUPS; ++group) {
        int q_tile = 0;
        bool real = true;
        for (int axis = 0; axis < 3; ++axis) {
            const int slab = axis == j.stacked ? block[axis] * GROUPS + group : block[axis];
            real &= slab < j.slabs[axis];
            q_tile = q_tile * j.q_tiles[axis] + slab / j.slabs_per_tile[axis];
        }
        if (!real) continue;
        const int64_t at[3] = {sample, head, q_tile};
        int64_t count_at = 0, index_at = 0, partial_at = 0;
        for (int axis = 0; axis < 3; ++axis) {
            count_at += at[axis] * j.count_stride[axis];
            index_at += at[axis] * j.index_stride[axis];
            partial_at += at[axis] * j.partial_stride[axis];
        }
        const int count = min(__ldg(j.count + count_at), j.most);
        uint32_t* const listed = bits + 2 * group * words;
        for (int i = threadIdx.x; i < count; i += JOINERS) {
            const int tile = __ldg(j.index + index_at + i * j.index_stride[3]);
            if (tile < 0 || tile >= k_tiles) continue;  // nobody checked the entries: stay inside the table
            atomicOr(listed + tile / 32, 1u << tile % 32);
            if (j.partial && __ldg(j.partial + partial_at + i * j.partial_stride[3]))
                atomicOr(listed + words + tile / 32, 1u << tile % 32);
        }
    }
    __syncthreads();

    // Each thread takes some words: how many bits it has of each list and of their union, and how many those before it.
    const int each = (words + JOINERS - 1) / JOINERS, from = min(threadIdx.x * each, words), to = min(from + each, words);
    int mine[GROUPS + 1] = {}, before[GROUPS + 1], all[GROUPS + 1];
    for (int word = from; word < to; ++word) {
        uint32_t any = 0;
        for (int group = 0; group < GROUPS; ++group) {
            const uint32_t listed = bits[2 * group * words + word];
            mine[group] += __popc(listed);
            any |= listed;
        }
        mine[GROUPS] += __popc(any);
    }
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int n = 0; n <= GROUPS; ++n) {
        int sum = mine[n];
        for (int step = 1; step < 32; step *= 2) {
            const int below = __shfl_up_sync(0xFFFFFFFF, sum, step);
            if (lane >= step) sum += below;
        }
        if (lane == 31) sums[warp][n] = sum;
        before[n] = sum - mine[n];
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n <= GROUPS; ++n) {
        all[n] = 0;
        for (int other = 0; other < JOINERS / 32; ++other) {
            if (other < warp) before[n] += sums[other][n];
            all[n] += sums[other][n];
        }
    }
    // Three lists that are read one by one take as long as a joint one that is half as long as they are together.
    const bool joint = 2 * all[GROUPS] <= all[0] + all[1] + all[2];
    const int64_t joined = blockIdx.x;
    if (threadIdx.x == 0)
        j.counts[joined] = joint ? make_int4(all[GROUPS], 0, 0, 1) : make_int4(all[0], all[1], all[2], 0);
    int* const lists = j.lists + joined * GROUPS * j.room;
    for (int word = from; word < to; ++word) {
        uint32_t listed[GROUPS], partial[GROUPS], any = 0;
        for (int group = 0; group < GROUPS; ++group) {
            listed[group] = bits[2 * group * words + word];
            partial[group] = bits[(2 * group + 1) * words + word];
            any |= listed[group];
        }
        while (any) {
            const int bit = __ffs(any) - 1, tile = word * 32 + bit;
            any &= any - 1;
            const int w = tile % j.k_tiles[2], h = tile / j.k_tiles[2] % j.k_tiles[1], t = tile / j.k_tiles[2] / j.k_tiles[1];
            const bool edge = j.every_box_is_short || (t + 1) * j.k_tile[0] > j.k_shape[0] ||
                              (h + 1) * j.k_tile[1] > j.k_shape[1] || (w + 1) * j.k_tile[2] > j.k_shape[2];
            const uint32_t place = t << j.entry.t | h << j.entry.h | w | uint32_t{edge} << ENTRY_EDGE;
            uint32_t sees = 0;
            for (int group = 0; group < GROUPS; ++group) {
                const uint32_t own = (listed[group] >> bit & 1) << (ENTRY_SEES + group) |
                                     (partial[group] >> bit & 1) << (ENTRY_PARTIAL + group);
                sees |= own;
                if (!joint && own) lists[group * j.room + before[group]++] = place | own;
            }
            if (joint) lists[before[GROUPS]++] = place | sees;
        }
    }
}

int bits_for(int count) {
    int bits = 0;
    while ((1 << bits) < count) ++bits;
    return bits;
}

template <typename S>
cudaError_t launch(const AttentionForward& call, const AttentionLists& lists, cudaStream_t stream) {
    ListParameters l{};
    attention_fwd::Parameters& p = l.p;
    JoinParameters j{};
    const int ones[3] = {1, 1, 1};
    p.lse = call.lse;
    p.scale_log2 = call.scale * 1.4426950408889634f;
    p.batch = call.batch;
    p.heads = call.heads;
    p.queries_per_key = call.heads / call.key_heads;
    p.queries = call.queries;
    p.box_rows = lists.box[0] * lists.box[1] * lists.box[2];
    p.slab_rows = lists.slab[0] * lists.slab[1] * lists.slab[2];
    p.slab_bytes = S::CHUNKS * 128 * p.slab_rows;
    p.box_bytes = S::CHUNKS * 128 * p.box_rows;
    l.triples = l.boxes = 1;
    int64_t k_tiles = 1;
    for (int axis = 0; axis < 3; ++axis) {
        const bool stacked = axis == lists.stacked;
        p.slab[axis] = lists.slab[axis];
        p.steps[axis] = 1;
        p.slab_step[axis] = stacked ? lists.slab[axis] : 0;
        p.q_shape[axis] = lists.shape[axis];
        j.k_shape[axis] = lists.shape[axis];
        j.q_tiles[axis] = (lists.shape[axis] + lists.q_tile[axis] - 1) / lists.q_tile[axis];
        j.k_tiles[axis] = (lists.shape[axis] + lists.k_tile[axis] - 1) / lists.k_tile[axis];
        j.slabs_per_tile[axis] = lists.q_tile[axis] / lists.slab[axis];
        j.slabs[axis] = (lists.shape[axis] + lists.slab[axis] - 1) / lists.slab[axis];
        l.blocks[axis] = j.blocks[axis] = stacked ? (j.slabs[axis] + GROUPS - 1) / GROUPS : j.slabs[axis];
        l.block[axis] = lists.slab[axis] * (stacked ? GROUPS : 1);
        l.triples *= l.blocks[axis];
        l.k_tile[axis] = j.k_tile[axis] = lists.k_tile[axis];
        l.box[axis] = lists.box[axis];
        l.parts[axis] = lists.k_tile[axis] / lists.box[axis];
        l.boxes *= l.parts[axis];
        k_tiles *= j.k_tiles[axis];
    }
    j.entry.h = bits_for(j.k_tiles[2]);
    j.entry.t = j.entry.h + bits_for(j.k_tiles[1]);
    if (k_tiles > MOST_TILES || j.entry.t + bits_for(j.k_tiles[0]) > ENTRY_SEES) return cudaErrorInvalidValue;
    l.entry = j.entry;
    j.count = lists.count, j.index = lists.index, j.partial = lists.partial;
    std::copy_n(lists.count_stride, 3, j.count_stride);
    std::copy_n(lists.index_stride, 4, j.index_stride);
    std::copy_n(lists.partial_stride, 4, j.partial_stride);
    j.most = lists.most;
    j.room = l.room = std::min<int64_t>(lists.most, k_tiles);
    j.list_heads = l.list_heads = lists.heads;
    l.samples = lists.samples;
    j.triples = l.triples;
    j.stacked = lists.stacked;
    j.every_box_is_short = p.box_rows < S::BN;
    const int64_t joined = int64_t{l.triples} * lists.samples * lists.heads;
    const int64_t blocks = int64_t{l.triples} * call.batch * call.heads;
    if (joined > INT32_MAX || blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    if (joined * 4 + joined * GROUPS * j.room + 1 > lists.scratch_size) return cudaErrorInvalidValue;
    j.counts = reinterpret_cast<int4*>(lists.scratch);
    j.lists = lists.scratch + joined * 4;
    j.done = j.lists + joined * GROUPS * j.room;
    l.counts = j.counts, l.lists = j.lists, l.done = j.done;
    l.tables = lists.tables;
    l.products = lists.products;

    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = attention_fwd::allow_shared_memory<attention_forward_lists<S>>(device);
    if (int64_t{call.keys} * S::D * 4 > FEW_KEYS) {
        if (error == cudaSuccess) error = attention_fwd::multiprocessors(device, &l.processors);
        l.stragglers = l.processors / 10;
        l.patience = 100;  // some 4 % of the time of a box
    }
    const auto map = [&](const Strided& x, int heads, const int(&box)[3], CUtensorMap* to, attention_fwd::Heads* at) {
        if (error == cudaSuccess) error = attention_fwd::map_for(call, x, heads, lists.shape, box, ones, to, at);
    };
    map(call.q, call.heads, lists.slab, &p.q_map, &p.q_x);
    map(call.k, call.key_heads, lists.box, &p.k_map, &p.k_x);
    map(call.v, call.key_heads, lists.box, &p.v_map, &p.v_x);
    map(call.out, call.heads, lists.slab, &p.o_map, &p.o_x);
    if (error != cudaSuccess) return error;
    const size_t table = 2 * GROUPS * ((k_tiles + 31) / 32) * sizeof(uint32_t);
    join_lists<<<static_cast<int>(joined), JOINERS, table, stream>>>(j);
    error = cudaGetLastError();
    if (error != cudaSuccess) return error;
    attention_forward_lists<S><<<static_cast<int>(blocks), S::THREADS, S::LAUNCHED, stream>>>(l);
    return cudaGetLastError();
}

template <typename Element>
cudaError_t choose(const AttentionForward& call, const AttentionLists& lists, cudaStream_t stream) {
    return call.head_dim > 64 ? launch<ListShape<Element, 128>>(call, lists, stream)
                              : launch<ListShape<Element, 64>>(call, lists, stream);
}

}  // namespace

cudaError_t attention_forward_lists(const AttentionForward& call, const AttentionLists& lists, cudaStream_t stream) {
    if (call.batch == 0 || call.queries == 0) return cudaSuccess;
    return call.bf16 ? choose<__nv_bfloat16>(call, lists, stream) : choose<__half>(call, lists, stream);
}

}  // namespace stattn
