// What the files that name torch share (bindings*.cpp): the way from a tensor to a raw pointer and a stream, with checks.
//
// Only PyTorch's stable ABI is used, so one library serves every Python and every torch from 2.11 on, CPU builds too.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "current_stream.h"
#include "stattn.h"

namespace stattn::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline cudaStream_t current_stream(int32_t device) {
    STD_TORCH_CHECK(stream_getter() != nullptr,
                    "stattn: no aoti_torch_get_current_cuda_stream in a loaded libtorch_cuda.so");
    void* stream = nullptr;
    STD_TORCH_CHECK(stream_getter()(device, &stream) == AOTI_TORCH_SUCCESS, "stattn: no current stream on device ", device);
    return static_cast<cudaStream_t>(stream);
}

inline void check_launch(cudaError_t error, const char* op) {
    STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
}

// Checks a tensor of tokens, and gives what the kernels need of it.
inline Strided strided(const Tensor& x, const Tensor& q, const char* name) {
    STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == q.get_device_index(),
                    "stattn::attention: ", name, " is not on the CUDA device of q");
    STD_TORCH_CHECK(x.dim() == 4, "stattn::attention: ", name, " has ", x.dim(), " dimensions, expected 4");
    STD_TORCH_CHECK(x.scalar_type() == q.scalar_type(), "stattn::attention: ", name, " has another dtype than q");
    STD_TORCH_CHECK(x.size(0) == q.size(0) && x.size(3) == q.size(3),
                    "stattn::attention: ", name, " has another batch or head dimension than q");
    const Strided result{x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
    STD_TORCH_CHECK(x.stride(3) == 1, "stattn::attention: ", name, " has a last stride other than 1");
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(result.data) % 16 == 0 &&
                        (result.batch % 8 == 0 || x.size(0) == 1) && (result.head % 8 == 0 || x.size(2) == 1) &&
                        result.token % 8 == 0,
                    "stattn::attention: ", name, " has an address or a stride that is no multiple of 16 bytes");
    return result;
}

// layout: the integers of an AttentionPlan, in its order.
inline AttentionPlan attention_plan(const Tensor& data, const Tensor& q, const Tensor& k,
                                    const std::vector<int64_t>& layout, const std::optional<Tensor>& valid) {
    STD_TORCH_CHECK(data.is_cuda() && data.get_device_index() == q.get_device_index() && data.is_contiguous() &&
                        data.scalar_type() == ScalarType::Int,
                    "stattn::attention: plan must be a contiguous int32 tensor on the device of q");
    // A plan of dK and dV has one more, and one of lists in the backward two.
    STD_TORCH_CHECK(24 <= layout.size() && layout.size() <= 26, "stattn::attention: layout has ", layout.size(),
                    " integers, not 24 to 26");
    for (const int64_t each : layout)
        STD_TORCH_CHECK(0 <= each && each < INT32_MAX, "stattn::attention: layout has ", each);
    AttentionPlan plan{};
    plan.data = static_cast<const int32_t*>(data.const_data_ptr());
    int64_t queries = 1, keys = 1, rows = 1;
    for (int axis = 0; axis < 3; ++axis) {
        plan.q_shape[axis] = static_cast<int>(layout[axis]);
        plan.k_shape[axis] = static_cast<int>(layout[3 + axis]);
        plan.slab[axis] = static_cast<int>(layout[6 + axis]);
        plan.box[axis] = static_cast<int>(layout[9 + axis]);
        plan.steps[axis] = static_cast<int>(layout[12 + axis]);
        queries *= layout[axis], keys *= layout[3 + axis], rows *= layout[6 + axis];
        STD_TORCH_CHECK(layout[6 + axis] > 0 && layout[9 + axis] > 0 && layout[12 + axis] > 0,
                        "stattn::attention: an empty tile");
    }
    plan.stacked = static_cast<int>(layout[15]);
    plan.tiles = static_cast<int>(layout[16]);
    plan.before = static_cast<int>(layout[17]);
    plan.after = static_cast<int>(layout[18]);
    plan.q_globals = static_cast<int>(layout[19]);
    plan.line_tiles = static_cast<int>(layout[20]);
    plan.line_record = static_cast<int>(layout[21]);
    plan.pieces = static_cast<int>(layout[22]);
    plan.split_tiles = static_cast<int>(layout[23]);
    plan.split_record = layout.size() > 24 ? static_cast<int>(layout[24]) : 0;
    plan.together = layout.size() > 25 ? static_cast<int>(layout[25]) : 0;
    STD_TORCH_CHECK(plan.together < data.numel(), "stattn::attention: the plan is too short");
    keys += layout[17] + layout[18];
    if (plan.q_globals) queries += layout[17] + layout[18];
    if (valid) {
        STD_TORCH_CHECK(valid->is_cuda() && valid->get_device_index() == q.get_device_index() && valid->is_contiguous() &&
                            valid->scalar_type() == ScalarType::Bool && valid->dim() == 2 &&
                            valid->size(0) == q.size(0) && valid->size(1) == layout[17] + layout[18],
                        "stattn::attention: valid must be contiguous booleans [B, before + after]");
        plan.valid = static_cast<const uint8_t*>(valid->const_data_ptr());
    }
    STD_TORCH_CHECK(queries == q.size(1) && keys == k.size(1), "stattn::attention: the plan is for ", queries,
                    " queries and ", keys, " keys");
    STD_TORCH_CHECK(rows <= 64 && plan.stacked < 3,
                    "stattn::attention: the plan's tiles do not fit");
    return plan;
}

inline void check_elements(const Tensor& q, double scale) {
    STD_TORCH_CHECK(q.scalar_type() == ScalarType::BFloat16 || q.scalar_type() == ScalarType::Half,
                    "stattn::attention: q must be bfloat16 or float16");
    STD_TORCH_CHECK(scale > 0.0 && scale < 1e30, "stattn::attention: scale ", scale, " must be positive");
}

// Checks what q, k and v are to each other.
inline void check_sizes(const Tensor& q, const Tensor& k, const Tensor& v) {
    const int64_t keys = k.size(1), key_heads = k.size(2), heads = q.size(2), head_dim = q.size(3);
    STD_TORCH_CHECK(v.size(1) == keys && v.size(2) == key_heads, "stattn::attention: k and v differ in shape");
    STD_TORCH_CHECK(key_heads > 0 && heads % key_heads == 0, "stattn::attention: ", key_heads,
                    " heads of k do not divide the ", heads, " of q");
    STD_TORCH_CHECK(head_dim % 8 == 0 && head_dim > 0 && head_dim <= 128, "stattn::attention: head dimension ", head_dim,
                    " must be a multiple of 8, at most 128");
    STD_TORCH_CHECK(keys > 0, "stattn::attention: there are no keys");
    STD_TORCH_CHECK(q.size(1) < INT32_MAX - 256 && keys < INT32_MAX - 256 && q.size(0) * heads < INT32_MAX,
                    "stattn::attention: sizes beyond 2^31");
}

}  // namespace stattn::bindings
