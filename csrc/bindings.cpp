// The one file that names torch: schemas, checks, and the way from a tensor to a raw pointer and a stream.
//
// Only PyTorch's stable ABI is used, so one library serves every Python and every torch from 2.11 on, CPU builds too.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include <dlfcn.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "stattn.h"

namespace {

using torch::stable::Tensor;

// The current CUDA stream of torch. Its getter lives in libtorch_cuda, which a CPU build of torch does not have: naming
// it would keep this library from loading there. A torch that made a CUDA tensor has loaded it, so the process has it.
cudaStream_t current_stream(int32_t device) {
    using Getter = AOTITorchError (*)(int32_t, void**);
    static const Getter getter = [] {
        void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
        return library ? reinterpret_cast<Getter>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
    }();
    STD_TORCH_CHECK(getter != nullptr, "stattn: no aoti_torch_get_current_cuda_stream in a loaded libtorch_cuda.so");
    void* stream = nullptr;
    STD_TORCH_CHECK(getter(device, &stream) == AOTI_TORCH_SUCCESS, "stattn: no current stream on device ", device);
    return static_cast<cudaStream_t>(stream);
}

void check_launch(cudaError_t error, const char* op) {
    STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
}

// Returns the number of bytes to copy.
int64_t check_copy(const Tensor& src, const Tensor& dst) {
    STD_TORCH_CHECK(src.is_cuda() == dst.is_cuda() && src.get_device_index() == dst.get_device_index(),
                    "stattn::copy_bytes: src and dst are on different devices");
    STD_TORCH_CHECK(src.is_contiguous(), "stattn::copy_bytes: src must be contiguous");
    STD_TORCH_CHECK(dst.is_contiguous(), "stattn::copy_bytes: dst must be contiguous");
    const int64_t bytes = src.numel() * static_cast<int64_t>(src.element_size());
    const int64_t room = dst.numel() * static_cast<int64_t>(dst.element_size());
    STD_TORCH_CHECK(bytes == room, "stattn::copy_bytes: src has ", bytes, " bytes and dst ", room);
    const auto from = reinterpret_cast<uintptr_t>(src.const_data_ptr());
    const auto to = reinterpret_cast<uintptr_t>(dst.const_data_ptr());
    const bool apart = from + static_cast<uintptr_t>(bytes) <= to || to + static_cast<uintptr_t>(bytes) <= from;
    STD_TORCH_CHECK(bytes == 0 || apart, "stattn::copy_bytes: src and dst overlap");
    return bytes;
}

void copy_bytes_cpu(Tensor src, Tensor dst) {
    const int64_t bytes = check_copy(src, dst);
    if (bytes > 0) std::memcpy(dst.mutable_data_ptr(), src.const_data_ptr(), static_cast<size_t>(bytes));
}

void copy_bytes_cuda(Tensor src, Tensor dst) {
    const int64_t bytes = check_copy(src, dst);
    const int32_t device = src.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    const cudaStream_t stream = current_stream(device);
    check_launch(stattn::copy_bytes(src.const_data_ptr(), dst.mutable_data_ptr(), bytes, stream), "stattn::copy_bytes");
}

using torch::headeronly::ScalarType;

// Checks a tensor of tokens, and gives what the kernels need of it.
stattn::Strided strided(const Tensor& x, const Tensor& q, const char* name) {
    STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == q.get_device_index(),
                    "stattn::attention: ", name, " is not on the CUDA device of q");
    STD_TORCH_CHECK(x.dim() == 4, "stattn::attention: ", name, " has ", x.dim(), " dimensions, expected 4");
    STD_TORCH_CHECK(x.scalar_type() == q.scalar_type(), "stattn::attention: ", name, " has another dtype than q");
    STD_TORCH_CHECK(x.size(0) == q.size(0) && x.size(3) == q.size(3),
                    "stattn::attention: ", name, " has another batch or head dimension than q");
    const stattn::Strided result{x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
    STD_TORCH_CHECK(x.stride(3) == 1, "stattn::attention: ", name, " has a last stride other than 1");
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(result.data) % 16 == 0 &&
                        (result.batch % 8 == 0 || x.size(0) == 1) && (result.head % 8 == 0 || x.size(2) == 1) &&
                        result.token % 8 == 0,
                    "stattn::attention: ", name, " has an address or a stride that is no multiple of 16 bytes");
    return result;
}

// layout: the integers of an AttentionPlan, in its order.
stattn::AttentionPlan attention_plan(const Tensor& data, const Tensor& q, const Tensor& k,
                                     const std::vector<int64_t>& layout, const std::optional<Tensor>& valid) {
    STD_TORCH_CHECK(data.is_cuda() && data.get_device_index() == q.get_device_index() && data.is_contiguous() &&
                        data.scalar_type() == ScalarType::Int,
                    "stattn::attention: plan must be a contiguous int32 tensor on the device of q");
    // A plan of dK and dV has one more.
    STD_TORCH_CHECK(layout.size() == 24 || layout.size() == 25, "stattn::attention: layout has ", layout.size(),
                    " integers, not 24 or 25");
    for (const int64_t each : layout)
        STD_TORCH_CHECK(0 <= each && each < INT32_MAX, "stattn::attention: layout has ", each);
    stattn::AttentionPlan plan{};
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
    plan.split_record = layout.size() == 25 ? static_cast<int>(layout[24]) : 0;
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

// layout: the integers of an AttentionLists, from its shape to its products.
stattn::AttentionLists attention_lists(const Tensor& q, const Tensor& count, const Tensor& index,
                                       const std::optional<Tensor>& partial, const Tensor& tables,
                                       const std::vector<int64_t>& layout) {
    constexpr const char* OP = "stattn::attention_forward_lists: ";
    const auto here = [&](const Tensor& x) { return x.is_cuda() && x.get_device_index() == q.get_device_index(); };
    STD_TORCH_CHECK(layout.size() == 17, OP, "layout has ", layout.size(), " integers, not 17");
    for (const int64_t each : layout) STD_TORCH_CHECK(0 <= each && each < INT32_MAX, OP, "layout has ", each);
    stattn::AttentionLists lists{};
    int64_t q_tiles = 1, slab = 1, box = 1;
    for (int axis = 0; axis < 3; ++axis) {
        lists.shape[axis] = static_cast<int>(layout[axis]);
        lists.q_tile[axis] = static_cast<int>(layout[3 + axis]);
        lists.k_tile[axis] = static_cast<int>(layout[6 + axis]);
        lists.slab[axis] = static_cast<int>(layout[9 + axis]);
        lists.box[axis] = static_cast<int>(layout[12 + axis]);
        STD_TORCH_CHECK(lists.slab[axis] > 0 && lists.box[axis] > 0 && lists.q_tile[axis] % lists.slab[axis] == 0 &&
                            lists.k_tile[axis] % lists.box[axis] == 0 && lists.q_tile[axis] > 0 && lists.k_tile[axis] > 0,
                        OP, "slabs and boxes must divide tiles");
        q_tiles *= (layout[axis] + layout[3 + axis] - 1) / layout[3 + axis];
        slab *= layout[9 + axis], box *= layout[12 + axis];
    }
    STD_TORCH_CHECK(slab <= 64 && box <= 64 && layout[15] < 3, OP, "the tiles do not fit");
    STD_TORCH_CHECK(layout[0] * layout[1] * layout[2] == q.size(1), OP, "the lists are for other queries");
    lists.stacked = static_cast<int>(layout[15]);
    lists.products = static_cast<int>(layout[16]);
    STD_TORCH_CHECK(here(count) && count.scalar_type() == ScalarType::Int && count.dim() == 3 && count.size(2) == q_tiles,
                    OP, "count must be int32 [B, heads, ", q_tiles, "] on the device of q");
    STD_TORCH_CHECK(here(index) && index.scalar_type() == ScalarType::Int && index.dim() == 4 &&
                        index.size(0) == count.size(0) && index.size(1) == count.size(1) && index.size(2) == q_tiles,
                    OP, "index must be int32 [B, heads, ", q_tiles, ", most] on the device of q");
    STD_TORCH_CHECK((count.size(0) == 1 || count.size(0) == q.size(0)) && (count.size(1) == 1 || count.size(1) == q.size(2)),
                    OP, "the lists are for other samples or heads");
    lists.count = static_cast<const int32_t*>(count.const_data_ptr());
    lists.index = static_cast<const int32_t*>(index.const_data_ptr());
    for (int axis = 0; axis < 3; ++axis) lists.count_stride[axis] = count.stride(axis);
    for (int axis = 0; axis < 4; ++axis) lists.index_stride[axis] = index.stride(axis);
    if (partial) {
        STD_TORCH_CHECK(here(*partial) && partial->scalar_type() == ScalarType::Bool && partial->dim() == 4, OP,
                        "partial must be booleans on the device of q");
        for (int axis = 0; axis < 4; ++axis) {
            STD_TORCH_CHECK(partial->size(axis) == index.size(axis), OP, "partial has another shape than index");
            lists.partial_stride[axis] = partial->stride(axis);
        }
        lists.partial = static_cast<const uint8_t*>(partial->const_data_ptr());
    }
    lists.samples = static_cast<int>(count.size(0));
    lists.heads = static_cast<int>(count.size(1));
    lists.most = static_cast<int>(index.size(3));
    STD_TORCH_CHECK(here(tables) && tables.is_contiguous() && tables.scalar_type() == ScalarType::Int, OP,
                    "tables must be contiguous int32 on the device of q");
    lists.tables = static_cast<const int32_t*>(tables.const_data_ptr());
    return lists;
}

// layout: of the stats, (T, H, W) of the queries, their step on the last axis, global tokens before and after.
stattn::AttentionStats attention_stats(const Tensor& data, const Tensor& q, const std::vector<int64_t>& layout) {
    STD_TORCH_CHECK(layout.size() == 6, "stattn::attention: the stats' layout has ", layout.size(), " integers, not 6");
    for (const int64_t each : layout)
        STD_TORCH_CHECK(0 <= each && each < INT32_MAX, "stattn::attention: the stats' layout has ", each);
    stattn::AttentionStats stats{};
    stats.data = static_cast<float*>(data.mutable_data_ptr());
    for (int axis = 0; axis < 3; ++axis) stats.shape[axis] = static_cast<int>(layout[axis]);
    stats.step = static_cast<int>(layout[3]);
    stats.before = static_cast<int>(layout[4]);
    stats.after = static_cast<int>(layout[5]);
    STD_TORCH_CHECK(stats.step > 0, "stattn::attention: the stats' step is 0");
    STD_TORCH_CHECK(layout[0] * layout[1] * layout[2] + layout[4] + layout[5] == q.size(1),
                    "stattn::attention: the stats are for other queries than q's ", q.size(1));
    STD_TORCH_CHECK(data.is_cuda() && data.get_device_index() == q.get_device_index() && data.is_contiguous() &&
                        data.scalar_type() == ScalarType::Float &&
                        data.numel() == 2 * q.size(0) * q.size(2) * stats.rows(),
                    "stattn::attention: stats must be contiguous float32 [2, B, heads, ", stats.rows(), "]");
    return stats;
}

const float* row_values(const Tensor& x, const Tensor& q, const char* name) {
    STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == q.get_device_index() &&
                        x.scalar_type() == ScalarType::Float && x.is_contiguous() && x.dim() == 3 &&
                        x.size(0) == q.size(0) && x.size(1) == q.size(2) && x.size(2) == q.size(1),
                    "stattn::attention: ", name, " must be a contiguous float32 [B, heads, N]");
    return static_cast<const float*>(x.const_data_ptr());
}

void check_elements(const Tensor& q, double scale) {
    STD_TORCH_CHECK(q.scalar_type() == ScalarType::BFloat16 || q.scalar_type() == ScalarType::Half,
                    "stattn::attention: q must be bfloat16 or float16");
    STD_TORCH_CHECK(scale > 0.0 && scale < 1e30, "stattn::attention: scale ", scale, " must be positive");
}

// Checks what q, k and v are to each other.
void check_sizes(const Tensor& q, const Tensor& k, const Tensor& v) {
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

// A new contiguous tensor on a CUDA device.
Tensor new_tensor(const std::vector<int64_t>& sizes, int32_t dtype, int32_t device) {
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t axis = sizes.size(); axis-- > 1;) strides[axis - 1] = strides[axis] * sizes[axis];
    AtenTensorHandle made = nullptr;
    STD_TORCH_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype,
                                             aoti_torch_device_type_cuda(), device, &made) == AOTI_TORCH_SUCCESS,
                    "stattn: no memory for a tensor");
    return Tensor(made);
}

// The integers of a tensor on a CPU: a call passes them faster than as a list.
std::vector<int64_t> integers(const Tensor& x) {
    STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == ScalarType::Long && x.is_contiguous(),
                    "stattn::attention: layout must be contiguous int64 on the CPU");
    const auto* first = static_cast<const int64_t*>(x.const_data_ptr());
    return {first, first + x.numel()};
}

using Results = std::tuple<Tensor, Tensor>;  // output and LSE

Tensor new_output(const Tensor& q) {
    const int32_t dtype =
        q.scalar_type() == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16() : aoti_torch_dtype_float16();
    return new_tensor({q.size(0), q.size(1), q.size(2), q.size(3)}, dtype, q.get_device_index());
}

Tensor new_lse(const Tensor& q) {
    return new_tensor({q.size(0), q.size(2), q.size(1)}, aoti_torch_dtype_float32(), q.get_device_index());
}

stattn::AttentionForward attention_call(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                                        double scale) {
    stattn::AttentionForward call{};
    check_elements(q, scale);
    call.bf16 = q.scalar_type() == ScalarType::BFloat16;
    call.q = strided(q, q, "q");
    call.k = strided(k, q, "k");
    call.v = strided(v, q, "v");
    call.out = strided(out, q, "out");
    const int64_t batch = q.size(0), queries = q.size(1), heads = q.size(2), head_dim = q.size(3);
    const int64_t keys = k.size(1), key_heads = k.size(2);
    check_sizes(q, k, v);
    call.batch = static_cast<int>(batch);
    call.heads = static_cast<int>(heads);
    call.key_heads = static_cast<int>(key_heads);
    call.head_dim = static_cast<int>(head_dim);
    call.queries = static_cast<int>(queries);
    call.keys = static_cast<int>(keys);
    call.scale = static_cast<float>(scale);
    return call;
}

// The numbers that the pieces of a call's tiles take in `partial`.
int64_t room_for_pieces(const stattn::AttentionForward& call) {
    const int64_t dim = call.head_dim > 64 ? 128 : 64;
    if (!call.plan || call.plan->pieces == 0) return 0;
    return int64_t{call.batch} * call.heads * (call.plan->pieces * 192 * (dim + 1) + 3 * int64_t{call.plan->split_tiles});
}

// lse: or null.
Tensor forward(const Tensor& q, const Tensor& k, const Tensor& v, double scale, int64_t config,
               const std::optional<Tensor>& plan, const std::optional<Tensor>& layout, int64_t grid_frames,
               const std::optional<Tensor>& valid, const std::optional<Tensor>& frames, float* lse) {
    STD_TORCH_CHECK(q.is_cuda() && q.dim() == 4, "stattn::attention_forward: q must be [B, N, heads, D] on a CUDA device");
    check_elements(q, scale);
    const int32_t device = q.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    Tensor out = new_output(q);
    stattn::AttentionForward call = attention_call(q, k, v, out, scale);
    call.lse = lse;
    call.config = static_cast<int>(config);
    stattn::AttentionPlan planned{};
    std::optional<Tensor> partial, placed;
    if (plan) {
        STD_TORCH_CHECK(layout.has_value(), "stattn::attention_forward: a plan has a layout");
        planned = attention_plan(*plan, q, k, integers(*layout), valid);
        call.plan = &planned;
        if (frames) {
            STD_TORCH_CHECK(frames->is_cuda() && frames->get_device_index() == device && frames->is_contiguous() &&
                                frames->scalar_type() == ScalarType::Int && frames->dim() == 1 &&
                                frames->size(0) == planned.k_shape[0],
                            "stattn::attention_forward: frames must be contiguous int32 [", planned.k_shape[0], "]");
            placed = new_tensor({plan->numel()}, aoti_torch_dtype_int32(), device);
            call.frames = static_cast<const int32_t*>(frames->const_data_ptr());
            call.grid_frames = static_cast<int>(grid_frames);
            call.placed_plan = static_cast<int32_t*>(placed->mutable_data_ptr());
            call.plan_size = plan->numel();
        }
        if (planned.pieces > 0) {
            partial = new_tensor({room_for_pieces(call)}, aoti_torch_dtype_float32(), device);
            call.partial = static_cast<float*>(partial->mutable_data_ptr());
        }
    }
    check_launch(stattn::attention_forward(call, current_stream(device)), "stattn::attention_forward");
    return out;
}

Results attention_forward_cuda(Tensor q, Tensor k, Tensor v, double scale, int64_t config, std::optional<Tensor> plan,
                               std::optional<Tensor> layout, int64_t grid_frames, std::optional<Tensor> valid,
                               std::optional<Tensor> frames) {
    STD_TORCH_CHECK(q.is_cuda() && q.dim() == 4, "stattn::attention_forward: q must be [B, N, heads, D] on a CUDA device");
    Tensor lse = new_lse(q);
    auto* const numbers = static_cast<float*>(lse.mutable_data_ptr());
    return {forward(q, k, v, scale, config, plan, layout, grid_frames, valid, frames, numbers), lse};
}

// The output alone: one tensor less to make.
Tensor attention_output_cuda(Tensor q, Tensor k, Tensor v, double scale, int64_t config, std::optional<Tensor> plan,
                             std::optional<Tensor> layout, int64_t grid_frames, std::optional<Tensor> valid,
                             std::optional<Tensor> frames) {
    return forward(q, k, v, scale, config, plan, layout, grid_frames, valid, frames, nullptr);
}

// Checks a call for csrc/attention_direct.cpp. Returns the number by which it is kept, and the size of `partial`.
std::tuple<int64_t, int64_t> attention_prepare_cuda(Tensor q, Tensor k, Tensor v, double scale, int64_t config,
                                                    std::optional<Tensor> plan, std::optional<Tensor> layout,
                                                    std::optional<Tensor> valid) {
    STD_TORCH_CHECK(q.is_cuda() && q.dim() == 4, "stattn::attention_prepare: q must be [B, N, heads, D] on a CUDA device");
    const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
    stattn::AttentionForward call = attention_call(q, k, v, new_output(q), scale);
    call.config = static_cast<int>(config);
    stattn::AttentionPlan planned{};
    if (plan) {
        STD_TORCH_CHECK(layout.has_value(), "stattn::attention_prepare: a plan has a layout");
        planned = attention_plan(*plan, q, k, integers(*layout), valid);
        call.plan = &planned;
    }
    return {static_cast<int64_t>(stattn::attention_keep(call, q.get_device_index())), room_for_pieces(call)};
}

void attention_backward_prepare_cuda(Tensor dout, std::optional<Tensor> dlse, Tensor out, Tensor lse, Tensor stats,
                                     std::vector<int64_t> stats_layout) {
    check_elements(out, 1.0);
    stattn::AttentionPrepare call{};
    call.out = strided(out, out, "out");
    call.dout = strided(dout, out, "dout");
    STD_TORCH_CHECK(dout.size(1) == out.size(1) && dout.size(2) == out.size(2) && out.size(3) <= 128,
                    "stattn::attention: dout differs from out");
    call.lse = row_values(lse, out, "lse");
    call.dlse = dlse ? row_values(*dlse, out, "dlse") : nullptr;
    call.stats = attention_stats(stats, out, stats_layout);
    call.batch = static_cast<int>(out.size(0));
    call.heads = static_cast<int>(out.size(2));
    call.head_dim = static_cast<int>(out.size(3));
    call.queries = static_cast<int>(out.size(1));
    call.bf16 = out.scalar_type() == ScalarType::BFloat16;
    const int32_t device = out.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    check_launch(stattn::attention_backward_prepare(call, current_stream(device)), "stattn::attention_backward_prepare");
}

// Checks what all kernels of the backward take.
stattn::AttentionBackward backward_call(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& dout,
                                        const Tensor& stats, const std::vector<int64_t>& stats_layout, double scale,
                                        int64_t config) {
    check_elements(q, scale);
    stattn::AttentionBackward call{};
    call.q = strided(q, q, "q");
    call.k = strided(k, q, "k");
    call.v = strided(v, q, "v");
    call.dout = strided(dout, q, "dout");
    check_sizes(q, k, v);
    STD_TORCH_CHECK(dout.size(1) == q.size(1) && dout.size(2) == q.size(2), "stattn::attention: dout differs from q");
    call.stats = attention_stats(stats, q, stats_layout);
    call.batch = static_cast<int>(q.size(0));
    call.heads = static_cast<int>(q.size(2));
    call.key_heads = static_cast<int>(k.size(2));
    call.head_dim = static_cast<int>(q.size(3));
    call.queries = static_cast<int>(q.size(1));
    call.keys = static_cast<int>(k.size(1));
    call.scale = static_cast<float>(scale);
    call.bf16 = q.scalar_type() == ScalarType::BFloat16;
    call.config = static_cast<int>(config);
    return call;
}

void attention_backward_dq_cuda(Tensor q, Tensor k, Tensor v, Tensor dout, Tensor stats, Tensor dq,
                                std::vector<int64_t> stats_layout, double scale, int64_t config,
                                std::optional<Tensor> plan, std::vector<int64_t> layout, std::optional<Tensor> valid) {
    stattn::AttentionBackward call = backward_call(q, k, v, dout, stats, stats_layout, scale, config);
    call.dq = strided(dq, q, "dq");
    STD_TORCH_CHECK(dq.size(1) == q.size(1) && dq.size(2) == q.size(2), "stattn::attention: dq differs from q");
    stattn::AttentionPlan planned{};
    if (plan) {
        planned = attention_plan(*plan, q, k, layout, valid);
        call.plan = &planned;
    }
    const int32_t device = q.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    check_launch(stattn::attention_backward_dq(call, current_stream(device)), "stattn::attention_backward_dq");
}

// Gives the address of a contiguous float32 tensor of `numbers` on the device of q.
float* numbers_of(const Tensor& x, const Tensor& q, int64_t numbers, const char* name) {
    STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == q.get_device_index() && x.is_contiguous() &&
                        x.scalar_type() == ScalarType::Float && x.numel() == numbers,
                    "stattn::attention: ", name, " must be ", numbers, " contiguous float32");
    return static_cast<float*>(x.mutable_data_ptr());
}

void attention_backward_kv_cuda(Tensor q, Tensor k, Tensor v, Tensor dout, Tensor stats, Tensor dk, Tensor dv,
                                std::optional<Tensor> dq_sum, std::optional<Tensor> partial,
                                std::vector<int64_t> stats_layout, double scale, int64_t config,
                                std::optional<Tensor> plan, std::vector<int64_t> layout, std::optional<Tensor> valid) {
    stattn::AttentionBackward call = backward_call(q, k, v, dout, stats, stats_layout, scale, config);
    call.dk = strided(dk, q, "dk");
    call.dv = strided(dv, q, "dv");
    for (const Tensor* each : {&dk, &dv})
        STD_TORCH_CHECK(each->size(1) == k.size(1) && each->size(2) == k.size(2),
                        "stattn::attention: dk or dv differs from k");
    stattn::AttentionPlan planned{};
    if (plan) {
        planned = attention_plan(*plan, q, k, layout, valid);
        call.plan = &planned;
        const int64_t numbers = k.size(0) * k.size(2) * planned.pieces * 2 * 128 * k.size(3);
        STD_TORCH_CHECK(numbers == 0 || partial, "stattn::attention_backward_kv: partial is missing");
        if (numbers > 0) call.partial = numbers_of(*partial, q, numbers, "partial");
    } else if (partial) {
        const int64_t piece = 2 * 128 * k.size(3);
        call.partial = numbers_of(*partial, q, partial->numel(), "partial");
        call.room = static_cast<int>(partial->numel() / piece);
    }
    if (dq_sum) call.dq_sum = numbers_of(*dq_sum, q, stattn::dq_sum_size(call), "dq_sum");
    const int32_t device = q.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    check_launch(stattn::attention_backward_kv(call, current_stream(device)), "stattn::attention_backward_kv");
}

// boxes: (t, h, w) of the queries and of a box, the global queries before and after; or nothing, if dq_sum has rows.
void attention_backward_finish_cuda(Tensor dq_sum, Tensor dq, double scale, std::vector<int64_t> boxes) {
    check_elements(dq, scale);
    stattn::AttentionBackward call{};
    call.dq = strided(dq, dq, "dq");
    call.batch = static_cast<int>(dq.size(0));
    call.queries = static_cast<int>(dq.size(1));
    call.heads = static_cast<int>(dq.size(2));
    call.head_dim = static_cast<int>(dq.size(3));
    call.scale = static_cast<float>(scale);
    call.bf16 = dq.scalar_type() == ScalarType::BFloat16;
    stattn::QueryBoxes found{};
    int64_t numbers = dq.numel();
    if (!boxes.empty()) {
        STD_TORCH_CHECK(boxes.size() == 8, "stattn::attention_backward_finish: boxes has ", boxes.size(), " integers, not 8");
        for (const int64_t each : boxes)
            STD_TORCH_CHECK(0 <= each && each < INT32_MAX, "stattn::attention_backward_finish: boxes has ", each);
        for (int axis = 0; axis < 3; ++axis) {
            found.shape[axis] = static_cast<int>(boxes[axis]);
            found.box[axis] = static_cast<int>(boxes[3 + axis]);
            STD_TORCH_CHECK(found.box[axis] > 0, "stattn::attention_backward_finish: an empty box");
        }
        found.before = static_cast<int>(boxes[6]), found.after = static_cast<int>(boxes[7]);
        numbers = dq.size(0) * dq.size(2) * found.count() * 8192;
        STD_TORCH_CHECK(boxes[0] * boxes[1] * boxes[2] + boxes[6] + boxes[7] == dq.size(1),
                        "stattn::attention_backward_finish: the boxes are for other queries than dq's ", dq.size(1));
    }
    call.dq_sum = numbers_of(dq_sum, dq, numbers, "dq_sum");
    const int32_t device = dq.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    check_launch(stattn::attention_backward_finish(call, boxes.empty() ? nullptr : &found, current_stream(device)),
                 "stattn::attention_backward_finish");
}

Results attention_forward_lists_cuda(Tensor q, Tensor k, Tensor v, double scale, Tensor count, Tensor index,
                                     std::optional<Tensor> partial, Tensor tables, Tensor layout, int64_t room) {
    STD_TORCH_CHECK(q.is_cuda() && q.dim() == 4, "stattn::attention_forward_lists: q must be [B, N, heads, D]");
    check_elements(q, scale);
    const int32_t device = q.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    Results results{new_output(q), new_lse(q)};
    stattn::AttentionForward call = attention_call(q, k, v, std::get<0>(results), scale);
    call.lse = static_cast<float*>(std::get<1>(results).mutable_data_ptr());
    stattn::AttentionLists lists = attention_lists(q, count, index, partial, tables, integers(layout));
    STD_TORCH_CHECK(call.keys == call.queries, "stattn::attention_forward_lists: ", call.keys, " keys, ", call.queries,
                    " queries");
    Tensor scratch = new_tensor({room}, aoti_torch_dtype_int32(), device);
    lists.scratch = static_cast<int32_t*>(scratch.mutable_data_ptr());
    lists.scratch_size = room;
    check_launch(stattn::attention_forward_lists(call, lists, current_stream(device)), "stattn::attention_forward_lists");
    return results;
}

// layout: the integers of an AttentionListPlan in the order below; where in tables corners, rows, patterns and groups begin,
// and the integers of the groups; how many heads lists are of, and the slabs of a tile of the lists.
void attention_backward_lists_cuda(Tensor count, Tensor index, std::optional<Tensor> partial, Tensor tables, Tensor plan,
                                   Tensor scratch, std::vector<int64_t> layout) {
    constexpr const char* OP = "stattn::attention_backward_lists: ";
    const auto here = [&](const Tensor& x) { return x.is_cuda() && x.get_device_index() == index.get_device_index(); };
    const auto flat = [&](const Tensor& x) { return here(x) && x.is_contiguous() && x.scalar_type() == ScalarType::Int; };
    STD_TORCH_CHECK(layout.size() == 45, OP, "layout has ", layout.size(), " integers, not 45");
    for (const int64_t each : layout) STD_TORCH_CHECK(0 <= each && each < INT32_MAX, OP, "layout has ", each);
    STD_TORCH_CHECK(here(count) && count.scalar_type() == ScalarType::Int && count.dim() == 2, OP,
                    "count must be int32 [heads, query tiles] on the device of index");
    STD_TORCH_CHECK(here(index) && index.scalar_type() == ScalarType::Int && index.dim() == 3 &&
                        index.size(0) == count.size(0) && index.size(1) == count.size(1),
                    OP, "index must be int32 [heads, query tiles, most]");
    STD_TORCH_CHECK(flat(tables) && flat(plan) && flat(scratch), OP,
                    "tables, plan and scratch must be contiguous int32 on the device of index");
    stattn::AttentionListPlan l{};
    auto next = layout.begin();
    const auto take = [&](int* to, int numbers) {
        for (int i = 0; i < numbers; ++i) to[i] = static_cast<int>(*next++);
    };
    int flags[2], places[5], slabs_of_tile;
    take(&l.heads, 1), take(&l.q_tiles, 1), take(&l.k_tiles, 1), take(flags, 2);
    take(&l.slabs, 1), take(&l.stacked, 1), take(&l.tiles, 1);
    take(l.shape, 3), take(l.slab, 3), take(l.columns, 3), take(l.column_tile, 3), take(l.part, 3), take(l.parts, 3);
    take(l.boxes, 3), take(l.pattern_at, 3), take(l.pattern_count, 3);
    take(&l.groups_record, 1), take(&l.first_group, 1), take(&l.first_record, 1), take(places, 5);
    take(&l.list_heads, 1), take(&slabs_of_tile, 1);
    l.by_key = flags[0], l.short_boxes = flags[1];
    STD_TORCH_CHECK(l.list_heads == count.size(0) && l.q_tiles == count.size(1), OP, "count is for other heads or tiles");
    l.count = static_cast<const int32_t*>(count.const_data_ptr());
    l.index = static_cast<const int32_t*>(index.const_data_ptr());
    for (int axis = 0; axis < 2; ++axis) l.count_stride[axis] = count.stride(axis);
    for (int axis = 0; axis < 3; ++axis) l.index_stride[axis] = index.stride(axis);
    l.most = static_cast<int>(index.size(2));
    if (partial) {
        STD_TORCH_CHECK(here(*partial) && partial->scalar_type() == ScalarType::Bool && partial->dim() == 3 &&
                            partial->size(0) == index.size(0) && partial->size(1) == index.size(1) &&
                            partial->size(2) == index.size(2),
                        OP, "partial must be booleans like index");
        l.partial = static_cast<const uint8_t*>(partial->const_data_ptr());
        for (int axis = 0; axis < 3; ++axis) l.partial_stride[axis] = partial->stride(axis);
    }
    const auto* table = static_cast<const int32_t*>(tables.const_data_ptr());
    for (int i = 0; i < 4; ++i) STD_TORCH_CHECK(places[i] <= tables.numel(), OP, "tables are too short");
    STD_TORCH_CHECK(places[3] + int64_t{places[4]} <= tables.numel(), OP, "tables are too short");
    l.corners = table + places[0], l.rows = table + places[1], l.patterns = table + places[2], l.groups = table + places[3];
    l.groups_bytes = int64_t{4} * places[4];
    l.plan = static_cast<int32_t*>(plan.mutable_data_ptr());
    l.scratch = static_cast<int32_t*>(scratch.mutable_data_ptr());
    l.scratch_size = scratch.numel();
    // Each listed pair of tiles puts at most its boxes and their masks into each tile of the plan that has a slab of it.
    const int64_t parts = int64_t{l.parts[0]} * l.parts[1] * l.parts[2];
    const int64_t pairs = int64_t{l.list_heads} * std::min(int64_t{l.q_tiles} * l.most * slabs_of_tile,
                                                           int64_t{l.tiles} * (l.by_key ? l.q_tiles : l.k_tiles));
    STD_TORCH_CHECK(plan.numel() / 4 >= l.first_record + 2 * int64_t{l.tiles} * l.list_heads + pairs * parts * (1 + l.slabs),
                    OP, "the plan has no room for what may be listed");
    const int32_t device = index.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    check_launch(stattn::attention_backward_lists(l, current_stream(device)), "stattn::attention_backward_lists");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(stattn, m) {
    m.def("copy_bytes(Tensor src, Tensor(a!) dst) -> ()");
    m.def(
        "attention_forward(Tensor q, Tensor k, Tensor v, float scale, int config, Tensor? plan, Tensor? layout, "
        "int grid_frames, Tensor? valid, Tensor? frames) -> (Tensor, Tensor)");
    m.def(
        "attention_output(Tensor q, Tensor k, Tensor v, float scale, int config, Tensor? plan, Tensor? layout, "
        "int grid_frames, Tensor? valid, Tensor? frames) -> Tensor");
    m.def(
        "attention_prepare(Tensor q, Tensor k, Tensor v, float scale, int config, Tensor? plan, Tensor? layout, "
        "Tensor? valid) -> (int, int)");
    m.def(
        "attention_forward_lists(Tensor q, Tensor k, Tensor v, float scale, Tensor count, Tensor index, "
        "Tensor? partial, Tensor tables, Tensor layout, int room) -> (Tensor, Tensor)");
    m.def(
        "attention_backward_prepare(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, Tensor(a!) stats, "
        "int[] stats_layout) -> ()");
    m.def(
        "attention_backward_dq(Tensor q, Tensor k, Tensor v, Tensor dout, Tensor stats, Tensor(a!) dq, "
        "int[] stats_layout, float scale, int config, Tensor? plan, int[] layout, Tensor? valid) -> ()");
    m.def(
        "attention_backward_kv(Tensor q, Tensor k, Tensor v, Tensor dout, Tensor stats, Tensor(a!) dk, Tensor(b!) dv, "
        "Tensor(c!)? dq_sum, Tensor(d!)? partial, int[] stats_layout, float scale, int config, Tensor? plan, int[] layout, "
        "Tensor? valid) -> ()");
    m.def("attention_backward_finish(Tensor dq_sum, Tensor(a!) dq, float scale, int[] boxes) -> ()");
    m.def(
        "attention_backward_lists(Tensor count, Tensor index, Tensor? partial, Tensor tables, Tensor(a!) plan, "
        "Tensor(b!) scratch, int[] layout) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(stattn, CPU, m) {
    m.impl("copy_bytes", TORCH_BOX(&copy_bytes_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(stattn, CUDA, m) {
    m.impl("copy_bytes", TORCH_BOX(&copy_bytes_cuda));
    m.impl("attention_forward", TORCH_BOX(&attention_forward_cuda));
    m.impl("attention_output", TORCH_BOX(&attention_output_cuda));
    m.impl("attention_prepare", TORCH_BOX(&attention_prepare_cuda));
    m.impl("attention_forward_lists", TORCH_BOX(&attention_forward_lists_cuda));
    m.impl("attention_backward_prepare", TORCH_BOX(&attention_backward_prepare_cuda));
    m.impl("attention_backward_dq", TORCH_BOX(&attention_backward_dq_cuda));
    m.impl("attention_backward_kv", TORCH_BOX(&attention_backward_kv_cuda));
    m.impl("attention_backward_finish", TORCH_BOX(&attention_backward_finish_cuda));
    m.impl("attention_backward_lists", TORCH_BOX(&attention_backward_lists_cuda));
}
