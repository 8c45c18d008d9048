// From a call of attention to its kernel's parameters, for kernels whose tiles are of queries.
#pragma once

#include <atomic>

#include "attention_tile.cuh"
#include "stattn.h"
#include "tensor_map.h"

namespace stattn::attention_fwd {

constexpr int DEVICES = 64;
constexpr uint32_t SHARED_LIMIT = 232448;  // bytes that a block may have

inline cudaError_t multiprocessors(int device, int* count) {
    static std::atomic<int> known[DEVICES];
    *count = known[device].load(std::memory_order_relaxed);
    if (*count > 0) return cudaSuccess;
    const cudaError_t error = cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess) known[device].store(*count, std::memory_order_relaxed);
    return error;
}

// Lets a kernel use all the shared memory that a block may have.
template <auto kernel>
cudaError_t allow_shared_memory(int device) {
    static std::atomic<bool> done[DEVICES];
    if (done[device].load(std::memory_order_relaxed)) return cudaSuccess;
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_LIMIT);
    if (error == cudaSuccess) done[device].store(true, std::memory_order_relaxed);
    return error;
}

// Describes one of a call's tensors, of which copies move boxes.
inline cudaError_t map_for(const AttentionForward& call, const Strided& tensor, int heads, const int (&shape)[3],
                    const int (&box)[3], const int (&steps)[3], CUtensorMap* map, Heads* places) {
    TensorMap found;
    const cudaError_t error =
        tensor_map(tensor, call.bf16 ? BF16 : FP16, call.batch, heads, call.head_dim, shape, box, steps, &found);
    *map = found.map;
    *places = {found.batch_step, found.head_step};
    return error;
}

// The same tensor without its first tokens.
inline Strided behind(const Strided& tensor, int tokens) {
    constexpr int64_t ELEMENT = 2;
    Strided rest = tensor;
    rest.data = static_cast<const char*>(tensor.data) + tokens * tensor.token * ELEMENT;
    return rest;
}

// The maps by which global tokens are read and written.
inline cudaError_t map_lines(const AttentionForward& call, Parameters* p) {
    const int keys[3] = {1, 1, call.keys}, box[3] = {1, 1, p->box_rows}, slab[3] = {1, 1, ROWS}, steps[3] = {1, 1, 1};
    Heads places;  // those of the video
    cudaError_t error = map_for(call, call.k, call.key_heads, keys, box, steps, &p->k_line, &places);
    if (error == cudaSuccess) error = map_for(call, call.v, call.key_heads, keys, box, steps, &p->v_line, &places);
    for (int side = 0; side < 2; ++side) {
        const int tokens = side == 0 ? p->before : p->after;
        if (tokens == 0) continue;
        const int shape[3] = {1, 1, tokens}, first = side == 0 ? 0 : call.queries - tokens;
        if (error == cudaSuccess)
            error = map_for(call, behind(call.q, first), call.heads, shape, slab, steps, &p->q_line[side], &places);
        if (error == cudaSuccess)
            error = map_for(call, behind(call.out, first), call.heads, shape, slab, steps, &p->o_line[side], &places);
    }
    return error;
}

// What a launch takes beside its parameters.
struct Launch {
    int device = 0, processors = 0;
    uint32_t shared = 0;  // bytes
};

// Fills a kernel's parameters, all but what only one kernel has.
template <typename S>
cudaError_t describe(const AttentionForward& call, Parameters* parameters, Launch* launch) {
    Parameters& p = *parameters;
    const int line[3] = {1, 1, ROWS}, boxes[3] = {1, 1, S::BN}, queries[3] = {1, 1, call.queries};
    const int keys[3] = {1, 1, call.keys};
    const AttentionPlan* plan = call.plan;
    const auto& slab = plan ? plan->slab : line;
    const auto& box = plan ? plan->box : boxes;
    const auto& q_shape = plan ? plan->q_shape : queries;
    const auto& k_shape = plan ? plan->k_shape : keys;
    const int stacked = plan ? plan->stacked : 2;

    p.lse = call.lse;
    p.scale_log2 = call.scale * 1.4426950408889634f;
    p.batch = call.batch;
    p.heads = call.heads;
    p.queries_per_key = call.heads / call.key_heads;
    for (int axis = 0; axis < 3; ++axis) {
        p.slab[axis] = slab[axis];
        p.steps[axis] = plan ? plan->steps[axis] : 1;
        p.slab_step[axis] = axis == stacked ? slab[axis] * p.steps[axis] : 0;
        p.q_shape[axis] = q_shape[axis];
    }
    constexpr int TILE = S::WARPGROUPS * ROWS;
    p.tiles_per_head = plan ? plan->tiles : (call.queries + TILE - 1) / TILE;
    p.line_tiles = plan ? plan->line_tiles : 0;
    const int64_t tiles = (int64_t{p.tiles_per_head} + p.line_tiles) * call.batch * call.heads;
    if (tiles > INT32_MAX) return cudaErrorInvalidConfiguration;
    p.tiles = static_cast<int>(tiles);
    p.queries = call.queries;
    p.keys = call.keys;
    p.boxes = (call.keys + S::BN - 1) / S::BN;
    p.box_rows = box[0] * box[1] * box[2];
    if (p.box_rows > S::BN) return cudaErrorInvalidValue;
    p.slab_rows = slab[0] * slab[1] * slab[2];
    p.slab_bytes = S::CHUNKS * 128 * p.slab_rows;
    p.box_bytes = S::CHUNKS * 128 * p.box_rows;
    Strided video_q = call.q, video_k = call.k, video_v = call.v, video_out = call.out;
    if (plan) {
        p.plan = plan->data;
        p.line_record = plan->line_record;
        p.pieces = plan->pieces;
        p.split_tiles = plan->split_tiles;
        p.partial = call.partial;
        const int64_t rows = int64_t{call.batch} * call.heads * plan->pieces * S::WARPGROUPS * ROWS;
        if (call.partial) p.arrived = reinterpret_cast<int*>(call.partial + rows * (S::D + 1));
        p.globals = plan->before + plan->after;
        p.valid = plan->valid;
        p.keys_before = plan->before;
        p.boxes_before = (plan->before + p.box_rows - 1) / p.box_rows;
        p.global_boxes = p.boxes_before + (plan->after + p.box_rows - 1) / p.box_rows;
        if (plan->q_globals) p.before = p.q_first = plan->before, p.after = plan->after;
        video_q = behind(call.q, p.q_first);
        video_out = behind(call.out, p.q_first);
        video_k = behind(call.k, plan->before);
        video_v = behind(call.v, plan->before);
    }

    launch->shared = S::LAUNCHED + (p.valid ? (p.global_boxes + 1) * ((S::BN + 31) / 32) * 4 : 0);
    if (launch->shared > SHARED_LIMIT) return cudaErrorInvalidValue;

    cudaError_t error = cudaGetDevice(&launch->device);
    if (error == cudaSuccess && launch->device >= DEVICES) error = cudaErrorInvalidDevice;
    if (error == cudaSuccess) error = multiprocessors(launch->device, &launch->processors);
    if (error == cudaSuccess) error = map_for(call, video_q, call.heads, q_shape, slab, p.steps, &p.q_map, &p.q_x);
    if (error == cudaSuccess) error = map_for(call, video_k, call.key_heads, k_shape, box, p.steps, &p.k_map, &p.k_x);
    if (error == cudaSuccess) error = map_for(call, video_v, call.key_heads, k_shape, box, p.steps, &p.v_map, &p.v_x);
    if (error == cudaSuccess) error = map_for(call, video_out, call.heads, q_shape, slab, p.steps, &p.o_map, &p.o_x);
    if (error == cudaSuccess && p.globals > 0) error = map_lines(call, &p);
    return error;
}

}  // namespace stattn::attention_fwd
