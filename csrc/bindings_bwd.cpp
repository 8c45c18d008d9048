// Schemas and checks of the attention backward.
#include <algorithm>

#include "bindings.h"

namespace stattn::bindings {
namespace {

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
}  // namespace stattn::bindings

STABLE_TORCH_LIBRARY_FRAGMENT(stattn, m) {
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

STABLE_TORCH_LIBRARY_IMPL(stattn, CUDA, m) {
    m.impl("attention_backward_prepare", TORCH_BOX(&stattn::bindings::attention_backward_prepare_cuda));
    m.impl("attention_backward_dq", TORCH_BOX(&stattn::bindings::attention_backward_dq_cuda));
    m.impl("attention_backward_kv", TORCH_BOX(&stattn::bindings::attention_backward_kv_cuda));
    m.impl("attention_backward_finish", TORCH_BOX(&stattn::bindings::attention_backward_finish_cuda));
    m.impl("attention_backward_lists", TORCH_BOX(&stattn::bindings::attention_backward_lists_cuda));
}
