// The host's side of the attention backward by key tiles: which kernel, which tensor maps.
#include "attention_bwd_kv.cuh"

#include <algorithm>

#include "attention_launch.h"

namespace stattn {
namespace {

using attention_bwd::attention_backward_kv;
using attention_bwd::Dq;
using attention_bwd::KEYS;
using attention_bwd::KvParameters;
using attention_bwd::KvShape;
using attention_bwd::PARTS;
using attention_bwd::Sees;
using attention_bwd::SLAB;
using attention_fwd::Heads;

// A run of tokens that is seen as boxes (t, h, w): where it begins, its extents, those of a copy, its tokens' distance.
struct Part {
    int first;
    int shape[3], box[3], steps[3];
};

Part line(int first, int tokens, int box) { return {first, {1, 1, tokens}, {1, 1, box}, {1, 1, 1}}; }

// Encodes maps until one fails.
struct Mapper {
    const AttentionBackward& call;
    cudaError_t error = cudaSuccess;

    void map(const Strided& tensor, int heads, const Part& part, CUtensorMap* to, Heads* places) {
        encode(attention_fwd::behind(tensor, part.first), call.bf16 ? BF16 : FP16, heads, part, part.box, to, places);
    }

    // The sums of dQ in rows. box: what one copy adds.
    void map_sums(const Part& part, const int (&box)[3], CUtensorMap* to) {
        const int64_t head = int64_t{call.queries} * call.head_dim;
        const Strided sums{call.dq_sum + int64_t{part.first} * call.head_dim, head * call.heads, call.head_dim, head};
        Heads places;  // the heads of all batches, in their order
        encode(sums, FP32, call.heads, part, box, to, &places);
    }

    void encode(const Strided& tensor, Elements elements, int heads, const Part& part, const int (&box)[3],
                CUtensorMap* to, Heads* places) {
        TensorMap found{};
        if (error == cudaSuccess)
            error = tensor_map(tensor, elements, call.batch, heads, call.head_dim, part.shape, box, part.steps, &found);
        *to = found.map;
        *places = {found.batch_step, found.head_step};
    }
};

// Cuts a box into boxes of 16 rows, in the rows' order: their extents, and where they begin. Says whether they exist.
bool cut_box(const Part& part, int (&extents)[3], int (&places)[8][3]) {
    const auto& box = part.box;
    int left = 16;
    for (int axis = 2; axis >= 0; --axis) {
        extents[axis] = left < box[axis] ? left : box[axis];
        if (box[axis] % extents[axis] || left % extents[axis]) return false;
        left /= extents[axis];
    }
    if (left > 1) return false;
    int number = 0;
    for (int t = 0; t < box[0]; t += extents[0])
        for (int h = 0; h < box[1]; h += extents[1])
            for (int w = 0; w < box[2]; w += extents[2]) {
                const int at[3] = {t, h, w};
                for (int axis = 0; axis < 3; ++axis) places[number][axis] = at[axis] * part.steps[axis];
                ++number;
            }
    return true;
}

// What attention_bwd::divided() takes for a division by d.
uint32_t divider(int d) { return d == 1 ? 0 : static_cast<uint32_t>(((uint64_t{1} << 32) + d - 1) / d); }

// Cuts the tiles that the multiprocessors would not all have one of at the end, so that they all end at about one time.
// The order of sums then depends on the number of tiles. steps: of a tile. room: for so many pieces.
AttentionCut cut_tail(int tiles, int steps, int processors, int room) {
    const int rest = tiles % processors;
    AttentionCut best{tiles, 0, 1};
    double least = 0.9;  // of the time of a whole tile: with less to gain, sums are not worth it
    for (int pieces = 2; pieces <= 8 && pieces * 8 <= steps && rest > 0 && rest * pieces <= room; ++pieces) {
        const double time = static_cast<double>((rest * pieces + processors - 1) / processors) / pieces + 0.01 * pieces;
        if (time < least) least = time, best = {tiles - rest, rest, pieces};
    }
    return best;
}

template <typename S>
cudaError_t launch(const AttentionBackward& call, cudaStream_t stream) {
    const AttentionPlan* plan = call.plan;
    KvParameters p{};
    p.scale = call.scale;
    p.scale_log2 = call.scale * 1.4426950408889634f;
    p.batch = call.batch;
    p.heads = call.heads;
    p.key_heads = call.key_heads;
    p.queries_per_key = call.heads / call.key_heads;
    p.head_dim = call.head_dim;
    p.sums = call.dq_sum;
    p.in_boxes = !plan || call.config == 1;
    const QueryBoxes boxes = query_boxes(call);
    p.head_boxes = boxes.count();
    if (S::IN_ORDER) p.turns = reinterpret_cast<int*>(p.sums + int64_t{call.batch} * call.heads * p.head_boxes * 8192);
    p.first_box[0] = boxes.in_line(boxes.before);
    p.first_box[2] = p.head_boxes - boxes.in_line(boxes.after);
    p.by_rows = divider(boxes.rows());
    for (int axis = 0; axis < 3; ++axis) {
        p.boxes_along[axis] = boxes.along(axis);
        p.by_extent[axis] = divider(boxes.box[axis]);
    }
    Part keys[PARTS] = {line(0, call.keys, SLAB)}, queries[PARTS] = {line(0, call.queries, S::BQ)};
    p.tiles_per_head = (call.keys + KEYS - 1) / KEYS;
    p.boxes = (call.queries + S::BQ - 1) / S::BQ;
    p.slab_step[2] = SLAB;
    if (plan) {
        const int q_before = plan->q_globals ? plan->before : 0, q_after = plan->q_globals ? plan->after : 0;
        keys[0].first = plan->before, queries[0].first = q_before;
        for (int axis = 0; axis < 3; ++axis) {
            p.slab[axis] = keys[0].box[axis] = plan->slab[axis];
            p.steps[axis] = keys[0].steps[axis] = queries[0].steps[axis] = plan->steps[axis];
            p.slab_step[axis] = axis == plan->stacked ? plan->slab[axis] * plan->steps[axis] : 0;
            keys[0].shape[axis] = plan->k_shape[axis];
            queries[0].shape[axis] = plan->q_shape[axis];
            queries[0].box[axis] = plan->box[axis];
        }
        const int rows = plan->box[0] * plan->box[1] * plan->box[2];
        if (plan->before) keys[1] = line(0, plan->before, SLAB);
        if (plan->after) keys[2] = line(call.keys - plan->after, plan->after, SLAB);
        if (q_before) queries[1] = line(0, q_before, rows);
        if (q_after) queries[2] = line(call.queries - q_after, q_after, rows);
        p.tiles_per_head = plan->tiles;
        p.line_tiles = plan->line_tiles;
        p.line_record = plan->line_record;
        p.plan = plan->data;
        p.valid = plan->valid;
        p.keys_before = plan->before;
        p.globals = plan->before + plan->after;
        p.pieces = plan->pieces;
    }
    p.slab_rows = keys[0].box[0] * keys[0].box[1] * keys[0].box[2];
    p.box_rows = queries[0].box[0] * queries[0].box[1] * queries[0].box[2];
    p.slab_bytes = S::CHUNKS * 128 * p.slab_rows;
    p.box_bytes = S::CHUNKS * 128 * p.box_rows;
    p.stats_bytes = 4 * p.box_rows;
    p.stats_step = call.stats.step;
    int sixteen[3] = {};
    p.by_warp = p.box_rows % 16 == 0 && p.box_rows <= S::BQ && cut_box(queries[0], sixteen, p.warp_place);
    // A copy of a whole box has the 64 rows of one warpgroup at most.
    const bool fits = p.slab_rows <= SLAB && p.box_rows <= (S::FUSED && !p.by_warp && !p.in_boxes ? 64 : S::BQ);
    if (!fits || queries[0].box[2] % 4 || (p.pieces > 0 && !call.partial)) return cudaErrorInvalidValue;
    const int64_t tiles = (int64_t{p.tiles_per_head} + p.line_tiles) * call.batch * call.key_heads;
    if (tiles > INT32_MAX || int64_t{call.batch} * call.heads > INT32_MAX / 4) return cudaErrorInvalidConfiguration;

    int device = 0, processors = 0;
    Mapper mapper{call};
    mapper.error = cudaGetDevice(&device);
    if (mapper.error == cudaSuccess && device >= attention_fwd::DEVICES) mapper.error = cudaErrorInvalidDevice;
    if (mapper.error == cudaSuccess) mapper.error = attention_fwd::multiprocessors(device, &processors);
    if (mapper.error == cudaSuccess)
        mapper.error = attention_fwd::allow_shared_memory<attention_backward_kv<S>>(device);
    if (S::LISTED) p.together = {*plan, int64_t{call.queries} * S::D * 4, processors};
    for (int part = 0; part < PARTS; ++part) {
        Heads places;  // those of the video
        const bool video = part == 0;
        if (keys[part].shape[2]) {
            mapper.map(call.k, call.key_heads, keys[part], &p.k[part], video ? &p.k_x : &places);
            mapper.map(call.v, call.key_heads, keys[part], &p.v[part], video ? &p.v_x : &places);
            mapper.map(call.dk, call.key_heads, keys[part], &p.dk[part], video ? &p.dk_x : &places);
            mapper.map(call.dv, call.key_heads, keys[part], &p.dv[part], video ? &p.dv_x : &places);
            for (int axis = 0; axis < 3; ++axis) p.k_size[part][axis] = keys[part].shape[axis];
        }
        if (queries[part].shape[2]) {
            mapper.map(call.q, call.heads, queries[part], &p.q[part], video ? &p.q_x : &places);
            mapper.map(call.dout, call.heads, queries[part], &p.dout[part], video ? &p.dout_x : &places);
            Part rows = p.by_warp ? line(0, 0, 16) : queries[part];
            if (p.by_warp && video) std::copy_n(sixteen, 3, rows.box);
            if (S::FUSED && !p.in_boxes) mapper.map_sums(queries[part], rows.box, &p.dq[part]);
            for (int which = 0; which < 2; ++which)
                if (mapper.error == cudaSuccess)
                    mapper.error = stats_map(call.stats, which, call.batch * call.heads, part, queries[part].box,
                                             queries[part].steps, &p.stats[which][part]);
        }
    }
    if (mapper.error != cudaSuccess) return mapper.error;

    AttentionCut cut{static_cast<int>(tiles), 0, 1};
    if (S::CUT) cut = cut_tail(static_cast<int>(tiles), p.boxes * p.queries_per_key, processors, call.room);
    p.whole_tiles = cut.whole, p.split = cut.pieces;
    p.partial = call.partial;
    const int blocks = cut.whole + cut.tiles * cut.pieces;
    attention_backward_kv<S><<<blocks, S::THREADS, S::LAUNCHED, stream>>>(p);
    const cudaError_t error = cudaGetLastError();
    const bool in_pieces = cut.tiles > 0 || (plan && plan->split_tiles > 0);
    return error == cudaSuccess && in_pieces ? attention_backward_sum(call, cut, stream) : error;
}

template <typename Element, Sees SEES, Dq DQ>
cudaError_t choose(const AttentionBackward& call, cudaStream_t stream) {
    if (call.head_dim > 64) return launch<KvShape<Element, 128, 64, SEES, DQ>>(call, stream);
    return launch<KvShape<Element, 64, 128, SEES, DQ>>(call, stream);
}

template <Sees SEES, Dq DQ>
cudaError_t choose(const AttentionBackward& call, cudaStream_t stream) {
    if (call.bf16) return choose<__nv_bfloat16, SEES, DQ>(call, stream);
    return choose<__half, SEES, DQ>(call, stream);
}

}  // namespace

cudaError_t attention_backward_kv(const AttentionBackward& call, cudaStream_t stream) {
    if (call.batch == 0) return cudaSuccess;
    // What each number stands for is said with dq_sum_size.
    const bool planned = call.plan != nullptr;
    const bool fits = call.config == 1 ? planned : call.config == 2 ? call.dq_sum && !planned : call.config == 0;
    if (!fits || !(planned || call.dq_sum)) return cudaErrorInvalidValue;
    if (!call.dq_sum) {
        if (call.config == 1) return choose<Sees::LISTED, Dq::ELSEWHERE>(call, stream);
        return choose<Sees::PLANNED, Dq::ELSEWHERE>(call, stream);
    }
    const cudaError_t error = cudaMemsetAsync(call.dq_sum, 0, dq_sum_size(call) * sizeof(float), stream);
    if (error != cudaSuccess) return error;
    if (call.config == 2) return choose<Sees::ALL, Dq::IN_ORDER>(call, stream);
    if (planned) return choose<Sees::PLANNED, Dq::ANY_ORDER>(call, stream);
    return choose<Sees::ALL, Dq::ANY_ORDER>(call, stream);
}

}  // namespace stattn
