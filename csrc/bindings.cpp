// Schemas and checks of the copy and of the attention forward.
#include <cstring>
#include <tuple>

#include "bindings.h"

namespace stattn::bindings {
namespace {

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

}  // namespace
}  // namespace stattn::bindings

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
}

STABLE_TORCH_LIBRARY_IMPL(stattn, CPU, m) {
    m.impl("copy_bytes", TORCH_BOX(&stattn::bindings::copy_bytes_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(stattn, CUDA, m) {
    m.impl("copy_bytes", TORCH_BOX(&stattn::bindings::copy_bytes_cuda));
    m.impl("attention_forward", TORCH_BOX(&stattn::bindings::attention_forward_cuda));
    m.impl("attention_output", TORCH_BOX(&stattn::bindings::attention_output_cuda));
    m.impl("attention_prepare", TORCH_BOX(&stattn::bindings::attention_prepare_cuda));
    m.impl("attention_forward_lists", TORCH_BOX(&stattn::bindings::attention_forward_lists_cuda));
}
